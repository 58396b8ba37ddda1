# SPDX-License-Identifier: Apache-2.0
"""Eight-lane vectors for numba kernels: explicit SIMD where LLVM's own vectoriser cannot see the loop.

A vector holds 8 lanes of float32 or float64 and lowers to an LLVM vector, so the machine decides the register
(one AVX2 register in float32, two in float64, four NEON ones, ...). Arithmetic operators, `-x`, and the functions
below work on vectors of one type; there are no lane masks as values, only selects and `any_*` tests.

No fast-math flag is ever set: every product and sum rounds as written (`fma` fuses where the machine can), so two
kernels that evaluate the same expression get the same bits.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic, overload, register_model

LANES = 8


class VectorType(types.Type):
    """Numba type of an 8-lane vector of `dtype`."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector{LANES}({dtype})")


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is held as one LLVM vector value."""

    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, _llvm_vector(fe_type.dtype))


def _llvm_vector(dtype: types.Float) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if dtype.bitwidth == 32 else ir.DoubleType(), LANES)


def _llvm_integer_vector(dtype: types.Float) -> ir.VectorType:
    return ir.VectorType(ir.IntType(dtype.bitwidth), LANES)


def _mantissa_bits(dtype: types.Float) -> int:
    return 23 if dtype.bitwidth == 32 else 52


def _splat(builder: ir.IRBuilder, vector: ir.VectorType, value: ir.Value) -> ir.Value:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


def _call(builder: ir.IRBuilder, name: str, vector: ir.VectorType, args: Any) -> ir.Value:
    suffix = f"v{LANES}f{32 if isinstance(vector.element, ir.FloatType) else 64}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * len(args)), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, args)


@intrinsic
def broadcast(typingctx: Any, scalar: Any) -> Any:
    """Vector with `scalar` in every lane."""
    result = VectorType(scalar)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, _llvm_vector(signature.return_type.dtype), args[0])

    return result(scalar), codegen


def _element_pointer(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    pointer = builder.gep(array.data, [args[1]])
    return builder.bitcast(pointer, _llvm_vector(array_type.dtype).as_pointer())


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """Lanes array[index], ..., array[index + 7] of a contiguous 1-D array; no bounds check."""
    result = VectorType(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, signature, args)
        value = builder.load(pointer)
        value.align = signature.return_type.dtype.bitwidth // 8
        return value

    return result(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write the lanes of `vector` to array[index], ..., array[index + 7]; no bounds check."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, signature, args[:2])
        instruction = builder.store(args[2], pointer)
        instruction.align = signature.args[2].dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def pack(typingctx: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """Vector of eight scalars."""
    result = VectorType(a)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = ir.Constant(_llvm_vector(signature.return_type.dtype), ir.Undefined)
        for lane, scalar in enumerate(args):
            value = builder.insert_element(value, scalar, ir.Constant(ir.IntType(32), lane))
        return value

    return result(a, b, c, d, e, f, g, h), codegen


@intrinsic
def load_halves(typingctx: Any, array: Any, low: Any, high: Any) -> Any:
    """Lanes array[low], ..., array[low + 3], array[high], ..., array[high + 3] of a contiguous 1-D array.

    Two loads that need no shuffle, of which the usual processors have one unit.
    """
    result = VectorType(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type = signature.args[0]
        data = context.make_array(array_type)(context, builder, args[0]).data
        half = ir.VectorType(_llvm_vector(array_type.dtype).element, LANES // 2)
        parts = []
        for place in args[1:]:
            part = builder.load(builder.bitcast(builder.gep(data, [place]), half.as_pointer()))
            part.align = array_type.dtype.bitwidth // 8
            parts.append(part)
        return builder.shuffle_vector(*parts, _lane_numbers(list(range(LANES))))

    return result(array, types.intp, types.intp), codegen


@intrinsic
def transpose_halves(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The columns of the two 4 x 4 matrices whose rows are the low and the high halves, as a tuple of four vectors."""
    result = types.UniTuple(a, LANES // 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = _exchanged(builder, list(args), LANES // 2)
        return context.make_tuple(builder, signature.return_type, rows)

    return result(a, b, c, d), codegen


@intrinsic
def transpose(typingctx: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """The columns of the 8 x 8 matrix whose rows are given, as a tuple of eight vectors."""
    result = types.UniTuple(a, LANES)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, signature.return_type, _exchanged(builder, list(args), LANES))

    return result(a, b, c, d, e, f, g, h), codegen


def _exchanged(builder: ir.IRBuilder, rows: list[ir.Value], size: int) -> list[ir.Value]:
    """`rows` with every block of `size` x `size` lanes transposed."""
    width = 1
    while width < size:  # exchange blocks of `width` between rows that are `width` apart
        keep = [lane if not lane & width else lane - width + LANES for lane in range(LANES)]
        move = [lane + width if not lane & width else lane + LANES for lane in range(LANES)]
        for k in (k for k in range(size) if not k & width):
            pair = rows[k], rows[k + width]
            rows[k], rows[k + width] = (builder.shuffle_vector(*pair, _lane_numbers(lanes)) for lanes in (keep, move))
        width *= 2
    return rows


@intrinsic
def repeated_thrice(typingctx: Any, a: Any, first: Any) -> Any:
    """Eight of the 24 numbers that are the lanes of `a`, three times each, from number `first` (a literal) on."""
    if not isinstance(first, types.IntegerLiteral):
        raise RequireLiteralValue("first must be a literal")
    start = first.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = [(start + lane) // 3 for lane in range(LANES)]
        return builder.shuffle_vector(args[0], args[0], _lane_numbers(lanes))

    return a(a, first), codegen


@intrinsic
def cycle_of_three(typingctx: Any, a: Any, b: Any, c: Any, first: Any) -> Any:
    """Eight of the endless row of scalars a, b, c, a, b, c, ..., from number `first` (a literal) on."""
    if not isinstance(first, types.IntegerLiteral):
        raise RequireLiteralValue("first must be a literal")
    start = first.literal_value
    result = VectorType(a)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = [_splat(builder, _llvm_vector(signature.return_type.dtype), scalar) for scalar in args[:3]]
        turns = [(start + lane) % 3 for lane in range(LANES)]
        two = [lane + LANES * (turn == 1) for lane, turn in enumerate(turns)]
        three = [lane + LANES * (turn == 2) for lane, turn in enumerate(turns)]
        mixed = builder.shuffle_vector(vectors[0], vectors[1], _lane_numbers(two))
        return builder.shuffle_vector(mixed, vectors[2], _lane_numbers(three))

    return result(a, b, c, first), codegen


@intrinsic
def prefetch_row(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for array[index] of a contiguous 2-D array with rows of at most two cache lines; any index is harmless."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_value = context.make_array(signature.args[0])(context, builder, args[0])
        columns = cgutils.unpack_tuple(builder, array_value.shape)[1]
        first = builder.mul(args[1], columns)
        last = builder.add(first, builder.sub(columns, ir.Constant(columns.type, 1)))
        for place in (first, last):
            _prefetch(builder, builder.gep(array_value.data, [place]), is_write=False)
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def prefetch_to_write(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index] of a contiguous 1-D array that will be written; any index is harmless."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_value = context.make_array(signature.args[0])(context, builder, args[0])
        _prefetch(builder, builder.gep(array_value.data, [args[1]]), is_write=True)
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def _prefetch(builder: ir.IRBuilder, pointer: ir.Value, *, is_write: bool) -> None:
    byte_pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte_pointer] + [number] * 3), "llvm.prefetch.p0"
    )
    locality, data = 3, 1
    flags = (ir.Constant(number, k) for k in (int(is_write), locality, data))
    builder.call(function, [builder.bitcast(pointer, byte_pointer), *flags])


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """A * b + c, fused where the machine can do it cheaply."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "fmuladd", _llvm_vector(signature.return_type.dtype), args)

    return a(a, b, c), codegen


@intrinsic
def square_root(typingctx: Any, a: Any) -> Any:
    """Square root of every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "sqrt", _llvm_vector(signature.return_type.dtype), args)

    return a(a), codegen


