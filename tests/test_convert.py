"""States of other frameworks: half of the steps there, the other half here, are all steps there; and back."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, convert, get_updater, lr_scheduler
from adagrad.torch import Adagrad
from support import assert_same_bits

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


# -------------------------------------------------------------------------------------------------------------- PyTorch


def train_in_torch(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], grads: list[list[np.ndarray]]
) -> list[np.ndarray]:
    for each in grads:
        for p, grad in zip(params, each, strict=True):
            p.grad = torch.tensor(grad)
        optimizer.step()
    return [p.detach().numpy().copy() for p in params]


def in_torch(**kw: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.tensor(weight)) for weight in problem()[0]]
    return torch.optim.Adagrad(params, **kw), params


@pytest.mark.parametrize(
    ("theirs", "here"),
    [
        ({}, {}),
        ({"lr": 0.3, "eps": 1e-3, "initial_accumulator_value": 0.2}, {"learning_rate": 0.3, "epsilon": 1e-3}),
        ({"lr": 0.1, "weight_decay": 0.05, "maximize": True}, {"learning_rate": 0.1, "wd": 0.05, "rescale_grad": -1}),
        (
            {"lr": 0.3, "lr_decay": 0.1},
            {"learning_rate": None, "begin_num_update": HALF, "lr_scheduler": lambda t: 0.3 / (1 + (t - 1) * 0.1)},
        ),
    ],
    ids=["defaults", "constants", "decay", "lr_decay"],
)
def test_from_torch(theirs: dict[str, Any], here: dict[str, Any]) -> None:
    grads = problem()[1]
    before, params = in_torch(**theirs)
    half = train_in_torch(before, params, grads[:HALF])
    optimizer = AdaGrad(dialect="torch", **here)
    states = convert.from_torch(before.state_dict(), optimizer)
    found = go_on(optimizer, states, half, grads[HALF:])
    assert_close(found, train_in_torch(before, params, grads[HALF:]))


def test_from_torch_knows_groups() -> None:
    weights, grads = problem()
    params = [torch.nn.Parameter(torch.tensor(weight)) for weight in weights]
    before = torch.optim.Adagrad(
        [{"params": params[:1], "lr": 0.3, "weight_decay": 0.1}, {"params": params[1:], "lr": 0.1}]
    )
    half = train_in_torch(before, params, grads[:HALF])
    optimizer = AdaGrad(0.1, wd=0.1, dialect="torch")
    optimizer.set_lr_mult({0: 3.0})
    optimizer.set_wd_mult({1: 0.0})
    found = go_on(optimizer, convert.from_torch(before.state_dict(), optimizer), half, grads[HALF:])
    assert_close(found, train_in_torch(before, params, grads[HALF:]))


def test_states_are_copies() -> None:
    before, params = in_torch()
    train_in_torch(before, params, problem()[1][:1])
    expected = copy.deepcopy(before.state_dict())
    states = convert.from_torch(before.state_dict(), AdaGrad(dialect="torch"))
    assert list(states) == [0, 1]
    for index, history in states.items():
        assert_same_bits(history, before.state_dict()["state"][index]["sum"])
        assert history.flags.writeable
        assert history.flags.c_contiguous
        history[...] = -1
    for index, state in expected["state"].items():
        assert_same_bits(before.state_dict()["state"][index]["sum"], state["sum"])


@pytest.mark.parametrize("wd", [0.0, 0.05])
@pytest.mark.parametrize("sign", [1, -1])
def test_to_torch(wd: float, sign: int) -> None:
    weights, grads = problem()
    optimizer = AdaGrad(0.3, 1e-3, wd=wd, rescale_grad=sign, initial_accumulator_value=0.5)
    updater = get_updater(optimizer)
    expected = [weight.copy() for weight in weights]
    for each in grads[:HALF]:
        updater([1, 0], each[::-1], expected[::-1])  # the order of the states is not that of the indices
    after, params = in_torch()
    for p, weight in zip(params, expected, strict=True):
        p.data = torch.tensor(weight)
    saved = convert.to_torch(updater.states, optimizer)
    assert saved["param_groups"][0].keys() == after.state_dict()["param_groups"][0].keys() - {"decoupled_weight_decay"}
    after.load_state_dict(saved)
    assert {float(after.state[p]["step"]) for p in params} == {HALF}
    for each in grads[HALF:]:
        updater([0, 1], each, expected)
    assert_close(train_in_torch(after, params, grads[HALF:]), expected)
    again = convert.from_torch(saved, optimizer)
    for index, history in again.items():
        assert_same_bits(history, saved["state"][index]["sum"])


def test_to_torch_makes_groups() -> None:
    optimizer = AdaGrad(0.1, wd=0.1, dialect="torch")
    optimizer.set_lr_mult({"bias": 3.0})
    states = {"weight": np.ones((2, 2), np.float32), "bias": f32(1, 2), "other": f32(3)}
    saved = convert.to_torch(states, optimizer, groups=[["bias"], ["weight", "other"]])
    assert [(group["lr"], group["params"]) for group in saved["param_groups"]] == [
        (pytest.approx(0.3), [0]),
        (0.1, [1, 2]),
    ]
    assert [state["sum"].shape for state in saved["state"].values()] == [(2,), (2, 2), (1,)]
    with pytest.raises(ValueError, match=r"groups: lr and wd .*0.1, 0.1.* in one group: must be in separate groups"):
        convert.to_torch(states, optimizer)
    for groups in ([["bias"]], [["bias", "bias"], ["weight", "other"]], [["bias", "weight", "other", "more"]]):
        with pytest.raises(ValueError, match=r"groups=.*: must contain each index of the states once"):
            convert.to_torch(states, optimizer, groups=groups)


def test_to_torch_takes_the_rate_of_the_next_update() -> None:
    scheduler = lr_scheduler.FactorScheduler(step=1, factor=0.5, base_lr=0.8)
    optimizer = AdaGrad(None, dialect="torch", lr_scheduler=scheduler, begin_num_update=2)
    saved = convert.to_torch({0: f32(1)}, optimizer)
    assert saved["param_groups"][0]["lr"] == scheduler(3)
    assert float(saved["state"][0]["step"]) == 2
    convert.from_torch(saved, optimizer)
    given = AdaGrad(None, dialect="torch", lr_scheduler=lambda t: np.float64(0.5))
    lr = convert.to_torch({0: f32(1)}, given)["param_groups"][0]["lr"]
    assert type(lr) is float, "torch.load refuses NumPy's"


def test_parts_of_a_tensor_are_refused() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            raise AssertionError("to be gathered by whoever has the other parts")

    group = {"lr": 0.01, "eps": 1e-10, "params": [0]}
    saved = {"state": {0: {"step": 1, "sum": torch.ones(2).as_subclass(Sharded)}}, "param_groups": [group]}
    with pytest.raises(ValueError, match=r"parameter 0.*: a part of a tensor: gather it first, with full_tensor"):
        convert.from_torch(saved, AdaGrad(0.01, epsilon=1e-10))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dialect": "optax"}, r"epsilon_inside=True: must be False: PyTorch 2.13 divides by sqrt\(history\) \+ eps"),
        ({"dialect": "keras", "wd": 0.1, "epsilon": 0}, "decoupled_decay=True: must be False, since wd=0.1: PyTorch"),
        ({"clip_gradient": 1.0}, "clip_gradient=1.0: torch.optim.Adagrad has no such option"),
        ({"rescale_grad": 0.5}, "rescale_grad=0.5: must be 1 or -1: PyTorch does not rescale"),
    ],
)
def test_to_torch_refuses_what_torch_does_not_have(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        convert.to_torch({0: f32(1)}, AdaGrad(**options))
    if "rescale_grad" not in options:
        group = convert.to_torch({0: f32(1)}, AdaGrad(**options), ours=True)["param_groups"][0]
        assert group["epsilon_inside"] == AdaGrad(**options).epsilon_inside
    with pytest.raises(ValueError, match=r"row_wise=True: torch.optim.Adagrad has no such option"):
        convert.to_torch({0: f32(1)}, GroupAdaGrad())


def test_master_copies_go_to_ours_only() -> None:
    optimizer = AdaGrad(dialect="torch", multi_precision=True)
    states = {0: (f32(1, 2), f32(3, 4))}
    with pytest.raises(ValueError, match=r"states\[0\]: a pair \(master copy, history\): must be one history"):
        convert.to_torch(states, optimizer)
    saved = convert.to_torch(states, optimizer, ours=True)
    assert saved["param_groups"][0]["multi_precision"]
    master, history = convert.from_torch(saved, optimizer)[0]
    assert_same_bits(master, f32(1, 2))
    assert_same_bits(history, f32(3, 4))


@pytest.mark.parametrize("dialect", ["mxnet", "keras", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("row_wise", [False, True])
def test_to_ours_keeps_the_bits(dialect: str, dtype: str, row_wise: bool) -> None:
    """From the updater to adagrad.torch.Adagrad half-way, options and master copies included; and back."""
    weights, grads = problem()
    weights = [weight.astype(dtype) for weight in weights]
    grads = [[grad.astype(dtype) for grad in each] for each in grads]
    kind = GroupAdaGrad if row_wise else AdaGrad
    optimizer = kind(0.3, wd=0.05, clip_gradient=0.8, multi_precision=True, dialect=dialect)
    updater = get_updater(optimizer)
    for each in grads[:HALF]:
        updater([0, 1], each, weights)
    params = [torch.nn.Parameter(torch.tensor(weight)) for weight in weights]
    after = Adagrad(params, row_wise=row_wise)
    after.load_state_dict(convert.to_torch(updater.states, optimizer, ours=True))
    back = convert.from_torch(after.state_dict(), optimizer)
    for each in grads[HALF:]:
        updater([0, 1], each, weights)
    for p, weight in zip(params, train_in_torch(after, params, grads[HALF:]), strict=True):
        assert_same_bits(p, weight)
    for p, weight in zip(params, weights, strict=True):
        assert_same_bits(p, weight)
    assert {type(state) for state in back.values()} == {tuple if dtype == "float16" else np.ndarray}
    assert {group["epsilon_inside"] for group in after.param_groups} == {optimizer.epsilon_inside}


SAVED = {
    "state": {0: {"step": torch.tensor(3.0), "sum": torch.ones(2)}},
    "param_groups": [{"lr": 0.1, "lr_decay": 0, "eps": 1e-10, "weight_decay": 0, "params": [0]}],
}


def saved_with(**changes: Any) -> dict[str, Any]:
    saved = copy.deepcopy(SAVED)
    for name, value in changes.items():
        (saved["state"][0] if name in ("step", "sum") else saved["param_groups"][0])[name] = value
    return saved


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({"lr": 0.2}, {}, "lr=0.2 of parameter 0: must be the optimizer's at its next update, which is 0.1"),
        ({"lr": torch.tensor(0.5)}, {}, "lr=0.5 of parameter 0"),
        ({"eps": 1e-8}, {}, "eps=1e-08 of parameter 0: must be the optimizer's epsilon, which is 1e-10"),
        ({"weight_decay": 0.1}, {}, "weight_decay=0.1 of parameter 0: must be the optimizer's wd, which is 0.0"),
        ({"weight_decay": 0.1}, {"wd": 0.1, "dialect": "keras", "epsilon": 1e-10}, "epsilon_inside=False of parameter"),
        (
            {"maximize": True},
            {},
            "maximize=True of parameter 0: must be the optimizer's rescale_grad < 0, which is Fal",
        ),
        ({"row_wise": True}, {}, "row_wise=True of parameter 0: must be the optimizer's row_wise, which is False"),
        (
            {"clip_value": 1.0},
            {},
            "clip_value=1.0 of parameter 0: must be the optimizer's clip_gradient, which is None",
        ),
        (
            {"lr_decay": 0.5},
            {},
            r"lr_decay=0.5 of parameter 0: its learning rate continues to decay, after 3 steps so far: pass "
            r"learning_rate=None, begin_num_update=3, lr_scheduler=lambda t: 0.1 / \(1 \+ \(t - 1\) \* 0.5\)",
        ),
        (
            {"lr_decay": 0.5},
            {"learning_rate": None, "lr_scheduler": lambda t: 0.1 / (1 + (t - 1) * 0.5)},
            "step=3 of parameter 0: must be the optimizer's count of updates, which is 0.*pass begin_num_update=3",
        ),
        (
            {"lr_decay": 0.5},
            {"learning_rate": None, "lr_scheduler": lambda t: 0.1, "begin_num_update": 3},
            "lr=0.04 of parameter 0: must be the optimizer's at its next update, which is 0.1",
        ),
        (
            {"sum": torch.ones(2).half()},
            {},
            "sum of parameter 0: float16: must be float32 or float64: in float16 it is",
        ),
        ({"sum": torch.ones(2).bfloat16()}, {}, "bfloat16 it is rounded at every step until it stops growing"),
        ({"sum": torch.ones(2, dtype=torch.complex64)}, {}, "complex64: must be an array of float32 or float64"),
        ({"sum": torch.ones(2, dtype=torch.int64)}, {}, "int64: must be an array of float32 or float64"),
    ],
)
def test_from_torch_refuses_another_trajectory(changes: Any, options: Any, match: str) -> None:
    optimizer = AdaGrad(**({"learning_rate": 0.1, "dialect": "torch"} | options))
    with pytest.raises(ValueError, match=match):
        convert.from_torch(saved_with(**changes), optimizer)


def test_master_copies_need_an_optimizer_that_keeps_them() -> None:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    before = Adagrad([p], lr=0.1, multi_precision=True)
    with pytest.raises(
        ValueError, match="master of parameter 0: the optimizer must keep it, too: pass multi_precision=True"
    ):
        convert.from_torch(before.state_dict(), AdaGrad(0.1, dialect="torch"))
    found = convert.from_torch(before.state_dict(), AdaGrad(0.1, dialect="torch", multi_precision=True))
    assert [type(found[0]), len(found[0])] == [tuple, 2]


@pytest.mark.parametrize(
    ("name", "value"), [("step", 10**400), ("step", math.inf), ("sum", torch.ones(2, device="meta"))]
)
def test_states_that_are_no_numbers_are_refused(name: str, value: Any) -> None:
    saved = saved_with()
    saved["state"][0][name] = value
    with pytest.raises(ValueError, match="state_dict: must be what"):
        convert.from_torch(saved, AdaGrad(0.1, dialect="torch"))


def test_a_history_of_elements_is_not_one_of_rows() -> None:
    before = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(4, 3))], lr=0.1)
    with pytest.raises(ValueError, match=r"row_wise=False of parameter 0: must be the optimizer's row_wise"):
        convert.from_torch(before.state_dict(), GroupAdaGrad(0.1, dialect="torch"))


@pytest.mark.parametrize("other", [{}, {"state": {}}, [], None, {"state": {0: {}}, "param_groups": [{"params": [0]}]}])
def test_what_is_no_state_dict_is_refused(other: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dict: must be what torch.optim.Adagrad.state_dict\(\) returns"):
        convert.from_torch(other, AdaGrad(dialect="torch"))
    adam = torch.optim.Adam([p := torch.nn.Parameter(torch.ones(1))])
    p.sum().backward()
    adam.step()
    with pytest.raises(ValueError, match=r"KeyError.'sum'."):
        convert.from_torch(adam.state_dict(), AdaGrad(dialect="torch"))


# ---------------------------------------------------------------------------------------------------------------- optax


class ScaleByRssState(NamedTuple):
    sum_of_squares: Any


class ScaleByScheduleState(NamedTuple):
    count: Any


class EmptyState(NamedTuple):
    pass


class TraceState(NamedTuple):
    trace: Any


class InjectState(NamedTuple):
    inner_state: Any


class InjectHyperparamsState(NamedTuple):
    inner_state: Any
    hyperparams: Any


class MaskedNode(NamedTuple):
    pass


class Pair(NamedTuple):
    b: Any
    a: Any


def train_in_optax(solver: Any, params: Any, state: Any, grads: list[Any]) -> tuple[Any, Any]:
    import optax

    for each in grads:
        updates, state = solver.update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("scheduled", [False, True])
def test_optax_there_and_back(scheduled: bool) -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    weights, grads = problem()
    trees = [{"b": [jax.numpy.asarray(each[1])], "a": jax.numpy.asarray(each[0])} for each in (weights, *grads)]
    schedule = optax.cosine_decay_schedule(0.3, STEPS)
    solver = optax.chain(optax.clip(0.7), optax.adagrad(schedule if scheduled else 0.3))
    half, state = train_in_optax(solver, trees[0], solver.init(trees[0]), trees[1 : HALF + 1])
    expected, last = train_in_optax(solver, half, state, trees[HALF + 1 :])

    options = {"learning_rate": 0.3}
    if scheduled:
        options = {
            "learning_rate": None,
            "lr_scheduler": lambda t: float(schedule(t - 1)),
            "begin_num_update": HALF,
        }
    optimizer = AdaGrad(clip_gradient=0.7, dialect="optax", **options)
    updater = get_updater(optimizer)
    updater.states = convert.from_optax(state, optimizer)
    here = [np.array(leaf) for leaf in jax.tree.leaves(half)]
    for each in trees[HALF + 1 :]:
        updater([0, 1], [np.asarray(leaf) for leaf in jax.tree.leaves(each)], here)
    assert_close(here, jax.tree.leaves(expected))

    back = convert.to_optax(updater.states, optimizer, solver.init(trees[0]))
    assert jax.tree.structure(back) == jax.tree.structure(last)
    for leaf, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(last), strict=True):
        assert leaf.dtype == theirs.dtype
        np.testing.assert_allclose(leaf, theirs, rtol=1e-6)
    train_in_optax(solver, expected, back, trees[1:2])


def test_leaves_have_the_order_of_jax() -> None:
    jax = pytest.importorskip("jax")
    tree = {
        "z": [f32(0), None, (f32(1), f32(2))],
        "a": OrderedDict(z=f32(3), a=f32(4)),
        "m": Pair(b=f32(5), a={2: f32(6), 1: f32(7)}),
    }
    state = (EmptyState(), [ScaleByRssState(tree)])
    optimizer = AdaGrad(dialect="optax")
    states = convert.from_optax(state, optimizer)
    for leaf, theirs in zip(states.values(), jax.tree.leaves(tree), strict=True):
        assert_same_bits(leaf, theirs)
    back = convert.to_optax({index: 2 * leaf for index, leaf in states.items()}, optimizer, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for leaf, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert_same_bits(leaf, 2 * theirs)


@pytest.mark.parametrize(
    ("state", "options", "match"),
    [
        (
            ScaleByRssState(f32(1)),
            {"dialect": "mxnet"},
            "epsilon_inside=False: must be True: optax 0.2.8 divides by sqr",
        ),
        ((), {}, "opt_state: contains 0 ScaleByRssState: must be one"),
        ([ScaleByRssState(f32(1))] * 2, {}, "opt_state: contains 2 ScaleByRssState"),
        (
            (ScaleByRssState(f32(1)), TraceState(f32(1))),
            {},
            "opt_state: TraceState: not a part of the state of optax.ad",
        ),
        (InjectState((ScaleByRssState(f32(1)),)), {}, "InjectState: not a part .*: convert its inner_state$"),
        (
            InjectHyperparamsState((ScaleByRssState(f32(1)),), {}),
            {},
            "InjectHyper.*: convert its inner_state, and pass the schedules of its hyperparams to the optimizer",
        ),
        (
            ScaleByRssState({"a": MaskedNode(), "b": f32(1)}),
            {},
            "MaskedNode: a parameter that this part does not update: replace it by None, and number the weights witho",
        ),
        ({"a": f32(1)}, {}, "opt_state: dict: not a part"),
        (None, {}, "opt_state: NoneType: not a part"),
        (
            (ScaleByRssState(f32(1)), ScaleByScheduleState(7)),
            {},
            r"count=7: optax continues its schedule from there, and so must the optimizer: pass learning_rate=None, "
            r"begin_num_update=7, lr_scheduler=lambda t: float\(schedule\(t - 1\)\), since optax counts from 0",
        ),
        (
            (ScaleByRssState(f32(1)), ScaleByScheduleState(7)),
            {"learning_rate": None, "lr_scheduler": lambda t: 0.1, "begin_num_update": 6},
            "count=7: optax continues its schedule",
        ),
        (ScaleByRssState(["x"]), {}, "history 0: <U1: must be an array of float32 or float64"),
        (ScaleByRssState(np.float16([1])), {}, "history 0: float16: must be float32"),
    ],
)
def test_from_optax_refuses(state: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        convert.from_optax(state, AdaGrad(**({"dialect": "optax"} | options)))


def test_dicts_of_other_kinds_come_back() -> None:
    tree = defaultdict(list, {"b": f32(1), "a": f32(2)})
    optimizer = AdaGrad(dialect="optax")
    back = convert.to_optax({0: f32(4), 1: f32(3)}, optimizer, (ScaleByRssState(tree), EmptyState()))
    assert back[0].sum_of_squares == {"a": 4, "b": 3}
    assert type(back[0].sum_of_squares) is defaultdict
    assert back[0].sum_of_squares.default_factory is list


def test_to_optax_refuses() -> None:
    state = (ScaleByRssState([f32(1, 1), f32(2)]), EmptyState())
    optimizer = AdaGrad(dialect="optax")
    with pytest.raises(
        ValueError, match=r"states: shapes \[\(1,\), \(2,\)\]: must be \[\(2,\), \(1,\)\], as in opt_state"
    ):
        convert.to_optax({0: f32(1), 1: f32(1, 2)}, optimizer, state)
    with pytest.raises(ValueError, match="epsilon_inside=False: must be True"):
        convert.to_optax({0: f32(1, 1), 1: f32(1)}, AdaGrad(), state)
    # Without epsilon both places are the same.
    assert convert.to_optax({0: f32(1, 1), 1: f32(1)}, AdaGrad(epsilon=0), state)


# ---------------------------------------------------------------------------------------------------------------- Keras


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the import says of its own dependencies
        return pytest.importorskip("keras", reason="keras is not installed: pip install '.[test]'")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, on torch
@pytest.mark.parametrize("scheduled", [False, True])
def test_keras_there_and_back(keras: Any, scheduled: bool) -> None:
    weights, grads = problem()

    def train(optimizer: Any, variables: list[Any], grads: Any) -> list[np.ndarray]:
        for each in grads:
            optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in each], variables)
        return [keras.ops.convert_to_numpy(variable).copy() for variable in variables]

    def made() -> tuple[Any, list[Any]]:
        lr = keras.optimizers.schedules.PolynomialDecay(0.3, STEPS, 0.1) if scheduled else 0.3
        return keras.optimizers.Adagrad(lr, weight_decay=0.05), [keras.Variable(weight) for weight in weights]

    theirs, variables = made()
    half = train(theirs, variables, grads[:HALF])
    options = {"learning_rate": 0.3}
    if scheduled:
        schedule = lr_scheduler.PolyScheduler(STEPS, base_lr=0.3, pwr=1, final_lr=0.1)
        options = {
            "learning_rate": None,
            "lr_scheduler": lambda t: schedule(t - 1),
            "begin_num_update": HALF,
        }
    optimizer = AdaGrad(wd=0.05, dialect="keras", **options)
    states = convert.from_keras(theirs.variables, optimizer)
    plain = [keras.ops.convert_to_numpy(each) for each in theirs.variables if each.name.endswith("accumulator")]
    for history, accumulator in zip(convert.from_keras(plain, optimizer).values(), plain, strict=True):
        assert_same_bits(history, accumulator)
    found = go_on(optimizer, states, half, grads[HALF:])
    expected = train(theirs, variables, grads[HALF:])
    assert_close(found, expected)

    # And back, where both go on as one.
    again, same = made()
    again.build(same)
    for variable, value in [
        *zip(same, found, strict=True),
        *convert.to_keras(states, optimizer, again.variables),
    ]:
        variable.assign(value)
    assert int(again.iterations) == optimizer.num_update
    accumulators = [each for each in again.variables if each.name.endswith("accumulator")]
    for variable, value in zip(accumulators, states.values(), strict=True):
        assert_same_bits(keras.ops.convert_to_numpy(variable), value)
    (more,) = problem()[1][:1]
    assert_close(train(again, same, [more]), go_on(optimizer, states, found, [more]))


def variable(name: str, *numbers: float) -> SimpleNamespace:
    array = np.float32(numbers[0]) if name in ("iteration", "learning_rate") else f32(*numbers)
    return SimpleNamespace(name=name, value=array, dtype="float32")


@pytest.mark.parametrize(
    ("variables", "options", "match"),
    [
        ([f32(1)], {"dialect": "torch"}, "epsilon_inside=False: must be True: Keras 3.15 divides by"),
        (
            [f32(1)],
            {"dialect": "optax", "wd": 0.1},
            "decoupled_decay=False: must be True, since wd=0.1: Keras 3.15 has w",
        ),
        ([variable("iteration", 3)], {}, "variables: none of 1 is an accumulator: must be those of keras.optimizers"),
        (
            [variable("w_accumulator", 1), variable("w_linear", 1)],
            {},
            "variables: 'w_linear': must be those of keras.optimizers.Adagrad; for a wrapper, those of its inner_optim",
        ),
        ([variable("dynamic_scale", 1), variable("w_accumulator", 1)], {}, "variables: 'dynamic_scale': must be those"),
        (
            [variable("w_accumulator", 1), variable("w_gradient_accumulator", 2)],
            {},
            "w_gradient_accumulator: gradients that are not applied yet: convert right after an update",
        ),
        (
            [variable("iteration", 3), variable("learning_rate", 0.5), variable("w_accumulator", 1)],
            {},
            "lr=0.5 of variable 0: must be the optimizer's at its next update, which is 0.1",
        ),
        (
            [variable("iteration", 3), variable("w_accumulator", 1)],
            {},
            "iteration=3: Keras continues its schedule from there.* since Keras counts from 0",
        ),
    ],
)
def test_from_keras_refuses(variables: list[Any], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        convert.from_keras(variables, AdaGrad(**({"learning_rate": 0.1, "dialect": "keras"} | options)))


def test_an_empty_gradient_accumulator_is_no_matter() -> None:
    variables = [variable("w_accumulator", 1), variable("w_gradient_accumulator", 0), variable("w_average", 3)]
    assert list(convert.from_keras(variables, AdaGrad(dialect="keras"))) == [0]


def test_a_variable_that_is_called_gradient() -> None:
    names = ("my_gradient_accumulator", "w_accumulator", "w_gradient_accumulator")
    variables = [variable(name, i) for i, name in zip((1, 2, 0), names, strict=True)]
    states = convert.from_keras(variables, AdaGrad(dialect="keras"))
    assert {index: float(each[0]) for index, each in states.items()} == {0: 1.0, 1: 2.0}


def test_to_keras_refuses() -> None:
    optimizer, states = AdaGrad(dialect="keras"), {0: f32(1)}
    with pytest.raises(ValueError, match="row_wise=True: must be False: Keras has no row-wise history"):
        convert.to_keras(states, GroupAdaGrad(dialect="keras"), [])
    w = SimpleNamespace(name="w_accumulator", shape=(1,))
    longer = SimpleNamespace(name="w_accumulator", shape=(2,))
    same = SimpleNamespace(name="w_accumulator", shape=(1,))  # Keras lets layers have one name
    assert convert.to_keras({0: f32(1), 1: f32(2)}, optimizer, [w, same]) == [(w, f32(1)), (same, f32(2))]
    assert convert.to_keras(states, optimizer, [w]) == [(w, states[0])]
    pending = SimpleNamespace(name="w_gradient_accumulator", shape=(1,))
    with pytest.raises(ValueError, match="variables: of an optimizer with gradient_accumulation_steps: must be of one"):
        convert.to_keras(states, optimizer, [pending, w])
    with pytest.raises(
        ValueError, match=r"lr=0\.5 of variable 0: must be the optimizer's at its next update, which is 0"
    ):
        convert.to_keras(states, optimizer, [variable("learning_rate", 0.5), w])
    counted, iteration = AdaGrad(dialect="keras"), SimpleNamespace(name="iteration")
    counted._index_update_count = {0: 7, 1: 3}
    assert convert.to_keras({0: f32(1), 1: f32(2)}, counted, [iteration, w, same])[-1] == (iteration, 7)
    for wrong in ([], [longer], [w, SimpleNamespace(name="v_accumulator", shape=(1,))]):
        with pytest.raises(ValueError, match=r"variables: accumulators of shapes .*: must be \[\(1,\)\], the states'"):
            convert.to_keras(states, optimizer, wrong)


def test_the_optimizer_of_keras_is_not_its_variables() -> None:
    with pytest.raises(TypeError, match=r"variables=namespace.*: must be optimizer\.variables"):
        convert.from_keras(SimpleNamespace(), AdaGrad(dialect="keras"))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- FBGEMM


def test_fbgemm_there_and_back() -> None:
    ops = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training", reason="no fbgemm-gpu-cpu")
    shapes = [(6, 4), (3, 8)]
    weights, grads = problem(shapes)

    for row_wise in (False, True):
        kind = ops.OptimType.EXACT_ROWWISE_ADAGRAD if row_wise else ops.OptimType.EXACT_ADAGRAD
        tables = ops.SplitTableBatchedEmbeddingBagsCodegen(
            [(*shape, ops.EmbeddingLocation.HOST, ops.ComputeDevice.CPU) for shape in shapes],
            optimizer=kind,
            learning_rate=0.3,
        )
        for table, weight in zip(tables.split_embedding_weights(), weights, strict=True):
            table.copy_(torch.tensor(weight))
        indices = torch.tensor([*range(6), *range(3)])
        offsets = torch.tensor([*range(6), 6, 7, 8, 9, 9, 9, 9])

        def train(grads: Any, tables: Any = tables, indices: Any = indices, offsets: Any = offsets) -> list[np.ndarray]:
            for first, second in grads:
                padded = np.zeros((6, 8), np.float32)  # as many bags as the first table
                padded[:3] = second
                tables(indices, offsets).backward(torch.tensor(np.hstack([first, padded])))
            return [table.numpy().copy() for table in tables.split_embedding_weights()]

        half = train(grads[:HALF])
        optimizer = (GroupAdaGrad if row_wise else AdaGrad)(0.3, dialect="fbgemm")
        states = convert.from_fbgemm(tables.split_optimizer_states(), optimizer)
        for form in (tables.get_optimizer_state(), [part[0] for part in tables.split_optimizer_states()]):
            for index, history in convert.from_fbgemm(form, optimizer).items():
                assert_same_bits(history, states[index])
        for (there,), back in zip(tables.split_optimizer_states(), convert.to_fbgemm(states, optimizer), strict=True):
            assert_same_bits(there, back)
        found = go_on(optimizer, states, half, grads[HALF:])
        assert_close(found, train(grads[HALF:]))


def test_fbgemm_tells_rows_from_elements() -> None:
    rows, elements = GroupAdaGrad(dialect="fbgemm"), AdaGrad(dialect="fbgemm")
    assert convert.from_fbgemm([f32(1, 2, 3)], rows)[0].shape == (3, 1)
    assert convert.to_fbgemm({0: np.ones((3, 1), np.float32)}, rows)[0].shape == (3,)
    assert convert.to_fbgemm({0: np.ones((3, 2), np.float32)}, elements)[0].shape == (3, 2)
    with pytest.raises(
        ValueError, match=r"momentum1 of table 0: shape \(3,\): one value for each row: must continue with G"
    ):
        convert.from_fbgemm([f32(1, 2, 3)], elements)
    with pytest.raises(ValueError, match=r"shape \(3, 2\): one value for each element: must continue with AdaGrad"):
        convert.from_fbgemm([np.ones((3, 2), np.float32)], rows)
    with pytest.raises(ValueError, match="momentum1 of table 0: one of 2 arrays: must be alone"):
        convert.from_fbgemm([[f32(1), f32(2)]], elements)
    with pytest.raises(ValueError, match="epsilon_inside=True: must be False: FBGEMM"):
        convert.from_fbgemm([f32(1)], GroupAdaGrad(dialect="mxnet1"))
    with pytest.raises(ValueError, match=r"states: shape \(3,\): must have two dimensions: FBGEMM has only tables"):
        convert.to_fbgemm({0: f32(1, 2, 3)}, elements)


# --------------------------------------------------------------------------------------------------------- plain arrays


@pytest.mark.parametrize("dialect", ["mlx", "tensorflow", "tf"])
def test_arrays_there_and_back(dialect: str) -> None:
    optimizer = AdaGrad(0.1, dialect=dialect)
    given = [f32(1, 2), np.ones((2, 3)).T]
    states = convert.from_arrays(given, optimizer, dialect)
    assert list(states) == [0, 1]
    for found, array in zip(convert.to_arrays(states, optimizer, dialect), given, strict=True):
        assert_same_bits(found, array)
        assert not np.shares_memory(found, array)
        assert found.flags.c_contiguous
    named = convert.from_arrays({"b": f32(1), "a": f32(2)}, optimizer, dialect)
    assert list(named) == ["b", "a"]
    assert [each[0] for each in convert.to_arrays(named, optimizer, dialect)] == [1, 2]


def test_states_go_back_by_their_indices() -> None:
    optimizer = AdaGrad()
    for kind in (int, np.int64, np.uint8):
        states = {kind(index): f32(index) for index in (2, 0, 1)}
        assert [each[0] for each in convert.to_arrays(states, optimizer, "mxnet")] == [0, 1, 2]
    with pytest.raises(TypeError, match=r"states=.*: must be a dict of index to state"):
        convert.to_arrays([f32(1)], optimizer, "mxnet")  # type: ignore[arg-type]


def test_arrays_are_checked() -> None:
    swapped = convert.from_arrays([f32(1, 2).astype(">f4")], AdaGrad(), "mxnet")[0]
    assert swapped.dtype == np.dtype(np.float32)
    assert swapped.dtype.isnative
    for bad, match in {
        "float16": "history 0: float16: must be float32 or float64",
        "int32": "history 0: int32: must be an array",
        "bool": "history 0: bool: must be an array",
    }.items():
        with pytest.raises(ValueError, match=match):
            convert.from_arrays([np.ones(2, bad)], AdaGrad(), "mxnet")
    with pytest.raises(
        ValueError, match=re.escape("history 1: shape (3, 2): must be (n, 1, ...), one value for each row")
    ):
        convert.from_arrays([np.ones((3, 1, 1)), np.ones((3, 2))], GroupAdaGrad(), "mxnet")
    with pytest.raises(ValueError, match=re.escape("history 0: shape (): must be (n, 1, ...)")):
        convert.from_arrays([np.array(1.0)], GroupAdaGrad(), "mxnet")
    for single in (np.ones((2, 3)), 3):
        with pytest.raises(TypeError, match=r"histories=.*: must be a list of arrays, or a dict of index to array"):
            convert.from_arrays(single, AdaGrad(), "mxnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dialect='x': must be one of"):
        convert.from_arrays([], AdaGrad(), "x")
    with pytest.raises(ValueError, match="history 0: masked: must be an array"):
        convert.from_arrays([np.ma.masked_less(f32(1, 2), 2)], AdaGrad(), "mxnet")
    for pair in ((f32(1), f32(1)), [f32(1), f32(1)]):
        with pytest.raises(ValueError, match=r"states\[0\]: a pair \(master copy, history\): must be one history"):
            convert.to_arrays({0: pair}, AdaGrad(), "mxnet")


def test_no_framework_is_imported() -> None:
    code = "import sys, adagrad.convert; assert not {'torch', 'jax', 'optax', 'keras', 'numba'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


CALLS: list[Callable[[Any], Any]] = [
    lambda o: convert.from_arrays([], o, "mxnet"),
    lambda o: convert.to_arrays({}, o, "mxnet"),
    lambda o: convert.from_torch({}, o),
    lambda o: convert.to_torch({}, o),
    lambda o: convert.to_torch({}, o, ours=True),
    lambda o: convert.from_optax((), o),
    lambda o: convert.to_optax({}, o, ()),
    lambda o: convert.from_keras([], o),
    lambda o: convert.to_keras({}, o, []),
    lambda o: convert.from_fbgemm([], o),
    lambda o: convert.to_fbgemm({}, o),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("other", [None, "adagrad", AdaGrad, object()])
def test_the_optimizer_must_be_one(call: Callable[[Any], Any], other: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer=.*: must be an adagrad.AdaGrad or GroupAdaGrad"):
        call(other)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex32"])
def test_histories_of_other_low_precisions_are_refused(dtype: str) -> None:
    low = torch.ones(2).to(getattr(torch, dtype))
    with pytest.raises(ValueError, match=rf"history 0: {dtype}: must be float32 or float64"):
        convert.from_arrays([low], AdaGrad(dialect="mlx"), "mlx")


def test_a_variable_whose_value_is_a_function() -> None:
    """As TensorFlow's, which has ``numpy()``, too."""

    class Variable:
        def value(self) -> object:
            return object()

        def numpy(self) -> np.ndarray:
            return np.ones(2, np.float32)

    assert convert.from_arrays([Variable()], AdaGrad(dialect="tf"), "tf")[0].tolist() == [1, 1]


