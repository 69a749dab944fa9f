"""Lists of row-sparse updates of plain arrays on the CPU, and dense ones beside them, by one call of compiled code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from adagrad.kernels import cpu_rows
from adagrad.kernels.checked import refuse_row
from adagrad.kernels.counts import advance_counts, find_counts
from adagrad.kernels.cpu_rows import carry_out, kernel, room, work_of
from adagrad.kernels.cpu_rule import hyper
from adagrad.kernels.dense_beside import (
    ELEMENTS,
    NOTHING,
    WEIGHTS,
    WRITTEN,
    Beside,
    carry_out_beside,
    is_large,
    put_spans,
)
from adagrad.kernels.layout import NONE, hold_parts, item, layout, let_go_of_parts, sparse_body
from adagrad.kernels.numba_jit import acquire_gil, jit, max_workers, release_gil, uncounted, worker_count, workers
from adagrad.kernels.outcomes import DONE, LARGE, LEFT, NO_MEMORY, OUT_OF_RANGE, mark_late
from adagrad.kernels.row_groups import (
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
    RATES,
    SCALARS,
    WEIGHT,
    check_ids,
    checking,
)
from adagrad.kernels.row_sums import grouping
from adagrad.kernels.rows import look_at_rows
from adagrad.kernels.spans import disjoint, guess
from adagrad.kernels.table import PLACES, formats
from adagrad.row_sparse import RowSparse
from adagrad.rule import Rule

_SPANS, _SPANS_WITH_MASTERS = (WEIGHT, HISTORY, GRAD, IDS), (WEIGHT, HISTORY, MASTER, GRAD, IDS)
"""The order in which spans of memory stand: what is written to comes first."""

CHECK, GROUP, UPDATE = range(3)
"""The workers of an update, see :func:`_workers`."""

@jit(holds_gil=True)
def _update(weights: int, values: int, histories: int, masters: int, steps: int, indices: int, how: Any,
            row_wise: bool, facts: Any, rates: Any, scalars: Any, known: Any, last: Any, order: Any, dense: Any,
            small: int, count: int) -> Any:  # fmt: skip
    """What was done, see :mod:`adagrad.kernels.outcomes`, or the number of the workers that are wanted, and of which
    update; the position of a row id that is outside its weight, and the id.

    ``last[0]`` becomes the work if it is much, else 0; ``last[1]`` goes up where all is done. ``dense`` is for a list
    beside, see :mod:`adagrad.kernels.dense_beside`; ``count`` is 0 for a call that is tried as if it were little work.
    """
    n, entries, facts, how, dense = len(facts), 0, uncounted(facts), uncounted(how), uncounted(dense)
    work, numbers, spans = 0, np.empty(n, np.int64), np.empty((2, len(order)), np.int64)
    step_at = np.empty(n + dense[WEIGHTS] if steps else 0, np.int64)
    # Spans of what is written to, ours and those of the list beside; then of what is read.
    ours, theirs = (3 if masters else 2) * n, dense[WRITTEN]
    put_spans(dense, spans, ours, 2 * n)
    for i in range(n):
        master = item(masters, i) if masters else how[NONE]
        code = look_at_rows(item(weights, i), item(values, i), item(histories, i), master, item(indices, i), how,
                            row_wise, facts[i])  # fmt: skip
        if code < 0 or code >= PLACES:
            return LEFT, i, 0, 0
        numbers[i] = 2 * code + (1 if facts[i, HEIGHT] > HIGH else 0)
        entries += facts[i, ENTRIES]
        work += work_of(facts[i])
        facts[i, RATES], facts[i, SCALARS] = rates[i if len(rates) > 1 else 0].ctypes.data, scalars.ctypes.data
        for k in range(5 if masters else 4):
            what = _SPANS_WITH_MASTERS[k] if masters else _SPANS[k]
            at = k * n + i if k * n < ours else k * n + i + theirs
            spans[0, at], spans[1, at] = facts[i, BASE + what], facts[i, ENDS + what]
    is_small = work < small and not is_large(dense)
    last[0] = 0 if is_small else work + dense[ELEMENTS]
    if count == 0 and not is_small:
        return LARGE, 0, 0, 0
    if not disjoint(spans[0], spans[1], ours + theirs, order) or (steps and not find_counts(steps, how, step_at)):
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
    if done == DONE:
        carry_out_beside(dense, count)
    if count > 0:
        acquire_gil(state)
        let_go_of_parts(handles.reshape(-1), how)
    if done == DONE:
        advance_counts(step_at)
        last[1] += 1
    ids[:0] = 0  # it is used by address above: this keeps it alive until here
    return done, which, bad, row


@jit()
def _check_ids_and_carry_out(facts: Any, numbers: Any, known: Any, ids: Any, found: Any, kept: Any, scratch: Any,
                             small: int, count: int) -> Any:  # fmt: skip
    """What was done, see :func:`_update`; all ids are copied to the address ``ids`` first."""
    for i in range(len(facts)):
        threads = worker_count(facts[i, ENTRIES], small, count)  # to look at an id is as much work as an element
        bad, row = check_ids(facts[i], ids, found, known[numbers[i], CHECK], threads)
        if bad >= 0:
            return OUT_OF_RANGE, i, bad, row
        ids += 8 * facts[i, ENTRIES]
    for i in range(len(facts)):
        group, update = known[numbers[i], GROUP], known[numbers[i], UPDATE]
        threads = worker_count(work_of(facts[i]), small, count)
        if facts[i, ENTRIES] * facts[i, LENGTH] and not carry_out(facts[i], kept, scratch, group, update, threads):
            return NO_MEMORY, i, np.int64(0), np.int64(0)
    return DONE, 0, np.int64(0), np.int64(0)


def update(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], steps: list[Any],
           lrs: Any, wds: Any, rule: Rule, threads: int | None, dense: Beside = NOTHING,
           places: Sequence[int] = ()) -> bool:  # fmt: skip
    """Check and update a list of row-sparse gradients by one call of compiled code; False if it is left as it was.

    The lists :func:`adagrad.kernels.table.fit`. Those of a list beside are updated, too, if all of both can be; then
    ``steps`` are the counts of both, and messages call weights by their ``places``.

    Raises
    ------
    IndexError
        For a row id outside its weight; then nothing has changed.
    MemoryError
        Where there is none for the sums of rows; then row-sparse weights that come later, and all of the list beside,
        have not changed.
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
    named = places or range(n)
    masters_id, steps_id = id(masters) if masters else 0, id(steps) if steps else 0
    lists = id(weights), id(values), id(histories), masters_id, steps_id, id(indices)
    facts, (known, last) = np.empty((n, FACTS), np.int64), _workers(rule.row_wise)
    order = guess((5 if masters else 4) * n + dense.span_count)
    rates, small = hyper(lrs, wds, rule), cpu_rows.SMALL
    given = *lists, how, rule.row_wise, facts, rates, rule.scalars, known, last, order, dense.words, small
    is_trial, done_before = not last[0], last[1]
    try:
        while True:
            if is_trial:
                done, i, bad, row = _update(*given, 0)
            else:
                held = workers(threads or max_workers(), int(last[0]))
                with held as count:
                    done, i, bad, row = _update(*given, count)
                    held.work = int(last[0])
            if done >= 0:
                code, high = divmod(done, 2)
                form = formats(code)[1]
                known[done] = (
                    checking(bool(high)), grouping(bool(high), form[2]), kernel(bool(high), *form, rule.row_wise)
                )  # fmt: skip
            elif done == OUT_OF_RANGE:
                refuse_row(f"[{named[i]}]", bad, row, weights[i].shape[0])
            elif done == NO_MEMORY:
                raise cpu_rows.out_of_memory(f"[{named[i]}]", int(facts[i, ENTRIES]))
            elif done != LARGE:
                return bool(done == DONE)
            else:
                is_trial = False
    except BaseException as interrupt:
        if last[1] != done_before:
            mark_late(interrupt)
        raise


@functools.cache
def _workers(row_wise: bool) -> tuple[np.ndarray, np.ndarray]:
    """The workers that have been compiled, by twice the code and 1 more for a high weight; and of lists: how much
    work the last was, if much, else 0; how many are done."""
    return np.zeros((2 * PLACES, 3), np.int64), np.zeros(2, np.int64)
