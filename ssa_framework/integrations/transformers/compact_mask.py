"""`CompactMask`: what a model's layers get in place of an N × M mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)

from ssa_framework.errors import ConfigError
from ssa_framework.masks import EdgeMask, make_edge_mask


@dataclass(frozen=True)
class Piece:
    """Rows of the batch that are routed in one call: those with the same padding on the left, which is taken off.

    Attributes:
        rows: of the batch. first_query, first_key: what remains, ``q[rows, :, first_query:]`` and so on.
        mask: for what remains.
    """

    rows: slice
    first_query: int
    first_key: int
    mask: EdgeMask


@dataclass(frozen=True, eq=False)
class CompactMask:
    """The mask of one forward pass, shared by its layers; nothing in it is of size N × M.

    Attributes:
        batch: B. queries: N. keys: M.
        offset: where the first query stands among the keys.
        causal: no key after its query.
        window: size of the sliding window or of the chunks that the layers of this mask attend, or ``None``.
        padding: bool ``[B, M]``, True = a real key; ``None`` = no padding.
        segments: integer ``[B, N]``, the packed document of every token; ``None`` = one document.
        unknown: why sparse layers can't serve this mask (it says more than the fields above), or ``None``.
        arguments: what transformers asked for, to make the mask of a dense layer.
    """

    batch: int
    queries: int
    keys: int
    offset: int
    causal: bool
    window: int | None = None
    padding: Tensor | None = None
    segments: Tensor | None = None
    unknown: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _pieces: dict[torch.device, list[Piece]] = field(default_factory=dict, repr=False)

    @property
    def dense(self) -> Tensor | None:
        """The mask for transformers' ``sdpa`` function, made when the first dense layer asks: ``[B, 1, N, M]``, or
        ``None`` where ``is_causal`` says it all."""
        return self._make_dense() if torch.compiler.is_compiling() else self._dense  # what is kept, cannot be traced

    @cached_property
    def _dense(self) -> Tensor | None:
        return self._make_dense()

    def _make_dense(self) -> Tensor | None:
        mask: Tensor | None = sdpa_mask(**self.arguments)
        return mask

    def pieces(self, device: torch.device) -> list[Piece]:
        """What to route: the whole batch, unless it is padded on the left.

        A prompt that is padded on the left has the neighbors that it would have alone: positions count from its first
        real token.
        """
        if device not in self._pieces:
            self._pieces[device] = self._split(device)
        return self._pieces[device]

    def _split(self, device: torch.device) -> list[Piece]:
        if self.padding is None:
            return [self._piece(slice(0, self.batch), 0, device)]
        first = torch.where(self.padding.any(1), self.padding.int().argmax(1), self.keys).tolist()
        pieces, start = [], 0
        for left, group in groupby(first):
            stop = start + len(list(group))
            pieces.append(self._piece(slice(start, stop), left, device))
            start = stop
        return pieces

    def _piece(self, rows: slice, left: int, device: torch.device) -> Piece:
        first_query = min(max(0, left - self.offset), self.queries)
        queries = self.queries - first_query
        offset = self.offset + first_query - left
        keep = None if self.padding is None else self.padding[rows, left:].to(device)
        segments = None if self.segments is None else self.segments[rows, first_query:].to(device)
        mask = make_edge_mask(
            batch=rows.stop - rows.start,
            heads=1,
            queries=queries,
            keys=self.keys - left,
            device=device,
            causal=self.causal,
            query_positions=torch.arange(offset, offset + queries, device=device) if offset else None,
            key_padding_mask=None if keep is None or bool(keep.all()) else keep,
            segment_ids=segments,
        )
        return Piece(rows, first_query, left, mask)


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> CompactMask:
    """The mask function that is registered with `transformers.AttentionMaskInterface`.

    Args:
        q_length: N. kv_length: M. q_offset, kv_offset: positions of the first query and the first key.
        mask_function: the pattern, as transformers puts it together.
        attention_mask: bool ``[B, seen tokens]``, True = a real token.
        options: everything else that transformers tells a mask function.

    Raises:
        ConfigError: a static cache.
    """
    causal = mask_function is not bidirectional_mask_function
    if isinstance(q_offset, Tensor) or (causal and kv_offset + kv_length > q_offset + q_length):
        raise ConfigError(
            f"{kv_length} keys, but only {int(q_offset) + q_length} tokens so far: sparse attention can't be used with "
            f"a static cache, which holds room for keys to come; use a dynamic cache, as generate() does if "
            f"cache_implementation is left out"
        )
    arguments = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, **options,
    }  # fmt: skip
    if torch.compiler.is_compiling():
        segments = None
        if attention_mask is not None:
            raise ConfigError(
                "attention_mask tells how a batch is padded, and rows with equal padding are routed together: that "
                "depends on data, which a compiled model cannot look at; leave it out, or pack the batch (position_ids)"
            )
        if mask_function not in (causal_mask_function, bidirectional_mask_function):
            segments = probed_segments(mask_function, batch_size, q_length, options.get("device"))
        return CompactMask(
            batch_size, q_length, kv_length, q_offset - kv_offset, causal,
            window=options.get("local_size"), segments=segments, arguments=arguments,
        )  # fmt: skip
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
        padding = None if bool(padding.all()) else padding
    segments = packed_segments(mask_function)
    known = mask_function in (causal_mask_function, bidirectional_mask_function) or segments is not None
    return CompactMask(
        batch=batch_size,
        queries=q_length,
        keys=kv_length,
        offset=q_offset - kv_offset,
        causal=causal,
        window=options.get("local_size"),
        padding=padding,
        segments=segments,
        unknown=None if known else f"a mask function of its own ({getattr(mask_function, '__qualname__', '?')})",
        arguments=arguments,
    )


def packed_segments(mask_function: Callable[..., Any]) -> Tensor | None:
    """The document of every token ``[B, N]``, if ``mask_function`` is transformers' causal mask of packed documents.

    transformers hands the documents on inside of this function only, so it is taken apart: it combines, in either
    order, the documents and the causal mask, which may count positions inside of the documents. A function that is put
    together otherwise is not taken for a packed mask.
    """
    if not _is_made_by(and_masks(), mask_function):
        return None
    parts = _variables(mask_function).get("mask_functions", ())
    model = packed_sequence_mask_function(torch.empty(0))
    documents = [part for part in parts if _is_made_by(model, part)]
    others = [part for part in parts if not _is_made_by(model, part)]
    if len(documents) != 1 or len(others) != 1 or not _is_causal(others[0]):
        return None
    segments: Tensor | None = _variables(documents[0]).get("packed_sequence_mask")
    return segments


def _is_causal(mask_function: Callable[..., Any]) -> bool:
    """Whether it is the causal mask, or the same of positions that restart with every document."""
    if mask_function is causal_mask_function:
        return True
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # not every transformers 5 has it
    if remap is None or not _is_made_by(remap(causal_mask_function, torch.empty(0)), mask_function):
        return False
    return _variables(mask_function).get("mask_function") is causal_mask_function


def _is_made_by(model: Callable[..., Any], mask_function: Callable[..., Any]) -> bool:
    """Whether the function that returned ``model`` has returned ``mask_function`` too."""
    return getattr(mask_function, "__code__", None) is model.__code__


def _variables(mask_function: Callable[..., Any]) -> Mapping[str, Any]:
    """What it has from the function that returned it."""
    return inspect.getclosurevars(mask_function).nonlocals


def probed_segments(mask_function: Callable[..., Any], batch: int, length: int, device: Any) -> Tensor:
    """The document of every token ``[B, N]``, from what ``mask_function`` says of neighboring tokens.

    Where a model is compiled, a function cannot be taken apart, and transformers takes every batch for a packed one. So
    the function is asked: first whether a token sees the one before, which tells where documents begin; then, at
    distances that are powers of two and one token ahead, whether causal attention inside of these documents is what
    it says. If not, the program stops with an error when it runs.
    """
    rows = torch.arange(batch, device=device)[:, None]
    queries = torch.arange(length, device=device)[None]
    head = torch.zeros_like(rows)
    segments = (~mask_function(rows, head, queries, (queries - 1).clamp(min=0))).cumsum(1)
    ahead = (queries + 1).clamp(max=length - 1)
    holds = (mask_function(rows, head, queries, ahead) == (queries == ahead)).all()
    for power in range(1, 21):
        before = (queries - 2**power).clamp(min=0)
        same = segments.gather(1, before.expand(batch, -1)) == segments
        holds = holds & (mask_function(rows, head, queries, before) == same).all()
    torch._assert_async(holds, "sparse layers got a mask function that is not causal attention inside of documents")
    return segments


def mask_of_shapes(query: Tensor, key: Tensor, causal: bool) -> CompactMask:
    """The mask where a model gives none, read as transformers' ``sdpa`` does.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]``.
        causal: of the module; a single query sees all keys anyway.
    """
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    offset = keys - 1 if queries == 1 else 0
    return CompactMask(batch=batch, queries=queries, keys=keys, offset=offset, causal=causal)
