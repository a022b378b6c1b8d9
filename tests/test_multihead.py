"""`SparseMultiheadAttention` against `torch.nn.MultiheadAttention` with the same weights."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssa_framework import SSAConfig, SSAError
from ssa_framework.errors import ConfigError, DtypeError, GraphError, MaskError, ShapeError
from ssa_framework.multihead import SparseMultiheadAttention
from ssa_framework.plugin import LayerSpec, NeighborSource, Ranges, RoutingContext
from ssa_framework.registry import SourceRegistry

WIDTH, HEADS, BATCH = 24, 4, 3
EVERYTHING = SSAConfig(sources={"topk": {}}, num_neighbors=128, dense_below=0)
"""Every key is a neighbor, and the sparse path is taken nevertheless."""
LOCAL = SSAConfig(sources={"self": {}, "window": {"size": 2}, "global": {"tokens": 1}}, num_neighbors=16, dense_below=0)
HASHED = SSAConfig(sources={"self": {}, "lsh": {"rounds": 2, "candidates": 4}}, num_neighbors=8, dense_below=0)


def make_pair(
    dtype: torch.dtype = torch.float64, config: SSAConfig = EVERYTHING, **options: Any
) -> tuple[nn.MultiheadAttention, SparseMultiheadAttention]:
    dense = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in dense.parameters():  # torch starts the biases at zero, which would hide mistakes
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    sparse = SparseMultiheadAttention(WIDTH, HEADS, dtype=dtype, config=config, **options)
    sparse.load_state_dict(dense.state_dict(), strict=True)
    return dense, sparse


def make_input(length: int, width: int = WIDTH, *, batch_first: bool = True) -> Tensor:
    shape = (BATCH, length, width) if batch_first else (length, BATCH, width)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(
    dense: nn.Module, sparse: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], tolerance: float = 1e-10, **call: Any
) -> None:
    """Output and the gradients of all parameters, inputs and additive masks agree."""
    leaves = list({id(x): x for x in (*inputs, *call.values()) if isinstance(x, Tensor) and x.requires_grad}.values())
    results = []
    for module in (dense, sparse):
        out, weights = module(*inputs, need_weights=False, **call)
        assert weights is None
        if not results:
            weight = torch.randn_like(out)
        loss = (out * weight).sum()
        results.append((out, torch.autograd.grad(loss, [*module.parameters(), *leaves], allow_unused=True)))
    (want, want_grads), (got, got_grads) = results
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def padding(keys: int) -> Tensor:
    """True = ignore; every batch element keeps key 0."""
    return torch.arange(keys)[None] >= torch.tensor([[keys], [keys // 2], [1]])


def forbidden(*shape: int) -> Tensor:
    """True = not allowed; every query keeps key 0."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


MASKS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "none": lambda n, m: {},
    "padding-bool": lambda n, m: {"key_padding_mask": padding(m)},
    "padding-float": lambda n, m: {"key_padding_mask": as_float(padding(m))},
    "padding-additive": lambda n, m: {"key_padding_mask": torch.randn(BATCH, m, dtype=torch.float64)},
    "bool-2d": lambda n, m: {"attn_mask": forbidden(n, m)},
    "bool-3d": lambda n, m: {"attn_mask": forbidden(BATCH * HEADS, n, m)},
    "float-2d": lambda n, m: {"attn_mask": as_float(forbidden(n, m))},
    "additive-2d": lambda n, m: {"attn_mask": torch.randn(n, m, dtype=torch.float64)},
    "additive-3d-learned": lambda n, m: {
        "attn_mask": torch.randn(BATCH * HEADS, n, m, dtype=torch.float64, requires_grad=True)
    },
    "padding-and-bool": lambda n, m: {"key_padding_mask": padding(m), "attn_mask": forbidden(n, m)},
    "padding-and-bool-3d": lambda n, m: {
        "key_padding_mask": padding(m),
        "attn_mask": forbidden(BATCH * HEADS, n, m),
    },
    "both-additive": lambda n, m: {
        "key_padding_mask": torch.randn(BATCH, m, dtype=torch.float64),
        "attn_mask": torch.randn(BATCH * HEADS, n, m, dtype=torch.float64),
    },
}
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "length-first"])


@LAYOUTS
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention_equals_dense(mask: str, batch_first: bool) -> None:
    dense, sparse = make_pair(batch_first=batch_first)
    x = make_input(9, batch_first=batch_first)
    assert_same(dense, sparse, (x, x, x), **MASKS[mask](9, 9))


