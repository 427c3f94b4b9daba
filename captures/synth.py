"""Synthetic scenes with exact cameras and depth: the solids of solids.py, ray-cast in torch.

`render` makes images and depths, `run` the shards of `prepare.py synth`. Cameras are OpenGL
camera-to-world. Letters: `v` views, `r` rays a view. Points and directions of rays are kept as
three tensors (x, y, z), so that every step is one flat pass.
"""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

from captures import make
from captures.solids import BOX, CYLINDER, FACES, MATERIAL, SPHERE, cameras, scene
from captures.writer import raw_scene
from runtime.ranks import device_of
from views import pictures

LAYOUTS = ("co3d", "re10k")
VERSION = 2                     # goes up when the same arguments give other pictures
HELD_OUT = 2**30                # number of the first held-out scene; training scenes count from 0
SUBSAMPLES = 2          # colour samples along each side of a pixel
SHADOW_DENSITY = 6.0    # shadows darken with the thickness of what casts them: soft edges
SKY_LIGHT = (0.47, 0.13)            # ambient light of a level face, and what facing up adds
SUN_LIGHT = 0.75
SUN_COLOR, SKY_COLOR = (1.05, 1.0, 0.9), (0.95, 1.0, 1.08)
DARKEST_CORNER = 0.15   # of the ambient light, however much stands around
SECOND_COLOR = 0.85     # how far a texture goes to its second colour
TINY = 1e-30
ALIKE = 4e-4            # mean square of what a photo and its rendering differ by, at most
RAYS_AT_ONCE = {"cpu": 2**16, "cuda": 2**22}    # fit the caches; outlast a kernel's launch


# ---- rendering

