"""`torch.compile` and `torch.export`: one piece, one compilation for all lengths, results and gradients of eager."""

import copy
import gc
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from ssa_framework import (
    CachedGraphSparseTransformer,
    SourceRegistry,
    SparseAttention,
    SparseMultiheadAttention,
    SparseTransformer,
    SSAConfig,
    compiled,
    convert,
    sparse_attention,
)
from ssa_framework.errors import ConfigError, GraphError
from ssa_framework.plugin import Band, Candidates, NeighborSource, RoutingContext
from ssa_framework.router import find_router

# torch asks for it itself where it traces, and then hides the warning
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

LENGTHS = (67, 200, 131)
WIDTH = 32
EDGES = torch.stack([torch.arange(64), torch.arange(64).flip(0)])
CLUSTERS = {"levels": [[64, 8], [128, 16]], "keys": 32}
MIXES: dict[str, dict[str, Any]] = {
    "default": {},
    "clusters": {"sources": {"global": {"tokens": 2}, "clusters": CLUSTERS}},
    "listed": {
        "sources": {
            "window": {"size": 3},
            "blocks": {"size": 8, "keys": 32},
            "random": {},
            "strided": {},
            "edges": {"edge_index": EDGES.tolist()},
        }
    },
    "exact": {"sources": {"self": {}, "topk": {}, "faiss": {}}},
}


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    # pytest listens to everything, and what torch traces for a viewer takes longer than the tests
    trace = logging.getLogger("torch.__trace")
    level, trace.propagate = trace.level, False
    trace.setLevel(logging.CRITICAL)
    yield
    trace.setLevel(level)
    torch._dynamo.reset()


def config(mix: str = "default", **changes: Any) -> SSAConfig:
    options = {"d_model": WIDTH, "num_heads": 2, "num_neighbors": 24, "causal": True} | MIXES[mix]
    return SSAConfig(**(options | changes))


def compile_once(
    function: Callable[..., Any], backend: str = "eager"
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """Compiled for all lengths, and the count of its compilations. The backend ``"eager"`` runs the program as it was
    traced, ``"aot_eager"`` its joint forward and backward graphs; both without generating code."""
    count = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=count, fullgraph=True, dynamic=True), count


def result(function: Callable[..., Tensor], module: nn.Module | None, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients to the floating inputs and the parameters."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    if module is not None:
        module.zero_grad()
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weight).sum().backward()
    leaves = [*inputs, *([] if module is None else module.parameters())]
    return [out.detach(), *(x.grad.clone() for x in leaves if x.grad is not None)]


def assert_same(
    function: Callable[..., Tensor],
    module: nn.Module | None,
    inputs: Callable[[int], list[Tensor]],
    backend: str = "eager",
) -> None:
    """Compiled once, for all lengths, with the output and the gradients of eager; also without gradients."""
    program, count = compile_once(function, backend)
    compilations = None
    for length in LENGTHS:
        made = inputs(length)
        torch.testing.assert_close(result(program, module, made), result(function, module, made), rtol=0, atol=1e-6)
        compilations = compilations or count.frame_count
    assert count.frame_count == compilations
    with torch.no_grad():
        torch.testing.assert_close(program(*made), function(*made), rtol=0, atol=0)
    assert not counters["graph_break"]


def x_of(length: int) -> list[Tensor]:
    return [torch.randn(2, length, WIDTH)]


# -- layers and functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "causal", "backend"),
    [("default", False, "eager"), ("clusters", True, "aot_eager"), ("listed", True, "eager"), ("exact", True, "eager")],
)
def test_layer(mix: str, causal: bool, backend: str) -> None:
    layer = SparseAttention(config(mix, causal=causal))
    assert_same(lambda x: layer(x)[0], layer, x_of, backend)


def test_function_with_grouped_queries() -> None:
    mix = config("clusters", graph_heads="kv")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True, config=mix)

    assert_same(attend, None, lambda n: [torch.randn(2, heads, n, 16) for heads in (4, 2, 2)])


