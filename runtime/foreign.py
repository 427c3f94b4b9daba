"""Files of tensors, read lazily and never executed: `.ckpt`/`.pt` (zip and legacy), safetensors.

A pickle's opcodes are interpreted here: tensors and plain containers are built, any other class
becomes an `Inert` object. Nothing that a file names is ever imported or called. Files are mapped:
the bytes of a tensor are read only when it is used.
"""

import io
import json
import math
import mmap
import os
import pickletools
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

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


@dataclass
class Storage:
    """A run of bytes in a file. `dtype` is None where its elements have no type of their own."""
    dtype: torch.dtype | None
    nbytes: int
    offset: int | None = None


@dataclass
class Stored:
    """A tensor that lies in a file: `read()` reads its bytes and nothing else."""
    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int                          # index of its first element in the storage
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


@dataclass
class LazyTensor:
    """A tensor that is computed from others when it is read."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class StateDict(Mapping):
    """StateDict by name, each read when it is asked for; `entries[name]` has its shape and dtype.

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
        return int(step) if step.isdecimal() else 0


def stamp(file):
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def nbytes(entry):
    """Bytes that a tensor, or an entry of StateDict, has when it is packed densely."""
    return math.prod(entry.shape) * entry.dtype.itemsize


# ------------------------------------------------------------------------------ pickles

class Malformed(Exception):
    """What a file holds that no writer of checkpoints puts there."""


class Global(str):
    """The name of a class or function, "module.name"."""


class Inert:
    """Stands for an object of any other class: keeps its state and does nothing."""
    state = None


def named(module, *names):
    return {f"{module}.{name}" for name in names}


