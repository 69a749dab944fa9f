"""Dispatch for lists of torch tensors: the plain ones through tables of addresses, the others one by one.

As everywhere, what the host can know is checked before the first element changes, over all batches of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adagrad import kernels
from adagrad import rule as expression
from adagrad.arrays import Operand, bounds, refuse_shared_memory
from adagrad.kernels import tensor_rows, tensor_table, tensor_views
from adagrad.kernels.checked import Update
from adagrad.kernels.tensor_checks import check_wrapped, checked, is_memory, operands_of
from adagrad.row_sparse import RowSparse
from adagrad.rule import Rule


@dataclass
class Batch:
    """Weights that share a rule; each list has an entry for each weight, ``lrs`` and ``wds`` that or one for all."""

    rule: Rule
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | RowSparse] = field(default_factory=list)
    histories: list[Tensor] = field(default_factory=list)
    masters: list[Tensor | None] = field(default_factory=list)
    """Empty where no weight has a master copy."""
    lrs: list[float | Tensor] = field(default_factory=list)
    """A tensor only for weights on its own device."""
    wds: list[float] = field(default_factory=list)

    def tensors(self, i: int) -> tuple[Any, Any, Any, Any]:
        return self.weights[i], self.grads[i], self.histories[i], self.masters[i] if self.masters else None

    def rates(self, i: int) -> tuple[float | Tensor, float]:
        return self.lrs[i if len(self.lrs) > 1 else 0], self.wds[i if len(self.wds) > 1 else 0]


def update(
    batches: Sequence[Batch],
    *,
    threads: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Check batches of updates and carry them out, in place.

    Parameters
    ----------
    batches : sequence of Batch
    threads : int, optional
        At most so many threads; by default as many as Numba may use.
    grad_scale, found_inf : Tensor, optional
        One number each. Every gradient is divided by ``grad_scale`` first (on the CPU: multiplied by its reciprocal,
        the same for powers of two). Where ``found_inf`` is not 0, nothing changes. For weights that the CUDA kernels
        do not take, the numbers are waited for.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument, its value and the rule it broke; then nothing has changed. A row id outside a weight on a
        CUDA device is raised by a later call instead.
    """
    calls = [_Call(batch) for batch in batches if batch.weights]
    if not calls:
        return
    _refuse_shared(calls)
    scale = 1.0
    if not all(call.all_on_cuda() for call in calls):
        if found_inf is not None and bool(found_inf):
            return
        scale = 1.0 if grad_scale is None else float(grad_scale)
    jobs: list[Callable[[], None]] = []
    launches: dict[tuple[torch.device, Rule], _CudaLaunch] = {}
    for call in calls:
        call.add_jobs(jobs, launches, scale, threads)
    for launch in launches.values():
        launch.run(grad_scale, found_inf)
    for job in jobs:
        job()


class _CudaLaunch(NamedTuple):
    """What goes to one CUDA device under one rule."""

    device: torch.device
    rule: Rule
    dense: list[Any]
    rows: list[Any]

    def add(self, weight: Any, grad: Any, indices: Any, history: Any, master: Any, lr: Any, wd: float) -> None:
        if indices is None:
            self.dense.append(_cuda().DenseUpdate(weight, grad, history, master, lr, wd))
        else:
            self.rows.append(_cuda().RowUpdate(weight, indices, grad, history, master, lr, wd))

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        scale, found = (t if t is None else t.to(self.device, non_blocking=True) for t in (grad_scale, found_inf))
        _cuda().update(self.dense, self.rows, self.rule, grad_scale=scale, found_inf=found)


@functools.cache
def _cuda() -> Any:
    """The CUDA kernels, imported at the first use."""
    from adagrad.kernels import cuda

    return cuda


