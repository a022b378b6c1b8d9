"""`GrowingTensor`: a tensor that grows along one axis without being copied at every step."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_ROOM = 64


class GrowingTensor:
    """A tensor that grows at the end of one axis, within room that doubles when it is used up.

    Appending a token costs the same on average, however long the tensor is.

    Args:
        axis: along which it grows, counted from the front.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.length = 0
        self.room: Tensor | None = None
        """The tensor with its unused end, which is zeros or what was cropped; ``None`` before the first `append`."""

    @property
    def view(self) -> Tensor:
        """What was appended so far; no copy."""
        if self.room is None:
            raise RuntimeError("a growing tensor has no shape before something is appended")
        return self.room.narrow(self.axis, 0, self.length)

    def append(self, x: Tensor) -> None:
        """Grow by ``x``, whose other axes, dtype and device are those of what is there."""
        added = x.shape[self.axis]
        self._make_room(x, self.length + added)
        assert self.room is not None
        self.room.narrow(self.axis, self.length, added).copy_(x)
        self.length += added

    def crop(self, length: int) -> None:
        """Drop everything from place ``length`` on."""
        self.length = min(self.length, length)

    def reorder(self, index: Tensor) -> None:
        """Replace the elements of axis 0 by those at ``index``, int64 ``[B']``; they may repeat."""
        if self.room is not None:
            used = self.view.index_select(0, index)
            self.room, length, self.length = None, self.length, 0
            self._make_room(used, length)
            self.append(used)

    def _make_room(self, like: Tensor, length: int) -> None:
        if self.room is not None and length <= self.room.shape[self.axis]:
            return
        shape = list(like.shape)
        shape[self.axis] = max(length, _SMALLEST_ROOM if self.room is None else 2 * self.room.shape[self.axis])
        room = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if self.room is not None:
            room.narrow(self.axis, 0, self.length).copy_(self.view)
        self.room = room
