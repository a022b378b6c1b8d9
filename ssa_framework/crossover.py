"""``dense_below="auto"``: is a sparse call of this size faster than a dense one, on this machine?

The answer is measured once per process for each kind of call and each power of two, with the same sources on random
data, and kept. So a layer with it is never slower than dense attention by more than the noise of that measurement,
but what it computes depends on the machine: a length that is faster dense is computed densely.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.neighbor_attention import neighbor_attention

if TYPE_CHECKING:
    from ssa_framework.router import Router

SHORTEST = 512
"""Below this many keys the overhead of routing never pays, and nothing is measured."""
_REPEATS, _SECONDS, _MOST_REPEATS = 3, 0.5, 15
"""Rounds at least; while they take less than so long, further ones, up to so many."""
_MARGIN = 0.93  # sparse must win by more than noise
_KV_HEADS = 4  # enough to weigh the fixed cost of a call as a real call does

_answers: dict[tuple[Any, ...], bool] = {}
_lock = threading.Lock()


def faster_dense(router: Router, q: Tensor, k: Tensor, *, causal: bool, cross: bool) -> bool:
    """Whether attention of ``q [B, H, N, D]`` over ``k [B, Hkv, M, D]`` is faster densely.

    Lengths are rounded down to powers of two, so that few of them are ever measured, and heads to a few. The first
    call of a kind takes as long as about three more calls.
    """
    queries, keys = q.shape[2], k.shape[2]
    if keys < SHORTEST or queries == 0:
        return True
    kv_heads = min(k.shape[1], _KV_HEADS)
    heads = kv_heads * (q.shape[1] // k.shape[1])
    shapes = (heads, _power_of_two(queries), q.shape[3]), (kv_heads, _power_of_two(keys), q.shape[3])
    with_backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    kind = (
        repr((router.mix, router.layer)), shapes, q.dtype, q.device, causal, cross, with_backward,
        torch.get_num_threads(),
    )  # fmt: skip
    with _lock:  # one thread measures, undisturbed by those that wait for the same answer
        if kind not in _answers:
            _answers[kind] = _measure(router, shapes, q.dtype, q.device, causal, cross, with_backward)
        return _answers[kind]


def _power_of_two(length: int) -> int:
    return 1 << (length.bit_length() - 1)


def _measure(
    router: Router,
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    causal: bool,
    cross: bool,
    with_backward: bool,
) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn((1, *shape), generator=generator, device=device).to(dtype).requires_grad_(with_backward)
        for shape in (shapes[0], shapes[1], shapes[1])
    )
    (heads, queries, _), (_, keys, _) = shapes
    positions = torch.arange(keys - queries, keys, device=device) if causal and queries < keys else None
    mask = make_edge_mask(
        batch=1, heads=heads, queries=queries, keys=keys, device=device, causal=causal, query_positions=positions
    )

    def run(dense: bool) -> Callable[[], None]:
        def attend() -> None:
            graph = router.route(q, k, mask, cross=cross, dense_below=2**62 if dense else 0)
            out, _ = neighbor_attention(q, k, v, graph, dense=dense)
            if with_backward:
                torch.autograd.grad(out.sum(), (q, k, v))

        return attend

    def seconds(attend: Callable[[], None]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        attend()
        _synchronize(device)
        return time.perf_counter() - start

    dense, sparse = run(True), run(False)
    ratios: list[float] = []
    with torch.set_grad_enabled(with_backward):
        begin = time.perf_counter()
        for done in range(_MOST_REPEATS):
            if done >= _REPEATS and time.perf_counter() - begin > _SECONDS:
                break
            taken = seconds(dense)
            ratios.append(seconds(sparse) / taken)  # in turn, so that what else the machine does hits both
    return statistics.median(ratios) > _MARGIN


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
