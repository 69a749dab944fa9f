"""What tests of arrays have in common: comparing bits, laying out memory, numbers worth trying, calling the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import oracle
from adagrad import RowSparse, kernels
from adagrad.kernels import fast_path, general_path
from adagrad.kernels.batch import Batch
from adagrad.kernels.cpu import dense as cpu_dense, rows as cpu_rows
from adagrad.kernels.inspection import layout
from adagrad.rule import Rule, is_torch

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


# ------------------------------------------------------------------------------------------------------------ comparing


def to_numpy(array: Any) -> np.ndarray:
    """A torch tensor as NumPy sees it, bfloat16 included; a NumPy array as it is."""
    if is_torch(array):
        import torch

        array = array.detach()
        if array.dtype == torch.bfloat16:
            return array.view(torch.uint16).numpy().view(BFLOAT16)
        return array.numpy()
    return np.asarray(array)


def bits(array: Any) -> np.ndarray:
    """The bits of each element as an unsigned integer; all NaNs alike, since IEEE 754 leaves theirs open."""
    array = to_numpy(array)
    native = array.astype(array.dtype.newbyteorder("=")) if array.dtype != BFLOAT16 else array
    unsigned = np.ascontiguousarray(native).reshape(-1).view(f"u{array.itemsize}").copy()
    unsigned[np.isnan(np.ascontiguousarray(native).reshape(-1))] = np.iinfo(unsigned.dtype).max
    return unsigned.reshape(array.shape)


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """Equal shape, dtype and bits; -0.0 is not 0.0."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape, what
    assert actual.dtype.newbyteorder("=") == expected.dtype.newbyteorder("="), what
    differ = bits(actual) != bits(expected)
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(
            f"{what}: {differ.sum()} of {differ.size} differ, first at {at}: {actual[at]!r} != {expected[at]!r}"
        )


# ----------------------------------------------------------------------------------------------------------- laying out


def _misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    moved: np.ndarray = np.ndarray(array.shape, array.dtype, raw.data, offset=1)
    moved[...] = array
    return moved


def _stepped(array: np.ndarray, axis: int) -> np.ndarray:
    step = (slice(None),) * (axis % array.ndim) + (slice(None, None, 3),)
    shape = list(array.shape)
    shape[axis] *= 3
    base = np.full(shape, 77, array.dtype)
    base[step] = array
    return base[step]


def _channels_last(array: np.ndarray) -> np.ndarray:
    order = (0, *range(2, array.ndim), 1) if array.ndim > 2 else tuple(range(array.ndim))[::-1]
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda a: np.ascontiguousarray(a).copy(),
    "fortran": lambda a: a.copy(order="F"),
    "channels last": _channels_last,
    "rows reversed": lambda a: a[::-1].copy()[::-1],
    "columns reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "rows stepped": lambda a: _stepped(a, 0),
    "columns stepped": lambda a: _stepped(a, -1),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder("S")),
    "misaligned": _misaligned,
    "misaligned, byte-swapped": lambda a: _misaligned(a.astype(a.dtype.newbyteorder("S"))),
    "reversed and stepped": lambda a: _stepped(a[::-1], -1)[::-1],
}
"""Each makes a writable copy of an array of one or more dimensions that lies differently in memory."""


def layouts_of(dtype: np.dtype[Any]) -> list[str]:
    """NumPy has no other byte order of bfloat16."""
    return [name for name in LAYOUTS if not (dtype == BFLOAT16 and "swapped" in name)]


def lay_out(array: np.ndarray, layout: str) -> np.ndarray:
    laid = LAYOUTS[layout](array)
    assert laid.flags.writeable
    assert_same_bits(laid, array, layout)
    return laid


# ------------------------------------------------------------------------------------------------------- numbers to try


def normal(rng: np.random.Generator, shape: Any, dtype: Any) -> np.ndarray:
    """Normal numbers of various sizes."""
    numbers = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)
    return np.asarray(numbers).astype(dtype)


def positive(rng: np.random.Generator, shape: Any, dtype: Any) -> np.ndarray:
    return np.asarray(rng.random(shape) * 10.0 ** rng.integers(-3, 3, shape)).astype(dtype)


def special(dtype: Any) -> np.ndarray:
    """Zeros, subnormals, the largest number, infinities, NaN, and some that are none of these."""
    info = ml_dtypes.finfo(dtype)
    tiny, least, most = float(info.tiny), float(info.smallest_subnormal), float(info.max)
    numbers = [0.0, -0.0, least, -least, 3 * least, tiny, -tiny, 1.0, -1.0, 1 / 3, -most, most, np.inf, -np.inf, np.nan]
    return np.array(numbers).astype(dtype)


# ------------------------------------------------------------------------------------------------------ calling kernels


@dataclass(frozen=True)
class Kind:
    """A combination of dtypes that the kernels know."""

    weight: str
    grad: str
    master: bool = False

    @property
    def computing(self) -> np.dtype[Any]:
        return DTYPES["float64" if self.weight == "float64" else "float32"]

    def __str__(self) -> str:
        return self.weight + (f", {self.grad} gradient" * (self.grad != self.weight)) + ", master" * self.master


KINDS = [
    Kind("float32", "float32"),
    Kind("float64", "float64"),
    *(Kind(low, grad, master) for low in ("float16", "bfloat16") for grad in (low, "float32") for master in (0, 1)),
]