def test_a_history_that_requires_grad() -> None:
    history = torch.ones(2, requires_grad=True)
    assert convert.from_arrays([history], AdaGrad(dialect="mlx"), "mlx")[0].tolist() == [1, 1]


def test_weight_decay_must_be_where_keras_has_it() -> None:
    optimizer = AdaGrad(0.1, wd=0.1, dialect="keras", decoupled_decay=False)
    with pytest.raises(ValueError, match="decoupled_decay=False: must be True"):
        convert.from_arrays([np.ones(2, np.float32)], optimizer, "keras")


def test_without_weight_decay_its_place_is_no_matter() -> None:
    optimizer = AdaGrad(0.1, dialect="torch", decoupled_decay=True)
    assert len(convert.from_arrays([np.ones(2, np.float32)], optimizer, "torch")) == 1


@pytest.mark.parametrize(("off", "is_same"), [(0.0, True), (6e-8, True), (5e-7, False)])
def test_learning_rates_may_differ_by_the_rounding_to_float32_alone(off: float, is_same: bool) -> None:
    saved = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))], lr=0.1 * (1 + off)).state_dict()
    optimizer = AdaGrad(0.1, dialect="torch")
    if is_same:
        convert.from_torch(saved, optimizer)
    else:
        with pytest.raises(ValueError, match="must be the optimizer's at its next update"):
            convert.from_torch(saved, optimizer)


