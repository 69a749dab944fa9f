"""How compiled code reads the arrays of a call, NumPy's and torch's, without Python.

Asking 300 arrays for dtype, shape, flags and address through Python costs several times what updating them costs. A
*layout* records the byte offsets at which these objects store them. It is found at first use by comparison with public
attributes, by ``ndarray_layout.py`` and ``tensor_layout.py``. If an interpreter or a library stores them differently,
there is no layout, and the general path is taken, which is slower and no less exact. It is taken, too, if
``ADAGRAD_NO_INSPECTION`` is set in the environment, to find out whether a crash comes from this reading.

An array is *plain* if compiled code can read it this way: exactly an ndarray, memmap, Tensor, Parameter or of a class
that was accepted, see :func:`accept`; of one of ELEMENT_FORMATS, native, aligned, on the CPU or a CUDA device; a tensor
has at most INLINE dimensions. All else, and every error, is left to the general path.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from adagrad.kernels.runtime.memory import array_at
from adagrad.kernels.runtime.numba_jit import jit

ELEMENT_FORMATS = ("float16", "bfloat16", "float32", "float64", "int32", "int64")
FLOAT32, FLOAT64, INT32 = 2, 3, 4
"""Positions in ELEMENT_FORMATS; the low-precision ones come before FLOAT32."""

# The words of a layout. For NumPy: the addresses of its two array types and of the dtypes of ELEMENT_FORMATS. For
# torch: the addresses of two C functions; the byte offsets of the C++ tensor in a tensor object, and in that of the
# dispatch keys, the number of dimensions (sizes and strides follow, with room for INLINE of each) and the dtype; the
# keys of plain memory on the CPU and on CUDA devices (0: none); the types of plain tensors; the keys of sparse COO
# tensors on the CPU (0: unknown) and the offsets of their values and indices; two more C functions; the codes of
# ELEMENT_FORMATS; the types that were accepted (0: none). Last, the address of None.
_N = len(ELEMENT_FORMATS)
ARRAY, MEMMAP, DTYPES = range(3)
GET_ADDRESS, GET_INDEX, HOLDER, KEYS_AT, RANK_AT, DTYPE_AT, ON_CPU, ON_CUDA, TENSOR, PARAMETER = range(2 + _N, 12 + _N)
SPARSE, VALUES_AT, INDICES_AT, NEW_HANDLE, DELETE_HANDLE, CODES = range(12 + _N, 18 + _N)
ACCEPTED, MOST_ACCEPTED = CODES + _N, 4
NONE, WORDS = ACCEPTED + MOST_ACCEPTED, ACCEPTED + MOST_ACCEPTED + 1
INLINE = 5

# The words in which `describe` describes an array: 0 for NumPy's and 1 for a tensor; 0 for the CPU and 1 + index for a
# CUDA device; the position in ELEMENT_FORMATS; the number of dimensions; the addresses of sizes and strides; the stride
# of adjacent elements (bytes in NumPy, 1 in torch); whether it is C-contiguous and may be written to; the address of
# the first element; the number of elements.
KIND, DEVICE, FORMAT, RANK, SIZES, STRIDES, UNIT, CONTIGUOUS, WRITEABLE, START, COUNT, INFO = range(12)

# Byte offsets in PyObject, PyListObject and PyArrayObject on 64-bit CPython; NumPy's flags. The header of every object
# ends with its type; it has 16 bytes, in a free-threaded interpreter 32.
_HEADER = object.__basicsize__
TYPE, LIST_ITEMS = _HEADER - 8, _HEADER + 8
DATA, NDIM, DIMENSIONS, STEPS, DESCR, FLAGS = (_HEADER + offset for offset in (0, 8, 16, 24, 40, 48))
FLAG_CONTIGUOUS, FLAG_ALIGNED, FLAG_WRITEABLE = 0x1, 0x100, 0x400


def _read(bits: int) -> Any:
    def code(typing: Any, address: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            place = builder.inttoptr(builder.add(*args), ir.IntType(bits).as_pointer())
            return builder.sext(builder.load(place), ir.IntType(64)) if bits < 64 else builder.load(place)

        return types.int64(types.int64, types.int64), generate

    return intrinsic(code)


read_word, _read_int = _read(64), _read(32)
"""``read_word(address, offset)``: the 64-bit integer in memory at ``address + offset``; a C ``int`` likewise."""


@jit(helper=True)
def list_item(list_id: int, i: int) -> Any:
    """The address of the ``i``-th object of the list at the address ``list_id``."""
    return read_word(read_word(list_id, LIST_ITEMS), 8 * i)


@jit(helper=True)
def item_size(position: int) -> int:
    """Bytes of an element of the format at a position in ELEMENT_FORMATS."""
    return 2 if position < FLOAT32 else 4 if position in (FLOAT32, INT32) else 8


def generate_call(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * (len(args) - 1))
    return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])


def _call_code(typing: Any, function: Any, tensor: Any, out: Any) -> Any:
    """Call the C function at an address, ``int function(tensor, void *out)``; 0 says that it worked."""
    return types.int32(types.int64, types.int64, types.int64), generate_call


call_c: Any = intrinsic(_call_code)


@jit(helper=True)
def _ask(function: int, tensor: int, info: Any) -> Any:
    info[START] = 0  # room for the answer; the start is asked for last
    return info[START] if call_c(function, tensor, info[START:].ctypes.data) == 0 else -1


@jit(helper=True)
def _describe_array(array: int, layout: Any, info: Any) -> bool:
    flags, dtype = _read_int(array, FLAGS), read_word(array, DESCR)
    info[KIND], info[DEVICE], info[FORMAT] = 0, 0, -1
    for i in range(len(ELEMENT_FORMATS)):
        if layout[DTYPES + i] == dtype:
            info[FORMAT] = i
    if info[FORMAT] < 0 or not flags & FLAG_ALIGNED:
        return False
    rank, sizes, count = _read_int(array, NDIM), read_word(array, DIMENSIONS), 1
    for d in range(rank):
        count *= read_word(sizes, 8 * d)
    info[RANK], info[SIZES], info[STRIDES], info[COUNT] = rank, sizes, read_word(array, STEPS), count
    info[UNIT], info[START] = item_size(info[FORMAT]), read_word(array, DATA)
    info[CONTIGUOUS], info[WRITEABLE] = flags & FLAG_CONTIGUOUS != 0, flags & FLAG_WRITEABLE != 0
    return True


@jit(helper=True)
def describe_tensor(tensor: int, layout: Any, info: Any) -> bool:
    """See :func:`describe`; ``tensor`` is the address of a C++ ``Tensor``, as PyTorch's C functions take it."""
    body = read_word(tensor, 0)
    # One word tells most: the dispatch keys distinguish plain memory on a device from sparse layouts, wrappers, negated
    # views and all else.
    keys = read_word(body, layout[KEYS_AT])
    if keys == layout[ON_CPU]:
        info[DEVICE] = 0
    elif keys == layout[ON_CUDA]:
        info[DEVICE] = 1 + (_ask(layout[GET_INDEX], tensor, info) & 0xFFFF)
    else:
        return False
    dtype = read_word(body, layout[DTYPE_AT]) & 0xFFFF
    info[KIND], info[UNIT], info[WRITEABLE], info[FORMAT] = 1, 1, 1, -1
    for i in range(len(ELEMENT_FORMATS)):
        if layout[CODES + i] == dtype:
            info[FORMAT] = i
    rank = read_word(body, layout[RANK_AT])
    if info[FORMAT] < 0 or rank > INLINE:
        return False
    sizes = body + layout[RANK_AT] + 8
    strides = sizes + 8 * INLINE
    count, contiguous = 1, True
    for d in range(rank - 1, -1, -1):
        size = read_word(sizes, 8 * d)
        contiguous &= size == 1 or read_word(strides, 8 * d) == count
        count *= size
    info[RANK], info[SIZES], info[STRIDES], info[COUNT] = rank, sizes, strides, count
    # The address comes from the C function that PyTorch exports for compiled models, because getting it may have a side
    # effect: it unshares copy-on-write memory.
    info[CONTIGUOUS], info[START] = contiguous or count == 0, _ask(layout[GET_ADDRESS], tensor, info)
    return count == 0 or (info[START] > 0 and info[START] % item_size(info[FORMAT]) == 0)


