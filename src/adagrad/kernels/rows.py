"""Row-sparse updates of plain arrays, looked at and checked by compiled code.

Whatever is not plain, and every error but a row id outside the weight, is left to checks in Python, which cost more
than an update of few rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
    item,
    item_size,
    layout,
    look,
    look_into,
    sparse_body,
    word,
)
from adagrad.kernels.numba_jit import jit, uncounted
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
def look_at_rows(weight: int, values: int, history: int, master: int, indices: int, how: Any, row_wise: bool,
                 facts: Any) -> Any:  # fmt: skip
    """The code of an update (-1 where it is not plain); fills its ``facts``.

    ``values`` and ``indices`` may be one and the same sparse COO tensor, which has both; its shape is looked at then.
    """
    own_out, own_seen = np.empty(1, np.int64), np.zeros((5, SEEN), np.int64)
    out, seen, how = uncounted(own_out), uncounted(own_seen), uncounted(how)
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
    if ids[KIND] != w[KIND] or ids[PLACE] != w[PLACE] or ids[FORMAT] < INT32 or last < 0 or last > ids[KIND]:
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


@jit(holds_gil=True)
def _look_at_all(weights: int, values: int, histories: int, masters: int, indices: int, how: Any, row_wise: bool,
                 facts: Any, codes: Any) -> None:  # fmt: skip
    """:func:`look_at_rows` for lists, given by ``id``; of master copies 0 for no list."""
    facts, how = uncounted(facts), uncounted(how)
    for i in range(len(codes)):
        master = item(masters, i) if masters else how[NONE]
        codes[i] = look_at_rows(item(weights, i), item(values, i), item(histories, i), master, item(indices, i), how,
                                row_wise, facts[i])  # fmt: skip


_SPANS = np.add.outer([BASE, ENDS], [WEIGHT, HISTORY, MASTER, GRAD, IDS]).ravel()


class Rows(NamedTuple):
    """Row-sparse updates, checked but for their row ids."""

    facts: np.ndarray
    """(n, FACTS), see :mod:`adagrad.kernels.row_groups`."""
    codes: list[int]
    """What :func:`adagrad.kernels.table.formats` says of them; -1 for those that are left to the ordinary way."""
    parts: list[Any]
    """Their values and indices; int32 or int64, in one dimension, or as those of a sparse tensor in the last of two."""

    @property
    def spans(self) -> tuple[np.ndarray, int]:
        """Where all their memory begins and ends, what is written to first, and how much of it that is."""
        return self.facts.T[_SPANS].reshape(2, -1), 3 * len(self.facts)

    def some(self, which: Sequence[int]) -> Rows:
        if len(which) == len(self.codes):
            return self
        return Rows(self.facts[which], [self.codes[k] for k in which], [self.parts[k] for k in which])

    def plan(self, k: int, at: str, rates: np.ndarray, rule: Rule, threads: int | None) -> Callable[[], None]:
        """What carries out the ``k``-th on the CPU; IndexError for a row id outside the weight."""
        facts, form = self.facts[k], formats(self.codes[k])[1]
        ids = checked_rows(at, facts)
        cpu_rows.kernel(ids.itemsize == 8, *form, rule.row_wise)  # compiled now, when nothing has changed
        return functools.partial(_launch, at, self.parts[k], facts, ids, form, rates, rule, threads)


NOTHING = Rows(np.zeros((0, FACTS), np.int64), [], [])


def _launch(at: str, parts: Any, facts: np.ndarray, ids: np.ndarray, form: Formats, rates: np.ndarray, rule: Rule,
            threads: int | None) -> None:  # fmt: skip
    """``parts`` are what the facts are of: alive until here, though another thread may give the gradient new ones."""
    if len(ids) and facts[LENGTH]:
        cpu_rows.launch(at, facts, ids, form, rule.row_wise, rates, rule.scalars, threads)


def _values_and_indices(weight: Any, grad: Any) -> tuple[Any, Any] | None:
    """Those of a RowSparse or a sparse COO tensor in the shape of the weight; None where it has another.

    With other than one sparse dimension, values have not as many dimensions as the weight: :func:`look_at_rows` asks.
    """
    if grad.shape != getattr(weight, "shape", None):
        return None
    return (grad.values, grad.indices) if isinstance(grad, RowSparse) else (grad._values(), grad._indices())


def rows(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], *, row_wise: bool) -> Rows:
    """Updates with RowSparse or sparse COO tensors as the kernels want them; ``masters`` may be empty or hold None."""
    n, how = len(weights), layout()
    facts, codes = np.zeros((n, FACTS), np.int64), np.full(n, -1, np.int64)
    parts = list(map(_values_and_indices, weights, grads))
    if how is not None and n:
        values, indices = ([None if part is None else part[k] for part in parts] for k in (0, 1))
        lists = id(weights), id(values), id(histories), id(masters) if masters else 0, id(indices)
        _look_at_all(*lists, how, row_wise, facts, codes)
    return Rows(facts, codes.tolist(), parts)
