"""Whether a model follows the camera along every path of sample.py, beside the truth.

    python -m analysis.follow out/synth --config configs/synth.py
    python -m analysis.follow out/synth --config configs/synth.py --photos 1 2 4
    python -m analysis.follow out/synth --capture FOLDER --photos 1 2 4

The held-out scenes of `prepare.py synth` can be rendered from everywhere: a little way along every
path the model's views are compared with the true ones. Beside them stands the photo itself, the
answer of a model that does not follow at all. Writes `paths.png` into the run's folder, or beside a
file.

With --photos, views start from so many photos of a scene, or of a capture along its own path, and
are compared with the other photos. Steadiness is how well neighbouring views along a scene's path
agree after a warp by true depth.
"""

from dataclasses import replace
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
    p.add_argument("--photos", type=command.numbers_of(int, 1), nargs="+", metavar="N",
                   help="start from so many photos instead, as sample.py --photos does")
    p.add_argument("--capture", metavar="FOLDER",
                   help="photos with cameras, as sample.py --capture has them (--photos 1)")
    p.add_argument("--scenes", type=command.numbers_of(int, SHOWN), default=50, metavar="N",
                   help="held-out scenes (%(default)s)")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    return p


# answered before torch, which takes seconds, is imported
ARGS = parser().parse_args() if __name__ == "__main__" else None

import torch

import camera
from analysis import score
from analysis.metrics import agreement, psnr, warp
from captures import own, synth
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


# ---- from several photos

def views_of(config, number):
    """(Photos, cameras (n, 4, 4)) of all views of a held-out scene, in the paths' world of the
    middle one, and that HeldOut one."""
    photo = photos.held_out(config, number)
    c2w, unit = photo.reader.scene(photo.number).c2w, photo.scene_scale / photo.scale
    found = [photos.held_out(config, number, view) for view in range(len(c2w))]
    for each in found:
        each.scale = each.scene_scale / unit
    return found, paths.moved(c2w, c2w[photo.view], photo.camera(), 1 / unit), photo


def chosen_of(views, counts):
    """({count: places of so many views}, the places that are in none). ValueError where there are
    not so many."""
    chosen = {count: pictures.evenly_spaced(range(len(views)), count) if count > 1
              else [len(views) // 2] for count in counts}
    others = [i for i in range(len(views)) if not any(i in places for places in chosen.values())]
    if not others or max(counts) > len(views):
        raise ValueError(f"--photos {max(counts)}: of {len(views)} photos, others have to be left")
    return chosen, others


def drawn_from(drawn, views, cameras, places, wanted):
    """A Render's views (n, 3, s, s) at the cameras `wanted`, from the photos at `places`."""
    first, *more = places
    drawn.start_from(views[first], [(views[i], cameras.c2w[i]) for i in more])
    wanted = replace(wanted, cond_c2w=cameras.c2w[first])
    return torch.cat([*map(pictures.tensor, drawn(wanted, label=""))])


def steadiness(drawn, views, cameras, places, truth):
    """dB by which neighbouring views along a scene's path agree after a warp by true depth, each of
    its own noise and all of one."""
    way = paths.smooth(cameras, VIEWS, False)
    depths = truth(way.c2w, way.fov, depths=True)
    pose = camera.relative_pose(way.c2w[:-1], way.c2w[1:])
    for drawn.same_noise in (False, True):
        seen = drawn_from(drawn, views, cameras, places, way)
        warped = warp(seen[:-1], depths[:-1], pose, way.fov[1:], depths[1:])
        yield agreement(seen[1:], *warped).nanmean()[None]


def several(drawn, config, args):
    """Prints the PSNR of views that start from several photos, and of the nearest of them; errors
    are over scenes, of a capture over its views."""
    rows, counts = {}, args.photos or [1]
    for number in command.progress(range(1 if args.capture else args.scenes), "follow", "scenes"):
        if args.capture:
            album, truth = own.Album(args.capture), None
            views, c2w = [album.photo(i, config.image_size)
                          for i in range(len(album.views))], album.c2w
        else:
            views, c2w, photo = views_of(config, number)
            truth = synth.truth_of(photo, config.data)
        fov = torch.full((len(c2w),), views[0].fov, dtype=torch.float64)
        cameras = paths.Cameras(c2w[0], c2w, fov, views[0].fov)
        chosen, others = chosen_of(views, counts)
        real = torch.cat([pictures.tensor(views[i].picture) for i in others])
        for count, places in chosen.items():
            near = paths.nearness(c2w[places], c2w[others]).argmax(0)
            still = torch.cat([pictures.tensor(views[places[i]].picture) for i in near])
            cells = [psnr(drawn_from(drawn, views, cameras, places, cameras[others]), real),
                     psnr(still, real)]
            cells += steadiness(drawn, views, cameras, places, truth) if truth else []
            for i, cell in enumerate(cells):
                rows.setdefault((count, i), []).extend(cell if args.capture else [cell.mean()])
    print(f"{'photos':6}{'model':>16}{f'over {counts[0]}':>16}{'nearest photo':>16}   steady, own"
          " noises, one noise")
    for count in counts:
        cells = [rows[count, i] for i in range(4) if (count, i) in rows]
        cells.insert(1, [a - b for a, b in zip(cells[0], rows[counts[0], 0])])
        print(f"{count:<6}" + "".join("{:.2f} +- {:.2f}".format(
            *score.mean_and_error(cell, range(len(cell)))).rjust(16) for cell in cells))


def main(args):
    """The command, options parsed. Raises ValueError or OSError with one line."""
    tensors, config = render.open_run(args.run, args.data, args.config, args.init,
                                      needs_data=not args.capture)
    if not args.capture:
        photo = photos.held_out(config, args.scenes - 1)    # before anything is spent on the others
        synth.truth_of(photo, config.data)
    net = render.load(tensors, device_of(args.device), "fp32")[0]
    drawn = render.Render(net, config, {"seed": config.seed})
    if args.photos or args.capture:
        several(drawn, config, args)
        return
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
