"""The general path: lists of updates of any kind are inspected, checked as a whole, then carried out.

Plain arrays, nearly always all of them, go through tables that compiled code fills and checks; others are checked one
by one. All that the host can know is checked over all batches of a call before the first element changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adagrad.arrays import bounds
from adagrad.kernels import general_cpu
from adagrad.kernels.batch import Batch, Job, Prepared
from adagrad.kernels.cpu import dense as cpu_dense, rows as cpu_rows
from adagrad.kernels.cpu.row_groups import checked_rows
from adagrad.kernels.cpu.rule import rate_table
from adagrad.kernels.device_updates import DeviceUpdates, cuda, fits_cuda, has_kernels
from adagrad.kernels.expressions import by_expression
from adagrad.kernels.inspection import rows, table
from adagrad.kernels.inspection.layout import accept
from adagrad.kernels.inspection.spans import are_disjoint, concatenate
from adagrad.kernels.names import Names
from adagrad.kernels.records import LENGTH
from adagrad.kernels.validate import Update, Wrapped, is_row_sparse, operands_of, refuse_shared, validate
from adagrad.rule import Rule, is_torch


def prepare(
    batches: Sequence[Batch],
    *,
    threads: int | None = None,
    grad_scale: Any = None,
    found_inf: Any = None,
    wait: bool = False,
    check_only: bool = False,
) -> Prepared:
    """Check batches of updates, row ids on the CPU included; compile what they need.

    Parameters
    ----------
    batches : sequence of Batch
    threads : int, optional
        The most threads to use; by default as many as Numba may use.
    grad_scale, found_inf : Tensor, optional
        One number each. Every gradient is divided by ``grad_scale`` first (outside the CUDA kernels, ``rescale_grad``
        is divided instead, which is the same for powers of two). If ``found_inf`` is not 0, nothing changes. Both are
        waited for unless the CUDA kernels take every weight.
    wait : bool, default False
        Whether to wait for CUDA devices to check their row ids, because more depends on the result than these updates.
    check_only : bool, default False
        Whether nothing is to be done on a device, or returned.

    Returns
    -------
    Prepared
        Its ``run`` returns one number on each CUDA device with row ids: not 0 if one of them was outside its weight,
        in which case nothing on that device has changed.

    Raises
    ------
    TypeError, ValueError, IndexError
        Names the argument, its value and the rule it broke. A row id outside a weight on a CUDA device is reported by
        a later call instead, if the CUDA kernels take every weight, on one device, and need not ``wait``.
    """
    checked = [_CheckedBatch(batch) for batch in batches if batch.weights]
    _refuse_shared(checked)
    scale = 1.0
    if not all(each.all_on_cuda() for each in checked):
        if found_inf is not None and bool(found_inf):
            return Prepared([])
        scale = 1.0 if grad_scale is None else float(grad_scale)
    plan = _Plan()
    for each in checked:
        each.add_to(plan, scale, threads)
    for device in plan.on_devices:
        cuda().raise_reported(device)
    if check_only:
        return Prepared([])
    on_devices = [updates.job(grad_scale, found_inf) for updates in plan.on_devices.values()]
    if wait or plan.wrapped or plan.jobs or plan.dense or len(plan.on_devices) > 1:
        for device, updates in plan.on_devices.items():
            if updates.have_row_ids():  # a bad one stops the kernels, but nothing else
                cuda().wait_for_check(device)
    return Prepared([*plan.wrapped, *on_devices, *plan.jobs, *plan.dense], [each.batch for each in checked])


def check_without_row_ids(batches: Sequence[Batch]) -> None:
    """Raise what :func:`prepare` would, except for row ids and learning rates; nothing is compiled or planned."""
    _refuse_shared([_CheckedBatch(batch) for batch in batches])


class _Plan:
    """What carries out a call, in the order in which it runs."""

    def __init__(self) -> None:
        self.wrapped: list[Job] = []
        """What a user's class may refuse in a way that no check foresees: run first, before anything else changes."""
        self.on_devices: dict[Any, DeviceUpdates] = {}
        """By device."""
        self.jobs: list[Job] = []
        """Those of row-sparse and strided weights, for which memory may be short, run before the others."""
        self.dense: list[Job] = []

    def updates_on(self, device: Any) -> DeviceUpdates:
        return self.on_devices.setdefault(device, DeviceUpdates(device))


