"""Synthetic scenes with exact cameras and depth: textured solids, ray-cast in torch.

A scene is a room, or a ground under a sky, with spheres, boxes and upright cylinders, and a camera path
through it; it is a function of (seed, number) alone. World z is up; cameras are OpenGL camera-to-world.
Letters: `s` scenes of a batch, `v` views a scene, `r` rays a view, `n` solids, `k` numbers of a material.
Points and directions are kept as three tensors (x, y, z), so that every step is one flat pass.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

KINDS = ("arc", "walk", "fly")          # camera paths; even scene numbers are arcs, odd ones walk or fly
SHAPES = ("sphere", "box", "cylinder")  # a material's `shape` is an index into it
SPHERE, BOX, CYLINDER = range(3)
CLUSTER = 2.1           # solids stand within this distance of the middle, in the scene's inner unit
HORIZON = 40.0          # half side of the ground of a scene under the sky; the sky hangs behind it
CLEARANCE = 0.45        # least distance from a camera to any solid, wall, ceiling or ground
SUBSAMPLES = 2          # colour samples along each side of a pixel
SHADOW_DENSITY = 6.0    # how fast a shadow darkens with the thickness of what casts it: soft edges
NEVER = -1000.0         # height of the empty slots of a padded batch
RAYS_AT_ONCE = {"cpu": 2**17, "cuda": 2**25}    # rays in flight: caches there, memory here

# a material's numbers, in the order of the table's rows; colours are those of the faces -x +x -y +y -z +z
MATERIAL = ("cx cy cz cos sin ix iy iz shape emits fade kr warp sharp bias p1 p2 p3 "
            "k1x k1y k1z k2x k2y k2z k3x k3y k3z b0 b1 b2").split()
FACES = 6


@dataclass(frozen=True)
class Scene:
    """One scene, in its inner unit of length; `unit` stretches what the cameras and the depth say of it."""
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
    light: np.ndarray           # (3,) unit vector towards the sun
    haze: np.ndarray            # (3,) colour of the horizon
    path: np.ndarray            # (5, 3) start, end, gaze at start, gaze at end, amplitude of the sway


# ---------------------------------------------------------------------------------- making a scene

def scene(seed, number):
    """The Scene that belongs to (seed, number): two integers of 0 or more."""
    rng = np.random.default_rng([seed, number])
    kind = "arc" if number % 2 == 0 else KINDS[rng.integers(1, 3)]
    fov = math.radians(rng.uniform(40, 75))
    unit = 10 ** rng.uniform(-1, 1)
    sky = bool(rng.random() < (0.5 if kind == "arc" else 0.3))
    # far enough that the solids fill the view
    distance = float(np.clip(rng.uniform(1.3, 1.8) / math.tan(fov / 2), 2.7, 4.6))
    walls = distance + CLEARANCE + rng.uniform(0.3, 1.6, 2)
    room = np.array([HORIZON, HORIZON, HORIZON] if sky else [*walls, rng.uniform(2.6, 3.8)])
    shape, center, half, yaw = solids(rng, room)
    path = free_path(rng, kind, distance, room, center, half)
    material, colors, haze = materials(rng, sky, room, shape, center, half, yaw)
    azimuth, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 1.2)
    light = np.array([math.cos(azimuth), math.sin(azimuth), 2 * height])
    return Scene(number, kind, fov, unit, sky, room, shape, center, half, yaw, material, colors,
                 light / np.linalg.norm(light), haze, path)


def solids(rng, room):
    """Shapes, centres, half extents and yaws of 4 to 9 solids that do not touch, some on top of others."""
    count = rng.integers(4, 10)
    shape, center, half, yaw = [], [], [], []
    while len(shape) < count:
        kind = rng.integers(0, 3)
        wide, tall = rng.uniform(0.22, 0.62), rng.uniform(0.2, 0.85)
        size = {SPHERE: [wide] * 3, BOX: [wide, rng.uniform(0.22, 0.62), tall], CYLINDER: [wide, wide, tall]}
        size = np.array(size[int(kind)])
        angle, away = rng.uniform(0, 2 * math.pi), CLUSTER * math.sqrt(rng.random())
        place = np.array([away * math.cos(angle), away * math.sin(angle), size[2]])
        flat = [i for i, other in enumerate(shape) if other != SPHERE and center[i][2] == half[i][2]]
        if flat and rng.random() < 0.35:         # on top of a box or cylinder that stands on the ground
            below = flat[rng.integers(len(flat))]
            size = size * min(1, 0.9 * half[below][:2].min() / size[:2].max())
            place = center[below] + [0, 0, half[below][2] + size[2]]
        elif rng.random() < 0.15:                # in the air
            place[2] += rng.uniform(0.2, 1.0)
        reach = [np.hypot(*h[:2]) if s == BOX else h[0] for s, h in zip([*shape, kind], [*half, size])]
        apart = [np.hypot(*(place - c)[:2]) > reach[-1] + r or abs(place - c)[2] >= (size + h)[2] - 1e-9
                 for c, h, r in zip(center, half, reach)]
        if all(apart) and place[2] + size[2] < room[2] - CLEARANCE:
            shape, center, half = [*shape, int(kind)], [*center, place], [*half, size]
            yaw.append(rng.uniform(0, 2 * math.pi))
    return np.array(shape), np.array(center), np.array(half), np.array(yaw)


def free_path(rng, kind, distance, room, center, half):
    """A camera path of that kind, (5, 3), that keeps CLEARANCE from everything. Tries until one does."""
    while True:
        angle, turn = rng.uniform(0, 2 * math.pi), rng.choice([-1, 1])
        low, high = rng.uniform(0.7, min(2.4, room[2] - CLEARANCE), 2)
        gaze = rng.uniform(-0.35, 0.35, (2, 3)) + [0, 0, 0.6]
        outward, aside = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        if kind == "arc":       # start and end are (radius, angle, height)
            gaze[1] = gaze[0]
            sweep = turn * math.radians(rng.uniform(60, 120))
            ends = [[distance, angle, low], [distance * rng.uniform(0.85, 1.1), angle + sweep, high]]
        elif kind == "walk":
            step = turn * rng.uniform(0.7, 1.5) * aside
            near = distance * rng.uniform(0.8, 1.0, 2)
            ends = [[*(near[0] * outward - step), low], [*(near[1] * outward + step), high]]
            gaze[:, :2] += [-0.4 * step, 0.4 * step]
        else:
            drift = rng.uniform(-0.6, 0.6, 2)
            near = distance * rng.uniform([0.95, 0.5], [1.1, 0.65])
            ends = [[*(near[0] * outward + drift[0] * aside), low], [*(near[1] * outward + drift[1] * aside), high]]
        path = np.array([*ends, *gaze, rng.uniform(-0.12, 0.12, 3)])
        eye, _ = along(path, kind, np.linspace(0, 1, 65))
        inside = (abs(eye[:, :2]) < room[:2] - CLEARANCE).all() and (eye[:, 2] < room[2] - CLEARANCE).all()
        if inside and eye[:, 2].min() > CLEARANCE and clearance(eye, center, half).min() > CLEARANCE:
            return path


def clearance(eye, center, half):
    """A lower bound of the distance from every point (m, 3) to every solid's upright bounding cylinder: (m, n)."""
    off = eye[:, None] - center
    around = np.hypot(off[..., 0], off[..., 1]) - np.hypot(half[:, 0], half[:, 1])
    return np.maximum(around, abs(off[..., 2]) - half[:, 2])


