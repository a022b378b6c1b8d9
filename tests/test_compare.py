"""``ssa compare``: figures, the Pareto front, times, the command, and mixes on the command line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from integrations.tiny_models import causal_lm
from ssa_framework import NeighborGraph, SSAConfig, build_graph, register_source
from ssa_framework import registry as registry_module
from ssa_framework.cli import compare as compare_module
from ssa_framework.cli import compare_page
from ssa_framework.cli.mixes import MIXES, configured, parse_mixes
from ssa_framework.errors import ConfigError, UnknownSourceError
from ssa_framework.laboratory import compare as laboratory
from ssa_framework.laboratory.capture import LayerTensors, load_layers, synthetic_layer
from ssa_framework.laboratory.compare import (
    Comparison,
    ExactResult,
    MixResult,
    Quality,
    Times,
    compare,
    exact_graphs,
    stages,
)
from ssa_framework.laboratory.routing import sample_queries
from ssa_framework.plugin import NeighborSource, Ranges, RoutingContext
from ssa_framework.quality import Timing, measure
from test_cli import plain, ssa
from test_inspect import CharacterTokenizer, check_self_contained

TWO: dict[str, SSAConfig] = {
    "lsh": SSAConfig(num_neighbors=16, sources={"window": {"size": 3}, "lsh": {"rounds": 2, "candidates": 8}}),
    "clusters": SSAConfig(sources={"global": {"tokens": 1}, "clusters": {"levels": [[16, 4]], "keys": 8}}),
}
LENGTH = 90


def layers(count: int = 2, **options: Any) -> list[LayerTensors]:
    made = [
        synthetic_layer("clustered", **{"length": LENGTH, "heads": 4, "kv_heads": 2, "head_dim": 8, **options}, seed=i)
        for i in range(count)
    ]
    return [LayerTensors(7 + i, x.q, x.k, x.v, None, x.causal) for i, x in enumerate(made)]


# -- quality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
def test_quality_is_the_mean_of_measure_over_layers(causal: bool) -> None:
    found = compare(layers(causal=causal), TWO, queries=LENGTH, recall_at=8, timed=False)
    assert found.layers == (7, 8)
    assert found.allowed == pytest.approx((LENGTH + 1) / 2 if causal else LENGTH)
    for result in found.mixes:
        reports = []
        for layer in layers(causal=causal):
            config = TWO[result.name].replace(dense_below=0)
            graph = build_graph(layer.q, layer.k, config=config, is_causal=causal)
            reports.append(measure(layer.q, layer.k, layer.v, graph, recall_at=8, sample=LENGTH))
        expected = {
            "recall": np.mean([r.recall for r in reports]),
            "recall_beyond": np.mean([r.recall_beyond for r in reports]),
            "attention_mass": np.mean([r.attention_mass for r in reports]),
            "output_error": np.mean([r.output_error for r in reports]),
            "output_error_p95": np.mean([r.output_error_p95 for r in reports]),
            "output_error_total": np.mean([r.output_error_total for r in reports]),
            "keys_scored": np.mean([sum(r.keys_scored.values()) for r in reports]),
            "keys_attended": np.mean([r.degree for r in reports]),
            "summaries": np.mean([r.summaries for r in reports]),
            "keys_looked_at": np.mean([r.candidates + r.summaries for r in reports]),
        }
        assert vars(result.quality) == pytest.approx(expected, rel=1e-4)
        assert (result.times, result.output_difference) == (None, None)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
def test_exact_best_keys_equal_the_sorted_scores(causal: bool) -> None:
    (layer,) = layers(1, causal=causal)
    rows = sample_queries(layer, 20)
    allowed = torch.ones(LENGTH, LENGTH).tril().bool()[rows] if causal else torch.ones(20, LENGTH).bool()
    scores = (layer.q[:, :, rows] @ layer.k.repeat_interleave(2, 1).mT).masked_fill(~allowed, -torch.inf)
    graphs = exact_graphs(layer, rows, [3, 50])
    for count, graph in graphs.items():
        expected = torch.zeros_like(scores).bool().scatter(-1, scores.topk(count).indices, True) & allowed
        assert torch.equal(graph.to_dense_mask(), expected)
    found = compare([layer], TWO, queries=LENGTH, exact_at=(3, 50, LENGTH), timed=False)
    assert [exact.keys for exact in found.exact] == [3, 50]  # all keys are no choice
    masses = [exact.quality.attention_mass for exact in found.exact]
    assert masses == sorted(masses)
    assert all(exact.quality.keys_scored == found.allowed for exact in found.exact)
    for result in found.mixes:  # no other keys hold more
        if result.quality.keys_attended <= 50 and not result.quality.summaries:
            assert result.quality.attention_mass <= masses[1] + 1e-6


def test_scale_of_the_layer_counts() -> None:
    (layer,) = layers(1)
    scaled = LayerTensors(7, layer.q / 3, layer.k, layer.v, scale=3 * layer.q.shape[-1] ** -0.5)
    mix = {"lsh": TWO["lsh"]}
    first, second = (compare([x], mix, queries=30, seconds=0.0) for x in (layer, scaled))
    for a, b in zip(first.mixes, second.mixes, strict=True):
        assert vars(b.quality) == pytest.approx(vars(a.quality), rel=1e-3)
        assert b.times is not None  # the timed output was that of dense attention with the same scale


# -- the front, on numbers made up -----------------------------------------------------------------------------------


def result(name: str, looked_at: float, error: float, seconds: float | None = None) -> MixResult:
    quality = Quality(0.9, 0.8, 0.7, error, 2 * error, error, looked_at, looked_at, 0.0, looked_at)
    times = None
    if seconds is not None:
        timings = {"index": 0.25 * seconds, "route": 0.5 * seconds, "attend": 0.5 * seconds, "dense": 1.0}
        times = Times(**{part: Timing((value,) * 3) for part, value in timings.items()})
    return MixResult(name, SSAConfig().to_dict(), quality, {}, times, None if seconds is None else 1e-7)


def comparison(*mixes: MixResult, **changes: Any) -> Comparison:
    exact = [ExactResult(n, result("", n, 8 / n).quality) for n in (16, 64, 256)]
    given: dict[str, Any] = {
        "data": "made-up data", "layers": (0, 3), "timed_layer": 3, "length": 1024, "heads": 4, "kv_heads": 2,
        "head_dim": 8, "causal": True, "allowed": 512.5, "mixes": mixes, "exact": tuple(exact), "queries": 64,
        "first_query": 0, "recall_at": 32, "seed": 0, "threads": 1, "dtype": "float32", "seconds": 1.0,
        "environment": {"device": "cpu"},
    }  # fmt: skip
    return Comparison(**{**given, **changes})


FIVE = (
    result("cheap", 50, 0.5, 0.1),
    result("beaten", 60, 0.5, 0.3),  # as much error for more
    result("middle", 100, 0.2, 2.0),
    result("same cost, worse", 100, 0.3, 1.5),
    result("best", 400, 0.01, 0.5),
)


def test_front() -> None:
    found = comparison(*FIVE)
    assert [mix.name for mix in found.pareto()] == ["cheap", "middle", "best"]
    assert [mix.name for mix in found.pareto("times_dense")] == ["cheap", "best"]
    assert comparison(result("alone", 3, 0.1)).pareto("times_dense") == []


def test_times_add_up() -> None:
    times = FIVE[0].times
    assert times is not None
    assert (times.index.median, times.search, times.attend.median) == pytest.approx((0.025, 0.025, 0.05))
    assert (times.total, times.times_dense) == pytest.approx((0.1, 10.0))


def test_rows_have_one_set_of_columns() -> None:
    rows = comparison(*FIVE).rows()
    assert [row["kind"] for row in rows] == ["mix"] * 5 + ["exact"] * 3 + ["dense"]
    assert all(list(row) == list(rows[0]) for row in rows)
    assert rows[0]["index_ms"] == pytest.approx(25)
    assert rows[0]["times_dense"] == pytest.approx(10)
    assert json.loads(rows[0]["sources"]) == SSAConfig().source_mix
    assert rows[-1]["keys_scored"] == 512.5
    assert (rows[-1]["output_error"], rows[-1]["attention_mass"]) == (0.0, 1.0)


def test_findings() -> None:
    front, timed, faster = compare_page.findings(comparison(*FIVE))
    assert front == "Pareto front of output error and keys looked at: cheap (0.5), middle (0.2) and best (0.01)."
    assert timed == "Pareto front of output error and time: cheap (0.5) and best (0.01)."
    assert faster == "At 1024 tokens, cheap, beaten and best took less time than dense attention."
    assert compare_page.findings(comparison(result("slow", 9, 0.3, 4.0)))[2].startswith("At 1024 tokens, no mix took")
    wrong = MixResult(**{**vars(result("broken", 9, 0.3)), "message": "differs"})
    assert "The output of broken was wrong, so no time is shown." in compare_page.findings(comparison(wrong))


def test_beating_the_exact_best_keys_is_said() -> None:
    quality = Quality(0.9, 0.8, 0.7, 0.03, 0.1, 0.03, 0.0, 40.0, 30.0, 70.0)
    found = comparison(MixResult("summarised", SSAConfig().to_dict(), quality, {}))
    assert compare_page.findings(found)[-1] == (
        "summarised has less error with 40 neighbors and 30 summaries (0.03) than the exact best 256 keys (0.031)."
    )


def test_pages_of_all_kinds() -> None:
    for found in (
        comparison(*FIVE),
        comparison(result("untimed", 0, 0.0)),  # scores and attends nothing, and is right: logarithms of zero
        comparison(result("alone", 9, 0.1, 1.0), exact=(), complete=False),
    ):
        page = compare_page.render(found, "numbers.json", "table.csv")
        links = check_self_contained(page)
        assert all(any(mix.name in cell for cell in links.cells) for mix in found.mixes)
        assert ("Time of one layer" in page) == any(mix.times is not None for mix in found.mixes)


# -- times -----------------------------------------------------------------------------------------------------------


def test_times_are_taken_of_the_middle_layer_in_turns() -> None:
    stages_seen: list[str] = []
    found = compare(layers(3), TWO, queries=10, seconds=0.0, threads=1, on_stage=stages_seen.append)
    assert (found.timed_layer, found.threads, found.complete) == (8, 1, True)
    assert len(stages_seen) == stages(3, 2, timed=True)
    for mix in found.mixes:
        times = mix.times
        assert times is not None
        assert {len(t.readings) for t in (times.index, times.route, times.attend, times.dense)} == {3}
        assert mix.output_difference is not None
        assert mix.output_difference < 1e-5


class Slow(NeighborSource):
    """Tells how many queries it was asked for."""

    asked: list[int]

    def propose(self, ctx: RoutingContext) -> Ranges:
        type(self).asked.append(ctx.num_queries)
        return Ranges.everything()


def test_index_is_routed_for_the_last_query_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_default", None)
    Slow.asked = []
    register_source("slow", Slow)
    compare(layers(1), {"slow": SSAConfig(sources={"slow": {}})}, queries=10, seconds=0.0)
    assert Slow.asked[0] == 10  # quality
    assert set(Slow.asked[1:]) == {1, LENGTH}


def test_a_wrong_output_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laboratory, "output_difference", lambda *_, **__: float("inf"))
    found = compare(layers(1), TWO, queries=10, seconds=0.0)
    for mix in found.mixes:
        assert mix.times is None
        assert "not dense attention under the graph's mask" in mix.message
    json.dumps(found.as_dict(), allow_nan=False)


def test_interrupted_while_timing_it_keeps_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    time_all = laboratory.time_alternating
    called = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called += 1
        if called == 2:
            raise KeyboardInterrupt
        return time_all(*arguments, **options)

    monkeypatch.setattr(laboratory, "time_alternating", interrupted)
    found = compare(layers(1), TWO, queries=10, seconds=0.0)
    assert not found.complete
    assert [mix.times is None for mix in found.mixes] == [False, True]
    assert all(mix.quality.recall > 0 for mix in found.mixes)


@pytest.mark.parametrize("index", ["Flat", "IVF8,Flat", "HNSW8", "PQ4"])
def test_faiss_on_equal_terms(index: str) -> None:
    pytest.importorskip("faiss")
    options = {"index": index, **({} if index in ("Flat", "HNSW8") else {"train_size": 256})}
    config = SSAConfig(sources={"global": {"tokens": 1}, "faiss": options}, num_neighbors=16)
    found = compare(layers(1, length=700), {"faiss": config}, queries=30, seconds=0.0)
    (mix,) = found.mixes
    assert mix.times is not None
    assert 0 < mix.times.index.median <= mix.times.route.median
    assert 16 < mix.quality.keys_scored <= found.allowed
    compares_all = index in ("Flat", "PQ4")
    assert (mix.quality.keys_scored == pytest.approx(found.allowed, rel=0.01)) == compares_all


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="got 0 layers and 2 mixes"):
        compare([], TWO)
    with pytest.raises(ConfigError, match="got 1 layers and 0 mixes"):
        compare(layers(1), {})
    with pytest.raises(ConfigError, match="queries must be"):
        compare(layers(1), TWO, queries=0)
    with pytest.raises(UnknownSourceError):
        compare(layers(1), {**TWO, "typo": SSAConfig(sources={"lhs": {}})})


# -- the command -----------------------------------------------------------------------------------------------------

COMMAND = ("--queries", "16", "--min-time", "0", "--mix", "seed", "--mix", 'mine={"window": {"size": 4}, "lsh": {}}')


def numbers(out: Path) -> Any:
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.json", "index.html"]
    return json.loads((out / "compare.json").read_text(encoding="utf-8"))


def test_command_on_made_up_numbers(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    sizes = ("-n", "200", "--heads", "4", "--kv-heads", "2", "--head-dim", "16")
    result = ssa("compare", "clustered", *COMMAND, *sizes, "--out", str(out))
    assert result.exit_code == 0, result.output
    found = numbers(out)
    assert [mix["name"] for mix in found["mixes"]] == ["seed", "mine"]
    assert (found["length"], found["heads"], found["kv_heads"], found["causal"]) == (200, 4, 2, True)
    assert found["mixes"][0]["times"]["times_dense"] > 0
    rows = list(csv.DictReader((out / "compare.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["kind"] for row in rows].count("mix") == 2
    assert float(rows[0]["output_error"]) == found["mixes"][0]["quality"]["output_error"]
    page = (out / "index.html").read_text(encoding="utf-8")
    links = check_self_contained(page)
    shown = plain(result.output)
    error = f"{found['mixes'][1]['quality']['output_error']:.3f}"
    assert error in links.cells
    assert error in shown
    assert "2 mine" in links.cells


def test_command_on_a_model_and_on_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama", num_hidden_layers=3)
    monkeypatch.setattr(compare_module, "load_model", lambda *_, **__: (model, CharacterTokenizer()))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").touch()
    first, again = tmp_path / "first", tmp_path / "again"
    saved = tmp_path / "saved"
    result = ssa("compare", str(folder), *COMMAND, "-n", "80", "--no-time", "--save", str(saved), "--out", str(first))
    assert result.exit_code == 0, result.output
    assert [layer.layer for layer in load_layers(saved)] == [0, 1, 2]
    assert ssa("compare", str(saved), *COMMAND, "--no-time", "--out", str(again)).exit_code == 0
    of_model, of_files = numbers(first), numbers(again)
    assert of_model["layers"] == of_files["layers"] == [0, 1, 2]
    for a, b in zip(of_model["mixes"], of_files["mixes"], strict=True):
        assert a["quality"] == b["quality"]
        assert a["times"] is None
    assert ssa("compare", str(saved), *COMMAND, "--no-time", "--layers", "1", "--out", str(again)).exit_code == 0
    assert numbers(again)["layers"] == [1]


def test_layers_of_a_large_model_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama", num_hidden_layers=11)
    monkeypatch.setattr(compare_module, "load_model", lambda *_, **__: (model, CharacterTokenizer()))
    (tmp_path / "config.json").touch()
    captured, described = compare_module._read(tmp_path, None, "reference", 20, None)
    assert [layer.layer for layer in captured] == [0, 2, 4, 6, 8, 10]
    assert described == f"{tmp_path.name} reading “reference”"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gaussian", "--mix", '{"lhs": {}}'], 2, "unknown source 'lhs'"),
        (["gaussian", "--layers", "a"], 2, "expected numbers and ranges"),
        (["gaussian", "--heads", "0"], 2, "--heads"),
        (["gaussian", "--heads", "3", "--kv-heads", "2"], 1, "multiple"),
        (["gaussian", "-n", "50", "--first-query", "50"], 1, "first_query must lie in [0, 50)"),
        (["no-such-folder"], 1, "'no-such-folder' is not a folder"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_served(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = ssa("compare", *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == code
    assert message in re.sub(r"\s+", " ", plain(result.output).replace("│", " "))


def test_a_folder_without_layers(tmp_path: Path) -> None:
    result = ssa("compare", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "holds no captured layers" in plain(result.output)


# -- mixes on the command line ---------------------------------------------------------------------------------------


def test_mixes_are_names_objects_and_files(tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    SSAConfig(num_neighbors=20, sources={"topk": {}}).to_json(path)
    window = '{"window": {"size": 3}}'
    found = parse_mixes(["fast", window, f"near={window}", f"wide = {window}", str(path), 'k={"num_neighbors": 9}'])
    assert list(found) == ["fast", "window(size=3)", "near", "wide", "saved", "k"]
    assert found["fast"] == MIXES["fast"]
    assert found["near"] == found["wide"] == found["window(size=3)"] == SSAConfig(sources={"window": {"size": 3}})
    assert found["saved"].num_neighbors == 20
    assert found["k"] == SSAConfig(num_neighbors=9)
    both = parse_mixes(['{"num_neighbors": 9, "sources": {"topk": {}}}'])
    assert both == {"topk": SSAConfig(num_neighbors=9, sources={"topk": {}})}


def test_repeated_names_are_told_apart_by_their_text() -> None:
    texts = ['a={"self": {}}', 'a={"topk": {}}']
    assert list(parse_mixes([*texts, texts[0]])) == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("balancd", "neither a built-in mix"),
        ("a=b", "neither a built-in mix"),
        ('a={"window": ', "is not JSON"),
        ('a={"window": 3}', "must map option names to values"),
        ('{"num_neighbors": 0}', "num_neighbors must be an integer"),
        ('{"num_neighbors": 9, "window": {}}', "unknown configuration field 'window'"),
    ],
)
def test_bad_mixes(text: str, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=re.escape(message)):
        parse_mixes([text])


def test_configured_is_what_decides() -> None:
    values = json.loads(configured(SSAConfig(d_model=64, num_neighbors=9).to_dict()))
    assert values == {"num_neighbors": 9, "sources": SSAConfig().source_mix, "graph_heads": "query", "seed": 0}


def test_graphs_of_other_shapes_are_refused() -> None:
    (layer,) = layers(1)
    graph = NeighborGraph.from_lists(torch.zeros(1, 4, 5, 1, dtype=torch.int32), num_keys=LENGTH)
    with pytest.raises(ValueError, match="graph"):
        laboratory.measure_layer(layer, torch.arange(6), {"wrong": graph})
