"""Row-sparse updates on CUDA: each row present is updated once, with the sum of its occurrences.

Any number of weights of one form share the launches: their rows are numbered consecutively across weights, and if there
are several, kernels find operands and settings of each in a table (see :mod:`adagrad.kernels.cuda.row_launches`).

The row ids are sorted stably, so that a row's occurrences form a run, in their original order. Work is divided by
sorted position, not by row, so that no program waits for a frequent row. A short run, of at most SHORT occurrences, is
summed and applied by the program of the TILE positions among which it begins. A long one is cut into chunks of CHUNK
occurrences from its first: further programs of the same launch add up one chunk each (:func:`sum_chunk`) and leave the
sum in a slot, and another launch adds the sums in order and applies them. So however frequent a row is, no program adds
more than CHUNK occurrences, or one chunk sum per CHUNK occurrences, in sequence; and a row's bits depend on its own
values alone: the additions are those of :func:`adagrad.rule.sum_duplicates`. Nothing comes back to the host.

The sum of a chunk whose first position is p goes to slot ``2 (p // SHORT) + (1 if it is its run's first)``. Among SHORT
neighbouring positions at most one long run begins and at most one chunk continues a run, so no two chunks share a slot;
the slots of a run's later chunks are STRIDE apart. The slots of the columns that one program sums lie together, so that
these distances are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adagrad import rule
from adagrad.kernels.cuda.dense import RECORD
from adagrad.kernels.cuda.rule import (
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

    ``program`` counts the programs that do so. Operands are as for :func:`update_runs`.
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
    total = tl.load(sums + CHUNK_COLUMNS + at, mask=column < length)
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
    total = widen(tl.load(values + place[:, None] * length + column[None, :], mask=mask), COMPUTE)
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


@triton.jit(do_not_specialize=["weights", "index", "count", "rows", "slots"])
def update_runs(ids: tl.tensor, order: tl.tensor, values: tl.tensor, sums: tl.tensor, weight: tl.tensor,
                history: tl.tensor, master: tl.tensor, records: tl.tensor, weights: tl.tensor, table: tl.tensor,
                index: tl.tensor, count: tl.tensor, rows: tl.tensor, length: tl.tensor, windows: tl.tensor,
                slots: tl.tensor, grad_scale: tl.tensor, skip: tl.tensor, found_inf: tl.tensor, WEIGHT: tl.constexpr,
                GRAD: tl.constexpr, COMPUTE: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr,
                ROW_WISE: tl.constexpr, ONE_PASS: tl.constexpr, LONG: tl.constexpr, TILE: tl.constexpr,
                COLUMNS: tl.constexpr, CHUNK_COLUMNS: tl.constexpr) -> None:  # fmt: skip
    """Sum the values of the runs that begin in a tile of positions and update their rows.

    It takes short runs among TILE positions, or adds the sums of chunks of the LONG run that begins among SHORT ones.
    A program takes COLUMNS columns, or all of them if the history has one value a row: then, unless the row fits
    COLUMNS (ONE_PASS), a first pass is for the mean of squares. Operands and the index of their settings are arguments,
    or for several weights in ``records``. Of the launch for short runs, the programs after those of the tiles fill the
    ``slots`` with the sums of chunks, CHUNK_COLUMNS columns each.
    """
    if not LONG:
        of_chunks = tl.program_id(0) - ((count - 1) // TILE + 1) * windows  # count + TILE could overflow 32 bits
        if of_chunks >= 0:
            sum_chunk(of_chunks, ids, order, values, sums, records, weights, count, length, slots, GRAD, COMPUTE,
                      ALIGNED, CHUNK_COLUMNS)  # fmt: skip
            return
    tile = (tl.program_id(0) // windows).to(tl.int64)
    left = tl.program_id(0) % windows * (COLUMNS + 0 * length)  # int64 where the length is
    place = None
    next_row = None
    if LONG:
        first, its_row = find_long_run(ids, count, tile * SHORT)
        position, row = first + tl.arange(0, 1), its_row + tl.arange(0, 1)
        head = row >= 0
    else:
        position, row, head = find_heads(ids, count, tile * TILE, False, TILE)
        # At once, though only heads need them: no load waits for the ids.
        place = tl.load(order + position, mask=position < count, other=0)
        next_row = tl.load(ids + position + 1, mask=position + 1 < count, other=-1)
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
        chunks = tl.cdiv(first_position(ids, first, first * 0 + count, its_row + 1) - first, CHUNK).to(tl.int32)
        sums += 2 * (first // SHORT) * CHUNK_COLUMNS

    if ROW_WISE:
        h = tl.load(history + row[:, None], mask=head[:, None], other=0.0)
        lanes = tl.zeros([TILE, LANES], COMPUTE)
    if ROW_WISE and not ONE_PASS:
        for k in range((length - 1) // COLUMNS + 1):  # length + COLUMNS could overflow 32 bits
            column = k * COLUMNS + tl.arange(0, COLUMNS)
            mask = head[:, None] & (column < length)[None, :]
            w = read_weight(weight, master, row_start + column[None, :], mask, COMPUTE, HAS_MASTER)
            g = add_up(values, sums, chunks, order, ids, count, position, row, head, place, next_row, column, length,
                       slots, COMPUTE, LONG, CHUNK_COLUMNS)  # fmt: skip
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
        g = add_up(values, sums, chunks, order, ids, count, position, row, head, place, next_row, column, length,
                   slots, COMPUTE, LONG, CHUNK_COLUMNS)  # fmt: skip
        g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
        if ROW_WISE and ONE_PASS:
            lanes = add_to_lanes(lanes, tl.where(mask, g * g, 0.0), TILE, COLUMNS)
            h = add_mean(history, row[:, None], h, lanes, length, head[:, None], TILE)
        if not ROW_WISE:
            h = h + g * g
            tl.store(history + at, h, mask=mask)
        w = new_weight(w, g, h, lr, decoupled_wd, eps_inside, eps_outside)
        write_weight(weight, master, at, w, mask, WEIGHT, HAS_MASTER)
