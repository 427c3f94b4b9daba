"""Makes shards of captures, in several processes; a run goes on where it stopped.

A shard is written when its note, a .json beside it, is: with how much is in it and what was left
out of it, by cause. A shard of which nothing is left has a note alone. Letters: `v` views.
"""

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from captures import datasets, own, photos, resample
from captures.writer import raw_scene, write_shard
from runtime.command import progress
from runtime.files import remove, write_text
from views.pictures import evenly_spaced

VERSION = 1                     # goes up when shards of old and new code do not go together
FEWEST_VIEWS = 2                # of a scene: a pair
# bytes of a photo's pixel, and of a dense depth map's, as measured: what shards are planned by
BYTES_A_PIXEL, DEPTH_BYTES_A_PIXEL = {"png": 2.0, "jpg": 0.5, "webp": 0.33}, 0.8
SPLITS = ("train", "held-out")
ARGUMENTS = ("command", "size", "views", "depth", "image_format", "seed", "scenes", "held_out",
             "shard_size")      # that decide what is in the shards
WHERE = "folder", "folders", "cameras", "frames", "videos", "colmap"        # captures lie
SHARE_HELD_OUT, MOST_HELD_OUT = 0.05, 100       # scenes of captures, unless told
# of fewer scenes a view in so many of each is held out; more of few, so that their mean says much
FEW_SCENES, SHARE_OF_VIEWS, SURE_VIEWS = 10, 10, 4
MOST_ON_GPU = 6                 # processes that share a GPU, unless told: each takes 2 GB of it


# ---- which scenes, in which shards

def find(args):
    """(Captures, Counter of those passed over) of the arguments. Raises ValueError, OSError."""
    if args.command == "co3d":
        return datasets.find_co3d(args.folder, args.categories, args.quality, args.depth)
    if args.command == "colmap":
        return own.find_colmap(args.folders, args.images, args.depth)
    if args.command == "nerfstudio":
        return own.find_nerfstudio(args.folders, args.depth)
    if args.command == "photos":
        return photos.find(args.folders, args.out, args.depth, args.video_frames,
                           args.dry_run)
    return datasets.find_re10k(args.command, args.cameras, args.frames, args.videos, args.colmap)


def split_captures(found, args):
    """{split: Captures by name}. Which are held out, and which a smaller number of scenes leaves,
    follows from the seed and the names; where there are few, each is in both, with its own views.
    Raises ValueError."""
    names = Counter(capture.name for capture in found)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"two scenes are called {twice[0]}: rename the folder of one")
    held_out = args.held_out
    by_views = held_out < 0 and len(found) < FEW_SCENES
    if held_out < 0:
        held_out = 0 if by_views else min(MOST_HELD_OUT, math.ceil(SHARE_HELD_OUT * len(found)))
    if len(found) <= held_out:
        raise ValueError(f"{len(found)} scenes found, of which --held-out {held_out} leaves none "
                         "for training")
    order = sorted(found, key=lambda each: hashlib.sha256(f"{args.seed} {each.name}".encode())
                   .digest())
    train = order[held_out:][:args.scenes or None]
    by_name = functools.partial(sorted, key=lambda capture: capture.name)
    if by_views:
        return {split: [
            replace(each, count=len(mine), read=functools.partial(read_part, each.read, split))
            for each in by_name(train) if (mine := places(each.count, split))]
            for split in SPLITS}
    return dict(zip(SPLITS, (by_name(train), by_name(order[:held_out]))))


def read_part(read, split):
    """(Views of one split, LeftOuts, which count once) of a Capture's `read`."""
    views, out = read()
    return [views[i] for i in places(len(views), split)], out * (split == "train")


