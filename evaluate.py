"""How good a model is on scenes it never saw: PSNR of its views, beside two simple baselines.

    python evaluate.py out/synth --eval_pairs=512

Letters: `b` batch, `c` channels, `h w` pixels.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

import checkpoint
import configs
import data
import depth
import model
from samplers import novel_views

PEAK = 2.0                  # images live in [-1, 1]
GRID_GAP = 2                # pixels between the images of a grid
GRID_SIDE = 128             # pixels a side that small images are enlarged to, at least


def psnr(image, truth):
    """Peak signal-to-noise ratio in dB of (b, c, h, w) images in [-1, 1], each on its own: (b,)."""
    mse = (image - truth).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / mse.clamp(min=torch.finfo(mse.dtype).tiny))


def baselines(image_cond):
    """{name: guess (b, c, h, w)} of the target view by rules that know nothing of the camera."""
    mean = image_cond.mean(dim=(2, 3), keepdim=True).expand_as(image_cond)
    return {"repeat the view": image_cond, "its mean colour": mean}


def held_out_pairs(config, count):
    """`count` fixed pairs of held-out views, spread evenly over the scenes: a Dataset."""
    sources = [source for source in config.sources if source.held_out]
    if not sources:
        raise ValueError("no source has held_out shards, so there is nothing to score or to show")
    readers = [data.SourceReader(s, config.data, config.image_size, held_out=True) for s in sources]
    total = sum(s.probability for s in sources)
    pairs = data.Pairs(readers, [s.probability / total for s in sources], config.seed,
                       config.image_size, config.mode, ordered=True)
    if count > len(pairs):
        raise ValueError(f"{count} held-out pairs are asked for, but there are {len(pairs)}")
    return torch.utils.data.Subset(pairs, range(count))


@torch.no_grad()
def views_of(net, batch, config, depth_net=None):
    """The model's answer to a batch of pairs, and the two true views: three of (b, 3, h, w)."""
    device = net.betas.device
    batch["image_cond"] = image_cond = data.images(batch["image_cond"].to(device))
    T = model.pose_vector(batch, config.mode, depth_net, config.quantile_blend).to(device)
    views = novel_views(net, image_cond, T, batch["number"].tolist(), config.seed, config.sampler,
                        config.sample_steps, config.eta, config.guidance)
    return views, image_cond, data.images(batch["image_target"].to(device))


def evaluate(net, pairs, config, depth_net=None):
    """{method: (b,) PSNR of every pair} of the model and the baselines over `pairs`."""
    scores = {}
    for start in range(0, len(pairs), config.micro_batch):
        numbers = range(start, min(start + config.micro_batch, len(pairs)))
        batch = torch.utils.data.default_collate([pairs[k] for k in numbers])
        views, image_cond, truth = views_of(net, batch, config, depth_net)
        for name, guess in {"this model": views, **baselines(image_cond)}.items():
            scores.setdefault(name, []).append(psnr(guess, truth).cpu())
    return {name: torch.cat(rows) for name, rows in scores.items()}


def report(scores):
    """The table of `evaluate` as lines of text, best first, and a verdict."""
    width = max(map(len, scores))
    mean = {name: row.mean().item() for name, row in scores.items()}
    error = {name: row.std().item() / len(row)**0.5 for name, row in scores.items()}
    pairs = len(scores["this model"])
    lines = [f"held-out PSNR over {pairs} pairs of scenes never seen in training"]
    lines += [f"  {name:{width}}  {mean[name]:6.2f} dB +- {error[name]:.2f}"
              for name in sorted(mean, key=mean.get, reverse=True)]
    best = max((name for name in mean if name != "this model"), key=mean.get)
    lead = scores["this model"] - scores[best]
    margin, spread = lead.mean().item(), lead.std().item() / len(lead)**0.5
    clear = 3 * spread      # three standard errors of the paired difference
    verb = "beats" if margin > clear else "loses to" if margin < -clear else "equals, within noise,"
    lines.append(f"the model {verb} the best baseline ({best}): {margin:+.2f} dB +- {spread:.2f}")
    return lines


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


def device_of(config):
    """The torch.device that a Config asks for. Raises ValueError where this machine has none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if config.device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    if not there[config.device]:
        raise ValueError(f"device {config.device!r} is not there; this machine has "
                         + ", ".join(name for name in there if there[name]))
    return torch.device(config.device)


def load_depth(config, device):
    """The depth network of a Config, or nothing where it names no weights."""
    if not config.depth_weights:
        return None
    return depth.load(config.depth_weights).to(device).eval()


def main(argv):
    folder = checkpoint.latest(argv[0]) if argv else None
    if folder is None:
        raise FileNotFoundError(f"no checkpoint in {argv[0] if argv else '(no folder was given)'}; "
                                "python evaluate.py out/synth reads the newest one of a run")
    meta = json.loads((Path(folder) / "meta.json").read_text())
    config = configs.override(configs.from_dict(meta["config"]), argv[1:])
    device = device_of(config)
    net = model.build(config).to(device).eval()
    checkpoint.load_model(net, folder, ema=True)
    pairs = held_out_pairs(config, config.eval_pairs)
    scores = evaluate(net, pairs, config, load_depth(config, device))
    print("\n".join([f"{folder}:"] + report(scores)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as err:
        print(f"evaluate.py: {err}", file=sys.stderr)
        sys.exit(2)
