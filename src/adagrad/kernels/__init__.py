"""Dispatch: one call for a list of updates.

:func:`update` checks everything that can be known before, then updates. :func:`plan` is its general way: check, group
the list by device, kind and format, and leave it to the caller when to :meth:`Plan.run`. A call that is refused has
changed nothing.

Lists of lrs and wds have an entry for each weight, or one for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from adagrad import rule as expression
from adagrad.arrays import Operand, row_length
from adagrad.kernels.checked import (
    Update,
    any_row_sparse,
    check_rows,
    check_update,
    host_indices,
    is_row_sparse,
    refuse_row,
    refuse_shared,
)
from adagrad.rule import Array, Rule

__all__ = ["Plan", "any_row_sparse", "is_row_sparse", "plan", "update"]

Formats: TypeAlias = "tuple[str, str, str, str | None]"
"""The element formats of weight, gradient, history and master copy (None for none)."""


class Plan:
    """A checked call; :meth:`run` carries it out."""

    def __init__(self) -> None:
        self._parts: list[tuple[Sequence[int], Callable[[Any, Any], None]]] = []

    def add(self, which: Sequence[int], part: Callable[[Any, Any], None]) -> None:
        """Add what updates the weights at the positions ``which``, given their lrs and wds."""
        self._parts.append((which, part))

    def run(self, lrs: Sequence[Any], wds: Sequence[Any]) -> None:
        """Update every weight, with its lr and wd, in the order of the call."""
        for which, part in self._parts:
            part(*(rates if len(rates) == 1 else [rates[i] for i in which] for rates in (lrs, wds)))


def update(
    weights: list[Array],
    grads: list[Any],
    states: list[Any],
    lrs: Sequence[Any],
    wds: Sequence[Any],
    rule: Rule,
    *,
    fused: bool,
    threads: int | None = None,
) -> None:
    """Check a call and carry it out; arguments and errors as in :func:`plan` and :meth:`Plan.run`."""
    if fused and not rule.row_wise and weights and type(weights[0]) is np.ndarray:
        found = _cpu().ndarray_table.table(weights, grads, states)
        if found is not None:
            table, formats, total = found
            _launch(table, formats, total, lrs, wds, rule, threads)
            return
    plan(weights, grads, states, rule, fused=fused, threads=threads).run(lrs, wds)


def plan(
    weights: list[Array], grads: list[Any], states: list[Any], rule: Rule, *, fused: bool, threads: int | None = None
) -> Plan:
    """Check a call and say how it will be carried out.

    Parameters
    ----------
    weights : list of arrays
    grads : list of arrays or RowSparse
    states : list of histories, or of pairs (master copy, history)
    rule : Rule
    fused : bool
        Whether to use the kernels; else the array expressions of :mod:`adagrad.rule`.
    threads : int, optional
        At most so many threads; by default as many as Numba may use.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument, its value and the rule it broke.
    """
    updates = [
        check_update(f"[{i}]", *given, rule) for i, given in enumerate(zip(weights, grads, states, strict=True))
    ]
    refuse_shared(updates)
    return _group(updates, rule, fused=fused, threads=threads)


@functools.cache
def _cpu() -> Any:
    """The CPU's kernels, imported at the first use: Numba takes its time."""
    from adagrad.kernels import cpu_dense, cpu_rows, cpu_rule, ndarray_table, row_groups

    modules = (cpu_dense, cpu_rows, cpu_rule, ndarray_table, row_groups)
    return SimpleNamespace(**{module.__name__.rpartition(".")[2]: module for module in modules})


def _group(updates: list[Update], rule: Rule, *, fused: bool, threads: int | None) -> Plan:
    """Say what carries out ``updates``; every row id is checked here."""
    result = Plan()
    dense: dict[Formats, list[int]] = {}
    devices: dict[str, list[int]] = {}
    for i, u in enumerate(updates):
        if u.weight.device == "cpu" and u.indices is not None:
            _add_rows(result, i, u, rule, fused=fused, threads=threads)
        elif not fused or not has_kernel(u):
            result.add([i], _expression(u, rule))
        elif u.weight.device != "cpu":
            devices.setdefault(u.weight.device, []).append(i)
        elif math.prod(u.weight.shape):
            if all(o is None or o.is_plain for o in (u.weight, u.grad, u.history, u.master)):
                dense.setdefault(_formats(u), []).append(i)
            else:
                result.add([i], _strided(u, rule, threads))
    for formats, which in dense.items():
        result.add(which, _dense([updates[i] for i in which], formats, rule, threads))
    for which in devices.values():
        result.add(which, _cuda([updates[i] for i in which], rule))
    return result


def has_kernel(u: Update) -> bool:
    """Whether some kernel can do it: on the CPU any, on a CUDA device one of contiguous tensors."""
    operands = (u.weight, u.grad, u.history, u.master)
    return u.weight.device == "cpu" or (
        u.weight.device.startswith("cuda") and all(o is None or o.array.is_contiguous() for o in operands)
    )


def _formats(u: Update) -> Formats:
    return u.weight.format, u.grad.format, u.history.format, None if u.master is None else u.master.format


def _launch(
    table: np.ndarray,
    formats: Formats,
    total: int,
    lrs: Sequence[float],
    wds: Sequence[float],
    rule: Rule,
    threads: int | None,
) -> None:
    cpu = _cpu()
    scalars = cpu.cpu_rule.scalars(rule)
    cpu.cpu_dense.launch(table, total, hyper(lrs, wds, rule), scalars, formats, rule.row_wise, threads)


