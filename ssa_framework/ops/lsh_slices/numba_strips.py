"""Hash functions and work memory as the kernels of `numba_hash` take them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ssa_framework.ops.lsh_slices.families import CrossPolytope, hash_family
from ssa_framework.ops.lsh_slices.numba_hash import CROSS_POLYTOPE, HYPERPLANE, LANES, STRIP, Functions, Scratch
from ssa_framework.ops.lsh_slices.types import Family


def strips_of(directions: Tensor, family: Family, most: int, dim: int) -> list[tuple[int, Functions]]:
    """The hash functions in groups whose directions share a strip, and the number of the first of each group."""
    columns = hash_family(family, most, dim).directions(most)
    at_once = max(1, STRIP // max(1, columns))
    return [
        (number, one_strip(directions[number : number + at_once], family, most, dim))
        for number in range(0, directions.shape[0], at_once)
    ]


def one_strip(directions: Tensor, family: Family, most: int, dim: int) -> Functions:
    """Some hash functions, ``[S, F, D]``, in one strip, however wide."""
    hashes = hash_family(family, most, dim)
    columns = hashes.directions(most)
    some = directions[:, :columns].detach().float().reshape(-1, dim).numpy()
    strip = np.zeros((dim, -(-some.shape[0] // LANES) * LANES), dtype=np.float32)
    strip[:, : some.shape[0]] = some.T
    single = hashes.single if isinstance(hashes, CrossPolytope) else most
    kind = HYPERPLANE if family == "hyperplane" else CROSS_POLYTOPE
    return Functions(strip.ravel(), strip.shape[1], directions.shape[0], columns, kind, single, most)


def scratch_of(width: int, slices: int) -> Scratch:
    """For strips of this width, and queries that look into so many slices."""
    sums = np.empty(width, dtype=np.float32)
    room = max(slices * slices, 2 * slices, 16)
    return Scratch(
        sums,
        sums.view(np.int32),
        np.empty((2, max(width, LANES)), dtype=np.int32),
        np.empty((4, room), dtype=np.int64),
        np.empty((4, room), dtype=np.float32),
    )
