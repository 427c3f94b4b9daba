"""What answers the page of view.py: a model, a photo, and the one thread that draws.

    Studio(load, models, out).start(Subject(photo, "photo.jpg"))

server.py hands a request, a dict, to the method of its name.
"""

import copy
import io
import json
import secrets
import shlex
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import camera
import diffusion
from runtime.files import write_text
from views import MOTIONS, STEEPEST, paths, photos, pictures
from views.cameras import matrix
from views.folder import Folder
from views.render import Stopped

OPTIONS = {"steps": (1, 1000, int), "guidance": (0, 100), "eta": (0, 1), "seed": (0, 2**53, int),
           "scale": (1e-3, 1e3)}
OF_PHOTO = {"fov": (0.02, 3.0), "elevation": (-STEEPEST, STEEPEST)}     # radians; degrees
SHOWN_SIDE = 768                # pixels a side of the photo that the page shows
PRESETS = {**MOTIONS, "grid": (0.0, "to the sides, from above and from below")}
PRESET_KEYS = {"orbit": 8, "swing": 8, "spiral": 16, "pan": 4, "tilt": 4}       # others have 2
OF_3DOF = ("orbit", "swing", "spiral", "dolly", "grid")


class Subject(NamedTuple):
    """A photo, and what is known of what it shows. Cameras are those of views/paths.py's world."""
    photo: photos.Photo
    name: str
    data: bytes = b""               # the whole photo's file, which can be cropped again
    c2w: torch.Tensor = torch.zeros(0, 4, 4)        # real cameras
    real: Callable | None = None    # number of a real camera -> its true image
    truth: Callable | None = None   # (c2w (n, 4, 4), fov (n,)) of any cameras -> (n, 3, s, s)


def line_of(error):
    """What is said of an error: one line for what went wrong with the user's input, machine or
    disk; anything else is a fault of the program, whose traceback the terminal has."""
    if not isinstance(error, (ValueError, OSError, torch.OutOfMemoryError, Stopped)):
        traceback.print_exception(error)
        return f"this is a fault of the program, the terminal has the rest: {error!r}"
    return str(error).splitlines()[0]


def number(asked, name, low, high, kind=float):
    """The number `name` of a request. Raises ValueError unless it lies in [low, high]."""
    value = asked.get(name)
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:40]}, not a number from {low:,} to {high:,}")
    return kind(value)


