"""The dense CUDA kernels against the rule written out in NumPy, bit for bit.

On a machine without a CUDA device the kernels run on CPU tensors, in Triton's interpreter or compiled (see ptx.py).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuda_operands import (
    DEVICE,
    DTYPES,
    GPU,
    HERE,
    ON_THE_GPU,
    DenseUpdate,
    as_numpy,
    assert_same,
    expected,
    make,
    needs_gpu,
    needs_no_gpu,
    rounded,
    run,
)

torch = pytest.importorskip("torch")

from adagrad.kernels import cuda  # noqa: E402
from adagrad.rule import Rule  # noqa: E402
from torch_versions import since  # noqa: E402

pytestmark = ON_THE_GPU

BLOCK = cuda.dense.BLOCK


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of the infinities that some tests are about."""
    with np.errstate(all="ignore"):
        yield


def check_update(updates: list[DenseUpdate], rule: Rule, scale: float | None = None, **options: Any) -> None:
    """Run ``updates`` in one call and compare every bit with the rule."""
    want = []
    for u in updates:
        dtype = str(u.weight.dtype).removeprefix("torch.")
        current = as_numpy(u.weight if u.master is None else u.master, dtype)
        new, history = expected(
            current, as_numpy(u.grad, dtype), as_numpy(u.history, dtype), float(u.lr), u.wd, rule, scale or 1.0
        )
        want.append((rounded(new, dtype), history, new, as_numpy(u.grad, dtype)))
    if scale is not None:
        options["grad_scale"] = torch.tensor(scale, device=DEVICE)
    run(rule, updates, **options)
    for u, (weight, history, new, grad) in zip(updates, want, strict=True):
        dtype = str(u.weight.dtype).removeprefix("torch.")
        assert_same(as_numpy(u.history, dtype), history)
        assert_same(as_numpy(u.weight, dtype), weight)
        assert_same(as_numpy(u.grad, dtype), grad)
        if u.master is not None:
            assert_same(as_numpy(u.master, dtype), new)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_sizes_around_a_block(dtype: str, size: int) -> None:
    check_update([make((size,), dtype)], Rule())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_in_one_call(dtype: str) -> None:
    shapes = [(3,), (), (BLOCK + 5,), (0, 4), (2, 5, 7), (1,)]
    check_update([make(s, dtype, i, lr=0.1 / (i + 1), wd=0.01 * i) for i, s in enumerate(shapes)], Rule())


def test_more_tensors_than_are_searched_at_once() -> None:
    check_update([make((1 + i % 3,), "float32", i, lr=1.0 + i) for i in range(260)], Rule())


def test_mixed_dtypes_in_one_call() -> None:
    updates = [make((20,), dtype, i) for i, dtype in enumerate([*DTYPES, *DTYPES])]
    updates.append(make((20,), "bfloat16", 9, master=True))
    check_update(updates, Rule())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("grad_dtype", ["same", "float32"])
def test_master_copy(dtype: str, grad_dtype: str) -> None:
    updates = [
        make((BLOCK + 3,), dtype, 1, master=True, grad_dtype=None if grad_dtype == "same" else grad_dtype),
        make((BLOCK + 3,), dtype, 2, grad_dtype=None if grad_dtype == "same" else grad_dtype),
    ]
    check_update(updates, Rule())


