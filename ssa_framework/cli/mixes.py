"""Source mixes on the command line: a name, a JSON object, ``NAME={...}``, or a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from ssa_framework.config import SSAConfig
from ssa_framework.errors import SSAError
from ssa_framework.presets import PRESETS

_FIXED: dict[str, dict[str, Any]] = {"self": {}, "window": {"size": 8}, "global": {"tokens": 2}}
_WIDER: dict[str, dict[str, Any]] = {"self": {}, "window": {"size": 16}, "global": {"tokens": 4}}
_THOROUGH = {"hash": "cross_polytope", "rounds": 12, "probes": 3, "candidates": 160, "max_planes": 7, "limit": 38}
_INDICES: dict[str, dict[str, Any]] = {
    "faiss-flat": {"index": "Flat"},
    "faiss-ivf": {"index": "IVF128,Flat", "nprobe": 8, "train_size": 1024},
    "faiss-hnsw": {"index": "HNSW32", "ef_search": 64},
    "faiss-pq": {"index": "PQ16", "train_size": 1024},
}
MIXES: dict[str, SSAConfig] = {
    "seed": SSAConfig(),
    "lsh-cross-polytope": SSAConfig(sources={**_FIXED, "lsh": {"hash": "cross_polytope"}}),
    **{name: SSAConfig(sources={**_WIDER, "faiss": options}) for name, options in _INDICES.items()},
    "lsh-thorough": SSAConfig(sources={**_WIDER, "lsh": _THOROUGH}),
    **{name: SSAConfig.preset(name) for name in PRESETS},
    "topk": SSAConfig(sources={"topk": {}}),
    "window": SSAConfig(sources={"self": {}, "window": {"size": 63}}),
}
"""Built-in mixes by name: the original project's default, the same with the better hash, the index types of faiss that
people use, the settings that find most on a real model for about 1,000 keys scored by hashing, the presets, exact
search, and no content."""

MIX_HELP = (
    f"Source mix: {', '.join(MIXES)}; or a JSON object of sources and their options, or of the fields of an SSAConfig; "
    f"or NAME={{...}} with such an object; or the path of a JSON SSAConfig. Repeatable."
)

_CONFIG_FIELDS = {field.name for field in fields(SSAConfig)}


def parse_mixes(texts: Sequence[str], option: str = "--mix") -> dict[str, SSAConfig]:
    """Mixes by short name, or by the text itself where short names repeat.

    Args:
        texts: each the name of one of `MIXES`; a JSON object, of sources and their options or of the fields of an
            `SSAConfig`; ``NAME={...}`` with such an object; or the path of a JSON `SSAConfig`.
        option: that the texts come from, for messages.

    Raises:
        typer.BadParameter: a text that is none of these, or a configuration that is wrong in itself.
    """
    parsed = [(text, *_parse(text, option)) for text in dict.fromkeys(texts)]
    count = Counter(name for _, name, _ in parsed)
    return {name if count[name] == 1 else text: config for text, name, config in parsed}


def _parse(text: str, option: str) -> tuple[str, SSAConfig]:
    """Short name and configuration."""
    if text in MIXES:
        return text, MIXES[text]
    try:
        name, json_text = _split(text)
        if json_text is not None:
            config = _from_object(json.loads(json_text))
            return name or describe(config.source_mix), config
        path = Path(text)
        if path.is_file():
            return path.stem, SSAConfig.from_json(path)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint=option) from error
    except (SSAError, TypeError, UnicodeDecodeError, OSError) as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint=option) from error
    raise typer.BadParameter(
        f"{text!r} is neither a built-in mix ({', '.join(MIXES)}), nor a JSON object of sources such as "
        f'{{"window": {{"size": 8}}}}, alone or as NAME={{...}}, nor a file with a JSON SSAConfig',
        param_hint=option,
    )


def _split(text: str) -> tuple[str, str | None]:
    """``NAME={...}`` or ``{...}`` as name and object; no object where the text is neither."""
    head, brace, _ = text.partition("{")
    name = head.strip()
    if not brace or (name and not name.endswith("=")):
        return text, None
    return name.removesuffix("=").strip(), text[len(head) :]


def _from_object(values: dict[str, Any]) -> SSAConfig:
    """Of configuration fields if one of them is among the names, of sources otherwise."""
    return SSAConfig.from_dict(values) if _CONFIG_FIELDS & values.keys() else SSAConfig(sources=values)


def describe(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """A mix in one line, such as ``self + window(size=8)``."""
    options = {name: ", ".join(f"{option}={value}" for option, value in o.items()) for name, o in sources.items()}
    return " + ".join(f"{name}({text})" if text else name for name, text in options.items())


def configured(config: Mapping[str, Any]) -> str:
    """What of a configuration, as `SSAConfig.to_dict` gives it, decides what is found, as JSON."""
    whole = SSAConfig.from_dict(config)
    chosen = {"num_neighbors": whole.num_neighbors, "sources": whole.source_mix, "graph_heads": whole.graph_heads}
    layers = {} if whole.layers is None else {"layers": whole.layers}
    return json.dumps({**chosen, "seed": whole.seed, **layers}, default=repr)
