"""Lists of row-sparse updates, alone or with dense ones: which take the fast path, all of a list or nothing of it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adagrad import RowSparse
from adagrad.kernels import fast_path, outcomes, row_lists
from adagrad.kernels.batch import Batch
from adagrad.kernels.cpu import rows as cpu_rows
from adagrad.kernels.inspection.rows import inspect_rows
from adagrad.kernels.runtime import threads
from row_operands import FLOAT32, FLOAT64, HALF, MASTER, rows, some
from support import HYPERS, KINDS, Kind, Operands, assert_same, expected, operands, rule_of, update_plain


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
        notes = outcomes.remembered(row_lists._workers, False, threading.get_ident(), 4 * 200).notes
        assert notes[threads.WORK] == (200 * 30 * (16 + cpu_rows.ROW_COST) if is_large else 0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("rates", [([0.1, 0.2], [0.0]), ([0.1], [0.0, 0.1])], ids=["lrs", "wds"])
def test_too_few_rates_are_not_read_beyond_their_end(sparse: bool, rates: Any) -> None:
    rng = np.random.default_rng(27)
    given = [rows(rng, FLOAT32, (9, 4), [1, 2]) if sparse else operands(rng, FLOAT32, (9, 4)) for _ in range(3)]
    before = [o.copy() for o in given]
    lists = [[getattr(o, name) for o in given] for name in ("weight", "grad", "history")]
    assert not fast_path.update_plain(Batch(rule_of(HYPERS["plain"]), *lists, [], *rates), [], None)
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
