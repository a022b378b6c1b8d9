"""``python -m ssa_framework``: the same as ``ssa``."""

from ssa_framework.cli.main import app

app(prog_name="ssa")
