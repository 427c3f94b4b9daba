"""What files need: a checkpoint loaded into a model, and pairs read from shards.

The checkpoint has zero123-xl's structure, the shards photo-like images of 256 x 256; all of it is
made here and removed, and read from the system's cache. `reading the bytes` and `decoding` are
ceilings: that much must be done at least.
"""

import io
import json
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import configs
import data
import model
from benchmarks.measure import GB, collect, finish, peak_gb, row
from captures import encode
from runtime import checkpoint
from shards.scenes import open_source

SIDE, LATENT, EMBEDDING = 256, (8, 32, 32), 768
SCENES, VIEWS, DISTINCT = 20, 100, 48       # a shard's scenes, their views, different images
FORMATS = {"PNG": ("png", {}), "JPEG": ("jpg", {"quality": 95}), "WebP": ("webp", {"quality": 90})}
BATCH = {True: 192, False: 16}              # pairs, of encoded shards and of others
BLOCK = 1 << 22


def zero123(channels):
    """ZeroNVS of zero123-xl's structure, without values; the UNet is `channels` wide."""
    source = configs.Source("none", "co3d", "none", 1.0)
    with torch.device("meta"):
        return model.build(configs.Config((source,), mode="3dof", model_channels=channels))


def write_checkpoint(path, channels):
    """Writes weights, average and AdamW's two moments: 15.5 GB at 320 channels."""
    def values(tensors):        # zeros, that take no memory before they are written
        return {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}

    weights = zero123(channels).state_dict()
    trained = {name: t for name, t in weights.items()
               if name.startswith((checkpoint.UNET, "cc_projection."))}
    average = {checkpoint.ema_name(name): t for name, t in trained.items()
               if name.startswith(checkpoint.UNET)}
    moments = {i: {"step": 1, **values({"exp_avg": t, "exp_avg_sq": t})}
               for i, t in enumerate(trained.values())}
    torch.save({"epoch": 1, "global_step": 165_000, "state_dict": values({**weights, **average}),
                "optimizer_states": [{"state": moments, "param_groups": []}]}, path)


def measure_loading(variant, path, channels):
    """Yields seconds until every kept byte is in memory, and peak memory beside the kept bytes."""
    module = zero123(channels)
    kept = sum(tensor.nbytes for tensor in module.state_dict().values())
    start = time.perf_counter()
    if variant == "product":
        checkpoint.load_model(module, path)
        for tensor in module.state_dict().values():     # every byte, so that none is only mapped
            tensor.view(-1).view(torch.uint8).amax()
    else:
        buffer = bytearray(BLOCK)
        with open(path, "rb", buffering=0) as file:
            while file.tell() < kept and file.readinto(buffer):
                pass
    yield row(variant, "time, from the cache", time.perf_counter() - start, "s")
    yield row(variant, "peak memory of what is kept", peak_gb() * GB / kept, "times")


def run_load(args):
    """A model filled from a file of zero123-xl's structure: time and memory."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synthetic.ckpt"
        write_checkpoint(path, args.channels)
        rows = collect([(variant, measure_loading, variant, path, args.channels)
                        for variant in ("reading the bytes", "product")], args.seconds_limit)
    return finish(rows, {"product": ["reading the bytes"]})


# ---- shards

def photo(rng, format):
    """The bytes of an image file: noise of every scale, as photographs have it, and grain."""
    total, file = np.zeros((SIDE, SIDE, 3)), io.BytesIO()
    for cells in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, np.float64) - 128) / cells**0.6
    total = (128 + total / 1.5 + rng.normal(0, 1.5, total.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(total).save(file, format, **FORMATS[format][1])
    return file.getvalue()


def members(format):
    """Yields (name, content) of a shard: raw in co3d's layout without depth, or encoded."""
    rng = np.random.default_rng(0)
    photos = [photo(rng, format) for _ in range(DISTINCT * (format in FORMATS))]
    for scene in range(SCENES):
        name = f"made/scene{scene:04}"
        if format == "encoded":
            c2w, ones = torch.eye(4).repeat(VIEWS, 1, 1), torch.ones(VIEWS)
            yield f"{name}.safetensors", encode.member(
                torch.randn(VIEWS, *LATENT), torch.randn(VIEWS, EMBEDDING), c2w, ones, ones, 1, 1)
            continue
        for view in range(VIEWS):
            stem = f"{name}/frame{view:06}"
            yield f"{stem}.{FORMATS[format][0]}", photos[(scene * 31 + view) % DISTINCT]
            yield f"{stem}_metadata.json", json.dumps({
                "R": np.eye(3).tolist(), "T": rng.normal(size=3).tolist(), "scale_adjustment": 1.0,
                "focal_length": [2.0, 2.0], "principal_point": [0.0, 0.0]}).encode()


def measure_pairs(folder, format, count, workers):
    """Yields pairs/s of this process, or with workers of a loader's, and of decoding alone."""
    torch.set_num_threads(1)
    layout, batch = "co3d" if format in FORMATS else "encoded", BATCH[format == "encoded"]
    source = configs.Source("made", layout, f"{format}.tar", 1.0)
    pairs = data.Pairs([open_source(source, folder, SIDE)], [1.0], 0, SIDE, "7dof")
    settled, rounds = 2 * max(workers, 1), -(-count // batch)
    numbers = data.Batches(0, settled + rounds, batch, batch)
    batches = iter(data.Loader(pairs, numbers, workers))
    for _ in range(settled):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    how = f"loader of {workers}" if workers else "one process"
    yield row(format, how, rounds * batch / (time.perf_counter() - start), "pairs/s")
    if format in FORMATS and not workers:
        file, start = photo(np.random.default_rng(0), format), time.perf_counter()
        for _ in range(2 * count):
            Image.open(io.BytesIO(file)).load()
        yield row(f"decoding {format}", how, count / (time.perf_counter() - start), "pairs/s")


def run_data(args):
    """Pairs read from raw and encoded shards."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        jobs = []
        for format in args.formats:
            with tarfile.open(Path(folder) / f"{format}.tar", "w") as tar:
                for name, content in members(format):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            count = 40 * args.pairs if format == "encoded" else args.pairs
            jobs += [(f"{format}, {workers} workers", measure_pairs, folder, format, count, workers)
                     for workers in (0, *args.workers)]
        rows = collect(jobs, args.seconds_limit)
    return finish(rows, {format: [f"decoding {format}"] for format in FORMATS})
