"""Whether indices lie where they must, asked without waiting for the device."""

from ssa_framework.ops.index_bounds.api import any_outside

__all__ = ["any_outside"]
