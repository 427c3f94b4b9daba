"""`bench.py train`: steps of training the full-size UNet, beside diffusers' and the original's way.

A step is forward, backward, AdamW and the moving average, on encoded pairs that lie on the device
(drawing, reading and sending pairs is not in it). Every variant runs in a process of its own, with
a time limit, and its rows are printed as they are measured: what fails or compiles for too long
costs the others nothing. The most telling come first.

    python bench.py train --batch 192 48 --variants ceilings kernels compiled diffusers
    python bench.py train --where compiled --batch 192      GPU time by kind of kernel
"""

import copy
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import camera
from runtime import cost
import engine
import model
from engine.norm import group_norm
import train
import vae
from benchmarks import GB, encode, row, variants
from benchmarks.variants import ask, seconds_in_a_row
from configs import Config, Source
from runtime.ranks import ALONE
from runtime.optimizer import Ema, Optimizer

EMBEDDING = 768
WARM, LEAST_STEPS, MEASURED = 3, 5, 4.0         # steps; steps; seconds
SUSTAINED = 4.0                         # seconds of products, after which a GPU runs at its limit
PROFILED = 3                            # steps
ONCE_SECONDS = 90                       # that ceilings or kernels may take
EMA_DECAY = 0.9999
WARMED_UP = 1000                        # a step with the full learning rate
TINY = {"latent": "pixels", "image_size": 32, "model_channels": 32, "channel_mult": (1, 2),
        "num_res_blocks": 1, "attention_resolutions": (1,), "num_heads": 2, "context_dim": 16,
        "norm_groups": 8}


@dataclass(frozen=True)
class Variant:
    """A way to train. `seconds` it may take, on an H200."""
    what: str
    network: str = "ours"       # ours | diffusers
    compiled: str = ""          # "" eager | whole | blocks, each of its own
    layout: str = "off"         # of the compiler: off, ours is kept | on, channels-last | own
    kernels: bool = True        # norm.py's, not PyTorch's GroupNorm
    halves: bool = False        # bf16 weights beside fp32 masters, not a cast by autocast
    tuned: bool = False         # the compiler tries out sizes of its kernels
    reference: bool = False     # fp32, activations recomputed, averages one by one
    images: bool = False        # raw pairs: autoencoder and CLIP are part of the step
    seconds: int = 240


# In order of what they tell. Those of DEFAULT fit into nine minutes of an H200.
VARIANTS = {
    "compiled": Variant("compiled", compiled="whole"),
    "halves": Variant("compiled, weights in bf16 beside masters", compiled="whole", halves=True),
    "eager": Variant("eager", seconds=90),
    "diffusers": Variant("diffusers, compiled", "diffusers", "whole", layout="own"),
    "diffusers-layout": Variant("diffusers, compiled, channels-last forced", "diffusers", "whole",
                                layout="on"),
    "blocks": Variant("compiled block by block", compiled="blocks"),
    "plain-norm": Variant("compiled, PyTorch's GroupNorm", compiled="whole", kernels=False),
    "layout": Variant("compiled, channels-last forced", compiled="whole", layout="on"),
    "tuned": Variant("compiled, kernels' sizes tried out", compiled="whole", tuned=True,
                     seconds=500),
    "images": Variant("compiled, from images", compiled="whole", images=True),
    "diffusers-images": Variant("diffusers, compiled, from images", "diffusers", "whole",
                                layout="own", images=True, seconds=300),
    "diffusers-eager": Variant("diffusers, eager", "diffusers", seconds=90),
    "reference": Variant("the reference's way", kernels=False, reference=True, seconds=120),
}
CEILINGS, KERNELS = "ceilings", "kernels"
DEFAULT = (CEILINGS, KERNELS, "compiled", "halves", "eager", "diffusers")


# ---- the process that asks

