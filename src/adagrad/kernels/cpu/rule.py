"""The rule for a block of elements, as every CPU kernel computes it; :mod:`adagrad.rule` states it.

Numba adds no fused multiply-add and reorders nothing, so each operation below is rounded on its own. ``rescale``,
``clip``, ``eps_inside`` and ``eps_outside`` are :attr:`adagrad.rule.Rule.scalars`. ``wd``, which is coupled, or
``decoupled_wd`` is 0.

A term without effect, such as clipping at infinity, takes as many instructions as any other; one that is None is left
out. Loops are therefore compiled for :func:`plain_terms`, too, and some for :func:`common_terms`: a quarter fewer
instructions save up to a quarter of the time where the data is in a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from adagrad.kernels.cpu.blocks import clamp, sqrt
from adagrad.kernels.runtime.numba_jit import jit
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
def has_rare_terms(fixed: Any) -> Any:
    """Whether there is clipping, an epsilon inside the root or decoupled weight decay; ``fixed`` are the constants.

    They are rounded already: a bound that rounds to infinity, or a decay to 0, has no effect.
    """
    _, clip, eps_inside, _, _, _, decoupled_wd = fixed
    return clip != np.inf or eps_inside != 0 or decoupled_wd != 0


@jit(helper=True)
def has_decay(fixed: Any) -> Any:
    """Whether there is coupled weight decay."""
    _, _, _, _, _, wd, _ = fixed
    return wd != 0


@jit(helper=True)
def common_terms(fixed: Any) -> Any:
    """The constants of a rule without rare terms, which are None."""
    rescale, _, _, eps_outside, lr, wd, _ = fixed
    return rescale, None, None, eps_outside, lr, wd, None


@jit(helper=True)
def plain_terms(fixed: Any) -> Any:
    """The constants of a rule with neither rare terms nor weight decay, which are None."""
    rescale, _, _, eps_outside, lr, _, _ = fixed
    return rescale, None, None, eps_outside, lr, None, None


@jit(helper=True)
def effective_gradient(grad: Any, weight: Any, wd: Any, rescale: Any, clip: Any) -> Any:
    """The gradient that enters the history."""
    grad = grad * rescale
    if clip is not None:
        grad = clamp(grad, clip)
    if wd is None:
        return grad
    return grad + wd * weight if wd != 0 else grad


@jit(helper=True)
def new_weight(
    weight: Any, grad: Any, history: Any, lr: Any, decoupled_wd: Any, eps_inside: Any, eps_outside: Any
) -> Any:
    """The new weight; ``history`` is a block, or one number for all."""
    if eps_inside is not None:
        history = history + eps_inside
    step = grad / (sqrt(history) + eps_outside)
    if decoupled_wd is None:
        return weight - lr * step
    step = step + decoupled_wd * weight if decoupled_wd != 0 else step
    return weight - lr * step
