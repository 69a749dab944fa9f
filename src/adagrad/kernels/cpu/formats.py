"""How a kernel reads and writes memory by address: element formats, pointers, single elements.

A kernel is specialised by a token for each operand, a zero-size array whose dtype names the element's format:
float32 and float64 stand for themselves, ``uint16`` for float16 and ``int16`` for bfloat16.

A pointer also knows its operand's role. What a call writes to shares no byte with its other operands (this is checked
beforehand), and LLVM is told so: otherwise every row of a row-sparse update would compare addresses at run time.

The conversions of float16 and bfloat16 work on one number or on a vector of them, see
:mod:`adagrad.kernels.cpu.blocks`.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from adagrad.kernels.runtime.numba_jit import IS_ARM

TOKENS: dict[str, Any] = {
    "float32": np.empty(0, np.float32),
    "float64": np.empty(0, np.float64),
    "float16": np.empty(0, np.uint16),
    "bfloat16": np.empty(0, np.int16),
}
"""The token of each element format."""

ROLES = ("weight", "grad", "history", "master", "sum")


# ------------------------------------------------------------------------------------------------------------- pointers


class Elements(types.Type):  # type: ignore[misc]
    """A pointer to elements of a token's dtype that play one role in an update."""

    def __init__(self, dtype: Any, role: str) -> None:
        self.dtype, self.role = dtype, role
        super().__init__(f"Elements({dtype}, {role})")


@register_model(Elements)
class _ElementsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, dmm.lookup(fe_type.dtype).get_data_type().as_pointer())


def _pointer_code(typing: Any, address: Any, token: Any, role: Any) -> Any:
    """A pointer to elements of the token's dtype at ``address``; None if the token is None."""
    if isinstance(token, types.NoneType):
        return types.none(address, token, role), lambda context, builder, sig, args: context.get_dummy_value()

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return Elements(token.dtype, role.literal_value)(address, token, role), generate


pointer: Any = intrinsic(prefer_literal=True)(_pointer_code)


def set_alias_scope(module: Any, access: Any, role: str) -> None:
    """Tell LLVM that an access to one role's elements touches no other role's."""
    domain = module.add_metadata(["adagrad"])
    scopes = {name: module.add_metadata([f"adagrad {name}", domain]) for name in ROLES}
    access.set_metadata("alias.scope", module.add_metadata([scopes[role]]))
    access.set_metadata("noalias", module.add_metadata([scopes[name] for name in ROLES if name != role]))


# ------------------------------------------------------------------------------------------- elements, read and written


def computing(dtype: Any) -> Any:
    """The type of numbers read from elements of a token's dtype."""
    return types.float32 if dtype in (types.uint16, types.int16) else dtype


def widen(context: Any, builder: Any, dtype: Any, bits: Any) -> Any:
    """``bits``, read from elements of a token's dtype, as numbers of the computing dtype."""
    if dtype == types.uint16:
        return _half_to_float(context, builder, bits)
    return _bfloat_to_float(context, builder, bits) if dtype == types.int16 else bits


def narrow(context: Any, builder: Any, dtype: Any, value: Any) -> Any:
    """``value`` as it is written to elements of a token's dtype, rounded to nearest-even."""
    if dtype == types.uint16:
        return _float_to_half(context, builder, value)
    return _float_to_bfloat(context, builder, value) if dtype == types.int16 else value


def _load_code(typing: Any, elements: Any, i: Any) -> Any:
    """The element ``elements[i]``, widened to the computing dtype."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.load(builder.gep(args[0], [args[1]]))
        set_alias_scope(builder.module, bits, elements.role)
        return widen(context, builder, elements.dtype, bits)

    return computing(elements.dtype)(elements, i), generate


def _store_code(typing: Any, elements: Any, i: Any, value: Any) -> Any:
    """Write ``value``, rounded to nearest-even, to ``elements[i]``."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = narrow(context, builder, elements.dtype, args[2])
        set_alias_scope(builder.module, builder.store(bits, builder.gep(args[0], [args[1]])), elements.role)
        return context.get_dummy_value()

    return types.void(elements, i, value), generate


load: Any = intrinsic(_load_code)
store: Any = intrinsic(_store_code)


def master_or(weight: Any, master: Any) -> Any:
    """The master copy where there is one, else the weight: what the rule acts on."""
    raise TypeError("compiled code only")


@overload(master_or, strict=False)
def _master_or(weight: Any, master: Any) -> Any:
    if isinstance(master, types.NoneType):
        return lambda weight, master: weight
    return lambda weight, master: master


# ------------------------------------------------------------------------------------ float16 and bfloat16 as LLVM code

_int32, _int16, _half, _float = ir.IntType(32), ir.IntType(16), ir.HalfType(), ir.FloatType()


