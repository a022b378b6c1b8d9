"""``edges``: the neighbors that the caller says; for graphs, trees and molecules."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssa_framework.plugin import (
    BudgetError,
    Candidates,
    ConfigError,
    LayerSpec,
    NeighborSource,
    Registrar,
    RoutingContext,
    hookimpl,
)

_HOW_TO_GIVE = (
    "edge_index [2, E] (row 0 queries, row 1 keys) or [3, E] (batch, query, key), or csr (indptr [N + 1], indices [E])"
)


class Edges(NeighborSource):
    """An explicit adjacency. Queries and keys are rows of the call's q and k, counted from 0; where tokens are decoded
    on a cache, positions in the whole sequence, and edges of tokens that are not there yet have to wait.

    Give the edges as an option, if every call has the same graph, or with each call:
    ``source_inputs={"edges": edge_index}``, ``{"edges": {"edge_index": ...}}`` or ``{"edges": {"csr": ...}}``, which
    come before the option. Repeated edges count once. Every edge that no mask forbids becomes a neighbor: the budget
    must hold the largest degree.

    Args:
        edge_index: integers ``[2, E]``, row 0 queries, row 1 keys, for every batch element; or ``[3, E]``: batch,
            query, key. A tensor or nested lists.
        csr: ``(indptr, indices)``, integers ``[N + 1]`` and ``[E]``: query i attends
            ``indices[indptr[i]:indptr[i + 1]]``. Tensors or lists.

    Raises:
        ConfigError: no edges, both forms, a wrong shape or dtype, an edge outside the call's batch, queries or keys.
        BudgetError: more neighbors than the budget holds; names the query and the ``num_neighbors`` that would do.

    Edges given as an option are kept in a buffer, so that they follow the module to another device. It is not
    persistent: the graph belongs to the configuration and the data, and a checkpoint trained on one graph must load
    beside another, of another size.
    """

    rebuilds = False
    routing_keys = "none"

    edge_index: Tensor | None

    def __init__(
        self,
        layer: LayerSpec,
        *,
        edge_index: Tensor | Sequence[Sequence[int]] | None = None,
        csr: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(layer)
        self.queries: int | None = None  # what csr says about N
        index: Tensor | None = None
        if edge_index is not None or csr is not None:
            index, self.queries = _read(edge_index, csr)
        self.register_buffer("edge_index", index, persistent=False)

    def propose(self, ctx: RoutingContext) -> Candidates:
        index, queries = self._given(ctx.inputs)
        if ctx.partial:
            index, queries = _of_rows(index.to(ctx.device), ctx.positions[0].long(), ctx.num_keys), None
        elif ctx.decoding:
            index, queries = _of_new_tokens(index.to(ctx.device), ctx.num_keys - ctx.num_queries, ctx.num_keys), None
        if queries is not None and queries != ctx.num_queries:
            raise ConfigError(
                f"edges: csr indptr has {queries + 1} entries, so {queries} queries; this call has {ctx.num_queries}"
            )
        index = index.to(ctx.device)
        sizes = (("batch", ctx.batch), ("query", ctx.num_queries), ("key", ctx.num_keys))
        for row, (what, size) in zip(index, sizes[-index.shape[0] :], strict=True):
            _check_range(row, what, size)
        batch = index[0] if index.shape[0] == 3 else torch.zeros_like(index[0])
        batches = ctx.batch if index.shape[0] == 3 else 1
        lists = _padded_lists(batch, index[-2], index[-1], batches, ctx.num_queries, ctx.num_keys)
        self._check_budget(lists, ctx)
        return Candidates(lists[:, None], guaranteed=True)

    def _given(self, inputs: Any) -> tuple[Tensor, int | None]:
        """The edges of this call: what came with it, or the option."""
        if isinstance(inputs, Mapping):
            unknown = sorted(set(inputs) - {"edge_index", "csr"})
            if unknown or not inputs:
                raise ConfigError(
                    f"edges: source_inputs must have the key 'edge_index' or 'csr', got {sorted(inputs) or 'none'}"
                )
            return _read(inputs.get("edge_index"), inputs.get("csr"))
        if inputs is not None:
            return _read(inputs, None)
        if self.edge_index is None:
            raise ConfigError(
                f"edges: no edges given; pass {_HOW_TO_GIVE}, as an option of the source or with the call as "
                f"source_inputs={{'edges': ...}}"
            )
        return self.edge_index, self.queries

    def _check_budget(self, lists: Tensor, ctx: RoutingContext) -> None:
        degree = int(lists.shape[-1])
        if degree <= ctx.budget:
            return
        place = int((lists >= 0).sum(-1).argmax())
        query = f"query {place % ctx.num_queries}"
        if lists.shape[0] > 1:
            query += f" of batch element {place // ctx.num_queries}"
        # A budget above num_neighbors means that nothing was left and content got a few slots all the same. What band
        # and columns take is then not known; num_neighbors is enough for them wherever it is exhausted, not exceeded.
        slots = self.layer.num_neighbors
        enough = slots + degree - (ctx.budget if ctx.budget <= slots else 0)
        raise BudgetError(
            f"edges: {query} has {degree} neighbors, num_neighbors = {slots} leaves {ctx.budget} slots for them; "
            f"num_neighbors = {enough} would do"
        )


def _read(edge_index: Any, csr: Any) -> tuple[Tensor, int | None]:
    """Either form as int64 ``[2 or 3, E]``, and the number of queries where the form says it."""
    if (edge_index is None) == (csr is None):
        given = "both" if csr is not None else "neither"
        raise ConfigError(f"edges: give either edge_index or csr, got {given}; {_HOW_TO_GIVE}")
    if csr is None:
        index = _integers(edge_index, "edge_index")
        if index.dim() != 2 or index.shape[0] not in (2, 3):
            raise ConfigError(
                f"edges: edge_index must have shape [2, E] (query, key) or [3, E] (batch, query, key), "
                f"got {list(index.shape)}"
            )
        return index, None
    if not isinstance(csr, Sequence) or len(csr) != 2:
        raise ConfigError(f"edges: csr must be a pair (indptr [N + 1], indices [E]), got {type(csr).__name__}")
    indptr, indices = _integers(csr[0], "csr indptr"), _integers(csr[1], "csr indices")
    if indptr.dim() != 1 or indices.dim() != 1 or not indptr.numel():
        raise ConfigError(
            f"edges: csr must be (indptr [N + 1], indices [E]), got {list(indptr.shape)} and {list(indices.shape)}"
        )
    degrees = indptr.diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel():
        raise ConfigError(
            f"edges: csr indptr must go from 0 to the number of indices, {indices.numel()}; "
            f"it goes from {int(indptr[0])} to {int(indptr[-1])}"
        )
    if bool((degrees < 0).any()):
        raise ConfigError(
            f"edges: csr indptr must not decrease, it does after entry {int((degrees < 0).int().argmax())}"
        )
    queries = torch.arange(degrees.numel(), device=indptr.device).repeat_interleave(degrees)
    return torch.stack([queries, indices.to(indptr.device)]), degrees.numel()


def _integers(values: Any, what: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"edges: {what} must be an integer tensor or nested lists of integers: {error}") from error
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        return tensor.long()  # an empty list has no dtype of its own
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ConfigError(f"edges: {what} must be integers, got {tensor.dtype}")
    return tensor.long()


def _of_new_tokens(index: Tensor, first: int, keys: int) -> Tensor:
    """The edges of the queries at positions ``first .. keys``, with queries counted from ``first``."""
    queries = index[-2]
    here = (queries >= first) & (queries < keys) & (index[-1] < keys)
    index = index[:, here].clone()
    index[-2] -= first
    return index


def _of_rows(index: Tensor, positions: Tensor, keys: int) -> Tensor:
    """The edges of the queries at ``positions [N]``, with queries counted by their row."""
    _check_range(index[-2], "query", keys)
    row = torch.full((keys,), -1, dtype=torch.int64, device=index.device)
    row[positions] = torch.arange(positions.numel(), device=index.device)
    index = torch.cat([index[:-2], row[index[-2]][None], index[-1:]])
    return index[:, index[-2] >= 0]


def _check_range(values: Tensor, what: str, size: int) -> None:
    outside = (values < 0) | (values >= size)
    if bool(outside.any()):
        edge = int(outside.int().argmax())
        raise ConfigError(f"edges: {what} must lie in [0, {size}), edge {edge} has {what} {int(values[edge])}")


def _padded_lists(batch: Tensor, query: Tensor, key: Tensor, batches: int, queries: int, keys: int) -> Tensor:
    """Edges, each once, as int32 ``[batches, queries, largest degree]``, keys ascending, -1 at the end."""
    edges = ((batch * queries + query) * keys + key).unique()
    row, key = edges // keys, edges % keys
    degree = torch.bincount(row, minlength=batches * queries)
    slot = torch.arange(edges.numel(), device=edges.device) - (degree.cumsum(0) - degree)[row]
    width = int(degree.max()) if degree.numel() else 0
    lists = torch.full((batches * queries, width), -1, dtype=torch.int32, device=edges.device)
    lists[row, slot] = key.to(torch.int32)
    return lists.unflatten(0, (batches, queries))


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("edges", Edges)
