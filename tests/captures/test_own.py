"""One's own captures: lens distortion undone, cameras found from photos, files as people have them."""

import gzip
import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import room
from PIL import Image
from test_prepare import read_shard

import prepare
from captures import own, resample
from views import cameras, colmap, paths
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


# ---- photos

@needs_pycolmap
def test_photos_become_shards_with_cameras_and_sparse_depth(tmp_path, capsys):
    lens, c2w = Lens("PINHOLE", 320, 240, (260.0, 260.0, 160.0, 120.0)), room.cameras(8)
    (tmp_path / "walk").mkdir()
    for i, pose in enumerate(c2w):
        picture = Image.fromarray(room.photo(pose, lens, 320, 240, room.rough, 2))
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
