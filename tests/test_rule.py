"""The array expressions: what the contract says, for NumPy arrays and torch tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from adagrad import rule
from support import HYPERS, assert_same_bits, normal, positive, rule_of, special, to_numpy

LIBRARIES = ["numpy", "torch"]


def library(name: str, array: np.ndarray) -> Any:
    return torch.from_numpy(array.copy()) if name == "torch" else array


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_update(name: str, dtype: Any, hyper: oracle.Hyper, row_wise: bool) -> None:
    rng = np.random.default_rng(0)
    for shape in [(7,), (5, 3), (4, 17), (3, 2, 16), (2, 100), (1, 1)]:
        weight, grad = normal(rng, shape, dtype), normal(rng, shape, dtype)
        history = positive(rng, rule.history_shape(shape, row_wise=row_wise), dtype)
        here = replace(hyper, row_wise=row_wise)
        expected = oracle.dense(weight, grad, history, here)
        given = [library(name, array) for array in (weight, grad, history)]
        found = rule.update(*given, here.lr, here.wd, rule_of(here))
        assert_same_bits(found[0], expected[0], f"weight {shape}")
        assert_same_bits(found[1], expected[1], f"history {shape}")
        for array, before in zip(given, (weight, grad, history), strict=True):
            assert_same_bits(array, before, "arguments are not written to")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_root_is_exact_where_autograd_records(dtype: Any) -> None:
    history = positive(np.random.default_rng(1), (4096,), dtype)
    recorded = torch.from_numpy(history.copy()).requires_grad_()
    found = rule.denominator(recorded, rule.Rule(epsilon=0.0))
    assert_same_bits(found.detach(), np.sqrt(history))
    found.sum().backward()
    assert_same_bits(recorded.grad, dtype(1) / (dtype(2) * np.sqrt(history)))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
def test_special_numbers(name: str, hyper: oracle.Hyper) -> None:
    numbers = special(np.float32)
    weight, grad, history = (a.reshape(-1).copy() for a in np.meshgrid(numbers, numbers, numbers))
    expected = oracle.dense(weight, grad, history, hyper)
    given = [library(name, array) for array in (weight, grad, history)]
    rule.step(*given, None, hyper.lr, hyper.wd, rule_of(hyper))
    assert_same_bits(given[0], expected[0], "weight")
    assert_same_bits(given[2], expected[1], "history")


def test_the_order_of_the_operations_is_what_is_computed() -> None:
    """Numbers for which each other order, a fused multiply-add or a double-precision shortcut gives other bits."""
    f = np.float32
    weight, grad, history = f(0.7), f(1.1), f(0.3)
    lr, wd, epsilon = f(0.1), f(0.01), f(1e-3)
    effective = grad + wd * weight
    accumulated = history + effective * effective
    expected = weight - lr * (effective / (np.sqrt(accumulated) + epsilon))
    hyper = rule.Rule(epsilon=1e-3)
    new, found = rule.update(*(np.array([x]) for x in (weight, grad, history)), 0.1, 0.01, hyper)
    assert found[0] == accumulated
    assert new[0] == expected


def test_scalars_are_rounded_once() -> None:
    """0.1 is rounded to float32 before it is multiplied with, not after."""
    grad = np.linspace(0.5, 2, 100, dtype=np.float32)
    effective = rule.effective_gradient(grad, grad, 0.0, rule.Rule(rescale_grad=0.1))
    assert_same_bits(effective, grad * np.float32(0.1))
    assert (effective != (grad.astype(np.float64) * 0.1).astype(np.float32)).any()


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
def test_decay_that_rounds_to_zero_is_no_decay(name: str, decoupled: bool) -> None:
    weight = np.array([np.inf, -0.0, 1.0], np.float32)
    grad, history = np.array([0.5, -0.0, -0.0], np.float32), np.ones(3, np.float32)
    hyper = oracle.Hyper(wd=1e-60, decoupled_decay=decoupled)
    expected = oracle.dense(weight, grad, history, replace(hyper, wd=0.0))
    given = [library(name, array) for array in (weight, grad, history)]
    new, accumulated = rule.update(*given, hyper.lr, hyper.wd, rule_of(hyper))
    assert_same_bits(new, expected[0])
    assert_same_bits(accumulated, expected[1])


@pytest.mark.parametrize("name", LIBRARIES)
def test_nan_passes_through_clip(name: str) -> None:
    grad = library(name, np.array([np.nan, np.inf, -np.inf, 2.0, -0.5], np.float32))
    clipped = to_numpy(rule.effective_gradient(grad, grad, 0.0, rule.Rule(clip_gradient=1.5)))
    np.testing.assert_array_equal(clipped, np.array([np.nan, 1.5, -1.5, 1.5, -0.5], np.float32))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 100, 257])
def test_mean_square(name: str, length: int) -> None:
    grad = normal(np.random.default_rng(length), (6, length), np.float32)
    expected = np.array([[oracle.mean_square(list(row), np.float32)] for row in grad])
    assert_same_bits(rule.mean_square(library(name, grad)), expected)


def test_mean_square_of_higher_dimensions_is_of_the_flattened_row() -> None:
    grad = normal(np.random.default_rng(1), (3, 4, 5, 2), np.float32)
    assert_same_bits(rule.mean_square(grad), rule.mean_square(grad.reshape(3, 40)).reshape(3, 1, 1, 1))
    assert rule.mean_square(np.ones(4, np.float32)).tolist() == [1, 1, 1, 1]
    assert rule.mean_square(np.ones((4, 0), np.float32)).tolist() == [[0], [0], [0], [0]]
    assert rule.mean_square(np.ones((0, 4), np.float32)).shape == (0, 1)


def test_mean_square_has_its_own_order() -> None:
    """Neither a running sum nor NumPy's pairwise one."""
    grad = normal(np.random.default_rng(2), (200, 99), np.float32)
    found = rule.mean_square(grad)[:, 0]
    running = np.zeros(200, np.float32)
    for column in grad.T:
        running = running + column * column
    assert (found != running / np.float32(99)).any()
    assert (found != (grad * grad).mean(axis=1)).any()


