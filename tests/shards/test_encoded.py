"""Encoded shards: what is written is read, by slices, and what does not fit is refused."""

import json
import math
import struct

from captures import encode
import pytest
import torch
from made import all_pairs, encoded_scene, read_source, write_source, write_tar

import data
from shards import files
from configs import Source

SIDE = 32                       # pixels of the images whose latents are 4 x 4
MODE = "7dof_quantile_scale"


def write_encoded(path, seeds, **options):
    made = {f"a/scene_{seed}": encoded_scene(seed, **options) for seed in seeds}
    write_tar(path, {f"{name}.safetensors": encode.member(**scene) for name, scene in made.items()})
    return made


def open_encoded(folder, pattern="*.tar"):
    return read_source(folder, pattern, format="encoded", side=SIDE)


def test_a_pair_is_what_was_encoded_of_its_two_views(tmp_path):
    made = write_encoded(tmp_path / "a.tar", range(3)) | write_encoded(tmp_path / "b.tar", [3])
    source = open_encoded(tmp_path)
    assert len(source) == 4 and source.counts.tolist() == [4] * 4
    pairs = all_pairs(source, MODE)
    for k in range(60):
        item = pairs[k]
        _, name, views = item["uid"].split(":")
        cond, target = map(int, views.split("->"))
        scene = made[name]
        for key, expected in (
                ("moments_target", scene["moments"][target]),
                ("mean_cond", scene["moments"][cond, :4]), ("clip_cond", scene["clip"][cond]),
                ("cond_c2w", scene["c2w"][cond]), ("target_c2w", scene["c2w"][target]),
                ("fov", scene["fov"][cond]), ("scale", scene["scale"][cond]),
                ("radius", torch.tensor(scene["radius"], dtype=torch.float64)),
                ("nearplane", torch.tensor(scene["nearplane"], dtype=torch.float64))):
            assert torch.equal(item[key], expected) and item[key].dtype == expected.dtype, key


def test_only_the_quantile_mode_gets_the_views_scale(tmp_path):
    write_encoded(tmp_path / "a.tar", [0])
    assert "scale" not in all_pairs(open_encoded(tmp_path), "7dof")[0]
    assert "scale" in all_pairs(open_encoded(tmp_path), MODE)[0]


def test_a_view_of_unknown_scale_is_replaced_where_the_mode_needs_it(tmp_path):
    scene = encoded_scene(0)
    scene["scale"][1] = float("nan")
    write_tar(tmp_path / "a.tar", {"a/b.safetensors": encode.member(**scene)})
    pairs = all_pairs(open_encoded(tmp_path), MODE)
    items = [pairs[k] for k in range(40)]
    assert all(":1->" not in item["uid"] for item in items)
    assert {line.split("\t")[1] for item in items for line in item["damage"].splitlines()} == {
        "the scale of the conditioning view is not known"}
    assert any(":1->" in all_pairs(open_encoded(tmp_path), "7dof")[k]["uid"] for k in range(40))


def test_the_index_of_encoded_shards_is_kept_and_the_same(tmp_path, monkeypatch):
    write_encoded(tmp_path / "a.tar", range(3))
    before = all_pairs(open_encoded(tmp_path), MODE)[7]
    monkeypatch.setattr("shards.index.tar_members", lambda window: pytest.fail("read again"))
    after = all_pairs(open_encoded(tmp_path), MODE)[7]
    assert before["uid"] == after["uid"] and torch.equal(before["clip_cond"], after["clip_cond"])


def with_header(content, change):
    """A safetensors file whose header went through `change`."""
    length, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length:]


