"""What a search looks for, and what it found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.laboratory.tune.hull import Point

TargetKind = Literal["perplexity", "output_error"]


@dataclass(frozen=True)
class Target:
    """What is good enough.

    Attributes:
        kind: ``"perplexity"``: it rises by at most ``limit`` relative to dense attention, with a confidence of 95 %
            that the mean over the tokens does. ``"output_error"``: mean over layers, heads and queries.
        limit: a share; 0.01 is 1 %.

    Raises:
        ConfigError: another kind, or a limit that is not in (0, 1].
    """

    kind: TargetKind
    limit: float

    def __post_init__(self) -> None:
        if self.kind not in ("perplexity", "output_error"):
            raise ConfigError(f"the target must be 'perplexity' or 'output_error', got {self.kind!r}")
        if not 0.0 < self.limit <= 1.0:
            raise ConfigError(f"the limit of the target is a share in (0, 1], such as 0.01 for 1 %, got {self.limit!r}")


@dataclass(frozen=True)
class Change:
    """Perplexity on one text, or several, against dense attention.

    Attributes:
        tokens: predictions that it is the mean of. dense, sparse: perplexities.
        change: ``sparse / dense - 1``. standard_error: of it, from the differences token by token.
    """

    tokens: int
    dense: float
    sparse: float
    change: float
    standard_error: float

    @property
    def upper(self) -> float:
        """With a confidence of 95 % the change over more tokens of the kind is at most this."""
        return self.change + 1.645 * self.standard_error

    @classmethod
    def of(cls, dense: Tensor, sparse: Tensor) -> Change:
        """From the losses of the same tokens."""
        difference = sparse - dense
        ratio = math.exp(float(difference.mean()))
        error = float(difference.std()) / math.sqrt(len(dense)) if len(dense) > 1 else float("inf")
        return cls(
            len(dense), math.exp(float(dense.mean())), math.exp(float(sparse.mean())), ratio - 1.0, ratio * error
        )


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried, or one that it is compared with.

    Attributes:
        name: of it. cost: see `Point`; mean over layers.
        output_error: mean over layers, on the texts of the search.
        texts: perplexity by text, for a target in perplexity. together: over the tokens of all of them.
        held_out: the same by text that had no part in the search. held_out_error: mean output error there.
        meets: whether it meets the target on the texts of the search.
    """

    name: str
    cost: float
    output_error: float
    meets: bool
    texts: Mapping[str, Change] = field(default_factory=dict)
    together: Change | None = None
    held_out: Mapping[str, Change] = field(default_factory=dict)
    held_out_error: float | None = None


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        model: what it is called. length: tokens of each text. target: what was asked for.
        config: the cheapest configuration that meets it; `SSAConfig.to_json` writes it.
        layers: for each layer that was tuned, the candidate that it got, or ``"dense"``.
        points: for each layer, what each candidate costs and does there.
        sensitivity: for each layer, nats of divergence per squared relative error; empty for a target in output error.
        allowed: keys per query that it may attend: what dense attention looks at.
        result: how good ``config`` is. references: other configurations, for comparison. trials: what was tried.
        seconds: that it took, over all runs that were resumed. environment: device, versions, commit and date.
    """

    model: str
    length: int
    target: Target
    config: SSAConfig
    layers: Mapping[int, str]
    points: Mapping[int, Mapping[str, Point]]
    sensitivity: Mapping[int, float]
    allowed: float
    result: Trial
    references: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    seed: int
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)
