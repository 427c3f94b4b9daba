"""How good a model is on scenes it never saw, beside baselines, and whether it follows the camera.

    python evaluate.py out/synth --pairs 512
    torchrun --nproc_per_node 8 evaluate.py out/mix --pairs 4096 --lpips alexnet.pth alex.pth
    python evaluate.py zeronvs.ckpt --config configs/mix.py --data=data

Writes metrics.json, pairs.jsonl (every pair's figures) and cases.png (best, median and worst) into
the run's folder eval/. A pair's figures depend on the seed and its number alone, and batches are
the same for any number of processes, so the result is too. Figures are explained in metrics.py.
Letters: `b` batch, `c` channels, `h w` pixels.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import diffusion
import engine
import camera
from runtime import checkpoint
import configs
import data
import depth
from runtime import networks
from analysis import metrics
import model
from runtime import command as options
from views import pictures
from views import render
from runtime.ranks import device_of, leave, own_device
from analysis.metrics import psnr
from diffusion import novel_views
from analysis.tables import MODEL, WARP, screen, summarize

GRID_GAP = 2                # pixels between the images of a grid
GRID_SIDE = 128             # pixels a side that small images are enlarged to, at least
CASES = 4                   # rows of the sheet for the best, for the median, and for the worst
BANDS = 4                   # equal parts of the timesteps, each with its own validation loss
# Fields of the run that an evaluation may change; the network's own are those it was trained with.
FIELDS = {"data", "device", "micro_batch", "sampler", "sample_steps", "guidance", "eta",
          "depth_weights", "quantile_blend"}


# ---- views and their baselines

def baselines(image_cond):
    """{name: guess (b, c, h, w)} of the target view by rules that know nothing of the camera."""
    mean = image_cond.mean(dim=(2, 3), keepdim=True).expand_as(image_cond)
    return {"repeat the view": image_cond, "its mean colour": mean}


def held_out_pairs(config, count, fewer=False):
    """`count` fixed pairs of held-out views, spread evenly over the scenes: a Dataset. Raises
    ValueError where there are not so many; with `fewer` it takes what there is."""
    sources = held_out_sources(config)
    readers = [data.open_source(s, config.data, config.image_size, held_out=True,
                                patience=config.web_patience) for s in sources]
    total = sum(s.probability for s in sources)
    pairs = data.Pairs(readers, [s.probability / total for s in sources], config.seed,
                       config.image_size, config.mode, ordered=True)
    if fewer:
        count = min(count, max(len(pairs), 1))
    if count > len(pairs):
        raise ValueError(f"{count} held-out pairs are asked for, but there are {len(pairs)}")
    return torch.utils.data.Subset(pairs, range(count))


def held_out_sources(config):
    """The sources of a Config that have held-out shards. Raises ValueError where none has."""
    sources = [source for source in config.sources if source.held_out]
    if not sources:
        raise ValueError("no source has held_out shards, so there is nothing to score or to show")
    return sources


@torch.no_grad()
def views_of(net, batch, config, depth_net=None):
    """The model's answer to a batch of pairs, and the two true views: three of (b, 3, h, w)."""
    device = net.betas.device
    batch["image_cond"] = image_cond = data.images(batch["image_cond"].to(device))
    T = depth.pose_vector(batch, config.mode, depth_net, config.quantile_blend).to(device)
    views = novel_views(net, image_cond, T, batch["number"].tolist(), config.seed, config.sampler,
                        config.sample_steps, config.eta, config.guidance)
    return views, image_cond, data.images(batch["image_target"].to(device))


def batches(pairs, config, rank=0, world=1):
    """Yields the batches of `pairs` that are this rank's, as lists of their places."""
    for i, start in enumerate(range(0, len(pairs), config.micro_batch)):
        if i % world == rank:
            yield list(range(start, min(start + config.micro_batch, len(pairs))))


def evaluate(net, pairs, config, depth_net=None):
    """{method: (b,) PSNR of every pair} of the model and the baselines over `pairs`."""
    scores = {}
    for places in batches(pairs, config):
        batch = torch.utils.data.default_collate([pairs[k] for k in places])
        views, image_cond, truth = views_of(net, batch, config, depth_net)
        for name, guess in {MODEL: views, **baselines(image_cond)}.items():
            scores.setdefault(name, []).append(psnr(guess, truth).cpu())
    return {name: torch.cat(rows) for name, rows in scores.items()}


# ---- validation inside training