def _as(kind: Any, like: Any) -> Any:
    """The type ``kind``, or a vector of it as long as ``like``."""
    return ir.VectorType(kind, like.type.count) if isinstance(like.type, ir.VectorType) else kind


def _constant(value: int, like: Any) -> Any:
    """A 32-bit integer, or a vector of it as long as ``like``."""
    kind = _as(_int32, like)
    return kind([value] * kind.count) if isinstance(kind, ir.VectorType) else kind(value)


def _bfloat_to_float(context: Any, builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, _as(_int32, bits)), _constant(16, bits))
    return builder.bitcast(wide, _as(_float, bits))


def _float_to_bfloat(context: Any, builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _as(_int32, value))
    odd = builder.and_(builder.lshr(bits, _constant(16, value)), _constant(1, value))
    rounded = builder.add(builder.add(bits, _constant(0x7FFF, value)), odd)
    quiet = builder.or_(bits, _constant(0x400000, value))
    is_nan = builder.fcmp_unordered("uno", value, value)
    high = builder.lshr(builder.select(is_nan, quiet, rounded), _constant(16, value))
    return builder.trunc(high, _as(_int16, value))


def _half_to_float(context: Any, builder: Any, bits: Any) -> Any:
    if NATIVE_HALF:
        return builder.fpext(builder.bitcast(bits, _as(_half, bits)), _as(_float, bits))
    one = functools.partial(context.compile_internal, builder, half_to_float_by_integers, types.float32(types.uint16))
    return _each(builder, bits, _float, one)


def _float_to_half(context: Any, builder: Any, value: Any) -> Any:
    if NATIVE_HALF:
        return builder.bitcast(builder.fptrunc(value, _as(_half, value)), _as(_int16, value))
    one = functools.partial(context.compile_internal, builder, float_to_half_by_integers, types.uint16(types.float32))
    return _each(builder, value, _int16, one)


def _each(builder: Any, values: Any, kind: Any, convert: Any) -> Any:
    """``convert([number])`` for a number, or for each one in a vector."""
    if not isinstance(values.type, ir.VectorType):
        return convert([values])
    result = _as(kind, values)(ir.Undefined)
    for i in range(values.type.count):
        result = builder.insert_element(result, convert([builder.extract_element(values, _int32(i))]), _int32(i))
    return result


def _native_half() -> bool:
    """Whether Numba compiles for the host CPU, and this converts float16 by an instruction."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return False
    if IS_ARM:
        return True
    return bool(llvm.get_host_cpu_features().get("f16c", False))


NATIVE_HALF = _native_half()


def _bits_code(typing: Any, value: Any) -> Any:
    """The bits of a float32 as uint32, or the reverse."""
    result = types.uint32 if value == types.float32 else types.float32

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _int32 if result == types.uint32 else _float)

    return result(value), generate


_bits: Any = intrinsic(_bits_code)


def half_to_float_by_integers(bits: Any) -> Any:
    """float16 to float32, for processors that have no instruction for it."""
    sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
    exponent = np.uint32((bits >> np.uint32(10)) & np.uint32(0x1F))
    mantissa = np.uint32(bits & np.uint32(0x3FF))
    if exponent == 31:  # infinity, NaN
        return _bits(np.uint32(sign | np.uint32(0x7F800000) | np.uint32(mantissa << np.uint32(13))))
    if exponent == 0:  # zero, subnormal: mantissa * 2^-24, exact
        value = np.float32(mantissa) * np.float32(5.960464477539063e-08)
        return -value if sign else value
    high = np.uint32((exponent + np.uint32(112)) << np.uint32(23))
    return _bits(np.uint32(sign | high | np.uint32(mantissa << np.uint32(13))))


def float_to_half_by_integers(value: Any) -> Any:
    """float32 to float16, to nearest-even, for processors that have no instruction for it."""
    bits = _bits(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    bits = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if bits > 0x7F800000:  # NaN, quiet
        return np.uint16(sign | np.uint32(0x7E00) | np.uint32((bits >> np.uint32(13)) & np.uint32(0x3FF)))
    if bits >= 0x477FF000:  # rounds to 65536 or more
        return np.uint16(sign | np.uint32(0x7C00))
    if bits < 0x38800000:  # subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        rounded = _bits(np.float32(_bits(bits) + np.float32(0.5)))
        return np.uint16(sign | np.uint32(rounded - np.uint32(0x3F000000)))
    odd = np.uint32((bits >> np.uint32(13)) & np.uint32(1))
    bits = np.uint32(bits + np.uint32(0xFFF) + odd - np.uint32(112 << 23))
    return np.uint16(sign | np.uint32(bits >> np.uint32(13)))
