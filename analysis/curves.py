"""Learning curves: what runs logged, against the pairs that they had seen, as one SVG picture.

    python curves.py out/synth out/long --figure val_psnr --out curves.svg
    python curves.py out/bf16 out/fp32 --figure loss --log
"""

import argparse
import html
import json
import math
import sys
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 720, 420, 60        # of the picture, in its own units
TICKS = 5                                   # steps between labels of an axis, about
LABEL = 16                                  # height of a line of the legend
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def read(folder, figure):
    """[(pairs seen, value)] of one figure that a run logged. ValueError, FileNotFoundError."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {folder} is no run of train.py")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    metas = sorted(Path(folder).glob("step_*/meta.json"))
    if not metas:
        raise ValueError(f"{folder} has no checkpoint, whose meta.json says the pairs of a step")
    batch_size = json.loads(metas[-1].read_text())["config"]["batch_size"]
    points = {line["step"] * batch_size: line[figure] for line in lines
              if isinstance(line.get(figure), (int, float))}
    if not points:
        known = sorted({name for line in lines for name, value in line.items()
                        if isinstance(value, (int, float))} - {"step"})
        raise ValueError(f"{path} has no {figure!r}, it has {', '.join(known)}")
    return sorted(points.items())       # what a run did again after a stop counts once, as last


def ticks(low, high):
    """Round numbers from low to high, about TICKS of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low, high):
    """1, 2 and 5 times powers of ten from low to high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
            if low <= tick <= high]


def svg(curves, title, log=False):
    """The picture of {name: [(x, y)]} as text. log: y is. ValueError where it cannot be."""
    xs, ys = ([point[i] for points in curves.values() for point in points] for i in (0, 1))
    x_high, y_low, y_high = max(xs), min(ys), max(ys)
    if log and y_low <= 0:
        raise ValueError(f"--log needs values above 0, the lowest is {y_low:g}")
    if y_high == y_low:
        y_low, y_high = (y_low / 2, 2 * y_high) if log else (y_low - 1, y_high + 1)
    marks, scale = (log_ticks, math.log10) if log else (ticks, float)
    bottom, top = scale(y_low), scale(y_high)

    def place(x, y):
        return (MARGIN + x / x_high * (WIDTH - 2 * MARGIN),
                HEIGHT - MARGIN - (scale(y) - bottom) / (top - bottom) * (HEIGHT - 2 * MARGIN))

    def text(x, y, words, anchor):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" '
             'fill="white"/>']
    for x in ticks(0, x_high):
        left = MARGIN + x / x_high * (WIDTH - 2 * MARGIN)
        parts.append(text(left, HEIGHT - MARGIN + LABEL, f"{x:,.0f}", "middle"))
    for y in marks(y_low, y_high):
        left, height = place(0, y)
        parts.append(f'<line x1="{left}" x2="{WIDTH - MARGIN}" y1="{height:.1f}" '
                     f'y2="{height:.1f}" stroke="#dddddd"/>')
        parts.append(text(left - 6, height + 4, f"{y:g}", "end"))
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<g fill="{colour}">')
        parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(*place(*p)) for p in points]
        parts.append(text(WIDTH - MARGIN, HEIGHT - MARGIN - LABEL * (len(curves) - i), name, "end")
                     + "</g>")
    parts.append(text(WIDTH / 2, HEIGHT - MARGIN / 4, "pairs seen", "middle"))
    parts.append(text(MARGIN, MARGIN / 2, title, "start"))
    return "\n".join([*parts, "</svg>\n"])


def main(argv):
    p = argparse.ArgumentParser(prog="curves.py", description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", metavar="FOLDER", help="runs of train.py")
    p.add_argument("--figure", default="val_psnr", help="what of log.jsonl to draw (%(default)s)")
    p.add_argument("--log", action="store_true", help="on a logarithmic axis")
    p.add_argument("--out", default="curves.svg", metavar="FILE", help="(%(default)s)")
    args = p.parse_args(argv)
    try:
        if Path(args.out).suffix != ".svg":
            raise ValueError(f"--out {args.out}: the picture is SVG, its name must end in .svg")
        curves = {Path(run).name: read(run, args.figure) for run in args.runs}
        Path(args.out).write_text(svg(curves, args.figure, args.log))
    except (ValueError, OSError) as err:
        print(f"curves.py: {err}", file=sys.stderr)
        sys.exit(2)
    print(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
