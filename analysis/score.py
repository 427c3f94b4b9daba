"""How good a model is on held-out pairs: one loop for validation, the end of a run and evaluate.py.

A pair's figures depend on the seed and its number alone, and batches are the same for any number of
processes, so the result is too. A row is a pair: {"number", "uid", "source", "scene", "distance" of
the cameras in radii of the scene, "scores": {method: {figure: number}}}; figures that do not exist
are left out. Figures are explained in metrics.py. Letters: `b` batch, `c` channels, `h w` pixels.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

import camera
import data
import depth
import diffusion
import model
from analysis import metrics
from runtime import files, networks
from runtime.command import progress
from views import pictures

MODEL, WARP = "this model", "warp by depth"
TITLES = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 3), "sharpness": ("sharpness", 2),
          "lpips_alex": ("LPIPS alex", 3), "lpips_vgg": ("LPIPS vgg", 3), "clip": ("CLIP", 3),
          "reprojection": ("reprojection dB", 2), "camera_margin": ("camera margin dB", 2),
          "camera_found": ("camera found", 3)}
TABLES = {"methods": "method", "sources": "source", "distances": "camera distance"}
FAR = 3                     # radii of the scene: all camera distances from there on are one row
SURE = 3                    # standard errors that make a difference clear
BANDS = 4                   # equal parts of the timesteps, each with its own validation loss
GRID_PAIRS, BEGIN = 8, "begin.json"
CASES = 12                  # rows of the sheet, from the best pair to the worst
FAST = {"psnr": metrics.psnr, "ssim": metrics.ssim,
        "sharpness": metrics.sharpness}     # figures that need no weights


# ---- pairs

def held_out_pairs(config, count, fewer=False):
    """`count` fixed pairs of held-out views, spread evenly over the scenes: a Dataset. Raises
    ValueError where there are not so many; with `fewer` it takes what there is."""
    sources = [source for source in config.sources if source.held_out]
    if not sources:
        raise ValueError("no source has held_out shards, so there is nothing to score or to show")
    readers = [data.open_source(s, config.data, config.image_size, held_out=True) for s in sources]
    total = sum(s.probability for s in sources)
    pairs = data.Pairs(readers, [s.probability / total for s in sources], config.seed,
                       config.image_size, config.mode, ordered=True)
    if fewer:
        count = min(count, max(len(pairs), 1))
    if count > len(pairs):
        raise ValueError(f"{count} held-out pairs are asked for, but there are {len(pairs)}")
    return Subset(pairs, range(count))


def first(pairs, count):
    """The first `count` of held_out_pairs."""
    return Subset(pairs.dataset, pairs.indices[:count])


def batch_of(pairs, places, depths=False):
    """The batch of some of held_out_pairs, with {"source", "scene"}: lists of names; and with
    `depths` those that are stored of the two views of each: "depths" (b, 2, h, w), 0 unknown."""
    dataset, batch = pairs.dataset, pairs.__getitems__(places)
    # what was damaged has been replaced by a later draw of the same number
    drawn = [dataset.draw(number, attempt=len(damage.splitlines()))
             for number, damage in zip(batch["number"].tolist(), batch["damage"])]
    batch["source"] = [dataset.readers[source].name for source, *_ in drawn]
    # shards of two sources may be called the same
    batch["scene"] = [f"{source}: {uid.rpartition(':')[0]}"
                      for source, uid in zip(batch["source"], batch["uid"])]
    if depths:
        batch["depths"] = torch.from_numpy(np.array(
            [[dataset.readers[source].depth(scene, view) for view in views]
             for source, scene, *views in drawn]))
    return batch


def batches_of(pairs, config):
    """The places of the pairs, a list of lists of at most micro_batch."""
    return [places.tolist() for places in torch.arange(len(pairs)).split(config.micro_batch)]


# ---- the loop

def judges_of(net, config, lpips=(), clip_files=()):
    """({figure: function of (view, truth)}, notes about those that are left out).

    lpips: names of backbones and their files; clip_files: CLIP's, in place of the network's own.
    """
    device = net.betas.device
    notes = [] if lpips else ["LPIPS is left out: --lpips alex alexnet-owt-7be5be79.pth (or vgg "
                              "and VGG-16's file) gives its weights"]
    judges = FAST | {f"lpips_{name}": metrics.load_lpips(name, path, device)
                     for name, path in lpips}
    if clip_files or config.latent == "vae":
        embed = (networks.load_clip(clip_files).to(device).encode_image if clip_files else
                 net.embed)
        judges["clip"] = lambda view, truth: torch.cosine_similarity(embed(view), embed(truth))
    else:
        notes.append("CLIP similarity is left out: --clip ViT-L-14.pt gives its weights")
    return judges, notes


def conditions(net, batch, config, depth_net):
    """Of a batch of pairs: conditioning views (b, 3, h, w), pose vectors (b, d), true views."""
    device = net.betas.device
    batch["image_cond"] = data.images(batch["image_cond"].to(device))
    T = depth.pose_vector(batch, config.mode, depth_net, config.quantile_blend).to(device)
    return batch["image_cond"], T, data.images(batch["image_target"].to(device))


@torch.no_grad()
def views_of(net, batch, config, depth_net=None):
    """The model's answer to a batch of pairs, and the two true views: three of (b, 3, h, w)."""
    image_cond, T, truth = conditions(net, batch, config, depth_net)
    views = diffusion.novel_views(net, image_cond, T, batch["number"].tolist(), config.seed,
                                  config.sampler, config.sample_steps, config.eta, config.guidance)
    return views, image_cond, truth


