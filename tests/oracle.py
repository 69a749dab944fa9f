"""What the numerics contract says, spelled out one number at a time: what the tests compare with.

Nothing here comes from the library, and nothing is fast. A number is a NumPy scalar of the computing dtype, so each
operation is rounded once; float16 and bfloat16 are read and written by exact arithmetic on their definition.

    grad    = clip(grad * rescale_grad, -clip_gradient, clip_gradient) + wd * weight
    history = history + grad * grad
    weight  = weight - lr * (grad / (sqrt(history) + epsilon))

Functions take arrays of any layout and return new, C-contiguous ones; the arguments are not written to.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LANES = 16
CHUNK = 128

FRACTION_BITS = {"float16": 10, "bfloat16": 7}
MIN_EXPONENT = {"float16": -14, "bfloat16": -126}
MAX_EXPONENT = {"float16": 15, "bfloat16": 127}


@dataclass(frozen=True)
class Hyper:
    """The scalars and options of one weight's update."""

    lr: float = 0.1
    wd: float = 0.0
    rescale_grad: float = 1.0
    clip_gradient: float | None = None
    epsilon: float = 1e-6
    epsilon_inside: bool = False
    decoupled_decay: bool = False
    row_wise: bool = False


# ------------------------------------------------------------------------------------------------------- number formats


def read(array: np.ndarray) -> list[Any]:
    """The elements in C order, as scalars of the computing dtype."""
    array = np.ascontiguousarray(array)
    if array.dtype == BFLOAT16:
        return [np.float32(_unpack("<f", int(bits) << 16)) for bits in array.reshape(-1).view(np.uint16)]
    native = array.astype(array.dtype.newbyteorder("=")).reshape(-1)
    if native.dtype == np.float16:
        return [np.float32(struct.unpack("<e", struct.pack("<H", int(bits)))[0]) for bits in native.view(np.uint16)]
    return list(native)


