"""No launch of a CUDA kernel depends on the order in which a device runs its programs and warps, see ``races.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cuda_operands import GPU, RowUpdate, make, make_rows, run, zipf
from races import watch

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from adagrad.kernels import cuda  # noqa: E402
from adagrad.rule import Rule  # noqa: E402

pytestmark = pytest.mark.skipif(GPU, reason="kernels are compiled for the device here, and the interpreter is watched")


@triton.jit
def writes_to_one_place(x: Any) -> None:
    tl.store(x, tl.program_id(0))


@triton.jit
def reads_what_the_next_one_writes(x: Any) -> None:
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i + 1))


@triton.jit
def reads_what_it_wrote(x: Any) -> None:
    at = 2 * tl.program_id(0) + tl.arange(0, 2)
    tl.store(x + at, at)
    tl.store(x + 8 + at, tl.load(x + at))


@triton.jit
def changes_and_reads(x: Any) -> None:
    tl.atomic_xchg(x, 1)
    tl.store(x + 1 + tl.program_id(0), tl.load(x))


@triton.jit
def does_each_for_itself(x: Any) -> None:
    at = 2 * tl.program_id(0) + tl.arange(0, 2)
    value = tl.load(x + at)
    tl.atomic_xchg(x + 15, 1)
    tl.store(x + at, value + 1)


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (writes_to_one_place, ["written twice"]),
        (reads_what_the_next_one_writes, ["read by one program and written by another"]),
        (reads_what_it_wrote, ["written and then read"]),
        (changes_and_reads, ["changed atomically and otherwise"]),
        (does_each_for_itself, []),
    ],
)
def test_what_is_found(kernel: Any, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    kernel[(4,)](torch.zeros(16, dtype=torch.int32))
    assert seen == [(kernel.fn.__name__, found)]


def rows(columns: int, count: int = 400, **options: Any) -> RowUpdate:
    return make_rows(zipf(count, 60), (60, columns), **options)


LOW: dict[str, Any] = {"dtype": "bfloat16", "master": True}
CALLS: dict[str, Callable[[], Any]] = {
    "dense": lambda: run(Rule(), [make((n,), "float32") for n in (1, 7, 1023, 3000)]),
    "dense, low precision": lambda: run(Rule(), [make((n,), "bfloat16", master=True) for n in (5, 1500)]),
    "dense, row-wise": lambda: run(Rule(row_wise=True), [make((9, n), "float32", row_wise=True) for n in (1, 20, 700)]),
    "rows": lambda: run(Rule(), [], [rows(20)]),
    "rows, many columns": lambda: run(Rule(), [], [rows(130, 150)]),
    "rows, low precision": lambda: run(Rule(), [], [rows(6, **LOW)]),
    "rows, row-wise": lambda: run(Rule(row_wise=True), [], [rows(20, row_wise=True)]),
    "rows, row-wise, many columns": lambda: run(Rule(row_wise=True), [], [rows(130, 150, row_wise=True)]),
    "several tables": lambda: run(Rule(), [], [rows(4, n) for n in (300, 1, 40)]),
    "an id that is out of range": lambda: run(Rule(), [make((3,), "float32")], [make_rows([1, 2, 60, 1], (60, 4))]),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_launch_races(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    with np.errstate(all="ignore"):
        CALLS[name]()
    assert seen
    assert {kernel: found for kernel, found in seen if found} == {}
    if "range" in name:
        with pytest.raises(IndexError, match="row 60"):
            cuda.check()


def test_every_kernel_is_launched_by_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    for name in ("dense", "dense, row-wise", "rows", "several tables"):
        CALLS[name]()
    rest = {"check_ids", "check_ids_of_all", "sort_keys", "update_runs"}
    assert {kernel for kernel, _ in seen} == {"update_elements", "update_rows", *rest}
