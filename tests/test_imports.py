"""What is imported when, and the public names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adagrad
from processes import run


def test_importing_imports_no_framework_and_no_compiler() -> None:
    code = """
        import sys
        import adagrad
        from adagrad import *
        print(sorted({"torch", "triton", "jax", "numba", "llvmlite", "safetensors", "ml_dtypes"} & set(sys.modules)))
        import numpy as np
        weight = np.ones(3)
        optimizer = AdaGrad(use_fused_step=False)
        optimizer.update(0, weight, weight.copy(), optimizer.create_state(0, weight))
        print(sorted({"torch", "triton", "jax", "numba"} & set(sys.modules)))
        optimizer.use_fused_step = True
        rows = RowSparse(np.ones(1), np.array([2]), (3,))
        optimizer.update([0, 1], [weight, weight.copy()], [weight.copy(), rows], [weight.copy(), weight.copy()])
        print(sorted({"torch", "triton", "jax"} & set(sys.modules)))
    """
    assert run(code).split() == ["[]", "[]", "[]"]


@pytest.mark.parametrize("name", ["torch", "convert"])
def test_modules_are_imported_at_first_use(name: str) -> None:
    code = f"""
        import sys
        import adagrad
        before = "torch" in sys.modules, "adagrad.{name}" in sys.modules, "{name}" in dir(adagrad)
        print(before, adagrad.{name}.__name__)
        """
    if name == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[test]'")
    assert run(code) == f"(False, False, True) adagrad.{name}"


@pytest.mark.parametrize(
    "name", ["AdaGrad", "GroupAdaGrad", "Optimizer", "Updater", "create", "get_updater", "register"]
)
def test_the_optimizer_module_has_the_names_of_mxnets(name: str) -> None:
    assert run(f"from adagrad import optimizer as opt; import adagrad; print(opt.{name} is adagrad.{name})") == "True"
    assert run(f"import adagrad; from adagrad.optimizer import {name}; print({name} is adagrad.{name})") == "True"
    assert not hasattr(adagrad.optimizer, "SGD")


def test_the_module_for_pytorch_is_none_without_it() -> None:
    code = """
        import sys, inspect
        sys.modules["torch"] = None
        import adagrad
        assert not hasattr(adagrad, "torch") and len(inspect.getmembers(adagrad)) > 10
        try:
            adagrad.torch
        except AttributeError as error:
            print(error)
    """
    assert run(code) == "adagrad.torch: PyTorch is not installed: pip install 'adagrad[torch]'"


@pytest.mark.parametrize("fused", [True, False])
def test_while_another_thread_imports_torch_and_ml_dtypes(fused: bool) -> None:
    code = f"""
        import sys, types
        for name in ("torch", "ml_dtypes"):
            sys.modules[name] = types.ModuleType(name)
        import numpy as np
        from adagrad import AdaGrad
        optimizer, weight = AdaGrad(0.5, epsilon=0.0, use_fused_step={fused}), np.ones(3, np.float32)
        optimizer.update(0, weight, weight.copy(), optimizer.create_state(0, weight))
        print(weight.tolist())
        """
    assert run(code) == "[0.5, 0.5, 0.5]"


def test_folders_of_kernels_import_one_way() -> None:
    """As CONTRIBUTING.md says."""
    may_import: dict[str, set[str]] = {
        "runtime": set(), "tensors": set(), "cpu": {"runtime"}, "inspection": {"runtime", "tensors", "cpu"},
        "cuda": {"inspection"},
    }  # fmt: skip
    for folder, others in may_import.items():
        for source in (Path(adagrad.__file__).parent / "kernels" / folder).glob("*.py"):
            found = set(re.findall(rf"from adagrad\.kernels\.({'|'.join(may_import)})\b", source.read_text()))
            assert found <= {folder, *others}, source


def test_the_public_names() -> None:
    for name in adagrad.__all__:
        assert hasattr(adagrad, name)
    assert set(adagrad.__all__) >= {
        "AdaGrad", "GroupAdaGrad", "Optimizer", "register", "create", "Updater", "get_updater", "RowSparse",
        "lr_scheduler",
    }  # fmt: skip


def test_without_numbas_compiler() -> None:
    """As debuggers and coverage of Numba's users have it: the array expressions still work."""
    code = """
        import numpy as np
        from adagrad import AdaGrad
        weight, history = np.ones(2), np.zeros(2)
        for _ in range(2):
            try:
                AdaGrad(0.5).update(0, weight, np.ones(2), history)
            except RuntimeError as error:
                assert "NUMBA_DISABLE_JIT is set: the kernels must be compiled" in str(error), error
                assert weight.tolist() == [1, 1]
            else:
                raise AssertionError
        AdaGrad(0.5, use_fused_step=False).update(0, weight, np.ones(2), history)
        print(weight.round(3).tolist())
    """
    assert run(code, NUMBA_DISABLE_JIT="1") == "[0.5, 0.5]"
