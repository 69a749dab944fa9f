"""Optimizers after a first step, and gradients for them, for tests to spoil."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adagrad.torch import Adagrad


def unchecked_coo(rows: list[int], values: Tensor, shape: Any) -> Tensor:
    """A sparse tensor that PyTorch does not check, so that the rows may be some that it would refuse."""
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=False)


class Case:
    """An optimizer of three parameters with gradients, one of them sparse, after a first step."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
        self.optimizer = Adagrad(self.params, weight_decay=0.1, **options)
        self.set_grads()
        self.optimizer.step()
        self.set_grads()

    def set_grads(self) -> None:
        for p in self.params[:2]:
            p.grad = torch.randn(4, 3)
        self.params[2].grad = unchecked_coo([1, 3, 1], torch.randn(3, 3), (4, 3))

    def everything(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.params]
        return [*self.params, *(t for state in states for t in state.values() if isinstance(t, Tensor))]


def rows_outside(p: Tensor, optimizer: Adagrad, row: int) -> None:
    p.grad = unchecked_coo([1, row], torch.ones(2, 2), (4, 2))
