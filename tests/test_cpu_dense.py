"""The dense kernels on the CPU against the oracle, bit for bit."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import oracle
from adagrad import AdaGrad, GroupAdaGrad, RowSparse, rule
from adagrad.kernels import general_path
from adagrad.kernels.batch import of_states
from adagrad.kernels.cpu import dense as cpu_dense, formats, strided
from adagrad.kernels.inspection import layout as layouts, table
from support import (
    BFLOAT16,
    DTYPES,
    HYPERS,
    KINDS,
    Kind,
    Operands,
    apply,
    assert_same,
    assert_same_bits,
    check,
    expected,
    lay_out,
    layouts_of,
    normal,
    operands,
    set_layout,
    special,
    update_plain,
)

FLOAT32, FLOAT64 = KINDS[:2]
MASTER = Kind("float16", "float32", True)
BRAIN = Kind("bfloat16", "bfloat16")

SHAPES = [(1,), (15,), (16,), (17,), (33,), (1, 1), (3, 1), (2, 15), (5, 16), (4, 17), (2, 3, 5), (7, 33), (1, 100)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_shapes_and_hyper_parameters(kind: Kind, row_wise: bool) -> None:
    rng = np.random.default_rng(0)
    for name, hyper in HYPERS.items():
        for shape in SHAPES:
            o = operands(rng, kind, shape, row_wise=row_wise)
            check(o, replace(hyper, row_wise=row_wise), what=f"{name} {shape}")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_many_steps(kind: Kind) -> None:
    rng = np.random.default_rng(1)
    o = operands(rng, kind, (37,))
    for t in range(12):
        o.grad = normal(rng, (37,), DTYPES[kind.grad])
        check(o, HYPERS["all"], what=f"step {t}")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
def test_special_numbers(kind: Kind, hyper: oracle.Hyper) -> None:
    weights, grads, histories = special(DTYPES[kind.weight]), special(DTYPES[kind.grad]), special(kind.computing)
    at = [axis.reshape(-1) for axis in np.meshgrid(*(np.arange(len(a)) for a in (weights, grads, histories)))]
    master = special(np.float32)[at[0]] if kind.master else None
    check(Operands(weights[at[0]], grads[at[1]], histories[at[2]], master), hyper)


@pytest.mark.parametrize("kind", [FLOAT32, MASTER, BRAIN], ids=str)
def test_special_numbers_row_wise(kind: Kind) -> None:
    rng = np.random.default_rng(2)
    for hyper in (HYPERS["plain"], HYPERS["all"]):
        o = operands(rng, kind, (60, 18), row_wise=True)
        for array in (o.weight, o.grad, *([] if o.master is None else [o.master])):
            where = rng.integers(0, array.size, 40)
            array.reshape(-1)[where] = rng.choice(special(array.dtype), 40)
        check(o, replace(hyper, row_wise=True))


@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("kind", [FLOAT32, MASTER], ids=str)
def test_no_elements(kind: Kind, shape: tuple[int, ...], row_wise: bool) -> None:
    o = operands(np.random.default_rng(3), kind, shape, row_wise=row_wise)
    check(o, oracle.Hyper(row_wise=row_wise, wd=0.1))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_dimensions(kind: Kind) -> None:
    o = operands(np.random.default_rng(4), kind, ())
    check(o, HYPERS["all"])
    assert o.weight.shape == ()


def test_no_weights() -> None:
    apply([], [oracle.Hyper()])
    AdaGrad().update([], [], [], [])
    GroupAdaGrad().update([], [], [], [])


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64, MASTER, BRAIN], ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_layouts(kind: Kind, row_wise: bool) -> None:
    """Each operand in every layout while the others are plain, then all in layouts drawn by lot."""
    rng = np.random.default_rng(5)
    hyper = replace(HYPERS["all"], row_wise=row_wise)
    for shape in [(9,), (6, 5), (4, 3, 6)]:
        for operand in ("weight", "grad", "history", "master"):
            plain = operands(rng, kind, shape, row_wise=row_wise)
            array = getattr(plain, operand)
            for layout in layouts_of(array.dtype) if array is not None else ():
                o = plain.copy()
                setattr(o, operand, lay_out(array, layout))
                check(o, hyper, what=f"{operand} {layout} {shape}")
        for _ in range(20):
            o = operands(rng, kind, shape, row_wise=row_wise)
            chosen = []
            for operand in ("weight", "grad", "history", "master"):
                if (array := getattr(o, operand)) is not None:
                    chosen.append(str(rng.choice(layouts_of(array.dtype))))
                    setattr(o, operand, lay_out(array, chosen[-1]))
            check(o, hyper, what=f"{chosen} {shape}")


@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_around_a_tile(row_wise: bool, beside: int) -> None:
    rng = np.random.default_rng(6)
    size = strided.TILE + beside
    for shape in [(size,), (2, size), (size // 7, 7)]:
        if shape == (size,) and row_wise:
            continue
        o = operands(rng, FLOAT32, shape, row_wise=row_wise)
        o.weight, o.grad = lay_out(o.weight, "columns reversed"), lay_out(o.grad, "fortran")
        check(o, replace(HYPERS["decay"], row_wise=row_wise), what=str(shape))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_longer_than_a_tile(kind: Kind) -> None:
    """Row-wise, the lanes go on from one tile to the next, wherever a tile begins."""
    rng = np.random.default_rng(16)
    for shape in [(2, 2 * strided.TILE + 5), (2, 3, strided.TILE // 2 + 7), (1, strided.TILE // 3, 7)]:
        for name in ("unclipped", "clip", "decoupled", "inside"):
            o = operands(rng, kind, shape, row_wise=True)
            layouts = [str(rng.choice(layouts_of(array.dtype)[1:])) for array in (o.weight, o.grad, o.history)]
            o.weight, o.grad, o.history = map(lay_out, (o.weight, o.grad, o.history), layouts)
            if o.master is not None:
                o.master = lay_out(o.master, "columns stepped")
            check(o, replace(HYPERS[name], row_wise=True), what=f"{layouts} {shape} {name}")


def test_zero_dimensional_misaligned() -> None:
    o = operands(np.random.default_rng(7), FLOAT32, ())
    o.weight = lay_out(o.weight.reshape(1), "misaligned, byte-swapped").reshape(())
    assert not o.weight.flags.aligned
    check(o, HYPERS["all"])


@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_interleaved_views_of_one_array(row_wise: bool) -> None:
    rng = np.random.default_rng(8)
    hyper = replace(HYPERS["all"], row_wise=row_wise)
    base = normal(rng, (20, 4), np.float32)
    base[:, 2:] = np.abs(base[:, 2:])
    pair = [Operands(base[:, k], normal(rng, 20, np.float32), base[:, 2 + k]) for k in range(2)]
    want = [expected(o.copy(), hyper) for o in pair]
    apply(pair, [hyper, hyper])
    for o, w in zip(pair, want, strict=True):
        assert_same(o, w)


def test_gradients_may_share_memory_with_each_other() -> None:
    rng = np.random.default_rng(9)
    shared = normal(rng, 30, np.float32)
    given = [operands(rng, FLOAT32, (20,), grad=grad) for grad in (shared[:20], shared[10:], shared[:20])]
    want = [expected(o, HYPERS["decay"]) for o in given]
    apply(given, [HYPERS["decay"]] * 3)
    for o, w in zip(given, want, strict=True):
        assert_same(o, w)


def test_gradient_may_be_read_only_or_broadcast() -> None:
    rng = np.random.default_rng(10)
    o = operands(rng, FLOAT32, (6, 4), grad=np.broadcast_to(normal(rng, 4, np.float32), (6, 4)))
    assert not o.grad.flags.writeable
    check(o, HYPERS["all"])
    o.grad = np.broadcast_to(np.float32(2), (6, 4))
    check(o, HYPERS["all"])


def test_neighbouring_memory_is_not_touched() -> None:
    rng = np.random.default_rng(11)
    for layout in ("rows stepped", "columns stepped", "reversed and stepped"):
        o = operands(rng, FLOAT32, (5, 6))
        o.weight, o.history = lay_out(o.weight, layout), lay_out(o.history, layout)
        bases = [array if array.base is None else array.base for array in (o.weight, o.history)]
        owned = [np.count_nonzero(base == 77) for base in bases]
        apply([o], [HYPERS["all"]])
        assert [np.count_nonzero(base == 77) for base in bases] == owned == [60, 60]


class Mine(np.ndarray):
    """An array class of one's own."""


