"""Encoded shards: what the frozen networks make of every view, computed once.

    python prepare.py encode data/co3d/train-*.tar --weights zero123-xl.ckpt --out data/encoded/co3d
    torchrun --nproc_per_node 8 prepare.py encode ...

A member `category/scene.safetensors` a scene, with arrays over its n views:

    moments   float16 (n, 2c, h, w)  the autoencoder's posterior, mean over log-variance
    clip      float16 (n, d)         CLIP's image embedding
    c2w       float64 (n, 4, 4)      OpenGL camera-to-world
    fov       float64 (n,)           radians
    scale     float64 (n,)           20% quantile of the view's dense depth; nan where not known

and the scene's `radius`, `nearplane` and `quantile_blend` as metadata. shards/index.py reads them.
"""

import itertools
import json
import os
import sys
import time
import zlib
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from runtime import checkpoint
import clip
import engine
from runtime.networks import load_depth
from runtime.cost import ceiling, flops_of
from runtime.ranks import device_of, leave, own_device
import vae
from depth import viewer_scale
from captures.make import ahead, check_out
from captures.writer import write_shard
from runtime.command import progress
from runtime.files import write_text
from runtime.foreign import pack
from shards.detect import groups
from shards.files import Damaged
from shards.scenes import images, nearplane_quantile, of_files

ENCODE_VERSION = 1
FEWEST_VIEWS = 2                # of a scene: a pair
EMBEDDING = 768                 # CLIP's numbers of a view
MOST_LOADERS = 16               # processes that decode images, unless told
START = 2**16                   # bytes
PATIENCE = timedelta(days=30)   # of a rank that is done, with the others


def member(moments, clip, c2w, fov, scale, radius, nearplane, blend=True):
    """The bytes of one scene's member, from tensors as listed above, two numbers and whether the
    scales were blended."""
    n = len(moments)
    arrays = {"moments": moments.half(), "clip": clip.half(), "c2w": c2w.double(),
              "fov": fov.double(), "scale": scale.double()}
    for name, array in arrays.items():
        assert len(array) == n, f"{name} is not of {n} views"
    told = {"radius": repr(float(radius)), "nearplane": repr(float(nearplane)),
            "quantile_blend": str(bool(blend)).lower()}
    return b"".join(bytes(part) for part in pack(arrays, told))


class Frozen(nn.Module):
    """The networks that never change, under the checkpoint's names; `depth_net` may be None."""

    def __init__(self, autoencoder, embedder, depth_net=None, blend=True):
        super().__init__()
        self.first_stage_model, self.cond_stage_model = autoencoder, nn.Module()
        self.cond_stage_model.model = embedder
        self.depth_net, self.blend = depth_net, blend

    @torch.no_grad()
    def forward(self, image, known):
        """Views (b, 3, h, w) in [-1, 1] and their depths (b, h, w), 0 unknown -> moments
        (b, 2c, h / 8, w / 8), embeddings (b, d), scales (b,)."""
        mean, logvar = self.first_stage_model.encode(image)
        embedding = self.cond_stage_model.model.encode_image(image)
        return (torch.cat([mean, logvar], dim=1), embedding,
                viewer_scale(known, image, self.depth_net, self.blend))


def load(weights, depth_weights, blend, device):
    """The Frozen networks of zero123's file and of the depth network's. Raises ValueError."""
    with torch.device("meta"):
        networks = Frozen(vae.AutoencoderKL(), clip.CLIP())
    checkpoint.load_model(networks, weights)
    networks.depth_net = load_depth(depth_weights) if depth_weights else None
    networks.blend = blend
    engine.convert(networks)
    return networks.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def halve_weights(network):
    """Products and convolutions get weights in bf16: what autocast would cast them to for every
    batch, so that the results are the same, bit for bit."""
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.weight.data = part.weight.data.bfloat16()


# ---- a shard

class Views(Dataset):
    """The views of a RawScenes, one after the other: (image, depth), or why there is none."""

    def __init__(self, source):
        self.source = source
        self.places = [(scene, view) for scene in range(len(source))
                       for view in range(int(source.counts[scene]))]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        try:
            return (torch.tensor(self.source.pixels(*self.places[i])).permute(2, 0, 1),
                    torch.from_numpy(self.source.depth(*self.places[i])))
        except Damaged as err:
            return err


def stack(items):
    """A batch of what `Views` gives: (a problem or "" of each, images, depths of those without)."""
    good = [item for item in items if not isinstance(item, Damaged)]
    stacked = [torch.stack(part) for part in zip(*good)] or [None, None]
    return [str(item) if isinstance(item, Damaged) else "" for item in items], *stacked


class Shard:
    """A raw shard that is open: its scenes, and batches of their views, which are being decoded."""

    def __init__(self, file, format, side, path, args, device):
        self.file, self.path = file, path
        self.source = of_files(file.name, format, [file], side)
        self.batches = iter(DataLoader(Views(self.source), args.batch, collate_fn=stack,
                                       num_workers=args.loaders, pin_memory=device.type == "cuda"))
        self.problems = list(self.source.problems)


