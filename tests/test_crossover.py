"""``dense_below="auto"``: dense where dense is faster, sparse where sparse is."""

import pytest
import torch

from ssa_framework import SparseAttention, SSAConfig, build_graph, crossover, sparse_attention
from ssa_framework.errors import ConfigError


@pytest.fixture(autouse=True)
def _forget_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_answers", {})


def tensors(length: int, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 2, length, 16, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize(("slow", "name"), [("sparse", "dense"), ("dense", "lsh")])
def test_the_faster_one_is_taken(monkeypatch: pytest.MonkeyPatch, slow: str, name: str) -> None:
    """The clock is made to favour one of the two; both must follow."""
    real = crossover.neighbor_attention
    clock = {"now": 0.0}

    def attend(*args: object, dense: bool, **options: object) -> object:
        clock["now"] += 2.0 if dense == (slow == "dense") else 1.0
        return real(*args, dense=dense, **options)

    monkeypatch.setattr(crossover, "neighbor_attention", attend)
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: clock["now"])
    q, k, v = tensors(1000)
    config = SSAConfig(num_neighbors=32, dense_below="auto")
    graph = build_graph(q, k, config=config)
    assert name in graph.sources
    assert graph.is_full == (slow == "sparse")
    assert sparse_attention(q, k, v, config=config).shape == q.shape
    assert len(crossover._answers) == 1


def test_each_kind_of_call_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(crossover, "_measure", lambda *args: bool(measured.append(args[1:])) or True)
    config = SSAConfig(num_neighbors=32, dense_below="auto")
    for length in (1024, 1500, 2047, 300, 511):
        build_graph(*tensors(length)[:2], config=config)
    assert len(measured) == 1  # one power of two; nothing is measured for short sequences
    build_graph(*tensors(2048)[:2], config=config)
    build_graph(*tensors(1024)[:2], config=config, is_causal=True)
    build_graph(*tensors(1024, grad=True)[:2], config=config)
    build_graph(*tensors(1024)[:2], config=config.replace(window_size=3))
    assert len(measured) == 5


def test_a_real_measurement_answers_and_leaves_no_trace() -> None:
    state = torch.random.get_rng_state()
    layer = SparseAttention(SSAConfig(d_model=32, num_heads=2, num_neighbors=32, dense_below="auto", causal=True))
    seen = []
    layer.router.registry.graph_built = lambda graph, spec: seen.append(graph)  # type: ignore[method-assign]
    x = torch.randn(1, 600, 32)
    torch.random.set_rng_state(state)
    out, _ = layer(x)
    del layer.router.registry.graph_built
    assert out.shape == x.shape
    assert len(seen) == 1  # the measured graphs are nobody's business
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(isinstance(answer, bool) for answer in crossover._answers.values())


def test_other_words_are_an_error() -> None:
    with pytest.raises(ConfigError, match="an integer >= 0, 'auto' or None, got 'always'"):
        SSAConfig(dense_below="always")
    assert SSAConfig.from_json(SSAConfig(dense_below="auto").to_json()).dense_below == "auto"
