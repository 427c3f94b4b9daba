"""A model made ready for sampling, and its views of a photo.

Letters: `b` batch, `n` views, `s` side of the square images in pixels.
"""

import math
import sys
import time

import torch
from tqdm import tqdm

import diffusion
import camera
from runtime import checkpoint
import configs
import model
from views import pictures
import engine
from diffusion import encoded_views

CLIP_WIDTH = 768
MODE_OF_WIDTH = {mode.width: name for name, mode in camera.MODES.items() if mode.weights}
MEGABYTE = 2**20


# ---- the model

def load(path, device, precision):
    """(ZeroNVS, Config) of a run's folder, or of a published zero123 or ZeroNVS checkpoint; `path`
    may be what checkpoint.read gave for it.

    The UNet has its averaged weights where the file has them; `place` says what `precision` does.
    Raises FileNotFoundError or ValueError, one line, for what is no such checkpoint.
    """
    tensors = checkpoint.read(path)
    config = config_of(tensors)
    ema = any(name.startswith(checkpoint.EMA) for name in tensors)
    frozen = any(name.startswith("first_stage_model.") for name in tensors)
    if config.latent == "vae" and "config" in tensors.meta and not frozen:
        # a run saves what it trains; the frozen networks are those of the file it started from
        if not config.init:
            raise ValueError(f"{tensors.path} has no autoencoder, and its run names no init that "
                             "has one")
        net = model.build(config)
        checkpoint.load_model(net, config.init, finetune=True)
        stored = {name: checkpoint.ema_name(name) for name in net.state_dict()}
        net.load_state_dict({name: tensors[average if average in tensors else name]
                             for name, average in stored.items()
                             if name in tensors or average in tensors}, strict=False)
    else:
        with torch.device("meta"):
            net = model.build(config)
        fresh = checkpoint.load_model(net, tensors, ema=ema).fresh
        schedule = diffusion.schedule_buffers()
        for name in fresh:
            setattr(net, name, schedule[name])
    return place(net, device, precision), config


def place(net, device, precision):
    """The ZeroNVS on its device: UNet and image decoder in `precision`, fp32, bf16 or fp16.

    Photos are encoded in fp32. No more than what stays there is on the device at any time.
    """
    engine.convert(net)
    net.eval().requires_grad_(False)
    autoencoder = dict(net.first_stage_model.named_children())      # none, of pixels
    decoding = [autoencoder[name] for name in ("decoder", "post_quant_conv") if name in autoencoder]
    for part in (net.model, *decoding):
        part.to(device, checkpoint.PRECISIONS[precision], memory_format=torch.channels_last)
    net.to(device)
    # convolutions of one view are small, and which kernel is best for them is not to be guessed
    torch.backends.cudnn.benchmark = torch.device(device).type == "cuda"
    return net


def config_of(tensors):
    """The Config of a checkpoint: the run's own, or that of a published file, by its pose width."""
    if "config" in tensors.meta:
        return configs.from_dict(tensors.meta["config"])
    if checkpoint.POSE not in tensors:
        raise ValueError(f"{tensors.path} is no zero123 or ZeroNVS checkpoint: it has no "
                         f"{checkpoint.POSE}")
    given = tensors.entries[checkpoint.POSE].shape[-1] - CLIP_WIDTH
    if given not in MODE_OF_WIDTH:
        theirs = " or ".join(str(CLIP_WIDTH + width) for width in MODE_OF_WIDTH)
        raise ValueError(f"{tensors.path} does not tell its configuration, and is not as zero123 "
                         f"or ZeroNVS: {checkpoint.POSE} takes {CLIP_WIDTH + given} numbers, "
                         f"theirs {theirs}")
    nowhere = configs.Source("none", "co3d", "none", 1.0)
    return configs.Config(sources=(nowhere,), mode=MODE_OF_WIDTH[given])


