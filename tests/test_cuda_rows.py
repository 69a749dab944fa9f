"""The row-sparse CUDA kernels against the rule and the order of summation written out in NumPy, bit for bit.

On a machine without a CUDA device the kernels run on CPU tensors, in Triton's interpreter or compiled (see ptx.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import processes
from cuda_operands import (
    DEVICE,
    DTYPES,
    GPU,
    ON_THE_GPU,
    PTX,
    DenseUpdate,
    RowUpdate,
    as_numpy,
    assert_same,
    expected,
    make,
    make_rows,
    needs_gpu,
    needs_no_gpu,
    needs_speed,
    rounded,
    run,
    zipf,
)

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from adagrad.kernels import cuda  # noqa: E402
from adagrad.kernels.cuda import row_search  # noqa: E402
from adagrad.kernels.cuda.launch import Kernel  # noqa: E402
from adagrad.rule import Rule, sum_duplicates  # noqa: E402
from adagrad.torch import check_row_ids  # noqa: E402

pytestmark = ON_THE_GPU


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of infinities. No report may be left over."""
    with np.errstate(all="ignore"):
        yield
    cuda.check()


@pytest.fixture(autouse=True)
def _sorts_in_large_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the tests of the sort: the interpreter takes as long for a program of any size, here for a sixteenth."""
    if not GPU and not PTX and "sorts_as_on_a_device" not in request.fixturenames:
        lists, block = cuda.row_launches, 16 * cuda.row_launches.SORT_BLOCK
        monkeypatch.setattr(lists, "SORT_BLOCK", block)
        monkeypatch.setattr(lists, "_SORT", Kernel(lists.sort_keys, 4, BLOCK=block, OTHERS=128))


@pytest.fixture
def sorts_as_on_a_device() -> None:
    """With the blocks that the library uses."""


def check_rows(updates: list[RowUpdate], rule: Rule, scale: float | None = None, **options: Any) -> None:
    """Run ``updates`` in one call and compare every bit with the rule."""
    want = []
    for u in updates:
        dtype = str(u.weight.dtype).removeprefix("torch.")
        new = as_numpy(u.weight if u.master is None else u.master, dtype)
        weight, history = as_numpy(u.weight, dtype), as_numpy(u.history, dtype)
        rows, sums = sum_duplicates(u.indices.cpu().numpy(), as_numpy(u.values, dtype))
        new[rows], history[rows] = expected(new[rows], sums, history[rows], float(u.lr), u.wd, rule, scale or 1.0)
        weight[rows] = rounded(new[rows], dtype)
        want.append((weight, history, new, as_numpy(u.values, dtype)))
    if scale is not None:
        options["grad_scale"] = torch.tensor(scale, device=DEVICE)
    run(rule, [], updates, **options)
    for u, (weight, history, new, values) in zip(updates, want, strict=True):
        dtype = str(u.weight.dtype).removeprefix("torch.")
        assert_same(as_numpy(u.history, dtype), history)
        assert_same(as_numpy(u.weight, dtype), weight)
        assert_same(as_numpy(u.values, dtype), values)
        if u.master is not None:
            assert_same(as_numpy(u.master, dtype), new)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("row_wise", [False, True])
def test_distinct_rows(dtype: str, index_dtype: str, row_wise: bool) -> None:
    ids = np.random.default_rng(0).permutation(40)[:23]
    check_rows([make_rows(ids, (40, 20), dtype, index_dtype=index_dtype, row_wise=row_wise)], Rule(row_wise=row_wise))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_wise", [False, True])
def test_frequent_and_rare_rows(dtype: str, row_wise: bool) -> None:
    ids = zipf(500, 60)
    assert np.bincount(ids).max() > 128, "no run of several chunks"
    check_rows([make_rows(ids, (60, 5), dtype, row_wise=row_wise)], Rule(row_wise=row_wise))


@needs_speed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("count", [cuda.row_launches.FEW, 50_000])
def test_many_lookups(dtype: str, row_wise: bool, count: int) -> None:
    u = make_rows(zipf(count, 20_000), (20_000, 64), dtype, row_wise=row_wise)
    check_rows([u], Rule(row_wise=row_wise))


@pytest.mark.parametrize("columns", [(), (1,), (2,), (16,), (33,), (128,), (130,), (3, 2), (1, 1, 1)])
@pytest.mark.parametrize("row_wise", [False, True])
def test_row_lengths(columns: tuple[int, ...], row_wise: bool) -> None:
    ids = [*[3] * 130, 1, 0, 3, 5, 1]
    check_rows([make_rows(ids, (7, *columns), row_wise=row_wise)], Rule(row_wise=row_wise))


@pytest.mark.parametrize(("n", "row_wise"), [(2176, False), (2177, False), (2177, True), (4353, False)])
def test_one_row_longer_than_all_that_is_added_at_once(n: int, row_wise: bool) -> None:
    check_rows([make_rows([4] * n, (6, 3), row_wise=row_wise)], Rule(row_wise=row_wise))


@pytest.mark.parametrize("n", [513, 1025, 1537])
def test_no_sums_but_those_of_the_chunks_are_added(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 that are loaded at once, those there are: the memory after them was not written by this call."""
    empty = torch.Tensor.new_empty

    def unwritten(*given: Any, **options: Any) -> torch.Tensor:
        made = empty(*given, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    check_rows([make_rows([4] * n + [*range(5, 135)], (135, 3))], Rule())


@pytest.mark.parametrize("n", [1023, 1024, 1025, 2049])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_ids_around_the_borders_of_blocks_of_ids(n: int, index_dtype: str) -> None:
    check_rows([make_rows(np.random.default_rng(0).integers(0, 300, n), (300, 3), index_dtype=index_dtype)], Rule())


def test_a_bad_id_beyond_the_first_block_of_ids() -> None:
    u = make_rows([*[0] * 1500, 7], (7, 3))
    before = u.weight.clone(), u.history.clone()
    run(Rule(), [], [u])
    assert torch.equal(u.weight, before[0])
    assert torch.equal(u.history, before[1])
    with pytest.raises(IndexError, match="row 7"):
        cuda.check()


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000])
def test_all_occurrences_of_one_row(count: int) -> None:
    check_rows([make_rows([4] * count, (6, 3))], Rule())


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize(
    "counts",
    [(127, 130, 1), (5, 300, 128, 129, 2), (129, 129, 129), (1, 257, 1, 256, 1, 2), (33, 1, 32, 65, 33, 31, 33, 160)],
)
def test_runs_across_pieces(counts: tuple[int, ...], row_wise: bool) -> None:
    """Short and long runs, chunks that begin everywhere in the pieces of 32 positions that the work is divided by."""
    ids = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    check_rows([make_rows(ids, (len(counts), 3), row_wise=row_wise)], Rule(row_wise=row_wise))