def add_options(parser):
    parser.add_argument("--batch", type=int, nargs="+", default=[192, 48], help="pairs a step")
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT),
                        choices=[CEILINGS, KERNELS, *VARIANTS], help="what is measured, in order")
    parser.add_argument("--where", choices=list(VARIANTS), default="",
                        help="profile this variant, and nothing else")
    parser.add_argument("--seconds-limit", type=float, default=530, help="of everything")
    parser.add_argument("--tiny", action="store_true", help="a network of a few kilobytes")


def run(given):
    if min(given.batch) < 1 or given.seconds_limit <= 0:
        raise ValueError("--batch and --seconds-limit must be positive")
    end = time.monotonic() + given.seconds_limit
    rows, ceiling, work = [], None, flops_a_pair(given.tiny)
    for job in jobs(given):
        for found in ask("benchmarks.train", job, min(end - time.monotonic(), limit_of(job))):
            if found["name"] == "train: bf16 product, sustained":
                ceiling = found["value"]
            if found["unit"] == "pairs/s" and ceiling and "images" not in found["name"]:
                found["ceiling_share"] = found["value"] * work / 1e12 / ceiling
            rows.append(row(**found))
            share = f"  {found['ceiling_share']:.0%} of ceiling" if "ceiling_share" in found else ""
            print(f"{found['name']}  {found['value']:.4g} {found['unit']}{share}", flush=True)
    return rows


def jobs(given):
    """What to measure: {name, variant, batch, tiny, where}. What has no steps, then the first one
    at every batch, then the others batch by batch."""
    once = [name for name in given.variants if name in (CEILINGS, KERNELS)]
    steps = [name for name in given.variants if name not in once]
    order = [(name, given.batch[0]) for name in once]
    order += [(name, batch) for name in steps[:1] for batch in given.batch]
    order += [(name, batch) for batch in given.batch for name in steps[1:]]
    if given.where:
        order = [(given.where, given.batch[0])]
    return [{"name": f"{name} at batch {batch}", "variant": name, "batch": batch,
             "tiny": given.tiny, "where": bool(given.where)} for name, batch in order]


def limit_of(job):
    """Seconds that a job may take."""
    return VARIANTS[job["variant"]].seconds if job["variant"] in VARIANTS else ONCE_SECONDS


def flops_a_pair(tiny):
    """Of the UNet, forward and backward."""
    return (1 + cost.BACKWARD) * cost.of(made_config(tiny, 1), ALONE, 1).flops


# ---- the process that answers

def answer(job):
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if job["variant"] == CEILINGS:
        ceilings(device, job["batch"], job["tiny"])
    elif job["variant"] == KERNELS:
        norm_kernels(device, job["batch"], job["tiny"])
    else:
        training(VARIANTS[job["variant"]], device, job["batch"], job["tiny"], job["where"])


def tell(name, value, unit):
    variants.tell(f"train: {name}", value, unit)


def ceilings(device, batch, tiny):
    """What the device does at best: products, the UNet's convolutions and attention, a copy."""
    def random(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    side, channels = (256, 32) if tiny else (8192, 320)
    a, b = random(side, side), random(side, side)
    work = 2 * side**3 / 1e12
    for name, seconds in (("burst", 0.1), ("sustained", 0.2 if tiny else SUSTAINED)):
        tell(f"bf16 product, {name}", work / seconds_in_a_row(lambda: a @ b, 3, seconds),
             "TFLOP/s")
    values = random(side * side * (1 if tiny else 8))
    other = torch.empty_like(values)
    taken = seconds_in_a_row(lambda: other.copy_(values), 3, 0.1)
    tell("a copy, bytes read and written", 2 * values.nbytes / taken / GB, "GB/s")
    for c_in, c_out, grid in ((1, 1, 32), (3, 1, 32), (2, 2, 16), (4, 4, 8), (8, 4, 8)):
        x = random(batch, c_in * channels, grid, grid).to(memory_format=torch.channels_last)
        weight = random(c_out * channels, c_in * channels, 3, 3).to(
            memory_format=torch.channels_last)
        x.requires_grad_(), weight.requires_grad_()
        dy = torch.ones_like(F.conv2d(x, weight, padding=1))

        def both():
            torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), dy)
        work = 3 * 2 * x.numel() * c_out * channels * 9 / 1e12
        tell(f"3x3 conv, {c_in * channels} to {c_out * channels}, {grid} x {grid}",
             work / seconds_in_a_row(both, 3, 0.1), "TFLOP/s")
    attention_ceilings(batch, channels, random)


