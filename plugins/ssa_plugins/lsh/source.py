"""The ``lsh`` source: hash, sort, and give each query the slices of its buckets."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ssa_framework.plugin import ConfigError, LayerSpec, NeighborSource, Ranges, RoutingContext, group_keys
from ssa_plugins.lsh.centering import center as center_keys
from ssa_plugins.lsh.documents import Documents
from ssa_plugins.lsh.hashing import CrossPolytope, HashFamily, Hyperplane


def num_planes(keys: Tensor, per_bucket: float, max_planes: int) -> Tensor:
    """Adaptive number of hash planes, ``clamp(round(log2(M / C)), 0, max)``: a bucket then holds about C keys.

    Args:
        keys: how many keys there are to choose from, integers of any shape, at least 1. per_bucket: C.

    Returns: int64 of the same shape.
    """
    return torch.round(torch.log2(keys.double() / per_bucket)).clamp(0, max_planes).long()


class LSH(NeighborSource):
    """Keys that share a hash bucket with the query in at least one of several rounds.

    The number of planes follows the number of keys that a query may choose from (its document and, if causal, the
    keys before it), so that a round proposes about ``candidates`` keys to every query, early or late; a query whose
    choice fits the budget gets all of it. Nothing is computed from keys after the query.

    Args:
        rounds: independent hash functions.
        probes: further buckets that a query looks into, per round, the most promising first; buckets are made
            smaller in turn, so that a round still proposes about ``candidates`` keys.
        max_planes: most bits of a bucket number.
        hash: ``"hyperplane"`` (signs of projections) or ``"cross_polytope"`` (largest coordinate of a rotation),
            which finds more of the best keys for the same number of scored ones.
        center: hash keys relative to their mean (of the past, if causal).
        candidates: keys per round and query, about; ``num_neighbors / 2`` if left out.
        limit: most keys that one query takes from one bucket, the nearest ones in position;
            ``2 · candidates / (1 + probes)`` if left out. Buckets of real keys are of very different sizes.
        seed: of the planes; the layer's if left out.

    The planes are a buffer, ``planes`` ``[rounds, F, D]``: a state dict carries them.
    """

    planes: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rounds: int = 8,
        probes: int = 0,
        max_planes: int = 12,
        hash: Literal["hyperplane", "cross_polytope"] = "hyperplane",
        center: bool = True,
        candidates: int | None = None,
        limit: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(layer)
        candidates = max(1, layer.num_neighbors // 2) if candidates is None else candidates
        if hash not in ("hyperplane", "cross_polytope"):
            raise ConfigError(f"lsh: hash must be 'hyperplane' or 'cross_polytope', got {hash!r}")
        _check("rounds", rounds, 1, 64)
        _check("probes", probes, 0, 1024)
        _check("max_planes", max_planes, 1, 16)
        _check("candidates", candidates, 1, 2**20)
        _check("limit", 1 if limit is None else limit, 1, 2**20)
        _check("seed", 0 if seed is None else seed, 0, 2**63 - 1)
        self.rounds = rounds
        self.probes = probes
        self.center = center
        self.per_bucket = candidates / (1 + probes)
        self.limit = math.ceil(2 * self.per_bucket) if limit is None else limit
        self.hash = hash
        if hash == "hyperplane":
            self.max_planes = max_planes
            self.family: HashFamily = Hyperplane(max_planes)
        else:
            self.max_planes = min(max_planes, 2 * (1 + int(math.log2(layer.head_dim))))
            self.family = CrossPolytope(self.max_planes, layer.head_dim)
        generator = torch.Generator().manual_seed(layer.seed if seed is None else seed)
        self.register_buffer("planes", self.family.weight(rounds, layer.head_dim, generator))

    def extra_repr(self) -> str:
        return f"hash={self.hash}, rounds={self.rounds}, probes={self.probes}, limit={self.limit}"

    def propose(self, ctx: RoutingContext) -> Ranges:
        if ctx.num_keys <= self.layer.num_neighbors:
            return Ranges.everything()  # all of them fit the budget; there is nothing to choose
        if not bool(torch.isfinite(self.planes).all()):
            raise ConfigError("lsh: hash planes are not finite; the buffer 'planes' was overwritten with NaN or inf")
        documents = Documents.of(ctx)
        bits = self._bits_per_query(ctx)
        planes = self.planes.float()[:, self.family.rows(int(bits.max()))]
        keys = _project(self._prepared_keys(ctx), planes)  # [B, Hkv, M, S, F]
        queries = _project(ctx.q.float(), planes)  # [B, G, N, S, F]
        shape = (ctx.batch, ctx.graph_heads, ctx.num_queries, self.rounds, 1 + self.probes)
        start = torch.zeros(shape, dtype=torch.int32, device=ctx.device)
        end = torch.zeros(shape, dtype=torch.int32, device=ctx.device)
        orders: list[Tensor] = []
        # Queries that use different numbers of planes need different orders. An order holds only the keys that its
        # queries may see, and those double with every plane, so that all orders together hold about 2 M keys.
        for level in bits.unique().tolist():
            rows = (bits == level).any(dim=0).nonzero()[:, 0]
            visible = self._visible_keys(ctx, documents, bits, level)
            order, first, last = self._slices(documents, keys, queries[:, :, rows], rows, visible, level)
            here = (bits[:, rows] == level)[:, None, :, None, None]
            offset = sum(o.shape[-1] for o in orders)
            start[:, :, rows] = torch.where(here, first + offset, start[:, :, rows])
            end[:, :, rows] = torch.where(here, last + offset, end[:, :, rows])
            orders.append(order)
        return Ranges(ctx.per_graph_head(torch.cat(orders, dim=-1)), start, end, limit=self.limit)

    def _prepared_keys(self, ctx: RoutingContext) -> Tensor:
        keys = ctx.shared_k.float()
        if ctx.key_keep is not None:
            keys = keys.masked_fill(~ctx.key_keep[:, None, :, None], 0.0)
        if not self.center:
            return keys
        return center_keys(keys, ctx.key_keep, None if ctx.segments is None else ctx.segments[1], ctx.causal)

    def _bits_per_query(self, ctx: RoutingContext) -> Tensor:
        """Planes of every query, int64 ``[B or 1, N]``; 0 where the query gets every key it may choose."""
        first, last = ctx.span
        choice = (last - first + 1).clamp(min=1)
        return torch.where(choice <= self.layer.num_neighbors, 0, num_planes(choice, self.per_bucket, self.max_planes))

    def _visible_keys(self, ctx: RoutingContext, documents: Documents, bits: Tensor, level: int) -> Tensor:
        """Keys that some query of a level may see, bool ``[B or 1, M]``."""
        first, last = ctx.span
        reach = int(torch.where(bits == level, last - first, -1).max()) + 1
        visible = documents.key_rank < reach if ctx.causal else documents.key_rank >= 0
        return visible if ctx.key_keep is None else visible & ctx.key_keep

    def _slices(
        self, documents: Documents, keys: Tensor, queries: Tensor, rows: Tensor, visible: Tensor, level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Order of the visible keys by document and bucket, and the bounds of the buckets of some queries.

        Returns: int32 ``[B, Hkv, S, L]`` and twice ``[B, G, rows, S, 1 + probes]``.
        """
        of_queries = documents.of_queries[:, rows][:, None, :, None, None] << level
        of_keys = (documents.of_keys << level)[:, None, None, :]
        if level:
            key_buckets = self.family.buckets(keys, level).movedim(-1, 2) + of_keys
            probes = self.family.probes(queries, level, self.probes)
            query_buckets = torch.where(probes < 0, -1, probes + of_queries)
        else:  # every key of the document
            key_buckets = of_keys.expand(keys.shape[0], keys.shape[1], self.rounds, -1)
            query_buckets = of_queries.expand(queries.shape[0], queries.shape[1], -1, self.rounds, 1)
        key_buckets = torch.where(visible[:, None, None, :], key_buckets, -1)
        order, start, end = group_keys(key_buckets, query_buckets, documents.count << level)
        if level:
            return order, start, end
        # dealt out evenly to all slices, so that none repeats another and none is cut by the limit
        part = torch.arange(self.rounds * (1 + self.probes), device=start.device, dtype=torch.int32)
        part = part.view(self.rounds, 1 + self.probes)
        width = -((start - end) // part.numel())
        return order, torch.minimum(start + part * width, end), torch.minimum(start + (part + 1) * width, end)


def _project(x: Tensor, planes: Tensor) -> Tensor:
    """``[B, H, N, D]`` by ``[rounds, F, D]`` → ``[B, H, N, rounds, F]``."""
    return (x @ planes.flatten(0, 1).T).unflatten(-1, planes.shape[:2])


def _check(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"lsh: {name} must be an integer in [{low}, {high}], got {value!r}")
