"""Optimizers, steps, rates and counts of a subclass's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from adagrad import AdaGrad, Optimizer, RowSparse, get_updater
from adagrad.lr_scheduler import FactorScheduler, LRScheduler
from support import BFLOAT16, assert_same_bits

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


# -------------------------------------------------------------------------------------------- steps of a subclass's own


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


# --------------------------------------------------------------------------------- rates and counts of a subclass's own


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


def test_a_count_that_a_subclass_keeps_in_its_own_way() -> None:
    class Together(AdaGrad):
        """One count for all, as where several weights are one to the schedule."""

        def _update_count(self, index: Any) -> None:
            self.num_update += 1

    optimizer, weight = Together(0.5), np.ones(1)
    for n in (1, 2):
        optimizer.update(0, weight, np.ones(1), np.zeros(1))
        assert (optimizer.num_update, optimizer._index_update_count) == (n, {})


class Halves(AdaGrad):
    """A step that updates halves of weights, by keys of its own."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, *arrays in zip(indices, weights, grads, states, strict=True):
            keys: Sequence[str] = [f"{index}/a", f"{index}/b"]
            super().step(keys, *([array[:1], array[1:]] for array in arrays))


@pytest.mark.parametrize("mult", [{}, {"1/a": 0.5}])
def test_a_step_may_use_keys_of_its_own_in_a_mixed_list(mult: dict[Any, float]) -> None:
    results = []
    for sparse in (False, True):
        updater = get_updater(Halves(0.1, aggregate_num=2))
        updater.optimizer.set_lr_mult(mult)
        weights = [np.ones((2, 2)), np.ones(2)]
        rows = RowSparse(np.ones((2, 2)), np.array([0, 1]), (2, 2))
        updater([0, 1], [rows if sparse else np.ones((2, 2)), np.ones(2)], weights)
        assert updater.optimizer._index_update_count.keys() >= {"1/a", "1/b"}
        results.append([w.tolist() for w in weights])
    assert results[0] == results[1]
