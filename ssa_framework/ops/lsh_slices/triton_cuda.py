"""CUDA: hash, order and look up in a handful of launches, whatever the number of levels; nothing waits for the device.

1. prepare: directions in parts, levels of tiles of keys; 2. sums of tiles of keys and their running sums, projected;
3. codes of keys; 4. count, 5. scan and 6. place: the order; 7. codes of queries and their buckets' bounds.

Centering takes place after the projection, which is linear. With documents, whose means must not mix, the keys are
centered before. A bucket holds the keys of all documents, one document after the other; a query looks its document up.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ssa_framework.ops.lsh_slices import triton_order, triton_planes, triton_polytopes, triton_prepare
from ssa_framework.ops.lsh_slices.centering import center_keys
from ssa_framework.ops.lsh_slices.families import CrossPolytope, hash_family
from ssa_framework.ops.lsh_slices.probing import flip_table
from ssa_framework.ops.lsh_slices.triton_tiles import Keys, Queries, Rows, Slices
from ssa_framework.ops.lsh_slices.types import Family, HashLevels
from ssa_framework.ops.triton_runtime import INTERPRETED, launches

_PLANES = 16
"""Columns of a function of hyperplanes; always as many, since the order of additions must not follow the length."""
_MOST_PROBES = {"hyperplane": 255, "cross_polytope": 255}
_MOST_PAIRED = 31
"""Probes of two polytopes: all pairs of their vertices are looked at."""
_LEAST_TILE = 512
_LANES = 64
_WALK = 32
"""Coordinates of polytopes that are projected at once."""


def why_not(q: Tensor, k: Tensor, family: Family, probes: int, levels: HashLevels) -> str | None:
    """Why `slices` cannot serve a call; ``None`` if it can."""
    if q.device.type != "cuda" and not (INTERPRETED.value and q.device.type == "cpu"):
        return f"it serves CUDA tensors, got {q.device}"
    if k.shape[3] > 256:
        return f"it serves head dims up to 256, got {k.shape[3]}"
    if levels.most > _PLANES:
        return f"it serves up to {_PLANES} bits, got {levels.most}"
    hashes = hash_family(family, levels.most, k.shape[3])
    paired = isinstance(hashes, CrossPolytope) and hashes.polytopes == 2
    most = _MOST_PAIRED if paired else _MOST_PROBES[family]
    if probes > most:
        return f"it serves up to {most} probes of such hashes, got {probes}"
    return None


class _Hash(NamedTuple):
    """How directions become columns.

    Attributes:
        used: directions that are looked at. first, second: columns of a function for its first and second polytope.
        beside: the direction with which the second begins. single: bits of one polytope; 0 = hyperplanes.
        digits, others: numbers of bits of the first and the second polytope.
    """

    used: int
    first: int
    second: int
    beside: int
    single: int
    digits: int
    others: int

    @property
    def each(self) -> int:
        return self.first + self.second

    @property
    def variants(self) -> int:
        return self.digits + self.others if self.single else 1


def _hash_of(family: Family, most: int, dim: int) -> _Hash:
    hashes = hash_family(family, most, dim)
    used = hashes.directions(most)
    if not isinstance(hashes, CrossPolytope):
        return _Hash(used, _PLANES, 0, _PLANES, 0, 0, 0)
    digits = max(1, min(most, hashes.single))
    others = most // 2 if most > hashes.single else 0
    first, second = (max(_WALK, 1 << (d - 1)) if d else 0 for d in (digits, others))
    return _Hash(used, first, second, 1 << (hashes.single - 1), hashes.single, digits, others)


class _Tiles(NamedTuple):
    """How the hashing kernels are run, by dtype and head dim alone: a key's code must not depend on anything else.

    Attributes:
        parts: of a direction; 3 for bfloat16, else 1, float32. rows: of a tile. columns: of a product, at most.
        repeat: tiles that a program goes through. stages: tiles on their way at once.
    """

    parts: int
    rows: int
    columns: int
    width: int
    repeat: int
    warps: int
    stages: int


def _tiles_of(dtype: torch.dtype, dim: int) -> _Tiles:
    width = max(16, triton.next_power_of_2(dim))
    if dtype == torch.bfloat16:
        return _Tiles(3, 128 if width <= 128 else 64, min(128, 2**14 // width), width, 8, 8, 2)
    return _Tiles(1, 64, min(64, 2**13 // width), width, 4, 8, 1)


@launches
def slices(
    q: Tensor, k: Tensor, directions: Tensor, family: Family, probes: int, levels: HashLevels, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ssa_framework.ops.lsh_slices.api.lsh_slices`; `why_not` must have nothing against it."""
    batch, heads, count, _ = k.shape
    functions = directions.shape[0]
    order = torch.empty((batch, heads, functions, levels.longest), dtype=torch.int32, device=q.device)
    start = torch.empty((*q.shape[:3], functions, 1 + probes), dtype=torch.int32, device=q.device)
    end = torch.empty_like(start)
    if not count or not batch or not levels.longest:
        return order.zero_(), start.zero_(), end.zero_()
    if center and levels.key_documents is not None:
        kept = k.float() if levels.key_keep is None else k.float().masked_fill(~levels.key_keep[:, None, :, None], 0.0)
        k = center_keys(kept, levels.key_keep, levels.key_documents, levels.causal)
        center = False
    _Task(q, k, directions, family, probes, levels, center).run(order, start, end)
    return order, start, end


