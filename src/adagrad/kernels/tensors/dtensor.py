"""DTensors: tensors whose parts are held by several processes. Each process updates its own part."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, found out without an import: where one exists, the module has been imported."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def has_whole_rows(tensor: Any) -> bool:
    """Whether the rows of a DTensor are whole: it is sharded along its first dimension only, if at all."""
    # FSDP2 places tensor-parallel parameters by a class of its own, which has a ``dim`` but is no Shard.
    return all(getattr(placement, "dim", 0) == 0 for placement in tensor.placements)


def local(tensor: Any) -> Tensor:
    """This process's part, which shares memory with the DTensor."""
    part: Any = tensor.to_local()
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is not None and isinstance(part, module.AsyncCollectiveTensor):
        part = part.wait()
    return part  # type: ignore[no-any-return]


def from_local(part: Tensor, like: Any, shape: tuple[int, ...]) -> Tensor:
    """A DTensor of ``shape`` from the parts that each process has made, placed as ``like``; nothing is communicated."""
    stride = [1] * len(shape)
    for d in range(len(shape) - 1, 0, -1):
        stride[d - 1] = stride[d] * max(shape[d], 1)
    kind = sys.modules["torch.distributed.tensor"].DTensor
    made: Tensor = kind.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
    return made


def spread(tensor: Tensor, like: Any) -> Tensor:
    """A DTensor placed as ``like``, from a tensor that every process holds in full; nothing is communicated."""
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    made: Tensor = distribute(tensor, like.device_mesh, like.placements, src_data_rank=None)
    part = local(made)
    # Before PyTorch 2.13 always a view, which would keep all of the tensor in memory, and change it with each step.
    is_view = part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return from_local(part.clone(), like, tuple(tensor.shape)) if is_view else made


def is_placed_as(tensor: Any, like: Any) -> bool:
    """Whether two DTensors have the same mesh and placements."""
    return (tensor.device_mesh, tensor.placements) == (like.device_mesh, like.placements)


def moved(name: str, tensor: Any, like: Any) -> Tensor:
    """A DTensor placed as ``like``; ValueError, beginning with ``name``, if PyTorch cannot move it from its mesh."""
    if is_placed_as(tensor, like):
        return tensor  # type: ignore[no-any-return]
    mesh = like.device_mesh
    try:
        return tensor.redistribute(mesh, like.placements)  # type: ignore[no-any-return]
    except NotImplementedError:
        raise ValueError(f"{name}: on {tensor.device_mesh}: must be on {mesh}, like the weight") from None
