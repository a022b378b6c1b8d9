"""The contract suite: every built-in source passes it, and deliberately broken sources do not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ssa_framework.plugin import (
    Band,
    Candidates,
    ConfigError,
    LayerSpec,
    NeighborSource,
    Proposal,
    Ranges,
    RoutingContext,
)
from ssa_framework.registry import SourceRegistry
from ssa_framework.testing import AttentionInputs, SourceContract

# -- built-in sources --------------------------------------------------------------------------------------------


class TestSelf(SourceContract):
    source = "self"


class TestWindow(SourceContract):
    source = "window"
    options: ClassVar = {"size": 3}


class TestGlobalTokens(SourceContract):
    source = "global"
    options: ClassVar = {"tokens": 2}


class TestGlobalIndices(SourceContract):
    source = "global"
    options: ClassVar = {"indices": [0, 5, 22, 1000]}


class TestTopK(SourceContract):
    source = "topk"


class TestRandom(SourceContract):
    source = "random"
    options: ClassVar = {"links": 5}


class TestRandomShared(SourceContract):
    source = "random"
    options: ClassVar = {"per_head": False}


class TestStrided(SourceContract):
    source = "strided"
    options: ClassVar = {"stride": 4}


class TestStridedCount(SourceContract):
    source = "strided"
    options: ClassVar = {"stride": 7, "count": 2}


class TestStridedFixed(SourceContract):
    source = "strided"
    options: ClassVar = {"stride": 4, "pattern": "fixed"}


class TestEdges(SourceContract):
    """A ring: every query attends the two rows before its own and the one after, by an edge list with each call."""

    source = "edges"
    num_neighbors = 24

    def source_inputs(self, inputs: AttentionInputs) -> Tensor:
        queries = torch.arange(inputs.queries).repeat_interleave(3)
        keys = (queries + torch.tensor([-2, -1, 1]).repeat(inputs.queries)) % inputs.keys
        return torch.stack([queries, keys])


class TestEdgesOfEachElement(TestEdges):
    """The ring turned by the number of the batch element."""

    def source_inputs(self, inputs: AttentionInputs) -> Tensor:
        queries, keys = super().source_inputs(inputs).repeat(1, inputs.batch)
        batch = torch.arange(inputs.batch).repeat_interleave(inputs.queries * 3)
        return torch.stack([batch, queries, (keys + batch) % inputs.keys])


class TestEdgesCSR(TestEdges):
    source = "edges"

    def source_inputs(self, inputs: AttentionInputs) -> dict[str, Any]:  # type: ignore[override]
        queries, keys = super().source_inputs(inputs)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), queries.bincount().cumsum(0)])
        return {"csr": (indptr, keys)}


class TestFaissFlat(SourceContract):
    source = "faiss"
    options: ClassVar = {"block": 8}


class TestFaissIVF(SourceContract):
    """Trained on the first 16 keys if causal; with fewer keys than that, exact."""

    source = "faiss"
    options: ClassVar = {"index": "IVF4,Flat", "nprobe": 2, "train_size": 16, "block": 8}


class TestFaissHNSW(SourceContract):
    source = "faiss"
    options: ClassVar = {"index": "HNSW4", "ef_search": 8, "block": 8}


class TestFaissGraphBuiltAtOnce(SourceContract):
    source = "faiss"
    options: ClassVar = {"index": "NSG16"}
    unsupported: ClassVar = frozenset({"causal"})


class TestLSHHyperplane(SourceContract):
    source = "lsh"
    options: ClassVar = {"rounds": 2, "candidates": 4}


class TestLSHCrossPolytope(SourceContract):
    source = "lsh"
    options: ClassVar = {"rounds": 2, "candidates": 4, "hash": "cross_polytope"}


class TestLSHProbes(SourceContract):
    source = "lsh"
    options: ClassVar = {"rounds": 2, "probes": 3, "candidates": 6, "seed": 3}


class TestLSHCrossPolytopeProbes(SourceContract):
    source = "lsh"
    options: ClassVar = {"rounds": 3, "probes": 2, "candidates": 6, "hash": "cross_polytope"}


class TestLSHNotCentred(SourceContract):
    source = "lsh"
    options: ClassVar = {"rounds": 2, "candidates": 4, "max_planes": 3, "center": False}


class TestClusters(SourceContract):
    """Several full segments, and a rest; summaries."""

    source = "clusters"
    options: ClassVar = {"levels": [[8, 2]], "keys": 6, "iterations": 2}


class TestClustersOfTwoLevels(SourceContract):
    source = "clusters"
    options: ClassVar = {"levels": [[4, 2], [16, 4]], "keys": 6}


class TestClustersWithoutSummaries(SourceContract):
    source = "clusters"
    options: ClassVar = {"levels": [[8, 2]], "keys": 6, "summaries": False}


class TestClustersBestKeys(SourceContract):
    source = "clusters"
    options: ClassVar = {"levels": [[8, 2]], "keys": 6, "attend": "topk", "summaries": False}


class TestClustersBestKeysAndSummaries(SourceContract):
    source = "clusters"
    options: ClassVar = {"levels": [[8, 2]], "keys": 6, "attend": "topk"}


class TestBlocks(SourceContract):
    source = "blocks"
    options: ClassVar = {"size": 4, "keys": 8}


class TestBlocksWithSummaries(SourceContract):
    source = "blocks"
    options: ClassVar = {"size": 4, "keys": 8, "attend": "all", "summaries": True}


class TestBlocksByMean(SourceContract):
    source = "blocks"
    options: ClassVar = {"size": 3, "keys": 7, "rank": "mean", "attend": "all"}


class TestClustersOfOneKey(SourceContract):
    source = "clusters"
    options: ClassVar = {"levels": [[5, 1]], "keys": 3}


class TestClustersOfShortSequences(SourceContract):
    """No segment is ever full."""

    source = "clusters"
    options: ClassVar = {"levels": [[1000, 10]]}


# -- broken sources ----------------------------------------------------------------------------------------------


EVERY_TEST = sorted(name for name in dir(SourceContract) if name.startswith("test_"))


def run_contract(contract: type[SourceContract], names: Iterable[str] = EVERY_TEST) -> dict[str, str]:
    """Tests of the contract as pytest would run them: ``"test[ids]"`` → message, of those that fail."""
    failures = {}
    for name in names:
        marks = getattr(getattr(contract, name), "pytestmark", [])
        choices = [[(mark.args[0], value) for value in mark.args[1]] for mark in marks]
        for arguments in itertools.product(*choices):
            try:
                getattr(contract(), name)(**dict(arguments))
            except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - a broken source may raise anything
                label = f"{name}[{'-'.join(str(value) for _, value in arguments)}]"
                failures[label] = f"{type(error).__name__}: {error}"
    return failures


def contract_of(source_class: type[NeighborSource], **attributes: Any) -> type[SourceContract]:
    """The contract of a source that is registered under the name ``broken`` and nowhere else."""
    registry = SourceRegistry(plugins=[])
    registry.register("broken", source_class)
    return type("BrokenContract", (SourceContract,), {"source": "broken", "registry": registry, **attributes})


def failing_tests(failures: dict[str, str]) -> set[str]:
    return {label.partition("[")[0] for label in failures}


class Healthy(NeighborSource):
    """Every key: nothing that the contract could object to."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        return Ranges.everything()


