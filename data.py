"""Shards to pairs: a tar index, scenes with OpenGL cameras, pairs of views by number, a loader.

Shards are ZeroNVS's (arXiv:2310.17994): tars of `category/scene/frame000001.png`, `_depth.png`
(16-bit words that are float16 bits) and `_metadata.json`. One pass over a shard's headers finds
every member; from then on a pair reads its own members and nothing else. Which pair number k is
follows from (seed, k) alone, whatever the ranks and workers.
Letters: `n` views of a scene, `s` side of the square images in pixels.
"""

import atexit
import functools
import glob
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import struct
import uuid
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import camera

log = logging.getLogger(__name__)

BLOCK = 512                         # tar: headers and data begin at multiples of it
MAX_HEADER = 1 << 20                # bytes of a long name or a PAX header
MAX_MEMBER = 1 << 26                # bytes of an image or depth member
MAX_METADATA = 1 << 16              # bytes of a camera's JSON
MAX_SIDE = 1 << 14                  # pixels of an image's long side
INDEX_VERSION, INDEX_SUFFIX = 1, ".index.npz"
INDEX_THREADS = 8
MAX_SHARDS = 1_000_000              # that one {000..126} pattern may name
SCENES_KEPT = 256                   # scenes whose cameras a process remembers
RIGID = 1e-3                        # largest entry of R @ R.T - 1 of a rotation
SQUARE_PIXELS = 1e-4                # largest relative difference of fx and fy
NEARPLANE_VIEW, NEARPLANE_SCENE = 0.05, 0.10    # quantiles over a view's depths, over the views
MAX_DRAWS = 100                     # draws for one pair before giving up
MIN_DRAWS = 200                     # draws before the share of damaged ones counts
DEPTH_MODES = ("7dof_quantile_scale", "7dof_metric_scale")      # need the depth of the cond view
NEARPLANE_MODE = "7dof_stereomag_scale"                         # needs the depth of all views
IMAGE, DEPTH, METADATA = range(3)   # kinds of member: columns of an index
LIMITS = [[2**32 - 1, MAX_MEMBER], [2**32 - 1, MAX_MEMBER], [2**32 - 1, MAX_METADATA]]
KINDS = {"_depth.png": DEPTH, "_metadata.json": METADATA}
MEMBER = re.compile(r"(?:\./)?([^/]+/[^/]+)/frame(\d{1,9})"
                    r"(\.png|\.jpe?g|\.webp|_depth\.png|_metadata\.json)")
PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class TarError(ValueError):
    """An archive that is damaged, or none at all: file, byte offset and what is wrong there."""

    def __init__(self, path, offset, problem):
        super().__init__(path, offset, problem)
        self.path, self.offset, self.problem = path, offset, problem

    def __str__(self):
        return f"{Path(self.path).name}: {self.problem}, at byte {self.offset}"


class Damaged(ValueError):
    """A scene or member that cannot be used: where, a reason that can be counted, and details."""

    def __init__(self, where, reason, detail=""):
        super().__init__(where, reason, detail)
        self.where, self.reason, self.detail = where, reason, detail

    def __str__(self):
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


# ---- tar

