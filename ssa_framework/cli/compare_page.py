"""The tables, figures and page of ``ssa compare``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ssa_framework.cli.inputs import listed
from ssa_framework.cli.mixes import configured
from ssa_framework.cli.pages import draw
from ssa_framework.cli.pages import render as render_page
from ssa_framework.cli.tables import TextTable
from ssa_framework.laboratory.compare import Comparison, Cost, MixResult, Quality

_NONE = "–"
_FRONT, _BEATEN, _REFERENCE = "#0072B2", "#6B7580", "#D55E00"
_PARTS = {"index": "#0072B2", "search": "#56B4E9", "attend": "#009E73"}


@dataclass(frozen=True)
class Kind:
    """A quality that the figures show.

    Attributes:
        name: its field in `Quality`. label: of the axis. logarithmic: the axis.
    """

    name: str
    label: str
    logarithmic: bool = False


ERROR = Kind("output_error", "output error", logarithmic=True)
MASS = Kind("attention_mass", "attention mass")
RECALL = Kind("recall", "recall")
COSTS: dict[Cost, str] = {
    "keys_looked_at": "keys and summaries looked at, per query",
    "keys_attended": "keys attended, per query",
    "times_dense": "time / time of dense attention",
}


def render(comparison: Comparison, numbers_name: str, table_name: str) -> str:
    """The whole page; nothing in it comes from elsewhere.

    Args:
        numbers_name, table_name: of the JSON and the CSV file beside the page.
    """
    is_timed = any(mix.times is not None for mix in comparison.mixes)
    pictures = {
        "error": draw(lambda: trade_off(comparison, "keys_looked_at", ERROR), "Output error over keys looked at"),
        "mass": draw(lambda: trade_off(comparison, "keys_attended", MASS), "Attention mass over keys attended"),
        "recall": draw(lambda: trade_off(comparison, "keys_looked_at", RECALL), "Recall over keys looked at"),
    }
    if is_timed:
        pictures["time"] = draw(lambda: trade_off(comparison, "times_dense", ERROR), "Output error over time")
        pictures["parts"] = draw(lambda: time_parts(comparison), "Time of each mix: index, search and attention")
    return render_page(
        "compare.html.j2",
        comparison=comparison,
        findings=findings(comparison),
        mixes=mix_table(comparison),
        times=time_table(comparison) if is_timed else None,
        exact=exact_table(comparison),
        pictures=pictures,
        configurations={mix.name: configured(mix.config) for mix in comparison.mixes},
        numbers_name=numbers_name,
        table_name=table_name,
    )


# -- tables ----------------------------------------------------------------------------------------------------------


def mix_table(comparison: Comparison) -> TextTable:
    front = {mix.name for mix in comparison.pareto()}
    k = comparison.recall_at
    return TextTable(
        title="What the mixes keep, and what they look at",
        note="Keys and summaries are per query. looked at: keys that are scored, or attended without being scored, "
        f"and summaries. recall: share of the {k} keys with the largest weight that are neighbors; beyond: the same "
        "outside bands and columns. mass: dense softmax weight on neighbors. error: ‖o_sparse − o_dense‖ / ‖o_dense‖ "
        "of one query, mean; 95 % below: what 95 % of the queries have at most. front: no other mix looks at less and "
        "has less error.",
        headers=(
            "mix", "scored", "attended", "summaries", "looked at", f"recall@{k}", "beyond", "mass", "error",
            "95 % below", "front",
        ),
        rows=tuple(
            (
                f"{number} {mix.name}",
                *_quality_cells(mix.quality),
                "yes" if mix.name in front else "no",
            )
            for number, mix in enumerate(comparison.mixes, start=1)
        ),
    )  # fmt: skip


def _quality_cells(quality: Quality) -> tuple[str, ...]:
    counts = (quality.keys_scored, quality.keys_attended, quality.summaries, quality.keys_looked_at)
    shares = (quality.recall, quality.recall_beyond, quality.attention_mass, quality.output_error)
    return (
        *(f"{count:.0f}" for count in counts),
        *(_NONE if share is None else f"{share:.3f}" for share in (*shares, quality.output_error_p95)),
    )


def time_table(comparison: Comparison) -> TextTable:
    return TextTable(
        title="Time of one layer, all queries",
        note="Medians in ms. index: routing the last query alone among all keys, that is, whatever does not grow with "
        "the number of queries, such as sorting hashes, clustering keys or filling a search index. search: routing all "
        "queries, less that. dense: torch's dense attention, in turns with the mix of the row. dense / sparse above 1: "
        "sparse is faster.",
        headers=("mix", "index, ms", "search, ms", "attend, ms", "sum, ms", "dense, ms", "dense / sparse"),
        rows=tuple((f"{number} {mix.name}", *_time_cells(mix)) for number, mix in enumerate(comparison.mixes, start=1)),
    )


def _time_cells(mix: MixResult) -> tuple[str, ...]:
    times = mix.times
    if times is None:
        return (_NONE,) * 6
    parts = (times.index.median, times.search, times.attend.median, times.total, times.dense.median)
    return (*(_milliseconds(seconds) for seconds in parts), f"{times.times_dense:.2f}")


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def exact_table(comparison: Comparison) -> TextTable:
    return TextTable(
        title="The yardstick: the exact best keys of every query",
        note="No other keys, as many as these, hold more attention mass. To find them, every key is scored.",
        headers=("keys", f"recall@{comparison.recall_at}", "mass", "error", "95 % below"),
        rows=tuple(
            (
                str(exact.keys),
                f"{exact.quality.recall:.3f}",
                f"{exact.quality.attention_mass:.3f}",
                f"{exact.quality.output_error:.3f}",
                f"{exact.quality.output_error_p95:.3f}",
            )
            for exact in comparison.exact
        ),
    )


# -- findings --------------------------------------------------------------------------------------------------------


def findings(comparison: Comparison) -> list[str]:
    """What the numbers say, in sentences made from them."""
    sentences = [_front_sentence(comparison, "keys_looked_at", "keys looked at")]
    timed = [mix for mix in comparison.mixes if mix.times is not None]
    if timed:
        sentences.append(_front_sentence(comparison, "times_dense", "time"))
        faster = [mix.name for mix in timed if mix.times is not None and mix.times.times_dense > 1]
        who = f"{listed(faster)} took" if faster else "no mix took"
        sentences.append(f"At {comparison.length} tokens, {who} less time than dense attention.")
    sentences += _beat_exact(comparison)
    wrong = [mix.name for mix in comparison.mixes if mix.message]
    if wrong:
        sentences.append(f"The output of {listed(wrong)} was wrong, so no time is shown.")
    if not comparison.complete:
        sentences.append("The comparison was interrupted: times are missing.")
    return sentences


def _front_sentence(comparison: Comparison, cost: Cost, what: str) -> str:
    front = listed(f"{mix.name} ({mix.quality.output_error:.2g})" for mix in comparison.pareto(cost))
    return f"Pareto front of output error and {what}: {front}."


def _beat_exact(comparison: Comparison) -> list[str]:
    """The mixes that have less error than the exact best keys, of which there are more than they attend."""
    sentences = []
    for mix in comparison.mixes:
        quality = mix.quality
        beaten = [
            exact
            for exact in comparison.exact
            if exact.keys >= quality.keys_attended and exact.quality.output_error > quality.output_error
        ]
        if beaten:
            most = beaten[-1]
            sentences.append(
                f"{mix.name} has less error with {quality.keys_attended:.0f} neighbors and {quality.summaries:.0f} "
                f"summaries ({quality.output_error:.2g}) than the exact best {most.keys} keys "
                f"({most.quality.output_error:.2g})."
            )
    return sentences


# -- figures ---------------------------------------------------------------------------------------------------------


def trade_off(comparison: Comparison, cost: Cost, kind: Kind) -> Figure:
    """Quality over cost: the mixes as numbered points, those that no other beats in blue and joined by a line, the
    exact best keys dashed, and dense attention as a line at its cost."""
    axes = _axes(5.8, 4.2)
    front = comparison.pareto(cost) if kind is ERROR else []
    points = [(mix.cost(cost), getattr(mix.quality, kind.name), mix, n) for n, mix in enumerate(comparison.mixes, 1)]
    floor = _smallest(comparison) if kind.logarithmic else 0.0

    def height(quality: Quality) -> float:
        return max(float(getattr(quality, kind.name)), floor)

    joined = [(mix.cost(cost) or 0.0, height(mix.quality)) for mix in front]
    if len(joined) > 1:
        axes.plot(*zip(*joined, strict=True), color=_FRONT, lw=1.2, zorder=2)
    for x, _, mix, number in points:
        if x is None:
            continue
        color = _FRONT if mix in front or kind is not ERROR else _BEATEN
        at = (max(x, 1.0) if cost != "times_dense" else x, height(mix.quality))
        axes.scatter(*at, s=190, color=color, edgecolors="white", linewidths=0.6, zorder=3)
        axes.annotate(str(number), at, color="white", ha="center", va="center", fontsize=8, weight="bold", zorder=4)
    if cost == "times_dense":
        axes.axvline(1.0, color=_REFERENCE, lw=1, linestyle=":")
        _beside_line(axes, 1.0, "dense")
    else:
        exact = [(e.keys, height(e.quality)) for e in comparison.exact]
        if exact:
            axes.plot(
                *zip(*exact, strict=True), color=_REFERENCE, lw=1.2, linestyle="--", zorder=1, label="exact best keys"
            )
            axes.legend(frameon=False, fontsize="small")
        axes.axvline(comparison.allowed, color=_REFERENCE, lw=1, linestyle=":")
        _beside_line(axes, comparison.allowed, "dense")
    axes.set_xscale("log")
    axes.set_xlabel(COSTS[cost])
    axes.set_ylabel(f"recall of the best {comparison.recall_at} keys" if kind is RECALL else kind.label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    if kind.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0.0, 1.04)
    return _figure(axes)


def _smallest(comparison: Comparison) -> float:
    """Where errors of zero are drawn, on a logarithmic axis: below all others."""
    every = [*(mix.quality for mix in comparison.mixes), *(exact.quality for exact in comparison.exact)]
    positive = [quality.output_error for quality in every if quality.output_error > 0]
    return min(positive) / 3 if positive else 1e-6


def _beside_line(axes: Axes, x: float, label: str) -> None:
    where = axes.get_xaxis_transform()  # y in heights of the axes
    axes.text(x, 1.01, label, transform=where, color=_REFERENCE, ha="center", va="bottom", fontsize="small")


def time_parts(comparison: Comparison) -> Figure:
    """Index, search and attention stacked, as shares of the time of dense attention beside them."""
    timed = [(n, mix) for n, mix in enumerate(comparison.mixes, start=1) if mix.times is not None]
    axes = _axes(5.8, 1.2 + 0.32 * len(timed))
    names = [f"{number} {mix.name}" for number, mix in timed]
    left = [0.0] * len(timed)
    picks: dict[str, Callable[[MixResult], float]] = {
        "index": lambda mix: mix.times.index.median if mix.times is not None else 0.0,
        "search": lambda mix: mix.times.search if mix.times is not None else 0.0,
        "attend": lambda mix: mix.times.attend.median if mix.times is not None else 0.0,
    }
    for part, pick in picks.items():
        dense = [mix.times.dense.median for _, mix in timed if mix.times is not None]
        widths = [pick(mix) / d for (_, mix), d in zip(timed, dense, strict=True)]
        axes.barh(names, widths, left=left, color=_PARTS[part], label=part, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(1.0, color=_REFERENCE, lw=1, linestyle=":")
    _beside_line(axes, 1.0, "dense")
    axes.invert_yaxis()
    axes.set_xlabel("time / time of dense attention")
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _figure(axes)


def _axes(width: float, height: float) -> Axes:
    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.grid(True, which="major")
    axes.set_axisbelow(True)
    return axes


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure
