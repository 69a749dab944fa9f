"""Row-sparse updates of plain torch tensors, looked at and checked by compiled code.

For an embedding with few lookups the checks in Python cost more than the update; this is their short cut. Whatever is
not plain, and every error but a row id outside the weight, is left to the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from adagrad import kernels
from adagrad.kernels import checked, cpu_rows, cpu_rule, row_groups
from adagrad.kernels.cpu_rows import HISTORY, MASTER, VALUES, WEIGHT
from adagrad.kernels.ndarray_table import _word
from adagrad.kernels.numba_jit import jit
from adagrad.kernels.tensor_layout import (
    CONTIGUOUS,
    COUNT,
    FORMAT,
    RANK,
    SEEN,
    SIZES,
    START,
    item_size,
    layout,
    look,
)
from adagrad.kernels.tensor_table import Formats, code_of, formats
from adagrad.rule import Rule


@jit()
def _look_at(weight: int, values: int, history: int, master: int, none: int, entries: int, how: Any, row_wise: bool,
             base: Any, stride: Any, ends: Any) -> Any:  # fmt: skip
    """The code of a row-sparse update (-1 where it is not plain) and the length of a row.

    Fills, for weight, history, master copy and values: where row 0 is, the bytes from a row to the next, the end.
    """
    out = np.empty(1, np.int64)
    seen = np.zeros((4, SEEN), np.int64)
    has_master = master != none
    if not (look(weight, how, out, seen[WEIGHT]) and look(history, how, out, seen[HISTORY])):
        return -1, 0
    if not look(values, how, out, seen[VALUES]) or (has_master and not look(master, how, out, seen[MASTER])):
        return -1, 0
    w, v = seen[WEIGHT], seen[VALUES]
    if w[RANK] == 0 or v[RANK] != w[RANK] or _word(v[SIZES], 0) != entries:
        return -1, 0
    length = 1
    for d in range(1, w[RANK]):
        length *= _word(w[SIZES], 8 * d)
        if _word(v[SIZES], 8 * d) != _word(w[SIZES], 8 * d):
            return -1, 0
    for k in range(4):
        if (k != MASTER or has_master) and seen[k, CONTIGUOUS] != 1:
            return -1, 0
    for k in range(4):
        base[k], ends[k] = seen[k, START], seen[k, START] + seen[k, COUNT] * item_size(seen[k, FORMAT])
        stride[k] = item_size(seen[k, FORMAT]) * (1 if row_wise and k == HISTORY else length)
    if not has_master:
        base[MASTER], ends[MASTER], stride[MASTER] = 0, 0, 0
    return code_of(w, v, seen[HISTORY], seen[MASTER], has_master, row_wise, True), length


class Rows(NamedTuple):
    """A row-sparse update, checked but for its row ids."""

    indices: Tensor
    """int64, contiguous, on the weight's device."""
    values: Tensor
    place: int
    """0 for the CPU, 1 + index of a CUDA device."""
    formats: Formats
    length: int
    starts: np.ndarray
    """Where the memory of weight, history, master copy and values begins."""
    ends: np.ndarray
    stride: np.ndarray

    def plan(self, i: int, weight: Tensor, rates: Any, rule: Rule, threads: int | None) -> Callable[[], None] | None:
        """What carries it out on the CPU, if there is anything to do; IndexError for a row id outside the weight."""
        indices = self.indices.numpy()
        ids, bad, distinct = row_groups.checked_rows(indices, len(weight))
        if bad >= 0:
            checked.refuse_row(f"[{i}]", indices, bad, len(weight))
        if not len(ids) or not self.length:
            return None
        hyper = kernels.hyper([rates[0]], [rates[1]], rule)[0]

        def run(values: Tensor = self.values) -> None:
            cpu_rows.launch(ids, distinct, self.starts, self.stride, self.formats, self.length, rule.row_wise,
                            hyper, cpu_rule.scalars(rule), threads)  # fmt: skip

        return run


def rows(weight: Any, grad: Tensor, history: Any, master: Any, *, row_wise: bool) -> Rows | None:
    """A sparse COO gradient's update as the kernels want it, or None for the ordinary way."""
    how = layout()
    if how is None or grad.sparse_dim() != 1 or grad.shape != weight.shape:
        return None
    indices, values = grad._indices(), grad._values()
    base, stride, ends = np.empty((3, 4), np.int64)
    code, length = _look_at(id(weight), id(values), id(history), id(master), id(None), indices.shape[1], how, row_wise,
                            base, stride, ends)  # fmt: skip
    if code < 0:
        return None
    return Rows(indices[0].contiguous(), values, *formats(code), length, base, ends, stride)
