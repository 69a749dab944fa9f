"""Row-sparse updates of plain arrays on the CPU, looked at and checked by compiled code.

For few lookups the checks in Python cost more than the update; this is their short cut. Whatever is not plain, and
every error but a row id outside the weight, is left to the ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adagrad.kernels import cpu_rows
from adagrad.kernels.checked import is_row_sparse
from adagrad.kernels.cpu_rule import hyper
from adagrad.kernels.layout import (
    CONTIGUOUS,
    COUNT,
    FORMAT,
    INT32,
    KIND,
    NONE,
    PLACE,
    RANK,
    SEEN,
    SIZES,
    START,
    STRIDES,
    UNIT,
    item_size,
    layout,
    look,
    word,
)
from adagrad.kernels.numba_jit import jit
from adagrad.kernels.row_groups import (
    ARE_APART,
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
from adagrad.kernels.spans import are_disjoint, together
from adagrad.kernels.table import Formats, code_of, formats
from adagrad.row_sparse import RowSparse
from adagrad.rule import Rule


@jit(helper=True)
def _are_apart(starts: Any, ends: Any) -> bool:
    """Whether weight, history and master copy share no byte with any other operand."""
    for k in (WEIGHT, HISTORY, MASTER):
        for other in range(5):
            if other != k and max(starts[k], starts[other]) < min(ends[k], ends[other]):
                return False
    return True


@jit(holds_gil=True)
def _look_at(weight: int, values: int, history: int, master: int, indices: int, how: Any, row_wise: bool, facts: Any
             ) -> Any:  # fmt: skip
    """The code of an update (-1 where it is not plain); fills its ``facts``."""
    out, seen = np.empty(1, np.int64), np.zeros((5, SEEN), np.int64)
    things, has_master = (weight, values, history, master, indices), master != how[NONE]
    for k in range(5):
        if (k != MASTER or has_master) and not look(things[k], how, out, seen[k]):
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
    facts[ARE_APART] = _are_apart(facts[BASE:ENDS], facts[ENDS:STRIDE])
    return code_of(seen, has_master, row_wise, True)


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
        return functools.partial(self._launch, checked_rows(at, self.facts), rates, rule, threads)

    def _launch(self, ids: np.ndarray, rates: np.ndarray, rule: Rule, threads: int | None) -> None:
        if len(ids) and self.facts[LENGTH]:
            cpu_rows.launch(self.facts, ids, self.formats, rule.row_wise, rates, rule.scalars, threads)


def rows(weight: Any, grad: Any, history: Any, master: Any, *, row_wise: bool) -> Rows | None:
    """An update with a RowSparse or a sparse COO tensor as the kernels want it, or None for the ordinary way."""
    how = layout()
    if how is None or grad.shape != getattr(weight, "shape", None):
        return None
    if isinstance(grad, RowSparse):
        indices, values = grad.indices, grad.values
    elif grad.sparse_dim() == 1:
        indices, values = grad._indices(), grad._values()
    else:
        return None
    facts = np.empty(FACTS, np.int64)
    code = _look_at(id(weight), id(values), id(history), id(master), id(indices), how, row_wise, facts)
    return None if code < 0 else Rows(values, indices, *formats(code), facts)


def update_plain(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], lrs: Any, wds: Any,
                 rule: Rule, threads: int | None) -> bool:  # fmt: skip
    """Check and update a list of row-sparse gradients, if all is plain and on the CPU; False if it is left alone."""
    plain: list[Rows] = []
    for i, grad in enumerate(grads):
        if not is_row_sparse(grad):
            return False
        found = rows(weights[i], grad, histories[i], masters[i] if masters else None, row_wise=rule.row_wise)
        if found is None or found.place or not found.facts[ARE_APART]:
            return False
        plain.append(found)
    if len(plain) > 1 and not are_disjoint(*together([found.spans for found in plain])):
        return False
    rates, each = hyper(lrs, wds, rule), len(lrs) > 1 or len(wds) > 1
    plans = [found.plan(f"[{i}]", rates[i if each else 0], rule, threads) for i, found in enumerate(plain)]
    for carry_out in plans:
        carry_out()
    return True
