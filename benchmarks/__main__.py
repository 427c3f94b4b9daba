"""Measures the product beside peers and ceilings, prints a table, and writes its rows.

    python -m benchmarks train --batch 192 48       steps of training, beside diffusers'
    python -m benchmarks scale --gpus 1 2 8         ranks of one machine; --check: the same losses?
    python -m benchmarks sample | encode            views, beside diffusers and transformers
    python -m benchmarks engine --batch 192         with and without each part of the engine
    python -m benchmarks load                       a checkpoint, beside reading its bytes
"""

import tempfile

from runtime import command

SUITES = {"train": ("networks", "steps of training the full-size UNet"),
          "scale": ("networks", "training steps on several GPUs of one machine"),
          "sample": ("networks", "seconds a view"),
          "encode": ("networks", "views through the frozen encoders"),
          "engine": ("networks", "rates with and without each part of the engine"),
          "load": ("load", "a model filled from a file of zero123-xl's structure")}
VARIANTS = {"train": ("compiled", "diffusers, compiled", "eager", "diffusers, eager"),
            "sample": ("product", "diffusers, compiled", "product, compiled", "product, plain",
                       "diffusers, eager"),
            "encode": ("product, compiled", "peers, compiled", "product, eager", "peers, eager")}
PARTS, RATES = ("noise", "norm", "geglu", "conv", "unet"), ("train", "sample", "encode")
# (benchmarks, option, default, help): a list takes several values; choices are those of CHOICES
OPTIONS = [
    ("train engine", "batch", [192, 48], "pairs a step"),
    ("scale", "batch", 192, "pairs a GPU"),
    ("encode", "batch", 64, "views at once"),
    ("sample", "views", [1, 16, 24], "views at once"),
    ("engine", "views", [1, 16], "views at once"),
    ("scale", "gpus", [], "how many, one after the other; without: 1, and all there are"),
    ("scale", "check", False, "instead: the losses of steps of the same --batch pairs in all"),
    ("scale", "divide-optimizer", False, "also with moments and average divided (ZeRO-1)"),
    ("train scale sample encode engine", "tiny", False, "a network of a few kilobytes"),
    ("engine", "without", list(PARTS), "parts that are left out, one at a time"),
    ("engine", "rates", list(RATES), "what is measured"),
    ("load", "channels", 320, "width of the UNet: 320 is zero123-xl's, 15.5 GB"),
    ("load", "folder", tempfile.gettempdir(), "where the file is written, and removed again"),
    (" ".join(SUITES), "json", "", "file to write the rows to"),
    (" ".join(SUITES), "seconds-limit", 560, "of everything")]
CHOICES = {"without": PARTS, "rates": RATES}


def parser():
    p = command.Parser("python -m benchmarks", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="name", required=True, metavar="NAME")
    subs = {name: commands.add_parser(name, help=text, description=text)
            for name, (_, text) in SUITES.items()}
    for names, option, default, text in OPTIONS:
        kind = {"help": f"{text} (%(default)s)", "default": default}
        if default is False:
            kind |= {"help": text, "action": "store_true"}
        elif not isinstance(default, str):
            kind |= {"metavar": "N", "nargs": "+" if isinstance(default, list) else None}
            kind |= ({"choices": CHOICES[option], "metavar": "NAME"} if option in CHOICES else
                     {"type": command.numbers_of(int, 1)})
        for name in names.split():
            subs[name].add_argument(f"--{option}", **kind)
    for name, variants in VARIANTS.items():
        add = subs[name].add_argument
        add("--variants", nargs="+", choices=variants, metavar="NAME", default=variants[:2],
            help=f"what is measured, of {'; '.join(variants)} (the first two)")
        add("--no-ceilings", dest="ceilings", action="store_false",
            help="without the rate of a large product, and so without shares of it")
    return p


def main(args):
    import importlib
    import json

    from benchmarks.measure import table
    from runtime.files import write_text

    suite = importlib.import_module(f"benchmarks.{SUITES[args.name][0]}")
    rows = getattr(suite, f"run_{args.name}")(args)
    print(table(rows))
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command.run("python -m benchmarks", main, parser().parse_args())
