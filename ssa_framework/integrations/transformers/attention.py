"""The attention function that transformers calls, and `SparseLayer`, what it keeps of one layer."""

from __future__ import annotations

import threading
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError, MaskError
from ssa_framework.integrations.transformers.compact_mask import CompactMask, mask_of_shapes
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.ops.neighbor_attention.api import check_tensors
from ssa_framework.registry import SourceRegistry
from ssa_framework.router import Router

IMPLEMENTATION = "ssa_framework"
"""The name under which transformers knows this attention."""

DECODE_QUERIES = 16
"""Most new tokens behind cached keys that count as a decode step (one; several in assisted decoding)."""

Decode = Literal["dense", "rebuild"]

_LAYER = "_ssa_layer"
_REFUSED = {
    "softcap": "soft-capping of the scores",
    "s_aux": "attention sinks (an extra logit per head)",
    "sinks": "attention sinks (an extra logit per head)",
    "position_bias": "a position bias on the scores",
    "indices": "a selection of keys by the model itself",
    "block_indices": "a selection of keys by the model itself",
    "cache": "a paged cache",
}
_routers_lock = threading.Lock()


class SparseLayer:
    """The routing of one attention module.

    Args:
        name: of the module in its model, for messages.
        config: source mix, budget, graph heads, seed, backend.
        decode: see `use_sparse_attention`.
        registry: where source names are looked up.
    """

    def __init__(self, name: str, config: SSAConfig, decode: Decode, registry: SourceRegistry | None) -> None:
        self.name = name
        self.config = config
        self.decode = decode
        self.registry = registry
        self._routers: dict[tuple[int, int, int, bool, torch.device], Router] = {}

    def router(self, heads: int, kv_heads: int, head_dim: int, causal: bool, device: torch.device) -> Router:
        """The router for H query heads and Hkv key/value heads of D on this device; made once, from the seed.

        Raises:
            ConfigError: a source with parameters of its own.
            SSAError: whatever the sources raise.
        """
        key = (heads, kv_heads, head_dim, causal, device)
        with _routers_lock:
            if key not in self._routers:
                config = self.config.replace(
                    d_model=heads * head_dim,
                    num_heads=heads,
                    num_kv_heads=kv_heads,
                    causal=causal,
                    dropout=0.0,
                    rope_base=None,
                )
                router = Router(config, registry=self.registry).to(device).eval()
                if any(parameter.requires_grad for parameter in router.parameters()):
                    raise ConfigError(
                        "a source of this mix has parameters of its own, which the optimizer of a transformers model "
                        "would never see; leave it out"
                    )
                self._routers[key] = router
            return self._routers[key]

    def attends_densely(self, mask: CompactMask) -> bool:
        """Whether a call with this mask is left to dense attention: a sliding window, cross-attention, or a decode
        step under ``decode="dense"``."""
        if mask.window is not None or (not mask.causal and mask.queries != mask.keys):
            return True
        return self.decode == "dense" and mask.causal and mask.offset > 0 and mask.queries <= DECODE_QUERIES

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: CompactMask, *, scale: float | None, dropout_p: float
    ) -> Tensor:
        """Route and attend: ``q [B, H, N, D]``, ``k [B, Hkv, M, D]``, ``v [B, Hkv, M, Dv]`` → ``[B, H, N, Dv]``."""
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(dtype) if x.dtype == torch.float32 else x for x in (q, k, v))
        check_tensors(q, k, v)
        router = self.router(q.shape[1], k.shape[1], q.shape[3], mask.causal, q.device)
        outs = []
        for piece in mask.pieces(q.device):
            q_piece = q[piece.rows, :, piece.first_query :]
            k_piece, v_piece = (x[piece.rows, :, piece.first_key :] for x in (k, v))
            graph = router(q_piece, k_piece, piece.mask)
            out, _ = neighbor_attention(
                q_piece,
                k_piece,
                v_piece,
                graph,
                scale=scale,
                dropout_p=dropout_p,
                fp32_weights=self.config.fp32_attn_weights,
                backend=self.config.backend,
                dense=self.config.dense_below != 0,
            )
            outs.append(F.pad(out, (0, 0, piece.first_query, 0)))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def attach(module: nn.Module, layer: SparseLayer) -> None:
    setattr(module, _LAYER, layer)


def detach(module: nn.Module) -> None:
    delattr(module, _LAYER)


def attached(module: nn.Module) -> SparseLayer | None:
    layer: SparseLayer | None = getattr(module, _LAYER, None)
    return layer


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CompactMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that is registered with `transformers.AttentionInterface`.

    Modules that `use_sparse_attention` has not chosen, and calls that a chosen one leaves to dense attention, go to
    transformers' ``sdpa`` function.

    Args:
        module: the attention module that calls.
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]``. value: ``[B, Hkv, M, Dv]``.
        attention_mask: what `compact_mask` returned; ``None`` where a model makes no mask.
        scaling: of the scores, ``1 / sqrt(D)`` if left out.
        is_causal: where there is no mask; the module's own if left out.

    Returns: ``[B, N, H, Dv]``, and no attention weights.

    Raises:
        ConfigError: the model asks for something that neither path computes, by name.
        MaskError: a mask that sparse layers can't serve.
    """
    _refuse(module, options)
    layer = attached(module)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, Tensor):
        if layer is not None:
            raise MaskError(
                f"{layer.name} got an attention mask of shape {list(attention_mask.shape)}; sparse layers take a 2-D "
                f"attention_mask [batch, length], or position_ids that restart with every packed document"
            )
        mask = None
    elif attention_mask is None:
        mask = mask_of_shapes(query, key, causal)
    else:
        mask = attention_mask
    if layer is None or mask is None or options.get("sliding_window") is not None or layer.attends_densely(mask):
        dense_mask = attention_mask.dense if isinstance(attention_mask, CompactMask) else attention_mask
        out, _ = sdpa_attention_forward(
            module, query, key, value, dense_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return out, None
    if mask.unknown is not None:
        raise MaskError(f"{layer.name} got {mask.unknown}, which only dense layers can serve; leave this model dense")
    out = layer.attend(query, key, value, mask, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, options: dict[str, Any]) -> None:
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise ConfigError(
                f"{type(module).__name__} asks for {what} ({name}), which sparse attention does not compute; "
                f"undo() it and leave this model dense"
            )
    if options.get("output_attentions"):
        raise ConfigError(
            "output_attentions=True asks for dense N x M matrices, which sparse attention never makes; leave it out, "
            "or undo() sparse attention for this call"
        )
