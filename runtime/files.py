"""Files and folders that are there as a whole or not at all, or that one process has alone."""

import json
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

COMPRESSED = {b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"),
              b"\xfd7zXZ": ("xz", "unxz"), b"(\xb5/\xfd": ("zstd", "unzstd")}
STALE = 60.0            # seconds after which the sign of life of a run counts for nothing
LARGEST_JSON = 1 << 24  # bytes


def mistaken_for(start, path):
    """(what a file really is that begins with these bytes, the way out), or two empty texts: for
    what people have in the place of a shard, or but for the zip in that of a checkpoint."""
    if start.lstrip()[:1] == b"<":
        return "an HTML or XML page", "a download that went wrong, fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS", "`git lfs pull` fetches the file itself"
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "a zip archive", "unzip it, and tar what comes out"
    for magic, (kind, program) in COMPRESSED.items():
        if start.startswith(magic):
            command = (f"curl -sf {path} | {program} -c" if "://" in str(path) else
                       f"{program} -c {path}")
            return f"compressed by {kind}", f"{program} it, or read it as `pipe:{command}`"
    return "", ""


@contextmanager
def unfinished(path, why="unfinished"):
    """Yields a name to write a file or folder under, which becomes `path` when all went well.

    When not, nothing is left of it. A file that `path` was before lives on until then. An OSError
    (a full disk) names the path that it was about. The name is `path`'s behind `.unfinished_`, or
    another word: what a killed process left under it is replaced.
    """
    path = Path(path)
    partial = path.with_name(f".{why}_{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as err:
        raise OSError(err.errno, err.strerror or str(err), str(err.filename or path)) from err
    finally:
        remove(partial)


def remove(path):
    """Removes a file, a link or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path):
    """The dict in a JSON file of up to LARGEST_JSON bytes. Raises ValueError, one line."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no table of entries")
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path} is damaged: {' '.join(str(err).split())[:100]}") from err
    return found


def logged_rows(path):
    """The dicts in a run's log.jsonl, each of a step; without lines that a kill or a full disk has
    cut, and none where there is no file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            rows += [row] * isinstance(row["step"], int)
    return rows


def write_text(path, text):
    """Writes a small text file, UTF-8, through to the disk."""
    with unfinished(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(folder):
    """Makes a run's folder and keeps it to this process. ValueError names another that has it.

    The system lets go of a lock when its process ends, however that came, so a run that was killed
    starts again at once. On a disk without locks the time of the file is a sign of life.
    """
    path, ended = Path(folder) / ".running", threading.Event()
    path.parent.mkdir(parents=True, exist_ok=True)

    def live():
        while not ended.wait(STALE / 4):
            with suppress(OSError):
                os.utime(path)

    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        other = f"another run trains in {folder}: {file.read(1000).strip()}"
        try:
            # of POSIX: its process's alone, so the loader's workers, which outlive it, have none
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as err:
            raise ValueError(f"{other}; stop it, or give another --out") from err
        except (OSError, AttributeError) as err:        # a disk or a system without locks
            age = time.time() - path.stat().st_mtime
            if file.tell() and age < STALE:
                raise ValueError(f"{other}, with a sign of life {age:.0f} s ago; give another "
                                 f"--out, or if it was killed wait for {STALE:.0f} s") from err
            threading.Thread(target=live, daemon=True).start()
        with suppress(OSError):     # of a full disk: the lock holds without its words
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}, since "
                       f"{time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
        try:
            yield
        finally:
            ended.set()
            with suppress(OSError):
                file.truncate(0)
