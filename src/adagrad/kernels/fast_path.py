"""The fast path for a list of updates: one call of compiled code, if all its arrays are plain and on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adagrad.kernels import dense_lists, row_lists
from adagrad.kernels.batch import Batch
from adagrad.kernels.inspection import table
from adagrad.kernels.mixed_lists import dense_part
from adagrad.kernels.validate import is_row_sparse, seems_row_sparse


def update(batches: Sequence[Batch], steps: list[Any], threads: int | None) -> bool:
    """Do :func:`update_plain` or, for several batches, :func:`update_batches`."""
    return update_plain(batches[0], steps, threads) if len(batches) == 1 else update_batches(batches, steps, threads)


def update_plain(batch: Batch, steps: list[Any], threads: int | None) -> bool:
    """Check and update a batch, if all of it is plain and on the CPU.

    ``steps`` are the weights' update counts, tensors of one number, which are advanced by 1; or an empty list. False
    if nothing has changed and the batch is left to :func:`adagrad.kernels.paths.prepare`.

    Raises
    ------
    IndexError, MemoryError
        As :func:`adagrad.kernels.row_lists.update`.
    """
    if not _are_plain(batch):
        return False
    grads, n = batch.grads, len(batch.grads)
    is_sparse = seems_row_sparse(grads[0])
    if n == 1 or seems_row_sparse(grads[-1]) == is_sparse:
        update = row_lists.update if is_sparse else dense_lists.update
        done = update(batch, steps, threads)
        if done or n < 3:
            return done
    return update_batches([batch], steps, threads)


def update_batches(batches: Sequence[Batch], steps: list[Any], threads: int | None) -> bool:
    """Check and update batches with both kinds of gradients by one call of compiled code; False if nothing changed.

    Row-sparse gradients must all be in one batch. ``steps`` are the counts of all weights, in any order.
    """
    if len(batches) > 1 and not any(seems_row_sparse(batch.grads[0]) for batch in batches):
        return False  # most likely, all are dense, and asking each would take a sixth of the time of the general path
    of_batches = [list(map(is_row_sparse, batch.grads)) for batch in batches]
    if sum(map(any, of_batches)) != 1 or all(map(all, of_batches)):
        return False
    sparse: list[Batch] = []
    dense: list[Batch] = []
    for batch, are_sparse in zip(batches, of_batches, strict=True):
        if not _are_plain(batch) or getattr(batch.weights[0], "is_cuda", False):
            return False
        some_dense, some_sparse = batch.by_kind(are_sparse)
        dense += [some_dense] if some_dense else []
        sparse += [some_sparse] if some_sparse else []
    beside = dense_part(dense)
    return beside is not None and row_lists.update(sparse[0], steps, threads, beside)


def _are_plain(batch: Batch) -> bool:
    """Whether there is one of each for each weight, or one rate for all, and each lr is a float, not a tensor."""
    if not table.fit(batch.weights, batch.grads, batch.histories, batch.masters):
        return False
    lrs, wds, n = batch.lrs, batch.wds, len(batch.weights)
    if len(lrs) == len(wds) == 1:
        return type(lrs[0]) is float
    return len(lrs) in (1, n) and len(wds) in (1, n) and set(map(type, lrs)) == {float}
