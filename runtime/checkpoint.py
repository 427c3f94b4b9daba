"""Checkpoints: models filled from foreign files and from runs, and runs that no crash loses.

    python checkpoint.py info FILE
    python checkpoint.py convert IN OUT [--ema] [--dtype fp32|fp16|bf16]

A saved step is a folder `out/NAME/step_00005000/`: model.safetensors and ema.safetensors under the
names of zero123's checkpoints, optimizer.safetensors, and meta.json, which is written last.
`Writer` writes beside the training thread.
"""

import argparse
import functools
import json
import os
import shutil
import sys
import threading
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from runtime.export import is_diffusers, read_diffusers, write_diffusers
from runtime.files import unfinished
from runtime.foreign import LazyTensor, StateDict, nbytes, read_file, write_safetensors

UNET = "model.diffusion_model."
EMA = "model_ema."
EMA_DECAY = 0.9999          # the reference's, where a run does not name its own
INPUT_CONV = UNET + "input_blocks.0.0.weight"
CONFIG = "zeronvs_config"       # in a file, as JSON, beside the weights of a run
POSE = "cc_projection.weight"
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2")
UNUSED = {      # how names begin that other tools leave in files, and why no model needs them
    EMA + "num_updates": "the average's own state",
    EMA + "decay": "the average's own state",
    "lvlb_weights": "a constant that the model computes",
    "logvar": "a constant that the model computes",
    **dict.fromkeys(SCHEDULE, "a constant that the model computes"),
    "cond_stage_model.mean": "a constant that the model computes",
    "cond_stage_model.std": "a constant that the model computes",
    "cond_stage_model.transformer.": "a text encoder; the model is conditioned on an image",
    "cond_stage_model.model.transformer.": "a text encoder; the model is conditioned on an image",
}
# parameters of CLIP's text side, which zero123's files carry along and nothing reads
LEFTOVERS = tuple("cond_stage_model.model." + name for name in (
    "positional_embedding", "text_projection", "logit_scale", "token_embedding.weight",
    "ln_final.weight", "ln_final.bias"))
FROZEN = ("first_stage_model.", "cond_stage_model.")
PROJECTION = "cc_projection."
# how names of a part begin, that a model may do without: in the model, and in a file
PARTS = {FROZEN[0]: FROZEN[:1], FROZEN[1]: FROZEN[1:], UNET: (UNET, EMA), PROJECTION: (PROJECTION,)}


def ema_name(name):
    """model.diffusion_model.out.2.bias -> model_ema.diffusion_modelout2bias"""
    return EMA + name.removeprefix("model.").replace(".", "")


def read(path):
    """StateDict by name, a lazy Mapping: of a file, a run, one `step_...` of it, a diffusers folder.

    Averaged weights have the reference's names, `model_ema.*`. A run's frozen networks are those of
    the file that it started from. What was read already is given back, so that a run's newest step
    is looked for once. Raises FileNotFoundError, or ValueError with one line for what is no
    checkpoint, or a damaged one.
    """
    if isinstance(path, StateDict):
        return path
    path = Path(path)
    if path.is_file():
        found = read_file(path)
        if CONFIG in found.meta:
            found.meta["config"] = json.loads(found.meta[CONFIG])
        return found
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    if is_diffusers(path):
        return read_diffusers(path)
    folder = path if (path / "meta.json").exists() else latest(path)
    if folder is None and steps(path):
        raise ValueError(f"{path}: every checkpoint in it is damaged")
    if folder is None:
        raise ValueError(f"{path} is a folder without a checkpoint: in it is neither a meta.json, "
                         "nor a complete step_... folder, nor a unet folder of diffusers")
    problem = damage(folder) if folder == path else ""
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    run = load_run(folder)
    entries = frozen(run) | run.model.entries
    entries.update((ema_name(name), entry) for name, entry in run.ema.entries.items())
    decay = torch.tensor(run.meta.get("config", {}).get("ema_decay", EMA_DECAY))
    updates = torch.tensor(run.meta.get("ema_updates", 0), dtype=torch.int32)
    if run.ema:
        entries[EMA + "decay"] = LazyTensor(decay.dtype, (), lambda: decay)
        entries[EMA + "num_updates"] = LazyTensor(updates.dtype, (), lambda: updates)
    return StateDict(folder, entries, run.meta, run.optimizer.entries)


def frozen(run):
    """Entries of the networks that a run neither trains nor saves, from its `init` if it exists."""
    init = Path(run.meta.get("config", {}).get("init", ""))
    if any(name.startswith(FROZEN) for name in run.model) or not init.name or not init.exists():
        return {}
    found = read(init).entries
    return {name: entry for name, entry in found.items() if name.startswith(FROZEN)}


