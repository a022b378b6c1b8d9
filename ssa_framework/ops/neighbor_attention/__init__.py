"""Softmax attention over a neighbor graph."""

from ssa_framework.ops.neighbor_attention.api import available_backends, neighbor_attention

__all__ = ["available_backends", "neighbor_attention"]
