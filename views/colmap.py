"""COLMAP's camera models, and the reader of what COLMAP writes: cameras, images and points, text or
binary (colmap.github.io/format.html).

Pixels count from the upper left corner of an image: the first one's centre is (0.5, 0.5). Letters:
`n` points.
"""

import functools
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNIT_QUATERNION = 1e-2          # the same of a quaternion's length, which is made 1
MOST_PIXELS = 2**31             # a side that no image has
PARTS = ("cameras", "images", "points3D")       # files of a COLMAP model
OBSERVATION = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<i8")])
# COLMAP's camera models, by their number in binary files: name and number of parameters
MODELS = dict(enumerate((
    ("SIMPLE_PINHOLE", 3), ("PINHOLE", 4), ("SIMPLE_RADIAL", 4), ("RADIAL", 5), ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8), ("FULL_OPENCV", 12), ("FOV", 5), ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5), ("THIN_PRISM_FISHEYE", 12), ("RAD_TAN_THIN_PRISM_FISHEYE", 16),
    ("SIMPLE_DIVISION", 4), ("DIVISION", 5), ("SIMPLE_FISHEYE", 3), ("FISHEYE", 4), ("EUCM", 6))))
ONE_FOCAL = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE",
             "SIMPLE_DIVISION", "SIMPLE_FISHEYE")
# these are pinholes where all that follows the principal point is 0
PERSPECTIVE = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV",
               "FOV", "SIMPLE_DIVISION", "DIVISION")


def text_of(path):
    """The text of a file; a byte order mark is no part of it. Raises ValueError, OSError."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as err:
        raise ValueError(f"{path}: is not a text file of cameras: {err.reason}") from err


def in_order(name):
    """A key that sorts names whose numbers are not padded: frame9 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# ---- lenses

@dataclass(frozen=True)
class Lens:
    """A camera of one of COLMAP's models, for images of width x height pixels.

    A place in its images is a pair of shares of their width and height, and a direction is a pair
    of slopes, to the right and downwards, of a ray that goes 1 along the axis.
    """
    model: str
    width: float
    height: float
    params: tuple               # as COLMAP orders them, in pixels

    @property
    def intrinsics(self):
        """fx, fy, cx, cy in shares of the image's width and height."""
        fx, fy, cx, cy = (self.params[:1] + self.params[:3] if self.model in ONE_FOCAL
                          else self.params[:4])
        return fx / self.width, fy / self.height, cx / self.width, cy / self.height

    @property
    def distorted(self):
        """Whether it is not a pinhole."""
        bent = self.params[3 if self.model in ONE_FOCAL else 4:]
        return self.model not in PERSPECTIVE or any(bent)

    @property
    def fov(self):
        """Field of view in radians of a pinhole's shorter side."""
        fx, fy, *_ = self.intrinsics
        return 2 * math.atan(0.5 / (fy if self.height < self.width else fx))

    def check_distortion(self, where):
        """Raises ValueError for a distorted lens where pycolmap, which undoes it, is missing."""
        if self.distorted and not pycolmap():
            raise ValueError(f"{where} is {self.model} with lens distortion, which pycolmap "
                             "undoes, and it is not installed: pip install pycolmap")

    def slopes(self, places):
        """Directions (n, 2) of places (n, 2); nan where it has none."""
        if self.distorted:
            return bent_lens(self).cam_from_img(np.asarray(places) * (self.width, self.height))
        fx, fy, cx, cy = self.intrinsics
        return (places - np.array((cx, cy))) / (fx, fy)

    def places(self, slopes):
        """Places (n, 2) where directions (n, 2) are seen; nan where they are not."""
        if self.distorted:
            rays = np.concatenate([slopes, np.ones((len(slopes), 1))], axis=1)
            return bent_lens(self).img_from_cam(rays) / (self.width, self.height)
        fx, fy, cx, cy = self.intrinsics
        return np.asarray(slopes) * (fx, fy) + (cx, cy)


def pycolmap():
    """The module pycolmap, or None where it is not installed."""
    try:
        import pycolmap as module
    except ImportError:
        return None
    return module


@functools.lru_cache(maxsize=64)
def bent_lens(lens):
    """pycolmap's Camera of a Lens."""
    return pycolmap().Camera(model=lens.model, width=round(lens.width), height=round(lens.height),
                             params=lens.params)


# ---- models

