"""What networks need: training steps, sampling, encoding, and the engine part by part.

A step of training is train.py's: forward, backward, AdamW and the moving average, on encoded pairs
that lie on the device (drawing, reading and sending pairs is not in it). A view is 50 steps of DDIM
with guidance 3 at 256 x 256, from an encoded photo to the decoded picture. All of full size and of
random weights. A variant's name says whose network it is and how it runs.
"""

import functools
from pathlib import Path

import torch
import torch.nn as nn

import clip
import diffusion
import engine
import model
import vae
from benchmarks import PARTS, VARIANTS, peers
from benchmarks.measure import ceiling, collect, device_here, finish, row, timed
from configs import Config, Source
from runtime import cost
from runtime.optimizer import Ema, Optimizer
from runtime.ranks import ALONE

EMBEDDING, SIDE = 768, 256              # width of the image embedding; pixels a side of views
WARMED_UP = 1000                        # a step with the full learning rate
IN_A_ROW = 5                            # calls between looks at the clock
STEPS, FEW_STEPS = 50, 20               # of DDIM, of DPM-Solver++
ENCODED = 64                            # views at once, for `engine`
ROOT = Path(__file__).parents[1]

# ours, the peer's, and what encodes
ENCODERS = {"VAE": (vae.AutoencoderKL, peers.Autoencoder, "encode"),
            "CLIP": (clip.CLIP, peers.Clip, "encode_image")}


def config_of(batch=1):
    """A Config of zero123-xl's network."""
    return Config((Source("none", "encoded", "none", 1.0),), mode="7dof", micro_batch=batch)


def network(config, peer=False, autoencoder=None):
    """The ZeroNVS of a Config on the device, fast, with no encoders but the one given; with
    diffusers' UNet if `peer`."""
    channels = model.latent_shape(config)[0]
    with device_here():
        unet = peers.UNet(config, channels) if peer else model.UNet(
            2 * channels, channels, config.model_channels, config.channel_mult,
            config.num_res_blocks, config.attention_resolutions, config.num_heads,
            config.context_dim, norm_groups=config.norm_groups)
        net = model.ZeroNVS(unet, autoencoder or model.Pixels(), model.NoEmbedding(), config.mode,
                            vae.SCALE_FACTOR, EMBEDDING, config.context_dim)
    for parameter in net.parameters():      # zeros draw less power, and hide what is wrong
        if not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    engine.convert(net)
    return net.to(device_here())        # the schedule's tables and the pose columns too


# ---- a step of training

class Step:
    """A whole step of training at every call, by our UNet or diffusers'."""
    def __init__(self, config, peer=False, compiled=True):
        torch.manual_seed(0)
        self.config, self.net, self.device = config, network(config, peer).train(), device_here()
        engine.channels_last(self.net)
        unet = self.net.model.diffusion_model
        self.ema = Ema(unet, config.ema_decay)
        self.optimizer = Optimizer(self.net, config)
        if compiled and peer:
            unet.compile()      # with the layouts that the compiler chooses
        elif compiled:
            engine.compiled(self.net)
        self.passes, self.tensors = self.forward_backward, self.pairs(config.micro_batch)

    def pairs(self, count):
        """Encoded pairs and their draws: mean, logvar, z_cond, embedding, T, those of `Draws`."""
        shape, width = model.latent_shape(self.config), self.net.cc_projection.in_features
        mean, z_cond = torch.randn(2, count, *shape, device=self.device)
        draws = diffusion.draw(0, torch.arange(count, device=self.device), shape)
        return (mean, torch.full_like(mean, vae.LOGVAR_MIN), z_cond,
                torch.randn(count, EMBEDDING, device=self.device),
                torch.randn(count, width - EMBEDDING, device=self.device), *vars(draws).values())

    def forward_backward(self, *tensors):
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.net(*tensors[:5], diffusion.Draws(*tensors[5:]), self.config.drop)
            loss.mean().backward()
        return loss.detach()

    def __call__(self):
        """The losses (b,)."""
        loss = self.passes(*self.tensors)
        self.optimizer.step(WARMED_UP, self.ema)
        return loss


def measure_training(variant, batch):
    """Yields pairs a second, time to the first step, peak memory; then the same as a CUDA graph."""
    what = f"batch {batch}"
    step = Step(config_of(batch), "diffusers" in variant, "eager" not in variant)
    work = (1 + cost.BACKWARD) * cost.of(config_of(), ALONE, 1).flops       # of a pair
    how = batch, "pairs/s", work, IN_A_ROW
    yield from timed(variant, what, step, *how)
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()    # while it is recorded a graph has all that it needs
        step.passes = engine.Recorded(step.passes, step.net.parameters())
        yield from timed(variant, f"{what}, CUDA graph", step, *how)


# ---- sampling and encoding

