"""Row ids on CUDA: checked, copied to the keys of a sort, and sorted where they are few."""

from __future__ import annotations

import triton
import triton.language as tl

from adagrad.kernels.cuda.dense import find_record

LOWEST = tl.constexpr(-(2**63) + 1)
"""The lowest row id that is reported as it is: the one below it means that there is no report."""


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
    """As :func:`check_ids`, for all weights, one after the other, with rows numbered consecutively."""
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


@triton.jit(do_not_specialize=["count"])
def sort_keys(keys: tl.tensor, ids: tl.tensor, order: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr,
              OTHERS: tl.constexpr) -> None:  # fmt: skip
    """Sort few keys stably: each goes to the place that is the number of keys before it.

    A program compares BLOCK keys with all, 4 OTHERS at a time (a multiple of BLOCK). For some thousands the device
    takes less time than the launches of a sort take the host. ``order`` gets the positions that the keys had.
    """
    begin = tl.program_id(0) * BLOCK
    position = begin + tl.arange(0, BLOCK)
    own = tl.load(keys + position, mask=position < count, other=0)
    key = own[:, None]
    lane = tl.arange(0, OTHERS)
    before = tl.zeros([BLOCK, OTHERS], tl.int32)
    among = begin // (4 * OTHERS) * (4 * OTHERS)
    for left in range(0, among, 4 * OTHERS):
        # All loads before the first comparison, here and below: only then are all of them in flight at once.
        at = keys + left + lane
        a, b, c, d = tl.load(at), tl.load(at + OTHERS), tl.load(at + 2 * OTHERS), tl.load(at + 3 * OTHERS)
        before += (a[None, :] <= key).to(tl.int32)
        before += (b[None, :] <= key).to(tl.int32)
        before += (c[None, :] <= key).to(tl.int32)
        before += (d[None, :] <= key).to(tl.int32)
    for k in tl.static_range(4):
        other = among + k * OTHERS + lane
        theirs = tl.load(keys + other, mask=other < count, other=0)[None, :]
        earlier = (theirs < key) | ((theirs == key) & (other[None, :] < position[:, None]))
        before += (earlier & (other < count)[None, :]).to(tl.int32)
    HIGHEST: tl.constexpr = 0x7FFFFFFF if keys.dtype.element_ty == tl.int32 else 0x7FFFFFFFFFFFFFFF  # no key is higher
    for right in range(among + 4 * OTHERS, count, 4 * OTHERS):
        at = right + lane
        a = tl.load(keys + at, mask=at < count, other=HIGHEST)
        b = tl.load(keys + at + OTHERS, mask=at + OTHERS < count, other=HIGHEST)
        c = tl.load(keys + at + 2 * OTHERS, mask=at + 2 * OTHERS < count, other=HIGHEST)
        d = tl.load(keys + at + 3 * OTHERS, mask=at + 3 * OTHERS < count, other=HIGHEST)
        before += (a[None, :] < key).to(tl.int32)
        before += (b[None, :] < key).to(tl.int32)
        before += (c[None, :] < key).to(tl.int32)
        before += (d[None, :] < key).to(tl.int32)
    place = tl.sum(before, axis=1)
    tl.store(ids + place, own, mask=position < count)
    tl.store(order + place, position.to(tl.int64), mask=position < count)
