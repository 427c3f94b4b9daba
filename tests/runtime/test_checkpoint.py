"""checkpoint.py: models filled from files, runs that no crash loses, one form made of another."""

import json
import os
import runpy
import signal
import sys
import threading
import time

import pytest
import torch
from golden import FOLDER, SALT, case, weight
from safetensors.torch import load_file, save_file
from torch import nn

import configs
import model
from runtime import checkpoint, runs
from runtime import foreign as tensorfile
from runtime.tensors import write_safetensors
from runtime.checkpoint import EMA, INPUT_CONV, POSE, UNET, ema_name


def tree(**tensors):
    """A module with these parameters, under dotted names."""
    root = nn.Module()
    for name, value in tensors.items():
        owner, *path, leaf = root, *name.split(".")
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(leaf, nn.Parameter(value))
    return root


def small(width=6, fill=0.0):
    """A module with a name of every part of the checkpoint's."""
    shapes = {INPUT_CONV: (4, 8, 3, 3), UNET + "out.2.bias": (4,), POSE: (4, width),
              "cc_projection.bias": (4,), "first_stage_model.quant_conv.bias": (3,),
              "cond_stage_model.model.visual.proj": (2, 3)}
    return tree(**{name: torch.full(shape, fill) for name, shape in shapes.items()})


def checkpoint_of(module, seed=0, ema=True):
    """A state dict that fits the module, with averages of other values."""
    torch.manual_seed(seed)
    state = {name: torch.randn(value.shape) for name, value in module.state_dict().items()}
    if ema:
        state.update({ema_name(name): torch.randn(value.shape)
                      for name, value in state.items() if name.startswith(UNET)})
        state |= {EMA + "decay": torch.tensor(0.9999), EMA + "num_updates": torch.tensor(7)}
    return state


def saved(path, state, **more):
    torch.save({"state_dict": state, "global_step": 12, **more}, path)
    return path


def refusal(*arguments, **options):
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- into a model

def test_a_file_fills_a_model_and_what_other_tools_leave_in_files_is_no_misfit(tmp_path):
    state = checkpoint_of(small())
    extra = {"lvlb_weights": torch.zeros(3), "betas": torch.zeros(3), "logvar": torch.zeros(3),
             "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2), "step": 5}}}
    path = saved(tmp_path / "x.ckpt", {**state, **extra}, optimizer_states=[optimizer])
    module = small()
    report = checkpoint.load_model(module, path)
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
    assert report.num_updates == 7
    assert torch.equal(report.ema[INPUT_CONV], state[ema_name(INPUT_CONV)])


def test_ema_fills_the_unet_alone_with_the_average(tmp_path):
    state = checkpoint_of(small())
    module = small()
    report = checkpoint.load_model(module, saved(tmp_path / "x.ckpt", state), ema=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[ema_name(name) if name.startswith(UNET) else name])
    assert report.num_updates == 7


def test_ema_of_a_file_without_it_is_refused(tmp_path):
    path = saved(tmp_path / "x.ckpt", checkpoint_of(small(), ema=False))
    assert f"2 missing ({ema_name(INPUT_CONV)}" in refusal(small(), path, ema=True)


def test_misfit_lists_what_is_wrong_and_leaves_the_module_as_it_was(tmp_path):
    state = checkpoint_of(small())
    del state["cc_projection.bias"]
    state["first_stage_model.quant_conv.bias"] = torch.zeros(5)
    state["first_stage_model.surprise"] = torch.zeros(5)
    module = small(fill=3.0)
    message = refusal(module, saved(tmp_path / "x.ckpt", state))
    assert "1 missing (cc_projection.bias)" in message
    assert "1 unexpected (first_stage_model.surprise)" in message
    assert "1 misshapen (first_stage_model.quant_conv.bias [5] instead of [3])" in message
    assert all((value == 3).all() for value in module.state_dict().values())


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("cc_projection.bias"), "1 missing"),
    (lambda state: state.update(surprise=torch.zeros(1)), "1 unexpected"),
    (lambda state: state.update({"cc_projection.bias": torch.zeros(1)}), "1 misshapen")])
