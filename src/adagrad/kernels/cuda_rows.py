"""Row-sparse updates on CUDA: each row present is updated once, with the sum of its occurrences.

Any number of weights of one form share the launches: their rows are numbered consecutively across weights, and if there
are several, kernels find operands and settings of each in a table (see :mod:`adagrad.kernels.cuda_row_lists`).

The row ids are sorted stably, so that a row's occurrences form a run, in their original order. Work is divided by
sorted position, not by row, so that no program waits for a frequent row. A short run, of at most SHORT occurrences, is
summed and applied by the program of the TILE positions among which it begins. A long one is cut into chunks of CHUNK
occurrences from its first: :func:`sum_chunks` adds up each of them in a program of its own and leaves the sum in a
slot, and another launch of :func:`update_runs` adds the sums in order and applies them. So however frequent a row is,
no program adds more than CHUNK occurrences, or one chunk sum per CHUNK occurrences, in sequence; and a row's bits
depend on its own values alone: the additions are those of :func:`adagrad.rule.sum_duplicates`. Nothing comes back to
the host.

The sum of a chunk whose first position is p goes to slot ``2 (p // SHORT) + (1 if it is its run's first)``. Among SHORT
neighbouring positions at most one long run begins and at most one chunk continues a run, so no two chunks share a slot;
the slots of a run's later chunks are STRIDE apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adagrad import rule
from adagrad.kernels.cuda_dense import RECORD
from adagrad.kernels.cuda_rule import (
    LANES,
    add_mean,
    add_to_lanes,
    effective_gradient,
    gradient_scalars,
    halted,
    new_weight,
    read_weight,
    step_scalars,
    widen,
    write_weight,
)

CHUNK = tl.constexpr(rule.CHUNK)
SHORT = tl.constexpr(32)
"""The most occurrences of a short run. CHUNK is a multiple of it."""
STRIDE = tl.constexpr(2 * rule.CHUNK // SHORT.value)
"""The distance between the slots of a run's later chunks."""
PROBES = tl.constexpr(128)
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

    PROBES at a time, because each step waits for memory: 3 steps for a million ids, where bisection would take 20.
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
               ) -> tl.tensor:  # fmt: skip
    """Positions (TILE,) from ``begin``, their rows, and whether a short or a LONG run begins there.

    Where the row is negative, there is no id, or a bad one.
    """
    position = begin + tl.arange(0, TILE)
    row = tl.load(ids + position, mask=position < count, other=-1)
    before = tl.load(ids + position - 1, mask=(position > 0) & (position <= count), other=-1)
    far = tl.load(ids + position + SHORT, mask=position + SHORT < count, other=-1)
    return position, row, (row >= 0) & (row != before) & ((row == far) == LONG)


@triton.jit
def find_long_run(ids: tl.tensor, count: tl.tensor, begin: tl.tensor) -> tl.tensor:
    """The position and the row of the long run that begins among the SHORT positions from ``begin``; -1 if none."""
    position, row, head = find_heads(ids, count, begin, True, SHORT)
    return tl.max(tl.where(head, position, -1), axis=0), tl.max(tl.where(head, row, -1), axis=0)


@triton.jit
def find_chunk(ids: tl.tensor, count: tl.tensor, slot: tl.tensor) -> tl.tensor:
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


