"""The address table of a list of NumPy arrays, built and checked by compiled code.

Asking 300 arrays for their addresses through Python costs more than updating them. CPython's and NumPy's object
layouts are stable within what :func:`available` probes, at first use, against the public attributes: where the probe
fails (another interpreter, a free-threaded build, a new NumPy), the ordinary way is taken, which is slower and no less
exact. Only exact ``numpy.ndarray`` objects of one format, native, aligned and C-contiguous pass; all else, and every
error, is left to the ordinary way.
"""

from __future__ import annotations

import functools
import platform
import sys
from typing import Any

import numpy as np

from adagrad.arrays import FORMATS, computing_format
from adagrad.kernels.cpu_dense import COLUMNS, GRAD, HISTORY, MASTER, ROW, SIZE, WEIGHT
from adagrad.kernels.formats import load, pointer
from adagrad.kernels.numba_jit import jit

# Byte offsets in PyListObject, PyObject and PyArrayObject on 64-bit CPython with reference counts in place.
LIST_ITEMS = 24
TYPE = 8
DATA, NDIM, DIMENSIONS, DESCR, FLAGS = 16, 24, 32, 56, 64
CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400

_words = np.empty(0, np.int64)
_ints = np.empty(0, np.int32)


@jit(helper=True)
def _word(address: Any, offset: int) -> Any:
    return np.int64(load(pointer(address + offset, _words, "grad"), 0))


@jit(helper=True)
def _int(address: Any, offset: int) -> Any:
    return np.int64(load(pointer(address + offset, _ints, "grad"), 0))


@jit(helper=True)
def _item(list_id: int, i: int) -> Any:
    return _word(_word(list_id, LIST_ITEMS), 8 * i)


@jit(helper=True)
def _is_plain(array: Any, kind: int, descr: int, flags: int) -> Any:
    if _word(array, TYPE) != kind or _word(array, DESCR) != descr:
        return False
    return _int(array, FLAGS) & flags == flags


@jit(helper=True)
def _same_shape(first: int, second: int) -> bool:
    ndim = _int(first, NDIM)
    if _int(second, NDIM) != ndim:
        return False
    a, b = _word(first, DIMENSIONS), _word(second, DIMENSIONS)
    same = True
    for d in range(ndim):
        same &= _word(a, 8 * d) == _word(b, 8 * d)
    return same


@jit(helper=True)
def _sort(starts: Any, order: Any) -> None:
    """Shell's sort of the positions by ``starts``: quick to compile, and needed when the order is new alone."""
    n = len(starts)
    for i in range(n):
        order[i] = i
    gap = n // 2
    while gap > 0:
        for i in range(gap, n):
            moved, j = order[i], i
            while j >= gap and starts[order[j - gap]] > starts[moved]:
                order[j] = order[j - gap]
                j -= gap
            order[j] = moved
        gap = gap * 5 // 11 if gap > 2 else gap - 1


@jit(helper=True)
def _disjoint(starts: Any, ends: Any, written: int, order: Any) -> bool:
    """Whether the first ``written`` spans share no byte with any other span; empty spans do not count.

    ``order`` is a guess at the order of the spans, the one found last time. Where the starts strictly increase along
    it, it is their order, whatever anyone has done to it; else they are sorted and the guess is made better.
    """
    n = len(starts)
    guess, before = np.empty(n, np.int64), np.int64(-1)
    for k in range(n):
        i = order[k]
        if i < 0 or i >= n or starts[i] <= before:
            _sort(starts, guess)
            for j in range(n):
                order[j] = guess[j]
            break
        guess[k] = i
        before = starts[i]
    end_of_written, end_of_any = np.int64(-1), np.int64(-1)
    for k in range(n):
        i = guess[k]
        if starts[i] == ends[i]:
            continue
        if starts[i] < (end_of_any if i < written else end_of_written):
            return False
        end_of_any = max(end_of_any, ends[i])
        if i < written:
            end_of_written = max(end_of_written, ends[i])
    return True