def test_every_count_must_be_the_schedules() -> None:
    class ScaleByRssState(NamedTuple):
        sum_of_squares: Any

    class ScaleByScheduleState(NamedTuple):
        count: Any

    optimizer = AdaGrad(None, dialect="optax", lr_scheduler=lambda t: 0.1)
    optimizer._update_count(0)
    state = (ScaleByRssState([np.ones(1, np.float32), np.ones(1, np.float32)]), ScaleByScheduleState(1))
    with pytest.raises(ValueError, match="count=1: optax continues its schedule"):
        convert.from_optax(state, optimizer)
    optimizer._update_count(1)
    assert len(convert.from_optax(state, optimizer)) == 2


def test_the_next_rate_of_a_weight_that_lags_behind() -> None:
    schedule = lr_scheduler.FactorScheduler(step=1, factor=0.5, base_lr=0.8)
    optimizer = AdaGrad(None, dialect="torch", lr_scheduler=schedule)
    weight = np.ones(1, np.float32)
    states = {index: np.zeros(1, np.float32) for index in range(3)}
    for times, index in ((3, 0), (2, 1), (1, 2)):
        for _ in range(times):
            optimizer.update(index, weight, np.ones(1, np.float32), states[index])
    saved = convert.to_torch(states, optimizer, groups=[[0], [1], [2]])
    assert [group["lr"] for group in saved["param_groups"]] == [schedule(4), schedule(3), schedule(3)]


