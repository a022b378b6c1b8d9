"""What the measurements say, in sentences made from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ssa_framework.cli.demo.bench import LengthResult
from ssa_framework.cli.demo.settings import Settings
from ssa_framework.cli.demo.train import Run
from ssa_framework.cli.tables import mebibytes, percent, seconds
from ssa_framework.quality import Timing


def findings(sparse: Run, dense: Run, results: Sequence[LengthResult], settings: Settings) -> list[str]:
    """One sentence or two each on training, time, memory and quality."""
    timed = [r for r in results if r.speed is not None]
    sentences = [_training(sparse, dense, settings)]
    if timed:
        sentences += [_speed(timed), _parts(timed[-1]), _memory(timed[-1])]
    wrong = [r.length for r in results if not r.passed]
    if wrong:
        sentences.append(f"At {_lengths(wrong)} the sparse output was wrong, so no time is shown.")
    if results:
        sentences.append(_quality(results[-1], settings))
    return sentences


def _training(sparse: Run, dense: Run, settings: Settings) -> str:
    difference = round(sparse.bits_per_byte, 3) - round(dense.bits_per_byte, 3)
    if abs(difference) < 5e-4:
        outcome = "the same to three digits"
    else:
        outcome = f"{'dense' if difference > 0 else 'sparse'} is better by {abs(difference):.3f}"
    return (
        f"After {settings.steps} steps the sparse model needs {sparse.bits_per_byte:.3f} bits per byte of unseen text, "
        f"its dense twin {dense.bits_per_byte:.3f}: {outcome}."
    )


def _speed(timed: Sequence[LengthResult]) -> str:
    faster = [r.length for r in timed if _clearly_below(r.sparse, r.dense)]
    slower = [r.length for r in timed if _clearly_below(r.dense, r.sparse)]
    equal = [r.length for r in timed if r.length not in faster and r.length not in slower]
    parts = []
    for lengths, word in ((slower, "slower than"), (faster, "faster than"), (equal, "about as fast as")):
        if lengths:
            parts.append(f"{word} dense at {_lengths(lengths)}")
    ratio = timed[-1].speed
    return f"Sparse attention was {', '.join(parts)}; dense time / sparse time at N = {timed[-1].length}: {ratio:.2f}."


def _clearly_below(a: Timing | None, b: Timing | None) -> bool:
    """Whether the quartiles do not overlap."""
    return a is not None and b is not None and a.quartiles[1] < b.quartiles[0]


def _parts(result: LengthResult) -> str:
    assert result.sparse is not None
    assert result.graph is not None
    assert result.attention is not None
    assert result.dense is not None
    share = result.graph.median / result.sparse.median
    return (
        f"At N = {result.length}, choosing the neighbors takes {percent(share)} of the sparse time; attending over "
        f"them takes {seconds(result.attention.median)}, dense attention {seconds(result.dense.median)}."
    )


def _memory(result: LengthResult) -> str:
    return (
        f"At N = {result.length}, sparse attention held {mebibytes(result.sparse_bytes)} beyond its inputs at its "
        f"peak, torch's dense attention {mebibytes(result.dense_bytes)}."
    )


def _quality(result: LengthResult, settings: Settings) -> str:
    report = result.quality[-1]
    return (
        f"At N = {result.length}, the last layer's graph holds {percent(report.recall)} of the {settings.recall_at} "
        f"keys that matter most to a query and {percent(report.attention_mass)} of its attention, after scoring "
        f"{percent(report.share_scored)} of the keys; its recall is {report.lift:.1f} times that of as many random "
        f"keys."
    )


def _lengths(lengths: Sequence[int]) -> str:
    names = [str(n) for n in lengths]
    return "N = " + (names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}")
