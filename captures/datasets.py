"""Captures as they are published: CO3D, RealEstate10K, ACID.

A `find_` function lists the scenes of a format as `Capture`s, at a glance; each of them then reads
its `View`s: photos with cameras, and perhaps depth. What cannot be used is counted by its cause,
and stops nothing unless nothing is left. Letters: `n` points, `v` views.
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

from captures.resample import DepthMap, LeftOut, Points, View, check_pose
from views import cameras, colmap
from views.colmap import Lens

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")
VIDEO_NAME = re.compile(r"(?:v=|youtu\.be/)([\w-]+)")       # in RealEstate10K's links
GZIP = b"\x1f\x8b"          # its first bytes
MICROSECONDS = 1e-6         # RealEstate10K's unit of time
NDC_FORMAT = "ndc_norm_image_bounds"        # of CO3D's annotations that do not tell theirs


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


def found_in(places, find):
    """(the Captures that find(place, Counter) yields for each place, Counter of those left out).

    A place that cannot be used is passed over with its cause; the first cause is raised where none
    can: ValueError, OSError.
    """
    captures, out, errors = [], Counter(), []
    for place in places:
        try:
            captures += find(place, out)
        except (ValueError, OSError) as err:
            errors.append(err)
    if errors and not captures:
        raise errors[0]
    return captures, +out + Counter(f"x {err}" for err in errors)


def photo_at(folder, name):
    """The path of a photo that a file names; Blender leaves the suffix out, Windows has \\."""
    plain = str(folder / name.replace("\\", "/"))
    tried = (folder / name, *(Path(plain + suffix) for suffix in ("", *IMAGE_SUFFIXES)))
    return next(filter(Path.is_file, tried), folder / name)


def opengl(w2c, where):
    """OpenCV world-to-camera (4, 4) -> OpenGL camera-to-world. LeftOut unless it is rigid."""
    check_pose(w2c, where)
    return cameras.opengl(w2c).numpy()


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

    def find(category, out):
        for sequence in annotations(root / category / "sequence_annotations.jgz"):
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
                yield Capture(f"{category}/{name}", count, read)

    return found_in(categories or known, find)


def annotations(path, kind=dict, hook=None):
    """The objects in a .jgz, a gzipped JSON list of them. Raises ValueError, OSError."""
    try:
        data = path.read_bytes()
        found = json.loads(gzip.decompress(data) if data[:2] == GZIP else data, object_hook=hook)
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError) as err:
        raise ValueError(f"{path} is damaged: {err}") from err
    if not isinstance(found, list) or not all(isinstance(each, kind) for each in found):
        raise ValueError(f"{path} is no JSON list of objects")
    return found


@functools.lru_cache(maxsize=1)
def co3d_frames(path):
    """{sequence: JSON texts of its frames} of a category, whose objects would take a gigabyte."""
    frames = {}
    for name, text in annotations(path, tuple, lambda found: (
            str(found["sequence_name"]), json.dumps(found)) if "sequence_name" in found else found):
        frames.setdefault(name, []).append(text)
    return frames


def read_co3d(root, category, name, depth):
    """(Views, LeftOuts) of a sequence, in the order of its frame numbers."""
    path = root / category / "frame_annotations.jgz"
    try:
        frames = [*map(json.loads, co3d_frames(path)[name])]
    except KeyError as err:
        raise LeftOut(root / category / name, "no frames in frame_annotations.jgz") from err
    except (ValueError, OSError) as err:
        raise LeftOut(path, "the annotations cannot be read", err) from err
    frames.sort(key=frame_number)
    return collect(functools.partial(co3d_view, root, depth), frames)


def frame_number(frame):
    number = frame.get("frame_number")
    return number if isinstance(number, float | int) else 0


@np.errstate(over="raise", invalid="raise")
def co3d_view(root, depth, frame):
    """The View of a frame annotation. Raises LeftOut.

    PyTorch3D's coordinates: x to the left, y up. NDC are half the image's sides, or of both axes
    half its shorter side.
    """
    where = frame["sequence_name"], frame.get("frame_number")
    try:
        where = root / frame["image"]["path"]
        height, width = frame["image"]["size"]
        pose = frame["viewpoint"]
        kind = (pose.get("intrinsics_format") or NDC_FORMAT).lower()
        unit = {"ndc_norm_image_bounds": (0.5, 0.5),
                "ndc_isotropic": (min(width, height) / 2 / width, min(width, height) / 2 / height)}
        focal, middle = (np.array(pose[key], float).reshape(2) * unit[kind]
                         for key in ("focal_length", "principal_point"))
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = np.array(pose["R"], float).T, pose["T"]
        w2c[:2] *= -1               # to OpenCV's x right, y down
        entry, stored = frame.get("depth") or {}, None
        if depth and entry.get("path"):
            mask = root / entry["mask_path"] if entry.get("mask_path") else None
            stored = DepthMap(root / entry["path"], float(entry["scale_adjustment"]), True, mask)
        sides = np.array([width, height, width, height], float)
        lens = Lens("PINHOLE", width, height, tuple((sides * [*focal, *(0.5 - middle)]).tolist()))
        if not 0 < width < colmap.MOST_PIXELS or stored and not 0 < stored.unit < math.inf:
            raise ValueError("the size or scale_adjustment is not positive")
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as err:
        raise LeftOut(where, "the annotation cannot be used", repr(err)) from err
    if depth and not stored:
        raise LeftOut(where, "no depth")
    return View(str(where), where, opengl(w2c, where), lens, stored,
                black="hidden test frame (black)")


# ---- RealEstate10K, ACID

def find_re10k(kind, texts, frames, videos, models):
    """(Captures of RealEstate10K's or ACID's camera texts, Counter of clips left out).

    kind: re10k or acid, the category. frames: folder of CLIP/TIMESTAMP.png or .jpg; or videos: of
    VIDEO.mp4, .webm, ..., VIDEO as in the texts' links; the other is "". models: folder of COLMAP
    models CLIP/ whose images have the names of the frames, "" for no depth.
    Raises FileNotFoundError, and ValueError where ffmpeg is needed and missing.
    """
    all_texts = sorted(Path(texts).glob("*.txt"))
    if not all_texts:
        raise FileNotFoundError(f"{texts}: no camera text (CLIP.txt) there")
    for folder in filter(None, (frames, videos, models)):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    if videos and not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise ValueError("--videos needs ffmpeg, which is not found: install it, or extract the "
                         "frames and give --frames")
    known = {path.stem: path for path in sorted(Path(videos).iterdir())
             if path.suffix.lower() in VIDEO_SUFFIXES} if videos else {}
    captures, out = [], Counter()
    for path in all_texts:
        link, *rows = path.read_bytes().decode("utf-8-sig", "replace").split("\n")
        video = VIDEO_NAME.search(link)
        place = known.get(video and video[1]) if videos else Path(frames) / path.stem
        model = Path(models) / path.stem if models else None
        if not place or not place.exists():
            out["clips without a video" if videos else "clips without a folder of frames"] += 1
        elif model and not colmap.model_suffix(model):
            out["clips without a COLMAP model"] += 1
        else:
            captures.append(Capture(f"{kind}/{path.stem}", sum(map(bool, map(str.strip, rows))),
                                    functools.partial(read_re10k, path, place, model)))
    return captures, out


def read_re10k(path, place, model):
    """(Views, LeftOuts) of a clip, in the order of time: cameras of the text, or of a COLMAP model,
    in whose unit its sparse depth is. Raises LeftOut, OSError."""
    try:
        rows = sorted(cameras.re10k_rows(path))
        times = [int(row[0]) for row in rows]
    except (ValueError, OverflowError) as err:      # a time may be nan or infinite
        raise LeftOut(path, "the camera text is damaged", err) from err
    found = read_model(model) if model else None
    images = {Path(image.name).stem: image for image in found.images} if model else {}

    def view(number):
        row, time = rows[number], times[number]
        where = f"{path}: {time}"
        if time in times[:number]:
            raise LeftOut(where, "a second camera of the same time")
        if any(row[5:7]):
            raise LeftOut(where, "the lens is distorted", f"k1 {row[5]:g}, k2 {row[6]:g}")
        w2c, lens, depth = cameras.re10k_w2c(row), Lens("PINHOLE", 1, 1, tuple(row[1:5])), None
        if model:
            image = images.get(str(time))
            if not image:
                raise LeftOut(where, "no image of the COLMAP model")
            w2c, lens, depth = image.w2c, found.lenses[image.camera], points(found, image)
        video = {} if place.is_dir() else {"time": time * MICROSECONDS}
        photo = place if video else photo_at(place, str(time))
        return View(where, photo, opengl(w2c, where), lens, depth, **video)

    return collect(view, range(len(rows)))


def read_model(folder):
    """The COLMAP model in a folder. Raises LeftOut, OSError."""
    try:
        return colmap.read_model(folder)
    except ValueError as err:
        raise LeftOut(folder, "the COLMAP model cannot be used", err) from err


def points(model, image):
    """The Points of one of a COLMAP model's images."""
    lens, (pixel, depth) = model.lenses[image.camera], model.sparse_depth(image)
    return Points(pixel / (lens.width, lens.height), depth)