# ------------------------------------------------------------------------------ into a model

@dataclass
class Report:
    """What `load_model` did with every tensor."""
    step: int = 0                                           # optimizer steps, as the file says
    used: list[str] = field(default_factory=list)           # names in the file
    unused: dict[str, str] = field(default_factory=dict)    # name in the file -> why
    ported: dict[str, str] = field(default_factory=dict)    # name in the model -> what was changed
    fresh: list[str] = field(default_factory=list)          # names in the model that the file lacks
    ema: Mapping = field(default_factory=dict)              # name in the model -> its average, lazy
    num_updates: int = 0                                    # of the average


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
    entries, report = tensors.entries, Report(tensors.step)
    averages = {name: ema_name(name) for name in current if name.startswith(UNET)}
    missing, misshapen = [], {}
    pose_may_stay = finetune and not current.get(POSE, torch.empty(0)).is_meta

    def fitted(name, stored):
        """The entry called `stored` in the shape of the module's tensor `name`."""
        entry, how = entries[stored], ""
        if finetune and tuple(entry.shape) != tuple(current[name].shape):
            entry, how = port(name, entry, current[name])
        if tuple(entry.shape) != tuple(current[name].shape):
            misshapen[stored] = f"{list(entry.shape)} instead of {list(current[name].shape)}"
        elif how:
            report.ported[name] = how
        return entry

    plan = {}
    for name in current:
        stored = averages.get(name, name) if ema else name
        if stored in entries:
            plan[name] = fitted(name, stored)
            report.used.append(stored)
        elif name in SCHEDULE or pose_may_stay and name.startswith(PROJECTION):
            report.fresh.append(name)
        elif name not in LEFTOVERS:
            missing.append(stored)
    shadows = {name: fitted(name, key) for name, key in averages.items() if key in entries}
    report.unused = why_unused(set(entries) - set(report.used), current, set(averages.values()))
    report.unused.update((name, "state of an optimizer, a trainer or a tool")
                         for name in tensors.others)
    unexpected = [name for name, reason in report.unused.items() if not reason]
    # departs: the reference prints such lists and goes on
    if missing or unexpected or misshapen:
        raise ValueError(f"{tensors.path} does not fit the model: "
                         f"{misfit(missing, unexpected, misshapen)}")
    for name, entry in plan.items():
        assign(module, name, entry.read())
    for name in LEFTOVERS:
        if name in current and name not in plan and current[name].is_meta:
            assign(module, name, torch.zeros(current[name].shape))
    report.ema = StateDict(tensors.path, shadows)
    report.num_updates = int(tensors[EMA + "num_updates"]) if EMA + "num_updates" in tensors else 0
    return report


def port(name, entry, current):
    """(entry, what was changed) by the reference's fine-tuning rules; as it was if none applies."""
    old, new = tuple(entry.shape), tuple(current.shape)
    channels = 4                    # of a latent: what the input convolution had before zero123
    if name == INPUT_CONV and old == (new[0], channels, *new[2:]) and new[1] > channels:
        def widened():
            weight = torch.zeros(new, dtype=entry.dtype)
            weight[:, :channels] = entry.read()
            return weight
        return LazyTensor(entry.dtype, new, widened), f"{channels} -> {new[1]} input channels, new ones 0"
    if name == POSE and len(old) == 2 and old[0] == new[0] <= min(old[1], new[1]):
        if current.is_meta:
            raise ValueError(f"{POSE} has no values for its new columns: build the model on a "
                             "real device to fine-tune it")
        def grown():
            # quirk: the file's pose columns are thrown away, all new ones keep their random start
            weight = current.detach().to("cpu", entry.dtype, copy=True)
            weight[:, :new[0]] = entry.read()[:, :new[0]]
            return weight
        return (LazyTensor(entry.dtype, new, grown),
                f"{old[1]} -> {new[1]} columns, the {new[1] - new[0]} of the pose are fresh")
    return entry, ""


def why_unused(names, current, averages):
    """{name: why it has no place in the module}; the reason is "" where it ought to have one."""
    lacking = [part for part in PARTS if not any(name.startswith(part) for name in current)]
    reasons = UNUSED | {start: f"the model has no {part[:-1]}"
                        for part in lacking for start in PARTS[part]}

    def reason(name):
        if name in averages:
            return "averaged weights (EMA); the raw ones were asked for"
        if name in current:
            return "raw weights; the averaged ones (EMA) were asked for"
        return next((why for start, why in reasons.items() if name.startswith(start)), "")

    return {name: reason(name) for name in sorted(names)}


