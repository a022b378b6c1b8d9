"""`NeighborSource`, the base class of every plugin, and what it is told: `LayerSpec` and `RoutingContext`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ssa_framework.errors import ConfigError, UnknownOptionError
from ssa_framework.masks import EdgeMask
from ssa_framework.proposals import Proposal

if TYPE_CHECKING:
    from ssa_framework.ops.cluster_keys.types import Clusters


ALWAYS = 2**31
"""More tokens than any cache holds; see `NeighborSource.steady_steps`."""


_in_program: ContextVar[bool] = ContextVar("in_program", default=False)


@contextmanager
def in_program() -> Iterator[None]:
    """While an op of a compiled program runs."""
    token = _in_program.set(True)
    try:
        yield
    finally:
        _in_program.reset(token)


def may_keep(device: torch.device) -> bool:
    """Whether a source may keep tensors that it makes in a call for later calls.

    Not while the call is traced, nor, on CUDA, while it is captured in a graph or part of a compiled program: what is
    made there lies in memory that the graph takes back (``mode="reduce-overhead"``).
    """
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not (_in_program.get() or torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True)
class LayerSpec:
    """What a source may know of the layer it serves, at construction.

    Attributes:
        head_dim: D. num_heads: H, query heads. num_kv_heads: Hkv. graph_heads: G, H or Hkv.
        num_neighbors: K, the budget of all sources together.
        causal: whether the layer is causal by default.
        seed: of everything random in the source.
    """

    head_dim: int
    num_heads: int
    num_kv_heads: int
    graph_heads: int
    num_neighbors: int
    causal: bool = False
    seed: int = 0


@dataclass(frozen=True)
class SpreadLevel:
    """Segments of one length, whose keys lie on several ranks.

    Attributes:
        starts: int32 ``[B or 1, F]``, the place where each segment begins; -1 = not used.
        length: keys of a segment. slots: of a segment in what ``cluster`` returns.
        first, stop: int32 ``[B or 1, N]``, first and one past the last segment whose centroids each query looks at;
            those of others may be zeros.
        cluster: clusters of the segments of keys by place ``[B, Hkv, places, D]`` that begin at ``[B or 1, F]``.
    """

    starts: Tensor
    length: int
    slots: int
    first: Tensor
    stop: Tensor
    cluster: Callable[[Tensor, Tensor], Clusters]


class SpreadSegments(Protocol):
    """Clusters of segments whose keys lie on several ranks: every rank clusters some of the segments."""

    def clusters(self, order: Tensor | None, levels: Sequence[SpreadLevel]) -> list[Clusters]:
        """For each level, the clusters of all segments, as ``cluster(keys, starts)`` makes them of all keys.

        Args:
            order: int32 ``[B or 1, M]``, the key at each place; ``None`` = keys stand where they are.
            levels: at least one, each with at least one segment.
        """


@dataclass(frozen=True)
class RoutingContext:
    """What a source sees of one call. All tensors are detached unless the source sets ``learns``.

    Attributes:
        q: routing queries ``[B, G, N, D]``: the query of each graph head; where a graph is shared by a KV group, the
            mean of the group's queries.
        shared_k: keys ``[B, Hkv, M, D]``, one row per KV head.
        mask: which edges are allowed. A source need not look at it; the router does.
        budget: neighbor slots left by the sources named before this one, at least 1.
        inputs: what the caller passed for this source with this call (``source_inputs``), or ``None``.
        seed: of the layer; see `generator`.
        decoding: the call is one of several on a cache: the queries are the last tokens of the keys, and what is
            proposed for them must not depend on how the tokens were cut into calls.
        state: what the source keeps in that cache, of all keys; ``None`` where it keeps nothing.
        first_new: in `NeighborSource.append`, the first key that the state does not hold yet; means nothing elsewhere.
        partial: the queries are some of those of the whole call, the ones at ``positions``: the other ranks of a
            context-parallel group have the rest.
        first_graph_head: the number of the first graph head in the layer; above 0 where tensor parallelism gave those
            before to other ranks.
        spread: how to cluster segments of keys that lie on several ranks; ``shared_k`` is then a stand-in that holds
            no keys. ``None``: the keys are here.
    """

    q: Tensor
    shared_k: Tensor
    mask: EdgeMask
    budget: int
    seed: int = 0
    inputs: Any = None
    decoding: bool = False
    state: Any = None
    first_new: int = 0
    partial: bool = False
    first_graph_head: int = 0
    spread: SpreadSegments | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def graph_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_queries(self) -> int:
        return self.q.shape[2]

    @property
    def num_keys(self) -> int:
        return self.shared_k.shape[2]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @cached_property
    def generator(self) -> torch.Generator:
        """Where randomness comes from, on the device of the queries; the same for every call. It is made when asked
        for, since a CUDA graph cannot capture that."""
        return torch.Generator(self.device).manual_seed(self.seed)

    @cached_property
    def k(self) -> Tensor:
        """Keys per graph head ``[B, G, M, D]``: ``shared_k``, repeated over each KV group if G = H."""
        return self.per_graph_head(self.shared_k)

    def per_graph_head(self, x: Tensor) -> Tensor:
        """``[B, Hkv, ...]`` → ``[B, G, ...]``."""
        repeats = self.graph_heads // self.shared_k.shape[1]
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)

    @property
    def causal(self) -> bool:
        return self.mask.causal

    @property
    def positions(self) -> Tensor:
        """Position of every query on the axis of the keys, int32 ``[B or 1, N]``."""
        return self.mask.positions

    @property
    def key_keep(self) -> Tensor | None:
        """bool ``[B or 1, M]``, True = a real key; ``None`` = no padding."""
        return self.mask.key_keep

    @property
    def segments(self) -> tuple[Tensor, Tensor] | None:
        """Document of every query ``[B or 1, N]`` and key ``[B or 1, M]``; ``None`` = one document."""
        if self.mask.query_segments is None or self.mask.key_segments is None:
            return None
        return self.mask.query_segments, self.mask.key_segments

    @cached_property
    def span(self) -> tuple[Tensor, Tensor]:
        """First and last key position that each query may attend, by document, padding and causality.

        Returns: two int32 ``[B or 1, N]``; last < first where a query may attend nothing. Inside the span single
        keys may still be masked.
        """
        first, last = self.document_bounds
        if self.causal:
            last = torch.minimum(last, self.positions)
        first, last = torch.broadcast_tensors(first, last)
        return first, last

    @cached_property
    def documents(self) -> tuple[Tensor, Tensor, int] | None:
        """Numbers of the documents of every query and key, int32 ``[B or 1, N]`` and ``[B or 1, M]``, and how many
        numbers there are; ``None`` = one document. A query whose document has no key has the number -1.

        On a CPU the numbers are as few as there are documents; elsewhere there may be as many as keys, since counting
        the documents would wait for the device.
        """
        if self.segments is None:
            return None
        query_ids, key_ids = self.segments
        if self.num_keys == 0:
            return torch.full_like(query_ids, -1, dtype=torch.int32), key_ids.int(), 1
        rows = max(query_ids.shape[0], key_ids.shape[0])
        in_order, place = key_ids.expand(rows, -1).sort(dim=1)
        fresh = torch.ones_like(in_order, dtype=torch.int32)
        fresh[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
        numbers = fresh.cumsum(1, dtype=torch.int32) - 1
        of_keys = torch.empty_like(numbers).scatter_(1, place, numbers)
        found = torch.searchsorted(in_order, query_ids.expand(rows, -1).contiguous()).clamp(max=self.num_keys - 1)
        known = in_order.gather(1, found) == query_ids
        of_queries = torch.where(known, numbers.gather(1, found), -1)
        count = int(numbers[:, -1].max()) + 1 if self.device.type == "cpu" else self.num_keys
        return of_queries, of_keys, count

    @cached_property
    def key_bounds(self) -> tuple[Tensor, Tensor]:
        """First and last real key position of each key's document, int32 ``[B or 1, M or 1]``; last < first where a
        document is all padding."""
        if self.key_keep is None and self.documents is None:
            first = torch.zeros((1, 1), dtype=torch.int32, device=self.device)
            return first, first + (self.num_keys - 1)
        keys = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)[None]
        low = keys if self.key_keep is None else torch.where(self.key_keep, keys, self.num_keys)
        high = keys if self.key_keep is None else torch.where(self.key_keep, keys, -1)
        if self.num_keys == 0:
            return keys.new_zeros((1, 1)), keys.new_full((1, 1), -1)
        if self.documents is None:
            return low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        _, of_keys, count = self.documents
        rows = max(of_keys.shape[0], low.shape[0])
        of_keys = of_keys.expand(rows, -1).long()
        first = torch.full((rows, count), self.num_keys, dtype=torch.int32, device=self.device)
        last = torch.full((rows, count), -1, dtype=torch.int32, device=self.device)
        first.scatter_reduce_(1, of_keys, low.expand(rows, -1), "amin")
        last.scatter_reduce_(1, of_keys, high.expand(rows, -1), "amax")
        return first.gather(1, of_keys), last.gather(1, of_keys)

    @cached_property
    def document_bounds(self) -> tuple[Tensor, Tensor]:
        """First and last real key position of each query's document, int32 ``[B or 1, N]``."""
        first, last = self.key_bounds
        if self.documents is None:
            return first.expand(-1, self.num_queries), last.expand(-1, self.num_queries)
        of_queries, of_keys, count = self.documents
        rows = max(of_keys.shape[0], first.shape[0])
        of_queries, of_keys = of_queries.expand(rows, -1).long(), of_keys.expand(rows, -1).long()

        def of_documents(bound: Tensor, nothing: int) -> Tensor:
            table = torch.full((rows, count), nothing, dtype=torch.int32, device=self.device)
            table.scatter_(1, of_keys, bound.expand(rows, -1))
            return torch.where(of_queries < 0, nothing, table.gather(1, of_queries.clamp(min=0)))

        return of_documents(first, self.num_keys), of_documents(last, -1)


