"""How good a model is on held-out pairs: one loop for validation, the end of a run and evaluate.py.

A pair's figures depend on the seed and its number alone, and batches are the same for any number of
processes, so the result is too. A row is a pair: {"number", "uid", "source", "scene", "distance" of
the cameras in radii of the scene, "scores": {method: {figure: number}}}; figures that do not exist
are left out. Figures are explained in metrics.py. Letters: `b` batch, `c` channels, `h w` pixels.
"""

import math
from dataclasses import replace

import torch
from PIL import Image
from torch.utils.data import Subset, default_collate

import camera

import data
import depth
import diffusion
import model
from analysis import metrics
from runtime import networks
from runtime.command import progress
from views import pictures

MODEL, WARP = "this model", "warp by depth"
TITLES = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 3), "lpips_alex": ("LPIPS alex", 3),
          "lpips_vgg": ("LPIPS vgg", 3), "clip": ("CLIP", 3),
          "reprojection": ("reprojection dB", 2), "camera_margin": ("camera margin dB", 2),
          "camera_found": ("camera found", 3)}
DISTANCES = (1, 2, 3)       # edges between buckets of camera distance, in radii of the scene
SURE = 3                    # standard errors that make a difference clear
BANDS = 4                   # equal parts of the timesteps, each with its own validation loss
GRID_GAP = 2                # pixels between the images of a grid
GRID_SIDE = 128             # pixels a side that small images are enlarged to, at least
CASES = 4                   # rows of the sheet for the best, for the median, and for the worst
FAST = {"psnr": metrics.psnr, "ssim": metrics.ssim}     # figures that need no weights


# ---- pairs

def held_out_sources(config):
    """The sources of a Config that have held-out shards. Raises ValueError where none has."""
    sources = [source for source in config.sources if source.held_out]
    if not sources:
        raise ValueError("no source has held_out shards, so there is nothing to score or to show")
    return sources


def held_out_pairs(config, count, fewer=False):
    """`count` fixed pairs of held-out views, spread evenly over the scenes: a Dataset. Raises
    ValueError where there are not so many; with `fewer` it takes what there is."""
    sources = held_out_sources(config)
    readers = [data.open_source(s, config.data, config.image_size, held_out=True) for s in sources]
    total = sum(s.probability for s in sources)
    pairs = data.Pairs(readers, [s.probability / total for s in sources], config.seed,
                       config.image_size, config.mode, ordered=True)
    if fewer:
        count = min(count, max(len(pairs), 1))
    if count > len(pairs):
        raise ValueError(f"{count} held-out pairs are asked for, but there are {len(pairs)}")
    return Subset(pairs, range(count))


def load_depth(config, device):
    """The depth network of a Config, or nothing where it names no weights."""
    if not config.depth_weights:
        return None
    return networks.load_depth(config.depth_weights).to(device).eval()


def case(pairs, place):
    """(pair, {source, scene, depth_cond, depth_target}): what is stored beside a pair."""
    dataset, number = pairs.dataset, pairs.indices[place]
    item = dataset[number]
    # what was damaged has been replaced by a later draw of the same number
    source, scene, *views = dataset.draw(number, attempt=len(item["damage"].splitlines()))
    reader = dataset.readers[source]
    cond, target = (torch.from_numpy(reader.depth(scene, view)) for view in views)
    scene = item["uid"].rpartition(":")[0]          # shards of two sources may be called the same
    return item, {"source": reader.name, "scene": f"{reader.name}: {scene}",
                  "depth_cond": cond, "depth_target": target}


# ---- the loop

def judges_of(net, config, lpips=(), clip_files=()):
    """({figure: function of (view, truth)}, notes about those that are left out).

    lpips: names of backbones and their files; clip_files: CLIP's, in place of the network's own.
    """
    device, notes, judges = net.betas.device, [], dict(FAST)
    for name, path in lpips:
        judges[f"lpips_{name}"] = metrics.load_lpips(name, path, device)
    if not lpips:
        notes.append("LPIPS is left out: --lpips alex alexnet-owt-7be5be79.pth (or vgg and "
                     "VGG-16's file) gives its weights")
    embed = net.embed if config.latent == "vae" else None
    if clip_files:
        embed = networks.load_clip(clip_files).to(device).eval().encode_image
    if embed:
        judges["clip"] = lambda view, truth: torch.cosine_similarity(embed(view), embed(truth))
    else:
        notes.append("CLIP similarity is left out: --clip ViT-L-14.pt gives its weights")
    return judges, notes