@triton.jit
def find_first(ids: tl.tensor, end: tl.tensor, row: tl.tensor, found: tl.tensor) -> None:
    zero = tl.full([], 0, tl.int64)
    tl.store(found, row_search.first_position(ids, zero, zero + end, row))


@pytest.mark.parametrize("count", [1, 127, 128, 129, 16383, 16384, 16385, 50_000])
def test_where_a_run_begins(count: int) -> None:
    """In one look, two and three; runs of all lengths, the first one and what is behind the last one too."""
    ids = np.sort(np.append(zipf(count - 1, count, 1), 0))
    found, kernel = torch.zeros(1, dtype=torch.int64, device=DEVICE), Kernel(find_first, 4)
    for row in sorted({0, 1, *np.random.default_rng(2).choice(ids, 20), ids.max() + 1}):
        kernel.launch(1, torch.tensor(ids, device=DEVICE), count, int(row), found)
        assert found.item() == np.searchsorted(ids, row)


@triton.jit
def find_weights(records: tl.tensor, weights: tl.tensor, rows: tl.tensor, found: tl.tensor, TILE: tl.constexpr) -> None:
    lane = tl.arange(0, TILE)
    place = row_search.find_operands(records, weights, tl.load(rows + lane), TILE).to(tl.int64) - records.to(tl.int64)
    tl.store(found + lane[:, None], place)


