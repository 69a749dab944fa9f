"""The rule for one element, as every CPU kernel computes it; :mod:`adagrad.rule` is its statement.

Numba adds no fused multiply-add and reorders nothing, so these lines are rounded one operation at a time. ``scalars``
are, in the computing dtype: rescale_grad, clip_gradient (infinity for none: then no comparison holds),
epsilon under the root, epsilon beside it (one of the two is 0, and adding 0 to a number >= 0 changes no bit).
``decay`` and ``shrink`` are ``wd`` where it is coupled and where it is decoupled; the other of the two is 0.
"""

from __future__ import annotations

import math
from typing import Any

from adagrad.kernels.numba_jit import jit
from adagrad.rule import Rule

SCALARS = 4


def scalars(rule: Rule) -> tuple[float, float, float, float]:
    """The rule's scalars in the order that the kernels know."""
    clip = math.inf if rule.clip_gradient is None else rule.clip_gradient
    inside, outside = (rule.epsilon, 0.0) if rule.epsilon_inside else (0.0, rule.epsilon)
    return rule.rescale_grad, clip, inside, outside


@jit(helper=True)
def effective_gradient(grad: Any, weight: Any, decay: Any, rescale: Any, clip: Any) -> Any:
    grad = grad * rescale
    grad = clip if grad > clip else grad
    grad = -clip if grad < -clip else grad
    return grad + decay * weight if decay != 0 else grad


@jit(helper=True)
def descend(weight: Any, grad: Any, history: Any, lr: Any, shrink: Any, inside: Any, outside: Any) -> Any:
    step = grad / (math.sqrt(history + inside) + outside)
    step = step + shrink * weight if shrink != 0 else step
    return weight - lr * step
