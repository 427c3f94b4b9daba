"""Synthetic scenes: what stands where, of which colours, and the path of the camera.

A scene is a room, or a ground under a sky, with spheres, boxes and upright cylinders, and a camera
path through it; it is a function of (seed, number) alone. World z is up, cameras are OpenGL
camera-to-world. synth.py renders it. Letters: `n` solids, `m` paths, `p` places on a path, `k`
numbers of a material.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from camera import look_at
from views import paths

KINDS = ("arc", "walk", "fly")      # camera paths: even numbers are arcs, odd ones walk or fly
BOX, CYLINDER, SPHERE = range(3)    # shapes, the dearest to trace first
UNITS = (-1, 1)                     # powers of ten between which a scene's unit of length lies
FOV_DEG = (40, 75)
CLUSTER = 2.2           # the solids stand within this distance of the middle, in inner units
HORIZON = 40.0          # half side of the ground under a sky; the sky hangs where it ends
HAZE = 10.0             # distance over which that ground fades into the horizon
CLEARANCE = 0.4         # least distance from a camera to any solid, wall, ceiling or ground
LARGEST = 0.5           # share of the view's half side for the radius of a solid ahead, at first
RELAX = 1.02            # growth of that share with every path that is tried
PATHS_AT_ONCE = 16
PLACES = np.linspace(0, 1, 25)      # where on a path its clearance is looked at

# A material's numbers: centre, turn and 1 / half extents of its coordinates, shape, own light,
# fade, the texture's (see `texture`), second colour. Its faces are -x +x -y +y -z +z.
MATERIAL = ("cx cy cz cos sin ix iy iz shape emits fade kr warp sharp bias p1 p2 p3 "
            "k1x k1y k1z k2x k2y k2z k3x k3y k3z b0 b1 b2").split()
WAVES = [name for name in MATERIAL if name[0] == "k" and name != "kr"]
FACES = 6
GOLDEN = 0.381966       # of a turn: hues that many steps apart stay apart


@dataclass(frozen=True)
class Scene:
    """One scene, in its inner unit of length; `unit` stretches its cameras and depths alone."""
    number: int
    kind: str                   # arc | walk | fly
    fov: float                  # radians, of every view
    unit: float                 # lengths outside are lengths inside times this
    sky: bool                   # a ground under a sky, rather than a room
    room: np.ndarray            # (3,) half width, half depth, height
    shape: np.ndarray           # (n,) SPHERE, BOX or CYLINDER
    center: np.ndarray          # (n, 3)
    half: np.ndarray            # (n, 3) half extents: (r, r, r), (x, y, z), (r, r, z)
    yaw: np.ndarray             # (n,) radians about z
    material: np.ndarray        # (2 + n, k) rows: walls or sky, ground, solids
    colors: np.ndarray          # (2 + n, 6, 3) of the faces, in [0, 1]
    haze: np.ndarray            # (3,) colour of the horizon
    light: np.ndarray           # (3,) unit vector towards the sun
    path: np.ndarray            # (5, 3) start, end, gaze at start, gaze at end, sway


# ---- making a scene

def scene(seed, number):
    """The Scene that belongs to (seed, number), two integers of 0 or more."""
    rng = np.random.default_rng([seed, number])
    kind = "arc" if number % 2 == 0 else KINDS[rng.integers(1, 3)]
    fov = math.radians(rng.uniform(*FOV_DEG))
    unit = 10 ** rng.uniform(*UNITS)
    sky = bool(rng.random() < (0.5 if kind == "arc" else 0.3))
    # far enough that the solids fill the view
    distance = float(np.clip(rng.uniform(1.3, 1.8) / math.tan(fov / 2), 2.7, 4.6))
    walls = distance + CLEARANCE + rng.uniform(0.3, 1.6, 2)
    room = np.array([HORIZON, HORIZON, HORIZON] if sky else [*walls, rng.uniform(2.6, 3.8)])
    shape, center, half, yaw = solids(rng, room)
    path = free_path(rng, kind, fov, distance, room, center, half)
    material, colors, haze = materials(rng, sky, room, shape, center, half, yaw)
    azimuth, height = rng.uniform(0, 2 * math.pi), rng.uniform(1.4, 2.4)
    light = np.array([math.cos(azimuth), math.sin(azimuth), height]) / math.hypot(1, height)
    return Scene(number, kind, fov, unit, sky, room, shape, center, half, yaw, material, colors,
                 haze, light, path)


def solids(rng, room):
    """Shapes, centres, half extents, yaws of 4 to 9 solids apart; some stand on others."""
    count = rng.integers(4, 10)
    shape, center, half = [], [], []
    while len(shape) < count:
        kind = int(rng.integers(0, 3))
        wide, deep, tall = rng.uniform([0.22, 0.22, 0.2], [0.55, 0.55, 0.7])
        size = np.array({SPHERE: (wide, wide, wide), BOX: (wide, deep, tall),
                         CYLINDER: (wide, wide, tall)}[kind])
        angle, away = rng.uniform(0, 2 * math.pi), CLUSTER * math.sqrt(rng.random())
        place = np.array([away * math.cos(angle), away * math.sin(angle), size[2]])
        tables = [i for i in range(len(shape)) if shape[i] != SPHERE and center[i][2] == half[i][2]]
        how = rng.random()
        if tables and how < 0.35:       # on top of a box or cylinder that stands on the ground
            below = tables[rng.integers(len(tables))]
            size = size * min(1, 0.9 * half[below][:2].min() / size[:2].max())
            place = center[below] + [0, 0, half[below][2] + size[2]]
        elif how > 0.85:                # in the air
            place[2] += rng.uniform(0.2, 1.0)
        if place[2] + size[2] > room[2] - CLEARANCE:
            continue
        if all(apart(place, size, c, h) for c, h in zip(center, half)):
            shape, center, half = [*shape, kind], [*center, place], [*half, size]
    yaw = rng.uniform(0, 2 * math.pi, count)
    return np.array(shape), np.array(center), np.array(half), yaw


def apart(center_a, half_a, center_b, half_b):
    """Whether two solids keep apart, at any yaw: beside each other, or one above the other."""
    x, y, z = center_a - center_b
    reach = math.hypot(half_a[0], half_a[1]) + math.hypot(half_b[0], half_b[1])
    rounding = 1e-9     # a solid on top of another touches it
    return math.hypot(x, y) > reach or abs(z) >= half_a[2] + half_b[2] - rounding


def candidate_paths(rng, kind, distance, room):
    """Paths (m, 5, 3) of a kind, at about that distance from the middle, wherever they may lead."""
    m = PATHS_AT_ONCE
    angle, turn = rng.uniform(0, 2 * math.pi, m), rng.choice([-1.0, 1.0], m)
    height = rng.uniform(0.9, min(2.5, room[2] - CLEARANCE), (m, 2))
    gaze = rng.uniform(-0.35, 0.35, (m, 2, 3)) + [0, 0, 0.6]
    draw = rng.random((m, 3))
    ends = np.zeros((m, 2, 3))
    ends[:, :, 2] = height
    if kind == "arc":           # ends are (radius, angle, height)
        gaze[:, 1] = gaze[:, 0]
        ends[:, 0, :2] = np.stack([np.full(m, distance), angle], axis=1)
        ends[:, 1, 0] = distance * (0.85 + 0.25 * draw[:, 0])
        ends[:, 1, 1] = angle + turn * np.radians(60 + 45 * draw[:, 1])
    else:
        outward = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        aside = np.stack([-np.sin(angle), np.cos(angle)], axis=1) * turn[:, None]
        if kind == "walk":      # past the solids, the gaze following a little
            near = distance * (0.8 + 0.2 * draw[:, :2])
            step = (0.7 + 0.8 * draw[:, 2:]) * aside
            steps = np.stack([-step, step], axis=1)
            gaze[:, :, :2] += 0.4 * steps
        else:                   # towards the solids
            near = distance * ([0.95, 0.5] + 0.15 * draw[:, :2])
            steps = (1.2 * rng.random((m, 2, 1)) - 0.6) * aside[:, None]
        ends[:, :, :2] = near[:, :, None] * outward[:, None] + steps
    return np.concatenate([ends, gaze, rng.uniform(-0.12, 0.12, (m, 1, 3))], axis=1)


def free_path(rng, kind, fov, distance, room, center, half):
    """A path (5, 3) that runs clear of everything, and past which no solid fills the view."""
    around = np.hypot(half[:, 0], half[:, 1])
    for tried in itertools.count(step=PATHS_AT_ONCE):
        paths = candidate_paths(rng, kind, distance, room)
        eye, gaze = along(paths, kind, PLACES)                      # (m, p, 3)
        off = center - eye[:, :, None]                              # (m, p, n, 3)
        gap = np.maximum(np.hypot(off[..., 0], off[..., 1]) - around, abs(off[..., 2]) - half[:, 2])
        walls = np.concatenate([room - abs(eye), eye[..., 2:]], axis=2)
        clear = np.minimum(gap.min(axis=(1, 2)), walls.min(axis=(1, 2))) > CLEARANCE
        ahead = np.einsum("mpnx,mpx->mpn", off, gaze - eye) > 0
        radius = np.linalg.norm(half, axis=1) / np.linalg.norm(off, axis=3) / math.tan(fov / 2)
        share = (radius * ahead).max(axis=(1, 2))
        good = clear & (share < LARGEST * RELAX ** (tried + np.arange(len(paths))))
        if good.any():
            return paths[good.argmax()]


def along(path, kind, places):
    """Positions and gaze points (..., p, 3) at the places (p,) in [0, 1] of paths (..., 5, 3)."""
    start, end, gaze_start, gaze_end, sway = np.moveaxis(path[..., None, :], -3, 0)
    places = places[:, None]
    eye = start + places * (end - start)
    if kind == "arc":
        radius, angle, height = np.moveaxis(eye, -1, 0)
        eye = np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=-1)
    gaze = gaze_start + places * (gaze_end - gaze_start)
    return eye + sway * np.sin(2 * math.pi * places), gaze


def cameras(scene, views, motion=1.0, turns=None):
    """OpenGL camera-to-world matrices (views, 4, 4) float64, evenly along the middle of a scene's
    path; `motion` is the share of it, in (0, 1].

    turns: angles (views, 2) in radians by which the cameras then look further to the left, and up.
    """
    places = 0.5 + motion * np.linspace(-0.5, 0.5, views)
    c2w = look_at(*map(torch.from_numpy, along(scene.path, scene.kind, places)))
    c2w[:, :3, 3] *= scene.unit
    if turns is not None:
        left, up = torch.as_tensor(turns, dtype=torch.float64).T
        c2w[:, :3, :3] = paths.rotation("z", left) @ c2w[:, :3, :3] @ paths.rotation("x", up)
    return c2w


# ---- materials

def hsv(hue, saturation, value):
    """RGB in [0, 1], (..., 3), of a hue in turns, a saturation and a value (...)."""
    hue, saturation, value = [np.asarray(x, float)[..., None] for x in (hue, saturation, value)]
    sector = (hue * 6 + [5, 3, 1]) % 6
    return value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))


def pattern(rng, flat):
    """The numbers of a random texture over [-1, 1]^3, or over x and y alone (`flat`): a dict.

    Counts of half waves are half-integers: their crests, not their zeros, lie on a box's faces.
    """
    waves = np.zeros((3, 3))
    phase = np.full(3, math.pi / 2)         # an unused wave is a constant 1
    numbers = dict(kr=0.0, warp=0.0, sharp=rng.uniform(4, 9), bias=0.0)
    axes = np.array([1, 1, 0 if flat else 1])
    rates = math.pi * (rng.integers(1, 3, 3) + 0.5)
    style = ("plain", "checks", "stripes", "rings", "blobs", "dots")[rng.integers(6)]
    if style == "plain":
        numbers["bias"] = 2.0               # never reached: the first colour alone
    elif style in ("checks", "dots"):
        waves = np.diag(rates * axes)
        phase = phase * (1 - axes)
        numbers["bias"] = 0.0 if style == "checks" else 0.3
    elif style == "stripes":
        direction = rng.normal(size=3) * axes
        waves[0] = (rates[0] + 2) * direction / np.linalg.norm(direction)
        phase[0] = rng.uniform(0, 2 * math.pi)
    elif style == "rings":
        numbers["kr"] = rates[0] + 2
        waves[0, 2] = rates[1] * axes[2]
    else:
        waves = rng.normal(size=(3, 3)) * axes * 2
        phase = rng.uniform(0, 2 * math.pi, 3)
        numbers.update(warp=1.2, sharp=rng.uniform(2, 5))
    return numbers | dict(zip(("p1", "p2", "p3"), phase)) | dict(zip(WAVES, waves.ravel()))


def backdrop(rng, sky, room):
    """Walls or sky, and ground: materials, faces (2, 6, 3), second colours (2, 3), haze (3,)."""
    haze = hsv(rng.uniform(0.5, 0.65), rng.uniform(0.05, 0.25), rng.uniform(0.85, 1.0))
    middle = dict(cx=0, cy=0, cos=1, sin=0, emits=0, fade=0)
    if sky:                     # its sides differ a little, so that it tells where one looks
        walls = middle | dict(cz=0, ix=1 / HORIZON, iy=1 / HORIZON, iz=2 / HORIZON, shape=SPHERE)
        walls |= pattern(rng, False) | dict(warp=1.5, sharp=0.8, bias=0.5, emits=1)     # clouds
        zenith = hsv(rng.uniform(0.55, 0.64), rng.uniform(0.45, 0.75), rng.uniform(0.65, 0.95))
        faces = np.tile(zenith, (FACES, 1))
        faces[:4] = haze + rng.normal(size=(4, 1)) * 0.07 + rng.normal(size=(4, 3)) * 0.03
        second = np.ones(3)
    else:                       # every wall has its own hue and brightness
        walls = middle | dict(cz=room[2] / 2, ix=1 / room[0], iy=1 / room[1], iz=2 / room[2])
        walls |= pattern(rng, False) | dict(shape=BOX)
        faces = hsv(rng.random(6), rng.uniform(0.1, 0.5, 6), rng.uniform(0.6, 0.95, 6))
        second = faces.mean(0) * rng.uniform(0.55, 1.3)
    # the ground is the top of a box as deep as it is wide; its texture is in inner units
    ground = middle | dict(cz=-HORIZON, ix=1, iy=1, iz=1, shape=BOX) | pattern(rng, True)
    ground["fade"] = HAZE**-2 if sky else 0
    soil = hsv(rng.random(), rng.uniform(0.1, 0.55), rng.uniform(0.45, 0.85))
    faces = np.stack([faces, np.tile(soil, (FACES, 1))])
    seconds = np.stack([second, soil * rng.uniform(0.45, 0.75)])
    return [walls, ground], faces.clip(0, 1), seconds.clip(0, 1), haze


def materials(rng, sky, room, shape, center, half, yaw):
    """The materials (2 + n, k), face colours (2 + n, 6, 3) and haze (3,) of a scene."""
    rows, faces, seconds, haze = backdrop(rng, sky, room)
    n = len(shape)
    hue = (rng.random() + np.arange(n) * GOLDEN + rng.normal(size=n) * 0.03)[:, None]
    spread = np.where(rng.random((n, 1)) < 0.35, 0.25, 0.05)        # of the hues of one solid
    hues = (hue + rng.normal(size=(n, FACES)) * spread) % 1
    own = hsv(hues, rng.uniform(0.45, 0.95, hues.shape), rng.uniform(0.55, 1, hues.shape))
    other = (hue[:, 0] + rng.uniform(0.3, 0.7, n)) % 1
    contrast = hsv(other, rng.uniform(0, 0.8, n), rng.choice([0.2, 0.95], n))
    for i in range(n):
        place = dict(zip(("cx", "cy", "cz", "ix", "iy", "iz"), [*center[i], *(1 / half[i])]))
        turn = dict(cos=math.cos(yaw[i]), sin=math.sin(yaw[i]), shape=shape[i], emits=0, fade=0)
        rows.append(place | turn | pattern(rng, False))
    seconds = np.concatenate([seconds, contrast])
    material = [[*map(row.get, MATERIAL[:-3]), *second] for row, second in zip(rows, seconds)]
    return np.array(material), np.concatenate([faces, own]), haze
