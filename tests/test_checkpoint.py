"""Checkpoints that are refused, each with its reason; and the recomputation of activation checkpointing."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssa_framework import SourceRegistry, SparseAttention, SparseTransformer, SSAConfig
from ssa_framework.errors import CheckpointError, SSAError
from ssa_framework.graph import NeighborGraph
from ssa_framework.hookspecs import hookimpl
from ssa_framework.plugin import Candidates, NeighborSource, RoutingContext

CONFIG = SSAConfig(d_model=32, num_heads=4, num_neighbors=16, causal=True, rope_base=1e4)


def saved(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict, through a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_heads": 8}, "num_heads=4, here 8"),
        ({"num_heads": 2}, "num_heads=4, here 2"),
        ({"causal": False}, "causal=True, here False"),
        ({"rope_base": None}, "rope_base=10000.0, here None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_weights_that_mean_something_else(change: dict[str, Any], reason: str) -> None:
    """Their shapes fit, so nobody else would notice."""
    sources = {"self": {}, "window": {"size": 4}}
    state = saved(SparseTransformer(CONFIG.replace(sources=sources), 2))
    other = SparseTransformer(CONFIG.replace(sources=sources, **change), 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items() if ".attn." in name}
    with pytest.raises(CheckpointError, match=rf"layers\.0\.attn was saved with .*{reason}"):
        other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())
    other.load_state_dict(dict(state))


def test_sources_and_budget_may_change() -> None:
    state = saved(SparseAttention(CONFIG.replace(sources={"clusters": {}})))
    layer = SparseAttention(CONFIG.replace(sources={"blocks": {}}, num_neighbors=64, seed=3, dropout=0.1))
    layer.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("name", ["Wq.weight", "router.sources.lsh.planes"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_damaged_numbers(name: str, number: float) -> None:
    state = saved(SparseAttention(CONFIG))
    state[name].view(-1)[7] = number
    with pytest.raises(CheckpointError, match=f"damaged.* 1 of [0-9]+ numbers of {name}"):
        SparseAttention(CONFIG).load_state_dict(state)


def test_tensors_that_do_not_fit() -> None:
    state = saved(SparseAttention(CONFIG))
    for broken, reason in (
        ({"Wk.weight": state["Wk.weight"][:8]}, r"Wk.weight of shape \[8, 32\], this layer needs \[32, 32\]"),
        ({"Wk.weight": state["Wk.weight"].to(torch.int8)}, "as torch.int8; torch.float32 is needed"),
        ({"Wk.weight": "a string"}, "is no tensor but str"),
        ({"router.sources.lsh.planes": state["router.sources.lsh.planes"][:3]}, "saved with another configuration"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            SparseAttention(CONFIG).load_state_dict({**state, **broken})


def test_checkpoint_of_another_model() -> None:
    foreign = torch.nn.TransformerEncoderLayer(32, 4, 64).state_dict()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Wq\.weight.*Unexpected key.*self_attn"):
        SparseAttention(CONFIG).load_state_dict(foreign)
    SparseAttention(CONFIG).load_state_dict(foreign, strict=False)
    assert issubclass(CheckpointError, SSAError)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "layer.pt"
    torch.save(SparseAttention(CONFIG).state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((RuntimeError, OSError)):
        torch.load(path, weights_only=True)


def test_state_dict_without_metadata() -> None:
    """Of safetensors, torch.distributed.checkpoint, or before there was any."""
    layer, other = SparseAttention(CONFIG), SparseAttention(CONFIG)
    other.load_state_dict(dict(layer.state_dict()))
    assert torch.equal(other.Wq.weight, layer.Wq.weight)


# -- activation checkpointing ----------------------------------------------------------------------------------------


class Drawn(NeighborSource):
    """Random keys, drawn anew in each call from the generator of the context."""

    def propose(self, ctx: RoutingContext) -> Candidates:
        shape = (ctx.batch, ctx.graph_heads, ctx.num_queries, 5)
        keys = torch.randint(ctx.num_keys, shape, generator=ctx.generator, device=ctx.device)
        return Candidates(keys.int(), guaranteed=True)


class Observer:
    """Keeps what every graph attends to."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    @hookimpl
    def ssa_graph_built(self, graph: NeighborGraph, layer: Any) -> None:
        self.masks.append(graph.to_dense_mask())


RANDOM = {"self": {}, "lsh": {}, "random": {}, "drawn": {}}
CLUSTERS = {"clusters": {"levels": [[32, 8]], "keys": 16}}


@pytest.mark.parametrize("sources", [RANDOM, CLUSTERS], ids=["random", "clusters"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_recomputation_builds_the_same_graph(sources: dict[str, Any], compiled: bool, reentrant: bool) -> None:
    registry, observer = SourceRegistry(), Observer()
    registry.register("drawn", Drawn)
    registry.register_plugin(observer)
    layer = SparseAttention(CONFIG.replace(sources=sources, num_neighbors=32, dropout=0.2), registry=registry)
    if compiled and reentrant:
        layer.compile(backend="aot_eager", fullgraph=True)

    def plain(x: Tensor) -> Tensor:
        out: Tensor = layer(x)[0]
        return out

    def kept(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(plain, x, use_reentrant=reentrant)
        return out

    run = torch.compile(kept, backend="aot_eager", fullgraph=True) if compiled and not reentrant else kept
    x = torch.randn(2, 90, 32)

    def gradients(run: Any) -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        out = run(leaf)
        out.square().sum().backward()
        return [out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]

    again = gradients(run)
    assert len(observer.masks) == 2
    assert all(torch.equal(mask, observer.masks[0]) for mask in observer.masks)
    if not compiled:
        torch.testing.assert_close(again, gradients(plain), rtol=0, atol=0)
