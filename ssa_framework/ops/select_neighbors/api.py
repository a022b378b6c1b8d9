"""`select_neighbors`: choose an implementation and run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, BudgetError
from ssa_framework.ops.select_neighbors import reference, torch_gather
from ssa_framework.ops.select_neighbors.types import Eligible, Proposed, Selection
from ssa_framework.proposals import Candidates, Ranges

__all__ = ["Eligible", "Proposed", "Selection", "select_neighbors"]


@torch.no_grad()
def select_neighbors(
    q: Tensor,
    k: Tensor,
    proposed: Sequence[Proposed],
    eligible: Eligible,
    budget: int,
    backend: str = "auto",
) -> Selection:
    """Choose the listed neighbors of every query.

    Of the eligible keys that the sources propose, each once: everything that is attended whole, then what is
    guaranteed, then those with the highest exact ``q·k``, until ``budget`` slots are full (keys attended whole do
    not count). Ties go to the earlier key. The result depends on the sets of proposed keys alone, not on their
    order or repetition.

    Args:
        q: routing queries ``[B, G, N, D]``. k: keys ``[B, Hkv, M, D]``, G a multiple of Hkv.
        proposed: validated proposals (`Candidates`, `Ranges`), in the order of the sources.
        eligible: which keys may be listed.
        budget: slots per query, at least 1.
        backend: ``"auto"``, ``"numba"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        BudgetError: guaranteed candidates do not fit. BackendUnavailableError: the named backend cannot serve the call.
    """
    zeros = {p.source: torch.zeros((), dtype=torch.int64, device=q.device) for p in proposed}
    proposed = [p for p in proposed if not _is_empty(p.proposal)]
    if not proposed or k.shape[2] == 0 or q.shape[2] == 0 or q.shape[0] == 0:
        return Selection(None, zeros, zeros)
    _check_guaranteed(proposed, budget)
    run = _choose_backend(q, k, proposed, eligible, budget, backend)
    chosen = run(q, k, proposed, eligible, budget)
    return Selection(chosen.neighbors, {**zeros, **chosen.listed}, {**zeros, **chosen.keys_scored})


def _is_empty(proposal: Candidates | Ranges) -> bool:
    """Whether the shapes leave room for no key at all."""
    if isinstance(proposal, Candidates):
        return proposal.indices.shape[-1] == 0
    if proposal.order is not None and 0 in proposal.order.shape[2:]:
        return True
    return proposal.start is not None and 0 in proposal.start.shape[3:]


def _choose_backend(
    q: Tensor, k: Tensor, proposed: Sequence[Proposed], eligible: Eligible, budget: int, backend: str
) -> Callable[..., Selection]:
    if backend == "reference":
        elements = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        if elements > reference.MAX_ELEMENTS:
            raise BackendUnavailableError(
                f"backend 'reference' scores all {elements} pairs one by one and serves at most "
                f"{reference.MAX_ELEMENTS}; use backend='torch'"
            )
        return reference.select
    if backend in ("auto", "numba"):
        reason = _why_not_numba(q, eligible)
        if reason is None:
            from ssa_framework.ops.select_neighbors import numba_cpu  # Numba takes a moment to import

            return numba_cpu.select
        if backend == "numba":
            raise BackendUnavailableError(f"backend 'numba' cannot select here: {reason}; use backend='auto'")
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda"):
        reason = _why_not_triton(q, k, proposed, eligible, budget)
        if reason is None:
            from ssa_framework.ops.select_neighbors import triton_cuda

            return triton_cuda.select
        if backend == "triton":
            raise BackendUnavailableError(f"backend 'triton' cannot select here: {reason}; use backend='auto'")
    return torch_gather.select


def _why_not_numba(q: Tensor, eligible: Eligible) -> str | None:
    if q.device.type != "cpu":
        return f"it serves CPU tensors, got {q.device}"
    if eligible.mask.has_explicit:
        return "attn_mask and mask_mod are looked up edge by edge, which its selection does not do"
    return None


def _why_not_triton(q: Tensor, k: Tensor, proposed: Sequence[Proposed], eligible: Eligible, budget: int) -> str | None:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:  # any folder of that name would do as a namespace package
        return "the package triton is not installed"
    from ssa_framework.ops.select_neighbors import triton_cuda  # Triton takes a moment to import

    return triton_cuda.why_not(q, k, proposed, eligible, budget)


def _check_guaranteed(proposed: Sequence[Proposed], budget: int) -> None:
    guaranteed = [p for p in proposed if isinstance(p.proposal, Candidates) and p.proposal.guaranteed]
    widths = {p.source: p.proposal.indices.shape[-1] for p in guaranteed if isinstance(p.proposal, Candidates)}
    if sum(widths.values()) <= budget:
        return
    most = {
        p.source: int((p.proposal.indices >= 0).sum(-1).max())
        for p in guaranteed
        if isinstance(p.proposal, Candidates) and p.proposal.indices.numel()
    }
    if sum(most.values()) > budget:
        asked = ", ".join(f"{name} up to {count}" for name, count in most.items())
        raise BudgetError(
            f"guaranteed neighbors do not fit: {asked} per query, the budget leaves {budget} slots beside band and "
            f"columns; raise num_neighbors by at least {sum(most.values()) - budget}"
        )
