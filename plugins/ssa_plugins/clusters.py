"""``clusters``: keys of the k-means clusters whose centroids fit a query best, and its own segment."""

from __future__ import annotations

from ssa_framework.plugin import (
    ConfigError,
    LayerSpec,
    NeighborSource,
    Ranges,
    Registrar,
    RoutingContext,
    cluster_keys,
    hookimpl,
)
from ssa_plugins.segments import Attend, Places, check_attend, take


class Clusters(NeighborSource):
    """The sequence is cut into segments, and the keys of each full segment into clusters by k-means.

    A query looks at the clusters with the highest ``q·centroid``, up to a number of keys, and at all keys of the
    segment that it stands in; the neighbors are those of them with the highest exact ``q·k``. In causal attention it
    looks at clusters of earlier segments and at its own segment up to itself. A segment is clustered when it is full
    and never again, so nothing depends on what comes later. Where attention is not causal, a query looks at the
    clusters of all segments and at the keys that fill none.

    Segments count the real keys of a document: they never cross a document's border or hold padding.

    Args:
        segment: keys of a segment; where attention is not causal, about, so that few keys are left over.
        cluster: keys per centroid.
        keys: how many keys of clusters a query looks at, at most; twice ``num_neighbors`` if left out.
        iterations: Lloyd steps.
        attend: ``"topk"``, or ``"all"``: every key that a query looks at is a neighbor, beside the budget. They are
            kept as lists, which take memory for each of them.

    Ranking the clusters compares a query with one centroid for every ``cluster`` keys, which `keys_scored` leaves out.
    """

    def __init__(
        self,
        layer: LayerSpec,
        *,
        segment: int = 1024,
        cluster: int = 32,
        keys: int | None = None,
        iterations: int = 5,
        attend: Attend = "topk",
    ) -> None:
        super().__init__(layer)
        keys = 2 * layer.num_neighbors if keys is None else keys
        for name, value, low in (("segment", segment, 1), ("cluster", cluster, 1), ("keys", keys, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"clusters: {name} must be an integer >= {low}, got {value!r}")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            raise ConfigError(f"clusters: iterations must be an integer >= 0, got {iterations!r}")
        if cluster > segment:
            raise ConfigError(f"clusters: a cluster of {cluster} keys is larger than a segment of {segment}")
        self.segment, self.cluster, self.keys, self.iterations = segment, cluster, keys, iterations
        self.attend = check_attend("clusters", attend)

    def extra_repr(self) -> str:
        return f"segment={self.segment}, cluster={self.cluster}, keys={self.keys}, iterations={self.iterations}"

    def propose(self, ctx: RoutingContext) -> Ranges:
        if ctx.num_keys <= self.layer.num_neighbors:
            return Ranges.everything()  # all of them fit the budget; there is nothing to choose
        length = self._length(ctx)
        places = Places.of(ctx, length)
        if not places.starts.shape[1]:  # not one full segment: every key of the document
            return places.ranges(ctx, attend=self.attend)
        shared = ctx.shared_k if places.order is None else take(ctx.shared_k, places.order)
        count = max(1, round(length / self.cluster))
        capacity = min(2 * self.cluster, self.keys)  # the best cluster must always fit
        clusters = cluster_keys(shared, places.starts, length, count, iterations=self.iterations, capacity=capacity)
        return places.open(ctx, ctx.q, clusters, keys=self.keys, about=self.cluster, attend=self.attend)

    def _length(self, ctx: RoutingContext) -> int:
        """Keys of a segment: as configured, or, for one document without causality, so that few are left over."""
        if ctx.causal or ctx.documents is not None or ctx.key_keep is not None:
            return self.segment
        return ctx.num_keys // max(1, round(ctx.num_keys / self.segment))


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("clusters", Clusters)
