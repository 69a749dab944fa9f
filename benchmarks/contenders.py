"""This and other libraries as contenders: each makes one optimizer step, if possible on the memory of the case."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import adagrad
from cases import Case, Dense, Rows, dtype_of, fill
from limits import ExactLoop, Limit

LEARNING_RATE = 0.01


@dataclass
class Data:
    """The arrays of a case."""

    weights: list[np.ndarray]
    histories: list[np.ndarray]
    grads: list[np.ndarray]
    values: Any = None
    indices: Any = None

    @classmethod
    def of(cls, case: Case) -> Data:
        if isinstance(case, Dense):
            shapes = case.shapes
            return cls(
                [fill(shape, case.dtype, i) for i, shape in enumerate(shapes)],
                [fill(shape, "float32", i) for i, shape in enumerate(shapes)],
                [fill(shape, case.dtype, i) for i, shape in enumerate(shapes)],
            )
        indices = case.indices()
        table = case.rows, case.columns
        values = fill((len(indices), case.columns), case.dtype)
        return cls([fill(table, case.dtype)], [fill(table)], [], values, indices)


class Adagrad:
    """This library's NumPy API."""

    name = "adagrad"

    def __init__(self, case: Case, data: Data, threads: int) -> None:
        self.optimizer = adagrad.AdaGrad(LEARNING_RATE)
        self.data, self.indices = data, list(range(len(data.weights)))
        self.grads: list[Any] = list(data.grads)
        if isinstance(case, Rows):
            self.grads = [adagrad.RowSparse(data.values, data.indices, data.weights[0].shape)]

    def __call__(self) -> None:
        self.optimizer.update(self.indices, self.data.weights, self.grads, self.data.histories)


class AdagradTorch:
    """This library's PyTorch API."""

    name = "adagrad.torch"

    def __init__(self, case: Case, data: Data, threads: int) -> None:
        from adagrad.torch import Adagrad as Optimizer

        self.params = torch_parameters(case, data)
        self.optimizer = Optimizer(self.params, lr=LEARNING_RATE)
        for param, history in zip(self.params, data.histories, strict=True):
            self.optimizer.state[param]["sum"] = _tensor(history)

    def __call__(self) -> None:
        self.optimizer.step()


class Torch:
    """torch.optim.Adagrad; ``options`` choose fused, foreach or the loop."""

    may_prefer_one_thread = True

    def __init__(self, case: Case, data: Data, threads: int, **options: bool) -> None:
        import torch

        self.params = torch_parameters(case, data)
        self.optimizer = torch.optim.Adagrad(self.params, lr=LEARNING_RATE, **options)
        for param, history in zip(self.params, data.histories, strict=True):
            # Its histories have the weight's dtype.
            self.optimizer.state[param]["sum"] = _tensor(history).to(param.dtype)

    def __call__(self) -> None:
        self.optimizer.step()


