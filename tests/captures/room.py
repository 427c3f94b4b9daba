"""A room whose picture and depth are known at every camera, for any lens: the truth of tests.

A box seen from inside, its walls coloured by a smooth function of the place, with fine value noise
where structure from motion is to find its way. Depth is along the viewing axis; c2w is OpenGL.
"""

import math

import numpy as np

LOW, HIGH = np.array([-2.0, -3.0, -1.0]), np.array([2.0, 3.0, 2.0])
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def smooth(p):
    """Colours (..., 3) in [0, 1] of places (..., 3)."""
    x, y, z = np.moveaxis(p, -1, 0)
    waves = [np.sin(2 * x + 0.6 * y) + np.sin(4 * z + x), np.sin(1.5 * y - z) + np.sin(3.5 * x),
             np.sin(2.5 * z + 0.8 * x) + np.sin(3 * y + 2)]
    return 0.5 + 0.22 * np.stack(waves, axis=-1)


def noise(p, size):
    """Values (...) in [0, 1], interpolated between random ones on a grid of cells of that size."""
    cell = np.floor(p / size).astype(np.int64)
    share = p / size - cell
    total = 0.0
    for corner in np.ndindex(2, 2, 2):
        a, b, c = np.moveaxis(cell + corner, -1, 0)
        mixed = (a * 73856093 ^ b * 19349663 ^ c * 83492791) & 0xFFFFFFFF
        value = ((mixed * 2654435761 >> 7) & 0xFFFF) / 0xFFFF
        total = total + value * np.where(corner, share, 1 - share).prod(-1)
    return total


def rough(p):
    """Colours (..., 3) with detail of several sizes."""
    grain = sum(weight * noise(p, size) for size, weight in ((0.5, 0.3), (0.15, 0.4), (0.05, 0.3)))
    return 0.3 * smooth(p) + 0.7 * grain[..., None]


def look(eye, at):
    """OpenGL camera-to-world (4, 4) of a camera that looks at a place, z up."""
    back = (np.array(eye, float) - at) / np.linalg.norm(np.array(eye, float) - at)
    right = np.cross([0, 0, 1.0], back) / np.linalg.norm(np.cross([0, 0, 1.0], back))
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(back, right), back, eye], axis=1)
    return c2w


def cameras(n):
    """n of them along a walk, all looking to the far wall."""
    return [look((-0.9 + 1.8 * i / (n - 1), -2.0 + 0.1 * i, 0.3 + 0.25 * math.sin(i)),
                 (0.3 * math.cos(i), 2.5, 0.2)) for i in range(n)]


def seen(c2w, slopes, colour=smooth):
    """(colours (n, 3) in [0, 1], depths (n,)) that rays of slopes (n, 2) right and down meet."""
    rays = np.concatenate([slopes, np.ones((len(slopes), 1))], axis=1) * (1, -1, -1)
    rays = rays @ c2w[:3, :3].T
    with np.errstate(divide="ignore"):
        depth = np.where(rays > 0, (HIGH - c2w[:3, 3]) / rays, (LOW - c2w[:3, 3]) / rays).min(1)
    return colour(c2w[:3, 3] + rays * depth[:, None]), depth


def photo(c2w, lens, width, height, colour=smooth, over=3):
    """The uint8 picture (h, w, 3) that a views.colmap.Lens of that size takes."""
    x, y = np.meshgrid((np.arange(width * over) + 0.5) / (width * over),
                       (np.arange(height * over) + 0.5) / (height * over))
    slopes = lens.slopes(np.stack([x, y], axis=-1).reshape(-1, 2))
    colours, _ = seen(c2w, slopes, colour)
    mean = colours.reshape(height, over, width, over, 3).mean((1, 3))
    return (mean * 255).round().astype(np.uint8)


def opencv(c2w):
    """World-to-camera (4, 4), x right, y down, z forward."""
    return np.linalg.inv(c2w @ FLIP)


def points(count=1500):
    """Places (n, 3) on the walls."""
    rng = np.random.default_rng(0)
    found = rng.uniform(LOW, HIGH, (count, 3))
    axis, side = rng.integers(0, 3, count), rng.integers(0, 2, count)
    found[np.arange(count), axis] = np.where(side, HIGH[axis], LOW[axis])
    return found


def quaternion(turn):
    """(w, x, y, z) of a rotation matrix whose w is not 0."""
    w = math.sqrt(1 + np.trace(turn)) / 2
    return [w, *((turn[[2, 0, 1], [1, 2, 0]] - turn[[1, 2, 0], [2, 0, 1]]) / (4 * w))]


def write_colmap(folder, c2w, names, lens):
    """COLMAP's text model of the room: cameras, poses and what of the points each photo shows."""
    folder.mkdir(parents=True)
    world = points()
    (folder / "cameras.txt").write_text(
        f"# cameras\n1 {lens.model} {lens.width} {lens.height} {' '.join(map(str, lens.params))}\n")
    lines = []
    for i, (pose, name) in enumerate(zip(c2w, names)):
        w2c = opencv(pose)
        local = world @ w2c[:3, :3].T + w2c[:3, 3]
        place = lens.places(local[:, :2] / local[:, 2:])
        inside = (local[:, 2] > 0.1) & (abs(local[:, :2] / local[:, 2:]) < 2).all(1)
        inside &= (place > 0).all(1) & (place < 1).all(1)
        pixel = place * (lens.width, lens.height)
        lines.append(" ".join(map(str, [i + 1, *quaternion(w2c[:3, :3]), *w2c[:3, 3], 1, name])))
        lines.append(" ".join(f"{pixel[k][0]} {pixel[k][1]} {k + 1}" for k in np.flatnonzero(inside)))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    (folder / "points3D.txt").write_text("".join(
        f"{k + 1} {x} {y} {z} 1 2 3 0.5\n" for k, (x, y, z) in enumerate(world)))
