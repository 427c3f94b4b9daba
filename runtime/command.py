"""What the command lines share: numbers within bounds, and errors of one line."""

import argparse
import math


class Parser(argparse.ArgumentParser):
    """Errors in one line."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def numbers_of(kind, low, high=math.inf, above=False):
    """A parser of numbers of one kind in [low, high], or (low, high) with `above`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from err
        inside = low < value < high if above else low <= value <= high
        if not inside or not math.isfinite(value):
            bounds = (f"between {low} and {high}" if math.isfinite(high) else
                      "that are finite" if not math.isfinite(low) else
                      f"above {low}" if above else f"from {low} on")
            raise argparse.ArgumentTypeError(f"{text} is not possible, only numbers {bounds}")
        return value
    return parse


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
