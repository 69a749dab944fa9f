"""The address table of lists of torch tensors, built and checked by compiled code.

Asking 300 parameters, gradients and histories for dtype, shape, layout and address through Python costs several times
what updating them costs; :mod:`adagrad.kernels.tensor_layout` says how compiled code asks. Whatever is not plain, and
every error, is left to the ordinary way.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from adagrad.kernels.cpu_dense import COLUMNS, GRAD, HISTORY, MASTER, ROW, SIZE, WEIGHT
from adagrad.kernels.formats import load, pointer, store
from adagrad.kernels.ndarray_table import _disjoint, _item, _word
from adagrad.kernels.numba_jit import jit
from adagrad.kernels.tensor_layout import (
    CONTIGUOUS,
    COUNT,
    FLOAT32,
    FORMAT,
    FORMATS,
    PLACE,
    RANK,
    SEEN,
    SIZES,
    START,
    STRIDES,
    item_size,
    layout,
    look,
)

Formats: TypeAlias = tuple[str, str, str, str | None]

# A row's code: 16 * place + 8 if the gradient is wider than the weight + 4 if there is a master copy + format.
WITH_MASTER, WIDE_GRAD, PLACES = 4, 8, 16

_single, _double = np.empty(0, np.float32), np.empty(0, np.float64)


@jit(helper=True)
def _same_shape(a: Any, b: Any, row_wise: bool) -> Any:
    """Whether ``b`` has the shape of ``a``, or of its row-wise history."""
    same = a[RANK] == b[RANK]
    for d in range(a[RANK] if same else 0):
        same &= _word(b[SIZES], 8 * d) == (1 if row_wise and d > 0 else _word(a[SIZES], 8 * d))
    return same


@jit(helper=True)
def _same_order(a: Any, b: Any) -> Any:
    """Whether the elements of two tensors of one shape lie in the same order."""
    if a[CONTIGUOUS] == 1:
        return b[CONTIGUOUS] == 1
    same = True
    for d in range(a[RANK]):
        same &= _word(a[STRIDES], 8 * d) == _word(b[STRIDES], 8 * d)
    return same


@jit(helper=True)
def _has_no_gaps(a: Any) -> Any:
    """Whether some order of the dimensions makes it contiguous (channels last, transposed, ...)."""
    if a[CONTIGUOUS] == 1:
        return True
    reach = 1
    for _ in range(a[RANK]):
        for d in range(a[RANK]):
            if _word(a[STRIDES], 8 * d) == reach and _word(a[SIZES], 8 * d) > 1:
                reach *= _word(a[SIZES], 8 * d)
                break
    return reach == a[COUNT]


@jit(helper=True)
def code_of(w: Any, g: Any, h: Any, m: Any, has_master: bool, row_wise: bool, rows: bool) -> Any:
    """The code of a weight whose tensors fit together, else -1; ``rows`` where ``g`` is of some rows, in any order."""
    low = w[FORMAT] < FLOAT32
    computing = FLOAT32 if low else w[FORMAT]
    if g[PLACE] != w[PLACE] or h[PLACE] != w[PLACE] or h[FORMAT] != computing:
        return -1
    if g[FORMAT] != w[FORMAT] and not (low and g[FORMAT] == FLOAT32):
        return -1
    if not (rows or _same_shape(w, g, False)) or not _same_shape(w, h, row_wise):
        return -1
    if row_wise:
        if w[RANK] == 0 or w[CONTIGUOUS] != 1 or g[CONTIGUOUS] != 1 or h[CONTIGUOUS] != 1:
            return -1
    elif not ((rows or _same_order(w, g)) and _same_order(w, h) and _has_no_gaps(w)):
        return -1
    code = w[PLACE] * PLACES + w[FORMAT]
    if g[FORMAT] != w[FORMAT]:
        code += WIDE_GRAD
    if has_master:
        if not low or m[PLACE] != w[PLACE] or m[FORMAT] != FLOAT32:
            return -1
        if not _same_shape(w, m, False) or not _same_order(w, m):
            return -1
        code += WITH_MASTER
    return code


@jit()
def fill(lists: Any, how: Any, none: int, row_wise: bool, table: Any, codes: Any, starts: Any, ends: Any) -> Any:
    """Fill ``table``, the ``codes`` of its rows and the spans of memory, from four lists, given by ``id``.

    Row ``i`` is for the ``i``-th weight, gradient, history and, if there is such a list, master copy or None. Codes
    are -1, and spans empty, where the row is left to the ordinary way. ``starts`` and ``ends``: weights, histories,
    master copies if there is such a list, gradients. Returns the code that all rows share (-1 if they do not) and the
    number of elements.
    """
    n = len(table)
    grads = len(starts) - n
    total = 0
    out = np.empty(1, np.int64)
    w, g, h, m = np.zeros(SEEN, np.int64), np.zeros(SEEN, np.int64), np.zeros(SEEN, np.int64), np.zeros(SEEN, np.int64)
    for i in range(n):
        codes[i] = -1
        table[i] = 0
        for at in range(i, len(starts), n):
            starts[at], ends[at] = 0, 0
        master = _item(lists[MASTER], i) if lists[MASTER] else none
        has_master = master != none
        if (
            look(_item(lists[WEIGHT], i), how, out, w)
            and look(_item(lists[GRAD], i), how, out, g)
            and look(_item(lists[HISTORY], i), how, out, h)
            and (not has_master or look(master, how, out, m))
        ):
            codes[i] = code_of(w, g, h, m, has_master, row_wise, False)
        if codes[i] < 0:
            continue
        table[i, WEIGHT], table[i, GRAD], table[i, HISTORY] = w[START], g[START], h[START]
        table[i, SIZE] = w[COUNT]
        total += w[COUNT]
        if row_wise and w[COUNT]:
            table[i, ROW] = w[COUNT] // _word(w[SIZES], 0)
        starts[i], ends[i] = w[START], w[START] + item_size(w[FORMAT]) * w[COUNT]
        starts[n + i], ends[n + i] = h[START], h[START] + item_size(h[FORMAT]) * h[COUNT]
        starts[grads + i], ends[grads + i] = g[START], g[START] + item_size(g[FORMAT]) * g[COUNT]
        if has_master:
            table[i, MASTER] = m[START]
            starts[2 * n + i], ends[2 * n + i] = m[START], m[START] + item_size(m[FORMAT]) * m[COUNT]
    same = codes[0]
    for i in range(n):
        same = same if codes[i] == same else -1
    return same, total


@jit()
def _are_disjoint(starts: Any, ends: Any, written: int, order: Any) -> bool:
    return _disjoint(starts, ends, written, order)


def are_disjoint(starts: np.ndarray, ends: np.ndarray, written: int) -> bool:
    """Whether the first ``written`` spans share no byte with any other span."""
    return bool(_are_disjoint(starts, ends, written, _order(len(starts))))


@functools.lru_cache(maxsize=64)
def _order(spans: int) -> np.ndarray:
    return np.arange(spans)


class Table(NamedTuple):
    """Lists of tensors as the kernels want them."""

    rows: np.ndarray
    """(n, COLUMNS), as :mod:`adagrad.kernels.cpu_dense` has it."""
    codes: np.ndarray
    """Which rows go together, see :func:`formats`; -1 for those that are left to the ordinary way."""
    common: int
    """The code of all rows, or -1."""
    total: int
    """Elements in all rows."""
    starts: np.ndarray
    """Where the rows' memory begins: what is written to, then what is read."""
    ends: np.ndarray
    written: int
    """How many of the spans are written to."""

    def part(self, which: list[int]) -> tuple[np.ndarray, int]:
        """Some of the rows, and their elements."""
        rows = self.rows[np.array(which)]
        return rows, int(rows[:, SIZE].sum())


