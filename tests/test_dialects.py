"""The dialects against the frameworks themselves, step by step: run here where they are installed, else recorded."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import adagrad
import peers
from adagrad import AdaGrad, GroupAdaGrad, RowSparse, checkpoint, lr_scheduler
from adagrad.dialects import DIALECTS, default
from adagrad.torch import Adagrad
from support import assert_same_bits

LIVE = ("torch", "optax", "keras")
"""Frameworks that the tests install; :mod:`peers` has what the others computed."""

RUNS = [(dialect, case) for dialect, cases in peers.RUNS.items() for case in cases]

EXACT = [("mxnet1", case) for case in peers.RUNS["mxnet1"] if not peers.CASES[case].get("row_wise")]
"""Where not one bit differs. Elsewhere a framework rounds in another order."""

RTOL, ATOL = 1e-6, 5e-7
"""Ten steps of weights around 1: a few units in the last place."""


@pytest.fixture(scope="module", autouse=True)
def keras_on_torch() -> Iterator[None]:
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "torch"
    yield
    if before is None:
        del os.environ["KERAS_BACKEND"]
    else:
        os.environ["KERAS_BACKEND"] = before


def of_the_framework(dialect: str, case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    if dialect not in LIVE:
        return peers.recorded(dialect, case)
    if dialect not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a framework's import says of its own dependencies
            pytest.importorskip(dialect, reason=f"{dialect} is not installed: pip install '.[test]'")
    with warnings.catch_warnings():
        if dialect == "keras":  # its NumPy conversion, on torch, misses a keyword of NumPy 2
            warnings.filterwarnings("ignore", category=DeprecationWarning, message="__array__ implementation")
        return peers.run(dialect, case)


def optimizer_of(dialect: str, case: str, **options: Any) -> AdaGrad:
    """The dialect with the arguments of the case, and no others."""
    kwargs = {name: value for name, value in peers.CASES[case].items() if name not in ("scale", "row_wise")}
    kind = GroupAdaGrad if peers.CASES[case].get("row_wise") else AdaGrad
    return kind(dialect=dialect, **(kwargs | options))


def ours(optimizer: AdaGrad, case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    weight, grads = peers.problem(case)
    history = optimizer.create_state(0, weight)
    found = []
    for grad in grads:
        optimizer.update(0, weight, grad, history)
        found.append((weight.copy(), history.copy()))
    return found


def worst(found: list[Any], expected: list[Any]) -> float:
    """The largest difference between weights, in units of what is allowed."""
    return max(
        float(np.max(np.abs(w - theirs) / (RTOL * np.abs(theirs) + ATOL)))
        for (w, _), (theirs, _) in zip(found, expected, strict=True)
    )


# ----------------------------------------------------------------------------------------------- against the frameworks


@pytest.mark.parametrize(("dialect", "case"), RUNS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
def test_every_step_is_that_of_the_framework(dialect: str, case: str, fused: bool) -> None:
    expected = of_the_framework(dialect, case)
    found = ours(optimizer_of(dialect, case, use_fused_step=fused), case)
    assert len(found) == len(expected) == peers.STEPS
    for step, ((weight, history), (their_weight, their_history)) in enumerate(zip(found, expected, strict=True)):
        if (dialect, case) in EXACT:
            assert_same_bits(weight, their_weight, f"weight after step {step}")
            assert_same_bits(history, their_history, f"history after step {step}")
        else:
            np.testing.assert_allclose(weight, their_weight, RTOL, ATOL, err_msg=f"weight after step {step}")
            np.testing.assert_allclose(history, their_history, 3e-6, 0, err_msg=f"history after step {step}")


@pytest.mark.parametrize("dialect", peers.RUNS)
def test_no_other_place_for_epsilon_would_pass(dialect: str) -> None:
    def with_epsilon_elsewhere(case: str) -> float:
        optimizer = optimizer_of(dialect, case)
        optimizer.epsilon_inside = not optimizer.epsilon_inside
        return worst(ours(optimizer, case), of_the_framework(dialect, case))

    assert max(with_epsilon_elsewhere(case) for case in peers.RUNS[dialect]) > 100


@pytest.mark.parametrize("dialect", [name for name, cases in peers.RUNS.items() if "decay" in cases])
def test_no_other_weight_decay_would_pass(dialect: str) -> None:
    optimizer = optimizer_of(dialect, "decay")
    optimizer.decoupled_decay = not optimizer.decoupled_decay
    assert worst(ours(optimizer, "decay"), of_the_framework(dialect, "decay")) > 100


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        (dialect, name)
        for dialect in peers.RUNS
        for name in ("learning_rate", "epsilon", "initial_accumulator_value")
        if getattr(DIALECTS[dialect], name) is not None
    ],
)
def test_no_other_default_would_pass(dialect: str, name: str) -> None:
    cases = [case for case in peers.RUNS[dialect] if name not in peers.CASES[case]]

    def with_another_default(case: str) -> float:
        optimizer = optimizer_of(dialect, case)
        attribute = "lr" if name == "learning_rate" else name
        setattr(optimizer, attribute, 2 * getattr(optimizer, attribute) or 1e-3)
        return worst(ours(optimizer, case), of_the_framework(dialect, case))

    if name == "epsilon" and dialect in ("optax", "keras", "tensorflow"):
        cases.remove("defaults")  # beside a history of 0.1 and more, in float32, nobody sees it
    assert max(map(with_another_default, cases)) > 2


def test_optax_and_this_library_treat_an_empty_history_alike() -> None:
    grads = [np.array([0.0, 1e-30, 1e-3], np.float32)] * 2  # 1e-30 squared is 0
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax")
    solver = optax.adagrad(0.1, initial_accumulator_value=0.0)
    params = jnp.ones(3)
    state = solver.init(params)
    weight, optimizer = np.ones(3, np.float32), AdaGrad(0.1, initial_accumulator_value=0.0, dialect="optax")
    history = optimizer.create_state(0, weight)
    for grad in grads:
        updates, state = solver.update(jnp.asarray(grad), state)
        params = optax.apply_updates(params, updates)
        optimizer.update(0, weight, grad, history)
    np.testing.assert_allclose(weight, params, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ arguments


def test_the_signature_shows_the_defaults_of_mxnet_2() -> None:
    parameters = inspect.signature(AdaGrad).parameters
    assert list(parameters) == [
        "learning_rate", "epsilon", "use_fused_step",
        "initial_accumulator_value", "dialect", "epsilon_inside", "decoupled_decay", "kwargs",
    ]  # fmt: skip
    shown = [parameters[name] for name in ("learning_rate", "epsilon", "initial_accumulator_value", "dialect")]
    assert [each.default for each in shown] == [0.01, 1e-6, 0.0, "mxnet"]
    assert [str(each).split(" = ")[1] for each in shown] == ["0.01", "1e-06", "0.0", "'mxnet'"]
    assert [each.kind for each in shown[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert [each.kind for each in shown[2:]] == [inspect.Parameter.KEYWORD_ONLY] * 2


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", [AdaGrad, GroupAdaGrad])
def test_defaults_are_those_of_the_dialect(dialect: str, kind: type[AdaGrad]) -> None:
    preset, optimizer = DIALECTS[dialect], kind(dialect=dialect)
    epsilon = preset.epsilon
    if kind is GroupAdaGrad and preset.row_wise_epsilon is not None:
        epsilon = preset.row_wise_epsilon
    assert optimizer.learning_rate == (0.01 if preset.learning_rate is None else preset.learning_rate)
    assert optimizer.epsilon == epsilon
    assert optimizer.initial_accumulator_value == preset.initial_accumulator_value
    rule = optimizer.rule()
    assert (rule.epsilon_inside, rule.decoupled_decay) == (preset.epsilon_inside, preset.decoupled_decay)
    assert (rule.row_wise, rule.epsilon) == (kind is GroupAdaGrad, epsilon)
    values = (optimizer.lr, optimizer.epsilon, optimizer.initial_accumulator_value)
    assert all(type(value) is float for value in values)


def test_the_defaults_are_those_of_the_table() -> None:
    assert DIALECTS["tf"] is DIALECTS["tensorflow"]
    assert {
        name: (
            each.learning_rate,
            each.epsilon,
            each.initial_accumulator_value,
            each.epsilon_inside,
            each.decoupled_decay,
        )
        for name, each in DIALECTS.items()
    } == {
        "mxnet": (0.01, 1e-6, 0.0, False, False),
        "mxnet1": (None, 1e-7, 0.0, True, True),
        "torch": (0.01, 1e-10, 0.0, False, False),
        "optax": (None, 1e-7, 0.1, True, False),
        "keras": (0.001, 1e-7, 0.1, True, True),
        "tensorflow": (0.001, 1e-7, 0.1, False, False),
        "tf": (0.001, 1e-7, 0.1, False, False),
        "fbgemm": (0.01, 1e-8, 0.0, False, False),
        "mlx": (None, 1e-8, 0.0, False, False),
    }


def test_given_arguments_win() -> None:
    # The values are the defaults of "mxnet": even so they count as given.
    optimizer = AdaGrad(0.01, 1e-6, initial_accumulator_value=0.0, dialect="keras")
    assert (optimizer.learning_rate, optimizer.epsilon, optimizer.initial_accumulator_value) == (0.01, 1e-6, 0.0)
    assert optimizer.epsilon_inside
    assert AdaGrad(np.float64(0.01), dialect="keras").learning_rate == 0.01
    assert AdaGrad(epsilon=0, dialect="keras").epsilon == 0
    assert not AdaGrad(dialect="keras", epsilon_inside=False).rule().epsilon_inside
    assert not AdaGrad(dialect="keras", decoupled_decay=False).rule().decoupled_decay
    assert AdaGrad(dialect="fbgemm", decoupled_decay=True).rule().decoupled_decay
    assert adagrad.create("adagrad", dialect="keras", learning_rate=0.5).learning_rate == 0.5


def test_a_default_handed_on_is_still_a_default() -> None:
    class Mine(AdaGrad):
        def __init__(self, learning_rate: float = default(0.01), **kwargs: Any) -> None:
            super().__init__(learning_rate, **kwargs)

    assert Mine(dialect="keras").learning_rate == 0.001
    assert Mine(0.01, dialect="keras").learning_rate == 0.01
    assert pickle.loads(pickle.dumps(Mine.__init__.__defaults__)) == (0.01,)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_learning_rate_means_what_it_means_in_mxnet(dialect: str) -> None:
    assert AdaGrad(None, dialect=dialect).learning_rate == 0.01
    scheduler = lr_scheduler.FactorScheduler(step=10, base_lr=0.4)
    assert AdaGrad(None, lr_scheduler=scheduler, dialect=dialect).learning_rate == 0.4


def test_a_dialect_without_a_learning_rate_keeps_the_schedulers() -> None:
    scheduler = lr_scheduler.FactorScheduler(step=10, base_lr=0.4)
    assert AdaGrad(lr_scheduler=scheduler, dialect="mxnet1").learning_rate == 0.4
    with pytest.warns(UserWarning, match="learning_rate=0.001 overwrites the scheduler's base_lr=0.4"):
        assert AdaGrad(lr_scheduler=scheduler, dialect="keras").learning_rate == 0.001


@pytest.mark.parametrize(
    ("error", "dialect", "match"),
    [
        (ValueError, "pytorch", "dialect='pytorch': must be one of 'mxnet', 'mxnet1', 'torch', 'optax'"),
        (ValueError, "", "dialect='': must be one of"),
        (TypeError, None, "dialect=None: must be a string, not NoneType"),
        (TypeError, ["optax"], "dialect=.'optax'.: must be a string, not list"),
    ],
)
def test_unknown_dialects_are_refused(error: type[Exception], dialect: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        AdaGrad(dialect=dialect)


def test_the_options_are_attributes_and_checked() -> None:
    for name in ("epsilon_inside", "decoupled_decay"):
        with pytest.raises(TypeError, match=f"{name}=1: must be True or False, not int"):
            AdaGrad(**{name: 1})
    optimizer = AdaGrad()
    optimizer.epsilon_inside = True
    assert optimizer.rule().epsilon_inside
    optimizer.decoupled_decay = 1  # type: ignore[assignment]
    with pytest.raises(TypeError, match="decoupled_decay=1: must be True or False, not int"):
        optimizer.rule()


# ------------------------------------------------------------------------------------------ other gradients and weights


@pytest.mark.parametrize("dialect", [*peers.RUNS, "mxnet"])
@pytest.mark.parametrize("kind", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_all_paths_have_the_same_bits(dialect: str, kind: type[AdaGrad], dtype: str) -> None:
    """Dense and row-sparse, kernel and expression, NumPy and torch."""
    start, grads = peers.problem("defaults")
    rows = np.arange(len(start))

    def train(fused: bool, sparse: bool, use_torch: bool) -> np.ndarray:
        optimizer = kind(0.1, wd=0.03, clip_gradient=2.0, dialect=dialect, use_fused_step=fused)
        weight = start.astype(dtype)
        given = torch.from_numpy(weight) if use_torch else weight
        state = optimizer.create_state(0, given)
        for grad in grads[:3]:
            grad = grad.astype(dtype)
            if use_torch:
                grad = torch.from_numpy(grad)
            optimizer.update(0, given, RowSparse(grad, rows, start.shape) if sparse else grad, state)
        return weight

    expected = train(False, False, False)
    for fused in (True, False):
        for sparse in (True, False):
            for use_torch in (True, False):
                assert_same_bits(train(fused, sparse, use_torch), expected, f"{fused=} {sparse=} {use_torch=}")


# -------------------------------------------------------------------------------------------------- the torch front end


def in_torch(case: str, **options: Any) -> tuple[Any, Any]:
    """adagrad.torch.Adagrad with the arguments of the case, under PyTorch's names, and its parameter."""
    names = {"learning_rate": "lr", "epsilon": "eps", "wd": "weight_decay", "clip_gradient": "clip_value"}
    kwargs = {names.get(name, name): value for name, value in peers.CASES[case].items() if name != "scale"}
    if kwargs.pop("rescale_grad", 1) < 0:
        kwargs["maximize"] = True
    p = torch.nn.Parameter(torch.from_numpy(peers.problem(case)[0]))
    return Adagrad([p], **(kwargs | options)), p


