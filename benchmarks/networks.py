"""What networks need: training steps, ranks, sampling, encoding, and the engine part by part.

A step of training is train.py's: forward, backward, AdamW and the moving average, on encoded pairs
that lie on the device (drawing, reading and sending pairs is not in it). A view is 50 steps of DDIM
with guidance 3 at 256 x 256, from an encoded photo to the decoded picture. All of full size and of
random weights. A variant's name says whose network it is and how it runs.
"""

import functools
import os
import socket
import time
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
from benchmarks.measure import (GB, ceilings, collect, device_here, finish, median_seconds, peak_gb,
                                profile, row, seconds_in_a_row)
from configs import Config, Source
from runtime import cost
from runtime import ranks as distributed
from runtime.optimizer import Ema, Optimizer
from runtime.ranks import ALONE

EMBEDDING, SIDE = 768, 256             # width of the image embedding; pixels a side of views
WARMED_UP = 1000                        # a step with the full learning rate
WARM, LEAST_STEPS, MEASURED = 3, 5, 4.0         # steps; steps; seconds
PROFILED = 3                            # steps
RUNS, SECONDS = 5, 3.0                  # a time is the median of so many, or so long
STEPS, FEW_STEPS, PROFILED_STEPS = 50, 20, 10   # of DDIM, of DPM-Solver++, of a profile
VIEWS, TINY_VIEWS = 64, 2               # encoded at once
CHECKED = 20                            # steps of `scale --check`
MIB = 2**20
TINY = {"latent": "pixels", "image_size": 32, "model_channels": 32, "channel_mult": (1, 2),
        "num_res_blocks": 1, "attention_resolutions": (1,), "num_heads": 2, "context_dim": 16,
        "norm_groups": 8}
ROOT = Path(__file__).parents[1]

# Parts of the engine: where each lies, and the rates that it is for.
PARTS = {"adamw": ("engine/adamw.py", ("train",)),
         "noise": ("engine/noise.py", ("train", "sample")),
         "norm": ("engine/norm.py", ("train", "sample", "encode")),
         "geglu": ("engine/geglu.py", ("train", "sample")),
         "conv": ("engine/conv.py", ("train", "sample")),
         "unet": ("engine/unet.py", ("sample",))}


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
        unet = peers.unet(config, channels) if peer else model.UNet(
            2 * channels, channels, config.model_channels, config.channel_mult,
            config.num_res_blocks, config.attention_resolutions, config.num_heads,
            config.context_dim, norm_groups=config.norm_groups)
        net = model.ZeroNVS(unet, autoencoder or model.Pixels(), model.NoEmbedding(), config.mode,
                            vae.SCALE_FACTOR, EMBEDDING, config.context_dim)
    for parameter in net.parameters():      # zeros draw less power, and hide what is wrong
        if not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    engine.convert(net)
    return net


class Step:
    """A whole step of training at every call, by our UNet or diffusers'.

    images: of raw pairs instead of encoded ones, so that autoencoder and CLIP are in the step.
    """
    def __init__(self, config, ranks=ALONE, peer=False, compiled=True, images=False):
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
        self.autocast = torch.autocast(self.device.type, torch.bfloat16)
        self.images = Images(config, peer) if images else None
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
        with self.autocast:
            if self.images:
                tensors = *self.images(), *tensors[4:]
            loss = self.wrapped(*tensors[:5], diffusion.Draws(*tensors[5:]), self.config.drop)
            loss.mean().backward()
        return loss.detach()

    def __call__(self, last=True):
        """The losses (b,). last: gradients are averaged over the ranks."""
        with nullcontext() if last or self.ranks.world == 1 else self.wrapped.no_sync():
            loss = self.passes(*self.tensors)
        self.optimizer.step(WARMED_UP, self.ema)
        return loss


