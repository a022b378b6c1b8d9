"""Dense against sparse attention on q, k and v of the trained model, at growing length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa_framework.attention import SparseAttention
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.train import ByteModel
from ssa_framework.graph import NeighborGraph
from ssa_framework.quality import QualityReport, Timing, measure, output_difference, peak_memory, time_alternating
from ssa_framework.transformer import SparseTransformerLayer

LARGEST_DIFFERENCE = 1e-5
"""Of float32 attention, relative to the largest value; see `output_difference`."""


@dataclass(frozen=True)
class LayerView:
    """One layer, what it sees, ``q [1, H, N, D]`` and ``k, v [1, Hkv, N, D]``, and the graph that it chooses."""

    attention: SparseAttention
    q: Tensor
    k: Tensor
    v: Tensor
    graph: NeighborGraph


@dataclass(frozen=True)
class LengthResult:
    """What was measured at one length.

    Attributes:
        difference: of the sparse output from dense attention under the graph's mask; see `output_difference`.
        dense, graph, attention: times of dense attention, of building the graph, of attending over it; ``None``
            where the difference is too large: no time is shown for a wrong result.
        dense_bytes, sparse_bytes: peak memory beyond the inputs.
        quality: one report per layer.
    """

    length: int
    difference: float
    dense: Timing | None
    graph: Timing | None
    attention: Timing | None
    dense_bytes: int | None
    sparse_bytes: int | None
    quality: tuple[QualityReport, ...]

    @property
    def passed(self) -> bool:
        return self.difference <= LARGEST_DIFFERENCE

    @property
    def sparse(self) -> Timing | None:
        """Building the graph and attending over it."""
        return None if self.graph is None or self.attention is None else self.graph + self.attention

    @property
    def speed(self) -> float | None:
        """Dense time / sparse time: above 1, sparse is faster."""
        return None if self.dense is None or self.sparse is None else self.dense.median / self.sparse.median

    def to_dict(self) -> dict[str, Any]:
        times = {"dense": self.dense, "sparse": self.sparse, "graph": self.graph, "attention": self.attention}
        return {
            "length": self.length,
            "check": {
                "difference": self.difference if isfinite(self.difference) else None,
                "largest_accepted": LARGEST_DIFFERENCE,
                "passed": self.passed,
            },
            "time": {name: None if timing is None else timing.to_dict() for name, timing in times.items()},
            "dense_time_over_sparse_time": self.speed,
            "peak_extra_bytes": {"dense": self.dense_bytes, "sparse": self.sparse_bytes},
            "quality_per_layer": [report.to_dict() for report in self.quality],
        }


@torch.no_grad()
def look_inside(model: ByteModel, tokens: Tensor) -> list[LayerView]:
    """Every layer of the model as it reads ``tokens [N]``."""
    views = []
    x = model.body.embed_input(tokens[None])
    for layer in cast(list[SparseTransformerLayer], model.body.layers):
        q, k, v = (t.contiguous() for t in layer.attn.project(layer.norm1(x)))
        graph = layer.attn.build_graph(q, k)
        views.append(LayerView(layer.attn, q, k, v, graph))
        x, _ = layer(x, graph=graph)
    return views


@torch.no_grad()
def measure_length(
    model: ByteModel, tokens: Tensor, settings: Settings, on_stage: Callable[[str], object]
) -> LengthResult:
    """Check, time and judge one length. Time and memory are those of the last layer.

    Args:
        on_stage: told what comes next, in one word.
    """
    on_stage("checking")
    layers = look_inside(model, tokens)
    last = layers[-1]
    attention, q, k, v, graph = last.attention, last.q, last.k, last.v, last.graph
    difference = output_difference(q, k, v, graph, attention.apply_graph(q, k, v, graph), seed=settings.seed)

    dense_time = graph_time = attention_time = dense_bytes = sparse_bytes = None
    if difference <= LARGEST_DIFFERENCE:
        on_stage("timing")
        times = time_alternating(
            {
                "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                "graph": lambda: attention.build_graph(q, k),
                "attention": lambda: attention.apply_graph(q, k, v, graph),
            },
            seconds=settings.seconds_per_length,
            threads=settings.threads,
        )
        dense_time, graph_time, attention_time = times["dense"], times["graph"], times["attention"]
        on_stage("memory")
        dense_bytes = peak_memory(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        sparse_bytes = peak_memory(lambda: attention.apply_graph(q, k, v, attention.build_graph(q, k)))
    on_stage("quality")
    reports = tuple(
        measure(layer.q, layer.k, layer.v, layer.graph, recall_at=settings.recall_at, seed=settings.seed)
        for layer in layers
    )
    return LengthResult(
        len(tokens), difference, dense_time, graph_time, attention_time, dense_bytes, sparse_bytes, reports
    )
