"""The counts of steps of a list of parameters, read and advanced by compiled code where they are plain."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from adagrad.kernels.formats import load, pointer, store
from adagrad.kernels.layout import COUNT, FLOAT32, FLOAT64, FORMAT, KIND, PLACE, SEEN, START, item, layout, look
from adagrad.kernels.numba_jit import borrowed, jit

_single, _double = np.empty(0, np.float32), np.empty(0, np.float64)


@jit(holds_gil=True)
def _read_counts(counts: int, how: Any, addresses: Any, values: Any) -> bool:
    """Addresses (made negative for float64) and values; False unless all are plain numbers on the CPU."""
    own_out, own_seen = np.empty(1, np.int64), np.zeros(SEEN, np.int64)
    out, seen, how = borrowed(own_out), borrowed(own_seen), borrowed(how)
    for i in range(len(addresses)):
        if not look(item(counts, i), how, out, seen) or seen[KIND] != 1 or seen[PLACE] != 0 or seen[COUNT] != 1:
            return False
        if seen[FORMAT] != FLOAT32 and seen[FORMAT] != FLOAT64:
            return False
        if seen[FORMAT] == FLOAT32:
            addresses[i], values[i] = seen[START], load(pointer(seen[START], _single, "history"), 0)
        else:
            addresses[i], values[i] = -seen[START], load(pointer(seen[START], _double, "history"), 0)
    own_out[:0], own_seen[:0] = 0, 0  # they are used by address above: this keeps them alive
    return True


@jit()
def _increment(addresses: Any) -> None:
    for address in addresses:
        if address > 0:
            single = pointer(address, _single, "history")
            store(single, 0, load(single, 0) + np.float32(1))
        else:
            double = pointer(-address, _double, "history")
            store(double, 0, load(double, 0) + 1.0)


def _check(counts: list[Tensor]) -> None:
    if set(map(type, counts)) == {Tensor} and set(map(Tensor.numel, counts)) == {1}:  # nearly always, and quick
        counts = [count for count in counts if count.dtype == torch.bool]
    for count in counts:
        if not isinstance(count, Tensor):
            raise TypeError("step: a count that is no tensor: must be a tensor of one number")
        if count.numel() != 1 or count.dtype == torch.bool:
            raise ValueError(f"step: {count.dtype} of shape {tuple(count.shape)}: must be a tensor of one number")


class Counts:
    """The counts of steps of a list of parameters, each a tensor of one number, wherever they are."""

    def __init__(self, counts: list[Tensor]) -> None:
        self._counts = counts
        self._addresses, self._values = np.empty(len(counts), np.int64), np.empty(len(counts))
        how = layout()
        self._plain = how is not None and _read_counts(id(counts), how, self._addresses, self._values)
        if not self._plain:
            _check(counts)

    def values(self, *, wait: bool) -> list[Any]:
        """One for each parameter, or one for all; those on a device as float64 there, unless ``wait`` says to wait."""
        if self._plain:
            values: list[Any] = self._values.tolist()
        else:
            values = [float(count) if wait or count.device.type == "cpu" else count.double() for count in self._counts]
        alike = all(isinstance(value, float) for value in values) and len(set(values)) == 1
        return values[:1] if alike else values

    def advance(self) -> None:
        """Add 1 to each count."""
        if self._plain:
            _increment(self._addresses)
        elif self._counts:
            with torch.no_grad():
                torch._foreach_add_(self._counts, 1)
