"""Which edges are allowed: causality, padding, packed documents and explicit masks, evaluated edge by edge.

Nothing of size N x M is made here. `EdgeMask` keeps what the caller gave in its compact form, and answers for the
edges that somebody asks about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ssa_framework.errors import DtypeError, MaskError, ShapeError

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention-style predicate ``mask_mod(b, h, q_idx, kv_idx) -> bool``, evaluated on broadcasting index tensors."""


@dataclass(frozen=True)
class EdgeMask:
    """The allowed edges of one attention call.

    Attributes:
        causal: no key after its query's position.
        positions: int32 ``[B or 1, N]``, the position of every query on the axis of the keys.
        offset: the positions are ``arange(N) + offset`` for the whole batch; ``None`` where they are irregular.
        key_keep: bool ``[B or 1, M]``, True = a real key, False = padding.
        query_segments, key_segments: int ``[B or 1, N]`` and ``[B or 1, M]``: packed documents attend to themselves.
        attn_mask: bool (True = attend) or additive floating point, ``[B or 1, H or 1, N or 1, M or 1]``.
        mask_mod: predicate over (batch, query head, query row, key), True = attend.
        row_offset, batch_offset: where this view starts in the full call (see `rows`).
        head_offset: the first query head of this view; the others are on other ranks (tensor parallelism).
    """

    causal: bool
    positions: Tensor
    offset: int | None
    key_keep: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    attn_mask: Tensor | None = None
    mask_mod: MaskMod | None = None
    row_offset: int = 0
    batch_offset: int = 0
    head_offset: int = 0

    @property
    def has_explicit(self) -> bool:
        """Whether a mask beyond arithmetic (attn_mask, mask_mod) has to be looked up edge by edge."""
        return self.attn_mask is not None or self.mask_mod is not None

    @property
    def is_additive(self) -> bool:
        return self.attn_mask is not None and self.attn_mask.is_floating_point()

    @property
    def per_head(self) -> bool:
        """Whether two query heads may see different masks. A ``mask_mod`` gets the head, so it may."""
        return self.mask_mod is not None or (self.attn_mask is not None and self.attn_mask.shape[1] > 1)

    def rows(self, rows: slice, batch: slice = slice(None)) -> EdgeMask:
        """The mask of some query rows and batch elements; a view."""

        def pick(x: Tensor | None, along_rows: bool) -> Tensor | None:
            if x is None:
                return None
            x = x[batch] if x.shape[0] > 1 else x
            return x[:, rows] if along_rows else x

        attn_mask = self.attn_mask
        if attn_mask is not None:
            attn_mask = attn_mask[batch] if attn_mask.shape[0] > 1 else attn_mask
            attn_mask = attn_mask[:, :, rows] if attn_mask.shape[2] > 1 else attn_mask
        positions = pick(self.positions, True)
        assert positions is not None
        first_row = rows.start or 0
        return replace(
            self,
            positions=positions,
            offset=None if self.offset is None else self.offset + first_row,
            key_keep=pick(self.key_keep, False),
            query_segments=pick(self.query_segments, True),
            key_segments=pick(self.key_segments, False),
            attn_mask=attn_mask,
            row_offset=self.row_offset + first_row,
            batch_offset=self.batch_offset + (batch.start or 0),
        )

    def structural(self, keys: Tensor) -> Tensor:
        """Causality, padding and documents for the edges to ``keys`` ``[B or 1, X, N or 1, C]`` (all >= 0).

        Returns: bool, broadcastable with ``keys``.
        """
        allowed = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=keys.device)
        if self.causal:
            allowed = allowed & (keys <= self.positions[:, None, :, None])
        if self.key_keep is not None:
            allowed = allowed & _lookup(self.key_keep, keys)
        if self.key_segments is not None and self.query_segments is not None:
            allowed = allowed & (_lookup(self.key_segments, keys) == self.query_segments[:, None, :, None])
        return allowed

    def explicit_bias(self, keys: Tensor, num_heads: int) -> Tensor | None:
        """What ``attn_mask`` and ``mask_mod`` add to the scores of the edges to ``keys``; ``-inf`` = not allowed.

        Args:
            keys: ``[B or 1, X, N, C]`` with X = 1, graph heads or query heads; empty slots must be >= 0 (any key).
            num_heads: H, the number of query heads.

        Returns: floating point ``[B or 1, H or X, N, C]`` (differentiable to an additive ``attn_mask``) or ``None``.
        """
        if not self.has_explicit:
            return None
        if self.per_head and keys.shape[1] not in (1, num_heads):
            keys = keys.repeat_interleave(num_heads // keys.shape[1], dim=1)
        keys = keys.long()
        device = keys.device
        rows = torch.arange(self.positions.shape[1], device=device).view(1, 1, -1, 1)
        heads = torch.arange(num_heads if self.per_head else 1, device=device).view(1, -1, 1, 1)
        bias = None
        if self.attn_mask is not None:
            mask = self.attn_mask
            batches = torch.arange(mask.shape[0], device=device).view(-1, 1, 1, 1)
            index = (
                batches,
                heads if mask.shape[1] > 1 else heads.new_zeros(()),
                rows if mask.shape[2] > 1 else rows.new_zeros(()),
                keys if mask.shape[3] > 1 else torch.zeros_like(keys),
            )
            bias = _as_bias(mask[index])
        if self.mask_mod is not None:
            batches = torch.arange(keys.shape[0] if keys.shape[0] > 1 else 1, device=device).view(-1, 1, 1, 1)
            allowed = self.mask_mod(batches + self.batch_offset, heads + self.head_offset, rows + self.row_offset, keys)
            mod_bias = _as_bias(allowed)
            bias = mod_bias if bias is None else bias + mod_bias
        return bias

    def allowed(self, keys: Tensor, num_heads: int) -> Tensor:
        """Whether each edge to ``keys`` ``[B or 1, G, N, C]`` is allowed for at least one query head of the graph
        head. Returns: bool, broadcastable with ``keys``.

        The caller makes ``keys`` full in the batch dimension if ``mask_mod`` may depend on it (see `Router`).
        """
        allowed = self.structural(keys)
        bias = self.explicit_bias(keys, num_heads)
        if bias is not None:
            open_edge = bias > float("-inf")
            heads = keys.shape[1]
            if open_edge.shape[1] > heads:
                open_edge = open_edge.unflatten(1, (heads, -1)).any(dim=2)
            allowed = allowed & open_edge
        return allowed


def _lookup(table: Tensor, keys: Tensor) -> Tensor:
    """``table`` ``[B or 1, M]`` at ``keys`` ``[B or 1, X, N, C]``."""
    if table.shape[0] == 1:
        return table[0][keys.long()]
    batches = torch.arange(table.shape[0], device=keys.device).view(-1, 1, 1, 1)
    return table[batches, keys.long()]


def _as_bias(mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    zero = torch.zeros((), device=mask.device)
    return torch.where(mask, zero, zero - float("inf"))


def normalize_attn_mask(
    mask: Tensor,
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    two_dims: Literal["queries", "unambiguous"] = "queries",
) -> tuple[Tensor | None, Tensor | None]:
    """Bring a mask into one of two forms.

    Args:
        mask: bool (True = attend) or additive floating point of shape ``[B, M]``, ``[N, M]`` or anything that
            broadcasts to ``[B, H, N, M]`` with four dimensions.
        two_dims: how to read a two-dimensional mask when B = N: as ``[N, M]`` like
            `torch.nn.functional.scaled_dot_product_attention`, or as an error.

    Returns: ``(key_keep [B, M], attn_mask [B or 1, H or 1, N or 1, M or 1])``, one of them ``None``.

    Raises:
        MaskError: the shape fits nothing, or fits two readings. DtypeError: neither bool nor floating point.
    """
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise DtypeError(f"attn_mask must be bool (True = attend) or floating point (added), got {mask.dtype}")
    shape = tuple(mask.shape)
    accepted = f"[B, M] = [{batch}, {keys}], [N, M] = [{queries}, {keys}] or [B or 1, H or 1, N or 1, M or 1]"
    if mask.dim() == 2:
        per_query, per_batch = shape == (queries, keys), shape == (batch, keys)
        if per_query and per_batch and queries > 1 and two_dims == "unambiguous":
            raise MaskError(
                f"attention_mask {list(shape)} could be [B, M] or [N, M], since B = N = {queries}; "
                f"pass mask[:, None, None, :] or mask[None, None] to say which"
            )
        if per_query:
            return None, mask[None, None]
        if per_batch:
            return (mask, None) if mask.dtype == torch.bool else (None, mask[:, None, None, :])
    elif mask.dim() == 4 and all(n in (1, full) for n, full in zip(shape, (batch, heads, queries, keys), strict=True)):
        if mask.dtype == torch.bool and shape[1] == 1 and shape[2] == 1 and shape[3] == keys:
            return mask[:, 0, 0, :], None
        return None, mask
    raise MaskError(f"attn_mask of shape {list(shape)} fits nothing; accepted: {accepted}")


def split_key_bias(bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores of keys, ``[B, M]``, as a bool mask (True = a real key) if it is only 0 and -inf,
    which needs no look-up per edge; else as a bias ``[B, 1, 1, M]``."""
    if not bias.requires_grad and bool(((bias == 0) | (bias == float("-inf"))).all()):
        return bias == 0, None
    return None, bias[:, None, None, :]


def add_key_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask (bool: True = attend, or additive) and a bias as one."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias


def make_edge_mask(
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    device: torch.device,
    causal: bool = False,
    query_positions: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    mask_mod: MaskMod | None = None,
    two_dims: Literal["queries", "unambiguous"] = "queries",
) -> EdgeMask:
    """Validate everything that restricts edges and put it into one `EdgeMask`.

    Args:
        query_positions: integer ``[N]`` or ``[B or 1, N]``; left out, ``arange(N)``.
        attn_mask: see `normalize_attn_mask`.
        key_padding_mask: bool ``[B, M]``, True = a real key.
        segment_ids: integer ``[B or 1, N]`` for self-attention, or a pair for queries and keys.
        mask_mod: predicate, see `MaskMod`.

    Raises:
        MaskError, ShapeError, DtypeError: with what was expected and what came.
    """
    positions, offset = _query_positions(query_positions, batch, queries, device)
    keep, explicit = (None, None)
    if attn_mask is not None:
        keep, explicit = normalize_attn_mask(
            _on(device, attn_mask, "attn_mask"),
            batch=batch,
            heads=heads,
            queries=queries,
            keys=keys,
            two_dims=two_dims,
        )
    if key_padding_mask is not None:
        padding = _on(device, key_padding_mask, "key_padding_mask")
        if padding.dtype != torch.bool:
            raise DtypeError(f"key_padding_mask must be bool (True = a real key), got {padding.dtype}")
        if padding.dim() != 2 or padding.shape[0] not in (1, batch) or padding.shape[1] != keys:
            raise MaskError(f"key_padding_mask must have shape [B, M] = [{batch}, {keys}], got {list(padding.shape)}")
        keep = padding if keep is None else keep & padding
    query_segments, key_segments = _segments(segment_ids, batch, queries, keys, device)
    if mask_mod is not None:
        _check_mask_mod(mask_mod, device, empty=0 in (batch, heads, queries, keys))
    return EdgeMask(
        causal=bool(causal),
        positions=positions,
        offset=offset,
        key_keep=keep,
        query_segments=query_segments,
        key_segments=key_segments,
        attn_mask=explicit,
        mask_mod=mask_mod,
    )


def _check_mask_mod(mask_mod: MaskMod, device: torch.device, empty: bool) -> None:
    if not callable(mask_mod):
        raise MaskError(f"mask_mod must be a function (b, h, q_idx, kv_idx) -> bool, got {type(mask_mod).__name__}")
    if empty:
        return
    first = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    allowed = mask_mod(first, first, first, first)
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        raise MaskError(f"mask_mod must return a bool tensor, got {getattr(allowed, 'dtype', type(allowed).__name__)}")


def _on(device: torch.device, tensor: Any, what: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise MaskError(f"{what} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise MaskError(f"{what} is on {tensor.device}, query and key are on {device}")
    return tensor


def _query_positions(
    positions: Tensor | None, batch: int, queries: int, device: torch.device
) -> tuple[Tensor, int | None]:
    if positions is None:
        return torch.arange(queries, dtype=torch.int32, device=device)[None], 0
    positions = _on(device, positions, "query_positions")
    if positions.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"query_positions must be integers, got {positions.dtype}")
    if positions.dim() == 1:
        positions = positions[None]
    if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != queries:
        raise ShapeError(
            f"query_positions must have shape [N] = [{queries}] or [B, N] = [{batch}, {queries}], "
            f"got {list(positions.shape)}"
        )
    if queries == 0:
        return positions.to(torch.int32), 0
    if int(positions.min()) < 0:
        raise ShapeError(f"query_positions must be >= 0, got {int(positions.min())}")
    first = int(positions[0, 0])
    regular = bool((positions == torch.arange(queries, device=device) + first).all())
    return positions.to(torch.int32), first if regular else None


def _segments(
    segment_ids: Tensor | tuple[Tensor, Tensor] | None, batch: int, queries: int, keys: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise MaskError(f"segment_ids must be one tensor or a pair (query, key), got {len(pair)} tensors")
    checked = []
    for name, ids, length in (("queries", pair[0], queries), ("keys", pair[1], keys)):
        ids = _on(device, ids, "segment_ids")
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise DtypeError(f"segment_ids must be integers, got {ids.dtype}")
        if ids.dim() == 1:
            ids = ids[None]
        if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
            raise MaskError(
                f"segment_ids of the {name} must have shape [B, {length}] = [{batch}, {length}], "
                f"got {list(ids.shape)}; for N != M pass a pair (query_ids, key_ids)"
            )
        checked.append(ids)
    return checked[0], checked[1]