class Optax:
    """optax.adagrad under jit, with donated buffers; JAX uses its own memory."""

    name = "optax"

    def __init__(self, case: Case, data: Data, threads: int) -> None:
        import jax
        import optax

        if not isinstance(case, Dense):
            raise NotImplementedError("optax has no row-sparse update")
        transform = optax.adagrad(LEARNING_RATE)

        def step(weights: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.weights = [jax.numpy.array(w) for w in data.weights]
        self.grads = [jax.numpy.array(g) for g in data.grads]
        self.state = transform.init(self.weights)
        self.wait = jax.block_until_ready

    def __call__(self) -> None:
        self.weights, self.state = self.wait(self.step(self.weights, self.state, self.grads))


class JaxRows:
    """The usual row update in JAX: duplicates summed by a segment sum, rows gathered and scattered, under jit."""

    name = "JAX"

    def __init__(self, case: Case, data: Data, threads: int) -> None:
        import jax
        import jax.numpy as jnp

        if not isinstance(case, Rows) or case.dtype != "float32":
            raise NotImplementedError("for row-sparse float32 only")
        distinct, size = case.distinct, len(data.indices)

        def step(weight: Any, history: Any, rows: Any, grad: Any) -> Any:
            if not distinct:
                rows, where = jnp.unique(rows, return_inverse=True, size=size, fill_value=weight.shape[0])
                grad = jax.ops.segment_sum(grad, where, size)
            history = history.at[rows].add(grad * grad, mode="drop", unique_indices=True, indices_are_sorted=True)
            step = LEARNING_RATE * grad / (jnp.sqrt(history.at[rows].get(mode="fill", fill_value=1)) + 1e-6)
            return weight.at[rows].add(-step, mode="drop", unique_indices=True, indices_are_sorted=True), history

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.arrays = jnp.array(data.weights[0]), jnp.array(data.histories[0])
        self.grad = jnp.array(data.indices), jnp.array(data.values)
        self.wait = jax.block_until_ready

    def __call__(self) -> None:
        self.arrays = self.wait(self.step(*self.arrays, *self.grad))


class TensorFlow:
    """TensorFlow's fused AdaGrad ops, duplicates summed as in tf.compat.v1's optimizers; it uses its own memory."""

    name = "TensorFlow"

    def __init__(self, case: Case, data: Data, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it logs how it was built
        import tensorflow as tf

        # Its histories have the weight's dtype.
        weights = [tf.Variable(w) for w in data.weights]
        histories = [tf.Variable(h.astype(dtype_of(case.dtype), copy=False)) for h in data.histories]
        options = {"lr": tf.constant(LEARNING_RATE, case.dtype), "epsilon": tf.constant(1e-6, case.dtype)}
        grads = [tf.constant(g) for g in data.grads]
        if isinstance(case, Rows):
            indices, values = tf.constant(data.indices), tf.constant(data.values)

        def dense() -> None:
            for weight, history, grad in zip(weights, histories, grads, strict=True):
                tf.raw_ops.ResourceApplyAdagradV2(var=weight.handle, accum=history.handle, grad=grad, **options)

        def sparse() -> None:
            rows, grad = indices, values
            if not case.distinct:
                rows, where = tf.unique(indices)
                grad = tf.math.unsorted_segment_sum(values, where, tf.size(rows))
            tf.raw_ops.ResourceSparseApplyAdagradV2(
                var=weights[0].handle, accum=histories[0].handle, grad=grad, indices=rows, **options
            )

        step = sparse if isinstance(case, Rows) else dense
        # Each way is faster than the other, for a list and for one weight.
        self.step = tf.function(step) if len(weights) > 1 else step

    def __call__(self) -> None:
        self.step()


class Fbgemm:
    """FBGEMM's table-batched embedding, EXACT_ADAGRAD: its backward pass, which is also the update."""

    name = "FBGEMM exact"
    may_prefer_one_thread = True

    def __init__(self, case: Case, data: Data, threads: int) -> None:
        if not isinstance(case, Rows) or case.dtype != "float32":
            raise NotImplementedError("for row-sparse float32 only")
        if case.columns % 4:
            raise NotImplementedError("for a multiple of 4 columns only")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import fbgemm_gpu.split_table_batched_embeddings_ops_training as tbe
            import torch
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation

            place = EmbeddingLocation.HOST, tbe.ComputeDevice.CPU
            self.table = tbe.SplitTableBatchedEmbeddingBagsCodegen(
                [(case.rows, case.columns, *place)],
                optimizer=tbe.OptimType.EXACT_ADAGRAD,
                learning_rate=LEARNING_RATE,
                eps=1e-6,
            )
        self.indices, self.grad = torch.from_numpy(data.indices), torch.from_numpy(data.values)
        self.offsets = torch.arange(len(data.indices) + 1)

    def prepare(self) -> None:
        """Run the forward pass, which is not timed."""
        self.output = self.table(self.indices, self.offsets)

    def __call__(self) -> None:
        self.output.backward(self.grad)


def _torch(name: str, **options: bool) -> Callable[..., Any]:
    def make(case: Case, data: Data, threads: int) -> Torch:
        if isinstance(case, Rows) and options:
            raise NotImplementedError("sparse gradients take torch's loop")
        return Torch(case, data, threads, **options)

    make.name = name  # type: ignore[attr-defined]
    return make


CONTENDERS: list[Any] = [
    Adagrad,
    Limit,
    ExactLoop,
    AdagradTorch,
    _torch("torch fused", fused=True),
    _torch("torch foreach", foreach=True),
    _torch("torch loop", foreach=False),
    _torch("torch sparse"),
    Optax,
    JaxRows,
    TensorFlow,
    Fbgemm,
]
NOT_RESTRICTED = ("optax", "JAX", "TensorFlow")
"""Contenders whose number of threads is not ours to set."""

PACKAGES = ("adagrad", "numpy", "numba", "torch", "optax", "jax", "tensorflow-cpu", "fbgemm-gpu-cpu")


def contenders(case: Case, data: Data, threads: int, notes: set[str], names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return those (of ``names``, or of all) that can run the case; ``notes`` gets those not installed."""
    found = {}
    for make in CONTENDERS:
        if names and make.name not in names:
            continue
        if (make.name == "torch sparse") != isinstance(case, Rows) and make.name.startswith("torch"):
            continue
        if make is ExactLoop and not isinstance(case, Dense):
            continue
        try:
            found[make.name] = make(case, data, threads)
        except NotImplementedError:
            continue
        except (ImportError, OSError) as error:
            notes.add(f"{make.name} is not installed: {str(error).splitlines()[0]}")
    return found


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def torch_parameters(case: Case, data: Data) -> list[Any]:
    """Return parameters with gradients, on the memory of the case."""
    import torch

    params = [torch.nn.Parameter(_tensor(w)) for w in data.weights]
    if isinstance(case, Rows):
        grads: Iterator[Any] | list[Any] = [
            torch.sparse_coo_tensor(
                torch.from_numpy(data.indices)[None],
                _tensor(data.values),
                data.weights[0].shape,
                is_coalesced=case.distinct,
                check_invariants=False,
            )
        ]
    else:
        grads = map(_tensor, data.grads)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
