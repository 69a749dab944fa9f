"""The batches of updates that a call is given, and the checked call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adagrad.arrays import operand
from adagrad.kernels.names import Names, in_lists
from adagrad.kernels.runtime.interrupts import mark_late
from adagrad.rule import Array, Rule

Job = Callable[[], Any]
"""Carries out a part of a call; may return what :func:`adagrad.kernels.general_path.prepare` says of CUDA devices."""


@dataclass(slots=True)
class Batch:
    """Updates under one rule. Each list has one entry per weight; ``lrs`` and ``wds`` may have a single one for all."""

    rule: Rule
    weights: list[Array]
    grads: list[Any]
    """Arrays, RowSparse or sparse COO tensors."""
    histories: list[Array]
    masters: list[Any]
    """Arrays or None; empty where no weight has a master copy."""
    lrs: list[Any]
    """Numbers, or tensors of one number on the device of their weights."""
    wds: list[float]
    positions: Sequence[int] = ()
    """The positions of the weights in the caller's lists, for messages; empty if they are the same."""

    names_at: Callable[[int], Names] = in_lists
    """What messages call the arguments at a position."""

    def names(self, i: int) -> Names:
        """What messages call the arguments of the ``i``-th update."""
        return self.names_at(self.positions[i] if self.positions else i)

    def arrays(self, i: int) -> tuple[Any, Any, Any, Any]:
        """Weight, gradient, history and master copy (None for none) of the ``i``-th update."""
        return self.weights[i], self.grads[i], self.histories[i], self.masters[i] if self.masters else None

    def rates(self, i: int) -> tuple[Any, float]:
        """lr and wd of the ``i``-th update."""
        return self.lrs[i if len(self.lrs) > 1 else 0], self.wds[i if len(self.wds) > 1 else 0]

    def part(self, which: Sequence[int]) -> Batch:
        """The updates at the positions ``which``."""
        if len(which) == len(self.weights):
            return self
        lists = self.weights, self.grads, self.histories, self.masters
        weights, grads, histories, masters = ([values[i] for i in which] if values else [] for values in lists)
        positions = [self.positions[i] for i in which] if self.positions else which
        return Batch(self.rule, weights, grads, histories, masters, *self.some_rates(which), positions,
                     self.names_at)  # fmt: skip

    def by_kind(self, are_sparse: list[bool]) -> tuple[Batch | None, Batch | None]:
        """The dense and the row-sparse updates, None for none; ``are_sparse`` tells which are which."""
        dense = [i for i, each in enumerate(are_sparse) if not each]
        sparse = [i for i, each in enumerate(are_sparse) if each]
        return self.part(dense) if dense else None, self.part(sparse) if sparse else None

    def some_rates(self, which: Sequence[int]) -> tuple[list[Any], list[float]]:
        """``lrs`` and ``wds`` of the weights ``which``; a single entry for all stays single."""
        lrs = [self.lrs[i] for i in which] if len(self.lrs) > 1 else self.lrs
        return lrs, [self.wds[i] for i in which] if len(self.wds) > 1 else self.wds


NUMPY_ARRAYS = {np.ndarray, np.memmap}


def of_states(
    weights: list[Any],
    grads: list[Any],
    states: list[Any],
    lrs: Any,
    wds: Any,
    rule: Rule,
    positions: Sequence[int] = (),
) -> Batch:
    """A batch of updates whose states are histories or pairs (master copy, history)."""
    batch = Batch(rule, weights, grads, states, [], lrs, wds, positions)
    if NUMPY_ARRAYS.issuperset(map(type, states)):  # the usual case, asked fast
        return batch
    if not any(issubclass(kind, (tuple, list)) for kind in set(map(type, states))):
        return batch
    histories, masters = [], []
    for i, state in enumerate(states):
        master = None
        if isinstance(state, (tuple, list)):
            if len(state) != 2:
                need = "must be a history or a pair (master copy, history)"
                raise ValueError(f"{batch.names(i).state}: {len(state)} entries: {need}")
            master, state = state
            if master is None:
                operand(batch.names(i).master, master)  # says what it must be
        histories.append(state)
        masters.append(master)
    return Batch(rule, weights, grads, histories, masters, lrs, wds, positions)


class Prepared(NamedTuple):
    """A checked call."""

    jobs: list[Job]
    kept: Any = None
    """What jobs use by address, kept alive until they are done even if other threads release it."""

    def run(self) -> list[Any]:
        """Carry it out, in place, and return what the jobs returned, except None."""
        try:
            return [returned for returned in [job() for job in self.jobs] if returned is not None]
        except Exception:
            raise
        except BaseException as interrupt:  # Python notices it only after a job has finished
            mark_late(interrupt)
            raise
