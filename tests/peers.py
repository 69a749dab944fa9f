"""The AdaGrad of other frameworks, each run the same way; a framework is imported when it is asked for.

Where a framework is installed the tests run it. What the others computed lies in ``data/dialects``; to record it, in an
environment with NumPy and that framework::

    python tests/peers.py tensorflow
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "data" / "dialects"
STEPS = 10

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "given": {"learning_rate": 0.3, "epsilon": 1e-3, "initial_accumulator_value": 0.5},
    "tiny": {"learning_rate": 0.1, "scale": 1e-5},
    "tiny, from zero": {"learning_rate": 0.1, "scale": 1e-5, "initial_accumulator_value": 0.0},
    "decay": {"learning_rate": 0.2, "wd": 0.03},
    "clip": {"learning_rate": 0.2, "wd": 0.03, "rescale_grad": -0.5, "clip_gradient": 0.3},
    "row-wise": {"row_wise": True},
    "row-wise, tiny": {"row_wise": True, "learning_rate": 0.1, "scale": 1e-5},
}
"""Arguments by this library's names, and two that are not arguments: ``row_wise``, and ``scale`` of the gradients."""

RUNS: dict[str, list[str]] = {
    "mxnet1": ["defaults", "tiny", "decay", "clip", "row-wise", "row-wise, tiny"],
    "torch": ["defaults", "given", "tiny, from zero", "decay"],
    "optax": ["defaults", "given", "tiny, from zero", "decay", "clip"],
    "keras": ["defaults", "given", "tiny, from zero", "decay"],
    "tensorflow": ["defaults", "given", "tiny, from zero"],
    "fbgemm": ["defaults", "tiny", "row-wise", "row-wise, tiny"],
    "mlx": ["defaults", "tiny"],
}
"""The cases that each framework has the arguments for."""

Steps = Iterator[tuple[np.ndarray, np.ndarray]]


