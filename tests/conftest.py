"""Lets tests import the project's files and golden.py, wherever pytest is started from; --errors
prints how near every test of a golden case or an oracle came to its bound. Where there is no GPU,
Triton's kernels are interpreted, which it must know before one is defined."""

import os
import sys
import warnings
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.backends.cudnn.allow_tf32 = False     # its three digits would hide what is compared
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), *map(str, TESTS.glob("*/"))]


def pytest_addoption(parser):
    parser.addoption("--errors", action="store_true", help="table of measured differences")
    parser.addoption("--long", action="store_true", help="also the long exercises of walkthrough.md")


def pytest_terminal_summary(terminalreporter, config):
    import golden

    if config.getoption("--errors"):
        terminalreporter.section("largest differences: absolute, largest value, share of the bound")
        for test, (share, error, largest) in sorted(golden.measured.items()):
            terminalreporter.write_line(f"{error:9.2g} {largest:9.2g} {share:8.1%}  {test}")


def pytest_unconfigure():
    from shards import files

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files.opened.cache_clear()      # else Python names each of them behind the last line
