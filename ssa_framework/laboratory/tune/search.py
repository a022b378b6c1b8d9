"""`tune`: the search; what it does step by step stands in `ssa_framework.laboratory.tune`."""

from __future__ import annotations

import hashlib
import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.laboratory.capture import LayerTensors, capture_layers, choose_layers
from ssa_framework.laboratory.perplexity import token_losses
from ssa_framework.laboratory.routing import MixRouter, sample_queries
from ssa_framework.laboratory.tune.candidates import DENSE, default_candidates, preset_references
from ssa_framework.laboratory.tune.costs import figures_of
from ssa_framework.laboratory.tune.hull import HullPath, Point, lower_hull
from ssa_framework.laboratory.tune.results import Change, Target, Trial, Tuning
from ssa_framework.laboratory.tune.store import Store
from ssa_framework.quality.bench import environment
from ssa_framework.registry import SourceRegistry

_PRECISION = 0.01
"""The search ends where the next cheaper configuration that was tried costs less than this share less."""
_SCORED_FOR_SENSITIVITY, _SHORTER = 512, 4
"""Predictions that are looked at to see how much a layer matters, and what share of a text is read for it."""

_LEAST_SENSITIVITY = 0.01
"""Relative to the layer that matters most: below that it is noise."""


def tune(
    model: Any,
    texts: Mapping[str, Tensor],
    target: Target,
    *,
    candidates: Mapping[str, SSAConfig] | None = None,
    references: Mapping[str, SSAConfig] | None = None,
    held_out: Mapping[str, Tensor] | None = None,
    queries: int = 32,
    trials: int = 8,
    seed: int = 0,
    registry: SourceRegistry | None = None,
    model_name: str = "",
    state: str | Path | None = None,
    on_stage: Callable[[str, int, int], object] | None = None,
) -> Tuning:
    """Search the cheapest configuration of each layer that meets a target.

    Deterministic for a seed. Interrupted with Ctrl-C or otherwise, it goes on where it was if it is called again with
    the same arguments and the same ``state``; another target makes use of what the file holds, too.

    Args:
        model: a causal language model of transformers, see `capture_layers`.
        texts: int64 ``[1, N]`` by name, of one length, which the search looks at.
        target: what is good enough.
        candidates: configurations by name; `default_candidates` if left out. Dense attention always is one.
        references: configurations by name that the result is compared with; the presets if left out.
        held_out: texts by name that only the result and the references are checked on.
        queries: sampled per head, layer and text.
        trials: at most so many configurations are tried in the model, for a target in perplexity.
        seed: of the sample and of the sources.
        registry: where source names are looked up.
        model_name: what the result calls the model.
        state: file to keep what was measured in, JSON; written after every step.
        on_stage: told what comes next, how many steps are done and how many there are, about.

    Raises:
        ConfigError: no text, texts of several lengths, no candidate, a number out of range, or a state file of other
            texts, candidates, or sampling. SSAError: whatever sources and router raise.
    """
    search = _Search(
        model,
        dict(texts),
        dict(held_out or {}),
        target,
        default_candidates() if candidates is None else dict(candidates),
        preset_references() if references is None else dict(references),
        queries=queries,
        trials=trials,
        seed=seed,
        registry=registry,
        store=Store(state),
        on_stage=on_stage or (lambda stage, done, total: None),
    )
    return search.run(model_name or type(model).__name__)


