"""Keys that are kept, in torch: hash those that are new, order them by bucket, look queries up among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssa_framework.ops.lsh_slices.families import hash_family

if TYPE_CHECKING:
    from ssa_framework.ops.lsh_slices.kept import Buckets, KeptHashes

_ROWS_AT_ONCE = 8192


def hash_new(
    kept: KeptHashes, k: Tensor, keep: Tensor | None, directions: Tensor, elements: Sequence[int], begin: int,
    first_new: int, bits: int,
) -> None:  # fmt: skip
    """Add the keys from ``begin`` on, of some batch elements, to their sums, and hash those from ``first_new`` on."""
    for some in _runs(elements):
        _hash_run(kept, k, keep, directions, some, begin, first_new, bits)


def _hash_run(
    kept: KeptHashes, k: Tensor, keep: Tensor | None, directions: Tensor, some: slice, begin: int, first_new: int,
    bits: int,
) -> None:  # fmt: skip
    length = k.shape[2]
    hashes = hash_family(kept.family, bits, k.shape[3])
    used = directions[:, : hashes.directions(bits)]
    codes = kept.codes_room()
    for start in range(begin, length, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, length)
        rows = k[some, :, start:stop].float()
        if kept.center:
            rows = _centred(kept, rows, keep, some, start, stop)
        fresh = max(first_new, start)
        if not bits or fresh >= stop:
            continue
        projected = _project(rows[:, :, fresh - start :], used)
        codes[some, :, :, fresh:stop] = hashes.buckets(projected, bits).transpose(2, 3).to(torch.int16)


def _centred(kept: KeptHashes, rows: Tensor, keep: Tensor | None, some: slice, start: int, stop: int) -> Tensor:
    """Rows without the mean of the keys up to each, which join the sums."""
    real = torch.ones((1, stop - start), dtype=torch.int64, device=rows.device)
    if keep is not None:
        real = keep[:, start:stop].expand(kept.sums.shape[0], -1)[some].long()
    sums, counts = kept.sums[some], kept.counts[some]
    before = torch.cat([sums[:, :, None], sums[:, :, None] + rows.double().cumsum(2)], dim=2)
    numbers = torch.cat([counts[:, :, None], counts[:, :, None] + real.cumsum(1)[:, None]], dim=2)
    saved_sums, saved_counts = kept.saved_rooms()
    every = kept.save_every
    places = torch.arange(-(-start // every), -(-stop // every), device=rows.device)
    saved_sums[some, :, places] = before[:, :, places * every - start]
    saved_counts[some, :, places] = numbers[:, :, places * every - start].expand(-1, kept.heads, -1)
    kept.sums[some], kept.counts[some] = before[:, :, -1], numbers[:, :, -1]
    count = numbers[:, :, 1:, None].clamp(min=1).float()
    return torch.addcdiv(rows, before[:, :, 1:].float(), count, value=-1)


def order_codes(
    kept: KeptHashes, keep: Tensor | None, elements: Sequence[int], bits: int, stored: int, length: int,
    order: Tensor, firsts: Tensor,
) -> None:  # fmt: skip
    """The first ``length`` keys of some batch elements by the first ``bits`` bits of their codes."""
    numbers = torch.arange((1 << bits) + 1, dtype=torch.int32, device=order.device)
    for some in _runs(elements):
        codes = _codes(kept, some, 0, length, stored - bits)
        if keep is not None:
            real = keep[:, :length].expand(order.shape[0], -1)[some]
            codes = codes.masked_fill(~real[:, None, None], 1 << bits)
        in_order, places = codes.sort(dim=-1, stable=True)
        begins = torch.searchsorted(in_order, numbers.expand(*in_order.shape[:3], -1).contiguous())
        order[some] = places.int()
        firsts[some, :, :, : numbers.numel()] = begins.int()


def look_up(
    kept: KeptHashes, q: Tensor, keep: Tensor | None, directions: Tensor, elements: Sequence[int], bits: int,
    stored: int, first_query: int, limit: int, buckets: Buckets | None, lists: Tensor | None, start: Tensor,
    end: Tensor,
) -> None:  # fmt: skip
    """The slices of the queries of some batch elements, of lists of their own if there are any, else of ``buckets``."""
    for some in _runs(elements):
        _look_up_run(
            kept, q, keep, directions, some, bits, stored, first_query, limit, buckets, lists, start, end
        )  # fmt: skip


def _look_up_run(
    kept: KeptHashes, q: Tensor, keep: Tensor | None, directions: Tensor, some: slice, bits: int, stored: int,
    first_query: int, limit: int, buckets: Buckets | None, lists: Tensor | None, start: Tensor, end: Tensor,
) -> None:  # fmt: skip
    group = q.shape[1] // kept.heads
    hashes = hash_family(kept.family, stored, q.shape[3])
    projected = _project(q[some].float(), directions[:, : hashes.directions(bits)])
    wanted = hashes.probes(projected, bits, start.shape[4] - 1)  # [b, G, N, S, P]; -1 = no more
    low = high = torch.zeros_like(wanted)
    if buckets is not None:
        firsts = buckets.firsts[some].repeat_interleave(group, dim=1).long()
        place = wanted.clamp(min=0).transpose(2, 3).flatten(3)  # [b, G, S, N·P]
        low, high = (firsts.gather(3, place + i).unflatten(3, (wanted.shape[2], -1)).transpose(2, 3) for i in (0, 1))
        high = torch.where(wanted < 0, low, high)
    if lists is not None:
        low, high = _listed(kept, keep, some, stored - bits, first_query, limit, buckets, lists, wanted, low, high)
    start[some], end[some] = low.int(), high.int()


def _listed(
    kept: KeptHashes, keep: Tensor | None, some: slice, shift: int, first_query: int, limit: int,
    buckets: Buckets | None, lists: Tensor, wanted: Tensor, low: Tensor, high: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the latest ``limit`` members of the wanted buckets up to each query; returns where they begin and end."""
    queries, slices = wanted.shape[2], wanted.shape[4]
    group, covered = wanted.shape[1] // kept.heads, 0 if buckets is None else buckets.covered
    tail = _codes(kept, some, covered, kept.length, shift).repeat_interleave(group, dim=1)  # [b, G, S, T]
    keys = torch.arange(covered, kept.length, device=wanted.device)
    positions = first_query + torch.arange(queries, device=wanted.device)
    same = (tail[:, :, None, :, None] == wanted[..., None]) & (keys <= positions[:, None, None, None])
    if keep is not None:
        real = keep[:, covered : kept.length].expand(kept.sums.shape[0], -1)[some]
        same = same & real[:, None, None, None, None]
    from_end = same.flip(-1).cumsum(-1).flip(-1)  # 1 is the latest
    late = same & (from_end <= limit)
    room = wanted.new_zeros((*wanted.shape, limit + 1))
    room.scatter_(-1, torch.where(late, limit - from_end, limit), keys.expand(same.shape))  # the last place is none
    found = late.sum(-1)
    taken = torch.minimum(limit - found, high - low)
    if buckets is not None:
        place = torch.arange(limit, device=wanted.device)
        ahead = place - (limit - found)[..., None]  # of the members that are listed already; -1 is next to them
        inside = (ahead < 0) & (ahead >= -taken[..., None])
        source = torch.where(inside, high[..., None] + ahead, 0).transpose(2, 3).flatten(3)
        source = source.unflatten(1, (kept.heads, group)).transpose(2, 3)  # [b, Hkv, S, group, N·P·limit]
        members = buckets.order[some].gather(3, source.flatten(3)).unflatten(3, source.shape[3:])
        members = members.transpose(2, 3).flatten(1, 2).unflatten(3, (queries, slices, limit)).transpose(2, 3)
        room[..., :limit] = torch.where(inside, members.long(), room[..., :limit])
    lists[some] = room[..., :limit].transpose(2, 3).flatten(3).int()
    region = torch.arange(1, queries * slices + 1, device=wanted.device).view(queries, 1, slices) * limit
    return region - found - taken, region.expand_as(found)


def _runs(elements: Sequence[int]) -> Iterator[slice]:
    """Ascending batch elements, in slices of neighbors: an index tensor would have to be brought to a GPU, which
    waits for it."""
    begin = 0
    for i in range(1, len(elements) + 1):
        if i == len(elements) or elements[i] != elements[i - 1] + 1:
            yield slice(elements[begin], elements[i - 1] + 1)
            begin = i


def _codes(kept: KeptHashes, some: slice, first: int, last: int, shift: int) -> Tensor:
    """Bucket numbers of the keys ``first .. last``, int32 ``[b, Hkv, S, keys]``."""
    return (kept.codes_room()[some, :, :, first:last].int() & 0xFFFF) >> shift


def _project(x: Tensor, directions: Tensor) -> Tensor:
    """``[B, H, N, D]`` by ``[S, F, D]`` → ``[B, H, N, S, F]``.

    In float64 on CUDA: there float32 products depend on how many rows come at once, and on the precision that the user
    has set for them (TF32), and a code must not.
    """
    directions, shape = directions.flatten(0, 1).T, directions.shape[:2]
    if x.is_cuda:
        x, directions = x.double(), directions.double()
    return (x @ directions).unflatten(-1, shape)
