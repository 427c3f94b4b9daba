"""Fine-tuning: what it gained is told, and it ends when held-out pairs get worse."""

import json

import pytest
from runs import logged, run, tiny

import configs
from analysis import inspect as inspector
from runtime import cost
from shards import scenes

LOOK = inspector.contradictions
OPTIONS = {"validate_every": 2, "validate_pairs": 8, "eval_pairs": 8, "save_every": 2, "steps": 12}


def test_the_end_tells_what_was_gained_over_the_model_that_a_run_started_from(
        shards, whole_run, tmp_path):
    out = tmp_path / "tuned"
    run(tiny(shards, out, init=whole_run[0], **OPTIONS | {"steps": 4}))
    # going on compares with the model of step 0, not with that of step 4
    said = run(tiny(shards, out, init=whole_run[0], **OPTIONS))
    first = json.loads((out / "begin.json").read_text())["rows"]
    last = json.loads((out / "metrics.json").read_text())["psnr"]["this model"]
    gain = last - sum(row["scores"]["this model"]["psnr"] for row in first) / len(first)
    assert f" the one it started from: {gain:+.2f} dB +- " in said and gain
    assert logged(out, "step")[0] == 0 and "val_loss" in (out / "log.jsonl").read_text().splitlines()[0]


def test_a_run_ends_when_held_out_pairs_get_worse_and_stays_ended(
        shards, whole_run, tmp_path):
    out, options = tmp_path / "worse", {"lr": 0.3, "lr_projection": 0.3, "patience": 2, "ema_decay": 0.0}
    for _ in range(2):
        said = run(tiny(shards, out, init=whole_run[0], **OPTIONS, **options))
        assert "was least after step 0, and it ends" in said and "the model lost to the one it started from: -" in said
        assert logged(out, "step")[-1] == 4 and (out / "step_00000004").is_dir()


@pytest.mark.parametrize("axis, wrong", [(None, False), (1, True)])
def test_a_run_whose_data_contradict_its_cameras_is_told_so_at_its_start(
        shards, tmp_path, monkeypatch, axis, wrong):
    monkeypatch.setattr(inspector, "contradictions", LOOK)
    stored = scenes.RawScenes.scene

    def scene(self, number):
        found = stored(self, number)
        if axis is not None:
            found.c2w[:, :3, axis:3] *= -1      # as if the file's cameras looked the other way
        return found
    monkeypatch.setattr(scenes.RawScenes, "scene", scene)
    said = run([*tiny(shards, tmp_path / "dry"), "--dry-run"])
    assert ("! " in said and "follow another convention" in said and "data.py verify" in said) == wrong


def test_what_fits_a_gpu_that_is_not_there_is_told_without_data(tmp_path, monkeypatch):
    config = configs.load(["configs/synth.py", "--init=weights/small.safetensors", "--data=/nowhere"])
    one = cost.Cost(0, 0, weights=2e9, gradients=1e9, moments=1e9, average=0, activations=5e8, flops=0)
    monkeypatch.setattr(cost, "of", lambda config, ranks, pairs: one)
    assert "all weights: state 4 GB, 0.5 GB a pair; by estimate --micro_batch=6 fits" in cost.fits(config, 8.1)
    assert "no pair fits" in cost.fits(config, 5.2)
    assert "8 GB" in run(["configs/synth.py", "--data=/nowhere", "--dry-run", "--gpu_memory", "8"])
