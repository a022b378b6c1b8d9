"""``strided``: every so many keys (Sparse Transformer, Child et al., 2019)."""

from typing import Literal

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


class Strided(NeighborSource):
    """Keys at regular distances, the nearest ones first.

    Args:
        stride: distance between two keys.
        count: keys in each direction (only backwards if causal). ``None`` takes as many, of both directions together,
            as the sources named before this one leave of the budget; put it last in the mix, or say how many.
        pattern: ``"strided"``: the query at position p attends ``p - stride``, ``p - 2 · stride``, ... and, not
            causal, ``p + stride``, ... ``"fixed"``: the last key of every block of ``stride`` positions, counted from
            position 0.

    Keys outside the query's document are left out and do not count.
    """

    needs_positions = True
    rebuilds = False
    routing_keys = "none"

    def __init__(
        self,
        layer: LayerSpec,
        *,
        stride: int = 64,
        count: int | None = None,
        pattern: Literal["strided", "fixed"] = "strided",
    ) -> None:
        super().__init__(layer)
        for name, value in (("stride", stride), ("count", 1 if count is None else count)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"strided: {name} must be an integer >= 1, got {value!r}")
        if pattern not in ("strided", "fixed"):
            raise ConfigError(f"strided: pattern must be 'strided' or 'fixed', got {pattern!r}")
        self.stride = stride
        self.count = count
        self.pattern = pattern

    def propose(self, ctx: RoutingContext) -> Candidates:
        first, last = (bound[..., None].long() for bound in ctx.span)
        positions = ctx.positions[..., None].long()  # [B or 1, N, 1]
        before, after = self._nearest(positions)
        reach = max(int(positions.max()), ctx.num_keys - 1)
        steps = reach // self.stride + 1
        wanted = ctx.budget if self.count is None else self.count
        offsets = self.stride * torch.arange(min(steps, wanted), device=ctx.device)
        sides = [before - offsets] if ctx.causal else [before - offsets, after + offsets]
        keys = torch.cat(sides, dim=-1)
        inside = (keys >= first) & (keys <= last)
        keys = torch.where(inside, keys, -1)
        if self.count is None:
            distance = torch.where(inside, (keys - positions).abs(), reach + 1)
            nearest = distance.argsort(dim=-1, stable=True)[..., : ctx.budget]
            keys = keys.gather(-1, nearest.expand(*keys.shape[:-1], -1))
        return Candidates(keys[:, None].to(torch.int32), guaranteed=True)

    def _nearest(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The first key that the pattern has backwards, and the first one forwards, of every query."""
        if self.pattern == "strided":
            return positions - self.stride, positions + self.stride
        last_end = (positions + 1) // self.stride * self.stride - 1  # the query itself where it ends a block
        return last_end, last_end + self.stride

    def extra_repr(self) -> str:
        return f"stride={self.stride}, count={self.count}, pattern={self.pattern!r}"


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("strided", Strided)