class NeighborSource(nn.Module):
    """One way of proposing keys. Subclass it, register it, name it in ``SSAConfig.sources``.

    A source without options implements `propose` and nothing else. A source with options declares them as keyword
    arguments of ``__init__(self, layer, *, size=8)`` and calls ``super().__init__(layer)``; anything else that a
    user writes for it is an error that lists what it declares.

    A source never checks causality, masks, bounds or duplicates: the router does. Where it cannot serve a
    configuration it raises `ConfigError`; it never returns an empty proposal in silence.
    """

    needs_positions: ClassVar[bool] = False
    """True where queries and keys must lie on one axis (self, window); such a source sits out cross-attention."""

    learns: ClassVar[bool] = False
    """True where gradients should flow into what the source computes from q and k."""

    rebuilds: ClassVar[bool] = True
    """True where `propose` looks at all keys in every step of decoding, since the source keeps no state of them. False
    where it keeps one, or where it needs no keys; it then says so."""

    routing_keys: Literal["all", "segments", "none"] = "all"
    """What `propose` reads of the keys of a sequence that is spread over ranks: all of them; none; or segments, which
    it has clustered by ``ctx.spread`` (`SpreadSegments`), and of which it proposes no list that has to be scored."""

    summarises: bool = False
    """Whether `propose` may return `Summaries`. Where a sequence is spread over ranks, all of them must then make the
    same ones, so each of them gets all keys, also those that none of its queries may attend."""

    layer: LayerSpec

    def __init__(self, layer: LayerSpec, **options: Any) -> None:
        super().__init__()
        if options:
            raise UnknownOptionError(_unknown_options(type(self).__name__, options, self.option_defaults()))
        self.layer = layer

    def propose(self, ctx: RoutingContext) -> Proposal | Sequence[Proposal]:
        """Return the keys for the queries of ``ctx``: a `Band`, `Columns`, `Spans`, `Candidates`, `Ranges`,
        `Summaries`, or several of them."""
        raise NotImplementedError(f"{type(self).__name__} must implement propose(ctx)")

    # -- decoding: what a source keeps of the keys that are cached -----------------------------------------------------

    def init_state(self, ctx: RoutingContext) -> Any:
        """A state that holds no keys, for a cache that begins; plain data, such as tensors. Nothing of it belongs into
        the module: one module serves several caches. ``None``: the source keeps no state, `propose` gets all keys in
        every step, and the methods below are never called.
        """
        return None

    def append(self, state: Any, ctx: RoutingContext) -> Any:
        """The state with the keys of ``ctx`` from ``ctx.first_new`` on; ``state`` may be changed."""
        raise NotImplementedError(f"{type(self).__name__} must implement append(state, ctx), as it has init_state")

    def crop(self, state: Any, length: int) -> Any:
        """The state of the first ``length`` keys; ``state`` may be changed. ``None``: start anew with all keys."""
        return None

    def reorder(self, state: Any, index: Tensor) -> Any:
        """The state with the batch elements ``index``, int64 ``[B']``, which may repeat. ``None``: start anew."""
        return None

    def steady_steps(self, state: Any, length: int) -> int:
        """For how many tokens behind the first ``length`` of a cache, appended one by one, nothing of what `propose`
        returns changes but what it computes of ``ctx.positions``, on the device: a step may then be captured in a CUDA
        graph and stand for the others. `append` is not called meanwhile, but later, for all of them at once.

        ``state``: of the first ``length`` keys; ``None`` where the source keeps none. 0 = capture no step.
        """
        return 0

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The options of this source with their defaults; `inspect.Parameter.empty` where there is none."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _unknown_options(name: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    unknown = ", ".join(repr(option) for option in given)
    options = ", ".join(sorted(known)) or "none"
    return f"source {name!r} has no option {unknown}; its options: {options}"


def create_source(
    name: str, source_class: type[NeighborSource], layer: LayerSpec, options: Mapping[str, Any]
) -> NeighborSource:
    """Build one source with the options that a user wrote for it.

    Raises:
        UnknownOptionError: an option that the source does not declare. ConfigError: a required option is missing.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"options of source {name!r} must be a mapping, got {type(options).__name__}")
    known = source_class.option_defaults()
    unknown = {option: value for option, value in options.items() if option not in known}
    if unknown:
        raise UnknownOptionError(_unknown_options(name, unknown, known))
    missing = [o for o, default in known.items() if default is inspect.Parameter.empty and o not in options]
    if missing:
        raise ConfigError(f"source {name!r} needs the option {', '.join(missing)}")
    return source_class(layer, **options)
