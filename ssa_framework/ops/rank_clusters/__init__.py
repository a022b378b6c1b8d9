"""The op `rank_clusters`: which clusters of keys each query opens."""

from ssa_framework.ops.rank_clusters.api import rank_clusters
from ssa_framework.ops.rank_clusters.kept import KeptClusters
from ssa_framework.ops.rank_clusters.types import OpenedClusters

__all__ = ["KeptClusters", "OpenedClusters", "rank_clusters"]
