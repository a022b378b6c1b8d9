"""The ``ssa`` command: help, sources, errors on one line, and the demo from the text to the page."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import ssa_framework
from ssa_framework.cli import main as main_module
from ssa_framework.cli import sources as sources_module
from ssa_framework.cli.demo import bench
from ssa_framework.cli.demo.bench import LengthResult, look_inside, measure_length
from ssa_framework.cli.demo.findings import findings
from ssa_framework.cli.demo.page import passage_spans
from ssa_framework.cli.demo.passage import Passage, read_passage
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.tables import cost_table, mebibytes, percent, seconds
from ssa_framework.cli.demo.text import Text, load_text, readable
from ssa_framework.cli.demo.train import ByteModel, Run, make_twins, train
from ssa_framework.plugin import LayerSpec, NeighborSource
from ssa_framework.quality import Timing
from ssa_framework.registry import SourceRegistry

BUILT_IN = ["blocks", "clusters", "edges", "faiss", "global", "lsh", "random", "self", "strided", "topk", "window"]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def ssa(*arguments: str, width: int = 200) -> Any:  # click's Result, which typer does not export
    result = CliRunner().invoke(main_module.app, list(arguments), env={"COLUMNS": str(width), "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def plain(text: str) -> str:
    return ANSI.sub("", text)


# -- finding one's way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["--help", "nothing"])
def test_help_names_the_commands(arguments: list[str]) -> None:
    output = plain(ssa(*arguments).output)
    assert "Start with ssa demo" in output
    for command in ("demo", "sources"):
        assert re.search(rf"^\W*{command} +\w", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", ["--out", "--quick", "--steps", "--max-length", "--threads", "--seed"]),
        ("sources", ["--plugins", "--json"]),
    ],
)
def test_help_of_a_command_names_its_options(command: str, options: list[str]) -> None:
    result = ssa(command, "--help")
    assert result.exit_code == 0
    for option in options:
        assert option in plain(result.output)


def test_version() -> None:
    result = ssa("--version")
    assert result.exit_code == 0
    assert result.output == f"ssa-framework {ssa_framework.__version__}, torch {torch.__version__}\n"


def test_python_m() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ssa_framework", "--version"], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.startswith("ssa-framework ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--steps", "0"],
        ["demo", "--max-length", "8"],
        ["demo", "--threads", "0"],
        ["demo", "--seed", "-1"],
        ["sources", "--plugin", "x"],
        ["attend"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = ssa(*arguments)
    assert result.exit_code == 2
    assert "Usage" in plain(result.output)


# -- sources -----------------------------------------------------------------------------------------------------

Distribution = Callable[[str, str], None]


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribution]:
    """Puts a distribution with one module and one entry point on the path, as pip would."""
    modules = []

    def install(name: str, source: str) -> None:
        module = name.replace("-", "_") + "_module"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = tmp_path / f"{name.replace('-', '_')}-4.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 4.2\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[ssa_framework]\nplugin = {module}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


PLUGIN = '''
    from ssa_framework.plugin import Band, NeighborSource, hookimpl

    class Upstream(NeighborSource):
        """The ``reach`` keys before every query.

        And more.
        """

        def __init__(self, layer, *, reach, kind=frozenset({1}), size=3):
            super().__init__(layer)

        def propose(self, ctx):
            return Band(1, 0)

    @hookimpl
    def ssa_register_sources(register):
        register.add("upstream", Upstream)
'''


def test_sources_as_json(distribution: Distribution) -> None:
    distribution("other-sources", PLUGIN)
    distribution("broken-sources", "import a_package_that_is_not_there")
    result = ssa("sources", "--json", "--plugins", "other-sources, broken_sources")
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    sources = {source["name"]: source for source in listed["sources"]}
    assert list(sources) == sorted([*BUILT_IN, "upstream"])
    for name in BUILT_IN:
        assert sources[name]["distribution"] == "ssa-framework"
        assert sources[name]["version"] == ssa_framework.__version__
        assert sources[name]["summary"]
        assert sources[name]["options"].keys() == SourceRegistry([]).get(name).option_defaults().keys()
    assert sources["window"]["options"] == {"size": {"required": False, "default": 8}}
    assert sources["upstream"] == {
        "name": "upstream",
        "distribution": "other-sources",
        "version": "4.2",
        "plugin": "other-sources:plugin",
        "class": "other_sources_module.Upstream",
        "options": {
            "reach": {"required": True},
            "kind": {"required": False, "default": "frozenset({1})"},
            "size": {"required": False, "default": 3},
        },
        "summary": "The reach keys before every query.",
    }
    (broken,) = [p for p in listed["not_loaded"] if p["distribution"] == "broken-sources"]
    assert broken["entry_point"] == "plugin"
    assert broken["reason"] == "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"


def test_sources_as_a_table(distribution: Distribution) -> None:
    distribution("other-sources", PLUGIN)
    distribution("left-out-sources", PLUGIN)
    output = plain(ssa("sources", "--plugins", "other-sources").output)
    for name in BUILT_IN:
        assert re.search(rf"│ {name} +│ ssa-framework {re.escape(ssa_framework.__version__)} +│", output)
    row = next(line for line in output.splitlines() if "upstream" in line)
    for part in ("other-sources 4.2", "reach (required), kind = 'frozenset({1})', size = 3", "The reach keys before"):
        assert part in row
    assert "Not loaded" in output
    row = next(line for line in output.splitlines() if "left-out-sources" in line)
    assert "not allowed by SSA_PLUGINS or the plugins argument" in row


def test_empty_plugins_means_built_in_only(distribution: Distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution("other-sources", PLUGIN)
    assert [s["name"] for s in json.loads(ssa("sources", "--json", "--plugins", "").stdout)["sources"]] == BUILT_IN
    monkeypatch.setenv("SSA_PLUGINS", "")
    assert [s["name"] for s in json.loads(ssa("sources", "--json").stdout)["sources"]] == BUILT_IN


def printed(description: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=160)
    sources_module.show(description, console)
    return console.file.getvalue()


def test_without_anything_left_out_there_is_no_second_table() -> None:
    shown = printed({"sources": [], "not_loaded": []})
    assert "Registered sources" in shown
    assert "Not loaded" not in shown


def test_project_errors_are_one_line(distribution: Distribution) -> None:
    distribution("other-sources", PLUGIN.replace('"upstream"', '"window"'))
    result = ssa("sources", "--plugins", "other-sources")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert plain(result.stderr) == (
        "error: source name 'window' is taken by plugin 'ssa-framework:window'; plugin 'other-sources:plugin' wants "
        "it too\n"
    )


def test_source_registered_in_code_without_docstring() -> None:
    class Bare(NeighborSource):
        def __init__(self, layer: LayerSpec) -> None:
            super().__init__(layer)

    registry = SourceRegistry([])
    registry.register("bare", Bare)
    (bare,) = [s for s in sources_module.describe(registry)["sources"] if s["name"] == "bare"]
    assert (bare["distribution"], bare["version"], bare["summary"]) == (None, None, "")
    assert "registered in code" in printed({"sources": [bare], "not_loaded": []})


# -- the demo, end to end ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    """What ``ssa demo --quick`` prints, its numbers and its page."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "on the way"
    result = ssa("demo", "--quick", "--out", str(folder), "--threads", "1")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in folder.iterdir()) == ["demo.json", "index.html"]
    assert str(folder / "index.html") in plain(result.output)
    numbers = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return plain(result.output), numbers, (folder / "index.html").read_text(encoding="utf-8")


