"""The hooks of one attachment, and the handle that tells what they did."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenthrift.attachment.choices import Choice
from tokenthrift.attachment.encoder import EncoderRun, Kept, install_tower
from tokenthrift.attachment.families import Family
from tokenthrift.attachment.items import Encoded, Item, each, encoded_grids, encoded_items, pictures_of_tiles, runs
from tokenthrift.attachment.rows import NEW_CACHE, Cached, Shortened, lengthen, restore, shorten
from tokenthrift.budget import TokenUsage
from tokenthrift.tokens import TokenBatch

__all__ = ["Attachment"]

_NO_COPY = (
    "a model with a reducer attached cannot be copied, pickled or replicated (DataParallel): its hooks belong to one "
    "model; copy it first, then attach to each copy, or use DistributedDataParallel"
)


@dataclass(slots=True)
class _Call:
    """One call of the model: its arguments by name, and what was encoded within it, by modality."""

    given: Mapping[str, Any]
    encoded: dict[str, Encoded] = field(default_factory=dict)


class _Thread(threading.local):
    """What a thread knows of its own calls: the one that runs, how its rows were shortened, what the latest used."""

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.shortened: Shortened | None = None
        self.usage: tuple[tuple[str, TokenUsage], ...] | None = None
        self.encoding = False
        self.run: EncoderRun | None = None
        self.encoder_usage: dict[str, tuple[TokenUsage, ...]] = {}
        self.encoded: dict[str, Encoded] = {}
        """What `generate` encoded before its first call, by modality."""


class Attachment:
    """What `attach` yields.

    It belongs to one model and to the context it was made in: neither it nor the model can be copied or pickled.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        choice: Choice,
        seconds: Sequence[float] | None,
        *,
        warn: bool,
        inside: bool,
    ) -> None:
        self._model = model
        self._family = family
        self._choice = choice
        self._seconds = seconds
        self._warn = warn
        self._inside = inside
        self._signature = signature(model.forward)
        self._caches: WeakKeyDictionary[Any, Cached] = WeakKeyDictionary()
        self._latest: tuple[tuple[str, TokenUsage], ...] = ()
        self._thread = _Thread()

    @property
    def usage(self) -> tuple[TokenUsage, ...]:
        """Of the latest call with something to reduce, one per item in reading order, row by row.

        Beams and returned sequences are rows of their own. A thread that has called the model sees its own latest call,
        any other the latest of all.
        """
        return tuple(usage for _, usage in self._used)

    @property
    def usage_by_modality(self) -> dict[str, tuple[TokenUsage, ...]]:
        """The same, sorted by modality."""
        found: dict[str, tuple[TokenUsage, ...]] = {}
        for modality, usage in self._used:
            found[modality] = (*found.get(modality, ()), usage)
        return found

    @property
    def encoder_usage(self) -> dict[str, tuple[TokenUsage, ...]]:
        """With `at="encoder"`, what the last layer of the encoder read in this thread's latest call, by modality.

        An item is what the tower reads apart: a picture or clip, a tile or a frame; its tokens are patches, or for Qwen
        towers the groups of patches that become a token.
        """
        return dict(self._thread.encoder_usage)

    @property
    def _used(self) -> tuple[tuple[str, TokenUsage], ...]:
        own = self._thread.usage
        return self._latest if own is None else own

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RuntimeError(_NO_COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(_NO_COPY)

    def install(self) -> list[Callable[[], None]]:
        """Sets the hooks; returns what undoes it."""
        language, eager = getattr(self._model, self._family.language), _outside_graphs
        undo = [
            hook.remove
            for hook in (
                self._model.register_forward_pre_hook(eager(self._before_model), with_kwargs=True),
                self._model.register_forward_hook(eager(self._after_model), always_call=True),
                language.register_forward_pre_hook(eager(self._before_layers), with_kwargs=True),
                language.register_forward_hook(eager(self._after_layers)),
            )
        ]
        for name in self._family.towers if self._inside else ():
            undo += install_tower(getattr(self._model, name), lambda: self._thread.run)
        return undo + [
            self._record(modality) for modality, medium in self._family.media.items() if medium.lengths is not None
        ]

    def _record(self, modality: str) -> Callable[[], None]:
        """Notes how many tokens each item has whenever the model encodes some; returns what undoes it."""
        medium = self._family.media[modality]
        name, measure = medium.method, medium.lengths
        assert measure is not None
        encode = getattr(self._model, name)
        own = self._model.__dict__.get(name)
        encoding = signature(encode)

        @wraps(encode)
        def recording(*args: Any, **kwargs: Any) -> Any:
            if self._thread.encoding:  # clips may be encoded by the method for pictures
                return encode(*args, **kwargs)
            given, call = encoding.bind(*args, **kwargs).arguments, self._thread.call
            run = self._run(modality, given)
            self._thread.encoding, self._thread.run = True, run
            try:
                output = encode(*args, **kwargs)
            finally:
                self._thread.encoding, self._thread.run = False, None
            lengths = measure(self._model, given, output)
            kept = [] if run is None else run.kept()
            if kept:
                self._thread.encoder_usage[modality] = tuple(each.usage for each in kept)
            if [each.usage.native for each in kept] != lengths:
                kept = []  # the units of the encoder are no tokens of the language model
            encoded = Encoded(lengths, encoded_grids(modality, given, lengths), call is not None, kept)
            (self._thread.encoded if call is None else call.encoded)[modality] = encoded
            return output

        def undo() -> None:
            delattr(self._model, name)
            if own is not None:
                setattr(self._model, name, own)

        setattr(self._model, name, recording)
        return undo

    def _run(self, modality: str, given: Mapping[str, Any]) -> EncoderRun | None:
        """The reduction of the encoder for one call of an encoding method."""
        reducer = self._choice.reducers.get(modality)
        if not self._inside or reducer is None or not isinstance(self._choice.budgets, Mapping):
            return None
        return EncoderRun(modality, reducer, self._choice.budgets[modality], given)

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model:
            raise RuntimeError(_NO_COPY)
        given = self._signature.bind(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        call = _Call(given)
        for modality, output in (given.get("mm_encoder_outputs") or {}).items():
            if output is not None and modality in self._family.media:
                early = self._thread.encoded.get(modality)
                lengths = each(self._model, {}, output)
                call.encoded[modality] = early or Encoded(lengths, [(n, 1, 1) for n in lengths], True)
        self._thread.encoded = {m: e for m, e in self._thread.encoded.items() if m in call.encoded}
        self._thread.call = call

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._thread.call = None

    def _before_layers(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        cached = None if cache is None else self._caches.get(cache)
        self._thread.shortened = None
        call = self._thread.call
        # The layers may be called without the model around them; there is nothing to reduce then.
        given = kwargs if call is None else call.given
        items = [] if call is None else self._items(call, kwargs["inputs_embeds"])
        if items:
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(f"visual tokens are reduced at the start of a key-value cache only; {NEW_CACHE}")
            reduced, kept = self._reduce(kwargs, items, given)
            kwargs = {**kwargs, **reduced}
            if kept.all():
                return args, kwargs
            changes, self._thread.shortened = shorten(self._model, self._family, given, kwargs, kept)
        elif cached is not None:
            changes, self._thread.shortened = lengthen(self._family, given, kwargs, cached)
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
        return output if shortened.kept is None else restore(output, shortened.kept)

    def _items(self, call: _Call, embeddings: Tensor) -> list[Item]:
        """Every item of a call that is to be reduced, in reading order."""
        given = {
            modality
            for modality, medium in self._family.media.items()
            if modality in call.encoded or any(call.given.get(name) is not None for name in medium.inputs)
        }
        ids = call.given.get("input_ids")
        if not given:
            return []
        if ids is None:
            raise ValueError(
                "a model with a reducer attached needs input_ids, not inputs_embeds, to find the placeholders"
            )
        if ids.shape != embeddings.shape[:2]:
            raise ValueError(
                f"input_ids of {ids.shape[1]} tokens became a row of {embeddings.shape[1]}; let the processor write "
                "one placeholder for every token"
            )
        reducers = self._choice.reducers
        if self._warn and not given.intersection(reducers):
            names = sorted({type(reducer).__name__ for reducer in reducers.values()}) or ["the reducer"]
            left, reduced = " or ".join(sorted(given)), " or ".join(reducers) or "no"
            warnings.warn(
                f"{', '.join(names)} reduces {reduced} tokens by default, so the {left} tokens of this call stay "
                f"whole; attach(..., modalities={tuple(sorted(given))}) reduces them",
                stacklevel=2,
            )
        items: list[Item] = []
        for modality in given.intersection(reducers):
            medium, encoded = self._family.media[modality], call.encoded.get(modality)
            placeholders = ids == getattr(self._model.config, medium.token)
            if medium.lengths is None:
                apart = medium.tiles_apart
                items += pictures_of_tiles(modality, placeholders, ids) if apart else runs(modality, placeholders)
            elif encoded is not None:
                items += encoded_items(modality, placeholders, encoded)
        return sorted(items, key=lambda item: (item.row, int(item.columns[0])))

    def _reduce(
        self, kwargs: Mapping[str, Any], items: Sequence[Item], given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Tensor]:
        """Puts reduced tokens where those they stand for were; returns what changes, and (B, L) which stay."""
        embeddings: Tensor = kwargs["inputs_embeds"]
        if self._seconds is not None and len(self._seconds) != len(items):
            raise ValueError(f"{len(items)} items but {len(self._seconds)} entries in seconds")
        items = [item._replace(columns=item.columns.to(embeddings.device)) for item in items]
        tokens = TokenBatch.from_items(
            [embeddings[item.row, item.columns] for item in items], self._seconds, [item.grid for item in items]
        )
        modalities = [item.modality for item in items]
        limits = self._choice.limits(modalities, [item.row for item in items], tokens.item_sizes())
        kept = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        changed = embeddings.clone()
        features, slots = self._features(kwargs)
        usage: dict[int, TokenUsage] = {}
        inside = [self._kept(item) for item in items]
        for i, kept_inside in enumerate(inside):
            if kept_inside is None:
                continue
            row, columns = items[i].row, items[i].columns
            kept[row, columns] = False
            kept[row, columns[kept_inside.positions]] = True
            usage[i] = kept_inside.usage
        groups = [
            (reducer, [i for i in chosen if inside[i] is None]) for reducer, chosen in self._choice.groups(modalities)
        ]
        for reducer, chosen in groups:
            if not chosen:
                continue
            batch = tokens if len(chosen) == len(items) else tokens.select(chosen)
            more: dict[str, Any] = {}
            if getattr(reducer, "reads_query", False):
                text = self._text(given).to(embeddings.device)
                more["query"] = [embeddings[items[i].row, text[items[i].row]] for i in chosen]
            reduced = reducer.reduce(batch, [limits[i] for i in chosen], **more)
            if reduced.embeddings.shape[-1] != embeddings.shape[-1]:
                raise ValueError(
                    f"{type(reducer).__name__} makes embeddings of width {reduced.embeddings.shape[-1]}, but the "
                    f"language model reads {embeddings.shape[-1]}; attach a reducer that keeps the width"
                )
            for k, (i, values) in enumerate(zip(chosen, reduced.items(), strict=True)):
                row, columns = items[i].row, items[i].columns
                source = reduced.positions[k][reduced.mask[k]]
                if (source < 0).any() or (source.diff() <= 0).any():
                    raise ValueError(f"{type(reducer).__name__} gives no increasing positions to put its tokens at")
                kept[row, columns] = False
                kept[row, columns[source]] = True
                changed[row, columns[source]] = values.to(embeddings.dtype)
                for feature in features:
                    own = feature[slots[row, columns].to(feature.device)]
                    members = None if reduced.sources is None else reduced.sources[k]
                    feature[slots[row, columns[source]].to(feature.device)] = _alike(own, source, members)
                usage[i] = reduced.usage[k]
        self._latest = self._thread.usage = tuple((modalities[i], usage[i]) for i in range(len(items)))
        lists = [name for name, kind in self._family.along.items() if kind == "features" and kwargs.get(name)]
        changes: dict[str, Any] = {"inputs_embeds": changed}
        for name in lists:
            changes[name], features = features[: len(kwargs[name])], features[len(kwargs[name]) :]
        return changes, kept

    def _kept(self, item: Item) -> Kept | None:
        """What the encoder left of an item, where its units are the tokens of the item."""
        call = self._thread.call
        encoded = None if call is None else call.encoded.get(item.modality)
        return encoded.kept[item.number] if encoded is not None and encoded.kept and item.number >= 0 else None

    def _text(self, given: Mapping[str, Any]) -> Tensor:
        """(B, L) bool: what is neither media nor padding."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
        for medium in self._family.media.values():
            text &= ids != getattr(self._model.config, medium.token)
        return text

    def _features(self, kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
        """Copies of all that is reduced like the tokens, and (B, L) the row of each position in them."""
        lists = [kwargs[name] for name, kind in self._family.along.items() if kind == "features" and kwargs.get(name)]
        if not lists:
            return [], torch.empty(0)
        marked = kwargs["visual_pos_masks"]
        return [feature.clone() for each in lists for feature in each], (marked.flatten().cumsum(0) - 1).view_as(marked)


class _OutsideGraphs:
    """A hook that torch.compile never traces, since lengths of rows follow from content; not to be copied either."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = torch.compiler.disable(hook)

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RuntimeError(_NO_COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(_NO_COPY)


def _outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    return _OutsideGraphs(hook) if "torch._dynamo" in sys.modules else hook


def _alike(features: Tensor, source: Tensor, members: Tensor | None) -> Tensor:
    """Features (N, D) reduced as their tokens were: kept at `source`, or averaged over the `members` (N,) of each."""
    source = source.to(features.device)
    if members is None:
        return features[source]
    members = members[: len(features)].to(features.device)
    real = members >= 0
    sums = features.new_zeros(len(source), features.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, members[real], features[real].float())
    counts = sums.new_zeros(len(source)).index_add(0, members[real], sums.new_ones(int(real.sum())))
    return (sums / counts.clamp(min=1)[:, None]).to(features.dtype)
