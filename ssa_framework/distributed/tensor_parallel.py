"""Tensor parallelism: a plan for `torch.distributed.tensor.parallel.parallelize_module` that shards heads."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ssa_framework.attention import SparseAttention
from ssa_framework.errors import ConfigError
from ssa_framework.transformer import SparseTransformerLayer


class _OwnHeads(ParallelStyle):
    """Tells an attention layer which heads are its own: sources that treat heads differently go by their numbers."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, SparseAttention):
            raise ConfigError(f"the plan shards the heads of SparseAttention, got {type(module).__name__}")
        config, size = module.config, device_mesh.size()
        if config.kv_heads % size:
            raise ConfigError(
                f"{config.kv_heads} key/value heads cannot be shared out to {size} ranks; use a tensor-parallel mesh "
                f"whose size divides {config.kv_heads}"
            )
        module.first_head = device_mesh.get_local_rank() * (config.num_heads // size)
        return module


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """A ``parallelize_plan`` that shards the heads of every `SparseAttention` in ``model``, and the inner width of the
    feed-forward part of every `SparseTransformerLayer`::

        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))

    Each rank projects, routes and attends with its own heads, a KV group being always on one rank; inputs and outputs
    of the layers are whole on all of them. Nothing is communicated but one sum per attention and feed-forward part.

    Args:
        model: a `SparseTransformer`, a layer of it, a `SparseAttention`, or a model that holds some.

    Returns:
        Parallel styles by module name. `parallelize_module` raises `ConfigError` where the key/value heads cannot be
        shared out evenly.

    Raises:
        ConfigError: there is no `SparseAttention` in ``model``.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        at = f"{name}." if name else ""
        if isinstance(module, SparseAttention):
            plan[name] = _OwnHeads()
            plan |= {f"{at}{projection}": ColwiseParallel() for projection in ("Wq", "Wk", "Wv")}
            plan[f"{at}Wo"] = RowwiseParallel()
        elif isinstance(module, SparseTransformerLayer):
            plan |= {f"{at}ff.0": ColwiseParallel(), f"{at}ff.3": RowwiseParallel()}
    if not any(isinstance(style, _OwnHeads) for style in plan.values()):
        raise ConfigError(f"there is no SparseAttention in {type(model).__name__}")
    return plan
