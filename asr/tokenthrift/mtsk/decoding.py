"""Texts from prefixes: the likeliest token each time, or a beam search, both without chance and both in batches.

Source: Llama-MTSK (arXiv 2503.06362), section 4.1 decodes with 15 beams; the search itself is that of transformers.

Differs from the published code, where the language model's own settings turn the search into sampling, one utterance at
a time: nothing here is drawn, rows are padded on the left and masked, and every token comes with its probability. A
prefix may go on from one that was read before, so that all video rates of one audio rate share what was heard.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from tokenthrift.mtsk.sequence import pad_rows

__all__ = ["Heard", "Written", "listen", "write"]


@dataclass(frozen=True, eq=False)
class Heard:
    """The start of a batch of prefixes, read once by the language model.

    Attributes:
        embeddings: (B, P, H) padded on the left.
        mask: (B, P) bool.
        cache: its keys and values; never written to.
    """

    embeddings: Tensor
    mask: Tensor
    cache: DynamicCache

    def select(self, rows: Sequence[int]) -> Heard:
        """Some of the rows."""
        places = torch.as_tensor(rows, device=self.mask.device)
        cache = copy.deepcopy(self.cache)
        cache.batch_select_indices(places)
        return Heard(self.embeddings[places], self.mask[places], cache)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written for one prefix: tokens without the end, and the probability of each and of the end."""

    ids: tuple[int, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def listen(lm: PreTrainedModel, heads: Sequence[Tensor]) -> Heard | None:
    """Reads the starts (P_i, H) of prefixes; None where one of them is empty and there is nothing to share."""
    if not all(len(head) for head in heads):
        return None
    embeddings, mask = pad_rows(heads, "left")
    cache = DynamicCache(config=lm.config)
    cast(Any, lm).model(
        inputs_embeds=embeddings,
        attention_mask=mask.long(),
        position_ids=_positions(mask),
        past_key_values=cache,
        use_cache=True,
    )
    return Heard(embeddings, mask, cache)


@torch.no_grad()
def write(
    lm: PreTrainedModel, tails: Sequence[Tensor], limits: Sequence[int], end: int, *, beams: int, heard: Heard | None
) -> list[Written]:
    """Writes a text after each prefix.

    Args:
        lm: the language model, adapted.
        tails: (L_i, H) each, at least one position: the prefixes, or what follows in them after `heard`.
        limits: most tokens for each, its end included.
        end: token that ends a text.
        beams: width of the search; 1 takes the likeliest token each time.
        heard: the starts of the prefixes.
    """
    embeddings, mask = pad_rows(tails, "left")
    if heard is not None:
        mask = torch.cat([heard.mask, mask], 1)
    if beams == 1:
        return _likeliest(lm, embeddings, mask, limits, end, heard)
    if heard is not None:
        embeddings = torch.cat([heard.embeddings, embeddings], 1)
    out: list[Written | None] = [None] * len(tails)
    for limit in sorted(set(limits)):
        # A beam search that may go on longer can end up elsewhere, so each limit has a search of its own.
        rows = [i for i, own in enumerate(limits) if own == limit]
        texts = _search(lm, embeddings[rows], mask[rows], limit, end, beams)
        for row, written in zip(rows, _rescore(lm, embeddings[rows], mask[rows], texts, end), strict=True):
            out[row] = written
    return [written for written in out if written is not None]


def _likeliest(
    lm: PreTrainedModel, embeddings: Tensor, mask: Tensor, limits: Sequence[int], end: int, heard: Heard | None
) -> list[Written]:
    model: Any = lm
    cache = DynamicCache(config=lm.config) if heard is None else copy.deepcopy(heard.cache)
    positions = _positions(mask)[:, -embeddings.shape[1] :]
    ids: list[list[int]] = [[] for _ in limits]
    found: list[list[float]] = [[] for _ in limits]
    rows = list(range(len(limits)))
    while rows:
        logits = model(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, 0]
        best, tokens = logits.float().log_softmax(-1).max(-1)
        going = []
        for place, (row, token, score) in enumerate(zip(rows, tokens.tolist(), best.exp().tolist(), strict=True)):
            ids[row].append(token)
            found[row].append(score)
            if token != end and len(ids[row]) < limits[row]:
                going.append(place)
        if not going:
            break
        kept = torch.tensor(going, device=mask.device)
        if len(going) < len(rows):
            cache.batch_select_indices(kept)
            rows = [rows[place] for place in going]
        mask = torch.nn.functional.pad(mask[kept], (0, 1), value=True)
        positions = positions[kept, -1:] + 1
        embeddings = model.get_input_embeddings()(tokens[kept])[:, None]
    return [_without_end(tuple(row), tuple(scores), end) for row, scores in zip(ids, found, strict=True)]


def _search(
    lm: PreTrainedModel, embeddings: Tensor, mask: Tensor, limit: int, end: int, beams: int
) -> list[tuple[int, ...]]:
    """The beam search of transformers; each text with its end, if it came to one."""
    settings = GenerationConfig(
        do_sample=False, num_beams=beams, max_new_tokens=limit, eos_token_id=end, pad_token_id=end, use_cache=True
    )
    found = cast(Any, lm).generate(inputs_embeds=embeddings, attention_mask=mask.long(), generation_config=settings)
    rows = []
    for row in found.tolist():
        rows.append(tuple(row[: row.index(end) + 1] if end in row else row))
    return rows


def _rescore(
    lm: PreTrainedModel, embeddings: Tensor, mask: Tensor, texts: Sequence[tuple[int, ...]], end: int
) -> list[Written]:
    """The probability of every token of texts that were found, in one pass."""
    model: Any = lm
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=mask.device)
    whole = torch.cat([embeddings, model.get_input_embeddings()(ids)], 1)
    seen = torch.nn.functional.pad(mask, (0, longest), value=True)
    logits = model(
        inputs_embeds=whole, attention_mask=seen.long(), position_ids=_positions(seen), logits_to_keep=longest + 1
    ).logits[:, :-1]
    scores = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0].exp().tolist()
    return [_without_end(text, tuple(row[: len(text)]), end) for text, row in zip(texts, scores, strict=True)]


def _without_end(ids: tuple[int, ...], probabilities: tuple[float, ...], end: int) -> Written:
    return Written(ids[:-1] if ids and ids[-1] == end else ids, probabilities)


def _positions(mask: Tensor) -> Tensor:
    """(B, L) the place of each position among those that exist; padding has any."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)
