"""The ``lsh`` source: hash, sort, and give each query the slices of its buckets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssa_framework.plugin import (
    ConfigError,
    HashLevels,
    KeptHashes,
    LayerSpec,
    NeighborSource,
    Ranges,
    RoutingContext,
    lsh_slices,
    may_keep,
)
from ssa_plugins.lsh.directions import HashName, directions, most_bits
from ssa_plugins.lsh.kept_keys import KeptKeys


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

    In a cache, a key is hashed when it is appended, and a step looks only into the buckets of its query. Polytopes of
    another size are needed where the number of planes changes: then they hash all keys again.

    The planes are a buffer, ``planes`` ``[rounds, F, D]``: a state dict carries them.
    """

    rebuilds = False

    planes: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rounds: int = 8,
        probes: int = 0,
        max_planes: int = 12,
        hash: HashName = "hyperplane",
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
        self.hash: HashName = hash
        self.max_planes = min(max_planes, most_bits(hash, layer.head_dim))
        # the largest choice that goes by no plane; log2 may be rounded either way
        self._most_whole = max(layer.num_neighbors, math.ceil(self.per_bucket * 2**0.5) + 1)
        self._widest = rounds * (1 + probes)
        self._kept: tuple[tuple[object, ...], HashLevels] | None = None
        generator = torch.Generator().manual_seed(layer.seed if seed is None else seed)
        self.register_buffer("planes", directions(hash, rounds, self.max_planes, layer.head_dim, generator))

    def extra_repr(self) -> str:
        return f"hash={self.hash}, rounds={self.rounds}, probes={self.probes}, limit={self.limit}"

    def propose(self, ctx: RoutingContext) -> Ranges | list[Ranges]:
        if ctx.num_keys <= self.layer.num_neighbors:
            return Ranges.everything()  # all of them fit the budget; there is nothing to choose
        if isinstance(ctx.state, KeptKeys):
            kept = self._propose_kept(ctx.state, ctx)
            if kept is not None:
                return kept
        levels = self._levels(ctx)
        order, start, end = lsh_slices(
            ctx.q,
            ctx.shared_k,
            self.planes,
            levels,
            family=self.hash,
            probes=self.probes,
            center=self.center,
        )
        if self._widest * self.limit < self._most_whole:
            start, end = self._dealt_out(start, end, levels.queries)
        return Ranges(ctx.per_graph_head(order), start, end, limit=self.limit)

    def _dealt_out(self, start: Tensor, end: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Slices of which those of queries that get every key are no longer than the limit, so that none is cut."""
        functions, slices = start.shape[3:]
        each = -(-self._most_whole // (self.limit * functions))
        low, high = start[..., :1, :1], end.amax(dim=(3, 4), keepdim=True)
        part = torch.arange(functions * each, dtype=torch.int32, device=start.device).view(functions, each) * self.limit
        whole = (bits == 0)[:, None, :, None, None]
        missing = (0, max(each - slices, 0))
        start, end = (torch.nn.functional.pad(x, missing) for x in (start, end))
        part = torch.nn.functional.pad(part, (0, start.shape[4] - each), value=self._most_whole)
        begins, ends = torch.minimum(low + part, high), torch.minimum(low + part + self.limit, high)
        return torch.where(whole, begins, start), torch.where(whole, ends, end)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def init_state(self, ctx: RoutingContext) -> KeptKeys:
        batch, heads, _, dim = ctx.shared_k.shape
        hashes = KeptHashes(
            self.hash,
            self.max_planes,
            batch=batch,
            heads=heads,
            functions=self.rounds,
            dim=dim,
            center=self.center,
            device=ctx.device,
        )
        return KeptKeys(hashes, [-1] * batch)

    def append(self, state: KeptKeys, ctx: RoutingContext) -> KeptKeys:
        state.find_first(ctx.key_keep, ctx.first_new)
        bits = [-1 if first < 0 else self._bits_of(ctx.num_keys - first) for first in state.first]
        state.hashes.append(ctx.shared_k, self.planes, bits, ctx.key_keep)
        return state

    def crop(self, state: KeptKeys, length: int) -> KeptKeys:
        state.crop(length)
        return state

    def reorder(self, state: KeptKeys, index: Tensor) -> KeptKeys:
        state.reorder(index)
        return state

    def _propose_kept(self, state: KeptKeys, ctx: RoutingContext) -> list[Ranges] | None:
        """From the state; ``None`` where queries of one batch element go by different numbers of planes."""
        keys, first_query = ctx.num_keys, ctx.num_keys - ctx.num_queries
        bits = []
        for first in state.first:
            here = -1 if first < 0 else self._bits_of(keys - first)
            if here >= 0 and self._bits_of(max(first_query - first, 0) + 1) != here:
                return None
            bits.append(here)
        proposals = []
        if max(bits) > 0:
            order, start, end = state.hashes.slices(
                ctx.q, self.planes, bits, probes=self.probes, limit=self.limit, keep=ctx.key_keep
            )
            proposals.append(Ranges(order, start, end, limit=self.limit))
        if min(bits) <= 0:  # every key, or none
            whole = torch.tensor([b == 0 for b in bits], device=ctx.device)[:, None]
            end = torch.where(whole, ctx.positions + 1, 0)[:, None, :, None, None]
            proposals.append(Ranges(None, torch.zeros_like(end), end))
        return proposals

    # -- numbers of planes ---------------------------------------------------------------------------------------------

    def _bits(self, choice: Tensor) -> Tensor:
        """Planes of a query that may choose from so many keys; 0 where it gets all of them, -1 where there is none."""
        bits = num_planes(choice.clamp(min=1), self.per_bucket, self.max_planes).int()
        bits = torch.where(choice <= self.layer.num_neighbors, 0, bits)
        return torch.where(choice < 1, -1, bits)

    def _levels(self, ctx: RoutingContext) -> HashLevels:
        """Numbers of planes, which follow from lengths alone where there is neither padding nor packing: made once."""
        offset = ctx.mask.offset
        if ctx.key_keep is not None or ctx.segments is not None or offset is None or not may_keep(ctx.device):
            return self._new_levels(ctx)
        lengths = (offset, ctx.num_queries, ctx.num_keys, ctx.causal, ctx.device)
        kept = self._kept
        if kept is None or kept[0] != lengths:  # another thread may replace what is kept at any moment
            kept = self._kept = lengths, self._new_levels(ctx)
        return kept[1]

    def _new_levels(self, ctx: RoutingContext) -> HashLevels:
        # Queries that use different numbers of planes need different orders. An order holds only the keys that its
        # queries may see, and those double with every plane, so that all orders together hold about 2 M keys.
        first, last = ctx.span
        queries = self._bits(last - first + 1)
        fewest, most = queries.amin(), queries.amax()
        keys = torch.arange(ctx.num_keys, dtype=torch.int32, device=ctx.device)[None]
        low, high = ctx.key_bounds
        rank, size = keys - low, high - low + 1
        of_document = self._bits(size).expand(-1, ctx.num_keys)
        of_first = self._bits(rank + 1) if ctx.causal else of_document
        of_first, of_document = torch.maximum(of_first, fewest), torch.minimum(of_document, most)
        if ctx.key_keep is not None:
            of_document = torch.where(ctx.key_keep, of_document, -2)  # below every first: in no order
        documents = ctx.documents
        return HashLevels(
            queries=queries,
            first=of_first,
            last=of_document,
            most=self._bits_of(ctx.num_keys),
            query_documents=None if documents is None else documents[0],
            key_documents=None if documents is None else documents[1],
            num_documents=1 if documents is None else documents[2],
            key_keep=ctx.key_keep,
            causal=ctx.causal,
            longest=self._longest(ctx),
        )

    def _bits_of(self, choice: int) -> int:
        """`_bits` of one query, on the host."""
        if choice <= self.layer.num_neighbors:
            return 0 if choice > 0 else -1
        return min(max(round(math.log2(choice / self.per_bucket)), 0), self.max_planes)

    def _longest(self, ctx: RoutingContext) -> int:
        """No more keys than this stand in all orders together."""
        keys, most = ctx.num_keys, self._bits_of(ctx.num_keys)
        if not ctx.causal:
            return keys
        if ctx.documents is not None or ctx.key_keep is not None:
            return (most + 1) * keys
        # a key stands in the orders for at least the bits of its own position; log2 may be rounded either way
        reach = (self.per_bucket * 2 ** (bits + 0.5) + 1 for bits in range(most))
        return sum(min(keys, max(math.ceil(r), self.layer.num_neighbors)) for r in reach) + keys


def _check(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"lsh: {name} must be an integer in [{low}, {high}], got {value!r}")
