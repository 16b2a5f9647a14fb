"""Rows of a language model's input without the tokens that a reducer dropped, and its output with them again.

Source: none; the published plugins (ToMe, VisionZip, FrameFusion) copy the model's forward instead. `shorten` and
`lengthen` say what changes of the call of the layers, `spread` gives their output its native length back. A position
here is a column of the row; text positions and M-RoPE positions are what the layers are given as `position_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenthrift.attachment.families import Family
from tokenthrift.padding import gather_rows

__all__ = ["NEW_CACHE", "Cached", "Shortened", "lengthen", "restore", "shorten", "spread"]

NEW_CACHE = "pass the whole conversation with a new cache (no cropping, no assisted decoding, no prefill_chunk_size)"


@dataclass(frozen=True, slots=True)
class Cached:
    """What the layers hold of a row: (B, K) bool mask, the native length, and (B,) the next text position."""

    mask: Tensor
    native: int
    following: Tensor


@dataclass(frozen=True, slots=True)
class Shortened:
    """One shortened call: what the cache will hold, and (B, L) which of the native positions were kept."""

    cached: Cached
    kept: Tensor | None


def _new_mask(embeddings: Tensor, mask: Any, past: int) -> Tensor:
    """(B, L) bool: which of the tokens of this call are real."""
    if mask is None:
        return torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError("a reducer needs the plain (B, L) attention_mask: no static cache, no prepared masks")
    if mask.shape[1] != past + embeddings.shape[1]:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} positions, not {past + embeddings.shape[1]}; {NEW_CACHE}"
        )
    return mask[:, past:].bool().to(embeddings.device)


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """The one-dimensional positions that are also given, if any: (1 or B, L)."""
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def _restarts(position_ids: Tensor | None, mask: Tensor | None, cached: Cached, first: int) -> bool:
    """Whether the call repeats tokens that the cache holds: a new generate cuts them by the length of the cache."""
    if mask is not None or position_ids is None or (position_ids.ndim == 3 and len(position_ids) == 3):
        return False  # the mask says so by its length, and three axes are made by the model for the tokens at hand
    text = _text_positions(position_ids)
    if text is None:
        return bool((position_ids[0, :, 0] != cached.following).any())
    return bool((text[:, 0] != cached.native + first).any())


def _like(position_ids: Tensor | None, ids: Tensor, text: Tensor) -> Tensor:
    """`ids` (B, K) or (3, B, K) in the layout positions came in: with `text` (B, K) in front where 4 axes came."""
    if position_ids is None or position_ids.ndim == 2:
        return ids
    axes = ids.expand(3, -1, -1)
    return torch.cat([text[None], axes]) if len(position_ids) == 4 else axes


def shorten(
    model: Any, family: Family, given: Mapping[str, Any], kwargs: Mapping[str, Any], kept: Tensor
) -> tuple[dict[str, Any], Shortened]:
    """What changes of a first call when only some positions are kept; rows are aligned at their last token.

    Args:
        model: The part that holds encoder and layers.
        family: Of the model.
        given: What the model was called with.
        kwargs: What the layers are called with.
        kept: (B, L) bool.
    """
    native, position_ids = (
        _new_mask(kwargs["inputs_embeds"], given.get("attention_mask"), 0),
        kwargs.get("position_ids"),
    )
    text = _text_positions(position_ids)
    if given.get("attention_mask") is None and text is not None and (text.diff() != 1).any():
        raise ValueError("several sequences packed into one row cannot be reduced; pad them into rows")
    real = native & kept
    counts = real.sum(1)
    columns = real.long().argsort(dim=1, stable=True)[:, real.shape[1] - int(counts.max()) :]
    mask = real.gather(1, columns)
    text = (mask.cumsum(1) - 1).clamp(min=0) + family.first_position
    ids, following = text, counts + family.first_position
    if position_ids is not None and position_ids.ndim == 3:
        axes = position_ids[-3:].expand(-1, len(kept), -1)
        ids, following = axes.gather(2, columns.expand(3, -1, -1)), axes.amax(0).masked_fill(~native, -1).amax(1) + 1
    changes: dict[str, Any] = {
        "inputs_embeds": gather_rows(kwargs["inputs_embeds"], columns),
        "attention_mask": mask.long(),
        "position_ids": _like(position_ids, ids, text),
    }
    for name, kind in family.along.items():
        if kwargs.get(name) is not None:
            if kind == "positions":
                changes[name] = gather_rows(kwargs[name].to(columns.device), columns)
                if changes[name].dtype == torch.bool:
                    changes[name] &= mask
            else:
                marked = kept[kwargs["visual_pos_masks"].to(kept.device)]
                changes[name] = [features[marked.to(features.device)] for features in kwargs[name]]
    if family.masks is not None:
        types = given.get("token_type_ids")
        types = None if types is None else types.to(columns.device).gather(1, columns)
        changes["attention_mask"] = family.masks(model, {**kwargs, **changes}, types)
    return changes, Shortened(Cached(mask, real.shape[1], following), real)


def lengthen(
    family: Family, given: Mapping[str, Any], kwargs: Mapping[str, Any], cached: Cached
) -> tuple[dict[str, Any], Shortened]:
    """What changes of a later call, whose mask and positions are native ones, when the cache is shorter."""
    position_ids, held = kwargs.get("position_ids"), cached.mask
    new = _new_mask(kwargs["inputs_embeds"], given.get("attention_mask"), cached.native)
    fits = len(new) == len(held) and kwargs["past_key_values"].get_seq_length() == held.shape[1]
    if not fits or _restarts(given.get("position_ids"), given.get("attention_mask"), cached, family.first_position):
        raise ValueError(f"the key-value cache does not fit the call since its visual tokens were reduced; {NEW_CACHE}")
    mask = torch.cat([held, new], dim=1)
    text = (mask.cumsum(1) - 1)[:, held.shape[1] :] + family.first_position
    ids = cached.following[:, None] + new.cumsum(1) - 1
    changes = {"attention_mask": mask.long(), "position_ids": _like(position_ids, ids, text)}
    return changes, Shortened(Cached(mask, cached.native + new.shape[1], cached.following + new.sum(1)), None)


def spread(states: Tensor, kept: Tensor) -> Tensor:
    """Native positions again: (B, K, D) to (B, L, D), each showing the last kept one up to it, or zeros."""
    kept = kept.to(states.device)
    rank = kept.cumsum(1) - 1
    slots = (rank + states.shape[1] - kept.sum(1, keepdim=True)).clamp(min=0)
    return gather_rows(states, slots).masked_fill((rank < 0)[..., None], 0)


def restore(output: Any, kept: Tensor) -> Any:
    """The output of the layers at native positions."""
    for name in ("last_hidden_state", "logits"):
        if output.get(name) is not None:
            output[name] = spread(output[name], kept)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(spread(state, kept) for state in output["hidden_states"])
    return output