def test_subclasses_of_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(19)
    o = operands(rng, FLOAT32, (5, 4))
    want = expected(o, HYPERS["all"])
    mapped = np.memmap(tmp_path / "weight", np.float32, "w+", shape=(5, 4))
    mapped[...] = o.weight
    for weight, grad in ((o.weight.copy().view(Mine), o.grad.view(Mine)), (mapped, o.grad.view(np.matrix))):
        given = Operands(weight, grad, o.history.copy())
        apply([given], [HYPERS["all"]])
        assert_same(given, want)
        assert type(given.weight) is type(weight)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_plain_lists_take_the_fast_path(kind: Kind, row_wise: bool, count: int) -> None:
    """If this fails after an upgrade of NumPy, steps over many small arrays are slow, not wrong."""
    rng = np.random.default_rng(22)
    given = [operands(rng, kind, (3, 7), row_wise=row_wise) for _ in range(count)]
    if not row_wise:
        for o in given[::2]:
            o.weight, o.grad, o.history = (lay_out(a, "fortran") for a in (o.weight, o.grad, o.history))
            o.master = None if o.master is None else lay_out(o.master, "fortran")
    hyper = replace(HYPERS["all"], row_wise=row_wise)
    want = [expected(o, hyper) for o in given]

    assert update_plain(given, [hyper])
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")
    before = [o.copy() for o in given]
    given[-1].grad = given[-1].grad[::-1]  # of another order than its weight: all are left as they were
    assert not update_plain(given, [hyper])
    for o, w in zip(given, before, strict=True):
        assert_same(o, w)


