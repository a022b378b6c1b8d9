"""The clusters source: what a query looks at, documents and padding, options, and that it finds what it should."""

import pytest
import torch
from torch import Tensor

from ssa_framework import NeighborGraph, SparseAttention, SSAConfig, build_graph, sparse_attention
from ssa_framework.errors import ConfigError
from ssa_framework.plugin import cluster_keys

OPTIONS = {"levels": [[16, 4]], "keys": 8, "iterations": 3}
TWO_LEVELS = OPTIONS | {"levels": [[8, 2], [32, 4]]}
MODES = [{}, {"levels": [[8, 2], [32, 4]]}, {"summaries": False}, {"attend": "topk"}]


def graph_of(q: Tensor, k: Tensor, causal: bool, *, options: dict = OPTIONS, **mask: Tensor) -> NeighborGraph:
    config = SSAConfig(sources={"clusters": options}, num_neighbors=4)
    return build_graph(q, k, config=config, is_causal=causal, **mask)


def looked_at(graph: NeighborGraph, batch: int, head: int, row: int) -> list[int]:
    return graph.to_dense_mask()[batch, head, row].nonzero()[:, 0].tolist()


def expected(
    q: Tensor, k: Tensor, row: int, causal: bool, levels: list[tuple[int, int]]
) -> tuple[list[int], list[list[int]]]:
    """One query of one head, from the definition: ``q [N, D]``, ``k [M, D]``; its keys, and those of each summary."""
    seen: list[Tensor] = []
    end = row + 1 if causal else k.shape[0]
    begin = 0
    for segment, cluster in reversed(levels):
        while begin + segment <= (row if causal else end):
            clusters = cluster_keys(
                k[None, None], torch.tensor([[begin]]).int(), segment, round(segment / cluster), iterations=3,
                capacity=min(8, 2 * cluster),
            )  # fmt: skip
            starts, sizes = clusters.start[0, 0].tolist(), clusters.size[0, 0].tolist()
            seen += [clusters.order[0, 0, s : s + n].long() for s, n in zip(starts, sizes, strict=True) if n]
            begin += segment
    scale = 0.5 * k.shape[1] ** -0.5
    fit = [q[row] @ k[c].mean(0) + scale * (q[row].square() @ k[c].var(0, correction=0)) for c in seen]
    found, room, opened = list(range(begin, end)), 8, set()
    for number in torch.tensor(fit).argsort(descending=True).tolist():
        if len(seen[number]) > room:
            break
        found += seen[number].tolist()
        room -= len(seen[number])
        opened.add(number)
    return sorted(found), sorted(sorted(c.tolist()) for i, c in enumerate(seen) if i not in opened)


