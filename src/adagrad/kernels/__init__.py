"""Dispatch: one call for a list of updates, in two steps.

:func:`plan` checks everything that can be known before an update and groups the list by device, kind and format;
:meth:`Plan.run` updates. Between the two the caller advances its counts and resolves lr and wd, so that a call that
is refused changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from adagrad import rule as expression
from adagrad.arrays import (
    LOW_PRECISION,
    Operand,
    computing_format,
    operand,
    overlaps_itself,
    refuse_shared_memory,
    row_length,
)
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


class Plan:
    """A checked call; :meth:`run` carries it out."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._parts: list[tuple[Sequence[int] | None, Callable[[Any, Any], None]]] = []

    def add(self, which: Sequence[int] | None, part: Callable[[Any, Any], None]) -> None:
        """Add what updates the weights at the positions ``which`` (None for all), given their lrs and wds."""
        self._parts.append((which, part))

    def run(self, lrs: Sequence[Any], wds: Sequence[Any], only: set[int] | None = None) -> None:
        """Update every weight (or those at the positions ``only``), with its lr and wd, in the order of the call."""
        for which, part in self._parts:
            if which is None:
                part(lrs, wds)
            elif only is None or only.issuperset(which):
                part([lrs[i] for i in which], [wds[i] for i in which])


def plan(
    weights: list[Array], grads: list[Any], states: list[Any], rule: Rule, *, fused: bool, threads: int | None = None
) -> Plan:
    """Check a call and say how it will be carried out.

    Parameters
    ----------
    weights : list of arrays
    grads : list of arrays or RowSparse
    states : list of histories, or of pairs (master copy, history)
    rule : Rule
    fused : bool
        Whether to use the kernels; else the array expressions of :mod:`adagrad.rule`.
    threads : int, optional
        At most so many threads; by default as many as Numba may use.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument, its value and the rule it broke.
    """
    result = Plan(len(weights))
    if fused and not rule.row_wise and weights:
        from adagrad.kernels import ndarray_table

        found = ndarray_table.table(weights, grads, states)
        if found is not None:
            table, formats = found
            result.add(None, _dense_launch(table, (*formats, None), rule, threads, (weights, grads, states)))
            return result

    updates = [
        check_update(f"[{i}]", *given, rule) for i, given in enumerate(zip(weights, grads, states, strict=True))
    ]
    _refuse_shared(updates)
    _group(result, updates, rule, fused=fused, threads=threads)
    return result


# ------------------------------------------------------------------------------------------------------------- checks


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


def as_row_sparse(name: str, grad: Any) -> RowSparse | None:
    """``grad`` if it is row-sparse, a torch sparse COO tensor included; None for other arrays."""
    if not is_row_sparse(grad):
        return None
    if isinstance(grad, RowSparse):
        return grad
    if grad.sparse_dim() != 1:
        raise ValueError(f"{name}: {grad.sparse_dim()} sparse dimensions: must be 1, the rows")
    return RowSparse(grad._values(), grad._indices()[0], grad.shape)


def is_row_sparse(grad: Any) -> bool:
    """Whether ``grad`` is a :class:`RowSparse` or a torch sparse COO tensor."""
    return isinstance(grad, RowSparse) or (is_torch(grad) and bool(grad.is_sparse))


def check_rows(at: str, indices: np.ndarray, rows: int) -> None:
    """IndexError unless all of ``indices`` are in ``range(rows)``."""
    if len(indices) and (indices.min() < 0 or indices.max() >= rows):
        _refuse_row(at, indices, int(np.flatnonzero((indices < 0) | (indices >= rows))[0]), rows)


def _refuse_row(at: str, indices: np.ndarray, position: int, rows: int) -> None:
    row = int(indices[position])
    raise IndexError(f"indices of grads{at}: indices[{position}]={row}: must be in [0, {rows}), the weight's rows")


def _refuse_shared(updates: list[Update]) -> None:
    written = [o for u in updates for o in (u.weight, u.history, u.master) if o is not None]
    read = [u.grad for u in updates]
    for i, u in enumerate(updates):
        if u.indices is not None:
            memory = _host_indices(u.indices) if u.weight.device == "cpu" else None
            read.append(Operand(f"indices of grads[{i}]", u.indices, "", u.weight.device, memory))
    refuse_shared_memory(written, read)