@pytest.mark.parametrize("how", ["small", "one is not small", "parallel"])
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_lists_of_several_formats_take_the_fast_path(row_wise: bool, how: str, request: pytest.FixtureRequest) -> None:
    """As a model has whose norms are float32 and whose other weights are bfloat16; here all formats, mixed."""
    if how == "parallel":
        request.getfixturevalue("always_parallel")
    rng, threads = np.random.default_rng(30), 2
    given = [operands(rng, kind, (5, 3 + i), row_wise=row_wise) for i in range(2) for kind in KINDS]
    if how == "one is not small":
        given.insert(2, operands(rng, KINDS[0], (cpu_dense.PARALLEL_MIN // 50, 51), row_wise=row_wise))
    given[4:4] = [operands(rng, kind, (0, 3), row_wise=row_wise) for kind in KINDS[::-1]]
    hypers = [replace(HYPERS["all"], lr=0.1 * (i + 1), wd=0.01 * i, row_wise=row_wise) for i in range(len(given))]
    want = [expected(o, h) for o, h in zip(given, hypers, strict=True)]
    assert update_plain(given, hypers, threads)
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")
    want = [expected(o, hypers[0]) for o in given]
    assert update_plain(given, hypers[:1], threads)  # rates that all share
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")
    before = [o.copy() for o in given]
    given[-1].grad = given[-1].grad[:2]
    assert not update_plain(given, hypers, threads)
    for o, w in zip(given, before, strict=True):
        assert_same(o, w)


def test_without_the_fast_way_to_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NumPy's objects are not laid out as expected, the general path gives the same."""
    assert layouts.current_layout() is not None, "here they are"
    rng = np.random.default_rng(20)
    given = [operands(rng, FLOAT32, shape) for shape in [(40,), (0,), (3, 7), ()]]
    others = [o.copy() for o in given]
    apply(given, [HYPERS["all"]] * 4)
    set_layout(monkeypatch, None)
    assert layouts.current_layout() is None
    apply(others, [HYPERS["all"]] * 4)
    for o, other in zip(given, others, strict=True):
        assert_same(o, other)


# ---------------------------------------------------------------------------------------------------- lists and threads


def mixed_list(rng: np.random.Generator) -> list[Operands]:
    """Every kind, plain and strided, with empty and one-element weights among them."""
    shapes = [(40,), (0,), (3, 7), (1,), (), (65,), (2, 16)]
    given = [operands(rng, kind, shape) for kind in KINDS for shape in shapes]
    for o in given[::5]:
        if o.weight.ndim:
            o.weight = lay_out(o.weight, "columns reversed")
    return [given[i] for i in rng.permutation(len(given))]


def test_a_list_is_each_of_its_weights() -> None:
    rng = np.random.default_rng(12)
    given = mixed_list(rng)
    hypers = [
        replace(HYPERS["all"], lr=float(rng.random()), wd=float(rng.choice([0, 0.1, rng.random()]))) for _ in given
    ]
    want = [expected(o, hyper) for o, hyper in zip(given, hypers, strict=True)]
    apply(given, hypers)
    for i, (o, w) in enumerate(zip(given, want, strict=True)):
        assert_same(o, w, f"weight {i}")


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64, MASTER], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 7, 64])
def test_any_number_of_threads(kind: Kind, threads: int) -> None:
    rng = np.random.default_rng(13)
    shapes = [(1,), (100,), (0,), (16, 5), (3,), (17,), (50,)]
    given = [operands(rng, kind, shape) for shape in shapes]
    hypers = [replace(HYPERS["all"], lr=0.01 * (i + 1)) for i in range(len(given))]
    want = [expected(o, hyper) for o, hyper in zip(given, hypers, strict=True)]
    apply(given, hypers, threads=threads)
    for o, w in zip(given, want, strict=True):
        assert_same(o, w, f"{threads} threads")
    check(operands(rng, kind, (2,)), HYPERS["all"], threads=threads)


