"""A language model under source mixes beside its dense self: perplexity, passkeys, time and memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark.utils.timer import timer  # waits for CUDA where there is one

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.hookspecs import hookimpl
from ssa_framework.laboratory.files import replace_json
from ssa_framework.laboratory.models import cache_name, tokens_of
from ssa_framework.laboratory.passkey import Passkey, make_passkeys
from ssa_framework.laboratory.perplexity import MOST_SCORED, perplexity
from ssa_framework.masks import make_edge_mask
from ssa_framework.quality.bench import environment
from ssa_framework.quality.memory import peak_memory
from ssa_framework.quality.timing import Timing
from ssa_framework.registry import SourceRegistry, default_registry

DENSE = "dense"
"""What dense attention is called among the mixes."""

_COUNTED_QUERIES = 512


@dataclass(frozen=True)
class Looked:
    """What the queries of a forward pass attend to, means over queries, heads and layers.

    Attributes:
        attended_share: neighbors, as a share of the keys that a query may attend; dense layers attend all.
        keys_attended: neighbors of a query. summaries: summaries. keys_scored: keys whose ``q·k`` was computed. These
            three are those of the sparse layers.
    """

    attended_share: float
    keys_attended: float
    summaries: float
    keys_scored: float


@dataclass(frozen=True)
class PerplexityResult:
    """Of the last tokens of a text, each predicted from everything before it, in one forward pass.

    Attributes:
        length: tokens that are read. text: its name. mix: name of the mix, or `DENSE`.
        scored: how many tokens are predicted.
        perplexity: exp of their mean negative log-likelihood.
        change: against dense attention, 0.01 = one percent worse; ``None`` for dense attention.
        looked: ``None`` for dense attention.
    """

    length: int
    text: str
    mix: str
    scored: int
    perplexity: float
    change: float | None
    looked: Looked | None


@dataclass(frozen=True)
class PasskeyResult:
    """Whether a number that stands somewhere in a long text is said again at its end.

    Attributes:
        length: tokens, question and answer included. mix: name of the mix, or `DENSE`.
        depths: where the number stands, 0 = at the beginning, 1 = right before the question.
        prefill: for each depth, whether every token of the answer is the most likely one where question and answer are
            read in one call behind the text.
        decode: the same where question and answer come token by token.
    """

    length: int
    mix: str
    depths: tuple[float, ...]
    prefill: tuple[bool, ...]
    decode: tuple[bool, ...]


@dataclass(frozen=True)
class CostResult:
    """Of the whole model, batch of one, measured in turns with the other mixes.

    Attributes:
        length: tokens of the prompt. mix: name of the mix, or `DENSE`.
        always_sparse: whether the mix was measured as it is, although its ``dense_below`` computes densely where few
            keys are there; `False`: as whoever uses its configuration gets it.
        prefill: seconds until the first new token is known, one reading per round.
        token: seconds of each further token, with its cache behind the prompt.
        prefill_peak: bytes that a prefill holds at its peak beyond the weights, its cache included; ``None`` where
            memory was not measured. token_peak: bytes that one further token holds at its peak beyond weights and
            cache.
    """

    length: int
    mix: str
    prefill: Timing
    token: Timing
    prefill_peak: int | None
    token_peak: int | None
    always_sparse: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found.

    Attributes:
        model: its name. layers: how many it has. dense_layers: those that stay dense under every mix.
        mixes: configurations as JSON values, by name; dense attention is none of them.
        lengths: of texts, ascending.
        perplexities, passkeys, costs: the results, dense attention first in each group.
        threads: of the CPU. dtype: of the weights.
        seconds: that it took. complete: whether nothing was interrupted.
        environment: device, versions, commit and date.
    """

    model: str
    layers: int
    dense_layers: tuple[int, ...]
    mixes: Mapping[str, Mapping[str, Any]]
    lengths: tuple[int, ...]
    perplexities: tuple[PerplexityResult, ...]
    passkeys: tuple[PasskeyResult, ...]
    costs: tuple[CostResult, ...]
    threads: int
    dtype: str
    seconds: float
    complete: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        own = {name: value for name, value in vars(self).items() if name not in ("perplexities", "passkeys", "costs")}
        return {
            **own,
            "dense_layers": list(self.dense_layers),
            "lengths": list(self.lengths),
            "mixes": {name: dict(config) for name, config in self.mixes.items()},
            "environment": dict(self.environment),
            "perplexities": [asdict(result) for result in self.perplexities],
            "passkeys": [asdict(result) for result in self.passkeys],
            "costs": [
                {**vars(cost), "prefill": cost.prefill.to_dict(), "token": cost.token.to_dict()} for cost in self.costs
            ],
        }

    def write_json(self, path: str | Path) -> None:
        """Write `as_dict`; the file is replaced at once."""
        replace_json(path, self.as_dict())


