"""Novel views from one photo, along a camera path.

    python sample.py                                     the model in out/synth, a view it never saw
    python sample.py photo.jpg --checkpoint zeronvs.ckpt --swing --by 20
    python sample.py --capture FOLDER --photos 3,17,25 --path FOLDER/transforms.json
    python sample.py --help

Its options are in views/__init__.py, camera paths in views/paths.py, the photo in views/photos.py,
the model's views in views/render.py, the samplers in diffusion.py, its files in views/folder.py.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

from runtime import command
from runtime.command import Parser, numbers_of, words
from views import add_model_options, add_path_options, add_photo_options, add_sampling_options

# departs: what a published file is sampled by unless told, nearer to its limit than the reference's
# 50 steps of DDIM (docs/speed.md) [test_a_published_file_is_sampled_in_few_steps_unless_told]
PUBLISHED = {"sampler": "dpm++", "steps": 15, "spacing": "logsnr"}
MOST_BATCH = 1024
BY = "how far a path goes is told by --by"
UNITS = """One unit of length is the distance from the photo's camera to what it looks at, the
centre of every orbit. --scale says how many units the model takes as one; a smaller one makes every
movement larger. In a --path FILE lengths are in the file's unit, and its first camera is the
photo's. No file or address that a checkpoint names is opened, only what this command line names."""


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
    add_path_options(p)
    add_photo_options(p)
    add_sampling_options(p)
    return p


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
        if args.motion and not Path(args.image).exists() and command.is_number(args.image):
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
    cameras, name = paths.asked_for(args, photo.fov, photo.elevation)
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
