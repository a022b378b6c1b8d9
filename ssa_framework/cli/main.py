"""The ``ssa`` command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import ssa_framework
from ssa_framework.cli import sources as sources_command
from ssa_framework.cli.bench import bench
from ssa_framework.cli.compare import compare
from ssa_framework.cli.demo.run import run_demo
from ssa_framework.cli.demo.settings import LENGTHS, Settings
from ssa_framework.cli.errors import one_line_errors
from ssa_framework.cli.evaluate import evaluate
from ssa_framework.cli.inspect import inspect
from ssa_framework.cli.tune import tune
from ssa_framework.registry import SourceRegistry

QUICK = Settings(
    steps=20,
    context=128,
    validation_windows=8,
    validations=2,
    lengths=(256, 512),
    seconds_per_length=0.3,
    passage=256,
)
"""For a first look and for tests: too short to learn much."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="Sparse attention by graph routing: neighbor sources propose keys, the router builds one neighbor graph, the "
    "engine attends to that graph only.\n\nStart with [bold]ssa demo[/].",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"ssa-framework {ssa_framework.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    help="Train on real text, sparse and dense; compare time, memory and quality; write one page.\n\n"
    "Takes about two minutes on two CPU cores and downloads nothing: the text is Python's own documentation. Numbers "
    "are what was measured on this machine; everything but times and memory follows from the seed."
)
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the page and the numbers; made if missing.", file_okay=False)
    ] = Path("ssa-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A first look in seconds: few steps, short texts.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default=str(Settings.steps))] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=QUICK.lengths[0],
            max=LENGTHS[-1],
            help="Longest N to measure; N doubles up to it.",
            show_default=str(LENGTHS[-1]),
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the measurement.", show_default="torch's choice")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
) -> None:
    settings = replace(QUICK if quick else Settings(), threads=threads or torch.get_num_threads(), seed=seed)
    if steps is not None:
        settings = replace(settings, steps=steps)
    if max_length is not None:
        settings = replace(settings, lengths=_doubling(settings.lengths[0], max_length))
    with one_line_errors():
        run_demo(settings, out, Console())


def _doubling(first: int, last: int) -> tuple[int, ...]:
    lengths = [min(first, last)]
    while 2 * lengths[-1] <= last:
        lengths.append(2 * lengths[-1])
    return tuple(lengths)


@app.command()
def sources(
    plugins: Annotated[
        str | None,
        typer.Option(
            help="Distributions whose plugins may be loaded besides the built-in ones, separated by commas; empty for "
            "none. Loading a plugin runs its code.",
            show_default="SSA_PLUGINS, or all",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List every registered source with its origin and options, and what was not loaded."""
    with one_line_errors():
        registry = SourceRegistry(None if plugins is None else plugins.split(","))
        description = sources_command.describe(registry)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        sources_command.show(description, Console())


app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("compare")(compare)
app.command("eval")(evaluate)
app.command("tune")(tune)
