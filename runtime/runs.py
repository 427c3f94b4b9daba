"""The steps that a run saves, so that no crash loses them.

A saved step is a folder `out/NAME/step_00005000/`: model.safetensors and ema.safetensors under the
names of zero123's checkpoints, optimizer.safetensors, and meta.json, which is written last, with
checksums of all. `Writer` writes beside the training thread.
"""

import errno
import json
import os
import re
import shutil
import threading
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.files import read_json, unfinished, write_text
from runtime.foreign import read_file
from runtime.tensors import StateDict, misfit, write_safetensors

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
STEP = re.compile(r"step_\d{8,18}")
LEFTOVER = re.compile(r"\.(unfinished|removed)_step_\d{8,}")      # of saves that were killed


@dataclass
class Run:
    """A saved step of a run: three lazy Mappings of tensors and the meta data."""
    folder: Path
    step: int
    model: StateDict
    ema: StateDict
    optimizer: StateDict
    meta: dict

    def require(self, weights, averages=(), moments=()):
        """Raises ValueError, one line, unless the run holds exactly these tensors (see misfit)."""
        for file, found, wanted in zip(FILES, (self.model, self.ema, self.optimizer),
                                       map(dict, (weights, averages, moments)), strict=True):
            if problem := misfit(found.entries, wanted):
                raise ValueError(f"{self.folder / file} does not fit the run: {problem}")


def save(out, step, model, ema, optimizer, meta, keep=2, keep_every=0, say=warnings.warn):
    """Writes out/step_00005000 so that it is there as a whole or not at all; returns the folder.

    model, ema, optimizer: tensors by name (a dict or StateDict, also empty), which must not change
    meanwhile. meta: what json can hold; `ema_updates` in it is the average's count. Afterwards the
    newest `keep` steps up to this one are left, and those that `keep_every` divides (0: none).
    Where the disk is full, the steps that would go then go first, if a good one stays. On OSError
    nothing of this one is left.
    """
    out = Path(out)
    final, parts = out / f"step_{step:08d}", (model, ema, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    clear(out, say)
    if final.is_symlink() or final.exists() and not (final / "meta.json").exists():
        raise FileExistsError(errno.EEXIST, "is in the way, and no step of a run", str(final))
    try:
        write_step(final, step, parts, meta)
    except OSError as err:
        old = superfluous(out, step, keep, keep_every)
        stays = any(not damage(folder) for folder in steps(out) if folder not in old)
        if err.errno not in (errno.ENOSPC, errno.EDQUOT) or not old or not stays:
            raise
        say(f"{out} has no room for step {step}: {', '.join(folder.name for folder in old)} would "
            "be removed after it, and is removed before it")
        clear(out, say, old)
        write_step(final, step, parts, meta)
    clear(out, say, superfluous(out, step + 1, keep + 1, keep_every))
    return final


def write_step(final, step, parts, meta):
    """Writes the folder `final` of a step, through to the disk, in the place of one of its name."""
    with unfinished(final) as folder:
        folder.mkdir()
        files = {}
        for name, tensors in zip(FILES, parts, strict=True):
            size, crc = write_safetensors(folder / name, tensors)
            files[name] = {"bytes": size, "crc32": crc}
        meta = {**meta, "step": step, "files": files}
        meta["crc32"] = checksum(json.loads(json.dumps(meta)))
        write_text(folder / "meta.json", json.dumps(meta, indent=1))
        sync(folder)
        if final.exists():
            shutil.rmtree(final)
    sync(final.parent)


def checksum(meta):
    """CRC-32 of what meta.json says, however it is spaced."""
    fields = {name: value for name, value in meta.items() if name != "crc32"}
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def superfluous(out, step, keep, keep_every):
    """The steps before `step` that are not to be kept once it is there, oldest first."""
    # newer steps are damaged ones: the run was resumed behind them, and will write them again
    old = [folder for folder in steps(out) if step_of(folder) < step][keep - 1:]
    return [folder for folder in reversed(old) if not folder.is_symlink()
            and not (keep_every and step_of(folder) % keep_every == 0)]


def clear(out, say, old=()):
    """Removes the `old` steps of a run, and what killed saves and removals left in its folder, and
    nothing else. What cannot be removed is said, and stays."""
    left = [path for path in out.iterdir() if LEFTOVER.fullmatch(path.name)]
    for path in [*(path for path in left if path.is_dir() and not path.is_symlink()), *old]:
        try:        # a step is out of the way at once: cut short, it is no step any more
            shutil.rmtree(path.rename(path.with_name(f".removed_{path.name}")) if path in old
                          else path)
        except OSError as err:
            say(f"{path} cannot be removed: {err.strerror or err}")


class Writer:
    """Saves steps on a thread of its own, from copies, so that training goes on meanwhile.

    One step is written at a time: a save that comes too early waits for the one before. A write
    that fails (a full disk) is told to `say` as a line, and leaves the step before as it was;
    `problem` says why, and is "" when it did not.
    """

    def __init__(self, say=print):
        self.say, self.copies, self.thread, self.problem = say, {}, None, ""

    def save(self, out, step, model, ema, optimizer, meta, keep=2, keep_every=0):
        """As `save` above, but model, ema and optimizer are iterables of (name, tensor), each of
        which is copied before the next is asked for. Returns once the copies of a CPU's tensors are
        made, and those of a GPU's are in its queue: before what the caller does there next."""
        self.wait()
        parts = [{name: self.copy((file, name), tensor) for name, tensor in tensors}
                 for file, tensors in zip(FILES, (model, ema, optimizer), strict=True)]
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        self.thread = threading.Thread(target=self.write, name="checkpoint", args=(
            copied, out, step, *parts, meta, keep, keep_every))
        self.thread.start()

    def copy(self, key, tensor):
        """The tensor in host memory (page-locked for a GPU's), which every save uses again."""
        if key not in self.copies or self.copies[key].shape != tensor.shape:
            self.copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype,
                                           pin_memory=tensor.is_cuda)
        return self.copies[key].copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    def write(self, copied, out, step, *rest):
        self.problem = "the write did not end"      # what is left standing by any other error
        try:
            if copied:
                copied.synchronize()
            save(out, step, *rest, self.say)
            self.problem = ""
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
             if STEP.fullmatch(path.name) and (path / "meta.json").exists()]
    return sorted(found, key=step_of, reverse=True)


