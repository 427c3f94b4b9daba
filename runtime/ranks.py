"""The ranks of a run: one process, or several under torchrun, that stay together step by step.

Two groups: one for tensors (NCCL or gloo), and one over the hosts' network alone, at which all
ranks meet once a micro-step. It carries the word that somebody was asked to stop, absorbs whatever
one rank does alone (saving, sampling), and notices at once when a process is gone, so that the
timeout of the other group can be short.

ZeRO-1 (arXiv:1910.02054): what is kept once a parameter, AdamW's moments and the average, can be
divided among the ranks; parameters and gradients stay whole. Of 20 bytes a parameter (weight,
gradient, two moments, average, 4 each) that divides 12, and results are those of an undivided run
bit for bit.
"""

import atexit
import inspect
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runtime import command, workers

SOLO = timedelta(minutes=60)        # of one rank that works alone, scoring included
STUCK = timedelta(minutes=1)        # of a transfer between GPUs: all ranks enter it together
COMPILING = timedelta(minutes=15)   # the same where ranks may still be compiling their first step
LEAVING = 0.1                       # seconds that threads get to end what they do, see leave
# MiB of gradients that are sent together. A compiled network is cut into a graph for every bucket
# (torch._dynamo.backends.distributed), so that one is sent while the next graph's backward pass
# runs: 13 graphs for the full-size UNet, of about a stage of the widest level each.
BUCKET = 256


class Alone:
    """A run of one process: what Ranks offers, without any communication."""
    rank, world = 0, 1

    def all_reduce(self, values):
        """The sum over the ranks of a tensor, in place."""
        return values

    def any_rank(self, flag):
        """Whether the flag of any rank is true. All ranks meet here."""
        return bool(flag)

    def broadcast_object(self, value):
        """Rank 0's value, on every rank: anything that can be pickled."""
        return self.gather(value if self.rank == 0 else None)[0]

    def gather(self, value):
        """The values of all ranks, a list in their order, on every rank."""
        return [value]

    def broadcast(self, values, owner):
        """The owner's tensor, in place, on every rank; one without gaps, laid out alike on all."""
        return values

    def on_rank_0(self, function, *arguments):
        """What a function gives on rank 0, where alone it runs; its errors are raised on every rank
        as one ValueError."""
        found, problem = None, ""
        if self.rank == 0:
            try:
                found = function(*arguments)
            except (ValueError, OSError) as err:
                problem = command.reason(err)
        if problem := self.broadcast_object(problem):
            raise ValueError(problem)
        return found

    @torch.no_grad()
    def from_rank_0(self, tensors, like):
        """Yields (name, tensor) of what rank 0's `tensors` has of the names in `like`, {name:
        tensor}, on every rank, laid out as there. All ranks go through it together; a tensor is
        good until the next one is asked for."""
        for name in self.broadcast_object([name for name in like if name in tensors]):
            values = torch.empty_like(like[name])
            if self.rank == 0:
                values.copy_(tensors[name])
            yield name, self.broadcast(values, 0)

    def wrap(self, net):
        """The module whose backward pass averages gradients over the ranks."""
        return net

    def close(self, stuck=False):
        """Leaves the group. stuck: a transfer may be under way that never ends."""


