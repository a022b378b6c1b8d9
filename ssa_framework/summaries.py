"""What the router does with summaries before they join a graph: leave out what is attended otherwise, find leaks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssa_framework.errors import ConfigError
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.summary_reach import largest_in, largest_of_members, reaches_later
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
    found = largest_in(last, first, stop)
    _require_causal(((found <= mask.positions) | (first >= stop)).all(), source)


def _require_causal(holds: Tensor, source: str) -> None:
    require(
        holds, lambda: f"source {source!r}: a summary that a query attends holds a key after it; attention is causal"
    )


def _check_leaks(summaries: Summaries, source: str, mask: EdgeMask) -> None:
    members, count = summaries.members, summaries.count
    if mask.causal:
        _require_causal(~reaches_later(members, count, summaries.first, summaries.stop, mask.positions), source)
    if mask.key_segments is None or mask.query_segments is None:
        return
    ids, of_query = mask.key_segments, mask.query_segments
    for level in range(summaries.levels):
        first, stop = summaries.first[..., level], summaries.stop[..., level]
        high = largest_in(largest_of_members(members[:, :, level], count, ids), first, stop)
        low = -largest_in(largest_of_members(members[:, :, level], count, -ids), first, stop)
        nothing = high == torch.iinfo(ids.dtype).min
        same = ((high == of_query) & (low == of_query)) | nothing
        require(
            (same | (first >= stop)).all(),
            lambda: f"source {source!r}: a summary that a query attends holds a key of another document",
        )