class Images:
    """What the frozen networks make of images, at every call: mean, logvar, z_cond, embedding.

    Ours are cast by autocast, as in training; the peers' have weights in bf16.
    """
    def __init__(self, config, peer):
        device, networks = device_here(), []
        dtype = torch.bfloat16 if peer and device.type == "cuda" else torch.float32
        for ours, theirs, method in ENCODERS.values():
            with device:
                network = (theirs if peer else ours)(config.image_size < SIDE)
            engine.convert(network)
            network.to(device, dtype, memory_format=torch.channels_last)
            networks.append(network.eval().requires_grad_(False))
            setattr(self, method, torch.compile(getattr(network, method), dynamic=False))
        self.networks = networks
        shape = config.micro_batch, 3, config.image_size, config.image_size
        self.target, self.cond = torch.rand(2, *shape, device=device, dtype=dtype) * 2 - 1

    @torch.no_grad()
    def __call__(self):
        mean, logvar = self.encode(self.target)
        found = mean, logvar, self.encode(self.cond)[0], self.encode_image(self.cond)
        return [values.float() for values in found]


def measure_training(variant, batch, tiny, where="", without=()):
    """Yields pairs a second, time to the first step, peak memory; then the same as a CUDA graph."""
    engine.kernels.enabled.update(dict.fromkeys(without, False))
    device, what = device_here(), f"batch {batch}"
    torch.backends.cudnn.benchmark = device.type == "cuda"
    step = Step(config_of(tiny, batch, device=device.type), peer="diffusers" in variant,
                compiled="eager" not in variant, images="images" in variant)
    start = time.perf_counter()
    if not step().isfinite().all():
        raise ValueError(f"{variant}, {what}: the loss is not finite")
    yield row(variant, f"{what}: first step", time.perf_counter() - start, "s")
    for _ in range(WARM):
        step()
    if where:
        yield from profile(f"{variant}, {what}", step, PROFILED)
        return
    enough = (2, 0.0) if tiny else (LEAST_STEPS, MEASURED)
    yield row(variant, what, batch / seconds_in_a_row(step, *enough), "pairs/s")
    yield row(variant, f"{what}: peak memory", peak_gb(), "GB")
    if device.type == "cuda" and not without:
        torch.cuda.reset_peak_memory_stats()    # while it is recorded a graph has all that it needs
        step.passes = engine.Recorded(step.passes, step.net.parameters())
        step()
        yield row(variant, f"{what}, CUDA graph", batch / seconds_in_a_row(step, *enough),
                  "pairs/s")
        yield row(variant, f"{what}, CUDA graph: peak memory", peak_gb(), "GB")


# Seconds that a variant may take on an H200. Ours first; the peer of each is behind it.
TRAINING = {"compiled": 240, "eager": 90, "compiled, from images": 240, "diffusers, compiled": 240,
            "diffusers, eager": 90, "diffusers, compiled, from images": 300}
PEERS = {"compiled": ["diffusers, compiled"], "eager": ["diffusers, eager"],
         "compiled, from images": ["diffusers, compiled, from images"]}


def run_train(args):
    """Training steps: the first variant at every batch, then the others batch by batch."""
    if args.where:
        jobs = [(args.where, 300, measure_training, args.where, args.batch[0], args.tiny, True)]
    else:
        first, *others = args.variants
        order = [(first, batch) for batch in args.batch]
        order += [(variant, batch) for batch in args.batch for variant in others]
        jobs = [("ceilings", 60, ceilings, args.tiny)] * args.ceilings
        jobs += [(f"{variant} at batch {batch}", TRAINING[variant], measure_training, variant,
                  batch, args.tiny) for variant, batch in order]
    rows = collect(jobs, args.seconds_limit)
    work = (1 + cost.BACKWARD) * cost.of(config_of(args.tiny), ALONE, 1).flops      # of a pair
    for entry in rows:
        if entry["unit"] == "pairs/s" and "images" not in entry["variant"]:
            entry["flops"] = work * entry["value"]
    return finish(rows, PEERS)


# ---- ranks

