"""Views of a capture made alike: photos from files or videos, resampled to one pinhole camera.

`one_camera` finds the field of view that all views of a scene can have, `square` resamples a photo
and its depth to it, once: principal point in the middle, square pixels, no lens distortion. Cameras
are OpenGL camera-to-world. Letters: `n` points, `h w` pixels of a file, `s` pixels a side of what
comes out.
"""

import functools
import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from views.cameras import pose_problem
from views.colmap import Lens

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
EVEN_RATE = 25              # frames a second that ffmpeg is told: any number


class LeftOut(ValueError):
    """A view or scene that cannot be used: where, a reason that can be counted, and details."""

    def __init__(self, where, reason, detail=""):
        super().__init__(where, reason, detail)
        self.where, self.reason, self.detail = str(where), reason, str(detail)

    def __str__(self):
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


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
        if not ((places >= 0) & (places <= 1)).all():
            return False
        back = lens.slopes(places)
        return np.isfinite(back).all() and abs(back - square * half).max() < SAME_SLOPE

    low, high = 0.0, WIDEST
    if inside(high):
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return low


def check_pose(pose, where):
    """Raises LeftOut unless a matrix (4, 4), a tensor, is a rotation and shift."""
    found = pose_problem(pose)
    if found:
        reason, _, detail = found.rstrip(")").partition(" (")
        raise LeftOut(where, f"the camera {reason}", detail)


def check_camera(view):
    """Raises LeftOut where a view's camera cannot be used."""
    check_pose(torch.from_numpy(view.c2w), view.where)
    intrinsics = view.lens.intrinsics
    if not np.isfinite(view.lens.params).all():
        raise LeftOut(view.where, "intrinsics are not finite", intrinsics)
    if min(intrinsics[:2]) <= 0:
        raise LeftOut(view.where, "the focal length is not positive", intrinsics)
    if extent(view.lens) <= 0:
        raise LeftOut(view.where, "the principal point lies outside the image", intrinsics)


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
    extents = [extent(view.lens) for view in good]
    least = NARROWEST * np.median(extents) if good else 0.0
    out += [LeftOut(view.where, "the field of view is far narrower than the scene's")
            for view, each in zip(good, extents) if each < least]
    good = [view for view, each in zip(good, extents) if each >= least]
    return good, min((each for each in extents if each >= least), default=0.0), out


def square(view, picture, half, size):
    """The pixels (s, s, 3) uint8 and depths (s, s) float32 or None of a view, 0 where not known.

    What is seen is `half`, the tangent of half the field of view, to each side of the principal
    ray. Raises LeftOut.
    """
    width, height = picture.size
    lens = view.lens
    if lens.width > 1 and abs(width / height * lens.height / lens.width - 1) > SAME_ASPECT:
        raise LeftOut(view.where, "the photo's shape is not its camera's",
                      f"{width}x{height}, {lens.width:g}x{lens.height:g}")
    fx, fy, *_ = lens.intrinsics
    try:
        # a JPEG may come out smaller by a whole number, and the last pixel then reaches outside
        shrunk = ENOUGH * size / (2 * half * min(fx * width, fy * height))
        picture.draft("RGB", (math.ceil(shrunk * width), math.ceil(shrunk * height)))
        picture.load()
    except Exception as err:    # on damaged bytes Pillow raises anything, SyntaxError included
        raise LeftOut(view.where, "image cannot be decoded", str(err)) from err
    shape = width / round(width / picture.width), height / round(width / picture.width)
    resample = bent_pixels if lens.distorted else straight_pixels
    pixels = resample(lens, opaque(view, picture), shape, half, size)
    if pixels.max() < BLACK:
        raise LeftOut(view.where, view.black)
    if view.depth is None:
        return pixels, None
    take = points_depth if isinstance(view.depth, Points) else map_depth
    depth = take(view, half, size)
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


def opaque(view, picture):
    """RGB, transparency over white. Raises LeftOut for more than 8 bits a channel."""
    if picture.mode.startswith(("I", "F")):
        raise LeftOut(view.where, "the image has more than 8 bits a channel")
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def map_depth(view, half, size):
    """The depth map (s, s) at the nearest pixels. Raises LeftOut."""
    source, places = view.depth, view.lens.places(slopes_of(half, size))

    def nearest(path, what):
        values = pixels(path, what)
        h, w = values.shape[:2]
        column, row = np.floor(places * (w, h)).astype(int).clip(0, (w - 1, h - 1)).T
        return values[row, column].reshape(size, size, *values.shape[2:])

    words = nearest(source.path, "depth")
    if words.ndim != 2 or words.dtype not in (np.uint16, np.int32):     # Pillow 10's is int32
        raise LeftOut(source.path, "depth is not a 16-bit grey PNG")
    words = words.astype(np.uint16)
    depth = (words.view(np.float16) if source.half_floats else words).astype(np.float32)
    depth *= np.float32(source.unit)
    if source.mask:
        depth *= nearest(source.mask, "depth mask").reshape(size, size, -1).any(-1)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def points_depth(view, half, size):
    """The depths (s, s) of the pixels where points fall; of several the nearest."""
    at = np.floor((view.lens.slopes(view.depth.place) / half + 1) / 2 * size)   # column, row
    inside = ((at >= 0) & (at < size)).all(1)
    column, row = at[inside].astype(int).T
    depth = np.full((size, size), np.inf, np.float32)
    np.minimum.at(depth, (row, column), view.depth.depth[inside].astype(np.float32))
    return np.where(np.isfinite(depth), depth, np.float32(0))


