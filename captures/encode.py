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

import argparse
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
from tqdm import tqdm

from runtime import checkpoint
import clip
import engine
from runtime.networks import load_depth
from runtime.cost import ceiling, flops_of
from runtime.ranks import leave, own_device
from analysis import inspect as inspector
import vae
from depth import viewer_scale
from shards.scenes import images, nearplane_quantile, of_files
from captures.writer import check_out, write_shard, write_text
from shards.files import Damaged
from runtime.foreign import pack

ENCODE_VERSION = 1
FEWEST_VIEWS = 2                # of a scene: a pair
EMBEDDING = 768                 # CLIP's numbers of a view
MOST_LOADERS = 16               # processes, by default
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


def gather(items):
    """A batch of what `Views` gives: (whether it is whole, images, depths)."""
    whole = [not isinstance(item, Damaged) for item in items]
    good = [item for item in items if not isinstance(item, Damaged)]
    stacked = [torch.stack(part) for part in zip(*good)] or [None, None]
    return [None if ok else str(item) for ok, item in zip(whole, items)], *stacked


def encoded_views(source, networks, args, device, total):
    """Yields (problem or None, (moments, embedding, scale), depth) of every view, in order; adds to
    `total` the seconds that it waited for images."""
    autocast = (torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16"
                else nullcontext())
    batches = DataLoader(Views(source), args.batch, collate_fn=gather, num_workers=args.loaders,
                         pin_memory=device.type == "cuda")

    def begun():
        """(problems, what a GPU may still be computing, depths, what ends then) of every batch."""
        asked = time.perf_counter()
        for problems, pixels, known in batches:
            total["waited"] += time.perf_counter() - asked
            rows, done = (), torch.cuda.Event() if device.type == "cuda" else None
            if pixels is not None:
                # compiled, every number of views would be compiled anew
                size = args.batch if args.compile else len(pixels)
                with autocast:
                    rows = networks(images(filled(pixels, size).to(device, non_blocking=True)),
                                    filled(known, size).to(device, non_blocking=True))
                rows = [part.float().to("cpu", non_blocking=True) for part in rows]
            if done:
                done.record()
            yield problems, rows, known, done
            asked = time.perf_counter()

    for problems, rows, known, done in one_ahead(begun()):
        if done:
            done.synchronize()
        rows = zip(*rows, () if known is None else known)
        for problem in problems:
            *made, its_depth = next(rows) if problem is None else (None, None)
            yield problem, made, its_depth


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


def encoded_scenes(source, networks, args, device, total, report):
    """Yields the members of every scene; report(view's problem or "") as views get done. Raises
    Damaged where there is none."""
    views, whole = encoded_views(source, networks, args, device, total), 0
    for scene in range(len(source)):
        known, kept, made, depths = source.scene(scene), [], [], []
        for view in range(len(known.c2w)):
            problem, arrays, its_depth = next(views)
            report(problem or "")
            if problem is None:
                kept.append(view)
                made.append(arrays)
                depths.append(its_depth.numpy())
        if len(kept) < FEWEST_VIEWS:
            continue
        whole += 1
        moments, embeddings, scales = map(torch.stack, zip(*made))
        yield [(f"{known.name}.safetensors", member(
            moments, embeddings, known.c2w[kept],
            torch.full((len(kept),), known.fov, dtype=torch.float64), scales, known.radius,
            nearplane_quantile(depths), networks.blend))]
    if not whole:
        raise Damaged(source.name, f"none of its {len(source)} scenes has {FEWEST_VIEWS} views "
                      "that can be encoded, so there is no shard of it")


# ---- the command

