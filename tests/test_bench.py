"""``ssa bench``: checks before speed, one row per case, a plot, and clear words about bad input."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from ssa_framework import SSAConfig, attention
from ssa_framework.cli import bench as bench_module
from ssa_framework.cli.bench import bench, plot, run_cases
from ssa_framework.cli.mixes import MIXES
from ssa_framework.errors import BackendUnavailableError, ConfigError, UnknownOptionError, UnknownSourceError
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.quality import bench as quality_bench
from ssa_framework.quality.bench import BenchCase, BenchRow, run_case, write_csv
from ssa_framework.quality.timing import Timing

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WINDOW = {"self": {}, "window": {"size": 4}}
SMALL = ("--heads", "2", "--head-dim", "8", "--neighbors", "16", "--min-time", "0")
TINY = BenchCase("window", WINDOW, length=40, heads=2, head_dim=8, num_neighbors=16)

app = typer.Typer()
app.command("bench")(bench)


def ssa_bench(*arguments: str) -> tuple[int, str]:
    """Exit code and what was printed, the frames of error boxes and line breaks taken out."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[│\s]+", " ", ANSI.sub("", result.output))


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "bench.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def is_picture(path: Path) -> bool:
    height, width, _ = matplotlib.image.imread(path).shape
    return height > 200 and width > 200


# -- end to end ------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_row(tmp_path: Path) -> None:
    code, output = ssa_bench(
        *SMALL, "-n", "40", "-n", "72", "--mix", "window", "--mix", json.dumps({"topk": {}}), "--backend", "torch",
        "--backend", "numba", "--mode", "both", "--out", str(tmp_path),
    )  # fmt: skip
    rows = read(tmp_path)
    assert code == 0
    got = [(r["mix"], r["backend"], r["mode"], int(r["length"])) for r in rows]
    assert got == [
        (mix, backend, mode, length)
        for mix in ("window", "topk")
        for backend in ("torch", "numba")
        for mode in ("forward", "forward+backward")
        for length in (40, 72)
    ]
    for row in rows:
        assert_sane(row)
        assert f"{row['mix']}, {row['backend']}, {row['mode']}, N = {row['length']}" in output
    assert is_picture(tmp_path / "bench.png")
    assert str(tmp_path / "bench.csv") in output


def assert_sane(row: dict[str, str]) -> None:
    assert row["status"] == "ok"
    assert row["message"] == ""
    assert 0 <= float(row["output_difference"]) <= 1e-5
    if row["mode"] == "forward":
        assert row["gradient_difference"] == ""
    else:
        assert 0 < float(row["gradient_difference"]) <= 1e-5
    assert float(row["ratio"]) == pytest.approx(float(row["dense_ms"]) / float(row["sparse_ms"]), rel=1e-4)
    assert float(row["graph_share"]) == pytest.approx(float(row["graph_ms"]) / float(row["sparse_ms"]), rel=1e-4)
    for name in ("dense", "sparse", "graph"):
        assert 0 < float(row[f"{name}_ms_lower_quartile"]) <= float(row[f"{name}_ms"])
        assert float(row[f"{name}_ms"]) <= float(row[f"{name}_ms_upper_quartile"])
        assert int(row[f"{name}_readings"]) >= quality_bench.MIN_ROUNDS
    assert float(row["dense_peak_mib"]) > 0
    assert float(row["sparse_peak_mib"]) > 0
    scored, slots = json.loads(row["keys_scored_by_source"]), json.loads(row["slots_by_source"])
    assert list(scored) == list(slots) == list(json.loads(row["sources"]))
    assert float(row["keys_scored"]) == pytest.approx(sum(scored.values()))
    assert float(row["slots_filled"]) == pytest.approx(sum(slots.values()), rel=1e-4)
    if row["mix"] == "topk":
        assert float(row["keys_scored"]) == int(row["length"])
        assert float(row["recall"]) == pytest.approx(16 / 32)  # the best 16 of the best 32
    else:
        assert float(row["keys_scored"]) == 0
    assert 0 < float(row["attention_mass"]) <= 1
    assert float(row["output_error"]) >= 0
    assert int(row["queries_measured"]) == 2 * int(row["length"])
    assert row["torch"] == torch.__version__
    for name in ("device", "processor", "system", "python", "numba", "version", "commit", "date"):
        assert row[name]


