"""The index of a shard: where its members lie, and all its cameras. Built once, then kept.

Raw shards are ZeroNVS's (arXiv:2310.17994): tars of `category/scene/frame000001.png`, `_depth.png`
and `_metadata.json`. Encoded shards are ours: a member `category/scene.safetensors` for every
scene, with what the frozen networks make of its views. Cameras become OpenGL camera-to-world here.
Letters: `n` views of a scene, `c h w` channels, height and width of a latent, `d` of an embedding.
"""

import glob
import hashlib
import json
import math
import os
import re
import time
import uuid
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import camera
from shards.files import Damaged, TarError, Window, cache_folder
from shards.streams import INDEX_SUFFIX
from shards.tar import BLOCK, tar_members

MAX_METADATA = 1 << 16              # bytes of a camera's JSON, of an encoded scene's header
IMAGE, DEPTH, METADATA = range(3)   # kinds of member, and the most bytes of each
LIMITS = 1 << 26, 1 << 26, MAX_METADATA
MAX_SCENE = 1 << 31                 # bytes of an encoded scene, and numbers in it
INDEX_VERSION = 5
SMALL_INDEX = 1 << 16               # bytes up to which a kept index is read, not mapped: a process
                                    # has some 65,000 mappings
LITTER_AGE = 5                      # seconds after which an index that is half written is litter
RIGID = 1e-3                        # largest entry of R @ R.T - 1 of a rotation
FARTHEST = 1e12                     # of a camera's coordinates, in any unit that a scene may have
SQUARE_PIXELS = 1e-4                # largest relative difference of fx and fy
KINDS = {"_depth.png": DEPTH, "_metadata.json": METADATA}
MEMBER = re.compile(r"(?:\./)?([^/]+/[^/]+)/frame(\d{1,9})"
                    r"(\.png|\.jpe?g|\.webp|_depth\.png|_metadata\.json)")
ENCODED_MEMBER = re.compile(r"(?:\./)?([^/]+/[^/]+)\.safetensors")
OTHER_NAME = "member of another name, ignored"
WITHOUT_DEPTH = "view without depth in a scene that has depths, left out"
BLEND = {"true": 1, "false": 0}     # how encoded shards say their quantile_blend; -1: they do not


# ---- cameras

def metadata(entries, field, *shape):
    """float64 (n, *shape): one field of the views' metadata. Raises ValueError with the reason."""
    try:
        values = np.array([entry[field] for entry in entries], np.float64)
    except KeyError as err:
        raise ValueError(f"metadata lacks {field}") from err
    except (TypeError, ValueError, OverflowError) as err:
        raise ValueError(f"metadata: {field} is not numbers") from err
    if values.shape != (len(entries), *shape) or not np.isfinite(values).all():
        raise ValueError(f"metadata: {field} has another shape or is not finite")
    return values


def pose_problems(c2w):
    """(n,) texts: what keeps each of the matrices (n, 4, 4) from being a rotation and shift; ""."""
    turn, last_row = c2w[:, :3, :3], c2w[:, 3]
    with np.errstate(all="ignore"):     # of huge numbers, which are refused
        error = np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
        problems = {
            "holds numbers that are not finite": ~np.isfinite(c2w).all((1, 2)),
            "has a last row other than 0 0 0 1": np.abs(last_row - (0, 0, 0, 1)).max(1) > RIGID,
            "is not rigid: its rotation times its transpose is not 1": ~(error <= RIGID),
            "mirrors: the determinant of its rotation is negative": np.linalg.det(turn) < 0}
    return np.select(list(problems.values()), list(problems), "")


def check_cameras(c2w):
    """Raises ValueError unless all of (n, 4, 4) are rigid and at a place that can be used."""
    if any(pose_problems(c2w)):
        raise ValueError("a camera is not rigid")
    if not np.abs(c2w[:, :3, 3]).max() <= FARTHEST:
        raise ValueError(f"a camera is farther than {FARTHEST:g} from the origin")


