"""Camera paths: where the cameras of new views stand, from a named motion or a file of poses.

The world has z up. The unit of length is the distance from the photo's camera to the point that it
looks at, which is the origin; the photo's camera stands at azimuth 0. Cameras are OpenGL (x right,
y up, z back) camera-to-world matrices `c2w`, float64. n cameras.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from camera import look_at, opengl_from_opencv, relative_pose, spherical
from runtime.files import write_text
from views import MOTIONS, STEEPEST

SPIRAL_TURNS = 2
GRID_AZIMUTHS = (-40.0, -20.0, 0.0, 20.0, 40.0)
GRID_ELEVATIONS = (20.0, 0.0, -20.0)
RIGID = 1e-3                        # largest error of a rotation matrix, as files round it
SHARE_DIGITS = 5                    # of a share of the photo's side, less than a pixel


@dataclass
class Cameras:
    """A path: the photo's camera, and the cameras of the views."""
    cond_c2w: torch.Tensor          # (4, 4)
    c2w: torch.Tensor               # (n, 4, 4)
    fov: torch.Tensor               # (n,) radians
    cond_fov: float                 # radians
    closed: bool = False            # the last view leads back to the first

    def __len__(self):
        return len(self.c2w)

    def __getitem__(self, places):
        return replace(self, c2w=self.c2w[places], fov=self.fov[places])

    def centred(self):
        """Whether all cameras look at the origin with one field of view, as 3DoF models know it."""
        c2w = torch.cat([self.cond_c2w[None], self.c2w])
        position = c2w[:, :3, 3]
        return (torch.allclose(c2w, look_at(position, torch.zeros_like(position)), 0, RIGID)
                and torch.allclose(self.fov, self.fov[:1]))

    def shares(self):
        """How much of the photo's side each view would see from the photo's place: n floats."""
        sides = torch.tan(self.fov / 2) / math.tan(self.cond_fov / 2)
        return [round(side, SHARE_DIGITS) for side in sides.tolist()]


# ---- named motions

def around(azimuth, elevation, radius):
    """Cameras (n, 4, 4) that look at the origin. azimuth, elevation in degrees, radius: (n,) each.

    Raises ValueError where a camera would stand straight above or below the origin, or in it.
    """
    azimuth, elevation, radius = (torch.as_tensor(x, dtype=torch.float64) for x in
                                  (azimuth, elevation, radius))
    azimuth, elevation, radius = torch.broadcast_tensors(azimuth, elevation, radius)
    if not (elevation.abs() <= STEEPEST).all():
        found = elevation.flatten()[elevation.abs().argmax()].item()
        raise ValueError(f"an elevation of {found:g} degrees: it must lie within "
                         f"{-STEEPEST:g} .. {STEEPEST:g}")
    if not (radius > 0).all():
        raise ValueError(f"a radius of {radius.min().item():g}: it must be more than 0")
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    outwards = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=-1)
    position = outwards * radius[..., None]
    return look_at(position, torch.zeros_like(position))


def motion(name, views, by, fov, elevation):
    """The Cameras of a named motion of MOTIONS, the first of them the photo's own.

    by: how far, in degrees, in distances to the origin, or (zoom) times as large; a negative one
    goes the other way. fov in radians, elevation of the photo's camera in degrees.
    """
    if views < 1:
        raise ValueError(f"a path of {views} views: it needs at least 1")
    closed = name in ("spiral", "swing") or name == "orbit" and by != 0 and by % 360 == 0
    s = torch.arange(views, dtype=torch.float64) / (views if closed else max(views - 1, 1))
    cond, fovs = around(0.0, elevation, 1.0), torch.full((views,), fov, dtype=torch.float64)
    c2w = cond.repeat(views, 1, 1)
    if name == "orbit":
        c2w = around(s * by, elevation, 1.0)
    elif name == "swing":
        s = s / 2 if views == 2 else s      # of two, the second is as far as it goes
        c2w = around(by * torch.sin(2 * math.pi * s), elevation, 1.0)
    elif name == "spiral":
        if abs(elevation) + math.degrees(math.atan(abs(by))) > STEEPEST:
            raise ValueError(f"a spiral by {by:g} from an elevation of {elevation:g} degrees goes "
                             "over the pole")
        angle, radius = 2 * math.pi * SPIRAL_TURNS * s, by * torch.sin(math.pi * s)
        offset = torch.stack([radius * angle.cos(), radius * angle.sin(), 0 * s], dim=-1)
        position = cond[:3, 3] + offset @ cond[:3, :3].T
        c2w = look_at(position, torch.zeros_like(position))
    elif name in ("dolly", "truck", "pedestal"):
        right, up, back = cond[:3, :3].T
        c2w[:, :3, 3] += s[:, None] * by * {"dolly": -back, "truck": right, "pedestal": up}[name]
    elif name == "pan":
        c2w[:, :3, :3] = rotation("z", -torch.deg2rad(s * by)) @ cond[:3, :3]
    elif name == "tilt":
        c2w[:, :3, :3] = cond[:3, :3] @ rotation("x", torch.deg2rad(s * by))
    elif name == "zoom":
        if by <= 0:
            raise ValueError(f"a zoom to {by:g} times the size: it must be more than 0")
        fovs = 2 * torch.atan(math.tan(fov / 2) / by**s)
        if not 0 < fovs.min() <= fovs.max() < math.pi:
            raise ValueError(f"a zoom to {by:g} times the size leaves no field of view")
    else:
        raise ValueError(f"motion {name!r} is not known, it is one of {', '.join(MOTIONS)}")
    return Cameras(cond, c2w, fovs, fov, closed)


