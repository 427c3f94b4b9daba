"""What makes the networks fast; the method does not know it."""

import torch

from engine import kernels
from engine.graph import Recorded

__all__ = ["Recorded", "Sampler", "channels_last", "compiled", "convert", "kernels"]


def convert(net):
    """Nothing yet: the networks are built of their fast forms."""


def Sampler(net, compile=False):
    from engine.sampling import Fast
    return Fast(net, compile)


def channels_last(net):
    """Lays out the weights of convolutions as GPUs compute with them."""
    for p in net.parameters():
        if p.ndim == 4 and p.shape[2:].numel() > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def compiled(net):
    """Lets the first step compile the UNet and, where they are asked, the frozen encoders."""
    import torch._inductor.config as inductor
    inductor.layout_optimization = False
    net.model.diffusion_model.compile()
    for network, name in ((net.first_stage_model, "encode"),
                          (net.cond_stage_model.model, "encode_image")):
        if any(True for _ in network.parameters()):
            setattr(network, name, torch.compile(getattr(network, name)))
