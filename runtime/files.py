"""Files and folders that are there as a whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(path):
    """Yields a name to write a file or folder under, which becomes `path` when all went well.

    When not, nothing is left of it. A file that `path` was before lives on until then. An OSError
    (a full disk) names the path that it was about.
    """
    path = Path(path)
    partial = path.with_name(f".unfinished_{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as err:
        raise OSError(err.errno, err.strerror or str(err), str(err.filename or path)) from err
    finally:
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a small text file, UTF-8, through to the disk."""
    with unfinished(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
