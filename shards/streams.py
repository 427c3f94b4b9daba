"""From a pattern to files that can be read by offset: what cannot is copied first.

A command's output and standard input are copied to the cache folder, once for all processes of this
machine, and deleted when others take their place.
"""

import atexit
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

from runtime.files import fcntl, unfinished
from shards.files import PATIENCE, WEB_WINDOW, LocalFile, WebFile, cache_folder

MAX_SHARDS = 1_000_000              # that one {000..126} pattern may name
INDEX_SUFFIX = ".index"             # of the files that index.py keeps beside a shard
INDEX_FILE = re.compile(r".+\.index(\.[0-9a-f]{8})?")   # the second kind is still being written


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


def find_shards(folder, pattern, patience=PATIENCE):
    """Files of the shards that a pattern names: LocalFile and WebFile.

    pattern: `a-{000..126}.tar`, a glob (`**` is any depth), both relative to `folder`; an
    `http://` or `https://` address; `-`, one tar on standard input. Several are joined by blanks
    around a `;`. patience: seconds of a WebFile. Raises FileNotFoundError, ValueError.
    """
    names = [name for part in pattern.split(" ; ") for name in expand(part.strip())]
    files = [file for name in names for file in find(folder, name, patience)]
    return list({file.path: file for file in files}.values())


def find(folder, name, patience):
    """The files of one expanded name."""
    if re.match("https?://", name):
        return [WebFile(name, patience)]
    if name == "-":
        return [LocalFile(standard_input())]
    if re.match(r"\w\w+:", name):       # two letters: C:\ is a file
        raise ValueError(f"shards {name!r}: only files, http://, https://, - and pipe: can be "
                         "read; pipe: stands alone, not beside others")
    pattern = str(Path(folder) / name)
    found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    files = [path for path in found
             if os.path.isfile(path) and not INDEX_FILE.fullmatch(os.path.basename(path))]
    if not files and os.path.exists(pattern):
        raise ValueError(f"shards {pattern} is no regular file: of a folder, `{pattern}/*.tar` "
                         f"names the shards in it; of a device, `pipe:cat {pattern}` reads it once")
    if not files:
        raise FileNotFoundError(f"no shards at {pattern}: `python prepare.py synth` makes some; in "
                                "training, --data=FOLDER says where they are")
    return [LocalFile(path) for path in files]


# ---- copies

def standard_input():
    """The path of a copy of standard input, for as long as this process runs. ValueError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("shards '-': standard input reaches one process only, not all ranks; "
                         "save it as a file first")
    folder = cache_folder() / "streams"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("stdin-*.tar") if fcntl else ():
        with open(old, "rb") as file:
            if lock(file):                  # nobody's: its process was killed
                delete_copy(old)
    path = folder / f"stdin-{uuid.uuid4().hex}.tar"
    file = open(path, "xb")                 # it stays open, and so locked, while this process lives
    lock(file)
    shutil.copyfileobj(sys.stdin.buffer, file, WEB_WINDOW)
    file.flush()
    here = os.getpid()
    atexit.register(lambda: os.getpid() == here and (file.close(), delete_copy(path)))
    return path


def lock(file, wait=False):
    """Locks an open file; False where another process has it. The system unlocks it at its end."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))
    except OSError:
        return False
    return True


def fetch(command, folder, keep):
    """The path of a copy, in `folder`, of what a shell command prints.

    The first process that asks makes it, the others wait; the copies used longest ago are deleted,
    but for `keep`. Raises ValueError when the command fails, OSError when the disk does.
    """
    path = folder / (hashlib.sha256(command.encode()).hexdigest()[:32] + ".tar")
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        os.utime(path)                  # used now: not the next to be deleted
        return path
    with open(folder / f"{path.name}.lock", "wb") as file:
        lock(file, wait=True)
        if not path.exists():           # another process may have finished it meanwhile
            with unfinished(path) as partial, open(partial, "xb") as output:
                status = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL,
                                        stdout=output).returncode
                if status:
                    raise ValueError(f"`{command}` failed with status {status}")
    copies = []
    for copy in folder.glob("[!.]*.tar"):       # but for unfinished ones
        with suppress(FileNotFoundError):       # another process deletes too
            copies.append((copy.stat().st_mtime, copy))
    for _, copy in sorted(copies)[:-keep]:
        delete_copy(copy)
    return path


def delete_copy(path):
    """Deletes a copy, its indexes and its lock."""
    for file in (path, *path.parent.glob(f"{path.name}.*")):
        file.unlink(missing_ok=True)
