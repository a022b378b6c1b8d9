"""Finds plugins and keeps the sources that they register."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from torch import nn

from ssa_framework import hookspecs
from ssa_framework.errors import PluginError, SourceNameError, UnknownSourceError
from ssa_framework.hookspecs import ENTRY_POINT_GROUP, PROJECT_NAME, hookimpl
from ssa_framework.source import NeighborSource

OWN_DISTRIBUTION = "ssa-framework"
PLUGINS_VARIABLE = "SSA_PLUGINS"


@dataclass(frozen=True)
class RegisteredSource:
    """A source class and the plugin that brought it. ``distribution`` is ``None`` for one registered in code."""

    name: str
    source_class: type[NeighborSource]
    plugin: str
    distribution: str | None


@dataclass(frozen=True)
class UnloadedPlugin:
    """An entry point that was not loaded, and why."""

    entry_point: str
    distribution: str
    reason: str


class Registrar:
    """What `ssa_register_sources` gets: `add` puts a source into the registry, in the plugin's name."""

    def __init__(self, plugin: str, distribution: str | None, taken: Mapping[str, RegisteredSource]) -> None:
        self._plugin = plugin
        self._distribution = distribution
        self._taken = taken
        self.added: dict[str, RegisteredSource] = {}

    def add(self, name: str, source_class: type[NeighborSource]) -> None:
        """Register ``source_class`` under ``name``.

        Raises:
            SourceNameError: the name is taken (the message names both plugins) or is no lower-case identifier.
            PluginError: ``source_class`` is not a subclass of `NeighborSource`.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or hasattr(nn.ModuleDict(), name):
            raise SourceNameError(
                f"{name!r} is not a usable source name: lower-case letters, digits and underscores, and no "
                f"attribute of torch.nn.ModuleDict"
            )
        if not (isinstance(source_class, type) and issubclass(source_class, NeighborSource)):
            raise PluginError(f"plugin {self._plugin!r}: source {name!r} must be a NeighborSource class")
        taken = self.added.get(name) or self._taken.get(name)
        if taken is not None:
            raise SourceNameError(
                f"source name {name!r} is taken by plugin {taken.plugin!r}; plugin {self._plugin!r} wants it too"
            )
        self.added[name] = RegisteredSource(name, source_class, self._plugin, self._distribution)


class _OneSource:
    """A plugin that registers a single source."""

    def __init__(self, name: str, source_class: type[NeighborSource]) -> None:
        self._name = name
        self._source_class = source_class
        self.__name__ = f"{getattr(source_class, '__qualname__', source_class)} ({id(self):x})"

    @hookimpl
    def ssa_register_sources(self, register: Registrar) -> None:
        register.add(self._name, self._source_class)


class SourceRegistry:
    """The sources of a set of plugins.

    Args:
        plugins: distributions whose entry points may be loaded, besides the built-in ones. ``None`` reads the
            environment variable ``SSA_PLUGINS`` (comma-separated distributions; set but empty: the built-in ones
            only; not set: all). Loading a plugin runs its code.
    """

    def __init__(self, plugins: Iterable[str] | None = None) -> None:
        self.manager = pluggy.PluginManager(PROJECT_NAME)
        self.manager.add_hookspecs(hookspecs)
        self._sources: dict[str, RegisteredSource] = {}
        self.unloaded: list[UnloadedPlugin] = []
        self._load_entry_points(_allowed_distributions(plugins))

    def __deepcopy__(self, memo: dict[int, Any]) -> SourceRegistry:
        return self  # plugins are loaded once; copies of a layer share them

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name: a saved layer finds the default registry of the process that loads it."""
        if self is not _default:
            raise PluginError(
                "only layers that use the default registry can be pickled; save the state_dict, or register the "
                "source with ssa_framework.register_source"
            )
        return default_registry, ()

    def _load_entry_points(self, allowed: set[str] | None) -> None:
        found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=_load_order)
        for entry_point in found:
            distribution = _distribution_name(entry_point)
            if allowed is not None and distribution not in allowed | {OWN_DISTRIBUTION}:
                reason = f"not allowed by {PLUGINS_VARIABLE} or the plugins argument"
                self.unloaded.append(UnloadedPlugin(entry_point.name, distribution, reason))
                continue
            try:
                plugin = entry_point.load()
                self.register_plugin(plugin, name=f"{distribution}:{entry_point.name}", distribution=distribution)
            except SourceNameError:
                raise  # two plugins want one name: nobody can say which of them a configuration means
            except Exception as error:  # noqa: BLE001 - a broken plugin must not break users who don't use it
                reason = f"{type(error).__name__}: {error}"
                self.unloaded.append(UnloadedPlugin(entry_point.name, distribution, reason))

    def register_plugin(self, plugin: object, name: str | None = None, distribution: str | None = None) -> None:
        """Register an object or module with hook implementations, and the sources it brings; all or nothing.

        Raises:
            PluginError: a hook that does not exist, a source that is none, or a plugin that is registered already.
            SourceNameError: see `Registrar.add`.
        """
        label: str = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        known = self.manager.is_registered(plugin)
        try:
            hash(plugin)
            registered_name = self.manager.register(plugin, name=name)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError, TypeError) as error:
            if not known and self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            raise PluginError(f"plugin {label!r}: {error}") from error
        registrar = Registrar(label, distribution, self._sources)
        others = [p for p in self.manager.get_plugins() if p is not plugin]
        try:
            self.manager.subset_hook_caller("ssa_register_sources", others)(register=registrar)
        except Exception:
            self.manager.unregister(name=registered_name)
            raise
        self._sources.update(registrar.added)

    def register(self, name: str, source_class: type[NeighborSource], *, replace: bool = False) -> None:
        """Register one source in code; the short way for notebooks and applications.

        Args:
            replace: take the place of a source of this name that was registered in code, as when a notebook cell
                runs again. Layers that exist keep the source they have.

        Raises:
            SourceNameError: the name is taken; a source of an installed plugin is never replaced.
            PluginError: ``source_class`` is not a subclass of `NeighborSource`.
        """
        taken = self._sources.get(name) if isinstance(name, str) else None
        if replace and taken is not None and taken.distribution is None:
            del self._sources[name]
        try:
            self.register_plugin(_OneSource(name, source_class))
        except Exception:
            if taken is not None:
                self._sources[name] = taken
            raise

    def get(self, name: str) -> type[NeighborSource]:
        """The class registered under ``name``.

        Raises:
            UnknownSourceError: lists the registered names, and the plugins that were not loaded, with the reason.
        """
        if name in self._sources:
            return self._sources[name].source_class
        message = f"unknown source {name!r}; registered: {', '.join(sorted(self._sources)) or 'none'}"
        for plugin in self.unloaded:
            message += f"\n  plugin {plugin.entry_point!r} of {plugin.distribution} was not loaded: {plugin.reason}"
        if not self._sources:
            message += "\n  the built-in sources come with the installed distribution: pip install -e ."
        raise UnknownSourceError(message)

    @property
    def sources(self) -> dict[str, RegisteredSource]:
        """Everything registered, by name."""
        return dict(sorted(self._sources.items()))

    @property
    def observes_graphs(self) -> bool:
        """Whether anybody wants to be told of graphs."""
        return bool(self.manager.hook.ssa_graph_built.get_hookimpls())

    def graph_built(self, graph: Any, layer: Any) -> None:
        """Tell the observers (`ssa_graph_built`) of a graph."""
        if self.observes_graphs:
            self.manager.hook.ssa_graph_built(graph=graph, layer=layer)

    def graph_audited(self, report: Any, layer: Any) -> None:
        """Tell the observers (`ssa_graph_audited`) of an audit."""
        hook = self.manager.hook.ssa_graph_audited
        if hook.get_hookimpls():
            hook(report=report, layer=layer)


