"""Checkpoints: models filled from foreign files and from runs, and runs that no crash loses.

    python checkpoint.py info FILE
    python checkpoint.py convert IN OUT [--ema] [--dtype fp32|fp16|bf16]

A saved step is a folder `out/NAME/step_00005000/`: model.safetensors and ema.safetensors under the
names of zero123's checkpoints, optimizer.safetensors, and meta.json, which is written last.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tensorfile import Made, Tensors, read_file, write_safetensors

UNET = "model.diffusion_model."
EMA = "model_ema."
INPUT_CONV = UNET + "input_blocks.0.0.weight"
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
    "cond_stage_model.mean": "a constant that the model computes",
    "cond_stage_model.std": "a constant that the model computes",
    "cond_stage_model.transformer.": "a text encoder; the model is conditioned on an image",
    "cond_stage_model.model.transformer.": "a text encoder; the model is conditioned on an image",
}
PARTS = ("first_stage_model.", "cond_stage_model.", "cc_projection.")


def ema_name(name):
    """model.diffusion_model.out.2.bias -> model_ema.diffusion_modelout2bias"""
    return EMA + name.removeprefix("model.").replace(".", "")


def read(path):
    """Tensors by name, a lazy Mapping, of a file, of a run's folder or of one `step_...` in it.

    Averaged weights have the reference's names, `model_ema.*`. Raises FileNotFoundError, or
    ValueError with one line for what is no checkpoint, or a damaged one.
    """
    path = Path(path)
    if path.is_file():
        return read_file(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    folder = path if (path / "meta.json").exists() else latest(path)
    if folder is None:
        raise ValueError(f"{path} is a folder without a checkpoint: neither a meta.json nor a "
                         f"complete step_... folder is in it")
    problem = damage(folder) if folder == path else ""
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    run = load_run(folder)
    entries = dict(run.model.entries)
    entries.update((ema_name(name), entry) for name, entry in run.ema.entries.items())
    updates = torch.tensor(run.meta.get("ema_updates", 0), dtype=torch.int32)
    if run.ema:
        entries[EMA + "num_updates"] = Made(updates.dtype, (), lambda: updates)
    return Tensors(folder, entries, run.meta, run.optimizer.entries)


# ------------------------------------------------------------------------------ into a model

@dataclass
class Report:
    """What `load_model` did with every tensor."""
    step: int = 0                                           # optimizer steps, as the file says
    used: list[str] = field(default_factory=list)           # names in the file
    unused: dict[str, str] = field(default_factory=dict)    # name in the file -> why
    ported: dict[str, str] = field(default_factory=dict)    # name in the model -> what was changed
    fresh: list[str] = field(default_factory=list)          # names in the model left as they were
    ema: Mapping = field(default_factory=dict)              # name in the model -> its average, lazy
    num_updates: int = 0                                    # of the average


def load_model(module, path, ema=False, finetune=False):
    """Fills a module whose state dict has the checkpoint's names. Returns a Report.

    The module keeps its dtypes, devices and requires_grad; what is on "meta" comes to the CPU. No
    more than one tensor is in memory twice. ema: the UNet gets the averaged weights. finetune: the
    reference's rules for another pose width and for 4 input channels, and a cc_projection that the
    file lacks keeps the module's values. Raises ValueError that lists what is missing, unexpected
    or of another shape, and leaves the module as it was.
    """
    tensors, current = read(path), module.state_dict()
    entries, report = tensors.entries, Report(tensors.step)
    averaged = {name: ema_name(name) for name in current if name.startswith(UNET)}
    source = {name: averaged.get(name, name) if ema else name for name in current}
    plan, shadows, missing, misshapen = {}, {}, [], []
    for name, stored in source.items():
        if stored in entries:
            plan[name] = fit(name, stored, entries, current, finetune, report, misshapen)
            report.used.append(stored)
        elif name in SCHEDULE or finetune and name.startswith("cc_projection."):
            report.fresh.append(name)
        else:
            missing.append(stored)
    for name, stored in averaged.items():
        if stored in entries:
            shadows[name] = fit(name, stored, entries, current, finetune, report, misshapen)
    for name in sorted(set(entries) - set(report.used)):
        report.unused[name] = why_unused(name, current, averaged.values())
    report.unused.update((name, "optimizer or trainer state") for name in tensors.others)
    unexpected = [name for name, reason in report.unused.items() if not reason]
    if missing or unexpected or misshapen:
        raise ValueError(f"{tensors.path} does not fit the model: "
                         f"{misfit(missing, unexpected, list(dict.fromkeys(misshapen)))}")
    for name, entry in plan.items():
        assign(module, name, entry.read())
    report.ema = Tensors(tensors.path, shadows)
    report.num_updates = int(tensors[EMA + "num_updates"]) if EMA + "num_updates" in tensors else 0
    return report


def fit(name, stored, entries, current, finetune, report, misshapen):
    """The entry called `stored`, in the shape of the module's `name`; else noted as misshapen."""
    entry, new = entries[stored], current[name]
    if finetune and tuple(entry.shape) != tuple(new.shape):
        entry, report.ported[name] = port(name, entry, new)
    if tuple(entry.shape) != tuple(new.shape):
        misshapen.append(f"{stored} {list(entry.shape)} instead of {list(new.shape)}")
    return entry


