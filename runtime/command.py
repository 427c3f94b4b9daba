"""What all command lines share. Without torch, so that `--help` and a typo are answered at once.

A script parses first and imports the rest then, and its last lines run it:

    ARGS = command.parse(parser()) if __name__ == "__main__" else None
    import torch
    ...
    if __name__ == "__main__":
        command.run("sample.py", run, ARGS)
"""

import argparse
import difflib
import math
import os
import re
import signal
import sys
import time
from contextlib import suppress

EVERY = 10.0                    # seconds between lines of progress, where there is no terminal
STOPPED = 130                   # exit status after Ctrl-C, as shells have it


class Parser(argparse.ArgumentParser):
    """`--name value` and `--name=value`, dashes and underscores both; a wrong option is answered
    in one line with the nearest one, and a value may begin with a minus. of_numbers: what a number
    too many is told."""

    def __init__(self, prog, of_numbers="", **options):
        super().__init__(prog, **{"allow_abbrev": False, **options})
        self.of_numbers = of_numbers
        # argparse takes "-30,0,1" for an option otherwise
        self._negative_number_matcher = re.compile(r"-[\d.].*")

    def parse_known_args(self, args=None, namespace=None):
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        spelled = []
        for text in map(str, sys.argv[1:] if args is None else args):
            name, equals, value = text.partition("=")
            spelled.append(known.get(name.replace("_", "-"), name) + equals + value)
        return super().parse_known_args(spelled, namespace)

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        commands = [parser for action in self._actions for parser in
                    (action.choices.values() if action.nargs == argparse.PARSER else ())]
        names = [name for each in (self, *commands) for name in each._option_string_actions]
        for text in rest:
            self.error(unknown("option", text.partition("=")[0], names)
                       if text.startswith("--") else f"{text!r} is one argument too many"
                       + f"; {self.of_numbers}" * bool(self.of_numbers and is_number(text)))
        return found

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")


def parse(parser, argv=None):
    """The parsed command line."""
    return begin(parser.prog, parser.parse_args) if argv is None else parser.parse_args(argv)


def begin(name, parse_argv):
    """What `parse_argv` makes of the command line. From here on Ctrl-C is one line too, also while
    torch is imported, until somebody takes the signal over."""
    def stop(signum, frame):
        say(f"{name}: stopped", sys.stderr)
        os._exit(STOPPED)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    return answer(name, parse_argv, sys.argv[1:])


def unknown(kind, name, choices):
    """The message for a name that is not known, with the nearest known one."""
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    return f"{kind} {name} is not known{hint}"


def numbers_of(kind, low, high=math.inf, above=False):
    """A parser of numbers of one kind in [low, high], or in (low, high) with `above`."""
    bounds = f"above {low:,}" if above else f"from {low:,}"
    bounds += "" if high == math.inf else f"{' and below' if above else ' to'} {high:,}"

    def parse_number(text):
        try:
            value = kind(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from err
        inside = low < value < high if above else low <= value <= high
        if not inside or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text[:40]} is not possible, only numbers {bounds}")
        return value
    return parse_number


def words(text):
    """A parser of names of files and folders, which are not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a name is needed, and it is empty")
    return text


def is_number(text):
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def run(name, main, *arguments):
    """Runs main, and ends this process unless its exit status is 0 or None, see `answer`."""
    status = answer(name, main, *arguments)
    if status:
        finish(status)


def answer(name, function, *arguments):
    """What a function gives; what is wrong with the user's input, files or disk ends this process
    with one line on standard error."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as err:
        say(f"{name}: {reason(err)}", sys.stderr)
        finish(2)
    except KeyboardInterrupt:
        say(f"{name}: stopped", sys.stderr)
        finish(STOPPED)


def reason(err):
    """What an error says, in one line: an OSError's begins with its file, not with a number."""
    text = f"{err.filename}: {err.strerror}" if getattr(err, "filename", None) else str(err)
    return " ".join(text.split())


def finish(status):
    """Ends this process. What a closed pipe or a full disk did not take is no failure of it."""
    for stream in (sys.stdout, sys.stderr):
        say("", stream, end="")
    sys.exit(status)


def say(line, stream=None, end="\n"):
    """Prints a line in one piece; a screen, pipe or file that takes no more ends nothing."""
    stream = stream or sys.stdout
    try:
        print(f"{line}{end}", end="", file=stream, flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):
            # what is left in the stream would fail again, with a traceback, at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """A bar on a terminal, and a line every ten seconds elsewhere, on standard error."""
    def __init__(self, label, unit, total=None, quiet=False):
        self.label, self.unit, self.total, self.quiet = label, unit, total, quiet
        self.count, self.spoken, self.bar = 0, time.monotonic(), None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm           # a third of a second that --help does not pay

            self.bar = tqdm(desc=label, total=total, unit=f" {unit}", leave=False)

    def advance(self):
        self.count += 1
        if self.bar is not None:
            self.bar.update()
        elif not self.quiet and time.monotonic() - self.spoken >= EVERY:
            self.spoken = time.monotonic()
            total = f" of {self.total:,}" if self.total else ""
            say(f"{self.label}: {self.count:,}{total} {self.unit}", sys.stderr)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def progress(iterable, label, unit, total=None, quiet=False):
    """The items of `iterable`, with their Progress."""
    total = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)
    bar = Progress(label, unit, total, quiet)
    for item in iterable:
        yield item
        bar.advance()
    bar.close()