@LAYOUTS
@pytest.mark.parametrize("mask", MASKS)
def test_cross_attention_equals_dense(mask: str, batch_first: bool) -> None:
    dense, sparse = make_pair(batch_first=batch_first)
    query, memory = make_input(5, batch_first=batch_first), make_input(11, batch_first=batch_first)
    assert_same(dense, sparse, (query, memory, memory), **MASKS[mask](5, 11))


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("kdim", "vdim"), [(None, None), (10, None), (None, 14), (10, 14)], ids=["same", "kdim", "vdim", "kdim-and-vdim"]
)
def test_widths_equal_dense(kdim: int | None, vdim: int | None, bias: bool, batch_first: bool) -> None:
    dense, sparse = make_pair(batch_first=batch_first, kdim=kdim, vdim=vdim, bias=bias)
    query = make_input(5, batch_first=batch_first)
    key = make_input(7, kdim or WIDTH, batch_first=batch_first)
    value = make_input(7, vdim or WIDTH, batch_first=batch_first)
    assert_same(dense, sparse, (query, key, value))


@LAYOUTS
@pytest.mark.parametrize("mask", ["none", "padding", "bool", "per-head", "additive"])
def test_unbatched_equals_dense(mask: str, batch_first: bool) -> None:
    dense, sparse = make_pair(batch_first=batch_first)
    query = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    call = {
        "none": {},
        "padding": {"key_padding_mask": torch.arange(7) > 3},
        "bool": {"attn_mask": forbidden(5, 7)},
        "per-head": {"attn_mask": forbidden(HEADS, 5, 7)},
        "additive": {"attn_mask": torch.randn(HEADS, 5, 7, dtype=torch.float64, requires_grad=True)},
    }[mask]
    assert_same(dense, sparse, (query, memory, memory), **call)


@LAYOUTS
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 11), (11, 5), (1, 1)])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_causal_equals_dense(queries: int, keys: int, padded: bool, batch_first: bool) -> None:
    dense, sparse = make_pair(batch_first=batch_first)
    query, memory = make_input(queries, batch_first=batch_first), make_input(keys, batch_first=batch_first)
    mask = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    call = {"key_padding_mask": padding(keys)} if padded else {}
    assert_same(dense, sparse, (query, memory, memory), attn_mask=mask, is_causal=True, **call)
    with_hint, _ = sparse(query, memory, memory, attn_mask=mask, is_causal=True, **call)
    without_mask, _ = sparse(query, memory, memory, is_causal=True, **call)
    without_hint, _ = sparse(query, memory, memory, attn_mask=mask, **call)
    torch.testing.assert_close(without_mask, with_hint, rtol=0, atol=0)
    torch.testing.assert_close(without_hint, with_hint, rtol=0, atol=1e-12)


def test_causal_configuration_serves_self_attention_only() -> None:
    dense, sparse = make_pair(batch_first=True, config=EVERYTHING.replace(causal=True))
    x, memory = make_input(9), make_input(9)
    want, _ = dense(x, x, x, attn_mask=torch.ones(9, 9, dtype=torch.bool).triu(1), need_weights=False)
    torch.testing.assert_close(sparse(x, x, x)[0], want, rtol=0, atol=1e-10)
    want, _ = dense(x, memory, memory, need_weights=False)
    torch.testing.assert_close(sparse(x, memory, memory)[0], want, rtol=0, atol=1e-10)


def test_default_configuration_is_dense_for_short_inputs() -> None:
    dense, sparse = make_pair(batch_first=True, config=SSAConfig())
    x = make_input(33)
    assert_same(dense, sparse, (x, x, x), key_padding_mask=padding(33))