def encoder(name, peer):
    """A frozen network of ENCODERS on the device, ours or the peer's."""
    with device_here():
        net = ENCODERS[name][peer]()
    engine.convert(net)
    # CPUs are slow in half precision
    dtype = torch.bfloat16 if device_here().type == "cuda" else torch.float32
    net.to(device_here(), dtype, memory_format=torch.channels_last)     # buffers too
    return net.eval().requires_grad_(False)


@torch.no_grad()
def measure_sampling(variant, views):
    """Yields seconds a view at so many views at once, of the first call, and memory."""
    peer, device, fast = "diffusers" in variant, device_here(), None
    config = config_of()
    net = network(config, peer, encoder("VAE", peer)).eval().requires_grad_(False)
    dtype = next(net.first_stage_model.parameters()).dtype
    net.model.to(dtype=dtype, memory_format=torch.channels_last)
    shape = model.latent_shape(config)
    work = (2 * STEPS * cost.of(config, ALONE, 1).flops
            + cost.flops_of(lambda: net.decode(torch.zeros(1, *shape, device=device))))
    if variant == "diffusers, compiled":
        for part in (net.model.diffusion_model, net.first_stage_model.decoder):
            part.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
    elif not peer and "plain" not in variant:
        fast = engine.Sampler(net, compile="compiled" in variant)
    sampled = functools.partial(
        diffusion.encoded_views, net, torch.randn(1, *shape, device=device),
        torch.randn(1, EMBEDDING, device=device),
        torch.randn(views, net.cc_projection.in_features - EMBEDDING), range(views), fast=fast)
    what, how = f"{views} view{'s at once' * (views > 1)}", (views, "s/view")
    yield from timed(variant, what, functools.partial(sampled, steps=STEPS), *how, work)
    if fast and views == 1:
        yield from timed(variant, f"{what}, DPM-Solver++ {FEW_STEPS} steps",
                         functools.partial(sampled, sampler="dpm++", steps=FEW_STEPS), *how, 0)


@torch.no_grad()
def measure_encoding(variant, batch):
    """Yields views/s of the VAE and of CLIP, of both one after the other, and memory."""
    seconds, views = 0, torch.rand(batch, 3, SIDE, SIDE, device=device_here()) * 2 - 1
    for name, (_, _, method) in ENCODERS.items():
        net = encoder(name, "peers" in variant)
        x = views.to(dtype=next(net.parameters()).dtype, memory_format=torch.channels_last)
        encode = getattr(net, method)
        work = cost.flops_of(functools.partial(encode, x[:1]))
        if "compiled" in variant:
            encode = torch.compile(encode, dynamic=False)
        for entry in timed(variant, name, functools.partial(encode, x), batch, "views/s", work,
                           IN_A_ROW):
            seconds += 1 / entry["value"] if entry["what"] == name else 0
            yield entry
    yield row(variant, "both", 1 / seconds, "views/s")


# ---- variants, and the engine part by part

MEASURES = {"train": measure_training, "sample": measure_sampling, "encode": measure_encoding}


def run_variants(args):
    """The rows of one of MEASURES for --variants, at one size after the other."""
    sizes = args.views if args.name == "sample" else args.batch
    jobs = [(variant, MEASURES[args.name], variant, size)
            for size in sizes for variant in args.variants]
    rows = collect([("ceiling", ceiling), *jobs], args.seconds_limit)
    return finish(rows, VARIANTS[args.name])


def run_engine(args):
    """Rates with and without each part of the engine, and what a hundred lines of it earn."""
    sizes = {"train": args.batch, "sample": args.views, "encode": [ENCODED]}
    variants = {rate: next(iter(VARIANTS[rate])) for rate in args.rates}
    peer_of = {f"{variant} without {part}": variant
               for variant in variants.values() for part in args.without}
    jobs = [(f"{rate} without {part or 'nothing'}", leave_out, part, MEASURES[rate], variant, size)
            for part in ("", *args.without) for rate, variant in variants.items()
            if not part or rate in PARTS[part] for size in sizes[rate]]
    rows = finish(collect(jobs, args.seconds_limit), peer_of)
    for entry in [entry for entry in rows if "ratio" in entry and "/" in entry["unit"]]:
        part = entry["variant"].partition(" without ")[2]
        slower = entry["ratio"] if entry["unit"] == "s/view" else 1 / entry["ratio"]
        gain = 100 * (slower - 1)
        lines = (ROOT / "engine" / f"{part}.py").read_text(encoding="utf-8").count("\n")
        rows += [row(f"gain by {part}", entry["what"], gain, "%"),
                 row(f"gain by {part}, a hundred of its {lines} lines", entry["what"],
                     100 * gain / lines, "%")]
    return rows


def leave_out(part, measure, variant, size):
    """The rows of a measurement by PyTorch's operations in place of a part of the engine."""
    if part:
        engine.kernels.enabled[part] = False
        variant += f" without {part}"
    yield from measure(variant, size)
