"""GEGLU (arXiv:2002.05202): the first half of the channels, gated by the exact GELU of the second.

One kernel forward and one backward, which read and write every number once; what torch.compile
makes of the backward pass reads twice as many.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import kernels
from engine.kernels import launch_early, tl, triton, wait_for_previous

ROWS, COLUMNS, WARPS = 4, 256, 4    # tokens and channels of a tile, and what holds them


def geglu(x):
    """x (..., 2 c) -> (..., c): x[..., :c] * gelu(x[..., c:]), in x's type."""
    if kernels.usable("geglu", x):
        return kernel_forward(x)
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def geglu_into(y, x):
    """Writes geglu(x) into y (..., c), whose rows may be parts of longer ones; no gradients."""
    if kernels.usable("geglu", x):
        kernel_into(y, x)
    else:
        y.copy_(geglu(x))


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
    def geglu_kernel(x, y, m, c, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        wait_for_previous()
        rows, columns, exist = tile_of(m, c, ROWS, COLUMNS)
        at = x + rows * 2 * c + columns
        value = tl.load(at, exist, 0.0).to(tl.float32)
        gate = tl.load(at + c, exist, 0.0).to(tl.float32)
        value *= gate * 0.5 * (1 + tl.erf(gate * ROOT_HALF))
        tl.store(y + rows * stride + columns, value.to(y.dtype.element_ty), exist)

    @triton.jit
    def geglu_backward_kernel(dy, x, dx, m, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        wait_for_previous()
        rows, columns, exist = tile_of(m, c, ROWS, COLUMNS)
        at = rows * 2 * c + columns
        value = tl.load(x + at, exist, 0.0).to(tl.float32)
        gate = tl.load(x + at + c, exist, 0.0).to(tl.float32)
        dz = tl.load(dy + rows * c + columns, exist, 0.0).to(tl.float32)
        below = 0.5 * (1 + tl.erf(gate * ROOT_HALF))        # the share of a normal below the gate
        slope = below + gate * DENSITY * tl.exp(-0.5 * gate * gate)
        tl.store(dx + at, (dz * gate * below).to(dx.dtype.element_ty), exist)
        tl.store(dx + at + c, (dz * value * slope).to(dx.dtype.element_ty), exist)


def launch(kernel, m, c, *given):
    """Runs a kernel over (m, c). Only the first axis of its programs can be longer than 65,535."""
    grid = triton.cdiv(m, ROWS), triton.cdiv(c, COLUMNS)
    kernel[grid](*given, ROWS, COLUMNS, num_warps=WARPS, **launch_early())


@torch.library.custom_op("zeronvs::geglu", mutates_args=())
def kernel_forward(x: Tensor) -> Tensor:
    """See geglu. One node for torch.compile."""
    y = fake_forward(x)
    write_geglu(y, x)
    return y


@torch.library.custom_op("zeronvs::geglu_into", mutates_args=("y",))
def kernel_into(y: Tensor, x: Tensor) -> None:
    """See geglu_into."""
    write_geglu(y, x)


def write_geglu(y, x):
    m, c = y.numel() // y.shape[-1], y.shape[-1]
    launch(geglu_kernel, m, c, x.contiguous(), y, m, c, y.stride(-2))


@kernel_forward.register_fake
def fake_forward(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("zeronvs::geglu_backward", mutates_args=())
def kernel_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x (..., 2 c), from that of the result."""
    dx, m, c = fake_backward(dy, x), dy.numel() // dy.shape[-1], dy.shape[-1]
    launch(geglu_backward_kernel, m, c, dy.contiguous(), x.contiguous(), dx, m, c)
    return dx


@kernel_backward.register_fake
def fake_backward(dy, x):
    return x.new_empty(x.shape)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    return kernel_backward(dy, *ctx.saved_tensors)


kernel_forward.register_autograd(backward, setup_context=setup_context)
