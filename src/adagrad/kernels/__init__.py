"""Dispatch: validate a list of updates, choose the kernels and run them.

:mod:`adagrad.kernels.fast_path` is for plain arrays on the CPU; :mod:`adagrad.kernels.paths` finds another way for the
rest.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from adagrad.kernels import expressions
from adagrad.kernels.batch import NUMPY_ARRAYS, of_states
from adagrad.kernels.runtime import cache_folder
from adagrad.kernels.runtime.interrupts import came_late, mark_late, uninterrupted
from adagrad.kernels.validate import check_gradient, is_row_sparse
from adagrad.rule import Array, Rule, is_torch

__all__ = ["came_late", "check", "check_gradient", "is_row_sparse", "update"]


@functools.cache
def _path(name: str) -> Any:
    """The module ``fast_path``, ``paths`` or ``general_path``, imported at first use, because that of Numba is slow."""
    cache_folder.find()  # a warning names the caller, who is not seen from the import
    return uninterrupted(lambda: importlib.import_module(f"{__name__}.{name}"))


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
    states : list of histories or pairs (master copy, history)
    lrs, wds : sequences with an entry for each weight, or one for all
    rule : Rule
    fused : bool
        Whether to use the kernels; else the array expressions of :mod:`adagrad.rule`.
    threads : int, optional
        The most threads to use; by default as many as Numba may use.

    Raises
    ------
    TypeError, ValueError, IndexError
        Names the argument, its value and the rule it broke; nothing has changed.
    MemoryError
        No memory is left. Of several row-sparse or strided weights, some may have been updated.
    """
    batch, is_done = of_states(weights, grads, states, lrs, wds, rule), False
    try:
        is_done = fused and _path("fast_path").update_plain(batch, [], threads)
        if not is_done:
            (_path("paths").prepare([batch], [], threads) if fused else expressions.prepare(batch)).run()
            is_done = True
        if not NUMPY_ARRAYS.issuperset(map(type, weights)):
            _mark_changed(weights, states)
    except BaseException as interrupt:
        if is_done:
            mark_late(interrupt)
        raise


def _mark_changed(weights: list[Array], states: list[Any]) -> None:
    """Tell autograd of the weights and states that are tensors."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if any(issubclass(kind, (tuple, list)) for kind in set(map(type, states))):
        states = [each for state in states for each in (state if isinstance(state, (tuple, list)) else [state])]
    written = [*weights, *states]
    if set(map(type, written)) != {torch.Tensor}:
        written = [each for each in written if is_torch(each)]
    if written:
        from adagrad.kernels.tensors.versions import mark_changed

        mark_changed(written)


def check(
    weights: list[Array],
    grads: list[Any],
    states: list[Any],
    lrs: Sequence[Any],
    wds: Sequence[Any],
    rule: Rule,
    *,
    fused: bool,
    positions: Sequence[int],
    wait: bool,
) -> None:
    """Raise what :func:`update` would raise for a list of updates, and change nothing.

    Messages number the updates by ``positions``, their positions in the caller's lists. The kernels of CUDA devices
    check their row ids only with ``wait``, because that takes waiting for them.
    """
    batch = of_states(weights, grads, states, lrs, wds, rule, positions)
    if fused:
        _path("general_path").prepare([batch], wait=wait, check_only=not wait)
    else:
        expressions.prepare(batch)
