"""``ssa tune``: the cheapest routing of every layer that is good enough, as a configuration in a file."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssa_framework.cli.errors import one_line_errors
from ssa_framework.cli.inputs import TEXT_HELP, check_mixes, pick_text
from ssa_framework.cli.mixes import MIX_HELP, parse_mixes
from ssa_framework.cli.tables import TextTable, rich_table
from ssa_framework.laboratory.models import load_model, tokens_of
from ssa_framework.laboratory.tune import (
    BUDGETS,
    Change,
    Target,
    TargetKind,
    Trial,
    Tuning,
    default_candidates,
    with_budgets,
)
from ssa_framework.laboratory.tune import tune as tune_model

CONFIG_NAME, NUMBERS_NAME, STATE_NAME = "config.json", "tune.json", "state.json"
_KINDS: dict[str, TargetKind] = {"perplexity": "perplexity", "error": "output_error"}


def tune(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model of transformers.")],
    text: Annotated[
        list[str] | None, typer.Argument(help=f"Texts to search on. {TEXT_HELP}", show_default="reference")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="What is good enough: perplexity=1% (at most so much above that of dense attention) or error=0.05 "
            "(output error, mean over layers, heads and queries)."
        ),
    ] = "perplexity=1%",
    held_out: Annotated[
        list[str] | None,
        typer.Option(help=f"Text that only the result is checked on. Repeatable. {TEXT_HELP}", show_default="code"),
    ] = None,
    length: Annotated[int, typer.Option("--length", "-n", min=16, help="Tokens of each text.")] = 4096,
    mix: Annotated[
        list[str] | None,
        typer.Option(help=f"{MIX_HELP} Each is tried with each budget.", show_default="clusters and windows"),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(min=1, help="num_neighbors to try. Repeatable.", show_default=", ".join(map(str, BUDGETS))),
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Sampled queries per head, layer and text.")] = 32,
    trials: Annotated[int, typer.Option(min=1, help="Most configurations to try in the model.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of the sources.")] = 0,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the folder, if it holds several.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    out: Annotated[
        Path,
        typer.Option(
            help=f"Folder for {CONFIG_NAME}, {NUMBERS_NAME} and {STATE_NAME}; made if missing.", file_okay=False
        ),
    ] = Path("ssa-tune"),
) -> None:
    """Search, for every layer of a model, the mix and budget that look at the fewest keys and are good enough.

    Whatever is measured is kept in a file, so that the same command goes on where it was interrupted. Nothing is
    downloaded. The result is a configuration for use_sparse_attention and SSAConfig.from_json.
    """
    wanted = parse_target(target)
    candidates = default_candidates(budget or BUDGETS)
    if mix:
        mixes = parse_mixes(mix)
        check_mixes(mixes)
        candidates = with_budgets(mixes, budget or BUDGETS)
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    with one_line_errors():
        out.mkdir(parents=True, exist_ok=True)
        with console.status("reading the model and the texts"):
            network, tokenizer = load_model(model, gguf_file=gguf_file)
            searched, checked = (
                {name: tokens_of(tokenizer, content, length) for name, content in map(pick_text, choices)}
                for choices in (text or ["reference"], held_out or ["code"])
            )
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("")

            def show(stage: str, done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, description=stage)

            tuning = tune_model(
                network,
                searched,
                wanted,
                candidates=candidates,
                held_out=checked,
                queries=queries,
                trials=trials,
                seed=seed,
                model_name=model.resolve().name,
                state=out / STATE_NAME,
                on_stage=show,
            )
            progress.update(task, completed=progress.tasks[0].total, description="")
        tuning.config.to_json(out / CONFIG_NAME)
        (out / NUMBERS_NAME).write_text(json.dumps(tuning.as_dict(), indent=1) + "\n", encoding="utf-8")
    _report(tuning, out, console)


def parse_target(text: str) -> Target:
    """``perplexity=1%`` or ``error=0.05``.

    Raises:
        typer.BadParameter: anything else.
    """
    match = re.fullmatch(r"\s*(perplexity|error)\s*=\s*([\d.]+)\s*(%?)\s*", text)
    try:
        if match is not None:
            return Target(_KINDS[match[1]], float(match[2]) / (100 if match[3] else 1))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--target") from error
    raise typer.BadParameter(f"expected perplexity=1% or error=0.05, got {text!r}", param_hint="--target")


def result_table(tuning: Tuning) -> TextTable:
    """The result, what it is compared with, and dense attention."""
    trials = (tuning.result, *tuning.references)
    searched, held_out = list(tuning.result.texts), list(tuning.result.held_out)
    rows = [
        (
            trial.name,
            f"{trial.cost:.0f}",
            f"{100 * trial.cost / tuning.allowed:.1f} %",
            f"{trial.output_error:.3f}",
            *(_change(trial.texts[name]) for name in searched),
            *(_change(trial.held_out[name]) for name in held_out),
            *([f"{trial.held_out_error:.3f}"] if trial.held_out_error is not None else []),
            _verdict(trial),
        )
        for trial in trials
    ]
    if tuning.target.kind == "output_error" and tuning.result.held_out_error is not None:
        rows = [row if len(row) == len(rows[0]) else (*row[:-1], "–", row[-1]) for row in rows]
        held_out = ["error, held out"]
    else:
        held_out = [f"{name}, held out" for name in held_out]
    return TextTable(
        title=f"{tuning.model}, {tuning.length} tokens",
        note="keys: scored or attended, and summaries, per query; mean over layers. of all: of those that dense "
        "attention looks at. error: output error in a layer that gets dense inputs. Texts: change of the perplexity "
        "against dense attention, plus or minus its standard error.",
        headers=("", "keys", "of all", "error", *searched, *held_out, "target"),
        rows=tuple(rows),
    )


def _change(change: Change) -> str:
    return f"{100 * change.change:+.2f} ± {100 * change.standard_error:.2f} %"


def _verdict(trial: Trial) -> str:
    return "met" if trial.meets else "missed"


def _report(tuning: Tuning, out: Path, console: Console) -> None:
    console.print(rich_table(result_table(tuning)))
    console.print()
    for name, layers in Counter(tuning.layers.values()).most_common():
        which = ", ".join(str(layer) for layer, chosen in tuning.layers.items() if chosen == name)
        console.print(f"• {name}: {layers} {'layer' if layers == 1 else 'layers'} ({which})", highlight=False)
    console.print(f"\n{tuning.seconds:.0f} s of measuring. The configuration, and the numbers:")
    console.print(f"  {out / CONFIG_NAME}\n  {out / NUMBERS_NAME}", style="bold cyan", soft_wrap=True)
