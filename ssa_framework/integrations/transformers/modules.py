"""Which modules of a model attend, and what stands in the way of making them sparse."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ssa_framework.errors import ConfigError

_CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn|encdec", re.IGNORECASE)


@dataclass(frozen=True)
class AttentionModule:
    """One self-attention module.

    Attributes:
        name: as in ``model.named_modules()``. index: of its layer.
        module: itself. config: its transformers configuration.
    """

    name: str
    index: int
    module: nn.Module
    config: Any

    @property
    def is_local(self) -> bool:
        """Whether the layer attends a sliding window or a chunk."""
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is not None and self.index < len(layer_types):
            return layer_types[self.index] not in ("full_attention", "hybrid")
        return getattr(self.config, "sliding_window", None) is not None

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads and head dim that the configuration says."""
        heads = self.config.num_attention_heads
        kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        return heads, kv_heads, getattr(self.config, "head_dim", None) or self.config.hidden_size // heads

    @property
    def is_causal(self) -> bool:
        return bool(getattr(self.module, "is_causal", True))


def self_attention(model: nn.Module) -> list[AttentionModule]:
    """The self-attention modules of the text part of a model, in order.

    Raises:
        ConfigError: there is none that goes through `transformers.AttentionInterface`, or one that computes something
            that sparse attention does not.
    """
    parent = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if parent is None:
        raise ConfigError(
            f"use_sparse_attention takes a model of transformers, got {type(model).__name__}; for models made of "
            f"torch.nn.MultiheadAttention use ssa_framework.convert"
        )
    text_config = type(parent.config.get_text_config())
    found = [
        AttentionModule(name, _layer_index(name, module), module, module.config)
        for name, module in model.named_modules()
        if type(getattr(module, "config", None)) is text_config
        and _dispatches(module)
        and not _is_cross_attention(name, module)
    ]
    if not found:
        raise ConfigError(
            f"{type(parent).__name__} has no attention that goes through transformers.AttentionInterface, so it can't "
            f"be replaced"
        )
    for attention in found:
        _check(attention)
    return found


def _dispatches(module: nn.Module) -> bool:
    """Whether the forward pass looks its attention function up in transformers' table."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or _CROSS_ATTENTION.search(name) is not None


def _layer_index(name: str, module: nn.Module) -> int:
    """The module's own ``layer_idx``, or the last number in its name (encoders often have no ``layer_idx``)."""
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        return index
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", "." + name)
    return int(numbers[-1]) if numbers else 0


def _check(attention: AttentionModule) -> None:
    module, config = attention.module, attention.config
    reason = None
    if getattr(module, "attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None)) is not None:
        reason = (
            "caps the scores (attn_logit_softcapping), which sparse attention does not compute; set "
            "attn_logit_softcapping=None in the configuration before the model is built, if you accept other logits"
        )
    elif getattr(module, "sinks", None) is not None:
        reason = (
            "has attention sinks (an extra logit per head), which sparse attention does not compute; leave this "
            "model dense"
        )
    elif hasattr(module, "has_relative_attention_bias") or hasattr(module, "relative_attention_bias"):
        reason = (
            "adds a learned position bias to the scores, as T5 does, which sparse attention does not compute; leave "
            "this model dense"
        )
    if reason is not None:
        raise ConfigError(f"{attention.name} ({type(module).__name__}) {reason}")


def distinct_configs(modules: list[AttentionModule]) -> list[PreTrainedConfig]:
    return list({id(attention.config): attention.config for attention in modules}.values())
