"""The index of a shard: where its members lie, and all its cameras. Built once, then kept.

Raw shards are ZeroNVS's (arXiv:2310.17994): tars of `category/scene/frame000001.png`, `_depth.png`
and `_metadata.json`. Encoded shards are ours: a member `category/scene.safetensors` for every
scene, with what the frozen networks make of its views. Cameras become OpenGL camera-to-world here.
Letters: `n` views of a scene, `c h w` channels, height and width of a latent, `d` of an embedding.
"""

import hashlib
import io
import json
import math
import os
import re
import uuid
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import camera
from shards.files import Damaged, TarError, Window, cache_folder
from shards.streams import INDEX_SUFFIX
from shards.tar import BLOCK, tar_members

MAX_MEMBER = 1 << 26                # bytes of an image or depth member
MAX_METADATA = 1 << 16              # bytes of a camera's JSON, of an encoded scene's header
MAX_SCENE = 1 << 31                 # bytes of an encoded scene, and numbers in it
INDEX_VERSION = 3
SMALL_INDEX = 1 << 16               # bytes up to which a kept index is read: a process has some
                                    # 65,000 mappings
RIGID = 1e-3                        # largest entry of R @ R.T - 1 of a rotation
FARTHEST = 1e12                     # of a camera's coordinates, in any unit that a scene may have
SQUARE_PIXELS = 1e-4                # largest relative difference of fx and fy
LATENT_SHRINK = 8                   # pixels a side of an image to one of its latent
IMAGE, DEPTH, METADATA = range(3)   # kinds of member
KINDS = {"_depth.png": DEPTH, "_metadata.json": METADATA}
LIMITS = (MAX_MEMBER, MAX_MEMBER, MAX_METADATA)
MEMBER = re.compile(r"(?:\./)?([^/]+/[^/]+)/frame(\d{1,9})"
                    r"(\.png|\.jpe?g|\.webp|_depth\.png|_metadata\.json)")
ENCODED_MEMBER = re.compile(r"(?:\./)?([^/]+/[^/]+)\.safetensors")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}     # safetensors' names
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
    if values.shape != (len(entries), *shape):
        raise ValueError(f"metadata: {field} has another shape")
    if not np.isfinite(values).all():
        raise ValueError(f"metadata: {field} is not finite")
    return values


def check_cameras(c2w):
    """Raises ValueError unless all of (n, 3 or 4, 4) are rigid and at a place that can be used."""
    rotation, position = c2w[:, :3, :3], c2w[:, :3, 3]
    with np.errstate(all="ignore"):     # of huge numbers, which are refused
        stretch = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max()
    if not stretch <= RIGID or (np.linalg.det(rotation) < 0).any():
        raise ValueError("a camera is not rigid")
    if not np.abs(position).max() <= FARTHEST:
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
    check_cameras(np.concatenate([R, T[:, :, None]], axis=2))
    c2w = camera.opengl_from_pytorch3d(torch.from_numpy(R), torch.from_numpy(T))
    # quirk: one field of view and one scale_adjustment for all views, those of the one stored first
    return c2w, 2 * np.arctan(1 / focal[first]).min(), scale[first]


def re10k_cameras(entries, first):
    """RE10K or ACID metadata of n views -> c2w, fov, 1. Raises ValueError with the reason."""
    c2w = metadata(entries, "extrinsics", 4, 4)                         # OpenGL already
    camera_from_pixel = metadata(entries, "intrinsics", 3, 3)
    check_cameras(c2w)
    if np.abs(c2w[:, 3] - (0, 0, 0, 1)).max() > RIGID:
        raise ValueError("a camera is not rigid")
    with np.errstate(all="ignore"):     # of huge numbers, which are refused
        if not (np.linalg.det(camera_from_pixel) != 0).all():
            raise ValueError("intrinsics are singular")
        pixel_from_camera = np.linalg.inv(camera_from_pixel)
        fx, fy = pixel_from_camera[:, 0, 0], pixel_from_camera[:, 1, 1]
        if not (np.abs(fx - fy) <= SQUARE_PIXELS * np.abs(fx)).all():
            raise ValueError("pixels are not square")
        # quirk: RealEstate10K's field of view uses the stored cx although the image is then
        # cropped, and one view's for all
        fov = 2 * np.arctan(pixel_from_camera[first, 0, 2] / fx[first])
    if not 0 < fov < np.pi:
        raise ValueError("the field of view is not positive")
    return torch.from_numpy(c2w), fov, 1.0


