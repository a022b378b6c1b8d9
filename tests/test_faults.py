"""Training runs that are killed, and checkpoints that are damaged or of another model."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import train_ranks
from processes import start_process
from ssa_framework import SparseTransformer, SSAConfig
from ssa_framework.distributed import load_checkpoint, save_checkpoint
from ssa_framework.errors import CheckpointError


def start(folder: Path, attempt: int) -> list[ForkServerProcess]:
    """Both ranks of a run that writes to ``folder``."""
    files = [(f"losses-{rank}-{attempt}", f"said-{rank}-{attempt}") for rank in range(2)]
    return [
        start_process(
            train_ranks.main, rank, *(str(folder / name) for name in (f"store-{attempt}", "checkpoints", *files[rank]))
        )
        for rank in range(2)
    ]


def finish(processes: list[ForkServerProcess]) -> list[int | None]:
    """How processes ended."""
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def losses(folder: Path, attempt: int) -> dict[tuple[int, int], str]:
    """Loss by rank and step, to the last bit."""
    found = {}
    for rank in range(2):
        path = folder / f"losses-{rank}-{attempt}"
        for line in path.read_text().splitlines() if path.exists() else []:
            step, loss = line.split()
            found[rank, int(step)] = loss
    return found


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    uninterrupted = start(whole, 0)
    victims = start(broken, 0)
    # somewhere in a step, an exchange or the writing of a checkpoint
    moment = random.Random(os.getpid()).uniform(0.0, 0.3)
    begin = time.monotonic()
    while (1, train_ranks.EVERY + 1) not in losses(broken, 0):
        assert time.monotonic() - begin < 120, "the run did not get to its first checkpoint"
        time.sleep(0.005)
    time.sleep(moment)
    victims[1].kill()
    # the other rank must neither go on alone nor wait for ever
    assert finish(victims) == [1, -signal.SIGKILL]
    assert "Error" in (broken / "said-0-0").read_text()
    before = losses(broken, 0)
    assert (0, train_ranks.STEPS - 1) not in before, "the run was over before it was killed"

    assert finish(start(broken, 1)) == [0, 0], (broken / "said-0-1").read_text()
    assert finish(uninterrupted) == [0, 0], (whole / "said-0-0").read_text()
    wanted, after = losses(whole, 0), losses(broken, 1)
    first = min(step for _, step in after)
    assert first % train_ranks.EVERY == 0
    assert first >= train_ranks.EVERY
    assert set(wanted) == {(rank, step) for rank in range(2) for step in range(train_ranks.STEPS)}
    assert before == {at: wanted[at] for at in before}
    assert after == {at: loss for at, loss in wanted.items() if at[1] >= first}, f"killed after {moment} s"


# -- checkpoints of one process ---------------------------------------------------------------------------------------


def model_and_optimizer(**changes: Any) -> tuple[SparseTransformer, torch.optim.Optimizer]:
    options: dict[str, Any] = {"d_model": 16, "num_heads": 2, "num_neighbors": 16, "dropout": 0.2, "causal": True}
    model = SparseTransformer(SSAConfig(**(options | changes)), num_layers=1, vocab_size=20)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: SparseTransformer, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.arange(40).view(2, 20) % 20)[0].square().sin().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_one_process_resumes_with_its_random_state(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    assert load_checkpoint(tmp_path / "none", model, optimizer) == 0
    step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, 1)
    wanted = [step(model, optimizer) for _ in range(3)]
    torch.manual_seed(99)
    again = model_and_optimizer()
    assert load_checkpoint(tmp_path, *again) == 1
    assert [step(*again) for _ in range(3)] == wanted


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    for number in (1, 2, 3, 10):
        save_checkpoint(tmp_path, model, optimizer, number)
        (tmp_path / f".unfinished-{number + 1:09d}-of-a-killed-run").mkdir()
    assert load_checkpoint(tmp_path, model, optimizer) == 10
    save_checkpoint(tmp_path, model, optimizer, 11)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000011"]
    save_checkpoint(tmp_path, model, optimizer, 11)  # a resumed run may come by again
    assert load_checkpoint(tmp_path, model, optimizer) == 11


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    path = save_checkpoint(tmp_path, model, optimizer, 5)
    data = path / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=rf"damaged: __0_0.distcp has {len(content) - 100} bytes, {len(content)}"):
        load_checkpoint(tmp_path, model, optimizer)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"damaged: __0_0.distcp is missing"):
        load_checkpoint(tmp_path, model, optimizer)
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no training checkpoint: manifest.json is missing or broken"):
        load_checkpoint(tmp_path, model, optimizer)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *model_and_optimizer(), 5)
    with pytest.raises(CheckpointError, match=r"num_neighbors is 16 in the checkpoint and 12 in the model"):
        load_checkpoint(tmp_path, *model_and_optimizer(num_neighbors=12))
    model = SparseTransformer(SSAConfig(d_model=16, num_heads=2, num_neighbors=16, dropout=0.2, causal=True), 1, 33)
    with pytest.raises(CheckpointError, match=r"cannot be loaded into this model: .*"):
        load_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
