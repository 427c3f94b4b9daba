"""A model made ready for sampling, and its views of a photo.

    render = Render(*load("out/synth", "cpu", "fp32"))
    render.start_from(photos.from_file(data, render.size, crop="0,0,256"))  # a path, or bytes
    for view in render(cameras, steps=4): ...       # a preview, image by image
    for view in render(cameras): ...                # from the same noise, in all steps

Letters: `b` batch, `n` views, `s` side of the square images in pixels.
"""

import math
import time
from pathlib import Path

import torch

import camera
import configs
import diffusion
import engine
import model
from runtime import checkpoint
from runtime.command import Progress
from runtime.log import peak_memory
from views import CONFIG, RUN, paths, pictures

NEAREST = 2             # photos that a view starts from, of several
CLIP_WIDTH = 768
MODE_OF_WIDTH = {mode.width: name for name, mode in camera.MODES.items() if mode.weights}


# ---- the model

def open_run(path, data="", config_file="", init="", needs_data=True):
    """(tensors, Config) of a checkpoint: its own network, and data that the user names.

    data, config_file, init: the command line's --data FOLDER, --config FILE and --init FILE; what a
    checkpoint's file says of other files is never opened, see configs.stored. Raises
    FileNotFoundError, or ValueError with one line, also where data are needed and nobody named any.
    """
    tensors = checkpoint.read(path, init)
    config = config_of(tensors, data, configs.load([config_file]) if config_file else None)
    if needs_data and config.sources == configs.NOWHERE:
        raise ValueError(configs.no_data(tensors.meta.get("config", {})))
    return tensors, config


def open_named(args, needs_data=True):
    """`open_run` of what a command line names by views.add_model_options."""
    if not Path(args.checkpoint).exists():
        raise FileNotFoundError(f"no checkpoint {args.checkpoint}: --checkpoint names another, and "
                                f"`python train.py {CONFIG}` makes {RUN}")
    own = args.config or CONFIG * (args.checkpoint == RUN)
    return open_run(args.checkpoint, args.data, own, args.init, needs_data)


def load(path, device, precision, init=""):
    """(ZeroNVS, Config) of a run's folder, or of a published zero123 or ZeroNVS checkpoint; `path`
    may be what `checkpoint.read` gave for it.

    The UNet has its averaged weights where the file has them; `place` says what `precision` does.
    Every weight that is used is read once, straight to the device in the precision it is used in.
    Raises FileNotFoundError or ValueError, one line, for what is no such checkpoint.
    """
    tensors = checkpoint.read(path, init)
    config = config_of(tensors)
    if precision == "auto":
        precision = "bf16" if torch.device(device).type == "cuda" else "fp32"
    if (config.latent == "vae" and "config" in tensors.meta
            and not any(name.startswith(checkpoint.FROZEN) for name in tensors)):
        raise ValueError(f"{tensors.path} holds what a run trained, without autoencoder and the "
                         "image encoder: --init FILE names the file that it started from"
                         + f" ({tensors.meta['config'].get('init')}, it says)")
    with torch.device("meta"):
        net = model.build(config)
    for name in net.state_dict().keys() & set(checkpoint.LEFTOVERS):    # nothing here uses them
        owner, _, leaf = name.rpartition(".")
        delattr(net.get_submodule(owner), leaf)
    to_precision(net, precision)
    # what is on "meta" gets memory that nobody fills before the file does
    net._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    averaged = any(name.startswith(checkpoint.EMA) for name in tensors)
    fresh = checkpoint.load_model(net, tensors, averaged).fresh
    schedule = diffusion.schedule_buffers()
    for name in fresh:
        setattr(net, name, schedule[name].to(device))
    return place(net, device, precision), config


def place(net, device, precision):
    """The ZeroNVS on its device: UNet and image decoder in `precision`, fp32, bf16 or fp16.

    Photos are encoded in fp32.
    """
    engine.convert(net)
    net.eval().requires_grad_(False).to(device)
    for part in to_precision(net, precision):
        part.to(memory_format=torch.channels_last)
    # convolutions of one view are small, and which kernel is best for them is not to be guessed
    torch.backends.cudnn.benchmark = torch.device(device).type == "cuda"
    return net


