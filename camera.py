"""Cameras: conventions, the geometry of a scene, and the pose vector T that conditions the network.

In: camera-to-world matrices `cond_c2w` and `target_c2w` (b, 4, 4) of two views, the field of view
`fov` (b,) in radians, and `scale` (b,), the length that counts as one. Out: T (b, 4 or 19).
Read MODES first, then `conditioning`: which length counts as one is the question of the paper
(ZeroNVS, arXiv:2310.17994, section 3.2), and MODES holds its answers.

Every camera here is OpenGL (x right, y up, z towards the viewer) and camera-to-world, as a 4x4
matrix `c2w`; the world has z up. Letters: `b` batch, `n` cameras of a scene, `h w` pixels.
"""

from dataclasses import dataclass

import torch

SMALLEST_SCALE = 1e-2                       # translations are divided by no less
LARGEST_ENTRY = 20.0                        # of the relative pose where it is clipped
TANH_GAIN, TANH_RANGE = 0.5, 10.0           # squashed translations: gain * range * tanh(t / range)
STEREOMAG_RANGE = (0.1, 100.0)              # near-plane quantiles are clipped to it
QUANTILE, QUANTILE_STRIDE = 0.2, 4          # of the conditioning depth, every 4th row and column
SMALLEST_SQUARES = 1e-3                     # of the metric depth, summed


# ---- the modes

@dataclass(frozen=True)
class Mode:
    """One way to tell the network where the target camera is. DoF: degrees of freedom; +1: fov."""
    paper: str              # its row in the paper's table 4; "" is not in it
    pose: str               # matrix: relative 4x4 pose and field of view | angles: zero123's four
    unit: str               # the length that counts as one:
                            #   scene      the scene's own unit, whatever it is
                            #   cameras    mean distance of the scene's cameras to their mean
                            #   nearplane  how near things come, in all views (arXiv:1805.09817)
                            #   viewer     20% quantile of the conditioning view's dense depth
                            #   metric     a metre, by a network that this project does not have
    bound: str              # large entries are kept ("") | clipped (clip) | squashed (squash)
    weights: str = ""       # the published checkpoint that learnt it

    @property
    def width(self):
        """How many numbers T has."""
        return 4 if self.pose == "angles" else 4 * 4 + 3

    @property
    def unscaled(self):
        """Whether poses stay in the scene's own unit."""
        return self.unit == "scene"

    @property
    def needs_depth(self):
        """Whether the scale follows from the conditioning view's depth at every pixel."""
        return self.unit in ("viewer", "metric")


MODES = {
    "3dof": Mode("3DoF", "angles", "scene", "", weights="zero123-xl.ckpt"),
    "7dof_unscaled": Mode("6DoF+1", "matrix", "scene", "clip"),
    "7dof": Mode("6DoF+1, norm.", "matrix", "cameras", ""),
    "7dof_stereomag_scale": Mode("6DoF+1, agg.", "matrix", "nearplane", "clip"),
    "7dof_quantile_scale": Mode("6DoF+1, viewer", "matrix", "viewer", "squash",
                                weights="zeronvs.ckpt"),
    "7dof_metric_scale": Mode("", "matrix", "metric", ""),
}
NO_METRIC_DEPTH = ("mode 7dof_metric_scale needs a metric depth network, and there is none here: "
                   "choose --mode=7dof_quantile_scale or --mode=7dof")
# departs: 7dof_qs, which the published training command passes and the reference's code rejects, is
# 7dof_quantile_scale [test_the_published_name_7dof_qs_is_the_quantile_mode]
ALIASES = {"7dof_qs": "7dof_quantile_scale"}


def mode_named(name):
    """The Mode of that name or alias. ValueError lists the names."""
    if ALIASES.get(name, name) not in MODES:
        raise ValueError(f"mode {name!r} is not known, it is one of {', '.join(MODES)}")
    return MODES[ALIASES.get(name, name)]


# ---- conventions

def opengl_from_opencv(c2w):
    """OpenCV's c2w (..., 4, 4) (x right, y down, z forward) -> OpenGL, or back: it is one flip."""
    return c2w * c2w.new_tensor([1.0, -1.0, -1.0, 1.0])


def opengl_from_pytorch3d(R, T):
    """CO3D's `R` (..., 3, 3) and `T` (..., 3) -> OpenGL camera-to-world (..., 4, 4).

    PyTorch3D multiplies row vectors, x_cam = x_world @ R + T, and looks along +z with x left and
    y up.
    """
    w2c = torch.zeros(*R.shape[:-2], 4, 4, dtype=R.dtype)
    w2c[..., :3, :3] = R.transpose(-1, -2)
    w2c[..., :3, 3] = T
    w2c[..., 3, 3] = 1
    turn = R.new_tensor([-1.0, 1.0, -1.0, 1.0])     # half a turn about y: x right, z back
    return torch.linalg.inv(turn[:, None] * w2c)


def look_at(position, target, up=(0.0, 0.0, 1.0)):
    """Camera-to-world (..., 4, 4) of cameras at `position` (..., 3) that face `target` (..., 3)."""
    back = torch.nn.functional.normalize(position - target, dim=-1)
    right = torch.linalg.cross(torch.as_tensor(up, dtype=back.dtype).expand_as(back), back)
    right = torch.nn.functional.normalize(right, dim=-1)
    c2w = torch.zeros(*back.shape[:-1], 4, 4, dtype=back.dtype)
    c2w[..., :3, :] = torch.stack([right, torch.linalg.cross(back, right), back, position], dim=-1)
    c2w[..., 3, 3] = 1
    return c2w


