"""Models of transformers with random weights, small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from ssa_framework import SSAConfig
from ssa_framework.laboratory.models import cache_name

VOCABULARY, LENGTH = 97, 65
CACHE = cache_name(transformers.LlamaForCausalLM)
"""What this version of transformers calls a cache."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_HYBRID = {**_SIZES, "head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SIZES),
    "qwen2": ("Qwen2", _SIZES),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 24}),
    "qwen3-window": (
        "Qwen3",
        {**_HYBRID, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": None}),
    "gemma2-window": (
        "Gemma2",
        {**_HYBRID, "attn_logit_softcapping": None, "query_pre_attn_scalar": 50},
    ),
    "gemma3-window": ("Gemma3", {**_HYBRID, "query_pre_attn_scalar": 50}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
         "scale_attn_by_inverse_layer_idx": True},
    ),
}  # fmt: skip
CAUSAL = tuple(_MODELS)


def causal_lm(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """In eval mode, without dropout, and with weights large enough that attention is not uniform."""
    family, options = _MODELS[name]
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = config_class(**{**options, **tokens, **changes})
    model_class = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    return sharpen(model_class(config))


def bert(**changes: Any) -> transformers.PreTrainedModel:
    sizes = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
    return sharpen(transformers.BertForMaskedLM(transformers.BertConfig(**{**sizes, **changes})))


def bart() -> transformers.PreTrainedModel:
    sides = ("encoder", "decoder")
    sizes = {
        f"{side}_{what}": n for side in sides for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
    }
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=64, max_position_embeddings=256, **sizes)
    return sharpen(transformers.BartForConditionalGeneration(config))


def sharpen(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.eval()


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))


def everything(source: str, **changes: Any) -> SSAConfig:
    """A mix that holds every key, computed over the graph rather than densely."""
    sources = {"topk": {"topk": {}}, "window": {"window": {"size": 1000}}}[source]
    return SSAConfig(**{"sources": sources, "num_neighbors": 256, "dense_below": 0, **changes})


def sparse_mix(**changes: Any) -> SSAConfig:
    """A mix that leaves most keys of a hundred or more out."""
    sources = {
        "self": {},
        "window": {"size": 4},
        "global": {"tokens": 2},
        "clusters": {"levels": [[16, 4]], "keys": 12},
        "lsh": {"rounds": 2, "candidates": 8},
    }
    return SSAConfig(**{"sources": sources, "num_neighbors": 20, "dense_below": 0, **changes})


def padding(batch: int, length: int, side: str, amount: int = 21) -> Tensor:
    """``attention_mask`` ``[B, N]`` in which every row but the last has padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch - 1):
        mask[row, : amount - row] = 0
    return mask if side == "left" else mask.flip(1)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def make_mask(
    create: Callable[..., Any],
    config: Any,
    embeddings: Tensor,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> Any:
    """What a causal mask function of transformers makes; versions differ in the name and the place of the cache."""
    return create(config, embeddings, attention_mask, **{CACHE: cache}, position_ids=position_ids, **options)