def rotation(axis, angle):
    """Rotations (n, 3, 3) by angle (n,) radians about "x" or "z", by the right-hand rule."""
    c, s, o = angle.cos(), angle.sin(), torch.zeros_like(angle)
    one = torch.ones_like(angle)
    entries = {"x": (one, o, o, o, c, -s, o, s, c), "z": (c, -s, o, s, c, o, o, o, one)}[axis]
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def grid(fov, elevation):
    """The Cameras of a contact sheet, row by row: GRID_ELEVATIONS down, GRID_AZIMUTHS across."""
    azimuths = torch.tensor(GRID_AZIMUTHS).repeat(len(GRID_ELEVATIONS))
    rises = torch.tensor(GRID_ELEVATIONS).repeat_interleave(len(GRID_AZIMUTHS))
    fovs = torch.full((len(azimuths),), fov, dtype=torch.float64)
    c2w = around(azimuths, elevation + rises, 1.0)
    return Cameras(around(0.0, elevation, 1.0), c2w, fovs, fov)


def poses(texts, fov, elevation):
    """The Cameras of "azimuth,elevation,radius" texts.

    Degrees to the right and upwards of the photo's camera; distance to the origin, 1 the photo's.
    """
    numbers = []
    for text in texts:
        try:
            azimuth, rise, radius = (float(part) for part in text.split(","))
        except ValueError as err:
            raise ValueError(f"--pose {text!r}: three numbers azimuth,elevation,radius are needed, "
                             "for example 30,10,1") from err
        if not all(map(math.isfinite, (azimuth, rise, radius))):
            raise ValueError(f"--pose {text!r}: the numbers must be finite")
        numbers.append((azimuth, elevation + rise, radius))
    fovs = torch.full((len(numbers),), fov, dtype=torch.float64)
    return Cameras(around(0.0, elevation, 1.0), around(*zip(*numbers)), fovs, fov)


# ---- key frames

def nearest_rotation(matrix):
    """The rotations (..., 3, 3) next to matrices (..., 3, 3), by their singular vectors."""
    u, _, v = torch.linalg.svd(matrix)
    sign = torch.ones_like(matrix[..., 0])
    sign[..., 2] = torch.linalg.det(u @ v)
    return u * sign[..., None, :] @ v


def moved(c2w, start, end, times):
    """The cameras that stand to `end` as c2w (n, 4, 4) stand to `start`, `times` as far away."""
    pose = relative_pose(start, c2w)
    pose[:, :3, 3] *= times
    return end @ pose


