"""The text that every Python installation carries: the help topics of `pydoc_data.topics`, as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

_EVERY = 10
_FIRST = 7
"""Of the sorted topics, the 8th, 18th, ... are for validation."""


@dataclass(frozen=True)
class Text:
    """Token ids 0 to 255, int64 ``[bytes]``; ``held_out`` names the topics of the validation text, in order."""

    train: Tensor
    validation: Tensor
    held_out: tuple[str, ...]


def load_text() -> Text:
    """Split by topic. Topics quote one another, so paragraphs of the validation text are taken out of the rest."""
    names = sorted(topics)
    held_out = tuple(names[_FIRST::_EVERY])
    validation = [_paragraphs(topics[name]) for name in held_out]
    seen = {paragraph for topic in validation for paragraph in topic}
    train = [[p for p in _paragraphs(topics[name]) if p not in seen] for name in names if name not in held_out]
    return Text(_tokens(train), _tokens(validation), held_out)


def _paragraphs(topic: str) -> list[str]:
    return [p.strip("\n") for p in topic.split("\n\n") if p.strip()]


def _tokens(documents: list[list[str]]) -> Tensor:
    text = "\n\n\n".join("\n\n".join(paragraphs) for paragraphs in documents)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def readable(tokens: Tensor) -> str:
    """The text of some tokens, one character per token: bytes outside ASCII as ``·``, line ends as ``⏎``."""
    characters = [chr(t) if 32 <= t < 127 else "⏎" if t == 10 else "·" for t in tokens.tolist()]
    return "".join(characters)
