"""Mutates checkpoints and reads them: nothing but one-line errors may come of it.

    python tests/fuzz_checkpoints.py 100000 [SEED]

Each file is one of tests/golden/checkpoints with 1 to 3 changes: bytes replaced, cut out or
repeated, more often near the start; a number of its pickle or header made extreme; or its pickle
spliced with another's. It is read, described by `info` and every tensor is asked for.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runtime import checkpoint, foreign        # noqa: E402
from runtime.command import progress        # noqa: E402

FILES = sorted((ROOT / "tests/golden/checkpoints").iterdir())
EXTREME = [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\xff\xff\xff\x7f", b"9" * 20, b"1e999",
           b"-1", b"[[[[[[[[", b"((((((((", b"}]})h\0R\x81b.", b"h\0h\1\x86", b"\x8a\xff",
           b"I9999999999\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"\x94\x93\x8c\x90"]


def mutate(generator, contents):
    """One of the contents, changed."""
    data = bytearray(contents[generator.integers(len(contents))])
    for _ in range(generator.integers(1, 4)):
        at = int(len(data) * generator.random() ** 2)
        length, kind = int(generator.integers(1, 9)), generator.integers(5)
        if kind == 0:
            data[at:at + length] = generator.bytes(length)
        elif kind == 1:
            del data[at:at + length * 20]
        elif kind == 2:
            data[at:at] = data[at:at + length * 20]
        elif kind == 3:
            extreme = EXTREME[generator.integers(len(EXTREME))]
            data[at:at + len(extreme)] = extreme
        else:
            other = contents[generator.integers(len(contents))]
            start = int(len(other) * generator.random())
            data[at:at + length * 40] = other[start:start + length * 40]
    return bytes(data)


def run(count, seed, folder):
    """(files read, files refused, seconds of the slowest) of `count` mutated files. Raises
    whatever is no one-line error."""
    generator, read, refused, slowest = np.random.default_rng(seed), 0, 0, 0.0
    contents, path = [file.read_bytes() for file in FILES], Path(folder) / "mutated.ckpt"
    for number in progress(range(count), "mutated checkpoints", "files"):
        data = mutate(generator, contents)
        path.write_bytes(data)
        start = time.monotonic()
        try:
            found = foreign.read_file(path)
            for name in found:
                found[name]
            checkpoint.info(path)
            read += 1
        except ValueError as error:
            assert "\n" not in str(error) and path.name in str(error), f"file {number}: {error}"
            refused += 1
        except Exception:
            Path("fuzzed.ckpt").write_bytes(data)
            print(f"file {number} of seed {seed} is kept as fuzzed.ckpt", file=sys.stderr)
            raise
        slowest = max(slowest, time.monotonic() - start)
    return read, refused, slowest


if __name__ == "__main__":
    amount, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as place:
        good, bad, worst = run(amount, first, place)
    print(f"{amount:,} mutated checkpoints: {good:,} read, {bad:,} refused in one line each, "
          f"the slowest took {worst:.2f} s")
