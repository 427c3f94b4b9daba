"""Where shards lie: files, web addresses, commands' output. Each is read by offset and size.

A shard that comes from a command cannot be read so: it is copied to the cache folder first, once
for all processes of this machine, and deleted when others take its place.
"""

import atexit
import glob
import hashlib
import http.client
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import OrderedDict
from pathlib import Path

MAX_SHARDS = 1_000_000              # that one {000..126} pattern may name
MAX_OPEN = 64                       # files that a process keeps open
LOCAL_WINDOW, WEB_WINDOW = 1 << 15, 1 << 22     # bytes read at once in a pass over the headers
WEB_TRIES, WEB_TIMEOUT = 4, 30      # requests for one piece; seconds that each may take
WEB_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}     # HTTP statuses worth another try
COPY_BEAT, COPY_STALE = 2, 30       # seconds: between signs of life of a copy, until it is dead
INDEX_SUFFIX = ".index"             # of the files that index.py keeps beside a shard


class TarError(ValueError):
    """An archive that is damaged, or none at all: file, byte offset and what is wrong there."""

    def __init__(self, path, offset, problem):
        super().__init__(path, offset, problem)
        self.path, self.offset, self.problem = path, offset, problem

    def __str__(self):
        return f"{os.path.basename(self.path)}: {self.problem}, at byte {self.offset}"


class Damaged(ValueError):
    """A scene or member that cannot be used: where, a reason that can be counted, and details."""

    def __init__(self, where, reason, detail=""):
        super().__init__(where, reason, detail)
        self.where, self.reason, self.detail = where, reason, detail

    def __str__(self):
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


# ---- names

def expand(pattern):
    """`a{000..012}.tar` -> its names in order; a pattern without braces is itself. ValueError."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    low, high, width = int(match[1]), int(match[2]), len(match[1])
    if not 0 <= high - low < MAX_SHARDS:
        raise ValueError(f"shards {pattern!r}: {match[0]} is empty or more than {MAX_SHARDS}")
    before, after = pattern[:match.start()], pattern[match.end():]
    return [name for i in range(low, high + 1) for name in expand(f"{before}{i:0{width}}{after}")]


def is_stream(pattern):
    """Whether shards come from commands, `pipe:gsutil cat gs://bucket/{000..126}.tar`."""
    return pattern.startswith("pipe:")


def find_shards(folder, pattern):
    """Files of the shards that a pattern names: LocalFile and WebFile.

    pattern: `a-{000..126}.tar`, a glob (`**` is any depth), both relative to `folder`; an
    `http://` or `https://` address; `-`, one tar on standard input. Several are joined by blanks
    around a `;`. Raises FileNotFoundError, ValueError.
    """
    files = {}
    for part in pattern.split(" ; "):
        for name in expand(part.strip()):
            for file in find(folder, name):
                files.setdefault(file.path, file)
    return list(files.values())


def find(folder, name):
    """The files of one expanded name."""
    if re.match("https?://", name):
        return [WebFile(name)]
    if name == "-":
        return [LocalFile(standard_input())]
    if re.match(r"\w\w+:", name):       # two letters: C:\ is a file
        raise ValueError(f"shards {name!r}: only files, http://, https://, pipe: and - can be read")
    pattern = str(Path(folder) / name)
    found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    found = [path for path in found if os.path.isfile(path) and INDEX_SUFFIX not in path]
    if not found:
        raise FileNotFoundError(f"no shards at {pattern}: `python prepare.py synth` makes some; in "
                                "training, --data=FOLDER says where they are")
    return [LocalFile(path) for path in found]


def cache_folder():
    """Where indexes of read-only folders and copies of streams are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeronvs"


# ---- files

class LocalFile:
    """A file: `read(offset, size)`, its `size`, and a `stamp` that changes when it does."""
    window = LOCAL_WINDOW

    def __init__(self, path):
        stat = os.stat(path)
        self.path, self.name = str(path), os.path.basename(path)
        self.size, self.stamp = stat.st_size, [stat.st_size, stat.st_mtime_ns]

    def read(self, offset, size):
        """At most `size` bytes from `offset`; less only where the file ends. Raises OSError."""
        return opened(self.path, offset, size)


OPEN = OrderedDict()            # (process, path): file; a forked worker has its own
OPEN_LOCK = threading.Lock()


