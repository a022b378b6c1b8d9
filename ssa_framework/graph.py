"""`NeighborGraph`: which keys each query attends to; no values, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssa_framework.errors import DtypeError, GraphError
from ssa_framework.masks import EdgeMask, make_edge_mask
from ssa_framework.ops.key_lists import among, cat_keys, expand_slices, in_band, in_span, jaccard, mark, sort_unique
from ssa_framework.proposals import Band, Ranges, Spans, Summaries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE_MASK_LIMIT = 2**31
"""Most elements that `NeighborGraph.to_dense_mask` makes; it is meant for small sizes."""
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class SourceRecord:
    """What one source brought into a graph.

    Attributes:
        band, columns: its fixed pattern, if it proposed one.
        spans, slices, summaries: whether those of the graph are its.
        listed: how many listed edges it filled, summed over batch, graph heads and queries (0-dim int64), or ``None``
            if it proposed no list. An edge that several sources propose counts for the first of them.
        keys_scored: how many distinct query-key pairs were scored for it (0-dim int64).
    """

    band: Band | None = None
    columns: Tensor | None = None
    spans: bool = False
    slices: bool = False
    summaries: bool = False
    listed: Tensor | None = None
    keys_scored: Tensor | None = None


@dataclass(frozen=True)
class NeighborGraph:
    """The neighbors of every query, as disjoint parts, each in its cheapest form.

    The edges are the union of ``spans``, ``band``, ``columns`` and ``slices`` where ``mask`` allows them, and of
    ``neighbors``, which the router has already cleaned; a key that several of the first four reach counts for the
    first of them. Beside its edges a query attends to ``summaries`` of keys that it does not look at. `validate`
    checks all of it.

    Attributes:
        batch: B. num_heads: H, query heads. graph_heads: G, the heads of the graph (H, or one per KV head).
        num_keys: M.
        mask: what is allowed; also holds the query positions.
        band: every query at position ``p`` attends ``[p - before, p + after]``; ``after`` is 0 if causal.
        columns: int32 ``[C]``, ascending, unique: keys that every query attends (those inside the band count there).
        neighbors: int32 ``[B or 1, G or 1, N, K]``, ascending in each row, ``-1`` = empty at the end; never a key that
            the band or a column covers, never twice the same, never one that ``mask`` forbids. There are no spans and
            slices beside lists.
        spans: an interval of keys per query.
        slices: an order of the keys ``[B or 1, G or 1, 1, L]`` and disjoint slices of it for every query, each attended
            whole; ``order``, ``start`` and ``end`` are given.
        summaries: pseudo-keys, made of keys and values when the graph is attended to. Keys that padding or a column
            takes belong to none.
        sources: what each source brought, by name.
    """

    batch: int
    num_heads: int
    graph_heads: int
    num_keys: int
    mask: EdgeMask
    band: Band | None = None
    columns: Tensor | None = None
    neighbors: Tensor | None = None
    spans: Spans | None = None
    slices: Ranges | None = None
    summaries: Summaries | None = None
    sources: Mapping[str, SourceRecord] = field(default_factory=dict)

    # -- shape ---------------------------------------------------------------------------------------------------

    @property
    def num_queries(self) -> int:
        return self.mask.positions.shape[1]

    @property
    def device(self) -> torch.device:
        return self.mask.positions.device

    @property
    def causal(self) -> bool:
        return self.mask.causal

    @cached_property
    def slots(self) -> int:
        """Neighbor slots per query: band, columns and list, and the longest span and slices."""
        band = self.band.width if self.band is not None else 0
        columns = self.columns.numel() if self.columns is not None else 0
        listed = self.neighbors.shape[-1] if self.neighbors is not None else 0
        span = sliced = 0
        if self.spans is not None and self.spans.start.numel():
            span = int((self.spans.end - self.spans.start).max())
        if self.slices is not None:
            _, start, end = self._slice_tensors(self.slices)
            sliced = int((end.sum(-1) - start.sum(-1)).max()) if start.numel() else 0
        return min(band, self.num_keys) + columns + listed + span + sliced

    @property
    def is_full(self) -> bool:
        """Whether every allowed key is a neighbor of every query."""
        if self.num_keys == 0 or self.num_queries == 0:
            return True
        if self.band is None:
            return False
        if self.mask.offset is not None:
            first, last = self.mask.offset, self.mask.offset + self.num_queries - 1
        else:
            first, last = int(self.mask.positions.min()), int(self.mask.positions.max())
        return self.band.before >= last and (self.causal or self.band.after >= self.num_keys - 1 - first)

    # -- construction --------------------------------------------------------------------------------------------

    @classmethod
    def from_lists(
        cls,
        neighbors: Tensor,
        *,
        num_keys: int,
        batch: int | None = None,
        num_heads: int | None = None,
        valid: Tensor | None = None,
        causal: bool = False,
        **masks: Any,
    ) -> NeighborGraph:
        """A graph from explicit lists, cleaned and checked.

        Args:
            neighbors: integer ``[B or 1, G or 1, N, K]``, any order; ``-1`` or ``valid == False`` = empty.
            num_keys: M. batch, num_heads: B and H where ``neighbors`` broadcasts over them.
            valid: bool, same shape as ``neighbors``.
            causal, masks: as in `build_graph` (``attn_mask``, ``key_padding_mask``, ``segment_ids``, ``mask_mod``,
                ``query_positions``); forbidden neighbors are dropped.

        Raises:
            GraphError: wrong rank, or keys outside ``[0, num_keys)``. DtypeError: not integers.
        """
        if neighbors.dim() != 4:
            raise GraphError(f"neighbors must have shape [B or 1, G or 1, N, K], got {list(neighbors.shape)}")
        if neighbors.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"neighbors must be int32 or int64, got {neighbors.dtype}")
        if valid is not None:
            if valid.shape != neighbors.shape or valid.dtype != torch.bool:
                raise GraphError(f"valid must be bool {list(neighbors.shape)}, got {valid.dtype} {list(valid.shape)}")
            neighbors = neighbors.masked_fill(~valid, -1)
        if neighbors.numel() and not (int(neighbors.min()) >= -1 and int(neighbors.max()) < num_keys):
            raise GraphError(
                f"neighbors must lie in [0, {num_keys}) or be -1, got [{int(neighbors.min())}, {int(neighbors.max())}]"
            )
        batch = neighbors.shape[0] if batch is None else batch
        heads = neighbors.shape[1] if num_heads is None else num_heads
        graph_heads = heads if neighbors.shape[1] == 1 else neighbors.shape[1]
        if heads % graph_heads or neighbors.shape[0] not in (1, batch):
            raise GraphError(f"neighbors {list(neighbors.shape)} do not broadcast to B = {batch}, H = {heads}")
        mask = make_edge_mask(
            batch=batch,
            heads=heads,
            queries=neighbors.shape[2],
            keys=num_keys,
            device=neighbors.device,
            causal=causal,
            **masks,
        )
        graph = cls(batch, heads, graph_heads, num_keys, mask)
        keys = graph._drop_forbidden(neighbors.to(torch.int32))
        listed = sort_unique(keys)
        return replace(graph, neighbors=listed, sources={"lists": SourceRecord(listed=(listed >= 0).sum())})

    # -- edges ---------------------------------------------------------------------------------------------------

    def _drop_forbidden(self, keys: Tensor) -> Tensor:
        """Put -1 where ``keys`` ``[B or 1, G or 1, T, C]`` are forbidden; T must be all queries of this view."""
        if keys.numel() == 0:
            return keys
        if self.mask.has_explicit:  # a mask that looks at batch or head needs the full dimensions
            batch = self.batch if self.mask.mask_mod is not None else keys.shape[0]
            heads = self.graph_heads if self.mask.per_head else keys.shape[1]
            keys = keys.expand(batch, heads, -1, -1)
        allowed = (keys >= 0) & self.mask.allowed(keys.clamp(min=0), self.num_heads)
        return torch.where(allowed, keys, -1)

    def _row_view(self, rows: slice) -> NeighborGraph:
        return self.with_queries(self.mask.rows(rows), rows)

    def with_queries(self, mask: EdgeMask, rows: slice | Tensor) -> NeighborGraph:
        """The graph of some queries: those of ``rows``, whose mask is ``mask``; a view where ``rows`` is a slice."""
        spans, slices, summaries = self.spans, self.slices, self.summaries
        if spans is not None:
            spans = Spans(spans.start[:, rows], spans.end[:, rows])
        if slices is not None and slices.start is not None and slices.end is not None:
            slices = replace(slices, start=slices.start[:, :, rows], end=slices.end[:, :, rows])
        if summaries is not None:
            opened = None if summaries.opened is None else summaries.opened[:, :, rows]
            summaries = replace(summaries, first=summaries.first[:, rows], stop=summaries.stop[:, rows], opened=opened)
        neighbors = self.neighbors[:, :, rows] if self.neighbors is not None else None
        return replace(self, mask=mask, neighbors=neighbors, spans=spans, slices=slices, summaries=summaries)

    def pick(self, rows: Tensor) -> NeighborGraph:
        """The graph of the queries ``rows``, integer ``[T]``, in that order. What the sources brought is a sum over all
        queries, so it is left out."""
        mask = self.mask
        attn_mask, mask_mod = mask.attn_mask, mask.mask_mod
        if attn_mask is not None and attn_mask.shape[2] > 1:
            attn_mask = attn_mask[:, :, rows]
        row_offset = mask.row_offset
        picked = EdgeMask(
            causal=mask.causal,
            positions=mask.positions[:, rows],
            offset=None,
            key_keep=mask.key_keep,
            query_segments=None if mask.query_segments is None else mask.query_segments[:, rows],
            key_segments=mask.key_segments,
            attn_mask=attn_mask,
            mask_mod=None if mask_mod is None else lambda b, h, i, m: mask_mod(b, h, rows[i] + row_offset, m),
            batch_offset=mask.batch_offset,
        )
        return replace(self.with_queries(picked, rows), sources={})

    def row_chunks(self, elements_per_edge: int = 1) -> Iterator[tuple[slice, NeighborGraph]]:
        """The graph in pieces of consecutive queries, so that what is made of a piece stays small."""
        per_row = max(1, self.batch * self.graph_heads * self.slots * elements_per_edge)
        step = max(1, _CHUNK_ELEMENTS // per_row)
        for start in range(0, self.num_queries, step):
            rows = slice(start, min(start + step, self.num_queries))
            yield rows, self._row_view(rows)

    def span_keys(self) -> Tensor:
        """Keys of the spans ``[B or 1, 1, N, W]``, ascending, -1 = empty. Masks are not applied here and below."""
        if self.spans is None or not self.spans.start.numel():
            return self._no_keys()
        start, end = self.spans.start[:, None, :, None], self.spans.end[:, None, :, None]
        keys = start + torch.arange(int((end - start).max()), dtype=torch.int32, device=self.device)
        return torch.where(keys < end, keys, -1)

    def band_keys(self) -> Tensor:
        """Keys of the band outside the span ``[B or 1, 1, N, W]``, ascending, -1 where outside the sequence."""
        if self.band is None:
            return self._no_keys()
        positions = self.mask.positions[:, None, :, None]
        low, high = -self.band.before, self.band.after
        if self.num_queries:  # offsets that reach no key of any query are not worth a slot
            low = max(low, -int(positions.max()))
            high = min(high, self.num_keys - 1 - int(positions.min()))
        offsets = torch.arange(low, max(high, low - 1) + 1, dtype=torch.int32, device=self.device)
        keys = positions + offsets
        inside = (keys >= 0) & (keys < self.num_keys)
        if self.spans is not None:
            inside = inside & ~in_span(keys, self.spans)
        return torch.where(inside, keys, -1)

    def column_keys(self) -> Tensor:
        """Keys of the columns that neither band nor span covers ``[B or 1, 1, N, C]``, -1 where they do."""
        if self.columns is None:
            return self._no_keys()
        keys = self.columns.view(1, 1, 1, -1).expand(-1, -1, self.num_queries, -1)
        return torch.where(self._in_band_or_span(keys), -1, keys)

    def slice_keys(self) -> Tensor:
        """Keys of the slices that no other part covers ``[B or 1, G or 1, N, C]``, -1 = empty, anywhere."""
        if self.slices is None:
            return self._no_keys()
        keys = expand_slices(*self._slice_tensors(self.slices))
        covered = self._in_band_or_span(keys)
        if self.columns is not None:
            covered = covered | among(keys.clamp(min=0), self.columns, self.num_keys)
        return torch.where(covered, -1, keys)

    def part_keys(self) -> dict[str, Tensor]:
        """The neighbors by part, in padded lists ``[B or 1, G or 1, N, E]``, masks applied, each key once."""
        fixed = {"span": self.span_keys(), "band": self.band_keys(), "columns": self.column_keys()}
        parts = {name: self._drop_forbidden(keys) for name, keys in fixed.items()}
        parts["slices"] = self._drop_forbidden(self.slice_keys())
        parts["listed"] = self._no_keys() if self.neighbors is None else self.neighbors
        return parts

    def edge_keys(self) -> Tensor:
        """All neighbors in one padded list ``[B or 1, G or 1, N, E]``, masks applied, each key once."""
        return cat_keys(list(self.part_keys().values()))

    def _no_keys(self) -> Tensor:
        return torch.empty((1, 1, self.num_queries, 0), dtype=torch.int32, device=self.device)

    def _in_band_or_span(self, keys: Tensor) -> Tensor:
        covered = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=self.device)
        if self.band is not None:
            covered = covered | in_band(keys, self.mask.positions, self.band)
        if self.spans is not None:
            covered = covered | in_span(keys, self.spans)
        return covered

    @staticmethod
    def _slice_tensors(slices: Ranges) -> tuple[Tensor, Tensor, Tensor]:
        """Order ``[B or 1, G or 1, L]``, starts and ends ``[B or 1, G or 1, N, P]``."""
        if slices.order is None or slices.start is None or slices.end is None:
            raise GraphError("slices of a graph must have an order, starts and ends")
        return slices.order[:, :, 0], slices.start[:, :, :, 0], slices.end[:, :, :, 0]

    # -- summaries -----------------------------------------------------------------------------------------------

    def summary_mask(self) -> Tensor:
        """bool ``[B, H, N, C]``, True = attended summary. For small sizes.

        Raises:
            GraphError: more than `DENSE_MASK_LIMIT` elements.
        """
        if self.summaries is None:
            shape = (self.batch, self.num_heads, self.num_queries, 0)
            return torch.zeros(shape, dtype=torch.bool, device=self.device)
        some, group = self.summaries, self.num_heads // self.graph_heads
        if self.batch * self.num_heads * self.num_queries * some.count > DENSE_MASK_LIMIT:
            raise GraphError(f"a dense mask of {some.count} summaries for every query is too large")
        number = torch.arange(some.count, dtype=torch.int32, device=self.device)[:, None]
        inside = (number >= some.first[:, :, None]) & (number < some.stop[:, :, None])  # [B or 1, N, C, R]
        filled = self._filled_summaries()
        seen = (inside[:, None] & filled.mT[:, :, None]).any(-1)
        seen = seen.repeat_interleave(self.num_heads // seen.shape[1], dim=1)
        if some.opened is not None:
            opened = mark(some.opened, some.count)
            seen = seen & ~(opened.repeat_interleave(group, dim=1) if opened.shape[1] > 1 else opened)
        return seen.expand(self.batch, self.num_heads, -1, -1)

    def summaries_per_query(self) -> Tensor:
        """How many summaries each query attends, int64 ``[B, G, N]``."""
        shape = (self.batch, self.graph_heads, self.num_queries)
        total = torch.zeros(shape, dtype=torch.int64, device=self.device)
        if self.summaries is None:
            return total
        some = self.summaries
        filled = self._filled_summaries().repeat_interleave(self.graph_heads // some.members.shape[1], 1)
        filled = filled.expand(self.batch, -1, -1, -1)
        for level in range(some.levels):
            in_level = filled[:, :, level]
            before = torch.nn.functional.pad(in_level.long().cumsum(-1), (1, 0))
            first, stop = (x[:, None, :, level].expand(shape).long() for x in (some.first, some.stop))
            total += before.gather(2, stop) - before.gather(2, first)
            if some.opened is not None:
                opened = some.opened.expand(*shape[:2], -1, -1)
                inside = (opened >= first[..., None]) & (opened < stop[..., None])
                of_opened = in_level.gather(2, opened.clamp(min=0).flatten(2).long()).view(opened.shape)
                total -= (inside & of_opened).sum(-1)
        return total

    def _filled_summaries(self) -> Tensor:
        """Which summaries have keys of each level, bool ``[B or 1, Hkv or 1, R, C]``."""
        assert self.summaries is not None
        if self.summaries.made is not None:
            filled = self.summaries.made[2] > float("-inf")
            return filled[:, :, None].expand(-1, -1, self.summaries.levels, -1)
        return mark(self.summaries.members, self.summaries.count)

    # -- views ---------------------------------------------------------------------------------------------------

    def as_lists(self) -> tuple[Tensor, Tensor]:
        """``(neighbors, valid)``, int32 and bool ``[B, G, N, E]``: every edge in one padded list, ``-1`` = empty."""
        keys = self.edge_keys().expand(self.batch, self.graph_heads, -1, -1)
        return keys, keys >= 0

    def degree(self) -> Tensor:
        """Neighbors per query, int64 ``[B, G, N]``."""
        out = torch.zeros((self.batch, self.graph_heads, self.num_queries), dtype=torch.int64, device=self.device)
        for rows, piece in self.row_chunks():
            out[:, :, rows] = (piece.edge_keys() >= 0).sum(-1)
        return out

    @property
    def padding_fraction(self) -> float:
        """Share of the slots that hold no neighbor."""
        total = self.batch * self.graph_heads * self.num_queries * self.slots
        return 1.0 - float(self.degree().sum()) / total if total else 0.0

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """``(indptr, indices)``: int64 ``[B·G·N + 1]`` and int32 ``[edges]``, keys ascending in each row."""
        indptr = torch.zeros(
            self.batch * self.graph_heads * self.num_queries + 1, dtype=torch.int64, device=self.device
        )
        indptr[1:] = self.degree().flatten().cumsum(0)
        keys, _ = self.as_lists()
        keys = keys.sort(dim=-1).values
        return indptr, keys[keys >= 0]

    def to_dense_mask(self) -> Tensor:
        """bool ``[B, H, N, M]``, True = neighbor; usable as ``attn_mask`` of dense attention. For small sizes.

        Raises:
            GraphError: more than `DENSE_MASK_LIMIT` elements.
        """
        shape = (self.batch, self.num_heads, self.num_queries, self.num_keys)
        elements = shape[0] * shape[1] * shape[2] * shape[3]
        if elements > DENSE_MASK_LIMIT:
            raise GraphError(f"a dense mask of shape {list(shape)} is too large; use as_lists() or to_csr()")
        out = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if elements == 0:
            return out
        group = self.num_heads // self.graph_heads
        for rows, piece in self.row_chunks(elements_per_edge=2 * group):
            keys = piece.edge_keys().expand(self.batch, self.graph_heads, -1, -1).repeat_interleave(group, dim=1)
            keep = keys >= 0
            bias = piece.mask.explicit_bias(keys.clamp(min=0), self.num_heads)
            if bias is not None:
                keep = keep & (bias > float("-inf"))
            padded = torch.zeros((*keys.shape[:3], self.num_keys + 1), dtype=torch.bool, device=self.device)
            padded.scatter_(-1, torch.where(keep, keys, self.num_keys).long(), True)
            out[:, :, rows] = padded[..., : self.num_keys]
        return out

    def overlap(self, other: NeighborGraph) -> Tensor:
        """Jaccard similarity of the neighbors of each query, float32 ``[B, G, N]``; 1 where both have none.

        Raises:
            GraphError: the graphs differ in batch, graph heads, queries or keys.
        """
        mine = (self.batch, self.graph_heads, self.num_queries, self.num_keys)
        theirs = (other.batch, other.graph_heads, other.num_queries, other.num_keys)
        if mine != theirs:
            raise GraphError(f"overlap needs graphs of one shape (B, G, N, M), got {mine} and {theirs}")
        out = torch.empty(mine[:3], dtype=torch.float32, device=self.device)
        step = max(1, _CHUNK_ELEMENTS // max(1, mine[0] * mine[1] * (self.slots + other.slots)))
        for start in range(0, self.num_queries, step):
            rows = slice(start, min(start + step, self.num_queries))
            a, a_valid = self._row_view(rows).as_lists()
            b, b_valid = other._row_view(rows).as_lists()
            out[:, :, rows] = jaccard(a, b, a_valid, b_valid)
        return out

    def slots_by_source(self) -> dict[str, float]:
        """Mean number of neighbor slots per query that each source filled.

        An edge that several sources propose counts for the first of them; bands and columns come before lists.
        """
        counts = dict.fromkeys(self.sources, 0.0)
        queries = self.batch * self.graph_heads * self.num_queries
        if queries == 0:
            return counts
        for name, record in self.sources.items():
            if record.listed is not None:
                counts[name] += float(record.listed)
        for _, piece in self.row_chunks():
            for name, edges in piece._fixed_edges_by_source():
                counts[name] += edges
        return {name: count / queries for name, count in counts.items()}

    def keys_scored(self) -> dict[str, float]:
        """Mean number of distinct keys per query that were scored for each source; fixed patterns score none."""
        queries = max(1, self.batch * self.graph_heads * self.num_queries)
        return {
            name: float(record.keys_scored) / queries if record.keys_scored is not None else 0.0
            for name, record in self.sources.items()
        }

    def _fixed_edges_by_source(self) -> Iterator[tuple[str, int]]:
        """Edges of all parts but lists, per source; an edge counts for the source of the first part that has it."""
        bands: list[Band] = []
        columns: list[Tensor] = []
        for name, record in self.sources.items():
            counted = []
            if record.spans:
                counted.append(self._drop_forbidden(self.span_keys()))
            if record.band is not None:
                keys = self._drop_forbidden(replace(self, band=record.band).band_keys())
                for band in bands:
                    keys = torch.where(in_band(keys, self.mask.positions, band), -1, keys)
                bands.append(record.band)
                counted.append(keys)
            if record.columns is not None:
                keys = self._drop_forbidden(replace(self, columns=record.columns).column_keys())
                for earlier in columns:
                    keys = torch.where(torch.isin(keys, earlier), -1, keys)
                columns.append(record.columns)
                counted.append(keys)
            if record.slices:
                counted.append(self._drop_forbidden(self.slice_keys()))
            for keys in counted:
                repeats = self.batch * self.graph_heads // (keys.shape[0] * keys.shape[1])
                yield name, int((keys >= 0).sum()) * repeats

    # -- invariants ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant of the class docstring.

        Raises:
            GraphError: names the invariant and an example that breaks it.
        """
        if self.num_heads % max(1, self.graph_heads):
            raise GraphError(f"num_heads ({self.num_heads}) must be a multiple of graph_heads ({self.graph_heads})")
        if self.band is not None and self.causal and self.band.after:
            raise GraphError(f"a causal band ends at its query, got after = {self.band.after}")
        if self.columns is not None:
            columns = self.columns
            if columns.dtype != torch.int32 or columns.dim() != 1:
                raise GraphError(f"columns must be int32 [C], got {columns.dtype} {list(columns.shape)}")
            if columns.numel() and not (int(columns[0]) >= 0 and int(columns[-1]) < self.num_keys):
                raise GraphError(f"columns must lie in [0, {self.num_keys}), got {columns.tolist()}")
            if not bool((columns[1:] > columns[:-1]).all()):
                raise GraphError(f"columns must be ascending and unique, got {columns.tolist()}")
        if self.neighbors is not None:
            if self.spans is not None or self.slices is not None:
                raise GraphError("a graph with lists has neither spans nor slices; they would overlap")
            self._validate_lists(self.neighbors)
        if self.spans is not None and self.spans.start.numel():
            start, end = self.spans.start, self.spans.end
            if not bool(((start >= 0) & (start <= end) & (end <= self.num_keys)).all()):
                raise GraphError(f"spans must satisfy 0 <= start <= end <= {self.num_keys}")
        if self.slices is not None:
            keys = expand_slices(*self._slice_tensors(self.slices))
            ordered = torch.where(keys < 0, -1, keys).sort(-1).values
            if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
                raise GraphError("the slices of a query overlap: one of its keys is in two of them")
        if self.summaries is not None and self.mask.has_explicit:
            raise GraphError("summaries hold keys that attn_mask or mask_mod may hide one by one")

    def _validate_lists(self, neighbors: Tensor) -> None:
        if neighbors.dtype != torch.int32 or neighbors.dim() != 4:
            raise GraphError(f"neighbors must be int32 [B, G, N, K], got {neighbors.dtype} {list(neighbors.shape)}")
        sizes = (self.batch, self.graph_heads)
        fits = all(n in (1, full) for n, full in zip(neighbors.shape[:2], sizes, strict=True))
        if not fits or neighbors.shape[2] != self.num_queries:
            raise GraphError(
                f"neighbors must have shape [{self.batch} or 1, {self.graph_heads} or 1, {self.num_queries}, K], "
                f"got {list(neighbors.shape)}"
            )
        if neighbors.numel() == 0:
            return
        filled = neighbors >= 0
        if int(neighbors.min()) < -1 or int(neighbors.max()) >= self.num_keys:
            raise GraphError(f"neighbors must lie in [-1, {self.num_keys}), got up to {int(neighbors.max())}")
        ordered = torch.where(filled[..., 1:], neighbors[..., 1:] > neighbors[..., :-1], True)
        packed = filled[..., :-1] | ~filled[..., 1:]
        if not bool((ordered & packed).all()):
            raise GraphError("neighbors of a query must be ascending, unique, and empty only at the end")
        kept = self._drop_forbidden(neighbors) >= 0
        if not torch.equal(kept, filled.expand_as(kept)):
            raise GraphError("neighbors hold a key that the mask forbids")
        covered = torch.zeros_like(filled)
        if self.band is not None:
            covered = covered | in_band(neighbors, self.mask.positions, self.band)
        if self.columns is not None:
            covered = covered | torch.isin(neighbors, self.columns)
        if bool((covered & filled).any()):
            raise GraphError("neighbors hold a key that the band or a column already covers")

    # -- picture -------------------------------------------------------------------------------------------------

    def plot(self, batch: int = 0, head: int = 0, ax: Axes | None = None) -> Axes:
        """Draw the edges of one graph head: queries down, keys across, one colour per part.

        Args:
            batch, head: which element of B and G. ax: a matplotlib axes to draw on; a new figure if left out.
        """
        from ssa_framework.plotting import plot_graph  # matplotlib is slow to import

        return plot_graph(self, batch=batch, head=head, ax=ax)
