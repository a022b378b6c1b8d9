"""``ssa inspect``: what source mixes do to the layers of a model, head by head and source by source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssa_framework.cli import inspect_page
from ssa_framework.cli.errors import one_line_errors
from ssa_framework.cli.inputs import LAYERS_HELP, TEXT_HELP, check_mixes, parse_layers, pick_text
from ssa_framework.cli.inspect_tables import findings, mix_table, source_table
from ssa_framework.cli.mixes import MIX_HELP, parse_mixes
from ssa_framework.cli.tables import rich_table
from ssa_framework.laboratory.capture import choose_layers
from ssa_framework.laboratory.inspect import Inspection, inspect_model
from ssa_framework.laboratory.models import load_model, tokens_of

NUMBERS_NAME, PAGE_NAME = "inspect.json", "index.html"
DEFAULT_MIXES = ["balanced", "lsh-thorough"]


def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model of transformers.")],
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = "reference",
    length: Annotated[int, typer.Option("--length", "-n", min=2, help="Tokens of the text.")] = 8192,
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP, show_default="all")] = None,
    mix: Annotated[list[str] | None, typer.Option(help=MIX_HELP, show_default=", ".join(DEFAULT_MIXES))] = None,
    queries: Annotated[int, typer.Option(min=1, help="Sampled queries per head.")] = 128,
    first_query: Annotated[
        int, typer.Option(min=0, help="Sample only queries from this position on; early ones have few keys.")
    ] = 0,
    recall_at: Annotated[int, typer.Option(min=1, help="k of the recall.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the folder, if it holds several.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    out: Annotated[
        Path, typer.Option(help=f"Folder for {NUMBERS_NAME} and {PAGE_NAME}; made if missing.", file_okay=False)
    ] = Path("ssa-inspect"),
) -> None:
    """Show what source mixes find in every layer and head of a model.

    The model reads the text densely; each layer's queries, keys and values are handed to every mix, which routes a
    sample of the queries. Nothing is downloaded. Numbers are written after each layer, so Ctrl-C loses none.
    """
    mixes = parse_mixes(mix or DEFAULT_MIXES)
    chosen = parse_layers(layers)
    check_mixes(mixes)
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    with one_line_errors():
        out.mkdir(parents=True, exist_ok=True)
        name, content = pick_text(text)
        with console.status("reading the model and the text"):
            network, tokenizer = load_model(model, gguf_file=gguf_file)
            wanted = choose_layers(network, chosen)
            tokens = tokens_of(tokenizer, content, length)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("layers"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(
                f"{length} tokens, {len(mixes)} mix{'es' if len(mixes) > 1 else ''}", total=len(wanted)
            )

            def layer_done(so_far: Inspection) -> None:
                so_far.write_json(out / NUMBERS_NAME)
                progress.advance(task)

            inspection = inspect_model(
                network,
                tokens,
                mixes,
                layers=wanted,
                queries=queries,
                first_query=first_query,
                recall_at=recall_at,
                seed=seed,
                model_name=model.resolve().name,
                text_name=name,
                on_layer=layer_done,
            )
        if inspection.layers:
            inspection.write_json(out / NUMBERS_NAME)
            (out / PAGE_NAME).write_text(inspect_page.render(inspection, NUMBERS_NAME), encoding="utf-8")
    _report(inspection, out, console)
    if not inspection.complete:
        raise typer.Exit(130)


def _report(inspection: Inspection, out: Path, console: Console) -> None:
    done, wanted = len(inspection.layers), len(inspection.wanted)
    if not inspection.complete:
        console.print(f"[bold yellow]interrupted[/] after {done} of {wanted} layers")
    if not done:
        return
    for table in (mix_table(inspection), source_table(inspection)):
        console.print(rich_table(table))
        console.print()
    for sentence in findings(inspection):
        console.print(f"• {sentence}", highlight=False)
    console.print(f"\n{inspection.seconds:.0f} s. The page, with every layer and head, and the numbers:")
    console.print(f"  {out / PAGE_NAME}\n  {out / NUMBERS_NAME}", style="bold cyan", soft_wrap=True)
