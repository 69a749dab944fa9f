"""Updates by the array expressions of :mod:`adagrad.rule`: on any device, any class of tensor, and without Numba."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from adagrad import rule as expression
from adagrad.kernels.batch import Batch, Job, Prepared
from adagrad.kernels.names import Names, refuse_row
from adagrad.kernels.validate import Update, Wrapped, refuse_shared, validate
from adagrad.row_sparse import RowSparse
from adagrad.rule import Array, Rule, is_torch


def prepare(batch: Batch) -> Prepared:
    """Check a batch of updates, row ids on the CPU included.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument, its value and the rule it broke.
    """
    found = [validate(batch.names(i), *batch.arrays(i), batch.rule) for i in range(len(batch.weights))]
    refuse_shared([each for each in found if isinstance(each, Update)])
    return Prepared([by_expression(each, *batch.rates(i), batch.rule) for i, each in enumerate(found)])


def by_expression(update: Update | Wrapped, lr: Any, wd: float, rule: Rule) -> Job:
    """The job that carries out an update; IndexError for a row id out of range, whose check waits for a device."""
    if isinstance(update, Wrapped):
        weight, grad, history, master, _ = update
        indices, values = (grad.indices, grad.values) if isinstance(grad, RowSparse) else (None, grad)
        weight, values, history, master = (t if t is None else t.detach() for t in (weight, values, history, master))
    else:
        weight, values, history = update.weight.array, update.grad.array, update.history.array
        master, indices = None if update.master is None else update.master.array, update.indices
    if indices is None:
        return functools.partial(expression.step, weight, values, history, master, lr, wd, rule)
    _check_rows(update.names, indices, len(weight))
    return functools.partial(expression.step_rows, weight, indices, values, history, master, lr, wd, rule)


def _check_rows(names: Names, indices: Array, rows: int) -> None:
    if is_torch(indices):
        from adagrad.kernels.tensors import checks as tensor_checks

        tensor_checks.check_rows(names, indices, rows)
        return
    indices = np.asarray(indices)  # a user's subclass may refuse comparisons
    if len(indices) and (indices.min() < 0 or indices.max() >= rows):
        position = int(np.flatnonzero((indices < 0) | (indices >= rows))[0])
        refuse_row(names, position, int(indices[position]), rows)
