"""Checkpoints: models filled from foreign files and from runs, and runs that no crash loses.

    python -m runtime.checkpoint info FILE
    python -m runtime.checkpoint convert IN OUT [--ema] [--dtype fp32|fp16|bf16] [--init FILE]

What a run saves is in runs.py, whose names are to be had here too.
"""

from runtime import command

PRECISION_NAMES = "fp32", "fp16", "bf16"


def parser():
    """The command line."""
    top = command.Parser("checkpoint.py", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="info | convert")
    add = commands.add_parser(
        "info", help="parts, dtypes, sizes, steps, what is unused").add_argument
    add("file", help="a file, a run, a step_... folder of it, a diffusers folder")
    add = commands.add_parser("convert", help="write the weights in another form").add_argument
    add("source", metavar="IN", help="a checkpoint, as for info")
    add("target", metavar="OUT", help="NAME.ckpt, structured as the reference's; NAME.safetensors; "
        "NAME, a diffusers folder")
    add("--ema", action="store_true", help="write the UNet's average as the UNet")
    add("--dtype", choices=PRECISION_NAMES, help="of the weights; default: as they are")
    add("--init", default="", metavar="FILE",
        help="the file that a run started from: its frozen networks are written too")
    return top


if __name__ == "__main__":      # answered before torch, which takes seconds, is imported
    command.parse(parser())

import errno
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from configs import Config
from diffusion import schedule_buffers
from runtime import lora
from runtime.export import read_diffusers, write_diffusers
from runtime.files import unfinished
from runtime.foreign import SPARE, read_file
from runtime.runs import FILES, Run, Writer, damage, latest, load_run, save, step_of, steps
from runtime.tensors import LazyTensor, StateDict, lazy, misfit, nbytes, write_safetensors

UNET, EMA, PROJECTION = "model.diffusion_model.", "model_ema.", "cc_projection."
FROZEN = ("first_stage_model.", "cond_stage_model.")
INPUT_CONV = UNET + "input_blocks.0.0.weight"
CHECKED = 256               # numbers of each weight that a checksum of it has
LATENT_CHANNELS = 4         # which the input convolution had before zero123
POSE = PROJECTION + "weight"
CONFIG = "zeronvs_config"       # in a file, as JSON, beside the weights of a run
SCHEDULE = tuple(schedule_buffers())
# how names begin that other tools leave in files and no model needs: an average's state, constants
# that the model computes, text encoders where ours sees an image
UNUSED = (EMA + "num_updates", EMA + "decay", "lvlb_weights", "logvar", *SCHEDULE,
          "cond_stage_model.mean", "cond_stage_model.std", "cond_stage_model.transformer.",
          "cond_stage_model.model.transformer.")
# parameters of CLIP's text side, which zero123's files carry along and nothing reads
LEFTOVERS = tuple("cond_stage_model.model." + name for name in (
    "positional_embedding", "text_projection", "logit_scale", "token_embedding.weight",
    "ln_final.weight", "ln_final.bias"))
PRECISIONS = dict(zip(PRECISION_NAMES, (torch.float32, torch.float16, torch.bfloat16)))
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


def ema_name(name):
    """model.diffusion_model.out.2.bias -> model_ema.diffusion_modelout2bias"""
    return EMA + name.removeprefix("model.").replace(".", "")


def read(path, init=""):
    """A StateDict, lazy: of a file, a run, one `step_...` of it, a diffusers folder.

    Averaged weights have the reference's names, `model_ema.*`. A run saves what it trains; its
    frozen networks are those of `init`, the file that it started from, which the caller names:
    what a checkpoint says of other files is never followed. `meta["config"]` is the run's
    configuration, a dict, where there is one. What was read already is given back. Low-rank updates
    are added to the weights of `init`. Raises FileNotFoundError, or ValueError with one line for
    what is no checkpoint, or a damaged one.
    """
    found = path if isinstance(path, StateDict) else read_any(Path(path))
    if any(map(lora.is_update, found)):
        return merge(found, init)
    if not init:
        return found
    frozen = {name: entry for name, entry in read_any(Path(init)).entries.items()
              if name.startswith(FROZEN)}
    if not frozen:
        raise ValueError(f"{init} has no autoencoder and no CLIP, which {found.path} starts from")
    return StateDict(found.path, frozen | found.entries, found.meta, found.others)


def merge(found, init):
    """The StateDict of low-rank updates with the weights of the file `init`, averaged ones where it
    has them. Raises ValueError where it is not the file that they were trained on."""
    if not init:
        raise ValueError(f"{found.path} holds low-rank updates of another file's weights: name it "
                         f"with --init={started_from(found) or 'FILE'}")
    base = read_any(Path(init))
    check_base(found.meta, checksum(base), found.path, init)
    entries = {name: entry for name, entry in base.entries.items() if not name.startswith(EMA)}
    entries |= {name: entry for name, entry in found.entries.items() if not lora.is_update(name)}
    live = [name for name in found if lora.is_update(name) and not name.startswith(EMA)]
    for name_of in (str, ema_name):
        factors = {name: found.entries[name_of(name)] for name in live if name_of(name) in found}
        if factors:
            entries |= {name_of(name): entry for name, entry in
                        lora.merged(unet_of(base), factors, found.path).items()}
    return StateDict(found.path, entries, found.meta, found.others)


