"""Makes shards: tar files of scenes, in the layouts that data.py reads.

    python prepare.py synth                             # synthetic scenes, into data/synth
    python prepare.py co3d CO3D                         # CO3D v2 as downloaded, into data/co3d
    python prepare.py re10k --cameras RealEstate10K/train --frames FRAMES       # and acid
    python prepare.py photos FOLDER ...                 # photos or videos, whose cameras are found
    python prepare.py colmap CAPTURE ...                # COLMAP models with their images
    python prepare.py nerfstudio CAPTURE ...            # folders with a transforms.json
    python prepare.py encode SHARDS ... --weights zero123-xl.ckpt    # raw shards to encoded ones

Shards are written under another name and renamed, so a shard that exists is whole, and the same
arguments give the same bytes: running a command again goes on where it stopped.
"""

from argparse import ArgumentDefaultsHelpFormatter

from captures import COMMANDS, add_options
from runtime import command


def parser():
    """The command line: one sub-command a kind of shard."""
    top = command.Parser("prepare.py", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        add_options(commands.add_parser(name, help=text, description=text,
                                        formatter_class=ArgumentDefaultsHelpFormatter), name)
    return top


def main(argv=None):
    """Runs a sub-command; bad input ends with one line and exit code 2, an interrupt with 130."""
    args = parser().parse_args(argv)
    if args.command == "synth":         # imported here, so that --help pays for none of it
        from captures.synth import run
    elif args.command == "encode":
        from captures.encode import run
    else:
        from captures.make import run_captures as run
    if args.command in ("re10k", "acid"):
        args.depth = bool(args.colmap)
    run(args)


if __name__ == "__main__":
    command.run("prepare.py", main)
