"""What a run starts from: the newest checkpoint in its folder, else `init`, else random weights.

Rank 0 alone reads the run's folder and sends the others what they need: with several hosts only
rank 0's disk needs it. What all must have alike is compared before anything is trained.
"""

import functools
import itertools
import socket
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch

import camera
import configs
import depth
import diffusion
import engine
import model
from runtime import checkpoint, lora
from runtime.optimizer import MOMENTS, Ema, Optimizer

CHECKED_PAIRS = 4       # of each source, at start
# Fields that may change when a run goes on: of its length, its machine and what it reports. (A
# cosine rate follows `steps`, and rounding follows `precision`: whoever changes them wants that.)
FREE = {"data", "out", "steps", "device", "compile", "graph", "checkpoint_activations",
        "micro_batch", "divide_optimizer", "workers", "threads", "max_damaged", "log_every",
        "save_every", "keep", "keep_every", "sample_every", "eval_pairs", "validate_every",
        "validate_pairs", "validate_steps", "patience", "sampler", "sample_steps", "guidance",
        "eta", "init", "depth_weights", "precision", "web_patience"}
# of these that may differ among the ranks
OWN = {"data", "out", "device", "workers", "threads", "web_patience"}


def check_files(config, dry_run=False):
    """Raises where a file of weights is missing, before anything takes time, but in a dry run."""
    for name in (config.init, config.depth_weights * camera.MODES[config.mode].needs_depth):
        if name and not dry_run and not Path(name).exists():
            raise FileNotFoundError(f"no checkpoint {name}")


def contents_of(pairs, config):
    """{source: what it holds, in a few words}. Reads pairs of every source, so that what cannot be
    trained on is refused at start."""
    contents = {}
    viewer = camera.MODES[config.mode].unit == "viewer"
    for source, reader in enumerate(pairs.readers):
        if viewer and hasattr(reader, "check_blend"):
            reader.check_blend(config.quantile_blend)
        numbers = (k for k in itertools.count() if pairs.draw(k)[0] == source)
        batch = pairs.__getitems__(list(itertools.islice(numbers, CHECKED_PAIRS)))
        if not config.depth_weights or not viewer:
            depth.pose_vector(batch, config.mode, None, config.quantile_blend)
        cameras = torch.cat([batch["cond_c2w"].flatten(), batch["radius"], batch["fov"]])
        crc = zlib.crc32(repr((batch["uid"], cameras.tolist())).encode())
        contents[reader.name] = f"{reader.summary().partition(': ')[2]} (checksum {crc:08x})"
    return contents


def compare_ranks(config, ranks, code, contents):
    """Refuses ranks that would not train as one, in one line. contents: {source: what it holds}."""
    newest = max([0, *map(checkpoint.step_of, checkpoint.steps(config.out))])
    # fewer than rank 0 has are none: its checkpoint is what counts
    seen = {"the newest step in --out": max(newest, ranks.broadcast_object(newest)),
            "the code": code, "torch": torch.__version__}
    seen |= {name: value for name, value in asdict(config).items()
             if name not in OWN | {"sources"}}
    for source in config.sources:
        seen |= {f"{source.name}'s {name}": value for name, value in asdict(source).items()}
        seen[f"what {source.name} holds"] = contents[source.name]
    rows = ranks.gather((socket.gethostname(), seen))
    host, first = rows[0]
    for rank, (other, row) in enumerate(rows):
        different = [f"{name} is {row.get(name)!r}, not {value!r}" for name, value in first.items()
                     if row.get(name) != value]
        if different:
            raise ValueError(f"rank {rank} on {other} has not what rank 0 on {host} has: "
                             f"{'; '.join(different)}")


def find_start(config, ranks, say, dry_run=False):
    """The checkpoint that a run goes on from, or None, see `newest`; says what it starts from. A
    dry run raises what is wrong with `init`, where it starts from that."""
    saved = newest(config, ranks, say)
    say(f"start    step {saved.step} of {config.out}" if saved else
        f"start    {config.init or 'random weights'}, into {config.out}")
    if dry_run and config.init and not saved:
        checkpoint.read(config.init)
    return saved


