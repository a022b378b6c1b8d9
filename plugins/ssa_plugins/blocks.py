"""``blocks``: blocks of consecutive keys, ranked by their mean or by a bound on their scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssa_framework.plugin import (
    Clusters,
    ConfigError,
    LayerSpec,
    NeighborSource,
    Proposal,
    Ranges,
    Registrar,
    RoutingContext,
    hookimpl,
)
from ssa_plugins.kept_segments import KeptSegments
from ssa_plugins.segments import Attend, Level, Opened, Places, check_attend, propose, take


class Blocks(NeighborSource):
    """The sequence is cut into blocks of consecutive keys, and a query looks at the best of them and at its own.

    Blocks are ranked by ``q·mean`` of their keys (MoBA, Lu et al., 2025), or by the largest ``q·k`` that the smallest
    and largest coordinates of their keys allow (Quest, Tang et al., 2024), which finds more. In causal attention a
    query looks at full blocks before its own, and at its own up to itself. Blocks count the real keys of a document:
    they never cross a document's border or hold padding.

    Args:
        size: keys of a block.
        rank: ``"bound"`` or ``"mean"``.
        keys: how many keys of blocks a query looks at, at most; four times ``num_neighbors`` if left out.
        attend: ``"topk"``: the neighbors are the best of those keys by exact ``q·k``. ``"all"``: all of them, beside
            the budget.
        summaries: attend to the mean of each block that is not opened, weighted by its size. They cannot honour
            ``attn_mask`` and ``mask_mod``, which may hide single keys.

    Ranking compares a query with one mean, or two bounds, for every ``size`` keys, which `keys_scored` leaves out.
    """

    rebuilds = False

    def __init__(
        self,
        layer: LayerSpec,
        *,
        size: int = 16,
        rank: Literal["bound", "mean"] = "bound",
        keys: int | None = None,
        attend: Attend = "topk",
        summaries: bool = False,
    ) -> None:
        super().__init__(layer)
        keys = 4 * layer.num_neighbors if keys is None else keys
        for name, value in (("size", size), ("keys", keys)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"blocks: {name} must be an integer >= 1, got {value!r}")
        if rank not in ("bound", "mean"):
            raise ConfigError(f"blocks: rank must be 'bound' or 'mean', got {rank!r}")
        if keys < size:
            raise ConfigError(f"blocks: keys must hold a block of {size} keys at least, got {keys}")
        self.size, self.rank, self.keys = size, rank, keys
        self.attend, self.summaries = check_attend("blocks", attend), summaries

    def extra_repr(self) -> str:
        return f"size={self.size}, rank={self.rank}, keys={self.keys}, attend={self.attend}"

    def propose(self, ctx: RoutingContext) -> Proposal | list[Proposal]:
        # where attention is causal, a query must not see more keys for want of later ones
        few = self.layer.num_neighbors if not ctx.causal else min(self.layer.num_neighbors, self.size)
        if ctx.num_keys <= few:
            return Ranges.everything()  # all of them fit the budget; there is nothing to choose
        if ctx.state is not None:
            kept: KeptSegments = ctx.state
            return kept.propose(
                ctx, self._compared(ctx.q), keys=self.keys, about=2 * self.size, spread=0.0, attend=self.attend,
                summaries=self.summaries,
            )  # fmt: skip
        places = Places.of(ctx, self.size)
        if not places.starts.shape[1]:
            return propose(ctx, places, None, attend=self.attend, summaries=False)
        keys = ctx.shared_k if places.order is None else take(ctx.shared_k, places.order)
        level = Level.of(ctx, places, self._blocks(keys, places.starts))
        opened = Opened.best(ctx, self._compared(ctx.q), [level], keys=self.keys, about=2 * self.size)
        return propose(ctx, places, opened, attend=self.attend, summaries=self.summaries)

    def _compared(self, q: Tensor) -> Tensor:
        """Queries whose product with the centroids of `_blocks` ranks them."""
        if self.rank == "mean":
            return q.float()
        # the largest score is the sum of max(q·high, q·low), coordinate by coordinate
        return torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1).float()

    def _blocks(self, keys: Tensor, starts: Tensor) -> Clusters:
        """Blocks as clusters."""
        batch, heads = keys.shape[:2]
        used = (starts >= 0).expand(batch, -1)
        place = starts.clamp(min=0)[..., None] + torch.arange(self.size, dtype=torch.int32, device=keys.device)
        place = place.expand(batch, -1, -1).flatten(1)
        rows = take(keys, place).float().unflatten(2, (-1, self.size))  # [B, Hkv, F, size, D]
        if self.rank == "mean":
            centroids = rows.mean(3)
        else:
            low, high = rows.aminmax(dim=3)
            centroids = torch.cat([high, low], dim=-1)
        first = torch.arange(used.shape[1], dtype=torch.int32, device=keys.device) * self.size
        return Clusters(
            place[:, None].expand(-1, heads, -1).contiguous(),
            first.expand(batch, heads, -1).contiguous(),
            torch.where(used, self.size, 0).int()[:, None].expand(-1, heads, -1).contiguous(),
            centroids.contiguous(),
        )

    # -- decoding: blocks are made when they are full -----------------------------------------------------------------

    def init_state(self, ctx: RoutingContext) -> KeptSegments:
        width = self.layer.head_dim * (1 if self.rank == "mean" else 2)
        return KeptSegments(ctx, [(self.size, 1)], width)

    def append(self, state: KeptSegments, ctx: RoutingContext) -> KeptSegments:
        def blocks(level: int, keys: Tensor) -> Clusters:
            return self._blocks(
                keys, torch.arange(0, keys.shape[2], self.size, dtype=torch.int32, device=ctx.device)[None]
            )

        state.append(ctx, blocks)
        return state

    def crop(self, state: KeptSegments, length: int) -> KeptSegments:
        state.crop(length)
        return state

    def reorder(self, state: KeptSegments, index: Tensor) -> KeptSegments:
        state.reorder(index)
        return state


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("blocks", Blocks)