def tar_members(path):
    """Yields (name, offset, size) of a tar's regular files, from one pass over its headers.

    Knows ustar, GNU long names and PAX. Raises TarError at the first damage, a missing
    end-of-archive block included: what was yielded before is whole.
    """
    total, at = os.path.getsize(path), 0
    name = size = None      # announced by an extended header for the member that follows
    with open(path, "rb", buffering=0) as file:
        while True:
            file.seek(at)
            header = file.read(BLOCK)
            try:
                if len(header) < BLOCK:
                    raise ValueError("the file is cut: no end-of-archive block" if at else "no tar")
                if header.count(0) == BLOCK:
                    if name is not None or size is not None:
                        raise ValueError("an extended header without its member")
                    return
                own_name, own_size, kind = tar_header(header)
                extended = kind in b"xXLKg"
                body = own_size if size is None or extended else size
                if kind in b"123456":       # links, devices, folders: no data, whatever they claim
                    body = 0
                if at + BLOCK + body > total:
                    raise ValueError(f"the file is cut: a member of {body} bytes is not whole")
                if extended and body > MAX_HEADER:
                    raise ValueError(f"an extended header of {body} bytes")
                if extended:                # of several the first wins, as in Python's tarfile
                    new_name, new_size = extended_header(kind, file.read(body))
                    name = new_name if name is None else name
                    size = new_size if size is None else size
                else:
                    folder = kind == b"\0" and own_name.endswith("/")
                    if kind in (b"0", b"\0", b"7") and not folder:
                        yield own_name if name is None else name, at + BLOCK, body
                    name = size = None
            except ValueError as err:
                raise TarError(path, at, str(err)) from err
            at += BLOCK + -(-body // BLOCK) * BLOCK


def tar_header(header):
    """(name, size, type) of a 512-byte header. Raises ValueError."""
    claimed, counted = tar_number(header[148:156]), header[:148] + b" " * 8 + header[156:]
    total = sum(counted)        # some old writers summed signed bytes
    if claimed != total and claimed != total - 256 * sum(byte > 127 for byte in counted):
        raise ValueError(f"bad header: checksum {claimed}, its bytes give {total}")
    name, kind = tar_text(header[:100]), header[156:157]
    if kind == b"S":
        raise ValueError("a sparse member")
    if header[257:263] == b"ustar\0" and header[345]:       # GNU archives keep times there
        name = f"{tar_text(header[345:500])}/{name}"
    return name, tar_number(header[124:136]), kind


def tar_text(field):
    """Text up to the first NUL; bytes that are not UTF-8 become surrogates."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def tar_number(field):
    """Octal digits, or base-256. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"bad header: {digits!r} is no octal number")
    return int(digits or b"0", 8)


def extended_header(kind, data):
    """(name or None, size or None) for the next member, from a PAX or GNU header. ValueError."""
    if kind in b"Kg":       # a link's target; PAX defaults for the whole archive: dates, comments
        return None, None
    if kind == b"L":
        return tar_text(data), None
    records, at = {}, 0
    while at < len(data) and data[at]:          # "length keyword=value\n"
        match = PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise ValueError("a broken PAX record")
        records[match[2]] = data[match.end():end - 1]
        at = end
    size = records.get(b"size", b"0")
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise ValueError("a sparse member")
    if not re.fullmatch(rb"\d{1,19}", size):
        raise ValueError(f"PAX size {size[:20]!r} is no number")
    name = records[b"path"].decode("utf-8", "surrogateescape") if b"path" in records else None
    return name and name.rstrip("/"), int(size) if b"size" in records else None


# ---- index

