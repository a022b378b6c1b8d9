"""Models of transformers with sparse attention, compiled in one piece."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from ssa_framework.integrations.transformers import use_sparse_attention
from ssa_framework.integrations.transformers.compact_mask import probed_segments

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

MIX = {"global": {}, "clusters": {"levels": [[32, 8], [64, 16]], "keys": 16}}


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_one_program_for_all_lengths_and_packed_documents() -> None:
    llama = model()
    with use_sparse_attention(llama, MIX):
        count = CompileCounterWithBackend("eager")
        program = torch.compile(llama, backend=count, fullgraph=True, dynamic=True)
        for length in (100, 150):
            tokens = torch.randint(64, (2, length))
            packed = torch.cat([torch.arange(60), torch.arange(length - 60)])[None].expand(2, -1)
            for options in ({"position_ids": torch.arange(length)[None].expand(2, -1)}, {"position_ids": packed}):
                results = []
                for call in (program, llama):
                    llama.zero_grad()
                    logits = call(tokens, use_cache=False, **options).logits
                    logits.square().sum().backward()
                    results.append([logits.detach(), *(p.grad.clone() for p in llama.parameters())])
                torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        assert count.frame_count <= 2


def test_padding_is_refused_with_the_way_out() -> None:
    llama = model()
    tokens = torch.randint(64, (2, 80))
    with use_sparse_attention(llama, MIX):
        program = torch.compile(llama, backend="eager", fullgraph=True, dynamic=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="leave it out, or pack the batch"):
            program(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


def test_probed_segments() -> None:
    documents = torch.arange(4).repeat_interleave(torch.tensor([1, 30, 2, 67]))[None]
    packed = and_masks(causal_mask_function, packed_sequence_mask_function(documents))
    assert torch.equal(probed_segments(packed, 1, 100, None), documents)

    def looks_ahead(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
        return k <= q + 1

    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
        return (k <= q) & (q - k < 40)

    for other in (looks_ahead, window):
        with pytest.raises(RuntimeError, match="not causal attention inside of documents"):
            probed_segments(other, 1, 100, None)
