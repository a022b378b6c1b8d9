"""The page of ``ssa inspect``: figures, heat maps, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssa_framework.cli.heatmaps import HeatMap, Scale, Values, heat_maps
from ssa_framework.cli.inspect_tables import (
    NOTHING,
    count_text,
    exact_mass,
    findings,
    head_table,
    layer_source_table,
    layer_table,
    mean,
    mix_table,
    share_text,
    source_table,
    sources_of,
)
from ssa_framework.cli.mixes import configured
from ssa_framework.cli.pages import draw
from ssa_framework.cli.pages import render as render_page
from ssa_framework.laboratory.inspect import Inspection, LayerInspection, MixFigures, PerHead

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""Okabe and Ito (Color Universal Design, 2008), in an order whose neighbors differ most; and a brown."""
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class MapGroup:
    """Heat maps of one figure, with one scale."""

    title: str
    note: str
    maps: list[HeatMap]
    scale: Scale


def render(inspection: Inspection, numbers_name: str) -> str:
    """The whole page; nothing in it comes from elsewhere.

    Args:
        inspection: with a layer at least.
        numbers_name: of the JSON file beside the page.
    """
    pictures = {
        "error": draw(
            lambda: over_layers(inspection, "output_error", "output error", logarithmic=True),
            "Output error over layers",
        ),
        "mass": draw(lambda: over_layers(inspection, "attention_mass", "attention mass"), "Attention mass over layers"),
    }
    shares = {
        name: draw(partial(mass_shares, inspection, name), f"Attention mass by source over layers, mix {name}")
        for name in inspection.mixes
    }
    return render_page(
        "inspect.html.j2",
        inspection=inspection,
        findings=findings(inspection),
        mixes=mix_table(inspection),
        sources=source_table(inspection),
        by_layer=layer_table(inspection),
        by_layer_and_source=layer_source_table(inspection),
        by_head=head_table(inspection),
        pictures=pictures,
        shares=shares,
        groups=map_groups(inspection),
        configurations={name: configured(config) for name, config in inspection.mixes.items()},
        numbers_name=numbers_name,
    )


# -- figures ---------------------------------------------------------------------------------------------------------


def over_layers(inspection: Inspection, figure: str, label: str, *, logarithmic: bool = False) -> Figure:
    """Means over heads as lines, from the least to the largest head as bands; the exact best keys dashed."""
    axes = _axes(5.6, 3.6)
    layers = [layer.layer for layer in inspection.layers]
    for number, name in enumerate(inspection.mixes):
        rows: list[PerHead] = [getattr(layer.mixes[name], figure) for layer in inspection.layers]
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axes.fill_between(layers, [min(row) for row in rows], [max(row) for row in rows], color=color, alpha=0.15, lw=0)
        axes.plot(layers, [mean(row) or 0.0 for row in rows], color=color, marker=marker, markersize=4, label=name)
    counts = [figures.keys for figures in inspection.layers[0].exact]
    for number, count in enumerate(counts):
        of_layers = [next(e for e in layer.exact if e.keys == count) for layer in inspection.layers]
        axes.plot(
            layers,
            [mean(getattr(figures, figure)) or 0.0 for figures in of_layers],
            color="0.5",
            lw=1,
            linestyle=("--", "-.", ":")[number % 3],
            label=f"exact best {count}",
        )
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if logarithmic and axes.dataLim.y1 > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0.0)
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _figure(axes)


def mass_shares(inspection: Inspection, mix: str) -> Figure:
    """Attention mass as stacked bars: what each source alone proposed, what several did, what is missed."""
    axes = _axes(5.6, 3.4)
    layers = [layer.layer for layer in inspection.layers]
    below = [0.0] * len(layers)

    def stack(values: Sequence[float], label: str, color: str) -> None:
        axes.bar(layers, values, bottom=below, width=0.9, color=color, label=label)
        below[:] = [b + v for b, v in zip(below, values, strict=True)]

    def of_layer(layer: LayerInspection) -> MixFigures:
        return layer.mixes[mix]

    every = list(dict.fromkeys(source for name in inspection.mixes for source in sources_of(inspection, name)))
    for source in sources_of(inspection, mix):
        color = COLORS[every.index(source) % len(COLORS)]  # the same in all mixes
        values = [mean(of_layer(layer).sources[source].only_mass) or 0.0 for layer in inspection.layers]
        if max(values) >= NOTHING:
            stack(values, f"{source} only", color)
    kept = [mean(of_layer(layer).attention_mass) or 0.0 for layer in inspection.layers]
    several = [max(0.0, mass - b) for mass, b in zip(kept, below, strict=True)]
    if max(several) >= NOTHING:
        stack(several, "several sources", "#8A9199")
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("layer")
    axes.set_ylabel("attention mass")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _figure(axes)


def _axes(width: float, height: float) -> Axes:
    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    return axes


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def map_groups(inspection: Inspection) -> list[MapGroup]:
    """Heat maps of layers and heads: error, mass, recall, keys and overlap for each mix, and the exact mass."""

    def of_mixes(figure: str) -> dict[str, Values]:
        return {
            name: {layer.layer: getattr(layer.mixes[name], figure) for layer in inspection.layers}
            for name in inspection.mixes
        }

    def group(title: str, note: str, values: Mapping[str, Values], unit: str, *, logarithmic: bool = False) -> MapGroup:
        write = count_text if unit.startswith("keys") else share_text
        return MapGroup(title, note, *heat_maps(values, what=title, unit=unit, write=write, logarithmic=logarithmic))

    k = inspection.recall_at
    counts = [figures.keys for figures in inspection.layers[0].exact]
    exact = {f"exact best {n}": {layer.layer: exact_mass(layer, n) for layer in inspection.layers} for n in counts}
    error_note = "‖o_sparse − o_dense‖ / ‖o_dense‖, mean over queries. Dark is good."
    groups = [
        group("Output error", error_note, of_mixes("output_error"), "relative error", logarithmic=True),
        group("Attention mass on neighbors", "Light is good.", of_mixes("attention_mass"), "share"),
        group(f"Recall of the best {k} keys", "Light is good.", of_mixes("recall"), "share"),
        group("Neighbors", "Keys that a query attends.", of_mixes("slots"), "keys per query"),
        group("Keys scored", "Keys whose q·k was computed.", of_mixes("keys_scored"), "keys per query"),
    ]
    if exact:
        note = "How much the best keys hold if they are found exactly: dark heads are diffuse."
        groups.insert(3, group("Attention mass of the exact best keys", note, exact, "share"))
    if len(inspection.layers) > 1:
        note = (
            "Jaccard similarity of a query's neighbors with those that it has in the layer before, of those looked at; "
            "heads of two layers have nothing in common but their number."
        )
        groups.append(group("Overlap with the layer before", note, of_mixes("overlap"), "Jaccard similarity"))
    return groups
