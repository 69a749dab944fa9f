"""The dense part of a mixed list, carried out with its row-sparse updates by one call of compiled code.

The call gets it as one block of words: the number of launches (one for each combination of formats under a rule), of
weights and of elements; from how many elements on a launch is worth several threads; how many spans of memory are
written to; for each launch the addresses of the worker and of its arguments, and its elements; then the starts and the
ends of all spans.
All zeros stand for no dense part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adagrad.kernels.batch import Batch
from adagrad.kernels.cpu import dense as cpu_dense
from adagrad.kernels.cpu.dense import GIVEN, arguments, kernel
from adagrad.kernels.cpu.rule import rate_table
from adagrad.kernels.inspection.spans import concatenate
from adagrad.kernels.inspection.table import CODES_PER_DEVICE, build_table, decode
from adagrad.kernels.runtime.memory import array_at
from adagrad.kernels.runtime.numba_jit import jit, run, worker_count

LAUNCHES, WEIGHTS, ELEMENTS, THRESHOLD, WRITTEN, ABOUT = range(6)
WORKER, ARGUMENTS, LAUNCH_ELEMENTS, LAUNCH = range(4)
"""The positions of these words, and the number of them: ABOUT before the launches, LAUNCH for each."""


class DensePart(NamedTuple):
    """A dense part, inspected and checked. The arrays of its list must outlive it."""

    words: np.ndarray
    span_count: int
    pointed_at: tuple[np.ndarray, ...]
    """The arrays whose addresses are in ``words``."""


NOTHING = DensePart(np.zeros(ABOUT, np.int64), 0, ())


def dense_part(batches: Sequence[Batch]) -> DensePart | None:
    """The block for dense updates, those of each batch under its rule; None unless all are plain and on the CPU.

    The compiled call checks that the spans are disjoint.
    """
    launches: list[int] = []
    pointed_at: list[np.ndarray] = []
    pieces: list[tuple[np.ndarray, int]] = []
    elements = 0
    for batch in batches:
        rule, rates = batch.rule, rate_table(batch.lrs, batch.wds, batch.rule)
        found = build_table(batch.weights, batch.grads, batch.histories, batch.masters, rule.row_wise)
        groups = found.groups()
        if sum(len(which) for _, which in groups) < len(batch.weights) or groups[-1][0] >= CODES_PER_DEVICE:
            return None
        for code, which in groups:
            rows, _, work = found.part(which)
            some = rates if len(groups) == 1 or len(rates) == 1 else rates[which]
            block = arguments(rows, some, rule.scalars, work)
            launches += [kernel(*decode(code)[1], rule.row_wise), block.ctypes.data, work]
            pointed_at += [block, rows, some, rule.scalars]
        pieces.append((found.spans, found.written))
        elements += found.total
    spans, written = concatenate(pieces)
    weights = sum(len(batch.weights) for batch in batches)
    about = [len(launches) // LAUNCH, weights, elements, cpu_dense.PARALLEL_MIN, written]
    words = np.concatenate([about + launches, spans.ravel()])
    return DensePart(words, spans.shape[1], tuple(pointed_at))


@jit(helper=True)
def put_spans(words: Any, spans: Any, first: int) -> Any:
    """Copy its spans, those written to first, to the columns of ``spans`` from ``first`` on; returns their number."""
    begin = ABOUT + LAUNCH * words[LAUNCHES]
    count = (len(words) - begin) // 2
    for j in range(count):
        spans[0, first + j], spans[1, first + j] = words[begin + j], words[begin + count + j]
    return count


@jit(helper=True)
def is_large(words: Any) -> Any:
    """Whether one launch of all of it would be worth several threads."""
    return words[ELEMENTS] >= words[THRESHOLD] and words[ELEMENTS] > 0


@jit(helper=True)
def update_dense_part(words: Any, workers: int) -> None:
    """Update the weights, with ``workers`` threads (at least one) for launches that are worth them."""
    for j in range(words[LAUNCHES]):
        launch = words[ABOUT + LAUNCH * j :]
        if launch[LAUNCH_ELEMENTS] > 0:
            block = array_at(launch[ARGUMENTS], GIVEN, np.int64)
            run(launch[WORKER], block, worker_count(launch[LAUNCH_ELEMENTS], words[THRESHOLD], workers))
