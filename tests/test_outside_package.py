"""A source from a separately installed distribution: found by entry point, equal to the built-in it copies.

The package is installed into a temporary folder and looked at from a fresh interpreter, so nothing stays behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent / "outside_package"
TIMEOUT_SECONDS = 300

PROBE_REGISTRY = """
import json, sys
from ssa_framework.registry import SourceRegistry

registry = SourceRegistry()
print(json.dumps({
    "distributions": {name: source.distribution for name, source in registry.sources.items()},
    "plugins": {name: source.plugin for name, source in registry.sources.items()},
    "unloaded": [[p.entry_point, p.distribution, p.reason] for p in registry.unloaded],
    "ran": "ssa_outside_example" in sys.modules,
}))
"""

PROBE_ATTENTION = """
import json
import torch
from ssa_framework import SSAConfig, build_graph, sparse_attention


def attend(source, causal, others):
    config = SSAConfig(num_neighbors=24, sources={source: {"size": 5}, **others})
    generator = torch.Generator().manual_seed(0)
    shapes = ([2, 4, 65, 16], [2, 2, 65, 16], [2, 2, 65, 16])
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    graph = build_graph(q, k, config=config, is_causal=causal)
    graph.validate()
    out = sparse_attention(q, k, v, is_causal=causal, enable_gqa=True, config=config)
    out.square().sum().backward()
    neighbors, valid = graph.as_lists()
    slots = graph.slots_by_source()
    return neighbors, valid, graph.to_dense_mask(), out, q.grad, k.grad, v.grad, slots.pop(source), slots


def compare(causal, others):
    names = ["neighbors", "valid", "mask", "out", "q.grad", "k.grad", "v.grad", "slots", "slots of the others"]
    inside, outside = attend("window", causal, others), attend("outside_window", causal, others)
    equal = {
        name: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for name, a, b in zip(names, inside, outside, strict=True)
    }
    return {"equal": equal, "edges": int(outside[1].sum()), "finite": bool(outside[3].isfinite().all())}


print(json.dumps({
    "alone": compare(False, {}),
    "alone, causal": compare(True, {}),
    "beside other sources, causal": compare(True, {"global": {"tokens": 2}, "topk": {}}),
}))
"""

PROBE_LABORATORY = """
import json
import torch
from typer.testing import CliRunner
from ssa_framework import SSAConfig
from ssa_framework.cli.main import app
from ssa_framework.laboratory.capture import synthetic_layer
from ssa_framework.laboratory.compare import compare
from ssa_framework.laboratory.inspect import inspect_layer
from ssa_framework.laboratory.tune import Target, tune
from transformers import LlamaConfig, LlamaForCausalLM

layer = synthetic_layer("clustered", length=65, heads=4, kv_heads=2, head_dim=16)
mixes = {
    name: SSAConfig(num_neighbors=24, sources={name: {"size": 5}, "lsh": {"rounds": 1, "candidates": 4}})
    for name in ("window", "outside_window")
}
looked_at = inspect_layer(layer.q, layer.k, layer.v, mixes, queries=65).as_dict()["mixes"]
for name, mix in looked_at.items():
    mix["sources"] = {"the window": mix["sources"].pop(name), **mix["sources"]}
