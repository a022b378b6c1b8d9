"""Sparse attention by graph routing: neighbor sources propose, the router builds one graph, the engine attends."""

from importlib.metadata import PackageNotFoundError, version

from ssa_framework.attention import SparseAttention, build_graph, sparse_attention
from ssa_framework.cache import LayerCache, SSACache
from ssa_framework.config import SSAConfig
from ssa_framework.convert import convert
from ssa_framework.errors import SSAError
from ssa_framework.graph import NeighborGraph
from ssa_framework.multihead import SparseMultiheadAttention
from ssa_framework.regime import SubquadraticRegimeTracker
from ssa_framework.registry import SourceRegistry, default_registry, register_source
from ssa_framework.transformer import (
    CachedGraphSparseTransformer,
    SparseTransformer,
    SparseTransformerLayer,
    measure_cross_layer_overlap,
    neighbor_overlap,
)

try:
    __version__ = version("ssa-framework")
except PackageNotFoundError:  # running from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "CachedGraphSparseTransformer",
    "LayerCache",
    "NeighborGraph",
    "SSACache",
    "SSAConfig",
    "SSAError",
    "SourceRegistry",
    "SparseAttention",
    "SparseMultiheadAttention",
    "SparseTransformer",
    "SparseTransformerLayer",
    "SubquadraticRegimeTracker",
    "__version__",
    "build_graph",
    "convert",
    "default_registry",
    "measure_cross_layer_overlap",
    "neighbor_overlap",
    "register_source",
    "sparse_attention",
]
