"""How compiled code looks at a torch tensor: its device, format, shape, strides and address, without Python.

It reads what Python objects of tensors and their C++ tensors hold, at offsets that are found at first use by comparison
with public attributes. Most is told by one word, the dispatch keys: they tell plain memory on a device from sparse
layouts, wrappers, negated views and all else. Addresses are asked for by the C function that PyTorch exports for
compiled models, because asking may have effects: it unshares memory that is copied on write. Where all this fails
(another interpreter, a new PyTorch), :func:`layout` is None, and the ordinary way is taken, which is slower and no less
exact.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from adagrad.kernels.ndarray_table import TYPE, _word, available
from adagrad.kernels.numba_jit import jit

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""The types whose objects are their memory and nothing else (a buffer is a Tensor)."""

FORMATS = ("float16", "bfloat16", "float32", "float64")
FLOAT32, FLOAT64 = 2, 3
"""Positions in FORMATS; the two before are the low-precision ones."""

# The words of a layout: the addresses of two C functions; where a tensor object keeps its C++ tensor; where that keeps
# its dispatch keys, its number of dimensions (sizes and strides follow, with room for INLINE of each) and its dtype;
# the keys of plain memory on the CPU and on CUDA devices (0: there are none); the codes of FORMATS; the addresses of
# PLAIN_TYPES.
GET_ADDRESS, GET_INDEX, HOLDER, KEYS_AT, RANK_AT, DTYPE_AT, ON_CPU, ON_CUDA = range(8)
CODES, KINDS, WORDS = 8, 12, 14
INLINE = 5

# What `look` finds out: 0 for the CPU and 1 + index for a CUDA device, the position in FORMATS, the number of
# dimensions, the addresses of sizes and strides, whether it is contiguous, the address of the first element, the number
# of elements.
PLACE, FORMAT, RANK, SIZES, STRIDES, CONTIGUOUS, START, COUNT, SEEN = range(9)


