"""Language models and texts from this machine: nothing here downloads."""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
import tokenize
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa_framework.errors import ConfigError, MissingExtraError

_CHARACTERS_PER_TOKEN = 12
"""More than tokenizers need for prose and code; what is cut there is tokenized once, not the whole of a book."""


def load_model(
    folder: str | Path, *, gguf_file: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A causal language model of transformers and its tokenizer, from a folder.

    Args:
        folder: as ``save_pretrained`` writes it, or one that holds a GGUF file, which needs the package ``gguf``.
        gguf_file: name of that file. Left out, the only ``*.gguf`` of a folder without a ``config.json`` is taken.
        dtype: of the weights.

    Returns:
        The model, in eval mode on the CPU, and its tokenizer.

    Raises:
        ConfigError: no such folder, no model in it, several GGUF files and no name, or files that cannot be read.
        MissingExtraError: transformers is not installed, or ``gguf`` is not, and the folder needs it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a folder; expected the folder of a causal language model")
    gguf_file = _find_gguf(folder, gguf_file)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(
            "reading a language model needs transformers; run: pip install 'ssa-framework[transformers]'"
        ) from error
    options: dict[str, Any] = {"local_files_only": True}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except ImportError as error:  # transformers names what a file format or a tokenizer needs
        package = "gguf" if gguf_file is not None else "what the message names"
        raise MissingExtraError(f"{folder}: {_first_line(error)}; run: pip install {package}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} holds no causal language model that can be read: {_first_line(error)}") from error
    return model.eval(), tokenizer


def default_texts() -> dict[str, str]:
    """English and code that every Python carries: two parts of its language reference, the source of some modules."""
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    code = "\n\n".join(inspect.getsource(module) for module in (argparse, typing, tokenize))
    return {"reference": topics[:200_000], "reference, later": topics[200_000:], "code": code}


def read_texts(paths: Iterable[str | Path]) -> dict[str, str]:
    """The contents of text files in UTF-8, by file name; by path where names repeat.

    Raises:
        ConfigError: a file that cannot be read, or that is not UTF-8.
    """
    files = [Path(path) for path in dict.fromkeys(map(str, paths))]
    names = [path.name for path in files]
    texts = {}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the text {str(path)!r}: {error}") from error
        texts[path.name if names.count(path.name) == 1 else str(path)] = text
    return texts


def tokens_of(tokenizer: Any, text: str, length: int) -> Tensor:
    """The first tokens of a text, with what the tokenizer puts in front of it: int64 ``[1, length]``.

    Raises:
        ConfigError: ``length`` is below 1, or the text has fewer tokens.
    """
    if length < 1:
        raise ConfigError(f"a text is cut to 1 token or more, got length {length}")
    ids: list[int] = []
    for piece in dict.fromkeys((text[: _CHARACTERS_PER_TOKEN * length], text)):
        ids = tokenizer(piece, verbose=False)["input_ids"]
        if len(ids) >= length:
            return torch.tensor([ids[:length]])
    raise ConfigError(f"the text has {len(ids)} tokens, {length} are needed; give a longer text or a shorter length")


def _find_gguf(folder: Path, name: str | None) -> str | None:
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if name is not None:
        if not (folder / name).is_file():
            raise ConfigError(f"{str(folder)!r} has no file {name!r}; its GGUF files: {', '.join(found) or 'none'}")
        return name
    if (folder / "config.json").is_file():
        return None
    if not found:
        raise ConfigError(
            f"{str(folder)!r} holds no model: neither a config.json, as save_pretrained writes it, nor a .gguf file"
        )
    if len(found) > 1:
        raise ConfigError(f"{str(folder)!r} holds several GGUF files; name one of {', '.join(found)}")
    return found[0]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def cache_name(model: Any) -> str:
    """What a model calls its cache, as an argument and in its output; newer versions of transformers renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
