"""Vectors of 64 bytes inside Numba kernels: what LLVM's loop vectoriser does not find in a gather, said explicitly.

A vector holds `LANES` numbers of the dtype of the array that it is loaded from. Here are loading and storing,
arithmetic, ``exp``, sums and maxima of lanes, and copies; `numba_products` and `numba_tile_products` multiply rows
with matrices. Positions are int64 offsets into flat arrays; nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

from ssa_framework.ops.numba_llvm import (
    VectorType,
    constant,
    emit_fma,
    emit_larger,
    emit_load,
    emit_splat,
    emit_store,
    intrinsic,
    ir_type,
    lane_mask,
    pointer_to,
    pointers_at,
)

LANES = {np.dtype(np.float32): 16, np.dtype(np.float64): 8}
"""Numbers in a vector; widths of tables are multiples of it."""


@intrinsic
def lanes(typingctx: Any, array: Any) -> Any:
    """How many numbers of ``array`` a vector holds, as a constant of the compiled code."""
    count = VectorType(array.dtype).lanes

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.int64, count)

    return types.int64(array), codegen


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + LANES]``."""
    vector = VectorType(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_load(builder, vector, pointer_to(context, builder, array, args[0]), args[1])

    return vector(array, types.int64), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """``array[offset : offset + LANES] = value``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_store(builder, value, args[2], pointer_to(context, builder, array, args[0]), args[1])
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


@intrinsic
def splat(typingctx: Any, array: Any, number: Any) -> Any:
    """A vector of the dtype of ``array``, every lane ``number``."""
    vector = VectorType(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_splat(builder, ir_type(vector), args[1])

    return vector(array, array.dtype), codegen


def _elementwise(build: Callable[..., ir.Value], operands: int, doc: str) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return build(builder, *args)

    def binary(typingctx: Any, a: Any, b: Any) -> Any:
        return a(a, b), codegen

    def ternary(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        return a(a, b, c), codegen

    typer = binary if operands == 2 else ternary
    typer.__doc__ = doc
    return intrinsic(typer)


add = _elementwise(lambda builder, a, b: builder.fadd(a, b), 2, "a + b")
sub = _elementwise(lambda builder, a, b: builder.fsub(a, b), 2, "a - b")
mul = _elementwise(lambda builder, a, b: builder.fmul(a, b), 2, "a · b")
fma = _elementwise(emit_fma, 3, "a · b + c")
maximum = _elementwise(emit_larger, 2, "The larger one in each lane; b if a is NaN.")


def _reduction(combine: Callable[..., ir.Value], doc: str) -> Any:
    def typer(typingctx: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value, half = args[0], vector.lanes // 2
            while half:
                swapped = builder.shuffle_vector(value, value, lane_mask([lane ^ half for lane in range(vector.lanes)]))
                value = combine(builder, value, swapped)
                half //= 2
            return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

        return vector.scalar(vector), codegen

    typer.__doc__ = doc
    return intrinsic(typer)


sum_lanes = _reduction(lambda builder, a, b: builder.fadd(a, b), "The sum of all lanes.")
max_lanes = _reduction(emit_larger, "The largest lane.")


@intrinsic
def only_lanes(typingctx: Any, vector: Any, low: Any, high: Any, otherwise: Any) -> Any:
    """The lanes t with low ≤ t < high of a vector; the others become ``otherwise``."""
    int32 = types.int32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = ir.VectorType(ir.IntType(32), vector.lanes)
        count = lane_mask(list(range(vector.lanes)))
        inside = builder.and_(
            builder.icmp_signed(">=", count, emit_splat(builder, numbers, args[1])),
            builder.icmp_signed("<", count, emit_splat(builder, numbers, args[2])),
        )
        return builder.select(inside, args[0], emit_splat(builder, ir_type(vector), args[3]))

    return vector(vector, int32, int32, vector.scalar), codegen


# exp(x) = 2^n · exp(r), n = round(x / ln 2), r = x - n·ln 2 with ln 2 in two pieces. Single: Cephes' expf
# (Moshier), below 1 ulp. Double: the Taylor series, whose first dropped term is 4e-18 at |r| = ln(2) / 2.
_EXP = {
    32: {
        "least": -87.33654,
        "most": 88.37626,
        "round": 1.5 * 2.0**23,
        "one": 127 << 23,
        "shift": 23,
        "ln2": (0.693359375, -2.12194440e-4),
        "series": (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0),
    },
    64: {
        "least": -708.39,
        "most": 709.0,
        "round": 1.5 * 2.0**52,
        "one": 1023 << 52,
        "shift": 52,
        "ln2": (6.93145751953125e-1, 1.42860682030941723212e-6),
        "series": tuple(1.0 / float(np.prod(np.arange(1, n + 1, dtype=np.float64))) for n in range(13, -1, -1)),
    },
}


@intrinsic
def exp(typingctx: Any, vector: Any) -> Any:
    """exp of each lane; 0 where the result would be subnormal, NaN stays NaN."""
    options: dict[str, Any] = _EXP[vector.scalar.bitwidth]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        type_, int_type = ir_type(vector), ir.VectorType(ir.IntType(vector.scalar.bitwidth), vector.lanes)

        def number(value: float) -> ir.Constant:
            return constant(type_, value)

        x = args[0]
        vanishes = builder.fcmp_ordered("<", x, number(options["least"]))
        x = builder.select(vanishes, number(0.0), x)
        x = builder.select(builder.fcmp_ordered(">", x, number(options["most"])), number(options["most"]), x)
        # adding 1.5 · 2^23 leaves the rounded quotient in the lowest bits, without a conversion
        shifted = emit_fma(builder, x, number(1.0 / np.log(2.0)), number(options["round"]))
        n = builder.fsub(shifted, number(options["round"]))
        r = x
        for piece in options["ln2"]:
            r = emit_fma(builder, n, number(-piece), r)
        series = options["series"]
        result = number(series[0])
        for coefficient in series[1:]:
            result = emit_fma(builder, result, r, number(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, int_type), constant(int_type, options["shift"]))
        power = builder.bitcast(builder.add(exponent, constant(int_type, options["one"])), type_)
        return builder.select(vanishes, number(0.0), builder.fmul(result, power))

    return vector(vector), codegen


@intrinsic
def copy_numbers(typingctx: Any, source: Any, at: Any, target: Any, to: Any, count: Any) -> Any:
    """``target[to : to + count] = source[at : at + count]``; they must not overlap."""
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        begin, place = pointers_at(context, builder, signature, args, 0, 2)
        cgutils.raw_memcpy(builder, place, begin, args[4], source.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, int64, target, int64, int64), codegen


@intrinsic
def copy_keys(typingctx: Any, source: Any, at: Any, target: Any, to: Any, bound: Any) -> Any:
    """Copy 16 int32 from ``source[at]`` to ``target[to]``; bit t of the result: number t lies in 0 .. bound - 1."""
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        keys = ir.VectorType(i32, 16)
        places = [
            builder.bitcast(place, keys.as_pointer()) for place in pointers_at(context, builder, signature, args, 0, 2)
        ]
        numbers = builder.load(places[0], align=4)
        builder.store(numbers, places[1], align=4)
        inside = builder.icmp_unsigned("<", numbers, emit_splat(builder, keys, builder.trunc(args[4], i32)))
        return builder.zext(builder.bitcast(inside, ir.IntType(16)), i64)

    return int64(source, int64, target, int64, int64), codegen


@intrinsic
def set_of_numbers(typingctx: Any, numbers: Any, at: Any, first: Any) -> Any:
    """Which of first .. first + 63 are among the 16 int32 from ``numbers[at]``: bit t of the result is first + t."""
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        whole = ir.VectorType(i32, 16)

        def number(value: int) -> ir.Constant:
            return ir.Constant(whole, [value] * 16)

        (begin,) = pointers_at(context, builder, signature, args, 0)
        found = builder.load(builder.bitcast(begin, whole.as_pointer()), align=4)
        apart = builder.sub(found, emit_splat(builder, whole, builder.trunc(args[2], i32)))
        words = []
        for bit in (0, 32):
            place = builder.sub(apart, number(bit))
            inside = builder.icmp_unsigned("<", place, number(32))
            bits = builder.shl(number(1), builder.select(inside, place, number(0)))
            word = builder.select(inside, bits, number(0))
            for half in (8, 4, 2, 1):
                lanes = range(2 * half)
                swapped = builder.shuffle_vector(word, word, lane_mask([lane ^ half for lane in lanes]))
                word = builder.or_(builder.shuffle_vector(word, word, lane_mask(list(lanes))), swapped)
            words.append(builder.zext(builder.extract_element(word, ir.Constant(i32, 0)), i64))
        return builder.or_(words[0], builder.shl(words[1], ir.Constant(i64, 32)))

    return int64(numbers, int64, int64), codegen


@intrinsic
def replace_lanes(typingctx: Any, vector: Any, bits: Any, number: Any) -> Any:
    """Lane t becomes ``number`` where bit t of ``bits`` is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        chosen = builder.trunc(args[1], ir.IntType(vector.lanes))
        chosen = builder.bitcast(chosen, ir.VectorType(ir.IntType(1), vector.lanes))
        return builder.select(chosen, emit_splat(builder, ir_type(vector), args[2]), args[0])

    return vector(vector, types.int64, vector.scalar), codegen


@intrinsic
def transpose_tile(
    typingctx: Any, table: Any, first: Any, width: Any, rows: Any, at: Any, count: Any, out: Any, to: Any, stride: Any
) -> Any:
    """A tile of `LANES` numbers of `LANES` rows, transposed.

    ``out[to + i * stride + t] = table[first + rows[at + t] * width + i]`` for t below ``count`` (at least 1); further
    columns repeat the last one.
    """
    vector, int64 = VectorType(table.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, index, target = pointers_at(context, builder, signature, args, 0, 3, 6)
        i64, lanes = ir.IntType(64), vector.lanes
        last = builder.sub(args[5], ir.Constant(i64, 1))
        tile = []
        for lane in range(lanes):
            number = ir.Constant(i64, lane)
            number = builder.select(builder.icmp_signed("<", number, last), number, last)
            row = builder.sext(builder.load(builder.gep(index, [number])), i64)
            tile.append(emit_load(builder, vector, base, builder.mul(row, args[2])))
        low = [lane // 2 + (lane % 2) * lanes for lane in range(lanes)]
        high = [place + lanes // 2 for place in low]
        for _ in range(lanes.bit_length() - 1):  # shuffling the rows like cards as often as this transposes them
            halves = list(zip(tile[: lanes // 2], tile[lanes // 2 :], strict=True))
            tile = [builder.shuffle_vector(a, b, lane_mask(part)) for a, b in halves for part in (low, high)]
        for i, line in enumerate(tile):
            emit_store(builder, vector, line, target, builder.mul(ir.Constant(i64, i), args[8]))
        return context.get_dummy_value()

    return types.void(table, int64, int64, rows, int64, int64, out, int64, int64), codegen


@intrinsic
def place_of_largest(typingctx: Any, numbers: Any, start: Any, count: Any) -> Any:
    """The first of the largest of ``numbers[start : start + count]``, int32, count a multiple of 16, from ``start``."""
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), 16)
        (begin,) = pointers_at(context, builder, signature, args, 0)
        zero, step = ir.Constant(i64, 0), ir.Constant(i64, 16)

        def load_at(place: ir.Value) -> ir.Value:
            return builder.load(builder.bitcast(builder.gep(begin, [place]), vector.as_pointer()), align=4)

        def larger(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        best = cgutils.alloca_once(builder, vector)
        builder.store(load_at(zero), best)
        with cgutils.for_range_slice(builder, step, args[2], step, i64, inc=True) as (at, _):
            builder.store(larger(builder.load(best), load_at(at)), best)
        largest = builder.load(best)
        for half in (8, 4, 2, 1):
            largest = larger(
                largest, builder.shuffle_vector(largest, largest, lane_mask([lane ^ half for lane in range(16)]))
            )
        found = cgutils.alloca_once_value(builder, zero)
        first, down = builder.sub(args[2], step), ir.Constant(i64, -16)
        with cgutils.for_range_slice(builder, first, down, down, i64, inc=False) as (at, _):
            same = builder.icmp_signed("==", load_at(at), largest)
            bits = builder.zext(builder.bitcast(same, ir.IntType(16)), i64)
            place = builder.add(at, builder.cttz(bits, ir.Constant(ir.IntType(1), 0)))
            here = builder.icmp_unsigned("!=", bits, zero)
            builder.store(builder.select(here, place, builder.load(found)), found)
        return builder.load(found)

    return int64(numbers, int64, int64), codegen
