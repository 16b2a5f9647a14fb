"""The tokenizer of a published language model: `tokenizer.json`, or the vocabulary and merges that stand for it.

Source: the files of the Hub repositories. Dream's (Dream-org/Dream-v0-Base-7B, -Instruct-7B) have no `tokenizer.json`:
their tokenizer is remote code around `vocab.json` and `merges.txt`, and does what Qwen2's does, from which they start.

Differs from transformers' loaders, which need that code or guess a class from `config.json`: nothing but these files is
read, and added tokens have to keep the ids that `tokenizer_config.json` gives them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from tokenthrift.config import ConfigError, read_json
from tokenthrift.sources import SourceError, fetch

__all__ = ["read_tokenizer", "source_tokenizer"]

WHOLE = "tokenizer.json"
PARTS = ("vocab.json", "merges.txt", "tokenizer_config.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def source_tokenizer(source: str | Path, **options: Any) -> Tokenizer:
    """The tokenizer of a language model.

    Args:
        source: a folder, or a repository on the Hub.
        options: of `sources.fetch`.

    Raises:
        SourceError: it has neither `tokenizer.json` nor the three files of a byte-level BPE.
        ConfigError: a file is damaged.
    """
    try:
        return read_tokenizer(fetch(source, (WHOLE,), **options) / WHOLE)
    except SourceError as missing:
        try:
            folder = fetch(source, PARTS, **options)
        except SourceError:
            raise missing from None
    return _of_parts(folder)


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # The tokenizers package raises a bare Exception whatever is wrong.
        raise ConfigError(f"{path}: {error}") from error


def _of_parts(folder: Path) -> Tokenizer:
    """A byte-level BPE that splits text as Qwen2's does."""
    from transformers import Qwen2Tokenizer

    vocabulary, merges, settings = (folder / name for name in PARTS)
    try:
        tokenizer = Tokenizer(BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # as above
        raise ConfigError(f"{vocabulary} and {merges.name}: {error}") from error
    parting: Any = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer, tokenizer.decoder = parting.normalizer, parting.decoder
    tokenizer.pre_tokenizer = parting.pre_tokenizer
    try:
        added = {int(key): dict(token) for key, token in read_json(settings)["added_tokens_decoder"].items()}
        tokens = [
            AddedToken(str(added[key]["content"]), **{flag: bool(added[key].get(flag)) for flag in FLAGS})
            for key in sorted(added)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{settings}: added_tokens_decoder does not say which tokens were added: {error}") from error
    tokenizer.add_tokens(tokens)
    if moved := [
        token.content
        for key, token in zip(sorted(added), tokens, strict=True)
        if tokenizer.token_to_id(token.content) != key
    ]:
        raise ConfigError(f"{settings}: {', '.join(moved[:5])} cannot have the ids that it gives them")
    return tokenizer
