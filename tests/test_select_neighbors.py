"""The selection op: torch equals the reference, and only the set of proposed keys matters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError, BudgetError
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.select_neighbors import Proposed, select_neighbors, torch_gather
from ssa_framework.ops.select_neighbors.types import Eligible
from ssa_framework.proposals import Band, Candidates, Ranges


def eligible_keys(batch: int, heads: int, queries: int, keys: int, causal: bool, kind: str = "plain") -> Eligible:
    masks = {}
    if kind in ("padded", "masked"):
        masks["key_padding_mask"] = some_padding(batch, keys)
    if kind == "masked":
        masks["attn_mask"] = torch.rand(batch, heads, queries, keys) > 0.2
    if kind == "packed":
        masks["segment_ids"] = (torch.arange(queries)[None] // 5, torch.arange(keys)[None] // 5)
    mask = make_edge_mask(
        batch=batch, heads=heads, queries=queries, keys=keys, device=torch.device("cpu"), causal=causal, **masks
    )
    band = Band(1, 0 if causal else 1) if kind != "plain" else None
    columns = torch.tensor([0, 3], dtype=torch.int32) if kind != "plain" else None
    return Eligible(mask, heads, keys, band, columns)


def some_padding(batch: int, keys: int) -> torch.Tensor:
    return torch.rand(batch, keys) > 0.2


def random_ranges(draw: st.DrawFn, batch: int, heads: int, queries: int, keys: int) -> Ranges:
    """Slices of sorted random buckets, as any index makes them."""
    orders, slices = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    buckets = torch.randint(0, draw(st.integers(1, 6)), (batch, heads, orders, keys))
    values, order = buckets.sort(dim=-1, stable=True)
    wanted = torch.randint(0, 6, (batch, heads, orders, queries * slices))
    start = torch.searchsorted(values, wanted).unflatten(3, (queries, slices)).movedim(2, 3)
    end = torch.searchsorted(values, wanted + 1).unflatten(3, (queries, slices)).movedim(2, 3)
    limit = draw(st.sampled_from([None, 1, 3, 100]))
    attend = draw(st.sampled_from(["topk", "topk", "all"]))
    return Ranges(order.int(), start.int(), end.int(), attend, limit)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_backend_equals_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6), label="seed"))
    batch, kv_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.integers(1, 2))
    queries, keys = data.draw(st.integers(1, 17), label="N"), data.draw(st.integers(4, 17), label="M")
    q, k = torch.randn(batch, heads, queries, 4).double(), torch.randn(batch, kv_heads, keys, 4).double()
    kind = data.draw(st.sampled_from(["plain", "padded", "masked", "packed"]), label="kind")
    eligible = eligible_keys(batch, heads, queries, keys, data.draw(st.booleans(), label="causal"), kind)
    pool = [
        Ranges.everything(),
        Ranges(None, None, None, "topk", 3),
        random_ranges(data.draw, batch, heads, queries, keys),
        Candidates(torch.randint(-1, keys, (1, heads, 1, 5), dtype=torch.int32)),
        Candidates(torch.randint(-1, keys, (batch, 1, queries, 2), dtype=torch.int32), guaranteed=True),
    ]
    chosen = data.draw(st.lists(st.sampled_from(range(len(pool))), min_size=1, max_size=4, unique=True), label="pool")
    proposed = [Proposed(f"source{i}", pool[i]) for i in chosen]
    budget = data.draw(st.integers(2, 12), label="budget")
    backend = "torch" if eligible.mask.has_explicit else data.draw(st.sampled_from(["torch", "numba"]), label="backend")
    got = select_neighbors(q, k, proposed, eligible, budget, backend=backend)
    want = select_neighbors(q, k, proposed, eligible, budget, backend="reference")
    width = max(got.neighbors.shape[-1], want.neighbors.shape[-1])

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1)

    assert torch.equal(pad(got.neighbors), pad(want.neighbors))
    assert {n: int(x) for n, x in got.listed.items()} == {n: int(x) for n, x in want.listed.items()}
    assert {n: int(x) for n, x in got.keys_scored.items()} == {n: int(x) for n, x in want.keys_scored.items()}


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 100, 8), torch.randn(2, 2, 100, 8)
    eligible = eligible_keys(2, 2, 100, 100, causal=True, kind="packed")
    proposed = [
        Proposed("scan", Ranges.everything()),
        Proposed("list", Candidates(torch.randint(-1, 100, (2, 2, 100, 9), dtype=torch.int32))),
    ]
    whole = select_neighbors(q, k, proposed, eligible, 7)
    monkeypatch.setattr(torch_gather, "WORK_BYTES", 20_000)
    monkeypatch.setattr(torch_gather, "_SCAN_TILE", 16)
    pieces = select_neighbors(q, k, proposed, eligible, 7)
    assert torch.equal(whole.neighbors, pieces.neighbors)
    assert whole.neighbors.shape[-1] == 7
    assert int(whole.keys_scored["scan"]) == int(pieces.keys_scored["scan"])


@pytest.mark.parametrize("tied", [False, True], ids=["distinct-scores", "all-scores-equal"])
def test_repeated_and_permuted_candidates_change_nothing(tied: bool) -> None:
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    if tied:
        k = k[:, :, :1].expand(-1, -1, 40, -1)
    eligible = eligible_keys(1, 2, 40, 40, causal=False)
    indices = torch.randint(-1, 40, (1, 2, 40, 20), dtype=torch.int32)
    once = select_neighbors(q, k, [Proposed("a", Candidates(indices))], eligible, 6).neighbors
    shuffled = torch.cat([indices, indices], dim=-1)[..., torch.randperm(40)]
    again = select_neighbors(q, k, [Proposed("a", Candidates(shuffled))], eligible, 6).neighbors
    assert torch.equal(once, again)
    split = [Proposed("a", Candidates(shuffled[..., :25])), Proposed("b", Candidates(shuffled[..., 10:]))]
    assert torch.equal(once, select_neighbors(q, k, split, eligible, 6).neighbors)


def test_given_scores_are_used() -> None:
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 10, 4)
    indices = torch.arange(10, dtype=torch.int32).expand(1, 1, 3, 10)
    scores = torch.arange(10.0).expand(1, 1, 3, 10)
    eligible = eligible_keys(1, 1, 3, 10, causal=False)
    chosen = select_neighbors(q, k, [Proposed("a", Candidates(indices.flip(-1), scores.flip(-1)))], eligible, 3)
    assert chosen.neighbors.tolist() == [[[[7, 8, 9]] * 3]]


def test_latest_members_before_the_query() -> None:
    """A limited causal slice gives the members just before the query, not the first of the bucket."""
    q, k = torch.randn(1, 1, 20, 4), torch.randn(1, 1, 20, 4)
    ranges = Ranges(torch.arange(20, dtype=torch.int32).view(1, 1, 1, 20), None, None, "topk", 4)
    eligible = eligible_keys(1, 1, 20, 20, causal=True)
    chosen = select_neighbors(q, k, [Proposed("a", ranges)], eligible, 4).neighbors[0, 0]
    assert chosen[2].tolist() == [0, 1, 2, -1]
    assert chosen[19].tolist() == [16, 17, 18, 19]


def test_attended_whole_beside_the_budget() -> None:
    q, k = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 12, 4)
    start = torch.zeros((1, 1, 1, 1, 1), dtype=torch.int32)
    block = Ranges(None, start, start + 8, "all")
    proposed = [Proposed("block", block), Proposed("scan", Ranges.everything())]
    eligible = eligible_keys(1, 1, 4, 12, causal=False)
    chosen = select_neighbors(q, k, proposed, eligible, 2)
    assert (chosen.neighbors >= 0).sum(-1).tolist() == [[[10, 10, 10, 10]]]
    assert bool((chosen.neighbors[..., :8] == torch.arange(8)).all())
    assert int(chosen.listed["block"]) == 32


def test_guaranteed_beats_score_and_overflow_is_an_error() -> None:
    q = torch.ones(1, 1, 1, 2)
    k = torch.arange(10.0).view(1, 1, 10, 1).expand(-1, -1, -1, 2)
    links = Proposed("links", Candidates(torch.tensor([[[[0, 1]]]], dtype=torch.int32), guaranteed=True))
    eligible = eligible_keys(1, 1, 1, 10, causal=False)
    chosen = select_neighbors(q, k, [Proposed("scan", Ranges.everything()), links], eligible, 3)
    assert chosen.neighbors.tolist() == [[[[0, 1, 9]]]]
    with pytest.raises(BudgetError, match="links up to 2 per query, the budget leaves 1"):
        select_neighbors(q, k, [links], eligible, 1)


def test_reference_refuses_large_sizes() -> None:
    q = torch.randn(1, 1, 4096, 2)
    with pytest.raises(BackendUnavailableError, match="use backend='torch'"):
        select_neighbors(
            q, q, [Proposed("a", Ranges.everything())], eligible_keys(1, 1, 4096, 4096, False), 4, "reference"
        )


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("empty", ["no-candidates", "no-slices", "no-keys-in-order"])
def test_proposals_without_room_for_a_key(backend: str, empty: str) -> None:
    q = torch.randn(1, 1, 50, 4)
    none = {
        "no-candidates": Candidates(torch.empty((1, 1, 50, 0), dtype=torch.int32)),
        "no-slices": Ranges(
            None, torch.empty((1, 1, 50, 1, 0), dtype=torch.int32), torch.empty((1, 1, 50, 1, 0)).int()
        ),
        "no-keys-in-order": Ranges(torch.empty((1, 1, 1, 0), dtype=torch.int32), None, None),
    }[empty]
    eligible = eligible_keys(1, 1, 50, 50, causal=False)
    alone = select_neighbors(q, q, [Proposed("none", none)], eligible, 4, backend)
    assert alone.neighbors is None
    both = select_neighbors(q, q, [Proposed("none", none), Proposed("scan", Ranges.everything())], eligible, 4, backend)
    assert int(both.listed["none"]) == 0
    assert int(both.listed["scan"]) == 200


@pytest.mark.parametrize("proposal", ["slices", "scan", "list"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_scores_that_cannot_be_compared(backend: str, proposal: str) -> None:
    """NaN, infinities and numbers too far apart to subtract: no hang, no overflow, and other queries unharmed."""
    q, k = torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)
    what = {
        "slices": Ranges(torch.arange(40, dtype=torch.int32).view(1, 1, 1, 40), None, None),
        "scan": Ranges.everything(),
        "list": Candidates(torch.arange(40, dtype=torch.int32).view(1, 1, 1, 40)),
    }[proposal]
    eligible = eligible_keys(1, 1, 40, 40, causal=False)
    clean = select_neighbors(q, k, [Proposed("a", what)], eligible, 5, backend).neighbors
    q[0, 0, 3] = float("nan")
    q[0, 0, 4] = float("inf")
    q[0, 0, 5] *= 1e38
    q[0, 0, 6] = 0
    dirty = select_neighbors(q, k, [Proposed("a", what)], eligible, 5, backend).neighbors
    others = [n for n in range(40) if n not in (3, 4, 5, 6)]
    assert torch.equal(clean[:, :, others], dirty[:, :, others])
    assert dirty[0, 0, 3].tolist() == [-1] * 5
    assert dirty[0, 0, 6].tolist() == [0, 1, 2, 3, 4]
    assert dirty.max() < 40
