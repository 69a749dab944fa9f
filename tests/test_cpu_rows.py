"""The row-sparse kernels on the CPU against the oracle, bit for bit."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle
from adagrad import GroupAdaGrad, RowSparse
from adagrad.kernels import general_path
from adagrad.kernels.batch import Batch
from adagrad.kernels.cpu import row_passes, rows as cpu_rows
from adagrad.rule import Rule
from row_operands import FLOAT32, FLOAT64, HALF, MASTER, rows, some
from support import (
    HYPERS,
    KINDS,
    Kind,
    Operands,
    apply,
    assert_same,
    assert_same_bits,
    bits,
    check,
    expected,
    lay_out,
    layouts_of,
    normal,
    operands,
    positive,
    rule_of,
    special,
    update_plain,
)

RUNS = [1, 2, 3, 127, 128, 129, 255, 256, 257, 511, 512, 513, 640, 641, 1023, 1024, 1025, 1300]
"""Occurrences of one row, around the borders of chunks, and of runs that several workers share."""


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_shapes_and_hyper_parameters(kind: Kind, row_wise: bool) -> None:
    rng = np.random.default_rng(0)
    for name, hyper in HYPERS.items():
        for shape in [(7,), (5, 1), (6, 16), (4, 17), (9, 2, 3)]:
            o = rows(rng, kind, shape, some(rng, 12, shape[0]), row_wise=row_wise)
            check(o, replace(hyper, row_wise=row_wise), what=f"{name} {shape}")


@pytest.mark.parametrize("kind", [FLOAT32, HALF, MASTER], ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_runs(kind: Kind, run: int) -> None:
    """A frequent row among others, its occurrences anywhere in the list."""
    rng = np.random.default_rng(run)
    indices = rng.permutation([3] * run + [0, 1, 1, 9] + [8] * (run // 2))
    check(rows(rng, kind, (10, 2), indices), HYPERS["unclipped"])


@pytest.mark.parametrize("run", [2, 130, 1025])
def test_runs_row_wise(run: int) -> None:
    rng = np.random.default_rng(run)
    indices = rng.permutation([3] * run + [0, 1, 1, 9])
    check(rows(rng, FLOAT32, (10, 18), indices, row_wise=True), replace(HYPERS["unclipped"], row_wise=True))


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_rows_of_one_element(kind: Kind, row_wise: bool) -> None:
    """They are packed: as many as fit in a tile, in a batch of positions, and around; NaN and infinity among them."""
    rng, hyper = np.random.default_rng(21), replace(HYPERS["all"], row_wise=row_wise)
    borders = (row_passes.TILE, cpu_rows.BATCH, cpu_rows.BATCH + row_passes.TILE)
    for n in (border + beside for border in borders for beside in (-1, 0, 1)):
        ascending = np.sort(rng.permutation(n + 50)[:n])
        often = np.concatenate([ascending, ascending[::3], [ascending[0]] * 300, [ascending[-1]] * 127])
        for name, indices, threads in (
            ("ascending", ascending, 1),
            ("ascending", ascending, 3),
            ("each once", rng.permutation(ascending), 1),
            ("each once", rng.permutation(ascending), 2),
            ("some twice, some often", rng.permutation(often), 1),
            ("some twice, some often", rng.permutation(often), 3),
        ):
            o = rows(rng, kind, (n + 50, 1) if threads > 1 else (n + 50,), indices, row_wise=row_wise)
            o.weight[ascending[::97]] = np.nan
            o.grad.values[::101] = np.inf
            check(o, hyper, threads=threads, what=f"{name} {n}, {threads} threads")


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("threads", [2, 3, 7, 64])
@pytest.mark.parametrize("kind", [FLOAT32, MASTER], ids=str)
def test_any_number_of_threads(kind: Kind, threads: int) -> None:
    rng = np.random.default_rng(1)
    cases: dict[str, Any] = {
        "nothing": [],
        "one": [4],
        "one row alone": [4] * 1300,
        "distinct": rng.permutation(10),
        "ascending": np.arange(10),
        "few": some(rng, 20, 10),
        "many": some(rng, 3000, 10),
        "long at both ends": [0] * 700 + [5] * 3 + [9] * 900,
        "long neighbours": [3] * 513 + [4] * 514 + [5] * 512 + [6] * 1025,
        "long, alternating": np.tile([2, 7, 1], 600),
    }
    for name, indices in cases.items():
        o = rows(rng, kind, (10, 3), np.asarray(indices, np.int64))
        check(o, HYPERS["unclipped"], threads=threads, what=f"{name}, {threads} threads")


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_row_wise(threads: int) -> None:
    rng = np.random.default_rng(2)
    o = rows(rng, FLOAT32, (10, 17), some(rng, 1500, 10), row_wise=True)
    check(o, replace(HYPERS["unclipped"], row_wise=True), threads=threads)


@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_large(row_wise: bool) -> None:
    """As large as it takes for threads to be used, against the array expression."""
    rng = np.random.default_rng(3)
    hyper = replace(HYPERS["unclipped"], row_wise=row_wise)
    o = rows(rng, FLOAT32, (3000, 20), some(rng, 40_000, 3000), row_wise=row_wise)
    other = o.copy()
    apply([o], [hyper])
    apply([other], [hyper], fused=False)
    assert_same(o, other)


def test_special_numbers() -> None:
    rng = np.random.default_rng(4)
    for kind in (FLOAT32, HALF, MASTER):
        for hyper in HYPERS.values():
            o = rows(rng, kind, (40, 3), rng.integers(0, 40, 60))
            for array in (o.weight, o.grad.values, *([] if o.master is None else [o.master])):
                where = rng.integers(0, array.size, 30)
                array.reshape(-1)[where] = rng.choice(special(array.dtype), 30)
            check(o, hyper)


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64, HALF, MASTER], ids=str)
@pytest.mark.parametrize("length", [1, 3, 16, 17])
@pytest.mark.parametrize("run", [2, 128, 129, 256, 300])
def test_a_sum_of_negative_zeros_is_a_negative_zero(kind: Kind, length: int, run: int) -> None:
    """-0.0 - -0.0 is 0.0, but -0.0 - 0.0 is -0.0: a sum that began with 0.0 would show in the weight."""
    o = rows(np.random.default_rng(run), kind, (2, length), [1] * run)
    for array in (o.grad.values, o.weight, *([] if o.master is None else [o.master])):
        array[...] = -0.0
    check(o, HYPERS["plain"])
    assert not np.signbit(o.weight[1].astype(np.float32)).any()


@pytest.mark.skipif(sys.platform != "linux", reason="files of 8 GB that take no space")
@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("path", ["fast, one thread", "fast, three threads", "general"])
def test_rows_that_32_bits_cannot_number(path: str, tmp_path: Path) -> None:
    """Weights of which only the pages of five rows exist, against weights of five rows; offsets beyond 4 GiB too."""
    rng, hyper, height = np.random.default_rng(30), HYPERS["unclipped"], 2**31 + 1
    present, given, want = np.array([0, 1, 2**30, 2**31 - 1, 2**31]), [], []
    for i, few in enumerate([[4, 0, 3, 4, 1, 4, 2, 0] + [3] * 130, [1, 2, 3, 4], [4, 3, 0]]):
        o = rows(rng, HALF, (5,), few)
        large = []
        for name, array in (("weight", o.weight), ("history", o.history)):
            large.append(np.memmap(tmp_path / f"{name} {i}", array.dtype, "w+", shape=(height,)))
            large[-1][present] = array
        given.append(Operands(large[0], RowSparse(o.grad.values, present[few], (height,)), large[1]))
        want.append(expected(o, hyper))
    if path == "general":
        lists = [[getattr(o, name) for o in given] for name in ("weight", "grad", "history")]
        general_path.prepare([Batch(rule_of(hyper), *lists, [], [hyper.lr], [hyper.wd])]).run()
    else:
        assert update_plain(given, [hyper], threads=3 if "three" in path else 1)
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same_bits(o.weight[present], w.weight, f"weight {i}")
        assert_same_bits(o.history[present], w.history, f"history {i}")


def test_several_weights_and_dense_ones_in_one_call() -> None:
    rng = np.random.default_rng(14)
    given = [
        rows(rng, FLOAT32, (9, 4), some(rng, 30, 9)),
        operands(rng, FLOAT32, (9, 4)),
        rows(rng, MASTER, (5,), some(rng, 30, 5)),
        operands(rng, FLOAT64, (3,)),
        rows(rng, FLOAT64, (5, 2, 2), [4]),
    ]
    hypers = [replace(HYPERS["unclipped"], lr=0.1 * (i + 1), wd=0.01 * i) for i in range(len(given))]
    want = [expected(o, h) for o, h in zip(given, hypers, strict=True)]
    apply(given, hypers)
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")


def test_the_order_of_the_other_rows_means_nothing() -> None:
    """A row's bits are those it has alone, wherever its occurrences stand."""
    rng = np.random.default_rng(16)
    mine = normal(rng, (700, 3), np.float32)
    weight, history = normal(rng, (5, 3), np.float32), positive(rng, (5, 3), np.float32)
    alone = Operands(weight.copy(), RowSparse(mine, np.full(700, 2), (5, 3)), history.copy())
    apply([alone], [HYPERS["unclipped"]])
    for others in (1, 50, 3000):
        where = np.sort(rng.permutation(700 + others)[:700])
        indices, values = rng.choice([0, 1, 4], 700 + others), normal(rng, (700 + others, 3), np.float32)
        indices[where], values[where] = 2, mine
        o = Operands(weight.copy(), RowSparse(values, indices, (5, 3)), history.copy())
        apply([o], [HYPERS["unclipped"]])
        assert_same_bits(o.weight[2], alone.weight[2])
        assert_same_bits(o.history[2], alone.history[2])


