"""A ZeroNVS made ready for sampling: the same numbers, sooner.

With one context token the outputs of cross-attention depend on the view alone, and the timestep's
projections on the step alone: both are computed once and read from tables by the network of
unet.py. On CUDA the whole guided evaluation is recorded once as a graph and replayed for every step
and every batch of views: to launch hundreds of kernels of microseconds each would be most of it.
Letters: `b` views of a batch, `r` rows that the network sees, 2 b (unconditional rows first) or b.
"""

import time

import torch

import model
from engine import noise
from engine import unet as fused
from engine.forms import convert
from engine.graph import capture_graph


class Sampler:
    """Changes a model.ZeroNVS for good: it can only sample from now on, and not be saved.

    It is what diffusion.encoded_views takes as `fast`. compile: torch.compile the UNet and the
    decoder too, which takes a minute or two, once for each size of batch; a later run finds it in
    PyTorch's cache. graphs: record and replay, where there is CUDA.
    """
    uniform = staticmethod(noise.uniform)

    def __init__(self, net, compile=False, graphs=True):
        convert(net)
        self.net, self.unet = net, fused.UNet(net.model.diffusion_model)
        net.model.diffusion_model = self.unet
        self.device, self.dtype = net.betas.device, next(self.unet.parameters()).dtype
        self.by_time = [m for m in self.unet.modules() if isinstance(m, fused.Block)]
        self.by_view = [m for m in self.unet.modules() if isinstance(m, fused.Transformer)]
        if compile:
            self.unet.compile(dynamic=False)
            if hasattr(net.first_stage_model, "decoder"):
                net.first_stage_model.decoder.compile(dynamic=False)
        self.graphs = graphs and self.device.type == "cuda"
        self.shape, self.steps, self.decoders = None, {}, {}    # graphs by `both`, by shape
        self.times = {}             # timestep: its row of the tables of all blocks
        # graphs never run at once, so they share their memory
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self.preparing = 0.0        # seconds that warming up and recording took so far

    # ---- what does not depend on the latent

    def allocate(self, shape, context_shape):
        """The tensors that graphs read, for latents of shape (b, c, h, w)."""
        rows = 2 * shape[0]

        def blank(*shape, dtype=self.dtype):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.shape, self.steps = shape, {}
        self.z_t, self.z_cond = blank(*shape, dtype=torch.float32), blank(rows, *shape[1:])
        self.t, self.guidance = blank(rows, dtype=torch.float32), blank(dtype=torch.float32)
        self.context = blank(rows, *context_shape[1:])
        for transformer in self.by_view:
            transformer.at_view = blank(rows, len(transformer.bias))
        # all that depends on time is one tensor, so that a step copies once
        widths = [block.conv.out_channels for block in self.by_time]
        self.at_time = blank(1, sum(widths))
        for block, part in zip(self.by_time, self.at_time.split(widths, dim=1)):
            block.at_time = part

    def prepare(self, z_cond, context, t):
        """Fills the tables for a batch of views (b, c, h, w), (b, 1, e) and the timesteps t."""
        if self.shape != z_cond.shape:
            self.allocate(z_cond.shape, context.shape)
        b = len(z_cond)
        self.z_cond[b:] = z_cond            # the unconditional rows before it stay zeros
        self.context[b:] = context
        for transformer in self.by_view:
            transformer.at_view.copy_(transformer.projected(self.context))
        if list(self.times) != list(t):
            steps = model.timestep_embedding(torch.tensor(t, device=self.device),
                                             self.unet.model_channels)
            emb = self.unet.time_embed(steps.to(self.dtype))
            rows = torch.cat([block.projected(emb) for block in self.by_time], dim=1)
            self.times = dict(zip(t, rows[:, None]))

    # ---- a step

    def guided(self, z_cond, context, guidance, interval, t):
        """What `diffusion.guided` gives, for the timesteps t alone.

        On CUDA its results are one and the same tensor, overwritten by the next call.
        """
        low, high = interval
        self.prepare(z_cond, context, t)
        self.guidance.fill_(guidance)

        def follow(z_t, t):
            self.z_t.copy_(z_t)
            self.t.fill_(t)
            self.at_time.copy_(self.times[t])
            both = guidance != 1 and low <= t <= high
            if not self.graphs:
                return self.evaluate(both)
            if both not in self.steps:
                self.steps[both] = self.captured(lambda: self.evaluate(both))
            replay, eps = self.steps[both]
            replay()
            return eps

        return follow

    def evaluate(self, both):
        """The noise (b, c, h, w) float32 in the tables' latent, with guidance or without."""
        z_t, b = self.z_t.to(self.dtype), self.shape[0]
        if not both:
            return self.net.eps(z_t, self.t[b:], self.z_cond[b:], self.context[b:]).float()
        eps = self.net.eps(torch.cat([z_t, z_t]), self.t, self.z_cond, self.context).float()
        unconditional, conditional = eps.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def decode(self, z):
        """Latents (b, c, h, w) -> images; on CUDA overwritten by the next call for this shape."""
        if not self.graphs:
            return self.net.decode(z)
        if z.shape not in self.decoders:
            latent = z.clone()
            self.decoders[z.shape] = latent, *self.captured(lambda: self.net.decode(latent))
        latent, replay, image = self.decoders[z.shape]
        latent.copy_(z)
        replay()
        return image

    def captured(self, function):
        """(replay, result) of a function without arguments, see graph.capture_graph."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        captured = capture_graph(function, self.device, self.pool)
        self.preparing += time.perf_counter() - started
        return captured