def along(path, kind, s):
    """Positions and gaze points (m, 3) at the places `s` (m,) in [0, 1] of a path."""
    start, end, gaze_start, gaze_end, sway = path
    s = s[:, None]
    eye = start + s * (end - start)
    if kind == "arc":
        radius, angle, height = eye.T
        eye = np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)
    return eye + sway * np.sin(2 * math.pi * s), gaze_start + s * (gaze_end - gaze_start)


def cameras(scene, views):
    """The OpenGL camera-to-world matrices (views, 4, 4) float64 of a scene, evenly along its path, in its unit."""
    eye, gaze = along(scene.path, scene.kind, np.linspace(0, 1, views))
    back = eye - gaze
    back /= np.linalg.norm(back, axis=1, keepdims=True)
    right = np.cross([0, 0, 1], back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    c2w = np.zeros((views, 4, 4))
    c2w[:, :3] = np.stack([right, np.cross(back, right), back, eye * scene.unit], axis=2)
    c2w[:, 3, 3] = 1
    return torch.from_numpy(c2w)


# ------------------------------------------------------------------------------------- materials

def hsv(hue, saturation, value):
    """RGB in [0, 1], (..., 3), of a hue in turns, a saturation and a value."""
    sector = (np.asarray(hue)[..., None] * 6 + [5, 3, 1]) % 6
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return np.asarray(value)[..., None] * (1 - np.asarray(saturation)[..., None] * ramp)


def pattern(rng, flat):
    """Numbers of a procedural texture, over coordinates of [-1, 1] (or of a unit, `flat`): see `texture`."""
    waves = np.zeros((3, 3))
    phase = np.full(3, math.pi / 2)          # an unused wave is a constant 1
    numbers = dict(kr=0.0, warp=0.0, sharp=rng.uniform(4, 9), bias=0.0)
    finest = 2 if flat else 3
    # half-integer counts of half waves: their crests, not their zeros, lie on a box's faces
    counts = rng.integers(1, finest + 1, 3) + 0.5
    axes = 2 if flat else 3
    style = ("checks", "stripes", "rings", "blobs", "dots")[rng.integers(5)]
    if style in ("checks", "dots"):
        waves[:axes, :axes] = np.diag(math.pi * counts[:axes])
        phase[:axes] = 0
        numbers["bias"] = 0.0 if style == "checks" else 0.3
    elif style == "stripes":
        direction = rng.normal(size=3) * ([1, 1, 0] if flat else [1, 1, 1])
        waves[0] = math.pi * (counts[0] + 0.7) * direction / np.linalg.norm(direction)
        phase[0] = rng.uniform(0, 2 * math.pi)
    elif style == "rings":
        numbers["kr"] = math.pi * (counts[0] + 1)
        waves[0, 2] = 0.0 if flat else math.pi * counts[1]
    else:
        waves = rng.normal(size=(3, 3)) * (1.8 if flat else 2.2)
        phase = rng.uniform(0, 2 * math.pi, 3)
        numbers.update(warp=1.2, sharp=rng.uniform(2, 5))
    names = [f"k{i}{axis}" for i in (1, 2, 3) for axis in "xyz"]
    return numbers | dict(zip(("p1", "p2", "p3"), phase)) | dict(zip(names, waves.ravel()))


def materials(rng, sky, room, shape, center, half, yaw):
    """The material table (2 + n, k), the face colours (2 + n, 6, 3) and the haze (3,) of a scene."""
    rows, colors = [], []
    hues = (rng.random() + np.arange(len(shape)) * 0.381966 + rng.normal(size=len(shape)) * 0.03) % 1
    haze = hsv(rng.uniform(0.5, 0.65), rng.uniform(0.05, 0.25), rng.uniform(0.85, 1.0))

    def add(numbers, faces, second):
        numbers = numbers | dict(zip(("b0", "b1", "b2"), second))
        rows.append([numbers[name] for name in MATERIAL])
        colors.append(faces)

    # walls, each of its own hue and brightness, or the sky, whose sides differ as well
    base = dict(cx=0, cy=0, cz=room[2] / 2, cos=1, sin=0, ix=1, iy=1, iz=1, shape=BOX, emits=0, fade=0)
    if sky:
        zenith = hsv(rng.uniform(0.55, 0.64), rng.uniform(0.45, 0.75), rng.uniform(0.65, 0.95))
        faces = np.tile(zenith, (FACES, 1))
        faces[:4] = np.clip(haze + rng.normal(size=(4, 1)) * 0.07 + rng.normal(size=(4, 3)) * 0.03, 0, 1)
        clouds = pattern(rng, False) | dict(warp=1.5, sharp=0.8, bias=0.5)
        base.update(ix=1 / HORIZON, iy=1 / HORIZON, iz=2 / HORIZON, cz=0, shape=SPHERE, emits=1)
        add(base | clouds, faces, np.ones(3))
    else:
        faces = hsv(rng.random(6), rng.uniform(0.1, 0.5, 6), rng.uniform(0.6, 0.95, 6))
        add(base | pattern(rng, False), faces, np.clip(faces.mean(0) * rng.uniform(0.55, 1.3), 0, 1))

    ground = hsv(np.full(FACES, rng.random()), rng.uniform(0.1, 0.55), rng.uniform(0.45, 0.85))
    base.update(ix=1, iy=1, iz=1, cz=0, shape=BOX, emits=0, fade=1 / 10**2 if sky else 0)
    add(base | pattern(rng, True), ground, np.clip(ground[0] * rng.uniform(0.45, 0.75), 0, 1))

    for i, hue in enumerate(hues):
        spread = 0.25 if rng.random() < 0.35 else 0.05
        faces = hsv((hue + rng.normal(size=6) * spread) % 1, rng.uniform(0.45, 0.95, 6), rng.uniform(0.55, 1, 6))
        second = hsv((hue + rng.uniform(0.3, 0.7)) % 1, rng.uniform(0, 0.8), rng.choice([0.2, 0.95]))
        where = dict(zip(("cx", "cy", "cz"), center[i])) | dict(zip(("ix", "iy", "iz"), 1 / half[i]))
        add(where | dict(cos=math.cos(yaw[i]), sin=math.sin(yaw[i]), shape=shape[i], emits=0, fade=0)
            | pattern(rng, False), faces, second)
    return np.array(rows), np.array(colors), haze


# ------------------------------------------------------------------------------------- rendering

class World:
    """Scenes packed for tracing: solids in slots by shape, padded, every number a (s, 1, 1) tensor."""

    def __init__(self, scenes, device):
        counts = [max(int((sc.shape == shape).sum()) for sc in scenes) for shape in range(3)]
        first = 2 + np.concatenate([[0], np.cumsum(counts)])
        rows = int(first[-1])
        slots = np.zeros((rows, 8, len(scenes)))          # center, half, cos, sin
        slots[:, 2] = NEVER
        material = np.zeros((len(MATERIAL), len(scenes), rows))
        colors = np.zeros((3, len(scenes), rows, FACES))
        for i, sc in enumerate(scenes):
            order = [0, 1, *np.zeros(len(sc.shape), int)]
            for shape in range(3):
                mine = np.flatnonzero(sc.shape == shape)
                for j, solid in enumerate(mine):
                    order[2 + solid] = first[shape] + j
            slots[order[2:], :, i] = np.concatenate(
                [sc.center, sc.half, np.cos(sc.yaw)[:, None], np.sin(sc.yaw)[:, None]], axis=1)
            material[:, i, order] = sc.material.T
            colors[:, i, order] = sc.colors.transpose(2, 0, 1)

        def tensor(array):
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, torch.float32)

        slots = tensor(slots)[..., None, None]
        self.solids = []
        for shape in range(3):
            for row in range(first[shape], first[shape + 1]):
                x, y, z, a, b, c, cos, sin = slots[row].unbind()
                self.solids.append((shape, row, (x, y, z), (a, b, c), cos, sin))
        self.rows = rows
        self.material = dict(zip(MATERIAL, tensor(material.reshape(len(MATERIAL), -1)).unbind()))
        self.colors = tensor(colors.reshape(3, -1)).unbind()
        each = np.array([[*sc.room, sc.sky, *sc.light, *sc.haze] for sc in scenes]).T
        each = tensor(each)[..., None, None].unbind()
        self.room, self.sky, self.light, self.haze = each[0:3], each[3], each[4:7], each[7:10]
        self.base = (torch.arange(len(scenes), device=device, dtype=torch.int32) * rows)[:, None, None]


