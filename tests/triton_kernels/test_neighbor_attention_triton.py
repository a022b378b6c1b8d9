"""The Triton kernels of the attention op, in the interpreter: every branch against the reference."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssa_framework import NeighborGraph
from ssa_framework.errors import BackendUnavailableError
from ssa_framework.ops import triton_runtime
from ssa_framework.ops.neighbor_attention import (
    api,
    available_backends,
    neighbor_attention,
    reference,
    triton_cuda,
    triton_support,
)
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from test_attention_parts import slices_of, spans_of, summaries_of

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tensors(
    queries: int = 5,
    keys: int = 41,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    value_dim: int | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    q = torch.randn(batch, heads[0], queries, dim)
    k = torch.randn(batch, heads[1], keys, dim)
    v = torch.randn(batch, heads[1], keys, value_dim or dim)
    return [x.to(dtype) for x in (q, k, v)]


def lists(shape: tuple[int, int], queries: int, keys: int, slots: int, parts: GraphParts, empty: float = 0.2) -> Tensor:
    """Random lists that hold no key of the band or the columns, with empty slots anywhere."""
    slots = min(slots, keys)
    neighbors = torch.rand(*shape, queries, keys).argsort(-1)[..., :slots].sort(-1).values.int()
    position = torch.arange(queries)[:, None] + parts.query_offset
    if parts.causal:
        neighbors = neighbors.masked_fill(neighbors > position, -1)
    if parts.has_band:
        after = 0 if parts.causal else parts.band_after
        inside = (neighbors >= position - parts.band_before) & (neighbors <= position + after)
        neighbors = neighbors.masked_fill(inside, -1)
    if parts.columns is not None:
        neighbors = neighbors.masked_fill(torch.isin(neighbors, parts.columns), -1)
    return neighbors.masked_fill(torch.rand(neighbors.shape) < empty, -1)


def run_triton(inputs: list[Tensor], parts: GraphParts, grads: tuple[Tensor, Tensor], scale: float) -> list[Tensor]:
    options = {"scale": scale, "dropout_p": 0.0, "seed": 0}
    out, lse = triton_cuda.forward(*inputs, parts, fp32_weights=False, **options)
    got = triton_cuda.backward(*grads, *inputs, out, lse, parts, **options)
    assert [x.dtype for x in got[:3]] == [x.dtype for x in inputs]
    assert [x.dtype for x in got[4:]] == [torch.float32] * 2
    return [out, lse, *got[:3], *(got[4:] if parts.summary_k is not None else ())]


def run_reference(inputs: list[Tensor], parts: GraphParts, grads: tuple[Tensor, Tensor], scale: float) -> list[Tensor]:
    summaries = [x for x in (parts.summary_k, parts.summary_v) if x is not None]
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *summaries)]
    parts = replace(parts, **dict(zip(("summary_k", "summary_v"), leaves[3:], strict=False)))
    out, lse = reference.forward(*leaves[:3], parts, scale=scale, dropout_p=0.0, fp32_weights=False)
    reachable = torch.where(lse == -torch.inf, 0.0, lse)  # its gradient is 0, that of -inf would be NaN
    total = (out * grads[0].to(out.dtype)).sum() + (reachable * grads[1].to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_summary_k", "grad_summary_v")


def check(inputs: list[Tensor], parts: GraphParts, scale: float = 0.3) -> list[Tensor]:
    """Forward, lse and all gradients: at most a few times the error that the reference makes in the same dtype."""
    q, _, v = inputs
    out_shape = (*q.shape[:3], v.shape[-1])
    grads = (torch.randn(out_shape).to(q.dtype), torch.randn(q.shape[:3]))
    got = run_triton(inputs, parts, grads, scale)
    same = run_reference(inputs, parts, grads, scale)
    doubled = ("summary_k", "summary_v", "summary_log_weight")
    there = {name: getattr(parts, name).double() for name in doubled if getattr(parts, name) is not None}
    exact = run_reference(
        [x.double() for x in inputs], replace(parts, **there), (grads[0].double(), grads[1].double()), scale
    )
    empty = exact[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, empty)
    assert bool((got[0][empty] == 0).all())
    for name, a, b, c in zip(NAMES, got, same, exact, strict=False):
        if name == "lse":
            a, b, c = (x.masked_fill(empty, 0.0) for x in (a, b, c))
        own = float((b.double() - c).norm())
        # scores of summaries, which are rounded like keys, are part of the lse
        rounded = name != "lse" or parts.summary_k is not None
        floor = (EPSILON[q.dtype] if rounded else 1e-6) * float(c.norm())
        assert bool(a.isfinite().all()), name
        error = float((a.double() - c).norm())
        assert error <= 3 * own + 2 * floor + 1e-12, f"{name}: error {error}, reference {own}, floor {floor}"
    return got


MIX = GraphParts(band_before=3, band_after=2, columns=torch.tensor([0, 5, 30], dtype=torch.int32))


@pytest.mark.parametrize(
    ("list_shape", "causal", "dtype"),
    [
        ((2, 4), False, torch.float32),
        ((2, 4), True, torch.bfloat16),
        ((2, 4), True, torch.float16),
        ((2, 2), False, torch.bfloat16),
        ((2, 2), True, torch.float16),
        ((2, 2), False, torch.float32),
        ((1, 1), False, torch.float16),
        ((1, 1), True, torch.float32),
        ((1, 1), True, torch.bfloat16),
    ],
    ids=str,
)
def test_all_parts(list_shape: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    parts = replace(MIX, causal=causal, query_offset=30)
    parts = replace(parts, neighbors=lists(list_shape, 3, 41, 35, parts))
    check(tensors(3, dtype=dtype), parts)


PARTS = {
    "band": replace(MIX, columns=None),
    "wide-band": GraphParts(band_before=100, band_after=100),
    "causal-band": replace(MIX, columns=None, causal=True),
    "columns": replace(MIX, band_before=-1, band_after=-1),
    "causal-columns": replace(MIX, band_before=-1, band_after=-1, causal=True),
    "many-columns": replace(MIX, columns=torch.arange(1, 41, 2, dtype=torch.int32)),
    "before-the-keys": replace(MIX, query_offset=-20),
    "past-the-keys": replace(MIX, query_offset=20),
    "nothing": GraphParts(),
}


@pytest.mark.parametrize("name", PARTS)
def test_without_lists(name: str) -> None:
    check(tensors(), PARTS[name])


@pytest.mark.parametrize("list_shape", [(2, 4), (1, 2)], ids=["per-head", "per-group"])
def test_lists_only(list_shape: tuple[int, int]) -> None:
    neighbors = lists(list_shape, 5, 41, 20, GraphParts())
    neighbors[:, :, 2:4] = -1
    got = check(tensors(), GraphParts(neighbors=neighbors))
    assert bool((got[1][:, :, 2:4] == -torch.inf).all())


def test_unsorted_lists() -> None:
    neighbors = torch.rand(2, 2, 5, 41).argsort(-1)[..., :20].int()
    check(tensors(), GraphParts(neighbors=neighbors))


@pytest.mark.parametrize("mask_batch", [1, 2])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_masks(mask_batch: int, causal: bool) -> None:
    keep = torch.rand(mask_batch, 41) > 0.3
    segments = (torch.arange(41).expand(mask_batch, -1) // 9).int()
    parts = replace(MIX, causal=causal, key_keep=keep, query_segments=segments[:, 25:30], key_segments=segments)
    check(tensors(), replace(parts, neighbors=lists((1, 1), 5, 41, 8, parts)))
    check(tensors(), replace(parts, query_segments=None, key_segments=None))
    check(tensors(), replace(parts, key_keep=None))


@pytest.mark.parametrize("dim", [1, 24])
@pytest.mark.parametrize("value_dim", [None, 5], ids=["same", "five"])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1)], ids=str)
def test_widths(heads: tuple[int, int], dim: int, value_dim: int | None) -> None:
    inputs = tensors(5, 13, heads, dim, value_dim)
    check(inputs, replace(MIX, columns=MIX.columns[:2], neighbors=lists((2, heads[1]), 5, 13, 5, MIX)))


@pytest.mark.parametrize("heads", [(8, 8), (16, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("per_head", [False, True], ids=["per-group", "per-head"])
def test_head_groups(heads: tuple[int, int], per_head: bool) -> None:
    shape = (1, heads[0] if per_head else heads[1])
    check(tensors(3, 33, heads, batch=1), replace(MIX, neighbors=lists(shape, 3, 33, 12, MIX)))


@pytest.mark.parametrize("queries", [1, 33])
def test_lengths(queries: int) -> None:
    parts = replace(MIX, columns=MIX.columns[:1], query_offset=65 - queries)
    parts = replace(parts, neighbors=lists((1, 1), queries, 65, 33, parts))
    check(tensors(queries, 65, (2, 1), batch=1, dtype=torch.bfloat16), parts)


def test_strided_and_expanded_inputs() -> None:
    base = torch.randn(2, 19, 4, 48)
    q, k, v = (x.transpose(1, 2) for x in base.split(16, dim=-1))
    k = k[:, :1].expand(-1, 2, -1, -1)
    v = v[:, :2].flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2)
    neighbors = lists((1, 1), 19, 19, 10, GraphParts())
    neighbors = neighbors.transpose(-1, -2).contiguous().transpose(-1, -2).expand(2, 2, -1, -1)
    check([q, k, v], GraphParts(neighbors=neighbors))


def test_fp32_weights_are_closer_to_exact() -> None:
    inputs = tensors(7, 257, batch=1, dtype=torch.bfloat16)
    parts = GraphParts(neighbors=lists((1, 2), 7, 257, 200, GraphParts()))
    exact = run_reference([x.double() for x in inputs], parts, (torch.zeros(()), torch.zeros(())), 0.3)[0]

    def error(fp32: bool) -> float:
        options = {"scale": 0.3, "dropout_p": 0.0, "seed": 0, "fp32_weights": fp32}
        return float((triton_cuda.forward(*inputs, parts, **options)[0].double() - exact).norm())

    assert error(True) < error(False)


@pytest.mark.parametrize("content", ["nothing", "lists", "slices"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_wide_bands_are_taken_as_tiles(monkeypatch: pytest.MonkeyPatch, causal: bool, content: str) -> None:
    monkeypatch.setattr("ssa_framework.ops.neighbor_attention.triton_call._WIDE_BAND", 3)
    segments = (torch.arange(41)[None] // 9).int()
    parts = replace(MIX, causal=causal, query_offset=30, key_keep=torch.rand(2, 41) > 0.3)
    parts = replace(parts, query_segments=segments[:, 30:35], key_segments=segments)
    if content == "lists":
        parts = replace(parts, neighbors=lists((1, 2), 5, 41, 12, parts))
    if content == "slices":
        parts = with_slices(parts, 2, 5, 41)
    check(tensors(), parts)
    if content == "nothing":
        check(tensors(), replace(parts, columns=None))
        check(tensors(), replace(parts, query_offset=-20))


@pytest.mark.parametrize(
    ("name", "value"),
    [("_SORTED_AT_ONCE", 2**27), ("_SORTED_AT_ONCE", 100), ("_INT16_VALUES", 2)],
    ids=["at-once", "list-by-list", "int32"],
)
def test_same_inputs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    monkeypatch.setattr(f"ssa_framework.ops.neighbor_attention.triton_invert.{name}", value)
    parts = replace(MIX, neighbors=lists((2, 2), 5, 41, 20, MIX))
    torch.manual_seed(1)
    first = check(tensors(), parts)
    torch.manual_seed(1)
    again = check(tensors(), parts)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def with_spans(parts: GraphParts, queries: int, keys: int, length: int = 16, batch: int = 2) -> GraphParts:
    start, end = spans_of(queries, keys, parts.query_offset, length, batch)
    return replace(parts, span_start=start, span_end=end)


def with_slices(
    parts: GraphParts, heads: int, queries: int, keys: int, per_query: int = 3, batch: int = 2, repeats: int = 1
) -> GraphParts:
    """``repeats`` permutations of the keys one behind the other, of which each query attends slices of one."""
    order = torch.stack([torch.randperm(keys) for _ in range(batch * heads * repeats)]).view(batch, heads, -1).int()
    start, end = slices_of(order[..., :keys], heads, queries, per_query, batch)
    shift = torch.randint(0, repeats, (batch, heads, queries, 1)).int() * keys
    return replace(parts, slice_order=order, slice_start=start + shift, slice_end=end + shift)


def with_summaries(
    parts: GraphParts,
    heads: tuple[int, int],
    count: int,
    queries: int,
    dims: tuple[int, int] = (16, 16),
    levels: int = 1,
    batch: int = 2,
) -> GraphParts:
    return replace(parts, **summaries_of(heads, count, queries, dims, torch.float32, batch, levels))


@pytest.mark.parametrize(
    ("graph_heads", "causal", "dtype"),
    [
        (4, False, torch.float32),
        (4, True, torch.bfloat16),
        (2, False, torch.float16),
        (2, True, torch.float32),
        (2, True, torch.bfloat16),
    ],
    ids=str,
)
def test_everything_at_once(graph_heads: int, causal: bool, dtype: torch.dtype) -> None:
    parts = replace(MIX, causal=causal, query_offset=20)
    parts = with_slices(with_spans(parts, 6, 41), graph_heads, 6, 41, repeats=2)
    parts = with_summaries(parts, (graph_heads, 2), 70, 6, levels=graph_heads // 2)
    check(tensors(6, dtype=dtype), parts)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask_batch", [1, 2])
def test_masked_parts(mask_batch: int, causal: bool) -> None:
    segments = (torch.arange(41).expand(mask_batch, -1) // 9).int()
    masks = {
        "key_keep": torch.rand(mask_batch, 41) > 0.3,
        "query_segments": segments[:, 25:31],
        "key_segments": segments,
    }
    parts = with_slices(with_spans(replace(MIX, causal=causal, query_offset=25), 6, 41), 2, 6, 41)
    check(tensors(6), replace(parts, **masks))
    parts = with_spans(GraphParts(causal=causal, query_offset=25), 6, 41, batch=mask_batch)
    check(tensors(6), replace(parts, **masks))
    check(tensors(6), replace(parts, key_keep=masks["key_keep"]))


ALONE = {
    "spans": lambda heads, queries, keys, dims: with_spans(GraphParts(causal=True), queries, keys, 100, 1),
    "slices": lambda heads, queries, keys, dims: with_slices(GraphParts(), heads[1], queries, keys, batch=1),
    "summaries": lambda heads, queries, keys, dims: with_summaries(
        GraphParts(), heads, 150, queries, dims, levels=2, batch=1
    ),
}


@pytest.mark.parametrize("part", ALONE)
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((32, 32), torch.float16),
        ((64, 5), torch.bfloat16),
        ((96, 96), torch.float32),
        ((128, 128), torch.float32),
        ((128, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_one_part_alone(part: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    queries, heads = 5 if part == "slices" else 40, (3, 1)
    parts = ALONE[part](heads, queries, 150, dims)
    inputs = tensors(queries, 150, heads, *dims, batch=1, dtype=dtype)
    check(inputs, parts, scale=dims[0] ** -0.5)


def test_more_blocks_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and of keys; few programs, so that a block of keys takes all queries itself."""
    monkeypatch.setattr("ssa_framework.ops.neighbor_attention.triton_cuda._PROGRAMS", 1)
    parts = with_spans(GraphParts(causal=True), 150, 150, 40, batch=1)
    parts = with_summaries(parts, (1, 1), 130, 150, batch=1)
    check(tensors(150, 150, (2, 1), batch=1), parts)