def write(numbers: Iterable[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Numbers as an array of ``dtype``, each rounded to nearest, ties to even."""
    if dtype == BFLOAT16 or dtype == np.float16:
        name = "bfloat16" if dtype == BFLOAT16 else "float16"
        bits = np.array([encode(float(number), name) for number in numbers], np.uint16)
        return bits.view(dtype).reshape(shape)
    return np.array(list(numbers), dtype.newbyteorder("=")).reshape(shape)


def encode(value: float, name: str) -> int:
    """The bits of ``value`` in a 16-bit format, by its definition: sign, exponent, fraction; exact until it rounds."""
    fraction_bits, low, high = FRACTION_BITS[name], MIN_EXPONENT[name], MAX_EXPONENT[name]
    sign = 0x8000 if math.copysign(1.0, value) < 0 else 0
    infinity = (high - low + 2) << fraction_bits
    if math.isnan(value):
        return sign | infinity | 1 << (fraction_bits - 1)
    if math.isinf(value):
        return sign | infinity
    if value == 0:
        return sign
    exponent = max(math.frexp(abs(value))[1] - 1, low)
    units = round(math.ldexp(abs(value), fraction_bits - exponent))  # exact, then Python's ties to even
    # A whole number of units in the last place of `exponent`; carrying into the next exponent is what the sum does.
    number = units + ((exponent - low) << fraction_bits)
    return sign | min(number, infinity)


def _unpack(code: str, bits: int) -> float:
    value: float = struct.unpack(code, struct.pack("<I", bits))[0]
    return value


# ------------------------------------------------------------------------------------------------------------- the rule


class Numbers:
    """The rule's scalars, rounded once to the computing dtype."""

    def __init__(self, hyper: Hyper, dtype: Any) -> None:
        self.dtype = dtype
        self.lr, self.wd = dtype(hyper.lr), dtype(hyper.wd)
        self.rescale, self.epsilon = dtype(hyper.rescale_grad), dtype(hyper.epsilon)
        self.clip = None if hyper.clip_gradient is None else dtype(hyper.clip_gradient)
        self.inside, self.decoupled = hyper.epsilon_inside, hyper.decoupled_decay

    def gradient(self, grad: Any, weight: Any) -> Any:
        grad = grad * self.rescale
        if self.clip is not None:
            if grad > self.clip:
                grad = self.clip
            elif grad < -self.clip:
                grad = -self.clip
        if self.wd != 0 and not self.decoupled:
            grad = grad + self.wd * weight
        return grad

    def descend(self, weight: Any, grad: Any, history: Any) -> Any:
        root = np.sqrt(history + self.epsilon) if self.inside else np.sqrt(history) + self.epsilon
        quotient = grad / root
        if self.wd != 0 and self.decoupled:
            quotient = quotient + self.wd * weight
        return weight - self.lr * quotient


def mean_square(grads: Sequence[Any], dtype: Any) -> Any:
    """Column ``j`` adds into lane ``j mod 16``; lanes combine by halves; one division by the length."""
    lanes = [dtype(0)] * LANES
    for j, grad in enumerate(grads):
        lanes[j % LANES] = lanes[j % LANES] + grad * grad
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[k] + lanes[half + k] for k in range(half)]
    return lanes[0] / dtype(len(grads))


def update_row(
    weight: Sequence[Any], grad: Sequence[Any], history: Sequence[Any], hyper: Hyper, dtype: Any
) -> tuple[list[Any], list[Any]]:
    """New weights and history of one row: as many history values as weights, or one if ``row_wise``."""
    numbers = Numbers(hyper, dtype)
    effective = [numbers.gradient(g, w) for g, w in zip(grad, weight, strict=True)]
    if hyper.row_wise:
        shared = history[0] + mean_square(effective, dtype)
        new_history = [shared]
        used = [shared] * len(weight)
    else:
        new_history = used = [h + g * g for h, g in zip(history, effective, strict=True)]
    new = [numbers.descend(w, g, h) for w, g, h in zip(weight, effective, used, strict=True)]
    return new, new_history


def sum_occurrences(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The sum of one row's occurrences: chunks of 128, one after the other; then the chunks, in order."""
    total: list[Any] | None = None
    for start in range(0, len(rows), CHUNK):
        chunk = list(rows[start])
        for occurrence in rows[start + 1 : start + CHUNK]:
            chunk = [a + b for a, b in zip(chunk, occurrence, strict=True)]
        total = chunk if total is None else [a + b for a, b in zip(total, chunk, strict=True)]
    assert total is not None
    return total


def _split(numbers: list[Any], rows: int) -> list[list[Any]]:
    width = len(numbers) // rows if rows else 0
    return [numbers[r * width : (r + 1) * width] for r in range(rows)]


def _join(rows: Iterable[Iterable[Any]]) -> list[Any]:
    return [number for row in rows for number in row]


def dense(
    weight: np.ndarray, grad: np.ndarray, history: np.ndarray, hyper: Hyper, master: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """New weight, history and master copy after one dense update."""
    dtype = np.float64 if weight.dtype.newbyteorder("=") == np.float64 else np.float32
    count = weight.shape[0] if hyper.row_wise else 1
    acted_on = weight if master is None else master
    w, g, h = (_split([dtype(x) for x in read(a)], count) for a in (acted_on, grad, history))
    with np.errstate(all="ignore"):
        updated = [update_row(*row, hyper, dtype) for row in zip(w, g, h, strict=True) if row[0]]
    if not updated:
        return weight.copy(), history.copy(), None if master is None else master.copy()
    new, new_history = _join(u[0] for u in updated), _join(u[1] for u in updated)
    return (
        write(new, weight.shape, weight.dtype),
        write(new_history, history.shape, history.dtype),
        None if master is None else write(new, master.shape, master.dtype),
    )


def row_sparse(
    weight: np.ndarray,
    indices: Sequence[int],
    values: np.ndarray,
    history: np.ndarray,
    hyper: Hyper,
    master: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """New weight, history and master copy after one row-sparse update: rows that do not occur keep their bits."""
    dtype = np.float64 if weight.dtype.newbyteorder("=") == np.float64 else np.float32
    new_weight, new_history = np.ascontiguousarray(weight).copy(), np.ascontiguousarray(history).copy()
    new_master = None if master is None else np.ascontiguousarray(master).copy()
    acted_on = new_weight if new_master is None else new_master
    given = _split([dtype(x) for x in read(values)], len(indices))
    occurrences: dict[int, list[list[Any]]] = {}
    for row, numbers in zip(indices, given, strict=True):
        occurrences.setdefault(int(row), []).append(numbers)
    for row, found in occurrences.items():
        if not found[0]:
            continue
        with np.errstate(all="ignore"):
            grad = sum_occurrences(found)
            w, h = read(acted_on[row : row + 1]), read(new_history[row : row + 1])
            new, accumulated = update_row([dtype(x) for x in w], grad, h, hyper, dtype)
        new_history[row] = write(accumulated, history.shape[1:], history.dtype)
        if new_master is not None:
            new_master[row] = write(new, weight.shape[1:], new_master.dtype)
        new_weight[row] = write(new, weight.shape[1:], weight.dtype)
    return new_weight, new_history, new_master
