"""Row-sparse updates on the CPU: each row present is updated once, with the sum of its occurrences.

Rows that occur once are updated straight from their values. The values of the others are added to sums, from which
their rows are updated at the end. The passes are in :mod:`adagrad.kernels.cpu.row_passes`; the two over the gradient
read it from front to back.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import numpy as np

from adagrad.kernels.cpu.formats import TOKENS
from adagrad.kernels.cpu.row_passes import (
    TILE,
    add_up,
    addresses,
    by_blocks,
    by_elements,
    by_row,
    update_from_sums,
    update_once,
    update_short_rows,
)
from adagrad.kernels.cpu.row_sums import GROUPED, OWNER, POSITIONS, SINGLE, SUMS, grouped, grouping
from adagrad.kernels.cpu.rule import constants, has_decay, has_rare_terms, plain_terms
from adagrad.kernels.names import Names
from adagrad.kernels.records import (
    ARE_INCREASING,
    CHECKED_IDS,
    ENTRIES,
    FACTS,
    GROUPS,
    LENGTH,
    RATES,
    SCALARS,
    SCRATCH,
)
from adagrad.kernels.runtime.memory import array_at, decref, word_table
from adagrad.kernels.runtime.numba_jit import jit, run, worker
from adagrad.kernels.runtime.threads import claim, give_back, new_notes, on_threads
from adagrad.rule import LANES

ROW_COST = 50
"""The approximate cost of a row besides its elements, in elements."""

ID_COST = 16
"""The cost of checking an id, likewise; it is less, but a worker that has checked ids has them in its core's cache."""

PARALLEL_MIN = 131_072
"""Work, see :func:`work_of`, below which starting the threads costs more than they save."""

BATCH = 1024
"""Rows updated at a time; where ids increase, and so are not grouped, positions are first written to scratch memory."""

SCRATCH_WORDS = BATCH // 2 + 4 * TILE
"""Words of a worker's scratch memory: a batch of 4-byte positions and a tile of four operands of up to 8 bytes."""


@jit(helper=True)
def work_of(facts: Any) -> Any:
    """The cost of an update, in elements."""
    return facts[ENTRIES] * (facts[LENGTH] + ROW_COST)


