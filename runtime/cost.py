"""What a run needs, found before it is built: bytes and arithmetic of one rank.

State (weights, gradients, moments, average) is counted. Activations are an estimate: what one
forward pass of the UNet keeps for its backward pass, found with tensors that have shapes and no
values, under the CPU's rules of precision; compiling keeps fewer, workspaces of convolutions come
on top.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import engine
import model
from runtime import lora
from runtime.ranks import ALONE

GB = 1e9
RUNTIME = 1 * GB                    # of CUDA, its libraries and what lies between tensors
FLOAT = 4                           # bytes
BACKWARD = 2                        # FLOPs of a backward pass, in forward passes
CEILING_SIDE = {"cuda": 8192}       # of the matrices of `ceiling`
SMALL_SIDE = 1024
CEILING_RUNS = 3
LESS = ("a smaller --micro_batch, --checkpoint_activations=true, --precision=bf16 or, on several "
        "ranks, --divide_optimizer=true lowers it")


@dataclass
class Cost:
    """Bytes of one rank, and FLOPs of the UNet's forward pass for one pair."""
    trained: int            # parameters
    frozen: int             # parameters, those of the depth network left out
    weights: int            # bytes of all of them, of buffers and of the depth network
    gradients: int
    moments: int            # AdamW's
    average: int
    activations: int        # of one micro-batch, and casts of weights: estimate
    flops: int

    @property
    def state(self):
        """Bytes that are there before the first pair is."""
        return self.weights + self.gradients + self.moments + self.average

    def __str__(self):
        names = "weights", "gradients", "moments", "average", "activations"
        parts = ", ".join(f"{name} {getattr(self, name) / GB:.3g}" for name in names)
        return f"~ {(self.state + self.activations) / GB:.3g} GB ({parts})"


def split(config, world):
    """(pairs a rank holds at once, micro-steps) of a step. ValueError where it does not divide."""
    if config.batch_size % world:
        low = config.batch_size // world * world
        near = " or ".join(str(n) for n in (low, low + world) if n)
        raise ValueError(f"batch_size {config.batch_size} is not divisible by {world} ranks of "
                         f"micro_batch {config.micro_batch}; the nearest that is: "
                         f"--batch_size={near}")
    share = config.batch_size // world
    micro_steps = -(-share // config.micro_batch)
    if share % micro_steps:
        fits = max(m for m in range(1, config.micro_batch + 1) if share % m == 0)
        raise ValueError(f"batch_size {config.batch_size} on {world} ranks is {share} pairs each, "
                         f"which do not come in equal micro-batches of {config.micro_batch} or "
                         f"fewer; --micro_batch={fits} does")
    return share // micro_steps, micro_steps


def of(config, ranks, micro_batch):
    """The Cost of a Config."""
    with torch.device("meta"):
        net = model.build(config).train()
        engine.convert(net)
    if config.lora_rank:
        lora.add(net, config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.model.diffusion_model.to_empty(device="cpu")
        activations, flops = of_forward(config, net, micro_batch)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    unet = net.model.diffusion_model
    averaged = sum(p.numel() for p in lora.updates(unet).values() or unet.parameters())
    # with micro-steps also those that are summed up, beside what ranks send and what a graph writes
    summed = (ranks.world > 1 or config.graph) and config.batch_size > ranks.world * micro_batch
    depth, share = Path(config.depth_weights), ranks.world if config.divide_optimizer else 1
    return Cost(
        trained, frozen,
        weights=(FLOAT * (trained + frozen) + sum(b.numel() * b.itemsize for b in net.buffers())
                 + (depth.stat().st_size if depth.is_file() else 0)),
        gradients=FLOAT * trained * (1 + summed), moments=2 * FLOAT * trained // share,
        average=FLOAT * averaged // share, activations=activations, flops=flops // micro_batch)


def of_forward(config, net, pairs):
    """(bytes that the UNet keeps for its backward pass, FLOPs) of so many pairs, fake tensors."""
    kept = {}           # storages by address: alive, so that no two have the same
    own = {p.untyped_storage()._cdata for p in net.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    channels, *grid = model.latent_shape(config)
    # as if it came from cc_projection, and so needs a gradient
    context = torch.zeros(pairs, 1, config.context_dim, requires_grad=True)
    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")):
        flops = flops_of(lambda: net.model.diffusion_model(
            torch.zeros(pairs, 2 * channels, *grid), torch.zeros(pairs), context))
    return sum(kept[key].nbytes() for key in kept.keys() - own), flops


def flops_of(function):
    """FLOPs of what a function without arguments runs; a multiplication and an addition are two."""
    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)
    # PyTorch's own count leaves out attention on a CPU
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counted:
        function()
    return counted.get_total_flops()


def available(device):
    """Bytes that a rank can have on its device; infinity where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):       # Windows
        return float("inf")
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fits(config, memory):
    """A line: the largest micro-batch in so many GB of a GPU that need not be there. On the safe
    side: all that is kept for one pair counts for every pair, and RUNTIME goes off."""
    one = of(replace(config, batch_size=1, micro_batch=1), ALONE, 1)
    pairs = int((memory * GB - RUNTIME - one.state) / one.activations)
    what = f"low-rank updates, rank {config.lora_rank}" if config.lora_rank else "all weights"
    return (f"{memory:g} GB, {what}: state {one.state / GB:.3g} GB, {one.activations / GB:.2g} GB "
            "a pair; by estimate " + (f"--micro_batch={pairs} fits" if pairs > 0 else
                                      f"no pair fits; {LESS}, and --lora_rank=16 most"))


def check(cost, device, say):
    """Raises ValueError where not even the state fits, says so where the estimate does not."""
    there = available(device)
    text = f"{cost}, and {device} has {there / GB:.2f} GB; {LESS}"
    if cost.state > there:
        raise ValueError(f"not enough memory: a rank needs {text}")
    if cost.state + cost.activations > there:
        say(f"memory may not suffice: a rank needs {text}")


@torch.no_grad()
def ceiling(device, precision):
    """FLOP/s of a large matrix product, the most that the chip does in this precision."""
    dtype = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32
    side = CEILING_SIDE.get(device.type, SMALL_SIDE)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(CEILING_RUNS):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def synchronize(device):
    """Waits until an accelerator is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
