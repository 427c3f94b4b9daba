"""A page to walk into a photo: drag the camera, and views come while you drag.

    python view.py                                       the model in out/synth
    python view.py photo.jpg --checkpoint zeronvs.ckpt
    python view.py FOLDER                                a capture with its real cameras
"""

import os
import sys
import webbrowser
from pathlib import Path

from runtime import command
from runtime.command import Parser, numbers_of, words
from views import add_model_options


def parser():
    """The command line; every option has a line that a newcomer understands."""
    p = Parser("view.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("photo", nargs="?", metavar="PHOTO", default="",
        help="an image; or a capture: a transforms.json, or a folder with one or with COLMAP's "
             "model; without it, a held-out view of --config's scenes")
    add("--models", type=words, metavar="FOLDER", help="whose runs and files the page offers too")
    add("--out", type=words, default="out/view", metavar="FOLDER",
        help="where films are written (%(default)s), the only folder that the page can write to")
    add("--host", type=words, default="127.0.0.1", metavar="ADDRESS",
        help="of this machine, to be seen from others by it (%(default)s: from this one alone)")
    add("--port", type=numbers_of(int, 0, 65535), default=0, metavar="N", help="(any that is free)")
    add("--no-browser", action="store_true", help="only print the address")
    add_model_options(p)
    return p


ARGS = command.parse(parser()) if __name__ == "__main__" else None      # before torch is imported

import functools
from contextlib import suppress
from dataclasses import replace

from captures import own, synth
from runtime.ranks import device_of
from views import paths, photos, pictures
from views.render import Render, load, open_named
from views.server import Server
from views.studio import Studio, Subject

MOST_SCENES, MOST_REAL = 200, 48        # that the page offers, or shows in its map


def models_of(args):
    """The paths of the models that the page offers, the command line's first."""
    found = sorted(Path(args.models).iterdir()) if args.models else []
    found = [path for path in found if path.suffix in (".ckpt", ".safetensors")
             or any(path.glob("step_*"))]
    return list(dict.fromkeys([Path(args.checkpoint), *found]))


def held_out(config, place, render):
    """The Subject of a held-out scene of a Config, as the model of a Render takes it."""
    photo = photos.held_out(replace(config, mode=render.mode), place)
    _, cameras, images = photo.others(MOST_REAL)
    truth = None
    with suppress(ValueError, OSError):     # not rendered here: its views are all that is known
        truth = synth.truth_of(photo, config.data)
    return Subject(photo, f"view {photo.view} of {photo.reader.scene(photo.number).name}", b"",
                   paths.moved(cameras.c2w, cameras.cond_c2w, photo.camera(),
                               photo.scale / photo.scene_scale), images.__getitem__, truth)


def capture(path, size):
    """The Subject of a capture, whose middle view is the photo. Raises ValueError, OSError."""
    album = own.Album(path)
    places = pictures.evenly_spaced(range(len(album.views)), MOST_REAL)
    return Subject(album.photo(album.first, size), str(path), b"", album.c2w[places],
                   lambda place: album.picture(places[place], size))


def serve(args):
    """Loads the model and what is shown first, and answers the page until Ctrl-C."""
    config, device = open_named(args, needs_data=False)[1], device_of(args.device)
    there = args.config or args.data or Path(config.data).is_dir()
    names = [reader.scene(i).name for reader in (photos.held_out_sources(config) if there else [])
             for i in range(min(len(reader), MOST_SCENES))]
    studio = Studio(lambda path: Render(*load(path, device, args.precision, args.init)),
                    models_of(args), args.out,
                    ["--device", device.type, "--precision", args.precision]
                    + ["--init", args.init] * bool(args.init),
                    names[:MOST_SCENES], functools.partial(held_out, config))
    path = Path(args.photo)
    if args.photo and (path.is_dir() or path.suffix == ".json"):
        studio.start(capture(path, studio.render.size))
    elif args.photo:
        photos.read(path)               # what is no image is told before the whole of it is read
        studio.photo({"data": path.read_bytes(), "name": path.name})
    elif names:
        studio.choose({"scene": 0})
    server = Server(studio, args.host, args.port)
    command.say(f"open {server.address}\nCtrl-C ends it")
    # without a screen, Python would open the page in the terminal
    if not args.no_browser and (sys.platform in ("win32", "darwin")
                                or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(server.address)
    server.serve_forever()


if __name__ == "__main__":
    command.run("view.py", serve, ARGS)
