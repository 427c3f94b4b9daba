"""Runs that are killed, damaged, out of disk or short of a rank go on and end as if nothing was."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from test_train import (ONE_THREAD, ROOT, assert_same_state, command, kill_one_rank, logged,
                        one_thread, run, shards, tiny)

from runtime import checkpoint

__all__ = ["one_thread", "shards"]      # fixtures

# Runs one configuration as a whole, and another 20 times until a random moment; then to its end.
# A fork each, which takes a tenth of the time of a new process.
KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import train
from runtime import checkpoint
from runtime import cost
from runtime import ranks as distributed
whole, killed, steps = sys.argv[1].split(","), sys.argv[2].split(","), []
def start(arguments):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            train.main(arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return child
train.main(whole)
needs = cost.of(*[train.configs.load(killed), distributed.ALONE, 8])
cost.of = lambda *arguments: needs
chance, out = random.Random(0), killed[2].removeprefix("--out=")
def newest():
    found = checkpoint.steps(out)
    return checkpoint.step_of(found[0]) if found else 0
for attempt in range(20):
    before, child = newest(), start(killed)
    # most are killed in steps and saves after the first save of theirs, some while they start
    while attempt % 4 and newest() == before < 50:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    steps.append(newest())
print("newest after each kill:", *steps)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(killed), 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bits(shards, tmp_path):
    options = {"steps": 50, "save_every": 2, "keep_every": 1000, "sample_every": 1000}
    runs = [",".join(tiny(shards, tmp_path / name, **options)) for name in ("whole", "killed")]
    done = subprocess.run([sys.executable, "-c", KILLED, *runs], cwd=ROOT, env=ONE_THREAD,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    newest = [int(step) for step in
              re.search("newest after each kill: (.*)", done.stdout)[1].split()]
    assert newest == sorted(newest), "a step that was there is lost"
    assert len(set(newest)) > 10, f"hardly any step between the kills: {newest}"
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert_same_state(tmp_path / "killed", tmp_path / "whole", 50)
    assert "damaged" not in done.stdout + done.stderr


@pytest.mark.parametrize("damage", ["cut", "flip", "no optimizer"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_goes_on(shards, tmp_path, damage):
    out, whole = tmp_path / "damaged", tmp_path / "whole"
    run(tiny(shards, whole))
    run(tiny(shards, out))
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


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(shards, tmp_path):
    out = tmp_path / "lost"
    run(tiny(shards, out))
    for file in out.glob("step_*/ema.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    done = command(tiny(shards, out))
    assert done.returncode and f"every checkpoint in {out} is damaged" in done.stdout + done.stderr
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
            run_without_capture(tiny(shards, out, steps=12))
        said = (tmp_path / "said").read_text()
        assert said.count("could not be saved, training goes on") == 3
        assert "step 12/12" in said
        assert checkpoint.latest(out) == out / "step_00000003"
        assert not list(out.glob(".unfinished*"))
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert "start    step 3 of" in run(tiny(shards, out, steps=12))
        assert logged(out) == logged(whole)
        assert_same_state(out, whole, 12)


def run_without_capture(arguments):
    import train
    train.main(arguments)


def test_a_log_that_cannot_be_written_is_said_once_and_is_no_end(shards, tmp_path):
    out = tmp_path / "readonly"
    (out / "log.jsonl").mkdir(parents=True)         # a folder in its place
    said = run(tiny(shards, out))
    assert said.count("log.jsonl: Is a directory; training goes on without it") == 1
    assert (out / "step_00000006" / "meta.json").exists()


def torchrun(arguments, *options):
    """Runs train.py under torchrun on two ranks. Returns the finished process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
         str(port), *options, "train.py", *arguments],
        cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_torchrun_starts_a_run_again_whose_rank_died_and_it_goes_on(shards, tmp_path):
    out = tmp_path / "elastic"
    done = torchrun(tiny(shards, out, kill_one_rank(out), steps=15, save_every=3),
                    "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    starts = re.findall(r"start +(.*)", done.stdout)
    assert starts[0].startswith("random weights") and re.match(r"step \d+ of", starts[1])
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 16))
    run(tiny(shards, tmp_path / "whole", steps=15))
    # rounding of the sums, which training makes larger from step to step
    np.testing.assert_allclose(logged(out), logged(tmp_path / "whole"), rtol=1e-3)


def test_ranks_under_torchrun_refuse_in_one_line(shards, tmp_path):
    done = torchrun(tiny(shards, tmp_path / "odd", batch_size=7))
    assert done.returncode and done.stderr.count("train.py: ") == 1, done.stderr
    assert "batch_size" in done.stderr.split("train.py: ")[1].splitlines()[0]


def test_what_any_rank_finds_damaged_is_counted_and_named(shards, tmp_path):
    spoilt, counts = tmp_path / "data", []
    shutil.copytree(shards, spoilt)
    for shard in sorted(spoilt.glob("*/train-*.tar")):
        with tarfile.open(shard) as tar:
            images = [file for file in tar if file.name.endswith(("0001.png", "0002.png"))]
        with open(shard, "r+b") as file:
            for image in images:
                file.seek(image.offset_data)
                file.write(bytes(64))
    for world in (1, 2):
        out = tmp_path / f"{world} ranks"
        arguments = tiny(spoilt, out, max_damaged=1, steps=2)       # few: no rank sees all of them
        if world == 1:
            run(arguments)
        else:
            done = torchrun(arguments)
            assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        counts.append((lines[-1]["damaged"], {line["note"] for line in lines if "note" in line}))
    assert counts[0] == counts[1] and counts[0][0] > 10
    assert 2 < len(counts[0][1]) <= counts[0][0]


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
    def there(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
        except OSError:
            return False
    done = subprocess.run([sys.executable, "-c", ORPHAN], cwd=ROOT, env=ONE_THREAD,
                          stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    pid, end = int(done.stdout), time.monotonic() + 20
    try:
        while there(pid):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