def latest(out, say=warnings.warn):
    """The newest undamaged step folder of a run, or None. Damaged newer ones are said."""
    for folder in steps(out):
        if not (problem := damage(folder)):
            return folder
        say(f"{folder} is damaged, the step before is used: {problem}")
    return None


def damage(folder):
    """What is wrong with a step folder, by sizes and CRC-32 in its meta.json; "" when nothing."""
    try:
        meta = read_meta(folder)
        for name in FILES:
            recorded, size, crc = meta["files"][name], 0, 0
            with open(folder / name, "rb", buffering=0) as file:
                while data := file.read(1 << 22):
                    size, crc = size + len(data), zlib.crc32(data, crc)
            if (size, crc) != (recorded["bytes"], recorded["crc32"]):
                return (f"{name} has {size:,} bytes of checksum {crc:08x} instead of "
                        f"{recorded['bytes']:,} of {recorded['crc32']:08x}")
    except (OSError, ValueError, KeyError, TypeError) as err:
        return f"{type(err).__name__}: {' '.join(str(err).split())}"
    return ""


def read_meta(folder):
    """What the meta.json of a step folder says. Raises ValueError, OSError."""
    meta = read_json(folder / "meta.json")
    # a run's earlier versions wrote none
    if meta.setdefault("crc32", checksum(meta)) != checksum(meta):
        raise ValueError("meta.json is not what was written, by its own checksum")
    for name, kind, without in (("step", int, None), ("files", dict, None), ("config", dict, {}),
                                ("ema_updates", int, 0)):
        value = meta.get(name, without)
        if type(value) is not kind or kind is int and not 0 <= value < 2**31:
            raise ValueError(f"meta.json: {name} is {str(value)[:50]!r}")
    if STEP.fullmatch(folder.name) and step_of(folder) != meta["step"]:
        raise ValueError(f"meta.json is of step {meta['step']}")
    return meta


def load_run(folder):
    """The Run in a step folder; lazy: `latest` and `read` have checked its bytes before."""
    folder = Path(folder)
    meta = read_meta(folder)
    return Run(folder, meta["step"], *(read_file(folder / name) for name in FILES), meta)
