"""The rule for a block of elements, as every CPU kernel computes it; :mod:`adagrad.rule` states it.

Numba adds no fused multiply-add and reorders nothing, so each operation below is rounded on its own. ``rescale``,
``clip``, ``eps_inside`` and ``eps_outside`` are :attr:`adagrad.rule.Rule.scalars`. ``wd``, which is coupled, or
``decoupled_wd`` is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from adagrad.kernels.blocks import clamp, sqrt
from adagrad.kernels.numba_jit import jit
from adagrad.rule import Rule


def rate_table(lrs: Sequence[float], wds: Sequence[float], rule: Rule) -> np.ndarray:
    """Rows of lr, coupled wd and decoupled wd, float64: one for each weight, or one for all."""
    if len(lrs) == 1 and len(wds) == 1 and lrs[0] != 0:  # 0 and -0 would share a cache entry
        return _one(lrs[0], wds[0], rule.decoupled_decay)
    table = np.zeros((max(len(lrs), len(wds)), 3))
    table[:, 0] = lrs
    table[:, 2 if rule.decoupled_decay else 1] = wds
    return table


@functools.lru_cache(maxsize=64)
def _one(lr: float, wd: float, decoupled: bool) -> np.ndarray:
    return np.array([[lr, 0.0, wd] if decoupled else [lr, wd, 0.0]])


@jit(helper=True)
def constants(scalars: Any, rates: Any, token: Any) -> Any:
    """What is the same for all elements of a weight, each rounded once to the token's dtype.

    rescale, clip, eps_inside, eps_outside, lr, wd and decoupled_wd.
    """
    one = token.dtype.type
    rescale, clip, eps_inside, eps_outside = one(scalars[0]), one(scalars[1]), one(scalars[2]), one(scalars[3])
    return rescale, clip, eps_inside, eps_outside, one(rates[0]), one(rates[1]), one(rates[2])


@jit(helper=True)
def effective_gradient(grad: Any, weight: Any, wd: Any, rescale: Any, clip: Any) -> Any:
    """The gradient that enters the history."""
    grad = clamp(grad * rescale, clip)
    return grad + wd * weight if wd != 0 else grad


@jit(helper=True)
def new_weight(
    weight: Any, grad: Any, history: Any, lr: Any, decoupled_wd: Any, eps_inside: Any, eps_outside: Any
) -> Any:
    """The new weight; ``history`` is a block, or one number for all."""
    step = grad / (sqrt(history + eps_inside) + eps_outside)
    step = step + decoupled_wd * weight if decoupled_wd != 0 else step
    return weight - lr * step