CAMERAS = {"co3d": co3d_cameras, "re10k": re10k_cameras, "acid": re10k_cameras}      # by format


# ---- index

class Index:
    """The scenes of one shard: kept in a file, which is mapped when it is large.

    file      a LocalFile or WebFile
    scenes    names `category/scene` of the usable ones, as stored
    problems  [where, reason, count] of all that is left out
    starts    int64 (scenes + 1): views of scene i are rows starts[i]:starts[i + 1] of their arrays
    c2w       float64 (views, 3, 4), OpenGL
    radius    float64 (scenes)
    side      int32 (scenes): the short side in pixels of the first image, 0 where it is not known

    A subclass lists its `arrays`, {name: (rows, dtype, *shape of a row)}, rows "views" or "scenes",
    and its `found(window, problems)` yields (scene's name, {name: its rows or value}).
    """
    arrays = {"c2w": ("views", np.float64, 3, 4), "radius": ("scenes", np.float64),
              "side": ("scenes", np.int32)}

    def __init__(self, file, layout, keep=True):
        """keep=False neither looks for a kept index nor keeps this one: the shard is read."""
        self.file, self.name, self.layout = file, file.name, layout
        self.stamp = [INDEX_VERSION, *file.stamp]
        if not keep or not any(self.load(place) for place in self.places()):
            self.build()
            if keep:
                self.store()

    # -- built

    def build(self):
        """One pass over the shard. What cannot be used goes to `problems`."""
        problems = Counter()
        found = list(self.found(Window(self.file), problems))
        self.scenes = [printable(name) for name, _ in found]
        self.problems = [[*map(printable, problem), count] for problem, count in problems.items()]
        self.starts = np.cumsum([0, *(len(scene["c2w"]) for _, scene in found)], dtype=np.int64)
        for name, (rows, dtype, *shape) in self.arrays.items():
            parts = [scene[name] if rows == "views" else [scene[name]] for _, scene in found]
            parts = [np.asarray(part, dtype).reshape(-1, *shape) for part in parts]
            setattr(self, name, np.concatenate([np.empty((0, *shape), dtype), *parts]))

    def members(self, window, problems):
        """tar_members that counts what ends it instead of raising it."""
        try:
            yield from tar_members(window)
        except TarError as err:
            problems[str(err), err.reason] += 1

    # -- kept: CRC-32 of the rest, length of the JSON, each 8 bytes; JSON; starts and the arrays

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
            crc, length = content[:16].view(np.int64).tolist()
            if crc != zlib.crc32(content[8:]):
                return False
            stored = json.loads(content[16:16 + length].tobytes())
            if stored["stamp"] != self.stamp:
                return False
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):    # RuntimeError: torch's
            return False
        self.scenes, self.problems = stored["scenes"], stored["problems"]
        count, at = len(self.scenes), 16 + length
        self.starts = np.frombuffer(content, np.int64, count + 1, at)
        at += self.starts.nbytes
        for name, (rows, dtype, *shape) in self.arrays.items():
            numbers = (count if rows == "scenes" else int(self.starts[-1])) * math.prod(shape)
            array = np.frombuffer(content, dtype, numbers, at).reshape(-1, *shape)
            setattr(self, name, array)
            at += array.nbytes
        return True

    def store(self):
        """Keeps the index in the first place that can be written, whole or not at all."""
        text = json.dumps({"stamp": self.stamp, "scenes": self.scenes, "problems": self.problems})
        text = text.encode() + b" " * (-len(text) % 8)      # JSON is ASCII
        parts = [len(text).to_bytes(8, "little"), text,
                 *(getattr(self, name).tobytes() for name in ("starts", *self.arrays))]
        body = b"".join(parts)
        for place in self.places():
            # a name of its own: all ranks may be at it
            unfinished = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
            try:
                unfinished.write_bytes(zlib.crc32(body).to_bytes(8, "little") + body)
                os.replace(unfinished, place)
                return
            except OSError:         # a read-only folder, a full disk: the next place, or none
                with suppress(OSError):
                    unfinished.unlink()

    # -- read

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
    """The index of a raw shard; see Index.

    frames             int32 (views): frame numbers, ascending in a scene
    blocks, sizes      int32 (views, 2): tar block and bytes of image and depth; block 0: no depth
    fov, depth_scale   float64 (scenes): radians; the factor of the stored depths
    """
    arrays = {**Index.arrays, "fov": ("scenes", np.float64), "depth_scale": ("scenes", np.float64),
              "frames": ("views", np.int32), "blocks": ("views", np.int32, 2),
              "sizes": ("views", np.int32, 2)}
    arrays["side"] = arrays.pop("side")     # the narrow ones last: all lie aligned in the file

    def found(self, window, problems):
        members, entries, sides = {}, {}, {}
        for name, offset, size in self.members(window, problems):
            match = MEMBER.fullmatch(name)
            if not match:
                folder = "/".join(name.split("/")[:2])
                problems[f"{self.name}: {folder}", "member of another name, ignored"] += 1
                continue
            scene, frame, kind = match[1], int(match[2]), KINDS.get(match[3], IMAGE)
            view = members.setdefault(scene, {}).setdefault(frame, [(0, 0)] * 3)
            view[kind] = offset // BLOCK, size
            if kind == METADATA and size <= MAX_METADATA:
                entries.setdefault(scene, {})[frame] = window.read(offset, size)
            if kind == IMAGE and not sides.get(scene):
                sides[scene] = short_side(window.read(offset, min(size, MAX_METADATA)))
        # departs: the reference hands on a scene when the next begins, and never the last; one that
        # is damaged ends its stream
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
            yield scene, {**cameras, "frames": frames, "blocks": table[..., 0],
                          "sizes": table[..., 1], "side": sides[scene]}

    def cameras(self, scene, frames, entries):
        """c2w (n, 3, 4), fov, depth_scale and radius of a scene. entries: {frame: JSON}, in the
        order in which they are stored. Raises Damaged."""
        parsed = []
        for frame in frames:
            try:
                parsed.append(json.loads(entries[frame]))
            except (ValueError, RecursionError) as err:
                raise Damaged(f"{scene}/frame{frame:06}_metadata.json",
                              "metadata is not JSON") from err
        first = next(frame for frame in entries if frame in frames)
        try:
            c2w, fov, depth_scale = CAMERAS[self.layout](parsed, frames.index(first))
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


