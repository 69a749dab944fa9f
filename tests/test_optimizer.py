"""The API contract of Optimizer, AdaGrad and GroupAdaGrad: arguments, dispatch, counts, rates, the registry."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import adagrad
import oracle
from adagrad import AdaGrad, GroupAdaGrad, Optimizer, RowSparse, arrays
from adagrad.kernels import general_path
from adagrad.lr_scheduler import FactorScheduler, LRScheduler, PolyScheduler
from support import BFLOAT16, assert_same_bits, normal, set_layout

CLASSES = [AdaGrad, GroupAdaGrad]
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])


def weights_of(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [normal(rng, shape, dtype) for shape in shapes]


def sparse(weight: np.ndarray, rows: list[int], value: float = 1.0) -> RowSparse:
    return RowSparse(np.full((len(rows), *weight.shape[1:]), value, weight.dtype), np.array(rows), weight.shape)


def after(optimizer: Optimizer, weight: np.ndarray, *grads: Any, index: Any = 0) -> np.ndarray:
    """A copy of ``weight`` after updates with ``grads``."""
    weight = weight.copy()
    state = optimizer.create_state_multi_precision(index, weight)
    for grad in grads:
        optimizer.update_multi_precision(index, weight, grad, state)
    return weight


def expected(weight: np.ndarray, *grads: np.ndarray, initial: float = 0.0, **hyper: Any) -> np.ndarray:
    history = np.full(weight.shape, initial, np.float64 if weight.dtype == np.float64 else np.float32)
    for grad in grads:
        weight, history, _ = oracle.dense(weight, grad, history, oracle.Hyper(**hyper))
    return weight


# ----------------------------------------------------------------------------------------------------------- arguments


def test_defaults() -> None:
    optimizer = AdaGrad()
    assert vars(optimizer).items() >= {
        "lr": 0.01, "epsilon": 1e-6, "use_fused_step": True, "initial_accumulator_value": 0.0, "rescale_grad": 1.0,
        "wd": 0.0, "clip_gradient": None, "lr_scheduler": None, "begin_num_update": 0, "num_update": 0,
        "multi_precision": False, "aggregate_num": 1, "param_dict": {}, "idx2name": {}, "lr_mult": {}, "wd_mult": {},
    }.items()  # fmt: skip
    assert optimizer.learning_rate == 0.01
    assert not optimizer.row_wise
    assert GroupAdaGrad().row_wise
    base = Optimizer()
    assert base.learning_rate == 0.01
    assert base.use_fused_step is False


@pytest.mark.parametrize("klass", CLASSES)
def test_positional_arguments_are_mxnets(klass: type[AdaGrad]) -> None:
    optimizer = klass(0.5, 1e-3, False)
    assert (optimizer.learning_rate, optimizer.epsilon, optimizer.use_fused_step) == (0.5, 1e-3, False)
    with pytest.raises(TypeError):
        klass(0.5, 1e-3, False, 0.1)  # type: ignore[misc]
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        klass(momentum=0.9)


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learning_rate": ({"learning_rate": 0.3}, {"lr": 0.3}),
    "learning_rate 0": ({"learning_rate": 0}, {"lr": 0.0}),
    "learning_rate None": ({"learning_rate": None}, {"lr": 0.01}),
    "epsilon": ({"epsilon": 0.01}, {"lr": 0.01, "epsilon": 0.01}),
    "epsilon 0": ({"epsilon": 0}, {"lr": 0.01, "epsilon": 0.0}),
    "initial_accumulator_value": ({"initial_accumulator_value": 0.4}, {"lr": 0.01, "initial": 0.4}),
    "rescale_grad": ({"rescale_grad": -1 / 3}, {"lr": 0.01, "rescale_grad": -1 / 3}),
    "wd": ({"wd": 0.1}, {"lr": 0.01, "wd": 0.1}),
    "clip_gradient": ({"clip_gradient": 0.2}, {"lr": 0.01, "clip_gradient": 0.2}),
    "NumPy numbers": ({"learning_rate": np.float32(0.5), "wd": np.int64(1)}, {"lr": 0.5, "wd": 1.0}),
    "fractions": ({"learning_rate": Fraction(1, 3), "clip_gradient": 1}, {"lr": 1 / 3, "clip_gradient": 1.0}),
}


@FUSED
@pytest.mark.parametrize(("arguments", "hyper"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_hyper_parameters_do_what_they_say(arguments: Any, hyper: Any, fused: bool) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        weight, grads = normal(rng, (3, 4), dtype), [normal(rng, (3, 4), dtype) for _ in range(3)]
        found = after(AdaGrad(use_fused_step=fused, **arguments), weight, *grads)
        assert_same_bits(found, expected(weight, *grads, **hyper))


@FUSED
def test_group_adagrad(fused: bool) -> None:
    rng = np.random.default_rng(1)
    weight, grads = normal(rng, (6, 20), np.float32), [normal(rng, (6, 20), np.float32) for _ in range(3)]
    optimizer = GroupAdaGrad(0.1, wd=0.1, initial_accumulator_value=0.5, use_fused_step=fused)
    state = optimizer.create_state(0, weight)
    assert state.shape == (6, 1)
    assert (state == 0.5).all()
    want, history = weight, state.copy()
    for grad in grads:
        want, history, _ = oracle.dense(want, grad, history, oracle.Hyper(lr=0.1, wd=0.1, row_wise=True))
    assert_same_bits(after(optimizer, weight, *grads), want)


def test_states() -> None:
    optimizer = AdaGrad(initial_accumulator_value=0.25, multi_precision=True)
    for dtype, computing in [("f2", "f4"), (BFLOAT16, "f4"), ("f4", "f4"), ("f8", "f8"), (">f4", "f4"), (">f8", "f8")]:
        weight = np.ones((3, 2), dtype)
        history = optimizer.create_state(0, weight)
        assert (history.dtype, history.shape) == (np.dtype(computing), (3, 2))
        assert history.dtype.isnative
        assert (history == 0.25).all()
        state = optimizer.create_state_multi_precision(0, weight)
        assert isinstance(state, tuple) == (weight.itemsize == 2)
        if isinstance(state, tuple):
            assert [part.dtype for part in state] == [np.float32, np.float32]
            assert_same_bits(state[0], np.ones((3, 2), np.float32))
            assert not np.shares_memory(state[0], weight)
    assert GroupAdaGrad().create_state(0, np.ones((4, 2, 3))).shape == (4, 1, 1)
    assert GroupAdaGrad().create_state(0, np.ones(4)).shape == (4,)
    assert AdaGrad().create_state(0, np.ones(())).shape == ()
    assert AdaGrad().create_state(0, np.ones((0, 3))).shape == (0, 3)
    assert Optimizer().create_state(0, np.ones(3)) is None


def test_history_lies_as_the_weight_does() -> None:
    """So that a step goes through both in the same order."""
    for weight in (np.ones((5, 7), order="F"), np.ones((2, 3, 4)).transpose(2, 0, 1)):
        assert AdaGrad().create_state(0, weight).strides == weight.strides


@pytest.mark.parametrize("multi_precision", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
@FUSED
def test_multi_precision(multi_precision: bool, dtype: Any, fused: bool) -> None:
    rng = np.random.default_rng(2)
    weight, grads = normal(rng, (5,), dtype), [normal(rng, (5,), dtype) for _ in range(4)]
    optimizer = AdaGrad(0.01, wd=0.01, multi_precision=multi_precision, use_fused_step=fused)
    want, history = weight, np.zeros(5, np.float32)
    master = weight.astype(np.float32) if multi_precision else None
    for grad in grads:
        want, history, master = oracle.dense(want, grad, history, oracle.Hyper(lr=0.01, wd=0.01), master)
    assert_same_bits(after(optimizer, weight, *grads), want)


def test_small_steps_add_up_in_the_master_copy() -> None:
    weight, grads = np.ones(1, np.float16), [np.ones(1, np.float16)] * 50
    assert after(AdaGrad(1e-4, multi_precision=True), weight, *grads)[0] < 1
    assert after(AdaGrad(1e-4, multi_precision=False), weight, *grads)[0] == 1


@pytest.mark.parametrize("aggregate_num", [None, 1, 7, math.inf, np.inf])
def test_aggregate_num(aggregate_num: Any) -> None:
    assert AdaGrad(aggregate_num=aggregate_num).aggregate_num == (1 if aggregate_num is None else aggregate_num)


# ------------------------------------------------------------------------------------------------------------- dispatch


class Recording(AdaGrad):
    """Notes the calls of step and fused_step, each with its indices, and goes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[str, list[Any]]] = []

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self.calls.append(("step", list(indices)))
        assert len(indices) == len(weights) == len(grads) == len(states)
        super().step(indices, weights, grads, states)

    def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self.calls.append(("fused_step", list(indices)))
        super().fused_step(indices, weights, grads, states)


