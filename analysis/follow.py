"""Whether a model follows the camera along every path of sample.py, beside the truth.

    python -m analysis.follow out/synth --config configs/synth.py

The held-out scenes of `prepare.py synth` can be rendered from everywhere: a little way along every
path the model's views are compared with the true ones. Beside them stands the photo itself, the
answer of a model that does not follow at all. Writes `paths.png` into the run's folder, or beside a
file.
"""

from pathlib import Path

from runtime import command
from views import add_data_options

# How far, as --by says it: about as far as the views of a scene go by default
HOW_FAR = {"orbit": 10, "swing": 10, "spiral": 0.1, "dolly": 0.15, "truck": 0.12, "pedestal": 0.1,
           "pan": 10, "tilt": 8, "zoom": 1.3}
VIEWS = 5               # along a path, the photo's own among them, which does not count
SHOWN = 2               # scenes in the picture


def parser():
    p = command.Parser("follow.py", description=__doc__.splitlines()[0])
    p.add_argument("run", help="a run's folder, of scenes that `prepare.py synth` made")
    add_data_options(p)
    p.add_argument("--scenes", type=command.numbers_of(int, SHOWN), default=50, metavar="N",
                   help="held-out scenes (%(default)s)")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    return p


# answered before torch, which takes seconds, is imported
ARGS = parser().parse_args() if __name__ == "__main__" else None

import torch

import camera
from analysis import score
from analysis.metrics import psnr
from captures import synth
from runtime.files import unfinished
from runtime.ranks import device_of
from views import paths, photos, pictures, render


def path_from(photo, name):
    """The paths.Cameras of a motion, from a HeldOut photo."""
    return paths.motion(name, VIEWS, HOW_FAR[name], photo.fov, photo.elevation)


def follow(drawn, truth, photo, name):
    """(true views, a Render's) along a path from a HeldOut photo with its synth.truth_of: two of
    (n, 3, s, s)."""
    cameras = path_from(photo, name)
    drawn.start_from(photo)
    return (truth(cameras.c2w, cameras.fov),
            torch.cat([*map(pictures.tensor, drawn(cameras, label=""))]))


def main(args):
    """The command, options parsed. Raises ValueError or OSError with one line."""
    tensors, config = render.open_run(args.run, args.data, args.config, args.init)
    photo = photos.held_out(config, args.scenes - 1)    # before anything is spent on the others
    synth.truth_of(photo, config.data)
    net = render.load(tensors, device_of(args.device), "fp32")[0]
    drawn = render.Render(net, config, {"seed": config.seed})
    names = [name for name in HOW_FAR
             if camera.MODES[config.mode].pose == "matrix" or path_from(photo, name).centred()]
    found, rows = {name: [] for name in names}, {name: [] for name in names}
    for number in command.progress(range(args.scenes), "follow", "scenes"):
        photo = photos.held_out(config, number)
        image, truth = pictures.tensor(photo.picture), synth.truth_of(photo, config.data)
        for name in names:
            true, views = follow(drawn, truth, photo, name)
            found[name].append((psnr(views, true)[1:].mean().item(),
                                psnr(image.expand_as(true), true)[1:].mean().item()))
            if number < SHOWN:
                rows[name] += [(f"{name} {HOW_FAR[name]:g}", photo.picture),
                               ("truth", pictures.image(true[-1])),
                               ("model", pictures.image(views[-1]))]
    print(f"{args.run}: {args.scenes} held-out scenes, PSNR of {VIEWS - 1} views in dB")
    print(f"{'path':10}{'by':>6}{'model':>8}{'photo':>8}   difference")
    for name, pairs in found.items():
        model, still = (sum(each) / len(pairs) for each in zip(*pairs))
        mean, error, _ = score.mean_and_error([a - b for a, b in pairs], range(len(pairs)))
        print(f"{name:10}{HOW_FAR[name]:6g}{model:8.2f}{still:8.2f}   {mean:+.2f} +- {error:.2f}")
    run = Path(args.run)
    path = (run if run.is_dir() else run.parent) / "paths.png"
    with unfinished(path) as partial:
        pictures.sheet(list(rows.values())).save(partial, "png")
    print(f"{path}: photo, truth and model along every path")


if __name__ == "__main__":
    command.run("follow.py", main, ARGS)
