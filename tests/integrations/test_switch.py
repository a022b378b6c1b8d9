"""`use_sparse_attention` and its handle: which layers, undo, several models, what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from integrations.tiny_models import bert, causal_lm, everything, make_mask, padding, sharpen, sparse_mix, tokens
from ssa_framework import SourceRegistry, SSAConfig, register_source
from ssa_framework import registry as registry_module
from ssa_framework.errors import (
    BackendUnavailableError,
    ConfigError,
    MaskError,
    UnknownOptionError,
    UnknownSourceError,
)
from ssa_framework.integrations.transformers import switch, use_sparse_attention
from ssa_framework.plugin import Band, NeighborSource

LENGTH = 130


def llama(**changes: Any) -> transformers.PreTrainedModel:
    return causal_lm("llama", num_hidden_layers=4, **changes)


def sparse_indices(model: nn.Module) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "_ssa_layer")]


# -- which layers --------------------------------------------------------------------------------------------------


def test_first_layer_stays_dense_by_default() -> None:
    model = llama()
    handle = use_sparse_attention(model, sparse_mix())
    assert sparse_indices(model) == [1, 2, 3]
    assert handle.layers == {0: "dense", **dict.fromkeys((1, 2, 3), sparse_mix())}
    assert repr(handle) == "SparseAttentionHandle(LlamaForCausalLM: 3 of 4 layers sparse, dense: [0])"


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({"dense_layers": ()}, [0, 1, 2, 3]),
        ({"dense_layers": (0, -1)}, [1, 2]),
        ({"layers": {2: "dense"}}, [1, 3]),
        ({"layers": {0: {"self": {}}}}, [0, 1, 2, 3]),
        ({"dense_layers": range(3)}, [3]),
        ({"dense_layers": range(4), "layers": {-2: sparse_mix()}}, [2]),
    ],
    ids=str,
)
def test_choice_of_layers(options: dict[str, Any], sparse: list[int]) -> None:
    model = llama()
    use_sparse_attention(model, sparse_mix(), **options)
    assert sparse_indices(model) == sparse


@pytest.mark.parametrize(
    ("index", "reach"),
    [(0, range(LENGTH)), (1, range(LENGTH - 4, LENGTH)), (2, range(5)), (3, range(LENGTH))],
    ids=["dense", "window", "global", "everything"],
)
def test_layers_have_their_own_mix(index: int, reach: range) -> None:
    """The keys that the last query attends: those whose hidden states its output has a gradient to."""
    model = llama()
    layers = {1: {"window": {"size": 3}}, 2: SSAConfig(sources={"global": {"tokens": 5}})}
    use_sparse_attention(model, everything("topk"), layers=layers)
    hidden = torch.randn(1, LENGTH, 64, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    mask = make_mask(create_causal_mask, model.config, hidden)
    attention = model.model.layers[index].self_attn
    out, _ = attention(hidden_states=hidden, position_embeddings=rotary, attention_mask=mask)
    (gradient,) = torch.autograd.grad(out[0, -1].sum(), hidden)
    seen = gradient[0].abs().amax(1).nonzero().flatten().tolist()
    assert set(seen) == {*reach, LENGTH - 1}  # the last one as the query


def test_sliding_window_layers_stay_dense() -> None:
    model = causal_lm("gemma3-window")
    handle = use_sparse_attention(model, sparse_mix(), dense_layers=())
    assert handle.layers[0] == "dense"
    assert handle.layers[1] == sparse_mix()
    with pytest.raises(ConfigError, match=r"layers\[0\]: this layer attends a sliding window"):
        use_sparse_attention(causal_lm("gemma3-window"), sparse_mix(), layers={0: sparse_mix()})


def test_layer_without_attention() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.Lfm2Config(
        **sizes, num_hidden_layers=3, num_key_value_heads=2, layer_types=["conv", "full_attention", "full_attention"]
    )
    model = transformers.Lfm2ForCausalLM(config)
    with use_sparse_attention(model, sparse_mix()) as handle:
        assert list(handle.layers) == [1, 2]
    with pytest.raises(ConfigError, match=r"layers\[0\]: this layer has no attention of its own; .*: \[1, 2\]"):
        use_sparse_attention(model, sparse_mix(), layers={0: sparse_mix()})


def test_model_that_also_sees() -> None:
    """The vision part keeps its own attention."""
    text = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model, ids = sharpen(transformers.Gemma3ForConditionalGeneration(config)), tokens()
    dense, implementation = model(ids).logits, model.config.vision_config._attn_implementation
    with use_sparse_attention(model, everything("topk"), dense_layers=()):
        attending = [name for name, module in model.named_modules() if hasattr(module, "_ssa_layer")]
        assert len(attending) == 2
        assert all("language_model" in name for name in attending)
        assert model.config.vision_config._attn_implementation == implementation
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=2e-4)
    with use_sparse_attention(model, {"self": {}}, dense_layers=()):
        assert not torch.allclose(model(ids).logits, dense, atol=0.05)
    assert torch.equal(model(ids).logits, dense)


def test_model_of_sliding_windows_only() -> None:
    with pytest.raises(ConfigError, match="no layer would be sparse: of 2 layers, 2 attend a sliding window"):
        use_sparse_attention(causal_lm("mistral", sliding_window=16), sparse_mix())


@pytest.mark.parametrize("config", [sparse_mix(), {"self": {}, "window": {"size": 4}}], ids=["config", "mapping"])
def test_ways_to_name_a_mix(config: Any) -> None:
    handle = use_sparse_attention(llama(), config)
    wanted = config if isinstance(config, SSAConfig) else SSAConfig(sources=config)
    assert handle.layers[1] == wanted


def test_preset() -> None:
    assert use_sparse_attention(llama(), "balanced").layers[1] == SSAConfig.preset("balanced")


def test_sizes_come_from_the_model() -> None:
    """A configuration for other heads, with rotary positions and dropout of its own, is not taken by its word."""
    model, ids = llama(), tokens()
    dense = model(ids).logits
    config = everything("topk", d_model=96, num_heads=3, dropout=0.5, rope_base=10.0, causal=False)
    use_sparse_attention(model, config, dense_layers=())
    torch.testing.assert_close(model.train()(ids).logits, dense, rtol=1e-4, atol=2e-4)


# -- undo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_undo(implementation: str) -> None:
    model, ids = llama(attn_implementation=implementation), tokens(2, LENGTH)
    inputs = {"input_ids": ids, "attention_mask": padding(2, LENGTH, "left")}
    before, modules = model(**inputs).logits, [set(vars(module)) for module in model.modules()]
    handle = use_sparse_attention(model, sparse_mix())
    assert not torch.equal(model(**inputs).logits, before)
    handle.undo()
    assert model.config._attn_implementation == implementation
    assert [set(vars(module)) for module in model.modules()] == modules
    assert torch.equal(model(**inputs).logits, before)
    handle.undo()
    assert torch.equal(model(**inputs).logits, before)


def test_context_manager_undoes_after_an_error() -> None:
    model, ids = llama(), tokens()
    before = model(ids).logits
    handle = use_sparse_attention(model, {"self": {}})
    assert handle.__enter__() is handle
    with pytest.raises(ZeroDivisionError), handle:
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, before)


def test_sparse_twice() -> None:
    model = llama()
    handle = use_sparse_attention(model, sparse_mix())
    with pytest.raises(ConfigError, match="LlamaForCausalLM is sparse already; undo"):
        use_sparse_attention(model, sparse_mix())
    handle.undo()
    use_sparse_attention(model, sparse_mix()).undo()


def test_failure_changes_nothing() -> None:
    model = llama()
    with pytest.raises(UnknownSourceError):
        use_sparse_attention(model, sparse_mix(), layers={3: {"nowhere": {}}})
    assert sparse_indices(model) == []
    assert model.config._attn_implementation == "sdpa"
    use_sparse_attention(model, sparse_mix())


def test_model_that_is_thrown_away() -> None:
    model = llama()
    use_sparse_attention(model, sparse_mix())
    config, gone = model.config, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert config._attn_implementation == "sdpa"
    assert id(config) not in switch._switched


# -- several models, copies, threads -------------------------------------------------------------------------------


def test_two_models_at_once() -> None:
    ids, models = tokens(2, LENGTH), [llama(), causal_lm("gpt2")]
    dense = [model(ids).logits for model in models]
    alone = []
    for model, source in zip(models, ("window", "global"), strict=True):
        with use_sparse_attention(model, {source: {}}):
            alone.append(model(ids).logits)
    handles = [use_sparse_attention(m, {source: {}}) for m, source in zip(models, ("window", "global"), strict=True)]
    for model, wanted in zip(models, alone, strict=True):
        assert torch.equal(model(ids).logits, wanted)
    handles[0].undo()
    assert torch.equal(models[0](ids).logits, dense[0])
    assert torch.equal(models[1](ids).logits, alone[1])
    handles[1].undo()
    assert torch.equal(models[1](ids).logits, dense[1])


@pytest.mark.parametrize("first", [0, 1])
def test_models_that_share_a_configuration(first: int) -> None:
    one = llama()
    models, ids = [one, sharpen(type(one)(one.config)), sharpen(type(one)(one.config))], tokens(2, LENGTH)
    dense = [model(ids).logits for model in models]
    handles = [use_sparse_attention(model, {"self": {}}) for model in models[:2]]
    assert torch.equal(models[2](ids).logits, dense[2])  # it was not asked to be sparse
    handles[first].undo()
    assert torch.equal(models[first](ids).logits, dense[first])
    assert not torch.allclose(models[1 - first](ids).logits, dense[1 - first], atol=0.05)
    handles[1 - first].undo()
    assert one.config._attn_implementation == "sdpa"
    for model, wanted in zip(models, dense, strict=True):
        assert torch.equal(model(ids).logits, wanted)


def test_copy_is_sparse_too() -> None:
    model, ids = llama(), tokens(2, LENGTH)
    handle = use_sparse_attention(model, sparse_mix())
    twin, wanted = copy.deepcopy(model), model(ids).logits
    handle.undo()
    assert torch.equal(twin(ids).logits, wanted)


def test_threads() -> None:
    models = [llama(), causal_lm("gemma3-window"), bert()]
    batches = [tokens(2, n) for n in (60, 90, 130)]
    mask = [padding(2, ids.shape[1], "left") for ids in batches]
    for model in models:
        use_sparse_attention(model, sparse_mix(), dense_layers=())
    calls = [(model, ids, keep) for model in models for ids, keep in zip(batches, mask, strict=True)] * 3

    def logits(call: tuple[nn.Module, Tensor, Tensor]) -> Tensor:
        model, ids, keep = call
        with torch.no_grad():
            return model(ids, attention_mask=keep).logits

    wanted = [logits(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(logits, calls), wanted, strict=True):
            assert torch.equal(found, want)


def test_registry_is_used() -> None:
    class Near(NeighborSource):
        needs_positions = True

        def propose(self, ctx: Any) -> Band:
            return Band(2, 2)

    registry = SourceRegistry()
    registry.register("near", Near)
    model, ids = llama(), tokens()
    use_sparse_attention(model, {"near": {}}, registry=registry)
    assert model(ids).logits.isfinite().all()
    with pytest.raises(UnknownSourceError, match="unknown source 'near'"):
        use_sparse_attention(llama(), {"near": {}})


# -- what is refused -----------------------------------------------------------------------------------------------


def test_soft_capping() -> None:
    with pytest.raises(ConfigError, match=r"model.layers.0.self_attn \(Gemma2Attention\) caps the scores"):
        use_sparse_attention(causal_lm("gemma2-window", attn_logit_softcapping=50.0), sparse_mix())


def test_attention_sinks() -> None:
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"\(GptOssAttention\) has attention sinks"):
        use_sparse_attention(transformers.GptOssForCausalLM(config), sparse_mix())


def test_position_bias() -> None:
    """Older versions of transformers compute T5's attention themselves."""
    config = transformers.T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(ConfigError, match=r"\(T5Attention\) adds a learned position bias|T5\w+ has no attention that"):
        use_sparse_attention(transformers.T5ForConditionalGeneration(config), sparse_mix())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("softcap", "soft-capping"),
        ("s_aux", "attention sinks"),
        ("position_bias", "position bias"),
        ("output_attentions", "never makes"),
    ],
)
def test_options_of_the_call(name: str, message: str) -> None:
    """Where only the call shows what a model asks for."""
    model = llama()
    use_sparse_attention(model, sparse_mix())
    function = transformers.AttentionInterface()["ssa_framework"]
    q = torch.randn(1, 4, 8, 16)
    for layer in (0, 1):
        with pytest.raises(ConfigError, match=message):
            function(model.model.layers[layer].self_attn, q, q, q, None, **{name: 1.0})


