"""Puts a token reducer into a live vision-language model of transformers, and takes it out again.

    with attach(model, BipartiteMerging(), "25%") as handle:
        output = model.generate(**inputs)
        print(handle.usage)

Supported: LLaVA-OneVision (one picture, several, videos), Qwen2-VL and Qwen2.5-VL (pictures, videos, M-RoPE), any
batch size, padding on either side, forward and generate (greedy, sampling, beams), training, eager and SDPA attention.
FAMILIES lists what is tested; any other family raises, and so does a call of a kind that cannot be shortened.

The seam is the call of the language model inside the model, after the visual features stand in their placeholders
and before the first layer. There a hook takes the visual tokens of every item out, reduces them, and hands the
layers shorter rows; after the last layer another hook spreads the result over the native places again. Everything
outside sees native lengths: `input_ids`, `attention_mask`, `labels`, logits and what `generate` returns. A place that
was dropped shows the state of the last kept place before it, which is what predicts the next token. Layers, attention
and key-value cache hold the reduced tokens only; attention maps, where asked for, have their size.

Positions: with one-dimensional positions the rows close up, as if the processor had written fewer placeholders.
M-RoPE positions stay those of the source: a kept token keeps its place in time, height and width.

Differs from published plugins (ToMe, VisionZip, FrameFusion), which rebind classes or methods of every model in the
process and have no way back: here are forward hooks of one instance, and two of its methods wrapped to learn where
one picture ends and the next begins, all removed on exit. No attention maps, no copied forward, no code per family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from tokenthrift.budget import BudgetError, BudgetLike, TokenBudget, TokenUsage
from tokenthrift.reducers.base import TokenReducer
from tokenthrift.tokens import TokenBatch
from tokenthrift.visual_grids import Grid, encoded_grids, grids_of_rows

__all__ = ["FAMILIES", "Attachment", "attach"]

FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")
"""`config.model_type` of the models that `attach` is tested on."""

_MODALITIES = ("image", "video")
_NEW_CACHE = "pass the whole conversation with a new cache (no cropping, no assisted decoding, no prefill_chunk_size)"
_ATTACHED: WeakSet[nn.Module] = WeakSet()


class _Found(NamedTuple):
    """An item in the input: its row, the columns of its placeholders, and its frames, rows and columns of tokens."""

    row: int
    columns: Tensor
    grid: Grid


@dataclass(frozen=True, slots=True)
class _Cached:
    """What the layers hold of a row: (B, K) bool mask, the native length, and (B,) the next text position."""

    mask: Tensor
    native: int
    following: Tensor


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """One shortened call: what the cache will hold, and (B, L) which of the native places were kept."""

    cached: _Cached
    kept: Tensor | None


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
            reducer names in an attribute `modalities`, and both if it names none.
        seconds: Durations of the items that every call reduces, in reading order, which `tokens_per_second` needs: the
            model is not told them.

    Yields:
        The handle; its `usage` tells what the latest call with pictures or videos used.

    Raises:
        BudgetError: The reducer does not honour a field of the budget.
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
    handle = Attachment(inner, reducer, budget, chosen, seconds)
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
            undo.callback(handle._listen(modality))
        yield handle


class Attachment:
    """What `attach` yields.

    Attributes:
        usage: Of the latest call with something to reduce, one per item in reading order, row by row. Beams and
            returned sequences are rows of their own.
    """

    def __init__(
        self,
        model: Any,
        reducer: TokenReducer,
        budget: TokenBudget,
        modalities: Collection[str],
        seconds: Sequence[float] | None,
    ) -> None:
        self.usage: tuple[TokenUsage, ...] = ()
        self._model = model
        self._reducer = reducer
        self._budget = budget
        self._modalities = modalities
        self._seconds = seconds
        self._ids: Tensor | None = None
        self._lengths: dict[str, list[int]] = {}
        self._grids: dict[str, list[Grid]] = {}
        self._shrunk: _Shrunk | None = None
        self._caches: WeakKeyDictionary[Any, _Cached] = WeakKeyDictionary()

    def _listen(self, modality: str) -> Callable[[], None]:
        """Notes how many tokens each item has whenever the model encodes some; returns what undoes it."""
        name = f"get_{modality}_features"
        encode = getattr(self._model, name)
        own = self._model.__dict__.get(name)

        @wraps(encode)
        def listening(*args: Any, **kwargs: Any) -> Any:
            output = encode(*args, **kwargs)
            self._lengths[modality] = _lengths(output)
            given = signature(encode).bind(*args, **kwargs).arguments
            self._grids[modality] = encoded_grids(self._model.config, modality, given, self._lengths[modality])
            return output

        def undo() -> None:
            delattr(self._model, name)
            if own is not None:
                setattr(self._model, name, own)

        setattr(self._model, name, listening)
        return undo

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = kwargs.get("input_ids", args[0] if args else None)
        encoded = kwargs.get("mm_encoder_outputs") or {}
        self._lengths = {name: _lengths(output) for name, output in encoded.items() if output is not None}

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ids, self._lengths, self._grids = None, {}, {}

    def _before_layers(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._shrunk = None
        cache = kwargs.get("past_key_values")
        cached = None if cache is None else self._caches.get(cache)
        items = self._items()
        if items:
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(f"visual tokens are reduced at the start of a key-value cache only; {_NEW_CACHE}")
            embeddings, kept = self._reduce(kwargs["inputs_embeds"], items)
            kwargs = {**kwargs, "inputs_embeds": embeddings}
            if kept.all():
                return args, kwargs
            changes, self._shrunk = _shorten(kwargs, kept)
        elif cached is not None:
            changes, self._shrunk = _lengthen(kwargs, cached)
        else:
            return None
        if "cache_position" in kwargs:  # native places, which early releases of transformers 5 hand over
            changes["cache_position"] = None
        return args, {**kwargs, **changes}

    def _after_layers(self, module: nn.Module, args: Any, output: Any) -> Any:
        shrunk, self._shrunk = self._shrunk, None
        if shrunk is None:
            return None
        if output.past_key_values is not None:
            self._caches[output.past_key_values] = shrunk.cached
        if shrunk.kept is not None:
            output["last_hidden_state"] = _spread(output.last_hidden_state, shrunk.kept)
            if output.hidden_states is not None:
                output["hidden_states"] = tuple(_spread(state, shrunk.kept) for state in output.hidden_states)
        return output

    def _items(self) -> list[_Found]:
        """Every item of this call that is to be reduced, in reading order."""
        if not self._lengths:
            return []
        if self._ids is None:
            raise ValueError(
                "a model with a reducer attached needs input_ids, not inputs_embeds, to find the placeholders"
            )
        items = []
        for modality, lengths in self._lengths.items():
            if modality not in self._modalities:
                continue
            rows, columns = (self._ids == getattr(self._model.config, f"{modality}_token_id")).nonzero(as_tuple=True)
            # In transformers 5.17 and earlier LLaVA-OneVision gives every clip its newline only after encoding.
            later = (len(rows) - sum(lengths)) // max(len(lengths), 1)
            lengths = [n + later for n in lengths]
            by_item = list(zip(rows.split(lengths), columns.split(lengths), strict=True))
            grids = grids_of_rows(self._grids.get(modality, []), [int(row[:1].sum()) for row, _ in by_item], lengths)
            for (row, column), grid in zip(by_item, grids, strict=True):
                if len(row.unique()) > 1:
                    raise ValueError(f"the placeholders of one {modality} lie in more than one row of input_ids")
                if len(row):
                    items.append(_Found(int(row[0]), column, grid))
        return sorted(items, key=lambda item: (item.row, int(item.columns[0])))

    def _reduce(self, embeddings: Tensor, items: Sequence[_Found]) -> tuple[Tensor, Tensor]:
        """Puts the reduced tokens in the places they stand for; returns (B, L, D), and (B, L) which places are kept."""
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
            places = positions[real]
            if (places < 0).any() or (places.diff() <= 0).any():
                raise ValueError(f"{type(self._reducer).__name__} gives no increasing positions to put its tokens at")
            kept[row, columns] = False
            kept[row, columns[places]] = True
            embeddings[row, columns[places]] = values.to(embeddings.dtype)
        self.usage = reduced.usage
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


def _new_mask(kwargs: dict[str, Any], past: int) -> Tensor:
    """(B, L) bool: which of the tokens of this call are real."""
    embeddings, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
    if mask is None:
        return torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError("a reducer needs the plain (B, L) attention_mask: no static cache, no prepared masks")
    if mask.shape[1] != past + embeddings.shape[1]:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} places, not {past + embeddings.shape[1]}; {_NEW_CACHE}"
        )
    return mask[:, past:].bool()


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """The one-dimensional positions that are also given, if any: (1 or B, L)."""
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def _restarts(position_ids: Tensor | None, mask: Tensor | None, cached: _Cached) -> bool:
    """Whether the call repeats tokens that the cache holds: a new generate cuts them by the length of the cache."""
    if mask is not None or position_ids is None or (position_ids.ndim == 3 and len(position_ids) == 3):
        return False  # the mask tells by its length, and three axes are made by the model for the tokens at hand
    text = _text_positions(position_ids)
    first, expected = (position_ids[0, :, 0], cached.following) if text is None else (text[:, 0], cached.native)
    return bool((first != expected).any())


def _like(position_ids: Tensor | None, places: Tensor, text: Tensor) -> Tensor:
    """`places` (B, K) or (3, B, K) in the layout positions came in: with `text` (B, K) in front where 4 axes came."""
    if position_ids is None or position_ids.ndim == 2:
        return places
    axes = places.expand(3, -1, -1)
    return torch.cat([text[None], axes]) if len(position_ids) == 4 else axes


def _shorten(kwargs: dict[str, Any], kept: Tensor) -> tuple[dict[str, Any], _Shrunk]:
    """What changes of a first call when only some places are kept; rows are aligned at their last token."""
    native, position_ids = _new_mask(kwargs, 0), kwargs.get("position_ids")
    text = _text_positions(position_ids)
    if kwargs.get("attention_mask") is None and text is not None and (text.diff() != 1).any():
        raise ValueError("several sequences packed into one row cannot be reduced; pad them into rows")
    real = native & kept
    counts = real.sum(1)
    columns = real.long().argsort(dim=1, stable=True)[:, real.shape[1] - int(counts.max()) :]
    mask = real.gather(1, columns)
    text = (mask.cumsum(1) - 1).clamp(min=0)
    places, following = text, counts
    if position_ids is not None and position_ids.ndim == 3:
        axes = position_ids[-3:].expand(-1, len(kept), -1)
        places, following = axes.gather(2, columns.expand(3, -1, -1)), axes.amax(0).masked_fill(~native, -1).amax(1) + 1
    embeddings = kwargs["inputs_embeds"]
    changes = {
        "inputs_embeds": embeddings.gather(1, columns[..., None].expand(-1, -1, embeddings.shape[-1])),
        "attention_mask": mask.long(),
        "position_ids": _like(position_ids, places, text),
    }
    return changes, _Shrunk(_Cached(mask, real.shape[1], following), real)


def _lengthen(kwargs: dict[str, Any], cached: _Cached) -> tuple[dict[str, Any], _Shrunk]:
    """What changes of a later call, whose mask and positions are native ones, when the cache is shorter."""
    new, position_ids, held = _new_mask(kwargs, cached.native), kwargs.get("position_ids"), cached.mask
    fits = len(new) == len(held) and kwargs["past_key_values"].get_seq_length() == held.shape[1]
    if not fits or _restarts(position_ids, kwargs.get("attention_mask"), cached):
        raise ValueError(
            f"the key-value cache does not fit the call since its visual tokens were reduced; {_NEW_CACHE}"
        )
    mask = torch.cat([held, new], dim=1)
    text = (mask.cumsum(1) - 1)[:, held.shape[1] :]
    places = cached.following[:, None] + new.cumsum(1) - 1
    changes = {"attention_mask": mask.long(), "position_ids": _like(position_ids, places, text)}
    return changes, _Shrunk(_Cached(mask, cached.native + new.shape[1], cached.following + new.sum(1)), None)


def _spread(states: Tensor, kept: Tensor) -> Tensor:
    """Native places again: (B, K, D) to (B, L, D), every place showing the last kept one up to it, or zeros."""
    rank = kept.cumsum(1) - 1
    slots = (rank + states.shape[1] - kept.sum(1, keepdim=True)).clamp(min=0)
    spread = states.gather(1, slots[..., None].expand(-1, -1, states.shape[-1]))
    return spread.masked_fill((rank < 0)[..., None], 0)
