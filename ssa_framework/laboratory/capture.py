"""Queries, keys and values to look at: of the layers of a model, from a folder, or made up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssa_framework.errors import ConfigError, MaskError, MissingExtraError, ShapeError
from ssa_framework.ops.neighbor_attention.api import check_tensors

IMPLEMENTATION = "ssa_laboratory"
"""The name under which transformers knows the attention that captures."""


@dataclass(frozen=True)
class LayerTensors:
    """What the attention of one layer gets: position embeddings are in it already.

    Attributes:
        layer: its index.
        q: ``[B, H, N, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``.
        scale: of the scores; ``None`` = ``1 / sqrt(D)``.
        causal: no key after its query.

    Raises:
        ShapeError, DtypeError: tensors that do not fit together, or no query at all.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        check_tensors(self.q, self.k, self.v)
        if self.q.shape[2] != self.k.shape[2] or not self.q.shape[0] * self.q.shape[2]:
            raise ShapeError(
                f"layer {self.layer}: expected as many queries as keys, at least one of each, got q "
                f"{list(self.q.shape)} and k {list(self.k.shape)}"
            )

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def require_finite(self) -> None:
        """Raise `ConfigError` where a number is NaN or infinite: no figure would mean anything."""
        wrong = [name for name in "qkv" if not bool(getattr(self, name).isfinite().all())]
        if wrong:
            raise ConfigError(f"layer {self.layer}: {', '.join(wrong)} hold numbers that are not finite")


# -- of a model ------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Ends a forward pass after the last layer that is wanted."""


@dataclass
class _Capture:
    """``wanted``: layer index and causality by id of the attention module."""

    wanted: dict[int, tuple[int, bool]]
    consume: Callable[[LayerTensors], object]

    def take(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> None:
        if id(module) not in self.wanted:
            return
        index, causal = self.wanted.pop(id(module))
        if mask is not None:
            raise MaskError(
                f"layer {index} gets an attention mask of shape {list(mask.shape)}, which says more than causality; "
                f"only layers that attend all tokens, or all tokens before, can be captured"
            )
        self.consume(LayerTensors(index, q.detach(), k.detach(), v.detach(), scale, causal))
        if not self.wanted:
            raise _Enough


_active: ContextVar[_Capture | None] = ContextVar("ssa_laboratory_capture", default=None)


def capture_layers(
    model: Any,
    tokens: Tensor,
    consume: Callable[[LayerTensors], object],
    *,
    layers: Iterable[int] | None = None,
) -> None:
    """Run a model of transformers on tokens and hand over each layer's queries, keys and values as it gets there.

    The model computes dense attention, whatever it was set to, in eval mode and without gradients. Nothing is kept:
    memory is that of the forward pass, whose tensors ``consume`` must copy if it writes to them. The pass ends behind
    the last layer that is wanted.

    Args:
        model: any model of transformers that goes through `transformers.AttentionInterface`.
        tokens: int64 ``[B, N]``, without padding.
        consume: called with `LayerTensors`, in the order of the layers.
        layers: indices, negative ones count from the end; all layers that attend all tokens if left out.

    Raises:
        ConfigError: an index out of range, a layer with a sliding window, a model that computes something else than
            softmax attention, that has an encoder and a decoder, or that reads fewer tokens.
        MaskError: a layer with a mask of its own. MissingExtraError: transformers is not installed or too old.
    """
    from ssa_framework.integrations.transformers.modules import distinct_configs, self_attention

    if tokens.dim() != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        raise ShapeError(f"tokens must be integers [B, N], got {tokens.dtype} {list(tokens.shape)}")
    modules = self_attention(model)
    _check_length(modules[0].config, tokens.shape[1])
    chosen = {a.index: a for a in modules if a.index in set(choose_layers(model, layers))}
    capture = _Capture({id(a.module): (a.index, a.is_causal) for a in chosen.values()}, consume)
    token = _active.set(capture)
    try:
        with torch.no_grad(), _captured(distinct_configs(modules)), _evaluating(model):
            model.base_model(input_ids=tokens, use_cache=False)
    except _Enough:
        pass
    finally:
        _active.reset(token)


def choose_layers(model: Any, layers: Iterable[int] | None = None) -> tuple[int, ...]:
    """Which layers `capture_layers` would hand over, ascending; its `ConfigError` where it can't."""
    from ssa_framework.integrations.transformers.modules import self_attention

    modules = self_attention(model)
    indices = [attention.index for attention in modules]
    if len(set(indices)) < len(indices):
        raise ConfigError(
            f"{type(model).__name__} has several self-attention modules in one layer, as models with an encoder and a "
            f"decoder do; pass the encoder or the decoder alone"
        )
    local = {attention.index for attention in modules if attention.is_local}
    if layers is None:
        chosen = sorted(set(indices) - local)
        if not chosen:
            raise ConfigError(
                "every layer of this model attends a sliding window or chunks, so there is nothing to route"
            )
        return tuple(chosen)
    count = max(indices) + 1
    asked = list(layers)
    if not asked:
        raise ConfigError("no layers were asked for; leave layers out for all of them")
    for index in asked:
        known = isinstance(index, int) and not isinstance(index, bool) and -count <= index < count
        if not known or index % count not in indices:
            raise ConfigError(f"layer {index!r} does not exist; this model has layers 0 to {count - 1}")
        if index % count in local:
            raise ConfigError(f"layer {index} attends a sliding window or chunks, so there is nothing to route")
    return tuple(sorted({index % count for index in asked}))


def _check_length(config: Any, length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < length:
        raise ConfigError(f"the model reads up to {longest} tokens, got {length}; take a shorter length")


@contextmanager
def _captured(configs: list[Any]) -> Iterator[None]:
    """Sends attention through `_forward`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    previous = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = {"": IMPLEMENTATION}  # as a mapping: what it holds for other parts stays
        yield
    finally:
        for config, name in zip(configs, previous, strict=True):
            config._attn_implementation = {"": name}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` function, after the tensors were handed over."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    capture = _active.get()
    if capture is not None:
        capture.take(module, query, key, value, attention_mask, scaling)
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
    )
    return out, None


# -- in files --------------------------------------------------------------------------------------------------------

FileFormat = Literal["pt", "safetensors"]
_SUFFIXES = (".pt", ".safetensors")


def save_layer(layer: LayerTensors, folder: str | Path, *, file_format: FileFormat = "pt") -> Path:
    """Write one layer into a folder, which is made if missing; returns the file.

    Raises:
        ConfigError: another format. MissingExtraError: safetensors is not installed. OSError: it cannot be written.
    """
    path = Path(folder) / f"layer_{layer.layer:03d}.{file_format}"
    tensors = {"q": layer.q.contiguous(), "k": layer.k.contiguous(), "v": layer.v.contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if file_format == "pt":
        torch.save({**tensors, "layer": layer.layer, "scale": layer.scale, "causal": layer.causal}, path)
    elif file_format == "safetensors":
        _, save_file = _safetensors()
        scale = "" if layer.scale is None else repr(layer.scale)
        about = {"layer": str(layer.layer), "scale": scale, "causal": str(layer.causal).lower()}
        save_file(tensors, path, metadata=about)
    else:
        raise ConfigError(f"file_format must be 'pt' or 'safetensors', got {file_format!r}")
    return path


def load_layers(folder: str | Path, layers: Iterable[int] | None = None) -> Iterator[LayerTensors]:
    """The layers in a folder, one at a time, by file name.

    A file holds ``q [B, H, N, D]``, ``k`` and ``v [B, Hkv, N, D]``, or all of them without B; and, if it has them,
    ``scale``, ``causal`` (true if left out) and ``layer`` (if left out, the first number in the name of the file,
    or its place in the folder). ``*.pt`` holds them in a dict, ``*.safetensors`` the last three as metadata. Nothing
    in a file is executed.

    Args:
        layers: only these indices.

    Raises:
        ConfigError: no such files, a file that holds something else, or a layer that is in none of them.
        ShapeError, DtypeError: tensors that do not fit together.
    """
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in _SUFFIXES)
    if not files:
        raise ConfigError(f"{str(folder)!r} holds no captured layers: expected *.pt or *.safetensors files")
    wanted = None if layers is None else set(layers)
    found = set()
    for place, path in enumerate(files):
        about = _read(path)
        number = re.search(r"\d+", path.stem)
        index = int(about.get("layer", number.group() if number else place))
        if wanted is not None and index not in wanted:
            continue
        found.add(index)
        q, k, v = (about[name] if about[name].dim() == 4 else about[name][None] for name in "qkv")
        scale = about.get("scale")
        causal = str(about.get("causal", True)).lower() == "true"
        yield LayerTensors(index, q, k, v, None if scale in (None, "") else float(scale), causal)
    if wanted is not None and wanted - found:
        missing = ", ".join(map(str, sorted(wanted - found)))
        raise ConfigError(f"{str(folder)!r} holds no layer {missing}")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".pt":
            values = torch.load(path, weights_only=True, map_location="cpu")
        else:
            safe_open, _ = _safetensors()
            with safe_open(path, framework="pt") as file:
                values = dict(file.metadata() or {})
                values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, MissingExtraError):
        raise
    except Exception as error:
        raise ConfigError(f"{path}: not a file of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or not all(isinstance(values.get(name), Tensor) for name in "qkv"):
        held = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{path}: expected tensors q, k and v, got {held}")
    return values


def _safetensors() -> tuple[Callable[..., Any], Callable[..., None]]:
    """Its functions that open and save a file."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingExtraError("*.safetensors files need safetensors; run: pip install safetensors") from error
    return safe_open, save_file


# -- made up ---------------------------------------------------------------------------------------------------------


def synthetic_layer(
    kind: str,
    *,
    length: int = 8192,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    causal: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LayerTensors:
    """Queries, keys and values that no model made, as layer 0.

    Args:
        kind: ``"gaussian"``: independent normal numbers, in which there is nothing to find; no routing but an exact
            one does better than chance on them. ``"clustered"``: runs of 32 tokens share one of 64 topics, a normal
            vector that is added to their queries and keys, so that keys of a topic attract its queries wherever they
            stand.
        length: N. heads: H. kv_heads: Hkv, ``None`` = H. head_dim: D.
        seed: of the numbers.

    Raises:
        ConfigError: another kind, or a size below 1. ShapeError: heads that are no multiple of kv_heads.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    for name, size in (("length", length), ("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {size!r}")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, length, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    if kind == "clustered":
        topics = torch.randn(_TOPICS, head_dim, generator=generator)
        runs = torch.randint(_TOPICS, (-(-length // _RUN),), generator=generator)
        of_tokens = topics[runs.repeat_interleave(_RUN)[:length]]
        q, k = q + of_tokens, k + of_tokens
    elif kind != "gaussian":
        raise ConfigError(f"kind must be 'gaussian' or 'clustered', got {kind!r}")
    return LayerTensors(0, q.to(dtype), k.to(dtype), v.to(dtype), causal=causal)


_TOPICS, _RUN = 64, 32
