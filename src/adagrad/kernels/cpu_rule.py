"""The rule for a block of elements, as every CPU kernel computes it; :mod:`adagrad.rule` is its statement.

Numba adds no fused multiply-add and reorders nothing, so these lines are rounded one operation at a time. ``rescale``,
``clip``, ``inside`` and ``outside`` are :attr:`adagrad.rule.Rule.scalars`. ``decay`` and ``shrink`` are ``wd`` where it
is coupled and where it is decoupled; the other of the two is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from adagrad.kernels.blocks import clamp, root
from adagrad.kernels.numba_jit import jit
from adagrad.rule import Rule


def hyper(lrs: Sequence[float], wds: Sequence[float], rule: Rule) -> np.ndarray:
    """lr, coupled wd and decoupled wd of each weight, float64, or one row for all."""
    if len(lrs) == 1 and len(wds) == 1 and lrs[0] != 0:  # 0 and -0 would share an entry
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
    """Everything that is the same for all elements of a weight, rounded once to the token's dtype."""
    one = token.dtype.type
    rescale, clip, inside, outside = one(scalars[0]), one(scalars[1]), one(scalars[2]), one(scalars[3])
    return rescale, clip, inside, outside, one(rates[0]), one(rates[1]), one(rates[2])


@jit(helper=True)
def effective_gradient(grad: Any, weight: Any, decay: Any, rescale: Any, clip: Any) -> Any:
    grad = clamp(grad * rescale, clip)
    return grad + decay * weight if decay != 0 else grad


@jit(helper=True)
def descend(weight: Any, grad: Any, history: Any, lr: Any, shrink: Any, inside: Any, outside: Any) -> Any:
    """The new weight; ``history`` is a block, or one number for all."""
    step = grad / (root(history + inside) + outside)
    step = step + shrink * weight if shrink != 0 else step
    return weight - lr * step
