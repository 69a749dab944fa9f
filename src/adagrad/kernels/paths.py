"""The paths that are tried, in this order, for a call that the fast path did not take."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from adagrad.kernels import fast_path, general_path
from adagrad.kernels.batch import Batch, Prepared
from adagrad.kernels.gradient_order import in_weights_order
from adagrad.kernels.runtime.interrupts import uninterrupted

DONE = Prepared([])
"""What :func:`prepare` returns if it has carried out the call, step counts included."""


def prepare(
    batches: Sequence[Batch],
    steps: list[Any],
    threads: int | None,
    grad_scale: Any = None,
    found_inf: Any = None,
    *,
    widen: Callable[[Sequence[Batch]], bool] | None = None,
) -> Prepared:
    """Check updates that :func:`adagrad.kernels.fast_path.update` did not take, or carry them out and return DONE.

    The latter if it takes them with gradients in another order, or widened.

    ``widen`` changes the dtypes of gradients, in place of those in the batches, and returns whether it did. Other
    parameters and errors as of :func:`adagrad.kernels.fast_path.update` and :func:`general_path.prepare`.
    """
    is_plain, is_on_device = seem_plain(batches, grad_scale, found_inf), all(map(is_on_cuda, batches))
    prepared: Prepared | None = None
    if is_on_device:
        prepared = _device_lists().prepare(batches, grad_scale, found_inf)
    if prepared is None:
        are_widened = widen is not None and widen(batches)
        ordered = in_weights_order(batches) if is_plain or is_on_device else batches
        is_new = are_widened or ordered is not batches
        if is_new and is_on_device:
            prepared = _device_lists().prepare(ordered, grad_scale, found_inf)
        elif is_new and is_plain and fast_path.update(ordered, steps, threads):
            prepared = DONE
    if prepared is None:
        prepared = general_path.prepare(batches, threads=threads, grad_scale=grad_scale, found_inf=found_inf)
    return prepared


def seem_plain(batches: Sequence[Batch], grad_scale: Any, found_inf: Any) -> bool:
    """Whether the fast path may take the updates: none is on a CUDA device, and no gradient is to be scaled."""
    return grad_scale is None and found_inf is None and not any(map(is_on_cuda, batches))


def is_on_cuda(batch: Batch) -> bool:
    """Whether the first weight is on a CUDA device."""
    return bool(batch.weights) and getattr(batch.weights[0], "is_cuda", False)


@functools.cache
def _device_lists() -> Any:
    """The module, which imports torch; an interrupt within its import would break Numba."""
    return uninterrupted(lambda: importlib.import_module("adagrad.kernels.device_lists"))
