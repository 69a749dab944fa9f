"""The examples in the documentation are what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import adagrad

MODULES = ["adagrad", *sorted(module.name for module in pkgutil.walk_packages(adagrad.__path__, "adagrad."))]
PUBLIC = ("adagrad.adagrad", "adagrad.group_adagrad", "adagrad.row_sparse", "adagrad.torch", "adagrad.updater",
          "adagrad.convert.arrays", "adagrad.convert.fbgemm", "adagrad.convert.keras", "adagrad.convert.optax",
          "adagrad.convert.torch")  # fmt: skip
"""Modules that people are to learn from by example."""

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not name.startswith("adagrad.kernels.cuda"):
            raise
        pytest.skip(reason=f"needs Triton: {error}")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = load(name)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert tests or name not in PUBLIC
    assert doctest.testmod(module).failed == 0


def test_the_readme_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numpy_code, torch_code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(numpy_code, names)
    assert (names["table"][42] != 0).all()  # type: ignore[index]
    assert names["updater"].states[0].any(axis=1).nonzero()[0].tolist() == [7, 42]  # type: ignore[attr-defined]
    assert (tmp_path / "states.safetensors").exists()
    names = {"model": torch.nn.Embedding(3, 2, sparse=True)}
    exec(torch_code, names)
    assert isinstance(names["optimizer"], torch.optim.Optimizer)


def test_the_page_for_pytorch_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pytorch.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    seen = []
    for code in blocks:
        exec(code, names)
        seen.append({tuple(state["sum"].shape) for state in names["optimizer"].state.values()})
    assert {(1000, 16), (5000, 16)} <= seen[0]
    assert {(1000, 1), (5000, 1), (1, 32)} <= seen[1], "row-wise, but for the head"
    assert all("master" in state for state in names["optimizer"].state.values())


@pytest.mark.parametrize("name", [name for name in adagrad.__all__ if name != "lr_scheduler"])
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(adagrad, name)
    assert thing.__doc__
    if isinstance(thing, type):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and callable(value):
                assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert load(name).__doc__


def test_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", adagrad.__version__)
    with pytest.raises(AttributeError, match="module 'adagrad' has no attribute 'versoin'"):
        adagrad.versoin  # type: ignore[attr-defined]  # noqa: B018
