"""The clusters source: what a query looks at, documents and padding, options, and that it finds what it should."""

import pytest
import torch
from torch import Tensor

from ssa_framework import SparseAttention, SSAConfig, build_graph
from ssa_framework.errors import ConfigError
from ssa_framework.masks import make_edge_mask
from ssa_framework.plugin import Ranges, RoutingContext, cluster_keys
from ssa_framework.source import LayerSpec
from ssa_plugins.clusters import Clusters

OPTIONS = {"segment": 16, "cluster": 4, "keys": 8, "iterations": 3}


def proposal(q: Tensor, k: Tensor, causal: bool, *, options: dict = OPTIONS, **mask: Tensor) -> Ranges:
    heads, kv_heads = q.shape[1], k.shape[1]
    layer = LayerSpec(head_dim=8, num_heads=heads, num_kv_heads=kv_heads, graph_heads=heads, num_neighbors=4)
    edges = make_edge_mask(
        batch=q.shape[0], heads=heads, queries=q.shape[2], keys=k.shape[2], device=q.device, causal=causal, **mask
    )
    return Clusters(layer, **options).propose(RoutingContext(q=q, shared_k=k, mask=edges, budget=4))


def looked_at(ranges: Ranges, batch: int, head: int, row: int) -> list[int]:
    order, start, end = ranges.order, ranges.start, ranges.end
    assert order is not None
    assert start is not None
    assert end is not None
    bounds = zip(start[batch, head, row, 0].tolist(), end[batch, head, row, 0].tolist(), strict=True)
    return sorted(key for low, high in bounds for key in order[batch, head, 0, low:high].tolist())


def expected(q: Tensor, k: Tensor, row: int, causal: bool, length: int) -> list[int]:
    """One query of one head, computed from the definition: ``q [N, D]``, ``k [M, D]``."""
    segments = k.shape[0] // length
    open_segments = row // length if causal else segments
    found = list(range(open_segments * length, row + 1 if causal else k.shape[0]))
    starts = torch.arange(segments, dtype=torch.int32)[None] * length
    clusters = cluster_keys(k[None, None], starts, length, max(1, round(length / 4)), iterations=3, capacity=8)
    slots = clusters.size.shape[2] // segments
    score = (clusters.centroids[0, 0] @ q[row]).masked_fill(clusters.size[0, 0] == 0, -torch.inf)
    score[open_segments * slots :] = -torch.inf
    room = 8
    for cluster in score.argsort(descending=True, stable=True).tolist():
        size = int(clusters.size[0, 0, cluster])
        if score[cluster] == -torch.inf or size > room:
            break
        first = int(clusters.start[0, 0, cluster])
        found += clusters.order[0, 0, first : first + size].tolist()
        room -= size
    return sorted(found)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [17, 64, 95])
def test_a_query_looks_at_its_own_segment_and_the_best_clusters(length: int, causal: bool) -> None:
    q, k = torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8)
    ranges = proposal(q, k, causal)
    size = 16 if causal else length // max(1, round(length / 16))
    for row in (0, 15, 16, 40, length - 1):
        if row < length:
            assert looked_at(ranges, 0, 1, row) == expected(q[0, 1], k[0, 0], row, causal, size)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_document_is_routed_as_if_it_were_alone(causal: bool) -> None:
    """Packed in turn, key by key, and beside padding."""
    q, k = torch.randn(1, 2, 160, 8), torch.randn(1, 1, 160, 8)
    ids = (torch.arange(160) % 3)[None]
    keep = (torch.arange(160) >= 7)[None]
    packed = proposal(q, k, causal, segment_ids=ids, key_padding_mask=keep)
    # the length of segments is not adapted to documents
    real = torch.ones(1, 1, dtype=torch.bool)
    for document in range(3):
        mine = ((ids == document) & keep)[0].nonzero()[:, 0]
        alone = proposal(q[:, :, mine], k[:, :, mine], causal, key_padding_mask=real.expand(1, mine.numel()))
        for row in (0, 20, 37, mine.numel() - 1):
            found = looked_at(packed, 0, 0, int(mine[row]))
            assert found == mine[looked_at(alone, 0, 0, row)].tolist()


def test_left_padding_of_unequal_lengths() -> None:
    q, k = torch.randn(2, 2, 100, 8), torch.randn(2, 1, 100, 8)
    keep = torch.arange(100)[None] >= torch.tensor([[0], [31]])
    both = proposal(q, k, True, key_padding_mask=keep)
    short = proposal(q[1:, :, 31:], k[1:, :, 31:], True)
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
    config = SSAConfig(sources={"self": {}, "clusters": {"segment": 256}}, num_neighbors=64)
    graph = build_graph(q, k, config=config, is_causal=causal)
    forbidden = torch.ones(4096, 4096, dtype=torch.bool).triu(1) if causal else torch.zeros(1, 1, dtype=torch.bool)
    top = (q @ k.transpose(-1, -2)).masked_fill(forbidden, -torch.inf)[:, :, 512:].topk(16, dim=-1).indices
    recall = graph.to_dense_mask()[:, :, 512:].gather(-1, top).float().mean().item()
    assert recall > 0.9
    assert graph.keys_scored()["clusters"] < 410


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment must be an integer >= 1, got 0"),
        ({"cluster": 1.5}, "cluster must be an integer >= 1, got 1.5"),
        ({"keys": True}, "keys must be an integer >= 1, got True"),
        ({"iterations": -1}, "iterations must be an integer >= 0, got -1"),
        ({"segment": 16, "cluster": 32}, "a cluster of 32 keys is larger than a segment of 16"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseAttention(SSAConfig(d_model=32, num_heads=2, sources={"clusters": options}))
