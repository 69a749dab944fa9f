"""Learning rates, multipliers and counts that users set or compute: checked, in double, counted first."""

from __future__ import annotations

import copy
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, Optimizer, get_updater
from adagrad.lr_scheduler import CosineScheduler, FactorScheduler, LRScheduler, MultiFactorScheduler, PolyScheduler
from support import assert_same_bits
from training import CLASSES, FUSED, expected, sparse, weights_of


class Pass(AdaGrad):
    """A user's class that changes nothing."""

    def _update_count(self, index: Any) -> None:
        super()._update_count(index)


def trained(optimizer: AdaGrad, steps: int = 4, index: int | str = 0) -> np.ndarray:
    updater, weight = get_updater(optimizer), np.ones(200, np.float32)
    for _ in range(steps):
        updater(index, np.linspace(0.1, 3, 200).astype(np.float32), weight)
    return weight


def test_the_largest_count_is_kept() -> None:
    optimizer = AdaGrad()
    trained(optimizer, steps=5)
    trained(optimizer, steps=1, index="other")
    assert optimizer.num_update == 5
    _, _, new = optimizer._resolve([0])
    optimizer.num_update = 9  # as if another thread had counted meanwhile
    optimizer._store_counts(new)
    assert optimizer.num_update == 9
    assert optimizer._index_update_count == {0: 6, "other": 1}


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


@pytest.mark.parametrize("name", ["lr", "wd"])
def test_a_product_beyond_the_numbers_is_refused_by_name(name: str) -> None:
    """Each factor is finite, and so passes its own check."""
    optimizer = AdaGrad(1e200, wd=1e200)
    setattr(optimizer, f"{name}_mult", {1: 1e200})
    weights = [np.ones(2), np.ones(2)]
    with pytest.raises(ValueError, match=rf"{name} of index 1=inf: must be finite and >= 0"):
        optimizer.update([0, 1], weights, [np.ones(2)] * 2, [np.zeros(2), np.zeros(2)])
    assert weights[0].tolist() == weights[1].tolist() == [1.0, 1.0]


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


def test_counts_of_numpy_that_are_zero_are_counts() -> None:
    optimizer, weight = AdaGrad(0.5, begin_num_update=np.int64(0), epsilon=0), np.ones(2)  # type: ignore[arg-type]
    optimizer.num_update = np.int64(0)  # type: ignore[assignment]
    optimizer.update(0, weight, np.ones(2), np.zeros(2))
    assert (weight.tolist(), optimizer.num_update) == ([0.5, 0.5], 1)


# ------------------------------------------------------------------------------------------------------------ in double

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


@pytest.mark.parametrize("value", [np.array(0.3, np.float32), np.float32(0.3), np.float16(0.3)], ids=repr)
def test_scalars_of_numpy_in_a_schedule_are_converted(value: Any) -> None:
    schedule = CosineScheduler(9)
    schedule.base_lr = value
    assert type(schedule.base_lr) is float
    assert schedule(5) == CosineScheduler(9, base_lr=float(value))(5)


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


class Reference:
    """MXNet's bookkeeping: for each weight in list order, count, then resolve lr."""

    def __init__(self, schedule: Any, begin: int = 0) -> None:
        self.schedule, self.begin, self.counts, self.num_update = schedule, begin, dict[Any, int](), begin

    def rates(self, indices: list[Any]) -> list[float]:
        found = []
        for index in indices:
            self.counts[index] = self.counts.get(index, self.begin) + 1
            self.num_update = max(self.num_update, self.counts[index])
            found.append(self.schedule(self.num_update))
        return found


CALLS = [[0], [1, 0], ["a"], [0, 1, "a"], [1], [1], [1, "a", 0], [0], ["a", 1, 5], [5, 0], [1, 0], [5]]


