"""One run in a folder at a time.

The system lets go of a lock when its process ends, however that came, so a run that was killed
starts again at once. On shared disks where locks do not work, or only within one host, a sign of
life tells: the file is touched every few seconds, and who waits for that in vain takes over.
"""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

NAME = ".running"
BEAT = 5.0                  # seconds between signs of life
WATCHED = 4 * BEAT          # seconds without one after which nobody lives
DEAD = 600.0                # seconds since the last one that no clocks of two hosts are apart


@contextlib.contextmanager
def held(folder, say):
    """Makes a run's folder and keeps it to this process. ValueError names another that has it."""
    path, host = Path(folder) / NAME, f"host {socket.gethostname()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.read_text(errors="replace").strip() if path.exists() else ""
    elsewhere = bool(other) and not other.startswith(f"{host},")
    # watched before it is locked: to close a file lets go of every lock on it
    taken = elsewhere and lives(path, other, say)
    with open(path, "a", encoding="utf-8") as file:
        locked = None if taken else lock(file)
        if locked is None and not taken and other and not elsewhere:
            taken = lives(path, other, say)
        if taken or locked is False:
            raise ValueError(f"another run trains in {folder}: {other or 'it has just begun'}; "
                             "stop it, or give another --out")
        with contextlib.suppress(OSError):      # of a full disk: the lock holds without its words
            file.truncate(0)
            file.write(f"{host}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
        ended = threading.Event()
        thread = threading.Thread(target=beat, args=(path, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                file.truncate(0)


def lock(file):
    """True: this process has the file's lock now, False: another one has it, None: nobody can say.

    A POSIX lock is its process's alone: the loader's workers, which outlive it a little, have none.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:             # a disk without locks
        return None
    return True


def beat(path, ended):
    """Touches a file until `ended` is set."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def lives(path, other, say):
    """Whether somebody touches a file. No takes a while to find out, and is said before."""
    first, end = os.stat(path).st_mtime_ns, time.monotonic() + WATCHED
    if time.time() - first / 1e9 > DEAD:
        return False
    say(f"waiting {WATCHED:.0f} s for a sign of life of the run that was in {path.parent}: {other}")
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        with open(path, "rb") as file:      # a shared disk looks anew when a file is opened
            if os.fstat(file.fileno()).st_mtime_ns != first:
                return True
    return False
