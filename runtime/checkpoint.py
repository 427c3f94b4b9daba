"""Checkpoints: models filled from foreign files and from runs, and runs that no crash loses.

    python -m runtime.checkpoint info FILE
    python -m runtime.checkpoint convert IN OUT [--ema] [--dtype fp32|fp16|bf16] [--init FILE]

What a run saves is in runs.py, whose names are to be had here too.
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from runtime import lora
from runtime.export import read_diffusers
from runtime.foreign import read_file
from runtime.runs import FILES, Run, Writer, damage, latest, load_run, save, step_of, steps
from runtime.tensors import LazyTensor, StateDict, lazy, misfit

UNET, EMA, PROJECTION = "model.diffusion_model.", "model_ema.", "cc_projection."
FROZEN = ("first_stage_model.", "cond_stage_model.")
EMA_DECAY = 0.9999          # the reference's, where a run does not name its own
INPUT_CONV = UNET + "input_blocks.0.0.weight"
CHECKED = 256               # numbers of each weight that a checksum of it has
LATENT_CHANNELS = 4         # which the input convolution had before zero123
POSE = PROJECTION + "weight"
CONFIG = "zeronvs_config"       # in a file, as JSON, beside the weights of a run
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2")
# how names begin that other tools leave in files and no model needs: an average's state, constants
# that the model computes, text encoders where ours sees an image
UNUSED = (EMA + "num_updates", EMA + "decay", "lvlb_weights", "logvar", *SCHEDULE,
          "cond_stage_model.mean", "cond_stage_model.std", "cond_stage_model.transformer.",
          "cond_stage_model.model.transformer.")
# parameters of CLIP's text side, which zero123's files carry along and nothing reads
LEFTOVERS = tuple("cond_stage_model.model." + name for name in (
    "positional_embedding", "text_projection", "logit_scale", "token_embedding.weight",
    "ln_final.weight", "ln_final.bias"))


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
        decay = float(run.meta.get("config", {}).get("ema_decay", EMA_DECAY))
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
    if key in current or key.startswith(UNUSED):
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


if __name__ == "__main__":
    from runtime import command, convert

    command.run("checkpoint.py", convert.main)