def pose_vectors(mode, cond_c2w, c2w, fov, scale):
    """Pose vectors (n, d) float32 of cameras c2w (n, 4, 4), fov (n,); `scale` counts as one."""
    cond_c2w, c2w = cond_c2w.repeat(len(c2w), 1, 1), c2w.clone()
    if camera.MODES[mode].unscaled:     # so that --scale, where it is given, means the same everywhere
        cond_c2w[:, :3, 3] /= scale
        c2w[:, :3, 3] /= scale
    return camera.conditioning(mode, cond_c2w, c2w, fov, torch.full_like(fov, scale)).float()


# ---- views

class Render:
    """Views of a Photo by one model, `batch` at a time; `options` are those of `encoded_views`.

    Changes the model: see engine.Sampler.
    """
    def __init__(self, net, mode, photo, options, batch, same_noise, compile=False):
        self.net, self.mode, self.photo, self.options = net, mode, photo, options
        self.batch, self.same_noise, self.fast = batch, same_noise, engine.Sampler(net, compile)
        self.seconds, self.views, self.evaluations = 0.0, 0, 0
        self.encoded = {}           # share of the photo's side: its latent and embedding
        self.encode(1.0)

    def encode(self, share):
        """(z_cond, embedding) of the middle of the photo, `share` of its side."""
        if share not in self.encoded:
            image = pictures.tensor(self.photo.closer(share)).to(self.net.betas.device)
            self.encoded[share] = self.net.encode(image)[0], self.net.embed(image)
        return self.encoded[share]

    def __call__(self, cameras, scale, label, keep):
        """Images of n paths.Cameras. keep: a list that gets (t, z_0) after every step of the view
        in the middle of the path, z_0 the clean latent that it promises.

        Models have learnt of pairs with one field of view. A narrower view is therefore made from
        the part of the photo that has its field of view, a wider one from all of it; the scale is
        the whole photo's.
        """
        T = pose_vectors(self.mode, cameras.cond_c2w, cameras.c2w, cameras.fov, scale)
        shares = [min(share, 1.0) for share in cameras.shares()]
        n, views, started = len(T), [], time.perf_counter()
        before = self.fast.preparing
        # batches of one size, for which things are prepared once; the last repeats its last view
        size = math.ceil(n / math.ceil(n / self.batch))
        with tqdm(total=n, unit="view", desc=label, leave=False) as bar:
            for start in range(0, n, size):
                rows = [min(i, n - 1) for i in range(start, start + size)]
                numbers = [0] * size if self.same_noise else rows
                done = []

                def watch(k, t, z_t, z_0):
                    done.append(t)
                    bar.set_postfix_str(f"step {len(done)} of {self.options['steps']}")
                    if n // 2 in rows:
                        keep.append((t, z_0[n // 2 - start, None]))

                z_cond, embedding = map(torch.cat, zip(*(self.encode(shares[i]) for i in rows)))
                images = encoded_views(self.net, z_cond, embedding, T[rows], numbers, watch=watch,
                                       fast=self.fast, **self.options)
                views += [pictures.image(image) for image in images[:n - start]]
                bar.update(min(size, n - start))
                self.evaluations = len(done)
        self.seconds += time.perf_counter() - started - (self.fast.preparing - before)
        self.views += n
        return views

    def report(self):
        """Time, steps and memory, as one line."""
        where = self.net.betas.device
        options = self.options
        line = (f"{self.seconds / self.views:.3g} s a view ({self.views} views, {self.evaluations} "
                f"steps of {options['sampler']}, guidance {options['guidance']:g}, {where})")
        if self.fast.preparing:
            line += f", {self.fast.preparing:.1f} s of preparation"
        if where.type == "cuda":
            return line + f", {torch.cuda.max_memory_allocated() / MEGABYTE:,.0f} MB of GPU memory"
        try:
            import resource
        except ImportError:         # Windows has no such figure
            return line
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return line + f", {peak / MEGABYTE:,.0f} MB of memory at most"
