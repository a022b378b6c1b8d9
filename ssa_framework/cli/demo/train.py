"""Train a small byte-level language model twice: over neighbor graphs, and densely."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, log, pi
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssa_framework.cli.demo.settings import Settings
from ssa_framework.transformer import SparseTransformer

_VOCABULARY = 256
_WARM_UP_STEPS = 20


class ByteModel(nn.Module):
    """A `SparseTransformer` over bytes with a linear head: tokens ``[B, N]`` → logits ``[B, N, 256]``."""

    def __init__(self, settings: Settings, *, dense: bool) -> None:
        super().__init__()
        config = settings.attention_config(dense=dense)
        self.body = SparseTransformer(config, num_layers=settings.layers, vocab_size=_VOCABULARY)
        self.head = nn.Linear(settings.width, _VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.body(tokens)
        logits: Tensor = self.head(hidden)
        return logits


@dataclass
class Run:
    """One model, its optimizer and its curves. Losses in nats per byte."""

    name: str
    model: ByteModel
    optimizer: torch.optim.Optimizer
    train_loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """The median, since the first step may compile kernels."""
        return median(self.step_seconds)

    @property
    def validation_loss(self) -> float:
        return self.validation[-1][1]

    @property
    def bits_per_byte(self) -> float:
        return self.validation_loss / log(2)

    def to_dict(self) -> dict[str, Any]:
        return {
            "validation_loss_nats": self.validation_loss,
            "bits_per_byte": self.bits_per_byte,
            "seconds_per_step": self.seconds_per_step,
            "train_loss_nats": self.train_loss,
            "validation_curve": [{"step": step, "loss_nats": loss} for step, loss in self.validation],
        }


def make_twins(settings: Settings) -> tuple[Run, Run]:
    """The sparse model and its dense twin: the same architecture, the same initial weights."""
    runs = []
    for name in ("sparse", "dense"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = ByteModel(settings, dense=name == "dense")
        runs.append(Run(name, model, _optimizer(model, settings)))
    runs[1].model.load_state_dict(runs[0].model.state_dict())
    return runs[0], runs[1]


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def train(
    runs: tuple[Run, ...],
    tokens: Tensor,
    validation: Tensor,
    settings: Settings,
    on_step: Callable[[Run], object] | None = None,
) -> None:
    """Train all runs on the same batches, step by step in turn, so that drift of the machine hits all of them."""
    generator = torch.Generator().manual_seed(settings.seed)
    windows = _windows(validation, settings)
    every = max(1, settings.steps // settings.validations)
    for run in runs:
        run.validation.append((0, evaluate(run.model, windows, settings.batch)))
    for step in range(1, settings.steps + 1):
        starts = torch.randint(len(tokens) - settings.context, (settings.batch,), generator=generator)
        batch = torch.stack([tokens[s : s + settings.context + 1] for s in starts.tolist()])
        for run in runs:
            begin = time.perf_counter()
            run.train_loss.append(_step(run, batch, _learning_rate(step, settings)))
            run.step_seconds.append(time.perf_counter() - begin)
            if step == settings.steps or (step % every == 0 and settings.steps - step >= every):
                run.validation.append((step, evaluate(run.model, windows, settings.batch)))
            if on_step is not None:
                on_step(run)
    for run in runs:
        run.model.eval()


def _step(run: Run, batch: Tensor, learning_rate: float) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.model.train()
    loss = _loss(run.model, batch)
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    return loss.item()


def _learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warm_up = min(1.0, step / min(_WARM_UP_STEPS, settings.steps))
    return settings.learning_rate * warm_up * (0.55 + 0.45 * cos(pi * step / settings.steps))


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def _windows(tokens: Tensor, settings: Settings) -> Tensor:
    """Windows spread evenly over the text: int64 ``[windows, context + 1]``."""
    last = len(tokens) - settings.context - 1
    starts = torch.linspace(0, last, settings.validation_windows).long().tolist()
    return torch.stack([tokens[s : s + settings.context + 1] for s in starts])


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Mean loss over all windows, nats per byte."""
    model.eval()
    losses = [_loss(model, part) * len(part) for part in windows.split(batch)]
    return float(torch.stack(losses).sum()) / len(windows)
