"""The regret bound of the paper, as a test of the whole algorithm.

Duchi, Hazan, Singer (JMLR 12, 2011), Theorem 5, composite mirror descent with diagonal matrices. The learner plays
x_t, sees a subgradient g_t of a convex f_t there, and moves to

    x_{t+1} = argmin_x  eta <g_t, x> + 1/2 <x - x_t, H_t (x - x_t)>,    H_t = delta I + diag(s_t),
    s_{t,i} = ||g_{1:t,i}||_2,

over all of R^n, so without a projection. That is x_t - eta g_t / (delta + s_t): AdaGrad with learning rate eta, epsilon
delta and a history that starts at 0. For every comparator x* the regret R(T) = sum_t f_t(x_t) - f_t(x*) is at most

    R(T) <= 1/(2 eta) max_t ||x_t - x*||_inf^2 sum_i s_{T,i}  +  eta sum_i s_{T,i}  +  delta/(2 eta) ||x_1 - x*||_2^2.

The theorem's domain is bounded, with a diameter; here the largest distance is measured. (First term: telescoping of
H_t; second: sum_t g_t^2 / (delta + s_t) <= 2 s_T, Lemma 4; third: the part of H_1 that delta adds.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from adagrad import AdaGrad, RowSparse

ETA, DELTA, DIMENSIONS, ROUNDS = 0.3, 1e-6, 12, 2000


@dataclass
class Game:
    """What was played: points, subgradients."""

    eta: float = ETA
    points: list[np.ndarray] = field(default_factory=list)
    gradients: list[np.ndarray] = field(default_factory=list)

    def linear_regret(self, comparator: np.ndarray) -> float:
        """Regret for f_t(x) = <g_t, x>; for other convex f_t an upper bound of it."""
        return float(sum(g @ (x - comparator) for x, g in zip(self.points, self.gradients, strict=True)))

    def bound(self, comparator: np.ndarray) -> float:
        s = np.sqrt(np.square(self.gradients).sum(axis=0)).sum()
        distance = max(np.abs(x - comparator).max() for x in self.points)
        start = np.square(self.points[0] - comparator).sum()
        return float(distance**2 * s / (2 * self.eta) + self.eta * s + DELTA * start / (2 * self.eta))


Learner = Callable[[np.ndarray, np.ndarray], None]
Adversary = Callable[[int, np.ndarray], np.ndarray]


def adagrad_learner(*, sparse: bool = False, fused: bool = True, eta: float = ETA, size: int = DIMENSIONS) -> Learner:
    optimizer = AdaGrad(learning_rate=eta, epsilon=DELTA, use_fused_step=fused)
    state = optimizer.create_state(0, np.zeros(size))

    def learn(x: np.ndarray, g: np.ndarray) -> None:
        present = np.flatnonzero(g)
        optimizer.update(0, x, RowSparse(g[present], present, g.shape) if sparse else g, state)

    return learn


def play(adversary: Adversary, learn: Learner, x: np.ndarray, rounds: int = ROUNDS, eta: float = ETA) -> Game:
    game = Game(eta)
    for t in range(rounds):
        game.points.append(x.copy())
        game.gradients.append(adversary(t, x.copy()))
        learn(x, game.gradients[-1])
    return game


def against_the_sign(t: int, x: np.ndarray) -> np.ndarray:
    """The loss grows wherever the learner stands, at every scale."""
    return np.where(x >= 0, 1.0, -1.0) * 10.0 ** (np.arange(DIMENSIONS) % 5 - 2)


def flipping(t: int, x: np.ndarray) -> np.ndarray:
    """Signs that follow the learner most of the time, then turn against it for ever longer."""
    turn = -1.0 if (t & (t + 1)).bit_count() % 2 else 1.0
    return turn * against_the_sign(t, x) / (1 + t % 7)


def rare_features(t: int, x: np.ndarray) -> np.ndarray:
    """Feature i occurs every 2**(i // 2) rounds, with a hinge loss and adversarial labels: the paper's own example."""
    present = t % 2 ** (np.arange(DIMENSIONS) // 2) == 0
    label = -1.0 if x[present].sum() >= 0 else 1.0
    return np.where(present, -label, 0.0)


def absolute_distance(target: np.ndarray) -> Adversary:
    """f_t(x) = sum_i c_{t,i} |x_i - target_i|, with weights c drawn against the learner's best coordinates."""

    def gradient(t: int, x: np.ndarray) -> np.ndarray:
        weights = np.where(np.abs(x - target) < 0.05, 5.0, 0.5) * (1 + (t + np.arange(DIMENSIONS)) % 3)
        return np.sign(x - target) * weights

    return gradient


ADVERSARIES: dict[str, Adversary] = {
    "against the sign": against_the_sign,
    "flipping": flipping,
    "rare features": rare_features,
    "absolute distance": absolute_distance(np.linspace(-1, 1, DIMENSIONS)),
}


@pytest.mark.parametrize("adversary", ADVERSARIES.values(), ids=ADVERSARIES)
@pytest.mark.parametrize("learner", [{}, {"sparse": True}, {"fused": False}], ids=["dense", "row-sparse", "expression"])
def test_regret_is_within_the_bound(adversary: Adversary, learner: dict[str, Any]) -> None:
    game = play(adversary, adagrad_learner(**learner), np.full(DIMENSIONS, 0.5))
    total = np.sum(game.gradients, axis=0)
    rng = np.random.default_rng(0)
    comparators = [
        -np.sign(total),  # the best point of the box [-1, 1]^n in hindsight, if the losses are linear
        np.zeros(DIMENSIONS),
        game.points[-1],
        np.linspace(-1, 1, DIMENSIONS),
        *rng.uniform(-2, 2, (20, DIMENSIONS)),
    ]
    for comparator in comparators:
        regret, bound = game.linear_regret(comparator), game.bound(comparator)
        assert regret <= bound * (1 + 1e-9)
    assert max(game.linear_regret(c) / game.bound(c) for c in comparators) > 0.01, "a bound that far away tests nothing"


@given(data=st.data(), eta=st.floats(1e-3, 10), size=st.integers(1, 6), sparse=st.booleans())
def test_regret_is_within_the_bound_whoever_plays(data: st.DataObject, eta: float, size: int, sparse: bool) -> None:
    """Adversaries that choose, in each round, the scale of each coordinate and whether to follow the learner's sign."""
    vectors = st.lists(st.floats(-3, 3), min_size=size, max_size=size).map(np.array)
    turns = data.draw(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), vectors), min_size=1, max_size=30))

    def adversary(t: int, x: np.ndarray) -> np.ndarray:
        turn, exponents = turns[t % len(turns)]
        return np.asarray(turn * np.where(x >= 0, 1.0, -1.0) * 10.0**exponents)

    learn = adagrad_learner(sparse=sparse, eta=eta, size=size)
    game = play(adversary, learn, data.draw(vectors), rounds=60, eta=eta)
    for comparator in (-np.sign(np.sum(game.gradients, axis=0)), game.points[-1], data.draw(vectors)):
        assert game.linear_regret(comparator) <= game.bound(comparator) * (1 + 1e-9) + 1e-9


