"""The fast path for a list of updates: one call of compiled code, if all its arrays are plain and on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adagrad.kernels import dense_lists, row_lists, table
from adagrad.kernels.batch import some
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
    return _update_mixed(weights, grads, histories, masters, steps, lrs, wds, rule, threads, places)


def _are_plain(lrs: Sequence[Any], wds: Sequence[Any], n: int) -> bool:
    """Whether there is a rate for each weight, or one for all, and each lr is a float: a tensor may be on a device."""
    if len(lrs) == len(wds) == 1:
        return type(lrs[0]) is float
    return len(lrs) in (1, n) and len(wds) in (1, n) and set(map(type, lrs)) == {float}


def _update_mixed(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], steps: list[Any],
                  lrs: Any, wds: Any, rule: Rule, threads: int | None, places: Sequence[int]) -> bool:  # fmt: skip
    """The same for a list with gradients of both kinds; False for others."""
    if getattr(weights[0], "is_cuda", False):
        return False
    is_sparse = list(map(is_row_sparse, grads))
    sparse = [i for i, each in enumerate(is_sparse) if each]
    dense = [i for i, each in enumerate(is_sparse) if not each]
    if not (sparse and dense):
        return False
    lists = weights, grads, histories, masters, lrs, wds
    w, g, h, m, lr, wd = (some(values, dense) for values in lists)
    beside = dense_part(w, g, h, m, rate_table(lr, wd, rule), rule)
    if beside is None:
        return False
    w, g, h, m, lr, wd = (some(values, sparse) for values in lists)
    named = [places[i] for i in sparse] if places else sparse
    return row_lists.update(w, g, h, m, steps, lr, wd, rule, threads, beside, named)
