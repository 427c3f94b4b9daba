"""train.py: the reference's steps, equal runs on any number of ranks, exact resume, bad input."""

import contextlib
import gzip
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import forked
import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import CHEAP, ONE_THREAD, ROOT, SOURCES, assert_same_state, kill_one_rank, logged, run, saved, tiny
from test_model import small_model

import depth
import diffusion
import engine
import configs
from runtime import cost
from runtime import ranks as distributed
import model
from runtime import log as report
import train
from runtime.ranks import ALONE, Alone, Division
from runtime import optimizer as rates
from runtime import checkpoint, resume
from runtime.optimizer import Ema, Optimizer, learning_rate


# ---- golden steps

def sliced(tensor, key):
    """`tensor` cut as the fixture's key says behind its name: "name [::32, ::16]"."""
    found = re.search(r"\[(.*)\]$", key)
    return eval(f"tensor[{found[1]}]", {"tensor": tensor}) if found else tensor


@pytest.mark.parametrize("name", ["training_step", "training_step_short_warmup"])
def test_three_training_steps_equal_the_reference(name, monkeypatch):
    case, expected = golden.case(name)
    net = small_model().train()
    config = replace(configs.Config(SOURCES), weight_decay=case["optimizer"]["weight_decay"])
    if name == "training_step_short_warmup":
        monkeypatch.setattr(rates, "WARMUP_START", 0.1)
        config = replace(config, warmup_steps=2)
    optimizer = Optimizer(net, config)
    ema = Ema(net.model.diffusion_model, config.ema_decay)
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
        T = depth.pose_vector(batch, "7dof_quantile_scale",
                              lambda image: first[f"step{k}/in/depth_model_disparity"], blend=True)
        draws = diffusion.Draws(torch.tensor(row["t"]), torch.tensor(row["uniform_draws"]),
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
        found = [group["lr"] for group in optimizer.adamw.param_groups]
        wanted = [row["lr_group0_unet"], row["lr_group1_cc_projection"]]
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        assert ema.updates == row["ema_num_updates"]
    for key in expected:
        if key.startswith("after3/delta:"):
            n = key.split(":")[1].split(" ")[0]
            # a step of Adam is lr * sign where the gradient is only rounding: two lr a step at most
            found = sliced(dict(net.named_parameters())[n].detach() - before[n], key)
            differs = (found - expected[key]).abs() > max(10 * observed.get(key, 0), 2e-7)
            assert differs.float().mean() < 1e-3, key
        elif key.startswith("after3/model_ema."):
            averages = {checkpoint.ema_name(n): p for n, p in ema.average.items()}
            same(key, averages[key.removeprefix("after3/").split(" ")[0]])
        elif key.startswith("after3/"):
            same(key, dict(net.named_parameters())[key.removeprefix("after3/").split(" ")[0]])


def test_warm_up_is_the_references():
    case, _ = golden.case("training_step")
    config = configs.Config(SOURCES)
    for step, share in case["scheduler_multiplier_at_step"].items():
        assert learning_rate(int(step), config) == pytest.approx(share, rel=1e-12)


# ---- whole runs, on a few tiny scenes

def test_fewer_held_out_pairs_than_asked_for_are_all_scored(shards, tmp_path):
    said = run(tiny(shards, tmp_path / "few", steps=1, eval_pairs=5000))
    found = int(re.search(r"held out are (\d+) pairs, of the 5000 of --eval_pairs", said)[1])
    assert json.loads((tmp_path / "few/metrics.json").read_text())["pairs"] == found < 5000


def test_a_run_leaves_checkpoint_log_grid_and_scores(whole_run):
    out, said = whole_run
    assert len(logged(out)) == 6
    assert (out / "step_00000006" / "meta.json").exists()
    assert (out / "grids" / "step_00000006.png").exists()
    scores = json.loads((out / "metrics.json").read_text())["psnr"]
    assert set(scores) == {"this model", "repeat the view", "its mean colour"}
    assert "held-out PSNR over 8 pairs" in said


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(shards, whole_run, tmp_path):
    out = tmp_path / "halves"
    run(tiny(shards, out, steps=3))
    assert "start    step 3 of" in run(tiny(shards, out))
    assert logged(out) == logged(whole_run[0])
    assert_same_state(out, whole_run[0], 6)


def test_what_a_killed_run_logged_beyond_its_checkpoint_is_logged_once(shards, whole_run, tmp_path):
    out = tmp_path / "killed"
    run(tiny(shards, out, steps=3))
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    run(tiny(shards, out))
    assert logged(out) == logged(whole_run[0])


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_a_signal_to_the_whole_group_saves_at_once_and_the_run_goes_on(shards, tmp_path):
    out = tmp_path / "stopped"
    # no step is saved of itself for a long time
    arguments = tiny(shards, out, CHEAP, steps=100_000, workers=1, save_every=100_000, log_every=5,
                     sample_every=100_000)
    process = subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT,
                               start_new_session=True, env=ONE_THREAD, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        while "step 5/" not in process.stdout.readline():
            assert process.poll() is None
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGHUP)       # the terminal is closed, and more
        os.killpg(process.pid, signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0 and "saved; the same command goes on" in said, errors
    assert time.monotonic() - began < 20        # on a machine that does other things too
    (folder,) = out.glob("step_*")
    done = int(folder.name.removeprefix("step_"))
    assert logged(out, "step")[-1] == done and 0 < done < 100_000
    run(tiny(shards, out, steps=done + 1))
    assert logged(out, "step")[-2:] == [done, done + 1]


@pytest.mark.parametrize("ema_per, updates", [("step", 2), ("micro_step", 4)])
def test_the_average_moves_once_a_step_or_once_a_micro_step(shards, tmp_path, ema_per, updates):
    out = tmp_path / "averaged"
    run(tiny(shards, out, steps=2, micro_batch=4, ema_per=ema_per))
    meta = json.loads((out / "step_00000002" / "meta.json").read_text())
    assert meta["ema_updates"] == updates


def test_a_run_starts_from_another_runs_weights_and_averages(shards, whole_run, tmp_path):
    out = tmp_path / "tuned"
    run(tiny(shards, out, init=whole_run[0], steps=1, save_every=1, lr=1e-9, lr_projection=1e-9,
             weight_decay=0))
    before, after = saved(whole_run[0], 6), saved(out, 1)
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)
    meta = json.loads((out / "step_00000001" / "meta.json").read_text())
    assert meta["ema_updates"] == 7     # six of the run before, which finetuning takes over


