"""`rank_clusters`: validate, choose an implementation."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, ShapeError
from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters import torch_rank
from ssa_framework.ops.rank_clusters.types import OpenedClusters

_BACKENDS = ("auto", "numba", "torch", "triton")


@torch.no_grad()
def rank_clusters(
    q: Tensor,
    clusters: Clusters,
    limits: tuple[Tensor, Tensor],
    budget: int,
    most: int,
    spread: float = 0.0,
    *,
    disjoint: bool = False,
    backend: str = "auto",
) -> OpenedClusters:
    """The clusters with the highest ``q·centroid + spread · q²·variances``, best first, as long as their keys fit the
    budget.

    A query opens a prefix of its ranking: the first cluster that does not fit ends it, and later, smaller ones are
    not taken. Of equal scores, the lower number comes first; a score that is NaN or -inf is never opened.

    Args:
        q: ``[B, G, N, D]``, any floating dtype, scored in float32.
        clusters: of `cluster_keys`, with Hkv heads, G a multiple of Hkv, and S slots in all.
        limits: ``low, high``, int32 ``[B or 1, N]``: query n may open the clusters c with ``low <= c < high``, of
            those that are not empty. ``[B or 1, N, R]``: in any of R such ranges.
        budget: the most keys that a query opens. most: the most clusters.
        spread: what the variances count; 0 = nothing, and ``clusters`` needs none.
        disjoint: ranges are of different parts of the numbering: whatever the queries, no range holds a cluster that
            lies between others of another one. Ranking is faster then on CUDA.
        backend: ``"auto"``, ``"numba"`` (CPU), ``"triton"`` (CUDA) or ``"torch"``.

    Returns:
        `OpenedClusters`, of up to ``most`` clusters per query.

    Raises:
        ShapeError: arguments that do not fit together. ConfigError: numbers out of range.
        BackendUnavailableError: a backend that cannot serve the call.
    """
    centroids, size = clusters.centroids, clusters.size
    if q.dim() != 4 or not q.is_floating_point():
        raise ShapeError(f"q must be floating [B, G, N, D], got {q.dtype} {list(q.shape)}")
    fits = centroids.dim() == 4 and centroids.shape[0] == q.shape[0] and centroids.shape[3] == q.shape[3]
    if not fits or size.shape != centroids.shape[:3] or not size.shape[1] or q.shape[1] % size.shape[1]:
        raise ShapeError(
            f"q must be [B, G, N, D] and the centroids [B, Hkv, S, D] with G a multiple of Hkv, the sizes "
            f"[B, Hkv, S], got {list(q.shape)}, {list(centroids.shape)} and {list(size.shape)}"
        )
    for name, limit in zip(("low", "high"), limits, strict=True):
        fits = limit.dim() in (2, 3) and limit.shape[0] in (1, q.shape[0]) and limit.shape[1] == q.shape[2]
        if not fits or limit.shape != limits[0].shape or limit.dtype != torch.int32:
            raise ShapeError(
                f"limits must be int32 [B or 1, N] or [B or 1, N, R] with B, N = {q.shape[0]}, {q.shape[2]}, "
                f"got {name} {limit.dtype} {list(limit.shape)}"
            )
    if spread and (clusters.variances is None or clusters.variances.shape != centroids.shape):
        got = None if clusters.variances is None else list(clusters.variances.shape)
        raise ShapeError(f"spread takes variances of the shape of the centroids, {list(centroids.shape)}, got {got}")
    if budget < 0:
        raise ConfigError(f"budget must be 0 keys or more, got {budget}")
    if most < 1:
        raise ConfigError(f"most must be at least 1 cluster, got {most}")
    if backend not in _BACKENDS:
        raise BackendUnavailableError(f"backend {backend!r} cannot rank clusters; use one of {', '.join(_BACKENDS)}")
    low, high = (limit if limit.dim() == 3 else limit[..., None] for limit in limits)
    on_cpu = q.device.type == "cpu"
    if backend == "numba" and not on_cpu:
        raise BackendUnavailableError(f"backend 'numba' serves CPU tensors, got {q.device}; use backend='auto'")
    if backend in ("auto", "numba") and on_cpu:
        from ssa_framework.ops.rank_clusters import numba_cpu  # Numba takes a moment to import

        return numba_cpu.rank(q, clusters, (low, high), budget, most, spread)
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda"):
        reason = _why_not_triton(q, most)
        if reason is None:
            from ssa_framework.ops.rank_clusters import triton_cuda, triton_few_call

            if disjoint and q.shape[2] <= triton_few_call.FEW:
                return triton_few_call.rank(q, clusters, (low, high), budget, most, spread)
            return triton_cuda.rank(q, clusters, (low, high), budget, most, spread, disjoint)
        if backend == "triton":
            raise BackendUnavailableError(f"backend 'triton' cannot rank here: {reason}; use backend='auto'")
    return torch_rank.rank(q, clusters, (low, high), budget, most, spread)


def _why_not_triton(q: Tensor, most: int) -> str | None:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return "the package triton is not installed"
    from ssa_framework.ops.rank_clusters import triton_cuda  # Triton takes a moment to import

    return triton_cuda.why_not(q, most)
