"""The index of a shard: where its members lie, and all its cameras. LazyTensor once, then mapped.

Raw shards are ZeroNVS's (arXiv:2310.17994): tars of `category/scene/frame000001.png`, `_depth.png`
and `_metadata.json`. Encoded shards are ours: a member `category/scene.safetensors` for every
scene, with what the frozen networks make of its views. Cameras become OpenGL camera-to-world here.
Letters: `n` views of a scene, `c h w` channels, height and width of a latent, `d` of an embedding.
"""

import hashlib
import json
import math
import os
import re
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import camera
from shards.files import INDEX_SUFFIX, Damaged, TarError, Window, cache_folder
from shards.tar import BLOCK, tar_members
from runtime.foreign import read_file, write_safetensors

MAX_MEMBER = 1 << 26                # bytes of an image or depth member
MAX_METADATA = 1 << 16              # bytes of a camera's JSON, of an encoded scene's header
MAX_SCENE = 1 << 31                 # bytes of an encoded scene
INDEX_VERSION = 2
RIGID = 1e-3                        # largest entry of R @ R.T - 1 of a rotation
SQUARE_PIXELS = 1e-4                # largest relative difference of fx and fy
IMAGE, DEPTH, METADATA = range(3)   # kinds of member
KINDS = {"_depth.png": DEPTH, "_metadata.json": METADATA}
LIMITS = (MAX_MEMBER, MAX_MEMBER, MAX_METADATA)
MEMBER = re.compile(r"(?:\./)?([^/]+/[^/]+)/frame(\d{1,9})"
                    r"(\.png|\.jpe?g|\.webp|_depth\.png|_metadata\.json)")
ENCODED_MEMBER = re.compile(r"(?:\./)?([^/]+/[^/]+)\.safetensors")
FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}     # safetensors' names


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


CAMERAS = {"co3d": co3d_cameras, "re10k": re10k_cameras, "acid": re10k_cameras}      # by format


# ---- index

class Index:
    """What is known of one shard: kept in a file, whose arrays are mapped when they are used.

    file      a LocalFile or WebFile
    scenes    names `category/scene` of the usable ones, as stored
    starts    (scenes + 1): views of scene i are rows starts[i]:starts[i + 1] of the arrays of views
    radius    float64 (scenes)
    c2w       float64 (views, 3, 4), OpenGL
    problems  [where, reason, count] of all that is left out
    """

    def __init__(self, file, keep=True):
        """keep=False neither looks for a kept index nor keeps this one: the shard is read."""
        self.file, self.name = file, file.name
        self.stamp = [INDEX_VERSION, *file.stamp]
        if not keep or not any(self.load(place) for place in self.places()):
            arrays, self.scenes, self.problems = self.build()
            self.__dict__.update(arrays)
            if keep:
                self.store(arrays)

    def places(self):
        """Where the index may be kept: beside the shard, else in the user's cache folder."""
        suffix = f".{self.layout}{INDEX_SUFFIX}"
        kept = hashlib.sha256(os.fsencode(os.path.abspath(self.file.path))).hexdigest()[:32]
        beside = [] if "://" in self.file.path else [Path(self.file.path + suffix)]
        return [*beside, cache_folder() / (kept + suffix)]

    def load(self, place):
        """Takes a kept index; False when there is none, or it is old or damaged."""
        try:
            stored = read_file(place)
            meta = json.loads(stored.meta["index"])
            if meta["stamp"] == self.stamp:
                self.__dict__.update({name: stored[name].numpy() for name in self.arrays})
                self.scenes, self.problems = meta["scenes"], meta["problems"]
            return meta["stamp"] == self.stamp
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def store(self, arrays):
        """Keeps the index in the first place that can be written, whole or not at all."""
        meta = {"stamp": self.stamp, "scenes": self.scenes, "problems": self.problems}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for place in self.places():
            # a name of its own: all ranks may be at it
            unfinished = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_safetensors(unfinished, tensors, {"index": json.dumps(meta)})
                os.replace(unfinished, place)
                return
            except OSError:         # a read-only folder, a full disk: the next place, or none
                with suppress(OSError):
                    unfinished.unlink()

    def members(self, window, problems):
        """tar_members that counts what ends it instead of raising it."""
        try:
            yield from tar_members(window)
        except TarError as err:
            problems[str(err), "damaged archive"] += 1

    def read(self, offset, size, where):
        """Bytes of this shard. Raises Damaged."""
        try:
            data = self.file.read(offset, size)
        except OSError as err:
            raise Damaged(where, "cannot be read", err.strerror or str(err)) from err
        if len(data) != size:
            raise Damaged(where, "the shard is shorter than its index")
        return data

    def scene_of(self, row):
        """The name of the scene that a view belongs to."""
        return self.scenes[int(np.searchsorted(self.starts, row, side="right")) - 1]


