"""Blocks: sixteen neighbouring elements, the unit in which every CPU kernel computes.

LLVM decides by heuristics which loops to vectorise, and for loops as short as a row of an embedding it decides
wrongly. A block is an LLVM vector: ``+ - * /`` of blocks, or of a block and a number, are vector instructions on any
processor. Each element is rounded on its own.

A row or a weight may end in a partial block: where a function takes a ``count``, it is None for a whole block, else the
number of elements present. The others are read as 0 and not written.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

from adagrad.kernels.cpu.formats import Elements, computing, narrow, set_alias_scope, widen
from adagrad.rule import LANES

LINE = 64
"""Bytes of a cache line."""

_bit, _int32, _int64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


class Block(types.Type):  # type: ignore[misc]
    """LANES numbers of the computing dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Block({dtype})")


@register_model(Block)
class _BlockModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_data_type(), LANES))


def _name(kind: Any) -> str:
    """A type as spelt in the names of LLVM's intrinsics."""
    return f"v{kind.count}{_name(kind.element)}" if isinstance(kind, ir.VectorType) else str(kind.intrinsic_name)


def _intrinsic(builder: Any, name: str, form: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, form, name)


# ----------------------------------------------------------------------------------------------------------- arithmetic


def _splat(builder: Any, value: Any) -> Any:
    """A number repeated in every lane; a block as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    nothing = ir.VectorType(value.type, LANES)(ir.Undefined)
    first = builder.insert_element(nothing, value, _int32(0))
    return builder.shuffle_vector(first, nothing, ir.VectorType(_int32, LANES)([0] * LANES))


def _define(symbol: Any, instruction: str) -> None:
    class Operation(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            blocks = [arg for arg in args if isinstance(arg, Block)]
            return signature(blocks[0], *args) if blocks and len(args) == 2 else None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right = (_splat(builder, value) for value in args)
        return getattr(builder, instruction)(left, right)

    infer_global(symbol)(Operation)
    for left, right in ((Block, Block), (Block, types.Float), (types.Float, Block)):
        lower_builtin(symbol, left, right)(generate)


for _symbol, _instruction in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _define(getattr(operator, _symbol), _instruction)


def _sqrt_code(typing: Any, value: Any) -> Any:
    """The square root of a block or a number, correctly rounded."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        sqrt = _intrinsic(builder, f"llvm.sqrt.{_name(kind)}", ir.FunctionType(kind, [kind]))
        return builder.call(sqrt, args)

    return value(value), generate


def _clamp_code(typing: Any, value: Any, bound: Any) -> Any:
    """The block ``value`` clamped to [-bound, bound], lane by lane; NaN stays NaN."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, above = args[0], _splat(builder, args[1])
        below = builder.fneg(above)
        value = builder.select(builder.fcmp_ordered(">", value, above), above, value)
        return builder.select(builder.fcmp_ordered("<", value, below), below, value)

    return value(value, bound), generate


def _broadcast_code(typing: Any, number: Any) -> Any:
    """A block with ``number`` in every lane."""
    return Block(number)(number), lambda context, builder, sig, args: _splat(builder, args[0])


def _constant_code(typing: Any, elements: Any, value: Any) -> Any:
    """The integer ``value`` in the computing dtype of ``elements``, rounded to nearest-even."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[1], context.get_value_type(sig.return_type))

    return computing(elements.dtype)(elements, types.intp), generate


def _keep_first_code(typing: Any, block: Any, count: Any) -> Any:
    """A block with all lanes but the first ``count`` set to 0."""
    if isinstance(count, types.NoneType):
        return block(block, count), lambda context, builder, sig, args: args[0]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_mask(builder, args[1]), args[0], args[0].type(None))

    return block(block, types.intp), generate


