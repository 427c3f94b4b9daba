"""Shards to pairs: pairs of views by number, the mixture of sources, a loader.

    python data.py inspect "data/synth/*/train-*.tar" --out inspect.png
    python data.py verify "data/synth/*/*.tar"

Which pair number k is follows from (seed, k) alone, whatever the ranks and workers. shards/ reads
files: tars of scenes, raw (images, depths, cameras) or encoded (what the frozen networks say of
these). Letters: `s` side of the square images in pixels, `c h w` of a latent.
"""

import hashlib
import itertools
import logging
import math
import struct
import sys
from bisect import bisect_right
from collections import Counter

from runtime import command

if __name__ == "__main__":      # answered before torch, which takes seconds, is imported
    from analysis import shards_parser

    command.parse(shards_parser())

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

import camera
from runtime import workers
from runtime.workers import DEAD_WORKER, is_dead_worker
from shards.files import Damaged
from shards.index import whole_matrices
from shards.scenes import distinct, examples, images, open_source

__all__ = ["DEAD_WORKER", "Batches", "Pairs", "check_damage", "images", "is_dead_worker",
           "open_source"]

log = logging.getLogger(__name__)

MAX_DRAWS = 100                     # draws for one pair before giving up
MIN_DRAWS = 200                     # draws before the share of damaged ones counts


# ---- pairs

class Pairs(Dataset):
    """Pair k is a function of (seed, k). pairs[k] is a dict:

    image_cond, image_target   uint8 (3, s, s); of raw shards
    moments_target             float16 (2c, h, w), mean over logvar; of encoded shards
    mean_cond                  float16 (c, h, w); of encoded shards
    clip_cond                  float16 (d,), the embedding of the cond view; of encoded shards
    scale                      float64 (), that of the cond view; encoded, where it is the viewer's
    cond_c2w, target_c2w       float64 (4, 4), OpenGL
    fov                        float64 (), radians, of the scene's first stored view
    radius                     float64 (), of the scene
    nearplane                  float64 (), the scene's near-plane quantile; raw, nan in other modes
    depth_cond                 float32 (s, s), 0 unknown; raw, where the mode needs_depth
    number                     int64 (), k
    uid                        "shard.tar:category/scene:i->j", i cond, j target, in frame order
    damage                     "source<tab>reason<tab>where", a line for each draw that failed

    The source is drawn by probability, its scene by the number of views, then two of these. What is
    damaged is replaced by the next draw of the same k from the same source. `ordered` is for
    scores: every pair of every scene once, the first ones spread evenly over the scenes.
    """

    def __init__(self, readers, probabilities, seed, image_size, mode, ordered=False):
        if len(readers) != len(probabilities) or abs(sum(probabilities) - 1) > 1e-6:
            raise ValueError(f"{len(readers)} sources need as many probabilities of sum 1, "
                             f"not {list(probabilities)}")
        camera.mode_named(mode)
        if any(reader.image_size != image_size for reader in readers):
            raise ValueError(f"image_size {image_size} is not that of the sources")
        kinds = {reader.kind: f"{reader.name} has {reader.kind}" for reader in readers}
        if len(kinds) > 1:
            raise ValueError(f"raw and encoded sources do not mix: {', '.join(kinds.values())}")
        self.readers, self.seed, self.mode = list(readers), seed, mode
        self.probabilities = tuple(probabilities)
        self.shares = list(itertools.accumulate(probabilities))
        self.rounds = None
        if ordered:             # round c takes the c-th pair of every scene that has so many
            for reader in readers:
                if not hasattr(reader, "counts"):
                    raise ValueError(f"source {reader.name!r} is a stream, which has no fixed "
                                     "pass: scores need shards in files or on the web")
            counts = np.concatenate([reader.counts for reader in readers])
            self.pairs_of = counts * (counts - 1)
            self.scene_order = np.array(sorted(range(len(counts)),
                                               key=lambda scene: self.words("scene", scene)))
            upto = np.searchsorted(np.sort(self.pairs_of), np.arange(self.pairs_of.max()), "right")
            self.rounds = np.cumsum(len(counts) - upto)

    def __len__(self):
        return 1 << 62 if self.rounds is None else int(self.rounds[-1])

    def words(self, *key):
        """Four random 64-bit words that belong to the seed and a key."""
        # departs: which pair comes when follows from the seed and its number alone; the reference
        # shuffles in a buffer, by a generator whose state nobody saves
        # [test_the_sequence_is_the_same_for_any_ranks_workers_and_restarts]
        text = " ".join(map(str, (self.seed, *key)))
        return struct.unpack("<4Q", hashlib.blake2b(text.encode(), digest_size=32).digest())

    def draw(self, k, attempt=0):
        """(source, what its `pair` takes) of pair k, after `attempt` damaged draws: scene, cond
        view, target view."""
        if self.rounds is not None:
            source, *views = self.draw_in_order(k)
            if not attempt:
                return source, *views
        else:                   # min: the shares may sum to a hair less than 1
            share = self.words(k, 0)[0] / 2.0**64
            source = min(bisect_right(self.shares, share), len(self.readers) - 1)
        words = self.words(k, attempt)
        return source, *self.readers[source].draw(words, k, self.probabilities[source], self.seed)

    def draw_in_order(self, k):
        """The same for the fixed pass: round c shows pair start + c * stride of each scene."""
        c = int(np.searchsorted(self.rounds, k, "right"))
        place = k - (int(self.rounds[c - 1]) if c else 0)
        scene = int(self.scene_order[self.pairs_of[self.scene_order] > c][place])
        pairs = int(self.pairs_of[scene])
        start, stride, *_ = self.words("pair", scene)
        while math.gcd(stride, pairs) > 1:                      # all pairs before any again
            stride += 1
        source = 0
        while scene >= len(self.readers[source]):
            scene, source = scene - len(self.readers[source]), source + 1
        n = int(self.readers[source].counts[scene])
        return source, scene, *distinct((start + c * stride) % pairs, n)

    def __getitem__(self, k):
        if not 0 <= k < len(self):
            raise IndexError(f"pair {k} of {len(self)}")
        return {name: values[0] for name, values in self.__getitems__([k]).items()}

    def __getitems__(self, numbers):
        """A batch of pairs: the tensors of pairs[k] stacked, `uid` and `damage` lists."""
        pairs = [self.read_pair(k) for k in numbers]
        batch = {name: [pair[name] for pair in pairs] for name in pairs[0]}
        lists = {name: batch.pop(name) for name in ("uid", "damage")}
        batch = {name: np.array(values) for name, values in batch.items()}
        for name in ("cond_c2w", "target_c2w"):
            batch[name] = whole_matrices(batch[name])
        for name in batch.keys() & {"image_cond", "image_target"}:
            # channels last, as PNGs are stored and convolutions like it
            batch[name] = batch[name].transpose(0, 3, 1, 2)
        return {**{name: torch.from_numpy(values) for name, values in batch.items()},
                "number": torch.tensor(numbers), **lists}

    def read_pair(self, k):
        """The dict of pair k, or of what replaces it, from its source's reader."""
        damage = []
        for attempt in range(MAX_DRAWS):
            source, *place = self.draw(k, attempt)
            reader = self.readers[source]
            try:
                pair = reader.pair(self.mode, *place)
                pair["damage"] = "\n".join(damage)
                return pair
            except Damaged as err:
                damage.append(f"{reader.name}\t{err.reason}\t{' '.join(str(err).split())}")
        found = sorted({line.split("\t")[2] for line in damage})
        raise ValueError(f"source {reader.name!r}: {MAX_DRAWS} damaged draws on end: "
                         f"{examples(found)}")