WITHOUT_DEPTH = "view without depth in a scene that has depths, left out"


def usable_frames(scene, views):
    """(frames of a scene that are its views, ascending; how many were left out for want of depth).

    views: {frame: (block, size) of the three kinds}. Raises Damaged where the scene cannot be used.
    """
    frames = sorted(views)
    blocks, sizes = np.moveaxis(np.array([views[frame] for frame in frames]), 2, 0)     # (n, 3)
    has_image, has_depth, has_metadata = (blocks > 0).T
    # unknown depth beside known would do in most modes, but not where a viewer's scale is taken
    keep = has_image & (has_depth | ~has_depth[has_image].any())
    reason = ("the images are not those of the cameras" if (has_image != has_metadata).any() else
              "a member is too large" if (sizes > LIMITS).any() else
              "fewer than two views" if has_image.sum() < 2 else
              "fewer than two views have depth" if keep.sum() < 2 else "")
    if reason:
        raise Damaged(scene, reason)
    return [frame for frame, kept in zip(frames, keep) if kept], int(has_image.sum() - keep.sum())


def short_side(data):
    """The short side in pixels of the image that begins with `data`; 0 where it cannot be told."""
    try:
        return min(Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).size)
    except Exception:           # on damaged bytes Pillow raises anything, SyntaxError included
        return 0


