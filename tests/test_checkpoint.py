"""The library's own state files: exact round trips, and a refusal with the reason for everything else."""

from __future__ import annotations

import io
import json
import math
import os
import random
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from adagrad import AdaGrad, atomic_file, checkpoint, get_updater
from adagrad.mxnet_states import is_mxnet_states
from processes import posix

DATA = Path(__file__).parent / "data" / "states"
DTYPES = ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"]


def decode(data: bytes) -> Any:
    return checkpoint.read(io.BytesIO(data))


def same(left: Any, right: Any) -> bool:
    """Equal in structure, types and every bit."""
    if isinstance(left, np.ndarray):
        native = left.astype(left.dtype.newbyteorder("="))
        return (
            isinstance(right, np.ndarray)
            and (native.dtype, native.shape) == (right.dtype, right.shape)
            and native.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        keys = [(type(key), key) for key in left]
        return keys == [(type(key), key) for key in right] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return type(right) is float and struct.pack("d", left) == struct.pack("d", right)
    return type(left) is type(right) and left == right


arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype).str.replace("f", "u"), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    ).map(lambda bits: bits.view(dtype))
)
laid_out = st.tuples(arrays, st.sampled_from(["as is", "reversed", "transposed", "stepped", "offset"])).map(
    lambda pair: lay_out(*pair)
)
states_of = st.recursive(
    laid_out | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
keys = st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8)
numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
parameters = st.recursive(
    numbers,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


def lay_out(array: np.ndarray, how: str) -> np.ndarray:
    if how == "transposed" or array.ndim == 0:
        return array.T
    if how == "reversed":
        return array[::-1].copy()[::-1]
    if how == "stepped":
        return np.repeat(array, 2, axis=0)[::2]
    if how == "offset":
        raw = np.zeros(array.nbytes + 1, np.uint8)
        moved = raw[1:].view(array.dtype).reshape(array.shape)
        moved[...] = array
        return moved if moved.tobytes() == array.tobytes() else array
    return array


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(keys, states_of, max_size=4), st.none() | st.dictionaries(st.text(max_size=8), parameters))
def test_round_trip(states: dict[Any, Any], optimizer: dict[str, Any] | None) -> None:
    data = checkpoint.encode(states, optimizer)
    read, parameters = decode(data)
    assert same(states, read)
    assert same(optimizer, parameters)
    assert not is_mxnet_states(data)


def test_arrays_come_back_fresh() -> None:
    data = bytearray(checkpoint.encode({0: (np.ones((3, 2), ">f8"), np.ones(3, np.float16)), 1: np.ones(())}, None))
    states, _ = decode(data)
    for array in (*states[0], states[1]):
        assert array.flags.writeable
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.flags.owndata
        assert array.dtype.isnative
    data[:] = bytes(len(data))
    assert (states[0][0] == 1).all()


def test_numbers_are_exact_and_keys_typed() -> None:
    optimizer = {"inf": math.inf, "nan": math.nan, "zero": -0.0, "tiny": 5e-324, "big": 2**70, "counts": {0: 1, "0": 2}}
    states, read = decode(checkpoint.encode({0: None, "0": None}, optimizer))
    assert [type(key) for key in states] == [int, str]
    assert same(optimizer, read)
    assert decode(checkpoint.encode({}, None)) == ({}, None)
    assert decode(checkpoint.encode({}, {})) == ({}, {})


