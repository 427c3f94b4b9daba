"""Camera paths: the geometry of every motion, and files of poses in every format."""

import json
import math
import re

import pytest
import torch

from views import paths
from views import pictures
from views.cameras import check_rigid
from camera import opengl_from_opencv, relative_pose

FOV = math.radians(50)
ELEVATION = 25.0
X, Y, Z = torch.eye(3, dtype=torch.float64)


def path(name, views=9, by=None, elevation=ELEVATION):
    return paths.motion(name, views, paths.MOTIONS[name][0] if by is None else by, FOV, elevation)


def assert_same(found, expected):
    """Equal but for rounding; what the tests expect is often float32."""
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype),
                               rtol=0, atol=1e-7)


def assert_looks_at_the_origin(c2w):
    towards = -c2w[:, :3, 3] / c2w[:, :3, 3].norm(dim=-1, keepdim=True)
    assert_same(-c2w[:, :3, 2], towards)


def assert_level(c2w):
    """The horizon is level: right vectors have no height, and up vectors point up."""
    assert_same(c2w[:, 2, 0], torch.zeros(len(c2w)))
    assert (c2w[:, 2, 1] > 0).all()


@pytest.mark.parametrize("name", paths.MOTIONS)
def test_every_motion_begins_at_the_photo_with_rigid_cameras(name):
    cameras = path(name)
    assert_same(relative_pose(cameras.cond_c2w, cameras.c2w[0]), torch.eye(4))
    check_rigid(cameras.c2w, name)
    assert len(cameras) == 9 and cameras.fov[0] == pytest.approx(FOV)
    assert_same(cameras.cond_c2w[:3, 3].norm(), 1.0)
    elevation = math.degrees(math.asin(cameras.cond_c2w[2, 3]))
    assert elevation == pytest.approx(ELEVATION)


@pytest.mark.parametrize("name", paths.MOTIONS)
def test_one_view_is_the_photo_itself(name):
    cameras = path(name, views=1)
    assert_same(cameras.c2w[0], cameras.cond_c2w)


def test_orbit_keeps_distance_and_height_and_looks_at_the_centre():
    cameras = path("orbit", views=8)
    position = cameras.c2w[:, :3, 3]
    assert_same(position.norm(dim=-1), torch.ones(8))
    assert_same(position[:, 2], position[:1, 2].expand(8))
    assert_looks_at_the_origin(cameras.c2w)
    assert_level(cameras.c2w)
    assert cameras.closed
    # 8 views of a full circle: 45 degrees apart, the last one too, and the first step to the right
    around = torch.atan2(position[:, 1], position[:, 0])
    steps = (around.roll(-1) - around).remainder(2 * math.pi)
    assert_same(steps, torch.full((8,), math.pi / 4))
    assert relative_pose(cameras.cond_c2w, cameras.c2w[1])[0, 3] > 0


def test_part_of_an_orbit_ends_where_it_was_told_to():
    cameras = path("orbit", views=5, by=-90, elevation=0.0)
    assert not cameras.closed
    assert_same(cameras.c2w[-1, :3, 3], -Y)


def test_swing_goes_as_far_to_both_sides():
    cameras = path("swing", views=8, by=30)
    azimuth = torch.rad2deg(torch.atan2(cameras.c2w[:, 1, 3], cameras.c2w[:, 0, 3]))
    assert azimuth.max().item() == pytest.approx(30) and azimuth.min().item() == pytest.approx(-30)
    assert_looks_at_the_origin(cameras.c2w)
    assert cameras.closed
    first, second = path("swing", views=2, by=30).c2w[:, :2, 3]
    turned = torch.rad2deg(torch.atan2(*second.flip(0)) - torch.atan2(*first.flip(0))).item()
    assert turned == pytest.approx(30)