@pytest.mark.parametrize("there", [False, True])
def test_without_weight_decay_its_place_in_a_group_is_no_matter(there: bool) -> None:
    saved = Adagrad([torch.nn.Parameter(torch.ones(1))], lr=0.1, decoupled_decay=there).state_dict()
    assert len(convert.from_torch(saved, AdaGrad(0.1, dialect="torch", decoupled_decay=not there))) == 1


def test_groups_without_decay_and_parameters_without_state() -> None:
    before = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(n)) for n in (1, 2)], lr=0.1)
    saved = before.state_dict()
    del saved["state"][0], saved["param_groups"][0]["lr_decay"], saved["param_groups"][0]["weight_decay"]
    states = convert.from_torch(saved, AdaGrad(0.1, dialect="torch"))
    assert {index: h.shape for index, h in states.items()} == {1: (2,)}


def test_groups_that_name_one_index_twice_instead_of_another() -> None:
    states = {"weight": np.ones(2, np.float32), "bias": np.ones(1, np.float32)}
    with pytest.raises(ValueError, match=r"groups=.*: must contain each index of the states once"):
        convert.to_torch(states, AdaGrad(dialect="torch"), groups=[["bias"], ["bias"]])


def test_a_list_is_no_pair() -> None:
    with pytest.raises(ValueError, match=r"states\[0\]: a pair"):
        convert.to_torch({0: [np.ones(1, np.float32)] * 2}, AdaGrad(dialect="torch"), ours=True)


