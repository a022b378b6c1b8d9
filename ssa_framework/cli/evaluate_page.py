"""The tables, findings, figures and page of ``ssa eval``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ssa_framework.cli.inputs import listed
from ssa_framework.cli.mixes import configured
from ssa_framework.cli.pages import draw
from ssa_framework.cli.pages import render as render_page
from ssa_framework.cli.tables import TextTable, mebibytes, percent, seconds
from ssa_framework.laboratory.evaluate import DENSE, CostResult, Evaluation, PasskeyResult

_NONE = "–"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REFERENCE = "#808080"


def render(evaluation: Evaluation, numbers_name: str) -> str:
    """The whole page; nothing in it comes from elsewhere.

    Args:
        numbers_name: of the JSON file beside the page.
    """
    pictures = {}
    if evaluation.perplexities:
        pictures["perplexity"] = draw(lambda: perplexity_figure(evaluation), "Change of perplexity over the context")
    if evaluation.costs:
        pictures["time"] = draw(lambda: time_figure(evaluation), "Dense time divided by sparse time over the context")
    return render_page(
        "evaluate.html.j2",
        evaluation=evaluation,
        findings=findings(evaluation),
        tables=tables(evaluation),
        passkeys=passkey_grid(evaluation),
        pictures=pictures,
        configurations={name: configured(config) for name, config in evaluation.mixes.items()},
        numbers_name=numbers_name,
    )


# -- tables ----------------------------------------------------------------------------------------------------------


def tables(evaluation: Evaluation) -> dict[str, TextTable]:
    """By what they show; those that have no rows are left out."""
    found = {
        "perplexity": perplexity_table(evaluation),
        "passkey": passkey_table(evaluation),
        "cost": cost_table(evaluation),
    }
    return {name: table for name, table in found.items() if table.rows}


def perplexity_table(evaluation: Evaluation) -> TextTable:
    rows = []
    for result in evaluation.perplexities:
        change = _NONE if result.change is None else f"{100 * result.change:+.2f} %"
        looked = result.looked
        counts: tuple[str, ...] = (_NONE,) * 4
        if looked is not None:
            counts = (
                percent(looked.attended_share),
                *(f"{count:.0f}" for count in (looked.keys_attended, looked.summaries, looked.keys_scored)),
            )
        rows.append((result.mix, result.text, f"{result.length:,}", f"{result.perplexity:.3f}", change, *counts))
    return TextTable(
        title="Perplexity",
        note="Of the last tokens of a text, each predicted from everything before it. change: against dense attention. "
        "attended: neighbors as a share of the keys that a query may attend, mean over all layers; dense layers attend "
        "100 %. keys, summaries and keys scored are per query, of the sparse layers.",
        headers=("mix", "text", "context", "perplexity", "change", "attended", "keys", "summaries", "keys scored"),
        rows=tuple(rows),
        names=2,
    )


def passkey_table(evaluation: Evaluation) -> TextTable:
    return TextTable(
        title="Passkeys found",
        note="A number of five digits in a long text, asked for at its end. at once: question and answer are read in "
        "one call behind the text. token by token: one call for each of their tokens.",
        headers=("mix", "context", "at once", "token by token"),
        rows=tuple(
            (
                result.mix,
                f"{result.length:,}",
                f"{sum(result.prefill)} of {len(result.depths)}",
                f"{sum(result.decode)} of {len(result.depths)}",
            )
            for result in evaluation.passkeys
        ),
    )


def cost_table(evaluation: Evaluation) -> TextTable:
    rows = []
    for cost in evaluation.costs:
        dense = _dense_cost(evaluation, cost.length)
        rows.append(
            (
                _way(cost),
                f"{cost.length:,}",
                seconds(cost.prefill.median),
                f"{dense.prefill.median / cost.prefill.median:.2f}",
                f"{1e3 * cost.token.median:.1f}",
                f"{dense.token.median / cost.token.median:.2f}",
                mebibytes(cost.prefill_peak),
                mebibytes(cost.token_peak),
            )
        )
    return TextTable(
        title="Time and memory of the whole model",
        note="Batch of one; medians. A mix is measured as its configuration says, which may attend densely where few "
        "keys are there (dense_below); always sparse: as it is, at every length. prefill: until the first new token is "
        "known. token: each further one. Peak memory is what is held beyond the weights, the cache included; that of a "
        "token, beyond weights and cache. A ratio above 1: sparse is faster.",
        headers=(
            "mix", "context", "prefill", "dense / sparse", "token, ms", "dense / sparse", "prefill, peak", "token, peak"
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _way(cost: CostResult) -> str:
    return f"{cost.mix}, always sparse" if cost.always_sparse else cost.mix


def _dense_cost(evaluation: Evaluation, length: int) -> CostResult:
    return next(cost for cost in evaluation.costs if cost.mix == DENSE and cost.length == length)


def passkey_grid(evaluation: Evaluation) -> list[tuple[PasskeyResult, list[tuple[str, bool, bool]]]]:
    """For each length and mix: depth, found at once, found token by token."""
    return [
        (
            result,
            [
                (f"{100 * depth:.0f} %", at_once, stepwise)
                for depth, at_once, stepwise in zip(result.depths, result.prefill, result.decode, strict=True)
            ],
        )
        for result in evaluation.passkeys
    ]


# -- findings --------------------------------------------------------------------------------------------------------


def findings(evaluation: Evaluation) -> list[str]:
    """What the numbers say, in sentences made from them."""
    sentences = []
    for mix in evaluation.mixes:
        sentences += _perplexity_sentence(evaluation, mix)
        sentences += _passkey_sentence(evaluation, mix)
        sentences += _cost_sentence(evaluation, mix)
    if not evaluation.complete:
        sentences.append("The evaluation was interrupted: what came after is missing.")
    return sentences


def _perplexity_sentence(evaluation: Evaluation, mix: str) -> list[str]:
    mine = [result for result in evaluation.perplexities if result.mix == mix and result.change is not None]
    if not mine:
        return []
    worst = max(mine, key=lambda result: result.change or 0.0)
    least, most = (f"{100 * pick(r.change or 0.0 for r in mine):+.2f} %" for pick in (min, max))
    shares = [result.looked.attended_share for result in mine if result.looked is not None]
    attended = f"attending to {percent(min(shares))} to {percent(max(shares))} of the keys"
    if len(mine) == 1:
        return [f"{mix}: perplexity changes by {most}, attending to {percent(shares[0])} of the keys."]
    where = f"most at {worst.length:,} tokens of {worst.text}"
    return [f"{mix}: perplexity changes by {least} to {most}, {where}, {attended}."]


def _passkey_sentence(evaluation: Evaluation, mix: str) -> list[str]:
    sentences = []
    for result in evaluation.passkeys:
        if result.mix != mix:
            continue
        dense = next(r for r in evaluation.passkeys if r.mix == DENSE and r.length == result.length)
        sentences.append(
            f"{mix}: of {len(result.depths)} passkeys at {result.length:,} tokens it finds {sum(result.prefill)} read "
            f"at once and {sum(result.decode)} token by token; dense attention finds {sum(dense.prefill)} and "
            f"{sum(dense.decode)}."
        )
    return sentences


def _cost_sentence(evaluation: Evaluation, mix: str) -> list[str]:
    sentences = []
    for always_sparse in (False, True):
        mine = [cost for cost in evaluation.costs if (cost.mix, cost.always_sparse) == (mix, always_sparse)]
        if mine:
            ratios = _ratios(evaluation, mine)
            sentences.append(f"{_way(mine[0])}: speed of the whole model, as a multiple of dense: {ratios}.")
    return sentences


def _ratios(evaluation: Evaluation, costs: Sequence[CostResult]) -> str:
    ratios = []
    for cost in costs:
        dense = _dense_cost(evaluation, cost.length)
        prefill, token = (
            f"{a.median / b.median:.2f}" for a, b in ((dense.prefill, cost.prefill), (dense.token, cost.token))
        )
        ratios.append(f"{prefill} (prefill) and {token} (each token) at {cost.length:,} tokens")
    return listed(ratios)


# -- figures ---------------------------------------------------------------------------------------------------------


def perplexity_figure(evaluation: Evaluation) -> Figure:
    """Change against dense attention over the context: a line per mix, through the worst text; points: all texts."""
    figure = Figure(figsize=(5.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for number, mix in enumerate(evaluation.mixes):
        color = _COLORS[number % len(_COLORS)]
        mine = [r for r in evaluation.perplexities if r.mix == mix and r.change is not None]
        axes.scatter([r.length for r in mine], [100 * (r.change or 0.0) for r in mine], color=color, s=26, zorder=3)
        lengths = sorted({r.length for r in mine})
        worst = [max(100 * (r.change or 0.0) for r in mine if r.length == length) for length in lengths]
        axes.plot(lengths, worst, color=color, label=mix, lw=1.4)
    axes.axhline(0.0, color=_REFERENCE, lw=1, linestyle=":")
    axes.set_ylabel("perplexity, change in %")
    return _over_lengths(figure, evaluation.lengths)


def time_figure(evaluation: Evaluation) -> Figure:
    """Dense time / sparse time over the context, of prefill and of each token; pale: always sparse."""
    figure = Figure(figsize=(5.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    kinds: dict[str, tuple[str, Callable[[CostResult], float]]] = {
        "prefill": ("-", lambda cost: cost.prefill.median),
        "token": ("--", lambda cost: cost.token.median),
    }
    for number, mix in enumerate(evaluation.mixes):
        for always_sparse, (kind, (style, pick)) in itertools.product((False, True), kinds.items()):
            mine = [cost for cost in evaluation.costs if (cost.mix, cost.always_sparse) == (mix, always_sparse)]
            if not mine:
                continue
            ratios = [pick(_dense_cost(evaluation, cost.length)) / pick(cost) for cost in mine]
            axes.plot(
                [cost.length for cost in mine], ratios, style, color=_COLORS[number % len(_COLORS)], marker="o", ms=4,
                lw=1.4, alpha=0.45 if always_sparse else 1.0, label=f"{_way(mine[0])}, {kind}",
            )  # fmt: skip
    axes.axhline(1.0, color=_REFERENCE, lw=1, linestyle=":")
    axes.set_ylabel("dense time / sparse time")
    return _over_lengths(figure, evaluation.lengths)


def _over_lengths(figure: Figure, lengths: Sequence[int]) -> Figure:
    axes = figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context, tokens")
    axes.grid(True, which="major")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small")
    return figure
