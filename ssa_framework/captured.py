"""`CapturedSteps`: single tokens of a sequence as replays of CUDA graphs, so that the host's time does not count."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ssa_framework.cache import IndexStates
from ssa_framework.masks import EdgeMask
from ssa_framework.ops.append_token import AppendToken, TokenPlace, append_token
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.router import Router

_WORTH = 8
"""Steps for which a capture has to serve: it takes as long as two or three."""

_IN_A_ROW = 3
"""Single tokens one behind the other from which on steps are captured; a speculating model drops what it captured after
a few."""


class StepOptions(NamedTuple):
    """What the output of a step depends on besides its tensors; see `neighbor_attention`."""

    scale: float | None = None
    fp32_weights: bool = False


@dataclass
class _Capture:
    """A captured step, which reads the new token from ``place`` and leaves its output in ``out``."""

    router: Router
    replay: Callable[[], object]
    append: AppendToken
    place: TokenPlace
    out: Tensor
    signature: tuple[object, ...]
    """Of the tokens and options that it takes."""
    left: int
    """Tokens that it may still take."""


def _signature(q: Tensor, k: Tensor, v: Tensor, options: StepOptions) -> tuple[object, ...]:
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, gradients, options


class CapturedSteps:
    """Single tokens that attend to a sequence, captured in a CUDA graph where that is possible.

    A step launches about a dozen kernels that take a few microseconds each; the host needs longer to launch them. A
    capture serves as long as nothing changes but the place of the query: until a segment is full, or the room of the
    sequence is used up (`NeighborSource.steady_steps`). The step that ends it is a plain one, and another capture
    follows. Outputs are those of plain steps.

    Steps are plain ones throughout where tensors are not on CUDA, a source says of itself that it depends on more than
    positions, the router audits, somebody observes graphs (`ssa_graph_built`), or the queries are few enough for
    ``dense_below``; and, after a warning, where capturing failed. It lies beside the index states that it reads
    (`IndexStates.captured`), and is lost where tokens are dropped or reordered.

    Attributes:
        captures, replays: how many there were.
    """

    def __init__(self) -> None:
        self._capture: _Capture | None = None
        self._next = -1
        self._in_a_row = 0
        self._failed = False
        self.captures = self.replays = 0

    def run(
        self,
        router: Router,
        states: IndexStates,
        rooms: tuple[Tensor, Tensor] | None,
        length: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: StepOptions,
        check: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """The output of one token, whose key and value are then in their place; ``None`` where a plain step has to do
        it, and nothing has changed.

        Args:
            states: of ``router``. rooms: keys ``[B, Hkv, room, D]`` and values ``[B, Hkv, room, Dv]`` of the sequence,
                with the places behind them that are not used yet; there is no padding.
            length: how many tokens come before this one.
            q: ``[B, H, 1, D]``. k: ``[B, Hkv, 1, D]``. v: ``[B, Hkv, 1, Dv]``; they may be the places themselves.
            check: raises where the tensors cannot be served; called where a capture has not served such ones yet.
        """
        if not _may_be_captured(q):
            return None
        self._in_a_row = self._in_a_row + 1 if length == self._next else 1
        self._next = length + 1
        signature = _signature(q, k, v, options)
        capture = self._capture
        served = (
            capture is not None
            and rooms is not None
            and capture.left > 0
            and self._in_a_row > 1
            and capture.router is router
            and capture.place.keys is rooms[0]
            and capture.place.values is rooms[1]
            and capture.signature == signature
            and not router.registry.observes_graphs
        )
        if not served:
            capture = self._capture = None
            if rooms is None or self._in_a_row < _IN_A_ROW or self._failed:
                return None
            steps = self._steady_steps(router, states, rooms, length, q)
            if steps < _WORTH:
                return None
            if check is not None:
                check()
            try:
                with torch.inference_mode(False), torch.no_grad():
                    capture = self._capture = _captured(router, states, rooms, length, (q, k, v), options, steps)
            except RuntimeError as error:  # what a source does may not be allowed in a capture, or memory may be short
                self._failed = True
                warnings.warn(f"a step could not be captured; steps are launched one by one: {error}", stacklevel=3)
                return None
            self.captures += 1
        assert capture is not None
        # the device begins as soon as it can; what the host has to note can wait
        capture.append(capture.place, q, k, v, length)
        capture.replay()
        capture.left -= 1
        self.replays += 1
        return capture.out.clone()

    def _steady_steps(
        self, router: Router, states: IndexStates, rooms: tuple[Tensor, Tensor], length: int, q: Tensor
    ) -> int:
        """How many tokens a capture of the next step would serve."""
        if not q.numel() or states.owner is not router:
            return 0
        dense = (router.dense_below_in_cache(q.device) or 0) > length + 1
        if dense or router.audit_options is not None or router.registry.observes_graphs:
            return 0
        return min(states.steady_steps(length), rooms[0].shape[2] - length)


def _captured(
    router: Router,
    states: IndexStates,
    rooms: tuple[Tensor, Tensor],
    length: int,
    token: tuple[Tensor, Tensor, Tensor],
    options: StepOptions,
    steps: int,
) -> _Capture:
    """Capture the step of the next token, and leave the states as they were."""
    keys, values = rooms
    q = token[0]
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
            scale=options.scale,
            fp32_weights=options.fp32_weights,
            backend=router.backend,
            zero_padding=True,
        )
        return out

    append(place, *token, length)
    step()  # compiles kernels, and makes what is kept
    replay, out = _record(step, q.device)
    return _Capture(router, replay, append, place, out, _signature(*token, options), steps)


def _may_be_captured(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


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
