"""Lists of updates of plain tensors on one CUDA device, inspected and checked by compiled code.

What :mod:`adagrad.kernels.fast_path` is on the CPU: the usual list takes a shorter way to the kernels than through
:mod:`adagrad.kernels.general_path`, to which all else is left, and every error. A list with gradients of both kinds is
inspected by two calls.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adagrad.kernels import device_updates, table
from adagrad.kernels.batch import Batch, Prepared, some
from adagrad.kernels.counts import find_counts
from adagrad.kernels.device_updates import cuda, has_kernels
from adagrad.kernels.layout import HOLDER, RANK_AT, TENSOR, TYPE, current_layout, list_item, read_word
from adagrad.kernels.numba_jit import jit
from adagrad.kernels.records import COLUMNS, FACTS
from adagrad.kernels.rows import describe_all, put_row_spans
from adagrad.kernels.spans import are_disjoint, concatenate, disjoint, guess_of
from adagrad.kernels.validate import is_row_sparse


class Inspected(NamedTuple):
    """A list of plain updates on one device, which may all be carried out."""

    dense: Any
    """DenseUpdates of :mod:`adagrad.kernels.cuda_dense`; None if there are none."""
    rows: Any
    """RowUpdates of :mod:`adagrad.kernels.cuda_row_lists`; None if there are none."""
    counts: np.ndarray | None
    """Where the update counts are, as :func:`adagrad.kernels.counts.advance` takes them; None if they are not plain."""


def inspect(batch: Batch, steps: list[Any]) -> Inspected | None:
    """Inspect and check a list; None if it is left to the general path.

    ``steps`` are the weights' update counts, tensors of one number.
    """
    grads = batch.grads
    if not table.fit(batch.weights, grads, batch.histories, batch.masters) or not _are_known(batch.lrs, batch.weights):
        return None
    if not (is_row_sparse(grads[0]) or is_row_sparse(grads[-1])):
        dense = _inspect_dense(batch, steps)
        if dense is not None or len(grads) < 3:
            return None if dense is None else Inspected(dense.updates, None, dense.counts)
    if set(map(type, grads)) != {Tensor}:
        return None
    sparse = [i for i, grad in enumerate(grads) if grad.is_sparse]
    if len(sparse) == len(grads):
        rows = _inspect_rows(batch, steps)
        return None if rows is None else Inspected(None, rows.updates, rows.counts)
    return _inspect_mixed(batch, steps, sparse) if sparse else None


def _are_known(lrs: list[Any], weights: list[Any]) -> bool:
    """Whether learning rates are numbers, or tensors on the first weight's device."""
    kinds = set(map(type, lrs))
    return kinds == {float} or (kinds == {Tensor} and {lr.device for lr in lrs} == {weights[0].device})


def prepare(batch: Batch, inspected: Inspected, grad_scale: Any, found_inf: Any) -> Prepared:
    """As :func:`adagrad.kernels.general_path.prepare` for a list that was inspected."""
    kernels, device = cuda(), batch.weights[0].device
    kernels.raise_reported(device)
    group = kernels.Group(batch.rule, inspected.dense, inspected.rows)
    return Prepared([device_updates.prepare([group], device, grad_scale, found_inf)], batch)


class _Part(NamedTuple):
    """The updates of a list whose gradients are all dense or all row-sparse."""

    updates: Any
    counts: np.ndarray | None
    device: int
    spans: tuple[np.ndarray, int]
    """Starts and ends of all their memory, what is written to first, and how many spans are written to."""


def _inspect_mixed(batch: Batch, steps: list[Any], sparse: list[int]) -> Inspected | None:
    """:func:`inspect` for a list of both kinds; those at the positions ``sparse`` are row-sparse."""
    n, are_sparse = len(steps), {*sparse}
    dense = [i for i in range(n) if i not in are_sparse]
    first = _inspect_dense(_some(batch, dense), some(steps, dense))
    second = None if first is None else _inspect_rows(_some(batch, sparse), some(steps, sparse))
    if first is None or second is None or first.device != second.device:
        return None
    if not are_disjoint(*concatenate([first.spans, second.spans])):
        return None
    counts = None
    if first.counts is not None and second.counts is not None:
        counts = np.empty(n, np.int64)
        counts[dense], counts[sparse] = first.counts, second.counts
    return Inspected(first.updates, second.updates, counts)


