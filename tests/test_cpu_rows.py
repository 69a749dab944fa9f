"""The row-sparse kernels on the CPU against the oracle, bit for bit."""

from __future__ import annotations

import re
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import oracle
from adagrad import GroupAdaGrad, RowSparse
from adagrad.kernels import cpu_rows, fast_path, general_path, outcomes, records, row_groups, row_lists
from adagrad.kernels.batch import Batch
from adagrad.kernels.rows import inspect_rows
from adagrad.rule import Rule
from support import (
    DTYPES,
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

FLOAT32, FLOAT64 = KINDS[:2]
MASTER = Kind("bfloat16", "float32", True)
HALF = Kind("float16", "float16")

RUNS = [1, 2, 3, 127, 128, 129, 255, 256, 257, 511, 512, 513, 640, 641, 1023, 1024, 1025, 1300]
"""Occurrences of one row, around the borders of chunks, and of runs that several workers share."""


def rows(
    rng: np.random.Generator,
    kind: Kind,
    shape: tuple[int, ...],
    indices: Any,
    *,
    row_wise: bool = False,
) -> Operands:
    indices = np.asarray(indices)
    values = normal(rng, (len(indices), *shape[1:]), DTYPES[kind.grad])
    return operands(rng, kind, shape, row_wise=row_wise, grad=RowSparse(values, indices, shape))


def some(rng: np.random.Generator, count: int, of: int, dtype: Any = np.int64) -> np.ndarray:
    """Row ids of which a few are frequent, unsorted."""
    return np.minimum(rng.zipf(1.5, count) - 1, of - 1).astype(dtype)


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
    borders = (cpu_rows.TILE, cpu_rows.BATCH, cpu_rows.BATCH + cpu_rows.TILE)
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


# -------------------------------------------------------------------------------------------- what must not be touched


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


# -------------------------------------------------------------------------------------------------------------- memory


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


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_plain_updates_take_the_fast_path(kind: Kind, row_wise: bool) -> None:
    """If this fails after an upgrade of NumPy, updates of few rows are slow, not wrong."""
    rng = np.random.default_rng(18)
    for dtype in (np.int32, np.int64):
        o = rows(rng, kind, (9, 4), some(rng, 30, 9, dtype), row_wise=row_wise)
        wrong = RowSparse(o.grad.values.astype(np.longdouble), o.grad.indices, (9, 4))
        given = [
            (o.weight, o.grad, o.history, o.master),
            # Each of these is left to the general path.
            (o.weight, wrong, o.history, o.master),
            (o.weight, o.grad, o.history[:5], o.master),
            (o.weight[:, ::2], o.grad, o.history, o.master),
            (o.weight, o.grad, o.history, o.master),
        ]
        assert are_plain(given, row_wise) == [True, False, False, False, True]


def are_plain(given: list[tuple[Any, Any, Any, Any]], row_wise: bool) -> list[bool]:
    weights, grads, histories, masters = map(list, zip(*given, strict=True))
    return [code >= 0 for code in inspect_rows(weights, grads, histories, masters, row_wise=row_wise).codes]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bfloat16" not in str(kind)], ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_plain_tensors_take_the_fast_path(kind: Kind, row_wise: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(18)
    for dtype in (np.int32, np.int64):
        o = rows(rng, kind, (9, 4), some(rng, 30, 9, dtype), row_wise=row_wise)
        weight, history = torch.from_numpy(o.weight), torch.from_numpy(o.history)
        master = None if o.master is None else torch.from_numpy(o.master)
        grad = RowSparse(torch.from_numpy(o.grad.values), torch.from_numpy(o.grad.indices), (9, 4))
        assert are_plain([(weight, grad, history, master)], row_wise) == [True]


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


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("count", [1, 3])
def test_lists_of_row_sparse_gradients_take_the_fast_path(kind: Kind, row_wise: bool, count: int) -> None:
    """All of a list, or nothing of it."""
    rng = np.random.default_rng(23)
    given = [rows(rng, kind, (9, 4), some(rng, 30, 9), row_wise=row_wise) for _ in range(count)]
    hyper = replace(HYPERS["all"], row_wise=row_wise)

    want = [expected(o, hyper) for o in given]
    assert update_plain(given, [hyper])
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")

    before, last = [o.copy() for o in given], given[-1]
    good = last.grad
    changes = [RowSparse(good.values, np.full(30, 9), (9, 4))]  # a row id that there is none of
    if good.values.dtype == last.weight.dtype:
        changes.append(RowSparse(last.weight[:3], np.arange(3), (9, 4)))  # memory that is written to
    changes.append(good.values)  # not row-sparse
    for change in changes:
        last.grad = change
        if change is changes[0]:
            with pytest.raises(IndexError, match=rf"indices of grads\[{count - 1}\]: indices\[0\]=9: "):
                update_plain(given, [hyper])
        else:
            assert not update_plain(given, [hyper])
        for o, w in zip(given, before, strict=True):
            for name in ("weight", "history", "master"):
                if getattr(w, name) is not None:
                    np.testing.assert_array_equal(getattr(o, name), getattr(w, name))
    last.grad = good
    given.append(last)  # twice in one list
    assert not update_plain(given, [hyper])


def test_a_long_list_of_small_gradients_is_not_small() -> None:
    """Other threads run while it is updated."""
    rng = np.random.default_rng(26)
    for entries, is_large in ((1, False), (30, True), (1, False)):
        given = [rows(rng, FLOAT32, (9, 16), some(rng, entries, 9)) for _ in range(200)]
        assert update_plain(given, [HYPERS["plain"]])
        notes = outcomes.remembered(row_lists._addresses, False, threading.get_ident(), 4 * 200).notes
        assert notes[outcomes.LAST_WORK] == (200 * 30 * (16 + cpu_rows.ROW_COST) if is_large else 0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("rates", [([0.1, 0.2], [0.0]), ([0.1], [0.0, 0.1])], ids=["lrs", "wds"])
def test_too_few_rates_are_not_read_beyond_their_end(sparse: bool, rates: Any) -> None:
    rng = np.random.default_rng(27)
    given = [rows(rng, FLOAT32, (9, 4), [1, 2]) if sparse else operands(rng, FLOAT32, (9, 4)) for _ in range(3)]
    before = [o.copy() for o in given]
    lists = [[getattr(o, name) for o in given] for name in ("weight", "grad", "history")]
    assert not fast_path.update_plain(*lists, [], [], *rates, rule_of(HYPERS["plain"]), None)
    for o, w in zip(given, before, strict=True):
        assert_same(o, w)


@pytest.mark.usefixtures("always_parallel")
def test_a_list_of_all_kinds_takes_the_fast_path() -> None:
    """Formats, master copies, kinds of ids, counts of rows and rates of their own for each, none of it mixed up."""
    rng = np.random.default_rng(24)
    given = [
        rows(rng, kind, (9, 4), some(rng, count, 9, dtype))
        for kind in KINDS
        for dtype, count in ((np.int32, 30), (np.int64, 0), (np.int64, 300))
    ]
    hypers = [replace(HYPERS["unclipped"], lr=0.1 * (i + 1), wd=0.01 * i) for i in range(len(given))]
    want = [expected(o, h) for o, h in zip(given, hypers, strict=True)]
    assert update_plain(given, hypers, threads=2)
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dense_first", [False, True])
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("kind", [FLOAT32, MASTER], ids=str)
def test_gradients_of_both_kinds_take_the_fast_path(
    kind: Kind, row_wise: bool, dense_first: bool, threads: int, request: pytest.FixtureRequest
) -> None:
    if threads > 1:
        request.getfixturevalue("always_parallel")
    rng = np.random.default_rng(28)
    given = [
        operands(rng, kind, (5, 4), row_wise=row_wise),
        rows(rng, kind, (9, 4), some(rng, 30, 9), row_wise=row_wise),
        operands(rng, kind, (3,), row_wise=row_wise),
        rows(rng, kind, (5,), some(rng, 0, 5), row_wise=row_wise),
        operands(rng, kind, (0, 4), row_wise=row_wise),
        operands(rng, HALF, (4, 3), row_wise=row_wise),
        operands(rng, kind, (2, 2), row_wise=row_wise),
        rows(rng, FLOAT64, (5, 2, 2), [4], row_wise=row_wise),
    ][:: 1 if dense_first else -1]
    hypers = [replace(HYPERS["unclipped"], lr=0.1 * (i + 1), wd=0.01 * i, row_wise=row_wise) for i in range(len(given))]
    want = [expected(o, h) for o, h in zip(given, hypers, strict=True)]
    assert update_plain(given, hypers, threads)
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")
    want = [expected(o, replace(hypers[0], lr=0.5)) for o in given]
    assert update_plain(given, [replace(hypers[0], lr=0.5)], threads)  # rates that all share
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")


def test_of_gradients_of_both_kinds_all_or_none_are_used() -> None:
    rng = np.random.default_rng(29)
    given = [rows(rng, FLOAT32, (9, 4), some(rng, 30, 9)), operands(rng, FLOAT32, (9, 4)),
             rows(rng, FLOAT32, (9, 4), some(rng, 30, 9)), operands(rng, FLOAT32, (9, 4))]  # fmt: skip
    before, good = [o.copy() for o in given], [o.grad for o in given]

    def assert_unchanged() -> None:
        for i, (o, w) in enumerate(zip(given, before, strict=True)):
            assert_same(o, w, f"weight {i}")

    given[2].grad = RowSparse(good[2].values, np.full(30, 9), (9, 4))  # a row id that there is none of
    with pytest.raises(IndexError, match=r"indices of grads\[2\]: indices\[0\]=9: "):
        update_plain(given, [HYPERS["plain"]])
    given[2].grad = before[2].grad = good[2]
    assert_unchanged()
    for at, wrong in [
        (1, good[1][:5]),  # another shape
        (3, good[3].astype(np.float64)),  # another format
        (1, given[0].weight),  # memory that a row-sparse update writes to
        (3, given[2].history),
        (0, RowSparse(given[1].weight[:3], np.arange(3), (9, 4))),  # memory that a dense one writes to
        (2, RowSparse(given[3].history[:3], np.arange(3), (9, 4))),
        (1, given[3].weight),
    ]:
        given[at].grad = wrong
        assert not update_plain(given, [HYPERS["plain"]])
        given[at].grad = good[at]
        assert_unchanged()
    twice = given[1].weight
    given[1].weight = given[0].weight
    assert not update_plain(given, [HYPERS["plain"]])
    given[1].weight = twice
    assert_unchanged()
    want = [expected(o, HYPERS["plain"]) for o in given]
    assert update_plain(given, [HYPERS["plain"]])
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")


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


@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("is_last", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("written", ["weight", "history", "master"])
def test_one_shared_element_is_enough_to_leave_the_fast_path(written: str, is_last: bool, row_wise: bool) -> None:
    """The last element of what is written to is the first one of any other array of the list, or the first the last."""
    rng, hyper = np.random.default_rng(31), replace(HYPERS["plain"], row_wise=row_wise)
    for other in ("weight", "history", "master", "values", "indices"):
        for shared, of in ((shared, of) for shared in (1, 0) for of in (0, 1) if of or other != written):
            parts: list[dict[str, Any]] = []
            for _ in range(2):
                o = rows(rng, Kind("bfloat16", "bfloat16", True), (4, 4), np.arange(4, dtype="i4"), row_wise=row_wise)
                values, indices = o.grad.values, o.grad.indices
                parts.append(vars(o) | {"values": values, "indices": indices})
            pair = [parts[0][written], parts[of][other]][:: 1 if is_last else -1]
            memory = np.zeros(pair[0].nbytes + pair[1].nbytes, np.uint8)
            starts = 0, pair[0].nbytes - shared * max(array.itemsize for array in pair)
            laid = [np.ndarray(a.shape, a.dtype, memory.data, at) for a, at in zip(pair, starts, strict=True)]
            parts[0][written], parts[of][other] = laid[:: 1 if is_last else -1]
            if other == "indices":
                parts[of][other][...] = np.arange(4)
            given = [
                Operands(p["weight"], RowSparse(p["values"], p["indices"], (4, 4)), p["history"], p["master"])
                for p in parts
            ]
            assert update_plain(given, [hyper]) == (not shared), f"{other} of weight {of}"


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_grouped_is_released(threads: int) -> None:
    """What Numba allocates for each worker and each weight: for sums of many and of few, or for none."""
    from numba.core.runtime import _nrt_python, rtsys

    rng, were_counted = np.random.default_rng(33), _nrt_python.memsys_stats_enabled()
    lists = (rng.integers(0, 9, 3000), np.arange(10), np.full(300, 4), rng.permutation(10))
    given = [rows(rng, FLOAT32, (10, 3), ids) for ids in lists]
    update_plain(given, [HYPERS["plain"]], threads)  # compiles
    _nrt_python.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        assert update_plain(given, [HYPERS["plain"]], threads)
        after = rtsys.get_allocation_stats()
    finally:
        if not were_counted:
            _nrt_python.memsys_disable_stats()
    assert after.alloc > before.alloc
    assert after.alloc - before.alloc == after.free - before.free


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


# ------------------------------------------------------------------------------------------------------ groups of rows


@numba.njit
def grouped_by(ids: np.ndarray, k: int, count: int) -> Any:
    return row_groups.group(ids, k, count)


def grouped(ids: np.ndarray, count: int) -> dict[int, list[int]]:
    """The positions of each row, as ``count`` workers have them."""
    found: dict[int, list[int]] = {}
    for k in range(count):
        single, positions, added, to, summed, counts = (part.tolist() for part in grouped_by(ids, k, count))
        assert positions == sorted(positions)
        assert added == sorted(added)
        several: list[list[int]] = [[] for _ in summed]
        for position, number in zip(added, to, strict=True):
            several[number].append(position)
        for row, where in [*zip(single, ([i] for i in positions), strict=True), *zip(summed, several, strict=True)]:
            assert row not in found, "two workers, or two numbers, for one row"
            found[row] = where
        assert list(map(len, several)) == counts
        assert min(counts, default=2) > 1
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("number", [1, 2, 3, 255, 256, 257, 2048, 70_000, 2**22 + 1, 2**31 - 1, 2**40, 2**62])
def test_groups_are_the_rows(number: int, threads: int) -> None:
    """Every occurrence in the group of its row, in order, for tables of any height."""
    rng = np.random.default_rng(15)
    for count in (0, 1, 40, 3000):
        ids = rng.integers(0, number, count)
        ids = np.concatenate([ids, [0, number - 1, 0, number - 1], rng.choice(ids, count // 2)]) if count else ids
        want: dict[int, list[int]] = {}
        for i, row in enumerate(ids.tolist()):
            want.setdefault(row, []).append(i)
        assert grouped(ids, threads) == want


@pytest.mark.parametrize("step", [1, 2, 3, 64, 1024, 2**20, 2**32 + 1, 0x9E3779B9])
def test_rows_at_a_regular_distance(step: int) -> None:
    ids = np.tile(np.arange(5000) * step, 2)
    found = grouped(ids, 2)
    assert found == {i * step: [i, i + 5000] for i in range(5000)}


@numba.njit
def probes(ids: np.ndarray, bits: int, seed: int) -> float:
    """Places of a hash table of ``2**bits`` that are looked at for an id, on average, to enter distinct ids."""
    table, looked_at = np.zeros(1 << bits, np.bool_), 0
    for row in ids:
        at = np.int64(row_groups._hash(row, np.uint64(seed)) >> np.uint64(64 - bits))
        looked_at += 1
        while table[at]:
            at = (at + 1) % len(table)
            looked_at += 1
        table[at] = True
    return looked_at / len(ids)


@pytest.mark.parametrize("seed", [0, 0x7F3A_5C40_2010, 0x55D1_9E8B_37C0])
def test_no_step_of_the_ids_makes_them_collide(seed: int) -> None:
    """At half load random places take 1.5 looks; ids at a regular distance, as products of features have, no more."""
    steps = [*range(1, 600, 1 if seed == 0 else 7), 1024, 3632, 14_528, 2**20, 2**32]
    worst = {step: probes(np.arange(100_000) * step, 18, seed) for step in steps}
    assert max(worst.values()) < 1.8, max(worst, key=worst.__getitem__)


def test_ids_that_were_chosen_to_collide_do_so_for_one_seed_alone() -> None:
    hashes = numba.njit(lambda rows, seed: np.array([row_groups._hash(row, np.uint64(seed)) for row in rows]))
    rows = np.arange(2**22)
    chosen = rows[np.argsort(hashes(rows, 0) >> np.uint64(46), kind="stable")[:4096]]
    assert probes(chosen, 13, 0) > 100
    assert probes(chosen, 13, 0x7F3A_5C40_2010) < 1.8


def test_who_knows_the_hash_cannot_choose_ids_that_collide() -> None:
    """Where a row is in the table depends on where the table is."""
    table_of = numba.njit(lambda ids: row_groups._number(ids, len(ids) - row_groups._AHEAD)[4])
    ids = np.arange(4096 + row_groups._AHEAD)
    first, second = table_of(ids), table_of(ids)
    assert np.unique(first).tolist() == np.unique(second).tolist()
    assert (first != second).mean() > 0.5


@pytest.mark.parametrize("count", [2, 4, 8])
def test_workers_share_rows_of_a_table_of_features_evenly(count: int) -> None:
    """Ids come feature by feature, as embedding bags do: what stands at a regular distance is not like the others."""
    rng = np.random.default_rng(25)
    ids = np.arange(16) * 50_000 + rng.integers(0, 50_000, (65_536, 16))
    ids[:, 0] = rng.integers(0, 50_000, 65_536) % 2
    of_worker = numba.njit(lambda ids, k, count: len(row_groups.own_rows(ids, k, count)[0]))
    shares = [of_worker(ids.reshape(-1), k, count) / ids.size for k in range(count)]
    assert sum(shares) == 1
    assert max(shares) < 1.3 / count


def test_workers_share_frequent_rows() -> None:
    of_worker = numba.njit(lambda ids, k, count: len(row_groups.own_rows(ids, k, count)[0]))
    assert [of_worker(np.tile([0, 1], 2000), k, 2) for k in range(2)] == [2000, 2000]
    at_first = np.concatenate([np.full(1024, 5), np.random.default_rng(34).integers(100, 50_000, 60_000)])
    assert max(of_worker(at_first, k, 2) for k in range(2)) < 0.6 * len(at_first)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_row_ids_are_copied_and_checked(dtype: Any) -> None:
    def check_ids(ids: list[int], height: int = 5) -> bool:
        given, facts = np.array(ids, dtype), np.zeros(records.FACTS, np.int64)
        facts[records.ENTRIES], facts[records.HEIGHT] = len(ids), height
        facts[records.ARE_LONG] = dtype == np.int64
        facts[records.BASE + records.IDS] = given.ctypes.data
        rows = row_groups.checked_rows("[3]", facts)
        assert rows.dtype == (np.int32 if height <= 2**31 else np.int64)
        assert rows.tolist() == ids
        assert not np.shares_memory(rows, given)
        assert facts[records.CHECKED_IDS] == rows.ctypes.data
        return bool(facts[records.ARE_INCREASING])

    assert check_ids([0, 1, 2, 4])
    assert check_ids([])
    assert check_ids([3])
    assert not check_ids([0, 1, 1, 4])
    assert not check_ids([1, 0])
    assert not check_ids([0, 1, 2, 3, 4, 0])
    assert check_ids([0, 2**31 - 1], 2**31)
    assert not check_ids([2**31 - 1, 0], 2**31 + 1)
    for ids, at in ([0, 5, 5], 1), ([-1], 0), ([4, 3, 2, 1, 0, -7], 5), ([2**31 - 1], 0), ([0, 1, 2, 3, 4, 5], 5):
        message = f"indices of grads[3]: indices[{at}]={ids[at]}: must be in [0, 5), the weight's rows"
        with pytest.raises(IndexError, match=re.escape(message)):
            check_ids(ids)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("height", [9, 2**31 + 1])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_workers_check_the_row_ids_together(dtype: Any, height: int, count: int) -> None:
    """What is found does not depend on who looks at which part, an empty one included."""
    check = row_groups.checking(height > 2**31)

    def found(ids: list[int]) -> tuple[int, int, bool]:
        given, facts = np.array(ids, dtype), np.zeros(records.FACTS, np.int64)
        rows = np.empty(len(ids), np.int64 if height > 2**31 else np.int32)
        facts[records.ENTRIES], facts[records.HEIGHT] = len(ids), height
        facts[records.ARE_LONG] = dtype == np.int64
        facts[records.BASE + records.IDS] = given.ctypes.data
        room = np.full((count, row_groups.FINDINGS), 77)
        bad, row = row_groups.check_ids(facts, rows.ctypes.data, room, check, count)
        if bad < 0:
            assert rows.tolist() == ids
        return bad, row, bool(facts[records.ARE_INCREASING])

    for ids in ([], [0], [8, 8], list(range(9)), [0, 1, 2, 3, 4, 5, 6, 7, 7], [*range(9), *range(9)], [8, 7, 6, 5]):
        assert found(ids) == (-1, 0, ids == sorted(set(ids)))
    for at in range(9):
        ids = list(range(9))
        ids[at] = max(ids[at] - 2, 0)
        assert found(ids)[2] == (at == 0), "a step down at any place, a border between workers included"
        for outside in {-1, height, int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)}:
            if not 0 <= outside < height and outside <= np.iinfo(dtype).max:
                assert found([*ids[:at], outside, *ids[at:]])[:2] == (at, outside)


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


@pytest.mark.parametrize("dtypes", [["f4"], [">f4"], ["f4", ">f4"]])
def test_rows_without_columns_change_no_history(dtypes: list[str]) -> None:
    weights = [np.zeros((3, 0), dtype) for dtype in dtypes]
    states = [np.zeros((3, 1), dtype) for dtype in dtypes]
    grads = [RowSparse(np.zeros((2, 0), dtype), np.array([0, 2]), (3, 0)) for dtype in dtypes]
    GroupAdaGrad().update(list(range(len(dtypes))), weights, grads, states)
    assert not np.any(states)