@pytest.mark.parametrize("begin", [0, 7])
@pytest.mark.parametrize("kinds", ["d", "s", "ds"])
@FUSED
def test_counts_and_rates_advance_in_list_order(begin: int, kinds: str, fused: bool) -> None:
    """Weights are updated unequally often, so that the rate changes within a list."""
    schedule = FactorScheduler(step=2, factor=0.5, base_lr=1.0)
    reference = Reference(schedule, begin)
    optimizer = AdaGrad(None, lr_scheduler=schedule, begin_num_update=begin, use_fused_step=fused, epsilon=0.0)
    assert optimizer.num_update == begin
    for indices in CALLS:
        # A fresh history and a gradient of one: the step is lr itself.
        weights = [np.zeros((1, 1)) for _ in indices]
        grads: list[Any] = [
            sparse(w, [0]) if kinds[i % len(kinds)] == "s" else np.ones((1, 1)) for i, w in enumerate(weights)
        ]
        optimizer.update(indices, weights, grads, [np.zeros((1, 1)) for _ in indices])
        assert [float(-w[0, 0]) for w in weights] == reference.rates(indices)
        assert optimizer._index_update_count == reference.counts
        assert optimizer.num_update == reference.num_update
        assert optimizer.learning_rate == schedule(reference.num_update)


def test_the_schedule_is_asked_at_the_largest_count() -> None:
    asked: list[int] = []

    def schedule(num_update: int) -> float:
        asked.append(num_update)
        return 0.1

    optimizer = AdaGrad(None, lr_scheduler=schedule)
    weight, state = np.zeros(1), np.zeros(1)
    for index in (0, 0, 0, 1):
        optimizer.update(index, weight, np.ones(1), state)
    assert sorted(set(asked)) == [1, 2, 3]
    assert asked[-1] == 3, "weight 1 is updated for the first time, the schedule is at 3"


# ---------------------------------------------------------------------------------------------------------- multipliers


def parameter(lr_mult: float = 1.0, wd_mult: float = 1.0) -> Any:
    return SimpleNamespace(lr_mult=lr_mult, wd_mult=wd_mult)


def test_multipliers_resolve_in_mxnets_order() -> None:
    names = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four"}
    optimizer = AdaGrad(0.5, wd=0.1, param_idx2name=names, param_dict={0: parameter(2.0, 3.0)})
    optimizer.set_lr_mult({0: 7.0, 1: 5.0, "one": 11.0, "two": 13.0, "zero": 17.0, "loose": 19.0})
    optimizer.set_wd_mult({0: 7.0, 3: 0.0, "three": 2.0, "four": 4.0})
    assert optimizer._get_lrs([0, 1, 2, 3, 4, "loose", 99]) == [0.5 * m for m in (2, 5, 13, 1, 1, 19, 1)]
    assert optimizer._get_wds([0, 1, 2, 3, 4, "loose", 99]) == [0.1 * m for m in (3, 1, 1, 0, 4, 1, 1)]


@FUSED
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "row-sparse"])
def test_multipliers_act(fused: bool, dense: bool) -> None:
    optimizer = AdaGrad(0.5, wd=0.1, use_fused_step=fused, param_dict={"p": parameter(0.0), 3: parameter(1.0, 0.0)})
    optimizer.set_lr_mult({1: 0.5})
    indices = [0, 1, "p", 3]
    weights = weights_of(*[(3, 2)] * 4)
    before, ones = copy.deepcopy(weights), np.ones((3, 2), np.float32)
    states = [optimizer.create_state(i, w) for i, w in zip(indices, weights, strict=True)]
    grads = [ones if dense else sparse(w, [0, 1, 2]) for w in weights]
    optimizer.update(indices, weights, grads, states)
    for weight, old, lr, wd in zip(weights, before, [0.5, 0.25, 0.0, 0.5], [0.1, 0.1, 0.1, 0.0], strict=True):
        assert_same_bits(weight, expected(old, ones, lr=lr, wd=wd))


@pytest.mark.parametrize("fused", [True, False])
def test_weight_decay_multipliers_alone_act(fused: bool) -> None:
    optimizer, (weight,) = AdaGrad(0.5, wd=0.1, use_fused_step=fused), weights_of((3, 2))
    optimizer.set_wd_mult({0: 0.0})
    before, ones = weight.copy(), np.ones((3, 2), np.float32)
    optimizer.update(0, weight, ones, optimizer.create_state(0, weight))
    assert_same_bits(weight, expected(before, ones, lr=0.5, wd=0.0))


