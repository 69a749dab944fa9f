"""Unusual tensors seen as ordinary ones: their updates in terms of memory that holds real numbers.

Complex numbers are updated by their real and imaginary parts, as everywhere in PyTorch. A DTensor is updated by its
local part. A sparse COO gradient becomes a :class:`~adagrad.RowSparse`, duplicates and all. What is returned shares
memory with what was given, except for gradients.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from adagrad.kernels.batch import Batch
from adagrad.kernels.gradient_order import MOST_COPIED, has_gaps
from adagrad.kernels.names import Names
from adagrad.kernels.tensors.checks import PLAIN_TYPES, check_rows
from adagrad.kernels.tensors.dtensor import has_whole_rows, is_dtensor, is_placed_as, local, moved
from adagrad.row_sparse import RowSparse
from adagrad.rule import history_shape

Operands = tuple[Any, Any, Any, Any]
"""Weight, gradient, history and master copy or None."""


def ordinary(names: Names, weight: Tensor, grad: Tensor | RowSparse, history: Tensor, master: Tensor | None, *,
             row_wise: bool) -> Operands:  # fmt: skip
    """The operands of an update as the dispatcher takes them; ``names`` are for messages.

    Raises
    ------
    TypeError
        For a gradient that is neither strided nor sparse COO, and DTensors mixed with other tensors.
    ValueError
        For views that cannot be written through, DTensors or sparse gradients that the rule cannot take in parts, and
        complex weights with row-wise history.
    IndexError
        For indices in several sparse dimensions on the CPU that are outside the weight.
    """
    if any(map(is_dtensor, (weight, grad, history, master))):
        weight, grad, history, master = _local(names, weight, grad, history, master, row_wise=row_wise)
    for name, tensor in ((names.weight, weight), (names.history, history), (names.master, master)):
        if isinstance(tensor, Tensor) and (tensor.is_neg() or tensor.is_conj()):
            raise ValueError(f"{name}: a negated or conjugated view: must be resolved, as by resolve_neg")
    if isinstance(grad, Tensor):
        if grad.layout == torch.sparse_coo:
            weight, grad, history, master = _rows(names, weight, grad, history, master, row_wise=row_wise)
        elif grad.layout != torch.strided:
            raise TypeError(f"{names.grad}: layout {grad.layout}: must be strided or sparse_coo")
        else:
            grad = grad.resolve_conj().resolve_neg()
    elif isinstance(grad, RowSparse) and isinstance(grad.values, Tensor):
        values = grad.values.resolve_conj().resolve_neg()
        grad = grad if values is grad.values else RowSparse(values, grad.indices, grad.shape)
    if weight.is_complex():
        if row_wise:
            raise ValueError(f"{names.weight}: dtype {weight.dtype}: row-wise history is for real numbers")
        weight, history = torch.view_as_real(weight), _as_real(history)
        if isinstance(grad, RowSparse):
            grad = RowSparse(_as_real(grad.values), grad.indices, (*grad.shape, 2))
        else:
            grad = _as_real(grad)
    return weight, grad, history, master


def real_views(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The same updates with complex tensors as pairs of real numbers, and dense gradients in their weights' order.

    So the fast path takes complex numbers, and gradients in another order, which are copied, as of a transposition.
    Returns ``batches`` if there is neither, or if the fast path would not take the result, as with master copies.
    """
    written = [t for batch in batches for t in (*batch.weights, *batch.histories)]
    everything = [*written, *(grad for batch in batches for grad in batch.grads)]
    if any(batch.masters for batch in batches) or not set(PLAIN_TYPES).issuperset(map(type, everything)):
        return batches
    odd = [[i for i, each in enumerate(zip(b.weights, b.grads, strict=True)) if _is_odd(*each)] for b in batches]
    if not any(odd) or any(map(is_functorch_wrapped_tensor, everything)):
        return batches
    if any(t.layout != torch.strided for t in written):
        return batches
    may_share = _sharing(written)
    views, copied = [], 0
    for batch, which in zip(batches, odd, strict=True):
        weights, grads, histories = [*batch.weights], [*batch.grads], [*batch.histories]
        for i in which:
            weight, grad, history = weights[i], grads[i], histories[i]
            is_copied = grad.stride() != weight.stride() or grad.is_conj() or grad.is_neg()
            copied += grad.numel() if is_copied else 0
            if (grad.shape, grad.device) != (weight.shape, weight.device):
                return batches
            if may_share(grad):  # which the checks decide, and may refuse
                return batches
            if not weight.dtype == grad.dtype == history.dtype:
                return batches
            if weight.is_complex() and (batch.rule.row_wise or weight.is_conj() or history.is_conj()):
                return batches
            if copied > MOST_COPIED:
                return batches
            if is_copied:
                if has_gaps(weight.shape, weight.stride(), 1):
                    return batches
                grads[i] = torch.empty_like(weight).copy_(grad)
            if weight.is_complex():
                weights[i], grads[i], histories[i] = map(torch.view_as_real, (weight, grads[i], history))
        positions, names_at = batch.positions, batch.names_at
        views.append(Batch(batch.rule, weights, grads, histories, [], batch.lrs, batch.wds, positions, names_at))
    return views


