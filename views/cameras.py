"""The readers of files of cameras, one a format, for every command that reads one.

transforms.json as nerfstudio, instant-ngp, Blender, Polycam and Record3D write it, RealEstate10K's
text, JSON lists of matrices; COLMAP's files are read by colmap.py. docs/data.md says what becomes
of each field. Cameras are OpenGL camera-to-world. Letters: `n` cameras.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from camera import opengl_from_opencv
from shards.index import pose_problems, whole_matrices
from views.colmap import MOST_PIXELS, Lens, read_images, read_lenses, text_of

RE10K_NUMBERS = 19              # of a line of RealEstate10K's text
# fields of transforms.json without which a picture is not what its camera says
REFUSED = {"fisheye_crop_radius": "pixels outside a circle do not count",
           "transform_matrix_start": "its camera moves while the shutter is open"}
PINHOLES = "SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"
BENDS = "k1", "k2", "k3", "k4", "p1", "p2"      # in the order of nerfstudio's distortion_params


def check_rigid(c2w, path):
    """Raises ValueError for the first of the matrices (n, 4, 4) that is no rotation and shift."""
    for number, problem in enumerate(pose_problems(c2w.numpy())):
        if problem:
            raise ValueError(f"{path}: camera {number} {problem}")


def matrix(rows, what):
    """The (4, 4) float64 tensor of nested lists, 3x4 or 4x4. Raises ValueError."""
    try:
        found = np.array(rows, float)
    except (TypeError, ValueError, OverflowError):
        found = np.zeros(0)
    if found.shape not in ((3, 4), (4, 4)):
        raise ValueError(f"{what} is no 3x4 or 4x4 matrix of numbers")
    return torch.from_numpy(found if len(found) == 4 else whole_matrices(found))


def opengl(w2c):
    """OpenGL camera-to-world (4, 4), a tensor, of an OpenCV world-to-camera array."""
    return opengl_from_opencv(torch.linalg.inv(torch.from_numpy(w2c)))


# ---- transforms.json

def read_json(path):
    """The contents of a JSON file. Raises ValueError, OSError."""
    try:
        return json.loads(text_of(path))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path}: is no JSON: {err}") from err


def read_transforms(path):
    """The frames of a transforms.json, each with the keys that all share. ValueError, OSError."""
    stored = read_json(path)
    frames = stored.get("frames") if isinstance(stored, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{path}: is no transforms.json: it has no list of frames")
    return [{**stored, **frame} for frame in frames]


def number(frame, field, low=0.0, high=math.inf, default=None):
    """The number in a field of a frame, in (low, high). Raises ValueError."""
    found = frame.get(field)
    if found is None:
        return default
    try:
        value = math.nan if isinstance(found, bool | str) else float(found)
    except (TypeError, OverflowError):
        value = math.nan
    if not low < value < high:
        raise ValueError(f"{field} is {str(found)[:40]!r}, it must be a number between {low:g} "
                         f"and {high:g}")
    return value


def transforms_lens(frame, size=None):
    """The Lens of a frame, or None where the frame tells no focal length. Raises ValueError.

    size: (width, height) of its photo, where that is known; else a frame without w is square.
    """
    w, h = number(frame, "w", high=MOST_PIXELS), number(frame, "h", high=MOST_PIXELS)
    if "fl_x" in frame and not w and not size:
        raise ValueError("fl_x, in pixels, says nothing without w, the image's width in pixels")
    w, h = (w, h) if w and h else size or (w or 1, w or 1)
    focals = []
    for field, side in (("x", w), ("y", h)):
        angle = number(frame, f"camera_angle_{field}", high=math.pi)
        focal = side / 2 / math.tan(angle / 2) if angle else None
        focals.append(number(frame, f"fl_{field}", default=focal))
    fx, fy = focals
    if not fx:
        return None
    middle = [number(frame, field, -math.inf, default=side / 2)
              for field, side in (("cx", w), ("cy", h))]
    listed = frame.get("distortion_params")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) > len(BENDS):
            raise ValueError(f"distortion_params are not {len(BENDS)} numbers")
        frame = frame | dict.fromkeys(BENDS) | dict(zip(BENDS, listed))
    k1, k2, k3, k4, p1, p2 = (number(frame, field, -math.inf, default=0.0) for field in BENDS)
    name = frame.get("camera_model") or "OPENCV"
    if name == "OPENCV_FISHEYE" or frame.get("is_fisheye"):
        return Lens("OPENCV_FISHEYE", w, h, (fx, fy or fx, *middle, k1, k2, k3, k4))
    if name not in PINHOLES or k4:
        raise ValueError(f"camera_model {str(name)[:40]!r} with k4 {k4:g} is not read, only "
                         f"OPENCV_FISHEYE, and {', '.join(PINHOLES)} with k1, k2, k3, p1, p2")
    return Lens("FULL_OPENCV", w, h, (fx, fy or fx, *middle, k1, k2, p1, p2, k3, 0.0, 0.0, 0.0))


# ---- RealEstate10K

def re10k_rows(path):
    """The cameras of RealEstate10K's text: a list of 19 numbers each, empty for another text.

    They are the time in microseconds; fx and cx as shares of the width, fy and cy of the height, in
    the order fx, fy, cx, cy; 0, 0; the 3x4 world-to-camera matrix, OpenCV, row by row. The first
    line is a link. Raises ValueError.
    """
    lines = [line.split() for line in text_of(path).splitlines()
             if not line.lstrip().startswith("#")]
    if not any(len(line) == RE10K_NUMBERS for line in lines):
        return []
    rows = [[*map(float, line)] for line in lines if len(line) > 1]
    short = [len(line) for line in rows if len(line) != RE10K_NUMBERS]
    if short:
        raise ValueError(f"a line has {short[0]} numbers, {RE10K_NUMBERS} are needed")
    return rows


def re10k_w2c(row):
    """World-to-camera (4, 4), OpenCV, of one of RealEstate10K's rows."""
    return np.array([row[7:11], row[11:15], row[15:19], [0, 0, 0, 1]], float)


