"""Row-sparse updates on CUDA: each row present is updated once, with the sum of its occurrences.

Any number of weights of one form share the launches: their rows are numbered consecutively across weights, and if there
are several, kernels find operands and settings of each in a table (see :mod:`adagrad.kernels.cuda.row_launches`).

The row ids are sorted stably, so that a row's occurrences form a run, in their original order. Work is divided by
sorted position, not by row, so that no program waits for a frequent row. A short run, of at most SHORT occurrences, is
summed and applied by the program of the TILE positions among which it begins. A long one is cut into chunks of CHUNK
occurrences from its first: further programs of the same launch add up one chunk each and leave the sum in a slot (see
:mod:`adagrad.kernels.cuda.row_sums`), and another launch adds the sums in order and applies them. So however frequent a
row is, no program adds more than CHUNK occurrences, or one chunk sum per CHUNK occurrences, in sequence; and a row's
bits depend on its own values alone: the additions are those of :func:`adagrad.rule.sum_duplicates`. Nothing comes back
to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adagrad.kernels.cuda.row_search import (
    CHUNK,
    SHORT,
    find_heads,
    find_long_run,
    find_operands,
    first_position,
    operand,
)
from adagrad.kernels.cuda.row_sums import add_up, sum_chunk
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
    write_weight,
)


@triton.jit(do_not_specialize=["weights", "index", "count", "rows", "slots"])
def update_runs(ids: tl.tensor, order: tl.tensor, values: tl.tensor, sums: tl.tensor, weight: tl.tensor,
                history: tl.tensor, master: tl.tensor, records: tl.tensor, weights: tl.tensor, table: tl.tensor,
                index: tl.tensor, count: tl.tensor, rows: tl.tensor, length: tl.tensor, slots: tl.tensor,
                grad_scale: tl.tensor, skip: tl.tensor, found_inf: tl.tensor, WEIGHT: tl.constexpr,
                GRAD: tl.constexpr, COMPUTE: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr,
                ROW_WISE: tl.constexpr, ONE_PASS: tl.constexpr, LONG: tl.constexpr, TILE: tl.constexpr,
                COLUMNS: tl.constexpr, CHUNK_COLUMNS: tl.constexpr, FACTOR: tl.constexpr) -> None:  # fmt: skip
    """Sum the values of the runs that begin in a tile of positions and update their rows.

    It takes short runs among TILE positions, or adds the sums of chunks of the LONG run that begins among SHORT ones.
    A program takes COLUMNS columns, or all of them if the history has one value a row: then, unless the row fits
    COLUMNS (ONE_PASS), a first pass is for the mean of squares. Operands and the index of their settings are arguments,
    or for several weights in ``records``. Of the launch for short runs, the programs after those of the tiles fill the
    ``slots`` with the sums of chunks, CHUNK_COLUMNS columns each. The length is a multiple of FACTOR.

    Elements that are not there are read as 1: the root and the quotient of 0 are special cases, each of which would
    hold up the whole warp.
    """
    # Changes nothing, but tells the compiler of FACTOR, so that it makes accesses as wide as the alignment allows.
    length = length // FACTOR * FACTOR
    windows = 1 if ROW_WISE or ONE_PASS else (length - 1) // COLUMNS + 1  # length + COLUMNS could overflow 32 bits
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
        h = tl.load(history + row[:, None], mask=head[:, None], other=1.0)
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
            h = tl.load(history + at, mask=mask, other=1.0)
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
