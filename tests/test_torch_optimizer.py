"""``adagrad.torch.Adagrad``, an ordinary optimizer to PyTorch: groups and options, schedules and hooks, states."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adagrad import AdaGrad
from adagrad.kernels.tensors import versions
from adagrad.torch import Adagrad
from support import assert_same_bits
from torch_oracle import Expected, gradient, parameter
from torch_versions import since

# --------------------------------------------------------------------------------------------------- groups and options


def test_groups_have_their_own_options() -> None:
    options = [{"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.1}, {"eps": 1e-2, "clip_value": 0.3}, {"row_wise": True},
               {"maximize": True, "initial_accumulator_value": 0.5}]  # fmt: skip
    params = [parameter((5, 4), seed=i) for i in range(len(options))]
    optimizer = Adagrad([{"params": [p], **o} for p, o in zip(params[:3], options[:3], strict=True)])
    for p, o in zip(params[3:], options[3:], strict=True):
        optimizer.add_param_group({"params": p, **o})
    expected = [Expected(p, **o) for p, o in zip(params, options, strict=True)]
    for step in range(3):
        for p, e in zip(params, expected, strict=True):
            p.grad = gradient(p, step)
            e.step(p.grad)
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        e.compare(p, optimizer.state[p])


def test_many_groups_of_one_rule_and_of_others() -> None:
    """Groups in any order: each parameter as if it were alone."""
    options = [{"lr": 0.1 * (1 + k % 3), "eps": 0.1 * (1 + k % 2), "weight_decay": 0.01 * (k % 4)} for k in range(12)]
    params, alone = [parameter((3,), seed=k) for k in range(12)], [parameter((3,), seed=k) for k in range(12)]
    together = Adagrad([{"params": [p], **each} for p, each in zip(params, options, strict=True)])
    apart = [Adagrad([p], **each) for p, each in zip(alone, options, strict=True)]  # type: ignore[arg-type]
    for p, q in zip(params, alone, strict=True):
        p.grad, q.grad = gradient(p, 0), gradient(q, 0)
    together.step()
    for each in apart:
        each.step()
    for p, q in zip(params, alone, strict=True):
        assert_same_bits(p, q)


def test_parameters_in_a_tuple_of_ones_own() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Adagrad(params, lr=0.5)
    optimizer.param_groups[0]["params"] = tuple(params)
    for p in params:
        p.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert all(p.tolist() == [0.5] * 3 for p in params)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)], ids=repr)
def test_learning_rate_is_a_number_or_a_tensor(lr: Any, fused: bool | None) -> None:
    p, q = parameter((3,)), parameter((3,))
    optimizer = Adagrad([p], lr=lr, lr_decay=0.5, fused=fused)
    other = Adagrad([q], lr=float(lr), lr_decay=0.5)
    for factor in (1.0, 0.5, 0.25):
        p.grad = q.grad = gradient(p, 0)
        if isinstance(lr, Tensor):
            optimizer.param_groups[0]["lr"] = lr * factor
        else:
            optimizer.param_groups[0]["lr"] = lr * factor
        other.param_groups[0]["lr"] = float(lr * factor)
        optimizer.step()
        other.step()
    assert_same_bits(p, q)


@pytest.mark.parametrize("name", ["eps", "weight_decay", "lr_decay"])
def test_hyper_parameters_that_are_tensors(name: str) -> None:
    params = [parameter((3,)) for _ in range(2)]
    number = torch.tensor(0.25)
    for p, value in zip(params, (number, 0.25), strict=True):
        optimizer = Adagrad([p], lr=0.1, **{name: value})  # type: ignore[arg-type]
        for step in range(3):
            p.grad = gradient(p, step)
            optimizer.step()
    assert_same_bits(*params)


# -------------------------------------------------------------------------------------------------- schedules and hooks


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
    ids=["step", "one cycle", "cosine", "lambda"],
)
def test_schedulers(make: Callable[[Any], Any]) -> None:
    p, q = parameter((6,)), parameter((6,))
    first, second = Adagrad([p], lr=0.1), torch.optim.Adagrad([q], lr=0.1)
    schedulers = [make(first), make(second)]
    for step in range(6):
        p.grad = gradient(p, step)
        q.grad = p.grad.clone()
        for optimizer, scheduler in zip((first, second), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_reduce_on_plateau() -> None:
    p = parameter((2,))
    optimizer = Adagrad([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_closure_and_hooks() -> None:
    p = parameter((3,))
    optimizer = Adagrad([p])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert loss is not None
    assert loss.item() > 0
    optimizer.zero_grad()
    assert p.grad is None


def test_hooks_are_called_from_when_they_are_there() -> None:
    p = parameter((3,))
    optimizer = Adagrad([p])
    p.grad = torch.ones(3)
    calls = []
    for name in ("pre", "post"):
        optimizer.step()
        own = getattr(optimizer, f"register_step_{name}_hook")(lambda *_, name=name: calls.append(name))
        optimizer.step()
        own.remove()
        optimizer.step()
    handle = register_optimizer_step_pre_hook(lambda *_: ((optimizer, lambda: calls.append("closure")), {}))
    try:
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert calls == ["pre", "post", "closure"]
    assert optimizer.state[p]["step"] == 8
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda *_: calls.append("the closure's")))  # type: ignore
    assert calls[3:] == ["the closure's"]


@since("2.8", "profile of all threads")
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_profiler_sees_the_step(in_a_thread: bool) -> None:
    p = parameter((3,))
    optimizer = Adagrad([p])
    p.grad = torch.ones(3)
    optimizer.step()
    config = torch.profiler._ExperimentalConfig(profile_all_threads=in_a_thread)
    with torch.profiler.profile(experimental_config=config, acc_events=True) as profiler:
        if in_a_thread:
            thread = threading.Thread(target=optimizer.step)
            thread.start()
            thread.join()
        else:
            optimizer.step()
    optimizer.step()
    assert [event.name for event in profiler.events()].count("Optimizer.step#Adagrad.step") == 1


@pytest.mark.parametrize("is_plain", [True, False])
def test_threads_that_share_an_optimizer_lose_no_count(is_plain: bool) -> None:
    params = [nn.Parameter(torch.ones(600)[:: 1 if is_plain else 2]) for _ in range(20)]
    optimizer = Adagrad(params)
    for p in params:
        p.grad = torch.ones_like(p)

    def train() -> None:
        for _ in range(50):
            optimizer.step()

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(optimizer.state[p]["step"]) for p in params] == [200] * 20


def test_optimizer_in_backward() -> None:
    """One optimizer for each parameter, which steps as soon as its gradient is complete."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    other = copy.deepcopy(model)
    optimizers = {p: Adagrad([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    together = Adagrad(other.parameters(), lr=0.1)
    for seed in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        other(x).square().mean().backward()
        together.step()
        together.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q)


# --------------------------------------------------------------------------------------------------------------- states


def test_what_is_swapped_between_steps_counts() -> None:
    """Nothing of a step is remembered: not addresses, not dtypes, not states."""
    p = parameter((4, 3))
    optimizer, expected = Adagrad([p], lr=0.1), Expected(p, lr=0.1)
    for step in range(4):
        p.data = p.data.clone()
        optimizer.state[p]["sum"] = optimizer.state[p]["sum"].clone()
        p.grad = gradient(p, step)
        expected.step(p.grad)
        optimizer.step()
    expected.compare(p, optimizer.state[p])
    p.data = p.data.t().contiguous().t()
    p.grad = gradient(p, 9)
    expected.step(p.grad)
    optimizer.step()
    expected.compare(p.detach().contiguous(), {**optimizer.state[p], "sum": optimizer.state[p]["sum"].contiguous()})
    p.data = p.data.double()
    optimizer.state[p]["sum"] = optimizer.state[p]["sum"].double()
    p.grad = torch.zeros(4, 3, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["sum"].dtype == torch.float64
    optimizer.state[p] = {}
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_parameter_that_comes_back_keeps_its_state() -> None:
    params = [[parameter((3,))] for _ in range(2)]
    for (p,), klass in zip(params, (Adagrad, torch.optim.Adagrad), strict=True):
        optimizer = klass([p], lr=0.1)
        for step in range(4):
            if step == 2:
                optimizer.param_groups.clear()
                optimizer.add_param_group({"params": [p], "lr": 0.2})
            p.grad = gradient(p, step)
            optimizer.step()
        assert optimizer.state[p]["step"] == 4
    assert torch.allclose(params[0][0], params[1][0], rtol=1e-6)


def test_pickle_and_deepcopy() -> None:
    model = nn.Linear(3, 2)
    optimizer = Adagrad(model.parameters(), lr=0.1, weight_decay=0.1, clip_value=0.5)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    pair = model, optimizer
    for again_model, again in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        again_model(torch.ones(3)).sum().backward()
        again.step()
        assert again.param_groups[0]["clip_value"] == 0.5
    model.zero_grad()
    again_model.zero_grad()
    for m, o in ((model, optimizer), (again_model, again)):
        m(torch.ones(3)).sum().backward()
        o.step()
    assert optimizer.state[model.weight]["step"] == 2
    assert again.state[again_model.weight]["step"] == 3


def test_share_memory() -> None:
    p = parameter((3,), torch.bfloat16)
    optimizer = Adagrad([p], multi_precision=True)
    p.grad = gradient(p, 0)
    optimizer.step()
    optimizer.share_memory()
    assert optimizer.state[p]["sum"].is_shared()
    assert optimizer.state[p]["master"].is_shared()
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_only_the_parameters_state_is_shared() -> None:
    optimizer = Adagrad([parameter((3,))])
    optimizer.state["global"] = 3  # type: ignore[index, assignment]
    optimizer.share_memory()


@pytest.mark.parametrize("what", ["parameter", "sum", "master"])
def test_autograd_notices_what_has_changed(what: str) -> None:
    p = parameter((3,), torch.bfloat16 if what == "master" else torch.float32)
    optimizer = Adagrad([p], multi_precision=what == "master")
    p.grad = torch.ones_like(p)
    optimizer.step()
    factor = torch.ones(3, requires_grad=True)
    loss = (factor * (p if what == "parameter" else optimizer.state[p][what])).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fused_counts_are_on_the_parameters_device() -> None:
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    for fused, device in ((True, "meta"), (False, "cpu")):
        assert Adagrad([p], fused=fused).state[p]["step"].device.type == device


def test_counts_are_as_wide_as_pytorchs() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        p = torch.nn.Parameter(torch.ones(2))
        assert [kind([p]).state[p]["step"].dtype for kind in (Adagrad, torch.optim.Adagrad)] == [torch.float64] * 2
    finally:
        torch.set_default_dtype(torch.float32)


def test_counts_that_were_made_in_inference_mode_advance() -> None:
    p = nn.Parameter(torch.ones(2))
    with torch.inference_mode():
        optimizer = Adagrad([p], lr=0.5)
    assert optimizer.state[p]["step"].is_inference()
    version = p._version
    for n in (1, 2):
        p.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.state[p]["step"] == n
    assert p._version > version


@pytest.mark.parametrize("kind", [Adagrad, AdaGrad])
def test_a_pytorch_that_marks_only_one_tensor_at_a_time(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.6 refuses a list, and whatever was made in inference mode."""
    newer = versions.increment_version

    def increment_version(tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise RuntimeError("increment_version expect a Tensor as input")
        if tensor.is_inference():
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")
        newer(tensor)

    monkeypatch.setattr(versions, "increment_version", increment_version)
    monkeypatch.setattr(versions, "_TAKES_LISTS", versions._takes_lists())
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with torch.inference_mode():
        made = torch.zeros(2)
    if kind is Adagrad:
        optimizer = Adagrad([p, q], lr=0.5)
        optimizer.state[q]["sum"] = made
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    else:
        with torch.no_grad():
            kind(0.5).update([0, 1], [p, q], [torch.ones(2)] * 2, [torch.zeros(2), made])
    assert p._version == q._version == 1
    assert made.tolist() == [1, 1]
