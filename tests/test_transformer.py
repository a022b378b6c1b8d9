"""Transformers over neighbor graphs: composition, graph reuse, overlap of layers, checkpoints, training."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssa_framework import NeighborGraph, SSAConfig
from ssa_framework.errors import ConfigError, DtypeError, GraphError, MaskError, ShapeError
from ssa_framework.regime import SubquadraticRegimeTracker
from ssa_framework.transformer import (
    CachedGraphSparseTransformer,
    SparseTransformer,
    SparseTransformerLayer,
    measure_cross_layer_overlap,
    neighbor_overlap,
)

WIDTH, HEADS, VOCABULARY = 16, 4, 13
MIX = {"self": {}, "window": {"size": 2}, "global": {"tokens": 1}, "lsh": {"rounds": 2, "candidates": 4}}
CONFIG = SSAConfig(d_model=WIDTH, num_heads=HEADS, num_neighbors=14, sources=MIX, dense_below=0)
"""Sequences of more than 14 tokens are routed."""
KV_HEADS = pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def make_input(length: int = 33, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=dtype)


def make_tokens(length: int = 33, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length))


def graphs_of(model: SparseTransformer, x: Tensor, **options: Any) -> list[NeighborGraph]:
    """The graph that each layer of an uncached model builds."""
    graphs = []
    x = model.embed_input(x)
    for layer in model.layers:
        graphs.append(layer.build_graph(x, **options))
        x, _ = layer(x, graph=graphs[-1])
    return graphs


# -- layer and stack -------------------------------------------------------------------------------------------------


@KV_HEADS
@CAUSAL
def test_layer_is_prenorm(causal: bool, kv_heads: int) -> None:
    layer = SparseTransformerLayer(CONFIG.replace(causal=causal, num_kv_heads=kv_heads)).double()
    x = make_input()
    out, stats = layer(x)
    hidden = x + layer.attn(layer.norm1(x))[0]
    torch.testing.assert_close(out, hidden + layer.ff(layer.norm2(hidden)), rtol=0, atol=0)
    assert stats == {}
    again, stats = layer(x, return_stats=True, graph=layer.build_graph(x))
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)
    assert stats["neighbors_shape"][:3] == (2, HEADS, 33)


@pytest.mark.parametrize("ffn_mult", [1, 3])
def test_feed_forward_width(ffn_mult: int) -> None:
    layer = SparseTransformerLayer(CONFIG.replace(dropout=0.1), ffn_mult=ffn_mult)
    assert [m.out_features for m in layer.ff if isinstance(m, nn.Linear)] == [ffn_mult * WIDTH, WIDTH]
    assert [m.p for m in layer.ff if isinstance(m, nn.Dropout)] == [0.1, 0.1]


@KV_HEADS
@CAUSAL
def test_stack_is_its_layers(causal: bool, kv_heads: int) -> None:
    model = SparseTransformer(CONFIG.replace(causal=causal, num_kv_heads=kv_heads), 3, VOCABULARY).double()
    tokens = make_tokens()
    hidden, stats = model(tokens, return_stats=True)
    x = model.embed(tokens)
    for layer in model.layers:
        x, _ = layer(x)
    torch.testing.assert_close(hidden, model.norm(x), rtol=0, atol=0)
    assert [sorted(s["slots"]) for s in stats] == [sorted(MIX)] * 3
    assert model(tokens)[1] == [{}, {}, {}]


def test_token_ids_or_hidden_inputs() -> None:
    model = SparseTransformer(CONFIG, 2, VOCABULARY)
    tokens = make_tokens()
    want, _ = model(tokens)
    for same in (tokens.int(), model.embed(tokens)):
        torch.testing.assert_close(model(same)[0], want, rtol=0, atol=0)


def test_without_embedding() -> None:
    model = SparseTransformer(CONFIG, 1)
    assert model.embed is None
    assert not [name for name in model.state_dict() if "embed" in name]
    assert model(make_input(dtype=torch.float32))[0].shape == (2, 33, WIDTH)


def test_every_layer_has_its_own_seed() -> None:
    model = SparseTransformer(CONFIG.replace(seed=5), 3)
    assert [layer.attn.config.seed for layer in model.layers] == [5, 6, 7]
    planes = [layer.attn.router.sources["lsh"].planes for layer in model.layers]
    assert not torch.equal(planes[0], planes[1])
    again = SparseTransformer(CONFIG.replace(seed=6), 2)
    assert torch.equal(again.layers[0].attn.router.sources["lsh"].planes, planes[1])


def test_masks_reach_every_layer() -> None:
    model = SparseTransformer(CONFIG.replace(causal=True), 3, VOCABULARY).double().eval()
    tokens, segments = make_tokens(), (torch.arange(33) >= 19).long().expand(2, -1)
    packed, _ = model(tokens, segment_ids=segments)
    torch.testing.assert_close(packed[:, :19], model(tokens[:, :19])[0], rtol=0, atol=1e-12)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCABULARY
    keep = torch.arange(33).expand(2, -1) < 20
    for options in ({"key_padding_mask": keep}, {"attention_mask": keep[:, None, None]}):
        left, right = model(tokens, **options)[0], model(changed, **options)[0]
        torch.testing.assert_close(left[:, :20], right[:, :20], rtol=0, atol=0)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@KV_HEADS
@pytest.mark.parametrize("graph_heads", ["query", "kv"])
def test_a_few_steps_decrease_the_loss(graph_heads: str, kv_heads: int, cached: bool) -> None:
    config = CONFIG.replace(causal=True, num_kv_heads=kv_heads, graph_heads=graph_heads, rope_base=100.0)
    if cached:
        model: SparseTransformer = CachedGraphSparseTransformer(config, 2, reuse_every=2, vocab_size=VOCABULARY)
    else:
        model = SparseTransformer(config, 2, VOCABULARY)
    head = nn.Linear(WIDTH, VOCABULARY)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    tokens = make_tokens(25)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(head(model(tokens)[0][:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_precisions(dtype: torch.dtype, autocast: bool) -> None:
    model = CachedGraphSparseTransformer(CONFIG, 2, reuse_every=2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, _ = model(make_input(dtype=dtype))
    assert torch.isfinite(out).all()
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("length", [0, 1, 15])
def test_short_sequences(length: int) -> None:
    out, stats = SparseTransformer(CONFIG, 2)(make_input(length, dtype=torch.float32), return_stats=True)
    assert out.shape == (2, length, WIDTH)
    assert len(stats) == 2


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@KV_HEADS
def test_checkpoint_restores_graph_and_output(kv_heads: int, cached: bool) -> None:
    def make(seed: int) -> SparseTransformer:
        config = CONFIG.replace(num_kv_heads=kv_heads, causal=True, seed=seed)
        if cached:
            return CachedGraphSparseTransformer(config, 3, reuse_every=2, vocab_size=VOCABULARY)
        return SparseTransformer(config, 3, VOCABULARY)

    model, tokens, file = make(1), make_tokens(65), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make(99)
    assert graphs_of(other, tokens)[0].overlap(graphs_of(model, tokens)[0]).mean() < 1
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for restored, saved in zip(graphs_of(other, tokens), graphs_of(model, tokens), strict=True):
        assert torch.equal(restored.as_lists()[0], saved.as_lists()[0])
    assert torch.equal(other(tokens)[0], model(tokens)[0])


def test_deepcopy_computes_the_same() -> None:
    model = SparseTransformer(CONFIG, 2, VOCABULARY)
    tokens = make_tokens()
    assert torch.equal(copy.deepcopy(model)(tokens)[0], model(tokens)[0])


# -- reuse of graphs -------------------------------------------------------------------------------------------------


@KV_HEADS
@CAUSAL
def test_reuse_every_one_equals_building_every_time(causal: bool, kv_heads: int) -> None:
    config = CONFIG.replace(causal=causal, num_kv_heads=kv_heads)
    plain = SparseTransformer(config, 3, VOCABULARY).double()
    cached = CachedGraphSparseTransformer(config, 3, reuse_every=1, vocab_size=VOCABULARY).double()
    cached.load_state_dict(plain.state_dict(), strict=True)
    tokens, segments = make_tokens(), (torch.arange(33) >= 19).long().expand(2, -1)
    weight = make_input()
    for options in ({}, {"segment_ids": segments}):
        outs = [model(tokens, **options)[0] for model in (plain, cached)]
        torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
        grads = [torch.autograd.grad((out * weight).sum(), list(model.parameters()))
                 for out, model in zip(outs, (plain, cached), strict=True)]  # fmt: skip
        for got, want in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("reuse_every", "flags"),
    [(1, [True] * 5), (2, [True, False, True, False, True]), (3, [True, False, False, True, False]),
     (9, [True, False, False, False, False])],
)  # fmt: skip
def test_graphs_are_built_by_the_first_layer_of_each_group(reuse_every: int, flags: list[bool]) -> None:
    model = CachedGraphSparseTransformer(CONFIG, 5, reuse_every)
    built = []
    for index, layer in enumerate(model.layers):
        layer.attn.router.register_forward_hook(lambda module, args, graph, index=index: built.append(index))
    _, stats = model(make_input(dtype=torch.float32), return_stats=True)
    assert [s["graph_recomputed"] for s in stats] == flags
    assert built == [index for index, flag in enumerate(flags) if flag]
    assert all("slots" in s for s in stats)
    assert model(make_input(dtype=torch.float32))[1] == [{}] * 5


def test_reused_graph_is_that_of_the_first_layer() -> None:
    model = CachedGraphSparseTransformer(CONFIG, 2, reuse_every=2).double()
    x = make_input()
    out, _ = model(x)
    first, second = model.layers
    graph = first.build_graph(x)
    h = first(x, graph=graph)[0]
    torch.testing.assert_close(out, model.norm(second(h, graph=graph)[0]), rtol=0, atol=0)
    assert not torch.allclose(out, model.norm(second(h)[0]))


# -- overlap ---------------------------------------------------------------------------------------------------------


@st.composite
def key_lists(draw: st.DrawFn) -> list[set[int]]:
    return [draw(st.sets(st.integers(0, 9), max_size=6)) for _ in range(3)]


def as_tensors(rows: list[set[int]], slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[1, 1, N, slots]``, shuffled, with rubbish in the empty slots and some keys twice."""
    keys, valid = torch.randint(10, (1, 1, len(rows), slots), dtype=dtype), torch.zeros(1, 1, len(rows), slots).bool()
    for i, row in enumerate(rows):
        values = [*row, *sorted(row)[: slots - len(row)]]
        for slot, key in zip(torch.randperm(slots).tolist(), values, strict=False):
            keys[0, 0, i, slot], valid[0, 0, i, slot] = key, True
    return keys, valid


