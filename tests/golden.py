"""The golden fixtures: weights and inputs drawn by name, cases read, tensors compared.

`tests/golden/README.md` says how everything is drawn: NumPy's PCG64, seeded with the CRC-32 of a
string.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"
SALT = "zeronvs/"


def draw(name, shape, salt=SALT):
    """Standard normal float32 array that belongs to a string."""
    generator = np.random.default_rng(zlib.crc32((salt + name).encode()))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def weight(name, shape, salt=SALT):
    """The value of the parameter called `name`: float32 tensor of that shape."""
    w = torch.from_numpy(draw(name, shape, salt))
    if len(shape) >= 2:
        return w.mul_(np.float32(1 / np.sqrt(np.prod(shape[1:]))))
    return w.mul_(np.float32(0.1)).add_(1) if name.endswith(".weight") else w.mul_(np.float32(0.05))


@torch.no_grad()
def fill(module, prefix="", salt=SALT):
    """Gives a module's parameters golden values, by name behind `prefix`. Returns the module."""
    for name, parameter in module.named_parameters():
        parameter.copy_(weight(prefix + name, parameter.shape, salt))
    return module


def network_input(name, shape, tanh=False):
    """Input called `name`: float32 tensor, channels first where the case says so."""
    x = draw("input:" + name, shape)
    return torch.from_numpy(np.tanh(x) if tanh else x)


def case(name):
    """(description, tensors) of one golden case."""
    tensors = FOLDER / f"{name}.safetensors"
    description = json.loads((FOLDER / f"{name}.json").read_text())
    return description, load_file(tensors) if tensors.exists() else {}


# Worst comparison of every test function: (share of what was allowed, error, largest value)
measured = {}


def assert_close(found, expected, observed=0.0, relative=1e-5):
    """Largest difference within ten times the fixture's own (`observed`), or `relative` to the
    largest value, whichever is more."""
    expected = torch.as_tensor(expected)
    found = torch.as_tensor(found).detach().to(expected.dtype).reshape(expected.shape)
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(found), finite), "finite in other places than the reference"
    if not finite.any():
        return
    error = (found - expected)[finite].abs().max().item()
    largest = expected[finite].abs().max().item()
    bound = max(10 * observed, relative * largest)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split("[")[0].split(" ")[0]
    row = error / bound if bound else 0.0, error, largest
    measured[test] = max(measured.get(test, row), row)
    assert error <= bound, f"largest difference {error:.3g}, allowed {bound:.3g}"
