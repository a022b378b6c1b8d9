"""Peak memory of routing and attention together, beyond the inputs, at growing lengths.

Gaussian data, batch 1, 8 heads × 64, K = 128, the default sources, float32 on a CPU. Memory is linear in N where the
bytes per token stay the same. Writes one CSV row per length and mode.

    python benchmarks/memory.py --out benchmarks/results/memory.csv
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import torch
import typer
from recall import commit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import ssa_framework
from ssa_framework import SSAConfig, sparse_attention
from ssa_framework.quality.memory import peak_memory

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
COLUMNS = [
    "length", "mode", "causal", "peak_mib", "bytes_per_token", "inputs_mib", "threads", "device", "version", "commit",
    "torch",
]  # fmt: skip
MODES = ("forward", "forward+backward")


def measure(length: int, mode: str, causal: bool, device: str) -> dict[str, object]:
    config = SSAConfig(num_neighbors=128)
    q, k, v = (torch.randn(1, 8, length, 64, device=device) for _ in range(3))
    grad = torch.randn_like(q)

    def forward() -> Tensor:
        return sparse_attention(q, k, v, is_causal=causal, config=config)

    def with_gradients() -> tuple[Tensor, ...]:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(sparse_attention(*inputs, is_causal=causal, config=config), inputs, grad)

    peak = peak_memory(forward if mode == "forward" else with_gradients, device)
    return {
        "length": length,
        "mode": mode,
        "causal": causal,
        "peak_mib": f"{peak / 2**20:.1f}",
        "bytes_per_token": f"{peak / length:.0f}",
        "inputs_mib": f"{3 * q.numel() * q.element_size() / 2**20:.1f}",
        "threads": torch.get_num_threads(),
        "device": device,
        "version": ssa_framework.__version__,
        "commit": commit(),
        "torch": torch.__version__,
    }


def main(
    out: Annotated[Path, typer.Option(help="CSV file")] = Path(__file__).parent / "results" / "memory.csv",
    longest: Annotated[int, typer.Option(help="leave out longer sequences")] = LENGTHS[-1],
    threads: Annotated[int, typer.Option(help="threads")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Measure the peak memory of the default sources."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cases = [(n, mode, causal) for n in LENGTHS if n <= longest for mode in MODES for causal in (False, True)]
    measure(1024, MODES[1], False, device)  # compile
    rows = [measure(*case, device) for case in track(cases, "measuring")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*COLUMNS[:6])
    for row in rows:
        table.add_row(*(str(row[name]) for name in COLUMNS[:6]))
    Console().print(table)
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
