"""Routing and attention as `torch.compile` and `torch.export` see them: ops of tensors, numbers and text.

What a graph consists of depends on the data: which parts there are, and how long they are. So a compiled program does
not look inside. In inference, routing and attention together are one op, whose result has the shape of the queries.
Where gradients are asked for they are two, and the graph passes from one to the other, and on to the backward op, as
flat tensors of unknown length.

Everything else that a call says is one text, a Python literal, in which ``{i}`` stands for the i-th tensor of a list.
"""

from __future__ import annotations

import ast
import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from ssa_framework.config import SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.graph import NeighborGraph
from ssa_framework.masks import EdgeMask, add_key_bias, make_edge_mask, split_key_bias
from ssa_framework.ops.neighbor_attention import neighbor_attention
from ssa_framework.proposals import Band, Ranges, Spans, Summaries
from ssa_framework.registry import default_registry
from ssa_framework.router import Router, find_router
from ssa_framework.router_cache import functional_router
from ssa_framework.source import in_program

_PARTS = (
    "neighbors", "columns", "span_start", "span_end", "slice_order", "slice_start", "slice_end",
    "members", "first", "stop", "opened",
)  # fmt: skip
_DIMS = 5
_NUMBERS = ("graph_heads", "before", "after", "count")
_HEADER = len(_NUMBERS) + len(_PARTS) * (_DIMS + 1)
_CONFIG_FIELDS = tuple(f.name for f in fields(SSAConfig))
_RESTORED_ROUTERS = 256
_restored: OrderedDict[tuple[Any, ...], Router] = OrderedDict()
_restored_lock = threading.Lock()


@dataclass(frozen=True)
class AttentionCall:
    """What a layer says of one call, beside queries, keys and values.

    Attributes:
        causal, two_dims, query_positions, key_padding_mask, segment_ids, attn_mask: as in `make_edge_mask`.
        key_bias: floating point ``[B, M]``, added to the scores of a key; usually 0 and -inf.
        cross: as in `ssa_framework.build_graph`; ``None`` = by the lengths.
        source_inputs: per source name, tensors and plain data.
        scale, dropout_p, fp32_weights, backend, dense: as in `neighbor_attention`.
    """

    causal: bool
    two_dims: Literal["queries", "unambiguous"] = "queries"
    query_positions: Tensor | None = None
    key_padding_mask: Tensor | None = None
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None
    attn_mask: Tensor | None = None
    key_bias: Tensor | None = None
    cross: bool | None = False
    source_inputs: Mapping[str, Any] | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    fp32_weights: bool = False
    backend: str = "auto"
    dense: bool = True


@dataclass(frozen=True)
class RoutedGraph:
    """A neighbor graph inside of a compiled program: flat tensors, and the text of the call that routed.

    It fits the queries, keys and masks of that call.
    """

    parts: list[Tensor]
    tensors: list[Tensor]
    attn_mask: Tensor | None
    text: str


_MASKS = ("query_positions", "key_padding_mask", "segment_ids", "source_inputs")


def serves(graph_options: Mapping[str, Any]) -> bool:
    """Whether everything that a call says beside masks of tensors can be part of a compiled program."""
    return all(name in _MASKS or name == "cross" or value is None for name, value in graph_options.items())


def mask_options(graph_options: Mapping[str, Any]) -> dict[str, Any]:
    """What `AttentionCall` takes of the options of a call that is served."""
    return {name: graph_options[name] for name in _MASKS if name in graph_options}


