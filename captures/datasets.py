"""Captures as they are published or made: CO3D, RealEstate10K, ACID, COLMAP, nerfstudio.

A `find_` function lists the scenes of a format as `Capture`s, at a glance; each of them then reads
its `View`s: photos with cameras, and perhaps depth. Letters: `n` points, `v` views.
"""

import functools
import gzip
import json
import math
import re
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import camera
from captures import colmap
from views import paths
from captures.resample import DepthMap, LeftOut, Points, View, check_pose

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")
VIDEO_NAME = re.compile(r"(?:v=|youtu\.be/)([\w-]+)")       # in RealEstate10K's links
MICROSECONDS = 1e-6         # RealEstate10K's unit of time
MILLIMETRES = 1e-3          # nerfstudio's unit of depth
# nerfstudio's keys that are not 0 where a lens is distorted, and models that are pinholes then
DISTORTIONS = "k1", "k2", "k3", "k4", "p1", "p2", "distortion_params", "is_fisheye"
UNDISTORTED = "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"
SAME_SHAPE = 0.05           # largest relative difference of one path in two reconstructions
BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Capture:
    """A scene that has not been read yet."""
    name: str                       # category/scene
    count: int                      # views, before any is left out
    read: functools.partial         # () -> (Views in order, list of LeftOut); raises LeftOut


def collect(make, items):
    """(results of make(item), list of LeftOut)."""
    found, out = [], []
    for item in items:
        try:
            found.append(make(item))
        except LeftOut as err:
            out.append(err)
    return found, out


def opengl(w2c, where):
    """OpenCV world-to-camera (4, 4) -> OpenGL camera-to-world. LeftOut unless it is rigid."""
    w2c = torch.from_numpy(w2c)
    check_pose(w2c, where)
    return camera.opengl_from_opencv(torch.linalg.inv(w2c)).numpy()


# ---- CO3D

def find_co3d(root, categories, quality, depth):
    """(Captures of CO3D v2 as downloaded, Counter of sequences left out).

    categories: names, or none for all that are there. quality: the least viewpoint_quality_score.
    Raises FileNotFoundError, and ValueError for damaged annotations.
    """
    root = Path(root)
    known = sorted(path.parent.name for path in root.glob("*/frame_annotations.jgz"))
    if not known:
        raise FileNotFoundError(f"{root}: no folder in it has a frame_annotations.jgz")
    for name in categories:
        if name not in known:
            raise FileNotFoundError(f"{root / name / 'frame_annotations.jgz'} is missing; "
                                    f"categories that have it: {', '.join(known)}")
    captures, out = [], Counter()
    for category in categories or known:
        path = root / category / "sequence_annotations.jgz"
        for sequence, *_ in objects(unzipped(path), path):
            name = str(sequence.get("sequence_name"))
            score = sequence.get("viewpoint_quality_score")
            images = root / category / name / "images"
            if not images.is_dir():
                out["sequences whose images are not there"] += 1
            elif not isinstance(score, float | int) or not score >= quality:
                out[f"sequences with a viewpoint quality below {quality:g}, or none"] += 1
            else:
                count = sum(1 for _ in images.iterdir())
                read = functools.partial(read_co3d, root, category, name, depth)
                captures.append(Capture(f"{category}/{name}", count, read))
    return captures, out


def read_co3d(root, category, name, depth):
    """(Views, LeftOuts) of a sequence, in the order of its frame numbers."""
    text, places = co3d_frames(root / category / "frame_annotations.jgz")
    if name not in places:
        raise LeftOut(root / category / name, "no frames in frame_annotations.jgz")
    frames = [json.loads(text[start:end]) for start, end in places[name]]
    frames.sort(key=frame_number)
    return collect(functools.partial(co3d_view, root, depth), frames)


def frame_number(frame):
    number = frame.get("frame_number")
    return number if isinstance(number, float | int) else 0


@functools.lru_cache(maxsize=1)
def co3d_frames(path):
    """(text of a category's frame annotations, {sequence: [(start, end) of a frame in it]}).

    The text, rather than its objects: a category's take a gigabyte.
    """
    text, places = unzipped(path), {}
    for frame, start, end in objects(text, path):
        places.setdefault(str(frame.get("sequence_name")), []).append((start, end))
    return text, places


