"""The broken runs of section 9 of walkthrough.md: train the small weights for a while, score them.

    python -m docs.broken sound "mirrored cameras"      minutes each; prints what figures.py draws

Needs data/walk and data/few, for which the section has the commands. The folders of the runs are in
out/broken, their numbers in docs/walk/broken.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import model
from analysis import score
from views import render

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "walk"
MEASURED = OUT / "broken.json"

LONGER = "--steps=200", "--lr=1e-3", "--validate_every=100"     # what is forgotten takes a while
# name: ((file, its line, what breaks it), arguments of train.py)
BREAKS = {
    "sound": ((), ()),
    "mirrored cameras": (("camera.py", "torch.linalg.inv(cond_c2w) @ target_c2w",
                          "torch.linalg.inv(target_c2w) @ cond_c2w"), ()),
    "wrong scale": (("camera.py", "if not mode.unscaled:", "if mode.unscaled:"), ()),
    "leaking scenes": (("configs/synth.py", "/held-out-", "/train-"), ("--data=data/few",)),
    "high rate": ((), ("--lr=2e-2",)),
    "sound, longer": ((), LONGER),
    "no dropout": ((), ("--drop_clip=0", "--drop_both=0", "--drop_latent=0", *LONGER)),
}
SMALL_RUN = ("--data=data/walk --image_size=32 --steps=100 --batch_size=8 --micro_batch=8 "
             "--lr=5e-4 --lr_projection=5e-3 --warmup_steps=10 --ema_decay=0.9 --sample_steps=5 "
             "--validate_every=20 --validate_pairs=12 --validate_steps=4 --eval_pairs=12 "
             "--sample_every=100000 --save_every=100000 --log_every=5 --workers=0 "
             "--threads=1").split()
GUIDANCES = 1.5, 6.0            # at which a run is scored by sound code
SCORED = 16                     # held-out pairs of a score


def python(*arguments, cwd=ROOT):
    subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, check=True)


def without_conditions(out):
    """{band of timesteps: held-out loss} of a run's network that gets neither photo nor camera: of
    the branch that guidance starts from."""
    tensors, config = render.open_run(out, str(ROOT / "data" / "walk"),
                                      str(ROOT / "configs" / "synth.py"))
    net = render.load(tensors, "cpu", "fp32")[0]
    net.predict = lambda z_t, t, z_cond, context: model.ZeroNVS.predict(
        net, z_t, t, 0 * z_cond, 0 * context)
    return score.validation_loss(net, score.held_out_pairs(config, SCORED), config)


def measure(name):
    """Trains in a copy of this checkout in which one line is broken, then sound code scores the run
    on scenes that it never saw. Returns what MEASURED holds of a run."""
    change, arguments = BREAKS[name]
    out = ROOT / "out" / "broken" / name.replace(" ", "_")
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
            ".git", "data", "out", "docs", "tests", "__pycache__"))
        (Path(copy) / "data").symlink_to(ROOT / "data")
        if change:
            path = Path(copy) / change[0]
            path.write_text(path.read_text().replace(*change[1:]))
        python("train.py", "configs/synth.py", *SMALL_RUN, *arguments, f"--out={out}",
               cwd=copy)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = {"log": [{key: round(value, 4) for key, value in line.items()
                      if key in ("step", "loss", "grad_norm") or key.startswith("val_")}
                     for line in lines if "loss" in line], "scored": {}}
    for guidance in GUIDANCES:
        scores = out / f"guidance_{guidance:g}"
        python("evaluate.py", out, "--config=configs/synth.py", "--data=data/walk",
               f"--guidance={guidance}", f"--pairs={SCORED}", f"--out={scores}")
        methods = json.loads((scores / "metrics.json").read_text())["methods"]
        found["scored"][f"{guidance:g}"] = {key: round(cell["mean"], 3)
                                            for key, cell in methods["this model"].items()}
    found["without"] = {band: round(loss, 4) for band, loss in without_conditions(out).items()}
    return found


def main(argv):
    parser = argparse.ArgumentParser("broken.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", choices=BREAKS, metavar="RUN", help=", ".join(BREAKS))
    for name in parser.parse_args(argv).runs:
        found = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
        found[name] = measure(name)
        MEASURED.write_text(json.dumps(found))
        print(name, found[name]["scored"])


if __name__ == "__main__":
    main(sys.argv[1:])
