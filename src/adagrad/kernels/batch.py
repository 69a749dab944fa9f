"""What a call is given: lists of updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adagrad.arrays import operand
from adagrad.kernels.outcomes import mark_late
from adagrad.rule import Array, Rule

Job = Callable[[], Any]
"""What carries out a part of a call; on a CUDA device it may return a number there, see :func:`call.prepare`."""


@dataclass
class Batch:
    """Updates that share a rule; each list has an entry for each weight, ``lrs`` and ``wds`` that or one for all."""

    rule: Rule
    weights: list[Array]
    grads: list[Any]
    """Arrays, RowSparse or sparse COO tensors."""
    histories: list[Array]
    masters: list[Any]
    """Arrays or None; empty where no weight has a master copy."""
    lrs: list[Any]
    """Numbers; tensors of one number only for weights on their device."""
    wds: list[float]
    places: Sequence[int] = ()
    """Where the weights stand in the caller's lists, for messages, if not in the same places."""

    def at(self, i: int) -> str:
        """What stands behind an argument's name in messages about the ``i``-th update."""
        return f"[{self.places[i] if self.places else i}]"

    def arrays(self, i: int) -> tuple[Any, Any, Any, Any]:
        return self.weights[i], self.grads[i], self.histories[i], self.masters[i] if self.masters else None

    def rates(self, i: int) -> tuple[Any, float]:
        return self.lrs[i if len(self.lrs) > 1 else 0], self.wds[i if len(self.wds) > 1 else 0]

    def some_rates(self, which: Sequence[int]) -> tuple[list[Any], list[float]]:
        """The rates of some weights, or one for all."""
        return some(self.lrs, which), some(self.wds, which)


def some(values: list[Any], which: Sequence[int]) -> list[Any]:
    """Some of the entries for each weight; no entries, or one for all, as they are."""
    return [values[i] for i in which] if len(values) > 1 else values


def of_states(
    weights: list[Any], grads: list[Any], states: list[Any], lrs: Any, wds: Any, rule: Rule, places: Sequence[int] = ()
) -> Batch:
    """A batch of updates whose states are histories or pairs (master copy, history)."""
    batch = Batch(rule, weights, grads, states, [], lrs, wds, places)
    if not any(issubclass(kind, (tuple, list)) for kind in set(map(type, states))):
        return batch
    histories, masters = [], []
    for i, state in enumerate(states):
        master = None
        if isinstance(state, (tuple, list)):
            if len(state) != 2:
                need = "must be a history or a pair (master copy, history)"
                raise ValueError(f"states{batch.at(i)}: {len(state)} entries: {need}")
            master, state = state
            if master is None:
                operand(f"master copy in states{batch.at(i)}", master)  # says what it must be
        histories.append(state)
        masters.append(master)
    return Batch(rule, weights, grads, histories, masters, lrs, wds, places)


class Prepared(NamedTuple):
    """A checked call."""

    jobs: list[Job]
    kept: Any = None
    """What jobs use by address: alive until they are done, though other threads may let go of it."""

    def run(self) -> list[Any]:
        """Carry it out, in place; what jobs returned that is not None."""
        try:
            return [returned for returned in [job() for job in self.jobs] if returned is not None]
        except Exception:
            raise
        except BaseException as interrupt:  # Python notices it when a job has done its work
            mark_late(interrupt)
            raise