def unet_of(tensors):
    """{name: entry} of a UNet's weights, averaged where a StateDict has averages."""
    return {name: tensors.entries.get(ema_name(name), entry)
            for name, entry in tensors.entries.items() if name.startswith(UNET)}


def checksum(tensors):
    """CRC-32, as text, of the shapes and first CHECKED numbers of a UNet's weights, see unet_of."""
    crc = 0
    for name, entry in sorted(unet_of(tensors).items()):
        first = entry.read().reshape(-1)[:CHECKED].float().numpy().tobytes()
        crc = zlib.crc32(f"{name} {tuple(entry.shape)}".encode() + first, crc)
    return f"{crc:08x}"


def check_base(meta, crc, run, init):
    """Raises ValueError unless low-rank updates were trained on weights of that checksum."""
    if meta.get("base") != crc:
        raise ValueError(f"{init} is not what the updates in {run} were trained on: its weights' "
                         f"checksum is {crc}, theirs is {meta.get('base')}")


def read_any(path):
    """The StateDict of what `read` reads, as it is. Raises FileNotFoundError, ValueError."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    if path.is_file() or (path / "unet").is_dir():
        return with_config(read_file(path) if path.is_file() else read_diffusers(path))
    folder = path if (path / "meta.json").exists() else latest(path)
    if folder == path and (problem := damage(path)):
        raise ValueError(f"{path} is damaged: {problem}")
    if folder is None:
        raise ValueError(f"{path}: every checkpoint in it is damaged" if steps(path) else
                         f"{path} is no file and no folder with a checkpoint: neither a meta.json, "
                         "nor a complete step_... folder, nor diffusers' unet is in it")
    run = load_run(folder)
    entries = run.model.entries | {ema_name(name): entry for name, entry in run.ema.entries.items()}
    if run.ema:
        decay = float(run.meta.get("config", {}).get("ema_decay", Config.ema_decay))
        entries[EMA + "decay"] = lazy(lambda: torch.tensor(decay))
        entries[EMA + "num_updates"] = lazy(
            lambda: torch.tensor(run.meta.get("ema_updates", 0), dtype=torch.int32))
    return StateDict(folder, entries, run.meta, run.optimizer.entries)


def with_config(found):
    """Makes `meta["config"]` of the text that a file carries. Raises ValueError, one line."""
    try:
        if CONFIG in found.meta:
            found.meta["config"] = json.loads(found.meta[CONFIG])
        if not isinstance(found.meta.get("config", {}), dict):
            raise ValueError("no table")
    except (ValueError, TypeError, RecursionError) as err:
        raise ValueError(f"{found.path}: its {CONFIG} is not the fields of a configuration, as "
                         "JSON") from err
    return found


def updates_of(tensors):
    """The updates behind a file's average; 0 where it does not say, or nothing that can be."""
    entry = tensors.entries.get(EMA + "num_updates")
    if entry is None or tuple(entry.shape) not in ((), (1,)) or entry.dtype.is_complex:
        return 0
    value = float(entry.read())
    return int(value) if 0 <= value < 2**53 else 0


# ------------------------------------------------------------------------------ into a model

class Report(NamedTuple):
    """What `load_model` found beside the weights."""
    fresh: list[str]            # names in the model that the file lacks
    ema: StateDict              # name in the model -> its average, lazy
    num_updates: int            # of the average


def load_model(module, path, ema=False, finetune=False):
    """Fills a module whose state dict has the checkpoint's names. Returns a Report.

    The module keeps its dtypes, devices and requires_grad; what is on "meta" comes to the CPU. No
    more than one tensor is in memory twice. ema: the UNet gets the averaged weights. finetune: the
    reference's rules for another pose width and for 4 input channels, and a cc_projection that the
    file lacks keeps the module's values. A schedule that it lacks stays as it is too, also on
    "meta". Raises ValueError that lists what is missing, unexpected or of another shape, and leaves
    the module as it was.
    """
    tensors, current = read(path), module.state_dict()
    averages = {name: ema_name(name) for name in current if name.startswith(UNET)}
    stored = {name: averages.get(name, name) if ema else name for name in current}
    may_stay = SCHEDULE + LEFTOVERS
    if finetune and not current.get(POSE, torch.empty(0)).is_meta:
        may_stay += (POSE, PROJECTION + "bias")
    wanted = {key: name for name, key in stored.items() if key in tensors or name not in may_stay}
    wanted |= {key: name for name, key in averages.items() if key in tensors}
    entries = {key: entry for key, entry in tensors.entries.items()
               if key in wanted or not is_unused(key, current)}
    if finetune:
        entries |= {key: port(name, entries[key], current[name])
                    for key, name in wanted.items() if key in entries}
    # departs: missing, unexpected or misshapen weights are an error; the reference prints a list of
    # them and goes on [test_misfit_lists_what_is_wrong_and_leaves_the_module_as_it_was]
    if problem := misfit(entries, {key: current[name] for key, name in wanted.items()}):
        missing = [key for key in wanted if key not in entries]
        way_out = ("; a run saves what it trains: name the file that its frozen networks are in "
                   f"with --init={started_from(tensors) or 'FILE'}")
        raise ValueError(f"{tensors.path} does not fit the model: {problem}" + way_out * (
            bool(missing) and all(key.startswith(FROZEN) for key in missing)))
    for name, key in stored.items():
        if key in entries:
            assign(module, name, entries[key].read())
        elif name in LEFTOVERS and current[name].is_meta:
            assign(module, name, torch.zeros(current[name].shape))
    fresh = [name for name, key in stored.items() if key not in entries and name not in LEFTOVERS]
    shadows = {name: entries[key] for name, key in averages.items() if key in entries}
    return Report(fresh, StateDict(tensors.path, shadows), updates_of(tensors))


