"""The fast path for a list of updates: one call of compiled code, if all its arrays are plain and on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adagrad.kernels import dense_lists, row_lists, table
from adagrad.kernels.batch import Batch
from adagrad.kernels.cpu_rule import rate_table
from adagrad.kernels.mixed_lists import dense_part
from adagrad.kernels.validate import is_row_sparse, seems_row_sparse
from adagrad.rule import Rule


def update_plain(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], steps: list[Any],
                 lrs: Any, wds: Any, rule: Rule, threads: int | None, places: Sequence[int] = ()) -> bool:  # fmt: skip
    """Check and update a list, if all of it is plain and on the CPU. Messages number the weights by ``places``, if any.

    ``steps`` are the weights' update counts, tensors of one number, which are advanced by 1; or an empty list. False
    if nothing has changed and the list is left to :func:`adagrad.kernels.general_path.prepare`.

    Raises
    ------
    IndexError, MemoryError
        As :func:`adagrad.kernels.row_lists.update`.
    """
    if not (table.fit(weights, grads, histories, masters) and _are_plain(lrs, wds, len(weights))):
        return False
    is_sparse, n = seems_row_sparse(grads[0]), len(grads)
    if n == 1 or seems_row_sparse(grads[-1]) == is_sparse:
        if is_sparse:
            done = row_lists.update(weights, grads, histories, masters, steps, lrs, wds, rule, threads, places=places)
        else:
            rates = rate_table(lrs, wds, rule)
            done = dense_lists.update(weights, grads, histories, masters, steps, rates, rule, threads)
        if done or n < 3:
            return done
    return update_batches([Batch(rule, weights, grads, histories, masters, lrs, wds, places)], steps, threads)


def update_batches(batches: Sequence[Batch], steps: list[Any], threads: int | None) -> bool:
    """The same for updates of both kinds, each under the rule of its batch; False for others.

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
        weights, n = batch.weights, len(batch.weights)
        if not (
            table.fit(weights, batch.grads, batch.histories, batch.masters) and _are_plain(batch.lrs, batch.wds, n)
        ):
            return False
        if getattr(weights[0], "is_cuda", False):
            return False
        some_dense, some_sparse = batch.by_kind(are_sparse)
        dense += [some_dense] if some_dense else []
        sparse += [some_sparse] if some_sparse else []
    beside, rows = dense_part(dense), sparse[0]
    return beside is not None and row_lists.update(
        rows.weights, rows.grads, rows.histories, rows.masters, steps, rows.lrs, rows.wds, rows.rule, threads, beside,
        rows.places,
    )  # fmt: skip


def _are_plain(lrs: Sequence[Any], wds: Sequence[Any], n: int) -> bool:
    """Whether there is a rate for each weight, or one for all, and each lr is a float: a tensor may be on a device."""
    if len(lrs) == len(wds) == 1:
        return type(lrs[0]) is float
    return len(lrs) in (1, n) and len(wds) in (1, n) and set(map(type, lrs)) == {float}
