"""prepare.py and synth.py: scenes with exact cameras and depth, and shards that say so."""

import io
import itertools
import json
import math
import multiprocessing
import re
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

import prepare
from captures import make, solids, synth, writer
from runtime import command, files

SIZE = 48
VIEWS = 4
MOTION = 0.4        # the default of prepare.py synth


@pytest.fixture(scope="module")
def rendered():
    """Ten scenes: (scene, c2w, images, depths)."""
    made = []
    for number in range(10):
        scene = synth.scene(3, number)
        c2w = synth.cameras(scene, VIEWS)
        made.append((scene, c2w, *synth.render(scene, c2w, scene.fov, SIZE)))
    return made


def unproject(c2w, fov, depth):
    """World points (v, h, h, 3) of z-depths at the pixels' centres, by OpenGL cameras."""
    size = depth.shape[-1]
    slope = 2 * math.tan(fov / 2) / size * (torch.arange(size).double() + 0.5 - size / 2)
    right, down = torch.meshgrid(slope, slope, indexing="xy")
    rays = torch.stack([right, -down, -torch.ones_like(right)], dim=-1)
    points = rays * depth.double()[..., None]
    return torch.einsum("vij,vhwj->vhwi", c2w[:, :3, :3], points) + c2w[:, None, None, :3, 3]


def project(c2w, fov, size, points):
    """Columns, rows and z-depths of world points (..., 3) in one view, in pixels."""
    x, y, z = ((points - c2w[:3, 3]) @ c2w[:3, :3]).unbind(-1)
    focal = size / 2 / math.tan(fov / 2)
    return size / 2 + focal * x / -z, size / 2 - focal * y / -z, -z


def reproject(scene, c2w, images, depths):
    """Every view's points in every other view: (seen, color, shared).

    seen: the share of those inside the other's frame that have the depth it sees there; color: the
    median colour difference of these; shared (v, v): the share of a view that another sees.
    """
    points = unproject(c2w, scene.fov, depths)
    seen, colors, shared = [], [torch.zeros(0)], torch.ones(VIEWS, VIEWS)
    for i, j in itertools.permutations(range(VIEWS), 2):
        known = depths[i] > 0
        u, v, z = [x[known] for x in project(c2w[j], scene.fov, SIZE, points[i])]
        inside = (z > 0) & (u >= 0) & (v >= 0) & (u < SIZE) & (v < SIZE)
        column, line = u[inside].long(), v[inside].long()
        # 5% of the depth: the pixel's centre lies elsewhere on a slope
        near = (depths[j][line, column] - z[inside]).abs() < 0.05 * z[inside]
        seen.append(near.sum() / max(1, inside.sum()))
        shared[i, j] = near.sum() / max(1, known.sum())
        ours = images[i][:, known][:, inside][:, near]
        colors.append((images[j][:, line, column][:, near] - ours).abs().mean(0))
    return float(torch.stack(seen).mean()), float(torch.cat(colors).median()), shared


def agrees(scenes):
    """Whether points keep depth and colour from view to view, but for what is hidden, and edges."""
    seen, color, _ = zip(*[reproject(*each) for each in scenes])
    return np.mean(seen) > 0.75 and np.mean(color) < 0.025


def test_a_pixel_projects_into_other_views_at_its_depth_and_with_its_colour(rendered):
    assert agrees(rendered)


def opencv_axes(scene, c2w, images, depths):
    return scene, c2w * torch.tensor([1.0, -1, -1, 1]), images, depths


def inverse(scene, c2w, images, depths):
    return scene, torch.linalg.inv(c2w), images, depths


def negated_position(scene, c2w, images, depths):
    return scene, torch.cat([c2w[..., :3], c2w[..., 3:] * -1], dim=-1), images, depths


def distance_for_depth(scene, c2w, images, depths):
    rays = unproject(torch.eye(4).double()[None], scene.fov, torch.ones(1, SIZE, SIZE))
    return scene, c2w, images, depths * rays.norm(dim=-1).float()


def mirrored_depth(scene, c2w, images, depths):
    return scene, c2w, images, depths.flip(-1)


def mirrored_image(scene, c2w, images, depths):
    return scene, c2w, images.flip(-1), depths


def another_fov(scene, c2w, images, depths):
    return replace(scene, fov=1.25 * scene.fov), c2w, images, depths


@pytest.mark.parametrize("wrong", [opencv_axes, inverse, negated_position, distance_for_depth,
                                   mirrored_depth, mirrored_image, another_fov])
