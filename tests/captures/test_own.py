"""One's own captures: lens distortion undone, cameras found from photos, files as people have them."""

import gzip
import json
import math
import os
import shutil
import subprocess

import numpy as np
import pytest
import room
from PIL import Image
from test_prepare import read_shard

import prepare
from captures import datasets, make, own, resample
from views import colmap, paths
from views.colmap import Lens

W, H, SIZE = 160, 120, 48
PINHOLE = Lens("PINHOLE", W, H, (130.0, 130.0, W / 2, H / 2))
needs_pycolmap = pytest.mark.skipif(not colmap.pycolmap(), reason="pycolmap is not installed")


def run(*arguments):
    prepare.main([*map(str, arguments), "--size", str(SIZE), "--workers", "1", "--held-out", "0"])


def errors(out, colour=room.smooth):
    """(views, least PSNR against the room in dB, largest median error of depth) of shards."""
    psnr, off = [], []
    for shard in sorted(out.glob("train-*.tar")):
        for frames in read_shard(shard).values():
            for image, depth, c2w, fov in frames.values():
                lens = Lens("PINHOLE", SIZE, SIZE, (SIZE / 2 / math.tan(fov / 2),) * 2
                            + (SIZE / 2,) * 2)
                truth = room.photo(c2w, lens, SIZE, SIZE, colour)
                psnr.append(-10 * math.log10(((image - truth.astype(float))**2).mean() / 255**2))
                slopes = resample.slopes_of(math.tan(fov / 2), SIZE)
                _, far = room.seen(c2w, slopes)
                known = depth.ravel() > 0
                off += [np.median(abs(depth.ravel() / far - 1)[known])] if known.any() else []
    return len(psnr), min(psnr), max(off, default=None)


def capture(folder, lens, names=None, n=4):
    """A COLMAP capture of the room."""
    c2w = room.cameras(n)
    names = names or [f"{i}.png" for i in range(n)]
    room.write_colmap(folder / "sparse/0", c2w, names, lens)
    (folder / "images").mkdir()
    for pose, name in zip(c2w, names):
        Image.fromarray(room.photo(pose, lens, W, H)).save(folder / "images" / name)
    return folder


# ---- lens distortion

BENT = [Lens("SIMPLE_RADIAL", W, H, (130.0, 82.0, 57.0, -0.15)),
        Lens("RADIAL", W, H, (120.0, 82.0, 57.0, 0.12, 0.03)),
        Lens("OPENCV", W, H, (125.0, 130.0, 78.0, 61.0, -0.2, 0.05, 0.01, -0.008)),
        Lens("FULL_OPENCV", W, H, (125.0, 130.0, 78.0, 61.0, .1, .1, .004, .002, .1, .3, .0, .0)),
        Lens("OPENCV_FISHEYE", W, H, (90.0, 91.0, 80.0, 60.0, 0.02, -0.01, 0.003, 0.0))]


@needs_pycolmap
@pytest.mark.parametrize("lens", BENT, ids=lambda lens: lens.model)
def test_pictures_cameras_and_sparse_depth_agree_after_distortion_is_undone(lens, tmp_path):
    run("colmap", capture(tmp_path / "room", lens), "--out", tmp_path / "out")
    count, psnr, depth = errors(tmp_path / "out")
    # with the distortion left in it is 20 to 28 dB
    assert count == 4 and psnr > 40 and depth < 0.01


@needs_pycolmap
@pytest.mark.parametrize("fields, lens", [
    ({"k1": -0.2, "k2": 0.05, "p1": 0.01, "p2": -0.008}, BENT[2]),
    ({"distortion_params": [-0.2, 0.05, 0, 0, 0.01, -0.008]}, BENT[2]),
    ({"camera_model": "OPENCV_FISHEYE", "k1": 0.02, "k2": -0.01, "k3": 0.003}, BENT[4]),
    ({"is_fisheye": True, "k1": 0.02, "k2": -0.01, "k3": 0.003}, BENT[4])])
