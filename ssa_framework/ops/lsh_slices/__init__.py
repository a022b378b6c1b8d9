"""The op `lsh_slices`: hash queries and keys, order the keys by bucket, and give each query its slices."""

from ssa_framework.ops.lsh_slices.api import lsh_slices
from ssa_framework.ops.lsh_slices.types import HashLevels

__all__ = ["HashLevels", "lsh_slices"]
