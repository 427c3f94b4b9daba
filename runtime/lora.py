"""Low-rank updates (LoRA, arXiv:2106.09685): a layer's weight is W + up @ down, and W is frozen.

`add` gives layers of the UNet their factors, under names of their own beside W's, so all other
names stay the checkpoint's. Whoever reads `weight`, the engine's forms too, reads the sum. `merged`
makes the sums of files. Letters: `d` rows of a weight, `c` its other sides together, `r` rank.
"""

import math

import torch
from torch import nn

from runtime.tensors import lazy

DOWN, UP = "lora_down", "lora_up"


def summed(weight, up, down):
    """weight (d, ...) + up (d, r) @ down (r, c), in float32."""
    return weight.float() + (up @ down).reshape(weight.shape)


class Updated:
    """A layer whose `weight` is the sum; its own part is still the parameter of that name."""
    @property
    def weight(self):
        own = self._parameters["weight"]
        with torch.autocast(own.device.type, enabled=False):
            return summed(own, self.lora_up, self.lora_down)


class Linear(Updated, nn.Linear):
    pass


class Conv2d(Updated, nn.Conv2d):
    pass


def add(net, config):
    """Freezes the UNet of a ZeroNVS but for the updates that its linear layers and 1x1 convolutions
    get, with `lora_convs` all convolutions. At first they are 0: `down` is random, `up` is not."""
    unet = net.model.diffusion_model.requires_grad_(False)
    random, idle = torch.Generator().manual_seed(config.seed), unet.idle_parameters()
    forms = {nn.Linear: Linear, nn.Conv2d: Conv2d}
    for name, layer in unet.named_modules():
        form = forms.get(type(layer))
        wide = form is Conv2d and layer.kernel_size != (1, 1)
        if form is None or wide and not config.lora_convs or f"{name}.weight" in idle:
            continue
        weight, d, c = layer.weight, len(layer.weight), layer.weight[0].numel()
        r = min(config.lora_rank, d, c)
        layer.__class__ = form
        layer.lora_down = nn.Parameter(torch.randn(r, c, generator=random).to(weight) / c**0.5)
        layer.lora_up = nn.Parameter(weight.new_zeros(d, r))


def is_update(name):
    """Whether a name of a model or of an average is that of a factor."""
    return name.endswith((DOWN, UP))


def updates(module):
    """{name: parameter} of the factors of a module."""
    return {name: p for name, p in module.named_parameters() if is_update(name)}


def merged(weights, factors, where):
    """Entries {name: lazy tensor} of weights, each with its update where `factors` have one.
    Raises ValueError, one line with `where`, for an update of no weight or another shape."""
    found = dict(weights)
    for name in factors:
        stem = name.removesuffix(DOWN).removesuffix(UP)
        parts = [weights.get(stem + "weight"), factors.get(stem + UP), factors.get(stem + DOWN)]
        weight, up, down = (tuple(part.shape) if part else () for part in parts)
        if not weight or not down or up != (weight[0], down[0]) or (
                down[1:] != (math.prod(weight[1:]),)):
            raise ValueError(f"{where}: {name} is no update of a weight {list(weight)}")
        found[stem + "weight"] = lazy(summed, *parts)
    return found
