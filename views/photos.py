"""What views start from: a photo, or a held-out view of scenes that were kept from training.

A photo is made what the network saw in training: upright, opaque, square, of its size. The scale
says how many units of the paths (distances to what the photo looks at) the model takes as one.
"""

import io
import math
import os
import stat
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

import camera
import depth
from runtime import networks
from runtime.command import say
from shards import scenes
from views import FOV, SCALE, paths, pictures

WHITE, NEARLY_WHITE = (255, 255, 255), 250      # background: all channels at least this
OBJECT_SHARE = 200 / 256        # zero123: the longer side of an object, in image sides
MOST_BYTES = 2**26              # of a picture that came over a connection
MOST_SIDE = 4096                # pixels a side that are kept; a larger photo is reduced at once
MEGAPIXELS = 178                # twice Pillow's MAX_IMAGE_PIXELS, beyond which it opens nothing
OTHER_PROGRAMS = ("EPS",)       # formats for which Pillow runs another program
DEPTH_SIZE = 256                # pixels a side that the depth network sees
LEVEL = 0.05                    # largest slant of a level camera's right vector


@dataclass
class Photo:
    """The conditioning view, and how its camera stood."""
    square: Image.Image         # RGB, in all the pixels that there are
    size: int                   # pixels a side that the network sees
    fov: float                  # radians
    elevation: float            # degrees above the horizontal, looking down
    scale: float                # units of the paths that the model takes as one

    def closer(self, share):
        """The picture that the network sees, of the middle of the square: `share` of its side."""
        return reduce(self.square, self.size, min(share, 1.0))

    @cached_property
    def picture(self):
        return self.closer(1.0)

    def camera(self):
        """The camera (4, 4) as it stands in the world of views/paths.py."""
        return paths.around(0.0, self.elevation, 1.0)


@dataclass
class HeldOut(Photo):
    """A view of a scene that was kept from training, whose other views are known."""
    reader: scenes.RawScenes
    number: int                 # of the scene
    view: int
    scene_scale: float          # the length in the scene's unit that the model takes as one

    def in_scene(self, c2w):
        """Cameras (n, 4, 4) of the world of views/paths.py as they stand in the scene."""
        own = self.reader.scene(self.number).c2w[self.view]
        return paths.moved(c2w, self.camera(), own, self.scene_scale / self.scale)

    def others(self, count):
        """At most `count` other views: their numbers, their paths.Cameras, their true images."""
        scene = self.reader.scene(self.number)
        views = [i for i in range(len(scene.c2w)) if i != self.view]
        views = pictures.evenly_spaced(views, count)
        fov = torch.full((len(views),), scene.fov, dtype=torch.float64)
        return (views, paths.Cameras(scene.c2w[self.view], scene.c2w[views], fov, scene.fov),
                [pictures.image(scenes.images(self.reader.image(self.number, i))) for i in views])


# ---- a file

def from_file(source, size, crop="", isolate=False):
    """The Photo in an image file or its bytes; `read` says how. What a file cannot tell is
    ZeroNVS's default."""
    return Photo(read(source, crop, isolate), size, math.radians(FOV), 0.0, SCALE)


def read(source, crop="", isolate=False):
    """The square RGB image that is used of a file, named by its path, or of the bytes of one.

    Upright as EXIF says, transparency over white, the centre square (or `crop`, "left,top,side" in
    pixels). isolate: an object on white or transparent ground is centred as zero123 expects.
    Memory is bounded: a side of more than MOST_SIDE pixels is reduced by a whole number.
    Raises FileNotFoundError, or ValueError for what is no image, a crop outside it, more than
    MEGAPIXELS, or more than MOST_BYTES at once.
    """
    name = "the picture" if isinstance(source, bytes) else source
    try:
        if isinstance(source, bytes):
            if len(source) > MOST_BYTES:
                raise ValueError(f"{name} has {len(source):,} bytes, at most {MOST_BYTES:,} can be "
                                 "sent: make it smaller first")
            source = io.BytesIO(source)
        elif not stat.S_ISREG(os.stat(source).st_mode):     # a pipe would be waited for
            raise ValueError(f"{name} is a folder, a pipe or a device, not an image file")
        Image.init()
        with warnings.catch_warnings():
            # one's own large photo is no attack; what is too large is an error, and told below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=[x for x in Image.ID if x not in OTHER_PROGRAMS]
                            ) as image:
                return square(image, crop, isolate, name)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"no image {name}") from err
    except UnidentifiedImageError as err:
        raise ValueError(f"{name} is not an image that Pillow can read") from err
    except Image.DecompressionBombError as err:
        raise ValueError(f"{name} has more than {MEGAPIXELS} megapixels: make it smaller first"
                         ) from err
    except (OSError, SyntaxError) as err:
        raise ValueError(f"{name} cannot be read as an image: {err}") from err


