"""Updates of torch tensors on one CUDA device, called by the dispatcher after all checks on the host.

A call launches one kernel for each format of dense tensors, and for all row-sparse gradients of one form a check of
their row ids, a sort and one or two kernels. It neither waits for the device nor copies anything back from it. What
can fail on the host, such as compiling a kernel, is done before the first kernel that changes anything is launched.

Kernels read their parameters from tables in device memory, see :mod:`adagrad.kernels.cuda.tables`.

An id outside the weight turns the whole call into a no-op, on the device. The kernel that meets one writes it into
pinned host memory; the next call raises IndexError if that has arrived, and :func:`check` waits for it. If two such
calls are in flight at once, the report of the second may be mixed with that of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adagrad.kernels.cuda import row_launches
from adagrad.kernels.cuda.dense import DenseUpdates
from adagrad.kernels.cuda.row_launches import RowUpdates
from adagrad.kernels.cuda.tables import tables_of

if TYPE_CHECKING:
    from adagrad.rule import Rule

NO_ROW = int(np.iinfo(np.int64).min)


class Group(NamedTuple):
    """Updates under one rule."""

    rule: Rule
    dense: DenseUpdates | None
    rows: RowUpdates | None


def job(
    groups: Sequence[Group],
    device: torch.device,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Callable[[], Tensor | None]:
    """Prepare an AdaGrad step (Duchi, Hazan, Singer, JMLR 12, 2011) of tensors on one CUDA device, in place.

    Parameters
    ----------
    groups : sequence of Group
    device : torch.device
        Where all tensors are; no weight, history or master copy shares memory with anything else in the call.
    grad_scale : Tensor, optional
        One number, on any device; each gradient (for rows: each sum of a row's occurrences) is divided by it first.
    found_inf : Tensor, optional
        One number, on any device; if it is not 0, the call changes nothing.

    Returns
    -------
    callable
        Carries it out, on the stream that is current now. If there are row ids, which the device is already checking,
        it returns a number on the device that is not 0 if one of them is outside its weight; else None.

    Raises
    ------
    TypeError
        An lr on the device is neither float32 nor float64.
    Exception
        Whatever compiling a kernel, or a lack of memory, may raise.
    """
    grad_scale, found_inf = (t if t is None else t.to(device, non_blocking=True) for t in (grad_scale, found_inf))
    with _on(device):
        tables, skip = tables_of(device), None
        launches: list[Callable[..., list[Callable[[], object]]]] = []
        for rule, dense, rows in groups:
            lrs, wds = dense.rates() if dense else ([], [])
            row_lrs, row_wds = rows.rates() if rows else ([], [])
            settings = tables.settings([*lrs, *row_lrs], [*wds, *row_wds], rule)
            if dense:
                addresses, found = tables.addresses(dense)
                launches.append(partial(tables.dense_launches, addresses, found, settings))
            if rows:
                for form, which in row_launches.by_form(rows, rule).items():
                    # Every id of the call is checked before the first element changes.
                    skip = tables.flag() if skip is None else skip
                    report = _report_of(device).tensor
                    launch = row_launches.sort_ids(rows, form, which, len(lrs), skip, report, tables.rows)
                    launches.append(partial(row_launches.bind, launch, settings))
        bound = [start for launch in launches for start in launch(grad_scale, skip, found_inf)]
    return partial(_carry_out, bound, device, skip, groups)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, a CUDA device is the current one, as it usually is: to make it so takes longer than to ask."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()


def _carry_out(bound: list[Callable[[], object]], device: torch.device, skip: Tensor | None, kept: object
               ) -> Tensor | None:  # fmt: skip
    """Launch the kernels; ``kept`` are tensors that they use by address, some of them known to nobody else."""
    with _on(device):
        for start in bound:
            start()
    return skip


def wait_for_check(device: torch.device) -> None:
    """Raise what a call that has been prepared reports, after waiting for the device to check its row ids.

    Not while a CUDA graph is captured, when nothing is computed yet: then a bad row id stops the kernels alone.
    """
    if device.type == "cuda":
        with _on(device):
            if torch.cuda.is_current_stream_capturing():
                return
            torch.cuda.current_stream().synchronize()
    _raise_reported(_report_of(device).words, arrived=True)


def check(device: torch.device | str | int | None = None) -> None:
    """Wait for the device, or for all devices used so far, and raise what calls of :func:`job` reported there.

    Raises
    ------
    IndexError
        A call met a row id outside its weight; that call changed nothing.
    """
    wanted = None if device is None else _with_index(torch.device(device))
    for used, report in list(_reports.items()):
        if wanted is None or used == wanted:
            if used.type == "cuda":
                torch.cuda.synchronize(used)
            _raise_reported(report.words, arrived=True)


# ------------------------------------------------------------------------------------------------- row ids out of range


class _Report(NamedTuple):
    """Host memory that a device can write: (id, rows + 1) of a row id out of range, or (NO_ROW, 0)."""

    tensor: Tensor
    words: memoryview
    """The same memory for Python, which takes longer to read a number from a tensor or an array."""


_reports: dict[torch.device, _Report] = {}


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _report_of(device: torch.device) -> _Report:
    report = _reports.get(device)
    if report is None:
        tensor = torch.tensor([NO_ROW, 0], dtype=torch.int64, device="cpu")
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        report = _reports.setdefault(device, _Report(tensor, tensor.numpy().data))
    return report


def raise_reported(device: torch.device) -> None:
    """Raise what earlier calls reported on a device, if that has arrived.

    Called for each device of a call before the call begins.
    """
    _raise_reported(_report_of(device).words, arrived=False)


def _raise_reported(words: memoryview, *, arrived: bool) -> None:
    """Raise what a report says. Its two words arrive one by one: unless ``arrived``, raise only if both are there."""
    row, rows = words[0], words[1] - 1
    if rows < 0 or (row == NO_ROW and not arrived):
        return
    words[1] = 0  # first, so that :func:`check` raises something for a report that arrives meanwhile
    words[0] = NO_ROW
    raise IndexError(f"indices: row {row}: must be in [0, {rows}), the weight's rows; the call changed nothing")