def from_quaternion(w, x, y, z):
    """Rotation matrix (3, 3) of a quaternion; nan unless its length is about 1."""
    n = w * w + x * x + y * y + z * z
    if not abs(n - 1) <= 2 * UNIT_QUATERNION:
        return np.full((3, 3), np.nan)
    w, x, y, z = (each * math.sqrt(2 / n) for each in (w, x, y, z))
    return np.array([[1 - y * y - z * z, x * y - w * z, x * z + w * y],
                     [x * y + w * z, 1 - x * x - z * z, y * z - w * x],
                     [x * z - w * y, y * z + w * x, 1 - x * x - y * y]])


@dataclass(frozen=True)
class ModelImage:
    """A photo whose camera COLMAP has found."""
    name: str               # path from the folder of images
    camera: int             # number of its Lens
    w2c: np.ndarray         # (4, 4) float64, OpenCV; nan for a quaternion that is none
    seen: np.ndarray        # OBSERVATIONs: pixels, and numbers of points, -1 of none

    def sparse_depth(self, model):
        """(pixels (n, 2), distances (n,) along the viewing axis) of the points that it shows."""
        if not len(model.numbers):
            return np.zeros((0, 2)), np.zeros(0)
        at = np.searchsorted(model.numbers, self.seen["point"]).clip(max=len(model.numbers) - 1)
        there = model.numbers[at] == self.seen["point"]
        depth = model.points[at[there]] @ self.w2c[2, :3] + self.w2c[2, 3]
        pixel = np.stack([self.seen["x"], self.seen["y"]], axis=1)[there]
        ahead = np.isfinite(depth) & (depth > 0) & np.isfinite(pixel).all(1)
        return pixel[ahead], depth[ahead]


@dataclass(frozen=True)
class Model:
    """A COLMAP model: {number: Lens}, its ModelImages in the order of their names, its points."""
    lenses: dict
    images: list
    numbers: np.ndarray     # (n,) int64, ascending
    points: np.ndarray      # (n, 3) float64


def model_suffix(folder):
    """.bin or .txt, of the COLMAP model in a folder; "" where there is none."""
    return next((each for each in (".bin", ".txt")
                 if all((Path(folder) / (name + each)).is_file() for name in PARTS)), "")


def count_images(folder):
    """The number of images of a model, from a glance at it. Raises ValueError."""
    path = Path(folder) / f"images{model_suffix(folder)}"
    if path.suffix == ".txt":
        return sum(1 for _ in text_pairs(path))
    with open(path, "rb") as file:
        return Binary(path, file.read(8)).take("Q")[0]


def read_model(folder):
    """The Model in a folder. Raises FileNotFoundError, and ValueError for what is damaged.

    pycolmap's own reader is not used: it takes cut files for whole ones, refuses models whose
    rigs.bin does not fit, and hangs on a wrong number of points (version 4.2).
    """
    folder, suffix = Path(folder), model_suffix(folder)
    if not suffix:
        raise FileNotFoundError(f"{folder} holds no COLMAP model: cameras, images and points3D, "
                                ".bin or .txt")
    lenses = read_lenses(folder / f"cameras{suffix}")
    images = read_images(folder / f"images{suffix}")
    for image in images:
        if image.camera not in lenses:
            raise ValueError(f"{folder / 'images'}{suffix}: {image.name} has camera "
                             f"{image.camera}, which cameras{suffix} does not list")
    numbers, points = (binary_points if suffix == ".bin" else text_points)(
        folder / f"points3D{suffix}")
    order = np.argsort(numbers)
    return Model(lenses, images, numbers[order], points[order])


def read_lenses(path):
    """{number: Lens} of a cameras.txt or cameras.bin. Raises ValueError, OSError."""
    lenses = {}
    for number, name, width, height, params in (
            binary_cameras if path.suffix == ".bin" else text_cameras)(path):
        if (name, len(params)) not in MODELS.values():
            known = ", ".join(f"{model} ({count})" for model, count in MODELS.values())
            raise ValueError(f"{path}: camera {number} is {name} with {len(params)} parameters; "
                             f"these can be read: {known}")
        if not 0 < width < MOST_PIXELS or not 0 < height < MOST_PIXELS:
            raise ValueError(f"{path}: camera {number} has images of {width} x {height} pixels")
        lenses[number] = Lens(name, width, height, tuple(params))
    return lenses