def test_axes_that_vary_are_named_and_the_others_are_not(tmp_path: Path) -> None:
    code, output = ssa_bench(
        *SMALL, "-n", "33", "--mix", "window", "--backend", "torch", "--both-causal", "--dtype", "float64", "--dtype",
        "bfloat16", "--threads", "1", "--threads", "2", "--kv-heads", "1", "--out", str(tmp_path),
    )  # fmt: skip
    rows = read(tmp_path)
    assert code == 0
    assert len(rows) == 8
    assert {(r["causal"], r["dtype"], r["threads"]) for r in rows} == {
        (causal, dtype, threads)
        for causal in ("False", "True")
        for dtype in ("float64", "bfloat16")
        for threads in ("1", "2")
    }
    assert {r["kv_heads"] for r in rows} == {"1"}
    assert "non-causal, float64, 2 threads, N = 33" in output
    assert "window, torch, forward, B = 1, H = 2, D = 8, K = 16, cpu" in output
    assert is_picture(tmp_path / "bench.png")


# -- a wrong result --------------------------------------------------------------------------------------------------


def garbage(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    out, lse = neighbor_attention(*arguments, **options)
    return out.flip(2), lse


def nan_in_one_query(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    out, lse = neighbor_attention(*arguments, **options)
    return out + torch.where(torch.arange(out.shape[2])[:, None] == 7, torch.nan, 0.0), lse


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.001


def wrong_gradient(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    out, lse = neighbor_attention(*arguments, **options)
    return _WrongGradient.apply(out), lse


@pytest.mark.parametrize("wrong", [garbage, nan_in_one_query, wrong_gradient], ids=lambda f: f.__name__)
def test_a_wrong_case_gets_no_speed(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention, "neighbor_attention", wrong)
    code, output = ssa_bench(
        *SMALL, "-n", "40", "--mix", "window", "--mode", "forward+backward", "--out", str(tmp_path)
    )
    (row,) = read(tmp_path)
    assert code == 1
    assert row["status"] == "failed"
    assert "not dense attention under the graph's mask" in row["message"]
    assert row["message"] in output
    spoken_of = ("_ms", "ratio", "share", "readings", "peak", "recall", "scored")
    assert {name for name, value in row.items() if value and any(word in name for word in spoken_of)} == set()
    assert "× dense" not in output
    assert is_picture(tmp_path / "bench.png")


def test_a_wrong_gradient_is_no_matter_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "neighbor_attention", wrong_gradient)
    assert run_case(TINY, min_seconds=0).status == "ok"
    row = run_case(replace(TINY, mode="forward+backward"), min_seconds=0)
    assert row.status == "failed"
    assert "gradient difference 0.001" in row.message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_zeros_are_wrong_in_half_precision_too(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = neighbor_attention(*arguments, **options)
        return out * 0.0, lse

    case = replace(TINY, sources=MIXES["seed"], dtype=dtype, length=400, num_neighbors=128)
    assert run_case(case, min_seconds=0).status == "ok"
    monkeypatch.setattr(attention, "neighbor_attention", zeros)
    assert run_case(case, min_seconds=0).status == "failed"


def test_a_case_that_cannot_run_is_an_error_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def only_short(q: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if q.shape[2] > 40:
            raise BackendUnavailableError("too long for this test")
        return neighbor_attention(q, *arguments, **options)

    monkeypatch.setattr(attention, "neighbor_attention", only_short)
    code, output = ssa_bench(*SMALL, "-n", "48", "-n", "40", "--mix", "window", "--out", str(tmp_path))
    assert code == 1
    assert [r["status"] for r in read(tmp_path)] == ["error", "ok"]
    assert "BackendUnavailableError: too long for this test" in output


# -- one case --------------------------------------------------------------------------------------------------------


def test_threads_are_pinned_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watch(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        seen.add(torch.get_num_threads())
        return neighbor_attention(*arguments, **options)

    monkeypatch.setattr(attention, "neighbor_attention", watch)
    before = torch.get_num_threads()
    assert run_case(replace(TINY, threads=2), min_seconds=0).status == "ok"
    assert seen == {2}
    assert torch.get_num_threads() == before


def test_given_tensors_are_measured_and_left_alone() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    peaked = q.detach() * 100
    case = replace(TINY, sources={"topk": {}})
    flat_row = run_case(case, (q, k, v), min_seconds=0)
    peaked_row = run_case(replace(case, mode="forward+backward"), (peaked, k, v), min_seconds=0)
    assert flat_row.quality is not None
    assert peaked_row.quality is not None
    assert peaked_row.quality.attention_mass > 0.999 > flat_row.quality.attention_mass
    assert q.grad is None
    with pytest.raises(ConfigError, match="tensors must have the shapes"):
        run_case(TINY, (q, k, v[:, :1]))


def test_stages_come_in_order_with_the_check_first() -> None:
    stages: list[str] = []
    run_case(TINY, min_seconds=0, on_stage=stages.append)
    assert stages == ["check", "time", "memory", "quality"]


@pytest.mark.parametrize(("dense_below", "dense"), [(None, False), (41, True), (40, False)], ids=str)
def test_dense_fallback_is_told(dense_below: int | None, dense: bool) -> None:
    row = run_case(replace(TINY, dense_below=dense_below), min_seconds=0)
    assert row.status == "ok"
    assert row.computed_densely is dense


def test_memory_counts_numpy_arrays() -> None:
    row = run_case(replace(TINY, backend="numba", length=1024, head_dim=64), min_seconds=0)
    assert row.sparse_bytes is not None
    out = 2 * 1024 * 64 * 4
    assert out < row.sparse_bytes < 20 * out


def test_ratio_is_of_medians() -> None:
    row = BenchRow(TINY, "ok", dense=Timing((1.0, 6.0, 9.0)), sparse=Timing((2.0, 3.0, 30.0)), graph=Timing((1.5,) * 3))
    assert row.ratio == 2.0
    assert row.graph_share == 0.5


def test_rows_of_every_status_share_their_columns(tmp_path: Path) -> None:
    rows = [run_case(TINY, min_seconds=0), run_case(replace(TINY, sources={"missing": {}}), min_seconds=0)]
    assert rows[1].status == "error"
    assert "unknown source 'missing'" in rows[1].message
    assert list(rows[0].to_dict()) == list(rows[1].to_dict())
    write_csv(rows, tmp_path / "bench.csv")
    assert [r["ratio"] != "" for r in read(tmp_path)] == [True, False]


def test_a_run_that_is_broken_off_leaves_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(case: BenchCase, **options: Any) -> BenchRow:
        if case.length == 48:
            raise KeyboardInterrupt
        return run_case(case, **options)

    monkeypatch.setattr(bench_module, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cases([TINY, replace(TINY, length=48)], tmp_path / "bench.csv", 0, Console(quiet=True))
    assert [r["length"] for r in read(tmp_path)] == ["40"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": "int8"}, ConfigError, "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        ({"mode": "backward"}, ConfigError, "mode must be one of"),
        ({"length": 0}, ConfigError, "length must be an integer >= 1"),
        ({"kv_heads": 3}, ConfigError, "multiple of num_kv_heads"),
        ({"backend": "fast"}, BackendUnavailableError, "'fast' is not available"),
        ({"sources": {"lhs": {}}}, UnknownSourceError, "unknown source 'lhs'"),
        ({"sources": {"window": {"width": 3}}}, UnknownOptionError, "no option 'width'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_cases_are_found_before_they_run(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        replace(TINY, **change).check()


def test_plot_tells_panels_and_lines_apart(tmp_path: Path) -> None:
    row = run_case(TINY, min_seconds=0)
    rows = [
        replace(row, case=replace(TINY, mix=mix, mode=mode, causal=causal, length=length))
        for mix in ("a", "a mix with a name that goes on and on, as mixes in JSON with options do")
        for mode in ("forward", "forward+backward")
        for causal in (False, True)
        for length in (40, 80)
    ]
    plot(rows, tmp_path / "many.png")
    plot(rows[:1], tmp_path / "one.png")
    assert is_picture(tmp_path / "one.png")
    many, one = (matplotlib.image.imread(tmp_path / f"{name}.png").shape for name in ("many", "one"))
    assert many[1] > 1.8 * one[1]


# -- what the options mean -------------------------------------------------------------------------------------------


def cases_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> list[BenchCase]:
    """The cases that a command line asks for, none of them run."""
    asked: list[BenchCase] = []

    def note(cases: list[BenchCase], *_: Any) -> list[BenchRow]:
        asked.extend(cases)
        return [BenchRow(case, "ok") for case in cases]

    monkeypatch.setattr(bench_module, "run_cases", note)
    code, output = ssa_bench(*arguments, "--out", str(tmp_path))
    assert code == 0, output
    return asked


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = cases_of(monkeypatch, tmp_path)
    assert [case.length for case in cases] == [1024, 2048, 4096]
    assert cases[0].config == SSAConfig()
    assert (cases[0].dtype, cases[0].threads, cases[0].mode) == ("float32", 1, "forward")


@pytest.mark.parametrize("name", MIXES)
def test_built_in_mixes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (case,) = cases_of(monkeypatch, tmp_path, "-n", "64", "--mix", name)
    assert case.mix == name
    assert case.config.source_mix == MIXES[name].source_mix


def test_mix_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = {"self": {}, "lsh": {"rounds": 2, "hash": "cross_polytope"}}
    (case,) = cases_of(monkeypatch, tmp_path, "-n", "64", "--mix", json.dumps(sources), "--dense-below", "auto")
    assert case.mix == "self + lsh(rounds=2, hash=cross_polytope)"
    assert case.config.source_mix == sources
    assert case.config.dense_below == "auto"


def test_configuration_file_says_what_the_options_leave_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    config = SSAConfig(
        d_model=48, num_heads=4, num_kv_heads=2, num_neighbors=24, causal=True, sources=WINDOW, graph_heads="kv",
        backend="torch", dense_below=0, seed=5, rope_base=1e4,
    )  # fmt: skip
    config.to_json(path)
    (case,) = cases_of(monkeypatch, tmp_path, "-n", "64", "--mix", str(path))
    assert case.mix == "mine"
    assert case.config == config.replace(rope_base=None)
    (case,) = cases_of(
        monkeypatch, tmp_path, "-n", "64", "--mix", str(path), "--heads", "8", "--neighbors", "30", "--no-causal",
        "--backend", "numba", "--seed", "6",
    )  # fmt: skip
    wanted = {"d_model": 96, "num_heads": 8, "num_neighbors": 30, "causal": False, "backend": "numba", "seed": 6}
    assert case.config == config.replace(**wanted, rope_base=None)


def test_files_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = [tmp_path / folder / "mine.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        SSAConfig(sources=WINDOW).to_json(path)
    cases = cases_of(monkeypatch, tmp_path, "-n", "64", *(x for path in paths for x in ("--mix", str(path))))
    assert [case.mix for case in cases] == [str(path) for path in paths]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix", "sead"], "lsh-thorough, quality, balanced, fast, topk, window), nor a JSON object of sources"),
        (["--mix", '{"window": '], "is not JSON"),
        (["--mix", '{"window": 3}'], "must map option names to values"),
        (["--mix", '{"windo": {}}'], "unknown source 'windo'"),
        (["--mix", '{"window": {"width": 3}}'], "source 'window' has no option 'width'"),
        (["--backend", "fast"], "backend 'fast' is not available"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--mode", "backward"], "'backward' is not one of"),
        (["--dense-below", "some"], "must be an integer >= 0 or 'auto', got 'some'"),
        (["--heads", "3", "--kv-heads", "2"], "must be a multiple of num_kv_heads"),
        (["--length", "0"], "greater than or equal to 1"),
        (["--device", "nowhere"], "--device"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_told_before_anything_runs(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, output = ssa_bench(*arguments, "--out", str(tmp_path / "new"))
    assert code == 2
    assert message in output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["[]", "no JSON", '{"d_modell": 3}'])
def test_bad_configuration_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    code, output = ssa_bench("--mix", str(path), "--out", str(tmp_path))
    assert code == 2
    assert "--mix" in output
    assert "JSON configuration" in output or "unknown configuration field 'd_modell'" in output


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, output = ssa_bench(*SMALL, "-n", "40", "--mix", "window", "--out", str(tmp_path / "file" / "folder"))
    assert code == 2
    assert "--out" in output