def _sum_by_halves_code(typing: Any, block: Any) -> Any:
    """The sum of a block by halves: the right half is added to the left one until one number is left."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes, half = args[0], LANES // 2
        while half > 0:
            order = ir.VectorType(_int32, half)
            left, right = (
                builder.shuffle_vector(lanes, lanes, order(list(range(first, first + half)))) for first in (0, half)
            )
            lanes, half = builder.fadd(left, right), half // 2
        return builder.extract_element(lanes, _int32(0))

    return block.dtype(block), generate


sqrt: Any = intrinsic(_sqrt_code)
clamp: Any = intrinsic(_clamp_code)
broadcast: Any = intrinsic(_broadcast_code)
constant: Any = intrinsic(_constant_code)
keep_first: Any = intrinsic(_keep_first_code)
sum_by_halves: Any = intrinsic(_sum_by_halves_code)


# --------------------------------------------------------------------------------------------------------------- memory


def _vector_at(builder: Any, elements: Any, i: Any) -> Any:
    """A pointer to the vector that begins at ``elements[i]``, and the type of that vector."""
    kind = ir.VectorType(elements.type.pointee, LANES)
    return builder.bitcast(builder.gep(elements, [i]), kind.as_pointer()), kind


def _mask(builder: Any, count: Any) -> Any:
    """One bit per lane, set in the first ``count``."""
    numbers = ir.VectorType(_int64, LANES)(list(range(LANES)))
    return builder.icmp_signed("<", numbers, _splat(builder, count))


def _load_block_code(typing: Any, elements: Any, i: Any, count: Any) -> Any:
    """The block ``elements[i:i + LANES]`` or its first ``count``, widened to the computing dtype."""
    is_whole = isinstance(count, types.NoneType)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place, kind = _vector_at(builder, args[0], args[1])
        align = context.get_abi_sizeof(kind.element)
        if is_whole:
            bits = builder.load(place, align=align)
        else:
            form = ir.FunctionType(kind, [place.type, _int32, ir.VectorType(_bit, LANES), kind])
            masked_load = _intrinsic(builder, f"llvm.masked.load.{_name(kind)}.p0", form)
            bits = builder.call(masked_load, [place, _int32(align), _mask(builder, args[2]), kind(None)])
        set_alias_scope(builder.module, bits, elements.role)
        return widen(context, builder, elements.dtype, bits)

    return Block(computing(elements.dtype))(elements, types.intp, count if is_whole else types.intp), generate


def _store_block_code(typing: Any, elements: Any, i: Any, block: Any, count: Any) -> Any:
    """Write a block, or its first ``count`` elements, rounded to nearest-even, to ``elements[i:i + LANES]``."""
    is_whole = isinstance(count, types.NoneType)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place, kind = _vector_at(builder, args[0], args[1])
        bits, align = narrow(context, builder, elements.dtype, args[2]), context.get_abi_sizeof(kind.element)
        if is_whole:
            written = builder.store(bits, place, align=align)
        else:
            form = ir.FunctionType(ir.VoidType(), [kind, place.type, _int32, ir.VectorType(_bit, LANES)])
            masked_store = _intrinsic(builder, f"llvm.masked.store.{_name(kind)}.p0", form)
            written = builder.call(masked_store, [bits, place, _int32(align), _mask(builder, args[3])])
        set_alias_scope(builder.module, written, elements.role)
        return context.get_dummy_value()

    return types.void(elements, types.intp, block, count if is_whole else types.intp), generate


load_block: Any = intrinsic(_load_block_code)
store_block: Any = intrinsic(_store_block_code)


def _prefetch_code(typing: Any, elements: Any, i: Any) -> Any:
    """Prefetch the block ``elements[i:i + LANES]``; a no-op if ``elements`` is None."""
    if not isinstance(elements, Elements):
        return types.void(elements, i), lambda context, builder, sig, args: context.get_dummy_value()

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _int32, _int32, _int32])
        prefetch = _intrinsic(builder, "llvm.prefetch.p0", kind)
        place = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        for offset in range(0, LANES * context.get_abi_sizeof(args[0].type.pointee), LINE):
            # Not for writing what is only read: workers would take shared cache lines from each other.
            to_write = _int32(int(elements.role != "grad"))
            builder.call(prefetch, [builder.gep(place, [_int64(offset)]), to_write, _int32(3), _int32(1)])
        return context.get_dummy_value()

    return types.void(elements, types.intp), generate


prefetch: Any = intrinsic(_prefetch_code)
