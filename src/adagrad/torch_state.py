"""The state of :class:`adagrad.torch.Adagrad`: its creation, and loading from checkpoints."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adagrad import checks
from adagrad.kernels.inspection import counts as plain_counts
from adagrad.kernels.inspection.layout import current_layout
from adagrad.kernels.names import Names
from adagrad.kernels.tensors.checks import PLAIN_TYPES
from adagrad.kernels.tensors.dtensor import from_local, has_whole_rows, is_dtensor, local, moved, spread
from adagrad.rule import history_shape
from adagrad.torch_options import number

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""The dtype of histories and master copies, where it differs from the parameter's."""


def new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Create the state of a parameter.

    ``step``, a one-element tensor; ``sum``, the history; with ``multi_precision`` the ``master`` copy, so that a
    checkpoint can be loaded into it. The first step makes a new copy if the parameter has changed since.
    """
    if group["fused"]:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
    else:
        wide = torch.get_default_dtype() == torch.float64
        step = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
    name = "initial_accumulator_value"
    start = checks.non_negative(name, number(name, group[name]))
    dtype = WIDE.get(p.dtype, p.dtype)
    if group["row_wise"]:
        history = _row_wise_history(p, group, start, dtype)
    else:
        value = complex(start, start) if p.is_complex() else start
        history = torch.full_like(p, value, dtype=dtype)
    state = {"step": step, "sum": history}
    if group["multi_precision"] and (copy := master(p, {})) is not None:
        state["master"] = copy
    return state


def _row_wise_history(p: Tensor, group: dict[str, Any], start: float, dtype: torch.dtype) -> Tensor:
    if p.ndim == 0:
        need = "must have rows, at least one dimension; put it into a group with row_wise=False"
        raise ValueError(f"row_wise=True: {_called(p, group)} of shape (): {need}")
    if p.is_complex():
        need = "must be real; put it into a group with row_wise=False"
        raise ValueError(f"row_wise=True: {_called(p, group)} of {p.dtype}: {need}")
    if getattr(p, "_fsdp_flattened", False):
        where = f"{_called(p, group)}, flattened by FullyShardedDataParallel"
        raise ValueError(f"row_wise=True: {where}: must have whole rows; fully_shard keeps them")
    shape = history_shape(tuple(p.shape), row_wise=True)
    if not is_dtensor(p):
        return p.detach().new_full(shape, start, dtype=dtype)
    if not has_whole_rows(p):
        where = f"{_called(p, group)} with placements {p.placements}"  # type: ignore[attr-defined]
        raise ValueError(f"row_wise=True: {where}: must have whole rows on a device")
    part = local(p.detach())
    return from_local(part.new_full(history_shape(tuple(part.shape), row_wise=True), start, dtype=dtype), p, shape)


def _called(p: Tensor, group: dict[str, Any]) -> str:
    k = next(k for k, q in enumerate(group["params"]) if q is p)
    return f"parameter {group['param_names'][k]!r}" if "param_names" in group else f"parameter {k} of its group"


def master(p: Tensor, state: dict[str, Any]) -> Tensor | None:
    """Return the master copy of a low-precision parameter; None for others.

    It is a new one if the state has none. Where the parameter is not its rounding, because something else has changed
    it, the new one has the parameter's values.
    """
    if p.dtype not in (torch.float16, torch.bfloat16):
        return None
    copy: Tensor | None = state.get("master")
    if copy is not None and not isinstance(copy, Tensor):
        raise TypeError(f"master: {type(copy).__name__}: must be a tensor, a copy of its parameter")
    p = p.detach()
    if copy is not None and not _can_compare(p, copy):
        return copy
    wide = p.to(WIDE[p.dtype])
    if copy is None:
        return wide
    rounded = copy.to(p.dtype)
    is_rounding = (rounded == p) | (rounded.isnan() & p.isnan())
    # Of a DTensor each process asks about its own part, without communication: the answers may differ.
    is_unchanged = (local(is_rounding) if is_dtensor(is_rounding) else is_rounding).all()
    return copy if bool(is_unchanged) else torch.where(is_rounding, copy.to(wide.dtype), wide)


def _can_compare(p: Tensor, copy: Tensor) -> bool:
    """Whether a parameter and its master copy can be compared; if not, later checks raise."""
    if p.device.type == "meta" or copy.shape != p.shape or copy.device != p.device or copy.layout != p.layout:
        return False
    return not (
        isinstance(p, FakeTensor) or any(type(t) in PLAIN_TYPES and t.numel() and not t.data_ptr() for t in (p, copy))
    )


# --------------------------------------------------------------------------------------------------------------- counts


def _check_count(where: str, count: Any) -> None:
    if not isinstance(count, Tensor):
        raise TypeError(f"{where}: step: not a tensor: must be a tensor of one number")
    if count.numel() != 1 or count.dtype == torch.bool:
        raise ValueError(f"{where}: step: {count.dtype} of shape {tuple(count.shape)}: must be a tensor of one number")
    if count.layout != torch.strided or count.is_neg() or count.is_conj() or count.is_quantized:
        kind = count.layout if count.layout != torch.strided else "quantized" if count.is_quantized else "a view"
        raise ValueError(f"{where}: step: {kind}: must be a plain tensor of one number")


class Counts:
    """The step counts of a list of parameters, each a one-element tensor, on any device."""

    def __init__(self, counts: list[Tensor], names: Callable[[int], Names]) -> None:
        """``names`` are for messages."""
        self._counts = counts
        self._addresses = np.empty(len(counts), np.int64)
        layout = current_layout()
        # On the CPU, and read and written by compiled code.
        self.are_plain = layout is not None and plain_counts.find(id(counts), layout, self._addresses)
        for i, count in enumerate(() if self.are_plain else counts):
            _check_count(names(i).state, count)

    def values(self, *, wait: bool) -> list[Any]:
        """Return one for each parameter, or one for all; without ``wait``, those on a device as float64 tensors."""
        values: list[Any]
        if self.are_plain:
            numbers = np.empty(len(self._counts))
            plain_counts.read(self._addresses, numbers)
            values = numbers.tolist()
        else:
            values = [float(count) if _is_known(count, wait) else count.double() for count in self._counts]
        alike = all(isinstance(value, float) for value in values) and len(set(values)) == 1
        return values[:1] if alike else values

    def advance(self) -> None:
        """Add 1 to each count."""
        if self.are_plain:
            plain_counts.advance(self._addresses)
        elif self._counts:
            with torch.inference_mode():  # for parameters made in it, counts are inference tensors
                torch._foreach_add_(self._counts, 1)


def _is_known(count: Tensor, wait: bool) -> bool:
    """Whether the host may read the value of a count."""
    return (wait or count.device.type == "cpu") and not count.is_meta and not isinstance(count, FakeTensor)


# ---------------------------------------------------------------------------------------------------------- checkpoints


class _Saved:
    """Wrapper of a checkpoint's tensor, which keeps PyTorch from casting a history to its parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def as_saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a ``state_dict`` to load with parameters' tensors hidden from casts, for :func:`fitted`."""
    if not isinstance(state_dict.get("state"), dict) or not isinstance(state_dict.get("param_groups"), (list, tuple)):
        raise ValueError("state_dict: must have 'state' and 'param_groups', as state_dict() returns it")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"state_dict: group {i}: must have 'params', as state_dict() returns it")
        options = group.keys() - {"params", "param_names", "lr"}
        if options and "lr_decay" not in options:
            raise ValueError(f"state_dict: group {i}: no 'lr_decay': must have the options of an AdaGrad optimizer")
    of_parameters = {key for group in state_dict["param_groups"] for key in group["params"]}
    hidden = dict(state_dict["state"])
    for key in of_parameters & hidden.keys():
        state = hidden[key]
        if not isinstance(state, dict):
            raise ValueError(f"state_dict: state of parameter {key!r}: {type(state).__name__}: must be a dict")
        hidden[key] = {name: _Saved(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    return {**state_dict, "state": hidden}


def fitted(where: str, p: Tensor, loaded: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return the ``loaded`` state of a parameter on its device, in the dtypes of a state.

    ValueError, beginning with ``where``, if something is missing or has another shape.
    """
    for name in ("step", "sum"):
        if name not in loaded:
            raise ValueError(f"{where}: no {name!r}: must have step and sum, like AdaGrad's states")
    return {name: _fitted(where, p, name, value, group) for name, value in loaded.items()}