class Shard:
    """The index of one tar: its usable scenes, as stored, and where their members lie.

    scenes    names `category/scene`
    starts    int64 (scenes + 1): views of scene i are rows starts[i]:starts[i + 1] of what follows
    frames    int32 (views): frame numbers, ascending in a scene
    blocks    uint32 (views, 3): tar block of image, depth, metadata; 0 where there is no depth
    sizes     uint32 (views, 3): their bytes
    first     int32 (scenes): the view whose metadata is stored first
    problems  [where, reason, count] of all that is left out
    """

    ARRAYS = ("starts", "frames", "blocks", "sizes", "first")

    def __init__(self, path):
        self.path, self.name = str(path), Path(path).name
        stat = os.stat(path)
        self.stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
        if not any(self.load(place) for place in self.places()):
            self.build()
            self.store()

    def places(self):
        """Where the index may be kept: beside the shard, else in the user's cache folder."""
        digest = hashlib.sha256(os.fsencode(os.path.abspath(self.path))).hexdigest()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeronvs"
        return Path(self.path + INDEX_SUFFIX), cache / (digest[:32] + INDEX_SUFFIX)

    def load(self, place):
        """Takes a kept index; False when there is none, or it is old or damaged."""
        try:
            with np.load(place, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in self.ARRAYS}
                meta = json.loads(stored["meta"].tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        if meta["stamp"] == self.stamp:
            self.__dict__.update(arrays, scenes=meta["scenes"], problems=meta["problems"])
        return meta["stamp"] == self.stamp

    def store(self):
        """Keeps the index in the first place that can be written, whole or not at all."""
        meta = {"stamp": self.stamp, "scenes": self.scenes, "problems": self.problems}
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        for place in self.places():
            unfinished = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(unfinished, "xb") as file:
                    np.savez(file, **arrays)
                os.replace(unfinished, place)
                return
            except OSError:         # a read-only folder, a full disk: the next place, or none
                if unfinished.exists():
                    unfinished.unlink()

    def build(self):
        """One pass over the headers. What cannot be used goes to `problems`."""
        scenes, first, problems = {}, {}, Counter()
        try:
            for name, offset, size in tar_members(self.path):
                match = MEMBER.fullmatch(name)
                if match:
                    scene, frame, kind = match[1], int(match[2]), KINDS.get(match[3], IMAGE)
                    view = scenes.setdefault(scene, {}).setdefault(frame, np.zeros((3, 2), int))
                    view[kind] = offset // BLOCK, size
                    if kind == METADATA:
                        first.setdefault(scene, frame)
                else:
                    folder = "/".join(name.split("/")[:2])
                    problems[f"{self.name}: {folder}", "member of another name, ignored"] += 1
        except TarError as err:
            problems[str(err), "damaged archive"] += 1
        rows = []
        self.scenes, self.starts, self.frames, self.first = [], [0], [], []
        for scene, views in scenes.items():
            reason = unusable(np.stack(list(views.values())))
            if reason:
                problems[f"{self.name}: {scene}", reason] += 1
                continue
            frames = sorted(frame for frame in views if views[frame][IMAGE, 0])
            rows += [views[frame] for frame in frames]
            self.frames += frames
            self.scenes.append(scene)
            self.starts.append(len(rows))
            self.first.append(frames.index(first[scene]))
        rows = np.array(rows, np.uint32).reshape(-1, 3, 2)              # view, kind, (block, size)
        self.blocks, self.sizes = rows[..., 0].copy(), rows[..., 1].copy()
        self.starts = np.array(self.starts, np.int64)
        self.frames, self.first = np.array(self.frames, np.int32), np.array(self.first, np.int32)
        self.problems = [[*problem, count] for problem, count in problems.items()]

    def where(self, row, kind):
        """`shard.tar: category/scene/frame000001_depth.png`, of a row of the arrays."""
        scene = self.scenes[np.searchsorted(self.starts, row, side="right") - 1]
        suffix = ("", "_depth.png", "_metadata.json")[kind]
        return f"{self.name}: {scene}/frame{self.frames[row]:06}{suffix}"

    def read(self, file, row, kind):
        """The bytes of one member; `file` is this shard, opened. Raises Damaged."""
        file.seek(int(self.blocks[row, kind]) * BLOCK)
        data = file.read(int(self.sizes[row, kind]))
        if len(data) != self.sizes[row, kind]:
            raise Damaged(self.where(row, kind), "the shard is shorter than its index")
        return data


def unusable(members):
    """Why a scene cannot be used, or "". members: (frames, 3, 2) block and size by kind."""
    has_image, has_depth, has_metadata = (members[:, :, 0] > 0).T
    if (has_image != has_metadata).any():
        return "the images are not those of the cameras"
    if has_depth.any() and (has_image & ~has_depth).any():
        return "depth is missing for some views"
    if has_image.sum() < 2:
        return "fewer than two views"
    if (members > LIMITS).any():
        return "a member is too large"
    return ""


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
    raise Damaged(where, "wrong image size", "{}x{}, the short side must be {}".format(
        *image.size, side))


def centre(pixels, side):
    """The central (side, side) of (h, w, ...): (extent - side) // 2 is cut off first."""
    top, left = ((extent - side) // 2 for extent in pixels.shape[:2])
    return pixels[top:top + side, left:left + side]


def decode_image(data, side, where="image"):
    """PNG, JPEG or WebP bytes -> uint8 tensor (3, s, s), alpha laid over white. Raises Damaged."""
    image = decode(data, side, ("PNG", "JPEG", "WEBP"), where)
    # departs: the reference keeps the alpha channel and cannot read grey images
    if image.mode.startswith("I"):      # 16-bit grey
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    pixels = centre(np.asarray(image), side)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())       # (3, s, s)


def decode_depth(data, side, scale, where="depth"):
    """16-bit PNG of float16 bits -> float32 array (s, s), times `scale`. Raises Damaged.

    0 is unknown: pixels that are 0, negative or not finite.
    """
    image = decode(data, side, ("PNG",), where)
    if not image.mode.startswith("I"):
        raise Damaged(where, "depth is not a 16-bit grey PNG", f"mode {image.mode}")
    bits = centre(np.asarray(image), side).astype(np.uint16)
    depth = bits.view(np.float16).astype(np.float32) * np.float32(scale)
    # departs: infinite depth passes in the reference
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


# ---- cameras

@dataclass
class Scene:
    """A scene's cameras. Stored depths are to be multiplied by depth_scale."""
    name: str
    c2w: torch.Tensor           # float64 (n, 4, 4), OpenGL
    fov: float                  # radians
    depth_scale: float
    radius: float               # mean distance of the cameras to their mean


def metadata(entries, field, *shape):
    """float64 (n, *shape): one field of the views' metadata. Raises ValueError with the reason."""
    try:
        values = np.array([entry[field] for entry in entries], np.float64)
    except KeyError as err:
        raise ValueError(f"metadata lacks {field}") from err
    except (TypeError, ValueError, OverflowError) as err:
        raise ValueError(f"metadata: {field} is not numbers") from err
    if values.shape != (len(entries), *shape):
        raise ValueError(f"metadata: {field} has another shape")
    if not np.isfinite(values).all():
        raise ValueError(f"metadata: {field} is not finite")
    return values


def check_rigid(rotation):
    """Raises ValueError unless all of (n, 3, 3) are rotations."""
    stretch = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max()
    if stretch > RIGID or (np.linalg.det(rotation) < 0).any():
        raise ValueError("a camera is not rigid")


def co3d_cameras(entries, first):
    """CO3D metadata of n views -> c2w, fov, depth_scale. Raises ValueError with the reason."""
    R, T = metadata(entries, "R", 3, 3), metadata(entries, "T", 3)      # PyTorch3D's
    focal = metadata(entries, "focal_length", 2)                        # the image spans [-1, 1]
    scale = metadata(entries, "scale_adjustment")
    if metadata(entries, "principal_point", 2).any():
        raise ValueError("the principal point is not the centre")
    if (focal <= 0).any() or (scale <= 0).any():
        raise ValueError("focal_length or scale_adjustment is not positive")
    check_rigid(R)
    c2w = camera.opengl_from_pytorch3d(torch.from_numpy(R), torch.from_numpy(T))
    # quirk: one field of view and one scale_adjustment for all views, those of the one stored first
    return c2w, 2 * np.arctan(1 / focal[first]).min(), scale[first]


def re10k_cameras(entries, first):
    """RE10K or ACID metadata of n views -> c2w, fov, 1. Raises ValueError with the reason."""
    c2w = metadata(entries, "extrinsics", 4, 4)                         # OpenGL already
    camera_from_pixel = metadata(entries, "intrinsics", 3, 3)
    check_rigid(c2w[:, :3, :3])
    if np.abs(c2w[:, 3] - (0, 0, 0, 1)).max() > RIGID:
        raise ValueError("a camera is not rigid")
    if (np.linalg.det(camera_from_pixel) == 0).any():
        raise ValueError("intrinsics are singular")
    pixel_from_camera = np.linalg.inv(camera_from_pixel)
    fx, fy = pixel_from_camera[:, 0, 0], pixel_from_camera[:, 1, 1]
    if (np.abs(fx - fy) > SQUARE_PIXELS * np.abs(fx)).any():
        raise ValueError("pixels are not square")
    # quirk: cx is the stored one although the image is then cropped, and one view's for all
    fov = 2 * np.arctan(pixel_from_camera[first, 0, 2] / fx[first])
    if not 0 < fov < np.pi:
        raise ValueError("the field of view is not positive")
    return torch.from_numpy(c2w), fov, 1.0


CAMERAS = {"co3d": co3d_cameras, "re10k": re10k_cameras, "acid": re10k_cameras}


# ---- sources

def expand(pattern):
    """`a{000..012}.tar` -> its names in order; a pattern without braces is itself. ValueError."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    low, high, width = int(match[1]), int(match[2]), len(match[1])
    if not 0 <= high - low < MAX_SHARDS:
        raise ValueError(f"shards {pattern!r}: {match[0]} is empty or more than {MAX_SHARDS}")
    before, after = pattern[:match.start()], pattern[match.end():]
    return [name for i in range(low, high + 1) for name in expand(f"{before}{i:0{width}}{after}")]


def find_shards(folder, pattern):
    """Paths of the shards of a pattern, relative to `folder`. FileNotFoundError, ValueError."""
    if pattern == "-" or re.match(r"\w\w+:", pattern):      # two letters: C:\ is a file
        raise ValueError(f"shards {pattern!r}: only local files are supported, "
                         "not web addresses, pipes or standard input")
    paths = []
    for name in expand(str(Path(folder) / pattern)):
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        found = [path for path in found if os.path.isfile(path) and INDEX_SUFFIX not in path]
        if not found:
            raise FileNotFoundError(f"no shards at {name}: `python prepare.py synth` makes some, "
                                    "--data=FOLDER says where they are")
        paths += found
    return list(dict.fromkeys(paths))


class SourceReader:
    """The scenes of one source, numbered through all its shards.

    report    Counter of what was left out, by reason; `problems` has a line for each
    counts    int64 (scenes): their views
    has_depth whether every view has a depth image
    Raises FileNotFoundError, and ValueError when no scene is usable.
    """

    def __init__(self, source, folder, image_size, held_out=False):
        self.name, self.image_size = source.name, image_size
        pattern = source.held_out if held_out else source.shards
        if not pattern:
            raise ValueError(f"source {self.name!r} has no {'held_out' if held_out else 'shards'}")
        if source.format not in CAMERAS:
            raise ValueError(f"source {self.name!r}: format {source.format!r} cannot be read yet, "
                             f"it must be one of {', '.join(CAMERAS)}")
        self.cameras = CAMERAS[source.format]
        paths = find_shards(folder, pattern)
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            self.shards = list(tqdm(pool.map(Shard, paths), f"index {self.name}", len(paths),
                                    unit=" shards", delay=1, leave=False))
        self.report, self.problems = Counter(), []
        for where, reason, count in (line for shard in self.shards for line in shard.problems):
            self.report[reason] += count
            self.problems.append(f"{where}: {reason}" + (f" ({count} times)" if count > 1 else ""))
        self.starts = np.cumsum([0] + [len(shard.scenes) for shard in self.shards])
        self.counts = np.concatenate([np.diff(shard.starts) for shard in self.shards])
        if not len(self):
            raise ValueError(f"source {self.name!r}: no usable scene in {pattern}, {len(paths)} "
                             f"shards: {some(self.problems) or 'they are empty'}")
        self.has_depth = all((shard.blocks[:, DEPTH] > 0).all() for shard in self.shards)
        self.kept, self.nearplanes = {}, {}

    def __len__(self):
        return int(self.starts[-1])

    def __getstate__(self):
        return {**self.__dict__, "kept": {}}

    def summary(self):
        """One line: what there is and what was left out."""
        left_out = ", ".join(f"{reason} ({count})" for reason, count in sorted(self.report.items()))
        return (f"{self.name}: {len(self.shards)} shards, {len(self)} scenes, {self.counts.sum()} "
                "views" + (f"; left out: {left_out}" if left_out else ""))

    def locate(self, scene):
        """(shard, number of the scene in it, row of its first view)."""
        i = int(np.searchsorted(self.starts, scene, side="right")) - 1
        inside = int(scene - self.starts[i])
        return self.shards[i], inside, int(self.shards[i].starts[inside])

    def scene(self, scene):
        """The Scene of a number; all its cameras are read on first use. Raises Damaged."""
        if scene in self.kept:
            return self.kept[scene]
        shard, inside, start = self.locate(scene)
        entries, name = [], shard.scenes[inside]
        with open(shard.path, "rb", buffering=0) as file:
            for row in range(start, start + int(self.counts[scene])):
                data = shard.read(file, row, METADATA)
                try:
                    entries.append(json.loads(data))
                except (ValueError, RecursionError) as err:
                    where = shard.where(row, METADATA)
                    raise Damaged(where, "metadata is not JSON", str(err)) from err
        try:
            c2w, fov, depth_scale = self.cameras(entries, int(shard.first[inside]))
        except ValueError as err:
            raise Damaged(f"{shard.name}: {name}", str(err)) from err
        radius = camera.scene_geometry(c2w).radius
        if len(self.kept) >= SCENES_KEPT:
            del self.kept[next(iter(self.kept))]
        self.kept[scene] = Scene(name, c2w, float(fov), float(depth_scale), float(radius))
        return self.kept[scene]

    def image(self, scene, view):
        """uint8 (3, s, s): the image of a view. Raises Damaged."""
        shard, _, start = self.locate(scene)
        with open(shard.path, "rb", buffering=0) as file:
            data = shard.read(file, start + view, IMAGE)
        return decode_image(data, self.image_size, shard.where(start + view, IMAGE))

    def depth(self, scene, view):
        """float32 array (s, s): the depth of a view in the scene's unit, 0 unknown. Damaged."""
        shard, _, start = self.locate(scene)
        if not shard.blocks[start + view, DEPTH]:
            return np.zeros((self.image_size, self.image_size), np.float32)
        with open(shard.path, "rb", buffering=0) as file:
            data = shard.read(file, start + view, DEPTH)
        where, scale = shard.where(start + view, DEPTH), self.scene(scene).depth_scale
        return decode_depth(data, self.image_size, scale, where)

    def nearplane(self, scene):
        """The 10% quantile over views of the 5% quantile of their depths, or nan. Damaged."""
        if scene not in self.nearplanes:
            depths = [self.depth(scene, view) for view in range(self.counts[scene])]
            near = [np.quantile(d[d > 0], NEARPLANE_VIEW) for d in depths if d.any()]
            self.nearplanes[scene] = float(np.quantile(near, NEARPLANE_SCENE)) if near else np.nan
        return self.nearplanes[scene]

    def pair(self, scene, cond, target, mode):
        """The pair of two views, as Pairs gives it but for `number` and `damage`. Damaged."""
        shard = self.locate(scene)[0]
        try:
            known = self.scene(scene)
            item = {"image_cond": self.image(scene, cond),
                    "image_target": self.image(scene, target),
                    "cond_c2w": known.c2w[cond].clone(), "target_c2w": known.c2w[target].clone()}
            if mode in DEPTH_MODES:
                item["depth_cond"] = torch.from_numpy(self.depth(scene, cond))
            nearplane = self.nearplane(scene) if mode == NEARPLANE_MODE else np.nan
        except OSError as err:
            raise Damaged(shard.path, "cannot be read", err.strerror or str(err)) from err
        numbers = {"fov": known.fov, "radius": known.radius, "nearplane": nearplane}
        item |= {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
        return {**item, "uid": f"{shard.name}:{known.name}:{cond}->{target}"}


# ---- pairs

class Pairs(Dataset):
    """Pair k is a function of (seed, k). pairs[k] is a dict:

    image_cond, image_target   uint8 (3, s, s)
    cond_c2w, target_c2w       float64 (4, 4), OpenGL
    fov                        float64 (), radians, of the scene's first stored view
    radius                     float64 (), of the scene
    nearplane                  float64 (), the scene's near-plane quantile; nan in other modes
    depth_cond                 float32 (s, s), 0 unknown; only in DEPTH_MODES
    number                     int64 (), k
    uid                        "shard.tar:category/scene:i->j", i cond, j target, in frame order
    damage                     "source<tab>reason<tab>where", a line for each draw that failed

    The source is drawn by probability, the scene uniformly in it, then two distinct views. What is
    damaged is replaced by the next draw of the same k from the same source. `ordered` is for
    scores: every pair of every scene once, the first ones spread evenly over the scenes.
    """

    def __init__(self, readers, probabilities, seed, image_size, mode, ordered=False):
        if len(readers) != len(probabilities) or abs(sum(probabilities) - 1) > 1e-6:
            raise ValueError(f"{len(readers)} sources need as many probabilities of sum 1, "
                             f"not {list(probabilities)}")
        if mode not in camera.T_WIDTH:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(camera.T_WIDTH)}")
        if any(reader.image_size != image_size for reader in readers):
            raise ValueError(f"image_size {image_size} is not that of the sources")
        self.readers, self.seed, self.mode = list(readers), seed, mode
        self.shares = np.cumsum(probabilities)
        self.rounds = None
        if ordered:             # round c takes the c-th pair of every scene that has so many
            counts = np.concatenate([reader.counts for reader in readers])
            self.pairs_of = counts * (counts - 1)
            order = sorted(range(len(counts)), key=lambda scene: self.words("scene", scene))
            self.scene_order = np.array(order)
            upto = np.searchsorted(np.sort(self.pairs_of), np.arange(self.pairs_of.max()), "right")
            self.rounds = np.cumsum(len(counts) - upto)

    def __len__(self):
        return 1 << 62 if self.rounds is None else int(self.rounds[-1])

    def words(self, *key):
        """Four random 64-bit words that belong to the seed and a key."""
        text = " ".join(map(str, (self.seed, *key)))
        return struct.unpack("<4Q", hashlib.blake2b(text.encode(), digest_size=32).digest())

    def draw(self, k, attempt=0):
        """(source, scene, cond view, target view) of pair k, after `attempt` damaged draws."""
        if self.rounds is not None:
            source, *views = self.draw_in_order(k)
            if not attempt:
                return source, *views
        else:                   # min: the shares may sum to a hair less than 1
            source = int(np.searchsorted(self.shares, self.words(k, 0)[0] / 2.0**64, "right"))
            source = min(source, len(self.readers) - 1)
        reader, words = self.readers[source], self.words(k, attempt)
        scene = words[1] * len(reader) >> 64                    # uniform, to len / 2^64
        n = int(reader.counts[scene])
        return source, scene, *distinct(words[2] * n * (n - 1) >> 64, n)

    def draw_in_order(self, k):
        """The same for the fixed pass: round c shows pair start + c * stride of each scene."""
        c = int(np.searchsorted(self.rounds, k, "right"))
        place = k - (int(self.rounds[c - 1]) if c else 0)
        scene = int(self.scene_order[self.pairs_of[self.scene_order] > c][place])
        pairs = int(self.pairs_of[scene])
        start, stride, *_ = self.words("pair", scene)
        while math.gcd(stride, pairs) > 1:                      # all pairs before any again
            stride += 1
        source = 0
        while scene >= len(self.readers[source]):
            scene, source = scene - len(self.readers[source]), source + 1
        n = int(self.readers[source].counts[scene])
        return source, scene, *distinct((start + c * stride) % pairs, n)

    def __getitem__(self, k):
        if not 0 <= k < len(self):
            raise IndexError(f"pair {k} of {len(self)}")
        damage = []
        for attempt in range(MAX_DRAWS):
            source, *views = self.draw(k, attempt)
            reader = self.readers[source]
            try:
                item = reader.pair(*views, self.mode)
                return {**item, "number": torch.tensor(k), "damage": "\n".join(damage)}
            except Damaged as err:
                damage.append(f"{reader.name}\t{err.reason}\t{' '.join(str(err).split())}")
        found = sorted({line.split("\t")[2] for line in damage})
        raise ValueError(f"source {reader.name!r}: {MAX_DRAWS} damaged draws on end: {some(found)}")


def distinct(number, n):
    """0..n(n-1)-1 -> an ordered pair of different views of n."""
    cond, target = divmod(number, n - 1)
    return cond, target + (target >= cond)


def some(lines, shown=5):
    """The first of many lines, joined."""
    more = f"; and {len(lines) - shown} more" if len(lines) > shown else ""
    return "; ".join(lines[:shown]) + more


# ---- loader

class Batches(Sampler):
    """The numbers of the pairs that one rank reads in steps start_step .. steps - 1.

    Step t has pairs t * batch_size .. (t + 1) * batch_size - 1. Rank r has the r-th of `world`
    slices of them, in `micro_steps` micro-batches of at most micro_batch pairs.
    """

    def __init__(self, start_step, steps, batch_size, micro_batch, rank=0, world=1):
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide among {world} processes")
        self.start_step, self.steps, self.batch_size = start_step, steps, batch_size
        self.micro_batch, self.share = micro_batch, batch_size // world
        self.offset = rank * self.share
        self.micro_steps = -(-self.share // micro_batch)

    def __len__(self):
        return max(0, self.steps - self.start_step) * self.micro_steps

    def __iter__(self):
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size + self.offset
            for at in range(first, first + self.share, self.micro_batch):
                yield list(range(at, min(at + self.micro_batch, first + self.share)))


def start_worker(ending, worker):
    """In a new loader process: a signal to stop is for the parent, which saves first and then ends
    its workers. `ending` is set when the parent itself ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: ending.is_set() and os._exit(0))


class Loader(DataLoader):
    """A DataLoader that takes `damage` out of the batches: counts, logs and limits it.

    report    {source: Counter of damaged draws by reason}
    """

    def __init__(self, pairs, batches, workers, device, max_damaged):
        ending = multiprocessing.get_context("spawn").Event()      # works under fork too
        atexit.register(ending.set)     # runs before multiprocessing ends and awaits its children
        super().__init__(pairs, batch_sampler=batches, num_workers=workers,
                         persistent_workers=workers > 0,
                         worker_init_fn=functools.partial(start_worker, ending),
                         pin_memory=torch.device(device).type == "cuda")
        self.report = {reader.name: Counter() for reader in pairs.readers}
        self.max_damaged, self.draws, self.logged = max_damaged, 0, {}

    def __iter__(self):
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except ValueError as err:       # a worker's ends in its traceback: keep our line
                line = str(err).strip().splitlines()[-1]
                raise ValueError(line.removeprefix("ValueError: ")) from err
            self.count(batch.pop("damage"))
            yield batch

    def count(self, damage):
        """Books the damage of one batch. Raises ValueError when the run has seen too much."""
        lines = [line for pair in damage for line in pair.splitlines()]
        self.draws += len(damage) + len(lines)
        for source, reason, where in (line.split("\t") for line in lines):
            self.report[source][reason] += 1
            if where not in self.logged:
                self.logged[where] = None
                log.warning("%s: another pair replaces a damaged one: %s", source, where)
        damaged = sum(reasons.total() for reasons in self.report.values())
        if self.draws >= MIN_DRAWS and damaged > self.max_damaged * self.draws:
            raise ValueError(f"{damaged} of {self.draws} draws were damaged, more than "
                             f"{self.max_damaged:.0%}: {some(list(self.logged))}")


def loader(pairs, batches, workers=0, device="cpu", max_damaged=0.05):
    """A DataLoader of the micro-batches of Batches: Pairs' dicts stacked, `uid` a list.

    Memory is pinned for CUDA. Raises ValueError, in the loop, once more than `max_damaged` of the
    draws were damaged.
    """
    return Loader(pairs, batches, workers, device, max_damaged)