@pytest.mark.parametrize("room", [1, 1000], ids=["room for all parts", "too little room"])
def test_a_slice_that_many_queries_open_is_shared_by_programs(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssa_framework.ops.neighbor_attention.triton_slices._PAIRS_OF_A_PART", 3)
    monkeypatch.setattr("ssa_framework.ops.neighbor_attention.triton_slices._BLOCKS_PER_EXTRA_PART", room / 50)
    start = torch.zeros((1, 2, 20, 2), dtype=torch.int32)
    start[..., 1] = 2 * torch.arange(20) + 5
    end = start + torch.tensor([3, 40], dtype=torch.int32)
    order = torch.stack([torch.randperm(84).int() for _ in range(2)])[None]
    check(tensors(20, 84, (4, 2), batch=2), GraphParts(slice_order=order, slice_start=start, slice_end=end))


@pytest.mark.parametrize("rows", [1, 5, 11])
def test_gradients_of_keys_take_some_queries_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(12, 41, (4, 2), batch=2)
    row_bytes = 2 * 4 * (inputs[0].shape[3] + inputs[2].shape[3])
    monkeypatch.setattr("ssa_framework.ops.neighbor_attention.triton_cuda._CACHED_BYTES", rows * row_bytes)
    parts = replace(MIX, causal=True, query_offset=30)
    check(inputs, replace(parts, neighbors=lists((2, 2), 12, 41, 9, parts)))


@pytest.mark.parametrize("size", [1, 40])
def test_slices_of_every_length(size: int) -> None:
    """From one key to several blocks; a slice that ends far behind the blocks that begin between."""
    start = torch.arange(4).int().view(1, 1, 1, 4) * size + torch.arange(3).int().view(1, 1, 3, 1)
    end = start + size
    end[..., 0, :] = start[..., 0, :]
    end[0, 0, 2] = torch.tensor([160, 0, 0, 0])
    order = torch.randperm(163).int()[None, None]
    check(tensors(3, 163, (2, 1), batch=2), GraphParts(slice_order=order, slice_start=start, slice_end=end))


def test_broadcast_parts() -> None:
    """One order for all batch elements and heads, of slices of each head; expanded tensors; no opened summaries."""
    parts = with_slices(with_spans(GraphParts(), 5, 41, batch=1), 4, 5, 41)
    order = parts.slice_order[:1, :1].expand(2, 4, -1)
    parts = with_summaries(replace(parts, slice_order=order), (1, 2), 20, 5)
    first, stop = (
        x[:1].transpose(1, 2).contiguous().transpose(1, 2) for x in (parts.summary_first, parts.summary_stop)
    )
    parts = replace(
        parts, summary_first=first, summary_stop=stop.contiguous(), span_end=parts.span_end.expand(2, -1)[:1]
    )
    check(tensors(), replace(parts, summary_opened=parts.summary_opened[:1]))
    check(tensors(), replace(parts, summary_opened=None))


def test_parts_that_hold_nothing() -> None:
    nothing = torch.zeros((1, 5), dtype=torch.int32)
    parts = GraphParts(span_start=nothing, span_end=nothing)
    check(tensors(), with_summaries(parts, (2, 2), 0, 5))
    slices = nothing[:, None, :, None]
    parts = replace(parts, slice_order=torch.arange(41).int()[None, None], slice_start=slices, slice_end=slices)
    check(tensors(), with_summaries(parts, (2, 2), 3, 5))
    check(tensors(keys=0), with_summaries(with_spans(GraphParts(), 5, 0), (2, 2), 9, 5))


def test_all_parts_give_the_same_bits_again() -> None:
    parts = with_slices(with_spans(replace(MIX, query_offset=20), 5, 41), 2, 5, 41, repeats=3)
    parts = with_summaries(parts, (2, 2), 30, 5)
    torch.manual_seed(1)
    first = check(tensors(), parts)
    torch.manual_seed(1)
    again = check(tensors(), parts)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# shrinking would take minutes
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    queries=st.integers(1, 6),
    keys=st.integers(1, 40),
    slots=st.integers(1, 40),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    offset=st.integers(-5, 20),
    causal=st.booleans(),
    band=st.tuples(st.integers(0, 5), st.integers(0, 5)) | st.just((-1, -1)),
    per_head=st.booleans(),
)
def test_any_shape(
    queries: int,
    keys: int,
    slots: int,
    kv_heads: int,
    group: int,
    offset: int,
    causal: bool,
    band: tuple[int, int],
    per_head: bool,
) -> None:
    parts = GraphParts(*band, query_offset=offset, causal=causal)
    list_heads = kv_heads * group if per_head else kv_heads
    parts = replace(parts, neighbors=lists((1, list_heads), queries, keys, slots, parts))
    check(tensors(queries, keys, (kv_heads * group, kv_heads), batch=1), parts)


