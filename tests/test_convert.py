"""`convert` on torch's own models: same weights, same results where the mix holds everything, sparse otherwise."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssa_framework import SSAConfig
from ssa_framework.convert import convert
from ssa_framework.errors import ConfigError, UnknownSourceError
from ssa_framework.multihead import SparseMultiheadAttention

WIDTH, HEADS, BATCH, LENGTH = 16, 4, 3, 11
EVERYTHING = SSAConfig(sources={"topk": {}}, num_neighbors=128, dense_below=0)
"""Every key is a neighbor, and the sparse path is taken nevertheless."""
LOCAL = SSAConfig(sources={"self": {}, "window": {"size": 1}, "global": {"tokens": 1}}, num_neighbors=8, dense_below=0)
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
"""What torch's encoder says in eval mode with padding."""
MODES = pytest.mark.parametrize("mode", ["train", "eval", "eval-no-grad"])
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "length-first"])


def randomize(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_encoder(batch_first: bool = True, norm_first: bool = False, layers: int = 2, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    fast = batch_first and not norm_first
    return randomize(nn.TransformerEncoder(layer, layers, enable_nested_tensor=fast, **options))


def make_transformer(batch_first: bool = True) -> nn.Module:
    """`nn.Transformer`, on an encoder that does not warn of the layout."""
    encoder = make_encoder(batch_first)
    return randomize(
        nn.Transformer(
            WIDTH, HEADS, 1, 2, 32, dropout=0.0, batch_first=batch_first, custom_encoder=encoder, dtype=torch.float64
        )
    )


def make_input(length: int = LENGTH, batch_first: bool = True) -> Tensor:
    return torch.randn((BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH), dtype=torch.float64)


def padding(length: int = LENGTH) -> Tensor:
    """True = ignore; every batch element keeps its first key."""
    return torch.arange(length)[None] >= torch.tensor([[length], [length // 2], [1]])


def causal_mask(length: int = LENGTH) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def run(model: nn.Module, mode: str, *inputs: Tensor, **call: Any) -> Tensor:
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "eval-no-grad"):
        out: Tensor = model(*inputs, **call)
    return out


def attention_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseMultiheadAttention)]


# -- same results ----------------------------------------------------------------------------------------------------

ENCODER_CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "padded": lambda: {"src_key_padding_mask": padding()},
    # in the dtype of the model: on some processors torch misreads a float32 mask beside float64 inputs
    "padded-float": lambda: {
        "src_key_padding_mask": torch.zeros(BATCH, LENGTH, dtype=torch.float64).masked_fill(padding(), -torch.inf)
    },
    "causal": lambda: {"mask": causal_mask()},
    "causal-hint": lambda: {"mask": causal_mask(), "is_causal": True},
    "causal-padded": lambda: {"mask": causal_mask() < 0, "src_key_padding_mask": padding()},
    "additive": lambda: {"mask": torch.randn(LENGTH, LENGTH, dtype=torch.float64)},
    "bool": lambda: {"mask": torch.rand(LENGTH, LENGTH) + torch.eye(LENGTH) < 0.5},
}


@NESTED
@MODES
@pytest.mark.parametrize("call", ENCODER_CALLS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@LAYOUTS
def test_encoder_equals_the_original(batch_first: bool, norm_first: bool, call: str, mode: str) -> None:
    original = make_encoder(batch_first, norm_first)
    converted = convert(copy.deepcopy(original), EVERYTHING)
    x, options = make_input(batch_first=batch_first), ENCODER_CALLS[call]()
    if call == "padded-float" and mode != "train" and batch_first and not norm_first:
        options = {"src_key_padding_mask": padding()}  # torch's nested tensors take no float mask
    # torch's fast path reads an additive mask as a bool one, so the original must not take it then
    torch_mode = "eval" if call == "additive" and mode == "eval-no-grad" else mode
    got, want = run(converted, mode, x, **options), run(original, torch_mode, x, **options)
    if "src_key_padding_mask" in options:  # what torch gives for padding depends on the path that it takes
        real = ~padding() if batch_first else ~padding().T
        got, want = got[real], want[real]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@MODES
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("hint", [None, True, False], ids=["detected", "hint", "explicit"])
@LAYOUTS
def test_decoder_equals_the_original(batch_first: bool, hint: bool | None, padded: bool, mode: str) -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    original = randomize(nn.TransformerDecoder(layer, 2))
    converted = convert(copy.deepcopy(original), EVERYTHING)
    target, memory = make_input(batch_first=batch_first), make_input(7, batch_first)
    options: dict[str, Any] = {"tgt_mask": causal_mask(), "tgt_is_causal": hint}
    if padded:
        zeros = torch.zeros(BATCH, LENGTH, dtype=torch.float64)
        options |= {
            "tgt_key_padding_mask": zeros.masked_fill(padding(), -torch.inf),
            "memory_key_padding_mask": padding(7),
        }
    got, want = run(converted, mode, target, memory, **options), run(original, mode, target, memory, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@NESTED
@MODES
@LAYOUTS
def test_transformer_equals_the_original(batch_first: bool, mode: str) -> None:
    original = make_transformer(batch_first)
    converted = convert(copy.deepcopy(original), EVERYTHING)
    source, target = make_input(9, batch_first), make_input(batch_first=batch_first)
    options = {
        "src_key_padding_mask": padding(9),
        "memory_key_padding_mask": padding(9),
        "tgt_mask": causal_mask(),
        "tgt_is_causal": True,
    }
    got, want = run(converted, mode, source, target, **options), run(original, mode, source, target, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_gradients_equal_the_original() -> None:
    original = make_transformer().train()
    converted = convert(copy.deepcopy(original), EVERYTHING)
    source, target = make_input(9), make_input()
    weight = make_input()
    for model in (original, converted):
        (model(source, target, tgt_mask=causal_mask()) * weight).sum().backward()
    want = dict(original.named_parameters())
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name].grad, rtol=0, atol=1e-10)


# -- really sparse ---------------------------------------------------------------------------------------------------


@NESTED
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("mode", ["eval", "no-grad", "inference"])
def test_eval_mode_calls_the_sparse_forward(monkeypatch: pytest.MonkeyPatch, mode: str, padded: bool) -> None:
    calls = {"dense": 0, "sparse": 0}

    def counted(kind: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[kind] += 1
            return forward(*args, **kwargs)

        return call

    # patched on the class: a hook on a module would keep torch from its fast path, and prove nothing
    monkeypatch.setattr(nn.MultiheadAttention, "forward", counted("dense", nn.MultiheadAttention.forward))
    monkeypatch.setattr(SparseMultiheadAttention, "forward", counted("sparse", SparseMultiheadAttention.forward))
    original = make_encoder(layers=3)
    for parameter in original.parameters():
        parameter.requires_grad_(mode != "eval")
    converted = convert(copy.deepcopy(original), LOCAL)
    x, options = make_input(), {"src_key_padding_mask": padding()} if padded else {}
    want = run(converted, "train", x, **options)  # no dropout: training mode computes the same
    calls["sparse"] = 0
    assert torch.backends.mha.get_fastpath_enabled()
    context = {"eval": torch.enable_grad, "no-grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context():
        dense = original.eval()(x, **options)
        assert calls == {"dense": 0, "sparse": 0}  # so the original does take the fast path here
        got = converted.eval()(x, **options)
    assert calls == {"dense": 0, "sparse": 3}
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-12)
    assert not torch.allclose(got[0], dense[0])


def test_encoder_keeps_padded_tensors() -> None:
    encoder = make_encoder()
    assert encoder.use_nested_tensor
    assert not convert(encoder, LOCAL).use_nested_tensor
    untouched = nn.ModuleDict({"a": make_encoder(), "b": make_encoder()})
    convert(untouched, LOCAL, include="a.*")
    assert not untouched["a"].use_nested_tensor
    assert untouched["b"].use_nested_tensor


def test_default_configuration() -> None:
    original = make_encoder()
    converted = convert(copy.deepcopy(original))
    x = make_input()
    torch.testing.assert_close(run(converted, "train", x), run(original, "train", x), rtol=0, atol=1e-10)


def test_trains() -> None:
    model = convert(make_encoder(), LOCAL).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, target = make_input(), make_input()
    losses = []
    for _ in range(10):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_parameters_are_the_same_objects() -> None:
    model = make_transformer()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    assert convert(model, LOCAL) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == keys
    assert len(attention_names(model)) == 2 + 2 * 2


def test_state_dict_loads_into_the_original() -> None:
    original = make_transformer()
    converted = convert(copy.deepcopy(original), SSAConfig(seed=7))
    randomize(converted)
    original.load_state_dict(converted.state_dict(), strict=True)
    converted.load_state_dict(original.state_dict(), strict=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mode_dtype_and_options_are_kept(training: bool) -> None:
    dense = nn.MultiheadAttention(
        WIDTH, HEADS, dropout=0.25, kdim=6, bias=False, batch_first=True, dtype=torch.float64
    ).train(training)
    dense.out_proj.weight.requires_grad_(False)
    sparse = convert(dense, SSAConfig(sources={"lsh": {}}))
    assert isinstance(sparse, SparseMultiheadAttention)
    assert (sparse.dropout, sparse.kdim, sparse.batch_first, sparse.num_heads) == (0.25, 6, True, HEADS)
    assert all(module.training == training for module in sparse.modules())
    assert not sparse.out_proj.weight.requires_grad
    assert {tensor.dtype for tensor in [*sparse.parameters(), *sparse.buffers()]} == {torch.float64}


def test_a_single_module_becomes_a_new_one() -> None:
    dense = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    sparse = convert(dense, EVERYTHING)
    assert sparse is not dense
    assert isinstance(sparse, SparseMultiheadAttention)
    assert type(dense) is nn.MultiheadAttention
    assert "router" not in dict(dense.named_children())
    x = make_input()
    torch.testing.assert_close(sparse(x, x, x)[0], dense(x, x, x)[0], rtol=0, atol=1e-10)


def test_hooks_go_along() -> None:
    model = make_encoder(layers=1).train()
    seen = []
    attention = model.layers[0].self_attn
    handles = [
        attention.register_forward_pre_hook(lambda module, args: seen.append(("before", type(module)))),
        attention.register_forward_hook(lambda module, args, out: seen.append(("after", type(module)))),
    ]
    convert(model, LOCAL)
    model(make_input())
    assert seen == [("before", SparseMultiheadAttention), ("after", SparseMultiheadAttention)]
    for handle in handles:
        handle.remove()
    model(make_input())
    assert len(seen) == 2


def test_shared_modules_stay_shared() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    model = nn.ModuleDict({"a": nn.ModuleList([attention, nn.Linear(2, 2)]), "b": attention})
    convert(model, LOCAL)
    assert isinstance(model["b"], SparseMultiheadAttention)
    assert model["a"][0] is model["b"]


def test_converting_twice_touches_only_what_is_left() -> None:
    model = make_transformer()
    convert(model, LOCAL, include="encoder.*")
    first = model.encoder.layers[0].self_attn
    convert(model, EVERYTHING)
    assert model.encoder.layers[0].self_attn is first
    assert isinstance(model.decoder.layers[0].multihead_attn, SparseMultiheadAttention)


@pytest.mark.parametrize(
    ("choice", "converted"),
    [
        ({"include": "encoder.*"}, ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]),
        ({"include": ["*.0.self_attn"]}, ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]),
        ({"include": (name for name in ["encoder.layers.1.*", "decoder.layers.1.multi*"])},
         ["encoder.layers.1.self_attn", "decoder.layers.1.multihead_attn"]),
        ({"exclude": ["decoder.*", "*.0.*"]}, ["encoder.layers.1.self_attn"]),
        ({"include": "decoder.*", "exclude": "*multihead_attn"},
         ["decoder.layers.0.self_attn", "decoder.layers.1.self_attn"]),
        ({"include": lambda name: name.endswith("1.multihead_attn")}, ["decoder.layers.1.multihead_attn"]),
        ({"exclude": lambda name: "self" in name},
         ["decoder.layers.0.multihead_attn", "decoder.layers.1.multihead_attn"]),
    ],
    ids=["pattern", "list", "generator", "exclude", "both", "predicate", "exclude-predicate"],
)  # fmt: skip
def test_include_and_exclude(choice: dict[str, Any], converted: list[str]) -> None:
    model = make_transformer()
    convert(model, LOCAL, **choice)
    assert attention_names(model) == converted


# -- errors ----------------------------------------------------------------------------------------------------------


class OwnAttention(nn.MultiheadAttention):
    """Somebody's subclass."""


def replaced_forward() -> nn.Module:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    attention.forward = lambda *args, **kwargs: None
    return attention


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.MultiheadAttention(WIDTH, HEADS), "in_proj_weight", amount=0.5)


def parametrized() -> nn.Module:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    nn.utils.parametrizations.weight_norm(attention, "in_proj_weight")
    return attention


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True), "add_bias_kv"),
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True), "add_zero_attn"),
        (lambda: OwnAttention(WIDTH, HEADS), "OwnAttention is not torch.nn.MultiheadAttention itself"),
        (replaced_forward, "its forward was replaced"),
        (pruned, "in_proj_weight is no plain parameter"),
        (parametrized, "ParametrizedMultiheadAttention is not"),
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, device="meta"), "not on 'meta'"),
    ],
    ids=["bias-kv", "zero-attn", "subclass", "wrapped", "pruned", "parametrized", "meta"],
)
def test_all_or_nothing(bad: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS), nn.ModuleDict({"bad": bad()}))
    config = SSAConfig(sources={"lsh": {}})
    with pytest.raises(ConfigError, match=rf"can't convert '1\.bad': .*{message}.*exclude it"):
        convert(model, config)
    assert attention_names(model) == []
    convert(model, config, exclude="1.*")
    assert attention_names(model) == ["0"]