def test_training_lowers_the_loss(shards, tmp_path):
    out = tmp_path / "long"
    run(tiny(shards, out, steps=50, batch_size=8, lr=3e-3, save_every=50))
    curve = logged(out)
    assert np.mean(curve[-10:]) < 0.7 * np.mean(curve[:5])


@pytest.mark.parametrize("change, wanted", [
    ({"lr_schedule": "cosine"}, [0, 1, 0.853553, 0.5, 0.146447]),
    ({"warmup_steps": 2}, [0, 0.5, 1, 1, 1])])
def test_the_rate_follows_its_schedule(change, wanted):
    config = replace(configs.Config(SOURCES), **{"steps": 5, "warmup_steps": 1, **change})
    found = [learning_rate(step, config) for step in range(5)]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_gradients_are_clipped_where_asked_for(shards, tmp_path):
    out = tmp_path / "clipped"
    run(tiny(shards, out, steps=2, grad_clip=1e-3, save_every=1))
    assert all(norm > 1e-3 for norm in logged(out, "grad_norm"))
    moments = saved(out, 1, "optimizer")
    total = sum(m.double().square().sum() for name, m in moments.items()
                if name.endswith(".exp_avg")).sqrt()
    # the first moment after one step is (1 - .9) of the gradient
    assert total.item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_bf16_keeps_weights_averages_and_moments_in_float32(shards, whole_run, tmp_path):
    out = tmp_path / "bf16"
    run(tiny(shards, out, steps=2, precision="bf16"))
    assert all(tensor.dtype == torch.float32 for name in ("model", "ema", "optimizer")
               for tensor in saved(out, 2, name).values())
    # eight bits of mantissa in the products: near, but not the same
    exact = logged(whole_run[0])[1]
    assert logged(out)[1] != exact and logged(out)[1] == pytest.approx(exact, rel=2e-2)


