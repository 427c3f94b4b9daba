"""Files of tensors, read lazily and never executed: `.ckpt`/`.pt` (zip and legacy), safetensors.

Python's own unpickler reads pickles, with everything that could act taken out: tensors and plain
containers are built, each class or function that a file names is an `Inert` stand-in, nothing is
imported or called. torch.load(weights_only=True) is safe too, but it refuses what people have
(protocol 4, TorchScript, any class it does not know), and it hashes every key and calls
`bytearray(n)` and `codecs.encode` for a file, so that a few bytes can take hours or all memory.
What a file says of itself is bounded before it is believed: LARGEST_INDEX and the limits beside it.
The safetensors package checks the headers of its files. Files are mapped: the bytes of a tensor are
read only when it is used.
"""

import io
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from runtime.files import unfinished

SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": None,
}
DTYPES = {str(dtype): dtype for dtype in SAFETENSORS.values()}
LARGEST = 2**62                 # numbers in a file that are larger are no sizes
LARGEST_INDEX = 5 << 19         # bytes of a pickle, a header or a directory; zero123-xl has 0.4 MB
MOST_TENSORS = 100_000          # in a file; zero123-xl has 3,800
MOST_DIMENSIONS = 16            # of a tensor
LONGEST_NAME = 1000             # characters
DEEPEST = 32                    # containers within containers, of which tensors are looked for
SPARE = 1 << 30                 # bytes that a tensor may take beyond those of its whole file


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
        """The tensor, mapped from its file; what is written to it stays in memory.

        The mapping goes with the tensor; the file may be renamed, replaced or removed before, but
        not be written over in place. Raises ValueError when it has changed since it was opened.
        """
        if not self.span:
            return torch.empty(0, dtype=self.dtype).as_strided(self.shape, self.stride)
        start = self.storage.offset + self.first * self.dtype.itemsize
        skip = start % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            if stamp(file) != self.stamp:
                raise ValueError(f"{self.path} has changed since it was opened")
            mapped = mmap.mmap(file.fileno(), skip + self.span * self.dtype.itemsize,
                               access=mmap.ACCESS_COPY, offset=start - skip)
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_WILLNEED)      # the system begins to read, and we go on
        if skip % self.dtype.itemsize:
            mapped, skip = bytearray(mapped[skip:]), 0      # legacy files align nothing
        flat = torch.frombuffer(mapped, dtype=self.dtype, count=self.span, offset=skip)
        return flat.as_strided(self.shape, self.stride)