def dot(a, b):
    """Sum over x, y, z."""
    return torch.addcmul(torch.addcmul(a[0] * b[0], a[1], b[1]), a[2], b[2])


def inverses(d):
    """What every solid needs of the directions: 1 / |d|^2, 1 / |d_xy|^2, 1 / d_z."""
    return 1 / dot(d, d), 1 / (d[0] * d[0] + d[1] * d[1]), 1 / d[2]


def interval(solid, x, y, z, d, inv):
    """Where rays from (x, y, z), seen from a solid's centre, are inside it: (near, far).

    A ray that misses has near >= far, or NaN in both.
    """
    shape, _, _, half, cos, sin = solid
    if shape == SPHERE:
        b = dot((x, y, z), d) * inv[0]
        root = square_root(b * b - (dot((x, y, z), (x, y, z)) - half[0] ** 2) * inv[0])
        return -root - b, root - b
    if shape == CYLINDER:
        b = (x * d[0] + y * d[1]) * inv[1]
        root = square_root(b * b - (x * x + y * y - half[0] ** 2) * inv[1])
        slabs = [(inv[2], z, half[2])]
        near, far = -root - b, root - b
    else:
        slabs = [(1 / (cos * d[0] + sin * d[1]), cos * x + sin * y, half[0]),
                 (1 / (cos * d[1] - sin * d[0]), cos * y - sin * x, half[1]), (inv[2], z, half[2])]
        near, far = None, None
    for slope, middle, reach in slabs:
        mid, width = slope * middle, slope.abs() * reach
        near = -mid - width if near is None else torch.maximum(near, -mid - width)
        far = width - mid if far is None else torch.minimum(far, width - mid)
    return near, far