@intrinsic
def round_to_integer(typingctx: Any, a: Any) -> Any:
    """Lanes rounded to the nearest integer, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "rint", _llvm_vector(signature.return_type.dtype), args)

    return a(a), codegen


@intrinsic
def power_of_two(typingctx: Any, a: Any) -> Any:
    """2 ** a for integral lanes within the exponent range of normal numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dtype = signature.return_type.dtype
        integers = _llvm_integer_vector(dtype)
        bias = 127 if dtype.bitwidth == 32 else 1023
        exponent = builder.fptosi(args[0], integers)
        biased = builder.add(exponent, ir.Constant(integers, [bias] * LANES))
        bits = builder.shl(biased, ir.Constant(integers, [_mantissa_bits(dtype)] * LANES))
        return builder.bitcast(bits, _llvm_vector(dtype))

    return a(a), codegen


def _make_select(predicate: str) -> Any:
    @intrinsic
    def select(typingctx: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(predicate, args[0], args[1]), args[2], args[3])

        return x(a, b, x, y), codegen

    return select


select_ge = _make_select(">=")
"""select_ge(a, b, x, y): per lane x where a >= b, else y."""
select_gt = _make_select(">")
"""select_gt(a, b, x, y): per lane x where a > b, else y."""


@intrinsic
def scale_by_power(typingctx: Any, a: Any, shifted: Any) -> Any:
    """A * 2 ** n where the lowest bits of `shifted` are the integer n; the result must be a normal number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dtype = signature.return_type.dtype
        integers = _llvm_integer_vector(dtype)
        bits, power = (builder.bitcast(value, integers) for value in args)
        exponent = builder.shl(power, ir.Constant(integers, [_mantissa_bits(dtype)] * LANES))
        return builder.bitcast(builder.add(bits, exponent), _llvm_vector(dtype))

    return a(a, shifted), codegen


@intrinsic
def zeros_like(typingctx: Any, a: Any) -> Any:
    """Vector of zeros of a's type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_llvm_vector(signature.return_type.dtype), [0.0] * LANES)

    return a(a), codegen