def plan(args):
    """[(raw file, format, image size, path of its encoded shard)]. Raises ValueError."""
    found = [(file, format, side)
             for (format, side), files in inspector.groups(args.shards, args.format, 0).items()
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


def tell_plan(shards, out):
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
    device = own_device(torch.device(args.device))
    shards = plan(args)
    if args.dry_run:
        return tell_plan(shards, args.out)
    networks = load(args.weights, args.depth_weights, args.quantile_blend, device)
    if world > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)       # to wait for one another, no more
    if rank == 0:
        arguments = {"version": ENCODE_VERSION,
                     "weights": f"{Path(args.weights).name} ({fingerprint(networks)})",
                     "depth-weights": Path(args.depth_weights).name, "precision": args.precision,
                     "quantile-blend": args.quantile_blend}
        check_out(Path(args.out) / "encode.json", arguments, list(Path(args.out).rglob("*.tar")),
                  args.overwrite)
        for file, *_, path in shards:
            is_there(file, path)
    if world > 1:
        dist.barrier()      # with --overwrite, shards that are there now are to stay
    if args.precision == "bf16":
        halve_weights(networks.first_stage_model)
        halve_weights(networks.cond_stage_model)
    flops, peak = 0, 1.0
    if device.type == "cuda":
        flops = view_flops(networks, shards[0][2], device)
        peak = ceiling(device, args.precision)
    if args.compile:
        for part in (networks.first_stage_model.encoder, networks.cond_stage_model.model.visual):
            part.compile()
    started, total = time.perf_counter(), {"views": 0, "waited": 0.0}
    with tqdm(unit=" views", desc=f"encode on {device}", disable=rank > 0) as bar:
        for file, format, side, path in shards[rank::world]:
            if is_there(file, path):
                continue
            source = of_files(file.name, format, [file], side)
            problems = list(source.problems)

            def report(problem):
                bar.update()
                total["views"] += 1
                if total["views"] == args.batch:
                    total.update(began=time.perf_counter(), before=total["waited"])
                problems.extend([problem] * bool(problem))

            def scenes_and_note():
                yield from encoded_scenes(source, networks, args, device, total, report)
                note = {"raw": {"path": file.path, "start": start(file)}, "left_out": problems}
                write_text(path.with_suffix(".json"), json.dumps(note, indent=1))

            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_shard(path, scenes_and_note())
            except Damaged as err:
                problems.append(str(err))
            for problem in problems:
                bar.write(f"left out: {problem}", file=sys.stderr)
    if total["views"]:
        print(f"rank {rank}: " + rates(total, started, args.batch, device, flops / peak))
    elif rank == 0:
        print("all of them were there already")
    if world > 1:
        dist.barrier()
        leave()
    if rank == 0:
        lacking = unknown_scales([path for *_, path in shards])
        if lacking:
            print(f"{lacking} of the views have no scale, and mode 7dof_quantile_scale needs "
                  "it: give --depth-weights=dpt_swin2_tiny_256.pt, or train with --mode=7dof")


@torch.no_grad()
def view_flops(networks, side, device):
    """FLOPs of the autoencoder and CLIP for a view of side x side."""
    view = torch.zeros(1, 3, side, side, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        return (flops_of(lambda: networks.first_stage_model.encode(view))
                + flops_of(lambda: networks.cond_stage_model.model.encode_image(view)))


def rates(total, started, batch, device, seconds_a_view):
    """What is told at the end. Compiling is for the first batch, so the rest has its own rate.

    total: views, seconds waited for images, and after the first batch the time and those before it;
    seconds_a_view: at the chip's ceiling, 0 unknown.
    """
    views, now = total["views"], time.perf_counter()
    seconds = now - started
    told = f"{views} views in {seconds:.1f} s: {views / seconds:.1f} views/s on {device}"
    if views <= batch:
        return told
    seconds = now - total["began"]
    rate = (views - batch) / seconds
    told += (f", {rate:.1f} after the first {batch}; "
             f"{(total['waited'] - total['before']) / seconds:.0%} of that time waiting for images")
    return told + (f", {rate * seconds_a_view:.0%} of the rate of a large product" if seconds_a_view
                   else "")


def unknown_scales(paths):
    """How many views have no scale, in those of the shards that are there."""
    there = [path for path in paths if path.is_file()]
    found = inspector.groups([str(path) for path in there], "", 0)
    scales = [torch.from_numpy(shard.scale.copy())
              for (format, side), files in found.items()
              for shard in of_files("encoded", format, files, side).shards]
    return sum(int(scale.isnan().sum()) for scale in scales)


def add_options(sub):
    """The options of `prepare.py encode`."""
    add = sub.add_argument
    add("shards", nargs="+", help="raw shards: files, globs, {000..012} patterns")
    add("--weights", required=True, help="zero123-xl.ckpt, or another file with the autoencoder "
        "and CLIP")
    add("--depth-weights", default="", help="dpt_swin2_tiny_256.pt, which fills holes of depth")
    sub.set_defaults(quantile_blend=True)
    add("--no-quantile-blend", dest="quantile_blend", action="store_false",
        default=argparse.SUPPRESS,
        help="the scale is that of the depth network alone, known depths or not")
    add("--out", default="data/encoded", help="folder of the encoded shards")
    add("--format", default="", choices=("", *inspector.FORMATS[:-1]),
        help="of the raw shards; else it is detected")
    add("--batch", type=int, default=64, help="views at once")
    add("--precision", choices=("bf16", "fp32"), default="", help="of the networks; bf16 on a GPU, "
        "fp32 on a CPU, unless told")
    add("--compile", action="store_true", help="torch.compile the networks: for many views")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to encode")
    add("--loaders", type=int, default=None, help="processes a rank that decode images; on a GPU "
        f"as many as there are cores for, up to {MOST_LOADERS}, unless told")
    add("--dry-run", action="store_true", help="say what would be made, and stop")
    add("--overwrite", action="store_true", help="replace shards made with other arguments")
