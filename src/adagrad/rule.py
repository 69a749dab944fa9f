"""The AdaGrad rule as whole-array expressions: the definition of the maths, and the reference for the kernels.

The rule (Duchi, Hazan, Singer, JMLR 12, 2011, section 1.3 and figure 1, diagonal case)::

    grad    = clip(grad * rescale_grad, -clip_gradient, clip_gradient) + wd * weight
    history = history + grad * grad
    weight  = weight - lr * (grad / (sqrt(history) + epsilon))

Each operation is rounded to the computing dtype (float64 for float64 weights, else float32), in exactly this order.
Scalars are computed in double precision and rounded once. ``clip`` is skipped if ``clip_gradient`` is None, the ``wd``
term if ``wd`` is 0; a NaN passes through ``clip``.

Two options place the constants as in other frameworks: ``epsilon_inside`` divides by ``sqrt(history + epsilon)``;
``decoupled_decay`` leaves ``wd * weight`` out of the gradient and adds it to the quotient, so that it is multiplied by
``lr`` but not adapted. ``row_wise`` keeps one history value for each row: ``history + mean(grad * grad)``, where column
``j`` of the flattened row is added to lane ``j mod 16``, the lanes are combined by halves, and their sum is divided by
the row's length: a fixed order that vectorises.

The functions take NumPy arrays or torch tensors on any device; temporaries are as large as the arrays.
"""

from __future__ import annotations

import functools
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A NumPy array or a torch tensor."""

LANES = 16
"""Number of partial sums of a row's mean square."""

CHUNK = 128
"""Number of occurrences of a row that are summed sequentially before their sum is added to the row's total."""


@dataclass(frozen=True)
class Rule:
    """The options and scalars of the rule that are common to all weights of a call: all but ``lr`` and ``wd``."""

    rescale_grad: float = 1.0
    clip_gradient: float | None = None
    epsilon: float = 1e-6
    epsilon_inside: bool = False
    decoupled_decay: bool = False
    row_wise: bool = False

    @functools.cached_property
    def bits(self) -> tuple[bytes, bool]:
        """What tells the arithmetic of rules apart: 0.0 and -0.0 compare equal, but act differently."""
        return self.scalars.tobytes(), self.decoupled_decay

    @functools.cached_property
    def scalars(self) -> np.ndarray:
        """The scalars for the kernels: ``rescale_grad``, the clip bound, epsilon inside and outside the root.

        The bound is infinity if nothing is clipped: then no comparison holds. One of the epsilons is 0, and adding 0 to
        a number >= 0 changes no bit.
        """
        bound = math.inf if self.clip_gradient is None else self.clip_gradient
        inside, outside = (self.epsilon, 0.0) if self.epsilon_inside else (0.0, self.epsilon)
        return np.array([self.rescale_grad, bound, inside, outside])


def is_torch(array: object) -> bool:
    """Whether ``array`` is a torch tensor, without importing torch."""
    # Another thread may be importing it.
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(array, tensor)


def update(weight: Array, grad: Array, history: Array, lr: Any, wd: Any, rule: Rule) -> tuple[Array, Array]:
    """Return the new weight and history; all three arrays have the computing dtype and are not modified.

    All have the same shape, except that ``history`` has ``(n, 1, ...)`` if ``rule.row_wise``.
    """
    grad = effective_gradient(grad, weight, wd, rule)
    history = history + (mean_square(grad) if rule.row_wise else grad * grad)
    step = grad / denominator(history, rule)
    decay = _scalar(wd, grad)
    if decay != 0 and rule.decoupled_decay:
        step = step + decay * weight
    return weight - _scalar(lr, grad) * step, history


def effective_gradient(grad: Array, weight: Array, wd: Any, rule: Rule) -> Array:
    """Return the gradient that enters the history: rescaled, clipped and, with coupled decay, plus ``wd * weight``."""
    grad = grad * _scalar(rule.rescale_grad, grad)
    if rule.clip_gradient is not None:
        bound = _scalar(rule.clip_gradient, grad)
        grad = grad.clamp(-bound, bound) if is_torch(grad) else np.clip(grad, -bound, bound)
    decay = _scalar(wd, grad)
    if decay != 0 and not rule.decoupled_decay:
        grad = grad + decay * weight
    return grad


def denominator(history: Array, rule: Rule) -> Array:
    """Return the divisor of the gradient: ``sqrt(history) + epsilon`` or ``sqrt(history + epsilon)``."""
    epsilon = _scalar(rule.epsilon, history)
    return _sqrt(history + epsilon) if rule.epsilon_inside else _sqrt(history) + epsilon


