"""Neighbor lists turned around: for each block of consecutive keys, the queries that list one of them.

An entry is a query and a bit mask of the keys of the block that it lists. Slots of a list that follow one another and
lie in one block make one entry, so a sorted list makes at most one entry per block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_framework.ops.neighbor_attention.triton_tiles import Lists

BLOCK_KEYS = 16
"""Keys of a block: the fewest rows that a matrix unit multiplies, and the bits of an entry's mask."""

_ROWS = 8
_SLOTS = 64
_FILLED = 256
_SORTED_AT_ONCE = 2**27
_INT16_VALUES = 2**16
_INT32_LISTS = 256  # of 2^27 keys, times 16, at most


class Incoming(NamedTuple):
    """Entries of all lists, in the order of (batch element, list head, block, query).

    ``starts``: int64 ``[lists, blocks + 1]``, where each block begins in the other two. ``queries``: int32.
    ``masks``: int16, bit i = the block's key i.
    """

    starts: Tensor
    queries: Tensor
    masks: Tensor


@triton.jit
def _first_of_block(pointer, slot, inside, lists, BLOCK: tl.constexpr):
    """Block of each slot's key, and whether an entry begins at the slot; all of one shape."""
    inside = inside & (slot < lists.slots)
    key = tl.load(pointer, mask=inside, other=-1)
    before = tl.load(pointer - lists.slot, mask=inside & (slot > 0), other=-1)
    first = (key >= 0) & ((before < 0) | (before // BLOCK != key // BLOCK))
    return key // BLOCK, first


@triton.jit
def _mask_of(pointer, slot, block, first, lists, BLOCK: tl.constexpr):
    """Bits of the keys in the block of each entry, from its first slot on."""
    bits = tl.zeros_like(block)
    same = first
    for step in tl.static_range(BLOCK):
        same = same & (slot + step < lists.slots)
        key = tl.load(pointer + step * lists.slot, mask=same, other=-1)
        same = same & (key >= 0) & (key // BLOCK == block)
        bits = bits | tl.where(same, 1 << (key % BLOCK), 0)
    return bits


@triton.jit
def _start_of(lists, index, list_heads):
    batch = (index // list_heads).to(tl.int64)
    return lists.pointer + batch * lists.batch + (index % list_heads).to(tl.int64) * lists.head


@triton.jit
def bucket_kernel(
    lists, list_heads, num_rows, blocks, first_list, lowest, buckets,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``buckets [lists, N, K]``: ``lowest`` plus where the entry of each slot belongs; the last bucket: no entry."""
    index = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row_start = _start_of(lists, first_list + index, list_heads) + row.to(tl.int64) * lists.row
    for start in range(0, lists.slots, SLOTS):
        # [ROWS, SLOTS]
        slot = start + tl.arange(0, SLOTS)[None, :]
        block, first = _first_of_block(row_start + slot * lists.slot, slot, row < num_rows, lists, BLOCK)
        bucket = lowest + tl.where(first, index * blocks + block, tl.num_programs(1) * blocks)
        place = (index.to(tl.int64) * num_rows + row) * lists.slots + slot
        tl.store(buckets + place, bucket.to(buckets.dtype.element_ty), mask=(row < num_rows) & (slot < lists.slots))


@triton.jit
def fill_kernel(
    lists, list_heads, num_rows, first_list, count, order, queries, masks,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Writes the ``count[0]`` entries of some lists in the order of their sorted slots, numbers of type ``INDEX``."""
    at = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    first = at < tl.load(count)
    source = tl.load(order + at, mask=first, other=0).to(INDEX)
    slot = source % lists.slots
    row = source // lists.slots
    start = _start_of(lists, first_list + (row // num_rows).to(tl.int32), list_heads)
    row = row % num_rows
    pointer = start + row.to(tl.int64) * lists.row + slot * lists.slot
    block = tl.load(pointer, mask=first, other=0) // BLOCK
    tl.store(queries + at, row.to(tl.int32), mask=first)
    tl.store(masks + at, _mask_of(pointer, slot, block, first, lists, BLOCK).to(tl.int16), mask=first)


def num_blocks(num_keys: int) -> int:
    return triton.cdiv(num_keys, BLOCK_KEYS)


def invert_lists(neighbors: Tensor, lists: Lists, num_keys: int) -> Incoming:
    """The entries of ``neighbors`` int32 ``[b, g, N, K]``, which ``lists`` describes for kernels, sorted by query."""
    batches, heads, rows, slots = neighbors.shape
    device, total, blocks, per_list = neighbors.device, batches * heads, num_blocks(num_keys), rows * slots
    starts = torch.empty((total, blocks + 1), dtype=torch.int64, device=device)
    queries = torch.empty(total * per_list, dtype=torch.int32, device=device)
    masks = torch.empty(total * per_list, dtype=torch.int16, device=device)
    short = blocks < _INT16_VALUES  # half as wide a type is sorted in half as many passes
    step = max(1, min(_SORTED_AT_ONCE // per_list, (_INT16_VALUES - 1) // blocks if short else _INT32_LISTS))
    lowest = -(_INT16_VALUES // 2) if short else 0
    grid = triton.cdiv(rows, _ROWS)
    for first in range(0, total, step):
        some = min(step, total - first)
        buckets = torch.empty(some * per_list, dtype=torch.int16 if short else torch.int32, device=device)
        bucket_kernel[(grid, some)](
            lists, heads, rows, blocks, first, lowest, buckets, ROWS=_ROWS, SLOTS=_SLOTS, BLOCK=BLOCK_KEYS
        )
        buckets, order = buckets.sort(stable=True)
        edges = torch.arange(some * blocks + 1, dtype=torch.int32, device=device) + lowest
        found = torch.searchsorted(buckets, edges.to(buckets.dtype))
        place = first * per_list
        starts[first : first + some, :-1] = found[:-1].view(some, blocks) + place
        starts[first : first + some, -1] = found[blocks::blocks] + place
        fill_kernel[(triton.cdiv(order.numel(), _FILLED),)](
            lists, heads, rows, first, found[-1:], order, queries[place:], masks[place:],
            SLOTS=_FILLED, BLOCK=BLOCK_KEYS, INDEX=tl.int32 if order.numel() < 2**31 else tl.int64,
        )  # fmt: skip
    return Incoming(starts, queries, masks)
