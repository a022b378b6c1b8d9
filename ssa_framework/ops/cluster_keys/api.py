"""`cluster_keys`: validate, choose an implementation."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, ShapeError
from ssa_framework.ops.cluster_keys import torch_lloyd
from ssa_framework.ops.cluster_keys.types import Clusters, cluster_capacity
from ssa_framework.ops.index_bounds import any_outside
from ssa_framework.proposals import Bounds

_BACKENDS = ("auto", "numba", "torch", "triton")
_COARSE_KEYS = 8
"""Keys per centroid in a coarse step. Fewer make worse clusters."""


@torch.no_grad()
def cluster_keys(
    k: Tensor,
    starts: Tensor,
    length: int,
    clusters: int,
    *,
    iterations: int = 5,
    coarse: int = 0,
    capacity: int | None = None,
    backend: str = "auto",
) -> Clusters:
    """K-means of segments of the keys (Lloyd, 1982), each segment by itself.

    Keys are centred on the mean of their segment. Centroids begin as keys at even distances; each of ``iterations``
    steps gives every key to the centroid c with the largest ``x·c - |c|²/2`` (the nearest; the first of equals) and
    moves every centroid to the mean of its keys; one without keys stays. Keys are then given out once more, and a
    cluster of n keys is cut by position into ``ceil(n / capacity)`` clusters of about equal size.

    The first ``coarse`` of the steps look at keys at even distances only, about eight for each centroid.

    What comes out for a segment depends on its keys alone, bit for bit, whatever else is in the call.

    Args:
        k: ``[B, Hkv, M, D]``, any floating dtype, clustered in float32.
        starts: int32 ``[B or 1, F]``, the first key of each segment; -1 = a segment that is not used.
        length: L, keys of a segment. clusters: centroids of a segment, at most L.
        iterations: Lloyd steps. coarse: how many of them, the first ones, look at some of the keys.
        capacity: the most keys of a cluster; None = twice the mean.
        backend: ``"auto"``, ``"numba"`` (CPU), ``"triton"`` (CUDA) or ``"torch"``.

    Returns:
        `Clusters`, with ``cluster_slots(length, clusters, capacity)`` slots per segment.

    Raises:
        ShapeError: ``k`` or ``starts`` of another shape or dtype, segments that reach beyond the keys.
        ConfigError: numbers out of range. BackendUnavailableError: a backend that cannot serve the call.
    """
    if k.dim() != 4 or not k.is_floating_point():
        raise ShapeError(f"k must be floating [B, Hkv, M, D], got {k.dtype} {list(k.shape)}")
    if starts.dim() != 2 or starts.shape[0] not in (1, k.shape[0]) or starts.dtype != torch.int32:
        raise ShapeError(
            f"starts must be int32 [B or 1, F] with B = {k.shape[0]}, got {starts.dtype} {list(starts.shape)}"
        )
    capacity = cluster_capacity(length, clusters, capacity)
    if iterations < 0:
        raise ConfigError(f"iterations must be 0 or more, got {iterations}")
    if not 0 <= coarse <= iterations:
        raise ConfigError(f"coarse must be 0 to {iterations}, one of the iterations, got {coarse}")
    _check_reach(starts, k.shape[2], length)
    if backend not in _BACKENDS:
        raise BackendUnavailableError(f"backend {backend!r} cannot cluster keys; use one of {', '.join(_BACKENDS)}")
    stride = max(1, length // (_COARSE_KEYS * clusters))
    steps = [-(-length // stride)] * coarse + [length] * (iterations - coarse)
    on_cpu = k.device.type == "cpu"

    def initial() -> Tensor:  # at even distances
        return (torch.arange(clusters, device=k.device) * (length - 1) // max(1, clusters - 1)).to(torch.int32)

    if backend == "numba" and not on_cpu:
        raise BackendUnavailableError(f"backend 'numba' serves CPU tensors, got {k.device}; use backend='auto'")
    if backend in ("auto", "numba") and on_cpu:
        from ssa_framework.ops.cluster_keys import numba_cpu  # Numba takes a moment to import

        return numba_cpu.cluster(k, starts, length, initial(), steps, stride, capacity)
    if backend == "triton" or (backend == "auto" and k.device.type == "cuda"):
        reason = _why_not_triton(k, clusters)
        if reason is None:
            from ssa_framework.ops.cluster_keys import triton_cuda

            return triton_cuda.cluster(k, starts, length, clusters, steps, stride, capacity)
        if backend == "triton":
            raise BackendUnavailableError(f"backend 'triton' cannot cluster here: {reason}; use backend='auto'")
    return torch_lloyd.cluster(k, starts, length, initial(), steps, stride, capacity)


def _why_not_triton(k: Tensor, clusters: int) -> str | None:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return "the package triton is not installed"
    from ssa_framework.ops.cluster_keys import triton_cuda  # Triton takes a moment to import

    return triton_cuda.why_not(k, clusters)


def _check_reach(starts: Tensor, keys: int, length: int) -> None:
    last = max(-1, keys - length)
    message = f"segments of {length} keys must start at -1 (not used) or at 0 to M - {length} = {keys - length}"
    if starts.device.type == "cpu":
        if starts.numel() and not (int(starts.min()) >= -1 and int(starts.max()) <= last):
            raise ShapeError(f"{message}, got starts from {int(starts.min())} to {int(starts.max())}")
    elif starts.device.type != "meta":
        outside = any_outside([Bounds(starts, starts, -1, last)], starts.device)
        torch._assert_async(~outside, message)  # asking for the answer would wait for the device
