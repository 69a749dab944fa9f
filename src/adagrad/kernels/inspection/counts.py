"""Step counts that are tensors: compiled code finds, reads and advances them if they are plain."""

from __future__ import annotations

from typing import Any

import numpy as np

from adagrad.kernels.cpu.formats import load, pointer, store
from adagrad.kernels.inspection.layout import (
    COUNT,
    DEVICE,
    FLOAT32,
    FLOAT64,
    FORMAT,
    INFO,
    KIND,
    START,
    describe,
    list_item,
)
from adagrad.kernels.runtime.memory import keep_alive, words
from adagrad.kernels.runtime.numba_jit import entry, jit

_single, _double = np.empty(0, np.float32), np.empty(0, np.float64)


@jit(helper=True)
def find_counts(counts: int, layout: Any, addresses: Any) -> bool:
    """Fill ``addresses`` with those of the counts (negated for float64) in the list at the address ``counts``.

    False unless all are plain float32 or float64 tensors of one number on the CPU.
    """
    info = words(INFO)
    layout_at, info_at = layout.ctypes.data, info.ctypes.data
    for i in range(len(addresses)):
        is_plain = describe(list_item(counts, i), layout_at, info_at)
        if not is_plain or info[KIND] != 1 or info[DEVICE] != 0 or info[COUNT] != 1:
            return False
        if info[FORMAT] != FLOAT32 and info[FORMAT] != FLOAT64:
            return False
        addresses[i] = info[START] if info[FORMAT] == FLOAT32 else -info[START]
    keep_alive(info)
    return True


@jit()
def read(addresses: Any, values: Any) -> None:
    """Fill ``values``, float64, with the counts at the addresses from :func:`find_counts`."""
    for i, address in enumerate(addresses):
        if address > 0:
            values[i] = load(pointer(address, _single, "history"), 0)
        else:
            values[i] = load(pointer(-address, _double, "history"), 0)


@jit(helper=True)
def advance_counts(addresses: Any) -> None:
    """Add 1 to each of the counts at the addresses from :func:`find_counts`."""
    for address in addresses:
        if address > 0:
            single = pointer(address, _single, "history")
            store(single, 0, load(single, 0) + np.float32(1))
        else:
            double = pointer(-address, _double, "history")
            store(double, 0, load(double, 0) + 1.0)


# For Python:
find, advance = entry(find_counts, holds_gil=True), entry(advance_counts)
