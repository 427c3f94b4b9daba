"""Which kind of shard a file is: raw in which layout, or encoded, and of which image size."""

import io
import json

from PIL import Image

from shards.files import TarError, Window
from shards.index import ENCODED_MEMBER, LATENT_SHRINK, MEMBER
from shards.streams import find_shards
from shards.tar import tar_members

FORMATS = ("co3d", "re10k", "acid", "encoded")


def detect(file):
    """(format, image_size) of a shard, by its first members that can be read. Raises ValueError."""
    window, side, format, damage = Window(file), None, None, ""
    try:
        for name, offset, size in tar_members(window):
            try:
                if ENCODED_MEMBER.fullmatch(name):
                    length = int.from_bytes(window.read(offset, 8), "little")
                    header = json.loads(window.read(offset + 8, min(length, size)))
                    return "encoded", header["moments"]["shape"][2] * LATENT_SHRINK
                match = MEMBER.fullmatch(name)
                if match and match[3] == "_metadata.json" and not format:
                    fields = json.loads(window.read(offset, size))
                    format = "re10k" if "extrinsics" in fields else "co3d"
                elif match and match[3] != "_depth.png" and not side:
                    side = min(Image.open(io.BytesIO(window.read(offset, size))).size)
            except TarError:
                raise
            except Exception as err:    # on damaged bytes Pillow raises anything
                damage = damage or f"; {name}: {str(err) or type(err).__name__}"
            if side and format:
                return format, side
    except TarError as err:
        raise ValueError(str(err)) from err
    raise ValueError(f"{file.name}: no scene in it that data.py reads{damage}")


def groups(patterns, format, side, unread=None):
    """{(format, image size): files} of the shards that the patterns name.

    Raises ValueError for one that is none; with a list `unread` it goes there.
    """
    found = {}
    for file in (file for pattern in patterns for file in find_shards("", pattern)):
        try:
            kind = (format, side) if format and side else detect(file)
        except ValueError as err:
            if unread is None:
                raise
            unread.append(str(err))
            continue
        found.setdefault((format or kind[0], side or kind[1]), []).append(file)
    return found
