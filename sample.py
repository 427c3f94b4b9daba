"""Novel views from one photo, along a camera path.

    python sample.py                                     the model in out/synth, a view it never saw
    python sample.py photo.jpg --checkpoint zeronvs.ckpt --swing --by 20
    python sample.py --help

The model's views are made in render.py, the samplers are in samplers.py, camera paths in paths.py,
the photo in photos.py, what is written in pictures.py.
"""

import argparse
import math
import re
import sys
import tempfile
from pathlib import Path

import torch

import diffusion
import camera
from runtime import checkpoint
import configs
from views import paths
from views import photos
from views import pictures
from runtime.ranks import device_of
import engine
from runtime.command import Parser, is_number, numbers_of
from views.render import Render, config_of, load
from diffusion import EVERYWHERE, SAMPLERS, SPACINGS, TIMESTEPS, plan
from shards import scenes

VIEWS = 16                              # along a path, unless told
SWEEP = (0.3, 0.5, 0.7, 1.0, 1.4)       # of --scale-sweep
SWEEP_VIEWS, TRUE_VIEWS, PROGRESS_VIEWS = 6, 6, 8
SHEET_COLUMNS = 6
VIEW = re.compile(r"\d{3,}\.png")
OPTIONAL = ("truth.png", "progress.png", "scale-sweep.png", "orbit.mp4")    # not in every run
WRITTEN = ("cond.png", "cameras.json", "path.png", "sheet.png", "orbit.gif", *OPTIONAL)
DEFAULT_MOTION = "swing"        # small turns are what every model does best

UNITS = """One unit of length is the distance from the photo's camera to what it looks at, the
centre of every orbit. --scale says how many units the model takes as one; a smaller one makes every
movement larger. In a --path FILE lengths are in the file's unit, and its first camera is the
photo's."""


# ---- sheets

def true_views(render, photo):
    """A sheet of a HeldOut scene: the photo; true views over the model's, at the true cameras."""
    reader, number, view = photo.reader, photo.number, photo.view
    scene = reader.scene(number)
    others = pictures.evenly_spaced([i for i in range(len(scene.c2w)) if i != view], TRUE_VIEWS)
    fov = torch.full((len(others),), scene.fov, dtype=torch.float64)
    cameras = paths.Cameras(scene.c2w[view], scene.c2w[others], fov, scene.fov)
    views = render(cameras, photo.scene_scale, "true cameras", [])
    truth = [pictures.image(scenes.images(reader.image(number, i))) for i in others]
    empty = pictures.blank(photo.picture)
    return pictures.sheet([
        [("photo", photo.picture), *((f"truth {i}", x) for i, x in zip(others, truth))],
        [("", empty), *((f"model {i}", x) for i, x in zip(others, views))]])


def sweep(render, cameras, photo):
    """A sheet with a row of views for every scale of SWEEP."""
    places = pictures.evenly_spaced(range(len(cameras)), SWEEP_VIEWS)
    rows = []
    for scale in SWEEP:
        views = render(cameras[places], scale, f"scale {scale:g}", [])
        rows.append([(f"scale {scale:g}", photo.picture)]
                    + [(f"view {i}", view) for i, view in zip(places, views)])
    return pictures.sheet(rows)


# ---- the command