class EncodedIndex(Index):
    """The index of a shard that `prepare.py encode` wrote; see Index.

    moments_at, clip_at   int64 (scenes): byte of the first view's moments (2c, h, w) and CLIP
                          embedding (d,), float16 both; those of the others follow
    latent                int32 (scenes, 4): 2c, h, w, d
    fov, scale            float64 (views): radians; the depth quantile of "viewer" normalisation
    nearplane             float64 (scenes), nan without depth
    blend                 int32 (scenes): 1 or 0 the quantile_blend of `scale`, -1 not known
    """
    arrays = {**Index.arrays, "fov": ("views", np.float64), "scale": ("views", np.float64),
              "nearplane": ("scenes", np.float64), "moments_at": ("scenes", np.int64),
              "clip_at": ("scenes", np.int64), "latent": ("scenes", np.int32, 4),
              "blend": ("scenes", np.int32)}
    arrays["side"] = arrays.pop("side")     # the narrow ones last: all lie aligned in the file

    def found(self, window, problems):
        for name, offset, size in self.members(window, problems):
            match = ENCODED_MEMBER.fullmatch(name)
            try:
                if not match:
                    raise ValueError("member of another name, ignored")
                scene = encoded_scene(window, offset, size)
            except ValueError as err:
                problems[f"{self.name}: {name}", str(err)] += 1
                continue
            yield match[1], scene


def encoded_scene(window, offset, size):
    """One scene's entries of EncodedIndex, from its safetensors. Raises ValueError."""
    length = int.from_bytes(window.read(offset, 8), "little")
    if size > MAX_SCENE or not 2 <= length <= min(size - 8, MAX_METADATA):
        raise ValueError("no safetensors, or too large")
    try:
        header = json.loads(window.read(offset + 8, length))
        spans = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                 for name, entry in header.items() if name != "__metadata__"}
        numbers = {name: float(header["__metadata__"][name]) for name in ("radius", "nearplane")}
        blend = BLEND.get(header["__metadata__"].get("quantile_blend"), -1)
        n = spans["c2w"][1][0]
        shapes = {"moments": (n, *spans["moments"][1][1:]), "clip": (n, *spans["clip"][1][1:]),
                  "c2w": (n, 4, 4), "fov": (n,), "scale": (n,)}
        for name, shape in shapes.items():
            dtype, stored, start, end = spans[name]
            if (stored != shape or dtype not in FLOATS
                    or not all(type(k) is int and 0 <= k < MAX_SCENE for k in (*shape, start, end))
                    or end - start != math.prod(shape) * FLOATS[dtype]().itemsize
                    or 8 + length + end > size):
                raise ValueError(f"{name} is {dtype}{list(stored)}, not of {n} views")
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError("its header is not that of an encoded scene") from err
    if n < 2:
        raise ValueError("fewer than two views")
    if spans["moments"][0] != "F16" or spans["clip"][0] != "F16":
        raise ValueError("moments and clip are not float16")
    latent = (*shapes["moments"][1:], *shapes["clip"][1:])
    if len(latent) != 4 or not all(latent):
        raise ValueError("moments are not (n, 2c, h, w), or clip is not (n, d)")
    first = offset + 8 + length
    small = {}
    for name in ("c2w", "fov", "scale"):
        dtype, shape, start, end = spans[name]
        values = np.frombuffer(window.read(first + start, end - start), FLOATS[dtype])
        small[name] = values.reshape(shape).astype(np.float64)
    check_encoded(**small, **numbers)
    return {**small, **numbers, "c2w": small["c2w"][:, :3], "latent": latent, "blend": blend,
            "side": min(latent[1:3]) * LATENT_SHRINK, "moments_at": first + spans["moments"][2],
            "clip_at": first + spans["clip"][2]}


def check_encoded(c2w, fov, scale, radius, nearplane):
    """Raises ValueError where a number of an encoded scene cannot be used; nan is an unknown scale
    or near plane."""
    if not np.isfinite(c2w).all() or not np.isfinite(fov).all():
        raise ValueError("a camera is not finite")
    check_cameras(c2w)
    if not ((fov > 0) & (fov < np.pi)).all():
        raise ValueError("a field of view is not between 0 and pi")
    if not 0 <= radius < math.inf or math.isinf(nearplane) or np.isinf(scale).any():
        raise ValueError("radius, nearplane or a scale is not finite")
