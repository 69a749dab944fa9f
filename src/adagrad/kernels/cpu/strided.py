"""Updates of arrays that a kernel cannot address: any strides, byte order or alignment, tile by tile.

What a kernel can address as it is passes through uncopied; the rest goes through a small contiguous buffer and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from adagrad.arrays import row_length
from adagrad.kernels.cpu import dense as cpu_dense
from adagrad.rule import LANES, Rule

Memories: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]"
"""The memory, on the CPU, of weight, gradient, history and master copy (None for none)."""

TILE = 16_384
"""Elements of a buffer."""


def compile_workers(shape: tuple[int, ...], formats: Any, rule: Rule) -> None:
    """Compile, if need be, what :func:`update` launches for a weight of this shape: before anything changes."""
    if _has_long_rows(shape, rule):
        for writes_weights in (False, True):
            cpu_dense.row_part_kernel(*formats, writes_weights)
    else:
        cpu_dense.kernel(*formats, rule.row_wise)


def _has_long_rows(shape: tuple[int, ...], rule: Rule) -> bool:
    """Whether the history has one value for each row, and a row does not fit a buffer."""
    return rule.row_wise and row_length(shape) > TILE


def update(memories: Memories, formats: Any, rates: np.ndarray, rule: Rule, threads: int | None) -> None:
    """Update one weight."""
    weight, grad, history, master = memories
    if _has_long_rows(weight.shape, rule):
        for r in range(len(weight)):
            row = slice(r, r + 1)
            copy = None if master is None else master[row]
            _long_row(weight[row], grad[row], history[row], copy, formats, rates, rule)
        return
    pieces = row_blocks if rule.row_wise else tiles
    for piece in pieces(weight, grad, history, master):
        table = np.array([cpu_dense.table_row(rule, *piece)])
        cpu_dense.launch(table, piece[0].size, rates, rule.scalars, formats, rule.row_wise, threads)


def _long_row(
    row: np.ndarray, grad: np.ndarray, history: np.ndarray, master: np.ndarray | None, formats: Any, rates: np.ndarray,
    rule: Rule,
) -> None:  # fmt: skip
    """Row-wise, one row longer than a buffer: a pass over its pieces for the history, another for the weight."""
    shared = np.zeros(LANES + 2, history.dtype.newbyteorder("="))
    lanes, shared[LANES] = shared[:LANES], history.reshape(1)[0]
    for size in _pass(row, grad, shared, master, formats, rates, rule, writes_weights=False):
        lanes[:] = np.roll(lanes, -size)  # the next piece begins in lane 0, wherever in the row it lies
    lanes[:] = np.roll(lanes, row.size)
    for _ in _pass(row, grad, shared, master, formats, rates, rule, writes_weights=True):
        pass
    history[...] = shared[LANES + 1]


def _pass(
    row: Any, grad: Any, shared: np.ndarray, master: Any | None, formats: Any, rates: np.ndarray, rule: Rule,
    *, writes_weights: bool,
) -> Iterator[int]:  # fmt: skip
    """One pass over the pieces of a row, in order; yields the size of each when it is done."""
    operands, written = [row, grad] + ([] if master is None else [master]), [writes_weights, False, writes_weights]
    for w, g, *m in _pieces(operands, written, order="C"):
        addresses = [array.ctypes.data for array in (w, g, shared, *m)] + ([] if m else [0])
        cpu_dense.launch_row_part(
            np.array([[*addresses, w.size, row.size]]), rates, rule.scalars, formats, writes_weights
        )
        yield w.size


def tiles(weight: Any, grad: Any, history: Any, master: Any | None) -> Iterator[list[np.ndarray]]:
    """Contiguous, aligned, native one-dimensional pieces of the operands; what is written to them is written back."""
    # Axes in the order of the weight's memory: where the gradient's differs, nditer would take the order of the axes,
    # and copy weight and history there and back.
    axes = sorted(range(weight.ndim), key=lambda axis: -abs(weight.strides[axis]))
    operands = [each.transpose(axes) for each in (weight, grad, history, master) if each is not None]
    return _pieces(operands, [True, False, True, True], order="K")


def _pieces(operands: Any, written: list[bool], order: Any) -> Iterator[list[np.ndarray]]:
    layout = ["nbo", "aligned", "contig"]
    flags: Any = [["readwrite" if write else "readonly", *layout] for write in written]
    with np.nditer(
        operands,
        flags=["external_loop", "buffered", "growinner", "zerosize_ok"],
        op_flags=flags[: len(operands)],
        op_dtypes=[o.dtype.newbyteorder("=") for o in operands],
        casting="equiv",
        order=order,
        buffersize=TILE,
    ) as pieces:
        if pieces.itersize:
            for piece in pieces:
                yield list(piece)


def row_blocks(weight: Any, grad: Any, history: Any, master: Any | None) -> Iterator[list[np.ndarray]]:
    """Pieces of whole rows, which must fit a buffer; they are copied there and back if need be."""
    operands = [each for each in (weight, grad, history, master) if each is not None]
    rows = max(TILE // max(row_length(weight.shape), 1), 1)
    for start in range(0, len(weight), rows):
        views = [o[start : start + rows] for o in operands]
        pieces = [np.ascontiguousarray(view, view.dtype.newbyteorder("=")) for view in views]
        pieces = [np.require(piece, requirements=["C", "A"]) for piece in pieces]
        yield pieces
        for i, (view, piece) in enumerate(zip(views, pieces, strict=True)):
            if i != 1 and not np.may_share_memory(view, piece):
                view[...] = piece
