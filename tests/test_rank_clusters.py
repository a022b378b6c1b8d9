"""The op that ranks clusters: every implementation against an oracle in Python, on inputs whose scores are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, ShapeError
from ssa_framework.ops.cluster_keys import Clusters, cluster_keys
from ssa_framework.ops.rank_clusters import OpenedClusters, rank_clusters

BACKENDS = ["numba", "torch"]


def whole_numbers(*shape: int, seed: int = 0, high: int = 9) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def random_clusters(batch: int, heads: int, slots: int, dim: int, *, largest: int = 40, high: int = 9) -> Clusters:
    """About a third of the slots is empty."""
    size = torch.randint(-largest // 2, largest + 1, (batch, heads, slots), generator=torch.Generator().manual_seed(1))
    size = size.clamp(min=0).to(torch.int32)
    centroids = whole_numbers(batch, heads, slots, dim, seed=2, high=high) * (size > 0)[..., None]
    variances = whole_numbers(batch, heads, slots, dim, seed=5, high=high).abs() * (size > 0)[..., None]
    start = torch.where(size > 0, size.cumsum(-1) - size, 0).to(torch.int32)
    order = torch.zeros(batch, heads, int(size.sum(-1).max()), dtype=torch.int32)
    return Clusters(order, start, size, centroids, variances)


def random_limits(batch: int, queries: int, slots: int) -> tuple[Tensor, Tensor]:
    """Some beyond the slots, some empty."""
    generator = torch.Generator().manual_seed(3)
    low, high = torch.randint(-3, slots + 4, (2, batch, queries), generator=generator, dtype=torch.int32)
    return low // 2, high


def causal_limits(queries: int, slots: int) -> tuple[Tensor, Tensor]:
    high = (torch.arange(queries) * (slots + 1) // queries).to(torch.int32)[None]
    return torch.zeros_like(high), high


def same(got: OpenedClusters, want: OpenedClusters) -> None:
    for name in ("numbers", "start", "end"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def rows_of(opened: OpenedClusters, rows: slice) -> OpenedClusters:
    return OpenedClusters(*(x[:, :, rows] for x in (opened.numbers, opened.start, opened.end)))


def check(
    got: OpenedClusters, q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int,
    spread: float = 0.0,
) -> None:  # fmt: skip
    """Against the definition; the slices are those of the clusters."""
    assert got.numbers.dtype == got.start.dtype == got.end.dtype == torch.int32
    assert got.numbers.tolist() == ranked(q, clusters, limits, budget, most, spread)
    repeats = q.shape[1] // clusters.size.shape[1]
    number = got.numbers.clamp(min=0).long().flatten(2)
    for found, table in ((got.start, clusters.start), (got.end, clusters.start + clusters.size)):
        want = table.repeat_interleave(repeats, dim=1).gather(2, number).view_as(found)
        assert torch.equal(found, torch.where(got.numbers < 0, 0, want))


def ranked(
    q: Tensor, clusters: Clusters, limits: tuple[Tensor, Tensor], budget: int, most: int, spread: float = 0.0
) -> list:
    """The definition, query by query."""
    batch, heads, queries, _ = q.shape
    repeats = heads // clusters.size.shape[1]
    low, high = ((x if x.dim() == 3 else x[..., None]).expand(batch, -1, -1).tolist() for x in limits)
    rows = []
    for b in range(batch):
        for g in range(heads):
            size = clusters.size[b, g // repeats].tolist()
            means, squares = (x[b, g // repeats].double() for x in (clusters.centroids, clusters.variances))
            scores = (q[b, g].double() @ means.T + spread * (q[b, g].double().square() @ squares.T)).tolist()
            for n in range(queries):
                ranges = list(zip(low[b][n], high[b][n], strict=True))
                allowed = [c for c in range(len(size)) if size[c] and any(x <= c < y for x, y in ranges)]
                opened, left = [], budget
                for c in sorted(allowed, key=lambda c, row=scores[n]: (-row[c], c))[:most]:
                    left -= size[c]
                    if left < 0:
                        break
                    opened.append(c)
                rows.append(opened + [-1] * (most - len(opened)))
    return torch.tensor(rows, dtype=torch.int32).reshape(batch, heads, queries, most).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [1, 16, 63, 64, 65, 300])
@pytest.mark.parametrize(("queries", "dim"), [(1, 16), (65, 3), (63, 64), (20, 37)])
def test_the_best_clusters_that_fit(slots: int, queries: int, dim: int, backend: str) -> None:
    q, clusters = whole_numbers(2, 4, queries, dim), random_clusters(2, 2, slots, dim)
    for limits in (causal_limits(queries, slots), random_limits(2, queries, slots)):
        for spread in (0.0, 0.25):
            got = rank_clusters(q, clusters, limits, 200, 12, spread, backend=backend)
            check(got, q, clusters, limits, 200, 12, spread)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [1, 63, 130, 300])
@pytest.mark.parametrize("ranges", [1, 2, 4])
def test_several_ranges_that_may_overlap(ranges: int, slots: int, backend: str) -> None:
    q, clusters = whole_numbers(2, 4, 65, 5), random_clusters(2, 2, slots, 5)
    generator = torch.Generator().manual_seed(4)
    low = torch.randint(-3, slots + 4, (2, 65, ranges), generator=generator, dtype=torch.int32)
    limits = low, low + torch.randint(-5, slots // 2 + 5, low.shape, generator=generator, dtype=torch.int32)
    check(rank_clusters(q, clusters, limits, 200, 12, backend=backend), q, clusters, limits, 200, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("most", [1, 5, 64, 400])
@pytest.mark.parametrize("budget", [0, 1, 39, 10_000_000])
def test_budget_and_most(budget: int, most: int, backend: str) -> None:
    q, clusters = whole_numbers(1, 2, 40, 8), random_clusters(1, 1, 130, 8)
    limits = random_limits(1, 40, 130)
    got = rank_clusters(q, clusters, limits, budget, most, backend=backend)
    check(got, q, clusters, limits, budget, most)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cluster_that_does_not_fit_ends_it(backend: str) -> None:
    size = torch.tensor([[[10, 10, 30, 1]]], dtype=torch.int32)
    centroids = torch.tensor([2.0, 4.0, 3.0, 1.0]).reshape(1, 1, 4, 1)
    clusters = Clusters(torch.zeros(1, 1, 51, dtype=torch.int32), size.cumsum(-1).int() - size, size, centroids)
    limits = torch.zeros(1, 2, dtype=torch.int32), torch.full((1, 2), 4, dtype=torch.int32)
    q = torch.tensor([1.0, -1.0]).reshape(1, 1, 2, 1)
    got = rank_clusters(q, clusters, limits, 25, 4, backend=backend)
    assert got.numbers.tolist() == [[[[1, -1, -1, -1], [3, 0, -1, -1]]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_by_number(backend: str) -> None:
    """0 and -0 are equal, too."""
    clusters = random_clusters(1, 1, 200, 4, high=1)
    clusters = Clusters(clusters.order, clusters.start, clusters.size, -clusters.centroids.abs(), clusters.variances)
    q = torch.cat([torch.zeros(1, 1, 5, 4), whole_numbers(1, 1, 20, 4, high=1)], dim=2)
    limits = random_limits(1, 25, 200)
    check(rank_clusters(q, clusters, limits, 300, 20, backend=backend), q, clusters, limits, 300, 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_compared_is_not_opened(backend: str) -> None:
    q, clusters = torch.ones(1, 1, 3, 2), random_clusters(1, 1, 40, 2)
    q[0, 0, 1] = torch.nan
    q[0, 0, 2] = 0
    clusters.centroids[0, 0, ::2, 0] = torch.inf
    got = rank_clusters(q, clusters, causal_limits(3, 120), 500, 40, backend=backend).numbers[0, 0]
    assert (got[1] == -1).all()
    assert all(c % 2 for c in got[2].tolist() if c >= 0)  # 0 · inf is NaN


@pytest.mark.parametrize("backend", BACKENDS)
def test_variances_that_cannot_be_compared(backend: str) -> None:
    """They count where spread is not 0 only; what is infinite comes first."""
    q, clusters = torch.ones(1, 1, 2, 2), random_clusters(1, 1, 40, 2)
    assert clusters.variances is not None
    q[0, 0, 1] = 0
    clusters.variances[0, 0, ::2, 0] = torch.nan
    clusters.variances[0, 0, 1::4, 0] = torch.inf
    limits = causal_limits(2, 40)[0], torch.full((1, 2), 40, dtype=torch.int32)
    both, none = rank_clusters(q, clusters, limits, 10_000, 40, 0.5, backend=backend).numbers[0, 0].tolist()
    usable = [c for c in range(1, 40, 2) if clusters.size[0, 0, c] > 0]
    infinite = [c for c in usable if c % 4 == 1]
    assert both[: len(infinite)] == infinite
    assert sorted(c for c in both if c >= 0) == usable
    assert sorted(c for c in none if c >= 0) == [c for c in usable if c % 4 == 3]  # 0 · inf is NaN
    got = rank_clusters(q, clusters, limits, 300, 40, backend=backend)
    plain = Clusters(clusters.order, clusters.start, clusters.size, clusters.centroids)
    same(got, rank_clusters(q, plain, limits, 300, 40, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_scored_as_float32(dtype: torch.dtype, backend: str) -> None:
    q, clusters = torch.randn(2, 2, 33, 16).to(dtype), random_clusters(2, 1, 90, 16)
    limits = causal_limits(33, 90)
    got, want = (rank_clusters(x, clusters, limits, 100, 8, 0.3, backend=backend) for x in (q, q.float()))
    same(got, want)


def test_a_query_does_not_depend_on_what_it_is_ranked_with() -> None:
    """Prefixes of the queries, single ones and later segments: decode opens what prefill opened."""
    k, q = torch.randn(2, 2, 1024, 40), torch.randn(2, 4, 1024, 40)
    starts = torch.arange(0, 1024, 256, dtype=torch.int32)[None]
    clusters = cluster_keys(k, starts, 256, 16)
    slots = clusters.size.shape[2] // 4
    high = (torch.arange(1024) // 256 * slots).to(torch.int32)[None]
    low = torch.zeros_like(high)
    whole = rank_clusters(q, clusters, (low, high), 100, 9, 0.1)
    early = cluster_keys(k[:, :, :512], starts[:, :2], 256, 16)
    prefix = rank_clusters(q[:, :, :767], early, (low[:, :767], high[:, :767]), 100, 9, 0.1)
    same(rows_of(whole, slice(767)), prefix)
    for n in (256, 513, 1023):
        part = slice(n, n + 1)
        single = rank_clusters(q[:, :, part], clusters, (low[:, part], high[:, part]), 100, 9, 0.1)
        same(rows_of(whole, part), single)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        same(rank_clusters(q, clusters, (low, high), 100, 9, 0.1), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_open(backend: str) -> None:
    for slots in (0, 70):
        clusters = Clusters(
            torch.zeros(1, 1, 0, dtype=torch.int32),
            torch.zeros(1, 1, slots, dtype=torch.int32),
            torch.zeros(1, 1, slots, dtype=torch.int32),
            torch.zeros(1, 1, slots, 4),
        )
        got = rank_clusters(torch.randn(1, 2, 5, 4), clusters, causal_limits(5, slots), 10, 3, backend=backend)
        assert torch.equal(got.numbers, torch.full((1, 2, 5, 3), -1, dtype=torch.int32))
        assert not got.start.any()
        assert not got.end.any()
    none = rank_clusters(torch.randn(1, 2, 0, 4), clusters, causal_limits(0, 70), 10, 3)
    assert none.numbers.shape == none.start.shape == none.end.shape == (1, 2, 0, 3)


@settings(deadline=None, max_examples=100)
@given(
    dim=st.integers(1, 20),
    slots=st.integers(1, 1200),
    queries=st.integers(1, 40),
    budget=st.integers(0, 400),
    most=st.integers(1, 30),
    repeats=st.integers(1, 3),
    high=st.integers(0, 9),
    spread=st.integers(0, 3),
)
def test_any_settings(
    dim: int, slots: int, queries: int, budget: int, most: int, repeats: int, high: int, spread: int
) -> None:
    q, clusters = whole_numbers(2, repeats, queries, dim), random_clusters(2, 1, slots, dim, high=high)
    limits = random_limits(2, queries, slots)
    got, want = (rank_clusters(q, clusters, limits, budget, most, spread / 4, backend=backend) for backend in BACKENDS)
    same(got, want)


def test_more_queries_than_one_task_takes() -> None:
    q, clusters, limits = whole_numbers(1, 2, 2300, 8), random_clusters(1, 1, 100, 8), causal_limits(2300, 100)
    got, want = (rank_clusters(q, clusters, limits, 100, 6, backend=backend) for backend in BACKENDS)
    same(got, want)


def test_bad_input() -> None:
    q, clusters, limits = torch.randn(2, 4, 10, 8), random_clusters(2, 2, 20, 8), causal_limits(10, 20)
    with pytest.raises(ShapeError, match=r"q must be floating \[B, G, N, D\], got torch.int64"):
        rank_clusters(q.long(), clusters, limits, 10, 3)
    for wrong in (q[:, :3], q[:1], q[..., :4]):
        with pytest.raises(ShapeError, match="G a multiple of Hkv"):
            rank_clusters(wrong, clusters, limits, 10, 3)
    with pytest.raises(ShapeError, match=r"limits must be int32 \[B or 1, N\] .* got (low|high) torch.int32 \[1, 9\]"):
        rank_clusters(q, clusters, (limits[0], limits[1][:, :9]), 10, 3)
    with pytest.raises(ShapeError, match=r"got low torch\.int64"):
        rank_clusters(q, clusters, (limits[0].long(), limits[1]), 10, 3)
    plain = Clusters(clusters.order, clusters.start, clusters.size, clusters.centroids)
    with pytest.raises(ShapeError, match=r"spread takes variances of the shape .* \[2, 2, 20, 8\], got None"):
        rank_clusters(q, plain, limits, 10, 3, 0.5)
    with pytest.raises(ConfigError, match="budget must be 0 keys or more, got -1"):
        rank_clusters(q, clusters, limits, -1, 3)
    with pytest.raises(ConfigError, match="most must be at least 1 cluster, got 0"):
        rank_clusters(q, clusters, limits, 10, 0)
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot rank clusters; use one of auto, numba, torch"):
        rank_clusters(q, clusters, limits, 10, 3, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="serves CPU tensors, got meta"):
        rank_clusters(q.to("meta"), clusters, limits, 10, 3, backend="numba")