def test_numpy_numbers_become_plain_ones() -> None:
    optimizer = {"lr": np.float32(0.1), "count": np.int64(3), "flag": np.True_, "name": np.str_("a")}
    _, read = decode(checkpoint.encode({}, optimizer))
    assert same({"lr": float(np.float32(0.1)), "count": 3, "flag": True, "name": "a"}, read)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_torch_tensors_come_back_as_arrays_of_the_same_numbers(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.randn(4, 6, generator=torch.manual_seed(0)).to(getattr(torch, dtype)).requires_grad_()
    states, _ = decode(checkpoint.encode({0: tensor, 1: tensor.T[1:, ::2], 2: tensor[0, 0]}, None))
    for key, expected in enumerate((tensor, tensor.T[1:, ::2], tensor[0, 0])):
        assert states[key].dtype.name == dtype
        assert (states[key].astype(np.float64) == expected.detach().double().numpy()).all()


def test_torch_tensors_of_another_kind_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"torch\.int64"):
        checkpoint.encode({0: torch.arange(3)}, None)
    with pytest.raises(TypeError, match="layout"):
        checkpoint.encode({0: torch.eye(3).to_sparse()}, None)


def test_bfloat16_without_ml_dtypes_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.arange(0, 2**16, 7, np.uint16)
    data = checkpoint.encode({0: bits.view(ml_dtypes.bfloat16)}, None)
    assert (decode(data)[0][0].view(np.uint16) == bits).all()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    widened = decode(data)[0][0]
    assert widened.dtype == np.float32
    assert (widened.view(np.uint32) == bits.astype(np.uint32) << 16).all()