def misfit(missing, unexpected, misshapen):
    """What does not fit, in one line. misshapen: name -> its shape and the module's."""
    shown, parts, shapes = 5, [], [f"{name} {what}" for name, what in misshapen.items()]
    for kind, found in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes)):
        more = f" and {len(found) - shown} more" if len(found) > shown else ""
        if found:
            parts.append(f"{len(found)} {kind} ({', '.join(found[:shown])}{more})")
    if missing and all(name.startswith(FROZEN) for name in missing):
        parts.append("a run takes its frozen networks from the file that its init names, which "
                     "must still be there")
    if missing and all(name.startswith(EMA) for name in missing):
        parts.append("it has no averaged weights (EMA), load the raw ones")
    if misshapen and set(misshapen) <= {POSE, INPUT_CONV, ema_name(INPUT_CONV)}:
        parts.append("finetune=True ports weights of another pose width")
    return "; ".join(parts)


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


# ------------------------------------------------------------------------------ runs

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@dataclass
class Run:
    """A saved step of a run: three lazy Mappings of tensors and the meta data."""
    folder: Path
    step: int
    model: StateDict
    ema: StateDict
    optimizer: StateDict
    meta: dict


def save(out, step, model, ema, optimizer, meta, keep=2, keep_every=0):
    """Writes out/step_00005000 so that it is there as a whole or not at all; returns the folder.

    model, ema, optimizer: tensors by name (a dict or StateDict, also empty), which must not change
    meanwhile. meta: what json can hold; `ema_updates` in it is the average's count. Afterwards the
    newest `keep` steps up to this one are left, and those that `keep_every` divides (0: none). On
    OSError (a full disk) nothing of this one is left.
    """
    out, final = Path(out), Path(out) / f"step_{step:08d}"
    out.mkdir(parents=True, exist_ok=True)
    for remains in out.glob(".unfinished_*"):
        shutil.rmtree(remains)
    with unfinished(final) as folder:
        folder.mkdir()
        files = {}
        for name, tensors in zip(FILES, (model, ema, optimizer), strict=True):
            size, crc = write_safetensors(folder / name, tensors)
            files[name] = {"bytes": size, "crc32": crc}
        text = json.dumps({**meta, "step": step, "files": files}, indent=1)
        with open(folder / "meta.json", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
        if final.exists():
            final.rename(out / f".unfinished_old_{final.name}")
    sync(out)
    # newer steps are damaged ones: the run was resumed behind them, and will write them again
    for old in [path for path in steps(out) if step_of(path) <= step][keep:]:
        if not keep_every or step_of(old) % keep_every:
            # without meta.json the folder does not exist, should the removal be cut short
            (old / "meta.json").unlink()
            # where a file that is in use cannot be removed, the rest stays until it can
            shutil.rmtree(old, ignore_errors=True)
    for remains in out.glob(".unfinished_*"):
        shutil.rmtree(remains)
    return final


class Writer:
    """Saves steps on a thread of its own, from copies, so that training goes on meanwhile.

    One step is written at a time: a save that comes too early waits for the one before. A write
    that fails (a full disk) is told to `say` as a line, and leaves the step before as it was.

    step    the newest step that was written by this writer, 0 before there is one
    problem why the last write failed, "" when it did not
    """

    def __init__(self, say=print):
        self.say, self.copies, self.thread = say, {}, None
        self.step, self.problem = 0, ""

    def save(self, out, step, model, ema, optimizer, meta, keep=2, keep_every=0):
        """As `save` above, but model, ema and optimizer are iterables of (name, tensor), each of
        which is copied before the next is asked for. Returns once all are copied."""
        self.wait()
        parts = [{name: self.copy((file, name), tensor) for name, tensor in tensors}
                 for file, tensors in zip(FILES, (model, ema, optimizer), strict=True)]
        self.thread = threading.Thread(target=self.write, name="checkpoint",
                                       args=(out, step, *parts, meta, keep, keep_every))
        self.thread.start()

    def copy(self, key, tensor):
        """The tensor in host memory, which is taken once and used for every save."""
        # not pinned: that takes up to twice the bytes, and these cannot be swapped out
        if key not in self.copies or self.copies[key].shape != tensor.shape:
            self.copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return self.copies[key].copy_(tensor.detach())

    def write(self, out, step, *rest):
        self.problem = "the write did not end"      # what is left standing by any other error
        try:
            save(out, step, *rest)
            self.step, self.problem = step, ""
        except OSError as err:
            self.problem = f"{err.filename or out}: {err.strerror or err}"
            self.say(f"step {step} could not be saved, training goes on: {self.problem}")

    def wait(self):
        """Returns when nothing is being written any more."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None


def sync(folder):
    """Makes the names in a folder survive a power cut, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def steps(out):
    """The complete step folders of a run, newest first."""
    found = [path for path in Path(out).glob("step_*")
             if path.name[5:].isdecimal() and (path / "meta.json").exists()]
    return sorted(found, key=step_of, reverse=True)


def latest(out):
    """The newest undamaged step folder of a run, or None. Damaged newer ones are warned about."""
    for folder in steps(out):
        problem = damage(folder)
        if not problem:
            return folder
        warnings.warn(f"{folder} is damaged, the step before is used: {problem}", stacklevel=2)
    return None


def damage(folder):
    """What is wrong with a step folder, by sizes and CRC-32 in its meta.json; "" when nothing."""
    try:
        found = [os.stat(folder / name) for name in ("meta.json", *FILES)]
    except OSError as err:
        return f"{type(err).__name__}: {err}"
    return damage_of(folder, tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in found))


