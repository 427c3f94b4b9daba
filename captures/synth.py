"""Synthetic scenes with exact cameras and depth: textured solids, ray-cast in torch.

A scene is a room, or a ground under a sky, with spheres, boxes and upright cylinders, and a camera
path through it; it is a function of (seed, number) alone. World z is up, cameras are OpenGL
camera-to-world. Letters: `s` scenes, `v` views a scene, `r` rays a view, `n` solids, `m` paths,
`p` places on a path, `k` numbers of a material. Points and directions of rays are kept as three
tensors (x, y, z), so that every step is one flat pass.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

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
SUBSAMPLES = 2          # colour samples along each side of a pixel
SHADOW_DENSITY = 6.0    # shadows darken with the thickness of what casts them: soft edges
SKY_LIGHT = (0.47, 0.13)            # ambient light of a level face, and what facing up adds
SUN_LIGHT = 0.75
SUN_COLOR, SKY_COLOR = (1.05, 1.0, 0.9), (0.95, 1.0, 1.08)
DARKEST_CORNER = 0.15   # of the ambient light, however much stands around
SECOND_COLOR = 0.85     # how far a texture goes to its second colour
TINY = 1e-30
NEVER = -1000.0         # height of what fills the empty slots of a batch
RAYS_AT_ONCE = {"cpu": 2**16, "cuda": 2**22}    # fit the caches; outlast a kernel's launch

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


# ---------------------------------------------------------------------------- making a scene

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
    eye, gaze = along(scene.path, scene.kind, 0.5 + motion * np.linspace(-0.5, 0.5, views))
    back = eye - gaze
    back /= np.linalg.norm(back, axis=1, keepdims=True)
    right = np.cross([0, 0, 1], back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    c2w = np.zeros((views, 4, 4))
    c2w[:, :3] = np.stack([right, np.cross(back, right), back, eye * scene.unit], axis=2)
    c2w[:, 3, 3] = 1
    c2w = torch.from_numpy(c2w)
    if turns is not None:
        left, up = torch.as_tensor(turns, dtype=torch.float64).T
        c2w[:, :3, :3] = paths.rotation("z", left) @ c2w[:, :3, :3] @ paths.rotation("x", up)
    return c2w


# -------------------------------------------------------------------------------- materials

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


# -------------------------------------------------------------------------------- rendering

class World:
    """Scenes packed for tracing: solids in padded slots by shape; numbers are (s, 1, 1) tensors."""

    def __init__(self, scenes, device):
        counts = [max(int((each.shape == shape).sum()) for each in scenes) for shape in range(3)]
        first = 2 + np.concatenate([[0], np.cumsum(counts)])
        self.rows = int(first[-1])
        slots = np.zeros((self.rows, 8, len(scenes)))               # center, half, cos, sin
        slots[:, 2], slots[:, 6] = NEVER, 1         # an empty slot: a point far below the ground
        material = np.zeros((len(MATERIAL), len(scenes), self.rows))
        colors = np.zeros((3, len(scenes), self.rows, FACES))
        for i, each in enumerate(scenes):
            order = np.arange(2 + len(each.shape))
            for shape in range(3):
                mine = 2 + np.flatnonzero(each.shape == shape)
                order[mine] = first[shape] + np.arange(len(mine))
            turn = np.stack([np.cos(each.yaw), np.sin(each.yaw)], axis=1)
            slots[order[2:], :, i] = np.concatenate([each.center, each.half, turn], axis=1)
            material[:, i, order] = each.material.T
            colors[:, i, order] = each.colors.transpose(2, 0, 1)

        def tensors(array):
            return torch.from_numpy(array).to(device, torch.float32).unbind()

        self.solids = []                # (shape, row, center, half, cos, sin)
        numbers = torch.from_numpy(slots).to(device, torch.float32)[..., None, None]
        for shape in range(3):
            for row in range(first[shape], first[shape + 1]):
                x, y, z, a, b, c, cos, sin = numbers[row].unbind()
                self.solids.append((shape, row, (x, y, z), (a, b, c), cos, sin))
        self.material = dict(zip(MATERIAL, tensors(material.reshape(len(MATERIAL), -1))))
        self.colors = tensors(colors.reshape(3, -1))
        common = np.array([[*each.room, each.sky, *each.light, *each.haze] for each in scenes]).T
        common = tensors(common[:, :, None, None])
        self.room, self.sky = common[:3], common[3] > 0
        self.light, self.haze = common[4:7], common[7:]
        base = torch.arange(len(scenes), device=device, dtype=torch.int32) * self.rows
        self.base = base[:, None, None]


def dot(a, b):
    """Sum over x, y, z."""
    return torch.addcmul(torch.addcmul(a[0] * b[0], a[1], b[1]), a[2], b[2])


def inverses(d):
    """What every solid needs of the directions: 1 / |d|^2, 1 / |d_xy|^2, 1 / d_z."""
    return 1 / dot(d, d), 1 / (d[0] * d[0] + d[1] * d[1]), 1 / d[2]


def square_root(x):
    """The root of x, far below 0 where x < 0; several times faster than torch.sqrt on some CPUs."""
    # not 0: of a solid that a ray misses abeam, 0 +- 0 would be a hit in the lens, a hole in depth
    return x * x.clamp(min=TINY).rsqrt_()


def interval(solid, o, d, inv):
    """Where the rays o + t d are inside a solid: (near, far), near >= far where they miss it."""
    shape, _, center, half, cos, sin = solid
    x, y, z = center[0] - o[0], center[1] - o[1], center[2] - o[2]
    if shape == SPHERE:
        b = dot((x, y, z), d) * inv[0]
        root = square_root(b * b - (dot((x, y, z), (x, y, z)) - half[0] ** 2) * inv[0])
        return b - root, b + root
    if shape == CYLINDER:
        b = torch.addcmul(x * d[0], y, d[1]) * inv[1]
        root = square_root(b * b - (torch.addcmul(x * x, y, y) - half[0] ** 2) * inv[1])
        near, far = b - root, b + root
        slabs = [(inv[2], z, half[2])]
    else:
        slope_x = 1 / torch.addcmul(cos * d[0], sin, d[1])
        slope_y = 1 / torch.addcmul(cos * d[1], sin, d[0], value=-1)
        near, far = slab(slope_x, torch.addcmul(cos * x, sin, y), half[0])
        slabs = [(slope_y, torch.addcmul(cos * y, sin, x, value=-1), half[1]),
                 (inv[2], z, half[2])]
    for each in slabs:
        enter, leave = slab(*each)
        near, far = torch.maximum(near, enter), torch.minimum(far, leave)
    return near, far


def slab(slope, middle, reach):
    """Where a ray is within `reach` of a plane `middle` ahead, nearing it by 1 / `slope` a step."""
    mid, width = slope * middle, slope.abs() * reach
    return mid - width, mid + width


def trace(world, o, d):
    """The first thing each ray meets: (t, row), t in lengths of `d`, row of the material table."""
    inv = inverses(d)
    tx, ty = [(torch.copysign(world.room[i], d[i]) - o[i]) / d[i] for i in (0, 1)]
    # a level ray meets the ceiling, or the sky, at infinity
    tz = (torch.where(d[2] < 0, 0, world.room[2]) - o[2]) * inv[2]
    walls = torch.minimum(tx, ty)
    row = ((tz < walls) & (d[2] < 0)).to(torch.int32)
    # nearness is 1 / t: the largest wins, and what lies behind the camera is negative
    nearness = 1 / torch.minimum(walls, tz)
    for solid in world.solids:
        near, far = interval(solid, o, d, inv)
        hit = near < far
        near.reciprocal_()
        hit &= near > nearness
        nearness = torch.where(hit, near, nearness)
        row.masked_fill_(hit, solid[1])
    return nearness.reciprocal_(), row


def texture(m, e):
    """How much of the second colour shows at `e`, in [0, 1]: three sines, each bending the next.

    Their product, sharpened, is checks, dots, stripes, rings or blobs, as the material has it.
    """
    u, bend = 1, 0
    for i in (3, 2, 1):
        phase = dot((m(f"k{i}x"), m(f"k{i}y"), m(f"k{i}z")), e) + m(f"p{i}")
        if i == 1:
            phase = phase + m("kr") * (e[0] * e[0] + e[1] * e[1]).sqrt()
        wave = torch.sin(phase + bend)
        u, bend = wave * u, m("warp") * wave
    return (m("sharp") * (u - m("bias"))).clamp_(-1, 1).mul_(0.5).add_(0.5)


def normals(m, e, inward):
    """Unit normals, in a solid's own axes, at its surface coordinates `e`, each in [-1, 1]."""
    shape = m("shape")
    ball, box = shape == SPHERE, shape == BOX
    ax, ay, az = e[0].abs(), e[1].abs(), e[2].abs()
    around = torch.where(box, torch.maximum(ax, ay), (e[0] * e[0] + e[1] * e[1]).sqrt())
    cap = (az > around) & ~ball
    side = ~cap
    nx = torch.where(box, torch.sign(e[0]) * (ax >= ay), e[0]) * side
    ny = torch.where(box, torch.sign(e[1]) * (ay > ax), e[1]) * side
    nz = torch.where(cap, torch.sign(e[2]), e[2] * ball)
    scale = torch.rsqrt(dot((nx, ny, nz), (nx, ny, nz))) * (1 - 2 * inward)
    return nx * scale, ny * scale, nz * scale