def test_options_of_groups() -> None:
    optimizer = AdaGrad(0.2, wd=0.1, dialect="torch", initial_accumulator_value=0.3)
    optimizer.set_wd_mult({"bias": 0.0})
    states = {"weight": np.ones(2, np.float32), "bias": np.ones(1, np.float32)}
    groups = convert.to_torch(states, optimizer, groups=[["bias"], ["weight"], []])["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]
    assert [group["lr"] for group in groups] == [0.2] * 3
    assert [group["initial_accumulator_value"] for group in groups] == [0.3] * 3


def test_no_groups_are_not_one_of_all() -> None:
    with pytest.raises(ValueError, match=r"groups=\[\]: must contain each index"):
        convert.to_torch({0: np.ones(1, np.float32)}, AdaGrad(dialect="torch"), groups=[])


def test_groups_of_torch_have_weight_decay_in_the_gradient() -> None:
    saved = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match="decoupled_decay=False of parameter 0: must be the optimizer's"):
        convert.from_torch(saved, AdaGrad(0.1, wd=0.1, dialect="torch", decoupled_decay=True))


def test_counts_of_schedules_of_optax() -> None:
    class ScaleByRssState(NamedTuple):
        sum_of_squares: Any

    class ScaleByScheduleState(NamedTuple):
        count: Any

    weights = [np.ones(1, np.float32) for _ in range(2)]
    optimizer = AdaGrad(None, dialect="optax", lr_scheduler=lambda t: 0.1, begin_num_update=1)
    for counts in ((1, 2), (2, 1)):
        state = (ScaleByRssState(weights), *map(ScaleByScheduleState, counts))
        with pytest.raises(ValueError, match="count=2: optax continues its schedule"):
            convert.from_optax(state, optimizer)
    optimizer._update_count(1)
    back = convert.to_optax(dict(enumerate(weights)), optimizer, state)
    assert [int(part.count) for part in back[1:]] == [2, 2]