def run_scale(args):
    """Training steps on 1 to N GPUs of one machine, as many pairs on each."""
    worlds = args.gpus or sorted({1, max(1, torch.cuda.device_count())})
    jobs = []
    for world in worlds:
        for divided in (False, True) if args.divide_optimizer and world > 1 else (False,):
            label = f"{world} GPU{'s' * (world > 1)}{', divided' * divided}"
            total = args.batch * (1 if args.strong or args.check else world)
            if total % world:
                raise ValueError(f"{total} pairs do not divide among {world} GPUs")
            jobs.append((label, 260, launch, label, world, total // world, divided, args))
    rows = collect(jobs, args.seconds_limit)
    losses = [entry.pop("losses") for entry in rows if "losses" in entry]
    for entry, found in zip(list(rows)[1:], losses[1:]):
        apart = max(abs(a - b) / b for a, b in zip(found, losses[0], strict=True))
        rows.append(row(entry["variant"], "largest relative difference of losses", apart, ""))
    return finish(rows, {entry["variant"]: ["1 GPU"] for entry in rows
                         if entry["variant"] != "1 GPU"})


def launch(label, world, batch, divided, args):
    """Yields the rows of `world` ranks, which end with this process' group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    box = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = port, label, world, batch, divided, args, box
    if world == 1:
        rank_of(0, *arguments)
    else:
        torch.multiprocessing.spawn(rank_of, arguments, world)
    while not box.empty():
        yield box.get()


def rank_of(rank, port, label, world, batch, divided, args, box):
    """One rank: puts its rows into the box if it is the first."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks, device = distributed.join(device_here(), args.compile)
    if device.type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // world))
    torch.backends.cudnn.benchmark = device.type == "cuda"
    config = config_of(args.tiny, batch, device=device.type, divide_optimizer=divided)
    step = Step(config, ranks, compiled=args.compile)
    for entry in (check if args.check else averaging)(label, step, batch, args.tiny):
        if rank == 0:
            box.put(entry)
    ranks.close()


def averaging(label, step, batch, tiny):
    """Yields speed, memory, and what the averaging of gradients costs that nothing hides: the time
    of a step less that of a step without it."""
    ranks, device, count = step.ranks, step.device, 1 if tiny else 30

    def slowest(seconds):
        seconds = torch.tensor(seconds, device=device)
        if ranks.world > 1:
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    for _ in range(WARM):
        step()
    seconds = slowest(seconds_in_a_row(step, count, 0))
    yield row(label, "all", ranks.world * batch / seconds, "pairs/s")
    yield row(label, "a GPU", batch / seconds, "pairs/s")
    yield row(label, "step", 1e3 * seconds, "ms")
    yield row(label, "peak memory a GPU", peak_gb(), "GB")
    if ranks.world == 1:
        return
    alone = slowest(seconds_in_a_row(lambda: step(last=False), count, 0))
    yield row(label, "averaging gradients, not hidden", 1e3 * (seconds - alone), "ms")
    size = sum(p.numel() for p in step.optimizer.trained.values())
    buckets = torch.zeros(size, device=device).split(distributed.BUCKET * MIB // 4)

    def send():
        for sent in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            sent.wait()
    send()
    alone = slowest(median_seconds(send, min(count, 5)))
    yield row(label, "averaging gradients, alone", 1e3 * alone, "ms")
    yield row(label, "gradients sent alone", 4 * size / alone / GB, "GB/s")


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

# What a variant samples in, and seconds that it may take on an H200.
SAMPLING = {"product": (torch.bfloat16, 150), "product, compiled": (torch.bfloat16, 240),
            "product, fp16": (torch.float16, 90), "product, plain": (torch.bfloat16, 120),
            "diffusers, compiled": (torch.bfloat16, 240),
            "diffusers, eager": (torch.bfloat16, 120)}


def measure_sampling(variant, counts, tiny, where=False, without=()):
    """Yields seconds a view at each of `counts` views at once, of the first call, and memory."""
    engine.kernels.enabled.update(dict.fromkeys(without, False))
    peer, device, fast = variant.startswith("diffusers"), device_here(), None
    torch.backends.cudnn.benchmark = device.type == "cuda"
    # CPUs are slow in half precision, where it is only a test that this runs
    dtype = SAMPLING[variant][0] if device.type == "cuda" else torch.float32
    config = config_of(tiny, **({"latent": "vae", "image_size": 64} if tiny else {}))
    ours, theirs, _ = ENCODERS["VAE"]
    with device:
        net = network(config, peer, (theirs if peer else ours)(tiny))
    net.eval().requires_grad_(False)
    for part in (net.model, net.first_stage_model):
        part.to(device, dtype, memory_format=torch.channels_last)
    shape = model.latent_shape(config)
    work = flops_a_view(net, shape)
    if variant == "diffusers, compiled":
        for part in (net.model.diffusion_model, net.first_stage_model.decoder):
            part.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
    elif variant not in ("diffusers, eager", "product, plain"):
        fast = engine.Sampler(net, compile="compiled" in variant)
    for views in counts:
        photo = torch.randn(1, *shape, device=device), torch.randn(1, EMBEDDING, device=device)
        T = torch.randn(views, net.cc_projection.in_features - EMBEDDING)
        sampled = functools.partial(diffusion.encoded_views, net, *photo, T, range(views),
                                    fast=fast)
        what = f"{views} view{'s at once' * (views > 1)}"
        if where:
            steps = 4 if tiny else PROFILED_STEPS
            sampled(steps=steps)
            yield from profile(f"{variant}, {what}, {steps} steps", lambda: sampled(steps=steps))
            continue
        yield from time_views(variant, what, views, sampled, work, STEPS, tiny)
        if fast and views == counts[0] and not without:
            few = functools.partial(sampled, sampler="dpm++")
            yield from time_views(variant, f"{what}, DPM-Solver++ {FEW_STEPS} steps", views, few,
                                  work, FEW_STEPS, tiny)


def time_views(variant, what, views, sampled, work, steps, tiny):
    """Yields seconds a view, what the first call takes, and memory."""
    def function():
        return sampled(steps=4 if tiny else steps)

    first = median_seconds(function, 1)
    if not function().isfinite().all():
        raise ValueError(f"{variant}, {what}: pictures are not finite")
    seconds = median_seconds(function, 1 if tiny else RUNS, 0 if tiny else SECONDS) / views
    unet, decoder = work
    yield row(variant, what, seconds, "s/view", flops=(2 * steps * unet + decoder) / seconds)
    yield row(variant, f"{what}: first call", first, "s")
    yield row(variant, f"{what}: peak memory", peak_gb(), "GB")


@torch.no_grad()
def flops_a_view(net, shape):
    """FLOPs of the UNet for one row, and of the decoder for one view."""
    unet, device = net.model.diffusion_model, net.betas.device
    dtype = next(unet.parameters()).dtype
    x = torch.zeros(1, 2 * shape[0], *shape[1:], dtype=dtype, device=device)
    context = torch.zeros(1, 1, net.cc_projection.out_features, dtype=dtype, device=device)
    return (cost.flops_of(lambda: unet(x, torch.zeros(1, device=device), context)),
            cost.flops_of(lambda: net.decode(torch.zeros(1, *shape, device=device))))


def run_sample(args):
    """Seconds a view, of one photo encoded before."""
    jobs = [("ceilings", 60, ceilings, args.tiny)] * args.ceilings
    jobs += [(variant, SAMPLING[variant][1], measure_sampling, variant, args.views, args.tiny,
              bool(args.where)) for variant in ([args.where] if args.where else args.variants)]
    theirs = ["diffusers, compiled", "diffusers, eager"]
    return finish(collect(jobs, args.seconds_limit),
                  {variant: theirs for variant in SAMPLING if variant.startswith("product")})


# ---- encoding

ENCODING = {"product, compiled": 120, "product, eager": 60, "peers, compiled": 150,
            "peers, eager": 60}


@torch.no_grad()
def measure_encoding(variant, batch, tiny, where=False, without=()):
    """Yields views/s of the VAE and of CLIP, of both one after the other, and memory."""
    engine.kernels.enabled.update(dict.fromkeys(without, False))
    torch.backends.cudnn.benchmark = True
    device, seconds = device_here(), []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # CPUs are slow in bf16
    side = 32 if tiny else SIDE
    for name, (ours, theirs, method) in ENCODERS.items():
        with device:
            network = (theirs if variant.startswith("peers") else ours)(tiny)
            views = torch.rand(batch, 3, side, side) * 2 - 1
        engine.convert(network)
        network.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        views = views.to(dtype=dtype, memory_format=torch.channels_last)
        encode = getattr(network, method)
        work = cost.flops_of(lambda: encode(views[:1]))
        if "compiled" in variant:
            encode = torch.compile(encode, dynamic=False)
        first = median_seconds(lambda: encode(views), 1)
        if where:
            yield from profile(f"{variant}, {name}", lambda: encode(views))
            continue
        taken = seconds_in_a_row(lambda: encode(views), *((1, 0) if tiny else (RUNS, SECONDS)))
        seconds.append(taken / batch)
        yield row(variant, name, batch / taken, "views/s", flops=batch / taken * work)
        yield row(variant, f"{name}: first call", first, "s")
        yield row(variant, f"{name}: peak memory", peak_gb(), "GB")
    if seconds:
        yield row(variant, "both", 1 / sum(seconds), "views/s")


def run_encode(args):
    """Views through the frozen encoders, in bf16."""
    jobs = [("ceilings", 60, ceilings, args.tiny)] * args.ceilings
    jobs += [(variant, ENCODING[variant], measure_encoding, variant,
              TINY_VIEWS if args.tiny else args.batch, args.tiny, bool(args.where))
             for variant in ([args.where] if args.where else args.variants)]
    return finish(collect(jobs, args.seconds_limit),
                  {"product, compiled": ["peers, compiled"], "product, eager": ["peers, eager"]})


# ---- the engine part by part

def run_engine(args):
    """Rates with and without each part of the engine, and what a hundred lines of it earn."""
    jobs = []
    for part in ("", *args.without):
        without = [part] if part else []
        label = f"without {part}" if part else "all"
        wanted = [rate for rate in args.rates if not part or rate in PARTS[part][1]]
        for batch in args.batch * ("train" in wanted):
            jobs.append((f"{label}: a compiled step of {batch}", 240, measure_training, "compiled",
                         batch, args.tiny, False, without))
        if "sample" in wanted:
            jobs.append((f"{label}: sampling", 150, measure_sampling, "product", args.views,
                         args.tiny, False, without))
        if "encode" in wanted:
            jobs.append((f"{label}: encoding", 120, measure_encoding, "product, compiled",
                         TINY_VIEWS if args.tiny else VIEWS, args.tiny, False, without))
    rates, rows = {}, []
    end = time.monotonic() + args.seconds_limit
    for label, *job in jobs:
        part = label.partition(":")[0]
        for entry in collect([(label, *job)], end - time.monotonic()):
            if entry["unit"] not in ("pairs/s", "s/view", "views/s") or "graph" in entry["what"]:
                continue
            rate = 1 / entry["value"] if entry["unit"] == "s/view" else entry["value"]
            rates[part, entry["what"]] = rate
            rows.append(row(part, entry["what"], rate, "/s"))
    for (part, what), rate in rates.items():
        if part != "all" and ("all", what) in rates:
            name = part.removeprefix("without ")
            gain = 100 * (rates["all", what] / rate - 1)
            rows.append(row(f"gain by {name}", what, gain, "%"))
            path = ROOT / PARTS[name][0]
            if path.is_file():
                lines = len(path.read_text(encoding="utf-8").splitlines())
                rows.append(row(f"gain by {name}, a hundred of {lines} lines", what,
                                100 * gain / lines, "%"))
    return finish(rows, {entry["variant"]: ["all"] for entry in rows
                         if entry["variant"].startswith("without")})
