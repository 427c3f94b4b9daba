"""What all command lines share. It imports no torch: --help and a typo are answered at once.

A script parses first and imports the rest then:

    ARGS = command.parse(parser()) if __name__ == "__main__" else None
    import torch
"""

import argparse
import difflib
import math
import os
import re
import signal
import sys
import time

EVERY = 10.0                    # seconds between lines of progress, where there is no terminal


class Parser(argparse.ArgumentParser):
    """`--name value` and `--name=value`, dashes and underscores both; a wrong option is answered
    in one line with the nearest one, and a value may begin with a minus."""

    def __init__(self, prog, **options):
        super().__init__(prog, allow_abbrev=False, **options)
        # argparse takes "-30,0,1" for an option otherwise
        self._negative_number_matcher = re.compile(r"-[\d.].*")

    def names(self):
        """Every option that this command line knows."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def parse_known_args(self, args=None, namespace=None):
        known = {name.replace("_", "-"): name for name in self.names()}
        spelled = []
        for text in sys.argv[1:] if args is None else args:
            name, equals, value = str(text).partition("=")
            spelled.append(known.get(name.replace("_", "-"), name) + equals + value)
        return super().parse_known_args(spelled, namespace)

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        for text in rest:
            self.error(unknown("option", text.partition("=")[0], self.names())
                       if text.startswith("-") else f"{text!r} is one argument too many")
        return found

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def unknown(kind, name, choices):
    """The message for a name that is not known, with the nearest known one."""
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    return f"{kind} {name} is not known{hint}"


def numbers_of(kind, low, high=math.inf, above=False):
    """A parser of numbers of one kind in [low, high], or in (low, high) with `above`."""
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


def begin(name, parse):
    """What `parse` makes of the command line. From here on Ctrl-C is one line too, also while torch
    is imported, until somebody takes the signal over."""
    def stop(signum, frame):
        say(f"{name}: stopped", sys.stderr)
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    return answer(name, parse, sys.argv[1:])


def answer(name, function, *arguments):
    """What a function gives; what is wrong with the user's input, files or disk ends this process
    with one line on standard error."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as err:
        # an OSError whose text names no file is about the last one that was written
        say(f"{name}: {' '.join(str(err).split())}", sys.stderr)
        finish(2)
    except KeyboardInterrupt:
        say(f"{name}: stopped", sys.stderr)
        finish(130)


def run(name, main, *arguments):
    """Ends this process with main's exit status, or as `answer` does."""
    finish(answer(name, main, *arguments))


def finish(status):
    """Ends this process. What a closed pipe or a full disk did not take is no failure of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (ValueError, AttributeError):        # closed before, or by who started us
            pass
    sys.exit(status)


def say(line, file=None):
    """Prints a line in one piece; a screen, pipe or file that takes no more ends nothing."""
    try:
        print(f"{line}\n", end="", file=file or sys.stdout, flush=True)
    except (OSError, ValueError):
        pass


def progress(iterable, label, unit, total=None, quiet=False):
    """The items of `iterable` under a bar on a terminal, a line every ten seconds elsewhere."""
    if quiet or sys.stderr.isatty():
        from tqdm import tqdm           # a third of a second that --help does not pay

        yield from tqdm(iterable, label, total, unit=f" {unit}", leave=False, disable=quiet)
        return
    total = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)
    spoken = time.monotonic()
    for count, item in enumerate(iterable, 1):
        yield item
        if time.monotonic() - spoken >= EVERY:
            spoken = time.monotonic()
            sys.stderr.write(f"{label}: {count}{f' of {total}' if total else ''} {unit}\n")


def is_number(text):
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
