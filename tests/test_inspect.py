"""``ssa inspect``: its figures against plain dense computations, and the command from the model to the page."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from integrations.tiny_models import causal_lm
from ssa_framework import NeighborGraph, SSAConfig, build_graph, register_source
from ssa_framework import registry as registry_module
from ssa_framework.cli import inspect as inspect_module
from ssa_framework.cli import inspect_page, inspect_tables
from ssa_framework.errors import ConfigError, ShapeError, UnknownSourceError
from ssa_framework.laboratory import inspect as laboratory
from ssa_framework.laboratory.capture import LayerTensors, capture_layers
from ssa_framework.laboratory.inspect import Inspection, Inspector, MixFigures, inspect_layer, inspect_model
from ssa_framework.laboratory.routing import MixRouter, sample_queries
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.select_neighbors.reference import _members
from ssa_framework.plugin import Band, Candidates, Columns, NeighborSource, Proposal, Ranges, RoutingContext, Spans
from ssa_framework.quality import measure
from ssa_framework.quality import rows as rows_module
from ssa_framework.router import Router
from test_cli import plain, ssa

HEADS, KV_HEADS, LENGTH, DIM, K = 4, 2, 45, 8, 5


def tensors(seed: int = 0, batch: int = 1, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, HEADS, length, DIM), (batch, KV_HEADS, length, DIM), (batch, KV_HEADS, length, DIM))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * q, k, v


# -- the oracle: loops over single queries, over the dense weights and the keys of each proposal ----------------------

FIXED: dict[str, dict[str, Any]] = {"self": {}, "window": {"size": 3}, "global": {"tokens": 2}}
MIXES: dict[str, dict[str, dict[str, Any]]] = {
    "fixed": FIXED,
    "topk": {"window": {"size": 2}, "topk": {}},
    "lsh": {**FIXED, "lsh": {"rounds": 2, "candidates": 8}},
    "lsh-limit": {"self": {}, "lsh": {"rounds": 3, "candidates": 16, "limit": 3}},
    "two-content": {"global": {"tokens": 1}, "lsh": {"rounds": 2, "candidates": 8}, "blocks": {"size": 4, "keys": 8}},
    "guaranteed": {"window": {"size": 1}, "strided": {"stride": 7, "count": 2}, "random": {"links": 2}, "topk": {}},
    "whole": {"global": {"tokens": 2}, "clusters": {"levels": [[16, 4]], "keys": 6, "summaries": False}},
    "whole-and-listed": {"clusters": {"levels": [[16, 4]], "keys": 6, "summaries": False}, "topk": {}},
}


class Recorder(Router):
    """Keeps what the sources proposed."""

    def _collect(self, *args: Any, **options: Any) -> Any:
        self.proposals = super()._collect(*args, **options)
        return self.proposals


def proposed_by(config: SSAConfig, q: Tensor, k: Tensor, causal: bool) -> tuple[NeighborGraph, dict[str, Tensor]]:
    """The graph, and what each source proposed, key by key: bool ``[B, H, N, M]``."""
    sizes = {"d_model": HEADS * DIM, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "causal": causal}
    router = Recorder(config.replace(**sizes, dense_below=0))
    options = {"batch": q.shape[0], "heads": HEADS, "queries": LENGTH, "keys": LENGTH, "device": q.device}
    graph = router(q, k, make_edge_mask(**options, causal=causal))
    masks = {name: torch.zeros(q.shape[0], HEADS, LENGTH, LENGTH, dtype=torch.bool) for name, _ in router.proposals}
    group = HEADS // graph.graph_heads
    for name, proposal in router.proposals:
        for b, h, n in itertools.product(range(q.shape[0]), range(HEADS), range(LENGTH)):
            for m in keys_of(proposal, b, h // group, n, causal, graph.graph_heads):
                masks[name][b, h, n, m] |= 0 <= m < LENGTH and not (causal and m > n)
    return graph, masks


def keys_of(proposal: Proposal, b: int, g: int, n: int, causal: bool, graph_heads: int) -> Iterable[int]:
    if isinstance(proposal, Band):
        return range(max(0, n - proposal.before), min(LENGTH, n + proposal.after + 1))
    if isinstance(proposal, Columns):
        return [int(m) for m in proposal.positions]
    if isinstance(proposal, Spans):
        return range(int(proposal.start[0, n]), int(proposal.end[0, n]))
    if isinstance(proposal, Ranges) and proposal.order is not None and 1 < proposal.order.shape[1] < graph_heads:
        repeats = graph_heads // proposal.order.shape[1]
        proposal = replace(proposal, order=proposal.order.repeat_interleave(repeats, 1))
    return _members(proposal, b, g, n, n, LENGTH, causal)


def expected_figures(
    q: Tensor, k: Tensor, v: Tensor, graph: NeighborGraph, proposed: dict[str, Tensor], causal: bool
) -> dict[str, Any]:
    """Per head ``[H]``, and for the sources by name; of graphs without summaries."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q @ keys.mT / math.sqrt(DIM)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    edges = graph.to_dense_mask()
    figures: dict[str, Any] = {name: [[] for _ in range(HEADS)] for name in ("recall", "mass", "error", "slots")}
    of_sources = {
        source: {n: [[] for _ in range(HEADS)] for n in ("recall", "mass", "only", "error", "without", "proposed")}
        for source in proposed
    }
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for n in range(q.shape[2]):
                weights = scores[b, h, n].softmax(-1)
                out = weights @ values[b, h]
                allowed = (scores[b, h, n] > -torch.inf).nonzero()[:, 0].tolist()
                best = set(sorted(allowed, key=lambda m: -float(weights[m]))[:K])
                mine = set(edges[b, h, n].nonzero()[:, 0].tolist())

                def error(keys: set[int]) -> float:
                    some = torch.tensor(sorted(keys), dtype=torch.long)
                    sparse = scores[b, h, n, some].softmax(-1) @ values[b, h, some]  # noqa: B023
                    return float((sparse - out).norm() / out.norm())  # noqa: B023

                def mass(keys: set[int]) -> float:
                    return sum(float(weights[m]) for m in keys)  # noqa: B023

                for name, value in (
                    ("recall", len(best & mine) / len(best)),
                    ("mass", mass(mine)),
                    ("error", error(mine)),
                    ("slots", len(mine)),
                ):
                    figures[name][h].append(value)
                sets = {s: set(mask[b, h, n].nonzero()[:, 0].tolist()) for s, mask in proposed.items()}
                for source, found in sets.items():
                    others = set().union(*(keys for s, keys in sets.items() if s != source))
                    here, only = found & mine, (found & mine) - others
                    for name, value in (
                        ("recall", len(best & here) / len(best)),
                        ("mass", mass(here)),
                        ("only", mass(only)),
                        ("error", error(here)),
                        ("without", error(mine - only)),
                        ("proposed", len(found)),
                    ):
                        of_sources[source][name][h].append(value)
    return {**figures, "sources": of_sources}


