"""Grouping the occurrences of a row-sparse gradient by row, by hashing; those of a row keep the gradient's order.

Sorting the ids would do, but cost more twice over: the sort itself, and the walk through the gradient in the order of
the rows, at a quarter of the memory's speed.

Several workers divide rows, not positions, so that each row is summed by one of them, in order: rows are hashed to
buckets, and each worker owns buckets that hold about its share of the ids. Who owns what changes no bit of the result.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from adagrad.kernels.cpu.blocks import prefetch
from adagrad.kernels.cpu.formats import pointer
from adagrad.kernels.names import Names, refuse_row
from adagrad.kernels.records import (
    ARE_INCREASING,
    ARE_LONG,
    BASE,
    CHECKED_IDS,
    ENTRIES,
    FACTS,
    FOUND,
    HEIGHT,
    IDS,
)
from adagrad.kernels.runtime.memory import array_at, zero_words
from adagrad.kernels.runtime.numba_jit import entry, jit, run, worker

BUCKETS = 1024
"""Buckets that workers divide: more than there are workers, few enough for their counts to fit the L1 cache."""

FULL = 64
"""A bucket is full if it holds more than 1 / FULL of a worker's share of the ids, as those of frequent rows do."""

SAMPLE = 1024
"""Ids that are sampled to divide the buckets."""

INT32_ROWS = 2**31
"""The number of rows of a weight above which its row ids need 64 bits."""

MAX_OCCURRENCES = 2**31 - 1
"""Occurrences that int32 positions can number; a gradient with more is left to the array expression."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: the high bits of its multiples are spread evenly."""

_NO_SEED = np.uint64(0)

_BUCKET = np.uint64(64 - (BUCKETS - 1).bit_length())

_AHEAD = 16
"""How many ids ahead the hash table is prefetched."""

# What a worker finds in its part of the ids: the position of one outside the weight, or -1, and that id; the first and
# the last id, and whether they strictly increase.
BAD, BAD_ID, FIRST, LAST, INCREASE, FINDINGS = range(6)

_INT32S = np.empty(0, np.int32)

_NONE = np.uint32(2**32 - 1)


# ---------------------------------------------------------------------------------------------------- before the update


@jit(helper=True)
def _copy(indices: Any, rows: Any, start: int, stop: int, height: int, found: Any) -> None:
    """Copy the ids from ``start`` to ``stop`` and fill ``found``, see above; the weight has ``height`` rows."""
    while True:
        # Conditions are kept as signs, which vectorises: is any of these numbers negative?
        outside, down, before = np.int64(0), np.int64(0), np.int64(-1)
        # Each id is read once, so that what is checked is what is copied, though other threads may change the ids.
        for i in range(start, stop):
            at = np.uint64(i)
            row = np.int64(indices[at])
            rows[at] = row
            outside |= row | (height - 1 - row)
            down |= row - before - 1
            before = row
        if outside >= 0:
            found[BAD], found[INCREASE] = -1, down >= 0
            found[FIRST], found[LAST] = (rows[start], before) if start < stop else (0, -1)
            return
        for i in range(start, stop):
            row = np.int64(indices[i])
            if row < 0 or row >= height:
                found[BAD], found[BAD_ID] = i, row
                return
        # Another thread has changed the id meanwhile: all are copied and checked again.


@functools.cache
def checking(needs_int64: bool) -> int:
    """The address of the worker that copies and checks ids, to int64 if a weight needs 64-bit ids, else to int32."""
    dtype = np.int64 if needs_int64 else np.int32

    def check(arguments: Any, k: Any, workers: Any) -> None:
        facts = array_at(arguments, FACTS, np.int64)
        address, n, height = facts[BASE + IDS], facts[ENTRIES], facts[HEIGHT]
        rows = array_at(facts[CHECKED_IDS], n, dtype)
        found = array_at(facts[FOUND], (workers, FINDINGS), np.int64)[k]
        start, stop = n * k // workers, n * (k + 1) // workers
        if facts[ARE_LONG]:
            _copy(array_at(address, n, np.int64), rows, start, stop, height, found)
        else:
            _copy(array_at(address, n, np.int32), rows, start, stop, height, found)

    return worker(check)


@jit(helper=True)
def check_ids(facts: Any, rows: int, found: Any, check: int, workers: int) -> Any:
    """Copy the ids to the address ``rows``; return position and value of one outside the weight, or -1 and 0.

    ``found`` has room for what so many workers find, FINDINGS words each; ``check`` is from :func:`checking`. Sets
    CHECKED_IDS, FOUND and ARE_INCREASING in ``facts``.
    """
    facts[CHECKED_IDS], facts[FOUND] = rows, found.ctypes.data
    run(check, facts, workers)
    increase, before = True, np.int64(-1)
    for k in range(workers):
        if found[k, BAD] >= 0:
            return found[k, BAD], found[k, BAD_ID]
        if found[k, FIRST] <= found[k, LAST] or found[k, INCREASE] == 0:
            increase &= (found[k, INCREASE] != 0) & (found[k, FIRST] > before)
            before = found[k, LAST]
    facts[ARE_INCREASING] = increase
    return np.int64(-1), np.int64(0)


_check_ids = entry(check_ids)


def checked_rows(names: Names, facts: Any) -> Any:
    """A copy of the row ids of an update, because what is checked must be what is used; its address goes to ``facts``.

    int32 if that is enough, else int64.

    Raises
    ------
    IndexError
        An id is outside the weight; ``names`` are for the message.
    """
    needs_int64 = bool(facts[HEIGHT] > INT32_ROWS)
    rows = np.empty(facts[ENTRIES], np.int64 if needs_int64 else np.int32)
    bad, row = _check_ids(facts, rows.ctypes.data, np.empty((1, FINDINGS), np.int64), checking(needs_int64), 1)
    if bad >= 0:
        refuse_row(names, bad, row, int(facts[HEIGHT]))
    return rows