@settings(max_examples=60, deadline=None)
@given(a=key_lists(), b=key_lists(), wide=st.booleans())
def test_overlap_is_the_jaccard_similarity(a: list[set[int]], b: list[set[int]], wide: bool) -> None:
    dtype = torch.int64 if wide else torch.int32
    keys_a, valid_a = as_tensors(a, 6, dtype)
    keys_b, valid_b = as_tensors(b, 8, dtype)
    got = neighbor_overlap(keys_a, keys_b, valid_a, valid_b)
    want = [len(x & y) / len(x | y) if x | y else 1.0 for x, y in zip(a, b, strict=True)]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want).view(1, 1, -1), rtol=0, atol=1e-6)
    assert torch.equal(got, neighbor_overlap(keys_b, keys_a, valid_b, valid_a))
    assert torch.equal(neighbor_overlap(keys_a, keys_a, valid_a, valid_a), torch.ones(1, 1, 3))


def test_overlap_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randint(20, (2, 2, 2, 17, 5))
    valid = torch.rand(keys.shape) < 0.8
    whole = neighbor_overlap(keys[0], keys[1], valid[0], valid[1])
    monkeypatch.setattr("ssa_framework.transformer._CHUNK_ELEMENTS", 100)
    assert torch.equal(neighbor_overlap(keys[0], keys[1], valid[0], valid[1]), whole)


