"""What `test_distributed.py` runs in processes of torch.distributed. Each check asserts, on every rank."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ssa_framework import (
    CachedGraphSparseTransformer,
    SparseAttention,
    SparseTransformer,
    SSAConfig,
    sparse_attention,
)
from ssa_framework.distributed import (
    ContextParallel,
    check_agreement,
    context_parallel_attention,
    count_traffic,
    load_checkpoint,
    parallelize_context,
    save_checkpoint,
    tensor_parallel_plan,
)
from ssa_framework.errors import ConfigError, DistributedError

MIXES: dict[str, dict[str, dict[str, Any]] | None] = {
    "default": None,
    "clusters": {"window": {"size": 3}, "clusters": {"levels": [[16, 4], [32, 8]], "keys": 8}},
    "random": {"self": {}, "random": {"links": 3}, "blocks": {"size": 8}},
}


def config(mix: str = "default", **changes: Any) -> SSAConfig:
    options: dict[str, Any] = {
        "d_model": 64, "num_heads": 8, "num_kv_heads": 4, "num_neighbors": 12, "causal": True, "rope_base": 10000.0,
        "sources": MIXES[mix],
    }  # fmt: skip
    if MIXES[mix] is None:
        options |= {"window_size": 3, "num_hash_rounds": 2}
    return SSAConfig(**(options | changes))


def transformer(mix: str = "default", kind: type[SparseTransformer] = SparseTransformer) -> SparseTransformer:
    torch.manual_seed(0)
    return kind(config(mix), num_layers=2, vocab_size=30)


def tokens() -> Tensor:
    return torch.randint(30, (4, 64), generator=torch.Generator().manual_seed(1))


def loss_of(out: Tensor) -> Tensor:
    return out.square().sin().mean()


def reference(mix: str = "default", kind: type[SparseTransformer] = SparseTransformer) -> tuple[Tensor, dict[str, Any]]:
    """Outputs and gradients of one process."""
    model = transformer(mix, kind)
    out, _ = model(tokens())
    loss_of(out).backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def close(found: Tensor, wanted: Tensor, name: str = "") -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded."""
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


def share() -> slice:
    each = 4 // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def buffers_are_whole(model: nn.Module) -> None:
    names = dict(model.named_buffers())
    assert any(name.endswith("planes") for name in names)
    for name, buffer in transformer().named_buffers():
        assert torch.equal(whole(names[name]), buffer), name


# -- checks -----------------------------------------------------------------------------------------------------------


def data_parallel() -> None:
    out, grads = reference()
    model = DistributedDataParallel(transformer())
    mine, _ = model(tokens()[share()])
    close(mine.detach(), out[share()])
    loss_of(mine).backward()
    buffers_are_whole(model.module)
    for name, parameter in model.module.named_parameters():
        close(parameter.grad, grads[name], name)


def fsdp() -> None:
    for kind in (SparseTransformer, CachedGraphSparseTransformer):
        out, grads = reference(kind=kind)
        model = transformer(kind=kind)
        for layer in model.layers:
            fully_shard(layer)
            register_fsdp_forward_method(layer, "build_graph")  # the cached-graph model calls it beside forward
        fully_shard(model)
        mine, _ = model(tokens()[share()])
        close(mine.detach(), out[share()])
        loss_of(mine).backward()
        buffers_are_whole(model)
        for name, parameter in model.named_parameters():
            close(whole(parameter.grad), grads[name], name)


def tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for mix in MIXES:
        out, grads = reference(mix)
        model = transformer(mix)
        check_agreement(model)
        parallelize_module(model, mesh, tensor_parallel_plan(model))
        q, k, _ = model.layers[0].attn.project(torch.zeros(1, 2, 64))
        assert (q.shape[1], k.shape[1]) == (8 // mesh.size(), 4 // mesh.size())
        mine, _ = model(tokens())
        close(mine.detach(), out, mix)
        loss_of(mine).backward()
        for name, parameter in model.named_parameters():
            close(whole(parameter.grad), grads[name], f"{mix}, {name}")


def tensor_parallel_masks() -> None:
    """Masks that tell heads apart, and a layer by itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(2))
    by_head = torch.rand(2, 8, 40, 40, generator=torch.Generator().manual_seed(3)) < 0.7
    torch.manual_seed(0)
    layer = SparseAttention(config("random"))
    masks: list[dict[str, Any]] = [
        {"attention_mask": by_head},
        {"mask_mod": lambda b, h, i, j: (i + j + h) % 3 > 0},
        {"key_padding_mask": torch.arange(40).expand(2, -1) < 35},
    ]
    wanted = [layer(x, **mask)[0].detach() for mask in masks]
    parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    for mask, out in zip(masks, wanted, strict=True):
        close(layer(x, **mask)[0].detach(), out, str(list(mask)))


def tensor_parallel_needs_heads() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = SparseAttention(config(num_heads=8, num_kv_heads=1))
    with pytest.raises(ConfigError, match=r"1 key/value heads cannot be shared out to \d ranks"):
        parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    with pytest.raises(ConfigError, match=r"no SparseAttention in Linear"):
        tensor_parallel_plan(nn.Linear(2, 2))


def context_parallel() -> None:
    """The model under DDP, over the ranks that share its tokens."""
    for mix in MIXES:
        for kind in (SparseTransformer, CachedGraphSparseTransformer):
            out, grads = reference(mix, kind)
            model = transformer(mix, kind)
            context = parallelize_context(model)
            ddp = DistributedDataParallel(model)
            mine, _ = ddp(context.shard(tokens()))
            close(context.unshard(mine.detach()), out, mix)
            loss_of(mine).backward()
            for name, parameter in model.named_parameters():
                close(parameter.grad, grads[name], f"{mix}, {name}")


def context_parallel_functional() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, h, 96, 16, generator=generator) for h in (4, 2, 2)]
    documents = (torch.arange(96) // 41).expand(2, -1)
    for causal, layout in ((True, "zigzag"), (False, "contiguous")):
        context = ContextParallel.over(None, layout=layout)
        for sources in (*MIXES.values(), {"topk": {}}):
            some = SSAConfig(sources=sources, num_neighbors=16, causal=causal)
            one = [x.clone().requires_grad_() for x in parts]
            out = sparse_attention(*one, config=some, enable_gqa=True, segment_ids=documents)
            out.square().sum().backward()
            many = [context.shard(x, 2).clone().requires_grad_() for x in parts]
            with count_traffic() as traffic:
                mine = context_parallel_attention(
                    *many, context, config=some, segment_ids=context.shard(documents)
                )  # fmt: skip
                mine.square().sum().backward()
            assert traffic.total > 0
            torch.testing.assert_close(mine, context.shard(out, 2), rtol=1e-5, atol=1e-5)
            for a, b in zip(one, many, strict=True):
                torch.testing.assert_close(b.grad, context.shard(a.grad, 2), rtol=1e-4, atol=1e-5)


def all_at_once() -> None:
    """Four ranks: the tokens over two, the heads over two, parameters by FSDP2 over those that share tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    out, grads = reference("random")
    model = transformer("random")
    context = parallelize_context(model, mesh["cp"])
    parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["cp"])
    fully_shard(model, mesh=mesh["cp"])
    mine, _ = model(context.shard(tokens()))
    close(context.unshard(mine.detach()), out)
    loss_of(mine).backward()
    for name, parameter in model.named_parameters():
        close(whole(parameter.grad), grads[name], name)
    with pytest.raises(ConfigError, match=r"a mesh of one dimension is needed, got dimensions \('cp', 'tp'\)"):
        ContextParallel.over(mesh)


def ranks_that_disagree() -> None:
    rank = dist.get_rank()
    model = SparseTransformer(config(num_neighbors=12 + 4 * (rank == 1)), num_layers=1)
    with pytest.raises(DistributedError, match=r"layers.0.attn.config.num_neighbors is 12 on rank 0 and 16 on rank 1"):
        check_agreement(model)
    model = SparseTransformer(config(seed=rank), num_layers=1)
    with pytest.raises(DistributedError, match=r"seed is 0 on rank 0 and 1 on rank 1.*planes is "):
        parallelize_context(model)
    context = ContextParallel.over(None)
    x = context.shard(torch.randn(1, 2, 32, 8), 2)
    for _ in range(2):  # the ranks are still in step after the error
        with pytest.raises(DistributedError, match=r"config.num_hash_rounds is 8 on rank 0 and 4 on rank 1"):
            context_parallel_attention(x, x, x, context, config=SSAConfig(num_hash_rounds=8 - 4 * (rank == 1)))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model: nn.Module = transformer()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(tokens()[rows])[0]).backward()
        optimizer.step()


