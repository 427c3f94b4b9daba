"""shards.py against Python's tarfile, a web server and commands."""

import functools
import gzip
import hashlib
import http.server
import io
import math
import os
import pickle
import shlex
import subprocess
import sys
import tarfile
import threading
import time
import types
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import SIDE, all_pairs, read_source, scene_members, write_source, write_tar

import configs
import fuzz_tars
from configs import Source
from shards import files, scenes, streams, tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BOUNDED = settings(max_examples=80, deadline=None, derandomize=True, database=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- names

def test_patterns_name_their_shards_in_order(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar"):
        write_tar(tmp_path / name, scene_members("a/b"))
    names = [file.name for file in streams.find_shards(tmp_path, "a-{08..10}.tar")]
    assert names == ["a-08.tar", "a-09.tar", "a-10.tar"]
    read_source(tmp_path, "*")          # writes indexes, which are no shards
    assert len(streams.find_shards(tmp_path, "*")) == 4
    assert streams.expand("{0..1}/{9..10}") == ["0/9", "0/10", "1/9", "1/10"]


@pytest.mark.parametrize("pattern, error, message", [
    ("a-*.tar", FileNotFoundError, r"no shards at .*a-\*.tar: `python prepare.py synth`"),
    ("b-{0..3}.tar", FileNotFoundError, "no shards at .*b-1.tar"),
    ("gone/x.tar", FileNotFoundError, "no shards at .*gone"),
    ("b-{3..0}.tar", ValueError, r"\{3..0\} is empty or more than 1000000"),
    ("b-{0..99999999999}.tar", ValueError, "is empty or more than 1000000"),
    ("http://127.0.0.1:9/a.tar", FileNotFoundError, "no shard at http://127.0.0.1:9/a.tar: "),
    ("folder", ValueError, r"shards .*folder is no regular file: .*`.*folder/\*.tar` names the shards"),
    ("fifo", ValueError, "shards .*fifo is no regular file: .*`pipe:cat .*fifo` reads it once"),
    ("b-0.tar ; pipe:cat x", ValueError, "pipe: stands alone"),
    ("gs://bucket/a.tar", ValueError, "only files, http://, https://, - and pipe: can be"),
])
def test_shards_that_cannot_be_found_are_one_clear_line(tmp_path, pattern, error, message):
    write_tar(tmp_path / "b-0.tar", scene_members("a/b"))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(error, match=message) as caught:
        read_source(tmp_path, pattern)
    assert "\n" not in str(caught.value)


# ---- tar

@pytest.mark.parametrize("content, what", [
    (gzip.compress(bytes(range(256)) * 9, mtime=0), "compressed by gzip: gunzip it, or read it as `pipe:gunzip"),
    (b"BZh91AY&SY" * 99, "compressed by bzip2: bunzip2 it"),
    (b"\n<!DOCTYPE html><html>Quota exceeded</html>" * 20, "an HTML or XML page: a download that"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS: `git lfs"),
    (b"PK\3\4" * 300, "a zip archive: unzip it, and tar what comes out"),
])
def test_a_file_that_is_no_tar_says_what_it_is_and_the_way_out(tmp_path, content, what):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.tar: no tar, but {what}.*: no tar archive$"):
        read_source(tmp_path, "a.tar")
    write_tar(tmp_path / "b.tar", scene_members("a/b"))     # it does not stop the others
    reader = read_source(tmp_path, "*.tar")
    assert len(reader) == 1 and reader.report == {"no tar archive": 1}


def test_a_tar_whose_first_name_looks_like_something_else_is_read(tmp_path):
    for name in ("<a>/b", "BZh/b"):
        write_tar(tmp_path / "a.tar", scene_members(name))
        assert read_source(tmp_path, "a.tar").shards[0].scenes == [name]


# of one to four bytes; all that there are take hypothesis 6 s to list
PARTS = st.text("aZ9 .-_=:\\\n\x01\x7f\xa0é\u2028漢\uffff\U0001f642", min_size=1, max_size=40)
NAMES = st.lists(PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=8)
OTHER_TYPES = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CONTTYPE]
TYPES = st.sampled_from([tarfile.REGTYPE] * 4 + OTHER_TYPES)
MEMBERS = st.lists(st.tuples(NAMES.map("/".join), st.binary(max_size=1100), TYPES), max_size=6)


def same_pairs(one, other):
    """Whether two sources give the same first 20 pairs."""
    one, other = all_pairs(one), all_pairs(other)
    for k in range(20):
        a, b = one[k], other[k]
        if a["uid"] != b["uid"] or not torch.equal(a["image_target"], b["image_target"]):
            return False
    return True


def tar_bytes(members, format):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = name[::-1] if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if info.isreg() else 0
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:          # too long a name for ustar
                pass
    return file.getvalue()


def found_members(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    return list(tar.tar_members(files.Window(files.LocalFile(path))))


@pytest.mark.parametrize("format", FORMATS)
@BOUNDED
@given(members=MEMBERS)
def test_members_are_those_of_pythons_tarfile(tmp_path, format, members):
    content = tar_bytes(members, FORMATS[format])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert found_members(tmp_path, content) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_are_read_in_every_format(tmp_path, format):
    lengths = [99, 100, 101, 155, 200] + [256, 1000, 70_000] * (format != "ustar")
    names = ["/".join(["d" * 50] * (n // 51)) + "/" + "f" * (n % 51 + 1) for n in lengths]
    content = tar_bytes([(name, b"1", tarfile.REGTYPE) for name in names], FORMATS[format])
    assert [name for name, *_ in found_members(tmp_path, content)] == names


def with_checksum(header):
    total = 256 + sum(header[:148]) + sum(header[156:512])
    return header[:148] + b"%06o\0 " % total + header[156:]


def test_sizes_in_base_256_are_read(tmp_path):
    content = tar_bytes([("a", b"12345", tarfile.REGTYPE)], tarfile.GNU_FORMAT)
    content = with_checksum(content[:124] + b"\x80" + (5).to_bytes(11, "big") + content[136:])
    assert found_members(tmp_path, content) == [("a", 512, 5)]


def test_a_pax_size_is_the_members_size(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a")
        info.size, info.pax_headers = 600, {"size": "600"}
        tar.addfile(info, io.BytesIO(b"x" * 600))
    content = content.getvalue()
    member = with_checksum(content[1024:1024 + 124] + b"0" * 11 + b"\0" + content[1024 + 136:])
    assert found_members(tmp_path, content[:1024] + member) == [("a", 1536, 600)]


def test_a_checksum_of_signed_bytes_is_accepted(tmp_path):
    content = tar_bytes([("é", b"1", tarfile.REGTYPE)], tarfile.GNU_FORMAT)
    total = sum(byte - 256 * (byte > 127) for byte in content[:148] + b" " * 8 + content[156:512])
    content = content[:148] + b"%06o\0 " % total + content[156:]
    assert found_members(tmp_path, content) == [("é", 512, 1)]


def block(name, kind, content=b"", size=None):
    """A ustar header of any type, and its padded content; `size` is claimed, if given."""
    header = tar_bytes([(name, content, tarfile.REGTYPE)], tarfile.USTAR_FORMAT)[:512]
    size = len(content) if size is None else size
    header = header[:124] + b"%011o\0" % size + header[136:156] + kind + header[157:]
    return with_checksum(header) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize("blocks", [
    [block("folder/", b"\0"), block("a", b"\0", b"old")],
    [block("link", b"1", size=700), block("a", b"0", b"1")],
    [block("unknown", b"Z", b"x" * 600), block("a", b"0", b"1")],
    [block("x", b"x", b"10 path=p\n"), block("l", b"L", b"long\0"), block("a", b"0", b"1")],
    [block("l", b"L", b"long\0"), block("x", b"x", b"10 path=p\n"), block("a", b"0", b"1")],
    [block("k", b"K", b"to\0"), block("l", b"L", b"long\0"), block("s", b"2"), block("a", b"0")],
    [block("g", b"g", b"14 comment=no\n"), block("a", b"0", b"1"), bytes(512), block("b", b"0")],
])
def test_rare_headers_are_read_as_pythons_tarfile_reads_them(tmp_path, blocks):
    content = b"".join(blocks) + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert found_members(tmp_path, content) == expected and len(expected) == 1


def test_an_extended_header_at_the_end_is_rejected(tmp_path):
    for last in (block("l", b"L", b"long\0"), block("x", b"x", b"11 size=12\n")):
        with pytest.raises(files.TarError, match="header without its member, at byte 2048"):
            found_members(tmp_path, block("a", b"0", b"1") + last + bytes(1024))


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_archive_is_rejected_and_its_whole_members_are_kept(tmp_path, format):
    long = ("d" * 60 + "/" + "n" * 60) if format == "ustar" else "n" * 150
    members = [("a", b"x" * 700, tarfile.REGTYPE), (long, b"y" * 300, tarfile.REGTYPE),
               ("c", b"", tarfile.REGTYPE)]
    content = tar_bytes(members, FORMATS[format])
    whole = found_members(tmp_path, content)
    end = content.rindex(b"ustar") - 257 + 512      # the last member, c, is empty
    path = tmp_path / "x.tar"
    for cut in range(0, end + 512, 37):
        path.write_bytes(content[:cut])
        kept = []
        with pytest.raises(files.TarError) as caught:
            for member in tar.tar_members(files.Window(files.LocalFile(path))):
                kept.append(member)
        assert kept == [member for member in whole if member[1] + member[2] <= cut]
        # The header that is missing may be expected within 511 bytes of padding behind the cut.
        assert caught.value.offset < cut + 512 and caught.value.offset % 512 == 0
        assert f"x.tar: {caught.value.problem}, at byte {caught.value.offset}" == str(caught.value)


def test_every_changed_header_byte_is_noticed_where_it_is(tmp_path):
    content = tar_bytes([("a", b"x" * 600, tarfile.REGTYPE), ("b", b"y", tarfile.REGTYPE)],
                        tarfile.USTAR_FORMAT)
    for at in range(1536, 2048, 3):
        broken = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1:]
        try:
            found_members(tmp_path, broken)
        except files.TarError as err:
            assert err.offset == 1536 and "bad header" in str(err)
        else:
            assert 1536 + 148 <= at < 1536 + 156    # only the checksum's own padding may change


@pytest.mark.parametrize("records", [
    b"12 path=a", b"99 path=abc\n", b"x path=a\n", b"5 =a\n", b"8 path\n", b"11 size=-1\n",
    b"12 size=1_0\n", b"22 GNU.sparse.major=1\n"])
def test_broken_and_sparse_pax_headers_are_rejected(tmp_path, records):
    with pytest.raises(files.TarError, match="PAX|sparse"):
        found_members(tmp_path, block("x", b"x", records) + block("a", b"0", b"1") + bytes(1024))


def test_a_huge_extended_header_is_refused_unread(tmp_path):
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(block("x", b"L", size=1 << 32))
        file.truncate(1 << 33)          # sparse: no disk is used
    with pytest.raises(files.TarError, match="an extended header of 4294967296 bytes"):
        list(tar.tar_members(files.Window(files.LocalFile(path))))


@BOUNDED
@given(st.data())
def test_a_mutated_archive_raises_nothing_but_tar_errors(tmp_path, draw):
    format = draw.draw(st.sampled_from(sorted(FORMATS)))
    members = [("a", b"x" * 600), ("b" * 140, b"y"), ("c", b"")]
    content = tar_bytes([(*member, tarfile.REGTYPE) for member in members], FORMATS[format])
    content = bytearray(content[:6144])
    for _ in range(draw.draw(st.integers(1, 6))):
        at = draw.draw(st.integers(0, len(content) - 1))
        content[at] = draw.draw(st.integers(0, 255))
        if draw.draw(st.booleans()):    # a valid checksum lets the damage in
            block = at // 512 * 512
            content[block:block + 512] = with_checksum(bytes(content[block:block + 512]))
    try:
        for name, offset, size in found_members(tmp_path, bytes(content)):
            assert 0 <= size and offset + size <= len(content)
    except files.TarError:
        pass


def test_errors_survive_a_trip_between_processes():
    for error in (files.TarError("a.tar", 512, "bad"), files.Damaged("a", "b", "c")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


# ---- shards on the web

class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server with byte ranges that can fail on purpose."""
    fails, requests, ranged, shift = 0, [], True, 0

    def do_GET(self):
        kind = type(self)
        kind.requests.append(self.headers["Range"])
        if kind.fails:
            kind.fails -= 1
            return self.send_error(503)
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            return self.send_error(404)
        content = Path(path).read_bytes()
        first, last = 0, len(content) - 1
        if kind.ranged:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        piece = content[first:last + 1]
        self.send_response(206 if kind.ranged else 200)
        if kind.ranged:
            self.send_header("Content-Range",
                             f"bytes {first + kind.shift}-{last}/{len(content)}")
        self.send_header("ETag", str(zlib.crc32(content)))
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """(folder that is served, its address, the handler's class)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "web"
    folder.mkdir()
    handler = type("Handler", (Ranges,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                         functools.partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_shards_on_the_web_give_the_pairs_of_the_same_files(web):
    folder, address, handler = web
    write_source(folder, "a", 3, shards=2)
    remote = read_source("/nowhere", address + "/a-{000000..000001}.tar")
    local = read_source(folder, "a-{000000..000001}.tar")
    assert same_pairs(remote, local)
    # the index is kept: a second reader asks for the size of each shard and for its first image
    handler.requests.clear()
    again = read_source("/nowhere", address + "/a-{000000..000001}.tar")
    assert handler.requests[:2] == ["bytes=0-0"] * 2 and len(handler.requests) == 3
    assert len(again) == 6
    # one pair reads its two images, to the byte
    handler.requests.clear()
    all_pairs(again, "7dof")[0]
    spans = [list(map(int, span.removeprefix("bytes=").split("-"))) for span in handler.requests]
    sizes = {int(size) for index in local.shards for size in index.sizes[:, 0]}
    assert len(spans) == 2 and all(last - first + 1 in sizes for first, last in spans)


def test_a_changed_shard_on_the_web_is_indexed_anew(web):
    folder, address, handler = web
    for name in ("a/b", "a/c"):
        write_tar(folder / "x.tar", scene_members(name))
        assert read_source("/nowhere", address + "/x.tar").shards[0].scenes == [name]


def test_a_shard_that_took_the_place_of_another_is_read_and_not_the_old_one(tmp_path):
    for name in ("a/b", "a/c"):     # written beside it and renamed, as commands here do
        write_tar(tmp_path / "new.tar", scene_members(name))
        os.replace(tmp_path / "new.tar", tmp_path / "x.tar")
        reader = read_source(tmp_path, "x.tar")
        assert reader.shards[0].scenes == [name]
        assert reader.shards[0].read(0, 3, "")[:3] == name.encode()


def test_transient_failures_of_a_server_are_tried_again(web, monkeypatch):
    folder, address, handler = web
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    write_tar(folder / "x.tar", scene_members("a/b"))
    handler.fails = 20
    reader = read_source("/nowhere", address + "/x.tar")
    assert handler.fails == 0 and reader.image(0, 0).shape == (3, SIDE, SIDE)


def test_an_outage_is_said_once_and_its_end_too_and_one_that_lasts_stops_with_the_address(
        web, monkeypatch, capfd):
    folder, address, handler = web
    write_tar(folder / "x.tar", scene_members("a/b"))
    reader, now = read_source("/nowhere", address + "/x.tar"), [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    files.SAID_AT[0] = -math.inf
    handler.fails = 6               # 0, 0.5, 1.5, 3.5, 7.5, 12.5 s
    assert reader.image(0, 0).shape == (3, SIDE, SIDE)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{address}/x.tar does not answer (HTTP Error 503")
    assert lines[1] == f"{address}/x.tar answers again after 18 s"
    handler.fails, began = 10**6, now[0]
    with pytest.raises(files.Outage, match=f"^{address}/x.tar has not answered for 29. s: HTTP Er"):
        reader.image(0, 0)
    assert now[0] - began <= reader.shards[0].file.patience == 300
    assert 2 <= len(capfd.readouterr().err.splitlines()) <= 5
    handler.fails = 10**6           # the same at start, where the limit is told to it
    with pytest.raises(ValueError, match="has not answered for"):
        scenes.open_source(Source("here", "co3d", address + "/x.tar", 1.0), "", SIDE, patience=1.0)


@pytest.mark.parametrize("kind", ["stalls", "is short", "drips"])
def test_a_reply_that_stalls_or_ends_early_is_an_outage_too(web, monkeypatch, kind):
    folder, address, handler = web
    write_tar(folder / "x.tar", scene_members("a/b"))
    monkeypatch.setattr(files, "WEB_TIMEOUT", 0.2)
    monkeypatch.setattr(files, "WEB_SLOWEST", 1e6)
    file = files.WebFile(address + "/x.tar", patience=1.0)

    def bad(self):
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-511/{file.size}")
        self.send_header("Content-Length", "512")
        self.end_headers()
        self.wfile.write(b"x" * 100)
        for _ in range({"stalls": 1, "is short": 0, "drips": 30}[kind]):
            time.sleep(1.0 if kind == "stalls" else 0.05)
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:
                return
        self.close_connection = True
    handler.do_GET = bad
    began = time.monotonic()
    with pytest.raises(files.Outage, match=f"^{address}/x.tar has not answered for"):
        file.read(0, 512)
    assert time.monotonic() - began < 10


def test_a_reply_that_is_no_http_is_tried_again(web, monkeypatch):
    folder, address, handler = web
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    write_tar(folder / "x.tar", scene_members("a/b"))
    reader, answer, bad = read_source("/nowhere", address + "/x.tar"), handler.do_GET, [1]

    def garbled(self):
        if bad and bad.pop():
            self.wfile.write(b"garbled\r\n\r\n")
            self.close_connection = True
        else:
            answer(self)
    handler.do_GET = garbled
    assert reader.image(0, 0).shape == (3, SIDE, SIDE)
    bad += [1] * 1000
    reader.shards[0].file.patience = 0
    with pytest.raises(files.Outage, match="BadStatusLine"):
        reader.image(0, 0)


def test_bytes_that_were_not_asked_for_are_not_taken(web):
    folder, address, handler = web
    write_tar(folder / "x.tar", scene_members("a/b"))
    reader = read_source("/nowhere", address + "/x.tar")
    handler.shift = 1
    with pytest.raises(files.Damaged, match="not the bytes that were asked for"):
        reader.image(0, 0)


def test_a_server_without_ranges_is_refused_with_the_way_out(web):
    folder, address, handler = web
    write_tar(folder / "x.tar", scene_members("a/b"))
    handler.ranged = False
    with pytest.raises(ValueError, match=f"serve byte ranges; as `pipe:curl -sf {address}"):
        read_source("/nowhere", address + "/x.tar")


# ---- shards from commands

@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Four shards of two scenes each, and the pattern of commands that print them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_source(tmp_path, "a", 2, shards=4)
    log = shlex.quote(str(tmp_path / "log"))
    return f"pipe:echo x >> {log}; cat {shlex.quote(str(tmp_path))}/a-{{000000..000003}}.tar"


def open_stream(pattern, window=2, pairs_per_shard=10):
    source = Source("here", "co3d", pattern, 1.0, window=window, pairs_per_shard=pairs_per_shard)
    return scenes.open_source(source, "/nowhere", SIDE)


def test_a_streams_pairs_are_a_function_of_their_number(stream):
    pairs = all_pairs(open_stream(stream))
    whole = [pairs[k]["uid"] for k in range(120)]
    again = all_pairs(open_stream(stream))          # goes on in the middle, and is in no hurry
    assert [again[k]["uid"] for k in reversed(range(60, 120))] == whole[60:][::-1]
    by_shard = Counter(uid.split("scene_")[1][0] for uid in whole)
    assert len(by_shard) == 4 and min(by_shard.values()) >= 15      # 30 expected of each
    # a window of two: ten pairs never come from more than three shards
    assert all(len({uid.split("scene_")[1][0] for uid in whole[k:k + 10]}) <= 3
               for k in range(0, 120, 10))


def test_streams_are_copied_once_for_all_and_few_are_kept(stream, tmp_path):
    pairs = all_pairs(open_stream(stream))
    with ThreadPoolExecutor(4) as pool:             # as many readers at the same place
        readers = list(pool.map(lambda i: all_pairs(open_stream(stream)), range(4)))
    for k in range(15):
        assert len({reader[k]["uid"] for reader in [pairs, *readers]}) == 1
    copied = len((tmp_path / "log").read_text().split())
    assert copied <= 4
    narrow = all_pairs(open_stream(stream.replace("; cat", "; cat -u"), window=1))
    for k in range(0, 400, 10):
        narrow[k]
    for _ in range(100):            # a copy may be under way, for pairs to come
        if not list(tmp_path.rglob(".unf*")):
            break
        time.sleep(0.1)
    assert len(list(narrow.readers[0].folder.glob("*.tar"))) == scenes.COPIES_KEPT + 1
    assert not list(tmp_path.rglob(".unf*"))


def test_a_copy_that_was_deleted_is_made_again(stream, tmp_path):
    pairs = all_pairs(open_stream(stream))
    before = pairs[0]["uid"]
    for copy in (tmp_path / "cache").rglob("*.tar"):
        copy.unlink()
    files.opened.cache_clear()
    assert pairs[0]["uid"] == before and pairs[0]["damage"] == ""


def test_a_stream_that_fails_is_replaced_and_named(stream, tmp_path):
    pairs = all_pairs(open_stream(stream))
    (tmp_path / "a-000002.tar").unlink()
    items = [pairs[k] for k in range(60)]
    damage = {line.split("\t")[1] for item in items for line in item["damage"].splitlines()}
    assert damage == {"the stream cannot be read"}
    assert not any("scene_2" in item["uid"] for item in items)
    with pytest.raises(ValueError, match="'here': `exit 3`: the stream cannot be read .*status 3"):
        open_stream("pipe:exit 3")


def test_a_copy_whose_maker_was_killed_is_made_by_another(tmp_path):
    folder = tmp_path / "copies"
    folder.mkdir()
    command = "echo whole"
    name = hashlib.sha256(command.encode()).hexdigest()[:32]
    (folder / f".unfinished_{name}.tar").write_bytes(b"half")
    (folder / f"{name}.tar.lock").write_bytes(b"")
    assert streams.fetch(command, folder, 4).read_bytes() == b"whole\n"


def test_a_copy_that_another_finishes_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    command = f"echo x >> {shlex.quote(str(tmp_path))}/log; echo whole"
    path = streams.fetch(command, tmp_path / "copies", 4)
    looks = iter([FileNotFoundError])               # the first look was before it was finished

    def utime(path, real=os.utime):
        for failure in looks:
            raise failure
        real(path)

    monkeypatch.setattr(streams.os, "utime", utime)
    assert streams.fetch(command, tmp_path / "copies", 4).read_bytes() == b"whole\n"
    assert (tmp_path / "log").read_text() == "x\n"
    assert list((tmp_path / "copies").glob("*.tar")) == [path]


def test_a_stream_has_no_fixed_pass(stream):
    with pytest.raises(ValueError, match="'here' is a stream, which has no fixed pass"):
        all_pairs(open_stream(stream), ordered=True)


def test_standard_input_is_read_as_one_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", scene_members("a/b"))
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "import configs; from shards import scenes\n"
            "source = configs.Source('here', 'co3d', '-', 1.0)\n"
            "print(scenes.open_source(source, '', 8).shards[0].scenes)")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, os.path.dirname(configs.__file__)]
    with open(path, "rb") as file:
        done = subprocess.run(command, stdin=file, env=environment, capture_output=True, text=True)
    assert done.stdout == "['a/b']\n", done.stderr
    assert not list((tmp_path / "cache").rglob("stdin*"))       # nor an index of it


def test_copies_of_standard_input_that_killed_processes_left_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(streams.sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"text")))
    folder = tmp_path / "zeronvs" / "streams"
    folder.mkdir(parents=True)
    for name in ("stdin-used.tar", "stdin-old.tar", "stdin-old.tar.co3d.index"):
        (folder / name).write_bytes(b"")
    with open(folder / "stdin-used.tar", "rb") as user:
        assert streams.lock(user)
        path = streams.standard_input()
    assert path.read_bytes() == b"text"
    assert {*folder.iterdir()} == {folder / "stdin-used.tar", path}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="standard input reaches one process only"):
        streams.standard_input()


def test_mutated_shards_are_read_or_refused_in_one_line(tmp_path):
    read_well, refused = fuzz_tars.fuzz(150, 1, tmp_path)
    assert read_well > 20 and refused > 20
