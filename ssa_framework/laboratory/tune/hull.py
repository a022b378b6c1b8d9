"""Which candidates a search can choose from in every layer, and in what order it takes them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One candidate in one layer; means over the sampled queries of all texts.

    Attributes:
        cost: keys that a query looks at: scored, or attended without being scored, and summaries.
        output_error: ``‖o_sparse − o_dense‖ / ‖o_dense‖`` of a query.
        damage: what the search adds up over layers: for a target in perplexity the square of the relative error of
            all outputs at once, times the sensitivity of the layer, in nats per token; else ``output_error``.
    """

    cost: float
    output_error: float
    damage: float


def lower_hull(points: Mapping[str, Point]) -> list[str]:
    """The candidates that no mixture of others beats in both cost and damage, by rising cost."""
    hull: list[str] = []
    for name in sorted(points, key=lambda n: (points[n].cost, points[n].damage, n)):
        here = points[name]
        if hull and here.damage >= points[hull[-1]].damage:
            continue
        while len(hull) > 1 and _rate(points, hull[-2], hull[-1]) <= _rate(points, hull[-1], name):
            hull.pop()
        while hull and points[hull[-1]].cost >= here.cost:
            hull.pop()
        hull.append(name)
    return hull


def _rate(points: Mapping[str, Point], before: str, after: str) -> float:
    """Damage avoided per key."""
    cost = points[after].cost - points[before].cost
    return (points[before].damage - points[after].damage) / cost if cost > 0 else float("inf")


@dataclass(frozen=True)
class HullPath:
    """Configurations of a model by rising cost: the first steps of ``steps``, from ``start`` on."""

    start: Mapping[int, str]
    steps: Sequence[tuple[int, str]]
    points: Mapping[int, Mapping[str, Point]]

    @classmethod
    def of(cls, points: Mapping[int, Mapping[str, Point]]) -> HullPath:
        hulls = {layer: lower_hull(of_layer) for layer, of_layer in points.items()}
        moves = [
            (-_rate(points[layer], before, after), layer, place, after)
            for layer, hull in hulls.items()
            for place, (before, after) in enumerate(itertools.pairwise(hull))
        ]
        return cls({layer: hull[0] for layer, hull in hulls.items()}, [(m[1], m[3]) for m in sorted(moves)], points)

    def __len__(self) -> int:
        return len(self.steps) + 1

    def choice(self, steps: int) -> dict[int, str]:
        return {**self.start, **dict(self.steps[:steps])}

    def mean(self, steps: int, figure: str) -> float:
        chosen = self.choice(steps)
        return sum(getattr(self.points[layer][name], figure) for layer, name in chosen.items()) / len(chosen)

    def damage(self, steps: int) -> float:
        """Summed over layers."""
        return self.mean(steps, "damage") * len(self.start)