def test_the_step_size_adapts_to_each_coordinate() -> None:
    """Coordinates whose gradients differ by a constant factor move alike: no scale is the wrong one."""
    game = play(
        lambda t, x: (-1.0) ** (t // 5).bit_count() * 10.0 ** (np.arange(DIMENSIONS) % 5 - 2),
        adagrad_learner(),
        np.full(DIMENSIONS, 0.5),
    )
    points = np.array(game.points)
    assert np.ptp(points) > 0.5
    np.testing.assert_allclose(points, points[:, :1].repeat(DIMENSIONS, axis=1), atol=1e-3)


def test_distance_from_the_target_stays_bounded() -> None:
    """Towards a fixed target no step overshoots by more than eta, whatever the weights; and the points arrive."""
    target = np.linspace(-1, 1, DIMENSIONS)
    start = np.full(DIMENSIONS, 0.5)
    game = play(absolute_distance(target), adagrad_learner(), start.copy())
    distance = np.abs(np.array(game.points) - target)
    assert (distance <= np.maximum(np.abs(start - target), ETA) + 1e-12).all()
    assert distance[-1].max() < 0.05


def forgetful(x: np.ndarray, g: np.ndarray) -> None:
    """A history of the last gradient alone: steps of eta for ever."""
    x -= ETA * np.sign(g)


def upwards() -> Learner:
    """AdaGrad in the wrong direction."""
    learn = adagrad_learner()
    return lambda x, g: learn(x, -g)


def test_other_algorithms_break_the_bound() -> None:
    """So the tests above can fail: without the accumulation, and with the wrong sign."""
    target = np.linspace(-1, 1, DIMENSIONS)
    game = play(absolute_distance(target), forgetful, np.full(DIMENSIONS, 0.5), rounds=8000)
    assert game.linear_regret(target) > game.bound(target)
    start = np.full(DIMENSIONS, 0.5)
    game = play(absolute_distance(target), upwards(), start.copy())
    assert np.abs(game.points[-1] - target).max() > 2