BUILTINS = ("__builtin__", "builtins")
DICTS = named("collections", "OrderedDict", "defaultdict") | {f"{m}.dict" for m in BUILTINS}
LISTS = {f"{m}.{kind}" for m in BUILTINS for kind in ("list", "set", "tuple")} | {"torch.Size"}
VIEWS = named("torch._utils", "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
PARAMETERS = named("torch._utils", "_rebuild_parameter", "_rebuild_parameter_with_state")
SUBCLASS = "torch._tensor._rebuild_from_type_v2"


def sizes(*values):
    """The values, when all are numbers that a size can be. Raises Malformed otherwise."""
    if not all(type(n) is int and 0 <= n < LARGEST for n in values):
        raise Malformed("an impossible size")
    return values


def view(storage, first, shape, stride, *rest):
    """torch._utils._rebuild_tensor(storage, first, shape, stride[, grad, hooks[, dtype]])."""
    typed = len(rest) > 2 and isinstance(rest[2], str)
    dtype = DTYPES[rest[2]] if typed else storage.dtype
    return Stored(storage, dtype, sizes(*shape), sizes(*stride), *sizes(first))


def construct(function, arguments):
    """What calling `function` would give if that is a tensor or a plain container, else Inert."""
    name = str(function) if isinstance(function, Global) else ""
    if name in VIEWS:
        return view(*arguments)
    if name in PARAMETERS:
        return arguments[0]
    if name == SUBCLASS:
        return construct(arguments[0], arguments[2])
    items = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else ()
    if name in DICTS:
        filled = {}
        put(filled, [part for pair in items for part in pair])
        return filled
    if name in LISTS:
        return tuple(items) if name.endswith(("tuple", "Size")) else list(items)
    return Inert()


def put(target, keys_and_values):
    """Plain keys only: hashing nested tuples can be made to take forever."""
    if isinstance(target, dict):
        for key, value in zip(keys_and_values[::2], keys_and_values[1::2]):
            if isinstance(key, (str, int, float, bytes)):
                target[key] = value


VALUES = frozenset((        # opcodes whose argument is the value: numbers, strings, bytes
    "BININT1", "BINUNICODE", "BININT2", "BININT", "INT", "LONG", "LONG1", "LONG4", "FLOAT",
    "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"))
PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def unpickle(stream, outside):
    """The object that a pickle describes; outside(id) gives what it only refers to.

    The stream is left behind the pickle. Raises Malformed, or one of DAMAGED.
    """
    stack, marks, memo = [], [], {}

    def since_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(stream):
        match opcode.name:              # the most frequent ones first
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case name if name in VALUES:
                stack.append(argument)
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "REDUCE" | "NEWOBJ":
                function, arguments = stack.pop(-2), stack.pop()
                stack.append(construct(function, arguments))
            case "BINPERSID":
                stack.append(outside(stack.pop()))
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" as constant:
                stack.append(PLAIN[constant])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as op:
                count = int(op[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "LIST" | "FROZENSET":
                stack.append(since_mark())
            case "DICT":
                items = since_mark()
                stack.append({})
                put(stack[-1], items)
            case "POP":
                (marks if marks and marks[-1] == len(stack) else stack).pop()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "APPEND" | "APPENDS" | "ADDITEMS" as op:
                items = [stack.pop()] if op == "APPEND" else since_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "SETITEM":
                key, value = stack.pop(-2), stack.pop()
                put(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                put(stack[-1], items)
            case "GLOBAL":
                stack.append(Global(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                module, name = stack.pop(-2), stack.pop()
                stack.append(Global(module + "." + name))
            case "NEWOBJ_EX":
                function, arguments, _ = stack.pop(-3), stack.pop(-2), stack.pop()
                stack.append(construct(function, arguments))
            case "INST":
                stack.append(construct(Global(argument.replace(" ", ".", 1)), since_mark()))
            case "OBJ":
                function, *arguments = since_mark()
                stack.append(construct(function, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
            case "PERSID":
                stack.append(outside(argument))
            case name:
                raise Malformed(f"the pickle opcode {name}")
    raise Malformed("a pickle without an end")


def storage_of(identity):
    """(Storage, key, rest) of the persistent id ("storage", class, key, device, count, *rest)."""
    kind, name, key, _, count, *rest = identity
    module, _, name = name.rpartition(".") if isinstance(name, Global) else ("", "", "")
    if kind != "storage" or module not in ("torch", "torch.storage") or name not in STORAGES:
        raise Malformed("a storage of unknown type")
    dtype = STORAGES[name]
    return Storage(dtype, *sizes(count * (dtype.itemsize if dtype else 1))), str(key), rest


def flatten(value, prefix="", seen=None, depth=0):
    """(name, Stored) of all tensors in nested containers, each container once."""
    seen = set() if seen is None else seen
    value = value.state if isinstance(value, Inert) else value
    deepest = 32
    if isinstance(value, Stored):
        yield prefix, value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen and depth < deepest:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key), seen, depth + 1)


def unwrap(root):
    """(weights, plain values, other tensors) of an unpickled object, without its state_dict."""
    root = root.state if isinstance(root, Inert) else root
    outer = root if isinstance(root, dict) else {}
    nested = [key for key in ("state_dict", "model") if isinstance(outer.get(key), dict)][:1]
    weights = dict(flatten(outer[nested[0]] if nested else root))
    others = {key: value for key, value in outer.items() if key not in nested} if nested else {}
    meta = {str(k): v for k, v in outer.items() if isinstance(v, (int, float, str))}
    return weights, meta, dict(flatten(others))


# ------------------------------------------------------------------------------ formats

ZIP_HEADER = struct.Struct("<4s5H3I2H")     # of a member; at the end, lengths of name and extra
LEGACY_MAGIC = 0x1950a86a20f9469cfc6c


def read_zip(file):
    """The object in a zip file of torch.save or torch.jit.save."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise Malformed("a zip archive without data.pkl, so not one of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if any(member.compress_type != zipfile.ZIP_STORED for name, member in members.items()
               if name == pickles[0] or name.startswith(root + "data/")):
            raise Malformed("a compressed zip archive; torch.save does not compress")
        if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
            raise Malformed("a file of a big-endian machine")

        def outside(identity):
            storage, key, _ = storage_of(identity)
            member = members[f"{root}data/{key}"]
            if storage.nbytes > member.file_size:
                raise Malformed(f"storage {key} is shorter than it says")
            file.seek(member.header_offset)
            *_, name_length, extra_length = ZIP_HEADER.unpack(file.read(ZIP_HEADER.size))
            storage.offset = file.tell() + name_length + extra_length
            return storage

        return unpickle(io.BytesIO(archive.read(pickles[0])), outside)


def read_legacy(file):
    """The object in a file of torch.save before torch 1.6: five pickles, then the storages."""
    storages, parts = {}, []

    def outside(identity):
        if identity[0] == "module":
            return identity[1]
        storage, key, rest = storage_of(identity)
        whole = storages.setdefault(key, storage)
        if not rest or rest[0] is None:
            return whole
        _, first, count = rest[0]
        size = storage.dtype.itemsize
        parts.append((Storage(storage.dtype, *sizes(count * size)), key, *sizes(first * size)))
        return parts[-1][0]

    if unpickle(file, outside) != LEGACY_MAGIC:
        raise Malformed("a pickle, but not one of torch.save")
    _version, system = unpickle(file, outside), unpickle(file, outside)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Malformed("a file of a big-endian machine")
    root = unpickle(file, outside)
    for key in unpickle(file, outside):
        count, = struct.unpack("<q", file.read(8))
        storage = storages[key]
        if count * (storage.dtype.itemsize if storage.dtype else 1) != storage.nbytes:
            raise Malformed(f"storage {key} is of another size than it says")
        storage.offset = file.tell()
        file.seek(storage.nbytes, os.SEEK_CUR)
    for part, key, first in parts:
        part.offset = storages[key].offset + first
        if first + part.nbytes > storages[key].nbytes:
            raise Malformed(f"a view leaves storage {key}")
    return root


def read_safetensors(file, size):
    """(entries, metadata) of a safetensors file."""
    length, = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise Malformed("it ends within its header")
    header = json.loads(file.read(length))
    metadata, entries = header.pop("__metadata__", {}), {}
    for name, item in header.items():
        dtype, shape = SAFETENSORS[item["dtype"]], sizes(*item["shape"])
        start, end = sizes(*item["data_offsets"])
        stride = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
        storage = Storage(dtype, end - start, 8 + length + start)
        entries[name] = Stored(storage, dtype, shape, stride, 0)
        if storage.nbytes != nbytes(entries[name]):
            raise Malformed(f"{name} is of another size than its shape")
    return entries, metadata if isinstance(metadata, dict) else {}


DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, IndexError,
           KeyError, TypeError, AttributeError, NotImplementedError, OverflowError, RecursionError,
           MemoryError, RuntimeError)


def read_file(path):
    """The StateDict of a file. Raises FileNotFoundError, or ValueError with one line about it."""
    with open(path, "rb") as file:
        size, _ = mark = stamp(file)
        try:
            entries, meta, others = parse(file, size)
            path = Path(path)
            for name, entry in (*entries.items(), *others.items()):
                check_bounds(name, entry, size)
                entry.path, entry.stamp = path, mark
        except Malformed as err:
            raise ValueError(f"{path} is no checkpoint that can be read: {err}") from err
        except DAMAGED as err:
            why = " ".join(str(err).split())[:100] or type(err).__name__
            raise ValueError(f"{path} is truncated or damaged ({size:,} bytes: {why})") from err
    return StateDict(path, entries, meta, others)


def parse(file, size):
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
        return *read_safetensors(file, size), {}
    if start.startswith(b"PK"):
        found = unwrap(read_zip(file))
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


@contextmanager
def unfinished(path):
    """A name to write a file or folder under, which becomes `path` when all went well.

    When not, nothing is left of it. A file that `path` was before lives on until then.
    """
    path = Path(path)
    partial = path.with_name(f".unfinished_{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def pack(tensors, metadata=None):
    """Yields the bytes of a safetensors file: its header, then tensors (a dict or StateDict), one at
    a time. The same for the same input, which the safetensors package does not promise."""
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
