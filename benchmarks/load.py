"""`bench.py load`: a model filled from a file of zero123-xl's structure, in time and memory."""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from runtime import checkpoint
import configs
import model
from benchmarks import GB, in_fresh_process, peak_memory, row
from runtime.foreign import nbytes, read_file


def zero123(channels):
    """ZeroNVS with zero123-xl's structure on the meta device; the UNet is `channels` wide."""
    source = configs.Source("none", "co3d", "none", 1.0)
    with torch.device("meta"):
        return model.build(configs.Config((source,), mode="3dof", model_channels=channels))


def synthetic_checkpoint(path, channels):
    """Writes a file of zero123-xl's structure: weights, average, AdamW's two moments; random bytes.

    In memory are no more than a few megabytes of it. 15.5 GB at 320 channels.
    """
    def blank(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype)    # never touched, so never resident

    module = zero123(channels)
    weights = module.state_dict()
    trained = [name for name in weights if name.startswith((checkpoint.UNET, "cc_projection."))]
    state = {name: blank(tensor) for name, tensor in weights.items()}
    state |= {checkpoint.ema_name(name): blank(weights[name]) for name in trained
              if name.startswith(checkpoint.UNET)}
    moments = {i: {"step": 1, "exp_avg": blank(weights[name]), "exp_avg_sq": blank(weights[name])}
               for i, name in enumerate(trained)}
    with torch.serialization.skip_data():
        torch.save({"epoch": 1, "global_step": 165_000, "state_dict": state,
                    "optimizer_states": [{"state": moments, "param_groups": []}]}, path)
    block = os.urandom(1 << 24)
    tensors = read_file(path)
    with open(path, "r+b") as file:
        for entry in (*tensors.entries.values(), *tensors.others.values()):
            file.seek(entry.storage.offset)
            for start in range(0, entry.storage.nbytes, len(block)):
                file.write(block[:entry.storage.nbytes - start])
        file.flush()
        os.fsync(file.fileno())


def load_ours(path, channels):
    """(seconds, peak memory, bytes kept) of load_model, until every byte is in memory."""
    module = zero123(channels)
    start = time.perf_counter()
    checkpoint.load_model(module, path)
    touch(module)
    seconds = time.perf_counter() - start
    return seconds, peak_memory(), sum(map(nbytes, module.state_dict().values()))


def touch(module):
    """Reads a number of every page of a module's tensors, so that none is only mapped."""
    page = 4096 // torch.float32.itemsize
    sum(float(tensor.flatten()[::page].sum()) for tensor in module.state_dict().values())


def load_torch(path, channels, mmap):
    """(seconds, peak memory) of torch.load and assigning, until every byte is in memory."""
    module = zero123(channels)
    start = time.perf_counter()
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)["state_dict"]
    module.load_state_dict(state, strict=False, assign=True)
    del state
    touch(module)
    return time.perf_counter() - start, peak_memory()


def read_bytes(path, channels):
    """Seconds to read the bytes that `load_ours` keeps, into one buffer over and over."""
    wanted, buffer = set(zero123(channels).state_dict()), memoryview(bytearray(1 << 22))
    entries = [entry for name, entry in read_file(path).entries.items() if name in wanted]
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        for entry in entries:
            file.seek(entry.storage.offset)
            left = entry.storage.nbytes
            while left:
                left -= file.readinto(buffer[:left])
    return time.perf_counter() - start


def forget(path):
    """Drops a file from the system's cache, so that it is read from the disk, where that works."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def file_bytes(channels):
    """Size of the synthetic file."""
    weights = zero123(channels).state_dict()
    sizes = {name: nbytes(tensor) for name, tensor in weights.items()}
    unet = sum(size for name, size in sizes.items() if name.startswith(checkpoint.UNET))
    return sum(sizes.values()) + 3 * unet


def run(given):
    """Loading the model from a file of zero123-xl's structure: memory, and time."""
    if given.repeat < 1:
        raise ValueError(f"--repeat {given.repeat}: at least one run is needed")
    channels, step = given.channels, 32         # what GroupNorm divides widths by
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        room = 0.9 * shutil.disk_usage(folder).free
        while channels > step and file_bytes(channels) > room:
            channels -= step
        path = Path(folder) / "synthetic.ckpt"
        if channels != given.channels:
            print(f"{folder} has {room / GB:.1f} GB: the UNet is {channels} channels wide, not "
                  f"{given.channels}", file=sys.stderr)
        synthetic_checkpoint(path, channels)
        size = path.stat().st_size / GB

        def measure(function, *arguments):
            return in_fresh_process(function, path, channels, *arguments)

        rows = [row("load: size of the file", size, "GB")]
        ours, theirs = [], []
        while forget(path) and len(ours) < given.repeat:        # in turns: a disk has its moods
            theirs.append(measure(read_bytes))
            forget(path)
            ours.append(measure(load_ours)[0])
        if ours:
            rows.append(row("load: time, from the disk", min(ours), "s", "reading the bytes",
                            min(theirs)))
        measure(read_bytes)         # now they are in the system's cache
        warm, peak, kept = min(measure(load_ours) for _ in range(given.repeat))
        bytes_warm = min(measure(read_bytes) for _ in range(given.repeat))
        rows += [row("load: time, from the cache", warm, "s", "reading the bytes", bytes_warm),
                 row("load: peak memory", peak / GB, "GB", "bytes kept", kept / GB, kept / peak)]
        for mmap, peer in ((True, "torch.load(mmap=True)"), (False, "torch.load")):
            if not mmap and free_memory() < 1.5 * size * GB:
                print(f"no {peer} beside it: it needs {size:.1f} GB of memory, "
                      f"{free_memory() / GB:.1f} are free", file=sys.stderr)
                continue
            seconds, its_peak = measure(load_torch, mmap)
            rows += [row("load: time, from the cache", warm, "s", peer, seconds),
                     row("load: peak memory", peak / GB, "GB", peer, its_peak / GB)]
    return rows


def free_memory():
    """Bytes of memory that a process can have, where the system says so; else without limit."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else float("inf")


def add_options(parser):
    parser.add_argument("--channels", type=int, default=320, help="width of the UNet; 320 is "
                        "zero123-xl's, 15.5 GB; 32 makes 1.9 GB")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file is "
                        "written, and removed afterwards")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the best counts")
