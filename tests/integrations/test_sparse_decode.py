"""Decoding with index states in transformers' cache: however tokens come, they get what a prefill gives them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from integrations.tiny_models import CACHE, bart, causal_lm, everything, padding, positions, sparse_mix, tokens
from ssa_framework import NeighborGraph, SourceRegistry, SSAConfig
from ssa_framework.errors import ConfigError
from ssa_framework.hookspecs import hookimpl
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.integrations.transformers.cached_layer import SparseCacheLayer, adopt, find_layer
from ssa_framework.plugin import NeighborSource, Ranges

PROMPT, NEW = 100, 12
NAMES = ("llama", "gemma3-window", "gpt2")
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}
FIXED: dict[str, Any] = {"self": {}, "window": {"size": 4}, "global": {"tokens": 2}}
MIXES: dict[str, dict[str, Any]] = {
    "preset": {"global": {"tokens": 4}, "clusters": {"levels": [[16, 4], [64, 8]], "keys": 24}},
    "clusters-topk": {**FIXED, "clusters": {"levels": [[16, 4]], "keys": 24, "attend": "topk"}},
    "blocks": {**FIXED, "blocks": {"size": 8, "keys": 32}},
    "lsh": {**FIXED, "lsh": {"rounds": 3, "candidates": 8}},
    "lsh-probes": {**FIXED, "lsh": {"hash": "cross_polytope", "rounds": 2, "probes": 2, "candidates": 8}},
    "faiss": {**FIXED, "faiss": {"index": "Flat", "block": 32}},
    "topk": {**FIXED, "topk": {}},
    "several": {**FIXED, "lsh": {"rounds": 2, "candidates": 8}, "blocks": {"size": 8, "keys": 16}},
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}


class Rows:
    """A plugin that keeps which keys the queries of every graph attend."""

    def __init__(self) -> None:
        self.graphs: list[Tensor] = []

    @hookimpl
    def ssa_graph_built(self, graph: NeighborGraph, layer: object) -> None:
        self.graphs.append(graph.to_dense_mask())


def mix(name: str, **changes: Any) -> SSAConfig:
    return SSAConfig(**{"sources": MIXES[name], "num_neighbors": 24, "dense_below": 0, **changes})


def whole(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of one forward pass without a cache."""
    options = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def generated(model: PreTrainedModel, prompt: Tensor, **options: Any) -> Any:
    return model.generate(prompt, **{**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options})


def layers_of(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(layer, SparseCacheLayer)]


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Tensor, chunks: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of tokens that come in chunks, behind what is in the cache."""
    logits, start = [], 0
    for length in chunks:
        out = model(ids[:, start : start + length], **{CACHE: cache}, use_cache=True)
        cache, start = out[CACHE], start + length
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


# -- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXES)
def test_generate_is_a_prefill(name: str) -> None:
    """Token by token: the same neighbors and the same logits as all tokens at once."""
    rows, registry = Rows(), SourceRegistry()
    registry.register_plugin(rows)
    model, prompt = causal_lm("llama"), tokens(2, PROMPT)
    use_sparse_attention(model, mix(name), dense_layers=(), registry=registry)
    steps = generated(model, prompt)
    decoded, rows.graphs = rows.graphs, []
    at_once = whole(model, steps.sequences[:, :-1])
    torch.testing.assert_close(torch.stack(steps.logits, dim=1), at_once[:, PROMPT - 1 :], **TOLERANCE)
    assert len(rows.graphs) == 2
    assert len(decoded) == 2 * NEW
    for layer, want in enumerate(rows.graphs):
        for step, got in enumerate(decoded[layer::2]):
            length = PROMPT + step
            assert torch.equal(got, want[:, :, length - got.shape[2] : length, :length]), (layer, step)


@pytest.mark.parametrize("name", ["preset", "lsh"])
def test_dense_below(name: str) -> None:
    """Calls all of whose queries are dense are transformers' own, keep nothing, and change nothing that comes later."""
    model, ids, first = causal_lm("llama"), tokens(2, PROMPT + NEW), PROMPT + 4
    dense, _ = feed(model, ids, [PROMPT + NEW])
    use_sparse_attention(model, mix(name, dense_below=first + 1), dense_layers=())
    at_once, _ = feed(model, ids, [PROMPT + NEW])
    torch.testing.assert_close(at_once[:, :first], dense[:, :first], **TOLERANCE)
    assert not torch.allclose(at_once[:, first:], dense[:, first:], **TOLERANCE)
    begun, cache = feed(model, ids, [PROMPT - 10, 13])
    assert all(not layer._held for layer in layers_of(cache))
    for length in (PROMPT + 3, PROMPT + 1):  # and again, behind a cropped cache
        rest, _ = feed(model, ids[:, length:], [1] * (PROMPT + NEW - length), cache)
        assert all(layer._held for layer in layers_of(cache))
        torch.testing.assert_close(torch.cat([begun[:, :length], rest], dim=1), at_once, **TOLERANCE)
        cache.crop(PROMPT + 1 - cache.get_seq_length())