def co3d_cameras(entries, first):
    """CO3D metadata of n views -> c2w, fov, depth_scale. Raises ValueError with the reason."""
    R, T = metadata(entries, "R", 3, 3), metadata(entries, "T", 3)      # PyTorch3D's
    focal = metadata(entries, "focal_length", 2)                        # the image spans [-1, 1]
    scale = metadata(entries, "scale_adjustment")
    if metadata(entries, "principal_point", 2).any():
        raise ValueError("the principal point is not the centre")
    if (focal <= 0).any() or (scale <= 0).any():
        raise ValueError("focal_length or scale_adjustment is not positive")
    check_cameras(whole_matrices(np.concatenate([R, T[:, :, None]], axis=2)))
    c2w = camera.opengl_from_pytorch3d(torch.from_numpy(R), torch.from_numpy(T))
    # quirk: a scene has one field of view and one scale_adjustment, those of the view stored first
    # [test_field_of_view_and_depth_scale_are_those_of_the_first_stored_frame]
    return c2w, 2 * np.arctan(1 / focal[first]).min(), scale[first]


def re10k_cameras(entries, first):
    """RE10K or ACID metadata of n views -> c2w, fov, 1. Raises ValueError with the reason."""
    c2w = metadata(entries, "extrinsics", 4, 4)                         # OpenGL already
    camera_from_pixel = metadata(entries, "intrinsics", 3, 3)
    check_cameras(c2w)
    with np.errstate(all="ignore"):     # of huge numbers, which are refused
        if not (np.linalg.det(camera_from_pixel) != 0).all():
            raise ValueError("intrinsics are singular")
        pixel_from_camera = np.linalg.inv(camera_from_pixel)
        fx, fy = pixel_from_camera[:, 0, 0], pixel_from_camera[:, 1, 1]
        if not (np.abs(fx - fy) <= SQUARE_PIXELS * np.abs(fx)).all():
            raise ValueError("pixels are not square")
        # quirk: RealEstate10K's field of view follows from the stored principal point, although the
        # image is then cropped [test_fields_of_view_equal_the_reference]
        fov = 2 * np.arctan(pixel_from_camera[first, 0, 2] / fx[first])
    if not 0 < fov < np.pi:
        raise ValueError("the field of view is not positive")
    return torch.from_numpy(c2w), fov, 1.0


def whole_matrices(c2w):
    """(..., 3, 4) -> (..., 4, 4) with the last row of a camera."""
    whole = np.zeros((*c2w.shape[:-2], 4, 4))
    whole[..., :3, :], whole[..., 3, 3] = c2w, 1
    return whole


CAMERAS = {"co3d": co3d_cameras, "re10k": re10k_cameras, "acid": re10k_cameras}      # by format


# ---- index