@functools.lru_cache
def damage_of(folder, stamps):
    """See damage: gigabytes are read once, as long as the files stay what they are."""
    chunk = 1 << 22
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for name in FILES:
            recorded, crc = meta["files"][name], 0
            size = (folder / name).stat().st_size
            if size != recorded["bytes"]:
                return f"{name} has {size:,} bytes instead of {recorded['bytes']:,}"
            with open(folder / name, "rb", buffering=0) as file:
                while data := file.read(chunk):
                    crc = zlib.crc32(data, crc)
            if crc != recorded["crc32"]:
                return f"{name} has the checksum {crc:08x} instead of {recorded['crc32']:08x}"
    except (OSError, ValueError, KeyError, TypeError) as err:
        return f"{type(err).__name__}: {' '.join(str(err).split())}"
    return ""


def load_run(folder):
    """The Run in a step folder; lazy: `latest` and `read` have checked its bytes before."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Run(folder, meta["step"], *(read_file(folder / name) for name in FILES), meta)


# ------------------------------------------------------------------------------ command line

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GROUPS = (      # part of a checkpoint, how its names begin, its use
    ("UNet", (UNET,), "used"),
    ("UNet's average (EMA)", (EMA,), "used instead, where asked for"),
    ("autoencoder", FROZEN[:1], "used"),
    ("CLIP's text side", LEFTOVERS, "unused, kept for other tools"),
    ("noise schedule", SCHEDULE, "used"),
    ("other", tuple(UNUSED), "unused"),
    ("CLIP's image side", FROZEN[1:], "used"),
    ("pose projection", (PROJECTION,), "used"),
    ("unknown", ("",), "refused by load_model"))


def info(path):
    """What is in a checkpoint, as text: facts, then a line for each part."""
    tensors, groups = read(path), {}
    for name, entry in tensors.entries.items():
        group = next(group for group, starts, _ in GROUPS if name.startswith(starts))
        groups.setdefault(group, []).append(entry)
    facts = [f"step {tensors.step:,}" if tensors.step else "no step recorded"]
    if EMA + "num_updates" in tensors:
        facts.append(f"average of {int(tensors[EMA + 'num_updates']):,} updates")
    if INPUT_CONV in tensors:
        facts.append(f"{tensors.entries[INPUT_CONV].shape[1]} input channels")
    if POSE in tensors:
        facts.append("pose projection {1} -> {0}".format(*tensors.entries[POSE].shape))
    rows = [(group, groups[group], use) for group, _, use in GROUPS if group in groups]
    if tensors.others:
        rows.append(("optimizer, trainer", tensors.others.values(), "unused"))
    lines = [f"{tensors.path}: {', '.join(facts)}",
             f"{'part':20} {'tensors':>8} {'elements':>14} {'bytes':>15}  dtypes, use"]
    for group, entries, use in rows:
        kinds = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})
        elements = sum(nbytes(entry) // entry.dtype.itemsize for entry in entries)
        lines.append(f"{group:20} {len(entries):8,} {elements:14,} {sum(map(nbytes, entries)):15,}"
                     f"  {', '.join(kinds)}; {use}")
    return "\n".join(lines)


def convert(source, target, ema=False, dtype=None):
    """Writes the weights of a checkpoint in the form that `target` names; returns names left out.

    NAME.ckpt or .pt: the reference's structure; NAME.safetensors; step_00005000: a folder of a run;
    another name without an ending: a diffusers folder. ema: the averaged weights take the place of
    the UNet's. dtype: of the weights; the schedule stays. Raises ValueError where target exists.
    """
    tensors, target = read(source), Path(target)
    write = WRITERS.get(target.suffix)
    if write is None:
        raise ValueError(f"{target}: {target.suffix} is no form of checkpoint; .ckpt, .pt and "
                         ".safetensors are, or no ending for a folder")
    if target.exists():
        raise ValueError(f"{target} exists already: give a new name, or remove it")
    entries = folded(tensors) if ema else tensors.entries
    if dtype is not None:
        entries = {name: cast(name, entry, dtype) for name, entry in entries.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    left = write(target, StateDict(tensors.path, entries, tensors.meta))
    return [*left, *tensors.others]


def folded(tensors):
    """Entries with the averaged weights in the UNet's place, and no other averages."""
    entries = {name: entry for name, entry in tensors.entries.items() if not name.startswith(EMA)}
    averages = {name: ema_name(name) for name in entries if name.startswith(UNET)}
    missing = [name for name in averages.values() if name not in tensors]
    if missing:
        raise ValueError(f"{tensors.path} has no averaged weights (EMA): {missing[0]} is missing")
    return {**entries, **{name: tensors.entries[average] for name, average in averages.items()}}