def test_reprojection_fails_for_a_wrong_convention(rendered, wrong):
    assert not agrees([wrong(*each) for each in rendered])


def distance(scene, points):
    """Distance (...) of inner points (..., 3) to the nearest surface, or less; negative within."""
    nearest = points[..., 2]
    nearest = np.minimum(nearest, (scene.room - abs(points)).min(-1))       # walls, ceiling, sky
    for shape, center, half, yaw in zip(scene.shape, scene.center, scene.half, scene.yaw):
        x, y, z = np.moveaxis(points - center, -1, 0)
        if shape == synth.SPHERE:
            away = np.sqrt(x**2 + y**2 + z**2) - half[0]
        elif shape == synth.CYLINDER:
            away = np.maximum(np.hypot(x, y) - half[0], abs(z) - half[2])
        else:
            turned = (x + 1j * y) * np.exp(-1j * yaw)
            away = np.maximum(np.maximum(abs(turned.real) - half[0], abs(turned.imag) - half[1]),
                              abs(z) - half[2])
        nearest = np.minimum(nearest, away)
    return nearest


def test_every_depth_lies_on_the_first_surface(rendered):
    for scene, c2w, _, depths in rendered:
        known = depths.numpy() > 0
        points = unproject(c2w, scene.fov, depths).numpy()[known] / scene.unit
        # float32 rays: a few roundings of the distance, more where a ray grazes a round solid
        error = abs(distance(scene, points)) / np.maximum(depths.numpy()[known] / scene.unit, 1)
        assert np.quantile(error, 0.99) < 1e-5
        assert error.max() < 1e-3
        for share in (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98):
            points = unproject(c2w, scene.fov, share * depths).numpy()[known] / scene.unit
            assert distance(scene, points).min() > -1e-3


def test_every_pixel_has_a_depth_and_the_sky_is_a_far_wall(rendered):
    assert {scene.sky for scene, *_ in rendered} == {True, False}
    for scene, _, _, depths in rendered:
        assert (depths > 0).all()
        # seen from within, a wall of the box lies at HORIZON or a little nearer, or further aslant
        assert (depths.max() > 0.8 * solids.HORIZON * scene.unit) == scene.sky


def test_a_ray_that_passes_a_ball_at_right_angles_does_not_meet_it():
    one, none = torch.ones(1), torch.zeros(1)
    ball = synth.SPHERE, 2, (2 * one, none, none), (one, one, one), one, none
    o, d = (none, none, none), (none + 1e-9, one, none + 1e-9)
    near, far = synth.interval(ball, o, d, synth.inverses(d))
    assert near > far       # a hit in the lens was a hole in the depth, which ended a training


def test_every_view_shares_enough_with_every_other(rendered):
    shares = [reproject(*each)[2] for each in rendered]
    for share in shares:
        assert torch.minimum(share.diagonal(1), share.diagonal(-1)).min() > 0.2
    mean = torch.stack(shares)[:, ~torch.eye(VIEWS, dtype=torch.bool)].mean(1)
    assert mean.min() > 0.25 and mean.mean() > 0.45


def test_cameras_keep_clear_of_solids_ground_and_walls():
    for number in range(150):
        scene = synth.scene(5, number)
        eye = synth.cameras(scene, 40)[:, :3, 3].numpy() / scene.unit
        # between the places where a path is looked at it may come a little nearer than CLEARANCE
        assert distance(scene, eye).min() > 0.75 * solids.CLEARANCE


