"""What the trained model attends to in a real passage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_framework.cli.demo.bench import look_inside
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.text import Text, readable
from ssa_framework.cli.demo.train import ByteModel
from ssa_framework.graph import NeighborGraph


@dataclass(frozen=True)
class Passage:
    """The start of the validation text in the last layer, and one byte of it as an example.

    Attributes:
        topic: where the passage is from. text: one character per byte.
        graph: of the last layer, over the passage. head: the one whose listed neighbors hold most attention.
        query: a byte of the passage, one of the last quarter, with most attention on listed neighbors.
        parts: for each byte up to the query: ``"band"``, ``"columns"``, ``"listed"`` or ``""`` where it is none.
        weights: its attention weight.
        missed: whether it is among the bytes that dense attention weighs most and no neighbor.
    """

    topic: str
    text: str
    layer: int
    head: int
    query: int
    graph: NeighborGraph
    parts: tuple[str, ...]
    weights: tuple[float, ...]
    missed: tuple[bool, ...]


@torch.no_grad()
def read_passage(model: ByteModel, text: Text, settings: Settings) -> Passage:
    tokens = text.validation[: settings.passage]
    views = look_inside(model, tokens)
    view = views[-1]
    length, graph = len(tokens), view.graph
    edges = graph.to_dense_mask()[0]  # [H, N, N]
    scores = view.q[0] @ view.k[0].repeat_interleave(settings.heads // view.k.shape[1], 0).transpose(-1, -2)
    scores = scores * view.q.shape[-1] ** -0.5
    weights = scores.masked_fill(~edges, float("-inf")).softmax(-1)
    listed = _listed(graph, length)
    on_listed = (weights * listed).sum(-1)  # [H, N]
    head = int(on_listed.mean(-1).argmax())
    first = length - length // 4
    query = first + int(on_listed[head, first:].argmax())
    causal = torch.arange(length) <= query
    best = scores[head, query].masked_fill(~causal, float("-inf")).topk(min(settings.recall_at, query + 1)).indices
    missed = torch.zeros(length, dtype=torch.bool)
    missed[best] = ~edges[head, query, best]
    columns = set() if graph.columns is None else set(graph.columns.tolist())
    parts = []
    for key in range(query + 1):
        fixed = "columns" if key in columns and not _in_band(graph, query, key) else "band"
        parts.append("" if not edges[head, query, key] else "listed" if listed[head, query, key] else fixed)
    return Passage(
        topic=text.held_out[0],
        text=readable(tokens),
        layer=len(views),
        head=head,
        query=query,
        graph=graph,
        parts=tuple(parts),
        weights=tuple(weights[head, query, : query + 1].tolist()),
        missed=tuple(missed[: query + 1].tolist()),
    )


def _listed(graph: NeighborGraph, length: int) -> Tensor:
    """bool ``[G, N, N]``: edges of the lists."""
    out = torch.zeros((graph.graph_heads, length, length + 1), dtype=torch.bool)
    if graph.neighbors is not None:
        neighbors = graph.neighbors[0].expand(graph.graph_heads, -1, -1)
        out.scatter_(-1, torch.where(neighbors < 0, length, neighbors).long(), True)
    return out[..., :length]


def _in_band(graph: NeighborGraph, query: int, key: int) -> bool:
    return graph.band is not None and query - graph.band.before <= key <= query + graph.band.after
