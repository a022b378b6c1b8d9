"""What somebody else's plugin looks like: one source, one hook, and nothing imported but `ssa_framework.plugin`."""

from ssa_framework.plugin import Band, ConfigError, LayerSpec, NeighborSource, Registrar, RoutingContext, hookimpl


class OutsideWindow(NeighborSource):
    """Keys ``[i - size, i + size]``: what the built-in ``window`` source proposes."""

    needs_positions = True

    def __init__(self, layer: LayerSpec, *, size: int = 8) -> None:
        super().__init__(layer)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ConfigError(f"outside_window: size must be an integer >= 0, got {size!r}")
        self.size = size

    def propose(self, ctx: RoutingContext) -> Band:
        return Band(before=self.size, after=self.size)


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("outside_window", OutsideWindow)
