"""What row-sparse kernels look for: the weight that a row is of, runs of sorted row ids, and chunks of long runs."""

from __future__ import annotations

import triton
import triton.language as tl

from adagrad import rule
from adagrad.kernels.cuda.dense import RECORD

CHUNK = tl.constexpr(rule.CHUNK)
SHORT = tl.constexpr(32)
"""The most occurrences of a short run. CHUNK is a multiple of it."""
PROBES = tl.constexpr(32)
STARTS = tl.constexpr(32)
"""First rows of weights that are compared at once."""


@triton.jit
def find_operands(records: tl.tensor, weights: tl.tensor, row: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Pointers (TILE, 1) to the records of the rows' weights. A linear search: for some hundred weights, not more."""
    begun = tl.zeros([TILE], tl.int32)
    for k in range(0, weights, STARTS):
        weight = k + tl.arange(0, STARTS)
        start = tl.load(records + (1 + RECORD) * weights + weight, mask=weight < weights, other=0x7FFFFFFFFFFFFFFF)
        begun += tl.sum((start[None, :] <= row[:, None]).to(tl.int32), axis=1)
    number = tl.maximum(begun - 1, 0).to(tl.int64)  # where there is no row, any weight will do
    return (records + (2 + RECORD) * weights + RECORD * number)[:, None]


@triton.jit
def operand(word: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The addresses at ``word`` (TILE, 1) as pointers; ALIGNED promises multiples of 16 bytes for all rows there.

    For a single weight, Triton finds this out from the arguments themselves.
    """
    address = tl.load(word).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, (1, 16))
    return address


@triton.jit
def first_position(ids: tl.tensor, begin: tl.tensor, end: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The first position of the sorted ids in [begin, end) that has ``row`` or a higher one; else ``end``.

    PROBES at a time, because each step waits for memory: 4 steps for a million ids, where bisection would take 20. (128
    at a time would take 3, and read three times as much.)
    """
    low = begin
    high = end
    while low < high:
        step = tl.cdiv(high - low, PROBES)
        probe = low + tl.arange(0, PROBES) * step
        below = tl.load(ids + probe, mask=probe < high, other=row) < row
        count = tl.sum(below.to(tl.int32), axis=0)
        high = tl.minimum(low + count * step, high)
        low = tl.where(count > 0, low + (count - 1) * step + 1, low)
    return low


@triton.jit
def find_heads(ids: tl.tensor, count: tl.tensor, begin: tl.tensor, LONG: tl.constexpr, TILE: tl.constexpr
               ) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Positions (TILE,) from ``begin``, their rows, and whether a short or a LONG run begins there.

    Where the row is negative, there is no id, or a bad one.
    """
    position = begin + tl.arange(0, TILE)
    row = tl.load(ids + position, mask=position < count, other=-1)
    before = tl.load(ids + position - 1, mask=(position > 0) & (position <= count), other=-1)
    far = tl.load(ids + position + SHORT, mask=position + SHORT < count, other=-1)
    return position, row, (row >= 0) & (row != before) & ((row == far) == LONG)


@triton.jit
def find_long_run(ids: tl.tensor, count: tl.tensor, begin: tl.tensor) -> tuple[tl.tensor, ...]:
    """The position and the row of the long run that begins among the SHORT positions from ``begin``; -1 if none."""
    position, row, head = find_heads(ids, count, begin, True, SHORT)
    return tl.max(tl.where(head, position, -1), axis=0), tl.max(tl.where(head, row, -1), axis=0)


@triton.jit
def find_chunk(ids: tl.tensor, count: tl.tensor, slot: tl.tensor) -> tuple[tl.tensor, ...]:
    """The position and the row of the chunk whose sum goes to ``slot``; a negative row if there is none."""
    begin = slot // 2 * SHORT
    if slot % 2 == 1:
        position, row = find_long_run(ids, count, begin)
    else:
        row = tl.load(ids + begin)
        before = tl.load(ids + begin - 1, mask=begin > 0, other=-1)
        rank = begin - first_position(ids, tl.where(row == before, 0, begin), begin, row)
        position = begin + (CHUNK - rank % CHUNK) % CHUNK
        inside = (rank > 0) & (position < begin + SHORT) & (position < count)
        row = tl.where(tl.load(ids + position, mask=inside, other=-1) == row, row, -1)
    return position, row
