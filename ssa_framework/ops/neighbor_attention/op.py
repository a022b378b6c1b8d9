"""The op as torch sees it: `torch.ops.ssa_framework.neighbor_attention`, with a fake and an autograd rule.

Its arguments are plain tensors and numbers, so that it can be compiled and exported; `api` turns a graph into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention import torch_gather
from ssa_framework.ops.neighbor_attention.parts import GraphParts


def _torch() -> ModuleType:
    return torch_gather


def _numba() -> ModuleType:
    from ssa_framework.ops.neighbor_attention import numba_cpu  # Numba takes a moment to import

    return numba_cpu


def _triton() -> ModuleType:
    from ssa_framework.ops.neighbor_attention import triton_cuda  # Triton may not be installed

    return triton_cuda


IMPLEMENTATIONS: dict[str, Callable[[], ModuleType]] = {"numba": _numba, "torch": _torch, "triton": _triton}
"""Modules, loaded on first use, with a ``forward`` and a recomputing ``backward`` function."""


@torch.library.custom_op("ssa_framework::neighbor_attention", mutates_args=())
def neighbor_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    structure: Sequence[Tensor],
    present: int,
    band: Sequence[int],
    query_offset: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
    fp32_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    parts = GraphParts.of_structure(structure, present, bias, (summary_k, summary_v), band, query_offset, causal)
    return IMPLEMENTATIONS[backend]().forward(
        q, k, v, parts, scale=scale, dropout_p=dropout_p, seed=seed, fp32_weights=fp32_weights
    )


@torch.library.custom_op("ssa_framework::neighbor_attention_backward", mutates_args=())
def neighbor_attention_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    structure: Sequence[Tensor],
    present: int,
    band: Sequence[int],
    query_offset: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = GraphParts.of_structure(structure, present, bias, (summary_k, summary_v), band, query_offset, causal)
    return IMPLEMENTATIONS[backend]().backward(
        grad_out, grad_lse, q, k, v, out, lse, parts, scale=scale, dropout_p=dropout_p, seed=seed
    )


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@neighbor_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=_compute_dtype(q))


@neighbor_attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *optional: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    compute = _compute_dtype(q)
    # an output for each optional input, since an op cannot return None
    rest = [q.new_empty(() if x is None else x.shape, dtype=compute) for x in optional[:3]]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *rest


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, summary_k, summary_v, structure = inputs[:7]
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, bias, summary_k, summary_v, *structure)
    ctx.options = (*inputs[7:14], inputs[15])  # all but fp32_weights: the backward always computes in float32


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, *optional = ctx.saved_tensors
    optional, structure = optional[:3], optional[3:]
    grads = neighbor_attention_backward_op(
        grad_out, grad_lse, q, k, v, out, lse, *optional, structure, *ctx.options
    )  # fmt: skip
    rest = [None if x is None else grad.to(x.dtype) for x, grad in zip(optional, grads[3:], strict=True)]
    return *grads[:3], *rest, [None] * len(structure), *([None] * 9)


neighbor_attention_op.register_autograd(_backward, setup_context=_setup_context)


class _KnownResult(torch.autograd.Function):
    """The op where its result is there already: only the backward pass computes anything."""

    @staticmethod
    def forward(ctx: Any, known: tuple[Tensor, Tensor], *inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = known[0].detach(), known[1].detach()
        _setup_context(ctx, inputs, (out, lse))
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        gradients = _backward(ctx, grad_out, grad_lse)
        return None, *gradients[:6], None, *gradients[-9:]  # None for the list of tensors, not for each of them


def known_result(out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """``neighbor_attention_op(*inputs)``, which is known to be ``out`` and ``lse``: differentiable, not computed."""
    result: tuple[Tensor, Tensor] = _KnownResult.apply((out, lse), *inputs)
    return result