@torch.no_grad()
def views_of(net, batch, config, depth_net=None):
    """The model's answer to a batch of pairs, and the two true views: three of (b, 3, h, w)."""
    device = net.betas.device
    batch["image_cond"] = image_cond = data.images(batch["image_cond"].to(device))
    T = depth.pose_vector(batch, config.mode, depth_net, config.quantile_blend).to(device)
    views = diffusion.novel_views(net, image_cond, T, batch["number"].tolist(), config.seed,
                                  config.sampler, config.sample_steps, config.eta, config.guidance)
    return views, image_cond, data.images(batch["image_target"].to(device))


def baselines(image_cond):
    """{name: guess (b, c, h, w)} of the target view by rules that know nothing of the camera."""
    mean = image_cond.mean(dim=(2, 3), keepdim=True).expand_as(image_cond)
    return {"repeat the view": image_cond, "its mean colour": mean}


def guesses_of(net, cases, config, depth_net=None):
    """Of a batch of cases: ({method: (b, 3, h, w)}, truth, Followed, conditioning views, seen)."""
    batch = default_collate([item for item, _ in cases])
    views, image_cond, truth = views_of(net, batch, config, depth_net)
    cond, target = (torch.stack([stored[name] for _, stored in cases]).to(views.device)
                    for name in ("depth_cond", "depth_target"))
    pose = camera.relative_pose(batch["cond_c2w"], batch["target_c2w"]).to(views)
    followed = metrics.Followed(image_cond, cond, target, pose, batch["fov"].to(views))
    # the baseline knows the depth of the conditioning view alone
    warped, seen = metrics.warp(image_cond, cond, pose, batch["fov"], torch.zeros_like(cond))
    guesses = {MODEL: views, **baselines(image_cond),
               WARP: torch.where(seen[:, None], warped, image_cond)}
    return guesses, truth, followed, image_cond, seen


@torch.no_grad()
def score(net, pairs, config, judges, depth_net=None, follows=False, rank=0, world=1):
    """The rows of this rank's pairs, by figures {name: function of (view, truth) -> (b,)}.

    follows: also by the depth stored with a pair: the warp, and whether a view follows its camera.
    """
    rows, starts = [], range(0, len(pairs), config.micro_batch)
    for start in progress(starts[rank::world], "evaluate", "batches",
                          quiet=rank > 0 or not follows):
        places = range(start, min(start + config.micro_batch, len(pairs)))
        if follows:
            cases = [case(pairs, place) for place in places]
            guesses, truth, followed, *_ = guesses_of(net, cases, config, depth_net)
        else:
            cases = [(pairs[place], {}) for place in places]
            batch = default_collate([item for item, _ in cases])
            views, image_cond, truth = views_of(net, batch, config, depth_net)
            guesses = {MODEL: views, **baselines(image_cond)}
        figures = {}
        for method, guess in guesses.items():
            found = {name: judge(guess, truth) for name, judge in judges.items()}
            found |= followed(guess) if follows else {}
            figures[method] = {name: values.tolist() for name, values in found.items()}
        for i, (item, stored) in enumerate(cases):
            moved = (item["target_c2w"] - item["cond_c2w"])[:3, 3].norm()
            rows.append({
                "number": item["number"].item(), "uid": item["uid"],
                "source": stored.get("source", ""),
                "scene": stored.get("scene", item["uid"].rpartition(":")[0]),
                "distance": (moved / item["radius"]).item(),
                "scores": {method: {name: values[i] for name, values in found.items()
                                    if not math.isnan(values[i])}
                           for method, found in figures.items()
                           if method != WARP or stored["depth_cond"].any()}})
    return rows


