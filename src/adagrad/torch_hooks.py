"""When a step of :class:`adagrad.torch.Adagrad` needs PyTorch's wrapper, which calls hooks and records the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.autograd import _profiler_enabled, profiler  # type: ignore[attr-defined]
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def wrapped_where_needed(func: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `step` in hooks and a profiler record, as PyTorch does once per class.

    Here the wrapper is used only with hooks, a profiler or a closure, which may add a hook. PyTorch always makes the
    record, which takes longer than the whole update of a small parameter; an observer without the profiler, such as an
    ``ExecutionTraceObserver`` alone, finds no record here.
    """
    observed = Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or args or kwargs or _has_step_hooks(self):
            return observed(self, *args, **kwargs)
        # A profiler of this thread, or any profiler that was started.
        if _profiler_enabled() or profiler._is_profiler_enabled:
            return observed(self)
        return func(self)

    return step


def _has_step_hooks(optimizer: Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)
