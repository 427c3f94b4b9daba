"""Lets tests import the project's files and golden.py, wherever pytest is started from; --errors
prints how near every test of a golden case or an oracle came to its bound. Where there is no GPU,
Triton's kernels are interpreted, which it must know before one is defined."""

import os
import sys
import warnings
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), *map(str, TESTS.glob("*/"))]
os.environ.setdefault("OMP_NUM_THREADS", "1")       # small networks gain nothing from more; see -n
# Files whose tests take longest, first: what is begun last keeps one process of -n waiting
LONGEST = ("test_train", "test_model")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):    # tests run in other processes
        # a file's tests in one of them, which share what they make, in the order below
        config.option.dist, config.option.loadscopereorder = "loadfile", False
        return
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.backends.cudnn.allow_tf32 = False     # its three digits would hide what is compared
    config.pluginmanager.import_plugin("runs")


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_addoption(parser):
    parser.addoption("--errors", action="store_true", help="table of measured differences")
    parser.addoption("--long", action="store_true", help="also the long exercises of walkthrough.md")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--errors"):
        import golden

        terminalreporter.section("largest differences: absolute, largest value, share of the bound")
        for test, (share, error, largest) in sorted(golden.measured.items()):
            terminalreporter.write_line(f"{error:9.2g} {largest:9.2g} {share:8.1%}  {test}")


def pytest_unconfigure():
    if "torch" not in sys.modules:
        return
    from shards import files

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files.opened.cache_clear()      # else Python names each of them behind the last line