def mean(rows: list[list[float]]) -> list[float]:
    return [float(np.mean(row)) for row in rows]


def close(got: tuple[float, ...], expected: list[float]) -> bool:
    return got == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("mix", MIXES)
def test_figures_equal_the_dense_computation(mix: str, graph_heads: Any, causal: bool) -> None:
    q, k, v = tensors()
    config = SSAConfig(sources=MIXES[mix], num_neighbors=16, graph_heads=graph_heads)
    found = inspect_layer(q, k, v, {"mix": config}, causal=causal, queries=LENGTH, recall_at=K, exact_at=(3, 16))
    graph, proposed = proposed_by(config, q, k, causal)
    expected = expected_figures(q, k, v, graph, proposed, causal)
    mine = found.mixes["mix"]
    assert close(mine.recall, mean(expected["recall"]))
    assert close(mine.attention_mass, mean(expected["mass"]))
    assert close(mine.output_error, mean(expected["error"]))
    assert close(mine.output_error_p95, [float(np.quantile(row, 0.95)) for row in expected["error"]])
    assert close(mine.slots, mean(expected["slots"]))
    assert mine.overlap is None
    slots, scored = graph.slots_by_source(), graph.keys_scored()
    assert list(mine.sources) == list(MIXES[mix])
    for name, source in mine.sources.items():
        of = expected["sources"][name]
        assert close(source.recall, mean(of["recall"])), name
        assert close(source.attention_mass, mean(of["mass"])), name
        assert close(source.only_mass, mean(of["only"])), name
        assert close(source.output_error, mean(of["error"])), name
        assert close(source.output_error_p95, [float(np.quantile(row, 0.95)) for row in of["error"]]), name
        assert close(source.error_without, mean(of["without"])), name
        assert close(source.keys_proposed, mean(of["proposed"])), name
        assert np.mean(source.slots) == pytest.approx(slots[name], rel=1e-4), name
        assert np.mean(source.keys_scored) == pytest.approx(scored[name], rel=1e-4), name
    assert sum(np.mean(source.slots) for source in mine.sources.values()) == pytest.approx(
        np.mean(mine.slots), rel=1e-4
    )


