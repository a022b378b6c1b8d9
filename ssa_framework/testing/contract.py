"""`SourceContract`: the tests that every neighbor source passes, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ssa_framework.attention import sparse_attention
from ssa_framework.cache import LayerCache
from ssa_framework.config import SSAConfig
from ssa_framework.decoding import attend_cached
from ssa_framework.errors import ConfigError, UnknownOptionError
from ssa_framework.graph import NeighborGraph
from ssa_framework.proposals import Band, Candidates, Proposal, Ranges, validate_proposals
from ssa_framework.registry import SourceRegistry, default_registry
from ssa_framework.router import Router, layer_spec
from ssa_framework.source import NeighborSource, RoutingContext, create_source
from ssa_framework.testing.inputs import CASES, AttentionInputs, graph_attention, make_inputs

DECODE_CHUNKS: Mapping[str, tuple[int, ...]] = {
    "token-by-token": (1,) * 65,
    "chunks": (7, 1, 1, 23, 2, 1, 17, 13),
    "prompt-then-tokens": (40, *(1,) * 25),
    "at-once": (65,),
}
"""Lengths of the calls in which the contract decodes 65 tokens."""

_DECODE_CASES: Mapping[str, Mapping[str, Any]] = {
    "one-document": {"queries": 65, "causal": True},
    "multi-query": {"queries": 65, "kv_heads": 1, "causal": True},
    "padded": {"queries": 65, "causal": True, "padded": True, "batch": 3},
}


class SourceContract:
    """Subclass it in a test module, name the source, and pytest runs the contract on it.

        class TestMySource(SourceContract):
            source = "my_source"
            options = {"size": 4}

    The inputs are at most 65 tokens long: choose options with which the source has something to decide there.

    Attributes:
        source: the registered name. options: the options of the source.
        num_neighbors: the budget.
        unsupported: what the source refuses with a `ConfigError`, which is then part of the contract: any of
            ``"causal"``, ``"full"`` (not causal), ``"cross"``, ``"padded"``, ``"packed"``, ``"kv"`` (a graph shared by
            a KV group). Sources that set ``needs_positions`` sit out cross-attention without saying so here.
        registry: where the name is looked up; the default registry if ``None``.
    """

    source: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    num_neighbors: ClassVar[int] = 16
    unsupported: ClassVar[frozenset[str]] = frozenset()
    registry: ClassVar[SourceRegistry | None] = None

    def source_inputs(self, inputs: AttentionInputs) -> Any:
        """What the caller tells the source with this call; ``None`` = nothing. May depend on shapes, not on values."""
        return None

    # -- building ------------------------------------------------------------------------------------------------

    def config(self, inputs: AttentionInputs, *, alone: bool = False, graph_heads: str = "query") -> SSAConfig:
        """The layer of a test: ``self`` and the source, or the source alone."""
        mix: dict[str, Mapping[str, Any]] = {} if alone or self.source == "self" else {"self": {}}
        return SSAConfig(
            d_model=inputs.heads * inputs.head_dim,
            num_heads=inputs.heads,
            num_kv_heads=inputs.kv_heads,
            num_neighbors=self.num_neighbors,
            causal=inputs.causal,
            sources={**mix, self.source: dict(self.options)},
            graph_heads="kv" if graph_heads == "kv" else "query",
            dense_below=0,  # the graph that the source made, however small the input
        )

    def router(self, inputs: AttentionInputs, **config: Any) -> Router:
        return Router(self.config(inputs, **config), registry=self.registry)

    def route(self, router: Router, inputs: AttentionInputs) -> NeighborGraph:
        """The graph, after its own check."""
        told = self.source_inputs(inputs)
        graph: NeighborGraph = router(
            inputs.q,
            inputs.k,
            inputs.edge_mask(),
            cross=inputs.cross,
            source_inputs=None if told is None else {self.source: told},
        )
        graph.validate()
        return graph

    def attend(self, inputs: AttentionInputs) -> tuple[Tensor, NeighborGraph]:
        """Attention over self and the source, by a new router: ``[B, H, N, D]`` and its graph."""
        graph = self.route(self.router(inputs), inputs)
        config = self.config(inputs)
        return sparse_attention(inputs.q, inputs.k, inputs.v, enable_gqa=True, config=config, graph=graph), graph

    def refuses(self, inputs: AttentionInputs, **config: Any) -> bool:
        """Whether the source cannot serve these inputs. It then says so with a `ConfigError`, which this checks."""
        needs = {
            "causal": inputs.causal,
            "full": not inputs.causal,
            "cross": inputs.cross,
            "padded": inputs.key_padding_mask is not None,
            "packed": inputs.segment_ids is not None,
            "kv": config.get("graph_heads") == "kv",
        }
        refused = {name for name in self.unsupported if needs[name]}
        if inputs.cross and self.source_class().needs_positions:
            refused.add("cross")
        if not refused:
            return False
        with pytest.raises(ConfigError, match=self.source):
            self.route(self.router(inputs, alone=True, **config), inputs)
        return True

    def source_class(self) -> type[NeighborSource]:
        return (self.registry or default_registry()).get(self.source)

    def propose(self, inputs: AttentionInputs, graph_heads: str = "query") -> tuple[list[Proposal], RoutingContext]:
        """What the source itself returns, checked, and what it was told."""
        layer = layer_spec(self.config(inputs, graph_heads=graph_heads))
        source = create_source(self.source, self.source_class(), layer, self.options)
        group = inputs.heads // layer.graph_heads
        ctx = RoutingContext(
            q=inputs.q.unflatten(1, (-1, group)).mean(dim=2) if group > 1 else inputs.q,
            shared_k=inputs.k,
            mask=inputs.edge_mask(),
            budget=self.num_neighbors,
            seed=layer.seed,
            inputs=self.source_inputs(inputs),
        )
        proposals = validate_proposals(
            source.propose(ctx),
            self.source,
            batch=ctx.batch,
            graph_heads=ctx.graph_heads,
            kv_heads=inputs.k.shape[1],
            queries=ctx.num_queries,
            keys=ctx.num_keys,
            device=ctx.device,
        )
        return proposals, ctx

    # -- proposals -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("graph_heads", ["query", "kv"])
    @pytest.mark.parametrize("case", CASES)
    def test_proposal_is_valid(self, case: str, graph_heads: str) -> None:
        """The right kind, shape, dtype and range; slices in increasing position; scores, if any, exact."""
        inputs = make_inputs(**CASES[case])
        if self.refuses(inputs, graph_heads=graph_heads):
            return
        proposals, ctx = self.propose(inputs, graph_heads)
        for proposal in proposals:
            if isinstance(proposal, Ranges):
                assert _slices_increase(proposal), "keys within a slice must come in strictly increasing position"
            if isinstance(proposal, Candidates) and proposal.scores is not None:
                _assert_scores_exact(proposal.indices, proposal.scores, ctx)
        self.route(self.router(inputs, alone=True, graph_heads=graph_heads), inputs).validate()

    @pytest.mark.parametrize("graph_heads", ["query", "kv"])
    @pytest.mark.parametrize("case", [name for name in CASES if "length-1" not in name and "padded" not in name])
    def test_graph_is_not_empty(self, case: str, graph_heads: str) -> None:
        """Every graph head gets neighbors, and others than the query itself unless that is all the source is for.

        Padded inputs are left out: a fixed pattern may point at nothing but padding there.
        """
        inputs = make_inputs(**CASES[case])
        if self.refuses(inputs, graph_heads=graph_heads):
            return
        edges = self.route(self.router(inputs, alone=True, graph_heads=graph_heads), inputs).to_dense_mask()
        if not inputs.cross and self.propose(inputs, graph_heads)[0] != [Band(0, 0)]:
            positions = inputs.edge_mask().positions
            own = positions[..., None] == torch.arange(inputs.keys)
            edges = edges & ~own[:, None]
        assert bool(edges.any(dim=(2, 3)).all()), f"source {self.source!r} proposes nothing for a graph head"

    def test_unknown_option_is_refused(self) -> None:
        """An option that the source does not declare is an error that lists those that it does."""
        layer = layer_spec(self.config(make_inputs()))
        with pytest.raises(UnknownOptionError, match="no_such_option"):
            create_source(self.source, self.source_class(), layer, {**self.options, "no_such_option": 1})

    # -- attention -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("case", CASES)
    def test_equals_dense_attention_under_its_mask(self, case: str) -> None:
        """Forward and all gradients, in float64; summaries, if any, are pseudo-keys beside the keys."""
        inputs = make_inputs(**CASES[case])
        if self.refuses(inputs):
            return
        sparse, dense = inputs.with_grad(), inputs.with_grad()
        out, graph = self.attend(sparse)
        expected = graph_attention(dense.q, dense.k, dense.v, graph)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        for name in ("q", "k", "v"):
            got, want = getattr(sparse, name).grad, getattr(dense, name).grad
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=f"the gradient of {name} is wrong")

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_low_precision(self, dtype: torch.dtype, causal: bool) -> None:
        """Every dtype of attention: a valid graph, and finite output of that dtype."""
        inputs = make_inputs(causal=causal, queries=65).to(dtype)
        if self.refuses(inputs):
            return
        out, _ = self.attend(inputs)
        assert out.dtype == dtype
        assert bool(torch.isfinite(out).all())

    # -- what must not be seen -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("change", ["shifted", "scaled"])
    @pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
    def test_future_is_not_seen(self, packed: bool, change: str) -> None:
        """Causal: changing tokens changes no bit of what earlier queries get."""
        inputs = make_inputs(queries=65, causal=True, packed=packed)
        if self.refuses(inputs):
            return
        before = self.attend(inputs)
        for first in (1, 16, 17, 33, 50, 64):
            future = (torch.arange(65) >= first).expand(inputs.batch, -1)
            after = self.attend(inputs.changed(future, _CHANGES[change](inputs)))
            self._assert_same(before, after, ~future, f"tokens from {first} on")

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize("value", ["shifted", "nan", "inf"])
    def test_padding_is_not_seen(self, value: str, causal: bool) -> None:
        """Whatever stands in padded tokens, not a number included, changes no bit of what real queries get."""
        inputs = make_inputs(queries=65, batch=4, causal=causal, padded=True)
        if self.refuses(inputs):
            return
        assert inputs.key_padding_mask is not None
        before = self.attend(inputs)
        after = self.attend(inputs.changed(~inputs.key_padding_mask, _CHANGES[value](inputs)))
        self._assert_same(before, after, inputs.key_padding_mask, "padded tokens")

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize("change", ["shifted", "scaled"])
    def test_other_documents_are_not_seen(self, change: str, causal: bool) -> None:
        """Changing one packed document changes no bit of what the others get."""
        inputs = make_inputs(queries=65, causal=causal, packed=True)
        if self.refuses(inputs):
            return
        assert inputs.segment_ids is not None
        before = self.attend(inputs)
        for document in inputs.segment_ids.unique():
            tokens = inputs.segment_ids == document
            after = self.attend(inputs.changed(tokens, _CHANGES[change](inputs)))
            self._assert_same(before, after, ~tokens, f"document {int(document)}")

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    def test_other_batch_elements_are_not_seen(self, causal: bool) -> None:
        """Changing one batch element changes no bit of what the others get."""
        inputs = make_inputs(queries=65, causal=causal, batch=3)
        if self.refuses(inputs):
            return
        tokens = torch.tensor([False, True, False])[:, None].expand(-1, 65)
        before, after = self.attend(inputs), self.attend(inputs.changed(tokens, _CHANGES["scaled"](inputs)))
        self._assert_same(before, after, ~tokens, "batch element 1")

    def _assert_same(
        self,
        before: tuple[Tensor, NeighborGraph],
        after: tuple[Tensor, NeighborGraph],
        queries: Tensor,
        what: str,
    ) -> None:
        """Equal graphs and bit-equal outputs for ``queries``, bool ``[B, N]``."""
        rows = queries[:, None, :, None]
        same_graph = (before[1].to_dense_mask() == after[1].to_dense_mask()) | ~rows
        assert bool(same_graph.all()), f"changing {what} changes the neighbors of others"
        same_output = (before[0] == after[0]) | ~rows
        assert bool(same_output.all()), f"changing {what} changes the output of others"

    # -- decoding ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("graph_heads", ["query", "kv"])
    @pytest.mark.parametrize("chunks", DECODE_CHUNKS)
    @pytest.mark.parametrize("case", ["one-document", "multi-query", "padded"])
    def test_decode_equals_prefill(self, case: str, chunks: str, graph_heads: str) -> None:
        """Tokens that join a cache one by one, in chunks or all at once have the neighbors and the output that they
        have in one call without a cache."""
        inputs = make_inputs(**_DECODE_CASES[case])
        if self.refuses(inputs, graph_heads=graph_heads):
            return
        router, cache = self.router(inputs, graph_heads=graph_heads), LayerCache()
        decoded = self.decode(router, cache, inputs, DECODE_CHUNKS[chunks])
        self._assert_decoded(decoded, self._prefill(router, inputs), inputs)

    @pytest.mark.parametrize("case", ["one-document", "padded"])
    def test_crop_forgets(self, case: str) -> None:
        """After `LayerCache.crop` other tokens may follow, and get what they get behind the tokens that remain."""
        inputs = make_inputs(**_DECODE_CASES[case])
        if self.refuses(inputs):
            return
        router, cache = self.router(inputs), LayerCache()
        tail = torch.arange(inputs.keys) >= 30
        self.decode(router, cache, inputs.changed(tail.expand(inputs.batch, -1), _shifted(inputs)), (50, 3, 1, 11))
        expected = self._prefill(router, inputs)
        for kept, chunks in ((47, ()), (30, (1, 2, 30, 2)), (64, (1,)), (7, (9, 40, 1, 8)), (0, (65,))):
            cache.crop(kept)
            if chunks:
                decoded = self.decode(router, cache, inputs, chunks)
                self._assert_decoded(decoded, expected, inputs, first=kept)

    @pytest.mark.parametrize("case", ["one-document", "padded"])
    def test_reorder_moves_batch_elements(self, case: str) -> None:
        """After `LayerCache.reorder` every batch element goes on with the past of the element that it was made of."""
        inputs = make_inputs(**_DECODE_CASES[case])
        if self.refuses(inputs):
            return
        for order in ((1, 0, *range(2, inputs.batch)), (1, 1, 0, 1), (1,)):
            router, cache = self.router(inputs), LayerCache()
            self.decode(router, cache, inputs, (20, 1, 19))
            cache.reorder(order)
            moved = inputs.elements(order)
            decoded = self.decode(router, cache, moved, (1, 3, 21))
            self._assert_decoded(decoded, self._prefill(router, moved), moved, first=40)

    def decode(
        self, router: Router, cache: LayerCache, inputs: AttentionInputs, chunks: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens of ``inputs`` behind those that are cached, in chunks of these lengths.

        Returns: their output ``[B, H, N, D]``, and their neighbors, bool ``[B, H, N, M]``.
        """
        outs, masks = [], []
        told = self.source_inputs(inputs)
        for length in chunks:
            rows = slice(cache.length, cache.length + length)
            keep = inputs.key_padding_mask
            out, graph = attend_cached(
                router,
                cache,
                *(x[:, :, rows] for x in (inputs.q, inputs.k, inputs.v)),
                key_keep=None if keep is None else keep[:, rows],
                source_inputs=None if told is None else {self.source: told},
            )
            assert graph is not None
            graph.validate()
            outs.append(out)
            masks.append(torch.nn.functional.pad(graph.to_dense_mask(), (0, inputs.keys - cache.length)))
        return torch.cat(outs, dim=2), torch.cat(masks, dim=2)

    def _prefill(self, router: Router, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        graph = self.route(router, inputs)
        out = sparse_attention(inputs.q, inputs.k, inputs.v, enable_gqa=True, graph=graph)
        return out, graph.to_dense_mask()

    def _assert_decoded(
        self, decoded: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], inputs: AttentionInputs, first: int = 0
    ) -> None:
        """What real tokens from ``first`` on have got."""
        out, mask = (x[:, :, first:] for x in expected)
        real = torch.ones((inputs.batch, inputs.keys), dtype=torch.bool)
        if inputs.key_padding_mask is not None:
            real = inputs.key_padding_mask
        rows = real[:, first:, None].expand(-1, -1, mask.shape[1]).transpose(1, 2)
        wrong = ((decoded[1] != mask).any(-1) & rows).nonzero()
        assert not wrong.numel(), (
            f"source {self.source!r}: token {int(wrong[0, 2]) + first} has other neighbors on a cache than in one call "
            f"(batch element {int(wrong[0, 0])}, head {int(wrong[0, 1])})"
        )
        torch.testing.assert_close(decoded[0][rows], out[rows], rtol=0, atol=1e-6)

    # -- repeatability -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    def test_same_seed_same_graph(self, causal: bool) -> None:
        """Two constructions agree, whatever the global random state."""
        inputs = make_inputs(queries=65, causal=causal)
        if self.refuses(inputs):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = self.route(self.router(inputs), inputs)
            torch.manual_seed(2)
            second = self.route(self.router(inputs), inputs)
        assert torch.equal(first.to_dense_mask(), second.to_dense_mask()), "the same seed gives two graphs"

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    def test_calls_leave_no_trace(self, causal: bool) -> None:
        """A call does not modify q and k, and does not change what the next one gets."""
        inputs = make_inputs(queries=65, causal=causal)
        if self.refuses(inputs):
            return
        others = make_inputs(queries=33, causal=causal, seed=1)
        q, k = inputs.q.clone(), inputs.k.clone()
        router = self.router(inputs)
        first = self.route(router, inputs).to_dense_mask()
        self.route(router, others)
        again = self.route(router, inputs).to_dense_mask()
        assert torch.equal(inputs.q, q), "propose() modified the queries"
        assert torch.equal(inputs.k, k), "propose() modified the keys"
        assert torch.equal(first, again), "a second call gives another graph"

    def test_state_dict_restores_the_graph(self) -> None:
        """Everything in the state dict comes back from it, and nothing that routing needs is missing from it."""
        inputs = make_inputs(queries=65)
        if self.refuses(inputs):
            return
        router, restored = self.router(inputs), self.router(inputs)
        state = {name: value.clone() for name, value in router.state_dict().items() if isinstance(value, Tensor)}
        for value in restored.state_dict().values():
            if isinstance(value, Tensor):
                value.zero_()
        restored.load_state_dict(state)
        assert torch.equal(self.route(router, inputs).to_dense_mask(), self.route(restored, inputs).to_dense_mask())

    def test_global_random_state_is_untouched(self) -> None:
        """Randomness comes from the layer's seed, at construction and in a call."""
        inputs = make_inputs(queries=65)
        if self.refuses(inputs):
            return
        before = torch.random.get_rng_state()
        router = self.router(inputs)
        assert torch.equal(torch.random.get_rng_state(), before), "construction draws from the global generator"
        self.route(router, inputs)
        assert torch.equal(torch.random.get_rng_state(), before), "propose() draws from the global generator"


