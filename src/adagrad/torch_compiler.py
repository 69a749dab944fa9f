"""How a step of :class:`adagrad.torch.Adagrad` keeps torch.compile out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling


def apart_from_compiler(func: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing ``func``; this takes 3 us, here only if the compiler is active in the thread."""
    kept_out = torch._disable_dynamo(func)  # type: ignore[attr-defined]

    @functools.wraps(func)
    def call(self: Any) -> Any:
        return (kept_out if is_dynamo_compiling() or _compiler_callback() is not None else func)(self)

    return call


def find_compiler_callback() -> Callable[[], Any]:
    """Return a function that returns the compiler's callback of the current thread, or None.

    If PyTorch does not provide it, a callback is assumed. PyTorch 2.6 and 2.7 must not be asked: each call drops a
    reference to the returned object, and up to Python 3.11 those to None run out after about 100,000 steps.
    """
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    ask = getattr(eval_frame, "get_eval_frame_callback", None) if version >= (2, 8) else None
    return ask or (lambda: False)


_compiler_callback = find_compiler_callback()
