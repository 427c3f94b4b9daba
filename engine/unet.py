"""model.UNet for sampling, in about two thirds of the kernels.

A step of one view is a few hundred kernels of microseconds each, so what counts is how many there
are. A residual sum is added up by the kernel that reads it next, a norm's (forms.Sum), and biases of
convs wait for that sum; the last two products of a transformer are one, which adds itself to the
sum in place; what the step or the view decides alone comes from tables. Where there is no Triton,
PyTorch computes the same in as many kernels as it needs.
Letters: `r` rows, `c` channels, `h w` latent grid, `n` = h w tokens.
"""

import functools
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from engine import kernels
from engine.conv import conv1x1, conv3x3, few_positions, upsample_conv, upsample_taps
from engine.forms import Sum
from engine.geglu import geglu_into
from engine.kernels import launch_early, tl, triton, wait_for_previous
from engine.norm import group_norm

# Tokens of a tile of LayerNorm; its values that 32 threads hold, of few tokens and of many
ROWS, PER_WARP, MANY = 2, (512, 1024), 4096


# ---- a sum and its LayerNorm

if triton is not None:
    @triton.jit
    def layer_norm_kernel(x, h, row, s, weight, bias, y, tokens, n, c, stride, eps,
                          ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        wait_for_previous()
        first = tl.program_id(0).to(tl.int64) * ROWS
        token, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        there = column < c
        exist, at = (first + token < tokens) & there, token * c + column
        values = tl.load(x + first * c + at, exist, 0.0).to(tl.float32)
        if h is not None:
            values += tl.load(h + first * c + at, exist, 0.0).to(tl.float32)
            values += tl.load(row + (first + token) // n * c + column, exist, 0.0).to(tl.float32)
            tl.store(s + first * stride + token * stride + column,
                     values.to(s.dtype.element_ty), exist)
        mean = tl.sum(values, 1)[:, None] / c
        off = tl.where(there, values - mean, 0.0)
        rstd = 1 / tl.sqrt_rn(tl.sum(off * off, 1)[:, None] / c + eps)
        z = off * rstd * tl.load(weight + column, there, 0.0).to(tl.float32)
        z += tl.load(bias + column, there, 0.0).to(tl.float32)
        tl.store(y + first * c + at, z.to(y.dtype.element_ty), exist)


def layer_norm(layer, x, h=None, row=None, s=None):
    """The LayerNorm of x, or of x + h + row, which is written to s.

    x, h: (r, n, c), contiguous; row: (r, c); s: (r, n, c), whose rows may be parts of longer ones.
    """
    if kernels.usable("unet", x):
        return kernel_layer_norm(x, h, row, s, layer.weight, layer.bias, layer.eps)
    if h is not None:
        x = s.copy_(x + h + row[:, None].to(x.dtype))
    return layer(x)


@torch.library.custom_op("zeronvs::layer_norm", mutates_args=("s",))
def kernel_layer_norm(x: Tensor, h: Optional[Tensor], row: Optional[Tensor], s: Optional[Tensor],
                      weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See layer_norm. One node for torch.compile."""
    r, n, c = x.shape
    y, columns = torch.empty_like(x), kernels.power_of_2(c)
    layer_norm_kernel[(triton.cdiv(r * n, ROWS),)](
        x, h, row, s, weight, bias, y, r * n, n, c, 0 if s is None else s.stride(1), eps, ROWS,
        columns, num_warps=kernels.warps(ROWS * columns, PER_WARP[r * n > MANY]), **launch_early())
    return y


@kernel_layer_norm.register_fake
def fake_layer_norm(x, h, row, s, weight, bias, eps):
    return torch.empty_like(x)


# ---- the network

class Conv(nn.Module):
    """A 3x3 conv between blocks: the first one, or that of a model.Downsample."""
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, grid):
        return Sum(conv3x3(grid.total(), self.conv.weight, self.conv.stride[0]),
                   bias=self.conv.bias)


class Upsample(nn.Module):
    """A vae.Upsample."""
    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("taps", upsample_taps(conv.weight.detach()))

    def forward(self, grid):
        x = grid.total()
        # of few positions, reading weights is what takes time: 9 taps are fewer than the 16 summed
        if few_positions(len(x), 2 * x.shape[2], 2 * x.shape[3]):
            return Sum(conv3x3(F.interpolate(x, scale_factor=2), self.weight), bias=self.bias)
        return Sum(upsample_conv(x, self.taps), bias=self.bias)


class Block(nn.Module):
    """A model.ResBlock, and the model.SpatialTransformer after it if there is one."""
    at_time = None          # (1, c): the timestep's projection and the first conv's bias

    def __init__(self, block, transformer=None):
        super().__init__()
        self.norm, _, self.conv = block.in_layers
        self.norm_out, *_, self.conv_out = block.out_layers
        self.emb_layers, self.skip_connection = block.emb_layers, block.skip_connection
        self.transformer = Transformer(transformer, self.conv_out) if transformer else None

    def projected(self, emb):
        """The table of which `at_time` is a row, of time embeddings (m, e): (m, c)."""
        return self.emb_layers(emb) + self.conv.bias

    def forward(self, grid, skip=None):
        x, y = grid.normed(self.norm, silu=True, skip=skip)
        y, x = in_parallel(lambda: conv3x3(y, self.conv.weight), self.skip_connection, x)
        y = group_norm(self.norm_out, y, silu=True, shift=self.at_time.expand(len(x), -1))
        y = conv3x3(y, self.conv_out.weight)
        return Sum(self.transformer(x, y)) if self.transformer else Sum(x, y, self.conv_out.bias)


def in_parallel(work, skip_connection, x):
    """(work(), skip_connection(x)); on a GPU at the same time, as one alone does not fill it."""
    if isinstance(skip_connection, nn.Identity):
        return work(), x
    if not x.is_cuda or torch.compiler.is_compiling():
        return work(), conv1x1(skip_connection, x)
    here, there = torch.cuda.current_stream(x.device), second_stream(x.device)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        skip = conv1x1(skip_connection, x)
    done = work()
    here.wait_stream(there)
    return done, skip


@functools.cache
def second_stream(device):
    return torch.cuda.Stream(device)


class Transformer(nn.Module):
    """A model.SpatialTransformer with one context token, and the sum before it.

    attn1's q, k, v are one product; attn2 is a table; proj_out(tokens + ff(y)) is one product.
    """
    at_view = None          # (rows, c): what attention to the view adds, and a bias

    @torch.no_grad()
    def __init__(self, transformer, conv_before):
        super().__init__()
        inner, out = transformer.transformer_blocks[0], transformer.proj_out
        self.norm, self.proj_in = transformer.norm, transformer.proj_in
        self.norm1, self.norm3 = inner.norm1, inner.norm3
        self.heads, self.attn1_out = inner.attn1.heads, inner.attn1.to_out[0]
        self.gated = inner.ff.net[0].proj
        parts = (inner.attn1.to_q, inner.attn1.to_k, inner.attn1.to_v)
        self.register_buffer("qkv", torch.cat([part.weight for part in parts]))     # (3 c, c)
        # attention to one token is that token's value, see model.Attention
        weight, bias = fold_linear(inner.attn2.to_v, inner.attn2.to_out[0])
        self.register_buffer("view", weight)                                        # (c, e)
        self.register_buffer("view_bias", (bias + self.attn1_out.bias).to(weight.dtype))
        weight, bias = fold_linear(inner.ff.net[2], out)
        self.register_buffer("last", torch.cat([out.weight.flatten(1), weight], 1))     # (c, 5 c)
        self.register_buffer("bias", conv_before.bias.float() + bias)
        self.register_buffer("shift", -bias[None])      # it is in the sum, but not in what is read

    def projected(self, context):
        """The table `at_view` of contexts (m, 1, e): (m, c)."""
        return F.linear(context[:, 0], self.view, self.view_bias)

    def forward(self, x, h):
        """Grids (r, c, h, w) -> the result for x + h + the bias of the conv before."""
        total, y = Sum(x, h, self.bias).normed(self.norm, shift=self.shift.expand(len(x), -1))
        tokens = conv1x1(self.proj_in, y.flatten(2).mT)                         # (r, n, c)
        c = tokens.shape[2]
        y = F.linear(layer_norm(self.norm1, tokens), self.qkv).unflatten(-1, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*y.permute(2, 0, 3, 1, 4))           # (r, heads, n, d)
        y = F.linear(y.transpose(1, 2).flatten(2), self.attn1_out.weight)
        both = tokens.new_empty(*tokens.shape[:2], self.last.shape[1])          # (r, n, 5 c)
        y = layer_norm(self.norm3, tokens, y, self.at_view[-len(x):], both[..., :c])
        geglu_into(both[..., c:], F.linear(y, self.gated.weight, self.gated.bias))
        add_product(total.flatten(2).mT, both, self.last)
        return total


def fold_linear(first, second):
    """(weight, bias in float32) of two linear layers as one; a 1x1 conv is a linear layer too."""
    weight, bias = second.weight.flatten(1).float(), second.bias.float()
    if first.bias is not None:
        bias = bias + weight @ first.bias.float()
    return (weight @ first.weight.float()).to(second.weight.dtype), bias


def add_product(x, y, weight):
    """x (r, n, c) += y (r, n, e) weight (c, e)^T, in place."""
    if x.is_contiguous():
        x.view(-1, x.shape[2]).addmm_(y.view(-1, y.shape[2]), weight.mT)
    else:                       # a grid that is not channels-last
        x += F.linear(y, weight)


class UNet(nn.Module):
    """model.UNet, whose parameters it takes, for one context token; the tables of its blocks stand
    in the place of t and context."""
    def __init__(self, unet):
        super().__init__()
        self.time_embed, self.out = unet.time_embed, unet.out
        self.model_channels = unet.model_channels
        self.input_blocks = nn.ModuleList(map(fused_stage, unet.input_blocks))
        first, transformer, second = unet.middle_block
        self.middle_block = nn.Sequential(Block(first, transformer), Block(second))
        self.output_blocks = nn.ModuleList(map(fused_stage, unet.output_blocks))

    def forward(self, x, t, context):
        grid, skips = Sum(x), []
        for stage in self.input_blocks:
            grid = stage(grid)
            skips.append(grid)
        grid = self.middle_block(grid)
        for block, *upsample in self.output_blocks:
            grid = block(grid, skips.pop().total())     # which was added up when it was read
            for conv in upsample:
                grid = conv(grid)
        norm, *_, conv = self.out
        return conv(grid.normed(norm, silu=True)[1])


def fused_stage(stage):
    """The layers of a model.Stage in their fused form."""
    transformer = [layer for layer in stage if isinstance(layer, model.SpatialTransformer)]
    layers = []
    for layer in stage:
        if isinstance(layer, model.ResBlock):
            layers.append(Block(layer, *transformer))
        elif isinstance(layer, model.Upsample):
            layers.append(Upsample(layer.conv))
        elif isinstance(layer, (model.Downsample, nn.Conv2d)):
            layers.append(Conv(getattr(layer, "op", layer)))
    return nn.Sequential(*layers)
