"""Training checkpoints on torch.distributed.checkpoint: written whole or not at all, loaded on any world size."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ssa_framework.distributed.agreement import model_facts
from ssa_framework.distributed.collectives import Ranks, as_json_value
from ssa_framework.errors import CheckpointError

_COMPLETE = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"


def save_checkpoint(
    directory: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, *, keep: int = 2
) -> Path:
    """Write ``directory/step-…``: model, optimizer, and the random state of every rank. Every rank must call it.

    The checkpoint is written under another name, and renamed when all of it is on disk: a process that is killed
    meanwhile leaves the one before untouched. The model may be plain, or sharded by FSDP2 or tensor parallelism.

    Args:
        directory: on storage that all ranks see. step: steps that were trained, at least 0.
        keep: so many checkpoints remain, the newest ones.
    """
    directory = Path(directory)
    ranks = _ranks()
    token = uuid.uuid4().hex  # no other run's name, and the same on all ranks
    if ranks is not None:
        token = ranks.texts(token, "names of checkpoints")[0]
    unfinished = directory / f".unfinished-{step:09d}-{token}"
    if _is_first(ranks):
        unfinished.mkdir(parents=True)
    _wait(ranks)
    rank = 0 if ranks is None else ranks.rank
    state = {**_training_state(model, optimizer), f"random.{rank}": _random_state()}
    with _one_process_is_fine():
        state_dict_saver.save(state, checkpoint_id=unfinished, no_dist=ranks is None)
    target = directory / f"step-{step:09d}"
    if _is_first(ranks):
        manifest = {
            "step": step,
            "configurations": _configurations(model),
            "files": {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())},
        }
        (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in unfinished.iterdir():
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(unfinished, target)
        _flush(directory)
        _remove_old(directory, keep)
    _wait(ranks)
    return target


def load_checkpoint(directory: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint of ``directory``, in place. Every rank must call it.

    It may come from another world size, or from another way of sharding; the random state of a rank is restored where
    the checkpoint has one for it.

    Returns: the step after which it was written; 0 where there is none, and nothing was loaded.

    Raises:
        CheckpointError: files are missing or of another size, or the checkpoint is of another model; says what
        differs.
    """
    found = complete_checkpoints(directory)
    if not found:
        return 0
    path = found[-1]
    manifest = _checked_manifest(path, model)
    ranks = _ranks()
    state = _training_state(model, optimizer)
    key = f"random.{0 if ranks is None else ranks.rank}"
    reader = FileSystemReader(path)
    try:
        known = set(reader.read_metadata().state_dict_metadata)
        random_state = _random_state()
        mine = {f"{key}.{name}": name for name in random_state}
        if set(mine) <= known:
            state[key] = random_state
        with _one_process_is_fine():
            state_dict_loader.load(state, storage_reader=reader, no_dist=ranks is None)
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, CheckpointException) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint {path.name} cannot be loaded into this model: {first}") from error
    options = StateDictOptions(strict=True)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    if key in state:
        _restore_random_state(state[key])
    return int(manifest["step"])


def complete_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints that were written whole, oldest first."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    named = [path for path in directory.iterdir() if _COMPLETE.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _configurations(model: nn.Module) -> Any:
    return as_json_value({name: value for name, value in model_facts(model).items() if ".config." in f".{name}"})


def _checked_manifest(path: Path, model: nn.Module) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files, configurations = manifest["files"], manifest["configurations"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no training checkpoint: {_MANIFEST} is missing or broken") from error
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).exists() else None
        if there != size:
            found = "is missing" if there is None else f"has {there} bytes"
            raise CheckpointError(f"checkpoint {path.name} is damaged: {name} {found}, {size} bytes were written")
    mine = _configurations(model)
    different = [name for name in sorted({*mine, *configurations}) if mine.get(name) != configurations.get(name)]
    if different:
        shown = "; ".join(
            f"{name} is {configurations.get(name)!r} in the checkpoint and {mine.get(name)!r} in the model"
            for name in different[:4]
        )
        raise CheckpointError(f"checkpoint {path.name} is of another model: {shown}")
    return manifest


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _ranks() -> Ranks | None:
    return Ranks.of(None) if dist.is_available() and dist.is_initialized() else None


def _is_first(ranks: Ranks | None) -> bool:
    return ranks is None or ranks.rank == 0


def _wait(ranks: Ranks | None) -> None:
    if ranks is not None:
        ranks.texts("here", "checkpoints")


def _flush(path: Path) -> None:
    """To the disk itself: a machine may fail, not only a process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_old(directory: Path, keep: int) -> None:
    for path in complete_checkpoints(directory)[: -max(1, keep)]:
        shutil.rmtree(path)
    for path in directory.glob(".unfinished-*"):
        shutil.rmtree(path, ignore_errors=True)  # of runs that were killed
