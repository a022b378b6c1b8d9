"""Routers for calls without a layer, made once for each configuration and shape, and kept."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

from torch import Tensor

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.registry import SourceRegistry, default_registry
from ssa_framework.router import Router

_ROUTER_CACHE_SIZE = 32
_routers: OrderedDict[tuple[Any, ...] | None, Router] = OrderedDict()
_routers_lock = threading.Lock()


def functional_router(
    config: SSAConfig, query: Tensor, key: Tensor, causal: bool, registry: SourceRegistry | None
) -> Router:
    """A router for these heads on this device; its buffers follow from the seed, so it can be kept and shared.

    Args:
        query: ``[B, H, N, D]``. key: ``[B, Hkv, M, D]``.

    Raises:
        ConfigError: a source has parameters of its own.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    config = config.replace(
        d_model=heads * query.shape[-1], num_heads=heads, num_kv_heads=kv_heads, causal=causal, rope_base=None
    )
    registry = default_registry() if registry is None else registry
    try:
        classes = tuple(registry.get(name) for name in config.source_mix)
        cache_key = (json.dumps(vars(config)), str(query.device), classes)
    except TypeError:  # options that hold tensors (explicit edges) are not worth comparing
        cache_key = None
    with _routers_lock:
        if cache_key in _routers:
            _routers.move_to_end(cache_key)
            return _routers[cache_key]
    router = Router(config, registry=registry).to(query.device)
    router.eval()
    if any(parameter.requires_grad for parameter in router.parameters()):
        raise ConfigError(
            "a source of this mix has parameters of its own, which a function has no place for; use SparseAttention"
        )
    if cache_key is None:
        return router
    with _routers_lock:
        _routers[cache_key] = router
        while len(_routers) > _ROUTER_CACHE_SIZE:
            _routers.popitem(last=False)
    return router