@pytest.mark.parametrize(("dialect", "case"), RUNS)
def test_the_torch_front_end_has_the_same_bits(dialect: str, case: str) -> None:
    optimizer, p = in_torch(case, dialect=dialect)
    rescale = np.float32(abs(peers.CASES[case].get("rescale_grad", 1)))  # a power of two: exact
    expected = ours(optimizer_of(dialect, case), case)
    for step, (grad, (weight, history)) in enumerate(zip(peers.problem(case)[1], expected, strict=True)):
        p.grad = torch.from_numpy(grad * rescale)
        optimizer.step()
        assert_same_bits(p, weight, f"weight after step {step}")
        assert_same_bits(optimizer.state[p]["sum"], history, f"history after step {step}")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_defaults_of_the_torch_front_end(dialect: str) -> None:
    preset = DIALECTS[dialect]
    optimizer, p = in_torch("defaults", dialect=dialect)
    found = optimizer.defaults
    assert found["lr"] == (0.01 if preset.learning_rate is None else preset.learning_rate)
    assert (found["eps"], found["initial_accumulator_value"]) == (preset.epsilon, preset.initial_accumulator_value)
    assert (found["epsilon_inside"], found["decoupled_decay"]) == (preset.epsilon_inside, preset.decoupled_decay)
    assert type(found["lr"]) is type(found["eps"]) is float
    assert Adagrad([p], **found).defaults == found
    given, _ = in_torch("defaults", dialect=dialect, lr=0.01, eps=1e-10, initial_accumulator_value=0)
    assert [given.defaults[name] for name in ("lr", "eps", "initial_accumulator_value")] == [0.01, 1e-10, 0]
    with pytest.raises(ValueError, match="dialect='pytorch': must be one of"):
        Adagrad([p], dialect="pytorch")


