"""Gradients of NumPy in another order than their weights', as of a transposition, copied for the fast path."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from adagrad.kernels.batch import Batch

MOST_COPIED = 2**22
"""Elements of gradients that are copied in one call; with more, memory counts for more than time."""


def in_weights_order(batch: Batch) -> Batch | None:
    """The same updates with gradients in the order of their weights; None if all are, or if another check must decide.

    Copies would hide that a gradient shares memory with what is written. So all of that must be memory of arrays that
    are known, and gradients of others.
    """
    grads, copied = [*batch.grads], 0
    for i, (weight, grad) in enumerate(zip(batch.weights, grads, strict=True)):
        if type(weight) is np.ndarray is type(grad) and weight.shape == grad.shape and not _same_order(weight, grad):
            copied += grad.size
            if copied > MOST_COPIED:
                return None
            grads[i] = np.empty_like(weight, grad.dtype)
            if not _same_order(weight, grads[i]):  # the weight has gaps
                return None
            grads[i][...] = grad
    if not copied:
        return None
    read = _owners(old for old, new in zip(batch.grads, grads, strict=True) if old is not new)
    written = _owners([*batch.weights, *batch.histories, *(m for m in batch.masters if m is not None)])
    if None in read or None in written or not read.isdisjoint(written):
        return None
    return Batch(batch.rule, batch.weights, grads, batch.histories, batch.masters, batch.lrs, batch.wds,
                 batch.positions, batch.names_at)  # fmt: skip


def _same_order(a: np.ndarray, b: np.ndarray) -> bool:
    if a.itemsize == b.itemsize:
        return a.strides == b.strides
    return all(s * b.itemsize == t * a.itemsize for s, t in zip(a.strides, b.strides, strict=True))


def _owners(arrays: Iterable[Any]) -> set[int | None]:
    """The identities of the arrays whose memory it is; None for memory of something else, or what is no array."""
    return {_owner(array) for array in arrays}


def _owner(array: Any) -> int | None:
    while type(array) is np.ndarray and array.base is not None:
        array = array.base
    return id(array) if type(array) is np.ndarray and array.flags.owndata else None
