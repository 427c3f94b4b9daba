"""Makes shards: tar files of scenes, in the layouts that data.py reads.

    python prepare.py synth             # synthetic scenes, in both raw layouts, into data/synth

A raw scene is, for every view, `category/scene/frame000001.png`, `..._depth.png` (16-bit PNG whose
words are float16 bits, 0 where unknown) and `..._metadata.json`. Shards are written under another
name and renamed, so a shard that exists is whole, and the same arguments give the same bytes:
running a command again goes on where it stopped. Letters: `s` scenes, `v` views, `h w` pixels.
"""

import argparse
import io
import itertools
import json
import math
import os
import struct
import sys
import tarfile
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import synth

LAYOUTS = ("co3d", "re10k")
SYNTH_VERSION = 1               # goes up when the same arguments give other pictures
HELD_OUT = 2**30                # number of the first held-out scene; training scenes count from 0
SMALLEST = 8                    # pixels a side
VIEWS_AT_ONCE = 256             # views a render call on an accelerator takes
PLANNERS = 3                    # render calls on an accelerator at a time
PARTIAL = ".partial"            # suffix of a shard that is being written
# from OpenGL camera axes (right, up, back) to pytorch3d's (left, up, forward)
PYTORCH3D = np.diag([-1.0, 1.0, -1.0])
LOSSY = {"jpg": dict(format="JPEG", quality=95), "webp": dict(format="WEBP", quality=92)}
IMAGE_FORMATS = ("png", *LOSSY)


# ---------------------------------------------------------------------------------------- shards