def shade(world, o, d, t, row):
    """The colours, 3 tensors in [0, 1], of what the rays meet: its texture in the light there."""
    index = (row + world.base).flatten()

    def m(name):
        return world.material[name].index_select(0, index).view(row.shape)

    p = [torch.addcmul(o[i], d[i], t) for i in range(3)]
    x, y, z = p[0] - m("cx"), p[1] - m("cy"), p[2] - m("cz")
    cos, sin = m("cos"), m("sin")
    e = ((cos * x + sin * y) * m("ix"), (cos * y - sin * x) * m("iy"), z * m("iz"))
    n = normals(m, e, (row == 0) & ~world.sky)
    colors = [torch.zeros_like(t) for _ in range(3)]
    for axis in range(3):       # the face it looks to; on round solids a mixture
        face = index * FACES + (2 * axis + (n[axis] > 0).flatten())
        weight = n[axis] * n[axis]
        for c in range(3):
            colors[c].addcmul_(weight, world.colors[c].index_select(0, face).view(row.shape))

    n = (cos * n[0] - sin * n[1], sin * n[0] + cos * n[1], n[2])
    sun, ambient = lights(world, p, n)
    emits, mix = m("emits"), texture(m, e).mul_(SECOND_COLOR)
    sun, ambient = sun * (1 - emits), ambient * (1 - emits)
    fade = torch.exp(-m("fade") * (p[0] * p[0] + p[1] * p[1]))
    for c in range(3):
        light = emits + sun * SUN_COLOR[c] + ambient * SKY_COLOR[c]
        lit = torch.lerp(colors[c], m(f"b{c}"), mix) * light
        colors[c] = torch.lerp(world.haze[c].expand_as(lit), lit, fade)
    return colors


