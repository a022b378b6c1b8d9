"""Transformers over neighbor graphs, and how much the graphs of adjacent layers agree."""

from __future__ import annotations

from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from ssa_framework import compiled
from ssa_framework.attention import SparseAttention
from ssa_framework.cache import LayerCache, SSACache
from ssa_framework.config import SSAConfig
from ssa_framework.errors import CacheError, ConfigError, DtypeError, ShapeError
from ssa_framework.graph import NeighborGraph
from ssa_framework.ops.key_lists import jaccard, sort_unique
from ssa_framework.registry import SourceRegistry

_CHUNK_ELEMENTS = 2**22


class SparseTransformerLayer(nn.Module):
    """Pre-norm transformer layer: ``h = x + attn(norm1(x))``, then ``h + ff(norm2(h))``.

    Args:
        config: of the attention; its ``dropout`` also serves the feed-forward part.
        ffn_mult: inner width of the feed-forward part, in units of ``d_model``.
        registry: where source names are looked up; the default registry if left out.
    """

    def __init__(self, config: SSAConfig, ffn_mult: int = 4, registry: SourceRegistry | None = None) -> None:
        super().__init__()
        _require_count("ffn_mult", ffn_mult, 1)
        width = config.d_model
        self.attn = SparseAttention(config, registry=registry)
        self.ff = nn.Sequential(
            nn.Linear(width, ffn_mult * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(ffn_mult * width, width),
            nn.Dropout(config.dropout),
        )
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def build_graph(self, x: Tensor, **graph_options: Any) -> NeighborGraph:
        """The graph that this layer chooses for ``x [B, N, d_model]``; options as in `SparseAttention.build_graph`."""
        q, k, _ = self.attn.project(self.norm1(x))
        return self.attn.build_graph(q, k, **graph_options)

    def forward(
        self,
        x: Tensor,
        return_stats: bool = False,
        *,
        graph: NeighborGraph | None = None,
        cache: LayerCache | None = None,
        **graph_options: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Apply the layer to ``x [B, N, d_model]``.

        Args:
            return_stats: fill the second result; see `graph_stats`.
            graph: apply this graph instead of building one.
            cache: ``x`` are new tokens behind those that are cached; see `SparseAttention.forward`.
            graph_options: ``attention_mask``, ``key_padding_mask``, ``segment_ids`` and so on; see
                `SparseAttention.forward`.

        Returns:
            ``[B, N, d_model]`` and a dictionary, empty unless ``return_stats``.
        """
        attended, stats = self.attn(self.norm1(x), return_stats=return_stats, graph=graph, cache=cache, **graph_options)
        hidden = x + attended
        return hidden + self.ff(self.norm2(hidden)), stats


class SparseTransformer(nn.Module):
    """A stack of `SparseTransformerLayer`, with token embedding and final norm.

    Args:
        config: of every layer, or of each (``layers``); i is added to the seed of layer i, so that each hashes in its
            own way.
        num_layers: how many layers.
        vocab_size: tokens of the embedding; 0 = no embedding.
        ffn_mult, registry: see `SparseTransformerLayer`.
    """

    reuse_every: int = 1
    """Every how many layers a graph is built."""

    def __init__(
        self,
        config: SSAConfig,
        num_layers: int = 6,
        vocab_size: int = 0,
        *,
        ffn_mult: int = 4,
        registry: SourceRegistry | None = None,
    ) -> None:
        super().__init__()
        _require_count("num_layers", num_layers, 1)
        _require_count("vocab_size", vocab_size, 0)
        self.config = config
        self.embed = nn.Embedding(vocab_size, config.d_model) if vocab_size else None
        self.layers = nn.ModuleList(SparseTransformerLayer(c, ffn_mult, registry) for c in _configs(config, num_layers))
        for i, layer in enumerate(cast(list[SparseTransformerLayer], self.layers)):
            layer.attn.router.name = f"layers.{i}"
        self.norm = nn.LayerNorm(config.d_model)

    def embed_input(self, tokens_or_x: Tensor) -> Tensor:
        """Token ids ``[B, N]`` or hidden inputs ``[B, N, d_model]`` → ``[B, N, d_model]``.

        Raises:
            ShapeError, DtypeError: neither of the two, or token ids where there is no embedding.
        """
        if not isinstance(tokens_or_x, Tensor):
            raise DtypeError(f"the input must be a tensor, got {type(tokens_or_x).__name__}")
        if tokens_or_x.is_floating_point():
            if tokens_or_x.dim() != 3 or tokens_or_x.shape[-1] != self.config.d_model:
                raise ShapeError(
                    f"hidden inputs must have shape [B, N, {self.config.d_model}], got {list(tokens_or_x.shape)}"
                )
            return tokens_or_x
        if self.embed is None:
            raise DtypeError(
                f"without vocab_size the input is floating point [B, N, {self.config.d_model}], got {tokens_or_x.dtype}"
            )
        if tokens_or_x.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"token ids must be int32 or int64, got {tokens_or_x.dtype}")
        if tokens_or_x.dim() != 2:
            raise ShapeError(f"token ids must have shape [B, N], got {list(tokens_or_x.shape)}")
        embedded: Tensor = self.embed(tokens_or_x)
        return embedded

    def forward(
        self, tokens_or_x: Tensor, return_stats: bool = False, *, cache: SSACache | None = None, **graph_options: Any
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Token ids ``[B, N]`` or hidden inputs ``[B, N, d_model]`` → hidden states.

        Args:
            return_stats: fill the dictionaries; see `graph_stats`.
            cache: the tokens are new ones behind those that are cached, and join them. The configuration must be
                causal; see `SparseAttention.forward`.
            graph_options: for every layer: ``attention_mask``, ``key_padding_mask``, ``segment_ids`` and so on; see
                `SparseAttention.forward`.

        Returns:
            ``[B, N, d_model]`` and one dictionary per layer, empty unless ``return_stats``.
        """
        x = self.embed_input(tokens_or_x)
        stats_per_layer = []
        for index, layer in enumerate(self.layers):
            kept = None if cache is None else cache.layer(index)
            x, stats = layer(x, return_stats, cache=kept, **graph_options)
            stats_per_layer.append(stats)
        return self.norm(x), stats_per_layer


class CachedGraphSparseTransformer(SparseTransformer):
    """A `SparseTransformer` that builds a graph in every ``reuse_every``-th layer and applies it in those between.

    The first layer of each group routes by its own queries and keys; the others attend to the same neighbors with
    weights and values of their own. Whether that loses anything is a property of the model: see
    `measure_cross_layer_overlap`. The state dict is that of `SparseTransformer`, so one checkpoint serves both.

    Args:
        config, num_layers, vocab_size, ffn_mult, registry: see `SparseTransformer`.
        reuse_every: layers per group.
    """

    def __init__(
        self,
        config: SSAConfig,
        num_layers: int,
        reuse_every: int = 4,
        ffn_mult: int = 4,
        vocab_size: int = 0,
        *,
        registry: SourceRegistry | None = None,
    ) -> None:
        _require_count("reuse_every", reuse_every, 1)
        super().__init__(config, num_layers, vocab_size, ffn_mult=ffn_mult, registry=registry)
        self.reuse_every = reuse_every

    def extra_repr(self) -> str:
        return f"reuse_every={self.reuse_every}"

    def forward(
        self, tokens_or_x: Tensor, return_stats: bool = False, *, cache: SSACache | None = None, **graph_options: Any
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """As `SparseTransformer.forward`, but without a cache; the dictionaries also say ``graph_recomputed``."""
        if cache is not None:
            raise CacheError(
                "CachedGraphSparseTransformer cannot decode with a cache, since layers would attend by the graph of "
                "another layer's keys; load its state dict into a SparseTransformer, which can"
            )
        x = self.embed_input(tokens_or_x)
        if torch.compiler.is_compiling() and not return_stats and compiled.serves(graph_options):
            return self._forward_compiled(x, graph_options)
        graph: NeighborGraph | None = None
        stats_per_layer = []
        for index, layer in enumerate(cast(list[SparseTransformerLayer], self.layers)):
            recomputed = index % self.reuse_every == 0
            if recomputed:
                graph = layer.build_graph(x, **graph_options)
            x, stats = layer(x, return_stats, graph=graph)
            stats_per_layer.append({**stats, "graph_recomputed": recomputed} if return_stats else stats)
        return self.norm(x), stats_per_layer

    def _forward_compiled(self, x: Tensor, graph_options: dict[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
        graph: compiled.RoutedGraph | None = None
        layers = cast(list[SparseTransformerLayer], self.layers)
        for index, layer in enumerate(layers):
            q, k, v = layer.attn.project(layer.norm1(x))
            if graph is None or index % self.reuse_every == 0:
                graph = layer.attn.route_compiled(q, k, **graph_options)
            hidden = x + layer.attn.apply_compiled(q, k, v, graph)
            x = hidden + layer.ff(layer.norm2(hidden))
        return self.norm(x), [{} for _ in layers]


def neighbor_overlap(neighbors_a: Tensor, neighbors_b: Tensor, valid_a: Tensor, valid_b: Tensor) -> Tensor:
    """Jaccard similarity of the neighbors of each query; 1 where both have none.

    Args:
        neighbors_a, neighbors_b: integer ``[B, H, N, Ka]`` and ``[B, H, N, Kb]``, any order.
        valid_a, valid_b: bool of the same shapes, False = empty slot.

    Returns: float32 ``[B, H, N]``. Lists of `NeighborGraph` come from ``as_lists()``; ``overlap()`` takes two graphs.

    Raises:
        ShapeError, DtypeError: lists that do not fit together.
    """
    for name, keys, valid in (("a", neighbors_a, valid_a), ("b", neighbors_b, valid_b)):
        if keys.dim() != 4 or keys.shape != valid.shape or keys.shape[:3] != neighbors_a.shape[:3]:
            raise ShapeError(
                f"neighbors_{name} and valid_{name} must have shape [B, H, N, K] with one B, H, N for both lists, "
                f"got {list(keys.shape)} and {list(valid.shape)}"
            )
        if keys.dtype not in (torch.int32, torch.int64) or valid.dtype != torch.bool:
            raise DtypeError(
                f"neighbors_{name} must be int32 or int64 and valid_{name} bool, got {keys.dtype} and {valid.dtype}"
            )
    batch, heads, queries, slots_a = neighbors_a.shape
    out = torch.empty((batch, heads, queries), dtype=torch.float32, device=neighbors_a.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * (slots_a + neighbors_b.shape[3])))
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        a, b = (
            sort_unique(torch.where(valid[:, :, rows], keys[:, :, rows], -1))
            for keys, valid in ((neighbors_a, valid_a), (neighbors_b, valid_b))
        )
        out[:, :, rows] = jaccard(a, b, a >= 0, b >= 0)
    return out


class CrossLayerOverlap(TypedDict):
    """What `measure_cross_layer_overlap` finds.

    Keys: ``per_pair_overlap``, float32 ``[B, H, N]`` for each pair of adjacent layers;
    ``mean_overlap_per_adjacent_pair``, their means; ``num_layers``.
    """

    per_pair_overlap: list[Tensor]
    mean_overlap_per_adjacent_pair: list[float]
    num_layers: int


@torch.no_grad()
def measure_cross_layer_overlap(model: SparseTransformer, x: Tensor, **graph_options: Any) -> CrossLayerOverlap:
    """How much the graphs that adjacent layers choose have in common (Jaccard similarity per query).

    Low values say that `CachedGraphSparseTransformer` would discard most of what the next layers would have attended
    to. The model runs in eval mode; a cached model runs as it is, while each layer is asked what it would choose.

    Args:
        x: token ids ``[B, N]`` or hidden inputs ``[B, N, d_model]``.
        graph_options: see `SparseTransformer.forward`.

    Raises:
        ConfigError: ``model`` is no `SparseTransformer`.
    """
    if not isinstance(model, SparseTransformer):
        raise ConfigError(f"model must be a SparseTransformer, got {type(model).__name__}")
    training = [module for module in model.modules() if module.training]
    model.eval()
    overlaps: list[Tensor] = []
    try:
        x = model.embed_input(x)
        applied: NeighborGraph | None = None
        previous: NeighborGraph | None = None
        for index, layer in enumerate(cast(list[SparseTransformerLayer], model.layers)):
            graph = layer.build_graph(x, **graph_options)
            if previous is not None:
                shared = graph.num_heads // graph.graph_heads
                overlaps.append(graph.overlap(previous).repeat_interleave(shared, dim=1))
            applied = graph if index % model.reuse_every == 0 else applied
            x, _ = layer(x, graph=applied)
            previous = graph
    finally:
        for module in training:
            module.training = True
    return {
        "per_pair_overlap": overlaps,
        "mean_overlap_per_adjacent_pair": [float(o.mean()) if o.numel() else 1.0 for o in overlaps],
        "num_layers": len(model.layers),
    }


def _configs(config: SSAConfig, num_layers: int) -> list[SSAConfig]:
    """Of each layer, with seeds of their own."""
    unknown = [index for index in config.layers or () if index >= num_layers]
    if unknown:
        raise ConfigError(f"layers of the configuration name layer {unknown[0]}; this model has 0 to {num_layers - 1}")
    each = [config.for_layer(index) for index in range(num_layers)]
    return [own.replace(seed=own.seed + index) for index, own in enumerate(each)]


def _require_count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")