def test_one_misfit_of_any_kind_is_enough(tmp_path, change, message):
    state = checkpoint_of(small())
    change(state)
    assert message in refusal(small(), saved(tmp_path / "x.ckpt", state))


def test_another_architecture_is_refused_in_one_short_line(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"layers.{i}.weight": torch.zeros(1) for i in range(500)}, path)
    message = refusal(small(), path)
    assert "6 missing" in message and "500 unexpected" in message and len(message) < 1000


def test_another_pose_width_is_refused(tmp_path):
    path = saved(tmp_path / "x.ckpt", checkpoint_of(small(width=6)))
    assert "[4, 6] instead of [4, 9]" in refusal(small(width=9), path)


def test_module_keeps_dtype_and_requires_grad(tmp_path):
    state = checkpoint_of(small())
    module = small().half()
    module.first_stage_model.requires_grad_(False)
    checkpoint.load_model(module, saved(tmp_path / "x.ckpt", state))
    assert torch.equal(module.cc_projection.weight, state[POSE].half())
    assert not module.first_stage_model.quant_conv.bias.requires_grad
    assert module.cc_projection.weight.requires_grad


def test_module_on_meta_gets_real_tensors(tmp_path):
    state = checkpoint_of(small())
    module = small().to("meta")
    checkpoint.load_model(module, saved(tmp_path / "x.ckpt", state))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert isinstance(module.cc_projection.weight, nn.Parameter)


def test_transposed_weights_become_contiguous(tmp_path):
    state = checkpoint_of(small())
    state[POSE] = state[POSE].t().contiguous().t()
    module = small()
    checkpoint.load_model(module, saved(tmp_path / "x.ckpt", state))
    assert module.cc_projection.weight.is_contiguous()
    assert torch.equal(module.cc_projection.weight, state[POSE])


@pytest.mark.parametrize("parts", [
    ["first_stage_model", "cond_stage_model"], ["model", "cc_projection"], ["model"]])
def test_parts_that_the_model_lacks_are_unused(tmp_path, parts):
    module = small()
    state = checkpoint_of(module)
    for part in parts:
        delattr(module, part)
    checkpoint.load_model(module, saved(tmp_path / "x.ckpt", state))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_every_key_of_zero123_xl_finds_its_place_in_zeronvs(tmp_path, monkeypatch):
    # names and shapes at full size; the tensors themselves are left on the meta device
    keys = json.loads((FOLDER / "zero123_keys.json").read_text())
    entries = {name: checkpoint.LazyTensor(getattr(torch, dtype), tuple(shape), lambda s=shape, d=dtype:
                                     torch.empty(s, dtype=getattr(torch, d), device="meta"))
               for name, (shape, dtype) in keys["keys"].items()}
    entries[EMA + "num_updates"].read = lambda: torch.tensor(5)
    entries[POSE].read = lambda: torch.zeros(768, 772)
    monkeypatch.setattr(checkpoint, "read", lambda path: checkpoint.StateDict(path, entries))
    used = []
    monkeypatch.setattr(checkpoint, "assign", lambda module, name, value: used.append(name))
    with torch.device("meta"):
        module = model.build(configs.Config((source(),), mode="3dof"))
    for finetune in (False, True):
        if finetune:                    # to 7dof
            module.cc_projection = nn.Linear(787, 768, device="meta")
            with pytest.raises(ValueError, match="real device"):
                checkpoint.load_model(module, "zero123-xl.ckpt", finetune=True)
            module.cc_projection = nn.Linear(787, 768)
        report = checkpoint.load_model(module, "zero123-xl.ckpt", finetune=finetune)
        assert len(used) == keys["total_keys"] - 688
        assert len(report.ema) == 686 and not report.fresh
        used.clear()


def source():
    return configs.Source("s", "co3d", "*.tar", 1.0)


# ---- fine-tuning

PORTED = ["cc_772_to_787", "cc_787_unchanged", "four_channel_input",
          "four_channel_no_ema_no_cc_with_foreign_keys"]
