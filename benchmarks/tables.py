"""Write the tables of README.md and docs/ from the CSV files in benchmarks/results.

A block between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced by the table of that name. With ``--check``,
nothing is written and the status is 1 where a page is not up to date.

    python benchmarks/tables.py
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/choosing.md",
    "docs/compile.md",
    "docs/decode.md",
    "docs/distributed.md",
    "docs/evaluate.md",
    "docs/gpu-kernels.md",
    "docs/measurements.md",
)
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(head: Iterable[str], body: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(text: str, digits: int = 3) -> str:
    """With at least so many digits that count, but no exponent."""
    value = float(text)
    decimals = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits - 1
    return f"{value:,.{decimals}f}"


def ratio(row: Row) -> str:
    return number(row["ratio"]) + (" (dense)" if row["computed_densely"] == "True" else "")


def summary(*files: str, by_mix: bool = False) -> str:
    """Ratios over the length, a line for each pass (and mix)."""
    found = {
        (r["mix"] if by_mix else "", r["mode"], r["causal"], int(r["length"])): ratio(r)
        for name in files
        for r in rows(name)
    }
    lengths = sorted({key[3] for key in found})
    lines = [
        (mix, mode, causal)
        for mix in dict.fromkeys(key[0] for key in found)
        for mode in ("forward", "forward+backward")
        for causal in ("False", "True")
        if any(key[:3] == (mix, mode, causal) for key in found)
    ]

    def line(mix: str, mode: str, causal: str) -> list[str]:
        name = mode.replace("+", " + ") + (", causal" if causal == "True" else "")
        ratios = [found.get((mix, mode, causal, n), "not run") for n in lengths]
        return [*([f"`{mix}`"] if by_mix else []), name, *ratios]

    head = [*(["preset"] if by_mix else []), "dense time / sparse time", *(f"N = {n:,}" for n in lengths)]
    return table(head, (line(*key) for key in lines))


def cpu_summary() -> str:
    return summary("cpu_seed_mix.csv", "cpu_seed_mix_32768.csv")


def cpu_presets() -> str:
    return summary("cpu_presets.csv", "cpu_presets_32768.csv", "cpu_presets_131072.csv", by_mix=True)


def timing(name: str, *, mix: bool = False, unit: str = "ms") -> str:
    scale = 1e-3 if unit == "s" else 1.0

    def line(r: Row) -> list[str]:
        dense = r["computed_densely"] == "True"
        return [
            *([f"`{r['mix']}`"] if mix else []),
            r["mode"].replace("+", " + "),
            "yes" if r["causal"] == "True" else "no",
            f"{int(r['length']):,}",
            number(str(float(r["dense_ms"]) * scale)),
            number(str(float(r["sparse_ms"]) * scale)),
            number(r["ratio"]),
            "dense fallback" if dense else f"{100 * float(r['graph_share']):.0f} %",
            "all" if dense else f"{float(r['keys_scored']):.0f}",
            f"{float(r['recall']):.2f}",
            f"{float(r['dense_peak_mib']):.0f} / {float(r['sparse_peak_mib']):.0f}",
        ]

    head = [
        "pass",
        "causal",
        "N",
        f"dense, {unit}",
        f"sparse, {unit}",
        "dense / sparse",
        "of it routing",
        "keys scored",
    ]
    head = [*(["mix"] if mix else []), *head, "recall@32", "peak MiB, dense / sparse"]
    return table(head, map(line, rows(name)))


def gpu() -> str:
    def line(r: Row) -> list[str]:
        return [
            f"`{r['mix']}`",
            f"{r['heads']}/{r['kv_heads']} × {r['head_dim']}",
            r["mode"].replace("+", " + "),
            "replay" if r["captured"] == "True" else "call",
            f"{int(r['length']):,}",
            number(r["dense_ms"]),
            number(r["sparse_ms"]),
            number(r["graph_ms"]),
            number(r["ratio"]),
            f"{float(r['keys_scored']):.0f}",
            f"{float(r['recall']):.2f}",
            f"{float(r['dense_peak_mib']):,.0f} / {float(r['sparse_peak_mib']):,.0f}",
        ]

    head = ["mix", "heads", "pass", "timed", "N", "dense, ms", "sparse, ms", "of it routing, ms", "dense / sparse"]
    return table([*head, "keys scored", "recall@32", "peak MiB, dense / sparse"], map(line, rows("gpu.csv")))


def gpu_summary() -> str:
    captured = [r for r in rows("gpu.csv") if r["captured"] == "True"]
    found = {(r["mix"], r["heads"], r["kv_heads"], r["head_dim"], r["mode"], int(r["length"])): r for r in captured}
    lengths = sorted({key[5] for key in found})
    kinds = dict.fromkeys(key[:5] for key in found)

    def line(kind: tuple[str, ...]) -> list[str]:
        mix, heads, kv_heads, dim, mode = kind
        ratios = (number(found[*kind, n]["ratio"]) if (*kind, n) in found else "–" for n in lengths)
        return [f"`{mix}`, {mode.replace('+', ' + ')}, {heads}/{kv_heads} heads × {dim}", *ratios]

    return table(["dense time / sparse time", *(f"N = {n:,}" for n in lengths)], map(line, kinds))


def memory() -> str:
    found = {(r["mode"], r["causal"], int(r["length"])): r for r in rows("memory.csv")}
    lengths = sorted({key[2] for key in found})
    kinds = sorted({key[:2] for key in found})
    return table(
        ["peak MiB beyond the inputs", *(f"N = {n:,}" for n in lengths)],
        (
            [
                mode.replace("+", " + ") + (", causal" if causal == "True" else ""),
                *(number(found[mode, causal, n]["peak_mib"]) for n in lengths),
            ]
            for mode, causal in kinds
        ),
    )


def _setting(row: Row) -> str:
    options = ", ".join(f"{name}={value}" for name, value in json.loads(row["options"]).items())
    return f"`{row['source']}`" + (f": `{options}`" if options else "")


def routing_settings() -> str:
    def line(r: Row) -> list[str]:
        keys = r["keys_scored"], r["keys_attended"], r["summaries"]
        shares = (f"{float(r[name]):.2f}" for name in ("recall_at_32", "recall_beyond_window", "attention_mass"))
        errors = (f"{float(r['output_error']):.3f}", f"{float(r['output_error_p95']):.2f}")
        return [_setting(r), r["neighbors"], *keys, *shares, *errors, r["times_dense"]]

    head = ["routing", "K", "keys scored", "attended", "summaries", "recall@32", "beyond the window", "attention mass"]
    return table([*head, "output error", "95 % below", "dense / sparse"], map(line, rows("routing_quality.csv")))


RECOMMENDED: list[tuple[str, str, dict[str, object], int]] = [
    ("`window` of 1,024", "window", {"size": 1024}, 128),
    ("`lsh`, the default", "lsh", {"candidates": 64}, 128),
    (
        "`lsh`, cross-polytope, 12 rounds, 3 probes, `candidates=160, max_planes=7, limit=38`",
        "lsh",
        {"hash": "cross_polytope", "candidates": 160, "rounds": 12, "probes": 3, "max_planes": 7, "limit": 38},
        128,
    ),
    ("`blocks` of 16, the best 512 keys, all attended", "blocks", {"attend": "all"}, 128),
    ("preset `fast`", "preset", {"name": "fast"}, 128),
    ("preset `balanced`", "preset", {"name": "balanced"}, 128),
    ("preset `quality`", "preset", {"name": "quality"}, 128),
    ("`topk`, the exact best 128", "topk", {}, 128),
    ("`topk`, the exact best 512", "topk", {}, 512),
]


def routing_recommended() -> str:
    found = rows("routing_quality.csv")

    def line(setting: tuple[str, str, dict[str, object], int]) -> list[str]:
        name, source, options, neighbors = setting
        wanted = source, options, str(neighbors)
        r = next(r for r in found if (r["source"], json.loads(r["options"]), r["neighbors"]) == wanted)
        return [
            name, r["keys_scored"], r["keys_attended"], r["summaries"], f"{float(r['recall_at_32']):.2f}",
            f"{float(r['attention_mass']):.2f}", f"{float(r['output_error']):.3f}", r["times_dense"],
        ]  # fmt: skip

    head = ["routing", "keys scored", "attended", "summaries", "recall@32", "attention mass", "output error"]
    return table([*head, "dense / sparse, causal"], map(line, RECOMMENDED))


def recall_gaussian() -> str:
    def line(r: Row) -> list[str]:
        return [
            f"{int(r['length']):,}", r["routing"], f"{float(r['keys_scored']):.0f}", f"{100 * float(r['share']):.0f} %",
            f"{float(r['recall_at_32']):.3f}", f"{float(r['lift']):.2f}", r["lift_of_the_original"] or "–",
        ]  # fmt: skip

    chosen = [r for r in rows("recall.csv") if r["data"] == "gaussian" and r["routing"] != "fixed pattern only"]
    head = ["N", "routing", "keys scored", "share looked at", "recall@32", "lift", "lift of the original"]
    return table(head, map(line, chosen))


def recall_model() -> str:
    def line(r: Row) -> list[str]:
        beyond = r["recall_beyond_window"]
        return [
            f"{int(r['length']):,}", str(int(r["layer"]) + 1), r["routing"], f"{float(r['keys_scored']):.0f}",
            f"{100 * float(r['share']):.0f} %", f"{float(r['recall_at_32']):.3f}", beyond and f"{float(beyond):.3f}",
            f"{float(r['attention_mass']):.2f}", f"{float(r['output_error']):.3f}",
        ]  # fmt: skip

    chosen = [r for r in rows("recall.csv") if r["data"] != "gaussian"]
    head = ["N", "layer", "routing", "keys scored", "share looked at", "recall@32", "beyond the window"]
    return table([*head, "attention mass", "output error"], map(line, chosen))


def decode() -> str:
    def line(r: Row) -> list[str]:
        times = f"{float(r['step_ms']):.2f}", f"{float(r['dense_ms']):.1f}", r["speedup"]
        return [f"`{r['mix']}`", f"{int(r['length']):,}", *times, f"{int(r['keys_attended']):,}"]

    head = ["mix", "cached tokens", "step, ms", "dense, ms", "dense / sparse", "keys and summaries attended"]
    return table(head, map(line, rows("decode.csv")))


def decode_summary() -> str:
    found = {(r["mix"], int(r["length"])): r["speedup"] for r in rows("decode.csv") if r["mix"].startswith("preset")}
    lengths = sorted({length for _, length in found})
    head = ["dense time / sparse time of a step", *(f"{n:,} cached" for n in lengths)]
    mixes = dict.fromkeys(mix for mix, _ in found)
    return table(head, ([mix, *(found[mix, n] for n in lengths)] for mix in mixes))


def gpu_decode() -> str:
    kinds = ("captured", "device")

    def line(r: Row) -> list[str]:
        times = [f"{float(r[f'{dense}{kind}_ms']):.3f}" for kind in kinds for dense in ("", "dense_")]
        return [
            f"`{r['mix']}`",
            f"{int(r['length']):,}",
            f"{float(r['called_ms']):.2f}",
            *times[:2],
            r["speedup_captured"],
            *times[2:],
            r["speedup_device"],
        ]

    head = ["mix", "cached tokens", "called", "captured", "dense, captured", "dense / sparse, captured"]
    return table([*head, "device", "dense, device", "dense / sparse, device"], map(line, rows("decode_cuda.csv")))


def distributed(file: str, one: str) -> str:
    kinds: dict[tuple[str, str, int], dict[str, Row]] = {}
    for r in rows(file):
        if r["milliseconds"]:
            kinds.setdefault((r["mode"], r["mix"], int(r["length"])), {})[r["method"]] = r

    def line(kind: tuple[str, str, int], of: dict[str, Row]) -> list[str]:
        alone, gathered, spread = (of[method] for method in ("one process", "all-gather", "context parallel"))
        mode, mix, length = kind
        speedup = float(alone["milliseconds"]) / float(spread["milliseconds"])
        received = (f"{int(r['bytes_received']) / 2**20:.0f}" for r in (spread, gathered))
        times = (number(r["milliseconds"]) for r in (alone, gathered, spread))
        name = mode.replace("+", " + ")
        return [
            f"`{mix}`", name, f"{length:,}", *times, f"{speedup:.2f}", " / ".join(received), spread["difference"]
        ]  # fmt: skip

    head = ["mix", "pass", "N", f"{one}, ms", "all-gather, ms", "context parallel, ms", f"{one} / context parallel"]
    head = [*head, "MiB received, context parallel / all-gather", "difference"]
    return table(head, (line(*item) for item in kinds.items()))


def cluster_levels() -> str:
    def line(r: Row) -> list[str]:
        graph, attend = float(r["graph_ms"]), float(r["attend_ms"])
        levels = ", ".join(f"{segment:,} / {cluster}" for segment, cluster in json.loads(r["levels"]))
        times = (number(str(x)) for x in (graph, attend, graph + attend))
        return [f"{int(r['length']):,}", levels, *times, r["keys_attended"], r["summaries"]]

    head = ["N", "levels: segment / keys per cluster", "routing, ms", "attention, ms", "both, ms"]
    return table([*head, "keys attended", "summaries"], map(line, rows("cluster_levels.csv")))


def perplexity() -> str:
    def line(r: Row) -> list[str]:
        name = r["mix"] if r["dense_layers"] == "none" else f"{r['mix']}, layer {r['dense_layers']} dense"
        return [
            f"{int(r['length']):,}", r["text"], name, f"{float(r['attended_percent']):.0f} %", r["perplexity"],
            r["dense_perplexity"], f"{r['change_percent']} %",
        ]  # fmt: skip

    head = ["context", "text", "routing", "keys attended", "perplexity", "dense", "change"]
    return table(head, map(line, rows("perplexity.csv")))


def eval_model() -> str:
    found: dict[int, dict[str, Row]] = {}
    for r in rows("eval_model.csv"):
        found.setdefault(int(r["length"]), {})[r["mix"]] = r

    def line(length: int, dense: Row, used: Row, sparse: Row) -> list[str]:
        change = 100 * (float(sparse["perplexity"]) / float(dense["perplexity"]) - 1)
        prefill = (f"{number(r['prefill_s'])} s" for r in (dense, used))
        token = (f"{float(r['token_ms']):.0f} ms" for r in (dense, used))
        ratios = [f"{r['dense_over_sparse_' + what]}" for what in ("prefill", "token") for r in (used, sparse)]
        return [f"{length:,}", *prefill, *ratios[:2], *token, *ratios[2:], f"{change:+.2f} %"]

    head = [
        "context", "prefill, dense", "`balanced`", "dense / `balanced`", "always sparse", "each token, dense",
        "`balanced`", "dense / `balanced`", "always sparse", "perplexity, always sparse",
    ]  # fmt: skip
    body = (line(length, of["dense"], of["balanced"], of["balanced, always sparse"]) for length, of in found.items())
    return table(head, body)


def perplexity_fast() -> str:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for r in rows("perplexity_fast.csv"):
        found.setdefault((r["mix"], r["dense_layers"]), {})[r["text"]] = r
    texts = ("reference", "reference, later", "code")

    def line(setting: tuple[str, str], of: dict[str, Row]) -> list[str]:
        attended = f"{float(of[texts[0]]['attended_percent']):.0f} %"
        return [*setting, attended, *(f"{of[text]['change_percent']} %" for text in texts)]

    head = ["levels: segment / keys per cluster; keys of clusters; Lloyd steps", "dense layers", "keys attended"]
    return table([*head, *texts], (line(*item) for item in found.items()))


def compiled_cuda() -> str:
    def line(r: Row) -> list[str]:
        names = ("compile_s", "compilations", "largest_difference", "eager_ms", "compiled_ms")
        return [r["what"], f"`{r['mix']}`", r["mode"], *(r[name] for name in names), r["cuda_graph_ms"] or "–"]

    head = ["what", "mix", "mode", "compile time, s", "compilations", "largest difference", "eager, ms", "compiled, ms"]
    return table([*head, "eager, as a replay, ms"], map(line, rows("compile_cuda.csv")))


def compiled() -> str:
    def line(r: Row) -> list[str]:
        return [
            r["what"], f"`{r['mix']}`", r["mode"], r["compile_s"], r["compilations"], r["graph_breaks"],
            r["largest_difference"], r["rounding_difference"], r["ratio"],
        ]  # fmt: skip

    head = ["what", "mix", "mode", "compile time, s", "compilations", "graph breaks", "largest difference"]
    return table([*head, "of eager, rounded otherwise", "eager time / compiled time"], map(line, rows("compile.csv")))


def soak() -> str:
    names = ("seconds", "calls", "memory_mib", "objects", "threads", "open_files")
    head = ["seconds", "calls", "memory, MiB", "Python objects", "threads", "open files"]
    return table(head, ([f"{float(r[name]):,.0f}" for name in names] for r in rows("soak.csv")))


TABLES: dict[str, Callable[[], str]] = {
    "cpu-summary": cpu_summary,
    "cpu-seed-mix": lambda: timing("cpu_seed_mix.csv"),
    "cpu-seed-mix-32768": lambda: timing("cpu_seed_mix_32768.csv", unit="s"),
    "cpu-presets": cpu_presets,
    "cpu-presets-timing": lambda: timing("cpu_presets.csv", mix=True),
    "cpu-two-threads": lambda: timing("cpu_seed_mix_2_threads.csv"),
    "cpu-other-mixes": lambda: timing("cpu_other_mixes.csv", mix=True),
    "cpu-memory": memory,
    "gpu": gpu,
    "gpu-summary": gpu_summary,
    "routing-settings": routing_settings,
    "routing-recommended": routing_recommended,
    "cluster-levels": cluster_levels,
    "compile": compiled,
    "compile-cuda": compiled_cuda,
    "decode": decode,
    "decode-summary": decode_summary,
    "distributed-cpu": lambda: distributed("distributed_cpu.csv", "one process"),
    "distributed-nccl": lambda: distributed("distributed_nccl.csv", "one GPU"),
    "eval-model": eval_model,
    "gpu-decode": gpu_decode,
    "perplexity": perplexity,
    "perplexity-fast": perplexity_fast,
    "recall-gaussian": recall_gaussian,
    "recall-model": recall_model,
    "soak": soak,
}


def filled(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

    names = "|".join(map(re.escape, sorted(TABLES, key=len, reverse=True)))
    return re.sub(rf"<!-- ({names}) -->.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing, say what is out of date")] = False,
) -> None:
    """Fill the tables of all pages."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale.append(page)
            if not check:
                path.write_text(after, encoding="utf-8")
    print(("out of date: " if check else "written: ") + (", ".join(stale) or "nothing"))
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
