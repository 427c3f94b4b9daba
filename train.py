"""Trains a ZeroNVS model, on one process or under torchrun. Running the same command again goes on.

    python train.py configs/synth.py
    torchrun --nproc_per_node 8 train.py configs/mix.py

What a run starts from: the newest checkpoint in its own folder, else `init`, else random weights.
Pairs, noise, timesteps and dropped conditions are functions of (seed, number of the pair), so
nothing but weights and step needs saving, and the number of ranks or micro-steps changes nothing.
"""

import itertools
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import configs
import data
import evaluate
import model

GRID_PAIRS = 8
# Fields that may change when a run goes on: they do not change what it learns from the same pairs.
FREE = {"data", "out", "steps", "device", "compile", "checkpoint_activations", "micro_batch",
        "workers", "log_every", "save_every", "keep", "keep_every", "sample_every", "eval_pairs",
        "sampler", "sample_steps", "guidance", "eta", "init", "depth_weights", "precision"}


# ---- the pieces of a step

def learning_rate(step, config):
    """The share of the full rate at `step` (from 0): linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    if config.lr_schedule == "cosine":
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    if config.cooldown_steps:
        return min(1, (config.steps - step) / config.cooldown_steps)
    return 1.0


class Ema:
    """Exponential moving average of the UNet's parameters, whose decay grows from .1 to `decay`."""
    def __init__(self, unet, decay):
        self.live = dict(unet.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.live.items()}
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchanges the average and the live weights; a second call puts them back."""
        for name, p in self.live.items():
            p.data, self.average[name] = self.average[name], p.data


class Optimizer:
    """AdamW over the UNet and, at its own rate, cc_projection; decays the parameters that one
    context token leaves without a gradient, as AdamW does with a gradient of zero."""
    def __init__(self, net, config):
        unet = net.model.diffusion_model
        self.idle = list(unet.idle_parameters().values())
        trained = [p for p in unet.parameters() if p.requires_grad]
        groups = [{"params": trained, "full_lr": config.lr},
                  {"params": list(net.cc_projection.parameters()),
                   "full_lr": config.lr_projection}]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps,
                                       weight_decay=config.weight_decay,
                                       fused=net.betas.device.type == "cuda")
        self.config, self.names = config, {p: name for name, p in net.named_parameters()}

    @torch.no_grad()
    def step(self, step):
        rate = learning_rate(step, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["full_lr"]
        if self.config.grad_clip:
            trained = [p for group in self.adamw.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.config.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad()
        if self.config.weight_decay:
            torch._foreach_mul_(self.idle, 1 - rate * self.config.lr * self.config.weight_decay)

    def tensors(self):
        """{parameter.moment: tensor} of AdamW's state."""
        return {f"{self.names[p]}.{key}": value
                for p, state in self.adamw.state.items() for key, value in state.items()}

    def restore(self, tensors):
        for p, name in self.names.items():
            state = {key: tensors[f"{name}.{key}"].clone().to(p.device)
                     for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors}
            if state:
                self.adamw.state[p] = state


def inputs(net, batch, config, depth_net, device):
    """A batch of pairs, as the loader gives it, to what `ZeroNVS.forward` takes before `draws`."""
    image_cond, image_target = (data.images(batch[name].to(device, non_blocking=True))
                                for name in ("image_cond", "image_target"))
    T = model.pose_vector({**batch, "image_cond": image_cond}, config.mode, depth_net,
                          config.quantile_blend)
    mean, logvar = net.encode(image_target)
    return mean, logvar, net.encode(image_cond)[0], net.embed(image_cond), T.to(device)


# ---- the run