def square(image, crop, isolate, name):
    """The square RGB image of an opened one, see `read`."""
    times = math.ceil(min(image.size) / MOST_SIDE)
    if times > 1 and not crop:      # JPEG is decoded at a half, a quarter or an eighth for it
        image.draft(None, (image.width // times, image.height // times))
    ImageOps.exif_transpose(image, in_place=True)
    box = crop_box(image.size, crop) if crop or not isolate else (0, 0, *image.size)
    if image.mode.startswith("I;"):
        image = eight_bits(image, name)
    times = math.ceil(math.sqrt((box[2] - box[0]) * (box[3] - box[1])) / MOST_SIDE)
    if times > 1 and image.mode in ("1", "P", "PA"):        # whose numbers have no mean
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    image = image.reduce(times, box) if times > 1 else image.crop(box)
    if image.mode in ("I", "F"):
        image = eight_bits(image, name)
    image = scenes.over_white(image)
    return centred_object(image) if isolate else image


def eight_bits(image, name):
    """The grey image of 8 bits of one of 16 bits or of floats, which do not tell what is white."""
    values = np.asarray(image)
    if image.mode.startswith("I"):
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))     # 65535 / 255
    finite = np.isfinite(values)
    if not finite.all():
        say(f"{name}: {values.size - finite.sum():,} pixels are not finite: infinite ones become "
            "white, the others black")
    largest = values[finite].max(initial=0)
    white = 65535 if largest > 255 else 255 if largest > 1 else 1
    values = np.nan_to_num(values.astype(np.float64), nan=0, posinf=white, neginf=0)
    return Image.fromarray((values / white * 255).clip(0, 255).astype(np.uint8))


def crop_box(size, crop):
    """(left, top, right, bottom) of a size's centre square, or of `crop` "left,top,side"."""
    width, height = size
    if not crop:
        side = min(size)
        left, top = (width - side) // 2, (height - side) // 2
    else:
        try:
            left, top, side = (int(part) for part in crop.split(","))
        except ValueError as err:
            raise ValueError(f"--crop {crop!r}: three whole numbers of pixels are needed, "
                             "left,top,side") from err
    if left < 0 or top < 0 or side < 1 or left + side > width or top + side > height:
        raise ValueError(f"--crop {crop}: the square does not lie in the image of {width}x{height}")
    return left, top, left + side, top + side


