"""``clusters``: keys of the k-means clusters that fit a query best, its own segment, and summaries of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssa_framework.plugin import (
    ConfigError,
    LayerSpec,
    NeighborSource,
    Proposal,
    Ranges,
    Registrar,
    RoutingContext,
    cluster_keys,
    hookimpl,
    summarize_keys,
)
from ssa_plugins.segments import Attend, Level, Opened, Places, check_attend, propose, take


class Clusters(NeighborSource):
    """The sequence is cut into segments, and the keys of each full segment into clusters by k-means.

    A query attends to all keys of the segment that it stands in, to the keys of the clusters that fit it best, up to a
    number of keys, and to one summary of every other cluster: the mean of its keys and of their values, weighted by
    its size. In causal attention it looks at clusters of earlier segments and at its own segment up to itself. A
    segment is clustered when it is full and never again, so nothing depends on what comes later.

    Segments that lie further back are joined and clustered anew, with more keys in each cluster: there are several
    levels, each with longer segments than the one before, and a query sees the clusters of the highest level whose
    segment is full. This keeps their number, and what ranking them and attending to their summaries costs, small.

    Clusters are ranked by an estimate of the mean of ``exp(q·k)`` over their keys, from the mean c and the variances
    s² of their coordinates as if these were independent and normal: ``q·c + |q·s|² / (2 sqrt(D))``.

    Where attention is not causal, a query looks at the clusters of all keys, on the highest level that the sequence
    fills, and at the few keys that are left over. Segments count the real keys of a document: they never cross a
    document's border or hold padding.

    Args:
        levels: keys of a segment and keys per centroid, from level to level; segments are multiples of those before.
            Where attention is not causal the length of segments is adapted, so that few keys are left over.
        keys: how many keys of clusters a query looks at, at most; twice ``num_neighbors`` if left out.
        iterations: Lloyd steps.
        attend: ``"all"``: every key that a query looks at is a neighbor, beside the budget. ``"topk"``: those with the
            highest exact ``q·k`` are, within the budget.
        summaries: attend to a summary of each cluster that is not opened. They cannot honour ``attn_mask`` and
            ``mask_mod``, which may hide single keys.

    Ranking compares a query with a centroid for every cluster that it sees, which `keys_scored` leaves out. A key of
    the band, which may reach into an earlier segment, is also in the summary of its cluster there.
    """

    def __init__(
        self,
        layer: LayerSpec,
        *,
        levels: Sequence[Sequence[int]] = ((512, 16), (2048, 32)),
        keys: int | None = None,
        iterations: int = 5,
        attend: Attend = "all",
        summaries: bool = True,
    ) -> None:
        super().__init__(layer)
        keys = 2 * layer.num_neighbors if keys is None else keys
        if isinstance(keys, bool) or not isinstance(keys, int) or keys < 1:
            raise ConfigError(f"clusters: keys must be an integer >= 1, got {keys!r}")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            raise ConfigError(f"clusters: iterations must be an integer >= 0, got {iterations!r}")
        self.levels, self.keys, self.iterations = _checked_levels(levels), keys, iterations
        self.attend, self.summaries = check_attend("clusters", attend), summaries

    def extra_repr(self) -> str:
        return f"levels={self.levels}, keys={self.keys}, attend={self.attend!r}, summaries={self.summaries}"

    def propose(self, ctx: RoutingContext) -> Proposal | list[Proposal]:
        if ctx.num_keys <= self.layer.num_neighbors:
            return Ranges.everything()  # all of them fit the budget; there is nothing to choose
        sizes = self._sizes(ctx)
        places = [Places.of(ctx, segment) for segment, _ in sizes]
        own, levels = places[0], []
        for i, (segment, cluster) in enumerate(sizes):
            here, first = places[i], None
            if not here.starts.shape[1]:
                break  # not one full segment, nor on a higher level
            if i + 1 < len(sizes):  # what is full on the next level is seen there
                above = places[i + 1]
                first = here.first + (above.stop - above.first) * (sizes[i + 1][0] // segment)
            levels.append(self._level(ctx, here, segment, cluster, first))
        if not levels:
            return propose(ctx, own, None, attend=self.attend, summaries=False)
        q = ctx.q.float()
        q = torch.cat([q, q.square() * (0.5 * q.shape[-1] ** -0.5)], dim=-1)
        opened = Opened.best(ctx, q, levels, keys=self.keys, about=sizes[0][1])
        return propose(ctx, own, opened, attend=self.attend, summaries=self.summaries)

    def _sizes(self, ctx: RoutingContext) -> list[tuple[int, int]]:
        """The levels, or, for one document without causality, one whose segments leave few keys over."""
        if ctx.causal or ctx.documents is not None or ctx.key_keep is not None:
            return self.levels
        filled = [level for level in self.levels if level[0] <= ctx.num_keys]
        segment, cluster = filled[-1] if filled else self.levels[0]
        return [(max(1, ctx.num_keys // max(1, round(ctx.num_keys / segment))), cluster)]

    def _level(
        self, ctx: RoutingContext, places: Places, segment: int, cluster: int, first: Tensor | None
    ) -> Level:
        keys = ctx.shared_k if places.order is None else take(ctx.shared_k, places.order)
        count = max(1, round(segment / cluster))
        capacity = min(2 * cluster, self.keys)  # the best cluster must always fit
        clusters = cluster_keys(keys, places.starts, segment, count, iterations=self.iterations, capacity=capacity)
        level = Level.of(ctx, places, clusters, first)
        members = level.members(ctx.num_keys)[:, :, None]
        rows = ctx.shared_k.float()
        mean, mean_square, _ = summarize_keys(rows, rows.square(), members, clusters.size.shape[2])
        variance = (mean_square - mean.square()).clamp(min=0.0)
        return replace(level, clusters=replace(clusters, centroids=torch.cat([mean, variance], dim=-1)))


def _checked_levels(levels: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    def fail(what: str) -> ConfigError:
        return ConfigError(
            f"clusters: levels must be pairs of keys of a segment and keys per cluster, such as [[512, 16], [2048, 32]];"
            f" {what}"
        )

    if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
        raise fail(f"got {levels!r}")
    checked: list[tuple[int, int]] = []
    for level in levels:
        if not isinstance(level, Sequence) or len(level) != 2:
            raise fail(f"got {level!r}")
        for number in level:
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise fail(f"{number!r} is no integer >= 1")
        segment, cluster = level
        if cluster > segment:
            raise fail(f"a cluster of {cluster} keys is larger than a segment of {segment}")
        if checked and (segment <= checked[-1][0] or segment % checked[-1][0]):
            raise fail(f"segments of {segment} keys are no larger multiple of {checked[-1][0]}")
        checked.append((segment, cluster))
    return checked


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("clusters", Clusters)