def attend(router: Router | SSAConfig, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Route and attend; to be traced.

    Args:
        router: a layer's own, or the configuration of a call without a layer.
        q: ``[B, H, N, D]``. k: ``[B, Hkv, M, D]``. v: ``[B, Hkv, M, Dv]``.

    Returns: ``[B, H, N, Dv]``.

    Raises:
        ConfigError: what cannot be part of a compiled program, by name.
    """
    if _needs_grad(q, k, v, call.attn_mask):
        return apply_graph(q, k, v, route(router, q, k, call), call)
    tensors: list[Tensor] = []
    handle, text = _text(router, tensors, call, training=False)
    out: Tensor = _routed_attention(
        q, k, v, call.attn_mask, tensors, handle, text, _seed(call), call.scale, call.dropout_p, call.fp32_weights,
        call.backend, call.dense,
    )  # fmt: skip
    return out


def route(router: Router | SSAConfig, q: Tensor, k: Tensor, call: AttentionCall) -> RoutedGraph:
    """The graph of ``q [B, H, N, D]`` and ``k [B, Hkv, M, D]``; to be traced. Raises as `attend`."""
    tensors: list[Tensor] = []
    handle, text = _text(router, tensors, call, training=_needs_grad(q, k))
    attn_mask = None if call.attn_mask is None else call.attn_mask.detach()
    parts = _route(q.detach(), k.detach(), attn_mask, tensors, handle, text)
    return RoutedGraph(parts, tensors, call.attn_mask, text)


def apply_graph(q: Tensor, k: Tensor, v: Tensor, graph: RoutedGraph, call: AttentionCall) -> Tensor:
    """Attention over a graph that was routed in the same program: ``[B, H, N, Dv]``; to be traced."""
    out, _ = _attend_routed(
        q, k, v, graph.attn_mask, graph.tensors, graph.parts, graph.text, _seed(call), call.scale, call.dropout_p,
        call.fp32_weights, call.backend, call.dense,
    )  # fmt: skip
    return out


def _needs_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled() or _is_exporting():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def _is_exporting() -> bool:
    """`torch.compiler.is_exporting`; that function itself is true in every program that torch 2.11 traces."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def _seed(call: AttentionCall) -> Tensor | None:
    """Of dropout. The program draws it, not the op, so that a forward pass that is recomputed gets it again."""
    return torch.randint(2**62, (1,)) if call.dropout_p > 0.0 else None


# -- what a call says, as text ---------------------------------------------------------------------------------------


def _text(
    router: Router | SSAConfig, tensors: list[Tensor], call: AttentionCall, training: bool
) -> tuple[Tensor | None, str]:
    """The handle of the router, if it has one, and the call as text, whose tensors go into ``tensors``."""
    segments = call.segment_ids
    said = {
        "causal": call.causal,
        "cross": call.cross,
        "two_dims": call.two_dims,
        "query_positions": call.query_positions,
        "key_padding_mask": call.key_padding_mask,
        "key_bias": call.key_bias,
        "segment_ids": segments,
        "source_inputs": call.source_inputs,
        "training": training,
        "config": None,
        "state": None,
    }
    handle = None
    config = router if isinstance(router, SSAConfig) else router.config
    if config.audit is not None:
        raise ConfigError(
            "a compiled program is not audited; leave audit=... out of the configuration, or do not compile"
        )
    if isinstance(router, SSAConfig):
        said["config"] = {name: getattr(router, name) for name in _CONFIG_FIELDS}
    else:
        if router.learning:
            raise ConfigError(
                f"source {router.learning[0]!r} learns, and no gradient can reach it in a compiled program; leave the "
                f"layer out of compilation (torch.compiler.disable), or use another source"
            )
        if _is_exporting():
            if router.registry is not default_registry():
                raise ConfigError(
                    "a layer with a registry of its own cannot be exported: the process that loads the program looks "
                    "its sources up in the default registry; register them with ssa_framework.register_source"
                )
            said["config"] = {name: getattr(router.config, name) for name in _CONFIG_FIELDS}
            said["state"] = router.source_state()
        else:
            handle = router.handle
    return handle, _literal(said, tensors)


def _literal(value: Any, tensors: list[Tensor]) -> str:
    """Plain data as a Python literal; its tensors are appended to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return "{" + str(len(tensors) - 1) + "}"
    if isinstance(value, Mapping):
        return "{" + "".join([f"{name!r}: {_literal(x, tensors)}, " for name, x in value.items()]) + "}"
    if isinstance(value, tuple):
        return "(" + "".join([_literal(x, tensors) + ", " for x in value]) + ")"
    if isinstance(value, (list, range)):
        return "[" + "".join([_literal(x, tensors) + ", " for x in value]) + "]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = guard_scalar(value)  # the tracer may take it for a variable
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    raise ConfigError(
        f"a {type(value).__name__} cannot be part of a compiled program; source options and source_inputs must be "
        f"tensors, finite numbers, strings, lists, tuples and mappings there"
    )


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> dict[str, Any]:
    said: dict[str, Any] = ast.literal_eval(text)
    return said


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `_literal`, once the text is parsed."""
    if isinstance(value, set):
        (place,) = value
        return tensors[place]
    if isinstance(value, dict):
        return {name: _filled(x, tensors) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(x, tensors) for x in value)
    return value


def _edge_mask(q: Tensor, k: Tensor, attn_mask: Tensor | None, said: Mapping[str, Any]) -> EdgeMask:
    keep, bias = said["key_padding_mask"], None
    if said["key_bias"] is not None:
        keep, bias = split_key_bias(said["key_bias"])
    return make_edge_mask(
        batch=q.shape[0],
        heads=q.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        device=q.device,
        causal=said["causal"],
        query_positions=said["query_positions"],
        attn_mask=add_key_bias(attn_mask, bias),
        key_padding_mask=keep,
        segment_ids=said["segment_ids"],
        two_dims=said["two_dims"],
    )


def _router(handle: Tensor | None, text: str, said: Mapping[str, Any], q: Tensor, k: Tensor) -> Router:
    if handle is not None:
        return find_router(handle)
    if said["state"] is None:
        return functional_router(SSAConfig.from_dict(said["config"]), q, k, said["causal"], None)
    addresses = [x.data_ptr() for x in _tensors_of((said["config"], said["state"]))]
    key = text, str(q.device), *addresses
    with _restored_lock:
        if key in _restored:
            _restored.move_to_end(key)
            return _restored[key]
    router = Router(SSAConfig.from_dict(said["config"])).to(q.device).eval()
    router.set_source_state(said["state"])
    with _restored_lock:
        _restored[key] = router  # holds the tensors, so that no others can have their addresses
        while len(_restored) > _RESTORED_ROUTERS:
            _restored.popitem(last=False)
    return router


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_of(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors_of(x)


def _build(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, tensors: Sequence[Tensor], handle: Tensor | None, text: str
) -> NeighborGraph:
    said = _filled(_parsed(text), tensors)
    cross = said["cross"]
    if cross is None:
        cross = q.shape[2] != k.shape[2] and not said["causal"] and said["query_positions"] is None
    router = _router(handle, text, said, q, k)
    mask = _edge_mask(q, k, attn_mask, said)
    with in_program(), _autograd() if said["training"] else nullcontext():
        if said["training"]:  # what "auto" measures, it measures with the backward pass
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        graph: NeighborGraph = router(q, k, mask, cross=cross, source_inputs=said["source_inputs"])
    return graph


# -- a graph as flat tensors -----------------------------------------------------------------------------------------


def pack(graph: NeighborGraph) -> list[Tensor]:
    """A graph as tensors: an int64 header on the CPU, and one flat int32 tensor for each part that it might have.

    None of them shares memory with another, with an input of the program or with what the framework keeps.
    """
    spans, slices, summaries = graph.spans, graph.slices, graph.summaries
    parts = {
        "neighbors": graph.neighbors,
        "columns": graph.columns,
        "span_start": None if spans is None else spans.start,
        "span_end": None if spans is None else spans.end,
        "slice_order": None if slices is None else slices.order,
        "slice_start": None if slices is None else slices.start,
        "slice_end": None if slices is None else slices.end,
        "members": None if summaries is None else summaries.members,
        "first": None if summaries is None else summaries.first,
        "stop": None if summaries is None else summaries.stop,
        "opened": None if summaries is None else summaries.opened,
    }
    band = graph.band
    before, after = (-1, -1) if band is None else (band.before, band.after)
    header = [graph.graph_heads, before, after, 0 if summaries is None else summaries.count]
    flat = []
    for name in _PARTS:
        part = parts[name]
        if part is None:
            header += [-1] * (_DIMS + 1)
            flat.append(torch.empty(0, dtype=torch.int32, device=graph.device))
            continue
        header += [part.dim(), *part.shape, *([0] * (_DIMS - part.dim()))]
        owned = name == "neighbors" and part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
        flat.append(part.view(-1) if owned else part.clone(memory_format=torch.contiguous_format).view(-1))
    return [torch.tensor(header, dtype=torch.int64), *flat]


def unpack(parts: Sequence[Tensor], q: Tensor, k: Tensor, mask: EdgeMask) -> NeighborGraph:
    """The inverse of `pack`, for ``q [B, H, N, D]`` and ``k [B, Hkv, M, D]``."""
    header: list[int] = parts[0].tolist()
    graph_heads, before, after, count = header[: len(_NUMBERS)]
    found: dict[str, Tensor | None] = {}
    for i, name in enumerate(_PARTS):
        dims, *shape = header[len(_NUMBERS) + i * (_DIMS + 1) :][: _DIMS + 1]
        found[name] = None if dims < 0 else parts[i + 1].view(shape[:dims])
    start, end = found["span_start"], found["span_end"]
    members, first, stop = found["members"], found["first"], found["stop"]
    summaries = None
    if members is not None and first is not None and stop is not None:
        summaries = Summaries(members, count, first, stop, found["opened"])
    return NeighborGraph(
        batch=q.shape[0],
        num_heads=q.shape[1],
        graph_heads=graph_heads,
        num_keys=k.shape[2],
        mask=mask,
        band=None if before < 0 else Band(before, after),
        columns=found["columns"],
        neighbors=found["neighbors"],
        spans=None if start is None or end is None else Spans(start, end),
        slices=None
        if found["slice_start"] is None
        else Ranges(found["slice_order"], found["slice_start"], found["slice_end"], attend="all"),
        summaries=summaries,
    )


@contextmanager
def _autograd() -> Iterator[None]:
    """Inside of an op, where torch turns autograd off: turn it on."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradNestedTensor", "AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


@contextmanager
def _drawn_from(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Dropout as this seed says, whatever was drawn before."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(int(seed))
        yield


# -- the ops ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("ssa_framework::routed_attention", mutates_args=())
def _routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    tensors: Sequence[Tensor],
    handle: Tensor | None,
    text: str,
    seed: Tensor | None,
    scale: float | None,
    dropout_p: float,
    fp32_weights: bool,
    backend: str,
    dense: bool,
) -> Tensor:
    graph = _build(q, k, attn_mask, tensors, handle, text)
    with _drawn_from(seed, q.device):
        out, _ = neighbor_attention(
            q, k, v, graph, scale=scale, dropout_p=dropout_p, fp32_weights=fp32_weights, backend=backend, dense=dense
        )
    return out.contiguous()


@torch.library.custom_op("ssa_framework::route", mutates_args=())
def _route(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, tensors: Sequence[Tensor], handle: Tensor | None, text: str
) -> list[Tensor]:
    return pack(_build(q, k, attn_mask, tensors, handle, text))


@torch.library.custom_op("ssa_framework::attend_routed", mutates_args=())
def _attend_routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    tensors: Sequence[Tensor],
    parts: Sequence[Tensor],
    text: str,
    seed: Tensor | None,
    scale: float | None,
    dropout_p: float,
    fp32_weights: bool,
    backend: str,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    mask = _edge_mask(q, k, attn_mask, _filled(_parsed(text), tensors))
    with _drawn_from(seed, q.device):
        out, lse = neighbor_attention(
            q, k, v, unpack(parts, q, k, mask),
            scale=scale, dropout_p=dropout_p, fp32_weights=fp32_weights, backend=backend, dense=dense,
        )  # fmt: skip
    if lse is None:
        lse = q.new_zeros(q.shape[:-1], dtype=_compute_dtype(q))
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("ssa_framework::attend_routed_backward", mutates_args=())
def _attend_routed_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    tensors: Sequence[Tensor],
    parts: Sequence[Tensor],
    text: str,
    seed: Tensor | None,
    scale: float | None,
    dropout_p: float,
    fp32_weights: bool,
    backend: str,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    additive = attn_mask is not None and attn_mask.is_floating_point()
    inputs = (q, k, v, attn_mask) if additive else (q, k, v)
    grads: tuple[Tensor | None, ...] = (None,) * len(inputs)
    with _autograd(), _drawn_from(seed, q.device):
        leaves = [x.detach().requires_grad_() for x in inputs if x is not None]
        mask = _edge_mask(q, k, leaves[3] if additive else attn_mask, _filled(_parsed(text), tensors))
        graph = unpack(parts, q, k, mask)
        again, _ = neighbor_attention(
            leaves[0], leaves[1], leaves[2], graph,
            scale=scale, dropout_p=dropout_p, fp32_weights=fp32_weights, backend=backend, dense=dense, known=(out, lse),
        )  # fmt: skip
        if again.requires_grad:
            grads = torch.autograd.grad(again, leaves, grad_out, allow_unused=True)
    made = [torch.zeros_like(x) if grad is None else grad.contiguous() for x, grad in zip(leaves, grads, strict=True)]
    if not additive:
        made.append(q.new_empty(0))
    return made[0], made[1], made[2], made[3]


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@_routed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@_route.register_fake
def _(q: Tensor, *args: Any) -> list[Tensor]:
    context = torch.library.get_ctx()
    header = torch.empty(_HEADER, dtype=torch.int64)
    return [header, *(q.new_empty(context.new_dynamic_size(), dtype=torch.int32) for _ in _PARTS)]


@_attend_routed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=_compute_dtype(q))


@_attend_routed_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attn_mask: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    additive = attn_mask is not None and attn_mask.is_floating_point()
    bias = attn_mask.new_empty(attn_mask.shape) if attn_mask is not None and additive else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, attn_mask, tensors, parts, text, seed, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, attn_mask, seed, *tensors, *parts)
    ctx.said = text, len(tensors), options


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, attn_mask, seed, *rest = ctx.saved_tensors
    text, count, options = ctx.said
    tensors, parts = list(rest[:count]), list(rest[count:])
    *grads, bias = _attend_routed_backward(
        grad_out, q, k, v, out, lse, attn_mask, tensors, parts, text, seed, *options
    )  # fmt: skip
    bias = bias if attn_mask is not None and attn_mask.is_floating_point() else None
    return *grads, bias, [None] * count, [None] * len(parts), None, None, *([None] * len(options))


_attend_routed.register_autograd(_backward, setup_context=_setup_context)
