"""The Triton kernels of the selection op, in the interpreter: every branch against the reference.

Queries and keys are small integers, so that every product is exact and lists can be compared key by key.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework.errors import BackendUnavailableError
from ssa_framework.masks import make_edge_mask
from ssa_framework.ops.select_neighbors import Proposed, Selection, select_neighbors, triton_cuda
from ssa_framework.ops.select_neighbors.triton_repeats import Places, find_places
from ssa_framework.ops.select_neighbors.types import Eligible
from ssa_framework.proposals import Band, Candidates, Ranges


@dataclass(frozen=True)
class Case:
    queries: int = 13
    keys: int = 29
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    dtype: torch.dtype = torch.float16
    orders: int = 3
    slices: int = 1
    buckets: int = 3
    limit: int | None = 5
    budget: int = 7
    causal: bool = True
    offset: int = 0
    spread: int = 3
    """Entries of q and k are integers below this, in absolute value."""
    one_order: bool = False
    """Orders and slices are the same for all graph heads."""
    mask: str = "plain"


CASES = {
    "causal": Case(),
    "not-causal": Case(causal=False),
    "one-query": Case(queries=1, offset=20),
    "one-key": Case(queries=3, keys=1, limit=4),
    "more-queries-than-keys": Case(queries=20, keys=9),
    "late-queries": Case(queries=5, keys=40, offset=35),
    "probes": Case(orders=2, slices=3, buckets=6, limit=4),
    "probes-not-causal": Case(orders=3, slices=2, buckets=4, limit=3, causal=False),
    "one-slice": Case(orders=1, buckets=2, limit=9),
    "one-order-many-slices": Case(orders=1, slices=4, buckets=5),
    "limit-beyond-slices": Case(limit=100),
    "no-limit": Case(limit=None),
    "fewer-candidates-than-budget": Case(budget=40, buckets=8, limit=2),
    "budget-of-one": Case(budget=1),
    "all-scores-equal": Case(spread=1, limit=9),
    "many-ties": Case(spread=2, dim=4, limit=9),
    "batch-and-groups": Case(queries=5, batch=2, heads=4, kv_heads=2),
    "one-order-for-all-heads": Case(queries=7, batch=2, heads=2, kv_heads=2, one_order=True),
    "float32-odd-dim": Case(dtype=torch.float32, dim=20),
    "bfloat16": Case(dtype=torch.bfloat16, dim=40),
    "padded": Case(batch=2, queries=9, mask="padded"),
    "packed": Case(mask="packed"),
    "band-and-columns": Case(mask="covered"),
    "band-and-columns-not-causal": Case(mask="covered", causal=False),
    "many-scores": Case(queries=2, keys=150, orders=4, limit=40, offset=148, budget=9),
}


def integers(case: Case) -> tuple[Tensor, Tensor]:
    def draw(heads: int, length: int) -> Tensor:
        return torch.randint(1 - case.spread, case.spread, (case.batch, heads, length, case.dim)).to(case.dtype)

    return draw(case.heads, case.queries), draw(case.kv_heads, case.keys)


def random_ranges(case: Case) -> Ranges:
    """Slices of sorted random buckets, some of them empty."""
    lead = (1, 1) if case.one_order else (case.batch, case.heads)
    buckets = torch.randint(0, case.buckets, (*lead, case.orders, case.keys))
    values, order = buckets.sort(dim=-1, stable=True)
    wanted = torch.randint(0, case.buckets + 1, (*lead, case.orders, case.queries * case.slices))
    start, end = torch.searchsorted(values, wanted), torch.searchsorted(values, wanted, right=True)

    def per_query(x: Tensor) -> Tensor:
        return x.unflatten(3, (case.queries, case.slices)).movedim(2, 3).int()

    return Ranges(order.int(), per_query(start), per_query(end), "topk", case.limit)


def eligible_keys(case: Case) -> Eligible:
    masks = {}
    if case.mask == "padded":
        masks["key_padding_mask"] = torch.rand(case.batch, case.keys) > 0.3
    if case.mask == "packed":
        masks["segment_ids"] = (torch.arange(case.queries)[None] // 5, torch.arange(case.keys)[None] // 5)
    mask = make_edge_mask(
        batch=case.batch,
        heads=case.heads,
        queries=case.queries,
        keys=case.keys,
        device=torch.device("cpu"),
        causal=case.causal,
        query_positions=torch.arange(case.queries) + case.offset,
        **masks,
    )
    covered = case.mask == "covered"
    columns = torch.tensor([c for c in (0, 3) if c < case.keys], dtype=torch.int32) if covered else None
    return Eligible(mask, case.heads, case.keys, Band(2, 0 if case.causal else 1) if covered else None, columns)


def assert_same(got: Selection, want: Selection) -> None:
    width = max(got.neighbors.shape[-1], want.neighbors.shape[-1])

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1)

    assert torch.equal(padded(got.neighbors), padded(want.neighbors))
    assert {n: int(x) for n, x in got.listed.items()} == {n: int(x) for n, x in want.listed.items()}
    assert {n: int(x) for n, x in got.keys_scored.items()} == {n: int(x) for n, x in want.keys_scored.items()}


def assert_equals_reference(case: Case, ranges: Ranges) -> None:
    q, k = integers(case)
    proposed, eligible = [Proposed("slices", ranges)], eligible_keys(case)
    got = select_neighbors(q, k, proposed, eligible, case.budget, "triton")
    assert_same(got, select_neighbors(q, k, proposed, eligible, case.budget, "reference"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(case: Case) -> None:
    assert_equals_reference(case, random_ranges(case))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_random_shapes_equal_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6), label="seed"))
    case = Case(
        queries=data.draw(st.integers(1, 9), label="N"),
        keys=data.draw(st.integers(1, 20), label="M"),
        orders=data.draw(st.integers(1, 3), label="S"),
        slices=data.draw(st.integers(1, 3), label="P"),
        limit=data.draw(st.sampled_from([None, 1, 3, 6]), label="limit"),
        causal=data.draw(st.booleans(), label="causal"),
        budget=data.draw(st.integers(1, 12), label="budget"),
        mask=data.draw(st.sampled_from(["plain", "padded", "packed", "covered"]), label="mask"),
    )
    assert_equals_reference(case, random_ranges(case))


def levels(case: Case) -> Ranges:
    """Two resolutions behind one another: early queries use the first, which holds only the first half of the keys."""
    half = case.queries // 2
    early, late = Case(queries=half, keys=half), Case(queries=case.queries - half, keys=case.keys)
    first, second = random_ranges(early), random_ranges(late)
    order = torch.cat([first.order, second.order], dim=-1)
    start = torch.cat([first.start, second.start + half], dim=2)
    end = torch.cat([first.end, second.end + half], dim=2)
    return Ranges(order, start, end, "topk", case.limit)


def repeating(case: Case) -> Ranges:
    """An order that holds keys twice within reach of a query."""
    ranges = random_ranges(case)
    order = torch.cat([ranges.order, ranges.order], dim=-1)
    later = case.keys * torch.randint(0, 2, ranges.start.shape, dtype=torch.int32)
    return Ranges(order, ranges.start + later, ranges.end + later, "topk", case.limit)


@pytest.mark.parametrize(("make", "broken"), [(levels, 0), (repeating, 1)], ids=["levels", "repeating"])
def test_orders_that_hold_keys_several_times(make: type[Ranges], broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(*inputs: object) -> Places:
        places = find_places(*inputs)
        seen.append(int(places.broken))
        return places

    monkeypatch.setattr(triton_cuda, "find_places", spy)
    case = Case(queries=16, keys=16, heads=2, kv_heads=2)
    assert_equals_reference(case, make(case))
    assert seen == [broken]


def test_small_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=2, queries=7)
    (q, k), proposed, eligible = integers(case), [Proposed("slices", random_ranges(case))], eligible_keys(case)
    whole = select_neighbors(q, k, proposed, eligible, 4, "triton")
    monkeypatch.setattr(triton_cuda, "WORK_BYTES", 3 * 16 * 4)  # three rows of one graph head
    assert_same(select_neighbors(q, k, proposed, eligible, 4, "triton"), whole)


def test_any_strides() -> None:
    case = Case(queries=6, keys=11, heads=2, kv_heads=2)
    (q, k), proposed, eligible = integers(case), [Proposed("slices", random_ranges(case))], eligible_keys(case)
    whole = select_neighbors(q, k, proposed, eligible, 4, "triton")
    q = q.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    k = torch.stack([k, k + 1], dim=-1)[..., 0]
    assert_same(select_neighbors(q, k, proposed, eligible, 4, "triton"), whole)


def test_width_follows_from_shapes_alone() -> None:
    case = Case(queries=3, orders=2, limit=3, budget=50, buckets=20)
    (q, k), proposed, eligible = integers(case), [Proposed("slices", random_ranges(case))], eligible_keys(case)
    assert select_neighbors(q, k, proposed, eligible, 50, "triton").neighbors.shape[-1] == 6


def test_identity_order_without_slices() -> None:
    """The latest keys before each query."""
    q, k = torch.ones(1, 1, 6, 16), torch.ones(1, 1, 6, 16)
    ranges = Ranges(None, None, None, "topk", 3)
    eligible = eligible_keys(Case(queries=6, keys=6, heads=1))
    got = select_neighbors(q, k, [Proposed("recent", ranges)], eligible, 2, "triton")
    assert got.neighbors[0, 0].tolist() == [[0, -1], [0, 1], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert int(got.keys_scored["recent"]) == 1 + 2 + 3 + 3 + 3 + 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy reports what the test is about
def test_scores_that_cannot_be_compared() -> None:
    """NaN, infinities and numbers too far apart to subtract: no hang, and other queries unharmed."""
    q, k = torch.randn(1, 1, 12, 16), torch.randn(1, 1, 40, 16)
    ranges = Ranges(torch.arange(40, dtype=torch.int32).view(1, 1, 1, 40), None, None)
    eligible = eligible_keys(Case(queries=12, keys=40, heads=1, causal=False))
    clean = select_neighbors(q, k, [Proposed("a", ranges)], eligible, 5, "triton")
    q[0, 0, 3] = float("nan")
    q[0, 0, 4] = float("inf")
    q[0, 0, 5] *= 1e38
    q[0, 0, 6] = 0
    dirty = select_neighbors(q, k, [Proposed("a", ranges)], eligible, 5, "triton")
    others = [n for n in range(12) if n not in (3, 4, 5, 6)]
    assert torch.equal(clean.neighbors[:, :, others], dirty.neighbors[:, :, others])
    assert dirty.neighbors[0, 0, 3].tolist() == [-1] * 5
    assert dirty.neighbors[0, 0, 6].tolist() == [0, 1, 2, 3, 4]
    assert dirty.neighbors.max() < 40
    assert int(dirty.keys_scored["a"]) == 12 * 40


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32"),
        ({"dim": 300}, "head dims up to 256"),
        ({"limit": 10**6, "keys": 20_000, "queries": 1}, "scores of a query"),
    ],
    ids=["float64", "wide-heads", "endless-slices"],
)
def test_says_why_it_cannot_serve(change: dict[str, object], reason: str) -> None:
    case = Case(**change)
    q, k = integers(case)
    with pytest.raises(BackendUnavailableError, match=reason):
        select_neighbors(q, k, [Proposed("a", random_ranges(case))], eligible_keys(case), 4, "triton")


def test_declines_slices_that_are_attended_whole() -> None:
    case = Case()
    q, k = integers(case)
    proposed = [Proposed("a", random_ranges(case)), Proposed("whole", Ranges(None, None, None, "all", 3))]
    with pytest.raises(BackendUnavailableError, match="whole is attended whole"):
        select_neighbors(q, k, proposed, eligible_keys(case), 4, "triton")


def test_declines_more_candidates_than_fit() -> None:
    case = Case(queries=1)
    q, k = integers(case)
    some = Proposed("some", random_ranges(case))
    many = Proposed("many", Candidates(torch.zeros((1, 1, 1, 2045), dtype=torch.int32)))
    with pytest.raises(BackendUnavailableError, match=r"there may be 2049 \(some 4, many 2045\)"):
        select_neighbors(q, k, [some, many], eligible_keys(case), 4, "triton")


def candidates(
    case: Case, width: int, lead: str = "bgn", guaranteed: bool = False, scored_by: tuple[Tensor, Tensor] | None = None
) -> Candidates:
    """Random keys with repeats and gaps; of size 1 in the dimensions that ``lead`` does not name. ``scored_by``: q and
    k, whose products come with the keys."""
    sizes = (("b", case.batch), ("g", case.heads), ("n", case.queries))
    shape = [size if name in lead else 1 for name, size in sizes]
    indices = torch.randint(-1, case.keys, (*shape, width), dtype=torch.int32)
    scores = None
    if scored_by is not None:
        q, k = scored_by
        products = q.double() @ k.double().repeat_interleave(case.heads // case.kv_heads, dim=1).mT
        scores = products.gather(-1, indices.clamp(min=0).long()).float()
    return Candidates(indices, scores, guaranteed)


def assert_mix_equals_reference(case: Case, q: Tensor, k: Tensor, mix: list[Candidates | Ranges]) -> None:
    proposed, eligible = [Proposed(f"source{i}", p) for i, p in enumerate(mix)], eligible_keys(case)
    got = select_neighbors(q, k, proposed, eligible, case.budget, "triton")
    assert_same(got, select_neighbors(q, k, proposed, eligible, case.budget, "reference"))
    assert_same(got, select_neighbors(q, k, proposed, eligible, case.budget, "torch"))


FEW = Case(queries=4, offset=9)
MIXES = {
    "one-list": (FEW, "c"),
    "one-guaranteed-list": (FEW, "e"),
    "slices-and-list": (FEW, "rc"),
    "list-before-slices": (FEW, "cr"),
    "guaranteed-after-slices": (FEW, "re"),
    "given-scores": (FEW, "s"),
    "given-and-computed-scores": (FEW, "csr"),
    "two-slices": (Case(queries=4, orders=2, offset=9), "rr"),
    "scan-and-edges": (FEW, "xe"),
    "everything": (Case(queries=4, offset=9, budget=9), "rexcs"),
    "not-causal": (Case(queries=4, causal=False), "ecr"),
    "late-queries": (Case(queries=5, keys=40, offset=35), "rec"),
    "few-candidates": (Case(queries=4, offset=9, budget=40, buckets=8, limit=2), "rce"),
    "guaranteed-take-all": (Case(queries=4, budget=4, offset=9), "erc"),
    "all-scores-equal": (Case(queries=4, offset=9, spread=1, limit=9), "rcs"),
    "many-ties": (Case(queries=4, offset=9, spread=2, dim=4, limit=9), "rec"),
    "batch-and-groups": (Case(queries=2, offset=9, batch=2, heads=4, kv_heads=2), "recs"),
    "float32-odd-dim": (Case(queries=4, offset=9, dtype=torch.float32, dim=20), "rc"),
    "bfloat16": (Case(queries=4, offset=9, dtype=torch.bfloat16, dim=40), "rc"),
    "wide-heads": (Case(queries=3, dim=256), "rc"),
    "padded": (Case(batch=2, queries=4, offset=9, mask="padded"), "rec"),
    "packed": (Case(queries=4, offset=9, mask="packed"), "rec"),
    "band-and-columns": (Case(queries=4, offset=9, mask="covered"), "recs"),
    "band-and-columns-not-causal": (Case(queries=4, offset=9, mask="covered", causal=False), "rec"),
}


@pytest.mark.parametrize(("case", "kinds"), MIXES.values(), ids=MIXES.keys())
def test_mixes_equal_the_reference(case: Case, kinds: str) -> None:
    """r: slices, c: a list, s: a list with scores, e: a guaranteed list, x: everything."""
    q, k = integers(case)
    make = {
        "r": lambda: random_ranges(case),
        "c": lambda: candidates(case, 11, "bn"),
        "s": lambda: candidates(case, 6, scored_by=(q, k)),
        "e": lambda: candidates(case, 4, "n", guaranteed=True),
        "x": Ranges.everything,
    }
    assert_mix_equals_reference(case, q, k, [make[kind]() for kind in kinds])


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random_mixes_equal_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6), label="seed"))
    kv_heads = data.draw(st.integers(1, 2), label="Hkv")
    case = Case(
        batch=data.draw(st.integers(1, 2), label="B"),
        heads=kv_heads * data.draw(st.integers(1, 2), label="share"),
        kv_heads=kv_heads,
        queries=data.draw(st.integers(1, 5), label="N"),
        keys=data.draw(st.integers(1, 20), label="M"),
        offset=data.draw(st.sampled_from([0, 12]), label="offset"),
        orders=data.draw(st.integers(1, 2), label="S"),
        limit=data.draw(st.sampled_from([None, 3]), label="limit"),
        causal=data.draw(st.booleans(), label="causal"),
        budget=data.draw(st.integers(5, 12), label="budget"),
        mask=data.draw(st.sampled_from(["plain", "padded", "packed", "covered"]), label="mask"),
    )
    q, k = integers(case)
    lead = data.draw(st.sampled_from(["", "b", "g", "n", "bgn"]), label="broadcast")
    pool = [
        random_ranges(case),
        Ranges(None, None, None, "topk", 3),
        candidates(case, data.draw(st.integers(1, 9), label="C"), lead),
        candidates(case, 3, scored_by=(q, k)),
        candidates(case, 3, lead, guaranteed=True),
        candidates(case, 2, "n", guaranteed=True),
    ]
    chosen = data.draw(st.lists(st.sampled_from(range(len(pool))), min_size=1, max_size=4, unique=True), label="pool")
    assert_mix_equals_reference(case, q, k, [pool[i] for i in chosen])


def test_given_scores_are_used_as_they_are() -> None:
    q, k = torch.ones(1, 1, 3, 16), torch.ones(1, 1, 10, 16)
    indices = torch.arange(10, dtype=torch.int32).flip(0).expand(1, 1, 3, 10)
    given = Candidates(indices, torch.arange(10.0, dtype=torch.float64).flip(0).expand(1, 1, 3, 10))
    eligible = eligible_keys(Case(queries=3, keys=10, heads=1, causal=False))
    got = select_neighbors(q, k, [Proposed("a", given)], eligible, 3, "triton")
    assert got.neighbors.tolist() == [[[[7, 8, 9]] * 3]]


def test_lists_of_any_strides() -> None:
    case = Case(queries=6, keys=11, heads=2, kv_heads=2)
    (q, k), eligible = integers(case), eligible_keys(case)
    listed = candidates(case, 5, scored_by=(q, k))
    every_other = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in (listed.indices, listed.scores)]
    transposed = [x.mT.contiguous().mT for x in (listed.indices, listed.scores)]
    q = q.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    whole = select_neighbors(q, k, [Proposed("a", listed)], eligible, 3, "triton")
    for x in (every_other, transposed):
        assert_same(select_neighbors(q, k, [Proposed("a", Candidates(*x))], eligible, 3, "triton"), whole)


def test_width_of_a_mix_follows_from_shapes_alone() -> None:
    case = Case(queries=3, orders=2, limit=3, buckets=20)
    (q, k), eligible = integers(case), eligible_keys(case)
    proposed = [Proposed("a", random_ranges(case)), Proposed("b", candidates(case, 5))]
    assert select_neighbors(q, k, proposed, eligible, 50, "triton").neighbors.shape[-1] == 11
    assert select_neighbors(q, k, proposed, eligible, 10, "triton").neighbors.shape[-1] == 10


def test_keys_beyond_32_bits_of_key_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting takes 64-bit numbers where there are more keys than 32 bits hold beside a column."""
    seen = []
    kernel = triton_cuda.merge_kernel

    class Wide:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *inputs, **constants: (
                seen.append(grid),
                kernel[grid](*inputs, **{**constants, "WIDE": True}),
            )

    monkeypatch.setattr(triton_cuda, "merge_kernel", Wide())
    case = Case(queries=4)
    q, k = integers(case)
    assert_mix_equals_reference(case, q, k, [random_ranges(case), candidates(case, 7)])
    assert seen == [(4, 2)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy reports what the test is about
def test_scores_of_a_list_that_cannot_be_compared() -> None:
    """Such keys are not listed, whatever is guaranteed is; other queries are unharmed."""
    case = Case(queries=6, keys=30, heads=1, causal=False)
    q, k = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 30, 16)
    eligible = eligible_keys(case)
    mix = [Proposed("a", candidates(case, 14)), Proposed("b", candidates(case, 2, guaranteed=True))]
    clean = select_neighbors(q, k, mix, eligible, 5, "triton").neighbors
    q[0, 0, 2] = float("nan")
    q[0, 0, 3] = float("inf")
    q[0, 0, 4] *= 1e38
    dirty = select_neighbors(q, k, mix, eligible, 5, "triton").neighbors
    assert torch.equal(clean[:, :, [0, 1, 5]], dirty[:, :, [0, 1, 5]])
    sure = sorted(set(mix[1].proposal.indices[0, 0, 2].tolist()) - {-1})
    assert dirty[0, 0, 2].tolist() == sure + [-1] * (5 - len(sure))
    assert dirty.max() < 30
