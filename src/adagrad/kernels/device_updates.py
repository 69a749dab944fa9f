"""What a call does on a CUDA device, collected from its batches: one :func:`adagrad.kernels.cuda.job`."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from adagrad import checks
from adagrad.kernels.validate import Update
from adagrad.rule import Rule, is_torch


@functools.cache
def cuda() -> Any:
    """The CUDA kernels, imported at the first use."""
    from adagrad.kernels import cuda

    return cuda


@functools.cache
def has_kernels() -> bool:
    """Whether there are CUDA kernels: they need Triton. Else array expressions update what is on a CUDA device."""
    try:
        cuda()
    except ImportError as error:
        slower = "tensors on CUDA devices are updated by array expressions, which is slower"
        warnings.warn(f"no CUDA kernels ({error}): {slower}", UserWarning, stacklevel=checks.caller())
        return False
    return True


def fits_cuda(u: Update) -> bool:
    """Whether the CUDA kernels take an update: on CUDA, and all of it contiguous."""
    if not u.weight.device.startswith("cuda"):
        return False
    operands = (u.weight, u.grad, u.history, u.master)
    return all(o is None or o.array.is_contiguous() for o in operands) and has_kernels()


class DeviceUpdates:
    """The updates on one CUDA device: by rule, the dense and the row-sparse ones."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._groups: dict[Rule, tuple[list[Any], list[Any]]] = {}

    def add_dense(self, rule: Rule, updates: Any) -> None:
        self._of(rule)[0].append(self._here(updates))

    def add_rows(self, rule: Rule, updates: Any) -> None:
        self._of(rule)[1].append(self._here(updates))

    def add(self, u: Update, lr: Any, wd: float, rule: Rule) -> None:
        """Add an update of contiguous tensors of any class."""
        weight, grad, history = u.weight.array, u.grad.array, u.history.array
        master = None if u.master is None else u.master.array
        if u.indices is None:
            self.add_dense(rule, cuda().dense.of_tensors(weight, grad, history, master, lr, wd, rule))
        else:
            tensors = weight, u.indices.contiguous(), grad, history, master
            self.add_rows(rule, cuda().row_launches.of_tensors(*tensors, lr, wd, rule))

    def _of(self, rule: Rule) -> tuple[list[Any], list[Any]]:
        return self._groups.setdefault(rule, ([], []))

    def _here(self, updates: Any) -> Any:
        """The updates, with learning rates that are tensors moved to the device."""
        if set(map(type, updates.lrs)) == {float}:
            return updates
        lrs = [lr.to(self.device, non_blocking=True) if is_torch(lr) else lr for lr in updates.lrs]
        return updates._replace(lrs=lrs)

    def have_row_ids(self) -> bool:
        return any(len(tensors[1]) for _, rows in self._groups.values() for each in rows for tensors in each.tensors)

    def job(self, grad_scale: Any, found_inf: Any) -> Any:
        """Return what :func:`adagrad.kernels.cuda.job` returns."""
        kernels = cuda()
        groups = [
            kernels.Group(rule, kernels.dense.concatenate(dense), kernels.row_launches.concatenate(rows))
            for rule, (dense, rows) in self._groups.items()
        ]
        return kernels.job(groups, self.device, grad_scale=grad_scale, found_inf=found_inf)
