"""prepare.py on captures: a miniature of each published format, rendered, whose truth is known."""

import errno
import gzip
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import timeit
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import configs
import data
import prepare
import train
from captures import datasets, own, resample, solids, synth, writer
from runtime import command as command_line
from views import cameras, colmap
from views.colmap import Lens
from test_prepare import project, read_shard, unproject

SIZE = 64                   # pixels a side that are written
BIG, VIEWS = 160, 3         # of a rendering, from which photos are cut
FOV = math.radians(80)      # of a rendering
FOCAL = BIG / 2 / math.tan(FOV / 2)
WIDE, TALL = (10, 25, 150, 100), (32, 5, 90, 140)       # left, top, width, height of a photo
SCALES = (1.7, 0.4)         # scale_adjustment of the CO3D sequences
STEP = 33_367               # microseconds between RealEstate10K's frames


@dataclass
class Truth:
    """A rendered scene, and photos cut out of its views."""
    scene: solids.Scene
    c2w: torch.Tensor               # (v, 4, 4)
    images: np.ndarray              # (v, h, w, 3) uint8
    depths: np.ndarray              # (v, h, w)
    lens: tuple                     # fx, fy, cx, cy in pixels

    @property
    def half(self):
        """Tangent of half the field of view of the largest square about the principal point."""
        (h, w), (fx, _, cx, cy) = self.images.shape[1:3], self.lens
        return min(cx, w - cx, cy, h - cy) / fx

    def rendered(self):
        """What should come out: images (v, 3, s, s) in [-1, 1] and depths (v, s, s)."""
        return synth.render(self.scene, self.c2w, 2 * math.atan(self.half), SIZE)


def truth(number, window):
    """The Truth of a scene; the window's middle is not the principal point."""
    scene = synth.scene(11, number)
    c2w = synth.cameras(scene, VIEWS, 0.3)
    images, depths = synth.render(scene, c2w, FOV, BIG)
    left, top, w, h = window
    images = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    cut = slice(top, top + h), slice(left, left + w)
    return Truth(scene, c2w, images[(slice(None), *cut)], depths.numpy()[(slice(None), *cut)],
                 (FOCAL, FOCAL, BIG / 2 - left, BIG / 2 - top))


@pytest.fixture(scope="module")
def truths():
    """A landscape and a portrait capture."""
    return {"wide": truth(0, WIDE), "tall": truth(1, TALL)}


def opencv(c2w):
    """World-to-camera (4, 4), x right, y down, z forward, of an OpenGL camera."""
    return np.linalg.inv(c2w.numpy() @ np.diag([1.0, -1, -1, 1]))


# ---- the miniatures

def words(depth):
    """A 16-bit PNG of float16 bits, by Pillow."""
    return Image.fromarray(depth.astype(np.float16).view(np.uint16))


