"""Row-sparse updates on CUDA: each row present is updated once, with the sum of its occurrences.

Any number of weights of one form share the launches: their rows are numbered consecutively across weights, and if there
are several, kernels find operands and settings of each in a table (see :mod:`adagrad.kernels.cuda_row_lists`).

The row ids are sorted stably, so that a row's occurrences form a run, in their original order. A run is cut into chunks
of CHUNK occurrences from its first one. Work is divided by sorted position, not by row: a program takes TILE positions
and sums the chunks that begin there. Runs of one chunk, which most are, it applies at once; chunks of longer runs leave
their sums for a second launch, which adds them in order and applies them. So however frequent a row is, no program adds
more than CHUNK occurrences, or one chunk sum per CHUNK occurrences, in sequence; and a row's bits depend on its own
values alone: the additions are those of :func:`adagrad.rule.sum_duplicates`. Nothing comes back to the host.

The sum of a chunk whose first position is p goes to slot ``2 (p // CHUNK) + (1 if it is its run's first)``. Among CHUNK
neighbouring positions at most one chunk continues a run and at most one begins a run of several chunks, so no two
chunks share a slot, and the slots of a run's later chunks are 2 apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adagrad import rule
from adagrad.kernels.cuda_dense import RECORD, find_record
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
LOWEST = tl.constexpr(-(2**63) + 1)
"""The lowest row id that is reported as it is: the one below it means that there is no report."""
PROBES = tl.constexpr(128)
STARTS = tl.constexpr(32)
"""First rows of weights that are compared at once."""


@triton.jit(do_not_specialize=["count", "rows"])
def check_ids(ids: tl.tensor, keys: tl.tensor, count: tl.tensor, rows: tl.tensor, skip: tl.tensor, report: tl.tensor,
              BLOCK: tl.constexpr) -> None:  # fmt: skip
    """Copy the ids of a weight to ``keys``, perhaps narrower; see :func:`put_keys`."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + position, mask=position < count, other=0).to(tl.int64)
    put_keys(keys, position, row, count.to(tl.int64), rows.to(tl.int64), 0, skip, report)


@triton.jit(do_not_specialize=["weights"])
def check_ids_of_all(records: tl.tensor, weights: tl.tensor, keys: tl.tensor, skip: tl.tensor, report: tl.tensor,
                     BLOCK: tl.constexpr) -> None:  # fmt: skip
    """The same for all weights, one after the other, with rows numbered consecutively."""
    record, block = find_record(records, 0, weights, weights)
    count, rows = tl.load(record + 2), tl.load(record + 3)
    position = block * BLOCK + tl.arange(0, BLOCK)
    address, bits = tl.load(record), tl.load(record + 1)
    shorts, longs = tl.where(bits == 32, count, 0), tl.where(bits == 64, count, 0)
    short = tl.load(address.to(tl.pointer_type(tl.int32)) + position, mask=position < shorts, other=0)
    long = tl.load(address.to(tl.pointer_type(tl.int64)) + position, mask=position < longs, other=0)
    row = short.to(tl.int64) + long
    put_keys(keys + tl.load(record + 5), position, row, count, rows, tl.load(record + 4), skip, report)


