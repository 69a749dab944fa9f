"""Operands of the CUDA kernels, a call with them, and the rule's results.

Kernels run on a device where there is one, else in Triton's interpreter; or, with ``ADAGRAD_TEST_PTX=90``, as they are
compiled for a GPU of compute capability 9.0 and translated for the CPU (see ptx.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
GPU = torch.cuda.is_available()
PTX = 0 if GPU else int(os.environ.get("ADAGRAD_TEST_PTX") or 0)
DEVICE = "cuda" if GPU else "cpu"
ON_THE_GPU = [pytest.mark.gpu] if GPU else []
"""Marks of a module whose tests run on a device where there is one, else in Triton's interpreter."""

needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")
needs_no_gpu = pytest.mark.skipif(GPU, reason="the kernels are compiled for the GPU here")
needs_speed = pytest.mark.skipif(not GPU and not PTX, reason="too slow for Triton's interpreter, see ptx.py")
if PTX:
    os.environ.pop("TRITON_INTERPRET", None)
elif not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from adagrad import rule as expression  # noqa: E402
from adagrad.kernels import cuda  # noqa: E402
from adagrad.rule import Rule  # noqa: E402
from support import history_shape  # noqa: E402

if PTX:
    import ptx

    ptx.install(PTX)

HERE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
DTYPES = ["float32", "float64", "float16", "bfloat16"]


class DenseUpdate(NamedTuple):
    weight: Any
    grad: Any
    history: Any
    master: Any
    lr: Any
    wd: float


class RowUpdate(NamedTuple):
    weight: Any
    indices: Any
    values: Any
    history: Any
    master: Any
    lr: Any
    wd: float


def run(rule: Rule, dense: Sequence[DenseUpdate], rows: Sequence[RowUpdate] = (), **options: Any) -> Any:
    """One call."""
    cuda.raise_reported(HERE)  # as the dispatcher does, for all devices of a call
    elements = [cuda.dense.of_tensors(*u, rule) for u in dense]
    runs = [cuda.row_launches.of_tensors(*u, rule) for u in rows]
    group = cuda.Group(rule, cuda.dense.concatenate(elements), cuda.row_launches.concatenate(runs))
    return cuda.job([group], HERE, **options)()


def computing(dtype: str) -> np.dtype[Any]:
    return np.dtype("float64" if dtype == "float64" else "float32")


def as_numpy(tensor: Any, dtype: str) -> np.ndarray:
    """The values of a tensor in the computing dtype of ``dtype``."""
    return tensor.detach().cpu().to(getattr(torch, computing(dtype).name)).numpy().copy()


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values of ``array`` after rounding to ``dtype``."""
    return torch.from_numpy(np.asarray(array)).to(getattr(torch, dtype)).to(getattr(torch, array.dtype.name)).numpy()


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal numbers with equal signs, NaN in the same places."""
    np.testing.assert_array_equal(got, want)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(want)[number])


def expected(
    weight: np.ndarray, grad: np.ndarray, history: np.ndarray, lr: float, wd: float, rule: Rule, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """New weight and history by the array expressions, which test_rule.py compares with the oracle."""
    return expression.update(weight, grad / weight.dtype.type(scale), history, lr, wd, rule)


def make(shape: tuple[int, ...], dtype: str, seed: int = 0, *, master: bool = False, grad_dtype: str | None = None,
         row_wise: bool = False, lr: Any = 0.1, wd: float = 0.01) -> DenseUpdate:  # fmt: skip
    rng = np.random.default_rng(seed)
    wide = computing(dtype)

    def tensor(values: np.ndarray, name: str) -> Any:
        return torch.from_numpy(np.asarray(values, wide)).to(getattr(torch, name)).to(DEVICE)

    copy = tensor(rng.normal(size=shape), "float32") if master else None
    weight = tensor(rng.normal(size=shape), dtype) if copy is None else copy.to(getattr(torch, dtype))
    grad = tensor(rng.normal(size=shape) * 10.0 ** rng.integers(-6, 3, shape), grad_dtype or dtype)
    history = tensor(rng.random(history_shape(shape, row_wise)), wide.name)
    return DenseUpdate(weight, grad, history, copy, lr, wd)


def make_rows(ids: Any, shape: tuple[int, ...], dtype: str = "float32", seed: int = 0, *, index_dtype: str = "int64",
              **options: Any) -> RowUpdate:  # fmt: skip
    """An update of a weight of ``shape`` at ``ids``; options as for ``make``."""
    weight, _, history, master, lr, wd = make(shape, dtype, seed, **options)
    values = make((len(ids), *shape[1:]), dtype, seed + 1, grad_dtype=options.get("grad_dtype")).grad
    indices = torch.tensor(np.array(ids, index_dtype), device=DEVICE)
    return RowUpdate(weight, indices, values, history, master, lr, wd)


def zipf(count: int, rows: int, seed: int = 0) -> np.ndarray:
    """Row ids with runs of one occurrence, of some and, if they are many, of several chunks."""
    rng = np.random.default_rng(seed)
    return rng.permutation(rows)[np.minimum(rng.zipf(1.3, count) - 1, rows - 1)]