def square_root(x):
    """The root of x, NaN where x <= 0; several times faster than torch.sqrt on CPUs."""
    return x * x.rsqrt()


def trace(world, o, d):
    """The first thing each ray meets: (t, row), t in lengths of `d`, row of the material table."""
    inv = inverses(d)
    tx, ty = [(torch.copysign(world.room[i], d[i]) - o[i]) / d[i] for i in (0, 1)]
    tz = (torch.where(d[2] > 0, world.room[2], 0) - o[2]) * inv[2]
    walls = torch.minimum(tx, ty)
    row = ((tz < walls) & (d[2] < 0)).to(torch.int32)
    # nearness, 1 / t: the largest wins, what lies behind is negative, and NaN loses every comparison
    nearness = 1 / torch.minimum(walls, tz)
    for solid in world.solids:
        near, far = interval(solid, *[o[i] - solid[2][i] for i in range(3)], d, inv)
        closer = 1 / near
        hit = closer > nearness
        if solid[0] != SPHERE:
            hit &= near < far
        nearness = torch.where(hit, closer, nearness)
        row.masked_fill_(hit, solid[1])
    return 1 / nearness, row


def texture(m, e):
    """How much of the second colour shows, in [0, 1], at coordinates `e`: three sines, each bending the next."""
    u, bend = 1, 0
    for i in (3, 2, 1):
        phase = dot((m(f"k{i}x"), m(f"k{i}y"), m(f"k{i}z")), e) + m(f"p{i}")
        if i == 1:
            phase = phase + m("kr") * (e[0] * e[0] + e[1] * e[1]).sqrt()
        wave = torch.sin(phase + bend)
        u, bend = wave * u, m("warp") * wave
    return (m("sharp") * (u - m("bias"))).clamp_(-1, 1).mul_(0.5).add_(0.5)