def test_exact_best_keys() -> None:
    q, k, v = tensors()
    found = inspect_layer(q, k, v, {"self": SSAConfig(sources={"self": {}})}, queries=LENGTH, exact_at=(3, 7, LENGTH))
    every = torch.ones(1, HEADS, LENGTH, LENGTH).tril().bool()
    scores = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(DIM)).masked_fill(~every, -torch.inf)
    for exact in found.exact:
        best = scores.topk(exact.keys).indices
        mask = torch.zeros_like(every).scatter(-1, best, True) & every
        graph = NeighborGraph.from_lists(
            torch.where(mask, torch.arange(LENGTH), -1), num_keys=LENGTH, causal=True
        )  # lists of all keys, most of them empty
        report = measure(q, k, v, graph, sample=LENGTH)
        assert np.mean(exact.attention_mass) == pytest.approx(report.attention_mass, rel=1e-4)
        assert np.mean(exact.output_error) == pytest.approx(report.output_error, rel=1e-4, abs=1e-6)
    assert found.exact[-1].attention_mass == pytest.approx([1.0] * HEADS)
    assert found.allowed == pytest.approx((LENGTH + 1) / 2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
def test_mixes_with_summaries_are_measured_as_measure_does(causal: bool) -> None:
    q, k, v = tensors(batch=2)
    mix = {"global": {"tokens": 1}, "clusters": {"levels": [[16, 4]], "keys": 6}}
    config = SSAConfig(sources=mix, num_neighbors=16, dense_below=0)
    mine = inspect_layer(q, k, v, {"mix": config}, causal=causal, queries=LENGTH, recall_at=K).mixes["mix"]
    graph = build_graph(q, k, config=config, is_causal=causal)
    report = measure(q, k, v, graph, recall_at=K, sample=LENGTH)
    assert graph.summaries is not None
    assert np.mean(mine.output_error) == pytest.approx(report.output_error, rel=1e-4)
    assert np.mean(mine.attention_mass) == pytest.approx(report.attention_mass, rel=1e-4)
    assert np.mean(mine.recall) == pytest.approx(report.recall, rel=1e-4)
    assert np.mean(mine.summaries) == pytest.approx(report.summaries, rel=1e-4)
    assert mine.output_error == pytest.approx(report.output_error_per_head.mean(0).tolist(), rel=1e-4)
    # without clusters, one column is left, and no summary: that is what global brings alone
    assert close(mine.sources["clusters"].error_without, list(mine.sources["global"].output_error))
    assert min(mine.sources["clusters"].output_error) < min(mine.sources["global"].output_error)


def test_scale_of_the_layer_counts() -> None:
    q, k, v = tensors()
    config = SSAConfig(sources=MIXES["lsh"], num_neighbors=12)
    sharp = inspect_layer(q, k, v, {"mix": config}, scale=1.0, queries=LENGTH)
    same = inspect_layer(q * math.sqrt(DIM), k, v, {"mix": config}, queries=LENGTH)
    assert sharp.mixes["mix"].output_error == pytest.approx(same.mixes["mix"].output_error, rel=1e-4)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(batch=2)
    mixes = {name: SSAConfig(sources=sources, num_neighbors=16) for name, sources in MIXES.items()}
    whole = inspect_layer(q, k, v, mixes, queries=20, recall_at=K).as_dict()
    monkeypatch.setattr(rows_module, "_CHUNK_ELEMENTS", 3 * 2 * HEADS * LENGTH)
    monkeypatch.setattr(rows_module, "_GATHERED_ELEMENTS", 1)
    pieces = inspect_layer(q, k, v, mixes, queries=20, recall_at=K).as_dict()
    assert flat(pieces) == pytest.approx(flat(whole), rel=1e-5, abs=1e-9)


def flat(value: Any) -> list[float]:
    """All numbers in nested data."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in flat(inner)]
    if isinstance(value, (list, tuple)):
        return [number for inner in value for number in flat(inner)]
    return [value] if isinstance(value, (int, float)) else []


# -- the sample ------------------------------------------------------------------------------------------------------


def test_a_sample_is_routed_as_it_would_be_among_all_queries() -> None:
    q, k, v = tensors(length=300)
    layer = LayerTensors(0, q.float(), k.float(), v.float())
    rows = sample_queries(layer, 40, first_query=100, seed=3)
    assert (len(rows), int(rows.min()) >= 100) == (40, True)
    for name, sources in {**MIXES, "preset": None}.items():
        config = SSAConfig.preset("balanced") if sources is None else SSAConfig(sources=sources, num_neighbors=16)
        graph = MixRouter(config).route(layer, rows).graph
        whole = build_graph(layer.q, layer.k, config=config.replace(dense_below=0), is_causal=True)
        assert torch.equal(graph.to_dense_mask(), whole.to_dense_mask()[:, :, rows]), name


def test_sample_follows_seed_and_first_query() -> None:
    layer = LayerTensors(0, *(x.float() for x in tensors()))
    first, again, other = (sample_queries(layer, 10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(sample_queries(layer, 1000), torch.arange(LENGTH))
    assert torch.equal(sample_queries(layer, 1000, first_query=40), torch.arange(40, LENGTH))


# -- layers of a model -----------------------------------------------------------------------------------------------


def ids(length: int = 60) -> Tensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(0))


TWO_MIXES = {
    "lsh": SSAConfig(sources=MIXES["lsh"], num_neighbors=12),
    "clusters": SSAConfig(sources={"clusters": {"levels": [[16, 4]], "keys": 8}}),
}


def test_layers_of_a_model_equal_the_single_layers() -> None:
    model = causal_lm("llama", num_hidden_layers=3)
    seen: list[int] = []
    found = inspect_model(model, ids(), TWO_MIXES, queries=20, on_layer=lambda i: seen.append(len(i.layers)))
    assert seen == [1, 2, 3]
    assert (found.complete, found.wanted, [layer.layer for layer in found.layers]) == (True, (0, 1, 2), [0, 1, 2])
    assert (found.length, found.queries, found.recall_at) == (60, 20, 32)
    layers: list[LayerTensors] = []
    capture_layers(model, ids(), layers.append)
    for layer, of_model in zip(layers, found.layers, strict=True):
        alone = inspect_layer(layer.q, layer.k, layer.v, TWO_MIXES, scale=layer.scale, queries=20)
        for name, mix in alone.mixes.items():
            assert of_model.mixes[name].output_error == mix.output_error
            assert of_model.mixes[name].sources == mix.sources


def test_overlap_is_the_jaccard_similarity_with_the_layer_before() -> None:
    model = causal_lm("llama")
    found = inspect_model(model, ids(), TWO_MIXES, queries=60)
    layers: list[LayerTensors] = []
    capture_layers(model, ids(), layers.append)
    for name, config in TWO_MIXES.items():
        first, second = (
            build_graph(x.q, x.k, config=config.replace(dense_below=0), is_causal=True).to_dense_mask() for x in layers
        )
        expected = ((first & second).sum(-1) / (first | second).sum(-1)).mean(dim=(0, 2))
        assert found.layers[0].mixes[name].overlap is None
        assert found.layers[1].mixes[name].overlap == pytest.approx(expected.tolist(), rel=1e-5)


def test_interrupted_it_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama", num_hidden_layers=3)
    whole = inspect_model(model, ids(), TWO_MIXES, queries=20)
    interrupt_in_layer(monkeypatch, 2)
    part = inspect_model(model, ids(), TWO_MIXES, queries=20)
    assert not part.complete
    assert part.layers == whole.layers[:2]
    assert model.config._attn_implementation == "sdpa"


def interrupt_in_layer(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """As Ctrl-C does."""
    inspect_one = Inspector.inspect

    def interrupted(self: Inspector, layer: LayerTensors) -> Any:
        if layer.layer == index:
            raise KeyboardInterrupt
        return inspect_one(self, layer)

    monkeypatch.setattr(Inspector, "inspect", interrupted)


def test_means() -> None:
    found = inspect_model(causal_lm("llama"), ids(), TWO_MIXES, queries=20)
    errors = [error for layer in found.layers for error in layer.mixes["lsh"].output_error]
    assert found.mean("lsh", "output_error") == pytest.approx(np.mean(errors))
    slots = [n for layer in found.layers for n in layer.mixes["lsh"].sources["window"].slots]
    assert found.mean("lsh", "slots", "window") == pytest.approx(np.mean(slots))
    assert found.mean("lsh", "slots", "clusters") is None


# -- sources that are not there yet ----------------------------------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_default", None)


class Halves(NeighborSource):
    """Every key in the first half of what a query sees; tells that it compared 7 keys for each query and head."""

    def propose(self, ctx: RoutingContext) -> Candidates:
        keys = torch.arange(ctx.num_keys, dtype=torch.int32)
        indices = torch.where(keys < ctx.positions[:, None, :, None] // 2, keys, -1)
        return Candidates(indices, keys_scored=7 * ctx.batch * ctx.graph_heads * ctx.num_queries + 10**6)


@pytest.mark.usefixtures("own_registry")
def test_a_new_source_appears_without_a_change() -> None:
    register_source("halves", Halves)
    q, k, v = tensors()
    mix = {"mine": SSAConfig(sources={"window": {"size": 2}, "halves": {}}, num_neighbors=200)}
    found = inspect_layer(q, k, v, mix, queries=LENGTH).mixes["mine"].sources["halves"]
    assert close(found.keys_proposed, [np.mean([n // 2 for n in range(LENGTH)])] * HEADS)
    assert found.keys_scored == pytest.approx([7 + 10**6 / (HEADS * LENGTH)] * HEADS, rel=1e-4)


def test_search_indexes_report_their_own_number() -> None:
    pytest.importorskip("faiss")
    q, k, v = tensors()
    config = SSAConfig(sources={"faiss": {"index": "Flat"}}, num_neighbors=8)
    found = inspect_layer(q, k, v, {"faiss": config}, queries=LENGTH).mixes["faiss"]
    assert found.keys_scored == pytest.approx([(LENGTH + 1) / 2] * HEADS, rel=1e-4)
    assert np.mean(found.sources["faiss"].keys_proposed) < (LENGTH + 1) / 2


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixes": {}}, "there is no mix"),
        ({"queries": 0}, "queries must be an integer >= 1, got 0"),
        ({"first_query": LENGTH}, rf"first_query must lie in \[0, {LENGTH}\)"),
        ({"recall_at": 0}, "recall_at must be an integer >= 1"),
        ({"exact_at": (3, 0)}, "exact_at must be an integer >= 1"),
        ({"value": torch.full((1, KV_HEADS, LENGTH, DIM), torch.inf, dtype=torch.float64)}, "v hold numbers"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    q, k, v = tensors()
    given = {"query": q, "key": k, "value": v, "mixes": {"self": SSAConfig(sources={"self": {}})}, **options}
    with pytest.raises(ConfigError, match=message):
        inspect_layer(**given)


def test_unknown_sources_and_shapes() -> None:
    q, k, v = tensors()
    with pytest.raises(UnknownSourceError, match="unknown source 'lhs'"):
        inspect_layer(q, k, v, {"mix": SSAConfig(sources={"lhs": {}})})
    with pytest.raises(ShapeError):
        inspect_layer(q[:, :, :3], k, v, TWO_MIXES)


# -- the command -----------------------------------------------------------------------------------------------------


class CharacterTokenizer:
    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(character) % 95 for character in text]}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for a model of three layers."""
    monkeypatch.setattr(
        inspect_module, "load_model", lambda *_, **__: (causal_lm("llama", num_hidden_layers=3), CharacterTokenizer())
    )
    (tmp_path / "tiny-model").mkdir()
    return tmp_path / "tiny-model"


COMMAND = ("--length", "80", "--queries", "16", "--mix", "seed", "--mix", 'mine={"window": {"size": 4}, "lsh": {}}')


class Links(HTMLParser):
    """What a page would fetch, and the text in its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.scripts = 0
        self.cells: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        self.scripts += tag == "script"
        self._in_cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)
            self._in_cell = False


def check_self_contained(page: str) -> Links:
    links = Links()
    links.feed(page)
    assert all(target.startswith("data:image/svg+xml;base64,") for target in links.targets), links.targets
    assert links.targets
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|https?://", page)
    assert "prefers-color-scheme: dark" in page
    return links


def test_command_writes_numbers_and_a_page(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = ssa("inspect", str(tiny), *COMMAND, "--layers", "0,2", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "inspect.json"]
    numbers = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    assert numbers["complete"]
    assert numbers["model"] == "tiny-model"
    assert numbers["wanted"] == [0, 2] == [layer["layer"] for layer in numbers["layers"]]
    assert list(numbers["mixes"]) == ["seed", "mine"]
    source = numbers["layers"][1]["mixes"]["seed"]["sources"]["window"]
    assert len(source["only_mass"]) == HEADS
    page = (out / "index.html").read_text(encoding="utf-8")
    links = check_self_contained(page)
    assert links.scripts == 1
    shown = plain(result.output)
    for name in ("seed", "mine", "window", "lsh"):
        assert name in shown
        assert name in links.cells
    error = np.mean([layer["mixes"]["seed"]["output_error"] for layer in numbers["layers"]])
    assert f"{error:.3f}" in links.cells
    assert f"{error:.3f}" in shown


def test_interrupted_command_keeps_what_it_has(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in_layer(monkeypatch, 2)
    result = ssa("inspect", str(tiny), *COMMAND, "--out", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "interrupted after 2 of 3 layers" in plain(result.output)
    numbers = json.loads((tmp_path / "out" / "inspect.json").read_text(encoding="utf-8"))
    assert not numbers["complete"]
    assert [layer["layer"] for layer in numbers["layers"]] == [0, 1]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "Interrupted: 2 of 3 layers" in page


def test_interrupted_before_the_first_layer(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in_layer(monkeypatch, 0)
    result = ssa("inspect", str(tiny), *COMMAND, "--out", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "interrupted after 0 of 3 layers" in plain(result.output)
    assert list((tmp_path / "out").iterdir()) == []


def test_numbers_are_written_after_each_layer(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves the layers before."""
    counts: list[int] = []
    write = Inspection.write_json

    def look(self: Inspection, path: Path) -> None:
        write(self, path)
        counts.append(len(json.loads(path.read_text(encoding="utf-8"))["layers"]))

    monkeypatch.setattr(Inspection, "write_json", look)
    assert ssa("inspect", str(tiny), *COMMAND, "--out", str(tmp_path)).exit_code == 0
    assert counts == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix", "balancd"], "neither a built-in mix"),
        (["--mix", '{"lhs": {}}'], "unknown source 'lhs'"),
        (["--layers", "0,x"], "expected numbers and ranges"),
        (["--layers", "5-3"], "expected numbers and ranges"),
        (["--length", "1"], "--length"),
        (["--queries", "0"], "--queries"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_arguments_are_told_before_anything_is_read(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_module, "load_model", lambda *_, **__: pytest.fail("the model was read"))
    result = ssa("inspect", str(tmp_path), *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", plain(result.output).replace("│", " "))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "7"], "layer 7 does not exist; this model has layers 0 to 2"),
        (["--first-query", "80"], "first_query must lie in [0, 80)"),
        (["--text", "no-such-file"], "no-such-file"),
        (["--length", "300"], "reads up to 256 tokens, got 300"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_served_is_one_line(tiny: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = ssa("inspect", str(tiny), *COMMAND, *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert message in plain(result.output)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    result = ssa("inspect", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "holds no model" in plain(result.output)


# -- tables, findings, figures ---------------------------------------------------------------------------------------


def small(**changes: Any) -> Inspection:
    return inspect_model(causal_lm("llama"), ids(), TWO_MIXES, **{"queries": 20, "exact_at": (4, 8), **changes})


def test_tables_hold_every_mix_source_layer_and_head() -> None:
    found = small()
    sources = sum(len(mix.sources) for mix in found.layers[0].mixes.values())
    counts = {
        inspect_tables.mix_table: 2,
        inspect_tables.source_table: sources,
        inspect_tables.layer_table: 2 * 2,
        inspect_tables.layer_source_table: 2 * sources,
        inspect_tables.head_table: 2 * 2 * HEADS,
    }
    for make, rows in counts.items():
        table = make(found)
        assert len(table.rows) == rows
        assert {len(row) for row in table.rows} == {len(table.headers)}


def test_findings_name_the_worst_head_and_idle_sources() -> None:
    found = small()
    first, *_, last = inspect_tables.findings(found)
    worst = max(
        (mix.output_error[head], layer.layer, head)
        for layer in found.layers
        for mix in [layer.mixes["lsh"]]
        for head in range(HEADS)
    )
    assert first.startswith("lsh keeps ")
    assert f"its worst head is head {worst[2]} of layer {worst[1]}, {worst[0]:.3f}" in first
    assert last == (  # the window holds the query itself
        "In lsh, the others propose what self proposes: without it, mass and error stay the same to 0.001."
    )


def test_page_without_exact_keys_and_with_one_layer() -> None:
    found = small(layers=[1], exact_at=())
    page = inspect_page.render(found, "numbers.json")
    check_self_contained(page)
    assert "Overlap with the layer before" not in page
    assert "numbers.json" in page


def test_a_perfect_mix_is_drawn_too() -> None:
    """No error is positive, so nothing can be logarithmic."""
    q, k, v = tensors()
    mixes = {"all": SSAConfig(sources={"topk": {}}, num_neighbors=LENGTH)}
    layer = inspect_layer(q, k, v, mixes, exact_at=())
    assert max(layer.mixes["all"].output_error) < 1e-12
    exact = MixFigures(**{**vars(layer.mixes["all"]), "output_error": (0.0,) * HEADS})
    layer = laboratory.LayerInspection(**{**vars(layer), "mixes": {"all": exact}})
    found = Inspection(
        "m", "t", LENGTH, {"all": mixes["all"].to_dict()}, (0,), (layer,), LENGTH, 0, 32, 0, 1.0, {"device": "cpu"}
    )
    check_self_contained(inspect_page.render(found, "numbers.json"))
