"""Tables of formatted cells, the same for the terminal and for a page, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

_NONE = "–"


@dataclass(frozen=True)
class TextTable:
    """A table of formatted cells; the first ``names`` columns are names, the others numbers."""

    title: str
    note: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1


def rich_table(table: TextTable) -> Table:
    """The table for a terminal."""
    shown = Table(
        title=table.title,
        caption=table.note,
        title_justify="left",
        caption_justify="left",
        title_style="bold not italic",
        caption_style="dim",
        box=None,
        padding=(0, 1),
    )
    for i, header in enumerate(table.headers):
        shown.add_column(header, justify="left" if i < table.names else "right", vertical="bottom", header_style="cyan")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s"


def mebibytes(count: int | None, unit: str = " MiB") -> str:
    return _NONE if count is None else f"{count / 2**20:.1f}{unit}"


def percent(share: float) -> str:
    return f"{share * 100:.1f} %" if share < 0.0995 else f"{share * 100:.0f} %"