def test_an_average_without_an_accumulator_is_of_another_optimizer() -> None:
    with pytest.raises(ValueError, match=r"variables: 'b_average': must be those of keras.optimizers.Adagrad"):
        convert.from_keras([variable("a_accumulator", [1]), variable("b_average", [1])], AdaGrad(dialect="keras"))


def test_no_variables_are_no_states() -> None:
    assert convert.from_keras([], AdaGrad(dialect="keras")) == {}


def test_a_scheduler_must_continue_from_the_iteration_of_keras() -> None:
    variables = [variable("iteration", 3), variable("learning_rate", 0.1), variable("a_accumulator", [1])]
    for begin in (0, 3):
        optimizer = AdaGrad(None, dialect="keras", lr_scheduler=lambda t: 0.1, begin_num_update=begin)
        if begin == 3:
            assert len(convert.from_keras(variables, optimizer)) == 1
        else:
            with pytest.raises(ValueError, match="step=3 of variable 0: must be the optimizer's count"):
                convert.from_keras(variables, optimizer)


def test_a_schedule_of_keras_that_has_not_begun() -> None:
    with pytest.raises(ValueError, match="iteration=0: Keras continues its schedule"):
        convert.from_keras([variable("iteration", 0), variable("a_accumulator", [1])], AdaGrad(dialect="keras"))


