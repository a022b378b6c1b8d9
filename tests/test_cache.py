"""Decoding on a cache: the law for mixes and chunkings, and the cache itself."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ssa_framework.router as router_module
from ssa_framework import (
    CachedGraphSparseTransformer,
    LayerCache,
    SourceRegistry,
    SparseAttention,
    SparseTransformer,
    SSACache,
    SSAConfig,
    build_graph,
    sparse_attention,
)
from ssa_framework.decoding import attend_cached
from ssa_framework.errors import CacheError, ConfigError, GraphError, ProposalError, ShapeError
from ssa_framework.growing import GrowingTensor
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.plugin import NeighborSource, Ranges, RoutingContext, Spans
from ssa_framework.router import Router

LENGTH, HEADS, KV_HEADS, DIM = 160, 4, 2, 16
MIXES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "preset": {"global": {"tokens": 4}, "clusters": {"levels": [[16, 4], [64, 8]], "keys": 24}},
    "window-and-clusters": {"window": {"size": 5}, "clusters": {"levels": [[16, 4]], "keys": 12, "attend": "topk"}},
    "listed-clusters": {"random": {"links": 3}, "clusters": {"levels": [[16, 4], [48, 8]], "keys": 24}},
    "blocks": {"self": {}, "blocks": {"size": 8, "keys": 32}},
    "blocks-with-summaries": {"blocks": {"size": 8, "keys": 32, "attend": "all", "summaries": True}},
    "late-columns": {"global": {"indices": [0, 70, 500]}, "clusters": {"levels": [[16, 4]], "keys": 12}},
    "faiss": {"self": {}, "faiss": {"index": "Flat", "block": 32}},
    "columns-and-topk": {"self": {}, "global": {"indices": [3, 90]}, "topk": {}},
    "lsh-probes": {"self": {}, "lsh": {"rounds": 3, "probes": 2, "candidates": 8}},
    "everything": {
        "self": {}, "window": {"size": 3}, "global": {"tokens": 2}, "strided": {"stride": 16, "count": 2},
        "lsh": {"rounds": 2, "candidates": 8}, "blocks": {"size": 8, "keys": 16},
    },
}  # fmt: skip
Tokens = tuple[Tensor, Tensor, Tensor]


def config(mix: str, **changes: Any) -> SSAConfig:
    options = {"dense_below": 0, "num_neighbors": 24} | changes
    return SSAConfig(
        d_model=HEADS * DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, causal=True, sources=MIXES[mix], **options
    )


def make_tokens(batch: int = 2, length: int = LENGTH, dim: int = DIM, dtype: torch.dtype = torch.float32) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((batch, heads, length, dim), generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def left_padded(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.arange(length)[None] >= 23 * torch.arange(batch)[:, None]


def decode(
    router: Router, cache: LayerCache, tokens: Tokens, chunks: list[int], keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and neighbors of the tokens behind those that are cached."""
    outs, masks = [], []
    for length in chunks:
        rows = slice(cache.length, cache.length + length)
        some = None if keep is None else keep[:, rows]
        out, graph = attend_cached(router, cache, *(x[:, :, rows] for x in tokens), key_keep=some)
        assert graph is not None
        outs.append(out)
        mask = graph.to_dense_mask()
        if mask.shape[2] < length:  # the graph of the last piece, where dense attention ended on the way
            mask = torch.nn.functional.pad(mask, (0, 0, length - mask.shape[2], 0))
        masks.append(torch.nn.functional.pad(mask, (0, tokens[1].shape[2] - cache.length)))
    return torch.cat(outs, dim=2), torch.cat(masks, dim=2)


