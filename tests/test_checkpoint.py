"""checkpoint.py and tensorfile.py: foreign files, models filled from them, runs that survive."""

from pathlib import Path

import pytest
import torch
from golden import FOLDER, SALT, case, weight
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import tensorfile

FILES = FOLDER / "checkpoints"
MARKER = Path("/tmp/pwned_marker")
GOOD = ["lightning.ckpt", "lightning_legacy.ckpt", "bare_state_dict.ckpt",
        "ordered_with_parameters.ckpt", "state_dict.safetensors"]
BAD = ["truncated.ckpt", "truncated_legacy.ckpt", "truncated.safetensors"]
MALICIOUS = ["malicious_os_system.ckpt", "malicious_os_system_legacy.ckpt"]


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", GOOD)
def test_golden_file_reads_bit_for_bit(name):
    found = checkpoint.read(FILES / name)
    assert_same(found, load_file(FILES / "state_dict.safetensors"))
    if name.startswith("lightning"):
        assert (found.meta["epoch"], found.meta["global_step"], found.step) == (3, 1234, 1234)
        assert found.others


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_file_is_read_without_running_it(name):
    MARKER.unlink(missing_ok=True)
    found = checkpoint.read(FILES / name)
    assert_same(found, load_file(FILES / "state_dict.safetensors"))
    assert not MARKER.exists()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text
    return text


@pytest.mark.parametrize("name", BAD)
def test_truncated_file_is_refused_in_one_line_that_names_it(name):
    with pytest.raises(ValueError) as error:
        checkpoint.read(FILES / name)
    assert name in one_line(error)
