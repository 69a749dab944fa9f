"""Histories of any framework as arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from adagrad import checks, dialects
from adagrad.adagrad import AdaGrad
from adagrad.convert.trajectory import ordered, require_rule
from adagrad.rates import Index

History: TypeAlias = np.ndarray[Any, np.dtype[Any]]
States: TypeAlias = dict[Index, Any]


def from_arrays(histories: Iterable[Any] | Mapping[Index, Any], optimizer: AdaGrad, dialect: str) -> States:
    """Convert histories, under any name (accumulator, sum of squares, momentum), to states.

    Parameters
    ----------
    histories : iterable of arrays, or mapping of index to array
        Each with the shape of its weight or, for a row-wise optimizer, ``(n, 1, ...)``; float32 or float64.
    optimizer : AdaGrad
        Continues with the states.
    dialect : str
        The framework that the histories come from, one of :data:`~adagrad.dialects.DIALECTS`.

    Returns
    -------
    dict of index to array
        With the indices of the mapping, else 0, 1, ...

    Raises
    ------
    TypeError
        If ``histories`` is not iterable, or a single array.
    ValueError
        If the optimizer has epsilon or weight decay in a different place from the dialect, or an array is not float32
        or float64, is masked, only a part of a tensor or negative anywhere, or not ``(n, 1, ...)`` for a row-wise
        optimizer. Histories in half precision are refused, because they were rounded at every step.

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
    if hasattr(histories, "shape") or not isinstance(histories, Iterable):
        raise TypeError(
            f"histories={checks.describe(histories)}: must be a list of arrays, or a dict of index to array"
        )
    items = histories.items() if isinstance(histories, Mapping) else enumerate(histories)
    return {index: history(f"history {index!r}", each, optimizer) for index, each in items}


def to_arrays(states: Mapping[Index, Any], optimizer: AdaGrad, dialect: str) -> list[History]:
    """Return the histories in ``states``, for another framework to continue with; inverse of :func:`from_arrays`.

    Raises ValueError if the dialect has epsilon or weight decay in a different place from the optimizer, or no row-wise
    history for a row-wise optimizer, and for states with master copies.
    """
    require_rule(optimizer, dialect)
    preset = dialects.find(dialect)
    if optimizer.row_wise and not preset.has_row_wise:
        raise ValueError(f"row_wise=True: must be False: {preset.framework} has no row-wise history")
    return [single(index, state) for index, state in ordered(states).items()]


def history(what: str, value: Any, optimizer: AdaGrad | None = None) -> History:
    """Return a copy of ``value`` as :func:`floats` does, checked to be one, and row-wise if ``optimizer`` is."""
    array = floats(what, value)
    if (array < 0).any():
        raise ValueError(f"{what}: {np.nanmin(array)}: must be >= 0, as a sum of squares is")
    if optimizer is not None and optimizer.row_wise and not is_row_wise(array):
        raise ValueError(
            f"{what}: shape {array.shape}: must be (n, 1, ...), one value for each row of its weight; "
            "a history of elements continues with AdaGrad"
        )
    return array


def is_row_wise(array: Any) -> bool:
    """Whether it has one value for each row; so has a history of elements, if a row is one element."""
    shape = np.shape(array)
    return len(shape) > 0 and math.prod(shape[1:]) == 1


def floats(what: str, value: Any) -> History:
    """Return a copy of ``value``, a history or a master copy, as a float32 or float64 array."""
    low = re.search(r"b?float(16|8)\w*|complex32", str(getattr(value, "dtype", "")))
    if low is not None:
        raise ValueError(
            f"{what}: {low[0]}: must be float32 or float64: in {low[0]} it is rounded at every step until it stops "
            "growing; here it would be float32 and continue growing. If that is intended, convert it to float32 first"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{what}: masked: must be an array of float32 or float64")
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{what}: a part of a tensor: gather it first, with full_tensor or full_state_dict=True")
    array = np.array(plain(value), order="C")
    native = array.dtype.newbyteorder("=")
    if native not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"{what}: {array.dtype}: must be an array of float32 or float64")
    return array.astype(native, copy=False)


def single(index: Index, state: Any) -> History:
    """Return a copy of a state that is one history."""
    if isinstance(state, (tuple, list)):
        raise ValueError(f"states[{index!r}]: a pair (master copy, history): must be one history")
    return history(f"states[{index!r}]", state)


def plain(value: Any) -> Any:
    """Return ``value``, of any framework, as a NumPy array."""
    inner = getattr(value, "value", None)
    if inner is not None and not callable(inner):  # a variable of Keras
        value = inner
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # which NumPy does not have
            value = value.float()
    return value.numpy() if callable(getattr(value, "numpy", None)) else np.asarray(value)
