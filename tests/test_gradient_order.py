"""Gradients in another order than their weights': copied for the fast path, unless that would hide something."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import adagrad
import support
from adagrad import AdaGrad, RowSparse, kernels
from adagrad.kernels import general_path, gradient_order
from support import HYPERS, KINDS, LAYOUTS, Kind

SHAPE = 5, 7


@pytest.fixture
def only_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fast path does not take fails."""
    support.refuse_the_general_path(monkeypatch)


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("weights", ["contiguous", "fortran"])
@pytest.mark.parametrize("grads", [name for name in LAYOUTS if "swapped" not in name and name != "misaligned"])
def test_gradients_of_any_order_take_the_fast_path(kind: Kind, weights: str, grads: str) -> None:
    o = support.operands(np.random.default_rng(1), kind, SHAPE)
    for name in ("weight", "history", "master"):
        if getattr(o, name) is not None:
            setattr(o, name, LAYOUTS[weights](getattr(o, name)))
    o.grad = LAYOUTS[grads](o.grad)
    support.check(o, HYPERS["decay"])


@pytest.mark.usefixtures("only_fast")
def test_lists_of_all_kinds() -> None:
    """A broadcast gradient, one in order, one that is not, a row-sparse one; a row-wise history has its own test."""
    rng = np.random.default_rng(2)
    given = [support.operands(rng, KINDS[0], SHAPE) for _ in range(3)]
    given[0].grad = np.broadcast_to(np.float32(0.5), SHAPE)
    given[2].grad = LAYOUTS["fortran"](given[2].grad)
    rows = RowSparse(np.ones((2, 7), np.float32), np.array([3, 1]), SHAPE)
    given.append(support.operands(rng, KINDS[0], SHAPE, grad=rows))
    hyper = HYPERS["all"]
    want = [support.expected(o, hyper) for o in given]
    support.apply(given, [hyper])
    for o, expected in zip(given, want, strict=True):
        support.assert_same(o, expected)


@pytest.mark.usefixtures("only_fast")
def test_row_wise() -> None:
    o = support.operands(np.random.default_rng(3), KINDS[0], SHAPE, row_wise=True)
    o.grad = LAYOUTS["fortran"](o.grad)
    support.check(o, support.oracle.Hyper(row_wise=True))


@pytest.mark.parametrize(
    "shared",
    [lambda weight, _: weight.T, lambda _, history: history.T, lambda weight, _: weight[:, ::-1]],
    ids=["weight", "history", "reversed weight"],
)
@pytest.mark.parametrize("memory", ["an array's", "a buffer's"])
def test_a_copy_does_not_hide_shared_memory(shared: Callable[[Any, Any], np.ndarray], memory: str) -> None:
    weight, history = (np.ones((4, 4), np.float32) for _ in range(2))
    if memory == "a buffer's":
        weight, history = (
            np.frombuffer(bytearray(each.tobytes()), np.float32).reshape(4, 4) for each in (weight, history)
        )
    with pytest.raises(ValueError, match=r"shares memory with"):
        AdaGrad(0.5).update(0, weight, shared(weight, history), history)
    np.testing.assert_array_equal(weight, np.ones((4, 4)))
    np.testing.assert_array_equal(history, np.ones((4, 4)))


@pytest.mark.parametrize("owner", ["a buffer", "the weight", "the gradient"])
def test_two_views_of_a_buffer_share_it(owner: str) -> None:
    """Neither of them knows the other."""
    memory = np.zeros((4, 4), np.float32)
    weight, grad = (np.frombuffer(memory.data, np.float32).reshape(4, 4) for _ in range(2))
    if owner == "the weight":
        weight = memory
    elif owner == "the gradient":
        grad = memory
    with pytest.raises(ValueError, match="shares memory"):
        AdaGrad(0.5).update(0, weight, grad.T, np.zeros((4, 4), np.float32))
    assert not memory.any()


