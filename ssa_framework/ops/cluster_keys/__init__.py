"""The op `cluster_keys`: k-means of segments of the keys, each by itself, and the keys in the order of the clusters."""

from ssa_framework.ops.cluster_keys.api import cluster_keys
from ssa_framework.ops.cluster_keys.members import cluster_members
from ssa_framework.ops.cluster_keys.types import Clusters, cluster_slots

__all__ = ["Clusters", "cluster_keys", "cluster_members", "cluster_slots"]
