"""Checkpoints of ``adagrad.torch.Adagrad``: its own, and those that move between it and ``torch.optim.Adagrad``."""

from __future__ import annotations

import copy
import io
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from adagrad import torch_state
from adagrad.torch import Adagrad
from support import assert_same_bits


class Model(nn.Module):
    """Lookups with sparse gradients, dense layers, and a part in bfloat16."""

    def __init__(self, low: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(30, 6, mode="sum", sparse=True)
        self.hidden = nn.Linear(6, 8)
        self.low = nn.Linear(8, 1, dtype=low)

    def forward(self, ids: Tensor) -> Tensor:
        return self.low(self.hidden(self.table(ids)).relu().to(self.low.weight.dtype)).float()


def make(seed: int = 0, low: torch.dtype = torch.bfloat16) -> Model:
    torch.manual_seed(seed)
    return Model(low)


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(30, (5, 4), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(ids) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_same_bits(p, q, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.05, "lr_decay": 0.1, "maximize": True},
        {"row_wise": True, "clip_value": 0.1},
        {"multi_precision": True, "lr": torch.tensor(0.05)},
        {"fused": True},
    ],
    ids=str,
)
def test_resumed_training_is_the_same_to_the_bit(options: dict[str, Any]) -> None:
    model = make()
    optimizer = Adagrad(model.parameters(), **options)
    train(model, optimizer, range(4))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    whole = train(model, optimizer, range(4, 8))

    resumed = make(1)
    again = Adagrad(resumed.parameters(), lr=9.0)  # the options come from the checkpoint
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert train(resumed, again, range(4, 8)) == whole
    assert_same_model(model, resumed)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[p].keys() == again.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert_same_bits(value, again.state[q][name], name)


def test_the_dict_holds_what_torch_knows_and_no_more() -> None:
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, dtype=torch.float16))]
    ours, theirs = Adagrad(params).state_dict(), torch.optim.Adagrad(params).state_dict()
    assert [set(state) for state in ours["state"].values()] == [set(state) for state in theirs["state"].values()]
    extra = {"clip_value": None, "row_wise": False, "multi_precision": False}
    extra |= {"epsilon_inside": False, "decoupled_decay": False}
    assert ours["param_groups"] == [theirs["param_groups"][0] | extra]
    for i in (0, 1):
        assert ours["state"][i]["step"].dtype == theirs["state"][i]["step"].dtype
        assert ours["state"][i]["sum"].shape == theirs["state"][i]["sum"].shape
    assert ours["state"][1]["sum"].dtype == torch.float32


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_exchange_with_torch(dtype: torch.dtype, fused: bool | None) -> None:
    """A run that changes the optimizer's class half-way, either way, is a run of torch.optim.Adagrad."""
    if dtype.is_complex:
        fused = None

    def run(first: Any, second: Any) -> tuple[Tensor, Tensor]:
        p = nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4))
        optimizer = first([p], lr=0.1, lr_decay=0.1, weight_decay=0.01, fused=fused)
        for step in range(6):
            if step == 3:
                saved = through_a_file(optimizer.state_dict())
                optimizer = second([p])
                optimizer.load_state_dict(saved)
            p.grad = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        assert optimizer.state[p]["step"] == 6
        assert optimizer.param_groups[0]["lr_decay"] == 0.1
        return p.detach(), optimizer.state[p]["sum"]

    theirs = torch.optim.Adagrad
    want = run(theirs, theirs)
    for first, second in ((Adagrad, theirs), (theirs, Adagrad), (Adagrad, Adagrad)):
        for got, expected in zip(run(first, second), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_histories_survive(dtype: torch.dtype) -> None:
    """PyTorch casts state to the parameter's dtype when it loads: 1/3 would lose 13 bits or more."""
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = Adagrad([p], multi_precision=True)
    p.grad = torch.full((3,), 0.3, dtype=dtype)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    q = nn.Parameter(torch.zeros(3, dtype=dtype))
    again = Adagrad([q])
    again.load_state_dict(saved)
    for name in ("sum", "master"):
        assert again.state[q][name].dtype == torch.float32
        assert_same_bits(again.state[q][name], optimizer.state[p][name])
        assert not torch.equal(again.state[q][name], again.state[q][name].to(dtype).float())
    theirs = torch.optim.Adagrad([q])
    theirs.load_state_dict(saved)  # which rounds them
    assert theirs.state[q]["sum"].dtype == dtype
    again.load_state_dict(theirs.state_dict())
    assert again.state[q]["sum"].dtype == torch.float32


def test_options_that_torch_does_not_save_stay() -> None:
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Adagrad([{"params": params[0], "clip_value": 0.5}, {"params": params[1], "multi_precision": True}])
    saved = torch.optim.Adagrad([{"params": [p]} for p in params], lr=0.7).state_dict()
    optimizer.load_state_dict(saved)
    assert [g["clip_value"] for g in optimizer.param_groups] == [0.5, None]
    assert [g["multi_precision"] for g in optimizer.param_groups] == [False, True]
    assert [g["lr"] for g in optimizer.param_groups] == [0.7, 0.7]
    assert not any("row_wise" in group for group in saved["param_groups"])


def test_a_master_copy_is_made_where_the_checkpoint_has_none() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    saved = torch.optim.Adagrad([p]).state_dict()
    optimizer = Adagrad([p], multi_precision=True)
    optimizer.load_state_dict(saved)
    p.data.fill_(3.0)  # what the model is loaded with afterwards counts
    p.grad = torch.ones(2, dtype=torch.bfloat16)
    optimizer.step()
    assert_same_bits(optimizer.state[p]["master"], torch.full((2,), 3 - 0.01))


def test_old_checkpoints_count_in_numbers() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Adagrad([p])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 7
    for fused in (None, True):
        saved["param_groups"][0]["fused"] = fused
        optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state[p]["step"], torch.tensor(7.0))


