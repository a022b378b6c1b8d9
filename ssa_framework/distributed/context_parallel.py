"""Context parallelism: attention of a sequence whose tokens are spread over ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ssa_framework.attention import SparseAttention, graph_stats
from ssa_framework.cache import LayerCache
from ssa_framework.config import SSAConfig
from ssa_framework.distributed.agreement import check_agreement, require_same
from ssa_framework.distributed.collectives import Ranks, as_json_value, on_host
from ssa_framework.distributed.layout import LayoutName, SequenceLayout
from ssa_framework.distributed.needs import KeyTable, counted_before, reached_keys
from ssa_framework.distributed.routing_keys import Reach, gather_keys
from ssa_framework.distributed.rows import RowExchange, RowMasks, fetch_rows
from ssa_framework.distributed.spread_segments import SegmentsOfRanks
from ssa_framework.distributed.summary_sums import SharedMembers, SummarySums
from ssa_framework.errors import CacheError, ConfigError, DtypeError, GraphError, MaskError, ShapeError
from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import MaskMod, make_edge_mask
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.ops.neighbor_attention.api import check_tensors
from ssa_framework.registry import SourceRegistry
from ssa_framework.router import Router
from ssa_framework.router_cache import functional_router


@dataclass(frozen=True)
class ContextParallel:
    """How a sequence is spread over the ranks of a group.

    Attributes:
        ranks: the process group, and this process in it.
        layout: ``"zigzag"`` or ``"contiguous"``, see `SequenceLayout`.
    """

    ranks: Ranks
    layout: LayoutName

    @classmethod
    def over(
        cls, mesh: DeviceMesh | dist.ProcessGroup | None = None, *, layout: LayoutName = "zigzag"
    ) -> ContextParallel:
        """Over a mesh of one dimension (``mesh["cp"]``), a process group, or all processes.

        Raises:
            ConfigError: torch.distributed is not initialised, or a mesh of several dimensions.
        """
        SequenceLayout(0, 1, layout)  # the name is checked here, where it was written
        return cls(Ranks.of(mesh), layout)

    def of_length(self, length: int) -> SequenceLayout:
        """Who holds what of a sequence of ``length`` tokens; raises `ShapeError` where it has no equal pieces."""
        return SequenceLayout(length, self.ranks.size, self.layout)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The part of this rank of a whole sequence along ``dim``: of tokens, labels, masks, document numbers.

        Raises:
            ShapeError: a length that has no equal pieces; names the next one that has.
        """
        return self.of_length(x.shape[dim]).shard(x, self.ranks.rank, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence, by position, from the parts of all ranks along ``dim``; without gradients."""
        parts = self.ranks.all_gather(x, "parts of a sequence").unbind(0)
        return self.of_length(x.shape[dim] * self.ranks.size).in_order(torch.cat(list(parts), dim=dim), dim)

    def positions(self, local_length: int, device: torch.device | None = None) -> Tensor:
        """Where the tokens of this rank stand in the sequence, int64 ``[N / W]``."""
        return self.of_length(local_length * self.ranks.size).positions(self.ranks.rank, device)


@dataclass(frozen=True)
class ShardGraph:
    """The graph of the queries that this rank holds, and where the keys and values that they attend to are.

    Attributes:
        context: how the sequence is spread.
        routed: the graph of this rank's queries over all keys of the sequence.
        pieces: rows of this rank, consecutive in the sequence, and their graph over the keys of ``table``.
        table: the keys that some query of this rank attends.
        exchange: how their rows get here.
        sums: how summaries are made, if there are any.
        keys_of: the local keys that routing gathered, ``gathered``, ``[B, Hkv, U, D]``; ``None`` where it did not.
    """

    context: ContextParallel
    routed: NeighborGraph
    pieces: list[tuple[slice, NeighborGraph]]
    table: KeyTable
    exchange: RowExchange
    sums: SummarySums | None = None
    keys_of: Tensor | None = None
    gathered: Tensor | None = None

    @property
    def causal(self) -> bool:
        return self.routed.causal

    @cached_property
    def local_shape(self) -> tuple[int, int, int]:
        """B, H and N / W."""
        return self.routed.batch, self.routed.num_heads, self.routed.num_queries


def build_shard_graph(
    context: ContextParallel,
    router: Router,
    config: SSAConfig,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    mask_mod: MaskMod | None = None,
    source_inputs: Mapping[str, Any] | None = None,
    first_head: int = 0,
) -> ShardGraph:
    """Route the queries of this rank over the keys of all ranks; every rank must call it, with its own part.

    Args:
        q: ``[B, H, N / W, D]``. k: ``[B, Hkv, N / W, D]``. Nothing flows back into them.
        key_padding_mask: bool ``[B, N / W]``. segment_ids: integer ``[B or 1, N / W]``; numbers mean the same
            documents on all ranks.
        mask_mod: on positions of the whole sequence. source_inputs: as in `ssa_framework.build_graph`; edges are
            numbered by positions of the whole sequence.

    Raises:
        DistributedError: ranks with different configurations or shapes (the message names the difference), or a rank
        that did not answer. SSAError: everything that `ssa_framework.build_graph` raises.
    """
    check_tensors(q, k, k)
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"context parallelism is for self-attention: {q.shape[2]} queries, {k.shape[2]} keys")
    ranks = context.ranks
    _agree(context, router, config, q, k, causal, key_padding_mask, segment_ids)
    layout = context.of_length(q.shape[2] * ranks.size)
    positions = layout.positions_by_rank(q.device)[ranks.rank]
    keep, segments = _gathered_metadata(layout, ranks, q, key_padding_mask, segment_ids)

    def sharded_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        assert mask_mod is not None
        return mask_mod(b, h, positions[row], key)

    mask = make_edge_mask(
        batch=q.shape[0],
        heads=q.shape[1],
        queries=q.shape[2],
        keys=layout.length,
        device=q.device,
        causal=causal,
        key_padding_mask=keep,
        segment_ids=None if segments is None else (segments[:, positions], segments),
        mask_mod=None if mask_mod is None else sharded_mod,
    )
    chunks = layout.chunks(ranks.rank)
    offset = chunks[0][0] if len(chunks) == 1 else None
    mask = replace(mask, positions=positions.int()[None], offset=offset, head_offset=first_head)
    reach = Reach.of(layout, mask)
    # what is measured on one machine may come out otherwise on another
    dense_below = None if router.dense_below == "auto" else router.dense_below
    everything = (dense_below or 0) > layout.length
    kinds = {cast(Any, source).routing_keys for source in router.sources.values()}
    if any(cast(Any, source).learns for source in router.sources.values()):
        raise ConfigError("a source of this mix learns from its keys, whose gradients would have to reach other ranks")
    summarises = any(cast(Any, source).summarises for source in router.sources.values())
    keys, spread = None, None
    # without a dense way, what fits the budget is a list, of which the best may still be chosen
    scored = router.dense_below == 0 and layout.length <= router.layer.num_neighbors
    if not everything and ("all" in kinds or scored):
        keys = gather_keys(ranks, reach, k.detach(), everything=summarises)
    elif "segments" in kinds and not everything:
        spread = SegmentsOfRanks(layout, ranks, k.detach())
    stand_in = k.new_zeros(()).expand(*k.shape[:2], layout.length, k.shape[3])
    routed = router.route(
        q,
        stand_in if keys is None else keys,
        mask,
        cross=False,
        source_inputs=source_inputs,
        dense_below=dense_below,
        partial=True,
        spread=spread,
    )
    if routed.summaries is not None and not summarises:
        raise ConfigError(
            "a source of this mix returns summaries and does not say so, so that ranks may have made different ones; "
            "set summarises = True on its class"
        )
    router.registry.graph_built(routed, router.layer)
    return _with_exchange(context, layout, routed, reach.keys(ranks.rank), k, keys)


def _with_exchange(
    context: ContextParallel,
    layout: SequenceLayout,
    routed: NeighborGraph,
    reachable: Tensor,
    k: Tensor,
    keys: Tensor | None,
) -> ShardGraph:
    ranks = context.ranks
    batch, kv_heads = k.shape[:2]
    chunks = layout.chunks(ranks.rank)
    reached = reached_keys(routed, kv_heads)
    if routed.band is not None:  # arithmetic on positions: all keys around the rows of a piece
        for start, stop in chunks:
            reached[..., max(0, start - routed.band.before) : stop + routed.band.after] = True
    used = reached.flatten(0, 1).any(0)
    for start, stop in chunks:  # the table holds them side by side, as queries of the band stand among them
        used[start:stop] = True
    before = counted_before(used)
    wanted = [layout.by_rank(reached & reachable[:, None]).expand(-1, batch, kv_heads, -1).flatten(1)]
    shared = None
    if routed.summaries is not None:
        shared = SharedMembers.of(ranks.rank, routed.summaries, layout, batch, kv_heads)
        wanted.append(shared.wanted)
    masks = RowMasks.requested(ranks, *wanted)
    of_chunks = [before[start : start + 1] for start, _ in chunks]
    (total,), *found = on_host([before[-1:], *of_chunks, *(end for rows in masks for end in rows.ends)])
    offsets, ends = [place for (place,) in found[: len(chunks)]], found[len(chunks) :]
    table = KeyTable.of(before, total)
    heads = torch.arange(batch * kv_heads, device=k.device).view(batch, kv_heads, 1) * total
    places = layout.by_rank(before[:-1])[:, None, None] + heads  # [W, B, Hkv, N / W]
    exchange = RowExchange.of(ranks, masks[0], ends[:2], batch * kv_heads * total, places=places)
    return ShardGraph(
        context,
        routed,
        _pieces(chunks, offsets, table.graph(routed)),
        table,
        exchange,
        None if shared is None else shared.sums(ranks, masks[1], ends[2:]),
        None if keys is None else k,
        None if keys is None else keys[:, :, table.used],
    )


def _pieces(
    chunks: list[tuple[int, int]], offsets: list[int], graph: NeighborGraph
) -> list[tuple[slice, NeighborGraph]]:
    """Each run of consecutive queries of a graph over the keys of a table, where the first one stands at an offset."""
    pieces = []
    first = 0
    for (start, stop), offset in zip(chunks, offsets, strict=True):
        rows = slice(first, first + stop - start)
        first = rows.stop
        if rows.start == rows.stop:
            continue
        positions = torch.arange(offset, offset + stop - start, dtype=torch.int32, device=graph.device)[None]
        mask = replace(graph.mask.rows(rows), positions=positions, offset=offset)
        pieces.append((rows, graph.with_queries(mask, rows)))
    return pieces


def apply_shard_graph(
    graph: ShardGraph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    fp32_weights: bool = False,
    backend: str = "auto",
    dense: bool = False,
) -> Tensor:
    """Attention of this rank's queries over the keys and values of all ranks that they selected; every rank must call
    it, with its own part.

    Args:
        q: ``[B, H, N / W, D]``. k: ``[B, Hkv, N / W, D]``. v: ``[B, Hkv, N / W, Dv]``.
        scale, dropout_p, fp32_weights, backend, dense: as in `ssa_framework.ops.neighbor_attention`.

    Returns: ``[B, H, N / W, Dv]``, differentiable to q, k and v; gradients of rows return to the ranks that hold them,
        and are added there in the order of the ranks.

    Raises:
        GraphError: the graph was built for other shapes. DistributedError: a rank that did not answer.
    """
    check_tensors(q, k, v)
    if graph.local_shape != tuple(q.shape[:3]):
        raise GraphError(f"the graph was built for B, H, N / W = {graph.local_shape}, got {tuple(q.shape[:3])}")
    batch, kv_heads, _, dim = k.shape
    gathered = graph.gathered if graph.keys_of is k and graph.gathered is not None else None
    rows = torch.cat([k, v], dim=-1).flatten(0, 2)
    known = None if gathered is None else gathered.flatten(0, 2)
    table = fetch_rows(graph.exchange, rows, "keys and values" if known is None else "values", known)
    table = table.view(batch, kv_heads, len(graph.table), table.shape[1])
    table_k, table_v = table[..., :dim].contiguous(), table[..., dim:].contiguous()
    made = None if graph.sums is None else graph.sums.means(k, v)
    outs = []
    for piece_rows, piece in graph.pieces:
        if made is not None and piece.summaries is not None:
            summaries = replace(piece.summaries, members=piece.summaries.members[..., :0], made=made)
            piece = replace(piece, summaries=summaries)
        out, _ = neighbor_attention(
            q[:, :, piece_rows],
            table_k,
            table_v,
            piece,
            scale=scale,
            dropout_p=dropout_p,
            fp32_weights=fp32_weights,
            backend=backend,
            dense=dense,
        )
        outs.append(out)
    if not outs:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


_known: WeakKeyDictionary[Router, tuple[dict[str, Any], str]] = WeakKeyDictionary()
"""What the ranks compare of a configuration, and its digest, by its router: options may be long lists of edges."""


def _agree(
    context: ContextParallel,
    router: Router,
    config: SSAConfig,
    q: Tensor,
    k: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    """Raises `DistributedError`, on all ranks, where they do not do the same."""
    if router not in _known:
        facts = {f"config.{name}": as_json_value(value) for name, value in config.to_dict().items()}
        _known[router] = facts, _digest(facts).hex()
    of_config, digest_of_config = _known[router]
    facts = {"layout": context.layout, "causal": causal, "dtype": str(q.dtype)}
    facts |= {"local queries [B, H, N / W, D]": list(q.shape), "local keys [B, Hkv, N / W, D]": list(k.shape)}
    facts |= {"key_padding_mask": key_padding_mask is not None, "segment_ids": segment_ids is not None}
    digest = int.from_bytes(_digest(facts | {"config": digest_of_config})[:8], "little", signed=True)
    mine = torch.full((1,), digest, dtype=torch.int64, device=q.device)
    (digests,) = on_host([context.ranks.all_gather(mine, "digests of the configuration")])
    if len(set(digests)) > 1:
        require_same(of_config | facts, context.ranks, "attention call")


def _digest(facts: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def _gathered_metadata(
    layout: SequenceLayout,
    ranks: Ranks,
    q: Tensor,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Padding bool ``[B or 1, N]`` and documents ``[B or 1, N]`` of the whole sequence."""
    whole: list[Tensor | None] = []
    for name, x in (("key_padding_mask", key_padding_mask), ("segment_ids", segment_ids)):
        if x is None:
            whole.append(None)
            continue
        if not isinstance(x, Tensor):
            raise MaskError(f"{name} must be a tensor of this rank's tokens, got {type(x).__name__}")
        x = x[None] if x.dim() == 1 else x
        if x.dim() != 2 or x.shape[0] not in (1, q.shape[0]) or x.shape[1] != q.shape[2]:
            raise ShapeError(
                f"{name} must be that of this rank's tokens, [B, N / W] = [{q.shape[0]}, {q.shape[2]}], "
                f"got {list(x.shape)}"
            )
        if x.is_floating_point() or (name == "key_padding_mask") != (x.dtype == torch.bool):
            raise DtypeError(f"{name} must be {'bool' if name == 'key_padding_mask' else 'integers'}, got {x.dtype}")
        parts = ranks.all_gather(x, "masks").unbind(0)
        whole.append(layout.in_order(torch.cat(list(parts), dim=1), 1))
    return whole[0], whole[1]


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: ContextParallel,
    *,
    config: SSAConfig | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    mask_mod: MaskMod | None = None,
    source_inputs: Mapping[str, Any] | None = None,
    registry: SourceRegistry | None = None,
) -> Tensor:
    """`ssa_framework.sparse_attention` of a sequence that is spread over ranks; every rank passes its own part.

    Args:
        query: ``[B, H, N / W, D]``. key: ``[B, Hkv, N / W, D]``. value: ``[B, Hkv, N / W, Dv]``.
        context: how the sequence is spread; ``context.shard`` makes the parts.
        key_padding_mask: bool ``[B, N / W]``. segment_ids: integer ``[B, N / W]``.
        config, is_causal, scale, dropout_p, mask_mod, source_inputs, registry: as in `ssa_framework.build_graph` and
            `ssa_framework.sparse_attention`; positions are those of the whole sequence.

    Returns:
        ``[B, H, N / W, Dv]``: what attention over the whole sequence gives for this rank's queries.

    Raises:
        DistributedError: ranks that disagree (named on all of them), or a rank that did not answer.
        SSAError: everything that `ssa_framework.sparse_attention` raises.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.dtype == torch.float32 else x for x in (query, key, value))
    check_tensors(query, key, value)
    config = SSAConfig() if config is None else config
    causal = config.causal if is_causal is None else bool(is_causal)
    router = functional_router(config, query, key, causal, registry)
    graph = build_shard_graph(
        context,
        router,
        config,
        query,
        key,
        causal=causal,
        key_padding_mask=key_padding_mask,
        segment_ids=segment_ids,
        mask_mod=mask_mod,
        source_inputs=source_inputs,
    )
    return apply_shard_graph(
        graph,
        query,
        key,
        value,
        scale=scale,
        dropout_p=dropout_p,
        fp32_weights=config.fp32_attn_weights,
        backend=config.backend,
        dense=config.dense_below != 0,
    )


class ContextParallelAttention(SparseAttention):
    """`SparseAttention` of a sequence that is spread over ranks; made by `parallelize_context`.

    Inputs, masks and outputs are those of this rank's tokens. ``graph`` is a `ShardGraph`. There is neither
    cross-attention nor a cache, and no ``attention_mask`` but ``[B, N / W]``; use ``mask_mod`` for others.
    """

    context: ContextParallel

    def project(
        self, x: Tensor, key_value: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if positions is None and key_value is None:
            positions = self.context.positions(x.shape[1], x.device)
        return super().project(x, key_value, positions)

    def build_graph(  # type: ignore[override]  # a graph of this rank's rows
        self,
        q: Tensor,
        k: Tensor,
        *,
        cross: bool = False,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask_mod: MaskMod | None = None,
        source_inputs: Mapping[str, Any] | None = None,
    ) -> ShardGraph:
        if cross:
            raise ConfigError("context parallelism is for self-attention; call the layer without key_value")
        if attention_mask is not None:
            if attention_mask.dtype != torch.bool or attention_mask.dim() != 2:
                raise MaskError(
                    f"with context parallelism attention_mask is the padding of this rank's tokens, bool [B, N / W], "
                    f"got {attention_mask.dtype} {list(attention_mask.shape)}; use mask_mod for other masks"
                )
            key_padding_mask = attention_mask if key_padding_mask is None else attention_mask & key_padding_mask
        return build_shard_graph(
            self.context,
            self.router,
            self.config,
            q,
            k,
            causal=self.config.causal,
            key_padding_mask=key_padding_mask,
            segment_ids=segment_ids,
            mask_mod=mask_mod,
            source_inputs=source_inputs,
            first_head=self.first_head,
        )

    def apply_graph(self, q: Tensor, k: Tensor, v: Tensor, graph: Any) -> Tensor:
        if not isinstance(graph, ShardGraph):
            raise GraphError(f"a ShardGraph of this rank is needed, got {type(graph).__name__}")
        return apply_shard_graph(
            graph,
            q,
            k,
            v,
            dropout_p=self.config.dropout if self.training else 0.0,
            fp32_weights=self.config.fp32_attn_weights,
            backend=self.config.backend,
            dense=self.config.dense_below != 0,
        )

    def forward(self, *args: Any, cache: LayerCache | None = None, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        if cache is not None:
            raise CacheError("a sequence that is spread over ranks has no cache; decode with a model of one rank")
        return super().forward(*args, **kwargs)

    def _stats(self, graph: Any) -> dict[str, Any]:
        return graph_stats(graph.routed, self.config.head_dim)


def parallelize_context(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    *,
    layout: LayoutName | None = None,
) -> ContextParallel:
    """Let every `SparseAttention` of ``model``, in place, attend over the tokens of all ranks of ``mesh``.

    Each rank then passes its part of the sequence, which ``shard`` of the result makes. Parameters and names stay
    what they are. The gradients of the parameters are those of this rank's tokens: add them up over the group, as DDP
    and FSDP2 over a mesh that includes it do.

    Args:
        mesh: a mesh of one dimension (``mesh["cp"]``), a process group, or all processes.
        layout: ``"zigzag"`` where all layers are causal, else ``"contiguous"``, if left out.

    Raises:
        ConfigError: no `SparseAttention` in the model. DistributedError: ranks with different models, by name.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseAttention)]
    if not layers:
        raise ConfigError(f"there is no SparseAttention in {type(model).__name__}")
    if layout is None:
        layout = "zigzag" if all(layer.config.causal for layer in layers) else "contiguous"
    context = ContextParallel.over(mesh, layout=layout)
    check_agreement(model, context.ranks.group)
    for layer in layers:
        layer.__class__ = ContextParallelAttention  # keeps parameters, names and hooks, as fully_shard does
        cast(ContextParallelAttention, layer).context = context
    return context


__all__ = [
    "ContextParallel",
    "ContextParallelAttention",
    "ShardGraph",
    "context_parallel_attention",
    "parallelize_context",
]
