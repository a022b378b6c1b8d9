"""The ``ssa`` command."""