class Index:
    """The scenes of one shard: kept in a file, which is mapped when it is large.

    file      a LocalFile or WebFile
    scenes    names `category/scene` of the usable ones, as stored
    problems  [where, reason, count] of all that is left out
    starts    int64 (scenes + 1): views of scene i are rows starts[i]:starts[i + 1] of their arrays

    A subclass has the types of its rows, SCENE and VIEW, whose fields become attributes, arrays of
    all scenes and views, and `found(window, problems)`, which yields (scene's name, its fields).
    """

    def __init__(self, file, layout, keep=True):
        """keep=False neither looks for a kept index nor keeps this one: the shard is read."""
        self.file, self.name, self.layout = file, file.name, layout
        if not keep or not any(map(self.load, self.places())):
            content = self.build()
            self.fill(content, *self.header(content))
            if keep:
                self.store(content)

    def stamp(self):
        return [INDEX_VERSION, *self.file.stamp]

    def build(self):
        """The bytes of the index, from one pass over the shard. What cannot be used is a problem.

        They are: CRC-32 of the rest and length of the JSON, each 8 bytes; JSON; rows of scenes, and
        of views.
        """
        problems = Counter()
        found = list(self.found(Window(self.file), problems))
        starts = np.cumsum([0, *(len(fields["c2w"]) for _, fields in found)])
        scenes, views = np.zeros(len(found), self.SCENE), np.zeros(starts[-1], self.VIEW)
        for i, (_, fields) in enumerate(found):
            fields["views"] = len(fields["c2w"])
            for rows, place in ((scenes, i), (views, slice(starts[i], starts[i + 1]))):
                for name in rows.dtype.names:
                    rows[name][place] = fields[name]
        text = json.dumps({
            "stamp": self.stamp(), "scenes": [printable(name) for name, _ in found],
            "problems": [[*map(printable, each), count] for each, count in problems.items()]})
        body = len(text).to_bytes(8, "little") + text.encode() + scenes.tobytes() + views.tobytes()
        return np.frombuffer(zlib.crc32(body).to_bytes(8, "little") + body, np.uint8)

    @staticmethod
    def header(content):
        """(the JSON of an index's bytes, where it ends). ValueError for damaged ones."""
        crc, length = content[:16].view(np.int64).tolist()
        if crc != zlib.crc32(content[8:]):
            raise ValueError("a damaged index")
        return json.loads(content[16:16 + length].tobytes()), 16 + length

    def fill(self, content, stored, at):
        """Takes the rows of an index's bytes, from `at` on, and what is in its JSON."""
        self.scenes, self.problems = stored["scenes"], stored["problems"]
        scenes = np.frombuffer(content, self.SCENE, len(self.scenes), at)
        for rows in (scenes, np.frombuffer(content[at + scenes.nbytes:], self.VIEW)):
            for name in rows.dtype.names:
                setattr(self, name, rows[name])
        self.starts = np.concatenate([[0], self.views.cumsum()])

    def members(self, window, problems):
        """tar_members that counts what ends it instead of raising it."""
        try:
            yield from tar_members(window)
        except TarError as err:
            problems[str(err), err.reason] += 1

    def places(self):
        """Yields where the index may be kept: beside the shard, else in the user's cache folder."""
        suffix = f".{self.layout}{INDEX_SUFFIX}"
        if "://" not in self.file.path:
            yield Path(self.file.path + suffix)
        digest = hashlib.sha256(os.fsencode(os.path.abspath(self.file.path))).hexdigest()[:32]
        with suppress(OSError):         # no folder can be written
            yield cache_folder() / (digest + suffix)

    def load(self, place):
        """Takes a kept index; False when there is none, or it is old or damaged."""
        try:
            size = place.stat().st_size
            content = (np.fromfile(place, np.uint8) if size < SMALL_INDEX else
                       # keeps no descriptor, as numpy's and Python's own mappings do
                       torch.from_file(str(place), size=size, dtype=torch.uint8).numpy())
            stored, at = self.header(content)
            if stored["stamp"] != self.stamp():
                return False
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):    # RuntimeError: torch's
            return False
        self.fill(content, stored, at)
        return True

    def store(self, content):
        """Keeps the index in the first place that can be written, whole or not at all."""
        for place in self.places():
            # a name of its own: all ranks may be at it
            unfinished = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
            try:
                unfinished.write_bytes(content)
                os.replace(unfinished, place)
                for old in place.parent.glob(f"{glob.escape(place.name)}.{'[0-9a-f]' * 8}"):
                    if time.time() - old.stat().st_mtime > LITTER_AGE:      # its writer was killed
                        old.unlink()
                return
            except OSError:         # a read-only folder, a full disk: the next place, or none
                with suppress(OSError):
                    unfinished.unlink()

    def read(self, offset, size, where):
        """Bytes of this shard. Raises Damaged."""
        try:
            data = self.file.read(offset, size)
        except OSError as err:
            raise Damaged(where, "cannot be read", err.strerror or str(err)) from err
        if len(data) != size:
            raise Damaged(where, "the shard is shorter than its index")
        return data


def printable(text):
    """A name without line breaks and bytes that are no text, which would break a line of a log."""
    return "".join(char if char.isprintable() else "?" for char in text)