def problem(case: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """A weight and gradients for it, of various sizes; some elements have no gradient for a while, one never."""
    rng = np.random.default_rng(5)
    shape = (13, 20)  # FBGEMM wants rows of a multiple of four
    weight = rng.standard_normal(shape).astype(np.float32)
    grads = rng.standard_normal((STEPS, *shape)) * 10.0 ** rng.integers(-3, 2, shape)
    grads *= (rng.random((STEPS, *shape)) < 0.8) * CASES[case].get("scale", 1.0)
    grads[:, 0, 0] = 0
    return weight, list(grads.astype(np.float32))


def mxnet1(weight: np.ndarray, grads: list[np.ndarray], *, row_wise: bool = False, **kw: Any) -> Steps:
    import mxnet

    w = mxnet.nd.array(weight)
    if "epsilon" in kw:
        kw["eps"] = kw.pop("epsilon")
    optimizer = mxnet.optimizer.create("groupadagrad" if row_wise else "adagrad", **kw)
    history = optimizer.create_state(0, w)
    for grad in grads:
        optimizer.update(0, w, mxnet.nd.array(grad), history)
        yield w.asnumpy(), history.asnumpy()


def torch(weight: np.ndarray, grads: list[np.ndarray], **kw: Any) -> Steps:
    import torch

    names = {"learning_rate": "lr", "epsilon": "eps", "wd": "weight_decay"}
    p = torch.nn.Parameter(torch.tensor(weight))
    optimizer = torch.optim.Adagrad([p], **{names.get(name, name): value for name, value in kw.items()})
    for grad in grads:
        p.grad = torch.tensor(grad)
        optimizer.step()
        yield p.detach().numpy().copy(), optimizer.state[p]["sum"].numpy().copy()


def optax(weight: np.ndarray, grads: list[np.ndarray], **kw: Any) -> Steps:
    import jax.numpy as jnp
    import optax

    wd, clip, rescale = kw.pop("wd", 0.0), kw.pop("clip_gradient", None), kw.pop("rescale_grad", 1.0)
    if "epsilon" in kw:
        kw["eps"] = kw.pop("epsilon")
    solver = optax.chain(
        optax.scale(rescale),
        optax.identity() if clip is None else optax.clip(clip),
        optax.add_decayed_weights(wd),
        optax.adagrad(**({"learning_rate": 0.01} | kw)),
    )
    params = jnp.asarray(weight)
    state = solver.init(params)
    for grad in grads:
        updates, state = solver.update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
        yield np.array(params), np.array(state[-1][0].sum_of_squares)


def keras(weight: np.ndarray, grads: list[np.ndarray], **kw: Any) -> Steps:
    """On the backend in ``KERAS_BACKEND``, PyTorch here."""
    import keras

    if "wd" in kw:
        kw["weight_decay"] = kw.pop("wd")
    variable = keras.Variable(weight)
    optimizer = keras.optimizers.Adagrad(**kw)
    for grad in grads:
        optimizer.apply([keras.ops.convert_to_tensor(grad)], [variable])
        yield tuple(keras.ops.convert_to_numpy(each).copy() for each in (variable, optimizer.variables[-1]))


def tensorflow(weight: np.ndarray, grads: list[np.ndarray], **kw: Any) -> Steps:
    import tensorflow
    import tf_keras

    variable = tensorflow.Variable(weight)
    optimizer = tf_keras.optimizers.legacy.Adagrad(**kw)
    for grad in grads:
        optimizer.apply_gradients([(tensorflow.constant(grad), variable)])
        yield variable.numpy().copy(), optimizer.get_slot(variable, "accumulator").numpy().copy()


def fbgemm(weight: np.ndarray, grads: list[np.ndarray], *, row_wise: bool = False, **kw: Any) -> Steps:
    import torch
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as ops

    if "epsilon" in kw:
        kw["eps"] = kw.pop("epsilon")
    rows, columns = weight.shape
    tables = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, columns, ops.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)],
        optimizer=ops.OptimType.EXACT_ROWWISE_ADAGRAD if row_wise else ops.OptimType.EXACT_ADAGRAD,
        **kw,
    )
    table, history = tables.split_embedding_weights()[0], tables.split_optimizer_states()[0][0]
    table.copy_(torch.tensor(weight))
    indices, offsets = torch.arange(rows), torch.arange(rows + 1)
    for grad in grads:
        tables(indices, offsets).backward(torch.tensor(grad))
        yield table.numpy().copy(), history.numpy().copy().reshape(rows, -1)


def mlx(weight: np.ndarray, grads: list[np.ndarray], **kw: Any) -> Steps:
    import mlx.core as mx
    import mlx.optimizers

    mx.set_default_device(mx.cpu)
    optimizer = mlx.optimizers.Adagrad(**({"learning_rate": 0.01} | kw))
    params = {"w": mx.array(weight)}
    for grad in grads:
        params = optimizer.apply_gradients({"w": mx.array(grad)}, params)
        yield np.array(params["w"]), np.array(optimizer.state["w"]["v"])


def run(dialect: str, case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and history after each step, computed by the framework."""
    peer: Callable[..., Steps] = globals()[dialect]
    arguments = {name: value for name, value in CASES[case].items() if name != "scale"}
    return list(peer(*problem(case), **arguments))


def recorded(dialect: str, case: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """What :func:`run` gave where the framework was installed."""
    with np.load(FOLDER / f"{dialect}.npz") as file:
        return list(zip(file[f"{case}/w"], file[f"{case}/h"], strict=True))


def record(dialect: str) -> None:
    arrays = {}
    for case in RUNS[dialect]:
        weights, histories = zip(*run(dialect, case), strict=True)
        arrays |= {f"{case}/w": np.array(weights), f"{case}/h": np.array(histories)}
    modules = {"mxnet1": "mxnet", "fbgemm": "fbgemm_gpu", "mlx": "mlx.core"}
    versions = {dialect: sys.modules[modules.get(dialect, dialect)].__version__}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{dialect}.npz", versions=json.dumps(versions), **arrays)


if __name__ == "__main__":
    record(sys.argv[1])
