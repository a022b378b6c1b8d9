"""The cheapest routing of every layer of a model that is good enough: a search over source mixes and budgets.

Cost is the number of keys that a query looks at, scored or attended, and summaries; mean over queries and layers.

1. Every candidate routes a sample of the queries of every layer, on what the layer gets while the model reads densely:
   its cost and its output error there. No pass of the model is needed for that but one.
2. One layer at a time is made sparse, and the divergence of the model's predictions tells how much an error of that
   layer matters. (Not for a target in output error.)
3. For each layer only the candidates on the lower convex hull of damage against cost can be part of a best choice.
   From the cheapest of every layer on, the steps along these hulls are taken in the order of damage avoided per key:
   every number of steps is a configuration of the model, the best one of its cost if damages add up.
4. The model reads with some of these configurations, until the cheapest that meets the target is found.
5. What was found is checked on texts that had no part in it.
"""

from ssa_framework.laboratory.tune.candidates import (
    BUDGETS,
    DENSE,
    default_candidates,
    preset_references,
    with_budgets,
)
from ssa_framework.laboratory.tune.results import Change, Target, TargetKind, Trial, Tuning
from ssa_framework.laboratory.tune.search import tune

__all__ = [
    "BUDGETS",
    "DENSE",
    "Change",
    "Target",
    "TargetKind",
    "Trial",
    "Tuning",
    "default_candidates",
    "preset_references",
    "tune",
    "with_budgets",
]
