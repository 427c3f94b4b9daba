"""Convolutions that are less work than they look.

Of few channels they are products of windows. That of the autoencoder's first one, whose result is
the largest grid there is, gathers its windows itself: beside the result they take no time.

After an upsampling by nearest neighbour, the nine taps of a result meet four different positions:
with taps summed beforehand it is 4/9 of the arithmetic (arXiv:1609.07009).

Of few positions, the sum is divided among many programs. Sampling one view, the deepest grids have
32 and 128 positions in all, and what counts is how fast tens of megabytes of weights are read.
cuDNN has no more programs than tiles of the result there, a few dozen; here each takes one of
the nine taps, and a second kernel adds the nine, in a fixed order.
Letters: `r` rows, `c` and `d` channels given and made, `m` = r h w positions of the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import kernels
from engine.kernels import (HALF_TYPES, channels_last, empty_grid, launch_early, power_of_2, tl,
                            triton, wait_for_previous)

# Positions and channels made of a tile of the first conv, and groups of 32 threads; the fewest
# channels given that are read together
FIRST, TOGETHER = (128, 64, 4), 4
MOST = 2**31                # results for one image, as they are counted in 32 bits
# (positions up to which: positions, channels made and channels given of a tile, groups of 32
# threads, tiles that are on their way)
TILES = ((32, (32, 64, 128, 4, 4)), (128, (128, 128, 64, 8, 5)))
SUMMED = 256                # results of a program that adds the taps


# ---- of few channels

def product(windows, weight, bias=None):
    """A convolution as a product: windows (..., k), weight (d, ...) of k numbers each -> (..., d).
    Both are padded with zeros: products are fast whose rows are multiples of 16 bytes."""
    short = -windows.shape[-1] % 8
    return F.linear(F.pad(windows, (0, short)), F.pad(weight.flatten(1), (0, short)), bias)


def first_conv(x, weight, bias):
    """The 3x3 conv of padding 1 of an image x (b, c, h, w) of few channels: (b, d, h, w)."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))      # autocast knows no kernel of ours
    if (kernels.usable("conv", x, HALF_TYPES) and not torch.is_grad_enabled()
            and x.shape[2:].numel() * len(weight) < MOST):
        c = max(TOGETHER, power_of_2(x.shape[1]))
        short = c - x.shape[1]
        # three neighbours in a row are one piece of memory, and a fourth that counts nothing
        x = F.pad(x, (1, 2, 1, 1, 0, short)).permute(0, 2, 3, 1).contiguous()   # (b, h+2, w+3, c)
        taps = F.pad(weight.to(x.dtype).permute(2, 3, 1, 0), (0, 0, 0, short, 0, 1))
        return kernel_first(x, taps.flatten(1, 2).contiguous(), bias)           # (3, 4c, d)
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)    # (b, c, h, w, 3, 3)
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)              # (b, h, w, 9c)
    return product(windows, weight, bias).permute(0, 3, 1, 2)


