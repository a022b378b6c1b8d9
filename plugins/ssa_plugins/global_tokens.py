"""``global``: keys that every query attends."""

from collections.abc import Sequence
from typing import Any

from ssa_framework.plugin import (
    ALWAYS,
    Columns,
    ConfigError,
    LayerSpec,
    NeighborSource,
    Registrar,
    RoutingContext,
    hookimpl,
)


class GlobalTokens(NeighborSource):
    """Every query attends the same few keys.

    Args:
        tokens: the first so many keys.
        indices: these key positions instead; clamped to the sequence, as in the original project. In causal attention
            a position that the sequence has not reached is left out instead: clamped, it would move with every token.
    """

    rebuilds = False
    routing_keys = "none"

    def __init__(self, layer: LayerSpec, *, tokens: int = 2, indices: Sequence[int] | None = None) -> None:
        super().__init__(layer)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ConfigError(f"global: tokens must be an integer >= 0, got {tokens!r}")
        if indices is not None and any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
            raise ConfigError(f"global: indices must be integers >= 0, got {list(indices)!r}")
        self.tokens = tokens
        self.indices = None if indices is None else sorted(set(indices))

    def propose(self, ctx: RoutingContext) -> Columns:
        last = ctx.num_keys - 1
        if self.indices is None:
            return Columns(range(min(self.tokens, ctx.num_keys)))
        if ctx.causal:
            return Columns([i for i in self.indices if i <= last], slots=len(self.indices))
        return Columns(sorted({min(i, last) for i in self.indices}))

    def steady_steps(self, state: Any, length: int) -> int:
        ahead = [self.tokens - 1] if self.indices is None else self.indices
        return next((0 for place in ahead if place >= length), ALWAYS)


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("global", GlobalTokens)
