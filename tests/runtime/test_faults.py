"""Runs that are killed, damaged, out of disk or short of a rank go on and end as if nothing was."""

import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from runs import (CHEAP, ONE_THREAD, ROOT, assert_same_state, kill_one_rank, logged, run, tiny)

import configs
import train
from runtime import checkpoint, files, log, resume, threads, workers
from runtime import ranks as group


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_run_killed_at_ten_random_moments_ends_with_the_same_bits(shards, tmp_path, monkeypatch, capfd):
    options = {"steps": 24, "save_every": 2, "keep_every": 1000, "sample_every": 1000}
    out, chance, steps = tmp_path / "killed", random.Random(0), []
    whole, killed = (tiny(shards, tmp_path / name, **options) for name in ("whole", "killed"))
    run(whole)

    def newest():
        found = checkpoint.steps(out)
        return checkpoint.step_of(found[0]) if found else 0
    for attempt in range(10):
        before, process = newest(), forked.Popen("train.py", *killed)
        # most are killed in steps and saves after the first save of theirs, some while they start
        while attempt % 4 and newest() == before < 24:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(newest())
    assert forked.Popen("train.py", *killed).wait() == 0
    assert steps == sorted(steps), "a step that was there is lost"
    assert len(set(steps)) > 4, f"hardly any step between the kills: {steps}"
    assert logged(out) == logged(tmp_path / "whole")
    assert_same_state(out, tmp_path / "whole", 24)
    assert "damaged" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("damage", ["cut", "flip", "no optimizer"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_goes_on(
        shards, whole_run, tmp_path, damage):
    out, whole = tmp_path / "damaged", whole_run[0]
    shutil.copytree(whole, out)
    name = "optimizer.safetensors" if damage == "no optimizer" else "ema.safetensors"
    file = out / "step_00000006" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.unlink()
    if damage != "no optimizer":
        file.write_bytes(content if damage == "flip" else content[:1000])
    said = run(tiny(shards, out))
    assert "step_00000006 is damaged, the step before is used" in said
    assert "start    step 3 of" in said
    assert logged(out) == logged(whole)
    assert_same_state(out, whole, 6)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(shards, whole_run, tmp_path):
    out = tmp_path / "lost"
    shutil.copytree(whole_run[0], out)
    for file in out.glob("step_*/ema.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"every checkpoint in {out} is damaged"):
        run(tiny(shards, out))
    with pytest.raises(ValueError, match="lost: every checkpoint in it is damaged"):
        checkpoint.read(out)


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """Mounts a tmpfs of so many megabytes; skips the test where that is not allowed."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
                       check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_training_goes_on_with_the_step_before(shards, tmp_path):
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    run(tiny(shards, whole, steps=12))
    size = sum(file.stat().st_size for file in (whole / "step_00000012").iterdir())
    with small_disk(disk, 1 + size * 3 // 2 // 2**20):      # holds one step, not two
        out = disk / "run"
        with (pytest.raises(OSError, match="the end of the run could not be saved: .*No space"),
              contextlib.redirect_stdout(open(tmp_path / "said", "w"))):
            train.main(tiny(shards, out, steps=12))
        said = (tmp_path / "said").read_text()
        assert said.count("could not be saved, training goes on") == 3
        assert "step 12/12" in said
        assert checkpoint.latest(out) == out / "step_00000003"
        assert not list(out.glob(".unfinished*"))
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert "start    step 3 of" in run(tiny(shards, out, steps=12))
        assert logged(out) == logged(whole)
        assert_same_state(out, whole, 12)


def test_a_log_that_cannot_be_written_is_said_once_and_is_no_end(shards, tmp_path):
    out = tmp_path / "readonly"
    (out / "log.jsonl").mkdir(parents=True)         # a folder in its place
    said = run(tiny(shards, out))
    assert said.count("log.jsonl: Is a directory; training goes on without it") == 1
    assert (out / "step_00000006" / "meta.json").exists()


def is_running(pid):
    """Whether there is such a process and it still does something."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, says, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, says
        time.sleep(0.05)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks Linux which processes there are")
def test_torchrun_starts_dead_ranks_again_which_end_when_it_is_killed_and_the_run_goes_on(
        shards, tmp_path):
    out = tmp_path / "elastic"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = tiny(shards, out, CHEAP + kill_one_rank(out) + f"open({str(tmp_path)!r} + '/rank' + "
                     "str(os.getpid()), 'w')\n", steps=100_000, save_every=3)
    with subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
             "--master_port", str(port), "--max-restarts", "1", "train.py", *arguments], cwd=ROOT,
            env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            starts = []
            for line in process.stdout:
                starts += re.findall("^start +(.*)", line)
                done = re.match(r"step (\d+)/", line)
                if len(starts) == 2 and done and int(done[1]) >= 12:
                    break
        finally:
            process.kill()
    ranks = [int(path.name[4:]) for path in tmp_path.glob("rank*")]
    try:
        assert starts[0].startswith("random weights") and re.match(r"step \d+ of", starts[1])
        wait_until(lambda: not any(map(is_running, ranks)), "a rank outlives torchrun", 30)
    finally:
        for rank in filter(is_running, ranks):
            os.kill(rank, signal.SIGKILL)
    newest = checkpoint.step_of(checkpoint.latest(out))
    assert newest >= 9 and len(ranks) == 4
    assert f"start    step {newest} of" in run(tiny(shards, out, steps=newest + 2))
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, newest + 3))
    run(tiny(shards, tmp_path / "whole", steps=12))
    # rounding of the sums, which training makes larger from step to step
    np.testing.assert_allclose(logged(out)[:11], logged(tmp_path / "whole")[:11], rtol=1e-3)


