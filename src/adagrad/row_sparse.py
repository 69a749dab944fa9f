"""Row-sparse gradients."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from adagrad.checks import describe
from adagrad.rule import Array, is_torch


class RowSparse:
    """A gradient for some rows of a weight.

    Rows may come in any order; the values of duplicate rows are summed. An update changes only the rows present, also
    by weight decay. The arrays are not copied.

    Parameters
    ----------
    values : array of shape (n, *shape[1:])
        NumPy array or torch tensor of the weight's dtype, or float32 for a float16 or bfloat16 weight.
    indices : array of shape (n,), int32 or int64
        The row of each entry of ``values``, in ``range(shape[0])`` (checked at the update).
    shape : tuple of int
        The shape of the weight, with at least one dimension.

    Raises
    ------
    TypeError
        If values or indices are not arrays, or indices are not int32 or int64.
    ValueError
        If the shapes do not match.

    Examples
    --------
    >>> import numpy as np
    >>> gradient = RowSparse(np.ones((2, 3), np.float32), np.array([4, 0]), (5, 3))
    >>> gradient.shape
    (5, 3)
    """

    __slots__ = ("indices", "shape", "values")

    values: Array
    indices: Array
    shape: tuple[int, ...]

    def __init__(self, values: Any, indices: Any, shape: Any) -> None:
        for name, array in (("values", values), ("indices", indices)):
            if isinstance(array, np.ma.MaskedArray) or not (isinstance(array, np.ndarray) or is_torch(array)):
                kind = f"{type(array).__module__}.{type(array).__qualname__}"
                raise TypeError(f"{name}={describe(array)}: must be a NumPy array or a torch tensor, not {kind}")
        try:
            shape = tuple(operator.index(size) for size in shape)
        except TypeError:
            raise TypeError(f"shape={describe(shape)}: must be a tuple of integers") from None
        if not shape or min(shape) < 0:
            raise ValueError(f"shape={shape}: must have one dimension or more, none of them negative")
        if str(getattr(indices.dtype, "name", indices.dtype)).removeprefix("torch.") not in ("int32", "int64"):
            raise TypeError(f"indices: dtype {indices.dtype}: must be int32 or int64")
        if indices.ndim != 1:
            raise ValueError(f"indices: shape {tuple(indices.shape)}: must have one dimension")
        expected = (len(indices), *shape[1:])
        if tuple(values.shape) != expected:
            raise ValueError(
                f"values: shape {tuple(values.shape)}: must be {expected}, for {len(indices)} indices into {shape}"
            )
        self.values, self.indices, self.shape = values, indices, shape

    def __repr__(self) -> str:
        return f"RowSparse(<{len(self.indices)} rows of {self.values.dtype}>, shape={self.shape})"