def interval(text):
    """LOW,HIGH timesteps."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r}: two numbers are needed, LOW,HIGH") from err
    if not 0 <= low <= high <= TIMESTEPS:
        raise argparse.ArgumentTypeError(f"{text!r}: 0 <= LOW <= HIGH <= {TIMESTEPS} is needed")
    return low, high


def scale_or_auto(text):
    return text if text == "auto" else numbers_of(float, 0, above=True)(text)


def parser():
    """The command line; every option has a line that a newcomer understands."""
    p = Parser("sample.py", allow_abbrev=False, description=__doc__.splitlines()[0], epilog=UNITS)
    p.add_argument("image", nargs="?", metavar="IMAGE", default="",
                   help="the photo; without one, a held-out view of the run's own data")
    p.add_argument("--checkpoint", default="out/synth", metavar="PATH",
                   help="a run's folder (its newest step), or a zero123 or ZeroNVS file "
                        "(%(default)s)")
    p.add_argument("--out", default="out/sample", metavar="FOLDER",
                   help="where to write (%(default)s)")

    path = p.add_argument_group(f"camera path, one of (--{DEFAULT_MOTION})")
    path = path.add_mutually_exclusive_group()
    for name, (_, line) in paths.MOTIONS.items():
        path.add_argument(f"--{name}", dest="motion", action="store_const", const=name, help=line)
    path.add_argument("--grid", action="store_true",
                      help="a sheet of views up to 40 degrees to the sides of the photo's and 20 "
                           "above and below it")
    path.add_argument("--pose", action="append", default=[], metavar="AZIMUTH,ELEVATION,RADIUS",
                      help="one view, so many degrees to the right of and above the photo's, at "
                           "so many times its distance; may be repeated; --pose=-30,0,1 with an "
                           "equals sign where it begins with a minus")
    path.add_argument("--path", default="", metavar="FILE",
                      help="cameras from a file: a JSON list of c2w matrices (OpenGL), "
                           "nerfstudio's transforms.json, RealEstate10K text, COLMAP images.txt")
    p.add_argument("--by", type=numbers_of(float, -math.inf), metavar="X",
                   help="how far the path goes instead, in its degrees, lengths or (zoom) times; "
                        "the other way: a negative number, or (zoom) one below 1")
    p.add_argument("--views", type=numbers_of(int, 1), metavar="N",
                   help=f"views along the path ({VIEWS})")

    photo = p.add_argument_group("the photo")
    photo.add_argument("--crop", default="", metavar="LEFT,TOP,SIDE",
                       help="the square of it that is used, in pixels (the largest in the middle)")
    photo.add_argument("--object", action="store_true",
                       help="centre an object on white or transparent ground, as zero123 expects")
    photo.add_argument("--fov", type=numbers_of(float, 0, 180, above=True), metavar="DEGREES",
                       help=f"field of view of the used square ({photos.FOV}; "
                            "a held-out view's own)")
    photo.add_argument("--elevation", type=numbers_of(float, -paths.STEEPEST, paths.STEEPEST),
                       metavar="DEGREES", help="how far above the horizontal its camera stood, "
                       "looking down at its subject (0; a held-out view's own)")
    photo.add_argument("--scale", type=scale_or_auto, metavar="S",
                       help=f"units that the model takes as one, see below ({photos.SCALE}, or 1 "
                            "for 3DoF models such as zero123; from the depth of a held-out view), "
                            "or auto: from the depth network")
    photo.add_argument("--scale-sweep", action="store_true",
                       help="only a sheet, a row for each of several scales, to choose by eye")
    photo.add_argument("--depth-weights", default="", metavar="FILE",
                       help="dpt_swin2_tiny_256.pt, for --scale auto")
    photo.add_argument("--scene", type=numbers_of(int, 0), metavar="N",
                       help="which held-out scene, where IMAGE is left out (0)")

    how = p.add_argument_group("sampling (the run's own choices, and for published models ddim, 50 "
                               "steps, guidance 3, eta 1)")
    how.add_argument("--sampler", choices=SAMPLERS,
                     help="dpm++ and unipc need 10 to 20 steps where ddim needs 50; reference: "
                          "exactly the steps of the original code")
    how.add_argument("--steps", type=numbers_of(int, 1), metavar="N",
                     help="evaluations of the network a view")
    how.add_argument("--guidance", type=numbers_of(float, 0), metavar="G",
                     help="how hard the photo and the camera are followed: 1 plain, 3 usual")
    how.add_argument("--guidance-interval", type=interval, default=EVERYWHERE, metavar="LOW,HIGH",
                     help="guide only at these timesteps, 0 is clean and 1000 noise (0,1000)")
    how.add_argument("--eta", type=numbers_of(float, 0, 1), metavar="E",
                     help="noise that ddim adds at every step: 0 none, 1 as much as was taken away")
    how.add_argument("--spacing", choices=SPACINGS, default="auto",
                     help="how the steps lie between noise and image: trailing begins at pure "
                          "noise, leading just below, logsnr dwells near the image (trailing)")
    how.add_argument("--seed", type=numbers_of(int, 0), default=0, metavar="N",
                     help="another seed gives other views (%(default)s)")
    how.add_argument("--same-noise", action=argparse.BooleanOptionalAction, default=True,
                     help="all views from the same noise, which is steadier, or each from its own "
                          "(same)")
    how.add_argument("--progress", action="store_true",
                     help="also a strip that shows how one view comes out of the noise")

    machine = p.add_argument_group("machine")
    machine.add_argument("--device", choices=configs.CHOICES["device"], default="auto",
                         help="auto: cuda, then mps, then cpu")
    machine.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"),
                         default="auto", help="of the network (auto: bf16 on cuda, else fp32)")
    machine.add_argument("--compile", action="store_true",
                         help="torch.compile it: a minute, kept for later runs; then faster")
    machine.add_argument("--batch", type=numbers_of(int, 1), default=16, metavar="N",
                         help="views made together; fewer need less memory (%(default)s)")
    return p


def say_ignored(args, sampler, cameras):
    """Says on standard error which of the options that are given nothing looks at."""
    told = args.path and args.fov is not None and cameras.fov.rad2deg().sub(args.fov).abs().min()
    own, these = args.grid or args.pose or args.path, "--grid, --pose and --path tell all cameras"
    for name, given, idle, why in (
            ("--by", args.by is not None, own, these), ("--views", args.views, own, these),
            ("--crop", args.crop, not args.image, "a held-out view is square already"),
            ("--object", args.object, not args.image, "a held-out view is taken as it is"),
            ("--crop", args.crop, args.object, "--object finds the square itself"),
            ("--scene", args.scene is not None, args.image, "the views start from IMAGE"),
            ("--depth-weights", args.depth_weights, args.scale != "auto", "--scale auto reads it"),
            ("--elevation", args.elevation is not None, args.path, these),
            ("--fov", args.fov is not None, told and told > 1e-6, "those of --path have their own"),
            ("--scale", args.scale, args.scale_sweep, "--scale-sweep tries several"),
            ("--progress", args.progress, args.scale_sweep, "--scale-sweep makes one sheet alone"),
            ("--eta", args.eta is not None, sampler in ("dpm++", "unipc"), "it is for ddim")):
        if given and idle:
            print(f"sample.py: {name} has no effect here: {why}", file=sys.stderr)
    if max(cameras.shares()) > 1 + paths.RIGID:
        print("sample.py: some views are wider than the photo: models have learnt of none such and "
              "may show no more than the photo does", file=sys.stderr)


def cameras_of(args, fov, elevation):
    """The paths.Cameras that the command line asks for. Raises ValueError."""
    if args.path:
        return paths.read(args.path, fov)
    if args.pose:
        return paths.poses(args.pose, fov, elevation)
    if args.grid:
        return paths.grid(fov, elevation)
    name = args.motion or DEFAULT_MOTION
    by = paths.MOTIONS[name][0] if args.by is None else args.by
    return paths.motion(name, args.views or VIEWS, by, fov, elevation)


def photo_of(args, config):
    """The Photo that the command line asks for. Raises ValueError, FileNotFoundError."""
    if args.image:
        if args.motion and not Path(args.image).exists() and is_number(args.image):
            raise ValueError(f"{args.image} is no image: how far a path goes is told by --by")
        photo = photos.from_file(args.image, config.image_size, args.crop, args.object)
        if camera.MODES[config.mode].unscaled:
            photo.scale = 1.0
    else:
        photo = photos.held_out(config, args.scene or 0)
        scene = photo.reader.scene(photo.number).name
        print(f"no IMAGE given: view {photo.view} of the held-out scene {scene}")
    if args.fov is not None:
        photo.fov = math.radians(args.fov)
    if args.elevation is not None:
        photo.elevation = args.elevation
    if args.scale == "auto":
        photo.scale = photos.scale_of(photo.picture, args.depth_weights)
        print(f"the scale is {photo.scale:.3g}")
    elif args.scale:
        photo.scale = args.scale
    return photo


def sampling_of(args, config):
    """The options of `novel_views`: the command line's, else the run's. Raises ValueError."""
    def chosen(name, default):
        return default if getattr(args, name) is None else getattr(args, name)

    options = {"seed": args.seed, "spacing": args.spacing, "interval": args.guidance_interval,
               "sampler": chosen("sampler", config.sampler), "eta": chosen("eta", config.eta),
               "steps": chosen("steps", config.sample_steps),
               "guidance": chosen("guidance", config.guidance)}
    plan(diffusion.schedule_buffers()["alphas_cumprod"], options["sampler"], options["steps"],
         options["spacing"])
    return options


def folder_for(args):
    """The output folder, made and tried. Raises ValueError where something cannot be written, or
    would be over what the views are made from."""
    out = Path(args.out)
    for given in filter(None, (args.image, args.path)):
        path = Path(given).resolve()
        if (path.parent == out.resolve() and path.name in WRITTEN
                or path.parent == (out / "views").resolve() and VIEW.fullmatch(path.name)):
            raise ValueError(f"{given} would be written over: --out names another folder")
    try:
        (out if args.scale_sweep else out / "views").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as err:
        raise ValueError(f"--out {out} cannot be written: {err.strerror}") from err
    for name in WRITTEN:
        if (out / name).is_dir():
            raise ValueError(f"--out {out} cannot be written: {name} in it is a folder")
    return out


def write(out, photo, cameras, views, labels, columns):
    """Writes a path's views, sheet, animation, cameras and map. Returns the names of the files."""
    # what an earlier run left would look like a part of this one
    for old in [*(out / name for name in OPTIONAL), *(out / "views").iterdir()]:
        if old.parent == out or VIEW.fullmatch(old.name):
            old.unlink(missing_ok=True)
    files = [f"views/{i:03d}.png" for i in range(len(views))]
    for file, view in zip(files, views):
        view.save(out / file)
    photo.picture.save(out / "cond.png")
    paths.write(out / "cameras.json", cameras, photo.picture.width, files, "cond.png")
    pictures.path_picture(cameras).save(out / "path.png")
    labelled = list(zip(labels, views))
    rows = [labelled[i:i + columns] for i in range(0, len(labelled), columns)]
    pictures.sheet([[("photo", photo.picture)], *rows]).save(out / "sheet.png")
    films = pictures.animate(views, cameras.closed, out / "orbit")
    return ["sheet.png", *films, "views/", "path.png", "cameras.json", "cond.png"]