@pytest.mark.parametrize(
    ("fused", "kinds", "calls"),
    [
        (False, "ddd", [("step", [0, 1, 2])]),
        (False, "sds", [("step", [0, 1, 2])]),
        (False, "sss", [("step", [0, 1, 2])]),
        (True, "ddd", [("fused_step", [0, 1, 2]), ("step", [0, 1, 2])]),
        (True, "sds", [("fused_step", [0, 1, 2]), ("step", [1])]),
        (True, "dsd", [("fused_step", [0, 1, 2]), ("step", [0, 2])]),
        (True, "sss", [("fused_step", [0, 1, 2])]),
        (True, "d", [("fused_step", [0]), ("step", [0])]),
        (True, "s", [("fused_step", [0])]),
        (False, "s", [("step", [0])]),
    ],
)
@pytest.mark.parametrize("method", ["update", "update_multi_precision"])
def test_which_method_sees_what(method: str, fused: bool, kinds: str, calls: Any) -> None:
    weights = weights_of(*[(4, 2)] * len(kinds))
    grads: list[Any] = [
        np.ones_like(w) if kind == "d" else sparse(w, [1, 3, 1]) for w, kind in zip(weights, kinds, strict=True)
    ]
    optimizer, plain = Recording(0.1, wd=0.1, use_fused_step=fused), AdaGrad(0.1, wd=0.1, use_fused_step=fused)
    other = copy.deepcopy(weights)
    indices = list(range(len(kinds)))
    for each, given in ((optimizer, weights), (plain, other)):
        states = [each.create_state(i, w) for i, w in enumerate(given)]
        getattr(each, method)(indices, given, grads, states)
    assert optimizer.calls == calls
    assert optimizer._index_update_count == plain._index_update_count == dict.fromkeys(indices, 1)
    for mine, theirs in zip(weights, other, strict=True):
        assert_same_bits(mine, theirs)


def test_a_step_of_ones_own_is_all_that_happens_to_dense_gradients() -> None:
    """Without super(): the sparse part is still the kernels'."""

    class Signed(AdaGrad):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for weight, grad in zip(weights, grads, strict=True):
                weight -= self.learning_rate * np.sign(grad)

    for fused in (True, False):
        dense, rows = weights_of((3, 2), (3, 2))
        before = dense.copy(), rows.copy()
        optimizer = Signed(0.5, use_fused_step=fused)
        states = [optimizer.create_state(i, w) for i, w in enumerate((dense, rows))]
        grads = [np.full((3, 2), 7, np.float32), sparse(rows, [2]) if fused else np.ones((3, 2), np.float32)]
        optimizer.update([0, 1], [dense, rows], grads, states)
        assert_same_bits(dense, before[0] - np.float32(0.5))
        if fused:
            assert_same_bits(rows[2], expected(before[1][2], np.ones(2, np.float32), lr=0.5))
            assert optimizer._index_update_count[1] == 1


def test_a_fused_step_of_ones_own() -> None:
    class Nothing(AdaGrad):
        def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            pass

    for fused in (True, False):
        (weight,) = weights_of((3, 2))
        before = weight.copy()
        optimizer = Nothing(use_fused_step=fused)
        optimizer.update(0, weight, np.ones_like(weight), optimizer.create_state(0, weight))
        assert (weight == before).all() == fused
        assert optimizer.num_update == (0 if fused else 1)


class MXNetStyle(AdaGrad):
    """As AdaGrad.step is written in MXNet: counts and rates asked for one by one."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            lr, wd = np.float32(self._get_lr(index)), np.float32(self._get_wd(index))
            grad = grad * np.float32(self.rescale_grad) + wd * weight
            state[...] += grad * grad
            weight[...] -= lr * (grad / (np.sqrt(state) + np.float32(self.epsilon)))


class MXNetStyleLists(MXNetStyle):
    """The same with the list forms of the helpers."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self._update_count(indices)
        for weight, grad, state, lr, wd in zip(
            weights, grads, states, self._get_lrs(indices), self._get_wds(indices), strict=True
        ):
            grad = grad * np.float32(self.rescale_grad) + np.float32(wd) * weight
            state[...] += grad * grad
            weight[...] -= np.float32(lr) * (grad / (np.sqrt(state) + np.float32(self.epsilon)))


