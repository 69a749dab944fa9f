"""Lists of row-sparse updates of plain arrays on the CPU, alone or with dense ones, by one call of compiled code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from typing import Any

import numpy as np

from adagrad.kernels.batch import Batch
from adagrad.kernels.cpu import rows as cpu_rows
from adagrad.kernels.cpu.row_groups import FINDINGS, INT32_ROWS, check_ids, checking
from adagrad.kernels.cpu.row_sums import grouping
from adagrad.kernels.cpu.rows import ID_COST, carry_out, kernel, room, work_of
from adagrad.kernels.cpu.rule import rate_table
from adagrad.kernels.inspection.counts import advance_counts, find_counts
from adagrad.kernels.inspection.layout import NONE, current_layout, list_item
from adagrad.kernels.inspection.rows import describe_rows, put_row_spans
from adagrad.kernels.inspection.spans import disjoint
from adagrad.kernels.inspection.sparse_layout import hold_parts, release_parts, sparse_body
from adagrad.kernels.inspection.table import CODES_PER_DEVICE, decode
from adagrad.kernels.mixed_lists import (
    ELEMENTS,
    NOTHING,
    WEIGHTS,
    WRITTEN,
    DensePart,
    is_large,
    put_spans,
    update_dense_part,
)
from adagrad.kernels.names import refuse_row
from adagrad.kernels.outcomes import (
    DONE,
    LISTS_DONE,
    NO_MEMORY,
    NOT_PLAIN,
    NOT_SMALL,
    OUT_OF_RANGE,
    attempt,
    remembered,
)
from adagrad.kernels.records import ENTRIES, FACTS, HEIGHT, LENGTH, RATES, SCALARS
from adagrad.kernels.runtime.memory import keep_alive, uncounted, word_table, words
from adagrad.kernels.runtime.numba_jit import acquire_gil, jit, release_gil, worker_count
from adagrad.kernels.runtime.threads import WORK, claim, give_back
from adagrad.row_sparse import RowSparse

CHECK, GROUP, UPDATE = range(3)
"""The workers of an update, see :func:`_workers`."""


@jit(holds_gil=True)
def _update(weights: int, values: int, histories: int, masters: int, steps: int, indices: int, n: int, layout: Any,
            row_wise: int, rates: Any, scalars: Any, known: Any, notes: Any, guess: Any, dense: Any, parallel_min: int,
            workers: int) -> Any:  # fmt: skip
    """The outcome, see :mod:`adagrad.kernels.outcomes`; a number >= 0 is that of the workers in :func:`_workers`.

    Lists are given by ``id``, ``masters`` and ``steps`` as 0 for none. ``dense`` is the dense part of a mixed list, see
    :mod:`adagrad.kernels.mixed_lists`.
    """
    own_facts = word_table(n, FACTS)
    entries, facts, layout, dense = 0, uncounted(own_facts), uncounted(layout), uncounted(dense)
    work, numbers, spans = 0, words(n), word_table(2, len(guess))
    step_at = words(n + dense[WEIGHTS] if steps else 0)
    # Spans of what rows write to, of all that the dense part writes to and reads, of what rows read.
    written = (3 if masters else 2) * n
    theirs, written_in_all = put_spans(dense, spans, written), written + dense[WRITTEN]
    for i in range(n):
        master = list_item(masters, i) if masters else layout[NONE]
        code = describe_rows(list_item(weights, i), list_item(values, i), list_item(histories, i), master,
                             list_item(indices, i), layout, row_wise != 0, facts[i])  # fmt: skip
        if code < 0 or code >= CODES_PER_DEVICE:
            return NOT_PLAIN, i, 0, 0
        numbers[i] = 2 * code + (1 if facts[i, HEIGHT] > INT32_ROWS else 0)
        entries += facts[i, ENTRIES]
        work += work_of(facts[i])
        facts[i, RATES], facts[i, SCALARS] = rates[i if len(rates) > 1 else 0].ctypes.data, scalars.ctypes.data
        put_row_spans(facts[i], i, n, masters != 0, theirs, spans)
    is_small = work < parallel_min and not is_large(dense)
    notes[WORK] = 0 if is_small else work + dense[ELEMENTS]
    if workers == 0 and not is_small:
        return NOT_SMALL, 0, 0, 0
    if not disjoint(spans[0], spans[1], written_in_all, guess) or (steps and not find_counts(steps, layout, step_at)):
        return NOT_PLAIN, 0, 0, 0
    for i in range(n):
        if known[numbers[i], UPDATE] == 0:
            return numbers[i], i, 0, 0
    ids, found = words(entries), word_table(max(workers, 1), FINDINGS)
    groups, scratch = room(max(workers, 1))
    handles, state = word_table(n if workers > 0 else 0, 2), np.int64(0)
    # From here on nothing may raise: threads would stay claimed, without a GIL. A worker without memory sets a flag.
    claimed = claim(notes, workers)
    if workers > 0:
        for i in range(n):
            hold_parts(sparse_body(list_item(values, i), layout), layout, handles[i])
        state = release_gil()
    done, which, bad, row = _check_ids_and_carry_out(
        facts, numbers, known, np.int64(ids.ctypes.data), found, groups, scratch, parallel_min, claimed
    )
    if done == DONE:
        update_dense_part(dense, claimed)
    give_back(notes)
    if workers > 0:
        acquire_gil(state)
        release_parts(handles.reshape(-1), layout)
    if done == DONE:
        advance_counts(step_at)
        notes[LISTS_DONE] += 1
    keep_alive(ids)
    keep_alive(own_facts)
    return done, which, bad, row


@jit(helper=True)
def _check_ids_and_carry_out(facts: Any, numbers: Any, known: Any, ids: Any, found: Any, groups: Any, scratch: Any,
                             parallel_min: int, workers: int) -> Any:  # fmt: skip
    """What was done, see :func:`_update`; all ids are copied to the address ``ids`` first."""
    for i in range(len(facts)):
        threads = worker_count(facts[i, ENTRIES] * ID_COST, parallel_min, workers)
        bad, row = check_ids(facts[i], ids, found, known[numbers[i], CHECK], threads)
        if bad >= 0:
            return OUT_OF_RANGE, i, bad, row
        ids += 8 * facts[i, ENTRIES]
    for i in range(len(facts)):
        group, update = known[numbers[i], GROUP], known[numbers[i], UPDATE]
        threads = worker_count(work_of(facts[i]), parallel_min, workers)
        if facts[i, ENTRIES] * facts[i, LENGTH] and not carry_out(facts[i], groups, scratch, group, update, threads):
            return NO_MEMORY, i, facts[i, ENTRIES], np.int64(0)
    return DONE, 0, np.int64(0), np.int64(0)


def update(batch: Batch, steps: list[Any], threads: int | None, dense: DensePart = NOTHING) -> bool:
    """Check and update a batch of row-sparse gradients by one call of compiled code; False if it is left as it was.

    Its lists must satisfy :func:`adagrad.kernels.inspection.table.fit`. ``dense``, the dense part of a mixed list, is
    updated, too, if all of both can be; then ``steps`` are the counts of both.

    Raises
    ------
    IndexError
        A row id is outside its weight; nothing has changed.
    MemoryError
        No memory is left for grouping and summing the rows of a weight; this one, later row-sparse weights and the
        dense part have not changed.
    """
    weights, grads, masters, rule = batch.weights, batch.grads, batch.masters, batch.rule
    layout, n = current_layout(), len(weights)
    if layout is None:
        return False
    values = indices = grads  # sparse COO tensors: compiled code finds both in them
    if RowSparse in set(map(type, grads)):
        values, indices = [], []
        for weight, grad in zip(weights, grads, strict=True):
            if type(grad) is not RowSparse:
                values.append(grad)
                indices.append(grad)
            elif grad.shape == getattr(weight, "shape", None) and getattr(grad.indices, "ndim", 0) == 1:
                values.append(grad.values)
                indices.append(grad.indices)
            else:
                return False
    masters_id, steps_id = id(masters) if masters else 0, id(steps) if steps else 0
    lists = id(weights), id(values), id(batch.histories), masters_id, steps_id, id(indices)
    spans = (5 if masters else 4) * n + dense.span_count
    known, compile_worker, notes, read_notes, guess = remembered(_workers, rule.row_wise, get_ident(), spans)
    given = (
        # Numba takes longer to tell the type of a bool.
        *lists, n, layout, 1 if rule.row_wise else 0, rate_table(batch.lrs, batch.wds, rule), rule.scalars, known,
        notes, guess, dense.words, cpu_rows.PARALLEL_MIN, 0,
    )  # fmt: skip
    done, i, number, row = attempt(_update, given, read_notes, threads, compile_worker)
    if done == OUT_OF_RANGE:
        refuse_row(batch.names(i), number, row, weights[i].shape[0])
    if done == NO_MEMORY:
        raise cpu_rows.out_of_memory(batch.names(i), number)
    return done == DONE


@functools.cache
def _workers(row_wise: bool) -> tuple[np.ndarray, Callable[[int], None]]:
    """The addresses of the compiled workers (0: none yet), and what compiles those of a number.

    It is 2 * code, + 1 for a weight that needs 64-bit row ids.
    """
    known = np.zeros((2 * CODES_PER_DEVICE, 3), np.int64)

    def compile_worker(number: int) -> None:
        code, needs_int64 = divmod(number, 2)
        form, needs_int64 = decode(code)[1], bool(needs_int64)
        known[number] = checking(needs_int64), grouping(needs_int64, form[2]), kernel(needs_int64, *form, row_wise)

    return known, compile_worker
