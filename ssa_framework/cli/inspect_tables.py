"""The tables of ``ssa inspect``, and what they say in sentences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ssa_framework.cli.inputs import listed
from ssa_framework.cli.tables import TextTable
from ssa_framework.laboratory.inspect import Inspection, LayerInspection, MixFigures, PerHead, SourceFigures

Figures = Callable[[str], float | None]
"""A number by the name of its field."""

NOTHING = 0.0005
"""What rounds to 0.000."""
_NONE = "–"


def mix_table(inspection: Inspection) -> TextTable:
    return TextTable(
        title="Mixes: means over layers and heads",
        note=f"recall: share of the {inspection.recall_at} keys with the largest weight that are neighbors. mass: "
        "dense softmax weight on neighbors. error: ‖o_sparse − o_dense‖ / ‖o_dense‖ of one query; 95 % below: what "
        "95 % of the queries of a head have at most. Neighbors, summaries and keys scored are per query. overlap: "
        "Jaccard similarity with the neighbors in the layer before.",
        headers=("mix", *_mix_headers(inspection)),
        rows=tuple((name, *_mix_cells(partial(inspection.mean, name))) for name in inspection.mixes),
    )


def source_table(inspection: Inspection) -> TextTable:
    return TextTable(
        title="Sources: what each brings to its mix",
        names=2,
        note="recall, mass: of the neighbors that the source proposed. only it: mass of neighbors that no other source "
        "proposed. error alone: of attention to its neighbors and summaries alone. without: error of the mix without "
        "what it alone brings, its slots left empty. slots: neighbors that count for it, each for the first source "
        "that proposed it. proposed, scored: keys per query.",
        headers=("mix", "source", *_source_headers(inspection)),
        rows=tuple(
            (mix, source, *_source_cells(partial(_of_source, inspection, mix, source)))
            for mix in inspection.mixes
            for source in sources_of(inspection, mix)
        ),
    )


def layer_table(inspection: Inspection) -> TextTable:
    rows = []
    for layer in inspection.layers:
        exact = [_share(mean(figures.attention_mass)) for figures in layer.exact]
        for name, mix in layer.mixes.items():
            worst = _share(max(mix.output_error))
            rows.append((str(layer.layer), name, *_mix_cells(partial(_over_heads, mix)), worst, *exact))
    counts = [figures.keys for figures in inspection.layers[0].exact]
    return TextTable(
        title="Layers",
        names=2,
        note="Means over heads; worst head: the largest mean error of a head. top-K: mass of the exact K best keys, "
        "which tells how diffuse the layer is.",
        headers=("layer", "mix", *_mix_headers(inspection), "worst head", *(f"top-{count}" for count in counts)),
        rows=tuple(rows),
    )


def layer_source_table(inspection: Inspection) -> TextTable:
    return TextTable(
        title="Layers and sources",
        names=3,
        note="Means over heads; columns as in the table of sources.",
        headers=("layer", "mix", "source", *_source_headers(inspection)),
        rows=tuple(
            (str(layer.layer), mix, source, *_source_cells(partial(_over_heads, of_source)))
            for layer in inspection.layers
            for mix, of_mix in layer.mixes.items()
            for source, of_source in of_mix.sources.items()
        ),
    )


def head_table(inspection: Inspection) -> TextTable:
    return TextTable(
        title="Layers and heads",
        names=3,
        note="",
        headers=("layer", "mix", "head", *_mix_headers(inspection)),
        rows=tuple(
            (str(layer.layer), name, str(head), *_mix_cells(partial(_of_head, mix, head)))
            for layer in inspection.layers
            for name, mix in layer.mixes.items()
            for head in range(layer.heads)
        ),
    )


def _mix_headers(inspection: Inspection) -> tuple[str, ...]:
    recall = f"recall@{inspection.recall_at}"
    return (recall, "mass", "error", "95 % below", "neighbors", "summaries", "keys scored", "overlap")


def _mix_cells(of: Figures) -> tuple[str, ...]:
    shares = (_share(of(name)) for name in ("recall", "attention_mass", "output_error", "output_error_p95"))
    counts = (_count(of(name)) for name in ("slots", "summaries", "keys_scored"))
    return (*shares, *counts, _share(of("overlap")))


def _source_headers(inspection: Inspection) -> tuple[str, ...]:
    recall = f"recall@{inspection.recall_at}"
    return (recall, "mass", "only it", "error alone", "95 % below", "without", "slots", "proposed", "scored")


def _source_cells(of: Figures) -> tuple[str, ...]:
    names = ("recall", "attention_mass", "only_mass", "output_error", "output_error_p95", "error_without")
    counts = (_count(of(name)) for name in ("slots", "keys_proposed", "keys_scored"))
    return (*(_share(of(name)) for name in names), *counts)


def _of_source(inspection: Inspection, mix: str, source: str, figure: str) -> float | None:
    return inspection.mean(mix, figure, source)


def _over_heads(figures: MixFigures | SourceFigures, figure: str) -> float | None:
    return mean(getattr(figures, figure))


def _of_head(figures: MixFigures, head: int, figure: str) -> float | None:
    values = getattr(figures, figure)
    return None if values is None else float(values[head])


def sources_of(inspection: Inspection, mix: str) -> list[str]:
    """The sources that took part in a mix."""
    return list(dict.fromkeys(name for layer in inspection.layers for name in layer.mixes[mix].sources))


def mean(values: PerHead | None) -> float | None:
    """Over heads."""
    return sum(values) / len(values) if values else None


def share_text(value: float) -> str:
    return f"{value:.3f}"


def count_text(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return _NONE if value is None else share_text(value)


def _count(value: float | None) -> str:
    return _NONE if value is None else count_text(value)


# -- findings --------------------------------------------------------------------------------------------------------


def findings(inspection: Inspection) -> list[str]:
    """What the numbers say, in sentences made from them."""
    return [
        *(_mix_finding(inspection, name) for name in inspection.mixes),
        *_exact_finding(inspection),
        *(sentence for name in inspection.mixes for sentence in _source_finding(inspection, name)),
    ]


def _mix_finding(inspection: Inspection, name: str) -> str:
    mass, error, slots, summaries = (
        inspection.mean(name, figure) or 0.0 for figure in ("attention_mass", "output_error", "slots", "summaries")
    )
    worst, layer, head = max(
        (layer.mixes[name].output_error[head], layer.layer, head)
        for layer in inspection.layers
        for head in range(layer.heads)
    )
    pseudo = f" and {summaries:.0f} summaries" if summaries else ""
    return (
        f"{name} keeps {mass:.3f} of the attention mass with {slots:.0f} neighbors{pseudo} per query, at an output "
        f"error of {error:.3f}; its worst head is head {head} of layer {layer}, {worst:.3f}."
    )


def _exact_finding(inspection: Inspection) -> list[str]:
    counts = [figures.keys for figures in inspection.layers[0].exact]
    if not counts:
        return []
    middle = counts[len(counts) // 2]
    masses = [(mean(exact_mass(layer, middle)) or 0.0, layer.layer) for layer in inspection.layers]
    lowest, layer = min(masses)
    least = f"; least in layer {layer}, {lowest:.3f}" if len(masses) > 1 else ""
    average = sum(mass for mass, _ in masses) / len(masses)
    return [f"The exact {middle} best keys of a query hold {average:.3f} of its attention mass{least}."]


def exact_mass(layer: LayerInspection, keys: int) -> PerHead:
    """Mass of the exact best keys."""
    return next(figures.attention_mass for figures in layer.exact if figures.keys == keys)


def _source_finding(inspection: Inspection, mix: str) -> list[str]:
    error = inspection.mean(mix, "output_error") or 0.0
    idle = [
        source
        for source in sources_of(inspection, mix)
        if (inspection.mean(mix, "only_mass", source) or 0.0) < NOTHING
        and abs((inspection.mean(mix, "error_without", source) or 0.0) - error) < NOTHING
    ]
    if not idle:
        return []
    which = idle[0] if len(idle) == 1 else f"any one of {listed(idle)}"
    return [f"In {mix}, the others propose what {which} proposes: without it, mass and error stay the same to 0.001."]