class Ranks:
    """This process among the others of a run: `rank` of `world`, and the device it works on."""
    def __init__(self, config):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = evaluate.device_of(config)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, values):
        """The sum over the ranks of a tensor, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


def split(config, world):
    """(pairs a rank holds at once, micro-steps) of a step. ValueError where it does not divide."""
    if config.batch_size % world:
        near = max(world, round(config.batch_size / world) * world)
        raise ValueError(f"batch_size {config.batch_size} is not divisible by {world} ranks, "
                         f"{near} is")
    share = config.batch_size // world
    micro_steps = -(-share // config.micro_batch)
    if share % micro_steps:
        fits = max(m for m in range(1, config.micro_batch + 1) if share % m == 0)
        raise ValueError(f"batch_size {config.batch_size} on {world} ranks is {share} pairs each, "
                         f"which do not come in equal micro-batches of {config.micro_batch} or "
                         f"fewer; --micro_batch={fits} does")
    return share // micro_steps, micro_steps


def check_sources(pairs, config):
    """Reads one pair of every source, so that what cannot be trained on is refused at start."""
    for source in range(len(pairs.readers)):
        k = next(k for k in itertools.count() if pairs.draw(k)[0] == source)
        batch = torch.utils.data.default_collate([pairs[k]])
        if not config.depth_weights:
            model.pose_vector(batch, config.mode, None, config.quantile_blend)


def begin(config, net):
    """(Ema, Optimizer, step to begin with) of a run: what its newest checkpoint holds, else `init`.

    `init` is read in both cases: a run's checkpoints leave out the frozen networks.
    """
    folder = checkpoint.latest(config.out)
    run = None if folder is None else checkpoint.load_run(folder)
    if run is not None:
        saved = asdict(configs.from_dict(run.meta["config"]))
        changed = [f"{name} was {saved[name]!r}, is {new!r}" for name, new in asdict(config).items()
                   if name not in FREE and saved[name] != new]
        if changed:
            raise ValueError(f"{folder} is a run of another configuration ({'; '.join(changed)}): "
                             "give another --out, or the same configuration")
    if config.latent == "vae" and not config.init:
        raise ValueError("latent='vae' needs --init=FILE, a checkpoint that brings the autoencoder "
                         "and CLIP, such as zero123-xl.ckpt")
    # filled before anything refers to the parameters: loading may put others in their place
    loaded = checkpoint.load_model(net, config.init, finetune=True) if config.init else None
    ema, optimizer = Ema(net.model.diffusion_model, config.ema_decay), Optimizer(net, config)
    average, start = {}, 0
    with torch.no_grad():
        if run is not None:
            weights = net.state_dict()
            for name, tensor in run.model.items():
                weights[name].copy_(tensor)
            optimizer.restore(run.optimizer)
            average, ema.updates, start = run.ema, run.meta["ema_updates"], run.step
        elif loaded is not None:
            average, ema.updates = loaded.ema, loaded.num_updates
        for name, tensor in average.items():
            ema.average[name.removeprefix("model.diffusion_model.")].copy_(tensor)
    return ema, optimizer, start


def save(config, step, net, ema, optimizer):
    """Writes the checkpoint of `step`: what trains, its average and AdamW's moments."""
    frozen = ("first_stage_model.", "cond_stage_model.")
    weights = {name: t for name, t in net.state_dict().items() if not name.startswith(frozen)}
    average = {f"model.diffusion_model.{name}": t for name, t in ema.average.items()}
    meta = {"step": step, "ema_updates": ema.updates, "config": asdict(config)}
    checkpoint.save(config.out, step, weights, average, optimizer.tensors(), meta, config.keep,
                    config.keep_every)


def check_finite(losses, first_step, pairs, config, ranks):
    """Stops all ranks together where a loss is not finite, naming step, rank and pair.

    losses: (steps, pairs a rank) of this rank, of the steps since `first_step`.
    """
    if ranks.sum((~losses.isfinite()).sum().float()) == 0:
        return
    bad = (~losses.isfinite()).nonzero().tolist()
    share = config.batch_size // ranks.world
    for step, i in bad[:1]:
        k = (first_step + step) * config.batch_size + ranks.rank * share + i
        print(f"train.py: the loss of step {first_step + step} is not finite on rank {ranks.rank}, "
              f"at pair {k}: {pairs[k]['uid']}; the newest checkpoint in {config.out} is from "
              "before it", file=sys.stderr, flush=True)
    sys.exit(1)


class Log:
    """One line on the screen and one JSON object in log.jsonl, from rank 0 alone."""
    def __init__(self, config, ranks, start):
        self.main = ranks.rank == 0
        self.bar = tqdm(total=config.steps, initial=start, unit="step", disable=not self.main,
                        smoothing=0.05, dynamic_ncols=True)
        self.path = Path(config.out) / "log.jsonl"

    def __call__(self, step, **numbers):
        if not self.main:
            return
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")

    def say(self, line):
        if self.main:
            self.bar.write(line)


@contextmanager
def averaged(net, ema):
    """The model with the averaged weights in place, in evaluation mode."""
    ema.swap()
    net.eval()
    try:
        yield net
    finally:
        net.train()
        ema.swap()