def lights(world, p, n):
    """Light of the sun, behind soft shadows, and of the sky, less what hides it, at points `p`."""
    through, ambient = torch.zeros_like(p[0]), torch.ones_like(p[0])
    inv = inverses(world.light)
    for solid in world.solids:
        near, far = interval(solid, p, world.light, inv)
        through += far.sub_(near.clamp_(min=0)).clamp_(min=0)
        # as much of the sky as a ball of that size hides
        to = [solid[2][i] - p[i] for i in range(3)]
        size = (solid[3][0] + solid[3][1] + solid[3][2]) / 3
        closeness = dot(to, to).rsqrt_()
        facing = dot(to, n).clamp_(min=0).mul_(closeness)
        ambient.addcmul_(facing, closeness.square_().mul_(size * size), value=-1)
    sun = dot(n, world.light).clamp_(min=0).mul_(through.mul_(-SHADOW_DENSITY).exp_())
    ambient = ambient.clamp_(min=DARKEST_CORNER).mul_(SKY_LIGHT[0] + SKY_LIGHT[1] * n[2])
    return sun.mul_(SUN_LIGHT), ambient


def rays(c2w, fov, size, places):
    """Rays through every pixel at each of its `places` (x, y) in [0, 1], one place after the other.

    Origins (s, v, 1) and directions (s, v, r), r = places * size * size. Directions have length 1
    along the viewing axis, so that a ray's t is its z-depth. c2w (s, v, 4, 4), fov (s,).
    """
    slope = 2 * torch.tan(fov / 2)[:, None, None] / size
    pixels = torch.arange(size, device=c2w.device, dtype=c2w.dtype) - size / 2
    columns, lines = [torch.stack([pixels + place[i] for place in places]) for i in range(2)]
    right = columns[:, None, :].expand(-1, size, -1).reshape(-1) * slope        # (s, 1, r)
    down = lines[:, :, None].expand(-1, -1, size).reshape(-1) * slope
    o = [c2w[:, :, i, 3, None] for i in range(3)]
    turn = c2w[:, :, :3, :3, None]
    d = [turn[:, :, i, 0] * right - turn[:, :, i, 1] * down - turn[:, :, i, 2] for i in range(3)]
    return o, d


