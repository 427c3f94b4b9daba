"""How good a model is on held-out pairs: one loop for validation, the end of a run and evaluate.py.

A pair's figures depend on the seed and its number alone, and batches are the same for any number of
processes, so the result is too. A row is a pair: {"number", "uid", "source", "scene", "distance" of
the cameras in radii of the scene, "scores": {method: {figure: number}}}; figures that do not exist
are left out. Figures are explained in metrics.py. Letters: `b` batch, `c` channels, `h w` pixels.
"""

import math
from dataclasses import replace

import torch
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
TITLES = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 3), "sharpness": ("sharpness", 2),
          "lpips_alex": ("LPIPS alex", 3), "lpips_vgg": ("LPIPS vgg", 3), "clip": ("CLIP", 3),
          "reprojection": ("reprojection dB", 2), "camera_margin": ("camera margin dB", 2),
          "camera_found": ("camera found", 3)}
DISTANCES = (1, 2, 3)       # edges between buckets of camera distance, in radii of the scene
SURE = 3                    # standard errors that make a difference clear
BANDS = 4                   # equal parts of the timesteps, each with its own validation loss
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


def guesses_of(net, cases, config, depth_net=None):
    """Of a batch of cases: ({method: (b, 3, h, w)}, truth, and where depths are stored with the
    cases a metrics.Followed and what of the conditioning view the target sees; else two None)."""
    batch = default_collate([item for item, _ in cases])
    views, image_cond, truth = views_of(net, batch, config, depth_net)
    guesses = {MODEL: views, "repeat the view": image_cond,
               "its mean colour": image_cond.mean(dim=(2, 3), keepdim=True).expand_as(image_cond)}
    if not cases[0][1]:
        return guesses, truth, None, None
    cond, target = (torch.stack([stored[name] for _, stored in cases]).to(views.device)
                    for name in ("depth_cond", "depth_target"))
    pose = camera.relative_pose(batch["cond_c2w"], batch["target_c2w"]).to(views)
    followed = metrics.Followed(image_cond, cond, target, pose, batch["fov"].to(views))
    # the baseline knows the depth of the conditioning view alone
    warped, seen = metrics.warp(image_cond, cond, pose, batch["fov"], torch.zeros_like(cond))
    guesses[WARP] = torch.where(seen[:, None], warped, image_cond)
    return guesses, truth, followed, seen


@torch.no_grad()
def score(net, pairs, config, judges, depth_net=None, follows=False, rank=0, world=1):
    """The rows of this rank's pairs, by figures {name: function of (view, truth) -> (b,)}.

    follows: also by the depth stored with a pair: the warp, and whether a view follows its camera.
    """
    rows, starts = [], range(0, len(pairs), config.micro_batch)
    for start in progress(starts[rank::world], "evaluate", "batches",
                          quiet=rank > 0 or not follows):
        places = range(start, min(start + config.micro_batch, len(pairs)))
        cases = [case(pairs, place) if follows else (pairs[place], {}) for place in places]
        guesses, truth, followed, _ = guesses_of(net, cases, config, depth_net)
        figures = {}
        for method, guess in guesses.items():
            found = {name: judge(guess, truth) for name, judge in judges.items()}
            found |= followed(guess) if followed else {}
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
    shape, width = model.latent_shape(config), diffusion.TIMESTEPS // BANDS
    losses = [[] for _ in range(BANDS)]
    for start in range(0, len(pairs), config.micro_batch):
        places = range(start, min(start + config.micro_batch, len(pairs)))
        batch = default_collate([pairs[k] for k in places])
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
    pairs = Subset(pairs, range(min(len(pairs), config.validate_pairs)))
    fewer = replace(config, sampler="dpm++",
                    sample_steps=min(config.sample_steps, config.validate_steps))
    means = means_of(score(net, pairs, fewer, FAST, depth_net))
    losses = validation_loss(net, pairs, config, depth_net)
    return {"val_psnr": means[MODEL]["psnr"], "val_ssim": means[MODEL]["ssim"],
            "val_baseline_psnr": means[best_baseline(means)]["psnr"],
            "val_loss": sum(losses.values()) / len(losses),
            **{f"val_loss_{band}": loss for band, loss in losses.items()}}


# ---- means and their errors

def clusters(rows):
    """What is alike among rows: scenes; of one scene, the views that are to be made."""
    scenes = [row["scene"] for row in rows]
    return scenes if len(set(scenes)) > 1 else [row["uid"].rpartition("->")[2] for row in rows]


def mean_and_error(values, scenes):
    """(mean, standard error, count). Pairs of one scene are not independent of each other, so the
    error is that of means over scenes; with one pair a scene it is the usual one."""
    values = torch.tensor(values, dtype=torch.float64)
    mean, sums = values.mean().item() if len(values) else math.nan, {}
    for value, scene in zip(values.tolist(), scenes):
        sums[scene] = sums.get(scene, 0.0) + value - mean
    groups = len(sums)
    if groups < 2:
        return mean, math.nan, len(values)
    variance = sum(total**2 for total in sums.values()) * groups / (groups - 1)
    return mean, variance**0.5 / len(values), len(values)


def difference(rows, method, other, name="psnr", others=None):
    """(mean, standard error, count) of the paired difference of two methods; `others`: rows of the
    same pairs that the other method's figure is taken from."""
    compared, values = [], []
    for row, against in zip(rows, others or rows, strict=True):
        mine, theirs = row["scores"].get(method, {}), against["scores"].get(other, {})
        if row["uid"] == against["uid"] and name in mine and name in theirs:
            values.append(mine[name] - theirs[name])
            compared.append(row)
    return mean_and_error(values, clusters(compared))


