"""train.py: the reference's steps, equal runs on any number of ranks, exact resume, bad input."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from test_model import small_model

import configs
import model
import prepare
import train

ROOT = Path(__file__).parents[1]
SOURCES = (configs.Source("co3d", "co3d", "co3d/train-*.tar", 0.5, "co3d/held-out-*.tar"),
           configs.Source("re10k", "re10k", "re10k/train-*.tar", 0.5, "re10k/held-out-*.tar"))


# ---- golden steps

def sliced(tensor, key):
    """`tensor` cut as the fixture's key says behind its name: "name [::32, ::16]"."""
    found = re.search(r"\[(.*)\]$", key)
    return eval(f"tensor[{found[1]}]", {"tensor": tensor}) if found else tensor


@pytest.mark.parametrize("name", ["training_step", "training_step_short_warmup"])
def test_three_training_steps_equal_the_reference(name):
    case, expected = golden.case(name)
    net = small_model().train()
    config = replace(configs.Config(SOURCES), weight_decay=case["optimizer"]["weight_decay"])
    if name == "training_step_short_warmup":
        config = replace(config, warmup_steps=2, warmup_start=0.1)
    optimizer = train.Optimizer(net, config)
    ema = train.Ema(net.model.diffusion_model, config.ema_decay)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    observed = {key: row["max_abs_difference_between_two_reference_runs_on_different_cpu_kernels"]
                for key, row in case["tolerance_observed"].items()}

    def same(key, found):
        if key in expected:
            golden.assert_close(sliced(found, key), expected[key], observed.get(key, 0))

    _, first = golden.case("training_step")     # it stores the batches, which both cases see
    for k, row in enumerate(case["steps"]):
        image_cond, image_target = (
            golden.network_input(f"train/step{k}/{view}", (4, 64, 64, 3), tanh=True)
            .permute(0, 3, 1, 2) for view in ("image_cond", "image_target"))
        batch = {"cond_c2w": first[f"step{k}/in/cond_cam2world"],
                 "target_c2w": first[f"step{k}/in/target_cam2world"],
                 "fov": torch.deg2rad(first[f"step{k}/in/fov_deg"]),
                 "radius": torch.ones(4), "image_cond": image_cond,
                 "depth_cond": first[f"step{k}/in/depth_cond"][..., 0]}
        T = model.pose_vector(batch, "7dof_quantile_scale",
                              lambda image: first[f"step{k}/in/depth_model_disparity"], blend=True)
        draws = model.Draws(torch.tensor(row["t"]), torch.tensor(row["uniform_draws"]),
                            *(golden.network_input(f"train/step{k}/{n}", (4, 4, 8, 8))
                              for n in ("posterior_noise", "noise")))
        mean, logvar = net.encode(image_target)
        loss = net(mean, logvar, net.encode(image_cond)[0], net.embed(image_cond), T, draws).mean()
        loss.backward()
        bound = max(10 * case["tolerance_losses"][k], 1e-5 * row["loss"])
        assert abs(loss.item() - row["loss"]) <= bound
        same(f"step{k}/pose_embedding", T)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad
                     for n, p in net.named_parameters()}
        for key in expected:
            if key.startswith(f"step{k}/grad:"):
                same(key, gradients[key.split(":")[1].split(" ")[0]])
        zero = {n for n in gradients if n.startswith("model.") and not gradients[n].any()}
        assert zero == set(row["grad_exactly_zero"])
        optimizer.step(k)
        ema.update()
        rates = [group["lr"] for group in optimizer.adamw.param_groups]
        wanted = [row["lr_group0_unet"], row["lr_group1_cc_projection"]]
        np.testing.assert_allclose(rates, wanted, rtol=1e-12)
        assert ema.updates == row["ema_num_updates"]
    for key in expected:
        if key.startswith("after3/delta:"):
            n = key.split(":")[1].split(" ")[0]
            # a step of Adam is lr * sign where the gradient is only rounding: two lr a step at most
            found = sliced(dict(net.named_parameters())[n].detach() - before[n], key)
            differs = (found - expected[key]).abs() > max(10 * observed.get(key, 0), 2e-7)
            assert differs.float().mean() < 1e-3, key
        elif key.startswith("after3/model_ema."):
            averages = {"model_ema.diffusion_model" + n.replace(".", ""): p
                        for n, p in ema.average.items()}
            same(key, averages[key.removeprefix("after3/").split(" ")[0]])
        elif key.startswith("after3/"):
            same(key, dict(net.named_parameters())[key.removeprefix("after3/").split(" ")[0]])


