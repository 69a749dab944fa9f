"""Checks of torch tensors one by one, for what compiled code has not found plain: on any device, of any kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adagrad.arrays import Operand, overlaps_itself
from adagrad.kernels.checked import Update, check_update
from adagrad.kernels.tensor_layout import PLAIN_TYPES
from adagrad.row_sparse import RowSparse
from adagrad.rule import Rule, history_shape


def is_memory(tensor: Tensor) -> bool:
    """Whether ``tensor`` is its memory and nothing else: no instance of a subclass that gives it another meaning."""
    kind = type(tensor)
    return kind in PLAIN_TYPES or (
        kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        and kind.__torch_function__ is torch._C._disabled_torch_function_impl
    )


def checked(i: int, weight: Any, grad: Any, history: Any, master: Any, rule: Rule) -> Update:
    """The operands of an update; raises what :func:`check_update` does, and knows other devices."""
    found = check_update(f"[{i}]", weight, grad, history if master is None else (master, history), rule)
    for o in (found.weight, found.history, found.master, found.grad):
        if o is None or o.array.device.type not in ("cpu", "cuda"):
            continue
        if o.array.numel() and not o.array.data_ptr():
            raise ValueError(f"{o.name}: address 0: must have memory for its {o.array.numel()} elements")
        if o.memory is None and o is not found.grad and overlaps_itself(_addresses(o.array)):
            raise ValueError(f"{o.name}: strides {o.array.stride()}: overlaps itself")
    return found


def check_wrapped(i: int, weight: Tensor, grad: Any, history: Tensor, master: Tensor | None, rule: Rule) -> None:
    """What can be asked of any tensor."""
    values = grad.values if isinstance(grad, RowSparse) else grad
    wanted = history_shape(tuple(weight.shape), row_wise=rule.row_wise)
    for name, tensor, shape in (("grads", grad, weight.shape), ("history in states", history, wanted)):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}[{i}]: shape {tuple(tensor.shape)}: must be {tuple(shape)}")
    for name, tensor in (("grads", values), ("history in states", history), ("master copy in states", master)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}[{i}]: device {tensor.device}: must be {weight.device}")


def operands_of(u: Update) -> tuple[list[Operand], list[Operand]]:
    """What is written to, and what is read; their memory is right in its addresses on any device, not to be read."""
    written, read = [o for o in (u.weight, u.history, u.master) if o is not None], [u.grad]
    if u.indices is not None:
        read.append(Operand(f"indices of {u.grad.name}", u.indices, "", u.weight.device, None))
    return [_placed(o) for o in written], [_placed(o) for o in read]


def _placed(o: Operand) -> Operand:
    if o.memory is not None or not isinstance(o.array, Tensor) or o.array.device.type not in ("cpu", "cuda"):
        return o
    return o._replace(memory=o.array.numpy() if o.array.device.type == "cpu" else _addresses(o.array))


def _addresses(tensor: Tensor) -> np.ndarray:
    """An array that lies where ``tensor`` does, on any device: not to be read."""
    interface = {
        "data": (tensor.data_ptr(), False),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
        "typestr": f"|V{tensor.element_size()}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
