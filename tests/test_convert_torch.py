"""States of PyTorch: half of the steps there, the other half here, are all steps there; and back."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, convert, get_updater, lr_scheduler
from adagrad.torch import Adagrad
from support import assert_same_bits
from trajectories import HALF, assert_close, f32, go_on, problem


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


# --------------------------------------------------------------------------------------------------------- from PyTorch


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


def row_wise_steps(p: torch.nn.Parameter, state: dict[str, torch.Tensor], group: dict[str, Any], grads: Any) -> None:
    """The rule of torchrec's RowWiseAdagrad."""
    for grad in grads:
        state["step"] += 1
        state["sum"] += grad.square().mean(1, keepdim=True)
        lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
        p.data.addcdiv_(grad, state["sum"].sqrt() + group["eps"], value=-float(lr))


@pytest.mark.parametrize("lr_decay", [0.0, 0.1])
def test_from_torchrec(lr_decay: float) -> None:
    """Its groups do not say that it is row-wise."""
    group = {"lr": 0.3, "lr_decay": lr_decay, "eps": 1e-10, "weight_decay": 0.0, "initial_accumulator_value": 0.0}
    group |= {"maximize": False, "params": [0]}
    p, grads = torch.nn.Parameter(torch.tensor(problem()[0][0])), [torch.tensor(each[0]) for each in problem()[1]]
    state = {"step": torch.tensor(0.0), "sum": torch.zeros(len(p), 1)}
    row_wise_steps(p, state, group, grads[:HALF])
    saved = copy.deepcopy({"state": {0: state}, "param_groups": [group]})
    half = p.detach().numpy().copy()
    row_wise_steps(p, state, group, grads[HALF:])

    options = {"learning_rate": None, "begin_num_update": HALF, "lr_scheduler": lambda t: 0.3 / (1 + (t - 1) * 0.1)}
    optimizer = GroupAdaGrad(dialect="torch", **(options if lr_decay else {"learning_rate": 0.3}))
    states = convert.from_torch(saved, optimizer)
    assert_close(go_on(optimizer, states, [half], [[grad.numpy()] for grad in grads[HALF:]]), [p.detach()])

    same = torch.nn.Parameter(torch.tensor(half))
    loaded = Adagrad([same], row_wise=True)
    loaded.load_state_dict(saved)
    assert_close(train_in_torch(loaded, [same], [[grad.numpy()] for grad in grads[HALF:]]), [p.detach()])


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


def test_parts_of_a_tensor_are_refused() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            raise AssertionError("to be gathered by whoever has the other parts")

    group = {"lr": 0.01, "eps": 1e-10, "params": [0]}
    saved = {"state": {0: {"step": 1, "sum": torch.ones(2).as_subclass(Sharded)}}, "param_groups": [group]}
    with pytest.raises(ValueError, match=r"parameter 0.*: a part of a tensor: gather it first, with full_tensor"):
        convert.from_torch(saved, AdaGrad(0.01, epsilon=1e-10))


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


