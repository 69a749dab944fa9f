"""``momentum1`` of FBGEMM's table-batched embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adagrad.adagrad import AdaGrad
from adagrad.convert.arrays import History, States, from_arrays, history, to_arrays
from adagrad.convert.trajectory import require_rule
from adagrad.rates import Index


def from_fbgemm(momentum1: Iterable[Any], optimizer: AdaGrad) -> States:
    """States from FBGEMM: of EXACT_ADAGRAD for ``AdaGrad``, of EXACT_ROWWISE_ADAGRAD for ``GroupAdaGrad``.

    Parameters
    ----------
    momentum1 : iterable
        ``split_optimizer_states()``, ``get_optimizer_state()``, or the arrays alone: one for each table, of shape
        ``(rows, columns)`` or, where it is row-wise, ``(rows,)``.
    optimizer : AdaGrad
        Goes on with the states: made with ``dialect="fbgemm"`` and the learning rate that FBGEMM was given.

    Returns
    -------
    dict of int to array
        By the number of the table, of shape ``(rows, columns)`` or ``(rows, 1)``.

    Raises
    ------
    ValueError
        For an optimizer of another rule, row-wise where the table is not or the other way round, and for states of
        FBGEMM's other optimizers.

    Examples
    --------
    >>> import numpy as np
    >>> from adagrad import GroupAdaGrad, convert
    >>> convert.from_fbgemm([[np.ones(3, np.float32)]], GroupAdaGrad(dialect="fbgemm"))[0].shape
    (3, 1)
    """
    require_rule(optimizer, "fbgemm")
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
            raise ValueError(f"{what}: shape {array.shape}: one value for each {kind}: must go on with {where}")
        histories.append(array[:, None] if optimizer.row_wise else array)
    return from_arrays(histories, optimizer, "fbgemm")


def to_fbgemm(states: Mapping[Index, Any], optimizer: AdaGrad) -> list[History]:
    """``momentum1`` of each table, ``(rows,)`` where it is row-wise; inverse of :func:`from_fbgemm`.

    Parameters
    ----------
    states : mapping of index to state
        Of weights of two dimensions.
    optimizer : AdaGrad
        They come from it.

    Raises
    ------
    ValueError
        If the optimizer has epsilon in another place than FBGEMM, for other weights than tables, and master copies.
    """
    histories = to_arrays(states, optimizer, "fbgemm")
    for array in histories:
        if array.ndim != 2:
            raise ValueError(f"states: shape {array.shape}: must have two dimensions: FBGEMM has tables")
    return [array.reshape(-1) if optimizer.row_wise else array for array in histories]
