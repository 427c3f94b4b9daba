"""Writes raw scenes: images, depths and cameras as the members of tars, in ZeroNVS's layouts.

A raw scene is, for every view, `category/scene/frame000001.png`, `..._depth.png` (16-bit PNG whose
words are float16 bits, 0 where unknown) and `..._metadata.json`. Letters: `v` views, `h w` pixels.
"""

import io
import itertools
import json
import math
import os
import struct
import tarfile
import zlib

import numpy as np
import torch
from PIL import Image

from runtime.files import unfinished

# from OpenGL camera axes (right, up, back) to pytorch3d's (left, up, forward)
PYTORCH3D = np.diag([-1.0, 1.0, -1.0])
LOSSY = {"jpg": dict(format="JPEG", quality=95), "webp": dict(format="WEBP", quality=92)}
HALF_INFINITY = 0x7C00          # its float16 bits; those of NaN, and of less than 0, are larger


def write_shard(path, scenes):
    """Writes scenes, each a list of (member name, bytes), as a tar at `path`, complete or not.

    The tar's bytes depend on the members alone: ustar, no times, no owners. Raises OSError with the
    file's name, as of a full disk.
    """
    with unfinished(path) as partial, open(partial, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in itertools.chain.from_iterable(scenes):
                member = tarfile.TarInfo(name)          # time, owner and group are 0
                member.size = len(content)
                try:
                    tar.addfile(member, io.BytesIO(content))
                except ValueError as err:               # as of 200 characters
                    raise ValueError(f"{path}: no member of it can be {name!r}: {err}") from err
        file.flush()
        os.fsync(file.fileno())


# ---- members

def png_bytes(samples):
    """The PNG file of samples (h, w, 3) uint8 or (h, w) uint16.

    Every row is stored as its difference to the one above: half the time of a coder that chooses
    among filters, for a few per cent more bytes.
    """
    depth, color = (8, 2) if samples.ndim == 3 else (16, 0)         # bits, RGB or grey
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").view(np.uint8) if depth == 16 else samples
    rows = rows.reshape(height, -1)
    lines = np.full((height, rows.shape[1] + 1), 2, np.uint8)       # a leading 2: "up"
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data
        file += struct.pack(">I", zlib.crc32(kind + data))
    return file


def image_bytes(image, image_format):
    """The file of an RGB image (h, w, 3) uint8; `image_format` is png or one of LOSSY."""
    if image_format == "png":
        return png_bytes(image)
    file = io.BytesIO()
    Image.fromarray(image).save(file, **LOSSY[image_format])
    return file.getvalue()


def depth_bytes(depth):
    """The 16-bit PNG of a depth (h, w) float32: float16 bits; what is unknown or too large is 0."""
    # torch rounds as numpy does, in a twentieth of the time
    words = torch.from_numpy(depth).half().view(torch.uint16).numpy()
    words[words >= HALF_INFINITY] = 0
    return png_bytes(words)


def co3d_metadata(c2w, fov, scale_adjustment):
    """Metadata of a square view in the co3d layout: OpenGL c2w (4, 4) float64, fov in radians.

    pytorch3d multiplies rows, x_cam = x_world R + T; focal lengths are in half image sides.
    """
    w2c = np.linalg.inv(c2w)
    focal = 1 / math.tan(fov / 2)
    return {"R": (PYTORCH3D @ w2c[:3, :3]).T.tolist(), "T": (PYTORCH3D @ w2c[:3, 3]).tolist(),
            "focal_length": [focal, focal], "principal_point": [0.0, 0.0],
            "scale_adjustment": scale_adjustment}


def re10k_metadata(c2w, fov, size):
    """Metadata of a square view, `size` pixels, in the re10k layout: OpenGL c2w, fov in radians."""
    slope = 2 * math.tan(fov / 2) / size            # of the ray, a pixel
    corner = -math.tan(fov / 2)
    return {"extrinsics": c2w.tolist(),
            "intrinsics": [[slope, 0.0, corner], [0.0, slope, corner], [0.0, 0.0, 1.0]]}


def raw_scene(layout, name, images, depths, c2w, fov, image_format="png", scale_adjustment=1.0):
    """The members of a raw scene `name` (category/scene): a list of (member name, bytes).

    images (v, h, h, 3) uint8, depths (v, h, h) with 0 for unknown, or None for a scene without,
    OpenGL c2w (v, 4, 4) float64 in the same unit, fov in radians, numpy arrays all. Readers
    multiply the stored depth by `scale_adjustment`, which only co3d has. The original's reader
    needs depths: a scene without gets zeros, and metadata that say so to ours.
    """
    members = []
    for i, (image, pose) in enumerate(zip(images, c2w)):
        frame = f"{name}/frame{i + 1:06d}"
        metadata = (co3d_metadata(pose, fov, scale_adjustment) if layout == "co3d" else
                    re10k_metadata(pose, fov, image.shape[1]))
        if depths is None:
            metadata["depth_known"], depth = False, np.zeros(image.shape[:2], np.float32)
        else:
            depth = depths[i] / scale_adjustment if layout == "co3d" else depths[i]
        members.append((f"{frame}.{image_format}", image_bytes(image, image_format)))
        members.append((f"{frame}_depth.png", depth_bytes(depth)))
        members.append((f"{frame}_metadata.json", json.dumps(metadata).encode()))
    return members
