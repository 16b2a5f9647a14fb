"""Causal language models that read embeddings as a prefix: any `AutoModelForCausalLM` of transformers.

`prefill` reads the start of a batch once and returns a `PrefixCache`; `generate` writes a text after each prefix, by
greedy or beam search, and `score_next` scores the token that follows several prompts; `CausalBackbone` is the same as a
module that takes padded tokens. The model itself is not changed, so LoRA, quantization and hooks work as they do
without a prefix.

Source: the prefix of LLaVA (arXiv 2304.08485) and its kind; Llama-MTSK (arXiv 2503.06362), section 4.1, decodes with 15
beams. The beam search is that of transformers.

Differs from the usual code: a row has no padding between its positions, whichever side its tokens were padded on, so
its output does not depend on its neighbors; nothing is sampled, whatever the model's own generation settings say; every
token comes with its probability; one `PrefixCache` serves any number of continuations.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from tokenthrift.backbones.generation import Generation, greedy, without_end
from tokenthrift.padding import gather_rows, pad_rows, unpad_rows

__all__ = ["CausalBackbone", "Generation", "PrefixCache", "generate", "prefill", "score_next"]


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """The start of a batch of sequences, read once.

    Attributes:
        embeddings: (B, P, H), padded on the left.
        mask: (B, P) bool, True where a position is real.
        positions: (B, P) position of each real embedding; padding has any.
        states: (B, P, H) after the last layer.
        cache: keys and values of all layers. Nothing writes to it: continue from `fork()`.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    states: Tensor
    cache: DynamicCache

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def next_positions(self) -> Tensor:
        """(B,) position that follows each row; 0 for an empty row."""
        return torch.where(self.mask, self.positions + 1, 0).amax(1) if self.mask.shape[1] else self.mask.sum(1)

    def fork(self) -> DynamicCache:
        """A cache to continue from. Tensors are shared until the model appends to them, so this copies no numbers."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache

    def select(self, rows: Sequence[int] | Tensor) -> PrefixCache:
        """Some of the rows, in the order given."""
        index = torch.as_tensor(rows, device=self.mask.device)
        cache = self.fork()
        cache.batch_select_indices(index)
        return PrefixCache(self.embeddings[index], self.mask[index], self.positions[index], self.states[index], cache)


def prefill(lm: PreTrainedModel, rows: Sequence[Tensor], positions: Sequence[Tensor] | None = None) -> PrefixCache:
    """Reads the starts of a batch of sequences. Carries gradient where the caller has it enabled.

    Args:
        lm: the language model.
        rows: (P_i, H) embeddings of each start, without padding; a row may be empty.
        positions: (P_i,) int64 position of each embedding, in place of 0, 1, 2 and so on.
    """
    embeddings, mask = pad_rows(rows, side="left")
    position_ids = _positions(mask) if positions is None else pad_rows(positions, side="left")[0]
    cache = DynamicCache(config=lm.config)
    states = embeddings
    if embeddings.shape[1]:
        states = _call(lm.base_model, embeddings, mask, position_ids, cache)[0]
    return PrefixCache(embeddings, mask, position_ids, states, cache)


def score_next(
    lm: PreTrainedModel, prefix: PrefixCache, prompts: Tensor, *, padding: int = 0, start: int | None = None
) -> Tensor:
    """Scores of every token as the next after each of several prompts that share a prefix and do not see each other.

    All prompts of a row are read in one pass. Carries gradient where the caller has it enabled.

    Args:
        lm: the language model, of a family that takes a mask of four axes.
        prefix: B starts, as `prefill` read them.
        prompts: (B, Q, L) int64 token ids, `padding` after the end of each.
        padding: an id that no prompt holds.
        start: position of the first token of every prompt; the one after the prefix if not given.

    Returns:
        (B, Q, V).
    """
    ids, prompt, step = _join_prompts(prompts, padding)
    own = (prompt[:, :, None] == prompt[:, None]) & (step[:, :, None] >= step[:, None])
    attends = torch.cat([prefix.mask[:, None].expand(-1, ids.shape[1], -1), own], 2)[:, None]
    states = lm.base_model(
        input_ids=ids,
        attention_mask=torch.zeros_like(attends, dtype=lm.dtype).masked_fill(~attends, -torch.inf),
        position_ids=step + (prefix.next_positions[:, None] if start is None else start),
        past_key_values=prefix.fork(),
        use_cache=True,
    ).last_hidden_state
    ends = ((prompts != padding).sum(2).cumsum(1) - 1).clamp(min=0)
    return cast(Tensor, cast(Any, lm).get_output_embeddings()(gather_rows(states, ends)))


def _join_prompts(prompts: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (B, Q, L) in one row without padding: (B, P) ids, the prompt of each, and its index in that."""
    length = prompts.shape[2]
    ids = prompts.flatten(1)
    width = max(int((ids != padding).sum(1).max()), 1)
    order = (ids == padding).long().argsort(dim=1, stable=True)[:, :width]
    return ids.gather(1, order), order // length, order % length


