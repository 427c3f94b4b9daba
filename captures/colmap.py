"""Reads the models of COLMAP (colmap.github.io/format.html): cameras, images and points, binary or
text.

Pixels count from the upper left corner of the image: the first one's centre is (0.5, 0.5).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from views.paths import from_quaternion

# number in binary files: (name, parameters)
MODELS = {0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5),
          4: ("OPENCV", 8), 5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5),
          8: ("SIMPLE_RADIAL_FISHEYE", 4), 9: ("RADIAL_FISHEYE", 5),
          10: ("THIN_PRISM_FISHEYE", 12)}
OBSERVATION = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<i8")])
NAMES = ("cameras", "images", "points3D")
UNDISTORT = ("PINHOLE and SIMPLE_PINHOLE can be read. COLMAP makes such images and cameras: colmap "
             "image_undistorter --image_path IMAGES --input_path {} --output_path UNDISTORTED")


@dataclass(frozen=True)
class Camera:
    """A pinhole camera of images of width x height pixels; the other lengths are in pixels too."""
    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class Image:
    """A photo whose camera was found."""
    name: str               # path from the folder of images
    camera: Camera
    w2c: np.ndarray         # (4, 4) float64, OpenCV
    place: np.ndarray       # (n, 2) pixels of the points that it shows
    depth: np.ndarray       # (n,) their distances along the viewing axis


def is_model(folder):
    """Whether a folder holds the three files of a model."""
    return suffix(folder) != ""


def suffix(folder):
    """.bin or .txt, of the model in a folder; "" where there is none."""
    return next((each for each in (".bin", ".txt")
                 if all((Path(folder) / (name + each)).is_file() for name in NAMES)), "")


def count(folder):
    """The number of images of a model, from a glance at it. Raises ValueError."""
    if suffix(folder) == ".txt":
        return (len(text_lines(Path(folder) / "images.txt")) + 1) // 2
    path = Path(folder) / "images.bin"
    with open(path, "rb") as file:
        return Binary(path, file.read(8)).take("Q")[0]


def read(folder):
    """The Images of a model, by name. Raises FileNotFoundError, and ValueError for what is damaged
    or has a camera with lens distortion."""
    folder = Path(folder)
    kind = suffix(folder)
    if not kind:
        raise FileNotFoundError(f"{folder} holds no COLMAP model: cameras, images and points3D, "
                                ".bin or .txt")
    cameras = read_cameras(folder)
    rows = binary_images(folder) if kind == ".bin" else text_images(folder)
    numbers, points = binary_points(folder) if kind == ".bin" else text_points(folder)
    order = np.argsort(numbers)
    numbers, points = numbers[order], points[order]
    images = []
    for name, pose, camera, seen in rows:
        if camera not in cameras:
            raise ValueError(f"{folder / 'images'}{kind}: {name} has camera {camera}, which "
                             f"cameras{kind} does not list")
        w2c = np.eye(4)
        w2c[:3, :3] = quaternion(pose[:4])
        w2c[:3, 3] = pose[4:]
        at = np.searchsorted(numbers, seen["point"]).clip(max=max(len(numbers) - 1, 0))
        known = numbers[at] == seen["point"] if len(numbers) else np.zeros(len(seen), bool)
        depth = points[at[known]] @ w2c[2, :3] + w2c[2, 3]
        place = np.stack([seen["x"], seen["y"]], axis=1)[known]
        ahead = np.isfinite(depth) & (depth > 0) & np.isfinite(place).all(1)
        images.append(Image(name, cameras[camera], w2c, place[ahead], depth[ahead]))
    return sorted(images, key=lambda image: image.name)


def quaternion(numbers):
    """The rotation (3, 3) of (w, x, y, z); nan where it is none, which the reader of poses sees."""
    if not np.isfinite(numbers).all() or not np.any(numbers):
        return np.full((3, 3), np.nan)
    return from_quaternion(*map(float, numbers)).numpy()


# ---- cameras

def read_cameras(folder):
    """{number: Camera} of a model. Raises ValueError for any that is not a pinhole."""
    folder = Path(folder)
    path = folder / ("cameras" + suffix(folder))
    cameras = {}
    for number, model, width, height, parameters in (
            binary_cameras(path) if path.suffix == ".bin" else text_cameras(path)):
        if model == "SIMPLE_PINHOLE" and len(parameters) == 3:
            parameters = [parameters[0], *parameters]
        elif model != "PINHOLE" or len(parameters) != 4:
            raise ValueError(f"{path}: camera {number} is {model}, with {len(parameters)} "
                             f"parameters; {UNDISTORT.format(folder)}")
        if width < 1 or height < 1:
            raise ValueError(f"{path}: camera {number} has images of {width} x {height} pixels")
        cameras[number] = Camera(width, height, *parameters)
    return cameras


def binary_cameras(path):
    """Yields (number, model, width, height, parameters)."""
    file = Binary(path)
    for _ in range(file.take("Q")[0]):
        number, model, width, height = file.take("iiQQ")
        if model not in MODELS:
            raise ValueError(f"{path}: camera {number} is of COLMAP's model number {model}; "
                             + UNDISTORT.format(path.parent))
        name, parameters = MODELS[model]
        yield number, name, width, height, file.take(f"{parameters}d")


def text_cameras(path):
    """Yields (number, model, width, height, parameters)."""
    for line in filter(None, text_lines(path)):
        try:
            number, model, width, height, *parameters = line.split()
            yield int(number), model, int(width), int(height), list(map(float, parameters))
        except ValueError as err:
            raise ValueError(f"{path}: {line[:40]!r} is no camera: {err}") from err


# ---- images and points

def binary_images(folder):
    """A list of (name, quaternion and translation, camera's number, OBSERVATIONs)."""
    file, rows = Binary(folder / "images.bin"), []
    for _ in range(file.take("Q")[0]):
        _, *pose, camera = file.take("i7di")
        name = file.text()
        rows.append((name, pose, camera, file.array(OBSERVATION, file.take("Q")[0])))
    return rows


def text_images(folder):
    """The same from images.txt: two lines an image."""
    path, rows = folder / "images.txt", []
    lines = text_lines(path)
    for i in range(0, len(lines), 2):
        try:
            _, *pose, camera, name = lines[i].split(maxsplit=9)
            numbers = np.array(lines[i + 1].split() if i + 1 < len(lines) else [], float)
            x, y, point = numbers.reshape(-1, 3).T
            seen = np.empty(len(x), OBSERVATION)
            seen["x"], seen["y"], seen["point"] = x, y, point
            rows.append((name, list(map(float, pose)), int(camera), seen))
        except ValueError as err:
            raise ValueError(f"{path}: image {i // 2} of it is damaged: {err}") from err
    return rows


def binary_points(folder):
    """The points' numbers (n,) int64 and places (n, 3) float64."""
    file, numbers, points = Binary(folder / "points3D.bin"), [], []
    for _ in range(file.take("Q")[0]):
        number, x, y, z, *_, track = file.take("Q3d3BdQ")
        file.skip(8 * track)
        numbers.append(number)
        points.append((x, y, z))
    return np.array(numbers, np.int64), np.array(points, float).reshape(-1, 3)


def text_points(folder):
    """The same from points3D.txt."""
    path = folder / "points3D.txt"
    lines = [line.split(maxsplit=4)[:4] for line in text_lines(path) if line]
    try:
        return (np.array([int(line[0]) for line in lines], np.int64),
                np.array([list(map(float, line[1:])) for line in lines], float).reshape(-1, 3))
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err


def text_lines(path):
    """The lines of a text file without comments; empty ones inside, which count in images.txt,
    stay."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except UnicodeDecodeError as err:
        raise ValueError(f"{path}: is no text: {err}") from err
    return [line.strip() for line in lines if not line.startswith("#")]


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
