"""Files and folders that are there as a whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


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


def write_text(path, text):
    """Writes a small text file, UTF-8, through to the disk."""
    with unfinished(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
