"""``ssa eval``: perplexity, passkeys, time and memory of a model under source mixes, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from integrations.tiny_models import causal_lm, everything, sparse_mix, tokens
from ssa_framework import SSAConfig
from ssa_framework.cli import evaluate as evaluate_module
from ssa_framework.cli import evaluate_page
from ssa_framework.errors import ConfigError, SSAError
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.laboratory import evaluate as laboratory
from ssa_framework.laboratory.evaluate import DENSE, CostResult, Evaluation, PasskeyResult, PerplexityResult, Plan
from ssa_framework.laboratory.evaluate import evaluate as evaluate_model
from ssa_framework.laboratory.passkey import make_passkeys
from ssa_framework.plugin import Band, NeighborSource, RoutingContext
from ssa_framework.quality.timing import Timing
from ssa_framework.registry import SourceRegistry
from test_cli import plain, ssa
from test_inspect import check_self_contained

FEW = SSAConfig(num_neighbors=8, sources={"window": {"size": 3}}, dense_below=0)
ALL = everything("topk")
TEXTS = {"one": "a long text. " * 40, "two": "another one, " * 40}
SHORT = Plan(lengths=(160,), depths=0, rounds=0)


class CharacterTokenizer:
    """One token per character; a token of its own begins every text."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [2 + ord(character) % 95 for character in text]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


def run(mixes: dict[str, SSAConfig], plan: Plan, **options: Any) -> Evaluation:
    torch.manual_seed(0)
    return evaluate_model(causal_lm("llama"), CharacterTokenizer(), mixes, TEXTS, plan=plan, **options)


# -- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_last_tokens() -> None:
    torch.manual_seed(0)
    model = causal_lm("llama")
    found = evaluate_model(
        model, CharacterTokenizer(), {"few": FEW}, TEXTS, plan=Plan(lengths=(60, 160), depths=0, rounds=0)
    )
    assert [(r.length, r.text, r.mix) for r in found.perplexities] == [
        (length, text, mix) for length in (60, 160) for text in TEXTS for mix in (DENSE, "few")
    ]
    ids = torch.tensor([CharacterTokenizer()(TEXTS["two"])["input_ids"][:160]])
    with torch.no_grad():
        dense = math.exp(F.cross_entropy(model(ids).logits[0, 79:-1], ids[0, 80:]))
        with use_sparse_attention(model, FEW):
            sparse = math.exp(F.cross_entropy(model(ids).logits[0, 79:-1], ids[0, 80:]))
    of_dense, of_few = found.perplexities[-2:]
    assert of_dense.perplexity == pytest.approx(dense, rel=1e-4)
    assert of_few.perplexity == pytest.approx(sparse, rel=1e-4)
    assert of_few.change == pytest.approx(sparse / dense - 1, abs=1e-4)
    assert (of_dense.change, of_dense.looked, of_few.scored) == (None, None, 80)


def test_what_queries_look_at() -> None:
    """A window of 3 has 4 keys but for the first queries; a dense layer attends all of them."""
    attended = sum(min(i + 1, 4) for i in range(160)) / 160
    for dense_layers, share in (((), attended / 80.5), ((0,), (1 + attended / 80.5) / 2)):
        looked = run({"few": FEW}, SHORT, dense_layers=dense_layers).perplexities[1].looked
        assert looked is not None
        assert looked.keys_attended == pytest.approx(attended, rel=1e-4)
        assert looked.attended_share == pytest.approx(share, rel=1e-4)
        assert (looked.keys_scored, looked.summaries) == (0.0, 0.0)


def test_every_key_changes_nothing() -> None:
    found = run({"all": ALL}, Plan(lengths=(160,), depths=3, rounds=0), dense_layers=())
    for result in found.perplexities[1::2]:
        assert result.change == pytest.approx(0.0, abs=1e-4)
        assert result.looked is not None
        assert result.looked.attended_share == pytest.approx(1.0)
    dense, sparse = found.passkeys
    assert (sparse.prefill, sparse.decode) == (dense.prefill, dense.decode)


def test_model_comes_back_dense() -> None:
    torch.manual_seed(0)
    model, ids = causal_lm("llama"), tokens()
    before = model(ids).logits
    evaluate_model(model, CharacterTokenizer(), {"few": FEW}, TEXTS, plan=SHORT)
    assert torch.equal(model(ids).logits, before)