@torch.no_grad()
def validation_loss(net, pairs, config, depth_net=None):
    """{band of timesteps: mean loss over `pairs`}, in the order of the timesteps.

    A pair has one timestep in every band, and the same noise in all of them; both are functions of
    (seed, number), and no condition is dropped: figures of different runs can be compared.
    """
    device, shape = net.betas.device, model.latent_shape(config)
    width, losses = diffusion.TIMESTEPS // BANDS, [[] for _ in range(BANDS)]
    for start in range(0, len(pairs), config.micro_batch):
        places = range(start, min(start + config.micro_batch, len(pairs)))
        batch = default_collate([pairs[k] for k in places])
        batch["image_cond"] = image_cond = data.images(batch["image_cond"].to(device))
        T = depth.pose_vector(batch, config.mode, depth_net, config.quantile_blend).to(device)
        mean, logvar = net.encode(data.images(batch["image_target"].to(device)))
        z_cond, embedding = net.encode(image_cond)[0], net.embed(image_cond)
        draws = diffusion.draw(config.seed, batch["number"].to(device), shape)
        for band in range(BANDS):
            inside = replace(draws, t=band * width + draws.t // BANDS)
            losses[band].append(net(mean, logvar, z_cond, embedding, T, inside, (0, 0, 0)).cpu())
    return {f"{band * width}-{(band + 1) * width - 1}": torch.cat(values).mean().item()
            for band, values in enumerate(losses)}


def validate(net, pairs, config, depth_net=None):
    """What a validation inside training logs: {name: number}, over the first validate_pairs pairs.

    PSNR and SSIM of samples, beside the best baseline's PSNR; the loss, and that of every band of
    timesteps.
    """
    # departs: samples of a validation are of at most validate_steps steps of DPM-Solver++, the
    # reference's of 50 of DDIM; evaluate.py has the run's own sampler
    pairs = Subset(pairs, range(min(len(pairs), config.validate_pairs)))
    fewer = replace(config, sampler="dpm++",
                    sample_steps=min(config.sample_steps, config.validate_steps))
    means = means_of(score(net, pairs, fewer, FAST, depth_net))
    losses = validation_loss(net, pairs, config, depth_net)
    return {"val_psnr": means[MODEL]["psnr"], "val_ssim": means[MODEL]["ssim"],
            "val_baseline_psnr": max(found["psnr"] for method, found in means.items()
                                     if method != MODEL),
            "val_loss": sum(losses.values()) / len(losses),
            **{f"val_loss_{band}": loss for band, loss in losses.items()}}


# ---- means and their errors

def mean_and_error(values, scenes):
    """(mean, standard error, count). Pairs of one scene are not independent of each other, so the
    error is that of means over scenes; with one pair a scene it is the usual one."""
    values = torch.tensor(values, dtype=torch.float64)
    mean, sums = values.mean().item() if len(values) else float("nan"), {}
    for value, scene in zip(values.tolist(), scenes):
        sums[scene] = sums.get(scene, 0.0) + value - mean
    groups = len(sums)
    if groups < 2:
        return mean, float("nan"), len(values)
    variance = sum(total**2 for total in sums.values()) * groups / (groups - 1)
    return mean, variance**0.5 / len(values), len(values)


def figure(rows, method, name):
    """(mean, standard error, count) of one figure of a method over the rows that have it."""
    having = [row for row in rows if name in row["scores"].get(method, {})]
    return mean_and_error([row["scores"][method][name] for row in having],
                          [row["scene"] for row in having])


def difference(rows, method, other, name="psnr", others=None):
    """(mean, standard error, count) of the paired difference of two methods; `others`: rows of the
    same pairs that the other method's figure is taken from."""
    scenes, values = [], []
    for row, against in zip(rows, others or rows, strict=True):
        mine, theirs = row["scores"].get(method, {}), against["scores"].get(other, {})
        if row["uid"] == against["uid"] and name in mine and name in theirs:
            values.append(mine[name] - theirs[name])
            scenes.append(row["scene"])
    return mean_and_error(values, scenes)


def means_of(rows):
    """{method: {figure: mean}}."""
    methods = dict.fromkeys(method for row in rows for method in row["scores"])
    return {method: {name: figure(rows, method, name)[0] for name in TITLES
                     if any(name in row["scores"].get(method, {}) for row in rows)}
            for method in methods}


def bucket(distance):
    """The name of the bucket that a camera distance, in radii of the scene, falls into."""
    edges = [0, *DISTANCES]
    i = sum(distance >= edge for edge in DISTANCES)
    return f"{edges[i]} to {edges[i + 1]} radii" if i < len(DISTANCES) else f"{edges[i]} radii up"


def summarize(rows):
    """{"methods": {method: {figure: {mean, se, n}}}, "sources": of the model, "distances"}."""
    def cells(part, method):
        found = {name: figure(part, method, name) for name in TITLES}
        # null is what JSON has where no error exists
        return {name: {"mean": mean, "se": error if math.isfinite(error) else None, "n": count}
                for name, (mean, error, count) in found.items() if count}

    def by(key):
        groups = {}
        for row in rows:
            groups.setdefault(key(row), []).append(row)
        return {group: cells(groups[group], MODEL) for group in sorted(groups)}

    methods = list(dict.fromkeys(method for row in rows for method in row["scores"]))
    return {"methods": {method: cells(rows, method) for method in methods},
            "sources": by(lambda row: row["source"]),
            "distances": by(lambda row: bucket(row["distance"]))}


# ---- text

def table(title, cells):
    """Lines of text of {row: {figure: {mean, se, n}}}."""
    names = [name for name in TITLES if any(name in row for row in cells.values())]
    width = max(map(len, [title, *cells]))
    lines = ["  ".join([f"{title:{width}}", "pairs", *(f"{TITLES[n][0]:>16}" for n in names)])]
    for label, row in cells.items():
        texts = [f"{row[n]['mean']:.{TITLES[n][1]}f}{plus_minus(row[n]['se'], TITLES[n][1])}"
                 if n in row else "-" for n in names]
        lines.append("  ".join([f"{label:{width}}", f"{max(r['n'] for r in row.values()):5}",
                                *(f"{text:>16}" for text in texts)]))
    return lines


def plus_minus(error, digits):
    """A standard error behind its figure; nothing where it is None or nan, as of a single scene."""
    return "" if error is None or math.isnan(error) else f" +- {error:.{digits}f}"


def verdict(rows):
    """The line that compares the model with the best baseline, by the paired difference in dB."""
    means = means_of(rows)
    best = max((method for method in means if method not in (MODEL, WARP)),
               key=lambda method: means[method]["psnr"])
    margin, error, _ = difference(rows, MODEL, best)
    if math.isnan(error):
        return (f"the model is {margin:+.2f} dB from the best baseline ({best}) on one scene, which"
                " tells nothing of others")
    clear = SURE * error
    verb = "beats" if margin > clear else "loses to" if margin < -clear else "equals, within noise,"
    return f"the model {verb} the best baseline ({best}): {margin:+.2f} dB +- {error:.2f}"


def screen(found, rows):
    """All tables and the verdict, as lines."""
    lines = []
    for title, key in (("method", "methods"), ("source", "sources"),
                       ("camera distance", "distances")):
        lines += [*table(title, found[key]), ""]
    return [*lines, verdict(rows)]


def report(rows):
    """The PSNR of every method as lines of text, best first, and the verdict: a run's last lines."""
    means = {method: figure(rows, method, "psnr") for method in means_of(rows)}
    width = max(map(len, means))
    return [f"held-out PSNR over {len(rows)} pairs of scenes never seen in training",
            *(f"  {method:{width}}  {means[method][0]:6.2f} dB{plus_minus(means[method][1], 2)}"
              for method in sorted(means, key=lambda method: -means[method][0])), verdict(rows)]


# ---- pictures

def grid(columns):
    """Rows of images side by side, one column a list entry (b, 3, h, w) in [-1, 1]: a PIL image."""
    side = columns[0].shape[-1]
    factor = -(-GRID_SIDE // side)
    columns = [x.float().clamp(-1, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
               for x in columns]
    border = (0, GRID_GAP, 0, GRID_GAP)
    rows = torch.cat([torch.cat([torch.nn.functional.pad(image, border, value=1.0)
                                 for image in row], dim=2) for row in zip(*columns)], dim=1)
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
        psnr = rows[place]["scores"][MODEL]["psnr"]
        line = [(f"{label}: pair {rows[place]['number']}", image_cond[0]), ("truth", truth[0]),
                (f"model {psnr:.1f} dB", guesses[MODEL][0])]
        if WARP in rows[place]["scores"]:
            warped = torch.where(seen, guesses[WARP][0], torch.ones_like(truth[0]))
            line.append((f"warp, {seen.float().mean():.0%} seen", warped))
        lines.append([(text, pictures.image(x)) for text, x in line])
    return pictures.sheet(lines)
