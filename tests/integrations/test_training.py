"""Training a model whose attention is sparse: dropout, gradient checkpointing, packing, `Trainer`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments

from integrations.tiny_models import causal_lm, everything, sparse_mix, tokens
from ssa_framework.graph import NeighborGraph
from ssa_framework.hookspecs import hookimpl
from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.registry import SourceRegistry

# older versions of transformers know it by the second name only
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


class Recorder:
    """A plugin that keeps every graph."""

    def __init__(self) -> None:
        self.graphs: list[NeighborGraph] = []

    @hookimpl
    def ssa_graph_built(self, graph: NeighborGraph, layer: object) -> None:
        self.graphs.append(graph)


def train_step(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of one step from a fixed seed."""
    torch.manual_seed(3)
    model.zero_grad()
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(dropout: float, reentrant: bool) -> None:
    """The second forward pass builds the same graphs and drops the same weights."""
    model, ids = causal_lm("llama", attention_dropout=dropout), tokens(2, 130)
    recorder, registry = Recorder(), SourceRegistry()
    registry.register_plugin(recorder)
    use_sparse_attention(model, sparse_mix(), dense_layers=(), registry=registry)
    wanted = train_step(model, ids)
    plain = [graph.to_dense_mask() for graph in recorder.graphs]
    recorder.graphs.clear()
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = train_step(model, ids)
    graphs = [graph.to_dense_mask() for graph in recorder.graphs]
    assert len(plain) == 2
    assert len(graphs) == 4
    first, second, again_second, again_first = graphs
    for graph, again, wanted_graph in ((first, again_first, plain[0]), (second, again_second, plain[1])):
        assert torch.equal(graph, wanted_graph)
        assert torch.equal(again, wanted_graph)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_dropout_is_applied_in_training_only() -> None:
    model, ids = causal_lm("llama", attention_dropout=0.5), tokens()
    use_sparse_attention(model, everything("topk"), dense_layers=())
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_dropout_keeps_the_mean() -> None:
    model, ids = causal_lm("llama", attention_dropout=0.1, num_hidden_layers=1), tokens(1, 33)
    attention = model.model.layers[0].self_attn
    outputs: list[Tensor] = []
    attention.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].detach()))
    use_sparse_attention(model, everything("topk"), dense_layers=())
    model(ids)
    model.train()
    for _ in range(400):
        model(ids)
    mean = torch.stack(outputs[1:]).mean(0)
    spread = torch.stack(outputs[1:]).std(0) / 20
    assert ((mean - outputs[0]).abs() > 5 * spread + 1e-4).sum() <= 3


def trainer(model: PreTrainedModel, folder: Path, **options: object) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 130).tolist()]
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model=model, args=settings, train_dataset=rows)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(checkpointing: bool, tmp_path: Path) -> None:
    model = causal_lm("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    use_sparse_attention(model, sparse_mix())
    result = trainer(model, tmp_path, **{CHECKPOINTING: checkpointing}).train()
    assert result.global_step == 2
    assert result.training_loss > 0
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_trainer_on_packed_documents(tmp_path: Path) -> None:
    """The collator lays documents in a row; with every key in the graph, training is what it is dense."""
    losses = []
    for sparse in (False, True):
        torch.manual_seed(5)
        model = causal_lm("llama")
        if sparse:
            use_sparse_attention(model, everything("topk"), dense_layers=())
        packing = trainer(model, tmp_path)
        packing.data_collator = DataCollatorWithFlattening()
        losses.append(packing.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_checkpoint_of_a_sparse_model_is_the_models(tmp_path: Path) -> None:
    model, ids = causal_lm("llama"), tokens()
    dense, names = model(ids).logits, list(model.state_dict())
    use_sparse_attention(model, sparse_mix(), dense_layers=())
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(ids).logits, dense)
