"""Tar archives: ustar, GNU long names and PAX, read by their headers alone."""

import re
import tarfile

from runtime.files import mistaken_for
from shards.files import TarError

BLOCK = tarfile.BLOCKSIZE           # headers and data begin at multiples of it
MAX_HEADER = 1 << 20                # bytes of a long name or a PAX header
TEXT = "utf-8", "surrogateescape"
PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


def tar_members(window):
    """Yields (name, offset, size) of a tar's regular files, from one pass over its headers.

    window: the Window of a shard. Raises TarError at the first damage, a missing end-of-archive
    block included, which Python's tarfile takes for the end: what was yielded before is whole.
    """
    file, at = window.file, 0
    name = size = None      # announced by an extended header for the member that follows
    while True:
        header = window.read(at, BLOCK)
        try:
            if len(header) < BLOCK:
                raise ValueError("the file is cut: no end-of-archive block" if at else "no tar")
            if header.count(0) == BLOCK:
                if name is not None or size is not None:
                    raise ValueError("an extended header without its member")
                return
            info = tarfile.TarInfo.frombuf(header, *TEXT)
            if info.type == tarfile.GNUTYPE_SPARSE:
                raise ValueError("a sparse member")
            extended = info.type in b"xXLKg"
            body = info.size if size is None or extended else size
            if info.type in b"123456":      # links, devices, folders: no data, whatever they claim
                body = 0
            if not 0 <= body <= file.size - at - BLOCK:
                raise ValueError(f"the file is cut: a member of {body} bytes is not whole")
            if extended and body > MAX_HEADER:
                raise ValueError(f"an extended header of {body} bytes")
            if extended:                    # of several the first wins, as in Python's tarfile
                new_name, new_size = extended_header(info.type, window.read(at + BLOCK, body))
                name = new_name if name is None else name
                size = new_size if size is None else size
            else:
                if info.isreg():
                    yield info.name if name is None else name, at + BLOCK, body
                name = size = None
        except (ValueError, tarfile.HeaderError) as err:
            what, way_out = mistaken_for(header, file.path) if not at else ("", "")
            if what:
                raise TarError(file.path, None, f"no tar, but {what}: {way_out}",
                               "no tar archive") from err
            broken = "bad header: " if isinstance(err, tarfile.HeaderError) else ""
            raise TarError(file.path, at, f"{broken}{err}") from err
        at += BLOCK + -(-body // BLOCK) * BLOCK


def extended_header(kind, data):
    """(name or None, size or None) for the next member, from a PAX or GNU header. ValueError."""
    if kind in b"Kg":       # a link's target; PAX defaults for the whole archive: dates, comments
        return None, None
    if kind == b"L":
        return data.split(b"\0", 1)[0].decode(*TEXT), None
    records, at = {}, 0
    while at < len(data) and data[at]:          # "length keyword=value\n"
        match = PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise ValueError("a broken PAX record")
        records[match[2]] = data[match.end():end - 1]
        at = end
    size = records.get(b"size", b"0")
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise ValueError("a sparse member")
    if not re.fullmatch(rb"\d{1,19}", size):
        raise ValueError(f"PAX size {size[:20]!r} is no number")
    name = records[b"path"].decode(*TEXT).rstrip("/") if b"path" in records else None
    return name, int(size) if b"size" in records else None