def test_a_parameter_without_a_gradient_is_decayed_and_saved_like_the_others(shards, tmp_path):
    # of self-attention over a grid of one position only the values matter
    config = configs.load(tiny(shards, tmp_path / "one"))
    net = model.build(config)
    optimizer = Optimizer(net, config)
    before = net.cc_projection.weight.detach().clone()
    optimizer.step(0)
    assert torch.allclose(net.cc_projection.weight, before * (1 - 1e-3 * config.weight_decay))
    assert len(list(optimizer.tensors())) == 3 * len(optimizer.trained)


# ---- several ranks

def ranks_main(rank, jobs, outcomes):
    """In a process that stays for all jobs (world, port, arguments, stderr): their outcomes."""
    forked.quick(pytest.MonkeyPatch())      # what a run needs is of no concern here
    for i, (world, port, arguments, errors) in enumerate(jobs):
        if rank >= world:
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with (open(errors, "a") as file, contextlib.redirect_stderr(file),
              contextlib.redirect_stdout(file)):
            try:
                # where a run has @RANK for its folder, ranks have disks of their own
                train.main([a.replace("@RANK", str(rank)) if a.startswith("--out=") else a
                            for a in arguments])
                outcomes.put((i, rank, ""))
            except (ValueError, OSError, RuntimeError, SystemExit) as err:
                outcomes.put((i, rank, f"{type(err).__name__}: {err}"))


def run_ranks(jobs, folder):
    """Runs jobs {name: (world, arguments)}, one after the other, in the same few processes. Returns
    ({name: {rank: error or ""}}, {name: what was said})."""
    ports = []
    with contextlib.ExitStack() as stack:       # all held at once, so that no two are the same
        for _ in jobs:
            free = stack.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    files = [folder / f"{name}.said" for name in jobs]
    context = multiprocessing.get_context("fork")
    outcomes = context.Queue()
    rows = [(world, port, arguments, str(file))
            for (world, arguments), port, file in zip(jobs.values(), ports, files)]
    processes = [context.Process(target=ranks_main, args=(rank, rows, outcomes), daemon=True)
                 for rank in range(max(row[0] for row in rows))]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 300
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    found = {name: {} for name in jobs}
    while not outcomes.empty():
        i, rank, error = outcomes.get()
        found[list(jobs)[i]][rank] = error
    return found, {name: file.read_text() for name, file in zip(jobs, files)}


@pytest.fixture(scope="session")
def ranked(shards, spoilt, tmp_path_factory):
    """The folder of runs on several ranks, their outcomes, and what they said."""
    out = tmp_path_factory.mktemp("ranked")
    plain = {"micro_batch": 2, "validate_every": 3, "validate_pairs": 8}
    divided = {**plain, "divide_optimizer": True}
    run(tiny(shards, out / "apart0", steps=3))
    jobs = {
        "apart": (2, tiny(shards, out / "apart@RANK", **divided)),
        "two": (2, tiny(shards, out / "two", **plain)),
        "half": (2, tiny(shards, out / "half", **divided, steps=3)),
        "other half": (2, tiny(shards, out / "half", **plain)),
        "nan": (2, tiny(shards, out / "nan", lr=1e6, steps=50, log_every=50)),
        "odd": (2, tiny(shards, out / "odd", batch_size=9)),
        # few steps: no rank sees all that is damaged
        "spoilt": (2, tiny(spoilt, out / "spoilt", max_damaged=1, steps=2)),
        "killed": (2, tiny(shards, out / "killed", kill_one_rank(out / "killed"), steps=100_000)),
    }
    return out, *run_ranks(jobs, out)


