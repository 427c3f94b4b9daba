"""What a user sees of a run: the summary, the bar, log.jsonl, TensorBoard, a trace.

Only rank 0 shows or writes anything. What cannot be written (a full disk) is said once, and
training goes on.
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

from runtime import cost
import engine
from diffusion import TIMESTEPS

BANDS = 4                           # of timesteps, each with its own loss
SHOWN = {"loss": "loss {:.4g}", "lr": "lr {:.3g}", "pairs_per_s": "{:.4g} pairs/s",
         "ceiling_share": "{:.0%} of peak", "data_wait": "data wait {:.0%}",
         "memory_gb": "{:.3g} GB", "val_psnr": "held-out PSNR {:.2f} dB"}
TRACE_SKIPPED = 2                   # steps before a trace: the first ones are slower


class Meter:
    """What happened since the last log line: losses, timesteps, time, waiting for data."""
    def __init__(self):
        self.restart()

    def restart(self):
        self.losses, self.timesteps, self.waited = [], [], 0.0
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

    def read(self, ranks, steps, micro_steps, counts=()):
        """(numbers for the log, losses (steps, pairs) of this rank, how many are not finite, sums
        over the ranks of `counts`) of the last `steps` whole steps. All ranks meet here, and the
        host waits for its device once.
        """
        whole = steps * micro_steps                 # a micro-step of a step not done is left out
        losses = torch.cat(self.losses[:whole]).view(steps, -1)
        band = torch.cat(self.timesteps[:whole]) * BANDS // TIMESTEPS
        bands = losses.new_zeros(2, BANDS)
        bands[0].index_add_(0, band, losses.flatten())
        bands[1].index_add_(0, band, torch.ones_like(losses).flatten())
        bad = (~losses.isfinite()).sum().to(losses.dtype)
        counts = losses.new_tensor(counts)
        told = torch.cat([losses.mean()[None], bad[None], bands.flatten(), counts])
        told = ranks.all_reduce(told).tolist()
        seconds = time.perf_counter() - self.since
        sums, pairs = np.reshape(told[2:2 + 2 * BANDS], (2, BANDS))
        numbers = {"loss": told[0] / ranks.world,
                   "pairs_per_s": losses.numel() * ranks.world / seconds,
                   "data_wait": min(1.0, self.waited / seconds),
                   "loss_by_timestep": {band_name(i): float(sums[i] / pairs[i])
                                        for i in range(BANDS) if pairs[i]}}
        return numbers, losses, int(told[1]), list(map(int, told[2 + 2 * BANDS:]))


def band_name(i):
    return f"{i * TIMESTEPS // BANDS}-{(i + 1) * TIMESTEPS // BANDS - 1}"


def seen(shares, counts, pairs):
    """How many different scenes and pairs of views a run has seen, of how many: four numbers.

    shares: of the sources, counts: for each the number of views of every scene. These are
    expectations of draws with replacement, n (1 - (1 - 1/n)^k), within sqrt(n) of the truth: they
    need no counters that grow with the run and would have to be saved with it.
    """
    scenes = views = all_scenes = all_views = 0.0
    for share, n in zip(shares, counts, strict=True):
        n = n.astype(np.float64)                    # a scene is drawn by its views
        orders = n * (n - 1)                        # ordered pairs of different views, by scene
        scenes += hit(n.sum() / n, share, pairs, np.ones_like(n)).sum()
        views += hit(n.sum() * (n - 1), share, pairs, orders).sum()
        all_scenes += len(n)
        all_views += orders.sum()
    return round(scenes), int(all_scenes), round(views), int(all_views)


def hit(cells, share, draws, size):
    """Of `size` cells, each of which one draw in `cells` hits, how many are hit."""
    with np.errstate(divide="ignore"):      # a single cell is hit for certain
        missed = np.exp(draws * np.log1p(-share / cells))
    return size * (1 - missed)


def state(config, step, numbers, needs, peak, ranks, device, readers):
    """What the log tells beside the loss: share of the chip's ceiling, memory, time, data."""
    seconds_a_step = config.batch_size / numbers["pairs_per_s"]
    flops = (1 + cost.BACKWARD) * needs.flops * numbers["pairs_per_s"] / ranks.world
    numbers = {"ceiling_share": flops / peak, "memory_gb": peak_memory(device),
               "remaining_s": (config.steps - step) * seconds_a_step}
    if all(hasattr(reader, "counts") for reader in readers):        # nobody counts a stream
        scenes, _, pairs, _ = seen([s.probability for s in config.sources],
                                   [reader.counts for reader in readers], step * config.batch_size)
        numbers |= {"scenes_seen": scenes, "pairs_seen": pairs}
    return numbers


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
        told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip()


def summary(config, ranks, device, needs, micro_batch, micro_steps):
    """What a run begins with, as text: code, machine, network, step, memory."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    machine = [f"{ranks.world} x {device.type}", chip or platform.machine(), config.precision]
    machine += ["compiled"] * config.compile
    machine += ["as a CUDA graph"] * engine.can_capture(config, ranks, device)
    machine += ["moments and average divided"] * (config.divide_optimizer and ranks.world > 1)
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
        self.bar = self.board = self.trace = None
        self.traced = False
        self.troubles, self.step = set(), 0

    def start(self, step, trace_steps=0):
        """Begins after `step`: what a killed run logged beyond it is taken out of log.jsonl."""
        self.step = step
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=step, unit="step", smoothing=0.05,
                            dynamic_ncols=True)
        if not self.main:
            return
        path = self.out / "log.jsonl"
        with self.tolerant(path):
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if logged_step(line) <= step]
                remains = path.with_suffix(".unfinished")
                remains.write_text("".join(line + "\n" for line in kept))
                os.replace(remains, path)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            with self.tolerant(self.out / "tensorboard"):
                self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
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
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        else:                       # in a file a bar would be one endless line
            left = timedelta(seconds=round(numbers.get("remaining_s", 0)))
            self.say(f"step {step}/{self.steps}: {shown}, {left} left")
        with self.tolerant(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.board:
            with self.tolerant(self.out / "tensorboard"):
                for name, value in numbers.items():
                    values = value.items() if isinstance(value, dict) else [("", value)]
                    for part, number in values:
                        self.board.add_scalar(f"{name}/{part}".rstrip("/"), number, step)

    def picture(self, step, name, image):
        """Writes a PIL image to NAME/step_XXXXXXXX.png, and to TensorBoard."""
        path = self.out / name / f"step_{step:08d}.png"
        with self.tolerant(path):
            path.parent.mkdir(exist_ok=True)
            image.save(path)
            if self.board:
                self.board.add_image(name, np.asarray(image), step, dataformats="HWC")
        return path

    def note(self, line):
        """Says a line and keeps it in log.jsonl, as a note of the step that was logged last."""
        self.say(line)
        with self.tolerant(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "note": line}) + "\n")

    def say(self, line):
        if self.main:
            tqdm.write(line)        # above the bar, if there is one
            sys.stdout.flush()

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
            self.bar.close()
        if self.board:
            self.board.close()


def logged_step(line):
    """The step of a line of log.jsonl; infinity for one that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
