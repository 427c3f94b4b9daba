"""Trains a ZeroNVS model, on one process or under torchrun. Running the same command again goes on.

    python train.py configs/synth.py
    torchrun --nproc_per_node 8 train.py configs/mix.py
    python train.py configs/mix.py --dry-run        what would run, and the memory it needs
    python train.py configs/mix.py --profile 5      also a trace of five steps

What a run starts from: the newest checkpoint in its own folder, else `init`, else random weights.
Pairs, noise, timesteps and dropped conditions are functions of (seed, number of the pair), so no
state of a generator or loader is saved, and the number of ranks or micro-steps changes nothing.
"""

import argparse
import functools
import itertools
import json
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from runtime import checkpoint
import diffusion
import configs
from runtime import cost
import data
from runtime import ranks as distributed
from engine import graph
from engine import kernels
import model
from runtime import log as report
from analysis import score as scoring
from runtime.optimizer import Ema, Optimizer, learning_rate

GRID_PAIRS = 8
CHECKED_PAIRS = 4       # of each source, at start
NAMED_PAIRS = 5         # of those whose loss is not finite
STOP = signal.SIGINT, signal.SIGTERM    # save and end; sent again they change nothing
# Fields that may change when a run goes on: of its length, its machine and what it reports. (A
# cosine rate follows `steps`, and rounding follows `precision`: whoever changes them wants that.)
FREE = {"data", "out", "steps", "device", "compile", "graph", "checkpoint_activations",
        "micro_batch", "divide_optimizer", "workers", "max_damaged", "log_every", "save_every",
        "keep", "keep_every", "sample_every", "eval_pairs", "validate_every", "validate_pairs",
        "validate_steps", "sampler", "sample_steps", "guidance", "eta", "init", "depth_weights",
        "precision"}


# ---- a batch

def inputs(net, batch, config, depth_net, device):
    """A batch of pairs, as the loader gives it, to what `ZeroNVS.forward` takes before `draws`."""
    if "moments_target" in batch:       # of encoded shards: what the frozen networks said once
        moments, z_cond, embedding = (batch[name].to(device, non_blocking=True).float()
                                      for name in ("moments_target", "mean_cond", "clip_cond"))
        T = model.pose_vector(batch, config.mode, depth_net, config.quantile_blend)
        return *moments.chunk(2, dim=1), z_cond, embedding, T.to(device)
    image_cond, image_target = (data.images(batch[name].to(device, non_blocking=True))
                                for name in ("image_cond", "image_target"))
    T = model.pose_vector({**batch, "image_cond": image_cond}, config.mode, depth_net,
                          config.quantile_blend)
    mean, logvar = net.encode(image_target)
    return mean, logvar, net.encode(image_cond)[0], net.embed(image_cond), T.to(device)


def forward_backward(net, autocast, micro_steps, drop, mean, logvar, z_cond, embedding, T, *draws):
    """The losses (b,) of pairs, whose mean adds its share of the step to the gradients."""
    with autocast:
        loss = net(mean, logvar, z_cond, embedding, T, diffusion.Draws(*draws), drop)
        (loss.mean() / micro_steps).backward()
    return loss.detach()


# ---- the machine

def channels_last(net):
    """Lays out the weights of convolutions as GPUs compute with them. Values, and so checkpoints,
    stay; to come before averages and moments, which are laid out as their parameters are."""
    for p in net.parameters():
        # 1x1 kernels lie so anyway, and their gradients come with the strides that they have
        if p.ndim == 4 and p.shape[2:].numel() > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def compile_networks(net):
    """Lets the first step compile the UNet and, where they are asked, the frozen encoders."""
    import torch._inductor.config as inductor
    # Else every 4-D tensor is put channels-last, attention's q, k and v too, by copies
    inductor.layout_optimization = False
    net.model.diffusion_model.compile()
    for network, name in ((net.first_stage_model, "encode"),
                          (net.cond_stage_model.model, "encode_image")):
        if any(True for _ in network.parameters()):     # else there is no network
            setattr(network, name, torch.compile(getattr(network, name)))


# ---- the run

