"""How near a view is to the truth, and whether it follows its camera. No model of ours in here.

PSNR, SSIM (Wang et al. 2004, as scikit-image computes it), LPIPS (arXiv:1801.03924), the warp of a
view of known depth into another camera, and how well a view agrees with that warp. Images live in
[-1, 1] and are square; cameras are OpenGL; depth is the distance along the viewing axis, 0 where it
is unknown. Letters: `b` batch, `c` channels, `h w` pixels, `n` points.
"""

import math

import torch
import torch.nn.functional as F

from runtime.foreign import read_file

PEAK = 2.0                      # images live in [-1, 1]
WINDOW, K1, K2 = 7, 0.01, 0.03  # of SSIM: pixels a side, stabilisers (scikit-image's defaults)
ROUNDING = (PEAK / 255)**2 / 12     # mean squared error of rounding to 8 bits: 59 dB
SAME_SURFACE = 0.02             # largest relative difference of two depths of one surface
LANDS = 0.999                   # pixels to the sides of where it lands that a pixel covers
IMPROVEMENTS = 2                # of the depth that a warp finds
LEAST_SEEN = 0.05               # share of a view that must be seen by both for a figure

BACKBONES = {"alex": ("alexnet", 31), "vgg": ("vgg16", 16)}     # of LPIPS: torchvision's name, and
                                # pixels a side that its pools leave something of


# ---- of two images

def decibels(mse):
    """Mean squared errors of images in [-1, 1] -> dB."""
    return 10 * torch.log10(PEAK**2 / mse.clamp(min=torch.finfo(mse.dtype).tiny))


def psnr(image, truth):
    """Peak signal-to-noise ratio in dB of (b, c, h, w) images in [-1, 1], each on its own: (b,)."""
    # departs: PSNR is of each view on its own; the reference takes the error of a whole batch at
    # once, which depends on the batch [test_psnr_is_of_each_image_and_not_of_the_batch]
    return decibels((image - truth).square().mean(dim=(1, 2, 3)))


