"""Gradients of NumPy in another order than their weights', as of a transposition, copied for the fast path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
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
    pairs = enumerate(zip(batch.weights, batch.grads, strict=True))
    odd = [i for i, (weight, grad) in pairs if _is_odd(weight, grad)]
    if not odd or sum(batch.grads[i].size for i in odd) > MOST_COPIED:
        return None
    read = _owners(batch.grads[i] for i in odd)
    written = _owners([*batch.weights, *batch.histories, *(m for m in batch.masters if m is not None)])
    if None in read or None in written or not read.isdisjoint(written):
        return None
    grads = [*batch.grads]
    for i in odd:
        grads[i] = np.empty_like(batch.weights[i], grads[i].dtype)
        if not _same_order(batch.weights[i], grads[i]):  # the weight has gaps
            return None
        grads[i][...] = batch.grads[i]
    return replace(batch, grads=grads)


def _is_odd(weight: Any, grad: Any) -> bool:
    is_dense = type(weight) is np.ndarray is type(grad) and weight.shape == grad.shape
    return is_dense and not _same_order(weight, grad)


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
