"""Makes shards: tar files of scenes, in the layouts that data.py reads.

    python prepare.py synth             # synthetic scenes, in both raw layouts, into data/synth

A raw scene is, for every view, `category/scene/frame000001.png`, `..._depth.png` (16-bit PNG whose
words are float16 bits, 0 where unknown) and `..._metadata.json`. Shards are written under another
name and renamed, so a shard that exists is whole, and the same arguments give the same bytes:
running a command again goes on where it stopped. Letters: `s` scenes, `v` views, `h w` pixels.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import signal
import struct
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import synth

LAYOUTS = ("co3d", "re10k")
SYNTH_VERSION = 2               # goes up when the same arguments give other pictures
HELD_OUT = 2**30                # number of the first held-out scene; training scenes count from 0
SMALLEST = 8                    # pixels a side
VIEWS_AT_ONCE = 128             # views a render call on a GPU takes
MOST_ON_GPU = 8                 # processes that share a GPU, unless told: each takes 2 GB of it
POLL = 0.1                      # seconds between looks at the processes
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
    c2w = torch.stack([synth.cameras(scene, args.views, args.motion) for scene in scenes])
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


def synth_scenes(numbers, args, device, report):
    """Yields the members of every scene in order; calls report(views, seconds of rendering)."""
    batch = 1 if device.type == "cpu" else max(1, VIEWS_AT_ONCE // args.views)
    for i in range(0, len(numbers), batch):
        scenes, *arrays, seconds = render_scenes(numbers[i:i + batch], args, device)
        for scene, *views in zip(scenes, *arrays):
            yield synth_scene(scene, *views, args)
        report(len(scenes) * args.views, seconds)


def make_shards(todo, args, device, report):
    """Makes shards one after the other, on one core. `todo` may be a generator."""
    torch.set_num_threads(1)
    for path, _, _, numbers in todo:
        write_shard(path, synth_scenes(numbers, args, device, report))


def worker(todo, args, device, taken, views, seconds, errors):
    """One of several processes: makes the shards that no other has taken; dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def shards():
        while True:
            with taken.get_lock():
                k, taken.value = taken.value, taken.value + 1
            if k >= len(todo):
                return
            yield todo[k]

    def report(more_views, more_seconds):
        with views.get_lock():
            views.value, seconds.value = views.value + more_views, seconds.value + more_seconds
        if not multiprocessing.parent_process().is_alive():
            os._exit(1)

    try:
        make_shards(shards(), args, device, report)
    except (ValueError, OSError) as err:
        errors.put(str(err))


def make_shards_together(todo, args, device, workers, report):
    """Makes shards in several processes, each on one core. OSError where one of them fails.

    Processes, not threads: most calls into torch are so short that threads would queue up for them.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["synth"])
    taken, views = context.Value("q", 0), context.Value("q", 0)
    seconds, errors = context.Value("d", 0.0), context.SimpleQueue()
    shared = (todo, args, device, taken, views, seconds, errors)
    processes = [context.Process(target=worker, args=shared, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    reported, running = (0, 0.0), True
    while running:
        time.sleep(POLL)
        running = any(process.is_alive() for process in processes)
        now = views.value, seconds.value
        report(now[0] - reported[0], now[1] - reported[1])
        reported = now
        if not errors.empty():
            raise OSError(errors.get())
        codes = [process.exitcode for process in processes if process.exitcode]
        if codes:
            raise OSError(f"a process that renders ended with code {codes[0]}: the same command "
                          "goes on from here, perhaps with fewer --workers")


def check_out(args):
    """Notes the arguments in the output folder, or compares them with those noted: ValueError."""
    out = Path(args.out)
    note = out / "synth.json"
    names = ("scenes", "held_out", "views", "size", "motion", "seed", "image_format",
             "scenes_per_shard")
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
    if not 0 < args.motion <= 1:
        raise ValueError(f"--motion is {args.motion:g}, it must be more than 0 and at most 1")
    for name, least in (("scenes", 2), ("held_out", 2), ("views", 2), ("size", SMALLEST),
                        ("seed", 0), ("workers", 0), ("scenes_per_shard", 1)):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value < least:
            raise ValueError(f"{option} {value}: it must be at least {least}")
    device = pick_device(args.device)
    check_out(args)
    plan = synth_plan(args)
    todo = [shard for shard in plan if not shard[0].is_file()]
    total = args.views * sum(len(shard[3]) for shard in plan)
    views = args.views * sum(len(shard[3]) for shard in todo)
    workers = min(args.workers or default_workers(device), max(1, len(todo)))
    started, rendering = time.perf_counter(), 0.0
    with tqdm(total=total, initial=total - views, unit=" views", desc=f"synth on {device}") as bar:

        def report(more_views, more_seconds):
            nonlocal rendering
            bar.update(more_views)
            rendering += more_seconds

        if workers == 1:
            make_shards(todo, args, device, report)
        else:
            make_shards_together(todo, args, device, workers, report)
    for split in ("train", "held-out"):
        for layout in LAYOUTS:
            shards = [shard for shard in plan if shard[1:3] == (split, layout)]
            scenes = sum(len(shard[3]) for shard in shards)
            size = sum(shard[0].stat().st_size for shard in shards)
            print(f"{Path(args.out) / layout / split}-*.tar: {len(shards)} shards, "
                  f"{scenes} scenes, {scenes * args.views} views, {size / 1e6:.1f} MB")
    if views:
        seconds = time.perf_counter() - started
        print(f"{views} views of {args.size}x{args.size} in {seconds:.1f} s: "
              f"{views / seconds:.0f} views/s, rendering alone "
              f"{workers * views / rendering:.0f} views/s ({workers} processes on {device})")
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


def default_workers(device):
    """Processes that keep the machine busy."""
    cores = os.cpu_count() or 1
    return cores if device.type == "cpu" else min(cores, MOST_ON_GPU)


def parser():
    """The command line: one sub-command a kind of shard."""
    top = argparse.ArgumentParser(prog="prepare.py", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    help_format = argparse.ArgumentDefaultsHelpFormatter
    sub = commands.add_parser("synth", formatter_class=help_format,
                              help="ray-cast synthetic scenes, with exact cameras and depth")
    add = sub.add_argument
    add("--out", default="data/synth", help="folder: shards go into OUT/co3d and OUT/re10k")
    add("--scenes", type=int, default=2000, help="training scenes, half in each layout")
    add("--held-out", type=int, default=100, help="further scenes, kept from training")
    add("--views", type=int, default=8, help="views a scene")
    add("--size", type=int, default=32, help="pixels a side")
    add("--motion", type=float, default=0.4,
        help="share of its path that a camera goes, up to 1: arcs are of 60 to 120 degrees")
    add("--seed", type=int, default=0, help="scenes are a function of it and of their number")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to render")
    add("--image-format", choices=IMAGE_FORMATS, default="png", help="of the colour images")
    add("--scenes-per-shard", type=int, default=100, help="scenes in a shard, at most")
    add("--workers", type=int, default=0, help="processes; 0: one a core, on a GPU at most 8")
    add("--overwrite", action="store_true", help="replace shards made with other arguments")
    sub.set_defaults(run=run_synth)
    return top


def main(argv=None):
    """Runs a sub-command; bad input ends with one line and exit code 2, an interrupt with 130."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as err:
        print(f"prepare.py {args.command}: {err}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"prepare.py {args.command}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
