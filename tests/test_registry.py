"""The registry: what is registered, what is refused and in whose name, and what a broken plugin may not break."""

from __future__ import annotations

import copy
import pickle
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from ssa_framework import registry as registry_module
from ssa_framework.errors import PluginError, SourceNameError, SSAError, UnknownSourceError
from ssa_framework.plugin import Band, NeighborSource, Registrar, RoutingContext, hookimpl
from ssa_framework.registry import OWN_DISTRIBUTION, SourceRegistry, default_registry, register_source

BUILT_IN = ["blocks", "clusters", "edges", "faiss", "global", "lsh", "random", "self", "strided", "topk", "window"]


class Nearest(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Band:
        return Band(1, 1)


class Previous(NeighborSource):
    def propose(self, ctx: RoutingContext) -> Band:
        return Band(1, 0)


class Plugin:
    """A plugin object that registers the given sources, in order."""

    def __init__(self, *sources: tuple[object, object]) -> None:
        self.sources = sources
        self.calls = 0

    @hookimpl
    def ssa_register_sources(self, register: Registrar) -> None:
        self.calls += 1
        for name, source_class in self.sources:
            register.add(name, source_class)


class Observer:
    """A plugin object that brings no source and watches the graphs."""

    def __init__(self, log: list[object], label: str) -> None:
        self.log, self.label = log, label

    @hookimpl
    def ssa_graph_built(self, graph: object, layer: object) -> None:
        self.log.append((self.label, graph, layer))


@pytest.fixture
def registry() -> SourceRegistry:
    """The built-in sources only, whatever else is installed on this machine."""
    return SourceRegistry(plugins=[])


Distribution = Callable[..., None]


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribution]:
    """Puts a distribution with one module and its entry points on the path, as pip would."""
    modules: list[str] = []

    def install(name: str, source: str, *entry_points: str) -> None:
        module = name.replace("-", "_").lower() + "_plugin"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        lines = "".join(f"{entry} = {module}\n" for entry in entry_points or ("plugin",))
        (info / "entry_points.txt").write_text(f"[ssa_framework]\n{lines}", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    monkeypatch.delenv("SSA_PLUGINS", raising=False)
    yield install
    for module in modules:
        sys.modules.pop(module, None)


GOOD_PLUGIN = """
    from ssa_framework.plugin import Band, NeighborSource, hookimpl

    class Upstream(NeighborSource):
        def propose(self, ctx):
            return Band(2, 0)

    @hookimpl
    def ssa_register_sources(register):
        register.add("upstream", Upstream)
"""


# -- what is registered ------------------------------------------------------------------------------------------


def test_built_in_sources_come_through_entry_points_of_this_distribution(registry: SourceRegistry) -> None:
    assert list(registry.sources) == BUILT_IN
    for name, source in registry.sources.items():
        assert source.name == name
        assert source.distribution == OWN_DISTRIBUTION
        assert source.plugin.startswith(f"{OWN_DISTRIBUTION}:")
        assert issubclass(registry.get(name), NeighborSource)
        assert registry.get(name).__module__.split(".")[0] == "ssa_plugins"
    assert [p for p in registry.unloaded if p.distribution == OWN_DISTRIBUTION] == []


def test_register_in_code(registry: SourceRegistry) -> None:
    registry.register("nearest", Nearest)
    registry.register("previous", Previous)
    assert registry.get("nearest") is Nearest
    assert registry.get("previous") is Previous
    assert registry.sources["nearest"].distribution is None
    assert "Nearest" in registry.sources["nearest"].plugin
    assert list(registry.sources) == sorted([*BUILT_IN, "nearest", "previous"])


def test_register_plugin_takes_all_its_sources_and_calls_it_once(registry: SourceRegistry) -> None:
    first, second = Plugin(("nearest", Nearest), ("previous", Previous)), Plugin(("another", Nearest))
    registry.register_plugin(first, name="first", distribution="first-dist")
    registry.register_plugin(second)
    assert registry.get("nearest") is Nearest
    assert registry.get("previous") is Previous
    assert registry.sources["previous"].plugin == "first"
    assert registry.sources["previous"].distribution == "first-dist"
    assert (first.calls, second.calls) == (1, 1)


def test_registries_do_not_share_what_is_registered_in_code(registry: SourceRegistry) -> None:
    registry.register("nearest", Nearest)
    assert "nearest" not in SourceRegistry(plugins=[]).sources


def test_sources_is_a_copy(registry: SourceRegistry) -> None:
    registry.sources.clear()
    assert list(registry.sources) == BUILT_IN


def test_replace_takes_the_place_of_what_was_registered_in_code(registry: SourceRegistry) -> None:
    registry.register("nearest", Nearest)
    registry.register("nearest", Previous, replace=True)
    assert registry.get("nearest") is Previous
    registry.register("new", Nearest, replace=True)
    assert registry.get("new") is Nearest


def test_replace_never_touches_an_installed_plugin(registry: SourceRegistry) -> None:
    built_in = registry.get("window")
    with pytest.raises(SourceNameError, match="'window' is taken by plugin 'ssa-framework:window'"):
        registry.register("window", Nearest, replace=True)
    assert registry.get("window") is built_in


def test_replace_with_what_is_no_source_keeps_the_old(registry: SourceRegistry) -> None:
    registry.register("nearest", Nearest)
    with pytest.raises(PluginError):
        registry.register("nearest", nn.Linear, replace=True)
    assert registry.get("nearest") is Nearest


def test_copies_of_a_layer_share_the_registry(registry: SourceRegistry) -> None:
    assert copy.deepcopy(registry) is registry


def test_only_the_default_registry_can_be_pickled(registry: SourceRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="default registry"):
        pickle.dumps(registry)
    monkeypatch.setattr(registry_module, "_default", registry)
    saved = pickle.dumps(registry)
    other = SourceRegistry(plugins=[])
    monkeypatch.setattr(registry_module, "_default", other)
    assert pickle.loads(saved) is other


def test_default_registry_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_default", None)
    register_source("nearest", Nearest)
    assert default_registry() is default_registry()
    assert default_registry().get("nearest") is Nearest
    with pytest.raises(SourceNameError):
        register_source("nearest", Previous)
    register_source("nearest", Previous, replace=True)
    assert default_registry().get("nearest") is Previous


# -- what is refused ---------------------------------------------------------------------------------------------


def test_taken_name_names_both_plugins(registry: SourceRegistry) -> None:
    registry.register_plugin(Plugin(("nearest", Nearest)), name="the-first")
    with pytest.raises(SourceNameError, match=r"'nearest' is taken by plugin 'the-first'; plugin 'the-second'"):
        registry.register_plugin(Plugin(("nearest", Previous)), name="the-second")
    assert registry.get("nearest") is Nearest


def test_taken_name_of_a_built_in_source(registry: SourceRegistry) -> None:
    with pytest.raises(SourceNameError, match=r"'window' is taken by plugin 'ssa-framework:window'; .*Nearest"):
        registry.register("window", Nearest)
    assert registry.get("window") is not Nearest


def test_name_taken_twice_in_code_as_when_a_notebook_cell_runs_again(registry: SourceRegistry) -> None:
    registry.register("nearest", Nearest)
    for source_class in (Nearest, Previous):
        with pytest.raises(SourceNameError, match=r"'nearest' is taken by plugin .*Nearest.*; plugin .* wants it too"):
            registry.register("nearest", source_class)
    assert registry.get("nearest") is Nearest


def test_name_taken_twice_by_one_plugin(registry: SourceRegistry) -> None:
    with pytest.raises(SourceNameError, match="'nearest' is taken by plugin 'twice'; plugin 'twice' wants it too"):
        registry.register_plugin(Plugin(("nearest", Nearest), ("nearest", Previous)), name="twice")
    assert "nearest" not in registry.sources


@pytest.mark.parametrize(
    "name",
    ["", "Upper", "1st", "with-dash", "two words", "dotted.name", "_hidden", "größe", "new\n", 3, None],
    ids=repr,
)
def test_name_that_is_no_identifier(registry: SourceRegistry, name: object) -> None:
    with pytest.raises(SourceNameError, match="not a usable source name"):
        registry.register_plugin(Plugin((name, Nearest)))
    assert list(registry.sources) == BUILT_IN


@pytest.mark.parametrize("name", ["keys", "items", "forward", "training", "half", "type"])
def test_name_that_a_module_dict_cannot_hold(registry: SourceRegistry, name: str) -> None:
    with pytest.raises(SourceNameError, match="not a usable source name"):
        registry.register(name, Nearest)


@pytest.mark.parametrize("name", [*BUILT_IN, "a", "my_source2"])
def test_accepted_names_fit_a_module_dict(name: str) -> None:
    registrar = Registrar("plugin", None, {})
    registrar.add(name, Nearest)
    assert list(nn.ModuleDict({source: nn.Identity() for source in registrar.added})) == [name]


@pytest.mark.parametrize(
    "not_a_source", [nn.Linear, int, Nearest.propose, "Nearest", None], ids=["Module", "int", "method", "str", "None"]
)
def test_class_that_is_no_source(registry: SourceRegistry, not_a_source: object) -> None:
    with pytest.raises(PluginError, match=r"'broken': source 'nothing' must be a NeighborSource class"):
        registry.register_plugin(Plugin(("nothing", not_a_source)), name="broken")
    with pytest.raises(PluginError, match="source 'nothing' must be a NeighborSource class"):
        registry.register("nothing", not_a_source)
    assert "nothing" not in registry.sources


def test_refused_plugin_leaves_nothing_behind_and_may_come_again(registry: SourceRegistry) -> None:
    plugin = Plugin(("nearest", Nearest), ("Bad Name", Previous))
    with pytest.raises(SourceNameError):
        registry.register_plugin(plugin, name="plugin")
    assert list(registry.sources) == BUILT_IN
    assert not registry.manager.is_registered(plugin)
    plugin.sources = (("nearest", Nearest),)
    registry.register_plugin(plugin, name="plugin")
    assert registry.get("nearest") is Nearest


def test_error_raised_by_a_hook_reaches_the_caller_and_rolls_back(registry: SourceRegistry) -> None:
    class Raising:
        @hookimpl
        def ssa_register_sources(self, register: Registrar) -> None:
            register.add("nearest", Nearest)
            raise ZeroDivisionError("in the hook")

    plugin = Raising()
    with pytest.raises(ZeroDivisionError, match="in the hook"):
        registry.register_plugin(plugin)
    assert "nearest" not in registry.sources
    assert not registry.manager.is_registered(plugin)


def test_misspelt_hook_is_an_error_and_rolled_back(registry: SourceRegistry) -> None:
    class Misspelt:
        @hookimpl
        def ssa_register_source(self, register: Registrar) -> None:
            register.add("nearest", Nearest)

    plugin = Misspelt()
    with pytest.raises(PluginError, match=r"(?s)plugin 'typo': .*ssa_register_source"):
        registry.register_plugin(plugin, name="typo")
    assert not registry.manager.is_registered(plugin)
    registry.register("nearest", Nearest)  # the misspelt hook does not haunt the next plugin
    assert registry.get("nearest") is Nearest


def test_misspelt_hook_argument_is_an_error(registry: SourceRegistry) -> None:
    class Misspelt:
        @hookimpl
        def ssa_register_sources(self, registrar: Registrar) -> None:
            registrar.add("nearest", Nearest)

    plugin = Misspelt()
    with pytest.raises(PluginError, match=r"(?s)plugin 'typo': .*registrar"):
        registry.register_plugin(plugin, name="typo")
    assert not registry.manager.is_registered(plugin)


def test_plugin_object_that_cannot_be_hashed_is_an_error(registry: SourceRegistry) -> None:
    with pytest.raises(PluginError, match=r"'odd': .*hashable"):
        registry.register_plugin(SimpleNamespace(), name="odd")
    registry.register("nearest", Nearest)
    assert registry.get("nearest") is Nearest


def test_registering_a_plugin_twice_is_an_error_and_keeps_the_first(registry: SourceRegistry) -> None:
    log: list[object] = []
    observer = Observer(log, "once")
    registry.register_plugin(observer, name="observer")
    for name in ("observer", "another name"):
        with pytest.raises(PluginError, match=rf"plugin '{name}': .*already registered"):
            registry.register_plugin(observer, name=name)
    registry.graph_built("graph", "layer")
    assert log == [("once", "graph", "layer")]


# -- unknown names -----------------------------------------------------------------------------------------------


def test_unknown_source_lists_the_known(registry: SourceRegistry) -> None:
    with pytest.raises(UnknownSourceError) as caught:
        registry.get("lhs")
    assert str(caught.value) == f"unknown source 'lhs'; registered: {', '.join(BUILT_IN)}"
    for expected in (SSAError, KeyError, ValueError):
        assert isinstance(caught.value, expected)


def test_unknown_source_without_any_source_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [])
    empty = SourceRegistry()
    assert empty.sources == {}
    with pytest.raises(UnknownSourceError, match=r"registered: none\n.*pip install -e \."):
        empty.get("window")


