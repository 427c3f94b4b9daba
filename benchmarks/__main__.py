"""Speed and memory, beside peers and against ceilings that are measured in the same run.

    python bench.py load|data|train|scale|encode|sample [--json FILE]

Each benchmark is a module of benchmarks/: `run(options)` gives rows, `add_options(parser)` its
options.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks import table

BENCHMARKS = ("load", "data", "train", "scale", "encode", "sample")


def main(argv):
    parser = argparse.ArgumentParser(description="Speed and memory, beside peers and ceilings.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0].partition(": ")[2])
        command.add_argument("--json", default="", help="file to write the rows to")
        module.add_options(command)
    given = parser.parse_args(argv)
    rows = modules[given.benchmark].run(given)
    print(table(rows))
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as err:
        print(f"bench.py: {err}", file=sys.stderr)
        sys.exit(2)