@pytest.mark.parametrize("kind", [SparseTransformer, CachedGraphSparseTransformer])
def test_models(kind: type[SparseTransformer]) -> None:
    model = kind(config("clusters", rope_base=1e4), num_layers=2, vocab_size=11)
    if isinstance(model, CachedGraphSparseTransformer):
        model.reuse_every = 2
    assert_same(lambda tokens: model(tokens)[0], model, lambda n: [torch.randint(11, (2, n))])


def test_multihead_attention() -> None:
    layer = SparseMultiheadAttention(WIDTH, 2, config=config())
    assert_same(lambda x: layer(x, x, x)[0], layer, lambda n: [torch.randn(n, 2, WIDTH)])


def test_converted_encoder_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True)
    model = convert(nn.TransformerEncoder(layer, 1), config("clusters", causal=False))

    def run(x: Tensor, padding: Tensor) -> Tensor:
        return model(x, src_key_padding_mask=padding)

    assert_same(run, model, lambda n: [*x_of(n), torch.arange(n) >= torch.tensor([[n], [n - 20]])])


def test_packed_documents() -> None:
    layer = SparseAttention(config("clusters"))
    assert_same(
        lambda x, ids: layer(x, segment_ids=ids)[0], layer, lambda n: [*x_of(n), (torch.arange(n) // 50).expand(2, -1)]
    )


def test_cross_attention() -> None:
    layer = SparseAttention(config())
    assert_same(lambda x, y: layer(x, y)[0], layer, lambda n: [*x_of(n), *x_of(n + 9)])


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "boolean"])
def test_masks_of_single_edges(additive: bool) -> None:
    """The gradient to an additive mask too."""
    layer = SparseAttention(config())

    def masked(n: int) -> list[Tensor]:
        mask = torch.randn(1, 2, n, n)
        return [*x_of(n), mask if additive else mask > -1]

    assert_same(lambda x, mask: layer(x, attention_mask=mask)[0], layer, masked, "aot_eager" if additive else "eager")


def test_positions() -> None:
    mix = config("clusters")

    def attend(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        return sparse_attention(q, k, v, is_causal=True, query_positions=places, config=mix)

    def inputs(n: int) -> list[Tensor]:
        return [torch.randn(1, 2, 9, 16), torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16), torch.arange(n - 9, n)]

    assert_same(attend, None, inputs)


def test_edges_of_the_call() -> None:
    layer = SparseAttention(config(sources={"self": {}, "edges": {}}))

    def run(x: Tensor, edges: Tensor) -> Tensor:
        return layer(x, source_inputs={"edges": {"edge_index": edges}})[0]

    assert_same(run, layer, lambda n: [*x_of(n), torch.stack([torch.arange(n), torch.arange(n).flip(0)])])


@pytest.mark.parametrize("dense_below", [250, "auto"])
def test_dense_below(dense_below: int | str) -> None:
    """One program for the lengths on both sides."""
    layer = SparseAttention(config(dense_below=dense_below))
    assert_same(lambda x: layer(x)[0], layer, x_of)


@pytest.mark.parametrize("dense_below", [None, 2**20], ids=["sparse", "dense"])
def test_dropout_is_that_of_the_forward_pass_in_the_backward_pass(dense_below: int | None) -> None:
    """The output is linear in the values, so that ``<g, A v> = <Aᵀ g, v>`` for the dropped weights A."""
    mix = config(dense_below=dense_below)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, dropout_p=0.4, is_causal=True, config=mix)

    q, k, v, g = torch.randn(4, 1, 2, 120, 16, dtype=torch.float64)
    program, _ = compile_once(attend)
    torch.manual_seed(1)
    out = program(q, k, v.requires_grad_())
    out.backward(g)
    torch.testing.assert_close((out * g).sum(), (v.grad * v).sum())
    torch.manual_seed(2)
    assert not torch.equal(program(q, k, v), out)
    torch.manual_seed(1)
    torch.testing.assert_close(program(q, k, v), out, rtol=0, atol=0)


