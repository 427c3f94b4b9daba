"""Tar archives: ustar, GNU long names and PAX, read by their headers alone."""

import re

from runtime.files import mistaken_for
from shards.files import NotTar, TarError

BLOCK = 512                         # headers and data begin at multiples of it
MAX_HEADER = 1 << 20                # bytes of a long name or a PAX header
PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


def tar_members(window):
    """Yields (name, offset, size) of a tar's regular files, from one pass over its headers.

    window: the Window of a shard. Knows ustar, GNU long names and PAX. Raises TarError at the first
    damage, a missing end-of-archive block included: what was yielded before is whole.
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
            own_name, own_size, kind = tar_header(header)
            extended = kind in b"xXLKg"
            body = own_size if size is None or extended else size
            if kind in b"123456":           # links, devices, folders: no data, whatever they claim
                body = 0
            if at + BLOCK + body > file.size:
                raise ValueError(f"the file is cut: a member of {body} bytes is not whole")
            if extended and body > MAX_HEADER:
                raise ValueError(f"an extended header of {body} bytes")
            if extended:                    # of several the first wins, as in Python's tarfile
                new_name, new_size = extended_header(kind, window.read(at + BLOCK, body))
                name = new_name if name is None else name
                size = new_size if size is None else size
            else:
                folder = kind == b"\0" and own_name.endswith("/")
                if kind in (b"0", b"\0", b"7") and not folder:
                    yield own_name if name is None else name, at + BLOCK, body
                name = size = None
        except ValueError as err:
            what, way_out = mistaken_for(header, file.path) if not at else ("", "")
            if what:
                raise NotTar(file.path, at, f"no tar, but {what}: {way_out}") from err
            raise TarError(file.path, at, str(err)) from err
        at += BLOCK + -(-body // BLOCK) * BLOCK


def tar_header(header):
    """(name, size, type) of a 512-byte header. Raises ValueError."""
    claimed, counted = tar_number(header[148:156]), header[:148] + b" " * 8 + header[156:]
    total = sum(counted)        # some old writers summed signed bytes
    if claimed != total and claimed != total - 256 * sum(byte > 127 for byte in counted):
        raise ValueError(f"bad header: checksum {claimed}, its bytes give {total}")
    name, kind = tar_text(header[:100]), header[156:157]
    if kind == b"S":
        raise ValueError("a sparse member")
    if header[257:263] == b"ustar\0" and header[345]:       # GNU archives keep times there
        name = f"{tar_text(header[345:500])}/{name}"
    return name, tar_number(header[124:136]), kind


def tar_text(field):
    """Text up to the first NUL; bytes that are not UTF-8 become surrogates."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def tar_number(field):
    """Octal digits, or base-256. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"bad header: {digits!r} is no octal number")
    return int(digits or b"0", 8)


def extended_header(kind, data):
    """(name or None, size or None) for the next member, from a PAX or GNU header. ValueError."""
    if kind in b"Kg":       # a link's target; PAX defaults for the whole archive: dates, comments
        return None, None
    if kind == b"L":
        return tar_text(data), None
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
    name = records[b"path"].decode("utf-8", "surrogateescape") if b"path" in records else None
    return name and name.rstrip("/"), int(size) if b"size" in records else None