REFUSED = ["input_conv_key_absent", "cc_weight_wrong_output_size", "bias_wrong_size"]


def golden_module(keys):
    """Of the reference's model, the parameters that a case's file names (and the projection)."""
    shapes = {INPUT_CONV: (64, 8, 3, 3), UNET + "input_blocks.0.0.bias": (64,),
              POSE: (768, 787), "cc_projection.bias": (768,)}
    shapes = {name: shape for name, shape in shapes.items()
              if name in keys or name in (INPUT_CONV, POSE, "cc_projection.bias")}
    return tree(**{name: weight(name, shape) for name, shape in shapes.items()})


def golden_file(path, name):
    """The file of a case: tensors by the scheme with the salt "zeronvs/old/"."""
    description, _ = case("finetune_loading")
    description = description["cases"][name]
    state = {key: weight(key, shape, SALT + "old/")
             for key, shape in description["checkpoint_keys"].items()}
    if EMA + "num_updates" in state:
        state[EMA + "num_updates"] = torch.tensor(4321, dtype=torch.int32)
    torch.save({"state_dict": state} if description["nested_state_dict"] else state, path)
    return state


@pytest.mark.parametrize("name", PORTED)
def test_finetuning_starts_from_the_references_tensors(tmp_path, name):
    description, tensors = case("finetune_loading")
    state = golden_file(tmp_path / "x.ckpt", name)
    module = golden_module(state)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    report = checkpoint.load_model(module, tmp_path / "x.ckpt", finetune=True)
    after = module.state_dict() | {ema_name(key): value for key, value in report.ema.items()}
    checked = 0
    for key, expected in tensors.items():
        if key.startswith(name + "/"):
            key, _, index = key.removeprefix(name + "/").partition("[")
            if key == EMA + "num_updates":
                assert report.num_updates == int(expected)
            else:
                found = eval(f"value[{index}", {"value": after[key]}) if index else after[key]
                assert torch.equal(found, expected), key
            checked += 1
    assert checked
    stats = description["cases"][name]["stats"]
    assert all(float(after[key].double().abs().sum()) == pytest.approx(stats[key]["abs_sum"])
               for key in stats if key in after)
    for key in set(before) - set(description["cases"][name]["changed_keys"]):
        assert torch.equal(after[key], before[key]), f"{key} was changed"
        assert key in report.fresh


@pytest.mark.parametrize("name", REFUSED)
def test_finetuning_refuses_what_the_reference_refuses(tmp_path, name):
    state = golden_file(tmp_path / "x.ckpt", name)
    module = golden_module(state)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    named = {"input_conv_key_absent": "1 missing", "cc_weight_wrong_output_size": "[640, 772]",
             "bias_wrong_size": "[32] instead of [64]"}
    assert named[name] in refusal(module, tmp_path / "x.ckpt", finetune=True)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_missing_projection_is_no_fresh_one_on_meta(tmp_path):
    state = checkpoint_of(small())
    del state[POSE], state["cc_projection.bias"]
    path = saved(tmp_path / "x.ckpt", state)
    assert checkpoint.load_model(small(), path, finetune=True).fresh == [POSE, "cc_projection.bias"]
    assert "2 missing" in refusal(small().to("meta"), path, finetune=True)
    assert "2 missing" in refusal(small(), path)


def test_new_pose_columns_keep_the_models_random_start(tmp_path):
    state = checkpoint_of(small(width=8))
    module = small(width=23, fill=0.25)
    checkpoint.load_model(module, saved(tmp_path / "x.ckpt", state), finetune=True)
    assert torch.equal(module.cc_projection.weight[:, :4], state[POSE][:, :4])
    assert (module.cc_projection.weight[:, 4:] == 0.25).all()