def test_output_attentions() -> None:
    model = llama()
    use_sparse_attention(model, sparse_mix())
    with pytest.raises(ConfigError, match="output_attentions=True"):
        model(tokens(), output_attentions=True)


def test_four_dimensional_mask() -> None:
    model = llama()
    use_sparse_attention(model, sparse_mix())
    allowed = torch.ones(1, 1, 65, 65).tril().bool()
    with pytest.raises(MaskError, match=r"model.layers.1.self_attn got an attention mask of shape \[1, 1, 65, 65\]"):
        model(tokens(1), attention_mask=allowed)


def test_static_cache() -> None:
    model = llama()
    use_sparse_attention(model, sparse_mix())
    with pytest.raises(ConfigError, match="static cache"):
        model.generate(tokens(1), max_new_tokens=2, cache_implementation="static")


def test_source_with_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Learned(NeighborSource):
        def __init__(self, layer: Any) -> None:
            super().__init__(layer)
            self.weight = nn.Parameter(torch.ones(3))

    monkeypatch.setattr(registry_module, "_default", None)
    register_source("learned", Learned)
    with pytest.raises(ConfigError, match="parameters of its own"):
        use_sparse_attention(llama(), {"learned": {}})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": "nearly"}, ConfigError, "preset"),
        ({"config": 3}, ConfigError, "expected an SSAConfig, a mapping of sources or the name of a preset, got 3"),
        ({"config": {"nowhere": {}}}, UnknownSourceError, "unknown source 'nowhere'"),
        ({"config": {"window": {"width": 3}}}, UnknownOptionError, "no option 'width'"),
        ({"config": {}}, ConfigError, "non-empty mapping"),
        ({"config": SSAConfig(backend="fast")}, BackendUnavailableError, "'fast'"),
        ({"dense_layers": (4,)}, ConfigError, "dense_layers: layer 4 does not exist; the model has layers 0 to 3"),
        ({"dense_layers": (True,)}, ConfigError, "dense_layers: layer True"),
        ({"layers": {-5: "dense"}}, ConfigError, "layers: layer -5 does not exist"),
        ({"dense_layers": range(4)}, ConfigError, "no layer would be sparse: of 4 layers"),
        ({"decode": "never"}, ConfigError, "decode must be one of 'sparse', 'dense', 'rebuild', got 'never'"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        use_sparse_attention(llama(), **{"config": sparse_mix(), **options})


def test_model_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"takes a model of transformers, got Linear; .* use ssa_framework.convert"):
        use_sparse_attention(nn.Linear(3, 3), sparse_mix())


def test_model_without_the_interface() -> None:
    config = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match=r"BloomForCausalLM has no attention that goes through transformers"):
        use_sparse_attention(transformers.BloomForCausalLM(config), sparse_mix())
