"""The readers of files of cameras, one a format, for every command that reads one.

transforms.json as nerfstudio, instant-ngp, Blender, Polycam and Record3D write it, RealEstate10K's
text, JSON lists of matrices; COLMAP's files are read by colmap.py. docs/data-fields.md says what
becomes of each field. Cameras are OpenGL camera-to-world. Letters: `n` cameras.
"""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from camera import opengl_from_opencv
from views.colmap import MOST_PIXELS, Lens, read_images, read_lenses, text_of

RIGID = 1e-3                    # largest error of a rotation matrix, as files round it
RE10K_NUMBERS = 19              # of a line of RealEstate10K's text
# fields of transforms.json that say nothing about where a camera is and what it sees
READ = set("frames file_path transform_matrix camera_model w h fl_x fl_y cx cy camera_angle_x "
           "camera_angle_y k1 k2 k3 k4 p1 p2 distortion_params is_fisheye depth_file_path "
           "depth_path integer_depth_scale applied_scale".split())
NEEDLESS = set("applied_transform ply_file_path orientation_override train_filenames "
               "val_filenames test_filenames aabb aabb_scale render_aabb scale offset up sharpness "
               "rotation colmap_im_id timestamp time blur_score neighbors manual_keyframe "
               "center_depth n_frames from_na enable_depth_loading camera_label".split())
# fields without which a picture is not what its camera says
REFUSED = {"fisheye_crop_radius": "pixels outside a circle do not count",
           "transform_matrix_start": "its camera moves while the shutter is open"}
PINHOLES = "SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"


def pose_problem(pose):
    """What keeps a matrix (4, 4), a tensor, from being a rotation and shift, or ""."""
    turn = pose[:3, :3]
    error = (turn @ turn.T - torch.eye(3, dtype=turn.dtype)).abs().max().item()
    if not pose.isfinite().all():
        return "holds numbers that are not finite"
    if (pose[3] - pose.new_tensor([0.0, 0.0, 0.0, 1.0])).abs().max() > RIGID:
        return "has a last row other than 0 0 0 1"
    if not error <= RIGID:
        return f"is not rigid (its rotation times its transpose is off by {error:.2g})"
    if torch.linalg.det(turn) < 0:
        return "mirrors (the determinant of its rotation is negative)"
    return ""


def check_rigid(c2w, path):
    """Raises ValueError for the first of the matrices (n, 4, 4) that is no rotation and shift."""
    for number, pose in enumerate(c2w):
        problem = pose_problem(pose)
        if problem:
            raise ValueError(f"{path}: camera {number} {problem}")


def matrix(rows, what="it"):
    """The (4, 4) float64 tensor of nested lists, 3x4 or 4x4. Raises ValueError."""
    try:
        found = np.array(rows, float)
    except (TypeError, ValueError, OverflowError) as err:
        raise ValueError(f"{what} is no matrix of numbers") from err
    if found.shape not in ((3, 4), (4, 4)):
        raise ValueError(f"{what} is of shape {list(found.shape)}, it must be 3x4 or 4x4")
    full = torch.eye(4, dtype=torch.float64)
    full[:len(found)] = torch.from_numpy(found)
    return full


# ---- transforms.json

def read_transforms(path):
    """(frames with the keys that all share, Counter of fields that are not used) of a
    transforms.json. Raises FileNotFoundError, ValueError."""
    path = Path(path)
    if not path.is_file():
        others = " or ".join(map(str, sorted(path.parent.glob("transforms*.json"))))
        raise FileNotFoundError(f"{path} is missing" + f"; there is {others}" * bool(others))
    return frames_of(json_of(text_of(path), path), path)


