"""``self``: every query attends its own position."""

from typing import Any

from ssa_framework.plugin import ALWAYS, Band, NeighborSource, Registrar, RoutingContext, hookimpl


class SelfEdge(NeighborSource):
    """Every query attends the key at its own position."""

    needs_positions = True
    rebuilds = False
    routing_keys = "none"

    def propose(self, ctx: RoutingContext) -> Band:
        return Band(before=0, after=0)

    def steady_steps(self, state: Any, length: int) -> int:
        return ALWAYS


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("self", SelfEdge)
