"""What files need: a checkpoint loaded into a model, and pairs read from shards.

The checkpoint has zero123-xl's structure and random bytes, the shards photo-like images of 256 x
256 with depth; all of it is made here and removed, and read from the system's cache. `reading the
bytes` and `decoding` are ceilings: that much must be done at least.
"""

import io
import json
import mmap
import os
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
from benchmarks import peers
from benchmarks.measure import GB, collect, finish, peak_gb, row
from captures import encode
from runtime import checkpoint
from shards.scenes import open_source

PAGE, BLOCK = 4096, 1 << 22
SIDE, LATENT, EMBEDDING = 256, (8, 32, 32), 768
DISTINCT = 48                   # different images; views beyond share their bytes
ENCODED_BATCH = 192
MODES = {True: "7dof_quantile_scale", False: "7dof"}    # with depth, without
FORMATS = {"PNG": ("png", {}), "JPEG": ("jpg", {"quality": 95}), "WebP": ("webp", {"quality": 90})}


# ---- a checkpoint

def zero123(channels):
    """ZeroNVS of zero123-xl's structure, without values; the UNet is `channels` wide."""
    source = configs.Source("none", "co3d", "none", 1.0)
    with torch.device("meta"):
        return model.build(configs.Config((source,), mode="3dof", model_channels=channels))


def nbytes(module):
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def write_checkpoint(path, channels):
    """Writes weights, average and AdamW's two moments: 15.5 GB at 320 channels, of which memory
    holds a few megabytes."""
    weights = zero123(channels).state_dict()
    blank = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in weights.items()}
    trained = [name for name in weights if name.startswith((checkpoint.UNET, "cc_projection."))]
    average = {checkpoint.ema_name(name): torch.empty_like(blank[name]) for name in trained
               if name.startswith(checkpoint.UNET)}
    moments = {i: {"step": 1, "exp_avg": torch.empty_like(blank[name]),
                   "exp_avg_sq": torch.empty_like(blank[name])} for i, name in enumerate(trained)}
    with torch.serialization.skip_data():
        torch.save({"epoch": 1, "global_step": 165_000, "state_dict": {**blank, **average},
                    "optimizer_states": [{"state": moments, "param_groups": []}]}, path)
    block = torch.frombuffer(bytearray(os.urandom(BLOCK)), dtype=torch.uint8)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):     # to write into the file
        file = torch.load(path, weights_only=True, mmap=True)
    for tensors in (file["state_dict"], *file["optimizer_states"][0]["state"].values()):
        for tensor in tensors.values():
            if isinstance(tensor, torch.Tensor) and tensor.ndim:
                for part in tensor.view(-1).view(torch.uint8).split(BLOCK):
                    part.copy_(block[:len(part)])


