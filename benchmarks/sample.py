"""`bench.py sample`: seconds a view, beside diffusers' compiled UNet and the reference's way.

A view is 50 steps of DDIM with guidance 3 at 256 x 256, full size, from an encoded photo to the
decoded picture; weights are random. diffusers: its UNet and autoencoder in bf16, compiled with CUDA
graphs, in the loop of samplers.py. Every variant runs in a process of its own (variants.py).

    python bench.py sample --variants ceiling graph diffusers compiled
    python bench.py sample --where graph            GPU time by kind of kernel
"""

import json
import sys

import torch
import torch.nn as nn

import camera
import engine
import model
import vae
from benchmarks import variants
from benchmarks.variants import median_seconds, tell
from runtime.cost import flops_of
from views.render import place
from diffusion import encoded_views

EMBEDDING, MODE = 768, "7dof_quantile_scale"
# widths of the UNet's levels and of the context token; small if tiny
WIDTHS = {False: (320, 640, 1280, 1280), True: (32, 64)}
CONTEXT = {False: 768, True: 16}
STEPS, FEW_STEPS, WHERE_STEPS = 50, 20, 10      # of DDIM, of DPM-Solver++, of a profile
RUNS, SECONDS = 5, 3.0                          # a figure is the median of so many, or so long
CEILING = "sample: bf16 product, sustained"
# name: (what it says, precision, seconds that it may take on an H200)
VARIANTS = {
    "ceiling": ("bf16 products", "bf16", 60),
    "graph": ("here", "bf16", 150),
    "diffusers": ("diffusers, compiled", "bf16", 240),
    "compiled": ("here, compiled", "bf16", 240),
    "fp16": ("here, fp16", "fp16", 90),
    "reference": ("the reference's way", "fp32", 90),
    "plain-norm": ("here, PyTorch's GroupNorm", "bf16", 90),
    "eager": ("here, without graphs", "bf16", 90),
    "diffusers-eager": ("diffusers, eager", "bf16", 90),
}
DEFAULT = ("ceiling", "graph", "diffusers", "compiled", "fp16", "reference")
OURS = ("graph", "compiled", "fp16", "plain-norm", "eager")


# ---- the process that asks

def add_options(parser):
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), choices=list(VARIANTS),
                        help="what is measured, in order")
    parser.add_argument("--views", nargs="+", type=int, default=[1, 16, 24], help="views at once")
    parser.add_argument("--where", choices=list(VARIANTS)[1:], default="",
                        help="profile this variant, and nothing else")
    parser.add_argument("--seconds-limit", type=float, default=470, help="of everything")
    parser.add_argument("--tiny", action="store_true", help="networks of a few kilobytes")


def run(given):
    if min(given.views) < 1 or given.seconds_limit <= 0:
        raise ValueError("--views and --seconds-limit must be positive")
    jobs = [{"name": name, "limit": VARIANTS[name][2], "views": views_of(name, given.views),
             "tiny": given.tiny, "where": bool(given.where)}
            for name in ([given.where] if given.where else given.variants)]
    found = variants.collect("benchmarks.sample", jobs, given.seconds_limit)
    peers = {}
    for name in OURS:
        what = VARIANTS[name][0]
        for views in given.views:
            peers[title(what, views)] = [title(VARIANTS[peer][0], views)
                                         for peer in ("diffusers", "diffusers-eager", "reference")]
        peers[few(what)] = [title(what, given.views[0])]
    return variants.rows_of(found, peers, CEILING)


def views_of(name, views):
    """The numbers of views at once that a variant is measured at: slow ones at the first alone."""
    return views[:1] if name in ("fp16", "reference", "diffusers-eager") else views


def title(what, views):
    return f"sample: {what}, {f'{views} views at once' if views > 1 else '1 view'}"


def few(what):
    return f"sample: {what}, DPM-Solver++ {FEW_STEPS} steps"


# ---- the process that answers

