"""Captured steps, in the interpreter: a replay runs the step of the capture again, with its numbers of the host."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from integrations.tiny_models import causal_lm
from integrations.tiny_models import tokens as tokens_of_models
from ssa_framework import LayerCache, SparseAttention, SSACache, SSAConfig, captured, sparse_attention
from ssa_framework.captured import CapturedSteps
from ssa_framework.decoding import attend_cached, captured_steps
from ssa_framework.errors import CacheError, ShapeError
from ssa_framework.hookspecs import hookimpl
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.ops.neighbor_attention import triton_few_call
from ssa_framework.router import Router

HEADS, KV_HEADS, DIM = 4, 2, 16
CLUSTERS = {"levels": [[8, 4], [16, 8]], "keys": 8}


def router(**options: object) -> Router:
    sources = {"global": {"tokens": 2}, "clusters": CLUSTERS}
    config = {"sources": sources, "num_neighbors": 8, "graph_heads": "kv", "dense_below": 0} | options
    return Router(
        SSAConfig(d_model=HEADS * DIM, num_heads=HEADS, num_kv_heads=KV_HEADS, causal=True, backend="triton", **config)
    )


def tokens(length: int, batch: int = 1, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, length, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS)]


def fake_record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    out = step()
    return lambda: out.copy_(step()), out


@pytest.fixture(autouse=True)
def captures_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "_may_be_captured", lambda x: True)
    monkeypatch.setattr(captured, "_record", fake_record)
    monkeypatch.setattr(captured, "_WORTH", 2)
    monkeypatch.setattr(captured, "_IN_A_ROW", 1)
    monkeypatch.setattr(triton_few_call, "_PROGRAMS", 8)


def both(layer: Router, given: list[Tensor], first: int, changes: dict[int, int]) -> tuple[int, int]:
    """Captured steps beside plain ones, behind ``first`` tokens at once; at ``changes`` the cache is cropped. Returns
    how many captures and replays there were."""
    plain, cache = LayerCache(), LayerCache()
    other = Router(layer.config)
    for c, r in ((plain, other), (cache, layer)):
        attend_cached(r, c, *(x[:, :, :first] for x in given))
    place, captures, replays = first, 0, 0
    while place < given[0].shape[2]:
        new = [x[:, :, place : place + 1] for x in given]
        want, _ = attend_cached(other, plain, *new)
        steps = captured_steps(cache.states)
        before = steps.captures, steps.replays
        got, graph = attend_cached(layer, cache, *new, replay=True)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        captures, replays = captures + steps.captures - before[0], replays + steps.replays - before[1]
        assert (graph is None) == (steps.replays > before[1])
        if graph is None:  # a graph knows addresses only: what it reads must be held
            assert steps._capture is not None
            assert steps._capture.place.position.tolist() == [[place]]
        place += 1
        back = changes.pop(place, None)
        if back is not None:
            plain.crop(back)
            cache.crop(back)
            assert captured_steps(cache.states) is not steps
            place = back
    torch.testing.assert_close(cache.keys, plain.keys, rtol=0, atol=0)
    torch.testing.assert_close(cache.values, plain.values, rtol=0, atol=0)
    return captures, replays


def steady_steps(layer: Router, cache: LayerCache, q: Tensor) -> int:
    return CapturedSteps()._steady_steps(layer, cache.states, cache.rooms, cache.length, q)


def test_same_as_plain_steps() -> None:
    captures, replays = both(router(), tokens(24, batch=2), 13, {})
    assert captures == 2
    assert replays == 2 + 6


def test_same_after_a_crop_and_where_room_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssa_framework.growing._SMALLEST_ROOM", 1)
    captures, replays = both(router(), tokens(23), 17, {20: 18})
    assert captures >= 2
    assert replays > 4


@pytest.mark.parametrize(
    "options",
    [
        {"sources": {"clusters": CLUSTERS | {"attend": "topk"}}},
        {"sources": {"lsh": {}}},
        {"sources": {"global": {"indices": [60]}, "clusters": CLUSTERS}},
        {"dense_below": 100},
    ],
    ids=["listed", "lsh", "not reached", "dense"],
)
def test_plain_steps_where_a_step_depends_on_more_than_positions(options: dict[str, object]) -> None:
    layer = router(**options)
    cache, given = LayerCache(), tokens(22)
    attend_cached(layer, cache, *(x[:, :, :19] for x in given))
    assert steady_steps(layer, cache, given[0][:, :, 19:20]) == 0
    assert attend_cached(layer, cache, *(x[:, :, 19:20] for x in given), replay=True)[1] is not None


def test_bands_are_captured() -> None:
    assert both(router(sources={"self": {}, "window": {"size": 5}}), tokens(24), 20, {}) == (1, 4)


def test_padding_several_tokens_and_mistakes() -> None:
    layer, given = router(), tokens(22, batch=2)
    padded, cache = LayerCache(), LayerCache()
    keep = torch.arange(20) >= torch.tensor([[0], [3]])
    attend_cached(layer, padded, *(x[:, :, :20] for x in given), key_keep=keep)
    assert attend_cached(layer, padded, *(x[:, :, 20:21] for x in given), replay=True)[1] is not None
    layer = router()
    assert attend_cached(layer, cache, *(x[:, :, :20] for x in given), replay=True)[0].shape == (2, HEADS, 20, DIM)
    attend_cached(layer, cache, *(x[:, :, 20:21] for x in given), replay=True)
    assert (captured_steps(cache.states).captures, cache.length) == (1, 21)
    with pytest.raises(ShapeError, match="of the new tokens"):
        attend_cached(layer, cache, given[0][:, :, :1], *(x[:, :, :2] for x in given[1:]), replay=True)
    assert cache.length == 21


def test_other_tokens_in_between_and_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "_IN_A_ROW", 3)
    layer, given, cache = router(sources={"self": {}, "window": {"size": 5}}), tokens(40), LayerCache()
    attend_cached(layer, cache, *(x[:, :, :10] for x in given))

    def replayed(**options: object) -> bool:
        new = [x[:, :, cache.length : cache.length + 1] for x in given]
        return attend_cached(layer, cache, *new, replay=True, **options)[1] is None

    assert [replayed() for _ in range(5)] == [False, False, True, True, True]
    attend_cached(layer, cache, *(x[:, :, 15:18] for x in given))  # several
    assert [replayed() for _ in range(4)] == [False, False, True, True]
    attend_cached(layer, cache, *(x[:, :, 22:23] for x in given))  # one that wants its graph
    assert [replayed() for _ in range(3)] == [False, False, True]
    steps = captured_steps(cache.states)
    before = steps.captures
    assert replayed(scale=0.5)
    assert steps.captures == before + 1
    with pytest.raises(CacheError, match="another layer"):
        attend_cached(Router(layer.config), cache, *(x[:, :, 27:28] for x in given), replay=True, scale=0.5)
    cache.crop(26)
    assert [replayed() for _ in range(4)] == [False, False, True, True]
    observed: list[object] = []

    class Observer:
        @hookimpl
        def ssa_graph_built(self, graph: object, layer: object) -> None:
            observed.append(graph)

    observer = Observer()
    layer.registry.manager.register(observer)
    try:
        assert not replayed()
        assert len(observed) == 1
    finally:
        layer.registry.manager.unregister(observer)


def test_steps_that_cannot_be_captured_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "_record", refuse)
    layer, given, cache = router(sources={"self": {}, "window": {"size": 5}}), tokens(14), LayerCache()
    whole, _ = attend_cached(layer, LayerCache(), *given)
    outs = [attend_cached(layer, cache, *(x[:, :, :10] for x in given), replay=True)[0]]
    with pytest.warns(UserWarning, match="launched one by one: operation not permitted"):
        outs.append(attend_cached(layer, cache, *(x[:, :, 10:11] for x in given), replay=True)[0])
    outs += [
        attend_cached(layer, cache, *(x[:, :, place : place + 1] for x in given), replay=True)[0]
        for place in range(11, 14)
    ]
    torch.testing.assert_close(torch.cat(outs, dim=2), whole, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_know_no_capture() -> None:
    layer, given, cache = router(sources={"self": {}, "window": {"size": 5}}), tokens(20), LayerCache()
    for place in range(18):
        attend_cached(layer, cache, *(x[:, :, place : place + 1] for x in given), replay=True)
    assert captured_steps(cache.states).replays > 0
    cache.states.captured.handle = threading.Lock()  # what no one can copy, as a CUDA graph
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.states.captured is None
        torch.testing.assert_close(twin.keys, cache.keys, rtol=0, atol=0)


def test_layers_and_functions_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    config = router(sources={"self": {}, "window": {"size": 5}}).config
    layer, x, kept, plain = SparseAttention(config).eval(), torch.randn(1, 12, HEADS * DIM), SSACache(), SSACache()
    got, want = [], []
    with torch.no_grad():
        for place in range(12):
            got.append(layer(x[:, place : place + 1], cache=kept.layer(0))[0])
            want.append(layer(x[:, place : place + 1], cache=plain.layer(0), return_stats=True)[0])
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1), rtol=1e-5, atol=1e-6)
    assert captured_steps(kept.layer(0).states).replays == 11  # all but the first, which makes the room
    assert plain.layer(0).states.captured is None
    cache, given = LayerCache(), tokens(6)
    for place in range(6):
        sparse_attention(
            *(x[:, :, place : place + 1] for x in given), is_causal=True, enable_gqa=True, config=config, cache=cache
        )
    assert captured_steps(cache.states).replays == 5


def test_models_of_transformers_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = causal_lm("llama", num_hidden_layers=1), tokens_of_models(batch=2, length=17)
    config = SSAConfig(
        sources={"self": {}, "window": {"size": 5}}, graph_heads="kv", num_neighbors=8, dense_below=0, backend="triton"
    )
    counted: list[int] = []
    run = CapturedSteps.run

    def counting(self: CapturedSteps, *args: object, **kwargs: object) -> Tensor | None:
        out = run(self, *args, **kwargs)
        counted.append(out is not None)
        return out

    monkeypatch.setattr(CapturedSteps, "run", counting)
    texts = []
    for captured_at_all in (True, False):
        monkeypatch.setattr(captured, "_may_be_captured", lambda x, yes=captured_at_all: yes)
        with use_sparse_attention(model, config, dense_layers=()):
            texts.append(model.generate(ids, max_new_tokens=7, do_sample=False))
        assert (sum(counted) >= 4) == captured_at_all
        counted.clear()
    torch.testing.assert_close(*texts, rtol=0, atol=0)
