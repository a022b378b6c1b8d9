"""The ``lsh`` source: hash, sort, and give each query the slices of its buckets."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ssa_framework.plugin import ConfigError, LayerSpec, NeighborSource, Ranges, RoutingContext
from ssa_plugins.lsh.centering import center as center_keys
from ssa_plugins.lsh.documents import Documents
from ssa_plugins.lsh.hashing import CrossPolytope, HashFamily, Hyperplane


def num_planes(keys: int, candidates: int, max_planes: int, min_planes: int = 1) -> int:
    """Adaptive number of hash planes ``clamp(round(log2(M / C)), min, max)``: a bucket then holds about C keys."""
    if keys <= 0 or candidates <= 0:
        return min_planes
    return max(min_planes, min(max_planes, round(math.log2(keys / candidates))))


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
        candidates: keys per round and query, about; ``num_neighbors`` if left out.
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
        candidates = layer.num_neighbors if candidates is None else candidates
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
        keys = self._project(self._prepared_keys(ctx))  # [B, Hkv, M, S, F]
        queries = self._project(ctx.q.float())  # [B, G, N, S, F]
        bits = self._bits_per_query(ctx)
        shape = (ctx.batch, ctx.graph_heads, ctx.num_queries, self.rounds, 1 + self.probes)
        start = torch.zeros(shape, dtype=torch.int64, device=ctx.device)
        end = torch.zeros(shape, dtype=torch.int64, device=ctx.device)
        orders: list[Tensor] = []
        # Queries that use different numbers of planes need different orders. An order holds only the keys that its
        # queries may see, and those double with every plane, so that all orders together hold about 2 M keys.
        for level in bits.unique().tolist():
            rows = (bits == level).any(dim=0).nonzero()[:, 0]
            sorted_buckets, order = self._sort(ctx, documents, keys, bits, level)
            first, last = self._find(ctx, documents, queries[:, :, rows], rows, sorted_buckets, level)
            here = (bits[:, rows] == level)[:, None, :, None, None]
            offset = sum(o.shape[-1] for o in orders)
            start[:, :, rows] = torch.where(here, first + offset, start[:, :, rows])
            end[:, :, rows] = torch.where(here, last + offset, end[:, :, rows])
            orders.append(order)
        order = ctx.per_graph_head(torch.cat(orders, dim=-1))
        return Ranges(order, start.to(torch.int32), end.to(torch.int32), limit=self.limit)

    def _prepared_keys(self, ctx: RoutingContext) -> Tensor:
        keys = ctx.shared_k.float()
        if ctx.key_keep is not None:
            keys = keys.masked_fill(~ctx.key_keep[:, None, :, None], 0.0)
        if not self.center:
            return keys
        return center_keys(keys, ctx.key_keep, None if ctx.segments is None else ctx.segments[1], ctx.causal)

    def _project(self, x: Tensor) -> Tensor:
        return torch.einsum("bhnd,rfd->bhnrf", x, self.planes.float())

    def _bits_per_query(self, ctx: RoutingContext) -> Tensor:
        """Planes of every query, int64 ``[B or 1, N]``; 0 where the query gets every key it may choose."""
        first, last = ctx.span
        choice = (last - first + 1).clamp(min=1)
        bits = torch.round(torch.log2(choice.double() / self.per_bucket)).clamp(0, self.max_planes).long()
        return torch.where(choice <= self.layer.num_neighbors, 0, bits)

    def _sort(
        self, ctx: RoutingContext, documents: Documents, keys: Tensor, bits: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        """Keys that queries of a level may see, by document, bucket and position.

        Returns: sort values int64 ``[B, Hkv, S, L]`` and key positions int32 of the same shape.
        """
        first, last = ctx.span
        reach = int(torch.where(bits == level, last - first, -1).max()) + 1
        visible = documents.key_rank < reach if ctx.causal else documents.key_rank >= 0
        if ctx.key_keep is not None:
            visible = visible & ctx.key_keep
        buckets = self.family.buckets(keys, level) if level else keys.new_zeros(keys.shape[:-1]).long()
        values = buckets.movedim(-1, 2) + (documents.of_keys << level)[:, None, None, :]
        values = torch.where(visible[:, None, None, :], values, torch.iinfo(torch.int64).max)
        values, order = values.sort(dim=-1, stable=True)
        longest = int(visible.sum(dim=1).max())
        return values[..., :longest].contiguous(), order[..., :longest].to(torch.int32)

    def _find(
        self,
        ctx: RoutingContext,
        documents: Documents,
        queries: Tensor,
        rows: Tensor,
        sorted_values: Tensor,
        level: int,
    ) -> tuple[Tensor, Tensor]:
        """First and one past the last place of each query's buckets, int64 ``[B, G, rows, S, 1 + probes]``."""
        document = documents.of_queries[:, rows][:, None, :, None, None]
        if level == 0:  # every key of the document, dealt out evenly to all slices
            value = document.expand(ctx.batch, ctx.graph_heads, -1, self.rounds, 1)
            start, end = self._search(ctx, sorted_values, value), self._search(ctx, sorted_values, value + 1)
            slices = self.rounds * (1 + self.probes)
            part = torch.arange(slices, device=ctx.device).view(self.rounds, 1 + self.probes)
            width = -((start - end) // slices)
            return torch.minimum(start + part * width, end), torch.minimum(start + (part + 1) * width, end)
        buckets = self.family.probes(queries, level, self.probes)
        value = buckets.clamp(min=0) + (document << level)
        start, end = self._search(ctx, sorted_values, value), self._search(ctx, sorted_values, value + 1)
        return start, torch.where(buckets < 0, start, end)

    def _search(self, ctx: RoutingContext, sorted_values: Tensor, values: Tensor) -> Tensor:
        """First place in ``sorted_values [B, Hkv, S, L]`` not below ``values [B, G, n, S, P]``."""
        by_round = values.movedim(3, 2).flatten(3).contiguous()  # [B, G, S, n·P]
        found = torch.searchsorted(ctx.per_graph_head(sorted_values), by_round)
        return found.unflatten(3, (values.shape[2], values.shape[4])).movedim(2, 3)


def _check(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"lsh: {name} must be an integer in [{low}, {high}], got {value!r}")