HYPERS = {
    "plain": oracle.Hyper(),
    "decay": oracle.Hyper(lr=0.3, wd=0.03),
    "clip": oracle.Hyper(lr=0.7, clip_gradient=0.4),
    "rescale": oracle.Hyper(rescale_grad=-1 / 3, epsilon=1e-7),
    "all": oracle.Hyper(lr=0.05, wd=0.01, rescale_grad=1 / 7, clip_gradient=0.9, epsilon=1e-3),
    "unclipped": oracle.Hyper(lr=0.05, wd=0.01, rescale_grad=1 / 7, epsilon=1e-3),  # which no sum of a row saturates
    "inside": oracle.Hyper(epsilon_inside=True, epsilon=1e-2, wd=0.1),
    "decoupled": oracle.Hyper(decoupled_decay=True, wd=0.1),
    "inside, decoupled": oracle.Hyper(
        epsilon_inside=True, epsilon=1e-5, decoupled_decay=True, wd=0.02, rescale_grad=3.0, clip_gradient=0.5
    ),
    "no epsilon": oracle.Hyper(epsilon=0.0),
    "no rate": oracle.Hyper(lr=0.0, wd=0.1),
}


def rule_of(hyper: oracle.Hyper) -> Rule:
    names = ("rescale_grad", "clip_gradient", "epsilon", "epsilon_inside", "decoupled_decay", "row_wise")
    return Rule(**{name: getattr(hyper, name) for name in names})


@dataclass
class Operands:
    """One weight's part of a call."""

    weight: np.ndarray
    grad: Any
    history: np.ndarray
    master: np.ndarray | None = None

    @property
    def state(self) -> Any:
        return self.history if self.master is None else (self.master, self.history)

    def copy(self) -> Operands:
        return Operands(
            self.weight.copy(), self.grad, self.history.copy(), None if self.master is None else self.master.copy()
        )


def operands(
    rng: np.random.Generator, kind: Kind, shape: tuple[int, ...], *, row_wise: bool = False, grad: Any = None
) -> Operands:
    """Operands of a dense update, or of a row-sparse one if ``grad`` is given."""
    master = normal(rng, shape, np.float32) if kind.master else None
    weight = normal(rng, shape, DTYPES[kind.weight])
    if master is not None:
        weight = oracle.write(oracle.read(master), shape, DTYPES[kind.weight])
    if grad is None:
        grad = normal(rng, shape, DTYPES[kind.grad])
    return Operands(weight, grad, positive(rng, history_shape(shape, row_wise), kind.computing), master)


def history_shape(shape: tuple[int, ...], row_wise: bool) -> tuple[int, ...]:
    return (shape[0], *(1 for _ in shape[1:])) if row_wise else shape


def expected(o: Operands, hyper: oracle.Hyper) -> Operands:
    """The oracle's answer."""
    if isinstance(o.grad, RowSparse):
        indices = [int(i) for i in o.grad.indices]
        new = oracle.row_sparse(o.weight, indices, o.grad.values, o.history, hyper, o.master)
    else:
        new = oracle.dense(o.weight, o.grad, o.history, hyper, o.master)
    return Operands(new[0], o.grad, new[1], new[2])


def apply(
    given: Sequence[Operands], hypers: Sequence[oracle.Hyper], *, fused: bool = True, threads: int | None = None
) -> None:
    """One call of the dispatcher with all the operands, which are updated in place."""
    weights, grads, states = [o.weight for o in given], [o.grad for o in given], [o.state for o in given]
    lrs, wds = [h.lr for h in hypers], [h.wd for h in hypers]
    kernels.update(weights, grads, states, lrs, wds, rule_of(hypers[0]), fused=fused, threads=threads)


def update_plain(given: Sequence[Operands], hypers: Sequence[oracle.Hyper], threads: int | None = None) -> bool:
    """Whether the fast path has updated all the operands, in place; rates are for each, or one for all."""
    lists = ([getattr(o, name) for o in given] for name in ("weight", "grad", "history"))
    masters = [o.master for o in given] if any(o.master is not None for o in given) else []
    lrs, wds = [h.lr for h in hypers], [h.wd for h in hypers]
    return fast_path.update_plain(Batch(rule_of(hypers[0]), *lists, masters, lrs, wds), [], threads)


def refuse_the_general_path(patch: pytest.MonkeyPatch) -> None:
    """From now on what the fast path does not take fails."""
    patch.setattr(general_path, "prepare", lambda *_, **__: pytest.fail("the general path was taken"))


def set_layout(monkeypatch: pytest.MonkeyPatch, how: np.ndarray | None) -> None:
    """From now on compiled code looks at arrays so, or not at all."""
    monkeypatch.setattr(layout, "_last", None)
    monkeypatch.setattr(layout, "_layout", lambda *which: how)


def check(o: Operands, hyper: oracle.Hyper, *, threads: int | None = None, what: str = "") -> None:
    """The kernels compute what the oracle does, in place, and leave the gradient as it was."""
    want = expected(o, hyper)
    gradient = (o.grad.values, o.grad.indices) if isinstance(o.grad, RowSparse) else (o.grad,)
    before = [part.tobytes() for part in gradient]
    apply([o], [hyper], threads=threads)
    assert_same(o, want, what)
    assert [part.tobytes() for part in gradient] == before, f"{what}: the gradient was written to"


def assert_same(actual: Operands, want: Operands, what: str = "") -> None:
    assert_same_bits(actual.history, want.history, f"{what}: history")
    assert_same_bits(actual.weight, want.weight, f"{what}: weight")
    if want.master is not None:
        assert_same_bits(actual.master, want.master, f"{what}: master")


@contextmanager
def always_parallel() -> Iterator[None]:
    """Within: every launch goes to the parallel kernels, whatever its size; the call's ``threads`` are the workers."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu_dense, cpu_rows):
            patch.setattr(module, "PARALLEL_MIN", 0)
        yield
