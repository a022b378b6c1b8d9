"""Cross-polytopes: the largest coordinates of rotations, from the coordinates that the levels of a tile look at.

A polytope of d bits has the first 2^(d - 1) coordinates. Neighbouring rows go by one or two numbers of bits, so the
coordinates of each are walked by themselves: sharing them would save less than it costs to keep them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa_framework.ops.lsh_slices.triton_tiles import (
    load_part,
    load_rows,
    project,
    store_slices,
    subtract_mean,
)


@triton.jit
def _coordinates(
    x, parts, carry, keys, b, h, heads, tile, tiles, row, base,
    CENTER: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """``[R, COLUMNS]`` from column ``base`` on."""
    column = base + tl.arange(0, COLUMNS)
    high = load_part(parts, 0, column, TOTAL, WIDTH)
    middle = load_part(parts, 1, column, TOTAL, WIDTH) if PARTS == 3 else high
    low = load_part(parts, 2, column, TOTAL, WIDTH) if PARTS == 3 else high
    projected = project(x, high, middle, low, PARTS)
    if CENTER:
        projected = subtract_mean(projected, carry, keys, b, h, heads, tile, tiles, column, row, CAUSAL, TOTAL)
    return projected


@triton.jit
def _vertex(
    x, parts, carry, keys, b, h, heads, tile, tiles, row, base, digit,
    CENTER: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Nearest vertices of the polytope of ``digit`` bits whose columns begin at ``base``: int32 ``[R]``."""
    size = 1 << (digit - 1)
    largest = tl.full((ROWS,), -1.0, tl.float32)
    place = tl.zeros((ROWS,), tl.int32)
    negative = tl.zeros((ROWS,), tl.int32)
    for first in range(0, size, COLUMNS):
        # [R, COLUMNS]
        coordinates = _coordinates(
            x, parts, carry, keys, b, h, heads, tile, tiles, row, base + first, CENTER, CAUSAL, WIDTH, TOTAL, PARTS,
            COLUMNS,
        )  # fmt: skip
        column = first + tl.arange(0, COLUMNS)[None, :]
        length = tl.where(column < size, tl.abs(coordinates), -1.0)
        here = tl.max(length, 1)
        where_here = tl.min(tl.where(length == here[:, None], column, first + COLUMNS - 1), 1)
        sign = tl.max(((column == where_here[:, None]) & (coordinates < 0)).to(tl.int32), 1)
        farther = here > largest  # of equally far ones, the first
        largest = tl.where(farther, here, largest)
        place = tl.where(farther, where_here, place)
        negative = tl.where(farther, sign, negative)
    return place + size * negative


