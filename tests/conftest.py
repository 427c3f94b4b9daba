"""Lets tests import the project's files and golden.py, wherever pytest is started from."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
