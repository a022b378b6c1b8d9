"""`SparseAttention`: the layer, its API of the original project, and what it reports."""

import pytest
import torch
import torch.nn.functional as F

from ssa_framework import SourceRegistry, SparseAttention, SSAConfig, build_graph, sparse_attention
from ssa_framework.plugin import Candidates, NeighborSource, hookimpl

SEED_FIELDS = {
    "d_model": 512, "num_heads": 8, "num_kv_heads": None, "num_neighbors": 128, "max_num_hashes": 12,
    "num_hash_rounds": 8, "lsh_num_probes": 0, "window_size": 8, "num_global_tokens": 2,
    "global_token_indices": None, "dropout": 0.0, "causal": False, "fp32_attn_weights": False,
}  # fmt: skip


def test_defaults_of_the_original_are_kept() -> None:
    config = SSAConfig()
    assert {name: getattr(config, name) for name in SEED_FIELDS} == SEED_FIELDS
    assert config.source_mix == {
        "self": {},
        "window": {"size": 8},
        "global": {"tokens": 2},
        "lsh": {"rounds": 8, "probes": 0, "max_planes": 12},
    }
    assert SSAConfig(global_token_indices=[4, 9]).source_mix["global"] == {"indices": [4, 9]}


@pytest.mark.parametrize("kv_heads", [None, 2, 1], ids=["mha", "gqa", "mqa"])
def test_shapes_and_stats(kv_heads: int | None) -> None:
    config = SSAConfig(d_model=32, num_heads=4, num_kv_heads=kv_heads, num_neighbors=32, causal=True)
    layer = SparseAttention(config)
    x = torch.randn(2, 100, 32)
    out, nothing = layer(x)
    again, stats = layer(x, return_stats=True)
    assert out.shape == x.shape
    assert nothing == {}
    assert torch.equal(out, again)
    assert layer.Wk.weight.shape == (8 * config.kv_heads, 32)
    assert stats["neighbors_shape"] == (2, 4, 100, 32)
    assert stats["peak_full_elems"] == 2 * 4 * 100 * 100 * 8
    assert stats["compression"] == stats["peak_full_elems"] / stats["peak_sparse_elems"] == 100 / 32
    assert 0.0 < stats["padding_fraction"] < 0.5
    assert set(stats["slots"]) == {"self", "window", "global", "lsh"}
    assert sum(stats["slots"].values()) == pytest.approx(32 * (1 - stats["padding_fraction"]))
    assert stats["keys_scored"]["lsh"] > stats["slots"]["lsh"]


def test_build_and_apply_are_the_two_halves_of_forward() -> None:
    layer = SparseAttention(SSAConfig(d_model=32, num_heads=4, num_neighbors=32))
    x = torch.randn(2, 100, 32)
    q, k, v = layer.project(x)
    graph = layer.build_graph(q, k)
    halves = layer.Wo(layer.apply_graph(q, k, v, graph).transpose(1, 2).flatten(2))
    assert torch.equal(halves, layer(x)[0])
    assert torch.equal(halves, layer(x, graph=graph)[0])


def test_cross_attention_uses_no_self_and_no_window_and_is_not_causal() -> None:
    layer = SparseAttention(SSAConfig(d_model=32, num_heads=4, num_neighbors=32, causal=True))
    x, context = torch.randn(2, 20, 32), torch.randn(2, 300, 32)
    out, stats = layer(x, context, return_stats=True)
    assert out.shape == x.shape
    assert set(stats["slots"]) == {"global", "lsh"}
    q, k, _ = layer.project(x, context)
    assert bool(layer.build_graph(q, k, cross=True).to_dense_mask()[:, :, 0, 250:].any())


def test_drop_in_for_scaled_dot_product_attention() -> None:
    q, k, v = (torch.randn(2, 4, 90, 16) for _ in range(3))
    mask = torch.rand(90, 90) > 0.1
    for arguments in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}):
        got = sparse_attention(q, k, v, **arguments)  # K = 128 >= 90: every allowed key fits
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **arguments))
    grouped = sparse_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    torch.testing.assert_close(grouped, F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True))
    far = sparse_attention(q[:, :, :7], k, v, is_causal=True)
    torch.testing.assert_close(far, F.scaled_dot_product_attention(q[:, :, :7], k, v, is_causal=True))


def test_decoding_one_query_at_its_position_equals_its_row_of_the_prefill() -> None:
    q, k, v = (torch.randn(2, 4, 300, 16) for _ in range(3))
    config = SSAConfig(num_neighbors=48)
    whole = sparse_attention(q, k, v, config=config, is_causal=True)
    for position in (0, 60, 299):
        step = sparse_attention(
            q[:, :, position : position + 1],
            k[:, :, : position + 1],
            v[:, :, : position + 1],
            config=config,
            is_causal=True,
            query_positions=torch.tensor([position]),
        )
        torch.testing.assert_close(step[:, :, 0], whole[:, :, position])


def test_batch_elements_may_stand_at_different_positions() -> None:
    q, k, v = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 200, 8), torch.randn(2, 2, 200, 8)
    config = SSAConfig(num_neighbors=32)
    positions = torch.tensor([[150], [70]])
    both = sparse_attention(q, k, v, config=config, is_causal=True, query_positions=positions)
    for b in range(2):
        alone = sparse_attention(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], config=config, is_causal=True, query_positions=positions[b]
        )
        torch.testing.assert_close(both[b : b + 1], alone)