def answer(job):
    if job["name"] == "ceiling":
        burst, sustained = variants.ceiling()
        tell("sample: bf16 product, burst", burst / 1e12, "TFLOP/s")
        return tell(CEILING, sustained / 1e12, "TFLOP/s")
    name, tiny = job["name"], job["tiny"]
    what, precision, _ = VARIANTS[name]
    if name in ("reference", "plain-norm"):
        engine.kernels.enabled.update(dict.fromkeys(engine.kernels.enabled, False))
    net, size = network(tiny, name.startswith("diffusers"))
    # CPUs are slow in half precision, where it is only a test that this runs
    place(net, variants.device(), precision if torch.cuda.is_available() else "fp32")
    work = flops(net, size)
    if name == "reference":
        net.to(memory_format=torch.contiguous_format)
        torch.backends.cudnn.benchmark = False
    if name == "diffusers":
        unet, decoder = net.model.diffusion_model, net.first_stage_model.decoder
        for part in (unet, decoder):
            part.compile(mode="reduce-overhead" if torch.cuda.is_available() else None,
                         dynamic=False)
    # "eager" is as on a machine without graphs
    fast = engine.Sampler(net, name == "compiled", name != "eager") if name in OURS else None
    for views in job["views"]:
        def sampled(**options):
            return encoded_views(net, *photo, T, range(views), fast=fast, **options)

        photo = (torch.randn(1, *size, device=net.betas.device),
                 torch.randn(1, EMBEDDING, device=net.betas.device))
        T = torch.randn(views, camera.MODES[MODE].width)
        steps = 4 if tiny else WHERE_STEPS if job["where"] else STEPS
        if job["where"]:
            sampled(steps=steps)
            variants.where(f"{title(what, views)}, {steps} steps", lambda: sampled(steps=steps))
            continue
        measure(title(what, views), views, lambda: sampled(steps=steps), work, steps, tiny)
        if name in OURS and views == job["views"][0]:
            measure(few(what), views, lambda: sampled(sampler="dpm++", steps=FEW_STEPS), work,
                    FEW_STEPS, tiny)


def measure(name, views, function, work, steps, tiny):
    """Tells seconds a view, what the first call takes, and memory."""
    unet, decoder = work
    first = median_seconds(function, 1)
    pictures = function()
    if not pictures.isfinite().all():
        raise ValueError(f"{name}: pictures are not finite")
    seconds = median_seconds(function, 1 if tiny else RUNS, 0 if tiny else SECONDS) / views
    tell(name, seconds, "s/view", flops=(2 * steps * unet + decoder) / seconds)
    tell(f"{name}: first call", first, "s")
    if torch.cuda.is_available():
        tell(f"{name}: peak memory", variants.peak_gb(), "GB")


def network(tiny, peer):
    """(ZeroNVS without CLIP, shape of its latents), random, by diffusers' networks if `peer`."""
    with variants.device():
        unet, autoencoder = unet_of(tiny, peer), autoencoder_of(tiny, peer)
        net = model.ZeroNVS(unet, autoencoder, model.NoEmbedding(), MODE, vae.SCALE_FACTOR,
                            EMBEDDING, CONTEXT[tiny])
    for parameter in net.parameters():
        if not parameter.any():         # layers that start as zeros draw less power
            nn.init.normal_(parameter, std=0.01)
    return net, (4, 8, 8) if tiny else (4, 32, 32)


def unet_of(tiny, peer):
    """The UNet. Raises ImportError where diffusers is not installed."""
    widths = WIDTHS[tiny]
    if not peer:
        return model.UNet(8, 4, widths[0], tuple(width // widths[0] for width in widths), 2,
                          (4, 2, 1), 8, CONTEXT[tiny])
    from diffusers import UNet2DConditionModel
    attends = [True] * min(len(widths), 3) + [False] * (len(widths) > 3)
    return OnlyNoise(UNet2DConditionModel(
        sample_size=32, in_channels=8, out_channels=4, layers_per_block=2,
        down_block_types=["CrossAttn" * yes + "DownBlock2D" for yes in attends],
        up_block_types=["CrossAttn" * yes + "UpBlock2D" for yes in attends[::-1]],
        block_out_channels=widths, attention_head_dim=8, cross_attention_dim=CONTEXT[tiny]))


def autoencoder_of(tiny, peer):
    if not peer:
        return vae.AutoencoderKL(*((32, (1, 2)) if tiny else ()))
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    blocks = (32, 64) if tiny else (128, 256, 512, 512)
    return OnlyDecoder(AutoencoderKL(
        block_out_channels=blocks, layers_per_block=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * len(blocks),
        up_block_types=["UpDecoderBlock2D"] * len(blocks)))


class OnlyNoise(nn.Module):
    """diffusers' UNet, called as ours is."""
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, context):
        return self.unet(x, t, context, return_dict=False)[0]

    def idle_parameters(self):
        return {}


class OnlyDecoder(nn.Module):
    """diffusers' decoder, called as our autoencoder is."""
    def __init__(self, autoencoder):
        super().__init__()
        self.decoder, self.post_quant_conv = autoencoder.decoder, autoencoder.post_quant_conv

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


def flops(net, size):
    """Of the UNet for one row, and of the decoder for one view."""
    unet, device = net.model.diffusion_model, net.betas.device
    dtype = next(unet.parameters()).dtype
    x = torch.zeros(1, 2 * size[0], *size[1:], dtype=dtype, device=device)
    context = torch.zeros(1, 1, net.cc_projection.out_features, dtype=dtype, device=device)
    with torch.no_grad():
        return (flops_of(lambda: unet(x, torch.zeros(1, device=device), context)),
                flops_of(lambda: net.decode(torch.zeros(1, *size, device=device))))


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