@pytest.mark.parametrize("front_end", ["AdaGrad", "adagrad.torch"])
@pytest.mark.parametrize("which", ["weight", "history"])
def test_tensors_that_are_parts_of_a_buffer_share_it(which: str, front_end: str) -> None:
    """Neither has the start of its memory in common with the other."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[test]'")
    memory = np.ones(24, np.float32)
    written, grad = torch.from_numpy(memory[:12].reshape(3, 4)), torch.from_numpy(memory[6:18].reshape(4, 3)).T
    other = torch.ones(3, 4)
    weight, history = (written, other) if which == "weight" else (other, written)
    step: Callable[[], None] = functools.partial(AdaGrad(0.5).update, 0, weight, grad, history)
    if front_end == "adagrad.torch":
        p = torch.nn.Parameter(weight)
        optimizer = adagrad.torch.Adagrad([p], lr=0.5)
        p.grad, optimizer.state[p]["sum"], step = grad, history, optimizer.step
    with pytest.raises(ValueError, match="shares memory"):
        step()
    assert (memory == 1).all()


@pytest.mark.parametrize("grads", [1, 2])
def test_more_is_left_where_it_is(grads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call, however many gradients that is."""
    monkeypatch.setattr(gradient_order, "MOST_COPIED", 20)
    taken: list[int] = []
    prepare = general_path.prepare
    monkeypatch.setattr(general_path, "prepare", lambda *a, **b: (taken.append(0), prepare(*a, **b))[1])
    given = [support.operands(np.random.default_rng(i), KINDS[0], (4, 5)) for i in range(grads)]
    for o in given:
        o.grad = LAYOUTS["fortran"](o.grad)
    want = [support.expected(o, HYPERS["all"]) for o in given]
    support.apply(given, [HYPERS["all"]])
    for o, expected in zip(given, want, strict=True):
        support.assert_same(o, expected)
    assert len(taken) == grads - 1


@pytest.mark.parametrize("layout", ["every other", "backwards"])
def test_nothing_of_the_size_of_a_weight_with_gaps_is_allocated(layout: str) -> None:
    memory = np.ones((1000, 200), np.float32)
    weight = memory[:, ::2] if layout == "every other" else memory[::-1]
    grad, history = np.ones_like(weight, order="C"), np.zeros_like(weight, order="C")
    optimizer = AdaGrad()
    optimizer.update(0, weight, grad, history)
    tracemalloc.start()
    try:
        optimizer.update(0, weight, grad, history)
        assert tracemalloc.get_traced_memory()[1] < weight.nbytes / 2
    finally:
        tracemalloc.stop()


def test_tensors_of_any_order_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[test]'")
    given = [support.operands(np.random.default_rng(i), KINDS[0], SHAPE) for i in range(2)]
    want = [support.expected(o, HYPERS["all"]) for o in given]
    lists = [[torch.from_numpy(getattr(o, name)) for o in given] for name in ("weight", "grad", "history")]
    lists[1] = [grad.T.contiguous().T for grad in lists[1]]
    hyper = HYPERS["all"]
    support.refuse_the_general_path(monkeypatch)
    kernels.update(*lists, [hyper.lr], [hyper.wd], support.rule_of(hyper), fused=True)
    for o, expected in zip(given, want, strict=True):
        support.assert_same(o, expected)


def test_what_the_checks_refuse_is_named_as_ever() -> None:
    weight, grad = np.ones((3, 4), np.float32), np.ones((4, 3), np.float64).T
    with pytest.raises(TypeError, match=r"grads\[0\]: dtype float64"):
        AdaGrad(0.5).update([0], [weight], [grad], [np.zeros((3, 4), np.float32)])
    with pytest.raises(ValueError, match=r"grads\[0\]: shape \(4, 3\)"):
        AdaGrad(0.5).update([0], [weight], [np.ones((4, 3), np.float32)], [np.zeros((3, 4), np.float32)])
    np.testing.assert_array_equal(weight, np.ones((3, 4)))
