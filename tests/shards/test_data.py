"""data.py against the reference's shards and Python's tarfile, and its order against itself."""

import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import forked
import golden
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from made import (SIDE, all_pairs, co3d_metadata, depth_png, encoded, re10k_metadata, read_source,
                  scene_members, write_source, write_tar)

import camera
import data
from shards import index, scenes, files
from configs import Source

HERE = os.path.dirname(__file__)
PATH = [os.path.dirname(data.__file__), os.path.dirname(HERE), HERE]    # of a process that we start
SHARDS = golden.FOLDER / "shards"
GEOMETRY, GEOMETRY_ARRAYS = golden.case("geometry")
BOUNDED = settings(max_examples=80, deadline=None, derandomize=True, database=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])


def pair_of(reader, scene, cond, target, mode):
    """One pair of two given views, as Pairs gives it."""
    pair = reader.pair(mode, scene, cond, target)
    for name in ("cond_c2w", "target_c2w"):
        pair[name] = scenes.whole_matrices(pair[name])
    for name in ("image_cond", "image_target"):
        pair[name] = pair[name].transpose(2, 0, 1)
    return {name: value if name == "uid" else torch.as_tensor(np.array(value))
            for name, value in pair.items()}


def indexed(path):
    return index.RawIndex(files.LocalFile(path), "co3d")


@pytest.fixture
def golden_shards(tmp_path):
    """The golden shards where indexes may be written beside them."""
    return shutil.copytree(SHARDS, tmp_path / "shards", copy_function=shutil.copyfile)


# ---- the reference's numbers

def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


