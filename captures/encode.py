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
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import clip
import engine
import vae
from captures.make import ahead, check_out, read_note
from captures.writer import write_shard
from depth import viewer_scale
from runtime import checkpoint
from runtime.command import Progress
from runtime.files import write_text
from runtime.networks import load_depth
from runtime.ranks import device_of, join, own_device
from runtime.tensors import pack
from shards.files import Damaged
from shards.scenes import groups, images, nearplane_quantile, of_files

ENCODE_VERSION = 1
FEWEST_VIEWS = 2                # of a scene: a pair
MOST_LOADERS = 16               # processes that decode images, unless told
START = 2**16                   # bytes
PATIENCE = timedelta(days=30)   # of a rank that is done, with the others


def member(moments, clip, c2w, fov, scale, radius, nearplane, blend=True):
    """The bytes of one scene's member, from tensors as listed above, two numbers and whether the
    scales were blended."""
    arrays = {"moments": moments.half(), "clip": clip.half(), "c2w": c2w.double(),
              "fov": fov.double(), "scale": scale.double()}
    assert len({*map(len, arrays.values())}) == 1, "the arrays are of different numbers of views"
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
        networks = Frozen(vae.AutoencoderKL(), clip.CLIP(), blend=blend)
    checkpoint.load_model(networks, weights)
    networks.depth_net = load_depth(depth_weights)
    engine.convert(networks)
    return networks.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ---- a shard

class Views(Dataset):
    """The views of a RawScenes, one after the other: (problem or "", image, depth)."""

    def __init__(self, source):
        self.source = source
        self.places = [(scene, view) for scene in range(len(source))
                       for view in range(int(source.counts[scene]))]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        place, side = self.places[i], self.source.image_size
        try:
            return "", self.source.image(*place), torch.from_numpy(self.source.depth(*place))
        except Damaged as err:
            return str(err), torch.zeros(3, side, side, dtype=torch.uint8), torch.zeros(side, side)


class Shard:
    """A raw shard that is open: its scenes, and batches of their views, which are being decoded."""

    def __init__(self, file, format, side, path, args, device):
        self.file, self.path, self.without_scale = file, path, 0
        self.source = of_files(file.name, format, [file], side)
        self.batches = iter(DataLoader(Views(self.source), args.batch, num_workers=args.loaders,
                                       pin_memory=device.type == "cuda"))
        self.problems = list(self.source.problems)


def launch(batch, networks, args, device):
    """((problem, moments, embedding, scale, depth) of every view of a batch, an iterator, and the
    event after which a GPU has computed them, or None)."""
    problems, pixels, known = batch
    # compiled, every number of views would be compiled anew
    size = args.batch if args.compile else len(pixels)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        rows = networks(images(filled(pixels, size).to(device, non_blocking=True)),
                        filled(known, size).to(device, non_blocking=True))
    rows = [part.float().to("cpu", non_blocking=True) for part in rows]
    done = torch.cuda.Event() if device.type == "cuda" else None
    if done:
        done.record()
    return zip(problems, *rows, known), done


def filled(rows, size):
    """rows (b, ...), and the last of them once more until they are `size`."""
    return rows if len(rows) == size else rows[torch.arange(size).clamp(max=len(rows) - 1)]


def encoded_views(batches, networks, args, device):
    """Yields (problem or "", moments, embedding, scale, depth) of every view, in order, those of a
    batch when the next one has been launched."""
    rows, done = (), None
    for batch in itertools.chain(batches, [None]):
        launched = launch(batch, networks, args, device) if batch else ((), None)
        if done:
            done.synchronize()
        yield from rows
        rows, done = launched


