"""`convert`: make the attention of an existing torch model sparse, on the weights that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.multihead import SparseMultiheadAttention
from ssa_framework.registry import SourceRegistry

NameFilter = str | Iterable[str] | Callable[[str], bool]
"""Which modules: a pattern (as in `fnmatch`), several, or a predicate on the module's name."""


def convert(
    model: nn.Module,
    config: SSAConfig | None = None,
    *,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    registry: SourceRegistry | None = None,
) -> nn.Module:
    """Replace every `torch.nn.MultiheadAttention` in ``model`` by a `SparseMultiheadAttention`, in place.

    Parameters stay the very same objects (optimizers and tied weights go on working), and so do hooks, mode, device
    and dtype; a module that occurs in several places still does. Either everything is replaced or nothing.

    Args:
        model: any module; may be a `torch.nn.MultiheadAttention` itself.
        config: source mix and budget. Sizes and dropout are taken from each module.
        include: names of the modules to replace, as in ``model.named_modules()``; all if left out. A module with
            several names counts if one of them matches.
        exclude: names of modules to keep; wins over ``include``.
        registry: where source names are looked up.

    Returns:
        ``model``, or the new module if ``model`` was a `torch.nn.MultiheadAttention` itself.

    Raises:
        ConfigError: nothing to replace, or a module that can't be (the message names it).
    """
    names = _dense_attention(model)
    included, excluded = _predicate(include, default=True), _predicate(exclude, default=False)
    chosen = {
        module: places
        for module, places in names.items()
        if any(map(included, places)) and not any(map(excluded, places))
    }
    if not chosen:
        found = ", ".join(repr(name) for places in names.values() for name in places) or "none"
        raise ConfigError(
            f"nothing to convert in {type(model).__name__}: looked for torch.nn.MultiheadAttention modules that are "
            f"not sparse yet, found {found}, include={include!r}, exclude={exclude!r}"
        )
    replacements: dict[nn.Module, SparseMultiheadAttention] = {}
    for module, places in chosen.items():
        try:
            replacements[module] = SparseMultiheadAttention.from_dense(module, config, registry=registry)
        except ConfigError as error:
            raise ConfigError(f"can't convert {places[0]!r}: {error}; exclude it, or change it first") from error
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoder):
            _keep_padded(parent)
    return replacements.get(model, model)


def _dense_attention(model: nn.Module) -> dict[nn.MultiheadAttention, list[str]]:
    """The modules to look at, each with all of its names."""
    names: dict[nn.MultiheadAttention, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, SparseMultiheadAttention):
            names.setdefault(module, []).append(name)
    return names


def _predicate(wanted: NameFilter | None, *, default: bool) -> Callable[[str], bool]:
    if wanted is None:
        return lambda name: default
    if callable(wanted):
        return wanted
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _keep_padded(encoder: nn.TransformerEncoder) -> None:
    """Nested tensors are for torch's fused dense layers only; the encoder decides that once, when it is built."""
    if any(isinstance(module, SparseMultiheadAttention) for module in encoder.modules()):
        encoder.use_nested_tensor = False