def write_checkpoint(folder: Path) -> None:
    model, optimizer = sharded()
    train(model, optimizer, share(), 2)
    save_checkpoint(folder, model, optimizer, 2)


def read_checkpoint(folder: Path) -> None:
    """The next step of what was loaded is that of a run that never stopped."""
    model, optimizer = sharded()
    assert load_checkpoint(folder, model, optimizer) == 2
    train(model, optimizer, share(), 1)
    alone = transformer()
    train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2), slice(None), 3)
    wanted = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter.detach()), wanted[name].detach(), rtol=1e-3, atol=1e-4)
    buffers_are_whole(model)


# -- faults -----------------------------------------------------------------------------------------------------------


def silent_rank(over: Path) -> None:
    """Rank 1 does not answer: the other one stops waiting, and says why."""
    begin = time.monotonic()
    if dist.get_rank() == 1:
        while not over.exists() and time.monotonic() - begin < 60.0:
            time.sleep(0.05)
        assert over.exists()
        return
    x = torch.randn(1, 2, 16, 8)
    with pytest.raises(DistributedError, match=r"rank 0 of 2 could not exchange .* did not answer within the timeout"):
        context_parallel_attention(x, x, x, ContextParallel.over(None))
    over.touch()


def dead_rank() -> None:
    """The last rank dies in the backward pass, where the others wait for gradients of rows."""
    context = ContextParallel.over(None)
    parts = [context.shard(torch.randn(1, 2, 64, 8), 2).requires_grad_() for _ in range(3)]
    out = context_parallel_attention(*parts, context)
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(DistributedError, match=r"could not exchange gradients of .*: another rank died"):
        out.sum().backward()
    assert time.monotonic() - begin < 50.0, "not after the timeout, but when the connection is lost"


# -- the processes ----------------------------------------------------------------------------------------------------

TWO = (data_parallel, tensor_parallel, context_parallel_functional, ranks_that_disagree)
FOUR = (
    fsdp, tensor_parallel, tensor_parallel_masks, tensor_parallel_needs_heads, context_parallel,
    context_parallel_functional, all_at_once, ranks_that_disagree,
)  # fmt: skip


def phases(folder: Path) -> list[tuple[str, int, float, Callable[[], None]]]:
    """Name, number of ranks, timeout in seconds and function of every check."""
    listed: list[tuple[str, int, float, Callable[[], None]]] = []
    listed += [(f"{check.__name__}-2", 2, 120.0, check) for check in TWO]
    listed += [("checkpoint of 2 ranks", 2, 120.0, lambda: write_checkpoint(folder / "two"))]
    listed += [(f"{check.__name__}-4", 4, 120.0, check) for check in FOUR]
    listed += [("checkpoint of 2 ranks on 4", 4, 120.0, lambda: read_checkpoint(folder / "two"))]
    listed += [("checkpoint of 4 ranks", 4, 120.0, lambda: write_checkpoint(folder / "four"))]
    listed += [("checkpoint of 4 ranks on 2", 2, 120.0, lambda: read_checkpoint(folder / "four"))]
    listed += [("silent_rank-2", 2, 5.0, lambda: silent_rank(folder / "over"))]
    listed += [("dead_rank-4", 4, 60.0, dead_rank)]
    return listed


NAMES = [name for name, *_ in phases(Path())]


def run(rank: int, folder: str) -> None:
    """Process ``rank``: all checks, and what each of them raised, as JSON."""
    warnings.simplefilter("ignore")  # torch's own, about features that it calls new
    torch.set_num_threads(1)
    errors: dict[str, str | None] = {}
    world = 0
    for number, (name, ranks, timeout, check) in enumerate(phases(Path(folder))):
        fresh = (ranks, timeout)
        if fresh != world:
            if dist.is_initialized():
                dist.destroy_process_group()
            world = fresh
            if rank < ranks:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/store-{number}", rank=rank, world_size=ranks,
                    timeout=timedelta(seconds=timeout),
                )  # fmt: skip
        if rank >= ranks:
            continue
        try:
            check()
            errors[name] = None
        except BaseException:  # noqa: BLE001  # pytest's own failures are no Exceptions
            errors[name] = traceback.format_exc()
        Path(folder, f"errors-{rank}.json").write_text(json.dumps(errors))
