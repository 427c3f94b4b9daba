"""Measures the product beside peers and ceilings, prints a table, and writes its rows.

    python -m benchmarks train --batch 192 48       steps of training, beside diffusers'
    python -m benchmarks scale --gpus 1 2 8         ranks of one machine; --check: the same losses?
    python -m benchmarks sample | encode            views, beside diffusers and transformers
    python -m benchmarks engine --batch 192         with and without each part of the engine
    python -m benchmarks load                       a checkpoint, beside reading its bytes
"""

import tempfile

from benchmarks import PARTS, VARIANTS
from runtime import command

BENCHMARKS = {"train": "steps of training the full-size UNet",
              "scale": "training steps on several GPUs of one machine",
              "sample": "seconds a view",
              "encode": "views through the frozen encoders",
              "engine": "rates with and without each part of the engine",
              "load": "a model filled from a file of zero123-xl's structure"}
# (benchmarks, option, default, help, choices); a list takes several values
OPTIONS = [
    *((name, "variants", list(variants)[:2], "what is measured", variants)
      for name, variants in VARIANTS.items()),
    ("train engine", "batch", [192, 48], "pairs a step"),
    ("scale", "batch", 192, "pairs a GPU"),
    ("encode", "batch", [64], "views at once"),
    ("sample", "views", [1, 16, 24], "views at once"),
    ("engine", "views", [1, 16], "views at once"),
    ("scale", "gpus", [], "how many, one after the other; without: 1, and all there are"),
    ("scale", "check", False, "instead: the losses of steps of the same --batch pairs in all"),
    ("scale", "divide-optimizer", False, "also with moments and average divided (ZeRO-1)"),
    (" ".join(BENCHMARKS), "tiny", False, "a network of a few kilobytes"),
    ("train sample encode", "no-ceilings", False,
     "without the rate of a large product, and so without shares of it"),
    ("engine", "without", list(PARTS), "parts that are left out, one at a time", PARTS),
    ("engine", "rates", list(VARIANTS), "what is measured", VARIANTS),
    ("load", "folder", tempfile.gettempdir(), "where 15.5 GB are written, and removed again"),
    (" ".join(BENCHMARKS), "json", "", "file to write the rows to"),
    (" ".join(BENCHMARKS), "seconds-limit", 560, "of everything")]


def parser():
    p = command.Parser("python -m benchmarks", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="name", required=True, metavar="NAME")
    subs = {name: commands.add_parser(name, help=text, description=text)
            for name, text in BENCHMARKS.items()}
    for names, option, default, text, *choices in OPTIONS:
        kind = {"help": f"{text} (%(default)s)", "default": default}
        if default is False:
            kind = {"help": text, "action": "store_true"}
        elif choices:
            kind |= {"choices": list(choices[0]), "metavar": "NAME", "nargs": "+",
                     "help": f"{text}, of {'; '.join(choices[0])} (%(default)s)"}
        elif not isinstance(default, str):
            kind |= {"type": command.numbers_of(int, 1), "metavar": "N",
                     "nargs": "+" if isinstance(default, list) else None}
        for name in names.split():
            subs[name].add_argument(f"--{option}", **kind)
    return p


def main(args):
    import json

    from benchmarks import load, networks
    from benchmarks.measure import table
    from runtime.files import write_text

    run = {"load": load.run, "scale": networks.run_scale, "engine": networks.run_engine}
    rows = run.get(args.name, networks.run_variants)(args)
    print(table(rows))
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command.run("python -m benchmarks", main, parser().parse_args())