def test_four_channels_are_widened_with_zeros_in_raw_and_averaged_weights(tmp_path):
    state = checkpoint_of(small())
    for key in (INPUT_CONV, ema_name(INPUT_CONV)):
        state[key] = state[key][:, :4].clone()
    module = small(fill=1.0)
    path = saved(tmp_path / "x.ckpt", state)
    report = checkpoint.load_model(module, path, finetune=True)
    for found, key in ((module.state_dict()[INPUT_CONV], INPUT_CONV),
                       (report.ema[INPUT_CONV], ema_name(INPUT_CONV))):
        assert torch.equal(found[:, :4], state[key]) and not found[:, 4:].any()
    assert "instead of [4, 8, 3, 3]" in refusal(small(), path)


# ---- runs

def states(step):
    """Model, average and optimizer of a step, recognisable by their values."""
    value = float(step)
    return ({UNET + "w": torch.full((50, 20), value), POSE: torch.full((3,), value)},
            {UNET + "w": torch.full((50, 20), value + 0.5)},
            {UNET + "w.exp_avg": torch.full((50, 20), -value)})


def save_step(out, step, **options):
    return checkpoint.save(out, step, *states(step), {"ema_updates": step}, **options)


def assert_is_step(folder, step):
    run = checkpoint.load_run(folder)
    assert run.step == run.meta["step"] == run.meta["ema_updates"] == step
    for found, expected in zip((run.model, run.ema, run.optimizer), states(step), strict=True):
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_saved_step_reads_back(tmp_path):
    folder = save_step(tmp_path / "out", 5000)
    assert folder.name == "step_00005000"
    assert_is_step(folder, 5000)
    found = checkpoint.read(tmp_path / "out")
    assert found.step == 5000
    assert torch.equal(found[ema_name(UNET + "w")], states(5000)[1][UNET + "w"])
    assert int(found[EMA + "num_updates"]) == 5000
    assert set(load_file(folder / "model.safetensors")) == set(states(0)[0])


def test_a_runs_frozen_networks_come_from_the_file_that_the_user_names(tmp_path):
    state = checkpoint_of(small())
    start = saved(tmp_path / "start.ckpt", state)
    trained = {name: value + 1 for name, value in state.items()
               if name.startswith((UNET, "cc_projection."))}
    meta = {"config": {"init": str(start)}}
    folder = checkpoint.save(tmp_path / "out", 3, trained, {}, {}, meta)
    # what a checkpoint names is shown and never opened
    assert_same(checkpoint.read(tmp_path / "out"), trained)
    assert f"--init={start}" in refusal(small(), folder)
    expected = trained | {name: value for name, value in state.items() if "_stage_model." in name}
    module = small()
    checkpoint.load_model(module, checkpoint.read(folder, init=start))
    assert_same(module.state_dict(), expected)
    checkpoint.convert(folder, tmp_path / "whole.safetensors", init=start)
    assert_same(load_file(tmp_path / "whole.safetensors"), expected)
    with pytest.raises(ValueError, match="no autoencoder and no CLIP"):
        checkpoint.read(folder, init=folder)


def test_newest_steps_and_every_nth_are_kept(tmp_path):
    for step in range(10, 80, 10):
        save_step(tmp_path, step, keep=2, keep_every=30)
    assert [checkpoint.step_of(folder) for folder in checkpoint.steps(tmp_path)] == [70, 60, 30]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.filterwarnings("error")
