"""Checkpoints: models filled from foreign files and from runs, and runs that no crash loses.

    python -m runtime.checkpoint info FILE
    python -m runtime.checkpoint convert IN OUT [--ema] [--dtype fp32|fp16|bf16] [--init FILE]

What a run saves is in runs.py, whose names are to be had here too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from runtime.export import is_diffusers, read_diffusers
from runtime.foreign import LazyTensor, StateDict, nbytes, read_file
from runtime.runs import (ALIGNED, FILES, Run, Writer, damage, latest, load_run, misfit, save,
                          step_of, steps)

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


def read(path, init=""):
    """A StateDict, lazy: of a file, a run, one `step_...` of it, a diffusers folder.

    Averaged weights have the reference's names, `model_ema.*`. A run saves what it trains; its
    frozen networks are those of `init`, the file that it started from, which the caller names:
    what a checkpoint says of other files is never followed. `meta["config"]` is the run's
    configuration, a dict, where there is one. What was read already is given back. Raises
    FileNotFoundError, or ValueError with one line for what is no checkpoint, or a damaged one.
    """
    found = path if isinstance(path, StateDict) else read_any(Path(path))
    if not init:
        return found
    frozen = {name: entry for name, entry in read_any(Path(init)).entries.items()
              if name.startswith(FROZEN)}
    if not frozen:
        raise ValueError(f"{init} has no autoencoder and no CLIP, which {found.path} starts from")
    return StateDict(found.path, frozen | found.entries, found.meta, found.others)


def read_any(path):
    """See read."""
    if path.is_file():
        return with_config(read_file(path))
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")
    if is_diffusers(path):
        return with_config(read_diffusers(path))
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
    entries = dict(run.model.entries)
    entries.update((ema_name(name), entry) for name, entry in run.ema.entries.items())
    decay = torch.tensor(float(run.meta.get("config", {}).get("ema_decay", EMA_DECAY)))
    updates = torch.tensor(run.meta.get("ema_updates", 0), dtype=torch.int32)
    if run.ema:
        entries[EMA + "decay"] = LazyTensor(decay.dtype, (), lambda: decay)
        entries[EMA + "num_updates"] = LazyTensor(updates.dtype, (), lambda: updates)
    return StateDict(folder, entries, run.meta, run.optimizer.entries)


def with_config(found):
    """Makes `meta["config"]` of the text that a file carries. Raises ValueError, one line."""
    try:
        if CONFIG in found.meta:
            found.meta["config"] = json.loads(found.meta[CONFIG])
    except (ValueError, TypeError, RecursionError) as err:
        raise ValueError(f"{found.path}: its {CONFIG} is no JSON") from err
    if not isinstance(found.meta.get("config", {}), dict):
        raise ValueError(f"{found.path}: its {CONFIG} is {str(found.meta['config'])[:50]!r}, not "
                         "the fields of a configuration")
    return found


def updates_of(tensors):
    """The updates behind a file's average; 0 where it does not say, or nothing that can be."""
    entry = tensors.entries.get(EMA + "num_updates")
    if entry is None or tuple(entry.shape) not in ((), (1,)) or entry.dtype.is_complex:
        return 0
    value = float(entry.read())
    return int(value) if 0 <= value < 2**53 else 0


def step_bytes(net):
    """Bytes that the saved steps of a model have: its weights, their average and two moments."""
    return sum(nbytes(value) * (4 if name.startswith((UNET, PROJECTION)) else 1) + 4 * ALIGNED
               for name, value in net.state_dict().items() if not name.startswith(FROZEN))


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
                         f"{reasons(missing, unexpected, misshapen, tensors)}")
    for name, entry in plan.items():
        assign(module, name, entry.read())
    for name in LEFTOVERS:
        if name in current and name not in plan and current[name].is_meta:
            assign(module, name, torch.zeros(current[name].shape))
    report.ema = StateDict(tensors.path, shadows)
    report.num_updates = updates_of(tensors)
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
        return (LazyTensor(entry.dtype, new, widened),
                f"{channels} -> {new[1]} input channels, new ones 0")
    if name == POSE and len(old) == 2 and old[0] == new[0]:
        # as many columns of the embedding come first as there are rows; in pixels there are none
        kept = new[0] if new[0] <= min(old[1], new[1]) else 0
        if current.is_meta:
            raise ValueError(f"{POSE} has no values for its new columns: build the model on a "
                             "real device to fine-tune it")
        def grown():
            # quirk: the file's pose columns are thrown away, all new ones keep their random start
            weight = current.detach().to("cpu", entry.dtype, copy=True)
            weight[:, :kept] = entry.read()[:, :kept]
            return weight
        return (LazyTensor(entry.dtype, new, grown),
                f"{old[1]} -> {new[1]} columns, the {new[1] - kept} of the pose are fresh")
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


def reasons(missing, unexpected, misshapen, tensors):
    """What does not fit, in one line, and what helps. misshapen: name -> its shape and the
    module's."""
    parts = [misfit(missing, unexpected, misshapen)]
    if missing and all(name.startswith(FROZEN) for name in missing):
        parts.append("a run saves what it trains: name the file that its frozen networks are in "
                     f"with --init={started_from(tensors) or 'FILE'}")
    if missing and all(name.startswith(EMA) for name in missing):
        parts.append("it has no averaged weights (EMA), load the raw ones")
    if any(ema_name(name) in tensors for name in missing):
        parts.append("it has averaged weights (EMA) alone, load those: ema=True")
    if misshapen and set(misshapen) <= {POSE, INPUT_CONV, ema_name(INPUT_CONV)}:
        parts.append("finetune=True ports weights of another pose width")
    return "; ".join(parts)


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


if __name__ == "__main__":
    from runtime import command, convert

    command.run("checkpoint.py", convert.main)
