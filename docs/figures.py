"""The figures of walkthrough.md, each made by the project's own functions, drawn by matplotlib.

    python -m docs.figures                      all of them, into docs/walk/: under a minute
    python -m docs.figures guidance modes       some

Scenes are those of `prepare.py synth`, rendered here; the network is weights/small.safetensors. The
figure `broken` draws what broken.py measured.
"""

import argparse
import functools
import io
import json
import math
import sys

import torch
from PIL import Image

import camera
import diffusion
import model
from captures import solids, synth
from docs.broken import MEASURED, OUT, ROOT
from views import pictures, render

SIZE, VIEWS, MOTION = 64, 6, 0.5        # of the scenes: what the small weights have learnt of
INK, BLUE, RED, GREEN, PALE = "#1f2328", "#0969da", "#cf222e", "#1a7f37", "#eaeef2"
COLORS = 128                # of a PNG's palette
GUIDED = 0, 1, 1.5, 2, 3, 4, 6, 8


# ---- a scene and the small network

@functools.cache
def scene(number):
    """(cameras c2w (v, 4, 4), fov, images (v, 3, s, s), depths (v, s, s)) of a held-out scene."""
    made = synth.scene(0, synth.HELD_OUT + number)
    c2w = solids.cameras(made, VIEWS, MOTION)
    return c2w, made.fov, *synth.render(made, c2w, made.fov, SIZE)


@functools.cache
def small():
    """The ZeroNVS of the small weights, and its Config."""
    return render.load(ROOT / "weights" / "small.safetensors", "cpu", "fp32")


def pose(mode, number, cond, target, unit=1.0, stored=range(VIEWS)):
    """The pose vector T (1, d) of two views of a scene. unit: all its lengths are so many times as
    large; stored: the views that the scene's near plane and its cameras' extent are of."""
    c2w, fov, _, depths = scene(number)
    c2w = c2w.clone()
    c2w[:, :3, 3] *= unit
    scales = {"viewer": camera.quantile_scale(unit * depths[cond][None]),
              "nearplane": camera.stereomag_scale(
                  (unit * depths[list(stored)]).flatten(1).quantile(0.05, 1).quantile(0.1)[None]),
              "cameras": camera.scene_geometry(c2w[list(stored)]).radius[None]}
    scale = scales.get(camera.mode_named(mode).unit, torch.ones(1))
    return camera.conditioning(mode, c2w[cond][None], c2w[target][None], torch.tensor([fov]),
                               scale)


def views(number, cond, target, **options):
    """The small network's view `target` of a scene from view `cond`: (1, 3, s, s)."""
    net, config = small()
    T = pose(config.mode, number, cond, target).float()
    return diffusion.novel_views(net, scene(number)[2][cond][None], T, [0], **{
        "sampler": "dpm++", "steps": 10, "guidance": 1.5, **options})


# ---- drawing

