"""Runs the demo in the terminal, from the text to the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import log
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text as RichText

from ssa_framework.cli.demo.bench import LengthResult, measure_length
from ssa_framework.cli.demo.page import NUMBERS_NAME, Outcome, write
from ssa_framework.cli.demo.passage import read_passage
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.tables import cost_table, quality_table, slots_table, training_table
from ssa_framework.cli.demo.text import Text, load_text
from ssa_framework.cli.demo.train import ByteModel, Run, make_twins, train
from ssa_framework.cli.tables import rich_table, seconds

_LEVELS = "█▇▆▅▄▃▂▁"


def run_demo(settings: Settings, folder: Path, console: Console) -> Outcome:
    """Train, measure, write; everything is shown on ``console`` as it happens.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    text = load_text()
    _introduce(settings, text, console)
    # Steps of a model this small gain little from a second thread, and stall where other programs want the cores.
    with _threads(1):
        sparse, dense = _train(settings, text, console)
    with _threads(settings.threads):
        results = _measure(sparse.model, text, settings, console)
        with console.status("drawing the graph of a passage and writing the page"):
            passage = read_passage(sparse.model, text, settings)
            outcome = Outcome(settings, text, sparse, dense, results, passage, time.perf_counter() - begin)
            page = write(outcome, folder)
    _conclude(outcome, page, console)
    return outcome


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _introduce(settings: Settings, text: Text, console: Console) -> None:
    mix = " + ".join(settings.attention_config(dense=False).source_mix)
    console.print(
        Panel(
            f"[bold]Sparse attention on real text[/]\n"
            f"Sources [cyan]{mix}[/] propose keys; each query attends to at most {settings.num_neighbors} of them.\n"
            f"Text: Python's own help topics, {len(text.train):,} bytes to train on, {len(text.validation):,} held "
            f"out.",
            title="ssa demo",
            border_style="cyan",
            width=min(console.width, 100),
        )
    )


def _train(settings: Settings, text: Text, console: Console) -> tuple[Run, Run]:
    console.print(f"\n[bold]1. Training[/] a byte model twice, {settings.steps} steps of the same batches")
    runs = make_twins(settings)
    columns = (
        TextColumn("  {task.description:6}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {
            run.name: progress.add_task(run.name, total=settings.steps, state="") for run in runs
        }
        train(
            runs,
            text.train,
            text.validation,
            settings,
            on_step=lambda run: progress.update(tasks[run.name], advance=1, state=_state(run)),
        )
    console.print(rich_table(training_table(runs, settings)))
    return runs


def _state(run: Run) -> str:
    recent = run.train_loss[-10:]
    return (
        f"[magenta]{_sparkline(run.train_loss)}[/] {sum(recent) / len(recent) / log(2):.2f} bits/byte, "
        f"{seconds(run.seconds_per_step)}/step"
    )


def _sparkline(losses: list[float], width: int = 12) -> str:
    """The loss so far, from the first step to the last, high to low."""
    count = min(width, len(losses))
    edges = [i * len(losses) // count for i in range(count + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((high - m) * scale)] for m in means).ljust(width)


def _measure(model: ByteModel, text: Text, settings: Settings, console: Console) -> list[LengthResult]:
    lengths = [n for n in settings.lengths if n <= len(text.validation)]
    console.print(
        f"\n[bold]2. Measuring[/] dense against sparse, on q, k, v of the trained model, N up to {lengths[-1]}"
    )
    results: list[LengthResult] = []
    progress = Progress(
        TextColumn("  N = {task.fields[length]}: {task.description:9}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        console=console,
        auto_refresh=False,  # nothing else may run while something is timed
    )
    task = progress.add_task("", total=4 * len(lengths), length=lengths[0])
    with Live(console=console, auto_refresh=False) as live:
        for number, length in enumerate(lengths):

            def show(stage: str, length: int = length) -> None:
                progress.update(task, description=stage, length=length)
                live.update(Group(rich_table(cost_table(results)), progress), refresh=True)
                progress.advance(task)

            results.append(measure_length(model, text.validation[:length], settings, show))
            progress.update(task, completed=4 * (number + 1))
        live.update(rich_table(cost_table(results)), refresh=True)
    for table in (quality_table(results, settings), slots_table(results, settings)):
        console.print()
        console.print(rich_table(table))
    return results


def _conclude(outcome: Outcome, page: Path, console: Console) -> None:
    console.print("\n[bold]3. What the numbers say[/]")
    bullets = Table.grid(padding=(0, 1))
    for sentence in outcome.findings:
        bullets.add_row("  •", RichText(sentence))
    console.print(bullets)
    console.print(f"\n{outcome.seconds:.0f} s in all. The page, with figures and the graph of a passage:")
    console.print(f"  [bold cyan]{page}[/]", soft_wrap=True)
    console.print(f"  [dim]{page.with_name(NUMBERS_NAME)} holds the numbers[/]", soft_wrap=True)