@pytest.mark.parametrize("klass", [MXNetStyle, MXNetStyleLists])
@pytest.mark.parametrize("kinds", ["dd", "dsd", "sd", "ds"])
@FUSED
def test_steps_written_for_mxnet(klass: type[AdaGrad], kinds: str, fused: bool) -> None:
    """A count for each call, the rate at that moment, also when the dense part is handed on from fused_step."""
    if not fused and "s" in kinds:
        kinds = kinds.replace("s", "d")  # such a step knows dense gradients
    made = []
    for each in (klass, AdaGrad):
        schedule = PolyScheduler(max_update=10, base_lr=0.5)
        optimizer = each(None, wd=0.1, lr_scheduler=schedule, use_fused_step=fused)
        optimizer.set_lr_mult({1: 0.5})
        weights = weights_of(*[(4, 2)] * len(kinds))
        states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
        for _ in range(4):
            grads: list[Any] = [
                np.ones_like(w) if k == "d" else sparse(w, [2, 2]) for w, k in zip(weights, kinds, strict=True)
            ]
            optimizer.update(list(range(len(kinds))), weights, grads, states)
        made.append((weights, optimizer._index_update_count, optimizer.num_update))
    assert made[0][1:] == made[1][1:] == (dict.fromkeys(range(len(kinds)), 4), 4)
    if klass is MXNetStyle or "s" in kinds:  # the list forms resolve all rates after all counts, as in MXNet
        for mine, theirs in zip(made[0][0], made[1][0], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("method", ["update", "update_multi_precision", "step", "fused_step"])
@pytest.mark.parametrize("form", ["single", "list", "tuple"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "0-d"])
def test_single_arguments_and_lists(method: str, form: str, kind: str) -> None:
    (weight,) = weights_of(() if kind == "0-d" else (4, 2))
    before, optimizer = weight.copy(), AdaGrad()
    grad = sparse(weight, [0, 1, 2, 3]) if kind == "sparse" else np.ones_like(weight)
    arguments: Any = (0, weight, grad, optimizer.create_state(0, weight))
    if form != "single":
        arguments = [{"list": list, "tuple": tuple}[form]([each]) for each in arguments]
    getattr(optimizer, method)(*arguments)
    assert_same_bits(weight, expected(before, np.ones_like(before), lr=0.01))
    assert optimizer._index_update_count == {0: 1}


@pytest.mark.parametrize("klass", CLASSES)
@FUSED
def test_the_gradient_is_never_written_to(klass: type[AdaGrad], fused: bool) -> None:
    for dtype in (np.float32, np.float16):
        (weight,) = weights_of((4, 2), dtype=dtype)
        optimizer = klass(rescale_grad=3.0, clip_gradient=0.1, wd=0.1, use_fused_step=fused, multi_precision=True)
        state = optimizer.create_state_multi_precision(0, weight)
        grad, rows = np.full((4, 2), 0.7, dtype), sparse(weight, [1, 1, 3], 0.7)
        for given in (grad, rows):
            parts = [given] if isinstance(given, np.ndarray) else [given.values, given.indices]
            before = [part.tobytes() for part in parts]
            for part in parts:
                part.setflags(write=False)
            optimizer.update_multi_precision(0, weight, given, state)
            assert [part.tobytes() for part in parts] == before


def test_attributes_may_change_between_steps() -> None:
    rng = np.random.default_rng(3)
    for fused in (True, False):
        optimizer = AdaGrad(0.1, use_fused_step=fused)
        weight = normal(rng, (6,), np.float32)
        state = optimizer.create_state(0, weight)
        changes: list[dict[str, Any]] = [
            {}, {"wd": 0.1}, {"rescale_grad": 0.5}, {"clip_gradient": 0.3}, {"epsilon": 0.1}, {"clip_gradient": None},
            {"lr": 0.2},
        ]  # fmt: skip
        hyper = oracle.Hyper(lr=0.1)
        for change in changes:
            for name, value in change.items():
                if name == "lr":
                    optimizer.set_learning_rate(value)
                else:
                    setattr(optimizer, name, value)
                hyper = oracle.Hyper(**(vars(hyper) | {name: value}))
            grad = normal(rng, (6,), np.float32)
            want = oracle.dense(weight, grad, state, hyper)
            optimizer.update(0, weight, grad, state)
            assert_same_bits(weight, want[0], str(change))
            assert_same_bits(state, want[1], str(change))
        optimizer.use_fused_step = not fused
        optimizer.update(0, weight, np.ones(6, np.float32), state)
        optimizer.wd = -1.0
        with pytest.raises(ValueError, match=r"wd=-1\.0: must be >= 0"):
            optimizer.update(0, weight, np.ones(6, np.float32), state)
        assert optimizer.num_update == len(changes) + 1


def test_what_equals_a_good_value_need_not_be_one() -> None:
    """True equals 1 and 1.0, and 0.0 equals -0.0."""
    optimizer, weight, history = AdaGrad(0.5, epsilon=1.0), np.ones(2, np.float32), np.zeros(2, np.float32)

    def update(index: Any) -> None:
        optimizer.update(index, weight, np.ones(2, np.float32), history)

    update(1)
    for index in (True, 1.0):
        with pytest.raises(TypeError, match=f"index={index}: must be an integer or a string"):
            update(index)
    optimizer.epsilon = True
    with pytest.raises(TypeError, match="epsilon=True: must be a number, not bool"):
        update(1)
    optimizer.epsilon, optimizer.epsilon_inside = 1.0, 0  # type: ignore[assignment]
    with pytest.raises(TypeError, match="epsilon_inside=0: must be"):
        update(1)
    for lr in (0.0, -0.0, 0.0):
        weights = [np.array([-0.0], np.float32) for _ in range(2)]
        for each, fused in zip(weights, (True, False), strict=True):
            AdaGrad(lr, use_fused_step=fused).update(0, each, np.ones(1, np.float32), np.zeros(1, np.float32))
        assert_same_bits(*weights, str(lr))


@pytest.mark.parametrize("grads", [1, 41])
@pytest.mark.parametrize("method", ["_check", "update", "step", "fused_step"])
def test_lists_of_different_lengths(method: str, grads: int) -> None:
    weights = [np.ones(3, np.float32) for _ in range(40)]
    states = [np.zeros(3, np.float32) for _ in range(40)]
    with pytest.raises(ValueError, match=f"grads: {grads} entries: must be 40, as many as indices"):
        getattr(AdaGrad(), method)(list(range(40)), weights, [np.ones(3, np.float32)] * grads, states)


# ----------------------------------------------------------------------------------------------------- counts and rates


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


def test_param_dict_is_asked_at_every_step() -> None:
    owner = parameter()
    optimizer = AdaGrad(1.0, epsilon=0.0, param_dict={0: owner})
    for lr_mult in (1.0, 0.5, 0.25):
        owner.lr_mult = lr_mult
        weight = np.zeros(1)
        optimizer.update(0, weight, np.ones(1), np.zeros(1))
        assert weight[0] == -lr_mult


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


def test_an_initial_history_fits_its_dtype() -> None:
    optimizer = AdaGrad(initial_accumulator_value=1e300)
    assert optimizer.create_state(0, np.ones(2)).tolist() == [1e300] * 2
    with pytest.raises(ValueError, match=r"initial_accumulator_value=1e\+300: must be finite in float32"):
        optimizer.create_state(0, np.ones(2, np.float32))


def test_set_multipliers_replaces_those_before() -> None:
    optimizer = AdaGrad(1.0)
    optimizer.set_lr_mult({0: 2.0, 1: 3.0})
    optimizer.set_lr_mult({1: 4.0})
    assert optimizer._get_lrs([0, 1]) == [1.0, 4.0]
    with pytest.raises(ValueError, match=r"args_lr_mult\[0\]=-1: must be >= 0"):
        optimizer.set_lr_mult({1: 5.0, 0: -1})
    assert optimizer._get_lrs([0, 1]) == [1.0, 4.0]


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


# --------------------------------------------------------------------------------------------------------- the registry


def test_create() -> None:
    for name, klass in [
        ("adagrad", AdaGrad),
        ("AdaGrad", AdaGrad),
        ("ADAGRAD", AdaGrad),
        ("GroupAdaGrad", GroupAdaGrad),
    ]:
        optimizer = adagrad.create(name, learning_rate=0.5, epsilon=0.1)
        assert type(optimizer) is klass
        assert (optimizer.learning_rate, optimizer.epsilon) == (0.5, 0.1)
    assert Optimizer.create_optimizer is adagrad.create
    with pytest.raises(ValueError, match=r"name='sgd': no such optimizer; registered: .*adagrad.*groupadagrad"):
        adagrad.create("sgd")
    with pytest.raises(TypeError, match="name=3: must be a string"):
        adagrad.create(3)  # type: ignore[arg-type]


def test_register(registry: dict[str, type]) -> None:
    @adagrad.register
    class Mine(Optimizer):
        pass

    assert registry["mine"] is Mine
    assert type(adagrad.create("MINE", wd=0.5)) is Mine
    adagrad.register(Mine)  # again: no warning
    first = Mine

    def elsewhere() -> type[Optimizer]:
        class Mine(Optimizer):
            pass

        return Mine

    with pytest.warns(UserWarning, match=r"Mine replaces .*Mine"):
        adagrad.register(elsewhere())
    assert registry["mine"] is not first
    with pytest.raises(TypeError, match="klass=3: must be a class"):
        adagrad.register(3)  # type: ignore[type-var]


class Fading(AdaGrad):
    """Says lr and wd itself, as subclasses for MXNet do: by the counts, which have the update to come in them."""

    def _get_lrs(self, indices: Any) -> list[float]:
        return [1.0 / self._index_update_count[index] for index in indices]

    def _get_wd(self, index: Any) -> float:
        return 0.25 * self.num_update


@pytest.mark.parametrize("multipliers", [{}, {"unrelated": 1.0}], ids=["none", "unrelated"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
def test_rates_of_ones_own(multipliers: Any, fused: bool) -> None:
    optimizer = Fading(epsilon=0.0, use_fused_step=fused)
    optimizer.set_lr_mult(multipliers)
    weights, states = [np.ones(1), np.ones(1)], [np.zeros(1), np.zeros(1)]
    optimizer.update(1, weights[1], np.ones(1), states[1])
    assert (float(weights[1][0]), float(states[1][0])) == (0.0, 1.25**2)
    weights[1][:] = 1
    optimizer.update([0, 1], weights, [np.ones(1)] * 2, states)
    # The first sees the largest count before the second was counted, as where each is counted before it is updated.
    assert (float(weights[0][0]), float(states[0][0])) == (0.0, 1.25**2)
    assert float(states[1][0]) == 1.25**2 + 1.5**2
    assert float(weights[1][0]) == 1 - 0.5 * (1.5 / np.sqrt(1.25**2 + 1.5**2))
    before = dict(optimizer._index_update_count), optimizer.num_update
    with pytest.raises(ValueError, match=r"grads\[1\]"):
        optimizer.update([0, 1], weights, [np.ones(1), np.ones(2)], states)
    assert (optimizer._index_update_count, optimizer.num_update) == before == ({0: 1, 1: 2}, 2)


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


def test_rescale_grad_of_minus_zero() -> None:
    signs = []
    for before in (0.0, -0.0):
        optimizer = AdaGrad(rescale_grad=before)
        for now in (before, -0.0):
            optimizer.rescale_grad = now
            weight = np.full(2, -0.0)
            optimizer.update(0, weight, np.array([-1.0, 1.0]), np.zeros(2))
        signs.append(np.signbit(weight).tolist())
    assert signs[0] == signs[1]


# ---------------------------------------------------------------------------------------------- optimizers of one's own


class Momentum(Optimizer):
    """As one would write it for MXNet: knows arrays of full precision, nothing of masters."""

    def __init__(self, learning_rate: float = 0.1, momentum: float = 0.5, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum = momentum

    def create_state(self, index: Any, weight: Any) -> Any:
        return np.zeros(weight.shape, weight.dtype)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            lr, wd = self._get_lr(index), self._get_wd(index)
            if isinstance(grad, RowSparse):
                full = np.zeros(grad.shape, grad.values.dtype)
                np.add.at(full, grad.indices, grad.values)
                grad = full
            state[...] = self.momentum * state - lr * (self.rescale_grad * grad + wd * weight)
            weight[...] += state


def test_an_optimizer_of_ones_own() -> None:
    optimizer = Momentum(param_idx2name={0: "a"}, lr_scheduler=FactorScheduler(step=2, factor=0.5, base_lr=0.1))
    optimizer.set_lr_mult({"a": 2.0})
    weight = np.zeros(2)
    state = optimizer.create_state_multi_precision(0, weight)
    seen = []
    for _ in range(4):
        optimizer.update_multi_precision([0], [weight], [np.ones(2)], [state])
        seen.append(float(state[0]))
    assert seen == pytest.approx([-0.2, -0.3, -0.25, -0.225])
    assert optimizer.num_update == 4
    for method in ("step", "fused_step"):
        with pytest.raises(NotImplementedError, match=f"Optimizer must define {method}"):
            getattr(Optimizer(), method)([0], [weight], [weight], [None])
    optimizer.use_fused_step = True
    with pytest.raises(NotImplementedError, match="Momentum must define fused_step"):
        optimizer.update(0, weight, weight, state)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [False, True], ids=["dense", "row-sparse"])
def test_multi_precision_of_an_optimizer_of_ones_own(dtype: Any, rows: bool) -> None:
    """Its step gets float32 arrays; the low-precision weight is the master copy's rounding, overflow included."""
    optimizer = Momentum(learning_rate=1e-3, momentum=0.0, multi_precision=True)
    weight, full = np.ones((3, 2), dtype), np.ones((3, 2), np.float32)
    state, other = optimizer.create_state_multi_precision(0, weight), optimizer.create_state_multi_precision(1, full)
    assert isinstance(state, tuple)
    assert isinstance(other, np.ndarray)
    for _ in range(10):
        values = np.full((3, 2), 0.25, dtype)
        grad: Any = RowSparse(values, np.array([0, 2, 0]), (3, 2)) if rows else values
        wide: Any = (
            RowSparse(values.astype(np.float32), np.array([0, 2, 0]), (3, 2)) if rows else values.astype(np.float32)
        )
        optimizer.update_multi_precision([0, 1], [weight, full], [grad, wide], [state, other])
    assert_same_bits(state[0], full)
    assert_same_bits(weight, oracle.write(oracle.read(full), (3, 2), weight.dtype))
    assert full[0, 0] < 1
    state[0][...] = 3e38
    optimizer.update_multi_precision(0, weight, np.zeros((3, 2), dtype), state)
    assert (weight == (np.inf if dtype == np.float16 else np.float32(3e38).astype(BFLOAT16))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight, master: weight.setflags(write=False), r"weights\[0\]: read-only: must be writable"),
        (lambda weight, master: master.resize((1, 2), refcheck=False),
         r"master copy in states\[0\]: shape \(1, 2\): must be \(3, 2\)"),
    ],
    ids=["read-only", "another shape"],
)  # fmt: skip
def test_masters_of_an_optimizer_of_ones_own_are_checked_before_its_step(change: Any, message: str) -> None:
    optimizer, weight = Momentum(multi_precision=True), np.ones((3, 2), np.float16)
    master, state = optimizer.create_state_multi_precision(0, weight)
    change(weight, master)
    before = master.copy()
    with pytest.raises(ValueError, match=message):
        optimizer.update_multi_precision(0, weight, np.ones(master.shape, np.float16), (master, state))
    assert_same_bits(master, before)
    assert (weight == 1).all()
    assert optimizer.num_update == 0
    with pytest.raises(ValueError, match=r"states\[0\]: one history: must be a pair \(master copy, state\)"):
        optimizer.update_multi_precision(0, np.ones(2, np.float16), np.ones(2, np.float16), np.zeros(2, np.float32))


def test_subclasses_of_the_schedule_and_adagrad_work_together() -> None:
    class Inverse(LRScheduler):
        def __call__(self, num_update: int) -> float:
            return self.base_lr / num_update

    weight = np.zeros(1)
    optimizer = AdaGrad(None, epsilon=0.0, lr_scheduler=Inverse(1.0))
    for t in (1, 2, 3):
        weight[:] = 0
        optimizer.update(0, weight, np.ones(1), np.zeros(1))
        assert weight[0] == -1.0 / t


def test_repeated_copies_of_an_optimizer_are_independent() -> None:
    optimizer = AdaGrad(0.1)
    other = copy.deepcopy(optimizer)
    other.update(0, np.zeros(2), np.ones(2), np.zeros(2))
    assert (optimizer.num_update, other.num_update) == (0, 1)


class OnDevice(torch.Tensor):
    """A tensor that says it is elsewhere."""

    device = torch.device("cuda:0")  # type: ignore[assignment]


@pytest.mark.parametrize("klass", [AdaGrad, Recording], ids=["step as it is", "step of a subclass"])
def test_mixed_lists_on_a_device(klass: type[AdaGrad], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update of the list is carried out once. Without a subclass to watch, in one launch: all or nothing there."""
    launches = []

    def prepare(launch: Any, grad_scale: Any, found_inf: Any) -> Any:
        ((dense, rows),) = launch._groups.values()
        names = [(u.tensors[0], False) for u in dense] + [(u.tensors[0][0], True) for u in rows]
        return lambda: launches.append([(int(weight[0]), is_sparse) for weight, is_sparse in names])

    as_operand = arrays._tensor
    monkeypatch.setattr(arrays, "_tensor", lambda *given: as_operand(*given)._replace(device="cuda:0", memory=None))
    set_layout(monkeypatch, None)
    monkeypatch.setattr(general_path.DeviceUpdates, "prepare", prepare)
    weights = [torch.full((4,), i, dtype=torch.float32) for i in range(4)]
    grads: list[Any] = [torch.ones(4) for _ in weights]
    for i in (1, 2):
        grads[i] = RowSparse(torch.ones(1), torch.tensor([3]).as_subclass(OnDevice), (4,))
    optimizer = klass()
    optimizer.update(list(range(4)), weights, grads, [torch.zeros(4) for _ in weights])
    updates = [(0, False), (1, True), (2, True), (3, False)]
    assert sorted(update for launch in launches for update in launch) == updates
    assert klass is Recording or len(launches) == 1
    assert optimizer._index_update_count == dict.fromkeys(range(4), 1)


@pytest.mark.parametrize("klass", [MXNetStyle, MXNetStyleLists])
@FUSED
def test_steps_written_for_mxnet_see_the_master_copy(klass: type[AdaGrad], fused: bool) -> None:
    """Under multi_precision a step of one's own gets float32 weights, gradients and histories."""
    results = []
    for each in (klass, AdaGrad):
        optimizer = each(0.1, wd=0.1, multi_precision=True, use_fused_step=fused)
        half, single = weights_of((4, 2), dtype=np.float16)[0], weights_of((4, 2))[0]
        states = [optimizer.create_state_multi_precision(i, w) for i, w in enumerate((half, single))]
        for _ in range(3):
            grads = [np.full((4, 2), 0.3, w.dtype) for w in (half, single)]
            optimizer.update_multi_precision([0, 1], [half, single], grads, states)
        results.append([half, single, *states[0], states[1]])
    for mine, theirs in zip(*results, strict=True):
        assert_same_bits(mine, theirs)


# ------------------------------------------------------------------------------------------- steps of a subclass's own


class OwnStep(AdaGrad):
    """Its step is ours, put in its own words, as subclasses for MXNet do: checks must not depend on that."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        super().step(indices, weights, grads, states)


def low_precision(kind: type[AdaGrad] = OwnStep, start: float = 1.0) -> tuple[AdaGrad, np.ndarray, Any]:
    optimizer, weight = kind(0.5, multi_precision=True), np.full(3, start, np.float16)
    return optimizer, weight, optimizer.create_state_multi_precision(0, weight)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (np.ones(3), TypeError, r"grads\[0\]: dtype float64: must be float16 or float32"),
        (np.ones(3, int), TypeError, r"grads\[0\]: dtype int64"),
        (np.ones(3, complex), TypeError, r"grads\[0\]: dtype complex128"),
        (np.array(["1", "2", "3"]), TypeError, r"grads\[0\]: dtype <U1"),
        (None, TypeError, r"grads\[0\]=None: must be a NumPy array"),
        ([1.0, 1.0, 1.0], TypeError, r"grads\[0\]=\[1.0, 1.0, 1.0\]: must be a NumPy array"),
        (np.ones(4, np.float32), ValueError, r"grads\[0\]: shape \(4,\): must be \(3,\)"),
        (torch.ones(3), TypeError, r"grads\[0\]: a torch tensor: must be a NumPy array"),
        (RowSparse(np.ones(1, np.float32), np.array([0]), (4,)), ValueError, r"grads\[0\]: shape \(4,\): must be"),
    ],
)
def test_gradients_of_low_precision_weights_are_checked_before_a_subclass_sees_them_cast(
    grad: Any, error: type[Exception], message: str
) -> None:
    optimizer, weight, state = low_precision()
    with pytest.raises(error, match=message):
        optimizer.update_multi_precision(0, weight, grad, state)
    assert (weight == 1).all()
    assert (state[0] == 1).all()
    assert optimizer._index_update_count == {}


def test_low_precision_weights_share_no_memory_where_a_subclass_steps() -> None:
    optimizer, weight, state = low_precision()
    with pytest.raises(ValueError, match=r"weights\[0\]: shares memory with grads\[0\]"):
        optimizer.update_multi_precision(0, weight, weight, state)
    other = optimizer.create_state_multi_precision(1, weight)
    grads = [np.ones(3, np.float16), np.ones(3, np.float16)]
    with pytest.raises(ValueError, match=r"weights\[1\]: shares memory with weights\[0\]"):
        optimizer.update_multi_precision([0, 1], [weight, weight], grads, [state, other])
    assert (weight == 1).all()


def test_rounding_to_low_precision_raises_nothing() -> None:
    optimizer, weight, state = low_precision(start=1e-7)
    with np.errstate(all="raise"):
        optimizer.update_multi_precision(0, weight, np.zeros(3, np.float32), state)
        state[0][:] = 1e-9
        optimizer.update_multi_precision(0, weight, np.zeros(3, np.float32), state)
    assert (weight == 0).all()


@pytest.mark.parametrize("where", [0, 1])
def test_the_row_sparse_part_is_checked_whatever_the_other_states_are(where: int) -> None:
    optimizer = OwnStep(0.5)
    dense, table = np.ones(3, np.float32), np.ones((3, 2), np.float32)
    rows = RowSparse(np.ones((1, 2), np.float32), np.array([0]), (3, 2))
    mine = (optimizer.create_state(0, dense), None)  # of the subclass's own kind
    updates = [(dense, np.ones(3, np.float32), mine), (table, rows, None)]
    order = updates if where else updates[::-1]
    with pytest.raises(TypeError, match=rf"history in states\[{where}\]=None: must be a NumPy array"):
        optimizer.update([0, 1], *([update[k] for update in order] for k in range(3)))
    assert (dense == 1).all()
    assert optimizer._index_update_count == {}


def test_counts_stay_where_a_step_of_a_subclass_raises() -> None:
    class Raising(AdaGrad):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            raise RuntimeError("no")

    optimizer, weight, table = Raising(), np.ones(3, np.float32), np.ones((3, 2), np.float32)
    rows = RowSparse(np.ones((1, 2), np.float32), np.array([0]), (3, 2))
    states = [optimizer.create_state(0, weight), optimizer.create_state(1, table)]
    with pytest.raises(RuntimeError, match="no"):
        optimizer.update([0, 1], [weight, table], [np.ones(3, np.float32), rows], states)
    assert (optimizer._index_update_count, optimizer.num_update) == ({}, 0)
    assert optimizer._get_lr(0) == 0.01


# ----------------------------------------------------------------------------------------- attributes, copies and rates


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("initial_accumulator_value", math.nan, ValueError),
        ("initial_accumulator_value", -1.0, ValueError),
        ("initial_accumulator_value", "x", TypeError),
        ("wd", True, TypeError),
        ("wd", -1.0, ValueError),
        ("wd", "x", TypeError),
        ("rescale_grad", np.ones(2), TypeError),
        ("clip_gradient", np.ones(2), TypeError),
        ("epsilon", np.ones(2), TypeError),
    ],
)
@pytest.mark.parametrize("multipliers", [{}, {7: 1.0}, {0: 0.0}])
def test_attributes_that_were_set_are_checked_by_name(
    name: str, value: Any, error: type[Exception], multipliers: Any
) -> None:
    optimizer, weight = AdaGrad(), np.ones(3, np.float32)
    optimizer.update(0, weight, np.ones(3, np.float32), optimizer.create_state(0, weight))
    optimizer.set_wd_mult(multipliers)
    before = weight.copy()
    setattr(optimizer, name, value)
    with pytest.raises(error, match=f"^{name}="):
        optimizer.update(0, weight, np.ones(3, np.float32), optimizer.create_state(0, weight))
    assert_same_bits(weight, before)


def test_copies_leave_param_dict_behind_as_in_mxnet() -> None:
    parameter = SimpleNamespace(lr_mult=0.5, wd_mult=1.0, data=np.ones(1_000_000))
    optimizer = AdaGrad(0.5, param_dict={0: parameter})
    optimizer.set_lr_mult({1: 0.25})
    assert len(pickle.dumps(optimizer)) < 10_000
    for other in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [other._get_lr(0), other._get_lr(1)] == [0.5, 0.125]
        assert other.param_dict == {}
    assert optimizer._get_lr(0) == 0.25


def test_a_class_that_is_registered_again_by_its_name_replaces_with_a_warning(registry: dict[str, type]) -> None:
    def cell() -> type[Optimizer]:  # as a cell of a notebook that is run again
        class Mine(Optimizer):
            pass

        return Mine

    adagrad.register(cell())
    with pytest.warns(UserWarning, match="Mine replaces"):
        adagrad.register(cell())


def test_names_of_indices_are_strings() -> None:
    with pytest.raises(TypeError, match=r"param_idx2name\[0\]=5: must be a string"):
        AdaGrad(param_idx2name={0: 5})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "value"),
    [("wd", -1.0), ("rescale_grad", math.nan), ("lr", "x"), ("lr_mult", {0: "2"}), ("num_update", -5)],
)
def test_what_could_not_be_loaded_is_not_saved(name: str, value: Any) -> None:
    optimizer = AdaGrad()
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=f"optimizer AdaGrad: cannot be saved: {name}"):
        optimizer.config()


class Halved(AdaGrad):
    @property
    def learning_rate(self) -> float:
        return 0.25


class Frozen(AdaGrad):
    """Counts as one update whatever is updated, as for a schedule that is to stand still."""

    def _update_count(self, index: Any) -> None:
        self._index_update_count[index] = 1
        self.num_update = 1


@pytest.mark.parametrize("multipliers", [{}, {7: 1.0}])
def test_what_a_subclass_overrides_is_asked(multipliers: Any) -> None:
    for kind, lr, count in ((Halved, 0.25, 3), (Frozen, 0.5, 1)):
        optimizer, weight = kind(0.5, epsilon=0.0), np.ones(1)
        optimizer.set_lr_mult(multipliers)
        state = optimizer.create_state(0, weight)
        optimizer.update(0, weight, np.ones(1), state)
        assert weight == 1 - lr
        for _ in range(2):
            optimizer.update(0, weight, np.ones(1), state)
        assert optimizer._index_update_count == {0: count}


def test_what_is_set_on_the_class_later_is_asked() -> None:
    class Later(AdaGrad):
        pass

    optimizer, weight = Later(0.5, epsilon=0.0), np.ones(1)
    optimizer.update(0, weight, np.ones(1), np.zeros(1))
    Later._get_lr = lambda self, index: 0.125  # type: ignore[method-assign]
    optimizer.update(0, weight, np.ones(1), np.zeros(1))
    assert weight == 0.375


def test_classes_are_not_kept() -> None:
    def use() -> weakref.ref[type]:
        class Local(AdaGrad):
            pass

        optimizer, weight = Local(), np.ones(1)
        adagrad.get_updater(optimizer)(0, np.ones(1), weight)
        return weakref.ref(Local)

    local = use()
    gc.collect()
    assert local() is None


@pytest.mark.parametrize("fused", [True, False])
def test_a_single_number_in_another_byte_order(fused: bool) -> None:
    for name in ("float32", "bfloat16"):
        dtype = np.dtype(name if name != "bfloat16" else BFLOAT16)
        swapped = np.array(1.5, dtype).astype(dtype.newbyteorder())
        plain = np.array(1.5, dtype)
        for weight in (plain, swapped):
            optimizer = AdaGrad(0.5, use_fused_step=fused)
            optimizer.update(0, weight, np.ones((), np.float32), optimizer.create_state(0, weight))
        assert float(plain) == pytest.approx(1.0, abs=1e-5)
        assert swapped.astype(dtype) == plain


def test_strings_of_numpy_2() -> None:
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("no StringDType in this NumPy")
    weight = np.array(["a"], dtype=np.dtypes.StringDType())
    with pytest.raises(TypeError, match=r"weights\[0\]: dtype StringDType"):
        AdaGrad().update(0, weight, np.ones(1), np.zeros(1))


def test_row_ids_of_a_class_that_refuses_to_be_compared() -> None:
    class Proud(np.ndarray):
        def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("not with me")

    indices = np.array([1, 0, 1]).view(Proud)
    results = []
    for fused in (True, False):
        optimizer, weight = AdaGrad(use_fused_step=fused), np.ones((3, 2), np.float32)
        rows = RowSparse(np.ones((3, 2), np.float32), indices, (3, 2))
        optimizer.update(0, weight, rows, optimizer.create_state(0, weight))
        results.append(weight)
    assert_same_bits(*results)


def test_a_count_that_a_subclass_keeps_in_its_own_way() -> None:
    class Together(AdaGrad):
        """One count for all, as where several weights are one to the schedule."""

        def _update_count(self, index: Any) -> None:
            self.num_update += 1

    optimizer, weight = Together(0.5), np.ones(1)
    for n in (1, 2):
        optimizer.update(0, weight, np.ones(1), np.zeros(1))
        assert (optimizer.num_update, optimizer._index_update_count) == (n, {})


def test_copies_keep_slots() -> None:
    optimizer = Slotted(0.5)
    optimizer.extra = 5
    for other in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.extra, other.learning_rate, other.param_dict) == (5, 0.5, {})


class Slotted(AdaGrad):
    __slots__ = ("extra",)

    extra: int


def test_several_sparse_dimensions_where_a_subclass_steps() -> None:
    weight = torch.ones(3, 2, dtype=torch.bfloat16)
    grad = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 1]]), torch.ones(2, dtype=weight.dtype), (3, 2),
                                   check_invariants=True)  # fmt: skip
    results = []
    for kind in (AdaGrad, OwnStep):
        optimizer, w = kind(0.5, multi_precision=True), weight.clone()
        optimizer.update_multi_precision(0, w, grad, optimizer.create_state_multi_precision(0, w))
        results.append(w)
    assert_same_bits(*results)
    with pytest.raises(ValueError, match=r"grads\[0\]: shape \(3, 2\): must be \(2, 3\)"):
        optimizer.update_multi_precision(0, w.t(), grad, optimizer.create_state_multi_precision(0, w.t()))


def test_a_gradient_that_a_reduction_of_numpy_returns() -> None:
    """The intercept of a linear model: the mean of an array is no array."""
    with pytest.raises(TypeError, match=r"grads\[0\]=.*not numpy\.float32: numpy\.asarray makes an array of it"):
        AdaGrad().update(0, np.zeros((), np.float32), np.ones(3, np.float32).mean(), np.zeros((), np.float32))


@pytest.mark.parametrize(
    ("name", "here"),
    [("eps", "epsilon"), ("lr", "learning_rate"), ("weight_decay", "wd"), ("row_wise", "another class, GroupAdaGrad")],
)
def test_names_of_other_frameworks(name: str, here: str) -> None:
    with pytest.raises(TypeError, match=rf"AdaGrad\(\) got an unexpected keyword argument '{name}': here it is {here}"):
        AdaGrad(**{name: 0.1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"GroupAdaGrad\(\) got an unexpected keyword argument 'nesterov'$"):
        GroupAdaGrad(nesterov=True)  # type: ignore[call-arg]


def test_repr() -> None:
    optimizer = AdaGrad(0.5, wd=0.25)
    optimizer.update(0, np.ones(1), np.ones(1), np.zeros(1))
    assert repr(optimizer) == (
        "AdaGrad(learning_rate=0.5, rescale_grad=1.0, wd=0.25, clip_gradient=None, begin_num_update=0, "
        "multi_precision=False, epsilon=1e-06, initial_accumulator_value=0.0, epsilon_inside=False, "
        "decoupled_decay=False, num_update=1)"
    )
    assert repr(GroupAdaGrad(None, lr_scheduler=FactorScheduler(3))).startswith(
        "GroupAdaGrad(lr_scheduler=FactorScheduler(step=3, factor=1.0,"
    )


@pytest.mark.parametrize("fused", [True, False])
def test_weight_decay_multipliers_alone_act(fused: bool) -> None:
    optimizer, (weight,) = AdaGrad(0.5, wd=0.1, use_fused_step=fused), weights_of((3, 2))
    optimizer.set_wd_mult({0: 0.0})
    before, ones = weight.copy(), np.ones((3, 2), np.float32)
    optimizer.update(0, weight, ones, optimizer.create_state(0, weight))
    assert_same_bits(weight, expected(before, ones, lr=0.5, wd=0.0))


def test_rates_are_resolved_anew_after_a_step_that_raised() -> None:
    class Raises(MXNetStyle):
        def step(self, *lists: Any) -> None:
            if self.lr == 1.0:
                raise RuntimeError("once")
            super().step(*lists)

    optimizer, weights = Raises(1.0), weights_of((4, 2), (4, 2))
    states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
    grads: list[Any] = [np.ones_like(weights[0]), sparse(weights[1], [2])]
    with pytest.raises(RuntimeError, match="once"):
        optimizer.update([0, 1], weights, grads, states)
    optimizer.set_learning_rate(0.5)
    before = copy.deepcopy(weights)
    optimizer.update([0, 1], weights, grads, states)
    assert_same_bits(weights[0], expected(before[0], grads[0], lr=0.5))
    assert_same_bits(weights[1][2], expected(before[1], grads[0], lr=0.5)[2])
    assert optimizer._index_update_count == {0: 1, 1: 1}


def test_the_master_copy_of_a_parameter_has_no_autograd_history() -> None:
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    master, history = AdaGrad(multi_precision=True).create_state_multi_precision(0, weight)
    assert not master.requires_grad
    assert not history.requires_grad


def test_a_config_is_a_copy() -> None:
    optimizer, weight = AdaGrad(wd=0.5, param_idx2name={0: "w"}), np.ones(2, np.float32)
    optimizer.set_lr_mult({0: 0.5})
    optimizer.set_wd_mult({0: 0.5})
    config = optimizer.config()
    before = copy.deepcopy(config)
    optimizer.update(0, weight, weight.copy(), optimizer.create_state(0, weight))
    optimizer.lr_mult[0] = optimizer.wd_mult[0] = 2.0
    optimizer.idx2name[0] = "v"
    assert config == before


def test_copies_leave_unset_slots_unset() -> None:
    made = copy.copy(_Slots())
    assert not hasattr(made, "extra")
    made = copy.deepcopy(_Slots())
    assert not hasattr(made, "extra")


class _Slots(AdaGrad):
    __slots__ = ("extra",)


@pytest.mark.parametrize("fused", [True, False])
def test_row_wise_history_of_a_weight_that_is_not_c_contiguous(fused: bool) -> None:
    optimizer, weight = GroupAdaGrad(use_fused_step=fused), np.ones((3, 4), np.float32).T
    state = optimizer.create_state(0, weight)
    assert state.shape == (4, 1)
    optimizer.update(0, weight, np.ones((4, 3), np.float32), state)
    assert (state == 1).all()


def test_a_step_set_on_the_object_gets_dense_gradients() -> None:
    optimizer, weight, seen = AdaGrad(), np.ones(2, np.float32), list[Any]()
    optimizer.step = lambda indices, *lists: seen.append(indices)  # type: ignore[method-assign]
    optimizer.update(0, weight, np.ones(2, np.float32), optimizer.create_state(0, weight))
    assert seen == [[0]]
    assert (weight == 1).all()


def test_an_overridden_update_gets_master_copies() -> None:
    seen = []

    class Own(AdaGrad):
        def update(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            seen.extend(weight.dtype for weight in weights)
            super().update(indices, weights, grads, states)

    optimizer, weight = Own(multi_precision=True), np.ones(2, np.float16)
    optimizer.update_multi_precision(
        0, weight, np.ones(2, np.float16), optimizer.create_state_multi_precision(0, weight)
    )
    assert seen == [np.float32]


def test_numpys_booleans_are_booleans() -> None:
    assert AdaGrad(multi_precision=np.True_).multi_precision is True