def render(scenes, c2w, fov, size):
    """Images (s, v, 3, size, size) in [-1, 1] and z-depths (s, v, size, size), float32.

    scenes: a list of s Scenes, c2w (s, v, 4, 4) float64 in their units, fov (s,) radians; or one
    Scene, (v, 4, 4) and a float. Works on the device of `c2w`. Depth is the distance along the
    viewing axis at the pixel's centre (x + 0.5, y + 0.5), in the scene's unit, known all over: the
    sky is a far wall.
    """
    if isinstance(scenes, Scene):
        image, depth = render([scenes], c2w[None], torch.tensor([fov]), size)
        return image[0], depth[0]
    device = c2w.device
    s, v = c2w.shape[:2]
    fov = fov.to(device, torch.float32)
    unit = torch.tensor([each.unit for each in scenes], dtype=torch.float64, device=device)[:, None]
    inner = torch.cat([c2w[..., :3], c2w[..., 3:] / unit[..., None, None]], dim=-1).float()
    views_at_once = max(1, RAYS_AT_ONCE[device.type] // (size * SUBSAMPLES) ** 2)
    scene_step, view_step = max(1, views_at_once // v), min(v, views_at_once)
    images = torch.empty(s, v, 3, size, size, device=device)
    depths = torch.empty(s, v, size, size, device=device)
    # scenes of like solids together: fewer empty slots
    order = sorted(range(s), key=lambda i: np.bincount(scenes[i].shape, minlength=3).tolist())
    parts = [order[i:i + scene_step] for i in range(0, s, scene_step)]
    # numbers go to a GPU before any drawing: each copy waits for all that was asked of it
    worlds = [World([scenes[i] for i in part], device) for part in parts]
    for world, part in zip(worlds, torch.tensor(order, device=device).split(scene_step)):
        for j in range(0, v, view_step):
            some = part, slice(j, j + view_step)
            images[some], depths[some] = picture(world, inner[some], fov[part], size)
    return images, depths * unit[..., None, None].float()


def picture(world, c2w, fov, size):
    """Images and depths of one packed batch, in the inner unit."""
    s, v = c2w.shape[:2]
    o, d = rays(c2w, fov, size, [(0.5, 0.5)])
    t, row = trace(world, o, d)
    depth = t.view(s, v, size, size)
    steps = [(i + 0.5) / SUBSAMPLES for i in range(SUBSAMPLES)]
    o, d = rays(c2w, fov, size, [(x, y) for y in steps for x in steps])
    colors = shade(world, o, d, *trace(world, o, d))
    colors = [color.view(s, v, -1, size, size).mean(2) for color in colors]
    return torch.stack(colors, dim=2).clamp_(0, 1).mul_(2).sub_(1), depth