def measure_loading(variant, path, channels):
    """Yields seconds until every kept byte is in memory, peak memory, and the kept bytes."""
    module = zero123(channels)
    kept, start = nbytes(module), time.perf_counter()
    if variant == "product":
        checkpoint.load_model(module, path)
    elif variant == "reading the bytes":
        buffer = memoryview(bytearray(BLOCK))
        with open(path, "rb", buffering=0) as file:
            while file.tell() < kept and file.readinto(buffer):
                pass
    else:
        peers.load_into(module, path, "mmap" in variant)
    if variant != "reading the bytes":      # a number of every page, so that none is only mapped
        for tensor in module.state_dict().values():
            tensor.flatten()[::PAGE // tensor.itemsize].sum().item()
    yield row(variant, "time, from the cache", time.perf_counter() - start, "s")
    if variant != "reading the bytes":
        yield row(variant, "peak memory", peak_gb(), "GB")
        yield row(variant, "peak memory of what is kept", peak_gb() * GB / kept, "times")


LOADING = ("reading the bytes", "product", "torch.load, mmap", "torch.load")


def run_load(args):
    """A model filled from a file of zero123-xl's structure: time and memory."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synthetic.ckpt"
        write_checkpoint(path, args.channels)
        size = row("file", "", path.stat().st_size / GB, "GB")
        rows = collect([(variant, 240, measure_loading, variant, path, args.channels)
                        for variant in args.variants for _ in range(args.repeat)],
                       args.seconds_limit)
    best = {}
    for entry in rows:          # of the same figure the least, as a disk has its moods
        if entry["value"] < best.get(entry["name"], entry)["value"] or entry["name"] not in best:
            best[entry["name"]] = entry
    return finish([size, *best.values()],
                  {"product": ["reading the bytes", "torch.load, mmap", "torch.load"]})


# ---- shards

def photo(rng):
    """uint8 (s, s, 3): noise of every scale, as photographs have it, and grain."""
    total = np.zeros((SIDE, SIDE, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, np.float64) - 128) / cells**0.6
    return (128 + total / 1.5 + rng.normal(0, 1.5, total.shape)).clip(0, 255).astype(np.uint8)


def file_of(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_shards(folder, format, scenes, views):
    """Two CO3D shards of `scenes` scenes in all, or one encoded shard of random numbers."""
    rng = np.random.default_rng(0)
    if format != "encoded":
        suffix, options = FORMATS[format]
        photos = [file_of(Image.fromarray(photo(rng)), format, **options) for _ in range(DISTINCT)]
        depth = Image.fromarray(rng.uniform(1, 5, (8, 8)).astype(np.float32))
        depth = np.asarray(depth.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.float16)
        depth = file_of(Image.fromarray(depth.view(np.uint16)), "PNG")
    camera = {"R": np.eye(3).tolist(), "focal_length": [2.0, 2.0], "principal_point": [0.0, 0.0],
              "scale_adjustment": 1.0}
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    for shard in range(1 if format == "encoded" else 2):
        with tarfile.open(folder / f"{format}-{shard:06}.tar", "w") as tar:
            def add(name, content):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

            for scene in range(shard, scenes, 1 if format == "encoded" else 2):
                name = f"made/scene{scene:04}"
                if format == "encoded":
                    add(f"{name}.safetensors", encode.member(
                        torch.randn(views, *LATENT), torch.randn(views, EMBEDDING), c2w,
                        torch.ones(views), torch.ones(views), 1.0, 1.0))
                    continue
                for view in range(views):
                    stem = f"{name}/frame{view:06}"
                    add(f"{stem}.{suffix}", photos[(scene * 31 + view) % DISTINCT])
                    add(f"{stem}_depth.png", depth)
                    place = {**camera, "T": rng.normal(size=3).tolist()}
                    add(f"{stem}_metadata.json", json.dumps(place).encode())


def pairs_in(folder, format, deep):
    layout = "encoded" if format == "encoded" else "co3d"
    source = configs.Source("made", layout, f"{format}-*.tar", 1.0)
    return data.Pairs([open_source(source, folder, SIDE)], [1.0], 0, SIDE, MODES[deep])


def measure_pairs(folder, format, deep, count):
    """Yields seconds to open shards, pairs/s and bytes a pair of one process, and of decoding the
    same images from memory alone."""
    torch.set_num_threads(1)
    for path in Path(folder).glob(f"{format}-*.tar"):
        path.read_bytes()
    start, label = time.perf_counter(), f"{format}{' and depth' * deep}"
    pairs = pairs_in(folder, format, deep)
    size = sum(path.stat().st_size for path in Path(folder).glob(f"{format}-*.tar"))
    yield row(label, "opened", size / (time.perf_counter() - start) / 1e6, "MB/s")
    batch = ENCODED_BATCH if format == "encoded" else peers.BATCH
    pairs.__getitems__(list(range(batch)))
    before, start = bytes_read(), time.perf_counter()
    for first in range(batch, batch + count, batch):
        pairs.__getitems__(list(range(first, first + batch)))
    seconds, done = time.perf_counter() - start, -(-count // batch) * batch
    yield row(label, "one process", done / seconds, "pairs/s")
    yield row(label, "read a pair", (bytes_read() - before) / done / 1e3, "kB")
    if format != "encoded" and not deep:
        rng = np.random.default_rng(0)
        file = file_of(Image.fromarray(photo(rng)), format, **FORMATS[format][1])
        start = time.perf_counter()
        for _ in range(2 * count):
            Image.open(io.BytesIO(file)).load()
        yield row("decoding", f"{format}: two images", count / (time.perf_counter() - start),
                  "pairs/s")


def bytes_read():
    """Bytes that this process has read so far, where the system counts them; else nan."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return float("nan")
    return int(counters.read_text().split("rchar: ")[1].split()[0])


def measure_loader(folder, format, deep, count, workers):
    """Yields pairs/s that arrive from the loader's processes."""
    batch = ENCODED_BATCH if format == "encoded" else peers.BATCH
    settled = 2 * max(workers, 1)
    numbers = data.Batches(0, settled + -(-count // batch), batch, batch)
    batches = iter(data.loader(pairs_in(folder, format, deep), numbers, workers))
    for _ in range(settled):
        next(batches)
    start, seen = time.perf_counter(), 0
    for got in batches:
        seen += len(got["uid"])
    yield row(f"{format}{' and depth' * deep}", f"loader of {workers}",
              seen / (time.perf_counter() - start), "pairs/s")


def measure_webdataset(folder, format, count):
    """Yields pairs/s of the reference's way, in one process."""
    torch.set_num_threads(1)
    urls = [str(path) for path in sorted(Path(folder).glob(f"{format}-*.tar"))]
    batches = iter(peers.webdataset_batches(urls, FORMATS[format][0], SIDE))
    next(batches)
    start, rounds = time.perf_counter(), -(-count // peers.BATCH)
    for _ in range(rounds):
        next(batches)
    yield row("webdataset", "one process", rounds * peers.BATCH / (time.perf_counter() - start),
              "pairs/s")


def run_data(args):
    """Pairs read from raw and encoded shards."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        jobs = []
        for format in args.formats:
            write_shards(Path(folder), format, args.scenes, args.views)
            for deep in (True,) if format == "encoded" else (False, True):
                count = 40 * args.pairs if format == "encoded" else args.pairs
                jobs.append((format, 120, measure_pairs, folder, format, deep, count))
                jobs += [(f"{format}, {workers} workers", 120, measure_loader, folder, format, deep,
                          count, workers) for workers in args.workers]
            if format == "PNG" and args.views * peers.RATE >= 1:
                jobs.append(("webdataset", 240, measure_webdataset, folder, format,
                             args.pairs // 4))
        rows = collect(jobs, args.seconds_limit)
    return finish(rows, {"PNG": ["webdataset"], "PNG and depth": ["webdataset"]})
