"""States of optax: half of the steps there, the other half here, are all steps there; and back."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from adagrad import AdaGrad, convert, get_updater
from support import assert_same_bits
from trajectories import HALF, STEPS, assert_close, f32, go_on, problem

jax = pytest.importorskip("jax", reason="jax is not installed: pip install '.[test]'")
optax = pytest.importorskip("optax", reason="optax is not installed: pip install '.[test]'")


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
    count: Any
    hyperparams: Any
    inner_state: Any


class InjectStatefulHyperparamsState(NamedTuple):
    count: Any
    hyperparams: Any
    hyperparams_states: Any
    inner_state: Any


class WrappedScheduleState(NamedTuple):
    count: Any


class ReduceLROnPlateauState(NamedTuple):
    scale: Any
    count: Any


class MaskedNode(NamedTuple):
    pass


class Pair(NamedTuple):
    b: Any
    a: Any


def train_in_optax(solver: Any, params: Any, state: Any, grads: list[Any]) -> tuple[Any, Any]:
    for each in grads:
        updates, state = solver.update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("scheduled", [False, True])
def test_optax_there_and_back(scheduled: bool) -> None:
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
            InjectHyperparamsState(5, {}, (ScaleByRssState(f32(1)),)),
            {},
            "InjectHyper.*: convert its inner_state, with the epsilon and learning_rate in its hyperparams, or, for a "
            "schedule, begin_num_update=5",
        ),
        (SimpleNamespace(inner_opt_state=()), {}, "convert its inner_opt_state, when its mini_step is 0"),
        (SimpleNamespace(opt_state=()), {}, "opt_state: SimpleNamespace: not a part .*: convert its opt_state$"),
        ([{"sum_of_squares": f32(1)}, None], {}, "NoneType: .*: restore what is from a file into solver.init"),
        (
            OrderedDict(clip=EmptyState(), adagrad=ScaleByRssState(f32(1))),
            {},
            "OrderedDict: .*; of a named_chain, convert the list of values",
        ),
        (
            (ScaleByRssState(f32(1)), ScaleByScheduleState(np.int32([7, 7]))),
            {},
            r"count: shape \(2,\): must be \(\): of a replicated state, convert one copy: jax.tree.map",
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


# ------------------------------------------------------------------------------------------------- inject_hyperparams


def injected(scheduled: bool) -> tuple[Any, dict[str, Any]]:
    """A solver, and the arguments of the optimizer that continues it after half of the steps."""
    schedule = optax.cosine_decay_schedule(0.3, STEPS)
    made = optax.inject_hyperparams(optax.adagrad)(schedule if scheduled else 0.3, eps=0.01)
    options: dict[str, Any] = {"learning_rate": 0.3}
    if scheduled:
        options = {"learning_rate": None, "lr_scheduler": lambda t: float(schedule(t - 1)), "begin_num_update": HALF}
    return optax.chain(optax.clip(0.7), made), options | {"epsilon": 0.01, "clip_gradient": 0.7, "dialect": "optax"}


@pytest.mark.parametrize("scheduled", [False, True])
def test_injected_hyperparams_there_and_back(scheduled: bool) -> None:
    weights, grads = problem()
    solver, options = injected(scheduled)
    half, state = train_in_optax(solver, weights, solver.init(weights), grads[:HALF])
    optimizer = AdaGrad(**options)
    updater = get_updater(optimizer)
    updater.states = convert.from_optax(state, optimizer)
    here = [np.array(weight) for weight in half]
    for each in grads[HALF:]:
        updater([0, 1], each, here)
    expected, last = train_in_optax(solver, half, state, grads[HALF:])
    assert_close(here, expected)

    back = convert.to_optax(updater.states, optimizer, state)
    assert jax.tree.structure(back) == jax.tree.structure(last)
    if scheduled:
        assert int(back[1].count) == int(back[1].hyperparams_states["learning_rate"].count) == STEPS
    assert_close(*(train_in_optax(solver, expected, each, grads[:1])[0] for each in (back, last)))


@pytest.mark.parametrize("scheduled", [False, True])
def test_injected_hyperparams_must_be_those_of_the_optimizer(scheduled: bool) -> None:
    weights, grads = problem()
    solver, options = injected(scheduled)
    state = train_in_optax(solver, weights, solver.init(weights), grads[:HALF])[1]
    rate = float(state[1].hyperparams["learning_rate"])
    others = [({"epsilon": 1e-7}, r"eps=0\.01 in hyperparams: must be the optimizer's epsilon, which is 1e-07")]
    if scheduled:  # the rate in the state is that of the last update
        constant = {"learning_rate": rate, "lr_scheduler": None}
        others += [(change, "count=3: optax continues its sch") for change in (constant, {"begin_num_update": 0})]
    else:
        others += [({"learning_rate": 0.1}, r"lr=0\.3\d* of parameter 0: must be the optimizer's at its next update")]
    states = convert.from_optax(state, AdaGrad(**options))
    for change, match in others:
        optimizer = AdaGrad(**(options | change))
        with pytest.raises(ValueError, match=match):
            convert.from_optax(state, optimizer)
        if "begin_num_update" not in change:
            with pytest.raises(ValueError, match=match):
                convert.to_optax(states, optimizer, state)


@pytest.mark.parametrize(
    ("name", "schedule"), [("eps", WrappedScheduleState(3)), ("learning_rate", ReduceLROnPlateauState(1.0, 3))]
)
def test_injected_schedules_of_anything_else_are_refused(name: str, schedule: Any) -> None:
    state = InjectStatefulHyperparamsState(3, {}, {name: schedule}, (ScaleByRssState(f32(1)), EmptyState()))
    optimizer = AdaGrad(None, dialect="optax", lr_scheduler=lambda t: 0.1, begin_num_update=3)
    match = rf"hyperparams_states\['{name}'\]: must be a learning rate that depends on the count alone"
    with pytest.raises(ValueError, match=match):
        convert.from_optax(state, optimizer)
    with pytest.raises(ValueError, match=match):
        convert.to_optax({0: f32(1)}, optimizer, state)


# ------------------------------------------------------------------------------------------------------------ schedules


def test_to_optax_refuses_a_schedule_that_only_one_side_has() -> None:
    params, states = f32(1, 2), {0: f32(3, 4)}
    constant = AdaGrad(0.3, dialect="optax", begin_num_update=7)
    scheduled = AdaGrad(None, dialect="optax", lr_scheduler=lambda t: 0.3 / t, begin_num_update=7)
    with pytest.raises(
        ValueError, match=r"count=7: optax continues its schedule from there, and so must the optimizer"
    ):
        convert.to_optax(states, constant, optax.adagrad(lambda n: 0.3 / (n + 1)).init(params))
    with pytest.raises(
        ValueError, match=r"opt_state: has no schedule: must have the optimizer's: make the solver with"
    ):
        convert.to_optax(states, scheduled, optax.adagrad(0.3).init(params))
    # There the learning rate is applied elsewhere.
    assert convert.to_optax(states, scheduled, optax.scale_by_rss().init(params)).sum_of_squares is not None


def test_every_count_must_be_the_schedules() -> None:
    optimizer = AdaGrad(None, dialect="optax", lr_scheduler=lambda t: 0.1)
    optimizer._update_count(0)
    state = (ScaleByRssState([np.ones(1, np.float32), np.ones(1, np.float32)]), ScaleByScheduleState(1))
    with pytest.raises(ValueError, match="count=1: optax continues its schedule"):
        convert.from_optax(state, optimizer)
    optimizer._update_count(1)
    assert len(convert.from_optax(state, optimizer)) == 2


def test_counts_of_schedules_of_optax() -> None:
    weights = [np.ones(1, np.float32) for _ in range(2)]
    optimizer = AdaGrad(None, dialect="optax", lr_scheduler=lambda t: 0.1, begin_num_update=1)
    for counts in ((1, 2), (2, 1)):
        state = (ScaleByRssState(weights), *map(ScaleByScheduleState, counts))
        with pytest.raises(ValueError, match="count=2: optax continues its schedule"):
            convert.from_optax(state, optimizer)
    optimizer._update_count(1)
    back = convert.to_optax(dict(enumerate(weights)), optimizer, state)
    assert [int(part.count) for part in back[1:]] == [2, 2]


@jax.tree_util.register_pytree_node_class
class Box:
    """A class that JAX knows, as Flax and Equinox have them for models, and Flax for all arrays of a state."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def tree_flatten(self) -> tuple[Any, None]:
        return self.values, None

    @classmethod
    def tree_unflatten(cls, _: None, values: Any) -> Box:
        return cls(*values)


