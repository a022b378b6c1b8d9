"""Attention of new tokens to everything in a cache: append, route, attend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ssa_framework.cache import IndexStates, LayerCache
from ssa_framework.captured import CapturedSteps, StepOptions
from ssa_framework.errors import CacheError, ConfigError, ShapeError
from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.ops.neighbor_attention.api import check_tensors
from ssa_framework.router import Router


def attend_cached(
    router: Router,
    cache: LayerCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_keep: Tensor | None = None,
    scale: float | None = None,
    fp32_weights: bool = False,
    source_inputs: Mapping[str, Any] | None = None,
    replay: bool = False,
) -> tuple[Tensor, NeighborGraph | None]:
    """Append tokens to a cache and attend from them to everything that is in it. There is no dropout.

    However tokens are cut into calls, each gets the same neighbors. So a query counts as few keys for ``dense_below``
    where it has few before it, not where the call ends early.

    Args:
        q: ``[B, H, new, D]``. k: ``[B, Hkv, new, D]``. v: ``[B, Hkv, new, Dv]``; none of them collects gradients.
        key_keep: bool ``[B or 1, new]``, False = padding.
        scale, fp32_weights: see `neighbor_attention`. source_inputs: see `build_graph`.
        replay: a single token on CUDA may be the replay of a captured step, which has no graph; see `CapturedSteps`.

    Returns:
        ``[B, H, new, Dv]`` and the graph of the last of these queries; ``None`` where there are no tokens, or a replay.

    Raises:
        CacheError: what `LayerCache.append` refuses, or a cache of another router. ConfigError: attention is not
        causal. ShapeError: other numbers of queries than keys. Nothing is appended then.
    """
    one = q.dim() == 4 and q.shape[2] == 1
    if replay and one and key_keep is None and cache.key_keep is None and not source_inputs:
        out = captured_steps(cache.states).run(
            router, cache.states, cache.rooms, cache.length, q, k, v, StepOptions(scale, fp32_weights),
            lambda: check_new_tokens(router, cache, q, k, v),
        )  # fmt: skip
        if out is not None:
            cache.advance()
            return out, None
    check_new_tokens(router, cache, q, k, v, key_keep)
    cache.append(k, v, key_keep, checked=True)
    if not cache.length:
        return q.new_zeros((*q.shape[:3], v.shape[3])), None
    return attend_last(
        router,
        cache.states,
        q,
        cache.keys,
        cache.values,
        key_keep=cache.key_keep,
        scale=scale,
        fp32_weights=fp32_weights,
        source_inputs=source_inputs,
    )


def captured_steps(states: IndexStates) -> CapturedSteps:
    """Those of the sequence whose index states these are."""
    if states.captured is None:
        states.captured = CapturedSteps()
    steps: CapturedSteps = states.captured
    return steps


def check_new_tokens(
    router: Router, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None = None
) -> None:
    """Raise what `attend_cached` raises before anything is changed."""
    check_tensors(q, k, v)
    if not router.layer.causal:
        raise ConfigError("a cache needs causal attention (causal=True): its tokens cannot attend to those to come")
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"queries, keys and values are those of the new tokens, got {q.shape[2]} and {k.shape[2]}")
    if torch.is_grad_enabled() and q.requires_grad:
        raise CacheError("a cache is for inference: decode under torch.no_grad(), or pass detached queries")
    cache.states.check_owner(router)
    cache.check(k, v, key_keep)


def attend_last(
    router: Router,
    states: IndexStates,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_keep: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    fp32_weights: bool = False,
    source_inputs: Mapping[str, Any] | None = None,
    rooms: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, NeighborGraph | None]:
    """Attend from the last tokens of a sequence to all of it; nothing is differentiable.

    Args:
        states: what the sources keep of the keys.
        q: ``[B, H, new, D]``. k: ``[B, Hkv, M, D]``. v: ``[B, Hkv, M, Dv]``, padding being finite.
        key_keep: bool ``[B or 1, M]``, False = padding.
        scale, dropout_p, fp32_weights: see `neighbor_attention`. source_inputs: see `build_graph`.
        rooms: ``k`` and ``v`` with the places behind them that are not used yet. Where given, a single token on CUDA
            may be the replay of a captured step, which has no graph; see `CapturedSteps`.

    Returns: as `attend_cached`.
    """
    if rooms is not None and q.shape[2] == 1 and key_keep is None and not source_inputs and not dropout_p:
        out = captured_steps(states).run(
            router, states, rooms, k.shape[2] - 1, q, k[:, :, -1:], v[:, :, -1:], StepOptions(scale, fp32_weights)
        )
        if out is not None:
            return out, None
    before, outs, graph = k.shape[2] - q.shape[2], [], None
    # what is kept must not be tensors of inference mode, which nobody may write to outside of it
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with outside, torch.no_grad():
        for start, stop in _pieces(before, q.shape[2], router.dense_below_in_cache(q.device)):
            whole = stop - start == q.shape[2]
            some, length = q if whole else q[:, :, start:stop], before + stop
            keys, values, keep = k, v, key_keep
            if length < k.shape[2]:
                keys, values = k[:, :, :length], v[:, :, :length]
                keep = None if key_keep is None else key_keep[:, :length]
            positions = torch.arange(before + start, length, dtype=torch.int32, device=q.device)[None]
            mask = EdgeMask(causal=True, positions=positions, offset=before + start, key_keep=keep)
            states.sequence = keys, values
            try:
                graph = router(some, keys, mask, source_inputs=source_inputs, cache=states)
            finally:
                states.sequence = None  # views of a room that may be outgrown
            router.audit(some, keys, graph, scale=scale)
            out, _ = neighbor_attention(
                some,
                keys,
                values,
                graph,
                scale=scale,
                dropout_p=dropout_p,
                fp32_weights=fp32_weights,
                backend=router.backend,
                dense=router.dense_below != 0,
                zero_padding=True,
            )
            outs.append(out)
    if not outs:
        return q.new_zeros((*q.shape[:3], v.shape[3])), None
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), graph


def _pieces(length: int, new: int, dense_below: int | None) -> Iterator[tuple[int, int]]:
    """The new tokens, cut where dense attention ends."""
    few = min(max((dense_below or 0) - 1 - length, 0), new)
    for start, stop in ((0, few), (few, new)):
        if start < stop:
            yield start, stop
