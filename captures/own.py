"""Captures of one's own: COLMAP's models with their images, and folders with a transforms.json."""

import functools
import math
from pathlib import Path

from PIL import Image

from captures.datasets import IMAGE_SUFFIXES, Capture, collect, found_in, opengl, points
from captures.resample import DepthMap, LeftOut, View
from views import cameras, colmap

MILLIMETRES = 1e-3          # nerfstudio's unit of depth


def photo_at(folder, name):
    """The path of a photo that a file names; Blender leaves the suffix out, Windows has \\."""
    photo = folder / name
    if photo.is_file():
        return photo
    plain = folder / name.replace("\\", "/")
    named = (plain.with_name(plain.name + suffix) for suffix in ("", *IMAGE_SUFFIXES))
    return next(filter(Path.is_file, named), photo)


# ---- COLMAP

def find_colmap(scenes, images, depth):
    """(Captures of folders with a COLMAP model and its images, Counter of models left out).

    The model lies in sparse/0, sparse or the folder itself: of several the one of most images.
    images: name of the folder of images in each. Raises FileNotFoundError, ValueError.
    """
    def find(scene, out):
        """The Capture of a folder, in a list."""
        models = [folder for folder in (*sorted(scene.glob("sparse/*")), scene / "sparse", scene)
                  if colmap.model_suffix(folder)]
        if not models:
            raise FileNotFoundError(f"{scene}: no COLMAP model (cameras, images, points3D; .bin or "
                                    ".txt) in sparse/0, sparse or the folder itself")
        if not (scene / images).is_dir():
            raise FileNotFoundError(f"{scene / images}: no such folder; --images names it")
        model = max(models, key=colmap.count_images)
        path = model / f"cameras{colmap.model_suffix(model)}"
        for number, lens in colmap.read_lenses(path).items():       # before any work
            lens.check_distortion(f"{path}: camera {number}")
        out["smaller models of the same scene"] += len(models) - 1
        read = functools.partial(read_colmap, model, scene / images, depth)
        return [Capture(f"colmap/{scene.resolve().name}", colmap.count_images(model), read)]

    return found_in(map(Path, scenes), find)


def read_colmap(folder, photos, depth):
    """(Views, LeftOuts) of a COLMAP model, by the images' names. Raises LeftOut, OSError."""
    try:
        model = colmap.read_model(folder)
    except ValueError as err:
        raise LeftOut(folder, "the COLMAP model cannot be used", err) from err

    def view(image):
        photo = photo_at(photos, image.name)
        return View(str(photo), photo, opengl(image.w2c, photo), model.lenses[image.camera],
                    points(model, image) if depth else None)

    return collect(view, model.images)


# ---- nerfstudio

def find_nerfstudio(scenes, depth):
    """(Captures of folders with a transforms.json, or of such files, Counter of fields not used).

    Raises FileNotFoundError, and ValueError for damaged files.
    """
    def find(scene, out):
        """The Capture of a transforms.json, in a list."""
        path = scene / "transforms.json" if scene.is_dir() else scene
        frames, unused = cameras.read_transforms(path)
        for frame in frames:
            if "w" in frame and "h" in frame:       # before any work
                where = f"{path}: the camera of {frame.get('file_path')}"
                try:
                    lens = cameras.transforms_lens(frame)
                except ValueError:
                    continue                        # it is left out when it is read
                if lens:
                    lens.check_distortion(where)
        for field, count in unused.items():
            out[f"x {field!r} of {path}, a field that is not used"] += count
        read = functools.partial(read_nerfstudio, path, depth)
        return [Capture(f"nerfstudio/{path.resolve().parent.name}", len(frames), read)]

    return found_in(map(Path, scenes), find)


def read_nerfstudio(path, depth):
    """(Views, LeftOuts) of a transforms.json, in its order. Depth where any frame has it."""
    frames, _ = cameras.read_transforms(path)
    depth = depth and any(depth_of(path.parent, frame) for frame in frames)
    return collect(functools.partial(nerfstudio_view, path.parent, depth), frames)


def depth_of(folder, frame):
    """The DepthMap of a frame, or None: nerfstudio's, in millimetres, or instant-ngp's."""
    if frame.get("depth_file_path"):
        unit = cameras.number(frame, "applied_scale", default=1.0) * MILLIMETRES
        return DepthMap(folder / str(frame["depth_file_path"]), unit)
    unit = cameras.number(frame, "integer_depth_scale", -math.inf, default=0.0)
    return DepthMap(folder / str(frame["depth_path"]), unit) if (
        frame.get("depth_path") and unit > 0) else None


def nerfstudio_view(folder, depth, frame):
    """The View of a frame with the keys that all share. Raises LeftOut."""
    where = folder
    try:
        if not isinstance(frame.get("file_path"), str):
            raise ValueError("file_path is missing")
        where = photo = photo_at(folder, frame["file_path"])
        for field, reason in cameras.REFUSED.items():
            if frame.get(field):
                raise LeftOut(photo, f"{field} is not read", reason)
        c2w = cameras.matrix(frame.get("transform_matrix"), "transform_matrix").numpy()
        sized = frame.get("w") and frame.get("h")
        lens = cameras.transforms_lens(frame, None if sized else size_of(photo))
        if not lens:
            raise ValueError("fl_x and camera_angle_x are missing")
        lens.check_distortion("the camera")
        stored = depth_of(folder, frame) if depth else None
    except LeftOut:
        raise
    except ValueError as err:
        raise LeftOut(where, "a frame of transforms.json cannot be used", err) from err
    if depth and not stored:
        raise LeftOut(photo, "no depth")
    return View(str(photo), photo, c2w, lens, stored)


def size_of(photo):
    """(width, height) of an image file. Raises LeftOut."""
    try:
        with Image.open(photo) as image:
            return image.size
    except FileNotFoundError as err:
        raise LeftOut(photo, "missing image") from err
    except Exception as err:    # on damaged bytes Pillow raises anything
        raise LeftOut(photo, "image cannot be decoded", err) from err
