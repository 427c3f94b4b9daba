"""What answers the page of view.py: a model, a photo, the one thread that draws, and a http server.

    studio = Studio(load, models, out)          # load: path of a model -> views.render.Render
    studio.start(Subject(photo, "photo.jpg"))
    Server(studio, "127.0.0.1", 0).serve_forever()

The page's world is that of views/paths.py. A request is POST /NAME of JSON (of a photo: its bytes)
and is answered by the Studio's method of that name; an error is {"error": one line}. k key frames.
"""

import hmac
import io
import json
import secrets
import shlex
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import torch

import camera
import diffusion
from runtime.files import write_text
from views import MOTIONS, STEEPEST, paths, photos, pictures
from views.folder import Folder

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
REQUESTS = "open photo scene model picture truth view preset path film progress stop file".split()
MOST_JSON = 2**20               # bytes of a request that is no photo
MOST_KEYS, MOST_VIEWS, FOVS = 200, 1000, (0.02, 3.0)
SHOWN_SIDE = 768                # pixels a side of the photo that the page shows
PATIENCE = 60.0                 # seconds that a silent connection is kept
PRESET_KEYS = {"orbit": 8, "swing": 8, "spiral": 16, "pan": 4, "tilt": 4}       # others have 2
GRID = (0.0, "a sheet of views to the sides of the photo's, above and below it")
OF_3DOF = ("orbit", "swing", "spiral", "dolly", "grid")
POLICY = ("default-src 'none'; img-src blob: data:; media-src blob:; connect-src 'self'; "
          "script-src 'nonce-{0}'; style-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


class Stopped(Exception):
    """Work that newer work has replaced, or that the user has stopped."""


class Refused(Exception):
    """A request that is not answered: HTTP status, one line."""


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
        if self.last and not self.last.future.done():
            raise ValueError("a film is being drawn: stop it, or wait for its end")
        return self.thread.submit(work, *arguments).result()

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
        known = {**MOTIONS, "grid": GRID}
        return {name: known[name] for name in OF_3DOF} if self.mode.pose == "angles" else known

    # ---- requests: what is shown

    def open(self, asked):
        """Begins a session; the page of an earlier one is answered no more."""
        self.session = secrets.token_hex(8)
        return self.state()

    def photo(self, asked):
        """A photo's bytes `data`; crop and object as of sample.py; fov in radians, elevation."""
        photo = photos.from_file(asked["data"], self.render.size, asked.get("crop", ""),
                                 asked.get("object") == "true")
        own = {"fov": (*FOVS, photo.fov), "elevation": (-STEEPEST, STEEPEST, photo.elevation)}
        for name, (low, high, default) in own.items():
            value = float(asked.get(name, default))
            setattr(photo, name, number({name: value}, name, low, high))
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
        if not self.subject:
            raise ValueError("there is no photo yet: drop one into the page")
        if not isinstance(asked, list) or not 1 <= len(asked) <= MOST_KEYS:
            raise ValueError(f"from 1 to {MOST_KEYS} cameras can be asked for")
        try:
            c2w = torch.tensor([each["c2w"] for each in asked], dtype=torch.float64)
        except (TypeError, KeyError, ValueError) as err:
            raise ValueError("a camera is no matrix of numbers") from err
        if c2w.shape[1:] != (4, 4) or not c2w.isfinite().all():
            raise ValueError("a camera is no matrix of 4x4 finite numbers")
        fov = torch.tensor([number(each, "fov", *FOVS) for each in asked], dtype=torch.float64)
        c2w[:, :3, :3] = paths.nearest_rotation(c2w[:, :3, :3])
        c2w[:, 3] = c2w.new_tensor([0, 0, 0, 1])
        photo = self.subject.photo
        cameras = paths.Cameras(paths.around(0.0, photo.elevation, 1.0), c2w, fov, photo.fov)
        if self.mode.pose == "angles" and not cameras.centred():
            raise ValueError("a 3DoF model knows of azimuth, elevation and distance alone: its "
                             "cameras look at the centre with the photo's field of view")
        return cameras

    def smooth(self, asked):
        """(the key frames' Cameras, the Cameras of the smooth path through them)."""
        keys, views = self.cameras(asked.get("keys")), number(asked, "views", 1, MOST_VIEWS, int)
        c2w, fov = paths.smooth(keys.c2w, keys.fov, views, bool(asked.get("closed")))
        return replace(keys, c2w=c2w, fov=fov, closed=bool(asked.get("closed")))

    def chosen(self, asked):
        """(scale, options of a Render) of a request. Raises ValueError."""
        options = {"sampler": str(asked.get("sampler")), "steps": number(asked, "steps", 1, 1000, int),
                   "guidance": number(asked, "guidance", 0, 100), "eta": number(asked, "eta", 0, 1),
                   "seed": number(asked, "seed", 0, 2**53, int)}
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
        return {"cameras": listed(self.smooth(asked))}

    # ---- requests: a film

    def film(self, asked):
        """Begins to draw a film, which `progress` follows, into a new folder. Its first view is
        the photo's camera, as in sample.py's --path."""
        if self.last and not self.last.future.done():
            raise ValueError("a film is being drawn: stop it, or wait for its end")
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
        error = film.future.done() and film.future.exception()
        return {"done": film.done, "total": film.total, "ended": film.future.done(),
                "folder": str(film.folder), "files": film.files, "command": film.command,
                "error": line_of(error) if error else ""}

    def stop(self, asked):
        """Stops the newest film at its next step."""
        if self.last:
            self.last.stopped = True
        return {}

    def file(self, asked):
        """A file of the newest film."""
        if not self.last or asked.get("name") not in self.last.files:
            raise ValueError("the film has no such file")
        return (self.last.folder / asked["name"]).read_bytes(), "application/octet-stream"


def line_of(error):
    """What is said of an error: one line for what went wrong with the user's input, machine or
    disk; anything else is a fault of the program, whose traceback the terminal has."""
    if isinstance(error, Stopped):
        return "stopped"
    if not isinstance(error, (ValueError, OSError, torch.OutOfMemoryError)):
        traceback.print_exception(error)
        return f"this is a fault of the program, the terminal has the rest: {error!r}"
    return str(error).splitlines()[0]


# ---- http

class Handler(BaseHTTPRequestHandler):
    """A connection. Only pages that this server has served, to who knew its token, are answered."""
    protocol_version, timeout = "HTTP/1.1", PATIENCE

    def log_message(self, *words):
        """Says nothing."""

    def do_GET(self):
        nonce = secrets.token_urlsafe(16)
        try:
            self.check(dict(parse_qsl(urlsplit(self.path).query)).get("token", ""))
            if urlsplit(self.path).path != "/":
                raise Refused(404, "there is one page, at /")
        except Refused as err:
            return self.reply(err.args[0], err.args[1].encode(), "text/plain; charset=utf-8")
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        self.reply(200, page.encode(), "text/html; charset=utf-8",
                   {"Content-Security-Policy": POLICY.format(nonce)})

    def do_POST(self):
        try:
            self.check(self.headers.get("X-Token", ""))
            body, kind, *more = self.answer()
            self.reply(200, body, kind, *more)
        except Exception as err:        # each of them is told to the page, by line_of
            status = (err.args[0] if isinstance(err, Refused) else 409 if isinstance(err, Stopped)
                      else 400 if isinstance(err, (ValueError, OSError)) else 500)
            line = err.args[1] if isinstance(err, Refused) else line_of(err)
            self.reply(status, json.dumps({"error": line}).encode(), "application/json")

    def check(self, token):
        """Raises Refused unless the request comes from this server's own page."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.rpartition(":")[0] not in self.server.hosts:
            raise Refused(403, f"this server is not {host[:80]!r}")
        if origin not in (None, f"http://{host}"):
            raise Refused(403, f"pages of {origin[:80]!r} are not answered")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "the address lacks its token: open the address that view.py printed")

    def answer(self):
        """(bytes, type, headers or nothing) of a request. Raises Refused, and what Studio does."""
        studio, parts = self.server.studio, urlsplit(self.path)
        name, size = parts.path[1:], self.headers.get("Content-Length", "")
        most = photos.MOST_BYTES if name == "photo" else MOST_JSON
        if name not in REQUESTS:
            raise Refused(404, f"nothing is called {name[:40]!r}")
        if not size.isascii() or not size.isdecimal() or int(size) > most:
            raise Refused(413, f"{size or 'unknown'} bytes are too many, at most {most:,} can be "
                               "sent: make it smaller first")
        data = self.rfile.read(int(size))
        if len(data) < int(size):
            raise Refused(400, "the request ended too soon")
        if name != "open" and self.headers.get("X-Session") != studio.session:
            raise Refused(410, "another tab has taken over")
        asked = {**dict(parse_qsl(parts.query)), "data": data} if name == "photo" else parsed(data)
        found = getattr(studio, name)(asked)
        return (json.dumps(found).encode(), "application/json") if isinstance(found, dict) else found

    def reply(self, status, body, kind, headers=None):
        """Sends it; whoever has gone away meanwhile misses it."""
        self.close_connection = self.close_connection or status >= 400      # of unread bytes
        try:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Type": kind, "Cache-Control": "no-store",
                                "Content-Length": str(len(body)), "Referrer-Policy": "no-referrer",
                                "X-Content-Type-Options": "nosniff"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True


def parsed(data):
    """The dict of a JSON text. Raises ValueError."""
    try:
        asked = json.loads(data or b"{}")
    except (ValueError, RecursionError) as err:
        raise ValueError("the request is no JSON") from err
    if not isinstance(asked, dict):
        raise ValueError("the request is no JSON object")
    return asked


class Server(ThreadingHTTPServer):
    """Serves a Studio's page at `address`, which has the token that it asks for."""
    daemon_threads = True

    def __init__(self, studio, host, port):
        super().__init__((host, port), Handler)
        self.studio, self.token = studio, secrets.token_urlsafe(16)
        self.hosts = {*LOOPBACK, host}
        self.address = f"http://{host}:{self.server_port}/?token={self.token}"

    def handle_error(self, request, address):
        """A connection that broke ends alone, without a word."""
