"""Learning curves: what runs logged, against the pairs that they had seen, as one picture.

    python -m analysis.curves out/synth out/long --figure val_psnr --out curves.svg
    python -m analysis.curves out/bf16 out/fp32 --figure loss --log
"""

import json
from pathlib import Path

from runtime import command
from runtime.files import logged_rows, unfinished


def read(folder, figure):
    """[(pairs seen, value)] of one figure that a run logged. ValueError, FileNotFoundError."""
    path, metas = Path(folder) / "log.jsonl", sorted(Path(folder).glob("step_*/meta.json"))
    if not path.is_file() or not metas:
        raise FileNotFoundError(f"{folder} is no run of train.py: it has no {path.name} or no "
                                "checkpoint, whose meta.json says the pairs of a step")
    batch_size = json.loads(metas[-1].read_text(encoding="utf-8"))["config"]["batch_size"]
    lines = [{name: value for name, value in row.items() if isinstance(value, (int, float))}
             for row in logged_rows(path)]
    # what a run did again after a stop counts once, as last
    points = {line["step"] * batch_size: line[figure] for line in lines if figure in line}
    if not points:
        there = sorted({name for line in lines for name in line} - {"step"})
        raise ValueError(f"{path} has no {figure!r}, it has {', '.join(there)}")
    return sorted(points.items())


def draw(curves, title, path, log=False, across="pairs seen"):
    """Writes the picture of {name: [(x, y)]}, in the format that the path's ending says. log: y is
    on a logarithmic axis. across: what x is. ValueError where it cannot be."""
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ValueError("curves are drawn by matplotlib: pip install matplotlib") from err
    lowest = min(y for points in curves.values() for _, y in points)
    if log and lowest <= 0:
        raise ValueError(f"--log needs values above 0, the lowest is {lowest:g}")
    picture = Figure(figsize=(8, 5), layout="constrained")
    if Path(path).suffix[1:] not in picture.canvas.get_supported_filetypes():
        raise ValueError(f"--out {path}: the name must end in .svg, .png or .pdf")
    axes = picture.add_subplot(xlabel=across, ylabel=title,
                               yscale="log" if log else "linear")
    for name, points in curves.items():
        axes.plot(*zip(*points), marker=".", label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    with unfinished(path) as partial:
        picture.savefig(partial, format=Path(path).suffix[1:])


def parser():
    p = command.Parser("curves.py", description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", metavar="FOLDER", help="runs of train.py")
    p.add_argument("--figure", default="val_psnr", help="what of log.jsonl to draw (%(default)s)")
    p.add_argument("--log", action="store_true", help="on a logarithmic axis")
    p.add_argument("--out", default="curves.svg", metavar="FILE", help="(%(default)s)")
    return p


def main(args):
    draw({Path(run).name: read(run, args.figure) for run in args.runs}, args.figure, args.out,
         args.log)
    print(args.out)


if __name__ == "__main__":
    command.run("curves.py", main, parser().parse_args())