@torch.no_grad()
def generate(
    lm: PreTrainedModel,
    rows: Sequence[Tensor],
    limits: Sequence[int],
    end: int,
    *,
    beams: int = 1,
    prefix: PrefixCache | None = None,
    forbidden: Sequence[int] = (),
) -> list[Generation]:
    """Writes a text after each prefix.

    Args:
        lm: the language model.
        rows: (L_i, H) embeddings, at least one position each: whole prefixes, or what follows `prefix` in them.
        limits: most tokens of each text, its end included.
        end: token that ends a text.
        beams: width of the search; 1 is greedy.
        prefix: starts that `prefill` has read. A beam search, and a model with windows of attention, read them again.
        forbidden: tokens that are never written.

    Raises:
        ValueError: a row without a position, a limit or a width below 1, or a search that reads the prefix again after
            one whose positions do not count from 0.
    """
    if not all(map(len, rows)) or min(limits, default=1) < 1 or beams < 1:
        raise ValueError("generation needs a position in every row, limits from 1 and a beam width from 1")
    if not rows:
        return []
    if prefix is not None and (beams > 1 or any(layer.is_sliding for layer in prefix.cache.layers)):
        # A beam search builds its own cache, and a window of attention counts the padding between the two parts.
        starts = unpad_rows(prefix.positions, prefix.mask)
        if any(int(start[-1]) >= len(start) for start in starts if len(start)):
            raise ValueError("this search reads the prefix again, so the prefix needs positions that count from 0")
        heads = unpad_rows(prefix.embeddings, prefix.mask)
        rows, prefix = [torch.cat(pair) for pair in zip(heads, rows, strict=True)], None
    if beams > 1:
        return _beam_search(lm, rows, limits, end, beams, forbidden)
    embeddings, mask = pad_rows(rows, side="left")
    positions = _positions(mask)
    cache = DynamicCache(config=lm.config)
    if prefix is not None:
        positions = positions + prefix.next_positions[:, None]
        mask = torch.cat([prefix.mask, mask], 1)
        cache = prefix.fork()
    logits = _logits(lm, embeddings, mask, positions, cache, 1)[:, 0]

    def step(tokens: Tensor, kept_rows: Tensor) -> Tensor:
        nonlocal mask, positions
        if len(kept_rows) < len(mask):
            cache.batch_select_indices(kept_rows)
        mask = F.pad(mask[kept_rows], (0, 1), value=True)
        positions = positions[kept_rows, -1:] + 1
        return _logits(lm, lm.get_input_embeddings()(tokens)[:, None], mask, positions, cache, 1)[:, 0]

    return greedy(logits, step, limits, end, forbidden=forbidden)


def _beam_search(
    lm: PreTrainedModel, rows: Sequence[Tensor], limits: Sequence[int], end: int, beams: int, forbidden: Sequence[int]
) -> list[Generation]:
    out: dict[int, Generation] = {}
    for limit in sorted(set(limits)):
        # A beam search that may go on longer can end up elsewhere, so each limit has a search of its own.
        same = [i for i, own in enumerate(limits) if own == limit]
        embeddings, mask = pad_rows([rows[i] for i in same], side="left")
        texts = _search(lm, embeddings, mask, limit, end, beams, forbidden)
        out.update(zip(same, _rescore(lm, embeddings, mask, texts, end, forbidden), strict=True))
    return [out[i] for i in range(len(limits))]


def _search(
    lm: PreTrainedModel,
    embeddings: Tensor,
    mask: Tensor,
    limit: int,
    end: int,
    beams: int,
    forbidden: Sequence[int],
) -> list[tuple[int, ...]]:
    """The beam search of transformers; each text with its end, if it came to one."""
    settings = GenerationConfig(
        do_sample=False,
        num_beams=beams,
        max_new_tokens=limit,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=True,
        suppress_tokens=list(forbidden) or None,
    )
    found = cast(Any, lm).generate(inputs_embeds=embeddings, attention_mask=mask.long(), generation_config=settings)
    return [tuple(row[: row.index(end) + 1] if end in row else row) for row in found.tolist()]


def _rescore(
    lm: PreTrainedModel,
    embeddings: Tensor,
    mask: Tensor,
    texts: Sequence[tuple[int, ...]],
    end: int,
    forbidden: Sequence[int],
) -> list[Generation]:
    """The probability of every token of given texts, in one pass."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=mask.device)
    whole = torch.cat([embeddings, lm.get_input_embeddings()(ids)], 1)
    seen = F.pad(mask, (0, longest), value=True)
    logits = _logits(lm, whole, seen, _positions(seen), None, longest + 1)[:, :-1].float()
    if forbidden:
        logits = logits.index_fill(2, torch.tensor(forbidden, device=logits.device), float("-inf"))
    chances = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].exp().tolist()
    return [without_end(text, row[: len(text)], end) for text, row in zip(texts, chances, strict=True)]


def _positions(mask: Tensor) -> Tensor:
    """(B, L) how many real positions stand before each; padding has any number."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def _call(
    model: Any, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None, **more: Any
) -> Any:
    """A forward pass with the arguments that the model knows; a few families find positions in the mask."""
    known = inspect.signature(model.forward).parameters
    given = {"position_ids": positions, **more}
    return model(
        inputs_embeds=embeddings,
        attention_mask=mask.long(),
        past_key_values=cache,
        use_cache=cache is not None,
        **{name: value for name, value in given.items() if name in known},
    )


