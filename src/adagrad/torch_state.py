"""The state of :class:`adagrad.torch.Adagrad`: how it begins, and how it comes back from checkpoints."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adagrad.kernels.counts import advance_counts, find_counts, read_counts
from adagrad.kernels.dtensor import from_local, has_whole_rows, is_dtensor, local, spread
from adagrad.kernels.layout import layout
from adagrad.kernels.tensor_checks import PLAIN_TYPES
from adagrad.rule import history_shape

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""The dtype of histories and master copies, where it is not the parameter's."""


def new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter that has not been updated yet.

    ``step``, a tensor of one number; ``sum``, the history; under ``multi_precision`` the ``master`` copy, so that a
    checkpoint finds a place for its own. The first step makes another where the parameter was given values meanwhile.
    """
    if group["fused"]:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
    else:
        wide = torch.get_default_dtype() == torch.float64
        step = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
    start = group["initial_accumulator_value"]
    dtype = WIDE.get(p.dtype, p.dtype)
    if group["row_wise"]:
        history = _row_wise_history(p, group, float(start), dtype)
    else:
        value = complex(start, start) if p.is_complex() else start
        history = torch.full_like(p, value, dtype=dtype, memory_format=torch.preserve_format)
    state = {"step": step, "sum": history}
    if group["multi_precision"] and (copy := master(p, {}, is_ours=False)) is not None:
        state["master"] = copy
    return state


def _row_wise_history(p: Tensor, group: dict[str, Any], start: float, dtype: torch.dtype) -> Tensor:
    if p.ndim == 0:
        raise ValueError("row_wise=True: parameter of shape (): must have rows: one dimension or more")
    if p.is_complex():
        raise ValueError(f"row_wise=True: parameter of {p.dtype}: must be real")
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


def master(p: Tensor, state: dict[str, Any], *, is_ours: bool) -> Tensor | None:
    """The master copy of a parameter of low precision; None for others.

    A new one if the state has none, or one that the parameter is not the rounding of: something else has changed the
    parameter since. That is not asked where the parameter ``is_ours``: as our last step left it.
    """
    if p.dtype not in (torch.float16, torch.bfloat16):
        return None
    copy: Tensor | None = state.get("master")
    if copy is not None and not isinstance(copy, Tensor):
        raise TypeError(f"master: {type(copy).__name__}: must be a tensor, a copy of its parameter")
    if copy is not None and (is_ours or _is_rounding(p.detach(), copy)):
        return copy
    return p.detach().to(WIDE[p.dtype], memory_format=torch.preserve_format)


def _is_rounding(p: Tensor, copy: Tensor) -> bool:
    """Whether ``p`` is the rounding of ``copy``; of what has no values, or other ones, later checks complain."""
    if p.device.type == "meta" or copy.shape != p.shape or copy.device != p.device or copy.layout != p.layout:
        return True
    if isinstance(p, FakeTensor) or any(type(t) in PLAIN_TYPES and t.numel() and not t.data_ptr() for t in (p, copy)):
        return True
    rounded = copy.to(p.dtype)
    return bool(((rounded == p) | (rounded.isnan() & p.isnan())).all())


# ------------------------------------------------------------------------------------------------------------- counts


def _check(counts: list[Tensor], at: str = "") -> None:
    for count in counts:
        if not isinstance(count, Tensor):
            raise TypeError(f"{at}step: a count that is no tensor: must be a tensor of one number")
        if count.numel() != 1 or count.dtype == torch.bool:
            raise ValueError(f"{at}step: {count.dtype} of shape {tuple(count.shape)}: must be a tensor of one number")
        if count.layout != torch.strided or count.is_neg() or count.is_conj() or count.is_quantized:
            kind = count.layout if count.layout != torch.strided else "quantized" if count.is_quantized else "a view"
            raise ValueError(f"{at}step: {kind}: must be a plain tensor of one number, to be added to")


class Counts:
    """The counts of steps of a list of parameters, each a tensor of one number, wherever they are."""

    def __init__(self, counts: list[Tensor]) -> None:
        self._counts = counts
        self._addresses = np.empty(len(counts), np.int64)
        how = layout()
        self._plain = how is not None and find_counts(id(counts), how, self._addresses)
        if not self._plain:
            _check(counts)

    def values(self, *, wait: bool) -> list[Any]:
        """One for each parameter, or one for all; those on a device as float64 there, unless ``wait`` says to wait."""
        values: list[Any]
        if self._plain:
            numbers = np.empty(len(self._counts))
            read_counts(self._addresses, numbers)
            values = numbers.tolist()
        else:
            values = [float(count) if _is_known(count, wait) else count.double() for count in self._counts]
        alike = all(isinstance(value, float) for value in values) and len(set(values)) == 1
        return values[:1] if alike else values

    def advance(self) -> None:
        """Add 1 to each count."""
        if self._plain:
            advance_counts(self._addresses)
        elif self._counts:
            with torch.inference_mode():  # counts of parameters that were made in it are inference tensors
                torch._foreach_add_(self._counts, 1)


def _is_known(count: Tensor, wait: bool) -> bool:
    """Whether the host may ask for the value of a count."""
    return (wait or count.device.type == "cpu") and not isinstance(count, FakeTensor)


# -------------------------------------------------------------------------------------------------------- checkpoints


class _Saved:
    """A tensor of a checkpoint. PyTorch would cast a history to its parameter's dtype: this it leaves alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def as_saved(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook before loading: ``state_dict`` with its parameters' tensors hidden from casts, for :func:`fitted`."""
    of_parameters = {key for group in state_dict["param_groups"] for key in group["params"]}
    hidden = {
        key: {name: _Saved(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        if key in of_parameters and isinstance(state, dict)
        else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": hidden}


def fitted(where: str, p: Tensor, loaded: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """The ``loaded`` state of a parameter, on its device and in the dtypes that this state has.

    Raises ValueError, beginning with ``where``, where something is missing or of another shape.
    """
    for name in ("step", "sum"):
        if name not in loaded:
            raise ValueError(f"{where}: no {name!r}: must have step and sum, as AdaGrad's states do")
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
    if tensor.is_complex() != p.is_complex():
        raise ValueError(f"{where}: {name}: {tensor.dtype}: must be {WIDE.get(p.dtype, p.dtype)}, for {p.dtype}")
    shape = history_shape(tuple(p.shape), row_wise=group["row_wise"] and name == "sum")
    if tuple(tensor.shape) != shape:
        why = f"of the row-wise history of {tuple(p.shape)}" if group["row_wise"] else "the parameter's"
        raise ValueError(f"{where}: {name}: shape {tuple(tensor.shape)}: must be {shape}, {why}")
    tensor = tensor.to(device=p.device, dtype=WIDE.get(p.dtype, p.dtype))
    # What one process saved has all rows: each process takes its own.
    return spread(tensor, p) if is_dtensor(p) and not is_dtensor(tensor) else tensor


def _count(where: str, p: Tensor, value: Any, group: dict[str, Any]) -> Tensor:
    if isinstance(value, Tensor):
        _check([value], f"{where}: ")
    elif not isinstance(value, numbers.Real):
        raise ValueError(f"{where}: step: {type(value).__name__}: must be a number, or a tensor of one")
    if group["fused"]:
        return torch.as_tensor(value, dtype=torch.float32, device=p.device)
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float32, device="cpu")
