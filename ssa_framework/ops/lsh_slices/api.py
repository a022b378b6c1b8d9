"""`lsh_slices`: validate, choose an implementation."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import get_args

import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, ShapeError
from ssa_framework.ops.lsh_slices import torch_sort
from ssa_framework.ops.lsh_slices.families import hash_family
from ssa_framework.ops.lsh_slices.types import Family, HashLevels


@torch.no_grad()
def lsh_slices(
    q: Tensor,
    k: Tensor,
    directions: Tensor,
    levels: HashLevels,
    *,
    family: Family,
    probes: int = 0,
    center: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Hash queries and keys with S functions: orders of the keys by bucket, and the slices that each query looks at.

    A query that goes by ``bits`` bits looks into its own bucket and the ``probes`` next best, among the keys of its
    document that stand in the order for ``bits`` bits. One that goes by 0 bits gets every such key once, dealt out to
    its slices.

    Args:
        q: ``[B, G, N, D]``. k: ``[B, Hkv, M, D]``, G a multiple of Hkv; any floating dtype, hashed in float32.
        directions: float32 ``[S, F, D]``, finite: F directions per hash function, as `families` describes them.
        levels: bits of queries, orders of keys, documents.
        family: ``"hyperplane"`` or ``"cross_polytope"``.
        probes: further buckets per query and function; fewer where there are no more.
        center: hash keys relative to the mean of their document (causal: of its keys up to each).
        backend: ``"auto"``, ``"numba"`` (CPU), ``"triton"`` (CUDA) or ``"torch"``.

    Returns:
        ``order`` int32 ``[B, Hkv, S, L]``, the orders for 0, 1, 2, ... bits one after the other, within a bucket in
        increasing position, filled up with key 0, which no slice reaches; ``start`` and ``end``, int32
        ``[B, G, N, S, 1 + probes]``, ``start == end`` where a slice is empty.

    Raises:
        ShapeError, ConfigError: arguments that do not fit together, directions that are not finite.
        BackendUnavailableError: ``"numba"`` or ``"triton"`` where it cannot serve the call.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"q must be [B, G, N, D] and k [B, Hkv, M, D] with G a multiple of Hkv, got {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    if family not in get_args(Family):
        raise ConfigError(f"family must be one of {', '.join(get_args(Family))}, got {family!r}")
    needed = hash_family(family, levels.most, k.shape[3]).directions(levels.most)
    if directions.dim() != 3 or directions.shape[1] < needed or directions.shape[2] != k.shape[3]:
        raise ShapeError(
            f"directions must be [S, F, D] with F >= {needed} for {levels.most} bits and D = {k.shape[3]}, got "
            f"{list(directions.shape)}"
        )
    check_finite(directions)
    on_cpu = q.device.type == "cpu"
    if backend == "numba" and not on_cpu:
        raise BackendUnavailableError(f"backend 'numba' serves CPU tensors, got {q.device}")
    if backend in ("auto", "numba") and on_cpu:
        from ssa_framework.ops.lsh_slices import numba_cpu  # Numba takes a moment to import

        return numba_cpu.slices(q, k, directions, family, probes, levels, center)
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda"):
        reason = _why_not_triton(q, k, family, probes, levels)
        if reason is None:
            from ssa_framework.ops.lsh_slices import triton_cuda

            return triton_cuda.slices(q, k, directions, family, probes, levels, center)
        if backend == "triton":
            raise BackendUnavailableError(f"backend 'triton' cannot hash here: {reason}; use backend='auto'")
    return torch_sort.slices(q, k, directions, family, probes, levels, center)


def _why_not_triton(q: Tensor, k: Tensor, family: Family, probes: int, levels: HashLevels) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from ssa_framework.ops.lsh_slices import triton_cuda  # Triton takes a moment to import

    return triton_cuda.why_not(q, k, family, probes, levels)


def check_finite(directions: Tensor) -> None:
    """Raise `ConfigError` where a direction is not finite."""
    message = "hash directions are not finite; the buffer that holds them was overwritten with NaN or inf"
    if directions.device.type == "cpu":
        if not bool(torch.isfinite(directions).all()):
            raise ConfigError(message)
    else:
        # few launches: the largest magnitude is NaN where one is; asking for the answer would wait for the device
        torch._assert_async(torch.linalg.vector_norm(directions, math.inf) < math.inf, message)
