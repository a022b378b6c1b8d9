"""The blocks source: what a query looks at, and its options."""

import pytest
import torch

from ssa_framework import SparseAttention, SSAConfig, build_graph
from ssa_framework.errors import ConfigError


@pytest.mark.parametrize("rank", ["bound", "mean"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_query_looks_at_its_own_block_and_the_best_ones(rank: str, causal: bool) -> None:
    q, k = torch.randn(1, 2, 51, 8), torch.randn(1, 1, 51, 8)
    options = {"size": 8, "keys": 17, "rank": rank, "attend": "all", "summaries": True}
    graph = build_graph(q, k, config=SSAConfig(sources={"blocks": options}, num_neighbors=4), is_causal=causal)
    graph.validate()
    edges, summaries = graph.to_dense_mask(), graph.summary_mask()
    blocks = k[0, 0, :48].unflatten(0, (6, 8))
    for row in (0, 7, 8, 30, 50):
        query = q[0, 1, row]
        scores = blocks.mean(1) @ query if rank == "mean" else (blocks * query).amax(1).sum(-1)
        full = row // 8 if causal else 6
        best = scores[:full].topk(min(2, full)).indices.tolist()
        want = [key for block in best for key in range(8 * block, 8 * block + 8)]
        want += list(range(8 * full, row + 1 if causal else 51))
        assert edges[0, 1, row].nonzero()[:, 0].tolist() == sorted(want)
        others = [block for block in range(full) if block not in best]
        assert summaries[0, 1, row].nonzero()[:, 0].tolist() == others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be an integer >= 1, got 0"),
        ({"keys": False}, "keys must be an integer >= 1, got False"),
        ({"rank": "max"}, "rank must be 'bound' or 'mean', got 'max'"),
        ({"size": 32, "keys": 16}, "keys must hold a block of 32 keys at least, got 16"),
        ({"attend": "some"}, "attend must be 'topk' or 'all', got 'some'"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseAttention(SSAConfig(d_model=32, num_heads=2, sources={"blocks": options}))
