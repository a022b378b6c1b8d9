"""``ssa bench``: sparse against dense attention for any mixes, backends, sizes, dtypes and thread counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ssa_framework.cli.mixes import MIX_HELP, parse_mixes
from ssa_framework.config import SSAConfig
from ssa_framework.errors import SSAError
from ssa_framework.quality.bench import BenchCase, BenchRow, run_case, write_csv

CSV_NAME, PLOT_NAME = "bench.csv", "bench.png"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
_MARKERS = "osD^vPX*"
_NONE = "–"
_LABEL_GAP = 0.055  # between the labels of lines, in heights of the axes
_LABEL_LENGTH = 56
_VARYING = ("mix", "backend", "mode", "causal", "dtype", "threads")


class DtypeChoice(StrEnum):
    """What ``--dtype`` accepts."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class ModeChoice(StrEnum):
    """What ``--mode`` accepts."""

    forward = "forward"
    forward_backward = "forward+backward"
    both = "both"


def bench(
    length: Annotated[
        list[int] | None,
        typer.Option("--length", "-n", min=1, help="Queries and keys N. Repeatable.", show_default="1024, 2048, 4096"),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{MIX_HELP} A configuration also says what the options below leave out.",
            show_default="seed",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend of the attention. Repeatable.", show_default="auto")
    ] = None,
    dtype: Annotated[list[DtypeChoice] | None, typer.Option(help="Repeatable.", show_default="float32")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads. Repeatable.", show_default="1")] = None,
    causal: Annotated[
        bool | None, typer.Option("--causal/--no-causal", help="No key after its query.", show_default="no-causal")
    ] = None,
    both_causal: Annotated[bool, typer.Option("--both-causal", help="Causal and not, one after the other.")] = False,
    mode: Annotated[ModeChoice, typer.Option(help="With the gradients or without.")] = ModeChoice.forward,
    neighbors: Annotated[
        int | None, typer.Option(min=1, help="Budget K: neighbor slots per query.", show_default="128")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads H.", show_default="8")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key/value heads.", show_default="heads")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Head dim D.", show_default="64")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch B.")] = 1,
    dense_below: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Compute densely below so many keys; 'auto': wherever that is faster on this machine.",
            show_default="only where the graph would hold every key",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the data and of everything random.", show_default="0")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    min_time: Annotated[float, typer.Option(min=0.0, help="Seconds of readings per case.")] = 2.0,
    out: Annotated[
        Path, typer.Option(help=f"Folder for {CSV_NAME} and {PLOT_NAME}; made if missing.", file_okay=False)
    ] = Path("ssa-bench"),
) -> None:
    """Time sparse attention, routing included, against dense attention on Gaussian data.

    A case with a wrong result gets no speed. The status is 1 if there is one, or one that could not run.
    """
    axes = _Axes(
        mixes=parse_mixes(mix or ["seed"]),
        backends=backend,
        dtypes=[d.value for d in dtype or [DtypeChoice.float32]],
        threads=threads or [1],
        causal=[False, True] if both_causal else None if causal is None else [causal],
        modes=["forward", "forward+backward"] if mode is ModeChoice.both else [mode.value],
        lengths=length or [1024, 2048, 4096],
    )
    given: dict[str, Any] = {
        "num_neighbors": neighbors,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dense_below": _parse_dense_below(dense_below),
        "seed": seed,
    }
    cases = axes.cases(batch=batch, device=_parse_device(device), given=given)
    _check(cases)
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = run_cases(cases, out / CSV_NAME, min_time, Console())
        plot(rows, out / PLOT_NAME)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    _report(rows, out, Console())
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)


# -- what to run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """What is varied; every combination is a case. ``None``: what the configuration of the mix says."""

    mixes: Mapping[str, SSAConfig]
    backends: Sequence[str] | None
    dtypes: Sequence[str]
    threads: Sequence[int]
    causal: Sequence[bool] | None
    modes: Sequence[str]
    lengths: Sequence[int]

    def cases(self, batch: int, device: str, given: Mapping[str, Any]) -> list[BenchCase]:
        """``given`` takes the place of what a configuration says, unless it is ``None``."""
        return [
            BenchCase(
                mix=name,
                sources=config,
                backend=backend,
                length=length,
                dtype=dtype,
                threads=threads,
                causal=causal,
                mode=mode,
                batch=batch,
                device=device,
                **_merge(config, given),
            )
            for name, config in self.mixes.items()
            for backend, causal, dtype, threads, mode, length in itertools.product(
                self.backends or [config.backend],
                [config.causal] if self.causal is None else self.causal,
                self.dtypes,
                self.threads,
                self.modes,
                self.lengths,
            )
        ]


