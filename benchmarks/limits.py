"""The hardware limit: the same bytes moved, or the same exact arithmetic, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cases import Dense, Rows, dtype_of

AHEAD = 8
_fast = {"nopython": True, "nogil": True, "error_model": "numpy", "cache": False}


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, address: Any) -> Any:
    """Prefetch the cache line at ``address`` for a write."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        form = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], byte), word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@numba.jit(**_fast)
def _stream_serial(w: Any, g: Any, h: Any, none: Any) -> None:
    for i in range(len(w)):
        x = g[i] & none
        h[i] += x
        w[i] += x


@numba.jit(parallel=True, **_fast)
def _stream(w: Any, g: Any, h: Any, none: Any, workers: int) -> None:
    n = len(w)
    for k in numba.prange(workers):
        first, last = n * k // workers, n * (k + 1) // workers
        _stream_serial(w[first:last], g[first:last], h[first:last], none)


@numba.jit(**_fast)
def _exact_blocks(w: Any, g: Any, h: Any, lr: Any, eps: Any, blocks: int) -> None:
    for _ in range(blocks):
        for i in range(len(w)):
            x = g[i]
            history = h[i] + x * x
            h[i] = history
            w[i] = w[i] - lr * (x / (math.sqrt(history) + eps))


@numba.jit(parallel=True, **_fast)
def _exact_loop(w: Any, g: Any, h: Any, lr: Any, eps: Any, blocks: int, workers: int) -> None:
    """Repeat the exact arithmetic on data in the first-level cache of each core."""
    for k in numba.prange(workers):
        _exact_blocks(w[k], g[k], h[k], lr, eps, blocks * (k + 1) // workers - blocks * k // workers)


@numba.jit(parallel=True, **_fast)
def _gather_modify_scatter(w: Any, h: Any, v: Any, rows: Any, extra: Any, none: Any, workers: int) -> None:
    """Read and write each distinct row once, and read every gradient row once, in order."""
    n, m, columns = len(rows), len(extra), w.shape[1]
    w0, h0 = np.int64(w.ctypes.data), np.int64(h.ctypes.data)
    size = columns * w.itemsize
    history = columns * h.itemsize
    for k in numba.prange(workers):
        for i in range(n * k // workers, n * (k + 1) // workers):
            if i + AHEAD < n:
                for offset in range(0, size, 64):
                    prefetch(w0 + rows[i + AHEAD] * size + offset)
                for offset in range(0, history, 64):
                    prefetch(h0 + rows[i + AHEAD] * history + offset)
            a, b, c = w[rows[i]], h[rows[i]], v[i]
            for j in range(columns):
                x = c[j] & none
                b[j] += x
                a[j] += x
        total = np.zeros(columns, v.dtype)
        for i in range(m * k // workers, m * (k + 1) // workers):
            c = extra[i]
            for j in range(columns):
                total[j] += c[j]
        w[rows[n * k // workers], 0] += total[0] * 0


def _numbers(array: np.ndarray) -> np.ndarray:
    """View numbers as integers: the same bytes to move.

    They stay as they are, because only zeros, which the compiler does not know of, are added to them: other contenders
    use this memory, and PyTorch's root of numbers that no history can be, such as negative ones, takes ten times as
    long.
    """
    return array.view(f"i{array.itemsize}")


class Limit:
    """The hardware limit of a case, on the memory of the case."""

    name = "limit"

    def __init__(self, case: Any, data: Any, threads: int) -> None:
        self.threads = threads
        if isinstance(case, Dense):
            operands = data.weights, data.grads, data.histories
            # Many weights are concatenated: the limit is one launch over all.
            self._arrays = [_numbers(np.concatenate([a.reshape(-1) for a in given]) if len(given) > 1
                                     else given[0].reshape(-1)) for given in operands]  # fmt: skip
        else:
            assert isinstance(case, Rows)
            self._rows = np.unique(data.indices)
            values = _numbers(data.values)
            self._rows_data = (
                _numbers(data.weights[0]),
                _numbers(data.histories[0]),
                values[: len(self._rows)],
                self._rows,
                values[len(self._rows) :],
            )
            self._arrays = None
        self._none = _numbers(np.zeros(1, dtype_of(case.dtype)))[0]

    def __call__(self) -> None:
        if self._arrays is None:
            _gather_modify_scatter(*self._rows_data, self._none, self.threads)
        else:
            w, g, h = self._arrays
            if len(w) < 32_768 or self.threads < 2:
                _stream_serial(w, g, h, self._none)
            else:
                _stream(w, g, h, self._none, self.threads)


class ExactLoop:
    """The rule's arithmetic for as many float32 elements in the first-level cache: bound by division and root."""

    name = "exact loop in L1"
    block = 2048

    def __init__(self, case: Dense, data: Any, threads: int) -> None:
        threads = 1 if case.elements < 32_768 else threads
        self.threads = threads
        self.blocks = max(case.elements // self.block, 1)
        size = min(self.block, case.elements)
        self.w, self.g, self.h = (np.ones((threads, size), np.float32) for _ in range(3))

    def __call__(self) -> None:
        lr, eps = np.float32(0.01), np.float32(1e-6)
        if self.threads < 2:
            _exact_blocks(self.w[0], self.g[0], self.h[0], lr, eps, self.blocks)
        else:
            _exact_loop(self.w, self.g, self.h, lr, eps, self.blocks, self.threads)