def opened(path, offset, size):
    """Reads a piece of a file that stays open, up to MAX_OPEN of them."""
    key = os.getpid(), path
    with OPEN_LOCK:
        file = OPEN.pop(key, None) or open(path, "rb", buffering=0)
        OPEN[key] = file        # the newest last; the oldest is far older than any read under way
        if len(OPEN) > MAX_OPEN:
            OPEN.popitem(last=False)[1].close()
        if not hasattr(os, "pread"):        # Windows: seek and read are two steps
            file.seek(offset)
            return file.read(size)
    return os.pread(file.fileno(), size, offset)


class WebFile:
    """A file on a web server that serves byte ranges; as LocalFile."""
    window = WEB_WINDOW

    def __init__(self, url):
        self.path, self.name = url, url.split("?")[0].rsplit("/", 1)[-1]
        try:
            headers, _ = self.request(0, 1)
        except urllib.error.HTTPError as err:
            raise FileNotFoundError(f"no shard at {url}: {err}") from err
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
        """(headers, bytes) of a range, tried again after transient failures."""
        asked = urllib.request.Request(
            self.path, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
        for trial in range(1, WEB_TRIES + 1):
            try:
                with urllib.request.urlopen(asked, timeout=WEB_TIMEOUT) as reply:
                    data = reply.read(size)
                if len(data) == size:
                    return reply.headers, data
                failure = OSError(f"{self.path}: the connection ended early")
            except urllib.error.HTTPError as err:
                if err.code not in WEB_TRANSIENT:
                    raise
                failure = err
            except (OSError, http.client.HTTPException) as err:
                failure = err if isinstance(err, OSError) else OSError(f"{self.path}: {err!r}")
            if trial < WEB_TRIES:
                time.sleep(0.5 * 2**trial)
        raise failure


class Window:
    """Small reads in ascending order through one buffer, which skips what nobody wants."""

    def __init__(self, file):
        self.file, self.start, self.data = file, 0, b""

    def read(self, offset, size):
        at = offset - self.start
        if at < 0 or at + size > len(self.data):
            self.start, at = offset, 0
            self.data = self.file.read(offset, max(size, self.file.window))
        return self.data[at:at + size]


# ---- copies of what cannot be read by offset

def standard_input():
    """The path of a copy of standard input, for as long as this process runs. ValueError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("shards '-': standard input reaches one process only, not all ranks; "
                         "save it as a file first")
    path = cache_folder() / "streams" / f"stdin-{uuid.uuid4().hex}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        while chunk := sys.stdin.buffer.read(WEB_WINDOW):
            file.write(chunk)
    here = os.getpid()
    atexit.register(lambda: os.getpid() == here and path.unlink(missing_ok=True))
    return path


def fetch(command, folder, keep):
    """The path of a copy, in `folder`, of what a shell command prints.

    The first process that asks makes it, the others wait; the copies used longest ago are deleted,
    but for `keep`. Raises OSError when the command fails.
    """
    path = folder / (hashlib.sha256(command.encode()).hexdigest()[:32] + ".tar")
    unfinished = path.with_suffix(".part")
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            os.utime(path)                  # used now: not the next to be deleted
            return path
        except FileNotFoundError:
            pass
        try:
            with open(unfinished, "xb") as file:
                if path.exists():           # another process has finished it just now
                    unfinished.unlink()
                    continue
                copy(command, file, unfinished)
            os.replace(unfinished, path)
            delete_oldest(folder, keep)
        except FileExistsError:             # another process is at it, or was when it was killed
            if stale(unfinished):
                unfinished.unlink(missing_ok=True)
            else:
                time.sleep(COPY_BEAT / 10)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def copy(command, file, path):
    """Runs a command into a file, and touches the file while the command lives."""
    with subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=file) as process:
        while True:
            try:
                status = process.wait(COPY_BEAT)
                break
            except subprocess.TimeoutExpired:
                os.utime(path)
            except BaseException:
                process.kill()
                raise
    if status:
        raise OSError(f"`{command}` failed with status {status}")


def stale(path):
    """Whether nobody has touched a copy for long; a file that is gone is not."""
    try:
        return time.time() - path.stat().st_mtime > COPY_STALE
    except FileNotFoundError:
        return False


def delete_oldest(folder, keep):
    """Deletes all but the `keep` newest copies, and their indexes."""
    copies = []
    for path in folder.glob("*.tar"):
        try:
            copies.append((path.stat().st_mtime, path))
        except FileNotFoundError:           # another process deletes too
            pass
    for _, path in sorted(copies)[:-keep]:
        for file in (path, *folder.glob(path.name + "*" + INDEX_SUFFIX)):
            file.unlink(missing_ok=True)
