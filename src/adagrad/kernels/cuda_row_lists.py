"""Row-sparse updates on CUDA, as they are launched: those of one form together, with one sort of all row ids.

Several weights are one with all their rows, which are numbered on from weight to weight, and so are the occurrences.
What a kernel must know of each stands in a table of 64-bit words in device memory::

    first blocks   one word a weight, ascending: the number of blocks of ids of the weights before it
    of the ids     RECORD words a weight: the address of its ids, their bits; how many; the weight's rows; the number of
                   its first row and of its first occurrence
    first rows     one word a weight, ascending: the number of its first row
    operands       RECORD words a weight: addresses of weight, values, history and master copy (0 for none), moved back
                   so that rows and occurrences count from the first of all; the index of its settings
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from adagrad.arrays import tensor_format
from adagrad.kernels import cuda_rows
from adagrad.kernels.cuda_dense import RECORD
from adagrad.kernels.cuda_launch import Kernel
from adagrad.kernels.cuda_rows import CHUNK
from adagrad.kernels.cuda_rule import LANES, TRITON_DTYPE

if TYPE_CHECKING:
    from torch import Tensor

    from adagrad.kernels.cuda import RowUpdate
    from adagrad.rule import Rule

IDS = 1024
"""Row ids that one program checks."""

ELEMENTS = 1024
"""Elements in the tile of a program: enough bytes on their way, few enough registers."""


class Form(NamedTuple):
    """What updates must have in common to be launched together."""

    weight: str
    values: str
    history: str
    has_master: bool
    length: int
    """Of a row."""
    row_wise: bool
    """Whether the history has one value a row, of several elements."""

    @classmethod
    def of(cls, u: RowUpdate, rule: Rule) -> Form:
        rows = len(u.weight)
        # Rows of one have the mean for a sum.
        length = u.weight.numel() // rows if rows else 0
        formats = tensor_format(u.weight), tensor_format(u.values), tensor_format(u.history)
        return cls(*formats, u.master is not None, length, rule.row_wise and length > 1)


class Launch(NamedTuple):
    """Updates of one form, their ids checked and sorted."""

    form: Form
    updates: Sequence[RowUpdate]
    indices: Sequence[int]
    """Of their settings in the scalars' table."""
    ids: Tensor
    order: Tensor
    rows: int
    """Of all weights."""
    records: Tensor | None
    """The table of several weights, in device memory."""
    are_aligned: bool


def by_form(updates: Sequence[RowUpdate], rule: Rule) -> dict[Form, list[int]]:
    """The positions of the updates that have ids, those of one form together."""
    found: dict[Form, list[int]] = {}
    for i, u in enumerate(updates):
        if u.indices.numel():
            found.setdefault(Form.of(u, rule), []).append(i)
    return found