def guesses_of(net, batch, config, depth_net=None):
    """Of a batch: ({method: (b, 3, h, w)}, truth, and with its depths a metrics.Followed)."""
    views, image_cond, truth = views_of(net, batch, config, depth_net)
    guesses = {MODEL: views, "repeat the view": image_cond,
               "its mean colour": image_cond.mean(dim=(2, 3), keepdim=True).expand_as(image_cond)}
    if "depths" not in batch:
        return guesses, truth, None
    cond, target = batch["depths"].to(views.device).unbind(1)
    pose = camera.relative_pose(batch["cond_c2w"], batch["target_c2w"]).to(views)
    fov = batch["fov"].to(views)
    # the baseline knows the depth of the conditioning view alone
    warped, seen = metrics.warp(image_cond, cond, pose, fov, torch.zeros_like(cond))
    guesses[WARP] = torch.where(seen[:, None], warped, image_cond)
    return guesses, truth, metrics.Followed(image_cond, cond, target, pose, fov)


@torch.no_grad()
def score(net, pairs, config, judges, depth_net=None, follows=False, rank=0, world=1):
    """The rows of this rank's pairs, by figures {name: function of (view, truth) -> (b,)}.

    follows: also by the depth stored with a pair: the warp, and whether a view follows its camera.
    """
    rows = []
    for places in progress(batches_of(pairs, config)[rank::world], "evaluate", "batches",
                           quiet=rank > 0 or not follows):
        batch = batch_of(pairs, places, follows)
        guesses, truth, followed = guesses_of(net, batch, config, depth_net)
        figures = {}
        for method, guess in guesses.items():
            found = {name: judge(guess, truth) for name, judge in judges.items()}
            found |= followed(guess) if followed else {}
            figures[method] = {name: values.tolist() for name, values in found.items()}
        moved = (batch["target_c2w"] - batch["cond_c2w"])[:, :3, 3].norm(dim=1)
        for i, distance in enumerate((moved / batch["radius"]).tolist()):
            rows.append({
                "number": batch["number"][i].item(), "uid": batch["uid"][i],
                "source": batch["source"][i], "scene": batch["scene"][i], "distance": distance,
                "scores": {method: {name: values[i] for name, values in found.items()
                                    if not math.isnan(values[i])}
                           for method, found in figures.items()
                           if method != WARP or batch["depths"][i, 0].any()}})
    return rows


