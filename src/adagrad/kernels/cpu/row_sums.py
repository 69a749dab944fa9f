"""The sums of the rows that occur more than once, and what a worker hands over from grouping ids to updating rows.

Occurrences are added in chunks of CHUNK. A row with more than CHUNK has a second sum, to which each complete chunk is
added.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from adagrad.kernels.cpu.blocks import broadcast, store_block
from adagrad.kernels.cpu.formats import TOKENS, pointer
from adagrad.kernels.cpu.row_groups import group
from adagrad.kernels.records import CHECKED_IDS, ENTRIES, FACTS, GROUPS, LENGTH
from adagrad.kernels.runtime.memory import array_at, incref
from adagrad.kernels.runtime.numba_jit import jit, worker
from adagrad.rule import CHUNK, LANES


@jit(helper=True)
def clear(total: Any, length: int, token: Any) -> None:
    """Set a sum to -0.0, the identity of addition for zeros of either sign."""
    zeros, whole = broadcast(token.dtype.type(-0.0)), length - length % LANES
    for i in range(0, whole, LANES):
        store_block(total, i, zeros, None)
    if whole < length:
        store_block(total, whole, zeros, length - whole)


@jit(helper=True)
def plan_sums(counts: Any) -> Any:
    """For each row's sum, how many values are left until its chunk is complete (never 0 for a short row), and the
    number of its second sum; and how many sums there are in all."""
    n = len(counts)
    missing, second, total = np.empty(n, np.int32), np.empty(n, np.int32), n
    for i in range(n):
        is_long = counts[i] > CHUNK
        missing[i], second[i] = CHUNK if is_long else CHUNK + 1, total
        total += 1 if is_long else 0
    return missing, second, total


@jit(helper=True)
def begin_sums(total: int, length: int, th: Any) -> Any:
    """Memory for ``total`` sums of ``length`` elements, cleared."""
    memory = np.empty((total, length), th.dtype)
    for i in range(total):
        clear(sum_at(np.int64(memory.ctypes.data), i, length, th), length, th)
    return memory


@jit(helper=True)
def sum_at(memory: Any, i: Any, length: int, th: Any) -> Any:
    """A pointer to the ``i``-th sum in the memory at the address ``memory``."""
    return pointer(memory + i * length * th.itemsize, th, "sum")


# What a worker that groups hands to the one that updates: the rows that occur once and their positions; the positions
# to add up and the sum for each; row and count of each sum; what `plan_sums` returns for each, and their memory. Each
# array is kept as its address, its length in elements and its owner.
SINGLE, POSITIONS, ADDED, TO, SUMMED, COUNTS, MISSING, SECOND, SUMS, GROUPED = range(10)
ADDRESS, SIZE, OWNER = range(3)


@jit(helper=True)
def _hand_over(place: Any, array: Any) -> None:
    place[ADDRESS], place[SIZE], place[OWNER] = array.ctypes.data, array.size, incref(array)


@functools.cache
def grouping(needs_int64: bool, history: str) -> int:
    """The address of the worker that groups the ids by row: all that may run out of memory, before any update."""
    th, dtype = TOKENS[history], np.int64 if needs_int64 else np.int32

    def group_ids(arguments: Any, k: Any, workers: Any) -> None:
        facts = array_at(arguments, FACTS, np.int64)
        ids = array_at(facts[CHECKED_IDS], facts[ENTRIES], dtype)
        groups = array_at(facts[GROUPS], (workers, GROUPED, 3), np.int64)[k]
        # The caller releases what is handed over, even if no memory is left for the next.
        single, positions, added, to, summed, counts = group(ids, k, workers)
        _hand_over(groups[SINGLE], single)
        _hand_over(groups[POSITIONS], positions)
        _hand_over(groups[ADDED], added)
        _hand_over(groups[TO], to)
        _hand_over(groups[SUMMED], summed)
        _hand_over(groups[COUNTS], counts)
        missing, second, total = plan_sums(counts)
        _hand_over(groups[MISSING], missing)
        _hand_over(groups[SECOND], second)
        _hand_over(groups[SUMS], begin_sums(total, facts[LENGTH], th))

    return worker(group_ids)


@jit(helper=True)
def grouped(place: Any, dtype: Any) -> Any:
    """The array that was handed over there."""
    return array_at(place[ADDRESS], place[SIZE], dtype)
