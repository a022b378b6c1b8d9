"""K-means in torch, some segments at a time; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.ops.cluster_keys.types import Clusters, cluster_slots

_AT_ONCE = 16
"""Segments of one matrix product. Always as many, if need be with zeros: a library that chooses its kernel by the
shapes must choose the same one for a segment, whatever it is clustered with."""


def cluster(
    k: Tensor, starts: Tensor, length: int, initial: Tensor, steps: list[int], stride: int, capacity: int
) -> Clusters:
    """See `ssa_framework.ops.cluster_keys.api.cluster_keys`; ``initial`` int32 ``[clusters]``, places in a segment;
    ``steps``: how many keys each Lloyd step looks at, all of them or every ``stride``-th."""
    batch, heads, keys, dim = k.shape
    segments = starts.shape[1]
    slots = cluster_slots(length, initial.shape[0], capacity)
    starts = starts.expand(batch, -1)
    order = torch.zeros((batch, heads, segments, length), dtype=torch.int32, device=k.device)
    size = torch.zeros((batch, heads, segments, slots), dtype=torch.int32, device=k.device)
    centroids = torch.zeros((batch, heads, segments, slots, dim), dtype=torch.float32, device=k.device)
    variances = torch.zeros_like(centroids)
    if keys >= length and k.numel() and segments:
        places = starts.clamp(min=0).long()[..., None] + torch.arange(length, device=k.device)  # [B, F, L]
        rows = k.gather(2, places.flatten(1)[:, None, :, None].expand(-1, heads, -1, dim))
        rows = rows.float().reshape(-1, length, dim)  # [B·Hkv·F, L, D]
        means, squares = (x.view(-1, slots, dim) for x in (centroids, variances))
        outputs = order.view(-1, length), size.view(-1, slots), means, squares
        for first in range(0, rows.shape[0], _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            count = some.shape[0]
            some = torch.cat([some, some.new_zeros(_AT_ONCE - count, length, dim)])
            found = _cluster(some, initial.long(), steps, stride, capacity, slots)
            for out, result in zip(outputs, found, strict=True):
                out[first : first + count] = result[:count]
        used = (starts >= 0)[:, None, :, None]
        order.add_(starts[:, None, :, None]).masked_fill_(~used, 0)
        size.masked_fill_(~used, 0)
        centroids.masked_fill_(~used[..., None], 0)
        variances.masked_fill_(~used[..., None], 0)
    first_key = torch.arange(segments, device=k.device)[:, None] * length
    start = first_key + size.cumsum(-1) - size
    start = torch.where(size > 0, start, 0).to(torch.int32)
    return Clusters(
        order.flatten(2), start.flatten(2), size.flatten(2), centroids.flatten(2, 3), variances.flatten(2, 3)
    )


def _cluster(
    rows: Tensor, initial: Tensor, steps: list[int], stride: int, capacity: int, slots: int
) -> tuple[Tensor, ...]:
    """``rows [S, L, D]`` → order in the segment ``[S, L]``, sizes ``[S, C]``, centroids and variances ``[S, C, D]``."""
    length, clusters = rows.shape[1], initial.shape[0]
    x = rows - rows.mean(1, keepdim=True)
    centroids = x[:, initial]
    for keys in steps:
        some = x if keys == length else x[:, ::stride].contiguous()
        members = _members(_nearest(some, centroids), clusters).to(x.dtype)  # [S, keys, clusters]
        count = members.sum(1)[..., None]
        centroids = torch.where(count > 0, members.mT @ some / count.clamp(min=1), centroids)
    owner, order = _nearest(x, centroids).sort(dim=-1, stable=True)
    count = _members(owner, clusters).sum(1)
    pieces = (count + capacity - 1) // capacity
    rank = torch.arange(length, device=rows.device) - (count.cumsum(-1) - count).gather(1, owner)
    # piece p of P holds the ranks from p·n // P on, so rank r is in the last piece p with p·n < (r + 1)·P
    piece = ((rank + 1) * pieces.gather(1, owner) - 1) // count.gather(1, owner)
    slot = (pieces.cumsum(-1) - pieces).gather(1, owner) + piece
    members = _members(slot, slots)  # [S, L, C], of the ordered keys
    size = members.sum(1)
    ordered = rows.gather(1, order[..., None].expand_as(rows))
    weights = members.to(rows.dtype).mT / size.clamp(min=1)[..., None]  # [S, C, L]
    means = weights @ ordered
    apart = ordered - means.gather(1, slot[..., None].expand_as(ordered))
    return order.to(torch.int32), size.to(torch.int32), means, weights @ apart.square()


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    bias = centroids.square().sum(-1) / -2
    return torch.baddbmm(bias[:, None], x, centroids.mT).argmax(-1)


def _members(owner: Tensor, count: int) -> Tensor:
    """Who owns what, bool ``[..., count]``. `one_hot` would wait for the device, to check the range."""
    return owner[..., None] == torch.arange(count, device=owner.device)