def mean_square(grad: Array) -> Array:
    """Return the mean of ``grad * grad`` over each row, shape ``(n, 1, ...)``, in the order of the module docstring."""
    square = (grad * grad).reshape(grad.shape[0], math.prod(grad.shape[1:]))
    length = square.shape[1]
    lanes = square.new_zeros(len(square), LANES) if is_torch(grad) else np.zeros((len(square), LANES), grad.dtype)
    for start in range(0, length, LANES):
        part = square[:, start : start + LANES]
        lanes[:, : part.shape[1]] = lanes[:, : part.shape[1]] + part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return (lanes / _scalar(max(length, 1), lanes)).reshape(history_shape(grad.shape, row_wise=True))


def history_shape(shape: tuple[int, ...], *, row_wise: bool) -> tuple[int, ...]:
    """Return the shape of the history of a weight of ``shape``."""
    return (shape[0], *(1 for _ in shape[1:])) if row_wise else tuple(shape)


def sum_duplicates(indices: Array, values: Array) -> tuple[Array, Array]:
    """Return the distinct rows, ascending, and the sum of the values of each.

    A row's occurrences are added in their order, in chunks of ``CHUNK`` counted from the first; the chunk sums are
    added in order. So a row's sum depends only on that row's values. ``values`` has the computing dtype.
    """
    ids = indices.cpu().numpy() if is_torch(indices) else np.asarray(indices)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    counts = np.diff(starts, append=len(ids))
    chunks = -(-counts // CHUNK)
    first = np.cumsum(chunks) - chunks
    which = np.arange(chunks.sum()) - np.repeat(first, chunks)
    begin = np.repeat(starts, chunks) + CHUNK * which
    length = np.minimum(np.repeat(counts, chunks) - CHUNK * which, CHUNK)

    sums = _take(values, order[begin])
    for k in range(1, int(length.max(initial=0))):
        longer = np.flatnonzero(length > k)
        _put(sums, longer, _take(sums, longer) + _take(values, order[begin[longer] + k]))
    total = _take(sums, first)
    for k in range(1, int(chunks.max(initial=0))):
        more = np.flatnonzero(chunks > k)
        _put(total, more, _take(total, more) + _take(sums, first[more] + k))
    return _positions(ids[starts], values), total


def step(weight: Array, grad: Array, history: Array, master: Array | None, lr: Any, wd: Any, rule: Rule) -> None:
    """Do one dense update in place. The rule is applied to ``master``, if any; ``weight`` is then its rounding."""
    with np.errstate(all="ignore"):
        current = cast(weight if master is None else master, history)
        new, accumulated = update(current, cast(grad, history), cast(history, history), lr, wd, rule)
        weight[...] = cast(new, weight)
        if master is not None:
            master[...] = new
        history[...] = accumulated


def step_rows(
    weight: Array, indices: Array, values: Array, history: Array, master: Array | None, lr: Any, wd: Any, rule: Rule
) -> None:
    """Do one row-sparse update in place, of the rows in ``indices`` only, decay included; duplicates are summed."""
    with np.errstate(all="ignore"):
        rows, grad = sum_duplicates(indices, cast(values, history))
        current = cast((weight if master is None else master)[rows], history)
        new, accumulated = update(current, grad, cast(history[rows], history), lr, wd, rule)
        weight[rows] = cast(new, weight)
        if master is not None:
            master[rows] = new
        history[rows] = accumulated


def cast(array: Array, like: Array) -> Array:
    """Cast ``array`` to the dtype of ``like``; for NumPy in native byte order."""
    if is_torch(array):
        return array.to(like.dtype)
    # NumPy turns a 0-d result into a scalar, and ml_dtypes assigns a scalar without regard to the byte order.
    return np.asarray(array).astype(like.dtype.newbyteorder("="), copy=False)


def _sqrt(array: Array) -> Array:
    """Return the correctly rounded square root."""
    if not is_torch(array):
        return np.sqrt(array)
    root = array.sqrt()
    if type(array) is sys.modules["torch"].Tensor and array.device.type == "cpu":
        # torch's root of CPU tensors (MKL's) is occasionally off by one unit in the last place; NumPy's is exact. It
        # overwrites torch's in place, where autograd, if it records, keeps the root for the derivative. Tensors within
        # a torch.func transform have no memory of their own and keep torch's.
        with suppress(RuntimeError), np.errstate(invalid="ignore"):
            np.sqrt(array.detach().numpy(), out=root.detach().numpy())
    return root


def _scalar(value: Any, like: Array) -> Any:
    """Round ``value`` once to the dtype of ``like``; a tensor is returned unchanged."""
    if not is_torch(like):
        return like.dtype.type(value)
    if is_torch(value) or like.dtype == sys.modules["torch"].float64:
        return value
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _positions(index: np.ndarray, like: Array) -> Array:
    return sys.modules["torch"].as_tensor(index, device=like.device) if is_torch(like) else index


def _take(array: Array, index: np.ndarray) -> Array:
    return array[_positions(index, array)]


def _put(array: Array, index: np.ndarray, values: Array) -> None:
    array[_positions(index, array)] = values
