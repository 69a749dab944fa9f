"""The arrays in MXNet's files, as written by ``NDArray::Save``; fully checked before anything is allocated."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Bytes:
    """A cursor over bytes of the file."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 0

    def take(self, size: int) -> memoryview:
        left = len(self.view) - self.at
        if size > left:
            raise ValueError(f"truncated: {size} bytes needed at byte {self.at}, {left} left")
        self.at += size
        return self.view[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def shape(self) -> tuple[int, ...]:
        ndim = self.number("<i")
        if not 0 <= ndim <= 32:
            raise ValueError(f"an array has {ndim} dimensions")
        shape = struct.unpack(f"<{ndim}q", self.take(8 * ndim))
        if any(size < 0 for size in shape):
            raise ValueError(f"an array of shape {shape}")
        return shape

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        view = self.take(math.prod(shape) * dtype.itemsize)
        return np.ndarray(shape, dtype, view).astype(dtype.newbyteorder("="))


_V2, _V3 = 0xF993FAC9, 0xF993FACA  # with MXNet's classic shapes, and with NumPy's
_DENSE, _ROW_SPARSE = 0, 1
_INT64 = 6
_FLOATS = {0: "<f4", 1: "<f8", 2: "<f2", 12: "<u2"}  # 12 is bfloat16, seen as its bit pattern


def read_array(raw: Bytes, spare: int) -> tuple[NDArray[Any], int]:
    """Return the array that ``NDArray::Save`` wrote, and the rest of ``spare``, the bytes that absent rows may still
    take."""
    if raw.at:
        raise ValueError("two arrays share their bytes")
    magic, storage = raw.number("<I"), raw.number("<i")
    if magic not in (_V2, _V3):
        raise ValueError(f"an array starts with {magic:#x}, which is neither MXNet's format 2 nor 3")
    if storage not in (_DENSE, _ROW_SPARSE):
        raise ValueError(f"an array of storage type {storage}: a state is dense (0) or row-sparse (1)")
    stored = raw.shape() if storage == _ROW_SPARSE else None
    shape = raw.shape()
    if magic == _V2 and not shape:
        raise ValueError("an array has no value")
    device, _, flag = raw.number("<i"), raw.number("<i"), raw.number("<i")
    if device not in (1, 2, 3, 5):  # CPU, GPU, pinned and shared memory
        raise ValueError(f"an array on a device of kind {device}")
    if flag not in _FLOATS:
        raise ValueError(f"an array of dtype {flag}: a state is float32 (0), float64 (1), float16 (2) or bfloat16 (12)")
    dtype = np.dtype(_FLOATS[flag])
    if stored is None:
        values = raw.array(dtype, shape)
    else:
        values, spare = _row_sparse(raw, dtype, shape, stored, spare)
    if raw.at != len(raw.view):
        raise ValueError(f"an array of shape {shape} is followed by {len(raw.view) - raw.at} bytes too many")
    return ((values.astype(np.uint32) << 16).view(np.float32) if flag == 12 else values), spare


def _row_sparse(
    raw: Bytes, dtype: np.dtype[Any], shape: tuple[int, ...], stored: tuple[int, ...], spare: int
) -> tuple[NDArray[Any], int]:
    if raw.number("<i") != _INT64 or not shape or raw.shape() != stored[:1] or stored[1:] != shape[1:]:
        raise ValueError(f"a row-sparse array of shape {shape} with rows of shape {stored}")
    held = raw.array(dtype, stored)
    rows = raw.array(np.dtype("<i8"), stored[:1])
    if rows.size and (rows[0] < 0 or rows[-1] >= shape[0] or (rows[1:] <= rows[:-1]).any()):
        raise ValueError("a row-sparse array whose rows are out of order or out of range")
    if len(rows) == shape[0]:
        return held, spare
    spare -= (shape[0] - len(rows)) * math.prod(shape[1:]) * dtype.itemsize
    if spare < 0:
        raise ValueError(
            f"a row-sparse array with {len(rows)} of {shape[0]} rows: the file is too short to justify the memory for "
            "the others"
        )
    dense = np.zeros(shape, held.dtype)
    dense[rows] = held
    return dense, spare
