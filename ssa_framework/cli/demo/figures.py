"""The figures of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from ssa_framework.cli.demo.bench import LengthResult
from ssa_framework.cli.demo.passage import Passage
from ssa_framework.cli.demo.train import Run
from ssa_framework.plotting import plot_graph
from ssa_framework.quality import Timing

_COLORS = {"dense": "#D55E00", "sparse": "#0072B2", "graph": "#56B4E9", "attend": "#009E73"}  # Okabe and Ito, 2008
_SNIPPET = 16


def _axes(width: float, height: float) -> Axes:
    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.grid(True)
    return axes


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Bits per byte over steps: validation as points, training as a moving mean; the untrained models are cut off."""
    axes = _axes(5.6, 3.6)
    strokes: dict[str, dict[str, Any]] = {
        "sparse": {"marker": "o", "markersize": 7, "lw": 4, "alpha": 0.55},  # wide, since dense may lie on top of it
        "dense": {"marker": "s", "markersize": 3.5, "lw": 1.4, "linestyle": "--"},
    }
    shown = []
    for run in runs:
        color = _COLORS[run.name]
        smooth = [x / log(2) for x in _moving_mean(run.train_loss, max(1, len(run.train_loss) // 25))]
        axes.plot(range(1, len(smooth) + 1), smooth, color=color, alpha=0.35, lw=1)
        steps, losses = zip(*run.validation, strict=True)
        bits = [x / log(2) for x in losses]
        axes.plot(steps[1:], bits[1:], color=color, label=f"{run.name}, validation", **strokes[run.name])
        shown += bits[1:] + smooth[steps[1] :]
    axes.plot([], [], color="0.5", alpha=0.5, lw=1, label="training, moving mean")
    margin = 0.08 * (max(shown) - min(shown)) + 0.01
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (bits per byte)")
    axes.legend(frameon=False)
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def _moving_mean(values: Sequence[float], width: int) -> list[float]:
    out = []
    for i in range(len(values)):
        window = values[max(0, i + 1 - width) : i + 1]
        out.append(sum(window) / len(window))
    return out


def time_figure(results: Sequence[LengthResult]) -> Figure:
    """Milliseconds over N, both logarithmic; bars from the lower to the upper quartile."""
    axes = _axes(5.6, 3.6)
    timed = [r for r in results if r.speed is not None]
    curves: dict[str, Callable[[LengthResult], Timing | None]] = {
        "dense": lambda r: r.dense,
        "sparse": lambda r: r.sparse,
        "graph": lambda r: r.graph,
        "attend": lambda r: r.attention,
    }
    labels = {
        "dense": "dense",
        "sparse": "sparse = graph + attend",
        "graph": "graph: choosing neighbors",
        "attend": "attend: over the graph",
    }
    for name, pick in curves.items():
        timings = [t for t in map(pick, timed) if t is not None]
        medians = [t.median * 1e3 for t in timings]
        lower = [(t.median - t.quartiles[0]) * 1e3 for t in timings]
        upper = [(t.quartiles[1] - t.median) * 1e3 for t in timings]
        part = name in ("graph", "attend")
        axes.errorbar(
            [r.length for r in timed],
            medians,
            yerr=(lower, upper),
            color=_COLORS[name],
            linestyle={"dense": "--", "sparse": "-", "graph": ":", "attend": ":"}[name],
            marker={"dense": "s", "sparse": "o", "graph": "^", "attend": "v"}[name],
            markersize=4,
            linewidth=1.2 if part else 2,
            capsize=2,
            label=labels[name],
        )
    axes.set_ylabel("time of one call (ms)")
    return _over_length(axes, timed)


def memory_figure(results: Sequence[LengthResult]) -> Figure:
    """MiB over N, both logarithmic."""
    axes = _axes(5.6, 3.6)
    timed = [r for r in results if r.dense_bytes is not None and r.sparse_bytes is not None]
    for name, style in (("dense", "s--"), ("sparse", "o-")):
        counts = [(r.dense_bytes if name == "dense" else r.sparse_bytes) or 0 for r in timed]
        axes.plot(
            [r.length for r in timed], [n / 2**20 for n in counts], style, color=_COLORS[name], label=name, markersize=4
        )
    axes.set_ylabel("peak extra memory (MiB)")
    return _over_length(axes, timed)


def _over_length(axes: Axes, results: Sequence[LengthResult]) -> Figure:
    lengths = [r.length for r in results]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(n) for n in lengths])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("length N (bytes of text = tokens)")
    axes.legend(frameon=False, fontsize="small")
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def graph_figure(passage: Passage) -> Figure:
    """The neighbor graph of the passage; every tick is labelled with the text that starts there."""
    figure = Figure(figsize=(9.0, 8.6), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    plot_graph(passage.graph, head=passage.head, ax=axes)
    axes.set_title("")
    ticks = list(range(0, len(passage.text), _SNIPPET))
    snippets = [passage.text[t : t + _SNIPPET].replace("$", r"\$") for t in ticks]
    axes.set_yticks(ticks, [f"{s} {t:>3}" for t, s in zip(ticks, snippets, strict=True)], family="monospace", size=7)
    axes.set_xticks(ticks, [f"{t} {s}" for t, s in zip(ticks, snippets, strict=True)], family="monospace", size=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("key: position and text from there")
    axes.set_ylabel("query: text and position")
    axes.axhline(passage.query, color="#D55E00", lw=0.8)
    outside = axes.get_yaxis_transform()  # x in widths of the axes, y in positions
    axes.text(1.005, passage.query, "query\nbelow", transform=outside, color="#D55E00", size=8, va="center")
    return figure