def pixels(path, what):
    """The array of an image file. Raises LeftOut."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except FileNotFoundError as err:
        raise LeftOut(path, f"missing {what}") from err
    except Exception as err:    # on damaged bytes Pillow raises anything, SyntaxError included
        raise LeftOut(path, f"{what} cannot be decoded", str(err)) from err


# ---- photos

def pictures(views):
    """Yields (view, picture or LeftOut). A video is decoded once, in order; raises LeftOut then."""
    if views and views[0].time is not None:
        yield from zip(views, video_frames(views[0].photo, [view.time for view in views]))
        return
    for view in views:
        try:
            # orientation tags are not obeyed: the cameras are those of the pixels as stored
            with Image.open(view.photo) as picture:
                yield view, picture
        except FileNotFoundError:
            yield view, LeftOut(view.photo, "missing image")
        except Exception as err:    # on damaged bytes Pillow raises anything
            yield view, LeftOut(view.photo, "image cannot be decoded", str(err))


def video_frames(video, times):
    """Yields the pictures of a video nearest to ascending times in seconds, by one call of ffmpeg.

    A LeftOut stands for a time that has no frame within NEAR, or none of its own. Raises LeftOut
    for a video that cannot be read.
    """
    known, times = frame_times(video), np.array(times)
    after = np.searchsorted(known, times).clip(1, len(known) - 1)
    nearest = np.where(times - known[after - 1] <= known[after] - times, after - 1, after)
    away = abs(known[nearest] - times)
    best = {}                               # frame: the last, so the nearest, of its times
    for i in np.argsort(-away, kind="stable"):
        if away[i] <= NEAR:
            best[nearest[i]] = i
    frames = selected(video, known[sorted(best)])
    for i in range(len(times)):
        yield (next(frames) if best.get(nearest[i]) == i else
               LeftOut(f"{video}: {times[i]:.6f} s", "no frame of the video at its listed time"))


def frame_times(video):
    """The times of a video's frames in seconds from its start, ascending. Raises LeftOut."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries",
               "format=start_time:packet=pts_time,flags", "-of", "compact=p=0:nk=0", str(video)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    fields = [dict(part.split("=", 1) for part in line.split("|") if "=" in part)
              for line in done.stdout.splitlines()]
    start = next((each["start_time"] for each in fields if "start_time" in each), "N/A")
    # packets with the flag D are decoded and not shown
    times = [float(each["pts_time"]) for each in fields
             if each.get("pts_time", "N/A") != "N/A" and "D" not in each.get("flags", "")]
    if done.returncode or not times:
        raise LeftOut(video, "the video cannot be read", " ".join(done.stderr.split()))
    return np.sort(np.array(times) - (0.0 if start == "N/A" else float(start)))


def selected(video, times):
    """Yields the pictures of a video's frames at ascending times, which are their own. Raises
    LeftOut where one is missing."""
    if not len(times):
        return
    start = max(0.0, times[0] - SEEK)
    after = [f"{time - start - EARLY:.6f}" for time in times]
    wanted = total([f"gte(t,{time})*not(gte(prev_selected_t,{time}))" for time in after])
    # frames are given new times at an even rate, or ffmpeg would fill the gaps between them
    command = ["ffmpeg", "-v", "error", "-nostdin", "-ss", f"{start:.6f}", "-i", str(video), "-an",
               "-vf", f"select='{wanted}',setpts=N/{EVEN_RATE}/TB", "-r", str(EVEN_RATE),
               "-frames:v", str(len(times)), "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24",
               "-"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        try:
            found = 0
            while picture := portable_pixmap(process.stdout):
                found += 1
                yield picture
            if process.wait() or found < len(times):
                errors.seek(0)
                detail = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
                raise LeftOut(video, "the video cannot be decoded",
                              "; ".join([f"{found} of {len(times)} frames found", *detail]))
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def total(terms):
    """The sum of terms as a text whose parentheses nest little, as ffmpeg's parser wants it."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    return f"({total(terms[:half])}+{total(terms[half:])})"


def portable_pixmap(stream):
    """The next picture of a stream of binary PPM files, None at its end."""
    header = b""
    while header.count(b"\n") < 3:          # P6, width and height, 255
        byte = stream.read(1)
        if not byte:
            return None
        header += byte
    width, height = map(int, header.split()[1:3])
    data = stream.read(3 * width * height)
    if len(data) < 3 * width * height:
        return None
    return Image.frombytes("RGB", (width, height), data)