@pytest.mark.parametrize(("dense_below", "sources"), [(None, {"lsh"}), (50, {"dense"}), (0, {"lsh"})])
def test_dense_fallback_changes_speed_not_results_below_the_budget(dense_below: int | None, sources: set[str]) -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    config = SSAConfig(sources={"lsh": {}}, num_neighbors=40, dense_below=dense_below)
    graph = build_graph(q, k, config=config)
    assert set(graph.sources) >= sources
    assert graph.is_full == (dense_below != 0)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sparse_attention(q, k, v, config=config, graph=graph), want)


def test_a_shared_graph_is_routed_by_the_mean_query() -> None:
    q, k = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8)
    config = SSAConfig(sources={"topk": {}}, num_neighbors=5, graph_heads="kv")
    graph = build_graph(q, k, config=config)
    mean = q.unflatten(1, (2, 2)).mean(2)
    want = (mean @ k.transpose(-1, -2)).topk(5, dim=-1).indices.sort(-1).values
    assert graph.graph_heads == 2
    assert torch.equal(graph.neighbors.long(), want)


class EveryOther(NeighborSource):
    """A source of one's own, as a user would write it."""

    def propose(self, ctx):
        keys = torch.arange(0, ctx.num_keys, 2, dtype=torch.int32, device=ctx.device)
        return Candidates(keys.view(1, 1, 1, -1))


def test_a_source_of_ones_own_and_an_observer() -> None:
    registry = SourceRegistry(plugins=[])
    registry.register("every_other", EveryOther)
    seen = []

    class Observer:
        @hookimpl
        def ssa_graph_built(self, graph, layer):
            seen.append((graph, layer))

    registry.register_plugin(Observer())
    config = SSAConfig(d_model=16, num_heads=2, num_neighbors=20, sources={"self": {}, "every_other": {}})
    layer = SparseAttention(config, registry=registry)
    layer(torch.randn(1, 20, 16))
    graph, spec = seen[0]
    edges = graph.to_dense_mask()[0, 0]
    want = torch.eye(20, dtype=torch.bool)
    want[:, ::2] = True
    assert torch.equal(edges, want)
    assert spec.head_dim == 8


def test_rotary_positions_are_relative() -> None:
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, num_neighbors=64, rope_base=100.0))
    x = torch.randn(1, 9, 16)
    q, k, _ = layer.project(x, positions=torch.arange(9))
    q_far, k_far, _ = layer.project(x, positions=torch.arange(9) + 50)
    torch.testing.assert_close(q @ k.transpose(-1, -2), q_far @ k_far.transpose(-1, -2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(q, q_far)


def test_dropout_only_in_training() -> None:
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, num_neighbors=32, dropout=0.5))
    x = torch.randn(1, 40, 16)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["f64", "bf16", "f16"])
def test_layer_dtypes(dtype: torch.dtype) -> None:
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, num_neighbors=32)).to(dtype)
    x = torch.randn(1, 100, 16, dtype=dtype, requires_grad=True)
    out, _ = layer(x)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert bool(x.grad.isfinite().all())


def test_layer_under_autocast() -> None:
    layer = SparseAttention(SSAConfig(d_model=16, num_heads=2, num_neighbors=32, rope_base=100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(torch.randn(1, 100, 16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert bool(layer.Wq.weight.grad.isfinite().all())


def test_options_with_large_tensors_are_told_apart() -> None:
    """Tensors print alike when they are large; a function must not mistake one adjacency for another."""
    q = torch.randn(1, 1, 2000, 4)
    nodes = torch.arange(2000)
    middle = nodes.roll(1)
    other = middle.clone()
    other[1000] = 7
    for keys in (middle, other):
        config = SSAConfig(sources={"edges": {"edge_index": torch.stack([nodes, keys])}}, num_neighbors=4)
        graph = build_graph(q, q, config=config)
        assert graph.neighbors[0, 0, 1000, 0] == keys[1000]


def test_a_causal_configuration_is_causal_in_the_function_too() -> None:
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in range(3))
    config = SSAConfig(num_neighbors=32, causal=True)
    assert torch.equal(
        sparse_attention(q, k, v, config=config), sparse_attention(q, k, v, config=config, is_causal=True)
    )


def test_functions_see_a_source_that_was_registered_anew() -> None:
    class Nothing(NeighborSource):
        def propose(self, ctx):
            return Candidates(torch.full((1, 1, 1, 1), -1, dtype=torch.int32, device=ctx.device))

    registry = SourceRegistry(plugins=[])
    q, config = torch.randn(1, 1, 20, 8), SSAConfig(sources={"mine": {}}, num_neighbors=12)
    registry.register("mine", EveryOther)
    assert build_graph(q, q, config=config, registry=registry).degree().sum() == 200
    registry.register("mine", Nothing, replace=True)
    assert build_graph(q, q, config=config, registry=registry).degree().sum() == 0


@pytest.mark.parametrize("mix", [{"lsh": {}}, {"topk": {}}], ids=["lsh", "topk"])
def test_autocast_does_not_change_the_graph(mix: dict[str, dict]) -> None:
    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    config = SSAConfig(sources=mix, num_neighbors=16)
    plain = build_graph(q, k, config=config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed = build_graph(q, k, config=config)
    assert torch.equal(plain.neighbors, routed.neighbors)
