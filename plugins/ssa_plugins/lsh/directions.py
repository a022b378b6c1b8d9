"""Random directions for hash functions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

HashName = Literal["hyperplane", "cross_polytope"]


def most_bits(family: HashName, dim: int) -> int:
    """The most bits that a bucket number may have: those of two polytopes of D dimensions; planes have no limit."""
    return 2 * (1 + int(math.log2(dim))) if family == "cross_polytope" else 2**31


def directions(family: HashName, functions: int, bits: int, dim: int, generator: torch.Generator) -> Tensor:
    """Directions for hash functions of up to ``bits`` bits, float32 ``[functions, F, D]``.

    Hyperplanes: ``bits`` unit normals, orthogonal within groups of D (Ji et al., Super-Bit LSH, 2012). Polytopes:
    the axes of one or, where D has fewer than ``2^(bits - 1)``, two rotations (Andoni et al., 2015).
    """
    if family == "hyperplane":
        return _orthonormal_rows(functions, bits, dim, generator)
    single = 1 + int(math.log2(dim))
    polytopes = 1 if bits <= single else 2
    rotations = [_orthonormal_rows(functions, 2 ** (single - 1), dim, generator) for _ in range(polytopes)]
    return torch.cat(rotations, dim=1)


def _orthonormal_rows(functions: int, rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """``[functions, rows, D]`` float32 in random directions; each group of D consecutive rows is orthonormal."""
    groups = -(-rows // dim)
    gaussian = torch.randn((functions, groups, dim, dim), dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # without the signs, directions are not uniform
    return q.transpose(-1, -2).reshape(functions, groups * dim, dim)[:, :rows].float().contiguous()