@torch.no_grad()
def validation_loss(net, pairs, config, depth_net=None):
    """{band of timesteps: mean loss over `pairs`}, in the order of the timesteps.

    A pair has one timestep in every band, and the same noise in all of them; both are functions of
    (seed, number), and no condition is dropped: figures of different runs can be compared.
    """
    shape, width = model.latent_shape(config), diffusion.TIMESTEPS // BANDS
    losses = [[] for _ in range(BANDS)]
    for places in batches_of(pairs, config):
        batch = pairs.__getitems__(places)
        image_cond, T, truth = conditions(net, batch, config, depth_net)
        mean, logvar = net.encode(truth)
        z_cond, embedding = net.encode(image_cond)[0], net.embed(image_cond)
        draws = diffusion.draw(config.seed, batch["number"].to(net.betas.device), shape)
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
    # [test_a_validation_takes_few_steps_and_says_what_the_log_needs]
    pairs = first(pairs, config.validate_pairs)
    fewer = replace(config, sampler="dpm++",
                    sample_steps=min(config.sample_steps, config.validate_steps))
    methods = summarize(score(net, pairs, fewer, FAST, depth_net))["methods"]
    losses = validation_loss(net, pairs, config, depth_net)
    return {"val_psnr": methods[MODEL]["psnr"]["mean"], "val_ssim": methods[MODEL]["ssim"]["mean"],
            "val_baseline_psnr": methods[best_baseline(methods)]["psnr"]["mean"],
            "val_loss": sum(losses.values()) / len(losses),
            **{f"val_loss_{band}": loss for band, loss in losses.items()}}


# ---- what a run in training shows

def rows_of(net, pairs, config, depth_net=None):
    """The rows of the first `eval_pairs` pairs, see `score`."""
    return score(net, first(pairs, config.eval_pairs), config, FAST, depth_net)


def begin(net, pairs, config, depth_net, log):
    """Scores the model of `init` into begin.json, so that the end can say what was gained."""
    path = Path(config.out) / BEGIN
    with log.tolerant(path):
        files.write_text(path, json.dumps({"rows": rows_of(net, pairs, config, depth_net)}))
    if config.validate_every:
        log(0, **validate(net, pairs, config, depth_net))


def show(net, pairs, config, depth_net, log, step):
    """Writes a grid of pairs, a row each: conditioning view | truth | sample."""
    batch = pairs.__getitems__(range(min(GRID_PAIRS, len(pairs))))
    views, image_cond, truth = views_of(net, batch, config, depth_net)
    names = "photo", "truth", "sample"
    rows = [list(zip(names, map(pictures.image, row))) for row in zip(image_cond, truth, views)]
    path = log.picture(step, "grids", pictures.sheet(rows))
    log.say(f"{path}: conditioning view | truth | sample, of held-out views")


def conclude(net, pairs, config, depth_net, log):
    """Scores the trained model: metrics.json, and the last lines on the screen."""
    rows, before = rows_of(net, pairs, config, depth_net), Path(config.out) / BEGIN
    before = files.read_json(before)["rows"] if before.is_file() else []
    means = {name: found["psnr"]["mean"] for name, found in summarize(rows)["methods"].items()}
    path = Path(config.out) / "metrics.json"
    with log.tolerant(path):
        files.write_text(path, json.dumps({"psnr": means, "pairs": len(rows)}, indent=1))
    log.say("\n".join([f"held-out PSNR over {len(rows)} pairs of views never seen in training",
                       *report(rows, ["methods"], before)]))


# ---- means and their errors

def mean_and_error(values, scenes):
    """(mean, standard error, count). Pairs of one scene are not independent of each other, so the
    error is that of means over scenes; with one pair a scene it is the usual one."""
    values = torch.tensor(values, dtype=torch.float64)
    mean, sums = values.mean().item(), {}
    for value, scene in zip(values.tolist(), scenes):
        sums[scene] = sums.get(scene, 0.0) + value - mean
    if len(sums) < 2:
        return mean, math.nan, len(values)
    variance = sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)
    return mean, variance**0.5 / len(values), len(values)


def mean_of(rows, method, name="psnr", minus=None, others=None):
    """`mean_and_error` of a method's figure over the rows that have it; or of what it has more than
    the method `minus` in the same rows or in `others`, rows of the same pairs."""
    found = []
    for row, other in zip(rows, others or rows, strict=True):
        value = row["scores"].get(method, {}).get(name)
        less = other["scores"].get(minus, {}).get(name) if minus else 0
        if row["uid"] == other["uid"] and None not in (value, less):
            found.append((value - less, row["scene"], row["uid"].rpartition("->")[2]))
    values, scenes, targets = zip(*found) if found else ((), (), ())
    # of one scene alone, pairs are alike that make the same view
    return mean_and_error(values, scenes if len(set(scenes)) > 1 else targets)