def _some(batch: Batch, which: list[int]) -> Batch:
    lists = batch.weights, batch.grads, batch.histories, batch.masters, batch.lrs, batch.wds
    return Batch(batch.rule, *(some(values, which) for values in lists))


# ---------------------------------------------------------------------------------------------------------------- dense


@jit(holds_gil=True)
def _check_dense(weights: int, grads: int, histories: int, masters: int, steps: int, layout: Any, row_wise: int,
                 rows: Any, codes: Any, spans: Any, guess: Any, step_at: Any) -> Any:  # fmt: skip
    """The code that all updates share, -1 if it is left to the general path; whether the counts are plain.

    See :func:`adagrad.kernels.table.fill`, :func:`adagrad.kernels.spans.disjoint` and
    :func:`adagrad.kernels.counts.find_counts`.
    """
    common, _ = table.fill(weights, grads, histories, masters, layout, row_wise != 0, rows, codes, spans)
    if common < 0 or not disjoint(spans[0], spans[1], len(guess) - len(codes), guess):
        return -1, False
    return common, find_counts(steps, layout, step_at)


def _inspect_dense(batch: Batch, steps: list[Any]) -> _Part | None:
    n, masters, layout = len(batch.weights), batch.masters, current_layout()
    if layout is None:
        return None
    guess = guess_of(4 * n if masters else 3 * n)
    rows, codes, step_at = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    spans = np.empty((2, len(guess)), np.int64)
    common, found = _check_dense(
        id(batch.weights), id(batch.grads), id(batch.histories), id(masters) if masters else 0, id(steps),
        # Numba takes longer to tell the type of a bool.
        layout, 1 if batch.rule.row_wise else 0, rows, codes, spans, guess, step_at,
    )  # fmt: skip
    device = _device_of(common)
    if not device:
        return None
    updates = cuda().cuda_dense.DenseUpdates(rows, codes, batch.lrs, batch.wds, [batch])
    return _Part(updates, step_at if found else None, device, (spans, len(guess) - n))


def _device_of(code: int) -> int:
    """1 + index of the device whose kernels take what a code stands for; 0 for none, as for the code -1."""
    device = table.decode(code)[0] if code >= 0 else 0
    return device if device and has_kernels() else 0


# ----------------------------------------------------------------------------------------------------------- row-sparse


@jit(holds_gil=True)
def _check_rows(weights: int, grads: int, values: int, indices: int, histories: int, masters: int, steps: int,
                layout: Any, row_wise: int, facts: Any, codes: Any, spans: Any, guess: Any, step_at: Any
                ) -> Any:  # fmt: skip
    """The same for row-sparse updates; see :func:`adagrad.kernels.rows.describe_rows`."""
    n = len(codes)
    describe_all(weights, values, histories, masters, indices, layout, row_wise != 0, facts, codes)
    for i in range(n):
        if codes[i] < 0 or codes[i] != codes[0] or not _same_shape(list_item(weights, i), list_item(grads, i), layout):
            return -1, False
    for i in range(n):
        put_row_spans(facts[i], i, n, masters != 0, 0, spans)
    if not disjoint(spans[0], spans[1], (3 if masters else 2) * n, guess):
        return -1, False
    return codes[0], find_counts(steps, layout, step_at)


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


def _inspect_rows(batch: Batch, steps: list[Any]) -> _Part | None:
    n, masters, layout = len(batch.weights), batch.masters, current_layout()
    if layout is None:
        return None
    values, indices = list(map(_values_of, batch.grads)), list(map(_indices_of, batch.grads))
    guess = guess_of(5 * n if masters else 4 * n)
    facts, codes, step_at = np.zeros((n, FACTS), np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    spans = np.empty((2, len(guess)), np.int64)
    common, found = _check_rows(
        id(batch.weights), id(batch.grads), id(values), id(indices), id(batch.histories),
        id(masters) if masters else 0, id(steps), layout, 1 if batch.rule.row_wise else 0, facts, codes, spans,
        guess, step_at,
    )  # fmt: skip
    device = _device_of(common)
    if not device:
        return None
    tensors = [*zip(batch.weights, indices, values, batch.histories, masters or [None] * n, strict=True)]
    updates = cuda().cuda_row_lists.RowUpdates(facts, [common] * n, batch.lrs, batch.wds, tensors)
    return _Part(updates, step_at if found else None, device, (spans, (3 if masters else 2) * n))