class RawIndex(Index):
    """The index of a raw shard; see Index.

    frames             int32 (views): frame numbers, ascending in a scene
    blocks, sizes      int32 (views, 2): tar block and bytes of image and depth; block 0: no depth
    fov, depth_scale   float64 (scenes): radians; the factor of the stored depths
    """
    arrays = ("starts", "frames", "blocks", "sizes", "c2w", "fov", "depth_scale", "radius")

    def __init__(self, file, layout, keep=True):
        self.layout = layout
        super().__init__(file, keep)

    def build(self):
        """(arrays, scenes, problems) from one pass. What cannot be used goes to `problems`."""
        found, first, entries, problems = {}, {}, {}, Counter()
        window = Window(self.file)
        for name, offset, size in self.members(window, problems):
            match = MEMBER.fullmatch(name)
            if not match:
                folder = "/".join(name.split("/")[:2])
                problems[f"{self.name}: {folder}", "member of another name, ignored"] += 1
                continue
            scene, frame, kind = match[1], int(match[2]), KINDS.get(match[3], IMAGE)
            view = found.setdefault(scene, {}).setdefault(frame, [(0, 0)] * 3)
            view[kind] = offset // BLOCK, size
            if kind == METADATA and size <= MAX_METADATA:
                first.setdefault(scene, frame)
                entries[scene, frame] = window.read(offset, size)
        columns = {name: [] for name in self.arrays}
        scenes, columns["starts"] = [], [0]
        # departs: the reference hands on a scene when the next begins, and never the last; one that
        # is damaged ends its stream
        for scene, views in found.items():
            try:
                check_members(scene, list(views.values()))
                frames = sorted(frame for frame in views if views[frame][IMAGE][0])
                cameras = self.cameras(scene, frames, entries, first)
            except Damaged as err:
                problems[f"{self.name}: {err.where}", err.reason] += 1
                continue
            scenes.append(scene)
            columns["starts"].append(columns["starts"][-1] + len(frames))
            columns["frames"] += frames
            for name, part in (("blocks", 0), ("sizes", 1)):
                columns[name] += [[views[f][kind][part] for kind in (IMAGE, DEPTH)] for f in frames]
            for name, value in cameras.items():
                columns[name].append(value)
        columns["c2w"] = np.concatenate([np.empty((0, 3, 4)), *columns["c2w"]])
        counts = {name: np.array(columns[name], np.int32) for name in ("frames", "blocks", "sizes")}
        arrays = {name: np.array(columns[name], np.float64) for name in self.arrays} | counts
        arrays["starts"] = np.array(columns["starts"], np.int64)
        for name in ("blocks", "sizes"):
            arrays[name] = arrays[name].reshape(-1, 2)
        return arrays, scenes, [[*problem, count] for problem, count in problems.items()]

    def cameras(self, scene, frames, entries, first):
        """c2w (n, 3, 4), fov, depth_scale and radius of a scene. Raises Damaged."""
        parsed = []
        for frame in frames:
            try:
                parsed.append(json.loads(entries[scene, frame]))
            except (ValueError, RecursionError) as err:
                raise Damaged(f"{scene}/frame{frame:06}_metadata.json",
                              "metadata is not JSON") from err
        try:
            c2w, fov, depth_scale = CAMERAS[self.layout](parsed, frames.index(first[scene]))
        except ValueError as err:
            raise Damaged(scene, str(err)) from err
        return {"c2w": c2w[:, :3].numpy(), "fov": fov, "depth_scale": depth_scale,
                "radius": camera.scene_geometry(c2w).radius}

    def where(self, row, kind):
        """`shard.tar: category/scene/frame000001_depth.png`, of a row of the arrays."""
        suffix = ("", "_depth.png")[kind]
        return f"{self.name}: {self.scene_of(row)}/frame{self.frames[row]:06}{suffix}"

    def member(self, row, kind):
        """(bytes, where) of the image or depth of a view. Raises Damaged."""
        where = self.where(row, kind)
        offset, size = int(self.blocks[row, kind]) * BLOCK, int(self.sizes[row, kind])
        return self.read(offset, size, where), where


