"""A prompt of many media as a YAML file, and the window items that it makes.

    context: 2048                        # tokens of the window; `--context` wins
    answer: 64                           # kept free for the answer
    split: demand                        # or value, equal
    tokenizer: models/llm                # counts the text; or give `tokens` beside each text
    models:                              # what turns each kind of item into tokens
      image: model_cards/karl-tiny-64
      video: merging                     # a training-free reducer by its name, over native tokens
      audio: model_cards/mtsk-tiny-en
    prompt:
      - text: Which of these is the dog that barks here?
      - image: photos/dog.jpg
      - video: {native: 6272}            # no file yet: what is known of it
        weight: 2
      - audio: bark.wav
        budget: 25%

Files are named relative to the prompt; models as everywhere, by a folder or a Hub id, a folder beside the prompt first.
The format is this project's own: chat formats name media but neither budgets nor what an item is worth.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from tokenthrift.budget import BudgetError, ItemSize, TokenBudget, TokenPlanner, TokenUsage
from tokenthrift.quality import QUALITY, QualityCurve, read_quality
from tokenthrift.window import Window, WindowItem

__all__ = ["KINDS", "PromptError", "read_prompt"]

KINDS: Final = ("image", "video", "audio", "talking")
_KEYS: Final = ("context", "answer", "split", "tokenizer", "models", "prompt")
_ITEM_KEYS: Final = ("name", "model", "budget", "weight")


class PromptError(ValueError):
    """A prompt file that cannot be planned: what is wrong, and where."""


def read_prompt(path: Path, *, context: int | None = None, split: str | None = None) -> Window:
    """The window of a prompt file; of models and media only configurations and headers are read.

    Args:
        path: The file.
        context: Tokens of the window, in place of the file's own.
        split: How they are shared, in place of the file's own.

    Raises:
        PromptError: The file is no prompt, or an item has no model or no tokenizer.
        OSError, ValueError: A model or a medium cannot be read.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), list):
        raise PromptError(f"{path}: expected a mapping with a list `prompt`")
    _check_keys(found, _KEYS, str(path))
    total = found.get("context") if context is None else context
    if total is None:
        raise PromptError(f"{path}: the window has no size: give --context, or `context` in the file")
    answer = found.get("answer", 0)
    for name, value in (("context", total), ("answer", answer)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise PromptError(f"{path}: {name} is a whole number of tokens, not {value!r}")
    split = found.get("split", "demand") if split is None else split
    reader = _Reader(path, found, curves=split == "value")
    items = [reader.item(row, f"{path}: item {i + 1}") for i, row in enumerate(found["prompt"])]
    return Window(total, items, split=split, reserve=answer)  # type: ignore[arg-type]


class _Reader:
    """Makes the items of one prompt; models are built once, without memory."""

    def __init__(self, path: Path, found: Mapping[str, Any], *, curves: bool) -> None:
        self.folder, self.curves = path.parent, curves
        self.tokenizer, self.models = found.get("tokenizer"), found.get("models") or {}
        if not isinstance(self.models, dict):
            raise PromptError(f"{path}: models is a mapping from {', '.join(KINDS)} to models")
        _check_keys(self.models, KINDS, f"{path}: models")
        self._planners: dict[str, tuple[TokenPlanner, Any, dict[str, QualityCurve]]] = {}
        self._counter: Any = None

    def item(self, row: object, where: str) -> WindowItem:
        """One line of the prompt."""
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise PromptError(f"{where}: expected a mapping such as {{image: photo.jpg}}, found {row!r}")
        kinds = [kind for kind in ("text", *KINDS) if kind in row]
        if len(kinds) != 1:
            raise PromptError(f"{where}: expected one of text, {', '.join(KINDS)}; found {', '.join(map(str, row))}")
        (kind,) = kinds
        if kind == "text":
            _check_keys(row, ("text", "tokens", "name"), where)
            return WindowItem.text(str(row.get("name", _shown(str(row["text"])))), self._count(row, where))
        _check_keys(row, (kind, *_ITEM_KEYS), where)
        source = row.get("model", self.models.get(kind))
        if source is None:
            raise PromptError(f"{where}: no model for {kind}: name one under `models`, or as `model` of the item")
        return self._medium(kind, row, str(source), where)

    def _medium(self, kind: str, row: Mapping[str, Any], source: str, where: str) -> WindowItem:
        planner, files, curves = self._planner(source)
        what, weight = row[kind], row.get("weight", 1.0)
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise PromptError(f"{where}: a weight is a number, not {weight!r}")
        name = str(row.get("name", what if isinstance(what, str) else kind))
        shared: dict[str, Any] = {
            "kind": kind,
            "name": name,
            "budget": TokenBudget.parse(row.get("budget")),
            "weight": float(weight),
            "curve": curves.get(kind, curves.get("")),
        }
        try:
            if isinstance(what, str):
                if files is None:
                    raise PromptError(
                        f"{where}: {source} reads no files: it reduces native tokens, so say how many there are "
                        f"({{{kind}: {{native: 729}}}}), or name a model that reads {kind}s"
                    )
                path = self.folder / what
                if not path.exists():
                    raise PromptError(f"{where}: there is no file {path}")
                cost = partial(_file_cost, files, path)
                return WindowItem(cost=cost, fixed="max_tokens" not in planner.support.fields, **shared)
            size = ItemSize(native=what) if isinstance(what, int) else ItemSize(**what)
            return WindowItem.of(planner, size, **shared)
        except TypeError as error:
            known = ", ".join(ItemSize.__dataclass_fields__)
            raise PromptError(f"{where}: a {kind} is a file, or any of {known}: {error}") from None

    def _planner(self, source: str) -> tuple[TokenPlanner, Any, dict[str, QualityCurve]]:
        """A reducer or a model without memory, what it does with files, and its curves where they are needed."""
        if source not in self._planners:
            self._planners[source] = self._build(source)
        return self._planners[source]

    def _build(self, source: str) -> tuple[TokenPlanner, Any, dict[str, QualityCurve]]:
        from tokenthrift.models import find
        from tokenthrift.reducers import REDUCERS
        from tokenthrift.sources import SourceError, fetch
        from tokenthrift.tokenize import planner_class

        if source in REDUCERS:
            return REDUCERS[source](), None, {}
        named = self._source(source)
        found = find(named)
        kind = planner_class(type(found.model), source)
        parser = argparse.ArgumentParser(add_help=False)
        kind.add_options(parser)
        options = argparse.Namespace(**vars(parser.parse_args([])), model=str(found.folder), folder=found.folder)
        files = kind(found.model, options)  # type: ignore[call-arg]
        curves: dict[str, QualityCurve] = {}
        if self.curves:
            with suppress(SourceError):  # `Window` says which item lacks a curve
                curves = read_quality(fetch(named, (QUALITY,), revision=found.commit))
        return found.model, files, curves  # type: ignore[return-value]

    def _count(self, row: Mapping[str, Any], where: str) -> int:
        if "tokens" in row:
            tokens = row["tokens"]
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
                raise PromptError(f"{where}: tokens is a whole number, not {tokens!r}")
            return tokens
        if self.tokenizer is None:
            raise PromptError(f"{where}: text without a count: name a `tokenizer`, or give the text's `tokens`")
        if self._counter is None:
            from tokenizers import Tokenizer

            from tokenthrift.sources import fetch

            folder = fetch(self._source(str(self.tokenizer)), ("tokenizer.json",))
            self._counter = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return len(self._counter.encode(str(row["text"]), add_special_tokens=False).ids)

    def _source(self, source: str) -> str:
        beside = self.folder / source
        return str(beside) if beside.is_dir() else source


def _file_cost(files: Any, path: Path, budget: TokenBudget) -> TokenUsage:
    """What a file uses; a budget that one file cannot keep to is a BudgetError like any other."""
    from tokenthrift.media.errors import MediaError

    try:
        usage: TokenUsage = files.plan(path, budget)
    except MediaError as error:
        if budget == TokenBudget():
            raise
        raise BudgetError(f"{budget.to_dict()} for {path.name}", str(error), "more tokens") from error
    return usage


def _check_keys(row: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in row:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise PromptError(
                f"{where}: unknown key {key!r}; "
                + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
            )


def _shown(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