def write_shard(path, scenes):
    """Writes scenes, each a list of (member name, bytes), as a tar at `path`; returns its size.

    `scenes` may be a generator. The tar's bytes depend on the members alone: ustar, no times, no
    owners. The file appears under its name when it is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for scene in scenes:
                for name, content in scene:
                    member = tarfile.TarInfo(name)      # time, owner and group are 0
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path.stat().st_size


def png_bytes(samples):
    """The PNG file of samples (h, w, 3) uint8 or (h, w) uint16.

    Every row is stored as its difference to the one above, and packed by one call of zlib: half the
    time of a coder that chooses among filters, for a few per cent more bytes.
    """
    depth, color = (8, 2) if samples.ndim == 3 else (16, 0)         # bits, RGB or grey
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").view(np.uint8) if depth == 16 else samples
    rows = rows.reshape(height, -1)
    lines = np.full((height, rows.shape[1] + 1), 2, np.uint8)       # a leading 2: "up"
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data
        file += struct.pack(">I", zlib.crc32(kind + data))
    return file


def image_bytes(image, image_format):
    """The file of an RGB image (h, w, 3) uint8; `image_format` is one of IMAGE_FORMATS."""
    if image_format == "png":
        return png_bytes(image)
    file = io.BytesIO()
    Image.fromarray(image).save(file, **LOSSY[image_format])
    return file.getvalue()


def depth_bytes(depth):
    """The 16-bit PNG of a depth (h, w): float16 bits; what is unknown or does not fit is 0."""
    with np.errstate(over="ignore"):
        half = depth.astype(np.float16)
    half[~np.isfinite(half) | (half < 0)] = 0
    return png_bytes(half.view(np.uint16))


def co3d_metadata(c2w, fov, scale_adjustment):
    """Metadata of a square view in the co3d layout: OpenGL c2w (4, 4) float64, fov in radians.

    pytorch3d multiplies rows, x_cam = x_world R + T; focal lengths are in half image sides.
    """
    w2c = np.linalg.inv(c2w)
    focal = 1 / math.tan(fov / 2)
    return {"R": (PYTORCH3D @ w2c[:3, :3]).T.tolist(), "T": (PYTORCH3D @ w2c[:3, 3]).tolist(),
            "focal_length": [focal, focal], "principal_point": [0.0, 0.0],
            "scale_adjustment": scale_adjustment}


def re10k_metadata(c2w, fov, size):
    """Metadata of a square view, `size` pixels, in the re10k layout: OpenGL c2w, fov in radians."""
    slope = 2 * math.tan(fov / 2) / size            # of the ray, a pixel
    corner = -math.tan(fov / 2)
    return {"extrinsics": c2w.tolist(),
            "intrinsics": [[slope, 0.0, corner], [0.0, slope, corner], [0.0, 0.0, 1.0]]}


def raw_scene(layout, name, images, depths, c2w, fov, image_format="png", scale_adjustment=1.0):
    """The members of a raw scene `name` (category/scene): a list of (member name, bytes).

    images (v, h, h, 3) uint8, depths (v, h, h) with 0 for unknown, OpenGL c2w (v, 4, 4) float64 in
    the same unit, fov in radians, numpy arrays all. Readers multiply the stored depth by
    `scale_adjustment`, which only co3d has.
    """
    members = []
    for i, (image, depth, pose) in enumerate(zip(images, depths, c2w)):
        frame = f"{name}/frame{i + 1:06d}"
        if layout == "co3d":
            metadata, depth = co3d_metadata(pose, fov, scale_adjustment), depth / scale_adjustment
        else:
            metadata = re10k_metadata(pose, fov, image.shape[1])
        members += [(f"{frame}.{image_format}", image_bytes(image, image_format)),
                    (f"{frame}_depth.png", depth_bytes(depth)),
                    (f"{frame}_metadata.json", json.dumps(metadata).encode())]
    return members


# ----------------------------------------------------------------------------------------- synth

def synth_plan(args):
    """The shards of a run: a list of (path, split, layout, scene numbers)."""
    plan = []
    for split, first, count in (("train", 0, args.scenes), ("held-out", HELD_OUT, args.held_out)):
        for offset, layout in enumerate(LAYOUTS):
            numbers = range(first + offset, first + count, len(LAYOUTS))
            for i in range(0, len(numbers), args.scenes_per_shard):
                path = Path(args.out) / layout / f"{split}-{i // args.scenes_per_shard:06d}.tar"
                plan.append((path, split, layout, numbers[i:i + args.scenes_per_shard]))
    return plan


def render_scenes(numbers, args, device):
    """Renders scenes. Returns (scenes, images (s, v, h, w, 3) uint8, depths, c2w, seconds)."""
    started = time.perf_counter()
    scenes = [synth.scene(args.seed, number) for number in numbers]
    c2w = torch.stack([synth.cameras(scene, args.views) for scene in scenes])
    fov = torch.tensor([scene.fov for scene in scenes], dtype=torch.float64)
    images, depths = synth.render(scenes, c2w.to(device), fov, args.size)
    images = images.add_(1).mul_(127.5).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
    images, depths = images.cpu().numpy(), depths.cpu().numpy()
    return scenes, images, depths, c2w.numpy(), time.perf_counter() - started


def synth_scene(scene, images, depths, c2w, args):
    """The members of one rendered scene: even numbers, which are arcs, are co3d, odd ones re10k."""
    layout = LAYOUTS[scene.number % len(LAYOUTS)]
    # readers multiply it in again: any value must give the same depth
    scale_adjustment = float(np.random.default_rng([args.seed, scene.number, 1]).uniform(0.5, 2))
    name = f"{scene.kind}/{scene.number:010d}"
    return raw_scene(layout, name, images, depths, c2w, scene.fov, args.image_format,
                     scale_adjustment)


def render_threads(args, device):
    """Threads that render: every one on a CPU; else enough to plan one batch while another runs."""
    return args.workers if device.type == "cpu" else PLANNERS


def synth_scenes(numbers, args, device):
    """Yields (members, render seconds) of every scene in order, made by threads, a few ahead.

    torch, zlib and the image coders let go of Python's lock. On a CPU every thread renders one
    scene after the other; on an accelerator a few render batches, and the others encode.
    """
    on_cpu = device.type == "cpu"
    size = 1 if on_cpu else max(1, VIEWS_AT_ONCE // args.views)
    ahead = 2 * (size + args.workers)       # scenes that wait for their encoding, at most
    batches = deque(numbers[i:i + size] for i in range(0, len(numbers), size))
    threads = render_threads(args, device)
    one_core = dict(initializer=torch.set_num_threads, initargs=(1,))
    with ThreadPoolExecutor(threads, **one_core) as renderers, \
            ThreadPoolExecutor(args.workers) as encoders:
        rendered, encoded = deque(), deque()
        while batches or rendered or encoded:
            while batches and len(rendered) < 2 * threads:
                rendered.append(renderers.submit(render_scenes, batches.popleft(), args, device))
            while rendered and (not encoded or rendered[0].done() and len(encoded) < ahead):
                scenes, *arrays, seconds = rendered.popleft().result()
                for scene, *views in zip(scenes, *arrays):
                    work = encoders.submit(synth_scene, scene, *views, args)
                    encoded.append((work, seconds / len(scenes)))
            work, seconds = encoded.popleft()
            yield work.result(), seconds


def check_out(args):
    """Notes the arguments in the output folder, or compares them with those noted: ValueError."""
    out = Path(args.out)
    note = out / "synth.json"
    names = ("scenes", "held_out", "views", "size", "seed", "image_format", "scenes_per_shard")
    arguments = {"version": SYNTH_VERSION} | {name: getattr(args, name) for name in names}
    shards = sorted(path for layout in LAYOUTS for path in (out / layout).glob("*.tar*"))
    if note.is_file():
        try:
            found = json.loads(note.read_text())
        except ValueError as err:
            raise ValueError(f"{note} is no JSON; choose another --out") from err
        differing = [f"{name.replace('_', '-')} {found.get(name)} there, {value} now"
                     for name, value in arguments.items() if found.get(name) != value]
        if differing and not args.overwrite:
            raise ValueError(f"{out} was made with other arguments ({'; '.join(differing)}): "
                             "choose another --out, or --overwrite")
        if args.overwrite:
            for path in shards:
                path.unlink()
    elif shards:
        raise ValueError(f"{out} holds shards that this command did not make: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    partial = note.with_name(note.name + PARTIAL)
    partial.write_text(json.dumps(arguments, indent=1) + "\n")
    os.replace(partial, note)


def run_synth(args):
    """Renders synthetic scenes into shards of both raw layouts, skipping those that are there."""
    for name, least in (("scenes", 2), ("held_out", 2), ("views", 2), ("size", SMALLEST),
                        ("seed", 0), ("workers", 1), ("scenes_per_shard", 1)):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value < least:
            raise ValueError(f"{option} {value}: it must be at least {least}")
    device = pick_device(args.device)
    check_out(args)
    plan = synth_plan(args)
    todo = [shard for shard in plan if not shard[0].is_file()]
    started, rendering = time.perf_counter(), 0.0
    made = synth_scenes(list(itertools.chain(*(shard[3] for shard in todo))), args, device)
    total = args.views * sum(len(shard[3]) for shard in plan)
    views = args.views * sum(len(shard[3]) for shard in todo)
    with tqdm(total=total, initial=total - views, unit=" views", desc=f"synth on {device}") as bar:

        def scenes_of(shard):
            nonlocal rendering
            for members, seconds in itertools.islice(made, len(shard[3])):
                rendering += seconds
                bar.update(args.views)
                yield members

        for shard in todo:
            write_shard(shard[0], scenes_of(shard))
    for split in ("train", "held-out"):
        for layout in LAYOUTS:
            shards = [shard for shard in plan if shard[1:3] == (split, layout)]
            scenes = sum(len(shard[3]) for shard in shards)
            size = sum(shard[0].stat().st_size for shard in shards)
            print(f"{Path(args.out) / layout / split}-*.tar: {len(shards)} shards, "
                  f"{scenes} scenes, {scenes * args.views} views, {size / 1e6:.1f} MB")
    if views:
        seconds = time.perf_counter() - started
        alone = views / rendering * render_threads(args, device)
        print(f"{views} views of {args.size}x{args.size} in {seconds:.1f} s: "
              f"{views / seconds:.0f} views/s, rendering alone {alone:.0f} views/s on {device}")
    else:
        print("all of them were there already")


# ---------------------------------------------------------------------------------- command line

def pick_device(name):
    """The torch device of auto | cpu | cuda; auto prefers cuda. ValueError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return torch.device(name)


