"""``adagrad.torch.Adagrad`` and the CUDA kernels: how it calls them, and on a GPU the bits of the CPU.

Without a GPU, the calls are made on CPU tensors that the dispatcher is told are elsewhere; Triton's interpreter runs
the kernels.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from adagrad import AdaGrad, RowSparse, get_updater, torch_step
from adagrad.kernels import device_lists, device_updates, fast_path, general_path, paths
from adagrad.kernels.batch import Batch
from adagrad.kernels.inspection import table
from adagrad.kernels.names import of_parameter
from adagrad.rule import Rule
from adagrad.torch import Adagrad
from cuda_operands import needs_gpu
from support import assert_same_bits, refuse_the_general_path
from torch_oracle import contents

pytest.importorskip("triton")

from adagrad.kernels.cuda import tables
from adagrad.kernels.cuda.launch import Kernel

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"lr": 0.3, "weight_decay": 0.1, "lr_decay": 0.5, "clip_value": 0.7, "maximize": True},
    "low precision": {"multi_precision": True, "weight_decay": 0.01},
    "row-wise": {"row_wise": True},
}


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(0)
    tensors = [torch.randn(5, 4), torch.randn(7, dtype=torch.float64), torch.randn(6, 8).bfloat16(), torch.randn(6, 8)]
    return [nn.Parameter(t.to(device)) for t in tensors]


def set_grads(params: list[nn.Parameter], seed: int) -> None:
    """The last one's is sparse; its rows are distinct, for then the order of sums does not matter."""
    generator = torch.Generator().manual_seed(seed)
    for p in params[:-1]:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    rows = torch.randperm(6, generator=generator)[:4][None]
    values = torch.randn(4, 8, generator=generator)
    last = params[-1]
    last.grad = torch.sparse_coo_tensor(rows, values, (6, 8), check_invariants=True).to(last.device)


def train(params: list[nn.Parameter], **options: Any) -> Adagrad:
    optimizer = Adagrad(params, **options)
    for step in range(8):
        set_grads(params, step)
        optimizer.step()
    return optimizer


def assert_same_training(a: Adagrad, b: Adagrad) -> None:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert_same_bits(p.detach().cpu(), q.detach().cpu())
        for name in a.state[p]:
            assert_same_bits(a.state[p][name].cpu(), b.state[q][name].cpu(), name)


# ------------------------------------------------------------------------------------------- how the kernels are called


