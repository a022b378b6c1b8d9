"""What a search chooses from, and what its result is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssa_framework.config import SSAConfig
from ssa_framework.presets import LEADING_TOKENS, PRESETS

DENSE = "dense"
"""What the candidate is called that attends everything."""

BUDGETS = (16, 48, 96, 160, 256, 384)
_LEVELS = (
    [[256, 8], [2048, 8], [8192, 64]],
    [[256, 8], [2048, 32], [8192, 64]],
    [[128, 8], [1024, 32], [8192, 64]],
    [[64, 8], [256, 16], [1024, 32], [4096, 64]],
)


def default_candidates(budgets: Sequence[int] = BUDGETS) -> dict[str, SSAConfig]:
    """Clusters with several sizes of segments, each with every budget, and windows."""
    leading: dict[str, dict[str, Any]] = {"global": {"tokens": LEADING_TOKENS}}
    mixes = {
        "clusters " + ", ".join(f"{segment}/{cluster}" for segment, cluster in levels): SSAConfig(
            sources={**leading, "clusters": {"levels": levels}}
        )
        for levels in _LEVELS
    }
    windows = {
        f"window of {size}": SSAConfig(
            num_neighbors=size + 1 + LEADING_TOKENS, sources={**leading, "self": {}, "window": {"size": size}}
        )
        for size in (64, 256)
    }
    return windows | with_budgets(mixes, budgets)


def with_budgets(mixes: Mapping[str, SSAConfig], budgets: Sequence[int] = BUDGETS) -> dict[str, SSAConfig]:
    """Each mix with each budget (``num_neighbors``), as candidates by name.

    Raises:
        ConfigError: a budget below 1.
    """
    return {
        f"{name}, budget {budget}": config.replace(num_neighbors=budget)
        for name, config in mixes.items()
        for budget in budgets
    }


def preset_references() -> dict[str, SSAConfig]:
    """The presets, in every layer, also where dense attention would be faster."""
    return {name: SSAConfig.preset(name, dense_below=0) for name in PRESETS}
