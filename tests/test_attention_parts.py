"""Every implementation of the attention op against the reference: all parts at once, forward and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention import numba_call, numba_cpu, reference, torch_gather
from ssa_framework.ops.neighbor_attention.parts import GraphParts

IMPLEMENTATIONS = {"numba": numba_cpu, "torch": torch_gather}
OPTIONS = {"scale": 0.4, "dropout_p": 0.0, "seed": 0}


def slices_of(order: Tensor, heads: int, queries: int, per_query: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random disjoint slices of an order that is cut at random places; some are empty."""
    length = order.shape[-1]
    cuts = torch.cat(
        [torch.zeros(1), torch.randperm(length - 1)[: length // 5].sort().values + 1, torch.tensor([length])]
    )
    start, end = cuts[:-1].int(), cuts[1:].int()
    chosen = torch.rand(batch, heads, queries, start.numel()).argsort(-1)[..., :per_query]
    start, end = start[chosen], end[chosen]
    nothing = torch.rand(start.shape) < 0.2
    return start, torch.where(nothing, start, end)


def spans_of(queries: int, keys: int, offset: int, length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """The own block of each query, and for some queries nothing."""
    position = torch.arange(queries).expand(batch, -1) + offset
    start = (position // length * length).clamp(max=keys)
    end = (start + length).clamp(max=keys)
    end = torch.where(torch.rand(batch, queries) < 0.1, start, end)
    return start.int(), end.int()


def summaries_of(
    heads: tuple[int, int],
    count: int,
    queries: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    batch: int = 2,
    levels: int = 1,
) -> dict[str, Tensor]:
    weight = torch.rand(batch, heads[1], count, dtype=dtype) * 3
    weight[:, :, 3 % max(1, count) :: 7] = -torch.inf
    bounds = torch.randint(0, count + 1, (batch, queries, 2 * levels)).sort(-1).values.int()
    first, stop = bounds[..., ::2], bounds[..., 1::2]
    opened = torch.rand(batch, heads[0], queries, count + 2).argsort(-1)[..., :3].int()
    return {
        "summary_k": torch.randn(batch, heads[1], count, dims[0], dtype=dtype),
        "summary_v": torch.randn(batch, heads[1], count, dims[1], dtype=dtype),
        "summary_log_weight": weight,
        "summary_first": first,
        "summary_stop": stop,
        "summary_opened": torch.where(opened >= count, -1, opened),
    }


def tensors(
    queries: int, keys: int, dims: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, heads[0], queries, dims[0], dtype=dtype)
    return q, torch.randn(2, heads[1], keys, dims[0], dtype=dtype), torch.randn(2, heads[1], keys, dims[1], dtype=dtype)


def check(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, parts: GraphParts, tolerance: float = 1e-11
) -> tuple[Tensor, ...]:
    """Forward, and all gradients, against the reference and autograd; returns them."""
    module = IMPLEMENTATIONS[implementation]
    exact = {n: x.double().requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}
    summaries: dict[str, Tensor] = {}
    if parts.summary_k is not None and parts.summary_v is not None and parts.summary_log_weight is not None:
        summaries = {n: getattr(parts, n).double().requires_grad_() for n in ("summary_k", "summary_v")}
        summaries["summary_log_weight"] = parts.summary_log_weight.double()
    want, want_lse = reference.forward(
        *exact.values(), replace(parts, **summaries), scale=0.4, dropout_p=0.0, fp32_weights=True
    )
    out, lse = module.forward(q, k, v, parts, fp32_weights=True, **OPTIONS)

    def compare(got: Tensor, wanted: Tensor) -> None:
        wanted = wanted.detach().double()
        assert got.shape == wanted.shape
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * max(1.0, largest))

    compare(out, want)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    reached = want_lse > -torch.inf
    compare(lse.double().masked_fill(~reached, 0), want_lse.masked_fill(~reached, 0))
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    leaves = [*exact.values(), *(summaries[n] for n in ("summary_k", "summary_v") if n in summaries)]
    loss = (want * grad_out.double()).sum() + (want_lse.masked_fill(~reached, 0) * grad_lse.double()).sum()
    wanted = torch.autograd.grad(loss, leaves)
    got = module.backward(grad_out, grad_lse, q, k, v, out, lse, parts, **OPTIONS)
    for a, b in zip([*got[:3], *got[4:]], [*wanted, *([torch.zeros(())] * (5 - len(wanted)))], strict=True):
        compare(a, b)
    return out, lse, *got


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shared", [False, True], ids=["per-head", "per-group"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("sizes", [(33, 41), (200, 300), (1, 70), (130, 16)], ids=str)
def test_everything_at_once(
    implementation: str, dtype: torch.dtype, causal: bool, shared: bool, masked: bool, sizes: tuple[int, int]
) -> None:
    queries, keys = sizes
    heads, dims = (4, 2), (6, 3)
    q, k, v = tensors(queries, keys, dims, heads, dtype)
    lists = heads[1] if shared else heads[0]
    order = torch.stack([torch.randperm(keys) for _ in range(2 * lists)]).view(2, lists, keys).int()
    start, end = slices_of(order, lists, queries, 3)
    span_start, span_end = spans_of(queries, keys, 4, 16)
    documents = {
        "key_keep": torch.rand(2, keys) > 0.3,
        "query_segments": (torch.arange(queries)[None] + 4) // 50,
        "key_segments": torch.arange(keys)[None] // 50,
    }
    parts = GraphParts(
        band_before=5,
        band_after=2,
        query_offset=4,
        causal=causal,
        columns=torch.tensor([0, 9, 15], dtype=torch.int32),
        span_start=span_start,
        span_end=span_end,
        slice_order=order,
        slice_start=start,
        slice_end=end,
        **summaries_of((lists, heads[1]), 90, queries, dims, dtype, levels=1 + shared),
        **(documents if masked else {}),
    )
    check(implementation, q, k, v, parts, 2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("part", ["spans", "slices", "summaries", "lists"])
@pytest.mark.parametrize("dims", [(64, 64), (80, 48), (1, 1), (128, 128)], ids=str)
def test_one_part_alone(implementation: str, part: str, dims: tuple[int, int]) -> None:
    queries = keys = 150
    heads = (2, 1)
    q, k, v = tensors(queries, keys, dims, heads, torch.float32)
    q, k = q / dims[0] ** 0.5, k / dims[0] ** 0.5
    order = torch.stack([torch.randperm(keys) for _ in range(4)]).view(2, 2, keys).int()
    start, end = slices_of(order, 2, queries, 4)
    span_start, span_end = spans_of(queries, keys, 0, 40)
    listed = torch.rand(1, 2, queries, keys).argsort(-1)[..., :20].int()
    fields: dict[str, dict[str, Tensor]] = {
        "spans": {"span_start": span_start, "span_end": span_end},
        "slices": {"slice_order": order, "slice_start": start, "slice_end": end},
        "summaries": summaries_of((2, 1), 130, queries, dims, torch.float32),
        "lists": {"neighbors": listed},
    }
    check(implementation, q, k, v, GraphParts(**fields[part]), 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_broadcast_batch_and_heads(implementation: str) -> None:
    queries = keys = 70
    q, k, v = tensors(queries, keys, (8, 8), (4, 2), torch.float64)
    order = torch.randperm(keys).int()[None, None]
    start, end = slices_of(order, 1, queries, 3, batch=1)
    span_start, span_end = spans_of(queries, keys, 0, 16, batch=1)
    summaries = summaries_of((1, 2), 20, queries, (8, 8), torch.float64)
    for name in ("summary_first", "summary_stop", "summary_opened"):
        summaries[name] = summaries[name][:1]
    parts = GraphParts(
        causal=True,
        span_start=span_start,
        span_end=span_end,
        slice_order=order,
        slice_start=start,
        slice_end=end,
        **summaries,
    )
    check(implementation, q, k, v, parts, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_query_with_nothing_and_no_summary_at_all(implementation: str) -> None:
    q, k, v = tensors(5, 9, (4, 4), (2, 2), torch.float64)
    nothing = torch.zeros((1, 5), dtype=torch.int32)
    parts = GraphParts(span_start=nothing, span_end=nothing, **summaries_of((2, 2), 0, 5, (4, 4), torch.float64))
    out, lse, *grads = check(implementation, q, k, v, parts)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_scores(implementation: str) -> None:
    """Parts whose scores lie far apart: the merge neither overflows nor loses the larger one."""
    q, k, v = tensors(60, 60, (8, 8), (2, 1), torch.float64)
    order = torch.randperm(60).int()[None, None]
    start, end = slices_of(order, 1, 60, 3, batch=1)
    summaries = summaries_of((1, 1), 30, 60, (8, 8), torch.float64)
    span_start, span_end = spans_of(60, 60, 0, 16)
    for factor in (200.0, -200.0):
        parts = GraphParts(
            span_start=span_start, span_end=span_end, slice_order=order, slice_start=start, slice_end=end, **summaries
        )
        check(implementation, q * factor, k, v, parts, 1e-10)


def long_parts(
    queries: int, keys: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype
) -> GraphParts:
    """Spans and slices longer than any tile, slices that start alike and end apart, an order that has keys twice."""
    quarter = keys // 4
    order = torch.cat([torch.randperm(keys), torch.randperm(keys)]).int().expand(2, heads[0], -1)
    first = torch.randint(0, 3, (2, heads[0], queries, 1)) * quarter
    start = torch.cat([first, first + quarter], dim=-1) + torch.randint(0, 2, first.shape) * keys
    end = start + torch.randint(0, quarter + 1, start.shape)
    span_start, span_end = spans_of(queries, keys, 0, 150)
    return GraphParts(
        band_before=2,
        band_after=1,
        causal=True,
        columns=torch.tensor([3, keys // 2], dtype=torch.int32),
        span_start=span_start,
        span_end=span_end,
        slice_order=order,
        slice_start=start.int(),
        slice_end=end.int(),
        key_keep=torch.rand(2, keys) > 0.2,
        query_segments=torch.arange(queries)[None] // 170,
        key_segments=torch.arange(keys)[None] // 170,
        **summaries_of(heads, 150, queries, dims, dtype, levels=2),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lists", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_long_slices_and_spans(implementation: str, lists: int, masked: bool) -> None:
    q, k, v = tensors(330, 400, (20, 5), (4, 2), torch.float64)
    parts = long_parts(330, 400, (lists, 2), (20, 5), torch.float64)
    if not masked:
        parts = replace(parts, key_keep=None, query_segments=None, key_segments=None)
    check(implementation, q, k, v, parts, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_few_queries_of_a_long_order(implementation: str) -> None:
    q, k, v = tensors(3, 2000, (8, 8), (2, 2), torch.float64)
    parts = long_parts(3, 2000, (2, 2), (8, 8), torch.float64)
    check(implementation, q, k, v, replace(parts, query_offset=1990, summary_opened=None), 1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("heads", [(4, 2), (2, 1)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], dropout_p: float
) -> None:
    """Also where a head's queries are several tasks, forward and backward."""
    monkeypatch.setattr(numba_call, "ROWS_PER_TASK", (64, 64))
    monkeypatch.setattr(numba_call, "ROWS_PER_SLICE_TASK", 128)
    monkeypatch.setattr(numba_cpu, "ROWS_PER_GRADIENT", 64)
    q, k, v = tensors(330, 400, (8, 8), heads, torch.float32)
    parts = long_parts(330, 400, (heads[1], heads[1]), (8, 8), torch.float32)
    if not dropout_p:
        check("numba", q, k, v, parts, 3e-6)
    options = {**OPTIONS, "dropout_p": dropout_p, "seed": 7}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, lse = numba_cpu.forward(q, k, v, parts, fp32_weights=True, **options)
            results.append([out, lse, *numba_cpu.backward(out, lse * 0, q, k, v, out, lse, parts, **options)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_of_forward_and_backward_agree() -> None:
    """The output is linear in the values, and finite differences give the gradients of the rest."""
    q, k, v = tensors(150, 200, (8, 8), (4, 2), torch.float64)
    parts = long_parts(150, 200, (4, 2), (8, 8), torch.float64)
    options = {**OPTIONS, "dropout_p": 0.4, "seed": 3}
    out, lse = numba_cpu.forward(q, k, v, parts, fp32_weights=True, **options)
    kept, _ = numba_cpu.forward(q, k, v, parts, fp32_weights=True, **OPTIONS)
    assert not torch.allclose(out, kept)
    weight = torch.randn_like(out)
    grads = numba_cpu.backward(weight, torch.zeros_like(lse), q, k, v, out, lse, parts, **options)
    assert parts.summary_k is not None
    assert parts.summary_v is not None
    inputs = [q, k, v, parts.summary_k, parts.summary_v]
    for place, grad in enumerate([*grads[:3], *grads[4:]]):
        step = torch.randn_like(inputs[place]) * 1e-6
        values = []
        for sign in (1, -1):
            moved = [x + sign * step if i == place else x for i, x in enumerate(inputs)]
            there = replace(parts, summary_k=moved[3], summary_v=moved[4])
            moved_out, _ = numba_cpu.forward(*moved[:3], there, fp32_weights=True, **options)
            values.append(float((moved_out * weight).sum()))
        slope = float((grad * step).sum())
        assert abs((values[0] - values[1]) / 2 - slope) < 1e-6 * max(abs(slope), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_is_single_precision_of_the_rounded_inputs(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(150, 200, (8, 8), (4, 2), torch.float32))
    parts = long_parts(150, 200, (4, 2), (8, 8), torch.float32)
    out, lse = numba_cpu.forward(q, k, v, parts, fp32_weights=True, **OPTIONS)
    single = q.float(), k.float(), v.float()
    want, want_lse = numba_cpu.forward(*single, parts, fp32_weights=True, **OPTIONS)
    assert out.dtype == dtype
    assert torch.equal(out, want.to(dtype))
    assert torch.equal(lse, want_lse)
    grads = numba_cpu.backward(out, lse, q, k, v, out, lse, parts, **OPTIONS)
    wanted = numba_cpu.backward(out.float(), lse, *single, out.float(), lse, parts, **OPTIONS)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(grads, wanted, strict=True))
    assert [x.dtype for x in (*grads[:3], *grads[4:])] == [dtype] * 3 + [torch.float32] * 2
