"""Files of tensors, read lazily and never executed: `.ckpt`/`.pt` (zip and legacy), safetensors.

Python's own unpickler reads pickles; what a file names is an `Inert` stand-in, so that nothing is
imported or called, and keys are text or whole numbers. torch.load(weights_only=True) is safe too,
but refuses TorchScript and every class that it does not know, and hashes whatever a file makes a
key: a few bytes can take hours. What a file says of itself is bounded before it is believed. Files
are mapped: the bytes of a tensor are read only when it is used.
"""

import io
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch

from runtime.files import mistaken_for
from runtime.tensors import KINDS, LARGEST, SAFETENSORS, StateDict, nbytes

STORAGES = {f"{name}Storage": dtype for dtype, _, name in KINDS if name} | {"UntypedStorage": None}
DTYPES = {str(dtype): dtype for dtype, _, _ in KINDS}
LARGEST_INDEX = 5 << 19         # bytes of a pickle, a header or a directory; zero123-xl has 0.4 MB
MOST_TENSORS = 100_000          # in a file; zero123-xl has 3,800
MOST_DIMENSIONS = 16            # of a tensor
LONGEST_NAME = 1000             # characters
DEEPEST = 32                    # containers within containers, of which tensors are looked for
SPARE = 1 << 30                 # bytes that a tensor may take beyond those of its whole file


class Malformed(Exception):
    """What a file holds that no writer of checkpoints puts there."""


@dataclass(slots=True)
class Storage:
    """A run of bytes in a file. `dtype` is None where its elements have no type of their own."""
    dtype: torch.dtype | None
    nbytes: int
    offset: int | None = None


@dataclass(slots=True)
class Stored:
    """A tensor that lies in a file: `read()` reads its bytes and nothing else."""
    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int = 0                      # index of its first element in the storage
    path: Path | None = None
    stamp: tuple[int, int] = (0, 0)     # size and time of change of the file when it was opened

    @property
    def span(self):
        """Elements of the storage from the first to the last of the tensor."""
        extent = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else 1 + extent

    def read(self):
        """The tensor, mapped from its file, which may be renamed or removed before the tensor goes,
        but not written over in place; what is written to the tensor stays in memory. Raises
        ValueError when the file has changed since it was opened."""
        if not self.span:
            return torch.empty(0, dtype=self.dtype).as_strided(self.shape, self.stride)
        width = self.dtype.itemsize
        start = self.storage.offset + self.first * width
        with open(self.path, "rb") as file:
            if stamp(file) != self.stamp:
                raise ValueError(f"{self.path} has changed since it was opened")
            data = np.memmap(file, np.uint8, "c", start, (self.span * width,))
        if hasattr(mmap, "MADV_WILLNEED"):
            data.base.madvise(mmap.MADV_WILLNEED)       # the system begins to read, and we go on
        if start % width:
            data = np.array(data)                       # legacy files align nothing
        return torch.from_numpy(data).view(self.dtype).as_strided(self.shape, self.stride)


def stamp(file):
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


# ------------------------------------------------------------------------------ pickles

@dataclass(slots=True)
class Inert:
    """Stands for what a file names or makes an object of: has its name or state, does nothing."""
    name: str = ""
    state: object = None

    def ignore(self, *_):
        return Inert()

    __call__ = __setitem__ = append = extend = ignore


class Names(dict):
    """A dict of texts and whole numbers: hashing tuples, or numbers of one hash, may never end."""

    def __setitem__(self, key, value):
        if isinstance(key, str) or isinstance(key, int) and abs(key) < LARGEST:
            super().__setitem__(key, value)


def sizes(*values):
    """The values, when all are numbers that a size can be. Raises Malformed otherwise."""
    if not all(type(n) is int and 0 <= n < LARGEST for n in values):
        raise Malformed("an impossible size")
    return values


