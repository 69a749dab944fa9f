"""Row-sparse updates of plain arrays, looked at and checked by compiled code.

Whatever is not plain, and every error but a row id outside the weight, is left to checks in Python, which cost more
than an update of few rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adagrad.kernels import cpu_rows
from adagrad.kernels.layout import (
    CONTIGUOUS,
    COUNT,
    FORMAT,
    INDICES_AT,
    INT32,
    KIND,
    NONE,
    PLACE,
    RANK,
    RANK_AT,
    SEEN,
    SIZES,
    START,
    STRIDES,
    UNIT,
    VALUES_AT,
    item_size,
    layout,
    look,
    look_into,
    sparse_body,
    word,
)
from adagrad.kernels.numba_jit import borrowed, jit
from adagrad.kernels.row_groups import (
    ARE_LONG,
    BASE,
    ENDS,
    ENTRIES,
    FACTS,
    GRAD,
    HEIGHT,
    HISTORY,
    IDS,
    LENGTH,
    MASTER,
    MOST,
    STRIDE,
    WEIGHT,
    checked_rows,
)
from adagrad.kernels.table import Formats, code_of, formats
from adagrad.row_sparse import RowSparse
from adagrad.rule import Rule


@jit(holds_gil=True)
def look_at(weight: int, values: int, history: int, master: int, indices: int, how: Any, row_wise: bool, facts: Any
            ) -> Any:  # fmt: skip
    """The code of an update (-1 where it is not plain); fills its ``facts``.

    ``values`` and ``indices`` may be one and the same sparse COO tensor, which has both; its shape is looked at then.
    """
    own_out, own_seen = np.empty(1, np.int64), np.zeros((5, SEEN), np.int64)
    out, seen, how = borrowed(own_out), borrowed(own_seen), borrowed(how)
    things, has_master = (weight, values, history, master, indices), master != how[NONE]
    body = sparse_body(values, how) if values == indices else 0
    for k in range(5):
        if body and k in (GRAD, IDS):
            if not look_into(body, VALUES_AT if k == GRAD else INDICES_AT, how, out, seen[k]):
                return -1
        elif (k != MASTER or has_master) and not look(things[k], how, out, seen[k]):
            return -1
    w, v, ids = seen[WEIGHT], seen[GRAD], seen[IDS]
    # Ids stand in one dimension, or as those of a sparse tensor in the last of two.
    last = ids[RANK] - 1
    if ids[KIND] != w[KIND] or ids[PLACE] != w[PLACE] or ids[FORMAT] < INT32 or last < 0 or last > 1:
        return -1
    entries = word(ids[SIZES], 8 * last)
    if entries > MOST or ids[COUNT] != entries or (entries > 1 and word(ids[STRIDES], 8 * last) != ids[UNIT]):
        return -1
    if w[RANK] == 0 or v[RANK] != w[RANK] or word(v[SIZES], 0) != entries:
        return -1
    if body and (word(body, how[RANK_AT]) != w[RANK] or word(body, how[RANK_AT] + 8) != word(w[SIZES], 0)):
        return -1
    length = 1
    for d in range(1, w[RANK]):
        length *= word(w[SIZES], 8 * d)
        if word(v[SIZES], 8 * d) != word(w[SIZES], 8 * d):
            return -1
    facts[:] = 0
    facts[ENTRIES], facts[HEIGHT] = entries, word(w[SIZES], 0)
    facts[LENGTH], facts[ARE_LONG] = length, ids[FORMAT] > INT32
    for k in range(5):
        if k != MASTER or has_master:
            size = item_size(seen[k, FORMAT])
            facts[BASE + k], facts[ENDS + k] = seen[k, START], seen[k, START] + seen[k, COUNT] * size
            if k != IDS:
                facts[STRIDE + k] = size * (1 if row_wise and k == HISTORY else length)
                if not seen[k, CONTIGUOUS]:
                    return -1
    code = code_of(seen, has_master, row_wise)
    own_out[:0], own_seen[:0] = 0, 0  # they are used by address above: this keeps them alive
    return code


class Rows(NamedTuple):
    """A row-sparse update, checked but for its row ids."""

    values: Any
    indices: Any
    """int32 or int64, in one dimension, or as those of a sparse tensor in the last of two."""
    place: int
    """0 for the CPU, 1 + index of a CUDA device."""
    formats: Formats
    facts: np.ndarray

    @property
    def spans(self) -> tuple[np.ndarray, int]:
        """Where the memory of weight, history, master copy, values and ids begins and ends; three are written to."""
        return self.facts[BASE:STRIDE].reshape(2, -1)[:, [WEIGHT, HISTORY, MASTER, GRAD, IDS]], 3

    def plan(self, at: str, rates: np.ndarray, rule: Rule, threads: int | None) -> Callable[[], None]:
        """What carries it out on the CPU; IndexError for a row id outside the weight."""
        return functools.partial(self._launch, at, checked_rows(at, self.facts), rates, rule, threads)

    def _launch(self, at: str, ids: np.ndarray, rates: np.ndarray, rule: Rule, threads: int | None) -> None:
        if len(ids) and self.facts[LENGTH]:
            cpu_rows.launch(at, self.facts, ids, self.formats, rule.row_wise, rates, rule.scalars, threads)


def _values_and_indices(weight: Any, grad: Any) -> tuple[Any, Any] | None:
    """Those of a RowSparse or a sparse COO tensor in the shape of the weight; None where it has another.

    With other than one sparse dimension, values have not as many dimensions as the weight: :func:`look_at` asks.
    """
    if grad.shape != getattr(weight, "shape", None):
        return None
    return (grad.values, grad.indices) if isinstance(grad, RowSparse) else (grad._values(), grad._indices())


def rows(weight: Any, grad: Any, history: Any, master: Any, *, row_wise: bool) -> Rows | None:
    """An update with a RowSparse or a sparse COO tensor as the kernels want it, or None for the ordinary way."""
    how, parts = layout(), _values_and_indices(weight, grad)
    if how is None or parts is None:
        return None
    values, indices = parts
    facts = np.empty(FACTS, np.int64)
    code = look_at(id(weight), id(values), id(history), id(master), id(indices), how, row_wise, facts)
    return None if code < 0 else Rows(values, indices, *formats(code), facts)
