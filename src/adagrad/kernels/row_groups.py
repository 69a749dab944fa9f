"""Which occurrences of a row-sparse gradient are of one row: found by hashing, each in the order of the gradient.

Sorting the ids would do, and cost more twice over: the sort itself, and the walk through the gradient in the order of
the rows, which memory serves at a quarter of its speed.

Several workers share rows, not positions, so that each row is summed by one of them, in order: rows are hashed to
buckets, and each worker owns so many buckets as hold its part of the ids. Who owns what changes no bit.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from adagrad.kernels.blocks import ask
from adagrad.kernels.checked import refuse_row
from adagrad.kernels.formats import pointer
from adagrad.kernels.numba_jit import jit, place

BUCKETS = 1024
"""What the owners share: more than there are workers, few enough to be counted in the first-level cache."""

SAMPLE = 16_384
"""Ids that are looked at to share the buckets out."""

MOST = 2**31 - 1
"""Occurrences that can be told apart; a gradient with more is left to the array expression."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: the high bits of its multiples are spread evenly, whatever the step of the ids."""

_BUCKET = np.uint64(64 - (BUCKETS - 1).bit_length())

_AHEAD = 16
"""How many ids ahead the hash table is asked for."""

# What is known of a row-sparse update, an int64 each: the number of row ids, the elements of a row, the weight's rows,
# whether the ids have 64 bits; where each operand begins and ends; the bytes from a row to the next of all operands but
# the ids; where the checked copy of the ids is, whether they increase; where the rates and the rule's scalars are;
# whether what is written to shares no memory with any other operand; where it is written down what was grouped.
WEIGHT, GRAD, HISTORY, MASTER, IDS = range(5)
ENTRIES, LENGTH, HEIGHT, ARE_LONG = range(4)
BASE, ENDS, STRIDE = 4, 9, 14
ROWS, ARE_DISTINCT, RATES, SCALARS, ARE_APART, GROUPS, SCRATCH, FACTS = range(18, 26)

_numbers = np.empty(0, np.int32)


# ---------------------------------------------------------------------------------------------------- before the update


@jit(helper=True)
def _copy(indices: Any, rows: Any, height: int) -> Any:
    """Copy ids: the position of the first outside ``range(height)`` and the id, or -1 and whether they increase."""
    while True:
        least, greatest = np.int64(0), np.int64(-1)
        for i in range(len(rows)):
            row = np.int64(indices[i])
            rows[i] = row
            least, greatest = min(least, row), max(greatest, row)
        if least < 0 or greatest >= height:
            for i in range(len(rows)):
                row = np.int64(indices[i])
                if row < 0 or row >= height:
                    return i, row
        # Other threads may change the ids meanwhile, and what was looked at need not be what was copied.
        least, greatest, before = np.int64(0), np.int64(-1), np.int64(-1)
        increasing: Any = True
        for i in range(len(rows)):
            row = np.int64(rows[i])
            least, greatest = min(least, row), max(greatest, row)
            increasing &= row > before
            before = row
        if least >= 0 and greatest < height:
            return -1, np.int64(increasing)


@jit()
def _copy_ids(facts: Any, rows: Any) -> Any:
    address, n, height = facts[BASE + IDS], facts[ENTRIES], facts[HEIGHT]
    if facts[ARE_LONG]:
        bad, found = _copy(numba.carray(place(address), n, np.int64), rows, height)
    else:
        bad, found = _copy(numba.carray(place(address), n, np.int32), rows, height)
    facts[ROWS], facts[ARE_DISTINCT] = rows.ctypes.data, found
    return bad, found


def checked_rows(at: str, facts: Any) -> Any:
    """A copy of the row ids of an update, because what is checked must be what is used; ``facts`` is told of it.

    int32 where that is enough, else int64.

    Raises
    ------
    IndexError
        For an id outside the weight; ``at`` says of which gradient.
    """
    rows = np.empty(facts[ENTRIES], np.int32 if facts[HEIGHT] <= 2**31 else np.int64)
    bad, found = _copy_ids(facts, rows)
    if bad >= 0:
        refuse_row(at, bad, found, int(facts[HEIGHT]))
    return rows


# ------------------------------------------------------------------------------------------------------- by each worker


@jit(helper=True)
def _hash(row: Any) -> Any:
    return np.uint64(row) * _GOLDEN


@jit(helper=True)
def own_positions(ids: Any, k: int, count: int) -> Any:
    """The positions of the ids whose rows worker ``k`` of ``count`` owns, int32, ascending.

    Each worker looks at all ids: to have them sorted out by another, in whose cache they are then, costs more.
    """
    n = len(ids)
    found = np.empty(n + 1, np.int32)
    if count == 1:
        for i in range(n):
            found[i] = i
        return found[:n]
    counts, step = np.zeros(BUCKETS, np.int64), max(n // SAMPLE, 1)
    for i in range(0, n, step):
        counts[_hash(ids[i]) >> _BUCKET] += 1
    # A bucket is mine if the middle of its ids, all laid end to end by bucket, is in my part of them.
    is_mine, total, before = np.empty(BUCKETS, np.bool_), counts.sum(), 0
    first, last = total * k, total * (k + 1) if k < count - 1 else np.int64(2**63 - 1)
    for bucket in range(BUCKETS):
        middle = (before + counts[bucket] // 2) * count
        is_mine[bucket] = (middle >= first) & (middle < last)
        before += counts[bucket]
    m = 0
    for i in range(n):
        found[m] = i
        m += is_mine[_hash(ids[i]) >> _BUCKET]
    return found[:m]


@jit(helper=True)
def number_rows(ids: Any, positions: Any) -> Any:
    """Number the rows of the ids at ``positions`` by their first occurrence.

    The number of each position, int32; the row and the count of each number.
    """
    m, bits = len(positions), 4
    while 1 << bits < 2 * m:
        bits += 1
    numbers, rows, counts = np.empty(m, np.int32), np.empty(m + 1, ids.dtype), np.empty(m + 1, np.int32)
    table = np.full(1 << bits, -1, np.int32)
    places = pointer(np.int64(table.ctypes.data), _numbers, "sum")
    # The bits of the hash below the bucket's: rows of one owner share the bucket's.
    shift, mask, n = _BUCKET - np.uint64(bits), np.uint64((1 << bits) - 1), 0
    for j in range(m):
        ask(places, np.int64((_hash(ids[positions[min(j + _AHEAD, m - 1)]]) >> shift) & mask))
        row = ids[positions[j]]
        at = (_hash(row) >> shift) & mask
        # As if the row were new, so that finding it and entering it are the same steps: no branch to guess.
        rows[n], counts[n] = row, 0
        while True:
            number = table[at]
            number = np.int32(n) if number < 0 else number
            if rows[number] == row:
                break
            at = (at + np.uint64(1)) & mask
        table[at] = number
        numbers[j] = number
        counts[number] += np.int32(1)
        n += 1 if number == n else 0
    return numbers, rows[:n], counts[:n]
