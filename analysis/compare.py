"""The paper's table 4 in miniature: five conditioning modes, the same data, seed and budget.

    python ablation.py configs/ablation.py --minutes 9      # again, until it prints the table

Renders the scenes, trains every mode from scratch in its own folder, several processes at once on
the GPUs there are, scores all on the same held-out pairs, and writes ablation.json, table.txt,
sheet.png and curves.svg. Every part that is done is skipped, and a run that was stopped goes on:
the same command comes to the same end however often it is cut short.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from runtime import checkpoint
import camera
import configs
from analysis import curves
import evaluate
from runtime import command as options
from views import pictures
from views import render
from analysis import tables
from runtime.ranks import device_of

# The five modes and the names that the paper's table has for them, in the order of its results.
MODES = {name: mode.paper for name, mode in camera.MODES.items() if mode.paper}
# Extents of the cameras: share of its path that each one goes, and the seed of the scenes.
EXTENTS = {"near": ("0.25", "0"), "far": ("1", "1")}
ROWS = 10                   # of the sheet of images
POLL, TELL = 0.5, 30        # seconds between looks at the processes, and between lines about them
TAIL = 2000                 # last bytes of a log that are searched for the reason of an end
ROOT = Path(__file__).parents[1]


# ---- the parts

def prepare_data(config, args):
    """Renders the scenes that are not there yet. Raises ValueError where that fails."""
    for extent, (motion, seed) in EXTENTS.items():
        command = [sys.executable, str(ROOT / "prepare.py"), "synth", "--motion", motion,
                   "--seed", seed, "--out", str(Path(config.data) / extent),
                   "--size", str(config.image_size), "--scenes", str(args.scenes),
                   "--held-out", str(args.held_out)]
        if config.device in ("cpu", "cuda"):
            command += ["--device", config.device]
        if subprocess.run(command).returncode:
            raise ValueError(f"the scenes for {config.data} could not be rendered, see above")


def is_done(config, mode):
    """Whether the run of a mode has all its steps."""
    folder = checkpoint.latest(Path(config.out) / mode)
    return folder is not None and checkpoint.step_of(folder) >= config.steps


def state_of(config, mode):
    """One line about a run: its step and speed, as it logged them."""
    try:
        lines = (Path(config.out) / mode / "log.jsonl").read_text().splitlines()
        last = [line for line in map(json.loads, lines) if "loss" in line][-1]
        left = (config.steps - last["step"]) * config.batch_size / last["pairs_per_s"]
    except (OSError, IndexError, ValueError):       # not there yet, or half written
        return "starting"
    return (f"step {last['step']} of {config.steps}, loss {last['loss']:.4f}, "
            f"{last['pairs_per_s']:.0f} pairs/s, {left / 60:.1f} minutes to go")


def reason_of(path):
    """The last line of a log."""
    text = path.read_bytes()[-TAIL:].decode(errors="replace").replace("\r", "\n")
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was said")


def gpus_there():
    """The names, for CUDA_VISIBLE_DEVICES, of the GPUs that this process may use."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","), torch.cuda.device_count()
    return (named if named[0] else list(map(str, range(count))))[:count]