def _allowed_distributions(plugins: Iterable[str] | None) -> set[str] | None:
    if isinstance(plugins, str):
        raise PluginError(f"plugins must be a list of distribution names, got the string {plugins!r}")
    if plugins is None:
        variable = os.environ.get(PLUGINS_VARIABLE)
        if variable is None:
            return None
        plugins = variable.split(",")
    return {_normalize(name) for name in plugins if name.strip()}


def _normalize(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _distribution_name(entry_point: EntryPoint) -> str:
    return _normalize(entry_point.dist.name) if entry_point.dist is not None else "unknown"


def _load_order(entry_point: EntryPoint) -> tuple[bool, str, str]:
    # The built-in sources first, so that a name collision is reported against the newcomer.
    distribution = _distribution_name(entry_point)
    return distribution != OWN_DISTRIBUTION, distribution, entry_point.name


_default: SourceRegistry | None = None


def default_registry() -> SourceRegistry:
    """The registry that layers use when none is given; plugins are loaded on first use."""
    global _default
    if _default is None:
        _default = SourceRegistry()
    return _default


def register_source(name: str, source_class: type[NeighborSource], *, replace: bool = False) -> None:
    """Register ``source_class`` under ``name`` in the default registry; see `SourceRegistry.register`."""
    default_registry().register(name, source_class, replace=replace)
