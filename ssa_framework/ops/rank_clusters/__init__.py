"""The op `rank_clusters`: which clusters of keys each query opens."""

from ssa_framework.ops.rank_clusters.api import rank_clusters

__all__ = ["rank_clusters"]