@pytest.mark.parametrize(
    ("model", "choice", "found"),
    [
        (nn.Linear(2, 2), {}, "in Linear: .*found none"),
        (nn.ModuleList([nn.MultiheadAttention(4, 2)]), {"include": "x.*"}, r"found '0', include='x\.\*'"),
        (nn.ModuleList([nn.MultiheadAttention(4, 2)]), {"exclude": "*"}, r"found '0'.*exclude='\*'"),
        (SparseMultiheadAttention(4, 2, config=LOCAL), {}, "not sparse yet, found none"),
    ],
    ids=["no-attention", "include", "exclude", "already-sparse"],
)
def test_nothing_to_convert(model: nn.Module, choice: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"nothing to convert.*torch\.nn\.MultiheadAttention|{found}") as error:
        convert(model, LOCAL, **choice)
    assert error.match(found)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (SSAConfig(num_kv_heads=2), ConfigError, "'0': num_kv_heads=2"),
        (SSAConfig(dropout=0.5), ConfigError, "'0': config.dropout=0.5 contradicts"),
        (SSAConfig(sources={"lhs": {}}), UnknownSourceError, "unknown source 'lhs'"),
    ],
    ids=["kv-heads", "dropout", "source"],
)
def test_configuration_errors(config: SSAConfig, error: type[Exception], message: str) -> None:
    model = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS)])
    with pytest.raises(error, match=message):
        convert(model, config)
    assert attention_names(model) == []