# A process whose loader's worker has more to send than a pipe holds, when it is killed
ORPHAN = """
import functools, multiprocessing, os, signal, sys
import numpy as np, torch
from runtime import workers
workers.ORPHANED = 0.2
class Items(torch.utils.data.Dataset):
    def __len__(self): return 50
    def __getitem__(self, k): return np.zeros(200_000, np.uint8)
if __name__ == "__main__":
    event = multiprocessing.get_context("spawn").Event()
    batches = iter(torch.utils.data.DataLoader(
        Items(), batch_size=1, num_workers=1, collate_fn=lambda items: items[0],
        multiprocessing_context="fork",
        worker_init_fn=functools.partial(workers.start_worker, event)))
    next(batches)
    print(batches._workers[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks Linux which processes there are")
def test_workers_of_a_killed_process_end(tmp_path):
    done = subprocess.run([sys.executable, "-c", ORPHAN], cwd=ROOT, env=ONE_THREAD,
                          stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    pid = int(done.stdout)
    try:
        wait_until(lambda: not is_running(pid), "a worker outlives its process", 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- one run in a folder

HOLDER = """
import errno, sys, time
from runtime import files
def refuse(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
if sys.argv[2]:
    files.fcntl.lockf = refuse
with files.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_run(folder, without_locks=""):
    """The process of another run in the folder, which is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), without_locks], cwd=ROOT,
                          text=True, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_starts_again_at_once(tmp_path):
    with another_run(tmp_path) as other:
        with pytest.raises(ValueError, match=rf"host \S+, process {other.pid}, since \d{{4}}-"):
            with files.locked(tmp_path):
                pass
    began = time.monotonic()
    with files.locked(tmp_path):
        assert time.monotonic() - began < 5


def test_on_a_disk_without_locks_a_sign_of_life_tells_which_goes_stale(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with another_run(tmp_path, "without locks") as other:
        with pytest.raises(ValueError, match=rf"process {other.pid}, .* sign of life \d+ s ago"):
            with files.locked(tmp_path):
                pass
    monkeypatch.setattr(files, "STALE", 0.4)
    time.sleep(0.5)
    with files.locked(tmp_path):          # the other was killed
        first, end = (tmp_path / ".running").stat().st_mtime_ns, time.monotonic() + 20
        while (tmp_path / ".running").stat().st_mtime_ns == first:
            assert time.monotonic() < end, "no sign of life"
            time.sleep(0.05)
    monkeypatch.setattr(files, "STALE", 60.0)
    with files.locked(tmp_path):          # this one ended
        pass


# ---- the screen, and files that cannot be written

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
def test_a_screen_that_takes_nothing_ends_nothing(shards, tmp_path):
    out = tmp_path / "unseen"
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        train.main(tiny(shards, out))
    assert checkpoint.latest(out) == out / "step_00000006"
    code = "from runtime import command; [command.say('x' * 99999) for _ in range(9)]"
    done = subprocess.run(f"{sys.executable} -c \"{code}; command.finish(0)\" | head -c 1; "
                          "exit ${PIPESTATUS[0]}", cwd=ROOT, shell=True, executable="/bin/bash",
                          capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout == b"x" and not done.stderr


def a_log(folder, step=0):
    """A started Log of nobody's run."""
    folder.mkdir(exist_ok=True)
    found = log.Log(types.SimpleNamespace(out=str(folder), steps=9), group.ALONE)
    found.start(step)
    return found


def test_lines_of_a_log_are_not_glued_and_stray_bytes_do_not_block_a_resume(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\n[[\n{"step": "2"}\n{"step": 7}\n{"step": 2}')
    first = a_log(tmp_path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    first(4, loss=1.0)
    assert path.read_bytes().splitlines()[2:] == [b'{"step": 3, "lo', b'{"step": 4, "loss": 1.0}']
    first(5, val_loss=1.0)
    first(6, val_loss=2.0)
    assert first.is_worse(1) and not first.is_worse(2)      # whatever was cut


def test_a_grid_that_did_not_fit_does_not_stay(tmp_path, monkeypatch, capsys):
    def save(image, path):
        path.write_bytes(b"PNG")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", save)
    a_log(tmp_path).picture(3, "grids", Image.new("RGB", (2, 2)))
    assert not list((tmp_path / "grids").iterdir())
    assert "step_00000003.png: No space left on device; training goes on" in capsys.readouterr().out


def test_a_broken_tensorboard_is_one_line_and_training_goes_on(tmp_path, monkeypatch, capsys):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise TypeError("Descriptors cannot be created directly.\nIf this call came from a ...")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("tensorboard"))
    a_log(tmp_path)(1, loss=2.0)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("TensorBoard: TypeError: ") and "step 1/9" in said[1]


def test_batches_that_find_no_shared_memory_come_through_pipes(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: 1)
    images = torch.arange(2 * 3 * 200 * 200.).view(2, 200, 200, 3).permute(0, 3, 1, 2)
    said = []
    sent = pickle.dumps(workers.packed({"image": images, "uid": ["a", "b"], "fov": torch.ones(2)}))
    batch = workers.unpacked(pickle.loads(sent), said.append)
    assert torch.equal(batch["image"], images) and batch["image"].stride() == images.stride()
    assert batch["uid"] == ["a", "b"] and said == [workers.FULL] and "--shm-size" in said[0]


# ---- ranks

def test_a_rank_of_torchrun_ends_with_it_and_a_run_of_the_shell_does_not(monkeypatch):
    ending = []
    monkeypatch.setattr(workers, "end_with_parent", lambda: ending.append(1))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    group.join(torch.device("cpu"))
    assert not ending
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    group.join(torch.device("cpu"))
    assert ending == [1]


class Two(group.Alone):
    """Rank 1 of two, beside a rank 0 that has seen `first`."""
    rank, world = 1, 2

    def __init__(self, first, newest=0):
        self.first, self.newest = first, newest

    def broadcast_object(self, value):
        return self.newest

    def gather(self, value):
        return [("host-a", {**value[1], **self.first}), ("host-b", value[1])]


@pytest.mark.parametrize("first, says", [
    ({}, ""), ({"lr": 0.5}, "rank 1 on host-b has not what rank 0 on host-a has: lr is 0.0001, not"),
    ({"what co3d holds": "9 scenes"}, "what co3d holds is '4 scenes', not '9 scenes'"),
    ({"the code": "abc"}, "the code is 'def', not 'abc'"),
    ({"the newest step in --out": 0}, "the newest step in --out is 7, not 0")])
def test_ranks_that_do_not_see_the_same_are_refused_in_one_line(tmp_path, first, says):
    config = configs.Config((configs.Source("co3d", "co3d", "co3d", 1.0),), out=str(tmp_path))
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / "step_00000007" / "meta.json").touch()
    ranks = Two(first, newest=7 if "newest" not in says else 0)
    seen = ranks, "def", {"co3d": "4 scenes"}
    if not says:
        resume.compare_ranks(config, *seen)
        return
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        resume.compare_ranks(config, *seen)
    assert "\n" not in str(refused.value)


def test_a_user_chooses_threads_and_else_has_a_share_of_the_processors(monkeypatch):
    config = types.SimpleNamespace(threads=0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "processors", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert threads.choose(config) == (2, "of 8 processors")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads.choose(config) == (5, "OMP_NUM_THREADS")
    assert threads.choose(types.SimpleNamespace(threads=3)) == (3, "--threads")
