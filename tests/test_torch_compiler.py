"""``adagrad.torch.Adagrad`` and torch.compile, which traces nothing of an update."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adagrad import torch as front_end, torch_compiler
from adagrad.torch import Adagrad
from torch_oracle import parameter


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo asks
def test_compiled_training_step() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = Adagrad(model.parameters(), lr=0.1)

        def step(x: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(step, backend="eager") if compiled else step
        results.append([run(torch.ones(5, 4) * k).item() for k in range(4)])
        assert optimizer.state[model[0].weight]["step"] == 4
    assert results[0] == results[1]
    torch._dynamo.reset()


def test_the_compiler_traces_nothing_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it compiles `step` itself nor where it comes back after a break in the graph."""
    seen = []

    def spy(*arguments: Any) -> None:
        seen.append((torch.compiler.is_dynamo_compiling(), torch_compiler._compiler_callback()))
        update(*arguments)

    update, nothing = front_end.update, torch_compiler._compiler_callback()
    monkeypatch.setattr(front_end, "update", spy)
    p = parameter((3,))
    optimizer = Adagrad([p], lr=0.1)

    def run(x: Tensor) -> Tensor:
        p.grad = x * 2
        torch._dynamo.graph_break()
        optimizer.step()
        return x + 1

    ways: list[Callable[[], Any]] = [partial(torch.compile(run, backend="eager"), torch.ones(3))]
    ways += [torch.compile(optimizer.step, backend="eager"), optimizer.step]
    for step in ways:
        step()
        step()
    assert seen == [(False, nothing)] * 6
    assert optimizer.state[p]["step"] == 6
    torch._dynamo.reset()


def test_asking_for_the_compiler_takes_no_reference_away() -> None:
    """PyTorch 2.6 and 2.7 do that: they are not asked."""
    before = sys.getrefcount(None)
    for _ in range(10_000):
        torch_compiler._compiler_callback()
    assert abs(sys.getrefcount(None) - before) < 1000


@pytest.mark.parametrize(("version", "is_asked"), [("2.4.1", False), ("2.7.1+cu126", False), ("2.13.0+cpu", True)])
def test_whom_to_ask_for_the_compiler(version: str, is_asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: "asked", raising=False)
    assert torch_compiler.find_compiler_callback()() == ("asked" if is_asked else False)
