"""``ssa eval``: does a language model still answer right under a source mix, and what does it cost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssa_framework.cli import evaluate_page
from ssa_framework.cli.errors import one_line_errors
from ssa_framework.cli.inputs import TEXT_HELP, check_mixes, parse_layers, pick_text
from ssa_framework.cli.mixes import MIX_HELP, parse_mixes
from ssa_framework.cli.tables import rich_table
from ssa_framework.laboratory.evaluate import DENSE, Evaluation, Plan
from ssa_framework.laboratory.evaluate import evaluate as evaluate_model
from ssa_framework.laboratory.models import default_texts, load_model

NUMBERS_NAME, PAGE_NAME = "eval.json", "index.html"
DEFAULT_MIXES = ["balanced"]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model of transformers.", file_okay=False)],
    mix: Annotated[list[str] | None, typer.Option(help=MIX_HELP, show_default=", ".join(DEFAULT_MIXES))] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable. {TEXT_HELP} Passkeys hide in the first.", show_default="all of these"),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option("--length", "-n", min=2, help="Context in tokens. Repeatable.", show_default="2048, 4096"),
    ] = None,
    depths: Annotated[int, typer.Option(min=0, help="Places that a passkey is hidden at; 0 for no passkeys.")] = 8,
    dense_layers: Annotated[str, typer.Option(help="Layers that stay dense, such as 0,1,-1; or none.")] = "0",
    rounds: Annotated[int, typer.Option(min=0, help="Times that each prefill is timed; 0 for no times.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated tokens that are timed, per round.")] = 16,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory, too.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the numbers to be found.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the folder, if it holds several.")] = None,
    out: Annotated[
        Path, typer.Option(help=f"Folder for {NUMBERS_NAME} and {PAGE_NAME}; made if missing.", file_okay=False)
    ] = Path("ssa-eval"),
) -> None:
    """Evaluate a language model under source mixes, beside its own dense attention.

    Perplexity, passkeys read at once and token by token, time and peak memory of a prefill and of each generated token.
    Nothing is downloaded.
    """
    mixes = parse_mixes(mix or DEFAULT_MIXES)
    check_mixes(mixes)
    if DENSE in mixes:
        raise typer.BadParameter(f"{DENSE!r} is measured anyway; name this mix otherwise", param_hint="--mix")
    dense = [] if dense_layers == "none" else parse_layers(dense_layers, "--dense-layers") or []
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    with one_line_errors():
        plan = Plan(
            lengths=tuple(length or Plan.lengths),
            depths=depths,
            seed=seed,
            rounds=rounds,
            new_tokens=new_tokens,
            memory=memory,
        )
        out.mkdir(parents=True, exist_ok=True)
        texts = dict(map(pick_text, dict.fromkeys(text or default_texts())))
        with console.status("reading the model"):
            loaded, tokenizer = load_model(model, gguf_file=gguf_file, dtype=getattr(torch, dtype))
            loaded = loaded.to(_device(device))
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
            task = progress.add_task("", total=plan.stages(len(texts), mixes))
            progress.refresh()
            begun = itertools.count()

            def show(stage: str) -> None:
                progress.update(task, completed=next(begun), description=stage, refresh=True)

            evaluation = evaluate_model(
                loaded,
                tokenizer,
                mixes,
                texts,
                plan=plan,
                dense_layers=dense,
                name=model.resolve().name,
                on_stage=show,
            )
            progress.update(task, completed=progress.tasks[0].total, description="", refresh=True)
        evaluation.write_json(out / NUMBERS_NAME)
        (out / PAGE_NAME).write_text(evaluate_page.render(evaluation, NUMBERS_NAME), encoding="utf-8")
    _report(evaluation, out, console)
    if not evaluation.complete:
        raise typer.Exit(130)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"{name!r} is no device of torch", param_hint="--device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here", param_hint="--device")
    return device


def _report(evaluation: Evaluation, out: Path, console: Console) -> None:
    if not evaluation.complete:
        console.print("[bold yellow]interrupted[/]; what was found before:")
    for table in evaluate_page.tables(evaluation).values():
        console.print(rich_table(table))
        console.print()
    for sentence in evaluate_page.findings(evaluation):
        console.print(f"• {sentence}", highlight=False)
    console.print(f"\n{evaluation.seconds:.0f} s. The page and the numbers:")
    console.print(f"  {out / PAGE_NAME}\n  {out / NUMBERS_NAME}", style="bold cyan", soft_wrap=True)