def run(args):
    """The command, options parsed. Raises ValueError or OSError with one line."""
    if not Path(args.checkpoint).exists():
        raise FileNotFoundError(f"no checkpoint {args.checkpoint}: --checkpoint names another, and "
                                "`python train.py configs/synth.py` makes out/synth")
    tensors = checkpoint.read(args.checkpoint)
    config = config_of(tensors)
    photo = photo_of(args, config)
    cameras = cameras_of(args, photo.fov, photo.elevation)
    if camera.MODES[config.mode].pose == "angles" and not cameras.centred():
        raise ValueError("a 3DoF model knows of azimuth, elevation and distance alone: its cameras "
                         "look at the centre with one field of view, as those of --orbit, --swing, "
                         "--spiral, --dolly, --grid and --pose do")
    options = sampling_of(args, config)
    say_ignored(args, options["sampler"], cameras)
    device = device_of(args.device)
    if args.compile:
        engine.check_compiler(device, "leaving --compile out")
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    net, out = load(tensors, device, precision)[0], folder_for(args)
    render = Render(net, config.mode, photo, options, args.batch, args.same_noise, args.compile)
    if args.scale_sweep:
        sweep(render, cameras, photo).save(out / "scale-sweep.png")
        written = ["scale-sweep.png"]
    else:
        promised = []
        views = render(cameras, photo.scale, "views", promised)
        columns, labels = SHEET_COLUMNS, [f"view {i}" for i in range(len(views))]
        if args.grid:
            columns = len(paths.GRID_AZIMUTHS)
            labels = [f"{azimuth:+g}, {rise:+g}" for rise in paths.GRID_ELEVATIONS
                      for azimuth in paths.GRID_AZIMUTHS]
        written = write(out, photo, cameras, views, labels, columns)
        if args.progress:
            strip = [(f"t {t:.0f}", pictures.image(net.decode(z_0)[0]))
                     for t, z_0 in pictures.evenly_spaced(promised, PROGRESS_VIEWS)]
            pictures.sheet([strip]).save(out / "progress.png")
            written.append("progress.png")
        if isinstance(photo, photos.HeldOut):
            true_views(render, photo).save(out / "truth.png")
            written.append("truth.png")
    print(render.report())
    print(f"in {out}: {', '.join(written)}")


def main(argv):
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        parser().error(f"unrecognized arguments: {' '.join(unknown)}" + any(
            map(is_number, unknown)) * "; how far a path goes is told by --by")
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as err:
        reason = err
        if isinstance(err, torch.OutOfMemoryError):
            reason = f"{str(err).splitlines()[0]} --batch {max(args.batch // 2, 1)} needs less"
        elif getattr(err, "strerror", None):        # a write that fails does not say where
            reason = f"{err.filename or args.out}: {err.strerror}"
        print(f"sample.py: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