@pytest.mark.parametrize("weights", [1, 31, 32, 33, 64, 65])
def test_which_weight_a_row_is_of(weights: int) -> None:
    """Where there is no row, it is some weight: its record is read, and settings are where that says."""
    heights = np.random.default_rng(weights).choice([0, 1, 2**31, 5], weights)
    heights[-1] = 1
    firsts = np.cumsum(heights) - heights
    rows = np.resize([-1, *firsts[heights > 0], *(firsts + heights - 1)[heights > 0]], 128)
    records = torch.zeros(10 * weights, dtype=torch.int64)
    records[9 * weights :] = torch.from_numpy(firsts)
    found = torch.zeros(128, dtype=torch.int64, device=DEVICE)
    Kernel(find_weights, 4, TILE=128).launch(1, records.to(DEVICE), weights, torch.from_numpy(rows).to(DEVICE), found)
    expected = np.maximum(np.searchsorted(firsts, rows, "right") - 1, 0)
    got = (found.cpu().numpy() // 8 - 10 * weights) / 8
    np.testing.assert_array_equal(got[rows >= 0], expected[rows >= 0])
    assert set(got[rows < 0]) <= set(range(weights))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 127, 128, 129, 600, 850, 1000])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.usefixtures("sorts_as_on_a_device")
def test_few_keys_are_sorted_stably(count: int, dtype: str) -> None:
    """All equal, few and many different ones, the highest and those of bad ids, -1, among them."""
    top = np.iinfo(dtype).max
    for low, high in ((0, 1), (-1, 5), (0, 10**6), (top - 3, top)):
        keys = np.random.default_rng(count).integers(low, high, count, dtype, endpoint=True)
        ids, order = cuda.row_launches.sort(torch.tensor(keys, device=DEVICE))
        assert (ids.dtype, order.dtype) == (getattr(torch, dtype), torch.int64)
        expected = np.argsort(keys, kind="stable")
        np.testing.assert_array_equal(order.cpu(), expected)
        np.testing.assert_array_equal(ids.cpu(), keys[expected])


@pytest.mark.parametrize("tables", [1, 3])
def test_many_keys_are_sorted_by_torch(tables: int, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.row_launches, "FEW", 400 * tables)
    few, many = ([make_rows(zipf(n, 60, i), (60, 5), seed=i) for i in range(tables)] for n in (400, 401))
    check_rows(few, Rule())
    check_rows(many, Rule())
    assert launched.count("sort_keys") == 1


GUARDED = """
import ctypes
import itertools
import mmap
import torch
from adagrad.kernels import cuda
from adagrad.rule import Rule

PAGE = mmap.PAGESIZE
MARGIN = 16 * PAGE
protect = ctypes.CDLL(None, use_errno=True).mprotect
held = []

def guarded(tensor, at_end):
    "A copy that begins right after memory that must not be touched, or ends right before it."
    size = tensor.numel() * tensor.itemsize
    inside = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, 2 * MARGIN + inside)
    held.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (start, start + MARGIN + inside):
        assert protect(ctypes.c_void_p(at), ctypes.c_size_t(MARGIN), 0) == 0
    first = MARGIN + (inside - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first).view(tensor.shape)
    return copy.copy_(tensor)

def guard(owner, name):
    "The same for what a call allocates for itself."
    make = getattr(owner, name)

    def made(*arguments, **options):
        tensor = make(*arguments, **options)
        return guarded(tensor, at_end) if tensor.numel() else tensor

    setattr(owner, name, made)

def rows(count, at_end, row_wise, dtype):
    ids = ((torch.arange(count) + 123) // 128).to(torch.int32 if count % 2 else torch.int64)  # 5 of one, then 128
    shape = (int(ids.max()) + 1, 6)
    weight, history = torch.ones(shape, dtype=dtype), torch.zeros(shape[0], 1 if row_wise else 6)
    values = torch.ones(count, 6, dtype=dtype)
    return [guarded(t, at_end) for t in (weight, ids, values, history)]

rules = {row_wise: Rule(row_wise=row_wise) for row_wise in (False, True)}
at_end = False
for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch, "from_numpy"), (torch.Tensor, "new_empty")]:
    guard(owner, name)
for count, at_end, row_wise in itertools.product([(1,), (33,), (33, 40), (1, 40, 133)], (False, True), (False, True)):
    rule, dtype = rules[row_wise], torch.bfloat16 if at_end == row_wise else torch.float32
    tables = [rows(n, at_end, row_wise, dtype) for n in count]
    sparse = [cuda.row_launches.of_tensors(*each, None, 0.1, 0.0, rule) for each in tables]
    given = [guarded(torch.ones(1025, 1, dtype=dtype), at_end) for _ in range(2)]
    history = guarded(torch.zeros(1025, 1), at_end)
    dense = cuda.dense.of_tensors(*given, history, None, 0.1, 0.0, rule)
    cuda.job([cuda.Group(rule, dense, cuda.row_launches.concatenate(sparse))], torch.device("cpu"))()
    assert all((weight != 1).all() for weight, *_ in tables)
"""


