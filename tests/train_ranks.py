"""A training run of two ranks that `test_faults.py` kills: tokens and parameters are shared out to both."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from ssa_framework import SparseTransformer, SSAConfig
from ssa_framework.distributed import load_checkpoint, parallelize_context, save_checkpoint

STEPS = 24
EVERY = 3


def main(rank: int, rendezvous: str, checkpoints: str, losses: str, said: str) -> None:
    """Process ``rank``; appends to the file ``losses``, and writes its error messages to the file ``said``."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    warnings.simplefilter("ignore")  # torch's own, about features that it calls new
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    torch.manual_seed(rank)
    config = SSAConfig(
        d_model=32, num_heads=4, num_kv_heads=2, num_neighbors=12, causal=True, dropout=0.1, window_size=3,
        num_hash_rounds=2, rope_base=10000.0,
    )  # fmt: skip
    model = SparseTransformer(config, num_layers=2, vocab_size=30)
    context = parallelize_context(model)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    done = load_checkpoint(checkpoints, model, optimizer)
    with Path(losses).open("a", encoding="utf-8") as log:
        for step in range(done, STEPS):
            tokens = torch.randint(30, (2, 64), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(context.shard(tokens))[0].square().sin().mean()
            loss.backward()
            optimizer.step()
            log.write(f"{step} {loss.item().hex()}\n")
            log.flush()
            if (step + 1) % EVERY == 0:
                save_checkpoint(checkpoints, model, optimizer, step + 1)
