"""Spans, slices attended whole and summaries in graphs: what sources may return, what the router makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ssa_framework import NeighborGraph, SSAConfig, build_graph, sparse_attention
from ssa_framework.errors import ConfigError, GraphError, ProposalError
from ssa_framework.plugin import Band, Candidates, NeighborSource, Proposal, Ranges, RoutingContext, Spans, Summaries
from ssa_framework.registry import SourceRegistry, default_registry
from ssa_framework.testing import graph_attention

LENGTH = 40


def own_block(ctx: RoutingContext, size: int = 8) -> Spans:
    start = ctx.positions // size * size
    return Spans(start, (start + size).clamp(max=ctx.num_keys))


def block_before(ctx: RoutingContext, size: int = 8) -> Ranges:
    """The block before the own one, in reversed order of blocks, as slices of an order."""
    blocks = ctx.num_keys // size
    order = torch.arange(ctx.num_keys).view(blocks, size).flip(0).reshape(1, 1, 1, -1).int()
    place = (blocks - ctx.positions // size) * size
    start = torch.where(ctx.positions >= size, place, 0)[:, None, :, None, None]
    end = torch.where(ctx.positions >= size, place + size, 0)[:, None, :, None, None]
    return Ranges(order, start.int(), end.int(), attend="all")


def blocks_before_that(ctx: RoutingContext, size: int = 8) -> Summaries:
    members = (torch.arange(ctx.num_keys) // size)[None, None, None].int()
    stop = (ctx.positions // size - 1).clamp(min=0)[..., None].int()
    return Summaries(members, ctx.num_keys // size, torch.zeros_like(stop), stop)


def registered(**sources: Callable[[RoutingContext], object]) -> SourceRegistry:
    registry = SourceRegistry()
    for name, function in sources.items():

        class Source(NeighborSource):
            needs_positions = name.startswith("band")
            function_of = staticmethod(function)

            def propose(self, ctx: RoutingContext) -> Proposal | Sequence[Proposal]:
                return self.function_of(ctx)

        registry.register(name, Source)
    return registry


def bounds_of(proposal: Spans | Summaries) -> tuple[Tensor, Tensor]:
    if isinstance(proposal, Spans):
        return proposal.start, proposal.end
    return proposal.first, proposal.stop


def graph_of(
    registry: SourceRegistry, q: Tensor, k: Tensor, causal: bool = True, extra: dict | None = None, **mask: object
) -> NeighborGraph:
    own = [name for name in registry.sources if name not in default_registry().sources]
    config = SSAConfig(sources={**(extra or {}), **{name: {} for name in own}}, num_neighbors=12)
    graph = build_graph(q, k, config=config, is_causal=causal, registry=registry, **mask)
    graph.validate()
    return graph


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, heads, LENGTH, 8, dtype=torch.float64) for heads in (4, 2, 2))


def assert_attends(q: Tensor, k: Tensor, v: Tensor, graph: NeighborGraph) -> None:
    for backend in ("auto", "torch", "reference"):
        out = sparse_attention(q, k, v, graph=graph, enable_gqa=True, config=SSAConfig(backend=backend))
        torch.testing.assert_close(out, graph_attention(q, k, v, graph))


@pytest.mark.parametrize("extra", [{}, {"window": {"size": 5}}, {"global": {"indices": [0, 9, 17]}}], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_several_proposals_of_one_source(causal: bool, extra: dict) -> None:
    q, k, v = inputs()
    registry = registered(mine=lambda ctx: [own_block(ctx), block_before(ctx), blocks_before_that(ctx)])
    graph = graph_of(registry, q, k, causal, extra)
    assert graph.neighbors is None
    block = torch.arange(LENGTH) // 8
    want = (block[:, None] - block[None] <= 1) & (block[:, None] >= block[None])
    columns = torch.tensor(extra.get("global", {}).get("indices", []), dtype=torch.long)
    want[:, columns] = True
    if "window" in extra:
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None]
        want |= distance.abs() <= 5
    if causal:
        want &= torch.ones_like(want).tril()
    assert torch.equal(graph.to_dense_mask(), want.expand(2, 4, -1, -1))
    seen = torch.arange(5) < (block[:, None] - 1)
    assert torch.equal(graph.summary_mask(), seen.expand(2, 4, -1, -1))
    assert torch.equal(graph.summaries_per_query(), graph.summary_mask().sum(-1))
    per_query = graph.degree().float().mean()
    assert sum(graph.slots_by_source().values()) == pytest.approx(float(per_query))
    assert graph.slots >= int(graph.degree().max())
    assert_attends(q, k, v, graph)


def test_irregular_positions_and_padding_and_documents() -> None:
    q, k, v = inputs()
    registry = registered(mine=lambda ctx: [own_block(ctx), block_before(ctx)])
    keep = torch.rand(2, LENGTH) > 0.2
    ids = torch.arange(LENGTH)[None].expand(2, -1) // 13
    positions = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) * 2 % LENGTH])
    for mask in (
        {"key_padding_mask": keep},
        {"segment_ids": ids},
        {"query_positions": positions},
        {"attn_mask": torch.rand(LENGTH, LENGTH) > 0.3},
        {"mask_mod": lambda b, h, i, j: (i + j + h) % 3 > 0},
        {"key_padding_mask": keep, "query_positions": positions},
    ):
        graph = graph_of(registry, q, k, True, {"window": {"size": 3}}, **mask)
        assert graph.spans is not None
        assert graph.slices is not None
        assert_attends(q, k, v, graph)


def test_summaries_with_irregular_positions() -> None:
    q, k, v = inputs()
    registry = registered(mine=lambda ctx: [own_block(ctx), blocks_before_that(ctx)])
    positions = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) * 2 % LENGTH])
    assert_attends(q, k, v, graph_of(registry, q, k, True, query_positions=positions))


@pytest.mark.parametrize(
    "others",
    [
        {"pick": lambda ctx: Candidates((ctx.positions[:, None, :, None] * 7 + torch.arange(3)).int() % ctx.num_keys)},
        {"again": own_block},
        {"again": block_before},
        {"again": lambda ctx: Ranges(None, *(x[:, None, :, None, None] for x in bounds_of(own_block(ctx))))},
    ],
    ids=["candidates", "spans", "slices", "topk"],
)
def test_what_might_overlap_becomes_lists(others: dict) -> None:
    q, k, v = inputs()
    mine = {"mine": lambda ctx: [own_block(ctx), block_before(ctx)]}
    alone = [graph_of(registered(**sources), q, k).to_dense_mask() for sources in (mine, others)]
    both = graph_of(registered(**mine, **others), q, k)
    assert both.neighbors is not None
    assert both.spans is None
    assert both.slices is None
    assert torch.equal(both.to_dense_mask(), alone[0] | alone[1])
    assert sum(both.slots_by_source().values()) == pytest.approx(float(both.degree().float().mean()))
    assert_attends(q, k, v, both)


def leaky(ctx: RoutingContext) -> Summaries:
    stop = (ctx.positions // 8 + 1)[..., None].int()
    return Summaries((torch.arange(ctx.num_keys) // 8)[None, None, None].int(), 5, torch.zeros_like(stop), stop)


@pytest.mark.parametrize(
    ("propose", "mask", "message"),
    [
        (leaky, {}, "'mine': a summary that a query attends holds a key after it; attention is causal"),
        (
            blocks_before_that,
            {"segment_ids": torch.arange(LENGTH)[None].expand(2, -1) // 20},
            "'mine': a summary that a query attends holds a key of another document",
        ),
        (lambda ctx: [], {}, r"'mine': propose\(\) must return at least one proposal"),
        (lambda ctx: [Band(1, 1), "x"], {}, "or several of them, got str"),
        (
            lambda ctx: Spans(own_block(ctx).end, own_block(ctx).start),
            {},
            "'mine': Spans.start must not exceed Spans.end",
        ),
        (
            lambda ctx: Spans(own_block(ctx).start, own_block(ctx).end + 1),
            {},
            r"'mine': Spans.end must lie in \[0, 40\], got values in \[9, 41\]",
        ),
        (
            lambda ctx: Spans(own_block(ctx).start[:, 1:], own_block(ctx).end),
            {},
            r"'mine': Spans.start must have shape \[B=2 or 1, 40\], got \[1, 39\]",
        ),
        (
            lambda ctx: Summaries(torch.zeros(1, 1, 1, 39, dtype=torch.int32), 1, *[ctx.positions[..., None]] * 2),
            {},
            r"Summaries.members must have shape \[B=2 or 1, Hkv=2 or 1, R, M=40\], got \[1, 1, 1, 39\]",
        ),
        (
            lambda ctx: Summaries(torch.full((1, 1, 1, 40), 3, dtype=torch.int32), 3, *[ctx.positions[..., None]] * 2),
            {},
            r"Summaries.members must lie in \[-1, 2\]",
        ),
        (
            lambda ctx: Summaries(torch.zeros(1, 1, 1, 40, dtype=torch.int32), True, *[ctx.positions[..., None]] * 2),
            {},
            "Summaries.count must be an integer >= 0, got True",
        ),
    ],
)
def test_wrong_proposals(propose: Callable, mask: dict, message: str) -> None:
    q, k, _ = inputs()
    with pytest.raises(ProposalError, match=message):
        graph_of(registered(mine=propose), q, k, True, {"self": {}}, **mask)


def test_a_cluster_without_keys_leaks_nothing() -> None:
    """A summary beyond the query is seen, but has no keys."""
    q, k, v = inputs()

    def propose(ctx: RoutingContext) -> Summaries:
        found = leaky(ctx)
        return Summaries(torch.where(found.members > 0, -1, found.members), 5, found.first, found.stop)

    with pytest.raises(ProposalError, match="holds a key after it"):
        graph_of(registered(mine=propose), q, k, True, {"self": {}})
    late = registered(mine=lambda ctx: Summaries(torch.full_like(leaky(ctx).members, -1), 5, *bounds_of(leaky(ctx))))
    assert_attends(q, k, v, graph_of(late, q, k, True, {"self": {}}))


def test_summaries_of_two_sources() -> None:
    q, k, _ = inputs()
    with pytest.raises(ConfigError, match="sources 'a' and 'b' return summaries; a graph holds those of one source"):
        graph_of(registered(a=blocks_before_that, b=blocks_before_that), q, k)


def test_overlapping_slices_are_found() -> None:
    q, k, _ = inputs()

    def propose(ctx: RoutingContext) -> Ranges:
        one = block_before(ctx)
        return Ranges(one.order, torch.cat([one.start] * 2, dim=-1), torch.cat([one.end] * 2, dim=-1), attend="all")

    with pytest.raises(GraphError, match="the slices of a query overlap"):
        graph_of(registered(mine=propose), q, k)


def test_gradients_reach_summarised_keys() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    graph = graph_of(registered(mine=blocks_before_that), q.detach(), k.detach(), True, {"self": {}})
    weight = torch.linspace(-1, 1, q.numel(), dtype=torch.float64).view_as(q)
    outs = sparse_attention(q, k, v, graph=graph, enable_gqa=True), graph_attention(q, k, v, graph)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert (grads[0][1][:, :, :8].abs() > 0).all()