@dataclass(frozen=True)
class Plan:
    """What `evaluate` measures.

    Attributes:
        lengths: tokens of a text, question and answer of a passkey included.
        depths: how many places a passkey is hidden at, spread evenly from the beginning to the end; 0 = no passkeys.
        seed: of the numbers to be found.
        rounds: readings of the time of each prefill; 0 = no times. new_tokens: readings of a further token, per round.
        memory: whether peak memory is measured, which takes one more prefill.
    """

    lengths: tuple[int, ...] = (2048, 4096)
    depths: int = 8
    seed: int = 0
    rounds: int = 1
    new_tokens: int = 16
    memory: bool = True

    def __post_init__(self) -> None:
        least = {"depths": 0, "seed": 0, "rounds": 0, "new_tokens": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")
        if not self.lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in self.lengths):
            raise ConfigError(f"lengths must be integers >= 2, at least one, got {self.lengths!r}")

    def stages(self, texts: int, mixes: Mapping[str, SSAConfig]) -> int:
        """How many times `evaluate` tells its ``on_stage`` what comes next."""
        timed = (self.rounds + (self.rounds > 0 and self.memory)) * len(_timed_ways(mixes))
        return len(set(self.lengths)) * ((1 + len(mixes)) * (texts + self.depths) + timed)


def evaluate(
    model: Any,
    tokenizer: Any,
    mixes: Mapping[str, SSAConfig],
    texts: Mapping[str, str],
    *,
    plan: Plan | None = None,
    dense_layers: Sequence[int] = (0,),
    name: str = "",
    registry: SourceRegistry | None = None,
    on_stage: Callable[[str], object] | None = None,
) -> Evaluation:
    """Measure a causal language model of transformers dense and under each mix, on the weights that it has.

    Interrupted with Ctrl-C, it returns what it has, unless that is nothing.

    Args:
        model: in eval mode, on any device; it computes dense attention when it comes back.
        mixes: configurations by name; see `use_sparse_attention`. Perplexity and passkeys are those of the mix itself:
            ``dense_below`` is 0 there. Time and memory are measured as the configuration says, and, where its
            ``dense_below`` is a number or ``"auto"``, of the mix itself, too.
        texts: contents by name. Passkeys are hidden in the first one.
        plan: what to measure; `Plan` with its defaults if left out.
        dense_layers: see `use_sparse_attention`.
        name: what the result calls the model.
        registry: where source names are looked up.
        on_stage: told what comes next; `Plan.stages` says how many times that is.

    Raises:
        ConfigError: no mix, one that is called `DENSE`, no text or too short a one, more tokens than the model reads,
            perplexities that are not finite, or what `use_sparse_attention` says.
        MissingExtraError: transformers is not installed or too old.
    """
    plan = plan or Plan()
    if not mixes or DENSE in mixes:
        raise ConfigError(f"evaluate takes at least one mix, none of them called {DENSE!r}, got {list(mixes)}")
    lengths = tuple(sorted(set(plan.lengths)))
    ids = {(length, text): _ids(tokenizer, texts, text, length) for length in lengths for text in texts}
    if not ids:
        raise ConfigError("evaluate takes at least one text")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < lengths[-1]:
        raise ConfigError(f"the model reads up to {longest} tokens, got {lengths[-1]}; take a shorter length")
    filler = next(iter(texts.values()))
    keys = {length: make_passkeys(tokenizer, filler, length, plan.depths, plan.seed) for length in lengths}
    subject = _Subject(model, mixes, tuple(dense_layers), registry)
    begun, complete = time.perf_counter(), True
    say = on_stage or (lambda _: None)
    found = _Found()
    try:
        with torch.inference_mode():
            for length in lengths:
                for text in texts:
                    _perplexities(subject, ids[length, text], text, found, say)
                _passkeys(subject, length, keys[length], found, say)
                _costs(subject, ids[length, next(iter(texts))], plan, found, say)
    except KeyboardInterrupt:
        if not found.perplexities:
            raise
        complete = False
    return Evaluation(
        model=name or type(model).__name__,
        layers=subject.layers,
        dense_layers=subject.dense_layers,
        mixes={mix: config.to_dict() for mix, config in subject.mixes.items()},
        lengths=lengths,
        perplexities=tuple(found.perplexities),
        passkeys=tuple(found.passkeys),
        costs=tuple(found.costs),
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=_number(time.perf_counter() - begun),
        complete=complete,
        environment=environment(str(model.device)),
    )