def port(name, entry, current):
    """(entry, what was changed) by the reference's fine-tuning rules; as it was if none applies."""
    old, new = tuple(entry.shape), tuple(current.shape)
    channels = 4                    # of a latent: what the input convolution had before zero123
    if name == INPUT_CONV and old == (new[0], channels, *new[2:]) and new[1] > channels:
        def widened():
            weight = torch.zeros(new, dtype=entry.dtype)
            weight[:, :channels] = entry.read()
            return weight
        return Made(entry.dtype, new, widened), f"{channels} -> {new[1]} input channels, new ones 0"
    if name == POSE and len(old) == 2 and old[0] == new[0] <= min(old[1], new[1]):
        def grown():
            # quirk: the file's pose columns are thrown away, all new ones keep their random start
            weight = current.detach().to("cpu", entry.dtype, copy=True)
            weight[:, :new[0]] = entry.read()[:, :new[0]]
            return weight
        return (Made(entry.dtype, new, grown),
                f"{old[1]} -> {new[1]} columns, the {new[1] - new[0]} of the pose are fresh")
    return entry, ""


def why_unused(name, current, averaged):
    """Why a tensor that was not used has no place in the module; "" when it ought to have one."""
    if name in averaged:
        return "averaged weights (EMA); the raw ones were asked for"
    if name in current:
        return "raw weights; the averaged ones (EMA) were asked for"
    if name in SCHEDULE:
        return "a constant that the model computes"
    part = next((part for part in PARTS if name.startswith(part)), None)
    if part and not any(other.startswith(part) for other in current):
        return f"the model has no {part[:-1]}"
    return next((why for start, why in UNUSED.items() if name.startswith(start)), "")


def misfit(missing, unexpected, misshapen):
    """What does not fit, in one line."""
    shown, parts = 5, []
    for kind, found in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        more = f" and {len(found) - shown} more" if len(found) > shown else ""
        if found:
            parts.append(f"{len(found)} {kind} ({', '.join(found[:shown])}{more})")
    if missing and all(name.startswith(EMA) for name in missing):
        parts.append("it has no averaged weights (EMA), load the raw ones")
    if misshapen and all(POSE in text or ema_name(INPUT_CONV) in text or INPUT_CONV in text
                         for text in misshapen):
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
    model: Tensors
    ema: Tensors
    optimizer: Tensors
    meta: dict


def save(out, step, model, ema, optimizer, meta, keep=2, keep_every=0):
    """Writes out/step_00005000 so that it is there as a whole or not at all; returns the folder.

    model, ema, optimizer: tensors by name (a dict or Tensors, also empty), which must not change
    meanwhile. meta: what json can hold; `ema_updates` in it is the average's count. Afterwards the
    newest `keep` steps up to this one are left, and those that `keep_every` divides (0: none). On
    OSError (a full disk) nothing of this one is left.
    """
    out, final = Path(out), Path(out) / f"step_{step:08d}"
    out.mkdir(parents=True, exist_ok=True)
    for remains in out.glob(".unfinished_*"):
        shutil.rmtree(remains)
    folder = out / f".unfinished_{final.name}"
    folder.mkdir()
    try:
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
        folder.rename(final)
        sync(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # newer steps are damaged ones: the run was resumed behind them, and will write them again
    for old in [path for path in steps(out) if step_of(path) <= step][keep:]:
        if not keep_every or step_of(old) % keep_every:
            # without meta.json the folder does not exist, should the removal be cut short
            (old / "meta.json").unlink()
            shutil.rmtree(old)
    for remains in out.glob(".unfinished_*"):
        shutil.rmtree(remains)
    return final


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