def test_hooks_see_tensors() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = Adagrad([p])
    saved = optimizer.state_dict()
    seen = []

    def double(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(state_dict["state"][0]["sum"].dtype)
        return {**state_dict, "state": {0: {"step": torch.tensor(1.0), "sum": torch.full((2,), 1 / 3)}}}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["sum"].dtype))
    optimizer.load_state_dict(saved)
    assert seen == [torch.float32, torch.float32]
    assert_same_bits(optimizer.state[p]["sum"], torch.full((2,), 1 / 3))
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_state_of_no_parameter_is_copied_as_it_is() -> None:
    p, optimizer = with_master()
    optimizer.state["ema"] = {"loss": torch.tensor(3.0)}  # type: ignore[index]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["ema"] == {"loss": torch.tensor(3.0)}  # type: ignore[index]
    assert optimizer.state[p]["sum"].dtype == torch.float32


@pytest.mark.parametrize("dialect", ["torch", "mxnet1", "keras"])
def test_options_that_a_checkpoint_lacks_stay(dialect: str) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Adagrad(
        [p], lr=0.3, lr_decay=0.5, eps=1e-3, weight_decay=0.1, initial_accumulator_value=0.2, dialect=dialect
    )
    before = dict(optimizer.param_groups[0])
    saved = optimizer.state_dict()
    saved["param_groups"] = [{"params": [0]}]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0] == before


@pytest.mark.parametrize("name", ["step", "sum"])
def test_a_state_that_lacks_something_is_refused(name: str) -> None:
    p, optimizer = with_master()
    before = copy.deepcopy(optimizer.state[p])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][name]
    with pytest.raises(ValueError, match=f"state of parameter 0 of group 0: no {name!r}: must have step and sum"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[p].keys() == before.keys()
    adam = torch.optim.Adam([p])
    adam.step()
    options = optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="state of parameter 0 of group 0: no 'sum'"):
        optimizer.load_state_dict(adam.state_dict() | {"param_groups": options})
    assert_same_bits(optimizer.state[p]["sum"], before["sum"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("sum", None), ("sum", 1.0), ("sum", [1.0, 1.0]), ("master", 1.0), ("step", torch.ones(2)), ("step", "3"),
     ("step", None), ("step", torch.tensor(True)), ("step", torch.tensor(math.nan)), ("step", -1), ("step", math.inf),
     ("step", 10**400), ("step", torch.tensor(1j)), ("sum", torch.zeros(2).to_sparse()), ("sum", torch.zeros(2) * 1j)],
    ids=str,
)  # fmt: skip
def test_a_state_of_another_kind_is_refused(name: str, value: Any) -> None:
    p, optimizer = with_master()
    before = copy.deepcopy(optimizer.state[p])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = value
    with pytest.raises(ValueError, match=f"state of parameter 0 of group 0: {name}"):
        optimizer.load_state_dict(saved)
    for key, was in before.items():
        assert_same_bits(optimizer.state[p][key], was)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("eps", -1.0, ValueError), ("lr", math.nan, ValueError), ("lr", None, TypeError), ("clip_value", 0, ValueError),
     ("row_wise", 1, TypeError), ("maximize", torch.ones(2), TypeError)],
)  # fmt: skip
def test_options_of_a_checkpoint_are_checked(name: str, value: Any, error: type[Exception]) -> None:
    p, optimizer = with_master()
    before, group = copy.deepcopy(optimizer.state[p]), dict(optimizer.param_groups[0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][name] = value
    with pytest.raises(error, match=name):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0] == group
    assert_same_bits(optimizer.state[p]["sum"], before["sum"])


