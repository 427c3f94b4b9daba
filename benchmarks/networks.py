"""What networks need: training steps, ranks, sampling, encoding, and the engine part by part.

A step of training is train.py's: forward, backward, AdamW and the moving average, on encoded pairs
that lie on the device (drawing, reading and sending pairs is not in it). A view is 50 steps of DDIM
with guidance 3 at 256 x 256, from an encoded photo to the decoded picture. All of full size and of
random weights. A variant's name says whose network it is and how it runs.
"""

import functools
import os
import socket
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import clip
import diffusion
import engine
import model
import vae
from benchmarks import peers
from benchmarks.measure import (ceiling, collect, device_here, finish, peak_gb, row, seconds_of,
                                seconds_of_one)
from configs import Config, Source
from runtime import cost
from runtime import ranks as distributed
from runtime.optimizer import Ema, Optimizer
from runtime.ranks import ALONE

EMBEDDING, SIDE = 768, 256              # width of the image embedding; pixels a side of views
WARMED_UP = 1000                        # a step with the full learning rate
WARM, IN_A_ROW = 3, 5                   # steps before the clock starts; between looks at it
SECONDS = {False: 4.0, True: 0.0}       # that a rate is measured for; of a tiny network one round
STEPS, FEW_STEPS = 50, 20               # of DDIM, of DPM-Solver++
CHECKED = 20                            # steps of `scale --check`
MIB = 2**20
TINY = {"latent": "pixels", "image_size": 32, "model_channels": 32, "channel_mult": (1, 2),
        "num_res_blocks": 1, "attention_resolutions": (1,), "num_heads": 2, "context_dim": 16,
        "norm_groups": 8}
ROOT = Path(__file__).parents[1]

# Parts of the engine, and the rates that each is for.
PARTS = {"noise": ("train", "sample"), "norm": ("train", "sample", "encode"),
         "geglu": ("train", "sample"), "conv": ("train", "sample", "encode"), "unet": ("sample",)}

# Ours, the peer's, and what encodes; each is built for `tiny`.
ENCODERS = {"VAE": (lambda tiny: vae.AutoencoderKL(*((32, (1, 2)) if tiny else ())),
                    peers.Autoencoder, "encode"),
            "CLIP": (lambda tiny: clip.CLIP(**(peers.TINY_CLIP if tiny else {})), peers.Clip,
                     "encode_image")}


# ---- a step of training

def config_of(tiny, batch=1, **changes):
    """A Config of zero123-xl's network, or of one of a few kilobytes."""
    return Config((Source("none", "encoded", "none", 1.0),), batch_size=batch, micro_batch=batch,
                  mode="7dof", **{**(TINY if tiny else {}), **changes})


def network(config, peer=False, autoencoder=None):
    """The ZeroNVS of a Config on the device, fast, with no encoders but the one given; with
    diffusers' UNet if `peer`."""
    channels = model.latent_shape(config)[0]
    with device_here():
        unet = peers.UNet(config, channels) if peer else model.UNet(
            2 * channels, channels, config.model_channels, config.channel_mult,
            config.num_res_blocks, config.attention_resolutions, config.num_heads,
            config.context_dim, norm_groups=config.norm_groups)
        net = model.ZeroNVS(unet, autoencoder or model.Pixels(), model.NoEmbedding(), config.mode,
                            vae.SCALE_FACTOR, EMBEDDING, config.context_dim)
    for parameter in net.parameters():      # zeros draw less power, and hide what is wrong
        if not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    engine.convert(net)
    return net.to(device_here())        # the schedule's tables and the pose columns too