def prefill(router: Router, tokens: Tokens, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in one call without a cache."""
    cfg = SSAConfig(sources=router.mix, num_neighbors=router.layer.num_neighbors, dense_below=0)
    graph = build_graph(
        tokens[0],
        tokens[1],
        config=cfg.replace(graph_heads="kv" if router.shared_by_group else "query"),
        is_causal=True,
        key_padding_mask=keep,
    )
    return neighbor_attention(*tokens, graph)[0], graph.to_dense_mask()


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], keep: Tensor | None = None) -> None:
    rows = torch.ones_like(got[0][..., 0], dtype=torch.bool)
    if keep is not None:
        rows = rows & keep[:, None, -rows.shape[2] :]
    assert torch.equal(got[1][rows], want[1][rows])
    torch.testing.assert_close(got[0][rows], want[0][rows], rtol=1e-4, atol=1e-5)


# -- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("mix", MIXES)
def test_token_by_token_and_in_chunks(mix: str, graph_heads: str, padded: bool) -> None:
    tokens, router = make_tokens(), Router(config(mix, graph_heads=graph_heads))
    keep = left_padded() if padded else None
    want = prefill(router, tokens, keep)
    for chunks in ([1] * LENGTH, [50, *[1] * 20, 40, *[3] * 10, 20], [LENGTH]):
        assert_same(decode(router, LayerCache(), tokens, chunks, keep), want, keep)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.sets(st.integers(1, LENGTH - 1), max_size=12),
    crops=st.lists(st.integers(0, LENGTH - 1), max_size=3),
    mix=st.sampled_from(["default", "preset", "blocks", "everything"]),
    padded=st.booleans(),
)
def test_any_chunking_and_cropping(cuts: set[int], crops: list[int], mix: str, padded: bool) -> None:
    tokens, router, cache = make_tokens(), Router(config(mix)), LayerCache()
    keep = left_padded() if padded else None
    want = prefill(router, tokens, keep)
    edges = [0, *sorted(cuts), LENGTH]
    decode(router, cache, tokens, [b - a for a, b in itertools.pairwise(edges)], keep)
    for length in crops:
        cache.crop(length)
        single = min(5, LENGTH - length)
        chunks = [*[1] * single, LENGTH - length - single]
        got = decode(router, cache, tokens, [chunk for chunk in chunks if chunk], keep)
        rest = (want[0][:, :, length:], want[1][:, :, length:])
        assert_same(got, rest, None if keep is None else keep[:, length:])


@pytest.mark.parametrize("mix", ["default", "preset", "blocks", "everything"])
def test_beams(mix: str) -> None:
    """Beams that go on differently: each has the past of the one that it was made of."""
    tokens, router, cache = make_tokens(batch=3), Router(config(mix)), LayerCache()
    keep = left_padded(batch=3)
    decode(router, cache, tokens, [100, 1, 1], keep)
    origin = torch.tensor([2, 0, 2, 1])
    cache.reorder(origin)
    moved = tuple(
        torch.cat([x[origin][:, :, :102], torch.randn(4, x.shape[1], LENGTH - 102, DIM)], dim=2) for x in tokens
    )
    got = decode(router, cache, moved, [1] * 10 + [LENGTH - 112], keep[origin])
    want = prefill(router, moved, keep[origin])
    assert_same(got, (want[0][:, :, 102:], want[1][:, :, 102:]), keep[origin])


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("mix", ["default", "preset", "blocks", "faiss", "everything"])
def test_deep_copy(mix: str, padded: bool) -> None:
    """A prompt that goes on in two ways: what happens to a copy does not show in the other."""
    tokens, router, cache = make_tokens(), Router(config(mix)), LayerCache()
    keep = left_padded() if padded else None
    decode(router, cache, tokens, [90, 1, 1], keep)
    twin = copy.deepcopy(cache)
    assert twin.owner is router
    other = tuple(torch.cat([x[:, :, :92], torch.randn_like(x[:, :, 92:])], dim=2) for x in tokens)
    for caches, goes_on in ((cache, tokens), (twin, other)):
        got = decode(router, caches, goes_on, [1] * 20 + [LENGTH - 112], keep)
        want = prefill(router, goes_on, keep)
        assert_same(got, (want[0][:, :, 92:], want[1][:, :, 92:]), None if keep is None else keep[:, 92:])


def test_padding_in_the_middle() -> None:
    """Tokens that are none may come at any time, such as behind a sequence that has ended."""
    tokens, router = make_tokens(batch=3), Router(config("preset"))
    keep = torch.rand((3, LENGTH), generator=torch.Generator().manual_seed(1)) > 0.2
    keep[0] = True
    got = decode(router, LayerCache(), tokens, [40, 1, 1, 30, *[1] * 88], keep)
    assert_same(got, prefill(router, tokens, keep), keep)


def test_padding_that_begins_late() -> None:
    tokens, router, cache = make_tokens(), Router(config("preset")), LayerCache()
    keep = torch.ones((2, LENGTH), dtype=torch.bool)
    keep[1, 120:] = False
    first = decode(router, cache, tokens, [100, 1])
    assert cache.key_keep is None
    rest = decode(router, cache, tokens, [40, 19], keep)
    got = torch.cat([first[0], rest[0]], dim=2), torch.cat([first[1], rest[1]], dim=2)
    assert_same(got, prefill(router, tokens, keep), keep)


@pytest.mark.parametrize("dim", [16, 24], ids=["whole-vectors", "odd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, dim: int) -> None:
    tokens = make_tokens(dtype=dtype, dim=dim)
    router = Router(config("preset").replace(d_model=HEADS * dim))
    got, want = decode(router, LayerCache(), tokens, [LENGTH - 20, *[1] * 20]), prefill(router, tokens)
    assert torch.equal(got[1], want[1])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dense_below", [None, 50, "auto"])
def test_dense_attention_of_short_caches(dense_below: Any) -> None:
    """Where a number of keys is computed densely, it is that of each query, so that chunks make no difference."""
    tokens, router = make_tokens(), Router(config("preset", dense_below=dense_below))
    one, _ = decode(router, LayerCache(), tokens, [LENGTH])
    two, _ = decode(router, LayerCache(), tokens, [30, 1, 1, 60, *[1] * 68])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    sparse, _ = prefill(router, tokens)
    few = {None: 0, 50: 49, "auto": LENGTH}[dense_below]
    dense = torch.nn.functional.scaled_dot_product_attention(*tokens, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(one[:, :, :few], dense[:, :, :few], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[:, :, few:], sparse[:, :, few:], rtol=1e-4, atol=1e-5)


def test_automatic_dense_attention_is_a_number_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """However tokens are cut into calls, the same queries are dense: those with so few keys."""
    monkeypatch.setattr(router_module, "DENSE_BELOW_IN_CACHE", {"cpu": 50, "cuda": 90})
    automatic, fixed = (Router(config("preset", dense_below=below)) for below in ("auto", 50))
    numbers = [automatic.dense_below_in_cache(torch.device(kind)) for kind in ("cpu", "cuda", "xpu")]
    assert numbers == [50, 90, 50]
    assert fixed.dense_below_in_cache(torch.device("cuda")) == 50
    tokens = make_tokens()
    want, _ = decode(fixed, LayerCache(), tokens, [LENGTH])
    for cut in ([LENGTH], [30, 1, 1, 60, *[1] * 68]):
        got, _ = decode(automatic, LayerCache(), tokens, cut)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int) -> None:
    tokens, before = make_tokens(), torch.get_num_threads()
    torch.set_num_threads(1)
    want = decode(Router(config("preset")), LayerCache(), tokens, [100, *[1] * 60])
    try:
        torch.set_num_threads(threads)
        got = decode(Router(config("preset")), LayerCache(), tokens, [100, *[1] * 60])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


# -- layers and models ---------------------------------------------------------------------------------------------


def test_function() -> None:
    tokens, cfg, cache = make_tokens(), config("preset"), LayerCache()
    whole = sparse_attention(*tokens, config=cfg, enable_gqa=True)
    parts = [
        sparse_attention(*(x[:, :, a:b] for x in tokens), config=cfg, enable_gqa=True, cache=cache)
        for a, b in ((0, 100), (100, 101), (101, 102), (102, LENGTH))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(CacheError, match="another configuration"):
        sparse_attention(*tokens, config=config("blocks"), enable_gqa=True, cache=cache)


def test_positions_go_on() -> None:
    """Rotary positions continue behind the cache."""
    layer, x = SparseAttention(config("preset", rope_base=10000.0)), torch.randn(2, LENGTH, HEADS * DIM)
    keep = left_padded()
    with torch.no_grad():
        whole, _ = layer(x, key_padding_mask=keep)
        cache = LayerCache()
        parts = [
            layer(x[:, a:b], cache=cache, attention_mask=keep[:, a:b], return_stats=True)
            for a, b in ((0, 100), (100, 101), (101, LENGTH))
        ]
    got = torch.cat([out for out, _ in parts], dim=1)
    torch.testing.assert_close(got[keep], whole[keep], rtol=1e-4, atol=1e-5)
    assert parts[1][1]["neighbors_shape"][:3] == (2, HEADS, 1)


def test_model() -> None:
    model = SparseTransformer(config("preset", rope_base=10000.0), num_layers=2, vocab_size=50).eval()
    tokens, cache = torch.randint(50, (2, LENGTH)), SSACache(layers=2)
    with torch.no_grad():
        whole, _ = model(tokens)
        parts = [model(tokens[:, a:b], cache=cache)[0] for a, b in ((0, 120), (120, 121), (121, LENGTH))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)
        cache.crop(121)
        again, _ = model(tokens[:, 121:], cache=cache)
        torch.testing.assert_close(again, parts[2], rtol=1e-4, atol=1e-5)
        cache.reset()
        assert cache.length == 0
        torch.testing.assert_close(model(tokens, cache=cache)[0], whole, rtol=1e-3, atol=1e-4)


def test_inference_mode() -> None:
    """A cache that is filled in inference mode can be used outside of it."""
    tokens, router, cache = make_tokens(), Router(config("preset")), LayerCache()
    want = prefill(router, tokens)
    with torch.inference_mode():
        decode(router, cache, tokens, [100, *[1] * 10])
        cache.crop(105)
        cache.reorder([1, 0])
        cache.reorder([1, 0])
        decode(router, cache, tokens, [1] * 5)
    got = decode(router, cache, tokens, [1] * 50)
    assert_same(got, (want[0][:, :, 110:], want[1][:, :, 110:]))


# -- refused -------------------------------------------------------------------------------------------------------


def test_gradients_are_refused() -> None:
    layer, x = SparseAttention(config("preset")), torch.randn(1, 3, HEADS * DIM)
    with pytest.raises(CacheError, match="no_grad"):
        layer(x, cache=LayerCache())
    q, k, v = make_tokens(length=3)
    with pytest.raises(CacheError, match="no_grad"):
        attend_cached(Router(config("preset")), LayerCache(), q.requires_grad_(), k, v)


def test_what_a_cache_cannot_serve() -> None:
    cfg, tokens, cache = config("preset"), make_tokens(length=5), LayerCache()
    with pytest.raises(ConfigError, match="causal"):
        attend_cached(Router(cfg.replace(causal=False)), cache, *tokens)
    with pytest.raises(ShapeError, match="new tokens"):
        attend_cached(Router(cfg), cache, tokens[0][:, :, :1], *tokens[1:])
    layer = SparseAttention(cfg)
    x = torch.randn(2, 5, HEADS * DIM)
    with torch.no_grad():
        with pytest.raises(CacheError, match="cross-attention"):
            layer(x, key_value=x, cache=cache)
        with pytest.raises(CacheError, match="attention mask"):
            layer(x, attention_mask=torch.ones(5, 5, dtype=torch.bool), cache=cache)
        with pytest.raises(CacheError, match="segment_ids"):
            layer(x, segment_ids=torch.zeros(2, 5, dtype=torch.int64), cache=cache)
        with pytest.raises(CacheError, match="SparseTransformer"):
            CachedGraphSparseTransformer(cfg, 2)(x, cache=SSACache())
    assert cache.length == 0, "what was refused must not be cached"


def test_another_layer_is_refused() -> None:
    tokens, cache = make_tokens(length=5), LayerCache()
    attend_cached(Router(config("preset")), cache, *tokens)
    with pytest.raises(CacheError, match="another layer"):
        attend_cached(Router(config("preset")), cache, *tokens)
    assert cache.length == 5, "what was refused must not be cached"


def test_summaries_of_a_cache_have_no_gradients() -> None:
    tokens, cache = make_tokens(), LayerCache()
    _, graph = attend_cached(Router(config("preset")), cache, *tokens)
    assert graph is not None
    assert graph.summaries is not None
    assert graph.summaries.made is not None
    with pytest.raises(GraphError, match="no gradient"):
        neighbor_attention(tokens[0], tokens[1].requires_grad_(), tokens[2], graph)


# -- the cache itself ----------------------------------------------------------------------------------------------


def test_keys_and_values() -> None:
    _, k, v = make_tokens()
    cache = LayerCache()
    with pytest.raises(CacheError, match="empty"):
        _ = cache.keys
    for a, b in ((0, 1), (1, 70), (70, 71), (71, LENGTH)):
        cache.append(k[:, :, a:b], v[:, :, a:b])
    assert torch.equal(cache.keys, k)
    assert torch.equal(cache.values, v)
    cache.crop(90)
    assert torch.equal(cache.keys, k[:, :, :90])
    cache.reorder([1, 1, 0])
    assert torch.equal(cache.values, v[[1, 1, 0], :, :90])


def test_padding_is_kept_as_zeros() -> None:
    _, k, v = make_tokens()
    k[1, :, :10] = float("nan")
    cache, keep = LayerCache(), torch.ones((2, LENGTH), dtype=torch.bool)
    keep[1, :10] = False
    cache.append(k, v, keep)
    assert cache.key_keep is not None
    assert torch.equal(cache.key_keep, keep)
    assert not bool(cache.keys[1, :, :10].any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v: (k[:1], v[:1]), "the cache holds k"),
        (lambda k, v: (k.double(), v.double()), "float64"),
        (lambda k, v: (k[..., :8], v), "the cache holds k"),
        (lambda k, v: (k, v[:, :, :1]), "must be"),
        (lambda k, v: (k, v, torch.ones((2, 3), dtype=torch.bool)), "key_keep"),
        (lambda k, v: (k, v, torch.ones((2, 5))), "key_keep"),
    ],
)
def test_append_checks(change: Any, message: str) -> None:
    _, k, v = make_tokens(length=5)
    cache = LayerCache()
    cache.append(k, v)
    with pytest.raises(CacheError, match=message):
        cache.append(*change(k, v))
    assert cache.length == 5


def test_bad_arguments() -> None:
    cache = SSACache(layers=1)
    cache.layer(0).append(*make_tokens(length=5)[1:])
    for wrong in (-1, 6, 2.0, True):
        with pytest.raises(CacheError, match="crop"):
            cache.crop(wrong)  # type: ignore[arg-type]
    for indices in ([2], [-1], [0.5], [[0]]):
        with pytest.raises(CacheError, match="batch_indices"):
            cache.reorder(indices)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="layers"):
        SSACache(layers=-1)
    with pytest.raises(CacheError, match="layer index"):
        cache.layer(-1)
    assert len(cache) == 1
    cache.layer(3)
    assert len(cache) == 4


def test_growth_is_amortised() -> None:
    grown, rooms = GrowingTensor(axis=2), set()
    for _ in range(1000):
        grown.append(torch.ones(1, 2, 1, 4))
        assert grown.room is not None
        rooms.add(grown.room.data_ptr())
    assert grown.view.shape == (1, 2, 1000, 4)
    assert len(rooms) <= 6
    grown.append(torch.ones(1, 2, 50_000, 4))
    assert grown.room is not None
    assert grown.room.shape[2] < 1.3 * grown.length


def test_sources_without_a_state_see_all_keys() -> None:
    class Nearest(NeighborSource):
        def propose(self, ctx: Any) -> Ranges:
            assert ctx.decoding
            assert ctx.state is None
            seen.append(ctx.num_keys)
            return Ranges.everything()

    seen: list[int] = []
    assert Nearest.rebuilds
    registry = SourceRegistry()
    registry.register("nearest", Nearest)
    router = Router(config("preset").replace(sources={"nearest": {}}), registry=registry)
    decode(router, LayerCache(), make_tokens(), [100, 1, 1])
    assert seen == [100, 101, 102]


@pytest.mark.parametrize("how", ["another tensor", "in place", "below fewer keys"])
def test_what_a_source_keeps_is_checked_when_it_changes(how: str) -> None:
    """Bounds that passed are not looked at again, but whatever takes their place is."""

    class Kept(NeighborSource):
        rebuilds = False

        def init_state(self, ctx: RoutingContext) -> list[Tensor]:
            return [torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 30, dtype=torch.int32)]

        def append(self, state: list[Tensor], ctx: RoutingContext) -> list[Tensor]:
            return state

        def crop(self, state: list[Tensor], length: int) -> list[Tensor]:
            return state

        def propose(self, ctx: RoutingContext) -> Spans:
            start, end = ctx.state  # these very tensors in a step
            return (
                Spans(start, end)
                if ctx.num_queries == 1
                else Spans(*(x.expand(1, ctx.num_queries) for x in (start, end)))
            )

    registry = SourceRegistry()
    registry.register("kept", Kept)
    router = Router(config("preset").replace(sources={"kept": {}}), registry=registry)
    cache, tokens = LayerCache(), make_tokens()
    decode(router, cache, tokens, [50, 1, 1])
    state = cache.states._indices["kept"].state
    if how == "another tensor":
        state[1] = torch.full((1, 1), 1000, dtype=torch.int32)
    elif how == "in place":
        state[0].fill_(-1)
    else:
        cache.crop(20)
    with pytest.raises(ProposalError, match=r"Spans\.(start|end) must lie in"):
        decode(router, cache, tokens, [1])
