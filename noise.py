"""Randomness as a function of (seed, stream, number): the same in any batch, on any rank or device.

Training asks for what belongs to a pair's number, sampling for what belongs to a view's; there is
no generator whose state would have to be saved. Letters: `b` batch.
"""

import math

import torch

# Streams: what is drawn for a number. Step k of a sampler draws from SAMPLE + k.
TIMESTEP, DROP, POSTERIOR, NOISE, SAMPLE = range(5)
PHILOX_M, PHILOX_W = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS, WORD = 10, 0xFFFFFFFF


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
    block = torch.arange(-(-count // 4), device=numbers.device)[None]
    number = numbers[:, None]
    stream = (stream[:, None] if isinstance(stream, torch.Tensor)
              else torch.full_like(block, stream))
    counter = block, stream, number & WORD, number >> 32 & WORD
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), dim=-1)  # (b, blocks, 4)
    # 23 bits and a half: exact in float32, never 0 or 1
    return ((words.flatten(1)[:, :count] >> 9).float() + 0.5) * 2.0**-23


def normal(seed, stream, numbers, shape):
    """Standard normal float32 (b, *shape) by Box and Muller's transform of `uniform`."""
    count = math.prod(shape)
    u, v = uniform(seed, stream, numbers, count + count % 2).chunk(2, dim=1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].unflatten(1, shape)
