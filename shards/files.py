"""Files that are read by offset and size, on disk and on the web, and what is wrong with them."""

import functools
import http.client
import itertools
import math
import mmap
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np

from runtime.command import say

MAX_OPEN = 64                       # files that a process keeps open
LOCAL_WINDOW, WEB_WINDOW = 1 << 15, 1 << 22     # bytes read at once in a pass over the headers
PATIENCE = 300.0                    # seconds without an answer after which a web source stops a run
WEB_TIMEOUT = 10.0                  # seconds that a reply may stall; later attempts may wait longer
WEB_SLOWEST = 10_000                # bytes a second below which a reply counts as stalled
WEB_QUIET = 3.0                     # seconds that an outage may last before it is said
WEB_PAUSE, WEB_LONGEST_PAUSE = 0.5, 5.0         # seconds between attempts, doubled each time
WEB_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}     # HTTP statuses worth another attempt
WEB_REMINDER = 60.0                 # seconds between lines about an outage


class TarError(ValueError):
    """An archive that is damaged, or none at all: file, byte offset or None, and what is wrong."""

    def __init__(self, path, offset, problem, reason="damaged archive"):
        super().__init__(path, offset, problem, reason)
        self.path, self.offset, self.problem, self.reason = path, offset, problem, reason

    def __str__(self):
        at = "" if self.offset is None else f", at byte {self.offset}"
        return f"{os.path.basename(self.path)}: {self.problem}{at}"


class Damaged(ValueError):
    """A scene or member that cannot be used: where, a reason that can be counted, and details."""

    def __init__(self, where, reason, detail=""):
        super().__init__(where, reason, detail)
        self.where, self.reason, self.detail = str(where), reason, str(detail)

    def __str__(self):
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class Outage(ValueError):
    """A web source that has not answered for too long: it ends the run, no other pair is taken."""


def cache_folder():
    """The folder of copies of streams, and of indexes of read-only folders; it is made at need.

    It lies in $XDG_CACHE_HOME, in ~/.cache, or where there is no home, as in a container, in the
    system's temporary folder. Raises OSError where none can be written.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")   # "~" without a home
    temporary = Path(tempfile.gettempdir()) / f"zeronvs-{getattr(os, 'getuid', int)()}"
    with suppress(OSError):
        folder = Path(home) / "zeronvs"
        if folder.is_absolute():
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    temporary.mkdir(mode=0o700, exist_ok=True)
    return temporary


class LocalFile:
    """A file: `read(offset, size)`, its `size`, and a `stamp` that changes when it does."""
    window = LOCAL_WINDOW

    def __init__(self, path):
        stat = os.stat(path)
        self.path, self.name = str(path), os.path.basename(path)
        self.size, self.stamp = stat.st_size, [stat.st_size, stat.st_mtime_ns]

    def read(self, offset, size):
        """At most `size` bytes from `offset`; less only where the file ends. Raises OSError."""
        file = opened(self.path, *self.stamp)
        if hasattr(os, "pread"):
            return os.pread(file.fileno(), size, offset)
        with SEEKING:               # Windows: two steps
            file.seek(offset)
            return file.read(size)


SEEKING = threading.Lock()


@functools.lru_cache(MAX_OPEN)
def opened(path, *_stamp):
    """A file that stays open as long as it is one of the MAX_OPEN that were read last; one that
    took its place, with another stamp, is another."""
    return open(path, "rb", buffering=0)


class WebFile:
    """A file on a web server that serves byte ranges; as LocalFile.

    An outage is said within 15 seconds, and the read goes on when it ends. After `patience` seconds
    without an answer Outage is raised. What a server refuses for good (404) is an OSError at once.
    """
    window = WEB_WINDOW

    def __init__(self, url, patience=PATIENCE):
        self.path, self.name = url, url.split("?")[0].rsplit("/", 1)[-1]
        self.size, self.patience = 0, patience
        try:
            headers, _ = self.request(0, 1)
        except OSError as err:
            raise FileNotFoundError(f"no shard at {url}: {err}") from err
        total = headers.get("Content-Range", "").rpartition("/")[2]
        if not total.isdigit():
            raise ValueError(f"{url}: the server does not serve byte ranges; "
                             f"as `pipe:curl -sf {url}` it can be read")
        self.size = int(total)
        self.stamp = [self.size, headers.get("ETag") or headers.get("Last-Modified") or ""]

    def read(self, offset, size):
        """At most `size` bytes from `offset`; less only where the file ends. Raises OSError."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        headers, data = self.request(offset, size)
        if not headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise OSError(f"{self.path}: not the bytes that were asked for")
        return data

    def request(self, offset, size):
        """(headers, bytes) of a range, asked for again while the server is out of order."""
        began, said = time.monotonic(), False
        for tries in itertools.count():
            try:
                answer = self.attempt(offset, size, WEB_TIMEOUT * min(1 + tries, 3))
                if said:
                    say_outage(f"{self.path} answers again after {time.monotonic() - began:.0f} s",
                               0)
                    SAID_AT[0] = -math.inf      # the next outage is news
                return answer
            except (OSError, http.client.HTTPException) as err:
                # at start an unknown address is rather a wrong one than an outage
                wrong = not self.size and isinstance(getattr(err, "reason", err),
                                                     (socket.gaierror, ConnectionRefusedError))
                if wrong or getattr(err, "code", 503) not in WEB_TRANSIENT:     # HTTPError's
                    raise
                failure = err if isinstance(err, OSError) else repr(err)
            waited = time.monotonic() - began
            pause = min(WEB_PAUSE * 2**min(tries, 9), WEB_LONGEST_PAUSE)
            if waited + pause > self.patience:
                raise Outage(f"{self.path} has not answered for {waited:.0f} s: {failure}")
            if waited >= WEB_QUIET:
                said |= say_outage(f"{self.path} does not answer ({failure}): trying again for "
                                   f"{self.patience - waited:.0f} s", WEB_REMINDER)
            time.sleep(pause)

    def attempt(self, offset, size, timeout):
        """(headers, bytes) of a range. Raises OSError and HTTPException."""
        asked = urllib.request.Request(
            self.path, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
        deadline, data = time.monotonic() + timeout + size / WEB_SLOWEST, bytearray()
        with urllib.request.urlopen(asked, timeout=timeout) as reply:
            while len(data) < size and (piece := reply.read1(size - len(data))):
                data += piece
                if time.monotonic() > deadline:
                    break
        if len(data) < size:
            raise OSError(f"the connection ended after {len(data)} of {size} bytes")
        return reply.headers, bytes(data)


# when an outage was last said: workers that were forked share it, and meet the same outage
SAID_AT = np.frombuffer(mmap.mmap(-1, 8))
SAID_AT[0] = -math.inf


def say_outage(line, within):
    """Whether a line was printed: not if there was one less than `within` seconds ago."""
    now = time.monotonic()
    if now - SAID_AT[0] < within:
        return False
    SAID_AT[0] = now
    say(line, sys.stderr)
    return True


class Window:
    """Small reads in ascending order through one buffer, which skips what nobody wants."""

    def __init__(self, file):
        self.file, self.start, self.data = file, 0, b""

    def read(self, offset, size):
        """At most `size` bytes from `offset`; less only where the file ends. Raises OSError."""
        at = offset - self.start
        if at < 0 or at + size > len(self.data):
            self.start, at = offset, 0
            self.data = self.file.read(offset, max(size, self.file.window))
        return self.data[at:at + size]