def ssim(image, truth):
    """Structural similarity of (b, c, h, w) images in [-1, 1]: (b,), 1 where they are equal.

    scikit-image's default, which the reference calls, on images in [0, 1]: uniform windows of 7x7
    that lie inside the image, sample variances, the mean over channels. ValueError where the images
    are smaller.
    """
    if min(image.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} pixels a side, not "
                         f"{min(image.shape[2:])}")
    # variances are small differences of large numbers; MPS has no float64
    dtype = torch.float32 if image.device.type == "mps" else torch.float64
    x, y = (image.to(dtype) + 1) / 2, (truth.to(dtype) + 1) / 2     # no shift leaves SSIM alone

    def mean(a):
        return F.avg_pool2d(a, WINDOW, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_y = sample * (mean(x * x) - mean_x**2), sample * (mean(y * y) - mean_y**2)
    covariance = sample * (mean(x * y) - mean_x * mean_y)
    c1, c2 = K1**2, K2**2
    index = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
             / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return index.mean(dim=(1, 2, 3)).float()


def sharpness(image, truth):
    """The energy of the gradients of (b, c, h, w) images, as a share of the truth's: (b,)."""
    mine, its = (x.diff(dim=2).square().mean((1, 2, 3)) + x.diff(dim=3).square().mean((1, 2, 3))
                 for x in (image, truth))
    return mine / its.clamp(min=ROUNDING)


def load_lpips(net, backbone, device="cpu"):
    """Learned perceptual distance (arXiv:1801.03924), version 0.1, by the lpips package: a function
    of images (b, 3, h, w) in [-1, 1] -> (b,).

    net: alex or vgg; backbone: torchvision's file of its weights, as nothing is downloaded. Raises
    ValueError, FileNotFoundError.
    """
    try:
        import lpips
    except (ImportError, RuntimeError, OSError) as err:     # a torchvision of another torch
        reason = next(iter(str(err).splitlines()), type(err).__name__)
        raise ValueError(f"LPIPS needs the lpips package ({reason}): pip install lpips") from err
    if net not in BACKBONES:
        raise ValueError(f"--lpips {net}: it is one of {', '.join(BACKBONES)}")
    name, smallest = BACKBONES[net]
    module, state = lpips.LPIPS(net=net, pnet_rand=True, verbose=False), read_file(backbone)
    mine = {}
    for key, tensor in module.net.state_dict().items():
        # the package's slices keep torchvision's numbers of the layers
        theirs = f"features.{key.partition('.')[2]}"
        if theirs not in state or state[theirs].shape != tensor.shape:
            raise ValueError(f"{backbone}: not torchvision's {name}: {theirs} of shape "
                             f"{list(tensor.shape)} is not in it")
        mine[key] = state[theirs]
    module.net.load_state_dict(mine)
    module.to(device).eval().requires_grad_(False)

    def distance(image, truth):
        if min(image.shape[2:]) < smallest:
            raise ValueError(f"LPIPS by {net} needs images of at least {smallest} pixels a side, "
                             f"not {min(image.shape[2:])}")
        return module(image, truth).flatten()
    return distance


# ---- warping

def points_of(depth, fov):
    """Points (b, 3, n) in the camera's own axes that a view of `depth` (b, h, w) sees, one
    at each pixel's centre; fov (b,) radians."""
    size = depth.shape[-1]
    place = (torch.arange(size, device=depth.device) + 0.5) * 2 / size - 1
    slope = torch.tan(fov / 2)[:, None, None]
    x = (place[None, None, :] * slope).expand_as(depth)
    y = (-place[None, :, None] * slope).expand_as(depth)
    return torch.stack([x * depth, y * depth, -depth], dim=1).flatten(2)


def project(points, fov):
    """Points (b, 3, n) in a camera's axes -> x to the right, y down, each (b, n), -1..1 over the
    image, and depth (b, n)."""
    x, y, depth = points[:, 0], points[:, 1], -points[:, 2]
    reach = depth * torch.tan(fov / 2)[:, None]
    reach = torch.where(reach > 0, reach, torch.nan)
    return x / reach, -y / reach, depth


def moved(points, pose):
    """Points (b, 3, n) after the rigid motion pose (b, 4, 4)."""
    return pose[:, :3, :3] @ points + pose[:, :3, 3:]


def splat(depth_cond, pose, fov):
    """Depth (b, h, w) of the conditioning view's surfaces as a camera sees it that stands at `pose`
    (b, 4, 4) in the axes of the conditioning camera; 0 where nothing lands.

    Every pixel of known depth lands on the four pixels around its place, and the nearest wins.
    """
    b, size = depth_cond.shape[:2]
    x, y, depth = project(moved(points_of(depth_cond, fov), torch.linalg.inv(pose)), fov)
    column, row = ((axis.nan_to_num(math.inf).clamp(-2, 2) + 1) * size / 2 - 0.5 for axis in (x, y))
    known = (depth_cond.flatten(1) > 0) & (depth > 0)
    nearest = torch.full((b, size * size), math.inf, device=depth.device, dtype=depth.dtype)
    for right in (0, 1):
        for down in (0, 1):
            j, i = column.floor().long() + right, row.floor().long() + down
            near = ((j - column).abs() < LANDS) & ((i - row).abs() < LANDS)
            lands = known & near & (j >= 0) & (j < size) & (i >= 0) & (i < size)
            place = torch.where(lands, i * size + j, 0)
            nearest.scatter_reduce_(1, place, torch.where(lands, depth, math.inf), "amin")
    return torch.where(nearest.isinf(), 0, nearest).view(b, size, size)


def look_back(image_cond, depth_cond, depth, pose, fov):
    """What the conditioning view saw of the surfaces at `depth` (b, h, w) of the camera at `pose`:
    colours (b, c, h, w), where it saw them (b, h, w), and what depth they then have.

    Colours are bilinear, of where a pixel's centre lies in the conditioning view. It saw a surface
    if its own depth there is the surface's; inverse depth is interpolated, exact on planes.
    """
    points = moved(points_of(depth, fov), pose)
    x, y, expected = project(points, fov)
    place = torch.stack([x, y], dim=-1).nan_to_num(math.inf).clamp(-2, 2)     # (b, n, 2)
    # unknown depth, and what lies beyond the edge, count as infinitely far: as another surface
    inverse = torch.where(depth_cond > 0, 1 / depth_cond, 0)[:, None]
    found = F.grid_sample(torch.cat([image_cond, inverse], dim=1),
                          place.unflatten(1, depth.shape[1:]), align_corners=False)
    ratio = expected * found[:, -1].flatten(1)                  # 1 where the depths are equal
    same = (depth.flatten(1) > 0) & (expected > 0) & ((ratio - 1).abs() < SAME_SURFACE)
    surface = moved(points / ratio[:, None], torch.linalg.inv(pose))
    improved = torch.where((depth.flatten(1) > 0) & (ratio > 0), -surface[:, 2], 0).clamp(min=0)
    return found[:, :-1], same.view_as(depth), improved.view_as(depth)


def warp(image_cond, depth_cond, pose, fov, depth_target):
    """The conditioning view as the camera at `pose` sees it: colours, and where they are known.

    depth_target (b, h, w): the target's own depth, 0 where it is unknown. Where it is known, pixels
    of surfaces that something hides in the target view are not counted as seen.
    """
    pose, fov = pose.to(depth_cond), fov.to(depth_cond)
    depth = splat(depth_cond, pose, fov)
    # what lands on a pixel lies up to a pixel beside its centre: on slanted surfaces another depth
    for _ in range(IMPROVEMENTS):
        depth = look_back(image_cond, depth_cond, depth, pose, fov)[2]
    colours, seen, _ = look_back(image_cond, depth_cond, depth, pose, fov)
    hidden = (depth_target > 0) & ((depth - depth_target).abs() > SAME_SURFACE * depth_target)
    return colours, seen & ~hidden


# ---- does a view follow its camera?

def other_cameras(pose):
    """{name: pose (b, 4, 4)} of cameras that a view may have followed instead of the right one."""
    half, double = pose.clone(), pose.clone()
    half[:, :3, 3] *= 0.5
    double[:, :3, 3] *= 2
    return {"still": torch.eye(4, dtype=pose.dtype).expand_as(pose),
            "mirrored": torch.linalg.inv(pose), "half as far": half, "twice as far": double}


def agreement(view, warped, seen):
    """PSNR in dB (b,) of a view (b, c, h, w) against the warped conditioning view, where `seen`
    (b, h, w) says that both see the same surface; nan where that is less than LEAST_SEEN."""
    error = ((view - warped).square().mean(1) * seen).sum(dim=(1, 2))
    count = seen.sum(dim=(1, 2))
    # equal images are as near as images of 8 bits can be
    figure = decibels((error / count.clamp(min=1)).clamp(min=ROUNDING))
    return torch.where(count >= LEAST_SEEN * seen[0].numel(), figure, torch.nan)


class Followed:
    """Epipolar consistency of views of a batch: the reprojection PSNR, and what it says of cameras.

    image_cond (b, 3, h, w), depth_cond and depth_target (b, h, w), 0 unknown, in the unit of pose
    (b, 4, 4) = inv(cond_c2w) @ target_c2w; fov (b,) radians.
    """
    def __init__(self, image_cond, depth_cond, depth_target, pose, fov):
        self.right = warp(image_cond, depth_cond, pose, fov, depth_target)
        unknown = torch.zeros_like(depth_cond)
        self.wrong = [warp(image_cond, depth_cond, other, fov, unknown)
                      for other in other_cameras(pose).values()]

    def __call__(self, view):
        """{figure: (b,)}, nan where too little is seen by both views:

        reprojection    PSNR in dB against the conditioning view warped by its depth, where both
                        views see the same surface
        camera_margin   dB by which that is more than with the best of `other_cameras`
        camera_found    1 where it is more, 0 where the view agrees better with a wrong camera
        """
        right = agreement(view, *self.right)
        wrong = torch.stack([agreement(view, *each) for each in self.wrong])
        margin = right - wrong.nan_to_num(-math.inf).amax(0)
        margin = torch.where(margin.isinf(), torch.nan, margin)     # no other camera sees enough
        found = torch.where(margin.isnan(), torch.nan, (margin > 0).to(margin.dtype))
        return {"reprojection": right, "camera_margin": margin, "camera_found": found}


# ---- do pictures agree with cameras whose depth is unknown?

MATCH_SIDE, PATCH, SPACING, DEPTHS = 64, 7, 6, 96   # pixels; pixels; pixels; along a line
TEXTURED = 0.03                                     # least standard deviation of a patch
BEHIND = 1e-9


def conventions(c2w):
    """{name: cameras (n, 4, 4)} that c2w would be if its convention were that one."""
    def turned(c2w, *signs):
        return c2w @ torch.diag(c2w.new_tensor([*signs, 1.0]))

    inverse, opencv = torch.linalg.inv(c2w), (1.0, -1.0, -1.0)
    return {"as they are": c2w, "OpenCV": turned(c2w, *opencv), "world-to-camera": inverse,
            "world-to-camera, OpenCV": turned(inverse, *opencv),
            "mirrored": turned(c2w, -1.0, 1.0, 1.0), "upside down": turned(c2w, 1.0, -1.0, 1.0)}


def match(image_cond, image, pose, fov, depth_cond):
    """How well patches of a view are found in another where the cameras say: the mean of their
    normalized correlation, 0..1; nan where a view has no texture.

    image_cond, image (3, s, s); pose (4, 4) = inv(cond_c2w) @ c2w; fov radians. A patch is looked
    for at the depth of its middle in depth_cond (s, s), or along its epipolar line if depth_cond is
    0 everywhere: at all inverse depths from 0 to that of the cameras' distance.
    """
    s, reach = MATCH_SIDE, PATCH // 2
    depth = F.interpolate(depth_cond[None, None].float(), (s, s), mode="nearest")[0, 0]
    grey_cond, grey = (F.interpolate(x.mean(0)[None, None].float(), (s, s), mode="area")
                       for x in (image_cond, image))
    patches = F.unfold(grey_cond, PATCH)[0].T                               # (n, p), p = PATCH^2
    middle = depth[reach:s - reach, reach:s - reach].flatten()
    grid = torch.zeros(s - 2 * reach, s - 2 * reach, dtype=torch.bool)
    grid[reach::SPACING, reach::SPACING] = True
    asked = (middle > 0 if depth.any() else grid.flatten()) & (patches.std(1) > TEXTURED)
    if not asked.any():
        return math.nan
    fov = torch.tensor([fov])
    points = points_of(torch.ones(1, s, s), fov)
    rays = F.unfold(points.view(1, 3, s, s), PATCH)[0].unflatten(0, (3, -1)).mT[:, asked]
    if depth.any():
        inverse = 1 / middle[asked][None]                                   # (1, n)
    else:
        inverse = torch.linspace(0, 1, DEPTHS)[:, None] / pose[:3, 3].norm()
    there = torch.linalg.inv(pose.float())
    # in homogeneous coordinates, so that an infinite depth is no exception: (depths, 3, n * p)
    points = (torch.einsum("ij,jnp->inp", there[:3, :3], rays)[None]
              + there[:3, 3, None, None] * inverse[:, None, :, None]).flatten(2)
    x, y, front = project(points, fov)
    place = torch.stack([x, y], dim=-1).nan_to_num(math.inf).clamp(-2, 2)   # (depths, n * p, 2)
    shape = len(place), *patches[asked].shape
    inside = ((front > BEHIND) & (place.abs() < 1).all(-1)).view(shape).all(-1)     # (depths, n)
    found = F.grid_sample(grey, place.flatten(0, 1)[None, None], align_corners=False).view(shape)
    a, b = (values - values.mean(-1, keepdim=True) for values in (patches[asked], found))
    same = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-6)
    return torch.where(inside, same, 0).amax(0).clamp(min=0).mean().item()