class RawIndex(Index):
    """The index of a raw shard; see Index. A scene: its cameras' `radius`, `fov` in radians, the
    factor of its stored depths. A view: its frame's number, tar block and bytes of its image and
    depth; block 0: no depth."""
    SCENE = np.dtype([("views", np.int64), ("radius", np.float64), ("fov", np.float64),
                      ("depth_scale", np.float64)])
    VIEW = np.dtype([("c2w", np.float64, (3, 4)), ("frames", np.int32), ("blocks", np.int32, 2),
                     ("sizes", np.int32, 2)])

    def found(self, window, problems):
        members, entries = {}, {}
        for name, offset, size in self.members(window, problems):
            match = MEMBER.fullmatch(name)
            if not match:
                folder = "/".join(name.split("/")[:2])
                problems[f"{self.name}: {folder}", OTHER_NAME] += 1
                continue
            scene, frame, kind = match[1], int(match[2]), KINDS.get(match[3], IMAGE)
            view = members.setdefault(scene, {}).setdefault(frame, [(0, 0)] * 3)
            view[kind] = offset // BLOCK, size
            if kind == METADATA and size <= MAX_METADATA:
                entries.setdefault(scene, {})[frame] = window.read(offset, size)
        # departs: every scene of a shard is delivered, and a damaged one is left out alone; the
        # reference hands on a scene when the next one begins, so never the last, and a damaged one
        # ends its stream [test_the_last_scene_of_a_stream_is_delivered]
        for scene, views in members.items():
            try:
                frames, without = usable_frames(scene, views)
                cameras = self.cameras(scene, frames, entries[scene])
            except Damaged as err:
                problems[f"{self.name}: {err.where}", err.reason] += 1
                continue
            if without:
                problems[f"{self.name}: {scene}", WITHOUT_DEPTH] += without
            table = np.array([[views[frame][kind] for kind in (IMAGE, DEPTH)] for frame in frames])
            # zeros that stand there for the original's reader, which needs some
            table[[entries[scene][frame].get("depth_known") is False for frame in frames], 1] = 0
            yield scene, {**cameras, "frames": frames, "blocks": table[..., 0],
                          "sizes": table[..., 1]}

    def cameras(self, scene, frames, entries):
        """c2w (n, 3, 4), fov, depth_scale and radius of a scene. entries: {frame: JSON}, in the
        order in which they are stored. Raises Damaged."""
        first = next(frame for frame in entries if frame in frames)
        try:
            for frame in frames:
                entries[frame] = json.loads(entries[frame])
        except (ValueError, RecursionError) as err:
            raise Damaged(f"{scene}/frame{frame:06}_metadata.json", "metadata is not JSON") from err
        try:
            c2w, fov, depth_scale = CAMERAS[self.layout]([entries[frame] for frame in frames],
                                                         frames.index(first))
        except ValueError as err:
            raise Damaged(scene, str(err)) from err
        return {"c2w": c2w[:, :3].numpy(), "fov": fov, "depth_scale": depth_scale,
                "radius": camera.scene_geometry(c2w).radius}

    def member(self, row, kind):
        """(bytes, `shard.tar: category/scene/frame000001`) of the image or depth of a view, a row
        of the arrays. Raises Damaged."""
        scene = self.scenes[int(np.searchsorted(self.starts, row, side="right")) - 1]
        where = f"{self.name}: {scene}/frame{self.frames[row]:06}{('', '_depth.png')[kind]}"
        offset, size = int(self.blocks[row, kind]) * BLOCK, int(self.sizes[row, kind])
        return self.read(offset, size, where), where


def usable_frames(scene, views):
    """(frames of a scene that are its views, ascending; how many were left out for want of depth).

    views: {frame: (block, size) of the three kinds}. Raises Damaged where the scene cannot be used.
    """
    frames = sorted(views)
    blocks, sizes = np.moveaxis(np.array([views[frame] for frame in frames]), 2, 0)     # (n, 3)
    has_image, has_depth, has_metadata = (blocks > 0).T
    # unknown depth beside known would do in most modes, but not where a viewer's scale is taken
    keep = has_image & (has_depth | ~has_depth[has_image].any())
    for wrong, reason in (
            ((has_image != has_metadata).any(), "the images are not those of the cameras"),
            ((sizes > LIMITS).any(), "a member is too large"),
            (has_image.sum() < 2, "fewer than two views"),
            (keep.sum() < 2, "fewer than two views have depth")):
        if wrong:
            raise Damaged(scene, reason)
    return [frame for frame, kept in zip(frames, keep) if kept], int(has_image.sum() - keep.sum())


