"""`SSACache`: keys, values and the index states of all sources, layer by layer, for decoding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ssa_framework.errors import CacheError
from ssa_framework.growing import GrowingTensor
from ssa_framework.kept_summaries import KeptSummaries
from ssa_framework.masks import EdgeMask
from ssa_framework.proposals import KnownTensors, Summaries
from ssa_framework.source import NeighborSource, RoutingContext

_Method = TypeVar("_Method", bound=Callable[..., None])


def _outside_inference_mode(method: _Method) -> _Method:
    """A cache may be filled in inference mode and be used outside of it, where nobody may write to such tensors."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> None:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return cast(_Method, run)


@dataclass
class _Index:
    """What one source keeps of the first ``length`` keys."""

    source: NeighborSource
    state: Any
    length: int
    known: KnownTensors


class IndexStates:
    """What the sources of one router keep of a sequence of keys and values that lie elsewhere, and that grows.

    Everything here follows from the keys and the values: where it is lost, the next call makes it anew. A deep copy
    shares the router and its sources, and nothing else.
    """

    def __init__(self) -> None:
        self.owner: Any = None
        """The router whose sources keep their states here."""
        self._indices: dict[str, _Index] = {}
        self._summaries = KeptSummaries()
        self.steady = False
        """Whether a step is routed that stands for several tokens, for none of which a source appends keys."""
        self.captured: Any = None
        """`CapturedSteps` of this sequence, if there are any."""
        self.sequence: tuple[Tensor, Tensor] | None = None
        """Keys ``[B, Hkv, M, D]`` and values ``[B, Hkv, M, Dv]``, while something is routed among them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> IndexStates:
        twin = IndexStates()
        twin.owner = self.owner
        for name, index in self._indices.items():
            twin._keep_state(name, index, copy.deepcopy(index.state, memo), index.length)
        twin._summaries = copy.deepcopy(self._summaries, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"captured": None}  # a CUDA graph is of this process

    @_outside_inference_mode
    def crop(self, length: int) -> None:
        """Forget the keys from position ``length`` on."""
        self.captured = None
        self._summaries.crop(length)
        for name, index in list(self._indices.items()):
            if index.length > length:
                self._keep_state(name, index, index.source.crop(index.state, length), length)

    @_outside_inference_mode
    def reorder(self, index: Tensor) -> None:
        """Make batch element i the present element ``index[i]``, int64 ``[B']``; they may repeat, or be left out."""
        self.captured = None
        self._summaries.reorder(index)
        for name, kept in list(self._indices.items()):
            self._keep_state(name, kept, kept.source.reorder(kept.state, index), kept.length)

    # -- for the router ------------------------------------------------------------------------------------------

    def check_owner(self, owner: object) -> None:
        """Raise what `bind` would raise."""
        if self.owner is not None and self.owner is not owner:
            raise CacheError(
                "this cache holds index states of another layer; use one layer of the SSACache for each layer of the "
                "model, or reset() it"
            )

    def bind(self, owner: object) -> None:
        """Say which router's sources keep their states here.

        Raises:
            CacheError: those of another one do.
        """
        self.check_owner(owner)
        self.owner = owner

    def indexed(self, name: str, source: NeighborSource, ctx: RoutingContext) -> RoutingContext:
        """``ctx`` with the state of a source, which then holds all keys of ``ctx``."""
        index = self._indices.get(name)
        if index is None:
            index = self._indices[name] = _Index(source, source.init_state(ctx), 0, KnownTensors())
        if index.state is None:
            return ctx
        if index.length < ctx.num_keys and not self.steady:
            new = replace(ctx, state=index.state, first_new=index.length)
            index.state, index.length = source.append(index.state, new), ctx.num_keys
            if index.state is new.state:
                return new
        return replace(ctx, state=index.state)

    def steady_steps(self, length: int) -> int:
        """For how many tokens behind the first ``length`` all sources propose by positions alone; see
        `NeighborSource.steady_steps`."""
        if not self._indices:
            return 0
        return min(
            index.source.steady_steps(index.state, length) if index.state is None or index.length == length else 0
            for index in self._indices.values()
        )

    def known(self, name: str) -> KnownTensors | None:
        """What a source keeps here and need not be checked again; ``None`` where it keeps nothing."""
        index = self._indices[name]
        return None if index.state is None else index.known

    def summarised(self, name: str, summaries: Summaries, mask: EdgeMask, columns: Tensor | None) -> Summaries | None:
        """Summaries of a source with their means, which are kept; ``None`` where the source keeps no state, and so may
        number them in another way each time."""
        if self._indices[name].state is None or self.sequence is None:
            return None
        return self._summaries.complete(summaries, name, mask, columns, *self.sequence)

    def _keep_state(self, name: str, index: _Index, state: Any, length: int) -> None:
        """A source that has no state left starts anew with the next call."""
        if state is None:
            self._indices.pop(name, None)
        else:
            self._indices[name] = _Index(index.source, state, length, KnownTensors())


class LayerCache:
    """Keys and values of one attention layer, and what its sources keep of the keys.

    Batch elements of different lengths stand right-aligned: tokens that are none are appended with ``key_keep`` False,
    and stay in the cache as masked keys.

    Nothing here is differentiable; `append` refuses tensors that collect gradients.
    """

    states: IndexStates
    """What the sources keep."""
    config: Any
    """What `sparse_attention` made the router of."""
    _keys: GrowingTensor
    _values: GrowingTensor
    _keep: GrowingTensor | None

    def __init__(self) -> None:
        self.reset()

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def owner(self) -> Any:
        """The router whose sources keep their states here; ``None`` before it was used."""
        return self.states.owner

    @property
    def length(self) -> int:
        """How many tokens are cached, padding included."""
        return self._keys.length

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, length, D]``, a view; zeros where padded."""
        return self._kept(self._keys)

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, length, Dv]``, a view; zeros where padded."""
        return self._kept(self._values)

    @property
    def key_keep(self) -> Tensor | None:
        """bool ``[B, length]``, True = a real key, a view; ``None`` = there is no padding."""
        return self._keep.view if self._keep is not None else None

    @property
    def rooms(self) -> tuple[Tensor, Tensor] | None:
        """`keys` and `values` with the places behind them that are not used yet; ``None`` = there are none."""
        if self._keys.room is None or self._values.room is None:
            return None
        return self._keys.room, self._values.room

    def _kept(self, tensor: GrowingTensor) -> Tensor:
        if tensor.room is None:
            raise CacheError("the cache is empty; append keys and values first")
        return tensor.view

    # -- change --------------------------------------------------------------------------------------------------

    @_outside_inference_mode
    def append(self, k: Tensor, v: Tensor, key_keep: Tensor | None = None, *, checked: bool = False) -> None:
        """Add tokens at the end.

        Args:
            k: ``[B, Hkv, new, D]``. v: ``[B, Hkv, new, Dv]``. key_keep: bool ``[B or 1, new]``, False = padding.
            checked: `check` was called with them.

        Raises:
            CacheError: shapes, dtypes or devices that differ from what is there, or tensors that collect gradients.
        """
        if not checked:
            self.check(k, v, key_keep)
        k, v = k.detach(), v.detach()
        if key_keep is not None and self._keep is None and not bool(key_keep.all()):
            self._keep = GrowingTensor(axis=1)
            self._keep.append(torch.ones((k.shape[0], self.length), dtype=torch.bool, device=k.device))
        if self._keep is not None:
            kept = torch.ones((1, 1), dtype=torch.bool, device=k.device) if key_keep is None else key_keep
            kept = kept.expand(k.shape[0], k.shape[2])
            self._keep.append(kept)
            # no weight is no protection: zero times a NaN in the padding would still be NaN
            k, v = (x.masked_fill(~kept[:, None, :, None], 0.0) for x in (k, v))
        self._keys.append(k)
        self._values.append(v)

    def advance(self) -> None:
        """Take in one token that was written into the next place of `rooms`; there is no padding."""
        for tensor in (self._keys, self._values):
            tensor.length += 1

    def check(self, k: Tensor, v: Tensor, key_keep: Tensor | None = None) -> None:
        """Raise what `append` would raise."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise CacheError(
                "a cache is for inference: its keys and values collect no gradients; decode under torch.no_grad(), or "
                "pass detached tensors"
            )
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise CacheError(
                f"k and v must be [B, Hkv, new, D] and [B, Hkv, new, Dv], got {list(k.shape)} and {list(v.shape)}"
            )
        for name, new, there in (("k", k, self._keys.room), ("v", v, self._values.room)):
            if there is None:
                continue
            wanted, got = (*there.shape[:2], there.shape[3]), (*new.shape[:2], new.shape[3])
            if wanted != got or there.dtype != new.dtype or there.device != new.device:
                raise CacheError(
                    f"the cache holds {name} [{wanted[0]}, {wanted[1]}, {self.length}, {wanted[2]}] in {there.dtype} "
                    f"on {there.device}, got {list(new.shape)} in {new.dtype} on {new.device}; reset() starts anew"
                )
        if key_keep is not None:
            fits = key_keep.dim() == 2 and key_keep.shape[0] in (1, k.shape[0]) and key_keep.shape[1] == k.shape[2]
            if key_keep.dtype != torch.bool or not fits:
                raise CacheError(
                    f"key_keep must be bool [B, new] = [{k.shape[0]}, {k.shape[2]}], one column for each token that is "
                    f"appended, got {key_keep.dtype} {list(key_keep.shape)}"
                )

    @_outside_inference_mode
    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens and drop the newer ones."""
        _check_length(length, self.length)
        for tensor in self._tensors():
            tensor.crop(length)
        self.states.crop(length)

    @_outside_inference_mode
    def reorder(self, batch_indices: Tensor | Sequence[int]) -> None:
        """Make batch element i the present element ``batch_indices[i]``, as beam search does; elements may repeat,
        and may be left out.

        Args:
            batch_indices: integers ``[B']``, below the present batch size.
        """
        if not self.length:
            return
        batch, device = self.keys.shape[0], self.keys.device
        index = torch.as_tensor(batch_indices, device=device)
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise CacheError(f"batch_indices must be integers [B], got {index.dtype} {list(index.shape)}")
        index = index.long()
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < batch):
            raise CacheError(f"batch_indices must lie in [0, {batch}), got {index.tolist()}")
        for tensor in self._tensors():
            tensor.reorder(index)
        self.states.reorder(index)

    def reset(self) -> None:
        """Drop everything; the cache can serve another batch, or another layer."""
        self._keys, self._values = GrowingTensor(axis=2), GrowingTensor(axis=2)
        self._keep, self.states, self.config = None, IndexStates(), None

    def _tensors(self) -> list[GrowingTensor]:
        return [self._keys, self._values] + ([self._keep] if self._keep is not None else [])


