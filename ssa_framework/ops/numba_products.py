"""Products of rows and matrices inside Numba kernels, of any width: dot products with listed rows, one row or four rows
by the columns of a matrix, and weighted sums of rows.

Arrays are flat, positions are int64 offsets; nothing is checked. Rows and columns come in whole vectors
(`numba_vectors.LANES`). A number is summed in the same order wherever its row and column stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

from ssa_framework.ops.numba_llvm import (
    SUMS,
    VectorType,
    constant,
    emit_fma,
    emit_load,
    emit_products,
    emit_splat,
    emit_store,
    intrinsic,
    ir_type,
    lane_mask,
    pointer_to,
    pointers_at,
)
from ssa_framework.ops.numba_runtime import device_function
from ssa_framework.ops.numba_vectors import lanes

_USUAL_WIDTH = 64
_ROWS_AT_ONCE = min(8, SUMS)  # sums and row pointers that fit the registers


@intrinsic
def dot_rows(typingctx: Any, table: Any, first: Any, width: Any, rows: Any, at: Any, x: Any, start: Any) -> Any:
    """``LANES`` dot products: of ``x[start : start + width]`` with row ``rows[at + lane]`` of a table.

    The table begins at ``table[first]``; its rows are ``width`` long, a multiple of LANES. Each load of ``x`` serves
    several rows, and there is no horizontal sum per row.
    """
    vector = VectorType(table.dtype)
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, index = (pointer_to(context, builder, signature.args[i], args[i]) for i in (0, 3))
        query = builder.gep(pointer_to(context, builder, x, args[5]), [args[6]])
        origin, length, position = args[1], args[2], args[4]
        type_, i64 = ir_type(vector), ir.IntType(64)
        result = cgutils.alloca_once(builder, type_)

        def row_pointer(lane: int) -> ir.Value:
            place = builder.gep(index, [builder.add(position, ir.Constant(i64, lane))])
            row = builder.sext(builder.load(place), i64)
            return builder.gep(base, [builder.add(origin, builder.mul(row, length))])

        usual = builder.icmp_signed("==", length, ir.Constant(i64, _USUAL_WIDTH))
        with builder.if_else(usual) as (then, otherwise):
            with then:  # no loop: x stays in registers, and each row is read in one go
                offsets = [ir.Constant(i64, c) for c in range(0, _USUAL_WIDTH, vector.lanes)]
                parts = [emit_load(builder, vector, query, offset) for offset in offsets]

                def product(lane: int) -> ir.Value:
                    pointer, total = row_pointer(lane), None
                    for part, offset in zip(parts, offsets, strict=True):
                        number = emit_load(builder, vector, pointer, offset)
                        total = builder.fmul(part, number) if total is None else emit_fma(builder, part, number, total)
                    return total

                builder.store(_sum_each(builder, [partial(product, lane) for lane in range(vector.lanes)]), result)
            with otherwise:
                sums = []
                for group in range(0, vector.lanes, _ROWS_AT_ONCE):
                    pointers = [row_pointer(lane) for lane in range(group, group + _ROWS_AT_ONCE)]
                    totals = [cgutils.alloca_once_value(builder, constant(type_, 0.0)) for _ in pointers]
                    step = ir.Constant(i64, vector.lanes)
                    with cgutils.for_range_slice(builder, ir.Constant(i64, 0), length, step, i64, inc=True) as (at, _):
                        part = emit_load(builder, vector, query, at)
                        for pointer, total in zip(pointers, totals, strict=True):
                            number = emit_load(builder, vector, pointer, at)
                            builder.store(emit_fma(builder, part, number, builder.load(total)), total)
                    sums += [partial(builder.load, total) for total in totals]
                builder.store(_sum_each(builder, sums), result)
        return builder.load(result)

    return vector(table, int64, int64, rows, int64, x, int64), codegen


def _sum_each(builder: ir.IRBuilder, rows: Sequence[Callable[[], ir.Value]]) -> ir.Value:
    """Vectors → one vector that holds the sum of each, in order: a transposition whose halves are added on the way.

    Each is made when it is needed: at most one for each halving waits.
    """
    if len(rows) == 1:
        return rows[0]()
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
    return builder.fadd(builder.shuffle_vector(a, b, lane_mask(low)), builder.shuffle_vector(a, b, lane_mask(high)))


def _row_by_columns(vectors: int) -> Any:
    def typer(
        typingctx: Any, x: Any, start: Any, dim: Any, strip: Any, first: Any, stride: Any, out: Any, to: Any
    ) -> Any:
        vector, int64 = VectorType(x.dtype), types.int64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row, columns, target = pointers_at(context, builder, signature, args, 0, 3, 6)
            length, step = args[2], args[5]
            type_, i64 = ir_type(vector), ir.IntType(64)
            two, places = ir.Constant(i64, 2), [ir.Constant(i64, v * vector.lanes) for v in range(vectors)]
            # two sums per column: a chain of products that each wait for the last would leave units idle
            totals = [[cgutils.alloca_once_value(builder, constant(type_, 0.0)) for _ in places] for _ in range(2)]

            def accumulate(d: ir.Value, sums: list[ir.Value]) -> None:
                line = builder.gep(columns, [builder.mul(d, step)])
                numbers = [emit_load(builder, vector, line, place) for place in places]
                emit_products(builder, [builder.gep(row, [d])], numbers, [sums])

            even = builder.mul(builder.sdiv(length, two), two)
            with cgutils.for_range_slice(builder, ir.Constant(i64, 0), even, two, i64, inc=True) as (d, _):
                accumulate(d, totals[0])
                accumulate(builder.add(d, ir.Constant(i64, 1)), totals[1])
            with builder.if_then(builder.icmp_signed("<", even, length)):
                accumulate(even, totals[0])
            for place, *both in zip(places, *totals, strict=True):
                total = builder.fadd(*(builder.load(sums) for sums in both))
                emit_store(builder, vector, total, target, place)
            return context.get_dummy_value()

        return types.void(x, int64, int64, strip, int64, int64, out, int64), codegen

    typer.__doc__ = f"""``x[start : start + dim]`` by {vectors} vectors of columns of a matrix, to ``out[to:]``.

    The columns begin at ``strip[first]``, one row of the matrix after ``stride`` numbers. Each column is summed in
    the same order, however many are computed at once.
    """
    return intrinsic(typer)


_one_vector, _two_vectors, _three_vectors, _four_vectors = [_row_by_columns(count) for count in (1, 2, 3, 4)]
_ROW = min(4, SUMS // 2)  # vectors of columns at once, each with two sums
_most_vectors = _four_vectors if _ROW == 4 else _two_vectors


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
    while columns - done >= _ROW * width:
        _most_vectors(x, start, dim, strip, first + done, stride, out, to + done)
        done += _ROW * width
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
        vector, int64 = VectorType(x.dtype), types.int64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            base = pointer_to(context, builder, x, args[0])
            rows = [builder.gep(base, [start]) for start in args[1:5]]
            columns, target = pointers_at(context, builder, signature, args, 6, 9)
            type_, i64 = ir_type(vector), ir.IntType(64)
            places = [ir.Constant(i64, v * vector.lanes) for v in range(vectors)]
            totals = [[cgutils.alloca_once_value(builder, constant(type_, 0.0)) for _ in places] for _ in rows]
            zero, one = ir.Constant(i64, 0), ir.Constant(i64, 1)
            with cgutils.for_range_slice(builder, zero, args[5], one, i64, inc=True) as (at, _):
                line = builder.gep(columns, [builder.mul(at, args[8])])
                numbers = [emit_load(builder, vector, line, place) for place in places]
                emit_products(builder, [builder.gep(row, [at]) for row in rows], numbers, totals)
            for row, sums in enumerate(totals):
                line = builder.gep(target, [builder.mul(ir.Constant(i64, row), args[11])])
                _store_all(builder, vector, sums, line, places)
            return context.get_dummy_value()

        places = [int64] * 4
        return types.void(x, *places, int64, strip, int64, int64, out, int64, int64), codegen

    typer.__doc__ = f"Four rows by {vectors} vectors of columns of a matrix: see `rows_by_matrix`."
    return intrinsic(typer)


def _four_sums_of_columns(vectors: int) -> Any:
    def typer(
        typingctx: Any, weights: Any, a: Any, b: Any, c: Any, d: Any, step: Any, rows: Any, begin: Any, end: Any,
        table: Any, first: Any, width: Any, out: Any, to: Any, factors: Any, column: Any,
    ) -> Any:  # fmt: skip
        vector, int64 = VectorType(table.dtype), types.int64

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            type_, i64 = ir_type(vector), ir.IntType(64)
            pointers = {i: pointer_to(context, builder, signature.args[i], args[i]) for i in (0, 6, 9, 12, 13, 14)}
            sources = [builder.gep(pointers[0], [start]) for start in args[1:5]]
            origin = builder.gep(pointers[9], [builder.add(args[10], args[15])])
            places = [ir.Constant(i64, v * vector.lanes) for v in range(vectors)]
            lines, totals = [], []
            for row in range(4):
                number = ir.Constant(i64, row)
                place = builder.add(builder.load(builder.gep(pointers[13], [number])), args[15])
                lines.append(builder.gep(pointers[12], [place]))
                factor = emit_splat(builder, type_, builder.load(builder.gep(pointers[14], [number])))
                before = [emit_load(builder, vector, lines[row], place) for place in places]
                totals.append([cgutils.alloca_once_value(builder, builder.fmul(x, factor)) for x in before])
            one = ir.Constant(i64, 1)
            with cgutils.for_range_slice(builder, args[7], args[8], one, i64, inc=True) as (at, _):
                row = builder.sext(builder.load(builder.gep(pointers[6], [at])), i64)
                line = builder.gep(origin, [builder.mul(row, args[11])])
                numbers = [emit_load(builder, vector, line, place) for place in places]
                shift = builder.mul(at, args[5])
                emit_products(builder, [builder.gep(x, [shift]) for x in sources], numbers, totals)
            for line, sums in zip(lines, totals, strict=True):
                _store_all(builder, vector, sums, line, places)
            return context.get_dummy_value()

        places = [int64] * 5
        return types.void(weights, *places, rows, int64, int64, table, int64, int64, out, to, factors, int64), codegen

    typer.__doc__ = f"Four weighted sums of rows, {vectors} vectors of columns of them: see `add_four_sums`."
    return intrinsic(typer)


def _store_all(builder: ir.IRBuilder, vector: VectorType, sums: Any, line: ir.Value, places: Any) -> None:
    for total, place in zip(sums, places, strict=True):
        emit_store(builder, vector, builder.load(total), line, place)


_four_by_one, _four_by_two, _four_by_three, _four_by_four = [_four_rows_by_columns(count) for count in (1, 2, 3, 4)]
_sums_of_one, _sums_of_two, _sums_of_three, _sums_of_four = [_four_sums_of_columns(count) for count in (1, 2, 3, 4)]
_ROWS = SUMS // 4  # vectors of columns at once, each with a sum for each of four rows
_four_by_most = _four_by_four if _ROWS == 4 else _four_by_one
_sums_of_most = _sums_of_four if _ROWS == 4 else _sums_of_one


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
    while columns - done >= _ROWS * width:
        _four_by_most(x, a, b, c, d, dim, strip, first + done, stride, out, to + done, apart)
        done += _ROWS * width
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
    while width - done >= _ROWS * size:
        _sums_of_most(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)
        done += _ROWS * size
    rest = (width - done) // size
    if rest == 3:
        _sums_of_three(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)
    elif rest == 2:
        _sums_of_two(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)
    elif rest == 1:
        _sums_of_one(weights, a, b, c, d, step, rows, begin, end, table, first, width, out, to, factors, done)