def test_dense_below_in_a_padded_batch() -> None:
    """A row has as few keys as it would have alone."""
    model, ids, mask = causal_lm("llama"), tokens(3, PROMPT + NEW), padding(3, PROMPT + NEW, "left", 30)
    use_sparse_attention(model, mix("preset", dense_below=PROMPT), dense_layers=())
    with torch.no_grad():
        one = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).logits
        out = model(ids[:, :90], attention_mask=mask[:, :90], position_ids=positions(mask)[:, :90], use_cache=True)
        logits = [out.logits]
        for end in range(91, PROMPT + NEW + 1):
            here = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, end - 1 : end]}
            out = model(ids[:, end - 1 : end], **{CACHE: out[CACHE]}, use_cache=True, **here)
            logits.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], one[real], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_left_padded(name: str) -> None:
    model, prompts, mask = causal_lm(name), tokens(3, PROMPT), padding(3, PROMPT, "left", 30)
    use_sparse_attention(model, sparse_mix(), dense_layers=())
    steps = generated(model, prompts, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(3, NEW, dtype=mask.dtype)], dim=1)
    at_once = whole(model, steps.sequences, mask)
    torch.testing.assert_close(torch.stack(steps.logits, dim=1), at_once[:, PROMPT - 1 : -1], **TOLERANCE)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", ["preset", "several"])
def test_beams(name: str, padded: bool) -> None:
    """What decides between beams is what a cache without states gives them."""
    model, prompts = causal_lm("llama"), tokens(3, PROMPT)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    if padded:
        options["attention_mask"] = padding(3, PROMPT, "left", 30)
    with use_sparse_attention(model, mix(name), dense_layers=(), decode="rebuild"):
        wanted = generated(model, prompts, **options)
    with use_sparse_attention(model, mix(name), dense_layers=()):
        found = generated(model, prompts, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, **TOLERANCE)


@pytest.mark.parametrize("name", ["preset", "lsh", "faiss"])
def test_assisted(name: str) -> None:
    """Refused drafts are cropped from the cache: the text is that of the model alone."""
    model, prompt = causal_lm("llama"), tokens(1, PROMPT)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # right at times
    use_sparse_attention(model, mix(name), dense_layers=())
    alone = generated(model, prompt, max_new_tokens=30).sequences
    assert torch.equal(generated(model, prompt, max_new_tokens=30, assistant_model=assistant).sequences, alone)


def test_sampled_sequences_share_the_prompt() -> None:
    model, prompt = causal_lm("llama"), tokens(2, PROMPT)
    use_sparse_attention(model, mix("preset"), dense_layers=())
    torch.manual_seed(1)
    steps = generated(model, prompt, do_sample=True, num_return_sequences=3)
    at_once = whole(model, steps.sequences[:, :-1])
    torch.testing.assert_close(torch.stack(steps.logits, dim=1), at_once[:, PROMPT - 1 :], **TOLERANCE)


@pytest.mark.parametrize("name", ["preset", "blocks", "faiss", "several"])
def test_chunks_crop_and_again(name: str) -> None:
    model, ids = causal_lm("llama"), tokens(2, 150)
    use_sparse_attention(model, mix(name), dense_layers=())
    want = whole(model, ids)
    chunks = [50, 1, 1, 30, *[1] * 20, 17, 31]
    got, cache = feed(model, ids, chunks)
    torch.testing.assert_close(got, want, **TOLERANCE)
    for length in (149, 97, 60, 3):
        cache.crop(length - cache.get_seq_length())
        got, cache = feed(model, ids[:, length:], [1, 149 - length] if length < 149 else [1], cache)
        torch.testing.assert_close(got, want[:, length:], **TOLERANCE)