class SSACache:
    """Keys, values and index states of all layers of a model.

    Args:
        layers: how many layers; others are added when they are asked for.

    A cache serves one batch of sequences. Decoding token by token, in chunks or all at once gives the same neighbors
    and the same output.
    """

    def __init__(self, layers: int = 0) -> None:
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 0:
            raise CacheError(f"layers must be an integer >= 0, got {layers!r}")
        self._layers = [LayerCache() for _ in range(layers)]

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def length(self) -> int:
        """How many tokens are cached in every layer, padding included."""
        return min((layer.length for layer in self._layers), default=0)

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer, counted from 0; made where there is none yet."""
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise CacheError(f"a layer index must be an integer >= 0, got {index!r}")
        while len(self._layers) <= index:
            self._layers.append(LayerCache())
        return self._layers[index]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of every layer and drop the newer ones."""
        _check_length(length, self.length)
        for layer in self._layers:
            layer.crop(length)

    def reorder(self, batch_indices: Tensor | Sequence[int]) -> None:
        """Reorder, repeat or drop batch elements in every layer; see `LayerCache.reorder`."""
        for layer in self._layers:
            layer.reorder(batch_indices)

    def reset(self) -> None:
        """Drop everything."""
        for layer in self._layers:
            layer.reset()

    def __repr__(self) -> str:
        return f"SSACache(layers={len(self)}, length={self.length})"


def _check_length(length: object, present: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= present:
        raise CacheError(f"crop takes how many tokens to keep, in [0, {present}], got {length!r}")