@pytest.mark.parametrize(
    ("states", "optimizer", "error"),
    [
        ({True: None}, None, "bool"),
        ({1.0: None}, None, "float"),
        ({0: np.arange(3)}, None, "int64"),
        ({0: np.array([None])}, None, "object"),
        ({0: 1.0}, None, "float"),
        ({0: {"a": 1}}, None, "dict"),
        ({}, {"f": print}, "builtin_function"),
        ({}, {"c": 1j}, "complex"),
        ({}, {"d": {1.5: 1}}, "float"),
    ],
)
def test_what_cannot_be_saved_is_refused(states: Any, optimizer: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        checkpoint.encode(states, optimizer)


def test_endless_nesting_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested deeper"):
        checkpoint.encode({0: endless}, None)
    with pytest.raises(ValueError, match="nested deeper"):
        checkpoint.encode({}, {"a": endless})


# -------------------------------------------------------------------------------------------------- damage, and forgery

SMALL = checkpoint.encode({"w": (np.arange(3, dtype=np.float32), np.ones((), np.float16)), 1: None}, {"lr": 0.1})


def test_every_flipped_bit_is_noticed() -> None:
    for place in range(8 * len(SMALL)):
        data = bytearray(SMALL)
        data[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match="not a state file that can be read"):
            decode(data)


def test_every_truncation_and_extension_is_noticed() -> None:
    for size in range(len(SMALL)):
        with pytest.raises(ValueError, match="not a state file that can be read"):
            decode(SMALL[:size])
    for more in (b"\0", b" ", SMALL):
        with pytest.raises(ValueError, match="not a state file that can be read"):
            decode(SMALL + more)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_refused(data: bytes, header: int) -> None:
    for attempt in (data, struct.pack("<Q", header) + data, struct.pack("<Q", len(data)) + data):
        with pytest.raises(ValueError, match="not a state file that can be read"):
            decode(attempt)


def forge(edit: Any) -> bytes:
    """``SMALL`` with its parts edited (``edit`` may return an inner header as text) and its checksums made good."""
    (length,) = struct.unpack("<Q", SMALL[:8])
    tensors = json.loads(SMALL[8 : 8 + length])
    metadata = tensors.pop("__metadata__")
    inner = json.loads(metadata["header"])
    body = SMALL[8 + length :]
    text = edit(tensors, inner, metadata)
    for pair in inner["tensors"] if isinstance(inner["tensors"], list) else ():
        entry = tensors.get(pair[0]) if isinstance(pair, list) else None
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            start = zlib.crc32(json.dumps([entry["dtype"], entry["shape"]]).encode())
            pair[1] = f"{zlib.crc32(body[slice(*entry['data_offsets'])], start):08x}"
    metadata["header"] = text if isinstance(text, str) else json.dumps(inner)
    metadata["crc32"] = metadata.pop("crc32") and "00000000"
    text = json.dumps({**tensors, "__metadata__": metadata}).encode()
    covered = (struct.pack("<Q", len(text)) + text)[: -len('00000000"}}')]
    return covered + f'{zlib.crc32(covered):08x}"}}}}'.encode() + body


def nested(depth: int) -> Any:
    value: Any = None
    for _ in range(depth):
        value = {"tuple": [value]}
    return value


FORGERIES: list[tuple[str, Any]] = [
    ("format version 7: this library reads up to 1", lambda t, i, m: m.update(version="7")),
    ("version is not a number", lambda t, i, m: m.update(version="-1")),
    ("version is not a number", lambda t, i, m: m.update(version=1)),
    ("not written by this library", lambda t, i, m: m.update(format="pt")),
    ("inner header is not JSON", lambda t, i, m: "{"),
    ("inner header is not JSON", lambda t, i, m: "[" * 100_000),
    ("inner header is not a JSON object", lambda t, i, m: "[]"),
    ("list of states is missing", lambda t, i, m: i.update(states=None)),
    ("list of tensors is missing", lambda t, i, m: i.update(tensors={})),
    ("not the ones", lambda t, i, m: i["tensors"].pop()),
    ("not the ones", lambda t, i, m: i["tensors"].append(i["tensors"][0])),
    ("not the ones", lambda t, i, m: t.update(other=t['"w"/0'])),
    ("a tensor is listed in an unknown form", lambda t, i, m: i["tensors"].append([1, "00000000"])),
    ("belongs to no state", lambda t, i, m: i.update(states=[])),
    ("occurs twice", lambda t, i, m: i["states"].append(["w", None])),
    ("a state is listed in an unknown form", lambda t, i, m: i["states"].append([True, None])),
    ("a state is listed in an unknown form", lambda t, i, m: i["states"].append([1.5, None])),
    ("unknown structure", lambda t, i, m: i["states"].append([5, 0])),
    ("unknown structure", lambda t, i, m: i["states"].append([5, True])),
    ("unknown structure", lambda t, i, m: i["states"].append([5, {"set": []}])),
    ("unknown structure", lambda t, i, m: i["states"].append([5, nested(17)])),
    ("unknown structure", lambda t, i, m: i["states"].append([5, {"float": 5}])),
    ("unknown structure", lambda t, i, m: i["states"].append([5, {"float": [{"float": []}]}])),
    ("a key outside of 64 bits", lambda t, i, m: i["states"].append([2**61 * 4, None])),
    ("a key outside of 64 bits", lambda t, i, m: i.update(optimizer={"dict": [[-(2**63) - 1, 1]]})),
    ("unknown structure", lambda t, i, m: i["states"].append([5, {"tuple": [], "list": []}])),
    ("optimizer is not a dict", lambda t, i, m: i.update(optimizer=[1])),
    ("a hyper-parameter has an unknown form", lambda t, i, m: i.update(optimizer={"float": "zebra"})),
    ("a hyper-parameter has an unknown form", lambda t, i, m: i.update(optimizer={"float": "0x1p99999"})),
    ("a hyper-parameter has an unknown form", lambda t, i, m: i.update(optimizer={"set": []})),
    ("unknown structure", lambda t, i, m: i.update(optimizer=nested(17))),
    ("hyper-parameter is listed in an unknown form", lambda t, i, m: i.update(optimizer={"dict": [[1.5, 1]]})),
    ("dtype is not one of", lambda t, i, m: t['"w"/0'].update(dtype="I64")),
    ("dtype is not one of", lambda t, i, m: t.update({'"w"/0': 3})),
    ("not a list of valid sizes", lambda t, i, m: t['"w"/0'].update(shape=[-3])),
    ("not a list of valid sizes", lambda t, i, m: t['"w"/0'].update(shape=[3.0])),
    ("not a list of valid sizes", lambda t, i, m: t['"w"/0'].update(shape=[2**63])),
    ("not a list of valid sizes", lambda t, i, m: t['"w"/0'].update(shape=[1] * 65)),
    ("does not agree with its shape", lambda t, i, m: t['"w"/0'].update(shape=[10**12])),
    ("does not agree with its shape", lambda t, i, m: t['"w"/0'].update(data_offsets=[2, 14])),
    ("does not agree with its shape", lambda t, i, m: t['"w"/1'].update(data_offsets=[0, 2])),
    ("truncated", lambda t, i, m: t['"w"/1'].update(shape=[10**12], data_offsets=[12, 12 + 2 * 10**12])),
    ("too (big|large)|larger", lambda t, i, m: t['"w"/1'].update(shape=[0, 2**62, 2**62], data_offsets=[12, 12])),
    ("bytes too many", lambda t, i, m: t['"w"/1'].update(shape=[0], data_offsets=[12, 12])),
]


@pytest.mark.parametrize(("reason", "edit"), FORGERIES)
def test_a_forged_header_is_refused(reason: str, edit: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(forge(edit))


def test_the_forger_makes_valid_files() -> None:
    assert same(decode(SMALL), decode(forge(lambda tensors, inner, metadata: None)))


def theirs(module: str) -> Any:
    """A module of safetensors, which free-threaded Python 3.14 had to build from Rust."""
    return pytest.importorskip(module, reason="safetensors is not installed: pip install '.[test]'")


def test_a_foreign_safetensors_file_is_named_so() -> None:
    content = theirs("safetensors.numpy").save({"a": np.ones(3)})
    with pytest.raises(ValueError, match="safetensors, but not written by this library"):
        decode(content)


def test_version_1_is_read() -> None:
    states, optimizer = decode((DATA / "version_1.safetensors").read_bytes())
    w = np.array([1.5, -0.0, np.inf], np.float32)
    bfloat16 = np.array([1.5, -2], ml_dtypes.bfloat16)
    expected = {0: w, "0": (np.array([[0.1]]), np.array(2, np.float16)), -1: None, "é": [bfloat16, ()]}
    assert same(expected, states)
    assert same({"lr": 0.1, "clip": math.inf, "counts": {0: 3, "b": 4}, "steps": (1, [True, None])}, optimizer)


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    atomic_file.save(tmp_path / "a", SMALL)
    with theirs("safetensors").safe_open(tmp_path / "a", "np") as file:
        assert file.metadata()["format"] == "adagrad-states"
        assert (file.get_tensor('"w"/0') == [0, 1, 2]).all()


def test_memory_stays_within_one_copy() -> None:
    states = {key: np.ones(500_000, np.float32) for key in range(8)} | {8: np.ones((500, 1000), np.float32).T}
    size = 9 * 2_000_000
    tracemalloc.start()
    try:
        data = checkpoint.encode(states, None)
        assert tracemalloc.get_traced_memory()[1] < 1.2 * size
        tracemalloc.reset_peak()
        decode(data)
        assert tracemalloc.get_traced_memory()[1] < 2.1 * size  # the file and the arrays
    finally:
        tracemalloc.stop()


def test_saving_takes_no_memory_and_loading_that_of_the_arrays(tmp_path: Path) -> None:
    size, before, after = 9 * 2_000_000, get_updater(AdaGrad()), get_updater(AdaGrad())
    before.states = {key: np.full(500_000, key, np.float32) for key in range(9)}
    tracemalloc.start()
    try:
        before.save_states(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 0.2 * size
        tracemalloc.reset_peak()
        after.load_states(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 1.2 * size
    finally:
        tracemalloc.stop()
    assert same(after.states, before.states)
    assert (tmp_path / "a").read_bytes() == before.get_states()


@posix
@pytest.mark.parametrize("has_optimizer", [True, False])
def test_loading_from_a_pipe(tmp_path: Path, has_optimizer: bool) -> None:
    before, after = get_updater(AdaGrad(0.5)), get_updater(AdaGrad())
    before.states = {"w": np.ones(3)}
    os.mkfifo(tmp_path / "pipe")
    data = before.get_states(has_optimizer)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,), daemon=True)
    writer.start()
    after.load_states(tmp_path / "pipe")
    writer.join(60)
    assert same(after.states, before.states)
    assert after.optimizer.learning_rate == (0.5 if has_optimizer else 0.01)


# ----------------------------------------------------------------------------------------------------------------- save


def test_save_replaces_the_file_and_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o027)
    try:
        atomic_file.save("a", b"one")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.stat("a").st_mode) == 0o640
    os.chmod("a", 0o606)
    atomic_file.save(Path("a"), b"two")
    atomic_file.save(os.path.join("..", tmp_path.name, "b"), memoryview(b"three"))
    assert Path("a").read_bytes() == b"two"
    assert stat.S_IMODE(os.stat("a").st_mode) == 0o606
    assert Path("b").read_bytes() == b"three"
    assert sorted(os.listdir()) == ["a", "b"]


