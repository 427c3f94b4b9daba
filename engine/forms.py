"""Fast forms of the method's modules: subclasses with the same parameters and another `forward`.

`convert` gives every module of a network the class of its form, in place, so that names, order,
checkpoints, averages and wrappers see nothing of it. What the forms do: GroupNorm and SiLU are one
kernel; a conv's bias is one number a channel, which the norm or the sum behind it adds as it reads;
1x1 convs are products; the autoencoder's sums are added up by the next norm (Sum).
"""

from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import vae
from engine import norm
from engine.conv import conv1x1, first_conv, product, upsample_conv, upsample_taps
from engine.geglu import geglu
from engine.norm import group_norm


def convert(net):
    """Gives the modules of a network their forms, in place; to come before compiling.

    Returns how many of each form there are: {"ResBlock": 22, ...}.
    """
    for module in net.modules():
        form = form_of(module)
        if form is not None:
            module.__class__ = form
    forms = (type(module) for module in net.modules())
    return dict(Counter(form.__name__ for form in forms if form.__module__ == __name__))


def form_of(module):
    """The form of a module, or None. A class that is not of the method, or a form, has none."""
    cls = type(module)
    if cls is nn.Sequential and len(module) > 1:
        normed = isinstance(module[0], nn.GroupNorm) and isinstance(module[1], nn.SiLU)
        return NormSequential if normed else None
    if cls is nn.Conv2d:
        patches = module.kernel_size == module.stride != (1, 1) and module.padding == (0, 0)
        return PatchConv if patches else None
    return FORMS.get(cls)


# ---- model.py

class NormSequential(nn.Sequential):
    """GroupNorm, SiLU and what follows: the first two as one, on x (b, c, h, w) + shift (b, c)."""
    def forward(self, x, shift=None):
        first, _, *layers = self
        x = group_norm(first, x, silu=True, shift=shift)
        for layer in layers:
            x = layer(x)
        return x


class ResBlock(model.ResBlock):
    """The embedding and the first conv's bias are added by the second norm."""
    def forward(self, x, emb):
        first, _, conv = self.in_layers
        h = F.conv2d(group_norm(first, x, silu=True), conv.weight, padding=1)
        h = self.out_layers(h, shift=self.emb_layers(emb) + conv.bias)
        if isinstance(self.skip_connection, nn.Conv2d):
            x = conv1x1(self.skip_connection, x)
        return x + h


class GEGLU(model.GEGLU):
    """One kernel behind the product."""
    def forward(self, x):
        return geglu(self.proj(x))