@pytest.mark.parametrize(("name", "dtype"), [("numpy", "i4"), ("numpy", ">i8"), ("torch", "i4"), ("torch", "i8")])
@pytest.mark.parametrize("longest", [1, 2, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1025])
def test_sum_duplicates(name: str, dtype: str, longest: int) -> None:
    rng = np.random.default_rng(longest)
    indices = rng.permutation(np.repeat([7, 3, 100, 5], [longest, 1, 2, max(longest - 1, 1)])).astype(dtype)
    values = normal(rng, (len(indices), 3), np.float32)
    rows, sums = rule.sum_duplicates(library(name, indices), library(name, values))
    assert to_numpy(rows).tolist() == [3, 5, 7, 100]
    for row, total in zip(to_numpy(rows), to_numpy(sums), strict=True):
        assert_same_bits(total, np.array(oracle.sum_occurrences(values[indices == row])), f"row {row}")


def test_sum_duplicates_in_another_order_or_chunk_has_other_bits() -> None:
    """So the test above can fail."""
    values = normal(np.random.default_rng(3), (1000, 8), np.float32)
    found = rule.sum_duplicates(np.zeros(1000, np.int64), values)[1][0]

    def in_chunks(size: int, order: slice) -> np.ndarray:
        total = np.zeros(8, np.float32)
        for start in range(0, 1000, size):
            chunk = np.zeros(8, np.float32)
            for row in values[order][start : start + size]:
                chunk = chunk + row
            total = total + chunk
        return total

    assert_same_bits(found, in_chunks(128, slice(None)))
    for size in (64, 127, 256, 1000):
        assert (in_chunks(size, slice(None)) != found).any()
    assert (in_chunks(128, slice(None, None, -1)) != found).any()


def test_a_row_depends_on_its_own_values_alone() -> None:
    rng = np.random.default_rng(4)
    mine = normal(rng, (300, 4), np.float32)
    alone = rule.sum_duplicates(np.full(300, 9), mine)[1][0]
    for others in (1, 77, 1000):
        where = np.sort(rng.permutation(300 + others)[:300])
        indices = rng.integers(10, 20, 300 + others)
        indices[where] = 9
        values = normal(rng, (300 + others, 4), np.float32)
        values[where] = mine
        assert_same_bits(rule.sum_duplicates(indices, values)[1][0], alone)


def test_no_rows() -> None:
    rows, sums = rule.sum_duplicates(np.empty(0, np.int64), np.empty((0, 3), np.float32))
    assert rows.shape == (0,)
    assert sums.shape == (0, 3)


@pytest.mark.parametrize("name", LIBRARIES)
def test_step_rounds_low_precision_on_write_alone(name: str) -> None:
    """A float16 history of ones would freeze at 2048; the history is float32."""
    weight, grad = library(name, np.zeros(1, np.float16)), library(name, np.ones(1, np.float16))
    history = library(name, np.full(1, 2048, np.float32))
    for _ in range(10):
        rule.step(weight, grad, history, None, 0.1, 0.0, rule.Rule())
    assert float(history[0]) == 2058


def test_step_rows_leaves_other_rows_alone() -> None:
    rng = np.random.default_rng(5)
    weight, history = normal(rng, (6, 2), np.float32), positive(rng, (6, 2), np.float32)
    before = weight.copy(), history.copy()
    indices, values = np.array([4, 1, 4], np.int32), normal(rng, (3, 2), np.float32)
    rule.step_rows(weight, indices, values, history, None, 0.1, 0.5, rule.Rule())
    expected = oracle.row_sparse(before[0], [4, 1, 4], values, before[1], oracle.Hyper(wd=0.5))
    assert_same_bits(weight, expected[0])
    assert_same_bits(history, expected[1])
    untouched = [0, 2, 3, 5]
    assert_same_bits(weight[untouched], before[0][untouched])


def test_torch_is_not_imported_to_ask() -> None:
    assert not rule.is_torch(np.ones(2))
    assert rule.is_torch(torch.ones(2))
    assert not rule.is_torch(None)


def test_history_shape() -> None:
    assert rule.history_shape((4, 5, 6), row_wise=True) == (4, 1, 1)
    assert rule.history_shape((4,), row_wise=True) == (4,)
    assert rule.history_shape((4, 5), row_wise=False) == (4, 5)
    assert math.prod(rule.history_shape((), row_wise=False)) == 1
