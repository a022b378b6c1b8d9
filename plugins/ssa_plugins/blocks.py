"""``blocks``: blocks of consecutive keys, ranked by their mean or by a bound on their scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssa_framework.plugin import Clusters, ConfigError, LayerSpec, Registrar, hookimpl
from ssa_plugins.segment_source import SegmentSource, check_attend, check_integer
from ssa_plugins.segments import Attend, take


class Blocks(SegmentSource):
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
        size = check_integer("blocks", "size", size, least=1)
        keys = check_integer("blocks", "keys", 4 * layer.num_neighbors if keys is None else keys, least=1)
        if rank not in ("bound", "mean"):
            raise ConfigError(f"blocks: rank must be 'bound' or 'mean', got {rank!r}")
        if keys < size:
            raise ConfigError(f"blocks: keys must hold a block of {size} keys at least, got {keys}")
        super().__init__(
            layer,
            levels=[(size, size)],
            keys=keys,
            attend=check_attend("blocks", attend),
            summaries=summaries,
            width=layer.head_dim * (1 if rank == "mean" else 2),
        )
        self.size, self.rank = size, rank

    def extra_repr(self) -> str:
        looks = f"keys={self.keys}, attend={self.attend!r}, summaries={self.summaries}"
        return f"size={self.size}, rank={self.rank!r}, {looks}"

    def cluster(self, keys: Tensor, starts: Tensor, level: tuple[int, int]) -> Clusters:
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

    def slots(self, level: tuple[int, int]) -> int:
        return 1

    def most(self, cluster: int) -> int:
        return -(-self.keys // cluster)

    def compared(self, q: Tensor) -> Tensor:
        if self.rank == "mean":
            return q.float()
        # the largest score is the sum of max(q·high, q·low), coordinate by coordinate
        return torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1).float()


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("blocks", Blocks)