def test_autocast() -> None:
    layer = SparseAttention(config("clusters"))

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)[0]

    program, _ = compile_once(run)
    (x,) = x_of(200)
    torch.testing.assert_close(program(x), run(x), rtol=0, atol=0)


class Drawn(NeighborSource):
    """Random keys, drawn anew in each call from the generator of the context."""

    def propose(self, ctx: RoutingContext) -> Candidates:
        shape = (ctx.batch, ctx.graph_heads, ctx.num_queries, 9)
        keys = torch.randint(ctx.num_keys, shape, generator=ctx.generator, device=ctx.device)
        return Candidates(keys.int(), guaranteed=True)


class Learner(NeighborSource):
    learns = True
    needs_positions = True

    def propose(self, ctx: RoutingContext) -> Band:
        return Band(1, 1)


def registry() -> SourceRegistry:
    found = SourceRegistry()
    found.register("drawn", Drawn)
    found.register("learner", Learner)
    return found


def test_source_that_only_proposes() -> None:
    """A registry of its own, and a class that knows nothing of compilers."""
    layer = SparseAttention(config(sources={"self": {}, "drawn": {}}), registry=registry())
    assert_same(lambda x: layer(x)[0], layer, x_of)


def test_layers_compiled_one_by_one_share_a_program() -> None:
    """More layers than torch would compile again."""
    model = SparseTransformer(config(), num_layers=10)
    (x,) = x_of(80)
    expected = model(x)[0]
    count = CompileCounterWithBackend("eager")
    for layer in model.layers:
        layer.compile(backend=count, fullgraph=True, dynamic=True)
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-6)
    assert count.frame_count <= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's imports
def test_inductor_compiles_once_for_twenty_lengths() -> None:
    model = SparseTransformer(config("clusters"), num_layers=2)
    program = torch.compile(model, fullgraph=True, dynamic=True)
    for length in range(100, 300, 10):
        (x,) = x_of(length)
        out = program(x)[0]
        torch.testing.assert_close(out, model(x)[0], rtol=1e-5, atol=1e-5)
        out.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# -- what is no part of a program ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [{"return_stats": True}, {"mask_mod": lambda b, h, q, k: q - k < 50}],
    ids=lambda option: next(iter(option)),
)
def test_what_needs_a_graph_says_so_and_works_outside(option: dict[str, Any]) -> None:
    layer = SparseAttention(config())
    (x,) = x_of(90)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="NeighborGraph cannot be part of a compiled program"):
        torch.compile(lambda x: layer(x, **option)[0], backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    program = torch.compile(lambda x: layer(x, **option)[0], backend="eager")
    torch.testing.assert_close(program(x), layer(x, **option)[0])


def test_source_that_learns_is_refused_by_name() -> None:
    layer = SparseAttention(config(sources={"learner": {}}), registry=registry())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="source 'learner' learns"):
        torch.compile(layer, backend="eager", fullgraph=True)(*x_of(50))


def test_errors_of_the_router_are_those_of_eager() -> None:
    layer = SparseAttention(config(sources={"edges": {}}))
    program, _ = compile_once(lambda x: layer(x)[0])
    with pytest.raises(ConfigError, match="edges: no edges given"):
        program(*x_of(50))


# -- handles ---------------------------------------------------------------------------------------------------------


def test_copies_route_by_themselves() -> None:
    """And a copy that is gone takes no other with it."""
    layer = SparseAttention(config())
    twin, alias = copy.deepcopy(layer), copy.copy(layer.router)
    assert find_router(twin.router.handle) is twin.router
    assert find_router(layer.router.handle) is layer.router
    assert find_router(alias.handle) is alias
    del twin
    gc.collect()
    assert find_router(layer.router.handle) is layer.router


def test_a_layer_that_is_gone_is_an_error() -> None:
    router = SparseAttention(config()).router
    handle = router.handle.clone()
    del router
    gc.collect()
    with pytest.raises(GraphError, match="is gone"):
        find_router(handle)


