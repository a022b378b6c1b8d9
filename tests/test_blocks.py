"""The blocks source: what a query looks at, and its options."""

import pytest
import torch
from torch import Tensor

from ssa_framework import SparseAttention, SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.masks import make_edge_mask
from ssa_framework.plugin import Ranges, RoutingContext
from ssa_framework.source import LayerSpec
from ssa_plugins.blocks import Blocks


def proposal(q: Tensor, k: Tensor, causal: bool, **options: object) -> Ranges:
    layer = LayerSpec(head_dim=8, num_heads=2, num_kv_heads=1, graph_heads=2, num_neighbors=4)
    edges = make_edge_mask(batch=1, heads=2, queries=q.shape[2], keys=k.shape[2], device=q.device, causal=causal)
    return Blocks(layer, **options).propose(RoutingContext(q=q, shared_k=k, mask=edges, budget=4))


@pytest.mark.parametrize("rank", ["bound", "mean"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_query_looks_at_its_own_block_and_the_best_ones(rank: str, causal: bool) -> None:
    q, k = torch.randn(1, 2, 51, 8), torch.randn(1, 1, 51, 8)
    ranges = proposal(q, k, causal, size=8, keys=17, rank=rank)
    assert ranges.order is not None
    assert ranges.start is not None
    assert ranges.end is not None
    blocks = k[0, 0, :48].unflatten(0, (6, 8))
    for row in (0, 7, 8, 30, 50):
        query = q[0, 1, row]
        scores = blocks.mean(1) @ query if rank == "mean" else (blocks * query).amax(1).sum(-1)
        full = row // 8 if causal else 6
        best = scores[:full].topk(min(2, full)).indices.tolist()
        want = [key for block in best for key in range(8 * block, 8 * block + 8)]
        want += list(range(8 * full, row + 1 if causal else 51))
        bounds = zip(ranges.start[0, 1, row, 0].tolist(), ranges.end[0, 1, row, 0].tolist(), strict=True)
        found = [key for low, high in bounds for key in ranges.order[0, 1, 0, low:high].tolist()]
        assert sorted(found) == sorted(want)


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
