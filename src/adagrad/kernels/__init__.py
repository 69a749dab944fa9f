"""Dispatch: one call for a list of updates, see :mod:`adagrad.kernels.quick` and :mod:`adagrad.kernels.call`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from adagrad.kernels import expressions
from adagrad.kernels.batch import Prepared, of_states
from adagrad.kernels.checked import any_row_sparse, gradient, is_row_sparse
from adagrad.kernels.outcomes import came_late
from adagrad.rule import Array, Rule, is_torch

__all__ = ["any_row_sparse", "came_late", "gradient", "is_row_sparse", "prepare", "update"]


_ARRAYS = {np.ndarray}


@functools.cache
def _quick() -> Any:
    """The quick way, imported at the first use: Numba takes its time."""
    from adagrad.kernels import quick

    return quick


@functools.cache
def _call() -> Any:
    """The ordinary way, likewise."""
    from adagrad.kernels import call

    return call


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
    """Check a list of updates and carry it out, in place.

    Parameters
    ----------
    weights : list of arrays
    grads : list of arrays, RowSparse or sparse COO tensors
    states : list of histories, or of pairs (master copy, history)
    lrs, wds : sequences with an entry for each weight, or one for all
    rule : Rule
    fused : bool
        Whether to use the kernels; else the array expressions of :mod:`adagrad.rule`.
    threads : int, optional
        At most so many threads; by default as many as Numba may use.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument, its value and the rule it broke; then nothing has changed.
    """
    if not (fused and _quick().update_plain(weights, grads, states, [], [], lrs, wds, rule, threads)):
        prepare(weights, grads, states, lrs, wds, rule, fused=fused, threads=threads).run()
    if set(map(type, weights)) != _ARRAYS and (tensors := [weight for weight in weights if is_torch(weight)]):
        from adagrad.kernels.tensor_views import mark_changed

        mark_changed(tensors)


def prepare(
    weights: list[Array],
    grads: list[Any],
    states: list[Any],
    lrs: Sequence[Any],
    wds: Sequence[Any],
    rule: Rule,
    *,
    fused: bool,
    threads: int | None = None,
    places: Sequence[int] = (),
) -> Prepared:
    """Check a list of updates, which :meth:`Prepared.run` carries out; parameters and errors as in :func:`update`.

    Messages call the updates by their ``places``, if there are any, in lists that these are parts of.
    """
    batch = of_states(weights, grads, states, lrs, wds, rule, places)
    if not fused:
        return expressions.prepare(batch)
    prepared: Prepared = _call().prepare([batch], threads=threads)
    return prepared
