"""MXNet's pickles: every protocol reads the same; damaged and hostile ones neither run nor allocate."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from adagrad import AdaGrad, get_updater
from adagrad.mxnet_states import MXNetOptimizer, decode, is_mxnet_states
from mxnet_files import CLASSES, FILES, NDARRAY, adagrad, read_optimizer, saved

pytestmark = pytest.mark.usefixtures("mxnet")

UNREADABLE = "not an MXNet state file that can be read"

# ------------------------------------------------------------------------------------------------------------ protocols


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("pickler", ["C", "Python", "optimized"])
@pytest.mark.parametrize("kind", ["mxnet.ndarray.ndarray.NDArray", "mxnet.numpy.multiarray.ndarray"])
def test_every_protocol_reads_the_same(protocol: int, pickler: str, kind: str) -> None:
    arrays = [
        np.arange(1200, dtype=np.float32).reshape(40, 30),
        np.array(2.5, np.float64),
        np.zeros((0, 3), np.float16),
    ]
    made = [CLASSES[kind](saved(array)) for array in arrays]
    many = {
        f"tiny_{number}": (CLASSES[kind](saved(arrays[1])), CLASSES[kind](saved(arrays[1]))) for number in range(2500)
    }
    states = {0: made[0], "0": (made[1], made[2]), -(2**40): None, 70_000: [], 300: ((),)} | many
    file = io.BytesIO()
    (pickle._Pickler if pickler == "Python" else pickle.Pickler)(file, protocol).dump((states, adagrad()))
    data = pickletools.optimize(file.getvalue()) if pickler == "optimized" else file.getvalue()
    assert is_mxnet_states(data)
    read, optimizer = decode(data)
    assert optimizer == read_optimizer(adagrad())
    assert [(type(key), key) for key in read] == [(type(key), key) for key in states]
    assert read[-(2**40)] is None
    assert (read[70_000], read[300]) == ([], ((),))
    for found, array in zip((read[0], *read["0"]), arrays, strict=True):
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert all(part == 2.5 for name in many for part in read[name])


@pytest.mark.parametrize("data", [pickle.dumps({0: None}, 0), pickle.dumps({0: None}, 1), b"(dp0\nI0\nNs."])
def test_older_protocols_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(ValueError, match="does not start as a pickle of protocol 2 to 5"):
        get_updater(AdaGrad()).set_states(data)


def test_memory_of_a_real_file_is_its_size() -> None:
    arrays = [NDARRAY(saved(np.ones(100_000, np.float32))) for _ in range(10)]
    for protocol, copies in ((2, 2.6), (4, 1.1), (5, 1.1)):  # in protocol 2 bytes are text, and are made bytes first
        data = pickle.dumps(dict(enumerate(arrays)), protocol)
        tracemalloc.start()
        try:
            decode(data)
            assert tracemalloc.get_traced_memory()[1] < copies * len(data)
        finally:
            tracemalloc.stop()


# -------------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_truncation_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in range(len(data)):
        with pytest.raises(ValueError, match=UNREADABLE):
            decode(data[:size])


@pytest.mark.filterwarnings("ignore:.*something else has changed it:UserWarning")
@settings(max_examples=400, deadline=None)
@example(FILES[0].with_name("fp32_factor_schedule_overwritten.states"), [(684, 1)])  # another base_lr
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), min_size=1, max_size=4))
def test_altered_bytes_are_refused_or_decode(path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(path.read_bytes())
    for place, mask in edits:
        data[place % len(data)] ^= mask
    decode_or_refuse(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 5), st.binary(max_size=60))
def test_any_bytes_are_refused_or_decode(protocol: int, program: bytes) -> None:
    decode_or_refuse(bytes([0x80, protocol]) + program + b".")


def decode_or_refuse(data: bytes | bytearray) -> None:
    try:
        states, optimizer = decode(data)
    except ValueError as error:
        if UNREADABLE not in str(error):
            raise
    else:
        assert isinstance(states, dict)
        assert optimizer is None or isinstance(optimizer, MXNetOptimizer)


# ----------------------------------------------------------------------------------------------------- hostile programs


def attack(program: bytes) -> bytes:
    return b"\x80\x04" + program + b"."


GLOBALS = b"\x8c\x08builtins\x94\x8c\x09bytearray\x94"  # memo slots 0 and 1
HALF_MEGABYTE = b"X" + struct.pack("<I", 500_000) + b"a" * 500_000
HOSTILE: dict[str, tuple[str, bytes]] = {
    "system": ("refused 'posix.system'", b"cposix\nsystem\n(\x8c\x01xtR"),
    "system by stack": ("refused 'os.system'", b"\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R"),
    "getattr": ("it holds a builtins.getattr", b"cbuiltins\ngetattr\n"),
    "reconstructor": ("it holds a copyreg._reconstructor", b"ccopyreg\n_reconstructor\n"),
    "instance": ("refused opcode INST", b"(iposix\nsystem\n"),
    "object": ("refused opcode OBJ", b"(o"),
    "persistent": ("refused opcode PERSID", b"Px\n"),
    "extension": ("refused opcode EXT1", b"\x82\x01"),
    "buffer": ("refused opcode NEXT_BUFFER", b"\x97"),
    "unknown": ("refused opcode 0xff", b"\xff"),
    "protocol again": ("refused opcode PROTO", b"\x80\x04"),
    "trillion": ("refused a call of bytearray", GLOBALS + b"\x93\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85R"),
    "codec": ("refused a call of encode", b"c_codecs\nencode\n\x8c\x01x\x8c\x03hex\x86R"),
    "encoding": ("refused a call of bytearray", GLOBALS + b"\x93\x8c\x01x\x8c\x04idna\x86R"),
    "called list": ("refused a call of None", b"]]R"),
    "called array": ("refused a call of array", b"cmxnet.ndarray.ndarray\nNDArray\nK\x05\x85R"),
    "new array": ("refused a new object of array", b"cmxnet.ndarray.ndarray\nNDArray\n)\x81"),
    "dtype": ("refused a call of dtype", b"cnumpy\ndtype\n\x8c\x02O8\x89\x88\x87R"),
    "built dict": ("refused to build a dict", b"}}b"),
    "built twice": ("refused to build a AdaGrad", b"cmxnet.optimizer.adagrad\nAdaGrad\n)\x81}b}b"),
    "memo": ("memo slot 2147483647 out of sequence", b"}r\xff\xff\xff\x7f"),
    "empty memo": ("memo slot 4294967295 is empty", b"j\xff\xff\xff\xff"),
    "frame": ("truncated: it ends before its frame", b"\x95" + b"\xff" * 8),
    "text": ("truncated: 9223372036854775807 bytes", b"\x8d" + struct.pack("<Q", 2**63 - 1)),
    "bytes": ("truncated: 18446744073709551615 bytes", b"\x8e" + b"\xff" * 8),
    "byte array": ("truncated: 1099511627776 bytes", b"\x96" + struct.pack("<Q", 2**40)),
    "integer": ("an integer of 255 bytes", b"\x8a\xff" + b"\xff" * 255),
    "long integer": ("refused opcode LONG4", b"\x8b\xff\xff\xff\x7f"),
    "not UTF-8": ("codec", b"\x8c\x01\xff"),
    "no newline": ("truncated|refused", b"c" + b"x" * 1000),
    "underflow": ("an opcode lacks its operand", b"R"),
    "under a mark": ("an opcode lacks its operand", b"}((a"),
    "no mark": ("an opcode lacks its mark", b"}u"),
    "odd items": ("sets 0.5 items", b"}(K\x00u"),
    "items of a list": ("of a list", b"]K\x00Ns"),
    "appends to a dict": ("appends to a dict", b"}Na"),
    "key": ("a key of type tuple", b"}" + b")\x85Ns"),
    "key twice": ("a key occurs twice", b"}K\x00NsK\x00Ns"),
    "unnamed": ("whose name is not text", b"K\x00K\x00\x93"),
    "two": ("left over", b"}}"),
    "open mark": ("left over", b"(}"),
    "nothing": ("left over", b""),
    "after the end": ("left over", b"}.}"),
    "list in itself": ("two states share", b"}K\x00]\x94h\x00as"),
    "many dicts": ("more objects", b"}" * 100_000),
    "many marks": ("more objects", b"(" * 100_000),
    "many byte strings": ("more objects", b"C\x00" * 50_000),
    "many tuples": ("more objects", b"}K\x00)" + b"\x85" * 100_000 + b"s"),
    "deep tuple": (
        "neither an array nor",
        b"}X" + struct.pack("<I", 10_000) + b"a" * 10_000 + b"NsK\x00)" + b"\x85" * 1000 + b"s",
    ),
    "many memo slots": ("holds a NoneType", b"N" + b"\x94" * 100_000),
    "many Nones": ("left over", b"N" * 100_000),
    "many classes of long names": (
        "refused 'mmm",
        b"\x8c\xff" + b"m" * 255 + b"\x94\x8c\x01n\x94" + b"h\x00h\x01\x93" * 20_000,
    ),
    "many calls": ("more objects", GLOBALS + b"h\x00h\x01\x93" * 20_000),
    "same text again": (
        "two arrays share their bytes",
        GLOBALS + b"\x93\x94" + HALF_MEGABYTE + b"\x94\x8c\x07latin-1\x94h\x03h\x04\x86\x94" + b"h\x02h\x05R" * 1000,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_refused_within_their_size(name: str) -> None:
    reason, program = HOSTILE[name]
    data = attack(program)
    decode_or_refuse(data)  # the imports and caches of a first call are not the program's
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(data) + 100_000
    finally:
        tracemalloc.stop()


def test_shared_containers_do_not_multiply() -> None:
    program = b")\x94"
    for slot in range(8):  # each tuple holds the one before twice
        program += b"h" + bytes([slot]) + b"\x86\x94"
    with pytest.raises(ValueError, match="two states share"):
        decode(attack(b"}K\x00" + program + b"s"))


def test_no_code_runs(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for protocol in (2, 3, 4, 5):
        with pytest.raises(ValueError, match="refused"):
            decode(pickle.dumps({0: Attack()}, protocol))
    assert not (tmp_path / "ran").exists()


def test_an_array_built_twice(mxnet: Any) -> None:
    data = pickletools.optimize(pickle.dumps({0: NDARRAY(saved(np.zeros(2, np.float32)))}, 3))
    state = data[data.index(b"}X\x06\x00\x00\x00handle") : -2]
    with pytest.raises(ValueError, match="refused to build a Array"):
        decode(data[:-2] + state + b"s.")