# ---- loader

class Batches(Sampler):
    """The numbers of the pairs that one rank reads in steps start_step .. steps - 1.

    Step t has pairs t * batch_size .. (t + 1) * batch_size - 1. Rank r has the r-th of `world`
    slices of them, in micro-batches of at most micro_batch pairs.
    """

    def __init__(self, start_step, steps, batch_size, micro_batch, rank=0, world=1):
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide among {world} processes")
        self.steps, self.batch_size = range(start_step, steps), batch_size
        self.share, self.rank, self.micro_batch = batch_size // world, rank, micro_batch

    def __iter__(self):
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.share
            for at in range(first, first + self.share, self.micro_batch):
                yield list(range(at, min(at + self.micro_batch, first + self.share)))


class Loader(workers.Loader):
    """The micro-batches of Batches: Pairs' dicts stacked, `uid` a list. It takes `damage` out of
    them; say(line) is told of everything damaged, once. Raises ValueError, in the loop, once more
    than `max_damaged` of the draws were damaged. `report`: {source: Counter of damaged draws by
    reason}."""

    def __init__(self, pairs, batches, workers=0, device="cpu", max_damaged=0.05, say=log.warning):
        super().__init__(pairs, batches, workers, device, say)
        self.report = {reader.name: Counter() for reader in pairs.readers}
        self.max_damaged, self.draws, self.logged = max_damaged, 0, {}  # in the order they were met

    def __iter__(self):
        for batch in super().__iter__():
            self.count(batch.pop("damage"))
            yield batch

    def count(self, damage):
        """Books the damage of one batch. Raises ValueError when the run has seen too much."""
        lines = [line for pair in damage for line in pair.splitlines()]
        self.draws += len(damage) + len(lines)
        for source, reason, where in (line.split("\t") for line in lines):
            self.report[source][reason] += 1
            if where not in self.logged:
                self.logged[where] = True
                self.say(f"{source}: another pair replaces a damaged one: {where}")
        check_damage(*self.counts(), self.max_damaged, examples(list(self.logged)))

    def counts(self):
        """Draws of this process so far, and how many of them were damaged."""
        return self.draws, sum(reasons.total() for reasons in self.report.values())


def check_damage(draws, damaged, most, where):
    """Raises ValueError if more than the share `most` of many draws were damaged."""
    if draws >= MIN_DRAWS and damaged > most * draws:
        raise ValueError(f"{damaged} of {draws} draws were damaged, more than {most:.0%}: {where}")


if __name__ == "__main__":
    from analysis import inspect as inspector

    command.run("data.py", inspector.main, sys.argv[1:])