def test_spiral_looks_at_the_centre_from_a_disc_and_comes_back():
    cameras = path("spiral", views=32, by=0.25)
    offset = relative_pose(cameras.cond_c2w, cameras.c2w)[:, :3, 3]
    assert_same(offset[:, 2], torch.zeros(32))
    radius = offset.norm(dim=-1)
    assert radius.max().item() == pytest.approx(0.25, abs=1e-3) and radius.argmax() == 16
    turned = torch.atan2(offset[1:, 1], offset[1:, 0]).diff().remainder(2 * math.pi)
    assert turned.sum().item() == pytest.approx(2 * 2 * math.pi * 30 / 32)
    assert_looks_at_the_origin(cameras.c2w)
    assert cameras.closed


@pytest.mark.parametrize("name, axis", [("dolly", -Z), ("truck", X), ("pedestal", Y)])
@pytest.mark.parametrize("by", [0.4, -0.3])
def test_straight_motions_move_along_an_axis_of_the_photo_without_turning(name, axis, by):
    cameras = path(name, views=5, by=by)
    rel = relative_pose(cameras.cond_c2w, cameras.c2w)
    assert_same(rel[:, :3, :3], torch.eye(3).expand(5, 3, 3))
    assert_same(rel[:, :3, 3], torch.linspace(0, 1, 5)[:, None] * by * axis)


def test_pan_turns_to_the_right_about_the_vertical_on_the_spot():
    cameras = path("pan", views=4, by=30)
    assert_same(cameras.c2w[:, :3, 3], cameras.cond_c2w[:3, 3].expand(4, 3))
    assert_level(cameras.c2w)
    ahead = relative_pose(cameras.cond_c2w, cameras.c2w)[-1, :3, :3] @ -Z
    assert ahead[0] > 0.4 * math.cos(math.radians(ELEVATION))
    level = path("pan", views=4, by=30, elevation=0.0)
    ahead = relative_pose(level.cond_c2w, level.c2w)[-1, :3, :3] @ -Z
    assert_same(ahead, [0.5, 0.0, -math.sqrt(0.75)])


def test_tilt_turns_upwards_about_the_photos_own_x():
    cameras = path("tilt", views=3, by=30)
    rel = relative_pose(cameras.cond_c2w, cameras.c2w)
    assert_same(rel[:, :3, 3], torch.zeros(3, 3))
    assert_same(rel[-1, :3, :3] @ -Z, [0.0, 0.5, -math.sqrt(0.75)])
    assert_same(rel[:, :3, 0], X.expand(3, 3))


def test_zoom_changes_the_field_of_view_alone():
    cameras = path("zoom", views=3, by=4.0)
    assert_same(cameras.c2w, cameras.cond_c2w.expand(3, 4, 4))
    # things look larger by the ratio of the tangents of half the field of view
    times = math.tan(FOV / 2) / torch.tan(cameras.fov / 2)
    assert_same(times, [1.0, 2.0, 4.0])


def test_grid_is_a_row_for_each_elevation_from_above_to_below():
    cameras = paths.grid(FOV, 10.0)
    columns = len(paths.GRID_AZIMUTHS)
    heights = torch.rad2deg(torch.asin(cameras.c2w[::columns, 2, 3]))
    assert_same(heights, [30.0, 10.0, -10.0])
    centre = columns + paths.GRID_AZIMUTHS.index(0)
    assert_same(cameras.c2w[centre], cameras.cond_c2w)
    assert relative_pose(cameras.cond_c2w, cameras.c2w[centre + 1])[0, 3] > 0
    assert_looks_at_the_origin(cameras.c2w)


def test_poses_are_azimuth_elevation_and_radius_relative_to_the_photo():
    cameras = paths.poses(["0,0,1", "90,-20,2", " -30 , 5 , .5 "], FOV, 20.0)
    assert_same(cameras.c2w[0], cameras.cond_c2w)
    assert_same(cameras.c2w[1, :3, 3], 2 * Y)
    assert_same(cameras.c2w[:, :3, 3].norm(dim=-1), [1.0, 2.0, 0.5])
    assert_looks_at_the_origin(cameras.c2w)