def cells(rows, method):
    """{figure: {mean, se, n}} of a method over the rows that have the figure."""
    found = {}
    for name in TITLES:
        having = [row for row in rows if name in row["scores"].get(method, {})]
        if having:
            mean, error, count = mean_and_error([row["scores"][method][name] for row in having],
                                                clusters(having))
            # null is what JSON has where no error exists
            found[name] = {"mean": mean, "se": None if math.isnan(error) else error, "n": count}
    return found


def methods_of(rows):
    """{method: its `cells`}, in the order of the rows."""
    return {method: cells(rows, method)
            for method in dict.fromkeys(method for row in rows for method in row["scores"])}


def means_of(rows):
    """{method: {figure: mean}}."""
    return {method: {name: cell["mean"] for name, cell in found.items()}
            for method, found in methods_of(rows).items()}


def bucket(row):
    """The name of the bucket that a row's camera distance, in radii of the scene, falls into."""
    edges, i = [0, *DISTANCES], sum(row["distance"] >= edge for edge in DISTANCES)
    return f"{edges[i]} to {edges[i + 1]} radii" if i < len(DISTANCES) else f"{edges[i]} radii up"


def summarize(rows):
    """{"methods": {method: {figure: {mean, se, n}}}, "sources": of the model, "distances"}."""
    def by(key):
        groups = {}
        for row in rows:
            groups.setdefault(key(row), []).append(row)
        return {group: cells(groups[group], MODEL) for group in sorted(groups)}

    return {"methods": methods_of(rows), "sources": by(lambda row: row["source"]),
            "distances": by(bucket)}


# ---- text

def table(title, cells):
    """Lines of text of {row: {figure: {mean, se, n}}}; an error stands where there is one."""
    def text(row, name, digits):
        if name not in row:
            return "-"
        mean, error = row[name]["mean"], row[name]["se"]
        return f"{mean:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")

    names = [name for name in TITLES if any(name in row for row in cells.values())]
    width = max(map(len, [title, *cells]))
    lines = ["  ".join([f"{title:{width}}", "pairs", *(f"{TITLES[n][0]:>16}" for n in names)])]
    for label, row in cells.items():
        lines.append("  ".join([f"{label:{width}}", f"{max(r['n'] for r in row.values()):5}",
                                *(f"{text(row, n, TITLES[n][1]):>16}" for n in names)]))
    return lines


def best_baseline(means):
    """The best method by PSNR among those that know nothing of the camera."""
    return max((method for method in means if method not in (MODEL, WARP)),
               key=lambda method: means[method]["psnr"])


def judged(mean, error, above, below, equal):
    """The word for a difference, by SURE standard errors."""
    return above if mean > SURE * error else below if mean < -SURE * error else equal


def verdict(rows):
    """The line that compares the model with the best baseline, by the paired difference in dB."""
    best = best_baseline(means_of(rows))
    margin, error, _ = difference(rows, MODEL, best)
    scene = ", on one scene, which tells nothing of others" * (len({r["scene"] for r in rows}) < 2)
    if math.isnan(error):
        return f"the model is {margin:+.2f} dB from the best baseline ({best}){scene}"
    verb = judged(margin, error, "beats", "loses to", "equals, within noise,")
    return f"the model {verb} the best baseline ({best}): {margin:+.2f} dB +- {error:.2f}{scene}"


def screen(found):
    """The tables of a summary, as lines."""
    return [line for title, key in (("method", "methods"), ("source", "sources"),
                                    ("camera distance", "distances"))
            for line in [*table(title, found[key]), ""]]


def report(rows, before=()):
    """A run's last lines: the methods, the verdict, and with the rows of the model that it started
    from what it gained."""
    lines = [f"held-out PSNR over {len(rows)} pairs of views never seen in training",
             *table("method", methods_of(rows)), verdict(rows)]
    if [row["uid"] for row in rows] == [row["uid"] for row in before]:
        gain, error, _ = difference(rows, MODEL, MODEL, others=before)
        lines.append(f"the model gained {gain:+.2f} dB +- {error:.2f} over the one it started from")
    return lines


# ---- pictures

def grid(image_cond, truth, views):
    """The sheet of pairs, a row each, of images (b, 3, h, w) in [-1, 1]."""
    return pictures.sheet([[("photo", pictures.image(a)), ("truth", pictures.image(b)),
                            ("sample", pictures.image(c))]
                           for a, b, c in zip(image_cond, truth, views)])


def cases_sheet(net, pairs, config, rows, depth_net=None):
    """The sheet of some pairs from the best to the worst, a row each: conditioning view, truth, the
    model's view, and the conditioning view warped by its depth, where there is one."""
    places = sorted(range(len(rows)), key=lambda i: -rows[i]["scores"][MODEL]["psnr"])
    lines = []
    for place in pictures.evenly_spaced(places, CASES):
        guesses, truth, _, seen = guesses_of(net, [case(pairs, place)], config, depth_net)
        line = [(f"pair {rows[place]['number']}", guesses["repeat the view"][0]),
                ("truth", truth[0]),
                (f"model {rows[place]['scores'][MODEL]['psnr']:.1f} dB", guesses[MODEL][0])]
        if WARP in rows[place]["scores"]:
            warped = torch.where(seen, guesses[WARP][0], torch.ones_like(truth[0]))
            line.append((f"warp, {seen.float().mean():.0%} seen", warped))
        lines.append([(text, pictures.image(x)) for text, x in line])
    return pictures.sheet(lines)
