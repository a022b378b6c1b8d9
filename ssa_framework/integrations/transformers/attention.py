"""The attention function that transformers calls, and `SparseLayer`, what it keeps of one layer."""

from __future__ import annotations

import threading
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ssa_framework import compiled
from ssa_framework.config import SSAConfig
from ssa_framework.decoding import attend_last
from ssa_framework.errors import ConfigError, MaskError
from ssa_framework.integrations.transformers.cached_layer import SparseCacheLayer, adopt, find_layer
from ssa_framework.integrations.transformers.compact_mask import CompactMask, mask_of_shapes
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.ops.neighbor_attention.api import check_tensors
from ssa_framework.registry import SourceRegistry
from ssa_framework.router import Router

IMPLEMENTATION = "ssa_framework"
"""The name under which transformers knows this attention."""

DECODE_QUERIES = 16
"""Most new tokens behind cached keys that ``decode="dense"`` takes for a decode step (one; several in assisted
decoding)."""

Decode = Literal["sparse", "dense", "rebuild"]

_LAYER = "_ssa_layer"
_CACHE = "ssa_cache"
"""The option by which a module gets its cache through to `sparse_attention_forward`."""
_CACHE_PARAMETERS = ("cache", "past_key_values", "layer_past")
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
        self.hook: RemovableHandle | None = None
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
                router.name = self.name
                self._routers[key] = router
            return self._routers[key]

    def reconfigure(self, config: SSAConfig) -> None:
        """Route with another configuration from the next call on; index states in caches are made anew."""
        with _routers_lock:
            self.config = config
            self._routers = {}

    def attends_densely(self, mask: CompactMask) -> bool:
        """Whether a call with this mask is left to dense attention: a sliding window, cross-attention, or a decode
        step under ``decode="dense"``."""
        if mask.window is not None or (not mask.causal and mask.queries != mask.keys):
            return True
        return self.decode == "dense" and mask.causal and mask.offset > 0 and mask.queries <= DECODE_QUERIES

    def is_below(self, q: Tensor, k: Tensor, mask: CompactMask) -> bool:
        """Whether ``dense_below`` leaves every query of a call on a cache to dense attention: then it costs what
        transformers' own costs, and no state is kept before it is needed."""
        if self.config.backend != "auto" or torch.compiler.is_compiling():
            return False
        router = self.router(q.shape[1], k.shape[1], q.shape[3], mask.causal, q.device)
        return (router.dense_below_in_cache(q.device) or 0) > mask.keys

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: CompactMask,
        cached: SparseCacheLayer | None,
        *,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """Route and attend: ``q [B, H, N, D]``, ``k [B, Hkv, M, D]``, ``v [B, Hkv, M, Dv]`` → ``[B, H, N, Dv]``.

        Args:
            cached: what holds the keys and the index states; ``None``: every source starts anew.
        """
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(dtype) if x.dtype == torch.float32 else x for x in (q, k, v))
        check_tensors(q, k, v)
        if torch.compiler.is_compiling():
            return self._attend_compiled(q, k, v, mask, scale=scale, dropout_p=dropout_p)
        router = self.router(q.shape[1], k.shape[1], q.shape[3], mask.causal, q.device)
        pieces = mask.pieces(q.device)
        states = [None] * len(pieces) if cached is None else cached.states(router, pieces, k.shape[2])
        options: dict[str, Any] = {
            "scale": scale,
            "dropout_p": dropout_p,
            "fp32_weights": self.config.fp32_attn_weights,
        }
        outs = []
        for piece, held in zip(pieces, states, strict=True):
            q_piece, k_piece, v_piece = q, k, v
            if piece.rows != slice(0, q.shape[0]) or piece.first_key:
                q_piece = q[piece.rows, :, piece.first_query :]
                k_piece, v_piece = (x[piece.rows, :, piece.first_key :] for x in (k, v))
            if held is not None:
                rooms = cached.rooms_of(k_piece, v_piece) if cached is not None else None
                out, _ = attend_last(
                    router, held, q_piece, k_piece, v_piece, key_keep=piece.mask.key_keep, rooms=rooms, **options
                )
            else:
                graph = router(q_piece, k_piece, piece.mask)
                router.audit(q_piece, k_piece, graph, scale=scale)
                out, _ = neighbor_attention(
                    q_piece,
                    k_piece,
                    v_piece,
                    graph,
                    backend=self.config.backend,
                    dense=self.config.dense_below != 0,
                    **options,
                )
            outs.append(F.pad(out, (0, 0, piece.first_query, 0)) if piece.first_query else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_compiled(
        self, q: Tensor, k: Tensor, v: Tensor, mask: CompactMask, *, scale: float | None, dropout_p: float
    ) -> Tensor:
        router = self._routers.get((q.shape[1], k.shape[1], q.shape[3], mask.causal, q.device))
        if router is None or mask.queries != mask.keys:
            raise ConfigError(
                f"{self.name} is compiled for calls without a cache (use_cache=False), on the device where "
                f"use_sparse_attention found the model"
            )
        call = compiled.AttentionCall(
            causal=mask.causal,
            segment_ids=mask.segments,
            scale=scale,
            dropout_p=dropout_p,
            fp32_weights=self.config.fp32_attn_weights,
            backend=self.config.backend,
            dense=self.config.dense_below != 0,
        )
        return compiled.attend(router, q, k, v, call)


def attach(module: nn.Module, layer: SparseLayer) -> None:
    setattr(module, _LAYER, layer)
    if layer.decode == "sparse":
        layer.hook = module.register_forward_pre_hook(_hand_cache_on, with_kwargs=True)


def detach(module: nn.Module) -> None:
    layer = attached(module)
    if layer is not None and layer.hook is not None:
        layer.hook.remove()
    delattr(module, _LAYER)


def attached(module: nn.Module) -> SparseLayer | None:
    layer: SparseLayer | None = getattr(module, _LAYER, None)
    return layer


def _hand_cache_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a module attends: let its cache hold index states, and hand it on to the attention function."""
    cache = next((kwargs[name] for name in _CACHE_PARAMETERS if kwargs.get(name) is not None), None)
    if cache is None:
        return None
    return args, {**kwargs, _CACHE: adopt(cache, getattr(module, "layer_idx", None))}


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
    cache = options.pop(_CACHE, None)
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

    def attend_densely() -> tuple[Tensor, None]:
        dense_mask = attention_mask.dense if isinstance(attention_mask, CompactMask) else attention_mask
        out, _ = sdpa_attention_forward(
            module, query, key, value, dense_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return out, None

    if layer is None or mask is None or options.get("sliding_window") is not None or layer.attends_densely(mask):
        return attend_densely()
    if mask.unknown is not None:
        raise MaskError(f"{layer.name} got {mask.unknown}, which only dense layers can serve; leave this model dense")
    cached = None if cache is None else _cached(layer, module, cache, mask, (query, key, value))
    if cached is not None and layer.is_below(query, key, mask):
        return attend_densely()
    out = layer.attend(query, key, value, mask, cached, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2).contiguous(), None


def _cached(
    layer: SparseLayer, module: nn.Module, cache: Any, mask: CompactMask, tensors: tuple[Tensor, Tensor, Tensor]
) -> SparseCacheLayer | None:
    """What holds the keys of this call; ``None`` where no state can be kept of them: gradients, which a graph of the
    whole sequence needs, or queries that are not its last tokens.

    Raises:
        ConfigError: the cache is of a kind that can't hold index states.
    """
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if tracked or not mask.causal or mask.segments is not None or mask.offset + mask.queries != mask.keys:
        return None
    found = find_layer(cache, getattr(module, "layer_idx", None), tensors[1])
    if found is None:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ConfigError(
            f"{layer.name} got keys of {kind}, beside which decode='sparse' can't keep index states; use a "
            f"DynamicCache, as generate() does if cache_implementation is left out, or "
            f"use_sparse_attention(..., decode='dense')"
        )
    return found


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