def test_demo_trains_both_models_alike(quick: tuple[str, dict[str, Any], str]) -> None:
    output, numbers, _ = quick
    assert numbers["settings"]["steps"] == 20
    assert numbers["settings"]["threads"] == 1
    for name in ("sparse", "dense"):
        run = numbers["training"][name]
        assert len(run["train_loss_nats"]) == 20
        assert [point["step"] for point in run["validation_curve"]] == [0, 10, 20]
        losses = [point["loss_nats"] for point in run["validation_curve"]]
        assert losses[0] > losses[1] > losses[2] > 0
        assert run["validation_loss_nats"] == losses[2]
        assert run["bits_per_byte"] == pytest.approx(losses[2] / math.log(2))
        assert f"{run['validation_loss_nats']:.3f}" in output
    first = [numbers["training"][name]["train_loss_nats"][0] for name in ("sparse", "dense")]
    assert first[0] == pytest.approx(first[1], abs=0.01)  # the same weights and the same batch


def test_demo_measures_every_length(quick: tuple[str, dict[str, Any], str]) -> None:
    output, numbers, _ = quick
    assert [r["length"] for r in numbers["lengths"]] == [256, 512]
    for result in numbers["lengths"]:
        assert result["check"]["passed"]
        assert 0 <= result["check"]["difference"] <= result["check"]["largest_accepted"] <= 1e-4
        times = {name: timing["median_s"] for name, timing in result["time"].items()}
        assert min(times.values()) > 0
        assert times["sparse"] >= max(times["graph"], times["attention"])
        assert result["dense_time_over_sparse_time"] == pytest.approx(times["dense"] / times["sparse"])
        assert f"{result['dense_time_over_sparse_time']:.2f}" in output
        output_bytes = result["length"] * numbers["settings"]["width"] * 4
        assert min(result["peak_extra_bytes"].values()) >= output_bytes
        assert len(result["quality_per_layer"]) == numbers["settings"]["layers"]
        for report in result["quality_per_layer"]:
            assert report["recall_at"] == 32
            assert 0.3 < report["recall"] <= 1
            assert 0.3 < report["attention_mass"] <= 1 + 1e-6
            assert 0 < report["output_error"] < 1
            assert list(report["slots"]) == ["self", "window", "global", "lsh"]
            assert sum(report["slots"].values()) == pytest.approx(report["degree"], rel=1e-3)
            assert report["slots"]["lsh"] > 10
            assert 0 < report["keys_scored"]["lsh"] < report["allowed"]
            assert report["lift"] > 1


