"""The op that clusters segments of keys: what k-means promises, and every implementation against the one in torch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, ConfigError, ShapeError
from ssa_framework.ops.cluster_keys import Clusters, cluster_keys, cluster_slots

BACKENDS = ["numba", "torch"]
PARTS = ("order", "start", "size", "centroids", "variances")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape: int, seed: int = 0, high: int = 9) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def segments(*starts: int) -> Tensor:
    return torch.tensor([starts], dtype=torch.int32)


def same(got: Clusters, want: Clusters) -> None:
    """Bit for bit."""
    for name in PARTS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def agree(got: Clusters, want: Clusters) -> None:
    for name in ("order", "start", "size"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.centroids, want.centroids)
    torch.testing.assert_close(got.variances, want.variances)


def check(found: Clusters, k: Tensor, starts: Tensor, length: int, clusters: int, capacity: int | None) -> None:
    """The clusters partition their segments; centroids are the means of their keys, variances those of coordinates."""
    batch, heads, _, dim = k.shape
    count, slots = starts.shape[1], cluster_slots(length, clusters, capacity)
    most = capacity or -(-2 * length // clusters)
    assert [x.dtype for x in (found.order, found.start, found.size)] == [torch.int32] * 3
    assert found.order.shape == (batch, heads, count * length)
    assert found.start.shape == found.size.shape == (batch, heads, count * slots)
    assert found.variances is not None
    assert found.centroids.shape == found.variances.shape == (batch, heads, count * slots, dim)
    assert found.centroids.dtype == found.variances.dtype == torch.float32
    for b in range(batch):
        for h in range(heads):
            for f, first in enumerate(starts.expand(batch, -1)[b].tolist()):
                part = slice(f * slots, (f + 1) * slots)
                start, size = found.start[b, h, part].tolist(), found.size[b, h, part].tolist()
                centroids, order = found.centroids[b, h, part], found.order[b, h]
                variances = found.variances[b, h, part]
                full = sum(n > 0 for n in size)
                assert not any(size[full:])
                assert not any(start[full:])
                assert not centroids[full:].any()
                assert not variances[full:].any()
                if first < 0:
                    assert full == 0
                    assert not order[f * length : (f + 1) * length].any()
                    continue
                assert max(size) <= most
                assert sum(size) == length
                place = f * length
                for c in range(full):  # one after the other, without gaps
                    assert start[c] == place
                    place += size[c]
                    keys = order[start[c] : place]
                    assert (keys.diff() > 0).all()
                    rows = k[b, h, keys.long()].double()
                    torch.testing.assert_close(centroids[c], rows.mean(0).float(), rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(variances[c], rows.var(0, correction=0).float(), rtol=1e-4, atol=1e-4)
                keys = order[f * length : (f + 1) * length].sort().values
                assert torch.equal(keys, torch.arange(first, first + length, dtype=torch.int32))


def spread(found: Clusters, k: Tensor) -> float:
    """Squared distances of the keys ``[1, 1, M, D]`` from the means of their clusters, where none is cut."""
    slot = torch.arange(found.size.shape[2]).repeat_interleave(found.size[0, 0].long())
    keys = k[0, 0, found.order[0, 0].long()].double()
    means = torch.zeros(found.centroids.shape[2:], dtype=torch.float64).index_add_(0, slot, keys)
    means /= found.size[0, 0, :, None].clamp(min=1)
    return float((keys - means[slot]).square().sum())


@pytest.mark.parametrize("capacity", [None, 1, 7, 1000])
@pytest.mark.parametrize("iterations", [0, 1])
def test_implementations_agree_where_sums_are_exact(iterations: int, capacity: int | None) -> None:
    """The mean of 128 whole numbers is exact; the first means of clusters are rounded only where 3, 5, ... keys are."""
    k = whole_numbers(2, 2, 600, 16)
    starts = torch.tensor([[0, 128, -1, 300], [3, -1, -1, 472]], dtype=torch.int32)
    options = {"iterations": iterations, "capacity": capacity}
    got, want = (cluster_keys(k, starts, 128, 8, backend=backend, **options) for backend in BACKENDS)
    agree(got, want)
    check(got, k, starts, 128, 8, capacity)


@pytest.mark.parametrize("dim", [3, 16, 40, 64])
@pytest.mark.parametrize(("length", "clusters"), [(1, 1), (32, 32), (63, 5), (256, 32), (333, 1), (100, 33)])
def test_implementations_agree_on_keys_in_general_position(dim: int, length: int, clusters: int) -> None:
    k, starts = randn(1, 2, 400, dim) + 3 * randn(dim, seed=1), segments(67, -1)
    got, want = (cluster_keys(k, starts, length, clusters, iterations=2, backend=backend) for backend in BACKENDS)
    agree(got, want)
    check(got, k, starts, length, clusters, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finds_the_clusters_that_are_there(backend: str) -> None:
    """Blobs of 8, 16 and 40 keys, far apart; the initial centroids hit each of them."""
    blob = torch.tensor([0] * 8 + [1] * 16 + [2] * 40)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    k = (100 * torch.eye(4)[blob] + 0.1 * randn(64, 4))[None, None]
    initial = blob[torch.linspace(0, 63, 8).long()]
    assert set(initial.tolist()) == {0, 1, 2}
    found = cluster_keys(k, segments(0), 64, 8, capacity=64, backend=backend)
    for start, size in zip(found.start[0, 0].tolist(), found.size[0, 0].tolist(), strict=True):
        if size:
            assert len(set(blob[found.order[0, 0, start : start + size].long()].tolist())) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_makes_the_clusters_wider(backend: str) -> None:
    k = randn(1, 1, 500, 8)
    widths = [
        spread(cluster_keys(k, segments(0), 500, 20, capacity=500, iterations=i, backend=backend), k) for i in range(9)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(widths))
    assert widths[-1] < 0.95 * widths[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_every_key_is_with_the_nearest_mean_of_the_step_before(iterations: int, backend: str) -> None:
    k, clusters = randn(1, 1, 500, 24) + 5, 20
    options = {"capacity": 500, "backend": backend}
    found = cluster_keys(k, segments(0), 500, clusters, iterations=iterations, **options)
    assert (found.size[0, 0, :clusters] > 0).all()  # so numbers of slots are numbers of centroids
    if iterations:
        before = cluster_keys(k, segments(0), 500, clusters, iterations=iterations - 1, **options)
        assert (before.size[0, 0, :clusters] > 0).all()
        centroids = before.centroids[0, 0, :clusters]
    else:
        centroids = k[0, 0, torch.linspace(0, 499, clusters).long()]
    keys = k[0, 0, found.order[0, 0].long()].double()
    owner = torch.arange(clusters).repeat_interleave(found.size[0, 0, :clusters].long())
    distances = torch.cdist(keys, centroids.double())
    assert (distances.gather(1, owner[:, None])[:, 0] <= distances.min(1).values + 1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cluster_is_cut_by_position_into_equal_pieces(backend: str) -> None:
    found = cluster_keys(torch.ones(1, 1, 20, 3), segments(0), 20, 4, capacity=6, backend=backend)
    # identical keys tie, so the first centroid gets all of them
    assert found.size.tolist() == [[[5, 5, 5, 5, 0, 0, 0]]]
    assert found.order.tolist() == [[list(range(20))]]
    assert found.start.tolist() == [[[0, 5, 10, 15, 0, 0, 0]]]
    assert torch.equal(found.centroids[0, 0], torch.tensor([1.0] * 4 + [0.0] * 3)[:, None].expand(-1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_variances_of_keys_far_from_zero(backend: str) -> None:
    """A mean of squares less the square of the mean would be nothing but rounding errors."""
    k = 0.01 * randn(1, 1, 300, 20) + 1000
    found = cluster_keys(k, segments(0), 300, 10, backend=backend)
    assert found.variances is not None
    for start, size, variance in zip(found.start[0, 0], found.size[0, 0], found.variances[0, 0], strict=True):
        if size:
            rows = k[0, 0, found.order[0, 0, start : start + size].long()].double()
            torch.testing.assert_close(variance, rows.var(0, correction=0).float(), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("length", "clusters", "stride"), [(512, 16, 4), (500, 16, 3), (95, 3, 3), (64, 16, 1)])
def test_coarse_steps_look_at_keys_at_even_distances(length: int, clusters: int, stride: int, backend: str) -> None:
    """They move the centroids like k-means of those keys, and whatever the other keys are."""
    k = randn(1, 1, length, 8)
    some = k[:, :, ::stride].contiguous()
    options = {"capacity": length, "backend": backend}
    found = cluster_keys(k, segments(0), length, clusters, iterations=2, coarse=2, **options)
    centroids = k[0, 0, torch.linspace(0, length - 1, clusters).long()].double()
    for _ in range(2):
        owner = torch.cdist(some[0, 0].double(), centroids).argmin(1)
        for c in range(clusters):
            if (owner == c).any():
                centroids[c] = some[0, 0, owner == c].double().mean(0)
    owner = torch.cdist(k[0, 0].double(), centroids).argmin(1)
    want = [(owner == c).nonzero()[:, 0].tolist() for c in range(clusters) if (owner == c).any()]
    starts, sizes = found.start[0, 0].tolist(), found.size[0, 0].tolist()
    got = [found.order[0, 0, s : s + n].tolist() for s, n in zip(starts, sizes, strict=True) if n]
    assert got == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_not_finite_stay_in_their_segment(backend: str) -> None:
    """Every key is still in one cluster, and other segments do not change."""
    k = randn(1, 1, 200, 16)
    clean = cluster_keys(k, segments(0, 100), 100, 7, backend=backend)
    k[0, 0, 3, 5], k[0, 0, 40, 0] = torch.nan, torch.inf
    found = cluster_keys(k, segments(0, 100), 100, 7, backend=backend)
    slots = cluster_slots(100, 7)
    assert torch.equal(found.order[0, 0, :100].sort().values, torch.arange(100, dtype=torch.int32))
    assert int(found.size[0, 0, :slots].sum()) == 100
    for name in ("size", "centroids", "variances"):
        assert torch.equal(getattr(found, name)[:, :, slots:], getattr(clean, name)[:, :, slots:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_clusters_as_keys(backend: str) -> None:
    k = randn(1, 2, 40, 5)
    found = cluster_keys(k, segments(0), 40, 40, capacity=3, backend=backend)
    assert torch.equal(found.size[0, 0].sort(descending=True).values[:40], torch.ones(40, dtype=torch.int32))
    torch.testing.assert_close(found.centroids[:, :, :40], k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_clustered_as_float32(dtype: torch.dtype, backend: str) -> None:
    k = randn(2, 2, 200, 16).to(dtype)
    got, want = (cluster_keys(x, segments(0, 100), 100, 6, backend=backend) for x in (k, k.float()))
    same(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coarse", [0, 3])
def test_a_segment_depends_on_its_own_keys_alone(coarse: int, backend: str) -> None:
    """Not on later keys, on other segments, heads or batch elements, nor on the number of threads."""
    k, length, clusters = randn(2, 3, 1000, 16), 250, 9
    slots = cluster_slots(length, clusters)
    whole = cluster_keys(k, segments(0, 250, 500, 750), length, clusters, coarse=coarse, backend=backend)
    prefix = cluster_keys(k[:, :, :500], segments(0, 250), length, clusters, coarse=coarse, backend=backend)
    same(
        Clusters(
            whole.order[..., : 2 * length],
            whole.start[..., : 2 * slots],
            whole.size[..., : 2 * slots],
            whole.centroids[:, :, : 2 * slots],
            whole.variances[:, :, : 2 * slots],
        ),
        prefix,
    )
    turned = cluster_keys(k.flip(0, 1), segments(0, 250, 500, 750), length, clusters, coarse=coarse, backend=backend)
    same(Clusters(*(getattr(whole, x).flip(0, 1) for x in PARTS)), turned)
    alone = cluster_keys(k[1:, 2:, 500:750], segments(0), length, clusters, coarse=coarse, backend=backend)
    part = slice(2 * slots, 3 * slots)
    assert torch.equal(whole.centroids[1:, 2:, part], alone.centroids)
    assert torch.equal(whole.variances[1:, 2:, part], alone.variances)
    assert torch.equal(whole.size[1:, 2:, part], alone.size)
    assert torch.equal(whole.order[1:, 2:, 2 * length : 3 * length], alone.order + 500)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        same(cluster_keys(k, segments(0, 250, 500, 750), length, clusters, coarse=coarse, backend=backend), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_gradients_do_not_matter(backend: str) -> None:
    k = randn(1, 200, 2, 16).requires_grad_()
    found = cluster_keys(k.transpose(1, 2), segments(100, 0), 100, 7, backend=backend)
    same(found, cluster_keys(k.detach().transpose(1, 2).contiguous(), segments(100, 0), 100, 7, backend=backend))
    assert not found.centroids.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("starts", [segments(-1, -1), torch.zeros((1, 0), dtype=torch.int32)], ids=["unused", "none"])
def test_nothing_to_cluster(starts: Tensor, backend: str) -> None:
    for keys in (0, 5, 20):
        k = randn(2, 1, keys, 4)
        check(cluster_keys(k, starts, 10, 2, backend=backend), k, starts, 10, 2, None)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dim=st.integers(1, 35), length=st.integers(1, 90), iterations=st.integers(0, 4))
def test_any_settings(data: st.DataObject, dim: int, length: int, iterations: int) -> None:
    clusters = data.draw(st.integers(1, length), label="clusters")
    capacity = data.draw(st.none() | st.integers(1, length + 3), label="capacity")
    coarse = data.draw(st.integers(0, iterations), label="coarse")
    keys = length + data.draw(st.integers(0, 100), label="more keys")
    starts = segments(*data.draw(st.lists(st.integers(-1, keys - length), min_size=1, max_size=4), label="starts"))
    k = data.draw(st.sampled_from([randn, whole_numbers]))(2, 1, keys, dim, seed=data.draw(st.integers(0, 9)))
    for backend in BACKENDS:
        options = {"iterations": iterations, "coarse": coarse, "capacity": capacity}
        found = cluster_keys(k, starts, length, clusters, backend=backend, **options)
        check(found, k, starts, length, clusters, capacity)


def test_bad_input() -> None:
    k = randn(2, 2, 100, 4)
    with pytest.raises(ShapeError, match=r"k must be floating \[B, Hkv, M, D\], got torch.int64"):
        cluster_keys(k.long(), segments(0), 50, 4)
    with pytest.raises(ShapeError, match=r"got torch.float32 \[2, 100, 4\]"):
        cluster_keys(k[0], segments(0), 50, 4)
    with pytest.raises(ShapeError, match=r"starts must be int32 \[B or 1, F\] with B = 2, got torch.int64 \[1, 1\]"):
        cluster_keys(k, segments(0).long(), 50, 4)
    with pytest.raises(ShapeError, match=r"got torch.int32 \[3, 1\]"):
        cluster_keys(k, segments(0).expand(3, 1), 50, 4)
    for start in (51, -2):
        with pytest.raises(ShapeError, match=r"start at -1 \(not used\) or at 0 to M - 50 = 50, got starts from"):
            cluster_keys(k, segments(0, start), 50, 4)
    with pytest.raises(ConfigError, match="length must be at least 1 key, got 0"):
        cluster_keys(k, segments(0), 0, 4)
    for clusters in (0, 51):
        with pytest.raises(ConfigError, match=f"clusters must be 1 to 50, the keys of a segment, got {clusters}"):
            cluster_keys(k, segments(0), 50, clusters)
    with pytest.raises(ConfigError, match="capacity must be at least 1 key, or None"):
        cluster_keys(k, segments(0), 50, 4, capacity=0)
    with pytest.raises(ConfigError, match="iterations must be 0 or more, got -1"):
        cluster_keys(k, segments(0), 50, 4, iterations=-1)
    for coarse in (-1, 4):
        with pytest.raises(ConfigError, match=f"coarse must be 0 to 3, one of the iterations, got {coarse}"):
            cluster_keys(k, segments(0), 50, 4, iterations=3, coarse=coarse)
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot cluster keys; use one of auto, numba, torch"):
        cluster_keys(k, segments(0), 50, 4, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="serves CPU tensors, got meta"):
        cluster_keys(k.to("meta"), segments(0), 50, 4, backend="numba")