class Unpickler(pickle._Unpickler):
    """Builds what a pickle describes of tensors and plain containers; `outside(id)` gives storages.
    Every opcode that would call, create, or hash what a file chooses is replaced."""
    dispatch = dict(pickle._Unpickler.dispatch)
    for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.DICT, pickle.PUT,
                 pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        del dispatch[code[0]]
    for kind, like in ((pickle.EMPTY_SET, pickle.EMPTY_LIST), (pickle.ADDITEMS, pickle.APPENDS),
                       (pickle.FROZENSET, pickle.LIST)):
        dispatch[kind[0]] = dispatch[like[0]]

    def __init__(self, stream, outside):
        super().__init__(stream, encoding="latin-1")
        self.persistent_load, self.tensors = outside, 0

    def find_class(self, module, name):
        return Inert(f"{module[:100]}.{name[:100]}")

    def construct(self, name, arguments):
        """What calling a function of a file would give if that is a tensor or a dict."""
        if name.startswith("torch._utils._rebuild_tensor"):
            return self.view(*arguments[:7])        # all that its three versions have
        if name.startswith("torch._utils._rebuild_parameter"):
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":
            return self.construct(arguments[0].name, arguments[2])
        return Names() if name.endswith((".OrderedDict", ".defaultdict", ".dict")) else Inert()

    def view(self, storage, first, shape, stride, grad=False, hooks=None, dtype=None):
        """torch._utils._rebuild_tensor, and what its later versions have more."""
        self.tensors += 1
        if self.tensors > MOST_TENSORS or max(len(shape), len(stride)) > MOST_DIMENSIONS:
            raise Malformed(f"more than {MOST_TENSORS:,} tensors, or {MOST_DIMENSIONS} dimensions")
        dtype = DTYPES[dtype.name] if isinstance(dtype, Inert) else storage.dtype
        if dtype is None:
            raise Malformed("a tensor without a type")
        return Stored(storage, dtype, sizes(*shape), sizes(*stride), *sizes(first))

    def load_empty_dict(self):
        self.append(Names())

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self.construct(function.name, arguments))

    def load_newobj_ex(self):
        self.stack.pop()        # arguments by name
        self.load_reduce()

    def load_build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    dispatch |= {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.REDUCE[0]: load_reduce,
                 pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex,
                 pickle.BUILD[0]: load_build}


def storage_of(identity):
    """(Storage, key) of the persistent id ("storage", class, key, device, count, ...)."""
    kind, kept, key, _, count, *view = identity
    name = kept.name.removeprefix("torch.").removeprefix("storage.")
    if kind != "storage" or name not in STORAGES or any(view) or not isinstance(key, str):
        raise Malformed("a storage of unknown type, or a part of one as in files of torch 0.x")
    dtype, (count,) = STORAGES[name], sizes(count)
    return Storage(dtype, *sizes(count * (dtype.itemsize if dtype else 1))), key


def flatten(value, prefix="", seen=None, depth=0):
    """(name, Stored) of all tensors in nested containers, each container once."""
    seen = set() if seen is None else seen
    value = value.state if isinstance(value, Inert) else value
    if isinstance(value, Stored):
        yield prefix, value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen and depth < DEEPEST:
        seen.add(id(value))
        if len(prefix) > LONGEST_NAME:
            raise Malformed(f"a name of more than {LONGEST_NAME:,} characters")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (Stored, Inert)) or item and isinstance(item, (dict, list, tuple)):
                yield from flatten(item, f"{prefix}.{key}" if prefix else str(key), seen, depth + 1)


def unwrap(root):
    """(weights, plain values, other tensors) of an unpickled object, without its state_dict."""
    root = root.state if isinstance(root, Inert) else root
    outer = root if isinstance(root, dict) else {}
    nested = [key for key in ("state_dict", "model") if isinstance(outer.get(key), dict)][:1]
    weights = dict(flatten(outer[nested[0]] if nested else root))
    if not weights:
        raise Malformed("it holds no tensors")
    others = {key: value for key, value in outer.items() if nested and key not in nested}
    meta = {str(key): value for key, value in outer.items() if isinstance(value, (float, str))
            or isinstance(value, int) and abs(value) < LARGEST}
    return weights, meta, dict(flatten(others))


# ------------------------------------------------------------------------------ formats

LEGACY_MAGIC = 0x1950a86a20f9469cfc6c


class Bounded(io.FileIO):
    """A file of which no more than an index is read at once."""

    def read(self, size=-1):
        if size > LARGEST_INDEX:
            raise Malformed(f"an index of more than {LARGEST_INDEX:,} bytes")
        return super().read(size if size >= 0 else LARGEST_INDEX)


