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


class _Parts(NamedTuple):
    """Parts of the places of all heads, numbered through. ``held`` int32 ``[2, H, L + 1]``: how many spans hold a place
    and the one before, and how many hold it. ``numbers`` int32 ``[H · L]``: parts that begin up to here. ``lowest``
    and ``highest`` int32 ``[H · L]``: the keys of a part lie between."""

    held: Any
    numbers: Any
    lowest: Any
    highest: Any


@triton.jit
def _held(held, head, heads, length, place):
    """How many spans hold ``place``, and how many of them the place before too."""
    inside = place < length
    at = held + head * (length + 1) + place
    count = tl.load(at + heads.to(tl.int64) * (length + 1), mask=inside, other=0)
    return count, tl.load(at, mask=inside, other=0)


@triton.jit
def _part_of(parts, slices, head, place):
    """The part of each place; -1 where no span holds it."""
    count, _ = _held(parts.held, head, tl.num_programs(2), slices.length, place)
    number = tl.load(parts.numbers + head * slices.length + place, mask=count > 0, other=0)
    return number - 1


@triton.jit
def _begin_kernel(slices, parts, begins, broken, largest, BLOCK: tl.constexpr):
    """``begins``: 1 where a part begins; and what the next kernels find prepared."""
    head = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count, joined = _held(parts.held, head, tl.num_programs(2), slices.length, place)
    inside = place < slices.length
    at = head * slices.length + place
    tl.store(begins + at, ((count > 0) & (joined == 0)).to(tl.int32), mask=inside)
    tl.store(parts.lowest + at, tl.zeros((BLOCK,), tl.int32) + largest, mask=inside)
    tl.store(parts.highest + at, tl.zeros((BLOCK,), tl.int32) - 1, mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(2) == 0):
        tl.store(broken, 0)


@triton.jit
def _extent_kernel(slices, parts, first_head, graph_heads, BLOCK: tl.constexpr):
    """The lowest and highest key of each part."""
    head = tl.program_id(2).to(tl.int64)
    b, g = (first_head + head) // graph_heads, (first_head + head) % graph_heads
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = _part_of(parts, slices, head, place)
    live = part >= 0
    key = key_at(slices, b, g, tl.program_id(1).to(tl.int64), place, live).to(tl.int32)
    # one update for each part that the block touches, mostly a single one
    current = tl.max(part, 0)
    while current >= 0:
        here = part == current
        tl.atomic_min(parts.lowest + current, tl.min(tl.where(here, key, 2147483647), 0), sem="relaxed")
        tl.atomic_max(parts.highest + current, tl.max(tl.where(here, key, -1), 0), sem="relaxed")
        current = tl.max(tl.where(part < current, part, -1), 0)


@triton.jit
def _size_kernel(parts, sizes, count, BLOCK: tl.constexpr):
    """int64: how many entries each part takes, one for each key from its lowest to its highest."""
    part = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = part < count
    highest = tl.load(parts.highest + part, mask=inside, other=-1)
    lowest = tl.load(parts.lowest + part, mask=inside, other=0)
    tl.store(sizes + part, tl.where(highest >= 0, highest - lowest + 1, 0).to(tl.int64), mask=inside)


@triton.jit
def _fill_kernel(
    slices, parts, ends, entries, table, broken, capacity, first_head, graph_heads,
    ORDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entry of every place, and the place of every entry; ``ends``: of each part, the first entry behind it."""
    head = tl.program_id(2).to(tl.int64)
    number = tl.program_id(1).to(tl.int64)
    b, g = (first_head + head) // graph_heads, (first_head + head) % graph_heads
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = _part_of(parts, slices, head, place)
    live = part >= 0
    key = key_at(slices, b, g, number, place, live)
    origin = tl.load(ends + part - 1, mask=part > 0, other=0) - tl.load(parts.lowest + part, mask=live, other=0)
    entry = origin + key
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
    live = _part_of(parts, slices, head, place) >= 0
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
    total = heads * length
    # a part with gaps between its keys takes more entries than it has places
    width = (orders + 1) // 2 * 2
    capacity = min(2 * total, _LARGEST // width)
    places = Places(
        torch.empty((heads, orders, length), dtype=torch.int32, device=device),
        torch.full((capacity, width), -1, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )
    begins, lowest, highest = torch.empty((3, total), dtype=torch.int32, device=device)
    held = edges.flatten().cumsum(0, dtype=torch.int32)
    blocks = triton.cdiv(length, _BLOCK)
    parts = _Parts(held, begins, lowest, highest)
    _begin_kernel[(blocks, 1, heads)](slices, parts, begins, places.broken, _LARGEST, _BLOCK)
    parts = parts._replace(numbers=begins.cumsum(0, dtype=torch.int32))
    _extent_kernel[(blocks, orders, heads)](slices, parts, first_head, graph_heads, _BLOCK)
    sizes = torch.empty(total, dtype=torch.int64, device=device)
    _size_kernel[(triton.cdiv(total, _BLOCK),)](parts, sizes, total, _BLOCK)
    grid = (blocks, orders, heads)
    _fill_kernel[grid](slices, parts, sizes.cumsum(0), *places, capacity, first_head, graph_heads, orders, _BLOCK)
    _check_kernel[grid](slices, parts, *places, orders, _BLOCK)
    return places
