"""Passkeys: a number in a long text, asked for at its end (Mohtashami and Jaggi, Landmark Attention, 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssa_framework.errors import ConfigError
from ssa_framework.laboratory.models import tokens_of

_NEEDLE = "\n\nThe pass key is {number}. Remember it. {number} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """One text with its question and answer, int64.

    Attributes:
        depth: where the number stands, 0 = at the beginning of the text, 1 = at its end.
        text: ``[1, N]``, what stands before the question. tail: ``[1, T]``, question and answer.
        answer: the last tokens of ``tail``, ``[A]``.
    """

    depth: float
    text: Tensor
    tail: Tensor
    answer: Tensor


def make_passkeys(tokenizer: Any, filler: str, length: int, depths: int, seed: int = 0) -> list[Passkey]:
    """Passkeys at depths from 0 to 1, each another number of five digits.

    Args:
        tokenizer: of transformers. filler: the text that they are hidden in.
        length: tokens of text, question and answer together. depths: how many.
        seed: of the numbers.

    Raises:
        ConfigError: ``length`` leaves no room for the number and the question, or ``filler`` has too few tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(10_000, 100_000, (depths,), generator=generator).tolist()
    question = _encode(tokenizer, _QUESTION)
    made = []
    for i, number in enumerate(numbers):
        depth = 0.5 if depths == 1 else i / (depths - 1)
        needle, answer = _encode(tokenizer, _NEEDLE.format(number=number)), _encode(tokenizer, f" {number}")
        room = length - len(needle) - len(question) - len(answer)
        if room < 1:
            raise ConfigError(f"a passkey with its question takes {length - room} tokens, got a length of {length}")
        try:
            text = tokens_of(tokenizer, filler, room)[0]
        except ConfigError as error:
            raise ConfigError(f"the text that passkeys are hidden in: {error}") from error
        # a token that begins every text stays in front
        front = int(text[0] == getattr(tokenizer, "bos_token_id", None))
        place = front + round(depth * (room - front))
        parts = [text[:place], torch.tensor(needle), text[place:]]
        made.append(Passkey(depth, torch.cat(parts)[None], torch.tensor([question + answer]), torch.tensor(answer)))
    return made


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
