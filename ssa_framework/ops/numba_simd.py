"""Vectors of 64 bytes inside Numba kernels: what LLVM's loop vectoriser does not find in a gather, said explicitly.

A vector holds `LANES` numbers of the dtype of the array that it is loaded from. LLVM turns each operation into
whatever the machine has (one AVX-512 register, two of AVX2, four of NEON), so nothing here names an instruction set.
Positions are int64 offsets into flat arrays; nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, njit
from numba.core import cgutils, types
from numba.extending import models, register_model

from ssa_framework.ops.numba_runtime import FAST_MATH, device_function

intrinsic: Any = extending.intrinsic  # typed as if the caller passed the typing context


def inlined_function(function: Callable[..., Any]) -> Any:
    """A `device_function` that is inlined however long it is: for what runs for every row of a tile.

    Else each call would write its arrays to the stack, seven numbers each.
    """
    return njit(nogil=True, fastmath=FAST_MATH, error_model="numpy", forceinline=True)(function)


LANES = {np.dtype(np.float32): 16, np.dtype(np.float64): 8}
"""Numbers in a vector; widths of tables are multiples of it."""

_USUAL_WIDTH = 64
_ROWS_AT_ONCE = 8  # accumulators and row pointers that fit the registers


class _Vector(types.Type):
    def __init__(self, scalar: types.Float) -> None:
        self.scalar = scalar
        self.lanes = 512 // scalar.bitwidth
        super().__init__(name=f"Vector({scalar})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, _ir_type(vector))


def _ir_type(vector: _Vector) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if vector.scalar.bitwidth == 32 else ir.DoubleType(), vector.lanes)


def _int_type(vector: _Vector) -> ir.VectorType:
    return ir.VectorType(ir.IntType(vector.scalar.bitwidth), vector.lanes)


def _constant(type_: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(type_, [value] * type_.count)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    suffix = f"v{a.type.count}f{32 if isinstance(a.type.element, ir.FloatType) else 64}"
    function = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.fmuladd.{suffix}"), [a, b, c])


def _pointer(context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value) -> ir.Value:
    return context.make_array(array_type)(context, builder, value=array).data


def _load(builder: ir.IRBuilder, vector: _Vector, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    place = builder.bitcast(builder.gep(pointer, [offset]), _ir_type(vector).as_pointer())
    return builder.load(place, align=vector.scalar.bitwidth // 8)


def _splat(builder: ir.IRBuilder, type_: ir.VectorType, scalar: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(type_, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, _mask([0] * type_.count))


def _mask(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """``array[offset : offset + LANES]``."""
    vector = _Vector(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, vector, _pointer(context, builder, array, args[0]), args[1])

    return vector(array, types.int64), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """``array[offset : offset + LANES] = value``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(_pointer(context, builder, array, args[0]), [args[1]])
        builder.store(args[2], builder.bitcast(place, args[2].type.as_pointer()), align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


@intrinsic
def splat(typingctx: Any, array: Any, number: Any) -> Any:
    """A vector of the dtype of ``array``, every lane ``number``."""
    vector = _Vector(array.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, _ir_type(vector), args[1])

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
fma = _elementwise(_fma, 3, "a · b + c")
maximum = _elementwise(lambda builder, a, b: _larger(builder, a, b), 2, "The larger one in each lane; b if a is NaN.")


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _reduction(combine: Callable[..., ir.Value], doc: str) -> Any:
    def typer(typingctx: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value, half = args[0], vector.lanes // 2
            while half:
                swapped = builder.shuffle_vector(value, value, _mask([lane ^ half for lane in range(vector.lanes)]))
                value = combine(builder, value, swapped)
                half //= 2
            return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

        return vector.scalar(vector), codegen

    typer.__doc__ = doc
    return intrinsic(typer)


sum_lanes = _reduction(lambda builder, a, b: builder.fadd(a, b), "The sum of all lanes.")
max_lanes = _reduction(_larger, "The largest lane.")


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
        type_, int_type = _ir_type(vector), _int_type(vector)

        def number(value: float) -> ir.Constant:
            return _constant(type_, value)

        x = args[0]
        vanishes = builder.fcmp_ordered("<", x, number(options["least"]))
        x = builder.select(vanishes, number(0.0), x)
        x = builder.select(builder.fcmp_ordered(">", x, number(options["most"])), number(options["most"]), x)
        # adding 1.5 · 2^23 leaves the rounded quotient in the lowest bits, without a conversion
        shifted = _fma(builder, x, number(1.0 / np.log(2.0)), number(options["round"]))
        n = builder.fsub(shifted, number(options["round"]))
        r = x
        for piece in options["ln2"]:
            r = _fma(builder, n, number(-piece), r)
        series = options["series"]
        result = number(series[0])
        for coefficient in series[1:]:
            result = _fma(builder, result, r, number(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, int_type), _constant(int_type, options["shift"]))
        power = builder.bitcast(builder.add(exponent, _constant(int_type, options["one"])), type_)
        return builder.select(vanishes, number(0.0), builder.fmul(result, power))

    return vector(vector), codegen


def _sum_each(builder: ir.IRBuilder, rows: list[ir.Value]) -> ir.Value:
    """Vectors → one vector that holds the sum of each, in order: a transposition whose halves are added on the way."""
    if len(rows) == 1:
        return rows[0]
    width = len(rows) // 2
    return _add_halves(builder, _sum_each(builder, rows[:width]), _sum_each(builder, rows[width:]), width)


def _add_halves(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, width: int) -> ir.Value:
    """Partial sums of ``width`` rows in ``a`` and of as many in ``b`` → partial sums of all of them."""
    lanes = a.type.count
    block = lanes // 4  # lanes in 128 bits: shuffles inside them are cheapest, so they come first
    if width < block:
        picks = [base + pair * width for base in range(0, lanes, block) for pair in range(block // (2 * width))]
        low = [first + lane for pick in picks for first in (pick, lanes + pick) for lane in range(width)]
        high = [lane + block // 2 for lane in low]
    else:
        even = [number * block + lane for number in (0, 2) for lane in range(block)]
        low = even + [lanes + lane for lane in even]
        high = [lane + block for lane in low]
    return builder.fadd(builder.shuffle_vector(a, b, _mask(low)), builder.shuffle_vector(a, b, _mask(high)))


@intrinsic
def dot_rows(typingctx: Any, table: Any, first: Any, width: Any, rows: Any, at: Any, x: Any, start: Any) -> Any:
    """``LANES`` dot products: of ``x[start : start + width]`` with row ``rows[at + lane]`` of a table.

    The table begins at ``table[first]``; its rows are ``width`` long, a multiple of LANES. Each load of ``x`` serves
    several rows, and there is no horizontal sum per row.
    """
    vector = _Vector(table.dtype)
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, index = (_pointer(context, builder, signature.args[i], args[i]) for i in (0, 3))
        query = builder.gep(_pointer(context, builder, x, args[5]), [args[6]])
        origin, length, position = args[1], args[2], args[4]
        type_, i64 = _ir_type(vector), ir.IntType(64)
        result = cgutils.alloca_once(builder, type_)

        def row_pointer(lane: int) -> ir.Value:
            place = builder.gep(index, [builder.add(position, ir.Constant(i64, lane))])
            row = builder.sext(builder.load(place), i64)
            return builder.gep(base, [builder.add(origin, builder.mul(row, length))])

        usual = builder.icmp_signed("==", length, ir.Constant(i64, _USUAL_WIDTH))
        with builder.if_else(usual) as (then, otherwise):
            with then:  # no loop: x stays in registers, and each row is read in one go
                offsets = [ir.Constant(i64, c) for c in range(0, _USUAL_WIDTH, vector.lanes)]
                parts = [_load(builder, vector, query, offset) for offset in offsets]
                sums = []
                for lane in range(vector.lanes):
                    pointer, total = row_pointer(lane), None
                    for part, offset in zip(parts, offsets, strict=True):
                        number = _load(builder, vector, pointer, offset)
                        total = builder.fmul(part, number) if total is None else _fma(builder, part, number, total)
                    sums.append(total)
                builder.store(_sum_each(builder, sums), result)
            with otherwise:
                sums = []
                for group in range(0, vector.lanes, _ROWS_AT_ONCE):
                    pointers = [row_pointer(lane) for lane in range(group, group + _ROWS_AT_ONCE)]
                    totals = [cgutils.alloca_once(builder, type_) for _ in pointers]
                    for total in totals:
                        builder.store(_constant(type_, 0.0), total)
                    step = ir.Constant(i64, vector.lanes)
                    with cgutils.for_range_slice(builder, ir.Constant(i64, 0), length, step, i64, inc=True) as (at, _):
                        part = _load(builder, vector, query, at)
                        for pointer, total in zip(pointers, totals, strict=True):
                            number = _load(builder, vector, pointer, at)
                            builder.store(_fma(builder, part, number, builder.load(total)), total)
                    sums += [builder.load(total) for total in totals]
                builder.store(_sum_each(builder, sums), result)
        return builder.load(result)

    return vector(table, int64, int64, rows, int64, x, int64), codegen


def _row_by_columns(vectors: int) -> Any:
    def typer(
        typingctx: Any, x: Any, start: Any, dim: Any, strip: Any, first: Any, stride: Any, out: Any, to: Any
    ) -> Any:
        vector, int64 = _Vector(x.dtype), types.int64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row, columns, target = (
                builder.gep(_pointer(context, builder, signature.args[i], args[i]), [args[i + at]])
                for i, at in ((0, 1), (3, 1), (6, 1))
            )
            length, step = args[2], args[5]
            type_, i64 = _ir_type(vector), ir.IntType(64)
            two, lanes = ir.Constant(i64, 2), vector.lanes
            # two sums per column: a chain of products that each wait for the last would leave units idle
            totals = [[cgutils.alloca_once(builder, type_) for _ in range(vectors)] for _ in range(2)]
            for total in (*totals[0], *totals[1]):
                builder.store(_constant(type_, 0.0), total)

            def accumulate(d: ir.Value, sums: list[ir.Value]) -> None:
                factor = _splat(builder, type_, builder.load(builder.gep(row, [d])))
                line = builder.gep(columns, [builder.mul(d, step)])
                for v, total in enumerate(sums):
                    number = _load(builder, vector, line, ir.Constant(i64, v * lanes))
                    builder.store(_fma(builder, factor, number, builder.load(total)), total)

            even = builder.mul(builder.sdiv(length, two), two)
            with cgutils.for_range_slice(builder, ir.Constant(i64, 0), even, two, i64, inc=True) as (d, _):
                accumulate(d, totals[0])
                accumulate(builder.add(d, ir.Constant(i64, 1)), totals[1])
            with builder.if_then(builder.icmp_signed("<", even, length)):
                accumulate(even, totals[0])
            for v in range(vectors):
                total = builder.fadd(builder.load(totals[0][v]), builder.load(totals[1][v]))
                place = builder.gep(target, [ir.Constant(i64, v * lanes)])
                builder.store(total, builder.bitcast(place, type_.as_pointer()), align=vector.scalar.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(x, int64, int64, strip, int64, int64, out, int64), codegen

    typer.__doc__ = f"""``x[start : start + dim]`` by {vectors} vectors of columns of a matrix, to ``out[to:]``.

    The columns begin at ``strip[first]``, one row of the matrix after ``stride`` numbers. Each column is summed in
    the same order, however many are computed at once.
    """
    return intrinsic(typer)


_one_vector, _two_vectors, _four_vectors = _row_by_columns(1), _row_by_columns(2), _row_by_columns(4)
_three_vectors = _row_by_columns(3)


@device_function
def row_by_matrix(
    x: Any, start: int, dim: int, strip: Any, first: int, stride: int, columns: int, out: Any, to: int
) -> None:
    """``x[start : start + dim]`` by ``dim`` rows of a matrix, to ``out[to:]``; all arrays are flat.

    Rows begin at ``strip[first]``, ``stride`` numbers apart; ``columns`` is a multiple of `LANES`. Each column is
    summed in the same order, however many are computed at once.
    """
    width = lanes(x)
    done = 0
    while columns - done >= 4 * width:
        _four_vectors(x, start, dim, strip, first + done, stride, out, to + done)
        done += 4 * width
    rest = (columns - done) // width
    if rest == 3:
        _three_vectors(x, start, dim, strip, first + done, stride, out, to + done)
    elif rest == 2:
        _two_vectors(x, start, dim, strip, first + done, stride, out, to + done)
    elif rest == 1:
        _one_vector(x, start, dim, strip, first + done, stride, out, to + done)


def _four_rows_by_columns(vectors: int) -> Any:
    def typer(
        typingctx: Any, x: Any, a: Any, b: Any, c: Any, d: Any, dim: Any, strip: Any, first: Any, stride: Any,
        out: Any, to: Any, apart: Any,
    ) -> Any:  # fmt: skip
        vector, int64 = _Vector(x.dtype), types.int64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            base = _pointer(context, builder, x, args[0])
            rows = [builder.gep(base, [start]) for start in args[1:5]]
            columns = builder.gep(_pointer(context, builder, strip, args[6]), [args[7]])
            target = builder.gep(_pointer(context, builder, out, args[9]), [args[10]])
            type_, i64 = _ir_type(vector), ir.IntType(64)
            places = [ir.Constant(i64, v * vector.lanes) for v in range(vectors)]
            totals = [[cgutils.alloca_once_value(builder, _constant(type_, 0.0)) for _ in places] for _ in rows]
            zero, one = ir.Constant(i64, 0), ir.Constant(i64, 1)
            with cgutils.for_range_slice(builder, zero, args[5], one, i64, inc=True) as (at, _):
                line = builder.gep(columns, [builder.mul(at, args[8])])
                numbers = [_load(builder, vector, line, place) for place in places]
                _add_products(builder, type_, [builder.gep(row, [at]) for row in rows], numbers, totals)
            for row, sums in enumerate(totals):
                line = builder.gep(target, [builder.mul(ir.Constant(i64, row), args[11])])
                _store_all(builder, vector, sums, line, places)
            return context.get_dummy_value()

        places = [int64] * 4
        return types.void(x, *places, int64, strip, int64, int64, out, int64, int64), codegen

    typer.__doc__ = f"""Four rows by {vectors} vectors of columns of a matrix: see `rows_by_matrix`."""
    return intrinsic(typer)


def _add_products(
    builder: ir.IRBuilder, type_: ir.VectorType, factors: list[ir.Value], numbers: list[ir.Value], totals: Any
) -> None:
    for pointer, sums in zip(factors, totals, strict=True):
        factor = _splat(builder, type_, builder.load(pointer))
        for number, total in zip(numbers, sums, strict=True):
            builder.store(_fma(builder, factor, number, builder.load(total)), total)


def _store_all(builder: ir.IRBuilder, vector: _Vector, sums: Any, line: ir.Value, places: Any) -> None:
    for total, place in zip(sums, places, strict=True):
        pointer = builder.bitcast(builder.gep(line, [place]), _ir_type(vector).as_pointer())
        builder.store(builder.load(total), pointer, align=vector.scalar.bitwidth // 8)


def _four_sums_of_columns(vectors: int) -> Any:
    def typer(
        typingctx: Any, weights: Any, a: Any, b: Any, c: Any, d: Any, step: Any, rows: Any, begin: Any, end: Any,
        table: Any, first: Any, width: Any, out: Any, to: Any, factors: Any, column: Any,
    ) -> Any:  # fmt: skip
        vector, int64 = _Vector(table.dtype), types.int64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            type_, i64 = _ir_type(vector), ir.IntType(64)
            pointers = {i: _pointer(context, builder, signature.args[i], args[i]) for i in (0, 6, 9, 12, 13, 14)}
            sources = [builder.gep(pointers[0], [start]) for start in args[1:5]]
            origin = builder.gep(pointers[9], [builder.add(args[10], args[15])])
            places = [ir.Constant(i64, v * vector.lanes) for v in range(vectors)]
            lines, totals = [], []
            for row in range(4):
                number = ir.Constant(i64, row)
                place = builder.add(builder.load(builder.gep(pointers[13], [number])), args[15])
                lines.append(builder.gep(pointers[12], [place]))
                factor = _splat(builder, type_, builder.load(builder.gep(pointers[14], [number])))
                before = [_load(builder, vector, lines[row], place) for place in places]
                totals.append([cgutils.alloca_once_value(builder, builder.fmul(x, factor)) for x in before])
            one = ir.Constant(i64, 1)
            with cgutils.for_range_slice(builder, args[7], args[8], one, i64, inc=True) as (at, _):
                row = builder.sext(builder.load(builder.gep(pointers[6], [at])), i64)
                line = builder.gep(origin, [builder.mul(row, args[11])])
                numbers = [_load(builder, vector, line, place) for place in places]
                shift = builder.mul(at, args[5])
                _add_products(builder, type_, [builder.gep(x, [shift]) for x in sources], numbers, totals)
            for line, sums in zip(lines, totals, strict=True):
                _store_all(builder, vector, sums, line, places)
            return context.get_dummy_value()

        signature = types.void(
            weights, *[int64] * 5, rows, int64, int64, table, int64, int64, out, to, factors, int64
        )  # fmt: skip
        return signature, codegen

    typer.__doc__ = f"""Four weighted sums of rows, {vectors} vectors of columns of them: see `add_four_sums`."""
    return intrinsic(typer)


_four_by_vectors = [_four_rows_by_columns(count) for count in (1, 2, 3, 4)]
_four_by_one, _four_by_two, _four_by_three, _four_by_four = _four_by_vectors
_sums_of_one, _sums_of_two, _sums_of_three, _sums_of_four = [_four_sums_of_columns(count) for count in (1, 2, 3, 4)]


@device_function
def rows_by_matrix(
    x: Any, a: int, b: int, c: int, d: int, dim: int, strip: Any, first: int, stride: int, columns: int, out: Any,
    to: int, apart: int,
) -> None:  # fmt: skip
    """The four rows of ``dim`` numbers that begin at ``x[a]``, .. ``x[d]``, by ``dim`` rows of a matrix.

    The results begin at ``out[to]``, ``apart`` numbers from row to row. The rest is as in `row_by_matrix`; each number
    is summed in the same order, wherever its row and column stand.
    """
    width = lanes(x)
    done = 0
    while columns - done >= 4 * width:
        _four_by_four(x, a, b, c, d, dim, strip, first + done, stride, out, to + done, apart)
        done += 4 * width
    rest = (columns - done) // width
    if rest == 3:
        _four_by_three(x, a, b, c, d, dim, strip, first + done, stride, out, to + done, apart)
    elif rest == 2:
        _four_by_two(x, a, b, c, d, dim, strip, first + done, stride, out, to + done, apart)
    elif rest == 1:
        _four_by_one(x, a, b, c, d, dim, strip, first + done, stride, out, to + done, apart)


@device_function
def add_four_sums(
    weights: Any, a: int, b: int, c: int, d: int, step: int, rows: Any, begin: int, end: int, table: Any, first: int,
    width: int, out: Any, to: Any, factors: Any,
) -> None:  # fmt: skip
    """Four weighted sums of the same rows of a table, added to four rows of ``out`` that are multiplied first.

    Row i of ``out``, ``out[to[i] : to[i] + width]``, becomes ``factors[i]`` times itself plus the sum of
    ``weights[w + e · step]`` times row ``rows[e]`` over begin ≤ e < end, with w = a, b, c, d for i = 0 .. 3. The table
    begins at ``table[first]``; its rows are ``width`` long, a multiple of `LANES`. Sums are added up in order of e.
    """
    size = lanes(table)
    done = 0
    while width - done >= 4 * size:
        _sums_of_four(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)
        done += 4 * size
    rest = (width - done) // size
    if rest == 3:
        _sums_of_three(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)
    elif rest == 2:
        _sums_of_two(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)
    elif rest == 1:
        _sums_of_one(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)


@intrinsic
def only_lanes(typingctx: Any, vector: Any, low: Any, high: Any, otherwise: Any) -> Any:
    """The lanes t with low ≤ t < high of a vector; the others become ``otherwise``."""
    int32 = types.int32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = ir.VectorType(ir.IntType(32), vector.lanes)
        count = _mask(list(range(vector.lanes)))
        inside = builder.and_(
            builder.icmp_signed(">=", count, _splat(builder, numbers, args[1])),
            builder.icmp_signed("<", count, _splat(builder, numbers, args[2])),
        )
        return builder.select(inside, args[0], _splat(builder, _ir_type(vector), args[3]))

    return vector(vector, int32, int32, vector.scalar), codegen


@intrinsic
def copy_numbers(typingctx: Any, source: Any, at: Any, target: Any, to: Any, count: Any) -> Any:
    """``target[to : to + count] = source[at : at + count]``; they must not overlap."""
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        begin = builder.gep(_pointer(context, builder, source, args[0]), [args[1]])
        place = builder.gep(_pointer(context, builder, target, args[2]), [args[3]])
        cgutils.raw_memcpy(builder, place, begin, args[4], source.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, int64, target, int64, int64), codegen


@intrinsic
def transpose_tile(
    typingctx: Any, table: Any, first: Any, width: Any, rows: Any, at: Any, count: Any, out: Any, to: Any, stride: Any
) -> Any:
    """A tile of `LANES` numbers of `LANES` rows, transposed.

    ``out[to + i * stride + t] = table[first + rows[at + t] * width + i]`` for t below ``count`` (at least 1); further
    columns repeat the last one.
    """
    vector, int64 = _Vector(table.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, index, target = (
            builder.gep(_pointer(context, builder, signature.args[i], args[i]), [args[i + 1]]) for i in (0, 3, 6)
        )
        i64, lanes = ir.IntType(64), vector.lanes
        last = builder.sub(args[5], ir.Constant(i64, 1))
        tile = []
        for lane in range(lanes):
            number = ir.Constant(i64, lane)
            number = builder.select(builder.icmp_signed("<", number, last), number, last)
            row = builder.sext(builder.load(builder.gep(index, [number])), i64)
            tile.append(_load(builder, vector, base, builder.mul(row, args[2])))
        low = [lane // 2 + (lane % 2) * lanes for lane in range(lanes)]
        high = [place + lanes // 2 for place in low]
        for _ in range(lanes.bit_length() - 1):  # shuffling the rows like cards as often as this transposes them
            halves = list(zip(tile[: lanes // 2], tile[lanes // 2 :], strict=True))
            tile = [builder.shuffle_vector(a, b, _mask(part)) for a, b in halves for part in (low, high)]
        for i, line in enumerate(tile):
            place = builder.gep(target, [builder.mul(ir.Constant(i64, i), args[8])])
            builder.store(line, builder.bitcast(place, line.type.as_pointer()), align=vector.scalar.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(table, int64, int64, rows, int64, int64, out, int64, int64), codegen


@intrinsic
def place_of_largest(typingctx: Any, numbers: Any, start: Any, count: Any) -> Any:
    """The first of the largest of ``numbers[start : start + count]``, int32, count a multiple of 16, from ``start``."""
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), 16)
        begin = builder.gep(_pointer(context, builder, numbers, args[0]), [args[1]])
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
                largest, builder.shuffle_vector(largest, largest, _mask([lane ^ half for lane in range(16)]))
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


@intrinsic
def lanes(typingctx: Any, array: Any) -> Any:
    """How many numbers of ``array`` a vector holds, as a constant of the compiled code."""
    count = _Vector(array.dtype).lanes

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.int64, count)

    return types.int64(array), codegen


@intrinsic
def copy_keys(typingctx: Any, source: Any, at: Any, target: Any, to: Any, bound: Any) -> Any:
    """Copy 16 int32 from ``source[at]`` to ``target[to]``; bit t of the result: number t lies in 0 .. bound - 1."""
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        keys = ir.VectorType(i32, 16)
        places = [
            builder.bitcast(builder.gep(_pointer(context, builder, array, args[i]), [args[i + 1]]), keys.as_pointer())
            for array, i in ((source, 0), (target, 2))
        ]
        numbers = builder.load(places[0], align=4)
        builder.store(numbers, places[1], align=4)
        inside = builder.icmp_unsigned("<", numbers, _splat(builder, keys, builder.trunc(args[4], i32)))
        return builder.zext(builder.bitcast(inside, ir.IntType(16)), i64)

    return int64(source, int64, target, int64, int64), codegen


TILE = 32
"""Columns of a tile, float32: two vectors. With `TILE_ROWS` rows, sums fit the registers and none waits for another."""
TILE_ROWS = 8


def _products_with_tile(
    builder: ir.IRBuilder, vector: _Vector, rows: ir.Value, stride: ir.Value, tile: ir.Value, dim: ir.Value,
    begin: list[ir.Value],
) -> list[list[ir.Value]]:  # fmt: skip
    """Two vectors for each of `TILE_ROWS` rows: ``begin`` plus the sum of the row's numbers times lines of the tile."""
    type_, i64 = _ir_type(vector), ir.IntType(64)
    places = [ir.Constant(i64, v * vector.lanes) for v in range(TILE // vector.lanes)]
    lines = [builder.gep(rows, [builder.mul(stride, ir.Constant(i64, row))]) for row in range(TILE_ROWS)]
    totals = [[cgutils.alloca_once(builder, type_) for _ in places] for _ in lines]
    for number, sums in zip(begin, totals, strict=True):
        for total in sums:
            builder.store(number, total)
    with cgutils.for_range_slice(builder, ir.Constant(i64, 0), dim, ir.Constant(i64, 1), i64, inc=True) as (at, _):
        columns = builder.gep(tile, [builder.mul(at, ir.Constant(i64, TILE))])
        numbers = [_load(builder, vector, columns, place) for place in places]
        _add_products(builder, type_, [builder.gep(line, [at]) for line in lines], numbers, totals)
    return [[builder.load(total) for total in sums] for sums in totals]


@intrinsic
def rows_by_tile(
    typingctx: Any, rows: Any, first: Any, stride: Any, tile: Any, at: Any, dim: Any, out: Any, to: Any, largest: Any,
    there: Any,
) -> Any:  # fmt: skip
    """`TILE_ROWS` rows of ``dim`` numbers by a tile of as many lines of `TILE` columns, float32.

    Row r begins at ``rows[first + r * stride]``, the tile at ``tile[at]``; products begin at ``out[to + r * TILE]``,
    with -inf for NaN, and the largest of each column at ``largest[there]``. A column is computed in the same way
    wherever it stands.
    """
    vector, int64 = _Vector(rows.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        origin, columns, target, most = (
            builder.gep(_pointer(context, builder, signature.args[i], args[i]), [args[i + 1]]) for i in (0, 3, 6, 8)
        )
        zeros = [_constant(_ir_type(vector), 0.0)] * TILE_ROWS
        products = _products_with_tile(builder, vector, origin, args[2], columns, args[5], zeros)
        lowest = _constant(_ir_type(vector), float("-inf"))
        for v in range(TILE // vector.lanes):
            best = lowest
            for row, sums in enumerate(products):
                product = _larger(builder, sums[v], lowest)
                _store(builder, vector, product, target, ir.Constant(ir.IntType(64), row * TILE + v * vector.lanes))
                best = _larger(builder, product, best)
            _store(builder, vector, best, most, ir.Constant(ir.IntType(64), v * vector.lanes))
        return context.get_dummy_value()

    return types.void(rows, int64, int64, tile, int64, int64, out, int64, largest, int64), codegen


@intrinsic
def nearest_rows(
    typingctx: Any, rows: Any, begin: Any, count: Any, stride: Any, tile: Any, at: Any, dim: Any, owner: Any, to: Any
) -> Any:
    """Which row has the largest product with each column of a tile, the first of equals.

    The results are int32 ``owner[to : to + TILE]``. ``begin[r]`` is added to the products of row r, which begins at
    ``rows[r * stride]``; a sum that is NaN or -inf is never the largest, and row 0 is if all are. There are ``count``
    rows, a multiple of `TILE_ROWS`. Else as `rows_by_tile`.
    """
    vector, int64 = _Vector(rows.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        type_, i64 = _ir_type(vector), ir.IntType(64)
        numbers = ir.VectorType(ir.IntType(32), vector.lanes)
        origin, bias = (_pointer(context, builder, signature.args[i], args[i]) for i in (0, 1))
        columns = builder.gep(_pointer(context, builder, tile, args[4]), [args[5]])
        vectors = range(TILE // vector.lanes)
        best = [cgutils.alloca_once_value(builder, _constant(type_, float("-inf"))) for _ in vectors]
        found = [cgutils.alloca_once_value(builder, ir.Constant(numbers, [0] * vector.lanes)) for _ in vectors]
        step = ir.Constant(i64, TILE_ROWS)
        with cgutils.for_range_slice(builder, ir.Constant(i64, 0), args[2], step, i64, inc=True) as (first, _):
            line = builder.gep(origin, [builder.mul(first, args[3])])
            places = [builder.add(first, ir.Constant(i64, row)) for row in range(TILE_ROWS)]
            starts = [_splat(builder, type_, builder.load(builder.gep(bias, [place]))) for place in places]
            products = _products_with_tile(builder, vector, line, args[3], columns, args[6], starts)
            for row, sums in enumerate(products):
                number = _splat(builder, numbers, builder.trunc(places[row], ir.IntType(32)))
                for v in vectors:
                    larger = builder.fcmp_ordered(">", sums[v], builder.load(best[v]))
                    builder.store(builder.select(larger, sums[v], builder.load(best[v])), best[v])
                    builder.store(builder.select(larger, number, builder.load(found[v])), found[v])
        target = builder.gep(_pointer(context, builder, owner, args[7]), [args[8]])
        for v in vectors:
            _store(builder, vector, builder.load(found[v]), target, ir.Constant(i64, v * vector.lanes))
        return context.get_dummy_value()

    return types.void(rows, begin, int64, int64, tile, int64, int64, owner, int64), codegen


@intrinsic
def largest_line(typingctx: Any, numbers: Any, count: Any, best: Any, where: Any) -> Any:
    """The largest of each column of ``count`` lines of `TILE` float32, and the first line that holds it, int32.

    -inf and line 0 where no number is larger than -inf.
    """
    vector, int64 = _Vector(numbers.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        type_, i64 = _ir_type(vector), ir.IntType(64)
        whole = ir.VectorType(ir.IntType(32), vector.lanes)
        origin, values, lines = (_pointer(context, builder, signature.args[i], args[i]) for i in (0, 2, 3))
        vectors = range(TILE // vector.lanes)
        largest = [cgutils.alloca_once_value(builder, _constant(type_, float("-inf"))) for _ in vectors]
        found = [cgutils.alloca_once_value(builder, ir.Constant(whole, [0] * vector.lanes)) for _ in vectors]
        one = ir.Constant(i64, 1)
        with cgutils.for_range_slice(builder, ir.Constant(i64, 0), args[1], one, i64, inc=True) as (at, _):
            line = builder.gep(origin, [builder.mul(at, ir.Constant(i64, TILE))])
            number = _splat(builder, whole, builder.trunc(at, ir.IntType(32)))
            for v in vectors:
                value = _load(builder, vector, line, ir.Constant(i64, v * vector.lanes))
                larger = builder.fcmp_ordered(">", value, builder.load(largest[v]))
                builder.store(builder.select(larger, value, builder.load(largest[v])), largest[v])
                builder.store(builder.select(larger, number, builder.load(found[v])), found[v])
        for v in vectors:
            place = ir.Constant(i64, v * vector.lanes)
            _store(builder, vector, builder.load(largest[v]), values, place)
            _store(builder, vector, builder.load(found[v]), lines, place)
        return context.get_dummy_value()

    return types.void(numbers, int64, best, where), codegen


@intrinsic
def drop_largest(typingctx: Any, numbers: Any, at: Any, largest: Any, there: Any) -> Any:
    """Take the largest of one column of `TILE_ROWS` lines of `TILE` float32, which ``largest[there]`` says.

    The first line that holds it becomes -inf, and ``largest[there]`` the largest of the others; returns the line. The
    column begins at ``numbers[at]``; none of its numbers is NaN.
    """
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64, lowest = ir.IntType(64), ir.Constant(ir.FloatType(), float("-inf"))
        column, most = (
            builder.gep(_pointer(context, builder, signature.args[i], args[i]), [args[i + 1]]) for i in (0, 2)
        )
        taken, found, others = builder.load(most), ir.Constant(i64, 0), []
        values = [builder.load(builder.gep(column, [ir.Constant(i64, row * TILE)])) for row in range(TILE_ROWS)]
        for row in reversed(range(TILE_ROWS)):
            found = builder.select(builder.fcmp_ordered("==", values[row], taken), ir.Constant(i64, row), found)
        for row, value in enumerate(values):
            same = builder.icmp_signed("==", found, ir.Constant(i64, row))
            others.append(builder.select(same, lowest, value))
        while len(others) > 1:
            others = [_larger(builder, a, b) for a, b in zip(others[::2], others[1::2], strict=True)]
        builder.store(lowest, builder.gep(column, [builder.mul(found, ir.Constant(i64, TILE))]))
        builder.store(others[0], most)
        return found

    return int64(numbers, int64, largest, int64), codegen


def _store(builder: ir.IRBuilder, vector: _Vector, value: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
    place = builder.bitcast(builder.gep(pointer, [offset]), value.type.as_pointer())
    builder.store(value, place, align=vector.scalar.bitwidth // 8)