def _shifted(inputs: AttentionInputs) -> Tensor:
    noise = torch.randn(inputs.head_dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return 4.0 + 2.0 * noise


def _scaled(inputs: AttentionInputs) -> Tensor:
    return -30.0 * torch.linspace(-1.0, 1.0, inputs.head_dim, dtype=torch.float64)


_CHANGES: dict[str, Any] = {
    "shifted": _shifted,
    "scaled": _scaled,
    "nan": lambda inputs: float("nan"),
    "inf": lambda inputs: float("inf"),
}


def _slices_increase(ranges: Ranges) -> bool:
    """Whether the keys of every slice come in strictly increasing position."""
    if ranges.order is None:
        return True
    order = ranges.order.long()
    length = order.shape[-1]
    falls = torch.zeros((*order.shape[:-1], length + 1), dtype=torch.int64, device=order.device)
    falls[..., 2:] = (order[..., 1:] <= order[..., :-1]).cumsum(-1)
    if ranges.start is None or ranges.end is None:
        return not bool(falls[..., -1].any())
    # [B, G, N, S, P] → [B, G, S, N, P], so that the slices of an order lie beside it
    start, end = (bound.long().transpose(2, 3) for bound in (ranges.start, ranges.end))
    shape = torch.broadcast_shapes(start.shape[:3], falls.shape[:3])
    falls = falls.expand(*shape, -1)
    start, end = (bound.expand(*shape, -1, -1).flatten(3) for bound in (start, end))
    inside = falls.gather(-1, end) - falls.gather(-1, (start + 1).clamp(max=length))
    return not bool((inside[end > start] > 0).any())


def _assert_scores_exact(indices: Tensor, scores: Tensor, ctx: RoutingContext) -> None:
    exact = ctx.q.float() @ ctx.k.float().transpose(-1, -2)
    filled = (indices >= 0).expand(*exact.shape[:3], -1)
    want = exact.gather(-1, indices.clamp(min=0).long().expand_as(filled))
    torch.testing.assert_close(scores.float().expand_as(want)[filled], want[filled], rtol=1e-3, atol=1e-3)
