"""Which buckets to look into besides the query's own (Lv et al., Multi-Probe LSH, 2007)."""

from __future__ import annotations

import functools
import heapq

import torch
from torch import Tensor


def flip_sets(probes: int, planes: int) -> list[tuple[int, ...]]:
    """The first ``probes`` sets of planes to flip, best first, as ranks: 0 is the plane that the query is nearest to.

    The order is that of the expected squared distance to the bucket, ``sum of (r + 1)(r + 2)`` over the ranks r,
    which holds for uniformly distributed margins (section 4.5 of the paper). Sets are grown from the best one by
    replacing the largest rank with the next, or adding the next.
    """
    sets: list[tuple[int, ...]] = []
    heap: list[tuple[int, tuple[int, ...]]] = [(2, (0,))] if planes > 0 else []
    while heap and len(sets) < probes:
        cost, ranks = heapq.heappop(heap)
        sets.append(ranks)
        largest = ranks[-1]
        if largest + 1 < planes:
            step = (largest + 2) * (largest + 3)
            heapq.heappush(heap, (cost - (largest + 1) * (largest + 2) + step, (*ranks[:-1], largest + 1)))
            heapq.heappush(heap, (cost + step, (*ranks, largest + 1)))
    return sets


@functools.lru_cache(maxsize=64)
def flip_table(probes: int, most: int) -> Tensor:
    """`flip_sets` for 0 to ``most`` planes as bit masks over ranks, int64 ``[most + 1, probes]``; 0 = no more."""
    table = torch.zeros((most + 1, probes), dtype=torch.int64)
    for planes in range(most + 1):
        for number, ranks in enumerate(flip_sets(probes, planes)):
            table[planes, number] = sum(1 << r for r in ranks)
    return table
