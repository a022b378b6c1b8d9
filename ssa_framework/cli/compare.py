"""``ssa compare``: source mixes side by side, quality against cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssa_framework.cli import compare_page
from ssa_framework.cli.errors import one_line_errors
from ssa_framework.cli.inputs import LAYERS_HELP, TEXT_HELP, check_mixes, parse_layers, pick_text
from ssa_framework.cli.mixes import MIX_HELP, parse_mixes
from ssa_framework.cli.tables import rich_table
from ssa_framework.laboratory.capture import (
    LayerTensors,
    capture_layers,
    choose_layers,
    load_layers,
    save_layer,
    synthetic_layer,
)
from ssa_framework.laboratory.compare import Comparison, stages
from ssa_framework.laboratory.compare import compare as compare_mixes
from ssa_framework.laboratory.models import load_model, tokens_of

NUMBERS_NAME, TABLE_NAME, PAGE_NAME = "compare.json", "compare.csv", "index.html"
DEFAULT_MIXES = ["fast", "balanced", "quality", "lsh-cross-polytope", "lsh-thorough", "window"]
SYNTHETIC = ("gaussian", "clustered")
_LAYERS = 6
"""Of a model, if nobody says which: spread from the first to the last."""


def compare(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of a causal language model of transformers; or folder of captured layers (*.pt, "
            f"*.safetensors); or {' or '.join(SYNTHETIC)} for numbers that no model made."
        ),
    ],
    mix: Annotated[list[str] | None, typer.Option(help=MIX_HELP, show_default=", ".join(DEFAULT_MIXES))] = None,
    text: Annotated[str, typer.Option(help=f"For a model. {TEXT_HELP}")] = "reference",
    length: Annotated[
        int, typer.Option("--length", "-n", min=2, help="Tokens, for a model and for made-up numbers.")
    ] = 8192,
    layers: Annotated[
        str | None, typer.Option(help=LAYERS_HELP, show_default=f"{_LAYERS} of a model, all of a folder")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads, for made-up numbers.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key/value heads, for made-up numbers.", show_default="heads")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Head dim, for made-up numbers.")] = 64,
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="For made-up numbers.")] = True,
    queries: Annotated[int, typer.Option(min=1, help="Sampled queries per head, for the quality.")] = 256,
    first_query: Annotated[
        int, typer.Option(min=0, help="Sample only queries from this position on; early ones have few keys.")
    ] = 0,
    recall_at: Annotated[int, typer.Option(min=1, help="k of the recall.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of made-up numbers.")] = 0,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Take times, too.")] = True,
    min_time: Annotated[float, typer.Option(min=0.0, help="Seconds of readings per mix.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder to keep the captured layers in, to compare on again.", file_okay=False)
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the folder, if it holds several.")] = None,
    out: Annotated[
        Path,
        typer.Option(
            help=f"Folder for {TABLE_NAME}, {NUMBERS_NAME} and {PAGE_NAME}; made if missing.", file_okay=False
        ),
    ] = Path("ssa-compare"),
) -> None:
    """Compare source mixes on the same queries, keys and values: quality against keys looked at and time.

    Dense attention and the exact best keys are the yardsticks. Nothing is downloaded.
    """
    mixes = parse_mixes(mix or DEFAULT_MIXES)
    chosen = parse_layers(layers)
    check_mixes(mixes)
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    with one_line_errors():
        out.mkdir(parents=True, exist_ok=True)
        if data in SYNTHETIC:
            described = f"{data} data"
            captured = [
                synthetic_layer(
                    data, length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, causal=causal, seed=seed
                )
            ]
        else:
            with console.status("reading queries, keys and values"):
                captured, described = _read(Path(data), chosen, text, length, gguf_file)
        if save is not None:
            for layer in captured:
                save_layer(layer, save)
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        # auto_refresh off: nothing else may run while something is timed
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            task = progress.add_task("", total=stages(len(captured), len(mixes), timed=time))
            progress.refresh()
            begun = itertools.count()

            def show(stage: str) -> None:
                progress.update(task, completed=next(begun), description=stage, refresh=True)

            comparison = compare_mixes(
                captured,
                mixes,
                queries=queries,
                first_query=first_query,
                recall_at=recall_at,
                seed=seed,
                timed=time,
                seconds=min_time,
                data=described,
                on_stage=show,
            )
            progress.update(task, completed=progress.tasks[0].total, description="", refresh=True)
        comparison.write_json(out / NUMBERS_NAME)
        comparison.write_csv(out / TABLE_NAME)
        page = compare_page.render(comparison, NUMBERS_NAME, TABLE_NAME)
        (out / PAGE_NAME).write_text(page, encoding="utf-8")
    _report(comparison, out, console)
    if not comparison.complete:
        raise typer.Exit(130)


def _read(
    folder: Path, layers: Sequence[int] | None, text: str, length: int, gguf_file: str | None
) -> tuple[list[LayerTensors], str]:
    """The layers of a model that reads a text, or those in a folder; and what they are."""
    is_model = gguf_file is not None or (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
    if folder.is_dir() and not is_model:
        return list(load_layers(folder, layers)), f"the layers in {folder.name}"
    model, tokenizer = load_model(folder, gguf_file=gguf_file)
    wanted = choose_layers(model, layers)
    if layers is None:
        wanted = tuple(sorted({wanted[i * (len(wanted) - 1) // max(1, _LAYERS - 1)] for i in range(_LAYERS)}))
    name, content = pick_text(text)
    captured: list[LayerTensors] = []
    capture_layers(model, tokens_of(tokenizer, content, length), captured.append, layers=wanted)
    return captured, f"{folder.resolve().name} reading “{name}”"


def _report(comparison: Comparison, out: Path, console: Console) -> None:
    if not comparison.complete:
        console.print("[bold yellow]interrupted[/] while timing")
    timed = [compare_page.time_table(comparison)] if any(mix.times for mix in comparison.mixes) else []
    for table in (compare_page.mix_table(comparison), *timed, compare_page.exact_table(comparison)):
        console.print(rich_table(table))
        console.print()
    for sentence in compare_page.findings(comparison):
        console.print(f"• {sentence}", highlight=False)
    console.print(f"\n{comparison.seconds:.0f} s. The page, the table and the numbers:")
    console.print(
        f"  {out / PAGE_NAME}\n  {out / TABLE_NAME}\n  {out / NUMBERS_NAME}", style="bold cyan", soft_wrap=True
    )
