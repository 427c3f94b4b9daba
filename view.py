"""A page to walk into a photo: drag the camera, and views come while you drag.

    python view.py                                       the model in out/synth
    python view.py photo.jpg --checkpoint zeronvs.ckpt
    python view.py FOLDER                                a capture with its real cameras

The server is views/server.py, the page views/page.html.
"""

import math
import os
import re
import sys
import webbrowser
from pathlib import Path

from runtime import command
from runtime.command import Parser, numbers_of, words

RUN, CONFIG = "out/synth", "configs/synth.py"       # where the command line names neither
MOST_SCENES, MOST_REAL = 200, 48
SYNTH_NAME = re.compile(r"\w+/(\d{10})")            # of a scene that prepare.py synth rendered


def parser():
    """The command line; every option has a line that a newcomer understands."""
    p = Parser("view.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("photo", nargs="?", metavar="PHOTO", default="",
        help="an image; or a capture: a transforms.json, or a folder with one or with COLMAP's "
             "model; without it, a held-out view of --config's scenes")
    add("--checkpoint", type=words, metavar="PATH",
        help=f"a run's folder (its newest step), or a zero123 or ZeroNVS file ({RUN})")
    add("--models", type=words, metavar="FOLDER", help="whose runs and files the page offers too")
    add("--init", type=words, metavar="FILE",
        help="the file that a run started from, which has the networks that it did not train")
    add("--config", type=words, metavar="FILE",
        help=f"whose held-out scenes are offered ({CONFIG}, where --checkpoint is left out)")
    add("--data", type=words, metavar="FOLDER", help="where its shards lie instead")
    add("--out", type=words, default="out/view", metavar="FOLDER",
        help="where films are written (%(default)s), the only folder that the page can write to")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda, then mps, then cpu")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of the network (auto: bf16 on cuda, else fp32)")
    add("--host", type=words, default="127.0.0.1", metavar="ADDRESS",
        help="of this machine, to be seen from others by it (%(default)s: from this one alone)")
    add("--port", type=numbers_of(int, 0, 65535), default=0, metavar="N", help="(any that is free)")
    add("--no-browser", action="store_true", help="only print the address")
    return p


ARGS = command.parse(parser()) if __name__ == "__main__" else None      # before torch is imported

import functools
import json
from dataclasses import replace

import camera
from captures import own, synth
from runtime.ranks import device_of
from shards import scenes
from views import paths, photos, pictures
from views.render import Render, load, open_run
from views.server import Server
from views.studio import Studio, Subject


def models_of(args):
    """The paths of the models that the page offers, the command line's first."""
    first = Path(args.checkpoint or RUN)
    if not first.exists():
        raise FileNotFoundError(f"no checkpoint {first}: --checkpoint names another, and "
                                f"`python train.py {CONFIG}` makes {RUN}")
    if not args.models:
        return [first]
    found = [path for path in sorted(Path(args.models).iterdir())
             if path.suffix in (".ckpt", ".safetensors") or any(path.glob("step_*"))]
    return [first, *(path for path in found if path.resolve() != first.resolve())]


def names_of(config):
    """The names of the first held-out scenes of a Config."""
    names = []
    for source in config.sources:
        if source.held_out and len(names) < MOST_SCENES:
            reader = scenes.open_source(source, config.data, config.image_size, True)
            names += [f"{source.name} {reader.scene(i).name}" for i in range(len(reader))]
    return names[:MOST_SCENES]


def held_out(config, place, render):
    """The Subject of a held-out scene of a Config, as the model of a Render takes it."""
    photo = photos.held_out(replace(config, mode=render.mode), place)
    scene, unit = photo.reader.scene(photo.number), photo.scene_scale / photo.scale
    views, cameras, truth = photo.others(MOST_REAL)
    here = paths.around(0.0, photo.elevation, 1.0)
    return Subject(photo, f"view {photo.view} of {scene.name}", b"",
                   paths.moved(cameras.c2w, cameras.cond_c2w, here, 1 / unit), scene.fov,
                   truth.__getitem__,
                   renderer(config, scene,
                            lambda c2w: paths.moved(c2w, here, cameras.cond_c2w, unit)))


def renderer(config, scene, in_scene):
    """The function (c2w, fov) -> the true image, of a scene that `prepare.py synth` has rendered
    into the user's folder of data; of others None."""
    note, name = Path(config.data) / "synth.json", SYNTH_NAME.fullmatch(scene.name)
    if not name or not note.is_file():
        return None
    made = json.loads(note.read_text(encoding="utf-8"))
    if made.get("version") != synth.VERSION:
        return None
    solid = synth.scene(made["seed"], int(name[1]))

    def seen(c2w, fov):
        return pictures.image(synth.render(solid, in_scene(c2w), fov, config.image_size)[0][0])
    return seen


def capture(path, size):
    """The Subject of a capture, whose middle view is the photo. Raises ValueError, OSError."""
    album = own.Album(path)
    places = pictures.evenly_spaced(range(len(album.views)), MOST_REAL)
    return Subject(album.photo(album.first, size), str(path), b"", album.c2w[places], album.fov,
                   lambda place, side=size: album.picture(places[place], side))


def serve(args):
    """Loads the model and what is shown first, and answers the page until Ctrl-C."""
    models, device, config, names = models_of(args), device_of(args.device), None, []
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    try:
        own = args.config or ("" if args.checkpoint else CONFIG)
        _, config = open_run(models[0], args.data or "", own, args.init or "", needs_data=False)
        names = names_of(config)
    except (ValueError, OSError) as err:
        if args.config or args.data:
            raise
        command.say(f"no held-out scenes: {err}")
    options = ["--device", device.type, "--precision", precision,
               *(["--init", args.init] if args.init else [])]
    studio = Studio(lambda path: Render(*load(path, device, precision, args.init or "")), models,
                    args.out, options, names, functools.partial(held_out, config))
    path = Path(args.photo)
    if args.photo and (path.is_dir() or path.suffix == ".json"):
        studio.start(capture(path, studio.render.size))
    elif args.photo:
        photos.read(args.photo)         # what is no image is told before the whole of it is read
        studio.photo({"data": path.read_bytes(), "name": path.name})
    elif names:
        studio.start(held_out(config, 0, studio.render))
    server = Server(studio, args.host, args.port)
    command.say(f"open {server.address}\nCtrl-C ends it")
    if not args.no_browser and (os.name == "nt" or sys.platform == "darwin"
                                or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(server.address)
    server.serve_forever()


def run(args):
    """`serve`, which Ctrl-C ends at once: Python would wait for the thread that draws."""
    try:
        serve(args)
    except KeyboardInterrupt:
        command.say("view.py: stopped", sys.stderr)
        sys.stdout.flush()
        os._exit(command.STOPPED)


if __name__ == "__main__":
    command.run("view.py", run, ARGS)
