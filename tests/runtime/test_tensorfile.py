"""tensorfile.py: every good file reads as torch.load reads it, no bad one runs or half-loads."""

import contextlib
import json
import pickle
import struct
import sys
import time
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import fuzz_checkpoints
import numpy as np
import pytest
import safetensors
import torch
from golden import FOLDER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from runtime import foreign as tensorfile
from runtime.tensors import write_safetensors

FILES = FOLDER / "checkpoints"
MARKER = Path("/tmp/pwned_marker")
GOOD = ["lightning.ckpt", "lightning_legacy.ckpt", "bare_state_dict.ckpt",
        "ordered_with_parameters.ckpt", "state_dict.safetensors"]
BAD = ["truncated.ckpt", "truncated_legacy.ckpt", "truncated.safetensors"]
MALICIOUS = ["malicious_os_system.ckpt", "malicious_os_system_legacy.ckpt"]


@pytest.fixture(autouse=True)
def nothing_is_executed():
    MARKER.unlink(missing_ok=True)
    yield
    assert not MARKER.exists(), "a file was executed"


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as error:
        tensorfile.read_file(path)
    text = str(error.value)
    assert "\n" not in text and Path(path).name in text
    return text


# ---- golden files

@pytest.mark.parametrize("name", GOOD)
def test_golden_file_reads_bit_for_bit(name):
    found = tensorfile.read_file(FILES / name)
    assert_same(found, load_file(FILES / "state_dict.safetensors"))
    if name.startswith("lightning"):
        assert (found.meta["epoch"], found.meta["global_step"], found.step) == (3, 1234, 1234)
        assert any(other.endswith("exp_avg") for other in found.others)


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_file_is_read_without_running_it(name):
    assert_same(tensorfile.read_file(FILES / name), load_file(FILES / "state_dict.safetensors"))


@pytest.mark.parametrize("name", BAD)
def test_truncated_golden_file_is_refused_in_one_line(name):
    refusal(FILES / name)


# ---- equal to torch.load

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64]