# -- passkeys --------------------------------------------------------------------------------------------------------


def test_passkeys_stand_where_they_say() -> None:
    tokenizer = CharacterTokenizer()
    keys = make_passkeys(tokenizer, TEXTS["one"], 300, 5, seed=3)
    needle = tokenizer(" pass key is ", add_special_tokens=False)["input_ids"]
    answers = set()
    for key in keys:
        assert key.text.shape[1] + key.tail.shape[1] == 300
        assert key.text[0, 0] == 1
        assert key.tail[0, -6:].tolist() == key.answer.tolist()
        row = key.text[0].tolist()
        place = next(i for i in range(len(row)) if row[i : i + len(needle)] == needle)
        assert place / len(row) == pytest.approx(key.depth, abs=0.35)
        answers.add(tuple(key.answer.tolist()))
    assert [key.depth for key in keys] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(answers) == 5
    assert keys[-1].text[0, -2:].tolist() == tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert make_passkeys(tokenizer, TEXTS["one"], 300, 1)[0].depth == 0.5
    with pytest.raises(ConfigError, match="takes 107 tokens"):
        make_passkeys(tokenizer, TEXTS["one"], 100, 1)
    with pytest.raises(ConfigError, match="hidden in: the text has"):
        make_passkeys(tokenizer, "short", 300, 1)


class Copier(torch.nn.Module):
    """Stands for a model that has read the number, or has forgotten it."""

    def __init__(self, answer: list[int], wrong: int | None = None) -> None:
        super().__init__()
        self.answer, self.wrong, self.device = answer, wrong, torch.device("cpu")

    def forward(self, ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        from types import SimpleNamespace

        cache = past_key_values or _Seen()
        cache.seen += ids[0].tolist()
        logits = torch.zeros(1, ids.shape[1], 100)
        for i in range(ids.shape[1]):
            known = cache.seen[: len(cache.seen) - ids.shape[1] + i + 1]
            said = next((n for n in range(len(self.answer), -1, -1) if known[-n:] == self.answer[:n] or n == 0), 0)
            if said < len(self.answer):
                logits[0, i, self.answer[said] if said != self.wrong else 0] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=cache)


def test_what_texts_share_is_read_once() -> None:
    """A number found behind a cache that was cropped is one found in a text of its own."""
    torch.manual_seed(0)
    model, keys = causal_lm("llama"), make_passkeys(CharacterTokenizer(), TEXTS["one"], 200, 3)
    reader = laboratory._Reader(model)
    with torch.no_grad(), use_sparse_attention(model, sparse_mix(), dense_layers=()):
        for key in reversed(keys):
            reader.answers(key)
            logits = reader._logits(key.tail)
            reader._forget(key.text.shape[1])
            whole = model(torch.cat([key.text, key.tail], dim=1), use_cache=False).logits[0]
            torch.testing.assert_close(logits, whole[-key.tail.shape[1] :], rtol=1e-4, atol=2e-4)


class _Seen:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def get_seq_length(self) -> int:
        return len(self.seen)

    def crop(self, count: int) -> None:
        self.seen = self.seen[: len(self.seen) + count]


@pytest.mark.parametrize("wrong", [None, 0, 4, 5])
def test_an_answer_is_right_if_every_token_is(wrong: int | None) -> None:
    (key,) = make_passkeys(CharacterTokenizer(), TEXTS["one"], 200, 1)
    assert laboratory._Reader(Copier(key.answer.tolist(), wrong)).answers(key) == (wrong is None, wrong is None)


# -- time and memory -------------------------------------------------------------------------------------------------


def test_costs() -> None:
    found = run({"few": FEW}, Plan(lengths=(160,), depths=0, rounds=2, new_tokens=3))
    assert [cost.mix for cost in found.costs] == [DENSE, "few"]
    for cost in found.costs:
        assert len(cost.prefill.readings) == 2
        assert len(cost.token.readings) == 6
        assert cost.prefill_peak is not None
        assert cost.token_peak is not None
        cached = 2 * 2 * 2 * 160 * 16 * 4  # layers, keys and values, heads
        assert cost.prefill_peak > cached
        assert 0 < cost.token_peak < cost.prefill_peak
    without = run({"few": FEW}, Plan(lengths=(160,), depths=0, rounds=1, new_tokens=1, memory=False))
    assert without.costs[0].prefill_peak is None


