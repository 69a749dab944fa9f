"""How helpers are compiled."""

from __future__ import annotations

from typing import Any

import numba
import pytest
from numba.core.codegen import JITCPUCodegen

from adagrad.kernels.runtime import numba_jit


@pytest.mark.parametrize("inline", [False, True])
def test_a_helper_has_no_machine_code_and_one_version_for_all_constants(
    inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either would be compile time for nothing; results would be the same, so nothing else would tell."""
    generated, add_module = [], JITCPUCodegen._add_module

    def noted(codegen: Any, module: Any) -> Any:
        generated.append(module.name.split(".")[-1])
        return add_module(codegen, module)

    @numba_jit.jit(helper=True, inline=inline)
    def small(a: Any, b: Any) -> Any:
        return a + b

    @numba.njit  # type: ignore[untyped-decorator]
    def large(a: Any) -> Any:
        return small(small(a, 1), b=2)

    monkeypatch.setattr(JITCPUCodegen, "_add_module", noted)
    assert large(3) == 6
    assert "large" in " ".join(generated)
    assert "small" not in " ".join(generated)
    assert len(small.overloads) == 1  # type: ignore[attr-defined]