def test_accumulators_that_are_tensors_without_a_name() -> None:
    assert convert.from_keras([torch.ones(2)], AdaGrad(dialect="keras"))[0].tolist() == [1, 1]


@pytest.mark.parametrize("nothing", [{}, []])
def test_a_table_without_a_state(nothing: Any) -> None:
    with pytest.raises(ValueError, match="momentum1 of table 0: one of 0 arrays: must be alone"):
        convert.from_fbgemm([nothing], AdaGrad(dialect="fbgemm"))


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
def test_only_tables_go_to_fbgemm(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must have two dimensions: FBGEMM has only tables"):
        convert.to_fbgemm({0: np.ones(shape, np.float32)}, AdaGrad(dialect="fbgemm"))


def test_masked_weight_decay_in_a_chain_of_optax() -> None:
    """The state of a masked transformation without state holds nothing, either."""
    optax = pytest.importorskip("optax")
    params = {"w": f32(1, 2, 3, 4), "b": f32(1, 2)}
    decay = optax.add_decayed_weights(0.1, mask={"w": True, "b": False})
    state = optax.chain(decay, optax.adagrad(0.1)).init(params)
    optimizer = AdaGrad(0.1, wd=0.1, dialect="optax")
    states = convert.from_optax(state, optimizer)
    assert [each.shape for each in states.values()] == [(2,), (4,)]
    back = convert.to_optax({index: 3 * each for index, each in states.items()}, optimizer, state)
    assert type(back[0]) is type(state[0])
    assert [float(each[0]) for each in back[1][0].sum_of_squares.values()] == pytest.approx([0.3, 0.3])
    masked = optax.masked(optax.adagrad(0.1), {"w": True, "b": False}).init(params)
    with pytest.raises(ValueError, match=r"MaskedState: not a part of the state of optax\.adagrad: convert its inner"):
        convert.from_optax(masked, optimizer)


def test_a_part_of_the_parameters_in_optax() -> None:
    """AdaGrad for the tables, another rule for the rest: as docs/migrating.md says."""
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    params = {"b": np.ones(3, np.float32), "table": np.ones((2, 2), np.float32), "w": np.ones(4, np.float32)}
    labels = {"b": "adam", "table": "adagrad", "w": "adagrad"}
    solver = optax.multi_transform({"adagrad": optax.adagrad(0.1), "adam": optax.adam(0.1)}, labels)
    state = solver.init(params)
    optimizer = AdaGrad(0.1, dialect="optax")
    with pytest.raises(ValueError, match=r"PartitionState.*: convert inner_states\[label\]\.inner_state"):
        convert.from_optax(state, optimizer)
    inner = state.inner_states["adagrad"].inner_state
    with pytest.raises(ValueError, match="MaskedNode: a parameter that this part does not update: replace it by None"):
        convert.from_optax(inner, optimizer)

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    part = jax.tree.map(lambda x: None if is_masked(x) else x, inner, is_leaf=is_masked)
    states = convert.from_optax(part, optimizer)
    assert [history.shape for history in states.values()] == [(2, 2), (4,)]
    back = convert.to_optax({index: 2 * history for index, history in states.items()}, optimizer, inner)
    assert jax.tree.structure(back) == jax.tree.structure(inner)
    for leaf, before in zip(jax.tree.leaves(back), jax.tree.leaves(inner), strict=True):
        assert_same_bits(leaf, 2 * np.asarray(before))


def test_the_module_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, adagrad; assert 'adagrad.convert' not in sys.modules; adagrad.convert.from_torch; adagrad.none"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("AttributeError: module 'adagrad' has no attribute 'none'\n")
