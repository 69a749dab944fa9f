"""How compiled code reads tensors: the layout of this PyTorch is found, or not used; classes that are only memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adagrad.kernels.inspection import layout, tensor_layout
from processes import run
from support import assert_same_bits, set_layout
from torch_cases import Case
from torch_versions import reads_sparse, since


@pytest.mark.parametrize("row_wise", [False, True])
def test_the_general_path_gives_the_same_bits(row_wise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensors cannot be read by compiled code, each goes through the checks in Python."""

    def train() -> list[Tensor]:
        case = Case(row_wise=row_wise, lr_decay=0.1)
        case.params.append(nn.Parameter(torch.randn(4, 3).bfloat16()))
        case.optimizer.add_param_group({"params": case.params[3], "multi_precision": True})
        case.params[3].grad = torch.randn(4, 3).bfloat16()
        for _ in range(2):
            case.optimizer.step()
        return case.everything()

    usual = train()
    set_layout(monkeypatch, None)
    for a, b in zip(usual, train(), strict=True):
        assert_same_bits(a, b)


def test_no_object_is_read_if_the_environment_says_so() -> None:
    code = """
        import numpy as np, torch
        from adagrad import AdaGrad
        from adagrad.kernels.inspection.layout import current_layout
        from adagrad.torch import Adagrad
        weight, p = np.ones(2, np.float32), torch.nn.Parameter(torch.ones(2))
        AdaGrad(0.5, epsilon=0.0).update(0, weight, np.ones(2, np.float32), np.zeros(2, np.float32))
        p.grad = torch.ones(2)
        Adagrad([p], lr=0.5, eps=0.0).step()
        print(weight.tolist(), p.tolist(), current_layout() is None)
    """
    for variable in (None, "1"):
        assert run(code, ADAGRAD_NO_INSPECTION=variable) == f"[0.5, 0.5] [0.5, 0.5] {variable is not None}"


@reads_sparse
def test_the_layout_of_this_pytorch_is_found() -> None:
    """If this fails after an upgrade, steps over many small tensors are slow, not wrong."""
    how = layout.current_layout()
    assert how is not None
    assert how[layout.TENSOR] == id(torch.Tensor)
    assert how[layout.SPARSE], "nor are sparse gradients known"


OFFSET = tensor_layout._offset


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEARCHED", 64),
        ("_offset", lambda places, unit=None: OFFSET(places, unit) + 2 if unit else OFFSET(places)),  # the dtype's
        ("_library", lambda: object()),
        ("_keys_of", lambda tensor: 12345),
    ],
)
def test_a_layout_that_does_not_fit_is_not_used(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_layout, name, value)
    how = layout._layout.__wrapped__(True, False, False)
    assert how is not None, "NumPy's arrays are still known"
    assert how[layout.ARRAY] == id(np.ndarray)
    assert how[layout.TENSOR] == 0


@pytest.mark.parametrize(
    ("name", "value"), [("SEARCHED_IN_SPARSE", 64), ("_sparse", lambda k: torch.ones(k + 1, 2).to_sparse_csr())]
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_sparse_tensors_that_do_not_fit_are_not_looked_into(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Case()
    usual.optimizer.step()
    monkeypatch.setattr(tensor_layout, name, value)
    how = layout._layout.__wrapped__(True, False, False)
    assert how is not None
    assert how[layout.TENSOR] == id(torch.Tensor), "other tensors are still known"
    assert how[layout.SPARSE] == 0
    set_layout(monkeypatch, how)
    case = Case()
    case.optimizer.step()
    for a, b in zip(usual.everything(), case.everything(), strict=True):
        assert_same_bits(a, b)


MODES = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from adagrad.kernels.inspection import layout
from adagrad.torch import Adagrad

def train():
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = Adagrad([p])
    p.grad = torch.ones(4, 3)
    optimizer.step()

def meta():
    with torch.device("meta"):
        train()

def fake():
    with FakeTensorMode():
        train()

def functional():
    torch.func.grad(lambda x: (layout.current_layout(), x.sum())[1])(torch.ones(3))

{"meta": meta, "fake": fake, "functional": functional}[sys.argv[1]]()
found = layout.current_layout()
sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (4, 3))
assert layout.describe_once(torch.ones(3), found) is not None
assert found[layout.SPARSE] == torch._C._dispatch_keys(sparse).raw_repr()
"""


@reads_sparse
@pytest.mark.parametrize(
    "mode", [pytest.param("meta", marks=since("2.8", "import of its compiler in this mode")), "fake", "functional"]
)
def test_a_first_use_within_a_mode_does_not_make_later_ones_slow(mode: str) -> None:
    done = subprocess.run([sys.executable, "-c", MODES, mode], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def own_layout(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A copy of the layout, with room for all classes."""
    found = layout.current_layout()
    assert found is not None
    found = found.copy()
    found[layout.ACCEPTED : layout.ACCEPTED + layout.MOST_ACCEPTED] = 0
    monkeypatch.setattr(layout, "current_layout", lambda: found)
    monkeypatch.setattr(layout, "_accepted", [])
    return found


def test_classes_that_are_only_memory_keep_their_places(own_layout: np.ndarray) -> None:
    kinds = [type(f"Kind{i}", (torch.Tensor,), {}) for i in range(layout.MOST_ACCEPTED + 2)]
    for kind in (torch.Tensor, torch.nn.Parameter, kinds[0], *kinds, *kinds[::-1]):
        layout.accept(kind)
    accepted = own_layout[layout.ACCEPTED : layout.ACCEPTED + layout.MOST_ACCEPTED]
    assert accepted.tolist() == [id(kind) for kind in kinds[: layout.MOST_ACCEPTED]]


def test_classes_that_were_accepted_stay_alive(own_layout: np.ndarray) -> None:
    """A new class at the address of one that is gone would be taken for it."""
    kind = type("Kind", (torch.Tensor,), {})
    gone = weakref.ref(kind)
    layout.accept(kind)
    del kind
    gc.collect()
    assert gone() is not None


def test_no_class_is_accepted_where_tensors_are_unknown(own_layout: np.ndarray) -> None:
    own_layout[layout.TENSOR] = 0
    layout.accept(torch.Tensor)
    assert own_layout[layout.ACCEPTED] == 0