def test_ranks_and_micro_steps_train_as_one_process_does(ranked, whole_run):
    out, outcomes, _ = ranked
    assert outcomes["two"] == {0: "", 1: ""}
    # the same sums in another order: float32 rounding
    np.testing.assert_allclose(logged(out / "two"), logged(whole_run[0]), rtol=1e-5)
    for found, expected in zip(logged(out / "two", "loss_by_timestep"),
                               logged(whole_run[0], "loss_by_timestep")):
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_divided_optimizer_trains_bit_for_bit_as_a_whole_one_and_turns_into_it(ranked):
    # a resume on the same number of ranks is exact too
    out, outcomes, _ = ranked
    assert outcomes["half"] == outcomes["other half"] == {0: "", 1: ""}
    assert logged(out / "half") == logged(out / "two")
    assert_same_state(out / "half", out / "two", 3)
    assert_same_state(out / "half", out / "two", 6)
    # validated are the averaged weights, of which no rank has all
    first, second = ([line.get("val_loss") for line in map(json.loads, (out / name / "log.jsonl")
                      .read_text().splitlines())] for name in ("half", "two"))
    assert first == second and first[2] and first[5]


def test_a_whole_run_goes_on_divided_on_two_ranks_and_only_rank_0s_disk_needs_its_folder(
        ranked, whole_run):
    out, outcomes, said = ranked
    assert outcomes["apart"] == {0: "", 1: ""} and "start    step 3 of" in said["apart"]
    assert "moments and average divided" in said["apart"] and said["apart"].count("machine") == 1
    np.testing.assert_allclose(logged(out / "apart0"), logged(whole_run[0]), rtol=1e-5)
    assert not list((out / "apart1").glob("step_*"))


def test_the_others_stop_when_a_rank_dies(ranked):
    assert list(ranked[1]["killed"]) == [0]         # rank 1 has nothing to say any more
    assert "a rank is gone, so the others stop" in ranked[1]["killed"][0]


def test_what_any_rank_finds_damaged_is_counted_and_named(ranked, spoilt, tmp_path):
    run(tiny(spoilt, tmp_path / "spoilt", max_damaged=1, steps=2))
    counts = []
    for out in (tmp_path / "spoilt", ranked[0] / "spoilt"):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        counts.append((lines[-1]["damaged"], {line["note"] for line in lines if "note" in line}))
    assert counts[0] == counts[1] and counts[0][0] > 10
    assert 2 < len(counts[0][1]) <= counts[0][0]


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_pairs(ranked):
    out, outcomes, said = ranked
    assert outcomes["nan"] == {0: "SystemExit: 1", 1: "SystemExit: 1"}
    found = re.search(r"the loss of step (\d+) is not finite on rank (\d), for \d pairs, pair (\d+): "
                      r"(\S+\.tar:\S+/\S+:\d->\d)", said["nan"])
    assert found, said["nan"]
    step, rank, k = (int(found[i]) for i in (1, 2, 3))
    assert step * 8 + rank * 4 <= k < step * 8 + rank * 4 + 4
    # nothing that came after it was saved
    assert not any((out / "nan").glob("step_*")) or step >= 3


def test_a_batch_that_does_not_divide_is_refused_with_what_would(ranked):
    refusal = ranked[1]["odd"][0]
    assert "batch_size 9 is not divisible by 2 ranks" in refusal
    assert "--batch_size=8 or 10" in refusal and "micro_batch 8" in refusal


@pytest.mark.parametrize("option, says", [
    ("--betas=0.9", "two numbers"), ("--betas=2,3", "from 0 to 1"), ("--max_damaged=-1", "from 0 to 1"),
    ("--channel_mult=", "channel_mult is ()"), ("--channel_mult=1,0", "whole number from 1 to"),
    ("--attention_resolutions=1,3", "3 is no power of 2"), ("--num_heads=99", "num_heads 99"),
    ("--sample_steps=2000", "it must be 1 to 1000"), ("--seed=-1", "from 0 to")])