@processes.posix
@needs_no_gpu
def test_nothing_is_read_or_written_beside_the_operands() -> None:
    """On a device, memory that is not there ends the process, whether or not what is read from it counts."""
    without = "-W", "ignore:Conversion of an array", "-W", "ignore:AnnAssign.__init__ missing"  # see pyproject.toml
    path = os.pathsep.join([processes.SOURCES, str(Path(__file__).parent)])
    code, interpret = (f"import ptx; ptx.install({PTX})\n{GUARDED}", None) if PTX else (GUARDED, "1")
    processes.run(code, options=("-W", "error", *without), TRITON_INTERPRET=interpret, PYTHONPATH=path)


def test_the_order_of_summation_is_seen() -> None:
    """Another order of these values gives other bits: the comparison with the oracle is not empty."""
    u = make_rows(zipf(400, 3), (3, 4))
    ids, values = u.indices.cpu().numpy(), as_numpy(u.values, "float32")
    _, forward = sum_duplicates(ids, values)
    _, backward = sum_duplicates(ids[::-1], values[::-1])
    assert (forward != backward).any()
    check_rows([u], Rule())


def test_a_row_depends_on_its_own_values_alone() -> None:
    """The same occurrences of row 2 amid others: the same bits."""
    u = make_rows([2] * 300, (9, 4))
    alone = [t.clone() for t in (u.weight, u.history)]
    run(Rule(), [], [u._replace(weight=alone[0], history=alone[1])])
    mixed = np.repeat(np.random.default_rng(0).choice([0, 1, 5, 8], 300), 2)
    mixed[::2] = 2
    values = torch.randn(600, 4, dtype=torch.float32).to(DEVICE)
    values[::2] = u.values
    indices = torch.tensor(mixed, device=DEVICE)
    run(Rule(), [], [u._replace(indices=indices, values=values)])
    assert torch.equal(u.weight[2], alone[0][2])
    assert torch.equal(u.history[2], alone[1][2])


