"""Sparse attention under a Hugging Face model (extra ``transformers``)."""

from ssa_framework.integrations.transformers.versions import usable_transformers as _usable_transformers

with _usable_transformers():
    from transformers import AttentionInterface as _AttentionInterface
    from transformers import AttentionMaskInterface as _AttentionMaskInterface

    from ssa_framework.integrations.transformers.attention import IMPLEMENTATION, sparse_attention_forward
    from ssa_framework.integrations.transformers.compact_mask import CompactMask, compact_mask
    from ssa_framework.integrations.transformers.switch import SparseAttentionHandle, use_sparse_attention

_AttentionInterface.register(IMPLEMENTATION, sparse_attention_forward)
_AttentionMaskInterface.register(IMPLEMENTATION, compact_mask)

__all__ = ["CompactMask", "SparseAttentionHandle", "use_sparse_attention"]
