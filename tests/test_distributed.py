"""DDP, FSDP2, tensor and context parallelism, checkpoints and faults, in processes of torch.distributed (gloo)."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import distributed_ranks
from distributed_ranks import NAMES, loss_of, tokens, train, transformer
from processes import start_process
from ssa_framework.distributed import load_checkpoint

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left their errors and checkpoints; all checks run in one start of them."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [start_process(distributed_ranks.run, rank, str(folder)) for rank in range(RANKS)]
    for process in processes:
        process.join(timeout=400)
        if process.is_alive():
            process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [0, 0, 0, -signal.SIGKILL]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_processes(folder: Path, name: str) -> None:
    ranks = 2 if name.endswith(("-2", "of 2 ranks", "on 2")) else 4
    for rank in range(ranks):
        if name.startswith("dead_rank") and rank == ranks - 1:
            continue
        errors = json.loads((folder / f"errors-{rank}.json").read_text())
        assert name in errors, f"rank {rank} never got there"
        assert errors[name] is None, f"rank {rank}: {errors[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_a_checkpoint_of_several_ranks_loads_in_one_process(folder: Path, ranks: str) -> None:
    model = transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert load_checkpoint(folder / ranks, model, optimizer) == 2
    alone = transformer()
    trained = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    train(alone, trained, slice(None), 2)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-3, atol=1e-4)
    for one, other in ((alone, trained), (model, optimizer)):
        train(one, other, slice(None), 1)
    torch.testing.assert_close(loss_of(model(tokens())[0]), loss_of(alone(tokens())[0]), rtol=1e-4, atol=1e-6)