def known_by_address(groups: Any) -> list[Tensor]:
    """The tensors of a call, which tables give to the kernels by their addresses."""
    found: list[Any] = []
    for updates in [each for group in groups for each in group[1:] if each]:
        assert updates.tensors
        for held in [*updates.tensors, *updates.lrs]:
            parts = [*held.weights, *held.histories] if isinstance(held, Batch) else held
            found += parts if isinstance(parts, (list, tuple)) else [parts]
    return [t for t in found if isinstance(t, Tensor)]


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Within: plain CPU tensors go where plain CUDA tensors go; the calls, as they are made."""
    if torch.cuda.is_available():
        pytest.skip(reason="the kernels are compiled for the GPU here, and take no CPU tensors")
    from adagrad.kernels import cuda

    calls = []
    real = cuda.job

    def prepare(groups: Any, device: Any, **others: Any) -> Any:
        dense = sum(len(group.dense.rows) for group in groups if group.dense)
        calls.append((dense, sum(len(group.rows.facts) for group in groups if group.rows), others))
        memory = [StorageWeakRef(t.untyped_storage()) for t in known_by_address(groups)]
        carry_out = real(groups, device, **others)
        del groups

        def checked() -> Any:
            assert not any(each.expired() for each in memory), "alive until the launch"
            return carry_out()

        return checked

    monkeypatch.setattr(cuda, "job", prepare)
    decode = table.decode
    monkeypatch.setattr(table, "decode", lambda code: (1, decode(code)[1]))
    monkeypatch.setattr(fast_path, "update_plain", lambda *lists: False)
    monkeypatch.setattr(paths, "is_on_cuda", lambda tensor: True)
    with np.errstate(all="ignore"):
        yield calls


@pytest.mark.parametrize("name", OPTIONS)
def test_calls(name: str, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = train(parameters(), **OPTIONS[name])
    # All of a rule in one call: what is dense, what is row-sparse.
    assert as_if_on_cuda == [(3, 1, {"grad_scale": None, "found_inf": None})] * 8
    monkeypatch.undo()
    assert_same_training(ours, train(parameters(), **OPTIONS[name]))


@pytest.mark.parametrize("grad", ["shape", "values", "row id"])
def test_row_sparse_gradients_of_the_core_that_do_not_fit(grad: str, as_if_on_cuda: list[Any]) -> None:
    """The general path says why; nothing has changed."""
    values, ids, shape = torch.ones(2, 4), torch.tensor([1, 2]), (3, 4)
    rows, message = {
        "shape": (RowSparse(values, ids, (5, 4)), r"grads\[1\]: shape \(5, 4\): must be \(3, 4\)"),
        "values": (RowSparse(values.double(), ids, shape), r"values of grads\[1\]: dtype float64: must be float32"),
        "row id": (RowSparse(values, ids + 1, shape), r"indices: row 3: must be in \[0, 3\)"),
    }[grad]
    weights, histories = [torch.ones(3, 4) for _ in range(2)], [torch.zeros(3, 4) for _ in range(2)]
    optimizer = AdaGrad(0.5)
    if grad == "row id":  # reported by a later call
        optimizer.update([0, 1], weights, [torch.ones(3, 4), rows], histories)
        rows = RowSparse(values, ids, shape)
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        optimizer.update([0, 1], weights, [torch.ones(3, 4), rows], histories)
    assert all((w == 1).all() for w in weights)
    assert not any(h.any() for h in histories)


@pytest.mark.parametrize("kind", ["RowSparse", "COO"])
def test_the_core_makes_the_same_calls(kind: str, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One lr and one wd where all weights share them; a list is one call, checked by compiled code."""
    refuse_the_general_path(monkeypatch)
    weights, histories = [torch.ones(3) for _ in range(3)], [torch.zeros(3) for _ in range(3)]
    rows: Any = RowSparse(torch.tensor([2.0]), torch.tensor([1]), (3,))
    if kind == "COO":
        rows = torch.sparse_coo_tensor(rows.indices[None], rows.values, (3,), check_invariants=True)
    grads = [torch.full((3,), 2.0), rows, torch.full((3,), 2.0)]
    AdaGrad(0.5, epsilon=0.0).update([0, 1, 2], weights, grads, histories)
    assert as_if_on_cuda == [(2, 1, {"grad_scale": None, "found_inf": None})]
    assert [w.tolist() for w in weights] == [[0.5] * 3, [1.0, 0.5, 1.0], [0.5] * 3]
    assert [h.tolist() for h in histories] == [[4.0] * 3, [0.0, 4.0, 0.0], [4.0] * 3]


