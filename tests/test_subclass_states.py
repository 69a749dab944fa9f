"""States of a subclass's own: in lists, saved and loaded, and checked only where they are the rule's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, Optimizer, RowSparse, Updater, get_updater
from support import assert_same_bits

# ------------------------------------------------------------------------------------------------------------- in lists


class WithMomentum(AdaGrad):
    """A step and states of its own, which the rule's checks know nothing of."""

    def create_state(self, index: Any, weight: Any) -> Any:
        return np.zeros_like(weight), np.zeros_like(weight)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, (history, momentum) in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            history += grad * grad
            momentum[...] = 0.5 * momentum + grad
            weight -= self._get_lr(index) * momentum / (np.sqrt(history) + self.epsilon)


class WithMasterLikeState(WithMomentum):
    """The same by MXNet's other way to make states."""

    def create_state_multi_precision(self, index: Any, weight: Any) -> Any:
        return self.create_state(index, weight)


class WithAFusedStep(WithMomentum):
    def fused_step(self, *lists: Any) -> None:
        self.step(*lists)


class Calling(AdaGrad):
    """Overrides both, and changes nothing."""

    def create_state(self, index: Any, weight: Any) -> Any:
        return super().create_state(index, weight)

    def step(self, *lists: Any) -> None:
        super().step(*lists)


@pytest.mark.parametrize("bad", [np.ones(2), RowSparse(np.ones((1, 2)), np.array([7]), (3, 2))], ids=["dense", "rows"])
def test_a_subclass_with_the_rules_states_is_checked_as_a_whole(bad: Any) -> None:
    weights = [np.ones(2), np.ones((3, 2))]
    updater = get_updater(Calling(0.5))
    with pytest.raises((ValueError, IndexError), match=r"grads\[1\]"):
        updater([0, 1], [np.ones(2), bad], weights)
    assert all((w == 1).all() for w in weights)
    assert updater.states == {}
    assert updater.optimizer.num_update == 0
    states = [updater.optimizer.create_state(i, w) for i, w in enumerate(weights)]
    with pytest.raises((ValueError, IndexError), match=r"grads\[1\]"):
        updater.optimizer.update([0, 1], weights, [np.ones(2), bad], states)
    assert all((w == 1).all() for w in weights)


@pytest.mark.parametrize("klass", [WithMomentum, WithMasterLikeState, WithAFusedStep])
@pytest.mark.parametrize("aggregate_num", [1, 2])
def test_states_of_ones_own_in_lists(aggregate_num: int, klass: type[AdaGrad]) -> None:
    updater = get_updater(klass(0.5, epsilon=0.0, aggregate_num=aggregate_num))
    weights, grads = [np.ones(2, np.float32) for _ in range(2)], [np.ones(2, np.float32)] * 2
    for expected in (0.5, 0.5 - 0.5 * 1.5 / np.sqrt(2)):
        updater([0, 1], grads, weights)
        assert np.allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("where", [0, 1])
def test_a_state_without_the_master_copy_is_refused_before_anything_changes(where: int) -> None:
    """Where a subclass takes the step, which gets master copies."""

    class Passes(AdaGrad):
        def update(self, *given: Any) -> None:
            super().update(*given)

    class Steps(AdaGrad):
        def step(self, *given: Any) -> None:
            super().step(*given)

    for klass in (Passes, Steps):
        updater = get_updater(klass(multi_precision=True))
        updater.states[where] = np.zeros(2, np.float32)
        weights, grads = [np.ones(2, np.float16) for _ in range(2)], [np.ones(2, np.float16) for _ in range(2)]
        with pytest.raises(ValueError, match=r"states\[\d\]: one history: must be a pair \(master copy, state\)"):
            updater([0, 1], grads, weights)
        assert [w.tolist() for w in weights] == [[1.0, 1.0]] * 2
        assert (updater.optimizer._index_update_count, list(updater.states)) == ({}, [where])


# ----------------------------------------------------------------------------------------------------- saved and loaded


class Adamish(Optimizer):
    """Keeps states in structures of its own."""

    def __init__(self, structure: Any, **kwargs: Any) -> None:
        super().__init__(learning_rate=0.5, use_fused_step=False, **kwargs)
        self.structure = structure

    def create_state(self, index: Any, weight: Any) -> Any:
        return self.structure(weight)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            first = state[0] if isinstance(state, (tuple, list)) else state
            first[...] += grad
            weight[...] -= self._get_lr(index) * first


