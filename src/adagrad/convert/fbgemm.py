"""``momentum1`` of FBGEMM's table-batched embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adagrad import checks
from adagrad.adagrad import AdaGrad
from adagrad.convert.arrays import History, States, from_arrays, history, to_arrays
from adagrad.convert.trajectory import require_rule
from adagrad.rates import Index


def from_fbgemm(momentum1: Iterable[Any], optimizer: AdaGrad) -> States:
    """Convert FBGEMM states: EXACT_ADAGRAD for ``AdaGrad``, EXACT_ROWWISE_ADAGRAD for ``GroupAdaGrad``.

    Parameters
    ----------
    momentum1 : iterable
        ``split_optimizer_states()``, ``get_optimizer_state()``, or only the arrays: one for each table, of shape
        ``(rows, columns)`` or, if row-wise, ``(rows,)``. In torchrec, the ``values()`` of an optimizer's
        ``state_dict()["state"]``.
    optimizer : AdaGrad
        Continues with the states: constructed with ``dialect="fbgemm"`` and the learning rate passed to FBGEMM.

    Returns
    -------
    dict of int to array
        By table number, of shape ``(rows, columns)`` or ``(rows, 1)``.

    Raises
    ------
    TypeError
        If ``momentum1`` is a dict.
    ValueError
        If the optimizer has epsilon in a different place from FBGEMM, only one of optimizer and table is row-wise, or a
        table does not have one state, as with most other FBGEMM optimizers. Those with one of the same form, such as
        EMAINPLACE_ROWWISE_ADAGRAD, are not recognised, nor is the empty list of EXACT_SGD.

    Examples
    --------
    >>> import numpy as np
    >>> from adagrad import GroupAdaGrad, convert
    >>> convert.from_fbgemm([[np.ones(3, np.float32)]], GroupAdaGrad(dialect="fbgemm"))[0].shape
    (3, 1)
    """
    require_rule(optimizer, "fbgemm")
    if isinstance(momentum1, Mapping):
        raise TypeError(
            f"momentum1={checks.describe(momentum1)}: must be a list, one for each table: pass its values()"
        )
    histories = []
    for table, each in enumerate(momentum1):
        what = f"momentum1 of table {table}"
        parts = list(each.values()) if isinstance(each, Mapping) else each
        if isinstance(parts, (list, tuple)):
            if len(parts) != 1:
                raise ValueError(f"{what}: one of {len(parts)} arrays: must be alone, as with EXACT_ADAGRAD")
            parts = parts[0]
        array = history(what, parts)
        if (array.ndim == 1) != optimizer.row_wise:
            kind, where = ("row", "GroupAdaGrad") if array.ndim == 1 else ("element", "AdaGrad")
            raise ValueError(f"{what}: shape {array.shape}: one value for each {kind}: must continue with {where}")
        histories.append(array[:, None] if optimizer.row_wise else array)
    return from_arrays(histories, optimizer, "fbgemm")


def to_fbgemm(states: Mapping[Index, Any], optimizer: AdaGrad) -> list[History]:
    """Return ``momentum1`` of each table, ``(rows,)`` if row-wise; inverse of :func:`from_fbgemm`.

    Parameters
    ----------
    states : mapping of index to state
        States of two-dimensional weights.
    optimizer : AdaGrad
        The optimizer of the states.

    Raises
    ------
    ValueError
        If the optimizer has epsilon in a different place from FBGEMM, a weight is not a table, or there are master
        copies.
    """
    histories = to_arrays(states, optimizer, "fbgemm")
    for array in histories:
        if array.ndim != 2:
            raise ValueError(f"states: shape {array.shape}: must have two dimensions: FBGEMM has only tables")
    return [array.reshape(-1) if optimizer.row_wise else array for array in histories]
