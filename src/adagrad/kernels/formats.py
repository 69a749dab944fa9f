"""How a kernel reads and writes memory it knows by address: element formats, pointers, prefetch.

A kernel is specialised by a token for each operand, a zero-size array whose dtype names the element's format:
float32 and float64 stand for themselves, ``uint16`` for float16 and ``int16`` for bfloat16.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from adagrad.kernels.numba_jit import jit

TOKENS = {
    "float32": np.empty(0, np.float32),
    "float64": np.empty(0, np.float64),
    "float16": np.empty(0, np.uint16),
    "bfloat16": np.empty(0, np.int16),
}
"""The token of each element format."""


def _pointer_code(typing: Any, address: Any, token: Any) -> Any:
    """A pointer to elements of the token's dtype at ``address``; None stays None."""
    if isinstance(token, types.NoneType):
        return types.none(address, token), lambda context, builder, sig, args: context.get_dummy_value()

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(token.dtype)(address, token), generate


pointer: Any = intrinsic(_pointer_code)


def _prefetch_code(typing: Any, address: Any) -> Any:
    """Ask for the cache line at ``address``, to be written soon."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [builder.inttoptr(args[0], byte), word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_prefetch_code)


def _native_half() -> bool:
    """Whether the processor that Numba compiles for converts float16 by an instruction."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return False
    machine = llvm.get_process_triple().split("-")[0]
    if machine in ("aarch64", "arm64"):
        return True
    return bool(llvm.get_host_cpu_features().get("f16c", False))


def _half_to_float_code(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


_half_to_float: Any = intrinsic(_half_to_float_code)


def _float_to_half_code(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


_float_to_half: Any = intrinsic(_float_to_half_code)


def _float_bits_code(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


_float_bits: Any = intrinsic(_float_bits_code)


def _bits_float_code(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


_bits_float: Any = intrinsic(_bits_float_code)


@jit(helper=True)
def _half_to_float_by_integers(bits: Any) -> Any:
    sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
    exponent = np.uint32((bits >> np.uint32(10)) & np.uint32(0x1F))
    mantissa = np.uint32(bits & np.uint32(0x3FF))
    if exponent == 31:  # infinity, NaN
        return _bits_float(np.uint32(sign | np.uint32(0x7F800000) | np.uint32(mantissa << np.uint32(13))))
    if exponent == 0:  # zero, subnormal: mantissa * 2^-24, exact
        value = np.float32(mantissa) * np.float32(5.960464477539063e-08)
        return -value if sign else value
    return _bits_float(
        np.uint32(sign | np.uint32((exponent + np.uint32(112)) << np.uint32(23)) | np.uint32(mantissa << np.uint32(13)))
    )


@jit(helper=True)
def _float_to_half_by_integers(value: Any) -> Any:
    bits = _float_bits(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    bits = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if bits > 0x7F800000:  # NaN, quiet
        return np.uint16(sign | np.uint32(0x7E00) | np.uint32((bits >> np.uint32(13)) & np.uint32(0x3FF)))
    if bits >= 0x477FF000:  # rounds to 65536 or more
        return np.uint16(sign | np.uint32(0x7C00))
    if bits < 0x38800000:  # subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        rounded = _float_bits(_bits_float(bits) + np.float32(0.5))
        return np.uint16(sign | np.uint32(rounded - np.uint32(0x3F000000)))
    odd = np.uint32((bits >> np.uint32(13)) & np.uint32(1))
    bits = np.uint32(bits + np.uint32(0xFFF) + odd - np.uint32(112 << 23))
    return np.uint16(sign | np.uint32(bits >> np.uint32(13)))


@jit(helper=True)
def _bfloat_to_float(bits: Any) -> Any:
    return _bits_float(np.uint32(np.uint32(np.uint16(bits)) << np.uint32(16)))


@jit(helper=True)
def _float_to_bfloat(value: Any) -> Any:
    bits = _float_bits(value)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    quiet = np.uint32(np.uint32(bits >> np.uint32(16)) | np.uint32(0x40))
    return np.int16(rounded if value == value else quiet)


half_to_float, float_to_half = (
    (_half_to_float, _float_to_half) if _native_half() else (_half_to_float_by_integers, _float_to_half_by_integers)
)


def load(elements: Any, i: Any) -> Any:
    """The element ``elements[i]``, read up to the computing dtype."""
    raise TypeError("compiled code only")


def store(elements: Any, i: Any, value: Any) -> Any:
    """Write ``value``, rounded to nearest-even, to ``elements[i]``."""
    raise TypeError("compiled code only")


@overload(load, strict=False)
def _load(elements: Any, i: Any) -> Any:
    if elements.dtype == types.uint16:
        return lambda elements, i: half_to_float(elements[i])
    if elements.dtype == types.int16:
        return lambda elements, i: _bfloat_to_float(elements[i])
    return lambda elements, i: elements[i]


@overload(store, strict=False)
def _store(elements: Any, i: Any, value: Any) -> Any:
    if elements.dtype == types.uint16:

        def write(elements, i, value):  # type: ignore[no-untyped-def]
            elements[i] = float_to_half(value)

    elif elements.dtype == types.int16:

        def write(elements, i, value):  # type: ignore[no-untyped-def]
            elements[i] = _float_to_bfloat(value)

    else:

        def write(elements, i, value):  # type: ignore[no-untyped-def]
            elements[i] = value

    return write


def master_or(weight: Any, master: Any) -> Any:
    """The master copy where there is one, else the weight: what the rule acts on."""
    raise TypeError("compiled code only")


@overload(master_or, strict=False)
def _master_or(weight: Any, master: Any) -> Any:
    if isinstance(master, types.NoneType):
        return lambda weight, master: weight
    return lambda weight, master: master
