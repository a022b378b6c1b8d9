"""How good a neighbor graph is, and what it costs."""

from ssa_framework.quality.exactness import output_difference
from ssa_framework.quality.measure import QualityReport, measure
from ssa_framework.quality.memory import peak_memory
from ssa_framework.quality.timing import Timing, time_alternating

__all__ = ["QualityReport", "Timing", "measure", "output_difference", "peak_memory", "time_alternating"]
