"""python -m benchmarks: every benchmark at toy size, its rows and table, variants that fail."""

import json
import multiprocessing
import sys
import time

import pytest
import torch

import clip
import vae
from benchmarks import __main__ as bench
from benchmarks import measure, networks
from made import TINY_CLIP, tiny_config


@pytest.fixture
def rows_of(monkeypatch, tmp_path, capsys):
    """The rows by name, and the text on the screen, of a command line; variants run in here."""
    def here(jobs, seconds):
        return [row for _, function, *arguments in jobs for row in function(*arguments)]

    def run(*argv):
        file = tmp_path / "rows.json"
        bench.main(bench.parser().parse_args([*argv, "--json", str(file)]))
        return {row["name"]: row for row in json.loads(file.read_text())}, capsys.readouterr().out

    enabled = dict(networks.engine.kernels.enabled)
    monkeypatch.setattr(networks, "collect", here)
    monkeypatch.setattr(networks, "config_of", tiny_config)
    monkeypatch.setattr(networks, "ENCODERS", {
        "VAE": (lambda: vae.AutoencoderKL(32, (1, 2)), None, "encode"),
        "CLIP": (lambda: clip.CLIP(**TINY_CLIP), None, "encode_image")})
    for module, changes in ((measure, {"SECONDS": 0.0}), (measure.cost, {"SMALL_SIDE": 256}),
                            (networks, {"STEPS": 4, "FEW_STEPS": 4, "SIDE": 32})):
        for name, value in changes.items():
            monkeypatch.setattr(module, name, value)
    yield run
    networks.engine.kernels.enabled.update(enabled)


# ---- rows and processes

def test_a_row_is_set_beside_its_peer_and_the_ceiling():
    rows = [measure.row(measure.CEILING, "", 2.0, "TFLOP/s"),
            measure.row("ours", "batch 2", 6.0, "pairs/s", flops=1e12),
            measure.row("theirs", "batch 2", 4.0, "pairs/s"),
            measure.row("ours", "batch 4", 8.0, "pairs/s")]
    ceiling, two, theirs, four = measure.finish(rows, {"ours": "theirs"})
    assert two["ratio"] == 1.5 and two["peer"] == "theirs" and two["ceiling_share"] == 0.5
    assert "peer" not in four and "ceiling_share" not in four and "peer" not in theirs
    assert ceiling["torch"] == torch.__version__ and ceiling["hardware"]
    lines = measure.table(rows).splitlines()
    unit = lines[0].index("unit")
    assert all(line[unit - 1] == " " and line[unit] != " " for line in lines[1:])
    assert "1.500" in lines[2] and "50%" in lines[2]


def answers(what):
    yield measure.row(what, "", 1.0, "s")
    if what == "hangs":
        time.sleep(60)
    if what == "fails":
        raise ValueError("why it failed")
    if what == "ends":
        sys.stdout.flush()
        measure.os._exit(1)
    if what == "lacks":
        raise ImportError("no module", name="diffusers")


def test_a_variant_that_fails_hangs_or_ends_costs_the_others_nothing(capsys, monkeypatch):
    names = ("fails", "ends", "lacks", "works")
    rows = measure.collect([("works", answers, "works")], 300)      # in a process that imports it anew
    assert [row["name"] for row in rows] == ["works"]
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(measure.multiprocessing, "get_context", lambda kind: fork)
    rows = measure.collect([(what, answers, what) for what in names], 300)
    said = capsys.readouterr().out
    assert [row["name"] for row in rows] == list(names), said
    assert "why it failed" in said and "pip install diffusers" in said and "works is done" in said
    assert "ends failed: its process ended by itself" in said
    assert len(measure.collect([("hangs", answers, "hangs")], 1)) <= 1
    assert "hangs: no time left, of 1 s in all" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["sample", "--views", "0"],
                                  ["encode", "--seconds-limit", "0"], ["train", "--variants", "none"]])
def test_senseless_options_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parser().parse_args(argv)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- each benchmark

def test_steps_are_measured_beside_a_ceiling(rows_of):
    rows, _ = rows_of("train", "--batch", "1", "2", "--variants", "eager")
    assert rows["eager, batch 1"]["value"] > 0 and rows["eager, batch 1"]["unit"] == "pairs/s"
    assert rows["eager, batch 2"]["ceiling_share"] > 0


def test_a_step_trains_every_part_as_the_product_does():
    step = networks.Step(tiny_config(2), compiled=False)
    before = {name: p.detach().clone() for name, p in step.optimizer.trained.items()}
    step()
    assert all(not torch.equal(p, before[name]) for name, p in step.optimizer.trained.items())
    assert step.ema.updates == 1 and step.optimizer.count == 1


def test_the_engine_is_measured_part_by_part(rows_of, monkeypatch):
    seen = []

    def training(variant, batch):
        seen.append(variant)
        yield measure.row(variant, f"batch {batch}", 80.0 if "without" in variant else 100.0,
                          "pairs/s")
    monkeypatch.setitem(networks.MEASURES, "train", training)
    networks.engine.kernels.enabled["geglu"] = True
    rows, _ = rows_of("engine", "--batch", "48", "--without", "geglu", "unet", "--rates", "train")
    # the UNet for sampling is not in a step of training
    assert seen == ["compiled", "compiled without geglu"]
    assert networks.engine.kernels.enabled["geglu"] is False
    assert rows["compiled without geglu, batch 48"]["ratio"] == 0.8
    gain = [row["value"] for name, row in rows.items() if name.startswith("gain by geglu")]
    assert gain[0] == pytest.approx(25)
    lines = len((networks.ROOT / "engine" / "geglu.py").read_text().splitlines())
    assert gain[1] == pytest.approx(2500 / lines)


def test_views_are_timed(rows_of, monkeypatch):
    monkeypatch.setattr(networks, "config_of", lambda: tiny_config(latent="vae", image_size=64))
    rows, _ = rows_of("sample", "--views", "1", "2", "--variants",
                      "product", "product, plain")
    assert rows["product, 1 view"]["unit"] == "s/view" and rows["product, 1 view"]["value"] > 0
    assert {"product, 2 views at once", "product, plain, 1 view",
            "product, 1 view, DPM-Solver++ 4 steps"} <= set(rows)


def test_encoders_are_timed_alone_and_together(rows_of):
    rows, _ = rows_of("encode", "--batch", "2", "--variants", "product, eager")
    rates = [rows[f"product, eager, {part}"]["value"] for part in ("VAE", "CLIP")]
    both = rows["product, eager, both"]["value"]
    assert both == pytest.approx(1 / sum(1 / rate for rate in rates))


def test_the_peers_have_as_many_parameters():
    pytest.importorskip("diffusers", reason="a peer: pip install --no-deps diffusers")
    pytest.importorskip("transformers", reason="a peer: pip install transformers")

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    config = networks.config_of()
    with torch.device("meta"):
        theirs = count(networks.peers.UNet(config, networks.model.latent_shape(config)[0]))
        ours = networks.model.build(config)
        assert count(ours.model.diffusion_model) == theirs == 859_532_484
        for ours, theirs, _ in networks.ENCODERS.values():
            ours, theirs = ours(), theirs()
            theirs = getattr(theirs, "tower", theirs)
            assert count(getattr(ours, "visual", ours)) == count(theirs)
