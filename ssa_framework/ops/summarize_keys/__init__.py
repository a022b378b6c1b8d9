"""Means of groups of keys and of their values, with gradients."""

from ssa_framework.ops.summarize_keys.api import summarize_keys

__all__ = ["summarize_keys"]
