"""Choosing the keys that go into a graph's lists: exact scores, each key once, the best of all sources."""

from ssa_framework.ops.select_neighbors.api import Proposed, Selection, select_neighbors

__all__ = ["Proposed", "Selection", "select_neighbors"]
