"""Lists of updates of plain tensors on one CUDA device, inspected and checked by compiled code.

What :mod:`adagrad.kernels.fast_path` is on the CPU: the usual lists take a shorter way to the kernels than through
:mod:`adagrad.kernels.general_path`, to which all else is left, and every error. A list's dense updates are inspected by
one call, and its row-sparse ones by another.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adagrad.kernels.batch import Batch, Prepared
from adagrad.kernels.device_updates import cuda, has_kernels
from adagrad.kernels.inspection import table
from adagrad.kernels.inspection.layout import HOLDER, RANK_AT, TENSOR, TYPE, current_layout, list_item, read_word
from adagrad.kernels.inspection.rows import describe_all, put_row_spans, values_and_indices
from adagrad.kernels.inspection.spans import are_disjoint, concatenate, disjoint, guess_of
from adagrad.kernels.records import COLUMNS, FACTS
from adagrad.kernels.runtime.numba_jit import jit
from adagrad.kernels.validate import is_row_sparse
from adagrad.row_sparse import RowSparse


def prepare(batches: Sequence[Batch], grad_scale: Any, found_inf: Any) -> Prepared | None:
    """Check batches of plain tensors on one CUDA device; None if they are left to the general path.

    No batch may be empty. Parameters and errors as of :func:`adagrad.kernels.general_path.prepare`.
    """
    groups: list[Any] = []
    parts: list[_Part] = []
    for batch in batches:
        found = _inspect(batch)
        if found is None:
            return None
        dense, rows = found
        groups.append(cuda().Group(batch.rule, dense and dense.updates, rows and rows.updates))
        parts += filter(None, found)
    if len(parts) > 1:  # each alone has been checked
        on_one_device = len({part.device for part in parts}) == 1
        if not (on_one_device and are_disjoint(*concatenate([part.spans for part in parts]))):
            return None
    device = batches[0].weights[0].device
    cuda().raise_reported(device)
    return Prepared([cuda().job(groups, device, grad_scale=grad_scale, found_inf=found_inf)], batches)


class _Part(NamedTuple):
    """The updates of a list whose gradients are all dense or all row-sparse, inspected and checked."""

    updates: Any
    """DenseUpdates of :mod:`adagrad.kernels.cuda.dense` or RowUpdates of :mod:`adagrad.kernels.cuda.row_launches`."""
    device: int
    """1 + its index."""
    spans: tuple[np.ndarray, int]
    """Starts and ends of all their memory, what is written to first, and how many spans are written to."""


def _inspect(batch: Batch) -> tuple[_Part | None, _Part | None] | None:
    """The dense and the row-sparse updates of a list, each None if there are none; None if any is not plain."""
    grads = batch.grads
    if not table.fit(batch.weights, grads, batch.histories, batch.masters) or not _are_known(batch.lrs, batch.weights):
        return None
    if not (is_row_sparse(grads[0]) or is_row_sparse(grads[-1])):
        dense = _inspect_dense(batch)
        if dense is not None or len(grads) < 3:
            return None if dense is None else (dense, None)
    if not {Tensor, RowSparse}.issuperset(map(type, grads)):
        return None
    some_dense, some_sparse = batch.by_kind([type(grad) is RowSparse or grad.is_sparse for grad in grads])
    rows = None if some_sparse is None else _inspect_rows(some_sparse)
    if rows is None or some_dense is None:
        return None if rows is None else (None, rows)
    dense = _inspect_dense(some_dense)
    return None if dense is None else (dense, rows)


def _are_known(lrs: list[Any], weights: list[Any]) -> bool:
    """Whether learning rates are numbers, or tensors on the first weight's device."""
    kinds = set(map(type, lrs))
    return kinds == {float} or (kinds == {Tensor} and {lr.device for lr in lrs} == {weights[0].device})


# ---------------------------------------------------------------------------------------------------------------- dense


@jit(holds_gil=True)
def _check_dense(weights: int, grads: int, histories: int, masters: int, layout: Any, row_wise: int, rows: Any,
                 codes: Any, spans: Any, guess: Any) -> int:  # fmt: skip
    """The code that all updates share, -1 if they are left to the general path.

    See :func:`adagrad.kernels.inspection.table.fill` and :func:`adagrad.kernels.inspection.spans.disjoint`.
    """
    common, _ = table.fill(weights, grads, histories, masters, layout, row_wise != 0, rows, codes, spans)
    return common if disjoint(spans[0], spans[1], len(guess) - len(codes), guess) else -1