@triton.jit
def load_occurrences(values: tl.tensor, order: tl.tensor, position: tl.tensor, end: tl.tensor, column: tl.tensor,
                     length: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The values (1, COLUMNS) at 4 sorted positions from ``position``; from ``end`` on, the last again."""
    a = tl.load(order + tl.minimum(position, end - 1))
    b = tl.load(order + tl.minimum(position + 1, end - 1))
    c = tl.load(order + tl.minimum(position + 2, end - 1))
    d = tl.load(order + tl.minimum(position + 3, end - 1))
    inside = column < length
    a = tl.load(values + a * length + column, mask=inside)
    b = tl.load(values + b * length + column, mask=inside)
    c = tl.load(values + c * length + column, mask=inside)
    d = tl.load(values + d * length + column, mask=inside)
    return widen(a, COMPUTE), widen(b, COMPUTE), widen(c, COMPUTE), widen(d, COMPUTE)


@triton.jit
def load_sums(sums: tl.tensor, k: tl.tensor, end: tl.tensor, column: tl.tensor, length: tl.tensor) -> tl.tensor:
    """The sums (1, COLUMNS) of 4 chunks from the ``k``-th of a run, whose first is at ``sums``; from ``end`` on, the
    last again."""
    inside = column < length
    a = tl.load(sums + STRIDE * tl.minimum(k, end - 1) * length + column, mask=inside)
    b = tl.load(sums + STRIDE * tl.minimum(k + 1, end - 1) * length + column, mask=inside)
    c = tl.load(sums + STRIDE * tl.minimum(k + 2, end - 1) * length + column, mask=inside)
    d = tl.load(sums + STRIDE * tl.minimum(k + 3, end - 1) * length + column, mask=inside)
    return a, b, c, d


@triton.jit
def add_first(total: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, n: tl.tensor) -> tl.tensor:
    """``total`` plus the first ``n`` of 4 terms, one after the other."""
    total = tl.where(n > 0, total + a, total)
    total = tl.where(n > 1, total + b, total)
    total = tl.where(n > 2, total + c, total)
    return tl.where(n > 3, total + d, total)


@triton.jit(do_not_specialize=["weights", "count"])
def sum_chunks(ids: tl.tensor, order: tl.tensor, values: tl.tensor, sums: tl.tensor, records: tl.tensor,
               weights: tl.tensor, count: tl.tensor, length: tl.tensor, GRAD: tl.constexpr, COMPUTE: tl.constexpr,
               ALIGNED: tl.constexpr, COLUMNS: tl.constexpr) -> None:  # fmt: skip
    """Put COLUMNS columns of the sum of a chunk, added one occurrence after the other, into its slot.

    The address of the values is an argument, or for several weights in ``records``.
    """
    windows = (length - 1) // COLUMNS + 1  # length + COLUMNS could overflow 32 bits
    slot = (tl.program_id(0) // windows).to(tl.int64)
    position, row = find_chunk(ids, count, slot)
    if row < 0:
        return
    if records is not None:
        values = operand(find_operands(records, weights, row + tl.arange(0, 1), 1) + 1, GRAD, ALIGNED)
    column = (tl.program_id(0) % windows * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    ahead = position + tl.arange(0, CHUNK)
    end = position + tl.sum((tl.load(ids + ahead, mask=ahead < count, other=-1) == row).to(tl.int32), axis=0)
    total = widen(tl.load(values + tl.load(order + position) * length + column, mask=column < length), COMPUTE)
    k = position + 1
    while k < end:
        # All loads before the first addition: only then does the compiler have all of them in flight at once.
        a, b, c, d = load_occurrences(values, order, k, end, column, length, COMPUTE)
        e, f, g, h = load_occurrences(values, order, k + 4, end, column, length, COMPUTE)
        p, q, r, s = load_occurrences(values, order, k + 8, end, column, length, COMPUTE)
        t, u, v, w = load_occurrences(values, order, k + 12, end, column, length, COMPUTE)
        total = add_first(total, a, b, c, d, end - k)
        total = add_first(total, e, f, g, h, end - k - 4)
        total = add_first(total, p, q, r, s, end - k - 8)
        total = add_first(total, t, u, v, w, end - k - 12)
        k += 16
    tl.store(sums + slot * length + column, total, mask=column < length)


@triton.jit
def add_sums(sums: tl.tensor, position: tl.tensor, end: tl.tensor, column: tl.tensor, length: tl.tensor) -> tl.tensor:
    """The sum (1, COLUMNS) of the long run that begins at ``position``: that of its ``end`` chunks, in order."""
    column = column[None, :]
    sums += 2 * (position // SHORT)[:, None] * length
    total = tl.load(sums + length + column, mask=column < length)
    k = end * 0 + 1
    while k < end:
        # As in sum_chunks.
        a, b, c, d = load_sums(sums, k, end, column, length)
        e, f, g, h = load_sums(sums, k + 4, end, column, length)
        p, q, r, s = load_sums(sums, k + 8, end, column, length)
        t, u, v, w = load_sums(sums, k + 12, end, column, length)
        total = add_first(total, a, b, c, d, end - k)
        total = add_first(total, e, f, g, h, end - k - 4)
        total = add_first(total, p, q, r, s, end - k - 8)
        total = add_first(total, t, u, v, w, end - k - 12)
        k += 16
    return total


@triton.jit
def add_occurrences(values: tl.tensor, order: tl.tensor, ids: tl.tensor, count: tl.tensor, position: tl.tensor,
                    row: tl.tensor, head: tl.tensor, column: tl.tensor, length: tl.tensor, COMPUTE: tl.constexpr,
                    UNROLL: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The sums (TILE, COLUMNS) of the runs that begin at ``position`` where ``head``, one addition after the other.

    UNROLL loads are in flight at once.
    """
    inside_row = (column < length)[None, :]
    place = tl.load(order + position, mask=head, other=0)
    mask = head[:, None] & inside_row
    total = widen(tl.load(values + place[:, None] * length + column[None, :], mask=mask), COMPUTE)
    after = position + 1
    inside = head & (after < count)
    # The condition is a number: Triton 3.2 to 3.7 cannot compile a loop whose condition is a tensor that it carries.
    more = tl.max((inside & (tl.load(ids + after, mask=inside, other=-1) == row)).to(tl.int32), axis=0)
    while more > 0:
        for _ in tl.static_range(UNROLL):
            inside = head & (after < count)
            going = inside & (tl.load(ids + after, mask=inside, other=-1) == row)
            place = tl.load(order + after, mask=going, other=0)
            mask = going[:, None] & inside_row
            value = widen(tl.load(values + place[:, None] * length + column[None, :], mask=mask), COMPUTE)
            total = tl.where(mask, total + value, total)
            after += 1
        more = tl.max(going.to(tl.int32), axis=0)
    return total


@triton.jit
def add_up(values: tl.tensor, sums: tl.tensor, chunks: tl.tensor, order: tl.tensor, ids: tl.tensor, count: tl.tensor,
           position: tl.tensor, row: tl.tensor, head: tl.tensor, column: tl.tensor, length: tl.tensor,
           COMPUTE: tl.constexpr, LONG: tl.constexpr, UNROLL: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The sums (TILE, COLUMNS) of the runs that begin at ``position`` where ``head``."""
    if LONG:
        total = add_sums(sums, position, chunks, column, length)
    else:
        total = add_occurrences(values, order, ids, count, position, row, head, column, length, COMPUTE, UNROLL)
    return total


@triton.jit(do_not_specialize=["weights", "index", "count", "rows"])
def update_runs(ids: tl.tensor, order: tl.tensor, values: tl.tensor, sums: tl.tensor, weight: tl.tensor,
                history: tl.tensor, master: tl.tensor, records: tl.tensor, weights: tl.tensor, table: tl.tensor,
                index: tl.tensor, count: tl.tensor, rows: tl.tensor, length: tl.tensor, grad_scale: tl.tensor,
                skip: tl.tensor, found_inf: tl.tensor, WEIGHT: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr,
                HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr, ROW_WISE: tl.constexpr, ONE_PASS: tl.constexpr,
                LONG: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr
                ) -> None:  # fmt: skip
    """Sum the values of the runs that begin in a tile of positions and update their rows.

    It takes short runs among TILE positions, or adds the sums of chunks of the LONG run that begins among SHORT ones.
    A program takes COLUMNS columns, or all of them if the history has one value a row: then, unless the row fits
    COLUMNS (ONE_PASS), a first pass is for the mean of squares. Operands and the index of their settings are arguments,
    or for several weights in ``records``.
    """
    windows = 1 if ROW_WISE else (length - 1) // COLUMNS + 1  # length + COLUMNS could overflow 32 bits; likewise below
    tile = (tl.program_id(0) // windows).to(tl.int64)
    left = tl.program_id(0) % windows * COLUMNS
    if LONG:
        first, its_row = find_long_run(ids, count, tile * SHORT)
        position, row = first + tl.arange(0, 1), its_row + tl.arange(0, 1)
        head = row >= 0
    else:
        position, row, head = find_heads(ids, count, tile * TILE, False, TILE)
    # A halted call counts as having no rows: tested here, not by a return at the top, so that no load waits for it.
    head = head & (row < tl.where(halted(skip, found_inf), 0, rows))
    if tl.max(head.to(tl.int32), axis=0) == 0:
        return
    if records is not None:
        record = find_operands(records, weights, row, TILE)
        weight, values = operand(record, WEIGHT, ALIGNED), operand(record + 1, GRAD, ALIGNED)
        history, master = operand(record + 2, COMPUTE, ALIGNED and not ROW_WISE), operand(record + 3, COMPUTE, ALIGNED)
        index = tl.load(record + 4)
    row_start = row.to(tl.int64)[:, None] * length
    rescale, clip, wd = gradient_scalars(table, index, COMPUTE)
    lr, decoupled_wd, eps_inside, eps_outside = step_scalars(table, index, COMPUTE)
    chunks = None
    if LONG:
        chunks = tl.cdiv(first_position(ids, first, first * 0 + count, its_row + 1) - first, CHUNK)

    if ROW_WISE:
        h = tl.load(history + row[:, None], mask=head[:, None], other=0.0)
        lanes = tl.zeros([TILE, LANES], COMPUTE)
    if ROW_WISE and not ONE_PASS:
        for k in range((length - 1) // COLUMNS + 1):
            column = k * COLUMNS + tl.arange(0, COLUMNS)
            mask = head[:, None] & (column < length)[None, :]
            w = read_weight(weight, master, row_start + column[None, :], mask, COMPUTE, HAS_MASTER)
            g = add_up(values, sums, chunks, order, ids, count, position, row, head, column, length, COMPUTE, LONG,
                       UNROLL)  # fmt: skip
            g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
            lanes = add_to_lanes(lanes, tl.where(mask, g * g, 0.0), TILE, COLUMNS)
        h = add_mean(history, row[:, None], h, lanes, length, head[:, None], TILE)

    for k in range((length - 1) // COLUMNS + 1 if ROW_WISE and not ONE_PASS else 1):
        column = left + k * COLUMNS + tl.arange(0, COLUMNS)
        at = row_start + column[None, :]
        mask = head[:, None] & (column < length)[None, :]
        w = read_weight(weight, master, at, mask, COMPUTE, HAS_MASTER)
        if not ROW_WISE:
            h = tl.load(history + at, mask=mask)
        g = add_up(values, sums, chunks, order, ids, count, position, row, head, column, length, COMPUTE, LONG, UNROLL)
        g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
        if ROW_WISE and ONE_PASS:
            lanes = add_to_lanes(lanes, tl.where(mask, g * g, 0.0), TILE, COLUMNS)
            h = add_mean(history, row[:, None], h, lanes, length, head[:, None], TILE)
        if not ROW_WISE:
            h = h + g * g
            tl.store(history + at, h, mask=mask)
        w = new_weight(w, g, h, lr, decoupled_wd, eps_inside, eps_outside)
        write_weight(weight, master, at, w, mask, WEIGHT, HAS_MASTER)
