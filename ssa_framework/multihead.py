"""`SparseMultiheadAttention`: `torch.nn.MultiheadAttention` over a neighbor graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssa_framework import compiled
from ssa_framework.attention import check_given_graph
from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError, DtypeError, MaskError, ShapeError
from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import MaskMod, add_key_bias, make_edge_mask, split_key_bias
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.ops.neighbor_attention.api import check_backend
from ssa_framework.registry import SourceRegistry
from ssa_framework.rotary import rotate
from ssa_framework.router import Router

_NEEDS_WEIGHTS = (
    "need_weights=True asks for a dense N x M matrix, which sparse attention never makes; pass need_weights=False, "
    "and build_graph(query, key) for the neighbors of every query"
)


class SparseMultiheadAttention(nn.MultiheadAttention):
    """A drop-in for `torch.nn.MultiheadAttention`: same constructor, same call, same state dict keys.

    Two things differ. ``need_weights`` is ``False`` by default, and a query that may attend nothing (all of its keys
    are padding) gets the output bias instead of NaN.

    Self-attention uses every source of the mix, cross-attention leaves out those that compare positions (self,
    window). A call is self-attention where ``key`` is the very same tensor as ``query``, as in torch's own layers;
    say ``cross`` where that does not hold (``key`` is a copy of ``query``, or ``query`` got a position embedding of
    its own).

    The buffers of the sources follow from ``config.seed`` and stay out of the state dict, so that it can be loaded
    from and into `torch.nn.MultiheadAttention` with ``strict=True``. A source with parameters has no such
    counterpart and stays in.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as in torch.
        add_bias_kv, add_zero_attn: must be ``False``: they add keys that no source could propose.
        config: source mix and budget; its ``d_model``, ``num_heads`` and ``dropout`` come from this module. With
            ``causal=True`` self-attention is causal whatever the call says. `SSAConfig()` if left out.
        registry: where source names are looked up; the default registry if left out.
        cross: whether queries and keys are different sequences, for every call; ``None`` = see above.

    Raises:
        ConfigError: also for a device ``"meta"`` where a source has buffers, which nothing would fill later.
    """

    router: Router

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: SSAConfig | None = None,
        registry: SourceRegistry | None = None,
        cross: bool | None = None,
    ) -> None:
        if add_bias_kv or add_zero_attn:
            raise ConfigError("add_bias_kv and add_zero_attn add keys that no source could propose; leave them False")
        config = _module_config(config, embed_dim, num_heads, dropout)
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self._make_sparse(config, registry, cross)

    @classmethod
    def from_dense(
        cls,
        dense: nn.MultiheadAttention,
        config: SSAConfig | None = None,
        *,
        registry: SourceRegistry | None = None,
        cross: bool | None = None,
    ) -> SparseMultiheadAttention:
        """A sparse module on the very same parameters, output projection, hooks and mode as ``dense``.

        Raises:
            ConfigError: ``dense`` computes something that this class would not; says what.
        """
        obstacle = _obstacle(dense)
        if obstacle is not None:
            raise ConfigError(obstacle)
        config = _module_config(config, dense.embed_dim, dense.num_heads, dense.dropout)
        module = cls.__new__(cls)
        # All of the state is shared, hook tables included (their handles keep working), but not the tables that
        # get a new entry here.
        module.__dict__.update(dense.__dict__)
        module.__dict__["_modules"] = dense._modules.copy()
        module.__dict__["_parameters"] = dense._parameters.copy()
        module.__dict__["_buffers"] = dense._buffers.copy()
        module._make_sparse(config, registry, cross)
        return module

    def _make_sparse(self, config: SSAConfig, registry: SourceRegistry | None, cross: bool | None) -> None:
        check_backend(config.backend)
        # torch's encoder layers read this flag, and where it is True compute dense attention from our weights in
        # eval mode, without calling forward.
        self._qkv_same_embed_dim = False
        self.config = config
        self.cross = cross
        weight = self.out_proj.weight
        dtype = weight.dtype if weight.is_floating_point() else None
        router = Router(config, registry=registry).to(device=weight.device, dtype=dtype)
        for name, source in router.sources.items():
            if any(True for _ in source.parameters()):
                continue
            for part in source.modules():
                part._non_persistent_buffers_set.update(part._buffers)
            if any(buffer.is_meta for buffer in source.buffers()):
                raise ConfigError(
                    f"the buffers of source {name!r} follow from the seed and are in no state dict, so they can't be "
                    f"filled later: build this module on a real device, not on 'meta'"
                )
        self.router = router.train(self.training)

    def _reset_parameters(self) -> None:
        # torch's version asks the flag, not the weights, which of them exist.
        self._qkv_same_embed_dim = self._packed
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def build_graph(
        self,
        query: Tensor,
        key: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        cross: bool | None = None,
        **graph_options: Any,
    ) -> NeighborGraph:
        """The graph that `forward` would use; same arguments."""
        self._check_inputs(query=query, key=key)
        q, k, _ = self._project(query, key, None, self._is_cross(query, key, cross))
        return self._route(
            q,
            k,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
            cross=self._is_cross(query, key, cross),
            **graph_options,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cross: bool | None = None,
        graph: NeighborGraph | None = None,
        **graph_options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``[N, B, embed_dim]``, ``[B, N, embed_dim]`` if ``batch_first``, or ``[N, embed_dim]``.
            key: ``[M, B, kdim]`` and so on. value: ``[M, B, vdim]`` and so on.
            key_padding_mask: ``[B, M]`` (``[M]`` unbatched): bool, **True = ignore this key**, as in torch and
                unlike the rest of this project; or floating point, added to the scores.
            need_weights: must be ``False``.
            attn_mask: ``[N, M]`` or ``[B·H, N, M]``: bool, **True = not allowed**; or floating point, added.
            average_attn_weights: has no effect without weights, as in torch.
            is_causal: no key after its query; first query and first key are lined up. As in torch it promises that
                ``attn_mask`` is the causal mask, which is then not looked at; unlike there it may be left out.
            cross: see the class; ``None`` = as constructed.
            graph: apply this graph instead of building one; masks then belong to `build_graph`.
            graph_options: ``segment_ids``, ``mask_mod``, ``source_inputs``; see `ssa_framework.build_graph`.

        Returns:
            The output, shaped like ``query``, and ``None`` for the weights.

        Raises:
            ConfigError: weights were asked for. ShapeError, DtypeError, MaskError, and what the router raises.
        """
        if need_weights:
            raise ConfigError(_NEEDS_WEIGHTS)
        self._check_inputs(query=query, key=key, value=value)
        cross = self._is_cross(query, key, cross)
        q, k, v = self._project(query, key, value, cross)
        assert v is not None
        if torch.compiler.is_compiling() and graph is None and compiled.serves(graph_options):
            out = self._attend_compiled(q, k, v, key_padding_mask, attn_mask, is_causal, cross, graph_options)
            return self._merge_heads(out, unbatched=query.dim() == 2), None
        if graph is None:
            graph = self._route(
                q,
                k,
                key_padding_mask=key_padding_mask,
                attn_mask=attn_mask,
                is_causal=is_causal,
                cross=cross,
                **graph_options,
            )
        else:
            padding = {} if key_padding_mask is None else {"key_padding_mask": key_padding_mask}
            check_given_graph(graph, attn_mask, is_causal, {**graph_options, **padding})
        self.router.audit(q, k, graph)
        out, _ = neighbor_attention(
            q,
            k,
            v,
            graph,
            dropout_p=self.dropout if self.training else 0.0,
            fp32_weights=self.config.fp32_attn_weights,
            backend=self.config.backend,
            dense=self.config.dense_below != 0,
        )
        return self._merge_heads(out, unbatched=query.dim() == 2), None

    def _attend_compiled(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        cross: bool,
        graph_options: Mapping[str, Any],
    ) -> Tensor:
        batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        scores_mask = _scores_mask(attn_mask, batch, heads, queries, keys, ignored=is_causal)
        keep, key_bias = _key_mask(key_padding_mask, batch, keys)
        if key_bias is not None and key_bias.requires_grad:
            scores_mask, key_bias = add_key_bias(scores_mask, key_bias[:, None, None, :]), None
        options = compiled.mask_options(graph_options) | {"key_padding_mask": keep, "key_bias": key_bias}
        call = compiled.AttentionCall(
            causal=is_causal or (self.config.causal and not cross),
            attn_mask=scores_mask,
            cross=cross,
            dropout_p=self.dropout if self.training else 0.0,
            fp32_weights=self.config.fp32_attn_weights,
            backend=self.config.backend,
            dense=self.config.dense_below != 0,
            **options,
        )
        return compiled.attend(self.router, q, k, v, call)

    def _merge_heads(self, out: Tensor, unbatched: bool) -> Tensor:
        """``[B, H, N, D]`` → the output, in the layout of the input."""
        merged: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        if unbatched:
            return merged[0]
        return merged if self.batch_first else merged.transpose(0, 1)

    @property
    def _packed(self) -> bool:
        """Whether the three input projections are one parameter, ``in_proj_weight``, as torch decides it."""
        return self.kdim == self.vdim == self.embed_dim

    def _is_cross(self, query: Tensor, key: Tensor, cross: bool | None) -> bool:
        if cross is None:
            cross = self.cross
        return key is not query if cross is None else cross

    def _check_inputs(self, **inputs: Tensor) -> None:
        """Check ``query``, ``key`` and, if there is one, ``value``."""
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        query, key = inputs["query"], inputs["key"]
        for name, x in inputs.items():
            if not isinstance(x, Tensor):
                raise DtypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.is_nested:
                raise ShapeError(
                    f"{name} is a nested tensor; pass a padded one with key_padding_mask (in torch.nn."
                    f"TransformerEncoder: use_nested_tensor = False, which convert() sets)"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != widths[name]:
                layout = "[batch, length, width]" if self.batch_first else "[length, batch, width]"
                raise ShapeError(
                    f"{name} must have shape {layout}, or [length, width] as all of query, key and value, with "
                    f"width {widths[name]}; got {list(x.shape)}"
                )
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            raise ShapeError(f"batch sizes differ: query {query.shape[batch_dim]}, key {key.shape[batch_dim]}")
        value = inputs.get("value", key)
        if key.shape[:-1] != value.shape[:-1]:
            raise ShapeError(
                f"key and value must agree in batch and length, got {list(key.shape)} and {list(value.shape)}"
            )

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor | None, cross: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``q [B, H, N, D]``, ``k [B, H, M, D]``, ``v [B, H, M, D]``."""
        v: Tensor | None = None
        if query is key and key is value and self._packed:
            packed = F.linear(self._batch_leads(query), self.in_proj_weight, self.in_proj_bias)
            q, k, v = (self._split_heads(x) for x in packed.chunk(3, dim=-1))
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = self.in_proj_weight.chunk(3) if self._packed else separate
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q = self._split_heads(F.linear(self._batch_leads(query), weights[0], biases[0]))
            k = self._split_heads(F.linear(self._batch_leads(key), weights[1], biases[1]))
            if value is not None:
                v = self._split_heads(F.linear(self._batch_leads(value), weights[2], biases[2]))
        if self.config.rope_base is not None and not cross:
            q, k = (rotate(x, torch.arange(x.shape[2], device=x.device), self.config.rope_base) for x in (q, k))
        return q, k, v

    def _batch_leads(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _route(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        cross: bool,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        mask_mod: MaskMod | None = None,
        source_inputs: Mapping[str, Any] | None = None,
    ) -> NeighborGraph:
        batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        scores_mask = _scores_mask(attn_mask, batch, heads, queries, keys, ignored=is_causal)
        keep, key_bias = _key_mask(key_padding_mask, batch, keys)
        if key_bias is not None:  # torch's encoder makes one of a bool mask before it calls us
            keep, key_bias = split_key_bias(key_bias)
        mask = make_edge_mask(
            batch=batch,
            heads=heads,
            queries=queries,
            keys=keys,
            device=q.device,
            causal=is_causal or (self.config.causal and not cross),
            attn_mask=add_key_bias(scores_mask, key_bias),
            key_padding_mask=keep,
            segment_ids=segment_ids,
            mask_mod=mask_mod,
        )
        graph: NeighborGraph = self.router(q, k, mask, cross=cross, source_inputs=source_inputs)
        return graph


def _module_config(config: SSAConfig | None, embed_dim: int, num_heads: int, dropout: float) -> SSAConfig:
    """``config`` with the sizes and the dropout of the module; contradictions are errors."""
    config = SSAConfig() if config is None else config
    if config.kv_heads != config.num_heads:
        raise ConfigError(
            f"num_kv_heads={config.num_kv_heads!r}: torch.nn.MultiheadAttention has a key/value head for every query "
            f"head; use SparseAttention for grouped queries"
        )
    if config.dropout not in (0.0, dropout):
        raise ConfigError(
            f"config.dropout={config.dropout!r} contradicts dropout={dropout!r} of the module; leave it at 0.0"
        )
    return config.replace(d_model=embed_dim, num_heads=num_heads, num_kv_heads=None, dropout=dropout)


def _obstacle(dense: nn.MultiheadAttention) -> str | None:
    """Why ``dense`` can't become sparse on the same parameters, or ``None``."""
    if type(dense) is not nn.MultiheadAttention:
        return f"{type(dense).__name__} is not torch.nn.MultiheadAttention itself, its own behaviour would be lost"
    if "forward" in vars(dense):
        return "its forward was replaced on the instance (by a wrapper), and would be lost"
    if dense.bias_k is not None or dense.bias_v is not None or dense.add_zero_attn:
        return "add_bias_kv and add_zero_attn add keys that no source could propose"
    missing = [
        name
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
        if name not in dense._parameters
    ]
    if missing:
        return f"{', '.join(missing)} is no plain parameter (pruned or normalised); make that permanent first"
    return None


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise MaskError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DtypeError(f"{name} must be bool (True = not attended) or floating point (added), got {mask.dtype}")


def _scores_mask(
    mask: Tensor | None, batch: int, heads: int, queries: int, keys: int, *, ignored: bool
) -> Tensor | None:
    """torch's ``attn_mask`` as ours (bool: True = attend), ``[B or 1, H or 1, N, M]``."""
    if mask is None:
        return None
    _check_mask_dtype("attn_mask", mask)
    if mask.shape == (queries, keys):
        mask = mask[None, None]
    elif mask.shape == (batch * heads, queries, keys):
        mask = mask.unflatten(0, (batch, heads))
    else:
        raise MaskError(
            f"attn_mask must have shape [N, M] = [{queries}, {keys}] or [B·H, N, M] = [{batch * heads}, {queries}, "
            f"{keys}], got {list(mask.shape)}"
        )
    if ignored:
        return None
    return ~mask if mask.dtype == torch.bool else mask


def _key_mask(mask: Tensor | None, batch: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """torch's ``key_padding_mask`` as ours (bool ``[B, M]``, True = a real key), or as a bias ``[B, M]``."""
    if mask is None:
        return None, None
    _check_mask_dtype("key_padding_mask", mask)
    if mask.dim() == 1 and batch == 1:
        mask = mask[None]
    if mask.shape != (batch, keys):
        raise MaskError(f"key_padding_mask must have shape [B, M] = [{batch}, {keys}], got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return ~mask, None
    return None, mask