def _inspect_dense(batch: Batch) -> _Part | None:
    n, masters, layout = len(batch.weights), batch.masters, current_layout()
    if layout is None:
        return None
    guess = guess_of(4 * n if masters else 3 * n)
    rows, codes, spans = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty((2, len(guess)), np.int64)
    common = _check_dense(
        id(batch.weights), id(batch.grads), id(batch.histories), id(masters) if masters else 0, layout,
        1 if batch.rule.row_wise else 0, rows, codes, spans, guess,  # Numba takes longer to tell the type of a bool
    )  # fmt: skip
    device = _device_of(common)
    if not device:
        return None
    updates = cuda().dense.DenseUpdates(rows, codes, batch.lrs, batch.wds, [batch])
    return _Part(updates, device, (spans, len(guess) - n))


def _device_of(code: int) -> int:
    """1 + index of the device whose kernels take what a code stands for; 0 for none, as for the code -1."""
    device = table.decode(code)[0] if code >= 0 else 0
    return device if device and has_kernels() else 0


# ----------------------------------------------------------------------------------------------------------- row-sparse


@jit(holds_gil=True)
def _check_rows(weights: int, grads: int, values: int, indices: int, histories: int, masters: int, layout: Any,
                row_wise: int, facts: Any, codes: Any, spans: Any, guess: Any) -> int:  # fmt: skip
    """As :func:`_check_dense`, for row-sparse updates; see :func:`adagrad.kernels.inspection.rows.describe_rows`.

    ``grads`` is 0 if their shapes are known to be the weights'.
    """
    n = len(codes)
    describe_all(weights, values, histories, masters, indices, layout, row_wise != 0, facts, codes)
    for i in range(n):
        if codes[i] < 0 or codes[i] != codes[0]:
            return -1
        if grads and not _same_shape(list_item(weights, i), list_item(grads, i), layout):
            return -1
    for i in range(n):
        put_row_spans(facts[i], i, n, masters != 0, 0, spans)
    return codes[0] if disjoint(spans[0], spans[1], (3 if masters else 2) * n, guess) else -1


_values_of, _indices_of = operator.methodcaller("_values"), operator.methodcaller("_indices")


@jit(helper=True)
def _same_shape(weight: int, grad: int, layout: Any) -> bool:
    """Whether a sparse tensor has the shape of a plain one, which has at most INLINE dimensions."""
    if read_word(grad, TYPE) != layout[TENSOR]:
        return False
    sizes = read_word(weight + layout[HOLDER], 0) + layout[RANK_AT]
    others = read_word(grad + layout[HOLDER], 0) + layout[RANK_AT]
    rank, d = read_word(sizes, 0), 0
    while d <= rank and read_word(sizes, 8 * d) == read_word(others, 8 * d):  # first their numbers of dimensions
        d += 1
    return bool(d > rank)


def _inspect_rows(batch: Batch) -> _Part | None:
    n, masters, layout = len(batch.weights), batch.masters, current_layout()
    if layout is None:
        return None
    grads = 0 if RowSparse in set(map(type, batch.grads)) else id(batch.grads)
    if grads:
        values, indices = list(map(_values_of, batch.grads)), list(map(_indices_of, batch.grads))
    else:
        values, indices = map(list, zip(*map(values_and_indices, batch.weights, batch.grads), strict=True))
    guess = guess_of(5 * n if masters else 4 * n)
    facts, codes, spans = np.zeros((n, FACTS), np.int64), np.empty(n, np.int64), np.empty((2, len(guess)), np.int64)
    common = _check_rows(
        id(batch.weights), grads, id(values), id(indices), id(batch.histories), id(masters) if masters else 0,
        layout, 1 if batch.rule.row_wise else 0, facts, codes, spans, guess,
    )  # fmt: skip
    device = _device_of(common)
    if not device:
        return None
    tensors = [*zip(batch.weights, indices, values, batch.histories, masters or [None] * n, strict=True)]
    updates = cuda().row_launches.RowUpdates(facts, [common] * n, batch.lrs, batch.wds, tensors)
    return _Part(updates, device, (spans, (3 if masters else 2) * n))