def normal_of(m, e, inward):
    """Unit normals in a solid's own axes at its surface coordinates `e`, each in [-1, 1]."""
    ax, ay, az = e[0].abs(), e[1].abs(), e[2].abs()
    shape = m("shape")
    box, upright = shape == BOX, shape == CYLINDER
    around = torch.where(box, torch.maximum(ax, ay), (e[0] * e[0] + e[1] * e[1]).sqrt())
    cap = (az > around) & (shape != SPHERE)
    side = ~cap
    nx = torch.where(box, torch.sign(e[0]) * (ax >= ay), e[0]) * side
    ny = torch.where(box, torch.sign(e[1]) * (ay > ax), e[1]) * side
    nz = torch.where(cap, torch.sign(e[2]), e[2] * (shape == SPHERE))
    scale = torch.rsqrt(dot((nx, ny, nz), (nx, ny, nz))) * (1 - 2 * inward)
    return nx * scale, ny * scale, nz * scale


def shade(world, o, d, t, row):
    """The colours (3 tensors in [0, 1]) of what the rays meet: material, sun with shadows, sky light, contact."""
    index = (row + world.base).flatten()

    def m(name):
        return world.material[name].index_select(0, index).view(row.shape)

    p = [torch.addcmul(o[i], d[i], t) for i in range(3)]
    x, y, z = p[0] - m("cx"), p[1] - m("cy"), p[2] - m("cz")
    cos, sin = m("cos"), m("sin")
    e = ((cos * x + sin * y) * m("ix"), (cos * y - sin * x) * m("iy"), z * m("iz"))
    room = row < 2
    n = normal_of(m, e, room & ~world.sky.bool())
    mix = texture(m, e) * 0.85

    colors = [0, 0, 0]
    for axis in range(3):
        face = index * FACES + (2 * axis + (n[axis] > 0).flatten())
        weight = n[axis] * n[axis]
        for c in range(3):
            colors[c] = colors[c] + weight * world.colors[c].index_select(0, face).view(row.shape)
    n = (cos * n[0] - sin * n[1], sin * n[0] + cos * n[1], n[2])

    through, open_sky = 0, torch.ones_like(t)
    inv = inverses(world.light)
    for solid in world.solids:
        x, y, z = [p[i] - solid[2][i] for i in range(3)]
        near, far = interval(solid, x, y, z, world.light, inv)
        inside = far - near.clamp_(min=0)
        through = through + torch.where(inside > 0, inside, 0)      # NaN, a miss, is 0 as well
        size = (solid[3][0] + solid[3][1] + solid[3][2]) / 3
        closeness = dot((x, y, z), (x, y, z)).rsqrt_()
        facing = (dot((x, y, z), n) * closeness).clamp_(max=0)
        open_sky = torch.addcmul(open_sky, facing * size**2, closeness * closeness)
    sun = dot(n, world.light).clamp_(min=0) * torch.exp(-SHADOW_DENSITY * through) * 0.75
    ambient = (0.42 + 0.13 * n[2]) * open_sky.clamp_(min=0.15)
    light = [torch.where(m("emits") > 0, 1, ambient * cool + sun * warm)
             for cool, warm in ((0.95, 1.05), (1.0, 1.0), (1.08, 0.9))]
    fade = torch.exp(-m("fade") * (p[0] * p[0] + p[1] * p[1]))
    for c in range(3):
        lit = torch.lerp(colors[c], m(f"b{c}"), mix) * light[c]
        colors[c] = torch.lerp(world.haze[c].expand_as(lit), lit, fade)
    return colors


