"""Learning rates, multipliers and counts that users set or compute: checked, in double, counted first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, RowSparse, get_updater
from adagrad.lr_scheduler import CosineScheduler, FactorScheduler, LRScheduler, MultiFactorScheduler, PolyScheduler


class Pass(AdaGrad):
    """A user's class that changes nothing."""

    def _update_count(self, index: Any) -> None:
        super()._update_count(index)


def trained(optimizer: AdaGrad, steps: int = 4, index: int | str = 0) -> np.ndarray:
    updater, weight = get_updater(optimizer), np.ones(200, np.float32)
    for _ in range(steps):
        updater(index, np.linspace(0.1, 3, 200).astype(np.float32), weight)
    return weight


class Bad:
    """What a param_dict should not hold."""

    lr_mult = 1.0


@pytest.mark.parametrize(
    ("attribute", "value", "error", "message"),
    [
        ("wd_mult", {1: float("nan")}, ValueError, r"wd_mult\[1\]=nan: must be finite and >= 0"),
        ("wd_mult", {"b": -1.0}, ValueError, r"wd_mult\['b'\]=-1.0: must be >= 0"),
        ("lr_mult", {1: -1.0}, ValueError, r"lr_mult\[1\]=-1.0: must be >= 0"),
        ("lr_mult", {1: "x"}, TypeError, r"lr_mult\[1\]='x': must be a number, not str"),
        ("param_dict", {1: Bad()}, TypeError, r"param_dict\[1\]=<.*Bad.*>: must have lr_mult and wd_mult"),
    ],
)
@pytest.mark.parametrize(
    ("klass", "scheduler"),
    [(AdaGrad, None), (AdaGrad, lambda n: 0.1), (AdaGrad, FactorScheduler(3, 0.5)), (Pass, None)],
    ids=["no scheduler", "a user's scheduler", "factor", "a user's class"],
)
def test_multipliers_that_were_set_are_checked_before_anything_changes(
    attribute: str, value: Any, error: type[Exception], message: str, scheduler: Any, klass: type[AdaGrad]
) -> None:
    updater = get_updater(klass(None, lr_scheduler=scheduler, wd=0, param_idx2name={0: "a", 1: "b"}))
    setattr(updater.optimizer, attribute, value)
    weights = [np.ones(2), np.ones(2)]
    with pytest.raises(error, match=message):
        updater.optimizer.update([0, 1], weights, [np.ones(2)] * 2, [np.zeros(2)] * 2)
    if klass is AdaGrad:
        with pytest.raises(error, match=message):
            updater([0, 1], [np.ones(2)] * 2, weights)
        assert updater.states == {}
    assert weights[0].tolist() == weights[1].tolist() == [1.0, 1.0]
    assert (updater.optimizer._index_update_count, updater.optimizer.num_update) == ({}, 0)


@pytest.mark.parametrize(("attribute", "value"), [("num_update", "7"), ("num_update", None), ("begin_num_update", 2.5),
                                                  ("begin_num_update", -3), ("num_update", True)])  # fmt: skip
@pytest.mark.parametrize("klass", [AdaGrad, Pass])
def test_counts_that_were_set_are_checked_before_anything_changes(
    attribute: str, value: Any, klass: type[AdaGrad]
) -> None:
    updater, weight = get_updater(klass(0.1)), np.ones(2)
    setattr(updater.optimizer, attribute, value)
    with pytest.raises((TypeError, ValueError), match=f"{attribute}={value!r}: must be "):
        updater(0, np.ones(2), weight)
    assert weight.tolist() == [1.0, 1.0]
    assert (updater.states, updater.optimizer._index_update_count) == ({}, {})


# ---------------------------------------------------------------------------------------------------------- in double

SCHEDULES: list[LRScheduler] = [
    FactorScheduler(1, 0.9, base_lr=0.3),
    MultiFactorScheduler([1, 3], 0.9, base_lr=0.3),
    PolyScheduler(9, base_lr=0.3, final_lr=0.1),
    CosineScheduler(9, base_lr=0.3, final_lr=0.1),
    FactorScheduler(1, 0.9, base_lr=0.3, warmup_steps=3, warmup_begin_lr=0.1),
]


