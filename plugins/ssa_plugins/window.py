"""``window``: the keys around every query."""

from typing import Any

from ssa_framework.plugin import (
    ALWAYS,
    Band,
    ConfigError,
    LayerSpec,
    NeighborSource,
    Registrar,
    RoutingContext,
    hookimpl,
)


class Window(NeighborSource):
    """Every query attends the keys within ``size`` positions of its own; only those before it if causal.

    Args:
        size: half-width of the window, in positions.
    """

    needs_positions = True
    rebuilds = False
    routing_keys = "none"

    def __init__(self, layer: LayerSpec, *, size: int = 8) -> None:
        super().__init__(layer)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ConfigError(f"window: size must be an integer >= 0, got {size!r}")
        self.size = size

    def propose(self, ctx: RoutingContext) -> Band:
        return Band(before=self.size, after=self.size)

    def steady_steps(self, state: Any, length: int) -> int:
        return ALWAYS


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("window", Window)