def rays(c2w, fov, size, offsets):
    """Origins (s, v, 1) and directions (s, v, samples * size * size) of the rays through the pixels' `offsets`.

    Directions have length 1 along the viewing axis, so a ray's parameter is its z-depth.
    """
    focal = size / 2 / torch.tan(fov / 2)[:, None, None]
    steps = torch.arange(size, device=c2w.device, dtype=c2w.dtype)
    grid = [torch.stack([(steps + along) - size / 2 for along in each]) for each in zip(*offsets)]
    u = grid[0][:, None, :].expand(-1, size, -1).reshape(-1) / focal        # (s, 1, r)
    v = grid[1][:, :, None].expand(-1, -1, size).reshape(-1) / focal
    origin = [c2w[:, :, i, 3, None] for i in range(3)]
    turn = c2w[:, :, :3, :3, None]
    direction = [turn[:, :, i, 0] * u - turn[:, :, i, 1] * v - turn[:, :, i, 2] for i in range(3)]
    return origin, direction


def render(scenes, c2w, fov, size):
    """Images (s, v, 3, size, size) in [-1, 1] and z-depths (s, v, size, size), float32, on the device of `c2w`.

    scenes: a list of s Scenes; c2w (s, v, 4, 4) float64 in the scenes' units; fov (s,) radians; or one Scene
    with c2w (v, 4, 4) and a float. Depth is exact at the pixel's centre, (x + 0.5, y + 0.5), along the viewing
    axis, in the scene's unit; 0 is the sky.
    """
    if isinstance(scenes, Scene):
        image, depth = render([scenes], c2w[None], torch.tensor([fov]), size)
        return image[0], depth[0]
    device = c2w.device
    s, views = c2w.shape[:2]
    at_once = max(1, RAYS_AT_ONCE.get(device.type, RAYS_AT_ONCE["cuda"]) // (size * SUBSAMPLES) ** 2)
    images = torch.empty(s, views, 3, size, size, device=device)
    depths = torch.empty(s, views, size, size, device=device)
    scene_step, view_step = max(1, at_once // views), min(views, at_once)
    for i in range(0, s, scene_step):
        part = slice(i, i + scene_step)
        world = World(scenes[part], device)
        unit = torch.tensor([sc.unit for sc in scenes[part]], dtype=torch.float64, device=device)[:, None]
        inner = c2w[part].clone()
        inner[..., :3, 3] /= unit[..., None]
        for j in range(0, views, view_step):
            some = slice(j, j + view_step)
            image, depth = render_world(world, inner[:, some].float(), fov[part].to(device).float(), size)
            images[part, some] = image
            depths[part, some] = depth * unit[..., None, None].float()
    return images, depths


def render_world(world, c2w, fov, size):
    """Images and depths of one packed batch, in the inner unit."""
    s, v = c2w.shape[:2]
    o, d = rays(c2w, fov, size, [(0.5, 0.5)])
    t, row = trace(world, o, d)
    depth = torch.where((row == 0) & world.sky.bool(), 0, t).view(s, v, size, size)
    places = [(i + 0.5) / SUBSAMPLES for i in range(SUBSAMPLES)]
    o, d = rays(c2w, fov, size, [(x, y) for y in places for x in places])
    colors = shade(world, o, d, *trace(world, o, d))
    image = torch.stack([c.view(s, v, -1, size, size).mean(2) for c in colors], dim=2)    # (s, v, 3, size, size)
    return image.clamp_(0, 1).mul_(2).sub_(1), depth
