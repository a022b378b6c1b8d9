"""`KeptKeys`: what ``lsh`` keeps of the keys in a cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssa_framework.plugin import KeptHashes


@dataclass
class KeptKeys:
    """Attributes:
    hashes: codes and buckets.
    first: position of the first real key of every batch element, which numbers of planes count from; -1 = none yet.
    """

    hashes: KeptHashes
    first: list[int]

    def find_first(self, keep: Tensor | None, first_new: int) -> None:
        """Look for first keys among those from ``first_new`` on; ``keep`` bool ``[B or 1, M]``, ``None`` = all real."""
        if min(self.first) >= 0:
            return
        found = [first_new] * len(self.first)
        if keep is not None:
            new = keep[:, first_new:]
            place = (first_new + new.int().argmax(1)).where(new.any(1), -1).tolist()
            found = place if len(place) == len(found) else place * len(found)
        self.first = [there if first < 0 else first for first, there in zip(self.first, found, strict=True)]

    def crop(self, length: int) -> None:
        """Drop the keys from position ``length`` on."""
        self.first = [first if first < length else -1 for first in self.first]
        self.hashes.crop(length)

    def reorder(self, index: Tensor) -> None:
        """Replace the batch elements by those at ``index``."""
        self.first = [self.first[b] for b in index.tolist()]
        self.hashes.reorder(index)
