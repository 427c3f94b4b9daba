"""What earlier versions saved opens: three steps of a small model, no checksum of meta.json."""

import json
import shutil

import pytest
import torch
from golden import FOLDER

import configs
import model
from runtime import checkpoint

RUN = FOLDER / "earlier"
SUMS = {"model": 16405.500186151992, "ema": 687.0147059295563,
        "optimizer": 1184.0285732005002}      # of absolute values


def test_an_earlier_run_is_read_as_it_was_saved():
    run = checkpoint.load_run(checkpoint.latest(RUN))
    assert "crc32" not in json.loads((run.folder / "meta.json").read_text())
    for name, total in SUMS.items():
        found = sum(value.double().abs().sum().item() for value in getattr(run, name).values())
        assert found == pytest.approx(total, rel=1e-12), name
    assert (run.step, run.meta["ema_updates"]) == (3, 3)


def test_an_earlier_run_goes_on_where_its_names_and_shapes_are_the_models():
    run = checkpoint.load_run(checkpoint.latest(RUN))
    net = model.build(configs.from_dict(run.meta["config"]))
    weights = net.state_dict()
    averages = {name: value for name, value in weights.items() if name.startswith(checkpoint.UNET)}
    moments = {f"{name}.{kind}": () if kind == "step" else p.shape
               for name, p in net.named_parameters() if p.requires_grad
               for kind in ("exp_avg", "exp_avg_sq", "step")}
    run.require(weights, averages, moments)
    name = checkpoint.UNET + "out.2.bias"
    for parts, says in (
            (({**weights, "more": (3,)}, averages, moments), "model.*1 missing .more"),
            ((weights, {}, moments), "ema.* unexpected"),
            ((weights, averages, {**moments, f"{name}.exp_avg": (5,)}),
             r"optimizer.*1 misshapen .*exp_avg \[12\] instead of \[5\]")):
        with pytest.raises(ValueError, match=says) as error:
            run.require(*parts)
        assert "\n" not in str(error.value)


def test_an_earlier_run_fills_a_model_is_described_and_converted(tmp_path):
    found = checkpoint.read(RUN)
    net = model.build(configs.from_dict(found.meta["config"]))
    report = checkpoint.load_model(net, found, ema=True)
    name = checkpoint.UNET + "out.2.bias"
    assert torch.equal(net.state_dict()[name], found[checkpoint.ema_name(name)])
    assert report.num_updates == 3
    assert "step 3, average of 3 updates" in checkpoint.info(RUN)
    checkpoint.convert(RUN, tmp_path / "a.ckpt")
    again = checkpoint.read(tmp_path / "a.ckpt")
    assert set(again) == set(found) and again.meta["config"] == found.meta["config"]
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("change, says", [
    (lambda meta: meta.update(step=7), "is of step 7"),
    (lambda meta: meta.pop("files"), "files is"), (lambda meta: meta.pop("step"), "step is"),
    (lambda meta: meta.update(config=3), "config is '3'"),
    (lambda meta: meta.update(config="["), "config is"),
    (lambda meta: meta.update(ema_updates=1e99), "ema_updates is"),
    (lambda meta: meta["files"].pop("ema.safetensors"), "ema.safetensors"),
    (lambda meta: meta["files"].update({"ema.safetensors": None}), "TypeError")])
def test_a_meta_json_that_says_something_else_is_damage(tmp_path, change, says):
    shutil.copytree(RUN, tmp_path / "out")
    path = tmp_path / "out/step_00000003/meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    assert says in checkpoint.damage(path.parent)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(path.parent)
