"""What a plugin author needs to test a source: the contract that every source keeps, and inputs to try it on.

Needs pytest (extra ``test``).
"""

from ssa_framework.testing.contract import SourceContract
from ssa_framework.testing.inputs import (
    AttentionInputs,
    dense_attention,
    graph_attention,
    make_inputs,
    packed_ids,
    padding_mask,
)

__all__ = [
    "AttentionInputs",
    "SourceContract",
    "dense_attention",
    "graph_attention",
    "make_inputs",
    "packed_ids",
    "padding_mask",
]
