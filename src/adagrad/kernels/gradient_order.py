"""Gradients in another order than their weights', as of a transposition, copied for the fast path."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adagrad.kernels.batch import Batch
from adagrad.rule import is_torch

MOST_COPIED = 2**22
"""Elements of gradients that are copied in one call; with more, memory counts for more than time."""


def in_weights_order(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The same updates with gradients in the order of their weights; ``batches`` if all are, or for another check.

    Copies would hide that a gradient shares memory with what is written. So all of that must be memory of arrays that
    are known, and gradients of others. Tensors are asked by :func:`adagrad.kernels.tensors.views.real_views`.
    """
    if any(is_torch(batch.weights[0]) for batch in batches if batch.weights):
        from adagrad.kernels.tensors.views import real_views

        return real_views(batches)
    ordered = [_copied(batch) or batch for batch in batches]
    return ordered if any(map(operator.is_not, ordered, batches)) else batches


def _copied(batch: Batch) -> Batch | None:
    """A batch of NumPy's arrays with its gradients in order; None if there is nothing to copy, or it must not be."""
    pairs = enumerate(zip(batch.weights, batch.grads, strict=True))
    odd = [i for i, (weight, grad) in pairs if _is_odd(weight, grad)]
    if not odd or sum(batch.grads[i].size for i in odd) > MOST_COPIED:
        return None
    read = _owners(batch.grads[i] for i in odd)
    written = _owners([*batch.weights, *batch.histories, *(m for m in batch.masters if m is not None)])
    if None in read or None in written or not read.isdisjoint(written):
        return None
    if any(has_gaps(w.shape, w.strides, w.itemsize) for w in (batch.weights[i] for i in odd)):
        return None
    grads = [*batch.grads]
    for i in odd:
        grads[i] = np.empty_like(batch.weights[i], grads[i].dtype)
        grads[i][...] = batch.grads[i]
    return replace(batch, grads=grads)


def has_gaps(shape: Sequence[int], strides: Sequence[int], unit: int) -> bool:
    """Whether the elements of an array, which is not empty, are not all the memory from its first to its last."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + unit != math.prod(shape) * unit


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
