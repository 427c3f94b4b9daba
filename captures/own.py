"""Captures of one's own: COLMAP's models with their images, and folders with a transforms.json."""

import functools
import math
from pathlib import Path

import torch
from PIL import Image

from camera import focus_point
from captures.datasets import (Capture, collect, found_in, opengl, photo_at, points,
                               read_model)
from captures.resample import DepthMap, LeftOut, View, opened, one_camera, square
from views import SCALE, cameras, colmap, paths, photos

MILLIMETRES = 1e-3          # nerfstudio's unit of depth
PHOTO_SIDE = 512            # pixels a side that are kept of a photo to start from


# ---- COLMAP

def find_colmap(scenes, images, depth):
    """(Captures of folders with a COLMAP model and its images, Counter of models left out).

    The model lies in sparse/0, sparse or the folder itself: of several the one of most images.
    images: name of the folder of images in each. Raises FileNotFoundError, ValueError.
    """
    def find(scene, out):
        models = [(len(colmap.read_images(folder / f"images{colmap.model_suffix(folder)}")), folder)
                  for folder in (*sorted(scene.glob("sparse/*")), scene / "sparse", scene)
                  if colmap.model_suffix(folder)]
        if not models:
            raise FileNotFoundError(f"{scene}: no COLMAP model (cameras, images, points3D; .bin or "
                                    ".txt) in sparse/0, sparse or the folder itself")
        if not (scene / images).is_dir():
            raise FileNotFoundError(f"{scene / images}: no such folder; --images names it")
        count, model = max(models, key=lambda each: each[0])
        out["smaller models of the same scene"] += len(models) - 1
        read = functools.partial(read_colmap, model, scene / images, depth)
        return [Capture(f"colmap/{scene.resolve().name}", count, read)]

    return found_in(map(Path, scenes), find)


def read_colmap(folder, photos, depth):
    """(Views, LeftOuts) of a COLMAP model, by the images' names. Raises LeftOut, OSError."""
    model = read_model(folder)

    def view(image):
        photo = photo_at(photos, image.name)
        return View(str(photo), photo, opengl(image.w2c, photo), model.lenses[image.camera],
                    points(model, image) if depth else None)

    return collect(view, model.images)


# ---- nerfstudio

def find_nerfstudio(scenes, depth):
    """(Captures of folders with a transforms.json, or of such files, Counter of masks).

    Raises FileNotFoundError, and ValueError for damaged files.
    """
    def find(scene, out):
        path = scene / "transforms.json" if scene.is_dir() else scene
        if not path.is_file():
            others = ", ".join(map(str, sorted(path.parent.glob("transforms*.json")))) or "none"
            raise FileNotFoundError(f"{path} is missing; files like it: {others}")
        frames = cameras.read_transforms(path)
        out["masks (mask_path), as photos are stored whole"] += sum(
            "mask_path" in frame for frame in frames)
        read = functools.partial(read_nerfstudio, path, depth)
        return [Capture(f"nerfstudio/{path.resolve().parent.name}", len(frames), read)]

    return found_in(map(Path, scenes), find)


def read_nerfstudio(path, depth):
    """(Views, LeftOuts) of a transforms.json, in its order. Depth where any frame has it."""
    views, out = collect(functools.partial(nerfstudio_view, path.parent, depth),
                         cameras.read_transforms(path))
    if any(view.depth for view in views):
        out += [LeftOut(view.where, "no depth") for view in views if not view.depth]
        views = [view for view in views if view.depth]
    return views, out


def depth_of(folder, frame):
    """The DepthMap of a frame, or None: nerfstudio's, in millimetres, or instant-ngp's."""
    path, unit = frame.get("depth_file_path"), MILLIMETRES
    if path:
        unit *= cameras.number(frame, "applied_scale", default=1.0)
    else:
        path = frame.get("depth_path")
        unit = cameras.number(frame, "integer_depth_scale", -math.inf, default=0.0)
    return DepthMap(folder / str(path), unit) if path and unit > 0 else None


def nerfstudio_view(folder, depth, frame):
    """The View of a frame with the keys that all share. Raises LeftOut."""
    if not isinstance(frame.get("file_path"), str):
        raise LeftOut(folder, "a frame of transforms.json has no file_path")
    photo = photo_at(folder, frame["file_path"])
    for field, reason in cameras.REFUSED.items():
        if frame.get(field):
            raise LeftOut(photo, f"{field} is not read", reason)
    size = None
    if not frame.get("w") or not frame.get("h"):
        with opened(photo) as image:
            size = image.size
    try:
        c2w = cameras.matrix(frame.get("transform_matrix"), "transform_matrix").numpy()
        lens = cameras.transforms_lens(frame, size)
        if not lens:
            raise ValueError("fl_x and camera_angle_x are missing")
        stored = depth_of(folder, frame) if depth else None
    except ValueError as err:
        raise LeftOut(photo, "a frame of transforms.json cannot be used", err) from err
    return View(str(photo), photo, c2w, lens, stored)


# ---- a capture to start from

class Album:
    """The photos of a capture, with one field of view, and their cameras in the world of
    views/paths.py: photo `first` stands one unit from what it looks at.

    places: of the photos that are wanted, the first of them is that `first`, else the middle one.
    path: a transforms.json, or a folder with one or with COLMAP's. Raises ValueError, OSError.
    """
    def __init__(self, path, places=()):
        self.path = Path(path)
        if self.path.is_file() or (self.path / "transforms.json").is_file():
            [found], _ = find_nerfstudio([path], False)
        else:
            [found], _ = find_colmap([path], "images", False)
        self.views, half, left_out = one_camera(found.read()[0])
        if not self.views:
            raise ValueError(f"{path}: no photo has a camera that can be used: "
                             + "; ".join(map(str, left_out[:1])))
        self.half, self.fov = half, 2 * math.atan(half)
        self.first = [*places, len(self.views) // 2][0]
        if max(places, default=0) >= len(self.views):
            raise ValueError(f"photo {max(places)} of {path}: there are 0 to {len(self.views) - 1}")
        self.own = own = torch.stack([torch.as_tensor(view.c2w) for view in self.views])
        position = own[:, :3, 3]
        # how far each looks, where all look at one thing
        far = ((position - focus_point(own)) * own[:, :3, 2]).sum(1)
        around = (position - position[self.first]).norm(dim=1).mean() or torch.ones(())
        self.far = torch.where(far > 0, far, around.to(far))
        self.rise = photos.elevation_of(own, self.first)
        self.c2w = self.moved(own)

    def moved(self, c2w):
        """Cameras (n, 4, 4) of the capture's own world, in that of the paths."""
        return paths.moved(c2w, self.own[self.first], paths.around(0.0, self.rise, 1.0),
                           1 / self.far[self.first])

    def picture(self, place, side):
        """A photo as one square image of `side` pixels."""
        with Image.open(self.views[place].photo) as picture:
            return Image.fromarray(square(self.views[place], picture, self.half, side)[0])

    def photo(self, place, size, scale=SCALE):
        """The photos.Photo of a network that sees `size` pixels; scale: that of photo `first`."""
        scale *= (self.far[place] / self.far[self.first]).item()
        return photos.Photo(self.picture(place, PHOTO_SIDE), size, self.fov, self.rise, scale)
