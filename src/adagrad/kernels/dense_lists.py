"""Lists of dense updates of plain arrays on the CPU, by one call of compiled code.

It looks at the list, checks it, updates it and counts, or leaves all of it to the ordinary way.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from adagrad.kernels import cpu_dense
from adagrad.kernels.counts import advance_counts, find_counts
from adagrad.kernels.cpu_dense import COLUMNS, GIVEN, SIZE, kernel, put_arguments
from adagrad.kernels.layout import layout
from adagrad.kernels.numba_jit import acquire_gil, jit, max_workers, release_gil, run, worker_count, workers
from adagrad.kernels.outcomes import DONE, LARGE, LEFT, mark_late
from adagrad.kernels.spans import disjoint, guess
from adagrad.kernels.table import PLACES, fill, formats
from adagrad.rule import Rule

TRIED_AS_SMALL = 32
"""Weights in a list that is tried first as if it had few elements, if the last one had; then no thread is asked for."""


@jit(holds_gil=True)
def _update(weights: int, grads: int, histories: int, masters: int, steps: int, n: int, how: Any, row_wise: bool,
            hyper: Any, scalars: Any, known: Any, last: Any, order: Any, small: int, is_trial: bool, count: int
            ) -> Any:  # fmt: skip
    """What was done, see :mod:`adagrad.kernels.outcomes`, or the code whose worker is wanted.

    ``last[0]`` becomes the number of elements if there are many, else 0; ``last[1]`` goes up where all is done.
    """
    table, codes, spans = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty((2, len(order)), np.int64)
    step_at, blocks = np.empty(n if steps else 0, np.int64), np.empty((PLACES, GIVEN), np.int64)
    counts, elements = np.zeros(PLACES, np.int64), np.zeros(PLACES, np.int64)
    _, total = fill(weights, grads, histories, masters, how, row_wise, table, codes, spans)
    for i in range(n):
        if codes[i] < 0 or codes[i] >= PLACES:
            return LEFT
        counts[codes[i]] += 1
        elements[codes[i]] += table[i, SIZE]
    last[0] = total if total >= small else 0
    if is_trial and total >= small:
        return LARGE
    if not disjoint(spans[0], spans[1], len(order) - n, order) or (steps and not find_counts(steps, how, step_at)):
        return LEFT
    for code in range(PLACES):
        if counts[code] and known[code] == 0:
            return code
    rows, rates = (table, hyper) if counts[codes[0]] == n else _by_code(table, codes, hyper, counts)
    # No exception may come from here, nor is memory asked for: it would find no GIL, and a part of the list updated.
    # The GIL is let go for the work in all; threads are for those launches that are worth them.
    state, first = np.int64(0) if is_trial else release_gil(), 0
    for code in range(PLACES):
        if counts[code]:
            put_arguments(blocks[code], rows, first, counts[code], rates, scalars, elements[code])
            run(known[code], blocks[code], worker_count(elements[code], small, count))
            first += counts[code]
    if not is_trial:
        acquire_gil(state)
    advance_counts(step_at)
    last[1] += 1
    rows[:0], rates[:0], blocks[:0] = 0, 0, 0  # they are used by address above: this keeps them alive until here
    return DONE


@jit(helper=True)
def _by_code(table: Any, codes: Any, hyper: Any, counts: Any) -> Any:
    """The rows and their rates, or those of all, in the order of their codes, each of which there are ``counts`` of."""
    rows, rates, places = np.empty(table.shape, np.int64), np.empty(hyper.shape), np.zeros(PLACES, np.int64)
    for code in range(1, PLACES):
        places[code] = places[code - 1] + counts[code - 1]
    for i in range(len(codes)):
        j = places[codes[i]]
        places[codes[i]] += 1
        # Number by number: NumPy's assignment of a row takes seconds to compile.
        for column in range(COLUMNS):
            rows[j, column] = table[i, column]
        for rate in range(3):
            rates[j if len(hyper) > 1 else 0, rate] = hyper[i if len(hyper) > 1 else 0, rate]
    return rows, rates


def update(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], steps: list[Any],
           hyper: np.ndarray, rule: Rule, threads: int | None) -> bool:  # fmt: skip
    """Check and update a list by one call of compiled code; False if it is left as it was.

    The lists :func:`adagrad.kernels.table.fit`; ``hyper`` has a row for each weight, or one for all.
    """
    n, how = len(weights), layout()
    if how is None:
        return False
    (known, last), order, row_wise = _workers(rule.row_wise), guess(4 * n if masters else 3 * n), rule.row_wise
    given = (
        id(weights), id(grads), id(histories), id(masters) if masters else 0, id(steps) if steps else 0, n,
        how, row_wise, hyper, rule.scalars, known, last, order, cpu_dense.SMALL,
    )  # fmt: skip
    is_trial, done_before = n <= TRIED_AS_SMALL and not last[0], last[1]
    try:
        while True:
            if is_trial:
                code = _update(*given, True, 1)
            else:
                held = workers(threads or max_workers(), int(last[0]))
                with held as count:
                    code = _update(*given, False, count)
                    held.work = int(last[0])
            if code >= 0:
                known[code] = kernel(*formats(code)[1], rule.row_wise)
            elif code != LARGE:
                return bool(code == DONE)
            else:
                is_trial = False
    except BaseException as interrupt:
        if last[1] != done_before:
            mark_late(interrupt)
        raise


@functools.cache
def _workers(row_wise: bool) -> tuple[np.ndarray, np.ndarray]:
    """The workers that have been compiled, by code; and of lists: how many elements the last had, if many, else 0;
    how many are done."""
    return np.zeros(PLACES, np.int64), np.zeros(2, np.int64)