@pytest.mark.usefixtures("always_parallel")
@pytest.mark.parametrize("threads", [2, 3, 5, 64])
def test_any_number_of_threads_row_wise(threads: int) -> None:
    rng = np.random.default_rng(14)
    hyper = replace(HYPERS["all"], row_wise=True)
    shapes = [(1, 1), (9, 17), (30,), (0, 4), (2, 100), (100, 2), (5, 3, 2)]
    given = [operands(rng, FLOAT32, shape, row_wise=True) for shape in shapes]
    want = [expected(o, hyper) for o in given]
    apply(given, [hyper] * len(given), threads=threads)
    for o, w in zip(given, want, strict=True):
        assert_same(o, w, f"{threads} threads")


@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
def test_large(row_wise: bool) -> None:
    """As large as it takes for threads to be used, against the array expression."""
    rng = np.random.default_rng(15)
    o = operands(rng, FLOAT32, (5000, 33), row_wise=row_wise)
    other = o.copy()
    hyper = replace(HYPERS["all"], row_wise=row_wise)
    apply([o], [hyper])
    apply([other], [hyper], fused=False)
    assert_same(o, other)


# -------------------------------------------------------------------------------------------- what can go wrong quietly


def test_decay_that_rounds_to_zero_is_no_decay() -> None:
    o = Operands(np.array([np.inf, -0.0], np.float32), np.array([0.5, -0.0], np.float32), np.ones(2, np.float32))
    hyper = oracle.Hyper(wd=1e-60)
    same = o.copy()
    check(o, replace(hyper, wd=0.0))
    apply([same], [hyper])
    assert_same(same, o)
    # As a float64, the same number is not 0.
    wide = Operands(np.array([1e200]), np.array([0.0]), np.array([1.0]))
    check(wide, hyper)
    assert wide.history[0] > 1


def test_clip_below_the_least_number() -> None:
    grad = np.array([1.0, -1.0, 0.0, -0.0, np.nan], np.float32)
    o = Operands(np.ones(5, np.float32), grad, np.ones(5, np.float32))
    check(o, oracle.Hyper(clip_gradient=1e-60))
    assert o.history[:4].tolist() == [1, 1, 1, 1]
    # The bound is 0, and -0 keeps its sign, which a weight of -0 shows.
    check(Operands(np.full(5, -0.0, np.float32), grad, np.ones(5, np.float32)), oracle.Hyper(clip_gradient=1e-60))


