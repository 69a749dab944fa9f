"""The cases of the CPU benchmark; the tests run them at small sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SEED = 2011
"""Seed of all random numbers here."""


@dataclass(frozen=True)
class Dense:
    """A list of weights, each with a dense gradient."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Bytes to move: weight read and written, gradient read, float32 history read and written."""
        item = 2 if "16" in self.dtype else 4
        return self.elements * (3 * item + 8)


@dataclass(frozen=True)
class Rows:
    """A table with a row-sparse gradient."""

    name: str
    rows: int
    columns: int
    lookups: int
    ids: str
    distinct: bool
    dtype: str = "float32"
    seed: int = SEED

    def indices(self) -> np.ndarray:
        """Return the row ids, zipf(1.2), uniform or without repetition; as drawn, or each once in ascending order."""
        rng = np.random.default_rng(self.seed)
        if self.ids == "without repetition":
            ids = rng.choice(self.rows, min(self.lookups, self.rows), replace=False)
        elif self.ids == "uniform":
            ids = rng.integers(0, self.rows, self.lookups)
        else:
            # Hashed, so that frequent rows are anywhere in the table.
            ids = rng.zipf(1.2, self.lookups).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)
            ids = (ids % np.uint64(self.rows)).astype(np.int64)
        return np.unique(ids) if self.distinct else ids

    def scaled(self, lookups: int) -> Rows:
        return replace(self, name=f"{self.name} {lookups}", lookups=lookups)


Case = Dense | Rows

DENSE = [
    Dense("1 x 64M", ((64 << 20,),)),
    Dense("1 x 4M", ((4 << 20,),)),
    Dense("1 x 256K", ((256 << 10,),)),
    Dense("1 x 1K", ((1000,),)),
    Dense("300 x 1,000", ((1000,),) * 300),
    Dense("24 x (512, 512*512, 2048*512)", ((512,), (512, 512), (2048, 512)) * 24),
    Dense("1 x 4M bfloat16", ((4 << 20,),), "bfloat16"),
    Dense("1 x 4M float16", ((4 << 20,),), "float16"),
]

TABLES = [
    (1 << 20, 64, 100_000),
    (1 << 20, 64, 4_096),
    (4 << 20, 16, 200_000),
    (200_000, 128, 50_000),
    (64 << 20, 1, 200_000),  # a sparse linear model
]


def _rows_name(rows: int, columns: int, lookups: int) -> str:
    size = f"{rows >> 20}M" if rows % (1 << 20) == 0 else f"{rows // 1000}k"
    return f"{size} x {columns}, {lookups:,}"


ROWS = [
    Rows(f"{_rows_name(*table)} {ids}{' distinct' if distinct else ''}", *table, ids, distinct)
    for table in TABLES
    for ids in ("zipf", "uniform")
    for distinct in (False, True)
]
ROWS += [
    Rows(f"{_rows_name(*TABLES[0])} uniform float16", *TABLES[0], "uniform", False, "float16"),
    Rows(f"{_rows_name(*TABLES[0])} uniform distinct bfloat16", *TABLES[0], "uniform", True, "bfloat16"),
]

CASES: list[Case] = [*DENSE, *ROWS]

SCALING: list[Case] = [
    *(Rows(f"height {10**e}", 10**e, 4, 4096, "without repetition", True) for e in range(4, 9)),
    *(Rows(f"lookups {10**e}", 1 << 20, 64, 10**e, "uniform", False) for e in range(2, 7)),
    *(Dense(f"size {10**e}", ((10**e,),)) for e in range(3, 9)),
]
"""How the time grows with the rows of a table, the lookups and the size of a dense weight."""


def dtype_of(name: str) -> Any:
    """Return the NumPy dtype of an element format; bfloat16 is from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def fill(shape: tuple[int, ...], dtype: str = "float32", seed: int = SEED) -> np.ndarray:
    """Return an array of numbers around 1, filled in pieces so that no second array of its size is needed."""
    array = np.empty(shape, dtype_of(dtype))
    flat, rng = array.reshape(-1), np.random.default_rng(seed)
    for start in range(0, flat.size, 1 << 20):
        piece = flat[start : start + (1 << 20)]
        piece[:] = rng.random(piece.size, np.float32) + np.float32(0.5)
    return array
