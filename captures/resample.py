"""Views of a capture made alike: photos from files or videos, resampled to one pinhole camera.

`one_camera` finds the field of view that all views of a scene can have, `square` resamples a photo
and its depth to it, once: principal point in the middle, square pixels, no lens distortion. Cameras
are OpenGL camera-to-world. Letters: `n` points, `h w` pixels of a file, `s` pixels a side of what
comes out.
"""

import functools
import json
import math
import subprocess
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from runtime.files import mistaken_for
from shards.files import Damaged
from shards.index import FARTHEST, pose_problems
from shards.scenes import over_white
from views.colmap import Lens, pycolmap

NARROWEST = 0.5             # share of the scene's median extent, below which a view is left out
SAME_ASPECT = 0.02          # largest relative difference of a photo's and its camera's aspect ratio
ENOUGH = 1.5                # times the written size, to which photos may be shrunk before
SUBSAMPLES = 3              # along each side of a pixel that a distorted photo is resampled to
BLACK = 3                   # level below which all of a black picture is
FEWEST_DEPTHS = 16          # pixels of known depth, below which a view has none
WIDEST = 1.0                # tangent of half the field of view that a distorted lens may keep
BORDER = 33                 # places along a side of a square, looked at in a distorted photo
SAME_SLOPE = 1e-4           # error of a direction that went through a lens and back
HALVINGS = 24               # of the interval that holds a distorted lens's extent
NEAR = 0.025                # seconds between a listed time and the video's frame, at most
EARLY = 0.001               # seconds by which ffmpeg's clock may differ from a frame's own time
SEEK = 1.0                  # seconds before the first frame wanted, from which a video is decoded


class LeftOut(Damaged):
    """A view or scene of a capture that cannot be used."""


@contextmanager
def decoding(path, what="image"):
    """Raises LeftOut for whatever Pillow raises inside: on damaged bytes that is anything."""
    try:
        with warnings.catch_warnings():     # one's own large photo is no attack
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except LeftOut:
        raise
    except Image.DecompressionBombError as err:
        raise LeftOut(path, f"the {what} has more than 178 megapixels", "make it smaller") from err
    except Exception as err:
        raise LeftOut(path, f"{what} cannot be decoded", err) from err


@contextmanager
def opened(path, what="image"):
    """The Pillow image of a file. Raises LeftOut as `decoding` does; says what else it is."""
    if not path.is_file():                  # a pipe or a device would be waited for
        raise LeftOut(path, f"missing {what}")
    with decoding(path, what):
        with open(path, "rb") as file:
            mistaken, way_out = mistaken_for(file.read(64), path)
        if mistaken:
            raise LeftOut(path, f"no {what}, but {mistaken}", way_out.partition(", or ")[0])
        with Image.open(path) as image:
            yield image


@dataclass(frozen=True)
class DepthMap:
    """Depth in a 16-bit PNG, times `unit`."""
    path: Path
    unit: float
    half_floats: bool = False       # words are float16 bits, rather than integers
    mask: Path | None = None        # an image that is 0 where the depth does not count


@dataclass(frozen=True)
class Points:
    """Depth of single points: places (n, 2) in shares of width and height, depths (n,)."""
    place: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True)
class View:
    """A photo and its camera."""
    where: str                      # for messages
    photo: Path                     # an image, or with `time` a video
    c2w: np.ndarray                 # (4, 4) float64
    lens: Lens                      # of 1 x 1 pixels where the photo's size is not known
    depth: DepthMap | Points | None = None
    time: float | None = None       # seconds
    black: str = "the picture is black"         # the reason to leave it out then


# ---- one camera for a scene

