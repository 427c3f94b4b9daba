"""Which solver is near the limit of many steps in how few: its distance to it, and to the truth.

    python -m analysis.solvers weights/small.safetensors --config configs/synth.py --pairs 8

The limit is DDIM of 1,000 steps without noise, from the same noise on the same held-out pairs; RMSE
is of latents. Two ways of guiding that cost less stand beside: at the middle timesteps alone, and
with the difference of the two branches evaluated at every second step.
"""

from runtime import command
from views import add_data_options

LIMIT, FEW, GUIDANCES = 1000, (8, 10, 15, 20, 25), (1.0, 3.0)
SOLVERS = {("ddim", "trailing"): (LIMIT, 20, 50, 100),
           **{(name, spacing): FEW for spacing in ("trailing", "logsnr")
              for name in ("dpm++", "unipc")}}
CHEAPER, MIDDLE = ("dpm++", "trailing", 20), (200, 800)     # a solver; timesteps


def parser():
    p = command.Parser("solvers.py", description=__doc__.splitlines()[0])
    p.add_argument("run", help="a run's folder or a checkpoint")
    add_data_options(p)
    p.add_argument("--pairs", type=command.numbers_of(int, 2), default=256, metavar="N",
                   help="held-out pairs (%(default)s)")
    p.add_argument("--out", metavar="FILE", help="a curve too, .svg or .png, by matplotlib")
    return p


ARGS = parser().parse_args() if __name__ == "__main__" else None        # before torch is imported

import torch

import diffusion
from analysis import curves, metrics, score
from runtime.networks import load_depth
from runtime.ranks import device_of
from views import render


def reused(plain, full):
    """Guidance `full`, whose difference to `plain` is evaluated at every second step alone."""
    kept = []

    def follow(z_t, t):
        eps = plain(z_t, t)
        if kept:
            return eps + kept.pop()
        kept.append(full(z_t, t) - eps)
        return eps + kept[0]
    return follow


@torch.no_grad()
def distances(net, batch, config, depth_net=None):
    """{(guidance, way, steps): RMSE, PSNR to the limit, PSNR to the truth, as (3, b)}."""
    image_cond, T, truth = score.conditions(net, batch, config, depth_net)
    z_cond, context = net.encode(image_cond)[0], net.context(net.embed(image_cond), T)
    z_T = diffusion.normal(config.seed, diffusion.SAMPLE, batch["number"].to(z_cond.device),
                           z_cond.shape[1:])
    found, plain = {}, diffusion.guided(net.eps, z_cond, context, 1.0)
    for g in GUIDANCES:
        full = diffusion.guided(net.eps, z_cond, context, g)
        ways = [(", ".join(how), full, *how, steps)
                for how, several in SOLVERS.items() for steps in several]
        if g != 1:
            ways += [("guided from {} to {}".format(*MIDDLE),
                      diffusion.guided(net.eps, z_cond, context, g, MIDDLE), *CHEAPER),
                     ("difference reused", reused(plain, full), *CHEAPER)]
        for label, follow, sampler, spacing, steps in ways:
            z_0 = diffusion.sample(follow, z_T, net.alphas_cumprod, sampler, steps, eta=0,
                                   spacing=spacing)
            view = net.decode(z_0).clamp(-1, 1)
            if steps == LIMIT:
                limit, picture = z_0, view
            found[g, label, steps] = torch.stack([
                (z_0 - limit).square().mean((1, 2, 3)).sqrt(), metrics.psnr(view, picture),
                metrics.psnr(view, truth)])
    return found


def main(args):
    """The command, options parsed. Raises ValueError or OSError with one line."""
    tensors, config = render.open_run(args.run, args.data, args.config, args.init)
    pairs, device = score.held_out_pairs(config, args.pairs), device_of(config.device)
    net = render.load(tensors, device, "fp32")[0]
    depth_net = load_depth(config.depth_weights, device)
    batches = []
    for places in command.progress(score.batches_of(pairs, config), "solvers", "batches"):
        batches.append(distances(net, pairs.__getitems__(places), config, depth_net))
    print(f"{'guidance':9}{'way':24}{'steps':>6}{'RMSE':>9}{'PSNR to the limit':>20}{'truth':>8}")
    lines = {}
    for g, label, steps in batches[0]:
        rows = torch.cat([each[g, label, steps] for each in batches], dim=1).double()
        rmse, near, true = rows.mean(1).tolist()
        error = rows[1].std().item() / args.pairs**0.5
        print(f"{g:<9g}{label:24}{steps:6}{rmse:9.4f}"
              f"{'' if steps == LIMIT else f'{near:.2f} +- {error:.2f}':>20}{true:8.2f}")
        if steps != LIMIT and "," in label:
            lines.setdefault(f"{label}, guidance {g:g}", []).append((steps, near))
    if args.out:
        curves.draw(lines, "PSNR to the limit, dB", args.out, across="steps")


if __name__ == "__main__":
    command.run("solvers.py", main, ARGS)