def newest(config, ranks, say):
    """The run's newest undamaged checkpoint, or None. Rank 0 reads all its bytes to know; the other
    ranks have its step and meta data, and none of its tensors."""
    def read():
        folder = checkpoint.latest(config.out, say)
        if folder is None and checkpoint.steps(config.out):
            raise ValueError(f"every checkpoint in {config.out} is damaged, and a new run would "
                             "take their place: remove them, or give another --out")
        return folder and checkpoint.load_run(folder)

    run = ranks.on_rank_0(read)
    found = ranks.broadcast_object(run and replace(run, model={}, ema={}, optimizer={}))
    if found is None:
        return None
    saved = asdict(configs.from_dict(found.meta["config"]))
    changed = [f"{name} was {saved[name]!r}, is {new!r}" for name, new in asdict(config).items()
               if name not in FREE and saved[name] != new]
    if changed:
        raise ValueError(f"{found.folder} is a run of another configuration "
                         f"({'; '.join(changed)}): give another --out, or the same one")
    return run or found


def build(config, device):
    """The network of a Config: with random weights, or, where `init` is to fill it, with none but
    those that a file may lack. Random values for all of zero123-xl take 15 seconds."""
    torch.manual_seed(config.seed)      # nothing later draws from it
    if not config.init:
        return model.build(config).to(device).train()
    with torch.device("meta"):
        net = model.build(config)
    for name, table in diffusion.schedule_buffers().items():
        setattr(net, name, table)
    pose_dim = camera.MODES[config.mode].width
    net.cc_projection = model.pose_projection(net.cc_projection.in_features - pose_dim, pose_dim,
                                              config.context_dim)
    return net.train()


def saved_weights(net):
    """{name: tensor} of what a run saves of a network: what is not in the file it starts from."""
    low_rank = lora.updates(net)
    return {name: tensor for name, tensor in net.state_dict().items()
            if not name.startswith(checkpoint.FROZEN)
            and (not low_rank or lora.is_update(name) or name.startswith(checkpoint.PROJECTION))}


@functools.cache
def base_checksum(path):
    """The checksum of what low-rank updates are trained on. Once: later the file may be gone."""
    return checkpoint.checksum(checkpoint.read(path))


def check_fits(run, net):
    """Raises ValueError unless a saved step holds just what a run of `net` saves."""
    weights = {name: tensor for name, tensor in net.state_dict().items() if name in run.model}
    weights |= saved_weights(net)
    unet = {name: p for name, p in weights.items() if name.startswith(checkpoint.UNET)}
    moments = {f"{name}.{kind}": () if kind == "step" else p.shape
               for name, p in net.named_parameters() if p.requires_grad
               for kind in (*MOMENTS, "step")}
    run.require(weights, unet, moments)


def restore_or_init(config, net, run, ranks, device):
    """(Ema, Optimizer) of a run: what its newest checkpoint holds, else `init`.

    `init` is read in both cases: a run's checkpoints leave out the frozen networks.
    """
    # filled before anything refers to the parameters: loading may put others in their place
    loaded = None
    if config.init:
        tensors = checkpoint.read(config.init)
        averaged = config.lora_rank > 0 and any(n.startswith(checkpoint.EMA) for n in tensors)
        loaded = checkpoint.load_model(net, tensors, averaged, finetune=True)
    if config.lora_rank:
        lora.add(net, config)
        if run is not None:
            checkpoint.check_base(run.meta, base_checksum(config.init), run.folder, config.init)
    net.to(device)
    if run is not None:
        ranks.on_rank_0(check_fits, run, net)
        weights = net.state_dict()
        for name, tensor in ranks.from_rank_0(run.model, weights):
            weights[name].copy_(tensor)
    if device.type == "cuda":
        engine.channels_last(net)
    ema = Ema(net.model.diffusion_model, config.ema_decay, ranks, config.divide_optimizer)
    optimizer = Optimizer(net, config, ranks)
    if run is not None:
        optimizer.restore(run.optimizer)
        ema.restore(run.ema, run.meta.get("ema_updates", 0))
    elif loaded is not None and not config.lora_rank:
        ema.restore(loaded.ema, loaded.num_updates)
    return ema, optimizer


def save(writer, config, step, net, ema, optimizer, ranks):
    """Hands the state after `step` to the writer: what trains, its average and AdamW's moments."""
    writer.wait()
    ranks.any_rank(False)        # nobody enters a transfer while rank 0 still waits for its disk
    averages, moments = ema.tensors(), optimizer.tensors()
    if ranks.rank == 0:
        meta = {"step": step, "ema_updates": ema.updates, "config": asdict(config)}
        meta |= {"base": base_checksum(config.init)} if config.lora_rank else {}
        writer.save(config.out, step, saved_weights(net).items(), averages, moments, meta,
                    config.keep, config.keep_every)
    for _ in itertools.chain(averages, moments):        # the other ranks give their part
        pass
