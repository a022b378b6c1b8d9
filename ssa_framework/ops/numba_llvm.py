"""LLVM code for vectors of 64 bytes: what the intrinsics of `numba_vectors` and the products are made of.

A vector holds 16 float32 or 8 float64. LLVM turns each operation into whatever the machine has (one AVX-512 register,
two of AVX2, four of NEON). What differs is how many vectors its registers hold at once: see `SUMS`.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, register_model

intrinsic: Any = extending.intrinsic  # typed as if the caller passed the typing context


def _sums_in_registers() -> int:
    features = getattr(numba.config, "CPU_FEATURES", None)  # the environment variable NUMBA_CPU_FEATURES
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    return 16 if "+avx512f" in features.split(",") else 4


SUMS = _sums_in_registers()
"""Vectors that a product may add up at once, with room for their factors: of the 32 registers of AVX-512 a vector takes
one, of the 16 of AVX2 it takes two. With more, every step would store and load its sums."""


class VectorType(types.Type):
    """A vector of numbers of a floating type, as Numba's compiler sees it."""

    def __init__(self, scalar: types.Float) -> None:
        self.scalar = scalar
        self.lanes = 512 // scalar.bitwidth
        super().__init__(name=f"Vector({scalar})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, ir_type(vector))


def ir_type(vector: VectorType) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if vector.scalar.bitwidth == 32 else ir.DoubleType(), vector.lanes)


def constant(type_: ir.VectorType, value: float) -> ir.Constant:
    """The same number in every lane."""
    return ir.Constant(type_, [value] * type_.count)


def lane_mask(lanes: list[int]) -> ir.Constant:
    """Which lanes a shuffle takes."""
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def pointer_to(context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value) -> ir.Value:
    """The first number of an array."""
    return context.make_array(array_type)(context, builder, value=array).data


def pointers_at(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, *arrays: int) -> list[ir.Value]:
    """Pointers into some arguments that are arrays, each at the offset that the next argument says."""
    return [builder.gep(pointer_to(context, builder, signature.args[i], args[i]), [args[i + 1]]) for i in arrays]


def emit_load(builder: ir.IRBuilder, vector: VectorType, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    place = builder.bitcast(builder.gep(pointer, [offset]), ir_type(vector).as_pointer())
    return builder.load(place, align=vector.scalar.bitwidth // 8)


def emit_store(builder: ir.IRBuilder, vector: VectorType, value: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
    """``value`` may be a vector of int32 with as many lanes as a float32 ``vector``."""
    place = builder.bitcast(builder.gep(pointer, [offset]), value.type.as_pointer())
    builder.store(value, place, align=vector.scalar.bitwidth // 8)


def emit_splat(builder: ir.IRBuilder, type_: ir.VectorType, scalar: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(type_, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, lane_mask([0] * type_.count))


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    suffix = f"v{a.type.count}f{32 if isinstance(a.type.element, ir.FloatType) else 64}"
    function = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.fmuladd.{suffix}"), [a, b, c])


def emit_larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger of two floats, lane by lane; b if a is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def emit_products(builder: ir.IRBuilder, factors: list[ir.Value], numbers: list[ir.Value], totals: Any) -> None:
    """Add the product of every factor, a pointer to a scalar, with every vector of ``numbers`` to ``totals``, where a
    list for each factor holds a variable for each vector."""
    for pointer, sums in zip(factors, totals, strict=True):
        factor = emit_splat(builder, numbers[0].type, builder.load(pointer))
        for number, total in zip(numbers, sums, strict=True):
            builder.store(emit_fma(builder, factor, number, builder.load(total)), total)
