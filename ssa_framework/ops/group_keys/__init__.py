"""Sorting keys by bucket, and finding the slice of each query's buckets."""

from ssa_framework.ops.group_keys.api import group_keys

__all__ = ["group_keys"]
