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
    *,
    widen: Callable[[Sequence[Batch]], bool] | None = None,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> Prepared:
    """Check updates that :func:`adagrad.kernels.fast_path.update` did not take, or carry them out and return DONE.

    The latter if it takes them with gradients in another order, or widened.

    ``widen`` changes the dtypes of gradients, in place of those in the batches, and returns whether it did. Other
    parameters and errors as of :func:`adagrad.kernels.fast_path.update` and :func:`general_path.prepare`.
    """
    are_on_cuda = on_cuda(batches)
    prepared = _prepare_lists(batches, grad_scale, found_inf) if all(are_on_cuda) else None
    if prepared is not None:
        return prepared
    is_plain = not any(are_on_cuda) and grad_scale is None and found_inf is None
    are_widened = widen is not None and widen(batches)
    ordered = in_weights_order(batches) if is_plain or all(are_on_cuda) else batches
    if are_widened or ordered is not batches:
        if all(are_on_cuda):
            prepared = _prepare_lists(ordered, grad_scale, found_inf)
        elif is_plain and fast_path.update(ordered, steps, threads):
            prepared = DONE
        if prepared is not None:
            return prepared
    return general_path.prepare(batches, threads=threads, grad_scale=grad_scale, found_inf=found_inf)


def on_cuda(batches: Sequence[Batch]) -> list[bool]:
    """Whether the first weight of each batch is on a CUDA device."""
    return [is_on_cuda(batch.weights[0]) if batch.weights else False for batch in batches]


def is_on_cuda(weight: Any) -> bool:
    return bool(getattr(weight, "is_cuda", False))


def _prepare_lists(batches: Sequence[Batch], grad_scale: Any, found_inf: Any) -> Prepared | None:
    prepared: Prepared | None = _device_lists().prepare(batches, grad_scale, found_inf)
    return prepared


@functools.cache
def _device_lists() -> Any:
    """The module, which imports torch; an interrupt within its import would break Numba."""
    return uninterrupted(lambda: importlib.import_module("adagrad.kernels.device_lists"))
