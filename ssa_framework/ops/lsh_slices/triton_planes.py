"""Hyperplanes: signs of projections become codes in the registers that hold the projections."""

from __future__ import annotations

import triton
import triton.language as tl

from ssa_framework.ops.lsh_slices.triton_tiles import load_part, load_rows, project, store_slices, subtract_mean


@triton.jit
def _signs(projected, most, PLANES: tl.constexpr):
    """Codes of ``most`` bits ``[R, F]`` of ``projected [R, F, PLANES]``."""
    plane = tl.arange(0, PLANES)
    value = tl.where(plane < most, 1 << tl.maximum(most - 1 - plane, 0), 0)
    return tl.sum(tl.where(projected > 0, value[None, None, :], 0), 2)


@triton.jit
def _probe(code, projected, bits, flips, count, P: tl.constexpr, PLANES: tl.constexpr, RANKS: tl.constexpr):
    """Own and next best codes ``[R, F, P]`` of queries with the codes ``[R, F]``; -1 = no more.

    ``flips [most + 1, count]``: ranks of the planes to flip, as bits; the plane that a query is nearest to has rank 0.
    """
    plane = tl.arange(0, PLANES)[None, None, :]
    p = tl.arange(0, P)
    levels = bits[:, None]
    flip = tl.load(flips + levels * count + p[None, :], mask=(p < count)[None, :], other=0)  # [R, P]
    codes = code[:, :, None] + tl.zeros((1, 1, P), tl.int32)
    distance = tl.where(plane < levels[:, :, None], tl.abs(projected), float("inf"))
    for rank in range(RANKS):
        # [R, F]
        nearest = tl.min(distance, 2)
        which = tl.min(tl.where(distance == nearest[:, :, None], plane, PLANES), 2)
        value = tl.where(which < levels, 1 << tl.maximum(levels - 1 - which, 0), 0)
        chosen = ((flip >> rank) & 1)[:, None, :] != 0
        codes = tl.where(chosen, codes ^ value[:, :, None], codes)
        distance = tl.where(plane == which[:, :, None], float("inf"), distance)
    return tl.where((flip == 0)[:, None, :] & (p > 0)[None, None, :], -1, codes)


@triton.jit
def hash_keys_kernel(
    k, parts, carry, keys, codes, heads, functions, tiles, most,
    CENTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr,
    COLUMNS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Codes of keys for ``most`` bits: ``codes`` int16 ``[B·Hkv·S, 1, M]``.

    A program keeps the directions of some functions and goes through a few tiles of rows.
    """
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    function = tl.program_id(2) * (COLUMNS // PLANES) + tl.arange(0, COLUMNS // PLANES)
    # [WIDTH, COLUMNS]
    high = load_part(parts, 0, column, TOTAL, WIDTH)
    middle = load_part(parts, 1, column, TOTAL, WIDTH) if PARTS == 3 else high
    low = load_part(parts, 2, column, TOTAL, WIDTH) if PARTS == 3 else high
    start = tl.program_id(0) * TILES
    for tile in range(start, tl.minimum(start + TILES, tiles)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        x = load_rows(k, b, h, row, keys.keys, keys.keep, keys.keep_batch, D, WIDTH)
        projected = project(x, high, middle, low, PARTS)  # [ROWS, COLUMNS]
        if CENTER:
            projected = subtract_mean(projected, carry, keys, b, h, heads, tile, tiles, column, row, CAUSAL, TOTAL)
        code = _signs(tl.reshape(projected, (ROWS, COLUMNS // PLANES, PLANES)), most, PLANES)
        at = codes + (pair * functions + function)[None, :] * keys.keys + row[:, None]
        real = (row < keys.keys)[:, None] & (function < functions)[None, :]
        tl.store(at, code.to(tl.int16), mask=real)


@triton.jit
def hash_queries_kernel(
    q, parts, queries, keys, slices, flips, graph_heads, tiles, most,
    D: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr, P: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The slices of the queries."""
    pair = tl.program_id(1).to(tl.int64)
    b, g = pair // graph_heads, pair % graph_heads
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    function = tl.program_id(2) * (COLUMNS // PLANES) + tl.arange(0, COLUMNS // PLANES)
    # [WIDTH, COLUMNS]
    high = load_part(parts, 0, column, TOTAL, WIDTH)
    middle = load_part(parts, 1, column, TOTAL, WIDTH) if PARTS == 3 else high
    low = load_part(parts, 2, column, TOTAL, WIDTH) if PARTS == 3 else high
    start = tl.program_id(0) * TILES
    for tile in range(start, tl.minimum(start + TILES, tiles)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        bits = tl.load(queries.levels + b * queries.levels_batch + row, mask=row < queries.queries, other=-1)
        x = load_rows(q, b, g, row, queries.queries, None, 0, D, WIDTH)
        projected = tl.reshape(project(x, high, middle, low, PARTS), (ROWS, COLUMNS // PLANES, PLANES))
        # [ROWS, F]
        code = _signs(projected, most, PLANES) >> (most - tl.maximum(bits, 0))[:, None]
        if P == 1:
            codes = code[:, :, None]
        else:
            codes = _probe(code, projected, tl.maximum(bits, 0), flips, slices.count, P, PLANES, RANKS)
        store_slices(codes, bits, row, function, slices, queries, keys, b, g, graph_heads, P)
