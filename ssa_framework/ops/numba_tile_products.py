"""Products of rows with tiles of `TILE` columns inside Numba kernels, float32, and the largest of each column.

A tile is ``dim`` lines of `TILE` numbers: a lane of a vector is a column, such as a key or a query, and a maximum is
found lane by lane, in registers. A column is computed in the same way wherever it stands. Arrays are flat, positions
are int64 offsets; nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

from ssa_framework.ops.numba_llvm import (
    SUMS,
    VectorType,
    constant,
    emit_larger,
    emit_load,
    emit_products,
    emit_splat,
    emit_store,
    intrinsic,
    ir_type,
    pointer_to,
    pointers_at,
)

TILE = 32
"""Columns of a tile, float32: two vectors."""
TILE_ROWS = 8
_ROWS, _VECTORS = (8, 2) if SUMS == 16 else (4, 1)
"""Of a product at once: as many sums as the registers hold, so that none waits for another."""


def _products_with_tile(
    builder: ir.IRBuilder, vector: VectorType, rows: ir.Value, stride: ir.Value, tile: ir.Value, dim: ir.Value,
    begin: list[ir.Value],
) -> list[list[ir.Value]]:  # fmt: skip
    """Two vectors for each of `TILE_ROWS` rows: ``begin`` plus the sum of the row's numbers times lines of the tile."""
    i64 = ir.IntType(64)
    zero, one = ir.Constant(i64, 0), ir.Constant(i64, 1)
    places = [ir.Constant(i64, v * vector.lanes) for v in range(TILE // vector.lanes)]
    lines = [builder.gep(rows, [builder.mul(stride, ir.Constant(i64, row))]) for row in range(TILE_ROWS)]
    totals = [[cgutils.alloca_once_value(builder, number) for _ in places] for number in begin]
    for v in range(0, len(places), _VECTORS):
        for row in range(0, TILE_ROWS, _ROWS):
            some = [sums[v : v + _VECTORS] for sums in totals[row : row + _ROWS]]
            with cgutils.for_range_slice(builder, zero, dim, one, i64, inc=True) as (at, _):
                columns = builder.gep(tile, [builder.mul(at, ir.Constant(i64, TILE))])
                numbers = [emit_load(builder, vector, columns, place) for place in places[v : v + _VECTORS]]
                emit_products(builder, [builder.gep(line, [at]) for line in lines[row : row + _ROWS]], numbers, some)
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
    vector, int64 = VectorType(rows.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        origin, columns, target, most = pointers_at(context, builder, signature, args, 0, 3, 6, 8)
        zeros = [constant(ir_type(vector), 0.0)] * TILE_ROWS
        products = _products_with_tile(builder, vector, origin, args[2], columns, args[5], zeros)
        lowest = constant(ir_type(vector), float("-inf"))
        for v in range(TILE // vector.lanes):
            best = lowest
            for row, sums in enumerate(products):
                product = emit_larger(builder, sums[v], lowest)
                emit_store(builder, vector, product, target, ir.Constant(ir.IntType(64), row * TILE + v * vector.lanes))
                best = emit_larger(builder, product, best)
            emit_store(builder, vector, best, most, ir.Constant(ir.IntType(64), v * vector.lanes))
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
    vector, int64 = VectorType(rows.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        type_, i64 = ir_type(vector), ir.IntType(64)
        numbers = ir.VectorType(ir.IntType(32), vector.lanes)
        origin, bias = (pointer_to(context, builder, signature.args[i], args[i]) for i in (0, 1))
        columns, target = pointers_at(context, builder, signature, args, 4, 7)
        vectors = range(TILE // vector.lanes)
        best = [cgutils.alloca_once_value(builder, constant(type_, float("-inf"))) for _ in vectors]
        found = [cgutils.alloca_once_value(builder, ir.Constant(numbers, [0] * vector.lanes)) for _ in vectors]
        step = ir.Constant(i64, TILE_ROWS)
        with cgutils.for_range_slice(builder, ir.Constant(i64, 0), args[2], step, i64, inc=True) as (first, _):
            line = builder.gep(origin, [builder.mul(first, args[3])])
            places = [builder.add(first, ir.Constant(i64, row)) for row in range(TILE_ROWS)]
            starts = [emit_splat(builder, type_, builder.load(builder.gep(bias, [place]))) for place in places]
            products = _products_with_tile(builder, vector, line, args[3], columns, args[6], starts)
            for row, sums in enumerate(products):
                number = emit_splat(builder, numbers, builder.trunc(places[row], ir.IntType(32)))
                for v in vectors:
                    _keep_larger(builder, sums[v], number, best[v], found[v])
        for v in vectors:
            emit_store(builder, vector, builder.load(found[v]), target, ir.Constant(i64, v * vector.lanes))
        return context.get_dummy_value()

    return types.void(rows, begin, int64, int64, tile, int64, int64, owner, int64), codegen


@intrinsic
def largest_line(typingctx: Any, numbers: Any, count: Any, best: Any, where: Any) -> Any:
    """The largest of each column of ``count`` lines of `TILE` float32, and the first line that holds it, int32.

    -inf and line 0 where no number is larger than -inf.
    """
    vector, int64 = VectorType(numbers.dtype), types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        type_, i64 = ir_type(vector), ir.IntType(64)
        whole = ir.VectorType(ir.IntType(32), vector.lanes)
        origin, values, lines = (pointer_to(context, builder, signature.args[i], args[i]) for i in (0, 2, 3))
        vectors = range(TILE // vector.lanes)
        largest = [cgutils.alloca_once_value(builder, constant(type_, float("-inf"))) for _ in vectors]
        found = [cgutils.alloca_once_value(builder, ir.Constant(whole, [0] * vector.lanes)) for _ in vectors]
        one = ir.Constant(i64, 1)
        with cgutils.for_range_slice(builder, ir.Constant(i64, 0), args[1], one, i64, inc=True) as (at, _):
            line = builder.gep(origin, [builder.mul(at, ir.Constant(i64, TILE))])
            number = emit_splat(builder, whole, builder.trunc(at, ir.IntType(32)))
            for v in vectors:
                value = emit_load(builder, vector, line, ir.Constant(i64, v * vector.lanes))
                _keep_larger(builder, value, number, largest[v], found[v])
        for v in vectors:
            place = ir.Constant(i64, v * vector.lanes)
            emit_store(builder, vector, builder.load(largest[v]), values, place)
            emit_store(builder, vector, builder.load(found[v]), lines, place)
        return context.get_dummy_value()

    return types.void(numbers, int64, best, where), codegen


def _keep_larger(builder: ir.IRBuilder, value: ir.Value, number: ir.Value, best: ir.Value, found: ir.Value) -> None:
    """In lanes where ``value`` is larger, replace what ``best`` holds by it, and what ``found`` holds by ``number``."""
    larger = builder.fcmp_ordered(">", value, builder.load(best))
    builder.store(builder.select(larger, value, builder.load(best)), best)
    builder.store(builder.select(larger, number, builder.load(found)), found)


@intrinsic
def drop_largest(typingctx: Any, numbers: Any, at: Any, largest: Any, there: Any) -> Any:
    """Take the largest of one column of `TILE_ROWS` lines of `TILE` float32, which ``largest[there]`` says.

    The first line that holds it becomes -inf, and ``largest[there]`` the largest of the others; returns the line. The
    column begins at ``numbers[at]``; none of its numbers is NaN.
    """
    int64 = types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64, lowest = ir.IntType(64), ir.Constant(ir.FloatType(), float("-inf"))
        column, most = pointers_at(context, builder, signature, args, 0, 2)
        taken, found, others = builder.load(most), ir.Constant(i64, 0), []
        values = [builder.load(builder.gep(column, [ir.Constant(i64, row * TILE)])) for row in range(TILE_ROWS)]
        for row in reversed(range(TILE_ROWS)):
            found = builder.select(builder.fcmp_ordered("==", values[row], taken), ir.Constant(i64, row), found)
        for row, value in enumerate(values):
            same = builder.icmp_signed("==", found, ir.Constant(i64, row))
            others.append(builder.select(same, lowest, value))
        while len(others) > 1:
            others = [emit_larger(builder, a, b) for a, b in zip(others[::2], others[1::2], strict=True)]
        builder.store(lowest, builder.gep(column, [builder.mul(found, ir.Constant(i64, TILE))]))
        builder.store(others[0], most)
        return found

    return int64(numbers, int64, largest, int64), codegen
