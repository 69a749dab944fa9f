"""The sums of a row's occurrences, and of the chunks of a long run, as :mod:`adagrad.kernels.cuda.rows` divides them.

The sum of a chunk whose first position is p goes to slot ``2 (p // SHORT) + (1 if it is its run's first)``. Among SHORT
neighbouring positions at most one long run begins and at most one chunk continues a run, so no two chunks share a slot;
the slots of a run's later chunks are STRIDE apart. The slots of the columns that one program sums lie together, so that
these distances are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adagrad import rule
from adagrad.kernels.cuda.row_search import CHUNK, SHORT, find_chunk, find_operands, operand
from adagrad.kernels.cuda.rule import widen

STRIDE = tl.constexpr(2 * rule.CHUNK // SHORT.value)
"""The distance between the slots of a run's later chunks."""


@triton.jit
def minus_zero(pointer: tl.tensor) -> tl.tensor:
    """-0 as ``pointer`` points to, which changes no sum that it is added to.

    Made of bits, because Triton 3.6 compiles ``-0.0`` to 0.
    """
    BITS: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
    if BITS == 16:
        bits = tl.full([], -0x8000, tl.int16)
    elif BITS == 32:
        bits = tl.full([], -0x80000000, tl.int32)
    else:
        bits = tl.full([], -0x8000000000000000, tl.int64)
    return bits.to(pointer.dtype.element_ty, bitcast=True)


@triton.jit
def load_occurrences(values: tl.tensor, order: tl.tensor, n: tl.tensor, column: tl.tensor, length: tl.tensor,
                     COMPUTE: tl.constexpr) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The values (1, COLUMNS) at the first ``n`` of 4 places; from ``n`` on -0, which changes no sum."""
    zero = minus_zero(values)
    a = tl.load(order, mask=n > 0, other=0)
    b = tl.load(order + 1, mask=n > 1, other=0)
    c = tl.load(order + 2, mask=n > 2, other=0)
    d = tl.load(order + 3, mask=n > 3, other=0)
    a = tl.load(values + a * length + column, mask=column < tl.where(n > 0, length, 0), other=zero)
    b = tl.load(values + b * length + column, mask=column < tl.where(n > 1, length, 0), other=zero)
    c = tl.load(values + c * length + column, mask=column < tl.where(n > 2, length, 0), other=zero)
    d = tl.load(values + d * length + column, mask=column < tl.where(n > 3, length, 0), other=zero)
    return widen(a, COMPUTE), widen(b, COMPUTE), widen(c, COMPUTE), widen(d, COMPUTE)


@triton.jit
def load_sums(sums: tl.tensor, n: tl.tensor, column: tl.tensor, length: tl.tensor, STEP: tl.constexpr
              ) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The first ``n`` of 4 sums (1, COLUMNS), STEP elements apart; -0 from ``n`` on."""
    zero = minus_zero(sums)
    a = tl.load(sums, mask=column < tl.where(n > 0, length, 0), other=zero)
    b = tl.load(sums + STEP, mask=column < tl.where(n > 1, length, 0), other=zero)
    c = tl.load(sums + 2 * STEP, mask=column < tl.where(n > 2, length, 0), other=zero)
    d = tl.load(sums + 3 * STEP, mask=column < tl.where(n > 3, length, 0), other=zero)
    return a, b, c, d


