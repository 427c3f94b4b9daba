"""GroupNorm (arXiv:1803.08494) with a sum or a shift before it and SiLU after it, in one.

Kernels for channels-last grids. Small grids are read once, by one program a group, which holds it
in registers. Others are read twice and written once forward; backward the grid and its gradient are
read twice and one is written: first sums over blocks of positions, then the result, from the last
sample to the first, as the cache still has the last ones. Sums are taken in float32 and in a fixed
order: the same input gives the same bits.
Letters: `b` batch, `c` channels, `n` = h w positions, `k` blocks of positions.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import kernels
from engine.kernels import (channels_last, empty_grid, launch_early, power_of_2, tl, triton,
                            wait_for_previous, warps)

COLUMNS = 64                # channels of a tile: lines of whole 128 bytes of bf16
# Values of a tile that is read and written, and of 32 threads of it
APPLY, GRADIENT = (2048, 1024), (2048, 512)
# Positions of a tile that is summed over, such tiles one after the other (fewer, where there would
# be less than so many programs), values of 32 threads, programs: for moments, for those of a sum
# that is written, for the gradient's sums
MOMENTS, WRITTEN, SUMS = (16, 8, 1024, 256), (16, 8, 512, 4096), (8, 16, 128, 256)
COMBINED = 512              # numbers of blocks that are combined at a time
# A group that one program holds at once, and its values per 32 threads; a grid that is small enough
# for the cache, where reading a few channels of every position costs nothing
SMALL, SMALL_PER_WARP, CACHED = 2**14, 512, 2**22
MOST = 2**19                # positions, as the second axis of a launch has up to 65,535 programs


def group_norm(norm, x, silu=False, shift=None):
    """The nn.GroupNorm `norm` of x (b, c, h, w) plus `shift` (b, c), then SiLU if `silu`.

    Statistics are float32; the result has x's type, and channels-last strides from the kernels.
    """
    if usable(x):
        return kernel_forward(x, norm.weight, norm.bias, shift, norm.num_groups, norm.eps, silu)[0]
    if shift is not None:
        x = x + shift.to(x.dtype)[:, :, None, None]
    y = norm(x)
    return F.silu(y) if silu else y


def usable(x):
    """Whether the kernels take a grid like x (b, c, h, w)."""
    return kernels.usable("norm", x) and x.shape[2:].numel() <= MOST


# ---- kernels. Grids are (b, n, c) in memory. With z what SiLU is applied to, y its result:
#      z = (x - center) rstd weight + bias, where center is the group's mean less the shift.

if triton is not None:
    @triton.jit
    def load_tile(x, sample, first, n, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """(values (ROWS, COLUMNS) float32, their offsets, which exist) from position `first` on, of
        this program's channels."""
        rows = first + tl.arange(0, ROWS)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        exist = (rows < n)[:, None] & (columns < c)[None, :]
        offsets = rows[:, None] * c + columns[None, :]
        return tl.load(x + sample * n * c + offsets, exist, 0.0).to(tl.float32), offsets, exist

    @triton.jit
    def load_channels(table, sample, c, COLUMNS: tl.constexpr):
        """float32 (1, COLUMNS) of a table (b, c), or of (c,) where `sample` is 0."""
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        return tl.load(table + sample * c + columns, columns < c, 0.0).to(tl.float32)[None, :]

    @triton.jit
    def load_affine(weight, bias, moments, sample, c, COLUMNS: tl.constexpr):
        """(center, scale, bias), each (1, COLUMNS), of z = (x - center) scale + bias."""
        scale = load_channels(moments + tl.num_programs(2).to(tl.int64) * c, sample, c, COLUMNS)
        scale *= load_channels(weight, 0, c, COLUMNS)
        return load_channels(moments, sample, c, COLUMNS), scale, load_channels(bias, 0, c, COLUMNS)

    @triton.jit
    def load_sum(x, h, bias, skip, sample, rows, columns, exist, n, c, c_x):
        """float32 values of x + h + bias, whose c_x channels are followed by those of skip, c
        together; of h, bias and skip what is not None."""
        own = exist if skip is None else exist & (columns < c_x)
        start, offsets = sample * n * c_x, rows * c_x + columns
        values = tl.load(x + start + offsets, own, 0.0).to(tl.float32)
        if h is not None:
            values += tl.load(h + start + offsets, own, 0.0).to(tl.float32)
        if bias is not None:
            values += tl.load(bias + columns, columns < c_x, 0.0).to(tl.float32)
        if skip is not None:
            start, offsets = sample * n * (c - c_x) - c_x, rows * (c - c_x) + columns
            values += tl.load(skip + start + offsets, exist & (columns >= c_x), 0.0).to(tl.float32)
        return values

    @triton.jit
    def store_sums(sums, sample, first, second, c, COLUMNS: tl.constexpr):
        """Two rows of a block (COLUMNS,) into sums (b, k, 2, c)."""
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        at = sums + (sample * tl.num_programs(1) + tl.program_id(1)) * 2 * c + columns
        tl.store(at, first, columns < c)
        tl.store(at + c, second, columns < c)

    @triton.jit
    def moments_kernel(x, h, bias, skip, y, sums, n, c, c_x, ROWS: tl.constexpr,
                       SLICES: tl.constexpr, COLUMNS: tl.constexpr):
        """Mean and sum of squared deviations of every channel of a block of load_sum, which is y
        where y is not None.

        Deviations are first taken from the block's first value, which is as near to the mean as
        any: what the sum of their squares then loses is about as large as what is left of it.
        """
        wait_for_previous()
        sample, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * SLICES * ROWS
        columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        rows = first + tl.arange(0, ROWS)[:, None]
        start = load_sum(x, h, bias, skip, sample, first, columns, columns < c, n, c, c_x)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.static_range(SLICES):
            exist = (rows + i * ROWS < n) & (columns < c)
            values = load_sum(x, h, bias, skip, sample, rows + i * ROWS, columns, exist, n, c, c_x)
            if y is not None:
                rounded = values.to(y.dtype.element_ty)
                tl.store(y + sample * n * c + (rows + i * ROWS) * c + columns, rounded, exist)
                values = rounded.to(tl.float32)
            off = tl.where(exist, values - start, 0.0)
            total += off
            squares += off * off
        count = tl.minimum(n - first, SLICES * ROWS)
        mean = tl.sum(total, 0) / count
        squared = tl.maximum(tl.sum(squares, 0) - count * mean * mean, 0.0)
        store_sums(sums, sample, tl.sum(start, 0) + mean, squared, c, COLUMNS)

    @triton.jit
    def combine_kernel(sums, shift, moments, n, c, k, width, stride, eps, ROWS: tl.constexpr,
                       WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
        """Moments of the blocks of ROWS -> center, rstd and the channel's mean less the group's.

        Chan's formula: deviations add up, and those of the means with their counts. One program a
        group of `width` channels; moments: (3, b, c).
        """
        wait_for_previous()
        sample, exist = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH) < width
        channel = tl.program_id(0) * width + tl.arange(0, WIDTH)
        sums += sample * k * 2 * c + channel[None, :]
        mean = tl.zeros([WIDTH], tl.float32)
        for chunk in range(CHUNKS):
            tile = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
            there = (tile < k) & exist[None, :]
            count = tl.minimum(n - tile * ROWS, ROWS).to(tl.float32)
            mean += tl.sum(tl.load(sums + tile * 2 * c, there, 0.0) * count, 0)
        mean /= n
        squares = tl.zeros([WIDTH], tl.float32)
        for chunk in range(CHUNKS):
            tile = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
            there = (tile < k) & exist[None, :]
            count = tl.minimum(n - tile * ROWS, ROWS).to(tl.float32)
            off = tl.where(there, tl.load(sums + tile * 2 * c, there, 0.0) - mean[None, :], 0.0)
            squares += tl.sum(tl.load(sums + tile * 2 * c + c, there, 0.0) + count * off * off, 0)
        moved = tl.zeros([WIDTH], tl.float32)
        if shift is not None:
            moved += tl.load(shift + sample * stride + channel, exist, 0.0).to(tl.float32)
        center = tl.sum(tl.where(exist, mean + moved, 0.0), 0) / width
        off = tl.where(exist, mean + moved - center, 0.0)
        variance = tl.sum(squares + n * off * off, 0) / (width * n)
        rstd = 1 / tl.sqrt_rn(variance + eps)
        at, table = moments + sample * c + channel, tl.num_programs(1).to(tl.int64) * c
        tl.store(at, center - moved, exist)
        tl.store(at + table, tl.zeros([WIDTH], tl.float32) + rstd, exist)
        tl.store(at + 2 * table, off, exist)

    @triton.jit
    def small_kernel(x, h, constant, skip, s, weight, bias, shift, moments, y, n, c, c_x, width,
                     stride, eps, SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """All of the forward pass of load_sum with the bias `constant`, which is s where s is not
        None; one program a group (ROWS >= n, WIDTH >= width)."""
        wait_for_previous()
        sample, rows = tl.program_id(1).to(tl.int64), tl.arange(0, ROWS)[:, None]
        among = tl.arange(0, WIDTH)[None, :]
        channel = tl.program_id(0) * width + among
        exist, there = (rows < n) & (among < width), among < width
        start, offsets = sample * n * c, rows * c + channel
        values = load_sum(x, h, constant, skip, sample, rows, channel, exist, n, c, c_x)
        if s is not None:
            rounded = values.to(s.dtype.element_ty)
            tl.store(s + start + offsets, rounded, exist)
            values = rounded.to(tl.float32)
        moved = tl.zeros([1, WIDTH], tl.float32)
        if shift is not None:
            moved += tl.load(shift + sample * stride + channel, there, 0.0).to(tl.float32)
        center = tl.sum(tl.where(exist, values + moved, 0.0)) / (width * n)
        off = tl.where(exist, values + moved - center, 0.0)
        rstd = 1 / tl.sqrt_rn(tl.sum(off * off) / (width * n) + eps)
        z = off * (rstd * tl.load(weight + channel, there, 0.0).to(tl.float32))
        z += tl.load(bias + channel, there, 0.0).to(tl.float32)
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(y + start + offsets, z.to(y.dtype.element_ty), exist)
        at, table = moments + sample * c + channel, tl.num_programs(1).to(tl.int64) * c
        tl.store(at, center - moved, there)
        tl.store(at + table, tl.zeros([1, WIDTH], tl.float32) + rstd, there)
        tl.store(at + 2 * table, tl.sum(off, 0)[None, :] / n, there)

    @triton.jit
    def apply_kernel(x, weight, bias, moments, y, n, c, SILU: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):
        wait_for_previous()
        sample = tl.num_programs(2) - 1 - tl.program_id(2).to(tl.int64)
        values, offsets, exist = load_tile(x, sample, tl.program_id(1) * ROWS, n, c, ROWS, COLUMNS)
        center, scale, start = load_affine(weight, bias, moments, sample, c, COLUMNS)
        z = (values - center) * scale + start
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(y + sample * n * c + offsets, z.to(y.dtype.element_ty), exist)

    @triton.jit
    def silu_backward(dz, off, scale, bias, SILU: tl.constexpr):
        """The gradient of z, from that of y."""
        if SILU:
            z = off * scale + bias
            gate = tl.sigmoid(z)
            dz *= gate * (1 + z * (1 - gate))
        return dz

    @triton.jit
    def gradient_sums_kernel(dy, x, weight, bias, moments, sums, n, c, SILU: tl.constexpr,
                             ROWS: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr):
        """Sums of dz and of dz (x - center) over every channel of a block."""
        wait_for_previous()
        sample, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * SLICES * ROWS
        center, scale, start = load_affine(weight, bias, moments, sample, c, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.static_range(SLICES):
            values, _, _ = load_tile(x, sample, first + i * ROWS, n, c, ROWS, COLUMNS)
            dz, _, _ = load_tile(dy, sample, first + i * ROWS, n, c, ROWS, COLUMNS)
            off = values - center
            dz = silu_backward(dz, off, scale, start, SILU)      # 0 where there is nothing
            total += dz
            product += dz * off
        store_sums(sums, sample, tl.sum(total, 0), tl.sum(product, 0), c, COLUMNS)

    @triton.jit
    def gradient_combine_kernel(sums, weight, moments, parts, n, c, k, width, WIDTH: tl.constexpr,
                                CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
        """Sums of the blocks -> parts (5, b, c): of dweight, of dbias, dshift, and `level` and
        `slope` of dx = dz rstd weight - level - slope (x - center)."""
        wait_for_previous()
        sample, exist = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH) < width
        channel = tl.program_id(0) * width + tl.arange(0, WIDTH)
        sums += sample * k * 2 * c + channel[None, :]
        total, product = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
        for chunk in range(CHUNKS):
            tile = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
            there = (tile < k) & exist[None, :]
            total += tl.sum(tl.load(sums + tile * 2 * c, there, 0.0), 0)
            product += tl.sum(tl.load(sums + tile * 2 * c + c, there, 0.0), 0)
        table = tl.num_programs(1).to(tl.int64) * c
        rstd = tl.load(moments + table + sample * c + channel, exist, 0.0)
        off = tl.load(moments + 2 * table + sample * c + channel, exist, 0.0)
        gain = tl.load(weight + channel, exist, 0.0).to(tl.float32) * rstd
        level = tl.sum(gain * total, 0) / (width * n)
        slope = rstd * rstd * tl.sum(gain * product, 0) / (width * n)
        at = parts + sample * c + channel
        tl.store(at, product * rstd, exist)
        tl.store(at + table, total, exist)
        tl.store(at + 2 * table, gain * total - n * (level + slope * off), exist)
        tl.store(at + 3 * table, level, exist)
        tl.store(at + 4 * table, slope, exist)

    @triton.jit
    def gradient_kernel(dy, x, weight, bias, moments, parts, dx, n, c, SILU: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        wait_for_previous()
        sample = tl.num_programs(2) - 1 - tl.program_id(2).to(tl.int64)
        table, first = tl.num_programs(2).to(tl.int64) * c, tl.program_id(1) * ROWS
        values, offsets, exist = load_tile(x, sample, first, n, c, ROWS, COLUMNS)
        dz, _, _ = load_tile(dy, sample, first, n, c, ROWS, COLUMNS)
        center, scale, start = load_affine(weight, bias, moments, sample, c, COLUMNS)
        off = values - center
        dz = silu_backward(dz, off, scale, start, SILU)
        level = load_channels(parts + 3 * table, sample, c, COLUMNS)
        slope = load_channels(parts + 4 * table, sample, c, COLUMNS)
        value = dz * scale - level - slope * off
        tl.store(dx + sample * n * c + offsets, value.to(dx.dtype.element_ty), exist)


def tiling(b, c, n, values, per_warp):
    """(grid of programs, options) of a kernel that reads and writes tiles of grids (b, c, n)."""
    columns = COLUMNS if c % (2 * COLUMNS) else 2 * COLUMNS
    rows = min(values // columns, power_of_2(n))
    return ((triton.cdiv(c, columns), triton.cdiv(n, rows), b),
            {"ROWS": rows, "COLUMNS": columns, "num_warps": warps(rows * columns, per_warp)})


def summing(b, c, n, tile):
    """(grid of programs, options) of a kernel that sums over blocks of positions."""
    height, slices, per_warp, programs = tile
    rows, across = min(height, power_of_2(n)), triton.cdiv(c, COLUMNS)
    while slices > 1 and (rows * slices >= 2 * n or
                          b * across * triton.cdiv(n, rows * slices) < programs):
        slices //= 2
    return ((across, triton.cdiv(n, rows * slices), b),
            {"ROWS": rows, "SLICES": slices, "COLUMNS": COLUMNS,
             "num_warps": warps(rows * COLUMNS, per_warp)})


def combining(width, k):
    """Options of a kernel over groups of `width` channels, of k blocks."""
    across = power_of_2(width)
    chunk = min(max(1, COMBINED // across), power_of_2(k))
    return {"WIDTH": across, "CHUNK": chunk, "CHUNKS": triton.cdiv(k, chunk), "num_warps": 1}


@torch.library.custom_op("zeronvs::group_norm", mutates_args=())
def kernel_forward(x: Tensor, weight: Tensor, bias: Tensor, shift: Optional[Tensor], groups: int,
                   eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    """(y (b, c, h, w), moments (3, b, c)): see combine_kernel. One node for torch.compile."""
    x = channels_last(x)
    y, moments = fake_forward(x, weight, bias, shift, groups, eps, silu)
    run_forward((x, None, None, None), None, weight, bias, shift, moments, y, groups, eps, silu)
    return y, moments


@kernel_forward.register_fake
def fake_forward(x, weight, bias, shift, groups, eps, silu):
    return (torch.empty_like(x, memory_format=torch.channels_last),
            x.new_empty((3, *x.shape[:2]), dtype=torch.float32))


@torch.library.custom_op("zeronvs::sum_norm", mutates_args=())
def kernel_sum_norm(x: Tensor, h: Optional[Tensor], constant: Optional[Tensor],
                    skip: Optional[Tensor], shift: Optional[Tensor], weight: Tensor, bias: Tensor,
                    groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    """(s, y), see Sum.normed; constant (c,): the sum's bias. It has no backward pass."""
    s, y = fake_sum_norm(x, h, constant, skip, shift, weight, bias, groups, eps, silu)
    x, h, skip = (None if grid is None else channels_last(grid) for grid in (x, h, skip))
    moments = x.new_empty((3, *s.shape[:2]), dtype=torch.float32)
    run_forward((x, h, constant, skip), s, weight, bias, shift, moments, y, groups, eps, silu)
    return s, y


@kernel_sum_norm.register_fake
def fake_sum_norm(x, h, constant, skip, shift, weight, bias, groups, eps, silu):
    shape = len(x), len(weight), *x.shape[2:]
    return empty_grid(shape, x), empty_grid(shape, x)


def run_forward(parts, s, weight, bias, shift, moments, y, groups, eps, silu):
    """Runs the kernels that write moments, y, and s where it is not None; parts: see load_sum."""
    b, c, *sides = y.shape
    n, width, c_x = math.prod(sides), c // groups, parts[0].shape[1]
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    stride = 0 if shift is None else shift.stride(0)        # from one sample to the next
    rows, across = power_of_2(n), power_of_2(width)
    if rows * across <= SMALL and y.numel() <= CACHED:
        small_kernel[groups, b](*parts, s, weight, bias, shift, moments, y, n, c, c_x, width,
                                stride, eps, silu, rows, across,
                                num_warps=warps(rows * across, SMALL_PER_WARP), **launch_early())
        return
    grid, block = summing(b, c, n, MOMENTS if s is None else WRITTEN)
    sums = moments.new_empty(b, grid[1], 2, c)
    moments_kernel[grid](*parts, s, sums, n, c, c_x, **block, **launch_early())
    combine_kernel[groups, b](sums, shift, moments, n, c, grid[1], width, stride, eps,
                              block["ROWS"] * block["SLICES"], **combining(width, grid[1]),
                              **launch_early())
    grid, tile = tiling(b, c, n, *APPLY)
    apply_kernel[grid](parts[0] if s is None else s, weight, bias, moments, y, n, c, silu, **tile,
                       **launch_early())


@torch.library.custom_op("zeronvs::group_norm_backward", mutates_args=())
def kernel_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor,
                    groups: int, silu: bool) -> tuple[Tensor, Tensor]:
    """(dx (b, c, h, w), parts (5, b, c)): see gradient_combine_kernel."""
    dy, x, (b, c, h, w) = channels_last(dy), channels_last(x), x.shape
    n, width = h * w, c // groups
    dx, parts = fake_backward(dy, x, weight, bias, moments, groups, silu)
    grid, block = summing(b, c, n, SUMS)
    sums = moments.new_empty(b, grid[1], 2, c)
    gradient_sums_kernel[grid](dy, x, weight, bias, moments, sums, n, c, silu, **block,
                               **launch_early())
    gradient_combine_kernel[groups, b](sums, weight, moments, parts, n, c, grid[1], width,
                                       **combining(width, grid[1]), **launch_early())
    grid, tile = tiling(b, c, n, *GRADIENT)
    gradient_kernel[grid](dy, x, weight, bias, moments, parts, dx, n, c, silu, **tile,
                          **launch_early())
    return dx, parts


@kernel_backward.register_fake
def fake_backward(dy, x, weight, bias, moments, groups, silu):
    return (torch.empty_like(x, memory_format=torch.channels_last),
            moments.new_empty(5, *x.shape[:2]))


def setup_context(ctx, inputs, output):
    x, weight, bias, shift, ctx.groups, _, ctx.silu = inputs
    ctx.shift_type = None if shift is None else shift.dtype
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.set_materialize_grads(False)


def backward(ctx, dy, _):
    x, weight, bias, moments = ctx.saved_tensors
    dx, parts = kernel_backward(dy, x, weight, bias, moments, ctx.groups, ctx.silu)
    dweight, dbias = parts[:2].sum(1).unbind(0)
    dshift = None if ctx.shift_type is None else parts[2].to(ctx.shift_type)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dshift, None, None, None


kernel_forward.register_autograd(backward, setup_context=setup_context)
