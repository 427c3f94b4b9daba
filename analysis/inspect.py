"""What is in shards: a summary and a picture to look at, or a check of every byte.

`python data.py inspect SHARDS...` and `python data.py verify SHARDS...`.
"""

import math
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import camera
from analysis import metrics, shards_parser
from captures.datasets import IMAGE_SUFFIXES
from runtime.command import progress
from shards.files import Damaged
from shards.scenes import groups, images, of_files
from views import paths, pictures

VIEWS_SHOWN, SCENES_SHOWN, VIEWS_SAMPLED = 4, 3, 24
PROBLEMS_SHOWN = 10
MAP_SIDE = 160                  # pixels of a map of the cameras
CHECKED_SCENES = 8              # of a shard, whose cameras are checked
FOLLOWED_PAIRS, MATCHED_PAIRS = (8, 4), (5, 8)  # part of a scene that pairs are apart, their number
QUICK_SIDE = 32                 # pixels of the pictures that a run looks at at its start
FOLLOWED = 0.75                 # share of pairs that must agree with their cameras
DEPTHS_AGREE = 0.5              # share of the surfaces that both see
BETTER = 0.01                   # correlation by which another convention is the cameras' own
AS_THEY_ARE = "as they are"     # of metrics.conventions


# ---- inspect

def quantiles(values, form):
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:{form}} .. {middle:{form}} .. {high:{form}}"


def describe(source, format, side):
    """Lines about the scenes of one format."""
    shards = source.shards
    fov = np.degrees(np.concatenate([shard.fov for shard in shards]))
    radius = np.concatenate([shard.radius for shard in shards])
    lines = [source.summary(),
             f"  format {format}, images of {side} pixels, "
             f"{sum(shard.file.size for shard in shards) / 1e9:.3f} GB",
             f"  views a scene      {quantiles(source.counts, '.0f')}   (least, median, most)",
             f"  field of view      {quantiles(fov, '.1f')} degrees",
             f"  radius of cameras  {quantiles(radius, '.3g')}, in the scene's unit"]
    if format == "encoded":
        scale = np.concatenate([shard.scale for shard in shards])
        known = scale[np.isfinite(scale)]
        lines.append(f"  scale of views     {quantiles(known, '.3g') if len(known) else 'none'}, "
                     f"not known of {1 - len(known) / len(scale):.1%}")
    else:
        lines.append(depth_line(source))
    more = len(source.problems) - PROBLEMS_SHOWN
    return (lines + [f"  ! {line}" for line in source.problems[:PROBLEMS_SHOWN]]
            + [f"  ! and {more} more"] * (more > 0))


def depth_line(source):
    """One line about the depths of a few views."""
    share, near = [], []
    for scene in pictures.evenly_spaced(range(len(source)), VIEWS_SAMPLED):
        try:
            depth = source.depth(scene, int(source.counts[scene]) // 2)
        except Damaged as err:
            return f"  ! {err}"
        share.append(100 * (depth > 0).mean())
        if depth.any():
            near.append(np.quantile(depth[depth > 0], camera.QUANTILE))
    if not near:
        return "  depth              none"
    return (f"  depth              known of {quantiles(share, '.0f')} % of a view, "
            f"20% quantile {quantiles(near, '.3g')}")


def strips_of(source):
    """Pictures of a few scenes: views and a depth of each, and a map of its cameras."""
    strips = []
    for scene in pictures.evenly_spaced(range(len(source)), SCENES_SHOWN):
        known = source.scene(scene)
        row = []
        views = pictures.evenly_spaced(range(len(known.c2w)), VIEWS_SHOWN)
        try:
            for view in views:
                row.append((f"view {view}", pictures.image(images(source.image(scene, view)))))
            row.append((f"depth of {views[0]}", depth_picture(source.depth(scene, views[0]))))
        except Damaged as err:
            row.append((str(err)[-40:], Image.new("RGB", (source.image_size,) * 2)))
        # the map in units of the cameras' radius; its red camera is the first view's
        c2w = known.c2w.clone()
        c2w[:, :3, 3] /= max(known.radius, 1e-9)
        every = paths.Cameras(c2w[0], c2w, torch.full((len(c2w),), known.fov), known.fov)
        title = f"{known.name}: {len(c2w)} views, {math.degrees(known.fov):.1f} degrees"
        strips += [pictures.sheet([row], title), pictures.path_picture(every, MAP_SIDE)]
    return strips


def depth_picture(depth):
    """Near is bright, far is dark, unknown is red."""
    known = depth > 0
    near, far = np.quantile(1 / depth[known], [0.98, 0.02]) if known.any() else (1, 0)
    grey = np.clip((1 / np.where(known, depth, np.inf) - far) / max(near - far, 1e-9), 0, 1) * 255
    rgb = np.where(known[..., None], grey[..., None], (160, 0, 0))
    return Image.fromarray(rgb.astype(np.uint8))


def inspect(args):
    if Path(args.out).suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"--out {args.out}: the picture's name must end in "
                         f"{', '.join(IMAGE_SUFFIXES)}")
    strips = []
    for (format, side), files in groups(args.shards, args.format, args.size).items():
        source = of_files(f"{files[0].name} ..." if files[1:] else files[0].name, format, files,
                          side)
        print("\n".join(describe(source, format, side)))
        if format != "encoded":
            strips += strips_of(source)
    if strips:
        pictures.stacked(strips).save(args.out)
        print(f"{args.out}: views, a depth, and the cameras from above and from the side; the "
              "wings of a camera open to where it looks")
    return 0


