"""The scenes of a source: images, depths and cameras of raw shards, latents of encoded ones.

Letters: `n` views of a scene, `s` side of the square images in pixels, `c h w` of a latent.
"""

import hashlib
import io
import json
import math
import os
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

import camera
from runtime.command import progress
from shards.files import PATIENCE, Damaged, LocalFile, TarError, Window, cache_folder
from shards.index import (DEPTH, ENCODED_MEMBER, IMAGE, MEMBER, EncodedIndex, RawIndex,
                          encoded_scene, whole_matrices)
from shards.streams import expand, fetch, find_shards, is_stream
from shards.tar import tar_members

FORMATS = "co3d", "re10k", "acid", "encoded"
IMAGE_FORMATS = "PNG", "JPEG", "WEBP"
MAX_SIDE = 1 << 14                  # pixels of an image's long side
LATENT_SHRINK = 8                   # pixels a side of an image to one of its latent
WRONG_SIZE = "wrong image size"
INDEX_THREADS = 8
NEARPLANE_VIEW, NEARPLANE_SCENE = 0.05, 0.10    # quantiles over a view's depths, over the views
COPIES_KEPT = 2                     # copies of streams on disk, in windows


@dataclass
class Scene:
    """A scene's cameras. Stored depths are to be multiplied by depth_scale."""
    name: str
    c2w: torch.Tensor           # float64 (n, 4, 4), OpenGL
    fov: float                  # radians
    depth_scale: float
    radius: float               # mean distance of the cameras to their mean


# ---- images

def images(pixels):
    """uint8 -> float32 in [-1, 1], any shape and device: exactly float64(byte) / 255 * 2 - 1."""
    return BYTE_TO_UNIT.to(pixels.device)[pixels.int()]


BYTE_TO_UNIT = torch.from_numpy((np.arange(256) / 255 * 2 - 1).astype(np.float32))


