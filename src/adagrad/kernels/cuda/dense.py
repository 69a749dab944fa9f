"""Dense updates on CUDA: any number of tensors in one launch.

The kernels find their tensors through a table of addresses in device memory. A launch is for the tensors of one format
(dtypes, master copy or not, alignment, tile of rows); its part of the table of 64-bit words is

    first blocks   one word a tensor, ascending: the number of blocks of the tensors before it
    records        RECORD words a tensor: addresses of weight, gradient, history, master copy (0 for none); elements, or
                   rows if the history has one value a row; elements in a row (else 1); the index of its settings; 0

A program does one block: BLOCK consecutive elements, or ROWS consecutive rows. See :mod:`adagrad.kernels.cuda.rule`
for the table of settings and for the arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from adagrad.arrays import row_length, tensor_format
from adagrad.kernels.cuda.launch import Kernel
from adagrad.kernels.cuda.rule import (
    LANES,
    TRITON_DTYPE,
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
from adagrad.kernels.inspection.table import code_of_formats, decode
from adagrad.kernels.records import ROW_LENGTH, SIZE

if TYPE_CHECKING:
    from adagrad.rule import Rule

RECORD = tl.constexpr(8)
SEARCH = tl.constexpr(256)
"""First blocks that a program compares at once: one load finds its tensor among so many."""

BLOCK = 1024
"""Elements per program: with 4 warps each thread has 2 (float32) 16-byte accesses in flight for each operand. Larger
blocks need more registers, so that fewer programs run at a time: on an H200, 2048 are 3% slower, 512 of bfloat16 5%."""

ROW_TILES = ((16, 32), (32, 16), (64, 8), (128, 4))
"""(columns, rows) of a row-wise program's tile: rows that fit one take one pass, longer ones two, tile by tile."""


@triton.jit
def find_record(table: tl.tensor, firsts: tl.tensor, records: tl.tensor, tensors: tl.tensor) -> tuple[tl.tensor, ...]:
    """A pointer to the record of this program's tensor, and which of that tensor's blocks is this program's.

    ``firsts`` and ``records`` are offsets in ``table``, in words; ``tensors`` is the number of tensors.
    """
    program = tl.program_id(0).to(tl.int64)
    begun = 0
    for k in range(0, tensors, SEARCH):
        index = k + tl.arange(0, SEARCH)
        first = tl.load(table + firsts + index, mask=index < tensors, other=0x7FFFFFFFFFFFFFFF)
        begun += tl.sum((first <= program).to(tl.int32))
    first = tl.load(table + firsts + begun - 1)
    return table + records + (begun - 1) * RECORD, program - first


