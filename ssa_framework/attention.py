"""`build_graph` and `sparse_attention`, functions on tensors; `SparseAttention`, the layer made of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ssa_framework import compiled
from ssa_framework.cache import LayerCache
from ssa_framework.checkpoint import guard_checkpoints
from ssa_framework.config import SSAConfig
from ssa_framework.decoding import attend_cached
from ssa_framework.errors import CacheError, ConfigError, GraphError, MaskError, ShapeError
from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import MaskMod, make_edge_mask
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.ops.neighbor_attention.api import check_backend, check_tensors
from ssa_framework.registry import SourceRegistry
from ssa_framework.rotary import rotate
from ssa_framework.router import Router
from ssa_framework.router_cache import functional_router


def build_graph(
    query: Tensor,
    key: Tensor,
    *,
    config: SSAConfig | None = None,
    is_causal: bool | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    mask_mod: MaskMod | None = None,
    query_positions: Tensor | None = None,
    cross: bool | None = None,
    source_inputs: Mapping[str, Any] | None = None,
    registry: SourceRegistry | None = None,
) -> NeighborGraph:
    """Choose the neighbors of every query.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]`` with H a multiple of Hkv. Nothing flows back into them.
        config: source mix, budget, graph heads, seed; `SSAConfig()` if left out. Its model sizes are not used.
        is_causal: no key after its query; ``config.causal`` if left out.
        attn_mask: bool (True = attend) or additive, ``[N, M]``, ``[B, M]`` or ``[B or 1, H or 1, N or 1, M or 1]``.
        key_padding_mask: bool ``[B, M]``, True = a real key.
        segment_ids: integer ``[B, N]``, the packed document of every token, or a pair for queries and keys.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool`` on broadcasting index tensors, as in FlexAttention.
        query_positions: integer ``[N]`` or ``[B, N]``, where the queries stand among the keys; ``arange(N)`` if left
            out, which is also what torch's ``is_causal`` means for N != M.
        cross: queries and keys are different sequences, so sources that compare positions sit out. Left out: N != M
            without causality or positions.
        source_inputs: per source name, what the source wants to be told with this call (``edges`` takes its edges).
        registry: where source names are looked up.

    Returns:
        The graph. Masks are looked up edge by edge; nothing of size N·M is made.

    Raises:
        ShapeError: ranks, heads or lengths that do not fit together.
        DtypeError: not floating point, or dtypes that differ.
        MaskError: a mask whose shape fits nothing.
        ConfigError: an option out of range, or a mix that cannot serve the call.
        UnknownSourceError: a source that no plugin registered.
        ProposalError: a source returned something invalid.
        BudgetError: guaranteed neighbors that do not fit ``num_neighbors``.
    """
    check_tensors(query, key, key)
    config = SSAConfig() if config is None else config
    causal = config.causal if is_causal is None else bool(is_causal)
    if cross is None:
        cross = query.shape[2] != key.shape[2] and not causal and query_positions is None
    mask = make_edge_mask(
        batch=query.shape[0],
        heads=query.shape[1],
        queries=query.shape[2],
        keys=key.shape[2],
        device=query.device,
        causal=causal,
        query_positions=query_positions,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        segment_ids=segment_ids,
        mask_mod=mask_mod,
    )
    router = functional_router(config, query, key, causal, registry)
    graph: NeighborGraph = router(query, key, mask, cross=cross, source_inputs=source_inputs)
    return graph


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    config: SSAConfig | None = None,
    graph: NeighborGraph | None = None,
    cache: LayerCache | None = None,
    **graph_options: Any,
) -> Tensor:
    """Attention over a neighbor graph, called like `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]``. value: ``[B, Hkv, M, Dv]``; float16, bfloat16, float32 or
            float64.
        attn_mask, is_causal: as in torch, where ``is_causal`` lines up the first query with the first key; they go
            into the graph, so a given ``graph`` must have been built with them. ``config.causal`` is causal too.
        dropout_p: applied whenever it is above 0, as in torch; pass 0 outside training.
        scale: of the scores, ``1 / sqrt(D)`` if left out.
        enable_gqa: allow fewer key/value heads than query heads.
        config: see `build_graph`; also says ``backend``, ``dense_below`` and ``fp32_attn_weights``.
        graph: apply this graph instead of building one.
        cache: query, key and value are those of new tokens: append them, and attend to everything that is cached.
            Attention must be causal, and collects no gradients; one cache serves one layer with one configuration.
        graph_options: everything else that `build_graph` takes; with a cache only ``key_padding_mask``, of the new
            tokens, ``source_inputs`` and ``registry``.

    Returns:
        ``[B, H, N, Dv]`` in the dtype of ``query``; zeros for a query that may attend nothing. Differentiable to
        query, key, value and an additive ``attn_mask``.

    Raises:
        GraphError: a given ``graph`` does not fit the tensors.
        BackendUnavailableError: the named backend cannot serve the call.
        SSAError: everything that `build_graph` raises.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.dtype == torch.float32 else x for x in (query, key, value))
    check_tensors(query, key, value)
    config = SSAConfig() if config is None else config
    check_backend(config.backend)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ShapeError(
            f"query has {query.shape[1]} heads, key has {key.shape[1]}; pass enable_gqa=True for grouped queries"
        )
    if cache is not None:
        options = _cache_options(graph, attn_mask, graph_options)
        router = cache.owner
        if router is None:
            causal = is_causal or config.causal
            router = functional_router(config, query, key, causal, graph_options.get("registry"))
            cache.config = copy(config)
        elif cache.config != config:
            raise CacheError("this cache was filled with another configuration; reset() it, or use another cache")
        return attend_cached(
            router, cache, query, key, value, scale=scale, fp32_weights=config.fp32_attn_weights, replay=True, **options
        )[0]
    if torch.compiler.is_compiling() and graph is None and compiled.serves(graph_options):
        call = compiled.AttentionCall(
            causal=is_causal or config.causal,
            attn_mask=attn_mask,
            cross=graph_options.get("cross"),
            scale=scale,
            dropout_p=dropout_p,
            fp32_weights=config.fp32_attn_weights,
            backend=config.backend,
            dense=config.dense_below != 0,
            **compiled.mask_options(graph_options),
        )
        return compiled.attend(config, query, key, value, call)
    if graph is None:
        causal = is_causal or config.causal
        graph = build_graph(query, key, config=config, is_causal=causal, attn_mask=attn_mask, **graph_options)
    else:
        check_given_graph(graph, attn_mask, is_causal, graph_options)
    if config.audit_options is not None:
        router = functional_router(config, query, key, is_causal or config.causal, graph_options.get("registry"))
        router.audit(query, key, graph, scale=scale)
    out, _ = neighbor_attention(
        query,
        key,
        value,
        graph,
        scale=scale,
        dropout_p=dropout_p,
        fp32_weights=config.fp32_attn_weights,
        backend=config.backend,
        dense=config.dense_below != 0,
    )
    return out


def _cache_options(
    graph: NeighborGraph | None, attn_mask: Tensor | None, graph_options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `attend_cached` takes; raises `CacheError` for what a cache cannot honour."""
    refused = [*(["graph"] if graph is not None else []), *(["an attention mask"] if attn_mask is not None else [])]
    known = ("key_padding_mask", "source_inputs", "registry")
    refused += [name for name, given in graph_options.items() if given is not None and name not in known]
    if refused:
        raise CacheError(
            f"with a cache there can be no {', '.join(refused)}: attention is causal, and key_padding_mask [B, N] says "
            f"which of the new tokens are none"
        )
    return {"key_keep": graph_options.get("key_padding_mask"), "source_inputs": graph_options.get("source_inputs")}


def check_given_graph(
    graph: NeighborGraph, attn_mask: Tensor | None, is_causal: bool, graph_options: Mapping[str, Any]
) -> None:
    """Raises where masks are given beside a graph: they belong into it. MaskError, GraphError."""
    if attn_mask is not None or graph_options:
        names = [*(["attn_mask"] if attn_mask is not None else []), *graph_options]
        raise MaskError(f"{', '.join(names)} belong to the graph: pass them to build_graph, not beside graph=")
    if is_causal and not graph.causal:
        raise GraphError("is_causal=True, but the graph was built without it; pass is_causal=True to build_graph")


class SparseAttention(nn.Module):
    """Multi-head attention over a neighbor graph: O(N·K) instead of O(N²).

    Self-attention uses every source of the mix; cross-attention (``key_value``) leaves out those that compare
    positions (self, window) and is never causal.

    Args:
        config: sizes, source mix, budget.
        registry: where source names are looked up; the default registry if left out.

    The parameters are called ``Wq``, ``Wk``, ``Wv`` and ``Wo`` as in the original project; the buffers of the
    sources live under ``router.sources``.
    """

    def __init__(self, config: SSAConfig, registry: SourceRegistry | None = None) -> None:
        super().__init__()
        config.validate()
        check_backend(config.backend)
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
        self.Wq = nn.Linear(config.d_model, width, bias=False)
        self.Wk = nn.Linear(config.d_model, kv_width, bias=False)
        self.Wv = nn.Linear(config.d_model, kv_width, bias=False)
        self.Wo = nn.Linear(width, config.d_model, bias=False)
        self.router = Router(config, registry=registry)
        guard_checkpoints(self)
        self.first_head = 0

    def project(
        self, x: Tensor, key_value: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of an input.

        Args:
            x: ``[B, N, d_model]``. key_value: ``[B, M, d_model]`` for cross-attention.
            positions: integer ``[N]`` or ``[B, N]`` for the rotary embedding; ``arange(N)`` if left out.

        Returns: ``q [B, H, N, D]``, ``k, v [B, Hkv, M, D]``, rotated if the configuration says so.
        """
        context = x if key_value is None else key_value
        # tensor parallelism leaves some of the heads here: the width of a head is what is certain
        heads = (-1, self.config.head_dim)
        q = self.Wq(x).unflatten(-1, heads).transpose(1, 2)
        k = self.Wk(context).unflatten(-1, heads).transpose(1, 2)
        v = self.Wv(context).unflatten(-1, heads).transpose(1, 2)
        if self.config.rope_base is not None and key_value is None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)
            q, k = rotate(q, positions, self.config.rope_base), rotate(k, positions, self.config.rope_base)
        return q, k, v

    def build_graph(
        self,
        q: Tensor,
        k: Tensor,
        *,
        cross: bool = False,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        mask_mod: MaskMod | None = None,
        source_inputs: Mapping[str, Any] | None = None,
    ) -> NeighborGraph:
        """The graph of projected queries ``[B, H, N, D]`` and keys ``[B, Hkv, M, D]``; see `build_graph`.

        A two-dimensional ``attention_mask`` is ``[B, M]`` or ``[N, M]``; where B = N it must have four dimensions.
        """
        check_tensors(q, k, k)
        if attention_mask is not None and attention_mask.dim() == 4 and q.shape[1] < attention_mask.shape[1]:
            attention_mask = attention_mask.narrow(1, self.first_head, q.shape[1])
        mask = make_edge_mask(
            batch=q.shape[0],
            heads=q.shape[1],
            queries=q.shape[2],
            keys=k.shape[2],
            device=q.device,
            causal=self.config.causal and not cross,
            attn_mask=attention_mask,
            key_padding_mask=key_padding_mask,
            segment_ids=segment_ids,
            mask_mod=mask_mod,
            two_dims="unambiguous",
        )
        mask = replace(mask, head_offset=self.first_head)
        graph: NeighborGraph = self.router(q, k, mask, cross=cross, source_inputs=source_inputs)
        return graph

    def apply_graph(self, q: Tensor, k: Tensor, v: Tensor, graph: NeighborGraph) -> Tensor:
        """Attention of projected q, k, v over a graph that exists: ``[B, H, N, D]``."""
        out, _ = neighbor_attention(
            q,
            k,
            v,
            graph,
            dropout_p=self.config.dropout if self.training else 0.0,
            fp32_weights=self.config.fp32_attn_weights,
            backend=self.config.backend,
            dense=self.config.dense_below != 0,
        )
        return out

    def forward(
        self,
        x: Tensor,
        key_value: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_stats: bool = False,
        *,
        graph: NeighborGraph | None = None,
        cache: LayerCache | None = None,
        **graph_options: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Attend.

        Args:
            x: ``[B, N, d_model]``. key_value: ``[B, M, d_model]`` for cross-attention.
            attention_mask: bool (True = attend) or additive, ``[B, M]``, ``[N, M]`` or ``[B, 1 or H, N, M]``.
            return_stats: fill the second result (see `graph_stats`).
            graph: apply this graph instead of routing.
            cache: ``x`` are new tokens: append their keys and values, and attend to everything that is cached. Their
                positions go on from ``cache.length``; a mask can only be ``key_padding_mask`` (or a two-dimensional
                boolean ``attention_mask``) of the new tokens. No gradients, no dropout.
            graph_options: ``key_padding_mask``, ``segment_ids``, ``mask_mod``, ``source_inputs``; see `build_graph`.

        Returns:
            ``[B, N, d_model]`` and a dictionary, empty unless ``return_stats``.
        """
        self._check_input("x", x)
        if key_value is not None:
            self._check_input("key_value", key_value)
            if key_value.shape[0] != x.shape[0]:
                raise ShapeError(f"batch sizes differ: x {x.shape[0]}, key_value {key_value.shape[0]}")
        if cache is not None:
            return self._decode(x, key_value, attention_mask, return_stats, graph, cache, graph_options)
        q, k, v = self.project(x, key_value)
        if torch.compiler.is_compiling() and graph is None and not return_stats and compiled.serves(graph_options):
            call = self._compiled_call(key_value is not None, attention_mask, graph_options)
            return self.Wo(compiled.attend(self.router, q, k, v, call).transpose(1, 2).flatten(2)), {}
        if graph is None:
            graph = self.build_graph(q, k, cross=key_value is not None, attention_mask=attention_mask, **graph_options)
        else:
            check_given_graph(graph, attention_mask, False, graph_options)
        self.router.audit(q, k, graph)
        out = self.Wo(self.apply_graph(q, k, v, graph).transpose(1, 2).flatten(2))
        return out, self._stats(graph) if return_stats else {}

    def _stats(self, graph: NeighborGraph) -> dict[str, Any]:
        audit = self.router.last_audit
        return graph_stats(graph, self.config.head_dim) | ({} if audit is None else {"audit": audit.as_dict()})

    def route_compiled(
        self, q: Tensor, k: Tensor, attention_mask: Tensor | None = None, **graph_options: Any
    ) -> compiled.RoutedGraph:
        """`build_graph` for self-attention inside of a program that is being compiled."""
        return compiled.route(self.router, q, k, self._compiled_call(False, attention_mask, graph_options))

    def apply_compiled(self, q: Tensor, k: Tensor, v: Tensor, graph: compiled.RoutedGraph) -> Tensor:
        """Attention over the graph of `route_compiled`, and the output projection: ``[B, N, d_model]``."""
        out = compiled.apply_graph(q, k, v, graph, self._compiled_call(False, None, {}))
        projected: Tensor = self.Wo(out.transpose(1, 2).flatten(2))
        return projected

    def _compiled_call(
        self, cross: bool, attention_mask: Tensor | None, graph_options: Mapping[str, Any]
    ) -> compiled.AttentionCall:
        return compiled.AttentionCall(
            causal=self.config.causal and not cross,
            two_dims="unambiguous",
            attn_mask=attention_mask,
            cross=cross,
            dropout_p=self.config.dropout if self.training else 0.0,
            fp32_weights=self.config.fp32_attn_weights,
            backend=self.config.backend,
            dense=self.config.dense_below != 0,
            **compiled.mask_options(graph_options),
        )

    def reconfigure(self, config: SSAConfig) -> None:
        """Route in another way from the next call on, such as with a larger budget where an audit says that too much
        is missed. Sources are made anew from their seed; caches that were filled before don't fit any more.

        Raises:
            ConfigError: other sizes than the layer has. SSAError: whatever the sources raise.
        """
        sizes = ("d_model", "num_heads", "kv_heads", "rope_base")
        different = [name for name in sizes if getattr(config, name) != getattr(self.config, name)]
        if different:
            raise ConfigError(
                f"a layer keeps its {', '.join(sizes)}; of this configuration {', '.join(different)} differ: take "
                f"layer.config.replace(...)"
            )
        check_backend(config.backend)
        router = Router(config, registry=self.router.registry).to(self.Wq.weight.device).train(self.training)
        router.name = self.router.name
        self.config, self.router = config, router

    def _decode(
        self,
        x: Tensor,
        key_value: Tensor | None,
        attention_mask: Tensor | None,
        return_stats: bool,
        graph: NeighborGraph | None,
        cache: LayerCache,
        graph_options: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        if key_value is not None:
            raise CacheError("cross-attention has no cache: its keys and values are the same in every step")
        if attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape == x.shape[:2]:
            if graph_options.get("key_padding_mask") is not None:
                attention_mask = attention_mask & graph_options["key_padding_mask"]
            graph_options, attention_mask = {**graph_options, "key_padding_mask": attention_mask}, None
        options = _cache_options(graph, attention_mask, graph_options)
        positions = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)
        q, k, v = self.project(x, positions=positions)
        attended, routed = attend_cached(
            self.router, cache, q, k, v, fp32_weights=self.config.fp32_attn_weights, replay=not return_stats, **options
        )
        stats = self._stats(routed) if return_stats and routed is not None else {}
        return self.Wo(attended.transpose(1, 2).flatten(2)), stats

    def _check_input(self, name: str, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.config.d_model:
            raise ShapeError(f"{name} must have shape [batch, length, {self.config.d_model}], got {list(x.shape)}")

    def extra_repr(self) -> str:
        return f"d_model={self.config.d_model}, num_heads={self.config.num_heads}, causal={self.config.causal}"


def graph_stats(graph: NeighborGraph, head_dim: int) -> dict[str, Any]:
    """What ``return_stats`` reports.

    ``neighbors_shape`` ``(B, H, N, slots)``; ``peak_sparse_elems`` and ``peak_full_elems``, the elements that a
    gather of all slots and of all keys would take, and their ratio ``compression``; ``padding_fraction``, the share
    of slots without a neighbor; ``slots`` and ``keys_scored``, per source, means per query. A layer adds ``audit``,
    an `AuditReport` as a dictionary, where the call was audited.
    """
    per_query = graph.batch * graph.num_heads * graph.num_queries * head_dim
    slots = graph.slots
    return {
        "neighbors_shape": (graph.batch, graph.num_heads, graph.num_queries, slots),
        "peak_sparse_elems": per_query * slots,
        "peak_full_elems": per_query * graph.num_keys,
        "compression": graph.num_keys / slots if slots else float("inf"),
        "padding_fraction": graph.padding_fraction,
        "slots": graph.slots_by_source(),
        "keys_scored": graph.keys_scored(),
    }