def test_what_no_run_can_have_is_refused_at_the_gate(shards, tmp_path, option, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        configs.load([*tiny(shards, tmp_path), option])


def test_the_references_sampler_has_its_own_bounds(shards, tmp_path):
    for steps in (1, 501):
        with pytest.raises(ValueError, match="must be 2 to 500"):
            configs.load([*tiny(shards, tmp_path), "--sampler=reference",
                          f"--sample_steps={steps}"])


# ---- memory

def test_the_state_of_a_run_has_exactly_the_bytes_that_were_promised(shards, tmp_path):
    config = configs.load(tiny(shards, tmp_path / "bytes"))
    needs = cost.of(config, ALONE, 8)
    net = model.build(config).train()
    ema, optimizer = resume.restore_or_init(config, net, None, ALONE, torch.device("cpu"))
    parameters = [p for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)

    def size(tensors):
        return sum(t.numel() * t.itemsize for t in tensors)

    assert needs.weights == size([*net.parameters(), *net.buffers()])
    assert needs.gradients == size(p.grad for p in parameters)
    optimizer.step(0)
    assert needs.average == size(ema.average.values())
    assert needs.moments == size(t for name, t in optimizer.tensors() if not name.endswith(".step"))


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_a_forward_pass_keeps(shards, tmp_path, recompute):
    config = configs.load(tiny(shards, tmp_path / "kept", checkpoint_activations=recompute))
    net = model.build(config).train()
    engine.convert(net)
    unet, kept = net.model.diffusion_model, {}
    channels, *grid = model.latent_shape(config)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.randn(3, 2 * channels, *grid), torch.rand(3),
             torch.randn(3, 1, 32, requires_grad=True))
    own = {p.data_ptr() for p in unet.parameters()}
    found = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    needs = cost.of(config, ALONE, 3)
    assert needs.activations == pytest.approx(found, rel=0.02)


def test_flops_are_those_of_products_convolutions_and_attention():
    a, b, x, kernel = (torch.randn(shape) for shape in ((5, 7), (7, 11), (2, 3, 8, 8),
                                                        (4, 3, 3, 3)))
    assert cost.flops_of(lambda: a @ b) == 2 * 5 * 7 * 11
    assert cost.flops_of(lambda: F.conv2d(x, kernel, padding=1)) == 2 * 2 * 8 * 8 * 4 * 3 * 9
    q, k, v = torch.randn(3, 2, 4, 16, 8)       # with each of 16 tokens: q k, and what that gives v
    products = 2 * (2 * 2 * 4 * 16**2 * 8)
    assert cost.flops_of(lambda: F.scaled_dot_product_attention(q, k, v)) == products
    full = cost.of(configs.load([str(Path(configs.__file__).parent / "mix.py")]), ALONE, 1)
    # 510 GFLOP a pair forward and backward, which is counted as two passes forward; less 5/9 of the
    # convolutions after an upsampling, see conv.py
    upsampled = sum(2 * c * c * 9 * side**2 for c, side in ((1280, 8), (1280, 16), (640, 32)))
    assert (1 + cost.BACKWARD) * (full.flops + 5 / 9 * upsampled) == pytest.approx(510e9, rel=1e-3)


def test_ranks_that_divide_keep_their_share():
    parameters = {str(i): torch.empty(size) for i, size in enumerate((50, 30, 20, 20, 7, 3, 1))}
    ranks = Alone()
    ranks.world = 4
    division = Division(parameters, ranks, True)
    kept = [sum(p.numel() for name, p in parameters.items() if division.owner[name] == rank)
            for rank in range(4)]
    assert sorted(kept) == [24, 27, 30, 50]
    assert sum(kept) == 131 and division.mine.keys() == {
        name for name in parameters if division.owner[name] == 0}