compared = compare([layer], mixes, queries=65, seconds=0.0).mixes
arguments = ["--mix", 'mine={"outside_window": {"size": 5}}', "--queries", "8", "--no-time", "--out", "out"]
run = CliRunner().invoke(app, ["compare", "gaussian", "-n", "65", *arguments])
benched = CliRunner().invoke(app, [
    "bench", "--mix", 'mine={"outside_window": {"size": 5}}', "--length", "65", "--heads", "2", "--head-dim", "16",
    "--min-time", "0", "--out", "bench",
])
torch.manual_seed(0)
sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
text = torch.randint(2, 97, (1, 64))
tuned = tune(
    model, {"a": text}, Target("output_error", 0.9), queries=16, references={},
    candidates={
        name: SSAConfig(num_neighbors=24, sources={name: {"size": 5}}) for name in ("window", "outside_window")
    },
)
print(json.dumps({
    "benched": [benched.exit_code, benched.output],
    "tuned": {name: [vars(of_layer[name]) for of_layer in tuned.points.values()]
              for name in ("window", "outside_window")},
    "chosen": sorted(set(tuned.layers.values())),
    "inspected": looked_at,
    "quality": {mix.name: vars(mix.quality) for mix in compared},
    "timed": all(mix.times is not None for mix in compared),
    "exit_code": run.exit_code,
    "page": open("out/index.html", encoding="utf-8").read(),
}))
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the installed package, as ``pip install`` lays it out."""
    # setuptools builds inside the source folder: give it a copy
    source = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("outside") / "package")
    target = tmp_path_factory.mktemp("outside") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run(
        [*command, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return target


def probe(script: str, path: Path | None, folder: Path, allowed: str | None = None) -> dict[str, Any]:
    """Run ``script`` in a fresh interpreter with ``path`` importable and ``SSA_PLUGINS=allowed``; its JSON line."""
    environment = {name: value for name, value in os.environ.items() if name != "SSA_PLUGINS"}
    if allowed is not None:
        environment["SSA_PLUGINS"] = allowed
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_package_imports_only_the_public_names() -> None:
    source = (PACKAGE / "ssa_outside_example.py").read_text(encoding="utf-8")
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["ssa_framework.plugin"]


def test_source_is_found_by_its_entry_point(installed: Path, tmp_path: Path) -> None:
    found = probe(PROBE_REGISTRY, installed, tmp_path)
    assert found["distributions"]["outside_window"] == "ssa-outside-example"
    assert found["plugins"]["outside_window"] == "ssa-outside-example:outside"
    assert found["distributions"]["window"] == "ssa-framework"
    assert "ssa-outside-example" not in [distribution for _, distribution, _ in found["unloaded"]]


def test_source_is_not_there_without_the_package(tmp_path: Path) -> None:
    found = probe(PROBE_REGISTRY, None, tmp_path)
    assert "outside_window" not in found["distributions"]
    assert "window" in found["distributions"]


def test_empty_variable_leaves_it_out_unrun_and_says_so(installed: Path, tmp_path: Path) -> None:
    found = probe(PROBE_REGISTRY, installed, tmp_path, allowed="")
    assert set(found["distributions"].values()) == {"ssa-framework"}
    assert not found["ran"]
    (reason,) = [
        reason for name, owner, reason in found["unloaded"] if (name, owner) == ("outside", "ssa-outside-example")
    ]
    assert "SSA_PLUGINS" in reason


def test_variable_allows_it(installed: Path, tmp_path: Path) -> None:
    found = probe(PROBE_REGISTRY, installed, tmp_path, allowed="ssa-outside-example")
    assert found["distributions"]["outside_window"] == "ssa-outside-example"
    assert set(found["distributions"].values()) == {"ssa-framework", "ssa-outside-example"}


def test_graph_and_attention_equal_the_built_in_window_bit_for_bit(installed: Path, tmp_path: Path) -> None:
    results = probe(PROBE_ATTENTION, installed, tmp_path, allowed="ssa-outside-example")
    for case, result in results.items():
        assert result["finite"], case
        assert all(result["equal"].values()), (case, result["equal"])
    # per query 11 keys, less what the two ends of 65 positions cut off (2 * 15); causal: 6 keys, less 15
    heads_and_batch = 2 * 4
    assert results["alone"]["edges"] == heads_and_batch * (65 * 11 - 30)
    assert results["alone, causal"]["edges"] == heads_and_batch * (65 * 6 - 15)
    assert results["beside other sources, causal"]["edges"] > results["alone, causal"]["edges"]


def test_it_appears_in_the_laboratory_as_the_built_in_does(installed: Path, tmp_path: Path) -> None:
    found = probe(PROBE_LABORATORY, installed, tmp_path, allowed="ssa-outside-example")
    assert found["inspected"]["outside_window"] == found["inspected"]["window"]
    assert max(found["inspected"]["outside_window"]["sources"]["the window"]["only_mass"]) > 0
    assert found["quality"]["outside_window"] == found["quality"]["window"]
    assert found["timed"]
    assert found["exit_code"] == 0
    assert "outside_window" in found["page"]
    assert found["tuned"]["outside_window"] == found["tuned"]["window"]
    assert "outside_window" in found["chosen"]
    assert "window" not in found["chosen"]  # of two that cost the same, the first by name
    code, printed = found["benched"]
    assert code == 0, printed
    assert "mine" in printed
