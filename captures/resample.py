"""Views of a capture made alike: photos from files or videos, resampled to one pinhole camera.

`one_camera` finds the field of view that all views of a scene can have, `square` resamples a photo
and its depth to it: principal point in the middle, square pixels. Cameras are OpenGL
camera-to-world. Intrinsics are fx, fy, cx, cy in shares of the image's width and height, so they
hold at any resolution. Letters: `n` points, `h w` pixels of a file, `s` pixels a side of what comes
out.
"""

import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from views import paths

NARROWEST = 0.5             # share of the scene's median extent, below which a view is left out
SAME_ASPECT = 0.02          # largest relative difference of a photo's and its camera's aspect ratio
ENOUGH = 1.5                # times the written size, to which JPEGs may be shrunk while decoding
FEWEST_DEPTHS = 16          # pixels of known depth, below which a view has none
EARLY = 0.005               # seconds by which a video's frame may be before its listed time
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
    intrinsics: tuple               # fx, fy, cx, cy in shares of the image's width and height
    size: tuple = (0, 0)            # pixels (w, h) that the camera is for; 0, 0: not known
    depth: DepthMap | Points | None = None
    time: float | None = None       # seconds


# ---- one camera for a scene

def extent(intrinsics):
    """Tangent of half the field of view of the largest square about the principal point."""
    fx, fy, cx, cy = intrinsics
    return min(cx / fx, (1 - cx) / fx, cy / fy, (1 - cy) / fy)


def check_pose(pose, where):
    """Raises LeftOut unless a matrix (4, 4), a tensor, is a rotation and shift."""
    found = paths.pose_problem(pose)
    if found:
        reason, _, detail = found.rstrip(")").partition(" (")
        raise LeftOut(where, f"the camera {reason}", detail)


def check_camera(view):
    """Raises LeftOut where a view's camera cannot be used."""
    check_pose(torch.from_numpy(view.c2w), view.where)
    if not np.isfinite(view.intrinsics).all():
        raise LeftOut(view.where, "intrinsics are not finite", view.intrinsics)
    if min(view.intrinsics[:2]) <= 0:
        raise LeftOut(view.where, "the focal length is not positive", view.intrinsics)
    if extent(view.intrinsics) <= 0:
        raise LeftOut(view.where, "the principal point lies outside the image", view.intrinsics)


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
    extents = [extent(view.intrinsics) for view in good]
    least = NARROWEST * np.median(extents) if good else 0.0
    out += [LeftOut(view.where, "the field of view is far narrower than the scene's")
            for view, each in zip(good, extents) if each < least]
    good = [view for view, each in zip(good, extents) if each >= least]
    return good, min((each for each in extents if each >= least), default=0.0), out


def square(view, picture, half, size):
    """The pixels (s, s, 3) uint8 and depths (s, s) float32 or None of a view, 0 where not known.

    What is seen is `half`, the tangent of half the field of view, to each side of the principal
    point. Raises LeftOut.
    """
    width, height = picture.size
    if view.size[0] and abs(width / height * view.size[1] / view.size[0] - 1) > SAME_ASPECT:
        raise LeftOut(view.where, "the photo's shape is not its camera's", "{}x{}, {}x{}".format(
            width, height, *view.size))
    fx, fy, cx, cy = view.intrinsics
    try:
        # a JPEG may come out smaller by a whole number, and the last pixel then reaches outside
        side = 2 * half * min(fx * width, fy * height)
        shrunk = ENOUGH * size / side
        picture.draft("RGB", (math.ceil(shrunk * width), math.ceil(shrunk * height)))
        picture.load()
    except Exception as err:    # on damaged bytes Pillow raises anything, SyntaxError included
        raise LeftOut(view.where, "image cannot be decoded", str(err)) from err
    step = round(width / picture.width)
    box = np.array([(cx - half * fx) * width, (cy - half * fy) * height,
                    (cx + half * fx) * width, (cy + half * fy) * height]) / step
    box = box.clip(0, [*picture.size, *picture.size])           # rounding
    picture = opaque(view, picture)
    picture = picture.resize((size, size), Image.Resampling.LANCZOS, tuple(box.tolist()))
    if view.depth is None:
        return np.asarray(picture), None
    take = points_depth if isinstance(view.depth, Points) else map_depth
    depth = take(view, half, size)
    if np.count_nonzero(depth) < FEWEST_DEPTHS:
        raise LeftOut(view.where, f"fewer than {FEWEST_DEPTHS} pixels of known depth",
                      "with --no-depth, or without --colmap, none is needed")
    return np.asarray(picture), depth


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
    source, (fx, fy, cx, cy) = view.depth, view.intrinsics
    slope = ((np.arange(size) + 0.5) / size * 2 - 1) * half

    def nearest(path, what):
        values = pixels(path, what)
        h, w = values.shape[:2]
        rows = np.floor((cy + slope * fy) * h).astype(int).clip(0, h - 1)
        columns = np.floor((cx + slope * fx) * w).astype(int).clip(0, w - 1)
        return values[rows[:, None], columns]

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
    fx, fy, cx, cy = view.intrinsics
    slope = (view.depth.place - (cx, cy)) / (fx, fy)
    at = np.floor((slope / half + 1) / 2 * size)                # (n, 2) column, row
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
    """Yields the pictures of a video at ascending times in seconds, by one call of ffmpeg.

    Each is the first frame at or after its time, less EARLY. Raises LeftOut unless every time has
    a frame of its own.
    """
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
                raise LeftOut(video, "the video has no frame at some listed times",
                              "; ".join([f"{found} of {len(times)} found", *detail]))
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