@pytest.mark.parametrize(
    ("k", "name"),
    [
        (k, name)
        for k, schedule in enumerate(SCHEDULES)
        for name in ("base_lr", "final_lr", "factor", "warmup_begin_lr")
        if hasattr(schedule, name)
    ],
)
def test_float32_numbers_of_a_schedule_are_computed_with_in_double(k: int, name: str) -> None:
    given, expected = (type(SCHEDULES[k])(**SCHEDULES[k].config()) for _ in range(2))
    number = np.float32(getattr(given, name) * 0.97)
    setattr(given, name, number)
    setattr(expected, name, float(number))
    for n in range(1, 12):
        assert type(given(n)) is float
        assert given(n) == expected(n)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("by_name", [False, True])
def test_float32_multipliers_are_computed_with_in_double(dtype: Any, by_name: bool) -> None:
    weights = []
    for number in (float, dtype):
        optimizer = AdaGrad(0.3, wd=0.1, param_idx2name={0: "a"})
        for multipliers in (optimizer.lr_mult, optimizer.wd_mult):
            multipliers["a" if by_name else 0] = number(dtype(0.7))
        weights.append(trained(optimizer))
    assert weights[0].tobytes() == weights[1].tobytes()


@pytest.mark.parametrize("klass", [AdaGrad, Pass])
def test_float32_rates_of_a_scheduler_are_computed_with_in_double(klass: type[AdaGrad]) -> None:
    def rate(n: int) -> Any:
        return np.float32(0.3)

    optimizer = klass(None, lr_scheduler=rate)
    optimizer.lr_mult[0] = 0.7
    expected = AdaGrad(float(np.float32(0.3)))
    expected.lr_mult[0] = 0.7
    assert trained(optimizer).tobytes() == trained(expected).tobytes()


# -------------------------------------------------------------------------------------------------------- counted first


@pytest.mark.parametrize("klass", [AdaGrad, Pass])
def test_a_scheduler_that_reads_the_counts_sees_the_update_counted(klass: type[AdaGrad]) -> None:
    optimizer: AdaGrad = klass(None, lr_scheduler=lambda n: 0.125 * optimizer.num_update)
    weight = np.ones(1)
    get_updater(optimizer)(0, np.ones(1), weight)
    assert weight[0] == 1 - 0.125 / (1 + 1e-6)


def test_a_scheduler_of_ones_own_is_asked_once_for_each_weight() -> None:
    asked: list[int] = []

    def rate(n: int) -> float:
        asked.append(n)
        return 0.1

    optimizer = AdaGrad(None, lr_scheduler=rate)
    optimizer.update([0, 1, 2], [np.ones(1) for _ in range(3)], [np.ones(1)] * 3, [np.zeros(1) for _ in range(3)])
    assert asked == [1, 1, 1]


class Halves(AdaGrad):
    """A step that updates halves of weights, by keys of its own."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, *arrays in zip(indices, weights, grads, states, strict=True):
            keys: Sequence[str] = [f"{index}/a", f"{index}/b"]
            super().step(keys, *([array[:1], array[1:]] for array in arrays))


@pytest.mark.parametrize("mult", [{}, {"1/a": 0.5}])
def test_a_step_may_use_keys_of_its_own_in_a_mixed_list(mult: dict[Any, float]) -> None:
    results = []
    for sparse in (False, True):
        updater = get_updater(Halves(0.1, aggregate_num=2))
        updater.optimizer.set_lr_mult(mult)
        weights = [np.ones((2, 2)), np.ones(2)]
        rows = RowSparse(np.ones((2, 2)), np.array([0, 1]), (2, 2))
        updater([0, 1], [rows if sparse else np.ones((2, 2)), np.ones(2)], weights)
        assert updater.optimizer._index_update_count.keys() >= {"1/a", "1/b"}
        results.append([w.tolist() for w in weights])
    assert results[0] == results[1]


@pytest.mark.parametrize("value", [np.array(0.3, np.float32), np.float32(0.3), np.float16(0.3)], ids=repr)
def test_scalars_of_numpy_in_a_schedule_are_converted(value: Any) -> None:
    schedule = CosineScheduler(9)
    schedule.base_lr = value
    assert type(schedule.base_lr) is float
    assert schedule(5) == CosineScheduler(9, base_lr=float(value))(5)