def attention_ceilings(batch, channels, random):
    """Self-attention, forward and backward, by every backend that runs it."""
    backends = torch.nn.attention.SDPBackend
    for mult, grid in ((1, 32), (2, 16), (4, 8)):
        q, k, v = (random(batch, grid * grid, 8, mult * channels // 8).transpose(1, 2)
                   .requires_grad_() for _ in range(3))
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            def both():
                with torch.nn.attention.sdpa_kernel(getattr(backends, name)):
                    out = F.scaled_dot_product_attention(q, k, v)
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            try:
                tell(f"attention, heads of {mult * channels // 8}, {name.lower().split('_')[0]}",
                     1e3 * seconds_in_a_row(both, 3, 0.1), "ms")
            except RuntimeError as err:
                print(f"attention {name}, {mult * channels // 8}: {str(err).splitlines()[0]}",
                      flush=True)


def norm_kernels(device, batch, tiny):
    """norm.py's kernels beside PyTorch's own: bytes that must move, forward and backward (5 passes
    at best, as kernels that kept a grid in registers would need), a second."""
    if not (engine.kernels.enabled["norm"] and device.type == "cuda"):
        print("norm.py's kernels need a GPU and Triton", flush=True)
        return
    sizes = (320, 32), (960, 32), (640, 16), (1280, 8), (2560, 4)
    for channels, grid in sizes[:1 if tiny else None]:
        x = torch.randn(batch, channels, grid, grid, device=device, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        norm = nn.GroupNorm(32, channels).to(device)
        shift = torch.ones(batch, channels, device=device, requires_grad=True)
        dy = torch.randn_like(x)

        def both():
            y = group_norm(norm, x, True, shift)
            torch.autograd.grad(y, (x, norm.weight, norm.bias, shift), dy)
        for engine.kernels.enabled["norm"] in (False, True):
            tell(f"GroupNorm and SiLU, {channels} x {grid} x {grid}"
                 f"{'' if engine.kernels.enabled["norm"] else ', PyTorch'}",
                 5 * x.nbytes / seconds_in_a_row(both, 10, 0.15) / GB, "GB/s")


# ---- a step

def made_config(tiny, batch, **changes):
    source = Source("none", "encoded", "none", 1.0)
    return Config((source,), batch_size=batch, micro_batch=batch, ema_decay=EMA_DECAY,
                  mode="7dof", **(TINY if tiny else {}), **changes)


def network(config):
    """The ZeroNVS of a Config, without its encoders: pairs are encoded."""
    channels = model.latent_shape(config)[0]
    unet = model.UNet(2 * channels, channels, config.model_channels, config.channel_mult,
                      config.num_res_blocks, config.attention_resolutions, config.num_heads,
                      config.context_dim, norm_groups=config.norm_groups)
    for stage in unet.modules():
        if isinstance(stage, model.Stage):
            stage.recompute = config.checkpoint_activations
    return model.ZeroNVS(unet, model.Pixels(), model.NoEmbedding(), config.mode, vae.SCALE_FACTOR,
                         EMBEDDING, config.context_dim)


def pairs(config, batch, device):
    """Encoded pairs as ZeroNVS.forward takes them, and what chance decides about them."""
    shape = model.latent_shape(config)
    mean, z_cond = torch.randn(2, batch, *shape, device=device)
    numbers = torch.arange(batch, device=device)
    return (mean, torch.full_like(mean, vae.LOGVAR_MIN), z_cond,
            torch.randn(batch, EMBEDDING, device=device),
            torch.randn(batch, camera.MODES[config.mode].width, device=device),
            diffusion.draw(0, numbers, shape))


class Halves:
    """bf16 weights in a module, beside the fp32 masters that were in it and that are trained: one
    cast a step. Vectors (norms, biases) stay as they are."""
    def __init__(self, module):
        self.masters, self.halves = [], []
        for part in module.modules():
            for name, master in list(part.named_parameters(recurse=False)):
                if master.ndim > 1 and master.requires_grad:
                    half = nn.Parameter(master.detach().bfloat16())
                    setattr(part, name, half)
                    self.masters.append(master), self.halves.append(half)

    @torch.no_grad()
    def collect(self):
        """Adds the gradients to the masters', in fp32. Once a micro-step."""
        fresh = [torch.empty_like(master) for master in self.masters]
        torch._foreach_copy_(fresh, [half.grad for half in self.halves])
        for master, half, grad in zip(self.masters, self.halves, fresh):
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            half.grad = None

    @torch.no_grad()
    def refresh(self):
        torch._foreach_copy_(self.halves, self.masters)


class Theirs(nn.Module):
    """diffusers' UNet, called as ours is."""
    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.register_buffer("nothing", torch.zeros(()))

    def forward(self, x, t, context):
        return self.unet(x, t, context, return_dict=False)[0]

    def idle_parameters(self):
        return {"nothing": self.nothing}    # they all get a gradient; train.py needs some to decay


def diffusers_network(config):
    """The same network by diffusers, in our loss. Raises ImportError where it is not installed."""
    from diffusers import UNet2DConditionModel
    channels, last = model.latent_shape(config)[0], len(config.channel_mult) - 1
    attends = [2**level in config.attention_resolutions for level in range(last + 1)]
    unet = UNet2DConditionModel(
        sample_size=model.latent_shape(config)[1], in_channels=2 * channels, out_channels=channels,
        down_block_types=[("CrossAttn" if a else "") + "DownBlock2D" for a in attends],
        up_block_types=[("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(attends)],
        block_out_channels=[mult * config.model_channels for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks, attention_head_dim=config.num_heads,
        cross_attention_dim=config.context_dim, norm_num_groups=config.norm_groups)
    return model.ZeroNVS(Theirs(unet), model.Pixels(), model.NoEmbedding(), config.mode,
                         vae.SCALE_FACTOR, EMBEDDING, config.context_dim)


class Step:
    """A whole step of training, at every call; it returns the losses (b,)."""
    def __init__(self, variant, config, batch, device, tiny=False):
        build = diffusers_network if variant.network == "diffusers" else network
        with device:
            self.net = build(config).train()
        engine.convert(self.net)
        self.unet = self.net.model.diffusion_model
        for parameter in self.unet.parameters():    # layers that start as zeros hide what is wrong
            if not parameter.any():
                nn.init.normal_(parameter, std=0.01)
        if not variant.reference:
            self.net.to(memory_format=torch.channels_last)
        self.optimizer = Optimizer(self.net, config)
        self.average = SlowEma(self.unet) if variant.reference else Ema(self.unet, EMA_DECAY)
        self.halves = Halves(self.unet) if variant.halves else None
        self.pairs, self.device, self.variant = pairs(config, batch, device), device, variant
        self.images = Images(variant, batch, device, tiny) if variant.images else None
        self.passes = self.forward_backward
        self.drop = config.drop
        if variant.compiled == "whole":
            self.unet.compile()
        elif variant.compiled:
            for part in self.unet.modules():
                if isinstance(part, (model.ResBlock, model.SpatialTransformer)):
                    part.compile()

    def __call__(self):
        loss = self.passes(*self.pairs[:5], *vars(self.pairs[5]).values())
        if self.halves:
            self.halves.collect()
        if self.variant.reference:
            self.optimizer.step(WARMED_UP)
            self.average.update()
        else:
            self.optimizer.step(WARMED_UP, self.average)
        if self.halves:
            self.halves.refresh()
        return loss

    def forward_backward(self, *given):
        autocast = (nullcontext() if self.variant.reference else
                    torch.autocast(self.device.type, torch.bfloat16))
        if self.images:
            with autocast:
                given = *self.images(), *given[4:]
        return train.forward_backward(self.net, autocast, 1, self.drop, *given)

    def record(self):
        """From the next call on the passes are a CUDA graph, as train.py's are where asked for."""
        self.passes = engine.Recorded(self.forward_backward, self.net.parameters())


class Images:
    """What the frozen networks make of images, at every call: mean, logvar, z_cond, embedding."""
    def __init__(self, variant, batch, device, tiny):
        peer, side = variant.network == "diffusers", encode.TINY_SIDE if tiny else encode.SIDE
        self.networks = []
        for build in (encode.PEERS if peer else encode.OURS).values():
            with device:
                module, function = build(tiny)
            module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
            if peer and device.type == "cuda":
                module.to(torch.bfloat16)   # ours as train.py has it: cast by autocast every time
            self.networks.append((module, torch.compile(function, dynamic=False)))
        self.target, self.cond = torch.rand(2, batch, 3, side, side, device=device) * 2 - 1
        if peer and device.type == "cuda":
            self.target, self.cond = self.target.bfloat16(), self.cond.bfloat16()

    @torch.no_grad()
    def __call__(self):
        (_, moments_of), (_, embedding_of) = self.networks
        embedding = embedding_of(self.cond).float()
        return (*moments_of(self.target).float().chunk(2, dim=1),
                moments_of(self.cond).float().chunk(2, dim=1)[0],
                F.pad(embedding, (0, EMBEDDING - embedding.shape[1])))      # a tiny CLIP's is short


class SlowEma:
    """The reference's: weights one after the other."""
    def __init__(self, unet):
        self.live, self.average = unet, copy.deepcopy(unet)

    @torch.no_grad()
    def update(self):
        for live, average in zip(self.live.parameters(), self.average.parameters()):
            average.sub_((1 - EMA_DECAY) * (average - live))


def training(variant, device, batch, tiny, where):
    """Tells pairs a second, time to the first step, peak memory; then the same as a CUDA graph."""
    import torch._dynamo as dynamo
    import torch._inductor.config as inductor
    inductor.layout_optimization = variant.layout != "off"
    inductor.force_layout_optimization = variant.layout == "on"
    inductor.max_autotune_pointwise = inductor.coordinate_descent_tuning = variant.tuned
    dynamo.config.recompile_limit = 64      # blocks of every shape share their code
    engine.kernels.enabled["norm"] &= variant.kernels
    config = made_config(tiny, batch, checkpoint_activations=variant.reference, device=device.type)
    if tiny and variant.images:
        config = replace(config, latent="vae", image_size=8 * encode.TINY_SIDE // 2)
    name, cuda = f"{variant.what}, batch {batch}", device.type == "cuda"
    start = time.perf_counter()
    step = Step(variant, config, batch, device, tiny)
    built = time.perf_counter()
    loss = step().mean().item()
    if not math.isfinite(loss):
        raise ValueError(f"{name}: the loss is {loss}")
    print(f"{name}: model made in {built - start:.1f} s", flush=True)
    tell(f"{name}: first step", time.perf_counter() - built, "s")
    for _ in range(WARM):
        step()
    least, seconds = (2, 0.0) if tiny else (LEAST_STEPS, MEASURED)
    if where:
        return variants.where(f"train: {name}", step, PROFILED)
    tell(name, batch / seconds_in_a_row(step, least, seconds), "pairs/s")
    if cuda:
        tell(f"{name}: peak memory", torch.cuda.max_memory_allocated() / GB, "GB")
    print(f"{name}: loss {loss:.4f}, then {step().mean().item():.4f}", flush=True)
    if cuda and not variant.reference:
        torch.cuda.reset_peak_memory_stats()    # while it is recorded a graph has all that it needs
        step.record()
        step()
        tell(f"{name}, CUDA graph", batch / seconds_in_a_row(step, least, seconds), "pairs/s")
        tell(f"{name}, CUDA graph: peak memory", torch.cuda.max_memory_allocated() / GB, "GB")


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