def decode(data, side, formats, where):
    """The Pillow image in `data`, whose short side must be `side`. Raises Damaged."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if min(image.size) == side and max(image.size) <= MAX_SIDE:
            image.load()
            return image
    except Exception as err:    # on damaged bytes Pillow raises anything, SyntaxError included
        detail = f"{type(err).__name__}: {err}".split(" <_io")[0]
        raise Damaged(where, "image cannot be decoded", detail) from err
    raise Damaged(where, WRONG_SIZE, "{}x{}, the short side must be {}".format(*image.size, side))


def centre(pixels, side):
    """The central (side, side) of (h, w, ...): (extent - side) // 2 is cut off first."""
    top, left = ((extent - side) // 2 for extent in pixels.shape[:2])
    return pixels[top:top + side, left:left + side]


def decode_image(data, side, where="image"):
    """PNG, JPEG or WebP bytes -> uint8 array (s, s, 3), alpha laid over white. Raises Damaged."""
    image = decode(data, side, IMAGE_FORMATS, where)
    # departs: images with alpha are laid over white, and grey ones are read; the reference keeps
    # the alpha channel and cannot read grey [test_other_kinds_of_image_become_rgb]
    if image.mode.startswith("I"):      # 16-bit grey
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return centre(np.asarray(over_white(image)), side)


def over_white(image):
    """The RGB version of a Pillow image of 8 bits, transparency laid over white."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_depth(data, side, scale, where="depth"):
    """16-bit PNG of float16 bits -> float32 array (s, s), times `scale`, 0 unknown. Damaged."""
    image = decode(data, side, ("PNG",), where)
    if not image.mode.startswith("I"):
        raise Damaged(where, "depth is not a 16-bit grey PNG", f"mode {image.mode}")
    bits = centre(np.asarray(image), side).astype(np.uint16)
    depth = bits.view(np.float16).astype(np.float32) * np.float32(scale)
    # departs: depth that is infinite, not a number or negative is unknown; in the reference
    # infinite depth passes [test_depths_that_are_not_finite_or_negative_are_unknown]
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


# ---- the scenes of a source

def open_source(source, folder, image_size, held_out=False, patience=PATIENCE):
    """The scenes of a configs.Source: RawScenes, EncodedScenes or, of commands, StreamedScenes.

    patience: seconds without an answer after which web shards stop the run. Raises
    FileNotFoundError, and ValueError when no scene is usable.
    """
    pattern, format = source.shards, source.format
    if held_out:
        pattern, format = source.held_out, source.held_out_format or source.format
    if not pattern:
        raise ValueError(f"source {source.name!r} has no {'held_out' if held_out else 'shards'}")
    if is_stream(pattern) and held_out:
        raise ValueError(f"source {source.name!r}: held_out {pattern!r} is a command, which has no "
                         "fixed pass: scores need shards in files or on the web")
    if is_stream(pattern):
        return StreamedScenes(source, pattern, image_size)
    return of_files(source.name, format, find_shards(folder, pattern, patience), image_size)


def of_files(name, format, files, image_size, keep=True):
    """RawScenes or EncodedScenes, by format, of LocalFiles and WebFiles; keep: their indexes."""
    kind = EncodedScenes if format == "encoded" else RawScenes
    return kind(name, format, files, image_size, keep)


def detect(file):
    """(format, image size) of a shard, by its first members that can be read. Raises ValueError."""
    window, side, format, damage = Window(file), None, None, ""
    try:
        for name, offset, size in tar_members(window):
            match = MEMBER.fullmatch(name)
            try:
                if ENCODED_MEMBER.fullmatch(name):
                    latent = encoded_scene(window, offset, size)["latent"]
                    return "encoded", latent[1] * LATENT_SHRINK
                if match and match[3] == "_metadata.json" and not format:
                    fields = json.loads(window.read(offset, size))
                    format = "re10k" if "extrinsics" in fields else "co3d"
                elif match and match[3] != "_depth.png" and not side:
                    side = min(Image.open(io.BytesIO(window.read(offset, size))).size)
            except Exception as err:    # on damaged bytes Pillow raises anything
                damage = damage or f"; {name}: {str(err) or type(err).__name__}"
            if side and format:
                return format, side
    except TarError as err:
        raise ValueError(str(err)) from err
    raise ValueError(f"{file.name}: no scene in it that data.py reads{damage}")


def groups(patterns, format, side, unread=None):
    """{(format, image size): files} of the shards that the patterns name. What is none is a
    ValueError, or with a list `unread` a line of it."""
    found = {}
    for file in (file for pattern in patterns for file in find_shards("", pattern)):
        try:
            kind = (format, side) if format and side else detect(file)
        except ValueError as err:
            if unread is None:
                raise
            unread.append(str(err))
            continue
        found.setdefault((format or kind[0], side or kind[1]), []).append(file)
    return found


class Scenes:
    """The scenes of one source, numbered through all its shards.

    report    Counter of what was left out, by reason; `problems` has a line for each
    counts    int64 (scenes): their views
    """

    def __init__(self, name, format, files, image_size, keep=True):
        self.name, self.image_size = name, image_size
        # every rank begins elsewhere, and finds what the others have indexed when it comes there
        first = len(files) * int(os.environ.get("RANK", 0)) // int(os.environ.get("WORLD_SIZE", 1))
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            shards = pool.map(lambda file: self.index(file, format, keep),
                              [*files[first:], *files[:first]])
            shards = list(progress(shards, f"index {name}", "shards", len(files)))
        self.shards = shards[len(files) - first:] + shards[:len(files) - first]
        self.report, self.problems = Counter(), []
        for where, reason, count in (line for shard in self.shards for line in shard.problems):
            self.report[reason] += count
            self.problems.append(f"{where}: {reason}" + (f" ({count} times)" if count > 1 else ""))
        self.starts = np.cumsum([0, *(len(shard.scenes) for shard in self.shards)]).tolist()
        self.counts = np.concatenate([shard.views for shard in self.shards])
        self.ends = self.counts.cumsum()
        if not len(self):
            raise ValueError(f"source {name!r}: no usable scene in {len(files)} shards: "
                             f"{examples(self.problems) or 'they are empty'}")

    def __len__(self):
        return self.starts[-1]

    def summary(self):
        """One line: what there is and what was left out."""
        left_out = ", ".join(f"{reason} ({count})" for reason, count in sorted(self.report.items()))
        return (f"{self.name}: {len(self.shards)} shards, {len(self)} scenes, {self.counts.sum()} "
                "views" + (f"; left out: {left_out}" if left_out else ""))

    def draw(self, words, k, share, seed):
        """(scene, cond view, target view) from random 64-bit words; k, share, seed: unused here."""
        # a view, uniform to 2^-64 of their number; its scene: n views make as many more pairs
        scene = int(self.ends.searchsorted(words[1] * int(self.ends[-1]) >> 64, "right"))
        n = int(self.counts[scene])
        return scene, *distinct(words[2] * n * (n - 1) >> 64, n)

    def locate(self, scene):
        """(shard, number of the scene in it, row of its first view)."""
        i = bisect_right(self.starts, scene) - 1
        inside = scene - self.starts[i]
        return self.shards[i], inside, int(self.shards[i].starts[inside])

    def pair(self, mode, scene, cond, target):
        """{name: array or number} of two views of a scene; see data.Pairs. Cameras are (3, 4),
        images (s, s, 3). Raises Damaged."""
        shard, inside, start = self.locate(scene)
        return {"cond_c2w": shard.c2w[start + cond], "target_c2w": shard.c2w[start + target],
                "radius": shard.radius[inside],
                # views in the order of their frames
                "uid": f"{shard.name}:{shard.scenes[inside]}:{cond}->{target}"}


class RawScenes(Scenes):
    """Scenes of images. `has_depth`: whether every view has a depth image."""
    kind, index = "images", RawIndex

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.has_depth = all((shard.blocks[:, DEPTH] > 0).all() for shard in self.shards)
        self.nearplanes = {}
        try:
            self.pixels(0, 0)
        except Damaged as err:
            if err.reason == WRONG_SIZE:        # so are the others: another source is meant
                raise ValueError(f"source {self.name!r}: {err}") from err

    def scene(self, scene):
        """The Scene of a number."""
        shard, inside, start = self.locate(scene)
        c2w = whole_matrices(shard.c2w[start:start + int(self.counts[scene])])
        return Scene(shard.scenes[inside], torch.from_numpy(c2w), float(shard.fov[inside]),
                     float(shard.depth_scale[inside]), float(shard.radius[inside]))

    def pixels(self, scene, view):
        """uint8 array (s, s, 3): the image of a view. Raises Damaged."""
        shard, _, start = self.locate(scene)
        data, where = shard.member(start + view, IMAGE)
        return decode_image(data, self.image_size, where)

    def image(self, scene, view):
        """The same as a uint8 tensor (3, s, s)."""
        return torch.from_numpy(self.pixels(scene, view).transpose(2, 0, 1).copy())

    def depth(self, scene, view):
        """float32 array (s, s): the depth of a view in the scene's unit, 0 unknown. Damaged."""
        shard, inside, start = self.locate(scene)
        if not shard.blocks[start + view, DEPTH]:
            return np.zeros((self.image_size, self.image_size), np.float32)
        data, where = shard.member(start + view, DEPTH)
        return decode_depth(data, self.image_size, shard.depth_scale[inside], where)

    def nearplane(self, scene):
        """The `nearplane_quantile` of a scene, which is kept. Raises Damaged."""
        if scene not in self.nearplanes:
            self.nearplanes[scene] = nearplane_quantile(
                self.depth(scene, view) for view in range(self.counts[scene]))
        return self.nearplanes[scene]

    def pair(self, mode, scene, cond, target):
        """The same with images, and what the mode needs of depths."""
        shard, inside, _ = self.locate(scene)
        needs = camera.MODES[mode]
        pair = {"image_cond": self.pixels(scene, cond), "image_target": self.pixels(scene, target),
                **super().pair(mode, scene, cond, target), "fov": shard.fov[inside],
                "nearplane": self.nearplane(scene) if needs.unit == "nearplane" else math.nan}
        return {**pair, "depth_cond": self.depth(scene, cond)} if needs.needs_depth else pair


def nearplane_quantile(depths):
    """The 10% quantile over views of the 5% quantile of their depths (s, s), or nan."""
    near = [np.quantile(d[d > 0], NEARPLANE_VIEW) for d in depths if d.any()]
    return float(np.quantile(near, NEARPLANE_SCENE)) if near else math.nan


class EncodedScenes(Scenes):
    """Scenes of latents and embeddings."""
    kind, index = "encoded views", EncodedIndex

    def __init__(self, *arguments):
        super().__init__(*arguments)
        kinds = np.unique(np.concatenate([shard.latent for shard in self.shards]), axis=0).tolist()
        side = min(kinds[0][1:3]) * LATENT_SHRINK
        if len(kinds) > 1 or side != self.image_size:
            raise ValueError(
                f"source {self.name!r}: its shards were encoded in sizes (2c, h, w, d) "
                f"{examples([str(tuple(kind)) for kind in kinds])}, of images of {side} pixels; "
                f"one size is needed, and image_size is {self.image_size}")
        self.latent = kinds[0]

    def check_blend(self, quantile_blend):
        """Raises ValueError where the shards' scales were made with the other quantile_blend than
        the run's. Shards that do not say how they were made pass."""
        for shard in self.shards:
            if (shard.blend == (not quantile_blend)).any():
                raise ValueError(
                    f"source {self.name!r}: {shard.name} was encoded "
                    f"{'without' if quantile_blend else 'with'} quantile_blend, which decided the "
                    f"scales in it: train with --quantile_blend={str(not quantile_blend).lower()}, "
                    "or encode it again")

    def pair(self, mode, scene, cond, target):
        """The same with the target's moments, the cond view's mean, embedding and scale."""
        shard, inside, start = self.locate(scene)
        pair = super().pair(mode, scene, cond, target)
        c2, h, w, d = self.latent
        moments, clip = int(shard.moments_at[inside]), int(shard.clip_at[inside])
        step = 2 * c2 * h * w               # bytes of a view's moments: its mean lies first
        for name, at, shape in (("moments_target", moments + target * step, (c2, h, w)),
                                ("mean_cond", moments + cond * step, (c2 // 2, h, w)),
                                ("clip_cond", clip + cond * 2 * d, (d,))):
            data = shard.read(at, 2 * math.prod(shape), pair["uid"])
            pair[name] = np.frombuffer(data, np.float16).reshape(shape)
        pair["fov"], pair["nearplane"] = shard.fov[start + cond], shard.nearplane[inside]
        if camera.MODES[mode].unit == "viewer":
            pair["scale"] = shard.scale[start + cond]
            if not pair["scale"] > 0:
                raise Damaged(pair["uid"], "the scale of the conditioning view is not known")
        return pair


class StreamedScenes:
    """Scenes of shards that commands print, of which a few are open at a time.

    The shards are visited in rounds, each in its own order. Pair k draws from the `window` visits
    open at k, and each gives about `pairs_per_shard` pairs: a pair is a function of (seed, k) too,
    and a run that goes on copies the shards of its window and no others.
    """

    def __init__(self, source, pattern, image_size):
        self.name, self.format, self.image_size = source.name, source.format, image_size
        self.commands = [name.removeprefix("pipe:").strip() for name in expand(pattern)]
        self.window = min(source.window, len(self.commands))
        self.pairs_per_shard = source.pairs_per_shard
        digest = hashlib.sha256(f"{self.format} {pattern}".encode()).hexdigest()[:16]
        self.folder = cache_folder() / "streams" / digest
        self.opened, self.rounds, self.ahead = OrderedDict(), {}, None
        self.report, self.problems = Counter(), []
        try:
            self.example = self.shard(0)
        except Damaged as err:
            raise ValueError(f"source {self.name!r}: {err}") from err
        self.kind = self.example.kind

    def __getstate__(self):
        return {**self.__dict__, "opened": OrderedDict()}

    def summary(self):
        return f"{self.name}: {len(self.commands)} streams, {self.window} open at a time"

    def order(self, visit, seed):
        """The number of the shard of a visit."""
        turn, place = divmod(visit, len(self.commands))
        if turn not in self.rounds:
            self.rounds[turn] = sorted(
                range(len(self.commands)),
                key=lambda i: hashlib.blake2b(f"{seed} {turn} {i}".encode()).digest())
        return self.rounds[turn][place]

    def draw(self, words, k, share, seed):
        """(shard, the shard that opens next, two words) for pair k of a run in which `share` of the
        pairs are this source's."""
        visit = int(k * share / self.pairs_per_shard)
        return (self.order(visit + (words[3] * self.window >> 64), seed),
                self.order(visit + self.window, seed), *words[1:3])

    def fetch(self, number):
        """The path of the copy of a shard. Raises OSError, ValueError."""
        return fetch(self.commands[number], self.folder, COPIES_KEPT * self.window + 1)

    def shard(self, number):
        """The scenes of one shard, copied and indexed at need. Raises Damaged."""
        scenes = self.opened.pop(number, None)
        if scenes is None or not os.path.exists(scenes.shards[0].file.path):    # deleted by another
            try:
                file = LocalFile(self.fetch(number))
                scenes = of_files(self.name, self.format, [file], self.image_size)
            except (OSError, ValueError) as err:
                raise Damaged(f"`{self.commands[number]}`", "the stream cannot be read",
                              str(err)) from err
        self.opened[number] = scenes            # the newest last
        if len(self.opened) > COPIES_KEPT * self.window:
            self.opened.popitem(last=False)
        return scenes

    def prefetch(self, number):
        """Copies a shard; what fails is reported when it is its turn."""
        with suppress(OSError, ValueError):
            self.fetch(number)

    def pair(self, mode, number, ahead, *words):
        """As Scenes.pair, of what `draw` gave; copies the shard that opens next meanwhile."""
        if ahead != self.ahead:
            self.ahead = ahead
            threading.Thread(target=self.prefetch, args=(ahead,), daemon=True).start()
        scenes = self.shard(number)
        return scenes.pair(mode, *scenes.draw((0, *words), 0, 1.0, 0))


def distinct(number, n):
    """0..n(n-1)-1 -> an ordered pair of different views of n."""
    cond, target = divmod(number, n - 1)
    return cond, target + (target >= cond)


def examples(lines, shown=5):
    """The first of many lines, joined."""
    more = f"; and {len(lines) - shown} more" if len(lines) > shown else ""
    return "; ".join(lines[:shown]) + more
