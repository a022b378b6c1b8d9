"""What a state dict says of the layer that it was saved from, and what is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssa_framework.errors import CheckpointError

if TYPE_CHECKING:
    from ssa_framework.attention import SparseAttention

_WEIGHTS = ("Wq.weight", "Wk.weight", "Wv.weight", "Wo.weight")
_KEY = "ssa_framework"


def guard_checkpoints(layer: SparseAttention) -> None:
    """From now on, let the state dict of ``layer`` say in its metadata what the weights mean, and let ``layer`` refuse
    those that do not fit.

    The metadata travels with `torch.save`. A state dict without it, of another tool or an earlier version, is loaded if
    its tensors fit, and so is one of a part of a model under ``strict=False``.
    """
    layer.register_state_dict_post_hook(_say)
    layer.register_load_state_dict_pre_hook(_check)


def _meaning(layer: SparseAttention) -> dict[str, Any]:
    """What the same weights need to compute the same; sources and budget may be changed."""
    config = layer.config
    return {
        "num_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "causal": config.causal,
        "rope_base": config.rope_base,
    }


def _say(layer: SparseAttention, state: Mapping[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    metadata[_KEY] = _meaning(layer)


def _check(
    layer: SparseAttention,
    state: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    *_: Any,
) -> None:
    where = f"the checkpoint of {prefix.rstrip('.') or 'this layer'}"
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not any(prefix + name in own for name in _WEIGHTS):
        return  # a part of a model; whether it may miss this layer, torch knows
    said, here = metadata.get(_KEY), _meaning(layer)
    if isinstance(said, Mapping):
        other = [f"{name}={said[name]!r}, here {here[name]!r}" for name in here if said.get(name) != here[name]]
        if other:
            raise CheckpointError(
                f"{where} was saved with {'; '.join(other)}: the same weights would compute something else. Build the "
                f"layer as it was; dict(state_dict) says nothing of its layer, if you mean it"
            )
    expected = {prefix + name: tensor for name, tensor in layer.state_dict().items()}
    for name, tensor in own.items():
        if name in expected:
            _check_tensor(name, tensor, expected[name], where)


def _check_tensor(name: str, tensor: object, expected: Tensor, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{where} is damaged: {name} is no tensor but {type(tensor).__name__}")
    if tensor.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(f"{where} holds {name} as {tensor.dtype}; {expected.dtype} is needed")
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{where} holds {name} of shape {list(tensor.shape)}, this layer needs {list(expected.shape)}: it was "
            f"saved with another configuration"
        )
    if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{where} is damaged, or of a training run that diverged: {bad} of {tensor.numel()} numbers of {name} are "
            f"not finite"
        )