@dataclass(frozen=True)
class _Way:
    """A way of attending whose cost is measured: dense, or a mix."""

    mix: str
    always_sparse: bool = False

    def __str__(self) -> str:
        return f"{self.mix}, always sparse" if self.always_sparse else self.mix


def _timed_ways(mixes: Mapping[str, SSAConfig]) -> list[_Way]:
    ways = [_Way(DENSE)]
    for name, config in mixes.items():
        ways += [_Way(name), _Way(name, True)] if config.dense_below else [_Way(name)]
    return ways


@dataclass
class _Found:
    perplexities: list[PerplexityResult] = field(default_factory=list)
    passkeys: list[PasskeyResult] = field(default_factory=list)
    costs: list[CostResult] = field(default_factory=list)


class _Graphs:
    """A plugin that adds up what the graphs of a forward pass hold."""

    def __init__(self) -> None:
        self.count = 0
        self.share = self.attended = self.summaries = self.scored = 0.0

    @hookimpl
    def ssa_graph_built(self, graph: NeighborGraph, layer: object) -> None:
        count, device = graph.num_queries, graph.device
        rows = torch.linspace(0, count - 1, min(_COUNTED_QUERIES, count), device=device).long()
        mask = make_edge_mask(
            batch=1,
            heads=1,
            queries=len(rows),
            keys=graph.num_keys,
            device=device,
            causal=graph.causal,
            query_positions=rows,
        )
        some = graph.with_queries(mask, rows)
        attended = float(some.degree().float().mean())
        self.count += 1
        self.attended += attended
        self.share += attended / (float(rows.float().mean()) + 1)
        self.summaries += float(some.summaries_per_query().float().mean())
        self.scored += sum(graph.keys_scored().values())

    def looked(self, layers: int) -> Looked:
        """``layers``: those that have no graph attend everything."""
        count = max(1, self.count)
        return Looked(
            attended_share=_number((self.share + layers - self.count) / layers),
            keys_attended=_number(self.attended / count),
            summaries=_number(self.summaries / count),
            keys_scored=_number(self.scored / count),
        )


