"""Parameters of PyTorch and their gradients, and what the oracle makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import oracle
from support import assert_same_bits, history_shape, to_numpy

LOW = (torch.float16, torch.bfloat16)


HYPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"lr": 0.3, "weight_decay": 0.1, "lr_decay": 0.5},
    "clip": {"clip_value": 0.4, "eps": 1e-3, "initial_accumulator_value": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.01, "clip_value": 1.0},
}


def parameter(shape: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradient(p: Tensor, seed: int) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def coo(indices: Any, values: Tensor, shape: Any) -> Tensor:
    """A sparse tensor, not coalesced."""
    indices = torch.as_tensor(indices)
    indices = indices if indices.ndim == 2 else indices[None]
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def contents(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters and of all of their states."""
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


def hyper(step: int, **options: Any) -> oracle.Hyper:
    """The oracle's words for the options, at a step (the first is 0)."""
    return oracle.Hyper(
        lr=options.get("lr", 1e-2) / (1 + step * options.get("lr_decay", 0)),
        wd=options.get("weight_decay", 0.0),
        rescale_grad=-1.0 if options.get("maximize") else 1.0,
        clip_gradient=options.get("clip_value"),
        epsilon=options.get("eps", 1e-10),
        row_wise=options.get("row_wise", False),
    )


class Expected:
    """A parameter and its state as the oracle has them."""

    def __init__(self, p: Tensor, **options: Any) -> None:
        self.options = options
        self.weight = to_numpy(p).copy()
        wide = np.float64 if p.dtype == torch.float64 else np.float32
        shape = history_shape(tuple(p.shape), options.get("row_wise", False))
        self.history = np.full(shape, options.get("initial_accumulator_value", 0.0), wide)
        self.master = None
        if options.get("multi_precision") and p.dtype in LOW:
            self.master = self.weight.astype(np.float32)
        self.steps = 0

    def step(self, grad: Tensor) -> None:
        now = hyper(self.steps, **self.options)
        if grad.is_sparse:
            rows, values = grad._indices()[0].tolist(), to_numpy(grad._values())
            new = oracle.row_sparse(self.weight, rows, values, self.history, now, self.master)
        else:
            new = oracle.dense(self.weight, to_numpy(grad), self.history, now, self.master)
        self.weight, self.history, self.master = new
        self.steps += 1

    def compare(self, p: Tensor, state: dict[str, Any]) -> None:
        assert_same_bits(p, self.weight, "weight")
        assert_same_bits(state["sum"], self.history, "sum")
        assert ("master" in state) == (self.master is not None)
        if self.master is not None:
            assert_same_bits(state["master"], self.master, "master")
        assert state["step"].item() == self.steps