def test_costs_as_a_user_gets_them_and_always_sparse() -> None:
    """Below ``dense_below`` a configuration is dense: no graph is built of what its sources propose."""
    asked = []

    class Window(NeighborSource):
        needs_positions = True

        def propose(self, ctx: RoutingContext) -> Band:
            asked.append(ctx.num_queries)
            return Band(3, 0)

    registry = SourceRegistry()
    registry.register("some", Window)
    some = SSAConfig(num_neighbors=8, sources={"some": {}}, dense_below=1000)
    plan = Plan(lengths=(160,), depths=0, rounds=1, new_tokens=1, memory=False)
    told: list[str] = []
    found = run({"some": some}, plan, registry=registry, on_stage=lambda stage: told.append(f"{stage} {len(asked)}"))
    assert [(cost.mix, cost.always_sparse) for cost in found.costs] == [(DENSE, False), ("some", False), ("some", True)]
    before = {stage.rpartition(" ")[0]: int(stage.rpartition(" ")[2]) for stage in told}
    sparse = before["160 tokens, time 1 of 1: some, always sparse"]
    assert sparse == before["160 tokens, time 1 of 1: some"]
    assert len(asked) > sparse
    assert len(told) == plan.stages(len(TEXTS), {"some": some})
    assert found.mixes["some"]["dense_below"] == 1000


# -- the whole -------------------------------------------------------------------------------------------------------


def test_stages_are_counted() -> None:
    plan, told = Plan(lengths=(160, 200), depths=2, rounds=2, new_tokens=1), []
    found = run({"few": FEW, "all": ALL}, plan, on_stage=told.append, name="tiny")
    assert len(told) == plan.stages(len(TEXTS), {"few": FEW, "all": ALL}) == 42
    assert told[0] == "160 tokens of one: dense"
    assert (found.model, found.layers, found.dense_layers) == ("tiny", 2, (0,))
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert len(values["passkeys"]) == 6
    assert values["costs"][0]["token"]["rounds"] == 2


def test_interrupted() -> None:
    def stop(stage: str) -> None:
        if "two" in stage:
            raise KeyboardInterrupt

    found = run({"few": FEW}, SHORT, on_stage=stop)
    assert not found.complete
    assert [r.text for r in found.perplexities] == ["one", "one"]

    def at_once(stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run({"few": FEW}, SHORT, on_stage=at_once)


@pytest.mark.parametrize(
    ("mixes", "plan", "message"),
    [
        ({}, SHORT, "at least one mix"),
        ({DENSE: FEW}, SHORT, "none of them called 'dense'"),
        ({"few": FEW}, Plan(lengths=(1000,), depths=0), "text 'one': the text has"),
        ({"few": FEW}, Plan(lengths=(300,), depths=0), "reads up to 256 tokens, got 300"),
        ({"few": FEW}, Plan(lengths=(40,), depths=1), "a passkey with its question takes"),
        ({"nowhere": SSAConfig(sources={"nowhere": {}})}, SHORT, "unknown source 'nowhere'"),
    ],
    ids=["no-mix", "dense", "short-text", "long-context", "no-room", "unknown-source"],
)
def test_refused(mixes: Any, plan: Plan, message: str) -> None:
    with pytest.raises(SSAError, match=message):
        run(mixes, plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "lengths must be"),
        ({"lengths": (1,)}, "lengths must be"),
        ({"depths": -1}, "depths must be an integer >= 0, got -1"),
        ({"new_tokens": 0}, "new_tokens must be"),
        ({"rounds": True}, "rounds must be"),
    ],
    ids=str,
)
def test_bad_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**options)


