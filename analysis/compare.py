"""The paper's table 4 in miniature: five conditioning modes, the same data, seed and budget.

    python -m analysis.compare configs/ablation.py --minutes 9   # again, until its table

Renders the scenes, trains every mode from scratch in its own folder, scores all on the same
held-out pairs, and writes ablation.json, table.txt and curves.svg. What is done is skipped, and a
run that was stopped goes on: however often it is cut short, the same command comes to the same end.
"""

import configs
from runtime import command


def parser():
    p = command.Parser("compare.py", description=__doc__.splitlines()[0],
                       epilog="Fields of the Config may follow as --name=value.")
    whole = command.numbers_of(int, 1)
    p.add_argument("config", metavar="FILE", help="configs/ablation.py")
    p.add_argument("--minutes", type=command.numbers_of(float, 0, above=True), metavar="M",
                   default=30 * 24 * 60,
                   help="stop training then, and go on with the same command (a month)")
    p.add_argument("--modes", default="", help="which ones, as 3dof,7dof (all that the paper has)")
    p.add_argument("--pairs", type=command.numbers_of(int, 2), default=512, metavar="N",
                   help="held-out pairs to score on (%(default)s)")
    p.add_argument("--scenes", type=whole, default=8000, metavar="N",
                   help="training scenes to render, for each extent (%(default)s)")
    p.add_argument("--held-out", type=whole, default=200, metavar="N",
                   help="held-out scenes, for each extent (%(default)s)")
    return p


# answered before torch, which takes seconds, is imported
ARGS = configs.parse_with_fields(parser()) if __name__ == "__main__" else ()

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import camera
from analysis import curves, score
from runtime import checkpoint
from runtime.files import read_json, write_text
from runtime.ranks import device_of

# Extents of the cameras: share of its path that each one goes, and the seed of the scenes.
EXTENTS = {"near": (0.25, 0), "far": (1, 1)}
ROOT = Path(__file__).parents[1]
NAMES = {name: mode.paper for name, mode in camera.MODES.items() if mode.paper}     # the paper's


def start(name, *arguments, **options):
    """A script of the project, as a process that has begun."""
    return subprocess.Popen([sys.executable, str(ROOT / name), *map(str, arguments)], **options)


def run_script(what, *arguments):
    """Runs a script of the project to its end. Raises ValueError where it fails."""
    if start(*arguments).wait():
        raise ValueError(f"{what}, see above")


