"""The Triton kernel that ranks clusters, in the interpreter: against torch, on inputs whose scores are exact."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError
from ssa_framework.ops.rank_clusters import api, rank_clusters, torch_rank, triton_cuda
from test_rank_clusters import causal_limits, check, random_clusters, random_limits, same, whole_numbers


def agree(
    q: Tensor, clusters: object, limits: tuple[Tensor, Tensor], budget: int, most: int, spread: float = 0.0
) -> None:
    limits = tuple(x if x.dim() == 3 else x[..., None] for x in limits)
    same(
        triton_cuda.rank(q, clusters, limits, budget, most, spread),
        torch_rank.rank(q, clusters, limits, budget, most, spread),
    )


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize(("budget", "most"), [(60, 8), (0, 3), (1, 1), (5000, 60), (200, 5)])
def test_random_clusters(budget: int, most: int, spread: float) -> None:
    q = whole_numbers(2, 4, 37, 5, seed=4)
    clusters = random_clusters(2, 2, 45, 5)
    limits = tuple(x[..., None] for x in random_limits(2, 37, 45))
    check(triton_cuda.rank(q, clusters, limits, budget, most, spread), q, clusters, limits, budget, most, spread)


@pytest.mark.parametrize("dim", [16, 40, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_widths_and_dtypes(dim: int, dtype: torch.dtype) -> None:
    q = whole_numbers(1, 2, 70, dim, seed=4).to(dtype)
    agree(q, random_clusters(1, 1, 40, dim), causal_limits(70, 40), 100, 7, 1.0)


def test_ranges_that_overlap_or_hold_nothing() -> None:
    low = torch.tensor([[0, 30, 10], [5, 5, 5], [20, 0, 50], [9, 3, 0]]).int()[None]
    high = torch.tensor([[20, 60, 40], [5, 4, 90], [30, 70, 10], [9, 3, 0]]).int()[None]
    agree(whole_numbers(2, 2, 4, 8, seed=4), random_clusters(2, 1, 61, 8), (low, high), 150, 20)
    strided = high.transpose(1, 2).contiguous().transpose(1, 2)
    agree(whole_numbers(1, 2, 4, 8, seed=4), random_clusters(1, 2, 61, 8), (low, strided), 150, 20)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, about inf - inf
def test_ties_and_scores_that_compare_with_nothing() -> None:
    clusters = random_clusters(1, 1, 50, 4, high=1)
    centroids = clusters.centroids.clone()
    size = torch.full_like(clusters.size, 3)
    centroids[0, 0, 7] = torch.nan
    centroids[0, 0, 9] = torch.inf
    centroids[0, 0, 11] = -torch.inf
    q = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [-1, -1, -1, -1], [1, 0, 0, 0]])[None, None]
    for budget, most in ((20, 16), (1000, 50)):
        agree(q, replace(clusters, centroids=centroids, size=size), causal_limits(4, 50), budget, most)
    negative = replace(clusters, centroids=torch.where(centroids.isfinite(), -centroids * 0, 0.0), size=size)
    agree(q, negative, (torch.zeros(1, 4).int(), torch.full((1, 4), 50).int()), 30, 16)


@pytest.mark.parametrize(("queries", "slots"), [(0, 9), (3, 0), (1, 1)])
def test_nothing_to_rank(queries: int, slots: int) -> None:
    q = whole_numbers(1, 2, queries, 8)
    clusters = random_clusters(1, 1, max(1, slots), 8)
    clusters = replace(
        clusters,
        **{name: getattr(clusters, name)[:, :, :slots] for name in ("start", "size", "centroids", "variances")},
    )
    agree(q, clusters, causal_limits(queries, slots), 10, 4)


def test_named_backend_serves_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, clusters, limits = whole_numbers(1, 2, 5, 8), random_clusters(1, 1, 20, 8), causal_limits(5, 20)
    same(*(rank_clusters(q, clusters, limits, 50, 4, 0.5, backend=backend) for backend in ("triton", "torch")))

    def refused(q: Tensor, most: int = 4) -> str:
        with pytest.raises(BackendUnavailableError, match="backend 'triton' cannot rank here: ") as error:
            rank_clusters(q, clusters, limits, 50, most, backend="triton")
        return str(error.value)

    assert "float64" in refused(q.double())
    assert "up to 256 clusters a query, got 257" in refused(q, 257)
    assert "needs CUDA tensors" in refused(q.to("meta"))
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    assert "triton is not installed" in refused(q)