def show(config, step, net, held_out, depth_net, log):
    """Writes a grid of held-out pairs, a row each: conditioning view | truth | sample."""
    batch = torch.utils.data.default_collate([held_out[k] for k in range(GRID_PAIRS)])
    views, image_cond, truth = evaluate.views_of(net, batch, config, depth_net)
    path = Path(config.out) / "grids" / f"step_{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    evaluate.grid([image_cond, truth, views]).save(path)
    log.say(f"{path}: conditioning view | truth | sample, of held-out scenes")


def score(config, net, held_out, depth_net):
    """Scores the model on the held-out pairs: metrics.json, and the last lines on the screen."""
    scores = evaluate.evaluate(net, held_out, config, depth_net)
    means = {name: row.mean().item() for name, row in scores.items()}
    metrics = {"psnr": means, "pairs": len(held_out)}
    (Path(config.out) / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print("\n".join(evaluate.report(scores)))


def main(argv):
    config = configs.load(argv)
    ranks = Ranks(config)
    device, is_main = ranks.device, ranks.rank == 0
    micro_batch, micro_steps = split(config, ranks.world)
    torch.manual_seed(config.seed)      # random initial weights; nothing later draws from it
    autocast = (torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16"
                else nullcontext())

    # data first: a wrong path is found before anything is built
    readers = [data.SourceReader(s, config.data, config.image_size) for s in config.sources]
    pairs = data.Pairs(readers, [s.probability for s in config.sources], config.seed,
                       config.image_size, config.mode)
    check_sources(pairs, config)
    held_out = evaluate.held_out_pairs(config, max(config.eval_pairs, GRID_PAIRS))
    Path(config.out).mkdir(parents=True, exist_ok=True)

    net = model.build(config).to(device).train()
    depth_net = evaluate.load_depth(config, device)
    ema, optimizer, start = begin(config, net)
    unet_size = sum(p.numel() for p in net.model.parameters())
    log = Log(config, ranks, start)
    origin = f"from step {start}" if start else config.init or "random weights"
    log.say(f"{unet_size / 1e6:.1f} M parameters, {ranks.world} x {device}, {config.batch_size} "
            f"pairs a step, {origin}")
    if config.compile:
        net.model.diffusion_model.compile()
    wrapped = net
    if ranks.world > 1:
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)

    batches = data.Batches(start, config.steps, config.batch_size, micro_batch, ranks.rank,
                           ranks.world)
    loader = iter(data.loader(pairs, batches, config.workers, device))
    asked_to_stop = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: asked_to_stop.append(number))

    shape = model.latent_shape(config)
    drop = config.drop_clip, config.drop_both, config.drop_latent
    losses, since, logged = [], time.perf_counter(), start
    for step in range(start, config.steps):
        for micro_step in range(micro_steps):
            batch = next(loader)
            numbers = batch["number"].to(device, non_blocking=True)
            last = micro_step == micro_steps - 1
            with autocast, nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
                loss = wrapped(*inputs(net, batch, config, depth_net, device),
                               model.draw(config.seed, numbers, shape), drop)
                (loss.mean() / micro_steps).backward()
            losses.append(loss.detach())
            if last or config.ema_per == "micro_step":
                if last:
                    optimizer.step(step)
                ema.update()
        done = step + 1
        saves, shows = done % config.save_every == 0, done % config.sample_every == 0
        final = done == config.steps
        if done % config.log_every == 0 or saves or shows or final:
            stop = ranks.sum(torch.tensor(float(len(asked_to_stop)), device=device)).item()
            losses = torch.cat(losses).view(done - logged, -1)
            check_finite(losses, logged, pairs, config, ranks)
            mean = ranks.sum(losses.mean()).item() / ranks.world
            rate = (done - logged) * config.batch_size / (time.perf_counter() - since)
            log(done, loss=mean, lr=learning_rate(step, config) * config.lr, pairs_per_s=rate)
            losses, since, logged = [], time.perf_counter(), done
            if is_main and (saves or final or stop):
                save(config, done, net, ema, optimizer)
            if is_main and (shows or final):
                with averaged(net, ema):
                    show(config, done, net, held_out, depth_net, log)
            since = time.perf_counter()
            if stop:
                log.say(f"stopped by signal after step {done}, saved; "
                        "the same command goes on from there")
                break
    log.bar.close()
    if is_main and config.eval_pairs and not asked_to_stop:
        with averaged(net, ema):
            score(config, net, held_out, depth_net)
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as err:
        print(f"train.py: {err}", file=sys.stderr)
        sys.exit(2)