@triton.jit
def sum_chunk(program: tl.tensor, ids: tl.tensor, order: tl.tensor, values: tl.tensor, sums: tl.tensor,
              records: tl.tensor, weights: tl.tensor, count: tl.tensor, length: tl.tensor, slots: tl.tensor,
              GRAD: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr
              ) -> None:  # fmt: skip
    """Put COLUMNS columns of the sum of a chunk, added one occurrence after the other, into its slot.

    ``program`` counts the programs that do so. Operands are as for :func:`adagrad.kernels.cuda.rows.update_runs`.
    """
    windows = (length - 1) // COLUMNS + 1
    slot = (program // windows).to(tl.int64)
    position, row = find_chunk(ids, count, slot)
    if row >= 0:
        if records is None:
            its_values = values
        else:
            its_values = operand(find_operands(records, weights, row + tl.arange(0, 1), 1) + 1, GRAD, ALIGNED)
        window = program % windows
        lane = tl.arange(0, COLUMNS)[None, :]
        column = window * (COLUMNS + 0 * length) + lane  # int64 where the length is, which may be a constant
        ahead = position + tl.arange(0, CHUNK)
        n = tl.sum((tl.load(ids + ahead, mask=ahead < count, other=-1) == row).to(tl.int32), axis=0)
        places = order + position
        total = tl.broadcast_to(minus_zero(sums), [1, COLUMNS])
        while n > 0:
            # All loads before the first addition: only then does the compiler have all of them in flight at once.
            a, b, c, d = load_occurrences(its_values, places, n, column, length, COMPUTE)
            e, f, g, h = load_occurrences(its_values, places + 4, n - 4, column, length, COMPUTE)
            p, q, r, s = load_occurrences(its_values, places + 8, n - 8, column, length, COMPUTE)
            t, u, v, w = load_occurrences(its_values, places + 12, n - 12, column, length, COMPUTE)
            total = total + a + b + c + d
            total = total + e + f + g + h
            total = total + p + q + r + s
            total = total + t + u + v + w
            places += 16
            n -= 16
        tl.store(sums + (window * slots.to(tl.int64) + slot) * COLUMNS + lane, total)


@triton.jit
def add_sums(sums: tl.tensor, chunks: tl.tensor, column: tl.tensor, length: tl.tensor, slots: tl.tensor,
             CHUNK_COLUMNS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The sum (1, COLUMNS) of a long run's ``chunks``, in order. The first of them is in the slot after ``sums``."""
    column = column[None, :]
    at = column // CHUNK_COLUMNS * slots.to(tl.int64) * CHUNK_COLUMNS + column % CHUNK_COLUMNS
    total = tl.load(sums + CHUNK_COLUMNS + at, mask=column < length, other=1.0)
    STEP: tl.constexpr = STRIDE * CHUNK_COLUMNS
    n = chunks - 1
    while n > 0:
        # As in sum_chunk.
        a, b, c, d = load_sums(sums + STEP + at, n, column, length, STEP)
        e, f, g, h = load_sums(sums + 5 * STEP + at, n - 4, column, length, STEP)
        p, q, r, s = load_sums(sums + 9 * STEP + at, n - 8, column, length, STEP)
        t, u, v, w = load_sums(sums + 13 * STEP + at, n - 12, column, length, STEP)
        total = total + a + b + c + d
        total = total + e + f + g + h
        total = total + p + q + r + s
        total = total + t + u + v + w
        sums += 16 * STEP
        n -= 16
    return total


@triton.jit
def add_occurrences(values: tl.tensor, order: tl.tensor, ids: tl.tensor, count: tl.tensor, position: tl.tensor,
                    row: tl.tensor, head: tl.tensor, place: tl.tensor, next_row: tl.tensor, column: tl.tensor,
                    length: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The sums (TILE, COLUMNS) of the runs that begin at ``position`` where ``head``, one addition after the other.

    ``place`` is that of their first values, ``next_row`` the row at the position after it.
    """
    inside_row = (column < length)[None, :]
    mask = head[:, None] & inside_row
    total = widen(tl.load(values + place[:, None] * length + column[None, :], mask=mask, other=1.0), COMPUTE)
    going = head & (next_row == row)
    # Both are numbers: Triton 3.2 to 3.7 cannot compile a loop whose condition is a tensor that it carries, nor 3.2 and
    # 3.3 one that carries the positions.
    ahead = 1
    more = tl.max(going.to(tl.int32), axis=0)
    while more > 0:
        after = position + ahead
        place = tl.load(order + after, mask=going, other=0)
        inside = going & (after + 1 < count)
        next_row = tl.load(ids + after + 1, mask=inside, other=-1)
        mask = going[:, None] & inside_row
        at = values + place[:, None] * length + column[None, :]
        value = tl.load(at, mask=mask, other=minus_zero(values))
        going = going & (next_row == row)
        more = tl.max(going.to(tl.int32), axis=0)
        total = total + widen(value, COMPUTE)
        ahead += 1
    return total


@triton.jit
def add_up(values: tl.tensor, sums: tl.tensor, chunks: tl.tensor, order: tl.tensor, ids: tl.tensor, count: tl.tensor,
           position: tl.tensor, row: tl.tensor, head: tl.tensor, place: tl.tensor, next_row: tl.tensor,
           column: tl.tensor, length: tl.tensor, slots: tl.tensor, COMPUTE: tl.constexpr, LONG: tl.constexpr,
           CHUNK_COLUMNS: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The sums (TILE, COLUMNS) of the runs that begin at ``position`` where ``head``."""
    if LONG:
        total = add_sums(sums, chunks, column, length, slots, CHUNK_COLUMNS)
    else:
        total = add_occurrences(values, order, ids, count, position, row, head, place, next_row, column, length,
                                COMPUTE)  # fmt: skip
    return total
