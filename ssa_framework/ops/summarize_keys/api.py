"""`summarize_keys`: choose an implementation; the op as torch sees it."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssa_framework.ops.summarize_keys import torch_means


def summarize_keys(k: Tensor, v: Tensor, members: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values of groups of keys, and the logarithms of their sizes.

    With them as additional key, value and score, a group weighs as much as if all of its keys lay at their mean.

    Args:
        k: ``[B, Hkv, M, D]``. v: ``[B, Hkv, M, Dv]``; any floating dtype.
        members: int32 ``[B or 1, Hkv or 1, R, M]``, the groups of each key, one of each of R levels, below ``count``;
            -1 = none. A group is of one level.
        count: C, of all levels together.

    Returns:
        ``[B, Hkv, C, D]``, ``[B, Hkv, C, Dv]`` and ``[B, Hkv, C]``, float32, or float64 for float64; zeros, zeros and
        -inf for a group without keys. The first two are differentiable.
    """
    sizes = _sizes(members, count)
    log_sizes = sizes.to(torch.float64 if k.dtype == torch.float64 else torch.float32).log()
    log_sizes = log_sizes.expand(k.shape[0], k.shape[1], -1)
    order = _group_order(k, members, sizes)
    return group_means(k, members, sizes, order), group_means(v, members, sizes, order), log_sizes


def _sizes(members: Tensor, count: int) -> Tensor:
    """int32 ``[B or 1, Hkv or 1, C]``."""
    owner = torch.where(members < 0, count, members).flatten(2).long()
    sizes = torch.zeros((*members.shape[:2], count + 1), dtype=torch.int32, device=members.device)
    return sizes.scatter_add_(2, owner, torch.ones_like(owner, dtype=torch.int32))[..., :count]


def _triton() -> ModuleType | None:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    from ssa_framework.ops.summarize_keys import triton_cuda  # Triton takes a moment to import

    return triton_cuda


def _group_order(x: Tensor, members: Tensor, sizes: Tensor) -> Tensor | None:
    """What the CUDA kernels need of the groups, once for keys and values."""
    triton_cuda = _triton() if x.is_cuda else None
    return None if triton_cuda is None or not triton_cuda.serves(x) else triton_cuda.group_order(members, sizes)


def _implementation(x: Tensor) -> ModuleType:
    if x.device.type != "cpu":
        return torch_means
    from ssa_framework.ops.summarize_keys import numba_cpu  # Numba takes a moment to import

    return numba_cpu


@torch.library.custom_op("ssa_framework::group_means", mutates_args=())
def group_means(x: Tensor, members: Tensor, sizes: Tensor, order: Tensor | None = None) -> Tensor:
    """See `summarize_keys`; ``order``: the keys group by group, where the kernels of the device want it."""
    triton_cuda = None if order is None else _triton()
    if order is not None and triton_cuda is not None and triton_cuda.serves(x):
        means: Tensor = triton_cuda.means(x, members, sizes, order)
    else:
        means = _implementation(x).means(x, members, sizes)
    return means


@torch.library.custom_op("ssa_framework::group_means_backward", mutates_args=())
def _group_means_backward(grad: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    triton_cuda = _triton() if grad.is_cuda else None
    module = triton_cuda if triton_cuda is not None and triton_cuda.serves(grad) else _implementation(grad)
    spread: Tensor = module.spread(grad, members, sizes)
    return spread


@group_means.register_fake
def _(x: Tensor, members: Tensor, sizes: Tensor, order: Tensor | None = None) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((*x.shape[:2], sizes.shape[2], x.shape[3]), dtype=compute)


@_group_means_backward.register_fake
def _(grad: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:2], members.shape[3], grad.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, members, sizes, _ = inputs
    ctx.save_for_backward(members, sizes)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    members, sizes = ctx.saved_tensors
    return _group_means_backward(grad, members, sizes).to(ctx.dtype), None, None, None


group_means.register_autograd(_backward, setup_context=_setup_context)
