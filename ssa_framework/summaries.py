"""What the router does with summaries before they join a graph: leave out what is attended otherwise, find leaks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssa_framework.errors import ConfigError
from ssa_framework.masks import EdgeMask
from ssa_framework.proposals import Summaries, require


def clean_summaries(summaries: Summaries, source: str, mask: EdgeMask, columns: Tensor | None) -> Summaries:
    """Summaries without padding and without keys that every query attends anyway.

    Raises:
        ConfigError: ``attn_mask`` or ``mask_mod``, which may hide single keys of a summary.
        ProposalError: a query would attend a summary that holds a later key, or one of another document.
    """
    if mask.has_explicit:
        raise ConfigError(
            f"source {source!r} summarises keys, and attn_mask or mask_mod may hide some of them from a query; switch "
            f"its summaries off, or use causal, key_padding_mask and segment_ids instead"
        )
    members = summaries.members
    if mask.key_keep is not None:
        members = torch.where(mask.key_keep[:, None, None], members, -1)
    if columns is not None:
        members = members.index_fill(3, columns.long(), -1)
    summaries = replace(summaries, members=members)
    if summaries.count:
        _check_leaks(summaries, source, mask)
    return summaries


def check_causal(last: Tensor, summaries: Summaries, level: int, source: str, mask: EdgeMask) -> None:
    """Raise `ProposalError` where a query attends a summary of a level that holds a later key: ``last [B or 1, C]`` is
    the position of the last key of each."""
    first, stop = summaries.first[..., level], summaries.stop[..., level]
    found = _largest_in(last, first, stop)
    require(
        ((found <= mask.positions) | (first >= stop)).all(),
        lambda: f"source {source!r}: a summary that a query attends holds a key after it; attention is causal",
    )


def _check_leaks(summaries: Summaries, source: str, mask: EdgeMask) -> None:
    keys = summaries.members.shape[3]
    for level in range(summaries.levels):
        first, stop = summaries.first[..., level], summaries.stop[..., level]
        some = first < stop
        if mask.causal:
            position = torch.arange(keys, dtype=torch.int32, device=first.device)[None]
            check_causal(largest_of_members(summaries, level, position), summaries, level, source, mask)
        if mask.key_segments is not None and mask.query_segments is not None:
            ids, of_query = mask.key_segments, mask.query_segments
            high = _largest_in(largest_of_members(summaries, level, ids), first, stop)
            low = -_largest_in(largest_of_members(summaries, level, -ids), first, stop)
            nothing = high == torch.iinfo(ids.dtype).min
            same = ((high == of_query) & (low == of_query)) | nothing
            require(
                (same | ~some).all(),
                lambda: f"source {source!r}: a summary that a query attends holds a key of another document",
            )


def largest_of_members(summaries: Summaries, level: int, values: Tensor) -> Tensor:
    """The largest of ``values [B or 1, M]`` over the keys of a summary, in any head: ``[B or 1, C]``; the smallest
    number there is where a summary has no keys of that level."""
    members = summaries.members[:, :, level]
    batch = max(members.shape[0], values.shape[0])
    owner = torch.where(members < 0, summaries.count, members).long().expand(batch, -1, -1)
    lowest = torch.iinfo(values.dtype).min
    largest = torch.full((batch, summaries.count + 1), lowest, dtype=values.dtype, device=values.device)
    spread = values[:, None].expand(batch, members.shape[1], -1)
    return largest.scatter_reduce_(1, owner.flatten(1), spread.flatten(1), "amax")[:, : summaries.count]


def _largest_in(values: Tensor, first: Tensor, stop: Tensor) -> Tensor:
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