def hyper(lrs: Sequence[float], wds: Sequence[float], rule: Rule) -> np.ndarray:
    """lr, coupled wd and decoupled wd of each weight, or one row for all."""
    if len(lrs) == 1 and len(wds) == 1:
        return np.array([[lrs[0], 0.0, wds[0]] if rule.decoupled_decay else [lrs[0], wds[0], 0.0]])
    table = np.zeros((max(len(lrs), len(wds)), 3))
    table[:, 0] = lrs
    table[:, 2 if rule.decoupled_decay else 1] = wds
    return table


def _dense(updates: list[Update], formats: Formats, rule: Rule, threads: int | None) -> Callable[[Any, Any], None]:
    table = _table(updates, rule)
    total = sum(math.prod(u.weight.shape) for u in updates)

    def run(lrs: Sequence[float], wds: Sequence[float], keep: Any = updates) -> None:
        _launch(table, formats, total, lrs, wds, rule, threads)

    return run


def _table(updates: Sequence[Update], rule: Rule) -> np.ndarray:
    row = _cpu().cpu_dense.table_row
    return np.array([row([_memory(o) for o in (u.weight, u.grad, u.history, u.master)], rule) for u in updates])


def _memory(o: Operand | None) -> np.ndarray | None:
    return None if o is None else o.memory


def _strided(u: Update, rule: Rule, threads: int | None) -> Callable[[Any, Any], None]:
    from adagrad.kernels import strided

    def run(lrs: Sequence[float], wds: Sequence[float]) -> None:
        memories = [_memory(o) for o in (u.weight, u.grad, u.history, u.master)]
        strided.update(memories, _formats(u), hyper(lrs, wds, rule), rule, threads)

    return run


def _add_rows(result: Plan, i: int, u: Update, rule: Rule, *, fused: bool, threads: int | None) -> None:
    indices = host_indices(u.indices)
    rows = u.weight.shape[0]
    if not fused:
        check_rows(f"[{i}]", indices, rows)
        if len(indices):
            result.add([i], _expression(u, rule))
        return

    cpu = _cpu()
    indices = np.ascontiguousarray(indices, indices.dtype.newbyteorder("="))
    indices = np.require(indices, requirements="A")
    ids, bad, distinct = cpu.row_groups.checked_rows(indices, rows)
    if bad >= 0:
        refuse_row(f"[{i}]", indices, bad, rows)
    if len(ids) and row_length(u.weight.shape):
        result.add([i], _rows_launch(u, ids, distinct, rule, threads))


def _rows_launch(
    u: Update, ids: np.ndarray, distinct: bool, rule: Rule, threads: int | None
) -> Callable[[Any, Any], None]:
    length = row_length(u.weight.shape)

    def run(lrs: Sequence[float], wds: Sequence[float]) -> None:
        memories = [_memory(o) for o in (u.weight, u.history, u.master, u.grad)]
        buffers, use, present = memories, ids, None
        if not all(m is None or _rows_are_plain(m) for m in memories):
            # The rows present, gathered into buffers: row r of a buffer is the r-th of them.
            present, use = np.unique(ids, return_inverse=True)
            gathered = [m if m is None else m[present] for m in memories[:3]]
            plain = [m if m is None else np.ascontiguousarray(m, m.dtype.newbyteorder("=")) for m in
                     [*gathered, memories[3]]]  # fmt: skip
            buffers = [m if m is None else np.require(m, requirements=["C", "A"]) for m in plain]
        base = np.array([0 if m is None else m.ctypes.data for m in buffers])
        stride = np.array([0 if m is None else m.strides[0] for m in buffers])
        cpu = _cpu()
        given = base, stride, _formats(u), length, rule.row_wise, hyper(lrs, wds, rule)[0], cpu.cpu_rule.scalars(rule)
        cpu.cpu_rows.launch(use, distinct, *given, threads)
        if present is not None:
            for memory, buffer in zip(memories[:3], buffers[:3], strict=True):
                if memory is not None and buffer is not None:
                    memory[present] = buffer

    return run


def _rows_are_plain(memory: np.ndarray) -> bool:
    """Whether each row is contiguous, aligned and native; the rows may lie any distance apart."""
    return bool(memory.dtype.isnative) and memory.flags.aligned and memory[:1].flags.c_contiguous


def _expression(u: Update, rule: Rule) -> Callable[[Any, Any], None]:
    master = None if u.master is None else u.master.array

    def run(lrs: Sequence[Any], wds: Sequence[Any]) -> None:
        if u.indices is None:
            expression.step(u.weight.array, u.grad.array, u.history.array, master, lrs[0], wds[0], rule)
        else:
            expression.step_rows(
                u.weight.array, u.indices, u.grad.array, u.history.array, master, lrs[0], wds[0], rule
            )

    return run


def _cuda(updates: list[Update], rule: Rule) -> Callable[[Any, Any], None]:
    from adagrad.kernels import cuda

    def run(lrs: Sequence[Any], wds: Sequence[Any]) -> None:
        dense, rows = [], []
        lrs, wds = (rates if len(rates) > 1 else [rates[0]] * len(updates) for rates in (lrs, wds))
        for u, lr, wd in zip(updates, lrs, wds, strict=True):
            arrays = u.history.array, None if u.master is None else u.master.array, lr, wd
            if u.indices is None:
                dense.append(cuda.DenseUpdate(u.weight.array, u.grad.array, *arrays))
            else:
                rows.append(cuda.RowUpdate(u.weight.array, u.indices.contiguous(), u.grad.array, *arrays))
        cuda.update(dense, rows, rule)

    return run