class _Subject:
    """The model, and the mixes that it is measured under."""

    def __init__(
        self,
        model: Any,
        mixes: Mapping[str, SSAConfig],
        dense_layers: tuple[int, ...],
        registry: SourceRegistry | None,
    ) -> None:
        from ssa_framework.integrations.transformers import use_sparse_attention

        self.mixes = dict(mixes)
        self.model, self.dense_layers, self.registry = model, dense_layers, registry
        self._use = use_sparse_attention
        for config in self.mixes.values():  # what is wrong with one of them is said before anything is measured
            with use_sparse_attention(model, config, dense_layers=dense_layers, registry=registry) as handle:
                self.layers = len(handle.layers)

    @property
    def routings(self) -> list[str]:
        return [DENSE, *self.mixes]

    @contextmanager
    def routed(self, mix: str, *, always_sparse: bool = True) -> Iterator[Any]:
        """The model under a mix, or dense. ``always_sparse``: also where dense attention would be faster."""
        if mix == DENSE:
            yield self.model
            return
        config = self.mixes[mix].replace(dense_below=0) if always_sparse else self.mixes[mix]
        with self._use(self.model, config, dense_layers=self.dense_layers, registry=self.registry):
            yield self.model


def _ids(tokenizer: Any, texts: Mapping[str, str], text: str, length: int) -> Tensor:
    try:
        return tokens_of(tokenizer, texts[text], length)
    except ConfigError as error:
        raise ConfigError(f"text {text!r}: {error}") from error


# -- perplexity ------------------------------------------------------------------------------------------------------


def _perplexities(subject: _Subject, ids: Tensor, text: str, found: _Found, say: Callable[[str], object]) -> None:
    length, dense = ids.shape[1], math.nan
    for mix in subject.routings:
        say(f"{length} tokens of {text}: {mix}")
        with subject.routed(mix) as model, _observed(subject.registry) as graphs:
            value = perplexity(model, ids.to(model.device))
        if not math.isfinite(value):
            raise ConfigError(f"the perplexity of {text!r} under {mix!r} is not finite: there is nothing to compare")
        dense = value if mix == DENSE else dense
        found.perplexities.append(
            PerplexityResult(
                length=length,
                text=text,
                mix=mix,
                scored=_scored(length),
                perplexity=_number(value),
                change=None if mix == DENSE else _number(value / dense - 1),
                looked=None if mix == DENSE else graphs.looked(subject.layers),
            )
        )


@contextmanager
def _observed(registry: SourceRegistry | None) -> Iterator[_Graphs]:
    """Counts the graphs that are built meanwhile."""
    registry, graphs = registry or default_registry(), _Graphs()
    registry.register_plugin(graphs)
    try:
        yield graphs
    finally:
        registry.manager.unregister(graphs)