def summarised(graph: NeighborGraph, batch: int, head: int, row: int) -> list[list[int]]:
    assert graph.summaries is not None
    members = graph.summaries.members[batch, head * graph.summaries.members.shape[1] // graph.num_heads]
    numbers = graph.summary_mask()[batch, head, row].nonzero()[:, 0].tolist()
    return sorted((members == number).any(0).nonzero()[:, 0].tolist() for number in numbers)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("levels", [[(16, 4)], [(8, 2), (32, 4)], [(4, 2), (8, 2), (24, 4)]], ids=str)
@pytest.mark.parametrize("length", [17, 64, 95])
def test_a_query_looks_at_its_own_segment_and_the_best_clusters(
    length: int, levels: list[tuple[int, int]], causal: bool
) -> None:
    q, k = torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8)
    graph = graph_of(q, k, causal, options=OPTIONS | {"levels": levels})
    graph.validate()
    if not causal:  # one level, whose length is adapted
        segment, cluster = levels[0]
        levels = [(length // max(1, round(length / segment)), cluster)]
    for row in (0, 3, 4, 15, 16, 31, 32, 40, 63, 64, length - 1):
        if row < length:
            found, summaries = expected(q[0, 1], k[0, 0], row, causal, levels)
            assert looked_at(graph, 0, 1, row) == found
            assert summarised(graph, 0, 1, row) == summaries


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_document_is_routed_as_if_it_were_alone(causal: bool) -> None:
    """Packed in turn, key by key, and beside padding."""
    q, k = torch.randn(1, 2, 160, 8), torch.randn(1, 1, 160, 8)
    ids = (torch.arange(160) % 3)[None]
    keep = (torch.arange(160) >= 7)[None]
    packed = graph_of(q, k, causal, segment_ids=ids, key_padding_mask=keep)
    # the length of segments is not adapted to documents
    real = torch.ones(1, 1, dtype=torch.bool)
    for document in range(3):
        mine = ((ids == document) & keep)[0].nonzero()[:, 0]
        alone = graph_of(q[:, :, mine], k[:, :, mine], causal, key_padding_mask=real.expand(1, mine.numel()))
        for row in (0, 20, 37, mine.numel() - 1):
            found = looked_at(packed, 0, 0, int(mine[row]))
            assert found == mine[looked_at(alone, 0, 0, row)].tolist()


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_output_of_a_document_is_as_if_it_were_alone(causal: bool, options: dict) -> None:
    q, k, v = torch.randn(1, 4, 160, 8), torch.randn(1, 2, 160, 8), torch.randn(1, 2, 160, 8)
    ids = (torch.arange(160) % 3)[None]
    keep = (torch.arange(160) >= 7)[None]
    config = SSAConfig(sources={"clusters": OPTIONS | options}, num_neighbors=6)

    def attend(rows: Tensor, **mask: Tensor) -> Tensor:
        inputs = (x[:, :, rows] for x in (q, k, v))
        return sparse_attention(*inputs, config=config, is_causal=causal, enable_gqa=True, **mask)

    packed = attend(torch.arange(160), segment_ids=ids, key_padding_mask=keep)
    for document in range(3):
        mine = ((ids == document) & keep)[0].nonzero()[:, 0]
        alone = attend(mine, key_padding_mask=torch.ones(1, mine.numel(), dtype=torch.bool))
        torch.testing.assert_close(packed[:, :, mine], alone)


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("options", [OPTIONS, TWO_LEVELS], ids=["one-level", "two-levels"])
def test_every_cluster_is_opened_or_summarised(options: dict, causal: bool, graph_heads: str) -> None:
    """The keys that a query attends and the sizes of the summaries that it attends add up to all allowed keys."""
    q, k = torch.randn(2, 4, 100, 8), torch.randn(2, 2, 100, 8)
    config = SSAConfig(sources={"clusters": options}, num_neighbors=4, graph_heads=graph_heads)
    graph = build_graph(q, k, config=config, is_causal=causal)
    assert graph.summaries is not None
    number = torch.arange(graph.summaries.count)
    size = (graph.summaries.members[..., None] == number).sum((2, 3)).repeat_interleave(2, dim=1)
    seen = graph.summary_mask()
    kept = graph.to_dense_mask().sum(-1) + (seen * size[:, :, None]).sum(-1)
    allowed = torch.arange(1, 101) if causal else torch.full((100,), 100)
    assert torch.equal(kept, allowed.expand_as(kept))
    of_heads = seen if graph_heads == "query" else seen[:, ::2]
    assert torch.equal(graph.summaries_per_query(), of_heads.sum(-1))


def test_columns_are_in_no_summary() -> None:
    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 8)
    config = SSAConfig(sources={"global": {"indices": [0, 17]}, "clusters": OPTIONS}, num_neighbors=4)
    graph = build_graph(q, k, config=config, is_causal=True)
    assert graph.summaries is not None
    members = graph.summaries.members
    assert (members[..., [0, 17]] == -1).all()
    assert (members[..., [1, 16, 18, 95]] >= 0).all()


def test_summaries_need_masks_that_hide_no_single_key() -> None:
    q = torch.randn(1, 2, 100, 8)
    masks = [
        {"attn_mask": torch.ones(100, 100, dtype=torch.bool)},
        {"mask_mod": lambda b, h, i, j: i >= j},
    ]
    for mask in masks:
        with pytest.raises(ConfigError, match="'clusters' summarises keys, and attn_mask or mask_mod may hide"):
            graph_of(q, q, False, **mask)
        graph_of(q, q, False, options=OPTIONS | {"summaries": False}, **mask).validate()


def test_beside_listed_keys_everything_is_a_list() -> None:
    """What is attended is the union of what both sources alone would attend, each key once."""
    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 8)
    edges = {}
    for sources in ({"clusters": OPTIONS}, {"random": {"links": 3}}, {"clusters": OPTIONS, "random": {"links": 3}}):
        config = SSAConfig(sources=sources, num_neighbors=4)
        graph = build_graph(q, k, config=config, is_causal=True)
        graph.validate()
        edges[tuple(sources)] = graph.to_dense_mask()
        assert (graph.neighbors is None) == ("random" not in sources)
        assert sum(graph.slots_by_source().values()) == pytest.approx(float(graph.degree().float().mean()))
    assert torch.equal(edges["clusters", "random"], edges["clusters",] | edges["random",])