class Encoder:
    """The networks at work on shards, and how long that took.

    seen, waited: views so far, and the seconds that their images were waited for; first: (views,
    seconds waited, time) of the first batch, for which networks are compiled
    """

    def __init__(self, networks, args, device, views):
        self.networks, self.args, self.device = networks, args, device
        self.seen, self.waited, self.first, self.started = 0, 0.0, None, time.perf_counter()
        quiet = int(os.environ.get("RANK", 0)) > 0
        self.ticks = progress(itertools.repeat(None), f"encode on {device}", "views", views, quiet)

    def launched(self, batches):
        """Yields (problems, results that a GPU may still be computing, depths, the event that ends
        them) of every batch."""
        autocast = (torch.autocast(self.device.type, torch.bfloat16)
                    if self.args.precision == "bf16" else nullcontext())
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            problems, pixels, known = batch
            rows, done = (), torch.cuda.Event() if self.device.type == "cuda" else None
            if pixels is not None:
                # compiled, every number of views would be compiled anew
                size = self.args.batch if self.args.compile else len(pixels)
                with autocast:
                    rows = self.networks(
                        images(filled(pixels, size).to(self.device, non_blocking=True)),
                        filled(known, size).to(self.device, non_blocking=True))
                rows = [part.float().to("cpu", non_blocking=True) for part in rows]
            if done:
                done.record()
            yield problems, rows, known, done

    def views(self, batches):
        """Yields (problem or "", (moments, embedding, scale), depth) of every view, in order."""
        for problems, rows, known, done in one_ahead(self.launched(batches)):
            if done:
                done.synchronize()
            self.first = self.first or (len(problems), self.waited, time.perf_counter())
            rows = zip(*rows, () if known is None else known)
            for problem in problems:
                next(self.ticks)
                self.seen += 1
                *made, depth = (None, None) if problem else next(rows)
                yield problem, made, depth

    def scenes(self, shard):
        """Yields the members of every scene of a Shard, then writes its note. Raises Damaged where
        there is none."""
        views, made = self.views(shard.batches), 0
        for number in range(len(shard.source)):
            scene, kept = shard.source.scene(number), []
            for view in range(len(scene.c2w)):
                problem, arrays, depth = next(views)
                if problem:
                    shard.problems.append(problem)
                else:
                    kept.append((view, depth.numpy(), *arrays))
            if len(kept) < FEWEST_VIEWS:
                continue
            made += 1
            of_scene, depths, *arrays = zip(*kept)
            moments, embeddings, scales = map(torch.stack, arrays)
            yield [(f"{scene.name}.safetensors", member(
                moments, embeddings, scene.c2w[list(of_scene)],
                torch.full((len(kept),), scene.fov, dtype=torch.float64), scales, scene.radius,
                nearplane_quantile(depths), self.networks.blend))]
        if not made:
            raise Damaged(shard.source.name, f"none of its {len(shard.source)} scenes has "
                          f"{FEWEST_VIEWS} views that can be encoded, so there is no shard of it")
        note = {"raw": {"path": shard.file.path, "start": start(shard.file)},
                "left_out": shard.problems}
        write_text(shard.path.with_suffix(".json"), json.dumps(note, indent=1))

    def rates(self, seconds_a_view):
        """The line at the end; the first batch, for which networks are compiled, is left out of the
        second rate. seconds_a_view: at the chip's ceiling, 0 unknown."""
        now = time.perf_counter()
        line = (f"{self.seen} views in {now - self.started:.1f} s: "
                f"{self.seen / (now - self.started):.1f} views/s on {self.device}")
        views, waited, began = self.first
        if self.seen == views:
            return line
        rate = (self.seen - views) / (now - began)
        waiting = (self.waited - waited) / (now - began)
        line += (f", {rate:.1f} after the first {views}; {waiting:.0%} of that time waiting for "
                 "images")
        return line + (f", {rate * seconds_a_view:.0%} of the rate of a large product"
                       if seconds_a_view else "")


def one_ahead(items):
    """The items, each after the next one has begun."""
    before = None
    for item in items:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


def filled(rows, size):
    """rows (b, ...), and the last of them once more until they are `size`."""
    if len(rows) == size:
        return rows
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])


# ---- the command

def plan(args):
    """[(raw file, format, image size, path of its encoded shard)]. Raises ValueError."""
    found = [(file, format, side)
             for (format, side), files in groups(args.shards, args.format, 0).items()
             for file in files]
    if any(format == "encoded" for _, format, _ in found):
        raise ValueError(f"{found[0][0].path} is encoded already")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file.path)) for file, *_ in found])
    return [(file, format, side, Path(args.out) / os.path.relpath(os.path.abspath(file.path), root))
            for file, format, side in found]


def is_there(file, path):
    """Whether the encoded shard of a raw one is there. ValueError where it is another's."""
    if not path.is_file():
        return False
    note = path.with_suffix(".json")
    raw = json.loads(note.read_text()).get("raw") if note.is_file() else None
    if raw and raw["start"] != start(file):
        raise ValueError(f"{path} was made of {raw['path']}, and not of {file.path}: choose "
                         "another --out for each set")
    return True


