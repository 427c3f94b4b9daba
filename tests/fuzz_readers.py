"""Mutated captures, which may be read or refused in one line, and nothing else.

    python tests/fuzz_readers.py --seconds 300

Files of a small valid capture of each format get changed bytes, numbers, words, cuts and repeats,
and are read as prepare.py and --path read them. Any exception but ValueError and OSError, a warning
of numpy's, more than 8 GB or more than ten seconds is a failure, whose files are kept in /dev/shm
or the temporary folder.
"""

import argparse
import functools
import gzip
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "captures")]

import numpy as np
import test_captures as made
from PIL import Image

from captures import datasets, own, resample
from runtime.command import reason
from views import paths, photos

SLOWEST, MOST_MEMORY = 10.0, 8 << 30        # seconds for one file, bytes
WORDS = [b"", *b'nan inf -1 0 1e999 1e-999 null true [] {} "x" 1 2147483648 99999999999999999999 '
         b"../x /dev/zero OPENCV FOV \0 \xff # 1e308 , \"depth_path\"".split(b" ")]
NUMBERS = [struct.pack(f"<{form}", value) for form, values in (
    ("q", (-1, 0, 1, 2**31, 2**63 - 1)), ("d", (float("nan"), float("inf"), 0.0, -1e300)),
    ("i", (-1, 0, 17, 2**31 - 1)), ("B", range(0, 256, 15))) for value in values]


def mutated(data, rng):
    """The bytes of a file with a few changes; of a gzipped one mostly what is in it."""
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.9:
        return gzip.compress(mutated(gzip.decompress(data), rng), 1)
    data, text = bytearray(data), data[:1] in b"#[{h7"
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, kind = rng.randrange(len(data) + 1), rng.random()
        if kind < 0.8 and text and (words := list(re.finditer(rb"[^\s,:\[\]{}]+", data))):
            start, end = rng.choice(words).span()
            data[start:end] = rng.choice(WORDS)
        elif kind < 0.8:
            number = rng.choice(NUMBERS)
            data[at:at + len(number)] = number
        elif kind < 0.9:
            data[at:at] = data[at:at + rng.randint(1, 200)]
        else:
            del data[at:at + rng.choice((1, 8, 64, len(data)))]
    return bytes(data)


def read_all(find, path):
    """Reads scenes as prepare.py does, two photos with depth of each; and a path's cameras."""
    datasets.co3d_frames.cache_clear()
    for capture in find()[0]:
        views, half, _ = resample.one_camera(capture.read()[0])
        for view, picture in resample.pictures(views[:2]):
            if isinstance(picture, resample.LeftOut):
                raise picture
            resample.square(view, picture, half, 16)
    if path:
        paths.read(path, 1.0)


def readers(root):
    """{reader: (pattern of the files that are changed, function of a changed one)}."""
    made.observations.__defaults__ = (60,)                          # points
    truths = {"wide": made.truth(0, made.WIDE), "tall": made.truth(1, made.TALL)}
    made.write_co3d(root / "co3d", truths)
    made.write_re10k(root / "re10k", truths)
    made.write_own(root, truths)
    wide, ngp = root / "nerfstudio/wide/transforms.json", root / "ngp/transforms.json"
    shutil.copytree(wide.parent, ngp.parent)
    ngp.write_text('{"integer_depth_scale": 0.001, "camera_angle_y": 1.0, "is_fisheye": false, '
                   + wide.read_text().replace("depth_file_path", "depth_path")[1:])
    (root / "list.json").write_text(json.dumps([np.eye(4).tolist()] * 2))
    for kind in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        Image.fromarray(truths["wide"].images[0]).save(root / f"a.{kind}")
    subprocess.run(["ffmpeg", "-v", "error", "-i", wide.parent / "images/%d.png", "-c:v", "mpeg4",
                    root / "video.mp4"], check=True)
    texts, models = root / "re10k/cameras", root / "re10k/models"
    finds = {
        "COLMAP binary": ("colmap/wide/sparse/0/*.bin", own.find_colmap, [root / "colmap/wide"],
                          "images", True),
        "COLMAP text": ("colmap/tall/sparse/*.txt", own.find_colmap, [root / "colmap/tall"],
                        "images", True),
        "nerfstudio": ("nerfstudio/wide/*.json", own.find_nerfstudio, [wide], True),
        "instant-ngp": ("ngp/*.json", own.find_nerfstudio, [ngp], True),
        "RealEstate10K": ("re10k/cameras/wide.txt", datasets.find_re10k, "re10k", texts,
                          root / "re10k/frames", "", models),
        "CO3D": ("co3d/toy/*.jgz", datasets.find_co3d, root / "co3d", [], 0.5, True),
        "depth maps": ("co3d/toy/*/depth*/*.png", datasets.find_co3d, root / "co3d", [], 0.5, True)}
    parts = {"COLMAP binary": "colmap/wide/sparse/0/images.bin", "nerfstudio": wide,
             "COLMAP text": "colmap/tall/sparse/images.txt", "instant-ngp": ngp,
             "RealEstate10K": texts / "wide.txt"}
    return {name: (pattern, lambda _, find=functools.partial(*find), path=parts.get(name): read_all(
                find, path and root / path)) for name, (pattern, *find) in finds.items()} | {
        "lists of matrices": ("list.json", lambda path: paths.read(path, 1.0)),
        "photos": ("a.*", photos.read),
        "videos": ("video.mp4", lambda path: list(
            resample.selected(path, resample.frame_times(path)[:2])))}


def fuzz(root, pattern, read, seconds, rng):
    """(files read, files refused in a line, CPU s) in so many seconds."""
    valid, counts = {path: path.read_bytes() for path in root.glob(pattern)}, [0, 0]
    for path in valid:
        read(path)                                                  # as they are, they are read
    end, busy = time.monotonic() + seconds, sum(os.times()[:4])
    while time.monotonic() < end:
        path = rng.choice(sorted(valid))
        path.write_bytes(mutated(valid[path], rng))
        refused, began = False, time.monotonic()
        try:
            read(path)
        except (ValueError, OSError) as err:
            assert 3 < len(reason(err)) < 1000, repr(err)
            refused = True
        counts[refused] += 1
        assert time.monotonic() - began < SLOWEST, f"{path} took too long"
        path.write_bytes(valid[path])
    return *counts, sum(os.times()[:4]) - busy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="a reader")
    parser.add_argument("--only", default="", help="one reader; else all")
    parser.add_argument("--seed", type=int, default=0, help="of the changes")
    args = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)
    warnings.simplefilter("ignore", UserWarning)                    # Pillow's, of a TIFF's tags
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    for name, (pattern, read) in readers(root).items():
        if name.startswith(args.only):
            fine, refused, busy = fuzz(root, pattern, read, args.seconds, random.Random(args.seed))
            print(f"{name}: {fine + refused} files, {fine} read, {refused} refused in one line, "
                  f"nothing else, in {args.seconds:g} s, {busy:.0f} s of CPU", flush=True)
    shutil.rmtree(root)                                             # after a failure it stays


if __name__ == "__main__":
    main()
