"""``ssa sources``: what is registered, where it comes from, and what was not loaded."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssa_framework.registry import RegisteredSource, SourceRegistry


def describe(registry: SourceRegistry) -> dict[str, Any]:
    """Every source and every plugin that was not loaded, as JSON values."""
    return {
        "sources": [_describe_source(source) for source in registry.sources.values()],
        "not_loaded": [
            {"entry_point": p.entry_point, "distribution": p.distribution, "reason": p.reason}
            for p in registry.unloaded
        ],
    }


def _describe_source(source: RegisteredSource) -> dict[str, Any]:
    options = source.source_class.option_defaults()
    return {
        "name": source.name,
        "distribution": source.distribution,
        "version": _version(source.distribution),
        "plugin": source.plugin,
        "class": f"{source.source_class.__module__}.{source.source_class.__qualname__}",
        "options": {name: _describe_option(default) for name, default in options.items()},
        "summary": _summary(source.source_class),
    }


def _version(distribution: str | None) -> str | None:
    try:
        return None if distribution is None else version(distribution)
    except PackageNotFoundError:
        return None


def _describe_option(default: Any) -> dict[str, Any]:
    if default is inspect.Parameter.empty:
        return {"required": True}
    try:
        json.dumps(default)
    except (TypeError, ValueError):
        return {"required": False, "default": repr(default)}
    return {"required": False, "default": default}


def _summary(source_class: type) -> str:
    """The first line of the class's own docstring, without its markup."""
    doc = source_class.__doc__
    return inspect.cleandoc(doc).splitlines()[0].replace("`", "") if doc and doc.strip() else ""


def show(description: dict[str, Any], console: Console) -> None:
    """Print what `describe` returns as tables."""
    table = Table(title="Registered sources", title_justify="left", show_lines=True)
    table.add_column("source", style="bold cyan", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("options and their defaults")
    table.add_column("what it proposes")
    for source in description["sources"]:
        origin = " ".join(part for part in (source["distribution"], source["version"]) if part)
        options = ", ".join(_option_text(name, option) for name, option in source["options"].items())
        table.add_row(source["name"], origin or "registered in code", Text(options or "none"), Text(source["summary"]))
    console.print(table)
    if description["not_loaded"]:
        table = Table(title="Not loaded", title_justify="left", show_lines=True)
        table.add_column("entry point", style="bold yellow", no_wrap=True)
        table.add_column("from", no_wrap=True)
        table.add_column("reason")
        for plugin in description["not_loaded"]:
            table.add_row(plugin["entry_point"], plugin["distribution"], Text(plugin["reason"]))
        console.print(table)


def _option_text(name: str, option: dict[str, Any]) -> str:
    return f"{name} (required)" if option["required"] else f"{name} = {option['default']!r}"
