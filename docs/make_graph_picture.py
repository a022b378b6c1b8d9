"""Draws docs/assets/graph.png: the neighbor graph that a usual mix of sources builds for a passage of text.

    python docs/make_graph_picture.py

Queries and keys come from no model: every position is described by random embeddings of its last three characters,
so that positions with the same recent past score highest with one another.
"""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ssa_framework import NeighborGraph, SSAConfig, build_graph

PICTURE = Path(__file__).parent / "assets" / "graph.png"
LENGTH = 256
HEAD_DIM = 64
CONFIG = SSAConfig(
    num_neighbors=32,
    sources={
        "self": {},
        "window": {"size": 8},
        "global": {"tokens": 4},
        "lsh": {"hash": "cross_polytope", "rounds": 8, "probes": 1},
    },
)


def describe(text: bytes) -> Tensor:
    """float32 ``[1, 1, len(text), HEAD_DIM]``: the sum of one random embedding for each of the last three bytes."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(3, 256, HEAD_DIM, generator=generator)
    codes = torch.tensor(list(text))
    described = sum(embedding[back][codes.roll(back)] for back in range(3))
    assert isinstance(described, Tensor)
    return described[None, None]


def passage_graph() -> NeighborGraph:
    features = describe(topics["for"].encode()[:LENGTH])
    return build_graph(features, features, config=CONFIG, is_causal=True)


def main() -> None:
    figure = Figure(figsize=(6.4, 6.4), layout="constrained", dpi=120)
    axes = passage_graph().plot(ax=figure.add_subplot())
    axes.set_title("self + window 8 + global 4 + lsh, 32 neighbors, 256 characters of text", fontsize="medium")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