def test_the_core_in_another_order(as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_the_general_path(monkeypatch)
    weight = torch.ones(2, 3)
    AdaGrad(0.5, epsilon=0.0).update(0, weight, torch.full((3, 2), 2.0).T, torch.zeros(2, 3))
    assert as_if_on_cuda == [(1, 0, {"grad_scale": None, "found_inf": None})]
    assert (weight == 0.5).all()


def test_a_bad_row_id_on_one_device_stops_the_call_on_all(
    as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if what is dense were on another device: the call waits, because the other device cannot see the bad id."""
    from adagrad.kernels import general_path

    updates_on, add_table = general_path._Plan.updates_on, general_path._CheckedBatch._add_table
    number = 0

    def adds_table(*given: Any) -> None:
        nonlocal number
        number = 1
        add_table(*given)
        number = 0

    monkeypatch.setattr(device_lists, "prepare", lambda *_: None)  # which takes what is on one device
    monkeypatch.setattr(general_path._CheckedBatch, "_add_table", adds_table)
    monkeypatch.setattr(general_path._Plan, "updates_on", lambda plan, _: updates_on(plan, torch.device("cpu", number)))
    weights, histories = [torch.ones(3, 2), torch.ones(4, 2)], [torch.zeros(3, 2), torch.zeros(4, 2)]
    for row in (9, 3):
        grads = [torch.ones(3, 2), RowSparse(torch.ones(1, 2), torch.tensor([row]), (4, 2))]
        optimizer = AdaGrad(0.5, epsilon=0.0)
        if row == 9:
            with pytest.raises(IndexError, match="row 9: must be in"):
                optimizer.update([0, 1], weights, grads, histories)
            assert all((w == 1).all() for w in weights)
            assert optimizer.num_update == 0
        else:
            optimizer.update([0, 1], weights, grads, histories)
            assert [w.sum().item() for w in weights] == [3, 7]
    assert [dense for dense, *_ in as_if_on_cuda] == [1, 0] * 2, "a call for each device"


class OnDevice(Tensor):
    """A number that says it is on a CUDA device."""

    is_cuda = True


def test_grad_scale_and_found_inf_reach_the_kernels(as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from adagrad.torch_step import Part

    monkeypatch.setattr(Part, "on_cuda", lambda self: True)

    params = parameters()
    optimizer, other = Adagrad(params), Adagrad(parameters())
    scale, found = torch.tensor(8.0), torch.tensor(0.0).as_subclass(OnDevice)
    for step, bad in enumerate((0.0, 1.0, 0.0)):
        set_grads(params, step)
        if not bad:
            for p, q in zip(params, other.param_groups[0]["params"], strict=True):
                q.grad = p.grad.clone()
        for p in params:
            p.grad = p.grad * 8
        found.fill_(bad)
        optimizer.grad_scale, optimizer.found_inf = scale, found
        optimizer.step()
        if not bad:
            other.step()
    scaled = [others for _, _, others in as_if_on_cuda if others["found_inf"] is not None]
    assert [float(others["grad_scale"]) for others in scaled] == [8.0] * 3
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0] * 4
    assert_same_training(optimizer, other)


def test_a_row_outside_its_weight_stops_groups_of_all_rules(as_if_on_cuda: list[Any]) -> None:
    """And the counts on the device, where they are there."""
    params = [nn.Parameter(torch.ones(4, 2)) for _ in range(3)]
    options = [{}, {"clip_value": 5.0}, {"row_wise": True}]
    groups = [{"params": [p], **each} for p, each in zip(params, options, strict=True)]
    optimizer = Adagrad(groups, lr=0.5, fused=True)
    for step in range(3):
        for p in params:
            p.grad = torch.ones(4, 2)
        rows = torch.tensor([[1, 9 if step == 1 else 2]])
        params[1].grad = torch.sparse_coo_tensor(rows, torch.ones(2, 2), (4, 2), check_invariants=False)
        before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
        if step == 2:
            with pytest.raises(IndexError, match="row 9"):
                optimizer.step()
        else:
            optimizer.step()
        after = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [step == 0] * 9
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0] * 3


def embedding_and_others(**options: Any) -> tuple[Adagrad, list[nn.Parameter]]:
    """An embedding, a plain weight and one with gaps in its memory."""
    params = [nn.Parameter(t) for t in (torch.ones(4, 2), torch.ones(3), torch.ones(3, 8)[:, ::2])]
    for p in params:
        p.grad = torch.ones(p.shape)
    return Adagrad(params, lr=0.5, **options), params


def sparse_grad(*rows: int) -> Tensor:
    return torch.sparse_coo_tensor([[*rows]], torch.ones(len(rows), 2), (4, 2), check_invariants=False)


@pytest.mark.parametrize("fused", [None, True])
def test_a_row_outside_its_weight_stops_what_the_kernels_do_not_take(
    fused: bool | None, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates by array expressions and those on the CPU do not see the device's flag."""
    monkeypatch.setattr(general_path, "fits_cuda", lambda update: update.weight.array.is_contiguous())
    optimizer, params = embedding_and_others(fused=fused)
    before = contents(optimizer, params)
    params[0].grad = sparse_grad(1, 9)
    with pytest.raises(IndexError, match="row 9: must be in"):
        optimizer.step()
    for was, now in zip(before, contents(optimizer, params), strict=True):
        assert_same_bits(was, now)
    params[0].grad = sparse_grad(1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [1.0] * 3


def test_a_row_outside_its_weight_stops_the_step_of_a_subclass(
    as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adagrad.kernels import cuda

    # As on a device, where the report arrives some time after the launch.
    monkeypatch.setattr(cuda, "raise_reported", lambda device: None)

    class Own(AdaGrad):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            super().step(indices, weights, grads, states)

    optimizer = Own(0.5)
    weights, states = [torch.ones(4, 2), torch.ones(4, 2)], [torch.zeros(4, 2), torch.zeros(4, 2)]
    with pytest.raises(IndexError, match="row 9: must be in"):
        optimizer.update([0, 1], weights, [torch.ones(4, 2), sparse_grad(1, 9)], states)
    assert all(torch.equal(w, torch.ones(4, 2)) for w in weights)
    assert not any(state.any() for state in states)
    assert not optimizer._index_update_count


class Operators(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kinds_of_lists() -> dict[str, list[dict[str, Any]]]:
    """Groups of dense (d) and row-sparse (s) parameters."""
    made = {"d": lambda: nn.Parameter(torch.ones(3)), "s": lambda: nn.Parameter(torch.ones(4, 2))}
    kinds = {"ddd": [{}], "ss": [{}], "dsd": [{}], "sd": [{}], "ds": [{}], "sdsds": [{}]}
    kinds |= {"dd|dd": [{}, {"weight_decay": 0.25}], "ds|sd|d": [{"lr": 0.25}, {}, {"weight_decay": 0.25, "lr": 0.125}]}
    kinds |= {"ss|dd": [{"row_wise": True}, {}], "sd|d|ds": [{"maximize": True}, {"eps": 0.5}, {"row_wise": True}]}
    return {
        kind: [
            {"params": [made[each]() for each in part]} | o for part, o in zip(kind.split("|"), options, strict=True)
        ]
        for kind, options in kinds.items()
    }


VARIANTS = ["plain", "low precision", "lr on the device", "scaled"]


def train_list(kind: str, variant: str, device: str = "cpu") -> tuple[Adagrad, list[nn.Parameter]]:
    """Train the groups ``kind`` of :func:`kinds_of_lists` for three steps."""
    groups = kinds_of_lists()[kind]
    params = [p for group in groups for p in group["params"]]
    dtype, scale = torch.bfloat16 if variant == "low precision" else torch.float32, 8.0 if variant == "scaled" else 1.0
    for i, p in enumerate(params):
        p.data = p.data.to(device, dtype)
        grad = sparse_grad(i % 4, 3, 3) if p.ndim == 2 else torch.full((3,), i + 1.0)
        p.grad = (grad * scale).to(device, dtype)
    optimizer = Adagrad(groups, lr=0.5, multi_precision=variant == "low precision")
    optimizer.state[params[0]]["step"].fill_(3)
    if variant == "lr on the device":
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    if variant == "scaled":
        found = torch.tensor(0.0, device=device)
        optimizer.grad_scale = torch.tensor(scale, device=device)
        optimizer.found_inf = found if found.is_cuda else found.as_subclass(OnDevice)
    for _ in range(3):
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [6.0] + [3.0] * (len(params) - 1)
    return optimizer, params


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", kinds_of_lists())
def test_plain_lists_take_the_short_way(
    kind: str, variant: str, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of dense and row-sparse parameters, and in groups of one rule or of several."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the general path was taken")

    with monkeypatch.context() as within:
        within.setattr(general_path, "prepare", refuse)
        within.setattr(torch_step.Part, "on_cuda", lambda self: True)
        if variant == "lr on the device":
            within.setattr(torch_step.Part, "_lrs", lambda self, lr, *_, **__: [lr])
        trained = train_list(kind, variant)
    letters = kind.replace("|", "")
    assert [call[:2] for call in as_if_on_cuda] == [(letters.count("d"), letters.count("s"))] * 3
    monkeypatch.undo()
    for a, b in zip(contents(*trained), contents(*train_list(kind, variant)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("kind", kinds_of_lists())
def test_what_a_steady_step_allocates(kind: str, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing for dense gradients, nor is anything copied; for row ids, whose number may change, keys and sums."""
    monkeypatch.setattr(Kernel, "bind_known", lambda *_: lambda: None)  # the interpreter allocates, unlike a launch
    groups = kinds_of_lists()[kind]
    for i, p in enumerate(p for group in groups for p in group["params"]):
        p.grad = sparse_grad(i % 4, 3, 3) if p.ndim == 2 else torch.full((3,), i + 1.0)
    optimizer = Adagrad(groups, lr=0.5)
    monkeypatch.setattr(tables._local, "tables", {})  # with as many unused flags, whichever tests ran before
    optimizer.step()
    monkeypatch.setattr(torch_step.Part, "advance", lambda *_: None)  # which sees the device's flag on the CPU here
    with Operators() as seen:
        optimizer.step()
    expected = {"aten.empty.memory_format": 1, "aten.empty_like.default": 2, "aten.new_empty.default": 1}
    expected = {name: n * (2 if kind == "sd|d|ds" else 1) for name, n in expected.items()}  # rules are launched apart
    views = ("aten._values.default", "aten._indices.default", "aten.detach.default")
    assert {k: n for k, n in seen.counts.items() if k not in views} == (expected if "s" in kind else {})


@pytest.mark.parametrize("dense_reads", [False, True], ids=["weights", "a gradient"])
def test_dense_and_row_sparse_updates_of_a_list_share_no_memory(dense_reads: bool, as_if_on_cuda: list[Any]) -> None:
    """Each part alone is without a fault."""
    memory = torch.ones(8)
    params = [nn.Parameter(memory[:6] if not dense_reads else torch.ones(3)), nn.Parameter(memory[2:8].view(3, 2))]
    params[0].grad = memory[:3] if dense_reads else torch.ones(6)
    params[1].grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=False)
    optimizer = Adagrad(params, lr=0.5)
    before = contents(optimizer, params)
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    for was, now in zip(before, contents(optimizer, params), strict=True):
        assert_same_bits(was, now)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name", ["update_elements", "update_runs"])
def test_a_kernel_that_cannot_be_compiled_changes_nothing(
    name: str, error: BaseException, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled at first use, for seconds, perhaps in the middle of training: all before the first runs."""
    optimizer, params = embedding_and_others()
    params[0].grad = sparse_grad(*[0] * 200, 1)  # takes two kernels: 200 occurrences are a long run
    before, bind = contents(optimizer, params), Kernel.bind_known

    def failing(self: Any, *arguments: Any) -> Any:
        if self._function.fn.__name__ == name and self._constants.get("LONG", True):
            raise error
        return bind(self, *arguments)

    monkeypatch.setattr(Kernel, "bind_known", failing)
    with pytest.raises(type(error)):
        optimizer.step()
    for was, now in zip(before, contents(optimizer, params), strict=True):
        assert_same_bits(was, now)
    monkeypatch.setattr(Kernel, "bind_known", bind)
    optimizer.step()
    assert params[0].detach()[1].tolist() == [0.5, 0.5]
    assert [optimizer.state[p]["step"].item() for p in params] == [1.0] * 3


@pytest.mark.parametrize("on_device", [("float32", "float64", "bfloat16"), ("float64",)], ids=["all", "some"])
def test_without_triton_array_expressions_update_what_is_on_a_device(
    on_device: tuple[str, ...], as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = table.decode
    monkeypatch.setattr(table, "decode", lambda code: (int(decode(code)[1][0] in on_device), decode(code)[1]))

    def fail() -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(device_updates, "cuda", fail)
    device_updates.has_kernels.cache_clear()
    params = parameters()
    optimizer = Adagrad(params)
    set_grads(params, 0)
    with pytest.warns(UserWarning, match=r"no CUDA kernels \(No module named 'triton'\): tensors on CUDA"):
        optimizer.step()
    monkeypatch.undo()
    device_updates.has_kernels.cache_clear()
    assert not as_if_on_cuda
    others = parameters()
    set_grads(others, 0)
    expected = Adagrad(others)
    expected.step()
    assert_same_training(optimizer, expected)


def test_an_updater_of_a_subclass_does_nothing_on_a_device_twice(as_if_on_cuda: list[Any]) -> None:
    """It checks the list before it splits it into steps; row ids on a device are each step's."""

    class Own(AdaGrad):
        def create_state(self, index: Any, weight: Any) -> Any:
            return super().create_state(index, weight)

    weights = [torch.ones(4, 2) for _ in range(2)]
    get_updater(Own(0.5))([0, 1], [sparse_grad(1), sparse_grad(2)], weights)
    assert [rows for _, rows, _ in as_if_on_cuda] == [1, 1]


def plain_list(is_sparse: bool) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(4, 2)) for _ in range(3)]
    for p in params:
        p.grad = sparse_grad(1, 3) if is_sparse else torch.ones(4, 2)
    return params


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_plain_lists_do_not_take_the_general_path(
    is_sparse: bool, fused: bool | None, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the general path")

    monkeypatch.setattr(general_path, "prepare", fail)
    params = plain_list(is_sparse)
    optimizer = Adagrad(params, lr=0.5, eps=0.0, fused=fused)
    versions = [p._version for p in params]
    for step in range(3):
        optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in params] == [step + 1] * 3
    assert [dense for dense, *_ in as_if_on_cuda] == [0 if is_sparse else 3] * 3
    changed = [False, True, False, True] if is_sparse else [True] * 4
    assert all((p != 1).all(1).tolist() == changed for p in params)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@pytest.mark.parametrize("is_sparse", [False, True])
def test_what_the_general_path_refuses(is_sparse: bool, as_if_on_cuda: list[Any]) -> None:
    """A list that is not all plain, and one that is but must not be updated."""

    def shared(params: list[nn.Parameter], state: Any) -> str:
        params[1].data = params[2].data
        return "shares memory"

    def of_another_shape(params: list[nn.Parameter], state: Any) -> str:
        params[1].data = torch.ones(5, 2)
        state[params[1]]["sum"] = torch.zeros(5, 2)
        return "shape"

    def of_another_format(params: list[nn.Parameter], state: Any) -> str:
        state[params[1]]["sum"] = torch.zeros(4, 2, dtype=torch.float64)
        return "dtype float64"

    def no_count(params: list[nn.Parameter], state: Any) -> str:
        state[params[1]]["step"] = torch.zeros(2)
        return "must be a tensor of one number"

    for spoil in (shared, of_another_shape, of_another_format, no_count):
        params = plain_list(is_sparse)
        optimizer = Adagrad(params, lr=0.5)
        message = spoil(params, optimizer.state)
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.step()
        assert not as_if_on_cuda
        assert all((p == 1).all() for p in params)


def test_lists_of_two_formats_are_one_call(as_if_on_cuda: list[Any]) -> None:
    params = plain_list(is_sparse=False)
    params[1] = nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
    params[1].grad = torch.ones(4, 2, dtype=torch.float64)
    Adagrad(params, lr=0.5, eps=0.0).step()
    assert [dense for dense, *_ in as_if_on_cuda] == [3]
    assert all((p == 0.5).all() for p in params)


@pytest.mark.parametrize("kind", ["negated", "conjugated", "every other id"])
def test_copies_that_only_the_kernels_know_live_until_the_launch(
    kind: str, as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the gradient of a view, and of ids that are a column: the fixture looks after the memory."""
    monkeypatch.setattr(general_path, "fits_cuda", lambda update: True)
    if kind == "every other id":
        ids = torch.tensor([[1, 9], [3, 9], [2, 9]])[:, 0]
        weights = [torch.ones(4, 2) for _ in range(2)]
        grads = [RowSparse(torch.ones(3, 2), ids, (4, 2)) for _ in weights]
        AdaGrad(0.5, epsilon=0.0).update([0, 1], weights, grads, [torch.zeros(4, 2) for _ in weights])
        assert all(w.tolist() == [[1, 1]] + [[0.5, 0.5]] * 3 for w in weights)
        assert len(as_if_on_cuda) == 1
        return
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64 if kind == "conjugated" else torch.float32))
    p.grad = torch.full_like(p, 1j).conj() if kind == "conjugated" else torch._neg_view(torch.ones(3))
    Adagrad([p], lr=0.5, eps=0.0).step()
    assert len(as_if_on_cuda) == 1
    # Real and imaginary parts have histories of their own.
    moved = torch.view_as_real(p.detach())[:, 1] if kind == "conjugated" else p.detach() - 1
    assert moved.tolist() == [0.5] * 3


def test_counts_of_parameters_made_in_inference_mode_advance_on_a_device(
    as_if_on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general_path, "fits_cuda", lambda update: True)
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(4, 2), requires_grad=False)
        optimizer = Adagrad([p], lr=0.5, fused=True)
        p.grad = sparse_grad(1)
        assert optimizer.state[p]["step"].is_inference()
    optimizer.step()
    assert len(as_if_on_cuda) == 1
    assert optimizer.state[p]["step"].item() == 1
    assert p.tolist() == [[1, 1], [0.5, 0.5], [1, 1], [1, 1]]


@pytest.mark.parametrize("fused", [None, True])
def test_counts_on_the_device_advance_together(fused: bool | None) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(50)]
    optimizer = Adagrad(params, fused=fused)
    found_inf = torch.zeros(1)
    for p in params:
        p.grad = torch.ones(3)
    for p in params[::2]:
        optimizer.state[p]["step"] = optimizer.state[p]["step"].long()  # as loaded from a file that had them so
    states = [optimizer.state[p] for p in params]
    part = torch_step.Part(optimizer.param_groups[0], states, 0, {}, of_parameter, differentiable=False)
    with Operators() as seen:
        part.advance(found_inf.reshape(()), [])
    assert max(seen.counts.values()) < 10
    assert [optimizer.state[p]["step"].item() for p in params] == [1.0] * 50
    part.advance(torch.ones(()), [])
    assert [optimizer.state[p]["step"].item() for p in params] == [1.0] * 50


def test_counts_that_no_kernel_could_skip_advance() -> None:
    """Of weights elsewhere than the row ids that a device checks; here "meta" stands for it."""
    assert torch_step._went(torch.device("cpu"), None, [torch.zeros(1, device="meta")]) == 1


def test_a_list_is_left_whole_if_its_row_sparse_part_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dense part alone would be a step of some weights."""
    weights = [torch.ones(3, 2) for _ in range(3)]
    grads = [torch.ones(3, 2), torch.ones(3, 2).to_sparse(1), torch.ones(3, 2)]
    monkeypatch.setattr(device_lists, "_inspect_dense", lambda batch: batch if len(batch.grads) == 2 else None)
    for rows in (None, object()):
        monkeypatch.setattr(device_lists, "_inspect_rows", lambda batch, rows=rows: rows)
        found = device_lists._inspect(Batch(Rule(), weights, grads, weights, [], [0.1], [0.0]))
        assert (found is None) == (rows is None)


def test_learning_rates_are_divided_once_wherever_counts_are() -> None:
    for lr, decay in ((0.3, 0.5), (0.1, 0.01), (0.01, 0.001)):
        for counts in ([*range(300)], [torch.tensor(float(n), dtype=torch.float64) for n in range(300)]):
            rates = torch_step._decayed(lr, decay, counts)
            assert [float(rate) for rate in rates] == [lr / (1 + n * decay) for n in range(300)]
        with FakeTensorMode(allow_non_fake_inputs=True):  # as if there were two devices
            counts = [torch.empty((), device=f"cuda:{k}", dtype=torch.float64) for k in (0, 1, 0)]
            for given in (lr, torch.tensor(lr, device="cpu")):
                rates = torch_step._decayed(given, decay, counts)
                assert [rate.device.index for rate in rates] == [0, 1, 0]
        for number in (torch.tensor(lr), torch.tensor(lr, dtype=torch.float64)):  # a tensor, and counts on the host
            rates = torch_step._decayed(number, decay, [float(n) for n in range(300)])
            assert [float(rate) for rate in rates] == [float(number) / (1 + n * decay) for n in range(300)]
        mixed = torch_step._decayed(torch.tensor(lr, dtype=torch.float64), decay, [3.0, torch.tensor(4.0).double()])
        assert [float(rate) for rate in mixed] == [lr / (1 + n * decay) for n in (3, 4)]


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_bits_of_the_cpu(name: str, fused: bool | None) -> None:
    gpu = train(parameters("cuda"), fused=fused, **OPTIONS[name])
    assert_same_training(gpu, train(parameters(), **OPTIONS[name]))
    assert gpu.state[gpu.param_groups[0]["params"][0]]["step"].is_cuda == bool(fused)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", kinds_of_lists())
def test_the_bits_of_the_cpu_in_lists_of_both_kinds(kind: str, variant: str) -> None:
    for a, b in zip(contents(*train_list(kind, variant, "cuda")), contents(*train_list(kind, variant)), strict=True):
        assert_same_bits(a.cpu(), b)


@pytest.mark.gpu
@needs_gpu
def test_mixed_devices_and_layouts() -> None:
    def make(device: str) -> list[nn.Parameter]:
        torch.manual_seed(0)
        image = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        weights = [image, torch.randn(6, 4)[:, ::2], torch.randn(3)]
        return [nn.Parameter(w.to(d)) for w, d in zip(weights, (device, device, "cpu"), strict=True)]

    def run(device: str) -> list[nn.Parameter]:
        params = make(device)
        optimizer = Adagrad(params, weight_decay=0.1)
        for step in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.device)
            optimizer.step()
        return params

    for p, q in zip(run("cuda"), run("cpu"), strict=True):
        assert_same_bits(p.detach().cpu().contiguous(), q.detach().contiguous())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("lr_decay", [0.0, 0.5])
@pytest.mark.parametrize("fused", [None, True])
def test_nothing_waits_for_the_device(fused: bool | None, lr_decay: float) -> None:
    params = parameters("cuda")
    lr = torch.tensor(0.1, device="cuda")
    optimizer, other = Adagrad(params, lr=lr, fused=fused, lr_decay=lr_decay), Adagrad(parameters(), lr_decay=lr_decay)
    other.param_groups[0]["lr"] = float(lr)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale(lr)  # makes its tensors
    for step, bad in enumerate((0.0, 1.0, 0.0)):
        set_grads(params, step)
        if not bad:
            for p, q in zip(params, other.param_groups[0]["params"], strict=True):
                q.grad = p.grad.cpu()
            other.step()
        for p in params:
            p.grad = p.grad * 4
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device="cuda"), torch.tensor(bad, device="cuda")
        try:
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step compiles
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0] * 4
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@needs_gpu
def test_a_refused_step_changes_nothing_on_a_gpu() -> None:
    params = parameters("cuda")
    optimizer = train(params)
    set_grads(params, 9)
    before = copy.deepcopy([p.detach() for p in params])
    optimizer.state[params[1]]["sum"] = torch.zeros(7, dtype=torch.float64)
    with pytest.raises(ValueError, match="device cpu: must be cuda"):
        optimizer.step()
    for p, was in zip(params, before, strict=True):
        assert_same_bits(p.detach().cpu(), was.cpu())
