"""data.py inspect and verify: what they say of good shards, and of bad ones."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

from captures import encode
import conventions
from analysis import inspect as inspector
import forked
import numpy as np
import pytest
from made import depth_png, encoded_scene, rewritten, scene_members, write_tar
from PIL import Image

import prepare
from shards import files, scenes


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A folder of rendered shards in both raw formats."""
    folder = tmp_path_factory.mktemp("rendered")
    prepare.main(["synth", "--out", str(folder), "--scenes", "6", "--held-out", "2", "--size", "48",
                  "--views", "8", "--workers", "1", "--device", "cpu"])
    return folder


def path_of(folder, format):
    return next((folder / format).glob("train-*.tar"))


def with_camera(change):
    """A change of the `extrinsics` of all cameras."""
    def apply(name, content):
        if not name.endswith("_metadata.json"):
            return content
        fields = json.loads(content)
        fields["extrinsics"] = change(np.array(fields["extrinsics"])).tolist()
        return json.dumps(fields).encode()
    return apply


def test_inspect_says_what_is_there_and_draws_it(rendered, tmp_path, capsys):
    picture = tmp_path / "seen.png"
    assert inspector.main(["inspect", str(rendered / "*" / "train-*.tar"), "--out",
                           str(picture)]) == 0
    told = capsys.readouterr().out
    for line in ("1 shards, 3 scenes, 24 views", "format co3d, images of 48 pixels",
                 "format re10k, images of 48 pixels", "views a scene      8 .. 8 .. 8",
                 "known of 100 .. 100 .. 100 % of a view"):
        assert line in told
    drawn = np.asarray(Image.open(picture))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1000      # views
    assert (drawn == pictures_red).all(-1).sum() > 6 * 20           # the first camera, six times


pictures_red = inspector.pictures.RED


def test_inspect_tells_of_encoded_shards_and_their_problems(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", {
        "a/b.safetensors": encode.member(**encoded_scene(0)), "a/c.safetensors": b"text"})
    assert inspector.main(["inspect", str(tmp_path / "a.tar")]) == 0
    told = capsys.readouterr().out
    assert "format encoded, images of 32 pixels" in told and "scale of views" in told
    assert "! a.tar: a/c.safetensors: no safetensors" in told


def test_inspect_of_shards_whose_scales_nobody_knows(tmp_path, capsys):
    scene = encoded_scene(0)
    scene["scale"] = scene["scale"] * float("nan")
    write_tar(tmp_path / "a.tar", {"a/b.safetensors": encode.member(**scene)})
    assert inspector.main(["inspect", str(tmp_path / "a.tar")]) == 0
    assert "scale of views     none, not known of 100.0%" in capsys.readouterr().out


def test_inspect_of_shards_without_depth_and_of_a_picture_that_cannot_be(tmp_path, capsys):
    members = {name: content for name, content in scene_members("a/b").items()
               if not name.endswith("_depth.png")}
    write_tar(tmp_path / "a.tar", {
        **members, **scene_members("a/c")} | {name.replace("a/b", "a/c").replace(
            ".png", "_depth.png"): depth_png(np.zeros((8, 8)))
            for name in members if name.endswith(".png")})
    out = str(tmp_path / "a.png")
    assert inspector.main(["inspect", str(tmp_path / "a.tar"), "--out", out]) == 0
    assert "depth " in capsys.readouterr().out
    with pytest.raises(ValueError, match="end in .png"):
        inspector.main(["inspect", str(tmp_path / "a.tar"), "--out", "x.foo"])


@pytest.mark.parametrize("command, says", [
    (["data.py", "inspect", "x", "--outt=3"], "option --outt is not known, did you mean --out?"),
    (["data.py", "verify", "x", "--size", "-5"], "--size: -5 is not possible, only numbers from 1"),
    (["-m", "runtime.checkpoint", "convert", "a", "b", "--emaa"], "did you mean --ema?"),
    (["evaluate.py", "out", "--pair=3"], "option --pair is not known, did you mean --pairs?"),
    (["evaluate.py", "out", "--micro-batsh=3"], "did you mean --micro_batch?"),
    (["-m", "analysis.compare", "x.py", "--minute=3"], "did you mean --minutes?"),
    (["train.py", "configs/synth.py", "--profil", "5"], "did you mean --profile?")])
def test_a_mistake_on_the_command_line_is_answered_in_a_line_without_torch(command, says):
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True,
                          text=True, cwd=os.path.dirname(prepare.__file__))
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0]
    assert "| torch\n" not in done.stderr and "| numpy" not in done.stderr


