"""Figures of many pairs as means with their errors, compared pair by pair, and as tables.

A row is a pair: {"uid", "scene", "source", "distance", "scores": {method: {figure: number}}}.
"""

import math

import torch

DISTANCES = (1, 2, 3)       # edges between buckets of camera distance, in radii of the scene
SURE = 3                    # standard errors that make a difference clear
MODEL, WARP = "this model", "warp by depth"
TITLES = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 3), "lpips_alex": ("LPIPS alex", 3),
          "lpips_vgg": ("LPIPS vgg", 3), "clip": ("CLIP", 3),
          "reprojection": ("reprojection dB", 2), "camera_margin": ("camera margin dB", 2),
          "camera_found": ("camera found", 3)}


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
    spread = sum(total**2 for total in sums.values()) * groups / (groups - 1)
    return mean, spread**0.5 / len(values), len(values)


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


def bucket(distance):
    """The name of the bucket that a camera distance, in radii of the scene, falls into."""
    edges = [0, *DISTANCES]
    i = sum(distance >= edge for edge in DISTANCES)
    return f"{edges[i]} to {edges[i + 1]} radii" if i < len(DISTANCES) else f"{edges[i]} radii up"


def summarize(rows):
    """{"methods": {method: {figure: {mean, se, n}}}, "sources": of the model, "distances"}."""
    names = [name for name in TITLES if any(name in row["scores"][MODEL] for row in rows)]

    def cells(some, method):
        found = {name: figure(some, method, name) for name in names}
        # null is what JSON has where no error is known
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


def table(title, cells):
    """Lines of text of {row: {figure: {mean, se, n}}}."""
    names = [name for name in TITLES if any(name in row for row in cells.values())]
    width = max(map(len, [title, *cells]))
    lines = ["  ".join([f"{title:{width}}", "pairs", *(f"{TITLES[n][0]:>16}" for n in names)])]
    for label, row in cells.items():
        texts = [f"{row[n]['mean']:.{TITLES[n][1]}f}{give(row[n]['se'], TITLES[n][1])}"
                 if n in row else "-" for n in names]
        lines.append("  ".join([f"{label:{width}}", f"{max(r['n'] for r in row.values()):5}",
                                *(f"{text:>16}" for text in texts)]))
    return lines


def give(error, digits):
    """A standard error behind its figure; nothing where it is None or nan, as of a single scene."""
    return "" if error is None or math.isnan(error) else f" +- {error:.{digits}f}"


def screen(found, rows):
    """All tables and the verdict, as lines."""
    lines = []
    for title, key in (("method", "methods"), ("source", "sources"),
                       ("camera distance", "distances")):
        lines += [*table(title, found[key]), ""]
    blind = [m for m in found["methods"] if m not in (MODEL, WARP)]
    best = max(blind, key=lambda m: found["methods"][m]["psnr"]["mean"])
    return [*lines, verdict(best, *difference(rows, MODEL, best)[:2])]


def report(scores):
    """PSNR {method: (pairs,)} as lines of text, best first, and a verdict."""
    width = max(map(len, scores))
    mean = {name: row.mean().item() for name, row in scores.items()}
    error = {name: standard_error(row) for name, row in scores.items()}
    pairs = len(scores[MODEL])
    lines = [f"held-out PSNR over {pairs} pairs of scenes never seen in training"]
    lines += [f"  {name:{width}}  {mean[name]:6.2f} dB{give(error[name], 2)}"
              for name in sorted(mean, key=mean.get, reverse=True)]
    best = max((name for name in mean if name != MODEL), key=mean.get)
    lead = scores[MODEL] - scores[best]
    lines.append(verdict(best, lead.mean().item(), standard_error(lead)))
    return lines


def standard_error(values):
    """Of the mean of values (n,); nan of one."""
    return values.std().item() / len(values)**0.5 if len(values) > 1 else math.nan


def verdict(best, margin, error):
    """The line that compares the model with the best baseline, by the paired difference in dB."""
    if math.isnan(error):
        return (f"the model is {margin:+.2f} dB from the best baseline ({best}) on one scene, which"
                " tells nothing of others")
    clear = SURE * error
    verb = "beats" if margin > clear else "loses to" if margin < -clear else "equals, within noise,"
    return f"the model {verb} the best baseline ({best}): {margin:+.2f} dB +- {error:.2f}"