def read_images(path):
    """The ModelImages of an images.txt or images.bin, in the order of their names. ValueError."""
    images = []
    for name, pose, camera, seen in (binary_images if path.suffix == ".bin" else text_images)(path):
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = from_quaternion(*pose[:4]), pose[4:]
        images.append(ModelImage(name, camera, w2c, seen))
    return sorted(images, key=lambda image: in_order(image.name))


def binary_cameras(path):
    """Yields (number, model, width, height, parameters)."""
    file = Binary(path)
    for _ in range(file.take("Q")[0]):
        number, model, width, height = file.take("iiQQ")
        if model not in MODELS:
            raise ValueError(f"{path}: camera {number} is of COLMAP's model number {model}; only "
                             f"those up to {max(MODELS)} can be read")
        yield number, MODELS[model][0], width, height, file.take(f"{MODELS[model][1]}d")


def text_cameras(path):
    """Yields the same from cameras.txt."""
    for line in text_lines(path):
        if line:
            try:
                number, model, width, height, *params = line.split()
                yield int(number), model, int(width), int(height), [*map(float, params)]
            except ValueError as err:
                raise ValueError(f"{path}: {line[:40]!r} is no camera: {err}") from err


def binary_images(path):
    """Yields (name, quaternion and translation, camera's number, OBSERVATIONs)."""
    file = Binary(path)
    for _ in range(file.take("Q")[0]):
        _, *pose, camera = file.take("i7di")
        yield file.text(), pose, camera, file.array(OBSERVATION, file.take("Q")[0])


def text_images(path):
    """Yields the same from images.txt."""
    for line, points in text_pairs(path):
        try:
            _, qw, qx, qy, qz, tx, ty, tz, camera, name = line.split(maxsplit=9)
            x, y, point = np.array(points.split(), float).reshape(-1, 3).T
            seen = np.empty(len(x), OBSERVATION)
            seen["x"], seen["y"] = x, y
            seen["point"] = np.where(abs(point) < 2**53, point, -1)
            yield name, [*map(float, (qw, qx, qy, qz, tx, ty, tz))], int(camera), seen
        except ValueError as err:
            raise ValueError(f"{path}: {line[:40]!r} is no image with its points; COLMAP's text "
                             f"has two lines an image, of 10 words and of three a point ({err})"
                             ) from err


def text_pairs(path):
    """Yields the two lines of every image: only before the first of them are blank lines none."""
    lines = iter(text_lines(path))
    for line in lines:
        if line:
            yield line, next(lines, "")


def binary_points(path):
    """The points' numbers (n,) int64 and places (n, 3) float64."""
    file, numbers, points = Binary(path), [], []
    for _ in range(file.take("Q")[0]):
        number, x, y, z, *_, track = file.take("Q3d3BdQ")
        file.skip(8 * track)
        numbers.append(number)
        points.append((x, y, z))
    return np.array(numbers, np.uint64).astype(np.int64), np.array(points, float).reshape(-1, 3)


def text_points(path):
    """The same from points3D.txt."""
    lines = [line.split(maxsplit=4)[:4] for line in text_lines(path) if line]
    try:
        return (np.array([int(line[0]) for line in lines], np.int64),
                np.array([[*map(float, line[1:])] for line in lines], float).reshape(-1, 3))
    except (ValueError, OverflowError) as err:
        raise ValueError(f"{path}: {err}") from err


def text_lines(path):
    """The lines of one of COLMAP's text files, without comments."""
    return [line.strip() for line in text_of(path).splitlines()
            if not line.lstrip().startswith("#")]


class Binary:
    """A little-endian file, read from front to back. ValueError where it is cut."""

    def __init__(self, path, data=b""):
        self.path, self.data, self.at = path, data or path.read_bytes(), 0

    def skip(self, size):
        """Goes on by `size` bytes and returns where they begin."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"{self.path}: the file is cut, at byte {len(self.data)}")
        return start

    def take(self, form):
        """The numbers of a struct format, without padding."""
        return struct.unpack_from("<" + form, self.data, self.skip(struct.calcsize("<" + form)))

    def array(self, dtype, size):
        """`size` records of a dtype."""
        return np.frombuffer(self.data, dtype, size, self.skip(size * dtype.itemsize))

    def text(self):
        """A text that ends with a zero byte."""
        length = self.data.find(b"\0", self.at) - self.at
        start = self.skip(length + 1 if length >= 0 else len(self.data))
        return self.data[start:self.at - 1].decode("utf-8", "replace")
