"""Novel views from one photo, along a camera path.

    python sample.py                                     the model in out/synth, a view it never saw
    python sample.py photo.jpg --checkpoint zeronvs.ckpt --swing --by 20
    python sample.py --capture FOLDER --photos 3,17,25 --path FOLDER/transforms.json
    python sample.py --help

The model's views are made in views/render.py, the samplers are in diffusion.py, camera paths in
views/paths.py, the photo in views/photos.py, what is written in views/pictures.py.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

from runtime import command
from runtime.command import Parser, is_number, numbers_of, words
from views import FOV, MOTIONS, SCALE, STEEPEST, add_model_options

DEFAULT_MOTION, VIEWS, MOST_VIEWS = "swing", 16, 10_000
FAR, MOST_BATCH, TIMESTEPS = 1_000_000, 1024, 1000
# departs: what a published file is sampled by unless told, nearer to its limit than the reference's
# 50 steps of DDIM (docs/speed.md) [test_a_published_file_is_sampled_in_few_steps_unless_told]
PUBLISHED = {"sampler": "dpm++", "steps": 15, "spacing": "logsnr"}
BY = "how far a path goes is told by --by"
UNITS = """One unit of length is the distance from the photo's camera to what it looks at, the
centre of every orbit. --scale says how many units the model takes as one; a smaller one makes every
movement larger. In a --path FILE lengths are in the file's unit, and its first camera is the
photo's. No file or address that a checkpoint names is opened, only what this command line names."""