def test_left_padding_of_unequal_lengths() -> None:
    q, k = torch.randn(2, 2, 100, 8), torch.randn(2, 1, 100, 8)
    keep = torch.arange(100)[None] >= torch.tensor([[0], [31]])
    both = graph_of(q, k, True, key_padding_mask=keep)
    short = graph_of(q[1:, :, 31:], k[1:, :, 31:], True)
    for row in (31, 60, 99):
        assert looked_at(both, 1, 1, row) == [31 + key for key in looked_at(short, 0, 1, row - 31)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_finds_the_keys_of_a_topic(causal: bool) -> None:
    """Keys in runs of one topic, as in text: nearly all of the best keys, for a tenth of them scored."""
    generator = torch.Generator().manual_seed(0)
    topics = 3 * torch.randn(40, 32, generator=generator)
    topic = torch.randint(40, (128,), generator=generator).repeat_interleave(32)
    k = (topics[topic] + torch.randn(4096, 32, generator=generator))[None, None]
    q = (topics[topic] + torch.randn(4096, 32, generator=generator))[None, None]
    config = SSAConfig(sources={"self": {}, "clusters": {"levels": [[256, 32]], "attend": "topk"}}, num_neighbors=64)
    graph = build_graph(q, k, config=config, is_causal=causal)
    forbidden = torch.ones(4096, 4096, dtype=torch.bool).triu(1) if causal else torch.zeros(1, 1, dtype=torch.bool)
    top = (q @ k.transpose(-1, -2)).masked_fill(forbidden, -torch.inf)[:, :, 512:].topk(16, dim=-1).indices
    recall = graph.to_dense_mask()[:, :, 512:].gather(-1, top).float().mean().item()
    assert recall > 0.9
    assert graph.keys_scored()["clusters"] < 410


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, r"levels must be pairs of keys of a segment and keys per cluster, .* got \[\]"),
        ({"levels": "512"}, "got '512'"),
        ({"levels": [512, 16]}, "got 512"),
        ({"levels": [[512]]}, r"got \[512\]"),
        ({"levels": [[0, 1]]}, "0 is no integer >= 1"),
        ({"levels": [[16, 1.5]]}, "1.5 is no integer >= 1"),
        ({"levels": [[16, 4], [40, 8]]}, "segments of 40 keys are no larger multiple of 16"),
        ({"levels": [[16, 4], [16, 8]]}, "segments of 16 keys are no larger multiple of 16"),
        ({"keys": True}, "keys must be an integer >= 1, got True"),
        ({"iterations": -1}, "iterations must be an integer >= 0, got -1"),
        ({"levels": [[16, 32]]}, "a cluster of 32 keys is larger than a segment of 16"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseAttention(SSAConfig(d_model=32, num_heads=2, sources={"clusters": options}))
