"""Configurations to start from, chosen by measurement (see the page "Choosing sources" of the documentation)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quality": {"levels": [[512, 8], [2048, 8], [8192, 32], [32768, 64]], "keys": 384, "iterations": 3},
    "balanced": {"levels": [[256, 8], [2048, 8], [8192, 64], [32768, 96]], "keys": 192, "iterations": 3},
    "fast": {"levels": [[512, 16], [2048, 32], [8192, 64], [32768, 128]], "keys": 192, "iterations": 3},
}
"""Options of the ``clusters`` source, which each preset joins with the first four tokens: those hold much of the
attention of trained models, whatever the query (Xiao et al., StreamingLLM, 2023).

Up to 8,192 keys back, `quality` and `balanced` keep clusters of 8 keys, but fit them on longer segments: a text that
repeats itself word for word needs single keys thousands of tokens back, which clusters of 32 keys blur. Farther back
clusters grow, so that their number, which is what a query ranks, stays near 1,500. `fast` has fewer and larger ones,
and as many keys of them as keep the perplexity of a model within 2 % of dense at 4,096 tokens."""

LEADING_TOKENS = 4


def preset_sources(name: str) -> dict[str, dict[str, Any]]:
    """The source mix of a preset; `KeyError` for a name that is none."""
    return {"global": {"tokens": LEADING_TOKENS}, "clusters": copy.deepcopy(dict(PRESETS[name]))}
