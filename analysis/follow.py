"""Whether a model follows the camera along every path of sample.py, beside the truth.

    python -m analysis.follow out/synth --config configs/synth.py

The held-out scenes of `prepare.py synth` can be rendered from everywhere: a little way along every
path the model's views are compared with the true ones. Beside them stands the photo itself, the
answer of a model that does not follow at all. Writes `paths.png` into the run's folder, or beside a
file.
"""

import json
from pathlib import Path

from analysis import add_data_options
from runtime import command

# How far, as --by says it: about as far as the views of a scene go by default
HOW_FAR = {"orbit": 10, "swing": 10, "spiral": 0.1, "dolly": 0.15, "truck": 0.12, "pedestal": 0.1,
           "pan": 10, "tilt": 8, "zoom": 1.3}
VIEWS = 5               # along a path, the photo's own among them, which does not count
SAME = 40               # dB by which a rendered photo is known to be the photo
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
from diffusion import novel_views
from runtime.files import unfinished
from runtime.ranks import device_of
from views import paths, photos, pictures, render


def path_from(photo, name):
    """The paths.Cameras of a motion, from a HeldOut photo."""
    return paths.motion(name, VIEWS, HOW_FAR[name], photo.fov, photo.elevation)


def truth_of(photo, cameras, seed):
    """The true views (n, 3, s, s) in [-1, 1] of paths.Cameras that start from a HeldOut photo.
    ValueError where its scene is not one of synth.scene(seed, ...)."""
    known, size = photo.reader.scene(photo.number), photo.picture.width
    scene = synth.scene(seed, int(Path(known.name).name))
    motion = torch.linalg.inv(cameras.cond_c2w) @ cameras.c2w
    motion[:, :3, 3] *= photo.scene_scale / photo.scale     # from the paths' unit to the scene's
    c2w = known.c2w[photo.view] @ motion
    views = torch.cat([synth.render([scene], pose[None, None], angle[None], size)[0][0]
                       for pose, angle in zip(c2w, cameras.fov)])
    if psnr(views[:1], pictures.tensor(photo.picture)) < SAME:
        raise ValueError(f"{known.name} does not look as `prepare.py synth` renders it")
    return views


@torch.no_grad()
def follow(net, config, photo, name, seed):
    """(true views, the model's) along a path from a HeldOut photo: two of (n, 3, s, s)."""
    cameras = path_from(photo, name)
    T = render.pose_vectors(config.mode, cameras.cond_c2w, cameras.c2w, cameras.fov, photo.scale)
    images = torch.cat([pictures.tensor(photo.closer(share)) for share in cameras.shares()])
    views = novel_views(net, images.to(net.betas.device), T, [0] * VIEWS, config.seed,
                        config.sampler, config.sample_steps, config.eta, config.guidance)
    return truth_of(photo, cameras, seed), views.cpu()


def seed_of(note):
    """The seed in the note of `prepare.py synth`. Raises FileNotFoundError, ValueError."""
    if not note.is_file():
        raise FileNotFoundError(f"{note} is missing: only scenes of `prepare.py synth` are known "
                                "from everywhere")
    try:
        return int(json.loads(note.read_text(encoding="utf-8"))["seed"])
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{note} is not what `prepare.py synth` writes") from err


def main(args):
    """The command, options parsed. Raises ValueError or OSError with one line."""
    tensors, config = render.open_run(args.run, args.data, args.config, args.init)
    seed = seed_of(Path(config.data) / "synth.json")
    photo = photos.held_out(config, args.scenes - 1)        # before anything is spent on the others
    net = render.load(tensors, device_of(args.device), "fp32")[0]
    names = [name for name in HOW_FAR
             if camera.MODES[config.mode].pose == "matrix" or path_from(photo, name).centred()]
    found, rows = {name: [] for name in names}, {name: [] for name in names}
    for number in command.progress(range(args.scenes), "follow", "scenes"):
        photo = photos.held_out(config, number)
        image = pictures.tensor(photo.picture)
        for name in names:
            truth, views = follow(net, config, photo, name, seed)
            found[name].append((psnr(views, truth)[1:].mean().item(),
                                psnr(image.expand_as(truth), truth)[1:].mean().item()))
            if number < SHOWN:
                rows[name] += [(f"{name} {HOW_FAR[name]:g}", photo.picture),
                               ("truth", pictures.image(truth[-1])),
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