@functools.lru_cache(maxsize=64)
def extent(lens):
    """Tangent of half the field of view of the largest square about the principal ray.

    Of a distorted lens no more than WIDEST, and only as far as directions come back from it.
    """
    if not lens.distorted:
        fx, fy, cx, cy = lens.intrinsics
        return min(cx / fx, (1 - cx) / fx, cy / fy, (1 - cy) / fy)
    steps = np.linspace(-1, 1, BORDER)
    square = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)

    def inside(half):
        places = lens.places(square * half)
        return (((places >= 0) & (places <= 1)).all()       # False for nan
                and (abs(lens.slopes(places) - square * half) < SAME_SLOPE).all())

    low, high = (WIDEST, WIDEST) if inside(WIDEST) else (0.0, WIDEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return low


def check_pose(pose, where):
    """Raises LeftOut unless a matrix (4, 4) is a rotation and shift."""
    if problem := pose_problems(pose[None])[0]:
        raise LeftOut(where, f"the camera {problem}")


def check_camera(view):
    """Raises LeftOut where a view's camera cannot be used."""
    check_pose(view.c2w, view.where)
    if view.lens.distorted and not pycolmap():
        raise LeftOut(view.where, "lens distortion is undone by pycolmap, which is not "
                      "installed: pip install pycolmap", view.lens.model)
    if not (np.isfinite(view.lens.params).all() and min(view.lens.intrinsics[:2]) > 0
            and extent(view.lens) > 0):
        raise LeftOut(view.where, "no focal length, or principal point in the image, of a camera",
                      view.lens.intrinsics)


def one_camera(views):
    """(usable views, tangent of half their common field of view, LeftOuts).

    Readers of shards take one field of view for a whole scene, so it is the narrowest of all views;
    those much narrower than the others are left out.
    """
    good, out = [], []
    for view in views:
        try:
            check_camera(view)
            good.append(view)
        except LeftOut as err:
            out.append(err)
    if not good:
        return [], 0.0, out
    extents = np.array([extent(view.lens) for view in good])
    enough = extents >= NARROWEST * np.median(extents)
    out += [LeftOut(view.where, "the field of view is far narrower than the scene's")
            for view, wide in zip(good, enough) if not wide]
    return [view for view, wide in zip(good, enough) if wide], float(extents[enough].min()), out


@np.errstate(all="ignore")       # depths and cameras may be any: infinite, no numbers
def square(view, picture, half, size):
    """The pixels (s, s, 3) uint8 and depths (s, s) float32 or None of a view, 0 where not known.

    What is seen is `half`, the tangent of half the field of view, to each side of the principal
    ray. Raises LeftOut.
    """
    (width, height), lens = picture.size, view.lens
    if lens.width > 1 and abs(width / height * lens.height / lens.width - 1) > SAME_ASPECT:
        raise LeftOut(view.where, "the photo's shape is not its camera's",
                      f"{width}x{height}, {lens.width:g}x{lens.height:g}")
    if picture.mode.startswith(("I", "F")):
        raise LeftOut(view.where, "the image has more than 8 bits a channel")
    fx, fy, *_ = lens.intrinsics
    with decoding(view.where):
        # a JPEG may come out smaller by a whole number, and the last pixel then reaches outside
        shrunk = ENOUGH * size / (2 * half * min(fx * width, fy * height))
        picture.draft("RGB", (math.ceil(shrunk * width), math.ceil(shrunk * height)))
        picture.load()
    shape = width / round(width / picture.width), height / round(width / picture.width)
    resample = bent_pixels if lens.distorted else straight_pixels
    pixels = resample(lens, over_white(picture), shape, half, size)
    if pixels.max() < BLACK:
        raise LeftOut(view.where, view.black)
    if view.depth is None:
        return pixels, None
    depth = (points_depth if isinstance(view.depth, Points) else map_depth)(view, half, size)
    if np.count_nonzero(depth) < FEWEST_DEPTHS:
        raise LeftOut(view.where, f"fewer than {FEWEST_DEPTHS} pixels of known depth",
                      "with --no-depth, or without --colmap, none is needed")
    return pixels, depth


def straight_pixels(lens, picture, shape, half, size):
    """The pixels (s, s, 3) of a pinhole's photo; shape: what (w, h) its camera's image has."""
    corners = lens.places(np.array([[-half, -half], [half, half]])) * shape
    box = corners.ravel().clip(0, [*picture.size, *picture.size])       # rounding
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, tuple(box.tolist())))


def bent_pixels(lens, picture, shape, half, size):
    """The same of a distorted photo: the mean of what the SUBSAMPLES of each pixel meet."""
    fx, fy, *_ = lens.intrinsics
    step = max(1, int(2 * half * min(fx * shape[0], fy * shape[1]) / (ENOUGH * size)))
    picture = picture.reduce(step)
    places = bent_places(lens, half, size * SUBSAMPLES) * (np.array(shape) / step / picture.size)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    grid = torch.from_numpy(places * 2 - 1).float().view(1, size * SUBSAMPLES, -1, 2)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(image, SUBSAMPLES)[0].round().byte().permute(1, 2, 0).numpy()


@functools.lru_cache(maxsize=2)
def bent_places(lens, half, size):
    """The places (s * s, 2) of the pixels' centres, which most views of a scene have alike."""
    return lens.places(slopes_of(half, size))


def slopes_of(half, size):
    """The directions (s * s, 2) of the centres of pixels, row by row."""
    slope = ((np.arange(size) + 0.5) / size * 2 - 1) * half
    return np.stack(np.meshgrid(slope, slope), axis=-1).reshape(-1, 2)