@pytest.mark.parametrize("text", ["30,10", "30,10,1,2", "a,b,c", "", "30,10,nan", "30,80,1",
                                  "30,10,0", "30,10,-1"])
def test_impossible_poses_are_one_line_errors(text):
    with pytest.raises(ValueError) as error:
        paths.poses([text], FOV, 20.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, views, by, elevation", [
    ("orbit", 0, 360, 0), ("zoom", 4, 0, 0), ("zoom", 4, -2, 0), ("somersault", 4, 1, 0),
    ("orbit", 4, 360, 90.0), ("orbit", 4, 360, math.nan)])
def test_impossible_motions_are_one_line_errors(name, views, by, elevation):
    with pytest.raises(ValueError):
        paths.motion(name, views, by, FOV, elevation)


# ---- files

def some_cameras(n=4):
    azimuth = torch.linspace(10, 80, n)
    return paths.around(azimuth, torch.linspace(-20, 40, n), torch.linspace(1, 3, n))


def write_re10k(file, c2w, fov):
    focal = 0.5 / math.tan(fov / 2)         # of the height; the width is 16 / 9 of it
    w2c = torch.linalg.inv(opengl_from_opencv(c2w))
    poses = [" ".join(map(str, w[:3].flatten().tolist())) for w in w2c]
    lines = [f"{i} {focal * 9 / 16} {focal} 0.5 0.5 0 0 {pose}" for i, pose in enumerate(poses)]
    file.write_text("https://www.youtube.com/watch?v=x\n" + "\n".join(lines) + "\n")


def quaternion(r):
    """(w, x, y, z) of a rotation whose w is not near 0."""
    w = math.sqrt(1 + r.trace().item()) / 2
    return w, *(torch.stack([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]) / (4 * w))


def write_colmap(file, c2w):
    lines = ["# Image list with two lines of data per image:", "# IMAGE_ID, QW, ..."]
    order = [2, 0, 3, 1]                    # COLMAP's order is that of registration
    for i in order:
        w2c = torch.linalg.inv(opengl_from_opencv(c2w[i]))
        numbers = [*quaternion(w2c[:3, :3]), *w2c[:3, 3]]
        lines += [f"{i + 1} " + " ".join(str(float(x)) for x in numbers) + f" 1 frame_{i:02d}.png",
                  "" if i % 2 else "1.5 2.5 -1 3.5 4.5 7"]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("rows", [3, 4])
def test_a_json_list_of_matrices_is_read(tmp_path, rows):
    c2w, file = some_cameras(), tmp_path / "path.json"
    file.write_text(json.dumps(c2w[:, :rows].tolist()))
    cameras = paths.read(file, FOV)
    assert_same(cameras.c2w, c2w)
    assert_same(cameras.cond_c2w, c2w[0])
    assert_same(cameras.fov, torch.full((4,), FOV))


def test_written_cameras_are_read_back(tmp_path):
    zoom, file = path("zoom", views=4), tmp_path / "cameras.json"
    paths.write(file, zoom, 64, [f"views/{i:03d}.png" for i in range(4)], "cond.png")
    stored = json.loads(file.read_text())
    assert stored["w"] == stored["h"] == 64 and stored["cx"] == 32
    assert [frame["file_path"] for frame in stored["frames"]][:2] == ["cond.png", "views/000.png"]
    cameras = paths.read(file, 1.0)
    assert_same(cameras.cond_c2w, zoom.cond_c2w)
    assert_same(cameras.c2w[1:], zoom.c2w)
    assert_same(cameras.fov[1:], zoom.fov)


