"""What a user sees of a run: the summary, a line now and then, log.jsonl, TensorBoard, a trace.

Only rank 0 shows or writes anything but notes. What cannot be written (a full disk) is said once,
and training goes on.
"""

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import engine
from diffusion import TIMESTEPS
from runtime import command, cost, files, threads

BANDS = 4                           # of timesteps, each with its own loss
SHOWN = {"loss": "loss {:.4g}", "lr": "lr {:.3g}", "pairs_per_s": "{:.4g} pairs/s",
         "ceiling_share": "{:.0%} of peak", "data_wait": "data wait {:.0%}",
         "memory_gb": "{:.3g} GB", "val_psnr": "held-out PSNR {:.2f} dB"}
NAMED_PAIRS = 5                     # of those whose loss is not finite


class Meter:
    """What happened since the last log line: losses, timesteps, time, waiting for data."""
    def __init__(self):
        self.restart()

    def restart(self):
        self.losses, self.timesteps, self.waited = [], [], 0.0
        self.start_clock()

    def start_clock(self):
        """Leaves out of the rate what came before."""
        self.since = time.perf_counter()

    def add(self, loss, t):
        """Losses (b,) of a micro-step and their timesteps (b,)."""
        self.losses.append(loss.detach())
        self.timesteps.append(t)

    @contextmanager
    def waiting(self):
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def read(self, ranks, steps, micro_steps, norm=None, counts=()):
        """(numbers for the log, losses (steps, pairs) of this rank, how many are not finite, sums
        over the ranks of `counts`) of the last `steps` whole steps. All ranks meet here, and the
        host waits for its device once. norm: of the gradients, the same on all ranks."""
        ours = steps * micro_steps                  # a micro-step of a step not done is left out
        losses = torch.cat(self.losses[:ours])
        bands = losses.new_zeros(BANDS, 2).index_add_(
            0, torch.cat(self.timesteps[:ours]) * BANDS // TIMESTEPS,
            torch.stack([losses, torch.ones_like(losses)], dim=1))
        bad = (~losses.isfinite()).sum().view(1)
        bad, *sums = ranks.all_reduce(torch.cat([
            bad, losses.new_tensor(counts), bands.flatten()])).tolist()
        counts, bands = sums[:len(counts)], np.reshape(sums[len(counts):], (BANDS, 2))
        seconds, width = time.perf_counter() - self.since, TIMESTEPS // BANDS
        loss, pairs = bands.sum(axis=0)
        numbers = {"loss": loss / pairs, "pairs_per_s": pairs / seconds,
                   "data_wait": min(1.0, self.waited / seconds),
                   "loss_by_timestep": {f"{i * width}-{(i + 1) * width - 1}": total / count
                                        for i, (total, count) in enumerate(bands) if count}}
        if norm is not None:
            numbers["grad_norm"] = norm.item()
        return numbers, losses.view(steps, -1), int(bad), list(map(int, counts))


def check_finite(bad, losses, first_step, pairs, config, ranks):
    """Stops all ranks together where a loss is not finite, naming step, rank and pairs.

    bad: how many losses are not finite, over all ranks. losses: (steps, pairs a rank) of this rank,
    of the steps since `first_step`.
    """
    places = (~losses.isfinite()).nonzero().tolist()
    if places:
        step = first_step + places[0][0]
        start = step * config.batch_size + ranks.rank * losses.shape[1]
        numbers = [start + i for row, i in places if row == places[0][0]]
        named = ", ".join(f"pair {k}: {pairs[k]['uid']}" for k in numbers[:NAMED_PAIRS])
        command.say(f"train.py: the loss of step {step} is not finite on rank {ranks.rank}, for "
                    f"{len(numbers)} pairs, {named}; the newest checkpoint in {config.out} is from "
                    "before it", sys.stderr)
    if bad:
        sys.exit(1)