@pytest.mark.parametrize("format", ["co3d", "re10k"])
def test_every_golden_pair_equals_the_reference(golden_shards, format):
    reader = read_source(golden_shards, format + "-{000000..000001}.tar", format=format, side=256)
    expected, description = golden.case(f"shards_{format}")[::-1]
    expected = {name: array.numpy() for name, array in expected.items()}
    yielded = [(scene, i, j) for scene in range(5) for i, j in itertools.permutations(range(6), 2)]
    assert len(yielded) == len(description["pairs"])
    for row, (scene, target, cond) in enumerate(yielded):
        pair = pair_of(reader, scene, cond, target, "7dof_quantile_scale")
        known, uid = reader.scene(scene), description["pairs"][row]["uid"]
        assert pair["uid"].split(":")[1:] == [known.name, f"{cond}->{target}"]
        assert known.name.replace("/", "_") == uid
        for side in ("cond", "target"):
            image = data.images(pair[f"image_{side}"])
            assert crc(image.permute(1, 2, 0).numpy()) == expected[f"crc32/image_{side}"][row]
            # The reference inverts a matrix that it holds as world-to-camera: float64 rounding.
            np.testing.assert_allclose(pair[f"{side}_c2w"], expected[f"{side}_cam2world"][row],
                                       rtol=0, atol=1e-13)
        assert crc(pair["depth_cond"].numpy()) == expected["crc32/depth_cond"][row]
        assert crc(reader.depth(scene, target)) == expected["crc32/depth_target"][row]
        for found, name in ((pair["fov"].rad2deg(), "fov_deg"), (pair["radius"], "scene_radius"),
                            (known.depth_scale, "scale_adjustment"),
                            (camera.focus_point(known.c2w), "focus_pt")):
            np.testing.assert_allclose(found, expected[name][row].squeeze(), rtol=1e-10)
        T = camera.conditioning("3dof", pair["cond_c2w"][None], pair["target_c2w"][None],
                                pair["fov"][None], pair["radius"][None])
        # T was stored as float32
        np.testing.assert_allclose(T[0], expected["T"][row], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("format", ["co3d", "re10k"])
def test_every_golden_frame_equals_the_reference(golden_shards, format):
    reader = read_source(golden_shards, f"{format}-*.tar", format=format, side=256)
    description, expected = golden.case(f"shards_{format}")
    for row, frame in enumerate(description["frames"]):
        image = data.images(reader.image(row // 6, row % 6)).permute(1, 2, 0)
        depth = torch.from_numpy(reader.depth(row // 6, row % 6))
        assert torch.equal(image[::32, ::32], expected["frame_images[:, ::32, ::32]"][row])
        assert torch.equal(depth[::32, ::32], expected["frame_depths[:, ::32, ::32, 0]"][row])
        assert crc(image.numpy()) == frame["image_crc32"]
        assert crc(depth.numpy()) == frame["depth_crc32"]
        assert (depth == 0).sum() == frame["depth_zero_pixels"]


@pytest.mark.parametrize("format", ["co3d", "re10k"])
def test_near_plane_quantiles_equal_the_reference(golden_shards, format):
    reader = read_source(golden_shards, f"{format}-*.tar", format=format, side=256)
    expected = golden.case(f"shards_{format}")[0]["nearplane_quantile_per_scene"]
    for scene, (uid, quantile) in enumerate(expected.items()):
        assert reader.scene(scene).name.replace("/", "_") == uid
        pair = pair_of(reader, scene, 0, 1, "7dof_stereomag_scale")
        assert pair["nearplane"].item() == pytest.approx(quantile, rel=1e-7)
        assert pair_of(reader, scene, 0, 1, "7dof")["nearplane"].isnan()


def test_the_last_scene_of_a_stream_is_delivered(golden_shards):
    reader = read_source(golden_shards, "co3d-*.tar", side=256)
    pairs = all_pairs(reader)
    drawn = {reader.scene(pairs.draw(k)[1]).name for k in range(100)}
    assert len(reader) == 6 and "chair/105_2035_18" in drawn


@pytest.mark.parametrize("format", ["co3d", "re10k"])
def test_field_of_view_and_depth_scale_are_those_of_the_first_stored_frame(tmp_path, format):
    case = GEOMETRY[f"{format}_get_combined_scene_data"]
    members = {}
    for frame, metadata in case["frame_metadata_in_insertion_order"]:
        members[f"a/b/frame{frame:06}_metadata.json"] = json.dumps(metadata).encode()
        members[f"a/b/frame{frame:06}.jpg"] = encoded(np.zeros((SIDE, SIDE, 3), np.uint8))
    write_tar(tmp_path / "a.tar", members)
    scene = read_source(tmp_path, "a.tar", format=format).scene(0)
    assert math.degrees(scene.fov) == pytest.approx(case["fov_deg"], rel=1e-12)
    assert scene.depth_scale == case["scale_adjustment"]
    expected = GEOMETRY_ARRAYS[f"{format}_scene/camtoworld"]
    torch.testing.assert_close(scene.c2w, expected, rtol=0, atol=1e-12)
    assert scene.radius == pytest.approx(GEOMETRY_ARRAYS[f"{format}_scene/scene_radius"].item())


def test_fields_of_view_equal_the_reference():
    for case in GEOMETRY["get_fov_degs"]:
        entries = [co3d_metadata(focal_length=case["focal_length"])]
        fov = index.co3d_cameras(entries, 0)[1]
        assert math.degrees(fov) == pytest.approx(case["fov_deg_used"], rel=1e-12)
    for case in GEOMETRY["re10k_get_fov_deg"]:
        entries = [re10k_metadata(intrinsics=np.linalg.inv(case["camtopix"]).tolist())]
        fov = index.re10k_cameras(entries, 0)[1]
        assert math.degrees(fov) == pytest.approx(case["fov_deg"], rel=1e-12)


def test_images_are_cropped_where_the_reference_crops():
    for case in GEOMETRY["central_crop_img_arr"]:
        height, width = case["h"], case["w"]
        place = np.stack(np.mgrid[:height, :width], axis=-1).astype(np.uint16)
        file = encoded(np.ascontiguousarray(place[..., 0]))
        if case["raises"]:
            size = f"{width}x{height}, the short side must be 256"
            with pytest.raises(files.Damaged, match=size):
                scenes.decode_image(file, 256)
        else:
            assert scenes.decode_image(file, 256).shape == (256, 256, 3)
            first = scenes.centre(place, 256)[0, 0]
            assert first.tolist() == [case["first_row"], case["first_col"]]


def test_depth_images_equal_the_reference():
    for name in ("landscape", "portrait"):
        file = GEOMETRY_ARRAYS[f"depth_png/{name}/png_bytes"].numpy().tobytes()
        expected = GEOMETRY_ARRAYS[f"depth_png/{name}/get_depth[::8, ::8, 0]"].clone()
        depth = scenes.decode_depth(file, 256, 1.0)
        expected[~expected.isfinite()] = 0
        assert np.array_equal(depth[::8, ::8], expected)
        assert depth.sum(dtype=np.float64) == pytest.approx(
            GEOMETRY[f"depth_png_{name}"]["sum_of_finite"], rel=1e-12)


def test_bytes_become_floats_exactly():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    expected = (pixels.double() / 255 * 2 - 1).float()
    assert torch.equal(data.images(pixels), expected)
    file = GEOMETRY_ARRAYS["image_png/rgb/png_bytes"].numpy().tobytes()
    image = data.images(torch.tensor(scenes.decode_image(file, 256)))
    assert torch.equal(image[::8, ::8], GEOMETRY_ARRAYS["image_png/rgb/out[::8, ::8]"])


# ---- damage

LEFT_OUT = {        # found in the index: the scene is never drawn
    "bad_missing_depth": index.WITHOUT_DEPTH,       # this view alone
    "bad_image_without_camera": "the images are not those of the cameras",
    "bad_camera_without_image": "the images are not those of the cameras",
    "bad_bad_frame_name": "the images are not those of the cameras",
    "bad_metadata_not_json": "metadata is not JSON",
    "bad_metadata_missing_field": "metadata lacks scale_adjustment",
    "bad_principal_point": "the principal point is not the centre",
    "bad_nonsquare_pixels": "pixels are not square",
    "bad_singular_extrinsics": "a camera is not rigid",
}
REPLACED = {        # found in an image: another pair is taken
    "bad_wrong_image_size": "wrong image size",
    "bad_image_not_png": "image cannot be decoded",
}


def test_every_golden_bad_shard_is_tested():
    tested = {*LEFT_OUT, *REPLACED, "bad_truncated", "bad_garbage", "bad_empty"}
    assert tested == {path.stem for path in SHARDS.glob("bad_*.tar")}


@pytest.mark.parametrize("shard", [*LEFT_OUT, *REPLACED])
def test_a_bad_scene_is_skipped_and_the_others_are_delivered(golden_shards, shard):
    format = "re10k" if shard in ("bad_nonsquare_pixels", "bad_singular_extrinsics") else "co3d"
    reader = read_source(golden_shards, f"{shard}.tar", format=format, side=256)
    names = ["book/100_2000_13", "bowl/101_2007_14", "chair/102_2014_15"]
    if format == "re10k":
        names = [f"realestate10k/00009f3a21bc{end}" for end in ("77d1", "7ba2", "7f73")]
    items = [all_pairs(reader)[k] for k in range(40)]
    seen = {item["uid"].split(":")[1] for item in items}
    damage = [line.split("\t") for item in items for line in item["damage"].splitlines()]
    if shard in LEFT_OUT:
        assert reader.report[LEFT_OUT[shard]] == 1 and not damage
        assert any(line.startswith(f"{shard}.tar: {names[1]}") and LEFT_OUT[shard] in line
                   for line in reader.problems)
    else:
        assert {tuple(line[:2]) for line in damage} == {("here", REPLACED[shard])}
        assert all(line[2].startswith(f"{shard}.tar: {names[1]}") for line in damage)
    # An unreadable image spoils its own pairs alone: two of the three views of that scene are good.
    # So does a view without the depth that the other two have.
    partly = shard in ("bad_image_not_png", "bad_missing_depth")
    assert seen == ({*names} if partly else {names[0], names[2]})


def test_names_that_are_no_text_are_said_in_one_line_that_can_be_printed(tmp_path):
    write_tar(tmp_path / "a.tar", {"\udc89PNG\r\n": b"1"})
    with pytest.raises(ValueError, match=r"a.tar: \?PNG\?\?: member of another name") as caught:
        read_source(tmp_path, "a.tar")
    str(caught.value).encode()


def test_a_member_of_another_name_is_ignored_and_counted(golden_shards):
    reader = read_source(golden_shards, "bad_bad_frame_name.tar", side=256)
    assert reader.report["member of another name, ignored"] == 1


def test_intact_scenes_of_a_truncated_shard_are_delivered(golden_shards):
    reader = read_source(golden_shards, "bad_truncated.tar", side=256)
    assert [reader.scene(i).name for i in range(2)] == ["book/100_2000_13", "bowl/101_2007_14"]
    assert reader.report == {"damaged archive": 1}
    assert reader.problems == ["bad_truncated.tar: the file is cut: no end-of-archive block, "
                               "at byte 30720: damaged archive"]
    assert all_pairs(reader)[0]["damage"] == ""


@pytest.mark.parametrize("shard", ["bad_garbage", "bad_empty"])
def test_a_file_that_is_no_tar_is_counted_beside_others_and_refused_alone(golden_shards, shard):
    with pytest.raises(ValueError, match=f"no usable scene .*{shard}.tar: .* at byte 0"):
        read_source(golden_shards, f"{shard}.tar", side=256)
    shutil.copyfile(golden_shards / f"{shard}.tar", golden_shards / "co3d-000002.tar")
    reader = read_source(golden_shards, "co3d-*.tar", side=256)
    assert len(reader) == 6 and reader.report == {"damaged archive": 1}
    assert "left out: damaged archive (1)" in reader.summary()


def test_a_scene_of_one_view_is_left_out(tmp_path):
    write_tar(tmp_path / "a.tar", scene_members("a/one", views=1) | scene_members("a/two", views=2))
    reader = read_source(tmp_path, "a.tar")
    assert len(reader) == 1 and reader.report == {"fewer than two views": 1}


@pytest.mark.parametrize("metadata, reason", [
    (co3d_metadata(T=[0.0, math.nan, 1.0]), "T has another shape or is not finite"),
    (co3d_metadata(T=[0.0, 1.0]), "T has another shape|T is not numbers"),
    (co3d_metadata(T="north"), "T is not numbers"),
    (co3d_metadata(R=(1.01 * np.eye(3)).tolist()), "a camera is not rigid"),
    (co3d_metadata(R=np.diag([1.0, 1.0, -1.0]).tolist()), "a camera is not rigid"),
    (co3d_metadata(focal_length=[2.0, 0.0]), "focal_length or scale_adjustment is not positive"),
    (co3d_metadata(scale_adjustment=-1.0), "focal_length or scale_adjustment is not positive"),
    (co3d_metadata(scale_adjustment=10**400), "scale_adjustment is not numbers"),
    ([1, 2], "R is not numbers"),
    (re10k_metadata(extrinsics=np.diag([1.0, 1, 1, 2]).tolist()), "a camera is not rigid"),
    (re10k_metadata(intrinsics=np.zeros((3, 3)).tolist()), "intrinsics are singular"),
    (re10k_metadata(intrinsics=np.diag([1.0, 1, 1]).tolist()), "field of view is not positive"),
    (re10k_metadata(intrinsics=np.diag([1e200, 1, 1e-200]).tolist()), "pixels are not square"),
    (co3d_metadata(T=[1e300, 0.0, 1.0]), "a camera is farther than 1e.12 from the origin"),
    (co3d_metadata(R=(1e200 * np.eye(3)).tolist()), "a camera is not rigid"),
])
def test_a_bad_camera_spoils_its_scene(tmp_path, metadata, reason):
    re10k = "extrinsics" in metadata
    members = scene_members("a/b", metadata=re10k_metadata if re10k else co3d_metadata)
    members["a/b/frame000001_metadata.json"] = json.dumps(metadata).encode()
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=f"no usable scene in 1 shards: a.tar: a/b: .*({reason})"):
        read_source(tmp_path, "a.tar", format="re10k" if re10k else "co3d")


def test_deep_and_huge_metadata_is_refused(tmp_path):
    deep, huge = scene_members("a/deep"), scene_members("a/huge")
    deep["a/deep/frame000001_metadata.json"] = b"[" * 60_000
    huge["a/huge/frame000001_metadata.json"] = b" " * (index.MAX_METADATA + 1)
    write_tar(tmp_path / "a.tar", deep | huge)
    with pytest.raises(ValueError) as caught:
        read_source(tmp_path, "a.tar")
    for line in ("a.tar: a/deep/frame000001_metadata.json: metadata is not JSON",
                 "a.tar: a/huge: a member is too large"):
        assert line in str(caught.value)


def png_that_claims(width, height):
    """A PNG header, and no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    return head + struct.pack(">II", zlib.crc32(chunk), 0) + b"IDAT" + struct.pack(
        ">I", zlib.crc32(b"IDAT"))


def test_images_of_absurd_size_are_refused_before_they_are_decoded():
    with pytest.raises(files.Damaged, match="wrong image size .60000x8"):
        scenes.decode_image(png_that_claims(60_000, SIDE), SIDE)
    with pytest.raises(files.Damaged, match="DecompressionBombError"):
        scenes.decode_image(png_that_claims(60_000, 60_000), 60_000)


def test_a_cut_image_is_damage():
    file = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    with pytest.raises(files.Damaged, match="a.tar: a/b: image cannot be decoded"):
        scenes.decode_image(file[:len(file) // 2], 64, "a.tar: a/b")


def test_other_kinds_of_image_become_rgb():
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8))
    grey, rgba, grey_alpha = rgb.convert("L"), rgb.copy(), rgb.convert("L")
    rgba.putalpha(alpha)
    grey_alpha.putalpha(alpha)
    palette = rgb.quantize(16)
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 99)

    def over_white(image):
        share = np.asarray(alpha, np.float64)[..., None] / 255
        return np.asarray(image, np.float64) * share + 255 * (1 - share)

    for name, image, expected in (
            ("rgb", rgb, rgb), ("grey", grey, grey.convert("RGB")),
            ("grey16", grey16, grey.convert("RGB")), ("palette", palette, palette.convert("RGB")),
            ("rgba", rgba, over_white(rgb)),
            ("grey and alpha", grey_alpha, over_white(grey.convert("RGB")))):
        found = scenes.decode_image(encoded(image), SIDE)
        # Half a step of rounding, and Pillow's own in the integer blend.
        assert np.abs(found - np.asarray(expected, np.float64)).max() <= 1, name
    clear = encoded(palette, transparency=palette.getpixel((0, 0)))
    assert scenes.decode_image(clear, SIDE)[0, 0].tolist() == [255, 255, 255]


def test_jpeg_and_webp_are_read(tmp_path):
    colour = np.full((SIDE, SIDE, 3), 200, np.uint8)
    members = scene_members("a/b")
    for view, suffix, options in ((1, "jpg", {"format": "JPEG"}), (2, "jpeg", {"format": "JPEG"}),
                                  (3, "webp", {"format": "WEBP", "lossless": True})):
        del members[f"a/b/frame{view:06}.png"]
        members[f"./a/b/frame{view:06}.{suffix}"] = encoded(colour, **options)
    write_tar(tmp_path / "a.tar", members)
    reader = read_source(tmp_path, "a.tar")
    assert all((reader.image(0, view) - 200.0).abs().max() <= 1 for view in range(3))


def test_depths_that_are_not_finite_or_negative_are_unknown():
    depth = np.ones((SIDE, SIDE))
    depth[0, :4] = np.inf, -np.inf, np.nan, -2.0
    found = scenes.decode_depth(depth_png(depth), SIDE, 2.0)
    assert found.dtype == np.float32 and found[0].tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(files.Damaged, match="depth is not a 16-bit grey PNG"):
        scenes.decode_depth(encoded(np.zeros((SIDE, SIDE), np.uint8)), SIDE, 1.0)


def test_a_scene_without_any_depth_has_unknown_depth(tmp_path):
    members = {name: file for name, file in scene_members("a/b").items() if "depth" not in name}
    write_tar(tmp_path / "a.tar", members)
    reader = read_source(tmp_path, "a.tar")
    assert not reader.has_depth and reader.report == {}
    assert not pair_of(reader, 0, 0, 1, "7dof_quantile_scale")["depth_cond"].any()
    assert math.isnan(reader.nearplane(0))


def test_depth_is_read_only_where_the_mode_needs_it(tmp_path):
    members = scene_members("a/b")
    members["a/b/frame000001_depth.png"] = b"no depth"
    write_tar(tmp_path / "a.tar", members)
    reader = read_source(tmp_path, "a.tar")
    assert "depth_cond" not in pair_of(reader, 0, 0, 1, "7dof") and reader.has_depth
    for mode in ("7dof_quantile_scale", "7dof_metric_scale", "7dof_stereomag_scale"):
        with pytest.raises(files.Damaged, match="frame000001_depth.png: image cannot be decoded"):
            pair_of(reader, 0, 0, 1, mode)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_much_damage_stops_the_run_and_names_the_files(tmp_path, workers, caplog):
    members = scene_members("a/b") | {"a/b/frame000002.png": b"text"}
    write_tar(tmp_path / "a.tar", members)
    pairs = all_pairs(read_source(tmp_path, "a.tar"))
    loader = data.Loader(pairs, data.Batches(0, 100, 10, 10), workers)
    line = (r"^\d+ of 2\d\d draws were damaged, more than 5%: "
            r"a.tar: a/b/frame000002: image cannot be decoded[^\n]*$")
    whole = 10                          # pairs of the batch that is refused
    with pytest.raises(ValueError, match=line) as caught:
        for batch in loader:
            assert "damage" not in batch
            whole += len(batch["uid"])
    damaged, draws = (int(number) for number in re.findall(r"\d+", str(caught.value))[:2])
    assert draws == whole + damaged
    assert 60 < loader.report["here"]["image cannot be decoded"] < 260
    assert len([line for line in caplog.messages if "frame000002" in line]) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_an_intact_pair_ends_in_one_line(tmp_path, workers):
    members = {name: b"text" if name.endswith("1.png") else file
               for name, file in scene_members("a/b", views=2).items()}
    write_tar(tmp_path / "a.tar", members)
    pairs = all_pairs(read_source(tmp_path, "a.tar"))
    loader = data.Loader(pairs, data.Batches(0, 1, 2, 2), workers)
    line = "^source 'here': 100 damaged draws on end: a.tar: a/b/frame000001[^\n]*$"
    with pytest.raises(ValueError, match=line):
        list(loader)


@BOUNDED
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_shard_is_read_or_reported(tmp_path, changes):
    content = bytearray(MUTATED.getvalue())
    for at, byte in changes:
        content[at % len(content)] = byte
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "a.tar.co3d.index").unlink(missing_ok=True)
    try:
        reader = read_source(tmp_path, "a.tar")
        all_pairs(reader, "7dof_stereomag_scale")[0]
        all_pairs(reader, "7dof_quantile_scale")[0]
    except ValueError as err:
        assert re.search("no usable scene|damaged draws on end", str(err))


MUTATED = io.BytesIO()
write_tar(MUTATED, scene_members("a/b", views=2))


# ---- index

def forbid_reading(monkeypatch):
    monkeypatch.setattr(index, "tar_members", lambda path: pytest.fail("it was read again"))


def same_index(a, b):
    names = ("starts", *index.RawIndex.SCENE.names, *index.RawIndex.VIEW.names)
    return a.scenes == b.scenes and a.problems == b.problems and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_an_index_is_read_from_its_cache(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", scene_members("a/b") | scene_members("a/one", views=1))
    built = indexed(path)
    assert (tmp_path / "a.tar.co3d.index").exists()
    forbid_reading(monkeypatch)
    assert same_index(built, indexed(path)) and built.problems


@pytest.mark.parametrize("rank, first", [(0, 0), (1, 1), (2, 3), (3, 5)])
def test_ranks_begin_with_different_shards_and_keep_their_order(tmp_path, monkeypatch, rank, first):
    for i in range(7):
        write_tar(tmp_path / f"{i}.tar", scene_members(f"a/{i}"))
    asked = []
    monkeypatch.setattr(scenes, "INDEX_THREADS", 1)
    monkeypatch.setattr(scenes.RawScenes, "index", lambda scenes, file, *how: asked.append(file.path)
                        or index.RawIndex(file, *how))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    source = Source("here", "co3d", "*.tar", 1.0)
    reader = scenes.open_source(source, str(tmp_path), SIDE)
    names = [os.path.basename(path) for path in asked]
    assert names == [f"{(first + i) % 7}.tar" for i in range(7)]
    assert [reader.scene(i).name for i in range(7)] == [f"a/{i}" for i in range(7)]


def test_an_index_is_made_anew_when_size_or_time_change(tmp_path):
    path = write_tar(tmp_path / "a.tar", scene_members("a/b"))
    assert indexed(path).scenes == ["a/b"]
    before = os.stat(path)
    write_tar(path, scene_members("a/c"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert os.stat(path).st_size == before.st_size and indexed(path).scenes == ["a/c"]
    before = os.stat(path)
    write_tar(path, scene_members("a/d", views=9))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size != before.st_size and indexed(path).scenes == ["a/d"]


def test_an_index_of_another_version_or_a_damaged_one_is_made_anew(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", scene_members("a/b"))
    built, kept = indexed(path), tmp_path / "a.tar.co3d.index"
    content = kept.read_bytes()
    flipped = content[:300] + bytes([content[300] ^ 1]) + content[301:]
    for damaged in (b"", b"text", content[:200], content[:-40], flipped):
        kept.write_bytes(damaged)
        assert same_index(built, indexed(path))
    monkeypatch.setattr(index, "INDEX_VERSION", 99)
    reads = []
    monkeypatch.setattr(index, "tar_members", lambda path: reads.append(path) or iter(()))
    assert indexed(path).scenes == [] and reads


def test_an_index_goes_to_the_cache_folder_when_its_own_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    path = write_tar(tmp_path / "shards" / "a.tar", scene_members("a/b"))

    def read_only(place, content, real=Path.write_bytes):   # a superuser may write anywhere
        if place.parent == path.parent:
            raise PermissionError(13, "Permission denied", str(place))
        return real(place, content)

    monkeypatch.setattr(Path, "write_bytes", read_only)
    indexed(path)
    assert [file.name for file in (tmp_path / "shards").iterdir()] == ["a.tar"]
    assert len(list((tmp_path / "cache" / "zeronvs").iterdir())) == 1
    forbid_reading(monkeypatch)
    assert indexed(path).scenes == ["a/b"]


def test_a_flipped_bit_of_a_kept_index_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", scene_members("a/b", views=2))
    built, kept = indexed(path), tmp_path / "a.tar.co3d.index"
    content = kept.read_bytes()
    for bit in range(3, 8 * len(content), 211):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        kept.write_bytes(flipped)
        assert same_index(built, indexed(path)) and kept.read_bytes() == content


MANY = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from shards import index
from made import read_source
index.SMALL_INDEX = {small}
print(len(read_source({folder!r}, "*.tar")))
"""


@pytest.mark.parametrize("small", [index.SMALL_INDEX, 0])
def test_many_shards_start_again_with_few_descriptors(tmp_path, small):
    members = scene_members("a/b", views=2)
    for i in range(150):
        write_tar(tmp_path / f"{i}.tar", members)
    reader = read_source(tmp_path, "*.tar")
    code = MANY.format(folder=str(tmp_path), small=small)
    done = forked.run("-c", code)
    assert done.stdout == f"{len(reader)}\n", done.stderr
    kept = tmp_path / "0.tar.co3d.index"
    assert kept.stat().st_mtime_ns < max(os.stat(path).st_mtime_ns for path in tmp_path.iterdir())


def test_what_is_left_of_killed_index_writes_is_removed(tmp_path):
    write_tar(tmp_path / "a.tar", scene_members("a/b"))
    old, new = tmp_path / "a.tar.co3d.index.0123abcd", tmp_path / "a.tar.co3d.index.4567abcd"
    users = tmp_path / "a.tar.co3d.index.txt"
    for path in (old, new, users):
        path.write_text("half")
        os.utime(path, (0, 0) if path != new else None)
    read_source(tmp_path, "a.tar")
    assert [path.exists() for path in (old, new, users)] == [False, True, True]


def test_without_a_home_an_index_is_kept_beside_the_shard_or_in_the_temporary_folder(
        tmp_path, monkeypatch):
    monkeypatch.setattr(files.os.path, "expanduser", lambda path: path)     # nobody's entry
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    assert files.cache_folder().parent == tmp_path
    path = write_tar(tmp_path / "a.tar", scene_members("a/b"))
    assert indexed(path).scenes == ["a/b"] and (tmp_path / "a.tar.co3d.index").exists()
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    (tmp_path / "a.tar.co3d.index").unlink()
    monkeypatch.setattr(Path, "write_bytes", lambda place, content: open(tmp_path, "wb"))
    assert indexed(path).scenes == ["a/b"]


def test_no_place_for_an_index_is_no_error(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", scene_members("a/b"))
    monkeypatch.setattr(index.RawIndex, "places", lambda shard: [path / "no" / "folder"])
    assert indexed(path).scenes == ["a/b"]


def test_an_index_takes_at_most_40_bytes_a_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", scene_members("a/b", views=300))
    assert len(indexed(path).frames) == 300
    assert (tmp_path / "a.tar.co3d.index").stat().st_size <= 40 * 900


def test_scenes_whose_members_are_mixed_up_are_put_together(tmp_path):
    members = list((scene_members("a/b") | scene_members("a/c")).items())
    np.random.default_rng(0).shuffle(members)
    write_tar(tmp_path / "a.tar", dict(members))
    reader = read_source(tmp_path, "a.tar")
    straight = write_source(tmp_path, "s", 1)
    assert sorted(shard for shard in reader.shards[0].scenes) == ["a/b", "a/c"]
    torch.testing.assert_close(reader.scene(0).c2w, straight.scene(0).c2w)


# ---- order

@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three sources of different sizes."""
    folder = tmp_path_factory.mktemp("mixture")
    return [write_source(folder, "one", 4, shards=2), write_source(folder, "two", 5, views=5),
            write_source(folder, "three", 1, views=2)]


@pytest.fixture
def pairs(mixture):
    return data.Pairs(mixture, [0.5, 0.3, 0.2], 7, SIDE, "7dof_quantile_scale")


def read_all(pairs, workers=0, **batches):
    return delivered(data.Loader(pairs, data.Batches(**batches), workers))


def delivered(batches):
    """{pair number: (uid, CRC of everything in it)}, in the order of delivery."""
    found = {}
    for batch in batches:
        for row, number in enumerate(batch["number"].tolist()):
            assert number not in found
            tensors = [value[row] for value in batch.values() if isinstance(value, torch.Tensor)]
            found[number] = batch["uid"][row], crc(np.concatenate(
                [np.frombuffer(tensor.numpy().tobytes(), np.uint8) for tensor in tensors]))
    return found


FORK = multiprocessing.get_context("fork")          # of this process, which has imported torch


def started(function, *arguments):
    """(process that runs function(*arguments, a pipe's end), the other end)."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def send_share(pairs, rank, pipe):
    """Sends what a rank of two reads with four workers, a micro-batch at a time."""
    for batch in data.Loader(pairs, data.Batches(0, 1000, 8, 2, rank=rank, world=2), workers=4):
        pipe.send(delivered([batch]))


def test_the_sequence_is_the_same_for_any_ranks_workers_and_restarts(pairs):
    whole = read_all(pairs, start_step=0, steps=6, batch_size=8, micro_batch=3)
    assert list(whole) == list(range(48))
    for world in (2, 4):
        parts = [read_all(pairs, start_step=0, steps=6, batch_size=8, micro_batch=3,
                          rank=rank, world=world) for rank in range(world)]
        for rank, part in enumerate(parts):
            share = 8 // world
            assert all(number % 8 // share == rank for number in part)
        assert {number: pair for part in parts for number, pair in part.items()} == whole
    # Two ranks with four workers each are killed after three steps, of two micro-batches each; one
    # rank goes on, without workers.
    seen = {}
    for rank in range(2):
        process, pipe = started(send_share, pairs, rank)
        for _ in range(3 * 2):
            seen |= pipe.recv()
        process.kill()
        process.join()
    assert sorted(seen) == list(range(24))
    rest = read_all(pairs, start_step=3, steps=6, batch_size=8, micro_batch=8)
    assert seen | rest == whole and list(rest) == list(range(24, 48))


def send_death(pairs, pipe):
    """Sends what a loader whose worker is killed ends with."""
    loader = data.Loader(pairs, data.Batches(0, 10**6, 4, 4), 1)
    try:
        for batch in loader:
            os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    except (RuntimeError, ChildProcessError) as err:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # PyTorch's handler raises too
        pipe.send(data.is_dead_worker(err) or str(err) == data.DEAD_WORKER)


def test_a_loader_process_that_dies_ends_the_loop(pairs):
    process, pipe = started(send_death, pairs)
    assert pipe.recv() is True
    process.join()
    assert not data.is_dead_worker(RuntimeError("CUDA out of memory"))


def test_scenes_are_drawn_by_their_views(tmp_path):
    """As many pairs a view, whatever its scene: the reference draws a share of a scene's views."""
    members = {}
    for name, views in (("few", 2), ("many", 18)):
        members |= scene_members(f"a/{name}", views=views)
    path = write_tar(tmp_path / "a.tar", members)
    source = read_source(tmp_path, path.name)
    drawn = data.Pairs([source], [1.0], 0, SIDE, "7dof")
    scenes_drawn = np.array([drawn.draw(k)[1] for k in range(4000)])
    share = (source.counts[scenes_drawn] == 18).mean()
    assert abs(share - 0.9) < 5 * (0.9 * 0.1 / 4000)**0.5
    pairs_drawn = {drawn.draw(k)[1:] for k in range(4000)}
    assert len(pairs_drawn) == 2 + 18 * 17


def test_another_seed_gives_other_pairs(mixture, pairs):
    other = data.Pairs(mixture, [0.5, 0.3, 0.2], 8, SIDE, "7dof_quantile_scale")
    assert sum(pairs.draw(k) == other.draw(k) for k in range(200)) < 20


def test_the_pairs_of_a_seed_never_change(pairs):
    # Written down once: a change of these numbers breaks the resume of every run.
    assert [pairs.draw(k) for k in range(3)] == [(1, 0, 4, 0), (0, 0, 2, 0), (0, 1, 1, 2)]
    assert pairs.draw(10**12, attempt=1) == (0, 3, 1, 0)
    ordered = data.Pairs(pairs.readers, [0.5, 0.3, 0.2], 7, SIDE, "7dof", ordered=True)
    assert [ordered.draw(k) for k in range(3)] == [(0, 6, 0, 2), (0, 0, 0, 1), (0, 7, 1, 2)]


def test_a_pair_outlives_pickling_and_a_spawned_worker(pairs):
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy[5]["uid"] == pairs[5]["uid"]
    loader = data.Loader(pairs, data.Batches(2, 3, 4, 4), workers=1)
    loader.multiprocessing_context = "spawn"
    batch = next(iter(loader))
    assert batch["uid"] == [pairs[k]["uid"] for k in range(8, 12)]
    expected = torch.stack([pairs[k]["image_cond"] for k in range(8, 12)])
    assert torch.equal(batch["image_cond"], expected)


HALF_READ = """
import sys
sys.path.insert(0, {code!r})
import data, configs
from shards import scenes
if __name__ == "__main__":
    source = configs.Source("made", "co3d", "*.tar", 1.0)
    pairs = data.Pairs([scenes.open_source(source, {folder!r}, {side})], [1.0], 0, {side}, "3dof")
    loader = data.Loader(pairs, data.Batches(0, 1000, 4, 4), workers=1)
    loader.multiprocessing_context = {context!r}
    batches = iter(loader)
    print(next(batches)["number"].tolist())
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_program_ends_although_its_loader_is_half_read(tmp_path, context):
    # workers ignore SIGTERM, with which multiprocessing would end them before it awaits them
    write_source(tmp_path, "made", scenes=2)
    script = tmp_path / "half_read.py"
    code = os.path.dirname(data.__file__)
    script.write_text(HALF_READ.format(code=code, folder=str(tmp_path), side=SIDE, context=context))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2, 3]\n"), done.stderr


def within_4_sigma(counts, shares, total):
    for key, share in shares.items():
        sigma = math.sqrt(total * share * (1 - share))
        assert abs(counts[key] - total * share) <= 4 * sigma, key


def test_sources_scenes_and_views_are_drawn_with_their_shares(mixture, pairs):
    total = 20_000
    draws = [pairs.draw(k) for k in range(total)]
    assert all(cond != target for *_, cond, target in draws)
    within_4_sigma(Counter(source for source, *_ in draws), {0: 0.5, 1: 0.3, 2: 0.2}, total)
    of_two = [draw for draw in draws if draw[0] == 1]
    scenes = Counter(scene for _, scene, *_ in of_two)
    within_4_sigma(scenes, dict.fromkeys(range(5), 1 / 5), len(of_two))
    views = Counter((cond, target) for *_, cond, target in of_two)
    within_4_sigma(views, dict.fromkeys(itertools.permutations(range(5), 2), 1 / 20), len(of_two))
    of_one = Counter(scene for source, scene, *_ in draws if source == 0)
    within_4_sigma(of_one, dict.fromkeys(range(8), 1 / 8), of_one.total())


def test_a_replacement_comes_from_the_same_source(pairs):
    assert all(pairs.draw(k, attempt)[0] == pairs.draw(k)[0]
               for k in range(50) for attempt in range(1, 4))
    assert len({pairs.draw(0, attempt) for attempt in range(20)}) > 5


def test_a_damaged_pair_is_replaced_by_the_same_pair_every_time(tmp_path):
    members = scene_members("a/b", views=6) | scene_members("a/c", views=6)
    members["a/b/frame000002.png"] = members["a/c/frame000005.png"] = b"text"
    write_tar(tmp_path / "a.tar", members)
    pairs = all_pairs(read_source(tmp_path, "a.tar"))
    items = [pairs[k] for k in range(60)]
    again = all_pairs(read_source(tmp_path, "a.tar"))
    assert [again[k]["uid"] for k in reversed(range(60))] == [item["uid"] for item in items][::-1]
    # What is found intact stays where it was drawn, whatever was damaged before.
    for k, item in enumerate(items):
        if not item["damage"]:
            _, scene, cond, target = pairs.draw(k)
            assert item["uid"] == f"a.tar:{pairs.readers[0].scene(scene).name}:{cond}->{target}"
    assert sum(bool(item["damage"]) for item in items) > 10


def test_the_fixed_pass_has_every_pair_once_and_begins_with_every_scene(mixture):
    pairs = data.Pairs(mixture, [0.5, 0.3, 0.2], 7, SIDE, "7dof", ordered=True)
    draws = [pairs.draw(k) for k in range(len(pairs))]
    assert len(draws) == len(set(draws)) == 8 * 6 + 5 * 20 + 2
    assert len({draw[:2] for draw in draws[:14]}) == 14
    assert len({draw[:2] for draw in draws[14:28]}) == 14
    assert all(cond != target for *_, cond, target in draws)
    assert [item["number"] for item in pairs] == list(range(len(pairs)))


def test_micro_batches_divide_a_ranks_share():
    batches = data.Batches(1, 3, 10, 3, rank=1, world=2)
    assert list(batches) == [[15, 16, 17], [18, 19], [25, 26, 27], [28, 29]]
    assert list(data.Batches(3, 3, 4, 4)) == list(data.Batches(5, 3, 4, 4)) == []
    with pytest.raises(ValueError, match="batch_size 10 does not divide among 3 processes"):
        data.Batches(0, 1, 10, 3, world=3)


def test_items_are_what_they_are_said_to_be(pairs):
    item = pairs[3]
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in item.items()
              if isinstance(value, torch.Tensor)}
    number, matrix = ((), torch.float64), ((4, 4), torch.float64)
    image = ((3, SIDE, SIDE), torch.uint8)
    assert shapes == {
        "image_cond": image, "image_target": image, "cond_c2w": matrix, "target_c2w": matrix,
        "fov": number, "radius": number, "nearplane": number,
        "depth_cond": ((SIDE, SIDE), torch.float32), "number": ((), torch.int64)}
    item["cond_c2w"] += 1       # belongs to the caller
    assert not torch.equal(pairs[3]["cond_c2w"], item["cond_c2w"])


# ---- sources

def test_sources_that_cannot_be_used_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", scene_members("a/one", views=1))
    with pytest.raises(ValueError, match="'here': no usable scene in 1 shards: .*: fewer than two"):
        read_source(tmp_path, "a.tar")
    with pytest.raises(ValueError, match="'here' has no held_out"):
        scenes.open_source(Source("here", "co3d", "a.tar", 1.0), tmp_path, SIDE, held_out=True)
    with pytest.raises(ValueError, match="no usable scene .*member of another name, ignored"):
        read_source(tmp_path, "a.tar", format="encoded")


@pytest.mark.parametrize("held_out", ["pipe:touch run", "pipe:cat a.tar"])
def test_a_command_in_held_out_shards_is_refused_and_not_run(tmp_path, monkeypatch, held_out):
    monkeypatch.chdir(tmp_path)
    source = Source("here", "co3d", "train.tar", 1.0, held_out=held_out)
    with pytest.raises(ValueError, match="'here': held_out 'pipe:.* is a command, which has no fix"):
        scenes.open_source(source, tmp_path, SIDE, held_out=True)
    assert not any(tmp_path.iterdir())


def test_images_of_another_size_are_refused_at_start_with_both_sizes(tmp_path):
    write_tar(tmp_path / "a.tar", scene_members("a/b", side=64))
    line = r"^source 'here': a.tar: a/b/frame000001: wrong image size .64x64, the short side must be 32.$"
    for _ in range(2):              # built, and kept
        with pytest.raises(ValueError, match=line):
            read_source(tmp_path, "a.tar", side=32)
    write_tar(tmp_path / "0.tar", scene_members("a/c", side=32))    # the first is: damage, as it comes
    assert len(read_source(tmp_path, "*.tar", side=32)) == 2


def test_a_view_without_the_depth_that_others_have_is_left_out(tmp_path):
    members = scene_members("a/b", views=5) | scene_members("a/c", views=3)
    for name in ("a/b/frame000001", "a/b/frame000004", "a/c/frame000001", "a/c/frame000002"):
        del members[f"{name}_depth.png"]
    write_tar(tmp_path / "a.tar", members)
    reader = read_source(tmp_path, "a.tar")
    assert reader.counts.tolist() == [3] and reader.has_depth
    assert reader.shards[0].frames.tolist() == [2, 3, 5]
    assert reader.report == {index.WITHOUT_DEPTH: 2, "fewer than two views have depth": 1}


def test_held_out_shards_are_read_for_scores(tmp_path):
    for name in ("train", "test"):
        write_tar(tmp_path / f"{name}.tar", scene_members(f"a/{name}"))
    source = Source("here", "co3d", "train.tar", 1.0, held_out="test.tar")
    assert scenes.open_source(source, tmp_path, SIDE).scene(0).name == "a/train"
    assert scenes.open_source(source, tmp_path, SIDE, held_out=True).scene(0).name == "a/test"


def test_pairs_refuse_what_does_not_fit(mixture):
    for readers, shares, side, mode, message in (
            (mixture, [0.5, 0.5], SIDE, "7dof", "3 sources need as many probabilities"),
            (mixture, [0.5, 0.5, 0.5], SIDE, "7dof", "of sum 1"),
            (mixture, [0.5, 0.3, 0.2], 16, "7dof", "image_size 16 is not that of the sources"),
            (mixture, [0.5, 0.3, 0.2], SIDE, "8dof", "mode '8dof' is not known, it is one of 3dof")):
        with pytest.raises(ValueError, match=message):
            data.Pairs(readers, shares, 0, side, mode)