def test_warm_up_is_the_references():
    case, _ = golden.case("training_step")
    config = configs.Config(SOURCES)
    for step, share in case["scheduler_multiplier_at_step"].items():
        assert train.learning_rate(int(step), config) == pytest.approx(share, rel=1e-12)


# ---- whole runs, on a few tiny scenes

@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with a few scenes of 16x16 views in both layouts."""
    folder = tmp_path_factory.mktemp("synth")
    prepare.main(["synth", "--out", str(folder), "--scenes", "8", "--held-out", "4", "--views", "4",
                  "--size", "16", "--device", "cpu", "--workers", "0"])
    return folder


def tiny(shards, out, **changes):
    """The arguments of a run that takes a second: a config file's path and overrides."""
    path = Path(out).with_suffix(".py")
    path.write_text("from configs import Config, Source\n"
                    f"config = Config(sources={SOURCES!r}, latent='pixels', prediction='z',\n"
                    "image_size=16, model_channels=32, channel_mult=(1, 1), num_res_blocks=1,\n"
                    "attention_resolutions=(2,), num_heads=1, norm_groups=8, context_dim=32,\n"
                    "steps=6, batch_size=8, micro_batch=8, warmup_steps=0, lr=1e-3, device='cpu',\n"
                    "precision='fp32', workers=0, log_every=1, save_every=3, eval_pairs=8,\n"
                    "sample_every=100, sample_steps=2, guidance=1.0, eta=0.0)\n")
    changes = {"data": str(shards), "out": str(out), **changes}
    return [str(path), *(f"--{name}={value}" for name, value in changes.items())]


def run(arguments, ranks=1):
    """Runs train.py as a user does. Returns the finished process."""
    command = [sys.executable, "train.py", *arguments]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                   "--master_port", str(port), *command[1:]]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(out, step):
    from safetensors.torch import load_file
    return load_file(Path(out) / f"step_{step:08d}" / "model.safetensors")