RULES = {
    "rescaled and clipped": Rule(rescale_grad=-1 / 3, clip_gradient=0.3),
    "inside": Rule(epsilon=1e-10, epsilon_inside=True),
    "decoupled": Rule(decoupled_decay=True),
    "row-wise": Rule(row_wise=True, clip_gradient=0.5),
    "row-wise, decoupled": Rule(row_wise=True, decoupled_decay=True, epsilon_inside=True),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_options(name: str, wd: float) -> None:
    rule = RULES[name]
    check_rows([make_rows(zipf(200, 20), (20, 6), wd=wd, row_wise=rule.row_wise)], rule)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("grad_dtype", ["same", "float32"])
@pytest.mark.parametrize("row_wise", [False, True])
def test_master_copy(dtype: str, grad_dtype: str, row_wise: bool) -> None:
    options: dict[str, Any] = {} if grad_dtype == "same" else {"grad_dtype": grad_dtype}
    u = make_rows(zipf(200, 20), (20, 6), dtype, master=True, row_wise=row_wise, **options)
    check_rows([u], Rule(row_wise=row_wise))


@pytest.mark.parametrize("row_wise", [False, True])
def test_nan_and_infinity_stay_in_their_rows(row_wise: bool) -> None:
    u = make_rows([0, 1, 2, 3, 1, 2, 4, 4], (6, 3), row_wise=row_wise)
    u.values[0], u.values[1], u.values[2], u.values[3] = math.nan, math.inf, -math.inf, -0.0
    u.values[4, 0] = -math.inf
    check_rows([u], Rule(clip_gradient=1.0, row_wise=row_wise))


@pytest.mark.parametrize("count", [2, 40, 300])
def test_sums_begin_with_the_first_value(count: int) -> None:
    """Not with zero: a sum of negative zeros is a negative zero, and moves a weight of zero to its other sign."""
    u = make_rows([*[0] * count, 1], (2, 2), wd=0.0)
    u.weight.fill_(-0.0)
    u.values.fill_(-0.0)
    check_rows([u], Rule())
    assert not torch.signbit(u.weight).any()


def test_several_updates_with_dense_ones_in_one_call() -> None:
    rows = [make_rows(zipf(50, 9, i), (9, 2 + i), dtype, i, lr=0.1 + i) for i, dtype in enumerate(DTYPES)]
    rows.insert(2, make_rows([], (4, 3)))
    twins = [u._replace(weight=u.weight.clone(), history=u.history.clone()) for u in rows]
    dense = [make((10,), "float32", 3, lr=0.3), make((10,), "float16", 4, lr=0.4)]
    dense_twins = [u._replace(weight=u.weight.clone(), history=u.history.clone()) for u in dense]
    run(Rule(), dense, rows)
    run(Rule(), dense_twins, [])
    check_rows(twins, Rule())
    for one, other in zip([*dense, *rows], [*dense_twins, *twins], strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.history, other.history)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels, as they are launched."""
    names: list[str] = []
    bind = Kernel.bind_known

    def record(self: Any, *arguments: Any) -> Any:
        names.append(self._function.fn.__name__)
        return bind(self, *arguments)

    monkeypatch.setattr(Kernel, "bind_known", record)
    return names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_wise", [False, True])
def test_tables_of_one_form_share_their_launches(dtype: str, row_wise: bool, launched: list[str]) -> None:
    """Of any heights, with ids of both kinds, a learning rate and decay of their own."""
    lr = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    updates = []
    for i, (entries, rows) in enumerate([(150, 60), (3, 1), (1, 2000), (1025, 9), (70, 70)]):
        ids, index_dtype = zipf(entries, rows, i), ("int32", "int64")[i % 2]
        u = make_rows(ids, (rows, 6), dtype, i, index_dtype=index_dtype, row_wise=row_wise)
        updates.append(u._replace(lr=lr if i == 2 else 0.1 * (i + 1), wd=0.1 * (i % 3)))
    check_rows(updates, Rule(row_wise=row_wise))
    assert launched == ["check_ids_of_all", "sort_keys", "update_runs", "update_runs"]


@pytest.mark.parametrize("columns", [4, 130])
@pytest.mark.parametrize("master", [False, True])
def test_more_tables_than_are_looked_at_together(columns: int, master: bool, launched: list[str]) -> None:
    dtype = "bfloat16" if master else "float32"
    heights = np.random.default_rng(3).integers(1, 9, 40).tolist()
    check_rows([make_rows(zipf(5, n, n), (n, columns), dtype, n, master=master) for n in heights], Rule())
    assert launched == ["check_ids_of_all", "sort_keys", "update_runs", "update_runs"]


def test_kept_tables_have_their_settings_at_another_place() -> None:
    """The same weights behind others, row-sparse or dense: what was kept of them names other settings."""

    def ones(shape: tuple[int, ...], lr: float) -> DenseUpdate:
        return DenseUpdate(*[torch.full(shape, n, device=DEVICE) for n in (0.0, 1.0, 0.0)], None, lr, 0.0)

    def rows(columns: int, lr: float) -> RowUpdate:
        weight, values, *others = ones((3, columns), lr)
        return RowUpdate(weight, torch.arange(3, device=DEVICE), values, *others)

    pair = [rows(2, 0.25), rows(2, 0.5)]
    for dense, others in [([], []), ([], [rows(3, 1.0)]), ([ones((3,), 2.0)], [])]:
        for u in pair:
            u.weight.zero_(), u.history.zero_()
        run(Rule(epsilon=0.0), dense, [*others, *pair])
        assert [u.weight.unique().tolist() for u in pair] == [[-0.25], [-0.5]]


def test_forms_that_differ_are_launched_apart(launched: list[str]) -> None:
    shapes = [(9, 4), (9, 5), (7, 4), (0, 4), (8, 2, 2), (6, 4)]
    updates = [make_rows([0, 2, 0] if shape[0] else [], shape, seed=i) for i, shape in enumerate(shapes)]
    updates[-1] = make_rows([1, 1], (6, 4), "float64")
    check_rows(updates, Rule())
    checks = ["check_ids", "check_ids", "check_ids_of_all"]
    assert sorted(launched) == [*checks, *["sort_keys"] * 3, *["update_runs"] * 3]


@pytest.mark.parametrize("operand", ["weight", "values", "history"])
@pytest.mark.parametrize("tables", [1, 3])
def test_tables_that_begin_anywhere(operand: str, tables: int) -> None:
    """One of them aligned to its elements alone: what was compiled for others promises accesses of several elements."""
    updates = [make_rows(zipf(40, 20, i), (20, 16), seed=i) for i in range(tables)]
    check_rows(updates, Rule())
    tensor = getattr(updates[-1], operand)
    moved = torch.empty(tensor.numel() + 1, device=DEVICE)[1:].view(tensor.shape).copy_(tensor)
    updates[-1] = updates[-1]._replace(**{operand: moved})
    check_rows(updates, Rule())


@pytest.mark.parametrize(
    ("moved", "columns", "dtype", "row_wise", "promised"),
    [
        (None, 8, "float32", False, True), ("weight", 8, "float32", False, False),
        ("values", 8, "float32", False, False), ("history", 8, "float32", False, False),
        ("history", 8, "float32", True, True), ("values", 8, "float32", True, False),
        (None, 5, "float32", False, False), (None, 4, "bfloat16", False, False), (None, 8, "bfloat16", False, True),
        ("master", 8, "bfloat16", False, False), ("master", 8, "bfloat16", True, False),
    ],
)  # fmt: skip
def test_what_is_promised_of_addresses(moved: str | None, columns: int, dtype: str, row_wise: bool, promised: bool
                                       ) -> None:  # fmt: skip
    """What a device would not forgive: that rows begin at multiples of 16 bytes, of all operands but such a history."""
    options = {"master": dtype == "bfloat16", "row_wise": row_wise}
    updates = [make_rows(zipf(40, 20, i), (20, columns), dtype, i, **options) for i in range(3)]
    if moved is not None:
        tensor = getattr(updates[1], moved)
        elsewhere = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:].view(tensor.shape)
        updates[1] = updates[1]._replace(**{moved: elsewhere})
    rule = Rule(row_wise=row_wise)
    found = cuda.row_launches.concatenate([cuda.row_launches.of_tensors(*u, rule) for u in updates])
    ((form, which),) = cuda.row_launches.by_form(found, rule).items()
    assert cuda.row_launches.plan(found.facts, np.array(which), form.row_wise).are_aligned == promised


def test_of_several_bad_ids_one_is_reported(launched: list[str]) -> None:
    """And once: its row and the rows of its own weight."""
    updates = [make_rows([0, bad, bad], (rows, 4)) for bad, rows in ((7, 7), (900, 900), (-3, 20))]
    before = copies(updates)
    run(Rule(), [], updates)
    with pytest.raises(IndexError, match=r"row 7: must be in \[0, 7\)|row 900: .* \[0, 900\)|row -3: .* \[0, 20\)"):
        cuda.check(DEVICE)
    cuda.check()
    assert launched[0] == "check_ids_of_all"
    assert all(torch.equal(a, b) for a, b in zip(before, copies(updates), strict=True))


def test_tables_of_more_than_2_to_the_31_rows_together() -> None:
    """Their rows are numbered in 64 bits. Only the first of each has memory."""
    updates, twins = ([make_rows([0] * (3 + i), (1, 4), seed=i) for i in range(3)] for _ in range(2))
    run(Rule(), [], [
        u._replace(weight=u.weight.expand(2**30, 4), history=u.history.expand(2**30, 4)) for u in updates
    ])  # fmt: skip
    check_rows(twins, Rule())
    for got, twin in zip(updates, twins, strict=True):
        assert torch.equal(got.weight, twin.weight)
        assert torch.equal(got.history, twin.history)


def test_nothing_to_do() -> None:
    check_rows([make_rows([], (4, 3)), make_rows([], (0, 3))], Rule())
    check_rows([make_rows([0, 1, 1], (4, 0))], Rule())


@pytest.mark.parametrize("lr_dtype", ["float32", "float64"])
def test_lr_on_the_device(lr_dtype: str) -> None:
    lr = torch.tensor(0.1, dtype=getattr(torch, lr_dtype), device=DEVICE)
    check_rows([make_rows([0, 1, 0], (3, 2), lr=lr), make_rows([2, 1], (3, 2), "float64", lr=lr)], Rule())


@pytest.mark.parametrize("row_wise", [False, True])
def test_grad_scale_divides_the_sums_first(row_wise: bool) -> None:
    u = make_rows(zipf(200, 20), (20, 6), row_wise=row_wise)
    check_rows([u], Rule(rescale_grad=0.7, clip_gradient=0.1, row_wise=row_wise), scale=3.0)


# --------------------------------------------------------------------------------------- calls that must change nothing


def copies(updates: list[Any]) -> list[Any]:
    return [t.clone() for u in updates for t in u if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(
    ("index_dtype", "bad", "row_wise"),
    [("int32", bad, bad < 0) for bad in (-1, 7, 2**31 - 1, -(2**31))]
    + [("int64", bad, bad > 0) for bad in (-1, 7, 2**32 + 1, -(2**63), 2**63 - 1)],
)
def test_a_row_out_of_range_makes_the_call_a_no_op(index_dtype: str, bad: int, row_wise: bool) -> None:
    rule = Rule(row_wise=row_wise)
    good = [make_rows([*[2] * 140, 1], (4, 3), row_wise=row_wise), make_rows([0], (4, 1), row_wise=row_wise)]
    wrong = make_rows([3, *[0] * 150, bad, 6], (7, 3), index_dtype=index_dtype, row_wise=row_wise)
    dense = [make((5, 2), "float32", row_wise=row_wise)]
    everything = [*dense, *good, wrong]
    before = copies(everything)
    run(rule, dense, [good[0], wrong, good[1]])
    assert all(torch.equal(a, b) for a, b in zip(before, copies(everything), strict=True))
    # The lowest of all stands for no report, and is reported as the next.
    with pytest.raises(IndexError, match=rf"indices: row {max(bad, 1 - 2**63)}: must be in \[0, 7\)"):
        check_row_ids(DEVICE)
    check_row_ids()
    check_rows(good, rule)


@pytest.mark.parametrize("row", [9, -(2**63)])
def test_the_next_call_raises_and_changes_nothing(row: int) -> None:
    wrong, good = make_rows([row], (9, 2), index_dtype="int64"), make_rows([3], (9, 2))
    run(Rule(), [], [wrong])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    before = copies([good])
    with pytest.raises(IndexError, match=rf"row {max(row, 1 - 2**63)}: must be in \[0, 9\)"):
        run(Rule(), [], [good])
    assert all(torch.equal(a, b) for a, b in zip(before, copies([good]), strict=True))
    check_rows([good], Rule())


@pytest.mark.parametrize("tables", [1, 3])
def test_a_call_without_memory_for_its_sums_changes_nothing(tables: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, dense = [make_rows([0] * 300, (4, 3), seed=i) for i in range(tables)], [make((5, 2), "float32")]
    before = copies([*updates, *dense])
    empty, large = torch.Tensor.new_empty, cuda.row_launches.slots(300 * tables)

    def none_left(self: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
        if size == (1, large, 4):
            raise torch.OutOfMemoryError
        return empty(self, size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", none_left)
    with pytest.raises(torch.OutOfMemoryError):
        run(Rule(), dense, updates)
    assert all(torch.equal(a, b) for a, b in zip(before, copies([*updates, *dense]), strict=True))


def test_ids_of_an_empty_weight_are_out_of_range() -> None:
    run(Rule(), [], [make_rows([0], (0, 3))])
    with pytest.raises(IndexError, match=r"row 0: must be in \[0, 0\)"):
        cuda.check()
    run(Rule(), [], [make_rows([5], (4, 0))])
    with pytest.raises(IndexError, match=r"row 5: must be in \[0, 4\)"):
        cuda.check()


@pytest.mark.parametrize("row_wise", [False, True])
def test_found_inf_makes_the_call_a_no_op(row_wise: bool) -> None:
    rule = Rule(row_wise=row_wise)
    u = make_rows([*[2] * 140, 1], (4, 3), "float16", master=True, row_wise=row_wise)
    before = copies([u])
    run(rule, [], [u], found_inf=torch.ones(1, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(before, copies([u]), strict=True))
    check_rows([u], rule, found_inf=torch.zeros(1, device=DEVICE))


# ------------------------------------------------------------------------------------------------ on a real device only


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tables", [1, 3])
def test_a_captured_graph_replays_the_step(tables: int) -> None:
    updates = [make_rows(zipf(2000, 90, i), (90, 8), seed=i) for i in range(tables)]
    twins = [u._replace(weight=u.weight.clone(), history=u.history.clone()) for u in updates]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(Rule(), [], updates)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run(Rule(), [], updates)
    for k in range(3 * cuda.tables.KEPT):  # other tables take the place of those that are kept
        run(Rule(), [], [make_rows([0], (2, 8), seed=k, lr=0.1 + k) for _ in range(tables)])
    graph.replay()
    for _ in range(2):
        run(Rule(), [], twins)
    for u, twin in zip(updates, twins, strict=True):
        assert torch.equal(u.weight, twin.weight)
        assert torch.equal(u.history, twin.history)
    before = copies(updates)
    updates[-1].indices[5] = 90
    graph.replay()
    with pytest.raises(IndexError, match=r"row 90: must be in \[0, 90\)"):
        cuda.check()
    changed = [torch.equal(a, b) for a, b in zip(before, copies(updates), strict=True)]
    assert changed.count(False) == 1, "the id itself"


@pytest.mark.gpu
@needs_gpu
def test_a_table_of_more_than_2_to_the_31_elements() -> None:
    rows = 2**31 // 64 + 10
    if torch.cuda.mem_get_info()[0] < 12 * 64 * rows:
        pytest.skip(reason="needs 26 GB of device memory")
    weight = torch.zeros(rows, 64, dtype=torch.float16, device=DEVICE)
    history = torch.zeros(rows, 64, device=DEVICE)
    indices = torch.tensor([rows - 1, 0, rows - 1], device=DEVICE)
    values = torch.ones(3, 64, dtype=torch.float16, device=DEVICE)
    run(Rule(epsilon=0.0), [], [RowUpdate(weight, indices, values, history, None, 0.5, 0.0)])
    assert weight[[0, -1]].eq(-0.5).all()
    assert history[-1].eq(4).all()
    assert weight.count_nonzero().item() == 128


def test_check_asks_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And raises what is there: after the wait for the device no word is on its way."""
    report = cuda._Report(torch.zeros(2), np.array([cuda.NO_ROW, 8], np.int64).data)
    monkeypatch.setitem(cuda._reports, torch.device("meta"), report)
    cuda.check(DEVICE)
    with pytest.raises(IndexError, match=r"must be in \[0, 7\)"):
        cuda.check("meta")


def test_a_report_of_which_one_word_has_arrived_waits_for_the_other() -> None:
    report = np.array([cuda.NO_ROW, 8], np.int64).data
    cuda._raise_reported(report, arrived=False)
    report[0] = 9
    with pytest.raises(IndexError, match=r"row 9: must be in \[0, 7\)"):
        cuda._raise_reported(report, arrived=False)
    report[1] = 12  # of the next report, whose row is still on its way
    cuda._raise_reported(report, arrived=False)
    with pytest.raises(IndexError, match=r"must be in \[0, 11\)"):
        cuda._raise_reported(report, arrived=True)


@needs_no_gpu
def test_several_tables_of_one_form_beside_dense_updates() -> None:
    rule, lrs = Rule(epsilon=0.0), [0.25, 0.5, 1.0, 2.0]
    weights = [torch.zeros(3, 2) for _ in lrs]
    dense = [
        cuda.dense.of_tensors(w, torch.ones(3, 2), torch.zeros(3, 2), None, lr, 0.0, rule)
        for w, lr in zip(weights[:2], lrs[:2], strict=True)
    ]
    rows = [
        cuda.row_launches.of_tensors(w, torch.arange(3), torch.ones(3, 2), torch.zeros(3, 2), None, lr, 0.0, rule)
        for w, lr in zip(weights[2:], lrs[2:], strict=True)
    ]
    group = cuda.Group(rule, cuda.dense.concatenate(dense), cuda.row_launches.concatenate(rows))
    with np.errstate(all="ignore"):
        cuda.job([group], torch.device("cpu"))()
    assert [w.tolist() for w in weights] == [[[-lr] * 2] * 3 for lr in lrs]