@jit(helper=True, inline=False)
def describe(thing: int, layout_at: int, info_at: int) -> bool:
    """Fill INFO words at ``info_at``; False for anything that is not plain (then they are undefined).

    ``thing`` is the address of a Python object, ``layout_at`` that of a layout. The GIL must be held; where there is
    none, no other thread may change the shape or the memory of ``thing`` meanwhile.
    """
    layout, info = array_at(layout_at, WORDS, np.int64), array_at(info_at, INFO, np.int64)
    kind = read_word(thing, TYPE)
    if kind == layout[ARRAY] or kind == layout[MEMMAP]:
        return _describe_array(thing, layout, info)
    is_tensor = kind == layout[TENSOR] or kind == layout[PARAMETER]
    if not is_tensor:
        for k in range(MOST_ACCEPTED):
            is_tensor |= kind == layout[ACCEPTED + k]
    return is_tensor and describe_tensor(thing + layout[HOLDER], layout, info)


@jit(holds_gil=True)
def _describe(thing: int, layout: Any, info: Any) -> bool:
    return describe(thing, layout.ctypes.data, info.ctypes.data)


def describe_once(thing: object, layout: np.ndarray) -> np.ndarray | None:
    """What :func:`describe` fills in for ``thing``; None if it is not plain."""
    info = np.zeros(INFO, np.int64)
    return info if _describe(id(thing), layout, info) else None