def test_a_folder_without_meta_does_not_exist(tmp_path):
    save_step(tmp_path, 10)
    (save_step(tmp_path, 20) / "meta.json").unlink()
    assert checkpoint.latest(tmp_path).name == "step_00000010"
    assert checkpoint.latest(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", [*checkpoint.FILES, "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_step_is_reported_and_the_one_before_is_used(tmp_path, name, damage):
    save_step(tmp_path, 10)
    file = save_step(tmp_path, 20) / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 255
    file.write_bytes(data[:-1] if damage == "cut" else b"" if damage == "empty" else data)
    if damage == "gone":
        file.unlink()
    if (name, damage) == ("meta.json", "gone"):
        assert_is_step(checkpoint.latest(tmp_path), 10)
        return
    reason = "bytes of checksum" if damage == "cut" and name in checkpoint.FILES else ""
    with pytest.warns(UserWarning, match="step_00000020 is damaged.*" + reason):
        assert_is_step(checkpoint.latest(tmp_path), 10)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(file.parent)


def test_a_step_behind_a_damaged_one_is_not_pruned_for_it(tmp_path):
    save_step(tmp_path, 10)
    (save_step(tmp_path, 30) / checkpoint.FILES[0]).write_bytes(b"")
    save_step(tmp_path, 20, keep=1)
    with pytest.warns(UserWarning, match="damaged"):
        assert_is_step(checkpoint.latest(tmp_path), 20)
    save_step(tmp_path, 30, keep=1)     # written once more
    assert_is_step(checkpoint.latest(tmp_path), 30)


def test_a_full_disk_leaves_the_step_before_and_no_remains(tmp_path):
    resource = pytest.importorskip("resource", reason="no file size limit on this system")
    save_step(tmp_path, 10)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for allowed in (0, 100, 4000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limit[1]))
            with pytest.raises(OSError):
                save_step(tmp_path, 20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert_is_step(checkpoint.latest(tmp_path), 10)


@pytest.mark.parametrize("writes", range(5))
def test_a_write_that_fails_leaves_the_step_before_and_no_remains(tmp_path, monkeypatch, writes):
    # three files, meta.json and the folder itself are synced before the folder gets its name
    save_step(tmp_path, 10)
    calls = iter(range(100))
    genuine = os.fsync

    def fsync(handle):
        if next(calls) == writes:
            raise OSError(28, "No space left on device")
        genuine(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError):
        save_step(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert_is_step(checkpoint.latest(tmp_path), 10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("error:.*damaged", "ignore:.*fork")
def test_a_run_killed_at_any_moment_resumes_from_a_whole_step(tmp_path):
    reached, progressed, pause = 0, 0, 0.02
    for _ in range(20):
        child = os.fork()
        if not child:
            step = reached
            while True:
                step += 1
                save_step(tmp_path, step, keep=2, keep_every=50)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder = checkpoint.latest(tmp_path)        # a damaged one would be warned about: an error
        step = checkpoint.step_of(folder) if folder else 0
        assert step >= reached, "a step that was there is lost"
        if folder:
            assert_is_step(folder, step)
        progressed += step > reached
        pause += 0.0037 if step > reached else 0.05     # a busy machine takes longer for a step
        reached = step
    assert progressed > 2, "no step was ever finished"


def test_a_writer_saves_what_was_at_the_time_and_lets_the_caller_go_on(tmp_path, monkeypatch):
    release, genuine = threading.Event(), runs.save
    monkeypatch.setattr(runs, "save",
                        lambda *rest: (release.wait(30), genuine(*rest)))
    writer, parts = checkpoint.Writer(), states(10)
    writer.save(tmp_path, 10, *(part.items() for part in parts), {"ema_updates": 10})
    assert not list(tmp_path.iterdir())         # it is not there yet, and we are here already
    for part in parts:
        for tensor in part.values():
            tensor.fill_(99)                    # what training does next
    release.set()
    writer.wait()
    assert_is_step(checkpoint.latest(tmp_path), 10)
    assert writer.problem == ""


def test_a_writer_writes_one_step_at_a_time_into_memory_that_it_keeps(tmp_path, monkeypatch):
    running, most, genuine = [], [], runs.save

    def save(*rest):
        running.append(0)
        most.append(len(running))
        time.sleep(0.02)
        genuine(*rest)
        running.pop()
    monkeypatch.setattr(runs, "save", save)
    writer, places = checkpoint.Writer(), set()
    for step in (10, 20, 30):
        writer.save(tmp_path, step, *(part.items() for part in states(step)), {"ema_updates": step})
        places |= {copy.data_ptr() for copy in writer.copies.values()}
    writer.wait()
    assert most == [1, 1, 1] and len(places) == len(writer.copies) == 4
    for folder in checkpoint.steps(tmp_path):
        assert_is_step(folder, checkpoint.step_of(folder))


def test_a_writer_tells_that_a_write_failed_and_goes_on(tmp_path, monkeypatch):
    said = []
    writer = checkpoint.Writer(said.append)

    def save_step(step):
        writer.save(tmp_path, step, *(part.items() for part in states(step)), {"ema_updates": step})
        writer.wait()
    save_step(10)
    with monkeypatch.context() as broken:
        def full(handle):
            raise OSError(28, "No space left on device")
        broken.setattr(os, "fsync", full)
        save_step(20)
    assert said == [f"step 20 could not be saved, training goes on: {writer.problem}"]
    assert "No space left on device" in writer.problem
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    save_step(30)
    assert writer.problem == "" and len(said) == 1
    assert_is_step(checkpoint.latest(tmp_path), 30)


def test_remains_of_a_killed_save_are_cleared_away(tmp_path):
    (tmp_path / ".unfinished_step_00000010").mkdir(parents=True)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 20, *states(20), {"meta": object()})
    assert not list(tmp_path.iterdir())     # first of all: they may be what fills the disk
    save_step(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]


def test_nothing_but_ones_own_leftovers_is_removed(tmp_path):
    elsewhere = save_step(tmp_path / "elsewhere", 10)
    out = tmp_path / "out"
    for name in (".unfinished_step_00000011", ".removed_step_00000012"):      # of killed saves
        (out / name).mkdir(parents=True)
    for name in ("step_5", "step_00000020", ".unfinished_other", "step_00000004x"):
        (out / name).mkdir()
        (out / name / "notes.txt").write_text("mine")
    (out / "step_5/meta.json").write_text("{}")
    (out / ".unfinished_model.ckpt").write_text("another command is at it")
    (out / "step_00000001").symlink_to(elsewhere)
    mine = {path.name for path in out.iterdir()} - {
        ".unfinished_step_00000011", ".removed_step_00000012"}
    for step in (30, 40, 50):
        save_step(out, step, keep=1)
    assert {path.name for path in out.iterdir()} == mine | {"step_00000050"}
    assert (elsewhere / "meta.json").exists()
    with pytest.raises(OSError, match="in the way"):
        save_step(out, 20)
    assert (out / "step_00000020/notes.txt").exists()


def test_an_old_step_that_cannot_be_removed_does_not_unmake_the_new_one(tmp_path, monkeypatch):
    said = []
    save_step(tmp_path, 10)

    def refused(self, target):
        raise PermissionError(1, "Operation not permitted")
    with monkeypatch.context() as broken:
        broken.setattr(type(tmp_path), "rename", refused)
        save_step(tmp_path, 20, keep=1, say=said.append)
    assert said == [f"{tmp_path / 'step_00000010'} cannot be removed: Operation not permitted"]
    with monkeypatch.context() as broken:       # killed, or refused, in the middle
        broken.setattr(runs.shutil, "rmtree", lambda path: refused(path, path))
        save_step(tmp_path, 30, keep=1, say=said.append)
    assert checkpoint.steps(tmp_path) == [tmp_path / "step_00000030"]
    save_step(tmp_path, 40, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000040"]


def test_a_full_disk_makes_room_of_what_would_go_but_never_of_the_only_good_step(
        tmp_path, monkeypatch):
    said, genuine = [], runs.write_safetensors

    def write(path, *rest):
        if len(checkpoint.steps(tmp_path)) > 1 or full:
            raise OSError(28, "No space left on device", str(path))
        return genuine(path, *rest)
    full = False
    monkeypatch.setattr(runs, "write_safetensors", write)
    save_step(tmp_path, 10)
    save_step(tmp_path, 20)
    save_step(tmp_path, 30, say=said.append)
    assert [checkpoint.step_of(path) for path in checkpoint.steps(tmp_path)] == [30, 20]
    assert len(said) == 1 and "no room for step 30: step_00000010 would be removed" in said[0]
    (tmp_path / "step_00000030/model.safetensors").write_bytes(b"")        # now 20 alone is good
    with pytest.raises(OSError, match="No space"):
        save_step(tmp_path, 40, say=said.append)
    assert len(said) == 1 and len(checkpoint.steps(tmp_path)) == 2
    full = True
    monkeypatch.setattr(runs, "damage", lambda folder: "")
    with pytest.raises(OSError, match="No space"):
        save_step(tmp_path, 40, keep=1, say=said.append)       # both would go: none may
    assert len(checkpoint.steps(tmp_path)) == 2


def test_meta_json_has_a_checksum_of_its_own(tmp_path):
    path = save_step(tmp_path, 20) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text())))       # other spaces say the same
    assert not checkpoint.damage(path.parent)
    path.write_text(path.read_text().replace('"ema_updates": 20', '"ema_updates": 21'))
    assert "its own checksum" in checkpoint.damage(path.parent)


