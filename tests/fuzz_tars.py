"""Mutated shards, which may be read or refused in one line, and nothing else.

    python tests/fuzz_tars.py --count 1000000 --seed 0

Raw, encoded and plain tars in three formats get changed bytes, cuts, moved blocks and changed words
of JSON, most of them with header checksums made good again, and are indexed and read. Any exception
but ValueError's one line, a wrong span, or more than ten seconds is a failure, whose file is kept.
"""

import argparse
import io
import os
import random
import sys
import tarfile
import tempfile
import time
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np

from captures import encode
from data import Pairs
from made import SIDE, encoded_scene, re10k_metadata, scene_members, write_tar
from runtime.command import progress
from shards import scenes
from shards.files import LocalFile

SLOWEST = 10.0                  # seconds for one file
WORDS = [b"1e999", b"-1", b"null", b"[]", b"{}", b"2147483648", b"0.5", b"NaN", b'""', b"1e300"]
ENCODED_SIDE = 32               # pixels of the images of made.encoded_scene


def originals():
    """[(format, image size, bytes)] of the shards that are mutated."""
    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        short = kind == tarfile.USTAR_FORMAT
        co3d = scene_members("n" * 90 + "/" + "m" * (5 if short else 90), views=2)
        for format, side, members in (
                ("co3d", SIDE, co3d | scene_members("a/b", views=2) if short else co3d),
                ("re10k", SIDE, scene_members("a/b", views=2, metadata=re10k_metadata)),
                ("encoded", ENCODED_SIDE, {f"a/{seed}.safetensors": encode.member(
                    **encoded_scene(seed, views=2)) for seed in range(2)})):
            file = io.BytesIO()
            write_tar(file, members, kind)
            found.append((format, side, file.getvalue()))
    return found


def mutated(content, rng):
    """The bytes with one to six changes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        if len(content) < 1024:
            break
        at, change = rng.randrange(len(content)), rng.random()
        if change < 0.45:
            content[at] = rng.choice((0, 255, 0x20, rng.randrange(256)))
        elif change < 0.65:             # a header's own fields: name, size, type
            at = at // 512 * 512 + rng.choice((0, 99, 124, 130, 135, 156, 157, 345))
            content[at:at + 1] = bytes([rng.choice((*b"0579xXLKgS/", 0x80, 0xff, 0))])
        elif change < 0.85:             # a number or word of JSON
            at = content.find(rng.choice((b"[", b":", b", ", b"]")), at)
            if at >= 0:
                word = rng.choice(WORDS)
                content[at + 1:at + 1 + len(word)] = word
        elif change < 0.93:
            block = at // 512 * 512
            content[block:block] = content[:512 * rng.randint(1, 3)]
        else:
            del content[at:at + rng.choice((1, 512, len(content)))]
        if rng.random() < 0.7:          # a good checksum lets the change in
            block = at // 512 * 512
            header = content[block:block + 512]
            if len(header) == 512 and header[257:262] == b"ustar":
                total = 256 + sum(header[:148]) + sum(header[156:])
                content[block + 148:block + 156] = b"%06o\0 " % total
    return bytes(content)


def read(path, format, side):
    """Whether there was a scene in it; ValueError, one line, where there was none."""
    source = scenes.of_files("fuzz", format, [LocalFile(path)], side, keep=False)
    for shard in source.shards:
        assert np.isfinite(shard.c2w).all() and np.isfinite(shard.radius).all()
        assert (np.diff(shard.starts) >= 2).all()
    pairs = Pairs([source], [1.0], 0, side, "7dof_quantile_scale")
    assert pairs[0]["cond_c2w"].isfinite().all()


def fuzz(count, seed, folder):
    """Counts of what came of `count` files: (read, refused). Raises what must not be."""
    rng, sources, outcomes = random.Random(seed), originals(), [0, 0]
    path = Path(folder) / "fuzz.tar"
    for _ in progress(range(count), "mutated tars", "files"):
        format, side, content = rng.choice(sources)
        path.write_bytes(mutated(content, rng))
        began = time.monotonic()
        try:
            read(path, format, side)
            outcomes[0] += 1
        except ValueError as err:
            assert str(err) and "\n" not in str(err), repr(str(err))
            outcomes[1] += 1
        assert time.monotonic() - began < SLOWEST, "it took too long"
    return tuple(outcomes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (%(default)s)")
    given = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)
    # a thread for every file, which has one shard, costs as much as to read it
    scenes.ThreadPoolExecutor = lambda threads: nullcontext(types.SimpleNamespace(map=map))
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    began = time.monotonic()
    try:
        read_well, refused = fuzz(given.count, given.seed, folder)
    except BaseException:
        print(f"the file is {folder}/fuzz.tar", file=sys.stderr)
        raise
    print(f"{given.count} mutated tars: {read_well} read, {refused} refused in one line, nothing "
          f"else, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