def map_depth(view, half, size):
    """The depth map (s, s) at the nearest pixels. Raises LeftOut."""
    source, places = view.depth, view.lens.places(slopes_of(half, size))

    def nearest(path, what):
        with opened(path, what) as image:
            values = np.asarray(image)
        h, w = values.shape[:2]
        column, row = np.floor(places * (w, h)).astype(int).clip(0, (w - 1, h - 1)).T
        return values[row, column].reshape(size, size, *values.shape[2:])

    words = nearest(source.path, "depth")
    if words.ndim != 2 or words.dtype not in (np.uint16, np.int32):     # Pillow 10's is int32
        raise LeftOut(source.path, "depth is not a 16-bit grey PNG")
    words = words.astype(np.uint16)
    depth = (words.view(np.float16) if source.half_floats else words) * np.float64(source.unit)
    if source.mask:
        depth *= nearest(source.mask, "depth mask").reshape(size, size, -1).any(-1)
    return np.where((depth > 0) & (depth < FARTHEST), depth, 0).astype(np.float32)


def points_depth(view, half, size):
    """The depths (s, s) of the pixels where points fall; of several the nearest."""
    at = np.floor((view.lens.slopes(view.depth.place) / half + 1) / 2 * size)   # column, row
    inside = ((at >= 0) & (at < size)).all(1)
    column, row = at[inside].astype(int).T
    depth = np.full((size, size), np.inf, np.float32)
    np.minimum.at(depth, (row, column), view.depth.depth[inside].astype(np.float32))
    return np.where(np.isfinite(depth), depth, np.float32(0))


# ---- photos

def pictures(views):
    """Yields (view, picture or LeftOut). A video is decoded once, in order; raises LeftOut then."""
    if views and views[0].time is not None:
        yield from zip(views, video_frames(views[0].photo, [view.time for view in views]))
        return
    for view in views:
        try:
            # orientation tags are not obeyed: the cameras are those of the pixels as stored
            with opened(view.photo) as picture:
                yield view, picture
        except LeftOut as err:
            yield view, err


def video_frames(video, times):
    """Yields the pictures of a video nearest to ascending times in seconds.

    A LeftOut stands for a time that has no frame within NEAR, or none of its own. Raises LeftOut
    for a video that cannot be read.
    """
    known = frame_times(video)
    nearest = [int(abs(known - time).argmin()) for time in times]
    away = abs(known[nearest] - times)
    best = {}                               # frame: the last, so the nearest, of its times
    for i in np.argsort(-away, kind="stable"):
        if away[i] <= NEAR:
            best[nearest[i]] = i
    frames = selected(video, known[sorted(best)])
    for i, time in enumerate(times):
        yield (next(frames) if best.get(nearest[i]) == i else
               LeftOut(f"{video}: {time:.6f} s", "no frame of the video at its listed time"))


def frame_times(video):
    """The times of a video's frames in seconds from its start, ascending. Raises LeftOut."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries",
               "format=start_time:packet=pts_time,flags", "-of", "json", str(video)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    found = json.loads(done.stdout or "{}")
    # packets with the flag D are decoded and not shown
    times = [float(each["pts_time"]) for each in found.get("packets", [])
             if "pts_time" in each and "D" not in each.get("flags", "")]
    if done.returncode or not times:
        raise LeftOut(video, "the video cannot be read", " ".join(done.stderr.split()))
    return np.sort(times) - float(found.get("format", {}).get("start_time", 0))


def selected(video, times):
    """Yields the pictures of a video's frames at ascending times, which are their own. Raises
    LeftOut where one is missing."""
    if not len(times):
        return
    start = max(0.0, times[0] - SEEK)
    terms = [f"between(t,{time - EARLY:.6f},{time + EARLY:.6f})" for time in times - start]
    step = math.isqrt(len(terms)) + 1       # a sum of a hundred is too long for ffmpeg's parser
    wanted = "+".join(f"({'+'.join(terms[i:i + step])})" for i in range(0, len(terms), step))
    # frames are given new times at an even rate, or ffmpeg would fill the gaps between them
    command = ["ffmpeg", "-v", "error", "-nostdin", "-ss", f"{start:.6f}", "-i", str(video), "-an",
               "-vf", f"select='{wanted}',setpts=N/25/TB", "-r", "25", "-frames:v", str(len(times)),
               "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        try:
            for found in range(len(times)):
                picture = portable_pixmap(process.stdout)
                if not picture:
                    errors.seek(0)
                    detail = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
                    raise LeftOut(video, "the video cannot be decoded",
                                  "; ".join([f"{found} of {len(times)} frames found", *detail]))
                yield picture
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def portable_pixmap(stream):
    """The next picture of a stream of binary PPM files, None at its end."""
    _, sides, _ = stream.readline(), stream.readline(), stream.readline()
    size = tuple(map(int, sides.split())) or (0, 0)
    data = stream.read(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, data) if 0 < len(data) == 3 * size[0] * size[1] else None