class _Task:
    """One call: what several launches need."""

    def __init__(
        self, q: Tensor, k: Tensor, directions: Tensor, family: Family, probes: int, levels: HashLevels, center: bool
    ) -> None:
        self.q, self.k = (x if x.dtype in (torch.bfloat16, torch.float16) else x.float() for x in (q, k))
        self.directions, self.levels, self.probes, self.center = directions.detach().float(), levels, probes, center
        self.batch, self.heads, self.count, self.dim = k.shape
        self.functions = directions.shape[0]
        self.segments = self.batch * self.heads * self.functions
        self.most, self.buckets = levels.most, 2 << levels.most
        self.hash = _hash_of(family, levels.most, self.dim)
        # a larger tile makes fewer counters, a smaller one a shorter walk; counters for twice the keys are enough
        self.tile = max(_LEAST_TILE, self.buckets)
        self.tiles = triton.cdiv(self.count, self.tile)
        self.keys = _keys(levels, center, self.count)

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def run(self, order: Tensor, start: Tensor, end: Tensor) -> None:
        ranges = self.new(self.batch, self.tiles, 2, dtype=torch.int32)
        parts = self.prepare(_tiles_of(self.k.dtype, self.dim), ranges)
        codes = self.hash_keys(parts)
        firsts = self.order_keys(codes, ranges, order)
        if not self.q.shape[1] or not self.q.shape[2]:
            return
        if _tiles_of(self.q.dtype, self.dim).parts != _tiles_of(self.k.dtype, self.dim).parts:
            parts = self.prepare(_tiles_of(self.q.dtype, self.dim), ranges)
        group = self.q.shape[1] // self.heads
        self.hash_queries(
            parts,
            Slices(
                firsts, order, start, end, order.shape[-1], self.buckets, self.functions, 1 + self.probes, group
            ),
        )  # fmt: skip

    def prepare(self, tiles: _Tiles, ranges: Tensor) -> Tensor:
        """Directions as columns, ``[parts, WIDTH, TOTAL]``; fills ``ranges``."""
        total = triton.cdiv(self.functions * self.hash.each, tiles.columns) * tiles.columns
        dtype = torch.bfloat16 if tiles.parts == 3 else torch.float32
        parts = self.new(tiles.parts, tiles.width, total, dtype=dtype)
        num_ranges = self.batch * self.tiles
        triton_prepare.prepare_kernel[(num_ranges + total,)](
            self.directions, *self.directions.stride(), parts, self.functions, self.keys, ranges, self.tiles,
            num_ranges, self.most, USED=self.hash.used, FIRST=self.hash.first, SECOND=self.hash.beside,
            EACH=self.hash.each, D=self.dim, WIDTH=tiles.width, TOTAL=total, PARTS=tiles.parts, TILE=self.tile,
            BLOCK=min(self.tile, 1024),
        )  # fmt: skip
        return parts

    def carry(self, parts: Tensor, tiles: _Tiles, number: int) -> Tensor | None:
        """Projected sums of the keys before each tile, or of all keys."""
        if not self.center:
            return None
        pairs, total = self.batch * self.heads, parts.shape[2]
        sums = self.new(pairs, number, tiles.width, dtype=torch.float32)
        triton_prepare.sums_kernel[(number, pairs)](
            _rows(self.k), self.keys, sums, self.heads, D=self.dim, WIDTH=tiles.width, ROWS=tiles.rows
        )
        causal = self.levels.causal
        carry = self.new(pairs, number if causal else 1, total, dtype=torch.float32)
        blocks = triton.cdiv(number, triton_prepare.CARRY_TILES) if causal else 1
        columns = min(tiles.columns, 2**13 // tiles.width)  # float32 takes more shared memory
        triton_prepare.carry_kernel[(blocks, pairs, total // columns)](
            sums, parts, carry, number, CAUSAL=causal, WIDTH=tiles.width, TOTAL=total, COLUMNS=columns,
            PARTS=tiles.parts, TILES=triton_prepare.CARRY_TILES, num_warps=8,
        )  # fmt: skip
        return carry

    def hash_keys(self, parts: Tensor) -> Tensor:
        """int16 ``[B·Hkv·S, variants, M]``."""
        tiles = _tiles_of(self.k.dtype, self.dim)
        number = triton.cdiv(self.count, tiles.rows)
        carry = self.carry(parts, tiles, number)
        codes = self.new(self.segments, self.hash.variants, self.count, dtype=torch.int16)
        pairs, total = self.batch * self.heads, parts.shape[2]
        common: dict[str, Any] = {
            "CENTER": self.center, "CAUSAL": self.levels.causal, "D": self.dim, "WIDTH": tiles.width, "TOTAL": total,
            "PARTS": tiles.parts, "ROWS": tiles.rows, "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip
        tensors = (_rows(self.k), parts, carry, self.keys, codes, self.heads, self.functions, number, self.most)
        if self.hash.single:
            triton_polytopes.hash_keys_kernel[(number, pairs)](
                *tensors, EACH=self.hash.each, FIRST=self.hash.first, SINGLE=self.hash.single,
                DIGITS=self.hash.digits, OTHERS=self.hash.others, COLUMNS=_WALK, **common,
            )  # fmt: skip
        else:
            triton_planes.hash_keys_kernel[(triton.cdiv(number, tiles.repeat), pairs, total // tiles.columns)](
                *tensors, COLUMNS=tiles.columns, PLANES=_PLANES, TILES=tiles.repeat, **common
            )
        return codes

    def order_keys(self, codes: Tensor, ranges: Tensor, order: Tensor) -> Tensor:
        """Fills ``order``; returns where each bucket starts, int32 ``[B·Hkv·S, buckets]``."""
        counts = torch.zeros((self.segments, self.tiles, self.buckets), dtype=torch.int32, device=self.q.device)
        firsts = self.new(self.segments, self.buckets, dtype=torch.int32)
        sizes = (self.tiles, self.heads * self.functions, self.most, self.buckets)
        variants = {
            "SINGLE": self.hash.single,
            "FIRST": self.hash.digits,
            "VARIANTS": self.hash.variants,
            "TILE": self.tile,
        }
        triton_order.count_kernel[(self.segments * self.tiles,)](
            codes, self.keys, ranges, counts, *sizes, **variants, BLOCK=min(self.tile, 1024)
        )
        at_once = min(32, triton.next_power_of_2(self.tiles))
        width = min(self.buckets, max(64, 2**14 // at_once), 4096)
        triton_order.scan_kernel[(self.segments,)](
            counts, firsts, order, self.tiles, self.buckets, order.shape[-1],
            TILES=at_once, BUCKETS=width, TAIL=1024, num_warps=8,
        )  # fmt: skip
        triton_order.place_kernel[(self.segments * (self.most + 1) * self.tiles,)](
            codes, self.keys, ranges, counts, order, *sizes, order.shape[-1], **variants, LANES=_LANES,
            num_warps=max(1, _LANES // 32), num_stages=1,
        )  # fmt: skip
        return firsts

    def hash_queries(self, parts: Tensor, looked_up: Slices) -> None:
        tiles = _tiles_of(self.q.dtype, self.dim)
        heads, total = self.q.shape[1], parts.shape[2]
        queries = _queries(self.levels, self.q.shape[2])
        slots = triton.next_power_of_2(1 + self.probes)
        tensors = (_rows(self.q), parts, queries, self.keys, looked_up)
        common: dict[str, Any] = {
            "D": self.dim, "WIDTH": tiles.width, "TOTAL": total, "PARTS": tiles.parts, "num_stages": tiles.stages
        }  # fmt: skip
        if not self.hash.single:
            rows, columns = tiles.rows, tiles.columns
            while rows * columns // _PLANES * slots > 2**13 and rows > 16:
                rows //= 2
            while rows * columns // _PLANES * slots > 2**13 and columns > _PLANES:
                columns //= 2
            number = triton.cdiv(queries.queries, rows)
            flips, ranks = _flips(self.probes, self.most, self.q.device)
            grid = (triton.cdiv(number, tiles.repeat), self.batch * heads, total // columns)
            triton_planes.hash_queries_kernel[grid](
                *tensors, flips, heads, number, self.most, COLUMNS=columns, PLANES=_PLANES, P=slots, RANKS=ranks,
                ROWS=rows, TILES=tiles.repeat, num_warps=tiles.warps, **common,
            )  # fmt: skip
            return
        hashing: dict[str, Any] = {
            "EACH": self.hash.each,
            "FIRST": self.hash.first,
            "SINGLE": self.hash.single,
            "OTHERS": self.hash.others,
        }
        if self.probes == 0:
            triton_polytopes.hash_queries_kernel[(triton.cdiv(queries.queries, tiles.rows), self.batch * heads)](
                *tensors, heads, **hashing, COLUMNS=_WALK, ROWS=tiles.rows, num_warps=tiles.warps, **common
            )
            return
        rows = 64  # the fewest that a warp group multiplies
        triton_polytopes.probe_queries_kernel[(triton.cdiv(queries.queries, rows), self.batch * heads)](
            *tensors, heads, **hashing, SECOND=self.hash.second, P=slots, ROWS=rows, num_warps=8, **common
        )


@functools.lru_cache(maxsize=64)
def _flips(probes: int, most: int, device: torch.device) -> tuple[Tensor, int]:
    """`flip_table` after a column of zeros for the own bucket, int32, and how many ranks it speaks of.

    Kept on the device: copying it there takes a wait.
    """
    table = torch.nn.functional.pad(flip_table(probes, most), (1, 0)).int()
    return table.to(device), int(table.max()).bit_length()


def _rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride())


def _table(x: Tensor | None) -> tuple[Tensor | None, int]:
    """``[B or 1, length]`` with a stride of 1, and the batch stride."""
    if x is None:
        return None, 0
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else 0


def _keys(levels: HashLevels, center: bool, count: int) -> Keys:
    counts = places = None
    if center and levels.key_keep is not None:
        kept = levels.key_keep
        counts = kept.cumsum(1).float() if levels.causal else kept.sum(1, keepdim=True).float().expand(-1, count)
    documents = levels.key_documents if levels.query_documents is not None else None
    if documents is not None:
        places = documents.argsort(dim=1, stable=True).int()
    return Keys(
        *_table(levels.first),
        *_table(levels.last),
        *_table(levels.key_keep),
        *_table(counts),
        *_table(places),
        *_table(documents),
        count,
    )


def _queries(levels: HashLevels, count: int) -> Queries:
    documents = levels.query_documents if levels.key_documents is not None else None
    return Queries(*_table(levels.queries), *_table(documents), count)