def summarize(rows):
    """{"methods", "sources", "distances": {method; source; distance: {figure: {mean, se, n}}}},
    those of sources and of camera distances of the model."""
    def figures(rows, method=MODEL):
        found = {name: mean_of(rows, method, name) for name in TITLES}
        # null is what JSON has where no error exists
        return {name: {"mean": mean, "se": None if math.isnan(error) else error, "n": count}
                for name, (mean, error, count) in found.items() if count}

    def distance(row):
        low = int(min(FAR, row["distance"]))
        return f"{low} to {low + 1} radii" if low < FAR else f"{FAR} radii up"

    def by(group):
        return {name: figures([row for row in rows if group(row) == name])
                for name in sorted(set(map(group, rows)))}

    methods = dict.fromkeys(method for row in rows for method in row["scores"])
    return {"methods": {method: figures(rows, method) for method in methods},
            "sources": by(lambda row: row["source"]), "distances": by(distance)}


# ---- text

def table(title, cells):
    """Lines of text of {row: {figure: {mean, se, n}}}; an error stands where there is one."""
    def text(name, mean=None, se=None, n=0):
        digits = TITLES[name][1]
        error = "" if se is None else f" +- {se:.{digits}f}"
        return "-" if mean is None else f"{mean:.{digits}f}{error}"

    names = [name for name in TITLES if any(name in row for row in cells.values())]
    lines = [(title, "pairs", *(TITLES[name][0] for name in names)),
             *((label, str(max(cell["n"] for cell in row.values())),
                *(text(name, **row.get(name, {})) for name in names))
               for label, row in cells.items())]
    width = max(len(label) for label, *_ in lines)
    return [f"{label:{width}}  {pairs:>5}" + "".join(f"{each:>18}" for each in found)
            for label, pairs, *found in lines]


def best_baseline(methods):
    """The best by PSNR of a summary's methods that know nothing of the camera."""
    return max((name for name in methods if name not in (MODEL, WARP)),
               key=lambda name: methods[name]["psnr"]["mean"])


def judged(mean, error, above, below, equal):
    """The word for a difference, by SURE standard errors."""
    return above if mean > SURE * error else below if mean < -SURE * error else equal


def report(rows, tables=TABLES, before=()):
    """Lines: tables, the model beside the best baseline by the paired difference in dB, and with
    `before`, the rows of the model that it started from, what it gained."""
    found = summarize(rows)
    best = best_baseline(found["methods"])
    margin, error, _ = mean_of(rows, MODEL, minus=best)
    lines = [line for key in tables for line in [*table(TABLES[key], found[key]), ""]]
    if math.isnan(error):
        lines.append(f"the model is {margin:+.2f} dB from the best baseline ({best})")
    else:
        verb = judged(margin, error, "beats", "loses to", "equals, within noise,")
        lines.append(f"the model {verb} the best baseline ({best}): {margin:+.2f} dB "
                     f"+- {error:.2f}")
    if len({row["scene"] for row in rows}) < 2:
        lines[-1] += ", on one scene, which tells nothing of others"
    if [row["uid"] for row in rows] == [row["uid"] for row in before]:
        gain, error, _ = mean_of(rows, MODEL, minus=MODEL, others=before)
        verb = judged(gain, error, "gained on", "lost to", "equals, within noise,")
        lines.append(f"the model {verb} the one it started from: {gain:+.2f} dB +- {error:.2f}")
    return lines


# ---- pictures

def cases_sheet(net, pairs, config, rows, depth_net=None):
    """The sheet of some pairs from the best to the worst, a row each: conditioning view, truth, the
    model's view, and where there is depth the conditioning view warped by it, as far as both views
    see the same surface."""
    places = sorted(range(len(rows)), key=lambda i: -rows[i]["scores"][MODEL]["psnr"])
    lines = []
    for place in pictures.evenly_spaced(places, CASES):
        scores, batch = rows[place]["scores"], batch_of(pairs, [place], depths=True)
        guesses, truth, followed = guesses_of(net, batch, config, depth_net)
        line = {f"pair {rows[place]['number']}": guesses["repeat the view"], "truth": truth,
                f"model {scores[MODEL]['psnr']:.1f} dB": guesses[MODEL]}
        if WARP in scores:
            warped, seen = followed.right
            line[f"warp, {seen.float().mean():.0%} seen"] = warped.where(seen[:, None], 1.0)
        lines.append([(text, pictures.image(x[0])) for text, x in line.items()])
    return pictures.sheet(lines)
