"""The Triton kernel that ranks clusters, in the interpreter: against torch, on inputs whose scores are exact."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError
from ssa_framework.ops.rank_clusters import api, rank_clusters, torch_rank, triton_cuda, triton_few_call
from test_rank_clusters import causal_limits, check, random_clusters, random_limits, rows_of, same, whole_numbers


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


def test_blocks_of_queries_that_see_the_same() -> None:
    """Of three blocks of 64 queries, the first is all alike, the second has two kinds, the third ends early."""
    clusters = random_clusters(1, 2, 200, 8)
    centroids = clusters.centroids.clone()
    centroids[0, :, 70] = torch.nan
    low = torch.zeros((1, 150, 2), dtype=torch.int32)
    high = torch.tensor([60, 180], dtype=torch.int32).expand(1, 150, 2).clone()
    low[..., 1], low[:, 80:, 1], high[:, 80:, 0] = 60, 90, 50
    agree(whole_numbers(1, 4, 150, 8, seed=4), replace(clusters, centroids=centroids), (low, high), 70, 9, 0.5)


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


def levels_of(queries: int, slots: int, batch: int = 1, seed: int = 6) -> tuple[Tensor, Tensor]:
    """Ranges of three parts of the numbering, some empty, and some that end beyond it."""
    parts = torch.tensor([0, slots // 2, slots * 3 // 4, slots], dtype=torch.int32)
    low, high = torch.rand((2, batch, queries, 3), generator=torch.Generator().manual_seed(seed))
    low, high = (parts[:-1] + (x * (parts[1:] - parts[:-1])).int() for x in (low, high + 0.2))
    return low, torch.minimum(high, parts[1:] + torch.tensor([0, 0, 7], dtype=torch.int32)).int()


@pytest.mark.parametrize("programs", [1, 64], ids=["one program", "many programs"])
@pytest.mark.parametrize(
    ("queries", "dim", "slots", "budget", "most", "spread"),
    [(1, 16, 150, 60, 8, 0.5), (4, 40, 33, 0, 3, 0.0), (3, 130, 90, 5000, 60, 0.5)],
)
def test_few_queries(
    queries: int, dim: int, slots: int, budget: int, most: int, spread: float, programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(triton_few_call, "_PROGRAMS", programs)
    monkeypatch.setattr(triton_few_call, "_CHUNK", 64)
    q, clusters = whole_numbers(2, 4, queries, dim, seed=4), random_clusters(2, 2, slots, dim)
    limits = levels_of(queries, slots, batch=queries % 2 + 1)
    same(
        triton_few_call.rank(q, clusters, limits, budget, most, spread),
        torch_rank.rank(q, clusters, limits, budget, most, spread),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_few_queries_open_what_many_do(dtype: torch.dtype) -> None:
    """Bit by bit the same scores, also where they are nearly equal."""
    clusters = random_clusters(1, 2, 120, 24)
    nearly = 1 + 1e-6 * torch.randn(1, 2, 120, 24)
    clusters = replace(clusters, centroids=nearly, variances=nearly.abs())
    q, limits = torch.randn(1, 4, 4, 24).to(dtype), levels_of(4, 120)
    want = triton_cuda.rank(q, clusters, limits, 300, 12, 0.4)
    same(triton_few_call.rank(q, clusters, limits, 300, 12, 0.4), want)
    low, high = limits
    one = triton_few_call.rank(q[:, :, 2:3], clusters, (low[:, 2:3], high[:, 2:3]), 300, 12, 0.4)
    same(one, rows_of(want, slice(2, 3)))
    same(rank_clusters(q, clusters, limits, 300, 12, 0.4, disjoint=True, backend="triton"), want)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, about inf - inf
def test_few_queries_and_scores_that_compare_with_nothing() -> None:
    clusters = random_clusters(1, 1, 50, 4, high=1)
    centroids = clusters.centroids.clone()
    for place, value in ((7, torch.nan), (9, torch.inf), (11, -torch.inf)):
        centroids[0, 0, place] = value
    q = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [-1, -1, -1, -1], [1, 0, 0, 0]])[None, None]
    clusters = replace(clusters, centroids=centroids, size=torch.full_like(clusters.size, 3))
    limits = tuple(x[..., None] for x in causal_limits(4, 50))
    for budget, most in ((20, 16), (1000, 50)):
        same(
            triton_few_call.rank(q, clusters, limits, budget, most, 0.0),
            torch_rank.rank(q, clusters, limits, budget, most, 0.0),
        )


@pytest.mark.parametrize(("queries", "slots"), [(0, 9), (3, 0), (1, 1)])
def test_few_queries_with_nothing_to_rank(queries: int, slots: int) -> None:
    q = whole_numbers(1, 2, queries, 8)
    clusters = random_clusters(1, 1, max(1, slots), 8)
    clusters = replace(
        clusters,
        **{name: getattr(clusters, name)[:, :, :slots] for name in ("start", "size", "centroids", "variances")},
    )
    limits = tuple(x[..., None] for x in causal_limits(queries, slots))
    same(triton_few_call.rank(q, clusters, limits, 10, 4, 0.0), torch_rank.rank(q, clusters, limits, 10, 4, 0.0))


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
