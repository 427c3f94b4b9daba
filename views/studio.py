"""What answers the page of view.py: a model, a photo, and the one thread that draws.

    studio = Studio(load, models, out)          # load: path of a model -> views.render.Render
    studio.start(Subject(photo, "photo.jpg"))

The page's world is that of views/paths.py. server.py hands a request to the method of its name.
"""

import io
import json
import secrets
import shlex
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch

import camera
import diffusion
from runtime.files import write_text
from views import MOTIONS, STEEPEST, paths, photos
from views.cameras import matrix
from views.folder import Folder

MOST_KEYS, MOST_VIEWS, FOVS = 200, 1000, (0.02, 3.0)
OPTIONS = {"steps": (1, 1000, int), "guidance": (0, 100), "eta": (0, 1), "seed": (0, 2**53, int)}
SHOWN_SIDE = 768                # pixels a side of the photo that the page shows
PRESET_KEYS = {"orbit": 8, "swing": 8, "spiral": 16, "pan": 4, "tilt": 4}       # others have 2
GRID = (0.0, "a sheet of views to the sides of the photo's, above and below it")
PLAYED = {".gif": "image/gif", ".mp4": "video/mp4"}
OF_3DOF = ("orbit", "swing", "spiral", "dolly", "grid")


class Stopped(Exception):
    """Work that newer work has replaced, or that the user has stopped."""


def line_of(error):
    """What is said of an error: one line for what went wrong with the user's input, machine or
    disk; anything else is a fault of the program, whose traceback the terminal has."""
    if isinstance(error, Stopped):
        return "stopped"
    if not isinstance(error, (ValueError, OSError, torch.OutOfMemoryError)):
        traceback.print_exception(error)
        return f"this is a fault of the program, the terminal has the rest: {error!r}"
    return str(error).splitlines()[0]


def number(asked, name, low, high, kind=float):
    """The number `name` of a request. Raises ValueError unless it lies in [low, high]."""
    value = asked.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:40]}, it must be a number from {low:,} to "
                         f"{high:,}")
    return kind(value)


def listed(cameras):
    return [{"c2w": pose, "fov": angle}
            for pose, angle in zip(cameras.c2w.tolist(), cameras.fov.tolist())]


def png(picture):
    """(bytes, type) of an image."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue(), "image/png"


# ---- the model, the photo, and the thread that draws

@dataclass
class Subject:
    """A photo, and what is known of what it shows. Cameras are those of the page's world."""
    photo: photos.Photo
    name: str
    data: bytes = b""               # the whole photo's file, which can be cropped again
    c2w: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 4, 4, dtype=torch.float64))
    fov: float = 1.0                # radians, of the real cameras c2w (n, 4, 4)
    real: Callable | None = None    # number of a real camera -> its true image
    seen: Callable | None = None    # (c2w (1, 4, 4), fov) of any camera -> its true image


class Film:
    """A film that is drawn, or was. It takes the place of its Render in a Folder's `follow`."""
    def __init__(self, render, scale, options, folder, command, total):
        self.render, self.scale, self.options, self.photo = render, scale, options, render.photo
        self.folder, self.command, self.total, self.done, self.files = folder, command, total, 0, []
        self.stopped, self.future = False, None

    def watch(self, *step):
        if self.stopped:
            raise Stopped

    def __call__(self, cameras, watch):
        for view in self.render(cameras, self.scale, "", self.watch, **self.options):
            self.done += 1
            yield view


