"""The search for the cheapest routing of every layer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from integrations.tiny_models import VOCABULARY, causal_lm
from ssa_framework import SSAConfig
from ssa_framework.cli.main import app
from ssa_framework.cli.tune import parse_target
from ssa_framework.errors import ConfigError
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.laboratory.capture import LayerTensors, capture_layers
from ssa_framework.laboratory.compare import measure_layer
from ssa_framework.laboratory.perplexity import perplexity
from ssa_framework.laboratory.routing import MixRouter, sample_queries
from ssa_framework.laboratory.tune import (
    DENSE,
    Change,
    Target,
    default_candidates,
    tune,
    with_budgets,
)
from ssa_framework.laboratory.tune.costs import figures_of
from ssa_framework.laboratory.tune.hull import HullPath, Point, lower_hull

LENGTH = 96
MIXES = {
    "topk": SSAConfig(sources={"self": {}, "topk": {}}),
    "clusters": SSAConfig(sources={"clusters": {"levels": [[8, 2]]}}),
}
PERPLEXITY, ERROR = Target("perplexity", 0.02), Target("output_error", 0.01)


def text(seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def seeded_model(**options: Any) -> Any:
    torch.manual_seed(0)
    return causal_lm("llama", **options)


def search(target: Target, **options: Any) -> Any:
    model = options.pop("model", None) or seeded_model(num_hidden_layers=3)
    candidates = options.pop("candidates", None) or with_budgets(MIXES, (4, 16, 48))
    settings: dict[str, Any] = {"references": {}, "held_out": {"b": text(1)}, "queries": 16, **options}
    return tune(model, {"a": text()}, target, candidates=candidates, **settings)


# -- parts -----------------------------------------------------------------------------------------------------------


def test_the_hull_holds_what_no_mixture_beats() -> None:
    points = {
        "cheap": Point(1, 0, 10),
        "worse": Point(2, 0, 11),
        "above the line": Point(3, 0, 8),
        "bend": Point(5, 0, 2),
        "same cost": Point(5, 0, 4),
        DENSE: Point(11, 0, 0),
    }
    assert lower_hull(points) == ["cheap", "bend", DENSE]


def test_steps_are_taken_in_the_order_of_damage_avoided_per_key() -> None:
    points = {
        0: {"a": Point(1, 0, 10), "b": Point(2, 0, 4), DENSE: Point(10, 0, 0)},  # rates 6 and 0.5
        1: {"a": Point(1, 0, 8), "b": Point(3, 0, 2), DENSE: Point(10, 0, 0)},  # rates 3 and 0.29
    }
    path = HullPath.of(points)
    assert [path.choice(steps) for steps in range(len(path))] == [
        {0: "a", 1: "a"},
        {0: "b", 1: "a"},
        {0: "b", 1: "b"},
        {0: DENSE, 1: "b"},
        {0: DENSE, 1: DENSE},
    ]
    assert [path.mean(steps, "cost") for steps in range(len(path))] == [1, 1.5, 2.5, 6.5, 10]
    assert [path.damage(steps) for steps in range(len(path))] == [18, 12, 6, 2, 0]


def test_figures_are_those_of_measure() -> None:
    seen: list[LayerTensors] = []
    capture_layers(seeded_model(), text(), seen.append)
    layer = seen[1]
    rows = sample_queries(layer, 20)
    mixes = {"lsh": SSAConfig(num_neighbors=24, sources={"self": {}, "lsh": {"rounds": 2, "candidates": 8}}), **MIXES}
    mixes["topk"] = mixes["topk"].replace(num_neighbors=8)
    graphs = {name: MixRouter(config).route(layer, rows).graph for name, config in mixes.items()}
    reports, _ = measure_layer(layer, rows, graphs)
    for name, found in figures_of(layer, rows, graphs).items():
        report = reports[name]
        assert found.cost == pytest.approx(report.candidates + report.summaries, rel=1e-6), name
        assert found.error == pytest.approx(report.output_error, rel=1e-4, abs=1e-5), name
        assert found.squared == pytest.approx(report.output_error_total**2, rel=1e-4, abs=1e-9), name
        assert found.allowed == pytest.approx(report.allowed), name


def test_a_change_has_the_error_of_paired_differences() -> None:
    dense = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    change = Change.of(dense, dense + torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64))
    assert change.change == pytest.approx(0.2214, abs=1e-4)
    assert change.standard_error == pytest.approx(1.2214 * 0.11547 / 2, rel=1e-3)
    assert change.upper > change.change


# -- searches --------------------------------------------------------------------------------------------------------


def test_the_result_is_what_the_model_does_with_it(tmp_path: Path) -> None:
    model = seeded_model(num_hidden_layers=3)
    found = search(PERPLEXITY, model=model)
    assert found.result.meets
    assert found.result.together.upper <= 0.02
    path = tmp_path / "config.json"
    found.config.to_json(path)
    scored = LENGTH // 2
    dense = perplexity(model, text(1), scored=scored)
    for loaded in (path, SSAConfig.from_json(path)):
        with use_sparse_attention(model, loaded):
            sparse = perplexity(model, text(1), scored=scored)
        held_out = found.result.held_out["b"]
        assert sparse == pytest.approx(held_out.sparse, rel=1e-5)
        assert dense == pytest.approx(held_out.dense, rel=1e-5)
    json.dumps(found.as_dict(), allow_nan=False)


def test_no_cheaper_trial_meets_the_target() -> None:
    found = search(PERPLEXITY)
    cheaper = [trial for trial in found.trials if trial.cost < found.result.cost]
    assert not any(trial.meets for trial in cheaper)


def test_a_target_in_output_error_is_met_in_every_mean_and_is_the_cheapest_of_its_steps() -> None:
    found = search(ERROR)
    chosen = [found.points[layer][name] for layer, name in found.layers.items()]
    assert sum(point.output_error for point in chosen) / 3 == pytest.approx(found.result.output_error, rel=1e-5)
    assert found.result.output_error <= 0.01
    assert found.result.held_out_error is not None
    looser = search(Target("output_error", 0.5))
    assert looser.result.cost < found.result.cost


def test_the_same_seed_gives_the_same_and_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    whole = search(PERPLEXITY).as_dict()
    state = tmp_path / "state.json"

    class Stop(Exception):
        pass

    def stop(at: int, _: str, done: int, total: int) -> None:
        assert total > done
        if done == at:
            raise Stop

    measured = 0
    for place in (2, 5, 8):
        with pytest.raises(Stop):
            search(PERPLEXITY, state=state, on_stage=partial(stop, place))
        entries = len(json.loads(state.read_text()))
        assert entries > measured
        measured = entries
    resumed = search(PERPLEXITY, state=state).as_dict()
    for result in (whole, resumed):
        del result["seconds"], result["environment"]
    assert resumed == whole

    def nothing_to_measure(stage: str, done: int, total: int) -> None:
        assert "candidates" not in stage
        assert "matters" not in stage

    search(ERROR, state=state, on_stage=nothing_to_measure)  # another target uses what is there


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    search(ERROR, state=state)
    with pytest.raises(ConfigError, match="another queries"):
        search(ERROR, state=state, queries=8)
    state.write_text("{")
    with pytest.raises(ConfigError, match="no state of a search"):
        search(ERROR, state=state)


def test_where_only_dense_attention_is_good_enough_it_says_so() -> None:
    with pytest.raises(ConfigError, match="only dense attention"):
        search(Target("output_error", 1e-7), candidates=with_budgets({"topk": MIXES["topk"]}, (4,)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"candidates": {DENSE: SSAConfig()}}, "called 'dense'"),
        ({"held_out": {"b": text()[:, :50]}}, "one length"),
        ({"trials": 0}, "trials"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        search(ERROR, **options)


def test_default_candidates_have_names_of_their_own() -> None:
    candidates = default_candidates()
    assert len(candidates) == len({json.dumps(config.to_dict()) for config in candidates.values()})
    assert DENSE not in candidates


# -- the command -----------------------------------------------------------------------------------------------------


def test_targets_are_read() -> None:
    assert parse_target("perplexity=1%") == Target("perplexity", 0.01)
    assert parse_target(" error = 0.05 ") == Target("output_error", 0.05)
    for wrong in ("1%", "perplexity=0", "error=nan", "recall=1%", "error=0.1.2"):
        run = CliRunner().invoke(app, ["tune", "nowhere", "--target", wrong])
        assert run.exit_code == 2, wrong


def test_the_command_writes_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded_model()
    monkeypatch.setattr("ssa_framework.cli.tune.load_model", lambda folder, gguf_file: (model, None))
    monkeypatch.setattr("ssa_framework.cli.tune.tokens_of", lambda tokenizer, content, length: text(len(content)))
    out = tmp_path / "out"
    command = ["tune", str(tmp_path), "code", "--held-out", "reference", "--target", "error=0.3", "-n", str(LENGTH)]
    mix = ["--mix", 'mine={"clusters": {"levels": [[8, 2]]}}', "--budget", "4", "--budget", "48", "--out", str(out)]
    run = CliRunner().invoke(app, [*command, *mix])
    assert run.exit_code == 0, run.output
    config = SSAConfig.from_json(out / "config.json")
    assert set(config.source_mix) == {"clusters"}
    assert json.loads((out / "tune.json").read_text())["result"]["meets"]
    assert "mine, budget" in run.output


@pytest.mark.parametrize(
    "options",
    [
        {"index": "Flat"},
        {"index": "IVF4,Flat", "nprobe": 2, "train_size": 32},
        {"index": "HNSW8", "ef_search": 16},
        {"index": "PQ4x4", "train_size": 32},
    ],
    ids=lambda options: options["index"],
)
def test_indices_of_faiss_are_candidates_like_others(options: dict[str, Any]) -> None:
    pytest.importorskip("faiss")
    mix = SSAConfig(sources={"self": {}, "faiss": {"block": 16, **options}})
    found = search(Target("output_error", 0.9), candidates=with_budgets({"faiss": mix, **MIXES}, (8,)))
    for points in found.points.values():
        point = points["faiss, budget 8"]
        assert 8 <= point.cost <= found.allowed + 17
        assert 0 < point.output_error < 2
