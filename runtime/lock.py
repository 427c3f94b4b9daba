"""One run in a folder at a time. The system lets go of a lock when its process ends, however that
came, so a run that was killed starts again at once."""

import contextlib
import os
import socket
import time
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

NAME = ".running"


@contextlib.contextmanager
def held(folder, say):
    """Makes a run's folder and keeps it to this process. ValueError names another that has it."""
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        try:
            # of POSIX: its process's alone, so the loader's workers, which outlive it, have none
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as err:
            file.seek(0)
            raise ValueError(f"another run trains in {folder}: {file.read().strip()}; stop it, or "
                             "give another --out") from err
        except (OSError, AttributeError):       # a disk or a system without locks
            say(f"{folder} cannot be locked here: take care that no other run trains in it")
        with contextlib.suppress(OSError):      # of a full disk: the lock holds without its words
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}, since "
                       f"{time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
        yield