def scenes(shard, networks, args, device, ticks):
    """Yields the members of every scene of a Shard, then writes its note. Raises Damaged where
    there is none."""
    views, made = encoded_views(shard.batches, networks, args, device), 0
    for number in range(len(shard.source)):
        scene, kept = shard.source.scene(number), []
        for view in range(len(scene.c2w)):
            problem, *arrays = next(views)
            ticks.advance()
            if problem:
                shard.problems.append(problem)
            else:
                kept.append((view, *arrays))
        if len(kept) < FEWEST_VIEWS:
            continue
        made += 1
        of_scene, *arrays, depths = zip(*kept)
        moments, embeddings, scales = map(torch.stack, arrays)
        shard.without_scale += int(scales.isnan().sum())
        yield [(f"{scene.name}.safetensors", member(
            moments, embeddings, scene.c2w[list(of_scene)],
            torch.full((len(kept),), scene.fov, dtype=torch.float64), scales, scene.radius,
            nearplane_quantile([depth.numpy() for depth in depths]), networks.blend))]
    if not made:
        raise Damaged(shard.source.name, f"none of its {len(shard.source)} scenes has "
                      f"{FEWEST_VIEWS} views that can be encoded, so there is no shard of it")
    note = {"raw": {"path": shard.file.path, "start": start(shard.file)},
            "left_out": shard.problems, "without_scale": shard.without_scale}
    write_text(shard.path.with_suffix(".json"), json.dumps(note, indent=1))


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
    raw = read_note(path).get("raw")
    if path.is_file() and raw and raw["start"] != start(file):
        raise ValueError(f"{path} was made of {raw['path']}, and not of {file.path}: choose "
                         "another --out for each set")
    return path.is_file()


def start(file):
    """The CRC-32 of the first bytes of a shard, which tells it from others: there names begin."""
    return zlib.crc32(file.read(0, START))


def run(args):
    """Encodes the shards that are not there yet; under torchrun, each rank its part of them."""
    device = own_device(torch.device(device_of(args.device, ("cuda", "cpu")).type))
    # to wait for one another, and no more: a CPU's group
    ranks, _ = join(torch.device("cpu"), solo=PATIENCE)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    if args.loaders is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.loaders = min(MOST_LOADERS, cores) if device.type == "cuda" else 0
    shards = plan(args)
    networks = load(args.weights, args.depth_weights, args.quantile_blend, device)
    # before any rank looks: with --overwrite, shards that are there now are not to stay
    ranks.on_rank_0(check, shards, networks, args)
    encode([shard for shard in shards[ranks.rank::ranks.world]
            if not is_there(shard[0], shard[-1])], networks, args, device, ranks.rank)
    ranks.any_rank(False)       # all are done
    ranks.close()
    lacking = sum(read_note(path).get("without_scale", 0) for *_, path in shards)
    if ranks.rank == 0 and lacking:
        print(f"{lacking} of the views have no scale, and mode 7dof_quantile_scale needs it: give "
              "--depth-weights=dpt_swin2_tiny_256.pt, or train with --mode=7dof")


def check(shards, networks, args):
    """Raises ValueError where the shards that are there were made otherwise, or of others."""
    few = (networks.first_stage_model.quant_conv.weight,        # files may have the same name
           networks.cond_stage_model.model.visual.proj)
    fingerprint = f"{zlib.crc32(b''.join(part.cpu().numpy().tobytes() for part in few)):08x}"
    arguments = {"version": ENCODE_VERSION,
                 "weights": f"{Path(args.weights).name} ({fingerprint})",
                 "depth-weights": Path(args.depth_weights).name, "precision": args.precision,
                 "quantile-blend": args.quantile_blend}
    check_out(Path(args.out) / "encode.json", arguments, list(Path(args.out).rglob("*.tar")),
              args.overwrite)
    for file, *_, path in shards:
        is_there(file, path)


def encode(shards, networks, args, device, rank):
    """Encodes shards, one after the other, while the images of the next one are being decoded."""
    if args.compile:
        for part in (networks.first_stage_model.encoder, networks.cond_stage_model.model.visual):
            part.compile()
    ticks, started = Progress(f"encode on {device}", "views", quiet=rank > 0), time.perf_counter()
    for shard in ahead(lambda each: Shard(*each, args, device), shards, 1, 1):
        try:
            write_shard(shard.path, scenes(shard, networks, args, device, ticks))
        except Damaged as err:
            shard.problems.append(str(err))
        for problem in shard.problems:
            print(f"left out: {problem}", file=sys.stderr)
    ticks.close()
    seconds = time.perf_counter() - started
    print(f"rank {rank}: {len(shards)} shards, {ticks.count} views in {seconds:.1f} s: "
          f"{ticks.count / seconds:.1f} views/s on {device}")