def smooth(c2w, fov, views, closed):
    """(c2w (views, 4, 4), fov (views,)) along a smooth path through cameras (k, 4, 4), (k,).

    It is a Catmull-Rom spline. Cameras that look at the origin go around it, so that an orbit is
    round and 3DoF models can follow; others go by their positions and axes. A closed path leads
    from the last key frame to the first again.
    """
    if len(c2w) == 1:
        return c2w.repeat(views, 1, 1), fov.repeat(views)
    centred = Cameras(c2w[0], c2w, torch.ones_like(fov), 1.0).centred()
    polar, azimuth, radius = spherical(c2w[:, :3, 3])
    azimuth = torch.from_numpy(np.unwrap(azimuth.numpy()))
    x = torch.stack([azimuth, polar, radius.log(), torch.log(torch.tan(fov / 2))], dim=1)
    x = torch.cat([x, c2w[:, :3].flatten(1)], dim=1)
    ends = (x[-1:], x[:2]) if closed else (2 * x[:1] - x[1:2], 2 * x[-1:] - x[-2:-1])
    x = torch.cat([ends[0], x, ends[1]])
    x[:, 0] = torch.from_numpy(np.unwrap(x[:, 0].numpy()))
    spans = len(c2w) if closed else len(c2w) - 1
    place = torch.arange(views, dtype=x.dtype) * spans / (views if closed else max(views - 1, 1))
    first = place.long().clamp(max=spans - 1)
    f = (place - first)[:, None]
    a, b, c, d = (x[first + i] for i in range(4))
    x = b + f / 2 * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * b - a - 3 * c + d)))
    fov = 2 * torch.atan(x[:, 3].exp())
    if centred:
        rise = (90 - torch.rad2deg(x[:, 1])).clamp(-STEEPEST, STEEPEST)
        return around(torch.rad2deg(x[:, 0]), rise, x[:, 2].exp()), fov
    made = torch.eye(4, dtype=x.dtype).repeat(views, 1, 1)
    made[:, :3] = x[:, 4:].unflatten(1, (3, 4))
    made[:, :3, :3] = nearest_rotation(made[:, :3, :3])
    return made, fov


# ---- files of poses

def read(path, fov):
    """The Cameras of a file; the first is taken as the photo's, the unit of length is the file's.

    Reads a JSON list of camera-to-world matrices (OpenGL, 3x4 or 4x4), nerfstudio's
    transforms.json, RealEstate10K's camera text, and COLMAP's images.txt (in the order of its
    names). A camera whose file does not tell the field of view gets `fov` (radians).
    Raises ValueError that names file and camera, for other files and for poses that are not rigid.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no path file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise ValueError(f"{path}: is not a text file of camera poses") from err
    try:
        is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{")
        c2w, fovs = (from_json if is_json else from_text)(text, fov)
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError,
            torch.linalg.LinAlgError) as err:
        reason = f"{err} is missing" if isinstance(err, KeyError) else str(err).splitlines()[0]
        raise ValueError(
            f"{path}: is no path (a JSON list of c2w matrices, transforms.json, RealEstate10K text "
            f"or COLMAP images.txt): {reason}") from err
    if not len(c2w):
        raise ValueError(f"{path}: holds no camera")
    check_rigid(c2w, path)
    for number, found in enumerate(fovs.tolist()):
        if not 0 < found < math.pi:
            raise ValueError(f"{path}: camera {number} has a field of view of "
                             f"{math.degrees(found):g} degrees, it must lie between 0 and 180")
    return Cameras(c2w[0], c2w, fovs, fovs[0].item())


def check_rigid(c2w, path):
    """Raises ValueError for the first of the matrices (n, 4, 4) that is no rotation and shift."""
    for number, pose in enumerate(c2w):
        problem = pose_problem(pose)
        if problem:
            raise ValueError(f"{path}: camera {number} {problem}")


def pose_problem(pose):
    """What keeps a matrix (4, 4) from being a rotation and shift, or ""."""
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


def matrices(rows):
    """Nested lists of 3x4 or 4x4 matrices -> (n, 4, 4) float64."""
    found = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    for i, row in enumerate(rows):
        try:
            matrix = torch.tensor(row, dtype=torch.float64)
        except (TypeError, ValueError) as err:
            raise ValueError(f"camera {i} is no matrix of numbers") from err
        if matrix.shape not in ((3, 4), (4, 4)):
            raise ValueError(f"camera {i} is of shape {list(matrix.shape)}, it must be 3x4 or 4x4")
        found[i, :len(matrix)] = matrix
    return found


def short_side_fov(known, fov):
    """Field of view of the shorter side, from a frame's values in transforms.json; else `fov`."""
    half = math.tan(known.get("camera_angle_x", fov) / 2)       # half the width, in focal lengths
    if "fl_x" in known and "w" not in known:
        raise ValueError("fl_x, in pixels, says nothing without w, the image's width in pixels")
    if not ("w" in known and ("fl_x" in known or "camera_angle_x" in known)):
        return 2 * math.atan(half)
    w, h = known["w"], known.get("h", known["w"])
    focal = known.get("fl_x", w / 2 / half)
    return 2 * math.atan(min(w, h) / 2 / (known.get("fl_y", focal) if h < w else focal))