def to_precision(net, precision):
    """Turns UNet and image decoder to their precision. Returns them."""
    autoencoder = dict(net.first_stage_model.named_children())      # none, of pixels
    decoding = [autoencoder[name] for name in ("decoder", "post_quant_conv") if name in autoencoder]
    return [part.to(checkpoint.PRECISIONS[precision]) for part in (net.model, *decoding)]


def config_of(tensors, data="", named=None):
    """The Config of a checkpoint: the run's own, or that of a published file, by its pose width;
    with the files of the user's own Config `named`, or those in his folder `data`."""
    if "config" in tensors.meta:
        return configs.stored(tensors.meta["config"], data, named)
    if checkpoint.POSE not in tensors:
        raise ValueError(f"{tensors.path} is no zero123 or ZeroNVS checkpoint: it has no "
                         f"{checkpoint.POSE}")
    width = tensors.entries[checkpoint.POSE].shape[-1] - CLIP_WIDTH
    if width not in MODE_OF_WIDTH:
        theirs = " or ".join(str(CLIP_WIDTH + published) for published in MODE_OF_WIDTH)
        raise ValueError(f"{tensors.path} does not tell its configuration, and is not as zero123 "
                         f"or ZeroNVS: {checkpoint.POSE} takes {CLIP_WIDTH + width} numbers, "
                         f"theirs {theirs}")
    # a published file does not say which shards were held out: a Config of the user's has to
    own = {"mode": MODE_OF_WIDTH[width], "sources": []}
    return configs.stored(own, data if named else "", named)


def pose_vectors(mode, cond_c2w, c2w, fov, scale):
    """Pose vectors (n, d) float32 of cameras c2w (n, 4, 4), fov (n,); `scale` counts as one."""
    cond_c2w, c2w = cond_c2w.repeat(len(c2w), 1, 1), c2w.clone()
    if camera.MODES[mode].unscaled:     # so that --scale, where it is given, means the same
        cond_c2w[:, :3, 3] /= scale
        c2w[:, :3, 3] /= scale
    return camera.conditioning(mode, cond_c2w, c2w, fov, torch.full_like(fov, scale)).float()


# ---- views

class Stopped(Exception):
    """Views that nobody wants any more."""


class Mixed:
    """An engine.Sampler of views (b, ...) that start from k photos each: the noise is the sum, by
    weights (k, b), of what is predicted from each of them. Its rows are those of the first photo,
    then those of the second, ..."""
    def __init__(self, sampler, weights):
        self.sampler = sampler
        self.weights = weights.float().to(sampler.device)[:, :, None, None, None]
        self.uniform, self.decode = sampler.uniform, sampler.decode

    def guided(self, *given):
        follow, weights = self.sampler.guided(*given), self.weights
        shape = weights.shape[:2]

        def mix(z_t, t):
            return (weights * follow(z_t.repeat(shape[0], 1, 1, 1), t).unflatten(0, shape)).sum(0)
        return mix