def _logits(
    lm: PreTrainedModel, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None, keep: int
) -> Tensor:
    """(B, keep, V) scores of what follows the last positions."""
    logits = _call(lm, embeddings, mask, positions, cache, logits_to_keep=keep).logits
    return cast(Tensor, logits[:, -keep:])


class CausalBackbone(nn.Module):
    """A language model whose input is [tokens, text], each position attending to those before it.

    Args:
        lm: from `AutoModelForCausalLM`, or any causal model of transformers.

    Attributes:
        vocab_size: number of text tokens.
        memory_size: width of the multimodal tokens that it reads.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.vocab_size, self.memory_size = cast(Tensor, lm.get_input_embeddings().weight).shape

    def forward(self, tokens: Tensor, token_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Predicts every token of a text from what is before it.

        Args:
            tokens: (B, N, memory_size), at least one of them real in each row; padding is not read.
            token_mask: (B, N) bool, True where a token is real.
            ids: (B, L) int64; padding any valid id.
            mask: (B, L) bool, True where a text token exists; rows are right-padded.

        Returns:
            (B, L, vocab_size) logits; position i predicts token i of the text. Padding means nothing.

        Raises:
            ValueError: a row has no token, or more positions than the model was built for.
        """
        text: Tensor = self.lm.get_input_embeddings()(ids)
        prefixes = self._prefixes(tokens, token_mask, text.dtype)
        rows, seen = pad_rows([torch.cat(pair) for pair in zip(prefixes, unpad_rows(text, mask), strict=True)])
        self._check_fits(rows.shape[1])
        starts = token_mask.sum(1, keepdim=True) - 1
        # Logits are needed from the last token of the shortest prefix on.
        keep = rows.shape[1] - int(starts.min())
        logits = _logits(self.lm, rows, seen, _positions(seen), None, keep)
        columns = starts - starts.min() + torch.arange(ids.shape[1], device=ids.device)
        columns = columns.clamp(max=keep - 1)  # only padding points beyond its row
        return logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))

    def prefill(self, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Reads the tokens once, for any number of texts after them.

        Args:
            tokens: (B, N, memory_size); padding is not read.
            token_mask: (B, N) bool.
        """
        return prefill(self.lm, self._prefixes(tokens, token_mask, self._dtype))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor | PrefixCache,
        token_mask: Tensor | None = None,
        prompt: Sequence[int] = (),
        *,
        max_new_tokens: int,
        end: int,
        beams: int = 1,
    ) -> list[Generation]:
        """Writes a text for each row; nothing is sampled.

        Args:
            tokens: (B, N, memory_size), or what `prefill` made of them; a cache needs a prompt.
            token_mask: (B, N) bool, with tokens.
            prompt: ids between tokens and text, the same for every row.
            max_new_tokens: most tokens to write, the end included.
            end: id that ends a text, and is not part of it.
            beams: width of the search; 1 is greedy.

        Raises:
            ValueError: as `forward`.
        """
        ids = torch.tensor(prompt, dtype=torch.int64, device=self.lm.device)
        text: Tensor = self.lm.get_input_embeddings()(ids)
        if isinstance(tokens, PrefixCache):
            rows, before, cache = [text] * len(tokens), int(tokens.next_positions.max()), tokens
        else:
            if token_mask is None:
                raise ValueError("tokens need their token_mask")
            rows = [torch.cat([row, text]) for row in self._prefixes(tokens, token_mask, text.dtype)]
            before, cache = 0, None
        self._check_fits(before + max(map(len, rows), default=0) + max_new_tokens)
        return generate(self.lm, rows, [max_new_tokens] * len(rows), end, beams=beams, prefix=cache)

    @property
    def _dtype(self) -> torch.dtype:
        return cast(Tensor, self.lm.get_input_embeddings().weight).dtype

    def _prefixes(self, tokens: Tensor, token_mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """(n_i, memory_size) real tokens of each row."""
        if not bool(token_mask.any(1).all()):
            raise ValueError("every row needs at least one token before its text")
        return unpad_rows(tokens.to(dtype), token_mask)

    def _check_fits(self, length: int) -> None:
        most = getattr(self.lm.config, "max_position_embeddings", None)
        if most is not None and length > most:
            raise ValueError(
                f"tokens and text take {length} positions, the model has {most}: "
                "lower the token budget or shorten the text"
            )
