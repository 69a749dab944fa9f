"""Schedules: closed forms, purity, what MXNet's gave, errors."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from adagrad import AdaGrad, lr_scheduler, saved_schedules
from adagrad.lr_scheduler import CosineScheduler, FactorScheduler, LRScheduler, MultiFactorScheduler, PolyScheduler

SCHEDULES: dict[str, LRScheduler] = {
    "factor": FactorScheduler(step=10, factor=0.5, base_lr=0.8),
    "factor, floor": FactorScheduler(step=3, factor=0.1, stop_factor_lr=1e-3, base_lr=0.5),
    "multifactor": MultiFactorScheduler(step=[5, 8, 20], factor=0.3, base_lr=0.9),
    "poly": PolyScheduler(max_update=50, base_lr=0.7, pwr=2, final_lr=0.1),
    "poly, linear": PolyScheduler(max_update=50, base_lr=0.7, pwr=1),
    "cosine": CosineScheduler(max_update=40, base_lr=0.6, final_lr=0.05),
    "factor, warm-up": FactorScheduler(step=10, factor=0.5, base_lr=0.8, warmup_steps=4, warmup_begin_lr=0.2),
    "multifactor, warm-up": MultiFactorScheduler([5, 9], 0.3, 0.9, 4, 0.1, "constant"),
    "poly, warm-up": PolyScheduler(50, 0.7, 2, 0.1, 10, 0.05, "linear"),
    "cosine, warm-up": CosineScheduler(40, 0.6, 0.05, 10, 0.05, "constant"),
}


@pytest.mark.parametrize("n", [0, 1, 2, 10, 11, 20, 21, 101])
def test_factor(n: int) -> None:
    """Multiplied after updates 10, 20, ...: the 11th is the first with the lower rate."""
    assert FactorScheduler(step=10, factor=0.5, base_lr=0.8)(n) == 0.8 * 0.5 ** (max(n - 1, 0) // 10)


def test_factor_multiplies_again_and_again() -> None:
    """As MXNet does: a power would round differently."""
    lr = 0.3
    for _ in range(50):
        lr *= 0.9
    schedule = FactorScheduler(step=1, factor=0.9, base_lr=0.3)
    assert schedule(51) == lr != 0.3 * 0.9**50


@pytest.mark.parametrize(
    ("step", "factor", "stop"), [(1, 0.99999, 0.0), (2, 0.9999, 1e-8), (2.0, 0.9999, 0.0), (1.5, 0.9999, 0.0),
                                 (1, 0.5, 0.0), (1, 0.9, 1e-3), (1, 0.9999, 0.5)]
)  # fmt: skip
def test_many_multiplications_are_the_same_as_one_by_one(step: float, factor: float, stop: float) -> None:
    at_once, one_by_one = (FactorScheduler(step, factor, stop, 0.3) for _ in range(2))
    seen = 0
    for n in (3000, 3001, 4200, 12_345):
        while seen < n:
            seen += 1
            one_by_one(seen)
        with np.errstate(all="raise"):
            assert at_once(n) == one_by_one(n)


def test_factor_stops() -> None:
    schedule = FactorScheduler(step=2, factor=0.1, stop_factor_lr=3e-4, base_lr=0.5)
    assert [schedule(n) for n in (1, 3, 5, 7, 9, 1000, 10**12)] == pytest.approx(
        [0.5, 0.05, 0.005, 5e-4, 3e-4, 3e-4, 3e-4]
    )
    assert FactorScheduler(step=1, factor=1.0, base_lr=0.5)(10**15) == 0.5
    # As MXNet has it, the floor also lifts a rate that began below it.
    assert FactorScheduler(step=1, factor=0.5, stop_factor_lr=0.1, base_lr=0.01)(2) == 0.1


@pytest.mark.parametrize(
    "schedule", [FactorScheduler(2), MultiFactorScheduler([2]), PolyScheduler(5), CosineScheduler(5)], ids=repr
)
def test_what_is_no_count_of_updates(schedule: LRScheduler) -> None:
    for number in (-1, -0.5, math.nan, np.int8(-1)):
        with pytest.raises(ValueError, match=rf"num_update={re.escape(repr(number))}: must be (finite and )?>= 0"):
            schedule(number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_update='3': must be a number"):
        schedule("3")  # type: ignore[arg-type]


def test_what_has_stopped_to_decay_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for schedule in (FactorScheduler(1, 0.5, 1e-3, 1.0), FactorScheduler(2, 1.0), FactorScheduler(1.5, 0.9, 0.0)):
        lr = schedule(10**6)
        with monkeypatch.context() as within:
            within.setattr(FactorScheduler, "_by_blocks", lambda *_: pytest.fail("again"))
            assert [schedule(n) for n in (10**6, 10**6 + 1, 10**6 + 50)] == [lr] * 3
        assert schedule(1) == schedule.base_lr, "an earlier count"


def test_multifactor() -> None:
    schedule = MultiFactorScheduler(step=[5, 8, 20], factor=0.3, base_lr=0.9)
    expected = {0: 0, 1: 0, 5: 0, 6: 1, 8: 1, 9: 2, 20: 2, 21: 3, 1000: 3}
    for n, times in expected.items():
        lr = 0.9
        for _ in range(times):
            lr *= 0.3
        assert schedule(n) == lr


def test_poly() -> None:
    schedule = PolyScheduler(max_update=50, base_lr=0.7, pwr=2, final_lr=0.1)
    for n in range(60):
        assert schedule(n) == pytest.approx(0.1 + 0.6 * (1 - min(n, 50) / 50) ** 2, rel=1e-14)
    assert schedule(50) == schedule(51) == schedule(10**9) == 0.1
    assert PolyScheduler(max_update=10, base_lr=0.7, pwr=0, final_lr=0.1)(9) == 0.7


def test_cosine() -> None:
    schedule = CosineScheduler(max_update=40, base_lr=0.6, final_lr=0.05)
    for n in range(60):
        progress = min(n, 40) / 40
        assert schedule(n) == pytest.approx(0.05 + 0.55 * (1 + math.cos(math.pi * progress)) / 2, rel=1e-14)
    assert schedule(40) == schedule(10**9) == 0.05


@pytest.mark.parametrize("mode", ["linear", "constant"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **w: FactorScheduler(step=7, factor=0.5, base_lr=0.5, **w),
        lambda **w: MultiFactorScheduler(step=[7, 9], factor=0.5, base_lr=0.5, **w),
        lambda **w: PolyScheduler(max_update=30, base_lr=0.5, **w),
        lambda **w: CosineScheduler(max_update=30, base_lr=0.5, **w),
    ],
    ids=["factor", "multifactor", "poly", "cosine"],
)
def test_warm_up(make: Any, mode: str) -> None:
    schedule = make(warmup_steps=5, warmup_begin_lr=0.1, warmup_mode=mode)
    for n in range(5):
        assert schedule(n) == (0.1 + (0.5 - 0.1) * n / 5 if mode == "linear" else 0.1)
    assert schedule(5) == 0.5, "the warm-up ends at base_lr"


def test_poly_and_cosine_run_from_the_end_of_the_warm_up() -> None:
    poly = PolyScheduler(max_update=30, base_lr=0.5, pwr=1, warmup_steps=10)
    assert poly(20) == pytest.approx(0.25)
    cosine = CosineScheduler(max_update=30, base_lr=0.5, warmup_steps=10)
    assert cosine(20) == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_pure(schedule: LRScheduler) -> None:
    """Called in any order and any number of times, a schedule gives the same; it never changes itself."""
    before = copy.deepcopy(schedule.config())
    forwards = [schedule(n) for n in range(100)]
    backwards = [schedule(n) for n in reversed(range(100))][::-1]
    assert forwards == backwards
    assert schedule.config() == before
    assert [copy.deepcopy(schedule)(n) for n in range(100)] == forwards
    assert [pickle.loads(pickle.dumps(schedule))(n) for n in range(100)] == forwards


def test_counts_of_any_integer_type() -> None:
    for schedule in SCHEDULES.values():
        assert [schedule(np.uint8(n)) for n in range(100)] == [schedule(n) for n in range(100)]  # type: ignore[arg-type]


def test_asking_before_the_first_update_changes_nothing() -> None:
    optimizer = AdaGrad(learning_rate=None, lr_scheduler=FactorScheduler(step=2, factor=0.5, base_lr=0.8))
    weight = np.zeros(1)
    state = optimizer.create_state(0, weight)
    seen = [optimizer.learning_rate]
    for _ in range(5):
        optimizer.update(0, weight, np.ones(1), state)
        seen.append(optimizer.learning_rate)
    assert seen == [0.8, 0.8, 0.8, 0.4, 0.4, 0.2]


def test_attributes_of_a_schedule_may_change() -> None:
    schedule = FactorScheduler(step=1, factor=0.5, base_lr=0.8)
    assert schedule(3) == 0.2
    schedule.base_lr = 0.4
    assert schedule(3) == 0.1
    schedule.factor = 0.25
    assert schedule(3) == 0.025
    schedule.step = 2
    assert schedule(3) == 0.1


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_config_and_repr_make_the_same_schedule(schedule: LRScheduler) -> None:
    again = saved_schedules.from_config(type(schedule).__name__, json.loads(json.dumps(schedule.config())))
    spelled = eval(repr(schedule), vars(lr_scheduler))
    for other in (again, spelled):
        assert type(other) is type(schedule)
        assert [other(n) for n in range(100)] == [schedule(n) for n in range(100)]


@given(st.sampled_from(list(SCHEDULES.values())), st.integers(0, 200))
def test_rates_lie_between_their_ends(schedule: LRScheduler, n: int) -> None:
    ends = (schedule.warmup_begin_lr, schedule.base_lr, getattr(schedule, "final_lr", 0.0))
    assert 0 <= schedule(n) <= max(ends)
    if n >= schedule.warmup_steps:
        assert schedule(n + 1) <= schedule(n)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent / "data" / "mxnet").glob("schedule_*.npz")), ids=lambda p: p.stem
)
def test_as_mxnet_gave_it(path: Path) -> None:
    """``learning_rate_after`` step t is the schedule at t + 1, which gives it without an optimizer."""
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
    name, arguments = config["scheduler"]
    schedule = getattr(lr_scheduler, name)(**arguments)
    begin = config["kwargs"].get("begin_num_update", 0)
    assert [schedule(begin + t + 1) for t in range(config["steps"])] == config["learning_rate_after"]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_learning_rate_overwrites_base_lr_and_the_warm_up(schedule: LRScheduler) -> None:
    """For every schedule: in MXNet, Poly and Cosine went on with their own."""
    schedule = copy.deepcopy(schedule)
    config = schedule.config() | {"base_lr": 0.25}
    with pytest.warns(UserWarning, match=r"learning_rate=0.25 overwrites the scheduler's base_lr"):
        optimizer = AdaGrad(learning_rate=0.25, lr_scheduler=schedule)
    assert optimizer.lr_scheduler is schedule
    same = saved_schedules.from_config(type(schedule).__name__, config)
    assert [schedule(n) for n in range(100)] == [same(n) for n in range(100)]


def test_a_schedule_of_ones_own() -> None:
    class Halving(LRScheduler):
        def __call__(self, num_update: int) -> float:
            return self.base_lr / (1 + num_update)

    class Steady(LRScheduler):
        def after_warmup(self, num_update: int) -> float:
            return self.base_lr

    assert Halving(0.5)(4) == 0.1
    steady = Steady(0.5, warmup_steps=2)
    assert [steady(n) for n in range(4)] == [0, 0.25, 0.5, 0.5]
    with pytest.raises(NotImplementedError, match="after_warmup"):
        LRScheduler()(3)


def test_defaults_are_mxnets() -> None:
    assert vars(FactorScheduler(1)).items() >= {"factor": 1.0, "stop_factor_lr": 1e-8, "base_lr": 0.01}.items()
    assert vars(MultiFactorScheduler([1])).items() >= {"factor": 1.0, "base_lr": 0.01}.items()
    assert vars(PolyScheduler(1)).items() >= {"base_lr": 0.01, "pwr": 2, "final_lr": 0}.items()
    assert vars(CosineScheduler(1)).items() >= {"base_lr": 0.01, "final_lr": 0}.items()
    assert (
        vars(FactorScheduler(1)).items() >= {"warmup_steps": 0, "warmup_begin_lr": 0, "warmup_mode": "linear"}.items()
    )


ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (FactorScheduler, {"step": 0}, ValueError, "step=0: must be >= 1"),
    (FactorScheduler, {"step": 0.5}, ValueError, "step=0.5: must be >= 1"),
    (FactorScheduler, {"step": math.inf}, ValueError, "step=inf: must be finite"),
    (FactorScheduler, {"step": "2"}, TypeError, "step='2': must be a number"),
    (FactorScheduler, {"step": True}, TypeError, "step=True: must be an integer"),
    (FactorScheduler, {"step": 1, "factor": 1.5}, ValueError, r"factor=1.5: must be in \(0, 1\]"),
    (FactorScheduler, {"step": 1, "factor": 0}, ValueError, r"factor=0: must be in \(0, 1\]"),
    (FactorScheduler, {"step": 1, "factor": math.nan}, ValueError, "factor=nan"),
    (FactorScheduler, {"step": 1, "stop_factor_lr": -1}, ValueError, "stop_factor_lr=-1: must be >= 0"),
    (FactorScheduler, {"step": 1, "base_lr": -0.1}, ValueError, "base_lr=-0.1: must be >= 0"),
    (FactorScheduler, {"step": 1, "base_lr": math.inf}, ValueError, "base_lr=inf: must be finite"),
    (FactorScheduler, {"step": 1, "base_lr": "1"}, TypeError, "base_lr='1': must be a number"),
    (MultiFactorScheduler, {"step": 3}, TypeError, "step=3: must be a list"),
    (MultiFactorScheduler, {"step": "34"}, TypeError, "step='34': must be a list"),
    (MultiFactorScheduler, {"step": []}, ValueError, r"step=\[\]: must be a non-empty, strictly increasing list"),
    (MultiFactorScheduler, {"step": [3, 3]}, ValueError, r"step=\[3, 3\]: must be"),
    (MultiFactorScheduler, {"step": [0, 3]}, ValueError, r"step\[0\]=0: must be >= 1"),
    (MultiFactorScheduler, {"step": [1, "2"]}, TypeError, r"step\[1\]='2': must be a number"),
    (PolyScheduler, {"max_update": 0}, ValueError, "max_update=0: must be >= 1"),
    (PolyScheduler, {"max_update": 2.0}, TypeError, "max_update=2.0: must be an integer"),
    (PolyScheduler, {"max_update": 5, "pwr": -1}, ValueError, "pwr=-1: must be >= 0"),
    (PolyScheduler, {"max_update": 5, "final_lr": -1}, ValueError, "final_lr=-1: must be >= 0"),
    (PolyScheduler, {"max_update": 5, "warmup_steps": 5}, ValueError, "warmup_steps=5: must be < max_update=5"),
    (CosineScheduler, {"max_update": 5, "warmup_steps": -1}, ValueError, "warmup_steps=-1: must be >= 0"),
    (
        CosineScheduler,
        {"max_update": 5, "warmup_begin_lr": 1},
        ValueError,
        "warmup_begin_lr=1: must be <= base_lr=0.01",
    ),
    (
        CosineScheduler,
        {"max_update": 5, "warmup_mode": "log"},
        ValueError,
        "warmup_mode='log': must be 'linear' or 'constant'",
    ),
    (CosineScheduler, {"max_update": 5, "warmup_mode": 3}, ValueError, "warmup_mode=3: must be 'linear' or 'constant'"),
]


@pytest.mark.parametrize(
    ("klass", "arguments", "error", "message"), ERRORS, ids=[f"{c.__name__} {a}" for c, a, _, _ in ERRORS]
)
def test_errors(klass: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        klass(**arguments)


def test_a_learning_rate_below_the_start_of_the_warm_up_overwrites_like_any() -> None:
    schedule = CosineScheduler(10, base_lr=0.5, warmup_steps=2, warmup_begin_lr=0.1)
    with pytest.warns(UserWarning, match=r"learning_rate=0.01 overwrites the scheduler's base_lr=0.5"):
        AdaGrad(lr_scheduler=schedule)
    assert [schedule(0), schedule(1), schedule(2)] == [0.1, pytest.approx(0.055), 0.01]


@pytest.mark.parametrize("step", [1, 2.5, 10 / 3, 7.0])
def test_steps_between_factors_need_not_be_whole(step: float) -> None:
    schedule, count, lr = FactorScheduler(step, 0.5, base_lr=1.0), 0.0, 1.0
    for update in range(100):  # MXNet's own loop
        while update > count + step:
            count, lr = count + step, max(lr * 0.5, 1e-8)
        assert schedule(update) == lr
    assert schedule(0) == 1.0
    assert [MultiFactorScheduler([1.5, 2.5], 0.5, base_lr=1.0)(n) for n in range(5)] == [1, 1, 0.5, 0.25, 0.25]


def test_a_constructor_that_fails_leaves_the_scheduler_alone() -> None:
    class Symbol:
        def attr_dict(self) -> dict[str, dict[str, str]]:
            return {"w": {"__lr_mult__": "half"}}

        def list_arguments(self) -> list[str]:
            return ["w"]

    schedule = FactorScheduler(3, base_lr=0.5)
    with pytest.raises(ValueError, match="__lr_mult__ of w='half': must be a number"):
        AdaGrad(0.3, lr_scheduler=schedule, sym=Symbol())
    assert schedule.base_lr == 0.5


def test_the_floor_of_a_schedule_may_change() -> None:
    schedule = FactorScheduler(step=1, factor=0.5, stop_factor_lr=0.3, base_lr=0.8)
    assert schedule(4) == 0.3
    schedule.stop_factor_lr = 0.0
    assert schedule(5) == 0.05


@pytest.mark.parametrize("step", [1.1, 1.7, 2.3, 1.01, 1.2, 10 / 3, 1.001])
def test_many_fractional_steps_are_the_same_as_one_by_one(step: float) -> None:
    one_by_one = FactorScheduler(step, 0.9999, 0.0, 0.3)
    count, lr = 0.0, 0.3
    for n in range(1, 4000):
        while n > count + step:  # MXNet's own loop
            count, lr = count + step, lr * 0.9999
        assert one_by_one(n) == lr
        assert FactorScheduler(step, 0.9999, 0.0, 0.3)(n) == lr


def test_poly_of_power_0_never_ends() -> None:
    """As in MXNet, because 0 ** 0 is 1."""
    schedule = lr_scheduler.PolyScheduler(max_update=10, base_lr=0.7, pwr=0, final_lr=0.1)
    assert [schedule(n) for n in (9, 10, 11, 99)] == [0.7] * 4


def test_schedules_of_others_can_be_printed() -> None:
    """Whatever they define, and leave out, of what the base class has."""

    class WithoutInit(LRScheduler):
        def __init__(self) -> None:
            pass

        def __call__(self, num_update: int) -> float:
            return 0.5

    class WithConfig(WithoutInit):
        def __init__(self) -> None:
            self.config = {"a": 1}  # type: ignore[assignment]

    class WithArguments(FactorScheduler):
        def __init__(self, gamma: float) -> None:
            super().__init__(3)
            self.gamma = gamma

    for scheduler in (WithoutInit(), WithConfig(), WithArguments(0.5)):
        assert type(scheduler).__name__ in repr(scheduler)
        assert type(scheduler).__name__ in repr(AdaGrad(None, lr_scheduler=scheduler))


def test_a_warm_up_that_ends_at_0_comes_back() -> None:
    schedule = FactorScheduler(1, base_lr=0.5, warmup_steps=4, warmup_begin_lr=0.2)
    schedule.warmup_final_lr = 0.0
    again = saved_schedules.from_config("FactorScheduler", schedule.config())
    assert [again(n) for n in range(5)] == [schedule(n) for n in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.5])


@pytest.mark.parametrize("change", [{"step": "3"}, {"unknown": 1}, {"base_lr": None}])
def test_arguments_of_another_type_in_a_file(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lr_scheduler FactorScheduler: "):
        saved_schedules.from_config("FactorScheduler", FactorScheduler(1).config() | change)


@pytest.mark.parametrize(("name", "config"), [("LRScheduler", {}), ("FactorScheduler", [["step", 1]])])
def test_what_is_no_schedule_in_a_file(name: Any, config: Any) -> None:
    with pytest.raises(ValueError, match=f"lr_scheduler='{name}': must be one of FactorScheduler"):
        saved_schedules.from_config(name, config)