def test_too_little_memory_is_refused_with_the_estimate_and_what_lowers_it(
        shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available", lambda device: 1e6)
    with pytest.raises(ValueError, match=r"needs ~ .* GB .*has 0\.00 GB; a smaller "
                       "--micro_batch, --checkpoint_activations=true, --precision=bf16"):
        run(tiny(shards, tmp_path / "small"))
    monkeypatch.setattr(cost, "available", lambda device: 8e6)
    assert "memory may not suffice" in run(tiny(shards, tmp_path / "large", steps=1,
                                                micro_batch=64, batch_size=64))


def test_running_out_of_memory_is_one_line(shards, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(train, "inputs", full)
    with pytest.raises(ValueError, match="out of memory on cpu, see the estimate above; a smaller"):
        run(tiny(shards, tmp_path / "out of memory"))


# ---- what a user sees

def test_a_run_begins_with_code_machine_network_memory_data_and_start(whole_run):
    said = whole_run[1].splitlines()
    for line, words in zip(said, (
            r"code     .*torch \d", r"machine  1 x cpu, .*fp32", r"network  0\.4 M parameters tra",
            r"steps    6, of 8 pairs = 1 ranks x 1 micro-steps x 8", r"memory   ~ .*weights .*mom",
            r"data     co3d: 1 shards, 4 scenes, 16 views", r"data     re10k",
            r"start    random weights")):
        assert re.match(words, line), line


def test_a_log_line_tells_rate_ceiling_waiting_memory_and_time(whole_run):
    out, said = whole_run
    assert re.search(r"step 6/6: loss 0\.\d+, lr 0\.001, [\d.]+ pairs/s, \d+% of peak, data wait "
                     r"\d+%, [\d.]+ GB, 0:00:00 left", said)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0 < line["ceiling_share"] < 1 and 0 <= line["data_wait"] <= 1
        assert line["pairs_per_s"] > 0 and line["memory_gb"] > 0.05
    assert lines[0]["remaining_s"] == pytest.approx(5 * 8 / lines[0]["pairs_per_s"])


def test_the_loss_by_timestep_is_that_of_the_samples_in_the_band():
    meter = report.Meter()
    loss = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0])
    t = torch.tensor([0, 249, 250, 999, 750, 749])
    for i in range(0, 6, 2):
        meter.add(loss[i:i + 2], t[i:i + 2])
    numbers, losses, bad, _ = meter.read(ALONE, 3, 1)
    assert numbers["loss_by_timestep"] == {"0-249": 1.5, "250-499": 3.0, "500-749": 11.0,
                                           "750-999": 6.0}
    assert numbers["loss"] == pytest.approx(29 / 6) and losses.shape == (3, 2) and not bad
    numbers, losses, *_ = meter.read(ALONE, 2, 1)        # the last micro-step is of a step not done
    assert numbers["loss"] == 2.75 and "500-749" not in numbers["loss_by_timestep"]


def test_tensorboard_gets_numbers_and_pictures_where_it_is_installed(
        shards, tmp_path, monkeypatch):
    got = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            got.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            got.append((name, step))

        def add_image(self, name, image, step, dataformats):
            got.append((name, image.shape[2], step))

        def close(self):
            got.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=SummaryWriter))
    out = tmp_path / "board"
    run(tiny(shards, out, steps=2, log_every=2))
    assert got[0] == (str(out / "tensorboard"), 1) and got[-1] == "closed"
    assert ("loss", 2) in got and ("grids", 3, 2) in got
    assert any(name[0].startswith("loss_by_timestep/") for name in got)


def test_a_validation_is_logged_with_the_loss_of_its_step(shards, tmp_path):
    out = tmp_path / "validated"
    run(tiny(shards, out, steps=4, validate_every=2, validate_pairs=8, log_every=4, image_size=16))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4]        # 3 is a checkpoint's
    assert [("val_psnr" in line, "val_loss" in line) for line in lines] == [
        (True, True), (False, False), (True, True)]
    assert all("loss" in line for line in lines)


def test_encoded_pairs_are_given_to_the_network_as_they_are():
    batch = {"moments_target": torch.randn(2, 8, 4, 4).half(),
             "mean_cond": torch.randn(2, 4, 4, 4).half(), "clip_cond": torch.randn(2, 6).half(),
             "cond_c2w": torch.eye(4).repeat(2, 1, 1).double(), "fov": torch.ones(2).double(),
             "target_c2w": torch.eye(4).repeat(2, 1, 1).double(), "radius": torch.ones(2).double(),
             "scale": torch.full((2,), 0.5).double()}
    mean, logvar, z_cond, embedding, T = train.inputs(None, batch, configs.Config(SOURCES), None,
                                                      torch.device("cpu"))
    assert torch.equal(torch.cat([mean, logvar], dim=1), batch["moments_target"].float())
    assert torch.equal(z_cond, batch["mean_cond"].float()) and T.shape == (2, 19)
    assert torch.equal(embedding, batch["clip_cond"].float())
    assert {x.dtype for x in (mean, logvar, z_cond, embedding, T)} == {torch.float32}