@pytest.mark.parametrize("change, reason", [
    (lambda header: header.pop("clip"), "its header is not that of an encoded scene"),
    (lambda header: header.pop("__metadata__"), "its header is not that of an encoded scene"),
    (lambda header: header["fov"].update(shape=[3]), r"fov is F64\[3\], or misplaced: not of 4 views"),
    (lambda header: header["clip"].update(dtype="I8"), r"clip is I8\[4, 6\]"),
    (lambda header: header["moments"].update(data_offsets=[0, 10**9]), "moments is F16"),
    (lambda header: header["moments"].update(data_offsets=[-5, 1019]), "moments is F16"),
    (lambda header: header["c2w"].update(shape=["4", 4, 4]), "not of 4 views"),
    (lambda header: header["c2w"].update(shape=[]), r"c2w is F64\[\]"),
    (lambda header: header["c2w"].update(data_offsets=[2**31, 2**31 + 512]), "c2w is F64"),
    (lambda header: header["fov"].update(data_offsets=[0.5, 32.5]), "fov is F64"),
    (lambda header: header["moments"].update(shape=[4, 2**31, 0, 0], data_offsets=[0, 0]), "moments"),
    (lambda header: header["moments"].update(shape=[4, 8, 0, 4], data_offsets=[0, 0]), r"moments is F16\[4, 8, 0, 4\]"),
    (lambda header: header["__metadata__"].update(radius="inf"), "or not finite"),
    (lambda header: header["__metadata__"].update(nearplane="far"), "could not convert"),
    (lambda header: header.update(__metadata__=[1]), "its header is not that of an encoded scene"),
])
def test_a_damaged_scene_is_left_out_and_the_others_are_read(tmp_path, change, reason):
    good, bad = (encode.member(**encoded_scene(seed)) for seed in (0, 1))
    write_tar(tmp_path / "a.tar", {"a/good.safetensors": good,
                                   "a/bad.safetensors": with_header(bad, change)})
    source = open_encoded(tmp_path)
    assert source.shards[0].scenes == ["a/good"]
    with pytest.raises(ValueError, match=f"a/bad.safetensors: .*{reason}"):
        write_tar(tmp_path / "b.tar", {"a/bad.safetensors": with_header(bad, change)})
        open_encoded(tmp_path, "b.tar")


def test_bytes_that_are_no_safetensors_are_left_out(tmp_path):
    for content in (b"", b"text", b"\xff" * 100, struct.pack("<Q", 40) + b"[" * 40):
        write_tar(tmp_path / "a.tar", {"a/b.safetensors": content})
        with pytest.raises(ValueError, match="no usable scene .*a/b.safetensors"):
            open_encoded(tmp_path, "a.tar")


def test_latents_of_another_size_are_refused(tmp_path):
    write_encoded(tmp_path / "a.tar", [0])
    with pytest.raises(ValueError, match="of images of 32 pixels; .* and image_size is 64"):
        read_source(tmp_path, "a.tar", format="encoded", side=64)
    write_encoded(tmp_path / "b.tar", [1], width=7)
    with pytest.raises(ValueError, match=r"in sizes .2c, h, w, d. \(8, 4, 4, 6\); \(8, 4, 4, 7"):
        open_encoded(tmp_path)


@pytest.mark.parametrize("change", [{"c2w": 1e200}, {"c2w": 1e13}, {"fov": 4.0}, {"scale": math.inf}])
def test_a_camera_or_scale_that_cannot_be_used_is_left_out(tmp_path, change):
    scene = encoded_scene(0)
    (name, value), = change.items()
    scene[name][(1, 0, 3) if name == "c2w" else 1] = value
    write_tar(tmp_path / "a.tar", {"a/b.safetensors": encode.member(**scene)})
    with pytest.raises(ValueError, match="no usable scene in 1 shards: a.tar: a/b.safetensors: .*"
                       "(farther than|between 0 and pi|not finite)"):
        open_encoded(tmp_path)


def test_shards_encoded_with_another_quantile_blend_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"a/b.safetensors": encode.member(**encoded_scene(0), blend=False)})
    source = open_encoded(tmp_path)
    source.check_blend(False)
    with pytest.raises(ValueError, match="'here': a.tar was encoded without quantile_blend, .* train "
                       "with --quantile_blend=false, or encode it again$"):
        source.check_blend(True)
    def forget(header):
        del header["__metadata__"]["quantile_blend"]
    write_tar(tmp_path / "a.tar", {"a/b.safetensors": with_header(
        encode.member(**encoded_scene(0)), forget)})
    open_encoded(tmp_path).check_blend(True)        # of an earlier version: not known
    open_encoded(tmp_path).check_blend(False)


def test_raw_and_encoded_sources_do_not_mix(tmp_path):
    write_encoded(tmp_path / "a.tar", [0])
    (tmp_path / "raw").mkdir()
    raw = write_source(tmp_path / "raw", "b", 1)
    raw.image_size = SIDE
    with pytest.raises(ValueError, match="do not mix: b has images, here has encoded views"):
        data.Pairs([raw, open_encoded(tmp_path)], [0.5, 0.5], 0, SIDE, MODE)


def test_encoded_shards_come_from_commands_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_encoded(tmp_path / "a.tar", range(3))
    local = all_pairs(open_encoded(tmp_path), MODE)
    source = Source("here", "encoded", f"pipe:cat {tmp_path}/a.tar", 1.0)
    assert isinstance(local.readers[0].shards[0].file, files.LocalFile)
    stream = data.Pairs([data.open_source(source, "", SIDE)], [1.0], 0, SIDE, MODE)
    batch = stream.__getitems__([3, 4, 5])
    assert [uid.split(":", 1)[1] for uid in batch["uid"]] == [
        local[k]["uid"].split(":", 1)[1] for k in (3, 4, 5)]