class Ranks(Alone):
    """This process among the others: `rank` of `world`, on `device`."""
    def __init__(self, device, compiles=False, solo=SOLO):
        store, self.rank, self.world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun on one node keeps its store when it starts the ranks again, and in it the
            # addresses of those that died
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
        place = {"store": store, "rank": self.rank, "world_size": self.world}
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=COMPILING if compiles else STUCK,
                                    device_id=device, **place)
            self.hosts = dist.new_group(backend="gloo", timeout=solo)
        else:
            dist.init_process_group("gloo", timeout=solo, **place)
            self.hosts = dist.group.WORLD

    def all_reduce(self, values):
        dist.all_reduce(values)
        return values

    def any_rank(self, flag):
        count = torch.tensor(float(bool(flag)))
        dist.all_reduce(count, group=self.hosts)
        return count.item() > 0

    def gather(self, value):
        box = [None] * self.world
        dist.all_gather_object(box, value, group=self.hosts)
        return box

    def broadcast(self, values, owner):
        dist.broadcast(values.as_strided((values.numel(),), (1,)), owner)   # as it lies in memory
        return values

    def wrap(self, net):
        # the schedule's tables never change, so there are no buffers to broadcast every step;
        # torch 2.13 has another name for that
        options = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        return DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET,
                                       **{name: False})

    def close(self, stuck=False):
        if stuck:       # its other end may never answer, also not while Python ends
            atexit.register(os._exit, 1)
        if not stuck or self.hosts is dist.group.WORLD:     # NCCL would wait for the transfer
            leave()


ALONE = Alone()


def leave():
    """Leaves the group of the ranks.

    A thread of gloo's needs the interpreter's lock to let go of a tensor. One that is still waiting
    for it when the interpreter ends aborts the process, whose work was done: so it gets it first.
    """
    time.sleep(LEAVING)
    dist.destroy_process_group()


class Division:
    """Which rank keeps what belongs to a parameter: every rank its own, or, divided, one of them.

    parameters: {name: parameter}, the same on all ranks. `mine` are those that this rank keeps.
    """
    def __init__(self, parameters, ranks=ALONE, divided=False):
        self.parameters, self.ranks = parameters, ranks
        self.divided = divided and ranks.world > 1
        self.owner = dict.fromkeys(parameters, ranks.rank)
        if self.divided:            # the largest first, each to the rank that has least
            load = [0] * ranks.world
            for name in sorted(parameters, key=lambda name: -parameters[name].numel()):
                self.owner[name] = load.index(min(load))
                load[self.owner[name]] += parameters[name].numel()
        self.mine = {name: p for name, p in parameters.items() if self.owner[name] == ranks.rank}

    @torch.no_grad()
    def gather(self, kept):
        """Yields (name, tensor) of every parameter, of what the ranks keep: {name: tensor}. All
        ranks go through it together; a tensor is good until the next one is asked for."""
        for name, p in self.parameters.items():
            tensor = kept[name] if name in kept else torch.empty_like(p)
            yield name, self.ranks.broadcast(tensor, self.owner[name]) if self.divided else tensor

    @torch.no_grad()
    def broadcast(self):
        """Every parameter becomes its owner's, on all ranks."""
        if self.divided:
            for name, p in self.parameters.items():
                self.ranks.broadcast(p.data, self.owner[name])


# ---- how a rank begins and ends

def device_of(name, among=("cuda", "mps", "cpu")):
    """The torch.device of a name, or of "auto", the first of `among` that is there. ValueError
    where this machine has none of that name."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    there = [kind for kind in among if found[kind]]
    if name != "auto" and name not in there:
        raise ValueError(f"--device {name}: this machine has {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def own_device(device):
    """The device of this rank: of "cuda" its own GPU, which becomes the current one, as Triton's
    kernels and CUDA's events need. ValueError where there is no such GPU."""
    if device.type != "cuda":
        return device
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= there:
        raise ValueError(f"local rank {local} has no GPU of its own, this machine has {there}: "
                         f"torchrun --nproc_per_node {there}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join(device, compiles=False, solo=SOLO):
    """(the ranks of this run, this rank's own device), see own_device. solo: the longest that one
    rank may work alone."""
    device = own_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:     # nobody would stop what torchrun has started
        workers.end_with_parent()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE, device
    return Ranks(device, compiles, solo), device


def is_loss_of_a_rank(err):
    """Whether an error is that of a transfer whose other end is gone."""
    # gloo's errors are plain RuntimeErrors, which begin with the file that they come from
    return isinstance(err, dist.DistError) or "gloo/" in str(err)