def _sharing(written: list[Tensor]) -> Callable[[Tensor], bool]:
    """Return what tells whether a tensor's storage shares memory with one of those that are written to.

    Storages may overlap: PyTorch makes one for each part of a NumPy array that a tensor is made from.
    """
    memory = sorted(map(_memory, written))
    begins, ends = [begin for begin, _ in memory], [*itertools.accumulate((end for _, end in memory), max)]

    def shares(tensor: Tensor) -> bool:
        begin, end = _memory(tensor)
        earlier = bisect.bisect_left(begins, end)
        return earlier > 0 and ends[earlier - 1] > begin

    return shares


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor's storage, and of the byte after the last."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _is_odd(weight: Tensor, grad: Tensor) -> bool:
    is_dense = grad.layout == torch.strided
    return is_dense and (grad.stride() != weight.stride() or weight.is_complex() or grad.is_neg())


def _as_real(tensor: Tensor) -> Tensor:
    """The real view of a complex tensor; others, which the checks will refuse, as they are."""
    return torch.view_as_real(tensor) if isinstance(tensor, Tensor) and tensor.is_complex() else tensor


def _rows(names: Names, weight: Tensor, grad: Tensor, history: Tensor, master: Tensor | None, *,
          row_wise: bool) -> Operands:  # fmt: skip
    """A sparse COO gradient by rows: several sparse dimensions become one, each entry a row; without any, one row."""
    indices, values = grad._indices(), grad._values().resolve_conj().resolve_neg()
    count = grad.sparse_dim()
    if count == 1:
        return weight, RowSparse(values, indices[0], grad.shape), history, master
    written = [t for t in (weight, history, master) if t is not None]
    if row_wise or (count and not all(t.is_contiguous() for t in written)):
        need = "1 for row-wise history" if row_wise else "1 unless the weight and its state are contiguous"
        raise ValueError(f"{names.grad}: {count} sparse dimensions: must be {need}")
    if grad.shape != weight.shape:
        raise ValueError(f"{names.grad}: shape {tuple(grad.shape)}: must be {tuple(weight.shape)}, the weight's")
    for name, tensor in ((names.history, history), (names.master, master)):
        if tensor is not None and tensor.shape != weight.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}: must be {tuple(weight.shape)}")
    sizes, rest = weight.shape[:count], weight.shape[count:]
    if indices.device.type == "cpu":
        for d, size in enumerate(sizes):
            check_rows(names, indices[d], size)
    row = indices.new_zeros(indices.shape[1])
    is_inside = torch.ones_like(row, dtype=torch.bool)
    for d, size in enumerate(sizes):  # sizes as numbers, not as a tensor: the host would wait to send that
        row = row * size + indices[d]
        is_inside &= (indices[d] >= 0) & (indices[d] < size)
    # An entry outside the weight must not become another row: -1 is refused as any row id out of range.
    row = torch.where(is_inside, row, -1)
    shape = (math.prod(sizes), *rest)
    flat = RowSparse(values, row, shape)
    if count == 0:
        return weight[None], flat, history[None], None if master is None else master[None]
    return weight.view(shape), flat, history.view(shape), None if master is None else master.view(shape)


# ------------------------------------------------------------------------------------------------------------- DTensors


def _local(names: Names, weight: Any, grad: Any, history: Any, master: Any, *, row_wise: bool) -> Operands:
    """The local parts. A gradient that is placed differently, such as a pending sum, is redistributed first."""
    others = (names.grad, grad), (names.history, history), (names.master, master)
    for name, tensor in others:
        if tensor is not None and is_dtensor(tensor) != is_dtensor(weight):
            kind = "a DTensor" if is_dtensor(weight) else "an ordinary tensor, not a DTensor,"
            raise TypeError(f"{name}: must be {kind} like the weight")
    for name, tensor in others:  # as a whole: each process sees only its part
        shape = history_shape(tuple(weight.shape), row_wise=row_wise and tensor is history)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}: must be {shape}")
    placements = weight.placements
    if any(p.is_partial() for p in placements):
        raise ValueError(f"{names.weight}: placements {placements}: must be replicated or sharded")
    for name, tensor in others[1:]:
        if tensor is not None and not is_placed_as(tensor, weight):
            raise ValueError(f"{name}: placements {tensor.placements}: must be {placements}, the weight's")
    if row_wise and not has_whole_rows(weight):
        raise ValueError(f"{names.weight}: placements {placements}: row-wise history needs whole rows")
    grad = moved(names.grad, grad, weight)
    return tuple(None if t is None else local(t) for t in (weight, grad, history, master))  # type: ignore[return-value]