class TransformerBlock(model.TransformerBlock):
    """With one context token nobody reads norm2."""
    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(x if context.shape[1] == 1 else self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(model.SpatialTransformer):
    """Both projections are products over the tokens, and the grid is not copied."""
    def forward(self, x, context):
        tokens = conv1x1(self.proj_in, group_norm(self.norm, x).flatten(2).mT)  # (b, hw, c_inner)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + conv1x1(self.proj_out, tokens).mT.unflatten(2, x.shape[2:])  # (b, c, h, w)


class Upsample(vae.Upsample):
    """One transposed conv, whose taps are summed beforehand."""
    def forward(self, x):
        return upsample_conv(x, upsample_taps(self.conv.weight), self.conv.bias)


# ---- vae.py: between encoder's and decoder's blocks goes a Sum where the text has a grid

class Sum:
    """The grid x + h + bias (b, c, h, w), added up when it is first read, by a norm on its way. h
    (b, c, h, w) and bias (c,) may be None."""
    def __init__(self, x, h=None, bias=None):
        self.x, self.h, self.bias = x, h, bias

    def total(self):
        """The grid itself, where no norm reads it first."""
        if self.h is not None:
            self.x = self.x + self.h
        if self.bias is not None:
            self.x = self.x + self.bias.to(self.x.dtype)[:, None, None]
        self.h = self.bias = None
        return self.x

    def normed(self, layer, silu=False, skip=None, shift=None):
        """(s, y): s is the grid, and behind its channels those of skip (b, c, h, w) if there is
        one; y is the nn.GroupNorm `layer` of s plus shift (b, c), then SiLU if `silu`."""
        alone = self.h is None and self.bias is None and skip is None
        if not alone and norm.usable(self.x) and not torch.is_grad_enabled():
            s, y = norm.kernel_sum_norm(self.x, self.h, self.bias, skip, shift, layer.weight,
                                        layer.bias, layer.num_groups, layer.eps, silu)
        else:
            s = self.total() if skip is None else torch.cat([self.total(), skip], dim=1)
            y = norm.group_norm(layer, s, silu, shift)
        if skip is None:
            self.x, self.h, self.bias = s, None, None
        return s, y


class Encoder(vae.Encoder):
    def forward(self, x):
        grid = Sum(first_conv(x, self.conv_in.weight, self.conv_in.bias))
        for down in self.down:
            grid = down.downsample(down(grid))
        return self.conv_out(self.mid(grid).normed(self.norm_out, silu=True)[1])


class Decoder(vae.Decoder):
    def forward(self, z):
        grid = self.mid(Sum(self.conv_in(z)))
        for up in reversed(self.up):
            grid = up(grid)
            if isinstance(up.upsample, vae.Upsample):
                grid = Sum(up.upsample(grid.total()))
        return self.conv_out(grid.normed(self.norm_out, silu=True)[1])


class EncoderDownsample(vae.Downsample):
    """Sum -> Sum."""
    def forward(self, grid):
        x = F.pad(grid.total(), (0, 1, 0, 1))
        return Sum(F.conv2d(x, self.conv.weight, stride=2), bias=self.conv.bias)


class AutoencoderBlock(vae.ResBlock):
    """Sum -> Sum."""
    def forward(self, grid):
        x, h = grid.normed(self.norm1, silu=True)
        h = F.conv2d(h, self.conv1.weight, padding=1)
        h = group_norm(self.norm2, h, silu=True, shift=self.conv1.bias.expand(len(h), -1))
        h, bias = F.conv2d(h, self.conv2.weight, padding=1), self.conv2.bias
        if isinstance(self.nin_shortcut, nn.Conv2d):
            x, bias = F.conv2d(x, self.nin_shortcut.weight), bias + self.nin_shortcut.bias
        return Sum(x, h, bias)


class AutoencoderAttention(vae.Attention):
    """Sum -> Sum. By softmax in three operations, as no fast kernel has heads this wide."""
    def forward(self, grid):
        x, h = grid.normed(self.norm)
        q, k, v = (f(h).flatten(2).mT for f in (self.q, self.k, self.v))        # (b, hw, c)
        h = (q * q.shape[-1]**-0.5 @ k.mT).softmax(-1).to(v.dtype) @ v
        h = F.conv2d(h.mT.unflatten(2, x.shape[2:]), self.proj_out.weight)      # (b, c, h, w)
        return Sum(x, h, self.proj_out.bias)


# ---- clip.py

class PatchConv(nn.Conv2d):
    """A conv whose windows do not overlap, as a product. (b, c, h, w) -> (b, d, h/s, w/s)."""
    def forward(self, x):
        side = self.kernel_size[0]
        windows = x.unfold(2, side, side).unfold(3, side, side)                 # (b, c, g, g, s, s)
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)                  # (b, g, g, c s s)
        return product(windows, self.weight, self.bias).permute(0, 3, 1, 2)


# class of the method -> its form; NormSequential and PatchConv go by what a module holds
FORMS = {model.ResBlock: ResBlock, model.GEGLU: GEGLU, model.TransformerBlock: TransformerBlock,
         model.SpatialTransformer: SpatialTransformer, vae.Upsample: Upsample,
         vae.Encoder: Encoder, vae.Decoder: Decoder, vae.Downsample: EncoderDownsample,
         vae.ResBlock: AutoencoderBlock, vae.Attention: AutoencoderAttention}