def places(count, split):
    """The places of a split's views among all of a scene; held out are some evenly apart."""
    held_out = max(count // SHARE_OF_VIEWS, min(count // 4, SURE_VIEWS))
    held_out *= held_out >= FEWEST_VIEWS
    apart = {(2 * i + 1) * count // (2 * held_out) for i in range(held_out)}
    return [i for i in range(count) if (i in apart) == (split == "held-out")]


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


# ---- a scene

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
    for view, picture in resample.pictures(
            evenly_spaced(views, args.views or len(views))):
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


def capture_scenes(args, path, found):
    """Yields the members of a shard's scenes in order; then notes beside it what was left out."""
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
    write_text(path.with_suffix(".json"), json.dumps({
        "scenes": scenes, "views": views,
        "left_out": [[err.reason, err.where, err.detail] for err in out]}, indent=1) + "\n")


# ---- a run

def run_captures(args):
    """Makes shards of captures, skipping those that are there. Raises ValueError, OSError."""
    if args.views == 1:
        raise ValueError("--views 1: a pair needs two; 0 takes all")
    found, passed_over = find(args)
    for reason, count in sorted(passed_over.items()):
        print(f"passed over: {count} {reason}")
    splits = split_captures(found, args)
    plan, a_view = plan_captures(splits, args)
    if args.dry_run:
        for split in splits:
            shards = [shard for path, shard in plan if path.name.startswith(split)]
            views = sum(count_views(capture, args) for shard in shards for capture in shard)
            print(f"{Path(args.out) / split}-*.tar: {len(shards)} shards, {sum(map(len, shards))} "
                  f"scenes, {views} views, about {views * a_view / 1e9:.3g} GB")
        return
    listed = "\n".join(f"{path.name} {each.name} {each.count}" for path, shard in plan
                       for each in shard)
    arguments = {"version": VERSION} | {name: getattr(args, name) for name in ARGUMENTS}
    if args.held_out < 0 and len(found) < FEW_SCENES:
        arguments["held_out"] = "views"
    arguments["found"] = (f"{len(found)} scenes (list "
                          f"{hashlib.sha256(os.fsencode(listed)).hexdigest()[:12]})")
    for name in WHERE:
        value = getattr(args, name, None)
        if value is not None:       # as they are known from everywhere
            arguments[name] = (os.path.abspath(value) if value and isinstance(value, str) else
                               value and [os.path.abspath(each) for each in value])
    arguments |= {"images": args.images} if hasattr(args, "images") else {}
    check_out(Path(args.out) / "prepare.json", arguments, list(Path(args.out).glob("*.tar*")),
              args.overwrite)
    todo = [(path, shard) for path, shard in plan if not is_made(path)]
    make_shards(todo, functools.partial(capture_scenes, args),
                workers_for(args.workers, len(todo), torch.device("cpu")), args.command)
    summarize(plan)
    if args.image_format != "png":
        print("note: ZeroNVS's original loader reads png images alone")


def read_note(path):
    """What stands beside a shard, {} where nothing does."""
    note = path.with_suffix(".json")
    return json.loads(note.read_text()) if note.is_file() else {}


def is_made(path):
    """Whether a shard is there, or the note that nothing is left of it."""
    note = read_note(path)
    return bool(note) and (path.is_file() or not note["scenes"])


def summarize(plan):
    """Prints what there is, and what was left out. Raises ValueError where nothing is left."""
    left_out, total = {}, 0
    notes = {path: read_note(path) for path, _ in plan}
    for split in SPLITS:
        mine = {path: note for path, note in notes.items() if path.name.startswith(split)}
        there = [path for path in mine if path.is_file()]
        scenes, views = (sum(note[what] for note in mine.values()) for what in ("scenes", "views"))
        size = sum(path.stat().st_size for path in there)
        print(f"{plan[0][0].parent / split}-*.tar: {len(there)} shards, {scenes} scenes, {views} "
              f"views, {size / 1e6:.1f} MB" if mine else f"{split}: no scenes")
        total += scenes
        for reason, where, detail in (line for note in mine.values() for line in note["left_out"]):
            left_out.setdefault(reason, []).append(f"{where} ({detail})" if detail else where)
    for reason, places in sorted(left_out.items()):
        print(f"left out: {len(places)} x {reason}, first {places[0]}")
    if not total:
        for path in notes:              # so that a rerun looks again
            path.with_suffix(".json").unlink()
        count, last = sum(len(shard) for _, shard in plan), list(left_out.items())[-1:]
        causes = "".join(f": {reason}, {places[-1]}" for reason, places in last)
        raise ValueError(f"none of the {count} scenes can be used{causes}")


def check_out(note, arguments, shards, overwrite):
    """Writes the arguments to the file `note`, or compares them with those in it: ValueError if
    shards were made with others.

    shards: those in the output folder, the note's. With `overwrite` they are deleted.
    """
    out = note.parent
    if note.is_file():
        try:
            found = json.loads(note.read_text())
        except ValueError as err:
            raise ValueError(f"{note} is no JSON; choose another --out") from err
        differing = [f"{name.replace('_', '-')} {found.get(name)} there, {value} now"
                     for name, value in arguments.items() if found.get(name) != value]
        if differing and shards and not overwrite:
            raise ValueError(f"{out} was made with other arguments ({'; '.join(differing)}): "
                             "choose another --out, or --overwrite")
        if overwrite or differing:
            for path in (*shards, *out.glob("train-*.json"), *out.glob("held-out-*.json")):
                path.unlink()
    elif shards:
        raise ValueError(f"{out} holds shards that this command did not make: choose another --out")
    write_text(note, json.dumps(arguments, indent=1) + "\n")


# ---- processes

def workers_for(asked, shards, device):
    """The number of processes: as asked, or what keeps the machine busy."""
    cores = os.cpu_count() or 1
    usual = cores if device.type == "cpu" else min(cores, MOST_ON_GPU)
    return min(asked or usual, max(1, shards))


def ahead(function, items, threads, count):
    """Yields function(item) of the items in order, worked out by threads up to `count` ahead."""
    pool, results = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > count:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_shard(scenes_of, path, content):
    """Makes one shard, unless it has no scene. Torch takes one core: there are other processes."""
    torch.set_num_threads(1)
    scenes = scenes_of(path, content)
    first = next(scenes, None)
    if first:
        write_shard(path, itertools.chain([first], scenes))


def make_shards(todo, scenes_of, workers, label):
    """Makes shards, a list of (path, content), in as many processes as there are workers.

    scenes_of(path, content) yields the members of each scene. Raises ValueError, OSError; then, and
    when this process ends, all of them end.
    """
    if not todo:
        print("all of them were there already")
        return
    started = time.perf_counter()
    if workers == 1:
        for path, content in progress(todo, label, "shards"):
            make_shard(scenes_of, path, content)
    else:
        make_shards_together(todo, scenes_of, workers, label)
    print(f"{len(todo)} shards made in {time.perf_counter() - started:.1f} s ({workers} processes)")


def make_shards_together(todo, scenes_of, workers, label):
    """The same in a pool. Processes, not threads: most calls into torch are so short that threads
    would queue up for them."""
    methods, others = multiprocessing.get_all_start_methods(), multiprocessing.active_children()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["captures.synth"])      # imported once for all processes
    pool = ProcessPoolExecutor(workers, context, start_process)
    try:
        made = [pool.submit(make_shard, scenes_of, *shard) for shard in todo]
        for each in progress(as_completed(made), label, "shards", len(todo)):
            each.result()
    except BaseException as err:        # the next run may write what they are writing
        for process in set(multiprocessing.active_children()) - set(others):
            process.kill()
            process.join()
        for path, _ in todo:
            remove(path.with_name(f".unfinished_{path.name}"))
        if not isinstance(err, BrokenProcessPool):
            raise
        raise OSError("one of the processes was killed, perhaps for want of memory: the same "
                      "command goes on from here, perhaps with fewer --workers") from err
    finally:
        pool.shutdown(cancel_futures=True)


def start_process():
    """In a new process of the pool: an interrupt is for the parent, which then ends all; where the
    parent is gone, it ends itself."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