def table(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], row_wise: bool) -> Table:
    """See :class:`Table`. ``masters`` may be empty or hold None. Keep the tensors while the table is in use."""
    n = len(weights)
    columns = 4 if masters else 3
    rows, codes = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64)
    starts, ends = np.empty((2, columns * n), np.int64)
    how = layout()
    if how is None or n == 0:
        codes[:], starts[:], ends[:] = -1, 0, 0
        return Table(rows, codes, -1, 0, starts, ends, (columns - 1) * n)
    lists = np.array([id(weights), id(grads), id(histories), id(masters) if masters else 0])
    common, total = fill(lists, how, id(None), row_wise, rows, codes, starts, ends)
    return Table(rows, codes, common, total, starts, ends, (columns - 1) * n)


@functools.lru_cache(maxsize=256)
def formats(code: int) -> tuple[int, Formats]:
    """What a code says: the place (0 for the CPU, 1 + index of a CUDA device) and the formats."""
    place, digits = divmod(code, PLACES)
    weight = FORMATS[digits % WITH_MASTER]
    computing = "float64" if weight == "float64" else "float32"
    grad = "float32" if digits & WIDE_GRAD else weight
    return place, (weight, grad, computing, "float32" if digits & WITH_MASTER else None)


# ----------------------------------------------------------------------------------------------------------- counts


@jit()
def _read_counts(counts: int, how: Any, addresses: Any, values: Any) -> bool:
    """Addresses (made negative for float64) and values; False unless all are plain numbers on the CPU."""
    out, seen = np.empty(1, np.int64), np.zeros(SEEN, np.int64)
    for i in range(len(addresses)):
        if not look(_item(counts, i), how, out, seen) or seen[PLACE] != 0 or seen[COUNT] != 1:
            return False
        if seen[FORMAT] < FLOAT32 or seen[START] == 0:
            return False
        if seen[FORMAT] == FLOAT32:
            addresses[i], values[i] = seen[START], load(pointer(seen[START], _single, "history"), 0)
        else:
            addresses[i], values[i] = -seen[START], load(pointer(seen[START], _double, "history"), 0)
    return True


@jit()
def _increment(addresses: Any) -> None:
    for address in addresses:
        if address > 0:
            single = pointer(address, _single, "history")
            store(single, 0, load(single, 0) + np.float32(1))
        else:
            double = pointer(-address, _double, "history")
            store(double, 0, load(double, 0) + 1.0)


class Counts:
    """The counts of steps of a list of parameters, each a tensor of one number, wherever they are."""

    def __init__(self, counts: list[Tensor]) -> None:
        self._counts = counts
        self._addresses, self._values = np.empty(len(counts), np.int64), np.empty(len(counts))
        how = layout()
        self._plain = how is not None and _read_counts(id(counts), how, self._addresses, self._values)
        if not self._plain and not all(isinstance(count, Tensor) for count in counts):
            raise TypeError("step: a count that is no tensor: must be a tensor of one number")

    def values(self, *, wait: bool) -> list[Any]:
        """One for each parameter, or one for all; those on a device as float64 there, unless ``wait`` says to wait."""
        if self._plain:
            values: list[Any] = self._values.tolist()
        else:
            values = [float(count) if wait or count.device.type == "cpu" else count.double() for count in self._counts]
        alike = all(isinstance(value, float) for value in values) and len(set(values)) == 1
        return values[:1] if alike else values

    def advance(self) -> None:
        """Add 1 to each count."""
        if self._plain:
            _increment(self._addresses)
        elif self._counts:
            with torch.no_grad():
                torch._foreach_add_(self._counts, 1)