@pytest.mark.parametrize(
    "saved",
    [{}, {"state": {}}, {"state": [], "param_groups": []}, {"state": {}, "param_groups": [{}]},
     {"state": {}, "param_groups": [3]}],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(saved: Any) -> None:
    with pytest.raises(ValueError, match="state_dict"):
        with_master()[1].load_state_dict(saved)


def test_the_state_of_another_optimizer_is_refused() -> None:
    """SGD's has no state at all: the histories would begin anew."""
    p, optimizer = with_master()
    with pytest.raises(ValueError, match="state_dict: group 0: no 'lr_decay': must have the options of an AdaGrad"):
        optimizer.load_state_dict(torch.optim.SGD([p], lr=0.5).state_dict())
    assert optimizer.state[p]["step"] == 1


def test_what_a_step_accepts_is_loaded() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Adagrad([p], lr=0.1, foreach=True)
    optimizer.param_groups[0]["lr"] = -1e-17  # of a schedule that rounds
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["fused"]
    saved["param_groups"] = tuple(saved["param_groups"])
    again = Adagrad([p], fused=True)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_state_dicts_leave_out_frozen_parameters(flat: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = Adagrad(model.parameters())
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        set_optimizer_state_dict(model, optimizer, saved, options=options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_a_group_that_lost_an_option_loads() -> None:
    _, optimizer = with_master()
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer.param_groups[0]["fused"], saved["param_groups"][0]["fused"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["fused"] is None


def test_distributed_checkpoints_of_torch(tmp_path: Path) -> None:
    """As docs/distributed.md says."""
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs, ours = torch.optim.Adagrad(model.parameters(), lr=0.3), Adagrad(again.parameters(), clip_value=0.5)
    model(torch.ones(1, 3)).sum().backward()
    theirs.step()
    found = {"optimizer": get_optimizer_state_dict(again, ours)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group
        dcp.save({"optimizer": get_optimizer_state_dict(model, theirs)}, checkpoint_id=tmp_path)
        dcp.load(found, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(again, ours, found["optimizer"])
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["clip_value"]) == (0.3, 0.5)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert_same_bits(ours.state[q]["sum"], theirs.state[p]["sum"])


def test_a_master_copy_comes_back_into_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    """torch.distributed.checkpoint fills what is there: the master copy must be."""

    def made() -> tuple[nn.Linear, Adagrad]:
        torch.manual_seed(0)
        model = nn.Linear(8, 8).bfloat16()
        return model, Adagrad(model.parameters(), lr=1e-3, multi_precision=True)

    def train(model: nn.Linear, optimizer: Adagrad, steps: range) -> None:
        for seed in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(10))
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    again, other = made()
    found = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, other)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group
        dcp.save(saved, checkpoint_id=tmp_path)
        dcp.load(found, checkpoint_id=tmp_path)
    again.load_state_dict(found["model"])
    set_optimizer_state_dict(again, other, found["optimizer"])
    assert_same_bits(other.state[again.weight]["master"], optimizer.state[model.weight]["master"])
    train(model, optimizer, range(10, 60))
    train(again, other, range(10, 60))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert_same_bits(p, q)


def test_master_copies_are_of_the_parameters_as_they_are_at_the_first_step() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = Adagrad([p], lr=1.0, multi_precision=True)
    with torch.no_grad():
        p.fill_(5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["master"].tolist() == [4.0] * 3


@pytest.mark.parametrize("what", ["shape", "row-wise", "groups"])
def test_a_refused_checkpoint_changes_nothing(what: str) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Adagrad([p], row_wise=what == "row-wise", lr=0.3)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    before, group = copy.deepcopy(optimizer.state[p]), dict(optimizer.param_groups[0])
    shapes = {"shape": [(2, 3)], "row-wise": [(3, 2)], "groups": [(3, 2), (3, 2)]}[what]
    other = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    saved = torch.optim.Adagrad(other).state_dict()
    message = {
        "shape": r"state of parameter 0 of group 0: sum: shape \(2, 3\): must be \(3, 2\), the parameter's",
        "row-wise": r"sum: shape \(3, 2\): must be \(3, 1\), of the row-wise history of \(3, 2\)",
        "groups": "doesn't match the size of optimizer's group",
    }[what]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0] == group
    for name, value in before.items():
        assert_same_bits(optimizer.state[p][name], value)


def test_distributed_state_dicts(tmp_path: Path) -> None:
    """By parameter names, as torch.distributed.checkpoint keeps them."""
    model = make()
    optimizer = Adagrad(model.parameters(), multi_precision=True)
    train(model, optimizer, range(2))
    saved = through_a_file(get_optimizer_state_dict(model, optimizer))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    other = make()
    other.load_state_dict(model.state_dict())
    again = Adagrad(other.parameters())
    set_optimizer_state_dict(other, again, saved)
    assert train(model, optimizer, range(2, 4)) == train(other, again, range(2, 4))
    assert_same_model(model, other)
    assert again.state[other.low.weight]["sum"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ the master copy


def with_master() -> tuple[nn.Parameter, Adagrad]:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Adagrad([p], lr=0.1, multi_precision=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p, optimizer


def test_a_master_copy_that_torch_carried_along_is_made_anew() -> None:
    p, optimizer = with_master()
    theirs = torch.optim.Adagrad([p])
    theirs.load_state_dict(optimizer.state_dict())
    for _ in range(20):
        theirs.step()
    before = p.detach().clone()
    again = Adagrad([p], multi_precision=True)
    again.load_state_dict(theirs.state_dict())
    p.grad = torch.zeros_like(p)
    again.step()
    assert_same_bits(p, before)
    assert_same_bits(again.state[p]["master"], before.float())


@pytest.mark.parametrize("change", ["in place", "other memory", "without multi_precision"])
def test_a_master_copy_follows_its_parameter(change: str) -> None:
    p, optimizer = with_master()
    kept = optimizer.state[p]["master"].clone()
    if change == "in place":
        with torch.no_grad():
            p.mul_(0.5)
    elif change == "other memory":
        p.data = p.data * 0.5
    else:
        optimizer.param_groups[0]["multi_precision"] = False
        for _ in range(20):
            optimizer.step()
        optimizer.param_groups[0]["multi_precision"] = True
    before = p.detach().clone()
    assert not torch.equal(before, kept.bfloat16())
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(p, before)
    assert_same_bits(optimizer.state[p]["master"], before.float())


def test_parameters_that_nobody_changed_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = Adagrad(params, multi_precision=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    monkeypatch.setattr(torch_state, "_can_compare", None)
    optimizer.step()


def test_what_is_remembered_of_parameters_that_were_replaced() -> None:
    optimizer = Adagrad([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], multi_precision=True)
    group, others = optimizer.param_groups[0], []
    for size in range(1, 20):
        new = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        new.grad = torch.ones_like(new)
        others.append(group["params"][0])  # alive, so that no id is used again
        del optimizer.state[group["params"][0]]
        group["params"][0] = new
        optimizer.step()
    assert len(optimizer._snapshots) <= 2


def test_a_master_copy_follows_a_parameter_that_nobody_watches() -> None:
    with torch.inference_mode():
        p = torch.ones(3, dtype=torch.bfloat16)
        optimizer = Adagrad([p], multi_precision=True)
        for value in (1.0, 5.0):
            p.fill_(value)
            p.grad = torch.zeros_like(p)
            optimizer.step()
            assert (p == value).all()


def test_a_master_copy_stays_where_a_change_was_none() -> None:
    p, optimizer = with_master()
    kept = optimizer.state[p]["master"].clone()
    assert not torch.equal(kept, p.detach().float()), "it has bits that the parameter lacks"
    with torch.no_grad():
        p.copy_(p.clone())
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(optimizer.state[p]["master"], kept)


def test_states_listed_in_another_order_than_the_parameters() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Adagrad(params, lr=1.0, eps=0.0)
    saved = optimizer.state_dict()
    saved["state"] = {k: {"step": torch.tensor(0.0), "sum": torch.full((2,), float(k) * 3)} for k in (1, 0)}
    optimizer.load_state_dict(saved)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert [p.tolist() for p in params] == [[0.0, 0.0], [0.5, 0.5]]


def test_a_master_copy_with_nan_is_kept() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))
    optimizer = Adagrad([p], lr=1e-4, multi_precision=True)
    p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    before = optimizer.state[p]["master"][0].item()
    again = Adagrad([p], lr=0.0, multi_precision=True)
    again.load_state_dict(optimizer.state_dict() | {"param_groups": again.state_dict()["param_groups"]})
    again.step()
    assert before != 1.0
    assert again.state[p]["master"][0].item() == before


def test_a_master_copy_follows_a_parameter_to_nan_and_back() -> None:
    p, optimizer = with_master()
    p.grad = torch.zeros_like(p)
    for value in (math.nan, 2.0):
        with torch.no_grad():
            p[0] = value
        optimizer.step()
        assert_same_bits(p[0], torch.tensor(value, dtype=p.dtype))
        assert_same_bits(optimizer.state[p]["master"][0], torch.tensor(value))


def test_counts_whose_values_the_host_does_not_know_are_loaded() -> None:
    p = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = Adagrad([p], fused=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["step"].is_meta


@pytest.mark.parametrize("fused", [True, False])
def test_counts_that_are_numbers_in_a_checkpoint_go_where_counts_are(fused: bool) -> None:
    p = torch.nn.Parameter(torch.ones(2, device="meta" if fused else "cpu"))
    optimizer = Adagrad([p], fused=fused)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 3
    with torch.device("cpu" if fused else "meta"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"].device.type == ("meta" if fused else "cpu")


def test_hooks_before_loading_may_remove_themselves_and_load() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Adagrad([p], lr=0.5)
    saved, other = optimizer.state_dict(), Adagrad([p], lr=0.25).state_dict()
    seen: list[str] = []

    def once(_: Any, state_dict: dict[str, Any]) -> None:
        handle.remove()
        seen.append("once")
        optimizer.load_state_dict(saved)

    def again(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("again")
        groups = [group | {"eps": 0.125} for group in state_dict["param_groups"]]
        return state_dict | {"param_groups": groups}

    handle = optimizer.register_load_state_dict_pre_hook(once)
    optimizer.register_load_state_dict_pre_hook(again)
    optimizer.load_state_dict(other)
    assert seen == ["once", "again", "again"]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"]) == (0.25, 0.125)
    with pytest.raises(ValueError, match="must have 'state' and 'param_groups'"):
        optimizer.load_state_dict({"param_groups": []})
    assert seen == ["once", "again", "again", "again"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("given", [None, "adagrad.pt", b"", [{}]])
def test_what_is_no_dict_is_refused_by_name(given: Any) -> None:
    optimizer = Adagrad([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=re.escape(f"state_dict={given!r}: must be what state_dict() returns")):
        optimizer.load_state_dict(given)


@pytest.mark.parametrize("state", [5, torch.ones(2), None, []])
def test_a_state_that_is_no_dict_is_refused_by_name(state: Any) -> None:
    optimizer = Adagrad([nn.Parameter(torch.ones(2))])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"state of parameter 0: {type(state).__name__}: must be a dict"):
        optimizer.load_state_dict(before | {"state": {0: state}})
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_a_copy_is_the_same_whatever_the_state() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Adagrad([p], fused=True)
    for step in (torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(2.0**24 + 1, dtype=torch.float64), 3):
        optimizer.state[p]["step"] = step
        copied = next(iter(copy.deepcopy(optimizer).state.values()))["step"]
        assert_same_bits(torch.as_tensor(copied), torch.as_tensor(step))
        assert type(copied) is type(step)
    del optimizer.state[p]["sum"]
    assert next(iter(copy.deepcopy(optimizer).state.values())).keys() == {"step"}


@pytest.mark.parametrize("multi_precision", [False, True])
def test_parameters_without_gradients_get_no_state(multi_precision: bool) -> None:
    """Those that were frozen when a checkpoint was made have none after it is loaded."""
    params = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = Adagrad(params, multi_precision=multi_precision)
    for p in params[:2]:
        del optimizer.state[p]
    params[0].untyped_storage().resize_(0)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state) == set(params[1:])
    assert (params[1] < 1).all()
    assert_same_bits(params[1].detach(), params[2].detach())


def test_a_hook_that_returns_nothing_useful_is_refused() -> None:
    optimizer = Adagrad([nn.Parameter(torch.ones(2))])
    optimizer.register_load_state_dict_pre_hook(lambda *_: {})
    with pytest.raises(ValueError, match="must have 'state' and 'param_groups'"):
        optimizer.load_state_dict(optimizer.state_dict())