def port(name, entry, current):
    """The entry by the reference's fine-tuning rules, for the module's tensor `current`."""
    old, new = tuple(entry.shape), tuple(current.shape)
    widened = name == INPUT_CONV and old == (new[0], LATENT_CHANNELS, *new[2:]) and old < new
    grown = name == POSE and old != new and len(old) == 2 and old[0] == new[0]
    if not widened and not grown:
        return entry
    if grown and current.is_meta:
        raise ValueError(f"{POSE} has no values for its new columns: build the model on a real "
                         "device to fine-tune it")
    # as many columns of the embedding come first as there are rows; in pixels there are none
    kept = old[1] if widened else new[0] if new[0] <= min(old[1], new[1]) else 0

    def ported():
        # quirk: fine-tuning drops the file's pose columns, all new ones keep their random start
        # [test_new_pose_columns_keep_the_models_random_start]
        weight = (torch.zeros(new, dtype=entry.dtype) if widened else
                  current.detach().to("cpu", entry.dtype, copy=True))
        weight[:, :kept] = entry.read()[:, :kept]
        return weight
    return LazyTensor(entry.dtype, new, ported)


def is_unused(key, current):
    """Whether a file may have this name without a place for it in the module."""
    if key in current or key.startswith(UNUSED) or key in LEFTOVERS:
        return True
    part = UNET if key.startswith(EMA) else next(
        (part for part in (UNET, PROJECTION, *FROZEN) if key.startswith(part)), None)
    return part is not None and not any(name.startswith(part) for name in current)


def started_from(tensors):
    """The file that a run says that it started from, to be shown and never opened; else ""."""
    return " ".join(str(tensors.meta.get("config", {}).get("init", "")).split())[:200]


@torch.no_grad()
def assign(module, name, value):
    """Makes `value` the module's tensor `name`: its dtype, device and requires_grad, no copy."""
    owner, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner)
    old = getattr(owner, leaf)
    value = value.to("cpu" if old.is_meta else old.device, old.dtype).contiguous()
    if not old.is_meta:
        old.data = value
    elif isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(owner, leaf, value)


# ------------------------------------------------------------------------------ other forms

def info(path):
    """What is in a checkpoint, as text: facts, then a line for each part."""
    tensors, parts = read_any(Path(path)), {group: [] for group in GROUPS}
    for name, entry in tensors.entries.items():
        group = next(group for group, (starts, _) in GROUPS.items() if name.startswith(starts))
        parts[group].append(entry)
    facts = [f"step {tensors.step:,}" if tensors.step else "no step recorded"]
    if EMA + "num_updates" in tensors:
        facts.append(f"average of {updates_of(tensors):,} updates")
    for name, says in ((INPUT_CONV, "{1} input channels"), (POSE, "pose projection {1} -> {0}")):
        if name in tensors and len(tensors.entries[name].shape) > 1:
            facts.append(says.format(*tensors.entries[name].shape))
    if "config" in tensors.meta:
        facts.append(f"of a run that started from {started_from(tensors) or 'nothing'}")
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
    tensors, target = read(source, init), Path(target)
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
        found = read(partial).entries
        if problem := misfit({name: found[name] for name in wanted if name in found}, wanted):
            raise ValueError(f"{target} was not written whole: {problem}")
    return [*left, *tensors.others]


def folded(tensors):
    """Entries with the averaged weights in the UNet's place, and no other averages."""
    unet = unet_of(tensors)
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
    args = parser().parse_args(argv)
    if args.command == "info":
        print(info(args.file))
        return
    left = convert(args.source, args.target, args.ema, PRECISIONS.get(args.dtype), args.init)
    print(f"wrote {args.target}")
    if left:
        print(f"{len(left)} tensors have no place in it: {', '.join(left[:5])}"
              + ", ..." * (len(left) > 5)
              + "; --ema writes averaged weights as the UNet" * left[0].startswith(EMA))


if __name__ == "__main__":
    command.run("checkpoint.py", main)
