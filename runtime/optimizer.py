"""What follows a backward pass: the learning rate, AdamW, and the average of the weights.

AdamW: arXiv:1711.05101. Moments and average can be divided among ranks, see ranks.Division.
"""

import math
from contextlib import contextmanager

import torch

from runtime import checkpoint, lora
from runtime.ranks import ALONE, Division

MOMENTS = "exp_avg", "exp_avg_sq"       # torch.optim.AdamW's names of them
WARMUP_START = 1e-6                     # share of the rate at step 0, the reference's


def learning_rate(step, config):
    """The share of the full rate at `step` (from 0): linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return WARMUP_START + (1 - WARMUP_START) * step / config.warmup_steps
    if config.lr_schedule == "cosine":
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return 1.0


class Ema:
    """Exponential moving average of the UNet's parameters, or of its low-rank updates where it has
    any; its decay grows from .1 to `decay`."""
    def __init__(self, unet, decay, ranks=ALONE, divided=False):
        averaged = lora.updates(unet) or dict(unet.named_parameters())
        self.division = Division({checkpoint.UNET + name: p for name, p in averaged.items()},
                                 ranks, divided)
        self.live = self.division.mine
        self.average = {name: p.detach().clone() for name, p in self.live.items()}
        self.decay, self.updates = decay, 0

    def pull(self):
        """The share of the live weights in the average that the next update makes."""
        updates = self.updates + 1
        return 1 - min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_(list(self.average.values()),
                             [self.live[name] for name in self.average], self.pull())
        self.updates += 1

    def swap(self):
        """Exchanges the average and the live weights; a second call puts them back."""
        for name, p in self.live.items():
            p.data, self.average[name] = self.average[name], p.data
        self.division.broadcast()

    @contextmanager
    def in_place(self, net):
        """The model with the averaged weights in place, in evaluation mode and not compiled: every
        other size of batch would take minutes. All ranks enter and leave it together."""
        self.swap()
        net.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            net.train()
        self.division.ranks.any_rank(False)     # whatever one of them did inside
        self.swap()

    def tensors(self):
        """Yields (checkpoint's name, average) of all parameters; all ranks go through it."""
        return self.division.gather(self.average)

    def restore(self, tensors, updates):
        """Takes this rank's part of rank 0's averages by the checkpoint's names."""
        for name, tensor in self.division.ranks.from_rank_0(tensors, self.division.parameters):
            if name in self.average:
                self.average[name].copy_(tensor)
        self.updates = updates


class Optimizer:
    """AdamW over the UNet and, at its own rate, cc_projection; decays the parameters that one
    context token leaves without a gradient, as AdamW does with a gradient of zero."""
    def __init__(self, net, config, ranks=ALONE):
        self.config, self.count = config, 0
        unet = net.model.diffusion_model
        self.idle = [] if lora.updates(unet) else list(unet.idle_parameters().values())
        self.trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.division = Division(self.trained, ranks, config.divide_optimizer)
        groups = [{"params": [p for name, p in self.division.mine.items()
                              if name.startswith(part)], "full_lr": rate}
                  for part, rate in (("model.", config.lr),
                                     (checkpoint.PROJECTION, config.lr_projection))]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps,
                                       weight_decay=config.weight_decay,
                                       fused=net.betas.device.type == "cuda")

    @torch.no_grad()
    def step(self, step, ema=None):
        """One step with the gradients at hand, whose norm it returns where they are clipped; and
        the update of the average behind it, if one is given."""
        rate, norm = learning_rate(step, self.config), None
        for p in self.trained.values():     # one token's self-attention leaves its q and k without
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["full_lr"]
        if self.config.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip)
        self.adamw.step()
        self.division.broadcast()
        for p in self.trained.values():
            p.grad = None
        if self.config.weight_decay and self.idle:
            torch._foreach_mul_(self.idle, 1 - rate * self.config.lr * self.config.weight_decay)
        self.count += 1
        if ema is not None:
            ema.update()
        return norm

    def tensors(self):
        """Yields (parameter.moment, tensor) of AdamW's state; all ranks go through it together."""
        for key in MOMENTS if self.count else ():
            kept = {name: self.adamw.state[p][key] for name, p in self.division.mine.items()}
            for name, tensor in self.division.gather(kept):
                yield f"{name}.{key}", tensor
                if key == MOMENTS[0]:
                    yield f"{name}.step", torch.tensor(float(self.count))

    def restore(self, tensors):
        """Takes this rank's part of what rank 0's `tensors` gave."""
        ranks, steps = self.division.ranks, [name for name in tensors if name.endswith(".step")]
        self.count = ranks.broadcast_object(int(tensors[steps[0]]) if steps else 0)
        for key in MOMENTS:
            like = {f"{name}.{key}": p for name, p in self.trained.items()}
            for name, tensor in ranks.from_rank_0(tensors, like):
                p = self.division.mine.get(name.removesuffix(f".{key}"))
                if p is not None:       # laid out and counted where fused AdamW expects it
                    self.adamw.state[p][key] = torch.empty_like(p).copy_(tensor)
                    self.adamw.state[p]["step"] = torch.tensor(float(self.count), device=p.device)