def test_the_coefficients_of_a_transforms_json_are_undone(fields, lens, tmp_path):
    c2w, frames = room.cameras(3), []
    far = np.meshgrid((np.arange(W) + 0.5) / W, (np.arange(H) + 0.5) / H)
    slopes = lens.slopes(np.stack(far, axis=-1).reshape(-1, 2))
    for i, pose in enumerate(c2w):
        Image.fromarray(room.photo(pose, lens, W, H)).save(tmp_path / f"{i}.png")
        depth = room.seen(pose, slopes)[1].reshape(H, W) / 2 * 1000      # applied_scale 2
        Image.fromarray(depth.round().astype(np.uint16)).save(tmp_path / f"{i}_depth.png")
        frames.append({"file_path": f"{i}.png", "transform_matrix": pose.tolist(),
                       "depth_file_path": f"{i}_depth.png"})
    fx, fy, cx, cy = lens.params[:4]
    shared = {"w": W, "h": H, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "applied_scale": 2.0}
    (tmp_path / "transforms.json").write_text(json.dumps({**shared, **fields, "frames": frames}))
    run("nerfstudio", tmp_path, "--out", tmp_path / "out")
    count, psnr, depth = errors(tmp_path / "out")
    assert count == 3 and psnr > 40 and depth < 0.01


def test_of_few_scenes_a_tenth_of_the_views_of_each_is_held_out(tmp_path):
    folder = capture(tmp_path / "room", PINHOLE, n=8)
    prepare.main(["colmap", str(folder), "--size", "16", "--workers", "1", "--out", str(tmp_path / "out")])
    parts = {split: {image.tobytes() for image, *_ in read_shard(
        tmp_path / f"out/{split}-000000.tar")["colmap/room"].values()} for split in make.SPLITS}
    assert len(parts["train"]) == 6 and len(parts["held-out"]) == 2 and len({*parts["train"], *parts["held-out"]}) == 8
    assert [make.places(n, "held-out") for n in (3, 8, 25)] == [[], [2, 6], [3, 9, 15, 21]]


# ---- photos

@needs_pycolmap
def test_photos_become_shards_with_cameras_and_sparse_depth(tmp_path, capsys):
    lens, c2w = Lens("PINHOLE", 320, 240, (260.0, 260.0, 160.0, 120.0)), room.cameras(8)
    (tmp_path / "walk").mkdir()
    for i, pose in enumerate(c2w):
        picture = Image.fromarray(room.photo(pose, lens, 320, 240, room.rough, 1))
        picture.save(tmp_path / f"walk/{i}.png")
    arguments = "photos", tmp_path / "walk", "--out", tmp_path / "out"
    run(*arguments)
    assert "8 of 8 photos found their place" in capsys.readouterr().out
    assert Image.open(tmp_path / "out/walk.png").width > 600
    frames = read_shard(tmp_path / "out/train-000000.tar")["photos/walk"]
    found = np.array([c2w for _, _, c2w, _ in frames.values()])
    check_similar(found, np.array(c2w))
    assert all(np.count_nonzero(depth) > 30 for _, depth, _, _ in frames.values())
    run(*arguments)
    told = capsys.readouterr().out
    assert "all of them were there already" in told and "found their place" not in told


def check_similar(found, truth):
    """Cameras (n, 4, 4) are those of the truth up to a similarity: 1% of their extent, 1 degree."""
    a, b = found[:, :3, 3], truth[:, :3, 3]
    a0, b0 = a - a.mean(0), b - b.mean(0)
    u, stretch, vt = np.linalg.svd(b0.T @ a0)           # Umeyama 1991
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    turn = u @ sign @ vt
    scale = (stretch * np.diag(sign)).sum() / (a0**2).sum()
    reach = np.linalg.norm(b0, axis=1).max()
    assert np.linalg.norm(scale * a0 @ turn.T - b0, axis=1).max() < 0.01 * reach
    angles = [math.degrees(math.acos(min(1, (np.trace(turn @ x[:3, :3] @ y[:3, :3].T) - 1) / 2)))
              for x, y in zip(found, truth)]
    assert max(angles) < 1


# ---- files as people have them

