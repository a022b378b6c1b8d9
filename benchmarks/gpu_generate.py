"""Generating with a model of transformers on a GPU, sparse beside dense: what a user of `use_sparse_attention` gets.

A Llama with random weights, bfloat16, 32 query heads over 8 KV heads × 128, a few layers of which none is left dense,
a long prompt of random tokens, then single tokens through ``model(...)`` with a dynamic cache. *Dense* is transformers'
``sdpa``. Sparse steps are timed as they come, and with captured steps switched off. Before a mix is timed, tokens with
and without captured steps must give the same logits, all of them finite, and on CUDA some must have been replayed.

    python benchmarks/gpu_generate.py --length 32768 --length 131072
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from torch import Tensor
from transformers import DynamicCache

from ssa_framework import SSAConfig, captured
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.laboratory.models import cache_name

MIXES = {f"preset {name}": SSAConfig.preset(name, graph_heads="kv") for name in ("fast", "balanced", "quality")}
WARM, CHECKED, TIMED = 8, 24, 64
COLUMNS = (
    "mix", "length", "layers", "prompt_ms", "dense_prompt_ms", "token_ms", "token_without_captures_ms",
    "dense_token_ms", "prompt_ratio", "token_ratio", "replays", "memory_of_captures_mib", "largest_difference",
    "device", "torch", "transformers", "date",
)  # fmt: skip


def llama(layers: int, hidden: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=max(1, hidden // 512), max_position_embeddings=2**20,
        rope_theta=1e6,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


class Session:
    """A prompt in a cache, and the tokens behind it."""

    def __init__(self, model: transformers.PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids, self.cache, self.place = model, ids, DynamicCache(config=model.config), 0

    def read(self, tokens: int) -> Tensor:
        """The logits behind the next tokens; the token after each is given, not chosen, so that all ways read one
        text."""
        some = self.ids[:, self.place : self.place + tokens]
        self.place += tokens
        options = {cache_name(self.model): self.cache}
        return self.model(some, **options, use_cache=True, logits_to_keep=1).logits[:, -1]

    def median_token(self) -> float:
        for _ in range(WARM):
            self.read(1)
        return statistics.median(milliseconds(lambda: self.read(1)) for _ in range(TIMED))


def captures(switched_on: bool) -> Any:
    return nullcontext() if switched_on else mock.patch.object(captured, "_may_be_captured", return_value=False)


@contextmanager
def counted_steps() -> Iterator[list[bool]]:
    """Of each step of a layer, whether it was a replay."""
    counted: list[bool] = []
    run = captured.CapturedSteps.run

    def count(*args: Any) -> Tensor | None:
        out: Tensor | None = run(*args)
        counted.append(out is not None)
        return out

    with mock.patch.object(captured.CapturedSteps, "run", count):
        yield counted


def check(model: transformers.PreTrainedModel, ids: Tensor, length: int) -> float:
    """The largest difference of logits of single tokens with and without captured steps, relative to the largest."""
    found, replays = [], 0
    for on in (False, True):
        session = Session(model, ids)
        logits = [session.read(length)]
        with captures(on), counted_steps() as counted:
            logits += [session.read(1) for _ in range(CHECKED)]
        found.append(torch.stack(logits).float())
        replays = sum(counted)
    plain, replayed = found
    difference = float((plain - replayed).abs().max() / plain.abs().max())
    if not difference < 2e-2 or not bool(replayed.isfinite().all()):
        raise SystemExit(f"captured steps differ by {difference:.2g} of the largest logit")
    if torch.cuda.is_available() and not replays:
        raise SystemExit(f"no step was captured behind {length} tokens; fewer than dense_below?")
    return difference


def measure(
    model: transformers.PreTrainedModel, ids: Tensor, length: int, mixes: list[str]
) -> Iterator[dict[str, object]]:
    def prompt() -> tuple[Session, float]:
        session = Session(model, ids)
        return session, milliseconds(lambda: session.read(length))

    def second_prompt() -> tuple[Session, float]:
        prompt()  # compiles kernels
        return prompt()

    session, dense_prompt = second_prompt()
    dense_token = session.median_token()
    del session
    for mix in mixes:
        with use_sparse_attention(model, MIXES[mix], dense_layers=()):
            difference = check(model, ids, length)
            session, prompt_ms = second_prompt()
            with captures(False):
                plain_token = session.median_token()
            before = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
            with counted_steps() as counted:
                token = session.median_token()
            after = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
            yield {
                "mix": mix,
                "length": length,
                "layers": model.config.num_hidden_layers,
                "prompt_ms": f"{prompt_ms:.1f}",
                "dense_prompt_ms": f"{dense_prompt:.1f}",
                "token_ms": f"{token:.3f}",
                "token_without_captures_ms": f"{plain_token:.3f}",
                "dense_token_ms": f"{dense_token:.3f}",
                "prompt_ratio": f"{dense_prompt / prompt_ms:.2f}",
                "token_ratio": f"{dense_token / token:.2f}",
                "replays": sum(counted),
                "memory_of_captures_mib": (after - before) // 2**20,
                "largest_difference": f"{difference:.2g}",
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "date": time.strftime("%Y-%m-%d"),
            }
            del session


def main(
    length: Annotated[list[int] | None, typer.Option(help="tokens of the prompt")] = None,
    layers: Annotated[int, typer.Option()] = 4,
    hidden: Annotated[int, typer.Option(help="128 for each query head")] = 4096,
    mix: Annotated[list[str] | None, typer.Option(help="presets; all if left out")] = None,
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "gpu_generate.csv",
) -> None:
    """Check and time generating."""
    model = llama(layers, hidden)
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for tokens in length or [32768, 131072]:
            ids = torch.randint(32000, (1, tokens + CHECKED + 2 * (WARM + TIMED)), device=model.device)
            for row in measure(model, ids, tokens, mix or list(MIXES)):
                rows.append(row)
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
