"""`bench.py encode`: views/s through the frozen encoders, beside diffusers and transformers.

Views are 256 x 256, on the device, in batches; the autoencoder gives its posterior, CLIP (at 224)
its embedding; weights are random, in bf16. autocast: as `prepare.py encode` has it, vectors and
what autocast keeps in fp32. Every variant runs in a process of its own (variants.py).

    python bench.py encode --variants ceiling compiled peers-compiled
    python bench.py encode --where compiled         GPU time by kind of kernel
"""

import json
import sys
from contextlib import nullcontext

import torch

import clip
import engine
import vae
from benchmarks import variants
from benchmarks.variants import median_seconds, seconds_in_a_row, tell
from runtime.cost import flops_of
from captures.encode import halve_weights

BATCH, TINY_BATCH, SIDE, TINY_SIDE = 64, 2, 256, 32
RUNS, SECONDS = 5, 3.0
CEILING = "encode: bf16 product, sustained"
TINY_CLIP = {"embed_dim": 32, "image_resolution": 32, "vision_layers": 1, "vision_width": 64,
             "vision_patch_size": 16, "transformer_width": 64, "transformer_heads": 1}
# name: (what it says, seconds that it may take on an H200)
VARIANTS = {
    "ceiling": ("bf16 products", 60),
    "compiled": ("compiled", 120),
    "peers-compiled": ("compiled", 150),
    "eager": ("eager", 60),
    "autocast": ("eager, autocast", 60),
    "autocast-compiled": ("compiled, autocast", 120),
    "peers-eager": ("eager", 60),
    "plain-norm": ("compiled, PyTorch's GroupNorm", 120),
}
DEFAULT = ("ceiling", "compiled", "peers-compiled", "eager", "autocast")
PARTS = {"VAE": "diffusers", "CLIP": "transformers"}


# ---- the process that asks

def add_options(parser):
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), choices=list(VARIANTS),
                        help="what is measured, in order")
    parser.add_argument("--batch", type=int, default=BATCH, help="views at once")
    parser.add_argument("--where", choices=list(VARIANTS)[1:], default="",
                        help="profile this variant, and nothing else")
    parser.add_argument("--seconds-limit", type=float, default=470, help="of everything")
    parser.add_argument("--tiny", action="store_true", help="networks of a few kilobytes")


def run(given):
    if given.batch < 1 or given.seconds_limit <= 0:
        raise ValueError("--batch and --seconds-limit must be positive")
    jobs = [{"name": name, "limit": VARIANTS[name][1], "tiny": given.tiny,
             "batch": TINY_BATCH if given.tiny else given.batch, "where": bool(given.where)}
            for name in ([given.where] if given.where else given.variants)]
    found = variants.collect("benchmarks.encode", jobs, given.seconds_limit)
    for name in VARIANTS:           # both networks, one after the other
        rates = [found.get(title(name, part), {}).get("value") for part in PARTS]
        if all(rates) and not name.startswith("peers"):
            total = {"name": f"encode: both, {VARIANTS[name][0]}", "unit": "views/s",
                     "value": 1 / sum(1 / rate for rate in rates)}
            found[total["name"]] = total
    peers = {title(name, part): [title(f"peers-{kind}", part) for kind in ("compiled", "eager")
                                 if kind in VARIANTS[name][0]]
             for name in VARIANTS for part in PARTS if not name.startswith("peers")}
    return variants.rows_of(found, peers, CEILING)


def title(name, part):
    whose = f" of {PARTS[part]}" if name.startswith("peers") else ""
    return f"encode: {part}{whose}, {VARIANTS[name][0]}"


# ---- the process that answers

def answer(job):
    if job["name"] == "ceiling":
        burst, sustained = variants.ceiling()
        tell("encode: bf16 product, burst", burst / 1e12, "TFLOP/s")
        return tell(CEILING, sustained / 1e12, "TFLOP/s")
    torch.backends.cudnn.benchmark = True
    engine.kernels.enabled["norm"] &= job["name"] != "plain-norm"
    for part in PARTS:
        try:
            measure(job, part)
        except ImportError as err:
            print(f"{PARTS[part]} is not installed: {err}", flush=True)


@torch.no_grad()
def measure(job, part):
    """Tells views/s, what the first call takes, and memory, of the VAE or CLIP."""
    name, tiny, device = job["name"], job["tiny"], variants.device()
    compiled, autocast = "compiled" in VARIANTS[name][0], name.startswith("autocast")
    half = torch.bfloat16 if device.type == "cuda" else torch.float32    # CPUs are slow in bf16
    dtype = torch.float32 if autocast else half
    with device:
        module, encode = (PEERS if name.startswith("peers") else OURS)[part](tiny)
        side = TINY_SIDE if tiny else SIDE
        views = torch.rand(job["batch"], 3, side, side) * 2 - 1
    module.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    if autocast and half != dtype:
        halve_weights(module)
    views = views.to(dtype=dtype, memory_format=torch.channels_last)
    if compiled:
        encode = torch.compile(encode, dynamic=False)

    def function():
        with torch.autocast(device.type, half) if autocast and half != dtype else nullcontext():
            return encode(views)

    flops = flops_of(function) if not compiled else None
    if job["where"]:
        function()
        return variants.where(title(name, part), function)
    first = median_seconds(function, 1)
    if not function().isfinite().all():
        raise ValueError(f"{title(name, part)}: results are not finite")
    rate = job["batch"] / seconds_in_a_row(function, *((1, 0) if tiny else (RUNS, SECONDS)))
    work = (flops or uncompiled_flops(name, part, tiny, dtype, views)) / job["batch"]
    tell(title(name, part), rate, "views/s", flops=rate * work)
    tell(f"{title(name, part)}: first call", first, "s")
    if device.type == "cuda":
        tell(f"{title(name, part)}: peak memory", variants.peak_gb(), "GB")


def uncompiled_flops(name, part, tiny, dtype, views):
    """Of a fresh network without values, as a compiled one does not tell."""
    with torch.device("meta"):
        module, encode = (PEERS if name.startswith("peers") else OURS)[part](tiny)
        module.to("meta", dtype).eval().requires_grad_(False)
        return flops_of(lambda: encode(torch.empty(views.shape, dtype=dtype)))


def our_vae(tiny):
    module = vae.AutoencoderKL(*((32, (1, 2)) if tiny else ()))
    engine.convert(module)
    return module, lambda x: torch.cat(module.encode(x), dim=1)


def our_clip(tiny):
    module = clip.CLIP(**(TINY_CLIP if tiny else {}))
    return module, module.encode_image


def diffusers_vae(tiny):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    blocks = (32, 64) if tiny else (128, 256, 512, 512)
    module = AutoencoderKL(
        block_out_channels=blocks, layers_per_block=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * len(blocks),
        up_block_types=["UpDecoderBlock2D"] * len(blocks))
    return module, lambda x: module.encode(x, return_dict=False)[0].parameters


def transformers_clip(tiny):
    """With our preprocessing before it, which is part of the work."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    size = (dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1,
                 image_size=32, patch_size=16, projection_dim=32) if tiny else
            dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16, image_size=224, patch_size=14, projection_dim=768))
    module = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_act="quick_gelu", **size))
    before = clip.CLIP(transformer_layers=0, **{**(TINY_CLIP if tiny else {}), "vision_layers": 0})
    module.add_module("before", before)         # so that it goes where the module goes
    return module, lambda x: module(before.preprocess(x)).image_embeds


OURS = {"VAE": our_vae, "CLIP": our_clip}
PEERS = {"VAE": diffusers_vae, "CLIP": transformers_clip}


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
