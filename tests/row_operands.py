"""Operands of row-sparse updates, for tests of their kernels on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from adagrad import RowSparse
from support import DTYPES, KINDS, Kind, Operands, normal, operands

FLOAT32, FLOAT64 = KINDS[:2]
MASTER = Kind("bfloat16", "float32", True)
HALF = Kind("float16", "float16")


def rows(
    rng: np.random.Generator,
    kind: Kind,
    shape: tuple[int, ...],
    indices: Any,
    *,
    row_wise: bool = False,
) -> Operands:
    indices = np.asarray(indices)
    values = normal(rng, (len(indices), *shape[1:]), DTYPES[kind.grad])
    return operands(rng, kind, shape, row_wise=row_wise, grad=RowSparse(values, indices, shape))


def some(rng: np.random.Generator, count: int, of: int, dtype: Any = np.int64) -> np.ndarray:
    """Row ids of which a few are frequent, unsorted."""
    return np.minimum(rng.zipf(1.5, count) - 1, of - 1).astype(dtype)
