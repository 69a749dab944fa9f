"""A list of dense updates that is carried out beside row-sparse ones, by one call of compiled code.

The call gets it as one block of words: the worker, the address of the worker's arguments, how many weights and elements
there are, from how many elements on it is worth several threads and how many spans of memory are written to; then all
starts and all ends of spans. Zeros stand for no list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from adagrad.kernels import cpu_dense
from adagrad.kernels.cpu_dense import GIVEN, arguments, kernel
from adagrad.kernels.numba_jit import jit, place, run
from adagrad.kernels.table import PLACES, formats, table
from adagrad.rule import Rule

WORKER, ARGUMENTS, WEIGHTS, ELEMENTS, SMALL, WRITTEN, SPANS = range(7)


class Beside(NamedTuple):
    """A list, looked at and checked. Keep its arrays while it is in use."""

    words: np.ndarray
    span_count: int
    pointed_at: tuple[np.ndarray, ...]
    """What the words have the addresses of."""


NOTHING = Beside(np.zeros(SPANS, np.int64), 0, ())


def dense_beside(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], rates: np.ndarray,
                 rule: Rule) -> Beside | None:  # fmt: skip
    """The block for a list; None unless all of it is plain, on the CPU and of the same formats.

    ``rates`` has a row for each weight, or one for all. The compiled call compares the spans.
    """
    found = table(weights, grads, histories, masters, rule.row_wise)
    if not 0 <= found.common < PLACES:
        return None
    work = kernel(*formats(found.common)[1], rule.row_wise)
    block = arguments(found.rows, rates, rule.scalars, found.total)
    about = work, block.ctypes.data, len(weights), found.total, cpu_dense.SMALL, found.written
    words = np.concatenate([about, found.spans.ravel()])
    return Beside(words, found.spans.shape[1], (block, found.rows, rates, rule.scalars))


@jit(helper=True)
def put_spans(words: Any, spans: Any, first: int, gap: int) -> None:
    """Put its spans into the columns of ``spans`` from ``first`` on, those of what is read another ``gap`` later."""
    count = (len(words) - SPANS) // 2
    for j in range(count):
        at = first + j if j < words[WRITTEN] else first + j + gap
        spans[0, at], spans[1, at] = words[SPANS + j], words[SPANS + count + j]


@jit(helper=True)
def is_large(words: Any) -> Any:
    """Whether it is worth several threads."""
    return words[ELEMENTS] >= words[SMALL] and words[ELEMENTS] > 0


@jit(helper=True)
def carry_out_beside(words: Any, count: int) -> None:
    """Update the weights, by ``count`` threads if that is more than one and they are worth it."""
    if words[ELEMENTS] > 0:
        count = count if count > 1 and is_large(words) else 1
        run(words[WORKER], numba.carray(place(words[ARGUMENTS]), GIVEN, np.int64), count)
