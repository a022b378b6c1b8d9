"""How well a model predicts a text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from integrations.tiny_models import VOCABULARY, causal_lm
from ssa_framework.errors import ShapeError
from ssa_framework.laboratory.perplexity import perplexity, token_losses


def text(length: int = 41) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("scored", [None, 1, 7, 40])
def test_the_losses_are_those_of_all_logits(name: str, scored: int | None) -> None:
    model, ids = causal_lm(name), text()
    with torch.no_grad():
        predicted = model(ids).logits[0, :-1].double().log_softmax(-1)
    count = 20 if scored is None else scored
    expected = -predicted.gather(-1, ids[0, 1:, None])[-count:, 0]
    losses = token_losses(model, ids, scored=scored)
    torch.testing.assert_close(losses, expected, atol=2e-5, rtol=1e-5)
    assert perplexity(model, ids, scored=scored) == math.exp(losses.mean())


@pytest.mark.parametrize(
    ("ids", "scored", "says"),
    [
        (text()[0], None, r"\[1, N\]"),
        (text().expand(2, -1), None, r"\[1, N\]"),
        (text(1), None, "N >= 2"),
        (text().float(), None, "integers"),
        (text(), 41, r"\[1, 41\)"),
        (text(), 0, r"\[1, 41\)"),
    ],
)
def test_what_cannot_be_scored_is_named(ids: Tensor, scored: int | None, says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        token_losses(causal_lm("llama"), ids, scored=scored)