@pytest.mark.parametrize("multi_precision", [False, True])
@pytest.mark.parametrize(
    "structure",
    [
        lambda w: (np.zeros_like(w), np.zeros_like(w)),
        lambda w: [np.zeros_like(w), [np.zeros_like(w), None]],
        lambda w: (np.zeros_like(w), (np.zeros_like(w), np.zeros_like(w))),
    ],
)
def test_states_of_any_structure_go_on_after_loading(structure: Any, multi_precision: bool) -> None:
    def make() -> Updater:
        return get_updater(Adamish(structure, multi_precision=multi_precision))

    weights = [np.ones(3, np.float16) for _ in range(2)]
    whole, saved, again = make(), make(), make()
    for _ in range(2):
        whole(0, np.ones(3, np.float16), weights[0])
        saved(0, np.ones(3, np.float16), weights[1])
    again.set_states(saved.get_states(True))
    whole(0, np.ones(3, np.float16), weights[0])
    again(0, np.ones(3, np.float16), weights[1])
    assert_same_bits(weights[1], weights[0])
    assert whole.get_states() == again.get_states()


def test_loaded_states_of_another_structure_are_refused() -> None:
    saved, again = get_updater(Adamish(lambda w: (w * 0, (w * 0, w * 0)))), get_updater(Adamish(lambda w: (w * 0,) * 2))
    saved(0, np.ones(3, np.float32), np.ones(3, np.float32))
    again.set_states(saved.get_states())
    with pytest.raises(ValueError, match=r"states\[0\]\[1\]: .* must be one history"):
        again(0, np.ones(3, np.float32), np.ones(3, np.float32))


def test_loaded_bfloat16_states_of_tensors() -> None:
    def make() -> Updater:
        return get_updater(Adamish(torch.zeros_like))

    weight, saved, again = torch.ones(3, dtype=torch.bfloat16), make(), make()
    saved(0, torch.ones_like(weight), weight)
    again.set_states(saved.get_states())
    again(0, torch.ones_like(weight), weight)
    assert again.states[0].dtype == torch.bfloat16
    assert again.states[0].tolist() == [2.0] * 3


# ----------------------------------------------------------------------------------------------------- left to the step


def test_states_of_a_users_own_kind_are_left_to_its_step() -> None:
    class Own(AdaGrad):
        """Its states are arrays, too, of another shape."""

        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for weight, grad, state in zip(weights, grads, states, strict=True):
                state += 1
                weight -= grad

        def create_state(self, index: Any, weight: Any) -> Any:
            return np.zeros(7)

    updater, weights = get_updater(Own()), [np.ones(2), np.ones(2)]
    updater([0, 1], [np.ones(2)] * 2, weights)
    assert all((weight == 0).all() for weight in weights)


class OwnStates(AdaGrad):
    """States of another form than the library's, in a step of its own."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self._update_count(list(indices))


def test_states_for_a_step_of_ones_own_are_not_checked_for_sparse_gradients_without_kernels() -> None:
    class Own(OwnStates):
        def create_state(self, index: Any, weight: Any) -> Any:
            return {"any": "thing"}

    weights = [np.ones((3, 2), np.float32) for _ in range(2)]
    updater = get_updater(Own(use_fused_step=False))
    updater([0, 1], [RowSparse(np.ones((1, 2), np.float32), np.array([1]), (3, 2)) for _ in weights], weights)
    assert updater.optimizer._index_update_count == {0: 1, 1: 1}


def test_pairs_that_are_not_master_copies_are_not_checked_as_such() -> None:
    class Own(OwnStates):
        def create_state(self, index: Any, weight: Any) -> Any:
            return np.zeros_like(weight), np.zeros(weight.shape, np.float32)

    weights = [np.ones((3, 2), np.float16) for _ in range(2)]
    updater = get_updater(Own())
    updater([0, 1], [np.ones_like(w) for w in weights], weights)
    assert updater.optimizer._index_update_count == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("klass", "shape", "dtype"), [(AdaGrad, (3, 2), np.float64), (GroupAdaGrad, (), np.float32)], ids=["dtype", "0-d"]
)
def test_histories_of_another_form_are_not_checked(klass: type[AdaGrad], shape: Any, dtype: Any) -> None:
    class Own(klass):  # type: ignore[misc, valid-type]
        def create_state(self, index: Any, weight: Any) -> Any:
            return np.zeros(shape, dtype)

        step = OwnStates.step

    weights = [np.ones(shape, np.float32), np.ones(shape, np.float32)]
    updater = get_updater(Own())
    updater([0, 1], [np.ones_like(w) for w in weights], weights)
    assert updater.optimizer._index_update_count == {0: 1, 1: 1}
