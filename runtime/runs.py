"""The steps that a run saves, so that no crash loses them.

A saved step is a folder `out/NAME/step_00005000/`: model.safetensors and ema.safetensors under the
names of zero123's checkpoints, optimizer.safetensors, and meta.json, which is written last, with
checksums of all. `Writer` writes beside the training thread.
"""

import errno
import functools
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

from runtime.files import unfinished
from runtime.foreign import StateDict, nbytes, read_file, write_safetensors

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
ALIGNED = 64            # bytes, of the copies in page-locked memory: enough for every dtype
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
        """Raises ValueError, one line, unless the run holds exactly these tensors: each is a dict
        of shapes by name, or of tensors."""
        for file, found, wanted in zip(FILES, (self.model, self.ema, self.optimizer),
                                       map(dict, (weights, averages, moments)), strict=True):
            shapes = {name: tuple(getattr(value, "shape", value)) for name, value in wanted.items()}
            entries = found.entries
            misshapen = {
                name: f"{list(entries[name].shape)} instead of {list(shape)}"
                for name, shape in shapes.items()
                if name in entries and tuple(entries[name].shape) != shape}
            missing = [name for name in shapes if name not in entries]
            unexpected = [name for name in entries if name not in shapes]
            if missing or unexpected or misshapen:
                raise ValueError(f"{self.folder / file} does not fit the run: "
                                 f"{misfit(missing, unexpected, misshapen)}")