@pytest.fixture(scope="session")
def whole_run(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(tiny(shards, out))
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_checkpoint_log_grid_and_scores(whole_run):
    out, done = whole_run
    assert len(losses(out)) == 6
    assert (out / "step_00000006" / "meta.json").exists()
    assert (out / "grids" / "step_00000006.png").exists()
    scores = json.loads((out / "metrics.json").read_text())["psnr"]
    assert set(scores) == {"this model", "repeat the view", "its mean colour"}
    assert "held-out PSNR over 8 pairs" in done.stdout + done.stderr


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(shards, whole_run, tmp_path):
    out = tmp_path / "halves"
    assert run(tiny(shards, out, steps=3, eval_pairs=0)).returncode == 0
    assert run(tiny(shards, out)).returncode == 0
    assert losses(out) == losses(whole_run[0])
    first, second = weights(whole_run[0], 6), weights(out, 6)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_a_signal_to_the_whole_group_saves_and_the_run_goes_on(shards, tmp_path):
    out = tmp_path / "stopped"
    arguments = tiny(shards, out, steps=10_000, workers=1, eval_pairs=0, save_every=10_000)
    process = subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT,
                               start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "saved; the same command goes on" in said
    (folder,) = out.glob("step_*")
    done = int(folder.name.removeprefix("step_"))
    assert 0 < done == len(losses(out)) < 10_000
    again = run(tiny(shards, out, steps=done + 1, workers=1, eval_pairs=0))
    assert again.returncode == 0 and len(losses(out)) == done + 1


def test_two_ranks_and_micro_steps_train_as_one_process_does(shards, whole_run, tmp_path):
    out = tmp_path / "ranks"
    done = run(tiny(shards, out, micro_batch=2, eval_pairs=0), ranks=2)
    assert done.returncode == 0, done.stderr
    # the same sums in another order: float32 rounding
    np.testing.assert_allclose(losses(out), losses(whole_run[0]), rtol=1e-5)


@pytest.mark.parametrize("ema_per, updates", [("step", 2), ("micro_step", 4)])
def test_the_average_moves_once_a_step_or_once_a_micro_step(shards, tmp_path, ema_per, updates):
    out = tmp_path / "averaged"
    done = run(tiny(shards, out, steps=2, micro_batch=4, ema_per=ema_per, eval_pairs=0))
    assert done.returncode == 0, done.stderr
    meta = json.loads((out / "step_00000002" / "meta.json").read_text())
    assert meta["ema_updates"] == updates


def test_a_run_starts_from_another_runs_weights_and_averages(shards, whole_run, tmp_path):
    out = tmp_path / "tuned"
    done = run(tiny(shards, out, init=whole_run[0], steps=1, save_every=1, eval_pairs=0, lr=1e-9,
                    lr_projection=1e-9, weight_decay=0))
    assert done.returncode == 0, done.stderr
    before, after = weights(whole_run[0], 6), weights(out, 1)
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)
    meta = json.loads((out / "step_00000001" / "meta.json").read_text())
    assert meta["ema_updates"] == 7     # six of the run before, which finetuning takes over


def test_latents_without_an_autoencoder_are_refused(shards, tmp_path):
    done = run(tiny(shards, tmp_path / "vae", latent="vae"))
    assert done.returncode == 2 and "needs --init=FILE" in done.stderr


def test_training_lowers_the_loss(shards, tmp_path):
    out = tmp_path / "long"
    done = run(tiny(shards, out, steps=80, batch_size=16, micro_batch=16, lr=2e-3, eval_pairs=0,
                    save_every=80))
    assert done.returncode == 0, done.stderr
    curve = losses(out)
    assert np.mean(curve[-10:]) < 0.7 * np.mean(curve[:5])


def test_another_configuration_in_the_same_folder_is_refused_with_what_differs(shards, whole_run):
    done = run(tiny(shards, whole_run[0], lr=5e-4, steps=9))
    assert done.returncode == 2 and "lr was 0.001, is 0.0005" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("change, message", [
    ({"mode": "8dof"}, "mode '8dof' is not known"),
    ({"mode": "7dof_metric_scale"}, "needs a metric depth network"),
    ({"data": "/nowhere"}, "/nowhere"),
    ({"batch_size": 7, "micro_batch": 3}, "--micro_batch=1 does"),
    ({"device": "cuda"}, "this machine has"),
    ({"image_size": 32}, "32"),
    ({"init": "/nowhere.ckpt"}, "/nowhere.ckpt"),
])
def test_bad_input_is_one_clear_line_and_exit_code_2(shards, tmp_path, change, message):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = run(tiny(shards, tmp_path / "bad", **change))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: ")


def test_a_mistyped_option_is_answered_with_the_nearest_name(shards, tmp_path):
    done = run(tiny(shards, tmp_path / "typo", batchsize=8))
    assert done.returncode == 2 and "Did you mean 'batch_size'?" in done.stderr


# ---- configuration

@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda p: p.name)
def test_every_config_file_loads_and_survives_being_stored(path):
    config = configs.load([str(path)])
    assert configs.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert train.split(config, 1)[0] * train.split(config, 1)[1] == config.batch_size


def test_sources_whose_probabilities_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 0.5, not 1: co3d 0.5"):
        configs.Config(SOURCES[:1])
