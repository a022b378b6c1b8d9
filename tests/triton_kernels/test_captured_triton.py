"""Captured steps, in the interpreter: a replay runs the step of the capture again, with its numbers of the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssa_framework import LayerCache, SSAConfig, captured
from ssa_framework.captured import CapturedSteps
from ssa_framework.decoding import attend_cached
from ssa_framework.errors import ShapeError
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
    monkeypatch.setattr(triton_few_call, "_PROGRAMS", 8)


def both(layer: Router, given: list[Tensor], first: int, changes: dict[int, int]) -> CapturedSteps:
    """Captured steps beside plain ones, behind ``first`` tokens at once; at ``changes`` the cache is cropped."""
    plain, cache = LayerCache(), LayerCache()
    steps = CapturedSteps(layer, cache)
    other = Router(layer.config)
    for c, r in ((plain, other), (cache, layer)):
        attend_cached(r, c, *(x[:, :, :first] for x in given))
    place = first
    while place < given[0].shape[2]:
        new = [x[:, :, place : place + 1] for x in given]
        want, _ = attend_cached(other, plain, *new)
        before = steps.replays
        torch.testing.assert_close(steps(*new), want, rtol=1e-6, atol=1e-6)
        place += 1
        if steps.replays > before:  # a graph knows addresses only: what it reads must be held
            assert steps._capture is not None
            assert steps._capture.place.position.tolist() == [[place - 1]]
        back = changes.pop(place, None)
        if back is not None:
            plain.crop(back)
            cache.crop(back)
            place = back
    torch.testing.assert_close(cache.keys, plain.keys, rtol=0, atol=0)
    torch.testing.assert_close(cache.values, plain.values, rtol=0, atol=0)
    return steps


def test_same_as_plain_steps() -> None:
    steps = both(router(), tokens(27, batch=2), 13, {})
    assert steps.captures == 3
    assert steps.replays == 2 + 6 + 2


def test_same_after_a_crop_and_where_room_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssa_framework.growing._SMALLEST_ROOM", 1)
    steps = both(router(), tokens(23), 17, {20: 18})
    assert steps.captures >= 2
    assert steps.replays > 4


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
    assert CapturedSteps(layer, cache)._steady_steps(given[0][:, :, 19:20]) == 0


def test_bands_are_captured() -> None:
    steps = both(router(sources={"self": {}, "window": {"size": 5}}), tokens(24), 20, {})
    assert (steps.captures, steps.replays) == (1, 4)


def test_padding_several_tokens_and_mistakes() -> None:
    layer, given = router(), tokens(22, batch=2)
    padded, cache = LayerCache(), LayerCache()
    keep = torch.arange(20) >= torch.tensor([[0], [3]])
    attend_cached(layer, padded, *(x[:, :, :20] for x in given), key_keep=keep)
    assert CapturedSteps(layer, padded)._steady_steps(given[0][:, :, 20:21]) == 0
    layer = router()
    steps = CapturedSteps(layer, cache)
    assert steps(*(x[:, :, :20] for x in given)).shape == (2, HEADS, 20, DIM)
    steps(*(x[:, :, 20:21] for x in given))
    assert (steps.captures, cache.length) == (1, 21)
    with pytest.raises(ShapeError, match="of the new tokens"):
        steps(given[0][:, :, :1], *(x[:, :, :2] for x in given[1:]))
    assert cache.length == 21
