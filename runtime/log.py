"""What a user sees of a run: the summary, the bar, log.jsonl, TensorBoard, a trace.

Only rank 0 shows or writes anything but notes. What cannot be written (a full disk) is said once,
and training goes on; a screen that takes nothing more ends nothing either.
"""

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import engine
from diffusion import TIMESTEPS
from runtime import command, cost, files, threads

BANDS = 4                           # of timesteps, each with its own loss
SHOWN = {"loss": "loss {:.4g}", "lr": "lr {:.3g}", "pairs_per_s": "{:.4g} pairs/s",
         "ceiling_share": "{:.0%} of peak", "data_wait": "data wait {:.0%}",
         "memory_gb": "{:.3g} GB", "val_psnr": "held-out PSNR {:.2f} dB"}
TRACE_SKIPPED = 2                   # steps before a trace: the first ones are slower
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
        host waits for its device once. norm: of the gradients, the same on all ranks.
        """
        ours = steps * micro_steps                  # a micro-step of a step not done is left out
        losses = torch.cat(self.losses[:ours]).view(steps, -1)
        band = torch.cat(self.timesteps[:ours]) * BANDS // TIMESTEPS
        bands = losses.new_zeros(2, BANDS)
        bands[0].index_add_(0, band, losses.flatten())
        bands[1].index_add_(0, band, torch.ones_like(losses).flatten())
        bad = (~losses.isfinite()).sum().to(losses.dtype)
        rank_0s = losses.new_zeros(()) if norm is None or ranks.rank else norm
        sums = torch.cat([torch.stack([losses.mean(), bad, rank_0s]), bands.flatten(),
                          losses.new_tensor(counts)])
        loss, bad, norm_sum, *sums = ranks.all_reduce(sums).tolist()
        seconds = time.perf_counter() - self.since
        of_bands, pairs = np.reshape(sums[:2 * BANDS], (2, BANDS))
        numbers = {"loss": loss / ranks.world,
                   "pairs_per_s": losses.numel() * ranks.world / seconds,
                   "data_wait": min(1.0, self.waited / seconds),
                   "loss_by_timestep": {band_name(i): float(of_bands[i] / pairs[i])
                                        for i in range(BANDS) if pairs[i]}}
        if norm is not None:
            numbers["grad_norm"] = norm_sum
        return numbers, losses, int(bad), list(map(int, sums[2 * BANDS:]))


def band_name(i):
    return f"{i * TIMESTEPS // BANDS}-{(i + 1) * TIMESTEPS // BANDS - 1}"


def check_finite(bad, losses, first_step, pairs, config, ranks):
    """Stops all ranks together where a loss is not finite, naming step, rank and pairs.

    bad: how many losses are not finite, over all ranks. losses: (steps, pairs a rank) of this rank,
    of the steps since `first_step`.
    """
    if not bad:
        return
    places = (~losses.isfinite()).nonzero().tolist()
    first = [i for step, i in places if step == places[0][0]]
    if places:
        step = first_step + places[0][0]
        start = step * config.batch_size + ranks.rank * losses.shape[1]
        named = ", ".join(f"pair {start + i}: {pairs[start + i]['uid']}"
                          for i in first[:NAMED_PAIRS])
        more = f" and {len(first) - NAMED_PAIRS} more" if len(first) > NAMED_PAIRS else ""
        command.say(f"train.py: the loss of step {step} is not finite on rank {ranks.rank}, at "
                    f"{named}{more}; the newest checkpoint in {config.out} is from before it",
                    sys.stderr)
    sys.exit(1)


def state(config, step, pairs_per_s, needs, peak, ranks, device):
    """What the log tells beside the loss: share of the chip's ceiling, memory, time left."""
    flops = (1 + cost.BACKWARD) * needs.flops * pairs_per_s / ranks.world
    return {"ceiling_share": flops / peak, "memory_gb": peak_memory(device),
            "remaining_s": (config.steps - step) * config.batch_size / pairs_per_s}