def test_what_is_not_there_does_not_enter_the_mean_of_a_row() -> None:
    """Lanes beyond a short row are read as 0: times a scale or a decay that rounds to infinity, they would be NaN."""
    for hyper in (oracle.Hyper(rescale_grad=1e300, clip_gradient=0.4), oracle.Hyper(wd=1e300)):
        o = operands(np.random.default_rng(40), FLOAT32, (3, 5), row_wise=True)
        o.weight, o.grad = np.abs(o.weight) + 1, np.abs(o.grad) + 1
        check(o, replace(hyper, row_wise=True))


def test_no_warnings() -> None:
    """Overflow and division by zero are results, not warnings (which are errors here); a float16 rounds to infinity."""
    for fused in (True, False):
        o = Operands(np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32))
        apply([o], [oracle.Hyper(epsilon=0.0)], fused=fused)
        assert np.isnan(o.weight[0])
        o = Operands(np.zeros(1, np.float16), np.ones(1, np.float16), np.zeros(1, np.float32))
        apply([o], [oracle.Hyper(lr=1e6)], fused=fused)
        assert o.weight[0] == -np.inf


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even(name: str) -> None:
    """With lr 0 the weight becomes the rounding of its master copy: every number, midpoints and their neighbours."""
    dtype = DTYPES[name]
    every = np.arange(1 << 16, dtype=np.uint32)
    if name == "bfloat16":
        exact, middle = (every << 16).view(np.float32), ((every << 16) + 0x8000).view(np.float32)
    else:
        halves = every.astype(np.uint16).view(np.float16)
        exact = halves[np.isfinite(halves)].astype(np.float32)  # on ARM, NumPy warns of NaNs
        with np.errstate(over="ignore"):
            above = np.nextafter(exact.astype(np.float16), np.float16(np.inf)).astype(np.float32)
        middle = np.where(np.isfinite(above), (exact + above) / 2, np.float32(65520))
    thirds = [middle[k::3] for k in range(3)]
    near = [
        thirds[0],
        (thirds[1].view(np.uint32) - np.uint32(1)).view(np.float32),
        (thirds[2].view(np.uint32) + np.uint32(1)).view(np.float32),
    ]
    masters = np.concatenate([exact, *near, special(np.float32)])
    n = len(masters)
    o = Operands(np.zeros(n, dtype), np.zeros(n, dtype), np.ones(n, np.float32), masters.copy())
    apply([o], [oracle.Hyper(lr=0.0)])
    assert_same_bits(o.master, masters)
    assert_same_bits(o.weight, oracle.write(list(masters), (n,), dtype))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_number_is_read(name: str) -> None:
    """Each of the 65,536 bit patterns as a weight and as a gradient."""
    weight = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(DTYPES[name])
    grad = np.random.default_rng(18).permutation(weight)
    check(Operands(weight, grad, np.ones(1 << 16, np.float32)), HYPERS["plain"])


def test_float16_without_the_instruction() -> None:
    """Processors that lack it convert by integers: all of float16, and float32 numbers around each of them."""
    up, down = numba.njit(formats.half_to_float_by_integers), numba.njit(formats.float_to_half_by_integers)

    @numba.njit  # type: ignore[untyped-decorator]
    def convert(halves: Any, floats: Any, up_out: Any, down_out: Any) -> None:
        for i in range(len(halves)):
            up_out[i] = up(halves[i])
        for i in range(len(floats)):
            down_out[i] = down(floats[i])

    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    with np.errstate(invalid="ignore"):
        wide = halves.view(np.float16).astype(np.float32)
    steps = np.arange(-3, 4).astype(np.uint32) * 0x800  # quarters of float16's last place, and one beside them
    around = np.concatenate([(wide.view(np.uint32) + step + beside).view(np.float32)
                             for step in steps for beside in (0, 1, 0xFFFFFFFF)])  # fmt: skip
    floats = np.concatenate([around, special(np.float32), np.linspace(65500, 65540, 4001, dtype=np.float32)])
    up_out, down_out = np.empty(len(halves), np.float32), np.empty(len(floats), np.uint16)
    convert(halves, floats, up_out, down_out)
    assert_same_bits(up_out, wide)
    with np.errstate(all="ignore"):
        assert_same_bits(down_out.view(np.float16), floats.astype(np.float16))