# ---- any of them

def read(path, fov):
    """(c2w (n, 4, 4) OpenGL, fov (n,) radians of the shorter side), float64, of a file of cameras.

    A camera whose file does not tell the field of view gets `fov`. COLMAP's images come in the
    order of their names, with the lenses of the cameras file beside them. Raises ValueError that
    names file and camera, for other files and for poses that are not rigid, and OSError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no path file {path}")
    try:
        if path.suffix == ".bin":
            found = colmap_path(path, fov)
        elif path.suffix.lower() == ".json" or text_of(path).lstrip()[:1] in ("[", "{"):
            found = json_path(path, fov)
        else:
            found = re10k_path(path) or colmap_path(path, fov)
        if not found:
            raise ValueError("holds no camera")
    except (ValueError, torch.linalg.LinAlgError) as err:
        raise ValueError(
            f"{path}: is no path (a JSON list of c2w matrices, transforms.json, RealEstate10K text "
            "or COLMAP images): "
            f"{str(err).splitlines()[0].removeprefix(f'{path}: ')}") from err
    poses, fovs = zip(*found)
    c2w = torch.stack(poses)
    check_rigid(c2w, path)
    for i, each in enumerate(fovs):
        if not 0 < each < math.pi:
            raise ValueError(f"{path}: camera {i} has a field of view of {math.degrees(each):g} "
                             "degrees, it must lie between 0 and 180")
    return c2w, torch.tensor(fovs, dtype=torch.float64)


def json_path(path, fov):
    """[(c2w (4, 4), field of view)] of a list of matrices, or of a transforms.json."""
    stored = read_json(path)
    if isinstance(stored, list):
        return [(matrix(pose, f"camera {i}"), fov) for i, pose in enumerate(stored)]
    found = []
    for i, frame in enumerate(read_transforms(path)):
        try:
            lens = transforms_lens(frame)
        except ValueError as err:
            raise ValueError(f"camera {i}: {err}") from err
        found.append((matrix(frame.get("transform_matrix"), f"camera {i}"),
                      lens.fov if lens else fov))
    return found


def re10k_path(path):
    """The same of RealEstate10K's camera text; the shorter side has the larger share."""
    return [(opengl(re10k_w2c(row)), 2 * math.atan2(0.5, max(row[1:3])))
            for row in re10k_rows(path)]


def colmap_path(path, fov):
    """The same of COLMAP's images.txt or images.bin."""
    beside = path.with_name(f"cameras{path.suffix}")
    lenses = read_lenses(beside) if beside.is_file() else {}
    return [(opengl(image.w2c), lenses[image.camera].fov if image.camera in lenses else fov)
            for image in read_images(path)]