def test_black_hidden_frames_of_co3d_are_left_out_by_their_cause(tmp_path, capsys):
    folder, frames = tmp_path / "toy", []
    (folder / "one/images").mkdir(parents=True)
    (folder / "one/depths").mkdir()
    for i, pose in enumerate(room.cameras(4)):
        picture = room.photo(pose, PINHOLE, W, H) * (i != 1)
        Image.fromarray(picture).save(folder / f"one/images/{i}.jpg", quality=97)
        depth = np.full((H, W), (i != 1) * 2.0, np.float16).view(np.uint16)
        Image.fromarray(depth).save(folder / f"one/depths/{i}.png")
        w2c = np.diag([-1.0, -1, 1, 1]) @ room.opencv(pose)
        # without intrinsics_format, as CO3D's first version: it is ndc_norm_image_bounds
        frames.append({"sequence_name": "one", "frame_number": i, "image": {
            "path": f"toy/one/images/{i}.jpg", "size": [H, W]}, "depth": {
            "path": f"toy/one/depths/{i}.png", "scale_adjustment": 1.0}, "viewpoint": {
            "R": w2c[:3, :3].T.tolist(), "T": w2c[:3, 3].tolist(),
            "focal_length": [130 / (W / 2), 130 / (H / 2)], "principal_point": [0, 0]}})
    sequences = [{"sequence_name": "one", "viewpoint_quality_score": 0.9}]
    for kind, content in (("frame", frames), ("sequence", sequences)):
        (folder / f"{kind}_annotations.jgz").write_bytes(gzip.compress(json.dumps(content).encode()))
    for options in (["--no-depth"], []):
        run("co3d", tmp_path, "--out", tmp_path / f"out{len(options)}", *options)
        assert "left out: 1 x hidden test frame (black)" in capsys.readouterr().out
    count, psnr, _ = errors(tmp_path / "out1")
    assert count == 3 and psnr > 40


@pytest.mark.parametrize("change", ["blank lines", "byte order mark", "utf-16", "zero distortion"])
def test_colmap_text_is_read_alike_by_prepare_and_path(change, tmp_path):
    lens = PINHOLE if change != "zero distortion" else Lens(
        "RADIAL", W, H, (130.0, W / 2, H / 2, 0.0, 0.0))
    names = [f"my photo {i}.png" for i in (10, 2, 1, 9)]        # in no order, with spaces
    folder = capture(tmp_path / "room", lens, names)
    for part in colmap.PARTS:
        path = folder / f"sparse/0/{part}.txt"
        text = path.read_text().replace("\n", "\r\n")
        if change == "blank lines":
            text = "# head\n\n" + text.replace("my photo", "  my photo").replace("  my", "my")
        path.write_bytes(text.encode({"byte order mark": "utf-8-sig", "utf-16": "utf-16"}.get(
            change, "utf-8")))
    run("colmap", folder, "--out", tmp_path / "out")
    count, psnr, depth = errors(tmp_path / "out")
    assert count == 4 and psnr > 40 and depth < 0.01
    path = paths.read(folder / "sparse/0/images.txt", 1.0)
    truth = np.array(room.cameras(4))[[2, 1, 3, 0]]             # 1, 2, 9, 10
    assert np.allclose(path.c2w, truth, atol=1e-9)
    assert path.cond_fov == pytest.approx(2 * math.atan(H / 2 / 130))


@pytest.mark.parametrize("start, says", [
    (b"\x1f\x8b\x08", "compressed by gzip: gunzip it$"), (b"<!DOCTYPE html>", "an HTML or XML page: a "),
    (b"version https://git-lfs", "a pointer of Git LFS: `git lfs pull`")])
def test_a_file_that_is_something_else_is_called_by_its_name(start, says, tmp_path):
    for name in ("images.txt", "transforms.json"):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=f"{name}: is {says}"):
            colmap.text_of(tmp_path / name)
    (tmp_path / "a.png").write_bytes(start)
    with pytest.raises(resample.LeftOut, match="a.png: no image, but "), \
            resample.opened(tmp_path / "a.png"):
        pass