def write_co3d(root, truths):
    """CO3D v2 as downloaded: one category, a sequence a scene, one in each format of intrinsics."""
    frames, sequences = [], []
    for (name, each), kind, scale in zip(truths.items(), ("ndc_isotropic", "ndc_norm_image_bounds"),
                                         SCALES):
        h, w = each.images.shape[1:3]
        half = (min(w, h) / 2,) * 2 if kind == "ndc_isotropic" else (w / 2, h / 2)
        sequences.append({"sequence_name": name, "category": "toy", "viewpoint_quality_score": 0.9})
        for folder in ("images", "depths", "depth_masks"):
            (root / "toy" / name / folder).mkdir(parents=True)
        for i in range(VIEWS):
            stem = f"toy/{name}/%s/frame{i + 1:06d}"
            image, depth, mask = (f"{stem % 'images'}.jpg", f"{stem % 'depths'}.jpg.geometric.png",
                                  f"{stem % 'depth_masks'}.png")
            Image.fromarray(each.images[i]).save(root / image, quality=98, subsampling=0)
            words(each.depths[i] / scale).save(root / depth)
            known = np.full((h, w), True)
            known[:, :w // 3] = False
            Image.fromarray(known).save(root / mask)
            w2c = np.diag([-1.0, -1, 1, 1]) @ opencv(each.c2w[i])       # x left, y up, z forward
            fx, fy, cx, cy = each.lens
            frames.append({
                "sequence_name": name, "frame_number": i + 1, "frame_timestamp": 0.1 * i,
                "image": {"path": image, "size": [h, w]},
                "depth": {"path": depth, "scale_adjustment": scale, "mask_path": mask},
                "mask": {"path": "none", "mass": 1.0},
                "viewpoint": {"R": w2c[:3, :3].T.tolist(), "T": w2c[:3, 3].tolist(),
                              "focal_length": [fx / half[0], fy / half[1]],
                              "principal_point": [(w / 2 - cx) / half[0], (h / 2 - cy) / half[1]],
                              "intrinsics_format": kind}})
    sequences.append({"sequence_name": "poor", "viewpoint_quality_score": 0.1})
    (root / "toy/poor/images").mkdir(parents=True)
    sequences.append({"sequence_name": "absent", "viewpoint_quality_score": 0.9})
    annotate(root, frames, sequences)


def annotate(root, frames, sequences):
    """The two annotation files of the category."""
    for name, content in (("frame", frames), ("sequence", sequences)):
        path = root / "toy" / f"{name}_annotations.jgz"
        path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def annotations(root):
    """The frames of the category."""
    return json.loads(gzip.decompress((root / "toy/frame_annotations.jgz").read_bytes()))


def write_re10k(root, truths):
    """Camera texts, frames of pixels twice as wide as high, COLMAP models of them."""
    (root / "cameras").mkdir(parents=True)
    for name, each in truths.items():
        h, w = each.images.shape[1:3]
        fx, fy, cx, cy = each.lens
        lines = [f"https://www.youtube.com/watch?v=video_{name}"]
        (root / "frames" / name).mkdir(parents=True)
        for i in range(VIEWS):
            time = 5_000_000 + i * STEP
            numbers = [fx / w, fy / h, cx / w, cy / h, 0, 0, *opencv(each.c2w[i])[:3].ravel()]
            lines.append(" ".join([str(time), *(f"{number:.9f}" for number in numbers)]))
            pairs = each.images[i].reshape(h, w // 2, 2, 3).mean(2).round().astype(np.uint8)
            Image.fromarray(pairs).save(root / "frames" / name / f"{time}.png")
        (root / "cameras" / f"{name}.txt").write_text("\n".join(lines) + "\n")
        names = [f"{5_000_000 + i * STEP}.png" for i in range(VIEWS)]
        write_colmap(root / "models" / name, each, ".bin", names, squeeze=2)
    (root / "cameras/absent.txt").write_text("https://www.youtube.com/watch?v=nowhere\n")


def observations(each, count=4000):
    """World points (n, 3), and for each view which of them it sees, and where in pixels."""
    rng = np.random.default_rng(0)
    view = rng.integers(0, VIEWS, count)
    h, w = each.images.shape[1:3]
    row, column = rng.integers(0, h, count), rng.integers(0, w, count)
    fx, fy, cx, cy = each.lens
    depth = each.depths[view, row, column].astype(float)
    rays = np.stack([(column + 0.5 - cx) / fx, (row + 0.5 - cy) / fy, np.ones(count)], axis=1)
    c2w = np.linalg.inv(np.array([opencv(pose) for pose in each.c2w]))
    points = np.einsum("nij,nj->ni", c2w[view, :3, :3], rays * depth[:, None]) + c2w[view, :3, 3]
    seen = []
    for i in range(VIEWS):
        local = points @ opencv(each.c2w[i])[:3, :3].T + opencv(each.c2w[i])[:3, 3]
        place = local[:, :2] / local[:, 2:] * (fx, fy) + (cx, cy)
        inside = (local[:, 2] > 0) & (place > 0).all(1) & (place < (w, h)).all(1)
        pixel = place.clip(0, (w - 1, h - 1)).astype(int)
        there = each.depths[i, pixel[:, 1], pixel[:, 0]]
        seen.append((np.flatnonzero(inside & (abs(local[:, 2] / there - 1) < 0.01)), place))
    return points, seen


def write_colmap(folder, each, kind, names, squeeze=1, model="PINHOLE"):
    """A COLMAP model in a folder, of photos `squeeze` times narrower."""
    folder.mkdir(parents=True)
    points, seen = observations(each)
    h, w = each.images.shape[1:3]
    fx, fy, cx, cy = each.lens
    w, fx, cx = w // squeeze, fx / squeeze, cx / squeeze
    lens = [fx, cx, cy] if model == "SIMPLE_PINHOLE" else [fx, fy, cx, cy]
    if model == "OPENCV":
        lens += [0.1, 0, 0, 0]
    number = {name: number for number, (name, _) in colmap.MODELS.items()}[model]
    cameras, images = struct.pack("<Qiiqq", 1, 7, number, w, h), struct.pack("<Q", VIEWS)
    cameras += struct.pack(f"<{len(lens)}d", *lens)
    texts = [f"# cameras\n7 {model} {w} {h} {' '.join(map(repr, lens))}\n", "# images\n", "# \n"]
    for i in reversed(range(VIEWS)):                # COLMAP's order is not that of the names
        w2c = opencv(each.c2w[i])
        pose = [*quaternion(w2c[:3, :3]), *w2c[:3, 3]]
        ids, place = seen[i]
        images += struct.pack("<i7di", i + 1, *pose, 7) + names[i].encode() + b"\0"
        images += struct.pack("<Q", len(ids) + 1) + struct.pack("<ddq", 1.0, 2.0, -1)
        rows = [(*(place[k] / (squeeze, 1)), k + 1) for k in ids]
        images += b"".join(struct.pack("<ddq", *row) for row in rows)
        texts[1] += f"{i + 1} {' '.join(map(repr, map(float, pose)))} 7 {names[i]}\n1.0 2.0 -1 "
        texts[1] += " ".join(f"{x!r} {y!r} {k}" for x, y, k in
                             ((float(x), float(y), k) for x, y, k in rows)) + "\n"
    blob = struct.pack("<Q", len(points))
    for k, point in reversed(list(enumerate(points))):
        blob += struct.pack("<Q3d3BdQ4i", k + 1, *point, 1, 2, 3, 0.5, 2, 1, 2, 3, 4)
        texts[2] += f"{k + 1} {' '.join(map(repr, map(float, point)))} 1 2 3 0.5 1 2 3 4\n"
    if kind == ".bin":
        for name, content in zip(colmap.PARTS, (cameras, images, blob)):
            (folder / f"{name}.bin").write_bytes(content)
    else:
        for name, content in zip(colmap.PARTS, texts):
            (folder / f"{name}.txt").write_text(content)


def quaternion(turn):
    """(w, x, y, z) of a rotation matrix, of length 1: from the axis that it leaves alone."""
    values, vectors = np.linalg.eig(turn)
    axis = np.real(vectors[:, np.argmin(abs(values - 1))])
    sine = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    angle = math.atan2(sine @ axis / 2, (np.trace(turn) - 1) / 2)
    return [math.cos(angle / 2), *(math.sin(angle / 2) * axis)]


def write_own(root, truths):
    """A COLMAP capture (binary), another (text), and nerfstudio's."""
    for name, kind, model, place in (("wide", ".bin", "PINHOLE", "sparse/0"),
                                     ("tall", ".txt", "SIMPLE_PINHOLE", "sparse")):
        names = [f"left/{i:03d} a.png" for i in range(VIEWS)]
        write_colmap(root / "colmap" / name / place, truths[name], kind, names, model=model)
        (root / "colmap" / name / "images/left").mkdir(parents=True)
        for image, file in zip(truths[name].images, names):
            Image.fromarray(image).save(root / "colmap" / name / "images" / file)
    for name, each in truths.items():
        folder = root / "nerfstudio" / name
        (folder / "images").mkdir(parents=True)
        h, w = each.images.shape[1:3]
        fx, fy, cx, cy = each.lens
        frames = []
        for i in range(VIEWS):
            Image.fromarray(each.images[i]).save(folder / f"images/{i}.png")
            frames.append({"file_path": f"images/{i}.png",
                           "transform_matrix": each.c2w[i].tolist()})
            if name == "wide":
                depth = (each.depths[i] * 1000).round().astype(np.uint16)
                Image.fromarray(depth).save(folder / f"images/{i}_depth.png")
                frames[-1]["depth_file_path"] = f"images/{i}_depth.png"
        shared = {"camera_model": "OPENCV", "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": w,
                  "h": h, "k1": 0.0}
        (folder / "transforms.json").write_text(json.dumps({**shared, "frames": frames}))


@pytest.fixture(scope="module")
def miniatures(truths, tmp_path_factory):
    """A folder with all of them."""
    root = tmp_path_factory.mktemp("miniatures")
    write_co3d(root / "co3d", truths)
    write_re10k(root / "re10k", truths)
    write_own(root, truths)
    return root


def command(root, kind):
    """The arguments of prepare.py for a miniature."""
    texts = ["--cameras", f"{root}/re10k/cameras", "--frames", f"{root}/re10k/frames"]
    return {"co3d": ["co3d", f"{root}/co3d"], "acid": ["acid", *texts],
            "re10k": ["re10k", *texts, "--colmap", f"{root}/re10k/models"],
            "colmap": ["colmap", f"{root}/colmap/wide", f"{root}/colmap/tall"],
            "nerfstudio": ["nerfstudio", f"{root}/nerfstudio/wide"],
            "nerfstudio without depth": ["nerfstudio", f"{root}/nerfstudio/tall"]}[kind]


KINDS = ("co3d", "re10k", "acid", "colmap", "nerfstudio", "nerfstudio without depth")


def run(arguments, out, *more):
    """`prepare.py` in this process."""
    prepare.main([*arguments, "--out", str(out), "--size", str(SIZE), "--workers", "1",
                  "--held-out", "0", *more])


@pytest.fixture(scope="module")
def made(miniatures, tmp_path_factory):
    """Folder of a kind's shards, made once."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("made") / kind
            run(command(miniatures, kind), folders[kind])
        return folders[kind]

    return folder


def reader(folder, kind):
    """data.py's reader of the training shards of a folder."""
    layout = kind if kind in ("re10k", "acid") else "co3d"
    return data.open_source(configs.Source(kind, layout, "train-*.tar", 1.0), str(folder), SIZE)


def scenes(folder, kind, truths):
    """Yields (reader, scene number, Truth) of what was made."""
    source = reader(folder, kind)
    for number in range(len(source)):
        name = source.scene(number).name.split("/")[1]
        yield source, number, truths[name]


# ---- truth

def registration(image, other, known):
    """Shift in pixels and relative zoom that bring an image (s, s) onto another: least squares."""
    down, right = np.gradient((image + other) / 2)
    places = np.arange(SIZE) + 0.5 - SIZE / 2
    across, along = np.meshgrid(places, places)
    inner = known & (abs(across) < SIZE / 2 - 3) & (abs(along) < SIZE / 2 - 3)
    slopes = np.stack([right, down, right * across + down * along], axis=-1)[inner]
    return np.linalg.lstsq(slopes, (image - other)[inner], rcond=None)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_cameras_and_fields_of_view_read_back_are_the_renderers(kind, made, truths):
    found = list(scenes(made(kind), kind, truths))
    assert len(found) == (1 if "nerfstudio" in kind else 2)
    for source, number, each in found:
        scene = source.scene(number)
        assert scene.fov == pytest.approx(2 * math.atan(each.half), rel=1e-7)
        # RealEstate10K's text has nine decimals
        unit = each.c2w[:, :3, 3].abs().max()
        assert torch.allclose(scene.c2w, each.c2w, rtol=0, atol=1e-7 * max(1, unit))


@pytest.mark.parametrize("kind", KINDS)
def test_images_lie_where_the_renderer_puts_them(kind, made, truths):
    for source, number, each in scenes(made(kind), kind, truths):
        images, _ = each.rendered()
        for view in range(VIEWS):
            found = data.images(source.image(number, view)).mean(0).numpy()
            expected = images[view].mean(0).numpy()
            # filters differ, and a photo twice as wide as high has lost detail
            assert np.sqrt(((found - expected)**2).mean()) < 0.12
            right, down, zoom = registration(found, expected, np.full(found.shape, True))
            assert max(abs(right), abs(down)) < 0.1 and abs(zoom) < 2e-3


SPARSE = ("re10k", "colmap")
WITH_DEPTH = (("co3d", 0.5), ("re10k", 0.2), ("colmap", 0.2), ("nerfstudio", 0.99))


def expected_depth(kind, each, view):
    """The depths (s, s) of a view that a format tells of: at the nearest pixels, or of points."""
    fx, fy, cx, cy = each.lens
    if kind in SPARSE:
        points, seen = observations(each)
        ids, place = seen[view]
        depth = (points @ opencv(each.c2w[view])[2, :3] + opencv(each.c2w[view])[2, 3])[ids]
        pixel = np.floor(((place[ids] - (cx, cy)) / fx / each.half + 1) / 2 * SIZE).astype(int)
        grid = np.zeros((SIZE, SIZE))
        for (column, row), z in zip(pixel, depth):
            if 0 <= column < SIZE and 0 <= row < SIZE:
                grid[row, column] = min(z, grid[row, column] or np.inf)
        return grid
    steps = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * each.half * fx
    rows, columns = np.floor(cy + steps).astype(int), np.floor(cx + steps).astype(int)
    grid = each.depths[view][np.ix_(rows, columns)].copy()
    if kind == "co3d":
        grid[:, columns < each.images.shape[2] // 3] = 0
    return grid


@pytest.mark.parametrize("kind, least", WITH_DEPTH)
def test_depths_are_those_of_the_format_and_their_unit_is_right_to_1e4(kind, least, made, truths):
    for source, number, each in scenes(made(kind), kind, truths):
        assert source.has_depth
        for view in range(VIEWS):
            found, expected = source.depth(number, view), expected_depth(kind, each, view)
            assert (expected > 0).mean() > least
            # a point on the border of two pixels may fall to either
            assert ((found > 0) != (expected > 0)).mean() < (0.02 if kind in SPARSE else 1e-9)
            known = (expected > 0) & (found > 0)
            ratio = found[known] / expected[known]
            # half floats have 11 bits, nerfstudio's words are whole millimetres
            error = np.sort(abs(ratio - 1))[:-len(ratio) // 50 if kind in SPARSE else None]
            assert error.max() < (2e-3 if kind == "nerfstudio" else 6e-4)
            assert abs(ratio[abs(ratio - 1) < 0.01].mean() - 1) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_reproject_into_other_views_as_the_renderers_do(kind, made, truths):
    for source, number, each in scenes(made(kind), kind, truths):
        scene, (_, depths) = source.scene(number), each.rendered()
        fov = 2 * math.atan(each.half)
        for view, other in ((0, 1), (0, 2), (2, 0)):
            def moved(c2w, fov, depth):
                points = unproject(c2w[view:view + 1], fov, depth[None])[0]
                return torch.stack(project(c2w[other], fov, SIZE, points)[:2], dim=-1)

            truth = moved(each.c2w, fov, depths[view])
            by_camera = moved(scene.c2w, scene.fov, depths[view])
            near = (truth - SIZE / 2).abs().amax(-1) < SIZE
            assert (by_camera - truth).norm(dim=-1)[near].max() < 1e-3
            if source.has_depth:
                stored = torch.from_numpy(source.depth(number, view))
                error = (moved(scene.c2w, scene.fov, stored) - truth).norm(dim=-1)[stored > 0]
                # beside an edge the nearest pixel or point may lie across it
                assert error.median() < 0.1 and error.quantile(0.8) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_references_rules_read_the_shards(kind, made, truths):
    for path in made(kind).glob("train-*.tar"):
        for name, frames in read_shard(path).items():
            each = truths[name.split("/")[1]]
            assert sorted(frames) == list(range(1, VIEWS + 1))
            for i, (image, _, c2w, fov) in frames.items():
                assert image.shape == (SIZE, SIZE, 3)
                assert np.allclose(c2w, each.c2w[i - 1], atol=1e-7 * max(1, each.scene.unit))
                assert fov == pytest.approx(2 * math.atan(each.half), rel=1e-7)


def test_every_format_trains(made, tmp_path):
    sources = []
    for kind in ("co3d", "re10k", "acid", "colmap", "nerfstudio"):
        layout = kind if kind in ("re10k", "acid") else "co3d"
        sources.append(configs.Source(kind, layout, f"{made(kind)}/train-*.tar", 0.2,
                                      f"{made(kind)}/train-*.tar"))
    config = tmp_path / "mix.py"
    config.write_text(
        f"from configs import Config, Source\nconfig = Config(sources={tuple(sources)!r},\n"
        f"data='/', latent='pixels', prediction='z', image_size={SIZE}, model_channels=8,\n"
        "channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,), num_heads=1,\n"
        "norm_groups=8, context_dim=8, mode='7dof', steps=2, batch_size=10, micro_batch=10,\n"
        "warmup_steps=0, device='cpu', precision='fp32', workers=0, log_every=1, eval_pairs=2,\n"
        "sample_steps=1, guidance=1.0, eta=0.0,\n"
        f"out={str(tmp_path / 'out')!r})\n")
    train.main([str(config)])
    lines = [json.loads(line) for line in
             (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()


# ---- one camera for a scene

LENS = (0.9, 1.2, 0.5, 0.5)


def view(photo, lens=LENS, size=(1, 1), **more):
    """A View by a pinhole of fx, fy, cx, cy in shares of its image's sides."""
    params = tuple(np.array(lens) * (size * 2))
    return resample.View("here", Path(photo), np.eye(4), Lens("PINHOLE", *size, params), **more)


def pixels(photo, lens=LENS, camera=(1, 1), **more):
    """What `square` makes of an image file, taken by a camera of that size."""
    for each, picture in resample.pictures([view(photo, lens, size=camera, **more)]):
        return resample.square(each, picture, resample.extent(each.lens), SIZE)


def test_all_views_of_a_scene_get_the_narrowest_field_of_view():
    lenses = [(1.0, 1.0, 0.5, 0.5), (0.8, 0.8, 0.5, 0.5), (1.0, 1.0, 0.4, 0.5)]
    views, half, out = resample.one_camera([view("a", lens) for lens in lenses])
    assert len(views) == 3 and not out and half == pytest.approx(0.4)


def test_views_far_narrower_than_the_scene_are_left_out():
    lenses = [(1.0, 1.0, 0.5, 0.5)] * 3 + [(2.1, 2.1, 0.5, 0.5)]
    views, half, out = resample.one_camera([view("a", lens) for lens in lenses])
    assert len(views) == 3 and half == 0.5
    assert [err.reason for err in out] == ["the field of view is far narrower than the scene's"]


@pytest.mark.parametrize("lens, turn, reason", [
    ((1.0, math.nan, 0.5, 0.5), 1.0, "no focal length"),
    ((1.0, -1.0, 0.5, 0.5), 1.0, "no focal length"),
    ((1.0, 1.0, 1.5, 0.5), 1.0, "no focal length, or principal point in the image, of a camera"),
    (LENS, math.inf, "the camera holds numbers that are not finite"),
    (LENS, 1.1, "the camera is not rigid"),
    (LENS, -1.0, "the camera mirrors"),
])
def test_cameras_that_cannot_be_are_left_out_with_the_reason(lens, turn, reason):
    bad = resample.View("there", Path("b"), np.diag([turn, 1.0, 1.0, 1.0]),
                        Lens("PINHOLE", 1, 1, lens))
    views, _, out = resample.one_camera([view("a"), bad])
    assert len(views) == 1 and len(out) == 1
    assert out[0].where == "there" and out[0].reason.startswith(reason)


def ramp(width, height):
    """An image whose red and green tell the column and row, in 256ths of its sides."""
    column, row = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    image = np.stack([column * 255, row * 255, 0 * row], axis=-1)
    return Image.fromarray(image.round().astype(np.uint8))


@pytest.mark.parametrize("suffix, width, height", [("png", 300, 200), ("jpg", 1203, 801),
                                                   ("jpg", 801, 1203), ("png", 40, 30)])
def test_every_pixel_shows_what_its_ray_meets(suffix, width, height, tmp_path):
    # large JPEGs are shrunk while they are decoded, small images are enlarged
    photo = tmp_path / f"a.{suffix}"
    ramp(width, height).save(photo, **({"quality": 98} if suffix == "jpg" else {}))
    lens = (0.8, 1.1, 0.53, 0.46)
    half = resample.extent(view(photo, lens).lens)
    found, depth = pixels(photo, lens)
    assert depth is None
    slope = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * half
    inner = slice(8, -8)            # the filter sees beyond the image's edge
    # half a level, and JPEG's loss
    close = dict(rtol=0, atol=1.0 if suffix == "png" else 1.6)
    assert np.allclose(found[inner, inner, 0], (255 * (0.53 + slope * 0.8))[None, inner], **close)
    assert np.allclose(found[inner, inner, 1], (255 * (0.46 + slope * 1.1))[inner, None], **close)
    error = found[inner, inner, 0].astype(float) - (255 * (0.53 + slope * 0.8))[None, inner]
    # a third of a level is 0.1 pixels here
    assert abs(error.mean()) < 0.35


def test_fine_detail_is_averaged_not_picked(tmp_path):
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "a.png")
    found, _ = pixels(tmp_path / "a.png", (1.0, 1.0, 0.5, 0.5))
    assert abs(found[4:-4, 4:-4].astype(float) - 127.5).max() < 3


def test_a_photo_of_which_pillow_says_something_else_is_left_out_with_its_name(tmp_path):
    """More compressed text than Pillow takes is a ValueError, and at the opening."""
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=info)
    (_, found), = resample.pictures([view(tmp_path / "a.png")])
    assert found.reason == "image cannot be decoded" and "too large" in found.detail
    with pytest.raises(resample.LeftOut, match="image cannot be decoded"):
        own.nerfstudio_view(tmp_path, False, {"file_path": "a"})


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_cut_photo_is_left_out_with_its_name(suffix, miniatures, tmp_path):
    root = copied(miniatures, "colmap", tmp_path) / "wide"
    path = root / "images/left/001 a.png"
    image = Image.open(path).convert("RGB")
    image.save(tmp_path / f"b.{suffix}")
    path.write_bytes((tmp_path / f"b.{suffix}").read_bytes()[:-800])
    run(["colmap", str(root)], tmp_path / "out")
    report = json.loads((tmp_path / "out/train-000000.json").read_text())
    assert report["views"] == VIEWS - 1
    assert [each[:2] for each in report["left_out"]] == [["image cannot be decoded", str(path)]]


def test_orientation_tags_are_not_obeyed(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    ramp(300, 200).save(tmp_path / "a.png", exif=tags)
    ramp(300, 200).save(tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png")[0], pixels(tmp_path / "b.png")[0])


def test_transparency_is_laid_over_white_and_16_bits_are_refused(tmp_path):
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png", (1.0, 1.0, 0.5, 0.5))[0] == 255).all()
    Image.fromarray(np.full((80, 80), 700, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(resample.LeftOut, match="more than 8 bits"):
        pixels(tmp_path / "b.png", (1.0, 1.0, 0.5, 0.5))


def test_a_photo_may_be_smaller_than_its_camera_says_but_not_of_another_shape(tmp_path):
    ramp(200, 300).save(tmp_path / "a.png")
    pixels(tmp_path / "a.png", camera=(801, 1200))
    with pytest.raises(resample.LeftOut, match="shape is not its camera's .200x300, 300x200"):
        pixels(tmp_path / "a.png", camera=(300, 200))


def test_of_several_points_in_a_pixel_the_nearest_counts(tmp_path):
    place = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.5], [-0.1, 0.5]] + [[0.2, 0.2]] * 3)
    depth = np.array([3.0, 2.0, 1.0, 1.0, 5.0, 5.0, 5.0])
    points = view("a", (1.0, 1.0, 0.5, 0.5), depth=resample.Points(place, depth))
    found = resample.points_depth(points, 0.5, 10)
    assert np.count_nonzero(found) == 3
    assert (found[5, 5], found[5, 9], found[2, 2]) == (2, 1, 5)


def test_views_with_hardly_any_known_depth_are_left_out(tmp_path):
    ramp(80, 80).save(tmp_path / "a.png")
    for count in (15, 16):
        place = (np.stack(np.divmod(np.arange(count), 4), axis=1) + 0.5) / 8
        depth = resample.Points(place, np.ones(count))
        if count == 16:
            assert np.count_nonzero(pixels(tmp_path / "a.png", depth=depth, lens=(1, 1, .5, .5))[1])
            continue
        with pytest.raises(resample.LeftOut, match="fewer than 16 pixels of known depth"):
            pixels(tmp_path / "a.png", depth=depth, lens=(1, 1, .5, .5))


# ---- formats

def copied(miniatures, kind, tmp_path):
    """A copy of a miniature, to be damaged."""
    shutil.copytree(miniatures / kind, tmp_path / kind)
    return tmp_path / kind


def left_out(out):
    """{reason: count} of the reports beside the shards."""
    reports = [json.loads(path.read_text()) for path in sorted(out.glob("*-0*.json"))]
    return Counter(reason for each in reports for reason, _, _ in each["left_out"])


def stopped(arguments, out, capsys, *more):
    """The one line with which prepare.py ends."""
    with pytest.raises(SystemExit) as stop:
        command_line.run("prepare.py", run, arguments, out, *more)
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in error
    return lines[0]


def test_co3d_sequences_below_the_quality_or_without_images_are_passed_over(made, miniatures,
                                                                           tmp_path, capsys):
    assert len(reader(made("co3d"), "co3d")) == 2
    run(command(miniatures, "co3d"), tmp_path / "out", "--dry-run")
    printed = capsys.readouterr().out
    assert "1 sequences with a viewpoint quality below 0.5, or none" in printed
    assert "1 sequences whose images are not there" in printed
    run(command(miniatures, "co3d"), tmp_path / "out", "--dry-run", "--quality", "0.1")
    assert "quality" not in capsys.readouterr().out


def test_co3d_categories_are_chosen_by_name(miniatures, tmp_path, capsys):
    run([*command(miniatures, "co3d"), "--categories", "toy"], tmp_path / "out")
    line = stopped([*command(miniatures, "co3d"), "--categories", "pear"], tmp_path / "b", capsys)
    assert "pear/frame_annotations.jgz is missing; categories that have it: toy" in line


def test_the_words_of_co3d_depth_come_through_unchanged(made, miniatures):
    name = "toy/wide/frame000002"
    with tarfile.open(made("co3d") / "train-000000.tar") as tar:
        stored = np.asarray(Image.open(tar.extractfile(f"{name}_depth.png")))
        metadata = json.loads(tar.extractfile(f"{name}_metadata.json").read())
    source = miniatures / "co3d/toy/wide/depths/frame000002.jpg.geometric.png"
    assert metadata["scale_adjustment"] == SCALES[0]
    assert set(np.unique(stored)) <= {0, *np.unique(np.asarray(Image.open(source)))}


def test_damaged_co3d_frames_are_left_out_and_counted(miniatures, tmp_path):
    root = copied(miniatures, "co3d", tmp_path)
    frames = annotations(root)
    views = range(VIEWS, 2 * VIEWS)             # of the second sequence
    more = [json.loads(json.dumps(frames[VIEWS])) for _ in range(10)]
    more[0]["viewpoint"]["R"][1][1] = math.nan
    more[1]["viewpoint"]["intrinsics_format"] = "screen"
    more[2]["viewpoint"] = None
    more[3]["depth"] = None
    more[4]["image"]["path"] = "toy/tall/images/frame000099.jpg"
    more[5]["depth"]["scale_adjustment"] = "big"
    more[6]["depth"]["path"] = "toy/tall/depths/frame000099.png"
    more[7]["image"]["size"] = [0, 0]
    for i, frame in enumerate(more):
        frame["frame_number"] = 100 + i
    more[8] |= {"frame_number": None, "viewpoint": None}
    more[9]["sequence_name"] = ["no", "name"]       # nobody's
    sequences = [{"sequence_name": name, "viewpoint_quality_score": 1} for name in ("wide", "tall")]
    annotate(root, frames + more, sequences)
    run(["co3d", str(root)], tmp_path / "out")
    assert left_out(tmp_path / "out") == {
        "the camera holds numbers that are not finite": 1, "the annotation cannot be used": 5,
        "no depth": 1, "missing image": 1, "missing depth": 1}
    assert reader(tmp_path / "out", "co3d").counts.tolist() == [len(views), VIEWS]


def test_depth_can_be_left_out(miniatures, tmp_path):
    run([*command(miniatures, "co3d"), "--no-depth"], tmp_path / "out")
    source = reader(tmp_path / "out", "co3d")
    assert not source.has_depth and source.counts.tolist() == [VIEWS, VIEWS]
    assert not source.depth(0, 0).any()
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:       # for the original's reader
        depths = [name for name in tar.getnames() if name.endswith("_depth.png")]
        assert len(depths) == 2 * VIEWS
        assert not np.asarray(Image.open(tar.extractfile(depths[0]))).any()


@pytest.mark.parametrize("name", ["frame_annotations.jgz", "sequence_annotations.jgz"])
@pytest.mark.parametrize("damage", ["missing", "cut", "no list"])
def test_annotations_that_are_missing_or_damaged_stop_with_their_name(name, damage, miniatures,
                                                                      tmp_path, capsys):
    path = copied(miniatures, "co3d", tmp_path) / "toy" / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        path.write_bytes(gzip.compress(b'{"a": 1}', mtime=0))
    line = stopped(["co3d", str(tmp_path / "co3d")], tmp_path / "out", capsys)
    assert name in line
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_clips_without_frames_are_passed_over_and_missing_frames_are_counted(miniatures, tmp_path,
                                                                            capsys):
    root = copied(miniatures, "re10k", tmp_path)
    next((root / "frames/wide").iterdir()).unlink()
    text = root / "cameras/tall.txt"
    lines = text.read_text().splitlines()
    row = lines[1].split()
    row[0], row[10] = str(5_000_000 + 9 * STEP), "nan"
    bent = lines[1].split()
    bent[5] = "0.01"
    bent[0] = str(5_000_000 + 8 * STEP)
    rows = [" ".join(each) for each in (row, bent)]
    text.write_text("\n".join([lines[0], *rows, *lines[1:]]) + "\n")
    (root / "cameras/absent.txt").write_text(" ".join(["link\nnan", *bent[1:]]))
    (root / "frames/absent").mkdir()
    run(["re10k", "--cameras", f"{root}/cameras", "--frames", f"{root}/frames"], tmp_path / "out")
    assert left_out(tmp_path / "out") == {"missing image": 1, "the lens is distorted": 1,
                                          "the camera text is damaged": 1,
                                          "the camera holds numbers that are not finite": 1}
    assert sorted(reader(tmp_path / "out", "re10k").counts.tolist()) == [VIEWS - 1, VIEWS]


def test_a_clip_counts_as_many_views_as_its_text_has_cameras(miniatures):
    root = miniatures / "re10k"
    found, out = datasets.find_re10k("acid", root / "cameras", root / "frames", "", "")
    assert out == {"clips without a folder of frames": 1}
    assert [(each.name, each.count) for each in found] == [("acid/tall", VIEWS),
                                                           ("acid/wide", VIEWS)]


def test_lens_distortion_needs_pycolmap(truths, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resample, "pycolmap", lambda: None)
    names = [f"{i}.png" for i in range(VIEWS)]
    write_colmap(tmp_path / "garden/sparse/0", truths["wide"], ".bin", names, model="OPENCV")
    (tmp_path / "garden/images").mkdir()
    line = stopped(["colmap", str(tmp_path / "garden")], tmp_path / "out", capsys)
    assert "lens distortion is undone by pycolmap" in line and "(OPENCV)" in line
    assert "pip install pycolmap" in line
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("number, width, says", [
    (1, 0, "camera 7 has images of 0 x"), (99, 64, "camera 7 is model 99 with 0 parameters; these")])
def test_a_camera_that_cannot_be_is_refused(number, width, says, tmp_path):
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 7, number, width, 64,
                                                       *(50.0, 50.0, 32.0, 32.0)))
    with pytest.raises(ValueError, match=says):
        colmap.read_lenses(tmp_path / "cameras.bin")


@pytest.mark.parametrize("name", ["images.bin", "points3D.bin", "cameras.bin"])
def test_a_cut_colmap_file_is_named(name, miniatures, tmp_path, capsys):
    path = copied(miniatures, "colmap", tmp_path) / "wide/sparse/0" / name
    path.write_bytes(path.read_bytes()[:-5])
    line = stopped(["colmap", f"{tmp_path}/colmap/wide"], tmp_path / "out", capsys)
    assert f"{name}: the file is cut, at byte" in line


def test_binary_and_text_models_of_colmap_say_the_same(truths, tmp_path):
    names = [f"{i}.png" for i in range(VIEWS)]
    for kind in (".bin", ".txt"):
        write_colmap(tmp_path / kind, truths["wide"], kind, names)
    binary, text = colmap.read_model(tmp_path / ".bin"), colmap.read_model(tmp_path / ".txt")
    assert [image.name for image in binary.images] == names and binary.lenses == text.lenses
    for one, two in zip(binary.images, text.images, strict=True):
        assert one.camera == two.camera and np.array_equal(one.w2c, two.w2c)
        (place, depth), (same_place, same_depth) = (binary.sparse_depth(one),
                                                    text.sparse_depth(two))
        assert np.array_equal(place, same_place) and len(place) > 100
        assert np.allclose(depth, same_depth, rtol=1e-14)


def test_of_several_colmap_models_that_of_most_images_is_taken(miniatures, tmp_path, capsys):
    root = copied(miniatures, "colmap", tmp_path)
    shutil.copytree(root / "wide/sparse/0", root / "wide/sparse/1")
    path = root / "wide/sparse/0/images.bin"
    path.write_bytes(struct.pack("<Q", VIEWS - 1) + path.read_bytes()[8:])
    found, passed_over = own.find_colmap([root / "wide"], "images", True)
    assert found[0].count == VIEWS and passed_over == {"smaller models of the same scene": 1}


def test_nerfstudio_frames_may_have_their_own_lens_or_an_angle(miniatures, tmp_path, truths):
    root = copied(miniatures, "nerfstudio", tmp_path)
    path = root / "tall/transforms.json"
    stored = json.loads(path.read_text())
    h, w = truths["tall"].images.shape[1:3]
    for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
        del stored[key]
    stored["camera_angle_x"] = 2 * math.atan(w / 2 / FOCAL)
    for frame in stored["frames"]:
        frame["file_path"] = frame["file_path"].removesuffix(".png")
    path.write_text(json.dumps(stored))
    views, out = own.read_nerfstudio(path, True)
    assert not out and len(views) == VIEWS
    assert views[0].lens.intrinsics == pytest.approx((FOCAL / w, FOCAL / h, 0.5, 0.5))
    stored |= {"fl_x": 99.0, "w": 90, "h": 90}
    stored["frames"][1] |= {"fl_x": 50.0, "w": 100, "h": 80, "cx": 40.0}
    path.write_text(json.dumps(stored))
    views, _ = own.read_nerfstudio(path, True)
    assert views[1].lens.intrinsics == pytest.approx((0.5, 0.625, 0.4, 0.5))
    stored |= {"camera_model": "RADIAL", "k1": 0.0, "distortion_params": [0.0] * 6}
    stored["frames"][0]["w"] = 0
    path.write_text(json.dumps(stored))
    views, out = own.read_nerfstudio(path, True)
    assert len(views) == VIEWS - 1 and out[0].reason == "a frame of transforms.json cannot be used"
    assert "w is '0', it must be a number between 0" in out[0].detail


@pytest.mark.parametrize("written, named", [("r.000.png", "r.000"), ("0.jpg", "0"),
                                            ("0.JPG", "0.JPG"), ("0.png", "1")])
def test_nerfstudio_paths_may_leave_the_suffix_out(written, named, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / written)
    frame = {"file_path": named, "transform_matrix": np.eye(4).tolist(), "camera_angle_x": 1.0}
    if Path(written).stem == "0" and named == "1":
        with pytest.raises(resample.LeftOut, match="missing image"):
            own.nerfstudio_view(tmp_path, False, frame)
    else:
        assert own.nerfstudio_view(tmp_path, False, frame).photo == tmp_path / written


@pytest.mark.parametrize("change, model", [
    ({"k1": 0.1}, "FULL_OPENCV"), ({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE"),
    ({"distortion_params": [0.1, 0, 0, 0, 0, 0]}, "FULL_OPENCV"),
    ({"is_fisheye": True}, "OPENCV_FISHEYE")])
def test_a_distorted_lens_of_a_transforms_json_is_known(change, model, miniatures):
    frames = [frame | change for frame in
              cameras.read_transforms(miniatures / "nerfstudio/wide/transforms.json")]
    assert all(lens.model == model and lens.distorted
               for lens in map(cameras.transforms_lens, frames))


# ---- videos

FAKE_FFMPEG = """#!{python}
import json, re, sys
arguments = sys.argv[1:]
if sys.argv[0].endswith("ffprobe"):
    times = open(arguments[-1]).read().split("\\n")[1].split()
    packets = [dict(pts_time="%f" % (int(t) / 1e6), flags="K__") for t in times]
    sys.exit(print(json.dumps(dict(packets=packets, format=dict(start_time="0.000000")))))
start = float(arguments[arguments.index("-ss") + 1])
first = [float(t) for t in re.findall(r"between\\(t,([\\d.]+)", " ".join(arguments))]
video = arguments[arguments.index("-i") + 1]
folder, times = open(video).read().split("\\n")
known = [int(t) for t in times.split()]
for t in first:
    at = min((k for k in known if k / 1e6 >= start + t), default=None)
    if at is None:
        sys.exit("no such frame")
    sys.stdout.buffer.write(open(folder + "/" + str(at) + ".ppm", "rb").read())
"""


@pytest.fixture
def videos(miniatures, tmp_path, monkeypatch):
    """A folder of "videos", and an ffmpeg on the path that gives their frames."""
    (tmp_path / "bin").mkdir()
    for name in ("ffmpeg", "ffprobe"):
        program = tmp_path / "bin" / name
        program.write_text(FAKE_FFMPEG.replace("{python}", sys.executable))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "videos").mkdir()
    for name in ("wide", "tall"):
        folder, times = tmp_path / name, []
        folder.mkdir()
        for path in sorted((miniatures / "re10k/frames" / name).iterdir()):
            Image.open(path).save(folder / f"{path.stem}.ppm")
            times.append(path.stem)
        (tmp_path / f"videos/video_{name}.mp4").write_text(f"{folder}\n{' '.join(times)}")
    return tmp_path / "videos"


@pytest.mark.skipif(os.name == "nt", reason="a script stands for ffmpeg")
def test_videos_give_what_their_frames_give(videos, miniatures, tmp_path):
    cameras = ["re10k", "--cameras", f"{miniatures}/re10k/cameras"]
    run([*cameras, "--videos", str(videos)], tmp_path / "a")
    run([*cameras, "--frames", f"{miniatures}/re10k/frames"], tmp_path / "b")
    assert ((tmp_path / "a/train-000000.tar").read_bytes()
            == (tmp_path / "b/train-000000.tar").read_bytes())


@pytest.mark.skipif(os.name == "nt", reason="a script stands for ffmpeg")
def test_a_frame_that_a_video_lacks_is_left_out(videos, miniatures, tmp_path):
    path = videos / "video_tall.mp4"
    path.write_text(path.read_text().rsplit(" ", 1)[0])
    run(["re10k", "--cameras", f"{miniatures}/re10k/cameras", "--videos", str(videos)],
        tmp_path / "a")
    report = json.loads((tmp_path / "a/train-000000.json").read_text())
    assert report["views"] == 2 * VIEWS - 1
    assert report["left_out"] == [["no frame of the video at its listed time",
                                   f"{path}: {5 + 2 * STEP / 1e6:.6f} s", ""]]


def test_videos_without_ffmpeg_are_refused_in_a_line(miniatures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = stopped(["re10k", "--cameras", f"{miniatures}/re10k/cameras", "--videos", str(tmp_path)],
                   tmp_path / "out", capsys)
    assert "--videos needs ffmpeg, which is not found" in line


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_frames_come_from_a_real_video_at_their_times(tmp_path):
    levels = [20 + 8 * i for i in range(25)] * 6
    frames = b"".join(np.full((48, 64, 3), level, np.uint8).tobytes() for level in levels)
    video = tmp_path / "a.mp4"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48",
                    "-r", "10", "-i", "-", "-c:v", "mpeg4", "-q:v", "2", str(video)], input=frames,
                   check=True)
    wanted = [0, 3, 4, 17, 24]
    found = [np.asarray(picture).mean() for picture in
             resample.video_frames(video, [i / 10 for i in wanted])]
    assert np.allclose(found, [levels[i] for i in wanted], atol=3)
    # 20 ms early and late; then none within 25 ms; two for one frame, the nearer of which has it
    found = list(resample.video_frames(video, [0.28, 0.52, 0.65, 1.0, 1.01, 99.0]))
    assert [type(each).__name__ for each in found[2:]] == ["LeftOut", "Image", "LeftOut", "LeftOut"]
    assert np.allclose([np.asarray(found[i]).mean() for i in (0, 1, 3)],
                       [levels[3], levels[5], levels[10]], atol=3)
    # a sum of 150 terms, of which ffmpeg's parser takes a hundred, has to nest
    assert len(list(resample.selected(video, resample.frame_times(video)))) == 150


# ---- splits, shards, resuming

@pytest.fixture(scope="module")
def many(miniatures, tmp_path_factory):
    """Twelve nerfstudio captures that show the same."""
    root = tmp_path_factory.mktemp("many")
    for i in range(12):
        shutil.copytree(miniatures / "nerfstudio/wide", root / f"scene{i:02d}")
    return ["nerfstudio", *map(str, sorted(root.iterdir()))]


def names(out, split):
    """The scenes of a split, as stored."""
    found = []
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            found += dict.fromkeys(name.split("/")[1] for name in tar.getnames())
    return found


def test_a_split_is_by_scene_and_seeded_and_a_subset_keeps_it(many, tmp_path):
    small = ["--size", "8", "--views", "2", "--workers", "1"]
    prepare.main([*many, "--out", str(tmp_path / "a"), "--held-out", "4", *small])
    prepare.main([*many, "--out", str(tmp_path / "b"), "--held-out", "4", "--scenes", "3", *small])
    prepare.main([*many, "--out", str(tmp_path / "c"), "--held-out", "4", "--seed", "1", *small])
    train, held_out = names(tmp_path / "a", "train"), names(tmp_path / "a", "held-out")
    assert len(train) == 8 and len(held_out) == 4 and not set(train) & set(held_out)
    assert names(tmp_path / "b", "held-out") == held_out
    subset = names(tmp_path / "b", "train")
    assert len(subset) == 3 and set(subset) <= set(train)
    assert names(tmp_path / "c", "held-out") != held_out


def test_a_twentieth_of_the_scenes_is_held_out_unless_told_and_nothing_of_three_views(many, tmp_path):
    small = ["--size", "8", "--views", "2", "--workers", "1"]
    prepare.main([*many, "--out", str(tmp_path / "a"), *small])
    assert len(names(tmp_path / "a", "held-out")) == 1 and len(names(tmp_path / "a", "train")) == 11
    prepare.main([*many[:2], "--out", str(tmp_path / "b"), *small])
    assert not names(tmp_path / "b", "held-out") and len(names(tmp_path / "b", "train")) == 1


def test_shards_are_about_the_size_asked_for_and_the_bytes_do_not_depend_on_workers(many, tmp_path):
    # 32 * 32 * 2.8 bytes a view, three views a scene: two scenes fit
    for out, workers in (("a", "1"), ("b", "2")):
        prepare.main([*many, "--out", str(tmp_path / out), "--size", "32", "--held-out", "0",
                      "--shard-size", "0.00002", "--workers", workers])
    shards = sorted((tmp_path / "a").glob("*.tar"))
    assert len(shards) == 6
    for path in [*shards, *(path.with_suffix(".json") for path in shards)]:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.suffix == ".json" or path.stat().st_size < 60_000      # blocks of 512 bytes


def test_a_run_goes_on_where_it_stopped(many, tmp_path, capsys):
    arguments = [*many, "--out", str(tmp_path / "a"), "--size", "16", "--held-out", "2",
                 "--shard-size", "0.000005", "--workers", "1"]
    prepare.main(arguments)
    shards = sorted((tmp_path / "a").glob("*.tar"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[1].unlink()
    prepare.main(arguments)
    assert {path: path.read_bytes() for path in shards} == {k: v[0] for k, v in before.items()}
    assert all(path.stat().st_mtime_ns == before[path][1] for path in shards if path != shards[1])
    shards[0].with_suffix(".json").unlink()
    prepare.main(arguments)
    assert shards[0].with_suffix(".json").is_file()
    capsys.readouterr()
    prepare.main(arguments)
    assert "all of them were there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="views 0 there, 2 now"):
        prepare.main([*arguments[:-2], "--views", "2"])
    with pytest.raises(ValueError, match="12 scenes .list"):
        prepare.main(["nerfstudio", *arguments[2:]])


def test_a_dry_run_writes_nothing_and_says_how_much(many, tmp_path, capsys):
    prepare.main([*many, "--out", str(tmp_path / "a"), "--held-out", "2", "--dry-run"])
    printed = capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    assert "train-*.tar: 1 shards, 10 scenes, 30 views, about 0.00551 GB" in printed
    assert "held-out-*.tar: 1 shards, 2 scenes, 6 views" in printed


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_full_disk_stops_with_the_file_s_name_and_a_rerun_goes_on(many, tmp_path, capsys,
                                                                    monkeypatch):
    def full(descriptor):
        if "train-000000.tar" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = [*many, "--out", str(tmp_path / "a"), "--size", "16", "--held-out", "2",
                 "--workers", "1"]
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", full)
        command_line.run("prepare.py", prepare.main, arguments)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "No space left on device" in line and "a/train-000000.tar" in line
    assert not list((tmp_path / "a").glob("train*.tar*"))
    prepare.main(arguments)
    assert len(names(tmp_path / "a", "train")) == 10


def test_captures_of_which_nothing_is_left_end_the_run(miniatures, tmp_path, capsys):
    root = copied(miniatures, "re10k", tmp_path)
    for path in (root / "frames").glob("*/*"):
        path.unlink()
    line = stopped(["re10k", "--cameras", f"{root}/cameras", "--frames", f"{root}/frames"],
                   tmp_path / "out", capsys)
    assert "none of the 2 scenes can be used" in line and "missing image" in line
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_other_photos_under_the_same_options_are_refused(miniatures, tmp_path, capsys):
    root = copied(miniatures, "colmap", tmp_path)
    shutil.copytree(root / "wide/images", root / "wide/images_2")
    arguments, out = ["colmap", str(root / "wide")], tmp_path / "out"
    run(arguments, out)
    assert "images images there, images_2 now" in stopped([*arguments, "--images", "images_2"],
                                                          out, capsys)
    shutil.copytree(root / "wide", tmp_path / "other/wide")
    line = stopped(["colmap", str(tmp_path / "other/wide")], out, capsys)
    assert f"folders ['{root}/wide'] there, ['{tmp_path}/other/wide'] now" in line


def test_two_scenes_of_one_name_are_refused(miniatures, tmp_path, capsys):
    root = copied(miniatures, "nerfstudio", tmp_path)
    line = stopped(["nerfstudio", f"{root}/wide", f"{miniatures}/nerfstudio/wide"],
                   tmp_path / "out", capsys)
    assert "two scenes are called nerfstudio/wide" in line


@pytest.mark.parametrize("more, says", [
    (["--views", "1"], "--views 1: a pair needs two"),
    (["--size", "4"], "--size: 4 is not possible, only numbers from 8"),
    (["--shard-size", "0"], "--shard-size: 0 is not possible, only numbers above 0"),
    (["--held-out", "2"], "2 scenes found, of which --held-out 2 leaves none"),
])
def test_options_out_of_range_are_refused(more, says, miniatures, tmp_path, capsys):
    assert says in stopped(command(miniatures, "colmap"), tmp_path / "out", capsys, *more)


@pytest.mark.parametrize("arguments, says", [
    (["co3d", "NOWHERE"], "NOWHERE: no folder in it has a frame_annotations.jgz"),
    (["re10k", "--cameras", "NOWHERE", "--frames", "x"], "NOWHERE: no camera text"),
    (["colmap", "NOWHERE"], "NOWHERE: no COLMAP model"),
    (["nerfstudio", "NOWHERE"], "NOWHERE"),
])
def test_folders_that_are_not_there_are_named(arguments, says, tmp_path, capsys):
    arguments = [each.replace("NOWHERE", str(tmp_path / "none")) for each in arguments]
    line = stopped(arguments, tmp_path / "out", capsys)
    assert says.replace("NOWHERE", str(tmp_path / "none")) in line
    assert not (tmp_path / "out").exists()


def test_png_files_are_written_no_slower_than_by_pillow(truths):
    image = np.ascontiguousarray(np.tile(truths["wide"].images[0], (3, 2, 1))[:256, :256])

    def by_pillow():
        Image.fromarray(image).save(io.BytesIO(), "PNG")

    def seconds(function):
        return min(timeit.repeat(function, number=5, repeat=7))

    assert seconds(lambda: writer.png_bytes(image)) < seconds(by_pillow)
