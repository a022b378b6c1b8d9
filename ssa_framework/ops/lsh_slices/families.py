"""Hash families in torch: from projections of vectors to bucket numbers, for any number of bits up to a ceiling.

Projections are ``[..., S, F]``, S hash functions with F directions each; bucket numbers are int64.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ssa_framework.ops.lsh_slices.probing import flip_table
from ssa_framework.ops.lsh_slices.types import Family


class HashFamily(Protocol):
    """What both families answer."""

    max_bits: int

    def directions(self, bits: int) -> int:
        """How many of the directions ``bits`` bits look at; they are the first ones."""
        ...

    def buckets(self, projected: Tensor, bits: int) -> Tensor:
        """Bucket of each vector, ``[..., S]``."""
        ...

    def probes(self, projected: Tensor, bits: int, count: int) -> Tensor:
        """Own bucket of each query and the ``count`` next best, ``[..., S, 1 + count]``; -1 = no more."""
        ...


class Hyperplane:
    """Signs of projections (Charikar, 2002): bit p says on which side of plane p a vector lies, the first plane being
    the most significant bit.

    Args:
        max_bits: planes per hash function, the most bits that a bucket number may have.
    """

    def __init__(self, max_bits: int) -> None:
        self.max_bits = max_bits

    def directions(self, bits: int) -> int:
        return bits

    def buckets(self, projected: Tensor, bits: int) -> Tensor:
        value = 2.0 ** torch.arange(bits - 1, -1, -1, device=projected.device)
        return ((projected[..., :bits] > 0).float() @ value).long()  # exact: far below 2^24

    def probes(self, projected: Tensor, bits: int, count: int) -> Tensor:
        own = self.buckets(projected, bits)
        if not count:
            return own[..., None]
        # rank → plane: the plane that the query is nearest to comes first
        nearest = projected[..., :bits].abs().argsort(dim=-1, stable=True)
        value = 1 << (bits - 1 - nearest)
        flips = flip_table(count, bits)[bits].to(projected.device)
        ranks = torch.arange(bits, device=projected.device)
        chosen = (flips[:, None] >> ranks) & 1  # [count, bits]
        others = own[..., None] ^ (value[..., None, :] * chosen).sum(-1)
        return torch.cat([own[..., None], torch.where(flips == 0, -1, others)], dim=-1)


class CrossPolytope:
    """The largest coordinate of a random rotation, with its sign (Andoni et al., 2015).

    ``bits`` bits are the coordinates of a polytope of ``2^(bits - 1)`` dimensions; where the head dim has fewer, the
    bits are shared by two polytopes, each with coordinates of its own. Vertex c of a polytope of F dimensions is
    ``+e_c``, vertex ``c + F`` is ``-e_c``; of equally near vertices, the first counts.

    Args:
        max_bits: the most bits that a bucket number may have.
        dim: D.
    """

    def __init__(self, max_bits: int, dim: int) -> None:
        self.single = 1 + int(math.log2(dim))  # bits of the largest polytope
        self.max_bits = min(max_bits, 2 * self.single)

    @property
    def polytopes(self) -> int:
        return 1 if self.max_bits <= self.single else 2

    def directions(self, bits: int) -> int:
        return 2 ** max(0, bits - 1) if bits <= self.single else 2 * 2 ** (self.single - 1)

    def _polytopes(self, projected: Tensor, bits: int) -> list[tuple[int, Tensor]]:
        """For each polytope, its bits and its coordinates ``[..., 2^(bits - 1)]``."""
        digits = (bits,) if bits <= self.single else (bits - bits // 2, bits // 2)
        rows = 2 ** (self.single - 1)
        return [
            (digit, projected[..., number * rows : number * rows + 2 ** (digit - 1)])
            for number, digit in enumerate(digits)
        ]

    @staticmethod
    def _nearest_vertices(coordinates: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` nearest vertices, or as many as there are: how near they are and their numbers."""
        size = coordinates.shape[-1]
        if count > size:  # vertices on the far side, too
            near, vertex = torch.cat([coordinates, -coordinates], dim=-1).sort(dim=-1, descending=True, stable=True)
            return near[..., :count], vertex[..., :count]
        length = coordinates.abs()
        if count == 1:
            near, place = length.max(dim=-1, keepdim=True)
        else:
            near, place = (x[..., :count] for x in length.sort(dim=-1, descending=True, stable=True))
        return near, place + size * (coordinates.gather(-1, place) < 0)

    def buckets(self, projected: Tensor, bits: int) -> Tensor:
        return self.probes(projected, bits, 0)[..., 0]

    def probes(self, projected: Tensor, bits: int, count: int) -> Tensor:
        best: Tensor | None = None
        buckets = torch.zeros((*projected.shape[:-1], 1), dtype=torch.int64, device=projected.device)
        for digit, coordinates in self._polytopes(projected, bits):
            near, vertex = self._nearest_vertices(coordinates, 1 + count)
            if best is None:
                best, buckets = near, vertex
                continue
            best = (best[..., :, None] + near[..., None, :]).flatten(-2)
            buckets = ((buckets[..., :, None] << digit) | vertex[..., None, :]).flatten(-2)
            best, place = (x[..., : 1 + count] for x in best.sort(dim=-1, descending=True, stable=True))
            buckets = buckets.gather(-1, place)
        missing = 1 + count - buckets.shape[-1]
        return torch.nn.functional.pad(buckets, (0, missing), value=-1)


def hash_family(name: Family, max_bits: int, dim: int) -> HashFamily:
    return Hyperplane(max_bits) if name == "hyperplane" else CrossPolytope(max_bits, dim)