# ---- verify

def verify_shard(file, format, side):
    """(views, problems, figures of `followed`, figures of `matched`) of one shard."""
    torch.set_num_threads(1)
    try:
        source = of_files(file.name, format, [file], side, keep=False)
    except ValueError as err:
        return 0, [str(err)], [], []
    read = encoded_problems if format == "encoded" else raw_problems
    problems = list(source.problems)
    for scene, count in enumerate(source.counts):
        for view in range(int(count)):
            problems += read(source, scene, view)
    figures, matches = [], []
    if format != "encoded":
        for scene in pictures.evenly_spaced(range(len(source)), CHECKED_SCENES):
            found = followed(source, scene)
            figures += found
            matches += [] if found else matched(source, scene)
    return int(source.counts.sum()), problems, figures, matches


def contradictions(source):
    """Lines on how the first scene of a raw source, looked at in small, contradicts its cameras."""
    figures = followed(source, 0, max(1, source.image_size // QUICK_SIDE))
    lines = say_cameras(source.name, figures, [] if figures else matched(source, 0))
    return [line for line in lines if line.startswith("!")]


def raw_problems(source, scene, view):
    """What is wrong with the image and the depth of a view, as lines."""
    problems = []
    for read in (source.pixels, source.depth):
        try:
            read(scene, view)
        except Damaged as err:
            problems.append(str(err))
    return problems


def encoded_problems(source, scene, view):
    """What is not a finite number among the latents and embeddings of a view, as lines."""
    try:
        pair = source.pair("7dof", scene, view, view)
    except Damaged as err:
        return [str(err)]
    return [f"{pair['uid'].rpartition('->')[0]}: {name} is not finite"
            for name in ("moments_target", "clip_cond") if not np.isfinite(pair[name]).all()]


def pairs_of(source, scene, share, count, step=1):
    """Yields (cond, target, images (3, s, s), depths (s, s)) of a few pairs of views of a scene, of
    every `step`-th pixel each way; what is damaged is reported by others."""
    n = int(source.counts[scene])
    stride = max(1, n // share)
    for cond in pictures.evenly_spaced(range(n - stride), count):
        pair = cond, cond + stride
        try:
            yield (*pair, [images(source.image(scene, v)[:, ::step, ::step]) for v in pair],
                   [torch.from_numpy(source.depth(scene, v)[::step, ::step]) for v in pair])
        except Damaged:
            continue


def followed(source, scene, step=1):
    """(does the picture agree, do the depths agree), 1 or 0 each, for pairs of a scene.

    The picture agrees when the target is nearer to the cond view as its own camera sees it than as
    other cameras do; the depths when most surfaces lie where the target's depth has them. Pairs
    that see too little of each other are left out.
    """
    known, figures = source.scene(scene), []
    fov = torch.tensor([known.fov], dtype=torch.float64)
    for cond, target, views, depths in pairs_of(source, scene, *FOLLOWED_PAIRS, step):
        image_cond, image, depth_cond, depth = (x[None] for x in (*views, *depths))
        pose = camera.relative_pose(known.c2w[cond], known.c2w[target])[None]
        # without the target's depth: it would leave out all that disagrees
        unknown = torch.zeros_like(depth)
        judged = metrics.Followed(image_cond, depth_cond, unknown, pose, fov)(image)
        picture = judged["camera_found"].item()
        seen = metrics.warp(image_cond, depth_cond, pose, fov, unknown)[1] & (depth > 0)
        agree = metrics.warp(image_cond, depth_cond, pose, fov, depth)[1] & seen
        if not math.isnan(picture):
            figures.append((picture, float(agree.sum() > DEPTHS_AGREE * seen.sum())))
    return figures


def matched(source, scene):
    """[{convention: correlation}] of a scene without dense depth, by its sparse depth or along
    epipolar lines: how well patches of a view are found in another one if the cameras followed
    that convention. Empty where no pair of pictures tells."""
    known, totals = source.scene(scene), {}
    for cond, target, views, depths in pairs_of(source, scene, *MATCHED_PAIRS):
        for name, c2w in metrics.conventions(known.c2w).items():
            pose = camera.relative_pose(c2w[cond], c2w[target])
            if pose[:3, 3].norm() > 0:
                value = metrics.match(*views, pose, float(known.fov), depths[0])
                if not math.isnan(value):
                    totals.setdefault(name, []).append(value)
    return [{name: sum(values) / len(values) for name, values in totals.items()}] if totals else []


def say_cameras(what, figures, matches):
    """Lines on what `followed` and `matched` found; with "!" what contradicts cameras."""
    lines = []
    if matches:
        names = dict.fromkeys(name for found in matches for name in found)
        means = {name: sum(found.get(name, 0) for found in matches) / len(matches)
                 for name in names}
        best, own = max(means, key=means.get), means.get(AS_THEY_ARE, 0)
        wrong = means[best] > own + BETTER
        lines.append(
            f"{'! ' * wrong}{what}: patches of {len(matches)} scenes are found where the cameras "
            f"say with a correlation of {own:.2f}" + wrong * f", but with {means[best]:.2f} if the "
            f"cameras were {best}: they follow another convention")
    for name, agree in zip(("picture", "depth"), zip(*figures)):
        bad = sum(agree) < FOLLOWED * len(agree)
        lines.append(f"{'! ' * bad}{what}: {name}s agree with the cameras in {sum(agree):.0f} of "
                     f"{len(agree)} pairs" + bad * "; cameras, depth or field of view follow "
                     "another convention, or another unit of length")
    return lines


def verify(args):
    """Exit status: 1 where anything is wrong."""
    unread = []
    found = groups(args.shards, args.format, args.size, unread)
    total, wrong = Counter(shards=len(unread), problems=len(unread)), False
    for problem in unread:
        print(f"! {problem}")
    for (format, side), files in found.items():
        figures, matches = [], []
        with ProcessPoolExecutor(min(args.workers, len(files))) as pool:
            results = pool.map(partial(verify_shard, format=format, side=side), files)
            for file, (views, problems, judged, compared) in zip(files, progress(
                    results, "verify", "shards", len(files))):
                blind = not judged and not compared
                total += Counter(views=views, problems=len(problems), shards=1, blind=int(blind))
                figures += judged
                matches += compared
                for line in [f"! {problem}" for problem in problems] + blind * [
                        f"{file.name}: cameras NOT checked: no two of its pictures tell"]:
                    print(line)
        for line in say_cameras(format, figures, matches):
            wrong |= line.startswith("!")
            print(line)
    print(f"{total['shards']} shards, {total['views']} views, {total['problems']} problems"
          + (f", cameras of {total['blind']} NOT checked" if total["blind"] else ""))
    return int(wrong or total["problems"] > 0)


def main(argv):
    """The exit status of `inspect` or `verify`."""
    args = shards_parser().parse_args(argv)
    return {"inspect": inspect, "verify": verify}[args.command](args)
