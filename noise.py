"""Randomness as a function of (seed, stream, number): the same in any batch, on any rank or device.

Training asks for what belongs to a pair's number, sampling for what belongs to a view's; there is
no generator whose state would have to be saved. Letters: `b` batch.
"""

import math

import torch

import kernels
from kernels import begin, early, tl, triton

# Streams: what is drawn for a number. A sampler draws its first latent from SAMPLE, and the noise
# of its step k, counted from 0, from SAMPLE + 1 + k.
TIMESTEP, DROP, POSTERIOR, NOISE, SAMPLE = range(5)
PHILOX_M, PHILOX_W = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS, WORD = 10, 0xFFFFFFFF
BLOCKS = 256                # of four words, of one program of the kernel


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four words of counter, two of key -> four random words.

    Words are int64 tensors holding 0..2**32-1, of shapes that broadcast.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]     # 64 bits; the sign bit is masked off below
        high0, high1 = p0 >> 32 & WORD, p1 >> 32 & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & WORD, high0 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + PHILOX_W[0]) & WORD, (k1 + PHILOX_W[1]) & WORD
    return c0, c1, c2, c3


def uniform(seed, stream, numbers, count):
    """Uniform float32 (b, count) in (0, 1), row i a function of (seed, stream, numbers[i]) alone.

    seed: int from 0. stream: int from 0, or (b,) int64, one of each row. numbers: (b,) int64 from
    0, those of the pairs or views.
    """
    # departs: the reference draws from a generator, so that a row depends on all that came before
    if kernels.enabled and numbers.is_cuda:
        return kernel_uniform(seed, stream, numbers, count)
    block = torch.arange(-(-count // 4), device=numbers.device)[None]
    number = numbers[:, None]
    stream = (stream[:, None] if isinstance(stream, torch.Tensor)
              else torch.full_like(block, stream))
    counter = block, stream, number & WORD, number >> 32 & WORD
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), dim=-1)  # (b, blocks, 4)
    # 23 bits and a half: exact in float32, never 0 or 1
    return ((words.flatten(1)[:, :count] >> 9).float() + 0.5) * 2.0**-23


if triton is not None:
    @triton.jit(do_not_specialize=["key", "key_high", "stream"])
    def uniform_kernel(key, key_high, stream, streams, numbers, y, count, BLOCKS: tl.constexpr):
        """What `uniform` draws, the same bits, in one kernel; streams (b,), or None for one."""
        begin()
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
    """See uniform."""
    y = torch.empty(len(numbers), count, device=numbers.device)
    streams = stream.contiguous() if isinstance(stream, torch.Tensor) else None
    uniform_kernel[len(numbers), triton.cdiv(count, 4 * BLOCKS)](
        seed & WORD, seed >> 32 & WORD, 0 if streams is not None else stream, streams,
        numbers.contiguous(), y, count, BLOCKS, **early())
    return y


def normal(seed, stream, numbers, shape):
    """Standard normal float32 (b, *shape) by Box and Muller's transform of `uniform`."""
    count = math.prod(shape)
    u, v = uniform(seed, stream, numbers, count + count % 2).chunk(2, dim=1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].unflatten(1, shape)
