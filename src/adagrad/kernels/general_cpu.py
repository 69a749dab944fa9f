"""Updates on the CPU that compiled code has not found plain: any strides, byte order, alignment and array class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from adagrad.arrays import operand, row_length
from adagrad.kernels.batch import Job
from adagrad.kernels.cpu import dense as cpu_dense, rows as cpu_rows, strided
from adagrad.kernels.cpu.row_groups import MAX_OCCURRENCES, checked_rows
from adagrad.kernels.cpu.rule import rate_table
from adagrad.kernels.expressions import by_expression
from adagrad.kernels.inspection.table import Formats
from adagrad.kernels.records import ARE_LONG, BASE, CHECKED_IDS, ENTRIES, FACTS, HEIGHT, IDS, LENGTH, STRIDE
from adagrad.kernels.validate import Update, host_indices
from adagrad.rule import Rule, is_torch


def formats(u: Update) -> Formats:
    return u.weight.format, u.grad.format, u.history.format, None if u.master is None else u.master.format


def fits_table(u: Update) -> bool:
    """Whether a dense update can be a row of an address table as it is."""
    return all(o is None or o.is_addressable for o in (u.weight, u.grad, u.history, u.master))


def by_table(
    updates: Sequence[Update], lrs: Sequence[float], wds: Sequence[float], rule: Rule, threads: int | None
) -> Job:
    """The job that carries out dense updates of the same formats, in one launch."""
    table = np.array([cpu_dense.table_row(rule, *_memories(u)) for u in updates])
    total = sum(math.prod(u.weight.shape) for u in updates)
    cpu_dense.kernel(*formats(updates[0]), rule.row_wise)  # compiled now, before anything changes

    def run() -> None:
        rates = rate_table(lrs, wds, rule)
        cpu_dense.launch(table, total, rates, rule.scalars, formats(updates[0]), rule.row_wise, threads)

    return run


def one_job(u: Update, lr: Any, wd: float, rule: Rule, threads: int | None) -> Job | None:
    """The job that carries out an update, None if there is nothing to do; IndexError for a row id out of range."""
    if u.indices is not None:
        return _rows(u, lr, wd, rule, threads)
    if not math.prod(u.weight.shape):
        return None
    strided.compile_workers(u.weight.shape, formats(u), rule)
    return lambda: strided.update(_memories(u), formats(u), rate_table([lr], [wd], rule), rule, threads)


def _checked_rows(u: Update) -> tuple[np.ndarray, np.ndarray]:
    """The facts of a row-sparse update, still without its operands' addresses, and a checked copy of its row ids."""
    indices = host_indices(u.indices)
    indices = np.require(np.ascontiguousarray(indices, indices.dtype.newbyteorder("=")), requirements="A")
    facts = np.zeros(FACTS, np.int64)
    facts[ENTRIES], facts[LENGTH], facts[HEIGHT] = len(indices), row_length(u.weight.shape), u.weight.shape[0]
    facts[ARE_LONG], facts[BASE + IDS] = indices.itemsize == 8, indices.ctypes.data
    return facts, checked_rows(u.names, facts)


def _rows(u: Update, lr: float, wd: float, rule: Rule, threads: int | None) -> Job | None:
    facts, ids = _checked_rows(u)
    if not len(ids) or not facts[LENGTH]:
        return None
    if len(ids) > MAX_OCCURRENCES:
        return by_expression(u, lr, wd, rule)
    cpu_rows.workers(facts, ids, formats(u), rule.row_wise)

    def run() -> None:
        weight, grad, history, master = _memories(u)
        written, rows, is_gathered = (weight, history, master), ids, False
        if not all(m is None or _rows_are_addressable(m) for m in written):
            # The rows present are gathered into buffers: row r of a buffer is the r-th of them.
            present, inverse = np.unique(ids, return_inverse=True)
            rows, is_gathered = inverse.astype(ids.dtype, copy=False), True
            weight, history = _addressable_rows(weight[present]), _addressable_rows(history[present])
            master = None if master is None else _addressable_rows(master[present])
            facts[CHECKED_IDS] = rows.ctypes.data
        if not _rows_are_addressable(grad) and is_torch(u.grad.array):  # PyTorch transposes faster than NumPy
            grad = cast("np.ndarray", operand(u.grad.name, u.grad.array.contiguous()).memory)
        memories = weight, _addressable_rows(grad), history, master
        for k, m in enumerate(memories):
            facts[BASE + k], facts[STRIDE + k] = (0, 0) if m is None else (m.ctypes.data, m.strides[0])
        rates = rate_table([lr], [wd], rule)[0]
        cpu_rows.launch(u.names, facts, rows, formats(u), rule.row_wise, rates, rule.scalars, threads)
        if is_gathered:
            for memory, buffer in zip(written, (weight, history, master), strict=True):
                if memory is not None:
                    memory[present] = buffer

    return run


def _memories(u: Update) -> strided.Memories:
    operands = (u.weight, u.grad, u.history, u.master)
    return cast(strided.Memories, tuple(None if o is None else o.memory for o in operands))


def _addressable_rows(memory: np.ndarray) -> np.ndarray:
    """``memory``, or a copy if its rows are not addressable."""
    if _rows_are_addressable(memory):
        return memory
    return np.require(memory, memory.dtype.newbyteorder("="), ["C", "A"])


def _rows_are_addressable(memory: np.ndarray) -> bool:
    """Whether a kernel can address each row: contiguous, aligned, native; rows may lie any distance apart."""
    return bool(memory.dtype.isnative) and memory.flags.aligned and memory[:1].flags.c_contiguous