@st.composite
def tensors(draw):
    """A tensor as models have them: whole, transposed, sliced, expanded, a scalar, empty."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    seed, dtype = draw(st.integers(0, 2**20)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
    change = draw(st.sampled_from(["none", "transpose", "slice", "expand", "parameter"]))
    if change == "transpose" and tensor.ndim > 1:
        tensor = tensor.transpose(0, -1)
    elif change == "slice" and tensor.ndim and tensor.shape[0] > 1:
        tensor = tensor[1:]
    elif change == "expand":
        tensor = tensor[None].expand(3, *tensor.shape)
    elif change == "parameter" and (tensor.is_floating_point() or tensor.is_complex()):
        tensor = torch.nn.Parameter(tensor)
    return tensor


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(min_size=1, max_size=8), tensors(), min_size=1, max_size=5),
       st.booleans(), st.booleans())
def test_whatever_torch_saves_reads_as_torch_loads_it(tmp_path_factory, state, nested, modern):
    path = tmp_path_factory.mktemp("property") / "x.pt"
    name, first = next(iter(state.items()))
    state = {**state, name + "'s twin": first}      # shares its storage
    saved = {"state_dict": OrderedDict(state), "epoch": 2} if nested else state
    torch.save(saved, path, _use_new_zipfile_serialization=modern)
    expected = torch.load(path, weights_only=True)
    found = tensorfile.read_file(path)
    assert_same(found, expected["state_dict"] if nested else expected)
    assert all(found[key].stride() == tensor.stride() for key, tensor in state.items())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_reads(tmp_path, protocol):
    state = {"a": torch.arange(6.0).view(2, 3), "b": {"c": torch.ones(2)}}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    found = tensorfile.read_file(tmp_path / "x.pt")
    assert_same(found, {"a": state["a"], "b.c": state["b"]["c"]})


def test_a_tensor_with_attributes_reads_as_the_tensor(tmp_path):
    tensor = torch.arange(3.0)
    tensor.note = "torch saves it by another function then"
    torch.save({"w": tensor}, tmp_path / "x.pt")
    assert_same(tensorfile.read_file(tmp_path / "x.pt"), {"w": tensor})


def test_tensors_are_aligned_where_their_file_aligns_nothing(tmp_path):
    state = {f"{i}": torch.arange(i + 1, dtype=dtype) for i, dtype in enumerate(
        [torch.uint8, torch.float64, torch.int8, torch.float32, torch.uint8, torch.float16])}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    found = tensorfile.read_file(tmp_path / "x.pt")
    assert any(entry.storage.offset % entry.dtype.itemsize for entry in found.entries.values())
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())
    assert_same(found, state)


class Odd:
    """An object of a class that the reader must not know."""
    def __init__(self):
        self.cache = {"k": [1, 2.5, "text", None, True, {3}, frozenset({4}), b"bytes", 2**70]}


def test_objects_of_any_class_are_left_out(tmp_path):
    state = {"w": torch.ones(3), "odd": Odd(), "array": np.arange(3), "lists": [1, [2]],
             "default": defaultdict(list, a=[1]), "dtype": torch.float16, "size": torch.Size([2])}
    for modern in (True, False):
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=modern)
        assert_same(tensorfile.read_file(tmp_path / "x.pt"), {"w": state["w"]})


def test_a_class_that_a_file_names_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "side_effect.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import side_effect
    torch.save({"w": torch.ones(1), "thing": side_effect.Thing()}, tmp_path / "x.pt")
    del sys.modules["side_effect"]
    assert list(tensorfile.read_file(tmp_path / "x.pt")) == ["w"]
    assert "side_effect" not in sys.modules


def test_scripted_module_reads_as_its_state_dict(tmp_path):
    # OpenAI publishes CLIP in this form
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    with pytest.warns(DeprecationWarning):
        torch.jit.script(module).save(tmp_path / "x.pt")
    assert_same(tensorfile.read_file(tmp_path / "x.pt"), module.state_dict())


def test_legacy_views_of_a_storage_are_refused(tmp_path):
    # files of torch 0.x refer to parts of a storage as (key, first, count)
    torch.save({"w": torch.arange(10.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    old = b"K\nN"                                   # 10 elements, no view
    assert data.count(old) == 1
    # (key, first 2, count 5), and a tensor of 5 elements
    data = data.replace(old, b"K\nX\x01\x00\x00\x00vK\x02K\x05\x87")
    (tmp_path / "x.pt").write_bytes(data.replace(b"K\n\x85", b"K\x05\x85"))
    assert "a part of one" in refusal(tmp_path / "x.pt")


# ---- only what is wanted, only as it was

def test_a_small_tensor_of_a_huge_file_reads_alone(tmp_path):
    huge = 1 << 40
    header = json.dumps({"huge": {"dtype": "U8", "shape": [huge], "data_offsets": [0, huge]},
                         "end": {"dtype": "U8", "shape": [4], "data_offsets": [huge, huge + 4]}})
    header = header.encode()
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(huge, 1)                          # a hole: it takes no room on the disk
        file.write(b"abcd")
    found = tensorfile.read_file(tmp_path / "x.safetensors")
    assert bytes(found["end"].tolist()) == b"abcd"


@pytest.mark.parametrize("modern", [True, False])
def test_what_is_written_to_a_tensor_does_not_reach_the_file(tmp_path, modern):
    torch.save({"w": torch.zeros(3000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=modern)
    before = (tmp_path / "x.pt").read_bytes()
    found = tensorfile.read_file(tmp_path / "x.pt")
    found["w"].fill_(7)
    assert torch.equal(found["w"], torch.zeros(3000))
    assert (tmp_path / "x.pt").read_bytes() == before


def test_a_file_is_written_from_its_own_tensors(tmp_path):
    write_safetensors(tmp_path / "x", {"w": torch.arange(9000.0)})
    state = dict(tensorfile.read_file(tmp_path / "x"))
    write_safetensors(tmp_path / "x", state | {"b": torch.ones(3)})
    assert_same(tensorfile.read_file(tmp_path / "x"), state | {"b": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_tensor_outlives_the_name_of_its_file(tmp_path):
    # pruning and converting give names to other files; what was loaded stays
    torch.save({"w": torch.arange(3000.0)}, tmp_path / "x.pt")
    tensor = tensorfile.read_file(tmp_path / "x.pt")["w"]
    torch.save({"w": torch.zeros(3000)}, tmp_path / "y.pt")
    (tmp_path / "y.pt").replace(tmp_path / "x.pt")
    assert torch.equal(tensor, torch.arange(3000.0))


def test_a_file_that_was_replaced_is_noticed(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "x.pt")
    found = tensorfile.read_file(tmp_path / "x.pt")
    torch.save({"w": torch.zeros(300)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="has changed"):
        found["w"]


# ---- what is no checkpoint

def zip_with(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr("x/" + name.replace("_", "."), data)


NOTHING = pickle.dumps({}, protocol=2)


@pytest.mark.parametrize("data, message", [
    (b"", "an empty file"),
    (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (b"weights weights weights", "neither zip"),
    (np.random.default_rng(0).bytes(1000), "neither zip"),
    (NOTHING, "not one of torch.save"),
    (b"PK\x03\x04 no zip after all", "not a zip"),
    (struct.pack("<Q", 10**6) + b"{}", "within its header"),
    (struct.pack("<Q", 5) + b"{oops", "damaged"),
    (b"\x80", "damaged"),
])
def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path, data, message):
    (tmp_path / "x.ckpt").write_bytes(data)
    assert message in refusal(tmp_path / "x.ckpt")


def test_zip_that_is_no_checkpoint_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "x.ckpt"
    zip_with(path, readme="hello")
    assert "without an uncompressed data.pkl" in refusal(path)
    zip_with(path, data_pkl=NOTHING)
    assert "no tensors" in refusal(path)
    zip_with(path, data_pkl=NOTHING, byteorder="big")
    assert "big-endian" in refusal(path)
    zip_with(path, zipfile.ZIP_DEFLATED, data_pkl=NOTHING)
    assert "uncompressed data.pkl" in refusal(path)


@pytest.mark.parametrize("item, message", [
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "invalid shape"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "invalid offset"),
    ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "`-2`"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "`-8`"),
    ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "F99"),
    ({"shape": [2]}, "damaged"),
    (3, "damaged"),
])
def test_safetensors_whose_header_lies_is_refused(tmp_path, item, message):
    header = json.dumps({"w": item}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"8 bytes.")
    assert message in refusal(tmp_path / "x.safetensors")


def test_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        tensorfile.read_file(tmp_path / "x.ckpt")


# ---- attacks

def storage_call(shape, stride, first=0, count=4):
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
            b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + b"J" + struct.pack("<i", count) + b"tQ"
            b"J" + struct.pack("<i", first) + shape + stride + b"\x89}tR")


def numbers(*values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


@pytest.mark.parametrize("shape, stride, first", [
    ((5,), (1,), 0), ((4,), (2,), 0), ((4,), (1,), 1), ((2, 2), (4, 1), 0), ((1,), (1,), 4),
    ((4,), (-1,), 3), ((-4,), (1,), 0), ((2,), (1, 1), 0), ((1 << 30, 1 << 30), (1 << 30, 1), 0)])
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path, shape, stride, first):
    call = storage_call(numbers(*shape), numbers(*stride), first)
    zip_with(tmp_path / "x.pt", data_pkl=b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s.", **{
        "data/0": b"\0" * 16})
    refusal(tmp_path / "x.pt")


def test_a_forged_tensor_within_its_storage_reads(tmp_path):
    # so that the test above refuses for the right reason
    call = storage_call(numbers(2, 2), numbers(2, 1))
    zip_with(tmp_path / "x.pt", data_pkl=b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s.", **{
        "data/0": np.arange(4, dtype=np.float32).tobytes()})
    assert tensorfile.read_file(tmp_path / "x.pt")["w"].tolist() == [[0, 1], [2, 3]]


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


ATTACKS = {     # opcode -> what comes before and after the command in a pickle that runs it
    "REDUCE": (b"cos\nsystem\n", b"\x85R"),
    "STACK_GLOBAL": (b"\x8c\x05posix\x8c\x06system\x93", b"\x85R"),
    "INST": (b"(", b"ios\nsystem\n"),
    "OBJ": (b"(csubprocess\ngetoutput\n", b"o"),
    "BUILD": (b"cargparse\nNamespace\n)R}" + text("__setstate__") + b"cos\nsystem\nsb", b"b"),
    "getattr": (b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(cos\npath\n" + text("os") + b"tR"
                + text("system") + b"tR", b"\x85R"),
    "rebuild": (b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncbuiltins\nint\n",
                b"\x85NtR"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_opcode_runs_what_a_file_names(tmp_path, name):
    marker = tmp_path / "marker"
    before, after = ATTACKS[name]
    attack = before + text(f"touch {marker}") + after
    with contextlib.suppress(TypeError, AttributeError):        # after the command has run
        pickle.loads(b"\x80\x04" + attack + b".")
    assert marker.exists(), "this is no attack"
    marker.unlink()
    state = b"\x80\x04}" + text("w") + storage_call(numbers(4), numbers(1)) + b"s" + text("z")
    zip_with(tmp_path / "x.pt", data_pkl=state + attack + b"s.", **{"data/0": b"\0" * 16})
    assert list(tensorfile.read_file(tmp_path / "x.pt")) == ["w"]
    assert not marker.exists(), "a file was executed"


def test_mutated_files_raise_nothing_but_one_line(tmp_path):
    read, refused, slowest = fuzz_checkpoints.run(400, 1, tmp_path)
    assert read > 10 and refused > 70 and slowest < 10


# ---- files made to take time or memory

def tensor_call(shape):
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
            b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00" + shape + shape + b"\x89}t")


def keys(count, width, value):
    """A dict of `count` whole numbers of `width` bytes."""
    return b"\x80\x02}(" + b"".join(b"\x8a" + bytes([width]) + value(k).to_bytes(width, "little")
                                   + b"N" for k in range(count)) + b"u."





HOSTILE = {     # a pickle, and what its refusal says
    "places of one hash": (lambda: b"\x80\x02" + b"".join(
        b"Np%d\n0" % (5 + (2**61 - 1) * k) for k in range(90_000)) + b"N.", "damaged"),
    "a long name that is shared": (
        lambda: b"\x80\x04]" + text("n" * 10**6) + b"\x940(" + b"h\x00h\x00\x93" * 200_000 + b"e.",
        "no tensors"),
    "a storage whose name is a deep tuple": (
        lambda: b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\nK\x01" + b"2\x86" * 200
        + text("cpu") + b"K\x01tQ.", "a part of one"),
    "a view with a million arguments": (
        lambda: b"\x80\x04](ctorch._utils\n_rebuild_tensor_v2\n\x94" + tensor_call(b"(K\x01t").
        partition(b"v2\n")[2][:-1] + b"N" * 10**6 + b"t\x94" + b"h\x00h\x01R" * 100_001 + b"e.",
        "100,000 tensors"),
    "keys of one hash": (lambda: keys(30_000, 16, lambda k: 5 + (2**61 - 1) * k), "no tensors"),
    "a key that is a deep tuple": (
        lambda: b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.", "no tensors"),
    "a key whose parts are shared": (
        lambda: b"\x80\x02}K\x01" + b"2\x86" * 200 + b"Ns.", "no tensors"),
    "lists in lists": (lambda: b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", "no tensors"),
    "long names": (lambda: b"\x80\x02}" + text("n" * 2000) + b"]]K\x01aas.", "1,000 characters"),
    "a list repeated by reference": (
        lambda: b"\x80\x04](ccollections\nOrderedDict\n\x94](" + text("a") + b"K\x01\x86\x94"
        + b"h\x01" * 50_000 + b"e\x85\x94" + b"h\x00h\x02R" * 5000 + b"e.", "no tensors"),
    "a shape that is shared": (
        lambda: b"\x80\x04](" + tensor_call(b"(" + b"K\x01" * 20_000 + b"t") + b"\x94R"
        + (b"h\x00R" * 4000) + b"e.", "16 dimensions"),
    "more tensors than any file has": (
        lambda: b"\x80\x04](ctorch._utils\n_rebuild_tensor_v2\n\x94" + tensor_call(
            b"(K\x01t").partition(b"v2\n")[2] + b"\x94" + b"h\x00h\x01R" * 100_001 + b"e.",
        "100,000 tensors"),
    "memory before it is read": (
        lambda: b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b".", "damaged"),
    "a pickle without end": (lambda: b"\x80\x02]" + b"0]" * (2 << 20), "2,621,440 bytes"),
    "an untyped tensor": (
        lambda: b"\x80\x02}" + text("w") + storage_call(numbers(0), numbers(1)).replace(
            b"FloatStorage", b"UntypedStorage") + b"s.", "without a type"),
    "more numbers than there are": (
        lambda: b"\x80\x02}" + text("w") + storage_call(numbers(1 << 30, 4), numbers(0, 1))
        + b"s.", "17,179,869,184 bytes"),
    "a count that overflows": (
        lambda: b"\x80\x02}" + text("w") + storage_call(numbers(1), numbers(1)).replace(
            b"cpuJ\x04\0\0\0", b"cpu\x8a\x09" + b"\xff" * 8 + b"\0") + b"s.", "impossible size"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_soon_and_in_one_line(tmp_path, name):
    make, says = HOSTILE[name]
    zip_with(tmp_path / "x.pt", data_pkl=make(), **{"data/0": b"\0" * 16})
    before, start = peak(), time.process_time()
    assert says in refusal(tmp_path / "x.pt")
    assert time.process_time() - start < 10 and peak() - before < 2**30


def peak():
    """Bytes of memory that this process has had at most, where the system says so."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_deflated_member_is_not_inflated(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", NOTHING)
        archive.writestr("x/byteorder", b"\0" * 10**7, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        archive.writestr("x/data.pkl", NOTHING)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x/data.pkl", b"\0" * 10**7, zipfile.ZIP_DEFLATED)
    inflated = []
    monkeypatch.setattr(zipfile.zlib, "decompressobj", inflated.append)
    refusal(path)
    refusal(tmp_path / "twice.pt")
    assert not inflated
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", NOTHING)
        for number in range(42):
            member = zipfile.ZipInfo(f"x/{number}")
            member.comment = b"n" * 65_000
            archive.writestr(member, b"")
    assert "2,621,440 bytes" in refusal(path)


@pytest.mark.parametrize("header, message", [
    ({"w": {"dtype": "U8", "shape": [10**18] * 10_000, "data_offsets": [0, 0]}}, "w"),
    ({"w": {"dtype": "U8", "shape": [1] * 10_000, "data_offsets": [0, 1]}}, "10000 dimensions"),
    ({"w" * 2000: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "dimensions"),
    ({"__metadata__": {"a": "b" * (4 << 20)}}, "2,621,440 bytes")])
def test_a_hostile_header_is_refused(tmp_path, header, message):
    header = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1")
    start = time.process_time()
    assert message in refusal(tmp_path / "x.safetensors")
    assert time.process_time() - start < 10


def test_every_opcode_of_this_python_is_one_that_was_looked_at():
    # a later Python's new opcode would be taken over as it is
    assert len(pickle._Unpickler.dispatch) == 68


# ---- writing

def test_written_safetensors_opens_in_the_library(tmp_path):
    state = {"half": torch.randn(3).half(), "w": torch.randn(2, 3).t(), "scalar": torch.tensor(5),
             "empty": torch.zeros(0, 4), "brain": torch.randn(3).bfloat16(),
             "flag": torch.tensor([True]), "grad": torch.ones(2, requires_grad=True)}
    size, crc = write_safetensors(tmp_path / "x.safetensors", state, {"step": "3"})
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (size, crc) == (len(data), zipfile.zlib.crc32(data))
    assert_same(load_file(tmp_path / "x.safetensors"), state)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
    found = tensorfile.read_file(tmp_path / "x.safetensors")
    assert_same(found, state)
    assert all(entry.storage.offset % entry.dtype.itemsize == 0
               for entry in found.entries.values())


def test_safetensors_read_whatever_the_length_of_their_header(tmp_path):
    # a header of 128 bytes begins like a pickle, one of 0x4b50 like a zip archive
    state, seen = {"w": torch.ones(2)}, set()
    for padding in (*range(0, 120, 8), *range(0x4b50 - 120, 0x4b50, 8)):
        write_safetensors(tmp_path / "x", state, {"padding": "x" * padding})
        seen.add((tmp_path / "x").read_bytes()[:2])
        assert_same(tensorfile.read_file(tmp_path / "x"), state)
    assert {b"\x80\0", b"PK"} <= seen


def test_safetensors_of_the_library_reads(tmp_path):
    state = {"a": torch.randn(4, 2), "b": torch.arange(3, dtype=torch.uint8)}
    save_file(state, tmp_path / "x.safetensors", {"global_step": "77"})
    found = tensorfile.read_file(tmp_path / "x.safetensors")
    assert_same(found, state)
    assert found.step == 77
