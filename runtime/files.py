"""Files and folders that are there as a whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

COMPRESSED = {b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"),
              b"\xfd7zXZ": ("xz", "unxz"), b"(\xb5/\xfd": ("zstd", "unzstd")}


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


def write_text(path, text):
    """Writes a small text file, UTF-8, through to the disk."""
    with unfinished(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
