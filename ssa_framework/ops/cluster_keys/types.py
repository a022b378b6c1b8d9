"""What `cluster_keys` returns, and how much room it takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssa_framework.errors import ConfigError


@dataclass(frozen=True)
class Clusters:
    """Clusters of F segments of L keys each, C slots per segment.

    Slot c of segment f has the number ``f * C + c``. Clusters take the first slots of their segment, the others are
    empty; `cluster_slots` says how many there are.

    Attributes:
        order: int32 ``[B, Hkv, F * L]``, the positions of the keys, segment by segment, cluster by cluster, ascending
            within a cluster; 0 in segments that are not used.
        start, size: int32 ``[B, Hkv, F * C]``; the keys of a cluster are ``order[start : start + size]``. Both are 0
            in an empty slot.
        centroids: float32 ``[B, Hkv, F * C, D]``, the mean key of each cluster; zeros in an empty slot.
        variances: float32 ``[B, Hkv, F * C, D]``, of each coordinate over the keys of a cluster (their mean squared
            distance from the mean); zeros in an empty slot; ``None`` where nobody asked for them.
    """

    order: Tensor
    start: Tensor
    size: Tensor
    centroids: Tensor
    variances: Tensor | None = None


def cluster_capacity(length: int, clusters: int, capacity: int | None = None) -> int:
    """The most keys that a cluster may have: ``capacity``, or twice the mean, rounded up.

    Raises:
        ConfigError: numbers out of range.
    """
    if length < 1:
        raise ConfigError(f"length must be at least 1 key, got {length}")
    if not 1 <= clusters <= length:
        raise ConfigError(f"clusters must be 1 to {length}, the keys of a segment, got {clusters}")
    if capacity is None:
        return -(-2 * length // clusters)
    if capacity < 1:
        raise ConfigError(f"capacity must be at least 1 key, or None for twice the mean, got {capacity}")
    return capacity


def cluster_slots(length: int, clusters: int, capacity: int | None = None) -> int:
    """C, the slots of a segment: whatever the sizes are, cutting clusters at ``capacity`` gives no more.

    Raises:
        ConfigError: numbers out of range.
    """
    return clusters + length // cluster_capacity(length, clusters, capacity)
