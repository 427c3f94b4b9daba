"""What a run needs, found before it is built: bytes and arithmetic of one rank.

State (weights, gradients, moments, average) is counted exactly. Activations are an estimate: the
tensors that one forward pass of the UNet keeps for its backward pass, found with tensors that have
shapes and no values, under the CPU's rules of precision; compiling keeps fewer, workspaces of
convolutions come on top.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import engine
import model
from runtime.ranks import Division

GB = 1e9
FLOAT, HALF = 4, 2                  # bytes
PAIRS = 7       # divides no width of a network: tells activations from bf16 copies of weights
TAPS = 4 * 4                        # of a conv after an upsampling
BACKWARD = 2                        # FLOPs of a backward pass, in forward passes
CEILING_SIDE = {"cuda": 8192}       # of the matrices of `ceiling`
SMALL_SIDE = 1024
CEILING_RUNS = 3


@dataclass
class Cost:
    """Bytes of one rank, and FLOPs of the UNet's forward pass for one pair."""
    trained: int            # parameters
    frozen: int             # parameters, those of the depth network left out
    weights: int            # bytes of all of them, and of buffers
    depth: int              # bytes of the depth network
    gradients: int
    moments: int            # AdamW's
    average: int
    copies: int             # of weights: in bf16, and taps that are summed (conv.py); estimate
    activations: int        # of one micro-batch, estimate
    host: int               # bytes in host memory of rank 0: the copy that is being saved
    flops: int

    @property
    def state(self):
        """Bytes that are there before the first pair is."""
        return self.weights + self.depth + self.gradients + self.moments + self.average

    @property
    def total(self):
        return self.state + self.copies + self.activations

    def __str__(self):
        names = ("weights", "depth", "gradients", "moments", "average", "copies", "activations")
        labels = {"depth": "depth network", "copies": "copies", "activations": "activations ~"}
        parts = [f"{labels.get(name, name)} {getattr(self, name) / GB:.3g}"
                 for name in names if getattr(self, name)]
        return f"~ {self.total / GB:.3g} GB ({', '.join(parts)})"


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
    """The Cost of a Config, for the rank that keeps the largest share."""
    with torch.device("meta"):
        net = model.build(config).train()
        engine.convert(net)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        activations, flops = of_forward(config, net)
    unet, bf16 = net.model.diffusion_model, config.precision == "bf16"
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    averaged = dict(unet.named_parameters())
    share = {}
    for what, parameters in (("moments", trained), ("average", averaged)):
        division = Division(parameters, ranks, config.divide_optimizer)
        share[what] = max(count({name: p for name, p in parameters.items()
                                 if division.owner[name] == rank}) for rank in range(ranks.world))
    taps = sum(TAPS * part.conv.weight[..., 0, 0].numel() for part in unet.modules()
               if isinstance(part, model.Upsample))
    depth = Path(config.depth_weights)
    # with micro-steps also those that are summed up, beside what ranks send and what a graph writes
    summed = (ranks.world > 1 or config.graph) and config.batch_size > ranks.world * micro_batch
    everything = count(dict(net.named_parameters()))
    return Cost(
        trained=count(trained), frozen=everything - count(trained),
        weights=FLOAT * everything + sum(b.numel() * b.itemsize for b in net.buffers()),
        depth=depth.stat().st_size if depth.is_file() else 0,
        gradients=FLOAT * count(trained) * (1 + summed), moments=2 * FLOAT * share["moments"],
        average=FLOAT * share["average"],
        copies=HALF * (count(trained) + taps) if bf16 else FLOAT * taps,
        activations=activations // PAIRS * micro_batch,
        host=FLOAT * (3 * count(trained) + count(averaged)), flops=flops // PAIRS)


def count(parameters):
    """The elements of {name: parameter}."""
    return sum(p.numel() for p in parameters.values())


def of_forward(config, net):
    """(bytes that the UNet keeps for its backward pass, FLOPs) of PAIRS pairs, of fake tensors."""
    kept = {}           # storage -> (storage, its bytes): alive, so that no two have the same key

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage, storage.nbytes()
        return tensor

    channels, *grid = model.latent_shape(config)
    # as if it came from cc_projection, and so needs a gradient
    context = torch.zeros(PAIRS, 1, config.context_dim, requires_grad=True)
    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")):
        flops = flops_of(lambda: net.model.diffusion_model(
            torch.zeros(PAIRS, 2 * channels, *grid), torch.zeros(PAIRS), context))
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    sizes = [size for key, (_, size) in kept.items() if key not in own]
    return sum(size for size in sizes if size % PAIRS == 0), flops


def flops_of(function):
    """FLOPs of what a function without arguments runs; a multiplication and an addition are two."""
    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)
    # PyTorch's own count leaves out attention on a CPU
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counted:
        function()
    return counted.get_total_flops()


def advice(config, world):
    """The options that lower the memory that a Config needs, those that it has already left out."""
    options = []
    if config.micro_batch > 1:
        options.append(f"--micro_batch={config.micro_batch // 2}")
    if not config.checkpoint_activations:
        options.append("--checkpoint_activations=true")
    if config.precision == "fp32":
        options.append("--precision=bf16")
    if not config.divide_optimizer:
        options.append("--divide_optimizer=true" + (" on several ranks" if world == 1 else ""))
    return ", ".join(options) or "a smaller --model_channels"


def available(device):
    """Bytes that a rank can have on its device; infinity where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):       # Windows
        return float("inf")
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(cost, config, ranks, device, say):
    """Raises ValueError where not even the state fits, says so where the estimate does not."""
    there = available(device)
    if cost.state > there:
        raise ValueError(f"not enough memory: a rank needs {cost}, and {device} has "
                         f"{there / GB:.2f} GB. Lower it by {advice(config, ranks.world)}")
    if cost.total > there:
        say(f"memory may not suffice: {cost} of {there / GB:.2f} GB; "
            f"{advice(config, ranks.world)} would lower it")


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