def _fitted(where: str, p: Tensor, name: str, value: Any, group: dict[str, Any]) -> Any:
    if name == "step":
        return _count(where, p, value.tensor if isinstance(value, _Saved) else value, group)
    if name in ("sum", "master") and not isinstance(value, (_Saved, Tensor)):
        raise ValueError(f"{where}: {name}: {type(value).__name__}: must be a tensor")
    if not isinstance(value, _Saved):
        return value
    tensor = value.tensor
    if name not in ("sum", "master"):
        return tensor.to(p.device)
    if tensor.layout != torch.strided:
        raise ValueError(f"{where}: {name}: layout {tensor.layout}: must be a dense (strided) tensor")
    if is_dtensor(tensor) and not is_dtensor(p):
        raise ValueError(f"{where}: {name}: a DTensor: must be an ordinary tensor, like the parameter")
    if group["row_wise"] and is_dtensor(p) and not has_whole_rows(p):
        placements = p.placements  # type: ignore[attr-defined]
        raise ValueError(f"{where}: row_wise=True: placements {placements}: must have whole rows on a device")
    if tensor.is_complex() != p.is_complex():
        raise ValueError(f"{where}: {name}: {tensor.dtype}: must be {WIDE.get(p.dtype, p.dtype)}, for {p.dtype}")
    shape = history_shape(tuple(p.shape), row_wise=group["row_wise"] and name == "sum")
    if tuple(tensor.shape) != shape:
        why = f"of the row-wise history of {tuple(p.shape)}" if group["row_wise"] else "the parameter's"
        raise ValueError(f"{where}: {name}: shape {tuple(tensor.shape)}: must be {shape}, {why}")
    tensor = tensor.to(device=p.device, dtype=WIDE.get(p.dtype, p.dtype))
    if not is_dtensor(p):
        return tensor
    # A tensor that one process saved has all rows: each process takes its own.
    return moved(f"{where}: {name}", tensor, p) if is_dtensor(tensor) else spread(tensor, p)


def _is_count(value: Any) -> bool:
    try:
        return 0 <= float(value) < math.inf
    except (OverflowError, RuntimeError):  # a huge integer; a complex tensor
        return False


def _count(where: str, p: Tensor, value: Any, group: dict[str, Any]) -> Tensor:
    if isinstance(value, Tensor):
        _check_count(where, value)
    elif not isinstance(value, numbers.Real):
        raise ValueError(f"{where}: step: {type(value).__name__}: must be a number, or a tensor of one")
    if (not isinstance(value, Tensor) or _is_known(value, wait=False)) and not _is_count(value):
        raise ValueError(f"{where}: step: {checks.describe(value)}: must be finite and >= 0")
    if group["fused"]:
        return torch.as_tensor(value, dtype=torch.float32, device=p.device)
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float32, device="cpu")
