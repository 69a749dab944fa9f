"""Launching row-sparse updates on CUDA: those of one form together, with one sort of all row ids.

Several weights are treated as one: their rows are numbered consecutively across weights, and so are the occurrences.
Kernels read what they must know of each weight from a table of 64-bit words in device memory::

    first blocks   one word a weight, ascending: the number of blocks of ids of the weights before it
    of the ids     RECORD words a weight: the address of its ids, their bits; how many; the weight's rows; the number of
                   its first row and of its first occurrence
    first rows     one word a weight, ascending: the number of its first row
    operands       RECORD words a weight: addresses of weight, values, history and master copy (0 for none), moved back
                   so that rows and occurrences count from those of the first weight; the index of its settings
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from adagrad.arrays import row_length, tensor_format
from adagrad.kernels.cuda.dense import RECORD, each
from adagrad.kernels.cuda.launch import Kernel, form_and_words
from adagrad.kernels.cuda.row_ids import check_ids, check_ids_of_all, sort_keys
from adagrad.kernels.cuda.row_search import SHORT
from adagrad.kernels.cuda.rows import update_runs
from adagrad.kernels.cuda.rule import LANES, TRITON_DTYPE
from adagrad.kernels.inspection.table import CODES_PER_DEVICE, code_of_formats, decode
from adagrad.kernels.records import (
    ARE_LONG,
    BASE,
    ENTRIES,
    FACTS,
    GRAD,
    HEIGHT,
    HISTORY,
    IDS,
    LENGTH,
    MASTER,
    STRIDE,
    WEIGHT,
)

if TYPE_CHECKING:
    from torch import Tensor

    from adagrad.rule import Rule

BLOCK = 1024
"""Row ids that one program checks."""

FEW = 8192
"""The most row ids that :func:`adagrad.kernels.cuda.row_ids.sort_keys` sorts, with SORT_BLOCK of them in a program.
PyTorch's sort takes 14 launches: 110 to 150 us of the host's time beside an H200, 40 of the device's."""

SORT_BLOCK = 16

ELEMENTS = 512
"""Elements in the tile of a program, which is one warp: its parts never wait for each other, and each thread has four
16-byte accesses in flight for each operand."""


class RowUpdates(NamedTuple):
    """Row-sparse updates on one device, for any number of weights."""

    facts: np.ndarray
    """(n, FACTS) words, see :mod:`adagrad.kernels.records`."""
    codes: list[int]
    """One for each, which :func:`adagrad.kernels.inspection.table.decode` decodes."""
    lrs: list[float | Tensor]
    """Numbers, or 0-d float32 or float64 tensors on the device: one for each, or one for all."""
    wds: list[float]
    tensors: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]
    """Weight, indices, values, history and master copy of each, all contiguous."""

    def rates(self) -> tuple[list[float | Tensor], list[float]]:
        """lr and wd of each."""
        return each(self.lrs, len(self.facts)), each(self.wds, len(self.facts))


def concatenate(updates: Sequence[RowUpdates]) -> RowUpdates | None:
    """All updates as one; None if there are none."""
    if len(updates) < 2:
        return updates[0] if updates else None
    return RowUpdates(
        np.concatenate([u.facts for u in updates]),
        [code for u in updates for code in u.codes],
        [lr for u in updates for lr in each(u.lrs, len(u.facts))],
        [wd for u in updates for wd in each(u.wds, len(u.facts))],
        [tensors for u in updates for tensors in u.tensors],
    )


def of_tensors(weight: Tensor, indices: Tensor, values: Tensor, history: Tensor, master: Tensor | None,
               lr: float | Tensor, wd: float, rule: Rule) -> RowUpdates:  # fmt: skip
    """An update of contiguous tensors of any class."""
    length = row_length(weight.shape)
    facts = np.zeros((1, FACTS), np.int64)
    facts[0, ENTRIES], facts[0, LENGTH], facts[0, HEIGHT] = indices.numel(), length, weight.shape[0]
    facts[0, ARE_LONG] = indices.dtype == torch.int64
    for k, tensor in ((WEIGHT, weight), (GRAD, values), (HISTORY, history), (MASTER, master), (IDS, indices)):
        if tensor is not None:
            facts[0, BASE + k] = tensor.data_ptr()
            if k != IDS:
                facts[0, STRIDE + k] = tensor.itemsize * (1 if k == HISTORY and rule.row_wise else length)
    code = code_of_formats(tensor_format(weight), tensor_format(values), has_master=master is not None)
    return RowUpdates(facts, [code], [lr], [wd], [(weight, indices, values, history, master)])


