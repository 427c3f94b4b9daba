"""diffusion.py's random numbers in one kernel, bit for bit: in PyTorch's Philox is a hundred."""

import torch

import diffusion
from diffusion import WORD
from engine import kernels
from engine.kernels import launch_early, tl, triton, wait_for_previous

BLOCKS = 256                # of four words, of one program


def draw(seed, numbers, shape):
    """diffusion.Draws of the pairs `numbers` (b,), for latents of `shape` (c, h, w)."""
    return diffusion.draw(seed, numbers, shape, uniform)


def uniform(seed, stream, numbers, count):
    """Uniform float32 (b, count), see diffusion.uniform."""
    if kernels.usable("noise", numbers, (torch.int64,)):
        return kernel_uniform(seed, stream, numbers, count)
    return diffusion.uniform(seed, stream, numbers, count)


if triton is not None:
    @triton.jit(do_not_specialize=["key", "key_high", "stream"])
    def uniform_kernel(key, key_high, stream, streams, numbers, y, count, BLOCKS: tl.constexpr):
        """y (b, count); streams (b,), or None where `stream` is that of all rows."""
        wait_for_previous()
        row = tl.program_id(0).to(tl.int64)
        block, number = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS), tl.load(numbers + row)
        if streams is not None:
            stream = tl.load(streams + row)
        zero = (block * 0).to(tl.uint32)
        words = tl.philox_impl(block.to(tl.uint32), zero + stream.to(tl.uint32),
                               zero + number.to(tl.uint32), zero + (number >> 32).to(tl.uint32),
                               key.to(tl.uint32), key_high.to(tl.uint32))
        for i in tl.static_range(4):
            value = ((words[i] >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07      # 2**-23
            tl.store(y + row * count + 4 * block + i, value, 4 * block + i < count)


def kernel_uniform(seed, stream, numbers, count):
    y = torch.empty(len(numbers), count, device=numbers.device)
    streams = stream.contiguous() if isinstance(stream, torch.Tensor) else None
    uniform_kernel[len(numbers), triton.cdiv(count, 4 * BLOCKS)](
        seed & WORD, seed >> 32 & WORD, 0 if streams is not None else stream, streams,
        numbers.contiguous(), y, count, BLOCKS, **launch_early())
    return y
