"""Scores and comparisons; and the command line of `data.py`, without torch."""

import os

from configs import FORMATS
from runtime import command


def shards_parser():
    """The command line of `python data.py inspect` and `verify`, see inspect.py."""
    top = command.Parser("data.py", description="Looks into shards.")
    commands = top.add_subparsers(dest="command", required=True, metavar="inspect | verify")
    whole = command.numbers_of(int, 1)
    for name, text, option, default, kind, what in (
            ("inspect", "print what shards hold, and draw views, depths and cameras", "--out",
             "inspect.png", command.words, "the picture's name (%(default)s)"),
            ("verify", "read every member, and check cameras against images and depths",
             "--workers", os.cpu_count() or 1, whole, "processes (%(default)s)")):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("shards", nargs="+",
                         help="files, globs, {000..012} patterns, http:// addresses")
        sub.add_argument("--format", choices=FORMATS, help="of the shards; else it is detected")
        sub.add_argument("--size", type=whole, help="side of the images in pixels; else detected")
        sub.add_argument(option, default=default, type=kind, help=what)
    return top