@intrinsic
def minus_magnitude(typingctx: Any, a: Any) -> Any:
    """-|a| of every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fneg(_call(builder, "fabs", _llvm_vector(signature.return_type.dtype), args))

    return a(a), codegen


@intrinsic
def vectors_of(typingctx: Any, array: Any, count: Any) -> Any:
    """Tuple of `count` (a literal) vectors: entry k of a contiguous 1-D array in every lane of the k-th.

    Numbers that inner loops need come from memory in this way: LLVM keeps them as whole vectors, which instructions
    read as operands, while it would build a compile-time constant anew in every turn, by two more instructions each.
    """
    if not isinstance(count, types.IntegerLiteral):
        raise RequireLiteralValue("count must be a literal")
    vector = VectorType(array.dtype)
    result = types.UniTuple(vector, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        places = (builder.gep(data, [ir.Constant(ir.IntType(64), k)]) for k in range(signature.return_type.count))
        values = [_splat(builder, _llvm_vector(array.dtype), builder.load(place)) for place in places]
        return context.make_tuple(builder, signature.return_type, values)

    return result(array, count), codegen


@intrinsic
def any_positive(typingctx: Any, a: Any) -> Any:
    """True when at least one lane is > 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _llvm_vector(signature.args[0].dtype)
        lanes = builder.fcmp_ordered(">", args[0], ir.Constant(vector, [0.0] * LANES))
        bits = builder.bitcast(lanes, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(a), codegen


@intrinsic
def horizontal_sum(typingctx: Any, a: Any) -> Any:
    """Sum of the lanes, as ((0+4)+(2+6)) + ((1+5)+(3+7)): a fixed tree, the same on every machine."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, width = args[0], LANES
        while width > 1:
            half = width // 2
            low, high = (
                builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), half), list(span)))
                for span in (range(half), range(half, width))
            )
            value, width = builder.fadd(low, high), half
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return a.dtype(a), codegen


@intrinsic
def sums_of_eight(typingctx: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """Vector whose lane k is the sum of the lanes of the k-th argument, in the order of `horizontal_sum`.

    Each step adds halves of two vectors: 7 additions for all eight sums, not 24.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, width = list(args), LANES // 2
        while width >= 1:
            # Row k takes the sums of the low and row k + width those of the high halves of what they hold.
            low = [lane + (lane & width and LANES - width) for lane in range(LANES)]
            high = [lane + width if not lane & width else lane + LANES for lane in range(LANES)]
            pairs = [(rows[k], rows[k + width]) for k in range(width)]
            rows = [
                builder.fadd(*(builder.shuffle_vector(*pair, _lane_numbers(lanes)) for lanes in (low, high)))
                for pair in pairs
            ]
            width //= 2
        return rows[0]

    return a(a, b, c, d, e, f, g, h), codegen


@intrinsic
def lowest_bit(typingctx: Any, bits: Any) -> Any:
    """Place of the lowest bit that is set; undefined for 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(word, [word, ir.IntType(1)]), "llvm.cttz.i64"
        )
        return builder.call(function, [args[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(types.int64), codegen


@intrinsic
def num_bits(typingctx: Any, bits: Any) -> Any:
    """How many bits are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [word]), "llvm.ctpop.i64")
        return builder.call(function, args)

    return types.int64(types.int64), codegen


def _lane_numbers(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def _make_binary(operation: str) -> Any:
    @intrinsic
    def binary(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, operation)(args[0], args[1])

        return a(a, b), codegen

    return binary


_ADD, _SUB, _MUL, _DIV = (_make_binary(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


def _bind(function: Any, lowered: Any) -> None:
    # Lambdas without annotations: numba requires the typing and the implementing signature to be identical.
    overload(function)(lambda a, b: (lambda a, b: lowered(a, b)) if isinstance(a, VectorType) and a == b else None)


for _function, _lowered in ((operator.add, _ADD), (operator.sub, _SUB), (operator.mul, _MUL), (operator.truediv, _DIV)):
    _bind(_function, _lowered)
