"""Memory as compiled code handles it: arrays by address, words, reference counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from adagrad.kernels.runtime.numba_jit import jit

_WORD, _BYTES = ir.IntType(64), ir.IntType(8).as_pointer()


# --------------------------------------------------------------------------------------------------------------- arrays
#
# For `np.empty` and `numba.carray`, Numba compiles functions of its own, again for each kind of caller. These take less
# time to compile.


def _array_at_code(typing: Any, address: Any, shape: Any, dtype: Any) -> Any:
    kind = types.Array(dtype.dtype, shape.count if isinstance(shape, types.BaseTuple) else 1, "C")

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lengths, itemsize = [args[1]], context.get_abi_sizeof(context.get_data_type(kind.dtype))
        if isinstance(shape, types.BaseTuple):
            lengths = [context.cast(builder, length, form, types.intp)
                       for length, form in zip(cgutils.unpack_tuple(builder, args[1]), shape, strict=True)]  # fmt: skip
        strides = [_WORD(itemsize)]
        for length in lengths[:0:-1]:
            strides.insert(0, builder.mul(strides[0], length))
        array = context.make_array(kind)(context, builder)
        data = builder.inttoptr(args[0], array.data.type)
        populate_array(array, data=data, shape=lengths, strides=strides, itemsize=itemsize, meminfo=None)
        return array._getvalue()

    return kind(types.int64, shape if isinstance(shape, types.BaseTuple) else types.intp, dtype), generate


array_at: Any = intrinsic(_array_at_code)
"""``array_at(address, shape, dtype)``: the memory at an address as a C-contiguous array, without reference counting."""


@jit(helper=True, inline=False)
def words(count: int) -> Any:
    """An array of so many int64, undefined."""
    return np.empty(count, np.int64)


@jit(helper=True, inline=False)
def word_table(rows: int, columns: int) -> Any:
    """A 2-dimensional array of int64, undefined."""
    return np.empty((rows, columns), np.int64)


@jit(helper=True, inline=False)
def zero_words(count: int) -> Any:
    """An array of so many int64, all 0."""
    zeros = words(count)
    for i in range(count):
        zeros[i] = 0
    return zeros


@jit(helper=True)
def uncounted(array: Any) -> Any:
    """The same int64 array without reference counting, as its atomic instructions cost more than the work itself.

    For passing on to other compiled functions; ``array`` must outlive it.
    """
    return array_at(array.ctypes.data, array.shape, np.int64)


@jit(helper=True)
def keep_alive(array: Any) -> None:
    """Keep an array that is used by address until here: otherwise Numba frees it after its last use by name."""
    array[:0] = 0


# ----------------------------------------------------------------------------------------------------- reference counts


def _incref_code(typing: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        owner = context.make_array(array)(context, builder, args[0]).meminfo
        # The reference count is the first word. Numba's own function would not do: some versions of Numba prune its
        # increment together with a decrement, unaware that the reference lives on.
        builder.atomic_rmw("add", builder.bitcast(owner, _WORD.as_pointer()), _WORD(1), "monotonic")
        return builder.ptrtoint(owner, _WORD)

    return types.int64(array), generate


def _decref_code(typing: Any, owner: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # Numba's own function would not do, either: before 0.66, it is removed from functions that allocate nothing.
        owner = builder.inttoptr(args[0], _BYTES)
        before = builder.atomic_rmw("sub", builder.bitcast(owner, _WORD.as_pointer()), _WORD(1), "acq_rel")
        with builder.if_then(builder.icmp_unsigned("==", before, _WORD(1)), likely=True):
            kind = ir.FunctionType(ir.VoidType(), [_BYTES])
            release = cgutils.get_or_insert_function(builder.module, kind, "NRT_MemInfo_call_dtor")
            builder.call(release, [owner])
        return context.get_dummy_value()

    return types.void(types.int64), generate


incref: Any = intrinsic(_incref_code)
"""Keep an array's memory after the end of the worker that made it; pass the result to ``decref``, once."""

decref: Any = intrinsic(_decref_code)


# -------------------------------------------------------------------------------------------------------------- atomics


def _exchange_code(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = builder.inttoptr(args[0], _WORD.as_pointer())
        return builder.atomic_rmw("xchg", word, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


exchange: Any = intrinsic(_exchange_code)
"""``exchange(address, value)``: store an int64 and return the one before, atomically."""