class Render:
    """A loaded model, and a photo that its views start from.

    options   those of `diffusion.novel_views`; a call may give others for its own views
    batch     views made together, at most; same_noise: all from one noise, or each from its own
    graphs    whether CUDA graphs are recorded, which takes seconds and pays with several batches
    stopped   set while views are drawn, it raises Stopped at the next step

    Changes the model: see engine.Sampler. One call at a time, from whatever thread.
    """
    stopped = False

    def __init__(self, net, config, options=None, batch=16, same_noise=True, compile=False,
                 graphs=True):
        self.net, self.mode, self.size = net, config.mode, config.image_size
        self.options = {"sampler": config.sampler, "steps": config.sample_steps, "eta": config.eta,
                        "guidance": config.guidance, **(options or {})}
        self.batch, self.same_noise = batch, same_noise
        self.sampler = engine.Sampler(net, compile, graphs)
        self.seconds, self.views, self.evaluations = 0.0, 0, 0

    def start_from(self, photo, others=()):
        """Makes a photos.Photo what all views start from. others: (Photo, c2w (4, 4) among the
        cameras of the views) of more of them, of one field of view: a view then starts from the
        NEAREST of all, mixed by their nearness."""
        self.photo, self.photos = photo, [photo, *(other for other, _ in others)]
        self.c2w = [c2w for _, c2w in others]
        self.encoded = {}       # photo's place, share of its side: latent and embedding
        self.encode(0, 1.0)

    def encode(self, place, share):
        """(z_cond, embedding) of the middle of a photo, `share` of its side."""
        if (place, share) not in self.encoded:
            image = pictures.tensor(self.photos[place].closer(share)).to(self.net.betas.device)
            self.encoded[place, share] = self.net.encode(image)[0], self.net.embed(image)
        return self.encoded[place, share]

    def conditions(self, cameras, scale):
        """Of n views and the k photos that each starts from: places of the photos (k, n), their
        weights (k, n), pose vectors (k, n, d). `scale` is the first photo's."""
        cond_c2w = torch.stack([cameras.cond_c2w, *self.c2w])
        scales = [scale, *(scale / self.photo.scale * other.scale for other in self.photos[1:])]
        T = torch.stack([pose_vectors(self.mode, c2w, cameras.c2w, cameras.fov, its)
                         for c2w, its in zip(cond_c2w, scales)])
        near, places = paths.nearness(cond_c2w, cameras.c2w).topk(min(NEAREST, len(T)), dim=0)
        return places, near / near.sum(0), T[places, torch.arange(len(cameras))]

    def __call__(self, cameras, scale=0.0, label="views", watch=None, **options):
        """Yields the images of n paths.Cameras, in their order, a batch as soon as it is drawn.

        scale: the photo's own, unless given. label: of the bar of progress, "" has none.
        watch(first, t, z_0) sees every step of the batch that begins with view `first`, z_0
        (b, c, h, w) the clean latents that it promises; what it raises ends the call, and the next
        one is as good as the first. options: instead of the renderer's own, for example steps=4.

        Models have learnt of pairs with one field of view. A narrower view is therefore made from
        the part of the photo that has its field of view, a wider one from all of it; the scale is
        the whole photo's.
        """
        options = {**self.options, **options}
        places, weights, T = self.conditions(cameras, scale or self.photo.scale)
        shares, (k, n) = [min(share, 1.0) for share in cameras.shares()], places.shape
        # batches of one size, for which things are prepared once; the last repeats its last view
        batches = math.ceil(n / max(self.batch // k, 1))
        size = math.ceil(n / batches)
        t, _ = diffusion.plan(self.net.alphas_cumprod, options["sampler"], options["steps"],
                              options.get("spacing", "auto"))
        self.evaluations, bar = len(t), Progress(label, "steps", batches * len(t), not label)
        try:
            for first in range(0, n, size):
                rows = [min(i, n - 1) for i in range(first, first + size)]
                starts = [(place, shares[i]) for chosen in places[:, rows].tolist()
                          for place, i in zip(chosen, rows)]
                fast = Mixed(self.sampler, weights[:, rows]) if k > 1 else self.sampler
                yield from self.draw(T[:, rows].flatten(0, 1), rows, starts, fast, bar, watch,
                                     options)[:n - first]
        finally:
            bar.close()

    def draw(self, T, rows, starts, fast, bar, watch, options):
        """The images of a batch: the views of these numbers, with pose vectors T (k b, d) and
        (photo, share of its side) they start from."""
        def step(k, t, z_t, z_0):
            bar.advance()
            if self.stopped:
                raise Stopped("stopped")
            if watch is not None:
                watch(rows[0], t, z_0)

        if self.stopped:
            raise Stopped("stopped")
        started, before = time.perf_counter(), self.sampler.preparing
        z_cond, embedding = map(torch.cat, zip(*(self.encode(*start) for start in starts)))
        images = diffusion.encoded_views(
            self.net, z_cond, embedding, T, [0] * len(rows) if self.same_noise else rows,
            watch=step, fast=fast, **options)
        images = [pictures.image(image) for image in images]
        self.views += len(set(rows))
        self.seconds += time.perf_counter() - started - (self.sampler.preparing - before)
        return images

    def report(self):
        """Time, steps and memory, as one line."""
        where, options = self.net.betas.device, self.options
        line = (f"{self.seconds / self.views:.3g} s a view ({self.views} views, {self.evaluations} "
                f"steps of {options['sampler']}, guidance {options['guidance']:g}, {where})")
        if self.sampler.preparing:
            line += f", {self.sampler.preparing:.1f} s of preparation"
        return ", ".join(filter(None, [line, self.memory()]))

    def memory(self):
        """The most memory that was used so far, in words; "" where there is no such figure."""
        device = self.net.betas.device
        kind = "GPU memory" if device.type == "cuda" else "memory at most"
        peak = peak_memory(device)
        return f"{1000 * peak:,.0f} MB of {kind}" if peak else ""