def _host_indices(indices: Array) -> np.ndarray:
    memory: np.ndarray = indices.numpy() if is_torch(indices) else indices
    return memory


# ----------------------------------------------------------------------------------------------------------- grouping


def _group(result: Plan, updates: list[Update], rule: Rule, *, fused: bool, threads: int | None) -> None:
    """Add to ``result`` what carries out ``updates``; every row id is checked here."""
    dense: dict[tuple[str, str, str, str | None], list[int]] = {}
    devices: dict[str, list[int]] = {}
    for i, u in enumerate(updates):
        if u.weight.device == "cpu" and u.indices is not None:
            _add_rows(result, i, u, rule, fused=fused, threads=threads)
        elif not fused or not (u.weight.device == "cpu" or u.weight.device.startswith("cuda")):
            result.add([i], _expression(u, rule))
        elif u.weight.device != "cpu":
            devices.setdefault(u.weight.device, []).append(i)
        elif u.weight.array.size if isinstance(u.weight.array, np.ndarray) else u.weight.array.numel():
            if all(o is None or o.is_plain for o in (u.weight, u.grad, u.history, u.master)):
                formats = (u.weight.format, u.grad.format, u.history.format, u.master and u.master.format)
                dense.setdefault(formats, []).append(i)
            else:
                result.add([i], _strided(u, rule, threads))
    for formats, which in dense.items():
        group = [updates[i] for i in which]
        result.add(which, _dense_launch(_table(group, rule), formats, rule, threads, group))
    for which in devices.values():
        result.add(which, _cuda([updates[i] for i in which], rule))


def _dense_launch(
    table: np.ndarray, formats: tuple[str, str, str, str | None], rule: Rule, threads: int | None, keep: Any
) -> Callable[[Any, Any], None]:
    from adagrad.kernels import cpu_dense
    from adagrad.kernels.cpu_rule import scalars
    from adagrad.kernels.numba_jit import max_workers

    def run(lrs: Sequence[float], wds: Sequence[float], keep: Any = keep) -> None:
        cpu_dense.launch(table, hyper(lrs, wds, rule), np.array(scalars(rule)), formats, threads or max_workers())

    return run


def hyper(lrs: Sequence[float], wds: Sequence[float], rule: Rule) -> np.ndarray:
    """A row for each weight: lr, coupled wd, decoupled wd."""
    table = np.zeros((len(lrs), 3))
    table[:, 0] = lrs
    table[:, 2 if rule.decoupled_decay else 1] = wds
    return table


def _table(updates: Sequence[Update], rule: Rule) -> np.ndarray:
    return np.array([_table_row([_memory(o) for o in (u.weight, u.grad, u.history, u.master)], rule) for u in updates])


def _table_row(memories: Sequence[np.ndarray | None], rule: Rule) -> list[int]:
    """A row of the dense kernels' table: four addresses, the size, the length of a row."""
    weight = memories[0]
    addresses = [0 if memory is None else memory.__array_interface__["data"][0] for memory in memories]
    length = row_length(weight.shape) if rule.row_wise and weight is not None else 0
    return [*addresses, 0 if weight is None else weight.size, length]


def _memory(o: Operand | None) -> np.ndarray | None:
    return None if o is None else o.memory


def _strided(u: Update, rule: Rule, threads: int | None) -> Callable[[Any, Any], None]:
    from adagrad.kernels import strided

    formats = (u.weight.format, u.grad.format, u.history.format, u.master and u.master.format)
    pieces = strided.row_blocks if rule.row_wise else strided.tiles

    def run(lrs: Sequence[float], wds: Sequence[float]) -> None:
        for piece in pieces(*(_memory(o) for o in (u.weight, u.grad, u.history, u.master))):
            memories = [*piece, *[None] * (4 - len(piece))]
            _dense_launch(np.array([_table_row(memories, rule)]), formats, rule, threads, piece)(lrs, wds)

    return run