def misfit(missing, unexpected, misshapen):
    """What does not fit, in one line. misshapen: name -> its shape and the one that is needed."""
    shown, parts, shapes = 5, [], [f"{name} {what}" for name, what in misshapen.items()]
    for kind, found in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes)):
        more = f" and {len(found) - shown} more" if len(found) > shown else ""
        if found:
            parts.append(f"{len(found)} {kind} ({', '.join(found[:shown])}{more})")
    return "; ".join(parts)


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
        discard(old, say)
        write_step(final, step, parts, meta)
    discard(superfluous(out, step + 1, keep + 1, keep_every), say)
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
        text = json.dumps({**meta, "crc32": checksum(json.loads(json.dumps(meta)))}, indent=1)
        with open(folder / "meta.json", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
        if final.exists():
            shutil.rmtree(final)
    sync(final.parent)


def checksum(meta):
    """CRC-32 of what meta.json says, however it is spaced."""
    told = {name: value for name, value in meta.items() if name != "crc32"}
    return zlib.crc32(json.dumps(told, sort_keys=True).encode())


def superfluous(out, step, keep, keep_every):
    """The steps before `step` that are not to be kept once it is there, oldest first."""
    # newer steps are damaged ones: the run was resumed behind them, and will write them again
    old = [folder for folder in steps(out) if step_of(folder) < step][keep - 1:]
    return [folder for folder in reversed(old) if not folder.is_symlink()
            and not (keep_every and step_of(folder) % keep_every == 0)]


def discard(folders, say):
    """Removes steps. What cannot be removed is said, and stays."""
    for folder in folders:
        try:
            # first out of the way at once: cut short, it is no step any more, and is cleared later
            folder.rename(folder.with_name(f".removed_{folder.name}"))
        except OSError as err:
            say(f"{folder} cannot be removed: {err.strerror or err}")
        clear(folder.parent, say)


def clear(out, say):
    """Removes what killed saves and removals left in a run's folder, and nothing else."""
    for path in out.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            try:
                shutil.rmtree(path)
            except OSError as err:
                say(f"{path} cannot be removed: {err.strerror or err}")


class Writer:
    """Saves steps on a thread of its own, from copies, so that training goes on meanwhile.

    One step is written at a time: a save that comes too early waits for the one before. A write
    that fails (a full disk) is told to `say` as a line, and leaves the step before as it was.

    step    the newest step that was written by this writer, 0 before there is one
    problem why the last write failed, "" when it did not
    """

    def __init__(self, say=print):
        self.say, self.copies, self.thread = say, {}, None
        self.room, self.taken, self.pinning, self.copied = None, 0, None, None
        self.step, self.problem = 0, ""

    def reserve(self, size):
        """Begins to make `size` bytes of page-locked memory for copies of a GPU's tensors."""
        self.pinning = threading.Thread(target=self.pin, args=(size,), name="pinning", daemon=True)
        self.pinning.start()

    def pin(self, size):
        room, part = torch.empty(size, dtype=torch.uint8), 1 << 28
        # registered: PyTorch's own page-locked memory is rounded up to powers of 2, to twice this
        for start in range(0, size, part):
            place, length = room.data_ptr() + start, min(part, size - start)
            if int(torch.cuda.cudart().cudaHostRegister(place, length, 0)):
                self.say("no page-locked memory for checkpoints: each will hold up the training")
                break
        self.room = room

    def save(self, out, step, model, ema, optimizer, meta, keep=2, keep_every=0):
        """As `save` above, but model, ema and optimizer are iterables of (name, tensor), each of
        which is copied before the next is asked for. Returns once the copies of a CPU's tensors are
        made, and those of a GPU's are in its queue: before what the caller does there next."""
        self.wait()
        if self.pinning is not None:
            self.pinning.join()
        parts = [{name: self.copy((file, name), tensor) for name, tensor in tensors}
                 for file, tensors in zip(FILES, (model, ema, optimizer), strict=True)]
        self.copied = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.copied = torch.cuda.Event()
            self.copied.record()
        self.thread = threading.Thread(target=self.write, name="checkpoint",
                                       args=(out, step, *parts, meta, keep, keep_every))
        self.thread.start()

    def copy(self, key, tensor):
        """The tensor in host memory, which is taken once and used for every save."""
        if key not in self.copies or self.copies[key].shape != tensor.shape:
            self.copies[key] = self.place(tensor)
        return self.copies[key].copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    def place(self, tensor):
        """Memory for a copy, of what was reserved as long as there is some."""
        start, size = self.taken, nbytes(tensor)
        if not tensor.is_cuda or self.room is None or start + size > len(self.room):
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        self.taken = start + -(-size // ALIGNED) * ALIGNED
        return self.room[start:start + size].view(tensor.dtype).view(tensor.shape)

    def write(self, out, step, *rest):
        self.problem = "the write did not end"      # what is left standing by any other error
        try:
            if self.copied is not None:
                self.copied.synchronize()
            save(out, step, *rest, self.say)
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
    found = [path for path in Path(out).glob("step_*") if re.fullmatch(r"step_\d{8,18}", path.name)
             and (path / "meta.json").exists()]
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
        meta = read_meta(folder)
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


def read_meta(folder):
    """What the meta.json of a step folder says. Raises ValueError, OSError."""
    largest = 1 << 24
    path = folder / "meta.json"
    if path.stat().st_size > largest:
        raise ValueError(f"meta.json has more than {largest:,} bytes")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as err:
        raise ValueError("meta.json is nested too deeply") from err
    if not isinstance(meta, dict):
        raise ValueError("meta.json is no table of entries")
    # a run's earlier versions wrote none
    if meta.setdefault("crc32", checksum(meta)) != checksum(meta):
        raise ValueError("meta.json is not what was written, by its own checksum")
    for name, kind, without in (("step", int, None), ("files", dict, None), ("config", dict, {}),
                                ("ema_updates", int, 0)):
        value = meta.get(name, without)
        if type(value) is not kind or kind is int and not 0 <= value < 2**31:
            raise ValueError(f"meta.json: {name} is {str(value)[:50]!r}")
    if re.fullmatch(r"step_\d{8,18}", folder.name) and step_of(folder) != meta["step"]:
        raise ValueError(f"meta.json is of step {meta['step']}")
    return meta


def load_run(folder):
    """The Run in a step folder; lazy: `latest` and `read` have checked its bytes before."""
    folder = Path(folder)
    meta = read_meta(folder)
    return Run(folder, meta["step"], *(read_file(folder / name) for name in FILES), meta)
