"""A problem of which another framework trains the first half and this library the second, for tests of conversions."""

from __future__ import annotations

from typing import Any

import numpy as np

from adagrad import AdaGrad, get_updater

SHAPES = [(4, 3), (5,)]
STEPS = 6
HALF = STEPS // 2


def problem(shapes: list[tuple[int, ...]] = SHAPES) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    grads = [[rng.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(STEPS)]
    return weights, grads


def go_on(optimizer: AdaGrad, states: dict[Any, Any], weights: list[np.ndarray], grads: Any) -> list[np.ndarray]:
    """Steps here, through the updater; ``states`` are those of the weights by their numbers."""
    updater = get_updater(optimizer)
    updater.states = states
    weights = [weight.copy() for weight in weights]
    for each in grads:
        updater(list(range(len(weights))), each, weights)
    return weights


def assert_close(found: Any, expected: Any) -> None:
    for weight, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(weight), np.asarray(theirs), rtol=2e-6, atol=5e-7)


def f32(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)