def test_a_shard_that_cannot_be_read_does_not_hide_the_others(rendered, tmp_path, capsys):
    for name, content in (("text.tar", b"text" * 300), ("empty.tar", b"")):
        (tmp_path / name).write_bytes(content)
    good = str(next((rendered / "co3d").glob("train-*.tar")))
    assert inspector.main(["verify", str(tmp_path / "text.tar"), good, str(tmp_path / "empty.tar"),
                           "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert "! text.tar: " in said and "! empty.tar: " in said
    assert "3 shards" in said and "2 problems" in said


def test_good_shards_are_verified(rendered, capsys):
    assert inspector.main(["verify", str(rendered / "**" / "train-*.tar"), "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "2 shards, 48 views, 0 problems" in told
    judged = re.findall("(picture|depth)s agree with the cameras in (.*) of (.*) pairs", told)
    assert len(judged) == 4
    for _, agree, checked in judged:
        assert int(checked) >= 9 and int(agree) >= 0.9 * int(checked)


@pytest.mark.parametrize("change", [
    np.linalg.inv,                                                  # world-to-camera
    lambda c2w: c2w @ np.diag([1.0, -1.0, -1.0, 1.0]),              # OpenCV
    lambda c2w: np.diag([0.2, 0.2, 0.2, 1.0]) @ c2w @ np.diag([5.0, 5.0, 5.0, 1.0]),    # unit
])
def test_cameras_of_another_convention_or_unit_are_noticed(rendered, tmp_path, capsys, change):
    path = rewritten(path_of(rendered, "re10k"), tmp_path / "a.tar", with_camera(change))
    assert inspector.main(["verify", str(path), "--workers", "1"]) == 1
    assert "pairs; cameras, depth or field of view follow another" in capsys.readouterr().out


def test_damage_is_found_although_an_index_is_kept(rendered, tmp_path, capsys):
    path = tmp_path / "a.tar"
    path.write_bytes(path_of(rendered, "co3d").read_bytes())
    assert inspector.main(["verify", str(path), "--workers", "1"]) == 0
    inspector.main(["inspect", str(path), "--out", str(tmp_path / "seen.png")])     # keeps an index
    before = os.stat(path)
    with tarfile.open(path) as tar:
        places = {info.name.split("/", 1)[1]: info.offset_data for info in tar}
    depth = next(name for name in places if name.endswith("frame000003_depth.png"))
    cameras = [name for name in places if name.endswith("frame000002_metadata.json")][-1]
    assert depth.split("/")[0] != cameras.split("/")[0]         # of another scene
    with open(path, "r+b") as file:
        for place in (places[depth] + 60, places[cameras]):
            file.seek(place)
            file.write(bytes(20))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert inspector.main(["verify", str(path), "--workers", "1"]) == 1
    told = capsys.readouterr()
    assert "frame000003_depth.png: image cannot be decoded" in told.out + told.err
    assert "frame000002_metadata.json: metadata is not JSON" in told.out + told.err
    assert "2 problems" in told.out


def test_latents_that_are_not_finite_are_problems(tmp_path, capsys):
    scene = encoded_scene(0)
    scene["moments"][2, 0, 0, 0] = float("inf")
    write_tar(tmp_path / "a.tar", {"a/b.safetensors": encode.member(**scene)})
    assert inspector.main(["verify", str(tmp_path / "a.tar"), "--workers", "1"]) == 1
    told = capsys.readouterr()
    assert "a.tar:a/b:2: moments_target is not finite" in told.out + told.err


def test_the_kind_of_a_shard_is_found_out(rendered, tmp_path):
    for format in ("co3d", "re10k"):
        assert scenes.detect(files.LocalFile(path_of(rendered, format))) == (format, 48)
    write_tar(tmp_path / "a.tar", {"readme.txt": b"nothing"})
    with pytest.raises(ValueError, match="a.tar: no scene in it that data.py reads"):
        scenes.detect(files.LocalFile(tmp_path / "a.tar"))
    members = scene_members("a/b")
    members = {name: b"[" if name.endswith("json") else file for name, file in members.items()}
    write_tar(tmp_path / "b.tar", members)
    with pytest.raises(ValueError, match="b.tar: no scene in it that data.py reads; a/b/frame"):
        scenes.detect(files.LocalFile(tmp_path / "b.tar"))
    write_tar(tmp_path / "c.tar", {"a/b.safetensors": io.BytesIO(b"\xff" * 99).read()})
    with pytest.raises(ValueError, match="c.tar: no scene in it .*; a/b.safetensors: "):
        scenes.detect(files.LocalFile(tmp_path / "c.tar"))


def test_the_command_line_ends_in_one_line_and_a_status(tmp_path):
    done = forked.run("data.py", "verify", tmp_path / "no.tar")
    assert done.returncode == 2 and done.stderr.startswith("data.py: no shards at ")
    assert done.stderr.count("\n") == 1


# ---- cameras of captures, whose depth is sparse or unknown

@pytest.mark.parametrize("convention", conventions.CONVENTIONS)
@pytest.mark.parametrize("points, number", [(60, 0), (60, 3), (0, 3)])
def test_a_wrong_convention_of_a_capture_is_found_and_a_right_one_is_not_accused(
        points, number, convention, tmp_path, capsys):
    conventions.write(tmp_path / "a.tar", conventions.rendered(number), convention, points)
    wrong = conventions.accused(tmp_path / "a.tar")
    told = capsys.readouterr().out
    assert wrong == (convention != "right") and "NOT" not in told, told
    assert "patches of 1 scenes are found where the cameras say" in told


def test_what_was_not_checked_says_so(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", {"a/b.safetensors": encode.member(**encoded_scene(0))})
    assert inspector.main(["verify", str(tmp_path / "a.tar"), "--workers", "1"]) == 0
    told = capsys.readouterr()
    assert "a.tar: cameras NOT checked" in told.out + told.err
    assert "0 problems, cameras of 1 NOT checked" in told.out