def test_demo_draws_conclusions_from_the_numbers(quick: tuple[str, dict[str, Any], str]) -> None:
    output, numbers, page = quick
    words = " ".join(output.split())
    text = unescape(page)
    assert len(numbers["findings"]) == 5
    for sentence in numbers["findings"]:
        assert sentence in words
        assert sentence in text
    ratios = [result["dense_time_over_sparse_time"] for result in numbers["lengths"]]
    if max(ratios) < 0.5:  # clearly slower everywhere
        assert "slower than dense at N = 256 and 512;" in numbers["findings"][1]


def test_page_is_self_contained(quick: tuple[str, dict[str, Any], str]) -> None:
    _, _, page = quick
    links = re.findall(r"""(?:src|srcset|href|action|data)\s*=\s*["']?([^"'\s>]*)""", page)
    assert len(links) == 8  # four figures, light and dark
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    without_figures = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", page)
    for outside in ("http:", "https:", "//", "@import", "url(", "<script", "<link", "<iframe"):
        assert outside not in without_figures
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert all("alt=" in tag and 'alt=""' not in tag for tag in re.findall(r"<img [^>]*>", page))


def test_page_holds_the_tables_of_the_terminal(quick: tuple[str, dict[str, Any], str]) -> None:
    output, numbers, page = quick
    rows = [
        [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(<td>.*?)</tr>", page, re.DOTALL)
    ]
    layers, lengths = numbers["settings"]["layers"], len(numbers["lengths"])
    assert len(rows) == 2 + lengths + 2 * lengths * layers
    printed = [" ".join(line.split()) for line in output.splitlines()]
    for row in rows:
        assert " ".join(row) in printed


def test_page_says_how_it_was_measured(quick: tuple[str, dict[str, Any], str]) -> None:
    _, numbers, page = quick
    for value in numbers["environment"].values():
        assert value in unescape(page)
    assert numbers["environment"]["torch"] == torch.__version__
    assert numbers["passage"]["topic"] in page


def test_demo_into_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    result = ssa("demo", "--quick", "--out", str(tmp_path / "taken" / "below"))
    assert result.exit_code == 1
    assert plain(result.stderr).startswith("error: ")
    assert "below" in result.stderr


def test_max_length_doubles_up_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(main_module, "run_demo", lambda settings, folder, console: seen.append(settings))
    threads = torch.get_num_threads()
    for arguments in (["--max-length", "5000"], ["--max-length", "300"], ["--quick", "--max-length", "1024"], []):
        assert ssa("demo", *arguments).exit_code == 0
    assert [s.lengths for s in seen] == [
        (512, 1024, 2048, 4096),
        (300,),
        (256, 512, 1024),
        (512, 1024, 2048, 4096, 8192, 16384),
    ]
    assert {s.threads for s in seen} == {threads}
    ssa("demo", "--steps", "7", "--seed", "3", "--threads", "5")
    assert (seen[-1].steps, seen[-1].seed, seen[-1].threads) == (7, 3, 5)


# -- parts of the demo -------------------------------------------------------------------------------------------

TINY = Settings(
    steps=3,
    batch=2,
    context=80,
    width=32,
    heads=2,
    num_neighbors=32,
    validation_windows=3,
    validations=3,
    lengths=(96,),
    seconds_per_length=0.0,
    passage=96,
    threads=1,
)


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text()


@pytest.fixture(scope="module")
def twins(text: Text) -> tuple[Run, Run]:
    runs = make_twins(TINY)
    train(runs, text.train, text.validation, TINY)
    return runs


def test_no_paragraph_of_the_validation_text_is_trained_on(text: Text) -> None:
    assert len(text.train) > 10 * len(text.validation) > 100_000
    assert load_text().train.equal(text.train)
    paragraphs = [
        {p for p in bytes(tokens.tolist()).decode().split("\n\n") if p.strip()}
        for tokens in (text.train, text.validation)
    ]
    assert not {p.strip("\n") for p in paragraphs[0]} & {p.strip("\n") for p in paragraphs[1]}


def test_readable_is_one_character_per_byte() -> None:
    tokens = torch.frombuffer(bytearray("a\n–é~".encode()), dtype=torch.uint8).long()
    assert readable(tokens) == "a⏎·····~"


def test_twins_start_alike_and_training_repeats(text: Text, twins: tuple[Run, Run]) -> None:
    sparse, dense = make_twins(TINY)
    for (name, a), (other, b) in zip(sparse.model.state_dict().items(), dense.model.state_dict().items(), strict=True):
        assert name == other
        assert a.equal(b)
    train((sparse, dense), text.train, text.validation, TINY)
    for again, run in zip((sparse, dense), twins, strict=True):
        assert again.train_loss == run.train_loss
        assert again.validation == run.validation
    assert [step for step, _ in sparse.validation] == [0, 1, 2, 3]


def test_training_leaves_the_global_random_state_alone(text: Text) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(make_twins(TINY), text.train, text.validation, TINY)
    assert torch.get_rng_state().equal(before)


def test_dense_twin_attends_densely(text: Text, twins: tuple[Run, Run]) -> None:
    for run, full in zip(twins, (False, True), strict=True):
        views = look_inside(run.model, text.validation[:96])
        assert [view.graph.is_full for view in views] == [full] * TINY.layers


def test_looking_inside_sees_what_the_model_computes(text: Text, twins: tuple[Run, Run]) -> None:
    model = twins[0].model
    seen: list[torch.Tensor] = []
    hooks = [
        layer.attn.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        for layer in model.body.layers
    ]
    with torch.no_grad():
        model(text.validation[None, :96])
        for hook in hooks:
            hook.remove()
        for view, attended in zip(look_inside(model, text.validation[:96]), seen, strict=True):
            out = view.attention.apply_graph(view.q, view.k, view.v, view.graph)
            torch.testing.assert_close(view.attention.Wo(out.transpose(1, 2).flatten(2)), attended)


def test_wrong_result_gets_no_time(text: Text, twins: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    monkeypatch.setattr(bench, "output_difference", lambda *arguments, **options: math.inf)
    result = measure_length(twins[0].model, text.validation[:96], TINY, stages.append)
    assert stages == ["checking", "quality"]
    assert not result.passed
    assert result.speed is result.sparse is result.dense is result.dense_bytes is None
    (row,) = cost_table([result]).rows
    assert row == ("96", "–", "–", "–", "–", "–", "wrong", "–", "–")
    json.dumps(result.to_dict(), allow_nan=False)
    sentences = findings(*twins, [result], TINY)
    assert sentences[1] == "At N = 96 the sparse output was wrong, so no time is shown."
    assert not any("faster" in s or "slower" in s for s in sentences)


def timed(result: LengthResult, length: int, dense: float, graph: float, attention: float) -> LengthResult:
    def timing(value: float) -> Timing:
        return Timing((0.9 * value, value, 1.1 * value))

    return LengthResult(length, 0.0, timing(dense), timing(graph), timing(attention), 2**20, 3 * 2**20, result.quality)


def test_findings_follow_the_numbers(text: Text, twins: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "output_difference", lambda *arguments, **options: math.inf)  # no time is needed
    measured = measure_length(twins[0].model, text.validation[:96], TINY, lambda stage: None)
    results = [
        timed(measured, 100, dense=1.0, graph=3.0, attention=1.0),
        timed(measured, 200, dense=4.0, graph=3.0, attention=1.0),
        timed(measured, 400, dense=9.0, graph=2.0, attention=1.0),
    ]
    _, speed, parts, memory, quality = findings(*twins, results, TINY)
    assert speed == (
        "Sparse attention was slower than dense at N = 100, faster than dense at N = 400, about as fast as dense at "
        "N = 200; dense time / sparse time at N = 400: 3.00."
    )
    assert parts == (
        "At N = 400, choosing the neighbors takes 67 % of the sparse time; attending over them takes 1.00 s, dense "
        "attention 9.00 s."
    )
    assert "3.0 MiB beyond its inputs at its peak, torch's dense attention 1.0 MiB" in memory
    assert percent(measured.quality[-1].recall) in quality
    assert [row[3] for row in cost_table(results).rows] == ["0.25", "1.00", "3.00"]


@pytest.mark.parametrize(
    ("sparse_loss", "dense_loss", "outcome"),
    [
        (2.0, 1.0, "dense is better by 1.442"),
        (1.0, 2.0, "sparse is better by 1.442"),
        (1.0, 1.00001, "the same to three digits"),
    ],
)
def test_finding_on_training(sparse_loss: float, dense_loss: float, outcome: str) -> None:
    runs = make_twins(TINY)
    for run, loss in zip(runs, (sparse_loss, dense_loss), strict=True):
        run.validation.append((3, loss))
    (sentence,) = findings(*runs, [], TINY)
    assert sentence.startswith("After 3 steps the sparse model needs")
    assert sentence.endswith(f": {outcome}.")


def test_passage_shows_the_edges_of_its_query(text: Text, twins: tuple[Run, Run]) -> None:
    model: ByteModel = twins[0].model
    passage: Passage = read_passage(model, text, TINY)
    assert len(passage.text) == 96
    assert 72 <= passage.query < 96
    edges = passage.graph.to_dense_mask()[0, passage.head, passage.query]
    assert [bool(part) for part in passage.parts] == edges[: passage.query + 1].tolist()
    assert {passage.parts[key] for key in range(passage.query - 16, passage.query + 1)} == {"band"}
    assert list(passage.parts[:4]) == ["columns"] * 4
    assert passage.parts.count("listed") == int(edges.sum()) - 17 - 4 > 0
    assert sum(passage.weights) == pytest.approx(1.0)
    assert all(weight == 0 for weight, part in zip(passage.weights, passage.parts, strict=True) if not part)
    assert not any(missed and part for missed, part in zip(passage.missed, passage.parts, strict=True))
    spans = passage_spans(passage)
    assert "".join(span.text for span in spans).replace("\n", "") == passage.text[: passage.query + 1]
    assert spans[-1].kind == "query"
    assert max(span.strength for span in spans) == 100


def test_units() -> None:
    assert [seconds(s) for s in (2e-6, 4.34e-4, 0.0123, 0.1234, 1.5)] == [
        "2 µs",
        "434 µs",
        "12.3 ms",
        "123 ms",
        "1.50 s",
    ]
    assert [percent(p) for p in (0.0, 0.0123, 0.0996, 0.5, 1.0)] == ["0.0 %", "1.2 %", "10 %", "50 %", "100 %"]
    assert [mebibytes(b) for b in (None, 0, 3 * 2**20)] == ["–", "0.0 MiB", "3.0 MiB"]