def canvas(width, height, panels=1, rows=1):
    """(figure, its axes) in inches, on white, so that it is read on a dark page too."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False, "svg.hashsalt": "zeronvs"})
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, panels)


def save(made, path):
    """Writes a figure, or an image, as SVG or as a PNG of few colours."""
    if path.suffix == ".svg":
        made.savefig(path, metadata={"Date": None})
        return
    if not isinstance(made, Image.Image):
        file = io.BytesIO()
        made.savefig(file, dpi=100)
        made = Image.open(file).convert("RGB")
    made.quantize(COLORS).save(path, optimize=True)


# ---- the figures

def schedule():
    """Section 2: one image at five timesteps, and how much of it and of noise is in z_t."""
    figure, _ = canvas(7.5, 3.8)
    figure.clear()
    axes = figure.subplot_mosaic("01234;ppppp")
    tables, z = diffusion.schedule_buffers(), scene(4)[2][1]
    noise = diffusion.normal(0, diffusion.NOISE, torch.tensor([0]), z.shape)[0]
    signal, sigma = tables["sqrt_alphas_cumprod"], tables["sqrt_one_minus_alphas_cumprod"]
    for panel, t in zip("01234", (0, 250, 500, 750, 999)):
        axes[panel].imshow(pictures.image(signal[t] * z + sigma[t] * noise))
        axes[panel].set_title(f"t = {t}", fontsize=9)
        axes[panel].axis("off")
    below = axes["p"]
    below.set(xlabel="timestep t", xlim=(0, 999))
    below.plot(signal, color=BLUE, label="signal: sqrt(abar)")
    below.plot(sigma, color=RED, label="sigma: sqrt(1 - abar)")
    below.legend(frameon=False)
    return figure


def cameras():
    """Section 4: the axes of a camera; the cameras of a scene from above; a relative pose."""
    figure, (left, right) = canvas(8, 3.4, 2)
    left.set(xlim=(-1.6, 1.9), ylim=(-1.5, 1.6), aspect="equal", title="OpenGL: the axes in a view")
    left.fill([-1.4, 1.4, 1.4, -1.4], [-1.4, -1.4, 1.4, 1.4], facecolor=PALE, edgecolor=INK)
    for tip, at, name, color in (((1.1, 0), (0.75, 0.12), "x right", RED),
                                 ((0, 1.1), (0.1, 0.8), "y up", GREEN)):
        left.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
        left.text(*at, name, color=color)
    left.plot(0, 0, "o", color=BLUE, ms=12, mfc="white")
    left.plot(0, 0, ".", color=BLUE)
    left.text(-1.1, -0.55, "z towards you;\nit looks along -z", color=BLUE)
    left.axis("off")
    c2w, fov, _, _ = scene(4)
    for i, c in enumerate(c2w.numpy()):
        color = {1: RED, 4: BLUE}.get(i, "#8c959f")
        eye, wing = c[:2, 3], math.tan(fov / 2)
        reach = 0.3 * float(c2w[0, :2, 3].norm())
        for side in (-1, 1):
            edge = eye + reach * (c[:2, :3] @ [side * wing, 0, -1])
            right.plot(*zip(eye, edge), color=color, lw=2 if color in (RED, BLUE) else 1)
        right.text(*eye, {1: "cond  ", 4: "target  "}.get(i, ""), color=color, ha="right")
    relative = camera.relative_pose(c2w[1], c2w[4])[:3, 3].tolist()
    right.annotate("", c2w[4, :2, 3], c2w[1, :2, 3], arrowprops={"arrowstyle": "->"})
    right.set(aspect="equal", xlabel="world x", ylabel="world y", title=(
        "inv(cond_c2w) @ target_c2w moves by\n({:+.2f}, {:+.2f}, {:+.2f}) in cond's axes".format(
            *relative)))
    right.margins(x=0.25)
    return figure


def modes():
    """Section 4: T of one pair of views in five modes: of a scene, of the same scene in a unit a
    third as long, of the same scene when only four of its views are stored; and what bounds T."""
    figure, axes = canvas(10, 5.2, 3, 2)
    named = {name: mode for name, mode in camera.MODES.items() if mode.paper}
    for panel, (name, mode) in zip(axes.flat, named.items()):
        one, three = (pose(name, 4, 1, 4, unit)[0] for unit in (1, 3))
        four = pose(name, 4, 1, 4, stored=range(1, 5))[0]
        moved = ~(torch.isclose(one, three, atol=1e-4) & torch.isclose(one, four, atol=1e-4))
        for i in moved.nonzero().flatten().tolist():
            panel.axvspan(i - 0.5, i + 0.5, color="#ffebe9", lw=0)
        panel.plot(one, "o", color=BLUE, ms=4, label="a scene")
        panel.plot(three, "o", color=RED, ms=8, mfc="none", label="all lengths x 3")
        panel.plot(four, "+", color=GREEN, ms=9, label="four of its views")
        panel.set(title=f"{mode.paper} ({name})", xlabel="entry of T", xticks=(
            range(4) if mode.pose == "angles" else (3, 7, 11, 16, 18)))
        panel.axhline(0, color=INK, lw=0.5)
    axes[0, 0].legend(frameon=False, fontsize=8)
    t, last = torch.linspace(-30, 30, 200), axes[1, 2]
    last.plot(t, t.clamp(-camera.LARGEST_ENTRY, camera.LARGEST_ENTRY), color=BLUE, label="clip")
    last.plot(t, camera.TANH_GAIN * camera.TANH_RANGE * torch.tanh(t / camera.TANH_RANGE),
              color=RED, label="squash")
    last.set(title="bounds", xlabel="translation / scale", ylabel="entry of T")
    last.legend(frameon=False, fontsize=8)
    last.grid(alpha=0.3)
    return figure


def guidance():
    """Section 5: the small network's views of three photos at guidance 0 to 8, from one noise."""
    rows = []
    for number in (4, 1, 10):
        images = scene(number)[2]
        rows.append([("photo", pictures.image(images[1])), ("truth", pictures.image(images[4]))] + [
            (f"{g:g}", pictures.image(views(number, 1, 4, guidance=g)[0])) for g in GUIDED])
    return pictures.sheet(rows, side=SIZE)


KINDS = {"convolutions": ("conv",), "matrix products": ("mm", "linear"),
         "attention": ("attention",), "norms": ("norm",), "optimizer": ("adam", "foreach", "lerp")}


def profile():
    """Section 7: where a training step of the small network goes on a CPU, by torch.profiler."""
    config = small()[1]
    net, (shape, numbers) = model.build(config), (model.latent_shape(config), torch.arange(8))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-4)
    z, embedding, T = torch.randn(8, *shape), torch.zeros(8, 0), torch.randn(8, 19)

    def step():
        draws = diffusion.draw(config.seed, numbers, shape)
        optimizer.zero_grad()
        net(z, torch.full_like(z, -30), z, embedding, T, draws).mean().backward()
        optimizer.step()

    step()
    with torch.profiler.profile() as trace:
        step()
    times = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in trace.key_averages():
        kind = next((kind for kind, words in KINDS.items()
                     if any(word in event.key.lower() for word in words)), "the rest")
        times[kind] += event.self_cpu_time_total
    figure, axes = canvas(7.5, 2)
    for kind, time in times.items():
        axes.barh(kind, 100 * time / sum(times.values()), color=BLUE)
    axes.set(xlabel="share of a training step on a CPU, %")
    axes.invert_yaxis()
    return figure


