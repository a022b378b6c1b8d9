"""What is computed before hashing: directions in parts, levels of tiles of keys, sums of the keys before each tile."""

from __future__ import annotations

import triton
import triton.language as tl

from ssa_framework.ops.lsh_slices.triton_tiles import key_levels, load_part, load_rows
from ssa_framework.ops.triton_runtime import dot

CARRY_TILES = 64
"""Tiles whose carries one program computes."""


@triton.jit
def prepare_kernel(
    directions, stride_function, stride_row, stride_column, parts, functions, keys, ranges, tiles, num_ranges, most,
    USED: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, TOTAL: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ``num_ranges`` programs: fewest and most bits of the keys of a tile, ``ranges [B, tiles, 2]``.

    The others: ``directions [S, F, D]`` transposed, ``parts [PARTS, WIDTH, TOTAL]``, one direction each. A function
    has ``EACH`` columns, the first ``FIRST`` for its directions from 0 on, the others for those from ``SECOND`` on;
    beyond direction ``USED`` there are zeros.
    """
    pid = tl.program_id(0)
    if pid < num_ranges:
        b = (pid // tiles).to(tl.int64)
        # [BLOCK]
        low = tl.zeros((BLOCK,), tl.int32) + (most + 1)
        high = tl.full((BLOCK,), -1, tl.int32)
        for at in range(0, TILE, BLOCK):
            _, first, last = key_levels(keys, b, (pid % tiles) * TILE + at + tl.arange(0, BLOCK), most)
            low = tl.where(first <= last, tl.minimum(low, first), low)
            high = tl.where(first <= last, tl.maximum(high, last), high)
        tl.store(ranges + 2 * pid, tl.min(low, 0))
        tl.store(ranges + 2 * pid + 1, tl.max(high, 0))
    else:
        column = pid - num_ranges
        function, place = column // EACH, column % EACH
        row = tl.where(place < FIRST, place, place - FIRST + SECOND)
        d = tl.arange(0, WIDTH)
        source = directions + function.to(tl.int64) * stride_function + row * stride_row + d * stride_column
        real = (function < functions) & (row < USED) & ((place >= FIRST) | (row < SECOND))
        x = tl.load(source, mask=d < tl.where(real, D, 0), other=0.0)
        out = parts + d * TOTAL + column
        if PARTS == 3:
            for part in tl.static_range(PARTS):
                piece = x.to(tl.bfloat16)
                tl.store(out + part * WIDTH * TOTAL, piece)
                x -= piece.to(tl.float32)
        else:
            tl.store(out, x)


@triton.jit
def sums_kernel(
    k, keys, sums, heads, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of tiles of keys, float32 ``[B·Hkv, tiles, WIDTH]``."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    # [ROWS, WIDTH]
    x = load_rows(k, pair // heads, pair % heads, row, keys.keys, keys.keep, keys.keep_batch, D, WIDTH)
    at = sums + (pair * tl.num_programs(0) + tile) * WIDTH + tl.arange(0, WIDTH)
    tl.store(at, tl.sum(x.to(tl.float32), 0))


@triton.jit
def carry_kernel(
    sums, parts, carry, tiles, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Projections of the sum of all tiles before each, ``carry [B·Hkv, tiles, TOTAL]``, or of all, ``[B·Hkv, 1, ..]``.

    Sums of sums are float64: with many keys, float32 would drift from the mean.
    """
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.arange(0, TILES)
    at = sums + pair * tiles * WIDTH + tl.arange(0, WIDTH)[None, :]
    # [WIDTH]
    before = tl.zeros((WIDTH,), tl.float64)
    for first in range(0, block * TILES if CAUSAL else tiles, TILES):
        number = first + tile
        x = tl.load(at + number[:, None] * WIDTH, mask=(number < tiles)[:, None], other=0.0)
        before += tl.sum(x.to(tl.float64), 0)
    number = block * TILES + tile
    if CAUSAL:
        # each row holds the tile before its own, so that not even a NaN of its own tile gets in
        earlier = (tile > 0) & (number < tiles)
        x = tl.load(at + (number - 1)[:, None] * WIDTH, mask=earlier[:, None], other=0.0)
        total = before[None, :] + tl.cumsum(x.to(tl.float64), 0)  # [TILES, WIDTH]
        rows = tiles
    else:
        total = before[None, :] + tl.zeros((TILES, WIDTH), tl.float64)
        rows = 1
    # [WIDTH, COLUMNS]
    y = load_part(parts, 0, column, TOTAL, WIDTH).to(tl.float32)
    if PARTS == 3:
        y += load_part(parts, 1, column, TOTAL, WIDTH).to(tl.float32)
        y += load_part(parts, 2, column, TOTAL, WIDTH).to(tl.float32)
    acc = dot(total.to(tl.float32), y, tl.zeros((TILES, COLUMNS), tl.float32), "tf32x3")
    out = carry + (pair * rows + number)[:, None] * TOTAL + column[None, :]
    tl.store(out, acc, mask=(number < rows)[:, None])