def _add_rows(result: Plan, i: int, u: Update, rule: Rule, *, fused: bool, threads: int | None) -> None:
    indices = _host_indices(u.indices)
    rows = u.weight.shape[0]
    if not fused:
        check_rows(f"[{i}]", indices, rows)
        if len(indices):
            result.add([i], _expression(u, rule))
        return

    from adagrad.kernels.numba_jit import max_workers
    from adagrad.kernels.row_order import row_order

    indices = np.ascontiguousarray(indices, indices.dtype.newbyteorder("="))
    keys, shift, bad, _ = row_order(np.require(indices, requirements="A"), rows, threads or max_workers())
    if bad >= 0:
        _refuse_row(f"[{i}]", indices, bad, rows)
    if len(keys) and row_length(u.weight.shape):
        result.add([i], _rows_launch(u, keys, shift, rule, threads))


def _rows_launch(
    u: Update, keys: np.ndarray, shift: int, rule: Rule, threads: int | None
) -> Callable[[Any, Any], None]:
    from adagrad.kernels import cpu_rows
    from adagrad.kernels.cpu_rule import scalars
    from adagrad.kernels.numba_jit import max_workers

    length = row_length(u.weight.shape)
    formats = (u.weight.format, u.grad.format, u.history.format, u.master and u.master.format)

    def run(lrs: Sequence[float], wds: Sequence[float]) -> None:
        memories = [_memory(o) for o in (u.weight, u.history, u.master, u.grad)]
        use = keys
        rows = None
        if not all(m is None or _rows_are_plain(m) for m in memories):
            # The rows present, gathered into buffers: then row r of a buffer belongs to the r-th distinct key.
            distinct = keys >> np.uint64(shift)
            starts = np.concatenate(([True], distinct[1:] != distinct[:-1]))
            rows = distinct[starts].astype(np.int64)
            use = ((np.cumsum(starts) - 1).astype(np.uint64) << np.uint64(shift)) | (
                keys & np.uint64((1 << shift) - 1)
            )
            gathered = [m if m is None else m[rows] for m in memories[:3]]
            plain = [m if m is None else np.ascontiguousarray(m, m.dtype.newbyteorder("=")) for m in
                     [*gathered, memories[3]]]
            buffers = [m if m is None else np.require(m, requirements=["C", "A"]) for m in plain]
        else:
            buffers = memories
        base = np.array([0 if m is None else m.__array_interface__["data"][0] for m in buffers])
        stride = np.array([0 if m is None else m.strides[0] for m in buffers])
        cpu_rows.launch(use, shift, base, stride, formats, length, rule.row_wise, hyper(lrs, wds, rule)[0],
                        np.array(scalars(rule)), threads or max_workers())  # fmt: skip
        if rows is not None:
            for memory, buffer in zip(memories[:3], buffers[:3], strict=True):
                if memory is not None and buffer is not None:
                    memory[rows] = buffer

    return run


def _rows_are_plain(memory: np.ndarray) -> bool:
    """Whether each row is contiguous, aligned and native; the rows may lie any distance apart."""
    return bool(memory.dtype.isnative) and memory.flags.aligned and memory[:1].flags.c_contiguous


def _expression(u: Update, rule: Rule) -> Callable[[Any, Any], None]:
    master = None if u.master is None else u.master.array

    def run(lrs: Sequence[Any], wds: Sequence[Any]) -> None:
        if u.indices is None:
            expression.step(u.weight.array, u.grad.array, u.history.array, master, lrs[0], wds[0], rule)
        else:
            expression.step_rows(
                u.weight.array, u.indices, u.grad.array, u.history.array, master, lrs[0], wds[0], rule
            )

    return run


def _cuda(updates: list[Update], rule: Rule) -> Callable[[Any, Any], None]:
    from adagrad.kernels import cuda

    def run(lrs: Sequence[Any], wds: Sequence[Any]) -> None:
        dense, rows = [], []
        for u, lr, wd in zip(updates, lrs, wds, strict=True):
            arrays = u.history.array, None if u.master is None else u.master.array, lr, wd
            if u.indices is None:
                dense.append(cuda.DenseUpdate(u.weight.array, u.grad.array, *arrays))
            else:
                rows.append(cuda.RowUpdate(u.weight.array, u.indices, u.grad.array, *arrays))
        cuda.update(dense, rows, rule)

    return run