def test_cameras_are_upright_rotations_that_look_at_the_solids():
    for number in range(20):
        scene = synth.scene(6, number)
        c2w = synth.cameras(scene, 5)
        turn = c2w[:, :3, :3]
        assert torch.allclose(turn @ turn.mT, torch.eye(3, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(torch.linalg.det(turn), torch.ones(5, dtype=torch.float64))
        assert turn[:, 2, 0].abs().max() < 1e-12 and turn[:, 2, 1].min() > 0.5
        towards = -c2w[:, :3, 3] / scene.unit + torch.tensor([0, 0, 0.6], dtype=torch.float64)
        assert ((towards * -turn[:, :, 2]).sum(1) > 0.7 * towards.norm(dim=1)).all()


def test_a_scene_is_a_function_of_seed_and_number():
    one, two = synth.scene(1, 7), synth.scene(1, 7)
    for name in ("center", "half", "material", "colors", "path"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.path, synth.scene(2, 7).path)
    assert not np.array_equal(one.path, synth.scene(1, 9).path)


def test_scenes_vary_in_every_respect():
    scenes = [synth.scene(0, number) for number in range(200)]
    assert {scene.kind for scene in scenes} == {"arc", "walk", "fly"}
    assert {len(scene.shape) for scene in scenes} == {4, 5, 6, 7, 8, 9}
    assert 60 < sum(scene.sky for scene in scenes) < 140
    units = np.log10([scene.unit for scene in scenes])
    assert units.min() < -0.9 and units.max() > 0.9 and abs(units.mean()) < 0.15
    fov = np.degrees([scene.fov for scene in scenes])
    assert 40 <= fov.min() < 43 and 72 < fov.max() <= 75


def test_the_unit_of_length_scales_depth_and_cameras_and_nothing_that_is_seen(rendered):
    scene, c2w, images, depths = rendered[1]
    longer = replace(scene, unit=4 * scene.unit)        # a power of two: not even rounding differs
    moved = synth.cameras(longer, VIEWS)
    assert torch.equal(moved[:, :3, 3], 4 * c2w[:, :3, 3])
    assert torch.equal(moved[:, :3, :3], c2w[:, :3, :3])
    image, depth = synth.render(longer, moved, longer.fov, SIZE)
    assert torch.equal(image, images) and torch.equal(depth, 4 * depths)


# ---------------------------------------------------------------------------------- shards

ARGUMENTS = ["--scenes", "6", "--held-out", "2", "--views", "3", "--size", "16",
             "--scenes-per-shard", "2", "--device", "cpu", "--workers", "1", "--turn", "0"]


def run(out, *more):
    """`prepare.py synth` in this process."""
    prepare.main(["synth", "--out", str(out), *ARGUMENTS, *more])


def stopped(out, *more):
    """The same, as from a shell, which ends with an error."""
    with pytest.raises(SystemExit) as stop:
        command.run("prepare.py", prepare.main, ["synth", "--out", str(out), *ARGUMENTS, *more])
    assert stop.value.code == 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small output folder."""
    out = tmp_path_factory.mktemp("synth") / "out"
    run(out)
    return out


def contents(out):
    """Relative path -> bytes of every file."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def read_shard(path):
    """A shard by the reference's rules: scene -> {frame: (image, depth, OpenGL c2w, fov)}."""
    files = {}
    with tarfile.open(path) as tar:
        for member in tar:
            files[member.name] = tar.extractfile(member).read()
    scenes = {}
    for name in files:
        parts = re.fullmatch(r"([^/]+/[^/]+)/frame(\d{6})_metadata\.json", name)
        if not parts:
            continue
        stem = name.removesuffix("_metadata.json")
        metadata = json.loads(files[name])
        image = np.asarray(Image.open(io.BytesIO(files[f"{stem}.png"])))
        depth = np.zeros(image.shape[:2], np.float32)
        if f"{stem}_depth.png" in files:
            words = np.asarray(Image.open(io.BytesIO(files[f"{stem}_depth.png"])))
            depth = words.astype(np.uint16).view(np.float16).astype(np.float32)
        if "R" in metadata:
            w2c = np.eye(4)
            w2c[:3, :3], w2c[:3, 3] = np.array(metadata["R"]).T, metadata["T"]
            w2c[[0, 2]] *= -1                           # pytorch3d's left and forward
            c2w = np.linalg.inv(w2c)
            fov = 2 * math.atan(1 / max(metadata["focal_length"]))
            assert metadata["principal_point"] == [0.0, 0.0]
            depth = depth * np.float32(metadata["scale_adjustment"])
        else:
            c2w = np.array(metadata["extrinsics"])
            camtopix = np.linalg.inv(metadata["intrinsics"])
            assert camtopix[0, 0] == pytest.approx(camtopix[1, 1])
            fov = 2 * math.atan(camtopix[0, 2] / camtopix[0, 0])
        scenes.setdefault(parts[1], {})[int(parts[2])] = (image, depth, c2w, fov)
    return scenes


def test_the_parser_of_these_tests_reads_the_reference_shards():
    # it stands for the reference below, so it must give the cameras that the reference gave
    folder = Path(__file__).parents[1] / "golden"
    from safetensors.numpy import load_file
    for layout in ("co3d", "re10k"):
        expected = load_file(folder / f"shards_{layout}.safetensors")
        pairs = json.loads((folder / f"shards_{layout}.json").read_text())["pairs"]
        scenes = {}
        for number in (0, 1):
            read = read_shard(folder / "shards" / f"{layout}-{number:06d}.tar")
            scenes |= {name.replace("/", "_"): frames for name, frames in read.items()}
        for k, pair in enumerate(pairs):
            frames = scenes[pair["uid"]]
            _, j = map(int, pair["pair_uid"].split("__")[:2])
            c2w = frames[sorted(frames)[j]][2]
            assert np.allclose(c2w, expected["cond_cam2world"][k], atol=1e-12)
            fov_deg = math.degrees(next(iter(frames.values()))[3])
            assert fov_deg == pytest.approx(expected["fov_deg"][k])


@pytest.mark.parametrize("layout", ["co3d", "re10k"])
def test_the_reference_rules_give_back_the_cameras_images_and_depths(made, layout):
    scenes = {}
    for path in sorted((made / layout).glob("*.tar")):
        scenes |= read_shard(path)
    assert len(scenes) == 4
    for name, frames in scenes.items():
        kind, number = name.split("/")
        scene = synth.scene(0, int(number))
        assert kind == scene.kind and (kind == "arc") == (layout == "co3d")
        c2w = synth.cameras(scene, 3, MOTION)
        images, depths = synth.render(scene, c2w, scene.fov, 16)
        assert sorted(frames) == [1, 2, 3]
        for i, (image, depth, pose, fov) in frames.items():
            assert np.allclose(pose, c2w[i - 1], rtol=0, atol=1e-13 * max(1, scene.unit))
            assert fov == pytest.approx(scene.fov, rel=1e-12)
            expected = ((images[i - 1].permute(1, 2, 0) + 1) * 127.5).numpy()
            assert image.dtype == np.uint8 and abs(image - expected).max() < 0.51
            # half floats have 11 bits
            assert np.allclose(depth, depths[i - 1], rtol=2**-11 * 1.01, atol=0)


def test_motion_is_the_middle_part_of_the_path():
    scene = synth.scene(0, 3)
    whole, half = synth.cameras(scene, 9), synth.cameras(scene, 5, 0.5)
    assert torch.allclose(whole[2:7], half, rtol=0, atol=1e-12)


def test_cameras_that_turn_stay_where_they_are_and_look_to_the_left_and_up():
    scene, turns = synth.scene(0, 3), np.array([[0, 0], [0.3, 0], [0, 0.2]])
    plain, turned = synth.cameras(scene, 3), synth.cameras(scene, 3, turns=turns)
    assert torch.equal(turned[0], plain[0])
    assert torch.equal(turned[:, :3, 3], plain[:, :3, 3])
    ahead, before = -turned[1, :3, 2], -plain[1, :3, 2]     # as steep, 0.3 further around
    assert ahead[2] == pytest.approx(before[2].item())
    further = torch.atan2(ahead[1], ahead[0]) - torch.atan2(before[1], before[0])
    assert math.remainder(further.item(), 2 * math.pi) == pytest.approx(0.3)
    assert ahead @ plain[1, :3, 0] < 0                      # which is to the left
    ahead, axes = -turned[2, :3, 2], plain[2, :3, :3]       # right, up, back
    assert (ahead @ axes).tolist() == pytest.approx([0, math.sin(0.2), -math.cos(0.2)], abs=1e-12)


def test_turns_are_the_same_for_a_scene_whatever_else_is_made(tmp_path):
    def poses(name, *options):
        run(tmp_path / name, *options)
        scene = read_shard(tmp_path / name / "co3d/train-000000.tar")["arc/0000000000"]
        return np.stack([c2w for _, _, c2w, _ in scene.values()])

    few, more, plain = (poses("few", "--scenes", "2", "--turn", "20"),
                        poses("more", "--scenes", "4", "--turn", "20"), poses("plain"))
    assert np.array_equal(few, more)
    assert np.allclose(few[:, :3, 3], plain[:, :3, 3], rtol=0, atol=1e-9)
    cosines = (few[:, :3, 2] * plain[:, :3, 2]).sum(1)
    assert (cosines < 1).all() and (cosines > math.cos(math.radians(20))**2).all()


def test_training_and_held_out_scenes_differ_and_do_not_depend_on_their_count(made, tmp_path):
    run(tmp_path / "more", "--scenes", "8", "--held-out", "4")
    for layout in ("co3d", "re10k"):
        for shard in (made / layout).glob("*.tar"):
            fewer, more = read_shard(shard), read_shard(tmp_path / "more" / layout / shard.name)
            assert set(fewer) <= set(more)
    with tarfile.open(made / "co3d/train-000000.tar") as tar:
        assert tar.getnames()[0] == "arc/0000000000/frame000001.png"
    held_out = read_shard(made / "co3d/held-out-000000.tar")
    assert list(held_out) == [f"arc/{synth.HELD_OUT:010d}"]


def test_the_same_arguments_give_the_same_bytes(made, tmp_path):
    run(tmp_path / "again", "--workers", "2")
    assert contents(tmp_path / "again") == contents(made)


def test_a_run_that_was_cut_short_goes_on_and_ends_the_same(made, tmp_path, capsys):
    out = tmp_path / "out"
    run(out)
    deleted = out / "re10k/train-000001.tar"
    deleted.unlink()
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    run(out)
    assert contents(out) == contents(made)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    rates = r"^1 shards made in [\d.]+ s \(1 processes\)"
    assert re.search(rates, capsys.readouterr().out, re.M)
    run(out)
    assert "all of them were there already" in capsys.readouterr().out


def test_a_shard_has_its_name_only_when_it_is_complete(tmp_path):
    def scenes():
        yield [("a/b/frame000001.png", b"1" * 5000)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_shard(tmp_path / "train-000000.tar", scenes())
    assert not list(tmp_path.glob("*.tar"))
    writer.write_shard(tmp_path / "train-000000.tar", [[("a/b/frame000001.png", b"1")]])
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_a_shard_has_the_bytes_that_tarfile_writes(tmp_path):
    members = [(f"a/b/frame{i:06d}.png", bytes([i + 1]) * size)
               for i, size in enumerate([0, 1, 511, 512, 513, 9000])]
    writer.write_shard(tmp_path / "ours.tar", [members[:2], members[2:]])
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_work_ahead_comes_in_order_no_further_than_asked_and_stops_with_its_reader():
    begun = []

    def slow_at_first(i):
        begun.append(i)
        time.sleep(0.05 if i == 0 else 0.001)
        return i * i

    assert list(make.ahead(slow_at_first, range(20), 4, 6)) == [i * i for i in range(20)]
    begun.clear()
    results = make.ahead(slow_at_first, range(20), 1, 3)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert len(begun) <= 2 + 3
    with pytest.raises(ZeroDivisionError):
        list(make.ahead(lambda i: 1 // (2 - i), range(20), 2, 3))


def test_other_arguments_are_refused_by_name_unless_overwritten(made, tmp_path, capsys):
    out = tmp_path / "out"
    run(out)
    stopped(out, "--seed", "1", "--views", "2")
    message = capsys.readouterr().err.splitlines()[-1]
    assert "views 3 there, 2 now; seed 0 there, 1 now" in message and "--overwrite" in message
    assert contents(out) == contents(made)
    run(out, "--seed", "1", "--scenes", "2", "--overwrite")
    assert len(list(out.rglob("*.tar"))) == 4
    assert "arc/0000000000" in read_shard(out / "co3d/train-000000.tar")


def test_a_note_that_does_not_fit_on_the_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device: '.*/note.json'"):
        files.write_text(tmp_path / "note.json", "{}")
    assert not list(tmp_path.iterdir())


def test_names_that_no_tar_can_hold_are_told(tmp_path):
    with pytest.raises(ValueError, match="s.tar: no member of it can be 'aaa.*: name is too long"):
        writer.write_shard(tmp_path / "s.tar", [[("a" * 180, b"")]])
    assert not list(tmp_path.iterdir())


def test_other_arguments_are_fine_where_no_shard_was_made(tmp_path):
    """Those of a run that failed, say, and are now corrected."""
    note, shard = tmp_path / "note.json", tmp_path / "train-000000.tar"
    make.check_out(note, {"seed": 0}, [], False)
    make.check_out(note, {"seed": 1}, [], False)
    assert json.loads(note.read_text()) == {"seed": 1}
    with pytest.raises(ValueError, match="seed 1 there, 2 now"):
        make.check_out(note, {"seed": 2}, [shard], False)


@pytest.mark.parametrize("image_format, kind", [("jpg", "JPEG"), ("webp", "WEBP")])
def test_colour_images_may_be_jpeg_or_webp(image_format, kind, made, tmp_path):
    run(tmp_path, "--image-format", image_format, "--scenes", "2")
    with tarfile.open(tmp_path / "co3d/train-000000.tar") as lossy, \
            tarfile.open(made / "co3d/train-000000.tar") as exact:
        image = Image.open(lossy.extractfile(f"arc/0000000000/frame000001.{image_format}"))
        truth = Image.open(exact.extractfile("arc/0000000000/frame000001.png"))
        assert image.format == kind
        difference = np.asarray(image).astype(float) - np.asarray(truth)
        assert np.sqrt((difference**2).mean()) < 30
        depth = Image.open(lossy.extractfile("arc/0000000000/frame000001_depth.png"))
        assert depth.mode == "I;16"


def test_depths_that_are_unknown_or_do_not_fit_are_stored_as_0():
    depth = np.array([[0, 1.5, 65504], [65520, np.inf, np.nan], [-1, 1e30, 0.25]], dtype=np.float32)
    words = np.asarray(Image.open(io.BytesIO(writer.depth_bytes(depth)))).astype(np.uint16)
    assert np.array_equal(words.view(np.float16), [[0, 1.5, 65504], [0, 0, 0], [0, 0, 0.25]])


@pytest.mark.parametrize("shape, dtype", [((5, 7, 3), np.uint8), ((1, 1, 3), np.uint8),
                                          ((6, 3), np.uint16), ((1, 4), np.uint16)])
def test_png_files_hold_the_samples_exactly(shape, dtype):
    samples = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    image = Image.open(io.BytesIO(writer.png_bytes(samples)))
    image.verify()
    image = Image.open(io.BytesIO(writer.png_bytes(samples)))
    assert image.mode == ("RGB" if dtype == np.uint8 else "I;16")
    assert np.array_equal(np.asarray(image), samples)


def test_tars_carry_no_time_and_no_owner(made):
    for path in made.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                assert (member.uname, member.gname) == ("", "")


@pytest.mark.parametrize("option, value, says", [
    ("--scenes", "0", "--scenes: 0 is not possible, only numbers"),
    ("--held-out", "-1", "--held-out: -1 is not possible, only numbers"),
    ("--views", "1", "--views: 1 is not possible, only numbers"),
    ("--size", "0", "--size: 0 is not possible, only numbers"),
    ("--motion", "1.5", "--motion: 1.5 is not possible, only numbers"),
    ("--turn", "60", "--turn: 60 is not possible, only numbers"),
    ("--seed", "-3", "--seed: -3 is not possible, only numbers"),
    ("--workers", "-1", "--workers: -1 is not possible, only numbers"),
    ("--sise", "3", "option --sise is not known, did you mean --size?"),
    ("--device", "cuda", "--device cuda: this machine has cpu"),
])
def test_bad_input_is_one_line_and_exit_code_2(option, value, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stopped(tmp_path / "out", option, value)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    done = forked.run("prepare.py", "synth", "--out", out, *ARGUMENTS)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("prepare.py: ") and done.stderr.count("\n") == 1
    assert str(tmp_path / "file") in done.stderr


def slow_scenes(path, content):
    """One scene, then none for a minute; or a failure, once the other shard has been begun."""
    if content == "fails":
        while not list(path.parent.glob(".*slow.tar*")):
            time.sleep(0.01)
        raise OSError(28, "No space left on device", str(path))
    yield [("a/b/frame000001.png", b"1")]
    for _ in range(600):
        time.sleep(0.1)


def test_where_one_process_fails_the_others_are_ended_and_leave_nothing(tmp_path):
    """Else they would write on, under the names that the next run writes to."""
    todo = [(tmp_path / "slow.tar", "slow"), (tmp_path / "fails.tar", "fails")]
    began, others = time.monotonic(), multiprocessing.active_children()
    with pytest.raises(OSError, match="No space left on device.*fails.tar"):
        make.make_shards_together(todo, slow_scenes, 2, "test")
    assert time.monotonic() - began < 30        # not the minute
    assert set(multiprocessing.active_children()) <= set(others)
    assert not list(tmp_path.iterdir())


def test_a_failure_in_one_of_several_processes_is_one_line(tmp_path, capsys):
    (tmp_path / "co3d").write_text("in the way")
    stopped(tmp_path, "--workers", "2")
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "co3d") in message


def test_shards_of_another_origin_are_left_alone(tmp_path, capsys):
    (tmp_path / "co3d").mkdir()
    (tmp_path / "co3d/train-000000.tar").write_bytes(b"somebody's")
    stopped(tmp_path, "--overwrite")
    assert "holds shards that this command did not make" in capsys.readouterr().err
    assert (tmp_path / "co3d/train-000000.tar").read_bytes() == b"somebody's"