def peak_memory(device):
    """The most memory that this process had, in GB: of its GPU, else in the machine; 0 unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / cost.GB
    try:
        import resource
    except ImportError:             # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / cost.GB


def revision():
    """The git revision of this code, with "-dirty" where files were changed; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def summary(config, ranks, device, needs, micro_batch, micro_steps):
    """What a run begins with, as text: code, machine, network, step, memory."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    count, why = threads.choose(config)
    machine = [f"{ranks.world} x {device.type}", chip or platform.machine(), config.precision]
    machine += ["compiled"] * config.compile
    machine += ["as a CUDA graph"] * engine.can_capture(config, ranks, device)
    machine += ["moments and average divided"] * (config.divide_optimizer and ranks.world > 1)
    machine += [f"{count} thread{'s' * (count > 1)} a rank ({why})"]
    there, gb = cost.available(device), cost.GB
    return "\n".join([
        f"code     {revision() or 'no git revision'}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        f"machine  {', '.join(machine)}",
        f"network  {needs.trained / 1e6:.1f} M parameters trained, {needs.frozen / 1e6:.1f} M "
        f"frozen; {needs.flops / 1e9:.3g} GFLOP a pair, forward",
        f"steps    {config.steps}, of {config.batch_size} pairs = {ranks.world} ranks x "
        f"{micro_steps} micro-steps x {micro_batch}",
        f"memory   {needs} a rank, of {there / gb:.1f} GB; and {needs.host / gb:.2f} GB of the "
        "host's to save from"])


class Log:
    """The screen, log.jsonl and TensorBoard (where it is installed) of a run, from rank 0 alone but
    for notes in log.jsonl."""
    def __init__(self, config, ranks):
        self.main, self.out, self.steps = ranks.rank == 0, Path(config.out), config.steps
        self.path = self.out / "log.jsonl"
        self.bar = self.board = self.trace = None
        self.traced = False
        self.troubles, self.step = set(), 0

    def start(self, step, trace_steps=0):
        """Begins after `step`: what a killed run logged beyond it is taken out of log.jsonl."""
        self.step = step
        if not self.main:
            return
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=step, unit="step", smoothing=0.05,
                            dynamic_ncols=True)
        with self.tolerant(self.path):
            if self.path.exists():
                lines = self.path.read_bytes().splitlines()
                with files.unfinished(self.path) as partial:
                    partial.write_bytes(b"".join(line + b"\n" for line in lines
                                                 if logged_step(line) <= step))
        self.board = self.open_board(step)
        if trace_steps:
            plan = torch.profiler.schedule(wait=TRACE_SKIPPED - 1, warmup=1, active=trace_steps,
                                           repeat=1)
            self.trace = torch.profiler.profile(schedule=plan, on_trace_ready=self.write_trace)
            self.trace.start()

    def __call__(self, step, **numbers):
        """Shows and keeps the numbers of a step, some of them dicts of numbers."""
        self.step = step
        if not self.main:
            return
        shown = ", ".join(form.format(numbers[name]) for name, form in SHOWN.items()
                          if name in numbers)
        if self.bar:
            with self.screen():
                self.bar.set_postfix_str(shown, refresh=False)
                self.bar.update(step - self.bar.n)
        else:                       # in a file a bar would be one endless line
            left = timedelta(seconds=round(numbers.get("remaining_s", 0)))
            self.say(f"step {step}/{self.steps}: {shown}, {left} left")
        self.append({"step": step, **numbers})
        for name, value in numbers.items():
            values = value.items() if isinstance(value, dict) else [("", value)]
            for part, number in values:
                self.on_board("add_scalar", f"{name}/{part}".rstrip("/"), number, step)

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
        if self.main and self.bar:
            with self.screen():
                self.bar.write(line)        # above the bar
        elif self.main:
            command.say(line)

    @contextmanager
    def screen(self):
        """A bar that cannot be shown any more is no end of the run."""
        try:
            yield
        except (OSError, ValueError):
            self.bar = None

    @contextmanager
    def tolerant(self, path):
        """What cannot be written is said, once for each reason, and is no end of the run."""
        try:
            yield
        except OSError as err:
            trouble = f"{path}: {err.strerror or err}; training goes on without it"
            if trouble not in self.troubles:
                self.troubles.add(trouble)
                self.say(trouble)

    def open_board(self, step):
        """TensorBoard's writer; None where it is not installed, and a line where it is broken."""
        with self.foreign():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                return None
            return SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)

    def on_board(self, method, *arguments, **options):
        """Calls TensorBoard's writer, where there is one."""
        if self.board:
            with self.foreign():
                getattr(self.board, method)(*arguments, **options)

    @contextmanager
    def foreign(self):
        """TensorBoard that fails, in whatever way its packages do, is a line and ends nothing."""
        try:
            yield
        except Exception as err:
            self.board = None
            self.say(f"TensorBoard cannot be used, and training goes on without it: "
                     f"{type(err).__name__}: {' '.join(str(err).split())[:200]}")

    def stepped(self):
        """Tells the trace that a step is done."""
        if self.trace:
            self.trace.step()

    def write_trace(self, trace):
        self.traced, path = True, self.out / "trace.json.gz"
        with self.tolerant(path):
            trace.export_chrome_trace(str(path))
            self.say(f"{path}: open it at https://ui.perfetto.dev or chrome://tracing")

    def close(self):
        if self.trace:
            self.trace.stop()
            if not self.traced:
                self.say(f"no trace: --profile skips {TRACE_SKIPPED} steps, and no more were made")
        if self.bar:
            with self.screen():
                self.bar.close()
        self.on_board("close")


def logged_step(line):
    """The step of a line of log.jsonl; infinity for what is none, as a kill or a full disk left."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else float("inf")
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
