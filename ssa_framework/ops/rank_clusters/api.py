"""`rank_clusters`: validate, choose an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, ShapeError
from ssa_framework.ops.cluster_keys.types import Clusters
from ssa_framework.ops.rank_clusters import torch_rank

_BACKENDS = ("auto", "numba", "torch")


@torch.no_grad()
def rank_clusters(
    q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int, *, backend: str = "auto"
) -> Tensor:
    """The clusters with the highest ``q·centroid``, best first, as long as their keys fit the budget.

    A query opens a prefix of its ranking: the first cluster that does not fit ends it, and later, smaller ones are
    not taken. Of equal scores, the lower number comes first; a score that is NaN or -inf is never opened.

    Args:
        q: ``[B, G, N, D]``, any floating dtype, scored in float32.
        clusters: of `cluster_keys`, with Hkv heads, G a multiple of Hkv, and S slots in all.
        limits: ``low, high``, int32 ``[B or 1, N]``: query n may open the clusters c with ``low <= c < high``, of
            those that are not empty. ``[B or 1, N, R]``: in any of R such ranges.
        budget: the most keys that a query opens. most: the most clusters.
        backend: ``"auto"``, ``"numba"`` (CPU) or ``"torch"``.

    Returns:
        int32 ``[B, G, N, most]``, numbers of slots, -1 = none.

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
                f"limits must be int32 [B or 1, N] or [B or 1, N, R] with B, N = {q.shape[0]}, {q.shape[2]}, got {name} {limit.dtype} "
                f"{list(limit.shape)}"
            )
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

        return numba_cpu.rank(q, clusters, (low, high), budget, most)
    return torch_rank.rank(q, clusters, (low, high), budget, most)