# ---- the geometry of a scene

@dataclass
class SceneGeometry:
    """Where the cameras of a scene stand, in the scene's unit. Angles in degrees."""
    center: torch.Tensor            # (3,) mean of the camera centres
    focus_point: torch.Tensor       # (3,) nearest to all optical axes; nan when they are parallel
    radius: torch.Tensor            # () mean distance of the camera centres to `center`
    radius_focus: torch.Tensor      # () the same to `focus_point`
    elevation: torch.Tensor         # (n,) of each camera


def focus_point(c2w):
    """The point (3,) of least squared distance to all optical axes of c2w (n, 4, 4): where the
    cameras look; nan where no one is nearest."""
    # departs: one camera, or parallel ones, have no focus point (nan); in the reference they end
    # in a singular matrix or in noise [test_parallel_and_single_cameras_have_no_focus_point]
    axis, position = c2w[:, :3, 2], c2w[:, :3, 3]
    across = torch.eye(3, dtype=c2w.dtype) - axis[:, :, None] * axis[:, None, :]    # (n, 3, 3)
    normal = (across.mT @ across).mean(0)
    if torch.linalg.matrix_rank(normal, hermitian=True, rtol=1e-9) < 3:
        return torch.full_like(position[0], torch.nan)
    return torch.linalg.solve(normal, (across.mT @ across @ position[:, :, None]).mean(0)[:, 0])


def scene_geometry(c2w):
    """SceneGeometry of the cameras c2w (n, 4, 4) of one scene; float64 wanted."""
    position = c2w[:, :3, 3]
    center, focus = position.mean(0), focus_point(c2w)
    from_center = (position - center).norm(dim=-1)
    # quirk: a scene's "elevation" is the cameras' above its focus point only where they stand on a
    # circle around a vertical axis [test_scene_geometry_equals_the_reference]
    elevation = torch.rad2deg(torch.atan2((center - focus).norm(), from_center))
    return SceneGeometry(center, focus, from_center.mean(),
                         (position - focus).norm(dim=-1).mean(), elevation)


# ---- the pose vector

def relative_pose(cond_c2w, target_c2w):
    """inv(cond_c2w) @ target_c2w (..., 4, 4): the target camera in the conditioning one's frame."""
    return torch.linalg.inv(cond_c2w) @ target_c2w


def fov_encoding(fov):
    """fov (b,) radians -> (b, 3): itself, its sine and cosine."""
    return torch.stack([fov, fov.sin(), fov.cos()], dim=-1)


def spherical(position):
    """(b, 3) -> polar angle from z, azimuth, radius: each (b,), about the world's origin."""
    across = position[:, :2].norm(dim=-1)
    return (torch.atan2(across, position[:, 2]), torch.atan2(position[:, 1], position[:, 0]),
            position.norm(dim=-1))


def conditioning(mode, cond_c2w, target_c2w, fov, scale):
    """The pose vector T (b, MODES[mode].width), in the dtype of the poses.

    mode: a name in MODES. cond_c2w, target_c2w: (b, 4, 4). fov: (b,) radians. scale: (b,) length
    that counts as one, in the unit of the poses, as depth.py finds it; unscaled modes ignore it.
    ValueError: an unknown mode. Source: section 3.2; 3dof is zero123's (arXiv:2303.11328).
    """
    mode = mode_named(mode)
    if mode.pose == "angles":
        (polar0, azimuth0, radius0), (polar, azimuth, radius) = (
            spherical(c2w[:, :3, 3]) for c2w in (cond_c2w, target_c2w))
        turn = azimuth - azimuth0
        return torch.stack([polar - polar0, turn.sin(), turn.cos(), radius - radius0], dim=-1)
    pose = relative_pose(cond_c2w, target_c2w)
    if not mode.unscaled:
        pose[:, :3, 3] /= scale.to(pose.dtype).clamp(min=SMALLEST_SCALE)[:, None]
    if mode.bound == "clip":
        pose = pose.nan_to_num(0.0).clamp(-LARGEST_ENTRY, LARGEST_ENTRY)
    elif mode.bound == "squash":
        pose[:, :3, 3] = TANH_GAIN * TANH_RANGE * torch.tanh(pose[:, :3, 3] / TANH_RANGE)
        pose = pose.nan_to_num(nan=0.0, posinf=TANH_RANGE, neginf=-TANH_RANGE)
    return torch.cat([pose.flatten(1), fov_encoding(fov.to(pose.dtype))], dim=-1)   # (b, 16 + 3)


# ---- the length that counts as one

def stereomag_scale(nearplane):
    """Near planes (b,), depths that little of a scene is nearer than -> scales (b,); of nan 1."""
    return nearplane.clamp(*STEREOMAG_RANGE).nan_to_num(1.0)


def quantile_scale(depth):
    """Depth at every pixel (b, h, w) of conditioning views -> 20% quantiles (b,): the published
    scale, which a fifth of the view is nearer than."""
    return depth[:, ::QUANTILE_STRIDE, ::QUANTILE_STRIDE].flatten(1).quantile(QUANTILE, dim=1)


def metric_scale(metric, depth):
    """Factor (b,) from metric depth (b, h, w) to the scene's unit: least squares over depth > 0."""
    valid = depth > 0
    product = torch.where(valid, metric * depth, 0).flatten(1).sum(1)
    return product / torch.where(valid, metric**2, 0).flatten(1).sum(1).clamp(min=SMALLEST_SQUARES)
