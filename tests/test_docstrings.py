"""The examples in the documentation are what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import adagrad

MODULES = ["adagrad.adagrad", "adagrad.group_adagrad", "adagrad.optimizer", "adagrad.row_sparse", "adagrad.rule",
           "adagrad.updater", "adagrad.lr_scheduler"]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_there_are_examples() -> None:
    found = [
        test
        for name in MODULES
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
        if test.examples
    ]
    assert len(found) >= 3


@pytest.mark.parametrize("name", [name for name in adagrad.__all__ if name != "lr_scheduler"])
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(adagrad, name)
    assert thing.__doc__
    if isinstance(thing, type):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and callable(value):
                assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


def test_every_module_says_what_it_is() -> None:
    for module in pkgutil.iter_modules(adagrad.__path__):
        path = next(iter(adagrad.__path__)) + f"/{module.name}"
        source = path + ("/__init__.py" if module.ispkg else ".py")
        with open(source) as file:
            assert file.read(3) == '"""', source
