"""`CapturedSteps`: single tokens on a cache as replays of CUDA graphs, so that the host's time does not count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.cache import LayerCache
from ssa_framework.decoding import attend_cached, check_new_tokens
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.append_token import AppendToken, TokenPlace, append_token
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.router import Router

_WORTH = 8
"""Steps for which a capture has to serve: it takes as long as two or three."""


@dataclass
class _Capture:
    """A captured step, which reads the new token from ``place`` and leaves its output in ``out``."""

    replay: Callable[[], object]
    append: AppendToken
    place: TokenPlace
    out: Tensor
    signature: tuple[object, ...]
    """Of the tokens that it takes."""
    left: int
    """Tokens that it may still take."""
    changes: int
    """Of the cache after the last token; see `LayerCache.changes`."""

    def serves(self, changes: int, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether it may take this token; then the token passes all checks, as the first one did."""
        return self.left > 0 and self.changes == changes and self.signature == _signature(q, k, v)


def _signature(q: Tensor, k: Tensor, v: Tensor) -> tuple[object, ...]:
    """What `check_new_tokens` looks at."""
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, gradients


class CapturedSteps:
    """`attend_cached` for one new token at a time, captured in a CUDA graph where that is possible.

    A step of a cache launches about a dozen kernels that take a few microseconds each; the host needs longer to launch
    them. A capture serves as long as nothing changes but the place of the query: until a segment is full, or the room
    of the cache is used up (`NeighborSource.steady_steps`). The step that ends it is a plain one, and another capture
    follows. Outputs are those of plain steps.

    Steps are plain ones throughout where tensors are not on CUDA, a source says of itself that it depends on more than
    positions, the cache holds padding, the router audits, or the queries are few enough for ``dense_below``. Observers
    of the graph (`ssa_graph_built`) are told of plain steps only.

    Args:
        router: of the layer. cache: of the layer; plain calls, `crop` and the like may come in between.
        scale, fp32_weights: see `neighbor_attention`.

    Attributes:
        captures, replays: how many there were.
    """

    def __init__(
        self, router: Router, cache: LayerCache, *, scale: float | None = None, fp32_weights: bool = False
    ) -> None:
        self._router, self._cache = router, cache
        self._scale, self._fp32_weights = scale, fp32_weights
        self._capture: _Capture | None = None
        self.captures = self.replays = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append a token and attend from it to everything that is in the cache.

        Args:
            q: ``[B, H, 1, D]``. k: ``[B, Hkv, 1, D]``. v: ``[B, Hkv, 1, Dv]``; none of them collects gradients.

        Returns: ``[B, H, 1, Dv]``.

        Raises:
            CacheError, ConfigError, ShapeError: see `attend_cached`.
        """
        capture, cache = self._capture, self._cache
        if capture is None or not capture.serves(cache.changes, q, k, v):
            check_new_tokens(self._router, cache, q, k, v)
            with torch.inference_mode(False), torch.no_grad():
                capture = self._capture = self._new_capture(q, k, v)
        if capture is None:
            return attend_cached(self._router, cache, q, k, v, scale=self._scale, fp32_weights=self._fp32_weights)[0]
        # the device begins as soon as it can; what the host has to note can wait
        capture.append(capture.place, q, k, v, cache.length)
        capture.replay()
        cache.advance()
        capture.left, capture.changes = capture.left - 1, cache.changes
        self.replays += 1
        return capture.out.clone()

    def _new_capture(self, q: Tensor, k: Tensor, v: Tensor) -> _Capture | None:
        steps = self._steady_steps(q)
        if steps < _WORTH:
            return None
        self.captures += 1
        return self._captured(q, k, v, steps)

    def _steady_steps(self, q: Tensor) -> int:
        """How many tokens a capture of the next step would serve."""
        router, cache = self._router, self._cache
        rooms = cache.rooms
        if rooms is None or not _may_be_captured(q) or q.shape[2] != 1 or not q.numel():
            return 0
        dense = (router.dense_below_in_cache(q.device) or 0) > cache.length + 1
        if dense or cache.key_keep is not None or router.audit_options is not None or cache.owner is not router:
            return 0
        return min(cache.states.steady_steps(cache.length), rooms[0].shape[2] - cache.length)

    def _captured(self, q: Tensor, k: Tensor, v: Tensor, steps: int) -> _Capture:
        """Capture the step of the next token, and leave the cache as it was."""
        router, states = self._router, self._cache.states
        rooms = self._cache.rooms
        assert rooms is not None
        keys, values = rooms
        length = self._cache.length
        position = torch.full((1, 1), length, dtype=torch.int32, device=q.device)
        place = TokenPlace(torch.empty_like(q, memory_format=torch.contiguous_format), position, keys, values)
        append = append_token(place)

        def step() -> Tensor:
            # all of the room is there, but no place behind the query is ever attended
            mask = EdgeMask(causal=True, positions=position, offset=length)
            states.sequence, states.steady = (keys, values), True
            try:
                graph = router.route(place.q, keys, mask, cross=False, cache=states)
            finally:
                states.sequence, states.steady = None, False
            out, _ = neighbor_attention(
                place.q,
                keys,
                values,
                graph,
                scale=self._scale,
                fp32_weights=self._fp32_weights,
                backend=router.backend,
                zero_padding=True,
            )
            return out

        append(place, q, k, v, length)
        step()  # compiles kernels, and makes what is kept
        replay, out = _record(step, q.device)
        return _Capture(replay, append, place, out, _signature(q, k, v), steps, self._cache.changes)


def _may_be_captured(x: Tensor) -> bool:
    return x.is_cuda


def _record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """Capture what ``step`` launches; returns what replays it, and where its result will be.

    Unlike `torch.cuda.graph`, it neither waits for the device nor collects garbage, which would take longer than the
    steps that a capture serves."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            out = step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay, out