@triton.jit
def put_keys(keys: tl.tensor, position: tl.tensor, row: tl.tensor, count: tl.tensor, rows: tl.tensor,
             first_row: tl.tensor, skip: tl.tensor, report: tl.tensor) -> None:  # fmt: skip
    """Write the key of each row id; one out of range becomes -1, is reported and sets ``skip``."""
    inside = position < count
    bad = inside & ((row < 0) | (row >= rows))
    tl.store(keys + position, tl.where(bad, -1, first_row + row).to(keys.dtype.element_ty), mask=inside)
    first = tl.min(tl.where(bad, position, count), axis=0)
    if first < count:
        earlier = tl.atomic_xchg(skip, 1)
        if earlier == 0:  # only one program of a call reports: several reports would be mixed
            tl.store(report, tl.maximum(tl.sum(tl.where(position == first, row, 0), axis=0), LOWEST))
            tl.store(report + 1, rows + 1)


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
def first_position(ids: tl.tensor, end: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The first position of ``row`` among the sorted ids before ``end``.

    PROBES at a time, because each step waits for memory: 3 steps for a million ids, where bisection would take 20.
    """
    low = tl.full([], 0, tl.int64)
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
def find_chunks(ids: tl.tensor, count: tl.tensor, tile: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Positions (TILE,), their rows, whether a chunk begins there, if it is a whole run, and the slot for its sum."""
    begin = tile * TILE
    lane = tl.arange(0, TILE)
    position = begin + lane
    row = tl.load(ids + position, mask=position < count, other=-1)
    first = tl.load(ids + begin)
    before = tl.load(ids + begin - 1, mask=begin > 0, other=-1)
    # Rank within the run: the equal ids to the left, in this tile and, for the run that crosses its border, before it.
    rank = tl.sum(((row[:, None] == row[None, :]) & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1).to(tl.int64)
    border = tl.where(before == first, begin, 0)
    rank += tl.where(row == first, border - first_position(ids, border, first), 0)
    far = position - rank + CHUNK
    whole = tl.load(ids + far, mask=far < count, other=-1) != row
    return position, row, (position < count) & (rank % CHUNK == 0), whole, 2 * (position // CHUNK) + (rank == 0)


@triton.jit
def find_long_run(ids: tl.tensor, count: tl.tensor, tile: tl.tensor) -> tl.tensor:
    """Position (1,) and row of the run of several chunks that begins among CHUNK positions; -1 if there is none."""
    position = tile * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(ids + position, mask=position < count, other=-1)
    before = tl.load(ids + position - 1, mask=(position > 0) & (position <= count), other=-1)
    far = tl.load(ids + position + CHUNK, mask=position + CHUNK < count, other=-1)
    begins = (row >= 0) & (row != before) & (row == far)
    position = tl.max(tl.where(begins, position, -1), axis=0) + tl.arange(0, 1)
    row = tl.load(ids + position, mask=position >= 0, other=-1)
    return position, row


@triton.jit
def add_up(source: tl.tensor, order: tl.tensor, ids: tl.tensor, count: tl.tensor, position: tl.tensor, row: tl.tensor,
           head: tl.tensor, column: tl.tensor, length: tl.tensor, COMPUTE: tl.constexpr, LATER: tl.constexpr,
           UNROLL: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The sums (TILE, COLUMNS) that begin at ``position`` where ``head``, one addition after the other.

    They add the occurrences of one chunk, or (LATER) the chunk sums of one run. UNROLL loads are in flight at once.
    """
    STEP: tl.constexpr = CHUNK if LATER else 1
    if LATER:
        end = position * 0 + count
        begin = 2 * (position // CHUNK) + 1
    else:
        end = tl.minimum(position + CHUNK, count)
        begin = tl.load(order + position, mask=head, other=0)
    inside_row = (column < length)[None, :]
    total = widen(tl.load(source + begin[:, None] * length + column[None, :], mask=head[:, None] & inside_row), COMPUTE)
    after = position + STEP
    inside = head & (after < end)
    # The condition is a number: Triton 3.2 to 3.7 cannot compile a loop whose condition is a tensor that it carries.
    more = tl.max((inside & (tl.load(ids + after, mask=inside, other=-1) == row)).to(tl.int32), axis=0)
    while more > 0:
        for _ in tl.static_range(UNROLL):
            inside = head & (after < end)
            going = inside & (tl.load(ids + after, mask=inside, other=-1) == row)
            if LATER:
                place = 2 * (after // CHUNK)
            else:
                place = tl.load(order + after, mask=inside, other=0)
            mask = going[:, None] & inside_row
            value = widen(tl.load(source + place[:, None] * length + column[None, :], mask=mask), COMPUTE)
            total = tl.where(mask, total + value, total)
            after += STEP
        more = tl.max(going.to(tl.int32), axis=0)
    return total


@triton.jit(do_not_specialize=["weights", "index", "count", "rows"])
def update_runs(ids: tl.tensor, order: tl.tensor, values: tl.tensor, sums: tl.tensor, weight: tl.tensor,
                history: tl.tensor, master: tl.tensor, records: tl.tensor, weights: tl.tensor, table: tl.tensor,
                index: tl.tensor, count: tl.tensor, rows: tl.tensor, length: tl.tensor, grad_scale: tl.tensor,
                skip: tl.tensor, found_inf: tl.tensor, WEIGHT: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr,
                HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr, ROW_WISE: tl.constexpr, ONE_PASS: tl.constexpr,
                LATER: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr
                ) -> None:  # fmt: skip
    """Sum the values of the runs that begin in a tile of positions and update their rows, or leave sums of chunks.

    It sums the gradient's values, or (LATER) the sums of chunks. A program takes COLUMNS columns, or all of them if the
    history has one value a row: then, unless the row fits COLUMNS (ONE_PASS), a first pass is for the mean of squares.
    Operands and the index of their settings are arguments, or for several weights in ``records``.
    """
    windows = 1 if ROW_WISE else (length - 1) // COLUMNS + 1  # length + COLUMNS could overflow 32 bits; likewise below
    tile = (tl.program_id(0) // windows).to(tl.int64)
    left = tl.program_id(0) % windows * COLUMNS
    if LATER:
        position, row = find_long_run(ids, count, tile)
        head = position >= 0
        whole = head
    else:
        position, row, head, whole, slot = find_chunks(ids, count, tile, TILE)
    # A halted call counts as having no rows: tested here, not by a return at the top, so that no load waits for it.
    head = head & (row >= 0) & (row < tl.where(halted(skip, found_inf), 0, rows))
    if tl.max(head.to(tl.int32), axis=0) == 0:
        return
    whole = head & whole
    if records is not None:
        record = find_operands(records, weights, row, TILE)
        weight, values = operand(record, WEIGHT, ALIGNED), operand(record + 1, GRAD, ALIGNED)
        history, master = operand(record + 2, COMPUTE, ALIGNED and not ROW_WISE), operand(record + 3, COMPUTE, ALIGNED)
        index = tl.load(record + 4)
    source = sums if LATER else values
    row_start = row.to(tl.int64)[:, None] * length
    rescale, clip, wd = gradient_scalars(table, index, COMPUTE)
    lr, decoupled_wd, eps_inside, eps_outside = step_scalars(table, index, COMPUTE)

    if ROW_WISE:
        h = tl.load(history + row[:, None], mask=whole[:, None], other=0.0)
        lanes = tl.zeros([TILE, LANES], COMPUTE)
    if ROW_WISE and not ONE_PASS:
        for k in range((length - 1) // COLUMNS + 1):
            column = k * COLUMNS + tl.arange(0, COLUMNS)
            mask = whole[:, None] & (column < length)[None, :]
            w = read_weight(weight, master, row_start + column[None, :], mask, COMPUTE, HAS_MASTER)
            g = add_up(source, order, ids, count, position, row, whole, column, length, COMPUTE, LATER, UNROLL)
            g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
            lanes = add_to_lanes(lanes, tl.where(mask, g * g, 0.0), TILE, COLUMNS)
        h = add_mean(history, row[:, None], h, lanes, length, whole[:, None], TILE)

    for k in range((length - 1) // COLUMNS + 1 if ROW_WISE and not ONE_PASS else 1):
        column = left + k * COLUMNS + tl.arange(0, COLUMNS)
        at = row_start + column[None, :]
        mask = whole[:, None] & (column < length)[None, :]
        w = read_weight(weight, master, at, mask, COMPUTE, HAS_MASTER)
        if not ROW_WISE:
            h = tl.load(history + at, mask=mask)
        g = add_up(source, order, ids, count, position, row, head, column, length, COMPUTE, LATER, UNROLL)
        if not LATER:
            partial = (head & ~whole)[:, None] & (column < length)[None, :]
            tl.store(sums + slot[:, None] * length + column[None, :], g, mask=partial)
        g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
        if ROW_WISE and ONE_PASS:
            lanes = add_to_lanes(lanes, tl.where(mask, g * g, 0.0), TILE, COLUMNS)
            h = add_mean(history, row[:, None], h, lanes, length, whole[:, None], TILE)
        if not ROW_WISE:
            h = h + g * g
            tl.store(history + at, h, mask=mask)
        w = new_weight(w, g, h, lr, decoupled_wd, eps_inside, eps_outside)
        write_weight(weight, master, at, w, mask, WEIGHT, HAS_MASTER)
