"""What is in a checkpoint, and other forms of it: `python -m runtime.checkpoint info|convert`."""

import errno
import json
from pathlib import Path

import torch

from runtime import checkpoint, command
from runtime.checkpoint import (CONFIG, EMA, FROZEN, INPUT_CONV, LEFTOVERS, POSE, PROJECTION,
                                SCHEDULE, UNET, UNUSED, ema_name)
from runtime.export import write_diffusers
from runtime.files import unfinished
from runtime.foreign import SPARE
from runtime.tensors import StateDict, lazy, misfit, nbytes, write_safetensors

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GROUPS = {      # part of a checkpoint: how its names begin, its use
    "UNet": (UNET, "used"),
    "UNet's average (EMA)": (EMA, "used instead, where asked for"),
    "autoencoder": (FROZEN[0], "used"),
    "CLIP's text side": (LEFTOVERS, "unused, kept for other tools"),
    "noise schedule": (SCHEDULE, "used"),
    "other": (UNUSED, "unused"),
    "CLIP's image side": (FROZEN[1], "used"),
    "pose projection": (PROJECTION, "used"),
    "unknown": ("", "refused by load_model")}


def info(path):
    """What is in a checkpoint, as text: facts, then a line for each part."""
    tensors, parts = checkpoint.read_any(Path(path)), {group: [] for group in GROUPS}
    for name, entry in tensors.entries.items():
        group = next(group for group, (starts, _) in GROUPS.items() if name.startswith(starts))
        parts[group].append(entry)
    facts = [f"step {tensors.step:,}" if tensors.step else "no step recorded"]
    if EMA + "num_updates" in tensors:
        facts.append(f"average of {checkpoint.updates_of(tensors):,} updates")
    for name, says in ((INPUT_CONV, "{1} input channels"), (POSE, "pose projection {1} -> {0}")):
        if name in tensors and len(tensors.entries[name].shape) > 1:
            facts.append(says.format(*tensors.entries[name].shape))
    if "config" in tensors.meta:
        facts.append(f"of a run that started from {checkpoint.started_from(tensors) or 'nothing'}")
    lines = [f"{tensors.path}: {', '.join(facts)}",
             f"{'part':20} {'tensors':>8} {'elements':>14} {'bytes':>15}  dtypes, use"]
    parts["optimizer, trainer"] = tensors.others.values()
    for group, entries in parts.items():
        kinds = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})
        elements = sum(nbytes(entry) // entry.dtype.itemsize for entry in entries)
        use = GROUPS.get(group, ("", "unused"))[1]
        if entries:
            lines.append(f"{group:20} {len(entries):8,} {elements:14,} "
                         f"{sum(map(nbytes, entries)):15,}  {', '.join(kinds)}; {use}")
    return "\n".join(lines)


def convert(source, target, ema=False, dtype=None, init=""):
    """Writes the weights of a checkpoint in the form that `target` names; returns names left out.

    NAME.ckpt or .pt: the reference's structure; NAME.safetensors; a name without an ending: a
    diffusers folder. ema: the averaged weights take the place of the UNet's. dtype: of the weights;
    the schedule stays. init: the file that has a run's frozen networks. What was written is read
    back before it gets its name. Raises ValueError where target exists, or the source lacks what is
    asked for.
    """
    tensors, target = checkpoint.read(source, init), Path(target)
    if target.suffix not in WRITERS:
        raise ValueError(f"{target}: {target.suffix} is no form of checkpoint; .ckpt, .pt and "
                         ".safetensors are, or no ending for a folder")
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already: give a new name, or remove it")
    entries = folded(tensors) if ema else dict(tensors.entries)
    for name, entry in entries.items():
        if dtype and entry.dtype.is_floating_point and name not in (*SCHEDULE, EMA + "decay"):
            entries[name] = lazy(lambda w: w.to(dtype), entry)
    size = sum(map(nbytes, entries.values()))
    if tensors.path.is_file() and size > 2 * tensors.path.stat().st_size + SPARE:
        raise ValueError(f"{tensors.path} repeats its numbers: written out they are {size:,} bytes")
    with unfinished(target, "converting") as partial:
        left = WRITERS[target.suffix](partial, StateDict(tensors.path, entries, tensors.meta)) or []
        wanted = {name: entries[name] for name in entries if name not in left}
        found = checkpoint.read(partial).entries
        if problem := misfit({name: found[name] for name in wanted if name in found}, wanted):
            raise ValueError(f"{target} was not written whole: {problem}")
    return [*left, *tensors.others]


def folded(tensors):
    """Entries with the averaged weights in the UNet's place, and no other averages."""
    unet = checkpoint.unet_of(tensors)
    missing = [name for name in map(ema_name, unet or [UNET]) if name not in tensors]
    if missing:
        raise ValueError(f"{tensors.path} has no averaged weights (EMA) beside the UNet's own, "
                         f"which tell their names: {missing[0]} is missing")
    return unet | {name: entry for name, entry in tensors.entries.items()
                   if not name.startswith((EMA, UNET))}


def meta_of(tensors):
    """What a file says beside weights: the step, and a run's configuration where there is one."""
    config = {CONFIG: json.dumps(tensors.meta["config"])} if "config" in tensors.meta else {}
    return {"global_step": tensors.step, **config}


def write_ckpt(path, tensors):
    """What torch.load gives is {"state_dict": names to tensors, "global_step": steps}."""
    try:
        torch.save({"state_dict": dict(tensors), **meta_of(tensors)}, path)
    except RuntimeError as err:         # torch's own writer has no other word for a full disk
        raise OSError(errno.EIO, f"cannot be written ({str(err).split(' at ')[0]}): is the disk "
                      "full?", str(path)) from err


def write_file(path, tensors):
    write_safetensors(path, tensors, {key: str(value) for key, value in meta_of(tensors).items()})


WRITERS = {".ckpt": write_ckpt, ".pt": write_ckpt, ".safetensors": write_file, "": write_diffusers}


def main(argv=None):
    parser = command.Parser("checkpoint.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | convert")
    add = commands.add_parser(
        "info", help="parts, dtypes, sizes, steps, what is unused").add_argument
    add("file", help="a file, a run, a step_... folder of it, a diffusers folder")
    add = commands.add_parser("convert", help="write the weights in another form").add_argument
    add("source", metavar="IN", help="a checkpoint, as for info")
    add("target", metavar="OUT", help="NAME.ckpt, structured as the reference's; NAME.safetensors; "
        "NAME, a diffusers folder")
    add("--ema", action="store_true", help="write the UNet's average as the UNet")
    add("--dtype", choices=PRECISIONS, help="of the weights; default: as they are")
    add("--init", default="", metavar="FILE",
        help="the file that a run started from: its frozen networks are written too")
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info(args.file))
        return
    left = convert(args.source, args.target, args.ema, PRECISIONS.get(args.dtype), args.init)
    print(f"wrote {args.target}")
    if left:
        print(f"{len(left)} tensors have no place in it: {', '.join(left[:5])}"
              + ", ..." * (len(left) > 5)
              + "; --ema writes averaged weights as the UNet" * left[0].startswith(EMA))
