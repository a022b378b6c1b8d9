"""Gradients of keys and values through slices: block of places by block of places, then places by key.

A place is an index of the order whose slices are attended. Pairs (query, slice) are sorted by the block of places that
their slice begins in, so that a block finds the pairs that reach it side by side.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_framework.ops.neighbor_attention.triton_backward import key_step
from ssa_framework.ops.neighbor_attention.triton_tiles import (
    LOG2_E,
    band_of,
    first_columns,
    gather,
    kept_pairs,
    without_columns,
)

BLOCK_PLACES = 32
"""Places of a block, about as many as a cluster has."""
MOST_PARTS = 16
"""Programs of one block, at most."""
_PAIRS_OF_A_PART = 2048
_BLOCKS_PER_EXTRA_PART = 4


class Pairs(NamedTuple):
    """Pairs of all lists, sorted by the block that their slice begins in, then by query.

    ``order``: int64 ``[lists · N · P]``, the pairs. ``windows``: int64 ``[lists, blocks, 2]``: the first and one past
    the last of the pairs among which are all that reach a block.
    """

    order: Tensor
    windows: Tensor


@triton.jit
def furthest_kernel(ends, order, found, furthest, BLOCK: tl.constexpr):
    """``furthest [lists, blocks]``: where the last slice ends that begins in each block; ``found [lists, blocks + 1]``:
    the first pair of each block."""
    block = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    at = found + index * (tl.num_programs(0) + 1) + block
    first = tl.load(at)
    count = (tl.load(at + 1) - first).to(tl.int32)
    last = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        pair = tl.load(order + first + entry, mask=entry < count, other=0)
        last = tl.maximum(last, tl.load(ends + pair, mask=entry < count, other=0))
    tl.store(furthest + index * tl.num_programs(0) + block, tl.max(last, 0))


def sort_pairs(start: Tensor, end: Tensor, places: int) -> Pairs:
    """Of slices ``start, end`` int32 ``[b, g, N, P]`` of orders of ``places`` places."""
    lists, blocks, device = start.shape[0] * start.shape[1], triton.cdiv(places, BLOCK_PLACES), start.device
    start, end = (x.reshape(lists, -1) for x in (start, end))
    dtype = torch.int32 if lists * (blocks + 1) < 2**31 else torch.int64
    number = torch.arange(lists, dtype=dtype, device=device)[:, None] * (blocks + 1)
    bucket = torch.where(end > start, start // BLOCK_PLACES, blocks) + number
    bucket, order = bucket.flatten().sort(stable=True)
    edges = torch.arange(lists * (blocks + 1), dtype=dtype, device=device)
    found = torch.searchsorted(bucket, edges).view(lists, blocks + 1)
    furthest = torch.empty((lists, blocks), dtype=torch.int32, device=device)
    furthest_kernel[(blocks, lists)](end.contiguous(), order, found, furthest, BLOCK=256)
    # the first block from which some slice reaches this one
    place = torch.arange(blocks, dtype=torch.int32, device=device) * BLOCK_PLACES
    earliest = torch.searchsorted(furthest.cummax(1).values, place.expand(lists, -1).contiguous(), right=True)
    earliest = torch.minimum(earliest, torch.arange(1, blocks + 1, device=device))
    return Pairs(order, torch.stack([found.gather(1, earliest), found[:, 1:]], dim=-1))


def places_of_keys(order: Tensor, windows: Tensor, lists: tuple[int, int], num_keys: int) -> tuple[Tensor, Tensor]:
    """The places of each key in ``order`` int32 ``[b, g, L]``, ascending, of those in blocks that any pair may reach.

    ``windows``: of `sort_pairs`, of ``lists`` batch elements and heads. Returns int64 ``[b·g·L]``, the places of the
    flattened orders, and int64 ``[b·g·M + 1]``, where each key's begin.
    """
    batches, heads, length = order.shape
    used = (windows[..., 1] > windows[..., 0]).view(*lists, -1)
    for axis in range(2):
        if used.shape[axis] > 1 and order.shape[axis] == 1:
            used = used.any(axis, keepdim=True)
    used = used.repeat_interleave(BLOCK_PLACES, dim=2)[..., :length]
    total = batches * heads * num_keys
    first = torch.arange(batches * heads, device=order.device).view(batches, heads, 1) * num_keys
    keys, places = torch.where(used, order + first, total).flatten().sort(stable=True)
    return places, torch.searchsorted(keys, torch.arange(total + 1, device=order.device))


class Parts(NamedTuple):
    """How the pairs of a block of places are shared by several programs: some clusters are opened by a large share of
    all queries, and one program alone would be the last to finish by far.

    ``counts``: int32 ``[lists, blocks]``, parts of each block. ``firsts``: int64 ``[lists, blocks]``, where the second
    part of a block stands in ``extra_k`` and ``extra_v``, float32 ``[copies, most, BLOCK_PLACES, W or WV]``, which take
    all parts but the first; a copy for each batch element and head that shares the slices.
    """

    counts: Any
    firsts: Any
    extra_k: Any
    extra_v: Any
    most: Any


def share_out(windows: Tensor, copies: int, widths: tuple[int, int]) -> Parts:
    """Parts of about 2,048 pairs, as far as there is room; ``windows`` of `sort_pairs`."""
    lists, blocks, _ = windows.shape
    extra = ((windows[..., 1] - windows[..., 0]) // _PAIRS_OF_A_PART).clamp_(0, MOST_PARTS - 1)
    ends = extra.flatten().cumsum(0).view(lists, blocks)
    most = math.ceil(lists * blocks / _BLOCKS_PER_EXTRA_PART)
    counts = torch.where(ends <= most, extra + 1, 1).int()
    extra_k, extra_v = (
        torch.empty((copies, most, BLOCK_PLACES, w), dtype=torch.float32, device=windows.device) for w in widths
    )
    return Parts(counts, ends - extra, extra_k, extra_v, most)


@triton.jit
def _copy_of(list_batches, list_heads, batch, list_head, LIST_HEADS):
    """Which of those that share slices this is."""
    return (batch // list_batches) * (LIST_HEADS // list_heads) + list_head // list_heads


@triton.jit
def add_parts_kernel(
    partial_k, partial_v, parts, list_batches, list_heads, length,
    W: tl.constexpr, WV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the other parts of a block of places to the first, in their order."""
    block = tl.program_id(0)
    list_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    index = (batch % list_batches) * list_heads + list_head % list_heads
    count = tl.load(parts.counts + index * tl.num_programs(0) + block)
    if count > 1:
        copy = _copy_of(list_batches, list_heads, batch, list_head, tl.num_programs(1))
        first = copy * parts.most + tl.load(parts.firsts + index * tl.num_programs(0) + block)
        place = block * BLOCK + tl.arange(0, BLOCK)
        real = (place < length)[:, None]
        to = ((batch * tl.num_programs(1) + list_head) * length + place)[:, None]
        dims, value_dims = tl.arange(0, W)[None, :], tl.arange(0, WV)[None, :]
        acc_k = tl.load(partial_k + to * W + dims, mask=real, other=0.0)
        acc_v = tl.load(partial_v + to * WV + value_dims, mask=real, other=0.0)
        for part in range(count - 1):
            at = ((first + part) * BLOCK + tl.arange(0, BLOCK))[:, None]
            acc_k += tl.load(parts.extra_k + at * W + dims)
            acc_v += tl.load(parts.extra_v + at * WV + value_dims)
        tl.store(partial_k + to * W + dims, acc_k, mask=real)
        tl.store(partial_v + to * WV + value_dims, acc_v, mask=real)


