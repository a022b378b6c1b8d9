"""What the demo does, and how much of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ssa_framework.config import SSAConfig

SOURCES: dict[str, dict[str, Any]] = {
    "self": {},
    "window": {"size": 16},
    "global": {"tokens": 4},
    "lsh": {"hash": "cross_polytope", "rounds": 4, "probes": 3, "candidates": 32},
}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Settings:
    """Sizes of the model, its training and the measurement; everything random follows from ``seed``."""

    steps: int = 300
    batch: int = 4
    context: int = 256
    layers: int = 2
    width: int = 128
    heads: int = 4
    num_neighbors: int = 64
    learning_rate: float = 3e-3
    validation_windows: int = 24
    validations: int = 5
    lengths: tuple[int, ...] = LENGTHS
    seconds_per_length: float = 2.0
    passage: int = 384
    recall_at: int = 32
    threads: int = 2
    seed: int = 0

    def attention_config(self, *, dense: bool) -> SSAConfig:
        """The configuration of the sparse model, or of its dense twin: the same layers, computed densely."""
        return SSAConfig(
            d_model=self.width,
            num_heads=self.heads,
            num_neighbors=self.num_neighbors,
            causal=True,
            sources=SOURCES,
            rope_base=10000.0,
            dense_below=10**9 if dense else None,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lengths": list(self.lengths), "sources": SOURCES}