@triton.jit
def hash_keys_kernel(
    k, parts, carry, keys, codes, heads, functions, tiles, most,
    CENTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr,
    EACH: tl.constexpr, FIRST: tl.constexpr, SINGLE: tl.constexpr, DIGITS: tl.constexpr, OTHERS: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Vertices of keys: ``codes`` int16 ``[B·Hkv·S, DIGITS + OTHERS, M]``, those that the levels of a tile need."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    x = load_rows(k, b, h, row, keys.keys, keys.keep, keys.keep_batch, D, WIDTH)
    first = tl.load(keys.first + b * keys.first_batch + row, mask=row < keys.keys, other=1)
    last = tl.load(keys.last + b * keys.last_batch + row, mask=row < keys.keys, other=0)
    stands = first <= last
    low = tl.maximum(tl.min(tl.where(stands, first, most), 0), 1)
    high = tl.minimum(tl.max(tl.where(stands, last, 0), 0), most)
    # digits of the first polytope: those of the levels up to SINGLE, and the larger halves of the others
    fewest = tl.minimum(low, SINGLE)
    digits = tl.minimum(high, SINGLE)
    split = tl.maximum(low, SINGLE + 1)
    if high > SINGLE:
        half = high - high // 2
        fewest = tl.where(low > SINGLE, split - split // 2, tl.minimum(fewest, split - split // 2))
        digits = tl.where(low > SINGLE, half, tl.maximum(SINGLE, half))
    for function in range(functions):
        # [DIGITS + OTHERS, M]
        out = codes + (pair * functions + function) * (DIGITS + OTHERS) * keys.keys + row
        for digit in range(fewest, digits + 1):
            vertex = _vertex(
                x, parts, carry, keys, b, h, heads, tile, tiles, row, function * EACH, digit, CENTER, CAUSAL, WIDTH,
                TOTAL, PARTS, COLUMNS, ROWS,
            )  # fmt: skip
            at = out + (row * 0 + (digit - 1)) * keys.keys
            tl.store(at, vertex.to(tl.int16), mask=row < keys.keys)
        if OTHERS > 0:
            for digit in range(split // 2, tl.where(high > SINGLE, high // 2, 0) + 1):
                vertex = _vertex(
                    x, parts, carry, keys, b, h, heads, tile, tiles, row, function * EACH + FIRST, digit, CENTER,
                    CAUSAL, WIDTH, TOTAL, PARTS, COLUMNS, ROWS,
                )  # fmt: skip
                at = out + (row * 0 + (DIGITS + digit - 1)) * keys.keys
                tl.store(at, vertex.to(tl.int16), mask=row < keys.keys)


@triton.jit
def _digits(bits, SINGLE: tl.constexpr):
    """How queries share their bits between the polytopes."""
    small = tl.where(bits > SINGLE, bits // 2, 0)
    return tl.maximum(bits - small, 0), small


@triton.jit
def hash_queries_kernel(
    q, parts, queries, keys, slices, graph_heads,
    D: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, EACH: tl.constexpr, FIRST: tl.constexpr,
    SINGLE: tl.constexpr, OTHERS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The slices of queries that look into their own bucket alone."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = pair // graph_heads, pair % graph_heads
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    bits = tl.load(queries.levels + b * queries.levels_batch + row, mask=row < queries.queries, other=-1)
    x = load_rows(q, b, g, row, queries.queries, None, 0, D, WIDTH)
    large, small = _digits(bits, SINGLE)
    digits, others = tl.max(large, 0), tl.max(small, 0)
    fewest = tl.min(tl.where(large > 0, large, digits), 0)
    fewest_others = tl.min(tl.where(small > 0, small, others), 0)
    for function in range(slices.functions):
        code = tl.zeros((ROWS,), tl.int32)
        for digit in range(tl.maximum(fewest, 1), digits + 1):
            vertex = _vertex(
                x, parts, None, keys, b, g, graph_heads, tile, 0, row, function * EACH, digit, False, False, WIDTH,
                TOTAL, PARTS, COLUMNS, ROWS,
            )  # fmt: skip
            code = tl.where(large == digit, vertex, code)
        if OTHERS > 0:
            beside = tl.zeros((ROWS,), tl.int32)
            for digit in range(tl.maximum(fewest_others, 1), others + 1):
                vertex = _vertex(
                    x, parts, None, keys, b, g, graph_heads, tile, 0, row, function * EACH + FIRST, digit, False,
                    False, WIDTH, TOTAL, PARTS, COLUMNS, ROWS,
                )  # fmt: skip
                beside = tl.where(small == digit, vertex, beside)
            code = (code << small) | beside
        one = function + tl.arange(0, 1)
        store_slices(code[:, None, None], bits, row, one, slices, queries, keys, b, g, graph_heads, 1)


@triton.jit
def _best_vertices(coordinates, size, count, COLUMNS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """The ``count`` nearest vertices of ``[R, COLUMNS]``, ``size [R]`` coordinates of which exist.

    Returns: how near they are and their numbers, ``[R, P]``; -inf and -1 = no more.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    slot = tl.arange(0, P)[None, :]
    size = size[:, None]
    exists = column < size
    # a coordinate's farther vertex counts only where there are too few near ones
    both = count > size
    plus = tl.where(exists & (both | (coordinates >= 0)), coordinates, -float("inf"))
    minus = tl.where(exists & (both | (coordinates < 0)), -coordinates, -float("inf"))
    nearness = tl.full((ROWS, P), -float("inf"), tl.float32)
    vertices = tl.full((ROWS, P), -1, tl.int32)
    none = 2 * COLUMNS
    for number in range(count):
        # [R, 1]
        best = tl.maximum(tl.max(plus, 1), tl.max(minus, 1))[:, None]
        # of equally near ones the first: by vertex where both sides count, else by coordinate
        plus_order = tl.where(plus == best, column, none)
        minus_order = tl.where(minus == best, tl.where(both, column + size, column), none)
        chosen = tl.minimum(tl.min(plus_order, 1), tl.min(minus_order, 1))[:, None]
        negative = tl.max((minus_order == chosen).to(tl.int32), 1)[:, None]
        vertex = tl.where(both, chosen, chosen + size * negative)
        here = (slot == number) & (best > -float("inf"))
        nearness = tl.where(here, best, nearness)
        vertices = tl.where(here, vertex, vertices)
        plus = tl.where(plus_order == chosen, -float("inf"), plus)
        minus = tl.where(minus_order == chosen, -float("inf"), minus)
    return nearness, vertices


@triton.jit
def probe_queries_kernel(
    q, parts, queries, keys, slices, graph_heads,
    D: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, EACH: tl.constexpr, FIRST: tl.constexpr,
    SINGLE: tl.constexpr, OTHERS: tl.constexpr, SECOND: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The slices of queries that look into further buckets. ``FIRST``, ``SECOND``: columns of the polytopes."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = pair // graph_heads, pair % graph_heads
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    bits = tl.load(queries.levels + b * queries.levels_batch + row, mask=row < queries.queries, other=-1)
    x = load_rows(q, b, g, row, queries.queries, None, 0, D, WIDTH)
    large, small = _digits(bits, SINGLE)
    slot = tl.arange(0, P)
    for function in range(slices.functions):
        base = function * EACH
        coordinates = _coordinates(
            x, parts, None, keys, b, g, graph_heads, tile, 0, row, base, False, False, WIDTH, TOTAL, PARTS, FIRST
        )
        size = tl.where(large > 0, 1 << tl.maximum(large - 1, 0), 0)
        near, codes = _best_vertices(coordinates, size, slices.count, FIRST, P, ROWS)
        if OTHERS > 0:
            coordinates = _coordinates(
                x, parts, None, keys, b, g, graph_heads, tile, 0, row, base + FIRST, False, False, WIDTH, TOTAL,
                PARTS, SECOND,
            )  # fmt: skip
            size = tl.where(small > 0, 1 << tl.maximum(small - 1, 0), 0)
            near_too, others = _best_vertices(coordinates, size, slices.count, SECOND, P, ROWS)
            # [R, P * P]
            sums = tl.reshape(near[:, :, None] + near_too[:, None, :], (ROWS, P * P))
            pairs = tl.reshape((codes << small[:, None])[:, :, None] | others[:, None, :], (ROWS, P * P))
            place = tl.arange(0, P * P)[None, :]
            together = tl.full((ROWS, P), -1, tl.int32)
            for number in range(slices.count):
                best = tl.max(sums, 1)[:, None]
                chosen = tl.min(tl.where(sums == best, place, P * P), 1)[:, None]
                code = tl.max(tl.where(place == chosen, pairs, -1), 1)[:, None]
                here = (slot[None, :] == number) & (best > -float("inf"))
                together = tl.where(here, code, together)
                sums = tl.where(place == chosen, -float("inf"), sums)
            codes = tl.where((small > 0)[:, None], together, codes)
        one = function + tl.arange(0, 1)
        store_slices(codes[:, None, :], bits, row, one, slices, queries, keys, b, g, graph_heads, P)
