"""A list of dense updates that is carried out beside row-sparse ones, by one call of compiled code.

The call gets it as one block of words: how many launches there are (one for each combination of formats), how many
weights and elements, from how many elements on a launch is worth several threads, and how many spans of memory are
written to; for each launch the worker, the address of its arguments and its elements; then all starts and all ends of
spans. Zeros stand for no list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from adagrad.kernels import cpu_dense
from adagrad.kernels.cpu_dense import GIVEN, arguments, kernel
from adagrad.kernels.numba_jit import jit, place, run, worker_count
from adagrad.kernels.table import PLACES, formats, table
from adagrad.rule import Rule

LAUNCHES, WEIGHTS, ELEMENTS, THRESHOLD, WRITTEN = range(5)
ABOUT = 5
"""Words before those of the launches."""

WORKER, ARGUMENTS, WORK = range(3)
LAUNCH = 3
"""Words of a launch."""


class Beside(NamedTuple):
    """A list, looked at and checked. Keep its arrays while it is in use."""

    words: np.ndarray
    span_count: int
    pointed_at: tuple[np.ndarray, ...]
    """What the words have the addresses of."""


NOTHING = Beside(np.zeros(ABOUT, np.int64), 0, ())


def dense_beside(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], rates: np.ndarray,
                 rule: Rule) -> Beside | None:  # fmt: skip
    """The block for a list; None unless all of it is plain and on the CPU.

    ``rates`` has a row for each weight, or one for all. The compiled call compares the spans.
    """
    found = table(weights, grads, histories, masters, rule.row_wise)
    groups, n = found.groups(), len(weights)
    if sum(len(which) for _, which in groups) < n or groups[-1][0] >= PLACES:
        return None
    launches, pointed_at = [], [rule.scalars]
    for code, which in groups:
        rows, _, elements = found.part(which)
        some = rates if len(groups) == 1 or len(rates) == 1 else rates[which]
        block = arguments(rows, some, rule.scalars, elements)
        launches += [kernel(*formats(code)[1], rule.row_wise), block.ctypes.data, elements]
        pointed_at += [block, rows, some]
    about = [len(groups), n, found.total, cpu_dense.SMALL, found.written]
    words = np.concatenate([about + launches, found.spans.ravel()])
    return Beside(words, found.spans.shape[1], tuple(pointed_at))


@jit(helper=True)
def put_spans(words: Any, spans: Any, first: int, gap: int) -> None:
    """Put its spans into the columns of ``spans`` from ``first`` on, those of what is read another ``gap`` later."""
    begin = ABOUT + LAUNCH * words[LAUNCHES]
    count = (len(words) - begin) // 2
    for j in range(count):
        at = first + j if j < words[WRITTEN] else first + j + gap
        spans[0, at], spans[1, at] = words[begin + j], words[begin + count + j]


@jit(helper=True)
def is_large(words: Any) -> Any:
    """Whether a launch with all of it would be worth several threads."""
    return words[ELEMENTS] >= words[THRESHOLD] and words[ELEMENTS] > 0


@jit(helper=True)
def carry_out_beside(words: Any, count: int) -> None:
    """Update the weights, by ``count`` threads where that is more than one and a launch is worth them."""
    for j in range(words[LAUNCHES]):
        launch = words[ABOUT + LAUNCH * j :]
        if launch[WORK] > 0:
            block = numba.carray(place(launch[ARGUMENTS]), GIVEN, np.int64)
            run(launch[WORKER], block, worker_count(launch[WORK], words[THRESHOLD], count))