def check_members(scene, members):
    """Raises Damaged where a scene is not complete. members: (block, size) of 3 kinds, n times."""
    blocks, sizes = np.moveaxis(np.array(members), 2, 0)                # each (n, 3)
    has_image, has_depth, has_metadata = (blocks > 0).T
    reason = ("the images are not those of the cameras" if (has_image != has_metadata).any() else
              "depth is missing for some views" if (has_image & ~has_depth & has_depth.any()).any()
              else "fewer than two views" if has_image.sum() < 2 else
              "a member is too large" if (sizes > LIMITS).any() else "")
    if reason:
        raise Damaged(scene, reason)


class EncodedIndex(Index):
    """The index of a shard that `prepare.py encode` wrote; see Index.

    moments_at, clip_at   int64 (scenes): byte of the first view's moments (2c, h, w) and CLIP
                          embedding (d,), float16 both; those of the others follow
    latent                int32 (scenes, 4): 2c, h, w, d
    fov, scale            float64 (views): radians; the depth quantile of "viewer" normalisation
    nearplane             float64 (scenes), nan without depth
    """
    layout = "encoded"
    arrays = ("starts", "moments_at", "clip_at", "latent", "c2w", "fov", "scale", "radius",
              "nearplane")

    def build(self):
        columns, scenes, problems = {name: [] for name in self.arrays}, [], Counter()
        window = Window(self.file)
        starts = [0]
        for name, offset, size in self.members(window, problems):
            match = ENCODED_MEMBER.fullmatch(name)
            try:
                if not match:
                    raise ValueError("member of another name, ignored")
                scene = encoded_scene(window, offset, size)
            except ValueError as err:
                problems[f"{self.name}: {name}", str(err)] += 1
                continue
            scenes.append(match[1])
            starts.append(starts[-1] + len(scene["c2w"]))
            for key, value in scene.items():
                columns[key].append(value)
        arrays = {"starts": np.array(starts, np.int64), "c2w": np.concatenate(
            [np.empty((0, 3, 4)), *columns["c2w"]])}
        for name in ("fov", "scale"):
            arrays[name] = np.concatenate([np.empty(0), *columns[name]])
        for name, dtype in (("moments_at", np.int64), ("clip_at", np.int64), ("latent", np.int32),
                            ("radius", np.float64), ("nearplane", np.float64)):
            arrays[name] = np.array(columns[name], dtype)
        arrays["latent"] = arrays["latent"].reshape(-1, 4)
        return arrays, scenes, [[*problem, count] for problem, count in problems.items()]


def encoded_scene(window, offset, size):
    """One scene's entries of EncodedIndex, from its safetensors. Raises ValueError."""
    length = int.from_bytes(window.read(offset, 8), "little")
    if size > MAX_SCENE or not 2 <= length <= min(size - 8, MAX_METADATA):
        raise ValueError("no safetensors, or too large")
    try:
        header = json.loads(window.read(offset + 8, length))
        spans = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                 for name, entry in header.items() if name != "__metadata__"}
        told = {name: float(header["__metadata__"][name]) for name in ("radius", "nearplane")}
        n = spans["c2w"][1][0]
        shapes = {"moments": (n, *spans["moments"][1][1:]), "clip": (n, *spans["clip"][1][1:]),
                  "c2w": (n, 4, 4), "fov": (n,), "scale": (n,)}
        for name, shape in shapes.items():
            dtype, stored, start, end = spans[name]
            if (stored != shape or dtype not in FLOATS or not 0 <= start
                    or end - start != math.prod(shape) * FLOATS[dtype]().itemsize
                    or 8 + length + end > size):
                raise ValueError(f"{name} is {dtype}{list(stored)}, not of {n} views")
        if n < 2:
            raise ValueError("fewer than two views")
        if spans["moments"][0] != "F16" or spans["clip"][0] != "F16":
            raise ValueError("moments and clip are not float16")
        latent = (*shapes["moments"][1:], *shapes["clip"][1:])
        if len(latent) != 4:
            raise ValueError("moments are not (n, 2c, h, w), or clip is not (n, d)")
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as err:
        raise ValueError("its header is not that of an encoded scene") from err
    first = offset + 8 + length
    small = {}
    for name in ("c2w", "fov", "scale"):
        dtype, shape, start, end = spans[name]
        values = np.frombuffer(window.read(first + start, end - start), FLOATS[dtype])
        small[name] = values.reshape(shape).astype(np.float64)
    if not np.isfinite(small["c2w"]).all() or not np.isfinite(small["fov"]).all():
        raise ValueError("a camera is not finite")
    check_rigid(small["c2w"][:, :3, :3])
    return {**small, **told, "c2w": small["c2w"][:, :3], "latent": latent,
            "moments_at": first + spans["moments"][2], "clip_at": first + spans["clip"][2]}