def sort_ids(form: Form, updates: Sequence[RowUpdate], indices: Sequence[int], skip: Tensor, report: Tensor,
             upload: Callable[[np.ndarray], Tensor]) -> Launch:  # fmt: skip
    """Check the row ids and sort them: in ascending order, equal ones in the order of their positions."""
    counts, heights = [u.indices.numel() for u in updates], [len(u.weight) for u in updates]
    count, rows = sum(counts), sum(heights)
    # 32-bit keys sort in two thirds of the time.
    keys = torch.empty(count, dtype=torch.int32 if rows < 2**31 else torch.int64, device=skip.device)
    records, are_aligned = None, False
    if len(updates) == 1:
        _CHECK.launch(-(-count // IDS), updates[0].indices, keys, count, rows, skip, report)
    else:
        words, are_aligned, blocks = plan(form, updates, indices, counts, heights)
        records = upload(words)
        _CHECK_ALL.launch(blocks, records, len(updates), keys, skip, report)
    ids, order = torch.sort(keys, stable=True)
    return Launch(form, updates, indices, ids, order, rows, records, are_aligned)


_CHECK, _CHECK_ALL = Kernel(cuda_rows.check_ids, 4, BLOCK=IDS), Kernel(cuda_rows.check_ids_of_all, 4, BLOCK=IDS)


def plan(form: Form, updates: Sequence[RowUpdate], indices: Sequence[int], counts: list[int], heights: list[int]
         ) -> tuple[np.ndarray, bool, int]:  # fmt: skip
    """The table, whether all rows begin at multiples of 16 bytes, and the blocks of ids."""
    n, length = len(updates), form.length
    (first_rows, first_entries), blocks = _before([heights, counts]), -(-np.array(counts) // IDS)
    words = np.zeros((2 + 2 * RECORD.value) * n, np.int64)
    words[:n] = np.cumsum(blocks) - blocks
    ids, operands = (words[at : at + RECORD.value * n].reshape(n, -1) for at in (n, (2 + RECORD.value) * n))
    ids[:, 0] = [u.indices.data_ptr() for u in updates]
    ids[:, 1] = [8 * u.indices.itemsize for u in updates]
    ids[:, 2:6] = np.column_stack([counts, heights, first_rows, first_entries])
    words[(1 + RECORD.value) * n : (2 + RECORD.value) * n] = first_rows
    tensors = [(u.weight, u.values, u.history, u.master) for u in updates]
    sizes = np.array([0 if t is None else t.itemsize for t in tensors[0]])
    steps = sizes * [length, length, 1 if form.row_wise else length, length]
    before = np.stack([first_rows, first_entries, first_rows, first_rows], axis=1)
    addresses = np.array([[0 if t is None else t.data_ptr() for t in each] for each in tensors])
    operands[:, :4], operands[:, 4] = addresses - before * steps, indices
    whole = [0, 1, 3] if form.row_wise else [0, 1, 2, 3]
    are_aligned = not (addresses[:, whole] % 16).any() and not (steps[whole] % 16).any()
    return words, are_aligned, int(blocks.sum())


def _before(numbers: list[list[int]]) -> np.ndarray:
    """Of each number, the sum of those before it in its list."""
    each = np.array(numbers)
    before: np.ndarray = np.cumsum(each, axis=1) - each
    return before


class Kernels(NamedTuple):
    """What updates rows of one form."""

    first: Kernel
    tile: int
    """Positions of a program of the first."""
    columns: int
    """Columns of it; a program does all, so many at a time, where the history has one value a row."""
    later: Kernel
    later_columns: int


@functools.lru_cache(maxsize=256)
def _kernels(form: Form, are_aligned: bool) -> Kernels:
    constants: dict[str, Any] = {
        "WEIGHT": TRITON_DTYPE[form.weight], "GRAD": TRITON_DTYPE[form.values], "COMPUTE": TRITON_DTYPE[form.history],
        "HAS_MASTER": form.has_master, "ALIGNED": are_aligned, "ROW_WISE": form.row_wise,
    }  # fmt: skip
    columns = min(1 << (form.length - 1).bit_length(), 128)
    if form.row_wise:
        columns = min(max(columns, LANES.value), 64)
    tile = min(ELEMENTS // columns, 64)
    later_columns = columns if form.row_wise else min(columns, 32)
    first = Kernel(cuda_rows.update_runs, max(1, tile * columns // 256), LATER=False, TILE=tile, COLUMNS=columns,
                   UNROLL=4, **constants)  # fmt: skip
    later = Kernel(cuda_rows.update_runs, 1, LATER=True, TILE=1, COLUMNS=later_columns, UNROLL=16, **constants)
    return Kernels(first, tile, columns, later, later_columns)


def run(launch: Launch, table: Tensor, grad_scale: Tensor | None, skip: Tensor | None, found_inf: Tensor | None
        ) -> None:  # fmt: skip
    """Launch the update of the rows, whose settings are in ``table``."""
    form, updates, indices, ids, order, rows, records, are_aligned = launch
    if not form.length:
        return
    count = len(ids)
    blocks = -(-count // CHUNK.value) if count > CHUNK.value else 0
    weight, _, values, history, master, _, _ = updates[0]
    sums = history.new_empty((2 * blocks, form.length))
    alone = (values, sums, weight, history, master, None, 0) if records is None else None
    operands = alone or (None, sums, None, None, None, records, len(updates))
    kernels = _kernels(form, are_aligned)

    def start(kernel: Kernel, programs: int, columns: int) -> None:
        windows = 1 if form.row_wise else -(-form.length // columns)
        kernel.launch(programs * windows, ids, order, *operands, table, indices[0], count, rows, form.length,
                      grad_scale, skip, found_inf)  # fmt: skip

    start(kernels.first, -(-count // kernels.tile), kernels.columns)
    if blocks:
        start(kernels.later, blocks, kernels.later_columns)