def test_one_schedule_cannot_continue_parameters_that_differ_in_their_steps() -> None:
    """With any begin_num_update the count of one of them would be wrong."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    before = torch.optim.Adagrad(params, lr=0.3, lr_decay=0.1)
    ones = np.ones(2, np.float32)
    train_in_torch(before, params, [[ones, ones]] * 3)
    params[1].grad = None
    train_in_torch(before, params[:1], [[ones]] * 2)
    for begin in (3, 5):
        optimizer = AdaGrad(
            None, dialect="torch", lr_scheduler=lambda t: 0.3 / (1 + 0.1 * (t - 1)), begin_num_update=begin
        )
        with pytest.raises(ValueError, match=r"step=\[3, 5\]: must be one number: a schedule counts from one beg"):
            convert.from_torch(before.state_dict(), optimizer)
    with pytest.raises(ValueError, match=r"step=.*convert these separately, for one optimizer each"):
        convert.from_torch(before.state_dict(), AdaGrad(0.3, dialect="torch"))


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


@pytest.mark.parametrize(
    "other", [{}, {"state": {}}, [], None, np.ones(1), {"state": {0: {}}, "param_groups": [{"params": [0]}]}]
)
def test_what_is_no_state_dict_is_refused(other: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dict: must be what torch.optim.Adagrad.state_dict\(\) returns"):
        convert.from_torch(other, AdaGrad(dialect="torch"))
    adam = torch.optim.Adam([p := torch.nn.Parameter(torch.ones(1))])
    p.sum().backward()
    adam.step()
    with pytest.raises(ValueError, match=r"KeyError.'sum'."):
        convert.from_torch(adam.state_dict(), AdaGrad(dialect="torch"))
    for before_a_step in (torch.optim.Adam([p]), torch.optim.SGD([p])):
        with pytest.raises(ValueError, match="no parameter has a state"):
            convert.from_torch(before_a_step.state_dict(), AdaGrad(dialect="torch"))


@pytest.mark.parametrize("groups", [[], [[]], [[], []]], ids=str)
def test_no_parameters_are_no_states(groups: list[list[int]]) -> None:
    """An empty state is that of another optimizer only if there are parameters."""
    saved = {"state": {}, "param_groups": [{"lr": 0.1, "params": params} for params in groups]}
    assert convert.from_torch(saved, AdaGrad(0.1, dialect="torch")) == {}


@pytest.mark.parametrize(("off", "is_same"), [(0.0, True), (6e-8, True), (5e-7, False)])
def test_learning_rates_may_differ_by_the_rounding_to_float32_alone(off: float, is_same: bool) -> None:
    saved = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))], lr=0.1 * (1 + off)).state_dict()
    optimizer = AdaGrad(0.1, dialect="torch")
    if is_same:
        convert.from_torch(saved, optimizer)
    else:
        with pytest.raises(ValueError, match="must be the optimizer's at its next update"):
            convert.from_torch(saved, optimizer)


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


def test_groups_of_torch_have_weight_decay_in_the_gradient() -> None:
    saved = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match="decoupled_decay=False of parameter 0: must be the optimizer's"):
        convert.from_torch(saved, AdaGrad(0.1, wd=0.1, dialect="torch", decoupled_decay=True))


# ----------------------------------------------------------------------------------------------------------- to PyTorch


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


def test_groups_that_name_one_index_twice_instead_of_another() -> None:
    states = {"weight": np.ones(2, np.float32), "bias": np.ones(1, np.float32)}
    with pytest.raises(ValueError, match=r"groups=.*: must contain each index of the states once"):
        convert.to_torch(states, AdaGrad(dialect="torch"), groups=[["bias"], ["bias"]])


def test_no_groups_are_not_one_of_all() -> None:
    with pytest.raises(ValueError, match=r"groups=\[\]: must contain each index"):
        convert.to_torch({0: np.ones(1, np.float32)}, AdaGrad(dialect="torch"), groups=[])


def test_options_of_groups() -> None:
    optimizer = AdaGrad(0.2, wd=0.1, dialect="torch", initial_accumulator_value=0.3)
    optimizer.set_wd_mult({"bias": 0.0})
    states = {"weight": np.ones(2, np.float32), "bias": np.ones(1, np.float32)}
    groups = convert.to_torch(states, optimizer, groups=[["bias"], ["weight"], []])["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]
    assert [group["lr"] for group in groups] == [0.2] * 3
    assert [group["initial_accumulator_value"] for group in groups] == [0.3] * 3


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


# ----------------------------------------------------------------------------------------------------- to adagrad.torch


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


def test_a_list_is_no_pair() -> None:
    with pytest.raises(ValueError, match=r"states\[0\]: a pair"):
        convert.to_torch({0: [np.ones(1, np.float32)] * 2}, AdaGrad(dialect="torch"), ours=True)


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


def test_rates_of_a_subclass_are_those_that_are_compared_and_written() -> None:
    class Own(AdaGrad):
        def _get_lr(self, index: Any) -> float:
            return 0.5

    optimizer = Own(0.1, dialect="torch")
    theirs = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    convert.from_torch(theirs.state_dict(), optimizer)
    theirs.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"lr=0\.1 of parameter 0: must be the optimizer.s at its next update"):
        convert.from_torch(theirs.state_dict(), optimizer)
    assert convert.to_torch({0: f32(1, 2)}, optimizer)["param_groups"][0]["lr"] == 0.5
    assert not optimizer._index_update_count


def test_a_weight_decay_may_differ_in_rounding_from_the_product_of_multipliers() -> None:
    optimizer = AdaGrad(0.1, wd=0.1, dialect="torch")
    optimizer.set_wd_mult({0: 0.7})
    theirs = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=0.07)
    convert.from_torch(theirs.state_dict(), optimizer)
    theirs.param_groups[0]["weight_decay"] = 0.0701
    with pytest.raises(ValueError, match=r"weight_decay=0\.0701 of parameter 0: must be the optimizer's wd"):
        convert.from_torch(theirs.state_dict(), optimizer)
