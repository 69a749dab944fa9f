"""Counts of steps that are tensors: found, read and advanced by compiled code where they are plain."""

from __future__ import annotations

from typing import Any

import numpy as np

from adagrad.kernels.formats import load, pointer, store
from adagrad.kernels.layout import COUNT, FLOAT32, FLOAT64, FORMAT, KIND, PLACE, SEEN, START, item, look
from adagrad.kernels.numba_jit import jit, uncounted

_single, _double = np.empty(0, np.float32), np.empty(0, np.float64)


@jit(holds_gil=True)
def find_counts(counts: int, how: Any, addresses: Any) -> bool:
    """Addresses (made negative for float64) of a list of counts; False unless all are plain numbers on the CPU."""
    own_out, own_seen = np.empty(1, np.int64), np.zeros(SEEN, np.int64)
    out, seen, how = uncounted(own_out), uncounted(own_seen), uncounted(how)
    for i in range(len(addresses)):
        if not look(item(counts, i), how, out, seen) or seen[KIND] != 1 or seen[PLACE] != 0 or seen[COUNT] != 1:
            return False
        if seen[FORMAT] != FLOAT32 and seen[FORMAT] != FLOAT64:
            return False
        addresses[i] = seen[START] if seen[FORMAT] == FLOAT32 else -seen[START]
    own_out[:0], own_seen[:0] = 0, 0  # they are used by address above: this keeps them alive
    return True


@jit()
def read_counts(addresses: Any, values: Any) -> None:
    """The counts at these addresses, as float64."""
    for i, address in enumerate(addresses):
        if address > 0:
            values[i] = load(pointer(address, _single, "history"), 0)
        else:
            values[i] = load(pointer(-address, _double, "history"), 0)


@jit()
def advance_counts(addresses: Any) -> None:
    """Add 1 to each of the counts at these addresses."""
    for address in addresses:
        if address > 0:
            single = pointer(address, _single, "history")
            store(single, 0, load(single, 0) + np.float32(1))
        else:
            double = pointer(-address, _double, "history")
            store(double, 0, load(double, 0) + 1.0)
