"""What ``lsh`` keeps in a cache: the slots of one call, across numbers of planes, and its two implementations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ssa_plugins.lsh.source as lsh_source
from ssa_framework import LayerCache, SSAConfig
from ssa_framework.decoding import attend_cached
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.lsh_slices import KeptHashes
from ssa_framework.router import Router
from ssa_plugins.lsh import LSH, num_planes
from ssa_plugins.lsh.directions import directions
from test_lsh_slices import members

LENGTH, HEADS, KV_HEADS, DIM = 300, 4, 2, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "hyperplane": {"rounds": 3, "candidates": 6},
    "hyperplane-probes": {"rounds": 2, "probes": 3, "candidates": 12},
    "cross-polytope": {"rounds": 3, "candidates": 6, "hash": "cross_polytope"},
    "two-polytopes": {"rounds": 2, "probes": 2, "candidates": 2, "hash": "cross_polytope", "limit": 5},
    "not-centred": {"rounds": 3, "candidates": 6, "center": False, "max_planes": 3},
    "tight-limit": {"rounds": 1, "candidates": 6, "limit": 2},
}
Tokens = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=["usual-sizes", "small-sizes"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that orders are made, left and made anew within a test; or nothing but latest keys."""
    if request.param == "small-sizes":
        for name, size in {"few": 4, "shortest_tail": 24, "tail_share": 8, "margin": 7, "save_every": 16}.items():
            monkeypatch.setattr(KeptHashes, name, size)


def router(options: str) -> Router:
    sources = {"self": {}, "global": {"tokens": 2}, "lsh": OPTIONS[options]}
    config = SSAConfig(d_model=HEADS * DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, num_neighbors=16, causal=True)
    return Router(config.replace(sources=sources, dense_below=0))