@triton.jit
def place_gradient_kernel(
    grad_out, q, k, v, statistics, partial_k, partial_v, fixed, slices, pairs, windows, parts, list_batches,
    list_heads, blocks, num_queries, num_keys, scale,
    CAUSAL: tl.constexpr, SHARE: tl.constexpr, SHARE_PADDED: tl.constexpr,
    GROUP: tl.constexpr, Q_ROW: tl.constexpr, GRAD_ROW: tl.constexpr, OFFSET: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, WV: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial_k, partial_v``: float32 ``[B, list heads, L, W or WV]``, for a block of the places of list head
    ``program_id(1)``, which is ``SHARE`` query heads with the same slices; from part ``program_id(0) // blocks`` of
    the block's pairs, see `Parts`."""
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    list_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = list_head // (GROUP // SHARE)
    # [S]
    place = block * BLOCK + tl.arange(0, BLOCK)
    real = place < slices.length
    order = slices.order + batch * slices.order_batch + list_head * slices.order_head
    keys = without_columns(
        fixed, first_columns(fixed), tl.load(order + place * slices.order_place, mask=real, other=-1)
    )
    # [S, W], [S, WV]
    key_tile = gather(k.pointer + batch * k.batch + kv_head * k.head, keys, k, K_ROW, D, W)
    value_tile = gather(v.pointer + batch * v.batch + kv_head * v.head, keys, v, V_ROW, DV, WV)
    acc_k = tl.zeros((BLOCK, W), tl.float32)
    acc_v = tl.zeros((BLOCK, WV), tl.float32)
    head = kv_head * GROUP
    q_start = q.pointer + batch * q.batch + head * q.head
    grad_start = grad_out.pointer + batch * grad_out.batch + head * grad_out.head
    kv_heads = tl.num_programs(1) // (GROUP // SHARE)
    of_head = statistics + (batch * kv_heads + kv_head) * num_queries * (2 * GROUP)
    index = (batch % list_batches) * list_heads + list_head % list_heads
    at_block = index * blocks + block
    first_pair = tl.load(windows + at_block * 2)
    count = (tl.load(windows + at_block * 2 + 1) - first_pair).to(tl.int32)
    num_parts = tl.load(parts.counts + at_block)
    of_part = tl.cdiv(count, num_parts * QUERIES) * QUERIES
    first_pair += part * of_part
    count = tl.where(part < num_parts, tl.minimum(count - part * of_part, of_part), 0)
    share = tl.arange(0, QUERIES * SHARE_PADDED) % SHARE_PADDED
    for start in range(0, count, QUERIES):
        # [R]
        entry = start + tl.arange(0, QUERIES * SHARE_PADDED) // SHARE_PADDED
        inside = entry < count
        pair = tl.load(pairs + first_pair + entry, mask=inside, other=0)
        pair = tl.where(inside, pair - index * num_queries * slices.slots, 0)
        row = (pair // slices.slots).to(tl.int32)
        at = batch * slices.batch + list_head * slices.head + row.to(tl.int64) * slices.row
        at += (pair % slices.slots) * slices.slot
        begin = tl.load(slices.start + at, mask=inside, other=0)
        end = tl.load(slices.end + at, mask=inside, other=0)
        first, last = band_of(fixed, row + fixed.offset, num_keys)
        # [S, R]
        allowed = (place[:, None] >= begin[None, :]) & (place[:, None] < end[None, :]) & (keys >= 0)[:, None]
        allowed = allowed & ((keys[:, None] < first[None, :]) | (keys[:, None] > last[None, :]))
        if CAUSAL:
            allowed = allowed & (keys[:, None] <= (row + fixed.offset)[None, :])
        allowed = kept_pairs(fixed, batch, keys, row, allowed)
        mine = tl.where((share < SHARE) & inside, share + (list_head % (GROUP // SHARE)).to(tl.int32) * SHARE, -1)
        acc_k, acc_v = key_step(
            row, mine, allowed, None, key_tile, value_tile, acc_k, acc_v,
            q, q_start, grad_out, grad_start, of_head, scale * LOG2_E,
            GROUP, Q_ROW, GRAD_ROW, OFFSET, D, DV, W, WV, PRECISION,
        )  # fmt: skip
    acc_k *= scale
    dims, value_dims = tl.arange(0, W)[None, :], tl.arange(0, WV)[None, :]
    if part == 0:
        to = ((batch * tl.num_programs(1) + list_head) * slices.length + place)[:, None]
        tl.store(partial_k + to * W + dims, acc_k, mask=real[:, None])
        tl.store(partial_v + to * WV + value_dims, acc_v, mask=real[:, None])
    elif part < num_parts:
        copy = _copy_of(list_batches, list_heads, batch, list_head, tl.num_programs(1))
        first = copy * parts.most + tl.load(parts.firsts + at_block) + part - 1
        to = (first * BLOCK + tl.arange(0, BLOCK))[:, None]
        tl.store(parts.extra_k + to * W + dims, acc_k)
        tl.store(parts.extra_v + to * WV + value_dims, acc_v)