def _call_code(typing: Any, function: Any, tensor: Any, out: Any) -> Any:
    """Call the C function at an address, ``int function(tensor, void *out)``; 0 says that it worked."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word, word])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2]])

    return types.int32(types.int64, types.int64, types.int64), generate


_call: Any = intrinsic(_call_code)


@jit(helper=True)
def _ask(function: int, tensor: int, out: Any) -> Any:
    out[0] = 0
    return out[0] if _call(function, tensor, out.ctypes.data) == 0 else -1


@jit(helper=True)
def look(tensor: int, how: Any, out: Any, seen: Any) -> bool:
    """Fill ``seen``; False for anything but plain memory of a known format on the CPU or a CUDA device.

    ``tensor`` is the address of a Python object, ``how`` a layout, ``out`` room for one word.
    """
    kind = _word(tensor, TYPE)
    if kind != how[KINDS] and kind != how[KINDS + 1]:
        return False
    tensor += how[HOLDER]
    body = _word(tensor, 0)
    keys = _word(body, how[KEYS_AT])
    if keys == how[ON_CPU]:
        seen[PLACE] = 0
    elif keys == how[ON_CUDA]:
        seen[PLACE] = 1 + (_ask(how[GET_INDEX], tensor, out) & 0xFFFF)
    else:
        return False
    dtype = _word(body, how[DTYPE_AT]) & 0xFFFF
    seen[FORMAT] = -1
    for i in range(4):
        if how[CODES + i] == dtype:
            seen[FORMAT] = i
    rank = _word(body, how[RANK_AT])
    if seen[FORMAT] < 0 or rank > INLINE:
        return False
    sizes = body + how[RANK_AT] + 8
    strides = sizes + 8 * INLINE
    count, contiguous = 1, True
    for d in range(rank - 1, -1, -1):
        size = _word(sizes, 8 * d)
        contiguous &= size == 1 or _word(strides, 8 * d) == count
        count *= size
    seen[RANK], seen[SIZES], seen[STRIDES], seen[COUNT] = rank, sizes, strides, count
    seen[CONTIGUOUS], seen[START] = contiguous or count == 0, _ask(how[GET_ADDRESS], tensor, out)
    return count == 0 or (seen[START] > 0 and seen[START] % item_size(seen[FORMAT]) == 0)


@jit(helper=True)
def item_size(position: int) -> int:
    """Bytes of an element of the format at a position in FORMATS."""
    return 2 if position < FLOAT32 else 4 if position == FLOAT32 else 8


@jit()
def _look_once(tensor: int, how: Any, seen: Any) -> bool:
    return look(tensor, how, np.empty(1, np.int64), seen)


# ------------------------------------------------------------------------------------------------ finding the layout

SEARCHED = 192
"""Bytes of a C++ tensor that are searched for its dispatch keys; it has more."""


def layout() -> np.ndarray | None:
    """What :func:`look` must know of the PyTorch at hand, or None where it cannot be found."""
    # Before CUDA is initialized there is no CUDA tensor, and asking for its keys would initialize it.
    return _layout(bool(torch.cuda.is_initialized()))  # type: ignore[no-untyped-call]


@functools.cache
def _layout(with_cuda: bool) -> np.ndarray | None:
    try:
        with torch.inference_mode(False):
            return _find_layout(with_cuda)
    except (AttributeError, OSError, RuntimeError):
        return None


def _find_layout(with_cuda: bool) -> np.ndarray | None:
    if platform.python_implementation() != "CPython" or not available():
        return None
    library = _library()
    base = torch.arange(24.0, device="cpu")
    plain = [
        base,
        torch.nn.Parameter(base.double().view(2, 3, 4)),
        base.half()[4:].view(4, 5).t(),
        base.bfloat16()[0],
        base.view(1, 2, 3, 1, 4)[..., 1:3],
    ]
    probes = [*plain, torch._neg_view(base), base.to("meta"), base.view(4, 6).to_sparse()]
    codes = {name: getattr(library, f"aoti_torch_dtype_{name}")() for name in FORMATS}
    how = np.zeros(WORDS, np.int64)
    for i, name in enumerate(("get_data_ptr", "get_device_index")):
        how[i] = ctypes.cast(getattr(library, f"aoti_torch_{name}"), ctypes.c_void_p).value or 0
    how[HOLDER] = _find([(id(t), object.__sizeof__(t), t._cdata) for t in probes])
    how[KEYS_AT] = _find([(t._cdata, SEARCHED, _keys_of(t)) for t in probes])
    how[RANK_AT] = _find([(t._cdata, SEARCHED, t.ndim) for t in plain])
    how[DTYPE_AT] = _find([(t._cdata, SEARCHED, codes[_format(t)]) for t in plain], ctypes.c_uint16)
    how[ON_CPU], how[ON_CUDA] = _keys_of(base), _keys_of(torch.empty(0, device="cuda")) if with_cuda else 0
    how[CODES : CODES + len(codes)] = list(codes.values())
    how[KINDS : KINDS + len(PLAIN_TYPES)] = [id(kind) for kind in PLAIN_TYPES]
    return how if all(_agrees(how, t) for t in probes) else None


def _library() -> ctypes.CDLL:
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


def _keys_of(tensor: torch.Tensor) -> int:
    return ctypes.c_int64(torch._C._dispatch_keys(tensor).raw_repr()).value


def _format(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _find(places: list[tuple[int, int, int]], unit: Any = ctypes.c_int64) -> int:
    """The one offset at which, for every (address, size, value), the number at address + offset is the value."""
    step = ctypes.sizeof(unit)
    offsets = set(range(8, SEARCHED, step))
    for address, size, value in places:
        numbers = (unit * (size // step)).from_address(address)
        offsets &= {step * i for i, number in enumerate(numbers) if number == value}
    if len(offsets) != 1:
        raise RuntimeError(f"tensors hold the value sought at offsets {sorted(offsets)}: must be one")
    return offsets.pop()


def _agrees(how: np.ndarray, tensor: torch.Tensor) -> bool:
    """Whether compiled code sees of ``tensor`` what Python sees."""
    seen = np.zeros(SEEN, np.int64)
    plain = type(tensor) in PLAIN_TYPES and _keys_of(tensor) == how[ON_CPU]
    if not plain or not _look_once(id(tensor), how, seen):
        return not plain and not _look_once(id(tensor), how, seen)
    expected = {
        PLACE: 0,
        FORMAT: FORMATS.index(_format(tensor)),
        RANK: tensor.ndim,
        CONTIGUOUS: tensor.is_contiguous(),
        START: tensor.data_ptr(),
        COUNT: tensor.numel(),
    }
    numbers = ctypes.c_int64 * tensor.ndim
    sizes, strides = (tuple(numbers.from_address(int(seen[what]))) for what in (SIZES, STRIDES))
    alike = all(seen[what] == value for what, value in expected.items())
    return alike and sizes == tensor.shape and strides == tensor.stride()
