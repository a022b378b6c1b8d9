"""The lsh source: hashing, probing, centring, adaptive planes, and recall."""

import math

import pytest
import torch

from ssa_framework import SparseAttention, SSAConfig, build_graph
from ssa_framework.errors import ConfigError
from ssa_framework.ops.lsh_slices.centering import center_keys
from ssa_framework.ops.lsh_slices.families import CrossPolytope, Hyperplane
from ssa_framework.ops.lsh_slices.probing import flip_sets
from ssa_plugins.lsh import LSH, num_planes
from ssa_plugins.lsh.directions import directions

FAMILIES = {"hyperplane": Hyperplane(12), "cross_polytope": CrossPolytope(12, 32)}


def lsh_graph(q: torch.Tensor, k: torch.Tensor, neighbors: int = 128, causal: bool = False, **options: object):
    config = SSAConfig(sources={"self": {}, "window": {}, "global": {}, "lsh": options}, num_neighbors=neighbors)
    return build_graph(q, k, config=config, is_causal=causal)


def recall_at_32(q: torch.Tensor, k: torch.Tensor, graph) -> float:
    top = (q @ k.transpose(-1, -2)).topk(32, dim=-1).indices
    return graph.to_dense_mask().gather(-1, top).float().mean().item()


@pytest.mark.parametrize(("keys", "expected"), [(1, 0), (128, 0), (182, 1), (1024, 3), (8192, 6), (10**9, 12)])
def test_adaptive_planes(keys: int, expected: int) -> None:
    assert num_planes(torch.tensor([keys]), 128, 12).tolist() == [expected]


def test_flip_sets_are_the_cheapest_in_order() -> None:
    def cost(ranks: tuple[int, ...]) -> int:
        return sum((r + 1) * (r + 2) for r in ranks)

    every = sorted(
        (tuple(r for r in range(6) if bits >> r & 1) for bits in range(1, 64)), key=lambda ranks: (cost(ranks), ranks)
    )
    found = flip_sets(63, 6)
    assert sorted(found) == sorted(every)
    assert [cost(r) for r in found] == [cost(r) for r in every]
    assert flip_sets(3, 1) == [(0,)]
    assert flip_sets(0, 6) == []


@pytest.mark.parametrize("bits", [1, 2, 5, 6, 7, 9, 12])
@pytest.mark.parametrize("name", FAMILIES)
def test_probes_start_at_the_own_bucket_and_never_repeat(name: str, bits: int) -> None:
    family = FAMILIES[name]
    weight = directions(name, 3, 12, 32, torch.Generator().manual_seed(1))
    projected = torch.einsum("nd,rfd->nrf", torch.randn(50, 32), weight)
    own = family.buckets(projected, bits)
    probes = family.probes(projected, bits, 10)
    assert own.min() >= 0
    assert own.max() < 2**bits
    assert torch.equal(probes[..., 0], own)
    assert probes.max() < 2**bits
    for row in probes.flatten(0, 1).tolist():
        real = [bucket for bucket in row if bucket >= 0]
        assert len(real) == len(set(real)) == min(11, 2**bits)


def test_hyperplane_probes_flip_the_nearest_planes_first() -> None:
    projected = torch.tensor([[0.9, -0.1, 0.5]])
    assert Hyperplane(3).probes(projected, 3, 3).tolist() == [[0b101, 0b111, 0b100, 0b110]]