def _merge(config: SSAConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    configured = {
        "num_neighbors": config.num_neighbors,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "dense_below": config.dense_below,
        "seed": config.seed,
    }
    return {name: configured[name] if value is None else value for name, value in given.items()}


def _parse_dense_below(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdigit():
        return int(text)
    raise _bad("--dense-below", f"must be an integer >= 0 or 'auto', got {text!r}")


def _parse_device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise _bad("--device", f"{text!r}: {str(error).splitlines()[0]}") from error
    return text


def _check(cases: Sequence[BenchCase]) -> None:
    """Mistakes show before the first case runs."""
    for case in cases:
        try:
            case.check()
        except SSAError as error:
            raise typer.BadParameter(f"mix {case.mix!r}: {error}") from error


def _bad(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


# -- running ---------------------------------------------------------------------------------------------------------


def run_cases(cases: Sequence[BenchCase], csv_path: Path, min_seconds: float, console: Console) -> list[BenchRow]:
    """Every case in turn. The table is written after each, so that a run that is broken off leaves what it has.

    Raises:
        OSError: ``csv_path`` cannot be written.
    """
    rows: list[BenchRow] = []
    varying = _varying(cases)
    progress = Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        auto_refresh=False,  # nothing else may run while something is timed
    )
    with progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            name = _name(case, [*varying, "length"])

            def show(stage: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {stage}", refresh=True)

            rows.append(run_case(case, min_seconds=min_seconds, on_stage=show))
            write_csv(rows, csv_path)
            progress.console.print(_verdict(name, rows[-1]))
            progress.update(task, advance=1, description="", refresh=True)
    return rows


def _verdict(name: str, row: BenchRow) -> Text:
    if row.ratio is None:
        return Text.assemble(("✗ ", "bold red"), f"{name}: {row.status}")
    return Text.assemble(("✓ ", "bold green"), f"{name}: {row.ratio:.2f} × dense")


def _varying(cases: Sequence[BenchCase]) -> list[str]:
    return [name for name in _VARYING if len({getattr(case, name) for case in cases}) > 1]


def _name(case: BenchCase, fields: Sequence[str]) -> str:
    """What tells a case from the others, in a few words."""
    words: dict[str, Callable[[], str]] = {
        "causal": lambda: "causal" if case.causal else "non-causal",
        "threads": lambda: f"{case.threads} thread{'s' if case.threads > 1 else ''}",
        "length": lambda: f"N = {case.length}",
    }
    return ", ".join(words[f]() if f in words else str(getattr(case, f)) for f in fields) or case.mix


# -- results ---------------------------------------------------------------------------------------------------------


def _report(rows: Sequence[BenchRow], folder: Path, console: Console) -> None:
    console.print(_table(rows))
    for row in rows:
        if row.message:
            name = _name(row.case, [*_VARYING, "length"])
            console.print(Text.assemble((f"{row.status}: ", "bold red"), f"{name}: {row.message}"), soft_wrap=True)
    console.print(f"{folder / CSV_NAME}\n{folder / PLOT_NAME}", style="bold cyan", soft_wrap=True)


def _table(rows: Sequence[BenchRow]) -> Table:
    cases = [row.case for row in rows]
    varying = _varying(cases)
    first = cases[0]
    constant = _name(first, [name for name in _VARYING if name not in varying])
    sizes = f"B = {first.batch}, H = {first.heads}, D = {first.head_dim}, K = {first.num_neighbors}"
    table = Table(
        title="Sparse against dense attention",
        caption=f"{', '.join(part for part in (constant, sizes, first.device) if part)}. Medians in ms. sparse: "
        "routing and attention; graph: share of routing. ratio: dense / sparse, above 1 sparse is faster. MiB: peak "
        "memory beyond the inputs, dense / sparse. scored: keys per query.",
        title_justify="left",
        caption_justify="left",
        title_style="bold not italic",
        caption_style="dim",
        box=None,
        padding=(0, 1),
    )
    if varying:
        table.add_column("case", header_style="cyan")
    for name in ("N", "dense", "sparse", "ratio", "graph", "MiB", "scored", "recall", "check"):
        table.add_column(name, justify="right", header_style="cyan", no_wrap=True)
    for row in rows:
        case = [Text(_name(row.case, varying))] if varying else []
        table.add_row(*case, str(row.case.length), *_numbers(row))
    return table


def _numbers(row: BenchRow) -> list[str]:
    status = "ok" if row.status == "ok" else f"[bold red]{row.status}[/]"
    if row.ratio is None or row.dense is None or row.sparse is None or row.graph_share is None or row.quality is None:
        return [*[_NONE] * 7, status]
    return [
        _milliseconds(row.dense.median),
        _milliseconds(row.sparse.median),
        f"[bold]{row.ratio:.2f}[/]",
        "dense" if row.computed_densely else f"{row.graph_share:.0%}",
        f"{_mebibytes(row.dense_bytes)} / {_mebibytes(row.sparse_bytes)}",
        f"{row.keys_scored:.0f}",
        f"{row.quality.recall:.2f}",
        status,
    ]


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _mebibytes(count: int | None) -> str:
    if count is None:
        return _NONE
    value = count / 2**20
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def plot(rows: Sequence[BenchRow], path: Path) -> None:
    """Dense time / sparse time over length; one panel for each causality, dtype and number of threads.

    One line for each mix, backend and mode, with its label at its end; bars lead from the ratio of the unfavourable
    quartiles to that of the favourable ones.

    Raises:
        OSError: the file cannot be written.
    """
    timed = [row for row in rows if row.ratio is not None]
    varying = _varying([row.case for row in rows])
    panel_fields = [name for name in ("causal", "dtype", "threads") if name in varying]
    line_fields = [name for name in ("mix", "backend", "mode") if name in varying]
    panels: dict[str, list[BenchRow]] = {}
    for row in timed:
        panels.setdefault(_name(row.case, panel_fields) if panel_fields else "", []).append(row)
    across = min(2, max(1, len(panels)))
    down = -(-max(1, len(panels)) // across)
    figure = Figure(figsize=(7.5 * across, 4.5 * down), layout="constrained", facecolor="white")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    colors = {line: i for i, line in enumerate(dict.fromkeys((r.case.mix, r.case.backend) for r in rows))}
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    ends = []
    for axes, (title, members) in zip(grid, panels.items(), strict=False):
        axes.set_title(title, fontsize="medium")
        ends.append((axes, _draw_panel(axes, members, line_fields, colors)))
    for axes, labels in ends:  # when all panels are drawn: they share their limits
        _label_ends(axes, labels)
    if not timed:
        figure.text(0.5, 0.5, "no case passed its check", ha="center")
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class _End:
    """Where a line ends, and what it is called."""

    ratio: float
    label: str
    color: str


def _draw_panel(
    axes: Axes, rows: Sequence[BenchRow], line_fields: Sequence[str], colors: Mapping[tuple[str, str], int]
) -> list[_End]:
    lines: dict[tuple[str, str, str], list[BenchRow]] = {}
    for row in rows:
        lines.setdefault((row.case.mix, row.case.backend, row.case.mode), []).append(row)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axhline(1.0, color="0.35", linewidth=1, linestyle=":")
    axes.text(0.01, 1.0, "dense", transform=axes.get_yaxis_transform(), va="bottom", color="0.35", size="small")
    ends: list[_End] = []
    for (mix, backend, mode), members in lines.items():
        number = colors[mix, backend]
        color = _COLORS[number % len(_COLORS)]
        members = sorted(members, key=lambda row: row.case.length)
        ratios = [row.ratio or 0.0 for row in members]
        bars = [_spread(row) for row in members]
        axes.errorbar(
            [row.case.length for row in members],
            ratios,
            yerr=([r - low for r, (low, _) in zip(ratios, bars, strict=True)], [
                high - r for r, (_, high) in zip(ratios, bars, strict=True)
            ]),
            color=color,
            linestyle="-" if mode == "forward" else "--",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            capsize=2,
            elinewidth=0.8,
        )  # fmt: skip
        ends.append(_End(ratios[-1], _name(members[0].case, line_fields or ["mix"]), color))
    lengths = sorted({row.case.length for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("length N")
    axes.set_ylabel("dense time / sparse time")
    axes.grid(True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return ends


def _spread(row: BenchRow) -> tuple[float, float]:
    assert row.dense is not None
    assert row.sparse is not None
    (dense_low, dense_high), (sparse_low, sparse_high) = row.dense.quartiles, row.sparse.quartiles
    return dense_low / sparse_high, dense_high / sparse_low


def _label_ends(axes: Axes, ends: Sequence[_End]) -> None:
    """Labels right of the axes at the height of their lines' ends, moved apart where they would overlap."""
    to_height = axes.transData + axes.transAxes.inverted()
    axes.set_ylim(axes.get_ylim())  # final
    placed: list[tuple[float, _End]] = []
    for end in sorted(ends, key=lambda end: end.ratio):
        height = float(to_height.transform((1.0, end.ratio))[1])
        placed.append((max(height, placed[-1][0] + _LABEL_GAP) if placed else height, end))
    above = max(0.0, placed[-1][0] - 1.0)
    for height, end in placed:
        label = end.label if len(end.label) <= _LABEL_LENGTH else end.label[: _LABEL_LENGTH - 1] + "…"
        axes.text(1.02, height - above / 2, label, transform=axes.transAxes, color=end.color, va="center", size="small")