class _CheckedBatch:
    """A batch, inspected and checked, except for row ids. Each of its updates is in one of four places."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.table = table.NOTHING
        self.groups: list[tuple[int, Sequence[int]]] = []
        """The plain dense updates: each code, and the positions (in ``table``, too) of those that have it."""
        self.rows = rows.NOTHING
        """The plain row-sparse ones."""
        self.sparse: list[int] = []
        """Their positions in the batch."""
        self.others: dict[int, Update] = {}
        """By position, those of other arrays."""
        self.wrapped: dict[int, Wrapped] = {}
        """By position, those of tensors that only PyTorch understands."""
        self.devices: set[int]
        """Where the plain ones are, see :meth:`_find_devices`."""
        rest: Sequence[int] = range(len(batch.weights))
        if all(map(is_row_sparse, batch.grads)):
            rest = self._describe_rows([*rest])
        else:
            found = table.build_table(batch.weights, batch.grads, batch.histories, batch.masters, batch.rule.row_wise)
            self.table, self.groups, rest = found, found.groups(), ()
            if found.common < 0:
                left = np.flatnonzero(found.codes < 0).tolist()
                sparse = [i for i in left if is_row_sparse(batch.grads[i])]
                not_plain = self._describe_rows(sparse)
                rest = sorted({*left} - {*sparse} | {*not_plain})
        self.devices = self._find_devices()
        if any(self.devices) and not has_kernels():
            rest = [*rest, *self._take_from_cuda()]
            self.devices = self._find_devices()
        for i in rest:
            self._validate(i)

    def _find_devices(self) -> set[int]:
        """The devices of the plain updates: 0 for the CPU, 1 + index for a CUDA device."""
        codes = {*self.rows.codes, *(code for code, _ in self.groups)}
        return {table.decode(code)[0] for code in codes}

    def _take_from_cuda(self) -> list[int]:
        """Remove the plain updates on CUDA devices; returns their positions."""
        taken = [i for code, which in self.groups if table.decode(code)[0] for i in which]
        taken += [i for i, code in zip(self.sparse, self.rows.codes, strict=True) if table.decode(code)[0]]
        self.groups = [(code, which) for code, which in self.groups if not table.decode(code)[0]]
        on_cpu = [k for k, code in enumerate(self.rows.codes) if not table.decode(code)[0]]
        self.rows, self.sparse = self.rows.some(on_cpu), [self.sparse[k] for k in on_cpu]
        return taken

    def _describe_rows(self, which: list[int]) -> list[int]:
        """Inspect the row-sparse updates ``which``; returns those that are not plain."""
        part = self.batch.part(which)
        found = rows.inspect_rows(part.weights, part.grads, part.histories, part.masters, row_wise=part.rule.row_wise)
        self.rows, self.sparse = found, which
        if -1 not in found.codes:
            return []
        plain = [k for k, code in enumerate(found.codes) if code >= 0]
        self.rows, self.sparse = found.some(plain), [which[k] for k in plain]
        return [i for i, code in zip(which, found.codes, strict=True) if code < 0]

    def _validate(self, i: int) -> None:
        """Check an update that is not plain."""
        given = self.batch.arrays(i)
        found = validate(self.batch.names(i), *given, self.batch.rule)
        if isinstance(found, Update):
            self.others[i] = found
            if is_torch(given[0]):
                _accept_classes(given)
        else:
            self.wrapped[i] = found

    def all_on_cuda(self) -> bool:
        """Whether the CUDA kernels update every weight."""
        return all(self.devices) and not self.wrapped and all(map(fits_cuda, self.others.values()))

    def add_to(self, plan: _Plan, scale: float, threads: int | None) -> None:
        """Add what updates the batch; row ids on the CPU are checked here."""
        rule = self.batch.rule
        scaled = rule if scale == 1 else replace(rule, rescale_grad=rule.rescale_grad / scale)
        self._add_table(plan, scaled, threads)
        self._add_rows(plan, scaled, threads)
        self._add_others(plan, scaled, threads)
        for i, given in self.wrapped.items():
            plan.wrapped.append(by_expression(given, *self.batch.rates(i), scaled))

    def _add_table(self, plan: _Plan, scaled: Rule, threads: int | None) -> None:
        for code, which in self.groups:
            number, formats = table.decode(code)
            if not number:
                plan.dense.append(self._dense_job(which, formats, scaled, threads))
            else:
                device = self.batch.weights[which[0]].device
                plan.updates_on(device).add_dense(self.batch.rule, self._dense_on_cuda(which))

    def _add_rows(self, plan: _Plan, scaled: Rule, threads: int | None) -> None:
        devices = [table.decode(code)[0] for code in self.rows.codes]
        for number in dict.fromkeys(devices):
            members = [k for k, each in enumerate(devices) if each == number]
            if number:
                device = self.batch.weights[self.sparse[members[0]]].device
                plan.updates_on(device).add_rows(self.batch.rule, self._rows_on_cuda(members))
                continue
            plan.jobs += [self._rows_job(k, scaled, threads) for k in members]

    def _add_others(self, plan: _Plan, scaled: Rule, threads: int | None) -> None:
        dense: dict[table.Formats, list[int]] = {}
        for i, u in self.others.items():
            rates = self.batch.rates(i)
            if fits_cuda(u):
                plan.updates_on(u.weight.array.device).add(u, *rates, self.batch.rule)
            elif u.weight.device != "cpu":
                plan.jobs.append(by_expression(u, *rates, scaled))
            elif u.indices is None and general_cpu.fits_table(u):
                dense.setdefault(general_cpu.formats(u), []).append(i)
            elif (job := general_cpu.one_job(u, *rates, scaled, threads)) is not None:
                plan.jobs.append(job)
        for which in dense.values():
            updates = [self.others[i] for i in which]
            plan.dense.append(general_cpu.by_table(updates, *self.batch.some_rates(which), scaled, threads))

    def _dense_on_cuda(self, which: Sequence[int]) -> Any:
        rows, codes, _ = self.table.part(which)
        return cuda().dense.DenseUpdates(rows, codes, *self.batch.some_rates(which), [self.batch])

    def _rows_on_cuda(self, members: list[int]) -> Any:
        which, found, batch = [self.sparse[k] for k in members], self.rows.some(members), self.batch
        masters = [batch.masters[i] for i in which] if batch.masters else [None] * len(which)
        weights, histories = [batch.weights[i] for i in which], [batch.histories[i] for i in which]
        tensors = [*zip(weights, found.indices, found.values, histories, masters, strict=True)]
        return cuda().row_launches.RowUpdates(found.facts, found.codes, *batch.some_rates(which), tensors)

    def _dense_job(self, which: Sequence[int], formats: table.Formats, rule: Rule, threads: int | None) -> Job:
        addresses, _, total = self.table.part(which)
        rates = rate_table(*self.batch.some_rates(which), rule)
        cpu_dense.kernel(*formats, rule.row_wise)  # compiled now, before anything changes
        return functools.partial(
            cpu_dense.launch, addresses, total, rates, rule.scalars, formats, rule.row_wise, threads
        )

    def _rows_job(self, k: int, rule: Rule, threads: int | None) -> Job:
        """The job of the ``k``-th of ``rows``, on the CPU; IndexError for a row id outside the weight."""
        i, facts, formats = self.sparse[k], self.rows.facts[k], table.decode(self.rows.codes[k])[1]
        names, rates = self.batch.names(i), rate_table(*self.batch.some_rates([i]), rule)[0]
        ids, parts = checked_rows(names, facts), (self.rows.values[k], self.rows.indices[k])
        cpu_rows.workers(facts, ids, formats, rule.row_wise)  # compiled now, before anything changes
        return functools.partial(
            _launch_rows, parts, names, facts, ids, formats, rule.row_wise, rates, rule.scalars, threads
        )


def _launch_rows(parts: Any, names: Names, facts: np.ndarray, ids: np.ndarray, *others: Any) -> None:
    """``parts`` are what ``facts`` point to: alive until here, even if another thread gives the gradient new ones."""
    if len(ids) and facts[LENGTH]:
        cpu_rows.launch(names, facts, ids, *others)


def _accept_classes(given: Sequence[Any]) -> None:
    """From the next call on, let the fast path take tensors of these classes that are nothing but their memory."""
    from adagrad.kernels.tensors.checks import PLAIN_TYPES, is_memory

    for kind in {type(each) for each in given if is_torch(each)}.difference(PLAIN_TYPES):
        if is_memory(kind):
            accept(kind)


def _refuse_shared(checked: list[_CheckedBatch]) -> None:
    """ValueError where what a call writes to shares a byte with anything else in it."""
    if not checked or are_disjoint(*_spans(checked)):
        return
    # Their bounds overlap. Their bytes may still be disjoint; if not, the message tells which overlap.
    found: list[Update] = []
    for each in checked:
        batch = each.batch
        for i in range(len(batch.weights)):
            update = each.others.get(i) or validate(batch.names(i), *batch.arrays(i), batch.rule)
            found += [update] if isinstance(update, Update) else []
    refuse_shared(found)


def _spans(checked: list[_CheckedBatch]) -> tuple[np.ndarray, int]:
    """Starts and ends (2, n) of all memory of the batches, and how many of these spans, the first, are written to."""
    pieces: list[tuple[np.ndarray, int]] = []
    for each in checked:
        pieces.append((each.table.spans, each.table.written))
        if each.sparse:
            pieces.append(each.rows.spans)
        for u in each.others.values():
            operands = operands_of(u)
            written, read = ([bounds(o.memory) for o in some if o.memory is not None] for some in operands)
            pieces.append((np.array([*written, *read], np.int64).reshape(-1, 2).T, len(written)))
    return concatenate(pieces)