def co3d_view(root, depth, frame):
    """The View of a frame annotation. Raises LeftOut.

    PyTorch3D's coordinates: x to the left, y up. NDC are half the image's sides, or of both axes
    half its shorter side.
    """
    where = frame.get("sequence_name"), frame.get("frame_number")
    try:
        where = root / frame["image"]["path"]
        height, width = frame["image"]["size"]
        pose = frame["viewpoint"]
        unit = {"ndc_norm_image_bounds": (0.5, 0.5),
                "ndc_isotropic": (min(width, height) / 2 / width, min(width, height) / 2 / height)}
        kind = pose["intrinsics_format"].lower()
        if kind not in unit:
            raise LeftOut(where, "intrinsics_format is not known", f"{kind!r}, known: {list(unit)}")
        focal, middle = (np.array(pose[key], float).reshape(2) * unit[kind]
                         for key in ("focal_length", "principal_point"))
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = np.array(pose["R"], float).T, pose["T"]
        w2c[:2] *= -1               # to OpenCV's x right, y down
        stored = None
        if depth:
            entry = frame.get("depth") or {}
            if not entry.get("path"):
                raise LeftOut(where, "no depth")
            mask = root / entry["mask_path"] if entry.get("mask_path") else None
            stored = DepthMap(root / entry["path"], float(entry["scale_adjustment"]), True, mask)
            if not 0 < stored.unit < math.inf:
                raise LeftOut(where, "scale_adjustment is not positive", stored.unit)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as err:
        raise LeftOut(where, "the annotation is not whole", err) from err
    except ValueError as err:
        if isinstance(err, LeftOut):
            raise
        raise LeftOut(where, "the annotation is not numbers", err) from err
    intrinsics = (*focal, *(0.5 - middle))
    return View(str(where), where, opengl(w2c, where), intrinsics, (width, height), stored)


def unzipped(path):
    """The text of a .jgz, gzipped JSON. Raises FileNotFoundError, ValueError."""
    try:
        return gzip.decompress(path.read_bytes()).decode()
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{path} is missing") from err
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is damaged: {err}") from err


def objects(text, path):
    """Yields (object, start, end) of a JSON list of objects, one at a time. Raises ValueError."""
    decoder, at = json.JSONDecoder(), BETWEEN.match(text).end() + 1
    if text[at - 1:at] != "[":
        raise ValueError(f"{path} is no JSON list")
    while True:
        start = BETWEEN.match(text, at).end()
        if text[start:start + 1] == "]":
            return
        try:
            found, at = decoder.raw_decode(text, start)
        except ValueError as err:
            raise ValueError(f"{path} is damaged: {err}") from err
        if not isinstance(found, dict):
            raise ValueError(f"{path} is no list of objects, at character {start}")
        yield found, start, at


# ---- RealEstate10K, ACID

def find_re10k(kind, cameras, frames, videos, models):
    """(Captures of RealEstate10K's or ACID's camera texts, Counter of clips left out).

    kind: re10k or acid, the category. frames: folder of CLIP/TIMESTAMP.png or .jpg; or videos: of
    VIDEO.mp4, .webm, ..., VIDEO as in the texts' links; the other is "". models: folder of COLMAP
    models CLIP/ whose images have the names of the frames, "" for no depth.
    Raises FileNotFoundError, and ValueError where ffmpeg is needed and missing.
    """
    texts = sorted(Path(cameras).glob("*.txt"))
    if not texts:
        raise FileNotFoundError(f"{cameras}: no camera text (CLIP.txt) there")
    for folder in filter(None, (frames, videos, models)):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    if videos and not shutil.which("ffmpeg"):
        raise ValueError("--videos needs ffmpeg, which is not found: install it, or extract the "
                         "frames and give --frames")
    known = {path.stem: path for path in sorted(Path(videos).iterdir())
             if path.suffix.lower() in VIDEO_SUFFIXES} if videos else {}
    captures, out = [], Counter()
    for path in texts:
        text = path.read_text(encoding="utf-8", errors="replace")
        link = VIDEO_NAME.search(text.split("\n", 1)[0])
        place = known.get(link[1] if link else "") if videos else Path(frames) / path.stem
        model = Path(models) / path.stem if models else None
        if not place or not place.exists():
            out["clips without a video" if videos else "clips without a folder of frames"] += 1
        elif model and not colmap.is_model(model):
            out["clips without a COLMAP model"] += 1
        else:
            read = functools.partial(read_re10k, path, place, model)
            count = sum(bool(line.strip()) for line in text.splitlines()[1:])
            captures.append(Capture(f"{kind}/{path.stem}", count, read))
    return captures, out


