"""`SubquadraticRegimeTracker`: do the calls of a program stay where sparse attention is subquadratic?"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from ssa_framework.errors import ConfigError


class Regime(NamedTuple):
    """The sizes of one call: N queries, K neighbor slots, R hash rounds, C candidates per round."""

    N: int
    K: int
    R: int
    C: int


class SubquadraticRegimeTracker:
    """Records the sizes of calls, and tells whether the budgets grew with the length.

    Attention over a graph costs O(N·K) and finding the graph O(N·R·C), which is subquadratic in N only as long as K,
    R and C do not depend on N. Nothing enforces that; this checks it.

    Attributes:
        history: what was recorded, oldest first.
    """

    def __init__(self) -> None:
        self.history: list[Regime] = []

    def record(self, N: int, K: int, R: int, C: int) -> None:
        """Add one call.

        Raises:
            ConfigError: a size that is no integer >= 0.
        """
        call = Regime(N, K, R, C)
        for name, size in call._asdict().items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ConfigError(f"{name} must be an integer >= 0, got {size!r}")
        self.history.append(call)

    def check(self, warn: bool = True) -> bool:
        """Whether K, R and C were the same in all recorded calls; if not, warn with the ranges seen."""
        ranges = {}
        for name in ("K", "R", "C"):
            sizes = [getattr(call, name) for call in self.history]
            if len(set(sizes)) > 1:
                ranges[name] = f"{name} from {min(sizes)} to {max(sizes)}"
        if ranges and warn:
            lengths = [call.N for call in self.history]
            warnings.warn(
                f"{', '.join(ranges.values())} for N from {min(lengths)} to {max(lengths)}: the cost is subquadratic "
                f"in N only if K, R and C do not grow with it",
                UserWarning,
                stacklevel=2,
            )
        return not ranges
