"""``topk``: exact top-K by a tiled scan of all keys."""

from ssa_framework.plugin import NeighborSource, Ranges, Registrar, RoutingContext, hookimpl


class TopK(NeighborSource):
    """The keys with the highest ``q·k``, found by scoring every allowed key.

    The oracle for recall, and the choice where recall must be exact. Time grows with N·M, memory does not.
    """

    def propose(self, ctx: RoutingContext) -> Ranges:
        return Ranges.everything()


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("topk", TopK)