def cast(name, entry, dtype):
    """The entry in another precision; what is no weight stays as it is."""
    if not entry.dtype.is_floating_point or name in (*SCHEDULE, EMA + "decay"):
        return entry
    return LazyTensor(dtype, entry.shape, lambda: entry.read().to(dtype))


def write_ckpt(target, tensors):
    """What torch.load gives is {"state_dict": names to tensors, "global_step": steps}."""
    with unfinished(target) as path:
        torch.save({"state_dict": dict(tensors), "global_step": tensors.step, **told(tensors)},
                   path)
    return []


def told(tensors):
    """What a file says beside weights: a run's configuration, if these are of one."""
    return {CONFIG: json.dumps(tensors.meta["config"])} if "config" in tensors.meta else {}


def write_file(target, tensors):
    write_safetensors(target, tensors, {"global_step": str(tensors.step), **told(tensors)})
    return []


def write_folder(target, tensors):
    """A step folder of a run, without the optimizer's moments, or a diffusers folder."""
    step = target.name.removeprefix("step_")
    if step == target.name or not step.isdecimal():
        with unfinished(target) as path:
            path.mkdir()
            return write_diffusers(path, tensors)
    averages = {ema_name(name): name for name in tensors if name.startswith(UNET)}
    weights = {name: entry for name, entry in tensors.entries.items() if not name.startswith(EMA)}
    ema = {averages[name]: entry for name, entry in tensors.entries.items() if name in averages}
    meta = {**tensors.meta, "ema_updates": int(tensors.get(EMA + "num_updates", 0))}
    save(target.parent, int(step), StateDict(target, weights), StateDict(target, ema), {}, meta,
         keep=sys.maxsize)
    return []


WRITERS = {".ckpt": write_ckpt, ".pt": write_ckpt, ".safetensors": write_file, "": write_folder}


def main(argv):
    parser = argparse.ArgumentParser(description="What is in a checkpoint, and other forms of it.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="parts, dtypes, sizes, steps, what is unused")
    command.add_argument("file", help="a file, a run, a step_... folder of it, a diffusers folder")
    command = commands.add_parser("convert", help="write the weights in another form")
    command.add_argument("source", metavar="IN", help="a checkpoint, as for info")
    command.add_argument("target", metavar="OUT", help="NAME.ckpt, structured as the reference's; "
                         "NAME.safetensors; step_00005000, of a run; NAME, a diffusers folder")
    command.add_argument("--ema", action="store_true", help="write the UNet's average as the UNet")
    command.add_argument("--dtype", choices=PRECISIONS, help="of the weights; default: as they are")
    given = parser.parse_args(argv)
    if given.command == "info":
        print(info(given.file))
        return
    left = convert(given.source, given.target, given.ema, PRECISIONS.get(given.dtype))
    print(f"wrote {given.target}")
    if left:
        print(f"{len(left)} tensors have no place in it: {', '.join(left[:5])}"
              + (", ..." if len(left) > 5 else ""))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as err:
        print(f"checkpoint.py: {err}", file=sys.stderr)
        sys.exit(2)
