"""COLMAP's camera models, and the reader of the files that it writes, text or binary
(colmap.github.io/format.html).

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

from runtime.files import mistaken_for
from shards.index import FARTHEST

UNIT_QUATERNION = 1e-2          # largest error of a quaternion's length, which is made 1
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
    mistaken, way_out = mistaken_for(data[:64], path)
    if mistaken:
        raise ValueError(f"{path}: is {mistaken}: {way_out.partition(', or ')[0]}")
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
        return 2 * math.atan2(0.5, fy if self.height < self.width else fx)

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

@dataclass(frozen=True)
class ModelImage:
    """A photo whose camera COLMAP has found."""
    name: str               # path from the folder of images
    camera: int             # number of its Lens
    w2c: np.ndarray         # (4, 4) float64, OpenCV; nan for a quaternion that is none
    seen: np.ndarray        # OBSERVATIONs: pixels, and numbers of points, -1 of none


@dataclass(frozen=True)
class Model:
    """A COLMAP model: {number: Lens}, its ModelImages in the order of their names, its points."""
    lenses: dict
    images: list
    numbers: np.ndarray     # (n,) int64, ascending
    points: np.ndarray      # (n, 3) float64

    @np.errstate(all="ignore")      # of points at infinity
    def sparse_depth(self, image):
        """(pixels (n, 2), distances (n,) along the viewing axis) of the points an image shows."""
        if not len(self.numbers):
            return np.zeros((0, 2)), np.zeros(0)
        at = np.searchsorted(self.numbers, image.seen["point"]).clip(max=len(self.numbers) - 1)
        there = self.numbers[at] == image.seen["point"]
        depth = self.points[at[there]] @ image.w2c[2, :3] + image.w2c[2, 3]
        pixel = np.stack([image.seen["x"], image.seen["y"]], axis=1)[there]
        ahead = (depth > 0) & (depth < FARTHEST) & np.isfinite(pixel).all(1)
        return pixel[ahead], depth[ahead]


def model_suffix(folder):
    """.bin or .txt, of the COLMAP model in a folder; "" where there is none."""
    return next((each for each in (".bin", ".txt")
                 if all((Path(folder) / (name + each)).is_file() for name in PARTS)), "")


def read_model(folder):
    """The Model in a folder that has one. Raises ValueError for what is damaged, and OSError.

    pycolmap's own reader is not used: it takes cut files for whole ones, refuses models whose
    rigs.bin does not fit, and hangs on a wrong number of points (version 4.2).
    """
    suffix = model_suffix(folder)
    cameras, images, points = (Path(folder) / (name + suffix) for name in PARTS)
    lenses, images_read = read_lenses(cameras), read_images(images)
    for image in images_read:
        if image.camera not in lenses:
            raise ValueError(f"{images}: {image.name} has camera {image.camera}, which "
                             f"{cameras.name} does not list")
    found = sorted(records(points, "points3D"))
    return Model(lenses, images_read, np.array([number for number, *_ in found], np.int64),
                 np.array([place for _, *place in found], float).reshape(-1, 3))


def read_lenses(path):
    """{number: Lens} of a cameras.txt or cameras.bin. Raises ValueError, OSError."""
    lenses = {}
    for number, name, width, height, *params in records(path, "cameras"):
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
    for *pose, camera, name, seen in records(path, "images"):
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = from_quaternion(*pose[:4]), pose[4:]
        images.append(ModelImage(name, camera, w2c, seen))
    return sorted(images, key=lambda image: in_order(image.name))


def from_quaternion(w, x, y, z):
    """Rotation matrix (3, 3) of a quaternion; nan unless its length is about 1."""
    n = w * w + x * x + y * y + z * z
    if not abs(n - 1) <= 2 * UNIT_QUATERNION:
        return np.full((3, 3), np.nan)
    w, x, y, z = (each * math.sqrt(2 / n) for each in (w, x, y, z))
    return np.array([[1 - y * y - z * z, x * y - w * z, x * z + w * y],
                     [x * y + w * z, 1 - x * x - z * z, y * z - w * x],
                     [x * z - w * y, y * z + w * x, 1 - x * x - y * y]])


# ---- records

def records(path, part):
    """Yields the fields of every record of one of PARTS. Raises ValueError, OSError.

    cameras: number, model's name, width, height, parameters; images: quaternion, translation,
    camera's number, name, OBSERVATIONs; points3D: number, place.
    """
    return (binary_records if path.suffix == ".bin" else text_records)(path, part)


def binary_records(path, part):
    data, at = path.read_bytes(), 0

    def take(form):
        """The next numbers, of a struct format without padding."""
        nonlocal at
        start, at = at, at + struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{form}", data, start)

    try:
        for _ in range(*take("Q")):
            if part == "cameras":
                number, model, *size = take("iiQQ")
                name, count = MODELS.get(model, (f"model {model}", 0))
                yield number, name, *size, *take(f"{count}d")
            elif part == "images":
                _, *pose = take("i7di")
                name, = take(f"{data.index(0, at) - at}sx")
                seen, = take(f"{take('Q')[0] * OBSERVATION.itemsize}s")
                yield *pose, name.decode("utf-8", "replace"), np.frombuffer(seen, OBSERVATION)
            else:
                *point, _, _, _, _, track = take("q3d3BdQ")
                take(f"{8 * track}x")
                yield point
    except (struct.error, ValueError) as err:
        raise ValueError(f"{path}: the file is cut, at byte {len(data)}") from err


def text_records(path, part):
    lines = iter([line.strip() for line in text_of(path).splitlines()
                  if not line.lstrip().startswith("#")])
    for line in filter(None, lines):        # a blank line is a record only of an image's points
        try:
            if part == "cameras":
                number, name, width, height, *params = line.split()
                yield int(number), name, int(width), int(height), *map(float, params)
            elif part == "images":
                _, *pose, camera, name = line.split(maxsplit=9)
                x, y, point = np.array(next(lines, "").split(), float).reshape(-1, 3).T
                seen = np.empty(len(x), OBSERVATION)
                seen["x"], seen["y"] = x, y
                seen["point"] = np.where(abs(point) < 2**53, point, -1)
                yield *np.array(pose, float).reshape(7).tolist(), int(camera), name, seen
            else:
                number, x, y, z, *_ = line.split(maxsplit=4)
                yield [np.int64(number), float(x), float(y), float(z)]
        except (ValueError, OverflowError) as err:
            raise ValueError(f"{path}: {line[:40]!r} is no line of COLMAP's {part}, which has two "
                             f"lines an image, one a camera or point ({err})") from err