def start(file):
    """The CRC-32 of the first bytes of a shard, which tells it from others: there names begin."""
    return zlib.crc32(file.read(0, START))


def fingerprint(networks):
    """A CRC-32 of a few of their weights: files of other ones may have the same name."""
    few = (networks.first_stage_model.quant_conv.weight,
           networks.cond_stage_model.model.visual.proj)
    return f"{zlib.crc32(b''.join(part.cpu().numpy().tobytes() for part in few)):08x}"


def describe(shards, out):
    """Says what would be made."""
    views = size = 0
    todo = [shard for shard in shards if not is_there(shard[0], shard[-1])]
    for file, format, side, _ in todo:
        count = int(of_files(file.name, format, [file], side).counts.sum())
        views, size = views + count, size + count * 2 * (8 * (side // 8)**2 + EMBEDDING)
    print(f"{out}: {len(shards)} shards, {len(shards) - len(todo)} of them there; {views} views to "
          f"encode, about {size / 1e9:.3g} GB")


def run(args):
    """Encodes the shards that are not there yet; under torchrun, each rank its part of them."""
    rank, world = (int(os.environ.get(name, default)) for name, default in
                   (("RANK", 0), ("WORLD_SIZE", 1)))
    device = own_device(torch.device(device_of(args.device, ("cuda", "cpu")).type))
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    if args.loaders is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.loaders = min(MOST_LOADERS, cores) if device.type == "cuda" else 0
    shards = plan(args)
    if args.dry_run:
        return describe(shards, args.out)
    networks = load(args.weights, args.depth_weights, args.quantile_blend, device)
    if world > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)       # to wait for one another, no more
    if rank == 0:
        check(shards, networks, args)
    if world > 1:
        dist.barrier()      # with --overwrite, shards that are there now are to stay
    seconds_a_view = prepare(networks, shards[0][2], args, device)
    encode([shard for shard in shards[rank::world] if not is_there(shard[0], shard[-1])],
           networks, args, device, seconds_a_view)
    if world > 1:
        dist.barrier()
        leave()
    if rank == 0:
        lacking = unknown_scales([path for *_, path in shards])
        if lacking:
            print(f"{lacking} of the views have no scale, and mode 7dof_quantile_scale needs "
                  "it: give --depth-weights=dpt_swin2_tiny_256.pt, or train with --mode=7dof")


def check(shards, networks, args):
    """Raises ValueError where the shards that are there were made otherwise, or of others."""
    arguments = {"version": ENCODE_VERSION,
                 "weights": f"{Path(args.weights).name} ({fingerprint(networks)})",
                 "depth-weights": Path(args.depth_weights).name, "precision": args.precision,
                 "quantile-blend": args.quantile_blend}
    check_out(Path(args.out) / "encode.json", arguments, list(Path(args.out).rglob("*.tar")),
              args.overwrite)
    for file, *_, path in shards:
        is_there(file, path)


@torch.no_grad()
def prepare(networks, side, args, device):
    """Makes networks fast for views of side x side; returns the seconds that one of them takes the
    autoencoder and CLIP at the rate of a large product, 0 where that is not known."""
    encode_image = networks.cond_stage_model.model.encode_image
    if args.precision == "bf16":
        halve_weights(networks.first_stage_model)
        halve_weights(networks.cond_stage_model)
    seconds = 0.0
    if device.type == "cuda":
        view = torch.zeros(1, 3, side, side, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            flops = (flops_of(lambda: networks.first_stage_model.encode(view))
                     + flops_of(lambda: encode_image(view)))
        seconds = flops / ceiling(device, args.precision)
    if args.compile:
        for part in (networks.first_stage_model.encoder, networks.cond_stage_model.model.visual):
            part.compile()
    return seconds


def encode(shards, networks, args, device, seconds_a_view):
    """Encodes shards, one after the other, while the images of the next one are being decoded."""
    rank, encoder = os.environ.get("RANK", "0"), Encoder(networks, args, device, None)
    for shard in ahead(lambda each: Shard(*each, args, device), shards, 1, 1):
        try:
            write_shard(shard.path, encoder.scenes(shard))
        except Damaged as err:
            shard.problems.append(str(err))
        for problem in shard.problems:
            print(f"left out: {problem}", file=sys.stderr)
    encoder.ticks.close()
    if encoder.seen:
        print(f"rank {rank}: {encoder.rates(seconds_a_view)}")
    elif rank == "0":
        print("all of them were there already")


def unknown_scales(paths):
    """How many views have no scale, in those of the shards that are there."""
    found = groups([str(path) for path in paths if path.is_file()], "", 0)
    scales = [torch.from_numpy(shard.scale.copy())
              for (format, side), files in found.items()
              for shard in of_files("encoded", format, files, side).shards]
    return sum(int(scale.isnan().sum()) for scale in scales)