def peak_memory(device):
    """The most memory that this process had, in GB: of its GPU, else in the machine; 0 unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / cost.GB
    if os.name != "posix":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / cost.GB


def revision():
    """The git revision of this code, with "-dirty" where files were changed; "" without git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=Path(__file__).parent,
            capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def summary(config, ranks, device, needs, micro_batch, micro_steps):
    """What a run begins with, as text: code, machine, network, step, memory."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    count, why = threads.choose(config)
    machine = [f"{ranks.world} x {device.type}", chip or platform.machine(), config.precision,
               *["compiled"] * config.compile,
               *["as a CUDA graph"] * engine.can_capture(config, ranks, device),
               *["moments and average divided"] * (config.divide_optimizer and ranks.world > 1),
               f"{count} thread{'s' * (count > 1)} a rank ({why})"]
    return "\n".join([
        f"code     {revision() or 'no git revision'}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        f"machine  {', '.join(machine)}",
        f"network  {needs.trained / 1e6:.1f} M parameters trained, {needs.frozen / 1e6:.1f} M "
        f"frozen; {needs.flops / 1e9:.3g} GFLOP a pair, forward",
        f"steps    {config.steps}, of {config.batch_size} pairs = {ranks.world} ranks x "
        f"{micro_steps} micro-steps x {micro_batch}",
        f"memory   {needs} a rank, of {cost.available(device) / cost.GB:.1f} GB"])


class Log:
    """The screen, log.jsonl and TensorBoard (where it is installed) of a run, from rank 0 alone but
    for notes in log.jsonl."""
    def __init__(self, config, ranks):
        self.main, self.out, self.steps = ranks.rank == 0, Path(config.out), config.steps
        self.path = self.out / "log.jsonl"
        self.board = self.trace = None
        self.troubles, self.step = set(), 0

    def start(self, step, trace_steps=0):
        """Begins after `step`: what a killed run logged beyond it is taken out of log.jsonl."""
        self.step = step
        if not self.main:
            return
        with self.tolerant(self.path):
            rows = files.logged_rows(self.path)
            if self.path.exists():
                files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows
                                                    if row["step"] <= step))
        with self.tolerant("TensorBoard", Exception):   # that fails in whatever way its packages do
            with suppress(ModuleNotFoundError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
        if trace_steps:
            self.trace = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=1, warmup=1, active=trace_steps, repeat=1),
                on_trace_ready=self.write_trace)
            self.trace.start()

    def __call__(self, step, **numbers):
        """Shows and keeps the numbers of a step, some of them dicts of numbers."""
        self.step = step
        if not self.main:
            return
        shown = [form.format(numbers[name]) for name, form in SHOWN.items() if name in numbers]
        left = timedelta(seconds=round(numbers.get("remaining_s", 0)))
        self.say(f"step {step}/{self.steps}: {', '.join(shown)}, {left} left")
        self.append({"step": step, **numbers})
        for name, value in numbers.items():
            for part, number in (value if isinstance(value, dict) else {"": value}).items():
                self.on_board("add_scalar", f"{name}/{part}".rstrip("/"), number, step)

    def is_worse(self, patience):
        """Whether the newest `patience` validations, if not 0, had no lower loss than another."""
        if patience and self.main:
            losses = {row["step"]: row["val_loss"] for row in files.logged_rows(self.path)
                      if "val_loss" in row}
            best = min(losses, key=losses.get, default=0)
            if sum(step > best for step in losses) >= patience:
                self.say(f"the loss of held-out pairs was least after step {best}, and it ends")
                return True
        return False

    def append(self, row):
        """Adds a line to log.jsonl, whatever the one before it came to."""
        with self.tolerant(self.path), open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":           # a full disk or a kill has cut it
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def picture(self, step, name, image):
        """Writes a PIL image to NAME/step_XXXXXXXX.png, and to TensorBoard."""
        path = self.out / name / f"step_{step:08d}.png"
        with self.tolerant(path), files.unfinished(path) as partial:
            image.save(partial)
        self.on_board("add_image", name, np.asarray(image), step, dataformats="HWC")
        return path

    def note(self, line):
        """Says a line and keeps it in log.jsonl, as a note of the step that was logged last."""
        self.say(line)
        self.append({"step": self.step, "note": line})

    def say(self, line):
        if self.main:
            command.say(line)

    @contextmanager
    def tolerant(self, what, errors=OSError):
        """What cannot be written is said, once for each reason, and is no end of the run."""
        try:
            yield
        except errors as err:
            reason = getattr(err, "strerror", None) or f"{type(err).__name__}: {err}"
            trouble = f"{what}: {' '.join(reason.split())[:200]}; training goes on without it"
            if trouble not in self.troubles:
                self.troubles.add(trouble)
                self.say(trouble)

    def on_board(self, method, *arguments, **options):
        """Calls TensorBoard's writer, where there is one."""
        if self.board:
            with self.tolerant("TensorBoard", Exception):
                getattr(self.board, method)(*arguments, **options)

    def stepped(self):
        """Tells the trace that a step is done."""
        if self.trace:
            self.trace.step()

    def write_trace(self, trace):
        path = self.out / "trace.json.gz"
        with self.tolerant(path):
            trace.export_chrome_trace(str(path))
            self.say(f"{path}: open it at https://ui.perfetto.dev or chrome://tracing")

    def close(self):
        if self.trace:
            self.trace.stop()
        self.on_board("close")
