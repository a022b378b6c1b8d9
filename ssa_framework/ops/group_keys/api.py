"""`group_keys`: validate, choose an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ShapeError
from ssa_framework.ops.group_keys import torch_sort


@torch.no_grad()
def group_keys(
    key_buckets: Tensor, query_buckets: Tensor, num_buckets: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn buckets into an order of the keys and a slice of it for each query: what `Ranges` is made of.

    Args:
        key_buckets: int64 ``[B, Hkv, S, M]``, the bucket of every key in each of S groupings, in
            ``[0, num_buckets)``; -1 leaves the key out.
        query_buckets: int64 ``[B, G, N, S, P]``, the buckets that each query looks into, G a multiple of Hkv; -1 =
            none.
        num_buckets: how many buckets there are.
        backend: ``"auto"``, ``"numba"`` (CPU) or ``"torch"``.

    Returns:
        ``order`` int32 ``[B, Hkv, S, L]``, the keys by bucket and, within a bucket, in increasing position, L the
        most keys that any grouping holds (shorter ones are filled up with key 0, which no slice reaches); ``start``
        and ``end``, int32 ``[B, G, N, S, P]``.

    Raises:
        ShapeError: shapes that do not fit together. BackendUnavailableError: ``"numba"`` on another device.
    """
    fits = key_buckets.dim() == 4 and query_buckets.dim() == 5
    if fits:
        batch, heads, orders, _ = key_buckets.shape
        fits = query_buckets.shape[0] == batch and query_buckets.shape[3] == orders
        fits = fits and heads > 0 and query_buckets.shape[1] % heads == 0
    if not fits:
        raise ShapeError(
            f"key_buckets must be [B, Hkv, S, M] and query_buckets [B, G, N, S, P] with G a multiple of Hkv, "
            f"got {list(key_buckets.shape)} and {list(query_buckets.shape)}"
        )
    on_cpu = key_buckets.device.type == "cpu"
    if backend == "numba" and not on_cpu:
        raise BackendUnavailableError(f"backend 'numba' serves CPU tensors, got {key_buckets.device}")
    if backend in ("auto", "numba") and on_cpu:
        from ssa_framework.ops.group_keys import numba_cpu  # Numba takes a moment to import

        return numba_cpu.group(key_buckets, query_buckets, num_buckets)
    return torch_sort.group(key_buckets, query_buckets, num_buckets)
