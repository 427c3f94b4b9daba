"""`bench.py scale`: training steps on 1 to N GPUs of one machine, as many pairs on each.

A step is train.py's: forward and backward pass, gradients averaged over the ranks, AdamW, moving
average, on encoded pairs that lie on the device. What the averaging costs is the time of a step
less that of a step without it. Every number of GPUs has processes and a time limit of its own.

    python bench.py scale                           1 GPU and all that there are
    python bench.py scale --gpus 1 2 4 8 --divide-optimizer
    python bench.py scale --gpus 1 2 --check        the same steps on each: are the losses the same?
"""

import argparse
import json
import math
import os
import socket
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn

from runtime import ranks as distributed
import engine
import model
import train
from benchmarks import GB, row, variants
from benchmarks.train import WARMED_UP, made_config, network, pairs
from benchmarks.variants import median_seconds, seconds_in_a_row, tell
from runtime.optimizer import Ema, Optimizer

# Steps; steps that are measured, one after the other without a wait, as in training; transfers
WARM, STEPS, TRANSFERS = 3, 30, 5
CHECKED, TINY_CHECKED = 20, 4           # steps of --check
LIMIT = 260                             # seconds, of which compiling anew is half
MIB = 2**20


# ---- the process that asks

def add_options(parser):
    parser.add_argument("--gpus", type=int, nargs="+", default=[],
                        help="how many to use, one after the other; default: 1, and all there are")
    parser.add_argument("--batch", type=int, default=192, help="pairs a GPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="the UNet")
    parser.add_argument("--divide-optimizer", action="store_true",
                        help="also with moments and average divided among the GPUs (ZeRO-1)")
    parser.add_argument("--check", action="store_true",
                        help="instead: steps of the same pairs on each, and their losses")
    parser.add_argument("--seconds-limit", type=float, default=530, help="of everything")
    parser.add_argument("--tiny", action="store_true", help="a network of a few kilobytes")


def run(given):
    worlds = given.gpus or sorted({1, max(1, torch.cuda.device_count())})
    if min(given.batch, given.seconds_limit, *worlds) <= 0:
        raise ValueError("--gpus, --batch and --seconds-limit must be positive")
    found = variants.collect("benchmarks.scale", jobs(given, worlds), given.seconds_limit)
    losses = {name: entry.pop("losses") for name, entry in found.items() if "losses" in entry}
    alone = found_name(label(1), "a GPU")
    rows = variants.rows_of(found, {name: [alone] for name in found
                                    if name.endswith(": a GPU") and name != alone}, "")
    for name in list(losses)[1:]:
        first = losses[next(iter(losses))]
        apart = max(abs(a - b) / b for a, b in zip(losses[name], first, strict=True))
        rows.append(row(f"{name}, largest relative difference", apart, ""))
    return rows


def jobs(given, worlds):
    """What to measure: {name, world, divided, ...}; in --check `pairs` a step, over all ranks."""
    same = math.lcm(*worlds) * given.batch if given.check else 0
    return [{"name": label(world, divided), "world": world, "divided": divided, "pairs": same,
             "batch": given.batch, "compile": given.compile, "tiny": given.tiny, "limit": LIMIT}
            for world in worlds
            for divided in ((False, True) if given.divide_optimizer and world > 1 else (False,))]


def label(world, divided=False):
    return f"{world} GPU{'s' * (world > 1)}{', divided' * divided}"


def found_name(name, what):
    return f"scale: {name}: {what}"


# ---- the processes that answer

def answer(job):
    """In as many processes as a job has ranks; they end with this one's group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if job["world"] == 1:
        work(0, job, port)
    else:
        torch.multiprocessing.spawn(work, (job, port), job["world"])


def work(rank, job, port):
    """One rank of a job."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks, device = distributed.join(variants.device(), job["compile"])
    if device.type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // job["world"]))
    torch.backends.cudnn.benchmark = device.type == "cuda"
    training = Training(job, ranks, device)
    (check if job["pairs"] else measure)(job, training, ranks)
    ranks.close()


class Training:
    """What train.py trains, and its step. Random weights are the same on all ranks."""
    def __init__(self, job, ranks, device):
        self.ranks, self.device = ranks, device
        self.config = made_config(job["tiny"], job["batch"], device=device.type,
                                  divide_optimizer=job["divided"])
        torch.manual_seed(0)
        with device:
            self.net = network(self.config).train()
        engine.convert(self.net)
        unet = self.net.model.diffusion_model
        for parameter in unet.parameters():     # layers that start as zeros hide what is wrong
            if not parameter.any():
                nn.init.normal_(parameter, std=0.01)
        if device.type == "cuda":
            engine.channels_last(self.net)
        self.ema = Ema(unet, self.config.ema_decay, ranks, job["divided"])
        self.optimizer = Optimizer(self.net, self.config, ranks)
        if job["compile"]:
            engine.compiled(self.net)
        self.wrapped = ranks.wrap(self.net)

    def micro_step(self, given, micro_steps=1, last=True):
        """Loss (b,) of pairs, whose gradients are averaged over the ranks at the `last` one."""
        *given, draws = given
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        with nullcontext() if last or self.ranks.world == 1 else self.wrapped.no_sync():
            return train.forward_backward(self.wrapped, autocast, micro_steps, self.config.drop,
                                          *given, *vars(draws).values())

    def update(self):
        self.optimizer.step(WARMED_UP, self.ema)


def measure(job, training, ranks):
    """Tells speed, memory, and what the averaging of gradients costs."""
    given, device = pairs(training.config, job["batch"], training.device), training.device
    count, transfers = (1, 1) if job["tiny"] else (STEPS, TRANSFERS)

    def step(last=True):
        loss = training.micro_step(given, last=last)
        training.update()
        return loss

    def say(what, value, unit):
        if ranks.rank == 0:
            tell(found_name(job["name"], what), value, unit)

    def slowest(seconds):
        seconds = torch.tensor(seconds, device=device)
        if ranks.world > 1:
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    start = time.perf_counter()
    loss = step().mean().item()
    if not math.isfinite(loss):
        raise ValueError(f"{job['name']}: the loss is {loss}")
    say("first step", time.perf_counter() - start, "s")
    for _ in range(WARM):
        step()
    seconds = slowest(seconds_in_a_row(step, count, 0))
    say("all", ranks.world * job["batch"] / seconds, "pairs/s")
    say("a GPU", job["batch"] / seconds, "pairs/s")
    say("step", 1e3 * seconds, "ms")
    if device.type == "cuda":
        say("peak memory a GPU", variants.peak_gb(), "GB")
    if ranks.world == 1:
        return
    apart = slowest(seconds_in_a_row(lambda: step(last=False), count, 0))
    say("averaging gradients, not hidden", 1e3 * (seconds - apart), "ms")
    size = sum(p.numel() for p in training.optimizer.trained.values())
    buckets = torch.zeros(size, device=device).split(distributed.BUCKET * MIB // 4)

    def send():
        for sent in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            sent.wait()
    send()
    alone = slowest(median_seconds(send, transfers))
    say("gradients", 4 * size / GB, "GB")
    say("sending them alone", 1e3 * alone, "ms")
    say("sending them alone, gradients", 4 * size / alone / GB, "GB/s")


def check(job, training, ranks):
    """Tells the losses of steps of the same pairs and draws, however many ranks share them."""
    share, batch, device = job["pairs"] // ranks.world, job["batch"], training.device
    torch.manual_seed(1)
    *given, _ = pairs(training.config, job["pairs"], device)
    shape, losses = model.latent_shape(training.config), []
    for step in range(TINY_CHECKED if job["tiny"] else CHECKED):
        loss, first = torch.zeros((), device=device), ranks.rank * share
        for at in range(first, first + share, batch):
            numbers = step * job["pairs"] + torch.arange(at, at + batch, device=device)
            mine = *(values[at:at + batch] for values in given), engine.draw(0, numbers, shape)
            last = at + batch == first + share
            loss += training.micro_step(mine, share // batch, last).sum() / job["pairs"]
        training.update()
        losses.append(ranks.all_reduce(loss).item())
    if ranks.rank == 0:
        tell(found_name(job["name"], f"loss after {len(losses)} steps"), losses[-1], "",
             losses=losses)


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