@dataclass
class _Search:
    model: Any
    texts: dict[str, Tensor]
    held_out: dict[str, Tensor]
    target: Target
    candidates: dict[str, SSAConfig]
    references: dict[str, SSAConfig]
    queries: int
    trials: int
    seed: int
    registry: SourceRegistry | None
    store: Store
    on_stage: Callable[[str, int, int], object]
    done: int = 0

    def __post_init__(self) -> None:
        lengths = {ids.shape for ids in (*self.texts.values(), *self.held_out.values())}
        if not self.texts or len(lengths) > 1:
            raise ConfigError(f"tune needs texts of one length, got {sorted(map(list, lengths))}")
        if not self.candidates or DENSE in self.candidates:
            raise ConfigError(f"tune needs candidates, none of which is called {DENSE!r}")
        if isinstance(self.trials, bool) or not isinstance(self.trials, int) or self.trials < 1:
            raise ConfigError(f"trials must be an integer >= 1, got {self.trials!r}")
        self.candidates = {n: c.replace(dense_below=0, seed=self.seed) for n, c in self.candidates.items()}
        self.length = next(iter(self.texts.values())).shape[1]
        self.wanted = choose_layers(self.model)
        both = self.candidates | {_reference(n): c for n, c in self.references.items()}
        self.routers = {name: MixRouter(config, self.registry) for name, config in both.items()}
        self.digests = {name: _digest(config.to_dict()) for name, config in both.items()}
        self.store.belongs_to(
            {
                "texts": {name: _digest(ids.tolist()) for name, ids in self.texts.items()},
                "queries": self.queries,
                "seed": self.seed,
                "model": _digest([f"{float(p.detach().double().sum()):.6g}" for p in self.model.parameters()]),
            }
        )
        passes = (len(self.references) + 1) * (len(self.texts) + len(self.held_out)) + self.trials * len(self.texts)
        self.total = len(self.texts) * len(self.wanted)
        if self.by_perplexity:
            self.total += len(self.wanted) + passes + len(self.texts) + len(self.held_out)
        else:
            self.total += len(self.held_out) * len(self.wanted)

    @property
    def by_perplexity(self) -> bool:
        return self.target.kind == "perplexity"

    def run(self, name: str) -> Tuning:
        curves = {text: self.curves(text, ids) for text, ids in self.texts.items()}
        allowed = sum(curves[text][layer]["allowed"] for text in curves for layer in self.wanted)
        allowed /= len(curves) * len(self.wanted)
        sensitivity = self.sensitivities(curves) if self.by_perplexity else {}
        points = {layer: self.points(layer, curves, sensitivity) for layer in self.wanted}
        path = HullPath.of(
            {layer: {n: p for n, p in of.items() if n not in self.reference_names} for layer, of in points.items()}
        )
        tried = self.search(path) if self.by_perplexity else self.search_error(path)
        steps, result = min(((s, t) for s, t in tried.items() if t.meets), key=lambda found: found[0])
        choice = path.choice(steps)
        if all(name == DENSE for name in choice.values()):
            raise ConfigError(
                f"only dense attention in every layer meets the target, {self.target.limit:.3g} in {self.target.kind}, "
                f"of the configurations that were tried; allow more, or other candidates"
            )
        config = self.config_of(choice)
        result = self.checked(result, config, choice)
        references = tuple(self.reference(name, config, points) for name, config in self.references.items())
        return Tuning(
            model=name,
            length=self.length,
            target=self.target,
            config=config,
            layers=choice,
            points=points,
            sensitivity=sensitivity,
            allowed=_number(allowed),
            result=result,
            references=references,
            trials=tuple(tried[steps] for steps in sorted(tried)),
            seed=self.seed,
            seconds=self.store.values.get("seconds", 0.0),
            environment=environment(str(next(self.model.parameters()).device)),
        )

    @property
    def reference_names(self) -> set[str]:
        return {_reference(name) for name in self.references}

    def stage(self, what: str) -> None:
        self.on_stage(what, self.done, max(self.total, self.done + 1))
        self.done += 1

    # -- candidates in layers ----------------------------------------------------------------------------------------

    def curves(self, text: str, ids: Tensor) -> dict[int, dict[str, Any]]:
        """For each layer what each candidate, and each reference, costs and does on one text: figures by the digest of
        its configuration."""
        held = {layer: self.store.values.get(_key("curve", text, layer)) for layer in self.wanted}
        missing = {
            layer: [n for n, digest in self.digests.items() if found is None or digest not in found["figures"]]
            for layer, found in held.items()
        }
        waiting = [layer for layer in self.wanted if missing[layer]]
        self.done += len(self.wanted) - len(waiting)
        if waiting:
            started = time.perf_counter()
            self.stage(f"candidates on {text!r}, layer {waiting[0]}")

            def consume(layer: LayerTensors) -> None:
                nonlocal started
                measured = self.measure_candidates(layer, missing[layer.layer])
                known = held[layer.layer]
                if known is not None:
                    measured["figures"] = {**known["figures"], **measured["figures"]}
                now = time.perf_counter()
                self.store.put(_key("curve", text, layer.layer), measured, now - started)
                started = now
                if layer.layer != waiting[-1]:
                    self.stage(f"candidates on {text!r}, layer {waiting[waiting.index(layer.layer) + 1]}")

            capture_layers(self.model, ids, consume, layers=waiting)
        return {layer: self.store.values[_key("curve", text, layer)] for layer in self.wanted}

    def measure_candidates(self, layer: LayerTensors, names: Iterable[str]) -> dict[str, Any]:
        layer.require_finite()
        rows = sample_queries(layer, self.queries, seed=self.seed)
        found = figures_of(layer, rows, {name: self.routers[name].route(layer, rows).graph for name in names})
        figures = {
            self.digests[name]: [_number(f.cost), _number(f.error), _number(f.squared)] for name, f in found.items()
        }
        return {"allowed": _number(next(iter(found.values())).allowed), "figures": figures}

    def points(
        self, layer: int, curves: Mapping[str, Mapping[int, Any]], sensitivity: Mapping[int, float]
    ) -> dict[str, Point]:
        """Means over the texts."""
        found = {}
        for name in self.routers:
            figures = [curves[text][layer]["figures"][self.digests[name]] for text in curves]
            cost, error, squared = (sum(values) / len(figures) for values in zip(*figures, strict=True))
            damage = sensitivity[layer] * squared if sensitivity else error
            found[name] = Point(_number(cost), _number(error), _number(damage))
        allowed = sum(curves[text][layer]["allowed"] for text in curves) / len(curves)
        return {**found, DENSE: Point(_number(allowed), 0.0, 0.0)}

    # -- how much a layer matters ------------------------------------------------------------------------------------

    def sensitivities(self, curves: Mapping[str, Mapping[int, Any]]) -> dict[int, float]:
        """Nats of divergence per squared relative error of a layer, on a quarter of the first text."""
        text, ids = next(iter(self.texts.items()))
        ids = ids[:, : max(2, self.length // _SHORTER)]
        scored = min(_SCORED_FOR_SENSITIVITY, ids.shape[1] - 1)
        probes = {layer: self.probe(curves[text][layer]["figures"]) for layer in self.wanted}
        keys = {layer: _key("sensitivity", layer, self.digests[probe]) for layer, probe in probes.items()}
        missing = [layer for layer in self.wanted if keys[layer] not in self.store.values]
        self.done += len(self.wanted) - len(missing)
        if missing:
            errors: dict[int, float] = {}

            def consume(layer: LayerTensors) -> None:
                probe = probes[layer.layer]
                errors[layer.layer] = self.measure_candidates(layer, [probe])["figures"][self.digests[probe]][2]

            capture_layers(self.model, ids, consume, layers=missing)
            dense = _log_probabilities(self.model, ids, scored)
            for layer in missing:
                self.stage(f"how much layer {layer} matters")
                others: dict[int, str] = {i: DENSE for i in self.wanted if i != layer}
                config = self.config_of({**others, layer: probes[layer]})
                started = time.perf_counter()
                divergence = self.divergence(config, ids, scored, dense)
                value = divergence / max(errors[layer], 1e-12)
                self.store.put(keys[layer], value, time.perf_counter() - started)
        found = {layer: self.store.values[key] for layer, key in keys.items()}
        least = max(1e-9, _LEAST_SENSITIVITY * max(found.values()))
        return {layer: _number(max(least, value)) for layer, value in found.items()}

    def probe(self, figures: Mapping[str, Sequence[float]]) -> str:
        """A candidate in the middle of the hull: neither without effect nor out of the question."""
        points = {name: Point(*figures[self.digests[name]]) for name in self.candidates}
        hull = lower_hull(points)
        return hull[len(hull) // 2]

    def divergence(self, config: SSAConfig, ids: Tensor, scored: int, dense: Tensor) -> float:
        with self.sparse(config):
            sparse = _log_probabilities(self.model, ids, scored)
        divergence = F.kl_div(sparse, dense, log_target=True, reduction="sum") / scored
        return max(0.0, float(divergence))

    # -- configurations in the model ---------------------------------------------------------------------------------

    def config_of(self, choice: Mapping[int, str]) -> SSAConfig:
        """What most layers have, and in what the others differ."""
        sparse = [name for name in choice.values() if name != DENSE]
        usual = max(dict.fromkeys(sparse), key=sparse.count) if sparse else next(iter(self.candidates))
        base = self.candidates[usual].replace(dense_below=None)
        layers: dict[int, Any] = {}
        for layer, name in choice.items():
            own = self.candidates.get(name, base).replace(dense_below=None).to_dict()
            different = {field: value for field, value in own.items() if value != getattr(base, field)}
            layers[layer] = "dense" if name == DENSE else different  # each is named, so that nobody makes others dense
        return base.replace(layers=layers)

    def sparse(self, config: SSAConfig) -> Any:
        from ssa_framework.integrations.transformers import use_sparse_attention

        return use_sparse_attention(self.model, config, dense_layers=(), registry=self.registry)

    def losses(self, text: str, ids: Tensor, config: SSAConfig | None) -> Tensor:
        """Of the second half of a text; dense without a configuration."""

        def measure() -> list[float]:
            if config is None or all(own.is_dense for own in map(config.for_layer, self.wanted)):
                found = token_losses(self.model, ids, scored=self.length // 2)
            else:
                with self.sparse(config):
                    found = token_losses(self.model, ids, scored=self.length // 2)
            return [round(loss, 6) for loss in found.tolist()]

        what = DENSE if config is None else _digest(config.to_dict())
        return torch.tensor(
            self.store.get(_key("losses", text, _digest(ids.tolist()), what), measure), dtype=torch.float64
        )

    def changes(self, texts: Mapping[str, Tensor], config: SSAConfig, what: str) -> tuple[dict[str, Change], Change]:
        """By text, and of all together."""
        losses = []
        for text, ids in texts.items():
            if _key("losses", text, _digest(ids.tolist()), DENSE) not in self.store.values:
                self.stage(f"dense attention on {text!r}")
            dense = self.losses(text, ids, None)
            self.stage(f"{what} on {text!r}")
            losses.append((dense, self.losses(text, ids, config)))
        by_text = {text: Change.of(*both) for text, both in zip(texts, losses, strict=True)}
        return by_text, Change.of(torch.cat([d for d, _ in losses]), torch.cat([s for _, s in losses]))

    def search(self, path: HullPath) -> dict[int, Trial]:
        """Number of steps and what came of it: the fewest that meet the target among those that were tried."""
        last = len(path) - 1
        limit = math.log1p(self.target.limit)
        damages = [path.damage(steps) for steps in range(len(path))]
        tried: dict[int, Trial] = {}
        low, high = -1, last  # fails or was not tried; meets, since it is dense, or the best there is
        wanted = limit / 2  # of predicted damage: half of the limit is left for errors of layers that add up
        for attempt in range(self.trials):
            steps = bisect_left([-d for d in damages], -wanted)
            if attempt > 3 or not low < steps < high:
                steps = (low + high) // 2
            if not low < steps <= high or steps in tried:
                break
            tried[steps] = trial = self.trial(path, steps, attempt)
            assert trial.together is not None
            if trial.meets:
                high = steps
            else:
                low = steps
            if low >= 0 and path.mean(low, "cost") > (1 - _PRECISION) * path.mean(high, "cost"):
                break
            wanted = damages[steps] * limit / max(math.log1p(max(trial.together.upper, -0.9)), 0.05 * limit)
        if not any(trial.meets for trial in tried.values()):
            tried[high] = self.trial(path, high, self.trials)
        return tried

    def trial(self, path: HullPath, steps: int, attempt: int) -> Trial:
        config = self.config_of(path.choice(steps))
        by_text, together = self.changes(self.texts, config, f"trial {attempt + 1}")
        return Trial(
            name=f"{steps} of {len(path) - 1} steps",
            cost=_number(path.mean(steps, "cost")),
            output_error=_number(path.mean(steps, "output_error")),
            meets=together.upper <= self.target.limit,
            texts=by_text,
            together=together,
        )

    def search_error(self, path: HullPath) -> dict[int, Trial]:
        errors = [path.mean(steps, "output_error") for steps in range(len(path))]
        steps = next(i for i, error in enumerate(errors) if error <= self.target.limit)  # the last is dense
        name = f"{steps} of {len(path) - 1} steps"
        return {steps: Trial(name, _number(path.mean(steps, "cost")), _number(errors[steps]), meets=True)}

    # -- checks ------------------------------------------------------------------------------------------------------

    def checked(self, trial: Trial, config: SSAConfig, choice: Mapping[int, str]) -> Trial:
        """With what it does on the texts that had no part in the search."""
        if self.by_perplexity:
            held_out = self.changes(self.held_out, config, "the result")[0] if self.held_out else {}
            return Trial(**{**vars(trial), "name": "tuned", "held_out": held_out})
        found = [self.held_out_figures(text, ids, choice) for text, ids in self.held_out.items()]
        errors = [figures[1] for by_layer in found for figures in by_layer.values()]
        mean = _number(sum(errors) / len(errors)) if errors else None
        return Trial(**{**vars(trial), "name": "tuned", "held_out_error": mean})

    def held_out_figures(self, text: str, ids: Tensor, choice: Mapping[int, str]) -> dict[int, list[float]]:
        """For each layer cost and error of its candidate."""
        found = {layer: [0.0, 0.0, 0.0] for layer in self.wanted}

        def consume(layer: LayerTensors) -> None:
            self.stage(f"the result on {text!r}, layer {layer.layer}")
            name = choice[layer.layer]
            found[layer.layer] = self.measure_candidates(layer, [name])["figures"][self.digests[name]]

        sparse = [layer for layer, name in choice.items() if name != DENSE]
        if sparse:
            capture_layers(self.model, ids, consume, layers=sparse)
        return found

    def reference(self, name: str, config: SSAConfig, points: Mapping[int, Mapping[str, Point]]) -> Trial:
        own = [points[layer][_reference(name)] for layer in self.wanted]
        cost, error = (sum(getattr(p, figure) for p in own) / len(own) for figure in ("cost", "output_error"))
        if not self.by_perplexity:
            return Trial(name, _number(cost), _number(error), meets=error <= self.target.limit)
        by_text, together = self.changes(self.texts, config, name)
        held_out = self.changes(self.held_out, config, name)[0] if self.held_out else {}
        meets = together.upper <= self.target.limit
        return Trial(name, _number(cost), _number(error), meets, by_text, together, held_out)


def _reference(name: str) -> str:
    return f"for comparison: {name}"


def _key(*parts: object) -> str:
    return "/".join(map(str, parts))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=repr, sort_keys=True).encode()).hexdigest()[:16]


def _log_probabilities(model: Any, ids: Tensor, scored: int) -> Tensor:
    """Of the last predictions, float32 ``[scored, vocabulary]``."""
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=scored + 1, use_cache=False).logits[0, -scored - 1 : -1]
        return logits.float().log_softmax(-1)


def _number(value: float) -> float:
    return float(f"{value:.6g}")
