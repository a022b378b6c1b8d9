"""`GrowingTensor`: a tensor that grows along one axis without being copied at every step."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_ROOM = 64
"""Places that are left at first; an eighth of what is there, if that is more."""
_DOUBLED = 4096
"""Places up to which room doubles. Beyond, it grows by a quarter: memory counts more there, and a copy less."""


class GrowingTensor:
    """A tensor that grows at the end of one axis, within room that grows by a share of itself when it is used up.

    Appending a token costs the same on average, however long the tensor is.

    Args:
        axis: along which it grows, counted from the front; not 0.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.length = 0
        self.room: Tensor | None = None
        """The tensor with its unused end, which is anything; ``None`` before the first `append`."""

    @property
    def view(self) -> Tensor:
        """What was appended so far; no copy."""
        if self.room is None:
            raise RuntimeError("a growing tensor has no shape before something is appended")
        return self.room.narrow(self.axis, 0, self.length)

    def append(self, x: Tensor, spare: int = 0) -> None:
        """Grow by ``x``, whose other axes, dtype and device are those of what is there. Where new room has to be
        made, there will be ``spare`` places left in it, or more."""
        added = x.shape[self.axis]
        self._make_room(x, self.length + added, spare)
        assert self.room is not None
        self.room.narrow(self.axis, self.length, added).copy_(x)
        self.length += added

    def crop(self, length: int) -> None:
        """Drop everything from place ``length`` on."""
        self.length = min(self.length, length)

    def reorder(self, index: Tensor) -> None:
        """Replace the elements of axis 0 by those at ``index``, integers ``[B']``; they may repeat."""
        if self.room is None:
            return
        elements = index.tolist()
        used, self.room = self.view, self.room.new_empty((len(elements), *self.room.shape[1:]))
        for there, here in zip(self.view, elements, strict=True):
            there.copy_(used[here])

    def _make_room(self, like: Tensor, length: int, spare: int) -> None:
        present = None if self.room is None else self.room.shape[self.axis]
        if present is not None and length <= present:
            return
        shape = list(like.shape)
        if present is None:
            shape[self.axis] = length + max(spare, _SMALLEST_ROOM, length // 8)
        else:
            shape[self.axis] = max(length + spare, 2 * present if present < _DOUBLED else present + present // 4)
        room = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.room is not None:
            room.narrow(self.axis, 0, self.length).copy_(self.view)
        self.room = room