# -- entry points of other distributions -------------------------------------------------------------------------


def test_entry_point_of_another_distribution(distribution: Distribution) -> None:
    distribution("Other-Sources", GOOD_PLUGIN)
    source = SourceRegistry().sources["upstream"]
    assert source.distribution == "other-sources"
    assert source.plugin == "other-sources:plugin"
    assert source.source_class.__module__ == "other_sources_plugin"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('no licence found')", "RuntimeError: no licence found"),
        (GOOD_PLUGIN.replace("ssa_register_sources", "ssa_register_source"), "PluginError"),
        (GOOD_PLUGIN.replace("(NeighborSource)", ""), "PluginError: .* must be a NeighborSource class"),
    ],
    ids=["missing import", "syntax error", "raises", "misspelt hook", "no source"],
)
def test_broken_plugin_is_reported_only_when_its_source_is_asked_for(
    distribution: Distribution, source: str, reason: str
) -> None:
    distribution("broken-sources", source)
    registry = SourceRegistry(plugins=["broken-sources"])
    assert list(registry.sources) == BUILT_IN
    assert issubclass(registry.get("window"), NeighborSource)
    assert [p.entry_point for p in registry.unloaded if p.distribution == "broken-sources"] == ["plugin"]
    with pytest.raises(UnknownSourceError, match=rf"plugin 'plugin' of broken-sources was not loaded: {reason}"):
        registry.get("upstream")
    assert not registry.manager.has_plugin("broken-sources:plugin")


