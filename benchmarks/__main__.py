"""Measures the product beside peers and ceilings, prints a table, and writes its rows.

    python -m benchmarks train --batch 192 48       steps of training, beside diffusers'
    python -m benchmarks sample | encode            views, beside diffusers and transformers
    python -m benchmarks engine --batch 192         with and without each part of the engine
"""

from benchmarks import PARTS, VARIANTS
from runtime import command

BENCHMARKS = {"train": "steps of training the full-size UNet", "sample": "seconds a view",
              "encode": "views through the frozen encoders",
              "engine": "rates with and without each part of the engine"}
# {benchmark: {option: pairs a step, or views at once}}
SIZES = {"train": {"batch": [192, 48]}, "sample": {"views": [1, 16, 24]}, "encode": {"batch": [64]},
         "engine": {"batch": [192, 48], "views": [1, 16]}}


def parser():
    p = command.Parser("python -m benchmarks", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="name", required=True, metavar="NAME")
    number = {"type": command.numbers_of(int, 1), "metavar": "N"}
    for name, text in BENCHMARKS.items():
        add = commands.add_parser(name, help=text, description=text).add_argument
        chosen = {"variants": (list(VARIANTS[name])[:2], VARIANTS[name])} if name in VARIANTS else {
            "without": (list(PARTS), PARTS), "rates": (list(VARIANTS), VARIANTS)}
        for option, (default, choices) in chosen.items():
            add(f"--{option}", nargs="+", metavar="NAME", choices=list(choices), default=default,
                help=f"of {'; '.join(choices)} (%(default)s)")
        for option, default in SIZES[name].items():
            add(f"--{option}", nargs="+", default=default, help="how many at once (%(default)s)",
                **number)
        add("--json", default="", metavar="FILE", help="to write the rows to")
        add("--seconds-limit", default=560, help="of everything (%(default)s)", **number)
    return p


def main(args):
    import json

    from benchmarks import networks
    from benchmarks.measure import table
    from runtime.files import write_text

    rows = (networks.run_engine if args.name == "engine" else networks.run_variants)(args)
    print(table(rows))
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command.run("python -m benchmarks", main, parser().parse_args())
