"""`bench.py data`: pairs read from raw and encoded shards, beside decoding alone and webdataset.

The shards are made here: photo-like images of 256 x 256 pixels with depth, 100 views a scene, all
in the system's cache. The peer does what the reference does, by the package that it uses:
webdataset's tar stream, a whole scene at a time, of which int(rate * views) pairs are kept, and a
shuffle buffer of 500.
"""

import io
import json
import os
import random
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captures import encode
from benchmarks import GB, in_fresh_process, row
from configs import Source
from data import Batches, Pairs, loader
from shards.index import IMAGE, INDEX_VERSION, RawIndex
from shards.scenes import decode_depth, decode_image, images, open_source
from shards.files import LocalFile

SIDE, LATENT, EMBEDDING = 256, (8, 32, 32), 768
DISTINCT = 48                   # different images; views beyond share their bytes
MODE, DEPTH_MODE = "7dof", "7dof_quantile_scale"
BATCH, ENCODED_BATCH = 16, 192
RATE, SHUFFLE = 0.025, 500      # the reference's
FORMATS = {"PNG": ("png", {}), "JPEG": ("jpg", {"quality": 95}), "WebP": ("webp", {"quality": 90})}


# ---- shards made here

def photo(rng):
    """uint8 (s, s, 3): noise of every scale, as photographs have it, and grain."""
    total = np.zeros((SIDE, SIDE, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, np.float64) - 128) / cells**0.6
    return (128 + total / 1.5 + rng.normal(0, 1.5, total.shape)).clip(0, 255).astype(np.uint8)


def encoded_images(rng, format):
    """DISTINCT image files."""
    files = []
    for _ in range(DISTINCT):
        file = io.BytesIO()
        Image.fromarray(photo(rng)).save(file, format, **FORMATS[format][1])
        files.append(file.getvalue())
    return files


def depth_file(rng):
    grid = Image.fromarray(rng.uniform(1, 5, (8, 8)).astype(np.float32))
    depth = np.asarray(grid.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.float16)
    file = io.BytesIO()
    Image.fromarray(depth.view(np.uint16)).save(file, "PNG")
    return file.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_raw(folder, format, scenes, views):
    """Two CO3D shards of `scenes` scenes in all."""
    rng = np.random.default_rng(0)
    photos, depths = encoded_images(rng, format), [depth_file(rng) for _ in range(DISTINCT)]
    camera = {"R": np.eye(3).tolist(), "focal_length": [2.0, 2.0], "principal_point": [0.0, 0.0],
              "scale_adjustment": 1.0}
    for shard in range(2):
        with tarfile.open(folder / f"{format}-{shard:06}.tar", "w") as tar:
            for scene in range(shard, scenes, 2):
                for view in range(views):
                    stem = f"made/scene{scene:04}/frame{view:06}"
                    pick = (scene * 31 + view) % DISTINCT
                    add(tar, f"{stem}.{FORMATS[format][0]}", photos[pick])
                    add(tar, f"{stem}_depth.png", depths[pick])
                    place = {**camera, "T": rng.normal(size=3).tolist()}
                    add(tar, f"{stem}_metadata.json", json.dumps(place).encode())


def write_encoded(folder, scenes, views):
    """An encoded shard of random numbers."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    with tarfile.open(folder / "encoded-000000.tar", "w") as tar:
        for scene in range(scenes):
            add(tar, f"made/scene{scene:04}.safetensors", encode.member(
                torch.randn(views, *LATENT), torch.randn(views, EMBEDDING), c2w,
                torch.ones(views), torch.ones(views), 1.0, 1.0))


def made_pairs(folder, format, mode):
    layout = "encoded" if format == "encoded" else "co3d"
    source = Source("made", layout, f"{format}-*.tar", 1.0)
    return Pairs([open_source(source, folder, SIDE)], [1.0], 0, SIDE, mode)


# ---- measures, each in a process of its own

def warm(folder, format):
    for path in Path(folder).glob(f"{format}-*.tar"):
        path.read_bytes()


def read_pairs(folder, format, mode, count, batch):
    """(pairs/s, bytes read a pair) of one process."""
    torch.set_num_threads(1)
    warm(folder, format)
    pairs = made_pairs(folder, format, mode)
    pairs.__getitems__(list(range(batch)))
    before, start = bytes_read(), time.perf_counter()
    for first in range(batch, batch + count, batch):
        pairs.__getitems__(list(range(first, first + batch)))
    rounds = -(-count // batch) * batch
    return rounds / (time.perf_counter() - start), (bytes_read() - before) / rounds


def bytes_read():
    """Bytes that this process has read so far, where the system counts them; else nan."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return float("nan")
    return int(counters.read_text().split("rchar: ")[1].split()[0])


