"""Updates of arrays that a kernel cannot address: any strides, byte order or alignment, tile by tile.

What a kernel can address as it is passes through uncopied; the rest goes through a small contiguous buffer and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

TILE = 16_384
"""Elements of a buffer."""


def tiles(weight: Any, grad: Any, history: Any, master: Any | None) -> Iterator[list[np.ndarray]]:
    """Contiguous, aligned, native one-dimensional pieces of the operands; what is written to them is written back."""
    operands: Any = [weight, grad, history] + ([] if master is None else [master])
    write: Any = ["readwrite", "nbo", "aligned", "contig"]
    read: Any = ["readonly", "nbo", "aligned", "contig"]
    with np.nditer(
        operands,
        flags=["external_loop", "buffered", "growinner", "zerosize_ok"],
        op_flags=[write, read, write, write][: len(operands)],
        op_dtypes=[o.dtype.newbyteorder("=") for o in operands],
        casting="equiv",
        order="K",
        buffersize=TILE,
    ) as pieces:
        if pieces.itersize:
            for piece in pieces:
                yield list(piece)


def row_blocks(weight: Any, grad: Any, history: Any, master: Any | None) -> Iterator[list[np.ndarray]]:
    """The same, by whole rows: a block of at least one row, copied to a buffer and back."""
    operands = [weight, grad, history] + ([] if master is None else [master])
    rows = max(TILE // max(math.prod(weight.shape[1:]), 1), 1)
    for start in range(0, len(weight), rows):
        views = [o[start : start + rows] for o in operands]
        pieces = [np.ascontiguousarray(view, view.dtype.newbyteorder("=")) for view in views]
        pieces = [np.require(piece, requirements=["C", "A", "W"]) for piece in pieces]
        yield pieces
        for i, (view, piece) in enumerate(zip(views, pieces, strict=True)):
            if i != 1 and not np.may_share_memory(view, piece):
                view[...] = piece
