"""Sparse attention under a Hugging Face model (extra ``transformers``)."""

from ssa_framework.errors import MissingExtraError

try:
    from transformers import AttentionInterface as _AttentionInterface
    from transformers import AttentionMaskInterface as _AttentionMaskInterface
except ImportError as error:
    raise MissingExtraError(
        "ssa_framework.integrations.transformers needs transformers 5 or later, which is not installed; "
        "run: pip install 'ssa-framework[transformers]'"
    ) from error

from ssa_framework.integrations.transformers.attention import IMPLEMENTATION, sparse_attention_forward
from ssa_framework.integrations.transformers.compact_mask import CompactMask, compact_mask
from ssa_framework.integrations.transformers.switch import SparseAttentionHandle, use_sparse_attention

_AttentionInterface.register(IMPLEMENTATION, sparse_attention_forward)
_AttentionMaskInterface.register(IMPLEMENTATION, compact_mask)

__all__ = ["CompactMask", "SparseAttentionHandle", "use_sparse_attention"]