def test_newcomer_that_takes_a_built_in_name_is_refused_whatever_its_name(distribution: Distribution) -> None:
    distribution("aaa-first-by-alphabet", GOOD_PLUGIN.replace('"upstream"', '"window"'))
    expected = r"'window' is taken by plugin 'ssa-framework:window'; plugin 'aaa-first-by-alphabet:plugin'"
    with pytest.raises(SourceNameError, match=expected):
        SourceRegistry()


def test_two_newcomers_that_want_one_name(distribution: Distribution) -> None:
    distribution("one-source", GOOD_PLUGIN)
    distribution("two-source", GOOD_PLUGIN)
    with pytest.raises(SourceNameError, match=r"taken by plugin 'one-source:plugin'; plugin 'two-source:plugin'"):
        SourceRegistry()
    assert SourceRegistry(plugins=["two-source"]).sources["upstream"].distribution == "two-source"


# -- SSA_PLUGINS and the argument --------------------------------------------------------------------------------

SPELLINGS = ["other-sources", "Other_Sources", "other.sources", " other-sources , ", "unrelated,other-sources"]


@pytest.mark.parametrize("value", SPELLINGS, ids=repr)
def test_variable_allows(distribution: Distribution, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    distribution("Other-Sources", GOOD_PLUGIN)
    monkeypatch.setenv("SSA_PLUGINS", value)
    registry = SourceRegistry()
    assert registry.sources["upstream"].distribution == "other-sources"
    assert list(registry.sources) == sorted([*BUILT_IN, "upstream"])


@pytest.mark.parametrize("value", ["", " ", ",", "unrelated", "other"], ids=repr)
def test_variable_leaves_out_without_running_it(
    distribution: Distribution, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    distribution("other-sources", GOOD_PLUGIN)
    monkeypatch.setenv("SSA_PLUGINS", value)
    registry = SourceRegistry()
    assert list(registry.sources) == BUILT_IN
    assert "other_sources_plugin" not in sys.modules
    (left_out,) = [p for p in registry.unloaded if p.distribution == "other-sources"]
    assert left_out.entry_point == "plugin"
    with pytest.raises(
        UnknownSourceError, match=r"'plugin' of other-sources was not loaded: not allowed by SSA_PLUGINS"
    ):
        registry.get("upstream")


def test_argument_beats_the_variable(distribution: Distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution("other-sources", GOOD_PLUGIN)
    monkeypatch.setenv("SSA_PLUGINS", "other-sources")
    assert list(SourceRegistry(plugins=[]).sources) == BUILT_IN
    monkeypatch.setenv("SSA_PLUGINS", "")
    assert "upstream" in SourceRegistry(plugins=["Other_Sources"]).sources


def test_argument_that_is_one_string_is_an_error() -> None:
    with pytest.raises(PluginError, match="list of distribution names, got the string 'other-sources'"):
        SourceRegistry(plugins="other-sources")


# -- observers ---------------------------------------------------------------------------------------------------


def test_every_observer_sees_every_graph_once(registry: SourceRegistry) -> None:
    log: list[object] = []
    registry.register_plugin(Observer(log, "a"), name="a")
    registry.register_plugin(Observer(log, "b"), name="b")
    registry.graph_built("graph 1", "layer 1")
    registry.graph_built("graph 2", "layer 2")
    seen = [("a", "graph 1", "layer 1"), ("b", "graph 1", "layer 1")]
    seen += [("a", "graph 2", "layer 2"), ("b", "graph 2", "layer 2")]
    assert sorted(log) == sorted(seen)
    assert list(registry.sources) == BUILT_IN


def test_without_observers_nothing_happens(registry: SourceRegistry) -> None:
    assert registry.graph_built("graph", "layer") is None