def test_named_backend_serves_or_says_why_not() -> None:
    q, k, v = tensors(5, 9)
    graph = NeighborGraph.from_lists(lists((1, 1), 5, 9, 4, GraphParts()), num_keys=9, batch=2, num_heads=4)
    assert "triton" in available_backends()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for backend in ("triton", "torch"):
        out, lse = neighbor_attention(*inputs, graph, backend=backend)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.clamp(min=-9).sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def refused(*tensors: Tensor, **options: object) -> str:
        with pytest.raises(BackendUnavailableError, match="backend 'triton' cannot serve the call: ") as error:
            neighbor_attention(*tensors, graph, backend="triton", **options)
        return str(error.value)

    assert "float64" in refused(q.double(), k.double(), v.double())
    assert "no dropout" in refused(q, k, v, dropout_p=0.1)
    wide = [x.repeat(1, 1, 1, 17) for x in inputs]
    assert "up to 256, got 272" in refused(*wide)
    mask = torch.zeros(5, 9)
    graph = NeighborGraph.from_lists(graph.neighbors, num_keys=9, batch=2, num_heads=4, attn_mask=mask)
    assert "no bias" in refused(q, k, v)


def test_compiles_in_one_piece() -> None:
    q, k, v = tensors(3, 9)
    graph = NeighborGraph.from_lists(lists((1, 1), 3, 9, 4, GraphParts()), num_keys=9, batch=2, num_heads=4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighbor_attention(q, k, v, graph, backend="triton")[0]

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v), rtol=0, atol=0)


def test_other_devices_are_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="needs CUDA tensors"):
        api._choose_backend("triton", torch.empty(1, 1, 1, 1, device="meta"))


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runtime, "INTERPRETED", SimpleNamespace(value=False))
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        api._choose_backend("triton", torch.empty(1, 1, 1, 1))


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert "triton" not in available_backends()
    with pytest.raises(BackendUnavailableError, match="triton is not installed"):
        api._choose_backend("triton", torch.empty(1, 1, 1, 1))