def test_param_dict_is_asked_at_every_step() -> None:
    owner = parameter()
    optimizer = AdaGrad(1.0, epsilon=0.0, param_dict={0: owner})
    for lr_mult in (1.0, 0.5, 0.25):
        owner.lr_mult = lr_mult
        weight = np.zeros(1)
        optimizer.update(0, weight, np.ones(1), np.zeros(1))
        assert weight[0] == -lr_mult


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (object(), TypeError, r"param_dict\[0\]=<object.*>: must have lr_mult and wd_mult"),
        (type("P", (), {"lr_mult": "a"})(), TypeError, r"lr_mult of param_dict\[0\]='a': must be a number"),
    ],
    ids=["no attribute", "no number"],
)
def test_what_param_dict_holds_is_named(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaGrad(param_dict={0: value}).update(0, np.ones(1), np.ones(1), np.zeros(1))


class Symbol:
    def attr_dict(self) -> dict[str, dict[str, str]]:
        return {
            "a": {"__lr_mult__": "0.5", "__wd_mult__": "0"},
            "b": {"__wd_mult__": "2"},
            "gone": {"__lr_mult__": "9"},
        }

    def list_arguments(self) -> list[str]:
        return ["data", "a", "b"]


def test_sym() -> None:
    optimizer = AdaGrad(1.0, wd=1.0, sym=Symbol(), param_idx2name={0: "a", 1: "b", 2: "gone", 3: "data"})
    assert optimizer._get_lrs([0, 1, 2, 3]) == [0.5, 1, 1, 1]
    assert optimizer._get_wds([0, 1, 2, 3]) == [0, 2, 1, 1]
    optimizer.set_lr_mult({"b": 3.0})
    assert optimizer._get_lrs([0, 1]) == [0.5, 3.0], "what sym says stays"
    optimizer.set_lr_mult({"a": 4.0})
    assert optimizer._get_lrs([0, 1]) == [4.0, 1.0], "set anew, before sym"
    assert optimizer.lr_mult == {"a": 4.0}


def test_sym_and_keys_of_multipliers_are_checked() -> None:
    with pytest.raises(TypeError, match=r"sym=3: must have attr_dict\(\) and list_arguments\(\)"):
        AdaGrad(sym=3)
    for setter, name in (("set_lr_mult", "args_lr_mult"), ("set_wd_mult", "args_wd_mult")):
        with pytest.raises(TypeError, match=rf"a key of {name}=1.5: must be an integer or a string, not float"):
            getattr(AdaGrad(), setter)({1.5: 2.0})
    with pytest.raises(TypeError, match=r"a key of param_idx2name=\(1, 2\): must be an integer or a string"):
        AdaGrad(param_idx2name={(1, 2): "a"})  # type: ignore[dict-item]


def test_set_multipliers_replaces_those_before() -> None:
    optimizer = AdaGrad(1.0)
    optimizer.set_lr_mult({0: 2.0, 1: 3.0})
    optimizer.set_lr_mult({1: 4.0})
    assert optimizer._get_lrs([0, 1]) == [1.0, 4.0]
    with pytest.raises(ValueError, match=r"args_lr_mult\[0\]=-1: must be >= 0"):
        optimizer.set_lr_mult({1: 5.0, 0: -1})
    assert optimizer._get_lrs([0, 1]) == [1.0, 4.0]


# ----------------------------------------------------------------------------------- the learning rate and the schedule


def one_warning(make: Any) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make()
    assert [warning.category for warning in caught] == [UserWarning]
    assert caught[0].filename == __file__
    return made, str(caught[0].message)


@pytest.mark.parametrize("klass", CLASSES)
def test_learning_rate_and_schedule(klass: type[AdaGrad]) -> None:
    schedule = FactorScheduler(step=1, factor=0.5, base_lr=0.8)
    assert klass(None, lr_scheduler=schedule).learning_rate == 0.8
    assert klass(0.8, lr_scheduler=schedule).learning_rate == 0.8, "the same: nothing is overwritten, no warning"
    optimizer, message = one_warning(lambda: klass(0.4, lr_scheduler=schedule))
    assert "learning_rate=0.4 overwrites the scheduler's base_lr=0.8" in message
    assert "learning_rate=None" in message
    assert optimizer.learning_rate == schedule.base_lr == 0.4
    one_warning(lambda: Optimizer.create_optimizer(klass.__name__, learning_rate=0.2, lr_scheduler=schedule))
    one_warning(lambda: Optimizer(learning_rate=0.3, lr_scheduler=schedule))
    optimizer, message = one_warning(lambda: klass(lr_scheduler=schedule))
    assert optimizer.learning_rate == 0.01, "the default learning rate overwrites too, as documented"


def test_a_warning_made_an_error_leaves_the_schedule_as_it_was() -> None:
    schedule = PolyScheduler(100, base_lr=0.4, warmup_steps=5)
    schedule.warmup_final_lr = 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="overwrites the scheduler's base_lr"):
            AdaGrad(0.1, lr_scheduler=schedule)
    assert (schedule.base_lr, schedule.warmup_final_lr) == (0.4, 0.3)


