"""The layout of NumPy's arrays: known offsets, verified by comparison with the attributes of a few arrays."""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np

from adagrad.kernels.inspection.layout import (
    ARRAY,
    CONTIGUOUS,
    COUNT,
    DEVICE,
    DTYPES,
    ELEMENT_FORMATS,
    FORMAT,
    KIND,
    MEMMAP,
    NONE,
    RANK,
    SIZES,
    START,
    STRIDES,
    UNIT,
    WORDS,
    WRITEABLE,
    describe_once,
    list_item,
    read_word,
)
from adagrad.kernels.runtime.numba_jit import entry, jit

_item = entry(list_item)


@jit()
def _word(address: int, offset: int) -> Any:
    return read_word(address, offset)


def find() -> np.ndarray | None:
    """A new layout that knows NumPy's arrays, or None if they are not laid out as expected."""
    # Python's own objects, such as lists, are read, too: those of 64-bit CPython are known.
    if platform.python_implementation() != "CPython" or sys.maxsize != 2**63 - 1:
        return None
    layout = np.zeros(WORDS, np.int64)
    layout[ARRAY], layout[MEMMAP], layout[NONE] = id(np.ndarray), id(np.memmap), id(None)
    layout[DTYPES : DTYPES + len(ELEMENT_FORMATS)] = [_dtype_id(name) for name in ELEMENT_FORMATS]
    frozen = np.arange(6.0)
    frozen.flags.writeable = False
    probes = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(8.0)[::2],
        np.ones((), np.float16),
        np.ones((3, 4, 5), np.int32).transpose(2, 0, 1),
        np.ones((3, 0), np.int64),
        frozen,
    ]
    strangers = [np.ones(3, ">f4"), np.zeros(9, np.uint8)[1:].view(np.float32), np.ma.ones(3), np.ones(3, np.int8)]
    listed = all(_item(id(probes), i) == id(array) for i, array in enumerate(probes))
    known = listed and all(_agrees(layout, array) for array in probes)
    return layout if known and all(describe_once(array, layout) is None for array in strangers) else None


def _dtype_id(name: str) -> int:
    """The address of a dtype object, of which NumPy has just one; 0 for a type that is not known."""
    if name != "bfloat16":
        return id(np.dtype(name))
    # Another thread may be importing it.
    bfloat16 = getattr(sys.modules.get("ml_dtypes"), "bfloat16", None)
    return 0 if bfloat16 is None else id(np.dtype(bfloat16))


def _agrees(layout: np.ndarray, array: np.ndarray) -> bool:
    """Whether compiled code sees ``array`` as Python does."""
    info = describe_once(array, layout)
    expected = {
        KIND: 0,
        DEVICE: 0,
        FORMAT: ELEMENT_FORMATS.index(array.dtype.name),
        RANK: array.ndim,
        UNIT: array.itemsize,
        CONTIGUOUS: array.flags.c_contiguous,
        WRITEABLE: array.flags.writeable,
        START: array.ctypes.data,
        COUNT: array.size,
    }
    if info is None or any(info[what] != value for what, value in expected.items()):
        return False
    steps = zip(array.shape, array.strides, strict=True)
    return all((_word(info[SIZES], 8 * d), _word(info[STRIDES], 8 * d)) == step for d, step in enumerate(steps))