def make_tokens(batch: int = 1, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((batch, heads, LENGTH, DIM), generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k + 0.5, v


def slots(graph: Any) -> Tensor:
    return torch.nn.functional.pad(graph.to_dense_mask(), (0, LENGTH - graph.num_keys))


def prefill(routes: Router, tokens: Tokens, keep: Tensor | None = None) -> Tensor:
    q, k, _ = tokens
    mask = make_edge_mask(
        batch=len(q), heads=HEADS, queries=LENGTH, keys=LENGTH, device=q.device, causal=True, key_padding_mask=keep
    )
    return slots(routes(q, k, mask))


def decode(
    routes: Router, cache: LayerCache, tokens: Tokens, chunks: Sequence[int], keep: Tensor | None = None
) -> Tensor:
    """Neighbors of the tokens behind those that are cached."""
    found = []
    for length in chunks:
        rows = slice(cache.length, cache.length + length)
        some = None if keep is None else keep[:, rows]
        _, graph = attend_cached(routes, cache, *(x[:, :, rows] for x in tokens), key_keep=some)
        found.append(slots(graph))
    return torch.cat(found, dim=2)


def assert_same(got: Tensor, want: Tensor, keep: Tensor | None = None) -> None:
    real = torch.ones(got.shape[:3], dtype=torch.bool)
    if keep is not None:
        real = keep[:, None, keep.shape[1] - got.shape[2] :].expand(got.shape[:3])
    wrong = ((got != want[:, :, want.shape[2] - got.shape[2] :]).any(-1) & real).nonzero()
    assert not wrong.numel(), f"token {int(wrong[0, 2])} of those compared differs"


@pytest.mark.parametrize("options", OPTIONS)
def test_token_by_token(options: str, sizes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot is that of one call, from the first token on, while the number of planes grows; and no step hashes
    the keys that are there."""
    routes, tokens = router(options), make_tokens()
    want = prefill(routes, tokens)
    source = routes.sources["lsh"]
    assert isinstance(source, LSH)
    assert not source.rebuilds
    assert source._bits_of(LENGTH) >= 3

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a step that hashes all keys")

    monkeypatch.setattr(lsh_source, "lsh_slices", refuse)
    assert_same(decode(routes, LayerCache(), tokens, [1] * LENGTH), want)


@pytest.mark.parametrize("options", OPTIONS)
def test_chunks(options: str, sizes: None) -> None:
    """Few tokens and many, within a number of planes and across."""
    routes, tokens = router(options), make_tokens(batch=2)
    want = prefill(routes, tokens)
    for chunks in ([LENGTH], [150, 3, 2, 1, 40, 1, 1, 17, 1, 84], [30] * 10, [2] * 150, [129, *[1] * 171]):
        assert_same(decode(routes, LayerCache(), tokens, chunks), want)


@pytest.mark.parametrize("options", ["hyperplane-probes", "cross-polytope", "two-polytopes"])
def test_different_lengths(options: str, sizes: None) -> None:
    """Batch elements that go by different numbers of planes, or by none yet; padding in the middle."""
    routes, tokens = router(options), make_tokens(batch=4)
    keep = torch.arange(LENGTH)[None] >= torch.tensor([[0], [70], [230], [141]])
    keep[3, 200:205] = False
    want = prefill(routes, tokens, keep)
    for chunks in ([1] * LENGTH, [160, *[1] * 20, 3, 30, *[1] * 87]):
        assert_same(decode(routes, LayerCache(), tokens, chunks, keep), want, keep)


@pytest.mark.parametrize("options", ["hyperplane", "two-polytopes"])
def test_crop(options: str, sizes: None) -> None:
    """Other tokens follow behind those that remain, wherever the crop falls: also across numbers of planes."""
    routes, tokens, other, cache = router(options), make_tokens(), make_tokens(seed=1), LayerCache()
    want = prefill(routes, tokens)
    decode(routes, cache, other, [LENGTH - 3, 1, 1, 1])
    cache.crop(0)
    decode(routes, cache, tokens, [200])
    for kept, drafts in itertools.product((199, 196, 180, 144, 130, 60), (1, 6)):
        cache.crop(kept)
        decode(routes, cache, other, [drafts, 1])
        cache.crop(kept)
        got = decode(routes, cache, tokens, [1] if kept > 195 else [1, 1, 3, 195 - kept])
        assert_same(got, want[:, :, : cache.length])
        if cache.length < 200:
            decode(routes, cache, tokens, [200 - cache.length])


@pytest.mark.parametrize("options", ["hyperplane-probes", "cross-polytope"])
def test_beams(options: str, sizes: None) -> None:
    routes, tokens, cache = router(options), make_tokens(batch=3), LayerCache()
    keep = torch.arange(LENGTH)[None] >= torch.tensor([[0], [90], [33]])
    decode(routes, cache, tokens, [150, 1, 1], keep)
    origin = torch.tensor([1, 0, 1, 2])
    cache.reorder(origin)
    tail = make_tokens(batch=4, seed=2)
    moved: Any = tuple(torch.cat([x[origin][:, :, :152], y[:, :, 152:]], 2) for x, y in zip(tokens, tail, strict=True))
    got = decode(routes, cache, moved, [1] * 20 + [128], keep[origin])
    assert_same(got, prefill(routes, moved, keep[origin]), keep[origin])


@pytest.mark.parametrize("options", ["hyperplane", "cross-polytope"])
def test_other_planes(options: str) -> None:
    """Planes that are loaded while a cache is in use: all keys are hashed again."""
    routes, tokens, cache = router(options), make_tokens(), LayerCache()
    decode(routes, cache, tokens, [200, 1])
    source = routes.sources["lsh"]
    assert isinstance(source, LSH)
    fresh = directions(source.hash, *source.planes.shape[:1], source.max_planes, DIM, torch.Generator().manual_seed(9))
    routes.load_state_dict({"sources.lsh.planes": fresh})
    assert_same(decode(routes, cache, tokens, [1] * 20 + [79]), prefill(routes, tokens))


def test_planes_on_the_host() -> None:
    """The number of planes of one choice is that of the tensor."""
    for options in ("hyperplane-probes", "two-polytopes", "not-centred"):
        source = router(options).sources["lsh"]
        assert isinstance(source, LSH)
        choices = torch.arange(1, 30_000)
        want = torch.where(choices <= 16, 0, num_planes(choices, source.per_bucket, source.max_planes))
        assert [source._bits_of(choice) for choice in choices.tolist()] == want.tolist()
        assert source._bits_of(0) == -1


def test_every_key_of_a_choice_that_fits() -> None:
    """A limit cuts buckets, not the choice of a query that may have all of it."""
    routes, tokens = router("tight-limit"), make_tokens()
    found = prefill(routes, tokens)
    assert torch.equal(found[:, :, :16, :16], torch.ones(16, 16).tril().bool().expand(1, HEADS, -1, -1))


@pytest.mark.parametrize("family", ["hyperplane", "cross_polytope"])
@pytest.mark.parametrize("center", [False, True], ids=["raw", "centred"])
def test_torch_equals_numba(family: Any, center: bool, sizes: None) -> None:
    """Codes, orders and lists of two implementations, on inputs whose projections are exact where they are not
    centred, and of Gaussian keys where they are."""
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        if center:
            return torch.randn(shape, generator=generator)
        return torch.randint(-40, 41, shape, generator=generator).float()

    weight = numbers(3, *directions(family, 1, 9, DIM, generator).shape[1:])
    q, k = numbers(3, HEADS, LENGTH, DIM), numbers(3, KV_HEADS, LENGTH, DIM)
    keep = torch.arange(LENGTH)[None] >= torch.tensor([[0], [20], [55]])
    k = k.masked_fill(~keep[:, None, :, None], 0.0)
    both = [
        KeptHashes(
            family, 9, batch=3, heads=KV_HEADS, functions=3, dim=DIM, center=center, device=q.device, backend=backend
        )
        for backend in ("numba", "torch")
    ]
    length = 0
    for new, cropped in ((100, 0), (1, 0), (1, 5), (60, 0), (3, 90), (40, 2), (1, 0), (30, 0)):
        stop = length + new
        bits = [(4 if stop < 150 else 5), 3, 0 if stop < 110 else 2]
        found = []
        for kept in both:
            kept.append(k[:, :, :stop], weight, bits, keep[:, :stop])
            found.append(kept.slices(q[:, :, length:stop], weight, bits, probes=2, limit=9, keep=keep[:, :stop]))
        assert torch.equal(both[0].codes_room()[..., :stop], both[1].codes_room()[..., :stop])
        assert members(*found[0]) == members(*found[1])
        for kept in both:
            kept.crop(stop - cropped)
        length = stop - cropped
    for kept in both:
        kept.reorder(torch.tensor([2, 0]))
    found = []
    for kept in both:
        kept.append(k[[2, 0], :, : length + 1], weight, [2, 5], keep[[2, 0], : length + 1])
        found.append(
            kept.slices(
                q[[2, 0], :, length : length + 1], weight, [2, 5], probes=2, limit=9, keep=keep[[2, 0], : length + 1]
            )
        )
    assert members(*found[0]) == members(*found[1])


@pytest.mark.parametrize("family", ["hyperplane", "cross_polytope"])
@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
def test_nothing_waits_for_a_device(family: Any, padded: bool, sizes: None) -> None:
    """On tensors that hold nothing: whatever asked for a number, or met a tensor of the CPU, would raise."""
    k = torch.empty((3, KV_HEADS, LENGTH, DIM), device="meta")
    planes = torch.empty((2, 8, DIM), device="meta")
    keep = torch.empty((3, LENGTH), dtype=torch.bool, device="meta") if padded else None
    kept = KeptHashes(
        family, 4, batch=3, heads=KV_HEADS, functions=2, dim=DIM, center=True, device=torch.device("meta")
    )
    for length, queries in ((200, 100), (201, 1), (203, 2), (LENGTH, 20)):
        some = None if keep is None else keep[:, :length]
        bits = [3, 4, 3]  # batch elements of one number that do not follow one another
        kept.append(k[:, :, :length], planes, bits, some)
        q = torch.empty((3, HEADS, queries, DIM), device="meta")
        order, start, end = kept.slices(q, planes, bits, probes=0, limit=5, keep=some)
        assert order.device == start.device == end.device == k.device
        assert start.shape == (3, HEADS, queries, 2, 1)
