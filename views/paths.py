"""Camera paths: where the cameras of new views stand, from a named motion or a file of poses.

The world has z up. The unit of length is the distance from the photo's camera to the point that it
looks at, which is the origin; the photo's camera stands at azimuth 0. Cameras are OpenGL (x right,
y up, z back) camera-to-world matrices `c2w`, float64. n cameras.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from camera import look_at, relative_pose, spherical
from runtime.files import write_text
from shards.index import RIGID
from views import DEFAULT_MOTION, MOTIONS, STEEPEST
from views.cameras import read as read_cameras

SPIRAL_TURNS = 2
GRID_AZIMUTHS = (-40.0, -20.0, 0.0, 20.0, 40.0)
GRID_ELEVATIONS = (20.0, 0.0, -20.0)
SAME_PLACE = 1e-6                   # squared distance of two cameras that counts as none
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

    def check_mode(self, mode, others=0):
        """Itself. Raises ValueError unless a model of this camera.Mode can follow the path, from so
        many other photos."""
        if mode.pose == "angles" and (others or not self.centred()):
            raise ValueError(
                "a 3DoF model knows of azimuth, elevation and distance alone: its cameras look at "
                "the centre with one field of view, as those of orbit, swing, spiral, dolly, grid "
                "and pose do, and start from one photo")
        return self

    def after_photo(self):
        """The Cameras without the first, if that is the photo's."""
        begins = (torch.allclose(self.c2w[0], self.cond_c2w, 0, RIGID)
                  and abs(self.fov[0] - self.cond_fov) < RIGID)
        return self[int(begins):]

    def shares(self):
        """How much of the photo's side each view would see from the photo's place: n floats."""
        sides = torch.tan(self.fov / 2) / math.tan(self.cond_fov / 2)
        return [round(side, SHARE_DIGITS) for side in sides.tolist()]


def nearness(cond_c2w, c2w):
    """How near cameras cond_c2w (k, 4, 4) stand to the views c2w (n, 4, 4): weights (k, n), of sum
    1 over the cameras, that fall with the square of the distance, in units and radians alike."""
    pose = relative_pose(cond_c2w[:, None], c2w)
    angle = ((pose.diagonal(dim1=-2, dim2=-1)[..., :3].sum(-1) - 1) / 2).clamp(-1, 1).acos()
    weights = 1 / (pose[..., :3, 3].square().sum(-1) + angle**2).clamp(min=SAME_PLACE)
    return weights / weights.sum(0)


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


def asked_for(args, fov, elevation):
    """The Cameras that views.add_path_options ask for, and their name. Raises ValueError."""
    if args.path:
        return read(args.path, fov), "path"
    if args.pose:
        return poses(args.pose, fov, elevation), "poses"
    if args.grid:
        return grid(fov, elevation), "grid"
    name = args.motion or DEFAULT_MOTION
    by = MOTIONS[name][0] if args.by is None else args.by
    return motion(name, args.views, by, fov, elevation), name


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


def smooth(keys, views, closed):
    """The Cameras of so many views along a smooth path through key frames, which are Cameras too.

    It is a Catmull-Rom spline. Cameras that look at the origin go around it, so that an orbit is
    round and 3DoF models can follow; others go by their positions and axes. A closed path leads
    from the last key frame to the first again.
    """
    c2w, fov = keys.c2w, keys.fov
    if len(c2w) == 1:
        return keys[[0] * views]
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
        made = around(torch.rad2deg(x[:, 0]), rise, x[:, 2].exp())
    else:
        made = torch.eye(4, dtype=x.dtype).repeat(views, 1, 1)
        made[:, :3] = x[:, 4:].unflatten(1, (3, 4))
        made[:, :3, :3] = nearest_rotation(made[:, :3, :3])
    return replace(keys, c2w=made, fov=fov, closed=closed)


# ---- files of poses

def read(path, fov):
    """The Cameras of a file that views/cameras.py reads; the first is taken as the photo's.

    The unit of length is the file's. A camera whose file does not tell the field of view gets `fov`
    (radians). Raises ValueError that names file and camera, OSError.
    """
    c2w, fovs = read_cameras(path, fov)
    return Cameras(c2w[0], c2w, fovs, fovs[0].item())


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
