"""The door of what makes the networks fast. The method (model.py, ...) does not know it.

    counts = engine.convert(net)        each module takes its fast form, in place; first of all
    engine.channels_last(net)           weights of convolutions as GPUs compute with them
    engine.compiled(net)                torch.compile the UNet and the frozen encoders
    engine.Sampler(net)                 the same views, sooner; the network can only sample then
    engine.Recorded(passes, p)          forward and backward pass as one CUDA graph
    engine.draw(seed, numbers, shape)   diffusion.py's random numbers in one kernel
"""

import subprocess

import torch

from engine import kernels
from engine.forms import convert
from engine.graph import Recorded, can_capture, capture_graph
from engine.noise import draw
from engine.sampling import Sampler

__all__ = ["Recorded", "Sampler", "can_capture", "capture_graph", "channels_last",
           "check_compiler", "compiled", "convert", "draw", "kernels"]


def channels_last(net):
    """Lays out the weights of convolutions as GPUs compute with them. Values, and so checkpoints,
    stay; to come before averages and moments, which are laid out as their parameters are."""
    for p in net.parameters():
        # 1x1 kernels lie so anyway, and their gradients come with the strides that they have
        if p.ndim == 4 and p.shape[2:].numel() > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def compiled(net):
    """Lets the first step compile the UNet of a ZeroNVS and, where they are called, the frozen
    encoders. Returns net."""
    import torch._inductor.config as inductor
    # Else every 4-D tensor is put channels-last, attention's q, k and v too, by copies
    inductor.layout_optimization = False
    net.model.diffusion_model.compile()
    for network, name in ((net.first_stage_model, "encode"),
                          (net.cond_stage_model.model, "encode_image")):
        if any(True for _ in network.parameters()):     # else there is no network
            setattr(network, name, torch.compile(getattr(network, name)))
    return net


def check_compiler(device, without):
    """Compiles a line, so that what torch.compile lacks is known at start. ValueError says what.
    without: the option that does without it."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as err:
        reason = next(iter(str(err).splitlines()), type(err).__name__)
        raise ValueError(f"torch.compile does not work here ({reason}); {without} does without it, "
                         "slower") from err
