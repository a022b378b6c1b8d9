"""Hash families: from projections of vectors to bucket numbers, for any number of bits up to a ceiling."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ssa_plugins.lsh.probing import flip_sets


class HashFamily(Protocol):
    """Several independent hash functions, one per round, that share these methods.

    Projections are ``[..., rounds, F]``, what `weight` ``[rounds, F, D]`` makes of a vector. Bucket numbers of
    ``bits`` bits are int64.
    """

    def weight(self, rounds: int, dim: int, generator: torch.Generator) -> Tensor:
        """Random directions ``[rounds, F, D]``, float32."""
        ...

    def rows(self, bits: int) -> slice:
        """The directions that ``bits`` bits look at."""
        ...

    def buckets(self, projected: Tensor, bits: int) -> Tensor:
        """Bucket of each vector, ``[..., rounds]``."""
        ...

    def probes(self, projected: Tensor, bits: int, count: int) -> Tensor:
        """Own bucket of each query and the ``count`` next best, ``[..., rounds, 1 + count]``; -1 = no more."""
        ...


class Hyperplane:
    """Signs of projections (Charikar, 2002): bit p says on which side of plane p a vector lies.

    Args:
        max_bits: planes per round, the most bits that a bucket number may have.
    """

    def __init__(self, max_bits: int) -> None:
        self.max_bits = max_bits

    def weight(self, rounds: int, dim: int, generator: torch.Generator) -> Tensor:
        """Unit normals, orthogonal within groups of D (Ji et al., Super-Bit LSH, 2012)."""
        return _orthonormal_rows(rounds, self.max_bits, dim, generator)

    def rows(self, bits: int) -> slice:
        return slice(0, bits)

    def buckets(self, projected: Tensor, bits: int) -> Tensor:
        value = 2.0 ** torch.arange(bits - 1, -1, -1, device=projected.device)
        return ((projected[..., :bits] > 0).float() @ value).long()  # exact: far below 2^24

    def probes(self, projected: Tensor, bits: int, count: int) -> Tensor:
        own = self.buckets(projected, bits)
        if count == 0:
            return own[..., None]
        nearest = (
            projected[..., :bits].abs().argsort(dim=-1)
        )  # rank → plane, the plane that the query is nearest to first
        value = 1 << (bits - 1 - nearest)
        found = [own, *(own ^ value[..., list(ranks)].sum(-1) for ranks in flip_sets(count, bits))]
        found += [torch.full_like(own, -1)] * (1 + count - len(found))
        return torch.stack(found, dim=-1)


class CrossPolytope:
    """The largest coordinate of a random rotation, with its sign (Andoni et al., 2015).

    ``bits`` bits are the coordinates of a polytope of ``2^(bits - 1)`` dimensions; where the head dim has fewer, the
    bits are shared by two polytopes, each with coordinates of its own.

    Args:
        max_bits: the most bits that a bucket number may have.
        dim: D.
    """

    def __init__(self, max_bits: int, dim: int) -> None:
        self.single = 1 + int(math.log2(dim))  # bits of the largest polytope
        if max_bits > 2 * self.single:
            raise ValueError(f"two polytopes of dimension {dim} have at most {2 * self.single} bits, got {max_bits}")
        self.max_bits = max_bits

    def _digits(self, bits: int) -> tuple[int, ...]:
        return (bits,) if bits <= self.single else (bits - bits // 2, bits // 2)

    def weight(self, rounds: int, dim: int, generator: torch.Generator) -> Tensor:
        """Two sets of rows, each orthonormal: one per polytope."""
        rows = 2 ** (self.single - 1)
        polytopes = 1 if self.max_bits <= self.single else 2
        return torch.cat([_orthonormal_rows(rounds, rows, dim, generator) for _ in range(polytopes)], dim=1)

    def rows(self, bits: int) -> slice:
        return slice(0, 2 ** max(0, bits - 1)) if bits <= self.single else slice(None)

    def _polytopes(self, projected: Tensor, bits: int) -> list[tuple[int, Tensor]]:
        """For each polytope, its bits and its coordinates ``[..., 2^(bits - 1)]``."""
        rows = 2 ** (self.single - 1)
        return [
            (digit, projected[..., number * rows : number * rows + 2 ** (digit - 1)])
            for number, digit in enumerate(self._digits(bits))
        ]

    @staticmethod
    def _nearest_vertices(coordinates: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` best vertices, their scores and numbers: vertex c is ``+e_c``, vertex ``c + F`` is ``-e_c``."""
        size = coordinates.shape[-1]
        if count > size:  # vertices on the far side, too
            return torch.cat([coordinates, -coordinates], dim=-1).topk(min(count, 2 * size), dim=-1)
        length = coordinates.abs()
        score, place = length.max(dim=-1, keepdim=True) if count == 1 else length.topk(count, dim=-1)
        return score, place + size * (coordinates.gather(-1, place) < 0)

    def buckets(self, projected: Tensor, bits: int) -> Tensor:
        return self.probes(projected, bits, 0)[..., 0]

    def probes(self, projected: Tensor, bits: int, count: int) -> Tensor:
        best: Tensor | None = None
        buckets = torch.zeros((*projected.shape[:-1], 1), dtype=torch.int64, device=projected.device)
        for digit, coordinates in self._polytopes(projected, bits):
            score, vertex = self._nearest_vertices(coordinates, 1 + count)
            if best is None:
                best, buckets = score, vertex
                continue
            best = (best[..., :, None] + score[..., None, :]).flatten(-2)
            buckets = ((buckets[..., :, None] << digit) | vertex[..., None, :]).flatten(-2)
            best, place = best.topk(min(1 + count, best.shape[-1]), dim=-1)
            buckets = buckets.gather(-1, place)
        missing = 1 + count - buckets.shape[-1]
        return torch.nn.functional.pad(buckets, (0, missing), value=-1)


def _orthonormal_rows(rounds: int, rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """``[rounds, rows, D]`` float32 in random directions; each group of D consecutive rows is orthonormal."""
    groups = -(-rows // dim)
    gaussian = torch.randn((rounds, groups, dim, dim), dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # without the signs, directions are not uniform
    return q.transpose(-1, -2).reshape(rounds, groups * dim, dim)[:, :rows].float().contiguous()