def test_transforms_json_with_one_angle_for_all_is_read(tmp_path):
    c2w, file = some_cameras(), tmp_path / "transforms.json"
    frames = [{"file_path": "x", "transform_matrix": pose.tolist()} for pose in c2w]
    file.write_text(json.dumps({"camera_angle_x": 0.9, "frames": frames}))
    assert_same(paths.read(file, FOV).fov, torch.full((4,), 0.9))
    # a wide image: the square in its middle is as high as the image
    file.write_text(json.dumps({"fl_x": 100.0, "w": 300, "h": 200, "frames": frames}))
    assert_same(paths.read(file, FOV).fov, torch.full((4,), math.pi / 2))
    wide = {"camera_angle_x": 2 * math.atan(1.5), "w": 300, "h": 200, "frames": frames}
    for known in (wide, {**wide, "fl_x": 100.0}, {**wide, "fl_x": 90.0, "fl_y": 100.0},
                  {**wide, "camera_angle_x": math.pi / 2, "w": 200, "h": 300}):
        file.write_text(json.dumps(known))
        assert_same(paths.read(file, FOV).fov, torch.full((4,), math.pi / 2))


@pytest.mark.parametrize("text, says", [
    ('{"frames": 3}', "no list of frames"), ('"text"', "no list of frames"),
    ('[[[1, 0], [0, 1]]]', "camera 0 is of shape [2, 2]"), ('["x"]', "camera 0 is no matrix"),
    ('{"w": 3, "fl_x": 0, "frames": [{"transform_matrix": []}]}', "camera 0: fl_x is"),
    ('{"w": 3, "fl_x": "a", "frames": [{"transform_matrix": []}]}', "camera 0: fl_x is"),
    ('{"fl_x": 300, "frames": [{"transform_matrix": []}]}', "says nothing without w"),
    ('{"frames": [{}]}', "'transform_matrix' is missing")])
def test_what_is_wrong_with_a_file_of_cameras_is_said(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        paths.read(tmp_path / "a.json", FOV)


@pytest.mark.parametrize("pose", [
    torch.eye(4), torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])),
    torch.tensor([[1.0, 0, 0, 0], [0, 0.98, 0.199, 0], [0, -0.199, 0.98, 0], [0, 0, 0, 1]])])
def test_a_path_whose_up_is_not_z_is_drawn_in_its_first_cameras_frame(pose):
    pose = pose.double()
    assert torch.equal(pictures.standing(pose), pose)
    ahead = pose.clone()
    ahead[:3, 3] -= 0.1 * pose[:3, 2]
    cameras = paths.Cameras(pose, torch.stack([pose, ahead]), torch.ones(2), 1.0)
    assert len(pictures.path_picture(cameras).getcolors(10**6)) > 3


def test_shares_are_the_sizes_that_fields_of_view_have_at_one_distance():
    zoom = paths.motion("zoom", 3, 4, 1.2, 0)
    assert zoom.shares() == [1, 0.5, 0.25]
    assert zoom[1:].shares() == [0.5, 0.25] and zoom[[2]].cond_fov == 1.2
    assert paths.motion("zoom", 2, 0.5, 1.2, 0).shares() == [1, 2]
    assert paths.motion("orbit", 4, 90, 0.3, 10).shares() == [1] * 4


def test_realestate10k_text_is_read(tmp_path):
    c2w, file = some_cameras(), tmp_path / "0000cc6d8b108390.txt"
    write_re10k(file, c2w, 1.1)
    cameras = paths.read(file, FOV)
    assert_same(cameras.c2w, c2w)
    assert_same(cameras.fov, torch.full((4,), 1.1))


def test_colmap_images_are_read_in_the_order_of_their_names(tmp_path):
    c2w, file = some_cameras(), tmp_path / "images.txt"
    write_colmap(file, c2w)
    cameras = paths.read(file, FOV)
    assert_same(cameras.c2w, c2w)
    assert_same(cameras.fov, torch.full((4,), FOV))


def test_colmap_text_may_begin_with_blank_lines_and_number_its_images_without_zeros(tmp_path):
    c2w, file = some_cameras(), tmp_path / "images.txt"
    write_colmap(file, c2w)
    text = file.read_text()
    for i, number in enumerate((1, 2, 10, 11)):
        text = text.replace(f"frame_{i:02d}", f"frame{number}")
    file.write_text("\n\n" + text)
    assert_same(paths.read(file, FOV).c2w, c2w)