class Step:
    """A whole step of training at every call, by our UNet or diffusers'."""
    def __init__(self, config, ranks=ALONE, peer=False, compiled=True):
        torch.manual_seed(0)
        self.net, self.device = network(config, peer).train(), device_here()
        engine.channels_last(self.net)
        unet = self.net.model.diffusion_model
        self.ema = Ema(unet, config.ema_decay, ranks, config.divide_optimizer)
        self.optimizer = Optimizer(self.net, config, ranks)
        if compiled and peer:
            unet.compile()      # with the layouts that the compiler chooses
        elif compiled:
            engine.compiled(self.net)
        self.config, self.ranks, self.wrapped = config, ranks, ranks.wrap(self.net)
        self.passes = self.forward_backward
        self.use(self.pairs(config.micro_batch), torch.arange(config.micro_batch))

    def pairs(self, count):
        """Encoded pairs: mean, logvar, z_cond, embedding, T."""
        mean, z_cond = torch.randn(2, count, *model.latent_shape(self.config), device=self.device)
        return (mean, torch.full_like(mean, vae.LOGVAR_MIN), z_cond,
                torch.randn(count, EMBEDDING, device=self.device),
                torch.randn(count, self.net.cc_projection.in_features - EMBEDDING,
                            device=self.device))

    def use(self, pairs, numbers):
        """Trains on these pairs from now on, of these numbers."""
        draws = diffusion.draw(0, numbers.to(self.device), model.latent_shape(self.config))
        self.tensors = *pairs, *vars(draws).values()

    def forward_backward(self, *tensors):
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.wrapped(*tensors[:5], diffusion.Draws(*tensors[5:]), self.config.drop)
            loss.mean().backward()
        return loss.detach()

    def __call__(self, last=True):
        """The losses (b,). last: gradients are averaged over the ranks."""
        with nullcontext() if last or self.ranks.world == 1 else self.wrapped.no_sync():
            loss = self.passes(*self.tensors)
        self.optimizer.step(WARMED_UP, self.ema)
        return loss


def measure_training(variant, batch, tiny, without=()):
    """Yields pairs a second, time to the first step, peak memory; then the same as a CUDA graph."""
    leave_out(without)
    device, what = device_here(), f"batch {batch}"
    step = Step(config_of(tiny, batch, device=device.type), peer="diffusers" in variant,
                compiled="eager" not in variant)
    first = seconds_of_one(step)
    if not step().isfinite().all():
        raise ValueError(f"{variant}, {what}: the loss is not finite")
    variant += names_of(without)

    def rate(what):
        for _ in range(WARM):
            step()
        yield row(variant, what, batch / seconds_of(step, SECONDS[tiny], IN_A_ROW), "pairs/s")
        yield row(variant, f"{what}: peak memory", peak_gb(), "GB")

    yield row(variant, f"{what}: first step", first, "s")
    yield from rate(what)
    if device.type == "cuda" and not without:
        torch.cuda.reset_peak_memory_stats()    # while it is recorded a graph has all that it needs
        step.passes = engine.Recorded(step.passes, step.net.parameters())
        yield from rate(f"{what}, CUDA graph")


def leave_out(parts):
    """Begins a measurement, by PyTorch's operations in place of these parts of the engine."""
    engine.kernels.enabled.update(dict.fromkeys(parts, False))
    torch.backends.cudnn.benchmark = torch.cuda.is_available()


def names_of(parts):
    return "".join(f" without {part}" for part in parts)


def rows_of(args, measure, *sizes):
    """The rows of `measure` for --variants, at one size after the other, behind the ceiling's."""
    return collect([("ceiling", ceiling, args.tiny)] * args.ceilings
                   + [(variant, measure, variant, size, args.tiny)
                      for size in sizes for variant in args.variants], args.seconds_limit)


def run_train(args):
    """Training steps, at one batch after the other."""
    rows = rows_of(args, measure_training, *args.batch)
    work = (1 + cost.BACKWARD) * cost.of(config_of(args.tiny), ALONE, 1).flops      # of a pair
    for entry in rows:
        if entry["unit"] == "pairs/s":
            entry["flops"] = work * entry["value"]
    return finish(rows, {entry["variant"]: [f"diffusers, {entry['variant']}"] for entry in rows})


# ---- ranks

def run_scale(args):
    """Training steps on 1 to N GPUs of one machine: --batch pairs on each, or in all to --check."""
    worlds, jobs = args.gpus or sorted({1, max(1, torch.cuda.device_count())}), []
    for world in worlds:
        if args.check and args.batch % world:
            raise ValueError(f"{args.batch} pairs do not divide among {world} GPUs")
        batch = args.batch // world if args.check else args.batch
        for divided in (False, True) if args.divide_optimizer and world > 1 else (False,):
            label = f"{world} GPU{'s' * (world > 1)}{', divided' * divided}"
            jobs.append((label, launch, label, world, batch, divided, args))
    rows = collect(jobs, args.seconds_limit)
    checked = [entry for entry in rows if "losses" in entry]
    for entry in checked[1:]:
        apart = max(abs(a - b) / b for a, b in zip(entry["losses"], checked[0]["losses"]))
        rows.append(row(entry["variant"], "largest relative difference of losses", apart, ""))
    return finish(rows, {label: ["1 GPU"] for label, *_ in jobs if label != "1 GPU"})


