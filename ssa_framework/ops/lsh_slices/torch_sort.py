"""Hashing and grouping in torch, one number of bits after the other; any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.ops.lsh_slices.centering import center_keys
from ssa_framework.ops.lsh_slices.families import HashFamily, hash_family
from ssa_framework.ops.lsh_slices.types import Family, HashLevels


def slices(
    q: Tensor, k: Tensor, directions: Tensor, family: Family, probes: int, levels: HashLevels, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ssa_framework.ops.lsh_slices.api.lsh_slices`."""
    hashes = hash_family(family, levels.most, k.shape[-1])
    used = directions[:, : hashes.directions(levels.most)]
    keys = k.float()
    if levels.key_keep is not None:
        keys = keys.masked_fill(~levels.key_keep[:, None, :, None], 0.0)
    if center:
        keys = center_keys(keys, levels.key_keep, levels.key_documents, levels.causal)
    keys = _project(keys, used)  # [B, Hkv, M, S, F]
    shape = (*q.shape[:3], directions.shape[0], 1 + probes)
    start = torch.zeros(shape, dtype=torch.int32, device=q.device)
    end = torch.zeros_like(start)
    orders: list[Tensor] = []
    length = 0
    for bits in range(levels.most + 1):
        standing = (levels.first <= bits) & (bits <= levels.last)
        rows = (levels.queries == bits).any(dim=0).nonzero()[:, 0]
        if not rows.numel() or not bool(standing.any()):
            continue
        queries = _project(q[:, :, rows].float(), used)
        order, first, last = _one_level(hashes, keys, queries, rows, standing, bits, probes, levels)
        here = (levels.queries[:, rows] == bits)[:, None, :, None, None]
        start[:, :, rows] = torch.where(here, first + length, start[:, :, rows])
        end[:, :, rows] = torch.where(here, last + length, end[:, :, rows])
        orders.append(order)
        length += order.shape[-1]
    if not orders:
        return torch.zeros((*k.shape[:2], directions.shape[0], 0), dtype=torch.int32, device=q.device), start, end
    return torch.cat(orders, dim=-1), start, end


def _one_level(
    hashes: HashFamily,
    keys: Tensor,
    queries: Tensor,
    rows: Tensor,
    standing: Tensor,
    bits: int,
    probes: int,
    levels: HashLevels,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the keys that stand at one level, and the bounds of the buckets of some queries.

    Returns: int32 ``[B, Hkv, S, L]`` and twice ``[B, G, rows, S, 1 + probes]``.
    """
    batch, heads, _, functions, _ = keys.shape
    group = queries.shape[1] // heads
    key_codes = hashes.buckets(keys, bits) if bits else keys.new_zeros(keys.shape[:4], dtype=torch.int64)
    if bits:
        codes = hashes.probes(queries, bits, probes)
    else:  # every key of the document: one bucket, dealt out to all slices
        codes = queries.new_zeros((*queries.shape[:4], 1 + probes), dtype=torch.int64)
    if levels.key_documents is not None and levels.query_documents is not None:
        key_codes = key_codes + (levels.key_documents.long() << bits)[:, None, :, None]
        documents = levels.query_documents[:, rows].long()[:, None, :, None, None]
        codes = torch.where((codes < 0) | (documents < 0), -1, codes + (documents << bits))
    beyond = levels.num_documents << bits
    key_codes = torch.where(standing[:, None, :, None], key_codes, beyond).movedim(-1, 2)  # [B, Hkv, S, M]
    sorted_codes, order = key_codes.contiguous().sort(dim=-1, stable=True)
    longest = int(standing.sum(-1).max())
    wanted = codes.unflatten(1, (heads, group)).permute(0, 1, 4, 2, 3, 5).flatten(3).contiguous()  # [B, Hkv, S, g·n·P]
    start, end = torch.searchsorted(sorted_codes, wanted), torch.searchsorted(sorted_codes, wanted, right=True)

    def per_query(x: Tensor) -> Tensor:
        x = x.unflatten(3, (group, rows.numel(), 1 + probes)).permute(0, 1, 3, 4, 2, 5)
        return x.reshape(batch, heads * group, rows.numel(), functions, 1 + probes).int()

    start, end = per_query(start), per_query(end)
    end = torch.where(codes < 0, start, end)
    if not bits:  # dealt out evenly, so that no slice repeats another and none is cut by a limit
        part = torch.arange(functions * (1 + probes), device=start.device, dtype=torch.int32)
        part = part.view(functions, 1 + probes)
        width = -((start - end) // part.numel())
        start, end = torch.minimum(start + part * width, end), torch.minimum(start + (part + 1) * width, end)
    return order[..., :longest].int(), start, end


def _project(x: Tensor, directions: Tensor) -> Tensor:
    """``[B, H, N, D]`` by ``[S, F, D]`` → ``[B, H, N, S, F]``."""
    return (x @ directions.flatten(0, 1).T).unflatten(-1, directions.shape[:2])
