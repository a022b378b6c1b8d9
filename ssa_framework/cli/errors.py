"""How commands tell what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from ssa_framework.errors import SSAError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can do something about is one line on stderr, not a traceback."""
    try:
        yield
    except (SSAError, OSError) as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(1) from error