class _Call:
    """A batch, looked at: a table of the plain updates, the plain row-sparse ones, the others as checked operands, and
    those of tensors that only PyTorch understands."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.table = tensor_table.table(batch.weights, batch.grads, batch.histories, batch.masters, batch.rule.row_wise)
        self.groups: list[tuple[int, Sequence[int]]] = [(self.table.common, range(len(batch.weights)))]
        self.rows: dict[int, tensor_rows.Rows] = {}
        self.others: dict[int, Update] = {}
        self.wrapped: dict[int, tensor_views.Operands] = {}
        if self.table.common < 0:
            codes = self.table.codes
            self.groups = [(int(code), np.flatnonzero(codes == code).tolist()) for code in np.unique(codes[codes >= 0])]
            for i in np.flatnonzero(codes < 0).tolist():
                self._look_at(i)

    def _look_at(self, i: int) -> None:
        """Look at an update that the table has no row for."""
        weight, grad, history, master = self.batch.tensors(i)
        rule = self.batch.rule
        if isinstance(grad, Tensor) and grad.is_sparse:
            rows = tensor_rows.rows(weight, grad, history, master, row_wise=rule.row_wise)
            if rows is not None:
                self.rows[i] = rows
                return
        given = tensor_views.plain(i, weight, grad, history, master, row_wise=rule.row_wise)
        if all(t is None or isinstance(t, RowSparse) or is_memory(t) for t in given):
            self.others[i] = checked(i, *given, rule)
        else:
            check_wrapped(i, *given, rule)
            self.wrapped[i] = given

    def all_on_cuda(self) -> bool:
        """Whether the CUDA kernels update every row."""
        on_cuda = all(tensor_table.formats(code)[0] > 0 for code, _ in self.groups)
        on_cuda = on_cuda and all(rows.place > 0 for rows in self.rows.values())
        return on_cuda and not self.wrapped and all(map(_on_cuda, self.others.values()))

    def add_jobs(
        self,
        jobs: list[Callable[[], None]],
        launches: dict[tuple[torch.device, Rule], _CudaLaunch],
        scale: float,
        threads: int | None,
    ) -> None:
        """Add what updates the batch; row ids on the CPU are checked here."""
        batch, rule = self.batch, self.batch.rule
        scaled = rule if scale == 1 else replace(rule, rescale_grad=rule.rescale_grad / scale)

        def on_cuda(i: int, weight: Any, grad: Any, indices: Any, history: Any, master: Any) -> None:
            key = weight.device, rule
            launch = launches.setdefault(key, _CudaLaunch(*key, [], []))
            launch.add(weight, grad, indices, history, master, *batch.rates(i))

        for code, which in self.groups:
            place, formats = tensor_table.formats(code)
            if place == 0:
                jobs.append(self._launch(which, formats, scaled, threads))
                continue
            for i in which:
                weight, grad, history, master = batch.tensors(i)
                on_cuda(i, weight, grad, None, history, master)
        for i, rows in self.rows.items():
            weight, _, history, master = batch.tensors(i)
            if rows.place:
                on_cuda(i, weight, rows.values, rows.indices, history, master)
                continue
            job = rows.plan(i, weight, batch.rates(i), scaled, threads)
            if job is not None:
                jobs.append(job)
        for i, u in self.others.items():
            if _on_cuda(u):
                master = None if u.master is None else u.master.array
                indices = None if u.indices is None else u.indices.contiguous()
                on_cuda(i, u.weight.array, u.grad.array, indices, u.history.array, master)
            else:
                plan = kernels._group([u], scaled, fused=True, threads=threads)
                lr, wd = batch.rates(i)
                jobs.append(functools.partial(plan.run, [lr], [wd]))
        for i, given in self.wrapped.items():
            jobs.append(functools.partial(_run_expression, *given, *batch.rates(i), scaled))

    def _launch(self, which: Sequence[int], formats: Any, rule: Rule, threads: int | None) -> Callable[[], None]:
        rows, total = self.table.rows, self.table.total
        lrs: list[Any] = self.batch.lrs
        wds = self.batch.wds
        if len(which) < len(rows):
            rows, total = self.table.part(list(which))
            lrs = lrs if len(lrs) == 1 else [lrs[i] for i in which]
            wds = wds if len(wds) == 1 else [wds[i] for i in which]
        return functools.partial(kernels._launch, rows, formats, total, lrs, wds, rule, threads)


def _on_cuda(u: Update) -> bool:
    """Whether the CUDA kernels take it."""
    return u.weight.device != "cpu" and kernels.has_kernel(u)


def _run_expression(weight: Any, grad: Any, history: Any, master: Any, lr: Any, wd: float, rule: Rule) -> None:
    if isinstance(grad, RowSparse):
        expression.step_rows(weight, grad.indices, grad.values, history, master, lr, wd, rule)
    else:
        expression.step(weight, grad, history, master, lr, wd, rule)


def _refuse_shared(calls: list[_Call]) -> None:
    """ValueError where what a call writes to shares a byte with anything else in it."""
    if len(calls) == 1 and not calls[0].others and not calls[0].rows:
        table = calls[0].table
        disjoint = tensor_table.are_disjoint(table.starts, table.ends, table.written)
    else:
        spans: tuple[list[Any], list[Any]] = [], []  # what is written, what is read
        for call in calls:
            table = call.table
            spans[0].append((table.starts[: table.written], table.ends[: table.written]))
            spans[1].append((table.starts[table.written :], table.ends[table.written :]))
            for rows in call.rows.values():
                # Row ids lie in memory of their own: a sparse tensor made them.
                spans[0].append((rows.starts[:3], rows.ends[:3]))
                spans[1].append((rows.starts[3:], rows.ends[3:]))
            for u in call.others.values():
                for k, operands in enumerate(operands_of(u)):
                    memories = [o.memory for o in operands if o.memory is not None]
                    bounded = np.array([bounds(memory) for memory in memories], np.int64).reshape(-1, 2)
                    spans[k].append((bounded[:, 0], bounded[:, 1]))
        starts, ends = (np.concatenate([pair[k] for pair in spans[0] + spans[1]]) for k in (0, 1))
        disjoint = tensor_table.are_disjoint(starts, ends, sum(len(low) for low, _ in spans[0]))
    if disjoint:
        return
    written: list[Operand] = []
    read: list[Operand] = []
    for call in calls:
        for i in range(len(call.batch.weights)):
            if i in call.wrapped:
                continue
            if i in call.others:
                u = call.others[i]
            else:
                given = tensor_views.plain(i, *call.batch.tensors(i), row_wise=call.batch.rule.row_wise)
                u = checked(i, *given, call.batch.rule)
            for all_operands, operands in zip((written, read), operands_of(u), strict=True):
                all_operands += operands
    refuse_shared_memory(written, read)
