"""States of FBGEMM: half of the steps there, the other half here, are all steps there; and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, convert
from support import assert_same_bits
from trajectories import HALF, assert_close, f32, go_on, problem


def test_fbgemm_there_and_back() -> None:
    ops = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training", reason="no fbgemm-gpu-cpu")
    shapes = [(6, 4), (3, 8)]
    weights, grads = problem(shapes)

    for row_wise in (False, True):
        kind = ops.OptimType.EXACT_ROWWISE_ADAGRAD if row_wise else ops.OptimType.EXACT_ADAGRAD
        tables = ops.SplitTableBatchedEmbeddingBagsCodegen(
            [(*shape, ops.EmbeddingLocation.HOST, ops.ComputeDevice.CPU) for shape in shapes],
            optimizer=kind,
            learning_rate=0.3,
        )
        for table, weight in zip(tables.split_embedding_weights(), weights, strict=True):
            table.copy_(torch.tensor(weight))
        indices = torch.tensor([*range(6), *range(3)])
        offsets = torch.tensor([*range(6), 6, 7, 8, 9, 9, 9, 9])

        def train(grads: Any, tables: Any = tables, indices: Any = indices, offsets: Any = offsets) -> list[np.ndarray]:
            for first, second in grads:
                padded = np.zeros((6, 8), np.float32)  # as many bags as the first table
                padded[:3] = second
                tables(indices, offsets).backward(torch.tensor(np.hstack([first, padded])))
            return [table.numpy().copy() for table in tables.split_embedding_weights()]

        half = train(grads[:HALF])
        optimizer = (GroupAdaGrad if row_wise else AdaGrad)(0.3, dialect="fbgemm")
        states = convert.from_fbgemm(tables.split_optimizer_states(), optimizer)
        for form in (tables.get_optimizer_state(), [part[0] for part in tables.split_optimizer_states()]):
            for index, history in convert.from_fbgemm(form, optimizer).items():
                assert_same_bits(history, states[index])
        for (there,), back in zip(tables.split_optimizer_states(), convert.to_fbgemm(states, optimizer), strict=True):
            assert_same_bits(there, back)
        found = go_on(optimizer, states, half, grads[HALF:])
        assert_close(found, train(grads[HALF:]))


def test_fbgemm_tells_rows_from_elements() -> None:
    rows, elements = GroupAdaGrad(dialect="fbgemm"), AdaGrad(dialect="fbgemm")
    assert convert.from_fbgemm([f32(1, 2, 3)], rows)[0].shape == (3, 1)
    assert convert.to_fbgemm({0: np.ones((3, 1), np.float32)}, rows)[0].shape == (3,)
    assert convert.to_fbgemm({0: np.ones((3, 2), np.float32)}, elements)[0].shape == (3, 2)
    with pytest.raises(
        ValueError, match=r"momentum1 of table 0: shape \(3,\): one value for each row: must continue with G"
    ):
        convert.from_fbgemm([f32(1, 2, 3)], elements)
    with pytest.raises(ValueError, match=r"shape \(3, 2\): one value for each element: must continue with AdaGrad"):
        convert.from_fbgemm([np.ones((3, 2), np.float32)], rows)
    with pytest.raises(ValueError, match="momentum1 of table 0: one of 2 arrays: must be alone"):
        convert.from_fbgemm([[f32(1), f32(2)]], elements)
    with pytest.raises(ValueError, match="epsilon_inside=True: must be False: FBGEMM"):
        convert.from_fbgemm([f32(1)], GroupAdaGrad(dialect="mxnet1"))
    with pytest.raises(ValueError, match=r"states: shape \(3,\): must have two dimensions: FBGEMM has only tables"):
        convert.to_fbgemm({0: f32(1, 2, 3)}, elements)


@pytest.mark.parametrize("nothing", [{}, []])
def test_a_table_without_a_state(nothing: Any) -> None:
    with pytest.raises(ValueError, match="momentum1 of table 0: one of 0 arrays: must be alone"):
        convert.from_fbgemm([nothing], AdaGrad(dialect="fbgemm"))


def test_tables_by_name_are_converted_by_their_values() -> None:
    """As torchrec has them in ``state_dict()["state"]``."""
    named = {"tables.t.weight": {"t.momentum1": f32(1, 2)}}
    optimizer = GroupAdaGrad(dialect="fbgemm")
    with pytest.raises(TypeError, match=r"momentum1=\{.*: must be a list, one for each table: pass its values\(\)"):
        convert.from_fbgemm(named, optimizer)
    assert convert.from_fbgemm(named.values(), optimizer)[0].tolist() == [[1], [2]]


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
def test_only_tables_go_to_fbgemm(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must have two dimensions: FBGEMM has only tables"):
        convert.to_fbgemm({0: np.ones(shape, np.float32)}, AdaGrad(dialect="fbgemm"))
