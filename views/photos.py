"""What views start from: a photo, or a held-out view of a run's own scenes.

A photo is made what the network saw in training: upright, opaque, square, of its size. The scale
says how many units of the paths (distances to what the photo looks at) the model takes as one.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

import camera
import depth
from runtime import networks
from views import pictures
from shards import scenes

FOV = 52.55                     # degrees; what ZeroNVS's own inference takes a photo to have
SCALE = 0.7                     # ZeroNVS's own inference
WHITE, NEARLY_WHITE = (255, 255, 255), 250      # background: all channels at least this
OBJECT_SHARE = 200 / 256        # zero123: the longer side of an object, in image sides
SIXTEEN_BITS = 65535
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


@dataclass
class HeldOut(Photo):
    """A view of a scene that was kept from training, whose other views are known."""
    reader: scenes.RawScenes
    number: int                 # of the scene
    view: int
    scene_scale: float          # the length in the scene's unit that the model takes as one


# ---- a file

def from_file(path, size, crop="", isolate=False):
    """The Photo in an image file; `read` says how. What a file cannot tell is ZeroNVS's default."""
    return Photo(read(path, crop, isolate), size, math.radians(FOV), 0.0, SCALE)


def read(path, crop="", isolate=False):
    """The square RGB image that is used of a file.

    Upright as EXIF says, transparency over white, the centre square (or `crop`, "left,top,side" in
    pixels). isolate: an object on white or transparent ground is centred as zero123 expects, in
    place of the crop.
    Raises FileNotFoundError, or ValueError for what is no image or a crop outside it.
    """
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            picture = over_white(upright)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"no image {path}") from err
    except (UnidentifiedImageError, IsADirectoryError) as err:
        raise ValueError(f"{path} is not an image that Pillow can read") from err
    except (OSError, SyntaxError, Image.DecompressionBombError) as err:
        raise ValueError(f"{path} cannot be read as an image: {err}") from err
    if isolate:
        picture = centred_object(picture)
    return picture.crop(crop_box(picture.size, crop))


def over_white(picture):
    """RGB version of any Pillow image, transparency over white, 16-bit grey in 8 bits."""
    if picture.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        # floats do not tell what is white
        whole = (SIXTEEN_BITS if picture.mode != "F" or values.max() > 255 else
                 255 if values.max() > 1 else 1)
        picture = Image.fromarray((values / whole * 255).clip(0, 255).astype(np.uint8))
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture).convert("RGB")


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
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(picture.crop(box), ((side - width) // 2, (side - height) // 2))
    return square


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
    with torch.no_grad():
        disparity = networks.load_depth(weights)(pictures.tensor(picture.resize((DEPTH_SIZE, DEPTH_SIZE))))
    far = 1 / disparity.clamp(min=1e-3 * disparity.max().item())
    return (camera.quantile_scale(far)[0] / middle(far[0]).median()).item()


def middle(image):
    """The middle third of (s, s), a ninth of it."""
    third = len(image) // 3
    return image[third:-third, third:-third]


# ---- a held-out view

def held_out(config, number):
    """The HeldOut view in the middle of a run's held-out scene.

    Raises ValueError or FileNotFoundError where the run has no such scene.
    """
    sources = [source for source in config.sources if source.held_out]
    if not sources:
        raise ValueError("the run has no held-out scenes with images: give an IMAGE")
    asked, known = number, 0
    for source in sources:
        reader = scenes.open_source(source, config.data, config.image_size, held_out=True)
        known += len(reader)
        if asked < known:
            number = asked - known + len(reader)
            break
    else:
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