def test_overlap_agrees_with_the_graph() -> None:
    a, b = graphs_of(SparseTransformer(CONFIG, 2).double(), make_input())
    torch.testing.assert_close(
        neighbor_overlap(a.as_lists()[0], b.as_lists()[0], a.as_lists()[1], b.as_lists()[1]), a.overlap(b)
    )


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "hidden"])
@pytest.mark.parametrize("graph_heads", ["query", "kv"])
def test_cross_layer_overlap(graph_heads: str, tokens: bool) -> None:
    config = CONFIG.replace(num_kv_heads=2, graph_heads=graph_heads)
    model = SparseTransformer(config, 4, VOCABULARY if tokens else 0).double()
    x = make_tokens() if tokens else make_input()
    report = measure_cross_layer_overlap(model, x)
    graphs = graphs_of(model, x)
    assert report["num_layers"] == 4
    assert len(report["mean_overlap_per_adjacent_pair"]) == 3
    for i, (overlap, mean) in enumerate(
        zip(report["per_pair_overlap"], report["mean_overlap_per_adjacent_pair"], strict=True)
    ):
        assert overlap.shape == (2, HEADS, 33)
        want = graphs[i].overlap(graphs[i + 1]).repeat_interleave(HEADS // graphs[i].graph_heads, dim=1)
        torch.testing.assert_close(overlap, want, rtol=0, atol=0)
        assert mean == pytest.approx(float(want.mean()))
        assert 0 < mean < 0.9  # every layer hashes in its own way


def test_cross_layer_overlap_of_equal_layers_is_one() -> None:
    model = SparseTransformer(CONFIG.replace(sources={"self": {}, "window": {"size": 3}}), 3)
    report = measure_cross_layer_overlap(model, make_input(dtype=torch.float32))
    assert report["mean_overlap_per_adjacent_pair"] == [1.0, 1.0]
    single = measure_cross_layer_overlap(SparseTransformer(CONFIG, 1), make_input(dtype=torch.float32))
    assert single == {"per_pair_overlap": [], "mean_overlap_per_adjacent_pair": [], "num_layers": 1}


def test_cross_layer_overlap_of_a_cached_model_runs_it_as_it_is() -> None:
    plain = SparseTransformer(CONFIG, 3).double()
    cached = CachedGraphSparseTransformer(CONFIG, 3, reuse_every=3).double()
    cached.load_state_dict(plain.state_dict())
    x = make_input()
    first, second = measure_cross_layer_overlap(plain, x), measure_cross_layer_overlap(cached, x)
    assert torch.equal(first["per_pair_overlap"][0], second["per_pair_overlap"][0])
    assert not torch.equal(first["per_pair_overlap"][1], second["per_pair_overlap"][1])


def test_cross_layer_overlap_leaves_the_model_as_it_was() -> None:
    model = SparseTransformer(CONFIG.replace(dropout=0.5), 2, VOCABULARY).train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    first = measure_cross_layer_overlap(model, make_tokens(batch=1))
    assert [module.training for module in model.modules()] == modes
    assert not any(overlap.requires_grad for overlap in first["per_pair_overlap"])
    with pytest.raises(ShapeError):
        measure_cross_layer_overlap(model, make_tokens()[0])
    assert [module.training for module in model.modules()] == modes


def test_cross_layer_overlap_passes_masks_on() -> None:
    model = SparseTransformer(CONFIG, 2)
    keep = torch.arange(33).expand(2, -1) < 5
    report = measure_cross_layer_overlap(model, make_input(dtype=torch.float32), key_padding_mask=keep)
    assert report["mean_overlap_per_adjacent_pair"] == [1.0]  # five keys fit the budget, so all layers take them


# -- the subquadratic regime -----------------------------------------------------------------------------------------


def test_regime_is_constant_budgets() -> None:
    tracker = SubquadraticRegimeTracker()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tracker.check()
        for length in (128, 256, 512):
            tracker.record(N=length, K=32, R=8, C=16)
        assert tracker.check()
    assert [call.N for call in tracker.history] == [128, 256, 512]
    assert tracker.history[0] == (128, 32, 8, 16)


@pytest.mark.parametrize("grows", ["K", "R", "C"])
def test_growing_budgets_leave_the_regime(grows: str) -> None:
    tracker = SubquadraticRegimeTracker()
    for length in (128, 512):
        tracker.record(**{"N": length, "K": 32, "R": 8, "C": 16, grows: length // 4})
    with pytest.warns(UserWarning, match=f"^{grows} from 32 to 128 for N from 128 to 512: "):
        assert not tracker.check()
    assert not tracker.check(warn=False)


@pytest.mark.parametrize("size", [-1, 1.5, True, "8"], ids=["negative", "float", "bool", "text"])
def test_regime_takes_counts(size: object) -> None:
    tracker = SubquadraticRegimeTracker()
    with pytest.raises(ConfigError, match="R must be an integer >= 0"):
        tracker.record(128, 32, size, 16)
    assert tracker.history == []


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseTransformerLayer(CONFIG, ffn_mult=0), "ffn_mult must be an integer >= 1"),
        (lambda: SparseTransformer(CONFIG, num_layers=0), "num_layers must be an integer >= 1"),
        (lambda: SparseTransformer(CONFIG, vocab_size=-1), "vocab_size must be an integer >= 0"),
        (lambda: CachedGraphSparseTransformer(CONFIG, 2, reuse_every=0), "reuse_every must be an integer >= 1"),
        (lambda: CachedGraphSparseTransformer(CONFIG, 2, ffn_mult=1.5), "ffn_mult must be an integer >= 1, got 1.5"),
        (lambda: measure_cross_layer_overlap(nn.Linear(2, 2), make_input()), "SparseTransformer, got Linear"),
    ],
    ids=["ffn-mult", "layers", "vocabulary", "reuse-every", "ffn-mult-float", "model"],
)
def test_constructor_errors(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize(
    ("vocabulary", "x", "error", "message"),
    [
        (0, make_tokens(), DtypeError, r"without vocab_size the input is floating point \[B, N, 16\], got torch.int64"),
        (0, make_input()[0], ShapeError, r"\[B, N, 16\], got \[33, 16\]"),
        (0, make_input()[..., :-1], ShapeError, r"got \[2, 33, 15\]"),
        (13, make_tokens()[0], ShapeError, r"token ids must have shape \[B, N\], got \[33\]"),
        (13, make_tokens().to(torch.uint8), DtypeError, "token ids must be int32 or int64, got torch.uint8"),
        (13, [[1, 2]], DtypeError, "the input must be a tensor, got list"),
    ],
    ids=["no-embedding", "rank", "width", "token-rank", "token-dtype", "list"],
)
def test_input_errors(vocabulary: int, x: Any, error: type[Exception], message: str, cached: bool) -> None:
    model = (CachedGraphSparseTransformer(CONFIG, 2, vocab_size=vocabulary) if cached
             else SparseTransformer(CONFIG, 2, vocabulary))  # fmt: skip
    with pytest.raises(error, match=message):
        model(x)


def test_a_given_graph_brings_its_own_masks() -> None:
    layer = SparseTransformerLayer(CONFIG).double()
    x = make_input()
    graph = layer.build_graph(x)
    with pytest.raises(MaskError, match="belong to the graph"):
        layer(x, graph=graph, key_padding_mask=torch.ones(2, 33, dtype=torch.bool))
    with pytest.raises(GraphError, match="does not fit the tensors"):
        layer(x[:, 1:], graph=graph)


KEYS, VALID = torch.zeros(1, 2, 3, 4, dtype=torch.int32), torch.ones(1, 2, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((KEYS[0], KEYS[0], VALID[0], VALID[0]), ShapeError, r"neighbors_a and valid_a.*got \[2, 3, 4\]"),
        ((KEYS, KEYS[:, :1], VALID, VALID[:, :1]), ShapeError, r"neighbors_b.*one B, H, N"),
        ((KEYS, KEYS, VALID[..., 1:], VALID), ShapeError, r"\[1, 2, 3, 4\] and \[1, 2, 3, 3\]"),
        ((KEYS.float(), KEYS, VALID, VALID), DtypeError, "neighbors_a must be int32 or int64"),
        ((KEYS, KEYS, VALID, VALID.int()), DtypeError, "valid_b bool, got torch.int32 and torch.int32"),
    ],
    ids=["rank", "heads", "valid-shape", "dtype", "valid-dtype"],
)
def test_overlap_errors(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        neighbor_overlap(*arguments)
