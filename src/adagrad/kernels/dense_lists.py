"""Lists of dense updates of plain arrays on the CPU, by one call of compiled code.

It inspects, checks and updates the list and advances its step counts, or leaves all of it to the general path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from typing import Any

import numpy as np

from adagrad.kernels.batch import Batch
from adagrad.kernels.cpu import dense as cpu_dense
from adagrad.kernels.cpu.dense import GIVEN, kernel, put_arguments
from adagrad.kernels.cpu.rule import rate_table
from adagrad.kernels.inspection.counts import advance_counts, find_counts
from adagrad.kernels.inspection.layout import current_layout
from adagrad.kernels.inspection.spans import disjoint
from adagrad.kernels.inspection.table import CODES_PER_DEVICE, decode, fill
from adagrad.kernels.outcomes import DONE, LISTS_DONE, NOT_PLAIN, NOT_SMALL, attempt, remembered
from adagrad.kernels.records import COLUMNS, SIZE
from adagrad.kernels.runtime.memory import keep_alive, word_table, words, zero_words
from adagrad.kernels.runtime.numba_jit import acquire_gil, jit, release_gil, run, worker_count
from adagrad.kernels.runtime.threads import WORK, claim, give_back


@jit(holds_gil=True)
def _update(weights: int, grads: int, histories: int, masters: int, steps: int, n: int, layout: Any, row_wise: int,
            rates: Any, scalars: Any, known: Any, notes: Any, guess: Any, parallel_min: int, workers: int
            ) -> Any:  # fmt: skip
    """What was done, or the code whose worker must be compiled first; see :func:`adagrad.kernels.outcomes.attempt`.

    Lists are given by ``id``, ``masters`` and ``steps`` as 0 for none; the work of a list is its number of elements.
    """
    table, codes, spans = word_table(n, COLUMNS), words(n), word_table(2, len(guess))
    step_at, blocks = words(n if steps else 0), word_table(CODES_PER_DEVICE, GIVEN)
    counts, elements = zero_words(CODES_PER_DEVICE), zero_words(CODES_PER_DEVICE)
    _, total = fill(weights, grads, histories, masters, layout, row_wise != 0, table, codes, spans)
    for i in range(n):
        if codes[i] < 0 or codes[i] >= CODES_PER_DEVICE:
            return NOT_PLAIN, 0, 0, 0
        counts[codes[i]] += 1
        elements[codes[i]] += table[i, SIZE]
    notes[WORK] = total if total >= parallel_min else 0
    if workers == 0 and total >= parallel_min:
        return NOT_SMALL, 0, 0, 0
    if not disjoint(spans[0], spans[1], len(guess) - n, guess) or (steps and not find_counts(steps, layout, step_at)):
        return NOT_PLAIN, 0, 0, 0
    for code in range(CODES_PER_DEVICE):
        if counts[code] and known[code] == 0:
            return code, 0, 0, 0
    rows, rows_rates = (table, rates) if counts[codes[0]] == n else _by_code(table, codes, rates, counts)
    # From here on nothing may raise or allocate: an exception would find no GIL, and a part of the list updated. The
    # GIL is released once for all launches; threads are for those launches that are worth them.
    claimed = claim(notes, workers)
    state, first = np.int64(0) if workers == 0 else release_gil(), 0
    for code in range(CODES_PER_DEVICE):
        if counts[code]:
            put_arguments(blocks[code], rows, first, counts[code], rows_rates, scalars, elements[code])
            run(known[code], blocks[code], worker_count(elements[code], parallel_min, claimed))
            first += counts[code]
    give_back(notes)
    if workers > 0:
        acquire_gil(state)
    advance_counts(step_at)
    notes[LISTS_DONE] += 1
    keep_alive(rows)
    keep_alive(rows_rates)
    keep_alive(blocks)
    return DONE, 0, 0, 0


@jit(helper=True)
def _by_code(table: Any, codes: Any, rates: Any, counts: Any) -> Any:
    """Rows and their rates (one for all stays one) sorted by code; ``counts[code]`` rows have a code."""
    rows, rows_rates, next_row = word_table(len(table), COLUMNS), np.empty(rates.shape), zero_words(len(counts))
    for code in range(1, len(counts)):
        next_row[code] = next_row[code - 1] + counts[code - 1]
    for i in range(len(codes)):
        j = next_row[codes[i]]
        next_row[codes[i]] += 1
        # Number by number: NumPy's assignment of a row takes seconds to compile.
        for column in range(COLUMNS):
            rows[j, column] = table[i, column]
        for rate in range(3):
            rows_rates[j if len(rates) > 1 else 0, rate] = rates[i if len(rates) > 1 else 0, rate]
    return rows, rows_rates


def update(batch: Batch, steps: list[Any], threads: int | None) -> bool:
    """Check and update a batch by one call of compiled code; False if it is left as it was.

    Its lists must satisfy :func:`adagrad.kernels.inspection.table.fit`.
    """
    weights, masters, rule = batch.weights, batch.masters, batch.rule
    n, layout = len(weights), current_layout()
    if layout is None:
        return False
    spans = 4 * n if masters else 3 * n
    known, compile_worker, notes, read_notes, guess = remembered(_workers, rule.row_wise, get_ident(), spans)
    given = (
        id(weights), id(batch.grads), id(batch.histories), id(masters) if masters else 0, id(steps) if steps else 0, n,
        # Numba takes longer to tell the type of a bool.
        layout, 1 if rule.row_wise else 0, rate_table(batch.lrs, batch.wds, rule), rule.scalars, known, notes, guess,
        cpu_dense.PARALLEL_MIN, 0,
    )  # fmt: skip
    return attempt(_update, given, read_notes, threads, compile_worker)[0] == DONE


@functools.cache
def _workers(row_wise: bool) -> tuple[np.ndarray, Callable[[int], None]]:
    """The addresses of the compiled workers, by code (0: none yet), and what compiles one."""
    known = np.zeros(CODES_PER_DEVICE, np.int64)

    def compile_worker(code: int) -> None:
        known[code] = kernel(*decode(code)[1], row_wise)

    return known, compile_worker
