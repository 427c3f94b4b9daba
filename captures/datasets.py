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
import torch

from camera import opengl_from_opencv
from captures.resample import DepthMap, LeftOut, Points, View, check_pose
from views import cameras, colmap
from views.colmap import Lens

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")
VIDEO_NAME = re.compile(r"(?:v=|youtu\.be/)([\w-]+)")       # in RealEstate10K's links
MICROSECONDS = 1e-6         # RealEstate10K's unit of time
NDC_FORMAT = "ndc_norm_image_bounds"        # of CO3D's annotations that do not tell theirs
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


def found_in(places, find):
    """(the Captures that find(place) lists for each place, Counter of what was passed over).

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


def opengl(w2c, where):
    """OpenCV world-to-camera (4, 4) -> OpenGL camera-to-world. LeftOut unless it is rigid."""
    w2c = torch.from_numpy(w2c)
    check_pose(w2c, where)
    return opengl_from_opencv(torch.linalg.inv(w2c)).numpy()


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
        """Yields the Captures of a category."""
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
                yield Capture(f"{category}/{name}", count, read)

    return found_in(categories or known, find)


def read_co3d(root, category, name, depth):
    """(Views, LeftOuts) of a sequence, in the order of its frame numbers."""
    path = root / category / "frame_annotations.jgz"
    try:
        text, places = co3d_frames(path)
    except (ValueError, OSError) as err:
        raise LeftOut(path, "the annotations cannot be read", err) from err
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
        if not (0 < width < colmap.MOST_PIXELS and 0 < height < colmap.MOST_PIXELS):
            raise LeftOut(where, "the annotation is not whole", f"its size is {width} x {height}")
        pose = frame["viewpoint"]
        unit = {"ndc_norm_image_bounds": (0.5, 0.5),
                "ndc_isotropic": (min(width, height) / 2 / width, min(width, height) / 2 / height)}
        kind = (pose.get("intrinsics_format") or NDC_FORMAT).lower()
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
    except LeftOut:
        raise
    except KeyError as err:
        raise LeftOut(where, "the annotation is not whole", f"{err} is missing") from err
    except (TypeError, AttributeError) as err:
        raise LeftOut(where, "the annotation is not whole", err) from err
    except (ValueError, OverflowError) as err:
        raise LeftOut(where, "the annotation is not numbers", err) from err
    shares = np.array([*focal, *(0.5 - middle)])
    lens = Lens("PINHOLE", width, height, tuple(shares * (width, height, width, height)))
    return View(str(where), where, opengl(w2c, where), lens, stored,
                black="hidden test frame (black)")


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
        text = path.read_bytes().decode("utf-8-sig", "replace")
        link = VIDEO_NAME.search(text.split("\n", 1)[0])
        place = known.get(link[1] if link else "") if videos else Path(frames) / path.stem
        model = Path(models) / path.stem if models else None
        if not place or not place.exists():
            out["clips without a video" if videos else "clips without a folder of frames"] += 1
        elif model and not colmap.model_suffix(model):
            out["clips without a COLMAP model"] += 1
        else:
            read = functools.partial(read_re10k, path, place, model)
            count = sum(bool(line.strip()) for line in text.splitlines()[1:])
            captures.append(Capture(f"{kind}/{path.stem}", count, read))
    return captures, out


def read_re10k(path, place, model):
    """(Views, LeftOuts) of a clip, in the order of time. Raises LeftOut, OSError."""
    try:
        rows = cameras.re10k_rows(cameras.text_of(path))
    except ValueError as err:
        raise LeftOut(path, "the camera text is damaged", err) from err
    frames = {}
    if place.is_dir():
        frames = {int(each.stem): each for each in sorted(place.iterdir())
                  if each.suffix.lower() in IMAGE_SUFFIXES and each.stem.isdecimal()}
    depths = re10k_depths(path, rows, model) if model else {}
    times = set()

    def view(row):
        if not math.isfinite(row[0]):
            raise LeftOut(path, "a time is not finite")
        time = int(row[0])
        where = f"{path}: {time}"
        if any(row[5:7]):
            raise LeftOut(where, "the lens is distorted", f"k1 {row[5]:g}, k2 {row[6]:g}")
        if model and time not in depths:
            raise LeftOut(where, "no image of the COLMAP model")
        video = {} if place.is_dir() else {"time": time * MICROSECONDS}
        photo = place if video else frames.get(time, place / f"{time}.png")
        c2w = opengl(cameras.re10k_w2c(row), where)
        if time in times:
            raise LeftOut(where, "a time is listed twice")
        times.add(time)
        return View(where, photo, c2w,
                    Lens("PINHOLE", 1, 1, tuple(row[1:5])), depths.get(time), **video)

    return collect(view, sorted(rows, key=lambda row: (not math.isfinite(row[0]), row[0])))


def re10k_depths(path, rows, model):
    """{time: Points} of a COLMAP model of a clip, in the clip's unit. Raises LeftOut.

    COLMAP's unit of length is any, so the paths of the two are compared.
    """
    try:
        found = colmap.read_model(model)
    except ValueError as err:
        raise LeftOut(model, "the COLMAP model cannot be used", err) from err
    images = {int(Path(image.name).stem): image for image in found.images
              if Path(image.name).stem.isdecimal()}
    w2c = np.array([(cameras.re10k_w2c(row), images[int(row[0])].w2c) for row in rows
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
    return {time: points(found, image, unit) for time, image in images.items()}


def points(model, image, unit=1.0):
    """The Points of one of a COLMAP model's images, depths times `unit`."""
    lens, (pixel, depth) = model.lenses[image.camera], image.sparse_depth(model)
    return Points(pixel / (lens.width, lens.height), depth * unit)