class SortsByAllKeys(NeighborSource):
    """Leaks: the four longest keys of the whole sequence, of which the router keeps the past ones."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        longest = ctx.k.nan_to_num().norm(dim=-1).topk(min(4, ctx.num_keys), dim=-1).indices
        return Candidates(longest[:, :, None].to(torch.int32))


class CentresOnAllKeys(NeighborSource):
    """Leaks: hashes keys relative to the mean of all of them; in one plane, with the largest code first."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        above = (ctx.k - ctx.k.mean(dim=2, keepdim=True))[..., 0] > 0
        order = (~above).int().argsort(dim=-1, stable=True)[:, :, None].to(torch.int32)
        end = above.sum(-1).to(torch.int32)[:, :, None, None, None]
        return Ranges(order, torch.zeros_like(end), end)


class OutOfRange(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Proposal:
        return Candidates(torch.full((1, 1, 1, 2), ctx.num_keys, dtype=torch.int32))


class WrongDtype(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Proposal:
        return Candidates(torch.zeros((1, 1, 1, 2)))


class WrongShape(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Proposal:
        return Candidates(torch.zeros((ctx.num_queries, 2), dtype=torch.int32))


class NotAProposal(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Proposal:
        return None  # type: ignore[return-value]


class GlobalRandomness(NeighborSource):
    """Nondeterministic: other links in every call."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        return Candidates(torch.randint(ctx.num_keys, (1, 1, ctx.num_queries, 3), dtype=torch.int32))


class RandomConstruction(NeighborSource):
    """Its key numbers are drawn at construction from the global generator, and missing from the state dict."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__(layer)
        self.register_buffer("fractions", torch.rand(6), persistent=False)

    def propose(self, ctx: RoutingContext) -> Proposal:
        keys = (self.fractions * ctx.num_keys).to(torch.int32)  # type: ignore[operator]
        return Candidates(keys.view(1, 1, 1, -1))


class Empty(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Proposal:
        return Candidates(torch.full((1, 1, 1, 1), -1, dtype=torch.int32))


class EmptyForSharedGraphs(NeighborSource):
    """Gives up in silence where the graph is shared by a KV group."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        if self.layer.graph_heads != self.layer.num_heads:
            return Candidates(torch.full((1, 1, 1, 1), -1, dtype=torch.int32))
        return Ranges.everything()


class FallingSlices(NeighborSource):
    """The slices of its order come in falling position, so that causal cuts take the wrong end."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        order = torch.arange(ctx.num_keys - 1, -1, -1, dtype=torch.int32).view(1, 1, 1, -1)
        return Ranges(order, None, None)


class ScalesItsInput(NeighborSource):
    """Normalises the queries in place."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        ctx.q.mul_(0.5)
        return Ranges.everything()


class Remembers(NeighborSource):
    """Proposes what the previous call should have got."""

    last = 0

    def propose(self, ctx: RoutingContext) -> Proposal:
        previous, self.last = self.last, ctx.num_keys // 2
        return Candidates(torch.tensor([[[[0, min(previous, ctx.num_keys - 1)]]]], dtype=torch.int32))


class RefusesWithoutSayingSo(NeighborSource):
    """Cannot do cross-attention, and the contract was not told."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        if ctx.num_keys != ctx.num_queries:
            raise ConfigError("broken: only square")
        return Ranges.everything()


class SwallowsOptions(NeighborSource):
    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        return dict.fromkeys(["no_such_option"])

    def __init__(self, layer: LayerSpec, **options: Any) -> None:
        super().__init__(layer)

    def propose(self, ctx: RoutingContext) -> Proposal:
        return Ranges.everything()


class WrongScores(NeighborSource):
    """Reports scores that are not ``q·k``."""

    def propose(self, ctx: RoutingContext) -> Proposal:
        keys = torch.arange(ctx.num_keys, dtype=torch.int32).expand(ctx.batch, ctx.graph_heads, ctx.num_queries, -1)
        return Candidates(keys, scores=torch.zeros(keys.shape))


class BandWithoutPositions(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Proposal:
        return Band(2, 2)


def test_a_healthy_source_passes() -> None:
    assert run_contract(contract_of(Healthy)) == {}


@pytest.mark.parametrize(
    ("source_class", "expected"),
    [
        pytest.param(SortsByAllKeys, {"test_future_is_not_seen"}, id="leaks-the-longest-keys"),
        pytest.param(CentresOnAllKeys, {"test_future_is_not_seen"}, id="leaks-a-mean"),
        pytest.param(OutOfRange, {"test_proposal_is_valid"}, id="out-of-range"),
        pytest.param(WrongDtype, {"test_proposal_is_valid"}, id="wrong-dtype"),
        pytest.param(WrongShape, {"test_proposal_is_valid"}, id="wrong-shape"),
        pytest.param(NotAProposal, {"test_proposal_is_valid"}, id="not-a-proposal"),
        pytest.param(
            GlobalRandomness,
            {"test_same_seed_same_graph", "test_calls_leave_no_trace", "test_global_random_state_is_untouched"},
            id="nondeterministic",
        ),
        pytest.param(
            RandomConstruction,
            {
                "test_same_seed_same_graph",
                "test_state_dict_restores_the_graph",
                "test_global_random_state_is_untouched",
            },
            id="random-construction",
        ),
        pytest.param(Empty, {"test_graph_is_not_empty"}, id="empty"),
        pytest.param(EmptyForSharedGraphs, {"test_graph_is_not_empty"}, id="empty-for-shared-graphs"),
        pytest.param(FallingSlices, {"test_proposal_is_valid"}, id="falling-slices"),
        pytest.param(ScalesItsInput, {"test_calls_leave_no_trace"}, id="modifies-its-input"),
        pytest.param(Remembers, {"test_calls_leave_no_trace"}, id="remembers"),
        pytest.param(RefusesWithoutSayingSo, {"test_proposal_is_valid"}, id="refuses-without-saying-so"),
        pytest.param(SwallowsOptions, {"test_unknown_option_is_refused"}, id="swallows-options"),
        pytest.param(WrongScores, {"test_proposal_is_valid"}, id="wrong-scores"),
        pytest.param(BandWithoutPositions, {"test_graph_is_not_empty"}, id="band-without-positions"),
    ],
)
def test_a_broken_source_fails(source_class: type[NeighborSource], expected: set[str]) -> None:
    assert failing_tests(run_contract(contract_of(source_class), expected)) == expected


def test_a_source_that_serves_what_it_claims_to_refuse_fails() -> None:
    failures = run_contract(contract_of(Healthy, unsupported=frozenset({"causal"})))
    assert "test_future_is_not_seen" in failing_tests(failures)
    assert all("DID NOT RAISE" in message for message in failures.values()), failures


@pytest.mark.parametrize(
    ("source_class", "test", "message"),
    [
        pytest.param(
            OutOfRange,
            "test_proposal_is_valid",
            r"Candidates\.indices must lie in \[-1, 62\], got values in \[63, 63\]",
            id="range",
        ),
        pytest.param(
            WrongDtype, "test_proposal_is_valid", r"Candidates\.indices must be int32 .* got torch\.float32", id="dtype"
        ),
        pytest.param(
            WrongShape, "test_proposal_is_valid", r"Candidates\.indices must have shape .* got \[63, 2\]", id="shape"
        ),
        pytest.param(
            NotAProposal,
            "test_proposal_is_valid",
            r"must return Band, Columns, Spans, .* several of them, got NoneType",
            id="kind",
        ),
        pytest.param(Empty, "test_graph_is_not_empty", r"source 'broken' proposes nothing", id="empty"),
        pytest.param(
            SortsByAllKeys,
            "test_future_is_not_seen",
            r"changing tokens from \d+ on changes the neighbors of others",
            id="leak",
        ),
        pytest.param(
            GlobalRandomness, "test_same_seed_same_graph", r"the same seed gives two graphs", id="nondeterministic"
        ),
    ],
)
def test_failures_say_what_is_wrong(source_class: type[NeighborSource], test: str, message: str) -> None:
    failures = "\n".join(run_contract(contract_of(source_class), [test]).values())
    assert re.search(message, failures), failures