def centred_object(picture):
    """A square white image, what is not white in the middle, OBJECT_SHARE of it wide or high."""
    seen = (np.asarray(picture) < NEARLY_WHITE).any(-1)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows):
        raise ValueError("--object: the image is white all over")
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    side = max(math.ceil(max(width, height) / OBJECT_SHARE), 1)
    canvas = Image.new("RGB", (side, side), WHITE)
    canvas.paste(picture.crop(box), ((side - width) // 2, (side - height) // 2))
    return canvas


def reduce(picture, size, share=1.0):
    """The middle of a square image, `share` of its side, at `size` pixels.

    The mean over each pixel's exact area, as the reference reduces photos; bicubic to enlarge.
    """
    side = share * picture.width
    start = (picture.width - side) / 2
    if side < size:
        box = (start, start, start + side, start + side)
        return picture.resize((size, size), Image.Resampling.BICUBIC, box)
    edge = start + np.arange(size + 1) * (side / size)
    pixel = np.arange(picture.width)
    overlap = np.minimum(edge[1:, None], pixel + 1) - np.maximum(edge[:-1, None], pixel)
    weight = (overlap.clip(0) * (size / side)).astype(np.float32)       # (size, width)
    values = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)
    mean = weight @ values @ weight.T
    return Image.fromarray((mean + 0.5).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def scale_of(picture, weights):
    """The scale of a picture by the depth network: the 20% quantile of its depth over its middle's.

    weights: the file dpt_swin2_tiny_256.pt. The network's disparity is taken to be 1 / depth.
    """
    if not weights:
        raise ValueError("--scale auto needs --depth-weights dpt_swin2_tiny_256.pt")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no file of depth weights {weights}")
    with torch.no_grad():
        square = pictures.tensor(picture.resize((DEPTH_SIZE, DEPTH_SIZE)))
        disparity = networks.load_depth(weights)(square)
    far = 1 / disparity.clamp(min=1e-3 * disparity.max().item())
    return (camera.quantile_scale(far)[0] / middle(far[0]).median()).item()


def middle(image):
    """The middle third of (s, s), a ninth of it."""
    third = len(image) // 3
    return image[third:-third, third:-third]


# ---- a held-out view

def held_out_sources(config):
    """Yields the scenes.RawScenes of every source of a Config that has some. Raises ValueError,
    FileNotFoundError."""
    for source in config.sources:
        if scenes.is_stream(source.held_out):
            raise ValueError(f"source {source.name!r}: held-out shards are files, not commands")
        if source.held_out:
            yield scenes.open_source(source, config.data, config.image_size, held_out=True)


def held_out(config, number):
    """The middle view, HeldOut, of a scene of a Config whose sources the user named. Raises
    ValueError or FileNotFoundError where there is no such scene."""
    asked, known = number, 0
    for reader in held_out_sources(config):
        known += len(reader)
        if asked < known:
            number = asked - known + len(reader)
            break
    else:
        if not known:
            raise ValueError("the configuration names no held-out scenes with images: give an "
                             "IMAGE")
        raise ValueError(f"held-out scene {asked}: there are scenes 0 to {known - 1}")
    scene = reader.scene(number)
    view = len(scene.c2w) // 2
    known = torch.from_numpy(reader.depth(number, view))
    image = scenes.images(reader.image(number, view))
    scene_scale = scale_in_scene(config, reader, number, known, image)
    looked_at = middle(known)[middle(known) > 0]
    scale = scene_scale / looked_at.median().item() if len(looked_at) else SCALE
    picture = pictures.image(image)
    return HeldOut(picture, config.image_size, scene.fov, elevation_of(scene.c2w, view), scale,
                   reader, number, view, scene_scale)


@torch.no_grad()
def scale_in_scene(config, reader, number, known, image):
    """The length that a run's mode takes as one, in the scene's unit, as in its training.

    known (s, s): the view's depth, 0 unknown; image (3, s, s), whose holes the run's depth network
    fills. Without that network the scale is that of the depths that are known.
    """
    unit = camera.MODES[config.mode].unit
    if unit == "cameras":
        return reader.scene(number).radius
    if unit == "nearplane":
        return camera.stereomag_scale(torch.tensor(reader.nearplane(number))).item()
    if unit == "scene":
        return 1.0
    weights = config.depth_weights
    filler = networks.load_depth(weights) if weights and Path(weights).is_file() else None
    if filler is None and not (known > 0).any():
        return 1.0
    blend = config.quantile_blend or filler is None
    scale = depth.viewer_scale(known[None], image[None], filler, blend).item()
    return known[known > 0].quantile(camera.QUANTILE).item() if math.isnan(scale) else scale


def elevation_of(c2w, view):
    """Degrees of one of the cameras c2w (n, 4, 4), 0 unless all of them are level about z."""
    if c2w[:, 2, 0].abs().max() > LEVEL:
        return 0.0
    return math.degrees(math.asin(c2w[view, 2, 2].clamp(-1, 1).item()))