def interval(text):
    """LOW,HIGH timesteps."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r}: two numbers are needed, LOW,HIGH") from err
    if not 0 <= low <= high <= TIMESTEPS:
        raise argparse.ArgumentTypeError(f"{text!r}: 0 <= LOW <= HIGH <= {TIMESTEPS} is needed")
    return low, high


def places(text):
    """Numbers of photos: 3,17,25."""
    return [numbers_of(int, 0)(part) for part in text.split(",")]


def scale_or_auto(text):
    return text if text == "auto" else numbers_of(float, 1 / FAR, FAR)(text)


def parser():
    """The command line; every option has a line that a newcomer understands."""
    p = Parser("sample.py", BY, description=__doc__.splitlines()[0], epilog=UNITS)
    add = p.add_argument
    add("image", nargs="?", metavar="IMAGE", default="",
        help="the photo; without one, a held-out view of --config's scenes")
    add("--out", type=words, default="out/sample", metavar="FOLDER",
        help="where to write (%(default)s)")
    add_model_options(p)
    add("--compile", action="store_true",
        help="torch.compile it: a minute, kept for later runs; then faster")
    add("--batch", type=numbers_of(int, 1, MOST_BATCH), default=16, metavar="N",
        help="views made together; fewer need less memory (%(default)s)")
    add_path(p)
    add_photo(p)
    add_sampling(p)
    return p


def add_path(p):
    """The options of where the camera goes."""
    group = p.add_argument_group(f"camera path, one of (--{DEFAULT_MOTION})")
    add = group.add_mutually_exclusive_group().add_argument
    for name, (_, line) in MOTIONS.items():
        add(f"--{name}", dest="motion", action="store_const", const=name, help=line)
    add("--grid", action="store_true", help="a sheet of views up to 40 degrees to the sides of the "
        "photo's and 20 above and below it")
    add("--pose", action="append", default=[], metavar="AZIMUTH,ELEVATION,RADIUS",
        help="one view, so many degrees to the right of and above the photo's, at so many times "
             "its distance; may be repeated")
    add("--path", default="", metavar="FILE",
        help="cameras from a file: a JSON list of c2w matrices (OpenGL), nerfstudio's "
             "transforms.json, RealEstate10K text, COLMAP images.txt")
    add = p.add_argument
    add("--by", type=numbers_of(float, -FAR, FAR), metavar="X",
        help="how far the path goes instead, in its degrees, lengths or (zoom) times; the other "
             "way: a negative number, or (zoom) one below 1")
    add("--views", type=numbers_of(int, 1, MOST_VIEWS), default=VIEWS, metavar="N",
        help="views along the path (%(default)s)")


def add_photo(p):
    """The options of what the views start from."""
    add = p.add_argument_group("the photo").add_argument
    add("--capture", type=words, metavar="FOLDER",
        help="instead of IMAGE, photos with cameras: a transforms.json, or a folder with one or "
             "with COLMAP's model; a --path is then one of its world")
    add("--photos", type=places, default=[], metavar="N,N,...",
        help="which of a capture's photos, from 0, the first of them as IMAGE: each view starts "
             "from those nearest to it, mixed by their nearness (the middle one)")
    add("--crop", default="", metavar="LEFT,TOP,SIDE",
        help="the square of it that is used, in pixels (the largest in the middle)")
    add("--object", action="store_true",
        help="centre an object on white or transparent ground, as zero123 expects")
    add("--fov", type=numbers_of(float, 0, 180, above=True), metavar="DEGREES",
        help=f"field of view of the used square ({FOV}; a held-out view's own)")
    add("--elevation", type=numbers_of(float, -STEEPEST, STEEPEST), metavar="DEGREES",
        help="how far above the horizontal its camera stood, looking down at its subject (0; a "
             "held-out view's own)")
    add("--scale", type=scale_or_auto, metavar="S",
        help=f"units that the model takes as one, see below ({SCALE}, or 1 for 3DoF models such as "
             "zero123; from the depth of a held-out view), or auto: from the depth network")
    add("--scale-sweep", action="store_true",
        help="only a sheet, a row for each of several scales, to choose by eye")
    add("--depth-weights", default="", metavar="FILE",
        help="dpt_swin2_tiny_256.pt, for --scale auto, and for held-out depth that has holes")
    add("--scene", type=numbers_of(int, 0), default=0, metavar="N",
        help="which held-out scene, where IMAGE is left out (%(default)s)")


def add_sampling(p):
    """The options of how a view comes out of the noise."""
    add = p.add_argument_group(
        "sampling (the run's own choices; of published models guidance 3 and dpm++ of 15 steps by "
        "logsnr, and with --sampler, --steps, --eta or --spacing ddim, 50, 1)").add_argument
    add("--sampler", choices=("ddim", "reference", "dpm++", "unipc"),
        help="dpm++ and unipc need 10 to 20 steps where ddim needs 50; reference: exactly the "
             "steps of the original code")
    add("--steps", type=numbers_of(int, 1, TIMESTEPS), metavar="N",
        help="evaluations of the network a view")
    add("--guidance", type=numbers_of(float, 0, TIMESTEPS), metavar="G",
        help="how hard the photo and the camera are followed: 1 plain, 3 usual")
    add("--guidance-interval", dest="interval", type=interval, default=(0, TIMESTEPS),
        metavar="LOW,HIGH",
        help="guide only at these timesteps, 0 is clean and 1000 noise (0,1000)")
    add("--eta", type=numbers_of(float, 0, 1), metavar="E",
        help="noise that ddim adds at every step: 0 none, 1 as much as was taken away")
    add("--spacing", choices=("auto", "leading", "trailing", "logsnr"), default="auto",
        help="how the steps lie between noise and image: trailing begins at pure noise, leading "
             "just below, logsnr dwells near the image (trailing)")
    add("--seed", type=numbers_of(int, 0, 2**63 - 1), default=0, metavar="N",
        help="another seed gives other views (%(default)s)")
    add("--same-noise", action=argparse.BooleanOptionalAction, default=True,
        help="all views from the same noise, or each from its own (same)")
    add("--progress", action="store_true",
        help="also a strip that shows how one view comes out of the noise")


ARGS = command.parse(parser()) if __name__ == "__main__" else None      # before torch is imported

import torch

import camera
import diffusion
import engine
from captures import own
from runtime.ranks import device_of
from views import paths, photos
from views.folder import Folder
from views.render import Render, load, open_named


def cameras_of(args, fov, elevation):
    """The paths.Cameras that the command line asks for, and their name. Raises ValueError."""
    if args.path:
        return paths.read(args.path, fov), "path"
    if args.pose:
        return paths.poses(args.pose, fov, elevation), "poses"
    if args.grid:
        return paths.grid(fov, elevation), "grid"
    name = args.motion or DEFAULT_MOTION
    by = MOTIONS[name][0] if args.by is None else args.by
    return paths.motion(name, args.views, by, fov, elevation), name


def photo_of(args, config, album=None):
    """The Photo that the command line asks for, of the own.Album of a capture where there is one.
    Raises ValueError, FileNotFoundError."""
    if album:
        if args.image or args.crop or args.object or args.fov or args.elevation is not None:
            raise ValueError("--capture tells its photos and how they were taken: leave out IMAGE, "
                             "--crop, --object, --fov and --elevation")
        photo = album.photo(album.first, config.image_size)
    elif args.photos:
        raise ValueError("--photos are those of a --capture FOLDER")
    elif args.image:
        if args.motion and not Path(args.image).exists() and is_number(args.image):
            raise ValueError(f"{args.image} is no image: {BY}")
        photo = photos.from_file(args.image, config.image_size, args.crop, args.object)
    else:
        photo = photos.held_out(config, args.scene)
        scene = photo.reader.scene(photo.number).name
        command.say(f"no IMAGE given: view {photo.view} of the held-out scene {scene}")
    if (album or args.image) and camera.MODES[config.mode].unscaled:
        photo.scale = 1.0
    if args.fov is not None:
        photo.fov = math.radians(args.fov)
    if args.elevation is not None:
        photo.elevation = args.elevation
    if args.scale == "auto":
        photo.scale = photos.scale_of(photo.picture, args.depth_weights)
        command.say(f"the scale is {photo.scale:.3g}")
    elif args.scale:
        photo.scale = args.scale
    return photo


def options_of(args, published):
    """What the command line says of sampling, as options of a Render."""
    chosen = {name: getattr(args, name) for name in ("sampler", "steps", "eta", "guidance")
              if getattr(args, name) is not None}
    few = published and args.spacing == "auto" and not chosen.keys() - {"guidance"}
    return {"seed": args.seed, "spacing": args.spacing, "interval": args.interval, **chosen,
            **(PUBLISHED if few else {})}


def draw(args):
    """The command, options parsed. Raises ValueError or OSError with one line."""
    tensors, config = open_named(args, needs_data=not (args.image or args.capture))
    if args.depth_weights:
        config = replace(config, depth_weights=args.depth_weights)
    album = own.Album(args.capture, args.photos) if args.capture else None
    photo = photo_of(args, config, album)
    cameras, name = cameras_of(args, photo.fov, photo.elevation)
    if album and args.path:
        cameras = replace(cameras, cond_c2w=album.c2w[album.first], cond_fov=album.fov,
                          c2w=album.moved(cameras.c2w))
    others = [(album.photo(place, config.image_size, photo.scale), album.c2w[place])
              for place in args.photos[1:]]
    cameras.check_mode(camera.MODES[config.mode], len(others))
    if max(cameras.shares()) > 1 + paths.RIGID:
        command.say("sample.py: some views are wider than the photo: models have learnt of none "
                    "such and may show no more than the photo does", sys.stderr)
    options = options_of(args, published="config" not in tensors.meta)
    diffusion.plan(diffusion.schedule_buffers()["alphas_cumprod"],
                   options.get("sampler", config.sampler),
                   options.get("steps", config.sample_steps), options["spacing"])
    device = device_of(args.device)
    if args.compile:
        engine.check_compiler(device, "leaving --compile out")
    net, _ = load(tensors, device, args.precision)
    out = Folder(args.out, [args.image, args.path], args.scale_sweep)
    render = Render(net, config, options, args.batch, args.same_noise, args.compile,
                    graphs=args.scale_sweep or len(cameras) > args.batch)
    render.start_from(photo, others)
    if args.scale_sweep:
        out.sweep(render, cameras)
    else:
        out.follow(render, cameras, name, args.progress)
        if isinstance(photo, photos.HeldOut):
            out.truth(render)
    command.say(render.report())
    command.say(f"in {out.path}: {', '.join(out.written)}")


def run(args):
    """`draw`, whose errors say what to do and where they were."""
    try:
        draw(args)
    except torch.OutOfMemoryError as err:
        raise ValueError(f"{str(err).splitlines()[0]} --batch {max(args.batch // 2, 1)} needs less"
                         ) from err
    except OSError as err:
        if err.strerror and not err.filename:       # a write that fails does not say where
            raise OSError(err.errno, err.strerror, args.out) from err
        raise


def main(argv):
    command.run("sample.py", run, command.parse(parser(), argv))


if __name__ == "__main__":
    command.run("sample.py", run, ARGS)
