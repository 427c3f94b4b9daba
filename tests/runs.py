"""Runs of train.py on a few tiny scenes: how they are begun and what they leave. Their fixtures are known to
all tests (conftest.py), which share them."""

import contextlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import configs
import prepare
import train
from runtime import cost

ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SOURCES = (configs.Source("co3d", "co3d", "co3d/train-*.tar", 0.5, "co3d/held-out-*.tar"),
           configs.Source("re10k", "re10k", "re10k/train-*.tar", 0.5, "re10k/held-out-*.tar"))

# For a config file, of a run in a process of its own: what it needs, and what the machine can do, are the
# slowest parts of one this small
CHEAP = """
from runtime import cost
cost.of, cost.ceiling = lambda *_: cost.Cost(*[1] * 8), lambda *_: 1e12
"""
COUNTED = {}            # what a run needs, found once for each configuration


@contextlib.contextmanager
def without_the_slowest():
    """Of a run in this process: what it needs and what the machine can do are found once, and its shards
    are not compared with their cameras."""
    count, speed = cost.of, COUNTED.setdefault("speed", cost.ceiling(torch.device("cpu"), "fp32"))

    def of(config, ranks, pairs):
        key = (config.precision, config.checkpoint_activations, config.divide_optimizer,
               config.model_channels, config.batch_size, ranks.world, pairs)
        return COUNTED[key] if key in COUNTED else COUNTED.setdefault(key, count(config, ranks, pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "of", of)
        patch.setattr(cost, "ceiling", lambda *_: speed)
        patch.setattr(train.inspector, "contradictions", lambda source: [])
        yield


@pytest.fixture(scope="module")
def quick_runs():
    with without_the_slowest():
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with a few scenes of 16x16 views in both layouts."""
    folder = tmp_path_factory.mktemp("synth")
    prepare.main(["synth", "--out", str(folder), "--scenes", "8", "--held-out", "4", "--views", "4",
                  "--size", "16", "--device", "cpu", "--workers", "1"])
    return folder


@pytest.fixture(scope="session")
def spoilt(shards, tmp_path_factory):
    """A copy of the shards, in whose training scenes two of four views are damaged."""
    folder = tmp_path_factory.mktemp("spoilt") / "data"
    shutil.copytree(shards, folder)
    for shard in sorted(folder.glob("*/train-*.tar")):
        with tarfile.open(shard) as tar:
            images = [file for file in tar if file.name.endswith(("0001.png", "0002.png"))]
        with open(shard, "r+b") as file:
            for image in images:
                file.seek(image.offset_data)
                file.write(bytes(64))
    return folder


def tiny(shards, out, code="", **changes):
    """The arguments of a run that takes a second: a config file's path and overrides. code: what
    the file does besides, when it is read."""
    path = Path(out).with_suffix(".py")
    path.write_text("from configs import Config, Source\n"
                    f"config = Config(sources={SOURCES!r}, latent='pixels', prediction='z',\n"
                    "image_size=16, model_channels=32, channel_mult=(1, 1), num_res_blocks=1,\n"
                    "attention_resolutions=(2,), num_heads=1, norm_groups=8, context_dim=32,\n"
                    "steps=6, batch_size=8, micro_batch=8, warmup_steps=0, lr=1e-3, device='cpu',\n"
                    "precision='fp32', workers=0, log_every=1, save_every=3, eval_pairs=0,\n"
                    "validate_every=0, sample_every=100, sample_steps=2, guidance=1.0, eta=0.0)\n"
                    + code)
    changes = {"data": str(shards), "out": str(out), **changes}
    return [str(path), *(f"--{name}={value}" for name, value in changes.items())]


def run(arguments):
    """Runs train.py in this process. Returns what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(arguments)
    return said.getvalue()


def logged(out, name="loss"):
    return [json.loads(line)[name] for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def saved(out, step, name="model"):
    return load_file(Path(out) / f"step_{step:08d}" / f"{name}.safetensors")


def assert_same_state(out, other, step):
    """Weights, averages and moments of two runs are equal bit for bit."""
    for name in ("model", "ema", "optimizer"):
        first, second = saved(out, step, name), saved(other, step, name)
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="session")
def whole_run(shards, tmp_path_factory):
    """(folder, what it said) of six steps in one process."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with without_the_slowest():
        return out, run(tiny(shards, out, eval_pairs=8))


def kill_one_rank(out):
    """For a config file: once a step is saved, rank 1 is killed without a word, once."""
    return f"""
import glob, os, signal, threading, time
def kill():
    while not glob.glob({str(out / "step_*")!r}):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    threading.Thread(target=kill, daemon=True).start()
"""
