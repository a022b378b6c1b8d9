"""Whether all ranks run the same thing: configurations, parameters and buffers compared across ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ssa_framework.attention import SparseAttention
from ssa_framework.distributed.collectives import Ranks, as_json_value
from ssa_framework.errors import DistributedError

_SHOWN = 8
_ABSENT = "nothing"


def require_same(facts: Mapping[str, Any], mesh: DeviceMesh | dist.ProcessGroup | Ranks | None, what: str) -> None:
    """Compare ``facts``, by name, across ranks; every rank must call it.

    Raises:
        DistributedError: on every rank, with the names and values that differ.
    """
    ranks = mesh if isinstance(mesh, Ranks) else Ranks.of(mesh)
    mine = json.dumps(as_json_value(dict(facts)), sort_keys=True)
    theirs = [json.loads(text) for text in ranks.texts(mine, f"what they know of the {what}")]
    names = sorted({name for known in theirs for name in known})
    different = [
        name for name in names if any(known.get(name, _ABSENT) != theirs[0].get(name, _ABSENT) for known in theirs)
    ]
    if not different:
        return
    shown = [_difference(name, [known.get(name, _ABSENT) for known in theirs]) for name in different[:_SHOWN]]
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise DistributedError(f"the ranks disagree about the {what}: {'; '.join(shown)}{more}")


def check_agreement(model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup | None = None) -> None:
    """Compare a model across ranks: configurations of its attention layers, names, shapes and dtypes of parameters,
    and the contents of buffers (hash planes). Every rank must call it, before the model is sharded.

    `parallelize_context` does; with DDP, FSDP2 or tensor parallelism call it once before the first step: a rank with
    another ``num_neighbors`` or seed would train along with other neighbors, and nothing else would notice.

    Raises:
        DistributedError: on every rank, with the names and values that differ.
    """
    require_same(model_facts(model), mesh, "model")


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What `check_agreement` compares, by name."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseAttention):
            at = f"{name}." if name else ""
            facts.update({f"{at}config.{option}": value for option, value in module.config.to_dict().items()})
    facts.update({name: f"{p.dtype} {list(p.shape)}" for name, p in model.named_parameters()})
    facts.update({name: _digest(buffer) for name, buffer in model.named_buffers()})
    return facts


def _digest(x: Tensor) -> str:
    raw = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return f"{x.dtype} {list(x.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"


def _difference(name: str, values: list[Any]) -> str:
    first = values[0]
    other = next(rank for rank, value in enumerate(values) if value != first)
    return f"{name} is {first!r} on rank 0 and {values[other]!r} on rank {other}"
