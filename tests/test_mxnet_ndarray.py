"""The arrays in MXNet's files: read bit for bit, or refused."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from adagrad.mxnet_states import decode
from mxnet_files import CLASSES, NDARRAY, saved

pytestmark = pytest.mark.usefixtures("mxnet")

# ---------------------------------------------------------------------------------------------------------------- dense


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: hnp.arrays(f"u{np.dtype(dtype).itemsize}", hnp.array_shapes(min_dims=0, max_side=4)).map(
            lambda bits: bits.view(dtype)
        )
    ),
    st.sampled_from([(1, 0), (2, 7), (3, 0), (5, 0)]),
)
def test_any_array_reads_bit_for_bit(array: np.ndarray, device: tuple[int, int]) -> None:
    for magic in (0xF993FAC9, 0xF993FACA)[array.ndim == 0 :]:
        states, _ = decode(pickle.dumps({0: NDARRAY(saved(array, magic, None, device))}))
        assert (states[0].dtype, states[0].shape, states[0].tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_bfloat16_is_widened() -> None:
    bits = np.arange(0, 2**16, 7, np.uint16)
    states, _ = decode(pickle.dumps({0: NDARRAY(saved(bits, flag=12))}))
    assert states[0].dtype == np.float32
    assert (states[0].view(np.uint32) == bits.astype(np.uint32) << 16).all()


SMALL = saved(np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("0x1: |0xf993fac8, which is neither", struct.pack("<I", 0xF993FAC8) + SMALL[4:]),
        ("storage type 2", SMALL[:4] + struct.pack("<i", 2) + SMALL[8:]),
        ("storage type -1", SMALL[:4] + struct.pack("<i", -1) + SMALL[8:]),
        ("-1 dimensions", SMALL[:8] + struct.pack("<i", -1)),
        ("33 dimensions", SMALL[:8] + struct.pack("<i", 33) + SMALL[12:]),
        ("an array has no value", struct.pack("<Iii", 0xF993FAC9, 0, 0)),
        ("an array has no value", None),
        (r"shape \(-2, 3\)", SMALL[:12] + struct.pack("<q", -2) + SMALL[20:]),
        ("truncated: 27670116110564327424 bytes", SMALL[:12] + struct.pack("<q", 2**61) + SMALL[20:]),
        ("too big|too large", SMALL[:12] + struct.pack("<qq", 2**62, 0) + SMALL[28:40]),
        ("device of kind 9", saved(np.ones(3, np.float32), device=(9, 0))),
        ("dtype 4", saved(np.ones(3, np.int32), flag=4)),
        ("dtype 7", saved(np.ones(3, np.bool_), flag=7)),
        ("4 bytes too many", SMALL + b"1234"),
        ("truncated", SMALL[:-1]),
        ("truncated", b""),
    ],
)
def test_bad_arrays_are_refused(reason: str, raw: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(pickle.dumps({0: NDARRAY(raw if raw is None else bytearray(raw))}))


# ----------------------------------------------------------------------------------------------------------- row-sparse


def saved_rows(array: np.ndarray, rows: list[int], shape: tuple[int, ...], kind: int = 6) -> bytearray:
    """The bytes that NDArray::Save makes of a row-sparse array with these rows."""

    def packed(sizes: tuple[int, ...]) -> bytes:
        return struct.pack(f"<i{len(sizes)}q", len(sizes), *sizes)

    head = struct.pack("<Ii", 0xF993FAC9, 1) + packed(array.shape) + packed(shape) + struct.pack("<4i", 1, 0, 0, kind)
    return bytearray(head + packed((len(rows),)) + array.tobytes() + np.array(rows, "<i8").tobytes())


def row_sparse(*raws: bytearray) -> dict[Any, Any]:
    made = [CLASSES["mxnet.ndarray.sparse.RowSparseNDArray"](raw) for raw in raws]
    return decode(pickle.dumps(dict(enumerate(made))))[0]


def test_row_sparse_states_become_dense() -> None:
    full = np.arange(6, dtype=np.float32).reshape(3, 2)
    states = row_sparse(
        saved_rows(full, [0, 1, 2], (3, 2)), saved_rows(full, [1, 3, 4], (6, 2)), saved_rows(full[:0], [], (2, 2))
    )
    assert (states[0] == full).all()
    assert (states[1] == [[0, 0], [0, 1], [0, 0], [2, 3], [4, 5], [0, 0]]).all()
    assert (states[2] == np.zeros((2, 2))).all()


@pytest.mark.parametrize(
    ("reason", "raw"),
    [
        ("1 of 1000000 rows: the file is too short", saved_rows(np.zeros((1, 2), "f4"), [5], (1_000_000, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [1, 1], (2, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [1, 0], (2, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [0, 2], (2, 2))),
        ("out of order or out of range", saved_rows(np.zeros((2, 2), "f4"), [-1, 0], (2, 2))),
        ("with rows of shape", saved_rows(np.zeros((2, 2), "f4"), [0, 1], (2, 3))),
        ("with rows of shape", saved_rows(np.zeros((2, 2), "f4"), [0, 1, 2], (3, 2))),
        ("with rows of shape", saved_rows(np.zeros((2, 2), "f4"), [0, 1], (2, 2), kind=4)),
        ("an array has no value", saved_rows(np.zeros((1, 1), "f4"), [0], ())),
    ],
)
def test_bad_row_sparse_states_are_refused(reason: str, raw: bytearray) -> None:
    with pytest.raises(ValueError, match=reason):
        row_sparse(raw)


def test_row_sparse_states_share_one_allowance() -> None:
    raw = saved_rows(np.zeros((1, 1), np.float32), [5], (1500, 1))  # 6,000 bytes each, in a file of some 15,000
    row_sparse(raw, saved_rows(np.zeros((1000, 1), np.float32), list(range(1000)), (1000, 1)))
    with pytest.raises(ValueError, match="too short to justify"):
        row_sparse(*[bytearray(raw) for _ in range(100)])
