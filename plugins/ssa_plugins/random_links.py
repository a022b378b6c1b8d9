"""``random``: a few random keys for every query (BigBird, Zaheer et al., 2020)."""

import torch
from torch import Tensor

from ssa_framework.plugin import (
    Candidates,
    ConfigError,
    LayerSpec,
    NeighborSource,
    Registrar,
    RoutingContext,
    hookimpl,
)

_LOW_32_BITS = 0xFFFFFFFF
_GOLDEN_RATIO = 0x9E3779B9  # spreads consecutive counters over all 32 bits


class RandomLinks(NeighborSource):
    """Every query attends ``links`` keys, drawn uniformly from those that it may attend.

    A link is a hash of the layer's seed, the graph head, the query position and the slot, scaled to the query's span
    (its document between the ends of the padding and, if causal, up to its own position). So it is the same in
    prefill, in chunks and token by token, and if causal it does not depend on anything after the query. Links may
    repeat each other and other neighbors; each key counts once.

    Args:
        links: keys per query.
        per_head: links of its own for every graph head; otherwise all heads share them.
    """

    rebuilds = False
    routing_keys = "none"

    def __init__(self, layer: LayerSpec, *, links: int = 3, per_head: bool = True) -> None:
        super().__init__(layer)
        if isinstance(links, bool) or not isinstance(links, int) or links < 1:
            raise ConfigError(f"random: links must be an integer >= 1, got {links!r}")
        if not isinstance(per_head, bool):
            raise ConfigError(f"random: per_head must be True or False, got {per_head!r}")
        self.links = links
        self.per_head = per_head

    def propose(self, ctx: RoutingContext) -> Candidates:
        first, last = (bound[:, None, :, None].long() for bound in ctx.span)  # [B or 1, 1, N, 1]
        heads = torch.arange(ctx.graph_heads if self.per_head else 1, device=ctx.device).view(1, -1, 1, 1)
        slots = torch.arange(self.links, device=ctx.device)
        heads = heads + (ctx.first_graph_head if self.per_head else 0)
        bits = _hash(self.layer.seed, heads, ctx.positions[:, None, :, None].long(), slots)
        size = last - first + 1  # below 2^31, so the product below stays within int64
        keys = torch.where(size > 0, first + ((bits * size) >> 32), -1)
        return Candidates(keys.to(torch.int32), guaranteed=True)

    def extra_repr(self) -> str:
        return f"links={self.links}, per_head={self.per_head}"


def _hash(seed: int, *counters: Tensor) -> Tensor:
    """Uniform 32-bit numbers, as int64, one for each combination of the broadcasting ``counters``."""
    state = _mix(torch.tensor(seed & _LOW_32_BITS, device=counters[0].device))
    for counter in (torch.full_like(state, (seed >> 32) & _LOW_32_BITS), *counters):
        state = _mix((state + (counter + 1) * _GOLDEN_RATIO) & _LOW_32_BITS)
    return state


def _mix(x: Tensor) -> Tensor:
    """Finaliser of MurmurHash3 (Appleby), a bijection of 32-bit numbers; ``x`` is int64 in ``[0, 2^32)``."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW_32_BITS  # products wrap around 2^64, their low 32 bits are right
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW_32_BITS
    return x ^ (x >> 16)


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("random", RandomLinks)
