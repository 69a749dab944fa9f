"""Updates of which one argument is made bad, and what must come of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, RowSparse
from support import BFLOAT16

SHAPE = (4, 3)


@dataclass
class Call:
    """The arguments of an update, of which the one at ``at`` is made bad."""

    optimizer: AdaGrad
    indices: Any = field(default_factory=list)
    weights: Any = field(default_factory=list)
    grads: Any = field(default_factory=list)
    states: Any = field(default_factory=list)
    at: int = 0

    def add(self, dtype: Any, rows: bool = False) -> None:
        weight = np.arange(1, 13).reshape(SHAPE).astype(dtype)
        values = np.full((2, 3), 0.5, dtype)
        self.indices.append(len(self.indices))
        self.weights.append(weight)
        self.grads.append(RowSparse(values, np.array([0, 2]), SHAPE) if rows else np.full(SHAPE, 0.5, dtype))
        self.states.append(self.optimizer.create_state_multi_precision(self.indices[-1], weight))

    def snapshot(self) -> tuple[Any, ...]:
        """Everything that an update may write to, and the gradients."""

        def content(value: Any) -> Any:
            if isinstance(value, RowSparse):
                return content(value.values), content(value.indices)
            if isinstance(value, (list, tuple)):
                return [content(each) for each in value]
            return value.tobytes() if isinstance(value, np.ndarray) and value.dtype != object else id(value)

        return (
            content(self.weights), content(self.states), content(self.grads),
            dict(self.optimizer._index_update_count), self.optimizer.num_update, self.optimizer.learning_rate,
        )  # fmt: skip

    def update(self) -> None:
        self.optimizer.update_multi_precision(self.indices, self.weights, self.grads, self.states)

    # What is made bad:

    def weight(self, make: Callable[[np.ndarray], Any]) -> None:
        self.weights[self.at] = make(self.weights[self.at])

    def grad(self, make: Callable[[np.ndarray], Any]) -> None:
        self.grads[self.at] = make(np.full(SHAPE, 0.5, np.float32))

    def state(self, make: Callable[[np.ndarray], Any]) -> None:
        self.states[self.at] = make(self.states[self.at])

    def low_precision(self, make_state: Callable[[np.ndarray, np.ndarray], Any]) -> None:
        """The weight becomes a float16 one with a master copy."""
        weight = self.weights[self.at].astype(np.float16)
        self.weights[self.at], self.grads[self.at] = weight, np.full(SHAPE, 0.5, np.float16)
        self.states[self.at] = make_state(weight.astype(np.float32), self.states[self.at])

    def other_state(self) -> tuple[np.ndarray, np.ndarray]:
        """What the rule acts on of the good weight at 1, and its history."""
        state = self.states[1]
        return state if isinstance(state, tuple) else (self.weights[1], state)

    def rows(self, indices: Any, values: Any = None, shape: tuple[int, ...] = SHAPE) -> None:
        indices = np.asarray(indices)
        values = np.ones((len(indices), *shape[1:]), np.float32) if values is None else values
        self.grads[self.at] = RowSparse(values, indices, shape)


def history_as(c: Call) -> tuple[int, ...]:
    return (4, 1) if c.optimizer.row_wise else SHAPE


Case = tuple[Callable[[Call], Any], type[Exception], str]


def check_refused(klass: type[AdaGrad], fused: bool, spoil: Any, error: type[Exception], message: str) -> None:
    """One bad among good ones, first or last; the others plain float32 arrays alone, or of all kinds."""
    for others in ([np.float32] * 2, [np.float32, np.float16], [np.float32, BFLOAT16, "rows"]):
        for at in (0, 2):
            call = Call(klass(0.1, use_fused_step=fused, multi_precision=True), at=at)
            for i in range(3):
                call.add(
                    np.float32 if i == at or others[i % 2] == "rows" else others[i % 2],
                    rows="rows" in others and i == 1,
                )
            call.update()  # counts and histories that are not those of the start
            spoil(call)
            before = call.snapshot()
            with pytest.raises(error) as caught:
                call.update()
            duplicate = {0: "1, 1, 2", 2: "0, 1, 1"}[at]
            wanted = message.format(at=at, history=history_as(call), duplicate=duplicate)
            assert wanted in str(caught.value)
            assert call.snapshot() == before
            assert call.optimizer._resolved == {}
