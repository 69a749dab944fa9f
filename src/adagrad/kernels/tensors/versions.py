"""The versions of tensors, by which autograd knows whether what it saved of them is stale."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version


def _takes_lists() -> bool:
    try:
        increment_version([])
    except RuntimeError:
        return False
    return True


_TAKES_LISTS = _takes_lists()
"""Whether this PyTorch marks a list at once, as it does since 2.7."""


def mark_changed(tensors: list[Tensor]) -> None:
    """Tell autograd that what it saved of the tensors is stale: kernels do not tell it."""
    if _TAKES_LISTS:
        increment_version(tensors)
        return
    for tensor in tensors:
        if not tensor.is_inference():  # those are not tracked
            increment_version(tensor)
