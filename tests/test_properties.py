"""What holds for all numbers, shapes, hyper-parameters and layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis.extra import numpy as hnp

import oracle
from adagrad import AdaGrad, GroupAdaGrad, RowSparse, arrays
from support import (
    DTYPES,
    HYPERS,
    KINDS,
    Kind,
    Operands,
    always_parallel,
    apply,
    assert_same,
    assert_same_bits,
    history_shape,
    lay_out,
    layouts_of,
    normal,
    operands,
)

FLOAT32 = KINDS[0]

rates = st.floats(0, 1e300) | st.sampled_from([0.0, 0.01, 0.1, 1.0])
hypers = st.builds(
    oracle.Hyper,
    lr=rates,
    wd=st.just(0.0) | rates,
    rescale_grad=st.just(1.0) | st.floats(allow_nan=False, allow_infinity=False),
    clip_gradient=st.none() | st.floats(0, 1e300, exclude_min=True),
    epsilon=st.just(1e-6) | rates,
    epsilon_inside=st.booleans(),
    decoupled_decay=st.booleans(),
    row_wise=st.booleans(),
)
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=20)


def numbers(draw: st.DrawFn, dtype: np.dtype[Any], shape: tuple[int, ...], *, least: float | None = None) -> np.ndarray:
    """Any bits of a float, NaN and infinities included, in any layout."""
    wide = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
    elements = st.floats(least, allow_nan=False, width=wide.itemsize * 8) | st.just(float("nan"))
    drawn = draw(hnp.arrays(wide, shape, elements=elements, fill=st.sampled_from([0.0, 0.5, 3.0])))
    with np.errstate(over="ignore", invalid="ignore"):
        array = drawn.astype(dtype)
    return lay_out(array, draw(st.sampled_from(layouts_of(dtype))))


@st.composite
def dense(draw: st.DrawFn, row_wise: bool = False) -> Operands:
    kind, shape = draw(kinds), draw(shapes)
    return Operands(
        numbers(draw, DTYPES[kind.weight], shape),
        numbers(draw, DTYPES[kind.grad], shape),
        numbers(draw, kind.computing, history_shape(shape, row_wise), least=0.0),
        numbers(draw, np.dtype(np.float32), shape) if kind.master else None,
    )


@st.composite
def sparse(draw: st.DrawFn, row_wise: bool = False) -> Operands:
    kind, shape = draw(kinds), draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=8))
    indices = draw(
        hnp.arrays(draw(st.sampled_from(["i4", "i8"])), st.integers(0, 12), elements=st.integers(0, shape[0] - 1))
    )
    values = numbers(draw, DTYPES[kind.grad], (len(indices), *shape[1:]))
    return Operands(
        numbers(draw, DTYPES[kind.weight], shape),
        RowSparse(values, indices, shape),
        numbers(draw, kind.computing, history_shape(shape, row_wise), least=0.0),
        numbers(draw, np.dtype(np.float32), shape) if kind.master else None,
    )


@given(st.data(), hypers)
def test_fused_is_the_rule(data: st.DataObject, hyper: oracle.Hyper) -> None:
    o = data.draw(dense(hyper.row_wise))
    other = o.copy()
    apply([o], [hyper])
    apply([other], [hyper], fused=False)
    assert_same(o, other)


@given(st.data(), hypers)
def test_fused_is_the_rule_for_rows(data: st.DataObject, hyper: oracle.Hyper) -> None:
    o = data.draw(sparse(hyper.row_wise))
    other = o.copy()
    apply([o], [hyper])
    apply([other], [hyper], fused=False)
    assert_same(o, other)


@given(seeds, kinds, shapes, hypers, st.booleans())
def test_distinct_rows_are_dense_ones(
    seed: int, kind: Kind, shape: tuple[int, ...], hyper: oracle.Hyper, fused: bool
) -> None:
    rng = np.random.default_rng(seed)
    o = operands(rng, kind, shape, row_wise=hyper.row_wise)
    present = rng.permutation(shape[0])[: rng.integers(0, shape[0] + 1)]
    part = o.copy()
    part.grad = RowSparse(o.grad[present], present, shape)
    absent = np.setdiff1d(np.arange(shape[0]), present)
    before = o.copy()
    apply([o], [hyper])
    apply([part], [hyper], fused=fused)
    for name in ("weight", "history", "master"):
        if (array := getattr(part, name)) is not None:
            assert_same_bits(array[present], getattr(o, name)[present], name)
            assert_same_bits(array[absent], getattr(before, name)[absent], name)


@given(seeds, kinds, hypers, st.integers(0, 30))
def test_the_order_of_distinct_rows_means_nothing(seed: int, kind: Kind, hyper: oracle.Hyper, count: int) -> None:
    rng = np.random.default_rng(seed)
    indices = rng.permutation(40)[:count]
    values = normal(rng, (count, 3), DTYPES[kind.grad])
    o = operands(rng, kind, (40, 3), row_wise=hyper.row_wise, grad=RowSparse(values, indices, (40, 3)))
    other = o.copy()
    shuffled = rng.permutation(count)
    other.grad = RowSparse(values[shuffled], indices[shuffled], (40, 3))
    apply([o], [hyper])
    apply([other], [hyper])
    assert_same(o, other)


@given(seeds, hypers, st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_only_the_order_within_a_row_counts(seed: int, hyper: oracle.Hyper, counts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    sorted_ids = np.repeat(rng.permutation(6)[: len(counts)], counts)
    values = normal(rng, (len(sorted_ids), 2), np.float32)
    o = operands(rng, FLOAT32, (6, 2), row_wise=hyper.row_wise, grad=RowSparse(values, sorted_ids, (6, 2)))
    other = o.copy()
    mixed = rng.permutation(sorted_ids)
    # The k-th occurrence of a row in the mixed list carries its k-th values.
    back = np.empty_like(values)
    for row in set(mixed.tolist()):
        back[mixed == row] = values[sorted_ids == row]
    other.grad = RowSparse(back, mixed, (6, 2))
    apply([o], [hyper])
    apply([other], [hyper])
    assert_same(o, other)


@given(seeds, st.sampled_from([KINDS[0], KINDS[-1]]), hypers, st.integers(2, 40), st.booleans())
def test_any_number_of_threads(seed: int, kind: Kind, hyper: oracle.Hyper, threads: int, rows: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    grad = None
    if rows:
        indices = np.minimum(rng.zipf(1.3, rng.integers(0, 2000)) - 1, shape[0] - 1)
        grad = RowSparse(normal(rng, (len(indices), shape[1]), DTYPES[kind.grad]), indices, shape)
    o = operands(rng, kind, shape, row_wise=hyper.row_wise, grad=grad)
    other = o.copy()
    apply([o], [hyper], threads=1)
    with always_parallel():
        apply([other], [hyper], threads=threads)
    assert_same(o, other)


@given(seeds, kinds, hypers, st.integers(1, 200), st.data())
def test_splitting_a_weight_changes_nothing(
    seed: int, kind: Kind, hyper: oracle.Hyper, size: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    at = data.draw(st.integers(0, size))
    o = operands(rng, kind, (size, 3), row_wise=hyper.row_wise)
    other = o.copy()
    apply([o], [hyper])
    halves = [
        Operands(
            other.weight[part],
            o.grad[part],
            other.history[part],
            other.master if other.master is None else other.master[part],
        )
        for part in (slice(None, at), slice(at, None))
    ]
    if data.draw(st.booleans()):
        apply(halves, [hyper, hyper])
    else:
        for half in halves:
            apply([half], [hyper])
    assert_same(o, other)


moderate = st.floats(2**-10, 1024, width=32).flatmap(lambda x: st.sampled_from([x, -x]))


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=moderate), st.floats(1e-3, 10), st.booleans())
def test_the_first_step_is_the_rate_times_the_sign(grad: np.ndarray, lr: float, fused: bool) -> None:
    for klass, size in ((AdaGrad, 1), (GroupAdaGrad, 1)):
        optimizer = klass(learning_rate=lr, use_fused_step=fused)
        weight = np.zeros((len(grad), size), np.float32)
        optimizer.update(0, weight, grad[:, None], optimizer.create_state(0, weight))
        # sqrt(grad * grad) + epsilon is |grad| up to epsilon, and each of the four operations up to a rounding.
        np.testing.assert_allclose(weight[:, 0], -lr * np.sign(grad), rtol=2e-3)
        np.testing.assert_allclose(weight[:, 0], -lr * grad / (np.abs(grad) + 1e-6), rtol=4e-7)


@given(seeds, kinds, st.booleans(), st.booleans(), st.integers(1, 6))
def test_the_history_never_decreases(seed: int, kind: Kind, row_wise: bool, rows: bool, steps: int) -> None:
    rng = np.random.default_rng(seed)
    o = operands(rng, kind, (9, 5), row_wise=row_wise)
    for _ in range(steps):
        values = normal(rng, (9, 5), DTYPES[kind.grad])
        o.grad = RowSparse(values, rng.integers(0, 9, 9), (9, 5)) if rows else values
        before = o.history.copy()
        apply([o], [replace(HYPERS["all"], row_wise=row_wise)])
        assert (o.history >= before).all()


@given(seeds, st.booleans(), st.integers(-20, 20))
@example(seed=0, row_wise=True, power=1)
def test_the_scale_of_the_gradients_cancels(seed: int, row_wise: bool, power: int) -> None:
    """Without epsilon and decay, gradients twice as large give the very same weights."""
    rng = np.random.default_rng(seed)
    hyper = oracle.Hyper(epsilon=0.0, row_wise=row_wise)
    one = operands(rng, FLOAT32, (7, 20), row_wise=row_wise)
    one.history[...] = 0
    two = one.copy()
    two.grad = one.grad * np.float32(2.0**power)
    for _ in range(3):
        apply([one], [hyper])
        apply([two], [hyper])
    assert_same_bits(one.weight, two.weight)
    assert_same_bits(one.history * np.float32(4.0**power), two.history)


@given(seeds, st.integers(1, 400))
def test_duplicates_are_summed_and_then_applied_once(seed: int, count: int) -> None:
    """Nearly what one dense update with the summed gradient does; not what one update after another does."""
    rng = np.random.default_rng(seed)
    indices, values = rng.integers(0, 4, count), rng.standard_normal((count, 3))
    summed = np.zeros((4, 3))
    np.add.at(summed, indices, values)
    assume((np.abs(summed) > 1e-6).all() or set(indices) != {0, 1, 2, 3})
    o = operands(rng, KINDS[1], (4, 3), grad=RowSparse(values, indices, (4, 3)))
    other = replace(o.copy(), grad=summed)
    apply([o], [oracle.Hyper()])
    apply([other], [oracle.Hyper()])
    present = sorted(set(indices))
    np.testing.assert_allclose(o.weight[present], other.weight[present], rtol=1e-9)
    np.testing.assert_allclose(o.history[present], other.history[present], rtol=1e-9)


def addresses(array: np.ndarray) -> list[int]:
    """The address of every byte of every element."""
    starts = [array.__array_interface__["data"][0] + sum(i * s for i, s in zip(at, array.strides, strict=True))
              for at in np.ndindex(array.shape)]  # fmt: skip
    return [start + byte for start in starts for byte in range(array.itemsize)]


@given(st.integers(1, 4), st.integers(0, 6), st.data(), st.booleans())
def test_shared_memory_is_found_and_nothing_else(count: int, size: int, data: st.DataObject, fused: bool) -> None:
    """Weights, histories and gradients anywhere in one array, contiguous, stepped, reversed, or off by a byte."""
    memory = np.zeros(400, np.uint8)
    layouts = [4] if data.draw(st.booleans()) else [4, 8, 12, -4, -8, 6]

    def view() -> np.ndarray:
        stride = data.draw(st.sampled_from(layouts))
        least = max(0, -stride * (size - 1)) if size else 0
        start = data.draw(st.integers(0, 60)) * data.draw(st.sampled_from([4, 4, 4, 1])) + least
        return np.ndarray((size,), np.float32, memory.data, start, (stride,))

    weights, grads, histories = ([view() for _ in range(count)] for _ in range(3))
    written = [set(addresses(array)) for array in weights + histories]
    read = set().union(*map(addresses, grads)) if size else set()
    shared = sum(map(len, written)) != len(set().union(*written)) or any(each & read for each in written)
    optimizer = AdaGrad(use_fused_step=fused)
    if shared:
        with pytest.raises(ValueError, match="shares memory with"):
            optimizer.update(list(range(count)), weights, grads, histories)
    else:
        optimizer.update(list(range(count)), weights, grads, histories)
    assert optimizer.num_update == (0 if shared else 1)


@given(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4), st.data())
def test_arrays_that_overlap_themselves_are_found(shape: tuple[int, ...], data: st.DataObject) -> None:
    strides = tuple(data.draw(st.integers(-20, 20)) for _ in shape)
    least = sum(max(0, -stride * (n - 1)) for stride, n in zip(strides, shape, strict=True))
    array = np.ndarray(shape, np.float32, np.zeros(400, np.uint8).data, least, strides)
    found = addresses(array)
    assert arrays.overlaps_itself(array) == (len(found) != len(set(found)))


BAD: dict[str, Any] = {
    "shape": lambda o: setattr(o, "grad", np.ones(99, np.float32)),
    "dtype": lambda o: setattr(o, "grad", np.ones(o.weight.shape, np.int32)),
    "no array": lambda o: setattr(o, "grad", None),
    "row too large": lambda o: setattr(
        o, "grad", RowSparse(o.weight[:1].copy(), np.array([len(o.weight)]), o.weight.shape)
    ),
    "row negative": lambda o: setattr(o, "grad", RowSparse(o.weight[:1].copy(), np.array([-1]), o.weight.shape)),
    "history": lambda o: setattr(o, "history", np.ones(1, np.float16)),
    "read-only": lambda o: o.weight.setflags(write=False),
    "shared": lambda o: setattr(o, "history", o.weight),
}


@given(
    seeds, st.lists(kinds, min_size=1, max_size=5), st.sampled_from(list(BAD)), st.booleans(), st.booleans(), st.data()
)
def test_all_or_nothing(seed: int, of: list[Kind], bad: str, fused: bool, row_wise: bool, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    good = [operands(rng, kind, (4, 3), row_wise=row_wise) for kind in of]
    broken = operands(rng, FLOAT32, (4, 3), row_wise=row_wise)
    BAD[bad](broken)
    good.insert(data.draw(st.integers(0, len(good))), broken)
    optimizer = (GroupAdaGrad if row_wise else AdaGrad)(use_fused_step=fused)
    before = [
        (o.weight.tobytes(), o.history.tobytes(), o.master if o.master is None else o.master.tobytes()) for o in good
    ]
    with pytest.raises((TypeError, ValueError, IndexError)):
        optimizer.update(
            list(range(len(good))), [o.weight for o in good], [o.grad for o in good], [o.state for o in good]
        )
    after = [
        (o.weight.tobytes(), o.history.tobytes(), o.master if o.master is None else o.master.tobytes()) for o in good
    ]
    assert after == before
    assert optimizer._index_update_count == {}
    assert optimizer.num_update == 0