@functools.cache
def kernel(needs_int64: bool, weight: str, values: str, history: str, master: str | None, row_wise: bool) -> int:
    """The address of the worker for operands of these formats (None: no master copy), and for 64- or 32-bit row ids."""
    tw, tv, th, tm = TOKENS[weight], TOKENS[values], TOKENS[history], None if master is None else TOKENS[master]
    dtype = np.int64 if needs_int64 else np.int32
    per_row = row_wise or None  # None or True differ in type: only one branch is compiled

    def update(arguments: Any, k: Any, workers: Any) -> None:
        facts = array_at(arguments, FACTS, np.int64)
        n, length, increasing = facts[ENTRIES], facts[LENGTH], facts[ARE_INCREASING]
        ids = array_at(facts[CHECKED_IDS], n, dtype)
        base, stride = addresses(facts)
        operands = base, stride, tw, tv, th, tm
        rates = array_at(facts[RATES], 3, np.float64)
        scalars = array_at(facts[SCALARS], 4, np.float64)
        fixed = constants(scalars, rates, th)
        groups = array_at(facts[GROUPS], (workers, GROUPED, 3), np.int64)[k]
        scratch = array_at(facts[SCRATCH], (workers, SCRATCH_WORDS), np.int64)[k]
        own_positions = array_at(scratch.ctypes.data, BATCH, np.int32)
        tile = scratch[BATCH // 2 :].ctypes.data
        are_plain = length % LANES == 0 and not has_rare_terms(fixed) and not has_decay(fixed)
        # Workers divide ids that increase by position, others by owner.
        first, last = n * k // workers, n * (k + 1) // workers
        rows = ids[first:last] if increasing else grouped(groups[SINGLE], dtype)
        positions = grouped(groups[POSITIONS], np.int32)
        for start in range(0, len(rows), BATCH):
            stop = min(start + BATCH, len(rows))
            if increasing:
                for i in range(start, stop):
                    own_positions[i - start] = first + i
                here = own_positions[: stop - start]
            else:
                here = positions[start:stop]
            if length == 1:
                update_short_rows(rows[start:stop], here, operands, fixed, tile)
            elif per_row is not None:
                update_once(rows[start:stop], here, operands, length, fixed, by_row)
            elif are_plain:
                update_once(rows[start:stop], here, operands, length, plain_terms(fixed), by_blocks)
            else:
                update_once(rows[start:stop], here, operands, length, fixed, by_elements)
        add_up(groups, operands, length)
        if per_row is not None:
            update_from_sums(groups, dtype, operands, length, fixed, by_row)
        elif are_plain:
            update_from_sums(groups, dtype, operands, length, plain_terms(fixed), by_blocks)
        else:
            update_from_sums(groups, dtype, operands, length, fixed, by_elements)

    return worker(update)


@jit(helper=True)
def carry_out(facts: Any, groups: Any, scratch: Any, group: int, update: int, workers: int) -> bool:
    """Group and update by so many workers; False if memory ran out, and then nothing has changed.

    ``group`` and ``update`` are the workers' addresses; ``groups`` and ``scratch`` come from :func:`room`, for as many
    workers or more.
    """
    groups[:] = 0
    facts[GROUPS], facts[SCRATCH] = groups.ctypes.data, scratch.ctypes.data
    are_grouped = True
    if not facts[ARE_INCREASING]:
        run(group, facts, workers)
        for k in range(workers):
            are_grouped &= groups[k, SUMS, OWNER] != 0
    if are_grouped:
        run(update, facts, workers)
    for k in range(workers):
        for what in range(GROUPED):
            if groups[k, what, OWNER] != 0:
                decref(groups[k, what, OWNER])
    return are_grouped


@jit(helper=True)
def room(workers: int) -> Any:
    """Memory for so many workers: for what they group, and scratch memory for positions and a tile."""
    return np.empty((workers, GROUPED, 3), np.int64), word_table(workers, SCRATCH_WORDS)


def out_of_memory(names: Names, entries: int) -> MemoryError:
    return MemoryError(f"{names.indices}: {entries} row ids: too many for the memory that is left")


def workers(facts: Any, ids: Any, formats: Any, row_wise: bool) -> tuple[int, int]:
    """The addresses of the workers that group the rows of an update, 0 for none, and update them.

    They are compiled if need be; to do so before anything changes, call this first. Arguments as of :func:`launch`.
    """
    needs_int64 = ids.itemsize == 8
    return 0 if facts[ARE_INCREASING] else grouping(needs_int64, formats[2]), kernel(needs_int64, *formats, row_wise)


def launch(names: Names, facts: Any, rows: Any, formats: Any, row_wise: bool, rates: Any, scalars: Any,
           threads: int | None) -> None:  # fmt: skip
    """Carry out the update that ``facts`` describes; ``rows`` is the array at ``facts[CHECKED_IDS]``.

    ``formats`` are those of weight, values, history and master copy (None for none); ``rates`` those of one weight. At
    most ``threads`` threads, or by default as many as Numba may use.

    Raises
    ------
    MemoryError
        No memory is left for grouping and summing the rows; nothing has changed.
    """
    work = int(cast(Any, work_of).py_func(facts))
    group, update = workers(facts, rows, formats, row_wise)
    facts[RATES], facts[SCALARS] = rates.ctypes.data, scalars.ctypes.data
    notes = new_notes(work)
    given = facts, group, update, notes
    if not on_threads(_carry_out, given, notes.data, 1 if work < PARALLEL_MIN else threads):
        raise out_of_memory(names, len(rows))


@jit()
def _carry_out(facts: Any, group: int, update: int, notes: Any, workers: int) -> bool:
    groups, scratch = room(workers)
    done = carry_out(facts, groups, scratch, group, update, claim(notes, workers))
    give_back(notes)
    return done
