"""The arrays of a call: NumPy arrays and torch tensors, as memory of a known element format."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from adagrad.checks import describe
from adagrad.rule import Array, is_torch

FORMATS = ("float32", "float64", "float16", "bfloat16")
LOW_PRECISION = ("float16", "bfloat16")

_NATIVE = {np.dtype(name): name for name in FORMATS if name != "bfloat16"}

MAX_WORK: Any = 1_000_000
"""Candidate solutions to try (``max_work``) when deciding whether two interleaved arrays share memory."""


def computing_format(name: str) -> str:
    """Return the format of computations and histories for weights of format ``name``."""
    return "float64" if name == "float64" else "float32"


def row_length(shape: tuple[int, ...]) -> int:
    """Return the number of elements in a row of a weight of ``shape``."""
    return math.prod(shape[1:])


class Operand(NamedTuple):
    """An array of a call and, if it is on the CPU, its memory as a NumPy array of plain numbers."""

    name: str
    array: Array
    format: str
    device: str
    memory: np.ndarray | None
    """float32 or float64, or the bit patterns of float16 and bfloat16 as uint16; None on other devices, and if it is
    wrapped."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def is_addressable(self) -> bool:
        """Whether a kernel can address it: C-contiguous, aligned, in native byte order."""
        memory = self.memory
        return memory is not None and memory.flags.c_contiguous and memory.flags.aligned and bool(memory.dtype.isnative)


def operand(name: str, array: Any, *, is_wrapped: bool = False) -> Operand:
    """Return ``array`` as an operand; a tensor that ``is_wrapped``, and so is more than its memory, without memory.

    TypeError if it is not a NumPy array or a torch tensor of float16, bfloat16, float32 or float64.
    """
    if is_torch(array):
        return _tensor(name, array, is_wrapped)
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        hint = "; for rows of a gradient, make an adagrad.RowSparse" if hasattr(array, "tocsr") else ""
        if isinstance(array, np.generic):
            hint = ": numpy.asarray makes an array of it"
        raise TypeError(f"{name}={describe(array)}: must be a NumPy array or a torch tensor, not {kind}{hint}")
    array = np.asarray(array)
    format_name = _NATIVE.get(array.dtype) or array.dtype.name
    if format_name not in FORMATS:
        raise TypeError(f"{name}: dtype {array.dtype}: must be float16, bfloat16, float32 or float64")
    memory = array
    if format_name in LOW_PRECISION:
        memory = array.view(np.dtype(np.uint16).newbyteorder(array.dtype.byteorder))
    return Operand(name, array, format_name, "cpu", memory)


def format_of(array: Array) -> str:
    """Return the name of an array's or a tensor's dtype, whatever its byte order."""
    return tensor_format(array) if is_torch(array) else str(array.dtype.name)


def tensor_format(tensor: Any) -> str:
    """Return the name of a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def _tensor(name: str, tensor: Any, is_wrapped: bool) -> Operand:
    torch = sys.modules["torch"]
    format_name = tensor_format(tensor)
    if format_name not in FORMATS:
        raise TypeError(f"{name}: dtype {tensor.dtype}: must be float16, bfloat16, float32 or float64")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: layout {tensor.layout}: must be a dense (strided) tensor here")
    if tensor.is_neg():
        raise ValueError(f"{name}: a negated view: must be resolved, as by resolve_neg")
    if is_wrapped:
        return Operand(name, tensor, format_name, str(tensor.device), None)
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return Operand(name, tensor, format_name, str(tensor.device), None)
    memory = (tensor.view(torch.uint16) if format_name in LOW_PRECISION else tensor).numpy()
    return Operand(name, tensor, format_name, "cpu", memory)


# --------------------------------------------------------------------------------------------------------------- memory


def bounds(memory: np.ndarray) -> tuple[int, int]:
    """Return the addresses of the first byte of ``memory`` and of the byte after the last."""
    start = memory.__array_interface__["data"][0]  # .ctypes.data makes an object first
    if memory.flags.c_contiguous:  # as is every empty array
        return start, start + memory.nbytes
    spans = [(size - 1) * stride for size, stride in zip(memory.shape, memory.strides, strict=True)]
    low = sum(span for span in spans if span < 0)
    high = sum(span for span in spans if span > 0)
    return start + low, start + high + memory.itemsize


def overlaps_itself(memory: np.ndarray) -> bool:
    """Whether two elements of ``memory`` share a byte."""
    if memory.size < 2 or memory.flags.c_contiguous:
        return False
    reach = memory.itemsize  # bytes spanned by the dimensions with smaller strides
    for stride, size in sorted((abs(s), n) for n, s in zip(memory.shape, memory.strides, strict=True) if n > 1):
        if stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    start, stop = bounds(memory)
    if memory.nbytes > stop - start:
        return True
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(memory.shape, memory.strides, strict=True):
        offsets = (offsets[:, None] + stride * np.arange(size)).ravel()
    return bool((np.diff(np.sort(offsets)) < memory.itemsize).any())


def refuse_unwritable(o: Operand) -> None:
    """Raise ValueError if an operand that a call writes to is read-only or has elements that share memory."""
    if o.memory is not None:
        if not o.memory.flags.writeable:
            raise ValueError(f"{o.name}: read-only: must be writable, as a copy by numpy.array is")
        if overlaps_itself(o.memory):
            refuse_overlap(o, o.memory.strides)


def refuse_overlap(o: Operand, strides: Sequence[int]) -> NoReturn:
    raise ValueError(f"{o.name}: strides {tuple(strides)}: elements share memory: must each have their own")


def refuse_shared_memory(written: list[Operand], read: list[Operand]) -> None:
    """Raise ValueError if an array that the call writes to shares a byte with any other array of the call."""
    given = [(o.name, o.memory, True) for o in written] + [(o.name, o.memory, False) for o in read]
    spans = [(*bounds(memory), writes, name, memory) for name, memory, writes in given if memory is not None]
    spans = sorted((s for s in spans if s[0] < s[1]), key=lambda span: span[:2])
    open_spans: list[tuple[int, int, bool, str, np.ndarray]] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if (span[2] or other[2]) and _share_a_byte(span[4], other[4]):
                first, second = sorted((other[3], span[3]), reverse=True)
                raise ValueError(f"{first}: shares memory with {second}: must not, since the call writes there")
        open_spans.append(span)


def _share_a_byte(first: np.ndarray, second: np.ndarray) -> bool:
    if first.flags.c_contiguous and second.flags.c_contiguous:
        return True  # their bounds overlap and have no gaps
    try:
        return bool(np.shares_memory(first, second, max_work=MAX_WORK))
    except RuntimeError:  # numpy's TooHardError
        return True  # undecided within max_work: refused rather than risked