def test_a_configuration_that_is_none_is_refused_in_one_line(tmp_path):
    for value in ("3", "null", "[" * 100_000, '"text"', "{", "[1]"):
        save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", {checkpoint.CONFIG: value})
        with pytest.raises(ValueError, match="x.safetensors: its zeronvs_config"):
            checkpoint.read(tmp_path / "x.safetensors")
    saved(tmp_path / "x.ckpt", {"w": torch.ones(1)}, **{checkpoint.CONFIG: 5})
    with pytest.raises(ValueError, match="its zeronvs_config"):
        checkpoint.read(tmp_path / "x.ckpt")


@pytest.mark.parametrize("updates", [torch.tensor(float("inf")), torch.tensor(float("nan")),
                                     torch.ones(3), torch.tensor(-5), torch.tensor([])])
def test_info_of_odd_tensors_is_no_traceback(tmp_path, updates):
    state = {EMA + "num_updates": updates, INPUT_CONV: torch.ones(3), POSE: torch.tensor(1.0)}
    assert "average of 0 updates" in checkpoint.info(saved(tmp_path / "x.ckpt", state))


# ---- other forms

def assert_same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_forms_follow_each_other_without_loss(tmp_path):
    state = checkpoint_of(small())
    state[EMA + "num_updates"] = state[EMA + "num_updates"].int()
    saved(tmp_path / "a.ckpt", state)
    forms = ["a.ckpt", "b.safetensors", "c.pt", "d.ckpt"]
    for source_form, target_form in zip(forms, forms[1:]):
        assert checkpoint.convert(tmp_path / source_form, tmp_path / target_form) == []
    found = checkpoint.read(tmp_path / "d.ckpt")
    assert_same(found, state)
    assert found.step == 12


