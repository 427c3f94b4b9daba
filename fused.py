"""model.UNet for sampling, in about three quarters of the kernels.

A step of one view is a few hundred kernels of microseconds each, so what counts is how many there
are. A residual sum is not taken where it arises but by the kernel that reads it next, a norm, which
writes it too (norm.add_norm); the product that ends a branch adds itself to the sum in place, whose
bias the norm has already added; what a step or a view decides alone comes from tables. PyTorch does
the same where there is no Triton, in as many kernels as it needs.
Letters: `r` rows, `c` channels, `h w` latent grid, `n` = h w tokens.
"""

from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
import norm
from geglu import geglu_linear
from norm import KERNEL_TYPES, tl, triton

ROWS, PER_WARP = 4, 512         # tokens of a tile of LayerNorm; its values that 32 threads hold


# ---- a sum and its LayerNorm

if triton is not None:
    @triton.jit
    def layer_norm_kernel(x, h, row, later, weight, bias, y, tokens, n, c, eps,
                          ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        first = tl.program_id(0).to(tl.int64) * ROWS
        token, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        there = column < c
        exist, at = (first + token < tokens) & there, token * c + column
        x, h, y = x + first * c, h + first * c, y + first * c
        values = tl.load(x + at, exist, 0.0).to(tl.float32)
        if ADDED:
            values += tl.load(h + at, exist, 0.0).to(tl.float32)
            values += tl.load(row + (first + token) // n * c + column, exist, 0.0).to(tl.float32)
            more = tl.load(later + column, there, 0.0).to(tl.float32)
            tl.store(x + at, (values + more).to(x.dtype.element_ty), exist)
        mean = tl.sum(values, 1)[:, None] / c
        off = tl.where(there, values - mean, 0.0)
        rstd = 1 / tl.sqrt_rn(tl.sum(off * off, 1)[:, None] / c + eps)
        z = off * rstd * tl.load(weight + column, there, 0.0).to(tl.float32)
        z += tl.load(bias + column, there, 0.0).to(tl.float32)
        tl.store(y + at, z.to(y.dtype.element_ty), exist)


def add_layer_norm(layer, x, h=None, row=None, later=None):
    """The LayerNorm of x, or of x + h + row, in which case x becomes x + h + row + later.

    x, h: (r, n, c), contiguous; row: (r, c); later: (c,).
    """
    if norm.enabled and x.is_cuda and x.dtype in KERNEL_TYPES:
        return kernel_layer_norm(x, h, row, later, layer.weight, layer.bias, layer.eps)
    if h is None:
        return layer(x)
    total = x + h + row[:, None].to(x.dtype)
    x.copy_(total + later.to(x.dtype))
    return layer(total)


@torch.library.custom_op("zeronvs::layer_norm", mutates_args=("x",))
def kernel_layer_norm(x: Tensor, h: Optional[Tensor], row: Optional[Tensor],
                      later: Optional[Tensor], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See add_layer_norm. One node for torch.compile."""
    r, n, c = x.shape
    y, columns, added = torch.empty_like(x), triton.next_power_of_2(c), h is not None
    h, row, later = (h, row, later) if added else (x, x, x)
    layer_norm_kernel[(triton.cdiv(r * n, ROWS),)](
        x, h, row, later, weight, bias, y, r * n, n, c, eps, added, ROWS, columns,
        num_warps=norm.warps(ROWS * columns, PER_WARP))
    return y


@kernel_layer_norm.register_fake
def fake_layer_norm(x, h, row, later, weight, bias, eps):
    return torch.empty_like(x)


# ---- the network

class Block(nn.Module):
    """A model.ResBlock, and the model.SpatialTransformer after it if there is one.

    A grid is given and returned as the sum that it is: (x,), or (x, h, bias) for x + h + bias.
    """
    at_time = None          # (rows, c): the timestep's projection and the first conv's bias

    def __init__(self, block, transformer=None):
        super().__init__()
        self.block, self.norm = block, block.in_layers[0]
        self.transformer = Transformer(transformer, block) if transformer else None
        self.width = block.out_layers[3].out_channels

    def projected(self, emb):
        """The table `at_time` of time embeddings (m, e): (m, c)."""
        return self.block.emb_layers(emb) + self.block.in_layers[2].bias

    def forward(self, x, h=None, bias=None, skip=None):
        x, y = norm.add_norm(self.norm, x, h, bias, skip)
        y = F.conv2d(y, self.block.in_layers[2].weight, padding=1)
        y = self.block.out_layers[0](y, shift=self.at_time[-len(x):])
        conv = self.block.out_layers[3]
        x, y = self.block.skip_connection(x), F.conv2d(y, conv.weight, padding=1)
        return (self.transformer(x, y),) if self.transformer else (x, y, conv.bias)


class Transformer(nn.Module):
    """A model.SpatialTransformer with one context token, after the block whose sum it takes."""
    at_view = None          # (rows, c) float32: what attention to the view adds, and a bias

    def __init__(self, transformer, before):
        super().__init__()
        self.norm, self.proj_in = transformer.norm, transformer.proj_in
        self.proj_out, self.inner = transformer.proj_out, transformer.transformer_blocks[0]
        self.heads = self.inner.attn1.heads
        parts = (self.inner.attn1.to_q, self.inner.attn1.to_k, self.inner.attn1.to_v)
        after, before = self.proj_out.bias.float(), before.out_layers[3].bias.float()
        self.register_buffer("qkv", torch.cat([part.weight for part in parts]))     # (3 c, c)
        self.register_buffer("bias", before + after)
        self.register_buffer("shift", -after[None])     # it is in the sum, but not in what is read

    def projected(self, context):
        """The table `at_view` of contexts (m, 1, e): (m, c)."""
        return (self.inner.attn2(None, context)[:, 0].float()
                + self.inner.attn1.to_out[0].bias.float())

    def forward(self, x, h):
        """Grids (r, c, h, w) -> the result for x + h + the bias of the conv before."""
        inner, rows = self.inner, len(x)
        gated, last = inner.ff.net[0].proj, inner.ff.net[2]
        total, y = norm.add_norm(self.norm, x, h, self.bias, shift=self.shift.expand(rows, -1))
        tokens = self.proj_in(y.flatten(2).mT)                                  # (r, n, c)
        y = F.linear(add_layer_norm(inner.norm1, tokens), self.qkv)
        y = y.unflatten(-1, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*y.permute(2, 0, 3, 1, 4))           # (r, heads, n, d)
        y = F.linear(y.transpose(1, 2).flatten(2), inner.attn1.to_out[0].weight)
        y = add_layer_norm(inner.norm3, tokens, y, self.at_view[-rows:], last.bias)
        add_product(tokens, geglu_linear(y, gated.weight, gated.bias), last.weight)
        add_product(total.flatten(2).mT, tokens, self.proj_out.weight.flatten(1))
        return total


def add_product(x, y, weight):
    """x (r, n, c) += y (r, n, e) weight (c, e)^T, in place."""
    if x.is_contiguous():
        x.view(-1, x.shape[2]).addmm_(y.view(-1, y.shape[2]), weight.mT)
    else:                       # a grid that is not channels-last
        x += F.linear(y, weight)


class UNet(nn.Module):
    """model.UNet, whose modules it takes, for one context token; the tables of its blocks stand in
    the place of t and context."""
    def __init__(self, unet):
        super().__init__()
        self.time_embed, self.out = unet.time_embed, unet.out
        self.model_channels = unet.model_channels
        self.input_blocks = nn.ModuleList(map(taken, unet.input_blocks))
        first, transformer, second = unet.middle_block
        self.middle_block = nn.ModuleList([Block(first, transformer), Block(second)])
        self.output_blocks = nn.ModuleList(map(taken, unet.output_blocks))

    def forward(self, x, t, context):
        skips, last = [], ()
        for stage in self.input_blocks:
            x = whole(stage(x))
            skips.append(x)
        parts = (x,)
        for block in self.middle_block:
            parts = block(*parts)
        for stage in self.output_blocks:
            block, *last = stage if isinstance(stage, nn.Sequential) else (stage,)
            parts = block(*parts, skip=skips.pop())
            parts = (last[0](whole(parts)),) if last else parts
        norm_out, *_, conv = self.out
        return conv(norm.add_norm(norm_out, *parts)[1])


def taken(stage):
    """What stands for a model.Stage."""
    if not isinstance(stage[0], model.ResBlock):
        return stage[0]                                         # the first conv, or Downsample
    transformer = [layer for layer in stage if isinstance(layer, model.SpatialTransformer)]
    block = Block(stage[0], *transformer)
    return nn.Sequential(block, stage[-1]) if isinstance(stage[-1], model.Upsample) else block


def whole(parts):
    """The sum that a block has left."""
    if not isinstance(parts, tuple):
        return parts
    x, *rest = parts
    return norm.add(x, *rest, summed=False)[0] if rest else x