def _scored(length: int) -> int:
    return min(MOST_SCORED, length // 2)


# -- passkeys --------------------------------------------------------------------------------------------------------


def _passkeys(
    subject: _Subject, length: int, keys: Sequence[Passkey], found: _Found, say: Callable[[str], object]
) -> None:
    if not keys:
        return
    deepest_first = sorted(range(len(keys)), key=lambda i: -keys[i].depth)  # what two texts share is read once
    for mix in subject.routings:
        right: dict[int, tuple[bool, bool]] = {}
        with subject.routed(mix) as model:
            reader = _Reader(model)
            for number, i in enumerate(deepest_first, start=1):
                say(f"{length} tokens, passkey {number} of {len(keys)}: {mix}")
                right[i] = reader.answers(keys[i])
        prefill, decode = zip(*(right[i] for i in range(len(keys))), strict=True)
        found.passkeys.append(PasskeyResult(length, mix, tuple(key.depth for key in keys), prefill, decode))


class _Reader:
    """A model that reads one text after another, each from where it differs from the one before."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text = torch.empty(0, dtype=torch.int64)
        self.cache: Any = None

    def answers(self, key: Passkey) -> tuple[bool, bool]:
        """Whether the answer is right where question and answer come at once, and token by token."""
        self._read(key.text[0])
        tail, answer = key.tail.to(self.model.device), key.answer.tolist()
        at_once = self._logits(tail)[-len(answer) - 1 : -1].argmax(-1).tolist()
        self._forget(len(self.text))
        said: list[int] = []
        for token in tail[0, : -len(answer)]:
            said = [int(self._logits(token[None, None])[-1].argmax())]
        while len(said) < len(answer):
            said.append(int(self._logits(tail.new_tensor([[said[-1]]]))[-1].argmax()))
        self._forget(len(self.text))
        return at_once == answer, said == answer

    def _read(self, text: Tensor) -> None:
        length = min(len(text), len(self.text))
        differs = (text[:length] != self.text[:length]).nonzero()
        # one token at least is read anew
        shared = min(int(differs[0]) if len(differs) else length, len(text) - 1)
        if self.cache is not None:
            self._forget(shared)
        self.text = text
        self._logits(text[None, shared:].to(self.model.device), keep=1)

    def _forget(self, length: int) -> None:
        self.cache.crop(length - self.cache.get_seq_length())

    def _logits(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Of tokens behind the cache, ``[N, V]``; ``keep``: only so many of the last, 0 = all."""
        name = cache_name(self.model)
        out = self.model(ids, **{name: self.cache}, use_cache=True, logits_to_keep=keep)
        self.cache = getattr(out, name)
        logits: Tensor = out.logits[0]
        return logits


# -- time and memory -------------------------------------------------------------------------------------------------


def _costs(subject: _Subject, ids: Tensor, plan: Plan, found: _Found, say: Callable[[str], object]) -> None:
    """In turns, so that a drift of the machine hits all mixes."""
    if not plan.rounds:
        return
    ids = ids.to(subject.model.device)
    length = ids.shape[1]
    ways = _timed_ways(subject.mixes)
    prefills: dict[_Way, list[float]] = {way: [] for way in ways}
    steps: dict[_Way, list[float]] = {way: [] for way in ways}
    for number in range(plan.rounds):
        for way in ways:
            say(f"{length} tokens, time {number + 1} of {plan.rounds}: {way}")
            with subject.routed(**vars(way)) as model:
                prefill, step = _times(model, ids, plan.new_tokens)
            prefills[way].append(prefill)
            steps[way] += step
    peaks: dict[_Way, tuple[int | None, int | None]] = dict.fromkeys(ways, (None, None))
    if plan.memory:
        for way in ways:
            say(f"{length} tokens, memory: {way}")
            with subject.routed(**vars(way)) as model:
                peaks[way] = _peaks(model, ids)
    found.costs += [
        CostResult(
            length, way.mix, Timing(tuple(prefills[way])), Timing(tuple(steps[way])), *peaks[way], way.always_sparse
        )
        for way in ways
    ]


def _times(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds of a prefill, and of each token that is generated behind it."""
    name = cache_name(model)
    model(ids[:, :2], use_cache=True)  # not the first call under this mix
    start = timer()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    prefill, cache = timer() - start, getattr(out, name)
    del out
    steps = []
    for _ in range(new_tokens + 1):
        start = timer()
        token = model(token, **{name: cache}, use_cache=True).logits[:, -1:].argmax(-1)
        steps.append(timer() - start)
    return prefill, steps[1:]  # the first one meets kernels and memory that no step has used yet


def _peaks(model: Any, ids: Tensor) -> tuple[int, int]:
    """Bytes at the peak of a prefill, and of the second token that is generated behind it."""
    caches, name = [], cache_name(model)

    def prefill() -> None:
        caches.append(getattr(model(ids, use_cache=True, logits_to_keep=1), name))

    def step() -> None:
        model(ids[:, -1:], **{name: caches[0]}, use_cache=True)

    gc.collect()
    most = peak_memory(prefill, model.device)
    step()
    return most, peak_memory(step, model.device)


def _number(value: float) -> float:
    return float(f"{value:.6g}")
