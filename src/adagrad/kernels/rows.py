"""Row-sparse updates of plain arrays on the CPU, looked at, checked and carried out by compiled code.

For few lookups the checks in Python cost more than the update; this is their short cut. Whatever is not plain, and
every error but a row id outside the weight and lack of memory, is left to the ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adagrad.kernels import cpu_rows
from adagrad.kernels.checked import refuse_row
from adagrad.kernels.counts import advance_counts, find_counts
from adagrad.kernels.cpu_rows import ROW_COST, carry_out, kernel, room
from adagrad.kernels.cpu_rule import hyper
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
    hold_parts,
    item,
    item_size,
    layout,
    let_go_of_parts,
    look,
    look_into,
    sparse_body,
    word,
)
from adagrad.kernels.numba_jit import acquire_gil, borrowed, jit, max_workers, release_gil, workers
from adagrad.kernels.row_groups import (
    ARE_LONG,
    BASE,
    ENDS,
    ENTRIES,
    FACTS,
    FINDINGS,
    GRAD,
    HEIGHT,
    HIGH,
    HISTORY,
    IDS,
    LENGTH,
    MASTER,
    MOST,
    RATES,
    SCALARS,
    STRIDE,
    WEIGHT,
    check_ids,
    checked_rows,
    checking,
)
from adagrad.kernels.row_sums import grouping
from adagrad.kernels.spans import disjoint, guess
from adagrad.kernels.table import PLACES, Formats, code_of, formats
from adagrad.row_sparse import RowSparse
from adagrad.rule import Rule


@jit(holds_gil=True)
def _look_at(weight: int, values: int, history: int, master: int, indices: int, how: Any, row_wise: bool, facts: Any
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

    With other than one sparse dimension, values have not as many dimensions as the weight: :func:`_look_at` asks.
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
    code = _look_at(id(weight), id(values), id(history), id(master), id(indices), how, row_wise, facts)
    return None if code < 0 else Rows(values, indices, *formats(code), facts)


# ---------------------------------------------------------------------------------------------------------- all at once

_SPANS, _SPANS_WITH_MASTERS = (WEIGHT, HISTORY, GRAD, IDS), (WEIGHT, HISTORY, MASTER, GRAD, IDS)
"""The order in which spans of memory stand: what is written to comes first."""

CHECK, GROUP, UPDATE = range(3)
"""The workers of an update, see :func:`_workers`."""

WAS_LARGE = 2 * PLACES
"""Where it is remembered, behind the workers, how much work the last list was, if it was not small; else 0."""

DONE, LARGE, LEFT, OUT_OF_RANGE, SHORT = -5, -4, -3, -2, -1
"""What was done of a list: all; nothing, because it is not so small; nothing, because it is not plain or not on the
CPU; nothing, because a row id is outside its weight; not all, because memory is short. Any other number is that of the
workers that are wanted."""


@jit(holds_gil=True)
def _update_plain(weights: int, values: int, histories: int, masters: int, steps: int, indices: int, how: Any,
                  row_wise: bool, facts: Any, rates: Any, scalars: Any, known: Any, order: Any, small: int, count: int
                  ) -> Any:  # fmt: skip
    """What was done, and of which update; the position of a row id that is outside its weight, and the id.

    ``count`` is 0 for a list that is tried as if it were little work.
    """
    n, work, entries, facts, how = len(facts), 0, 0, borrowed(facts), borrowed(how)
    numbers, spans, written = np.empty(n, np.int64), np.empty((2, len(order)), np.int64), len(order) - 2 * n
    step_at = np.empty(n if steps else 0, np.int64)
    for i in range(n):
        master = item(masters, i) if masters else how[NONE]
        code = _look_at(item(weights, i), item(values, i), item(histories, i), master, item(indices, i), how, row_wise,
                        facts[i])  # fmt: skip
        if code < 0 or code >= PLACES:
            return LEFT, i, 0, 0
        numbers[i] = 2 * code + (1 if facts[i, HEIGHT] > HIGH else 0)
        entries += facts[i, ENTRIES]
        work += facts[i, ENTRIES] * (facts[i, LENGTH] + ROW_COST)
        facts[i, RATES], facts[i, SCALARS] = rates[i if len(rates) > 1 else 0].ctypes.data, scalars.ctypes.data
        for k in range(5 if masters else 4):
            at, what = k * n + i, _SPANS_WITH_MASTERS[k] if masters else _SPANS[k]
            spans[0, at], spans[1, at] = facts[i, BASE + what], facts[i, ENDS + what]
    known[WAS_LARGE, 0] = work if work >= small else 0
    if count == 0 and work >= small:
        return LARGE, 0, 0, 0
    if not disjoint(spans[0], spans[1], written, order) or (steps and not find_counts(steps, how, step_at)):
        return LEFT, 0, 0, 0
    for i in range(n):
        if known[numbers[i], UPDATE] == 0:
            return numbers[i], i, 0, 0
    ids, found = np.empty(entries, np.int64), np.empty((max(count, 1), FINDINGS), np.int64)
    kept, scratch = room(max(count, 1))
    handles, state = np.zeros((n if count > 0 else 0, 2), np.int64), np.int64(0)
    if count > 0:
        for i in range(n):
            hold_parts(sparse_body(item(values, i), how), how, handles[i])
        state = release_gil()
    # No exception may come from here: it would find no GIL. Lack of memory in a worker is no exception, but a sign.
    done, which, bad, row = _check_ids_and_carry_out(
        facts, numbers, known, np.int64(ids.ctypes.data), found, kept, scratch, small, count
    )
    if count > 0:
        acquire_gil(state)
        let_go_of_parts(handles.reshape(-1), how)
    if done == DONE:
        advance_counts(step_at)
    ids[:0] = 0  # it is used by address above: this keeps it alive until here
    return done, which, bad, row


@jit()
def _check_ids_and_carry_out(facts: Any, numbers: Any, known: Any, ids: Any, found: Any, kept: Any, scratch: Any,
                             small: int, count: int) -> Any:  # fmt: skip
    """What was done, see :func:`_update_plain`; all ids are copied to the address ``ids`` first."""
    for i in range(len(facts)):
        elements = facts[i, ENTRIES] * facts[i, LENGTH]
        bad, row = check_ids(facts[i], ids, found, known[numbers[i], CHECK], _crew(elements, small, count))
        if bad >= 0:
            return OUT_OF_RANGE, i, bad, row
        ids += 8 * facts[i, ENTRIES]
    for i in range(len(facts)):
        elements = facts[i, ENTRIES] * facts[i, LENGTH]
        group, update = known[numbers[i], GROUP], known[numbers[i], UPDATE]
        if elements and not carry_out(facts[i], kept, scratch, group, update, _crew(elements, small, count)):
            return SHORT, i, np.int64(0), np.int64(0)
    return DONE, 0, np.int64(0), np.int64(0)


@jit(helper=True)
def _crew(elements: Any, small: int, count: int) -> Any:
    """How many of ``count`` workers an update gets."""
    return count if elements >= small and count > 1 else 1


def update_plain(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], steps: list[Any],
                 lrs: Any, wds: Any, rule: Rule, threads: int | None) -> bool:  # fmt: skip
    """Check and update a list of row-sparse gradients by one call of compiled code; False if it is left as it was.

    The lists :func:`adagrad.kernels.table.fit`.

    Raises
    ------
    IndexError
        For a row id outside its weight; then nothing has changed.
    MemoryError
        Where there is none for the sums of rows; then weights that come later in the list have not changed.
    """
    how, n = layout(), len(weights)
    if how is None:
        return False
    values = indices = grads  # sparse COO tensors: compiled code knows where they keep both
    if RowSparse in set(map(type, grads)):
        values, indices = [], []
        for weight, grad in zip(weights, grads, strict=True):
            if type(grad) is not RowSparse:
                values.append(grad)
                indices.append(grad)
            elif grad.shape == getattr(weight, "shape", None):
                values.append(grad.values)
                indices.append(grad.indices)
            else:
                return False
    masters_id, steps_id = id(masters) if masters else 0, id(steps) if steps else 0
    lists = id(weights), id(values), id(histories), masters_id, steps_id, id(indices)
    facts, known, order = np.empty((n, FACTS), np.int64), _workers(rule.row_wise), guess((5 if masters else 4) * n)
    given = *lists, how, rule.row_wise, facts, hyper(lrs, wds, rule), rule.scalars, known, order, cpu_rows.SMALL
    is_trial = not known[WAS_LARGE, 0]
    while True:
        if is_trial:
            done, i, bad, row = _update_plain(*given, 0)
        else:
            crew = workers(threads or max_workers(), int(known[WAS_LARGE, 0]))
            with crew as count:
                done, i, bad, row = _update_plain(*given, count)
                crew.work = int(known[WAS_LARGE, 0])
        if done >= 0:
            code, high = divmod(done, 2)
            form = formats(code)[1]
            known[done] = checking(bool(high)), grouping(bool(high), form[2]), kernel(bool(high), *form, rule.row_wise)
        elif done == OUT_OF_RANGE:
            refuse_row(f"[{i}]", bad, row, weights[i].shape[0])
        elif done == SHORT:
            raise cpu_rows.out_of_memory(f"[{i}]", int(facts[i, ENTRIES]))
        elif done != LARGE:
            return bool(done == DONE)
        else:
            is_trial = False


@functools.cache
def _workers(row_wise: bool) -> np.ndarray:
    """The workers that have been compiled, by twice the code and 1 more for a high weight; and ``WAS_LARGE``."""
    return np.zeros((WAS_LARGE + 1, 3), np.int64)