RULES = {
    "plain": Rule(),
    "rescaled": Rule(rescale_grad=-1 / 3),
    "clipped": Rule(rescale_grad=0.1, clip_gradient=0.3),
    "inside": Rule(epsilon=1e-10, epsilon_inside=True),
    "decoupled": Rule(decoupled_decay=True, clip_gradient=1.0),
    "no epsilon": Rule(epsilon=0.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_options(dtype: str, name: str, wd: float) -> None:
    check_update([make((300,), dtype, wd=wd)], RULES[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: str) -> None:
    """NaN passes through the clip, infinities are clipped, subnormals are kept, zeros have the right sign."""
    special = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1e-7, 3e38, -1.5]
    weight, grad, history = (a.ravel() for a in np.meshgrid(special, special, [0.0, 1e-42, 1.0, math.inf]))
    for rule in (Rule(), Rule(clip_gradient=0.5), Rule(epsilon=0.0)):
        for wd in (0.0, 0.1):
            u = make(weight.shape, dtype, wd=wd)
            for tensor, values in zip(u[:3], (weight, grad, history), strict=True):
                tensor.copy_(torch.from_numpy(values))
            check_update([u], rule)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_to_nearest_even(dtype: str) -> None:
    """All ties and their neighbours, subnormals and overflow included; lr 0 leaves the master copy as it is."""
    low = torch.arange(0, 1 << 16, 37, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype)).float()
    up = torch.nextafter(low.to(getattr(torch, dtype)), torch.tensor(math.inf, dtype=getattr(torch, dtype))).float()
    middle = (low.double() + up.double()).div(2).float()
    ties = torch.cat([middle, middle.nextafter(low), middle.nextafter(up), torch.tensor([3.4e38, 65519.0, 65520.0])])
    master = ties[torch.isfinite(ties)].to(DEVICE)
    weight = torch.zeros(len(master), dtype=getattr(torch, dtype), device=DEVICE)
    u = DenseUpdate(weight, torch.ones_like(weight), torch.ones_like(master), master.clone(), 0.0, 0.0)
    run(Rule(), [u])
    assert torch.equal(u.master, master)
    assert torch.equal(u.weight, master.to(weight.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 16, 17, 64, 80, 128, 200])
def test_row_wise(dtype: str, columns: int) -> None:
    updates = [make((rows, columns), dtype, rows, row_wise=True, wd=0.1) for rows in (1, 9, 33)]
    check_update(updates, Rule(row_wise=True))


def test_row_wise_of_more_and_fewer_dimensions() -> None:
    updates = [make(s, "float32", row_wise=True) for s in [(5,), (3, 2, 20), (4, 1, 1), (0, 7), (2, 130)]]
    updates.append(make((6, 40), "float16", master=True, row_wise=True))
    check_update(updates, Rule(row_wise=True, decoupled_decay=True, clip_gradient=2.0))


@pytest.mark.parametrize("row_wise", [False, True])
def test_tensors_without_alignment(row_wise: bool) -> None:
    def shifted(t: Any) -> Any:
        return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape)

    u = make((BLOCK // 16 + 1, 16), "float32", row_wise=row_wise)
    check_update([u._replace(weight=shifted(u.weight), grad=shifted(u.grad), history=shifted(u.history))],
                 Rule(row_wise=row_wise))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lr_dtype", ["float32", "float64"])
def test_lr_on_the_device(dtype: str, lr_dtype: str) -> None:
    lr = torch.tensor(0.1, dtype=getattr(torch, lr_dtype), device=DEVICE)
    check_update([make((10,), dtype, lr=lr), make((10,), dtype, 1, lr=0.3)], Rule())
    lr.fill_(0.7)
    check_update([make((10,), dtype, lr=lr)], Rule())


def test_lr_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"lr: a tensor of torch.int64: must be float32 or float64"):
        run(Rule(), [make((3,), "float32", lr=torch.tensor(1, device=DEVICE))])


def test_what_grad_scaler_gives_moves_to_the_device() -> None:
    moved: list[Any] = []

    class Elsewhere:
        def to(self, *where: Any, **how: Any) -> Any:
            moved.append((*where, how))
            return torch.ones((), device=DEVICE)

    cuda.job([], HERE, grad_scale=Elsewhere(), found_inf=Elsewhere())  # type: ignore[arg-type]
    assert moved == [(HERE, {"non_blocking": True})] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_scale_divides_first(dtype: str) -> None:
    check_update([make((300,), dtype)], Rule(rescale_grad=0.7, clip_gradient=0.1), scale=3.0)


@pytest.mark.parametrize("row_wise", [False, True])
def test_found_inf_makes_the_call_a_no_op(row_wise: bool) -> None:
    rule = Rule(row_wise=row_wise)
    u = make((5, 4), "bfloat16", master=True, row_wise=row_wise)
    before = [t.clone() for t in u[:4]]
    run(rule, [u], found_inf=torch.ones(1, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(before, u[:4], strict=True))
    check_update([u], rule, found_inf=torch.zeros((), device=DEVICE))


def test_tables_are_kept_and_told_apart() -> None:
    """Nothing is uploaded for what did not change; a change of any address, size, lr, wd or rule is seen."""
    updates = [make((10,), "float32", i) for i in range(3)]
    uploads = 0
    tables = cuda.tables.tables_of(HERE)
    upload = tables._upload

    def count(words: np.ndarray) -> Any:
        nonlocal uploads
        uploads += 1
        return upload(words)

    tables._upload = count  # type: ignore[method-assign]
    try:
        check_update(updates, Rule())
        uploads = 0
        for _ in range(3):
            check_update(updates, Rule())
        assert uploads == 0
        for changed, rule, number in [
            ([updates[0]._replace(lr=0.25), *updates[1:]], Rule(), 1),
            ([updates[0], updates[1]._replace(wd=0.5), updates[2]], Rule(), 1),
            (updates, Rule(epsilon=1e-3), 1),
            ([updates[0], updates[1], make((10,), "float32", 7)], Rule(), 1),
            ([updates[0]._replace(weight=updates[0].weight[:4], grad=updates[0].grad[:4],
                                  history=updates[0].history[:4]), *updates[1:]], Rule(), 1),
            (updates, Rule(), 0),
        ]:  # fmt: skip
            uploads = 0
            check_update(changed, rule)
            assert uploads == number
    finally:
        del tables._upload


def test_many_tables_push_out_the_oldest() -> None:
    u = make((4,), "float32")
    for k in range(3 * cuda.tables.KEPT):
        check_update([u._replace(lr=0.1 + k)], Rule())
    assert len(cuda.tables.tables_of(HERE)._settings) == cuda.tables.KEPT


def test_a_capture_finds_pinned_memory_after_another_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    tables = cuda.tables.Tables(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]

    def pinned(size: int) -> torch.Tensor:
        asked.append(tables.is_capturing)
        return empty(size, dtype=torch.int64)

    empty = torch.empty
    monkeypatch.setattr(cuda.tables, "_pinned", pinned)
    monkeypatch.setattr(cuda.tables, "_slab", [])
    monkeypatch.setattr(cuda.tables, "_captured", [])
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    for _ in range(3):  # graphs, some one after the other, after a warm-up which finds its tables
        for tables.is_capturing in (False, False, True, True, True):
            tables.settings([0.1] * 9, [0.0] * 9, Rule())
            tables.settings([0.2] * 9, [0.0] * 9, Rule())
    assert True not in asked
    assert len(cuda.tables._captured) == 18
    starts = [host.data_ptr() for host in cuda.tables._captured]
    assert len({*starts}) == 18
    tables.is_capturing = False
    many = cuda.tables.SLAB // 4  # a table that does not fit a slab
    tables.settings([0.1] * many, [0.0] * many, Rule())
    tables.is_capturing = True
    for _ in range(3):
        tables.settings([0.1] * many, [0.0] * many, Rule())
    assert True not in asked


@pytest.mark.parametrize("first", [0.0, -0.0])
def test_zeros_of_either_sign_have_tables_of_their_own(first: float) -> None:
    results = []
    for value in (first, -first, first):
        u = make((1,), "float32", lr=value, wd=0.0)
        for tensor, number in ((u.weight, -0.0), (u.grad, 1.0), (u.history, 1.0)):
            tensor.fill_(number)
        run(Rule(), [u])
        results.append(math.copysign(1.0, u.weight.item()))
    expected = [math.copysign(1.0, -0.0 - value) for value in (first, -first, first)]
    assert results == expected
    scaled = []
    for scale in (first, -first):
        u = make((1,), "float32", lr=0.5, wd=0.0)
        u.weight.fill_(-0.0)
        run(Rule(rescale_grad=scale), [u])
        scaled.append(math.copysign(1.0, u.weight.item()))
    assert scaled[0] != scaled[1]


def test_another_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_reports", {})
    with torch.device("meta"):
        check_update([make((5,), "float32")], Rule())
        if GPU:
            assert cuda.tables._pinned(3).device.type == "cpu"


def test_tensors_live_until_the_launch() -> None:
    """The gradient of a DTensor that was redistributed has no other owner."""
    u = make((4,), "float32")
    grad = u.grad.clone()
    gone = weakref.ref(grad)
    updates = cuda.dense.concatenate([cuda.dense.of_tensors(*u._replace(grad=grad), Rule()) for _ in range(2)])
    del grad
    assert gone() is not None
    del updates
    assert gone() is None


def test_nothing_to_do() -> None:
    run(Rule(), [])
    run(Rule(), [make((0,), "float32"), make((3, 0), "float32", row_wise=True)])
    cuda.check()


COMPILE = """
import re
import sys
import torch
from triton.runtime import JITFunction, driver
from ptx import Device

driver.set_active(Device(int(sys.argv[1])))
compiled = []
run = JITFunction.run

def compile_only(self, *args, grid, warmup, **options):
    compiled.append((self.__name__, options, run(self, *args, grid=grid, warmup=True, **options).asm["ptx"]))

JITFunction.run = compile_only
from adagrad.kernels import cuda
from adagrad.rule import Rule

number = torch.ones(())
single, double, half = torch.float32, torch.float64, torch.bfloat16
cases = [
    (48, single, single, single, False, False), (48, single, single, single, True, False),
    (48, double, double, double, False, False), (48, half, single, single, False, False),
    (48, half, half, single, False, True), (48, half, half, single, True, True),
    (1, single, single, single, False, False),  # the length is a constant in what is compiled
    (100, single, single, single, False, False),  # a multiple of 4 elements, 16 bytes, but not of 16
]
for length, dtype, kind, wide, row_wise, has_master in cases if int(sys.argv[2]) else cases[::5]:
    weight, history = torch.zeros(9, length, dtype=dtype), torch.zeros(9, 1 if row_wise else length, dtype=wide)
    grad, values = torch.zeros(9, length, dtype=kind), torch.zeros(200, length, dtype=kind)
    master = torch.zeros(9, length) if has_master else None
    rule = Rule(row_wise=row_wise)
    dense = cuda.dense.of_tensors(weight, grad, history, master, 0.1, 0.1, rule)
    ids = torch.zeros(200, dtype=torch.int64)
    rows = cuda.row_launches.of_tensors(weight, ids, values, history, master, number, 0.1, rule)
    for some in ([rows] if dtype == kind != double else []) + [cuda.row_launches.concatenate([rows, rows])]:
        cuda.job([cuda.Group(rule, dense, some)], number.device, grad_scale=number, found_inf=number)()

operations = re.compile(r"\\b(?:fma|mad|add|sub|mul|div|r?sqrt|rcp|min|max)[a-z0-9.]*[.]f(?:32|64)(?:x2)?\\b")
names = set()
for name, options, ptx in compiled:
    names.add(name)
    bits = "f64" if "fp64" in str(options.get("COMPUTE")) else "f32"
    used = {"check_ids": [], "check_ids_of_all": [], "sort_keys": []}
    exact = {f"{op}.rn.{bits}" for op in used.get(name, ["add", "sub", "mul", "div", "sqrt"])}
    found = {operation.removesuffix("x2") for operation in operations.findall(ptx)}  # x2: of two numbers at once
    if found != exact:
        raise SystemExit(f"{name} {options}: {found}")
    wide = name == "update_elements" or (name == "update_runs" and not options["LONG"] and "bf16" not in str(options))
    wide = wide and options.get("COLUMNS") != 1
    if wide and not all(re.search(f"{a}.global.v(4.b32|2.b64)", ptx) for a in ("ld", "st")):
        raise SystemExit(f"{name} {options}: no 16-byte accesses")
    # The bits of -0, in one of the formats; what stands for no occurrence must not change a sum of -0.
    minus_zero = r"-2147483648|-2147450880|-9223372036854775808|0f80000000|0d8000000000000000"
    if name == "update_runs" and not re.search(minus_zero, ptx):
        raise SystemExit(f"{name} {options}: no -0")
if names != {*used, "update_elements", "update_rows", "update_runs"}:
    raise SystemExit(f"compiled only {names}")
kinds = {(o["LONG"], o["ALIGNED"], o["HAS_MASTER"], o["ROW_WISE"]) for name, o, _ in compiled if name == "update_runs"}
if len(kinds) < (16 if int(sys.argv[2]) else 8):  # ALIGNED is asked for several weights alone
    raise SystemExit(f"compiled only {kinds}")
"""


@pytest.mark.parametrize(
    ("capability", "all_formats"),
    [(90, 1), pytest.param(100, 0, marks=since("2.7", "compiler for that GPU, in Triton 3.2,"))],
)
def test_compiled_for_a_gpu_every_operation_is_rounded_by_itself(capability: int, all_formats: int) -> None:
    """No fused multiply-add, no flush to zero, no approximate division or root. Compiling needs no device.

    test_ptx.py runs what is compiled, but not with every Triton, and needs a C compiler.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), str(all_formats)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_replays_the_step() -> None:
    lr = torch.tensor(0.1, device=DEVICE)
    u, twin = (make((BLOCK + 1,), "float32", lr=lr) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(Rule(), [u])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run(Rule(), [u])
    for k in range(3 * cuda.tables.KEPT):
        run(Rule(), [make((5,), "float32", lr=0.1 + k)])
    lr.fill_(0.2)
    graph.replay()
    lr.fill_(0.1)
    run(Rule(), [twin])
    lr.fill_(0.2)
    run(Rule(), [twin])
    assert torch.equal(u.weight, twin.weight)
    assert torch.equal(u.history, twin.history)


@pytest.mark.gpu
@needs_gpu
def test_more_than_2_to_the_31_elements() -> None:
    elements = 2**31 + 10
    if torch.cuda.mem_get_info()[0] < 12 * elements:
        pytest.skip(reason="needs 26 GB of device memory")
    weight = torch.zeros(elements, dtype=torch.float16, device=DEVICE)
    history = torch.zeros(elements, device=DEVICE)
    grad = torch.ones_like(weight)
    run(Rule(epsilon=0.0), [DenseUpdate(weight, grad, history, None, 0.5, 0.0)])
    assert weight.min().item() == weight.max().item() == -0.5
    assert history.min().item() == history.max().item() == 1.0


def test_learning_rates_of_two_dtypes_at_one_address() -> None:
    memory = torch.zeros(1, dtype=torch.float64)
    tables = cuda.tables.Tables(torch.device("cpu"))
    words = [tables.settings([lr], [0.0], Rule()).tolist() for lr in (memory[0], memory.view(torch.float32)[0])]
    assert words[0] != words[1]


def test_the_place_of_weight_decay_tells_tables_apart() -> None:
    tables = cuda.tables.Tables(torch.device("cpu"))
    words = [tables.settings([0.1], [0.1], Rule(decoupled_decay=d)).tolist() for d in (False, True)]
    assert words[0] != words[1]


def test_a_table_that_is_used_is_not_pushed_out() -> None:
    tables = cuda.tables.Tables(torch.device("cpu"))
    first = tables.settings([0.1], [0.0], Rule())
    for k in range(3 * cuda.tables.KEPT):
        tables.settings([1.0 + k], [0.0], Rule())
        assert tables.settings([0.1], [0.0], Rule()) is first


@needs_no_gpu
def test_each_group_has_its_own_rule() -> None:
    rules, weights, groups = [Rule(epsilon=1.0), Rule(epsilon=3.0)], [torch.zeros(3) for _ in range(2)], []
    for rule, w in zip(rules, weights, strict=True):
        dense = cuda.dense.of_tensors(w, torch.ones(3), torch.zeros(3), None, 1.0, 0.0, rule)
        groups.append(cuda.Group(rule, dense, None))
    cuda.job(groups, torch.device("cpu"))()
    assert [w.tolist() for w in weights] == [[-0.5] * 3, [-0.25] * 3]


def test_rates_that_updates_share_stay_theirs_beside_others() -> None:
    def dense(lr: float, wd: float) -> Any:
        return cuda.dense.of_tensors(torch.ones(2), torch.ones(2), torch.ones(2), None, lr, wd, Rule())

    def rows(lr: float, wd: float) -> Any:
        given = torch.ones(2), torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.ones(2), None
        return cuda.row_launches.of_tensors(*given, lr, wd, Rule())

    for module, build in ((cuda.dense, dense), (cuda.row_launches, rows)):
        two = module.concatenate([build(0.5, 0.25)] * 2)._replace(lrs=[0.5], wds=[0.25])
        assert two._replace(wds=[0.25, 0.75]).rates() == ([0.5, 0.5], [0.25, 0.75])
        for other in (two, build(1.0, 2.0)):
            both = module.concatenate([two, other])
            extra = ([0.5, 0.5], [0.25, 0.25]) if other is two else ([1.0], [2.0])
            assert both.rates() == ([0.5, 0.5, *extra[0]], [0.25, 0.25, *extra[1]])


def test_formats_at_the_same_addresses_have_launches_of_their_own() -> None:
    tables, w, h = cuda.tables.Tables(torch.device("cpu")), torch.ones(4, dtype=torch.float16), torch.ones(4)
    kernels = []
    for dtype in (torch.float16, torch.bfloat16):
        low = w.view(dtype)
        ((launch,),) = [tables.addresses(cuda.dense.of_tensors(low, low, h, None, 0.1, 0.0, Rule()))[1]]
        kernels.append(launch.kernel)
    assert kernels[0] is not kernels[1]


def test_flags_are_zero_and_apart() -> None:
    """Aligned like a number of its own, of which there is one for each replay of a graph."""
    tables = cuda.tables.Tables(torch.device("cpu"))
    flags = [tables.flag() for _ in range(3 * cuda.tables.FLAGS)]
    assert all(flag.shape == (1,) and flag.dtype == torch.int32 and not flag.any() for flag in flags)
    assert len({flag.data_ptr() for flag in flags}) == len(flags)
    assert all((flag.data_ptr() - flags[0].data_ptr()) % 16 == 0 for flag in flags[: cuda.tables.FLAGS])
    tables.is_capturing = True
    assert tables.flag().untyped_storage().nbytes() == 4


def test_launches_are_bound_once_for_the_same_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """But each time with other tensors beside them, and in a capture."""
    bound: list[Any] = []
    monkeypatch.setattr(cuda.dense, "bind", lambda *arguments: bound.append(arguments) or len(bound))
    tables, given = cuda.tables.Tables(torch.device("cpu")), [torch.ones(4) for _ in range(3)]
    updates, number = cuda.dense.of_tensors(*given, None, 0.1, 0.0, Rule()), torch.zeros(())

    def launches(lr: float, *numbers: Any) -> Any:
        return tables.dense_launches(*tables.addresses(updates), tables.settings([lr], [0.0], Rule()), *numbers)

    assert [launches(lr, None, None, None) for lr in (0.1, 0.1, 0.2, 0.1)] == [[1], [1], [2], [1]]
    assert [launches(0.1, None, None, number) for _ in range(2)] == [[3], [4]]
    tables.is_capturing = True
    assert [launches(0.1, None, None, None) for _ in range(2)] == [[5], [6]]
    tables.is_capturing = False
    assert launches(0.1, None, None, None) == [1]


def test_half_a_slab_is_kept_for_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.tables, "_pinned", lambda size: torch.empty(size, dtype=torch.int64))
    monkeypatch.setattr(cuda.tables, "_slab", [torch.empty(cuda.tables.SLAB // 4, dtype=torch.int64)])
    cuda.tables._fill_slab(10)
    assert len(cuda.tables._slab[0]) >= cuda.tables.SLAB // 2


def test_captures_share_no_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph reads at each replay is not written to by the capture of another; all of a slab is used."""
    monkeypatch.setattr(cuda.tables, "_slab", [torch.zeros(8, dtype=torch.int64)])
    first, second = cuda.tables._from_slab(3), cuda.tables._from_slab(5)
    assert (len(first), len(second)) == (3, 5)
    assert second.data_ptr() == first.data_ptr() + 3 * first.itemsize


def test_tables_with_and_without_shared_rates_are_told_apart() -> None:
    tables, given = cuda.tables.Tables(torch.device("cpu")), [torch.ones(4) for _ in range(3)]
    one = cuda.dense.of_tensors(*given, None, 0.1, 0.0, Rule())
    apart = cuda.dense.concatenate([one, one])
    together = apart._replace(lrs=[0.1], wds=[0.0])
    assert tables.addresses(apart)[0].tolist() != tables.addresses(together)[0].tolist()


def test_streams_and_threads_have_tables_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on tables is in the order of one stream, and of one thread: another might overwrite what is still read."""
    stream, device = 1, torch.device("cuda", 0)
    monkeypatch.setattr(cuda.tables, "_local", cuda.tables._Local())
    monkeypatch.setattr(cuda.tables, "_stream_of", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first = cuda.tables.tables_of(device)
    stream = 2
    second = cuda.tables.tables_of(device)
    elsewhere: list[Any] = []
    thread = threading.Thread(target=lambda: elsewhere.append(cuda.tables.tables_of(device)))
    thread.start()
    thread.join()
    assert len({id(tables) for tables in (first, second, *elsewhere)}) == 3
    stream = 1
    assert cuda.tables.tables_of(device) is first
    assert cuda.tables.tables_of(torch.device("cuda", 1)) is not first
