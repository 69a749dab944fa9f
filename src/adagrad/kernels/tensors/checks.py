"""Checks of single torch tensors that compiled code has not found plain: on any device, of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from adagrad.arrays import Operand, overlaps_itself, refuse_overlap
from adagrad.kernels.names import Names, refuse_row

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""The types whose objects are nothing but their memory (a buffer is a Tensor)."""


def are_memory(given: Sequence[Any]) -> bool:
    """Whether the tensors are nothing but their memory: not of subclasses or transforms that wrap others."""
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
    return all(is_memory(type(tensor)) and not is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def is_memory(kind: type[Tensor]) -> bool:
    """Whether the tensors of a class are nothing but their memory."""
    return kind in PLAIN_TYPES or (
        kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        and kind.__torch_function__ is torch._C._disabled_torch_function_impl
    )


def check_memory(written: Sequence[Operand], read: Operand) -> None:
    """ValueError for CPU and CUDA tensors without memory, and CUDA tensors written to that overlap themselves."""
    for o in (*written, read):
        if o.array.device.type not in ("cpu", "cuda"):
            continue
        if o.array.numel() and not o.array.data_ptr():
            raise ValueError(f"{o.name}: address 0: must have memory for its {o.array.numel()} elements")
        if o.memory is None and o is not read and overlaps_itself(_addresses(o.array)):
            refuse_overlap(o, o.array.stride())


def refuse_overlaps(written: Sequence[Operand]) -> None:
    """ValueError for tensors that certainly overlap themselves, by PyTorch's own check before it writes in place."""
    for o in written:
        with suppress(RuntimeError):  # of tensors of a transform, which have no memory of their own
            if torch._debug_has_internal_overlap(o.array) == 1:
                refuse_overlap(o, o.array.stride())


def check_rows(names: Names, indices: Tensor, rows: int) -> None:
    """IndexError for a row id outside the weight, on any device, for which it waits."""
    if indices.device.type == "meta":
        return
    outside = (indices < 0) | (indices >= rows)
    try:
        if not bool(outside.any()):
            return
    except RuntimeError:  # fake tensors, and those of a transform, have no numbers to check
        return
    position = int(outside.nonzero()[0, 0])
    refuse_row(names, position, int(indices[position]), rows)


def placed(o: Operand) -> Operand:
    """The operand with ``memory`` whose addresses are right on any device; that memory must not be read."""
    if o.memory is not None or not isinstance(o.array, Tensor) or o.array.device.type not in ("cpu", "cuda"):
        return o
    return o._replace(memory=_addresses(o.array))


def _addresses(tensor: Tensor) -> np.ndarray:
    """An array at the addresses of ``tensor``, on any device: it must not be read."""
    interface = {
        "data": (tensor.data_ptr(), False),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
        "typestr": f"|V{tensor.element_size()}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
