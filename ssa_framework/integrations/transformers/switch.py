"""`use_sparse_attention`: make a model of transformers sparse, and dense again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import nn

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.integrations.transformers.attention import (
    IMPLEMENTATION,
    Decode,
    SparseLayer,
    attach,
    attached,
    detach,
)
from ssa_framework.integrations.transformers.modules import AttentionModule, distinct_configs, self_attention
from ssa_framework.ops.neighbor_attention.api import check_backend
from ssa_framework.registry import SourceRegistry
from ssa_framework.router import Router

SourceMix = Mapping[str, Mapping[str, Any]]
Choice = SSAConfig | SourceMix | str | Path
"""A configuration, a mapping from source names to their options, the name of a preset, or the path of a JSON file."""


@dataclass
class _Switched:
    """A transformers configuration that says `IMPLEMENTATION` now, and what it said before."""

    config: Any
    previous: str | None
    users: int


_switched: dict[int, _Switched] = {}  # by id of the configuration: models may share one
_lock = threading.Lock()


class SparseAttentionHandle:
    """What `use_sparse_attention` returns. As a context manager it undoes at the end of the block.

    Attributes:
        model: the model.
        layers: for each layer index, its configuration, or ``"dense"``.
    """

    def __init__(self, model: nn.Module, layers: Mapping[int, SSAConfig | Literal["dense"]], configs: list[Any]):
        self.model = model
        self.layers = dict(layers)
        # where the model is thrown away without undo(), its configurations are not kept for ever
        self._release = weakref.finalize(model, _switch_back, configs)
        self._release.atexit = False

    def undo(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        if not self._release.alive:
            return
        for module in self.model.modules():
            if attached(module) is not None:
                detach(module)
        self._release()

    def reconfigure(self, layer: str, config: Choice) -> None:
        """Give one sparse layer another configuration from the next call on, such as a larger budget where an audit
        says that it misses too much.

        Args:
            layer: name of the attention module, as an `AuditReport` says it. config: see `use_sparse_attention`.

        Raises:
            ConfigError: no sparse layer of that name, or a configuration that differs from layer to layer.
        """
        sparse = {held.name: (m, held) for m in self.model.modules() if (held := attached(m)) is not None}
        if layer not in sparse:
            raise ConfigError(f"{layer!r} is no sparse layer; those that are: {', '.join(sparse) or 'none'}")
        chosen = _config(config)
        if chosen.layers is not None:
            raise ConfigError("one layer gets one configuration; pass config.for_layer(index)")
        check_backend(chosen.backend)
        module, held = sparse[layer]
        Router(chosen, registry=held.registry)  # its errors, now
        held.reconfigure(chosen)
        index = next(a.index for a in self_attention(self.model) if a.module is module)
        self.layers[index] = chosen

    def __enter__(self) -> SparseAttentionHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        dense = [index for index, layer in self.layers.items() if isinstance(layer, str)]
        return (
            f"{type(self).__name__}({type(self.model).__name__}: {len(self.layers) - len(dense)} of "
            f"{len(self.layers)} layers sparse, dense: {dense})"
        )


def use_sparse_attention(
    model: nn.Module,
    config: Choice,
    *,
    dense_layers: Iterable[int] | None = None,
    layers: Mapping[int, Choice] | None = None,
    decode: Decode = "sparse",
    registry: SourceRegistry | None = None,
) -> SparseAttentionHandle:
    """Let the self-attention of a transformers model attend to neighbor graphs, on the weights that it has.

    Layers with a sliding window, cross-attention and the vision or audio part of a model keep dense attention, as do
    ``dense_layers``. What is dense is computed by transformers' ``sdpa`` function.

    Args:
        model: any model of transformers that goes through `transformers.AttentionInterface`.
        config: for all sparse layers: a configuration, a mapping from source names to options, the name of a preset,
            or the path of a JSON configuration (``*.json``), such as ``ssa tune`` writes. Its sizes, ``causal``,
            ``dropout`` and ``rope_base`` are not used; the model says them. Its ``layers`` are honoured.
        dense_layers: indices of layers that stay dense; negative ones count from the end. Left out: layer 0, or none
            where the configuration has ``layers``.
        layers: for single layers, another configuration, or ``"dense"``; wins over ``dense_layers``. In a model with
            an encoder and a decoder, index i is layer i of both.
        decode: how new tokens behind cached keys attend. ``"sparse"``: as in a prompt of the same tokens; what the
            sources keep of the keys stays beside them in the cache. ``"dense"``: up to 16 of them attend all keys.
            ``"rebuild"``: as ``"sparse"``, but every source starts anew in each step, whatever cache there is.
        registry: where source names are looked up.

    Returns:
        A handle: ``undo()`` it, or use it in a ``with`` statement.

    Raises:
        ConfigError: the model computes something that sparse attention does not (soft-capping, attention sinks,
            a position bias), is sparse already, or no layer would be; an index or ``decode`` out of range.
        UnknownSourceError, UnknownOptionError: as for any layer.
    """
    if decode not in get_args(Decode):
        raise ConfigError(f"decode must be one of {', '.join(map(repr, get_args(Decode)))}, got {decode!r}")
    modules = self_attention(model)
    if any(attached(attention.module) is not None for attention in modules):
        raise ConfigError(f"{type(model).__name__} is sparse already; undo() its handle first")
    chosen = _choose(modules, config, dense_layers, layers or {})
    prepared = []
    for attention in modules:
        choice = chosen[attention.index]
        if isinstance(choice, SSAConfig):
            check_backend(choice.backend)
            layer = SparseLayer(attention.name, choice, decode, registry)
            layer.router(*attention.heads, attention.is_causal, _device(attention.module))  # its errors, now
            prepared.append((attention.module, layer))
    configs = distinct_configs(modules)
    for module, layer in prepared:
        attach(module, layer)
    _switch(configs)
    return SparseAttentionHandle(model, chosen, configs)


def _choose(
    modules: list[AttentionModule], config: Choice, dense_layers: Iterable[int] | None, layers: Mapping[int, Choice]
) -> dict[int, SSAConfig | Literal["dense"]]:
    """For each layer index, its configuration or ``"dense"``."""
    indices = sorted({attention.index for attention in modules})
    local = {attention.index for attention in modules if attention.is_local}
    default = _config(config)
    if dense_layers is None:
        dense_layers = (0,) if default.layers is None else ()
    dense = {_index(i, indices, "dense_layers") for i in dense_layers}
    for i in default.layers or ():
        _index(i, indices, "layers of the configuration")
    chosen: dict[int, SSAConfig | Literal["dense"]] = {}
    for index in indices:
        own = default.for_layer(index)
        chosen[index] = "dense" if index in local | dense or own.is_dense else own
    for i, choice in layers.items():
        index = _index(i, indices, "layers")
        if index not in indices:
            raise ConfigError(f"layers[{i}]: this layer has no attention of its own; those that have: {indices}")
        if isinstance(choice, str) and choice == "dense":
            chosen[index] = "dense"
        elif index in local:
            raise ConfigError(f"layers[{i}]: this layer attends a sliding window or chunks, and stays dense")
        else:
            own = _config(choice).for_layer(index)
            chosen[index] = "dense" if own.is_dense else own
    if all(isinstance(choice, str) for choice in chosen.values()):
        raise ConfigError(
            f"no layer would be sparse: of {len(indices)} layers, {len(local)} attend a sliding window or chunks and "
            f"stay dense, dense_layers={sorted(dense)}, layers={dict(layers)}"
        )
    return chosen


def _config(choice: Choice) -> SSAConfig:
    if isinstance(choice, SSAConfig):
        return choice
    if isinstance(choice, Path) or (isinstance(choice, str) and choice.endswith(".json")):
        return SSAConfig.from_json(Path(choice))
    if isinstance(choice, str):
        return SSAConfig.preset(choice)
    if isinstance(choice, Mapping):
        return SSAConfig(sources=choice)
    raise ConfigError(f"expected an SSAConfig, a mapping of sources or the name of a preset, got {choice!r}")


def _index(index: int, indices: list[int], where: str) -> int:
    count = indices[-1] + 1
    if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
        raise ConfigError(f"{where}: layer {index!r} does not exist; the model has layers 0 to {count - 1}")
    return index % count


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def _switch(configs: list[Any]) -> None:
    with _lock:
        for config in configs:
            entry = _switched.setdefault(id(config), _Switched(config, config._attn_implementation, 0))
            entry.users += 1
            config._attn_implementation = {"": IMPLEMENTATION}  # as a mapping: what it holds for other parts stays


def _switch_back(configs: list[Any]) -> None:
    with _lock:
        for config in configs:
            entry = _switched[id(config)]
            entry.users -= 1
            if not entry.users:
                config._attn_implementation = {"": entry.previous}
                del _switched[id(config)]