def launch(label, world, batch, divided, args):
    """Yields the rows of `world` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]),
                          WORLD_SIZE=str(world))
    box = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = label, world, batch, divided, args, box
    if world == 1:
        rank_of(0, *arguments)
    else:
        torch.multiprocessing.spawn(rank_of, arguments, world)
    while not box.empty():
        yield box.get()


def rank_of(rank, label, world, batch, divided, args, box):
    """One rank: puts its rows into the box if it is the first."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    ranks, device = distributed.join(device_here(), not args.tiny)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    config = config_of(args.tiny, batch, device=device.type, divide_optimizer=divided)
    step = Step(config, ranks, compiled=not args.tiny)
    for entry in (check if args.check else averaging)(label, step, batch, args.tiny):
        if rank == 0:
            box.put(entry)
    ranks.close()


def averaging(label, step, batch, tiny):
    """Yields speed, memory, and what the averaging of gradients costs that nothing hides: the time
    of a step less that of a step without it; and what it takes alone."""
    ranks, count = step.ranks, 1 if tiny else 30

    def slowest(function):
        """Seconds of a call by the slowest rank. All make as many calls, or one would wait."""
        seconds = torch.tensor(seconds_of(function, 0, count), device=step.device)
        if ranks.world > 1:
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    for _ in range(WARM):
        step()
    seconds = slowest(step)
    yield row(label, "all", ranks.world * batch / seconds, "pairs/s")
    yield row(label, "a GPU", batch / seconds, "pairs/s")
    yield row(label, "peak memory a GPU", peak_gb(), "GB")
    if ranks.world == 1:
        return
    alone = slowest(lambda: step(last=False))
    yield row(label, "averaging gradients, not hidden", 1e3 * (seconds - alone), "ms")
    size = sum(p.numel() for p in step.optimizer.trained.values())
    buckets = torch.zeros(size, device=step.device).split(distributed.BUCKET * MIB // 4)
    alone = slowest(lambda: [dist.all_reduce(bucket) for bucket in buckets])
    yield row(label, "averaging gradients, alone", 1e3 * alone, "ms")


def check(label, step, batch, tiny):
    """Yields the losses of steps of the same pairs and draws, however many ranks share them."""
    ranks, losses = step.ranks, []
    torch.manual_seed(1)
    total, first = ranks.world * batch, ranks.rank * batch
    mine = [values[first:first + batch] for values in step.pairs(total)]
    for number in range(4 if tiny else CHECKED):
        step.use(mine, number * total + torch.arange(first, first + batch))
        losses.append(ranks.all_reduce(step().sum() / total).item())
    yield row(label, f"loss after {len(losses)} steps", losses[-1], "", losses=losses)


# ---- sampling

def measure_sampling(variant, counts, tiny, without=()):
    """Yields seconds a view at each of `counts` views at once, of the first call, and memory."""
    leave_out(without)
    peer, device, fast = variant.startswith("diffusers"), device_here(), None
    # CPUs are slow in half precision
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = config_of(tiny, **({"latent": "vae", "image_size": 64} if tiny else {}))
    net = network(config, peer, encoder("VAE", peer, tiny, dtype)[0]).eval().requires_grad_(False)
    net.model.to(dtype=dtype, memory_format=torch.channels_last)
    shape, steps = model.latent_shape(config), 4 if tiny else STEPS
    with torch.no_grad():
        work = (2 * steps * cost.of(config, ALONE, 1).flops
                + cost.flops_of(lambda: net.decode(torch.zeros(1, *shape, device=device))))
    if variant == "diffusers, compiled":
        for part in (net.model.diffusion_model, net.first_stage_model.decoder):
            part.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
    elif not peer and "plain" not in variant:
        fast = engine.Sampler(net, compile="compiled" in variant)
    variant += names_of(without)
    photo = torch.randn(1, *shape, device=device), torch.randn(1, EMBEDDING, device=device)

    def time_views(what, function, work):
        first = seconds_of_one(function)
        if not function().isfinite().all():
            raise ValueError(f"{variant}, {what}: pictures are not finite")
        seconds = seconds_of(function, SECONDS[tiny]) / views
        yield row(variant, what, seconds, "s/view", flops=work / seconds)
        yield row(variant, f"{what}: first call", first, "s")
        yield row(variant, f"{what}: peak memory", peak_gb(), "GB")

    for views in counts:
        T = torch.randn(views, net.cc_projection.in_features - EMBEDDING)
        sampled = functools.partial(diffusion.encoded_views, net, *photo, T, range(views),
                                    fast=fast)
        what = f"{views} view{'s at once' * (views > 1)}"
        yield from time_views(what, functools.partial(sampled, steps=steps), work)
        if fast and views == counts[0] and not without:
            few = min(steps, FEW_STEPS)
            yield from time_views(f"{what}, DPM-Solver++ {few} steps",
                                  functools.partial(sampled, sampler="dpm++", steps=few), 0)


def run_sample(args):
    """Seconds a view, of one photo encoded before."""
    rows = rows_of(args, measure_sampling, args.views)
    return finish(rows, {variant: ["diffusers, compiled", "diffusers, eager"]
                         for variant in args.variants if variant.startswith("product")})


# ---- encoding

def encoder(name, peer, tiny, dtype):
    """(a frozen network of ENCODERS on the device, ours or the peer's; its method that encodes)."""
    ours, theirs, method = ENCODERS[name]
    with device_here():
        net = (theirs if peer else ours)(tiny)
    engine.convert(net)
    net.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    return net, getattr(net, method)


@torch.no_grad()
def measure_encoding(variant, batch, tiny, without=()):
    """Yields views/s of the VAE and of CLIP, of both one after the other, and memory."""
    leave_out(without)
    seconds, side = [], 32 if tiny else SIDE
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # CPUs are slow in bf16
    views = (torch.rand(batch, 3, side, side, device=device_here()) * 2 - 1).to(
        dtype=dtype, memory_format=torch.channels_last)
    how = variant + names_of(without)
    for name in ENCODERS:
        encode = encoder(name, variant.startswith("peers"), tiny, dtype)[1]
        work = cost.flops_of(lambda: encode(views[:1]))
        if "compiled" in variant:
            encode = torch.compile(encode, dynamic=False)
        function = functools.partial(encode, views)
        first = seconds_of_one(function)
        seconds.append(seconds_of(function, SECONDS[tiny], IN_A_ROW) / batch)
        yield row(how, name, 1 / seconds[-1], "views/s", flops=work / seconds[-1])
        yield row(how, f"{name}: first call", first, "s")
        yield row(how, f"{name}: peak memory", peak_gb(), "GB")
    yield row(how, "both", 1 / sum(seconds), "views/s")


def run_encode(args):
    """Views through the frozen encoders, in bf16."""
    rows = rows_of(args, measure_encoding, args.batch)
    return finish(rows, {variant: [variant.replace("product", "peers")]
                         for variant in args.variants if variant.startswith("product")})


# ---- the engine part by part

def run_engine(args):
    """Rates with and without each part of the engine, and what a hundred lines of it earn."""
    jobs, peer_of = [], {}
    for part in ("", *args.without):
        more = args.tiny, [part] if part else []
        for rate, variant, measure, sizes in (
                ("train", "compiled", measure_training, args.batch),
                ("sample", "product", measure_sampling, [args.views]),
                ("encode", "product, compiled", measure_encoding, [2 if args.tiny else 64])):
            if rate in args.rates and (not part or rate in PARTS[part]):
                jobs += [(f"{rate}{names_of(more[1])}", measure, variant, size, *more)
                         for size in sizes]
                peer_of[variant + names_of(more[1])] = [variant] * bool(part)
    rows = finish(collect(jobs, args.seconds_limit), peer_of)
    for entry in [entry for entry in rows if entry["unit"] in ("pairs/s", "s/view", "views/s")]:
        part = entry["variant"].partition(" without ")[2]
        if part and "ratio" in entry:
            slower = entry["ratio"] if entry["unit"] == "s/view" else 1 / entry["ratio"]
            lines = (ROOT / "engine" / f"{part}.py").read_text(encoding="utf-8").count("\n")
            rows += [row(f"gain by {part}", entry["what"], 100 * (slower - 1), "%"),
                     row(f"gain by {part}, a hundred of its {lines} lines", entry["what"],
                         100 * (slower - 1) * 100 / lines, "%")]
    return rows