def test_save_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(Path("real", "file"))
    for data in (b"one", b"two"):  # the link points nowhere, then to a file
        atomic_file.save(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_bytes() == data
    assert os.listdir(tmp_path / "real") == ["file"]


@pytest.mark.parametrize("has_modes", [True, False])
@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_a_failing_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, has_modes: bool
) -> None:
    atomic_file.save(tmp_path / "a", b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    if not has_modes:  # a file system may refuse to change them
        monkeypatch.setattr(os, "chmod", fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_file.save(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_save_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a regular file"):
        atomic_file.save(tmp_path, b"")
    with pytest.raises(ValueError, match="must be a regular file"):
        atomic_file.save(os.devnull, b"")
    with pytest.raises(FileNotFoundError):
        atomic_file.save(tmp_path / "nowhere" / "a", b"")
    with pytest.raises(TypeError):
        atomic_file.save(tmp_path / "a", "text")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


SAVES_FOR_EVER = """
import sys, numpy
from adagrad import atomic_file, checkpoint
files = [checkpoint.encode({0: numpy.full(50_000, value, "f4")}, {"value": value}) for value in (1, 2)]
atomic_file.save(sys.argv[1], files[0])
print(flush=True)
while True:
    for data in files[::-1]:
        atomic_file.save(sys.argv[1], data)
"""


def test_a_killed_save_leaves_a_file_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "states"
    generator = random.Random(0)
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            time.sleep(generator.uniform(0, 0.02))
            process.kill()
        states, optimizer = decode(path.read_bytes())
        assert optimizer in ({"value": 1}, {"value": 2})
        assert (states[0] == optimizer["value"]).all()


def test_a_checkpoint_from_before_the_dialects_switches_their_options_off() -> None:
    config = AdaGrad().config()
    del config["epsilon_inside"], config["decoupled_decay"]
    optimizer = AdaGrad(dialect="keras")
    optimizer.set_config(config)
    assert (optimizer.epsilon_inside, optimizer.decoupled_decay) == (False, False)


def test_keys_are_integers_of_64_bits_of_any_type() -> None:
    states, _ = decode(checkpoint.encode({np.int64(-(2**63)): None, np.uint64(2**63 - 1): None}, None))
    assert [(type(key), key) for key in states] == [(int, -(2**63)), (int, 2**63 - 1)]
    for key in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match="must fit 64 bits"):
            checkpoint.encode({key: None}, None)


def test_what_is_written_is_read_however_deep() -> None:
    def nested(kind: Any, depth: int) -> Any:
        value: Any = kind()
        for _ in range(depth - 1):
            value = kind([value]) if kind is not dict else {"a": value}
        return value

    for kind in (list, tuple):
        states = {0: nested(kind, 16)}
        assert decode(checkpoint.encode(states, None))[0] == states
        with pytest.raises(ValueError, match="nested deeper than 16"):
            checkpoint.encode({0: nested(kind, 17)}, None)
    for kind in (list, tuple, dict):
        optimizer = {"a": nested(kind, 15)}
        assert decode(checkpoint.encode({}, optimizer))[1] == optimizer
        with pytest.raises(ValueError, match="nested deeper than 16"):
            checkpoint.encode({}, {"a": nested(kind, 16)})


def test_a_buffer_of_any_item_is_read() -> None:
    data = checkpoint.encode({0: np.ones(4)}, None)
    assert decode(memoryview(data).cast("Q"))[0][0].tolist() == [1] * 4  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["0", "01", "1" * 5000])
def test_a_version_that_is_no_number(version: str) -> None:
    forged = forge(lambda tensors, inner, metadata: metadata.update(version=version))
    with pytest.raises(ValueError, match="not a state file that can be read: the format version is not a number"):
        decode(forged)


def test_a_state_of_three_parts_is_refused() -> None:
    forged = forge(lambda tensors, inner, metadata: inner["states"].append([5, None, 1]))
    with pytest.raises(ValueError, match="a state is listed in an unknown form"):
        decode(forged)


def test_a_size_that_is_a_boolean_is_refused() -> None:
    forged = forge(lambda tensors, inner, metadata: tensors['"w"/0'].update(shape=[3, True]))
    with pytest.raises(ValueError, match="not a list of valid sizes"):
        decode(forged)


def test_sizes_that_numpy_refuses_are_refused_in_our_words() -> None:
    changes = {"shape": [0, 2**62, 2**62], "data_offsets": [12, 12]}
    forged = forge(lambda tensors, inner, metadata: tensors['"w"/1'].update(changes))
    with pytest.raises(ValueError, match='not a state file that can be read: tensor "w"/1: '):
        decode(forged)


@pytest.mark.parametrize("wrap", [lambda v: {"dict": [["a", v]]}, lambda v: [v], lambda v: {"tuple": [v]}])
@pytest.mark.parametrize("depth", [17, 300])
def test_hyper_parameters_that_are_nested_too_deep(wrap: Any, depth: int) -> None:
    value: Any = None
    for _ in range(depth):
        value = wrap(value)
    forged = forge(lambda tensors, inner, metadata: inner.update(optimizer={"dict": [["a", value]]}))
    with pytest.raises(ValueError, match="its header has an unknown structure"):
        decode(forged)


def test_a_float_in_the_deepest_list_is_read() -> None:
    value: Any = 0.5
    for _ in range(15):
        value = [value]
    assert decode(checkpoint.encode({}, {"a": value}))[1] == {"a": value}


def test_a_path_of_bytes(tmp_path: Path) -> None:
    atomic_file.save(os.fsencode(tmp_path / "a"), b"one")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"one"


def test_a_file_in_the_place_of_the_temporary_one_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / f".adagrad-{'0' * 16}.tmp").symlink_to("victim")
    with pytest.raises(FileExistsError):
        atomic_file.save(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_a_file_does_not_stay_set_user_id(tmp_path: Path) -> None:
    atomic_file.save(tmp_path / "a", b"one")
    (tmp_path / "a").chmod(0o4755)
    atomic_file.save(tmp_path / "a", b"two")
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o755


def test_all_is_written_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    atomic_file.save(tmp_path / "a", b"small")
    assert sizes[0] == 5


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_file.save(tmp_path / "a", b"old")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_file.save(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_the_first_failure_of_a_save_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(reason: str) -> Any:
        def call(*_: Any) -> None:
            raise OSError(reason)

        return call

    monkeypatch.setattr(os, "replace", fail("no space"))
    monkeypatch.setattr(os, "unlink", fail("not allowed"))
    with pytest.raises(OSError, match="no space"):
        atomic_file.save(tmp_path / "a", b"new")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted")
@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_cannot_be_synced_is_no_matter(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if fails and os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    before = len(os.listdir("/proc/self/fd"))
    atomic_file.save(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(os.listdir("/proc/self/fd")) == before
