"""GEGLU (arXiv:2002.05202): the first half of the channels, gated by the exact GELU of the second.

Everywhere it is PyTorch's own; on a GPU, where Triton is installed, one kernel forward and one
backward, which read and write every number once: 3 and 5 numbers for every one of the result. What
torch.compile makes of the backward pass reads twice as many, and computes both halves for each.
Where no gradient is needed, the linear layer before it is part of the kernel, and only the result
is written.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import norm
from norm import KERNEL_TYPES, tl, triton

HALF_TYPES = torch.bfloat16, torch.float16      # whose products tensor cores take as they are

ROWS, COLUMNS, WARPS = 4, 256, 4    # tokens and channels of a tile, and what holds them
# Of the kernel with the linear layer: tokens, channels of each half and inputs of a tile, groups of
# 32 threads, tiles that are on their way; for many tokens and for few
MANY, FEW, MANY_TOKENS = (128, 64, 64, 8, 3), (64, 32, 64, 4, 4), 4096


def geglu(x):
    """x (..., 2 c) -> (..., c): x[..., :c] * gelu(x[..., c:]), in x's type."""
    if norm.enabled and x.is_cuda and x.dtype in KERNEL_TYPES:
        return kernel_forward(x)
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


if triton is not None:
    ROOT_HALF = tl.constexpr(math.sqrt(0.5))
    DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))      # of the standard normal at 0

    @triton.jit
    def tile_of(m, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """(row, column, whether it exists) of this program's tile of (m, c)."""
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        return rows, columns, (rows < m) & (columns < c)

    @triton.jit
    def geglu_kernel(x, y, m, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        rows, columns, exist = tile_of(m, c, ROWS, COLUMNS)
        at = x + rows * 2 * c + columns
        value = tl.load(at, exist, 0.0).to(tl.float32)
        gate = tl.load(at + c, exist, 0.0).to(tl.float32)
        value *= gate * 0.5 * (1 + tl.erf(gate * ROOT_HALF))
        tl.store(y + rows * c + columns, value.to(y.dtype.element_ty), exist)

    @triton.jit
    def geglu_backward_kernel(dy, x, dx, m, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        rows, columns, exist = tile_of(m, c, ROWS, COLUMNS)
        at = rows * 2 * c + columns
        value = tl.load(x + at, exist, 0.0).to(tl.float32)
        gate = tl.load(x + at + c, exist, 0.0).to(tl.float32)
        given = tl.load(dy + rows * c + columns, exist, 0.0).to(tl.float32)
        below = 0.5 * (1 + tl.erf(gate * ROOT_HALF))        # the share of a normal below the gate
        slope = below + gate * DENSITY * tl.exp(-0.5 * gate * gate)
        tl.store(dx + at, (given * gate * below).to(dx.dtype.element_ty), exist)
        tl.store(dx + at + c, (given * value * slope).to(dx.dtype.element_ty), exist)


    @triton.jit
    def geglu_linear_kernel(x, weight, bias, y, m, c, k, STEPS: tl.constexpr,
                            WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                            INPUTS: tl.constexpr):
        """Both halves of a tile at once, in STEPS of INPUTS; WHOLE: which are k together."""
        across = tl.cdiv(c, COLUMNS)        # tiles of the same tokens follow each other
        first = tl.program_id(0).to(tl.int64) // across * ROWS
        x, y, m, row = x + first * k, y + first * c, m - first, tl.arange(0, ROWS)[:, None]
        column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        value = tl.zeros([ROWS, COLUMNS], tl.float32)
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in range(STEPS):
            across_k = i * INPUTS + tl.arange(0, INPUTS)[None, :]
            along_k = i * INPUTS + tl.arange(0, INPUTS)[:, None]
            here, there = row < m, column < c
            if not WHOLE:
                here, there = here & (across_k < k), there & (along_k < k)
            part = tl.load(x + row * k + across_k, here, 0.0)
            of_value = tl.load(weight + column * k + along_k, there, 0.0)
            of_gate = tl.load(weight + (c + column) * k + along_k, there, 0.0)
            value = tl.dot(part, of_value, value)
            gate = tl.dot(part, of_gate, gate)
        value += tl.load(bias + column, column < c, 0.0).to(tl.float32)
        gate += tl.load(bias + c + column, column < c, 0.0).to(tl.float32)
        value *= gate * 0.5 * (1 + tl.erf(gate * ROOT_HALF))
        tl.store(y + row * c + column, value.to(y.dtype.element_ty), (row < m) & (column < c))


def geglu_linear(x, weight, bias):
    """geglu of the linear layer of x (..., k) with weight (2 c, k) and bias (2 c,), for sampling:
    (..., c)."""
    if norm.enabled and x.is_cuda and x.dtype in HALF_TYPES and not torch.is_grad_enabled():
        return kernel_linear(x, weight, bias)
    return geglu(F.linear(x, weight, bias))


def tiling(m, c):
    """(grid of programs, options) of a kernel over (m, c). Only a grid's first axis can be longer
    than 65,535."""
    return ((triton.cdiv(m, ROWS), triton.cdiv(c, COLUMNS)),
            {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS})


@torch.library.custom_op("zeronvs::geglu", mutates_args=())
def kernel_forward(x: Tensor) -> Tensor:
    """See geglu. One node for torch.compile."""
    x, y = x.contiguous(), fake_forward(x)
    m, c = y.numel() // y.shape[-1], y.shape[-1]
    grid, tile = tiling(m, c)
    geglu_kernel[grid](x, y, m, c, **tile)
    return y


@kernel_forward.register_fake
def fake_forward(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("zeronvs::geglu_linear", mutates_args=())
def kernel_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See geglu_linear. One node for torch.compile."""
    x, weight, y = x.contiguous(), weight.contiguous(), fake_linear(x, weight, bias)
    (c2, k), m = weight.shape, x.numel() // x.shape[-1]
    rows, columns, inputs, warps, stages = MANY if m >= MANY_TOKENS else FEW
    geglu_linear_kernel[(triton.cdiv(m, rows) * triton.cdiv(c2 // 2, columns),)](
        x, weight, bias, y, m, c2 // 2, k, triton.cdiv(k, inputs), k % inputs == 0, rows, columns,
        inputs, num_warps=warps, num_stages=stages)
    return y


@kernel_linear.register_fake
def fake_linear(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@torch.library.custom_op("zeronvs::geglu_backward", mutates_args=())
def kernel_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x (..., 2 c), from that of the result."""
    dy, x, dx = dy.contiguous(), x.contiguous(), fake_backward(dy, x)
    m, c = dy.numel() // dy.shape[-1], dy.shape[-1]
    grid, tile = tiling(m, c)
    geglu_backward_kernel[grid](dy, x, dx, m, c, **tile)
    return dx


@kernel_backward.register_fake
def fake_backward(dy, x):
    return x.new_empty(x.shape)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    return kernel_backward(dy, *ctx.saved_tensors)


kernel_forward.register_autograd(backward, setup_context=keep)
