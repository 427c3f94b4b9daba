"""Makes shards: tar files of scenes, in the layouts that data.py reads.

    python prepare.py synth                             # synthetic scenes, into data/synth
    python prepare.py co3d CO3D                         # CO3D v2 as downloaded, into data/co3d
    python prepare.py re10k --cameras RealEstate10K/train --frames FRAMES       # and acid
    python prepare.py colmap CAPTURE ...                # COLMAP models with their images
    python prepare.py nerfstudio CAPTURE ...            # folders with a transforms.json
    python prepare.py encode SHARDS ... --weights zero123-xl.ckpt    # raw shards to encoded ones

Shards are written under another name and renamed, so a shard that exists is whole, and the same
arguments give the same bytes: running a command again goes on where it stopped. Letters: `s`
scenes, `v` views, `h w` pixels.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captures import datasets, resample, synth
from runtime.ranks import device_of
from captures import encode
from captures.writer import IMAGE_FORMATS, ahead, check_out, make, raw_scene, write_text

LAYOUTS = ("co3d", "re10k")
DEVICES = "cuda", "cpu"         # that render and encode
SYNTH_VERSION = 2               # goes up when the same arguments give other pictures
CAPTURES_VERSION = 1
HELD_OUT = 2**30                # number of the first held-out scene; training scenes count from 0
SMALLEST = 8                    # pixels a side
MOST_TURN = 45                  # degrees
VIEWS_AT_ONCE = 128             # views a render call on a GPU takes
MOST_ON_GPU = 6                 # processes that share a GPU, unless told: each takes 2 GB of it
BATCHES_AHEAD = 2               # of rendered views, waiting for threads that encode them
FEWEST_VIEWS = 2                # of a scene: a pair
# bytes of a photo's pixel, and of a dense depth map's, as measured: what shards are planned by
BYTES_A_PIXEL, DEPTH_BYTES_A_PIXEL = {"png": 2.0, "jpg": 0.5, "webp": 0.33}, 0.8
SPLITS = ("train", "held-out")
WHERE = "folder", "folders", "cameras", "frames", "videos", "colmap"        # captures lie
SHARE_HELD_OUT, MOST_HELD_OUT = 0.05, 100       # scenes of captures, unless told


def check_least(args, **least):
    """Raises ValueError for the first option that is less than it may be."""
    for name, limit in least.items():
        if getattr(args, name) < limit:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at "
                             f"least {limit}")


# ----------------------------------------------------------------------------------------- synth

def synth_plan(args):
    """The shards of a run: a list of (path, split, layout, scene numbers)."""
    plan = []
    for split, first, count in zip(SPLITS, (0, HELD_OUT), (args.scenes, args.held_out)):
        for offset, layout in enumerate(LAYOUTS):
            numbers = range(first + offset, first + count, len(LAYOUTS))
            for i in range(0, len(numbers), args.scenes_per_shard):
                path = Path(args.out) / layout / f"{split}-{i // args.scenes_per_shard:06d}.tar"
                plan.append((path, split, layout, numbers[i:i + args.scenes_per_shard]))
    return plan


def render_scenes(numbers, args, device):
    """Renders scenes: a list of (scene, images (v, h, w, 3) uint8, depths (v, h, w), c2w)."""
    scenes = [synth.scene(args.seed, number) for number in numbers]
    c2w = torch.stack([synth.cameras(scene, args.views, args.motion, turns_of(scene, args))
                       for scene in scenes])
    fov = torch.tensor([scene.fov for scene in scenes], dtype=torch.float64)
    images, depths = synth.render(scenes, c2w.to(device), fov, args.size)
    images = images.add_(1).mul_(127.5).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
    # not waiting, torch copies into pinned memory, which is several times faster
    images, depths = images.to("cpu", non_blocking=True), depths.to("cpu", non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return list(zip(scenes, images.numpy(), depths.numpy(), c2w.numpy()))


def turns_of(scene, args):
    """How far the cameras of a scene look aside, see synth.cameras; None if not at all."""
    if not args.turn:
        return None
    rng = np.random.default_rng([args.seed, scene.number, 2])
    return np.radians(rng.uniform(-args.turn, args.turn, (args.views, 2)))


def synth_scene(rendered, args):
    """The members of one rendered scene: even numbers, which are arcs, are co3d, odd ones re10k."""
    scene, images, depths, c2w = rendered
    layout = LAYOUTS[scene.number % len(LAYOUTS)]
    # readers multiply it in again: any value must give the same depth
    scale_adjustment = float(np.random.default_rng([args.seed, scene.number, 1]).uniform(0.5, 2))
    name = f"{scene.kind}/{scene.number:010d}"
    return raw_scene(layout, name, images, depths, c2w, scene.fov, args.image_format,
                     scale_adjustment)


def synth_scenes(args, device, threads, path, numbers, report):
    """Yields the members of every scene in order; calls report(views).

    Three at a time: a thread renders, `threads` encode (packing leaves Python's lock to others),
    and the caller writes.
    """
    batch = 1 if device.type == "cpu" else max(1, VIEWS_AT_ONCE // args.views)
    batches = (numbers[i:i + batch] for i in range(0, len(numbers), batch))
    render = functools.partial(render_scenes, args=args, device=device)
    encode_scene = functools.partial(synth_scene, args=args)
    rendered = itertools.chain.from_iterable(ahead(render, batches, 1, BATCHES_AHEAD))
    for members in ahead(encode_scene, rendered, threads, 2 * threads):
        yield members
        report(args.views)


def run_synth(args):
    """Renders synthetic scenes into shards of both raw layouts, skipping those that are there."""
    if not 0 < args.motion <= 1:
        raise ValueError(f"--motion is {args.motion:g}, it must be more than 0 and at most 1")
    if not 0 <= args.turn <= MOST_TURN:
        raise ValueError(f"--turn is {args.turn:g}, it must be 0 to {MOST_TURN} degrees")
    check_least(args, scenes=2, held_out=2, views=2, size=SMALLEST, seed=0, workers=0,
                scenes_per_shard=1)
    device = device_of(args.device, DEVICES)
    names = ("scenes", "held_out", "views", "size", "motion", "turn", "seed", "image_format",
             "scenes_per_shard")
    arguments = {"version": SYNTH_VERSION} | {name: getattr(args, name) for name in names}
    shards = [path for layout in LAYOUTS for path in (Path(args.out) / layout).glob("*.tar*")]
    check_out(Path(args.out) / "synth.json", arguments, shards, args.overwrite)
    plan = synth_plan(args)
    todo = [(path, numbers) for path, _, _, numbers in plan if not path.is_file()]
    total = args.views * sum(len(shard[3]) for shard in plan)
    views = args.views * sum(len(numbers) for _, numbers in todo)
    workers = min(args.workers or default_workers(device), max(1, len(todo)))
    threads = max(1, (os.cpu_count() or 1) // workers)
    started = time.perf_counter()
    with tqdm(total=total, initial=total - views, unit=" views", desc=f"synth on {device}") as bar:
        rate = make(todo, functools.partial(synth_scenes, args, device, threads), workers, bar)
    for split in SPLITS:
        for layout in LAYOUTS:
            shards = [shard for shard in plan if shard[1:3] == (split, layout)]
            scenes = sum(len(shard[3]) for shard in shards)
            size = sum(shard[0].stat().st_size for shard in shards)
            print(f"{Path(args.out) / layout / split}-*.tar: {len(shards)} shards, "
                  f"{scenes} scenes, {scenes * args.views} views, {size / 1e6:.1f} MB")
    if views:
        seconds = time.perf_counter() - started
        print(f"{views} views of {args.size}x{args.size} in {seconds:.1f} s: "
              f"{views / seconds:.0f} views/s, {rate:.0f} since the first were there "
              f"({workers} processes on {device}, {threads} threads each)")
    else:
        print("all of them were there already")


# -------------------------------------------------------------------------------------- captures

def find(args):
    """(Captures, Counter of those passed over) of the arguments. Raises ValueError, OSError."""
    if args.command == "co3d":
        return datasets.find_co3d(args.folder, args.categories, args.quality, args.depth)
    if args.command == "colmap":
        return datasets.find_colmap(args.folders, args.images, args.depth)
    if args.command == "nerfstudio":
        return datasets.find_nerfstudio(args.folders, args.depth)
    return datasets.find_re10k(args.command, args.cameras, args.frames, args.videos, args.colmap)


def split_captures(found, args):
    """{split: Captures by name}. Which are held out, and which a smaller number of scenes leaves,
    follows from the seed and the names. Raises ValueError."""
    names = Counter(capture.name for capture in found)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"two scenes are called {twice[0]}: rename the folder of one")
    held_out = args.held_out
    if held_out < 0:
        held_out = min(MOST_HELD_OUT, math.ceil(SHARE_HELD_OUT * len(found))) * (len(found) > 1)
    if len(found) <= held_out:
        raise ValueError(f"{len(found)} scenes found, of which --held-out {held_out} leaves none "
                         "for training")
    order = sorted(found, key=lambda each: hashlib.sha256(f"{args.seed} {each.name}".encode())
                   .digest())
    train = order[held_out:][:args.scenes or None]
    by_name = functools.partial(sorted, key=lambda capture: capture.name)
    return dict(zip(SPLITS, (by_name(train), by_name(order[:held_out]))))


def count_views(capture, args):
    """The views of a scene that are asked for."""
    return min(capture.count, args.views or capture.count)


def plan_captures(splits, args):
    """(shards of a run: a list of (path, Captures), bytes of a view). Shards are as few as
    --shard-size allows, and about alike."""
    a_view = args.size**2 * (BYTES_A_PIXEL[args.image_format]
                             + (DEPTH_BYTES_A_PIXEL if args.depth else 0))
    plan = []
    for split, found in splits.items():
        counts = [count_views(capture, args) for capture in found]
        shards = max(1, math.ceil(sum(counts) * a_view / (args.shard_size * 1e9)))
        share = max(1, sum(counts)) / shards
        before = itertools.accumulate(counts, initial=0)        # views in front of each scene
        grouped = itertools.groupby(zip(before, found), lambda each: int(each[0] // share))
        for i, (_, shard) in enumerate(grouped):
            path = Path(args.out) / f"{split}-{i:06d}.tar"
            plan.append((path, [capture for _, capture in shard]))
    return plan, a_view


def evenly(views, count):
    """`count` of the views, evenly from the first to the last; 0: all."""
    if not 0 < count < len(views):
        return views
    return [views[round(i)] for i in np.linspace(0, len(views) - 1, count)]


def depth_unit(view, depths):
    """What the stored depths of a scene are to be multiplied by: CO3D's own number, so that its
    words come through as they were, or else what brings the median near 1."""
    if isinstance(view.depth, resample.DepthMap) and view.depth.half_floats:
        return view.depth.unit
    depths = np.array(depths)
    return 2.0 ** round(math.log2(np.median(depths[depths > 0])))


def capture_scene(capture, args, out):
    """The members of one scene. Appends the views left out to `out`; raises LeftOut."""
    views, unread = capture.read()
    views, half, unusable = resample.one_camera(views)
    out += unread + unusable
    kept, images, depths = [], [], []
    for view, picture in resample.pictures(evenly(views, args.views)):
        try:
            if isinstance(picture, resample.LeftOut):
                raise picture
            image, depth = resample.square(view, picture, half, args.size)
        except resample.LeftOut as err:
            out.append(err)
            continue
        kept, images, depths = [*kept, view], [*images, image], [*depths, depth]
    if len(kept) < FEWEST_VIEWS:
        raise resample.LeftOut(capture.name, "fewer than two usable views", out[-1] if out else "")
    layout, unit = "re10k", 1.0
    if args.command not in ("re10k", "acid"):
        layout, unit = "co3d", depth_unit(kept[0], depths) if kept[0].depth else 1.0
    c2w = [view.c2w for view in kept]
    return raw_scene(layout, capture.name, images, depths if kept[0].depth else None, c2w,
                     2 * math.atan(half), args.image_format, unit)


def capture_scenes(args, path, found, report):
    """Yields the members of a shard's scenes in order; then notes beside it what was left out.

    Raises ValueError where nothing is left.
    """
    out, scenes, views = [], 0, 0
    for capture in found:
        mine = []
        try:
            members = capture_scene(capture, args, mine)
            scenes, views = scenes + 1, views + sum("_metadata" in name for name, _ in members)
            yield members
        except resample.LeftOut as err:
            mine.append(err)
        out += mine
        report(count_views(capture, args))
    if not scenes:
        raise ValueError(f"{path}: none of its {len(found)} scenes can be used: {out[-1]}")
    write_text(path.with_suffix(".json"), json.dumps({
        "scenes": scenes, "views": views,
        "left_out": [[err.reason, err.where, err.detail] for err in out]}, indent=1) + "\n")


def from_where(given):
    """A folder, or several, as it is known from everywhere."""
    if isinstance(given, list):
        return [from_where(each) for each in given]
    return os.path.abspath(given) if given else ""


def run_captures(args):
    """Makes shards of captures, skipping those that are there."""
    check_least(args, size=SMALLEST, views=0, scenes=0, held_out=-1, seed=0, workers=0)
    if args.views == 1 or not args.shard_size > 0:
        raise ValueError("--views 1: a pair needs two; 0 takes all" if args.views == 1 else
                         f"--shard-size {args.shard_size:g}: it must be more than 0")
    found, passed_over = find(args)
    for reason, count in sorted(passed_over.items()):
        print(f"passed over: {count} {reason}")
    splits = split_captures(found, args)
    plan, a_view = plan_captures(splits, args)
    views = {path: sum(count_views(capture, args) for capture in shard) for path, shard in plan}
    total = sum(views.values())
    if args.dry_run:
        for split, each in splits.items():
            shards = [path for path, _ in plan if path.name.startswith(split)]
            count = sum(views[path] for path in shards)
            print(f"{Path(args.out) / split}-*.tar: {len(shards)} shards, {len(each)} scenes, "
                  f"{count} views, about {count * a_view / 1e9:.3g} GB")
        return
    listed = "\n".join(f"{path.name} {each.name} {each.count}" for path, shard in plan
                       for each in shard)
    names = ("command", "size", "views", "depth", "image_format", "seed", "scenes", "held_out",
             "shard_size")
    arguments = {"version": CAPTURES_VERSION} | {name: getattr(args, name) for name in names}
    arguments["found"] = (f"{len(found)} scenes (list "
                          f"{hashlib.sha256(os.fsencode(listed)).hexdigest()[:12]})")
    arguments |= {name: from_where(getattr(args, name)) for name in WHERE if hasattr(args, name)}
    arguments |= {"images": args.images} if hasattr(args, "images") else {}
    shards = list(Path(args.out).glob("*.tar*"))
    check_out(Path(args.out) / "prepare.json", arguments, shards, args.overwrite)
    todo = [shard for shard in plan
            if not (shard[0].is_file() and shard[0].with_suffix(".json").is_file())]
    left = sum(views[path] for path, _ in todo)
    workers = min(args.workers or default_workers(torch.device("cpu")), max(1, len(todo)))
    started = time.perf_counter()
    with tqdm(total=total, initial=total - left, unit=" views", desc=args.command) as bar:
        make(todo, functools.partial(capture_scenes, args), workers, bar)
    summary(plan)
    if todo:
        seconds = time.perf_counter() - started
        print(f"{left} views in {seconds:.1f} s: {left / seconds:.0f} views/s "
              f"({workers} processes)")
    else:
        print("all of them were there already")


def summary(plan):
    """Prints what there is, and what was left out."""
    left_out = {}
    for split in SPLITS:
        shards = [path for path, _ in plan if path.name.startswith(split)]
        reports = [json.loads(path.with_suffix(".json").read_text()) for path in shards]
        print(f"{shards[0].parent / split}-*.tar: {len(shards)} shards, "
              f"{sum(each['scenes'] for each in reports)} scenes, "
              f"{sum(each['views'] for each in reports)} views, "
              f"{sum(path.stat().st_size for path in shards) / 1e6:.1f} MB" if shards else
              f"{split}: no scenes")
        for each in reports:
            for reason, where, detail in each["left_out"]:
                left_out.setdefault(reason, []).append(f"{where} ({detail})" if detail else where)
    for reason, places in sorted(left_out.items()):
        print(f"left out: {len(places)} x {reason}, first {places[0]}")


def run_encode(args):
    """Encodes raw shards."""
    args.device = device_of(args.device, DEVICES).type
    if args.loaders is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.loaders = min(encode.MOST_LOADERS, cores) if args.device == "cuda" else 0
    check_least(args, batch=1, loaders=0)
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    encode.run(args)


# ---------------------------------------------------------------------------------- command line

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
    add("--scenes", type=int, default=500, help="training scenes, half in each layout")
    add("--held-out", type=int, default=100, help="further scenes, kept from training")
    add("--views", type=int, default=6, help="views a scene")
    add("--size", type=int, default=64, help="pixels a side")
    add("--motion", type=float, default=0.4,
        help="share of its path that a camera goes, up to 1: arcs are of 60 to 120 degrees")
    add("--turn", type=float, default=8.0, help="degrees that every camera looks aside at most, to "
        "the left or right and up or down: else they follow their gaze, and none turns on the spot")
    add("--seed", type=int, default=0, help="scenes are a function of it and of their number")
    add("--device", choices=("auto", *DEVICES), default="auto", help="where to render")
    add("--image-format", choices=IMAGE_FORMATS, default="png", help="of the colour images")
    add("--scenes-per-shard", type=int, default=100, help="scenes in a shard, at most")
    add("--workers", type=int, default=0, help="processes; 0: one a core, on a GPU at most 6")
    add("--overwrite", action="store_true", help="replace shards made with other arguments")
    sub.set_defaults(run=run_synth)
    add_captures(commands, help_format)
    sub = commands.add_parser("encode", formatter_class=help_format,
                              help="what the frozen networks make of raw shards, computed once")
    encode.add_options(sub)
    sub.set_defaults(run=run_encode)
    return top


def add_captures(commands, help_format):
    """The sub-commands for captures, and the options that they share."""
    helps = {"co3d": "CO3D v2, as downloaded",
             "re10k": "RealEstate10K: camera texts, and frames or videos",
             "acid": "ACID: camera texts, and frames or videos",
             "colmap": "your own captures: COLMAP models with their images",
             "nerfstudio": "your own captures: folders with a transforms.json"}
    for name, text in helps.items():
        own = name in ("colmap", "nerfstudio")
        sub = commands.add_parser(name, formatter_class=help_format, help=text)
        add = sub.add_argument
        if name == "co3d":
            add("folder", help="holds CATEGORY/frame_annotations.jgz")
            add("--categories", nargs="+", default=[], metavar="NAME", help="only these")
            add("--quality", type=float, default=0.5, help="least viewpoint_quality_score")
        elif own:
            add("folders", nargs="+", metavar="folder", help="one a scene, whose name it has")
        if name == "colmap":
            add("--images", default="images", help="name of the folder of images in each")
        if name in ("re10k", "acid"):
            add("--cameras", required=True, help="folder of CLIP.txt")
            group = sub.add_mutually_exclusive_group(required=True)
            group.add_argument("--frames", default="", help="folder of CLIP/TIMESTAMP.png or .jpg")
            group.add_argument("--videos", default="", help="folder of VIDEO.mp4, .webm, ...")
            add("--colmap", default="", help="folder of COLMAP models CLIP/, for depth")
        else:
            add("--no-depth", dest="depth", action="store_false", help="leave depth out",
                default=argparse.SUPPRESS)
            sub.set_defaults(depth=True)
        add("--out", default=f"data/{name}", help="folder of the shards")
        add("--size", type=int, default=256, help="pixels a side")
        add("--views", type=int, default=0, help="of a scene at most, evenly chosen; 0: all")
        add("--scenes", type=int, default=0, help="training scenes at most; 0: all")
        add("--held-out", type=int, default=-1,
            help="scenes kept from training; -1: 5%% of them, at most 100, none of a single one")
        add("--seed", type=int, default=0, help="decides which scenes are held out or chosen")
        add("--image-format", choices=IMAGE_FORMATS, default="png", help="of the colour images")
        add("--shard-size", type=float, default=1.0, help="of a shard, about, in GB")
        add("--workers", type=int, default=0, help="processes; 0: one a core")
        add("--dry-run", action="store_true", help="say what would be made, and stop")
        add("--overwrite", action="store_true", help="replace shards made with other arguments")
        sub.set_defaults(run=run_captures)


def main(argv=None):
    """Runs a sub-command; bad input ends with one line and exit code 2, an interrupt with 130."""
    args = parser().parse_args(argv)
    if args.command in ("re10k", "acid"):
        args.depth = bool(args.colmap)
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