def test_profile_writes_a_trace_of_so_many_steps(shards, tmp_path):
    out = tmp_path / "traced"
    said = run([*tiny(shards, out, steps=5), "--profile", "2"])
    assert "trace.json.gz: open it at" in said
    events = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert len(steps) == 2


def test_a_dry_run_says_what_would_run_and_writes_nothing(shards, whole_run, tmp_path):
    said = run([*tiny(shards, tmp_path / "dry"), "--dry-run"])
    assert "memory   ~" in said and "data     co3d" in said and "step 1/6" not in said
    assert not (tmp_path / "dry").exists()
    said = run([*tiny(shards, whole_run[0], steps=9), "--dry-run"])
    assert "start    step 6 of" in said and len(logged(whole_run[0])) == 6


# ---- bad input

def test_another_configuration_in_the_same_folder_is_refused_with_what_differs(shards, whole_run):
    with pytest.raises(ValueError, match="lr was 0.001, is 0.0005"):
        run(tiny(shards, whole_run[0], lr=5e-4, steps=9))


@pytest.mark.parametrize("change, message", [
    ({"mode": "8dof"}, "mode '8dof' is not known"),
    ({"mode": "7dof_metric_scale"}, "needs a metric depth network"),
    ({"mode": "7dof_metric_scale", "depth_weights": "midas.pt"}, "needs a metric depth network"),
    ({"data": "/nowhere"}, "/nowhere"),
    ({"batch_size": 7, "micro_batch": 3}, "--micro_batch=1 does"),
    ({"device": "cuda"}, "this machine has"),
    ({"image_size": 32}, "32"),
    ({"init": "/nowhere.ckpt"}, "/nowhere.ckpt"),
    ({"init": "/nowhere.ckpt", "data": "/no/data/either"}, "/nowhere.ckpt"),    # before the data
    ({"latent": "vae"}, "needs --init=FILE"),
])
def test_bad_input_is_refused_with_what_is_wrong(shards, tmp_path, change, message):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as refusal:
        run(tiny(shards, tmp_path / "bad", **change))
    assert "\n" not in str(refusal.value)


def test_a_refusal_is_one_line_on_the_command_line_and_exit_code_2(shards, tmp_path):
    done = forked.run("train.py", *tiny(shards, tmp_path / "bad", batch_size=7, micro_batch=3))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: batch_size 7 on 1 ranks is 7 pairs each")


BEFORE_TORCH = """
import runpy, sys
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize("argument, code, says", [
    ("--help", 0, "usage: train.py CONFIG"),
    ("--stepz=3", 2, "train.py: option --stepz is not known, did you mean --steps?"),
    ("--profile=-1", 2, "train.py: argument --profile: -1 is not possible")])
def test_help_and_a_typo_are_answered_before_torch_is_imported(argument, code, says):
    done = subprocess.run([sys.executable, "-c", BEFORE_TORCH, argument], cwd=ROOT, text=True,
                          capture_output=True, timeout=60, check=False)
    assert done.returncode == code and done.stdout.endswith("False\n"), done.stderr
    assert (done.stderr or done.stdout).startswith(says) and done.stderr.count("\n") <= 1


def test_a_gpu_for_every_rank_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="machine has 2: torchrun --nproc_per_node 2"):
        distributed.join(torch.device("cuda"))


def test_a_rank_makes_its_own_gpu_the_current_one(monkeypatch):
    """Where nobody does, Triton's kernels are launched on the first GPU, whatever they read."""
    made_current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert made_current == [1]
    assert distributed.own_device(torch.device("cpu")) == torch.device("cpu")
    assert made_current == [1]


# ---- configuration

@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda p: p.name)
def test_every_config_file_loads_and_survives_being_stored(path):
    config = configs.load([str(path)])
    assert configs.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert cost.split(config, 1)[0] * cost.split(config, 1)[1] == config.batch_size


def test_sources_whose_probabilities_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 0.5, not 1"):
        configs.Config(SOURCES[:1])
