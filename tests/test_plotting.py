"""The picture of a graph: the right cells in the right colours, and no trace of it outside its axes."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ssa_framework import NeighborGraph, SSAConfig, build_graph, plotting
from ssa_framework.errors import GraphError
from ssa_framework.plotting import MAX_CELLS, PART_COLORS, plot_graph

MIX = {"self": {}, "window": {"size": 2}, "global": {"tokens": 1}, "topk": {}}


def graph_of(queries: int, keys: int, *, batch: int = 1, heads: int = 2, **options: Any) -> NeighborGraph:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((batch, heads, queries, 8), generator=generator)
    k = torch.randn((batch, heads, keys, 8), generator=generator)
    return build_graph(q, k, config=SSAConfig(num_neighbors=10, sources=MIX), **options)


def image_of(axes: Axes) -> np.ndarray:
    (image,) = axes.get_images()
    pixels = image.get_array()
    assert pixels is not None
    return np.asarray(pixels)


def labels_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def has_color(pixels: np.ndarray, part: str) -> np.ndarray:
    return (np.abs(pixels[..., :3] - np.array(to_rgb(PART_COLORS[part]))).max(-1) < 1e-5) & (pixels[..., 3] > 0)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("batch", "head"), [(0, 0), (1, 1)])
def test_every_edge_is_one_cell_in_the_color_of_its_part(causal: bool, batch: int, head: int) -> None:
    graph = graph_of(31, 31, batch=2, is_causal=causal)
    pixels = image_of(graph.plot(batch=batch, head=head))
    assert pixels.shape == (31, 31, 4)
    edges = graph.to_dense_mask()[batch, head].numpy()
    drawn = np.zeros_like(edges)
    for part in PART_COLORS:
        drawn |= has_color(pixels, part)
    assert (drawn == edges).all()
    rows, keys = np.arange(31)[:, None], np.arange(31)[None]
    distance = keys - rows
    band = (distance >= -2) & (distance <= (0 if causal else 2))
    assert (has_color(pixels, "band") == band).all()
    column = (keys == 0) & ~band & (rows >= 0)
    assert (has_color(pixels, "columns") == column).all()
    shaded = (pixels[..., 3] > 0) & ~edges
    assert (shaded == ((distance > 0) & causal)).all()


def test_legend_names_the_parts_and_their_size() -> None:
    graph = graph_of(31, 31, is_causal=True)
    labels = labels_of(graph.plot())
    assert [label.partition(":")[0] for label in labels] == ["band", "columns", "listed", "after the query"]
    shown = sum(float(label.split()[1]) for label in labels[:3])
    assert shown == pytest.approx(float(graph.degree()[0, 0].float().mean()), abs=0.16)  # three numbers, one decimal


def test_legend_leaves_out_what_is_not_there() -> None:
    config = SSAConfig(sources={"window": {"size": 1}})
    x = torch.zeros((1, 1, 5, 4))
    labels = labels_of(build_graph(x, x, config=config).plot())
    assert labels == ["band: 2.6 per query"]
    nothing = NeighborGraph.from_lists(torch.full((1, 1, 4, 2), -1), num_keys=4)
    axes = nothing.plot()
    assert labels_of(axes) == []
    assert not image_of(axes).any()


def test_color_blind_safe_palette() -> None:
    palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(PART_COLORS.values()) <= palette
    assert len(set(PART_COLORS.values())) == len(PART_COLORS)


def test_axes_are_in_positions() -> None:
    axes = graph_of(12, 40).plot()
    assert axes.get_xlim() == (-0.5, 39.5)
    assert axes.get_ylim() == (11.5, -0.5)  # queries down
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key position", "query position")


def test_query_positions_shade_the_future() -> None:
    positions = torch.tensor([7, 3, 5])
    graph = graph_of(3, 9, is_causal=True, query_positions=positions)
    pixels = image_of(graph.plot())
    edges = graph.to_dense_mask()[0, 0].numpy()
    shaded = (pixels[..., 3] > 0) & ~edges
    assert (shaded == (np.arange(9)[None] > positions.numpy()[:, None])).all()


def test_large_graphs_are_drawn_as_density() -> None:
    """Twice as many positions as cells: a cell is 2 × 2, and its opacity grows with its edges."""
    size = 2 * MAX_CELLS - 1  # the last cell is cut off by the edge of the graph
    config = SSAConfig(num_neighbors=8, sources={"window": {"size": 3}, "global": {"tokens": 2}})
    x = torch.zeros((1, 1, size, 4))
    graph = build_graph(x, x, config=config, is_causal=True)
    axes = graph.plot()
    pixels = image_of(axes)
    assert pixels.shape == (MAX_CELLS, MAX_CELLS, 4)
    assert "2 × 2 positions to a cell" in axes.get_title()
    assert axes.get_xlim() == (-0.5, size - 0.5)
    diagonal = np.arange(10, MAX_CELLS - 1)
    assert has_color(pixels, "band")[diagonal, diagonal].all()
    assert has_color(pixels, "columns")[10:-1, 0].all()
    full, three_of_four, one_of_four = pixels[20, 19, 3], pixels[20, 20, 3], pixels[20, 18, 3]
    assert full == pytest.approx(1.0)  # keys 38, 39 of the queries 40, 41
    assert one_of_four < three_of_four < full  # key 37 of query 40 alone; without key 41 of query 40
    assert pixels[20, 17, 3] == 0.0
    assert labels_of(axes)[0] == f"band: {float(4 - 6 / size):.1f} per query"


def test_each_axis_has_its_own_cell_size() -> None:
    axes = graph_of(20, 3 * MAX_CELLS).plot()
    assert image_of(axes).shape == (20, MAX_CELLS, 4)
    assert "1 × 3 positions to a cell" in axes.get_title()


def test_pieces_of_the_graph_give_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(31, 31, is_causal=True)
    whole = image_of(graph.plot())
    monkeypatch.setattr("ssa_framework.graph._CHUNK_ELEMENTS", 1)
    assert (image_of(graph.plot()) == whole).all()


@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (4, 0), (0, 0)])
def test_empty_sequences(queries: int, keys: int) -> None:
    axes = graph_of(queries, keys).plot()
    assert axes.get_images() == []
    assert axes.get_xlabel() == "key position"


@pytest.mark.parametrize("which", [{"batch": 1}, {"batch": -1}, {"head": 2}])
def test_what_is_not_there_cannot_be_drawn(which: dict[str, int]) -> None:
    (name,) = which
    with pytest.raises(GraphError, match=rf"{name} must lie in \[0, [12]\), got"):
        graph_of(4, 4).plot(**which)


def test_nothing_global_is_touched() -> None:
    settings, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    axes = graph_of(9, 9).plot()
    assert isinstance(axes.figure, Figure)
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings


def test_draws_on_given_axes_and_can_be_saved(tmp_path: Any) -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_graph(graph_of(9, 9, is_causal=True), ax=right) is right
    assert left.get_images() == []
    for suffix in ("png", "svg"):
        figure.savefig(tmp_path / f"graph.{suffix}")
        assert (tmp_path / f"graph.{suffix}").stat().st_size > 1000


def test_plotting_is_a_low_module() -> None:
    """It must not know the graph's class, which imports it."""
    assert not hasattr(plotting, "NeighborGraph")