def test_written_ckpt_has_the_references_structure(tmp_path):
    # ZeroNVS and threestudio call torch.load and take ["state_dict"]
    state = checkpoint_of(small())
    save_file(state, tmp_path / "a.safetensors", {"global_step": "12"})
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    found = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert found["global_step"] == 12
    assert_same(found["state_dict"], state)


def test_ema_is_folded_in_and_precision_lowered_but_not_of_the_schedule(tmp_path):
    state = checkpoint_of(small()) | {"betas": torch.rand(1000)}
    saved(tmp_path / "a.ckpt", state)
    checkpoint.convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", True, torch.bfloat16)
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["betas"], state["betas"])
    assert torch.equal(found[INPUT_CONV], state[ema_name(INPUT_CONV)].bfloat16())
    assert torch.equal(found[POSE], state[POSE].bfloat16())
    assert not any(name.startswith(EMA) for name in found)


def test_a_file_that_was_made_of_a_run_tells_its_configuration(tmp_path):
    config = {"mode": "7dof", "num_heads": 4, "sources": [{"name": "here"}]}
    folder = checkpoint.save(tmp_path / "out", 3, *states(3), {"ema_updates": 3, "config": config})
    for name in ("a.safetensors", "a.ckpt"):
        checkpoint.convert(folder, tmp_path / name)
        assert checkpoint.read(tmp_path / name).meta["config"] == config


