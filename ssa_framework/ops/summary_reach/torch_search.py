"""Plain torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def reaches_later(members: Tensor, count: int, first: Tensor, stop: Tensor, positions: Tensor) -> Tensor:
    """See `ssa_framework.ops.summary_reach.api.reaches_later`."""
    key = torch.arange(members.shape[3], dtype=torch.int32, device=members.device)[None]
    found = torch.zeros((), dtype=torch.bool, device=members.device)
    for level in range(members.shape[2] if count else 0):
        low, high = first[..., level], stop[..., level]
        last = largest_in(largest_of_members(members[:, :, level], count, key), low, high)
        found = found | ((last > positions) & (low < high)).any()
    return found


def largest_of_members(members: Tensor, count: int, values: Tensor) -> Tensor:
    """The largest of ``values [B or 1, M]`` over the keys of each group of ``members [B or 1, Hkv or 1, M]``, in any
    head: ``[B or 1, C]``; the smallest number there is for a group without keys."""
    batch = max(members.shape[0], values.shape[0])
    owner = torch.where(members < 0, count, members).long().expand(batch, -1, -1)
    lowest = torch.iinfo(values.dtype).min
    largest = torch.full((batch, count + 1), lowest, dtype=values.dtype, device=values.device)
    spread = values[:, None].expand(batch, members.shape[1], -1)
    return largest.scatter_reduce_(1, owner.flatten(1), spread.flatten(1), "amax")[:, :count]


def largest_in(values: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    """The largest of ``values [B or 1, C]`` from ``first`` to ``stop - 1``, ``[B or 1, N]``; any where there is none.

    From a table of the maxima of all intervals whose length is a power of two (Bender and Farach-Colton, 2000).
    """
    levels = [values]
    width = 1
    while 2 * width <= values.shape[1]:
        last = levels[-1]
        longer = last.clone()
        longer[:, :-width] = torch.maximum(last[:, :-width], last[:, width:])
        levels.append(longer)
        width *= 2
    table = torch.stack(levels, dim=1)  # [B or 1, levels, C]
    batch = max(table.shape[0], first.shape[0])
    length = (stop - first).clamp(min=1)
    level = length.to(torch.float64).log2().floor().long()
    size = torch.ones_like(level) << level
    count = values.shape[1]

    def at(place: Tensor) -> Tensor:
        index = level * count + place.long().clamp(0, count - 1)
        return table.expand(batch, -1, -1).flatten(1).gather(1, index.expand(batch, -1))

    return torch.maximum(at(first), at(stop - size))
