"""diffusion.py: known answers of Philox, and draws that are functions of seed and number alone;
engine/noise.py draws the same."""

import pytest
import torch

import diffusion
import engine
from engine import kernels, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_philox_gives_the_published_known_answers():
    # Random123's kat_vectors, philox4x32 10
    zeros, ones = torch.tensor([0]), torch.tensor([0xFFFFFFFF])
    words = diffusion.philox([zeros] * 4, [0, 0])
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = diffusion.philox([ones] * 4, [0xFFFFFFFF] * 2)
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_draws_of_a_pair_do_not_depend_on_its_batch():
    numbers = torch.tensor([5, 2**33 + 1, 0, 7])
    together = diffusion.draw(42, numbers, (4, 8, 8))
    for i, number in enumerate(numbers):
        alone = diffusion.draw(42, number[None], (4, 8, 8))
        for name in ("t", "u", "posterior_noise", "noise"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i])


def test_draws_differ_between_seeds_streams_and_pairs():
    drawn = [diffusion.normal(seed, stream, torch.tensor([number]), (4, 8, 8))
             for seed in (0, 1) for stream in (diffusion.NOISE, diffusion.SAMPLE,
                                                     diffusion.SAMPLE + 1)
             for number in (3, 4, 3 + 2**32)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a * b).mean().abs() < 0.3 and not torch.equal(a, b)


def test_draws_have_the_right_distribution():
    draws = diffusion.draw(0, torch.arange(4000), (4, 8, 8))
    n = draws.noise.numel()
    assert abs(draws.noise.mean()) < 5 / n**0.5 and abs(draws.noise.var() - 1) < 5 * (2 / n)**0.5
    assert abs(draws.noise.pow(4).mean() - 3) < 5 * (96 / n)**0.5
    assert 0 <= draws.t.min() <= 5 and 994 <= draws.t.max() <= 999
    assert abs(draws.t.float().mean() - 499.5) < 5 * 1000 / 12**0.5 / 4000**0.5
    assert abs((draws.u < 0.1).float().mean() - 0.1) < 5 * (0.09 / 4000)**0.5


def test_the_engine_draws_what_the_method_draws():
    numbers = torch.tensor([5, 2**33 + 1, 7], device=DEVICE)
    ours, theirs = (vars(door.draw(3, numbers, (4, 5, 3))) for door in (engine, diffusion))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**40 + 3])
@pytest.mark.parametrize("count", [1, 6, 4096])
def test_the_kernel_draws_the_same_bits(seed, count):
    numbers = torch.tensor([0, 1, 2**31 + 1, 2**33 + 7], device=DEVICE)
    streams = torch.tensor([0, 3, 55, 2**20], device=DEVICE)
    for stream in (0, 1, 7, streams):
        found = noise.kernel_uniform(seed, stream, numbers, count)
        assert torch.equal(found, diffusion.uniform(seed, stream, numbers, count))
        assert (found > 0).all() and (found < 1).all()
