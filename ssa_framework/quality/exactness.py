"""`output_difference`: does an output equal dense attention under the graph's mask?"""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor

from ssa_framework.errors import ShapeError
from ssa_framework.graph import NeighborGraph
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.quality.sample import pick_queries, sample_rows


@torch.no_grad()
def output_difference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: NeighborGraph,
    output: Tensor,
    *,
    sample: int = 64,
    seed: int = 0,
    scale: float | None = None,
) -> float:
    """How far ``output`` is from attention over ``graph``, computed in float64 by the ``reference`` backend.

    That is dense attention under the boolean mask of the graph: the identity that every backend has to keep. Look at
    it before a time is believed.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]``. value: ``[B, Hkv, M, Dv]``. output: ``[B, H, N, Dv]``.
        sample: at most this many of the N queries, spread over the sequence; see `measure`.
        seed: of the sample. scale: of the scores, ``1 / sqrt(D)`` if left out.

    Returns:
        The largest ``|output − exact| / max|value|`` over batch, heads and the sample; 0 for an empty output,
        infinity where ``output`` is not finite. float32 gives about 1e-7 to 1e-6.

    Raises:
        ShapeError: ``output`` is not ``[B, H, N, Dv]``, or q, k, v do not fit together. GraphError: the graph does
        not fit them. BackendUnavailableError: the sample is too large for the reference.
    """
    wanted = (*query.shape[:-1], value.shape[-1])
    if tuple(output.shape) != wanted:
        raise ShapeError(f"output must have shape {list(wanted)}, got {list(output.shape)}")
    rows = sample_rows(graph.num_queries, sample, seed, query.device)
    exact, _ = neighbor_attention(
        query[:, :, rows].double(),
        key.double(),
        value.double(),
        pick_queries(graph, rows),
        scale=scale,
        backend="reference",
    )
    if exact.numel() == 0:
        return 0.0
    largest = float(value.double().nan_to_num().abs().max()) if value.numel() else 0.0
    difference = float((output[:, :, rows].double() - exact).abs().max())
    if not isfinite(difference):
        return inf
    return difference / largest if largest else difference
