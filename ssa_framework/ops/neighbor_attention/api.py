"""`neighbor_attention`: validate, choose an implementation, take the graph apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, DtypeError, GraphError, ShapeError
from ssa_framework.ops.neighbor_attention import reference, triton_support
from ssa_framework.ops.neighbor_attention.dense import dense_attention
from ssa_framework.ops.neighbor_attention.op import IMPLEMENTATIONS, known_result, neighbor_attention_op
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.summarize_keys import summarize_keys

if TYPE_CHECKING:
    from ssa_framework.graph import NeighborGraph
    from ssa_framework.proposals import Ranges, Summaries

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def available_backends() -> tuple[str, ...]:
    """Names that ``backend`` accepts here; ``"triton"`` where Triton and a GPU (or Triton's interpreter) are there."""
    here = [name for name in IMPLEMENTATIONS if name != "triton" or triton_support.works_here()]
    return ("auto", "reference", *sorted(here))


def check_backend(backend: str) -> None:
    """Raises `BackendUnavailableError` for a name that is no backend, and lists those that are."""
    # what a known backend lacks here, the call says that it cannot serve
    if backend not in ("auto", "reference", *IMPLEMENTATIONS):
        raise BackendUnavailableError(f"backend {backend!r} is not available; available: {available_backends()}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Ranks, heads, lengths, dtypes and devices of ``q [B, H, N, D]``, ``k [B, Hkv, M, D]``, ``v [B, Hkv, M, Dv]``.

    Raises:
        ShapeError, DtypeError: with what was expected and what came.
    """
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ShapeError(f"{name} must have shape [batch, heads, length, head_dim], got {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise DtypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise DtypeError(f"query, key and value must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ShapeError(f"query, key and value must be on one device, got {q.device}, {k.device}, {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ShapeError(f"batch sizes differ: query {q.shape[0]}, key {k.shape[0]}, value {v.shape[0]}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ShapeError(f"key and value must agree in heads and length, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[3] != k.shape[3]:
        raise ShapeError(f"query and key must agree in head_dim, got {q.shape[3]} and {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise ShapeError(f"query heads ({q.shape[1]}) must be a multiple of key/value heads ({k.shape[1]})")


def check_graph(q: Tensor, k: Tensor, graph: NeighborGraph) -> None:
    """Raises `GraphError` where ``graph`` was built for other shapes or lies on another device."""
    wanted = {"batch": q.shape[0], "num_heads": q.shape[1], "num_queries": q.shape[2], "num_keys": k.shape[2]}
    wrong = [
        f"{name} = {getattr(graph, name)}, tensors have {n}" for name, n in wanted.items() if getattr(graph, name) != n
    ]
    if graph.graph_heads not in (q.shape[1], k.shape[1]):
        wrong.append(f"graph_heads = {graph.graph_heads}, tensors have H = {q.shape[1]}, Hkv = {k.shape[1]}")
    if graph.device != q.device:
        wrong.append(f"it is on {graph.device}, the tensors on {q.device}")
    if wrong:
        raise GraphError("the graph does not fit the tensors: " + "; ".join(wrong))


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: NeighborGraph,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    fp32_weights: bool = False,
    backend: str = "auto",
    dense: bool = False,
    zero_padding: bool = False,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each query over its neighbors.

    Args:
        q: ``[B, H, N, D]``. k: ``[B, Hkv, M, D]``. v: ``[B, Hkv, M, Dv]``; float16, bfloat16, float32 or float64.
        graph: the neighbors.
        scale: of the scores; ``1 / sqrt(D)`` if left out.
        dropout_p: probability of dropping an attention weight; the caller passes 0 outside training.
        fp32_weights: keep the weights of half-precision inputs in float32 up to the product with the values (the
            ``numba`` backend always does).
        backend: ``"auto"`` (``"numba"`` on a CPU, ``"triton"`` on CUDA where it serves the call, else ``"torch"``) or
            one of `available_backends`.
        dense: a full graph may be computed by torch's dense attention, which returns no ``lse``.
        zero_padding: the keys and values are those of a cache, and the graph was made of them: it was checked before
            that they fit together, padded ones are zeros, and nothing is differentiable.
        known: ``out`` and ``lse``, where they are there and only the gradients are wanted; they are computed all the
            same where the graph is attended densely, or by ``"reference"``.

    Returns:
        ``out [B, H, N, Dv]`` in the dtype of ``q`` and the log-sum-exp of the scores ``lse [B, H, N]`` (float32, or
        float64 for float64); a query without neighbors gets zeros and ``-inf``. Both are differentiable.

    Raises:
        ShapeError, DtypeError, GraphError: inputs that do not fit together. BackendUnavailableError: ``backend``
        cannot serve the call.
    """
    if not zero_padding:
        check_tensors(q, k, v)
        check_graph(q, k, graph)
        k, v = _without_padding(k, v, graph)
    check_backend(backend)
    if not 0.0 <= dropout_p < 1.0:
        raise ConfigError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if dense and backend == "auto" and graph.is_full and q.numel() and k.numel():
        return dense_attention(q, k, v, graph, scale=scale, dropout_p=dropout_p), None
    if backend == "reference":
        elements = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        if elements > reference.MAX_ELEMENTS:
            raise BackendUnavailableError(
                f"backend 'reference' stores all {elements} scores and serves at most {reference.MAX_ELEMENTS}; "
                f"use backend='torch'"
            )
    pieces = _parts_in_rows(graph, k, v)
    has_bias = any(parts.bias is not None for _, parts in pieces)
    backend = _choose_backend(backend, q, v, dropout_p=dropout_p, has_bias=has_bias)
    seed = int(torch.randint(2**62, ())) if dropout_p > 0.0 else 0
    outs, sums = [], []
    for rows, parts in pieces:
        q_rows = q[:, :, rows]
        if backend == "reference":
            out, lse = reference.forward(
                q_rows, k, v, parts, scale=scale, dropout_p=dropout_p, fp32_weights=fp32_weights
            )
        elif zero_padding and not torch.compiler.is_compiling():  # decoding: nothing to differentiate, and no time
            out, lse = IMPLEMENTATIONS[backend]().forward(
                q_rows, k, v, parts, scale=scale, dropout_p=dropout_p, seed=seed, fp32_weights=fp32_weights
            )
        else:
            run: Callable[..., tuple[Tensor, Tensor]] = neighbor_attention_op
            if known is not None:
                run = partial(known_result, known[0][:, :, rows], known[1][:, :, rows])
            out, lse = run(
                q_rows,
                k,
                v,
                parts.bias,
                parts.summary_k,
                parts.summary_v,
                *parts.structure,
                [parts.band_before, parts.band_after],
                parts.query_offset,
                parts.causal,
                scale,
                float(dropout_p),
                seed + rows.start,
                fp32_weights,
                backend,
            )
        outs.append(out)
        sums.append(lse)
    if len(outs) == 1:
        return outs[0], sums[0]
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _choose_backend(
    backend: str,
    q: Tensor,
    v: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    has_bias: bool = False,
) -> str:
    """The backend that serves the call; ``v`` has the width of ``q`` if left out."""
    on_cpu = q.device.type == "cpu"
    if backend == "numba" and not on_cpu:
        raise BackendUnavailableError(
            f"backend 'numba' computes on the CPU, the tensors are on {q.device}; use backend='auto' or 'torch'"
        )
    if backend == "auto" and on_cpu:
        return "numba"
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda"):
        reason = triton_support.why_not(q, q if v is None else v, dropout_p, has_bias)
        if reason is not None and backend == "triton":
            raise BackendUnavailableError(f"backend 'triton' cannot serve the call: {reason}; use backend='auto'")
        return "torch" if reason is not None else "triton"
    return "torch" if backend == "auto" else backend


def _without_padding(k: Tensor, v: Tensor, graph: NeighborGraph) -> tuple[Tensor, Tensor]:
    """Padded keys and values as zeros: they get no weight, and zero times a NaN in the padding would still be NaN."""
    keep = graph.mask.key_keep
    if keep is None:
        return k, v
    padding = ~keep[:, None, :, None]
    return k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)


def _parts_in_rows(graph: NeighborGraph, k: Tensor, v: Tensor) -> list[tuple[slice, GraphParts]]:
    """The graph taken apart; in one piece, unless single edges have to be looked up in masks and are many."""
    mask = graph.mask
    everything = slice(0, graph.num_queries)
    summaries = _summary_parts(graph.summaries, k, v)
    if not mask.has_explicit and mask.offset is not None:
        parts = GraphParts(
            band_before=graph.band.before if graph.band is not None else -1,
            band_after=graph.band.after if graph.band is not None else -1,
            query_offset=mask.offset,
            causal=mask.causal,
            columns=graph.columns,
            neighbors=graph.neighbors,
            key_keep=mask.key_keep,
            query_segments=mask.query_segments,
            key_segments=mask.key_segments,
            span_start=graph.spans.start if graph.spans is not None else None,
            span_end=graph.spans.end if graph.spans is not None else None,
            positions=mask.positions,
            **_slice_parts(graph.slices),
            **summaries,
        )
        return [(everything, parts)]
    # Masks that only an edge-by-edge look-up can answer, or irregular positions: every edge goes into the list.
    if graph.num_queries == 0:
        return [(everything, GraphParts())]
    pieces = []
    for rows, piece in graph.row_chunks(elements_per_edge=graph.num_heads // graph.graph_heads if mask.per_head else 1):
        keys = piece.edge_keys()
        bias = None
        if mask.is_additive or (mask.per_head and graph.graph_heads != graph.num_heads):
            bias = piece.mask.explicit_bias(keys.clamp(min=0), graph.num_heads)
        seen = _seen(piece.summaries) if piece.summaries is not None else {}
        pieces.append((rows, GraphParts(neighbors=keys, bias=bias, **(summaries | seen))))
    return pieces


def _slice_parts(slices: Ranges | None) -> dict[str, Any]:
    if slices is None or slices.order is None or slices.start is None or slices.end is None:
        return {}
    start, end = slices.start.select(3, 0), slices.end.select(3, 0)
    return {"slice_order": slices.order.select(2, 0), "slice_start": start, "slice_end": end}


def _summary_parts(summaries: Summaries | None, k: Tensor, v: Tensor) -> dict[str, Any]:
    if summaries is None:
        return {}
    if summaries.made is None:
        summary_k, summary_v, log_weight = summarize_keys(k, v, summaries.members, summaries.count)
    else:
        summary_k, summary_v, log_weight = _checked_tables(summaries, k, v)
    made = {"summary_k": summary_k, "summary_v": summary_v, "summary_log_weight": log_weight}
    return made | _seen(summaries)


def _checked_tables(summaries: Summaries, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert summaries.made is not None
    made_with_gradients = summaries.made[0].requires_grad or summaries.made[1].requires_grad
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad) and not made_with_gradients:
        raise GraphError("the summaries of this graph were made by a cache, and no gradient flows through them")
    lead = (*k.shape[:2], summaries.count)
    wanted = (*lead, k.shape[3]), (*lead, v.shape[3]), lead
    if tuple(tuple(x.shape) for x in summaries.made) != wanted:
        raise GraphError(
            f"summaries that were made must be {', '.join(str(list(shape)) for shape in wanted)}, got "
            f"{', '.join(str(list(x.shape)) for x in summaries.made)}"
        )
    return summaries.made


def _seen(summaries: Summaries) -> dict[str, Any]:
    return {
        "summary_first": summaries.first,
        "summary_stop": summaries.stop,
        "summary_opened": summaries.opened,
    }
