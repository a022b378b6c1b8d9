"""The Triton kernels for few queries, in the interpreter: every part against the reference, shared out in many ways."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssa_framework.ops.neighbor_attention import reference, triton_cuda, triton_few_call
from ssa_framework.ops.neighbor_attention.parts import GraphParts
from triton_kernels.test_neighbor_attention_triton import (
    DTYPES,
    EPSILON,
    MIX,
    lists,
    tensors,
    with_slices,
    with_spans,
    with_summaries,
)

FAR = replace(MIX, causal=True, query_offset=36)


def few(inputs: list[Tensor], parts: GraphParts, fp32: bool = False) -> tuple[Tensor, Tensor]:
    return triton_cuda.forward(*inputs, parts, scale=0.3, dropout_p=0.0, seed=0, fp32_weights=fp32)


def check(inputs: list[Tensor], parts: GraphParts) -> tuple[Tensor, Tensor]:
    """At most a few times the error that the reference makes in the same dtype."""
    assert triton_few_call.are_few(inputs[0])
    doubled = ("summary_k", "summary_v", "summary_log_weight")
    there = {name: getattr(parts, name).double() for name in doubled if getattr(parts, name) is not None}
    options = {"scale": 0.3, "dropout_p": 0.0, "fp32_weights": False}
    same = reference.forward(*inputs, parts, **options)
    exact = reference.forward(*(x.double() for x in inputs), replace(parts, **there), **options)
    got = few(inputs, parts)
    empty = exact[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, empty)
    assert bool((got[0][empty] == 0).all())
    for name, a, b, c in zip(("out", "lse"), got, same, exact, strict=True):
        a, b, c = (x.double().masked_fill(empty if x.dim() == 3 else empty[..., None], 0.0) for x in (a, b, c))
        assert bool(a.isfinite().all()), name
        rounded = name == "out" or parts.summary_k is not None
        floor = (EPSILON[inputs[0].dtype] if rounded else 1e-6) * float(c.norm())
        error, own = float((a - c).norm()), float((b - c).norm())
        assert error <= 3 * own + 2 * floor + 1e-12, f"{name}: error {error}, reference {own}, floor {floor}"
    return got


def everything(queries: int, graph_heads: int, *, masked: bool = False, levels: int = 2) -> GraphParts:
    parts = with_slices(with_spans(FAR, queries, 41, 9), graph_heads, queries, 41, repeats=2)
    parts = with_summaries(parts, (graph_heads, 2), 30, queries, levels=levels)
    if not masked:
        return parts
    segments = (torch.arange(41).expand(2, -1) // 13).int()
    return replace(
        parts,
        key_keep=torch.rand(2, 41) > 0.3,
        query_segments=segments[:, 36 : 36 + queries],
        key_segments=segments,
    )


@pytest.mark.parametrize("programs", [1, 16, 64], ids=["one program", "two shares", "more shares than slots"])
@pytest.mark.parametrize("graph_heads", [2, 4], ids=["per-group", "per-head"])
def test_shares(programs: int, graph_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_few_call, "_PROGRAMS", programs)
    monkeypatch.setattr(triton_few_call, "_SLOTS", 16)
    check(tensors(2), everything(2, graph_heads))


@pytest.fixture
def some_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_few_call, "_PROGRAMS", 16)
    monkeypatch.setattr(triton_few_call, "_SLOTS", 16)


@pytest.mark.usefixtures("some_shares")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "masked"])
def test_every_part(masked: bool, dtype: torch.dtype) -> None:
    check(tensors(3, dtype=dtype), everything(3, 2, masked=masked))


@pytest.mark.usefixtures("some_shares")
@pytest.mark.parametrize("list_shape", [(2, 4), (2, 2), (1, 1)], ids=["per-head", "per-group", "broadcast"])
def test_lists(list_shape: tuple[int, int]) -> None:
    neighbors = lists(list_shape, 4, 41, 30, FAR)
    check(tensors(4), replace(FAR, neighbors=neighbors))
    check(tensors(1), GraphParts(neighbors=neighbors[:, :, :1]))


@pytest.mark.usefixtures("some_shares")
@pytest.mark.parametrize(("heads", "dims"), [((3, 3), (24, 5)), ((9, 1), (1, 1)), ((6, 2), (40, 72))], ids=str)
def test_widths_and_groups(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    parts = with_slices(with_spans(FAR, 1, 41, 9, batch=1), heads[1], 1, 41, batch=1)
    parts = with_summaries(parts, (heads[1], heads[1]), 20, 1, dims, batch=1)
    check(tensors(1, 41, heads, *dims, batch=1), parts)


@pytest.mark.usefixtures("some_shares")
def test_opened_by_each_head_alone() -> None:
    parts = with_summaries(with_spans(FAR, 2, 41, 9), (4, 2), 30, 2)
    check(tensors(2), parts)
    check(tensors(2), replace(parts, summary_opened=None))


@pytest.mark.usefixtures("some_shares")
def test_parts_that_hold_nothing() -> None:
    nothing = torch.zeros((1, 2), dtype=torch.int32)
    check(tensors(2), GraphParts())
    check(tensors(2), GraphParts(neighbors=torch.full((1, 1, 2, 40), -1).int()))
    parts = GraphParts(span_start=nothing, span_end=nothing)
    check(tensors(2), with_summaries(parts, (2, 2), 0, 2))
    slices = nothing[:, None, :, None]
    parts = replace(parts, slice_order=torch.arange(41).int()[None, None], slice_start=slices, slice_end=slices)
    got = check(tensors(2), replace(parts, key_keep=torch.zeros(2, 41, dtype=torch.bool)))
    assert bool((got[1] == -torch.inf).all())
    check(tensors(2), with_summaries(parts, (2, 2), 3, 2))
    check(tensors(2, keys=0), with_summaries(with_spans(GraphParts(), 2, 0), (2, 2), 9, 2))


@pytest.mark.usefixtures("some_shares")
@pytest.mark.parametrize("offset", [-9, 0, 60])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_queries_anywhere(offset: int, causal: bool) -> None:
    """Positions in memory say the same as an offset, also for keys that are not there yet."""
    parts = replace(MIX, causal=causal, query_offset=offset)
    got = check(tensors(2), parts)
    inputs = tensors(2)
    again = replace(parts, query_offset=0, positions=torch.arange(offset, offset + 2).int()[None])
    for a, b in zip(few(inputs, parts), few(inputs, again), strict=True):
        assert torch.equal(a, b)
    assert got[0].shape == (2, 4, 2, 16)


@pytest.mark.usefixtures("some_shares")
def test_strided_inputs_and_fp32_weights() -> None:
    base = torch.randn(2, 41, 4, 48)
    q, k, v = (x.transpose(1, 2) for x in base.split(16, dim=-1))
    v = v[:, :2].flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2)
    inputs = [q[:, :, -2:], k[:, :1].expand(-1, 2, -1, -1), v]
    check(inputs, everything(2, 2))
    half, parts = [x.bfloat16() for x in tensors(2)], everything(2, 2)
    exact = few([x.float() for x in half], parts)[0]
    errors = [float((few(half, parts, fp32)[0].float() - exact).norm()) for fp32 in (True, False)]
    assert errors[0] <= errors[1]


@pytest.mark.usefixtures("some_shares")
def test_same_result_as_the_kernels_for_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, parts = tensors(4), everything(4, 2)
    shared_out = few(inputs, parts)
    monkeypatch.setattr(triton_few_call, "_FEW", 0)
    for a, b in zip(shared_out, few(inputs, parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