@dataclass(slots=True)
class LazyTensor:
    """A tensor that is computed from others when it is read."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class StateDict(Mapping):
    """Tensors by name, each read when it is asked for; `entries[name]` has its shape and dtype.

    `meta` holds the plain numbers and strings of a file (epoch, global_step, ...), `others` the
    entries that are not weights (the optimizer's).
    """

    def __init__(self, path, entries, meta=None, others=None):
        self.path, self.entries = Path(path), entries
        self.meta, self.others = meta or {}, others or {}

    def __getitem__(self, name):
        return self.entries[name].read()

    def __contains__(self, name):
        return name in self.entries

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)

    @property
    def step(self):
        """Optimizer steps behind the weights, where the file says so; else 0."""
        step = str(self.meta.get("global_step", self.meta.get("step", 0)))
        return int(step) if step.isdecimal() and int(step[:20]) < LARGEST else 0


def stamp(file):
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def nbytes(entry):
    """Bytes that a tensor, or an entry of a StateDict, has when it is packed densely."""
    return math.prod(entry.shape) * entry.dtype.itemsize


# ------------------------------------------------------------------------------ pickles

class Malformed(Exception):
    """What a file holds that no writer of checkpoints puts there."""


@dataclass(slots=True)
class Inert:
    """Stands for a class, a function or an object of a file: it has its name or state, and does
    nothing, whatever a pickle makes of it."""
    name: str = ""
    state: object = None

    def ignore(self, *_):
        return Inert()

    __call__ = __setitem__ = append = extend = ignore


class Names(dict):
    """A dict of strings and whole numbers: hashing nested tuples, or numbers of one hash, can be
    made to take for ever."""

    def __setitem__(self, key, value):
        if isinstance(key, str) or isinstance(key, int) and abs(key) < LARGEST:
            super().__setitem__(key, value)


BUILTINS = ("__builtin__", "builtins")
DICTS = {"collections.OrderedDict", "collections.defaultdict", *(f"{m}.dict" for m in BUILTINS)}
LISTS = {"torch.Size", *(f"{m}.{kind}" for m in BUILTINS for kind in ("list", "set", "tuple"))}
VIEWS = {"torch._utils._rebuild_tensor" + version for version in ("", "_v2", "_v3")}
PARAMETERS = {"torch._utils._rebuild_parameter" + end for end in ("", "_with_state")}
SUBCLASS = "torch._tensor._rebuild_from_type_v2"


def sizes(*values):
    """The values, when all are numbers that a size can be. Raises Malformed otherwise."""
    if not all(type(n) is int and 0 <= n < LARGEST for n in values):
        raise Malformed("an impossible size")
    return values


PYTHONS = pickle._Unpickler.dispatch
UNUSED_CODES = b"".join((pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.DICT, pickle.NEXT_BUFFER,
                         pickle.READONLY_BUFFER))


class Unpickler(pickle._Unpickler):
    """Builds what a pickle describes of tensors and plain containers; `outside(id)` gives what it
    only refers to. Raises Malformed, or one of DAMAGED.

    Every opcode that would call, create, or hash what a file chooses is replaced.
    """
    dispatch = {code: read for code, read in PYTHONS.items() if code not in UNUSED_CODES}
    # sets are read as lists. Python's own BYTEARRAY8 takes all of its memory before it reads
    dispatch |= {code[0]: PYTHONS[like[0]] for code, like in (
        (pickle.EMPTY_SET, pickle.EMPTY_LIST), (pickle.ADDITEMS, pickle.APPENDS),
        (pickle.FROZENSET, pickle.LIST), (pickle.BYTEARRAY8, pickle.BINBYTES8))}

    def __init__(self, stream, outside):
        super().__init__(stream, encoding="latin-1")
        self.persistent_load, self.tensors, self.copied = outside, 0, 0

    def find_class(self, module, name):
        return Inert(f"{module}.{name}")

    def construct(self, function, arguments):
        """What calling `function` would give if that is a tensor or a plain container, else an
        Inert."""
        name = function.name if isinstance(function, Inert) else ""
        if name in VIEWS:
            return self.view(*arguments)
        if name in PARAMETERS:
            return arguments[0]
        if name == SUBCLASS:
            return self.construct(arguments[0], arguments[2])
        items = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else ()
        if name in DICTS:
            filled, self.copied = Names(), self.copied + len(items)
            if self.copied > LARGEST_INDEX // 8:        # a pair takes more bytes than that
                raise Malformed("a list that it repeats without end")
            for key, value in items:
                filled[key] = value
            return filled
        return items if name in LISTS else Inert()

    def view(self, storage, first, shape, stride, *rest):
        """torch._utils._rebuild_tensor(storage, first, shape, stride[, grad, hooks[, dtype]])."""
        self.tensors += 1
        if self.tensors > MOST_TENSORS or max(len(shape), len(stride)) > MOST_DIMENSIONS:
            raise Malformed(f"more than {MOST_TENSORS:,} tensors, or {MOST_DIMENSIONS} dimensions")
        typed = len(rest) > 2 and isinstance(rest[2], Inert)
        dtype = DTYPES[rest[2].name] if typed else storage.dtype
        if dtype is None:
            raise Malformed("a tensor without a type")
        return Stored(storage, dtype, sizes(*shape), sizes(*stride), *sizes(first))

    def load_empty_dict(self):
        self.append(Names())

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self.construct(function, arguments))

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


def elements(dtype, count):
    """The bytes of `count` elements of a storage. Raises Malformed where that is no size."""
    return sizes(*sizes(count), count * (dtype.itemsize if dtype else 1))[1]


def storage_of(identity):
    """(Storage, key, rest) of the persistent id ("storage", class, key, device, count, *rest)."""
    kind, kept, key, _, count, *rest = identity
    module, _, name = kept.name.rpartition(".")
    if kind != "storage" or module not in ("torch", "torch.storage") or name not in STORAGES:
        raise Malformed("a storage of unknown type")
    dtype = STORAGES[name]
    return Storage(dtype, elements(dtype, count)), str(key), rest


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
    others = {key: value for key, value in outer.items() if key not in nested} if nested else {}
    meta = {str(key): value for key, value in outer.items() if isinstance(value, (float, str))
            or isinstance(value, int) and abs(value) < LARGEST}
    return weights, meta, dict(flatten(others))


# ------------------------------------------------------------------------------ formats

ZIP_HEADER = struct.Struct("<4s5H3I2H")     # of a member; at the end, lengths of name and extra
LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
BIG_ENDIAN = "a file of a big-endian machine"


class Bounded(io.FileIO):
    """A file of which no more than an index is read at once."""

    def read(self, size=-1):
        if size > LARGEST_INDEX:
            raise Malformed(f"an index of more than {LARGEST_INDEX:,} bytes")
        return super().read(size if size >= 0 else LARGEST_INDEX)


def read_zip(path):
    """The object in a zip file of torch.save or torch.jit.save."""
    with Bounded(path) as file, zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise Malformed("a zip archive without data.pkl, so not one of torch.save")
        root = pickles[0].removesuffix("data.pkl")

        def plain(name):
            if members[name].compress_type != zipfile.ZIP_STORED:
                raise Malformed("a compressed zip archive; torch.save does not compress")
            return members[name]

        def content(name):
            if plain(name).file_size > LARGEST_INDEX:
                raise Malformed(f"its {name} has more than {LARGEST_INDEX:,} bytes")
            return archive.read(name)

        if root + "byteorder" in members and content(root + "byteorder") != b"little":
            raise Malformed(BIG_ENDIAN)

        def outside(identity):
            storage, key, _ = storage_of(identity)
            member = plain(f"{root}data/{key}")
            if storage.nbytes > member.file_size:
                raise Malformed(f"storage {key} is shorter than it says")
            file.seek(member.header_offset)
            *_, name_length, extra_length = ZIP_HEADER.unpack(file.read(ZIP_HEADER.size))
            storage.offset = file.tell() + name_length + extra_length
            return storage

        return Unpickler(io.BytesIO(content(pickles[0])), outside).load()


def read_legacy(file):
    """The object in a file of torch.save before torch 1.6: five pickles, then the storages."""
    storages, parts, stream = {}, [], io.BytesIO(file.read(LARGEST_INDEX))

    def outside(identity):
        if identity[0] == "module":
            return identity[1]
        storage, key, rest = storage_of(identity)
        whole = storages.setdefault(key, storage)
        if not rest or rest[0] is None:
            return whole
        _, first, count = rest[0]
        part = Storage(storage.dtype, elements(storage.dtype, count))
        parts.append((part, key, elements(storage.dtype, first)))
        return part

    def load():
        return Unpickler(stream, outside).load()

    if load() != LEGACY_MAGIC:
        raise Malformed("a pickle, but not one of torch.save")
    _version, system = load(), load()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Malformed(BIG_ENDIAN)
    root, keys = load(), load()
    file.seek(stream.tell())
    for key in keys:
        count, = struct.unpack("<q", file.read(8))
        storage = storages[key]
        if elements(storage.dtype, count) != storage.nbytes:
            raise Malformed(f"storage {key} is of another size than it says")
        storage.offset = file.tell()
        file.seek(storage.nbytes, os.SEEK_CUR)
    for part, key, first in parts:
        part.offset = storages[key].offset + first
        if first + part.nbytes > storages[key].nbytes:
            raise Malformed(f"a view leaves storage {key}")
    return root


def read_safetensors(path, file, size):
    """(entries, metadata) of a safetensors file, whose header the safetensors package checks."""
    length, = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise Malformed("it ends within its header")
    if length > LARGEST_INDEX:
        raise Malformed(f"its header has more than {LARGEST_INDEX:,} bytes")
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


DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError,
           ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError,
           NotImplementedError, OverflowError, MemoryError, RuntimeError,
           safetensors.SafetensorError)


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
            raise ValueError(f"{path} is no checkpoint that can be read: {err}") from err
        except DAMAGED as err:
            why = " ".join(str(err).split())[:100] or type(err).__name__
            raise ValueError(f"{path} is truncated or damaged ({size:,} bytes: {why})") from err
    return StateDict(path, entries, meta, others)


def parse(path, file, size):
    """(weights, plain values, other tensors) of an open file, whatever its format."""
    start = file.read(512)
    file.seek(0)
    if not size:
        raise Malformed("an empty file")
    if start.lstrip()[:1] == b"<":
        raise Malformed("an HTML or XML page, so a download that went wrong")
    if start.startswith(b"version https://git-lfs"):
        raise Malformed("a pointer of Git LFS; `git lfs pull` fetches the file itself")
    if start[8:9] == b"{":      # first: the eight bytes before are a length, and may be any
        return *read_safetensors(path, file, size), {}
    if start.startswith(b"PK"):
        found = unwrap(read_zip(path))
    elif start.startswith(b"\x80"):
        found = unwrap(read_legacy(file))
    else:
        raise Malformed("neither a zip, nor a pickle, nor safetensors")
    if not found[0]:
        raise Malformed("it holds no tensors")
    return found


def check_bounds(name, entry, size):
    """Raises Malformed when a tensor does not lie within its storage, and that within its file."""
    storage = entry.storage
    if storage.offset is None or storage.offset + storage.nbytes > size:
        raise Malformed(f"it ends early, {name} is cut off")
    if entry.span and (entry.first + entry.span) * entry.dtype.itemsize > storage.nbytes:
        raise Malformed(f"{name} leaves its storage")
    if nbytes(entry) > size + SPARE:
        raise Malformed(f"{name} repeats its numbers to {nbytes(entry):,} bytes")


# ------------------------------------------------------------------------------ writing

def pack(tensors, metadata=None):
    """Yields the bytes of a safetensors file: its header, then tensors (a dict or StateDict), one
    at a time, so that no more than one is in memory twice and its checksum is taken as it is
    written. The same for the same input: the safetensors package orders metadata at random."""
    entries = dict(getattr(tensors, "entries", tensors))
    kinds = {dtype: name for name, dtype in SAFETENSORS.items()}
    order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)     # keeps all aligned
    # transformers opens no file that does not say "pt"
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name in order:
        start, end = end, end + nbytes(entries[name])
        header[name] = {"dtype": kinds[entries[name].dtype], "shape": list(entries[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        if nbytes(entries[name]):
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy()


def write_safetensors(path, tensors, metadata=None):
    """Writes tensors by name (a dict or StateDict), one at a time. Returns its (bytes, CRC-32).

    A file of that name is replaced when the new one is whole, so tensors mapped from it live on.
    """
    size = crc = 0
    with unfinished(path) as partial, open(partial, "wb", buffering=0) as file:
        for part in pack(tensors, metadata):
            rest = memoryview(part)
            size, crc = size + rest.nbytes, zlib.crc32(rest, crc)
            while rest:
                rest = rest[file.write(rest):]
        os.fsync(file.fileno())
    return size, crc
