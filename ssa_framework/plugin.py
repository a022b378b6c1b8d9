"""What plugin authors import. Everything here is public and stable; nothing else is needed to write a source."""

from ssa_framework.errors import BudgetError, ConfigError, MissingExtraError, SSAError
from ssa_framework.growing import GrowingTensor
from ssa_framework.hookspecs import ENTRY_POINT_GROUP, hookimpl
from ssa_framework.ops.cluster_keys import Clusters, cluster_keys, cluster_members, cluster_slots
from ssa_framework.ops.group_keys import group_keys
from ssa_framework.ops.lsh_slices import HashLevels, KeptHashes, lsh_slices
from ssa_framework.ops.rank_clusters import KeptClusters, rank_clusters
from ssa_framework.ops.summarize_keys import summarize_keys
from ssa_framework.proposals import Band, Candidates, Columns, Proposal, Ranges, Spans, Summaries
from ssa_framework.registry import Registrar
from ssa_framework.source import ALWAYS, LayerSpec, NeighborSource, RoutingContext, SpreadLevel, may_keep

__all__ = [
    "ALWAYS",
    "ENTRY_POINT_GROUP",
    "Band",
    "BudgetError",
    "Candidates",
    "Clusters",
    "Columns",
    "ConfigError",
    "GrowingTensor",
    "HashLevels",
    "KeptClusters",
    "KeptHashes",
    "LayerSpec",
    "MissingExtraError",
    "NeighborSource",
    "Proposal",
    "Ranges",
    "Registrar",
    "RoutingContext",
    "SSAError",
    "Spans",
    "SpreadLevel",
    "Summaries",
    "cluster_keys",
    "cluster_members",
    "cluster_slots",
    "group_keys",
    "hookimpl",
    "lsh_slices",
    "may_keep",
    "rank_clusters",
    "summarize_keys",
]
