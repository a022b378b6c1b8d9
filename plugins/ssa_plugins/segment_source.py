"""`SegmentSource`: what sources have in common that cut the keys into segments and look into parts of full ones."""

from __future__ import annotations

import functools
import itertools
from typing import get_args

from torch import Tensor

from ssa_framework.plugin import (
    Clusters,
    ConfigError,
    LayerSpec,
    NeighborSource,
    Proposal,
    Ranges,
    RoutingContext,
    SpreadLevel,
)
from ssa_plugins.kept_segments import KeptSegments
from ssa_plugins.segments import Attend, Level, Opened, Places, take


class SegmentSource(NeighborSource):
    """A query looks at all keys of its own segment, at those of the clusters that fit it best, up to a number of keys,
    and, if asked for, at a summary of every other cluster.

    A subclass says what the clusters of a segment are (`cluster`), how many slots they take (`slots`), how many of them
    a query may open (`most`) and, if it is not the query itself, what is compared with their centroids (`compared`).
    In a cache, a segment is clustered once, when it is full.

    Args:
        levels: keys of a segment and keys of a cluster, about, from level to level.
        keys: how many keys of clusters a query looks at, at most.
        attend: ``"all"``: every key that a query looks at is a neighbor, beside the budget. ``"topk"``: those with the
            highest exact ``q·k`` are, within the budget.
        summaries: whether what is not opened is summarised.
        width: coordinates of a centroid.
        spread: what the variances of clusters count, as in `rank_clusters`; 0 = clusters have none.
    """

    rebuilds = False

    def __init__(
        self,
        layer: LayerSpec,
        levels: list[tuple[int, int]],
        keys: int,
        attend: Attend,
        summaries: bool,
        width: int,
        spread: float = 0.0,
    ) -> None:
        super().__init__(layer)
        self.levels, self.keys, self.attend, self.summaries = levels, keys, attend, summaries
        self.width, self.spread = width, spread
        # all keys of what is opened are neighbors: nothing has to be scored
        self.routing_keys = "segments" if attend == "all" else "all"
        self.summarises = summaries

    # -- what a subclass says ----------------------------------------------------------------------------------------

    def cluster(self, keys: Tensor, starts: Tensor, level: tuple[int, int]) -> Clusters:
        """Clusters of the segments of ``keys``, floating ``[B, Hkv, M, D]``, that begin at ``starts``, int32
        ``[B or 1, F]``, -1 = not used; ``level``: keys of a segment and of a cluster."""
        raise NotImplementedError

    def slots(self, level: tuple[int, int]) -> int:
        """Slots of a segment in what `cluster` returns."""
        raise NotImplementedError

    def most(self, cluster: int) -> int:
        """The most clusters that a query opens, where the smallest have ``cluster`` keys, about."""
        raise NotImplementedError

    def compared(self, q: Tensor) -> Tensor:
        """``[B, G, N, D]`` → ``[B, G, N, width]``, whose products with the centroids rank them."""
        return q

    def levels_for(self, ctx: RoutingContext) -> list[tuple[int, int]]:
        """The levels that queries look at where all keys are there at once."""
        return self.levels

    # -- all keys at once --------------------------------------------------------------------------------------------

    def propose(self, ctx: RoutingContext) -> Proposal | list[Proposal]:
        # where attention is causal, a query must not see more keys for want of later ones
        few = self.layer.num_neighbors if not ctx.causal else min(self.layer.num_neighbors, self.levels[0][0])
        if ctx.num_keys <= few:
            return Ranges.everything()  # all of them fit the budget; there is nothing to choose
        q = self.compared(ctx.q)
        if ctx.state is not None:
            kept: KeptSegments = ctx.state
            most = self.most(self.levels[0][1])
            return kept.propose(
                ctx, q, keys=self.keys, most=most, spread=self.spread, attend=self.attend,
                summaries=self.summaries,
            )  # fmt: skip
        sizes = self.levels_for(ctx)
        own, levels = self._clustered(ctx, sizes)
        opened = None
        if levels:
            opened = Opened.best(ctx, q, levels, keys=self.keys, most=self.most(sizes[0][1]), spread=self.spread)
        proposals: list[Proposal] = []
        proposals += own.whole(ctx, opened) if self.attend == "all" else [own.best_of(ctx, opened)]
        if self.summaries and opened is not None:
            proposals.append(opened.summaries(ctx.num_keys))
        return proposals

    def _clustered(self, ctx: RoutingContext, sizes: list[tuple[int, int]]) -> tuple[Places, list[Level]]:
        """The keys by place, cut into the segments of the first level, and the levels that have full segments."""
        places = Places.of(ctx, [segment for segment, _ in sizes])
        own = places[0]
        full = [here for here in places if here.starts.shape[1]]  # the first levels: segments become longer
        if not full:
            return own, []
        firsts = [here.first for here in full]
        for i, (here, above) in enumerate(itertools.pairwise(full)):  # what is full on the next level is seen there
            firsts[i] = here.first + (above.stop - above.first) * (above.length // here.length)
        if ctx.spread is None:  # all levels place the keys alike
            keys = ctx.shared_k if own.order is None else take(ctx.shared_k, own.order)
            made = [self.cluster(keys, here.starts, size) for here, size in zip(full, sizes, strict=False)]
        else:
            spread = [
                SpreadLevel(
                    here.starts, here.length, self.slots(size), first, here.stop,
                    functools.partial(self.cluster, level=size),
                )
                for here, size, first in zip(full, sizes, firsts, strict=False)
            ]  # fmt: skip
            made = ctx.spread.clusters(own.order, spread)
        return own, [Level.of(ctx, *level) for level in zip(full, made, firsts, strict=True)]

    # -- decoding: segments are clustered when they are full ---------------------------------------------------------

    def init_state(self, ctx: RoutingContext) -> KeptSegments:
        levels = [(level[0], self.slots(level)) for level in self.levels]
        return KeptSegments(ctx, levels, self.width, variances=self.spread > 0)

    def append(self, state: KeptSegments, ctx: RoutingContext) -> KeptSegments:
        state.append(ctx, lambda level, keys, starts: self.cluster(keys, starts, self.levels[level]))
        return state

    def crop(self, state: KeptSegments, length: int) -> KeptSegments:
        state.crop(length)
        return state

    def reorder(self, state: KeptSegments, index: Tensor) -> KeptSegments:
        state.reorder(index)
        return state

    def steady_steps(self, state: KeptSegments, length: int) -> int:
        # what is listed is selected by kernels that take the place of a query from the host
        return state.steady_steps(length) if self.attend == "all" else 0


def check_attend(source: str, attend: str) -> Attend:
    """Raises `ConfigError`."""
    for known in get_args(Attend):
        if attend == known:
            return known
    raise ConfigError(f"{source}: attend must be 'topk' or 'all', got {attend!r}")


def check_integer(source: str, option: str, value: object, least: int) -> int:
    """Raises `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{source}: {option} must be an integer >= {least}, got {value!r}")
    return value