def test_a_group_has_its_own_rule() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Adagrad([{"params": params[:1]}, {"params": params[1:], "epsilon_inside": True}], lr=0.1, eps=1e-2)
    for p in params:
        p.grad = torch.full((3,), 0.1)
    optimizer.step()
    assert params[0][0].item() == pytest.approx(1 - 0.1 * 0.1 / (0.1 + 0.01))
    assert params[1][0].item() == pytest.approx(1 - 0.1 * 0.1 / np.sqrt(0.01 + 0.01))
    with pytest.raises(TypeError, match="epsilon_inside=1: must be True or False"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "epsilon_inside": 1})


@pytest.mark.parametrize("dialect", ["optax", "keras", "torch"])
def test_torch_checkpoints_keep_the_dialect(dialect: str) -> None:
    before, p = in_torch("decay", dialect=dialect)
    after, q = in_torch("decay")
    grads = peers.problem("decay")[1]

    def train(optimizer: Any, parameter: Any, steps: list[np.ndarray]) -> None:
        for grad in steps:
            parameter.grad = torch.from_numpy(grad)
            optimizer.step()

    train(before, p, grads[:5])
    after.load_state_dict(copy.deepcopy(before.state_dict()))  # else they share their histories, as in PyTorch
    q.data = p.data.clone()
    train(before, p, grads[5:])
    train(after, q, grads[5:])
    assert_same_bits(p, q)


