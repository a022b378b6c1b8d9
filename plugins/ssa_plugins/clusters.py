"""``clusters``: keys of the k-means clusters that fit a query best, its own segment, and summaries of the rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssa_framework.plugin import Clusters as ClustersOfKeys
from ssa_framework.plugin import (
    ConfigError,
    LayerSpec,
    Registrar,
    RoutingContext,
    cluster_keys,
    cluster_slots,
    hookimpl,
)
from ssa_plugins.segment_source import SegmentSource, check_attend, check_integer
from ssa_plugins.segments import Attend

_MOST_SEEN = 1024
"""Clusters, about, that a query sees at most where it sees all of them; the last level may have more."""

_LAST_STEPS = 2
"""Lloyd steps that look at all keys of a segment."""


class Clusters(SegmentSource):
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

    Where attention is not causal, a query looks at the clusters of all keys, on the first level that has no more than
    about 1,024 of them, and at the few keys that are left over. Segments count the real keys of a document: they
    never cross a document's border or hold padding.

    Args:
        levels: keys of a segment and keys per centroid, from level to level; segments are multiples of those before.
            Where attention is not causal the length of segments is adapted, so that few keys are left over.
        keys: how many keys of clusters a query looks at, at most; twice ``num_neighbors`` if left out.
        iterations: Lloyd steps; all but the last two look at some of the keys (`cluster_keys`).
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
        levels: Sequence[Sequence[int]] = ((512, 16), (2048, 32), (8192, 64)),
        keys: int | None = None,
        iterations: int = 5,
        attend: Attend = "all",
        summaries: bool = True,
    ) -> None:
        keys = check_integer("clusters", "keys", 2 * layer.num_neighbors if keys is None else keys, least=1)
        iterations = check_integer("clusters", "iterations", iterations, least=0)
        super().__init__(
            layer,
            levels=_checked_levels(levels),
            keys=keys,
            attend=check_attend("clusters", attend),
            summaries=summaries,
            width=layer.head_dim,
            spread=0.5 * layer.head_dim**-0.5,
        )
        self.iterations = iterations

    def extra_repr(self) -> str:
        return f"levels={self.levels}, keys={self.keys}, attend={self.attend!r}, summaries={self.summaries}"

    def cluster(self, keys: Tensor, starts: Tensor, level: tuple[int, int]) -> ClustersOfKeys:
        count, capacity = self._pieces(level)
        coarse = max(0, self.iterations - _LAST_STEPS)
        return cluster_keys(keys, starts, level[0], count, iterations=self.iterations, coarse=coarse, capacity=capacity)

    def slots(self, level: tuple[int, int]) -> int:
        return cluster_slots(level[0], *self._pieces(level))

    def _pieces(self, level: tuple[int, int]) -> tuple[int, int]:
        """How many centroids a segment has, and the most keys of a cluster: the best one must always fit."""
        segment, cluster = level
        return max(1, round(segment / cluster)), min(2 * cluster, self.keys)

    def most(self, cluster: int) -> int:
        # half the usual size on average would be uncommonly small
        return -(-2 * self.keys // cluster)

    def levels_for(self, ctx: RoutingContext) -> list[tuple[int, int]]:
        """All levels, or, without causality, the first that is coarse enough for the number of keys."""
        if ctx.causal:
            return self.levels
        filled = [level for level in self.levels if level[0] <= ctx.num_keys] or self.levels[:1]
        few = [level for level in filled if ctx.num_keys <= level[1] * _MOST_SEEN]
        segment, cluster = few[0] if few else filled[-1]
        if ctx.documents is not None or ctx.key_keep is not None:
            return [(segment, cluster)]
        # as many keys in each segment, so that few are left over
        return [(max(1, ctx.num_keys // max(1, round(ctx.num_keys / segment))), cluster)]


def _checked_levels(levels: object) -> list[tuple[int, int]]:
    def fail(what: str) -> ConfigError:
        return ConfigError(
            "clusters: levels must be pairs of keys of a segment and keys per cluster, such as "
            f"[[512, 16], [2048, 32]]; {what}"
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