class World:
    """A scene's numbers as float32 tensors on a device, all of them ()."""

    def __init__(self, scene, device):
        def tensors(array):
            return torch.from_numpy(array).to(device, torch.float32).unbind()

        self.solids = []                # (shape, row, center, half, cos, sin)
        turn = np.stack([np.cos(scene.yaw), np.sin(scene.yaw)], axis=1)
        numbers = np.concatenate([scene.center, scene.half, turn], axis=1)
        for i in np.argsort(scene.shape, kind="stable"):
            x, y, z, a, b, c, cos, sin = tensors(numbers[i])
            self.solids.append((scene.shape[i], 2 + int(i), (x, y, z), (a, b, c), cos, sin))
        self.material = dict(zip(MATERIAL, tensors(scene.material.T.copy())))      # (rows) each
        self.colors = tensors(scene.colors.reshape(-1, 3).T.copy())     # 3 x (rows * faces)
        self.room, self.light, self.haze = map(tensors, (scene.room, scene.light, scene.haze))
        self.sky = scene.sky


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
    index = row.flatten()

    def m(name):
        return world.material[name].index_select(0, index).view(row.shape)

    p = [torch.addcmul(o[i], d[i], t) for i in range(3)]
    x, y, z = p[0] - m("cx"), p[1] - m("cy"), p[2] - m("cz")
    cos, sin = m("cos"), m("sin")
    e = ((cos * x + sin * y) * m("ix"), (cos * y - sin * x) * m("iy"), z * m("iz"))
    n = normals(m, e, (row == 0) & (not world.sky))
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

    Origins (v, 1) and directions (v, r), r = places * size * size. Directions have length 1 along
    the viewing axis, so that a ray's t is its z-depth. c2w (v, 4, 4), fov ().
    """
    slope = 2 * torch.tan(fov / 2) / size
    pixels = torch.arange(size, device=c2w.device, dtype=c2w.dtype) - size / 2
    columns, lines = [torch.stack([pixels + place[i] for place in places]) for i in range(2)]
    right = columns[:, None, :].expand(-1, size, -1).reshape(-1) * slope        # (r,)
    down = lines[:, :, None].expand(-1, -1, size).reshape(-1) * slope
    o = [c2w[:, i, 3, None] for i in range(3)]
    turn = c2w[:, :3, :3, None]
    d = [turn[:, i, 0] * right - turn[:, i, 1] * down - turn[:, i, 2] for i in range(3)]
    return o, d


def render(scene, c2w, fov, size):
    """Images (v, 3, size, size) in [-1, 1] and z-depths (v, size, size), float32, on c2w's device.

    c2w (v, 4, 4) float64 in the scene's unit, fov in radians. Depth is the distance along the
    viewing axis at the pixel's centre (x + 0.5, y + 0.5), in the scene's unit, known all over: the
    sky is a far wall.
    """
    world = World(scene, c2w.device)
    fov = torch.as_tensor(fov, dtype=torch.float32, device=c2w.device)
    inner = torch.cat([c2w[..., :3], c2w[..., 3:] / scene.unit], dim=-1).float()
    views_at_once = max(1, RAYS_AT_ONCE[c2w.device.type] // (size * SUBSAMPLES) ** 2)
    parts = [picture(world, part, fov, size) for part in inner.split(views_at_once)]
    images, depths = map(torch.cat, zip(*parts))
    return images, depths * torch.tensor(scene.unit, dtype=torch.float32)


def picture(world, c2w, fov, size):
    """Images and depths of views, in the inner unit."""
    v = len(c2w)
    depth, _ = trace(world, *rays(c2w, fov, size, [(0.5, 0.5)]))
    steps = [(i + 0.5) / SUBSAMPLES for i in range(SUBSAMPLES)]
    o, d = rays(c2w, fov, size, [(x, y) for y in steps for x in steps])
    colors = [color.view(v, -1, size, size).mean(1) for color in
              shade(world, o, d, *trace(world, o, d))]
    return torch.stack(colors, dim=1).clamp_(0, 1).mul_(2).sub_(1), depth.view(v, size, size)


def truth_of(photo, data):
    """The function (c2w (n, 4, 4), fov (n,)) -> true views (n, 3, s, s) in [-1, 1] of cameras of
    views/paths.py that start from a photos.HeldOut. Raises FileNotFoundError or ValueError where
    its scene is not one that `prepare.py synth` rendered into the folder `data`."""
    note, known = Path(data) / "synth.json", photo.reader.scene(photo.number)
    if not note.is_file():
        raise FileNotFoundError(f"{note} is missing: only scenes of `prepare.py synth` are known "
                                "from everywhere")
    try:
        solids = scene(int(json.loads(note.read_text(encoding="utf-8"))["seed"]),
                       int(Path(known.name).name))
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{note} is not what `prepare.py synth` writes of {known.name}") from err

    def truth(c2w, fov):
        return torch.cat([render(solids, pose[None], angle, photo.size)[0]
                          for pose, angle in zip(photo.in_scene(c2w), fov)])

    own = truth(photo.camera()[None], [photo.fov])
    if (own - pictures.tensor(photo.picture)).square().mean() > ALIKE:
        raise ValueError(f"{known.name} does not look as `prepare.py synth` renders it")
    return truth


# ---- shards

def synth_plan(args):
    """The shards of a run: a list of (path, scene numbers)."""
    plan = []
    for split, first, count in zip(make.SPLITS, (0, HELD_OUT), (args.scenes, args.held_out)):
        for offset, layout in enumerate(LAYOUTS):
            numbers = range(first + offset, first + count, len(LAYOUTS))
            for i in range(0, len(numbers), args.scenes_per_shard):
                path = Path(args.out) / layout / f"{split}-{i // args.scenes_per_shard:06d}.tar"
                plan.append((path, numbers[i:i + args.scenes_per_shard]))
    return plan


def render_scene(number, args, device):
    """(scene, images (v, h, w, 3) uint8, depths (v, h, w), c2w). A camera looks aside by up to
    args.turn degrees."""
    made = scene(args.seed, number)
    rng = np.random.default_rng([args.seed, number, 2])
    turns = np.radians(rng.uniform(-args.turn, args.turn, (args.views, 2))) if args.turn else None
    c2w = cameras(made, args.views, args.motion, turns)
    images, depths = render(made, c2w.to(device), made.fov, args.size)
    images = images.add_(1).mul_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return made, images.cpu().numpy(), depths.cpu().numpy(), c2w.numpy()


def synth_scene(rendered, args):
    """The members of one rendered scene: even numbers, which are arcs, are co3d, odd ones re10k."""
    scene, images, depths, c2w = rendered
    # readers multiply it in again: any value must give the same depth
    scale_adjustment = float(np.random.default_rng([args.seed, scene.number, 1]).uniform(0.5, 2))
    return raw_scene(LAYOUTS[scene.number % 2], f"{scene.kind}/{scene.number:010d}", images, depths,
                     c2w, scene.fov, args.image_format, scale_adjustment)


def synth_scenes(args, device, threads, path, numbers):
    """Yields the members of every scene in order: a thread renders, `threads` encode (packing
    leaves Python's lock to others), and the caller writes."""
    render_one = functools.partial(render_scene, args=args, device=device)
    rendered = make.ahead(render_one, numbers, 1, 2)
    yield from make.ahead(functools.partial(synth_scene, args=args), rendered, threads, 2 * threads)


def run(args):
    """Renders synthetic scenes into shards of both raw layouts, skipping those that are there."""
    device = device_of(args.device, ("cuda", "cpu"))
    names = ("scenes", "held_out", "views", "size", "motion", "turn", "seed", "image_format",
             "scenes_per_shard")
    arguments = {"version": VERSION} | {name: getattr(args, name) for name in names}
    shards = [path for layout in LAYOUTS for path in (Path(args.out) / layout).glob("*.tar*")]
    make.check_out(Path(args.out) / "synth.json", arguments, shards, args.overwrite)
    plan = synth_plan(args)
    todo = [shard for shard in plan if not shard[0].is_file()]
    workers = make.workers_for(args.workers, len(todo), device)
    threads = max(1, (os.cpu_count() or 1) // workers)
    make.make_shards(todo, functools.partial(synth_scenes, args, device, threads), workers,
                     f"synth on {device}")
    size = sum(path.stat().st_size for path, _ in plan)
    scenes = args.scenes + args.held_out
    print(f"{args.out}: {len(plan)} shards, {scenes} scenes, {scenes * args.views} views, "
          f"{size / 1e6:.1f} MB")
