"""What goes into the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Family = Literal["hyperplane", "cross_polytope"]


@dataclass(frozen=True)
class HashLevels:
    """How many bits of a hash every query goes by, and in the orders of which numbers of bits a key stands.

    Attributes:
        queries: int32 ``[B or 1, N]``, 0 (every key of the document) to ``most``; -1 = the query chooses nothing.
        first, last: int32 ``[B or 1, M]``: a key stands in the orders for ``first`` to ``last`` bits; in none where
            ``first > last``.
        most: the most bits of any query.
        query_documents, key_documents: int32 ``[B or 1, N]`` and ``[B or 1, M]``, below ``num_documents``; -1 = a
            query whose document has no key. ``None`` = one document.
        num_documents: how many there are, or more.
        key_keep: bool ``[B or 1, M]``, False = padding, which no mean counts.
        causal: what is computed from keys may not look beyond each key's position.
        longest: no order holds more keys than this, over all numbers of bits.
    """

    queries: Tensor
    first: Tensor
    last: Tensor
    most: int
    query_documents: Tensor | None
    key_documents: Tensor | None
    num_documents: int
    key_keep: Tensor | None
    causal: bool
    longest: int

    def first_bucket(self, bits: int) -> int:
        """Bucket ``code`` of document ``d`` has the number ``first_bucket(bits) + (d << bits) + code``."""
        return self.num_documents * ((1 << bits) - 1)

    @property
    def num_buckets(self) -> int:
        return self.first_bucket(self.most + 1)
