"""Tensors by name: shapes and dtypes are known, values are read when they are needed.

An entry is whatever has `shape`, `dtype` and `read()`: a tensor in a file, see foreign.py, or one
that `lazy` computes from others.
"""

import json
import math
import os
import struct
import zlib
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.files import unfinished

KINDS = (      # of numbers: torch's, in a safetensors header, the storages of a pickle
    (torch.float64, "F64", "Double"), (torch.float32, "F32", "Float"),
    (torch.float16, "F16", "Half"), (torch.bfloat16, "BF16", "BFloat16"),
    (torch.int64, "I64", "Long"), (torch.int32, "I32", "Int"), (torch.int16, "I16", "Short"),
    (torch.int8, "I8", "Char"), (torch.uint8, "U8", "Byte"), (torch.bool, "BOOL", "Bool"),
    (torch.complex64, "C64", "ComplexFloat"), (torch.complex128, "", "ComplexDouble"),
    (torch.uint64, "U64", ""), (torch.uint32, "U32", ""), (torch.uint16, "U16", ""),
    (torch.float8_e4m3fn, "F8_E4M3", ""), (torch.float8_e5m2, "F8_E5M2", ""))
SAFETENSORS = {name: dtype for dtype, name, _ in KINDS if name}
LARGEST = 2**62                 # numbers in a file that are larger are no sizes
SHOWN = 5                       # names of each kind, of tensors that do not fit


@dataclass(slots=True)
class LazyTensor:
    """A tensor that is computed from others when it is read."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def lazy(function, *entries):
    """The LazyTensor, dense, of what a function makes of the tensors of entries. Its shape and type
    are found without values. Raises ValueError where it does not take such tensors."""
    try:
        like = function(*(torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries))
    except (RuntimeError, IndexError) as err:
        raise ValueError(f"tensors of shapes {', '.join(str(list(e.shape)) for e in entries)} are "
                         "not what they should be by their names") from err
    return LazyTensor(like.dtype, tuple(like.shape),
                      lambda: function(*(e.read() for e in entries)).contiguous())


class StateDict(UserDict):
    """Tensors by name, each read when it is asked for; `entries[name]` has its shape and dtype.

    `meta` holds the plain numbers and strings of a file (epoch, global_step, ...), `others` the
    entries that are not weights (the optimizer's).
    """

    def __init__(self, path, entries, meta=None, others=None):
        self.path, self.entries, self.data = Path(path), entries, entries
        self.meta, self.others = meta or {}, others or {}

    def __getitem__(self, name):
        return self.entries[name].read()

    @property
    def step(self):
        """Optimizer steps behind the weights, where the file says so; else 0."""
        step = str(self.meta.get("global_step", self.meta.get("step", 0)))
        return int(step[:20]) if step.isdecimal() and int(step[:20]) < LARGEST else 0


def nbytes(entry):
    """Bytes that a tensor, or an entry of a StateDict, has when it is packed densely."""
    return math.prod(entry.shape) * entry.dtype.itemsize


def misfit(found, wanted):
    """What does not fit of two dicts by name, of tensors, entries or shapes, in one line; or ""."""
    found, wanted = ({name: list(getattr(value, "shape", value)) for name, value in side.items()}
                     for side in (found, wanted))
    lists = {"missing": [name for name in wanted if name not in found],
             "unexpected": [name for name in found if name not in wanted],
             "misshapen": [f"{name} {found[name]} instead of {wanted[name]}" for name in found
                           if name in wanted and found[name] != wanted[name]]}
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:SHOWN])}"
                     + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN) + ")"
                     for kind, names in lists.items() if names)


def pack(tensors, metadata=None):
    """Yields the bytes of a safetensors file of tensors (a dict or StateDict), one at a time; the
    same for the same input: the package orders metadata at random."""
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
    with unfinished(path) as partial, open(partial, "wb") as file:
        for part in pack(tensors, metadata):
            size, crc = size + len(part), zlib.crc32(part, crc)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return size, crc
