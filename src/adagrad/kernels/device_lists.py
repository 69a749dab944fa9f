"""Lists of updates of plain tensors on one CUDA device, inspected and checked by one call of compiled code.

What :mod:`adagrad.kernels.fast_path` is on the CPU: the usual list, all dense or all row-sparse, takes a shorter way to
the kernels than through :mod:`adagrad.kernels.general_path`, to which all else is left, and every error.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adagrad.kernels import table
from adagrad.kernels.batch import Batch, Prepared
from adagrad.kernels.counts import find_counts
from adagrad.kernels.device_updates import cuda, has_kernels
from adagrad.kernels.layout import HOLDER, RANK_AT, TENSOR, TYPE, current_layout, list_item, read_word
from adagrad.kernels.memory import keep_alive, word_table
from adagrad.kernels.numba_jit import jit
from adagrad.kernels.records import COLUMNS, FACTS
from adagrad.kernels.rows import describe_all, put_row_spans
from adagrad.kernels.spans import disjoint, guess_of
from adagrad.kernels.validate import is_row_sparse


class Inspected(NamedTuple):
    """A list of plain updates on one device, which may all be carried out."""

    updates: Any
    """DenseUpdates or RowUpdates of :mod:`adagrad.kernels.cuda`."""
    counts: np.ndarray | None
    """Where the update counts are, as :func:`adagrad.kernels.counts.advance` takes them; None if they are not plain."""


def inspect(batch: Batch, steps: list[Any]) -> Inspected | None:
    """Inspect and check a list; None if it is left to the general path.

    ``steps`` are the weights' update counts, tensors of one number.
    """
    if set(map(type, batch.lrs)) != {float}:
        return None
    if not table.fit(batch.weights, batch.grads, batch.histories, batch.masters):
        return None
    grads = batch.grads
    if not is_row_sparse(grads[0]):
        return None if is_row_sparse(grads[-1]) else _inspect_dense(batch, steps)
    are_sparse = set(map(type, grads)) == {Tensor} and all(map(_is_sparse, grads))
    return _inspect_rows(batch, steps) if are_sparse else None


_is_sparse = operator.attrgetter("is_sparse")


def prepare(batch: Batch, inspected: Inspected) -> Prepared:
    """As :func:`adagrad.kernels.general_path.prepare` for a list that was inspected."""
    kernels, device, updates = cuda(), batch.weights[0].device, inspected.updates
    kernels.raise_reported(device)
    is_dense = isinstance(updates, kernels.cuda_dense.DenseUpdates)
    group = kernels.Group(batch.rule, updates if is_dense else None, None if is_dense else updates)
    return Prepared([kernels.prepare([group], device, grad_scale=None, found_inf=None)], batch)


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


def _inspect_dense(batch: Batch, steps: list[Any]) -> Inspected | None:
    n, masters, layout = len(batch.weights), batch.masters, current_layout()
    if layout is None:
        return None
    guess = guess_of(4 * n if masters else 3 * n)
    rows, codes, step_at = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    common, found = _check_dense(
        id(batch.weights), id(batch.grads), id(batch.histories), id(masters) if masters else 0, id(steps),
        # Numba takes longer to tell the type of a bool.
        layout, 1 if batch.rule.row_wise else 0, rows, codes, np.empty((2, len(guess)), np.int64), guess, step_at,
    )  # fmt: skip
    if not _is_on_device(common):
        return None
    updates = cuda().cuda_dense.DenseUpdates(rows, codes, batch.lrs, batch.wds, [batch])
    return Inspected(updates, step_at if found else None)


def _is_on_device(code: int) -> bool:
    """Whether the kernels for a device take what a code stands for, -1 for nothing."""
    return code >= 0 and table.decode(code)[0] > 0 and has_kernels()


# ----------------------------------------------------------------------------------------------------------- row-sparse


@jit(holds_gil=True)
def _check_rows(weights: int, grads: int, values: int, indices: int, histories: int, masters: int, steps: int,
                layout: Any, row_wise: int, facts: Any, codes: Any, guess: Any, step_at: Any) -> Any:  # fmt: skip
    """The same for row-sparse updates; see :func:`adagrad.kernels.rows.describe_rows`."""
    n = len(codes)
    describe_all(weights, values, histories, masters, indices, layout, row_wise != 0, facts, codes)
    for i in range(n):
        if codes[i] < 0 or codes[i] != codes[0] or not _same_shape(list_item(weights, i), list_item(grads, i), layout):
            return -1, False
    spans, written = word_table(2, len(guess)), (3 if masters else 2) * n
    for i in range(n):
        put_row_spans(facts[i], i, n, masters != 0, 0, spans)
    are_disjoint = disjoint(spans[0], spans[1], written, guess)
    keep_alive(spans)
    if not are_disjoint:
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


def _inspect_rows(batch: Batch, steps: list[Any]) -> Inspected | None:
    n, masters, layout = len(batch.weights), batch.masters, current_layout()
    if layout is None:
        return None
    values, indices = list(map(_values_of, batch.grads)), list(map(_indices_of, batch.grads))
    guess = guess_of(5 * n if masters else 4 * n)
    facts, codes, step_at = np.zeros((n, FACTS), np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    common, found = _check_rows(
        id(batch.weights), id(batch.grads), id(values), id(indices), id(batch.histories),
        id(masters) if masters else 0, id(steps), layout, 1 if batch.rule.row_wise else 0, facts, codes, guess, step_at,
    )  # fmt: skip
    if not _is_on_device(common):
        return None
    tensors = [*zip(batch.weights, indices, values, batch.histories, masters or [None] * n, strict=True)]
    updates = cuda().cuda_row_lists.RowUpdates(facts, [common] * n, batch.lrs, batch.wds, tensors)
    return Inspected(updates, step_at if found else None)