def train(config, modes, args, overrides, deadline):
    """Trains the modes, args.jobs at once, on the GPUs in turn, until all are done or the time is
    up. Returns whether all are done. Raises ValueError, and stops the others, where one fails."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    # processes that all use every core stand in each other's way
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    gpus = gpus_there()
    waiting, running, told = [m for m in modes if not is_done(config, m)], {}, time.monotonic()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < args.jobs:
                mode = waiting.pop(0)
                gpu = {"CUDA_VISIBLE_DEVICES": gpus[modes.index(mode) % len(gpus)]} if gpus else {}
                # overrides first: the mode and the folder are the ablation's
                command = [sys.executable, str(ROOT / "train.py"), args.config, *overrides,
                           f"--mode={mode}", f"--out={Path(config.out) / mode}"]
                with open(Path(config.out) / f"{mode}.log", "ab") as log:
                    running[mode] = subprocess.Popen(command, stdout=log, stderr=log,
                                                     env={**threads, **os.environ, **gpu})
            time.sleep(POLL)
            for mode, process in list(running.items()):
                if process.poll() is not None:
                    del running[mode]
                    if process.returncode or not is_done(config, mode):
                        raise ValueError(f"the run of {mode} ended with code {process.returncode}: "
                                         f"{reason_of(Path(config.out) / f'{mode}.log')}")
                    print(f"{mode}: done", flush=True)
            if running and time.monotonic() - told > TELL:
                told = time.monotonic()
                for mode in running:
                    print(f"{mode}: {state_of(config, mode)}", flush=True)
    finally:
        for process in running.values():
            process.terminate()         # it saves first
        for process in running.values():
            process.wait()
    return all(is_done(config, mode) for mode in modes)


def score(config, modes, args):
    """Evaluates every mode that has not been, on the same pairs."""
    for mode in modes:
        folder = Path(config.out) / mode
        about = folder / "eval" / "metrics.json"
        if about.is_file():
            found = json.loads(about.read_text())
            lpips = "lpips" in found["methods"][tables.MODEL] or not args.lpips
            if lpips and (found["pairs"], found["checkpoint"]) == (args.pairs,
                                                                   str(checkpoint.latest(folder))):
                continue
        print(f"\n{mode}", flush=True)
        lpips = [word for files in args.lpips for word in ("--lpips", *files)]
        evaluate.run([str(folder), "--pairs", str(args.pairs), "--out", str(folder / "eval"),
                      *lpips])


# ---- the result

def rows_of(config, mode):
    """Every pair's figures, in the order of their numbers."""
    text = (Path(config.out) / mode / "eval" / "pairs.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def compare(rows):
    """(lines of text, dict for json): a row a mode, and every mode against the one before it.
    rows: {mode: rows of its pairs}."""
    cells = {}
    for mode, own in rows.items():
        found = tables.summarize(own)["methods"]
        cells[f"{MODES[mode]} ({mode})"] = found[tables.MODEL]
    baselines = {name: row for name, row in found.items() if name != tables.MODEL}
    lines = [*tables.table("conditioning", {**cells, **baselines}), "",
             "each against the one above it, pair by pair, in dB of PSNR; the paper has all of "
             "these above 0, the last one also at 0:"]
    steps = []
    for before, after in zip(rows, list(rows)[1:]):
        mean, error, count = tables.difference(rows[after], tables.MODEL, tables.MODEL,
                                               others=rows[before])
        sure = tables.SURE * error
        word = "better" if mean > sure else "worse" if mean < -sure else "equal, within noise"
        lines.append(f"  {MODES[after]} - {MODES[before]}: {mean:+.2f} +- {error:.2f}  ({word})")
        steps.append({"from": before, "to": after, "psnr_mean": mean, "psnr_se": error,
                      "n": count})
    return lines, {"modes": dict(zip(rows, cells.values())), "baselines": baselines,
                   "differences": steps}


def sheet(config, rows):
    """Conditioning view, truth and what every mode shows, for pairs spread over the last mode's
    PSNR, best first."""
    last = list(rows.values())[-1]
    order = sorted(range(len(last)), key=lambda i: -last[i]["scores"][tables.MODEL]["psnr"])
    places = pictures.evenly_spaced(order, ROWS)
    device, columns = device_of(config.device), {}
    for mode in rows:
        own = replace(config, mode=mode)
        net = render.load(Path(config.out) / mode, device, "fp32")[0]
        pairs = evaluate.held_out_pairs(own, len(last))
        cases = [evaluate.case(pairs, place) for place in places]
        guesses, truth, _, cond, _ = evaluate.guesses_of(net, cases, own,
                                                         evaluate.load_depth(own, device))
        columns.setdefault("photo", cond), columns.setdefault("truth", truth)
        columns[MODES[mode].removeprefix("6DoF+1, ")] = guesses[tables.MODEL]
    return pictures.sheet([[(name, pictures.image(images[i])) for name, images in columns.items()]
                           for i in range(len(places))])


def write(config, modes, args):
    """The table on the screen, and the four files."""
    rows, out = {mode: rows_of(config, mode) for mode in modes}, Path(config.out)
    lines, found = compare(rows)
    about = {"pairs": args.pairs, "pairs_seen": config.steps * config.batch_size,
             "seed": config.seed, "image_size": config.image_size}
    (out / "ablation.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    sheet(config, rows).save(out / "sheet.png")
    files = ["ablation.json", "table.txt", "sheet.png"]
    try:
        drawn = {MODES[mode]: curves.read(out / mode, "val_psnr") for mode in modes}
        (out / "curves.svg").write_text(curves.svg(drawn, "held-out PSNR, dB"))
        files.append("curves.svg")
    except ValueError as err:       # runs without validation have no curve
        print(f"no curves.svg: {err}")
    print(f"in {out}: {', '.join(files)}")


# ---- the command

def parser():
    p = options.Parser("ablation.py", allow_abbrev=False, description=__doc__.splitlines()[0],
                       epilog="Fields of the Config may follow as --name=value.")
    whole = options.numbers_of(int, 1)
    p.add_argument("config", metavar="FILE", help="configs/ablation.py")
    p.add_argument("--minutes", type=options.numbers_of(float, 0, above=True), metavar="M",
                   help="stop training then, and go on with the same command (no limit)")
    p.add_argument("--jobs", type=whole, metavar="N",
                   help="runs at once (all of them on GPUs, otherwise one)")
    p.add_argument("--modes", default=",".join(MODES), help="which ones (%(default)s)")
    p.add_argument("--pairs", type=options.numbers_of(int, 2), default=512, metavar="N",
                   help="held-out pairs to score on (%(default)s)")
    p.add_argument("--scenes", type=whole, default=8000, metavar="N",
                   help="training scenes to render, for each extent (%(default)s)")
    p.add_argument("--held-out", type=whole, default=200, metavar="N",
                   help="held-out scenes, for each extent (%(default)s)")
    p.add_argument("--lpips", nargs=2, action="append", default=[], metavar=("BACKBONE", "LINEAR"),
                   help="as in evaluate.py")
    return p


def run(argv):
    """The command. Raises ValueError or OSError with one line."""
    args, overrides = parser().parse_known_args(argv)
    if any(option.startswith("--mode=") for option in overrides):
        raise ValueError("--mode=... has no place here: --modes says which ones are compared")
    started = time.monotonic()
    deadline = started + 60 * (args.minutes or float("inf"))
    config = configs.load([args.config, *overrides])
    modes = args.modes.split(",")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(options.unknown("mode", mode, MODES))
    modes = [mode for mode in MODES if mode in modes]
    if len(modes) < 2:
        raise ValueError("--modes: at least two are needed to compare")
    if args.jobs is None:
        args.jobs = len(modes) if device_of(config.device).type == "cuda" else 1
    prepare_data(config, args)
    evaluate.held_out_pairs(config, args.pairs)     # too few are refused before training
    if not train(config, modes, args, overrides, deadline):
        print(f"stopped after {(time.monotonic() - started) / 60:.1f} minutes; the same command "
              "goes on from here")
        for mode in modes:
            print(f"  {mode}: {'done' if is_done(config, mode) else state_of(config, mode)}")
        return
    score(config, modes, args)
    write(config, modes, args)


def main(argv):
    try:
        run(argv)
    except (ValueError, OSError) as err:
        print(f"ablation.py: {err}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ablation.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
