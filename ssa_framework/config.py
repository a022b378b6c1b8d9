"""`SSAConfig`: everything that configures a sparse attention layer, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ssa_framework.errors import ConfigError
from ssa_framework.presets import PRESETS, preset_sources

_FLAT_SOURCE_FIELDS = (
    "max_num_hashes",
    "num_hash_rounds",
    "lsh_num_probes",
    "window_size",
    "num_global_tokens",
    "global_token_indices",
)
_LAYER_FIELDS = (
    "num_neighbors",
    *_FLAT_SOURCE_FIELDS,
    "sources",
    "graph_heads",
    "backend",
    "dense_below",
    "seed",
    "fp32_attn_weights",
    "audit",
)
"""What may differ from layer to layer of a model."""
_ALWAYS_DENSE = 2**31 - 1


@dataclass(frozen=True)
class AuditOptions:
    """How `ssa_framework.audit` estimates the attention mass that a graph misses.

    Attributes:
        queries: how many are drawn at random in every audited call, the same for all batch elements and heads.
        keys: how many of the keys that were not selected are drawn for each of them; ``None`` looks at all of them.
        confidence: of the interval.
        every: audit one of so many calls of a layer, beginning with the first.
        seed: of what is drawn.

    Raises:
        ConfigError: a number out of range.
    """

    queries: int = 8
    keys: int | None = 128
    confidence: float = 0.95
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _require_int("audit: queries", self.queries, 1)
        if self.keys is not None:
            _require_int("audit: keys", self.keys, 2)
        if isinstance(self.confidence, bool) or not 0.0 < float(self.confidence) < 1.0:
            raise ConfigError(f"audit: confidence must lie in (0, 1), got {self.confidence!r}")
        _require_int("audit: every", self.every, 1)
        _require_int("audit: seed", self.seed, 0)


@dataclass
class SSAConfig:
    """Configuration of `SparseAttention` and of everything built from it.

    Attributes:
        d_model: model width; ``head_dim = d_model / num_heads``.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv (GQA; 1 = MQA). ``None`` = num_heads.
        num_neighbors: budget K: neighbor slots per query, all sources together.
        max_num_hashes: ceiling for the adaptive number of hash planes of the ``lsh`` source, 1 to 12.
        num_hash_rounds: independent hash rounds of the ``lsh`` source.
        lsh_num_probes: further buckets that each query looks into, per round.
        window_size: half-width of the window: keys ``[i - w, i + w]``, causal ``[i - w, i]``.
        num_global_tokens: leading keys that every query attends.
        global_token_indices: these keys instead of the leading ones; clamped to the sequence.
        dropout: probability of dropping an attention weight in training.
        causal: no key after its query (self-attention only).
        fp32_attn_weights: keep attention weights in float32 up to the product with the values, where a backend would
            round them to the dtype of the values (``numba`` never does).
        sources: the source mix, an ordered mapping from source name to its options. ``None`` builds it from the flat
            fields above: self, window, global, lsh.
        graph_heads: one graph per query head, or one shared by a KV group (routed by the group's mean query).
        backend: ``"auto"`` or the name of one implementation, which then serves the call or raises.
        dense_below: ``None`` computes densely only where the graph would hold every allowed key anyway; a number
            computes densely for fewer keys than that; ``"auto"`` wherever dense attention is measured to be faster
            on this machine, so that the layer is never slower than dense (see `ssa_framework.crossover`), and on a
            cache for fewer keys than a fixed number for each kind of device; 0 never.
        seed: of everything random in the sources.
        rope_base: rotary position embedding of queries and keys in self-attention with this base (usually 10000.0);
            ``None`` leaves positions to the caller, as the original project does.
        layers: for single layers of a model, by index: ``"dense"``, or the fields in which they differ from this
            configuration (sources, budget, graph heads, backend, ``dense_below``, seed, ``fp32_attn_weights``, audit).
            Models honour it; where there is one layer only, take `for_layer`.
        audit: estimate while it runs how much attention mass the graph misses: ``True``, or options of
            `AuditOptions` as a mapping; ``None`` = no.
    """

    d_model: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None
    num_neighbors: int = 128
    max_num_hashes: int = 12
    num_hash_rounds: int = 8
    lsh_num_probes: int = 0
    window_size: int = 8
    num_global_tokens: int = 2
    global_token_indices: Sequence[int] | None = None
    dropout: float = 0.0
    causal: bool = False
    fp32_attn_weights: bool = False
    sources: Mapping[str, Mapping[str, Any]] | None = None
    graph_heads: Literal["query", "kv"] = "query"
    backend: str = "auto"
    dense_below: int | Literal["auto"] | None = None
    seed: int = 0
    rope_base: float | None = None
    layers: Mapping[int, Mapping[str, Any] | Literal["dense"]] | None = None
    audit: Mapping[str, Any] | bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, Mapping):
            self.layers = {_index(i): fields_of_layer for i, fields_of_layer in self.layers.items()}
        self.validate()

    def validate(self) -> None:
        """Check every field, and the fields against each other.

        Raises:
            ConfigError: names the field, what it must be and what came.
        """
        for name in ("d_model", "num_heads", "num_neighbors", "num_hash_rounds"):
            _require_int(name, getattr(self, name), 1)
        for name in ("lsh_num_probes", "window_size", "num_global_tokens", "seed"):
            _require_int(name, getattr(self, name), 0)
        _require_int("max_num_hashes", self.max_num_hashes, 1, 12)
        if self.num_kv_heads is not None:
            _require_int("num_kv_heads", self.num_kv_heads, 1)
        if isinstance(self.dense_below, str) and self.dense_below != "auto":
            raise ConfigError(f"dense_below must be an integer >= 0, 'auto' or None, got {self.dense_below!r}")
        if self.dense_below is not None and not isinstance(self.dense_below, str):
            _require_int("dense_below", self.dense_below, 0)
        if self.d_model % self.num_heads:
            raise ConfigError(f"d_model ({self.d_model}) must be divisible by num_heads ({self.num_heads})")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.kv_heads})")
        if isinstance(self.dropout, bool) or not 0.0 <= float(self.dropout) < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        if self.graph_heads not in ("query", "kv"):
            raise ConfigError(f"graph_heads must be 'query' or 'kv', got {self.graph_heads!r}")
        if not isinstance(self.backend, str):
            raise ConfigError(f"backend must be a name, got {self.backend!r}")
        if self.rope_base is not None:
            if not float(self.rope_base) > 1.0:
                raise ConfigError(f"rope_base must be greater than 1, or None, got {self.rope_base!r}")
            if self.head_dim % 2:
                raise ConfigError(f"rope_base needs an even head dim, got d_model / num_heads = {self.head_dim}")
        if self.global_token_indices is not None:
            for index in self.global_token_indices:
                _require_int("global_token_indices", index, 0)
        self._validate_audit()
        self._validate_sources()
        self._validate_layers()

    def _validate_sources(self) -> None:
        if self.sources is None:
            return
        if not isinstance(self.sources, Mapping) or not self.sources:
            raise ConfigError(f"sources must be a non-empty mapping from source name to options, got {self.sources!r}")
        for name, options in self.sources.items():
            if not isinstance(name, str) or not isinstance(options, Mapping):
                raise ConfigError(f"sources[{name!r}] must map option names to values, got {options!r}")
        defaults = {f.name: f.default for f in fields(self)}
        for name in _FLAT_SOURCE_FIELDS:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no effect beside sources; write it as an option of the source"
                )

    def _validate_audit(self) -> None:
        if self.audit is not None and not isinstance(self.audit, bool | Mapping):
            raise ConfigError(f"audit must be True, a mapping of its options, or None, got {self.audit!r}")
        known = [f.name for f in fields(AuditOptions)]
        unknown = [name for name in self.audit if name not in known] if isinstance(self.audit, Mapping) else []
        if unknown:
            raise ConfigError(f"audit has no option {', '.join(map(repr, unknown))}; its options: {', '.join(known)}")
        _ = self.audit_options

    @property
    def audit_options(self) -> AuditOptions | None:
        """`audit` with its defaults; ``None`` where nothing is audited."""
        if self.audit is None or self.audit is False:
            return None
        return AuditOptions() if self.audit is True else AuditOptions(**self.audit)

    def _validate_layers(self) -> None:
        if self.layers is None:
            return
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ConfigError(f"layers must be a non-empty mapping from layer index to fields, got {self.layers!r}")
        for index, fields_of_layer in self.layers.items():
            _require_int("layers: an index", index, 0)
            if fields_of_layer == "dense":
                continue
            if not isinstance(fields_of_layer, Mapping):
                raise ConfigError(f"layers[{index}] must be 'dense' or a mapping of fields, got {fields_of_layer!r}")
            unknown = [name for name in fields_of_layer if name not in _LAYER_FIELDS]
            if unknown:
                raise ConfigError(
                    f"layers[{index}] cannot differ in {', '.join(map(repr, unknown))}; it can in "
                    f"{', '.join(_LAYER_FIELDS)}"
                )
            try:
                self.for_layer(index)
            except ConfigError as error:
                raise ConfigError(f"layers[{index}]: {error}") from error

    def for_layer(self, index: int) -> SSAConfig:
        """The configuration of one layer of a model, without `layers`. One that is dense computes densely whatever
        the length."""
        if self.layers is None:
            return self
        own = self.layers.get(index, {})
        if isinstance(own, str):
            return replace(self, layers=None, dense_below=_ALWAYS_DENSE)
        return replace(self, **{**own, "layers": None})

    def of_every_layer(self) -> list[SSAConfig]:
        """This configuration without `layers`, for those that they don't name, and that of each layer that they do."""
        if self.layers is None:
            return [self]
        return [replace(self, layers=None), *(self.for_layer(index) for index in self.layers)]

    @property
    def is_dense(self) -> bool:
        """Whether it computes densely whatever the length, as `for_layer` says of a dense layer."""
        return self.dense_below == _ALWAYS_DENSE

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SSAConfig:
        """A configuration that was chosen by measurement: ``"quality"``, ``"balanced"`` or ``"fast"``.

        All of them route by clusters with summaries, attend to the first four tokens, and compute densely where that
        is faster (``dense_below="auto"``). They differ in how many keys a query looks at.

        Args:
            name: of the preset. changes: fields that are not of the preset, such as ``d_model`` and ``causal``, or
                other values for those that are.

        Raises:
            ConfigError: no preset of that name, and whatever `validate` finds.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**({"sources": preset_sources(name), "dense_below": "auto"} | changes))

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def source_mix(self) -> dict[str, dict[str, Any]]:
        """The sources in their order with their options: `sources`, or what the flat fields say."""
        if self.sources is not None:
            return {name: dict(options) for name, options in self.sources.items()}
        tokens: dict[str, Any] = {"tokens": self.num_global_tokens}
        if self.global_token_indices is not None:
            tokens = {"indices": list(self.global_token_indices)}
        return {
            "self": {},
            "window": {"size": self.window_size},
            "global": tokens,
            "lsh": {
                "rounds": self.num_hash_rounds,
                "probes": self.lsh_num_probes,
                "max_planes": self.max_num_hashes,
            },
        }

    def replace(self, **changes: Any) -> SSAConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SSAConfig:
        """Raises `ConfigError` for a field that does not exist, and lists those that do."""
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(f"unknown configuration field {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        return cls(**values)

    def to_json(self, path: str | Path | None = None) -> str:
        """The configuration as JSON, also written to ``path`` if given. Source options must be JSON values."""
        try:
            text = json.dumps(self.to_dict(), indent=2)
        except TypeError as error:
            raise ConfigError(f"only JSON values can be written: {error}") from error
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> SSAConfig:
        """Read a configuration from a JSON text or file. Nothing in it is executed."""
        text = str(text_or_path)
        if isinstance(text_or_path, Path) or not text.lstrip().startswith("{"):
            text = Path(text_or_path).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON configuration: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"a JSON configuration is an object, got {type(values).__name__}")
        return cls.from_dict(values)


def _index(index: Any) -> Any:
    """``"3"`` as 3: JSON has no integers for keys."""
    return int(index) if isinstance(index, str) and index.isdecimal() else index


def _require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ConfigError(f"{name} must be an integer {wanted}, got {value!r}")