class Form(NamedTuple):
    """What updates must have in common to be launched together."""

    code: int
    length: int
    """Elements of a row."""
    row_wise: bool
    """Whether the history has one value for each row of several elements."""


class Launch(NamedTuple):
    """Updates of one form, their ids checked and sorted, with the memory that they need."""

    form: Form
    first: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
    """Weight, indices, values, history and master copy of the first update."""
    settings: int
    """The index of the first update in the table of settings."""
    ids: Tensor
    order: Tensor
    rows: int
    """The number of rows of all weights."""
    weights: int
    records: Tensor | None
    """The table of several weights, in device memory."""
    are_aligned: bool
    sums: Tensor
    """(windows, n, columns): slots for the sums of chunks of long runs, see :mod:`adagrad.kernels.cuda.row_sums`."""


def by_form(updates: RowUpdates, rule: Rule) -> dict[Form, list[int]]:
    """The positions of the updates that have ids, by form."""
    found: dict[tuple[int, int], list[int]] = {}
    entries, lengths = updates.facts[:, ENTRIES].tolist(), updates.facts[:, LENGTH].tolist()
    for i, code in enumerate(updates.codes):
        if entries[i]:
            found.setdefault((code % CODES_PER_DEVICE, lengths[i]), []).append(i)
    # In rows of one element the mean of squares is the square.
    return {Form(*kind, rule.row_wise and kind[1] > 1): which for kind, which in found.items()}


