"""What makes the networks fast; the method does not know it."""

import torch

from engine import adamw
from engine.graph import Recorded
from engine.graph import possible as can_capture
from engine.kernels import check_compiler

__all__ = ["OnePassAdamW", "Recorded", "can_capture", "channels_last", "check_compiler", "compiled",
           "convert", "draw"]


class OnePassAdamW(adamw.OnePass):
    """Takes steps for a torch.optim.AdamW where the kernel can; `step` gives None where not."""
    def step(self, count, ema=None):
        return super().step(count, ema) if adamw.usable(self.optimizer) else None


def draw(seed, numbers, shape):
    """diffusion.draw's random numbers, sooner."""
    import diffusion        # which imports a kernel from here
    return diffusion.draw(seed, numbers, shape)


def convert(net):
    """Gives modules their fast forms, which they have here of themselves: {form: how many}."""
    return {}


def channels_last(net):
    """Lays out the weights of convolutions as GPUs compute with them. Values, and so checkpoints,
    stay; to come before averages and moments, which are laid out as their parameters are."""
    for p in net.parameters():
        # 1x1 kernels lie so anyway, and their gradients come with the strides that they have
        if p.ndim == 4 and p.shape[2:].numel() > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def compiled(net):
    """Lets the first step compile the UNet and, where they are asked, the frozen encoders."""
    import torch._inductor.config as inductor
    # Else every 4-D tensor is put channels-last, attention's q, k and v too, by copies
    inductor.layout_optimization = False
    net.model.diffusion_model.compile()
    for network, name in ((net.first_stage_model, "encode"),
                          (net.cond_stage_model.model, "encode_image")):
        if any(True for _ in network.parameters()):     # else there is no network
            setattr(network, name, torch.compile(getattr(network, name)))
