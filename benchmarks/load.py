"""A checkpoint of zero123-xl's structure loaded into a model, beside reading as many bytes, which
must be done at least. It is made here and removed, and read from the system's cache."""

import tempfile
import time
from pathlib import Path

import torch

import configs
import model
from benchmarks.measure import GB, collect, finish, peak_gb, row
from runtime import checkpoint

BLOCK = 1 << 22


def zero123(channels):
    """ZeroNVS of zero123-xl's structure, without values; the UNet is `channels` wide."""
    source = configs.Source("none", "co3d", "none", 1.0)
    with torch.device("meta"):
        return model.build(configs.Config((source,), mode="3dof", model_channels=channels))


def write_checkpoint(path, channels):
    """Writes weights, average and AdamW's two moments: 15.5 GB at 320 channels."""
    def values(tensors):        # zeros, that take no memory before they are written
        return {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}

    weights = zero123(channels).state_dict()
    trained = {name: t for name, t in weights.items()
               if name.startswith((checkpoint.UNET, "cc_projection."))}
    average = {checkpoint.ema_name(name): t for name, t in trained.items()
               if name.startswith(checkpoint.UNET)}
    moments = {i: {"step": 1, **values({"exp_avg": t, "exp_avg_sq": t})}
               for i, t in enumerate(trained.values())}
    torch.save({"epoch": 1, "global_step": 165_000, "state_dict": values({**weights, **average}),
                "optimizer_states": [{"state": moments, "param_groups": []}]}, path)


def measure_loading(variant, path, channels):
    """Yields seconds until every kept byte is in memory, and peak memory beside the kept bytes."""
    module = zero123(channels)
    kept = sum(tensor.nbytes for tensor in module.state_dict().values())
    start = time.perf_counter()
    if variant == "product":
        checkpoint.load_model(module, path)
        for tensor in module.state_dict().values():     # every byte, so that none is only mapped
            tensor.view(-1).view(torch.uint8).amax()
    else:
        buffer = bytearray(BLOCK)
        with open(path, "rb", buffering=0) as file:
            while file.tell() < kept and file.readinto(buffer):
                pass
    yield row(variant, "time, from the cache", time.perf_counter() - start, "s")
    yield row(variant, "peak memory of what is kept", peak_gb() * GB / kept, "times")


def run_load(args):
    """A model filled from a file of zero123-xl's structure: time and memory."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "synthetic.ckpt"
        write_checkpoint(path, args.channels)
        rows = collect([(variant, measure_loading, variant, path, args.channels)
                        for variant in ("reading the bytes", "product")], args.seconds_limit)
    return finish(rows, {"product": ["reading the bytes"]})