def samplers():
    """Section 8: what three samplers of six evaluations pass through, beside the path of 60; each
    latent by its shares of the first noise and of the latent that the path of 60 ends in."""
    net, config = small()
    abar, z_cond = net.alphas_cumprod, net.encode(scene(4)[2][1][None])[0]
    context = net.context(net.embed(z_cond), pose(config.mode, 4, 1, 4).float())
    eps = diffusion.guided(net.eps, z_cond, context, 1.0)
    z_T = diffusion.normal(0, diffusion.SAMPLE, torch.tensor([0]), z_cond.shape[1:])

    def path(sampler, steps):
        points = [z_T]
        diffusion.sample(eps, z_T, abar, sampler, steps, 0.0,
                         watch=lambda k, t, z_t, z_0: points.append(z_t))
        return points

    fine = path("unipc", 60)
    basis = torch.stack([fine[-1].flatten(), z_T.flatten()], dim=1)

    def shares(points):
        return torch.linalg.lstsq(basis, torch.stack([p.flatten() for p in points], 1))[0]

    figure, (left, right) = canvas(8.5, 3.2, 2)
    left.plot(*shares(fine), color=INK, lw=1, label="unipc, 60")
    for name, color, mark in (("ddim", RED, "o"), ("dpm++", BLUE, "s"), ("unipc", GREEN, "^")):
        left.plot(*shares(path(name, 6)), mark, color=color, mfc="none", label=f"{name}, 6")
        counts = 3, 5, 10, 20
        ends = [(path(name, n)[-1] - fine[-1]).square().mean().sqrt().item() for n in counts]
        right.plot(counts, ends, f"{mark}-", color=color, mfc="none", label=name)
    left.set(xlabel="share of the final latent", ylabel="share of the first noise")
    right.set(xlabel="evaluations of the network", ylabel="distance to the end of the path",
              xscale="log", yscale="log", xticks=counts, xticklabels=counts)
    right.xaxis.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    return figure


def broken():
    """Section 9: a right run, and what five broken ones say."""
    found = json.loads(MEASURED.read_text())
    figure, axes = canvas(10, 5.4, 3, 2)
    right = [line for line in map(json.loads, (ROOT / "weights" / "small.jsonl").read_text()
                                  .splitlines()) if "loss_by_timestep" in line]
    for band, color in zip(right[0]["loss_by_timestep"], (GREEN, BLUE, "#8250df", RED)):
        axes[0, 0].plot([line["step"] for line in right],
                        [line["loss_by_timestep"][band] for line in right], color=color, lw=1,
                        label=f"t {band}")
    axes[0, 0].set(title="right: configs/small.py, loss by timestep", yscale="log",
                   ylim=(0.008, 0.3))
    for panel, run, what, title in (
            (axes[0, 1], "mirrored cameras", "val_loss_750-999", "loss of t 750-999"),
            (axes[0, 2], "wrong scale", "val_loss_750-999", "loss of t 750-999"),
            (axes[1, 1], "leaking scenes", "val_psnr", "held-out PSNR, as it logs"),
            (axes[1, 2], "high rate", "loss", "training loss")):
        for name, color in (("sound", BLUE), (run, RED)):
            lines = [line for line in found[name]["log"] if what in line]
            panel.plot([line["step"] for line in lines], [line[what] for line in lines], ".-",
                       color=color, label=name)
        panel.set(title=f"{run}: {title}")
    for run, color in (("sound, longer", BLUE), ("no dropout", RED)):
        axes[1, 0].plot(found[run]["without"].keys(), found[run]["without"].values(), "o-",
                        color=color, label=run)
    axes[1, 0].set(title="no dropout: loss without conditions", ylim=0)
    last = found["leaking scenes"]["log"][-1]["step"]
    for run, color in (("sound", BLUE), ("leaking scenes", RED)):
        axes[1, 1].plot(last, found[run]["scored"]["1.5"]["psnr"], "*", color=color, ms=12,
                        label=f"{run}, scored")
    axes[1, 2].set_yscale("log")
    for panel in axes.flat:
        panel.legend(frameon=False, fontsize=7)
    return figure


FIGURES = {"schedule.png": schedule, "cameras.svg": cameras,
           "modes.png": modes, "guidance.png": guidance, "profile.svg": profile,
           "samplers.svg": samplers, "broken.png": broken}


def main(argv):
    parser = argparse.ArgumentParser("figures.py", description=__doc__.splitlines()[0])
    names = [name.partition(".")[0] for name in FIGURES]
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=", ".join(names) + " (all)")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"no figure {', '.join(unknown)}; there are {', '.join(names)}")
    OUT.mkdir(exist_ok=True)
    for file, draw in FIGURES.items():
        if file.partition(".")[0] in (args.names or names):
            save(draw(), OUT / file)
            print(OUT / file, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ImportError as err:
        sys.exit(f"figures.py: {err}; the figures are drawn by matplotlib: pip install matplotlib")