class Studio:
    """The model, the Subject and the thread that draws; REQUESTS are what the page may ask of it.

    load    path of a model -> its Render; models: these paths, of which the first is loaded
    words   of sample.py's command line, that say the same of every model as `load` does
    scenes  names of held-out scenes; `open_scene` (number, Render) -> Subject
    """
    def __init__(self, load, models, out, words=(), scenes=(), open_scene=None):
        self.load, self.models, self.out, self.words = load, models, Path(out), words
        self.scenes, self.open_scene = scenes, open_scene
        self.session, self.subject, self.last = "", None, None      # `last`: the newest Film
        self.newest = None              # of the views that were asked for
        self.thread = ThreadPoolExecutor(1)
        self.draw(self.take_model, 0)

    def draw(self, work, *arguments):
        """What work(*arguments) returns or raises in the one thread that draws."""
        self.check_idle()
        return self.thread.submit(work, *arguments).result()

    def check_idle(self):
        if self.last and not self.last.future.done():
            raise ValueError("a film is being drawn: stop it, or wait for its end")

    def take_model(self, place):
        self.render, self.place = self.load(self.models[place]), place
        self.mode = camera.MODES[self.render.mode]

    def start(self, subject):
        """Makes a Subject what is shown. Returns the state."""
        photo = replace(subject.photo, size=self.render.size)
        self.draw(self.render.start_from, photo)
        self.subject = replace(subject, photo=photo)
        return self.state()

    def state(self):
        """All that the page shows of the model, the photo and the choices that there are."""
        options, subject = self.render.options, self.subject
        state = {"session": self.session, "models": [str(each) for each in self.models],
                 "model": self.place, "angles": self.mode.pose == "angles", "photo": None,
                 "options": {name: options[name] for name in ("sampler", "steps", "guidance")},
                 "samplers": diffusion.SAMPLERS, "scenes": self.scenes, "motions": self.motions()}
        if subject:
            photo = subject.photo
            state["photo"] = {
                "name": subject.name, "fov": photo.fov, "elevation": photo.elevation,
                "scale": photo.scale, "c2w": paths.around(0.0, photo.elevation, 1.0).tolist(),
                "real": subject.c2w.tolist(), "real_fov": subject.fov,
                "truth": subject.seen is not None, "whole": bool(subject.data)}
        return state

    def motions(self):
        """{name: (how far it goes, a line)} of the paths of sample.py that the model can follow."""
        return {name: about for name, about in {**MOTIONS, "grid": GRID}.items()
                if self.mode.pose != "angles" or name in OF_3DOF}

    # ---- requests: what is shown

    def open(self, asked):
        """Begins a session; the page of an earlier one is answered no more."""
        self.session = secrets.token_hex(8)
        return self.state()

    def photo(self, asked):
        """A photo's bytes `data`; crop and object as of sample.py; fov in radians, elevation."""
        photo = photos.from_file(asked["data"], self.render.size, asked.get("crop", ""),
                                 asked.get("object") == "true")
        own = {name: float(asked.get(name, getattr(photo, name))) for name in ("fov", "elevation")}
        photo.fov = number(own, "fov", *FOVS)
        photo.elevation = number(own, "elevation", -STEEPEST, STEEPEST)
        photo.scale = 1.0 if self.mode.unscaled else photo.scale
        return self.start(Subject(photo, asked.get("name", "")[:80], asked["data"]))

    def scene(self, asked):
        """A held-out scene's view."""
        place = number(asked, "scene", 0, len(self.scenes) - 1, int)
        return self.start(self.open_scene(place, self.render))

    def model(self, asked):
        """Another model for the same photo."""
        self.draw(self.take_model, number(asked, "model", 0, len(self.models) - 1, int))
        return self.start(self.subject) if self.subject else self.state()

    def picture(self, asked):
        """The square photo, or with `whole` the whole photo's file."""
        if asked.get("whole"):
            return self.subject.data, "application/octet-stream"
        square = self.subject.photo.square.copy()
        square.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return png(square)

    def truth(self, asked):
        """The true image of a real camera, or at any camera."""
        if "real" in asked:
            place = number(asked, "real", 0, len(self.subject.c2w) - 1, int)
            return png(self.subject.real(place))
        cameras = self.cameras([asked])
        if not self.subject.seen:
            raise ValueError("nothing is known of this photo but itself")
        return png(self.subject.seen(cameras.c2w, cameras.fov[0].item()))

    # ---- requests: views and paths

    def cameras(self, asked):
        """The paths.Cameras of a list of {c2w, fov in radians}. Raises ValueError."""
        if not (isinstance(asked, list) and 1 <= len(asked) <= MOST_KEYS
                and all(isinstance(each, dict) for each in asked)):
            raise ValueError(f"from 1 to {MOST_KEYS} cameras can be asked for")
        c2w = torch.stack([matrix(each.get("c2w"), "a camera") for each in asked])
        if not c2w.isfinite().all():
            raise ValueError("a camera holds numbers that are not finite")
        fov = torch.tensor([number(each, "fov", *FOVS) for each in asked], dtype=torch.float64)
        c2w[:, :3, :3] = paths.nearest_rotation(c2w[:, :3, :3])      # rounding has its way in pages
        photo = self.subject.photo
        cameras = paths.Cameras(paths.around(0.0, photo.elevation, 1.0), c2w, fov, photo.fov)
        if self.mode.pose == "angles" and not cameras.centred():
            raise ValueError("a 3DoF model knows of azimuth, elevation and distance alone: its "
                             "cameras look at the centre with the photo's field of view")
        return cameras

    def smooth(self, asked):
        """The Cameras of the smooth path through the key frames of a request."""
        keys, views = self.cameras(asked.get("keys")), number(asked, "views", 1, MOST_VIEWS, int)
        c2w, fov = paths.smooth(keys.c2w, keys.fov, views, bool(asked.get("closed")))
        return replace(keys, c2w=c2w, fov=fov, closed=bool(asked.get("closed")))

    def chosen(self, asked):
        """(scale, options of a Render) of a request. Raises ValueError."""
        options = {name: number(asked, name, *bounds) for name, bounds in OPTIONS.items()}
        options["sampler"] = str(asked.get("sampler"))
        diffusion.plan(diffusion.schedule_buffers()["alphas_cumprod"], options["sampler"],
                       options["steps"])
        return number(asked, "scale", 1e-3, 1e3), options

    def view(self, asked):
        """A view, and in a header what it cost. The newest wins, and none queue up."""
        cameras, (scale, options) = self.cameras([asked]), self.chosen(asked)
        self.newest = mine = object()

        def watch(*step):
            if self.newest is not mine:
                raise Stopped

        def draw():
            watch()
            started = time.perf_counter()
            [image] = self.render(cameras, scale, "", watch, **options)
            return image, time.perf_counter() - started

        image, seconds = self.draw(draw)
        cost = {"seconds": seconds, "steps": options["steps"], "memory": self.render.memory(),
                "device": str(self.render.net.betas.device)}
        return *png(image), {"X-Cost": json.dumps(cost)}

    def preset(self, asked):
        """The key frames of a path of sample.py, and whether it is closed."""
        photo, name = self.subject.photo, str(asked.get("motion"))
        if name not in self.motions():
            raise ValueError(f"a path is one of {', '.join(self.motions())}")
        if name == "grid":
            cameras = paths.grid(photo.fov, photo.elevation)
        else:
            cameras = paths.motion(name, PRESET_KEYS.get(name, 2), number(asked, "by", -1e3, 1e3),
                                   photo.fov, photo.elevation)
        return {"keys": listed(cameras), "closed": cameras.closed}

    def path(self, asked):
        """The cameras of `smooth`."""
        return {"cameras": listed(self.smooth(asked))}

    # ---- requests: a film

    def film(self, asked):
        """Begins to draw a film, which `progress` follows, into a new folder. Its first view is
        the photo's camera, as in sample.py's --path."""
        self.check_idle()
        cameras, (scale, options) = self.smooth(asked), self.chosen(asked)
        same, square = bool(asked.get("same_noise", True)), self.subject.photo.square
        starts = (torch.allclose(cameras.c2w[0], cameras.cond_c2w, 0, paths.RIGID)
                  and abs(cameras.fov[0] - cameras.cond_fov) < paths.RIGID)
        rest = cameras[int(starts):]
        folder = next(path for i in count(1) if not (path := self.out / f"film-{i:03d}").exists())
        folder.mkdir(parents=True)
        photo, path = folder / "photo.png", folder / "path.json"
        square.save(photo)
        names = [f"views/{i + 1:03d}.png" for i in range(len(rest))]
        paths.write(path, rest, square.width, names, photo.name)
        # what is drawn is what the file says, to the last digit
        cameras = replace(paths.read(path, cameras.cond_fov), closed=cameras.closed)
        words = ["python", "sample.py", photo, "--path", path, "--checkpoint",
                 self.models[self.place], *self.words, "--scale", scale,
                 "--same-noise" if same else "--no-same-noise"]
        words += [word for name, value in options.items() for word in (f"--{name}", value)]
        film = Film(self.render, scale, options, folder, shlex.join(map(str, words)), len(cameras))
        write_text(folder / "command.txt", film.command + "\n")

        def draw():
            self.render.same_noise = same
            out = Folder(folder)
            out.follow(film, cameras, "path", False)
            film.files = [name for name in out.written if name != "views/"]

        film.future, self.last = self.thread.submit(draw), film
        return self.progress(asked)

    def progress(self, asked):
        """How far the newest film is."""
        film = self.last
        if not film:
            raise ValueError("there is no film yet")
        error = film.future.exception() if film.future.done() else None
        return {"done": film.done, "total": film.total, "ended": film.future.done(),
                "folder": str(film.folder), "files": film.files, "command": film.command,
                "error": error and line_of(error)}

    def stop(self, asked):
        """Stops the newest film at its next step."""
        if self.last:
            self.last.stopped = True
        return {}

    def file(self, asked):
        """A file of the newest film."""
        if not self.last or asked.get("name") not in self.last.files:
            raise ValueError("the film has no such file")
        path = self.last.folder / asked["name"]
        return path.read_bytes(), PLAYED.get(path.suffix, "application/octet-stream")