def sort_ids(updates: RowUpdates, form: Form, which: Sequence[int], index: int, skip: Tensor, report: Tensor,
             table: Callable[[Any, Callable[[], Plan]], tuple[Tensor, Plan]]) -> Launch:  # fmt: skip
    """Check the row ids of the updates ``which``, all of one form, and sort them stably, in ascending order.

    ``index`` is that of the settings of the first of all ``updates``; ``table`` returns, for a key, the plan that a
    function makes, and the plan's words in device memory.
    """
    first, facts = updates.tensors[which[0]], updates.facts
    records, are_aligned = None, False
    if len(which) == 1:
        count, rows = int(facts[which[0], ENTRIES]), int(facts[which[0], HEIGHT])
    else:
        facts = facts if len(which) == len(facts) else facts[which]
        key = facts.tobytes(), which, index, form.row_wise
        records, found = table(key, lambda: plan(facts, np.array(which) + index, form.row_wise))
        count, rows, are_aligned = found.entries, found.rows, found.are_aligned
    # 32-bit keys sort in two thirds of the time.
    keys = torch.empty(count, dtype=torch.int32 if rows < 2**31 else torch.int64, device=skip.device)
    if records is None:
        _CHECK.launch(-(-count // BLOCK), first[1], keys, count, rows, skip, report)
    else:
        _CHECK_ALL.launch(found.blocks, records, len(which), keys, skip, report)
    ids, order = sort(keys)
    columns = chunk_columns(form.length)
    sums = first[3].new_empty((-(-form.length // columns), slots(count), columns))
    return Launch(form, first, index + which[0], ids, order, rows, len(which), records, are_aligned, sums)


def sort(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The keys in ascending order, and where each was; equal ones keep their order."""
    count = keys.numel()  # len() would be a call in Python
    if count > FEW:
        return torch.sort(keys, stable=True)
    ids, order = torch.empty_like(keys), torch.empty_like(keys, dtype=torch.int64)
    _SORT.launch(-(-count // SORT_BLOCK), keys, ids, order, count)
    return ids, order


def slots(count: int) -> int:
    """The number of slots for sums of chunks: 2 for every SHORT sorted positions; 0 if there can be no long run."""
    return 2 * -(-count // SHORT.value) if count > SHORT.value else 0


_CHECK = Kernel(check_ids, 4, BLOCK=BLOCK)
_CHECK_ALL = Kernel(check_ids_of_all, 4, BLOCK=BLOCK)
_SORT = Kernel(sort_keys, 4, BLOCK=SORT_BLOCK, OTHERS=128)


class Plan(NamedTuple):
    """What several updates of one form, and only these, make necessary."""

    words: np.ndarray
    """Their table."""
    blocks: int
    """Of row ids."""
    entries: int
    rows: int
    are_aligned: bool
    """Whether all rows begin at multiples of 16 bytes."""


def plan(facts: np.ndarray, settings: np.ndarray, row_wise: bool) -> Plan:
    """The plan for updates of one form."""
    n, counts, heights = len(facts), facts[:, ENTRIES], facts[:, HEIGHT]
    first_rows, first_entries, blocks = np.cumsum(heights) - heights, np.cumsum(counts) - counts, -(-counts // BLOCK)
    ids, operands = np.zeros((2, n, RECORD.value), np.int64)
    bits = np.where(facts[:, ARE_LONG], 64, 32)
    ids[:, :6] = np.column_stack([facts[:, BASE + IDS], bits, counts, heights, first_rows, first_entries])
    addresses, steps = (facts[:, [at + k for k in (WEIGHT, GRAD, HISTORY, MASTER)]] for at in (BASE, STRIDE))
    before = np.column_stack([first_rows, first_entries, first_rows, first_rows])
    operands[:, :4], operands[:, 4] = addresses - before * steps, settings
    # A history with one value a row is read one element at a time, so its alignment does not matter.
    whole = [0, 1, 3] if row_wise else [0, 1, 2, 3]
    are_aligned = not ((addresses | steps)[:, whole] % 16).any()
    words = np.concatenate([np.cumsum(blocks) - blocks, ids.ravel(), first_rows, operands.ravel()])
    return Plan(words, int(blocks.sum()), int(counts.sum()), int(heights.sum()), are_aligned)


def chunk_columns(length: int) -> int:
    """How many columns of a chunk a program sums: at a constant distance, the slots of one need little arithmetic."""
    return min(1 << (length - 1).bit_length(), 64)


class Kernels(NamedTuple):
    """The kernels that update rows of one form, and how many programs share a row."""

    short: Kernel
    tile: int
    """Sorted positions that a program of ``short`` takes."""
    windows: int
    long: Kernel
    long_windows: int


@functools.lru_cache(maxsize=256)
def _kernels(form: Form, are_aligned: bool) -> Kernels:
    _, (weight, values, history, master) = decode(form.code)
    columns, of_chunk = min(1 << (form.length - 1).bit_length(), 128), chunk_columns(form.length)
    if form.row_wise:
        columns = max(columns, LANES.value)
    long_columns = columns if form.row_wise else of_chunk
    constants: dict[str, Any] = {
        "WEIGHT": TRITON_DTYPE[weight], "GRAD": TRITON_DTYPE[values], "COMPUTE": TRITON_DTYPE[history],
        "HAS_MASTER": master is not None, "ALIGNED": are_aligned, "ROW_WISE": form.row_wise,
        "CHUNK_COLUMNS": of_chunk, "FACTOR": math.gcd(form.length, 16),
    }  # fmt: skip
    tile = min(ELEMENTS // columns, 64)

    def kernel(long: bool, tile: int, columns: int) -> tuple[Kernel, int]:
        fits = form.length <= columns
        found = Kernel(update_runs, 1, LONG=long, TILE=tile, COLUMNS=columns, ONE_PASS=fits, **constants)
        return found, 1 if form.row_wise else -(-form.length // columns)

    (short, windows), (long, long_windows) = kernel(False, tile, columns), kernel(True, 1, long_columns)
    return Kernels(short, tile, windows, long, long_windows)


def bind(launch: Launch, table: Tensor, grad_scale: Tensor | None, skip: Tensor | None, found_inf: Tensor | None
         ) -> list[Callable[[], object]]:  # fmt: skip
    """What launches the kernels that update the rows, in order, with the settings in ``table``."""
    form, first, settings, ids, order, rows, weights, records, are_aligned, sums = launch
    if not form.length or not rows:
        return []
    count = ids.numel()
    weight, _, values, history, master = first
    alone = values, sums, weight, history, master, None
    operands = alone if records is None else (None, sums, None, None, None, records)
    kernels = _kernels(form, are_aligned)
    chunk_windows, slots, _ = sums.shape
    # The same for both kernels: finding out about so many arguments takes longer than launching one.
    arguments = (ids, order, *operands, weights, table, settings, count, rows, form.length, slots, grad_scale, skip,
                 found_inf)  # fmt: skip
    known = form_and_words(arguments)
    programs = -(-count // kernels.tile) * kernels.windows + slots * chunk_windows
    short = kernels.short.bind_known(programs, arguments, *known)
    if not slots:
        return [short]
    return [short, kernels.long.bind_known(slots // 2 * kernels.long_windows, arguments, *known)]