def read_zip(path):
    """The object in a zip file of torch.save or torch.jit.save."""
    with Bounded(path) as file, zipfile.ZipFile(file) as archive:
        # torch.save compresses none: what is compressed is never inflated
        members = {member.filename: member for member in archive.infolist()
                   if member.compress_type == zipfile.ZIP_STORED}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise Malformed("a zip archive without an uncompressed data.pkl, so not of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(root + "byteorder")
        if order and archive.read(order) != b"little":
            raise Malformed("a file of a big-endian machine")

        def outside(identity):
            storage, key = storage_of(identity)
            member = members[f"{root}data/{key}"]
            if storage.nbytes > member.file_size:
                raise Malformed(f"storage {key} is shorter than it says")
            file.seek(member.header_offset + 26)    # of the lengths of its name and extra field
            storage.offset = sum(struct.unpack("<2H", file.read(4))) + file.tell()
            return storage

        return Unpickler(io.BytesIO(archive.read(members[pickles[0]])), outside).load()


def read_legacy(file):
    """The object in a file of torch.save before torch 1.6: five pickles, then the storages."""
    storages, stream = {}, io.BytesIO(file.read(LARGEST_INDEX))

    def outside(identity):
        storage, key = storage_of(identity)
        return storages.setdefault(key, storage)

    def load():
        return Unpickler(stream, outside).load()

    if load() != LEGACY_MAGIC:
        raise Malformed("a pickle, but not one of torch.save")
    _version, _system, root, keys = load(), load(), load(), load()
    if not all(isinstance(key, str) for key in keys):
        raise Malformed("a storage without a name")
    file.seek(stream.tell())
    for key in keys:
        count, = struct.unpack("<q", file.read(8))
        storage = storages[key]
        if count * (storage.dtype.itemsize if storage.dtype else 1) != storage.nbytes:
            raise Malformed(f"storage {key} is of another size than it says")
        storage.offset = file.tell()
        file.seek(storage.nbytes, os.SEEK_CUR)
    return root


def read_safetensors(path, file, size):
    """(entries, metadata) of a safetensors file, whose header the safetensors package checks."""
    length, = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, LARGEST_INDEX):
        raise Malformed(f"it ends within its header, or that has more than {LARGEST_INDEX:,} bytes")
    with safetensors.safe_open(path, "np"):
        header = json.loads(file.read(length))
    metadata, entries = header.pop("__metadata__", {}), {}
    for name, item in header.items():
        dtype, shape, (start, end) = SAFETENSORS[item["dtype"]], item["shape"], item["data_offsets"]
        if len(shape) > MOST_DIMENSIONS or len(name) > LONGEST_NAME:
            raise Malformed(f"a tensor of {len(shape)} dimensions, {name[:50]}")
        stride = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
        storage = Storage(dtype, end - start, 8 + length + start)
        entries[name] = Stored(storage, dtype, sizes(*shape), stride)
    return entries, metadata


def read_file(path):
    """The StateDict of a file. Raises FileNotFoundError, or ValueError with one line about it."""
    path = Path(path)
    with open(path, "rb") as file:
        size, _ = mark = stamp(file)
        try:
            entries, meta, others = parse(path, file, size)
            for name, entry in (*entries.items(), *others.items()):
                check_bounds(name, entry, size)
                entry.path, entry.stamp = path, mark
        except Malformed as err:
            raise ValueError(f"{path} is no checkpoint that can be read: {str(err)[:200]}") from err
        except Exception as err:        # Python's parsers raise every kind of it
            why = " ".join(str(err).split())[:100] or type(err).__name__
            raise ValueError(f"{path} is truncated or damaged ({size:,} bytes: {why})") from err
    return StateDict(path, entries, meta, others)


def parse(path, file, size):
    """(weights, plain values, other tensors) of an open file, whatever its format."""
    start = file.read(512)
    file.seek(0)
    if not size:
        raise Malformed("an empty file")
    if start[8:9] == b"{":      # first: the eight bytes before are a length, and may be any
        return *read_safetensors(path, file, size), {}
    if start.startswith(b"PK"):
        return unwrap(read_zip(path))
    if start.startswith(b"\x80"):
        return unwrap(read_legacy(file))
    what, way_out = mistaken_for(start, path)
    raise Malformed(f"{what}; {way_out}" if what else "neither zip, nor pickle, nor safetensors")


def check_bounds(name, entry, size):
    """Raises Malformed when a tensor does not lie within its storage, and that within its file."""
    storage = entry.storage
    if storage.offset is None or storage.offset + storage.nbytes > size:
        raise Malformed(f"it ends early, {name} is cut off")
    if entry.span and (entry.first + entry.span) * entry.dtype.itemsize > storage.nbytes:
        raise Malformed(f"{name} leaves its storage")
    if nbytes(entry) > size + SPARE:
        raise Malformed(f"{name} repeats its numbers to {nbytes(entry):,} bytes")
