"""Many Python threads and one module; a long run that keeps what it needs and no more."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssa_framework import SparseAttention, SparseTransformer, SSACache, SSAConfig, convert, sparse_attention

THREADS = 16
LENGTHS = (40, 64, 97, 150)
BASE: dict[str, Any] = {"d_model": 32, "num_heads": 2, "num_neighbors": 24, "causal": True}
CLUSTERS = {"global": {}, "clusters": {"levels": [[32, 8], [64, 16]], "keys": 16}}
MIXES: dict[str, Any] = {
    "default": None,
    "clusters": CLUSTERS,
    "listed": {"window": {}, "random": {}, "strided": {}, "blocks": {"size": 8, "keys": 32}},
    "faiss": {"self": {}, "faiss": {"index": "HNSW8"}},
}


def assert_threads_agree(run: Callable[[Tensor], Tensor], make: Callable[[int], Tensor]) -> None:
    """What 16 threads compute at once, each its own inputs in its own order, is what one thread computes."""
    inputs = [make(length) for length in LENGTHS]
    with torch.no_grad():
        expected = [run(x) for x in inputs]
    start = Barrier(THREADS)

    def work(thread: int) -> None:
        start.wait()
        for step in range(len(inputs)):
            i = (step + thread) % len(inputs)
            with torch.no_grad():
                assert torch.equal(run(inputs[i]), expected[i])

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, thread) for thread in range(THREADS)]:
            done.result()


@pytest.mark.parametrize("mix", MIXES)
def test_one_layer(mix: str) -> None:
    layer = SparseAttention(SSAConfig(**BASE, sources=MIXES[mix])).eval()
    assert_threads_agree(lambda x: layer(x)[0], lambda n: torch.randn(2, n, 32))


def test_function() -> None:
    """Its routers are made by the first threads that come."""
    mix = SSAConfig(**BASE, sources=CLUSTERS, seed=77)
    assert_threads_agree(lambda x: sparse_attention(x, x, x, config=mix), lambda n: torch.randn(1, 2, n, 16))


def test_converted_module() -> None:
    layer = convert(nn.MultiheadAttention(32, 2, batch_first=True), SSAConfig(**BASE)).eval()
    assert_threads_agree(lambda x: layer(x, x, x)[0], lambda n: torch.randn(2, n, 32))


def test_a_cache_for_each_thread() -> None:
    model = SparseTransformer(SSAConfig(**BASE, sources=CLUSTERS), num_layers=2).eval()

    def decode(x: Tensor) -> Tensor:
        cache = SSACache()
        return torch.cat([model(piece, cache=cache)[0] for piece in x.split(75, dim=1)], dim=1)

    assert_threads_agree(decode, lambda n: torch.randn(1, n, 32))


def test_compiled_layer() -> None:
    layer = SparseAttention(SSAConfig(**BASE, sources=CLUSTERS)).eval()
    program = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    assert_threads_agree(lambda x: program(x)[0], lambda n: torch.randn(2, n, 32))
    torch._dynamo.reset()


@pytest.mark.slow
def test_soak() -> None:
    """`benchmarks/soak.py` runs for minutes; a few seconds show what grows with every call."""
    script = Path(__file__).parents[1] / "benchmarks" / "soak.py"
    run = [sys.executable, str(script), "--seconds", "12", "--rows", "4"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing grows" in done.stdout
