"""`SparseCacheLayer`: a layer of transformers' dynamic cache, with what the sources keep of its keys."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from ssa_framework.cache import IndexStates
from ssa_framework.growing import GrowingTensor
from ssa_framework.integrations.transformers.compact_mask import Piece
from ssa_framework.router import Router


@dataclass
class _Held:
    """What the sources of one router keep of the keys of one `Piece`.

    Attributes:
        states: of the first ``length`` keys of the piece.
        keep: bool ``[B, length or more]``, which of them were padding; ``None`` = none.
    """

    states: IndexStates = field(default_factory=IndexStates)
    length: int = 0
    keep: Tensor | None = None

    def continues(self, keep: Tensor | None) -> bool:
        """Whether ``keep``, of more keys, says the same of those that are held."""
        if keep is None or self.keep is None:
            one = self.keep if keep is None else keep
            return one is None or bool(one[:, : self.length].all())
        return torch.equal(keep[:, : self.length], self.keep[:, : self.length])

    def crop(self, length: int) -> None:
        if length < self.length:
            self.states.crop(length)
            self.length = length

    def reorder(self, index: Tensor) -> None:
        self.states.reorder(index)
        self.keep = None if self.keep is None else self.keep.index_select(0, index.to(self.keep.device))


_Rows = tuple[int, int, int]
"""First and last row + 1 of a piece, and its first key."""


class SparseCacheLayer(DynamicLayer):
    """A `transformers.cache_utils.DynamicLayer` whose keys and values lie in room that grows, so that a token is added
    without a copy of those that are there, and which holds the index states of the routers that read it.

    All that it holds besides keys and values follows from them: it is cropped, reordered and copied with them, left
    out when the cache is pickled, and made anew where it does not fit any more.
    """

    keys: Any  # tensors, or None before the first token
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        self._rooms: tuple[GrowingTensor, GrowingTensor] | None = None
        self._last: Tensor | None = None  # the keys as this object left them
        self._held: weakref.WeakKeyDictionary[Router, dict[_Rows, _Held]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, layer: DynamicLayer) -> SparseCacheLayer:
        """A layer that goes on from ``layer``."""
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__)
        new._forget()
        return new

    # -- keys and values ---------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens: ``[B, Hkv, new, D]`` and ``[B, Hkv, new, Dv]``. Returns everything, as views."""
        if self.is_initialized and self.keys is not self._last:
            self._forget()  # somebody has put other keys here
        if self._can_grow(key_states, value_states):
            self._grow(key_states, value_states)
        else:
            self._rooms = None
            super().update(key_states, value_states, *args, **kwargs)
        self._last = self.keys
        return self.keys, self.values

    def _can_grow(self, k: Tensor, v: Tensor) -> bool:
        """Not where autograd follows, nor where torch would have to convert or to complain."""
        tracked = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        if tracked or not self.is_initialized or not self.keys.numel():
            return not tracked
        if torch.is_grad_enabled() and (self.keys.requires_grad or self.values.requires_grad):
            return False
        return all(
            new.shape[:2] == old.shape[:2]
            and new.shape[3] == old.shape[3]
            and new.dtype == old.dtype
            and new.device == old.device
            for new, old in ((k, self.keys), (v, self.values))
        )

    def _grow(self, k: Tensor, v: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        # in room that was made in inference mode nobody could write outside of it
        with torch.inference_mode(False), torch.no_grad():
            if self._rooms is None:
                self._rooms = GrowingTensor(axis=2), GrowingTensor(axis=2)
                if self.keys.numel():
                    self._rooms[0].append(self.keys, spare=k.shape[2])
                    self._rooms[1].append(self.values, spare=k.shape[2])
            self._rooms[0].append(k)
            self._rooms[1].append(v)
            self.keys, self.values = self._rooms[0].view, self._rooms[1].view

    def rooms_of(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values with the places behind them that are not used yet, if ``k`` and ``v`` are all of them."""
        if self._rooms is None or k is not self.keys or v is not self.values:
            return None
        keys, values = (room.room for room in self._rooms)
        return None if keys is None or values is None else (keys, values)

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; a negative number says how many."""
        known = self.keys is self._last
        super().crop(tokens_to_remove)
        if not known or not self.is_initialized:
            return
        length, self._last = self.keys.shape[-2], self.keys
        if not length:
            self._forget()  # the next batch may be of another size
            return
        for room in self._rooms or ():
            room.crop(length)
        for held in self._held.values():
            for rows, one in list(held.items()):
                if length > rows[2]:
                    one.crop(length - rows[2])
                else:
                    del held[rows]

    # -- the batch ---------------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make batch element i the present element ``beam_idx[i]``."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch element."""
        if self.get_seq_length():
            self._take(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch elements; integers, or a mask."""
        if self.get_seq_length():
            self._take(torch.arange(len(self.keys))[torch.as_tensor(indices).cpu()])

    def _take(self, index: Tensor) -> None:
        if not self.get_seq_length():
            return
        rows = index.tolist()
        if rows == list(range(len(self.keys))):
            return
        if self.keys is not self._last:
            self._forget()
        if self._rooms is None:
            index = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        else:
            with torch.inference_mode(False), torch.no_grad():
                for room in self._rooms:
                    room.reorder(index)
                self.keys, self.values = self._rooms[0].view, self._rooms[1].view
        self._last = self.keys
        for router, held in list(self._held.items()):
            self._held[router] = _moved(held, rows, self.keys.device)

    # -- copies ------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseCacheLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {"keys", "values", "_rooms", "_last", "_held"}
        twin.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in own}, memo))
        twin._forget()
        twin.keys, twin.values = _clone(self.keys), _clone(self.values)
        if self.keys is self._last:
            twin._last, twin._held = twin.keys, copy.deepcopy(self._held, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: x for name, x in self.__dict__.items() if name not in ("_rooms", "_last", "_held")}
        return kept | {"keys": _clone(self.keys), "values": _clone(self.values)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # -- index states ------------------------------------------------------------------------------------------------

    def states(self, router: Router, pieces: Sequence[Piece], keys: int) -> list[IndexStates]:
        """What the sources of a router keep of the keys of each piece; empty where nothing is known.

        Args:
            pieces: of the batch, of which there are ``keys`` keys now.
        """
        held, now = self._held.get(router, {}), {}
        for piece in pieces:
            rows = (piece.rows.start, piece.rows.stop, piece.first_key)
            one, keep = held.get(rows), piece.mask.key_keep
            if one is None or not one.continues(keep):
                one = _Held()
            one.length, one.keep = keys - piece.first_key, keep
            now[rows] = one
        self._held[router] = now
        return [one.states for one in now.values()]


class _SparseHybridLayer(SparseCacheLayer, LinearAttentionAndFullAttentionLayer):
    """The same beside the states of a linear attention."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        SparseCacheLayer.reorder_cache(self, beam_idx)


_ADOPTED = {DynamicLayer: SparseCacheLayer, LinearAttentionAndFullAttentionLayer: _SparseHybridLayer}


def adopt(cache: Any, index: int | None) -> Any:
    """Let the layers of a dynamic cache grow in room and hold index states; those of other kinds stay as they are.

    Args:
        cache: what a model calls ``cache`` or ``past_key_values``. index: of the layer that is going to be used.

    Returns: the cache of self-attention.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache) or cache.offloading:
        return cache
    if index is not None and index < len(cache.layers) and type(cache.layers[index]) not in _ADOPTED:
        return cache
    for i, layer in enumerate(cache.layers):
        if type(layer) in _ADOPTED:
            cache.layers[i] = _ADOPTED[type(layer)].of(layer)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = SparseCacheLayer
    return cache


def find_layer(cache: Any, index: int | None, key: Tensor) -> SparseCacheLayer | None:
    """The layer of an adopted cache in which ``key [B, Hkv, M, D]`` is kept, or from which it was made."""
    layers = getattr(cache, "layers", ())
    if index is not None and index < len(layers):
        layer = layers[index]
        # some models keep less than their keys, and make them anew
        if isinstance(layer, SparseCacheLayer) and (layer.keys is key or layer.get_seq_length() == key.shape[2]):
            return layer
    # some layers use the keys of another one
    return next((layer for layer in layers if isinstance(layer, SparseCacheLayer) and layer.keys is key), None)


def _moved(held: dict[_Rows, _Held], index: list[int], device: torch.device) -> dict[_Rows, _Held]:
    """What is held, for a batch whose element i was ``index[i]`` before: each run of elements that come from one piece
    is a piece. One whose elements are scattered is left out, and made anew."""
    owner = {row: rows for rows in held for row in range(rows[0], rows[1])}
    runs = [(rows, list(group)) for rows, group in groupby(index, key=owner.get)]
    often = Counter(rows for rows, _ in runs)
    moved, start = {}, 0
    for rows, elements in runs:
        if rows is not None and often[rows] == 1:
            held[rows].reorder(torch.tensor([i - rows[0] for i in elements], device=device))
            moved[start, start + len(elements), rows[2]] = held[rows]
        start += len(elements)
    return moved


def _clone(x: Tensor | None) -> Tensor | None:
    """Without the room around it."""
    return None if x is None else x.clone(memory_format=torch.contiguous_format)
