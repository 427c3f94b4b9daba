"""follow.py: the truth along a path is what the renderer shows from there, and its figures."""

from dataclasses import replace

import pytest
import torch

from analysis import follow
import golden
import model
from views import paths
from views import photos
from views import render
from captures import synth
from analysis.metrics import psnr
from runtime import command
from test_sample import SCENES, save, small_run

__all__ = ["small_run"]      # the fixture `run`


def main(run, *arguments, data=""):
    """The command's exit status."""
    data = data or SCENES["data"]
    try:
        command.run("follow.py", follow.main, follow.parser().parse_args(
            [str(run), "--data", str(data), "--device", "cpu", *arguments]))
    except SystemExit as end:
        return end.code
    return 0


def truth_of(photo, cameras, data=None):
    return synth.truth_of(photo, data or SCENES["data"])(cameras.c2w, cameras.fov)


@pytest.fixture
def photo(run):
    return photos.held_out(render.open_run(run, str(SCENES["data"]))[1], 2)


def test_the_truth_of_a_pan_is_the_view_of_the_turned_camera(photo):
    cameras = paths.motion("pan", 3, 20, photo.fov, photo.elevation)
    found = truth_of(photo, cameras)
    known = photo.reader.scene(photo.number)
    scene = synth.scene(0, int(known.name.split("/")[1]))
    c2w = known.c2w[photo.view].clone()
    c2w[:3, :3] = paths.rotation("z", torch.deg2rad(torch.tensor([-20.0]))).double() @ c2w[:3, :3]
    wanted = synth.render(scene, c2w[None], scene.fov, 16)[0]
    assert psnr(found[2:], wanted) > 60 and psnr(found[:1], wanted) < 30


def test_the_truth_of_a_dolly_goes_towards_what_is_in_the_middle_of_the_photo(photo):
    cameras = paths.motion("dolly", 2, 0.5, photo.fov, photo.elevation)
    known = photo.reader.scene(photo.number)
    scene = synth.scene(0, int(known.name.split("/")[1]))
    depth = photos.middle(torch.from_numpy(photo.reader.depth(photo.number, photo.view)))
    c2w = known.c2w[photo.view].clone()
    c2w[:3, 3] -= 0.5 * depth[depth > 0].median() * c2w[:3, 2]
    wanted = synth.render(scene, c2w[None], scene.fov, 16)[0]
    assert psnr(truth_of(photo, cameras)[1:], wanted) > 40


def test_scenes_of_another_seed_are_told_from_these(photo, tmp_path):
    (tmp_path / "synth.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match="does not look as `prepare.py synth` renders it"):
        synth.truth_of(photo, tmp_path)


def test_every_path_is_measured_and_drawn(run, tmp_path, capsys, monkeypatch):
    def perfect(drawn, truth, photo, name):
        cameras = paths.motion(name, follow.VIEWS, follow.HOW_FAR[name], photo.fov, photo.elevation)
        true = truth(cameras.c2w, cameras.fov)
        return true, true + 0.02        # 40 dB, of a range of 2
    assert main(run, "--scenes", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == list(paths.MOTIONS) == list(follow.HOW_FAR)
    assert (run / "paths.png").is_file()
    monkeypatch.setattr(follow, "follow", perfect)
    assert main(run, "--scenes", "2") == 0
    for line in capsys.readouterr().out.splitlines()[2:-1]:
        _, _, ours, still, difference, *_ = line.split()
        assert float(ours) == 40 and float(difference) == pytest.approx(40 - float(still), abs=0.02)


def test_too_many_scenes_are_refused_before_the_first(run, capsys, monkeypatch):
    monkeypatch.setattr(follow, "follow", None)
    assert main(run, "--scenes", "9") == 2
    assert "there are scenes 0 to 3" in capsys.readouterr().err


def test_a_3dof_model_is_measured_along_what_it_knows(run, tmp_path, capsys):
    config = replace(render.open_run(run, str(SCENES["data"]))[1], mode="3dof", out=str(tmp_path / "run"))
    save(config, golden.fill(model.build(config)))
    assert main(config.out, "--scenes", "2") == 0
    lines = capsys.readouterr().out.splitlines()[2:-1]
    assert [line.split()[0] for line in lines] == ["orbit", "swing", "spiral", "dolly"]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"seed": "a"}', "[]"])
def test_a_spoilt_or_missing_note_of_the_scenes_is_named(photo, tmp_path, content):
    if content:
        (tmp_path / "synth.json").write_text(content)
    with pytest.raises(ValueError if content else FileNotFoundError, match="synth.json is (not what|missing)"):
        synth.truth_of(photo, tmp_path)


def test_other_data_are_refused_in_a_line(run, tmp_path, capsys):
    assert main(run, data=tmp_path) == 2
    assert "no shards at" in capsys.readouterr().err