def test_perplexity_that_is_not_finite() -> None:
    model = causal_lm("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        evaluate_model(model, CharacterTokenizer(), {"few": FEW}, TEXTS, plan=SHORT)


# -- the command -----------------------------------------------------------------------------------------------------

COMMAND = ("--length", "160", "--depths", "2", "--new-tokens", "1", "--text", "code", "--mix")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for a model."""
    monkeypatch.setattr(evaluate_module, "load_model", lambda *_, **__: (causal_lm("llama"), CharacterTokenizer()))
    (tmp_path / "tiny-model").mkdir()
    return tmp_path / "tiny-model"


def test_command_writes_numbers_and_a_page(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = ssa("eval", str(tiny), *COMMAND, 'mine={"window": {"size": 4}}', "--mix", "fast", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["eval.json", "index.html"]
    numbers = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert numbers["complete"]
    assert numbers["model"] == "tiny-model"
    assert list(numbers["mixes"]) == ["mine", "fast"]
    assert [r["mix"] for r in numbers["perplexities"]] == ["dense", "mine", "fast"]
    page = (out / "index.html").read_text(encoding="utf-8")
    links = check_self_contained(page)
    assert links.scripts == 1
    shown = plain(result.output)
    for cell in ("Perplexity", "Passkeys found", "Time and memory of the whole model", "token by token"):
        assert cell in shown
        assert cell in page
    assert "mine: perplexity changes by" in shown


def test_command_leaves_parts_out(tiny: Path, tmp_path: Path) -> None:
    arguments = ("--length", "60", "--text", "code", "--depths", "0", "--rounds", "0", "--dense-layers", "none")
    result = ssa("eval", str(tiny), *arguments, "--mix", "fast", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert (numbers["dense_layers"], numbers["passkeys"], numbers["costs"]) == ([], [], [])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert "Passkeys" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mix", "nothing"), "neither a built-in mix"),
        (("--mix", 'dense={"window": {}}'), "is measured anyway"),
        (("--dense-layers", "first"), "expected numbers and ranges"),
        (("--length", "100", "--depths", "0", "--dense-layers", "7"), "layer 7 does not exist"),
        (("--length", "100000"), "reads up to 256 tokens"),
        (("--device", "toaster"), "no device of torch"),
    ],
    ids=["mix", "dense", "layers", "layer", "length", "device"],
)
def test_command_says_what_is_wrong(arguments: tuple[str, ...], message: str, tiny: Path, tmp_path: Path) -> None:
    result = ssa("eval", str(tiny), *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code != 0
    assert message in " ".join(plain(result.output).replace("│", " ").split())
    assert "Traceback" not in result.output


def test_command_without_a_model(tmp_path: Path) -> None:
    result = ssa("eval", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "holds no model" in plain(result.output)


# -- sentences, on numbers made up -----------------------------------------------------------------------------------


def test_findings() -> None:
    looked = laboratory.Looked(0.12, 300.0, 200.0, 0.0)

    def cost(mix: str, prefill: float, token: float, always_sparse: bool = False) -> CostResult:
        return CostResult(100, mix, Timing((prefill,)), Timing((token,)), None, None, always_sparse)

    evaluation = Evaluation(
        model="m", layers=2, dense_layers=(), mixes={"a": SSAConfig().to_dict()}, lengths=(100,),
        perplexities=(
            PerplexityResult(100, "x", DENSE, 50, 5.0, None, None),
            PerplexityResult(100, "x", "a", 50, 5.1, 0.02, looked),
            PerplexityResult(100, "y", DENSE, 50, 5.0, None, None),
            PerplexityResult(100, "y", "a", 50, 4.95, -0.01, looked),
        ),
        passkeys=(
            PasskeyResult(100, DENSE, (0.0, 1.0), (True, True), (True, True)),
            PasskeyResult(100, "a", (0.0, 1.0), (False, True), (True, True)),
        ),
        costs=(cost(DENSE, 4.0, 0.3), cost("a", 2.0, 0.1), cost("a", 8.0, 0.6, always_sparse=True)),
        threads=1, dtype="float32", seconds=1.0, complete=False,
    )  # fmt: skip
    assert evaluate_page.findings(evaluation) == [
        "a: perplexity changes by -1.00 % to +2.00 %, most at 100 tokens of x, attending to 12 % to 12 % of the keys.",
        "a: of 2 passkeys at 100 tokens it finds 1 read at once and 2 token by token; dense attention finds 2 and 2.",
        "a: speed of the whole model, as a multiple of dense: 2.00 (prefill) and 3.00 (each token) at 100 tokens.",
        "a, always sparse: speed of the whole model, as a multiple of dense: 0.50 (prefill) and 0.50 (each token) at "
        "100 tokens.",
        "The evaluation was interrupted: what came after is missing.",
    ]