def test_averages_alone_are_no_unet_but_load_as_the_average(tmp_path):
    state = {name: value for name, value in checkpoint_of(small()).items()
             if not name.startswith(UNET)}
    path = saved(tmp_path / "a.ckpt", state)
    with pytest.raises(ValueError, match="no averaged weights .EMA. beside the UNet's own"):
        checkpoint.convert(path, tmp_path / "b.safetensors", ema=True)
    assert not (tmp_path / "b.safetensors").exists()
    assert f"2 missing ({INPUT_CONV}" in refusal(small(), path)
    module = small()
    checkpoint.load_model(module, path, ema=True)
    assert torch.equal(module.state_dict()[INPUT_CONV], state[ema_name(INPUT_CONV)])


def test_what_convert_wrote_is_whole_before_it_gets_its_name(tmp_path, monkeypatch):
    saved(tmp_path / "a.ckpt", checkpoint_of(small()))
    genuine = write_safetensors

    def forgetful(path, tensors, metadata):
        entries = dict(tensors.entries)
        entries.pop(INPUT_CONV)
        return genuine(path, checkpoint.StateDict(path, entries), metadata)
    monkeypatch.setattr(checkpoint, "write_safetensors", forgetful)
    with pytest.raises(ValueError, match="b.safetensors was not written whole: 1 missing"):
        checkpoint.convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_converting_to_a_full_disk_is_one_line(tmp_path):
    resource = pytest.importorskip("resource", reason="no file size limit on this system")
    saved(tmp_path / "a.ckpt", checkpoint_of(small()))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        for target in ("b.ckpt", "b.safetensors"):
            with pytest.raises(OSError) as error:
                checkpoint.convert(tmp_path / "a.ckpt", tmp_path / target)
            assert target in str(error.value) and "\n" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_converting_refuses_what_it_cannot_do(tmp_path):
    saved(tmp_path / "a.ckpt", checkpoint_of(small(), ema=False))
    for target, options, message in (
            ("a.ckpt", {}, "exists already"), ("b.onnx", {}, "no form of checkpoint"),
            ("b.safetensors", {"ema": True}, "no averaged weights")):
        with pytest.raises(ValueError, match=message):
            checkpoint.convert(tmp_path / "a.ckpt", tmp_path / target, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path / "a.ckpt", checkpoint_of(small()))

    def fails(self):
        raise ValueError("gone")
    monkeypatch.setattr(tensorfile.Stored, "read", fails)
    for target in ("b.ckpt", "b.safetensors"):
        with pytest.raises(ValueError):
            checkpoint.convert(tmp_path / "a.ckpt", tmp_path / target)
    monkeypatch.undo()

    def stops(value, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", stops)
    with pytest.raises(OSError):
        checkpoint.convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_command_line_tells_what_is_in_a_file_and_converts_it(tmp_path, capsys):
    saved(tmp_path / "a.ckpt", checkpoint_of(small()), optimizer={"m": torch.zeros(5)})
    checkpoint.main(["info", str(tmp_path / "a.ckpt")])
    told = capsys.readouterr().out
    assert "step 12, average of 7 updates, 8 input channels, pose projection 6 -> 4" in told
    rows = {line[:20].strip(): line[20:].split() for line in told.splitlines()[2:]}
    assert rows["UNet"][:4] == ["2", "292", "1,168", "float32;"]
    assert rows["optimizer, trainer"] == ["1", "5", "20", "float32;", "unused"]
    checkpoint.main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "b.safetensors"), "--ema",
                     "--dtype", "fp16"])
    assert load_file(tmp_path / "b.safetensors")[POSE].dtype == torch.float16
    assert "1 tensors have no place in it: optimizer.m" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_command_line_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.ckpt").write_text("<html></html>")
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "info", str(tmp_path / "x.ckpt")])
    with pytest.raises(SystemExit) as stop:         # as python -m runtime.checkpoint does
        runpy.run_module("runtime.checkpoint", run_name="__main__")
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    assert said.err.startswith("checkpoint.py: ") and said.err.count("\n") == 1


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder with a checkpoint"):
        checkpoint.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.read(tmp_path / "missing")