def train(modes, args, overrides, out, deadline):
    """Trains modes at the same time, on the GPUs in turn. Returns whether all came to their end in
    time. Raises ValueError, and stops the others, where one fails."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = gpus if gpus[0] else [str(i) for i in range(torch.cuda.device_count())]
    # processes that all use every core stand in each other's way
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(modes)))}
    running = {}
    try:
        for i, mode in enumerate(modes):
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
            with open(out / f"{mode}.log", "ab") as log:
                # overrides first: the mode and the folder are the comparison's
                running[mode] = start("train.py", args.config, *overrides, f"--mode={mode}",
                                      f"--out={out / mode}", stdout=log, stderr=log,
                                      env={**threads, **os.environ, **gpu})
            print(f"{mode}: see {out / mode}.log", flush=True)
        for mode, process in running.items():
            if process.wait(max(0, deadline - time.monotonic())):
                said = (out / f"{mode}.log").read_text(errors="replace").strip()
                raise ValueError(f"the run of {mode} ended with code {process.returncode}: "
                                 f"{said.splitlines()[-1] if said else 'nothing was said'}")
            print(f"{mode}: done", flush=True)
    except subprocess.TimeoutExpired:
        return False
    finally:
        for process in running.values():
            process.terminate()         # it saves first
        for process in running.values():
            process.wait()
    return True


def is_done(config, folder):
    """Whether the run of a mode has all its steps."""
    newest = checkpoint.latest(folder)
    return newest is not None and checkpoint.step_of(newest) >= config.steps


def scored(folder, args, config):
    """The rows of a run's pairs, which evaluate.py scores unless it has done so already."""
    path = folder / "eval" / "metrics.json"
    found = read_json(path) if path.is_file() else {}
    if (found.get("pairs"), found.get("checkpoint")) != (args.pairs,
                                                         str(checkpoint.latest(folder))):
        run_script(f"{folder} could not be scored", "evaluate.py", folder, "--config", args.config,
                   "--data", config.data, "--pairs", args.pairs)
    text = path.with_name("pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def compare(rows):
    """(lines of text, dict for json): a row a mode, and every mode against the one before it.
    rows: {mode: rows of its pairs}."""
    found = {mode: score.summarize(own)["methods"] for mode, own in rows.items()}
    cells = {mode: methods.pop(score.MODEL) for mode, methods in found.items()}
    baselines = list(found.values())[-1]
    labelled = {f"{NAMES[mode]} ({mode})": row for mode, row in cells.items()}
    lines = [*score.table("conditioning", {**labelled, **baselines}), "",
             "each against the one above it, pair by pair, in dB of PSNR; the paper has all of "
             "these above 0, the last one also at 0:"]
    steps = []
    for before, after in zip(rows, list(rows)[1:]):
        mean, error, count = score.mean_of(rows[after], score.MODEL, minus=score.MODEL,
                                           others=rows[before])
        lines.append(f"  {NAMES[after]} - {NAMES[before]}: {mean:+.2f} +- {error:.2f}  "
                     f"({score.judged(mean, error, 'better', 'worse', 'equal, within noise')})")
        steps.append({"from": before, "to": after, "psnr_mean": mean, "psnr_se": error,
                      "n": count})
    return lines, {"modes": cells, "baselines": baselines, "differences": steps}


def main(args, overrides):
    """The command. Raises ValueError or OSError with one line."""
    if any(option.startswith("--mode=") for option in overrides):
        raise ValueError("--mode=... has no place here: --modes says which ones are compared")
    deadline, config = time.monotonic() + 60 * args.minutes, configs.load([args.config, *overrides])
    asked = args.modes.split(",") if args.modes else NAMES
    for mode in asked:
        if mode not in NAMES:
            raise ValueError(command.unknown("mode", mode, NAMES))
    modes = [mode for mode in NAMES if mode in asked]
    if len(modes) < 2:
        raise ValueError("--modes: at least two are needed to compare")
    for extent, (motion, seed) in EXTENTS.items():
        run_script(f"the scenes for {config.data} could not be rendered", "prepare.py", "synth",
                   "--motion", motion, "--seed", seed, "--size", config.image_size, "--out",
                   Path(config.data) / extent, "--scenes", args.scenes, "--held-out", args.held_out)
    score.held_out_pairs(config, args.pairs)        # too few are refused before training
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    left = [mode for mode in modes if not is_done(config, out / mode)]
    together = max(1, len(left)) if device_of(config.device).type == "cuda" else 1
    for i in range(0, len(left), together):
        if not train(left[i:i + together], args, overrides, out, deadline):
            print("stopped; the same command goes on from here")
            return
    rows = {mode: scored(out / mode, args, config) for mode in modes}
    lines, found = compare(rows)
    about = {"pairs": args.pairs, "pairs_seen": config.steps * config.batch_size,
             "seed": config.seed, "image_size": config.image_size}
    write_text(out / "ablation.json", json.dumps({**about, **found}, indent=1) + "\n")
    write_text(out / "table.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    try:
        curves.draw({NAMES[mode]: curves.read(out / mode, "val_psnr") for mode in modes},
                    "val_psnr", out / "curves.svg")
    except ValueError as err:       # runs without validation, or no matplotlib
        print(f"no curves.svg: {err}")
    print(f"in {out}: ablation.json, table.txt, and {modes[0]}/eval/ and the others")


if __name__ == "__main__":
    command.run("compare.py", main, *ARGS)
