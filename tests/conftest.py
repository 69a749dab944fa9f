"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import hypothesis
import pytest

# Their assertions show values, too, when they fail.
pytest.register_assert_rewrite(
    "bad_updates", "mxnet_files", "oracle", "processes", "support", "torch_oracle", "training"
)

with suppress(ImportError):  # the oldest versions are tested without it
    import torch

    if not torch.cuda.is_available() and not int(os.environ.get("ADAGRAD_TEST_PTX") or 0):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

# Kernels compile at their first call, so a deadline would measure the compiler.
_common = {"deadline": None, "max_examples": 100, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", **_common)
hypothesis.settings.register_profile("ci", **_common, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", **(_common | {"max_examples": 2000}))
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


@pytest.fixture
def always_parallel() -> Iterator[None]:
    """Every launch goes to the parallel kernels, whatever its size."""
    import support

    with support.always_parallel():
        yield


@pytest.fixture(scope="module")
def mxnet() -> Iterator[None]:
    """Classes of MXNet's names, as if it were installed."""
    import mxnet_files

    with mxnet_files.importable():
        yield


@pytest.fixture
def registry() -> Iterator[dict[str, type]]:
    """The registry of optimizers, put back afterwards."""
    from adagrad import Optimizer

    before = dict(Optimizer.opt_registry)
    yield Optimizer.opt_registry
    Optimizer.opt_registry.clear()
    Optimizer.opt_registry.update(before)