def split(config, world):
    """(pairs a rank holds at once, micro-steps) of a step. ValueError where it does not divide."""
    if config.batch_size % world:
        low = config.batch_size // world * world
        near = " or ".join(str(n) for n in (low, low + world) if n)
        raise ValueError(f"batch_size {config.batch_size} is not divisible by {world} ranks of "
                         f"micro_batch {config.micro_batch}; the nearest that is: "
                         f"--batch_size={near}")
    share = config.batch_size // world
    micro_steps = -(-share // config.micro_batch)
    if share % micro_steps:
        fits = max(m for m in range(1, config.micro_batch + 1) if share % m == 0)
        raise ValueError(f"batch_size {config.batch_size} on {world} ranks is {share} pairs each, "
                         f"which do not come in equal micro-batches of {config.micro_batch} or "
                         f"fewer; --micro_batch={fits} does")
    return share // micro_steps, micro_steps


def check_sources(pairs, config):
    """Reads pairs of every source, so that what cannot be trained on is refused at start."""
    for source in range(len(pairs.readers)):
        numbers = (k for k in itertools.count() if pairs.draw(k)[0] == source)
        for k in itertools.islice(numbers, CHECKED_PAIRS):
            batch = torch.utils.data.default_collate([pairs[k]])
            if not config.depth_weights or config.mode != "7dof_quantile_scale":
                model.pose_vector(batch, config.mode, None, config.quantile_blend)


def newest(config, ranks, log):
    """The run's newest undamaged checkpoint, a Run or None: rank 0 reads all its bytes to know."""
    folder = None
    if ranks.rank == 0:
        with warnings.catch_warnings(record=True) as damaged:
            warnings.simplefilter("always")
            folder = checkpoint.latest(config.out)
        for warning in damaged:
            log.say(str(warning.message))
    folder, lost = ranks.broadcast_object((folder, folder is None and bool(checkpoint.steps(config.out))))
    if lost:
        raise ValueError(f"every checkpoint in {config.out} is damaged, and a new run would take "
                         "their place: remove them, or give another --out")
    if folder is None:
        return None
    run = checkpoint.load_run(folder)
    saved = asdict(configs.from_dict(run.meta["config"]))
    changed = [f"{name} was {saved[name]!r}, is {new!r}" for name, new in asdict(config).items()
               if name not in FREE and saved[name] != new]
    if changed:
        raise ValueError(f"{folder} is a run of another configuration ({'; '.join(changed)}): "
                         "give another --out, or the same configuration")
    return run


def begin(config, net, run, ranks):
    """(Ema, Optimizer) of a run: what its newest checkpoint holds, else `init`.

    `init` is read in both cases: a run's checkpoints leave out the frozen networks.
    """
    # filled before anything refers to the parameters: loading may put others in their place
    loaded = checkpoint.load_model(net, config.init, finetune=True) if config.init else None
    if run is not None:
        weights = {name: tensor for name, tensor in net.state_dict().items()
                   if name in run.model or not name.startswith(checkpoint.FROZEN)}
        unet = {name: p for name, p in weights.items() if name.startswith(checkpoint.UNET)}
        moments = {f"{name}.{kind}": () if kind == "step" else p.shape
                   for name, p in net.named_parameters() if p.requires_grad
                   for kind in ("exp_avg", "exp_avg_sq", "step")}
        # a step that was converted has no moments, and no average where its source had none
        run.require(weights, unet if run.ema or run.meta.get("ema_updates", 0) else {},
                    moments if run.optimizer else {})
        for name, tensor in run.model.items():
            weights[name].copy_(tensor)
    if net.betas.device.type == "cuda":
        channels_last(net)
    ema = Ema(net.model.diffusion_model, config.ema_decay, ranks, config.divide_optimizer)
    optimizer = Optimizer(net, config, ranks)
    averages, updates = {}, 0
    if run is not None:
        optimizer.restore(run.optimizer)
        averages, updates = run.ema, run.meta.get("ema_updates", 0)
    elif loaded is not None:
        averages, updates = loaded.ema, loaded.num_updates
    ema.restore(averages, updates)
    return ema, optimizer


def save(writer, config, step, net, ema, optimizer, ranks):
    """Hands the state after `step` to the writer: what trains, its average and AdamW's moments."""
    writer.wait()
    ranks.any_rank(False)        # nobody enters a transfer while rank 0 still waits for its disk
    weights = ((name, tensor) for name, tensor in net.state_dict().items()
               if not name.startswith(checkpoint.FROZEN))
    averages = ((checkpoint.UNET + name, tensor) for name, tensor in ema.tensors())
    moments = optimizer.tensors()
    if ranks.rank == 0:
        meta = {"step": step, "ema_updates": ema.updates, "config": asdict(config)}
        writer.save(config.out, step, weights, averages, moments, meta, config.keep,
                    config.keep_every)
    for _ in itertools.chain(averages, moments):        # the other ranks give their part
        pass


def check_finite(bad, losses, first_step, pairs, config, ranks):
    """Stops all ranks together where a loss is not finite, naming step, rank and pairs.

    bad: how many losses are not finite, over all ranks. losses: (steps, pairs a rank) of this rank,
    of the steps since `first_step`.
    """
    if not bad:
        return
    places = (~losses.isfinite()).nonzero().tolist()
    first = [i for step, i in places if step == places[0][0]]
    share = config.batch_size // ranks.world
    if places:
        step = first_step + places[0][0]
        numbers = [step * config.batch_size + ranks.rank * share + i for i in first[:NAMED_PAIRS]]
        named = ", ".join(f"pair {k}: {pairs[k]['uid']}" for k in numbers)
        more = f" and {len(first) - NAMED_PAIRS} more" if len(first) > NAMED_PAIRS else ""
        print(f"train.py: the loss of step {step} is not finite on rank {ranks.rank}, at {named}"
              f"{more}; the newest checkpoint in {config.out} is from before it", file=sys.stderr,
              flush=True)
    sys.exit(1)


@contextmanager
def averaged(net, ema, config, ranks):
    """The model with the averaged weights in place, in evaluation mode. All ranks enter and leave
    it together, whatever one of them does inside."""
    ema.swap()
    net.eval()
    try:
        # not compiled: batches of other sizes would each take minutes
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            yield net
    finally:
        net.train()
    ranks.any_rank(False)
    ema.swap()


def show(config, step, net, held_out, depth_net, log):
    """Writes a grid of held-out pairs, a row each: conditioning view | truth | sample."""
    shown = range(min(GRID_PAIRS, len(held_out)))
    batch = torch.utils.data.default_collate([held_out[k] for k in shown])
    views, image_cond, truth = scoring.views_of(net, batch, config, depth_net)
    path = log.picture(step, "grids", scoring.grid([image_cond, truth, views]))
    log.say(f"{path}: conditioning view | truth | sample, of held-out scenes")


def score(config, net, held_out, depth_net):
    """Scores the model on the held-out pairs: metrics.json, and the last lines on the screen."""
    pairs = torch.utils.data.Subset(held_out, range(min(config.eval_pairs, len(held_out))))
    rows = scoring.score(net, pairs, config, scoring.FAST, depth_net)
    means = {name: found["psnr"] for name, found in scoring.means_of(rows).items()}
    metrics = {"psnr": means, "pairs": len(pairs)}
    (Path(config.out) / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print("\n".join(scoring.report(rows)))


def options(argv):
    """(Config, steps to trace, whether to say only what would run) of the command line."""
    parser = argparse.ArgumentParser(
        "train.py", description=__doc__, allow_abbrev=False,
        usage="train.py CONFIG [--name=value ...] [--profile N] [--dry-run]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any field of Config but `sources` may follow as --name=value; configs/__init__.py "
               "says what each one means.")
    parser.add_argument("--profile", type=int, default=0, metavar="N",
                        help="write a trace of N steps to the folder of the run")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what would run and the memory it needs; the run's folder is "
                             "not touched")
    given, rest = parser.parse_known_args(argv)
    if given.profile < 0:
        raise ValueError(f"--profile {given.profile}: a number of steps is needed")
    return configs.load(rest), given.profile, given.dry_run


def main(argv):
    config, traced, dry_run = options(argv)
    ranks, device = distributed.join(distributed.device_of(config.device), config.compile)
    log = report.Log(config, ranks)
    writer = checkpoint.Writer(log.say)
    handlers = {signum: signal.getsignal(signum) for signum in STOP}
    stuck = False
    try:
        train(config, ranks, device, log, writer, traced, dry_run)
    except torch.OutOfMemoryError as err:
        stuck = True
        needs = cost.of(config, ranks, split(config, ranks.world)[0])
        raise ValueError(f"out of memory on {device}: the estimate was {needs}; lower it by "
                         f"{cost.advice(config, ranks.world)}") from err
    except RuntimeError as err:
        stuck = distributed.is_loss_of_a_rank(err)
        raise
    finally:
        writer.wait()
        log.close()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        ranks.close(stuck)
    if writer.problem:
        raise OSError(f"the end of the run could not be saved: {writer.problem}")


def train(config, ranks, device, log, writer, traced, dry_run):
    """The run, from what is in its folder to the last step or a signal to stop."""
    micro_batch, micro_steps = split(config, ranks.world)
    for name in (config.init, config.depth_weights * (config.mode == "7dof_quantile_scale")):
        if name and not dry_run and not Path(name).exists():    # found before data are indexed
            raise FileNotFoundError(f"no checkpoint {name}")
    torch.manual_seed(config.seed)      # random initial weights; nothing later draws from it
    autocast = (torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16"
                else nullcontext())

    needs = cost.of(config, ranks, micro_batch)
    log.say(report.summary(config, ranks, device, needs, micro_batch, micro_steps))
    cost.check(needs, config, ranks, device, log.say)
    if config.compile:
        kernels.check_compiler(device, "--compile=false")
    # data before the model: a wrong path is found before anything is built
    readers = [data.open_source(s, config.data, config.image_size) for s in config.sources]
    pairs = data.Pairs(readers, [s.probability for s in config.sources], config.seed,
                       config.image_size, config.mode)
    check_sources(pairs, config)
    held_out = scoring.held_out_pairs(config, max(config.eval_pairs, GRID_PAIRS), fewer=True)
    if len(held_out) < config.eval_pairs:
        log.say(f"held out are {len(held_out)} pairs, of the {config.eval_pairs} of --eval_pairs")
    if config.latent == "vae" and not config.init:
        raise ValueError("latent='vae' needs --init=FILE, a checkpoint that brings the autoencoder "
                         "and CLIP, such as zero123-xl.ckpt")
    pictures = "image_cond" in held_out[0]
    if not pictures:
        log.say("the held-out shards are encoded, so there are neither pictures nor scores")
    run = newest(config, ranks, log)
    start = run.step if run else 0
    log.say("\n".join(f"data     {reader.summary()}" for reader in readers))
    log.say(f"start    {f'step {start} of' if run else config.init or 'random weights'}"
            f"{'' if run else ', into'} {config.out}")
    if start >= config.steps:
        log.say(f"         which is not before --steps={config.steps}: there is nothing to train")
    if dry_run:
        if config.init and not run:
            checkpoint.read(config.init)        # raises what is wrong with it
        return
    Path(config.out).mkdir(parents=True, exist_ok=True)

    net = model.build(config).to(device).train()
    depth_net = scoring.load_depth(config, device)
    ema, optimizer = begin(config, net, run, ranks)
    del run         # and its mapped files: they may be removed
    if device.type == "cuda" and ranks.rank == 0:
        writer.reserve(checkpoint.step_bytes(net))
    # tries out kernels at the first step; a GPU's sums differ from run to run in any case
    torch.backends.cudnn.benchmark = device.type == "cuda"
    if config.compile:
        compile_networks(net)
        log.say("compile  the first step takes minutes, in later runs seconds")
    wrapped = ranks.wrap(net)
    passes = functools.partial(forward_backward, wrapped, autocast, micro_steps, config.drop)
    if graph.possible(config, ranks, device):
        passes = graph.Recorded(passes, net.parameters())
    peak = cost.ceiling(device, config.precision) if ranks.rank == 0 else 1.0

    asked_to_stop = []
    for signum in STOP:
        signal.signal(signum, lambda number, frame: asked_to_stop.append(number))
    batches = data.Batches(start, config.steps, config.batch_size, micro_batch, ranks.rank,
                           ranks.world)
    loader = data.loader(pairs, batches, config.workers, device, config.max_damaged, log.note)
    shape, batches = model.latent_shape(config), iter(loader)
    log.start(start, traced)
    ranks.any_rank(False)        # rank 0 may have written log.jsonl anew: from here on all write to it
    meter, done, logged, saved, stopped, norm = report.Meter(), start, start, start, False, None
    while done < config.steps and not stopped:
        for micro_step in range(micro_steps):
            with meter.waiting():
                batch = next(batches)
            stopped = ranks.any_rank(asked_to_stop)      # all ranks meet here, and stop here together
            if stopped:
                break
            numbers = batch["number"].to(device, non_blocking=True)
            draws = diffusion.draw(config.seed, numbers, shape)
            with autocast:
                given = inputs(net, batch, config, depth_net, device)
            last = micro_step == micro_steps - 1
            with nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
                loss = passes(*given, *vars(draws).values())
            meter.add(loss, draws.t)
        else:
            # departs: the reference's average moves once a micro-step, all but the last on the same
            # weights; here where ema_per asks for it
            for _ in range(micro_steps - 1 if config.ema_per == "micro_step" else 0):
                ema.update()
            norm = optimizer.step(done, ema)
            done += 1
            log.stepped()
        final = done == config.steps
        saves = done > saved and (final or stopped or done % config.save_every == 0)
        shows = pictures and not stopped and (final or done % config.sample_every == 0)
        validates = (pictures and not stopped and config.validate_every
                     and done % config.validate_every == 0)
        if done > logged and (saves or shows or validates or done % config.log_every == 0):
            numbers, losses, bad, (drawn, damaged) = meter.read(ranks, done - logged, micro_steps,
                                                                loader.counts())
            check_finite(bad, losses, logged, pairs, config, ranks)
            data.check_damage(drawn, damaged, config.max_damaged, "log.jsonl names them")
            if damaged:
                numbers["damaged"] = damaged
            if norm is not None:
                numbers["grad_norm"] = norm.item()
            if validates:
                with averaged(net, ema, config, ranks):
                    if ranks.rank == 0:
                        numbers |= scoring.validate(net, held_out, config, depth_net)
            log(done, **numbers, lr=learning_rate(done - 1, config) * config.lr,
                **report.state(config, done, numbers, needs, peak, ranks, device, readers))
            logged = done
            meter.restart()
        if saves:
            save(writer, config, done, net, ema, optimizer, ranks)
            saved = done
        if shows:
            with averaged(net, ema, config, ranks):
                if ranks.rank == 0:
                    show(config, done, net, held_out, depth_net, log)
        if saves or shows or validates:
            meter.since = time.perf_counter()       # the rate is that of training
    if stopped:
        writer.wait()
        log.say(f"stopped by signal after step {done}, {'not ' * bool(writer.problem)}saved; "
                "the same command goes on from the newest checkpoint")
    elif config.eval_pairs and pictures:
        with averaged(net, ema, config, ranks):
            if ranks.rank == 0:
                score(config, net, held_out, depth_net)
    writer.wait()
    ranks.any_rank(False)        # nobody leaves while rank 0 still writes


def tell(reason):
    """Says on standard error why the run ends, once."""
    if distributed.first_to_say(reason):
        sys.stderr.write(f"train.py: {reason}\n")      # in one piece, beside other ranks
        sys.stderr.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as err:
        tell(err)
        if isinstance(err.__cause__, torch.OutOfMemoryError):
            os._exit(2)     # the others may be waiting for this rank in a transfer
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped before the first step", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as err:
        if data.is_dead_worker(err):        # raised wherever the training thread happens to be
            tell(f"{data.DEAD_WORKER}: {str(err).splitlines()[0]}")
            sys.exit(1)
        if not distributed.is_loss_of_a_rank(err):
            raise
        tell("a rank is gone, so the others stop; the same command goes on from the newest "
             "checkpoint")
        os._exit(1)     # the other end of a transfer may never answer, also not while leaving
