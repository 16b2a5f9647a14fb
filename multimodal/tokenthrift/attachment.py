"""Puts a token reducer into a live vision-language model of transformers, and takes it out again.

    with attach(model, BipartiteMerging(), "25%") as handle:
        output = model.generate(**inputs)
        print(handle.usage)

Supported: LLaVA-OneVision (one picture, several, videos), Qwen2-VL and Qwen2.5-VL (pictures, videos, M-RoPE), any
batch size, padding on either side, forward and generate (greedy, sampling, beams), training, eager and SDPA attention.
FAMILIES lists what is tested; any other family raises, and so does a call of a kind that cannot be shortened.

The seam is the call of the language model inside the model, after the visual features stand in their placeholders
and before the first layer. There a hook takes the visual tokens of every item out, reduces them, and hands the
layers shorter rows; after the last layer another hook spreads the result over the native positions again. Everything
outside sees native lengths: `input_ids`, `attention_mask`, `labels`, logits and what `generate` returns. A dropped
position shows the state of the last kept one before it, which is what predicts the next token. Layers, attention and
key-value cache hold the reduced tokens only; attention maps, if requested, have their size.

Positions: with one-dimensional positions the rows close up, as if the processor had written fewer placeholders.
M-RoPE positions stay those of the source: a kept token keeps its position in time, height and width.

Differs from published plugins (ToMe, VisionZip, FrameFusion), which rebind classes or methods of every model in the
process and have no way back: here are forward hooks of one instance, and two of its methods wrapped to learn where
one picture ends and the next begins, all removed on exit. No attention maps, no copied forward, no code per family.

What a call needs to remember belongs to its thread, so threads that share an attached model do not see each other's
pictures. Hooks belong to one model: a deep copy or a pickle of an attached model raises, and so does a
call of a shallow copy or of a DataParallel replica, which would read another model's features.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from tokenthrift.budget import BudgetError, BudgetLike, TokenBudget, TokenUsage
from tokenthrift.reducers.base import TokenReducer
from tokenthrift.shortened_rows import NEW_CACHE, Cached, Shortened, lengthen, shorten, spread
from tokenthrift.tokens import TokenBatch
from tokenthrift.visual_grids import Grid, encoded_grids, grids_of_rows

__all__ = ["FAMILIES", "Attachment", "attach"]

FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")
"""`config.model_type` of the models that `attach` is tested on."""

_MODALITIES = ("image", "video")
_NO_COPY = (
    "a model with a reducer attached cannot be copied, pickled or replicated (DataParallel): its hooks belong to one "
    "model; copy it first, then attach to each copy, or use DistributedDataParallel"
)
_ATTACHED: WeakSet[nn.Module] = WeakSet()


class _Found(NamedTuple):
    """An item in the input: its row, the columns of its placeholders, and its frames, rows and columns of tokens."""

    row: int
    columns: Tensor
    grid: Grid


@dataclass(slots=True)
class _Call:
    """What one call of the model has said so far: its ids, and for each modality lengths and grids of its items."""

    ids: Tensor | None
    lengths: dict[str, list[int]]
    grids: dict[str, list[Grid]] = field(default_factory=dict)


class _Thread(threading.local):
    """What a thread knows of its own calls: the one that runs, how its rows were shortened, what the latest used."""

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.shortened: Shortened | None = None
        self.usage: tuple[TokenUsage, ...] | None = None
        self.encoded: dict[str, list[Grid]] = {}
        """Grids of what `generate` encoded before its first call, by modality."""


@contextmanager
def attach(
    model: nn.Module,
    reducer: TokenReducer,
    budget: BudgetLike,
    *,
    modalities: Collection[str] | None = None,
    seconds: Sequence[float] | None = None,
) -> Iterator[Attachment]:
    """Reduces the visual tokens of this model, and of no other, until the context is left.

    Every picture and every video is an item of its own under the budget. A budget at or above native leaves outputs
    bit for bit as they were. Leaving, also by an exception, restores the model exactly.

    Args:
        model: A transformers vision-language model, bare, with a head, or wrapped (PEFT).
        reducer: Anything that keeps the width of the embeddings.
        budget: Ceilings per item.
        modalities: What is reduced, "image", "video" or both; all others stay bit for bit. If not given, what the
            reducer names in an attribute `modalities`, and both if it names none. A call that then has nothing to
            reduce (a picture for a reducer of videos) gives a UserWarning.
        seconds: Durations of the items that every call reduces, in reading order, which `tokens_per_second` needs: the
            model does not know them.

    Yields:
        The handle; its `usage` tells what the latest call with pictures or videos used.

    Raises:
        BudgetError: The reducer does not honor a field of the budget.
        ValueError: The family is not supported, or a call is of a kind that cannot be shortened (see the message).
        RuntimeError: The model has a reducer attached already.
    """
    budget = TokenBudget.parse(budget)
    reducer.support.check(budget)
    if budget.tokens_per_second is not None and seconds is None:
        raise BudgetError(
            f"tokens_per_second={budget.tokens_per_second} without seconds",
            "max_tokens, retention, or attach(..., seconds=...)",
            "a share such as 25%",
        )
    chosen = tuple(getattr(reducer, "modalities", _MODALITIES) if modalities is None else modalities)
    if unknown := set(chosen).difference(_MODALITIES):
        raise ValueError(f"no modalities that can be reduced: {', '.join(sorted(unknown))}; known: image, video")
    inner = _find(model)
    if inner in _ATTACHED:
        raise RuntimeError("this model has a reducer attached already; leave that context first")
    handle = Attachment(inner, reducer, budget, chosen, seconds, warn=modalities is None)
    with ExitStack() as undo:
        _ATTACHED.add(inner)
        undo.callback(_ATTACHED.discard, inner)
        language = inner.language_model
        for hook in (
            inner.register_forward_pre_hook(handle._before_model, with_kwargs=True),
            inner.register_forward_hook(handle._after_model, always_call=True),
            language.register_forward_pre_hook(handle._before_layers, with_kwargs=True),
            language.register_forward_hook(handle._after_layers),
        ):
            undo.callback(hook.remove)
        for modality in _MODALITIES:
            undo.callback(handle._record_items(modality))
        yield handle


class Attachment:
    """What `attach` yields.

    It belongs to one model and to the context it was made in: neither it nor the model can be copied or pickled.
    """

    def __init__(
        self,
        model: Any,
        reducer: TokenReducer,
        budget: TokenBudget,
        modalities: Collection[str],
        seconds: Sequence[float] | None,
        warn: bool,
    ) -> None:
        self._model = model
        self._reducer = reducer
        self._budget = budget
        self._modalities = modalities
        self._seconds = seconds
        self._warn = warn
        self._caches: WeakKeyDictionary[Any, Cached] = WeakKeyDictionary()
        self._latest: tuple[TokenUsage, ...] = ()
        self._thread = _Thread()

    @property
    def usage(self) -> tuple[TokenUsage, ...]:
        """Of the latest call with something to reduce, one per item in reading order, row by row.

        Beams and returned sequences are rows of their own. A thread that has called the model sees its own latest call,
        any other the latest of all.
        """
        own = self._thread.usage
        return self._latest if own is None else own

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RuntimeError(_NO_COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(_NO_COPY)

    def _record_items(self, modality: str) -> Callable[[], None]:
        """Notes how many tokens each item has whenever the model encodes some; returns what undoes it."""
        name = f"get_{modality}_features"
        encode = getattr(self._model, name)
        own = self._model.__dict__.get(name)

        @wraps(encode)
        def recording(*args: Any, **kwargs: Any) -> Any:
            output = encode(*args, **kwargs)
            lengths, given = _lengths(output), signature(encode).bind(*args, **kwargs).arguments
            grids = encoded_grids(self._model.config, modality, given, lengths)
            if (call := self._thread.call) is None:
                self._thread.encoded[modality] = grids
            else:
                call.lengths[modality], call.grids[modality] = lengths, grids
            return output

        def undo() -> None:
            delattr(self._model, name)
            if own is not None:
                setattr(self._model, name, own)

        setattr(self._model, name, recording)
        return undo

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model:
            raise RuntimeError(_NO_COPY)
        encoded = kwargs.get("mm_encoder_outputs") or {}
        lengths = {name: _lengths(output) for name, output in encoded.items() if output is not None}
        grids = {name: self._thread.encoded[name] for name in lengths if name in self._thread.encoded}
        self._thread.call = _Call(kwargs.get("input_ids", args[0] if args else None), lengths, grids)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._thread.call, self._thread.encoded = None, {}

    def _before_layers(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        cached = None if cache is None else self._caches.get(cache)
        self._thread.shortened = None
        call = self._thread.call
        # The layers may be called without the model around them; there is nothing to reduce then.
        items = [] if call is None else self._items(call)
        if items:
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(f"visual tokens are reduced at the start of a key-value cache only; {NEW_CACHE}")
            embeddings, kept = self._reduce(kwargs["inputs_embeds"], items)
            kwargs = {**kwargs, "inputs_embeds": embeddings}
            if kept.all():
                return args, kwargs
            changes, self._thread.shortened = shorten(kwargs, kept)
        elif cached is not None:
            changes, self._thread.shortened = lengthen(kwargs, cached)
        else:
            return None
        if "cache_position" in kwargs:  # native positions, which early releases of transformers 5 hand over
            changes["cache_position"] = None
        return args, {**kwargs, **changes}

    def _after_layers(self, module: nn.Module, args: Any, output: Any) -> Any:
        shortened, self._thread.shortened = self._thread.shortened, None
        if shortened is None:
            return None
        if output.past_key_values is not None:
            self._caches[output.past_key_values] = shortened.cached
        if shortened.kept is not None:
            output["last_hidden_state"] = spread(output.last_hidden_state, shortened.kept)
            if output.hidden_states is not None:
                output["hidden_states"] = tuple(spread(state, shortened.kept) for state in output.hidden_states)
        return output

    def _items(self, call: _Call) -> list[_Found]:
        """Every item of a call that is to be reduced, in reading order."""
        if not call.lengths:
            return []
        if call.ids is None:
            raise ValueError(
                "a model with a reducer attached needs input_ids, not inputs_embeds, to find the placeholders"
            )
        if self._warn and not set(call.lengths).intersection(self._modalities):
            given, reduced = " or ".join(sorted(call.lengths)), " or ".join(self._modalities)
            warnings.warn(
                f"{type(self._reducer).__name__} reduces {reduced} tokens by default, so the {given} tokens of "
                f"this call stay whole; attach(..., modalities={tuple(sorted(call.lengths))}) reduces them",
                stacklevel=2,
            )
        items = []
        for modality, lengths in call.lengths.items():
            if modality not in self._modalities:
                continue
            rows, columns = (call.ids == getattr(self._model.config, f"{modality}_token_id")).nonzero(as_tuple=True)
            # In transformers 5.17 and earlier LLaVA-OneVision gives every clip its newline only after encoding.
            later = (len(rows) - sum(lengths)) // max(len(lengths), 1)
            lengths = [n + later for n in lengths]
            by_item = list(zip(rows.split(lengths), columns.split(lengths), strict=True))
            grids = grids_of_rows(call.grids.get(modality, []), [int(row[:1].sum()) for row, _ in by_item], lengths)
            for (row, column), grid in zip(by_item, grids, strict=True):
                if len(row.unique()) > 1:
                    raise ValueError(f"the placeholders of one {modality} lie in more than one row of input_ids")
                if len(row):
                    items.append(_Found(int(row[0]), column, grid))
        return sorted(items, key=lambda item: (item.row, int(item.columns[0])))

    def _reduce(self, embeddings: Tensor, items: Sequence[_Found]) -> tuple[Tensor, Tensor]:
        """Puts reduced tokens where those they stand for were; returns (B, L, D), and (B, L) which positions stay."""
        tokens = TokenBatch.from_items(
            [embeddings[item.row, item.columns] for item in items], self._seconds, [item.grid for item in items]
        )
        reduced = self._reducer.reduce(tokens, self._budget)
        if reduced.embeddings.shape[-1] != embeddings.shape[-1]:
            raise ValueError(
                f"{type(self._reducer).__name__} makes embeddings of width {reduced.embeddings.shape[-1]}, but the "
                f"language model reads {embeddings.shape[-1]}; attach a reducer that keeps the width"
            )
        kept = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        embeddings = embeddings.clone()
        for (row, columns, _), values, positions, real in zip(
            items, reduced.items(), reduced.positions, reduced.mask, strict=True
        ):
            source = positions[real]
            if (source < 0).any() or (source.diff() <= 0).any():
                raise ValueError(f"{type(self._reducer).__name__} gives no increasing positions to put its tokens at")
            kept[row, columns] = False
            kept[row, columns[source]] = True
            embeddings[row, columns[source]] = values.to(embeddings.dtype)
        self._latest = self._thread.usage = reduced.usage
        return embeddings, kept


def _find(model: nn.Module) -> Any:
    """The part of the model that holds both the encoder and the language model."""
    for module in model.modules():
        if "language_model" in module._modules and hasattr(module, "get_image_features"):
            family = getattr(getattr(module, "config", None), "model_type", None)
            if family in FAMILIES:
                return module
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise ValueError(f"cannot attach a reducer to {name}; supported families: {', '.join(FAMILIES)}")


def _lengths(output: Any) -> list[int]:
    return [len(features) for features in getattr(output, "pooler_output", output)]
