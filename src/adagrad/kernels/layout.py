"""How compiled code looks at the arrays of a call: NumPy's and torch's, without Python.

Asking 300 arrays for dtype, shape, flags and address through Python costs several times what updating them costs. What
compiled code must know to ask by itself is a *layout*: where the objects keep these things. It is found at first use by
comparison with public attributes, see :mod:`adagrad.kernels.ndarray_layout` and :mod:`adagrad.kernels.tensor_layout`.
Where an interpreter or a library is laid out otherwise, there is no layout, and the ordinary way is taken, which is
slower and no less exact.

Only exact types pass, native, aligned and on the CPU or a CUDA device; all else, and every error, is left to the
ordinary way.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from adagrad.kernels.numba_jit import jit

ELEMENT_FORMATS = ("float16", "bfloat16", "float32", "float64", "int32", "int64")
FLOAT32, FLOAT64, INT32 = 2, 3, 4
"""Positions in ELEMENT_FORMATS; the low-precision ones stand before FLOAT32."""

# The words of a layout. Of NumPy: the array type, the dtypes of ELEMENT_FORMATS. Of torch: the addresses of two C
# functions; where a tensor object keeps its C++ tensor; where that keeps its dispatch keys, its number of dimensions
# (sizes and strides follow, with room for INLINE of each) and its dtype; the keys of plain memory on the CPU and on
# CUDA devices (0: there are none); the types of plain tensors; the keys of sparse COO tensors on the CPU (0: they are
# unknown) and where those keep their values and indices; two more C functions; the codes of ELEMENT_FORMATS. And None.
ARRAY, DTYPES = 0, 1
GET_ADDRESS, GET_INDEX, HOLDER, KEYS_AT, RANK_AT, DTYPE_AT, ON_CPU, ON_CUDA, TENSOR, PARAMETER = range(7, 17)
SPARSE, VALUES_AT, INDICES_AT, NEW_HANDLE, DELETE_HANDLE = range(17, 22)
CODES, NONE, WORDS = 22, 28, 29
INLINE = 5

# What `look` finds out: 0 for an array and 1 for a tensor; 0 for the CPU and 1 + index for a CUDA device; the position
# in ELEMENT_FORMATS; the number of dimensions; the addresses of sizes and strides; what a stride of one element is;
# whether it is C-contiguous; whether it may be written to; the address of the first element; the number of elements.
KIND, PLACE, FORMAT, RANK, SIZES, STRIDES, UNIT, CONTIGUOUS, WRITEABLE, START, COUNT, SEEN = range(12)

# Byte offsets in PyListObject, PyObject and PyArrayObject on 64-bit CPython with reference counts; NumPy's flags.
LIST_ITEMS, TYPE = 24, 8
DATA, NDIM, DIMENSIONS, STEPS, DESCR, FLAGS = 16, 24, 32, 40, 56, 64
FLAG_CONTIGUOUS, FLAG_ALIGNED, FLAG_WRITEABLE = 0x1, 0x100, 0x400


def _read(bits: int) -> Any:
    def code(typing: Any, address: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            place = builder.inttoptr(builder.add(*args), ir.IntType(bits).as_pointer())
            return builder.sext(builder.load(place), ir.IntType(64)) if bits < 64 else builder.load(place)

        return types.int64(types.int64, types.int64), generate

    return intrinsic(code)


word, _int = _read(64), _read(32)
"""``word(address, offset)``: the 64-bit integer in memory at ``address + offset``; a C ``int`` likewise."""


@jit(helper=True)
def item(list_id: int, i: int) -> Any:
    """The address of the ``i``-th object of the list at an address."""
    return word(word(list_id, LIST_ITEMS), 8 * i)


@jit(helper=True)
def item_size(position: int) -> int:
    """Bytes of an element of the format at a position in ELEMENT_FORMATS."""
    return 2 if position < FLOAT32 else 4 if position in (FLOAT32, INT32) else 8


def _generate_call(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)] * (len(args) - 1))
    return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])


def _call_code(typing: Any, function: Any, tensor: Any, out: Any) -> Any:
    """Call the C function at an address, ``int function(tensor, void *out)``; 0 says that it worked."""
    return types.int32(types.int64, types.int64, types.int64), _generate_call


def _call_with_one_code(typing: Any, function: Any, tensor: Any) -> Any:
    """The same for ``int function(tensor)``."""
    return types.int32(types.int64, types.int64), _generate_call


_call: Any = intrinsic(_call_code)
_call_with_one: Any = intrinsic(_call_with_one_code)


@jit(helper=True)
def _ask(function: int, tensor: int, out: Any) -> Any:
    out[0] = 0
    return out[0] if _call(function, tensor, out.ctypes.data) == 0 else -1


@jit(helper=True)
def _look_at_array(array: int, how: Any, seen: Any) -> bool:
    flags, dtype = _int(array, FLAGS), word(array, DESCR)
    seen[KIND], seen[PLACE], seen[FORMAT] = 0, 0, -1
    for i in range(len(ELEMENT_FORMATS)):
        if how[DTYPES + i] == dtype:
            seen[FORMAT] = i
    if seen[FORMAT] < 0 or not flags & FLAG_ALIGNED:
        return False
    rank, sizes, count = _int(array, NDIM), word(array, DIMENSIONS), 1
    for d in range(rank):
        count *= word(sizes, 8 * d)
    seen[RANK], seen[SIZES], seen[STRIDES], seen[COUNT] = rank, sizes, word(array, STEPS), count
    seen[UNIT], seen[START] = item_size(seen[FORMAT]), word(array, DATA)
    seen[CONTIGUOUS], seen[WRITEABLE] = flags & FLAG_CONTIGUOUS != 0, flags & FLAG_WRITEABLE != 0
    return True


@jit(helper=True)
def _look_at_tensor(tensor: int, how: Any, out: Any, seen: Any) -> bool:
    """``tensor`` is the address where a C++ tensor is kept: what its C functions take."""
    body = word(tensor, 0)
    # Most is told by one word: the keys tell plain memory on a device from sparse layouts, wrappers, negated views and
    # all else.
    keys = word(body, how[KEYS_AT])
    if keys == how[ON_CPU]:
        seen[PLACE] = 0
    elif keys == how[ON_CUDA]:
        seen[PLACE] = 1 + (_ask(how[GET_INDEX], tensor, out) & 0xFFFF)
    else:
        return False
    dtype = word(body, how[DTYPE_AT]) & 0xFFFF
    seen[KIND], seen[UNIT], seen[WRITEABLE], seen[FORMAT] = 1, 1, 1, -1
    for i in range(len(ELEMENT_FORMATS)):
        if how[CODES + i] == dtype:
            seen[FORMAT] = i
    rank = word(body, how[RANK_AT])
    if seen[FORMAT] < 0 or rank > INLINE:
        return False
    sizes = body + how[RANK_AT] + 8
    strides = sizes + 8 * INLINE
    count, contiguous = 1, True
    for d in range(rank - 1, -1, -1):
        size = word(sizes, 8 * d)
        contiguous &= size == 1 or word(strides, 8 * d) == count
        count *= size
    seen[RANK], seen[SIZES], seen[STRIDES], seen[COUNT] = rank, sizes, strides, count
    # The address is asked for by the C function that PyTorch exports for compiled models, because asking may have
    # effects: it unshares memory that is copied on write.
    seen[CONTIGUOUS], seen[START] = contiguous or count == 0, _ask(how[GET_ADDRESS], tensor, out)
    return count == 0 or (seen[START] > 0 and seen[START] % item_size(seen[FORMAT]) == 0)


@jit(helper=True)
def look(thing: int, how: Any, out: Any, seen: Any) -> bool:
    """Fill ``seen``; False for anything but plain memory of a known format on the CPU or a CUDA device.

    ``thing`` is the address of a Python object, ``how`` a layout, ``out`` room for one word. The GIL is held.
    """
    kind = word(thing, TYPE)
    if kind == how[ARRAY]:
        return _look_at_array(thing, how, seen)
    if kind == how[TENSOR] or kind == how[PARAMETER]:
        return _look_at_tensor(thing + how[HOLDER], how, out, seen)
    return False


@jit(helper=True)
def sparse_body(thing: int, how: Any) -> int:
    """The address of the C++ tensor of a sparse COO tensor on the CPU; 0 for anything else."""
    if word(thing, TYPE) != how[TENSOR] or how[SPARSE] == 0:
        return 0
    body = word(thing + how[HOLDER], 0)
    return body if word(body, how[KEYS_AT]) == how[SPARSE] else 0


@jit(helper=True)
def look_into(body: int, at: int, how: Any, out: Any, seen: Any) -> bool:
    """What :func:`look` does, for what a sparse tensor keeps ``at`` VALUES_AT or INDICES_AT; :func:`sparse_body`."""
    return _look_at_tensor(body + how[at], how, out, seen)


@jit(helper=True)
def hold_parts(body: int, how: Any, handles: Any) -> None:
    """Two handles that keep the parts of a sparse tensor alive, whatever becomes of itself; 0 for no tensor."""
    for k in range(2):
        if body == 0 or _call(how[NEW_HANDLE], body + how[VALUES_AT + k], handles[k:].ctypes.data) != 0:
            handles[k] = 0


@jit(helper=True)
def let_go_of_parts(handles: Any, how: Any) -> None:
    for handle in handles:
        if handle:
            _call_with_one(how[DELETE_HANDLE], handle)


@jit(holds_gil=True)
def _look(thing: int, how: Any, out: Any, seen: Any) -> bool:
    return look(thing, how, out, seen)


def look_once(thing: object, how: np.ndarray) -> np.ndarray | None:
    """What :func:`look` finds out of ``thing``, if it is plain."""
    seen = np.zeros(SEEN, np.int64)
    return seen if _look(id(thing), how, np.empty(1, np.int64), seen) else None


# ------------------------------------------------------------------------------------------------ finding the layout


def layout() -> np.ndarray | None:
    """What :func:`look` must know of the libraries at hand, or None where it cannot be found."""
    last, torch, ml_dtypes = _last, sys.modules.get("torch"), sys.modules.get("ml_dtypes")
    if last is None or last[0] is not torch or last[1] is not ml_dtypes:
        return _find(torch, ml_dtypes)
    return _find(torch, ml_dtypes) if last[2] and torch.cuda.is_initialized() else last[3]


_last: tuple[Any, Any, bool, np.ndarray | None] | None = None
"""Of the last search that found both modules complete or absent: the modules, whether CUDA was still to be initialized,
and the layout."""


def _find(torch: Any, ml_dtypes: Any) -> np.ndarray | None:
    global _last
    # Modules that another thread is importing do not have all their names yet.
    with_torch, with_bfloat16 = _has_tensors(torch), hasattr(ml_dtypes, "bfloat16")
    backend = getattr(getattr(torch, "backends", None), "cuda", None)
    # Before CUDA is initialized there is no CUDA tensor, and asking for its keys would initialize it.
    with_cuda = hasattr(torch, "cuda") and torch.cuda.is_initialized()
    found = _layout(with_torch, with_cuda, with_bfloat16)
    if (torch is None or (with_torch and backend is not None)) and with_bfloat16 == (ml_dtypes is not None):
        _last = torch, ml_dtypes, backend is not None and backend.is_built() and not with_cuda, found
    return found


def _has_tensors(torch: Any) -> bool:
    """Whether plain tensors can be made, to look at: not within a ``torch.func`` transform."""
    functorch = getattr(getattr(torch, "_C", None), "_functorch", None)
    return hasattr(torch, "Tensor") and (functorch is None or functorch.peek_interpreter_stack() is None)


@functools.cache
def _layout(with_torch: bool, with_cuda: bool, with_bfloat16: bool) -> np.ndarray | None:
    from adagrad.kernels import ndarray_layout

    how = ndarray_layout.find()
    if how is not None and with_torch:
        from adagrad.kernels import tensor_layout

        tensor_layout.add_to(how, with_cuda=with_cuda)
    return how