if triton is not None:
    @triton.jit
    def first_kernel(x, taps, bias, y, d, h, w, C: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):
        """A tile of y (b, h w, d)."""
        wait_for_previous()
        sample = tl.program_id(2).to(tl.int64)
        position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        exist, made, k = position < h * w, channel < d, tl.arange(0, 4 * C)
        x += sample * (h + 2) * (w + 3) * C
        x += (position // w * (w + 3) + position % w) * C + k[None, :]
        taps += k[:, None] * d + channel
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for row in tl.static_range(3):
            pixels = tl.load(x + row * (w + 3) * C, exist, 0.0)
            total = tl.dot(pixels, tl.load(taps + row * 4 * C * d, made, 0.0), total)
        total += tl.load(bias + channel, made, 0.0).to(tl.float32)
        tl.store(y + sample * h * w * d + position * d + channel, total.to(y.dtype.element_ty),
                 exist & made)


@torch.library.custom_op("zeronvs::first_conv", mutates_args=())
def kernel_first(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """See first_conv. One node for torch.compile."""
    y, c = fake_first(x, taps, bias), x.shape[3]
    b, d, h, w = y.shape
    rows, columns, warps = FIRST
    grid = triton.cdiv(h * w, rows), triton.cdiv(d, columns), b
    first_kernel[grid](x, taps, bias, y, d, h, w, c, rows, columns, num_warps=warps,
                       **launch_early())
    return y


@kernel_first.register_fake
def fake_first(x, taps, bias):
    b, h, w, _ = x.shape
    return empty_grid((b, len(bias), h - 2, w - 3), x)


# ---- after an upsampling

def upsample_taps(weight):
    """What upsample_conv multiplies by, of the weight (d, c, 3, 3): (c, d, 4, 4), rounded once."""
    taps = weight.to(torch.promote_types(weight.dtype, torch.float32)).transpose(0, 1).flip(2, 3)
    taps = F.pad(taps, (0, 0, 0, 1)) + F.pad(taps, (0, 0, 1, 0))
    taps = F.pad(taps, (0, 1)) + F.pad(taps, (1, 0))
    return taps.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def upsample_conv(x, taps, bias=None):
    """The 3x3 conv of padding 1 of a grid x (r, c, h, w) with every position repeated twice each
    way: (r, d, 2h, 2w). A position adds its 4x4 taps to the result about it."""
    return F.conv_transpose2d(x, taps, bias, stride=2, padding=1)


# ---- of few positions

def sides(x, stride):
    """Height and width of the result of conv3x3."""
    return [-(-side // stride) for side in x.shape[2:]]


def few_positions(r, h, w):
    """Whether the result has few positions, for which conv3x3 has kernels."""
    return r * h * w <= TILES[-1][0]


def conv3x3(x, weight, stride=1):
    """The convolution of x (r, c, h, w) with weight (d, c, 3, 3), padding 1, for sampling."""
    if few_positions(len(x), *sides(x, stride)) and kernels.usable("conv", x, HALF_TYPES):
        return kernel_conv(x, weight, stride)
    return F.conv2d(x, weight, stride=stride, padding=1)


if triton is not None:
    @triton.jit
    def conv_kernel(x, weight, y, m, c, d, h, w, h_in, w_in, stride, STEPS: tl.constexpr,
                    EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    INPUTS: tl.constexpr):
        """A tile of y (9, m, d), what each tap adds, in STEPS of INPUTS channels; EXACT: c is a
        multiple of INPUTS."""
        wait_for_previous()
        tap, row = tl.program_id(2), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        sample, top = row // (h * w), row // w % h * stride - 1
        up, across = top + tap // 3, row % w * stride - 1 + tap % 3
        inside = (row < m) & (up >= 0) & (up < h_in) & (across >= 0) & (across < w_in)
        inside, exist = inside[:, None], (column < d)[None, :]
        x += (((sample * h_in + up) * w_in + across) * c)[:, None]
        weight += (column[None, :] * 9 + tap) * c
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(STEPS):
            k = step * INPUTS + tl.arange(0, INPUTS)
            here, there = inside, exist
            if not EXACT:
                here, there = here & (k < c)[None, :], there & (k < c)[:, None]
            pixels = tl.load(x + k[None, :], here, 0.0)
            total = tl.dot(pixels, tl.load(weight + k[:, None], there, 0.0), total)
        tl.store(y + (tap * m + row)[:, None] * d + column[None, :], total,
                 (row < m)[:, None] & exist)

    @triton.jit
    def sum_kernel(parts, y, size, SIZE: tl.constexpr):
        wait_for_previous()
        at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        total = tl.zeros([SIZE], tl.float32)
        for tap in tl.static_range(9):
            total += tl.load(parts + tap * size + at, at < size, 0.0)
        tl.store(y + at, total.to(y.dtype.element_ty), at < size)


@torch.library.custom_op("zeronvs::conv3x3", mutates_args=())
def kernel_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """See conv3x3. One node for torch.compile."""
    x, weight, y = channels_last(x), channels_last(weight), fake_conv(x, weight, stride)
    (r, c, h_in, w_in), (_, d, h, w) = x.shape, y.shape
    m = r * h * w
    rows, columns, inputs, warps, stages = next(tile for most, tile in TILES if m <= most)
    parts = y.new_empty(9, m, d, dtype=torch.float32)
    grid = triton.cdiv(d, columns), triton.cdiv(m, rows), 9
    conv_kernel[grid](x, weight, parts, m, c, d, h, w, h_in, w_in, stride, triton.cdiv(c, inputs),
                      c % inputs == 0, rows, columns, inputs, num_warps=warps, num_stages=stages,
                      **launch_early())
    sum_kernel[triton.cdiv(m * d, SUMMED),](parts, y, m * d, SUMMED, **launch_early())
    return y


@kernel_conv.register_fake
def fake_conv(x, weight, stride):
    return empty_grid((len(x), len(weight), *sides(x, stride)), x)


# ---- of one position

def conv1x1(conv, x):
    """The 1x1 nn.Conv2d `conv` as what it is, a product over the channels of every position, for
    which no channels-last grid is copied. x: (b, c, h, w), or tokens (b, n, c) of its positions."""
    if x.ndim == 3:
        return F.linear(x, conv.weight.flatten(1), conv.bias)               # (b, n, c_out)
    return conv1x1(conv, x.flatten(2).mT).mT.unflatten(2, x.shape[2:])      # (b, c_out, h, w)
