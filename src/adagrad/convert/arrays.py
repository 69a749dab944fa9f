"""Histories as arrays, of any framework."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from adagrad.adagrad import AdaGrad
from adagrad.convert.trajectory import ordered, require_rule
from adagrad.rates import Index

History: TypeAlias = np.ndarray[Any, np.dtype[Any]]
States: TypeAlias = dict[Index, Any]


def from_arrays(histories: Iterable[Any] | Mapping[Index, Any], optimizer: AdaGrad, dialect: str) -> States:
    """States from histories, whatever they are called there: accumulator, sum of squares, momentum.

    Parameters
    ----------
    histories : iterable of arrays, or mapping of index to array
        Each of the shape of its weight or, for a row-wise optimizer, ``(n, 1, ...)``; float32 or float64.
    optimizer : AdaGrad
        Goes on with the states.
    dialect : str
        Where the histories come from: one of :data:`adagrad.dialects.DIALECTS`.

    Returns
    -------
    dict of index to array
        The indices of the mapping, else 0, 1, ...

    Raises
    ------
    ValueError
        If the optimizer has epsilon or weight decay in another place than the dialect, or an array cannot be such a
        history: one in half precision, for example, that was rounded at every step.

    Examples
    --------
    >>> import numpy as np
    >>> from adagrad import AdaGrad, convert, get_updater
    >>> updater = get_updater(AdaGrad(learning_rate=0.1, dialect="mlx"))
    >>> updater.states = convert.from_arrays([np.ones(3, np.float32)], updater.optimizer, "mlx")
    >>> updater.states
    {0: array([1., 1., 1.], dtype=float32)}
    """
    require_rule(optimizer, dialect)
    items = histories.items() if isinstance(histories, Mapping) else enumerate(histories)
    return {index: history(f"history {index!r}", each, optimizer) for index, each in items}


def to_arrays(states: Mapping[Index, Any], optimizer: AdaGrad, dialect: str) -> list[History]:
    """The histories in ``states``, for a framework to go on with; inverse of :func:`from_arrays`.

    Raises ValueError if the dialect has epsilon or weight decay in another place than the optimizer, and for states
    with master copies.
    """
    require_rule(optimizer, dialect)
    return [single(index, state) for index, state in ordered(states).items()]


def history(what: str, value: Any, optimizer: AdaGrad | None = None) -> History:
    """A copy of ``value`` as a NumPy array, float32 or float64, and if need be row-wise."""
    low = re.search(r"b?float(16|8)\w*|complex32", str(getattr(value, "dtype", "")))
    if low is not None:
        raise ValueError(
            f"{what}: {low[0]}: must be float32 or float64: in {low[0]} it is rounded at every step, until it stops "
            "growing; here it would be float32 and go on growing. If that is wanted, make it float32 before"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{what}: masked: must be an array of float32 or float64")
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{what}: a part of a tensor: gather it first, by full_tensor or full_state_dict=True")
    array = np.array(plain(value), order="C")
    native = array.dtype.newbyteorder("=")
    if native not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"{what}: {array.dtype}: must be an array of float32 or float64")
    if optimizer is not None and optimizer.row_wise and math.prod(array.shape[1:]) != 1:
        raise ValueError(
            f"{what}: shape {array.shape}: must be (n, 1, ...), one value for each row of its weight; "
            "a history of elements goes on with AdaGrad"
        )
    return array.astype(native, copy=False)


def single(index: Index, state: Any) -> History:
    """A copy of a state that is one history."""
    if isinstance(state, (tuple, list)):
        raise ValueError(f"states[{index!r}]: a pair (master copy, history): must be one history")
    return history(f"states[{index!r}]", state)


def plain(value: Any) -> Any:
    """``value``, of whatever framework, as NumPy sees it."""
    inner = getattr(value, "value", None)
    if inner is not None and not callable(inner):  # a variable of Keras
        value = inner
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return value.numpy() if callable(getattr(value, "numpy", None)) else np.asarray(value)