def test_what_torch_saved_has_the_rule_of_torch() -> None:
    optimizer, p = in_torch("defaults", dialect="keras")
    optimizer.load_state_dict(torch.optim.Adagrad([p], lr=0.1).state_dict())
    group = optimizer.param_groups[0]
    assert (group["epsilon_inside"], group["decoupled_decay"]) == (False, False)
    assert (group["lr"], group["eps"]) == (0.1, 1e-10)


@pytest.mark.parametrize("dialect", ["keras", "mxnet1"])
def test_differentiable_steps_follow_the_dialect(dialect: str) -> None:
    start, (grad, *_) = peers.problem("decay")
    expected, q = in_torch("decay", dialect=dialect)
    q.grad = torch.from_numpy(grad)
    expected.step()
    leaf = torch.from_numpy(start).requires_grad_()
    p = leaf.clone()
    p.grad = torch.from_numpy(grad)
    Adagrad([p], lr=0.2, weight_decay=0.03, dialect=dialect, differentiable=True).step()
    np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-6)
    p.sum().backward()
    assert leaf.grad is not None


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dialect", DIALECTS)
def test_checkpoints_keep_the_dialect(dialect: str) -> None:
    before = adagrad.get_updater(AdaGrad(dialect=dialect, wd=0.1))
    after = adagrad.get_updater(AdaGrad())
    after.set_states(before.get_states(dump_optimizer=True))
    assert isinstance(before.optimizer, AdaGrad)
    assert isinstance(after.optimizer, AdaGrad)
    assert after.optimizer.rule() == before.optimizer.rule()
    assert after.optimizer.config() == before.optimizer.config()


def test_a_spoilt_option_in_a_checkpoint_is_refused() -> None:
    config = AdaGrad(dialect="optax").config() | {"epsilon_inside": 1}
    updater = adagrad.get_updater(AdaGrad())
    with pytest.raises(ValueError, match="epsilon_inside=1: must be True or False"):
        updater.set_states(checkpoint.encode({}, config))
    assert not updater.optimizer.epsilon_inside