def test_trees_of_registered_classes_there_and_back() -> None:
    weights, grads = problem()
    trees = [Box({"b": Box(each[0])}, each[1]) for each in (weights, *grads)]
    schedule = optax.cosine_decay_schedule(0.3, STEPS)
    solver = optax.adagrad(schedule)
    half, (accumulator, counter) = train_in_optax(solver, trees[0], solver.init(trees[0]), trees[1 : HALF + 1])
    state = (accumulator, counter._replace(count=Box(counter.count)))
    options = {"lr_scheduler": lambda t: float(schedule(t - 1)), "begin_num_update": HALF}
    optimizer = AdaGrad(None, dialect="optax", **options)
    states = convert.from_optax(state, optimizer)
    back = convert.to_optax(states, optimizer, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for leaf, before in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert_same_bits(leaf, np.asarray(before))
    found = go_on(optimizer, states, [np.array(leaf) for leaf in jax.tree.leaves(half)], grads[HALF:])
    expected, _ = train_in_optax(solver, half, (back[0], counter), trees[HALF + 1 :])
    assert_close(found, jax.tree.leaves(expected))


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


def test_masked_weight_decay_in_a_chain_of_optax() -> None:
    """The state of a masked transformation without state holds nothing, either."""
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


def test_a_masked_chain_without_state_holds_nothing() -> None:
    masked = optax.masked(optax.chain(optax.identity(), optax.clip(1.0)), {"w": True, "b": False})
    state = optax.chain(masked, optax.adagrad(0.1)).init({"w": f32(1, 2), "b": f32(1)})
    assert len(convert.from_optax(state, AdaGrad(0.1, dialect="optax"))) == 2


def test_a_part_of_the_parameters_in_optax() -> None:
    """AdaGrad for the tables, another rule for the rest: as docs/migrating.md says."""
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
