"""Nothing grows with N·M: at 16,384 queries and keys, peak memory stays far below one boolean matrix."""

import pytest
import torch

from ssa_framework import SSAConfig, build_graph, sparse_attention
from ssa_framework.quality.memory import peak_memory

LENGTH = 16_384
ONE_BYTE_PER_PAIR = LENGTH * LENGTH  # 256 MiB: one boolean per query-key pair, of one head
LIMIT = ONE_BYTE_PER_PAIR * 3 // 4

MIXES = {
    "seed": None,
    "lsh-cross-polytope-probes": {"self": {}, "lsh": {"hash": "cross_polytope", "probes": 8, "rounds": 4}},
    "fixed": {"self": {}, "window": {"size": 12}, "global": {"tokens": 2}, "random": {}, "strided": {}},
}


def inputs(grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 1, LENGTH, 16, requires_grad=grad) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_forward_and_backward(mix: dict | None, causal: bool) -> None:
    q, k, v = inputs(grad=True)
    config = SSAConfig(sources=mix, num_neighbors=64)

    def run() -> None:
        sparse_attention(q, k, v, config=config, is_causal=causal).sum().backward()

    assert peak_memory(run) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding", "packed", "mask_mod"])
def test_masks(kind: str) -> None:
    q, k, v = inputs()
    config = SSAConfig(num_neighbors=64, num_hash_rounds=2)
    places = torch.arange(LENGTH)[None]
    options = {
        "padding": {"key_padding_mask": places < LENGTH - 100},
        "packed": {"segment_ids": places // 4096},
        "mask_mod": {"mask_mod": lambda b, h, i, j: (i - j) % 2 == 0},
    }[kind]
    assert peak_memory(lambda: sparse_attention(q, k, v, config=config, is_causal=True, **options)) < LIMIT


@pytest.mark.slow
def test_exact_topk_and_dense_fallback() -> None:
    q, k, v = inputs()
    padding = {"key_padding_mask": torch.arange(LENGTH)[None] < LENGTH - 100}
    topk = SSAConfig(sources={"self": {}, "topk": {}}, num_neighbors=32)
    dense = SSAConfig(dense_below=10**9)
    assert peak_memory(lambda: sparse_attention(q, k, v, config=topk, is_causal=True)) < LIMIT
    assert peak_memory(lambda: sparse_attention(q, k, v, config=dense, is_causal=True, **padding)) < LIMIT


def test_views_are_linear() -> None:
    q, k, _ = inputs()
    graph = build_graph(q, k, config=SSAConfig(sources={"window": {"size": 8}, "global": {}}, num_neighbors=32))
    assert peak_memory(graph.as_lists) < LIMIT
    assert peak_memory(graph.degree) < LIMIT
    assert peak_memory(graph.to_csr) < LIMIT
    assert peak_memory(lambda: graph.overlap(graph)) < LIMIT
    assert peak_memory(graph.slots_by_source) < LIMIT