@torch.no_grad()
def validation_loss(net, pairs, config, depth_net=None):
    """{band of timesteps: mean loss over `pairs`}, in the order of the timesteps.

    A pair has one timestep in every band, and the same noise in all of them; both are functions of
    (seed, number), and no condition is dropped: figures of different runs can be compared.
    """
    device, shape = net.betas.device, model.latent_shape(config)
    width, losses = diffusion.TIMESTEPS // BANDS, [[] for _ in range(BANDS)]
    for places in batches(pairs, config):
        batch = torch.utils.data.default_collate([pairs[k] for k in places])
        batch["image_cond"] = image_cond = data.images(batch["image_cond"].to(device))
        T = depth.pose_vector(batch, config.mode, depth_net, config.quantile_blend).to(device)
        mean, logvar = net.encode(data.images(batch["image_target"].to(device)))
        z_cond, embedding = net.encode(image_cond)[0], net.embed(image_cond)
        draws = engine.draw(config.seed, batch["number"].to(device), shape)
        for band in range(BANDS):
            inside = replace(draws, t=band * width + draws.t // BANDS)
            losses[band].append(net(mean, logvar, z_cond, embedding, T, inside, (0, 0, 0)).cpu())
    return {f"{band * width}-{(band + 1) * width - 1}": torch.cat(rows).mean().item()
            for band, rows in enumerate(losses)}


def validate(net, pairs, config, depth_net=None):
    """What a validation inside training logs: {name: number}, over the first validate_pairs pairs.

    PSNR and SSIM of samples, beside the best baseline's PSNR; the loss, and that of every band of
    timesteps.
    """
    # departs: samples are of at most validate_steps steps of DPM-Solver++, the reference's of 50 of
    # DDIM; evaluate.py has the run's own sampler
    pairs = torch.utils.data.Subset(pairs, range(min(len(pairs), config.validate_pairs)))
    few = replace(config, sampler="dpm++",
                  sample_steps=min(config.sample_steps, config.validate_steps))
    scores = {}
    for places in batches(pairs, config):
        batch = torch.utils.data.default_collate([pairs[k] for k in places])
        views, image_cond, truth = views_of(net, batch, few, depth_net)
        found = {"val_psnr": psnr(views, truth), "val_ssim": metrics.ssim(views, truth)}
        for name, guess in baselines(image_cond).items():
            found[name] = psnr(guess, truth)
        for name, row in found.items():
            scores.setdefault(name, []).append(row.cpu())
    mean = {name: torch.cat(rows).mean().item() for name, rows in scores.items()}
    losses = validation_loss(net, pairs, config, depth_net)
    return {"val_psnr": mean["val_psnr"], "val_ssim": mean["val_ssim"],
            "val_baseline_psnr": max(mean[name] for name in mean if not name.startswith("val_")),
            "val_loss": sum(losses.values()) / len(losses),
            **{f"val_loss_{band}": loss for band, loss in losses.items()}}


# ---- every figure of every pair

def judges_of(net, config, args):
    """({figure: function of (view, truth)}, notes about those that are left out)."""
    device, notes = net.betas.device, []
    judges = {"psnr": psnr, "ssim": metrics.ssim}
    for files in args.lpips:
        lpips = metrics.load_lpips(*files).to(device)
        judges[f"lpips_{lpips.net}"] = lpips
    if not args.lpips:
        notes.append("LPIPS is left out: --lpips alexnet-owt-7be5be79.pth alex.pth (or VGG-16's "
                     "two files) gives its weights")
    embed = net.embed if config.latent == "vae" else None
    if args.clip:
        embed = networks.load_clip(args.clip).to(device).eval().encode_image
    if embed:
        judges["clip"] = lambda view, truth: torch.cosine_similarity(embed(view), embed(truth))
    else:
        notes.append("CLIP similarity is left out: --clip ViT-L-14.pt gives its weights")
    return judges, notes


def case(pairs, place):
    """(pair, {what is known of it}): names of its source and scene, and both views' true depth."""
    dataset, number = pairs.dataset, pairs.indices[place]
    item = dataset[number]
    # what was damaged has been replaced by a later draw of the same number
    source, scene, *views = dataset.draw(number, attempt=len(item["damage"].splitlines()))
    reader = dataset.readers[source]
    cond, target = (torch.from_numpy(reader.depth(scene, view)) for view in views)
    scene = item["uid"].rpartition(":")[0]          # shards of two sources may be called the same
    return item, {"source": reader.name, "scene": f"{reader.name}: {scene}",
                  "depth_cond": cond, "depth_target": target}


def guesses_of(net, cases, config, depth_net):
    """Of a batch of cases: ({method: (b, 3, h, w)}, truth, Followed, conditioning views, seen)."""
    batch = torch.utils.data.default_collate([item for item, _ in cases])
    views, image_cond, truth = views_of(net, batch, config, depth_net)
    cond, target = (torch.stack([known[name] for _, known in cases]).to(views.device)
                    for name in ("depth_cond", "depth_target"))
    pose = camera.relative_pose(batch["cond_c2w"], batch["target_c2w"]).to(views)
    followed = metrics.Followed(image_cond, cond, target, pose, batch["fov"].to(views))
    # the baseline knows the depth of the conditioning view alone
    warped, seen = metrics.warp(image_cond, cond, pose, batch["fov"], torch.zeros_like(cond))
    guesses = {MODEL: views, **baselines(image_cond),
               WARP: torch.where(seen[:, None], warped, image_cond)}
    return guesses, truth, followed, image_cond, seen


@torch.no_grad()
def measure(net, pairs, config, judges, depth_net=None, rank=0, world=1):
    """A row for every pair of this rank: number, uid, source, scene, distance of the cameras in
    radii of the scene, and {method: {figure: value}}; figures that do not exist are left out."""
    rows = []
    for places in tqdm(list(batches(pairs, config, rank, world)), "evaluate", unit="batch",
                       disable=rank > 0, leave=False):
        cases = [case(pairs, place) for place in places]
        guesses, truth, followed, *_ = guesses_of(net, cases, config, depth_net)
        figures = {}
        for method, guess in guesses.items():
            found = {name: judge(guess, truth) for name, judge in judges.items()}
            found.update(followed(guess))
            figures[method] = {name: row.tolist() for name, row in found.items()}
        for i, (item, known) in enumerate(cases):
            moved = (item["target_c2w"] - item["cond_c2w"])[:3, 3].norm()
            methods = [m for m in figures if m != WARP or known["depth_cond"].any()]
            rows.append({
                "number": item["number"].item(), "uid": item["uid"], "source": known["source"],
                "scene": known["scene"], "distance": (moved / item["radius"]).item(),
                "scores": {m: {name: row[i] for name, row in figures[m].items()
                               if row[i] == row[i]} for m in methods}})
    return rows


# ---- pictures

def grid(columns):
    """Rows of images side by side, one column a list entry (b, 3, h, w) in [-1, 1]: a PIL image."""
    side = columns[0].shape[-1]
    factor = -(-GRID_SIDE // side)
    columns = [x.float().clamp(-1, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
               for x in columns]
    gap = torch.nn.functional.pad
    border = (0, GRID_GAP, 0, GRID_GAP)
    rows = torch.cat([torch.cat([gap(image, border, value=1.0) for image in row], dim=2)
                      for row in zip(*columns)], dim=1)
    pixels = ((rows + 1) * 127.5).round().byte().permute(1, 2, 0)       # (h, w, 3)
    return Image.fromarray(pixels.cpu().numpy())


def chosen(rows, count=CASES):
    """[(label, place in rows)] of the best, the median and the worst pairs, by the model's PSNR."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["scores"][MODEL]["psnr"])
    count = min(count, -(-len(order) // 3))
    middle = (len(order) - count) // 2
    return [(label, place) for label, places in
            (("best", order[:count]), ("median", order[middle:middle + count]),
             ("worst", order[len(order) - count:])) for place in places]


def cases_sheet(net, pairs, config, rows, depth_net=None):
    """The sheet of the best, median and worst pairs, a row each: conditioning view, truth, the
    model's view, and the conditioning view warped by its depth, where there is one."""
    lines = []
    for label, place in chosen(rows):
        guesses, truth, _, image_cond, seen = guesses_of(net, [case(pairs, place)], config,
                                                         depth_net)
        score = rows[place]["scores"][MODEL]["psnr"]
        line = [(f"{label}: pair {rows[place]['number']}", image_cond[0]), ("truth", truth[0]),
                (f"model {score:.1f} dB", guesses[MODEL][0])]
        if WARP in rows[place]["scores"]:
            known = torch.where(seen, guesses[WARP][0], torch.ones_like(truth[0]))
            line.append((f"warp, {seen.float().mean():.0%} known", known))
        lines.append([(text, pictures.image(x)) for text, x in line])
    return pictures.sheet(lines)


# ---- the command

def load_depth(config, device):
    """The depth network of a Config, or nothing where it names no weights."""
    if not config.depth_weights:
        return None
    return networks.load_depth(config.depth_weights).to(device).eval()


def parser():
    """The command line; fields of the run's Config may follow as --name=value."""
    p = options.Parser("evaluate.py", allow_abbrev=False, description=__doc__.splitlines()[0],
                       epilog="Fields of the run may follow as --name=value: "
                              + ", ".join(sorted(FIELDS)))
    p.add_argument("checkpoint", metavar="PATH",
                   help="a run's folder (its newest step), one step, or a published checkpoint")
    p.add_argument("--pairs", type=options.numbers_of(int, 2), metavar="N",
                   help="held-out pairs, spread over the scenes (the run's eval_pairs)")
    p.add_argument("--seed", type=options.numbers_of(int, 0), metavar="N",
                   help="which pairs, and the noise of their views (the run's)")
    p.add_argument("--config", default="", metavar="FILE",
                   help="take the data from this configuration instead of the checkpoint's own")
    p.add_argument("--lpips", nargs=2, action="append", default=[], metavar=("BACKBONE", "LINEAR"),
                   help="torchvision's AlexNet or VGG-16, and the lpips package's weights/v0.1/"
                        "alex.pth or vgg.pth; may be repeated")
    p.add_argument("--clip", nargs="+", default=[], metavar="FILE",
                   help="CLIP's ViT-L-14.pt, for the similarity of its embeddings")
    p.add_argument("--out", default="", metavar="FOLDER",
                   help="where to write (eval/ in the run's folder)")
    return p


def asked(args, overrides):
    """(weights, Config) of an evaluation. Raises ValueError, FileNotFoundError."""
    if not Path(args.checkpoint).exists():
        raise FileNotFoundError(f"no checkpoint {args.checkpoint}; `python train.py "
                                "configs/synth.py` makes out/synth")
    tensors = checkpoint.read(args.checkpoint)
    config = render.config_of(tensors)
    if args.config:
        other = configs.load([args.config])
        config = replace(config, sources=other.sources, data=other.data,
                         depth_weights=other.depth_weights)
    for argument in overrides:
        name = argument.removeprefix("--").partition("=")[0]
        if name in configs.Config.__dataclass_fields__ and name not in FIELDS:
            raise ValueError(f"--{name} belongs to the training of the run and cannot be changed "
                             f"here; what can is {', '.join(sorted(FIELDS))}")
    config = configs.override(config, overrides)
    return tensors, replace(
        config, eval_pairs=config.eval_pairs if args.pairs is None else args.pairs,
        seed=config.seed if args.seed is None else args.seed)


def gathered(rows, world):
    """The rows of all ranks, by number."""
    if world > 1:
        everything = [None] * world
        dist.all_gather_object(everything, rows)
        rows = [row for part in everything for row in part]
    return sorted(rows, key=lambda row: row["number"])


def write(out, rows, found, about):
    """Writes metrics.json and pairs.jsonl into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(argv):
    """The command. Raises ValueError or OSError with one line."""
    args, overrides = parser().parse_known_args(argv)
    tensors, config = asked(args, overrides)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = own_device(device_of(config.device))
    pairs = held_out_pairs(config, config.eval_pairs)       # before anything large is read
    for reader in pairs.dataset.readers:
        if reader.kind != "images":
            raise ValueError(f"source {reader.name!r} has {reader.kind}: scores need held-out "
                             "shards with images, which --config can name")
    path = Path(args.checkpoint)
    folder = path.parent if path.name.startswith("step_") or path.is_file() else path
    out = Path(args.out) if args.out else folder / "eval"
    out.mkdir(parents=True, exist_ok=True)                  # or it is known now that it cannot be
    net = render.load(tensors, device, "fp32")[0]
    depth_net = load_depth(config, device)
    judges, notes = judges_of(net, config, args)
    if world > 1:
        dist.init_process_group("gloo")     # only rows of numbers travel
    rows = gathered(measure(net, pairs, config, judges, depth_net, rank, world), world)
    if world > 1:
        leave()
    if rank > 0:
        return
    if not any("reprojection" in row["scores"][MODEL] for row in rows):
        notes.append("no depth is known, so neither the warp nor the camera figures are there")
    found = summarize(rows)
    about = {"checkpoint": str(tensors.path), "pairs": len(rows), "seed": config.seed,
             "scenes": len({row["scene"] for row in rows}), "mode": config.mode,
             "sampler": config.sampler, "sample_steps": config.sample_steps,
             "guidance": config.guidance, "eta": config.eta, "notes": notes}
    write(out, rows, found, about)
    cases_sheet(net, pairs, config, rows, depth_net).save(out / "cases.png")
    print(f"{about['checkpoint']}: {len(rows)} pairs of {about['scenes']} scenes never seen in "
          f"training, seed {config.seed}, {config.sample_steps} steps of {config.sampler}\n")
    print("\n".join([*screen(found, rows), *notes]))
    print(f"in {out}: metrics.json, pairs.jsonl, cases.png")


def main(argv):
    try:
        run(argv)
    except (ValueError, OSError) as err:
        reason = f"{err.filename}: {err.strerror}" if getattr(err, "strerror", None) else err
        print(f"evaluate.py: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
