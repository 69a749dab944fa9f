"""The rule for a block of elements, as every CPU kernel computes it; :mod:`adagrad.rule` is its statement.

Numba adds no fused multiply-add and reorders nothing, so these lines are rounded one operation at a time. ``clip`` is
infinity where nothing is clipped: then no comparison holds. ``inside`` and ``outside`` are epsilon under the root and
beside it: one of the two is 0, and adding 0 to a number >= 0 changes no bit. ``decay`` and ``shrink`` are ``wd`` where
it is coupled and where it is decoupled; the other of the two is 0.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from adagrad.kernels.blocks import clamp, root
from adagrad.kernels.numba_jit import jit
from adagrad.rule import Rule


@functools.lru_cache(maxsize=64)
def scalars(rule: Rule) -> np.ndarray:
    """The rule's scalars in the order that the kernels know."""
    clip = math.inf if rule.clip_gradient is None else rule.clip_gradient
    inside, outside = (rule.epsilon, 0.0) if rule.epsilon_inside else (0.0, rule.epsilon)
    return np.array([rule.rescale_grad, clip, inside, outside])


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