def json_of(text, path):
    """The contents of a JSON text. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path}: is no JSON: {err}") from err


def frames_of(stored, path):
    """The same from its contents."""
    frames = stored.get("frames") if isinstance(stored, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{path}: is no transforms.json: it has no list of frames")
    frames = [{**stored, **frame} for frame in frames]
    fields = Counter(field for frame in frames for field in frame)
    return frames, Counter({field: count for field, count in fields.items()
                            if field not in READ | NEEDLESS})


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
        raise ValueError(f"{field} is {str(found)[:40]!r}, it must be a number " + (
            f"above {low:g}" if high == math.inf and low == 0 else
            "that is finite" if high == math.inf else f"between {low:g} and {high:g}"))
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
    bends = [number(frame, field, -math.inf, default=0.0)
             for field in ("k1", "k2", "k3", "k4", "p1", "p2")]
    if frame.get("distortion_params") is not None:       # nerfstudio's order
        listed = frame["distortion_params"]
        if not isinstance(listed, list) or len(listed) > len(bends) and any(listed[len(bends):]):
            raise ValueError(f"distortion_params are not {len(bends)} numbers")
        bends = [number({"distortion_params": each}, "distortion_params", -math.inf)
                 for each in [*listed, *[0.0] * len(bends)][:len(bends)]]
    k1, k2, k3, k4, p1, p2 = bends
    name = frame.get("camera_model") or "OPENCV"
    if name == "OPENCV_FISHEYE" or frame.get("is_fisheye"):
        return Lens("OPENCV_FISHEYE", w, h, (fx, fy or fx, *middle, k1, k2, k3, k4))
    if name not in PINHOLES or k4:
        raise ValueError(f"camera_model {str(name)[:40]!r}" + (f" with k4 {k4:g}" if k4 else "")
                         + f" is not read, only OPENCV_FISHEYE, and {', '.join(PINHOLES)} "
                         "with k1, k2, k3, p1, p2")
    return Lens("FULL_OPENCV", w, h, (fx, fy or fx, *middle, k1, k2, p1, p2, k3, 0.0, 0.0, 0.0))


# ---- RealEstate10K

def re10k_rows(text):
    """The cameras of RealEstate10K's text: a list of 19 numbers each, empty for another text.

    They are the time in microseconds; fx and cx as shares of the width, fy and cy of the height, in
    the order fx, fy, cx, cy; 0, 0; the 3x4 world-to-camera matrix, OpenCV, row by row. The first
    line is a link. Raises ValueError.
    """
    lines = [line.split() for line in text.splitlines() if not line.lstrip().startswith("#")]
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
            c2w, fovs = colmap_path(path, fov)
        else:
            text = text_of(path)
            is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{")
            c2w, fovs = (json_path if is_json else text_path)(text, path, fov)
    except (ValueError, LookupError, torch.linalg.LinAlgError) as err:
        reason = f"{err} is missing" if isinstance(err, KeyError) else str(err).splitlines()[0]
        raise ValueError(
            f"{path}: is no path (a JSON list of c2w matrices, transforms.json, RealEstate10K text "
            f"or COLMAP images): {reason.removeprefix(f'{path}: ')}") from err
    if not len(c2w):
        raise ValueError(f"{path}: holds no camera")
    check_rigid(c2w, path)
    for i, found in enumerate(fovs):
        if not 0 < found < math.pi:
            raise ValueError(f"{path}: camera {i} has a field of view of "
                             f"{math.degrees(found):g} degrees, it must lie between 0 and 180")
    return c2w, torch.tensor(fovs, dtype=torch.float64)


def json_path(text, path, fov):
    """(c2w (n, 4, 4), list of fields of view) of a list of matrices, or of a transforms.json."""
    stored = json_of(text, path)
    if isinstance(stored, list):
        poses, fovs = stored, [fov] * len(stored)
    else:
        poses, fovs = [], []
        for i, frame in enumerate(frames_of(stored, path)[0]):
            try:
                lens = transforms_lens(frame)
            except ValueError as err:
                raise ValueError(f"camera {i}: {err}") from err
            fovs.append(lens.fov if lens else fov)
            poses.append(frame["transform_matrix"])
    c2w = [matrix(pose, f"camera {i}") for i, pose in enumerate(poses)]
    return torch.stack(c2w) if c2w else torch.zeros(0, 4, 4), fovs


def text_path(text, path, fov):
    """The same of RealEstate10K's camera text, or of COLMAP's images.txt."""
    rows = re10k_rows(text)
    if not rows:
        return colmap_path(path, fov)
    w2c = torch.from_numpy(np.array([re10k_w2c(row) for row in rows]))
    for i, row in enumerate(rows):
        if not 0 < min(row[1:3]):
            raise ValueError(f"camera {i} has focal lengths of {row[1]:g} and {row[2]:g}")
    fovs = [2 * math.atan(0.5 / max(row[1], row[2])) for row in rows]
    return opengl_from_opencv(torch.linalg.inv(w2c)), fovs


def colmap_path(path, fov):
    """The same of COLMAP's images.txt or images.bin."""
    images, lenses = read_images(path), {}
    if (path.parent / f"cameras{path.suffix}").is_file():
        lenses = read_lenses(path.with_name(f"cameras{path.suffix}"))
    if not images:
        return torch.zeros(0, 4, 4), []
    w2c = torch.from_numpy(np.array([image.w2c for image in images]))
    if not w2c.isfinite().all():
        raise ValueError("a quaternion is not of length 1")
    fovs = [lenses[image.camera].fov if image.camera in lenses else fov for image in images]
    return opengl_from_opencv(torch.linalg.inv(w2c)), fovs