def members_used(folder, format, mode, count):
    """Mean bytes of the members that the first pairs are made of."""
    pairs = made_pairs(folder, format, mode)
    total = 0
    for k in range(count):
        _, scene, cond, target = pairs.draw(k)
        shard, _, start = pairs.readers[0].locate(scene)
        total += int(shard.sizes[[start + cond, start + target], IMAGE].sum())
    return total / count


def decode_only(folder, format, count):
    """pairs/s of decoding the same images from memory, two a pair, and nothing else."""
    pairs = made_pairs(folder, format, MODE)
    files = []
    for k in range(BATCH, BATCH + count):
        _, scene, *views = pairs.draw(k)
        shard, _, at = pairs.readers[0].locate(scene)
        files += [shard.member(at + view, IMAGE)[0] for view in views]
    start = time.perf_counter()
    for file in files:
        Image.open(io.BytesIO(file)).load()
    return count / (time.perf_counter() - start)


def through_loader(folder, format, mode, count, batch, workers):
    """pairs/s that arrive from the loader's processes."""
    warm(folder, format)
    pairs = made_pairs(folder, format, mode)
    settled = 2 * max(workers, 1)
    batches = iter(loader(pairs, Batches(0, settled + -(-count // batch), batch, batch), workers))
    for _ in range(settled):
        next(batches)
    start, seen = time.perf_counter(), 0
    for got in batches:
        seen += len(got["uid"])
    return seen / (time.perf_counter() - start)


def index_rate(folder, format):
    """(MB of tar a second, members a second) of one pass over the headers, single-threaded."""
    warm(folder, format)
    files = [LocalFile(path) for path in sorted(Path(folder).glob(f"{format}-*.tar"))]
    start = time.perf_counter()
    built = [RawIndex(file, "co3d", keep=False) for file in files]
    seconds = time.perf_counter() - start
    members = 3 * sum(len(index.frames) for index in built)
    return sum(file.size for file in files) / seconds / 1e6, members / seconds


def write_many(folder, scenes, views):
    """Indexes of a set of the published size, 200 scenes a shard; the shards are empty holes."""
    per_shard = 200
    for shard in range(-(-scenes // per_shard)):
        path = Path(folder) / f"many-{shard:06}.tar"
        with open(path, "wb") as file:
            file.truncate(1 << 30)
        index = object.__new__(RawIndex)
        index.file, index.layout = LocalFile(path), "co3d"
        index.name, index.stamp = path.name, [INDEX_VERSION, *index.file.stamp]
        index.scenes = [f"category/{shard}_{i}" for i in range(per_shard)]
        index.problems, rows = [], per_shard * views
        ones = np.ones(per_shard)
        index.starts, index.side = np.arange(0, rows + 1, views), np.full(per_shard, SIDE, np.int32)
        index.fov = index.depth_scale = index.radius = ones
        index.frames, index.c2w = np.arange(rows, dtype=np.int32), np.zeros((rows, 3, 4))
        index.blocks = index.sizes = np.ones((rows, 2), np.int32)
        index.store()


def open_many(folder):
    """(seconds, bytes of memory of its own, members) of opening those indexes."""
    before, start = private_memory(), time.perf_counter()
    source = open_source(Source("many", "co3d", "many-*.tar", 1.0), folder, SIDE)
    seconds = time.perf_counter() - start
    return seconds, private_memory() - before, 3 * int(source.counts.sum())


def private_memory():
    """Bytes of memory that are this process' alone, where the system says so; else nan."""
    smaps = Path("/proc/self/smaps_rollup")
    if not smaps.exists():
        return float("nan")
    return sum(int(line.split()[1]) * 1024 for line in smaps.read_text().splitlines()
               if line.startswith("Private_Dirty"))


def many_rows(folder, given):
    write_many(folder, given.many, 60)
    size = sum(path.stat().st_size for path in folder.glob("many-*.index"))
    seconds, memory, members = in_fresh_process(open_many, str(folder))
    return [row("data: members of a large set", members / 1e6, "million"),
            row("data: its kept indexes, opened", seconds, "s"),
            row("data: its indexes on disk, mapped", size / members, "bytes/member"),
            row("data: its indexes in memory", memory / members, "bytes/member")]


def webdataset_pairs(folder, format, count, workers):
    """pairs/s of the reference's way; raises ImportError without webdataset."""
    import webdataset

    def scenes(samples):
        frames, current = {}, None
        for sample in samples:
            scene, _, frame = sample["__key__"].rpartition("/")
            if current not in (None, scene):
                yield frames
                frames = {}
            current = scene
            frames[frame] = sample
        yield frames

    def chosen(groups):
        suffix = FORMATS[format][0]
        for frames in groups:
            names = sorted(name for name in frames if "_" not in name)
            for _ in range(int(RATE * len(names))):
                pair = random.sample(names, 2)
                item = {}
                for side, name in zip(("cond", "target"), pair):
                    item[f"image_{side}"] = images(torch.from_numpy(decode_image(
                        frames[name][suffix], SIDE).copy()))
                    item[f"depth_{side}"] = decode_depth(frames[name + "_depth"]["png"], SIDE, 1.0)
                    item[f"camera_{side}"] = json.loads(frames[name + "_metadata"]["json"])["T"]
                yield item

    torch.set_num_threads(1)
    warm(folder, format)
    urls = [str(path) for path in sorted(Path(folder).glob(f"{format}-*.tar"))]
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(urls), webdataset.tarfile_to_samples(), scenes, chosen,
        webdataset.shuffle(SHUFFLE, initial=1),
        webdataset.batched(BATCH, partial=False))
    batches = iter(webdataset.WebLoader(pipeline, num_workers=workers, batch_size=None))
    next(batches)
    start = time.perf_counter()
    for _ in range(-(-count // BATCH)):
        next(batches)
    return -(-count // BATCH) * BATCH / (time.perf_counter() - start)


def run(given):
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for format in given.formats:
            write_raw(folder, format, given.scenes, given.views)
            rows += raw_rows(folder, format, given)
        rows += many_rows(folder, given)
        write_encoded(folder, given.scenes, given.views)
        rate, _ = in_fresh_process(read_pairs, name, "encoded", DEPTH_MODE,
                                   40 * given.pairs, ENCODED_BATCH)
        rows.append(row("data: encoded shards, one process", rate, "pairs/s"))
        for workers in given.workers:
            rate = in_fresh_process(through_loader, name, "encoded", DEPTH_MODE, 40 * given.pairs,
                                    ENCODED_BATCH, workers)
            rows.append(row(f"data: encoded shards, loader of {workers}", rate, "pairs/s"))
    return rows


def raw_rows(folder, format, given):
    rows, name = [], str(folder)
    size = sum(path.stat().st_size for path in folder.glob(f"{format}-*.tar"))
    rows.append(row(f"data: {format} shards", size / GB, "GB"))
    if format == "PNG":
        rate, members = in_fresh_process(index_rate, name, format)
        rows += [row("data: index build, one thread", rate, "MB/s"),
                 row("data: index build, one thread", members, "members/s")]
    decoding = in_fresh_process(decode_only, name, format, given.pairs)
    rate, read = in_fresh_process(read_pairs, name, format, MODE, given.pairs, BATCH)
    rows.append(row(f"data: {format}, one process", rate, "pairs/s", "decoding alone", decoding,
                    rate / decoding))
    used = in_fresh_process(members_used, name, format, MODE, given.pairs)
    rows.append(row(f"data: {format}, read a pair", read / 1e3, "kB", "its members", used / 1e3))
    for workers in given.workers:
        spread = in_fresh_process(through_loader, name, format, MODE, given.pairs, BATCH, workers)
        rows.append(row(f"data: {format}, loader of {workers}", spread, "pairs/s",
                        "one process", rate))
    if format == "PNG":
        deep, _ = in_fresh_process(read_pairs, name, format, DEPTH_MODE, given.pairs, BATCH)
        rows.append(row(f"data: {format} and depth, one process", deep, "pairs/s"))
        if given.views * RATE < 1:
            print(f"the reference's way gives no pair of scenes of {given.views} views: left out")
            return rows
        try:
            peer = in_fresh_process(webdataset_pairs, name, format, given.pairs // 4, 0)
            rows.append(row(f"data: {format} and depth, one process", deep, "pairs/s",
                            "webdataset, the reference's way", peer))
            rows.append(row(f"data: {format}, one process", rate, "pairs/s",
                            "webdataset, the reference's way", peer))
        except ImportError:
            print("no webdataset here (pip install webdataset): left out")
    return rows


def add_options(parser):
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where shards are written, "
                        "and removed afterwards")
    parser.add_argument("--scenes", type=int, default=20, help="scenes in all")
    parser.add_argument("--views", type=int, default=100, help="views a scene")
    parser.add_argument("--pairs", type=int, default=640, help="pairs that each figure is read of")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS),
                        help="image formats of the raw shards")
    parser.add_argument("--many", type=int, default=95_000, help="scenes, of 60 views, of the set "
                        "whose indexes are opened")
    parser.add_argument("--workers", nargs="+", type=int, default=list(range(
        1, (os.cpu_count() or 1) + 1)), help="processes of the loader")