def test_the_learning_rate_overwrites_the_end_of_the_warm_up_too() -> None:
    schedule = FactorScheduler(step=10, base_lr=0.4, warmup_steps=4)
    schedule.warmup_final_lr = 0.8
    one_warning(lambda: AdaGrad(0.1, lr_scheduler=schedule))
    assert [schedule(n) for n in (2, 4)] == [0.05, 0.1]


def test_a_schedule_without_base_lr_has_nothing_to_overwrite() -> None:
    class Plan:
        def rate(self, num_update: int) -> float:
            return 1.0 / (1 + num_update)

    for schedule in (lambda n: 1.0 / (1 + n), Plan().rate):
        optimizer = AdaGrad(None, lr_scheduler=schedule, epsilon=0.0)
        assert optimizer.learning_rate == 1.0
        optimizer.lr_scheduler = None  # then the default rate
        weight = np.zeros(1)
        optimizer.update(0, weight, np.ones(1), np.zeros(1))
        assert weight[0] == -0.01
        optimizer, message = one_warning(lambda schedule=schedule: AdaGrad(0.5, lr_scheduler=schedule))
        assert "learning_rate=0.5" in message
        assert "no effect" in message
        assert optimizer.learning_rate == 1.0
        assert not hasattr(schedule, "base_lr")


def test_a_refused_constructor_leaves_the_schedule_alone() -> None:
    schedule = FactorScheduler(step=1, base_lr=0.8)
    for bad in ({"epsilon": -1}, {"initial_accumulator_value": math.nan}, {"wd": -1}, {"clip_gradient": 0}):
        with pytest.raises(ValueError, match="must be"):
            AdaGrad(0.5, lr_scheduler=schedule, **bad)  # type: ignore[arg-type]
    assert schedule.base_lr == 0.8


def test_set_learning_rate() -> None:
    optimizer = AdaGrad(0.1)
    optimizer.set_learning_rate(0.7)
    assert optimizer.learning_rate == 0.7
    for bad, error in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(error, match="lr="):
            optimizer.set_learning_rate(bad)  # type: ignore[arg-type]
    assert optimizer.learning_rate == 0.7
    scheduled = AdaGrad(None, lr_scheduler=FactorScheduler(step=1, base_lr=0.3))
    with pytest.raises(UserWarning, match=r"lr=0\.5: .*scheduler"):
        scheduled.set_learning_rate(0.5)
    assert scheduled.learning_rate == 0.3


def test_a_schedule_that_gives_nonsense_changes_nothing() -> None:
    for rate, error in ((math.nan, ValueError), (-1.0, ValueError), ("fast", TypeError)):
        optimizer = AdaGrad(None, lr_scheduler=lambda n, rate=rate: rate)
        weight, state = np.ones(3), np.zeros(3)
        with pytest.raises(error, match=r"lr_scheduler\(1\)="):
            optimizer.update(0, weight, np.ones(3), state)
        assert weight.tolist() == [1, 1, 1]
        assert (optimizer.num_update, optimizer._index_update_count) == (0, {})
