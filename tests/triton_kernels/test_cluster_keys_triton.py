"""The Triton kernels that cluster keys, in the interpreter: against torch, and what k-means promises."""

import pytest
import torch
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError
from ssa_framework.ops.cluster_keys import api, cluster_keys, triton_cuda
from ssa_framework.ops.rank_clusters import triton_cuda as triton_rank
from ssa_framework.presets import PRESETS
from ssa_framework.source import LayerSpec
from ssa_plugins.clusters import Clusters as ClustersSource
from test_cluster_keys import agree, check, randn, same, segments, whole_numbers


def both(k: Tensor, starts: Tensor, length: int, clusters: int, **options: int | None) -> None:
    got, want = (cluster_keys(k, starts, length, clusters, backend=name, **options) for name in ("triton", "torch"))
    agree(got, want)
    check(got, k, starts, length, clusters, options.get("capacity"))


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program holds all centroids of a segment: 16 pass by at a time."""
    monkeypatch.setattr(triton_cuda, "_MAX_CENTROIDS", 0)
    monkeypatch.setattr(triton_cuda, "_CHUNK", 16)


@pytest.mark.parametrize("capacity", [None, 3, 1000])
@pytest.mark.parametrize(("iterations", "coarse"), [(0, 0), (4, 2)])
def test_segments(iterations: int, coarse: int, capacity: int | None) -> None:
    k = randn(1, 2, 90, 5)
    both(k, segments(0, -1, 47), 43, 2, iterations=iterations, coarse=coarse, capacity=capacity)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(1, torch.float32), (24, torch.bfloat16), (24, torch.float16), (128, torch.float32), (128, torch.bfloat16)],
)
def test_widths_and_dtypes(dim: int, dtype: torch.dtype) -> None:
    starts = torch.tensor([[0, 29], [31, -1]], dtype=torch.int32)
    both(randn(2, 1, 60, dim).to(dtype).transpose(1, 2).contiguous().transpose(1, 2), starts, 29, 3)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize(
    ("dim", "dtype", "capacity"),
    [(5, torch.float32, None), (24, torch.bfloat16, 3), (72, torch.float16, 1000), (160, torch.bfloat16, None)],
)
def test_centroids_that_pass_by_in_chunks(dim: int, dtype: torch.dtype, capacity: int | None) -> None:
    """17 centroids are two chunks, 280 keys three tiles or more; the coarse step looks at every second key."""
    k = (randn(1, 300, 1, dim) + 2 * randn(dim, seed=1)).to(dtype).transpose(1, 2)
    both(k, segments(13, -1), 280, 17, iterations=2, coarse=1, capacity=capacity)


def test_more_centroids_than_a_program_holds() -> None:
    both(randn(1, 1, 170, 128).bfloat16(), segments(7), 161, 130, iterations=1)


@pytest.mark.usefixtures("in_chunks")
def test_batches_and_heads_of_chunks() -> None:
    starts = torch.tensor([[0, 24], [31, -1]], dtype=torch.int32)
    both(randn(2, 2, 60, 8), starts, 24, 3, iterations=2)
    both(randn(1, 1, 40, 8), segments(2), 33, 1, iterations=1)


@pytest.mark.usefixtures("in_chunks")
def test_ties_across_chunks_go_to_the_lower_number_and_empty_clusters_stay() -> None:
    both(whole_numbers(1, 1, 64, 3, high=1), segments(0), 64, 32, iterations=0)  # their mean is exact
    both(torch.ones(1, 1, 40, 4), segments(0), 40, 20, iterations=1)
    both(randn(1, 1, 33, 4), segments(0), 33, 33, iterations=0)


def test_ties_go_to_the_lower_number_and_empty_clusters_stay() -> None:
    k = whole_numbers(1, 1, 64, 3, high=1)
    both(k, segments(0, 32), 32, 8, iterations=2)
    both(torch.ones(1, 1, 20, 4), segments(0), 20, 5)
    both(randn(1, 1, 9, 4), segments(0), 9, 9)


@pytest.mark.parametrize(("keys", "starts"), [(5, ()), (0, ()), (5, (-1,))])
def test_nothing_to_cluster(keys: int, starts: tuple[int, ...]) -> None:
    k, starts_in = randn(1, 2, keys, 4), torch.tensor([starts], dtype=torch.int32).view(1, -1)
    same(*(cluster_keys(k, starts_in, 5 + 5 * (not starts), 2, backend=name) for name in ("triton", "torch")))


@pytest.mark.parametrize("chunks", [False, True])
def test_a_segment_does_not_see_the_others(chunks: bool, request: pytest.FixtureRequest) -> None:
    if chunks:
        request.getfixturevalue("in_chunks")
    k = randn(1, 1, 120, 8)
    first = cluster_keys(k, segments(0, 40, 80), 40, 4, backend="triton")
    alone = cluster_keys(k[:, :, 40:80], segments(0), 40, 4, backend="triton")
    slots = alone.size.shape[2]
    assert torch.equal(first.order[..., 40:80] - 40, alone.order)
    for name in ("size", "centroids", "variances"):
        assert torch.equal(getattr(first, name)[:, :, slots : 2 * slots], getattr(alone, name))


@pytest.mark.parametrize("preset", PRESETS)
def test_serves_every_level_of_the_presets(preset: str) -> None:
    layer = LayerSpec(head_dim=128, num_heads=32, num_kv_heads=8, graph_heads=8, num_neighbors=128, causal=True)
    source = ClustersSource(layer, **PRESETS[preset])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        k = torch.empty(1, 8, 1, 128, dtype=dtype)
        for length, size in source.levels:
            assert triton_cuda.why_not(k, round(length / size)) is None
        assert triton_rank.why_not(k, source.most(source.levels[0][1])) is None


def test_named_backend_serves_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    k = randn(1, 1, 40, 8)

    def refused(k: Tensor, clusters: int = 4) -> str:
        with pytest.raises(BackendUnavailableError, match="backend 'triton' cannot cluster here: ") as error:
            cluster_keys(k, segments(0), 40, clusters, backend="triton")
        return str(error.value)

    assert "float64" in refused(k.double())
    wide = k.repeat(1, 1, 1, 64)
    assert f"up to {triton_cuda._MAX_CENTROIDS} coordinates of the centroids of a segment, or 1024" in refused(wide, 40)
    assert "centroids of up to 256 coordinates, got 40 of 512" in refused(wide, 40)
    assert "needs CUDA tensors" in refused(k.to("meta"))
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    assert "triton is not installed" in refused(k)
