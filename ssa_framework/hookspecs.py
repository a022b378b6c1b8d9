"""The hooks of the project, for pluggy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from ssa_framework.registry import Registrar

PROJECT_NAME = "ssa_framework"
ENTRY_POINT_GROUP = "ssa_framework"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def ssa_register_sources(register: Registrar) -> None:
    """Register neighbor sources: ``register.add(name, SourceClass)``. Called once, when the plugin is loaded."""


@hookspec
def ssa_graph_built(graph: Any, layer: Any) -> None:
    """Observe a `NeighborGraph` right after a router built it. ``layer`` is the `LayerSpec` of the layer."""


@hookspec
def ssa_graph_audited(report: Any, layer: Any) -> None:
    """Observe an `AuditReport` of the attention mass that a graph misses (``SSAConfig(audit=...)``)."""