def test_masks_of_different_kinds_mix() -> None:
    _, sparse = make_pair(batch_first=True)
    x, mask, bias = make_input(9), forbidden(9, 9), torch.randn(BATCH, 9, dtype=torch.float64)
    got, _ = sparse(x, x, x, key_padding_mask=bias, attn_mask=mask)
    want, _ = sparse(x, x, x, key_padding_mask=bias, attn_mask=as_float(mask))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# -- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_low_precision_errs_like_dense(kind: str) -> None:
    pair = make_pair(batch_first=True)
    stored = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x, weight = make_input(17).detach().to(stored).double(), torch.randn(BATCH, 17, WIDTH).to(torch.bfloat16).double()
    for module in pair:
        module.to(stored)

    def run(module: nn.Module, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        module = copy.deepcopy(module).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, _ = module(leaf, leaf, leaf, need_weights=False, attn_mask=torch.ones(17, 17, dtype=dtype).triu(1))
        assert out.dtype == (torch.bfloat16 if autocast else dtype)
        grads = torch.autograd.grad((out * weight.to(out)).sum(), [*module.parameters(), leaf])
        return [result.double() for result in (out, *grads)]

    exact = run(pair[0], torch.float64, False)
    dense, sparse = (run(module, stored, kind == "autocast") for module in pair)
    for index, (want, reference, got) in enumerate(zip(exact, dense, sparse, strict=True)):
        # the backward pass starts from the rounded output and weights, as in flash attention; torch's plain one doesn't
        factor = 1.5 if index == 0 else 4
        assert (got - want).norm() <= factor * (reference - want).norm() + 1e-6 * want.norm()


# -- sparse ----------------------------------------------------------------------------------------------------------


def test_output_follows_the_graph() -> None:
    dense, sparse = make_pair(batch_first=True, config=LOCAL)
    x = make_input(31)
    graph = sparse.build_graph(x, x, key_padding_mask=padding(31))
    edges = graph.to_dense_mask()
    assert not edges.all()
    want, _ = dense(x, x, x, attn_mask=~edges.flatten(0, 1), need_weights=False)
    got, _ = sparse(x, x, x, key_padding_mask=padding(31))
    rows = edges.any(-1).all(1)  # dense attention gives NaN for a query without keys
    torch.testing.assert_close(got[rows], want[rows], rtol=0, atol=1e-10)
    again, _ = sparse(x, x, x, graph=graph)
    torch.testing.assert_close(again, got, rtol=0, atol=0)


def test_identity_of_query_and_key_says_self_attention() -> None:
    _, sparse = make_pair(batch_first=True, config=LOCAL)
    x = make_input(31)
    assert sparse.build_graph(x, x).band is not None
    assert sparse.build_graph(x, x.clone()).band is None
    assert sparse.build_graph(x, x.clone(), cross=False).band is not None
    assert sparse.build_graph(x, x, cross=True).band is None
    same, _ = sparse(x, x, x)
    torch.testing.assert_close(sparse(x, x.clone(), x, cross=False)[0], same, rtol=0, atol=1e-12)
    assert not torch.allclose(sparse(x, x.clone(), x)[0], same)


def test_constructor_says_cross() -> None:
    always_self = SparseMultiheadAttention(WIDTH, HEADS, config=LOCAL, cross=False, dtype=torch.float64)
    x = make_input(31, batch_first=False)
    assert always_self.build_graph(x, x.clone()).band is not None
    assert always_self.build_graph(x, x.clone(), cross=True).band is None


def test_rotary_embedding_shifts_nothing() -> None:
    _, sparse = make_pair(batch_first=True, config=EVERYTHING.replace(rope_base=10_000.0))
    plain = SparseMultiheadAttention.from_dense(make_pair(batch_first=True)[0], EVERYTHING)
    plain.load_state_dict(sparse.state_dict())
    x, memory = make_input(9), make_input(9)
    assert not torch.allclose(sparse(x, x, x)[0], plain(x, x, x)[0])
    torch.testing.assert_close(sparse(x, memory, memory)[0], plain(x, memory, memory)[0], rtol=0, atol=0)


def test_packed_documents() -> None:
    _, sparse = make_pair(batch_first=True)
    x = make_input(10)
    packed, _ = sparse(x, x, x, segment_ids=(torch.arange(10) >= 4).long())
    for part in (x[:, :4], x[:, 4:]):
        start = 0 if part.shape[1] == 4 else 4
        alone, _ = sparse(part, part, part)
        torch.testing.assert_close(packed[:, start : start + part.shape[1]], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [EVERYTHING, LOCAL, SSAConfig()], ids=["everything", "local", "default"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_padded_rows_give_no_nan(config: SSAConfig, kind: str) -> None:
    _, sparse = make_pair(batch_first=True, config=config)
    x = make_input(9)
    mask = torch.tensor([False, True, False])[:, None].expand(-1, 9)
    out, _ = sparse(x, x, x, key_padding_mask=mask if kind == "bool" else as_float(mask))
    torch.testing.assert_close(out[1], sparse.out_proj.bias.expand(9, -1), rtol=0, atol=0)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (x, *sparse.parameters()) if leaf.grad is not None)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(queries: int, keys: int) -> None:
    _, sparse = make_pair(batch_first=True)
    out, _ = sparse(make_input(queries), make_input(keys), make_input(keys))
    torch.testing.assert_close(out, sparse.out_proj.bias.expand(BATCH, queries, -1), rtol=0, atol=0)


def test_dropout_in_training_only() -> None:
    _, sparse = make_pair(batch_first=True, dropout=0.5)
    x = make_input(9)
    sparse.train()
    first, _ = sparse(x, x, x)
    second, _ = sparse(x, x, x)
    assert not torch.equal(first, second)
    sparse.eval()
    plain, _ = sparse(x, x, x)
    assert torch.equal(plain, sparse(x, x, x)[0])
    sparse.train()
    mean = torch.stack([sparse(x, x, x)[0] for _ in range(400)]).mean(0)
    assert (mean - plain).abs().max() < 0.3 * (first - plain).abs().max()


# -- module ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [EVERYTHING, HASHED, SSAConfig()], ids=["everything", "hashed", "default"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 14}], ids=["plain", "no-bias", "widths"])
def test_state_dict_both_ways(options: dict[str, Any], config: SSAConfig) -> None:
    dense, sparse = make_pair(config=config, **options)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    fresh = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    fresh.load_state_dict(sparse.state_dict(), strict=True)
    for name, parameter in dense.named_parameters():
        assert torch.equal(dict(fresh.named_parameters())[name], parameter)


class Learned(NeighborSource):
    """A source with a parameter and a buffer."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__(layer)
        self.scale = nn.Parameter(torch.ones(layer.head_dim))
        self.register_buffer("calls", torch.zeros(()))

    def propose(self, ctx: RoutingContext) -> Ranges:
        return Ranges.everything()


def test_a_source_with_parameters_stays_in_the_state_dict() -> None:
    registry = SourceRegistry()
    registry.register("learned", Learned)
    config = SSAConfig(sources={"learned": {}, "lsh": {}})
    sparse = SparseMultiheadAttention(WIDTH, HEADS, config=config, registry=registry)
    routed = [name for name in sparse.state_dict() if name.startswith("router.")]
    assert routed == ["router.sources.learned.scale", "router.sources.learned.calls"]


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(clone: Callable[[nn.Module], nn.Module]) -> None:
    _, sparse = make_pair(batch_first=True, config=HASHED)
    copied = clone(sparse)
    x = make_input(33)
    assert torch.equal(copied(x, x, x)[0], sparse(x, x, x)[0])
    assert copied._qkv_same_embed_dim is False
    assert copied.in_proj_weight is not sparse.in_proj_weight
    assert list(copied.state_dict()) == list(sparse.state_dict())


def test_same_seed_same_graph() -> None:
    x = make_input(65)
    graphs = [make_pair(batch_first=True, config=HASHED.replace(seed=seed))[1] for seed in (1, 1, 2)]
    graphs[1].load_state_dict(graphs[0].state_dict())
    graphs[2].load_state_dict(graphs[0].state_dict())
    first, second, other = (module.build_graph(x, x) for module in graphs)
    assert torch.equal(first.overlap(second), torch.ones(BATCH, HEADS, 65))
    assert first.overlap(other).mean() < 1


@pytest.mark.parametrize("options", [{}, {"kdim": 10}], ids=["packed", "separate"])
def test_parameters_can_be_reset(options: dict[str, Any]) -> None:
    _, sparse = make_pair(**options)
    before = [p.clone() for p in sparse.parameters() if p.dim() > 1 and p is not sparse.out_proj.weight]
    sparse._reset_parameters()
    after = [p for p in sparse.parameters() if p.dim() > 1 and p is not sparse.out_proj.weight]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert sparse._qkv_same_embed_dim is False
    assert not sparse.in_proj_bias.any()


def test_dtype_and_mode_reach_the_sources() -> None:
    sparse = SparseMultiheadAttention(WIDTH, HEADS, dtype=torch.float64, config=HASHED)
    assert {buffer.dtype for buffer in sparse.router.buffers()} == {torch.float64}
    assert not sparse.eval().router.training


def test_fast_path_of_torch_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch computed dense attention with the weights of a sparse module")

    _, sparse = make_pair(batch_first=True)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, dtype=torch.float64).eval()
    x = make_input(9).detach()
    assert torch.backends.mha.get_fastpath_enabled()
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fail)
    monkeypatch.setattr(torch, "_native_multi_head_attention", fail)
    with torch.inference_mode():
        with pytest.raises(AssertionError, match="dense attention"):
            layer(x)
        layer.self_attn = sparse.eval()
        layer(x)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"num_heads": 5}, "divisible by num_heads"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1"),
        ({"dropout": 1.5}, "dropout must lie in"),
        ({"config": SSAConfig(num_kv_heads=2)}, "num_kv_heads=2"),
        ({"config": SSAConfig(dropout=0.1)}, "contradicts dropout=0.0"),
        ({"config": SSAConfig(backend="fast")}, "backend 'fast' is not available"),
        ({"config": SSAConfig(sources={"lhs": {}})}, "unknown source 'lhs'"),
        ({"config": HASHED, "device": "meta"}, "source 'lsh'.*not on 'meta'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SSAError, match=message):
        SparseMultiheadAttention(**{"embed_dim": WIDTH, "num_heads": HEADS, **options})


def test_weights_are_refused() -> None:
    _, sparse = make_pair()
    x = make_input(5, batch_first=False)
    with pytest.raises(ConfigError, match=r"need_weights=False, and build_graph"):
        sparse(x, x, x, need_weights=True)
    with pytest.raises(ConfigError, match="dense N x M matrix"):
        sparse(x, x, x, None, True)


X = torch.zeros(BATCH, 5, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(
    ("inputs", "call", "error", "message"),
    [
        ((X[..., :-1], X, X), {}, ShapeError, "query must have shape .batch, length, width.*width 24"),
        ((X, X[..., :-1], X), {}, ShapeError, "key must have shape"),
        ((X, X, X[..., :-1]), {}, ShapeError, "value must have shape"),
        ((X, X[0], X[0]), {}, ShapeError, "key must have shape"),
        ((X[None], X[None], X[None]), {}, ShapeError, r"got \[1, 3, 5, 24\]"),
        ((X, X[:2], X[:2]), {}, ShapeError, "batch sizes differ: query 3, key 2"),
        ((X, X, X[:, :4]), {}, ShapeError, "key and value must agree"),
        ((X, X, None), {}, DtypeError, "value must be a tensor, got NoneType"),
        ((X, X, X), {"attn_mask": torch.zeros(5, 4)}, MaskError, r"= \[5, 5\] or \[B·H, N, M\] = \[12, 5, 5\]"),
        ((X, X, X), {"attn_mask": torch.zeros(3, 5, 5)}, MaskError, r"got \[3, 5, 5\]"),
        ((X, X, X), {"attn_mask": torch.zeros(5, 4), "is_causal": True}, MaskError, r"got \[5, 4\]"),
        ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.int32)}, DtypeError, "attn_mask must be bool"),
        ((X, X, X), {"attn_mask": "causal"}, MaskError, "attn_mask must be a tensor, got str"),
        ((X, X, X), {"key_padding_mask": torch.zeros(5, 5)}, MaskError, r"\[B, M\] = \[3, 5\], got \[5, 5\]"),
        ((X, X, X), {"key_padding_mask": torch.zeros(5)}, MaskError, r"got \[5\]"),
        ((X, X, X), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.uint8)}, DtypeError, "key_padding_mask must be"),
    ],
    ids=[
        "query-width", "key-width", "value-width", "ranks", "rank-4", "batch", "value-length", "value-none",
        "mask-shape", "mask-batch", "mask-shape-causal", "mask-dtype", "mask-type", "padding-shape", "padding-rank",
        "padding-dtype",
    ],
)  # fmt: skip
def test_call_errors(inputs: Any, call: dict[str, Any], error: type[Exception], message: str) -> None:
    _, sparse = make_pair(batch_first=True)
    with pytest.raises(error, match=message):
        sparse(*inputs, **call)


def test_nested_tensors_are_refused() -> None:
    _, sparse = make_pair(batch_first=True)
    nested = torch.nested.nested_tensor([X[0], X[0, :3]], layout=torch.jagged)
    with pytest.raises(ShapeError, match=r"nested tensor.*use_nested_tensor = False"):
        sparse(nested, nested, nested)


def test_a_given_graph_brings_its_own_masks() -> None:
    _, sparse = make_pair(batch_first=True)
    graph = sparse.build_graph(X, X)
    with pytest.raises(MaskError, match="key_padding_mask belong to the graph"):
        sparse(X, X, X, graph=graph, key_padding_mask=padding(5))
    with pytest.raises(GraphError, match="is_causal"):
        sparse(X, X, X, graph=graph, is_causal=True)
    with pytest.raises(GraphError, match="num_queries = 5, tensors have 4"):
        sparse(X[:, :4], X, X, graph=graph)
