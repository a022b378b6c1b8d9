"""The tables of the demo as text, the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from ssa_framework.cli.demo.bench import LengthResult
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.train import Run
from ssa_framework.cli.tables import TextTable, mebibytes, percent, seconds
from ssa_framework.quality import QualityReport

_NONE = "–"


def training_table(runs: Sequence[Run], settings: Settings) -> TextTable:
    return TextTable(
        title=f"Training: the same {settings.steps} batches for both",
        note="Loss on validation text that neither model has seen. Steps on one thread, median.",
        headers=("model", "validation loss, nats per byte", "bits per byte", "time per step"),
        rows=tuple(
            (
                run.name,
                f"{run.validation_loss:.3f}",
                f"{run.bits_per_byte:.3f}",
                seconds(run.seconds_per_step),
            )
            for run in runs
        ),
    )


def cost_table(results: Sequence[LengthResult]) -> TextTable:
    rows = []
    for r in results:
        if r.dense is None or r.sparse is None or r.graph is None or r.attention is None or r.speed is None:
            rows.append((str(r.length), *[_NONE] * 5, "wrong", _NONE, _NONE))
            continue
        rows.append(
            (
                str(r.length),
                seconds(r.dense.median),
                seconds(r.sparse.median),
                f"{r.speed:.2f}",
                seconds(r.graph.median),
                seconds(r.attention.median),
                "ok",
                mebibytes(r.dense_bytes, unit=""),
                mebibytes(r.sparse_bytes, unit=""),
            )
        )
    return TextTable(
        title="Time and peak extra memory of one attention layer, forward",
        note="sparse = building the graph + attending over it. dense / sparse above 1: sparse is faster. check: the "
        "sparse output equals dense attention under the graph's mask.",
        headers=("N", "dense", "sparse", "dense / sparse", "graph", "attend", "check", "MiB dense", "MiB sparse"),
        rows=tuple(rows),
    )


def quality_table(results: Sequence[LengthResult], settings: Settings) -> TextTable:
    return TextTable(
        title="What the graph keeps of dense attention",
        note=f"recall: share of the {settings.recall_at} keys with the largest weight that are neighbors; beyond: the "
        f"same among keys outside window and global tokens. lift: recall / expected recall of as many keys drawn at "
        f"random. mass: dense softmax weight on neighbors. error: ‖o_sparse − o_dense‖ / ‖o_dense‖ per query.",
        headers=(
            "N",
            "layer",
            f"recall@{settings.recall_at}",
            "beyond",
            "lift",
            "mass",
            "error, mean",
            "95 % below",
        ),
        rows=tuple(
            (
                str(result.length),
                str(layer),
                percent(report.recall),
                _NONE if report.recall_beyond is None else percent(report.recall_beyond),
                f"{report.lift:.1f} ×",
                percent(report.attention_mass),
                f"{report.output_error:.3f}",
                f"{report.output_error_p95:.3f}",
            )
            for result, layer, report in _reports(results)
        ),
    )


def slots_table(results: Sequence[LengthResult], settings: Settings) -> TextTable:
    names = list(results[0].quality[0].slots) if results else []
    return TextTable(
        title="How the neighbors were found",
        note=f"keys scored: q·k computed per query, and their share of the keys it may attend. The rest: neighbor "
        f"slots per query that each source filled, of {settings.num_neighbors}.",
        headers=("N", "layer", "keys scored", "share scored", *names, "all"),
        rows=tuple(
            (
                str(result.length),
                str(layer),
                f"{sum(report.keys_scored.values()):.1f}",
                percent(report.share_scored),
                *(f"{report.slots[name]:.1f}" for name in names),
                f"{report.degree:.1f}",
            )
            for result, layer, report in _reports(results)
        ),
    )


def _reports(results: Sequence[LengthResult]) -> list[tuple[LengthResult, int, QualityReport]]:
    """Every length and layer, layers counted from 1."""
    return [(result, layer, report) for result in results for layer, report in enumerate(result.quality, start=1)]
