"""What goes into the op and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ssa_framework.masks import EdgeMask
from ssa_framework.proposals import Band, Candidates, Ranges


@dataclass(frozen=True)
class Proposed:
    """A listed proposal.

    Attributes:
        source: its name, different for each proposal. owner: the source that it comes from; ``source`` if left out.
    """

    source: str
    proposal: Candidates | Ranges
    owner: str = ""

    def __post_init__(self) -> None:
        if not self.owner:
            object.__setattr__(self, "owner", self.source)

    @property
    def is_forced(self) -> bool:
        """Attended whole, beside the budget."""
        return isinstance(self.proposal, Ranges) and self.proposal.attend == "all"

    @property
    def is_guaranteed(self) -> bool:
        """Kept before anything that competes by score."""
        return self.is_forced or (isinstance(self.proposal, Candidates) and self.proposal.guaranteed)


@dataclass(frozen=True)
class Eligible:
    """Which keys may be listed: those that the mask allows and that no band and no column covers.

    ``zero_padding``: padded keys are known to be zeros.
    """

    mask: EdgeMask
    num_heads: int
    num_keys: int
    band: Band | None
    columns: Tensor | None
    zero_padding: bool = False

    def rows(self, rows: slice) -> Eligible:
        return replace(self, mask=self.mask.rows(rows))


@dataclass(frozen=True)
class Selection:
    """Attributes:
    neighbors: int32 ``[B, G, N, K]``, ascending, ``-1`` at the end; ``None`` where nothing was proposed.
    listed, keys_scored: per source, how many slots it filled and how many distinct query-key pairs were scored
        for it, summed over batch, graph heads and queries (0-dim int64).
    """

    neighbors: Tensor | None
    listed: Mapping[str, Tensor]
    keys_scored: Mapping[str, Tensor]


def most_listed(proposal: Candidates | Ranges, keys: int) -> int:
    """The most keys that a proposal of this shape can hold for a query."""
    if isinstance(proposal, Candidates):
        return min(keys, proposal.indices.shape[-1])
    if proposal.limit is None:
        return keys
    if proposal.start is None:
        slices = 1 if proposal.order is None else proposal.order.shape[2]
    else:
        slices = proposal.start.shape[3] * proposal.start.shape[4]
    return min(keys, slices * proposal.limit)
