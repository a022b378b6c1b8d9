"""One call's arguments as the kernels take them: flat aligned tables, and empty arrays for what is absent."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention.numba_kernels import Work
from ssa_framework.ops.neighbor_attention.numba_reach import Order
from ssa_framework.ops.neighbor_attention.numba_rows import Array, Dropout, Graph, Shape, Tables
from ssa_framework.ops.neighbor_attention.numba_tiles import TILE, Parts, Slices, Summaries, Tile
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from ssa_framework.ops.numba_runtime import Workspace, as_array
from ssa_framework.ops.numba_vectors import LANES

ROWS_PER_TASK = (128, 1024)
"""At least and at most: a task takes the interpreter some 30 µs, in which no other thread can start one."""
ROWS_PER_SLICE_TASK = 8192
"""The more queries open a slice together, the more often its transposed keys are used."""
_TASKS_PER_THREAD = 8  # so that unequal ones balance


def aligned(count: int, dtype: Any) -> Array:
    """An empty array that starts a cache line, so that no vector lies in two: half the time of a kernel."""
    return _aligned_part(np.empty(count + 64 // np.dtype(dtype).itemsize, dtype), count)


def _aligned_part(raw: Array, count: int) -> Array:
    start = -raw.ctypes.data % 64 // raw.itemsize
    return raw[start : start + count]


def flat(x: Tensor, padded: int) -> Array:
    """``[.., D]`` → flat array of rows of width ``padded``; the padding is zero."""
    rows = as_array(x)
    if rows.shape[-1] != padded:
        wide = aligned(rows.size // max(1, rows.shape[-1]) * padded, rows.dtype).reshape(*rows.shape[:-1], padded)
        wide[..., rows.shape[-1] :] = 0
        wide[..., : rows.shape[-1]] = rows
        rows = wide
    numbers = rows.reshape(-1)
    if numbers.ctypes.data % 64:
        numbers = aligned(numbers.size, numbers.dtype)
        numbers[:] = rows.reshape(-1)
    return numbers


def unflat(numbers: Array, padded: int, like: Tensor) -> Tensor:
    """The inverse of `flat`, in the shape and dtype of ``like``."""
    rows = torch.from_numpy(numbers).view(*like.shape[:-1], padded)
    return rows[..., : like.shape[-1]].to(like.dtype).contiguous()


def once(x: Tensor) -> Tensor:
    """Expanded batch and head axes as axes of size 1, which kernels broadcast without a copy."""
    if 0 not in x.stride():
        return x
    for axis in range(min(2, x.dim() - 1)):
        if x.shape[axis] > 1 and x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x


def _as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # no conversion takes time, too


def blocks(count: int, others: int, least: int = ROWS_PER_TASK[0], most: int = ROWS_PER_TASK[1]) -> Iterator[Any]:
    """``count`` rows in blocks; as many tasks have ``others`` beside them, such as heads."""
    step = min(max(count * others // (_TASKS_PER_THREAD * torch.get_num_threads()), least), most)
    for start in range(0, count, step):
        yield start, min(start + step, count)


@functools.cache
def _nothing(axes: int, dtype: torch.dtype) -> Array:
    return as_array(torch.empty((0,) * axes, dtype=dtype))


def _integers(x: Tensor | None, axes: int, dtype: torch.dtype = torch.int32) -> Array:
    """What is absent has no rows."""
    if x is None:
        return _nothing(axes, dtype)
    return as_array(_as_dtype(once(x), dtype))


class Call:
    """The arguments of one call."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        parts: GraphParts,
        scale: float,
        dropout_p: float,
        seed: int,
        tables: Tables | None = None,
    ) -> None:
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.dtype = np.dtype(np.float64 if self.compute == torch.float64 else np.float32)
        self.lanes = LANES[self.dtype]
        self.scale = float(scale)
        width, value_width = self.padded(q.shape[-1]), self.padded(v.shape[-1])
        self.tables = Tables(flat(q, width), flat(k, width), flat(v, value_width)) if tables is None else tables
        self.batch, heads, queries, _ = q.shape
        kv_heads, keys = k.shape[1:3]
        # 2^32 steps of probability; a threshold of 0 means no dropout
        threshold = max(1, round(dropout_p * 2**32)) if dropout_p > 0.0 else 0
        self.dropout = Dropout(threshold, 1.0 / (1.0 - dropout_p), seed)
        neighbors = None if parts.neighbors is None else once(parts.neighbors)
        bias = None if parts.bias is None else once(parts.bias)
        if neighbors is not None and not neighbors.numel():
            neighbors = bias = None
        self.graph = self._graph(parts, neighbors, bias)
        self.shape = Shape(
            heads=heads,
            kv_heads=kv_heads,
            queries=queries,
            keys=keys,
            width=width,
            value_width=value_width,
            list_batches=1 if neighbors is None else neighbors.shape[0],
            list_heads=1 if neighbors is None else neighbors.shape[1],
            bias_batches=1 if bias is None else bias.shape[0],
            bias_heads=1 if bias is None else bias.shape[1],
        )
        band = min(keys, parts.band_before + parts.band_after + 1) if parts.has_band else 0
        self.most_edges = band + self.graph.columns.shape[0] + self.graph.neighbors.shape[1]
        self.is_column = np.zeros(keys if tables is None else 0, np.bool_)
        if tables is None:
            self.is_column[self.graph.columns] = True
        self.has_tiles = not parts.has_lists_only
        self.by_rows = self.most_edges > 0 or not self.has_tiles
        self.parts = Parts(
            self.graph, self._slices(parts), self._summaries(parts), self.shape, self.dropout, self.scale
        )
        self._space = Workspace()

    def _graph(self, parts: GraphParts, neighbors: Tensor | None, bias: Tensor | None) -> Graph:
        lists, biases, keep = _nothing(2, torch.int32), _nothing(2, self.compute), _nothing(2, torch.uint8)
        if neighbors is not None:
            lists = as_array(_as_dtype(neighbors, torch.int32)).reshape(-1, neighbors.shape[-1])
        if bias is not None:
            biases = as_array(_as_dtype(bias, self.compute)).reshape(-1, bias.shape[-1])
        if parts.key_keep is not None:
            keep = as_array(once(parts.key_keep)).view(np.uint8)
        return Graph(
            neighbors=lists,
            bias=biases,
            columns=_integers(parts.columns, 1),
            key_keep=keep,
            query_segments=_integers(parts.query_segments, 2, torch.int64),
            key_segments=_integers(parts.key_segments, 2, torch.int64),
            span_start=_integers(parts.span_start, 2),
            span_end=_integers(parts.span_end, 2),
            before=parts.band_before,
            after=0 if parts.causal else parts.band_after,
            offset=parts.query_offset,
            causal=parts.causal,
        )

    def _slices(self, parts: GraphParts) -> Slices:
        return Slices(
            order=_integers(parts.slice_order, 3),
            start=_integers(parts.slice_start, 4),
            end=_integers(parts.slice_end, 4),
            is_column=self.is_column if parts.columns is not None else _nothing(1, torch.bool),
        )

    def _summaries(self, parts: GraphParts) -> Summaries:
        weight, weights = parts.summary_log_weight, _nothing(2, self.compute)
        if weight is not None:
            weights = as_array(_as_dtype(weight, self.compute)).reshape(
                weight.shape[0] * weight.shape[1], weight.shape[2]
            )
        opened = _integers(parts.summary_opened, 4)

        def table(x: Tensor | None, width: int) -> Array:
            return _nothing(1, self.compute) if x is None else flat(_as_dtype(x, self.compute), width)

        return Summaries(
            k=table(parts.summary_k, self.shape.width),
            v=table(parts.summary_v, self.shape.value_width),
            log_weight=weights,
            first=_integers(parts.summary_first, 3),
            stop=_integers(parts.summary_stop, 3),
            opened=opened.reshape(-1, opened.shape[3]) if opened.size else opened.reshape(0, 0),
            opened_batches=opened.shape[0],
            opened_heads=opened.shape[1],
        )

    def padded(self, width: int) -> int:
        return -(-width // self.lanes) * self.lanes

    def work(self, edges: int) -> Work:
        """Buffers for rows of ``edges`` at most."""
        room = -(-max(edges, 1) // 16) * 16
        return Work(aligned(room, np.int32), aligned(room, np.int32), *(aligned(room, self.dtype) for _ in range(4)))

    def _array(self, name: str, count: int, dtype: Any) -> Array:
        """A work array of this thread, aligned."""
        return _aligned_part(self._space.array(name, count + 64 // np.dtype(dtype).itemsize, dtype), count)

    def tile(self, rows: int, chunk: int = 4) -> Tile:
        """Work arrays for tiles of ``rows`` queries, the scores of ``chunk`` at a time."""
        array, dtype = self._array, self.dtype
        return Tile(
            keys=array("keys", TILE, np.int32),
            added=array("added", TILE, dtype),
            segments=array("segments", TILE, np.int64),
            strip=array("strip", self.shape.width * TILE, dtype),
            value_strip=array("value strip", self.shape.value_width * TILE, dtype),
            rows=array("rows", rows + 1, np.int32),
            low=array("low", rows + 1, np.int32),
            high=array("high", rows + 1, np.int32),
            hidden=array("hidden", rows + 1, np.bool_),
            scores=array("scores", chunk * TILE, dtype),
            grads=array("grads", chunk * TILE, dtype),
            to=array("to", 4, np.int64),
            factors=array("factors", 4, dtype),
        )

    def order(self, rows: int) -> Order:
        """Work arrays to sort the slices of ``rows`` queries."""
        slices, array = self.parts.slices, self._array
        bins, most = slices.order.shape[2] + 2, rows * slices.start.shape[3]
        return Order(array("bins", bins, np.int32), *(array(f"slices {i}", most, np.int32) for i in range(3)))

    def row_tasks(self) -> list[tuple[int, int, int, int]]:
        """Batch element, KV head and block of queries of each task."""
        heads = [(b, h) for b in range(self.batch) for h in range(self.shape.kv_heads)]
        least, most = ROWS_PER_TASK
        if self.parts.slices.start.size:
            least, most = most, ROWS_PER_SLICE_TASK
        every = list(blocks(self.shape.queries, len(heads), least, most))
        return [(b, h, start, stop) for b, h in heads for start, stop in every]