def accept(kind: type) -> None:
    """From now on, the tensors of a class are plain, if there is room. They must be nothing but their memory."""
    layout = current_layout()
    if layout is None or not layout[TENSOR]:
        return
    accepted = layout[ACCEPTED : ACCEPTED + MOST_ACCEPTED]
    if id(kind) not in (layout[TENSOR], layout[PARAMETER], *accepted) and not accepted.all():
        _accepted.append(kind)
        accepted[accepted.argmin()] = id(kind)


_accepted: list[type] = []
"""Classes that are kept, so that their addresses are not reused."""


# --------------------------------------------------------------------------------------------------- finding the layout


def current_layout() -> np.ndarray | None:
    """The layout of the libraries that are imported now, or None if it cannot be found."""
    last, torch, ml_dtypes = _last, sys.modules.get("torch"), sys.modules.get("ml_dtypes")
    if last is None or last[0] is not torch or last[1] is not ml_dtypes:
        return _find(torch, ml_dtypes)
    return _find(torch, ml_dtypes) if last[2] and torch.cuda.is_initialized() else last[3]


_last: tuple[Any, Any, bool, np.ndarray | None] | None = None
"""The last search that found both modules complete or absent: torch, ml_dtypes, whether torch has CUDA but had not
initialized it, and the layout."""


def _find(torch: Any, ml_dtypes: Any) -> np.ndarray | None:
    global _last
    # Modules that another thread is importing do not have all their names yet.
    with_torch, with_bfloat16 = _has_tensors(torch), hasattr(ml_dtypes, "bfloat16")
    backend = getattr(getattr(torch, "backends", None), "cuda", None)
    # Before CUDA is initialized there is no CUDA tensor, and making one to get its keys would initialize it.
    with_cuda = hasattr(torch, "cuda") and torch.cuda.is_initialized()
    found = _layout(with_torch, with_cuda, with_bfloat16)
    if (torch is None or (with_torch and backend is not None)) and with_bfloat16 == (ml_dtypes is not None):
        _last = torch, ml_dtypes, backend is not None and backend.is_built() and not with_cuda, found
    return found


def _has_tensors(torch: Any) -> bool:
    """Whether plain tensors can be made for inspection: not within a ``torch.func`` transform."""
    functorch = getattr(getattr(torch, "_C", None), "_functorch", None)
    return hasattr(torch, "Tensor") and (functorch is None or functorch.peek_interpreter_stack() is None)


@functools.cache
def _layout(with_torch: bool, with_cuda: bool, with_bfloat16: bool) -> np.ndarray | None:
    if os.environ.get("ADAGRAD_NO_INSPECTION"):
        return None
    from adagrad.kernels.inspection import ndarray_layout

    layout = ndarray_layout.find()
    if layout is not None and with_torch:
        from adagrad.kernels.inspection import tensor_layout

        tensor_layout.add_to(layout, with_cuda=with_cuda)
    return layout
