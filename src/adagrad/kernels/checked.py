"""What every update of a call must be, checked before anything changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from adagrad.arrays import LOW_PRECISION, Operand, computing_format, operand, overlaps_itself, refuse_shared_memory
from adagrad.row_sparse import RowSparse
from adagrad.rule import Array, Rule, history_shape, is_torch


class Update(NamedTuple):
    """One weight's part of a call, checked."""

    weight: Operand
    grad: Operand
    """The gradient, or the values of a row-sparse one."""
    indices: Array | None
    history: Operand
    master: Operand | None


def check_update(at: str, weight: Array, grad: Any, state: Any, rule: Rule) -> Update:
    """One weight's operands; ``at`` stands behind the arguments' names in messages."""
    w = operand(f"weights{at}", weight)
    if rule.row_wise and not w.shape:
        raise ValueError(f"weights{at}: shape (): row-wise history needs rows: one dimension or more")
    computing = computing_format(w.format)
    if isinstance(state, (tuple, list)):
        if len(state) != 2:
            raise ValueError(f"states{at}: {len(state)} entries: must be a history or a pair (master copy, history)")
        if w.format not in LOW_PRECISION:
            raise ValueError(f"states{at}: a master copy: only for float16 and bfloat16 weights, not {w.format}")
        m, h = operand(f"master copy in states{at}", state[0]), operand(f"history in states{at}", state[1])
        _require(m, "shape", m.shape, w.shape)
    else:
        m, h = None, operand(f"history in states{at}", state)
    _require(h, "shape", h.shape, history_shape(w.shape, row_wise=rule.row_wise))

    indices = None
    rows = as_row_sparse(f"grads{at}", grad)
    if rows is None:
        g = operand(f"grads{at}", grad)
        _require(g, "shape", g.shape, w.shape)
    else:
        if rows.shape != w.shape:
            raise ValueError(f"grads{at}: shape {rows.shape}: must be {w.shape}, the weight's")
        g, indices = operand(f"values of grads{at}", rows.values), rows.indices
        if str(getattr(indices, "device", "cpu")) != w.device:
            raise ValueError(f"indices of grads{at}: on {indices.device}: must be on {w.device}, like the weight")
    if g.format != w.format and not (g.format == "float32" and w.format in LOW_PRECISION):
        also = " or float32" if w.format in LOW_PRECISION else ""
        raise TypeError(f"{g.name}: dtype {g.format}: must be {w.format}{also}, for a weight of {w.format}")
    for o in (h, m):
        if o is not None:
            _require(o, "dtype", o.format, computing, TypeError)
    for o in (g, h, m):
        if o is not None:
            if is_torch(o.array) != is_torch(w.array):
                raise TypeError(f"{o.name}: {_kind(o.array)}: must be {_kind(w.array)}, like the weight")
            _require(o, "device", o.device, w.device)
    for o in (w, h, m):
        if o is not None and o.memory is not None:
            if not o.memory.flags.writeable:
                raise ValueError(f"{o.name}: read-only: must be writable")
            if overlaps_itself(o.memory):
                raise ValueError(f"{o.name}: strides {o.memory.strides}: overlaps itself")
    return Update(w, g, indices, h, m)


def _require(o: Operand, what: str, found: Any, expected: Any, error: type[Exception] = ValueError) -> None:
    if found != expected:
        raise error(f"{o.name}: {what} {found}: must be {expected}")


def _kind(array: Array) -> str:
    return "a torch tensor" if is_torch(array) else "a NumPy array"


def as_row_sparse(name: str, grad: Any) -> RowSparse | None:
    """``grad`` if it is row-sparse, a torch sparse COO tensor included; None for other arrays."""
    if not is_row_sparse(grad):
        return None
    if isinstance(grad, RowSparse):
        # Checked again: the kernels trust the shapes, and its attributes and arrays may have changed meanwhile.
        return RowSparse(grad.values, grad.indices, grad.shape)
    if grad.sparse_dim() != 1:
        raise ValueError(f"{name}: {grad.sparse_dim()} sparse dimensions: must be 1, the rows")
    return RowSparse(grad._values(), grad._indices()[0], grad.shape)


def is_row_sparse(grad: Any) -> bool:
    """Whether ``grad`` is a :class:`RowSparse` or a torch sparse COO tensor."""
    return isinstance(grad, RowSparse) or (is_torch(grad) and bool(grad.is_sparse))


def any_row_sparse(grads: Any) -> bool:
    """Whether any of ``grads`` is row-sparse; quick where all are NumPy arrays."""
    return set(map(type, grads)) != {np.ndarray} and any(map(is_row_sparse, grads))


def check_rows(at: str, indices: np.ndarray, rows: int) -> None:
    """IndexError unless all of ``indices`` are in ``range(rows)``."""
    if len(indices) and (indices.min() < 0 or indices.max() >= rows):
        refuse_row(at, indices, int(np.flatnonzero((indices < 0) | (indices >= rows))[0]), rows)


def refuse_row(at: str, indices: np.ndarray, position: int, rows: int) -> None:
    row = int(indices[position])
    raise IndexError(f"indices of grads{at}: indices[{position}]={row}: must be in [0, {rows}), the weight's rows")


def refuse_shared(updates: list[Update]) -> None:
    written = [o for u in updates for o in (u.weight, u.history, u.master) if o is not None]
    read = [u.grad for u in updates]
    for i, u in enumerate(updates):
        if u.indices is not None:
            memory = host_indices(u.indices) if u.weight.device == "cpu" else None
            read.append(Operand(f"indices of grads[{i}]", u.indices, "", u.weight.device, memory))
    refuse_shared_memory(written, read)


def host_indices(indices: Array) -> np.ndarray:
    memory: np.ndarray = indices.numpy() if is_torch(indices) else indices
    return memory
