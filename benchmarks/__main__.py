"""Measures the product beside peers and ceilings, prints a table, and writes its rows.

    python -m benchmarks train --batch 192 48       steps of training, beside diffusers'
    python -m benchmarks train --where compiled     GPU time by kind of kernel
    python -m benchmarks scale --gpus 1 2 8         ranks of one machine; --check: the same losses?
    python -m benchmarks sample | encode            views, beside diffusers and transformers
    python -m benchmarks engine --batch 192         with and without each part of the engine
    python -m benchmarks load | data                files, beside torch.load and webdataset
"""

import os
import tempfile

from runtime import command

SUITES = {"train": "networks", "scale": "networks", "sample": "networks", "encode": "networks",
          "engine": "networks", "load": "files", "data": "files"}
TRAIN = ("compiled", "diffusers, compiled", "eager", "compiled, from images",
         "diffusers, compiled, from images", "diffusers, eager")
SAMPLE = ("product", "diffusers, compiled", "product, compiled", "product, fp16", "product, plain",
          "diffusers, eager")
ENCODE = ("product, compiled", "peers, compiled", "product, eager", "peers, eager")
LOAD = ("reading the bytes", "product", "torch.load, mmap", "torch.load")
PARTS, RATES = ("adamw", "noise", "norm", "geglu", "conv", "unet"), ("train", "sample", "encode")
FORMATS = ("PNG", "JPEG", "WebP", "encoded")


def parser():
    p = command.Parser("python -m benchmarks", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="name", required=True, metavar="NAME")
    whole = command.numbers_of(int, 1)
    suites = {}
    for name, (text, variants, default, limit) in {
            "train": ("steps of training the full-size UNet", TRAIN, 2, 560),
            "scale": ("training steps on several GPUs of one machine", (), 0, 530),
            "sample": ("seconds a view", SAMPLE, 2, 470),
            "encode": ("views through the frozen encoders", ENCODE, 2, 470),
            "engine": ("rates with and without each part of the engine", (), 0, 580),
            "load": ("a model filled from a file", LOAD, 3, 580),
            "data": ("pairs read from shards", (), 0, 580)}.items():
        suites[name] = sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", default="", metavar="FILE", help="file to write the rows to")
        sub.add_argument("--seconds-limit", type=command.numbers_of(float, 0, above=True),
                         default=limit, metavar="S", help="of everything (%(default)s)")
        if variants:
            sub.add_argument("--variants", nargs="+", choices=variants, metavar="NAME",
                             default=list(variants[:default]),
                             help=f"what is measured, in order, of {'; '.join(variants)}")
        if name in ("load", "data"):
            sub.add_argument("--folder", default=tempfile.gettempdir(), metavar="FOLDER",
                             help="where files are written, and removed afterwards (%(default)s)")
        else:
            sub.add_argument("--tiny", action="store_true", help="a network of a few kilobytes")
        if name in ("train", "sample", "encode"):
            sub.add_argument("--where", choices=variants, metavar="NAME", default="",
                             help="profile this variant by kinds of kernel, and nothing else")
            sub.add_argument("--no-ceilings", dest="ceilings", action="store_false",
                             help="without the rates of a large product, and so without shares")
        if name in ("train", "engine"):
            sub.add_argument("--batch", type=whole, nargs="+", default=[192, 48], metavar="N",
                             help="pairs a step")
        if name in ("sample", "engine"):
            sub.add_argument("--views", type=whole, nargs="+", metavar="N", help="views at once",
                             default=[1, 16, 24] if name == "sample" else [1, 16])
    add_rest(suites, whole)
    return p


def add_rest(suites, whole):
    """The options that one benchmark alone has."""
    suites["encode"].add_argument("--batch", type=whole, default=64, metavar="N",
                                  help="views at once (%(default)s)")
    scale = suites["scale"].add_argument
    scale("--batch", type=whole, default=192, metavar="N", help="pairs a GPU (%(default)s)")
    scale("--gpus", type=whole, nargs="+", default=[], metavar="N",
          help="how many to use, one after the other (1, and all there are)")
    scale("--strong", action="store_true", help="--batch pairs in all, however many GPUs")
    scale("--check", action="store_true",
          help="instead: steps of the same --batch pairs in all, and their losses")
    scale("--no-compile", dest="compile", action="store_false", help="the UNet as it is")
    scale("--divide-optimizer", action="store_true",
          help="also with moments and average divided among the GPUs (ZeRO-1)")
    engine = suites["engine"].add_argument
    engine("--without", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
           help=f"parts that are left out, one at a time, of {', '.join(PARTS)}")
    engine("--rates", nargs="+", choices=RATES, default=list(RATES), metavar="RATE",
           help=f"what is measured, of {', '.join(RATES)}")
    load = suites["load"].add_argument
    load("--channels", type=whole, default=320, metavar="N",
         help="width of the UNet: 320 is zero123-xl's, 15.5 GB; 32 makes 1.9 GB (%(default)s)")
    load("--repeat", type=whole, default=3, metavar="N", help="runs of which the best counts")
    data = suites["data"].add_argument
    data("--scenes", type=whole, default=20, metavar="N", help="scenes in all (%(default)s)")
    data("--views", type=whole, default=100, metavar="N", help="views a scene (%(default)s)")
    data("--pairs", type=whole, default=640, metavar="N", help="pairs of a figure (%(default)s)")
    data("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT",
         help=f"of {', '.join(FORMATS)}")
    data("--workers", type=whole, nargs="+", default=list(range(1, (os.cpu_count() or 1) + 1)),
         metavar="N", help="processes of the loader")


def main(args):
    import importlib
    import json

    from benchmarks.measure import table
    from runtime.files import write_text

    suite = importlib.import_module(f"benchmarks.{SUITES[args.name]}")
    rows = getattr(suite, f"run_{args.name}")(args)
    print(table(rows))
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    ARGS = parser().parse_args()
    command.run("python -m benchmarks", main, ARGS)
