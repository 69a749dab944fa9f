"""States of Keras: half of the steps there, the other half here, are all steps there; and back."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, convert, lr_scheduler
from support import assert_same_bits
from trajectories import HALF, STEPS, assert_close, f32, go_on, problem


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


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, on torch
def test_keras_counts_batches_when_it_accumulates_gradients(keras: Any) -> None:
    """As docs/migrating.md says."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.3, 3, 0.5)
    theirs = keras.optimizers.Adagrad(schedule, gradient_accumulation_steps=2)
    (weight, _), grads = problem()
    variables = [keras.Variable(weight)]

    def train(grads: Any) -> np.ndarray:
        for grad, _ in grads:
            theirs.apply([keras.ops.convert_to_tensor(grad)], variables)
        return keras.ops.convert_to_numpy(variables[0]).copy()

    half = train(grads[:4])
    optimizer = AdaGrad(None, dialect="keras", lr_scheduler=lambda t: float(schedule(2 * t - 1)), begin_num_update=2)
    states = convert.from_keras(theirs.variables, optimizer, gradient_accumulation_steps=2)
    found = go_on(optimizer, states, [half], [[(grads[4][0] + grads[5][0]) / 2]])
    assert_close(found, [train(grads[4:])])


def accumulating(iteration: int, *more: SimpleNamespace) -> list[SimpleNamespace]:
    return [
        variable("iteration", iteration), *more, variable("w_accumulator", 1), variable("w_gradient_accumulator", 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("iteration", "begin", "steps", "match"),
    [
        (
            6,
            6,
            1,
            r"gradient_accumulation_steps=1: must be Keras's n, .* begin_num_update=iteration // n, "
            r"lr_scheduler=lambda t: float\(schedule\(n \* t - 1\)\)",
        ),
        (
            6,
            6,
            2,
            r"iteration=6: Keras continues .* begin_num_update=3, lr_scheduler=lambda t: float\(schedule\(2 \* t - 1"
            r"\)\), since Keras counts batches, from 0",
        ),
        (7, 3, 2, "iteration=7: must be a multiple of gradient_accumulation_steps=2: convert right after an update"),
    ],
)
def test_batches_are_not_updates(iteration: int, begin: int, steps: int, match: str) -> None:
    optimizer = AdaGrad(None, dialect="keras", lr_scheduler=lambda t: 0.1, begin_num_update=begin)
    with pytest.raises(ValueError, match=match):
        convert.from_keras(accumulating(iteration), optimizer, gradient_accumulation_steps=steps)


def test_without_a_schedule_the_count_of_batches_is_no_matter() -> None:
    rate = variable("learning_rate", 0.1)
    assert len(convert.from_keras(accumulating(6, rate), AdaGrad(0.1, dialect="keras"))) == 1
    for begin, steps in ((6, 1), (6, 2)):
        optimizer = AdaGrad(None, dialect="keras", lr_scheduler=lambda t: 0.1, begin_num_update=begin)
        with pytest.raises(ValueError, match=r"gradient_accumulation_steps=1: must be|step=3 of variable 0: must be"):
            convert.from_keras(accumulating(6, rate), optimizer, gradient_accumulation_steps=steps)


def test_gradient_accumulation_steps_must_be_those_of_keras() -> None:
    optimizer = AdaGrad(None, dialect="keras", lr_scheduler=lambda t: 0.1, begin_num_update=6)
    variables = [variable("iteration", 6), variable("w_accumulator", 1)]
    for steps, match in ((0, "must be >= 1"), (2, "must be 1: there are no gradient accumulators")):
        with pytest.raises(ValueError, match=f"gradient_accumulation_steps={steps}: {match}"):
            convert.from_keras(variables, optimizer, gradient_accumulation_steps=steps)


@pytest.mark.parametrize("scope", ["Adagrad/", ""])
def test_the_variables_of_keras_2(scope: str) -> None:
    """They have other names, and none is the learning rate."""
    variables = [
        SimpleNamespace(name="iteration:0", value=np.int64(3)),
        variable(f"{scope}accumulator/w:0", 1, 2),
        variable(f"{scope}accumulator/dense/kernel:0", 3),
        variable(f"{scope}average/w:0", 4, 5),
    ]
    optimizer = AdaGrad(0.1, dialect="keras", begin_num_update=3)
    states = convert.from_keras(variables, optimizer)
    assert [each.tolist() for each in states.values()] == [[1, 2], [3]]
    for each in variables[1:]:
        each.shape = each.value.shape
    back = convert.to_keras(states, optimizer, variables)
    assert [each.name for each, _ in back] == [variables[1].name, variables[2].name, "iteration:0"]
    assert back[-1][1] == 3
    scheduled = AdaGrad(None, dialect="keras", lr_scheduler=lambda t: 0.1, begin_num_update=2)
    with pytest.raises(ValueError, match=r"iteration=3: Keras continues its schedule from there.*begin_num_update=3"):
        convert.from_keras(variables, scheduled)
    for other in ("Adam/m/w:0", "Adam/m/accumulator/w:0", "linear/w:0"):
        with pytest.raises(ValueError, match=f"variables: '{other}': must be those of keras.optimizers.Adagrad"):
            convert.from_keras([*variables, variable(other, 1)], optimizer)


def test_a_learning_rate_in_bfloat16() -> None:
    """Of ``keras.config.set_floatx("bfloat16")`` on PyTorch; NumPy has no such numbers."""
    rate = SimpleNamespace(name="learning_rate", value=torch.tensor(0.25, dtype=torch.bfloat16), dtype="bfloat16")
    variables = [variable("iteration", 3), rate, variable("w_accumulator", 1)]
    assert len(convert.from_keras(variables, AdaGrad(0.25, dialect="keras"))) == 1
    with pytest.raises(ValueError, match=r"lr=0\.25 of variable 0: must be the optimizer's"):
        convert.from_keras(variables, AdaGrad(0.5, dialect="keras"))


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
        (
            [variable("iteration", 3)],
            {},
            "variables: none of 1 is an accumulator: must be those of keras.optimizers.*, once it is built",
        ),
        (
            [variable("w_accumulator", 1), variable("w_linear", 1)],
            {},
            "variables: 'w_linear': must be those of keras.optimizers.Adagrad; for a wrapper, those of its inner_optim",
        ),
        ([variable("dynamic_scale", 1), variable("w_accumulator", 1)], {}, "variables: 'dynamic_scale': must be those"),
        (
            [variable("w", 1), variable("w_accumulator", 1)],
            {},
            "variables: 'w': must be those of keras.optimizers.Adagrad",
        ),
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


def test_to_keras_refuses() -> None:
    optimizer, states = AdaGrad(dialect="keras"), {0: f32(1)}
    with pytest.raises(ValueError, match=r"row_wise=True: must be False: Keras 3\.15 has no row-wise history"):
        convert.to_keras(states, GroupAdaGrad(dialect="keras"), [])
    w = SimpleNamespace(name="w_accumulator", shape=(1,))
    longer = SimpleNamespace(name="w_accumulator", shape=(2,))
    same = SimpleNamespace(name="w_accumulator", shape=(1,))  # Keras lets layers have one name
    assert convert.to_keras({0: f32(1), 1: f32(2)}, optimizer, [w, same]) == [(w, f32(1)), (same, f32(2))]
    assert convert.to_keras(states, optimizer, [w]) == [(w, states[0])]
    pending = SimpleNamespace(name="w_gradient_accumulator", shape=(1,))
    # As many as the states: they are of weights with these names.
    found = convert.to_keras({0: f32(1), 1: f32(2)}, optimizer, [pending, w])
    assert found == [(pending, f32(1)), (w, f32(2))]
    with pytest.raises(ValueError, match="variables: of an optimizer with gradient_accumulation_steps: must be of one"):
        convert.to_keras(states, optimizer, [pending, w])
    with pytest.raises(
        ValueError, match=r"lr=0\.5 of variable 0: must be the optimizer's at its next update, which is 0"
    ):
        convert.to_keras(states, optimizer, [variable("learning_rate", 0.5), w])
    counted, iteration = AdaGrad(dialect="keras"), SimpleNamespace(name="iteration")
    counted._index_update_count = {0: 7, 1: 3}
    constant = variable("learning_rate", counted.learning_rate)
    assert convert.to_keras({0: f32(1), 1: f32(2)}, counted, [iteration, constant, w, same])[-1] == (iteration, 7)
    with pytest.raises(ValueError, match="iteration=7: Keras continues its schedule from there, and so must the optim"):
        convert.to_keras({0: f32(1), 1: f32(2)}, counted, [iteration, w, same])
    for wrong in ([], [longer], [w, SimpleNamespace(name="v_accumulator", shape=(1,))]):
        with pytest.raises(ValueError, match=r"variables: accumulators of shapes .*: must be \[\(1,\)\], the states'"):
            convert.to_keras(states, optimizer, wrong)


def test_the_optimizer_of_keras_is_not_its_variables() -> None:
    with pytest.raises(TypeError, match=r"variables=namespace.*: must be optimizer\.variables"):
        convert.from_keras(SimpleNamespace(), AdaGrad(dialect="keras"))  # type: ignore[arg-type]
