"""`time_alternating`: compare the time of several functions so that drift of the machine hits all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.benchmark.utils.common import set_torch_threads
from torch.utils.benchmark.utils.timer import timer  # waits for CUDA where there is one

from ssa_framework.errors import ConfigError

_SHORTEST_BLOCK_SECONDS = 0.005
"""Faster functions are called several times per reading."""


@dataclass(frozen=True)
class Timing:
    """``readings``: seconds per call, one for each round."""

    readings: tuple[float, ...]

    @property
    def median(self) -> float:
        return self._quantile(0.5)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper."""
        return self._quantile(0.25), self._quantile(0.75)

    def __add__(self, other: Timing) -> Timing:
        """Of two contestants of the same rounds that are steps of one computation: their sum, round by round."""
        return Timing(tuple(a + b for a, b in zip(self.readings, other.readings, strict=True)))

    def to_dict(self) -> dict[str, float]:
        lower, upper = self.quartiles
        return {
            "median_s": self.median,
            "lower_quartile_s": lower,
            "upper_quartile_s": upper,
            "rounds": len(self.readings),
        }

    def _quantile(self, share: float) -> float:
        return float(np.quantile(self.readings, share))


def time_alternating(
    contestants: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    min_rounds: int = 3,
    max_rounds: int = 50,
    threads: int | None = None,
    on_call: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time each contestant in turn, round after round: a, b, a, b, ...

    Args:
        contestants: functions without arguments, by name. Each is called before the first round.
        seconds: rounds go on until all of them together took this long, ...
        min_rounds, max_rounds: ... but at least and at most so many.
        threads: torch's intra-op threads during the measurement; unchanged if left out.
        on_call: told the name of a contestant after each of its readings.

    Raises:
        ConfigError: nothing to time, or a number of rounds or threads below 1.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if not contestants or min_rounds < 1 or max_rounds < min_rounds or threads < 1:
        raise ConfigError(
            f"time_alternating needs a contestant, 1 <= min_rounds <= max_rounds and threads >= 1; got "
            f"{len(contestants)} contestants, min_rounds={min_rounds}, max_rounds={max_rounds}, threads={threads}"
        )
    readings: dict[str, list[float]] = {name: [] for name in contestants}
    with set_torch_threads(threads):
        calls = {}
        for name, fn in contestants.items():
            warm_up = _seconds(fn, 1)
            again = _seconds(fn, 1) if warm_up < _SHORTEST_BLOCK_SECONDS else warm_up
            calls[name] = max(1, int(_SHORTEST_BLOCK_SECONDS / max(again, 1e-9)))
        start = timer()
        for done in range(max_rounds):
            if done >= min_rounds and timer() - start >= seconds:
                break
            for name, fn in contestants.items():
                readings[name].append(_seconds(fn, calls[name]))
                if on_call is not None:
                    on_call(name)
    return {name: Timing(tuple(times)) for name, times in readings.items()}


def _seconds(fn: Callable[[], object], calls: int) -> float:
    start = timer()
    for _ in range(calls):
        fn()
    return (timer() - start) / calls