@triton.jit
def pointer(word: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The address at ``word`` as a pointer; ALIGNED promises a multiple of 16 bytes.

    16-bit types hint at 8 bytes, so that a thread has the same 4 elements of every operand.
    """
    address = tl.load(word).to(tl.pointer_type(TYPE))
    BITS: tl.constexpr = address.dtype.element_ty.primitive_bitwidth
    if ALIGNED:
        address = tl.multiple_of(address, 8 if BITS == 16 else 16)
    return address


@triton.jit
def update_block(weight: tl.tensor, grad: tl.tensor, history: tl.tensor, master: tl.tensor, offsets: tl.tensor,
                 mask: tl.tensor, grad_scale: tl.tensor, rescale: tl.tensor, clip: tl.tensor, wd: tl.tensor,
                 lr: tl.tensor, decoupled_wd: tl.tensor, eps_inside: tl.tensor, eps_outside: tl.tensor,
                 WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, HAS_MASTER: tl.constexpr) -> None:  # fmt: skip
    """Update the elements at ``offsets`` of the four pointers.

    Elements that are not there are read as 1: the root and the quotient of 0 are special cases, each of which would
    hold up the whole warp.
    """
    OTHER: tl.constexpr = None if mask is None else 1.0
    w = read_weight(weight, master, offsets, mask, COMPUTE, HAS_MASTER)
    g = widen(tl.load(grad + offsets, mask=mask, other=OTHER), COMPUTE)
    h = tl.load(history + offsets, mask=mask, other=OTHER)
    g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
    h = h + g * g
    w = new_weight(w, g, h, lr, decoupled_wd, eps_inside, eps_outside)
    tl.store(history + offsets, h, mask=mask)
    write_weight(weight, master, offsets, w, mask, WEIGHT, HAS_MASTER)


@triton.jit(do_not_specialize=["firsts", "records", "tensors"])
def update_elements(addresses: tl.tensor, firsts: tl.tensor, records: tl.tensor, tensors: tl.tensor, table: tl.tensor,
                    grad_scale: tl.tensor, skip: tl.tensor, found_inf: tl.tensor, WEIGHT: tl.constexpr,
                    GRAD: tl.constexpr, COMPUTE: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr,
                    BLOCK: tl.constexpr) -> None:  # fmt: skip
    """Update one block of elements; the history has the weight's shape."""
    if halted(skip, found_inf):
        return
    record, block = find_record(addresses, firsts, records, tensors)
    start = block * BLOCK
    weight = pointer(record, WEIGHT, ALIGNED) + start
    grad = pointer(record + 1, GRAD, ALIGNED) + start
    history = pointer(record + 2, COMPUTE, ALIGNED) + start
    master = pointer(record + 3, COMPUTE, ALIGNED) + start
    left = tl.load(record + 4) - start
    index = tl.load(record + 6)
    rescale, clip, wd = gradient_scalars(table, index, COMPUTE)
    lr, decoupled_wd, eps_inside, eps_outside = step_scalars(table, index, COMPUTE)
    offsets = tl.arange(0, BLOCK)
    # Whole blocks need no mask: under a mask of unknown length no access is 16 bytes wide.
    if left >= BLOCK:
        update_block(weight, grad, history, master, offsets, None, grad_scale, rescale, clip, wd, lr, decoupled_wd,
                     eps_inside, eps_outside, WEIGHT, COMPUTE, HAS_MASTER)  # fmt: skip
    else:
        update_block(weight, grad, history, master, offsets, offsets < left, grad_scale, rescale, clip, wd, lr,
                     decoupled_wd, eps_inside, eps_outside, WEIGHT, COMPUTE, HAS_MASTER)  # fmt: skip


@triton.jit(do_not_specialize=["firsts", "records", "tensors"])
def update_rows(addresses: tl.tensor, firsts: tl.tensor, records: tl.tensor, tensors: tl.tensor, table: tl.tensor,
                grad_scale: tl.tensor, skip: tl.tensor, found_inf: tl.tensor, WEIGHT: tl.constexpr,
                GRAD: tl.constexpr, COMPUTE: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr,
                COLUMNS: tl.constexpr, ROWS: tl.constexpr, ONE_PASS: tl.constexpr) -> None:  # fmt: skip
    """Update one block of rows with one history value each.

    Rows longer than COLUMNS take a pass for the mean of squares, then one for the weight.
    """
    if halted(skip, found_inf):
        return
    record, block = find_record(addresses, firsts, records, tensors)
    length = tl.load(record + 5)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    start = block * ROWS
    weight = pointer(record, WEIGHT, ALIGNED) + start * length
    grad = pointer(record + 1, GRAD, ALIGNED) + start * length
    history = pointer(record + 2, COMPUTE, ALIGNED) + start
    master = pointer(record + 3, COMPUTE, ALIGNED) + start * length
    index = tl.load(record + 6)
    rescale, clip, wd = gradient_scalars(table, index, COMPUTE)
    lr, decoupled_wd, eps_inside, eps_outside = step_scalars(table, index, COMPUTE)
    row = tl.arange(0, ROWS)[:, None]
    present = row < tl.load(record + 4) - start
    column = tl.arange(0, COLUMNS)[None, :]

    h = tl.load(history + row, mask=present, other=1.0)  # 1, as in update_block
    lanes = tl.zeros([ROWS, LANES], COMPUTE)
    if not ONE_PASS:
        for left in range(0, length, COLUMNS):
            at = row * length + left + column
            mask = present & (left + column < length)
            w = read_weight(weight, master, at, mask, COMPUTE, HAS_MASTER)
            g = widen(tl.load(grad + at, mask=mask), COMPUTE)
            g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
            lanes = add_to_lanes(lanes, tl.where(mask, g * g, 0.0), ROWS, COLUMNS)
        h = add_mean(history, row, h, lanes, length, present, ROWS)

    for left in range(0, COLUMNS if ONE_PASS else length, COLUMNS):
        at = row * length + left + column
        mask = present & (left + column < length)
        w = read_weight(weight, master, at, mask, COMPUTE, HAS_MASTER)
        g = widen(tl.load(grad + at, mask=mask, other=1.0), COMPUTE)
        g = effective_gradient(g, w, grad_scale, rescale, clip, wd)
        if ONE_PASS:
            lanes = add_to_lanes(lanes, tl.where(mask, g * g, 0.0), ROWS, COLUMNS)
            h = add_mean(history, row, h, lanes, length, present, ROWS)
        w = new_weight(w, g, h, lr, decoupled_wd, eps_inside, eps_outside)
        write_weight(weight, master, at, w, mask, WEIGHT, HAS_MASTER)


class Launch(NamedTuple):
    """The launch for the tensors of one format; ``firsts`` and ``records`` are offsets in the table, in words."""

    kernel: Kernel
    programs: int
    firsts: int
    records: int
    tensors: int


class DenseUpdates(NamedTuple):
    """Dense updates on one device, for any number of tensors."""

    rows: np.ndarray
    """(n, COLUMNS) words: addresses, elements, a row's length or 0, see :mod:`adagrad.kernels.records`."""
    codes: np.ndarray
    """(n,) integers, which :func:`adagrad.kernels.inspection.table.decode` decodes."""
    lrs: list[float | Tensor]
    """Numbers, or 0-d float32 or float64 tensors on the device: one for each, or one for all."""
    wds: list[float]
    tensors: list[Any]
    """The tensors at the addresses, or what holds them: kept alive until the kernels are launched."""

    @property
    def share_rates(self) -> bool:
        return len(self.lrs) == len(self.wds) == 1

    def rates(self) -> tuple[list[float | Tensor], list[float]]:
        """lr and wd of each, or a single entry of both if all share them."""
        n = 1 if self.share_rates else len(self.rows)
        return each(self.lrs, n), each(self.wds, n)


def each(values: list[Any], n: int) -> list[Any]:
    """``n`` entries: ``values``, or its only entry repeated."""
    return values * n if len(values) == 1 else values


def concatenate(updates: Sequence[DenseUpdates]) -> DenseUpdates | None:
    """All updates as one; None if there are none."""
    if len(updates) < 2:
        return updates[0] if updates else None
    return DenseUpdates(
        np.concatenate([u.rows for u in updates]),
        np.concatenate([u.codes for u in updates]),
        [lr for u in updates for lr in each(u.lrs, len(u.rows))],
        [wd for u in updates for wd in each(u.wds, len(u.rows))],
        [tensor for u in updates for tensor in u.tensors],
    )


def of_tensors(weight: Tensor, grad: Tensor, history: Tensor, master: Tensor | None, lr: float | Tensor, wd: float,
               rule: Rule) -> DenseUpdates:  # fmt: skip
    """An update of contiguous tensors of any class, checked by :func:`adagrad.kernels.validate.validate`."""
    tensors = weight, grad, history, master
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    length = row_length(weight.shape) if rule.row_wise else 0
    code = code_of_formats(tensor_format(weight), tensor_format(grad), has_master=master is not None)
    rows = np.array([[*addresses, weight.numel(), length]], np.int64)
    return DenseUpdates(rows, np.array([code], np.int64), [lr], [wd], [*tensors])


def plan(updates: DenseUpdates) -> tuple[np.ndarray, list[Launch]]:
    """The table of addresses, 64-bit words, and the launches that read it. Empty tensors are left out.

    It depends on ``rows``, ``codes`` and ``share_rates`` alone.
    """
    rows = updates.rows
    addresses, sizes, lengths = rows[:, :SIZE], rows[:, SIZE], np.maximum(rows[:, ROW_LENGTH], 1)
    is_aligned = (addresses % 16 == 0).all(axis=1) & ((lengths == 1) | (lengths % 16 == 0))
    # In rows of one element the mean of squares is the square: the same as with a history of the weight's shape.
    tiles = np.where(lengths == 1, 0, 1 + np.searchsorted(_WIDTHS, lengths))
    forms = np.stack([updates.codes, is_aligned, tiles])
    index = np.zeros_like(sizes) if updates.share_rates else np.arange(len(sizes))
    records = np.column_stack([addresses, sizes // lengths, lengths, index, np.zeros_like(sizes)])

    words: list[np.ndarray] = []
    launches = []
    position = 0
    for form in dict.fromkeys(zip(*forms[:, sizes > 0].tolist(), strict=True)):
        members = np.flatnonzero((sizes > 0) & (forms == np.array(form)[:, None]).all(axis=0))
        kernel, per_program = _kernel(*form)
        blocks = np.cumsum(-(-records[members, SIZE] // per_program))
        words += [np.append(0, blocks[:-1]), records[members].ravel()]
        launches.append(Launch(kernel, int(blocks[-1]), position, position + len(members), len(members)))
        position += len(members) * (1 + RECORD.value)
    return np.concatenate(words) if words else np.zeros(0, np.int64), launches


_WIDTHS = [columns for columns, _ in ROW_TILES]


@functools.lru_cache(maxsize=256)
def _kernel(code: int, is_aligned: int, tile: int) -> tuple[Kernel, int]:
    """The kernel for a format, and the elements or rows per program."""
    _, (weight, grad, computing, master) = decode(code)
    constants: dict[str, Any] = {
        "WEIGHT": TRITON_DTYPE[weight], "GRAD": TRITON_DTYPE[grad], "COMPUTE": TRITON_DTYPE[computing],
        "HAS_MASTER": master is not None, "ALIGNED": bool(is_aligned),
    }  # fmt: skip
    if tile == 0:
        block = BLOCK // 2 if computing == "float64" else BLOCK
        return Kernel(update_elements, 4, BLOCK=block, **constants), block
    one_pass = tile <= len(ROW_TILES)
    columns, rows = ROW_TILES[tile - 1] if one_pass else ROW_TILES[-1]
    warps = 1 if one_pass else 4  # as measured on an H200
    return Kernel(update_rows, warps, COLUMNS=columns, ROWS=rows, ONE_PASS=one_pass, **constants), rows


def bind(launch: Launch, addresses: Tensor, table: Tensor, grad_scale: Tensor | None, skip: Tensor | None,
         found_inf: Tensor | None) -> Callable[[], object]:  # fmt: skip
    """What launches a kernel over the tensors that ``addresses`` names, with the settings in ``table``."""
    kernel, programs, firsts, records, tensors = launch
    return kernel.bind(programs, addresses, firsts, records, tensors, table, grad_scale, skip, found_inf)