def test_a_photo_that_is_a_pipe_or_too_large_is_left_out_at_once(tmp_path, monkeypatch, recwarn):
    os.mkfifo(tmp_path / "a.png")
    Image.new("L", (60, 40)).save(tmp_path / "b.png")
    for most, name, says in ((1, "a", "missing image"), (2000, "b", None), (1000, "b", "megapixels")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        if says:
            with pytest.raises(resample.LeftOut, match=says), \
                    resample.opened(tmp_path / f"{name}.png"):
                pass
        else:                       # Pillow would warn of an attack
            with resample.opened(tmp_path / f"{name}.png") as image:
                assert image.size == (60, 40) and not recwarn.list


def test_a_second_camera_of_the_same_time_is_counted(tmp_path):
    row = " ".join(map(str, [7, 1, 1, 0.5, 0.5, 0, 0, *np.eye(4)[:3].ravel()]))
    (tmp_path / "clip.txt").write_text(f"link\n{row}\n{row}\n")
    views, out = datasets.read_re10k(tmp_path / "clip.txt", tmp_path, None)
    assert len(views) == 1 and [each.reason for each in out] == ["a second camera of the same time"]


@pytest.mark.parametrize("line", ["1 2 3", "1 1 0 0 0 0 0 0 1", "1 1 0 0 0 0 x 0 1 a.png"])
def test_a_line_that_is_no_image_is_an_error_with_the_line(line, tmp_path):
    (tmp_path / "images.txt").write_text(line + "\n\n")
    with pytest.raises(ValueError, match=f"'{line}' is no line of COLMAP's images"):
        paths.read(tmp_path / "images.txt", 1.0)


def test_a_scene_of_which_nothing_is_left_stops_no_other_and_no_rerun(tmp_path, capsys):
    for name in "abc":
        capture(tmp_path / name, PINHOLE)
    shutil.rmtree(tmp_path / "b/images")
    (tmp_path / "b/images").mkdir()
    shutil.rmtree(tmp_path / "c/images")
    for _ in range(2):
        run("colmap", *(tmp_path / name for name in "abc"), "--out", tmp_path / "out",
            "--shard-size", "0.00001")
        told = capsys.readouterr().out
        assert f"passed over: 1 x {tmp_path}/c/images: no such folder" in told
        assert "train-*.tar: 1 shards, 1 scenes, 4 views" in told and "left out: 4 x missing" in told
    assert "all of them were there already" in told
    shutil.rmtree(tmp_path / "a/images")
    with pytest.raises(FileNotFoundError, match="a/images: no such folder"):
        run("colmap", tmp_path / "a", "--out", tmp_path / "other")


def test_a_byte_order_mark_of_a_transforms_json_is_no_part_of_it(tmp_path):
    frame = {"file_path": "a", "transform_matrix": np.eye(4).tolist(), "mask_path": "m"}
    text = json.dumps({"camera_angle_x": 1.0, "frames": [frame] * 2, "aabb_scale": 4})
    (tmp_path / "transforms_train.json").write_text(text, encoding="utf-8-sig")
    _, left_out = own.find_nerfstudio([tmp_path / "transforms_train.json"], False)
    assert left_out == {"masks (mask_path), as photos are stored whole": 2}
    with pytest.raises(FileNotFoundError, match="is missing; .* it: .*/transforms_train.json"):
        own.find_nerfstudio([tmp_path], False)


@pytest.mark.parametrize("fields, reason", [
    ({"fl_x": 0}, "fl_x is '0', it must be a number between 0 and inf"),
    ({"camera_angle_x": 0.0}, "camera_angle_x is '0.0', it must be a number between 0 and 3.14"),
    ({"fl_x": 10**400}, "fl_x is '1000000"), ({"fl_x": True}, "fl_x is 'True'"),
    ({"w": 0, "h": 3}, "w is '0'"), ({}, "fl_x and camera_angle_x are missing"),
    ({"fl_x": 9, "camera_model": "EQUIRECTANGULAR"}, "camera_model 'EQUIRECTANGULAR' with k4 0 is"),
    ({"fl_x": 9, "k4": 0.1}, "camera_model 'OPENCV' with k4 0.1 is not read"),
    ({"fl_x": 9, "distortion_params": 3}, "distortion_params are not 6 numbers"),
    ({"fl_x": 9, "fisheye_crop_radius": 8}, "fisheye_crop_radius is not read"),
    ({"fl_x": 9, "transform_matrix": [[10**400] * 4] * 3}, "transform_matrix is no 3x4"),
    ({"fl_x": 9, "file_path": 3}, "has no file_path")])
def test_what_is_wrong_with_a_frame_is_said_by_its_field(fields, reason, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    frame = {"file_path": "a", "transform_matrix": np.eye(4).tolist(), **fields}
    with pytest.raises(resample.LeftOut) as found:
        own.nerfstudio_view(tmp_path, False, frame)
    assert reason in str(found.value)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_a_video_gives_frames_evenly_apart(tmp_path):
    from captures import photos
    frames = b"".join(np.full((48, 64, 3), 10 * i, np.uint8).tobytes() for i in range(21))
    subprocess.run(["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48",
                    "-r", "10", "-i", "-", "-c:v", "mpeg4", "-q:v", "2", str(tmp_path / "a.mp4")],
                   input=frames, check=True)
    folder = photos.video_photos(tmp_path / "a.mp4", tmp_path / "frames", 3)
    levels = [np.asarray(Image.open(path)).mean() for path in sorted(folder.iterdir())]
    assert np.allclose(levels, [0, 100, 200], atol=3)


def test_photos_without_pycolmap_are_refused_in_a_line(tmp_path, monkeypatch):
    from captures import photos
    monkeypatch.setattr(photos, "pycolmap", lambda: None)
    with pytest.raises(ValueError, match="not installed: pip install pycolmap"):
        run("photos", tmp_path, "--out", tmp_path / "out")
