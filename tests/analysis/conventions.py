"""Captures of 20 photos whose cameras follow a wrong convention: how many does data.py verify find?

    python tests/analysis/conventions.py --captures 20

Scenes are rendered; cameras are right, have OpenCV's axes, are world-to-camera matrices or
mirrored; 60 depths a view are known, as of sparse points, or none.
"""

import argparse
import functools
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import numpy as np
import torch

from analysis import inspect as inspector
from captures import synth, writer
from shards.files import LocalFile
from shards.scenes import of_files

VIEWS, SIZE, SEED = 20, 64, 5
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])
CONVENTIONS = {"right": lambda c2w: c2w, "mirrored": lambda c2w: MIRROR @ c2w @ MIRROR,
               "OpenCV": lambda c2w: c2w @ np.diag([1.0, -1.0, -1.0, 1.0]),
               "world-to-camera": np.linalg.inv}


@functools.cache
def rendered(number):
    """(images (v, s, s, 3) uint8, depths (v, s, s), c2w, fov) of a synthetic scene."""
    scene, rng = synth.scene(SEED, number), np.random.default_rng(number)
    c2w = synth.cameras(scene, VIEWS, 1.0, np.radians(rng.uniform(-8, 8, (VIEWS, 2))))
    images, depths = synth.render(scene, c2w, scene.fov, SIZE)
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()
    return pixels.numpy(), depths.numpy(), c2w.numpy(), scene.fov


def write(path, capture, convention, points):
    """Writes a shard of a capture with so many known depths a view."""
    images, depths, c2w, fov = capture
    known = np.tile(np.arange(SIZE * SIZE) < points, (VIEWS, 1))
    known = np.random.default_rng(0).permuted(known, axis=1)
    sparse = np.where(known.reshape(depths.shape), depths, 0) if points else None
    writer.write_shard(path, [writer.raw_scene("re10k", "a/b", images, sparse,
                                               CONVENTIONS[convention](c2w), fov)])


def accused(path):
    """Whether verify ends with status 1 for a shard."""
    return inspector.main(["verify", str(path), "--workers", "1"]) == 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captures", type=int, default=20, help="of each kind (%(default)s)")
    count = parser.parse_args().captures
    torch.set_num_threads(1)
    for points in (60, 0):
        found = Counter()
        for number in range(count):
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder) / "a.tar", rendered(number), "right", points)
                file = LocalFile(Path(folder) / "a.tar")
                source = of_files("a", "re10k", [file], SIZE, keep=False)
                (means,), own = inspector.matched(source, 0), inspector.AS_THEY_ARE
            # each is its own inverse: of wrong cameras, the right ones are among the conventions
            found += Counter({name: means[own] > means[name] + inspector.BETTER
                              for name in CONVENTIONS if name != "right"})
            found["right"] += max(means.values()) > means[own] + inspector.BETTER
        print(f"{points} depths a view, accused of {count}: "
              + ", ".join(f"{name} {found[name]}" for name in CONVENTIONS), flush=True)


if __name__ == "__main__":
    main()