def png(picture, **headers):
    """(bytes, type, headers) of an image."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue(), "image/png", headers


def listed(cameras):
    """A paths.Cameras as the page has it."""
    pairs = zip(cameras.c2w.tolist(), cameras.fov.tolist())
    return {"keys": [{"c2w": c2w, "fov": fov} for c2w, fov in pairs], "closed": cameras.closed}


class Studio:
    """The model, the Subject and the thread that draws; server.REQUESTS are what the page may ask.

    load    path of a model -> its Render; models: these paths, of which the first is loaded
    words   of sample.py's command line, that say the same of every model as `load` does
    scenes  names of held-out scenes; `open_scene` (number, Render) -> Subject
    """
    def __init__(self, load, models, out, words=(), scenes=(), open_scene=None):
        self.load, self.models, self.out, self.words = load, models, Path(out), words
        self.scenes, self.open_scene = scenes, open_scene
        self.session, self.subject, self.last = "", None, None      # `last`: the newest film
        self.newest = SimpleNamespace()         # the Render of the view that was asked for last
        self.thread = ThreadPoolExecutor(1)
        self.submit(self.take_model, 0).result()

    def submit(self, work, *arguments):
        """The Future of work(*arguments) in the one thread that draws."""
        if self.last and not self.last.future.done():
            raise ValueError("a film is being drawn: stop it, or wait for its end")
        return self.thread.submit(work, *arguments)

    def take_model(self, place):
        self.render, self.place = self.load(self.models[place]), place
        self.mode = camera.MODES[self.render.mode]
        self.motions = {name: PRESETS[name] for name in
                        (OF_3DOF if self.mode.pose == "angles" else PRESETS)}

    def start(self, subject):
        """Makes a Subject what is shown. Returns the state."""
        photo = replace(subject.photo, size=self.render.size)
        self.submit(self.render.start_from, photo).result()
        self.subject = subject._replace(photo=photo)
        return self.state()

    def state(self):
        """All that the page shows of the model, the photo and the choices that there are."""
        subject = self.subject
        shown = subject and {
            "name": subject.name, "c2w": subject.photo.camera().tolist(), "fov": subject.photo.fov,
            "scale": subject.photo.scale, "elevation": subject.photo.elevation,
            "real": subject.c2w.tolist(), "truth": bool(subject.truth), "whole": bool(subject.data)}
        return {"session": self.session, "models": [str(path) for path in self.models],
                "model": self.place, "angles": self.mode.pose == "angles", "photo": shown,
                "options": self.render.options, "samplers": diffusion.SAMPLERS,
                "scenes": self.scenes, "motions": self.motions}

    def open(self, asked):
        """Begins a session; the page of an earlier one is answered no more."""
        self.session = secrets.token_hex(8)
        return self.state()

    def photo(self, asked):
        """A photo's bytes `data`; crop and object as of sample.py; fov in radians, elevation."""
        photo = photos.from_file(asked["data"], self.render.size, asked.get("crop", ""),
                                 asked.get("object") == "true")
        for name in OF_PHOTO & asked.keys():
            setattr(photo, name, number({name: float(asked[name])}, name, *OF_PHOTO[name]))
        photo.scale = 1.0 if self.mode.unscaled else photo.scale
        return self.start(Subject(photo, asked.get("name", "")[:80], asked["data"]))

    def choose(self, asked):
        """Another model for the same photo, or another held-out scene."""
        if "model" in asked:
            self.submit(self.take_model, asked["model"]).result()
        subject = self.open_scene(asked["scene"], self.render) if "scene" in asked else self.subject
        return self.start(subject) if subject else self.state()

    def picture(self, asked):
        """The `whole` photo's file, a `file` of the newest film, the photo of a `real` camera, the
        truth at the camera `c2w`, or the square photo."""
        subject, name = self.subject, asked.get("file")
        if asked.get("whole"):
            return subject.data, "application/octet-stream", {}
        if name:
            if not self.last or name not in self.last.out.written:
                raise ValueError("the film has no such file")
            path = self.last.out.path / name
            kind = "video/mp4" if path.suffix == ".mp4" else "application/octet-stream"
            return path.read_bytes(), kind, {}
        if "real" in asked:
            return png(subject.real(asked["real"]))
        if "c2w" in asked and subject.truth:
            cameras = self.cameras([asked])
            return png(pictures.image(subject.truth(cameras.c2w, cameras.fov)[0]))
        square = subject.photo.square
        return png(photos.reduce(square, min(square.width, SHOWN_SIDE)))

    def cameras(self, asked):
        """The paths.Cameras of a list of {c2w, fov in radians}. Raises ValueError."""
        c2w = torch.stack([matrix(each["c2w"], "a camera") for each in asked])
        c2w[:, :3, :3] = paths.nearest_rotation(c2w[:, :3, :3])     # rounding has its way in pages
        fov = torch.tensor([number(each, "fov", *OF_PHOTO["fov"]) for each in asked]).double()
        photo = self.subject.photo
        return paths.Cameras(photo.camera(), c2w, fov, photo.fov).check_mode(self.mode)

    def smooth(self, asked):
        """The Cameras of the smooth path through the key frames of a request."""
        return paths.smooth(self.cameras(asked["keys"]), number(asked, "views", 1, 1000, int),
                            bool(asked.get("closed")))

    def own_render(self, asked):
        """The Render as a request wants it. Raises ValueError."""
        own = copy.copy(self.render)
        own.options = {name: number(asked, name, *bounds) for name, bounds in OPTIONS.items()}
        own.photo = replace(own.photo, scale=own.options.pop("scale"))
        own.options["sampler"], own.same_noise = asked["sampler"], asked.get("same_noise", True)
        own.views, own.seconds = 0, 0.0
        return own

    def view(self, asked):
        """A view, and in a header what it cost. The newest wins, and none queue up."""
        cameras, own = self.cameras([asked]), self.own_render(asked)
        self.newest.stopped, self.newest = True, own
        image = self.submit(next, own(cameras, label="")).result()
        cost = {"seconds": own.seconds, "memory": own.memory(), "device": str(own.net.betas.device)}
        return png(image, **{"X-Cost": json.dumps(cost)})

    def path(self, asked):
        """The cameras of `smooth`; or the key frames of a `motion` of sample.py."""
        name, photo = asked.get("motion"), self.subject.photo
        if name == "grid":
            return listed(paths.grid(photo.fov, photo.elevation))
        return listed(paths.motion(name, PRESET_KEYS.get(name, 2), number(asked, "by", -1e3, 1e3),
                                   photo.fov, photo.elevation) if name else self.smooth(asked))

    def film(self, asked):
        """Begins to draw a film, which `progress` follows, into a new folder. Its first view is
        the photo's camera, as in sample.py's --path."""
        cameras, own = self.smooth(asked), self.own_render(asked)
        out = Folder(next(path for i in count(1)
                          if not (path := self.out / f"film-{i:03d}").exists()))
        photo, path, rest = out.path / "photo.png", out.path / "path.json", cameras.after_photo()
        own.photo.square.save(photo)
        paths.write(path, rest, own.photo.square.width,
                    [f"views/{i + 1:03d}.png" for i in range(len(rest))], photo.name)
        # what is drawn is what the file says, to the last digit
        cameras = replace(paths.read(path, cameras.cond_fov), closed=cameras.closed)
        words = ["python", "sample.py", photo, "--path", path, "--checkpoint",
                 self.models[self.place], *self.words, "--scale", own.photo.scale,
                 "--same-noise" if own.same_noise else "--no-same-noise"]
        words += [word for name, value in own.options.items() for word in (f"--{name}", value)]
        command = shlex.join(map(str, words))
        write_text(out.path / "command.txt", command + "\n")
        self.last = SimpleNamespace(own=own, out=out, command=command, total=len(cameras),
                                    future=self.submit(out.follow, own, cameras, "path", False))
        return self.progress(asked)

    def progress(self, asked):
        """How far the newest film is; with `stop` it ends at its next step."""
        film = self.last
        film.own.stopped |= asked.get("stop", False)
        error = film.future.exception() if film.future.done() else None
        return {"done": film.own.views, "total": film.total, "ended": film.future.done(),
                "folder": str(film.out.path), "files": film.out.written, "command": film.command,
                "error": error and line_of(error)}