@jit()
def fill(weights: int, grads: int, histories: int, kind: int, weight_descr: int, grad_descr: int, history_descr: int,
         weight_size: int, grad_size: int, history_size: int, table: Any, order: Any) -> int:  # fmt: skip
    """Fill ``table`` from three lists, given by ``id``: the number of elements, or -1 where the call is not plain."""
    n = len(table)
    total = 0
    starts, ends = np.empty(3 * n, np.int64), np.empty(3 * n, np.int64)
    for i in range(n):
        w, g, h = _item(weights, i), _item(grads, i), _item(histories, i)
        read, write = CONTIGUOUS | ALIGNED, CONTIGUOUS | ALIGNED | WRITEABLE
        if not (_is_plain(w, kind, weight_descr, write) and _is_plain(h, kind, history_descr, write)):
            return -1
        if not (_is_plain(g, kind, grad_descr, read) and _same_shape(w, g) and _same_shape(w, h)):
            return -1
        size, dimensions = 1, _word(w, DIMENSIONS)
        for d in range(_int(w, NDIM)):
            size *= _word(dimensions, 8 * d)
        table[i, WEIGHT], table[i, GRAD], table[i, HISTORY] = _word(w, DATA), _word(g, DATA), _word(h, DATA)
        table[i, MASTER], table[i, SIZE], table[i, ROW] = 0, size, 0
        total += size
        starts[i], ends[i] = table[i, WEIGHT], table[i, WEIGHT] + size * weight_size
        starts[n + i], ends[n + i] = table[i, HISTORY], table[i, HISTORY] + size * history_size
        starts[2 * n + i], ends[2 * n + i] = table[i, GRAD], table[i, GRAD] + size * grad_size
    return total if _disjoint(starts, ends, 2 * n, order) else -1


@jit()
def _probe(objects: int, i: int, out: Any) -> None:
    array = _item(objects, i)
    out[0], out[1], out[2], out[3] = array, _word(array, TYPE), _word(array, DATA), _int(array, NDIM)
    out[4], out[5] = _word(array, DESCR), _int(array, FLAGS) & (CONTIGUOUS | ALIGNED | WRITEABLE)
    for d in range(out[3]):
        out[6 + d] = _word(_word(array, DIMENSIONS), 8 * d)


@functools.cache
def available() -> bool:
    """Whether arrays are laid out as this module reads them; compared with what NumPy says of a few."""
    if platform.python_implementation() != "CPython" or sys.maxsize != 2**63 - 1:
        return False
    if hasattr(sys, "_is_gil_enabled") and "free-threading" in sys.version:
        return False
    frozen = np.arange(6.0)
    frozen.flags.writeable = False
    probes = [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(8.0)[::2], np.ones((), np.float16), frozen]
    for i, array in enumerate(probes):
        flags = array.flags
        expected = [id(array), id(np.ndarray), array.ctypes.data, array.ndim, id(array.dtype)]
        expected += [CONTIGUOUS * flags.c_contiguous | ALIGNED * flags.aligned | WRITEABLE * flags.writeable]
        expected += array.shape
        seen = np.zeros(8, np.int64)
        _probe(id(probes), i, seen)
        if seen[: len(expected)].tolist() != expected:
            return False
    return True


@functools.lru_cache(maxsize=64)
def _order(spans: int) -> Any:
    return np.arange(spans)


_DESCR = {name: np.dtype(name) for name in FORMATS if name != "bfloat16"}
_NAME = {id(descr): name for name, descr in _DESCR.items()}


def table(weights: list[Any], grads: list[Any], histories: list[Any]) -> tuple[Any, Any, int] | None:
    """The filled table, the formats of its operands and the number of elements, or None for the ordinary way."""
    if type(weights[0]) is not np.ndarray or type(grads[0]) is not np.ndarray or not available():
        return None
    weight, grad = _NAME.get(id(weights[0].dtype)), _NAME.get(id(grads[0].dtype))
    if weight is None or grad not in (weight, computing_format(weight)):
        return None
    history = computing_format(weight)
    w, g, h = _DESCR[weight], _DESCR[grad], _DESCR[history]
    n = len(weights)
    rows = np.empty((n, COLUMNS), np.int64)
    total = fill(id(weights), id(grads), id(histories), id(np.ndarray), id(w), id(g), id(h),
                 w.itemsize, g.itemsize, h.itemsize, rows, _order(3 * n))  # fmt: skip
    return None if total < 0 else (rows, (weight, grad, history, None), total)