@pytest.mark.parametrize("graph_heads", ["query", "kv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
def test_dtypes_and_graph_heads(dtype: torch.dtype, graph_heads: str) -> None:
    model, ids = causal_lm("llama").to(dtype), tokens(2, 130)
    use_sparse_attention(model, mix("preset", graph_heads=graph_heads), dense_layers=())
    got, _ = feed(model, ids, [100, *[1] * 10, 20])
    tolerance = {"rtol": 0.1, "atol": 2.0} if dtype == torch.bfloat16 else TOLERANCE
    torch.testing.assert_close(got, whole(model, ids), **tolerance)


def test_torch_backend() -> None:
    """What a device without kernels of its own takes."""
    model, ids = causal_lm("llama"), tokens(2, 130)
    use_sparse_attention(model, mix("preset", backend="torch"), dense_layers=())
    got, _ = feed(model, ids, [100, *[1] * 5, 25])
    torch.testing.assert_close(got, whole(model, ids), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quality", "balanced", "fast"])
def test_presets(name: str) -> None:
    """Long enough for two levels of clusters."""
    length = 2200
    model, ids = causal_lm("llama", max_position_embeddings=4096), tokens(1, length)
    use_sparse_attention(model, SSAConfig.preset(name, dense_below=0), dense_layers=())
    got, _ = feed(model, ids, [2000, *[1] * 60, 140])
    torch.testing.assert_close(got[:, 2000:], whole(model, ids)[:, 2000:], **TOLERANCE)


def test_sliding_windows_beside_routed_layers() -> None:
    """Layers with a window keep the cache of their own, which holds a window's keys."""
    model, ids = causal_lm("gemma3-window"), tokens(2, 130)
    use_sparse_attention(model, mix("preset"), dense_layers=())
    got, cache = feed(model, ids, [100, *[1] * 10, 20])
    torch.testing.assert_close(got, whole(model, ids), **TOLERANCE)
    assert [isinstance(layer, SparseCacheLayer) for layer in cache.layers] == [False, True]
    assert cache.layers[0].keys.shape[2] < 10


def test_encoder_and_decoder() -> None:
    """States are those of self-attention; keys of cross-attention are nobody's."""
    model, ids = bart(), tokens(2, 60)
    options = {"attention_mask": padding(2, 60, "right", 9), "max_new_tokens": 40, "do_sample": False, "num_beams": 2}
    with use_sparse_attention(model, sparse_mix(), dense_layers=(), decode="rebuild"):
        wanted = model.generate(ids, **options)
    with use_sparse_attention(model, sparse_mix(), dense_layers=()):
        assert torch.equal(model.generate(ids, **options), wanted)


def test_packed_documents_behind_no_cache() -> None:
    """Packing is for training; a call with a cache that ran before it changes nothing."""
    model, ids = causal_lm("llama"), tokens(1, 150)
    position_ids = torch.cat([torch.arange(60), torch.arange(90)])[None]
    clusters = {"clusters": MIXES["preset"]["clusters"]}  # the columns of global are those of the whole row
    use_sparse_attention(model, mix("preset", sources=clusters), dense_layers=())
    with torch.no_grad():
        model(ids, use_cache=True)
        packed = model(ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(packed[:, 60:], whole(model, ids[:, 60:]), **TOLERANCE)


# -- states are really kept ----------------------------------------------------------------------------------------


class Counting(NeighborSource):
    """The newest keys, and how often each was taken in."""

    rebuilds = False
    taken: list[int]

    def init_state(self, ctx: Any) -> dict[str, int]:
        return {"keys": 0}

    def append(self, state: dict[str, int], ctx: Any) -> dict[str, int]:
        type(self).taken.append(ctx.num_keys - ctx.first_new)
        state["keys"] = ctx.num_keys
        return state

    def crop(self, state: dict[str, int], length: int) -> dict[str, int]:
        state["keys"] = length
        return state

    def reorder(self, state: dict[str, int], index: Tensor) -> dict[str, int]:
        return state

    def propose(self, ctx: Any) -> Any:
        assert ctx.state is None or ctx.state["keys"] == ctx.num_keys
        return Ranges.everything()


@pytest.fixture
def counting() -> SourceRegistry:
    registry, Counting.taken = SourceRegistry(), []
    registry.register("counting", Counting)
    return registry


@pytest.mark.parametrize(
    ("options", "taken"),
    [({}, [40, 1, 1, 1]), ({"num_beams": 2}, [40, 1, 1, 1]), ({"padded": True}, [40, 31, 1, 1, 1, 1, 1, 1])],
    ids=["greedy", "beams", "two-paddings"],
)
def test_each_key_is_taken_in_once(options: dict[str, Any], taken: list[int], counting: SourceRegistry) -> None:
    model, prompt = causal_lm("llama", num_hidden_layers=1), tokens(2, 40)
    if options.pop("padded", False):
        options["attention_mask"] = padding(2, 40, "left", 9).flip(0)
    use_sparse_attention(model, {"counting": {}}, dense_layers=(), registry=counting, layers={0: config_of("counting")})
    model.generate(prompt, do_sample=False, max_new_tokens=4, **options)
    assert Counting.taken == taken


def config_of(source: str) -> SSAConfig:
    return SSAConfig(sources={source: {}}, num_neighbors=8, dense_below=0)


def test_decode_dense_keeps_no_states(counting: SourceRegistry) -> None:
    model = causal_lm("llama", num_hidden_layers=1)
    with use_sparse_attention(model, config_of("counting"), dense_layers=(), registry=counting, decode="dense"):
        out = model.generate(tokens(1, 40), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert Counting.taken == []
    assert not layers_of(out[CACHE])


def test_states_of_several_models_in_one_cache() -> None:
    """Two configurations on one cache, in turns: each has states of its own, and both see all keys."""
    model, ids = causal_lm("llama"), tokens(1, 130)
    dense, _ = feed(model, ids, [130])
    cache = DynamicCache(config=model.config)
    handle = use_sparse_attention(model, mix("preset"), dense_layers=())
    _, cache = feed(model, ids[:, :100], [90, *[1] * 10], cache)
    handle.undo()
    with use_sparse_attention(model, everything("topk"), dense_layers=()):
        exact, cache = feed(model, ids[:, 100:110], [1] * 10, cache)
    assert exact.isfinite().all()
    after, cache = feed(model, ids[:, 110:], [20], cache)
    assert cache.get_seq_length() == 130
    assert after.shape == dense[:, 110:].shape


def test_undone_in_the_middle() -> None:
    """A cache that a sparse model filled serves the dense one."""
    model, ids = causal_lm("llama"), tokens(2, 130)
    dense = whole(model, ids)
    with use_sparse_attention(model, everything("topk"), dense_layers=()):
        _, cache = feed(model, ids[:, :110], [100, *[1] * 10])
    got, _ = feed(model, ids[:, 110:], [1, 19], cache)
    torch.testing.assert_close(got, dense[:, 110:], **TOLERANCE)


def test_filled_by_the_dense_model() -> None:
    model, ids = causal_lm("llama"), tokens(2, 130)
    dense, cache = feed(model, ids[:, :110], [100, *[1] * 10])
    use_sparse_attention(model, everything("topk"), dense_layers=())
    got, cache = feed(model, ids[:, 110:], [1, 19], cache)
    assert len(layers_of(cache)) == 2
    wanted = whole(model, ids)
    torch.testing.assert_close(got, wanted[:, 110:], **TOLERANCE)
    torch.testing.assert_close(dense, wanted[:, :110], **TOLERANCE)


# -- the layer of the cache ----------------------------------------------------------------------------------------


def test_growth_copies_nothing_on_average() -> None:
    layer, rooms = SparseCacheLayer(), set()
    for _ in range(300):
        keys, _ = layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        rooms.add(keys.data_ptr())
    assert keys.shape == (1, 2, 300, 8)
    assert len(rooms) <= 5


@pytest.mark.parametrize("filled", ["plain", "inference-mode", "autograd"])
def test_layer_is_a_dynamic_layer(filled: str) -> None:
    """Every operation of transformers' own layer, in a row, with the same result."""
    ours, theirs = SparseCacheLayer(), transformers.cache_utils.DynamicLayer()

    def both(operation: str, *args: Any) -> None:
        for layer in (ours, theirs):
            getattr(layer, operation)(*args)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)

    def grow(length: int) -> None:
        batch = len(theirs.keys) if theirs.is_initialized else 3
        tensors = [torch.randn(batch, 2, length, 8, requires_grad=filled == "autograd") for _ in range(2)]
        with torch.inference_mode(filled == "inference-mode"):
            both("update", *tensors)

    grow(5)
    grow(1)
    both("crop", -2)
    grow(3)
    both("reorder_cache", torch.tensor([2, 0, 0]))
    grow(1)
    both("batch_repeat_interleave", 2)
    both("batch_select_indices", torch.tensor([5, 1, 3]))
    grow(70)
    both("batch_select_indices", torch.tensor([True, False, True]))
    both("crop", -74)
    grow(1)
    both("crop", -ours.get_seq_length())
    grow(4)
    with torch.inference_mode(filled == "inference-mode"):  # older versions of transformers write zeros
        both("reset")
    grow(2)


def test_another_batch_in_an_emptied_layer() -> None:
    layer = SparseCacheLayer()
    layer.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    layer.crop(-5)
    k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    keys, values = layer.update(k, v)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


def test_deep_copy() -> None:
    """A prompt that goes on in two ways."""
    model, ids, other = causal_lm("llama"), tokens(2, 130), tokens(2, 130)
    use_sparse_attention(model, mix("preset"), dense_layers=())
    other[:, :100] = ids[:, :100]
    _, cache = feed(model, ids[:, :100], [95, *[1] * 5])
    twin = copy.deepcopy(cache)
    for one, way in ((cache, ids), (twin, other)):
        got, _ = feed(model, way[:, 100:], [1, 1, 28], one)
        torch.testing.assert_close(got, whole(model, way)[:, 100:], **TOLERANCE)


def test_pickle() -> None:
    """Keys and values travel; states are made anew, and the spare room is left behind."""
    model, ids = causal_lm("llama"), tokens(2, 130)
    use_sparse_attention(model, mix("preset"), dense_layers=())
    _, cache = feed(model, ids[:, :100], [95, *[1] * 5])
    data = pickle.dumps(cache.layers)
    bare = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert len(data) < 1.1 * bare + 10_000
    cache.layers = pickle.loads(data)
    got, _ = feed(model, ids[:, 100:], [1, 29], cache)
    torch.testing.assert_close(got, whole(model, ids)[:, 100:], **TOLERANCE)


def test_keys_that_somebody_replaced() -> None:
    """States of keys that are not there any more are not used."""
    model, ids, other = causal_lm("llama"), tokens(1, 130), tokens(1, 130)
    use_sparse_attention(model, mix("preset"), dense_layers=())
    _, cache = feed(model, ids[:, :100], [100])
    _, second = feed(model, other[:, :100], [100])
    for layer, source in zip(cache.layers, second.layers, strict=True):
        layer.keys, layer.values = source.keys.clone(), source.values.clone()
    got, _ = feed(model, other[:, 100:], [1, 29], cache)
    torch.testing.assert_close(got, whole(model, other)[:, 100:], **TOLERANCE)


def test_gradients_through_a_cache() -> None:
    """Where gradients are collected, nothing is kept of the keys, and they flow."""
    model, ids = causal_lm("llama"), tokens(1, 60)
    use_sparse_attention(model, mix("preset"), dense_layers=())
    wanted = whole(model, ids)
    first = model(ids[:, :40], use_cache=True)
    second = model(ids[:, 40:], **{CACHE: first[CACHE]}, use_cache=True)
    torch.testing.assert_close(second.logits, wanted[:, 40:], **TOLERANCE)
    second.logits.sum().backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient.isfinite().all()
    assert gradient.any()


# -- what can't be kept --------------------------------------------------------------------------------------------


def test_offloaded_cache_is_refused() -> None:
    model, ids = causal_lm("llama"), tokens(1, 40)
    use_sparse_attention(model, mix("preset"), dense_layers=())
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    assert adopt(cache, 0) is cache
    assert find_layer(cache, 0, ids) is None


def test_quantized_layers_are_refused() -> None:
    class Quantized(transformers.cache_utils.DynamicLayer):
        pass

    model, ids = causal_lm("llama"), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    cache.layers = [Quantized() for _ in range(2)]
    use_sparse_attention(model, mix("preset"), dense_layers=())
    with pytest.raises(ConfigError, match=r"keys of DynamicCache, beside which decode='sparse' can't keep index"):
        feed(model, ids, [40], cache)