def read_re10k(path, place, model):
    """(Views, LeftOuts) of a clip, in the order of time. Raises LeftOut, OSError."""
    try:
        rows = paths.re10k_rows(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise LeftOut(path, "the camera text is damaged", err) from err
    frames = {}
    if place.is_dir():
        frames = {int(each.stem): each for each in sorted(place.iterdir())
                  if each.suffix.lower() in IMAGE_SUFFIXES and each.stem.isdecimal()}
    depths = re10k_depths(path, rows, model) if model else {}

    def view(row):
        if not math.isfinite(row[0]):
            raise LeftOut(path, "a time is not finite")
        time = int(row[0])
        where = f"{path}: {time}"
        if any(row[5:7]):
            raise LeftOut(where, "the lens is distorted")
        if model and time not in depths:
            raise LeftOut(where, "no image of the COLMAP model")
        video = {} if place.is_dir() else {"time": time * MICROSECONDS}
        photo = place if video else frames.get(time, place / f"{time}.png")
        return View(where, photo, opengl(re10k_w2c(row), where), tuple(row[1:5]),
                    depth=depths.get(time), **video)

    return collect(view, sorted(rows, key=lambda row: (not math.isfinite(row[0]), row[0])))


def re10k_w2c(row):
    """World-to-camera (4, 4), OpenCV, of one of RealEstate10K's rows."""
    return np.array([row[7:11], row[11:15], row[15:19], [0, 0, 0, 1]], float)


def re10k_depths(path, rows, model):
    """{time: Points} of a COLMAP model of a clip, in the clip's unit. Raises LeftOut.

    COLMAP's unit of length is any, so the paths of the two are compared.
    """
    try:
        images = {int(Path(image.name).stem): image for image in colmap.read(model)
                  if Path(image.name).stem.isdecimal()}
    except ValueError as err:
        raise LeftOut(model, "the COLMAP model cannot be used", err) from err
    w2c = np.array([(re10k_w2c(row), images[int(row[0])].w2c) for row in rows
                    if math.isfinite(row[0]) and int(row[0]) in images]).reshape(-1, 2, 4, 4)
    centres = -np.einsum("vkji,vkj->vki", w2c[..., :3, :3], w2c[..., :3, 3])    # (v, 2, 3)
    centres = centres[np.isfinite(centres).all((1, 2))]
    away = np.linalg.norm(centres - centres.mean(0), axis=2).T if len(centres) else np.zeros((2, 0))
    if not (away > 0).any(1).all():
        raise LeftOut(model, "the COLMAP model has no camera path to take the unit of length from")
    unit = away[0] @ away[1] / (away[1] @ away[1])
    misfit = np.linalg.norm(away[0] - unit * away[1]) / np.linalg.norm(away[0])
    if not misfit <= SAME_SHAPE:
        raise LeftOut(model, "the COLMAP model's camera path is not that of the text",
                      f"they differ by {misfit:.0%}, {SAME_SHAPE:.0%} are allowed")
    return {time: points(image, unit) for time, image in images.items()}


# ---- COLMAP

def points(image, unit=1.0):
    """The Points of a colmap.Image, depths times `unit`."""
    return Points(image.place / (image.camera.width, image.camera.height), image.depth * unit)


def find_colmap(scenes, images, depth):
    """(Captures of folders with a COLMAP model and its images, Counter of models left out).

    The model lies in sparse/0, sparse or the folder itself: of several the one of most images.
    images: name of the folder of images in each. Raises FileNotFoundError, ValueError.
    """
    captures, out = [], Counter()
    for scene in map(Path, scenes):
        models = [folder for folder in (*sorted(scene.glob("sparse/*")), scene / "sparse", scene)
                  if colmap.is_model(folder)]
        if not models:
            raise FileNotFoundError(f"{scene}: no COLMAP model (cameras, images, points3D; .bin or "
                                    ".txt) in sparse/0, sparse or the folder itself")
        if not (scene / images).is_dir():
            raise FileNotFoundError(f"{scene / images}: no such folder; --images names it")
        model = max(models, key=colmap.count)
        colmap.read_cameras(model)              # refuses lens distortion before any work
        out["smaller models of the same scene"] += len(models) - 1
        read = functools.partial(read_colmap, model, scene / images, depth)
        captures.append(Capture(f"colmap/{scene.resolve().name}", colmap.count(model), read))
    return captures, +out


def read_colmap(model, folder, depth):
    """(Views, LeftOuts) of a COLMAP model, by the images' names. Raises LeftOut, OSError."""
    def view(image):
        photo, lens = folder / image.name, image.camera
        intrinsics = (lens.fx / lens.width, lens.fy / lens.height,
                      lens.cx / lens.width, lens.cy / lens.height)
        return View(str(photo), photo, opengl(image.w2c, photo), intrinsics,
                    (lens.width, lens.height), points(image) if depth else None)

    try:
        return collect(view, colmap.read(model))
    except ValueError as err:
        raise LeftOut(model, "the COLMAP model cannot be used", err) from err


# ---- nerfstudio

def find_nerfstudio(scenes, depth):
    """(Captures of folders with a transforms.json, or of such files, empty Counter).

    Raises FileNotFoundError, and ValueError for damaged files and lens distortion.
    """
    captures = []
    for scene in map(Path, scenes):
        path = scene / "transforms.json" if scene.is_dir() else scene
        frames = len(transforms(path)["frames"])
        read = functools.partial(read_nerfstudio, path, depth)
        captures.append(Capture(f"nerfstudio/{path.resolve().parent.name}", frames, read))
    return captures, Counter()


def transforms(path):
    """The contents of a transforms.json. Raises FileNotFoundError, and ValueError also for lenses
    with distortion."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        frames = stored["frames"]
        for known in [{**stored, **frame} for frame in frames]:
            model = known.get("camera_model", "PINHOLE")
            bent = [key for key in DISTORTIONS if np.any(known.get(key) or 0)]
            if model not in UNDISTORTED or bent:
                raise ValueError(
                    f"the camera of {known.get('file_path')} is {model} with lens distortion "
                    f"({', '.join(bent) or 'of its kind'}); only pinholes can be read. Run colmap "
                    "image_undistorter on its COLMAP model, and `prepare.py colmap` on the result")
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{path} is missing") from err
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path} is no transforms.json: {type(err).__name__} {err}") from err
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err
    return stored


def read_nerfstudio(path, depth):
    """(Views, LeftOuts) of a transforms.json, in its order. Depth where any frame has it."""
    stored = transforms(path)
    depth = depth and any("depth_file_path" in frame for frame in stored["frames"])
    frames = [{**stored, **frame} for frame in stored["frames"]]
    return collect(functools.partial(nerfstudio_view, path.parent, depth), frames)


def nerfstudio_view(folder, depth, frame):
    """The View of a frame with the keys that all share. Raises LeftOut."""
    try:
        photo = folder / frame["file_path"]
        if not photo.is_file():                     # Blender's leave the suffix out
            named = (photo.with_name(photo.name + suffix) for suffix in IMAGE_SUFFIXES)
            photo = next(filter(Path.is_file, named), photo)
        c2w = paths.matrices([frame["transform_matrix"]])[0].numpy()
        width, height = ((frame["w"], frame["h"]) if "w" in frame and "h" in frame
                         else size_of(photo))
        if "fl_x" in frame:
            fx = float(frame["fl_x"])
        else:
            fx = width / 2 / math.tan(frame["camera_angle_x"] / 2)
        fy = float(frame.get("fl_y", fx))
        cx, cy = float(frame.get("cx", width / 2)), float(frame.get("cy", height / 2))
        if depth and "depth_file_path" not in frame:
            raise LeftOut(photo, "no depth")
        stored = DepthMap(folder / frame["depth_file_path"], MILLIMETRES) if depth else None
        intrinsics = fx / width, fy / height, cx / width, cy / height
        size = int(width), int(height)
    except (KeyError, TypeError, ZeroDivisionError) as err:
        raise LeftOut(folder, "a frame of transforms.json is not whole", err) from err
    except ValueError as err:
        if isinstance(err, LeftOut):
            raise
        raise LeftOut(folder, "a frame of transforms.json is not numbers", err) from err
    return View(str(photo), photo, c2w, intrinsics, size, stored)


def size_of(photo):
    """(width, height) of an image file. Raises LeftOut."""
    try:
        with Image.open(photo) as image:
            return image.size
    except FileNotFoundError as err:
        raise LeftOut(photo, "missing image") from err
    except Exception as err:    # on damaged bytes Pillow raises anything
        raise LeftOut(photo, "image cannot be decoded", err) from err