def test_other_files_of_colmap_are_not_taken_for_its_images(tmp_path):
    c2w, file = some_cameras(), tmp_path / "images.txt"
    write_colmap(file, c2w)
    images = [line for line in file.read_text().splitlines() if "frame" in line]
    file.write_text("\n".join(images) + "\n")          # without the points between
    with pytest.raises(ValueError, match="two lines an image"):
        paths.read(file, FOV)
    file.write_text("".join(f"{i} 1.5 2.5 3.5 9 9 9 0.5 1 2 1 3\n\n" for i in range(3)))
    with pytest.raises(ValueError, match="a quaternion is not of length 1"):
        paths.read(file, FOV)


@pytest.mark.parametrize("name", ["path", "path.JSON", "path.txt"])
def test_json_is_known_by_what_it_holds_and_may_have_a_byte_order_mark(name, tmp_path):
    c2w = some_cameras()
    (tmp_path / name).write_text(json.dumps(c2w.tolist()), encoding="utf-8-sig")
    assert_same(paths.read(tmp_path / name, FOV).c2w, c2w)


def sheared(c2w):
    c2w[2, 0, 1] += 0.1
    return c2w


def mirrored(c2w):
    c2w[1, :3, 0] *= -1
    return c2w


def infinite(c2w):
    c2w[3, 0, 3] = math.inf
    return c2w


def scaled(c2w):
    c2w[0, :3, :3] *= 2
    return c2w


def projective(c2w):
    c2w[1, 3, 3] = 2
    return c2w


@pytest.mark.parametrize("spoil, number", [(sheared, 2), (mirrored, 1), (infinite, 3), (scaled, 0),
                                           (projective, 1)])
def test_a_camera_that_is_not_rigid_is_named(tmp_path, spoil, number):
    file = tmp_path / "path.json"
    file.write_text(json.dumps(spoil(some_cameras()).tolist()))
    with pytest.raises(ValueError, match=f"path.json: camera {number} "):
        paths.read(file, FOV)


@pytest.mark.parametrize("name, content", [
    ("path.json", "[]"), ("path.json", "{}"), ("path.json", '{"frames": []}'),
    ("path.json", "[1, 2"), ("path.json", "[" * 10**5),
    ("path.json", '{"frames": [{"file_path": "x"}]}'), ("path.json", "[[[1, 2], [3, 4]]]"),
    ("path.json", '"text"'), ("path.json", "7"), ("path.json", "[[1, 2, 3]]"), ("path.json", ""),
    ("path.json", '{"frames": [{"transform_matrix": "x"}]}'), ("path.json", '{"frames": 3}'),
    ("path.json", '{"camera_angle_x": "x", "frames": [{"transform_matrix": [[1, 0, 0, 0]]}]}'),
    ("path.json", '{"fl_x": 0, "w": 4, "frames": [{"transform_matrix": [[1, 0, 0, 0]]}]}'),
    ("path.json", '[{"a": 1}]'), ("path.txt", ""), ("path.txt", "# nothing\n"),
    ("path.txt", "hello world\n"), ("path.txt", "1 0 0 0 0 0 0 0 1 a.png\n\n"),
    ("path.txt", "link\n" + " ".join("1" * 19) + "\n1 2 3\n"),
    ("path.txt", "link\n1 0 0 " + " ".join("1" * 16) + "\n"),
    ("path.txt", "link\n" + " ".join("x" * 19) + "\n")])
def test_other_files_are_one_line_errors_that_name_the_file(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        paths.read(file, FOV)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_binary_file_and_a_missing_file_are_named(tmp_path):
    file = tmp_path / "images.txt"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="images.txt"):
        paths.read(file, FOV)
    with pytest.raises(FileNotFoundError, match="no path file .*nowhere.json"):
        paths.read(tmp_path / "nowhere.json", FOV)