def from_json(text, fov):
    """(c2w (n, 4, 4), fov (n,)) of a list of matrices, or of nerfstudio's transforms.json."""
    stored = json.loads(text)
    if isinstance(stored, list):
        return matrices(stored), torch.full((len(stored),), fov, dtype=torch.float64)
    frames = stored.get("frames") if isinstance(stored, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError("it has no list of frames")
    fovs = []
    for i, frame in enumerate(frames):
        try:
            fovs.append(short_side_fov({**stored, **frame}, fov))
        except (TypeError, ArithmeticError) as err:
            raise ValueError(f"camera {i} has focal lengths or sides that are no numbers above 0"
                             ) from err
    return (matrices([frame["transform_matrix"] for frame in frames]),
            torch.tensor(fovs, dtype=torch.float64))


def from_text(text, fov):
    """(c2w (n, 4, 4), fov (n,)) of RealEstate10K's camera text, or of COLMAP's images.txt."""
    rows = re10k_rows(text)
    if rows:
        w2c = matrices([[row[7:11], row[11:15], row[15:19]] for row in rows])
        fovs = [2 * math.atan(0.5 / max(row[1], row[2])) for row in rows]
        return opengl_from_opencv(torch.linalg.inv(w2c)), torch.tensor(fovs, dtype=torch.float64)
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    while lines and not lines[0]:
        del lines[0]
    # COLMAP: two lines an image, the second has its points (three numbers each, perhaps none)
    images = [line for line in lines[::2] if line]
    if any(len(line) < 10 for line in images) or any(len(line) % 3 for line in lines[1::2]):
        raise ValueError("COLMAP's text has two lines an image, of 10 words and of three a point")
    if any(abs(math.hypot(*map(float, line[1:5])) - 1) > RIGID for line in images):
        raise ValueError("a quaternion is not of length 1")
    images.sort(key=lambda line: in_order(line[9]))
    w2c = torch.eye(4, dtype=torch.float64).repeat(len(images), 1, 1)
    for row, line in zip(w2c, images):
        row[:3, :3] = from_quaternion(*map(float, line[1:5]))
        row[:3, 3] = torch.tensor([float(x) for x in line[5:8]])
    return opengl_from_opencv(torch.linalg.inv(w2c)), torch.full((len(images),), fov).double()


def in_order(name):
    """What sorts names whose numbers are not padded: frame9 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def re10k_rows(text):
    """The cameras of RealEstate10K's text: a list of 19 numbers each, empty for another text.

    They are the time in microseconds; fx and cx as shares of the width, fy and cy of the height, in
    the order fx, fy, cx, cy; 0, 0; the 3x4 world-to-camera matrix, OpenCV, row by row. The first
    line is a link. Raises ValueError.
    """
    numbers = 19
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    if not any(len(line) == numbers for line in lines):
        return []
    rows = [list(map(float, line)) for line in lines if len(line) > 1]
    short = [len(line) for line in rows if len(line) != numbers]
    if short:
        raise ValueError(f"a line has {short[0]} numbers, {numbers} are needed")
    return rows


def from_quaternion(w, x, y, z):
    """Rotation matrix (3, 3) of a quaternion, which need not have length 1."""
    n = 2 / (w * w + x * x + y * y + z * z)
    return torch.tensor([
        [1 - n * (y * y + z * z), n * (x * y - w * z), n * (x * z + w * y)],
        [n * (x * y + w * z), 1 - n * (x * x + z * z), n * (y * z - w * x)],
        [n * (x * z - w * y), n * (y * z + w * x), 1 - n * (x * x + y * y)]], dtype=torch.float64)


def write(path, cameras, size, files, cond_file):
    """Writes nerfstudio's transforms.json: the photo, then the views, squares of `size` pixels."""
    def frame(file, c2w, fov):
        focal = size / 2 / math.tan(fov / 2)
        return {"file_path": file, "fl_x": focal, "fl_y": focal, "transform_matrix": c2w.tolist()}

    fovs = cameras.fov.tolist()
    frames = [frame(cond_file, cameras.cond_c2w, cameras.cond_fov)]
    frames += [frame(file, c2w, fov) for file, c2w, fov in zip(files, cameras.c2w, fovs)]
    shared = {"camera_model": "PINHOLE", "w": size, "h": size, "cx": size / 2, "cy": size / 2}
    write_text(Path(path), json.dumps({**shared, "frames": frames}, indent=1))
