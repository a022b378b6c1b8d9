"""The order of the keys by bucket: a counting sort, level by level, each tile of keys on its own.

1. count: how many keys of a tile fall into each bucket; 2. scan: where the keys of each tile go; 3. place: a program
walks its tile and a level a few keys at a time, so that keys of one bucket keep the order of their positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa_framework.ops.lsh_slices.triton_tiles import key_levels


@triton.jit
def _code(
    codes, segment, key, standing, bits, keys, most, SINGLE: tl.constexpr, FIRST: tl.constexpr, VARIANTS: tl.constexpr
):
    """Codes of keys for ``bits`` bits, -1 where not standing; ``codes`` int16 ``[B·Hkv·S, VARIANTS, M]``.

    ``SINGLE == 0``: one code of ``most`` bits, of which the first count. Else variant ``digit - 1`` is the vertex of
    the first polytope for so many bits, variant ``FIRST + digit - 1`` that of the second.
    """
    at = codes + segment * VARIANTS * keys + key
    if SINGLE == 0:
        code = (tl.load(at, mask=standing, other=0).to(tl.int32) & 0xFFFF) >> (most - bits)
    else:
        low = tl.where(bits > SINGLE, bits // 2, 0)
        large = tl.maximum(bits - low - 1, 0).to(tl.int64) * keys
        code = tl.load(at + large, mask=standing, other=0).to(tl.int32) * tl.minimum(bits, 1)
        if VARIANTS > FIRST:
            small = (FIRST + tl.maximum(low - 1, 0)).to(tl.int64) * keys
            code = (code << low) | (tl.load(at + small, mask=standing, other=0).to(tl.int32) * tl.minimum(low, 1))
    return tl.where(standing, code, -1)


@triton.jit
def count_kernel(
    codes, keys, ranges, counts, tiles, pairs_of_batch, most, buckets,
    SINGLE: tl.constexpr, FIRST: tl.constexpr, VARIANTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys per bucket: ``counts [B·Hkv·S, tiles, buckets]``, zeros before. ``pairs_of_batch``: Hkv·S."""
    tile = tl.program_id(0) % tiles
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    b = segment // pairs_of_batch
    low = tl.load(ranges + (b * tiles + tile) * 2)
    high = tl.load(ranges + (b * tiles + tile) * 2 + 1)
    out = counts + (segment * tiles + tile) * buckets
    one = tl.full((BLOCK,), 1, tl.int32)
    for at in range(0, TILE, BLOCK):
        # [BLOCK]
        key, first, last = key_levels(keys, b, tile * TILE + at + tl.arange(0, BLOCK), most)
        for bits in range(low, high + 1):
            standing = (first <= bits) & (bits <= last)
            code = _code(codes, segment, key, standing, bits, keys.keys, most, SINGLE, FIRST, VARIANTS)
            tl.atomic_add(out + ((1 << bits) - 1 + code), one, mask=standing, sem="relaxed")


@triton.jit
def scan_kernel(
    counts, firsts, order, tiles, buckets, length, TILES: tl.constexpr, BUCKETS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """``counts`` become the places of the first keys of every tile; ``firsts [B·Hkv·S, buckets]``, of all tiles.

    What is left of ``order`` beyond the last bucket becomes 0.
    """
    segment = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    running = tl.zeros((), tl.int32)
    for base in range(0, buckets, BUCKETS):
        bucket = base + tl.arange(0, BUCKETS)
        at = counts + segment * tiles * buckets + bucket[None, :]
        total = tl.zeros((BUCKETS,), tl.int32)
        for number in range(0, tiles, TILES):
            real = (number + tile < tiles)[:, None] & (bucket < buckets - 1)[None, :]
            here = at + (number + tile).to(tl.int64)[:, None] * buckets
            total += tl.sum(tl.load(here, mask=real, other=0), 0)
        start = running + tl.cumsum(total, 0) - total
        tl.store(firsts + segment * buckets + bucket, start, mask=bucket < buckets)
        for number in range(0, tiles, TILES):
            # [TILES, BUCKETS]
            real = (number + tile < tiles)[:, None] & (bucket < buckets - 1)[None, :]
            here = at + (number + tile).to(tl.int64)[:, None] * buckets
            count = tl.load(here, mask=real, other=0)
            tl.store(here, start[None, :] + tl.cumsum(count, 0) - count, mask=real)
            start += tl.sum(count, 0)
        running += tl.sum(total, 0)
    for place in range(running, length, TAIL):
        at = place + tl.arange(0, TAIL)
        tl.store(order + segment * length + at, tl.zeros((TAIL,), tl.int32), mask=at < length)


@triton.jit
def place_kernel(
    codes, keys, ranges, counts, order, tiles, pairs_of_batch, most, buckets, length,
    SINGLE: tl.constexpr, FIRST: tl.constexpr, VARIANTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``order [B·Hkv·S, L]``; ``counts`` are used up as counters: no other program has the same row and level."""
    pid = tl.program_id(0)
    tile = pid % tiles
    bits = (pid // tiles) % (most + 1)
    segment = (pid // tiles // (most + 1)).to(tl.int64)
    b = segment // pairs_of_batch
    low = tl.load(ranges + (b * tiles + tile) * 2)
    high = tl.load(ranges + (b * tiles + tile) * 2 + 1)
    if (low <= bits) & (bits <= high):
        next_place = counts + (segment * tiles + tile) * buckets + (1 << bits) - 1
        lane = tl.arange(0, LANES)
        start = tile * TILE
        stop = tl.minimum(start + TILE, keys.keys)
        # what a key adds to the sums of another: 1 to their number, 2^16 to how many come before
        weight = tl.where(lane[:, None] < lane[None, :], 65537, 1)
        # [LANES]
        key, first, last = key_levels(keys, b, start + lane, most)
        standing = (first <= bits) & (bits <= last) & (start + lane < stop)
        code = _code(codes, segment, key, standing, bits, keys.keys, most, SINGLE, FIRST, VARIANTS)
        for at in range(start, stop, LANES):
            # the next keys are on their way while these find their places
            ahead = at + LANES + lane
            next_key, first, last = key_levels(keys, b, ahead, most)
            standing = (first <= bits) & (bits <= last) & (ahead < stop)
            next_code = _code(codes, segment, next_key, standing, bits, keys.keys, most, SINGLE, FIRST, VARIANTS)
            # [LANES, LANES]
            found = tl.sum(tl.where(code[:, None] == code[None, :], weight, 0), 0)
            rank = found >> 16
            total = found & 0xFFFF
            place = tl.load(next_place + code, mask=code >= 0, other=0)
            tl.store(order + segment * length + place + rank, key, mask=(code >= 0) & (place + rank < length))
            tl.debug_barrier()  # every lane has read its counter
            tl.store(next_place + code, place + total, mask=(code >= 0) & (rank == total - 1))
            tl.debug_barrier()  # every lane sees the counters of these keys
            key = next_key
            code = next_code
