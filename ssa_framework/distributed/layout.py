"""Which positions of a sequence each rank holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ssa_framework.errors import ConfigError, ShapeError

LayoutName = Literal["zigzag", "contiguous"]


@dataclass(frozen=True)
class SequenceLayout:
    """A sequence of ``length`` tokens over ``ranks`` ranks, in pieces of equal length.

    Attributes:
        name: ``"contiguous"``: rank r holds piece r of W. ``"zigzag"``: rank r holds pieces r and 2W - 1 - r of 2W, so
            that all ranks have equally many keys before their queries, which balances causal attention (Llama Team,
            The Llama 3 Herd of Models, 2024, section 3.3.2).

    Raises:
        ConfigError: another name. ShapeError: a length that has no equal pieces; names the next one that has.
    """

    length: int
    ranks: int
    name: LayoutName

    def __post_init__(self) -> None:
        if self.name not in get_args(LayoutName):
            raise ConfigError(f"layout must be 'zigzag' or 'contiguous', got {self.name!r}")
        if self.length % self.pieces:
            enough = -(-self.length // self.pieces) * self.pieces
            raise ShapeError(
                f"a sequence of {self.length} tokens has no {self.pieces} equal pieces ({self.name}, {self.ranks} "
                f"ranks); pad it to {enough} and say so in key_padding_mask"
            )

    @property
    def pieces(self) -> int:
        return 2 * self.ranks if self.name == "zigzag" else self.ranks

    @property
    def local_length(self) -> int:
        return self.length // self.ranks

    def chunks(self, rank: int) -> list[tuple[int, int]]:
        """First and one past the last position of every run of consecutive positions that a rank holds."""
        size = self.length // self.pieces
        if self.name == "contiguous":
            return [(rank * size, (rank + 1) * size)]
        last = self.pieces - 1 - rank
        if last == rank + 1:  # the pieces of the last rank stand side by side
            return [(rank * size, (last + 1) * size)]
        return [(rank * size, (rank + 1) * size), (last * size, (last + 1) * size)]

    def positions(self, rank: int, device: torch.device | None = None) -> Tensor:
        """Positions that a rank holds, ascending, int64 ``[N / W]``."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.chunks(rank)])

    def positions_by_rank(self, device: torch.device) -> Tensor:
        """`positions` of every rank, int64 ``[W, N / W]``; calls share them, so nobody may write there."""
        return _positions_by_rank(self, device)

    def by_rank(self, x: Tensor) -> Tensor:
        """``[.., N]`` by position → ``[W, .., N / W]``, what each rank holds of it."""
        positions = self.positions_by_rank(x.device)
        return x.index_select(-1, positions.flatten()).unflatten(-1, positions.shape).movedim(-2, 0)

    def rank_of(self, positions: Tensor) -> Tensor:
        """The rank that holds each of ``positions``, integers of any shape."""
        piece = torch.div(positions, max(1, self.length // self.pieces), rounding_mode="floor")
        return piece if self.name == "contiguous" else torch.minimum(piece, self.pieces - 1 - piece)

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """What a rank holds of a whole sequence along ``dim``."""
        if x.shape[dim] != self.length:
            raise ShapeError(f"dimension {dim} must have {self.length} tokens, got {list(x.shape)}")
        pieces = [x.narrow(dim, start, stop - start) for start, stop in self.chunks(rank)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def in_order(self, gathered: Tensor, dim: int) -> Tensor:
        """What was gathered from all ranks, one rank after the other along ``dim``, by position."""
        if self.name == "contiguous" or self.ranks == 1:
            return gathered
        pieces: dict[int, Tensor] = {}
        at = 0
        for rank in range(self.ranks):
            for start, stop in self.chunks(rank):
                pieces[start] = gathered.narrow(dim, at, stop - start)
                at += stop - start
        return torch.cat([pieces[start] for start in sorted(pieces)], dim=dim)


@functools.lru_cache(maxsize=16)
def _positions_by_rank(layout: SequenceLayout, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # later calls may need gradients
        return torch.stack([layout.positions(rank, device) for rank in range(layout.ranks)])
