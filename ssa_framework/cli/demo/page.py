"""Writes what the demo found: one self-contained HTML page, and the numbers as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any

import torch

from ssa_framework.cli.demo.bench import LengthResult
from ssa_framework.cli.demo.figures import graph_figure, loss_figure, memory_figure, time_figure
from ssa_framework.cli.demo.findings import findings
from ssa_framework.cli.demo.passage import Passage
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.tables import cost_table, quality_table, slots_table, training_table
from ssa_framework.cli.demo.text import Text
from ssa_framework.cli.demo.train import Run
from ssa_framework.cli.pages import draw
from ssa_framework.cli.pages import render as render_page
from ssa_framework.plotting import PART_COLORS

PAGE_NAME, NUMBERS_NAME = "index.html", "demo.json"


@dataclass(frozen=True)
class Outcome:
    """Everything the demo found."""

    settings: Settings
    text: Text
    sparse: Run
    dense: Run
    results: Sequence[LengthResult]
    passage: Passage
    seconds: float

    @property
    def findings(self) -> list[str]:
        return findings(self.sparse, self.dense, self.results, self.settings)

    def to_dict(self) -> dict[str, Any]:
        passage = self.passage
        return {
            "settings": self.settings.to_dict(),
            "environment": environment(self.settings),
            "text": {
                "train_bytes": len(self.text.train),
                "validation_bytes": len(self.text.validation),
                "held_out_topics": list(self.text.held_out),
            },
            "training": {run.name: run.to_dict() for run in (self.sparse, self.dense)},
            "lengths": [result.to_dict() for result in self.results],
            "passage": {"topic": passage.topic, "layer": passage.layer, "head": passage.head, "query": passage.query},
            "findings": self.findings,
            "seconds": self.seconds,
        }


def environment(settings: Settings) -> dict[str, str]:
    """Versions and device."""
    return {
        "ssa-framework": version("ssa-framework"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _processor(),
        "threads": str(settings.threads),
        "dtype": "float32",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def write(outcome: Outcome, folder: Path) -> Path:
    """Write the page and the numbers into ``folder``; returns the page's path."""
    numbers = json.dumps(outcome.to_dict(), indent=1, allow_nan=False)
    (folder / NUMBERS_NAME).write_text(numbers + "\n", encoding="utf-8")
    page = folder / PAGE_NAME
    page.write_text(render(outcome), encoding="utf-8")
    return page


def render(outcome: Outcome) -> str:
    settings, runs = outcome.settings, (outcome.sparse, outcome.dense)
    pictures = {
        "loss": draw(lambda: loss_figure(runs), "Loss of the sparse and the dense model over training steps"),
        "time": draw(lambda: time_figure(outcome.results), "Time of one attention call over the length N"),
        "memory": draw(lambda: memory_figure(outcome.results), "Peak extra memory of one call over the length N"),
        "graph": draw(lambda: graph_figure(outcome.passage), "Which bytes of the passage each byte attends to"),
    }
    return render_page(
        "demo.html.j2",
        settings=settings,
        sources=settings.attention_config(dense=False).source_mix,
        text=outcome.text,
        findings=outcome.findings,
        training=training_table(runs, settings),
        untrained_bits=outcome.sparse.validation[0][1] / log(2),
        cost=cost_table(outcome.results),
        quality=quality_table(outcome.results, settings),
        slots=slots_table(outcome.results, settings),
        pictures=pictures,
        passage=outcome.passage,
        passage_spans=passage_spans(outcome.passage),
        colors=PART_COLORS,
        environment=environment(settings),
        seconds=outcome.seconds,
        numbers_name=NUMBERS_NAME,
    )


@dataclass(frozen=True)
class Span:
    """Characters of the passage that look alike. ``strength`` in percent: how strongly they are coloured."""

    text: str
    kind: str
    strength: int


def passage_spans(passage: Passage) -> list[Span]:
    """The passage up to its query; a neighbor is the stronger the more attention it gets."""
    heaviest = max(passage.weights)
    spans: list[Span] = []
    for i, (part, weight, missed) in enumerate(zip(passage.parts, passage.weights, passage.missed, strict=True)):
        kind = "query" if i == passage.query else part or ("missed" if missed else "other")
        strength = round(20 + 80 * (weight / heaviest) ** 0.5) if part else 0
        character = passage.text[i] + ("\n" if passage.text[i] == "⏎" else "")
        if spans and (spans[-1].kind, spans[-1].strength) == (kind, strength):
            spans[-1] = Span(spans[-1].text + character, kind, strength)
        else:
            spans.append(Span(character, kind, strength))
    return spans