# --------------------------------------------------------------------------------------------- what must not be touched


@pytest.mark.parametrize("kind", [FLOAT32, MASTER], ids=str)
@pytest.mark.parametrize("hyper", [HYPERS["decay"], HYPERS["decoupled"]], ids=["coupled", "decoupled"])
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_rows_not_present_keep_their_bits(kind: Kind, hyper: oracle.Hyper, row_wise: bool) -> None:
    """Weight decay included; NaN rows and what lies between rows too."""
    rng = np.random.default_rng(5)
    o = rows(rng, kind, (12, 4), [3, 8, 3], row_wise=row_wise)
    o.weight[5] = np.nan
    before = o.copy()
    apply([o], [replace(hyper, row_wise=row_wise)])
    absent = [r for r in range(12) if r not in (3, 8)]
    for name in ("weight", "history", "master"):
        if (array := getattr(before, name)) is not None:
            assert array[absent].tobytes() == getattr(o, name)[absent].tobytes(), name
    assert (bits(o.weight[[3, 8]]) != bits(before.weight[[3, 8]])).any()


def test_a_gradient_of_zero_is_present() -> None:
    """A row of zeros decays; a row that is not there does not."""
    weight, history = np.ones((2, 1), np.float32), np.ones((2, 1), np.float32)
    grad = RowSparse(np.zeros((1, 1), np.float32), np.array([1]), (2, 1))
    apply([Operands(weight, grad, history)], [oracle.Hyper(wd=0.5)])
    assert weight[0] == 1
    assert weight[1] < 1


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (3, 0), (4,), (0,), (2, 0, 3)])
def test_no_rows(fused: bool, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    o = rows(rng, FLOAT32, shape, np.empty(0, np.int64))
    before = o.copy()
    apply([o], [HYPERS["decay"]], fused=fused)
    assert_same(o, before)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_rows_without_elements(fused: bool, row_wise: bool) -> None:
    rng = np.random.default_rng(7)
    o = rows(rng, FLOAT32, (4, 0), [1, 1, 3], row_wise=row_wise)
    before = o.copy()
    apply([o], [replace(HYPERS["decay"], row_wise=row_wise)], fused=fused)
    assert_same(o, before)


@pytest.mark.parametrize("dtypes", [["f4"], [">f4"], ["f4", ">f4"]])
def test_rows_without_columns_change_no_history(dtypes: list[str]) -> None:
    weights = [np.zeros((3, 0), dtype) for dtype in dtypes]
    states = [np.zeros((3, 1), dtype) for dtype in dtypes]
    grads = [RowSparse(np.zeros((2, 0), dtype), np.array([0, 2]), (3, 0)) for dtype in dtypes]
    GroupAdaGrad().update(list(range(len(dtypes))), weights, grads, states)
    assert not np.any(states)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", [FLOAT32, MASTER], ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_layouts(kind: Kind, row_wise: bool) -> None:
    rng = np.random.default_rng(8)
    hyper = replace(HYPERS["unclipped"], row_wise=row_wise)
    for shape in [(9,), (6, 5), (4, 3, 6)]:
        for operand in ("weight", "values", "history", "master"):
            plain = rows(rng, kind, shape, some(rng, 11, shape[0]), row_wise=row_wise)
            array = plain.grad.values if operand == "values" else getattr(plain, operand)
            for layout in layouts_of(array.dtype) if array is not None else ():
                o = plain.copy()
                if operand == "values":
                    o.grad = RowSparse(lay_out(array, layout), o.grad.indices, shape)
                else:
                    setattr(o, operand, lay_out(array, layout))
                check(o, hyper, what=f"{operand} {layout} {shape}")


@pytest.mark.usefixtures("always_parallel")
def test_layouts_with_threads_and_long_runs() -> None:
    rng = np.random.default_rng(9)
    for layout in layouts_of(np.dtype(np.float32)):
        o = rows(rng, FLOAT32, (8, 3), some(rng, 1500, 8))
        o.weight, o.grad = lay_out(o.weight, layout), RowSparse(lay_out(o.grad.values, layout), o.grad.indices, (8, 3))
        check(o, HYPERS["decay"], threads=3, what=layout)


@pytest.mark.parametrize("dtype", ["i4", "i8"])
@pytest.mark.parametrize(
    "layout", ["contiguous", "rows reversed", "rows stepped", "byte-swapped", "misaligned", "misaligned, byte-swapped"]
)
def test_indices(dtype: str, layout: str) -> None:
    rng = np.random.default_rng(10)
    indices = lay_out(some(rng, 40, 9, dtype), layout) if layout != "contiguous" else some(rng, 40, 9, dtype)
    check(rows(rng, FLOAT32, (9, 2), indices), HYPERS["decay"])


def test_read_only_and_broadcast_gradient() -> None:
    rng = np.random.default_rng(11)
    values = np.broadcast_to(normal(rng, 3, np.float32), (20, 3))
    indices = np.broadcast_to(np.int64(2), 20)
    check(operands(rng, FLOAT32, (4, 3), grad=RowSparse(values, indices, (4, 3))), HYPERS["unclipped"])


def test_interleaved_views_of_one_table() -> None:
    """Weight and history as the halves of each row of one array, as some embedding tables are kept."""
    rng = np.random.default_rng(12)
    table = np.concatenate([normal(rng, (10, 4), np.float32), positive(rng, (10, 4), np.float32)], axis=1)
    indices = some(rng, 30, 10)
    grad = RowSparse(normal(rng, (30, 4), np.float32), indices, (10, 4))
    check(Operands(table[:, :4], grad, table[:, 4:]), HYPERS["unclipped"])
    check(Operands(table[:, ::2], grad, table[:, 1::2]), HYPERS["unclipped"])


def test_neighbouring_memory_is_not_touched() -> None:
    rng = np.random.default_rng(13)
    for layout in ("rows stepped", "columns stepped", "reversed and stepped"):
        o = rows(rng, FLOAT32, (6, 5), some(rng, 700, 6))
        o.weight, o.history = lay_out(o.weight, layout), lay_out(o.history, layout)
        apply([o], [HYPERS["unclipped"]])
        for array in (o.weight, o.history):
            assert np.count_nonzero((array if array.base is None else array.base) == 77) == 60


def test_values_live_until_the_launch() -> None:
    """Another thread may give the gradient other values between the checks and the update."""
    weight, history, values = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32), np.ones((1, 2), np.float32)
    grad, gone = RowSparse(values, np.array([1]), (3, 2)), weakref.ref(values)
    prepared = general_path.prepare([Batch(Rule(epsilon=0.0), [weight], [grad], [history], [], [0.5], [0.0])])
    del grad, values
    assert gone() is not None
    prepared.run()
    assert weight.tolist() == [[1, 1], [0.5, 0.5], [1, 1]]
    del prepared
    assert gone() is None
