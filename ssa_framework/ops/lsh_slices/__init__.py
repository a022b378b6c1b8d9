"""The op `lsh_slices`: hash queries and keys, order the keys by bucket, and give each query its slices."""

from ssa_framework.ops.lsh_slices.api import lsh_slices
from ssa_framework.ops.lsh_slices.kept import KeptHashes
from ssa_framework.ops.lsh_slices.types import HashLevels

__all__ = ["HashLevels", "KeptHashes", "lsh_slices"]