def parser():
    """The command line: one sub-command a kind of shard."""
    top = argparse.ArgumentParser(prog="prepare.py", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    help_format = argparse.ArgumentDefaultsHelpFormatter
    sub = commands.add_parser("synth", formatter_class=help_format,
                              help="ray-cast synthetic scenes, with exact cameras and depth")
    add = sub.add_argument
    add("--out", default="data/synth", help="folder: shards go into OUT/co3d and OUT/re10k")
    add("--scenes", type=int, default=1000, help="training scenes, half in each layout")
    add("--held-out", type=int, default=100, help="further scenes, kept from training")
    add("--views", type=int, default=8, help="views a scene")
    add("--size", type=int, default=64, help="pixels a side")
    add("--seed", type=int, default=0, help="scenes are a function of it and of their number")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to render")
    add("--image-format", choices=IMAGE_FORMATS, default="png", help="of the colour images")
    add("--scenes-per-shard", type=int, default=100, help="scenes in a shard, at most")
    add("--workers", type=int, default=os.cpu_count(), help="threads")
    add("--overwrite", action="store_true", help="replace shards made with other arguments")
    sub.set_defaults(run=run_synth)
    return top


def main(argv=None):
    """Runs a sub-command; bad input ends with one line and exit code 2."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as err:
        print(f"prepare.py {args.command}: {err}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
