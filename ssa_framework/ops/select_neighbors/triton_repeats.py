"""Where a key stands in every order, so that a key that an earlier slice of the query holds is told at once.

An order may hold a key several times: an index with several resolutions writes one order behind the other. So the
places are cut into parts that no query's slices straddle, and a table gives, for each part and key, the place in each
order. Where an order holds a key twice within a part, the table is marked as broken, and slices are searched instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_framework.ops.select_neighbors.triton_slices import Slices, key_at

_BLOCK = 1024
_LARGEST = 2**31 - 1


class Places(NamedTuple):
    """Attributes:
    entries: int32 ``[H, S, L]``, the entry of the key at each place. table: int32 ``[entries, S rounded up to even]``,
        the place of a key in every order, -1 where it is missing. broken: int32 ``[1]``, 1 = the table can't be used.
    """

    entries: Any
    table: Any
    broken: Any


@triton.jit
def _extent_kernel(
    slices, parts, lowest, highest, first_head, graph_heads, ORDERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The lowest and highest key of each part."""
    head = tl.program_id(2).to(tl.int64)
    b, g = (first_head + head) // graph_heads, (first_head + head) % graph_heads
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(parts + head * slices.length + place, mask=place < slices.length, other=-1)
    live = part >= 0
    key = key_at(slices, b, g, tl.program_id(1).to(tl.int64), place, live).to(tl.int32)
    # one update for each part that the block touches, mostly a single one
    current = tl.max(part, 0)
    while current >= 0:
        here = part == current
        tl.atomic_min(lowest + current, tl.min(tl.where(here, key, 2147483647), 0), sem="relaxed")
        tl.atomic_max(highest + current, tl.max(tl.where(here, key, -1), 0), sem="relaxed")
        current = tl.max(tl.where(part < current, part, -1), 0)


@triton.jit
def _fill_kernel(
    slices, parts, origins, entries, table, broken, capacity, first_head, graph_heads,
    ORDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entry of every place, and the place of every entry."""
    head = tl.program_id(2).to(tl.int64)
    number = tl.program_id(1).to(tl.int64)
    b, g = (first_head + head) // graph_heads, (first_head + head) % graph_heads
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(parts + head * slices.length + place, mask=place < slices.length, other=-1)
    live = part >= 0
    key = key_at(slices, b, g, number, place, live)
    entry = tl.load(origins + part, mask=live, other=0) + key
    fits = live & (entry < capacity)
    if tl.max((live & ~fits).to(tl.int32), 0) > 0:
        tl.store(broken, 1)
    entry = tl.where(fits, entry, 0)
    tl.store(entries + (head * ORDERS + number) * slices.length + place, entry.to(tl.int32), mask=place < slices.length)
    tl.store(table + entry * ((ORDERS + 1) // 2 * 2) + number, place.to(tl.int32), mask=fits)


@triton.jit
def _check_kernel(slices, parts, entries, table, broken, ORDERS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether every place is the one that the table gives for its key."""
    head = tl.program_id(2).to(tl.int64)
    number = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = tl.load(parts + head * slices.length + place, mask=place < slices.length, other=-1) >= 0
    entry = tl.load(entries + (head * ORDERS + number) * slices.length + place, mask=live, other=0)
    found = tl.load(table + entry.to(tl.int64) * ((ORDERS + 1) // 2 * 2) + number, mask=live, other=0)
    if tl.max((live & (found != place)).to(tl.int32), 0) > 0:
        tl.store(broken, 1)


def find_places(slices: Slices, edges: Tensor, orders: int, first_head: int, graph_heads: int) -> Places:
    """The table for some graph heads.

    Args:
        edges: int32 ``[2, H, L + 1]``, see `triton_slices.clip_kernel`.
    """
    heads, length, device = edges.shape[1], edges.shape[2] - 1, edges.device
    spans = edges.flatten().cumsum(0, dtype=torch.int32).view(edges.shape)[:, :, :length]
    live = spans[1] > 0
    parts = (live & (spans[0] == 0)).flatten().cumsum(0, dtype=torch.int32).view(heads, length) - 1
    parts = torch.where(live, parts, -1)
    lowest = torch.full((heads * length,), _LARGEST, dtype=torch.int32, device=device)
    highest = torch.full_like(lowest, -1)
    grid = (triton.cdiv(length, _BLOCK), orders, heads)
    _extent_kernel[grid](slices, parts, lowest, highest, first_head, graph_heads, orders, _BLOCK)
    sizes = (highest.long() - lowest + 1).clamp_(min=0)
    origins = sizes.cumsum(0) - sizes - lowest
    # a part with gaps between its keys takes more entries than it has places
    width = (orders + 1) // 2 * 2
    capacity = min(2 * heads * length, _LARGEST // width)
    places = Places(
        torch.empty((heads, orders, length), dtype=torch.int32, device=device),
        torch.full((capacity, width), -1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    _fill_kernel[grid](slices, parts, origins, *places, capacity, first_head, graph_heads, orders, _BLOCK)
    _check_kernel[grid](slices, parts, *places, orders, _BLOCK)
    return places