# ------------------------------------------------------------------------------------------------------- by each worker


# Indices are unsigned here: Numba checks whether signed ones count from the end, which took a third of the time.


@jit(helper=True)
def _hash(row: Any, seed: Any) -> Any:
    """64 bits, of which the high ones are best. One multiplication alone would let some strided ids collide.

    Nobody can choose ids that collide in a table without knowing its ``seed``, an address.
    """
    spread = (np.uint64(row) ^ seed) * _GOLDEN
    return (spread ^ (spread >> np.uint64(32))) * _GOLDEN


@jit(helper=True)
def own_rows(ids: Any, k: int, workers: int) -> Any:
    """The positions (int32, ascending) of ids whose rows worker ``k`` of ``workers`` owns; the ids there, and padding.

    Each worker scans all ids: having another one distribute them, into its own cache, costs more.
    """
    n, m = len(ids), np.uint64(0)
    positions, rows = np.empty(n + 1, np.int32), np.empty(n + 1 + _AHEAD, ids.dtype)
    is_mine = _own_buckets(ids, k, workers)
    for i in range(n):
        row = ids[np.uint64(i)]
        positions[m], rows[m] = i, row
        m += np.uint64(is_mine[_hash(row, _NO_SEED) >> _BUCKET])
    padded = m + np.uint64(_AHEAD)
    rows[m:padded] = 0
    return positions[:m], rows[:padded]


@jit(helper=True)
def _own_buckets(ids: Any, k: int, workers: int) -> Any:
    """Whether worker ``k`` owns each bucket: full ones go to the least loaded worker, others fill workers in turn."""
    if workers == 1:
        return np.ones(BUCKETS, np.bool_)
    # Sampled at irregular positions, because features recur at regular ones; plus one for each bucket.
    n, counts = np.uint64(len(ids)), np.ones(BUCKETS, np.int64)
    for i in range(min(len(ids), SAMPLE)):
        at = ((_hash(i, _NO_SEED) >> np.uint64(32)) * n) >> np.uint64(32)
        counts[_hash(ids[at], _NO_SEED) >> _BUCKET] += 1
    is_mine, loads, total = np.zeros(BUCKETS, np.bool_), zero_words(workers), 0
    for bucket in range(BUCKETS):
        total += counts[bucket]
    for bucket in range(BUCKETS):
        if counts[bucket] * workers * FULL > total:
            least = 0
            for owner in range(workers):
                least = owner if loads[owner] < loads[least] else least
            loads[least] += counts[bucket]
            is_mine[bucket] = least == k
    owner = 0
    for bucket in range(BUCKETS):
        if counts[bucket] * workers * FULL <= total:
            while owner < workers - 1 and loads[owner] * workers >= total:
                owner += 1
            loads[owner] += counts[bucket]
            is_mine[bucket] = owner == k
    return is_mine


@jit(helper=True)
def _number(ids: Any, m: int) -> Any:
    """Number the rows of the first ``m`` ids by their first occurrence.

    Returns the number of each id; the row and the count of each number; how many numbers there are; memory for a
    uint32 for each.
    """
    bits = 4
    while 1 << bits < 2 * m:
        bits += 1
    numbers, rows, counts = np.empty(m + 1, np.uint32), np.empty(m + 1, ids.dtype), np.empty(m + 1, np.int32)
    table = np.full(1 << bits, _NONE, np.uint32)
    slots, seed = pointer(np.int64(table.ctypes.data), _INT32S, "sum"), np.uint64(table.ctypes.data)
    shift, mask, n = np.uint64(64 - bits), np.uint64((1 << bits) - 1), np.uint64(0)
    for i in range(m):
        j = np.uint64(i)
        prefetch(slots, np.int64(_hash(ids[j + np.uint64(_AHEAD)], seed) >> shift))
        row = ids[j]
        at = _hash(row, seed) >> shift
        # Entered as if new, so that finding a row and adding it take the same steps: no branch to mispredict.
        rows[n], counts[n] = row, 0
        while True:
            number = min(np.uint64(table[at]), n)  # an empty slot: the number of a new row
            if rows[number] == row:
                break
            at = (at + np.uint64(1)) & mask
        table[at] = np.uint32(number)
        numbers[j] = np.uint32(number)
        counts[number] += np.int32(1)
        n += np.uint64(number == n)
    return numbers, rows, counts, n, table


@jit(helper=True)
def group(ids: Any, k: int, workers: int) -> Any:
    """Group the ids whose rows worker ``k`` of ``workers`` owns.

    For rows that occur once: the rows and their positions, ascending. For the others: the positions, ascending, and the
    number of the sum that each adds to; the row of each sum, and how often it occurs.
    """
    positions, rows_there = own_rows(ids, k, workers)
    m, sums = len(positions), np.uint64(0)
    to, rows, counts, n, sum_of = _number(rows_there, m)
    for number in range(n):
        is_sum = counts[number] > 1
        sum_of[number] = np.uint32(sums) if is_sum else _NONE
        rows[sums], counts[sums] = rows[number], counts[number]
        sums += np.uint64(is_sum)
    added, once, several = np.empty(m + 1, np.int32), np.uint64(0), np.uint64(0)
    for i in range(m):
        j = np.uint64(i)
        position, row, mine = positions[j], rows_there[j], sum_of[np.uint64(to[j])]
        rows_there[once], positions[once] = row, position
        added[several], to[several] = position, mine
        is_sum = np.uint64(mine != _NONE)
        once, several = once + np.uint64(1) - is_sum, several + is_sum
    return rows_there[:once], positions[:once], added[:several], to[:several], rows[:sums], counts[:sums]