def test_handle_follows_the_module_and_stays_out_of_its_state() -> None:
    layer = SparseAttention(config())
    assert not any("handle" in name for name, _ in [*layer.named_buffers(), *layer.state_dict().items()])
    number = layer.router.handle.shape[1]
    layer.to("meta")
    assert layer.router.handle.is_meta
    assert layer.router.handle.shape == (0, number)


# -- graphs as flat tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("length", [64, 300])
def test_pack_and_unpack(mix: str, length: int) -> None:
    layer = SparseAttention(config(mix))
    q, k, _ = layer.project(torch.randn(2, length, WIDTH))
    graph = layer.build_graph(q, k)
    parts = compiled.pack(graph)
    again = compiled.unpack(parts, q, k, graph.mask)
    assert torch.equal(again.to_dense_mask(), graph.to_dense_mask())
    assert torch.equal(again.summary_mask(), graph.summary_mask())
    assert again.band == graph.band
    assert len({part.untyped_storage().data_ptr() for part in parts if part.numel()}) == sum(
        part.numel() > 0 for part in parts
    )


# -- export ----------------------------------------------------------------------------------------------------------

RELOAD = """
import sys
import torch
import ssa_framework
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    out = torch.export.load(sys.argv[1]).module()(x)[0]
torch.testing.assert_close(out, expected, rtol=0, atol=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["default", "clusters"])
def test_export_reloads_in_a_fresh_process(mix: str, tmp_path: Path) -> None:
    """With the hash planes of the layer, which are not those of its seed."""
    layer = SparseAttention(config(mix, rope_base=1e4)).eval()
    for buffer in layer.router.buffers():
        if buffer.is_floating_point():
            buffer.neg_()
    length = torch.export.Dim("length", min=2, max=2**20)
    program = torch.export.export(layer, tuple(x_of(100)), dynamic_shapes={"x": {1: length}})
    torch.export.save(program, tmp_path / "layer.pt2")
    (x,) = x_of(321)
    with torch.no_grad():
        torch.save((x, layer(x)[0]), tmp_path / "expected.pt")
    run = [sys.executable, "-c", RELOAD, str(tmp_path / "layer.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_export_with_a_registry_of_its_own_is_refused() -> None:
    layer = SparseAttention(config(sources={"drawn": {}}), registry=registry()).eval()
    with pytest.raises(ConfigError, match="register them with"):
        torch.export.export(layer, tuple(x_of(50)))


# -- the ops ---------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    """All that the framework registers with torch, beside those that have tests of their own."""
    ours = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ssa_framework::")}
    layer = SparseAttention(config("clusters", num_heads=2, dropout=0.0))
    q, k, v = (x.detach().requires_grad_() for x in layer.project(torch.randn(1, 150, WIDTH)))
    tensors: list[Tensor] = []
    call = compiled.AttentionCall(causal=True, key_padding_mask=torch.arange(150)[None] < 140)
    handle, text = compiled._text(layer.router, tensors, call, training=True)
    options = (None, 0.25, 0.0, False, "auto", True)
    parts = compiled._route(q.detach(), k.detach(), None, tensors, handle, text)
    out, lse = compiled._attend_routed(q, k, v, None, tensors, parts, text, *options)
    checked = {
        "routed_attention": (q.detach(), k.detach(), v.detach(), None, tensors, handle, text, *options),
        "route": (q.detach(), k.detach(), None, tensors, handle, text),
        "attend_routed": (q, k, v, None, tensors, parts, text, *options),
        "attend_routed_backward": (
            torch.randn_like(out), *(x.detach() for x in (q, k, v, out, lse)), None, tensors, parts, text, *options
        ),
    }  # fmt: skip
    elsewhere = {"neighbor_attention", "neighbor_attention_backward", "group_means", "group_means_backward"}
    assert ours == set(checked) | elsewhere
    for name, arguments in checked.items():
        torch.library.opcheck(getattr(torch.ops.ssa_framework, name).default, arguments)
