"""The updater: states by index, aggregation, all or nothing over a list, interrupts."""

from __future__ import annotations

import math
import re
import threading
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, GroupAdaGrad, Optimizer, RowSparse, get_updater, kernels, rule
from adagrad.kernels import dense_lists, expressions, general_path, outcomes, row_lists
from adagrad.kernels.cpu import dense as cpu_dense
from adagrad.lr_scheduler import FactorScheduler, LRScheduler
from support import assert_same_bits
from training import INDICES, Plain, assert_same_states, make_grads, make_weights, optimizer, run

AGGREGATES = pytest.mark.parametrize("aggregate_num", [1, 2, 3, 100, np.inf, None])
"""None: all at once, as of the library's own class; else of a subclass."""


# ---------------------------------------------------------------------------------------------------------- aggregation


@AGGREGATES
@pytest.mark.parametrize("together", [True, False], ids=["lists", "one by one"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
def test_aggregation_changes_nothing(aggregate_num: float | None, together: bool, fused: bool) -> None:
    plain, weights = optimizer(), make_weights()
    states = [plain.create_state_multi_precision(i, w) for i, w in zip(INDICES, weights, strict=True)]
    for t in range(4):
        plain.update_multi_precision(INDICES, weights, make_grads(t, weights), states)
    updater, others = get_updater(optimizer(aggregate_num=aggregate_num, use_fused_step=fused)), make_weights()
    run(updater, others, range(4), together=together)
    for one, two in zip(weights, others, strict=True):
        assert_same_bits(one, two)
    assert_same_states(dict(zip(INDICES, states, strict=True)), updater.states)
    assert updater.optimizer.num_update == 4


class Counting(AdaGrad):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[int] = []

    def update_multi_precision(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self.sizes.append(len(indices))
        super().update_multi_precision(indices, weights, grads, states)


@pytest.mark.parametrize(
    ("aggregate_num", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (np.inf, [5])]
)
def test_how_many_weights_go_into_one_step(aggregate_num: float, sizes: list[int]) -> None:
    counting, weights = Counting(aggregate_num=aggregate_num), make_weights()
    get_updater(counting)(INDICES, make_grads(0, weights), weights)
    assert counting.sizes == sizes
    get_updater(counting)([], [], [])
    assert counting._index_update_count == dict.fromkeys(INDICES, 1)


def patched() -> AdaGrad:
    optimizer = AdaGrad()
    optimizer.step = optimizer.step  # type: ignore[method-assign] # a function of the user's
    return optimizer


def scheduled(scheduler: Any) -> AdaGrad:
    return AdaGrad(learning_rate=None, lr_scheduler=scheduler)


@pytest.mark.parametrize(
    ("make", "is_together"),
    [
        (AdaGrad, True),
        (GroupAdaGrad, True),
        (lambda: scheduled(FactorScheduler(1)), True),
        (lambda: scheduled(lambda num_update: 0.1), False),
        (Plain, False),
        (patched, False),
    ],
)
def test_all_weights_go_into_one_step_where_it_makes_no_difference(
    make: Any, is_together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    update = kernels.update

    def counting(weights: Any, *others: Any, **options: Any) -> None:
        sizes.append(len(weights))
        update(weights, *others, **options)

    monkeypatch.setattr(kernels, "update", counting)
    given, weights = make(), make_weights()[:4]
    get_updater(given)(INDICES[:4], make_grads(0, weights), weights)
    assert sizes == ([4] if is_together else [1] * 4)
    assert given._index_update_count == dict.fromkeys(INDICES[:4], 1)


class Decaying(LRScheduler):
    """Decays in place when it is asked, as MXNet's own schedules do, and so those that users have made of them."""

    def __init__(self, step: int, factor: float, base_lr: float) -> None:
        super().__init__(base_lr)
        self.step, self.factor, self.count = step, factor, 0

    def __call__(self, num_update: int) -> float:
        while num_update > self.count + self.step:
            self.count += self.step
            self.base_lr *= self.factor
        return self.base_lr


@pytest.mark.parametrize("aggregate", [None, 2, math.inf])
def test_a_scheduler_with_a_memory_is_asked_once_for_each_weight_in_order(aggregate: float | None) -> None:
    updater = get_updater(AdaGrad(None, lr_scheduler=Decaying(3, 0.1, 0.5), aggregate_num=aggregate))
    a, b = np.ones(1), np.ones(1)
    for _ in range(3):
        updater(["b"], [np.ones(1)], [b])
    updater(["a", "b"], [np.ones(1), np.ones(1)], [a, b])
    assert a == 1 - 0.5 / (1 + 1e-6)  # a's first update is the third in number: before the decay


# ------------------------------------------------------------------------------------------------------ states by index


def test_the_order_of_arguments_is_mxnets() -> None:
    """Index, gradient, weight."""
    weight, grad = np.ones(2, np.float32), np.full(2, 3, np.float32)
    get_updater(AdaGrad(0.5))(0, grad, weight)
    assert (grad == 3).all()
    assert (weight < 1).all()


def test_bytes_as_indices() -> None:
    updater, weight = get_updater(AdaGrad()), np.ones(2)
    updater(b"name", np.ones(2), weight)
    updater("name", np.ones(2), weight)
    updater([b"name"], [np.ones(2)], [weight])
    assert list(updater.states) == ["name"]
    assert updater.optimizer._index_update_count == {"name": 3}


@pytest.mark.parametrize("index", [range(2), None, 0.5])
def test_what_is_neither_an_index_nor_a_list_is_named_before_the_weight(index: Any) -> None:
    updater = get_updater(AdaGrad())
    with pytest.raises(TypeError, match=re.escape(f"indices={index!r}: must be a list, like weights")):
        updater(index, [np.ones(2)] * 2, [np.ones(2)] * 2)
    with pytest.raises(TypeError, match=re.escape(f"index={index!r}: must be an integer or a string")):
        updater(index, np.ones(2), "no array")
    assert updater.states == {}


def test_repr() -> None:
    updater = get_updater(AdaGrad(0.5))
    updater([0, "bias"], [np.ones(2)] * 2, [np.ones(2), np.ones(2)])
    assert repr(updater) == f"Updater({updater.optimizer!r}, <2 states>)"


def test_integers_and_strings_are_different_indices() -> None:
    updater = get_updater(AdaGrad())
    for index in (0, "0", 1):
        updater(index, np.ones(2), np.ones(2))
    assert [(type(index), index) for index in updater.states] == [(int, 0), (str, "0"), (int, 1)]


def test_states_are_made_once_and_kept() -> None:
    updater, weight = get_updater(AdaGrad(initial_accumulator_value=0.5)), np.ones(2)
    updater(0, np.ones(2), weight)
    state = updater.states[0]
    updater(0, np.ones(2), weight)
    assert updater.states[0] is state
    assert (state == 2.5).all()


def test_an_optimizer_of_ones_own() -> None:
    class Descent(Optimizer):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for index, weight, grad in zip(indices, weights, grads, strict=True):
                self._update_count(index)
                weight -= self._get_lr(index) * grad

    weights = [np.ones(2), np.ones(3)]
    updater = get_updater(Descent(learning_rate=0.5))
    updater([0, 1], [np.ones(2), np.ones(3)], weights)
    assert updater.states == {0: None, 1: None}
    assert all((w == 0.5).all() for w in weights)
    again = get_updater(Descent(learning_rate=0.1))
    again.set_states(updater.get_states(dump_optimizer=True))
    again([0, 1], [np.ones(2), np.ones(3)], weights)
    assert all((w == 0).all() for w in weights)
    assert again.optimizer.num_update == 2


# ------------------------------------------------------------------------------------------------------- all or nothing

BAD: dict[str, tuple[Any, type[Exception]]] = {
    "shape": (lambda u, g, w, i: g.__setitem__(i, np.ones(77, np.float32)), ValueError),
    "dtype": (lambda u, g, w, i: g.__setitem__(i, np.ones(w[i].shape, np.int8)), TypeError),
    "no gradient": (lambda u, g, w, i: g.__setitem__(i, None), TypeError),
    "no weight": (lambda u, g, w, i: w.__setitem__(i, [1.0]), TypeError),
    "read-only": (lambda u, g, w, i: w[i].setflags(write=False), ValueError),
    "same weight twice": (lambda u, g, w, i: (w.__setitem__(i, w[1]), g.__setitem__(i, g[1])), ValueError),
    "gradient in another weight": (
        lambda u, g, w, i: g.__setitem__(i, w[3 if i == 0 else 0][: len(w[i])] if w[i].ndim else w[0][0, 0, ...]),
        ValueError,
    ),
    "row": (
        lambda u, g, w, i: (
            w.__setitem__(i, np.ones((4, 3), np.float32)),
            g.__setitem__(i, RowSparse(np.ones((1, 3), np.float32), np.array([4]), (4, 3))),
        ),
        IndexError,
    ),
    "lr_mult": (
        lambda u, g, w, i: setattr(
            u.optimizer, "param_dict", {INDICES[i]: type("P", (), {"lr_mult": -1.0, "wd_mult": 1.0})}
        ),
        ValueError,
    ),
    "wd": (lambda u, g, w, i: setattr(u.optimizer, "wd", math.nan), ValueError),
    "schedule": (
        lambda u, g, w, i: setattr(u.optimizer, "lr_scheduler", lambda n: math.nan if n > 2 else 0.1),
        ValueError,
    ),
    "length": (lambda u, g, w, i: g.pop(), ValueError),
}


@AGGREGATES
@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("started", [True, False], ids=["with states", "first call"])
@pytest.mark.parametrize(("spoil", "error"), BAD.values(), ids=BAD)
def test_all_or_nothing_over_a_list(
    spoil: Any, error: type[Exception], started: bool, at: int, aggregate_num: float | None
) -> None:
    updater, weights = get_updater(optimizer(aggregate_num=aggregate_num)), make_weights()
    run(updater, weights, range(2 if started else 0))
    if not started and spoil is BAD["schedule"][0]:
        updater.optimizer.begin_num_update = 2
    grads = make_grads(9, weights, rows=False)
    spoil(updater, grads, weights, at)
    if at == 4 and started and spoil is BAD["row"][0]:
        updater.states["four"] = np.zeros((4, 3), np.float32)

    def everything() -> Any:
        states = {
            i: [part.tobytes() for part in (s if isinstance(s, tuple) else (s,))] for i, s in updater.states.items()
        }
        arrays = [w.tobytes() if isinstance(w, np.ndarray) else w for w in weights]
        return states, arrays, dict(updater.optimizer._index_update_count), updater.optimizer.num_update

    before = everything()
    with pytest.raises(error):
        updater(INDICES, grads, weights)
    assert everything() == before


def test_a_bad_index_is_found_before_the_first_step_with_a_custom_scheduler() -> None:
    updater, weights = get_updater(AdaGrad(None, lr_scheduler=lambda t: 0.5)), [np.ones(2), np.ones(2)]
    with pytest.raises(TypeError, match=r"^index=1.5: must be an integer or a string"):
        updater([0, 1.5], [np.ones(2), np.ones(2)], weights)
    assert (weights[0] == 1).all()
    assert updater.states == updater.optimizer._index_update_count == {}


def test_states_of_what_was_done_before_a_step_raised_are_kept() -> None:
    class Fails(AdaGrad):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            if 1 in indices:
                raise RuntimeError("not this one")
            super().step(indices, weights, grads, states)

    updater = get_updater(Fails())
    weights = [np.ones(2), np.ones(2)]
    with pytest.raises(RuntimeError, match="not this one"):
        updater([0, 1], [np.full(2, 3.0)] * 2, weights)
    assert updater.states.keys() == {0}
    assert (updater.states[0] == 9).all()
    assert updater.optimizer._index_update_count == {0: 1}


# ----------------------------------------------------------------------------------------------------------- interrupts


class Stop(BaseException):
    """Of a signal handler that raises the same object each time, which refuses attributes unless ``is_open``."""

    def __init__(self, is_open: bool) -> None:
        object.__setattr__(self, "is_open", is_open)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "came_late" and not self.is_open:
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize("is_open", [True, False])
def test_the_same_interrupt_comes_late_and_then_early(is_open: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, real, are_late = Stop(is_open), dense_lists._update, iter([True, False])

    def interrupted(*given: Any) -> None:
        if next(are_late):
            real(*given)
        raise stop

    optimizer, weight, history = AdaGrad(0.5), np.ones(3, np.float32), np.zeros(3, np.float32)
    optimizer.update(0, weight, np.ones(3, np.float32), history)
    monkeypatch.setattr(dense_lists, "_update", interrupted)
    for _ in range(2):
        with pytest.raises(Stop):
            optimizer.update(0, weight, np.ones(3, np.float32), history)
    assert (history == 2).all()
    assert optimizer._index_update_count == {0: 2 if is_open else 1}


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("way", ["dense", "rows", "strided", "expression"])
def test_an_interrupt_is_counted_if_it_is_noticed_after_the_kernels(
    way: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python notices it when compiled code has returned, or while something is compiled or checked before."""

    def interrupted(*given: Any, **options: Any) -> None:
        if late:
            real(*given, **options)
        raise KeyboardInterrupt

    place, name = {
        "dense": (dense_lists, "_update"),
        "rows": (row_lists, "_update"),
        "strided": (cpu_dense, "_run") if late else (general_path, "validate"),
        "expression": (rule, "step") if late else (expressions, "validate"),
    }[way]
    real = getattr(place, name)
    updater = get_updater(AdaGrad(0.5, epsilon=0.0, use_fused_step=way != "expression"))
    weight = np.ones((6, 1), np.float32)[::2] if way == "strided" else np.ones((3, 1), np.float32)
    grad: Any = np.ones((3, 1), np.float32)
    if way == "rows":
        grad = RowSparse(grad, np.arange(3), (3, 1))
    updater(1, grad, weight.copy())  # compiles what is needed
    with monkeypatch.context() as patched:
        patched.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            updater(0, grad, weight)
    assert weight.ravel().tolist() == [0.5 if late else 1.0] * 3
    assert updater.optimizer._index_update_count == ({1: 1, 0: 1} if late else {1: 1})
    if late:
        assert updater.states[0].ravel().tolist() == [1.0] * 3
    updater(0, grad, weight)
    assert updater.states[0].ravel().tolist() == [2.0 if late else 1.0] * 3
    assert updater.optimizer._index_update_count == {1: 1, 0: 2 if late else 1}


@pytest.mark.parametrize("where", ["in another thread", "in the signal's handler"])
@pytest.mark.parametrize("way", ["dense", "rows"])
def test_another_list_that_is_done_makes_no_interrupt_late(
    way: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes before this list, which is large, is begun, while another one is finished."""
    updater, shape = get_updater(AdaGrad(0.5)), (400, 400)
    values = np.ones(shape, np.float32)
    grad: Any = RowSparse(values, np.arange(400), shape) if way == "rows" else values
    updater(0, grad, np.ones(shape, np.float32))

    def interrupted(*given: Any) -> None:
        monkeypatch.undo()

        def step() -> None:
            get_updater(AdaGrad(0.5))(0, grad, np.ones(shape, np.float32))

        if where == "in another thread":
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
        else:
            step()
        raise KeyboardInterrupt

    weight = np.ones(shape, np.float32)
    monkeypatch.setattr(outcomes, "on_threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        updater(0, grad, weight)
    assert (weight == 1).all()
    assert updater.optimizer._index_update_count == {0: 1}


def test_an_invalid_new_weight_of_a_list_is_named_by_its_position() -> None:
    updater = get_updater(AdaGrad())
    weights = [np.ones(2, np.float32), np.ones(2, np.int32)]
    with pytest.raises(TypeError, match=re.escape("weights[1]: dtype int32: must be")):
        updater(["a", "b"], weights, weights)
    with pytest.raises(TypeError, match=r"^weight: dtype int32: must be"):
        updater("b", weights[1], weights[1])
    assert not updater.states


def test_a_subclass_may_create_states_of_weights_that_are_not_ours() -> None:
    class Counting(Optimizer):
        def create_state_multi_precision(self, index: Any, weight: Any) -> Any:
            return np.zeros(1)

        def update_multi_precision(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for weight, grad, state in zip(weights, grads, states, strict=True):
                weight -= grad
                state += 1

    weights = [np.array([3, 4]), np.array([5])]
    updater = get_updater(Counting())
    updater([0, 1], [np.ones(2, int), np.ones(1, int)], weights)
    assert [w.tolist() for w in weights] == [[2, 3], [4]]
    assert updater.states[1] == 1
