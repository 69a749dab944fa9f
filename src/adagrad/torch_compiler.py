"""How a step of :class:`adagrad.torch.Adagrad` keeps torch.compile out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling


def apart_from_compiler(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func``, never traced by torch.compile: to keep that out takes 3 us, here only where it listens to a thread."""
    kept_out = torch._disable_dynamo(func)  # type: ignore[attr-defined]

    @functools.wraps(func)
    def call(self: Any) -> Any:
        return (kept_out if is_dynamo_compiling() or _compiler() is not None else func)(self)

    return call


def what_tells_the_compiler() -> Callable[[], Any]:
    """A function that returns what listens to this thread, or None.

    Where PyTorch does not tell, something may. In 2.6 and 2.7 it must not be asked: each answer takes a reference away
    from what it returns, and up to Python 3.11 the references to None run out, after 100,000 steps or so.
    """
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    ask = getattr(eval_frame, "get_eval_frame_callback", None) if version >= (2, 8) else None
    return ask or (lambda: False)


_compiler = what_tells_the_compiler()