class EncodedIndex(Index):
    """The index of a shard that `prepare.py encode` wrote; see Index. A scene: its `radius` and
    `nearplane` (nan without depth), the byte of its first view's moments (2c, h, w) and CLIP
    embedding (d,), float16, which those of the others follow, their sizes `latent`: 2c, h, w, d,
    and `blend`: 1 or 0, the quantile_blend of its scales, -1 not known. A view: its `fov` in
    radians, its `scale`: the depth quantile of "viewer" normalisation, nan where not known."""
    SCENE = np.dtype([("views", np.int64), ("radius", np.float64), ("nearplane", np.float64),
                      ("moments_at", np.int64), ("clip_at", np.int64), ("latent", np.int32, 4),
                      ("blend", np.int32)])
    VIEW = np.dtype([("c2w", np.float64, (3, 4)), ("fov", np.float64), ("scale", np.float64)])

    def found(self, window, problems):
        for name, offset, size in self.members(window, problems):
            match = ENCODED_MEMBER.fullmatch(name)
            try:
                if not match:
                    raise ValueError(OTHER_NAME)
                yield match[1], encoded_scene(window, offset, size)
            except ValueError as err:
                problems[f"{self.name}: {name}", str(err)] += 1


def encoded_scene(window, offset, size):
    """One scene's fields of EncodedIndex, from its safetensors. Raises ValueError."""
    length = int.from_bytes(window.read(offset, 8), "little")
    if size > MAX_SCENE or not 2 <= length <= min(size - 8, MAX_METADATA):
        raise ValueError("no safetensors, or too large")
    first, spans = offset + 8 + length, {}
    try:
        header = json.loads(window.read(offset + 8, length))
        told = header["__metadata__"]
        fields = {name: float(told[name]) for name in ("radius", "nearplane")}
        (n, c2, h, w), (_, d) = header["moments"]["shape"], header["clip"]["shape"]
        for name, known, *shape in (("moments", "F16", n, c2, h, w), ("clip", "F16", n, d),
                                    ("c2w", "F64", n, 4, 4), ("fov", "F64", n),
                                    ("scale", "F64", n)):
            dtype, stored = header[name]["dtype"], header[name]["shape"]
            start, end = header[name]["data_offsets"]
            if ((dtype, stored) != (known, shape) or first + end > offset + size
                    or not all(type(k) is int and 0 < k < MAX_SCENE for k in (*shape, start + 1))
                    or end - start != math.prod(shape) * int(known[1:]) // 8):
                raise ValueError(f"{name} is {dtype}{stored}, or misplaced: not of {n} views")
            spans[name] = first + start, end - start
    except (KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError("its header is not that of an encoded scene") from err
    if n < 2:
        raise ValueError("fewer than two views")
    for name in ("c2w", "fov", "scale"):
        fields[name] = np.frombuffer(window.read(*spans[name]), np.float64)
    c2w, fov = fields["c2w"].reshape(n, 4, 4), fields["fov"]
    check_cameras(c2w)
    if not (0 <= fields["radius"] < math.inf and ((fov > 0) & (fov < np.pi)).all()):
        raise ValueError("the radius, or a field of view, is not positive or not finite")
    if np.isinf([*fields["scale"], fields["nearplane"]]).any():     # nan: not known
        raise ValueError("nearplane or a scale is not finite")
    return {**fields, "c2w": c2w[:, :3], "latent": (c2, h, w, d), "moments_at": spans["moments"][0],
            "clip_at": spans["clip"][0], "blend": BLEND.get(told.get("quantile_blend"), -1)}
