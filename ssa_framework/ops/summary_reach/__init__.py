"""Whether a query attends a summary that reaches beyond it."""

from ssa_framework.ops.summary_reach.api import reaches_later
from ssa_framework.ops.summary_reach.torch_search import largest_in, largest_of_members

__all__ = ["largest_in", "largest_of_members", "reaches_later"]