def test_cross_polytope_buckets_are_signed_coordinates() -> None:
    projected = torch.tensor([[0.1, -0.9, 0.3, 0.2]])
    assert CrossPolytope(3, 4).buckets(projected, 3).tolist() == [4 + 1]
    assert CrossPolytope(3, 4).probes(projected, 3, 2).tolist() == [[5, 2, 3]]


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_are_orthonormal(family) -> None:
    weight = directions(family, 2, 12, 32, torch.Generator().manual_seed(0))
    rows = weight[:, : min(32, weight.shape[1] // (1 if weight.shape[1] <= 32 else 2))]
    torch.testing.assert_close(rows @ rows.transpose(-1, -2), torch.eye(rows.shape[1]).expand(2, -1, -1))


def test_causal_mean_is_the_mean_of_the_past() -> None:
    keys = torch.randn(2, 1, 20, 4)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1, :6] = False
    keys = keys.masked_fill(~keep[:, None, :, None], 0.0)
    centred = center_keys(keys, keep, None, causal=True)
    torch.testing.assert_close(centred[0, 0, 9], keys[0, 0, 9] - keys[0, 0, :10].mean(0))
    torch.testing.assert_close(centred[1, 0, 9], keys[1, 0, 9] - keys[1, 0, 6:10].mean(0))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_documents_are_centred_on_their_own(causal: bool) -> None:
    keys = torch.randn(1, 2, 30, 4)
    ids = torch.tensor([[0] * 7 + [5] * 11 + [2] * 12])
    packed = center_keys(keys, None, ids, causal)
    for document in (0, 5, 2):
        mine = ids[0] == document
        alone = center_keys(keys[:, :, mine], None, None, causal)
        torch.testing.assert_close(packed[:, :, mine], alone)


def test_centring_helps_keys_with_a_common_shift() -> None:
    shift = 8 * torch.randn(1, 1, 1, 32)
    q, k = torch.randn(1, 1, 1024, 32), torch.randn(1, 1, 1024, 32) + shift
    centred = recall_at_32(q, k, lsh_graph(q, k, 64, rounds=4))
    raw = recall_at_32(q, k, lsh_graph(q, k, 64, rounds=4, center=False))
    assert centred > raw + 0.1


def test_planes_follow_the_seed_and_travel_in_the_state_dict() -> None:
    config = SSAConfig(d_model=32, num_heads=2, num_neighbors=24)
    first, same, other = SparseAttention(config), SparseAttention(config), SparseAttention(config.replace(seed=1))
    name = "router.sources.lsh.planes"
    assert torch.equal(first.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    other.load_state_dict(first.state_dict())
    x = torch.randn(1, 100, 32)
    assert torch.equal(first(x)[0], other(x)[0])


def test_early_queries_fill_their_budget() -> None:
    q, k = torch.randn(1, 2, 600, 32), torch.randn(1, 2, 600, 32)
    graph = lsh_graph(q, k, neighbors=32, causal=True)
    degree = graph.degree()
    full = 8 + 1 + 2 + 21  # window, self, global and what is left for content
    assert bool((degree[:, :, :32] == torch.arange(1, 33)).all())
    assert bool((degree[:, :, 40:] >= full - 2).float().mean() > 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer in"),
        ({"probes": -1}, "probes must be"),
        ({"max_planes": 17}, "max_planes must be"),
        ({"hash": "minhash"}, "hash must be 'hyperplane' or 'cross_polytope'"),
        ({"candidates": 0}, "candidates must be"),
        ({"limit": 0}, "limit must be"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseAttention(SSAConfig(d_model=32, num_heads=2, sources={"lsh": options}))


def test_non_finite_planes_are_an_error() -> None:
    layer = SparseAttention(SSAConfig(d_model=32, num_heads=2, num_neighbors=24))
    source = layer.router.sources["lsh"]
    assert isinstance(source, LSH)
    source.planes[0, 0, 0] = math.nan
    with pytest.raises(ConfigError, match="not finite"):
        layer(torch.randn(1, 100, 32))


@pytest.mark.parametrize(("length", "original"), [(1024, 1.01), (2048, 1.12), (4096, 1.39)])
def test_lift_over_random_candidates_beats_the_original(length: int, original: float) -> None:
    """Gaussian data, defaults: recall divided by the share of keys looked at (listed by hashing, window, global)."""
    q, k = torch.randn(1, 1, length, 64), torch.randn(1, 1, length, 64)
    graph = lsh_graph(q, k)
    looked_at = graph.keys_scored()["lsh"] + sum(graph.slots_by_source()[n] for n in ("self", "window", "global"))
    assert recall_at_32(q, k, graph) / (looked_at / length) > original


def test_recall_with_the_budget_of_the_original() -> None:
    """Scoring 98% of 1,024 keys, as the original does, finds at least its 99.3% of the best 32."""
    q, k = torch.randn(1, 2, 1024, 64), torch.randn(1, 2, 1024, 64)
    graph = lsh_graph(q, k, candidates=512, rounds=6)
    looked_at = graph.keys_scored()["lsh"] + 19
    assert looked_at / 1024 < 0.985
    assert recall_at_32(q, k, graph) >= 0.993
