"""What every update of a call must be, checked before anything changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from adagrad.arrays import LOW_PRECISION, Operand, computing_format, operand, refuse_shared_memory, refuse_unwritable
from adagrad.kernels.names import Names
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
    names: Names


class Wrapped(NamedTuple):
    """An update of tensors that only PyTorch understands."""

    weight: Array
    grad: Any
    """A tensor or a RowSparse."""
    history: Array
    master: Array | None
    names: Names


def validate(names: Names, weight: Array, grad: Any, history: Any, master: Any, rule: Rule) -> Update | Wrapped:
    """An update of a call, checked; ``names`` are for messages, ``master`` may be None.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument, its value and the rule it broke.
    """
    if is_torch(weight):
        from adagrad.kernels.tensors import checks as tensor_checks, views as tensor_views

        given = tensor_views.ordinary(names, weight, grad, history, master, row_wise=rule.row_wise)
        if not tensor_checks.are_memory(given):
            _check_update(names, *given, rule, are_wrapped=True)
            return Wrapped(*given, names)
        weight, grad, history, master = given
    return _check_update(names, weight, grad, history, master, rule, are_wrapped=False)


def _check_update(names: Names, weight: Array, grad: Any, history: Any, master: Any, rule: Rule, *, are_wrapped: bool
                  ) -> Update:  # fmt: skip
    """Check an update of arrays of real numbers; errors as of :func:`validate`.

    Of tensors that ``are_wrapped``, the operands have no memory.
    """
    w = operand(names.weight, weight, is_wrapped=are_wrapped)
    if rule.row_wise and not w.shape:
        raise ValueError(f"{names.weight}: shape (): row-wise history needs rows: one dimension or more")
    computing = computing_format(w.format)
    if master is not None and w.format not in LOW_PRECISION:
        raise ValueError(f"{names.state}: a master copy: only for float16 and bfloat16 weights, not {w.format}")
    m = None if master is None else operand(names.master, master, is_wrapped=are_wrapped)
    if history is None:
        raise TypeError(f"{names.history}=None: must be a NumPy array or a torch tensor, as create_state returns it")
    h = operand(names.history, history, is_wrapped=are_wrapped)
    if m is not None:
        _require(m, "shape", m.shape, w.shape)
    _require(h, "shape", h.shape, history_shape(w.shape, row_wise=rule.row_wise))

    g, indices = _check_gradient(names, grad, w, are_wrapped=are_wrapped)
    for o in (h, m):
        if o is not None and o.format != computing:
            raise TypeError(f"{o.name}: dtype {o.format}: must be {computing}, for a weight of {w.format}")
    for o in (g, h, m):
        if o is not None:
            _require_same_place(o, w)
    for o in (w, h, m):
        if o is not None:
            refuse_unwritable(o)
    if is_torch(w.array):
        from adagrad.kernels.tensors import checks as tensor_checks

        written = [o for o in (w, h, m) if o is not None]
        if are_wrapped:
            tensor_checks.refuse_overlaps(written)
        else:
            tensor_checks.check_memory(written, g)
    return Update(w, g, indices, h, m, names)


def check_gradient(names: Names, grad: Any, w: Operand) -> Operand:
    """A gradient, or the values of a row-sparse one, checked: TypeError or ValueError if it does not fit ``w``."""
    if is_row_sparse(grad) and not isinstance(grad, RowSparse) and grad.sparse_dim() != 1:
        _require_shape(names, grad.shape, w)
        g = operand(names.values, grad._values())
        _require_format(g, w)
    else:
        g, _ = _check_gradient(names, grad, w, are_wrapped=False)
    _require_same_place(g, w)
    return g


def _check_gradient(names: Names, grad: Any, w: Operand, *, are_wrapped: bool) -> tuple[Operand, Array | None]:
    """A gradient, or the values of a row-sparse one, and its row ids."""
    rows = as_row_sparse(names.grad, grad)
    if rows is None:
        g, indices = operand(names.grad, grad, is_wrapped=are_wrapped), None
        _require_shape(names, g.shape, w)
    else:
        _require_shape(names, rows.shape, w)
        g, indices = operand(names.values, rows.values, is_wrapped=are_wrapped), rows.indices
        if str(getattr(indices, "device", "cpu")) != w.device:
            raise ValueError(f"{names.indices}: on {indices.device}: must be on {w.device}, like the weight")
    _require_format(g, w)
    return g, indices


def _require_shape(names: Names, shape: tuple[int, ...], w: Operand) -> None:
    if tuple(shape) != w.shape:
        raise ValueError(f"{names.grad}: shape {tuple(shape)}: must be {w.shape}, the weight's")


def _require_format(g: Operand, w: Operand) -> None:
    if g.format != w.format and not (g.format == "float32" and w.format in LOW_PRECISION):
        also = " or float32" if w.format in LOW_PRECISION else ""
        raise TypeError(f"{g.name}: dtype {g.format}: must be {w.format}{also}, for a weight of {w.format}")


def _require_same_place(o: Operand, w: Operand) -> None:
    if is_torch(o.array) != is_torch(w.array):
        raise TypeError(f"{o.name}: {_kind(o.array)}: must be {_kind(w.array)}, like the weight")
    _require(o, "device", o.device, w.device)


def refuse_shared(updates: list[Update]) -> None:
    """ValueError where what a call writes to shares a byte with anything else in it."""
    written: list[Operand] = []
    read: list[Operand] = []
    for u in updates:
        some_written, some_read = operands_of(u)
        written += some_written
        read += some_read
    refuse_shared_memory(written, read)


def operands_of(u: Update) -> tuple[list[Operand], list[Operand]]:
    """What is written to, and what is read; ``memory`` has the right addresses on any device, but is not to be read."""
    written, read = [o for o in (u.weight, u.history, u.master) if o is not None], [u.grad]
    if u.indices is not None:
        memory = host_indices(u.indices) if u.weight.device == "cpu" else None
        read.append(Operand(u.names.indices, u.indices, "", u.weight.device, memory))
    if is_torch(u.weight.array):
        from adagrad.kernels.tensors import checks as tensor_checks

        return [tensor_checks.placed(o) for o in written], [tensor_checks.placed(o) for o in read]
    return written, read


def _require(o: Operand, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{o.name}: {what} {found}: must be {expected}")


def _kind(array: Array) -> str:
    return "a torch tensor" if is_torch(array) else "a NumPy array"


def as_row_sparse(name: str, grad: Any) -> RowSparse | None:
    """``grad`` if it is row-sparse, a torch sparse COO tensor included; None for other arrays."""
    if not is_row_sparse(grad):
        return None
    if isinstance(grad, RowSparse):
        # Checked again: the kernels trust the shapes, and its attributes and arrays may have changed meanwhile.
        try:
            return RowSparse(grad.values, grad.indices, grad.shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    if grad.sparse_dim() != 1:
        raise ValueError(f"{name}: {grad.sparse_dim()} sparse dimensions: must be 1, the rows")
    return RowSparse(grad._values(), grad._indices()[0], grad.shape)


def is_row_sparse(grad: Any) -> bool:
    """Whether ``grad`` is a :class:`RowSparse` or a torch sparse COO tensor."""
    return seems_row_sparse(grad) and (isinstance(grad, RowSparse) or is_torch(grad))


def seems_row_sparse(grad: Any) -> bool:
    """As :func:`is_row_sparse`, faster, but also true of other objects with ``is_sparse``, which no path takes."""
    return type(grad) is not np.ndarray and (isinstance(grad, RowSparse) or getattr(grad, "is_sparse", False) is True)


def host_indices(indices: Array) -> np.ndarray:
    memory: np.ndarray = indices.numpy() if is_torch(indices) else np.asarray(indices)
    return memory