def test_no_fused_multiply_add() -> None:
    """Where ``history + grad * grad`` and ``weight - lr * step`` would differ if the product were not rounded."""
    rng = np.random.default_rng(16)
    grad, history, weight = (rng.random(5000).astype(np.float32) for _ in range(3))
    product = (history.astype(np.float64) + grad.astype(np.float64) ** 2).astype(np.float32)
    o = Operands(weight, grad, history)
    check(o, oracle.Hyper())
    assert (o.history != product).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=["float32", "float16", "bfloat16"])
def test_history_keeps_the_computing_precision(dtype: Any) -> None:
    """Ones accumulate beyond 2048, where float16 stops, and 256, where bfloat16 does."""
    optimizer, weight, grad = AdaGrad(learning_rate=0.0), np.ones(20, dtype), np.ones(20, dtype)
    state = optimizer.create_state(0, weight)
    for _ in range(2100):
        optimizer.update(0, weight, grad, state)
    assert state.dtype == np.float32
    assert (state == 2100).all()


@pytest.mark.parametrize("weight", ["float16", "bfloat16", "float32", "float64"])
def test_codes_and_formats_say_the_same(weight: str) -> None:
    computing = "float64" if weight == "float64" else "float32"
    is_low = weight in ("float16", "bfloat16")
    for grad in {weight, "float32"} if is_low else {weight}:
        for has_master in {False, is_low}:
            code = table.code_of_formats(weight, grad, has_master=has_master)
            assert table.decode(code) == (0, (weight, grad, computing, "float32" if has_master else None))


@pytest.mark.parametrize("rows", [False, True], ids=["dense", "row-sparse"])
@pytest.mark.parametrize("strided", [False, True])
def test_arrays_live_until_the_work_is_done(rows: bool, strided: bool) -> None:
    """Another thread may empty the list that a state is."""
    step = 2 if strided else 1
    weight, grad = np.zeros((8, 3), np.float16)[::step], np.ones((8, 3), np.float16)[::step]
    given: Any = RowSparse(grad, np.arange(len(grad)), grad.shape) if rows else grad
    state = [weight.astype(np.float32), np.zeros(weight.shape, np.float32)]
    alive = [weakref.ref(each) for each in state]
    batch = of_states([weight], [given], [state], [0.5], [0.0], rule.Rule(epsilon=0.0))
    prepared = general_path.prepare([batch])
    del batch
    state[:] = []
    assert all(each() is not None for each in alive)
    prepared.run()
    assert (weight == -0.5).all()


@pytest.mark.parametrize("rows", [False, True])
def test_memory_mapped_arrays_take_the_fast_path(tmp_path: Path, rows: bool) -> None:
    def mapped(name: str, value: float) -> Any:
        array = np.memmap(tmp_path / name, np.float32, "w+", shape=(40, 3))
        array[:] = value
        return array

    weight, grad, history = mapped("weight", 1.0), mapped("grad", 0.5), mapped("history", 0.25)
    plain = [np.array(each) for each in (weight, grad, history)]
    given: list[Any] = [grad, plain[1]]
    if rows:
        given = [RowSparse(each, np.arange(40), (40, 3)) for each in given]
    for w, g, h in ((weight, given[0], history), (plain[0], given[1], plain[2])):
        assert update_plain([Operands(w, g, h)], [oracle.Hyper()])
    assert_same_bits(np.asarray(weight), plain[0])
    assert_same_bits(np.asarray(history), plain[2])


def test_a_read_only_gradient_that_is_copied_by_rows() -> None:
    weight, grad = np.ones((3, 4), np.float32), np.ones((4, 3), np.float32).T
    grad.flags.writeable = False
    history = np.zeros((3, 1), np.float32)
    GroupAdaGrad(1.0, epsilon=0.0).update(0, weight, grad, history)
    assert (weight == 0).all()
